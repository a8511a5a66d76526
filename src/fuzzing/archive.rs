//! Zip archives, those of numpy and of Keras among them.

use crate::source::{npz, view::View, zip};

/// Any bytes as an archive.
///
/// # Panics
/// A property is broken.
pub fn archive(data: &[u8]) {
    let view = View::memory(data);
    let Ok(archive) = zip::read(view) else {
        return;
    };
    let len = data.len() as u64;
    let mut spans = Vec::new();
    for member in &archive.members {
        let end = member.data_offset + member.stored_len;
        assert!(end <= archive.directory_offset && end <= len);
        spans.push((member.data_offset, end));
    }
    spans.sort_unstable();
    assert!(
        spans.windows(2).all(|pair| pair[0].1 <= pair[1].0),
        "members overlap"
    );
    assert!(archive.directory_offset + archive.directory_len <= len);
    for found in npz::tensors(view, &archive).flatten().flatten() {
        found.header.check().expect("every header was checked");
    }
}
