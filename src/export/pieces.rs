//! The bytes of tensors on their way out: read in pieces, compared with their checksums.

use crate::{
    error::Error,
    format::checksum::RunningCrc32c,
    source::{SourceEntry, SourceSet},
};
use std::ops::ControlFlow;

/// Bytes that are read at once.
const PIECE_BYTES: u64 = 4 << 20;
/// The same of a tensor whose order is changed: each such piece reads all of the tensor
/// from front to back.
const TURNED_PIECE_BYTES: u64 = 16 << 20;

/// Reads the tensors of a source, one after the other.
pub(super) struct Pieces<'a> {
    source: &'a SourceSet,
    progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
    buf: Vec<u8>,
}

/// Takes a piece.
pub(super) type Write<'a> = &'a mut dyn FnMut(&[u8]) -> Result<(), Error>;

impl<'a> Pieces<'a> {
    pub(super) fn new(
        source: &'a SourceSet,
        progress: &'a mut dyn FnMut(u64) -> ControlFlow<()>,
    ) -> Self {
        Pieces {
            source,
            progress,
            buf: Vec::new(),
        }
    }

    /// Gives the bytes of a tensor as they are to `write`.
    pub(super) fn copy(&mut self, entry_index: usize, write: Write<'_>) -> Result<(), Error> {
        let entry = self.entry(entry_index)?;
        let mut sum = RunningCrc32c::default();
        let mut at = 0;
        while at < entry.header.byte_len {
            let piece_len = PIECE_BYTES.min(entry.header.byte_len - at);
            let piece = resized(&mut self.buf, piece_len);
            self.source.read_at(entry_index, at, piece)?;
            if entry.crc32c.is_some() {
                sum.update(piece);
            }
            write(piece)?;
            at += piece_len;
            self.told(piece_len)?;
        }
        check(entry, sum)
    }

    /// Gives the bytes of a tensor in C order to `write`.
    pub(super) fn copy_in_c_order(
        &mut self,
        entry_index: usize,
        write: Write<'_>,
    ) -> Result<(), Error> {
        let entry = self.entry(entry_index)?;
        if !entry.is_turned() {
            return self.copy(entry_index, write);
        }
        // The checksum is that of the bytes in the order of the source.
        if entry.crc32c.is_some() {
            self.compare(entry_index, entry)?;
        }
        let mut at = 0;
        while at < entry.header.byte_len {
            let piece_len = TURNED_PIECE_BYTES.min(entry.header.byte_len - at);
            let piece = resized(&mut self.buf, piece_len);
            self.source.read_turned_at(entry_index, at, piece)?;
            write(piece)?;
            at += piece_len;
            self.told(piece_len)?;
        }
        Ok(())
    }

    fn compare(&mut self, entry_index: usize, entry: &SourceEntry) -> Result<(), Error> {
        let mut sum = RunningCrc32c::default();
        let mut at = 0;
        while at < entry.header.byte_len {
            let piece_len = PIECE_BYTES.min(entry.header.byte_len - at);
            let piece = resized(&mut self.buf, piece_len);
            self.source.read_at(entry_index, at, piece)?;
            sum.update(piece);
            at += piece_len;
            self.told(0)?;
        }
        check(entry, sum)
    }

    /// Whether the files that were read are still those that were opened.
    pub(super) fn check_unchanged(&self) -> Result<(), Error> {
        Ok(self.source.check_unchanged()?)
    }

    fn entry(&self, entry_index: usize) -> Result<&'a SourceEntry, Error> {
        let entry = self.source.entries().get(entry_index);
        entry.ok_or_else(|| Error::Bug(format!("there is no entry {entry_index}")))
    }

    fn told(&mut self, byte_count: u64) -> Result<(), Error> {
        match (self.progress)(byte_count) {
            ControlFlow::Continue(()) => Ok(()),
            ControlFlow::Break(()) => Err(Error::Interrupted),
        }
    }
}

fn resized(buf: &mut Vec<u8>, len: u64) -> &mut [u8] {
    // Pieces are far shorter than memory.
    let len = len as usize;
    if buf.len() < len {
        buf.resize(len, 0);
    }
    &mut buf[..len]
}

fn check(entry: &SourceEntry, sum: RunningCrc32c) -> Result<(), Error> {
    let Some(expected) = entry.crc32c else {
        return Ok(());
    };
    let found = sum.finish();
    if found == expected {
        return Ok(());
    }
    Err(Error::Damaged {
        name: entry.header.name.clone(),
        why: format!("crc32c {expected:08x} was expected, {found:08x} found"),
    })
}
