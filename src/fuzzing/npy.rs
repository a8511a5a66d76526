//! `.npy` headers.

use super::input::Input;
use crate::format::{Dtype, npy as format};

/// Any bytes as the beginning of a `.npy` file, and as an array of which a header
/// is written.
///
/// # Panics
/// A property is broken.
pub fn npy(data: &[u8]) {
    read(data);
    written(data);
}

fn read(data: &[u8]) {
    let len = format::header_len(data);
    if let Ok(len) = len {
        assert!((10..=12 + (1 << 20)).contains(&len), "{len}");
    }
    let Ok(header) = format::parse_header(data) else {
        return;
    };
    let len = len.expect("a header that parses has a length");
    assert_eq!(header.data_offset, len as u64);
    // What stands behind the header does not matter, and all of it is needed.
    assert_eq!(format::parse_header(&data[..len]).as_ref(), Ok(&header));
    assert!(matches!(
        format::parse_header(&data[..len - 1]),
        Err(format::NpyError::Short { .. })
    ));
    let Ok((dtype, _)) = format::dtype_of_descr(&header.descr) else {
        return;
    };
    let _ = dtype.byte_len(&header.shape);
    check_written(&header.descr, header.fortran_order, &header.shape);
}

fn written(data: &[u8]) {
    let mut input = Input::new(data);
    let dtype = input.pick(Dtype::ALL);
    let big_endian = input.chance(4) && dtype.can_be_big_endian();
    let fortran_order = input.chance(2);
    let shape: Vec<u64> = (0..input.below(40))
        .map(|_| input.u64() >> input.below(64))
        .collect();
    let _ = dtype.byte_len(&shape);
    check_written(&dtype.npy_descr(big_endian), fortran_order, &shape);
}

/// A header written and read again says the same.
fn check_written(descr: &str, fortran_order: bool, shape: &[u64]) {
    let bytes = format::encode_header(descr, fortran_order, shape);
    assert!(bytes.starts_with(format::MAGIC) && bytes.ends_with(b"\n"));
    assert!(bytes.len().is_multiple_of(64));
    let back = format::parse_header(&bytes).expect("a header that was written can be read");
    assert_eq!(
        (back.descr.as_str(), back.fortran_order, &back.shape[..]),
        (descr, fortran_order, shape)
    );
    assert_eq!(back.data_offset, bytes.len() as u64);
}
