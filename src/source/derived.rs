//! Entries whose bytes do not lie in a file as they are sent.

use super::{SourceError, files::FileTable};
use std::fmt;

/// Makes the bytes of an entry out of those of its files. Runs on the I/O threads of
/// the sender, into the buffer that is sent: one copy more than a run of a file takes.
pub(crate) trait Derived: fmt::Debug + Send + Sync {
    /// Fills `buf` with the bytes of the entry from `offset` on, all of which it has.
    fn read_at(&self, files: &FileTable, offset: u64, buf: &mut [u8]) -> Result<(), SourceError>;
}

/// Bytes that were decoded when the header was read.
#[derive(Debug)]
pub(super) struct Memory(pub(super) Vec<u8>);

impl Derived for Memory {
    fn read_at(&self, _: &FileTable, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let rest = self.0.get(offset as usize..).unwrap_or_default();
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        Ok(())
    }
}
