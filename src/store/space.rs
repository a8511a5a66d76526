//! Room on the receiver's file system, shared by all transfers of a process.

use super::{
    dir::Dir,
    error::{IoContext, StoreError},
};
use crate::fault;
use std::{
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
};

/// Share of the file system that is never promised away: 1/64.
const RESERVE_SHIFT: u32 = 6;
/// The reserve is at most this many bytes.
const RESERVE_MAX_BYTES: u64 = 1 << 30;

/// Bytes promised to transfers that are not yet on disk.
#[derive(Clone, Debug, Default)]
pub(crate) struct Space {
    promised_bytes: Arc<Mutex<u64>>,
}

/// A promise; dropping it gives the bytes back.
#[derive(Debug)]
pub(crate) struct Reservation {
    space: Space,
    bytes: u64,
}

impl Space {
    /// Promises `bytes` that will be written beneath `dir`, or says how much is
    /// free.
    pub(crate) fn reserve(&self, dir: &Dir, bytes: u64) -> Result<Reservation, StoreError> {
        let stat = fault::call("fstatvfs", || rustix::fs::fstatvfs(dir.as_fd()))
            .context("ask for free space of", dir.shown(""))?;
        // A file system without blocks (ramfs) says nothing about its room.
        let free = match stat.f_blocks {
            0 => u64::MAX,
            _ => stat.f_bavail.saturating_mul(stat.f_frsize),
        };
        let reserve =
            (stat.f_blocks.saturating_mul(stat.f_frsize) >> RESERVE_SHIFT).min(RESERVE_MAX_BYTES);
        let mut promised = self
            .promised_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let available = free.saturating_sub(reserve).saturating_sub(*promised);
        if bytes > available {
            return Err(StoreError::Space {
                needed: bytes,
                available,
            });
        }
        *promised += bytes;
        Ok(Reservation {
            space: self.clone(),
            bytes,
        })
    }
}

impl Reservation {
    /// `bytes` of the promise are on disk now.
    pub(crate) fn used(&mut self, bytes: u64) {
        let bytes = bytes.min(self.bytes);
        self.bytes -= bytes;
        let mut promised = self
            .space
            .promised_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *promised -= bytes;
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.used(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn promises_are_counted_and_given_back() {
        let temp = tempfile::tempdir().unwrap();
        let dir = Dir::open_root(temp.path()).unwrap();
        let space = Space::default();
        let refused = space.reserve(&dir, u64::MAX).unwrap_err();
        let StoreError::Space { available, .. } = refused else {
            panic!("{refused}")
        };
        let first = space.reserve(&dir, available / 2).unwrap();
        assert!(space.reserve(&dir, available / 4 * 3).is_err());
        drop(first);
        assert!(space.reserve(&dir, available / 4 * 3).is_ok());
    }
}
