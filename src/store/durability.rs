//! What a sync on this file system is worth.

use super::{
    dir::Dir,
    error::{IoContext, StoreError},
};
use crate::{fault, protocol::Durability};
use std::os::fd::AsFd;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

/// DISK where the file system has a disk that syncs reach, PROCESS elsewhere.
pub(crate) fn of_folder(dir: &Dir) -> Result<Durability, StoreError> {
    let stat = fault::call("fstatfs", || rustix::fs::fstatfs(dir.as_fd()))
        .context("stat the file system of", dir.shown(""))?;
    Ok(of_kind(stat.f_type as u64))
}

/// Whether files are nothing but memory there: allocating their blocks ahead then only
/// means to find every page twice.
pub(crate) fn is_memory(dir: &Dir) -> Result<bool, StoreError> {
    let stat = fault::call("fstatfs", || rustix::fs::fstatfs(dir.as_fd()))
        .context("stat the file system of", dir.shown(""))?;
    Ok(stat.f_type as u64 == TMPFS_MAGIC)
}

/// The same of a folder by its path.
pub(crate) fn of_path(folder: &std::path::Path) -> std::io::Result<Durability> {
    let dir = std::fs::File::open(folder)?;
    let stat = rustix::fs::fstatfs(&dir)?;
    Ok(of_kind(stat.f_type as u64))
}

fn of_kind(magic: u64) -> Durability {
    match magic {
        TMPFS_MAGIC | RAMFS_MAGIC | HUGETLBFS_MAGIC => Durability::Process,
        // A volatile overlay ignores every sync.
        OVERLAYFS_MAGIC if overlay_is_volatile() => Durability::Process,
        _ => Durability::Disk,
    }
}

/// Whether any overlay of this process's mounts is volatile: rare enough that
/// telling which one is not worth the parsing.
fn overlay_is_volatile() -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    mounts.lines().any(|line| {
        line.split_once(" - overlay ")
            .is_some_and(|(_, options)| options.split([',', ' ']).any(|o| o == "volatile"))
    })
}
