//! What a group links to.

use super::header::{self, Message};
use super::reader::Reader;
use crate::source::view::Refusal;

/// Deepest tree of a group.
const MAX_TREE_DEPTH: usize = 16;
/// Longest name of a link, in bytes.
const MAX_NAME_LEN: usize = 4096;

/// What a link leads to.
#[derive(Debug)]
pub(super) enum Target {
    /// The header of an object in this file.
    Object(u64),
    /// Something that is found by its name.
    Elsewhere,
}

/// A name in a group.
#[derive(Debug)]
pub(super) struct Link {
    pub(super) name: String,
    pub(super) target: Target,
}

/// The links that the messages of a group lead to; `None` when it is no group.
pub(super) fn links(
    reader: &Reader<'_>,
    messages: &[Message<'_, '_>],
) -> Result<Option<Vec<Link>>, Refusal> {
    let mut links = Vec::new();
    let mut is_group = false;
    for message in messages {
        let mut block = message.content.clone();
        match message.kind {
            header::SYMBOL_TABLE => {
                is_group = true;
                let (tree, heap) = (block.offset()?, block.offset()?);
                let heap = heap_data(reader, heap)?;
                symbols(reader, tree, heap, 0, &mut links)?;
            }
            header::LINK => {
                is_group = true;
                links.push(link(reader, block)?);
            }
            header::LINK_INFO => {
                is_group = true;
                let (_version, flags) = (block.u8()?, block.u8()?);
                if flags & 1 != 0 {
                    block.skip(8)?;
                }
                let heap = block.offset()?;
                if !reader.is_nowhere(heap) {
                    super::dense::links(reader, heap, block.offset()?, &mut links)?;
                }
            }
            _ => {}
        }
    }
    Ok(is_group.then_some(links))
}

/// A link message, which is also what dense groups keep.
pub(super) fn link(
    reader: &Reader<'_>,
    mut block: super::reader::Block<'_, '_>,
) -> Result<Link, Refusal> {
    let (version, flags) = (block.u8()?, block.u8()?);
    if version != 1 {
        return Err(block.bad(format!("version {version} of a link")));
    }
    let kind = if flags & 0x08 != 0 { block.u8()? } else { 0 };
    if flags & 0x04 != 0 {
        block.skip(8)?;
    }
    if flags & 0x10 != 0 {
        block.skip(1)?;
    }
    let len = block.number(1 << (flags & 3))?;
    if len > MAX_NAME_LEN as u64 {
        return Err(block.bad(format!("a name of {len} bytes")));
    }
    let name = block.take(len as usize)?.to_vec();
    let Ok(name) = String::from_utf8(name) else {
        return Err(block.bad("the name of a link is not utf-8"));
    };
    let target = match kind {
        0 => Target::Object(block.offset()?),
        _ => Target::Elsewhere,
    };
    reader.keep(name.len() as u64 + 64, &name)?;
    Ok(Link { name, target })
}

/// Where the names of a group are: first byte and length.
fn heap_data(reader: &Reader<'_>, address: u64) -> Result<(u64, u64), Refusal> {
    let len = 8 + 2 * reader.length_len + reader.offset_len;
    let mut block = reader.block(address, len as u64)?;
    block.signature(b"HEAP")?;
    block.skip(4)?;
    let len = block.length()?;
    block.length()?;
    Ok((block.offset()?, len))
}

/// All symbols below a node of a tree.
fn symbols(
    reader: &Reader<'_>,
    address: u64,
    heap: (u64, u64),
    depth: usize,
    links: &mut Vec<Link>,
) -> Result<(), Refusal> {
    let head_len = 8 + 2 * reader.offset_len;
    let mut head = reader.block(address, head_len as u64)?;
    head.signature(b"TREE")?;
    let (kind, level, count) = (head.u8()?, head.u8()?, head.u16()?);
    if kind != 0 || depth > MAX_TREE_DEPTH {
        return Err(head.bad("this is no tree of a group, or it is too deep"));
    }
    let step = reader.length_len + reader.offset_len;
    let len = usize::from(count) * step + reader.length_len;
    let mut body = reader.block(address + head_len as u64, len as u64)?;
    for _ in 0..count {
        body.length()?;
        let child = body.offset()?;
        match level {
            0 => symbol_node(reader, child, heap, links)?,
            _ => symbols(reader, child, heap, depth + 1, links)?,
        }
    }
    Ok(())
}

fn symbol_node(
    reader: &Reader<'_>,
    address: u64,
    (heap, heap_len): (u64, u64),
    links: &mut Vec<Link>,
) -> Result<(), Refusal> {
    let mut head = reader.block(address, 8)?;
    head.signature(b"SNOD")?;
    head.skip(2)?;
    let count = head.u16()?;
    let step = 2 * reader.offset_len + 24;
    let mut body = reader.block(address + 8, usize::from(count) as u64 * step as u64)?;
    for _ in 0..count {
        let (name_at, object) = (body.offset()?, body.offset()?);
        let kind = body.u32()?;
        body.skip(20)?;
        if name_at >= heap_len {
            return Err(body.bad(format!("a name at {name_at} of a heap of {heap_len} bytes")));
        }
        let len = (heap_len - name_at).min(MAX_NAME_LEN as u64 + 1);
        let at = heap.saturating_add(name_at);
        let len = len.min(reader.view.byte_len().saturating_sub(at));
        let name = short_text(reader, at, len)?;
        reader.keep(name.len() as u64 + 64, &name)?;
        let target = match kind {
            2 => Target::Elsewhere,
            _ => Target::Object(object),
        };
        links.push(Link { name, target });
    }
    Ok(())
}

/// A text that ends with a NUL within so many bytes; most are short.
fn short_text(reader: &Reader<'_>, at: u64, max_len: u64) -> Result<String, Refusal> {
    let mut len = max_len.min(64);
    loop {
        let mut block = reader.block(at, len)?;
        match block.text() {
            Ok(name) => {
                return String::from_utf8(name).map_err(|_| block.bad("a name is not utf-8"));
            }
            Err(error) if len == max_len => return Err(error),
            Err(_) => len = (len * 8).min(max_len),
        }
    }
}
