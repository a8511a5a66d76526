//! Which file the bytes at an address come from, for maps of sources: so that a
//! connection can have the kernel send the pages of a file instead of copying them.

use std::{
    fs::File,
    sync::{Arc, PoisonError, RwLock},
};

/// Every mapped source, in no order: there are as many as files are open.
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
    /// The map at `start` shows the first `len` bytes of `file`.
    pub(super) fn new(start: *const u8, len: usize, file: &Arc<File>) -> Self {
        let start = start as usize;
        let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
        known.push(Mapped {
            start,
            len,
            file: Arc::clone(file),
        });
        Known { start }
    }
}

impl Drop for Known {
    fn drop(&mut self) {
        let mut known = KNOWN.write().unwrap_or_else(PoisonError::into_inner);
        if let Some(index) = known.iter().position(|map| map.start == self.start) {
            known.swap_remove(index);
        }
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
