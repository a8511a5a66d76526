//! The header of a `.npy` file: numpy's exact bytes out, every spelling in.
//!
//! A file is a magic number, a version, a header length, a Python dict literal
//! padded to 64 bytes and the raw elements. This writes what `numpy.save`
//! writes, byte for byte, and reads versions 1 to 3 with keys in any order.

use super::Dtype;

mod literal;

/// First bytes of every `.npy` file.
pub const MAGIC: &[u8; 6] = b"\x93NUMPY";
/// Longest dict literal that is read, in bytes: numpy's own are below 1 KiB.
const MAX_DICT_LEN: usize = 1 << 20;
/// Digits that numpy leaves room for, so that appending rewrites in place.
const GROWTH_DIGITS: usize = 21;
/// Data begins at a multiple of this many bytes.
const ALIGNMENT: usize = 64;

/// What a `.npy` header says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NpyHeader {
    /// Element type as written, such as `<f4`.
    pub descr: String,
    /// The first index varies fastest.
    pub fortran_order: bool,
    /// Elements per dimension.
    pub shape: Vec<u64>,
    /// Bytes before the first element.
    pub data_offset: u64,
}

/// A `.npy` header cannot be read.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NpyError {
    /// The first bytes are not those of a `.npy` file.
    #[error("not a .npy file: it does not begin with \\x93NUMPY")]
    NotNpy,
    /// A version that does not exist yet.
    #[error("version {major}.{minor} of .npy is not known, only 1.0 to 3.0")]
    Version {
        /// First number.
        major: u8,
        /// Second number.
        minor: u8,
    },
    /// More bytes are needed.
    #[error("the header is {needed} bytes long, only {found} are there")]
    Short {
        /// Bytes of the whole header.
        needed: u64,
        /// Bytes at hand.
        found: u64,
    },
    /// The length field asks for too much.
    #[error("a header of {found} bytes is longer than the limit of {limit}")]
    TooLong {
        /// Claimed length in bytes.
        found: u64,
        /// Most bytes allowed.
        limit: u64,
    },
    /// The dict literal breaks Python's rules or numpy's.
    #[error("bad header at byte {at} of the dict: {why}")]
    Syntax {
        /// Offset in the dict literal, in bytes.
        at: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// Elements are pickled Python objects.
    #[error("element type {descr:?} holds python objects, which are never unpickled")]
    Object {
        /// The type as written.
        descr: String,
    },
    /// Elements are records of several fields.
    #[error("structured element types are not supported")]
    Structured,
    /// An element type that has no counterpart here.
    #[error("element type {descr:?} is not supported")]
    Descr {
        /// The type as written, cut to 64 characters.
        descr: String,
    },
}

/// The header that numpy writes for an array: version 1, or 2 when the dict does
/// not fit its 16-bit length.
///
/// `fortran_order` is printed as given; numpy itself says `True` only for arrays
/// that are not C-contiguous as well.
pub fn encode_header(descr: &str, fortran_order: bool, shape: &[u64]) -> Vec<u8> {
    let mut dict = format!(
        "{{'descr': {}, 'fortran_order': {}, 'shape': {}, }}",
        python_string(descr),
        if fortran_order { "True" } else { "False" },
        python_tuple(shape),
    );
    let growing = if fortran_order {
        shape.last()
    } else {
        shape.first()
    };
    if let Some(axis) = growing {
        let digits = axis.to_string().len();
        dict.extend(std::iter::repeat_n(
            ' ',
            GROWTH_DIGITS.saturating_sub(digits),
        ));
    }

    let padding = |prefix_len: usize| {
        let unpadded = prefix_len + dict.len() + 1;
        ALIGNMENT - unpadded % ALIGNMENT
    };
    let dict_len = |prefix_len: usize| dict.len() + padding(prefix_len) + 1;
    let mut bytes = MAGIC.to_vec();
    match u16::try_from(dict_len(10)) {
        Ok(len) => {
            bytes.extend_from_slice(&[1, 0]);
            bytes.extend_from_slice(&len.to_le_bytes());
        }
        Err(_) => {
            bytes.extend_from_slice(&[2, 0]);
            bytes.extend_from_slice(&(dict_len(12) as u32).to_le_bytes());
        }
    }
    let padding = padding(bytes.len());
    bytes.extend_from_slice(dict.as_bytes());
    bytes.resize(bytes.len() + padding, b' ');
    bytes.push(b'\n');
    bytes
}

/// Bytes of the whole header, which is where the data begin, from the first 12
/// bytes of a file (10 are enough for version 1).
///
/// # Errors
/// [`NpyError::NotNpy`], [`NpyError::Version`], [`NpyError::Short`] when a longer
/// prefix is needed, [`NpyError::TooLong`] above 1 MiB.
pub fn header_len(first_12: &[u8]) -> Result<usize, NpyError> {
    let found = first_12.len() as u64;
    if !first_12.iter().zip(MAGIC).all(|(a, b)| a == b) {
        return Err(NpyError::NotNpy);
    }
    let short = |needed| NpyError::Short { needed, found };
    let (&major, &minor) = match (first_12.get(6), first_12.get(7)) {
        (Some(major), Some(minor)) => (major, minor),
        _ => return Err(short(8)),
    };
    let (prefix_len, dict_len) = match (major, minor) {
        (1, 0) => match first_12.get(8..10) {
            Some(&[a, b]) => (10, u32::from(u16::from_le_bytes([a, b]))),
            _ => return Err(short(10)),
        },
        (2 | 3, 0) => match first_12.get(8..12) {
            Some(&[a, b, c, d]) => (12, u32::from_le_bytes([a, b, c, d])),
            _ => return Err(short(12)),
        },
        _ => return Err(NpyError::Version { major, minor }),
    };
    match usize::try_from(dict_len) {
        Ok(len) if len <= MAX_DICT_LEN => Ok(prefix_len + len),
        _ => Err(NpyError::TooLong {
            found: u64::from(dict_len),
            limit: MAX_DICT_LEN as u64,
        }),
    }
}

/// Reads a header from the first bytes of a file; [`header_len`] says how many
/// are needed, and more do no harm.
///
/// # Errors
/// Those of [`header_len`]; [`NpyError::Syntax`] for anything but a dict of
/// exactly `descr`, `fortran_order` and `shape`; [`NpyError::Object`] and
/// [`NpyError::Structured`] for elements that are not numbers.
pub fn parse_header(prefix: &[u8]) -> Result<NpyHeader, NpyError> {
    let needed = header_len(prefix)?;
    let short = NpyError::Short {
        needed: needed as u64,
        found: prefix.len() as u64,
    };
    let header = prefix.get(..needed).ok_or(short)?;
    let utf8 = header[6] == 3;
    let dict = &header[if header[6] == 1 { 10 } else { 12 }..];
    let (descr, fortran_order, shape) = literal::parse_dict(dict, utf8)?;
    if descr
        .trim_start_matches(['<', '>', '|', '='])
        .starts_with('O')
    {
        return Err(NpyError::Object {
            descr: clip(&descr),
        });
    }
    Ok(NpyHeader {
        descr,
        fortran_order,
        shape,
        data_offset: needed as u64,
    })
}

/// The element type of a `descr`, and whether it is big-endian.
///
/// numpy's own names, its voids of 1, 2 and 4 bytes, the two spellings of
/// ml_dtypes that numpy cannot read back (`<f1`, `<W4`), and bare names such as
/// `bfloat16`.
///
/// # Errors
/// [`NpyError::Object`] for pickled objects, [`NpyError::Descr`] for every other
/// type without a counterpart: strings, dates, long doubles, wider voids.
pub fn dtype_of_descr(descr: &str) -> Result<(Dtype, bool), NpyError> {
    let unsupported = || NpyError::Descr { descr: clip(descr) };
    let (mark, code) = match descr.chars().next() {
        Some(mark @ ('<' | '>' | '|' | '=')) => (mark, &descr[1..]),
        _ => ('=', descr),
    };
    let dtype = match code {
        "b1" => Dtype::Bool,
        "i1" => Dtype::I8,
        "i2" => Dtype::I16,
        "i4" => Dtype::I32,
        "i8" => Dtype::I64,
        "u1" => Dtype::U8,
        "u2" => Dtype::U16,
        "u4" => Dtype::U32,
        "u8" => Dtype::U64,
        "f1" => Dtype::F8E5m2,
        "f2" => Dtype::F16,
        "f4" => Dtype::F32,
        "f8" => Dtype::F64,
        "c8" => Dtype::C64,
        "c16" => Dtype::C128,
        "V1" => Dtype::V1,
        "V2" => Dtype::Bf16,
        "V4" => Dtype::V4,
        "W4" => Dtype::C32,
        _ if code.starts_with('O') => return Err(NpyError::Object { descr: clip(descr) }),
        // A name takes no byte order mark.
        name if name == descr => match Dtype::from_name(name).ok_or_else(unsupported)? {
            // numpy arrays hold one such element per byte; here the type means
            // packed ones, so only the bytes are kept.
            packed if packed.is_packed() => Dtype::V1,
            dtype => dtype,
        },
        _ => return Err(unsupported()),
    };
    let big_endian = mark == '>' || (mark == '=' && cfg!(target_endian = "big"));
    if dtype.can_be_big_endian() || !big_endian {
        return Ok((dtype, big_endian));
    }
    // One byte has no order; wider voids have one that no header can tell.
    if dtype.bits() <= 8 {
        Ok((dtype, false))
    } else {
        Err(unsupported())
    }
}

fn python_string(text: &str) -> String {
    let quote = if text.contains('\'') && !text.contains('"') {
        '"'
    } else {
        '\''
    };
    let mut out = String::from(quote);
    for c in text.chars() {
        if c == '\\' || c == quote {
            out.push('\\');
        }
        out.push(c);
    }
    out.push(quote);
    out
}

fn python_tuple(shape: &[u64]) -> String {
    match shape {
        [one] => format!("({one},)"),
        many => {
            let parts: Vec<String> = many.iter().map(u64::to_string).collect();
            format!("({})", parts.join(", "))
        }
    }
}

fn clip(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
mod tests;
