//! The files of a checkpoint: opened when read, a bounded number at a time.

use super::{SourceError, fingerprint, fingerprint::Stamp, mapped::MappedFile, pages::Pages};
use crate::{fault, plan::SourceState};
use rustix::fs::OFlags;
use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// Most descriptors held, so that 10,000 `.npy` files fit any process limit.
const MAX_OPEN_COUNT: usize = 256;

/// First bytes of a file that are read at once: they tell formats apart, and most
/// headers are no longer.
const HEAD_LEN: u64 = 4096;

/// A file opened to read its header.
#[derive(Debug)]
pub(super) struct OpenFile {
    file: File,
    canonical: PathBuf,
    stamp: Stamp,
    settled: bool,
    /// As many bytes as the file has, at most [`HEAD_LEN`].
    head: OnceLock<Vec<u8>>,
    pages: Pages,
}

impl OpenFile {
    /// Opens a regular file and takes its stamp before anything is read.
    pub(super) fn open(path: &Path) -> Result<Self, SourceError> {
        let canonical = fault::call("realpath", || fs::canonicalize(path))
            .map_err(|error| SourceError::io("resolve", path, error))?;
        let file = open(&canonical).map_err(|error| SourceError::io("open", path, error))?;
        Self::new(path, file, canonical)
    }

    /// The same for a file of a folder whose canonical path is known: one call instead of
    /// three where there are thousands. A link is followed as ever.
    pub(super) fn open_in(canonical_folder: &Path, name: &str) -> Result<Self, SourceError> {
        let canonical = canonical_folder.join(name);
        match open_with(&canonical, OFlags::NOFOLLOW) {
            Ok(file) => Self::new(&canonical.clone(), file, canonical),
            Err(_) => Self::open(&canonical),
        }
    }

    fn new(path: &Path, file: File, canonical: PathBuf) -> Result<Self, SourceError> {
        let stat_error = |error| SourceError::io("stat", path, error);
        let metadata = fault::call("source_stat", || file.metadata()).map_err(stat_error)?;
        if !metadata.is_file() {
            let looked_at = "its type: neither a regular file nor a folder".to_owned();
            return Err(SourceError::Unknown {
                path: path.to_owned(),
                looked_at,
            });
        }
        let (stamp, settled) = Stamp::take(&file, &metadata).map_err(stat_error)?;
        Ok(OpenFile {
            file,
            canonical,
            stamp,
            settled,
            head: OnceLock::new(),
            pages: Pages::default(),
        })
    }

    pub(super) fn path(&self) -> &Path {
        &self.canonical
    }

    /// Length in bytes.
    pub(super) fn byte_len(&self) -> u64 {
        self.stamp.size
    }

    /// `len` bytes from the start, or all when there are fewer. The buffer is
    /// never longer than the file.
    pub(super) fn prefix(&self, len: u64) -> Result<Vec<u8>, SourceError> {
        if len > HEAD_LEN {
            return self.bytes_at(0, len.min(self.stamp.size));
        }
        let head = match self.head.get() {
            Some(head) => head,
            None => {
                let head = self.bytes_at(0, HEAD_LEN.min(self.stamp.size))?;
                self.head.get_or_init(|| head)
            }
        };
        Ok(head.iter().take(len as usize).copied().collect())
    }

    /// `len` bytes from `offset` on. Nothing is allocated for bytes that the file does
    /// not have.
    pub(super) fn bytes_at(&self, offset: u64, len: u64) -> Result<Vec<u8>, SourceError> {
        let end = offset.checked_add(len);
        if end.is_none_or(|end| end > self.stamp.size) {
            let why = format!(
                "{len} bytes are needed at {offset}, it has {}",
                self.stamp.size
            );
            return Err(SourceError::malformed(&self.canonical, why));
        }
        let len = usize::try_from(len).map_err(|_| {
            SourceError::malformed(&self.canonical, "its header does not fit in memory")
        })?;
        let mut bytes = vec![0; len];
        let read = |offset, buf: &mut [u8]| {
            fault::call("source_pread", || self.file.read_exact_at(buf, offset))
                .map_err(|error| read_error(&self.canonical, error))
        };
        if !self.pages.read(offset, &mut bytes, self.stamp.size, read)? {
            read(offset, &mut bytes)?;
        }
        Ok(bytes)
    }
}

/// All files, by number.
#[derive(Debug, Default)]
pub(crate) struct FileTable {
    files: Vec<SourceFile>,
    states: Vec<SourceState>,
    index_by_path: HashMap<PathBuf, u32>,
    open: Mutex<OpenFiles>,
}

#[derive(Debug)]
struct SourceFile {
    canonical: PathBuf,
    stamp: Stamp,
    header_hash: blake3::Hash,
}

/// Open files and when each was last used, by file number.
#[derive(Debug, Default)]
struct OpenFiles {
    files: HashMap<u32, (Arc<ReadFile>, u64)>,
    use_count: u64,
}

/// A file that tensor bytes are read from.
#[derive(Debug)]
struct ReadFile {
    file: Arc<File>,
    /// Made when it is asked for; `None` inside where that is not possible.
    map: OnceLock<Option<Arc<MappedFile>>>,
}

impl FileTable {
    /// The number of a file; one that is already in keeps its number.
    pub(super) fn add(&mut self, file: &OpenFile, header: &[u8]) -> Result<u32, SourceError> {
        if let Some(&index) = self.index_by_path.get(&file.canonical) {
            return Ok(index);
        }
        let index = u32::try_from(self.files.len())
            .map_err(|_| SourceError::malformed(&file.canonical, "more than 2^32 files"))?;
        let header_hash = blake3::hash(header);
        let (canonical, stamp) = (file.canonical.clone(), file.stamp.clone());
        self.states.push(fingerprint::state(
            &canonical,
            &stamp,
            file.settled,
            &header_hash,
        ));
        self.index_by_path.insert(canonical.clone(), index);
        self.files.push(SourceFile {
            canonical,
            stamp,
            header_hash,
        });
        Ok(index)
    }

    pub(super) fn states(&self) -> &[SourceState] {
        &self.states
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.files
            .iter()
            .map(|file| file.canonical.clone())
            .collect()
    }

    /// Where a file is; nowhere for a number not given out.
    pub(super) fn path(&self, index: u32) -> &Path {
        let file = self.files.get(index as usize);
        file.map_or(Path::new(""), |file| &file.canonical)
    }

    /// Length in bytes when the file was opened; 0 for a number not given out.
    pub(super) fn byte_len(&self, index: u32) -> u64 {
        self.files
            .get(index as usize)
            .map_or(0, |file| file.stamp.size)
    }

    /// Fills `buf` from `offset`.
    pub(super) fn read_at(
        &self,
        index: u32,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        let (path, open) = self.handle(index)?;
        fault::call("source_pread", || open.file.read_exact_at(buf, offset))
            .map_err(|error| read_error(path, error))
    }

    /// The map of a whole file, where there can be one.
    pub(super) fn map(&self, index: u32) -> Result<Option<Arc<MappedFile>>, SourceError> {
        let (path, open) = self.handle(index)?;
        let len = self.byte_len(index);
        let made = || MappedFile::new(path.to_owned(), &open.file, len).map(Arc::new);
        Ok(open.map.get_or_init(made).clone())
    }

    /// Compares every file with what it was when the checkpoint was opened, at
    /// its path and, while it is open, behind its descriptor.
    pub(super) fn check_unchanged(&self) -> Result<(), SourceError> {
        for (index, file) in self.files.iter().enumerate() {
            let stat_error = |error| gone_or("stat", &file.canonical, error);
            let mut stamps = vec![Stamp::of(
                &fault::call("source_stat", || fs::metadata(&file.canonical))
                    .map_err(stat_error)?,
            )];
            if let Some(open) = self.already_open(index as u32) {
                let metadata = fault::call("source_stat", || open.file.metadata());
                stamps.push(Stamp::of(&metadata.map_err(stat_error)?));
            }
            let expected = file.stamp.fingerprint(&file.header_hash);
            for stamp in stamps {
                if stamp.fingerprint(&file.header_hash) != expected {
                    return Err(SourceError::changed(
                        &file.canonical,
                        file.stamp.difference(&stamp),
                    ));
                }
            }
        }
        Ok(())
    }

    fn already_open(&self, index: u32) -> Option<Arc<ReadFile>> {
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        open.use_count += 1;
        let now = open.use_count;
        open.files.get_mut(&index).map(|(file, last_use)| {
            *last_use = now;
            Arc::clone(file)
        })
    }

    fn handle(&self, index: u32) -> Result<(&Path, Arc<ReadFile>), SourceError> {
        let Some(known) = self.files.get(index as usize) else {
            let why = format!("there is no file {index}, only {}", self.files.len());
            return Err(SourceError::malformed(Path::new(""), why));
        };
        let path = known.canonical.as_path();
        if let Some(file) = self.already_open(index) {
            return Ok((path, file));
        }
        // Not under the lock: opening may take long on a network file system.
        let file = open(path).map_err(|error| gone_or("open", path, error))?;
        let metadata = fault::call("source_stat", || file.metadata())
            .map_err(|error| gone_or("stat", path, error))?;
        let stamp = Stamp::of(&metadata);
        if (stamp.dev, stamp.ino) != (known.stamp.dev, known.stamp.ino) {
            return Err(SourceError::changed(path, known.stamp.difference(&stamp)));
        }
        let file = Arc::new(ReadFile {
            file: Arc::new(file),
            map: OnceLock::new(),
        });
        let mut open = self.open.lock().unwrap_or_else(PoisonError::into_inner);
        if open.files.len() >= MAX_OPEN_COUNT {
            let oldest = open.files.iter().min_by_key(|(_, (_, last_use))| *last_use);
            if let Some(oldest) = oldest.map(|(&index, _)| index) {
                open.files.remove(&oldest);
            }
        }
        let now = open.use_count;
        open.files.insert(index, (Arc::clone(&file), now));
        Ok((path, file))
    }

    #[cfg(test)]
    pub(super) fn open_count(&self) -> usize {
        self.open.lock().unwrap().files.len()
    }
}

fn open(path: &Path) -> io::Result<File> {
    open_with(path, OFlags::empty())
}

fn open_with(path: &Path, flags: OFlags) -> io::Result<File> {
    // A pipe without a writer must not block; no effect on regular files.
    let flags = flags | OFlags::NONBLOCK;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(flags.bits() as i32);
    fault::call("source_open", || options.open(path))
}

fn read_error(path: &Path, error: io::Error) -> SourceError {
    match error.kind() {
        io::ErrorKind::UnexpectedEof => SourceError::changed(path, "it became shorter"),
        _ => SourceError::io("read", path, error),
    }
}

fn gone_or(op: &'static str, path: &Path, error: io::Error) -> SourceError {
    match error.kind() {
        io::ErrorKind::NotFound => SourceError::changed(path, "it is gone"),
        _ => SourceError::io(op, path, error),
    }
}
