//! What single messages say: shapes, element types, layouts, filters, attributes.

use super::filter::Filter;
use super::header::{self, Message};
use super::reader::{Block, Reader};
use crate::format::Dtype;
use crate::plan::MAX_DIMENSIONS;
use crate::source::view::Refusal;

/// Deepest nesting of element types that is looked at.
const MAX_TYPE_DEPTH: usize = 4;
/// Longest text of an attribute, in bytes.
const MAX_TEXT_LEN: u64 = 4096;

/// A shape; `None` is an array without a value.
pub(super) fn dataspace(block: &mut Block<'_, '_>) -> Result<Option<Vec<u64>>, Refusal> {
    let (version, rank, _flags) = (block.u8()?, block.u8()?, block.u8()?);
    let kind = block.u8()?;
    match version {
        1 => block.skip(4)?,
        2 if kind == 2 => return Ok(None),
        2 => {}
        _ => return Err(block.bad(format!("version {version} of a dataspace"))),
    }
    if usize::from(rank) > MAX_DIMENSIONS {
        return Err(block.bad(format!("{rank} dimensions")));
    }
    let dims: Result<Vec<u64>, Refusal> = (0..rank).map(|_| block.length()).collect();
    dims.map(Some)
}

/// An element type.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Type {
    Number {
        dtype: Dtype,
        big_endian: bool,
    },
    /// Bytes without a meaning, so many for each element.
    Opaque(u32),
    /// Text of a fixed length, or of any.
    Text {
        len: u32,
    },
    VariableText,
    /// Anything else, in words.
    Other(&'static str),
}

/// Reads an element type.
pub(super) fn datatype(block: &mut Block<'_, '_>) -> Result<Type, Refusal> {
    typed(block, 0).map(|(found, _)| found)
}

/// The type and its size in bytes.
fn typed(block: &mut Block<'_, '_>, depth: usize) -> Result<(Type, u32), Refusal> {
    let head = block.u8()?;
    let (class, version) = (head & 0x0f, head >> 4);
    let bits = block.number(3)?;
    let size = block.u32()?;
    let big_endian = bits & 1 != 0 && size > 1;
    let number = |dtype| Type::Number { dtype, big_endian };
    if depth > MAX_TYPE_DEPTH {
        return Err(block.bad("element types nested too deeply"));
    }
    let found = match class {
        0 => {
            let (offset, precision) = (block.u16()?, block.u16()?);
            let is_signed = bits & 8 != 0;
            let is_whole = offset == 0 && u64::from(precision) == u64::from(size) * 8;
            match (size, is_signed) {
                _ if !is_whole => Type::Other("an integer of odd bits"),
                (1, true) => number(Dtype::I8),
                (2, true) => number(Dtype::I16),
                (4, true) => number(Dtype::I32),
                (8, true) => number(Dtype::I64),
                (1, false) => number(Dtype::U8),
                (2, false) => number(Dtype::U16),
                (4, false) => number(Dtype::U32),
                (8, false) => number(Dtype::U64),
                _ => Type::Other("an integer of odd length"),
            }
        }
        1 => {
            let (offset, precision) = (block.u16()?, block.u16()?);
            let layout = [block.u8()?, block.u8()?, block.u8()?, block.u8()?];
            let bias = block.u32()?;
            let is_whole = offset == 0 && u64::from(precision) == u64::from(size) * 8;
            match (size, layout, bias) {
                _ if !is_whole || bits & 0x40 != 0 => Type::Other("a float of odd bits"),
                (2, [10, 5, 0, 10], 15) => number(Dtype::F16),
                (4, [23, 8, 0, 23], 127) => number(Dtype::F32),
                (8, [52, 11, 0, 52], 1023) => number(Dtype::F64),
                (2, [7, 8, 0, 7], 127) => number(Dtype::Bf16),
                (1, [2, 5, 0, 2], 15) => number(Dtype::F8E5m2),
                _ => Type::Other("a float of an unknown kind"),
            }
        }
        3 => Type::Text { len: size },
        5 => Type::Opaque(size),
        6 => complex(block, version, bits & 0xffff, size, depth)?,
        7 => Type::Other("a reference"),
        8 => truth(block, version, bits & 0xffff, depth)?,
        9 if bits & 0x0f == 1 => Type::VariableText,
        9 => Type::Other("a list of any length"),
        10 => Type::Other("an array in each element"),
        11 => complex_of(typed(block, depth + 1)?.0, size),
        _ => Type::Other("of an unknown class"),
    };
    Ok((found, size))
}

/// h5py writes complex numbers as a pair of `r` and `i`.
fn complex(
    block: &mut Block<'_, '_>,
    version: u8,
    count: u64,
    size: u32,
    depth: usize,
) -> Result<Type, Refusal> {
    let other = Type::Other("a record of several fields");
    if count != 2 {
        return Ok(other);
    }
    let mut parts = Vec::new();
    for (name, expected) in [(b"r", 0), (b"i", size / 2)] {
        let found = block.text()?;
        if version < 3 {
            // Names are padded together with their NUL.
            block.skip((found.len() + 1).next_multiple_of(8) - found.len() - 1)?;
        }
        let offset_len = match (version, size) {
            (..=2, _) => 4,
            (_, ..=0xff) => 1,
            (_, ..=0xffff) => 2,
            _ => 4,
        };
        let offset = block.number(offset_len)?;
        if version == 1 {
            block.skip(28)?;
        }
        if found != name || offset != u64::from(expected) {
            return Ok(other);
        }
        parts.push(typed(block, depth + 1)?.0);
    }
    match &parts[..] {
        [real, imaginary] if real == imaginary => Ok(complex_of(real.clone(), size)),
        _ => Ok(other),
    }
}

fn complex_of(part: Type, size: u32) -> Type {
    let Type::Number { dtype, big_endian } = part else {
        return Type::Other("a complex number of odd parts");
    };
    match (dtype, size) {
        (Dtype::F32, 8) => Type::Number {
            dtype: Dtype::C64,
            big_endian,
        },
        (Dtype::F64, 16) => Type::Number {
            dtype: Dtype::C128,
            big_endian,
        },
        (Dtype::F16, 4) if !big_endian => Type::Number {
            dtype: Dtype::C32,
            big_endian,
        },
        _ => Type::Other("a complex number of odd parts"),
    }
}

/// An enumeration: truth values of h5py, or the numbers that it is made of.
fn truth(
    block: &mut Block<'_, '_>,
    version: u8,
    count: u64,
    depth: usize,
) -> Result<Type, Refusal> {
    let (base, size) = typed(block, depth + 1)?;
    let byte = [Dtype::I8, Dtype::U8];
    let is_byte = matches!(base, Type::Number { dtype, .. } if byte.contains(&dtype));
    if !is_byte || count != 2 || size != 1 {
        return Ok(base);
    }
    let mut names = Vec::new();
    for _ in 0..count {
        let name = block.text()?;
        if version < 3 {
            block.skip((name.len() + 1).next_multiple_of(8) - name.len() - 1)?;
        }
        names.push(name);
    }
    let values = block.take(2)?;
    let is_truth = names[..] == [b"FALSE".to_vec(), b"TRUE".to_vec()] && values == [0, 1];
    Ok(match is_truth {
        true => Type::Number {
            dtype: Dtype::Bool,
            big_endian: false,
        },
        false => base,
    })
}

/// How the elements of a dataset are stored.
#[derive(Debug)]
pub(super) enum Layout {
    /// In the header, at this place of the file.
    Compact {
        offset: u64,
        len: u64,
    },
    /// In one run; `None` where nothing was ever written.
    Contiguous {
        address: Option<u64>,
    },
    Chunked {
        index: ChunkIndex,
        chunk: Vec<u64>,
    },
    Other(&'static str),
}

/// How the chunks of a dataset are found.
#[derive(Debug)]
pub(super) enum ChunkIndex {
    /// No chunk was ever written.
    None,
    BTree1 {
        address: u64,
    },
    Single {
        address: u64,
        len: Option<u64>,
        mask: u32,
    },
    Implicit {
        address: u64,
    },
    FixedArray {
        address: u64,
    },
    Other(&'static str),
}

/// Reads a layout.
pub(super) fn layout(reader: &Reader<'_>, block: &mut Block<'_, '_>) -> Result<Layout, Refusal> {
    let version = block.u8()?;
    let place = |address| (!reader.is_nowhere(address)).then_some(address);
    let dims = |block: &mut Block<'_, '_>, count: u8, len: usize| {
        // The last one is the length of an element.
        if count == 0 || usize::from(count) > MAX_DIMENSIONS + 1 {
            return Err(block.bad(format!("{count} dimensions of a chunk")));
        }
        let dims: Result<Vec<u64>, Refusal> = (0..count).map(|_| block.number(len)).collect();
        dims
    };
    match version {
        1 | 2 => {
            let (count, class) = (block.u8()?, block.u8()?);
            block.skip(5)?;
            match class {
                0 => {
                    dims(block, count, 4)?;
                    let len = block.u32()?.into();
                    Ok(Layout::Compact {
                        offset: block.place(),
                        len,
                    })
                }
                1 => Ok(Layout::Contiguous {
                    address: place(block.offset()?),
                }),
                2 => {
                    let address = place(block.offset()?);
                    let chunk = dims(block, count, 4)?;
                    let index =
                        address.map_or(ChunkIndex::None, |address| ChunkIndex::BTree1 { address });
                    Ok(Layout::Chunked { index, chunk })
                }
                _ => Err(block.bad(format!("class {class} of a layout"))),
            }
        }
        3..=5 => match block.u8()? {
            0 => {
                let len = block.u16()?.into();
                Ok(Layout::Compact {
                    offset: block.place(),
                    len,
                })
            }
            1 => Ok(Layout::Contiguous {
                address: place(block.offset()?),
            }),
            2 if version == 3 => {
                let count = block.u8()?;
                let address = place(block.offset()?);
                let chunk = dims(block, count, 4)?;
                let index =
                    address.map_or(ChunkIndex::None, |address| ChunkIndex::BTree1 { address });
                Ok(Layout::Chunked { index, chunk })
            }
            2 => {
                let (flags, count, len) = (block.u8()?, block.u8()?, block.u8()?);
                let chunk = dims(block, count, len.into())?;
                let kind = block.u8()?;
                let (mut stored_len, mut mask) = (None, 0);
                match kind {
                    1 if flags & 2 != 0 => {
                        stored_len = Some(block.length()?);
                        mask = block.u32()?;
                    }
                    3 => block.skip(1)?,
                    4 => block.skip(5)?,
                    5 => block.skip(6)?,
                    _ => {}
                }
                let index = match (place(block.offset()?), kind) {
                    (None, _) => ChunkIndex::None,
                    (Some(address), 1) => ChunkIndex::Single {
                        address,
                        len: stored_len,
                        mask,
                    },
                    (Some(address), 2) => ChunkIndex::Implicit { address },
                    (Some(address), 3) => ChunkIndex::FixedArray { address },
                    (Some(_), 4) => ChunkIndex::Other("an extensible array of chunks"),
                    (Some(_), 5) => ChunkIndex::Other("a second kind of tree of chunks"),
                    _ => return Err(block.bad(format!("index {kind} of chunks"))),
                };
                Ok(Layout::Chunked { index, chunk })
            }
            3 => Ok(Layout::Other("virtual: it is made of other datasets")),
            class => Err(block.bad(format!("class {class} of a layout"))),
        },
        _ => Err(block.bad(format!("version {version} of a layout"))),
    }
}

/// The filters that chunks went through, in that order.
pub(super) fn filters(block: &mut Block<'_, '_>) -> Result<Vec<Filter>, Refusal> {
    let (version, count) = (block.u8()?, block.u8()?);
    if !matches!(version, 1 | 2) || count > 32 {
        return Err(block.bad(format!("version {version} of {count} filters")));
    }
    if version == 1 {
        block.skip(6)?;
    }
    let mut filters = Vec::new();
    for _ in 0..count {
        let id = block.u16()?;
        let name_len = if version == 1 || id >= 256 {
            usize::from(block.u16()?)
        } else {
            0
        };
        let _flags = block.u16()?;
        let value_count = block.u16()?;
        let padded = if version == 1 {
            name_len.next_multiple_of(8)
        } else {
            name_len
        };
        block.skip(padded)?;
        let mut first = None;
        for _ in 0..value_count {
            let value = block.u32()?;
            first.get_or_insert(value);
        }
        if version == 1 && value_count % 2 == 1 {
            block.skip(4)?;
        }
        filters.push(match (id, first) {
            (1, _) => Filter::Deflate,
            (2, Some(item_len)) if item_len > 0 => Filter::Shuffle(item_len),
            (3, _) => Filter::Fletcher32,
            (id, _) => Filter::Unknown(id),
        });
    }
    Ok(filters)
}

/// The value of elements that were never written; empty for zeros.
pub(super) fn fill(message: &mut Message<'_, '_>) -> Result<Vec<u8>, Refusal> {
    let block = &mut message.content;
    if message.kind == header::FILL_OLD {
        let len = block.u32()?;
        return Ok(block.take(len as usize)?.to_vec());
    }
    let version = block.u8()?;
    let is_defined = match version {
        1 | 2 => {
            block.skip(2)?;
            block.u8()? != 0 || version == 1
        }
        3 => block.u8()? & 0x20 != 0,
        _ => return Err(block.bad(format!("version {version} of a fill value"))),
    };
    if !is_defined {
        return Ok(Vec::new());
    }
    let len = block.u32()?;
    Ok(block.take(len as usize)?.to_vec())
}

/// Name and text of an attribute; `None` where it is no single text.
pub(super) fn attribute(
    reader: &Reader<'_>,
    block: &mut Block<'_, '_>,
) -> Result<Option<(String, String)>, Refusal> {
    let version = block.u8()?;
    let flags = block.u8()?;
    let lens = [block.u16()?, block.u16()?, block.u16()?].map(usize::from);
    let padded = |len: usize| {
        if version == 1 {
            len.next_multiple_of(8)
        } else {
            len
        }
    };
    match version {
        1 | 2 => {}
        3 => block.skip(1)?,
        _ => return Err(block.bad(format!("version {version} of an attribute"))),
    }
    let name = block.sub(padded(lens[0]))?.text()?;
    let mut of_type = block.sub(padded(lens[1]))?;
    let mut of_space = block.sub(padded(lens[2]))?;
    if version > 1 && flags & 1 != 0 {
        // A type that is kept elsewhere: no text of Keras or h5py.
        return Ok(None);
    }
    let shape = dataspace(&mut of_space)?;
    if shape.is_none_or(|shape| !shape.is_empty()) {
        return Ok(None);
    }
    let text = match datatype(&mut of_type)? {
        Type::Text { len } if u64::from(len) <= MAX_TEXT_LEN => block.take(len as usize)?.to_vec(),
        Type::VariableText => {
            let len = block.u32()?.into();
            let (address, index) = (block.offset()?, block.u32()?);
            if len > MAX_TEXT_LEN || reader.is_nowhere(address) {
                return Ok(None);
            }
            global_object(reader, address, index, len)?
        }
        _ => return Ok(None),
    };
    let end = text
        .iter()
        .position(|&byte| byte == 0)
        .unwrap_or(text.len());
    let text = String::from_utf8(text.get(..end).unwrap_or_default().to_vec());
    Ok(String::from_utf8(name).ok().zip(text.ok()))
}

/// The first bytes of an object of a global heap.
fn global_object(
    reader: &Reader<'_>,
    address: u64,
    index: u32,
    len: u64,
) -> Result<Vec<u8>, Refusal> {
    let head_len = 8 + reader.length_len as u64;
    let mut head = reader.block(address, head_len)?;
    head.signature(b"GCOL")?;
    head.skip(4)?;
    let heap_len = head.length()?;
    let mut at = head_len;
    let step = 8 + reader.length_len as u64;
    while at.checked_add(step).is_some_and(|end| end <= heap_len) {
        let mut object = reader.block(address.saturating_add(at), step)?;
        let found = u32::from(object.u16()?);
        object.skip(6)?;
        let object_len = object.length()?;
        if found == index {
            if len > object_len {
                return Err(object.bad(format!("a text of {len} bytes in {object_len}")));
            }
            let mut text = reader.block(address.saturating_add(at + step), len)?;
            return Ok(text.take(len as usize)?.to_vec());
        }
        if found == 0 {
            break;
        }
        at = at
            .saturating_add(step)
            .saturating_add(object_len.saturating_add(7) & !7);
    }
    Err(head.bad(format!("the heap has no object {index}")))
}
