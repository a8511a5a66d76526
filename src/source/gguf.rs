//! GGUF: texts and numbers about a model, then where each tensor lies, then the tensors.
//! Quantised tensors are taken as they are, block after block.

use super::{SourceError, builder::Builder, error::ContentError, files::OpenFile};
use crate::{
    format::Dtype,
    plan::{EntryHeader, MAX_DIMENSIONS, MAX_ENTRIES, MAX_ENTRY_NAME_LEN, clip},
};
use std::collections::BTreeMap;

/// The first bytes of a file.
pub(super) const MAGIC: &[u8; 4] = b"GGUF";
/// Longest header in bytes: vocabularies have some MiB.
const MAX_HEADER_LEN: u64 = 1 << 30;
/// How much of a file is read at first, in bytes; twice as much as long as that is too little.
const FIRST_LEN: u64 = 1 << 20;
/// Longest text about a model that is kept, in bytes, and the length of all together.
const MAX_TEXT_LEN: usize = 64 << 10;
const MAX_TEXTS_BYTES: usize = 1 << 20;
/// Deepest array of arrays.
const MAX_DEPTH: u32 = 4;

/// What the header of a file says.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Header {
    /// Short texts and numbers.
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: Vec<TensorInfo>,
    /// Where the tensors begin.
    pub(crate) data_start: u64,
}

/// One tensor.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct TensorInfo {
    pub(crate) header: EntryHeader,
    /// From where the tensors begin.
    pub(crate) offset: u64,
}

/// Why a header was not read.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum HeaderError {
    /// It goes on behind the bytes that are there.
    Short,
    Content(ContentError),
}

impl From<ContentError> for HeaderError {
    fn from(error: ContentError) -> Self {
        HeaderError::Content(error)
    }
}

impl From<crate::plan::PlanError> for HeaderError {
    fn from(error: crate::plan::PlanError) -> Self {
        HeaderError::Content(error.into())
    }
}

/// Adds the tensors of a file.
pub(super) fn load(file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    let mut len = FIRST_LEN;
    let (bytes, header) = loop {
        let bytes = file.prefix(len)?;
        match parse(&bytes) {
            Ok(header) => break (bytes, header),
            Err(HeaderError::Content(error)) => {
                return Err(SourceError::content(file.path(), error));
            }
            Err(HeaderError::Short) if len >= file.byte_len() => {
                let why = format!("it ends at byte {}, within its header", file.byte_len());
                return Err(SourceError::malformed(file.path(), why));
            }
            Err(HeaderError::Short) if len >= MAX_HEADER_LEN => {
                let why = format!("its header is longer than {MAX_HEADER_LEN} bytes");
                return Err(SourceError::malformed(file.path(), why));
            }
            Err(HeaderError::Short) => len *= 2,
        }
    };
    let head_len =
        usize::try_from(header.data_start).map_or(bytes.len(), |len| len.min(bytes.len()));
    let index = builder.files.add(file, &bytes[..head_len])?;
    builder.add_metadata(header.metadata);
    for tensor in header.tensors {
        // Where it overflows, the file is far too short as well.
        let offset = header.data_start.saturating_add(tensor.offset);
        builder.add(tensor.header, index, offset)?;
    }
    builder.add_format("gguf");
    Ok(())
}

/// Reads the header at the beginning of a file; what is wrong with it is said with the place.
pub(crate) fn parse(bytes: &[u8]) -> Result<Header, HeaderError> {
    let mut reader = Reader {
        bytes,
        at: 0,
        item: 0,
    };
    parse_with(&mut reader).map_err(|error| {
        let why = match error {
            HeaderError::Content(ContentError::Malformed(why)) => why,
            // A name that cannot be is damage here: nobody would find the file by it.
            HeaderError::Content(ContentError::Plan(error)) => error.to_string(),
            other => return other,
        };
        bad(format!("at byte {}: {why}", reader.item))
    })
}

fn parse_with(reader: &mut Reader<'_>) -> Result<Header, HeaderError> {
    if reader.take(4)? != MAGIC {
        return Err(bad("it does not begin like gguf"));
    }
    match reader.u32()? {
        2 | 3 => {}
        version if version.swap_bytes() == 3 => {
            return Err(unsupported("", "it is big-endian"));
        }
        version => {
            let why = format!("version {version} of the format, only 2 and 3 are known");
            return Err(unsupported("", why));
        }
    }
    reader.item = reader.at;
    let (tensor_count, value_count) = (reader.u64()?, reader.u64()?);
    if tensor_count > MAX_ENTRIES || value_count > MAX_ENTRIES {
        return Err(bad(format!(
            "{tensor_count} tensors and {value_count} values: {MAX_ENTRIES} can be"
        )));
    }
    let mut header = Header::default();
    let (mut alignment, mut texts_bytes) = (32, 0);
    for _ in 0..value_count {
        reader.item = reader.at;
        let key = reader.text()?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0)?;
        if key == "general.alignment" {
            let Some(Shown::Number(number)) = &value else {
                return Err(bad("an alignment that is no number"));
            };
            alignment = number.parse().unwrap_or(0);
            if !(1..=1 << 20).contains(&alignment) {
                return Err(bad(format!("an alignment of {number}")));
            }
        }
        let (Some(Shown::Number(text)) | Some(Shown::Text(text))) = value else {
            continue;
        };
        texts_bytes += key.len() + text.len();
        if text.len() <= MAX_TEXT_LEN && texts_bytes <= MAX_TEXTS_BYTES {
            header.metadata.insert(key.to_owned(), text);
        }
    }
    for _ in 0..tensor_count {
        reader.item = reader.at;
        header.tensors.push(reader.tensor()?);
    }
    let end = reader.at as u64;
    header.data_start = end.next_multiple_of(alignment);
    if let Some(odd) = header
        .tensors
        .iter()
        .find(|tensor| tensor.offset % alignment != 0)
    {
        return Err(bad(format!(
            "{:?} begins at {}, which is no multiple of {alignment}",
            clip(&odd.header.name),
            odd.offset
        )));
    }
    Ok(header)
}

/// A value as it is kept.
enum Shown {
    Number(String),
    Text(String),
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    /// Where that begins which is read now: a value, a tensor.
    item: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: u64) -> Result<&'a [u8], HeaderError> {
        let rest = &self.bytes[self.at..];
        let len = usize::try_from(len).ok().filter(|&len| len <= rest.len());
        let len = len.ok_or(HeaderError::Short)?;
        self.at += len;
        Ok(&rest[..len])
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], HeaderError> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N as u64)?);
        Ok(array)
    }

    fn u32(&mut self) -> Result<u32, HeaderError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, HeaderError> {
        self.array().map(u64::from_le_bytes)
    }

    fn raw_text(&mut self) -> Result<&'a [u8], HeaderError> {
        let len = self.u64()?;
        if len > MAX_HEADER_LEN {
            return Err(bad(format!("a text of {len} bytes")));
        }
        self.take(len)
    }

    fn text(&mut self) -> Result<&'a str, HeaderError> {
        let bytes = self.raw_text()?;
        if bytes.len() > MAX_ENTRY_NAME_LEN {
            return Err(bad(format!(
                "a name of {} bytes, {MAX_ENTRY_NAME_LEN} can be",
                bytes.len()
            )));
        }
        std::str::from_utf8(bytes).map_err(|_| bad("a name that is not utf-8"))
    }

    /// Reads a value; `None` where it is not kept.
    fn value(&mut self, kind: u32, depth: u32) -> Result<Option<Shown>, HeaderError> {
        let number = match kind {
            0 => self.array().map(u8::from_le_bytes)?.to_string(),
            1 => self.array().map(i8::from_le_bytes)?.to_string(),
            2 => self.array().map(u16::from_le_bytes)?.to_string(),
            3 => self.array().map(i16::from_le_bytes)?.to_string(),
            4 => self.u32()?.to_string(),
            5 => self.array().map(i32::from_le_bytes)?.to_string(),
            6 => self.array().map(f32::from_le_bytes)?.to_string(),
            7 => (self.take(1)? != [0]).to_string(),
            8 => {
                let text = std::str::from_utf8(self.raw_text()?);
                return Ok(text
                    .ok()
                    .filter(|text| text.len() <= MAX_TEXT_LEN)
                    .map(|t| Shown::Text(t.to_owned())));
            }
            9 => {
                self.skip_array(depth)?;
                return Ok(None);
            }
            10 => self.u64()?.to_string(),
            11 => self.array().map(i64::from_le_bytes)?.to_string(),
            12 => self.array().map(f64::from_le_bytes)?.to_string(),
            other => return Err(bad(format!("a value of the unknown type {other}"))),
        };
        Ok(Some(Shown::Number(number)))
    }

    /// Passes over an array: vocabularies are no text about a model.
    fn skip_array(&mut self, depth: u32) -> Result<(), HeaderError> {
        if depth == MAX_DEPTH {
            return Err(bad(format!("arrays in arrays, deeper than {MAX_DEPTH}")));
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        let item_len = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            10..=12 => 8,
            8 | 9 => 0,
            other => return Err(bad(format!("an array of the unknown type {other}"))),
        };
        if item_len > 0 {
            let len = count
                .checked_mul(item_len)
                .filter(|&len| len <= MAX_HEADER_LEN);
            self.take(len.ok_or_else(|| bad(format!("an array of {count} values")))?)?;
            return Ok(());
        }
        for _ in 0..count {
            match kind {
                8 => drop(self.raw_text()?),
                _ => self.skip_array(depth + 1)?,
            }
        }
        Ok(())
    }

    fn tensor(&mut self) -> Result<TensorInfo, HeaderError> {
        let name = self.text()?;
        if name.is_empty() {
            return Err(bad("a tensor without a name"));
        }
        let count = self.u32()? as usize;
        if count > MAX_DIMENSIONS {
            let why = format!("it has {count} dimensions, {MAX_DIMENSIONS} can be");
            return Err(unsupported(name, why));
        }
        let mut shape = Vec::with_capacity(count);
        for _ in 0..count {
            shape.push(self.u64()?);
        }
        // The first dimension is that of neighbours, which numpy has last.
        shape.reverse();
        let number = self.u32()?;
        let dtype = dtype_of(number)
            .ok_or_else(|| unsupported(name, format!("elements of type {number} are not known")))?;
        if let Some((block_len, _)) = dtype.block()
            && shape.last().copied().unwrap_or(1) % block_len != 0
        {
            let why =
                format!("rows of shape {shape:?} are not made of blocks of {block_len} elements");
            return Err(bad(format!("{:?}: {why}", clip(name))));
        }
        Ok(TensorInfo {
            header: EntryHeader::tensor(name, dtype, &shape)?,
            offset: self.u64()?,
        })
    }
}

fn dtype_of(number: u32) -> Option<Dtype> {
    Some(match number {
        0 => Dtype::F32,
        1 => Dtype::F16,
        2 => Dtype::Q4_0,
        3 => Dtype::Q4_1,
        6 => Dtype::Q5_0,
        7 => Dtype::Q5_1,
        8 => Dtype::Q8_0,
        9 => Dtype::Q8_1,
        10 => Dtype::Q2K,
        11 => Dtype::Q3K,
        12 => Dtype::Q4K,
        13 => Dtype::Q5K,
        14 => Dtype::Q6K,
        15 => Dtype::Q8K,
        16 => Dtype::Iq2Xxs,
        17 => Dtype::Iq2Xs,
        18 => Dtype::Iq3Xxs,
        19 => Dtype::Iq1S,
        20 => Dtype::Iq4Nl,
        21 => Dtype::Iq3S,
        22 => Dtype::Iq2S,
        23 => Dtype::Iq4Xs,
        24 => Dtype::I8,
        25 => Dtype::I16,
        26 => Dtype::I32,
        27 => Dtype::I64,
        28 => Dtype::F64,
        29 => Dtype::Iq1M,
        30 => Dtype::Bf16,
        34 => Dtype::Tq1_0,
        35 => Dtype::Tq2_0,
        39 => Dtype::Mxfp4,
        40 => Dtype::Nvfp4,
        41 => Dtype::Q1_0,
        _ => return None,
    })
}

fn bad(why: impl Into<String>) -> HeaderError {
    ContentError::Malformed(why.into()).into()
}

fn unsupported(name: &str, why: impl Into<String>) -> HeaderError {
    ContentError::unsupported(name, why).into()
}
