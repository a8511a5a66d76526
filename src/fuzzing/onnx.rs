//! ONNX models.

use crate::source::onnx::{Run, for_each_initializer};

/// A model.
///
/// # Panics
/// A property is broken.
pub fn onnx(data: &[u8]) {
    let within = |run: Run| run.offset + run.len <= data.len() as u64;
    let mut count = 0;
    let _ = for_each_initializer(data, &mut |tensor| {
        count += 1;
        assert!(tensor.shape.len() <= 32 && tensor.name.len() <= 4096);
        assert!(tensor.raw.is_none_or(within));
        assert!(tensor.typed.is_none_or(|(_, run)| within(run)));
        Ok(())
    });
    // The shortest initializer: a tag and a length.
    assert!(count <= data.len() / 2);
}
