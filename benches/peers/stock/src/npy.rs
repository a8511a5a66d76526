//! As much of the `.npy` format as this program needs.

use std::fs::File;
use std::io::Read;

use crate::Error;

const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
const ALIGNMENT: usize = 64;

pub struct Header {
    pub dtype: String,
    pub shape: Vec<u64>,
}

/// Reads the header and leaves the file at the first byte of data.
pub fn read_header(file: &mut File) -> Result<Header, Error> {
    let mut start = [0; 10];
    file.read_exact(&mut start)?;
    if &start[..8] != MAGIC {
        return Err("not a .npy file of version 1".into());
    }
    let mut text = vec![0; usize::from(u16::from_le_bytes([start[8], start[9]]))];
    file.read_exact(&mut text)?;
    let text = String::from_utf8(text)?;
    if !text.contains("'fortran_order': False") {
        return Err("only arrays in C order".into());
    }
    let dtype = between(&text, "'descr': '", "'")?.to_owned();
    let shape = between(&text, "'shape': (", ")")?;
    let shape = shape
        .split(',')
        .map(str::trim)
        .filter(|part| !part.is_empty());
    Ok(Header {
        dtype,
        shape: shape.map(str::parse).collect::<Result<_, _>>()?,
    })
}

fn between<'a>(text: &'a str, before: &str, after: &str) -> Result<&'a str, Error> {
    let (_, rest) = text.split_once(before).ok_or("malformed header")?;
    let (found, _) = rest.split_once(after).ok_or("malformed header")?;
    Ok(found)
}

/// The header of a new file.
pub fn header(dtype: &str, shape: &[u64]) -> Vec<u8> {
    let sizes: String = shape.iter().map(|size| format!("{size},")).collect();
    let mut text = format!("{{'descr': '{dtype}', 'fortran_order': False, 'shape': ({sizes}), }}");
    let unpadded = MAGIC.len() + 2 + text.len() + 1;
    text.push_str(&" ".repeat(unpadded.next_multiple_of(ALIGNMENT) - unpadded));
    text.push('\n');
    let mut header = MAGIC.to_vec();
    header.extend((text.len() as u16).to_le_bytes());
    header.extend(text.as_bytes());
    header
}

/// How many bytes the array has.
pub fn data_bytes(dtype: &str, shape: &[u64]) -> Result<usize, Error> {
    let item: u64 = dtype
        .trim_start_matches(|c: char| !c.is_ascii_digit())
        .parse()?;
    let bytes = shape
        .iter()
        .try_fold(item, |bytes, size| bytes.checked_mul(*size));
    Ok(usize::try_from(bytes.ok_or("too large")?)?)
}
