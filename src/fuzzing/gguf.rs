//! Headers of GGUF files.

use crate::source::gguf::{HeaderError, parse};

/// The beginning of a file.
///
/// # Panics
/// A property is broken.
pub fn gguf(data: &[u8]) {
    let header = match parse(data) {
        Ok(header) => header,
        // More bytes may help, fewer never do.
        Err(HeaderError::Short) => {
            let shorter = &data[..data.len() / 2];
            assert!(parse(shorter).is_err(), "half of it was enough");
            return;
        }
        Err(HeaderError::Content(_)) => return,
    };
    // The shortest tensor: lengths of a name and of a shape, a type and an offset.
    assert!(header.tensors.len() <= data.len() / 24);
    let kept: usize = header.metadata.iter().map(|(k, v)| k.len() + v.len()).sum();
    assert!(kept <= 1 << 20);
    for tensor in &header.tensors {
        // A name may still be empty: that is for the builder to refuse.
        let dtype = tensor.header.dtype().expect("these entries are tensors");
        assert_eq!(
            dtype.byte_len(&tensor.header.shape),
            Some(tensor.header.byte_len)
        );
    }
    let longer = [data, &[0; 64]].concat();
    assert_eq!(
        parse(&longer),
        Ok(header),
        "what follows a header changes it"
    );
}
