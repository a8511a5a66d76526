//! Floor 0: maps of files, and the guard against what cutting them does: the one
//! place with `unsafe` code.

#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe by nature; the contracts are below"
)]

mod guard;
mod whereabouts;

pub(crate) use self::whereabouts::file_of;
use self::{guard::Watched, whereabouts::Known};
use bytes::Bytes;
use std::{
    fs::File,
    io,
    ops::{Deref, Range},
    sync::Arc,
};

/// From now on a mapped file that is cut or cannot be read is an error of the transfer
/// that reads it, and not the end of the process: handles SIGBUS for the maps that this
/// library makes of sources. Programs call it at their start, if they want
/// [`ReadMode::Map`](crate::ReadMode::Map); the library never does by itself, because a
/// signal handler belongs to the whole process.
///
/// # Errors
/// What the system says.
pub fn install_sigbus_guard() -> io::Result<()> {
    guard::install()
}

/// A file mapped for reading.
///
/// # Contract
/// The bytes of a map are only as constant as the file. Published files are never
/// written again by this program: a newer version is a new file. If somebody else
/// truncates the file, touching the lost pages kills the process (SIGBUS), as it
/// does for every program that maps files; so this type is only for users who open a
/// landed checkpoint, and the engine maps its sources as [`SourceMap`] under the guard.
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
/// from outside while it is written kills the process (SIGBUS) where there is no guard;
/// with it [`WriteMap::finish`] says so.
#[derive(Debug)]
pub(crate) struct WriteMap {
    // Before the map: it must not be watched any more when that goes.
    watched: Option<Watched>,
    map: memmap2::MmapMut,
}

impl WriteMap {
    /// Maps `len` bytes from `offset`, and has their pages made at once where the
    /// kernel can do that: one call instead of a fault for each page.
    pub(crate) fn new(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let map = WriteMap::unpopulated(file, offset, len)?;
        match map.map.advise(memmap2::Advice::PopulateWrite) {
            // Kernels before 5.14 do not know it: the stores fault the pages in.
            Err(e) if e.kind() != io::ErrorKind::InvalidInput => Err(e),
            _ => Ok(map),
        }
    }

    /// The same with the pages left to the stores: to measure what that costs.
    pub(crate) fn unpopulated(file: &File, offset: u64, len: usize) -> io::Result<Self> {
        let mut options = memmap2::MmapOptions::new();
        // SAFETY: see the contract of the type.
        let map = unsafe { options.offset(offset).len(len).map_mut(file)? };
        Ok(WriteMap {
            watched: Watched::new(map.as_ptr(), map.len()),
            map,
        })
    }

    /// The bytes.
    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.map
    }

    /// Says that everything is stored.
    ///
    /// # Errors
    /// The file was cut meanwhile.
    pub(crate) fn finish(self) -> io::Result<()> {
        match self.watched.is_some_and(|watched| watched.is_hit()) {
            true => Err(io::Error::other("the file was cut while it was written")),
            false => Ok(()),
        }
    }
}

/// A source file mapped for reading while others may still change or cut it.
///
/// # Contract
/// The bytes are data and nothing else: they are summed, encoded and written to a socket,
/// and every one of these is right for whatever bytes it finds. Changed bytes are found by
/// their checksum and by the file's stamp. A map is only made under the guard, so that
/// missing pages read as zeros and show in [`SourceMap::check`].
#[derive(Debug)]
pub(crate) struct SourceMap {
    // Before the map: it must not be watched or known any more when that goes.
    watched: Watched,
    _known: Option<Known>,
    map: memmap2::Mmap,
}

impl SourceMap {
    /// Maps the first `len` bytes. `None`: there is no guard, or it watches enough.
    pub(crate) fn new(file: &Arc<File>, len: usize) -> io::Result<Option<Self>> {
        if !guard::is_installed() {
            return Ok(None);
        }
        // SAFETY: see the contract of the type.
        let map = unsafe { memmap2::MmapOptions::new().len(len).map(&**file)? };
        let Some(watched) = Watched::new(map.as_ptr(), map.len()) else {
            return Ok(None);
        };
        Ok(Some(SourceMap {
            watched,
            _known: Known::new(map.as_ptr(), map.len(), file),
            map,
        }))
    }

    /// Has the pages of a range read and mapped, here and now, so that whoever touches
    /// them later does not wait for a disk.
    pub(crate) fn populate(&self, range: &Range<usize>) -> io::Result<()> {
        let populated =
            self.map
                .advise_range(memmap2::Advice::PopulateRead, range.start, range.len());
        match populated {
            // Kernels before 5.14 do not know it: the first to touch a page reads it.
            Err(e) if e.kind() == io::ErrorKind::InvalidInput => Ok(()),
            other => other,
        }
    }

    /// # Errors
    /// A page was not there when it was read.
    pub(crate) fn check(&self) -> io::Result<()> {
        match self.watched.is_hit() {
            true => Err(io::ErrorKind::UnexpectedEof.into()),
            false => Ok(()),
        }
    }
}

/// A part of a [`SourceMap`] and whatever must live as long.
struct MappedChunk<K> {
    map: Arc<SourceMap>,
    range: Range<usize>,
    _keep: K,
}

impl<K> AsRef<[u8]> for MappedChunk<K> {
    fn as_ref(&self) -> &[u8] {
        self.map.map.get(self.range.clone()).unwrap_or_default()
    }
}

/// The bytes of a range, empty beyond the end of the map. They keep `keep`.
pub(crate) fn mapped_bytes<K: Send + 'static>(
    map: &Arc<SourceMap>,
    range: Range<usize>,
    keep: K,
) -> Bytes {
    Bytes::from_owner(MappedChunk {
        map: Arc::clone(map),
        range,
        _keep: keep,
    })
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
    fn a_source_cut_under_its_map_reads_as_zeros_and_says_so() {
        install_sigbus_guard().unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(1 << 20).unwrap();
        let map = Arc::new(SourceMap::new(&file, 1 << 20).unwrap().unwrap());
        let whole = mapped_bytes(&map, 0..1 << 20, ());
        map.populate(&(0..1 << 20)).unwrap();
        assert!(whole.iter().all(|&b| b == 0) && map.check().is_ok());
        file.set_len(100).unwrap();
        assert!(map.populate(&(0..1 << 20)).is_err());
        assert!(whole.iter().all(|&b| b == 0));
        assert!(map.check().is_err());
        // The next map in its place begins anew.
        drop((whole, map));
        file.set_len(5000).unwrap();
        let map = Arc::new(SourceMap::new(&file, 5000).unwrap().unwrap());
        assert_eq!(mapped_bytes(&map, 4000..5000, ()).len(), 1000);
        assert!(mapped_bytes(&map, 4000..5001, ()).is_empty() && map.check().is_ok());
    }

    #[test]
    fn bytes_of_a_map_are_found_in_their_file_as_long_as_it_is_mapped() {
        install_sigbus_guard().unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(10_000).unwrap();
        let map = Arc::new(SourceMap::new(&file, 10_000).unwrap().unwrap());
        let part = mapped_bytes(&map, 5000..10_000, ());
        let (found, at) = file_of(&part).unwrap();
        assert!(Arc::ptr_eq(&found, &file));
        assert_eq!((at, file_of(&part[1..2]).unwrap().1), (5000, 5001));
        assert!(file_of(&vec![0; 5000]).is_none());
        drop((part, map, found));
        assert_eq!(Arc::strong_count(&file), 1);
    }

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
