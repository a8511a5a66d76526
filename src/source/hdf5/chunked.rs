//! A dataset whose elements lie in chunks, filtered or not.

use super::chunks::Chunk;
use super::filter::{self, Filter};
use crate::source::derived::Derived;
use crate::source::gathered::Window;
use crate::source::{SourceError, boxes, files::FileTable};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Longest chunk that is decoded, in bytes.
pub(super) const MAX_CHUNK_LEN: u64 = 32 << 20;
/// Bytes of decoded chunks kept for one file: cells end within chunks.
const MAX_KEPT_BYTES: usize = 64 << 20;

/// Decoded chunks of one file by where they lie, those used last at the end.
#[derive(Debug, Default)]
pub(super) struct Decoded(Mutex<VecDeque<(u64, Arc<Vec<u8>>)>>);

/// The chunks of a dataset.
#[derive(Debug)]
pub(super) struct Chunked {
    pub(super) file_index: u32,
    /// What addresses count from.
    pub(super) base: u64,
    pub(super) item_len: u64,
    pub(super) shape: Vec<u64>,
    pub(super) chunk: Vec<u64>,
    pub(super) chunk_len: u64,
    /// Chunks along each dimension.
    pub(super) counts: Vec<u64>,
    pub(super) chunks: Vec<Chunk>,
    pub(super) filters: Vec<Filter>,
    /// The value of what was never written.
    pub(super) fill: Vec<u8>,
    pub(super) decoded: Arc<Decoded>,
}

impl Derived for Chunked {
    fn read_at(&self, files: &FileTable, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let item_len = self.item_len.max(1);
        let end = offset + buf.len() as u64;
        let (first, last) = (offset / item_len, end.div_ceil(item_len));
        if offset.is_multiple_of(item_len) && end.is_multiple_of(item_len) {
            return self.elements(files, first, last, buf);
        }
        let mut whole = vec![0; ((last - first) * item_len) as usize];
        self.elements(files, first, last, &mut whole)?;
        let skip = (offset - first * item_len) as usize;
        buf.copy_from_slice(&whole[skip..skip + buf.len()]);
        Ok(())
    }
}

impl Chunked {
    fn elements(
        &self,
        files: &FileTable,
        first: u64,
        end: u64,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        for item in buf.chunks_mut(self.fill.len().max(1)) {
            match self.fill.get(..item.len()) {
                Some(fill) => item.copy_from_slice(fill),
                None => item.fill(0),
            }
        }
        let overflow = || {
            let why = "the shape of a dataset does not fit in 64 bits";
            SourceError::malformed(files.path(self.file_index), why)
        };
        let steps = boxes::steps(&self.shape, self.item_len).ok_or_else(overflow)?;
        let chunk_steps = boxes::steps(&self.chunk, self.item_len).ok_or_else(overflow)?;
        let base = first * self.item_len;
        boxes::cut(&self.shape, first, end, &mut |start, lens| {
            let grid: Vec<(u64, u64)> = (start.iter().zip(lens).zip(&self.chunk))
                .map(|((start, len), chunk)| (start / chunk, (start + len - 1) / chunk))
                .collect();
            let mut at: Vec<u64> = grid.iter().map(|(first, _)| *first).collect();
            loop {
                let number = at
                    .iter()
                    .zip(&self.counts)
                    .fold(0, |n, (at, count)| n * count + at);
                let found = self
                    .chunks
                    .binary_search_by_key(&number, |chunk| chunk.number);
                if let Some(chunk) = found.ok().and_then(|index| self.chunks.get(index)) {
                    let origin: Vec<u64> = at
                        .iter()
                        .zip(&self.chunk)
                        .map(|(at, chunk)| at * chunk)
                        .collect();
                    if let Some((start, lens)) =
                        boxes::common((start, lens), (&origin, &self.chunk))
                    {
                        let inside: Vec<u64> =
                            start.iter().zip(&origin).map(|(a, b)| a - b).collect();
                        let from = boxes::place(&inside, &chunk_steps);
                        let to = boxes::place(&start, &steps) - base;
                        self.copy(files, chunk, (from, &chunk_steps), (to, &steps), &lens, buf)?;
                    }
                }
                // The next chunk, the last dimension first.
                let next = (0..at.len()).rev().find(|&axis| at[axis] < grid[axis].1);
                let Some(axis) = next else { break };
                at[axis] += 1;
                for later in axis + 1..at.len() {
                    at[later] = grid[later].0;
                }
            }
            Ok(())
        })
    }

    fn copy(
        &self,
        files: &FileTable,
        chunk: &Chunk,
        (from, from_steps): (u64, &[u64]),
        (to, to_steps): (u64, &[u64]),
        lens: &[u64],
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        if self.filters.is_empty() {
            let from = self.base + chunk.offset + from;
            let mut window = Window::of_file(files, self.file_index);
            return boxes::runs(
                lens,
                self.item_len,
                from_steps,
                to_steps,
                &mut |f, t, len| {
                    let to = (to + t) as usize;
                    window.copy(from + f, &mut buf[to..to + len as usize])
                },
            );
        }
        let bytes = self.decode(files, chunk)?;
        boxes::runs(
            lens,
            self.item_len,
            from_steps,
            to_steps,
            &mut |f, t, len| {
                let (from, to) = ((from + f) as usize, (to + t) as usize);
                let len = len as usize;
                buf[to..to + len].copy_from_slice(&bytes[from..from + len]);
                Ok(())
            },
        )
    }

    fn decode(&self, files: &FileTable, chunk: &Chunk) -> Result<Arc<Vec<u8>>, SourceError> {
        let place = self.base + chunk.offset;
        if let Some(bytes) = self.decoded.find(place, self.chunk_len) {
            return Ok(bytes);
        }
        let mut stored = vec![0; chunk.len as usize];
        files.read_at(self.file_index, place, &mut stored)?;
        let bytes = filter::undo(&self.filters, chunk.mask, stored, self.chunk_len as usize)
            .map_err(|why| {
                let why = format!("at byte {place}: {why}");
                SourceError::malformed(files.path(self.file_index), why)
            })?;
        let bytes = Arc::new(bytes);
        self.decoded.put(place, &bytes);
        Ok(bytes)
    }
}

impl Decoded {
    fn find(&self, place: u64, len: u64) -> Option<Arc<Vec<u8>>> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let is_it = |(at, bytes): &(u64, Arc<Vec<u8>>)| *at == place && bytes.len() as u64 == len;
        let index = kept.iter().position(is_it)?;
        let found = kept.remove(index)?;
        let bytes = Arc::clone(&found.1);
        kept.push_back(found);
        Some(bytes)
    }

    fn put(&self, place: u64, bytes: &Arc<Vec<u8>>) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.push_back((place, Arc::clone(bytes)));
        let mut total: usize = kept.iter().map(|(_, bytes)| bytes.len()).sum();
        while total > MAX_KEPT_BYTES {
            let Some((_, first)) = kept.pop_front() else {
                break;
            };
            total -= first.len();
        }
    }
}
