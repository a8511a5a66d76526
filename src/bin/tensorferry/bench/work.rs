//! The folder that everything is done in, and how much fits into it.

use super::machine::available_memory_bytes;
use crate::units;
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use tensorferry::{Error, protocol::Durability, protocol::Reason};

/// What is moved where there is room and time, by default.
const BYTES_MAX: u64 = 1 << 30;
/// Less says nothing.
const BYTES_MIN: u64 = 8 << 20;
/// A default is a multiple of this.
const BYTES_STEP: u64 = 64 << 20;
/// What the processes themselves take.
const MEMORY_RESERVE: u64 = 512 << 20;
/// The receiver keeps this share of a file system free, and at most so many bytes.
const SPACE_SHIFT: u32 = 6;
const SPACE_RESERVE_MAX: u64 = 1 << 30;
/// How long a bench without wishes should take, in seconds.
const SECONDS: f64 = 60.0;

/// A new folder inside the one that is measured; dropping it removes it.
#[derive(Debug)]
pub(super) struct Work {
    path: PathBuf,
}

impl Work {
    pub(super) fn make(parent: &Path) -> io::Result<Work> {
        let mut number = 0;
        loop {
            let name = format!("tensorferry-bench-{}-{number}", std::process::id());
            let path = parent.join(name);
            match fs::create_dir(&path) {
                Ok(()) => return Ok(Work { path }),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && number < 100 => number += 1,
                Err(e) => return Err(e),
            }
        }
    }

    /// Where a made-up checkpoint is.
    pub(super) fn source(&self) -> PathBuf {
        self.path.join("source.safetensors")
    }

    /// What the servers of one run after the other receive into.
    pub(super) fn root(&self) -> PathBuf {
        self.path.join("received")
    }

    /// What a server complains of.
    pub(super) fn log(&self) -> PathBuf {
        self.path.join("server.log")
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        // Nothing better can be done with a failure; the name says whose it is.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Bytes that can be moved at most: they lie in the folder twice, unless the source is
/// elsewhere, and in memory where the folder does.
pub(super) fn fitting_bytes(
    dir: &Path,
    durability: Durability,
    makes_source: bool,
) -> io::Result<u64> {
    let stat = rustix::fs::statvfs(dir)?;
    let reserve =
        (stat.f_blocks.saturating_mul(stat.f_frsize) >> SPACE_SHIFT).min(SPACE_RESERVE_MAX);
    let mut free = stat.f_bavail.saturating_mul(stat.f_frsize);
    free = free.saturating_sub(reserve);
    if durability == Durability::Process {
        free = free.min(available_memory_bytes().saturating_sub(MEMORY_RESERVE));
    }
    // A little for headers, journals and blocks that are not full.
    let free = free - free / 32;
    Ok(if makes_source { free / 2 } else { free })
}

/// What is wished, if it fits.
pub(super) fn check_bytes(wished: u64, fitting: u64, dir: &Path) -> Result<u64, Error> {
    if wished <= fitting {
        return Ok(wished);
    }
    Err(Error::Store {
        reason: Reason::DiskQuota,
        message: format!(
            "{} cannot be moved in {}: {} would fit",
            units::bytes(wished),
            dir.display(),
            units::bytes(fitting)
        ),
        source: None,
    })
}

/// How many bytes take about a minute, where nobody said how many: `total_moves` is how
/// often they are moved in all, and one move was seen to run at this rate.
pub(super) fn default_bytes(fitting: u64, bytes_per_second: f64, total_moves: u64) -> u64 {
    let in_time = (bytes_per_second * SECONDS / total_moves.max(1) as f64) as u64;
    let wished = in_time.min(BYTES_MAX);
    (wished / BYTES_STEP * BYTES_STEP)
        .clamp(BYTES_STEP, BYTES_MAX)
        .min(fitting)
        .max(BYTES_MIN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_new_and_gone_afterwards() {
        let temp = tempfile::tempdir().unwrap();
        let (first, second) = (Work::make(temp.path()), Work::make(temp.path()));
        fs::write(first.as_ref().unwrap().source(), [1]).unwrap();
        assert_ne!(first.unwrap().path, second.unwrap().path);
        assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn sizes_fit_the_place_and_the_time() {
        let gib = f64::from(1 << 30);
        assert_eq!(default_bytes(u64::MAX, 3.0 * gib, 75), BYTES_MAX);
        assert_eq!(default_bytes(u64::MAX, 0.1 * gib, 75), BYTES_STEP);
        assert_eq!(default_bytes(100 << 20, 3.0 * gib, 75), 100 << 20);
        assert!(check_bytes(10, 9, Path::new("x")).is_err());
        assert_eq!(check_bytes(9, 9, Path::new("x")).unwrap(), 9);
        let temp = tempfile::tempdir().unwrap();
        let fitting = |makes| fitting_bytes(temp.path(), Durability::Disk, makes).unwrap();
        assert!(fitting(true) <= fitting(false));
    }
}
