//! The files of a transfer under way: made, preallocated, written and synced.

use super::{
    dir::{Dir, is_not_found},
    durability::FileSystem,
    error::{IoContext, StoreError},
    write_out,
};
use crate::{
    fault,
    format::{Dtype, npy},
    map::WriteMap,
    mutant,
    plan::{EntryHeader, EntryKind, Order},
    protocol::{NpyDtype, Placement, SlotFile, Written},
};
use bytes::Bytes;
use rustix::{fs::FallocateFlags, io::Errno};
use std::{
    collections::{HashMap, HashSet},
    fs::{File, Permissions},
    io::{self, IoSlice, Write as _},
    os::{
        fd::AsFd,
        unix::fs::{FileExt, PermissionsExt},
    },
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// Blocks are allocated this far ahead of the write that needs them.
const ALLOCATE_AHEAD_BYTES: u64 = 32 << 20;
/// Bytes of one file after which the disk begins to write them.
const WRITE_OUT_BYTES: u64 = 8 << 20;
/// Above this many files a group is synced by one `syncfs`.
const MAX_SINGLE_SYNCS: usize = 64;
/// Above this many open files those that were just used are closed before their sync, and
/// the group is then synced by `syncfs`, which hears of errors all the same.
const MAX_OPEN_FILES: usize = 256;

/// Whether the owner may write to a file, and whether anybody may.
const WRITABLE: u32 = 0o200;
const ANY_WRITABLE: u32 = 0o222;

/// How the bytes of a chunk get into its file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum WriteMode {
    /// Whichever is cheaper, which has been `pwrite` wherever it was measured.
    #[default]
    Auto,
    /// `pwrite` of the very buffers that the connection filled: nothing is copied.
    Pwrite,
    /// One copy into a map of the file.
    Map,
}

/// Bytes before the data in a file of its own: the `.npy` header of a tensor, nothing for a
/// blob.
pub(crate) fn file_prefix(header: &EntryHeader, npy_dtype: NpyDtype) -> Vec<u8> {
    let EntryKind::Tensor { dtype } = header.kind else {
        return Vec::new();
    };
    let descr = npy_descr(dtype, header.big_endian, npy_dtype);
    if dtype.is_packed() {
        return npy::encode_header(&descr, false, &[header.byte_len]);
    }
    npy::encode_header(&descr, header.order == Order::Fortran, &header.shape)
}

/// The `descr` of a tensor's header.
pub(crate) fn npy_descr(dtype: Dtype, big_endian: bool, npy_dtype: NpyDtype) -> String {
    match npy_dtype {
        NpyDtype::Named if dtype.is_of_ml_dtypes() => dtype.name().to_owned(),
        NpyDtype::Named | NpyDtype::Bytes => dtype.npy_descr(big_endian),
    }
}

/// What the files of a transfer look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileOptions {
    /// How chunks are written.
    pub(crate) write_mode: WriteMode,
    /// They are going to be synced.
    pub(crate) is_synced: bool,
    /// Element types in `.npy` headers.
    pub(crate) npy_dtype: NpyDtype,
    /// Length in bytes that a shared file has until it is published: no less than it needs.
    pub(crate) container_len: u64,
}

/// One open file.
#[derive(Debug)]
struct OpenFile {
    file: File,
    path: String,
    /// Where an entry begins that has the file for itself.
    prefix_len: u64,
    file_len: u64,
    /// Blocks are allocated up to here; `u64::MAX` where the file system cannot.
    allocated: Mutex<u64>,
    /// Bytes written since the disk was last told to begin.
    dirty_bytes: AtomicU64,
    /// Somebody was told that it is complete: it is not written to any more.
    is_sealed: bool,
}

impl OpenFile {
    /// Makes sure that blocks exist for `end` bytes and some ahead, so that a full
    /// disk shows here and not in the middle of a write. `false`: the file system
    /// cannot do that.
    fn allocate(&self, end: u64) -> Result<bool, StoreError> {
        let mut allocated = lock(&self.allocated);
        if end <= *allocated {
            return Ok(*allocated != u64::MAX);
        }
        let upto = end
            .saturating_add(ALLOCATE_AHEAD_BYTES)
            .min(self.file_len)
            .max(end);
        let from = *allocated;
        let done = fault::call("fallocate", || {
            rustix::fs::fallocate(&self.file, FallocateFlags::empty(), from, upto - from)
        });
        *allocated = match done {
            Ok(()) => upto,
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => u64::MAX,
            Err(e) => return Err(e).context("allocate space for", &self.path),
        };
        Ok(*allocated != u64::MAX)
    }
}

impl OpenFile {
    /// Where the bytes of an entry begin.
    fn start_of(&self, slot: &SlotFile) -> u64 {
        slot.data_offset.unwrap_or(self.prefix_len)
    }

    /// After every so many bytes has the disk begin.
    fn write_out(&self, written_bytes: u64) {
        let dirty_bytes = self.dirty_bytes.fetch_add(written_bytes, Ordering::Relaxed);
        if dirty_bytes + written_bytes >= WRITE_OUT_BYTES {
            self.dirty_bytes.store(0, Ordering::Relaxed);
            write_out::begin(&self.file);
        }
    }
}

#[derive(Debug, Default)]
struct OpenFiles {
    by_number: HashMap<u32, Arc<OpenFile>>,
    /// The file that tensors share, where they do.
    container: Option<Arc<OpenFile>>,
    /// Files made in this session: they exist although no record may say so yet.
    made: HashSet<u32>,
    /// Folders below `data` that exist.
    folders: HashSet<String>,
    /// Some were closed before they were synced.
    closed_early: bool,
}

/// The files of one transfer. Shared by I/O threads and the committer.
#[derive(Debug)]
pub(crate) struct Files {
    data: Dir,
    /// For `syncfs`; opened before the first write so that it hears of every error.
    whole: File,
    open: Mutex<OpenFiles>,
    /// Folders with names that are not yet durable.
    new_names: Mutex<HashSet<String>>,
    written_bytes: AtomicU64,
    options: FileOptions,
    mode: WriteMode,
    /// Blocks are allocated ahead of the writes.
    allocates: bool,
    /// Dirty pages go to the disk before the sync.
    begins_early: bool,
}

impl Files {
    /// Files below `data`.
    pub(crate) fn new(data: Dir, options: FileOptions) -> Result<Self, StoreError> {
        let kind = FileSystem::of(&data)?;
        let (is_memory, mode) = (kind.is_memory, kind.write_mode(options.write_mode));
        Ok(Files {
            options,
            mode,
            allocates: mode == WriteMode::Map || !is_memory,
            begins_early: options.is_synced && !is_memory,
            whole: File::from(data.reopen()?),
            data,
            open: Mutex::default(),
            new_names: Mutex::default(),
            written_bytes: AtomicU64::new(0),
        })
    }

    /// The folder.
    pub(crate) fn data(&self) -> &Dir {
        &self.data
    }

    /// Raw bytes written since this was asked last.
    pub(crate) fn take_written_bytes(&self) -> u64 {
        self.written_bytes.swap(0, Ordering::Relaxed)
    }

    /// Whether the file of a recorded entry is what the record says: length and
    /// header. Data is judged by its own records.
    pub(crate) fn is_intact(&self, slot: &SlotFile) -> Result<bool, StoreError> {
        let (file, _) = match self.open_made(&slot.file) {
            Ok(opened) => opened,
            Err(error) if is_not_found(&error) => return Ok(false),
            Err(error) => return Err(error),
        };
        let prefix = self.prefix(slot);
        let shown = self.data.shown(&slot.file);
        let len = fault::call("fstat", || file.metadata())
            .context("stat", &shown)?
            .len();
        if let Some(offset) = slot.data_offset {
            // Its header is written when all is there.
            return Ok(offset.saturating_add(slot.header.byte_len) <= len);
        }
        if len != prefix.len() as u64 + slot.header.byte_len {
            return Ok(false);
        }
        let mut found = vec![0; prefix.len()];
        fault::call("pread", || file.read_exact_at(&mut found, 0)).context("read", &shown)?;
        Ok(found == prefix)
    }

    /// Writes the bytes of a verified chunk into its cell.
    ///
    /// On failure the placement comes back with the error.
    pub(crate) fn write<'a>(
        &self,
        placement: Placement,
        parts: impl IntoIterator<Item = &'a Bytes>,
    ) -> Result<Written, (Placement, StoreError)> {
        match self.write_parts(&placement, parts) {
            Ok(()) => Ok(placement.into_written()),
            Err(e) => Err((placement, e)),
        }
    }

    fn write_parts<'a>(
        &self,
        placement: &Placement,
        parts: impl IntoIterator<Item = &'a Bytes>,
    ) -> Result<(), StoreError> {
        let has_own_file = placement.slot().data_offset.is_none();
        if has_own_file
            && placement.is_whole()
            && !placement.is_recorded()
            && self.claim(placement.slot())?
        {
            let parts: Vec<&Bytes> = parts.into_iter().collect();
            self.write_whole(placement.slot(), &parts)?;
            self.written_bytes
                .fetch_add(u64::from(placement.raw_len()), Ordering::Relaxed);
            self.close_if_many(placement.slot().number);
            return Ok(());
        }
        let mut file = self.file(placement.slot(), placement.is_recorded())?;
        if file.is_sealed {
            file = self.rebuild(placement.slot())?;
        }
        let at = file.start_of(placement.slot()) + placement.offset();
        let has_blocks = self.allocates && file.allocate(at + u64::from(placement.raw_len()))?;
        let written = match self.mode {
            // A store into a hole of a full disk is a signal, a write is an error.
            WriteMode::Map if !has_blocks => write_all_parts(&file.file, at, parts),
            WriteMode::Auto | WriteMode::Pwrite => write_all_parts(&file.file, at, parts),
            WriteMode::Map => copy_parts(&file.file, at, placement.raw_len() as usize, parts),
        };
        written.context("write", &file.path)?;
        if self.begins_early {
            file.write_out(u64::from(placement.raw_len()));
        }
        self.written_bytes
            .fetch_add(u64::from(placement.raw_len()), Ordering::Relaxed);
        self.close_if_many(placement.slot().number);
        Ok(())
    }

    /// Whether the file was not made in this session before; from now on it counts as made.
    fn claim(&self, slot: &SlotFile) -> Result<bool, StoreError> {
        let folder = folder_of(&slot.file);
        let mut open = lock(&self.open);
        if !open.made.insert(slot.number) {
            return Ok(false);
        }
        if !open.folders.contains(folder) {
            self.data.make_all(folder, false)?;
            open.folders.insert(folder.to_owned());
        }
        Ok(true)
    }

    /// Makes the file of an entry of one cell with all that is in it: a call or two
    /// instead of five, which counts when there are thousands. Outside the lock, because
    /// one placement for its cell exists and a group names the entry after that is used.
    fn write_whole(&self, slot: &SlotFile, parts: &[&Bytes]) -> Result<(), StoreError> {
        let prefix = self.prefix(slot);
        let file = self.data.create_anew(&slot.file)?;
        let mut slices = Vec::with_capacity(parts.len() + 1);
        slices.push(IoSlice::new(&prefix));
        slices.extend(parts.iter().map(|part| IoSlice::new(part)));
        let path = self.data.shown(&slot.file);
        let mut rest = slices.as_mut_slice();
        while !rest.is_empty() {
            match fault::call("writev", || (&file).write_vectored(rest)) {
                Ok(0) => {
                    return Err(io::Error::from(io::ErrorKind::WriteZero)).context("write", &path);
                }
                Ok(n) => IoSlice::advance_slices(&mut rest, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e).context("write", &path),
            }
        }
        let file_len = prefix.len() as u64 + slot.header.byte_len;
        let file = Arc::new(OpenFile {
            file,
            path,
            prefix_len: prefix.len() as u64,
            file_len,
            allocated: Mutex::new(file_len),
            dirty_bytes: AtomicU64::new(0),
            is_sealed: false,
        });
        lock(&self.new_names).insert(folder_of(&slot.file).to_owned());
        lock(&self.open).by_number.insert(slot.number, file);
        Ok(())
    }

    /// Thousands of small tensors must not need thousands of descriptors.
    fn close_if_many(&self, number: u32) {
        let mut open = lock(&self.open);
        if open.by_number.len() > MAX_OPEN_FILES {
            open.by_number.remove(&number);
            open.closed_early = true;
        }
    }

    /// Reads a cell back. A short file is an error.
    pub(crate) fn read(
        &self,
        slot: &SlotFile,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), StoreError> {
        let file = self.file(slot, true)?;
        let at = file.start_of(slot) + offset;
        let read = || file.file.read_exact_at(buf, at);
        let done = fault::call("pread", read).context("read", &file.path);
        self.close_if_many(slot.number);
        done
    }

    /// Gives a finished file's descriptor back.
    pub(crate) fn close(&self, number: u32) {
        lock(&self.open).by_number.remove(&number);
    }

    /// Makes the files of a group durable, with their names when they are new.
    pub(crate) fn sync(&self, slots: &[(Arc<SlotFile>, bool)]) -> Result<(), StoreError> {
        let all_at_once = slots.len() > MAX_SINGLE_SYNCS || lock(&self.open).closed_early;
        if all_at_once {
            self.touch(slots)?;
            // Before the sync: whatever is closed or named from here on is not
            // covered by it.
            lock(&self.open).closed_early = false;
            lock(&self.new_names).clear();
            let synced = || rustix::fs::syncfs(self.whole.as_fd()).map_err(io::Error::from);
            return once(|| fault::call("syncfs", synced))
                .context("sync the file system of", self.data.shown(""));
        }
        let mut files: Vec<Arc<OpenFile>> = Vec::with_capacity(slots.len());
        for (slot, recorded) in slots {
            let file = self.file(slot, *recorded)?;
            let is_shared = slot.data_offset.is_some();
            if !(is_shared && files.iter().any(|known| Arc::ptr_eq(known, &file))) {
                files.push(file);
            }
        }
        let new_names = std::mem::take(&mut *lock(&self.new_names));
        for file in files {
            once(|| fault::call("fdatasync", || file.file.sync_data()))
                .context("sync", &file.path)?;
        }
        for folder in new_names {
            match folder.as_str() {
                "" => self.data.sync()?,
                folder => self.data.sub(folder)?.sync()?,
            }
        }
        Ok(())
    }

    /// Makes the files of a group that are not there yet, syncing nothing.
    pub(crate) fn touch(&self, slots: &[(Arc<SlotFile>, bool)]) -> Result<(), StoreError> {
        for (slot, recorded) in slots {
            if !recorded && !lock(&self.open).made.contains(&slot.number) {
                self.file(slot, false)?;
                // Only entries without bytes are made here.
                self.close_if_many(slot.number);
            }
        }
        Ok(())
    }

    /// The open file of an entry; made with its header when no record cites it yet.
    fn file(&self, slot: &SlotFile, recorded: bool) -> Result<Arc<OpenFile>, StoreError> {
        // Held while a file is made, so that it is made once.
        let mut open = lock(&self.open);
        if slot.data_offset.is_some() {
            return self.container(&mut open, &slot.file);
        }
        if let Some(file) = open.by_number.get(&slot.number) {
            return Ok(Arc::clone(file));
        }
        let path = self.data.shown(&slot.file);
        let prefix = self.prefix(slot);
        let file_len = prefix.len() as u64 + slot.header.byte_len;
        let (file, is_sealed) = if recorded || open.made.contains(&slot.number) {
            self.open_made(&slot.file)?
        } else {
            let folder = folder_of(&slot.file);
            if !open.folders.contains(folder) {
                self.data.make_all(folder, false)?;
                open.folders.insert(folder.to_owned());
            }
            let file = self.make(slot, &prefix, file_len)?;
            open.made.insert(slot.number);
            (file, false)
        };
        let file = Arc::new(OpenFile {
            file,
            path,
            prefix_len: prefix.len() as u64,
            file_len,
            allocated: Mutex::new(0),
            dirty_bytes: AtomicU64::new(0),
            is_sealed,
        });
        open.by_number.insert(slot.number, Arc::clone(&file));
        Ok(file)
    }

    /// Opens a file that exists, and tells whether it is sealed. One that is can be opened
    /// for writing by root alone.
    fn open_made(&self, name: &str) -> Result<(File, bool), StoreError> {
        let file = match self.data.open(name, true) {
            Err(StoreError::Io { source, .. })
                if source.kind() == io::ErrorKind::PermissionDenied =>
            {
                return Ok((self.data.open(name, false)?, true));
            }
            opened => opened?,
        };
        let metadata =
            fault::call("fstat", || file.metadata()).context("stat", self.data.shown(name))?;
        Ok((file, metadata.permissions().mode() & WRITABLE == 0))
    }

    /// Makes the file of a complete entry read-only, for good: from now on others may map
    /// it, and what they see never changes. Should its bytes turn out to be of yesterday,
    /// they are put into another file. Returns where it lies until it is published; `None`
    /// where the file system knows nothing of this, and nothing can be promised.
    pub(crate) fn seal(&self, slot: &SlotFile) -> Result<Option<PathBuf>, StoreError> {
        let (file, is_sealed) = self.open_made(&slot.file)?;
        let path = self.data.path_of(&slot.file);
        if !is_sealed {
            let shown = self.data.shown(&slot.file);
            let metadata = fault::call("fstat", || file.metadata()).context("stat", &shown)?;
            let mode = metadata.permissions().mode() & !ANY_WRITABLE;
            let sealed = Permissions::from_mode(mode);
            match fault::call("fchmod", || file.set_permissions(sealed.clone())) {
                Err(e) if e.kind() == io::ErrorKind::PermissionDenied => return Ok(None),
                Err(e) if e.kind() == io::ErrorKind::Unsupported => return Ok(None),
                done => done.context("make read-only", &shown)?,
            }
            if !self.open_made(&slot.file)?.1 {
                return Ok(None);
            }
        }
        Ok(Some(path))
    }

    /// Puts a copy in the place of a sealed file, to be written to: whoever has mapped the
    /// sealed one keeps it as it is. What is durable in it has to be so in the copy before
    /// that has its name.
    fn rebuild(&self, slot: &SlotFile) -> Result<Arc<OpenFile>, StoreError> {
        let mut open = lock(&self.open);
        if let Some(file) = open.by_number.get(&slot.number)
            && !file.is_sealed
        {
            return Ok(Arc::clone(file));
        }
        let (folder, shown) = (folder_of(&slot.file), self.data.shown(&slot.file));
        let (sealed, is_sealed) = self.open_made(&slot.file)?;
        if !is_sealed {
            // Another thread has put the copy there, and its descriptor was closed since.
            return Ok(self.keep_open(&mut open, slot, sealed, shown));
        }
        let parent = match folder {
            "" => self.data.clone(),
            folder => self.data.sub(folder)?,
        };
        // No entry has a name like this.
        let name = format!(".rebuilt-{}", slot.number);
        let file = parent.create_anew(&name)?;
        let copied = self.copy_sealed(&sealed, &file).context("copy", &shown);
        let last = slot.file.rsplit('/').next().unwrap_or(&slot.file);
        if let Err(error) = copied.and_then(|()| parent.rename(&name, &parent, last)) {
            // On a full disk it would be in the way of everything else.
            let _ = parent.remove_file(&name);
            return Err(error);
        }
        lock(&self.new_names).insert(folder.to_owned());
        Ok(self.keep_open(&mut open, slot, file, shown))
    }

    fn copy_sealed(&self, mut sealed: &File, mut file: &File) -> io::Result<()> {
        fault::call("copy", || io::copy(&mut sealed, &mut file))?;
        if self.options.is_synced {
            once(|| fault::call("fdatasync", || file.sync_data()))?;
        }
        Ok(())
    }

    /// A file that may be written to, open from now on.
    fn keep_open(
        &self,
        open: &mut OpenFiles,
        slot: &SlotFile,
        file: File,
        path: String,
    ) -> Arc<OpenFile> {
        let prefix_len = self.prefix(slot).len() as u64;
        let file_len = prefix_len + slot.header.byte_len;
        let file = Arc::new(OpenFile {
            file,
            path,
            prefix_len,
            file_len,
            allocated: Mutex::new(0),
            dirty_bytes: AtomicU64::new(0),
            is_sealed: false,
        });
        open.by_number.insert(slot.number, Arc::clone(&file));
        file
    }

    fn prefix(&self, slot: &SlotFile) -> Vec<u8> {
        file_prefix(&slot.header, self.options.npy_dtype)
    }

    /// The file that tensors share. As it is there from its first tensor on, it may be
    /// older than this session.
    fn container(&self, open: &mut OpenFiles, name: &str) -> Result<Arc<OpenFile>, StoreError> {
        if let Some(file) = &open.container {
            return Ok(Arc::clone(file));
        }
        let path = self.data.shown(name);
        let file = match self.data.try_open(name, true)? {
            Some(file) => file,
            None => self.data.create_anew(name)?,
        };
        // Also of a file that was there: who made it may have died before it synced the name.
        lock(&self.new_names).insert(folder_of(name).to_owned());
        let found_len = fault::call("fstat", || file.metadata())
            .context("stat", &path)?
            .len();
        // It is never cut here: what lies beyond may be recorded.
        let file_len = self.options.container_len.max(found_len);
        if found_len < file_len {
            fault::call("ftruncate", || file.set_len(file_len))
                .context("set the length of", &path)?;
        }
        let file = Arc::new(OpenFile {
            file,
            path,
            prefix_len: 0,
            file_len,
            allocated: Mutex::new(0),
            dirty_bytes: AtomicU64::new(0),
            is_sealed: false,
        });
        Ok(Arc::clone(open.container.insert(file)))
    }

    /// Writes the header of the file that tensors share, cuts it to its length and syncs it
    /// where that is to be.
    pub(crate) fn finish_container(
        &self,
        name: &str,
        header: &[u8],
        file_len: u64,
    ) -> Result<(), StoreError> {
        let file = self.container(&mut lock(&self.open), name)?;
        fault::call("pwrite", || file.file.write_all_at(header, 0))
            .context("write the header of", &file.path)?;
        fault::call("ftruncate", || file.file.set_len(file_len))
            .context("set the length of", &file.path)?;
        if self.options.is_synced {
            once(|| fault::call("fsync", || file.file.sync_all())).context("sync", &file.path)?;
        }
        Ok(())
    }

    fn make(&self, slot: &SlotFile, prefix: &[u8], file_len: u64) -> Result<File, StoreError> {
        let folder = folder_of(&slot.file);
        let file = self.data.create_anew(&slot.file)?;
        let shown = self.data.shown(&slot.file);
        fault::call("ftruncate", || file.set_len(file_len)).context("set the length of", &shown)?;
        fault::call("pwrite", || file.write_all_at(prefix, 0))
            .context("write the header of", &shown)?;
        lock(&self.new_names).insert(folder.to_owned());
        Ok(file)
    }
}

/// A sync that failed is not tried again: the kernel may have dropped the pages and would
/// report success.
fn once(sync: impl Fn() -> io::Result<()>) -> io::Result<()> {
    match sync() {
        Err(_) if mutant::is("retry_sync") => sync(),
        done => done,
    }
}

fn write_all_parts<'a>(
    file: &File,
    mut at: u64,
    parts: impl IntoIterator<Item = &'a Bytes>,
) -> io::Result<()> {
    for part in parts {
        fault::call("pwrite", || file.write_all_at(part, at))?;
        at += part.len() as u64;
    }
    Ok(())
}

fn copy_parts<'a>(
    file: &File,
    at: u64,
    len: usize,
    parts: impl IntoIterator<Item = &'a Bytes>,
) -> io::Result<()> {
    let mut map = fault::call("mmap", || WriteMap::new(file, at, len))?;
    let mut rest = map.bytes();
    for part in parts {
        let (head, tail) = rest
            .split_at_mut_checked(part.len())
            .ok_or(io::ErrorKind::InvalidInput)?;
        head.copy_from_slice(part);
        rest = tail;
    }
    map.finish()
}

/// Reads up to `buf.len()` bytes; fewer only at the end of the file.
pub(crate) fn read_exact_at_most(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

fn folder_of(file: &str) -> &str {
    file.rsplit_once('/').map_or("", |(folder, _)| folder)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
