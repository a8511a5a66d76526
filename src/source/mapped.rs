//! Runs of bytes of a mapped file, which go out without being read into a buffer.

use super::SourceError;
use crate::map::{SourceMap, mapped_bytes};
use bytes::Bytes;
use std::{fs::File, io, ops::Range, path::PathBuf, sync::Arc};

/// How the bytes of a source are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum ReadMode {
    /// By map where the guard against cut files is installed
    /// ([`install_sigbus_guard`](crate::install_sigbus_guard)), otherwise by `pread`.
    #[default]
    Auto,
    /// What `Auto` does today, and goes on doing if that changes.
    Map,
    /// `pread` into buffers that are used again.
    Pread,
}

/// A file of a source, mapped as long as it was when the checkpoint was opened.
#[derive(Debug)]
pub(super) struct MappedFile {
    path: PathBuf,
    map: Arc<SourceMap>,
}

impl MappedFile {
    /// `None` where that is not possible: no guard, no such files, too many of them.
    pub(super) fn new(path: PathBuf, file: &Arc<File>, len: u64) -> Option<Self> {
        let map = SourceMap::new(file, usize::try_from(len).ok()?).ok()??;
        Some(MappedFile {
            path,
            map: Arc::new(map),
        })
    }
}

/// A part of a mapped file.
#[derive(Debug)]
pub(crate) struct MappedRun {
    pub(super) file: Arc<MappedFile>,
    pub(super) range: Range<usize>,
}

impl MappedRun {
    /// Reads the pages, and waits for that.
    ///
    /// # Errors
    /// [`SourceError::Changed`] where the file has become shorter, [`SourceError::Io`].
    pub(crate) fn populate(&self) -> Result<(), SourceError> {
        let populated = self.file.map.populate(&self.range);
        populated.map_err(|error| match error.raw_os_error() {
            // What a page is that lies behind the end of its file.
            Some(errno) if errno == rustix::io::Errno::FAULT.raw_os_error() => self.cut(),
            _ => SourceError::io("read", &self.file.path, error),
        })
    }

    /// The bytes, which keep `keep`.
    pub(crate) fn bytes<K: Send + 'static>(&self, keep: K) -> Bytes {
        mapped_bytes(&self.file.map, self.range.clone(), keep)
    }

    /// Asked after the bytes were looked at.
    ///
    /// # Errors
    /// Some of them were not there: [`SourceError::Changed`].
    pub(crate) fn check(&self) -> Result<(), SourceError> {
        self.file.map.check().map_err(|_: io::Error| self.cut())
    }

    fn cut(&self) -> SourceError {
        SourceError::changed(&self.file.path, "it became shorter, or cannot be read")
    }
}
