//! Read-only maps of published files: the one place with `unsafe` code.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; the contract is below"
)]

use std::{fs::File, io, ops::Deref};

/// A file mapped for reading.
///
/// # Contract
/// The bytes of a map are only as constant as the file. Published files are never
/// written again by this program: a newer version is a new file. If somebody else
/// truncates the file, touching the lost pages kills the process (SIGBUS), as it
/// does for every program that maps files; so the engine itself reads by `pread`,
/// and this type is only for users who open a landed checkpoint.
#[derive(Debug)]
pub(crate) struct ReadMap {
    map: memmap2::Mmap,
}

impl ReadMap {
    /// Maps the whole file.
    pub(crate) fn new(file: &File) -> io::Result<Self> {
        // SAFETY: see the contract of the type: the mapping is private to this
        // value, read-only, and the file is one that is not written any more.
        let map = unsafe { memmap2::Mmap::map(file)? };
        Ok(ReadMap { map })
    }
}

impl Deref for ReadMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}
