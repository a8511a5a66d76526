//! What a source file looked like, so that a later change shows.

use crate::{
    mutant,
    plan::{SourceKey, SourceState},
};
use std::fs::{File, Metadata};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::time::{Duration, SystemTime};
use std::{io, path::Path, thread};

/// A last change at least this long ago counts as settled.
const SETTLED_AGE: Duration = Duration::from_secs(2);
/// Longer than the tick of any file system clock: the kernel stamps files with
/// the time of its last timer interrupt, up to 10 ms old.
const TICK: Duration = Duration::from_millis(50);
/// How often a file that is being written right now is waited for.
const MAX_WAITS: u32 = 20;

/// The part of a file's inode that changes when the file does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Stamp {
    pub(super) dev: u64,
    pub(super) ino: u64,
    pub(super) size: u64,
    mtime: (i64, i64),
    ctime: (i64, i64),
}

impl Stamp {
    pub(super) fn of(metadata: &Metadata) -> Self {
        Stamp {
            dev: metadata.dev(),
            ino: metadata.ino(),
            size: metadata.size(),
            mtime: (metadata.mtime(), metadata.mtime_nsec()),
            ctime: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }

    /// Stamp of an open file that has this metadata now, and whether it is settled.
    ///
    /// Were the stamp taken in the same tick as the last change, a further change
    /// in that tick would leave it as it is and stay unseen; so a stamp is never
    /// younger than a tick.
    pub(super) fn take(file: &File, metadata: &Metadata) -> io::Result<(Self, bool)> {
        let mut stamp = Stamp::of(metadata);
        for _ in 0..MAX_WAITS {
            // A change "in the future" comes from another machine's clock.
            let age = age(stamp.ctime).unwrap_or_default();
            if age >= TICK {
                break;
            }
            thread::sleep(TICK - age);
            let later = Stamp::of(&file.metadata()?);
            let quiet = later == stamp;
            stamp = later;
            if quiet {
                break;
            }
        }
        let is_old = |time| age(time).is_some_and(|age| age >= SETTLED_AGE);
        let settled = is_old(stamp.mtime) && is_old(stamp.ctime);
        Ok((stamp, settled))
    }

    /// Digest of the stamp and of the file's header.
    pub(super) fn fingerprint(&self, header_hash: &blake3::Hash) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        for number in [self.dev, self.ino, self.size] {
            hasher.update(&number.to_le_bytes());
        }
        // The one thing that a program cannot set back.
        let ctime = (!mutant::is("no_ctime")).then_some(self.ctime);
        for (seconds, nanoseconds) in [self.mtime].into_iter().chain(ctime) {
            hasher.update(&seconds.to_le_bytes());
            hasher.update(&nanoseconds.to_le_bytes());
        }
        hasher.update(header_hash.as_bytes());
        *hasher.finalize().as_bytes()
    }

    /// In words, how `now` differs.
    pub(super) fn difference(&self, now: &Stamp) -> String {
        if (self.dev, self.ino) != (now.dev, now.ino) {
            return format!(
                "another file is in its place, inode {} was {}",
                now.ino, self.ino
            );
        }
        if self.size != now.size {
            return format!("it has {} bytes and had {}", now.size, self.size);
        }
        "its content or attributes were written".to_owned()
    }
}

/// The state of the file at a canonical path.
pub(super) fn state(
    canonical: &Path,
    stamp: &Stamp,
    settled: bool,
    header_hash: &blake3::Hash,
) -> SourceState {
    SourceState {
        key: key(canonical),
        fingerprint: stamp.fingerprint(header_hash),
        settled,
    }
}

fn key(canonical: &Path) -> SourceKey {
    let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 source");
    hasher.update(canonical.as_os_str().as_bytes());
    let mut key = SourceKey::default();
    key.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    key
}

/// Time since `time`, or `None` when that is still to come.
fn age((seconds, nanoseconds): (i64, i64)) -> Option<Duration> {
    let nanoseconds = u32::try_from(nanoseconds).ok()?;
    let Ok(seconds) = u64::try_from(seconds) else {
        // Before 1970.
        return Some(Duration::MAX);
    };
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .ok()?;
    now.checked_sub(Duration::new(seconds, nanoseconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new_file() -> (tempfile::NamedTempFile, Stamp, bool) {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), b"abc").unwrap();
        let (stamp, settled) =
            Stamp::take(file.as_file(), &file.as_file().metadata().unwrap()).unwrap();
        (file, stamp, settled)
    }

    #[test]
    fn a_stamp_is_older_than_a_tick_and_new_files_are_not_settled() {
        let (_file, stamp, settled) = new_file();
        assert!(age(stamp.ctime).unwrap() >= TICK);
        assert!(!settled);
    }

    #[test]
    fn every_field_is_part_of_the_fingerprint() {
        let (_file, stamp, _) = new_file();
        let hash = blake3::hash(b"");
        let base = stamp.fingerprint(&hash);
        assert_ne!(base, stamp.fingerprint(&blake3::hash(b"x")));
        let changes: [fn(&mut Stamp); 6] = [
            |s| s.dev += 1,
            |s| s.ino += 1,
            |s| s.size += 1,
            |s| s.mtime.0 += 1,
            |s| s.mtime.1 += 1,
            |s| s.ctime.1 += 1,
        ];
        for change in changes {
            let mut other = stamp.clone();
            change(&mut other);
            assert_ne!(base, other.fingerprint(&hash));
        }
    }

    #[test]
    fn times_from_other_clocks_do_no_harm() {
        assert_eq!(age((-1, 0)), Some(Duration::MAX));
        assert_eq!(age((i64::MAX, 0)), None);
        assert_eq!(age((0, -1)), None);
    }
}
