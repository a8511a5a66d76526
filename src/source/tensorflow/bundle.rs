//! What the index of a TensorFlow checkpoint says: which tensor lies where.

use super::{
    super::{
        error::ContentError,
        protobuf::{Fields, Value},
    },
    slice::Slice,
    table,
};
use crate::{
    format::Dtype,
    plan::{MAX_DIMENSIONS, MAX_ENTRIES, clip},
};
use std::collections::HashMap;

/// Most parts of one variable.
pub(crate) const MAX_SLICES: usize = 1023;
/// Bytes that the names of all tensors may have beyond four times the index: they share
/// beginnings there.
const NAMES_BYTES_FREE: usize = 8 << 20;

/// An index.
#[derive(Debug, Default)]
pub(crate) struct Bundle {
    /// Files with data.
    pub(crate) shard_count: u32,
    /// How numbers lie in them.
    pub(crate) big_endian: bool,
    /// Tensors by name, in bytewise order.
    pub(crate) tensors: Vec<(String, BundleEntry)>,
    /// Parts of partitioned variables, by [`Slice::key`].
    pub(crate) slices: HashMap<Vec<u8>, BundleEntry>,
}

/// Where a tensor, or a part of one, lies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct BundleEntry {
    pub(crate) element: Element,
    pub(crate) shape: Vec<u64>,
    pub(crate) shard: u32,
    pub(crate) offset: u64,
    pub(crate) len: u64,
    /// Of the bytes, without its mask.
    pub(crate) crc32c: Option<u32>,
    /// The parts; then shard, offset, length and checksum mean nothing.
    pub(crate) slices: Vec<Slice>,
}

/// What TensorFlow calls the type of an element.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Element {
    Type(Dtype),
    Text,
    /// Something that has no bytes of its own, or is not known; its number.
    #[default]
    Other,
}

impl Bundle {
    /// Reads an index.
    pub(crate) fn parse(index: &[u8]) -> Result<Bundle, ContentError> {
        let mut bundle = Bundle::default();
        let mut is_first = true;
        let mut names_bytes = 0;
        let names_bytes_max = index
            .len()
            .saturating_mul(4)
            .saturating_add(NAMES_BYTES_FREE);
        table::for_each(index, |key, value| {
            if is_first {
                is_first = false;
                return match key {
                    b"" => bundle.read_header(value),
                    _ => Err(bad(
                        "its first entry has a name, so it describes no checkpoint",
                    )),
                };
            }
            names_bytes += key.len();
            if names_bytes > names_bytes_max {
                return Err(bad(format!("names of more than {names_bytes_max} bytes")));
            }
            if (bundle.tensors.len() + bundle.slices.len()) as u64 >= MAX_ENTRIES {
                return Err(bad(format!("more than {MAX_ENTRIES} tensors and parts")));
            }
            let name = || String::from_utf8_lossy(key).into_owned();
            let entry = BundleEntry::read(&name, value)?;
            if entry.slices.is_empty() && entry.shard >= bundle.shard_count {
                let (shard, count) = (entry.shard, bundle.shard_count);
                return Err(bad(format!(
                    "{:?} is in shard {shard} of {count}",
                    clip(&name())
                )));
            }
            if key.first() == Some(&0) {
                bundle.slices.insert(key.to_vec(), entry);
                return Ok(());
            }
            let name = String::from_utf8(key.to_vec())
                .map_err(|_| bad(format!("the name {:?} is not utf-8", clip(&name()))))?;
            bundle.tensors.push((name, entry));
            Ok(())
        })?;
        match is_first {
            true => Err(bad("it has no entries, not even the first one")),
            false => Ok(bundle),
        }
    }

    fn read_header(&mut self, message: &[u8]) -> Result<(), ContentError> {
        for field in Fields::new(message) {
            let field = field?;
            match (field.number, field.value) {
                // The older kind of checkpoint has a message here.
                (1, Value::Bytes(_)) => {
                    return Err(ContentError::unsupported(
                        "",
                        "version 1 of the format, from before 2017, holds no plain bytes: \
                         restore it with tf.compat.v1.train.Saver and save it again",
                    ));
                }
                (1, value) => self.shard_count = value.count()?,
                (2, value) => {
                    self.big_endian = match value.number()? {
                        0 => false,
                        1 => true,
                        other => return Err(bad(format!("an unknown byte order, {other}"))),
                    }
                }
                _ => {}
            }
        }
        match self.shard_count {
            1..=99_999 => Ok(()),
            count => Err(bad(format!("{count} files with data: 1 to 99,999 can be"))),
        }
    }
}

impl BundleEntry {
    fn read(name: &dyn Fn() -> String, message: &[u8]) -> Result<BundleEntry, ContentError> {
        let mut entry = BundleEntry::default();
        for field in Fields::new(message) {
            let field = field?;
            let value = field.value;
            match field.number {
                1 => entry.element = Element::of(value.number()?),
                2 => entry.shape = shape(name, value)?,
                3 => entry.shard = value.count()?,
                4 => entry.offset = value.size()?,
                5 => entry.len = value.size()?,
                6 => match value {
                    Value::Fixed32(crc) => entry.crc32c = Some(table::unmask(crc)),
                    _ => return Err(bad("a checksum of another width")),
                },
                7 if entry.slices.len() == MAX_SLICES => {
                    let why = format!("it is cut into more than {MAX_SLICES} parts");
                    return Err(ContentError::unsupported(&name(), why));
                }
                7 => entry.slices.push(Slice::read(value)?),
                _ => {}
            }
        }
        if let Element::Type(dtype) = entry.element {
            let expected = dtype.byte_len(&entry.shape);
            if entry.slices.is_empty() && expected != Some(entry.len) {
                return Err(bad(format!(
                    "{:?} of shape {:?} and type {dtype} has {} bytes, not {expected:?}",
                    clip(&name()),
                    entry.shape,
                    entry.len
                )));
            }
        }
        Ok(entry)
    }
}

impl Element {
    fn of(number: u64) -> Element {
        Element::Type(match number {
            1 => Dtype::F32,
            2 => Dtype::F64,
            // Quantised types hold plain integers; what they stand for is in the model.
            3 | 13 => Dtype::I32,
            4 | 12 => Dtype::U8,
            5 | 15 => Dtype::I16,
            6 | 11 => Dtype::I8,
            7 => return Element::Text,
            8 => Dtype::C64,
            9 => Dtype::I64,
            10 => Dtype::Bool,
            14 => Dtype::Bf16,
            16 | 17 => Dtype::U16,
            18 => Dtype::C128,
            19 => Dtype::F16,
            22 => Dtype::U32,
            23 => Dtype::U64,
            24 => Dtype::F8E5m2,
            25 => Dtype::F8E4m3fn,
            26 => Dtype::F8E4m3fnuz,
            27 => Dtype::F8E4m3b11fnuz,
            28 => Dtype::F8E5m2fnuz,
            29 => Dtype::I4,
            30 => Dtype::U4,
            31 => Dtype::I2,
            32 => Dtype::U2,
            _ => return Element::Other,
        })
    }
}

fn shape(name: &dyn Fn() -> String, value: Value<'_>) -> Result<Vec<u64>, ContentError> {
    let mut shape = Vec::new();
    for field in value.fields()? {
        let field = field?;
        match field.number {
            2 if shape.len() == MAX_DIMENSIONS => {
                let why = format!("it has more than {MAX_DIMENSIONS} dimensions");
                return Err(ContentError::unsupported(&name(), why));
            }
            2 => {
                let mut len = 0;
                for field in field.value.fields()? {
                    let field = field?;
                    if field.number == 1 {
                        len = field.value.size()?;
                    }
                }
                shape.push(len);
            }
            3 if field.value.number()? != 0 => {
                return Err(bad(format!("{:?} has no shape", clip(&name()))));
            }
            _ => {}
        }
    }
    Ok(shape)
}

fn bad(why: impl Into<String>) -> ContentError {
    ContentError::Malformed(why.into())
}
