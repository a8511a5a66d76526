//! Object headers: the messages that say what an object is.

use super::reader::{Block, Reader};
use crate::source::view::Refusal;

/// Most continuations of one header.
const MAX_BLOCKS: usize = 256;
/// Most messages of one header.
const MAX_MESSAGES: usize = 65_536;
/// Longest first block of a header, in bytes.
const MAX_BLOCK_LEN: u64 = 16 << 20;

pub(super) const DATASPACE: u16 = 0x01;
pub(super) const LINK_INFO: u16 = 0x02;
pub(super) const DATATYPE: u16 = 0x03;
pub(super) const FILL_OLD: u16 = 0x04;
pub(super) const FILL: u16 = 0x05;
pub(super) const LINK: u16 = 0x06;
pub(super) const EXTERNAL: u16 = 0x07;
pub(super) const LAYOUT: u16 = 0x08;
pub(super) const FILTERS: u16 = 0x0b;
pub(super) const ATTRIBUTE: u16 = 0x0c;
const CONTINUATION: u16 = 0x10;
pub(super) const SYMBOL_TABLE: u16 = 0x11;

/// One message of a header.
pub(super) struct Message<'r, 'a> {
    pub(super) kind: u16,
    /// The content stands elsewhere.
    pub(super) is_shared: bool,
    pub(super) content: Block<'r, 'a>,
}

/// All messages of the header at an address.
pub(super) fn messages<'r, 'a>(
    reader: &'r Reader<'a>,
    address: u64,
) -> Result<Vec<Message<'r, 'a>>, Refusal> {
    let mut messages = Vec::new();
    let mut blocks = Vec::new();
    let start = reader.block(address, 4)?;
    let is_new = start.bytes() == b"OHDR";
    let mut has_order = false;
    let first = if is_new {
        let mut prefix = reader.block(address, 6)?;
        prefix.skip(4)?;
        let (version, flags) = (prefix.u8()?, prefix.u8()?);
        if version != 2 {
            return Err(prefix.bad(format!("version {version} of an object header")));
        }
        has_order = flags & 0x04 != 0;
        let times = if flags & 0x20 != 0 { 16 } else { 0 };
        let phases = if flags & 0x10 != 0 { 4 } else { 0 };
        let size_len = 1u64 << (flags & 3);
        // Far from overflow: both were read.
        let at = address + 6 + times + phases;
        let len = reader.block(at, size_len)?.number(size_len as usize)?;
        (at + size_len, len)
    } else {
        let mut prefix = reader.block(address, 12)?;
        let version = prefix.u8()?;
        if version != 1 {
            return Err(prefix.bad(format!("version {version} of an object header")));
        }
        prefix.skip(7)?;
        (address + 16, u64::from(prefix.u32()?))
    };
    blocks.push((first.0, first.1, false));
    let mut next = 0;
    while let Some(&(at, len, is_continuation)) = blocks.get(next) {
        next += 1;
        if len > MAX_BLOCK_LEN {
            return Err(reader
                .view
                .malformed(at, format!("an object header of {len} bytes")));
        }
        let mut block = reader.block(at, len)?;
        let mut end = 0;
        if is_new && is_continuation {
            block.signature(b"OCHK")?;
            end = 4;
        }
        let head_len = match (is_new, has_order) {
            (true, true) => 6,
            (true, false) => 4,
            (false, _) => 8,
        };
        while block.rest() >= head_len + end {
            let kind = if is_new {
                block.u8()?.into()
            } else {
                block.u16()?
            };
            let len = block.u16()?;
            let flags = block.u8()?;
            match (is_new, has_order) {
                (true, true) => block.skip(2)?,
                (true, false) => {}
                (false, _) => block.skip(3)?,
            }
            let mut content = block.sub(len.into())?;
            if kind == CONTINUATION {
                if blocks.len() == MAX_BLOCKS {
                    return Err(content.bad(format!("more than {MAX_BLOCKS} continuations")));
                }
                blocks.push((content.offset()?, content.length()?, true));
            } else if kind != 0 {
                if messages.len() == MAX_MESSAGES {
                    return Err(content.bad(format!("more than {MAX_MESSAGES} messages")));
                }
                let is_shared = flags & 2 != 0;
                messages.push(Message {
                    kind,
                    is_shared,
                    content,
                });
            }
        }
    }
    Ok(messages)
}
