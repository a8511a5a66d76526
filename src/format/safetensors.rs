//! The header of a `.safetensors` file, as the reference implementation writes it, and
//! the names that the format has for element types.
//!
//! A file is the length of the header, the header in JSON, padded with spaces to 8
//! bytes, and the bytes of the tensors one after the other. Tensors of wide elements
//! come first, so each lies at a multiple of its width.

use super::Dtype;
use serde::{Serialize, Serializer, ser::SerializeMap};
use std::{
    cmp::Ordering,
    collections::{BTreeMap, HashSet},
};

/// Longest JSON header in bytes, as in the reference implementation.
pub const MAX_HEADER_LEN: u64 = 100_000_000;
/// Bytes of the length in front of the header.
pub const PREFIX_LEN: u64 = 8;
/// Key of the free texts among the tensors: no tensor can be called so.
pub const METADATA_KEY: &str = "__metadata__";
/// Shortest JSON in bytes: `{}`.
const MIN_JSON_LEN: u64 = 2;
/// Data begin at a multiple of this many bytes.
const ALIGNMENT: usize = 8;

/// Every type with its name, in the order of the reference implementation: that of the
/// widths, and so the reverse of the order of tensors in a file.
const NAMES: &[(Dtype, &str)] = &[
    (Dtype::Bool, "BOOL"),
    (Dtype::F4E2m1fn, "F4"),
    (Dtype::F6E2m3fn, "F6_E2M3"),
    (Dtype::F6E3m2fn, "F6_E3M2"),
    (Dtype::U8, "U8"),
    (Dtype::I8, "I8"),
    (Dtype::F8E5m2, "F8_E5M2"),
    (Dtype::F8E4m3fn, "F8_E4M3"),
    (Dtype::F8E8m0fnu, "F8_E8M0"),
    (Dtype::F8E4m3fnuz, "F8_E4M3FNUZ"),
    (Dtype::F8E5m2fnuz, "F8_E5M2FNUZ"),
    (Dtype::I16, "I16"),
    (Dtype::U16, "U16"),
    (Dtype::F16, "F16"),
    (Dtype::Bf16, "BF16"),
    (Dtype::I32, "I32"),
    (Dtype::U32, "U32"),
    (Dtype::F32, "F32"),
    (Dtype::C64, "C64"),
    (Dtype::F64, "F64"),
    (Dtype::I64, "I64"),
    (Dtype::U64, "U64"),
];

/// The type that the format calls so; `None` where it is not known here.
pub fn dtype_of(name: &str) -> Option<Dtype> {
    let found = NAMES.iter().find(|(_, known)| *known == name);
    found.map(|&(dtype, _)| dtype)
}

/// What the format calls a type; `None` where it has no name for it.
pub fn name_of(dtype: Dtype) -> Option<&'static str> {
    rank_and_name(dtype).map(|(_, name)| name)
}

fn rank_and_name(dtype: Dtype) -> Option<(usize, &'static str)> {
    let rank = NAMES.iter().position(|(known, _)| *known == dtype)?;
    NAMES.get(rank).map(|&(_, name)| (rank, name))
}

/// A tensor to be described: little-endian, in C order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TensorSpec<'a> {
    /// Unique in the file.
    pub name: &'a str,
    /// Element type.
    pub dtype: Dtype,
    /// Elements per dimension.
    pub shape: &'a [u64],
}

/// The beginning of a file, and where its tensors go.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Encoded {
    /// All bytes in front of the first tensor.
    pub header: Vec<u8>,
    /// First byte in the file of each tensor, in the order in which they were given.
    pub offsets: Vec<u64>,
    /// Numbers of the tensors in the order of their bytes. They leave no hole.
    pub order: Vec<usize>,
    /// Length of the whole file in bytes.
    pub file_len: u64,
}

/// Tensors that cannot stand in a `.safetensors` file.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EncodeError {
    /// The format has no name for the element type.
    #[error("tensor {name:?}: safetensors has no element type {dtype}")]
    Dtype {
        /// The tensor.
        name: String,
        /// Its element type.
        dtype: Dtype,
    },
    /// A name that means something else, or one that two tensors have.
    #[error("tensor {name:?}: {why}")]
    Name {
        /// The tensor.
        name: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A shape without a length in bytes, or a file longer than can be counted.
    #[error("tensor {name:?} of shape {shape:?}: its bytes cannot be counted in 64 bits")]
    Len {
        /// The tensor.
        name: String,
        /// Elements per dimension.
        shape: Vec<u64>,
    },
    /// The header is longer than readers take.
    #[error("the header has {found} bytes, the limit of safetensors is {MAX_HEADER_LEN}")]
    TooLong {
        /// Length of the JSON in bytes.
        found: u64,
    },
    /// Fewer bytes were set aside for the header than it takes.
    #[error("the header takes {needed} bytes, {room} were set aside")]
    Room {
        /// Its length in bytes.
        needed: u64,
        /// What there is, in bytes.
        room: u64,
    },
}

/// The header of a file of these tensors. Tensors lie in the order of the reference
/// implementation: wide types first, those of a type by name.
///
/// ```
/// use std::collections::BTreeMap;
/// use tensorferry::Dtype;
/// use tensorferry::format::safetensors::{TensorSpec, encode_header};
///
/// let mask = TensorSpec { name: "mask", dtype: Dtype::U8, shape: &[3] };
/// let weight = TensorSpec { name: "weight", dtype: Dtype::F32, shape: &[2, 2] };
/// let file = encode_header(&[mask, weight], &BTreeMap::new())?;
/// let data_offset = file.header.len() as u64;
/// assert_eq!(file.order, [1, 0]);
/// assert_eq!(file.offsets, [data_offset + 16, data_offset]);
/// assert_eq!(file.file_len, data_offset + 19);
/// # Ok::<(), tensorferry::format::safetensors::EncodeError>(())
/// ```
///
/// # Errors
/// [`EncodeError`], of the first tensor that has one.
pub fn encode_header(
    tensors: &[TensorSpec<'_>],
    metadata: &BTreeMap<String, String>,
) -> Result<Encoded, EncodeError> {
    let mut order: Vec<usize> = (0..tensors.len()).collect();
    let key = |index: usize| tensors.get(index).map(|t| (rank_and_name(t.dtype), t.name));
    order.sort_by(|&a, &b| match (key(a), key(b)) {
        (Some((rank_a, a)), Some((rank_b, b))) => rank_b.cmp(&rank_a).then_with(|| a.cmp(b)),
        _ => Ordering::Equal,
    });
    let ordered: Vec<_> = order
        .iter()
        .filter_map(|&i| tensors.get(i).copied())
        .collect();
    let (header, ends) = encode(&ordered, metadata, None)?;
    let data_offset = header.len() as u64;
    let mut offsets = vec![data_offset; tensors.len()];
    // Each begins where the one before it ends.
    for (&index, &end) in order.iter().skip(1).zip(&ends) {
        offsets[index] = data_offset.saturating_add(end);
    }
    let data_len = ends.last().copied().unwrap_or(0);
    Ok(Encoded {
        file_len: data_offset.saturating_add(data_len),
        order,
        offsets,
        header,
    })
}

/// The header of a file whose tensors lie in just this order, padded so that the first
/// begins at byte `header_len`.
///
/// # Errors
/// [`EncodeError`]; [`EncodeError::Room`] when it does not fit.
pub fn encode_in_order(
    tensors: &[TensorSpec<'_>],
    metadata: &BTreeMap<String, String>,
    header_len: u64,
) -> Result<Vec<u8>, EncodeError> {
    encode(tensors, metadata, Some(header_len)).map(|(header, _)| header)
}

/// Whether so many bytes can come before the first tensor.
pub fn is_header_len(len: u64) -> bool {
    let limits = PREFIX_LEN + MIN_JSON_LEN..=PREFIX_LEN + MAX_HEADER_LEN;
    len.is_multiple_of(ALIGNMENT as u64) && limits.contains(&len)
}

/// Whether the format can hold a tensor of this name and type, little-endian and in C order.
pub fn can_hold(name: &str, dtype: Dtype) -> bool {
    name != METADATA_KEY && name_of(dtype).is_some()
}

/// The header, and where each tensor ends, counted from the end of the header.
fn encode(
    tensors: &[TensorSpec<'_>],
    metadata: &BTreeMap<String, String>,
    header_len: Option<u64>,
) -> Result<(Vec<u8>, Vec<u64>), EncodeError> {
    let mut names = HashSet::with_capacity(tensors.len());
    let mut rows = Vec::with_capacity(tensors.len());
    let (mut ends, mut at) = (Vec::with_capacity(tensors.len()), 0u64);
    for tensor in tensors {
        let wrong = |why| EncodeError::Name {
            name: tensor.name.to_owned(),
            why,
        };
        let dtype = name_of(tensor.dtype).ok_or_else(|| EncodeError::Dtype {
            name: tensor.name.to_owned(),
            dtype: tensor.dtype,
        })?;
        if tensor.name == METADATA_KEY {
            return Err(wrong("safetensors keeps that name for itself"));
        }
        if !names.insert(tensor.name) {
            return Err(wrong("it occurs twice"));
        }
        let byte_len = tensor.dtype.byte_len(tensor.shape);
        let end = byte_len.and_then(|len| at.checked_add(len));
        let end = end.ok_or_else(|| EncodeError::Len {
            name: tensor.name.to_owned(),
            shape: tensor.shape.to_vec(),
        })?;
        let info = Info {
            dtype,
            shape: tensor.shape,
            data_offsets: (at, end),
        };
        rows.push((tensor.name, info));
        ends.push(end);
        at = end;
    }

    let json = Json {
        metadata,
        rows: &rows,
    };
    // Texts, numbers and maps with texts as keys cannot fail.
    let json = serde_json::to_vec(&json).unwrap_or_default();
    let needed = PREFIX_LEN + json.len() as u64;
    let len = header_len.unwrap_or(needed.next_multiple_of(ALIGNMENT as u64));
    let json_len = len.saturating_sub(PREFIX_LEN);
    if json_len > MAX_HEADER_LEN {
        return Err(EncodeError::TooLong { found: json_len });
    }
    if needed > len {
        return Err(EncodeError::Room { needed, room: len });
    }
    let mut header = json_len.to_le_bytes().to_vec();
    header.extend_from_slice(&json);
    header.resize(len as usize, b' ');
    Ok((header, ends))
}

struct Json<'a> {
    metadata: &'a BTreeMap<String, String>,
    rows: &'a [(&'a str, Info<'a>)],
}

#[derive(Serialize)]
struct Info<'a> {
    dtype: &'a str,
    shape: &'a [u64],
    data_offsets: (u64, u64),
}

impl Serialize for Json<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA_KEY, self.metadata)?;
        }
        for (name, info) in self.rows {
            map.serialize_entry(name, info)?;
        }
        map.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec<'a>(name: &'a str, dtype: Dtype, shape: &'a [u64]) -> TensorSpec<'a> {
        TensorSpec { name, dtype, shape }
    }

    fn json_of(encoded: &Encoded) -> String {
        String::from_utf8(encoded.header[8..].to_vec()).unwrap()
    }

    #[test]
    fn headers_are_those_of_the_reference_implementation() {
        // Written by `safetensors.serialize` 0.8.0 of tensors of these types, whose names
        // count up in another order than that in which they lie.
        let expected = concat!(
            r#"{"19":{"dtype":"U64","shape":[2],"data_offsets":[0,16]},"#,
            r#""18":{"dtype":"I64","shape":[2],"data_offsets":[16,32]},"#,
            r#""17":{"dtype":"F64","shape":[2],"data_offsets":[32,48]},"#,
            r#""16":{"dtype":"C64","shape":[2],"data_offsets":[48,64]},"#,
            r#""15":{"dtype":"F32","shape":[2],"data_offsets":[64,72]},"#,
            r#""14":{"dtype":"U32","shape":[2],"data_offsets":[72,80]},"#,
            r#""13":{"dtype":"I32","shape":[2],"data_offsets":[80,88]},"#,
            r#""12":{"dtype":"BF16","shape":[2],"data_offsets":[88,92]},"#,
            r#""11":{"dtype":"F16","shape":[2],"data_offsets":[92,96]},"#,
            r#""10":{"dtype":"U16","shape":[2],"data_offsets":[96,100]},"#,
            r#""09":{"dtype":"I16","shape":[2],"data_offsets":[100,104]},"#,
            r#""06":{"dtype":"F8_E5M2FNUZ","shape":[2],"data_offsets":[104,106]},"#,
            r#""05":{"dtype":"F8_E4M3FNUZ","shape":[2],"data_offsets":[106,108]},"#,
            r#""07":{"dtype":"F8_E8M0","shape":[2],"data_offsets":[108,110]},"#,
            r#""04":{"dtype":"F8_E4M3","shape":[2],"data_offsets":[110,112]},"#,
            r#""03":{"dtype":"F8_E5M2","shape":[2],"data_offsets":[112,114]},"#,
            r#""02":{"dtype":"I8","shape":[2],"data_offsets":[114,116]},"#,
            r#""01":{"dtype":"U8","shape":[2],"data_offsets":[116,118]},"#,
            r#""08":{"dtype":"F4","shape":[4],"data_offsets":[118,120]},"#,
            r#""00":{"dtype":"BOOL","shape":[2],"data_offsets":[120,122]},"#,
            "\"zz/é\u{2028}\u{7f}\\\"\\\\\\n\\u0001\":",
            r#"{"dtype":"BOOL","shape":[],"data_offsets":[122,123]}}   "#,
        );
        let dtypes = [
            Dtype::Bool,
            Dtype::U8,
            Dtype::I8,
            Dtype::F8E5m2,
            Dtype::F8E4m3fn,
            Dtype::F8E4m3fnuz,
            Dtype::F8E5m2fnuz,
            Dtype::F8E8m0fnu,
            Dtype::F4E2m1fn,
            Dtype::I16,
            Dtype::U16,
            Dtype::F16,
            Dtype::Bf16,
            Dtype::I32,
            Dtype::U32,
            Dtype::F32,
            Dtype::C64,
            Dtype::F64,
            Dtype::I64,
            Dtype::U64,
        ];
        let names: Vec<String> = (0..dtypes.len()).map(|i| format!("{i:02}")).collect();
        let mut specs: Vec<_> = (names.iter().zip(dtypes))
            .map(|(name, dtype)| match dtype {
                Dtype::F4E2m1fn => spec(name, dtype, &[4]),
                _ => spec(name, dtype, &[2]),
            })
            .collect();
        specs.push(spec("zz/é\u{2028}\u{7f}\"\\\n\u{1}", Dtype::Bool, &[]));
        let encoded = encode_header(&specs, &BTreeMap::new()).unwrap();
        assert_eq!(json_of(&encoded), expected);
        let (prefix, json) = encoded.header.split_at(8);
        assert_eq!(prefix, (json.len() as u64).to_le_bytes());
        assert_eq!(encoded.file_len, encoded.header.len() as u64 + 123);
        assert_eq!(encoded.order[..3], [19, 18, 17]);
        assert_eq!(encoded.offsets[17], encoded.header.len() as u64 + 32);
    }

    #[test]
    fn empty_files_and_metadata_are_those_of_the_reference_implementation() {
        let none = BTreeMap::new();
        let texts = BTreeMap::from([("a".to_owned(), "b".to_owned())]);
        let empty = encode_header(&[], &none).unwrap();
        assert_eq!(empty.header, b"\x08\0\0\0\0\0\0\0{}      ");
        assert_eq!(empty.file_len, 16);
        let text = encode_header(&[], &texts).unwrap();
        assert_eq!(
            text.header,
            b" \0\0\0\0\0\0\0{\"__metadata__\":{\"a\":\"b\"}}      "
        );
        let tensors = [spec("b", Dtype::I8, &[1]), spec("a", Dtype::F32, &[0, 3])];
        let zero = encode_header(&tensors, &none).unwrap();
        let json = r#"{"a":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},"b":{"dtype":"I8","shape":[1],"data_offsets":[0,1]}}"#;
        assert_eq!(json_of(&zero).trim_end(), json);
    }

    #[test]
    fn every_name_is_found_again_and_widths_never_fall() {
        let mut last = 0;
        for &(dtype, name) in NAMES {
            assert_eq!((dtype_of(name), name_of(dtype)), (Some(dtype), Some(name)));
            // Packed elements are read by bytes, whatever they are wide.
            let width = dtype.bits().div_ceil(8);
            assert!(width >= last, "{name}");
            last = width;
        }
        assert_eq!(dtype_of("F128"), None);
        assert_eq!(name_of(Dtype::C128), None);
    }

    #[test]
    fn what_the_format_cannot_say_is_refused() {
        let none = BTreeMap::new();
        let refused = |specs: &[TensorSpec<'_>]| encode_header(specs, &none).unwrap_err();
        let a = spec("a", Dtype::U8, &[1]);
        assert!(matches!(
            refused(&[a, spec("q", Dtype::Q8_0, &[32])]),
            EncodeError::Dtype { name, dtype: Dtype::Q8_0 } if name == "q"
        ));
        assert!(matches!(refused(&[a, a]), EncodeError::Name { .. }));
        let reserved = spec(METADATA_KEY, Dtype::U8, &[1]);
        assert!(matches!(refused(&[reserved]), EncodeError::Name { .. }));
        let half = spec("h", Dtype::F4E2m1fn, &[3]);
        assert!(matches!(refused(&[half]), EncodeError::Len { .. }));
        let long = spec("l", Dtype::U8, &[u64::MAX]);
        assert!(matches!(refused(&[long, a]), EncodeError::Len { .. }));
        let text = BTreeMap::from([("a".to_owned(), "x".repeat(MAX_HEADER_LEN as usize))]);
        assert!(matches!(
            encode_header(&[], &text),
            Err(EncodeError::TooLong { found }) if found > MAX_HEADER_LEN
        ));
    }

    #[test]
    fn a_header_takes_the_room_it_was_given_or_says_that_it_cannot() {
        let tensors = [spec("z", Dtype::U8, &[3]), spec("a", Dtype::F32, &[2])];
        let metadata = BTreeMap::new();
        let header = encode_in_order(&tensors, &metadata, 800).unwrap();
        assert_eq!(
            (header.len(), &header[..8]),
            (800, &792u64.to_le_bytes()[..])
        );
        let json = r#"{"z":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"a":{"dtype":"F32","shape":[2],"data_offsets":[3,11]}}"#;
        let (text, spaces) = header[8..].split_at(json.len());
        assert_eq!(text, json.as_bytes());
        assert!(spaces.iter().all(|&b| b == b' '));
        let needed = 8 + json.len() as u64;
        assert!(encode_in_order(&tensors, &metadata, needed).is_ok());
        let refused = encode_in_order(&tensors, &metadata, needed - 1);
        let room = needed - 1;
        assert_eq!(refused, Err(EncodeError::Room { needed, room }));
    }

    #[test]
    fn data_begin_behind_any_json_at_a_multiple_of_eight() {
        for good in [16, 24, 100_000_008] {
            assert!(is_header_len(good), "{good}");
        }
        for bad in [0, 8, 15, 17, 100_000_016, u64::MAX] {
            assert!(!is_header_len(bad), "{bad}");
        }
    }
}
