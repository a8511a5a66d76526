//! safetensors: `u64 N`, `N` bytes of JSON, data without holes.

use super::{SourceError, builder::Builder, files::OpenFile};
pub use crate::format::safetensors::MAX_HEADER_LEN;
use crate::format::safetensors::{METADATA_KEY, PREFIX_LEN, dtype_of};
use crate::plan::{EntryHeader, MAX_DIMENSIONS, MAX_ENTRIES, PlanError, clip};
use serde::Deserialize;
use serde::de::{Deserializer, Error, IgnoredAny, MapAccess, SeqAccess, Visitor};
use std::collections::BTreeMap;
use std::fmt;

/// What the JSON header of a file says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Header {
    /// The texts of `__metadata__`; anything else in there is dropped.
    pub metadata: BTreeMap<String, String>,
    /// Tensors in the order of their data.
    pub tensors: Vec<TensorInfo>,
}

/// One tensor of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorInfo {
    /// Name, type, shape and length.
    pub header: EntryHeader,
    /// First byte, counted from the end of the JSON header.
    pub data_offset: u64,
}

/// A JSON header breaks the rules.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HeaderError {
    /// It is not what the format prescribes.
    #[error("{0}")]
    Malformed(String),
    /// A tensor of an unknown type.
    #[error("{name:?}: {why}")]
    Unsupported {
        /// The tensor, cut to 256 bytes.
        name: String,
        /// What about it.
        why: String,
    },
    /// Names or sizes break the rules for every checkpoint.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

/// Parses the JSON header of a file with `data_len` bytes of data behind it.
///
/// # Errors
/// [`HeaderError::Malformed`] for bad JSON and for tensors that leave holes,
/// overlap or do not fit their shape; [`HeaderError::Unsupported`] for unknown
/// element types; [`HeaderError::Plan`] for names that occur twice and the like.
pub fn parse_header(json: &[u8], data_len: u64) -> Result<Header, HeaderError> {
    let raw: RawHeader = serde_json::from_slice(json)
        .map_err(|error| HeaderError::Malformed(format!("bad json header: {error}")))?;

    let mut names: Vec<&str> = raw.tensors.iter().map(|(name, _)| name.as_str()).collect();
    names.sort_unstable();
    if let Some(twice) = names.windows(2).find(|pair| pair[0] == pair[1]) {
        return Err(PlanError::Duplicate {
            name: clip(twice[0]),
        }
        .into());
    }

    let mut tensors = raw.tensors;
    tensors.sort_by_key(|(_, info)| info.data_offsets);
    let mut at = 0;
    let mut checked = Vec::with_capacity(tensors.len());
    for (name, info) in tensors {
        let (start, end) = info.data_offsets;
        let what = if start > at { "a hole" } else { "an overlap" };
        if start != at {
            return Err(HeaderError::Malformed(format!(
                "{what} before {:?}: it begins at {start}, the one before ends at {at}",
                clip(&name)
            )));
        }
        let Some(dtype) = dtype_of(&info.dtype) else {
            let why = format!("element type {:?} is not known", clip(&info.dtype));
            return Err(HeaderError::Unsupported {
                name: clip(&name),
                why,
            });
        };
        let header = EntryHeader::tensor(name, dtype, &info.shape.0)?;
        if end.checked_sub(start) != Some(header.byte_len) {
            return Err(HeaderError::Malformed(format!(
                "{:?} has data from {start} to {end}, but {} bytes by shape and type",
                clip(&header.name),
                header.byte_len
            )));
        }
        checked.push(TensorInfo {
            header,
            data_offset: start,
        });
        at = end;
    }
    if at != data_len {
        return Err(HeaderError::Malformed(format!(
            "the tensors end at {at}, the data have {data_len} bytes"
        )));
    }
    Ok(Header {
        metadata: raw.metadata,
        tensors: checked,
    })
}

/// Whether a file that begins like this may be one: a header length in its
/// limits and `{` as the first sign, which may stand behind spaces.
pub(super) fn sniff(prefix: &[u8]) -> bool {
    let Some((len, rest)) = prefix.split_first_chunk::<8>() else {
        return false;
    };
    if !(2..=MAX_HEADER_LEN).contains(&u64::from_le_bytes(*len)) {
        return false;
    }
    match rest.iter().find(|byte| !b" \t\r\n".contains(byte)) {
        Some(&first) => first == b'{',
        None => rest.len() > 1024,
    }
}

/// What is wrong with a file that begins like one but for the length of its header.
pub(super) fn bad_length(prefix: &[u8]) -> Option<String> {
    let (len, rest) = prefix.split_first_chunk::<8>()?;
    let len = u64::from_le_bytes(*len);
    rest.starts_with(b"{")
        .then(|| format!("at byte 0: a header of {len} bytes, 2 to {MAX_HEADER_LEN} can be"))
}

/// Adds all tensors of a file.
pub(super) fn load(file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    load_some(file, builder, |_, _| true)
}

/// Adds the tensors of a file that `wanted` wants.
pub(super) fn load_some(
    file: &OpenFile,
    builder: &mut Builder,
    mut wanted: impl FnMut(&mut Builder, &str) -> bool,
) -> Result<(), SourceError> {
    let malformed = |why: String| SourceError::malformed(file.path(), why);
    let prefix = file.prefix(PREFIX_LEN)?;
    let header_len = match prefix.first_chunk::<8>() {
        Some(len) => u64::from_le_bytes(*len),
        None => return Err(malformed(format!("it has only {} bytes", prefix.len()))),
    };
    let file_len = file.byte_len();
    if header_len > MAX_HEADER_LEN {
        return Err(malformed(format!(
            "a header of {header_len} bytes is longer than the limit of {MAX_HEADER_LEN}"
        )));
    }
    // Both are far from overflow.
    let data_start = PREFIX_LEN + header_len;
    let data_len = file_len.checked_sub(data_start).ok_or_else(|| {
        malformed(format!(
            "its header ends at {data_start}, the file has {file_len} bytes"
        ))
    })?;
    let bytes = file.prefix(data_start)?;
    let json = bytes.get(PREFIX_LEN as usize..).unwrap_or_default();
    let header =
        parse_header(json, data_len).map_err(|error| SourceError::header(file.path(), error))?;

    let index = builder.files.add(file, &bytes)?;
    builder.add_metadata(header.metadata);
    for tensor in header.tensors {
        if wanted(builder, &tensor.header.name) {
            builder.add(tensor.header, index, data_start + tensor.data_offset)?;
        }
    }
    builder.add_format("safetensors");
    Ok(())
}

/// The JSON as it stands, in its order and with names that occur twice.
#[derive(Default)]
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawInfo)>,
}

#[derive(Deserialize)]
struct RawInfo {
    dtype: String,
    shape: Dims,
    data_offsets: (u64, u64),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut header = RawHeader::default();
        let mut metadata_count = 0;
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA_KEY {
                metadata_count += 1;
                header.metadata = map.next_value::<Metadata>()?.0;
            } else if header.tensors.len() as u64 == MAX_ENTRIES {
                return Err(A::Error::custom(format!("more than {MAX_ENTRIES} tensors")));
            } else {
                header.tensors.push((name, map.next_value()?));
            }
        }
        if metadata_count > 1 {
            return Err(A::Error::custom("__metadata__ occurs twice"));
        }
        Ok(header)
    }
}

/// A shape; stops at the limit instead of filling memory.
struct Dims(Vec<u64>);

impl<'de> Deserialize<'de> for Dims {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_seq(DimsVisitor)
    }
}

struct DimsVisitor;

impl<'de> Visitor<'de> for DimsVisitor {
    type Value = Dims;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of dimensions")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Dims, A::Error> {
        let mut dims = Vec::new();
        while let Some(dim) = seq.next_element()? {
            if dims.len() == MAX_DIMENSIONS {
                return Err(A::Error::custom(format!(
                    "more than {MAX_DIMENSIONS} dimensions"
                )));
            }
            dims.push(dim);
        }
        Ok(Dims(dims))
    }
}

/// The texts of an object, or nothing of any other value: free text of some
/// tool must not keep the tensors from being read.
struct Metadata(BTreeMap<String, String>);

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer
            .deserialize_any(TextVisitor)
            .map(|found| match found {
                Found::Texts(texts) => Metadata(texts),
                _ => Metadata(BTreeMap::new()),
            })
    }
}

enum Found {
    Texts(BTreeMap<String, String>),
    Text(String),
    Other,
}

impl<'de> Deserialize<'de> for Found {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(TextVisitor)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Found;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("any value")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Found, A::Error> {
        let mut texts = BTreeMap::new();
        while let Some(key) = map.next_key::<String>()? {
            if let Found::Text(text) = map.next_value()? {
                texts.insert(key, text);
            }
        }
        Ok(Found::Texts(texts))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Found, A::Error> {
        while seq.next_element::<IgnoredAny>()?.is_some() {}
        Ok(Found::Other)
    }

    fn visit_str<E>(self, text: &str) -> Result<Found, E> {
        Ok(Found::Text(text.to_owned()))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Found, E> {
        Ok(Found::Other)
    }

    fn visit_unit<E>(self) -> Result<Found, E> {
        Ok(Found::Other)
    }
}

#[cfg(test)]
#[path = "safetensors_tests.rs"]
mod tests;
