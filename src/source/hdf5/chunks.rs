//! Which chunk of a dataset is where.

use super::message::ChunkIndex;
use super::reader::Reader;
use crate::source::view::Refusal;

/// Deepest tree of chunks.
const MAX_TREE_DEPTH: usize = 32;
/// Most chunks of one dataset.
const MAX_CHUNKS: u64 = 16 << 20;
/// What a chunk takes in memory, in bytes.
const CHUNK_BYTES: u64 = 32;

/// A chunk that was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Chunk {
    /// Its number, in C order of the chunks.
    pub(super) number: u64,
    /// First byte, counted from the base of the file.
    pub(super) offset: u64,
    /// Bytes as they are stored.
    pub(super) len: u64,
    /// Filters that it did not go through.
    pub(super) mask: u32,
}

/// The chunks of a dataset.
pub(super) struct Grid<'s> {
    pub(super) shape: &'s [u64],
    pub(super) chunk: &'s [u64],
    /// Bytes of a chunk.
    pub(super) chunk_len: u64,
    pub(super) is_filtered: bool,
}

impl Grid<'_> {
    /// Chunks along each dimension.
    pub(super) fn counts(&self) -> Vec<u64> {
        let lens = self.shape.iter().zip(self.chunk);
        lens.map(|(len, chunk)| len.div_ceil((*chunk).max(1)))
            .collect()
    }

    fn count(&self) -> u64 {
        self.counts()
            .iter()
            .fold(1, |n: u64, &c| n.saturating_mul(c))
    }

    /// Finds all chunks; sorted by number.
    pub(super) fn find(
        &self,
        reader: &Reader<'_>,
        index: &ChunkIndex,
    ) -> Result<Vec<Chunk>, Refusal> {
        let mut chunks = Vec::new();
        match *index {
            ChunkIndex::None => {}
            ChunkIndex::BTree1 { address } => self.tree(reader, address, 0, &mut chunks)?,
            ChunkIndex::Single { address, len, mask } => chunks.push(Chunk {
                number: 0,
                offset: address,
                len: len.unwrap_or(self.chunk_len),
                mask,
            }),
            ChunkIndex::Implicit { address } => {
                let count = self.count();
                self.check_count(reader, address, count)?;
                reader.keep(count.saturating_mul(CHUNK_BYTES), "chunks")?;
                chunks.extend((0..count).map(|number| Chunk {
                    number,
                    offset: address.saturating_add(number.saturating_mul(self.chunk_len)),
                    len: self.chunk_len,
                    mask: 0,
                }));
            }
            ChunkIndex::FixedArray { address } => self.fixed(reader, address, &mut chunks)?,
            ChunkIndex::Other(what) => {
                let why = format!("its chunks are found through {what}: pack it with h5repack");
                return Err(Refusal::unsupported("", why));
            }
        }
        chunks.sort_unstable_by_key(|chunk| chunk.number);
        if chunks
            .windows(2)
            .any(|pair| pair[0].number == pair[1].number)
        {
            return Err(reader
                .view
                .malformed(0, "a chunk of a dataset occurs twice"));
        }
        for chunk in &chunks {
            // Whether it is in the file.
            reader.view.part(chunk.offset, chunk.len)?;
        }
        Ok(chunks)
    }

    fn check_count(&self, reader: &Reader<'_>, at: u64, count: u64) -> Result<(), Refusal> {
        match count <= MAX_CHUNKS {
            true => Ok(()),
            false => Err(reader
                .view
                .malformed(at, format!("{count} chunks in one dataset"))),
        }
    }

    fn tree(
        &self,
        reader: &Reader<'_>,
        address: u64,
        depth: usize,
        chunks: &mut Vec<Chunk>,
    ) -> Result<(), Refusal> {
        let head_len = 8 + 2 * reader.offset_len;
        let mut head = reader.block(address, head_len as u64)?;
        head.signature(b"TREE")?;
        let (kind, level, count) = (head.u8()?, head.u8()?, head.u16()?);
        if kind != 1 || depth > MAX_TREE_DEPTH {
            return Err(head.bad("this is no tree of chunks, or it is too deep"));
        }
        let rank = self.shape.len();
        let key_len = 8 + 8 * (rank + 1);
        let len = usize::from(count) * (key_len + reader.offset_len);
        let mut body = reader.block(address + head_len as u64, len as u64)?;
        reader.keep(u64::from(count) * CHUNK_BYTES, "chunks")?;
        let counts = self.counts();
        for _ in 0..count {
            let (len, mask) = (body.u32()?.into(), body.u32()?);
            let mut number = 0u64;
            for ((&chunk, &count), &size) in self.chunk.iter().zip(&counts).zip(self.shape) {
                let start = body.number(8)?;
                // What lies outside of the shape is left from before it became smaller.
                if level == 0 && (start >= size || !start.is_multiple_of(chunk.max(1))) {
                    return Err(body.bad(format!("a chunk at {start} of {size}")));
                }
                number = number
                    .saturating_mul(count)
                    .saturating_add(start / chunk.max(1));
            }
            body.number(8)?;
            let child = body.offset()?;
            match level {
                0 => {
                    self.check_count(reader, address, chunks.len() as u64 + 1)?;
                    chunks.push(Chunk {
                        number,
                        offset: child,
                        len,
                        mask,
                    });
                }
                _ => self.tree(reader, child, depth + 1, chunks)?,
            }
        }
        Ok(())
    }

    /// An array of as many chunks as there can be.
    fn fixed(
        &self,
        reader: &Reader<'_>,
        address: u64,
        chunks: &mut Vec<Chunk>,
    ) -> Result<(), Refusal> {
        let mut head = reader.block(address, 8 + (reader.length_len + reader.offset_len) as u64)?;
        head.signature(b"FAHD")?;
        let (_version, client, entry_len, page_bits) =
            (head.u8()?, head.u8()?, head.u8()?, head.u8()?);
        let (count, data) = (head.length()?, head.offset()?);
        self.check_count(reader, address, count)?;
        if count != self.count() || (client == 1) != self.is_filtered || page_bits > 32 {
            return Err(head.bad(format!("an array of {count} chunks of {}", self.count())));
        }
        if reader.is_nowhere(data) {
            return Ok(());
        }
        let size_len = match self.is_filtered {
            true => usize::from(entry_len).checked_sub(reader.offset_len + 4),
            false => Some(0).filter(|_| usize::from(entry_len) == reader.offset_len),
        };
        let Some(size_len) = size_len.filter(|&len| len <= 8) else {
            return Err(head.bad(format!("entries of {entry_len} bytes")));
        };
        reader.keep(count.saturating_mul(CHUNK_BYTES), "chunks")?;
        let prefix_len = 6 + reader.offset_len as u64;
        reader.block(data, 4)?.signature(b"FADB")?;
        let page_count = 1u64 << page_bits;
        let is_paged = count > page_count;
        let pages = if is_paged {
            count.div_ceil(page_count)
        } else {
            1
        };
        // Pages are written when they are first needed; a bit says whether that was.
        let bits_len = if is_paged { pages.div_ceil(8) } else { 0 };
        let bits = reader
            .block(data.saturating_add(prefix_len), bits_len)?
            .bytes()
            .to_vec();
        let mut at = data.saturating_add(prefix_len + bits_len + if is_paged { 4 } else { 0 });
        for page in 0..pages {
            let first = page * page_count;
            let entries = if is_paged {
                page_count.min(count - first)
            } else {
                count
            };
            let len = entries.saturating_mul(entry_len.into());
            let bit = bits.get((page / 8) as usize).copied().unwrap_or(0xff);
            if !is_paged || bit & (0x80 >> (page % 8)) != 0 {
                let mut body = reader.block(at, len)?;
                for number in first..first + entries {
                    let offset = body.offset()?;
                    let (mut chunk_len, mut mask) = (self.chunk_len, 0);
                    if self.is_filtered {
                        (chunk_len, mask) = (body.number(size_len)?, body.u32()?);
                    }
                    if !reader.is_nowhere(offset) {
                        chunks.push(Chunk {
                            number,
                            offset,
                            len: chunk_len,
                            mask,
                        });
                    }
                }
            }
            at = at
                .saturating_add(len)
                .saturating_add(if is_paged { 4 } else { 0 });
        }
        Ok(())
    }
}
