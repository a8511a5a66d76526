//! One writer per checkpoint name, also across processes.

use super::{
    dir::Dir,
    error::{IoContext, StoreError},
};
use crate::{fault, plan::CheckpointName};
use std::{fs::File, fs::TryLockError, io, os::unix::fs::MetadataExt};

/// The lock of one checkpoint name; dropping it unlocks and removes the file, so
/// that refused names leave nothing behind.
#[derive(Debug)]
pub(crate) struct NameLock {
    // Held for its lock.
    _file: File,
    dir: Dir,
    file_name: String,
    is_removed: bool,
}

impl NameLock {
    /// Takes the lock, or says that another process has it.
    pub(crate) fn take(locks: &Dir, name: &CheckpointName) -> Result<Self, StoreError> {
        NameLock::take_hash(locks, &name.short_hash(), name.as_str())
    }

    /// Takes the lock of the name with this short hash; `shown` stands for it in
    /// messages.
    pub(crate) fn take_hash(locks: &Dir, hash: &str, shown: &str) -> Result<Self, StoreError> {
        let file_name = format!("{hash}.lock");
        loop {
            let file = locks.open_or_create(&file_name)?;
            let locked: io::Result<bool> = fault::call("flock", || match file.try_lock() {
                Ok(()) => Ok(true),
                Err(TryLockError::WouldBlock) => Ok(false),
                Err(TryLockError::Error(e)) => Err(e),
            });
            if !locked.context("lock", locks.shown(&file_name))? {
                return Err(StoreError::Locked {
                    name: shown.to_owned(),
                    why: "another process works on it",
                });
            }
            // The file may have been unlinked between opening and locking; then
            // the lock is worth nothing and the next round makes a new file.
            let held = fault::call("fstat", || file.metadata())
                .context("stat", locks.shown(&file_name))?
                .ino();
            if locks.inode(&file_name)? == Some(held) {
                return Ok(NameLock {
                    _file: file,
                    dir: locks.clone(),
                    file_name,
                    is_removed: false,
                });
            }
        }
    }

    /// Unlocks and removes the lock file.
    pub(crate) fn remove(mut self) -> Result<(), StoreError> {
        // Once only: a file made by the next holder must not be unlinked.
        self.is_removed = true;
        self.dir.remove_file(&self.file_name)
    }
}

impl Drop for NameLock {
    fn drop(&mut self) {
        // Still locked here: whoever waits finds the unlinked file worthless.
        if !self.is_removed {
            let _ = self.dir.remove_file(&self.file_name);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_locked_once() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open_root(temp.path()).unwrap();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let first = NameLock::take(&dir, &a).unwrap();
        assert!(matches!(
            NameLock::take(&dir, &a),
            Err(StoreError::Locked { .. })
        ));
        let other = NameLock::take(&dir, &b).unwrap();
        first.remove().unwrap();
        drop(NameLock::take(&dir, &a).unwrap());
        drop(NameLock::take(&dir, &a).unwrap());
        other.remove().unwrap();
    }
}
