//! An entry whose bytes are in memory, and the sum by which a later change of them shows.

use super::SourceEntry;
use crate::{
    format::checksum::{combine, crc32c},
    plan::EntryHeader,
};
use bytes::Bytes;
use rayon::prelude::*;

/// Bytes that one worker sums at a time.
const SUM_BYTES: usize = 4 << 20;

/// An entry for [`GrowingSource::add_entry`](super::GrowingSource::add_entry).
///
/// ```
/// use tensorferry::{Dtype, MemoryEntry, plan::EntryHeader};
///
/// let header = EntryHeader::tensor("bias", Dtype::F32, &[2])?;
/// let entry = MemoryEntry::new(header, vec![0; 8].into()).trainable(true).checked();
/// # let _ = entry;
/// # Ok::<(), tensorferry::plan::PlanError>(())
/// ```
#[derive(Clone, Debug)]
pub struct MemoryEntry {
    pub(super) header: EntryHeader,
    pub(super) bytes: Bytes,
    crc32c: Option<u32>,
    trainable: Option<bool>,
}

impl MemoryEntry {
    /// Bytes as `header` describes them.
    pub fn new(header: EntryHeader, bytes: Bytes) -> Self {
        MemoryEntry {
            header,
            bytes,
            crc32c: None,
            trainable: None,
        }
    }

    /// Whether the tensor is trainable.
    pub fn trainable(mut self, trainable: bool) -> Self {
        self.trainable = Some(trainable);
        self
    }

    /// Sums the bytes now, on several threads, and announces the sum before any of them
    /// is sent. Where the owner of the memory writes into it while it travels, nothing is
    /// published and the push ends with
    /// [`ErrorCode::SourceChanged`](crate::ErrorCode::SourceChanged). It costs one more
    /// reading of the memory.
    pub fn checked(mut self) -> Self {
        self.crc32c = Some(parallel_crc32c(&self.bytes));
        self
    }

    /// As a source lists it.
    pub(super) fn into_parts(self) -> (SourceEntry, Bytes) {
        let entry = SourceEntry {
            header: self.header,
            source_name: None,
            aliases: Vec::new(),
            crc32c: self.crc32c,
            trainable: self.trainable,
            is_optimizer: false,
            sources: Vec::new(),
            pieces: Vec::new(),
            derived: None,
        };
        (entry, self.bytes)
    }
}

fn parallel_crc32c(bytes: &[u8]) -> u32 {
    if bytes.len() <= SUM_BYTES {
        return crc32c(bytes);
    }
    let parts = bytes.par_chunks(SUM_BYTES);
    let parts = parts.map(|part| (crc32c(part), part.len() as u64));
    // The sum of nothing, before which nothing stands.
    parts
        .reduce(
            || (0, 0),
            |(a, a_len), (b, b_len)| (combine(a, b, b_len), a_len + b_len),
        )
        .0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_sum_of_many_parts_is_the_sum_of_the_whole() {
        for len in [
            0,
            1,
            SUM_BYTES - 1,
            SUM_BYTES,
            SUM_BYTES + 1,
            3 * SUM_BYTES + 7,
        ] {
            let bytes: Vec<u8> = (0..len).map(|i| ((i * 31) >> 3) as u8).collect();
            assert_eq!(parallel_crc32c(&bytes), crc32c(&bytes), "{len}");
        }
    }
}
