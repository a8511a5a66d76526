//! Maps of files: the one place with `unsafe` code.

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

/// A part of a file under way, mapped to be written.
///
/// # Contract
/// The caller holds the only right to write these bytes (a placement), and the file
/// is long enough and its blocks are allocated: then a store neither races with
/// another writer of this program nor finds the disk full. Whoever truncates the file
/// from outside while it is written kills the process (SIGBUS), which is why stores
/// by map are the exception and `pwrite` the rule.
#[derive(Debug)]
pub(crate) struct WriteMap {
    map: memmap2::MmapMut,
}

impl WriteMap {
    /// Maps `len` bytes from `offset`, and has their pages made at once where the
    /// kernel can do that: one call instead of a fault for each page.
    pub(crate) fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let mut options = memmap2::MmapOptions::new();
        // SAFETY: see the contract of the type.
        let map = unsafe { options.offset(offset).len(len).map_mut(file)? };
        match map.advise(memmap2::Advice::PopulateWrite) {
            // Kernels before 5.14 do not know it: the stores fault the pages in.
            Err(e) if e.kind() != io::ErrorKind::InvalidInput => Err(e),
            _ => Ok(WriteMap { map }),
        }
    }

    /// The bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.map
    }
}

impl Deref for ReadMap {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_cannot_be_made_are_an_error_and_no_signal() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(100).unwrap();
        let mut map = WriteMap::new(&file, 10, 90).unwrap();
        map.bytes().fill(1);
        // The pages after the first are beyond the end. Where the kernel cannot tell,
        // nothing is stored here.
        let beyond = WriteMap::new(&file, 0, 1 << 20);
        assert!(beyond.is_err());
    }
}
