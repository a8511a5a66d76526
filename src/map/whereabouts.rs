//! Which file the bytes at an address come from, for maps of sources: so that a
//! connection can have the kernel send the pages of a file instead of copying them.

use rustix::fs::fstatfs;
use std::{
    fs::File,
    sync::{Arc, PoisonError, RwLock},
};

/// Types of file systems (`statfs`) that find their pages without asking anybody: ext2 to
/// ext4, xfs, btrfs, tmpfs. Elsewhere `sendfile` may wait for a server or a daemon, which
/// whoever serves a network must not do; there the bytes are copied out of the map, whose
/// pages are there already.
const LOCAL_TYPES: [u32; 4] = [0xef53, 0x5846_5342, 0x9123_683e, 0x0102_1994];

/// Every mapped source, in no order: at most as many as the guard watches.
static KNOWN: RwLock<Vec<Mapped>> = RwLock::new(Vec::new());

/// A file mapped from its first byte.
#[derive(Debug)]
struct Mapped {
    start: usize,
    len: usize,
    file: Arc<File>,
}

/// A map as long as it is known. It is dropped before the map is.
#[derive(Debug)]
pub(super) struct Known {
    start: usize,
}

impl Known {
    /// The map at `start` shows the first `len` bytes of `file`. `None` where the kernel
    /// should not be asked to send its pages.
    pub(super) fn new(start: *const u8, len: usize, file: &Arc<File>) -> Option<Self> {
        let kind = fstatfs(file).ok()?.f_type;
        // The type has 32 bits, whatever the width of the field.
        if !LOCAL_TYPES.contains(&(kind as u32)) {
            return None;
        }
        let start = start as usize;
        let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
        known.push(Mapped {
            start,
            len,
            file: Arc::clone(file),
        });
        drop(known);
        Some(Known { start })
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
        let index = known.iter().position(|map| map.start == self.start);
        let removed = index.map(|index| known.swap_remove(index));
        // Closing a file may take long: not under the lock.
        drop(known);
        drop(removed);
    }
}

/// The file that shows in these bytes, and where in it they begin; `None` for bytes that
/// are not of a mapped source.
///
/// Whoever holds the bytes holds the map, so what is found is theirs: two maps never share
/// an address.
pub(crate) fn file_of(bytes: &[u8]) -> Option<(Arc<File>, u64)> {
    let address = bytes.as_ptr() as usize;
    let known = KNOWN.read().unwrap_or_else(PoisonError::into_inner);
    known.iter().find_map(|map| {
        let at = address.checked_sub(map.start)?;
        let is_inside = at.checked_add(bytes.len())? <= map.len;
        is_inside.then(|| (Arc::clone(&map.file), at as u64))
    })
}
