//! Files in the making: in a hidden folder beside their names, until all are whole.

use super::failed;
use crate::{
    error::Error,
    fault,
    source::SourceSet,
    store::{Catalog, StoreError},
};
use rustix::{
    fs::{CWD, FallocateFlags, OFlags, RenameFlags, fallocate, renameat_with},
    io::Errno,
};
use std::{
    ffi::{OsStr, OsString},
    fs::{self, DirBuilder, File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

/// Names of hidden folders begin so.
const HIDDEN_PREFIX: &str = ".tensorferry-export-";
/// Folders of killed processes that are removed at once; the rest next time.
const MAX_STALE_COUNT: usize = 64;

/// Where files of one export lie until they get their names. Whoever makes one holds a lock
/// on the folder, so that one without a lock was left by a process that was killed.
#[derive(Debug)]
pub(super) struct Outputs {
    dir: PathBuf,
    overwrite: bool,
    hidden: PathBuf,
    finished: Vec<OsString>,
    /// Held until the folder is gone.
    _lock: File,
}

/// The folder and the name that a path means.
pub(super) fn split(out: &Path) -> Result<(PathBuf, OsString), Error> {
    let usage = |why: &str| Error::Usage(format!("{}: {why}", out.display()));
    let name = out
        .file_name()
        .ok_or_else(|| usage("not the name of a file"))?;
    let dir = match out.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    };
    if !dir.is_dir() {
        return Err(usage("the folder that it would lie in does not exist"));
    }
    Ok((dir.to_owned(), name.to_owned()))
}

impl Outputs {
    /// Makes the hidden folder, if nothing of these names is in the way.
    pub(super) fn begin(
        dir: &Path,
        names: &[&OsStr],
        overwrite: bool,
        source: &SourceSet,
    ) -> Result<Self, Error> {
        let sources = source.paths();
        for name in names {
            let path = dir.join(name);
            check_free(&path, overwrite)?;
            if fs::canonicalize(&path).is_ok_and(|path| sources.contains(&path)) {
                let why = format!("{} is a file of the source", path.display());
                return Err(Error::Usage(why));
            }
        }
        let canonical = fs::canonicalize(dir).map_err(failed("resolve", dir))?;
        if let Some(landed) = Catalog::enclosing_checkpoint(&canonical) {
            let why = format!(
                "{} was landed by tensorferry and stays as it is: export beside it",
                landed.display()
            );
            return Err(Error::Usage(why));
        }
        remove_stale(dir);
        let (hidden, lock) = make_hidden(dir)?;
        Ok(Outputs {
            dir: dir.to_owned(),
            overwrite,
            hidden,
            finished: Vec::new(),
            _lock: lock,
        })
    }

    /// An empty file that will have this name, with room for `byte_len` bytes.
    pub(super) fn create(&self, name: &OsStr, byte_len: u64) -> Result<File, Error> {
        let path = self.hidden.join(name);
        let mut options = OpenOptions::new();
        // Read too: archives are patched.
        options.read(true).write(true).create_new(true);
        let file = fault::call("export_create", || options.open(&path))
            .map_err(failed("create", &path))?;
        if byte_len > 0 {
            let allocated = fault::call("export_allocate", || {
                fallocate(&file, FallocateFlags::empty(), 0, byte_len)
            });
            // Where the file system cannot, writing will tell.
            if let Err(error @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG)) = allocated {
                return Err(failed("make room for", &self.path(name))(error.into()));
            }
        }
        Ok(file)
    }

    /// Where a file will be, as the caller would say it.
    pub(super) fn path(&self, name: &OsStr) -> PathBuf {
        match self.dir.as_os_str().as_encoded_bytes() {
            b"." => name.into(),
            _ => self.dir.join(name),
        }
    }

    /// Syncs a file that is complete.
    pub(super) fn keep(&mut self, name: &OsStr, file: &File) -> Result<(), Error> {
        fault::call("export_sync", || file.sync_all()).map_err(failed("sync", &self.path(name)))?;
        self.finished.push(name.to_owned());
        Ok(())
    }

    /// Gives all files their names, in the order in which they were finished. When one
    /// cannot get it, those before lose theirs again, unless they replaced another.
    pub(super) fn publish(mut self) -> Result<Vec<PathBuf>, Error> {
        let mut done = Vec::with_capacity(self.finished.len());
        let published = self.rename_all(&mut done);
        if let Err(error) = published {
            for path in done.iter().filter(|_| !self.overwrite) {
                // The first error says what is the matter.
                let _ = fs::remove_file(path);
            }
            return Err(error);
        }
        Ok(done)
    }

    fn rename_all(&mut self, done: &mut Vec<PathBuf>) -> Result<(), Error> {
        let finished = std::mem::take(&mut self.finished);
        let sync = || File::open(&self.dir).and_then(|dir| dir.sync_all());
        let sync = || fault::call("export_sync_dir", sync).map_err(failed("sync", &self.dir));
        // The index comes last. No index may ever cover shards of two exports.
        let index = finished.last().filter(|_| finished.len() > 1).cloned();
        if let (Some(index), true) = (&index, self.overwrite) {
            let old = self.path(index);
            match fault::call("export_remove", || fs::remove_file(&old)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &old)(error));
                }
                _ => sync()?,
            }
        }
        for name in finished {
            if index.as_ref() == Some(&name) {
                sync()?;
            }
            let (from, to) = (self.hidden.join(&name), self.path(&name));
            fault::call("export_rename", || rename(&from, &to, self.overwrite)).map_err(
                |error| match error.kind() {
                    io::ErrorKind::AlreadyExists => exists(&to),
                    _ => failed("rename a file to", &to)(error),
                },
            )?;
            done.push(to);
        }
        sync()
    }
}

impl Drop for Outputs {
    fn drop(&mut self) {
        // What remains is removed by the next export.
        let _ = fs::remove_dir_all(&self.hidden);
    }
}

fn check_free(path: &Path, overwrite: bool) -> Result<(), Error> {
    match fs::symlink_metadata(path) {
        Ok(found) if found.is_dir() => {
            let why = format!("{} is a folder: name a file", path.display());
            Err(Error::Usage(why))
        }
        Ok(_) if !overwrite => Err(exists(path)),
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(error) => Err(failed("stat", path)(error)),
    }
}

fn exists(path: &Path) -> Error {
    let name = path.display().to_string();
    let why = "it is replaced only where that is asked for";
    StoreError::Exists { name, why }.into()
}

fn rename(from: &Path, to: &Path, overwrite: bool) -> io::Result<()> {
    if overwrite {
        return fs::rename(from, to);
    }
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // Some file systems cannot do both at once.
        Err(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            if fs::symlink_metadata(to).is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        renamed => Ok(renamed?),
    }
}

/// A hidden folder of a name that nobody else has, and the lock on it.
fn make_hidden(dir: &Path) -> Result<(PathBuf, File), Error> {
    loop {
        let mut random = [0; 8];
        getrandom::fill(&mut random).map_err(|error| Error::Bug(error.to_string()))?;
        let name = format!("{HIDDEN_PREFIX}{:016x}", u64::from_le_bytes(random));
        let hidden = dir.join(name);
        let make = || DirBuilder::new().mode(0o700).create(&hidden);
        match fault::call("export_mkdir", make) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => continue,
            Err(error) => return Err(failed("create", &hidden)(error)),
        }
        let lock = match open_dir(&hidden) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            opened => opened.map_err(failed("open", &hidden))?,
        };
        // Where the file system knows no locks, nobody takes it for left behind.
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            continue;
        }
        // Another export may have removed it before it was locked.
        if is_still(&hidden, &lock) {
            return Ok((hidden, lock));
        }
    }
}

/// Removes what killed exports left in a folder. Whatever stands against it is no
/// reason not to export.
fn remove_stale(dir: &Path) {
    let Ok(found) = fs::read_dir(dir) else { return };
    let names = found.filter_map(|entry| entry.ok().map(|entry| entry.file_name()));
    let hidden = names.filter(|name| {
        name.as_encoded_bytes()
            .starts_with(HIDDEN_PREFIX.as_bytes())
    });
    for name in hidden.take(MAX_STALE_COUNT) {
        let path = dir.join(name);
        let Ok(lock) = open_dir(&path) else { continue };
        if lock.try_lock().is_ok() && is_still(&path, &lock) {
            let _ = fs::remove_dir_all(&path);
        }
    }
}

fn open_dir(path: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::NOFOLLOW;
    let mut options = OpenOptions::new();
    options.read(true).custom_flags(flags.bits() as i32);
    options.open(path)
}

/// Whether a path leads to an open folder.
fn is_still(path: &Path, open: &File) -> bool {
    let (Ok(there), Ok(here)) = (fs::symlink_metadata(path), open.metadata()) else {
        return false;
    };
    (there.dev(), there.ino()) == (here.dev(), here.ino())
}
