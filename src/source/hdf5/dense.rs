//! Groups of many links, as newer files have them: link messages in a fractal heap,
//! found through a tree of the second kind.

use super::group::{self, Link};
use super::reader::{Block, Reader};
use crate::source::view::Refusal;

/// Deepest tree, and deepest nesting of the blocks of a heap.
const MAX_DEPTH: u16 = 16;
/// Most links of one group.
const MAX_LINKS: u64 = 1 << 20;

/// A fractal heap: blocks of growing sizes, addressed as one.
struct Heap {
    id_len: usize,
    width: u64,
    start_len: u64,
    max_direct_len: u64,
    /// Bits of an address in the heap.
    address_bits: u16,
    root: u64,
    /// Rows of the root, which is a block of data itself where there are none.
    root_rows: u64,
    max_object_len: u64,
}

/// Adds the links of a group.
pub(super) fn links(
    reader: &Reader<'_>,
    heap: u64,
    tree: u64,
    links: &mut Vec<Link>,
) -> Result<(), Refusal> {
    let heap = read_heap(reader, heap)?;
    let mut head = reader.block(tree, 18 + reader.offset_len as u64)?;
    head.signature(b"BTHD")?;
    let (_version, kind) = (head.u8()?, head.u8()?);
    let (node_len, record_len, depth) = (head.u32()?, head.u16()?, head.u16()?);
    head.skip(2)?;
    let (root, count) = (head.offset()?, head.u16()?);
    // Records of names: a hash and an address in the heap.
    if kind != 5 || usize::from(record_len) != 4 + heap.id_len || depth > MAX_DEPTH {
        return Err(head.bad("this is no tree of the names of links"));
    }
    if reader.is_nowhere(root) {
        return Ok(());
    }
    let tree = Tree {
        reader,
        node_len: node_len.into(),
        record_len: record_len.into(),
    };
    tree.walk(root, count.into(), depth, &mut |mut record| {
        record.skip(4)?;
        let message = heap.object(reader, record)?;
        if links.len() as u64 == MAX_LINKS {
            return Err(message.bad(format!("more than {MAX_LINKS} links in one group")));
        }
        links.push(group::link(reader, message)?);
        Ok(())
    })
}

struct Tree<'r, 'a> {
    reader: &'r Reader<'a>,
    node_len: u64,
    record_len: u64,
}

impl<'r, 'a> Tree<'r, 'a> {
    fn walk(
        &self,
        address: u64,
        count: u64,
        depth: u16,
        each: &mut dyn FnMut(Block<'r, 'a>) -> Result<(), Refusal>,
    ) -> Result<(), Refusal> {
        let mut node = self.reader.block(address, self.node_len)?;
        node.signature(if depth == 0 { b"BTLF" } else { b"BTIN" })?;
        node.skip(2)?;
        for _ in 0..count {
            each(node.sub(self.record_len as usize)?)?;
        }
        if depth == 0 {
            return Ok(());
        }
        let max_leaf = self.node_len.saturating_sub(10) / self.record_len.max(1);
        let count_len = bytes_for(max_leaf);
        // Nodes above the lowest ones say how many records are below their children; how
        // long that number is depends on how many there can be.
        let mut below = max_leaf;
        let mut total_len = 0;
        for _ in 1..depth {
            let pointer = self.reader.offset_len as u64 + count_len + total_len;
            let room = self.node_len.saturating_sub(10 + pointer);
            let max_here = room / (self.record_len + pointer).max(1);
            below = max_here
                .saturating_add(1)
                .saturating_mul(below)
                .saturating_add(max_here);
            total_len = bytes_for(below);
        }
        for _ in 0..=count {
            let child = node.offset()?;
            let child_count = node.number(count_len as usize)?;
            node.number(total_len as usize)?;
            self.walk(child, child_count, depth - 1, each)?;
        }
        Ok(())
    }
}

/// Bytes that a number up to this one takes.
fn bytes_for(max: u64) -> u64 {
    u64::from((64 - max.leading_zeros()).div_ceil(8).max(1))
}

fn read_heap(reader: &Reader<'_>, address: u64) -> Result<Heap, Refusal> {
    let len = 26 + 12 * reader.length_len + 3 * reader.offset_len;
    let mut head = reader.block(address, len as u64)?;
    head.signature(b"FRHP")?;
    head.skip(1)?;
    let (id_len, filters_len, _flags) = (head.u16()?, head.u16()?, head.u8()?);
    let max_object_len = head.u32()?.into();
    head.length()?;
    head.offset()?;
    head.length()?;
    head.offset()?;
    for _ in 0..8 {
        head.length()?;
    }
    let width = head.u16()?.into();
    let (start_len, max_direct_len) = (head.length()?, head.length()?);
    let (address_bits, _start_rows) = (head.u16()?, head.u16()?);
    let (root, root_rows) = (head.offset()?, head.u16()?.into());
    let is_sane = filters_len == 0
        && (2..=64).contains(&id_len)
        && width > 0
        && start_len > 0
        && start_len <= max_direct_len
        && address_bits <= 64
        && root_rows <= 64;
    if !is_sane {
        return Err(head.bad("a heap of links that is filtered, or of odd sizes"));
    }
    Ok(Heap {
        id_len: id_len.into(),
        width,
        start_len,
        max_direct_len,
        address_bits,
        root,
        root_rows,
        max_object_len,
    })
}

impl Heap {
    /// The object that an id leads to.
    fn object<'r, 'a>(
        &self,
        reader: &'r Reader<'a>,
        mut id: Block<'_, '_>,
    ) -> Result<Block<'r, 'a>, Refusal> {
        let kind = id.u8()?;
        if kind & 0x30 != 0 {
            return Err(id.bad("a link that is kept outside of the heap"));
        }
        let at = id.number(usize::from(self.address_bits.div_ceil(8)))?;
        let len = id.number(bytes_for(self.max_direct_len.min(self.max_object_len)) as usize)?;
        let outside = || {
            reader
                .view
                .malformed(self.root, format!("the heap has nothing at {at}"))
        };
        if self.root_rows == 0 {
            if at.checked_add(len).is_none_or(|end| end > self.start_len) {
                return Err(outside());
            }
            return reader.block(self.root.saturating_add(at), len);
        }
        self.below(reader, (self.root, self.root_rows), at, len, 0)?
            .ok_or_else(outside)
    }

    /// Bytes of one block of a row.
    fn row_len(&self, row: u64) -> Option<u64> {
        let shift = u32::try_from(row.saturating_sub(1)).ok()?;
        1u64.checked_shl(shift)?.checked_mul(self.start_len)
    }

    /// Looks in the blocks that a block of addresses leads to.
    fn below<'r, 'a>(
        &self,
        reader: &'r Reader<'a>,
        (address, rows): (u64, u64),
        mut at: u64,
        len: u64,
        depth: u16,
    ) -> Result<Option<Block<'r, 'a>>, Refusal> {
        let head_len = 5 + reader.offset_len as u64 + u64::from(self.address_bits.div_ceil(8));
        let step = reader.offset_len as u64;
        reader.block(address, 4)?.signature(b"FHIB")?;
        for row in 0..rows {
            let Some(block_len) = self.row_len(row) else {
                return Ok(None);
            };
            let in_row = block_len.saturating_mul(self.width);
            if at >= in_row {
                at -= in_row;
                continue;
            }
            let column = at / block_len;
            let place = address.saturating_add(head_len + (row * self.width + column) * step);
            let child = reader.block(place, step)?.offset()?;
            at %= block_len;
            if reader.is_nowhere(child) || depth > MAX_DEPTH {
                return Ok(None);
            }
            if block_len <= self.max_direct_len {
                if at.checked_add(len).is_none_or(|end| end > block_len) {
                    return Ok(None);
                }
                return reader.block(child.saturating_add(at), len).map(Some);
            }
            // As many rows as make up this length.
            let ratio = block_len / self.start_len.saturating_mul(self.width).max(1);
            let child_rows = u64::from(64 - ratio.leading_zeros());
            return self.below(reader, (child, child_rows), at, len, depth + 1);
        }
        Ok(None)
    }
}
