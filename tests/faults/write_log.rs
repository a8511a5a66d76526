//! What dm-log-writes recorded: every write to a disk in the order in which it became
//! durable, and the disks that a loss of power could have left.
//!
//! The format is that of the kernel's `Documentation/admin-guide/device-mapper/log-writes.rst`:
//! a super block, then for each request a header in a sector of its own and, but for a
//! discard, the bytes. A write is logged when a flush that was asked for after it has ended,
//! one with FUA when it has ended itself.

use crate::dice::Dice;
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

const MAGIC: u64 = 0x006a_7366_7773_6872;
const SECTOR: u64 = 512;
const FLUSH: u64 = 1;
const FUA: u64 = 2;
const DISCARD: u64 = 4;
const MARK: u64 = 8;
/// What a disk writes whole or not at all.
const BLOCK: usize = 4096;

/// One request.
struct Entry {
    offset: u64,
    len: usize,
    flags: u64,
    /// Where its bytes lie in the log.
    data_at: u64,
    mark: String,
}

impl Entry {
    fn is(&self, flag: u64) -> bool {
        self.flags & flag != 0
    }
}

/// A whole log.
pub(crate) struct WriteLog {
    file: File,
    entries: Vec<Entry>,
}

impl WriteLog {
    /// Reads the log up to the mark that is named `end`; `None` while that is not there.
    pub(crate) fn read(path: &Path, end: &str) -> io::Result<Option<WriteLog>> {
        let file = File::open(path)?;
        let mut sector = [0; SECTOR as usize];
        file.read_exact_at(&mut sector, 0)?;
        let word = |sector: &[u8], at: usize| {
            u64::from_le_bytes(sector[at * 8..at * 8 + 8].try_into().expect("eight bytes"))
        };
        if word(&sector, 0) != MAGIC {
            return Ok(None);
        }
        let count = word(&sector, 2);
        let sector_len = u64::from(u32::from_le_bytes(
            sector[24..28].try_into().expect("four bytes"),
        ));
        if sector_len != SECTOR {
            return Err(io::Error::other(format!("sectors of {sector_len} bytes")));
        }
        let (mut at, mut entries) = (SECTOR, Vec::new());
        for _ in 0..count {
            file.read_exact_at(&mut sector, at)?;
            let (flags, mark_len) = (word(&sector, 2), word(&sector, 3) as usize);
            let len = word(&sector, 1) * SECTOR;
            let mark = sector.get(32..32 + mark_len).unwrap_or_default();
            let mark = String::from_utf8_lossy(mark)
                .trim_end_matches('\0')
                .to_owned();
            let is_end = flags & MARK != 0 && mark == end;
            entries.push(Entry {
                offset: word(&sector, 0) * SECTOR,
                len: len as usize,
                flags,
                data_at: at + SECTOR,
                mark,
            });
            if is_end {
                return Ok(Some(WriteLog { file, entries }));
            }
            at += SECTOR + if flags & DISCARD != 0 { 0 } else { len };
        }
        Ok(None)
    }

    /// Requests between the first mark and the end.
    pub(crate) fn cuts(&self) -> std::ops::Range<usize> {
        let first = self.entries.iter().position(|e| e.is(MARK));
        first.unwrap_or(self.entries.len())..self.entries.len()
    }

    /// The last mark that stands before a cut after entry `at`, as a number.
    pub(crate) fn mark_before(&self, at: usize) -> Option<u64> {
        let marks = self.entries[..=at].iter().rev().filter(|e| e.is(MARK));
        marks.filter_map(|e| e.mark.parse().ok()).next()
    }

    /// Flushes and writes with FUA among [`WriteLog::cuts`].
    pub(crate) fn barriers(&self) -> Vec<usize> {
        let is_barrier = |i: &usize| self.entries[*i].is(FLUSH) || self.entries[*i].is(FUA);
        self.cuts().filter(is_barrier).collect()
    }

    fn apply(&self, disk: &File, entry: &Entry, keeps: &mut dyn FnMut() -> bool) -> io::Result<()> {
        let mut bytes = vec![0; entry.len];
        if !entry.is(DISCARD) {
            self.file.read_exact_at(&mut bytes, entry.data_at)?;
        }
        for (i, block) in bytes.chunks(BLOCK).enumerate() {
            if keeps() {
                disk.write_all_at(block, entry.offset + (i * BLOCK) as u64)?;
            }
        }
        Ok(())
    }
}

/// A disk that follows the log from flush to flush.
pub(crate) struct Replay<'a> {
    log: &'a WriteLog,
    disk: &'a File,
    /// Entries before this one are on the disk.
    next: usize,
    /// A write that asked for a flush before it, and not for one behind it, is not durable.
    held: Option<usize>,
}

impl<'a> Replay<'a> {
    /// `disk` is as it was when the log began.
    pub(crate) fn new(log: &'a WriteLog, disk: &'a File) -> Self {
        Replay {
            log,
            disk,
            next: 0,
            held: None,
        }
    }

    /// Brings the disk to the last flush that had ended at entry `at`.
    pub(crate) fn advance(&mut self, at: usize) -> io::Result<()> {
        let entries = &self.log.entries;
        let flush = (self.next..=at).rev().find(|&i| entries[i].is(FLUSH));
        let Some(flush) = flush else { return Ok(()) };
        let last = entries[flush].is(FUA).then_some(flush);
        for i in self.held.into_iter().chain(self.next..flush).chain(last) {
            self.log.apply(self.disk, &entries[i], &mut || true)?;
        }
        self.held = last.is_none().then_some(flush);
        self.next = flush + 1;
        Ok(())
    }

    /// Adds to a copy of the disk what may have reached it when the power was cut after
    /// entry `at`: any blocks of the writes since the flush, and what had FUA for certain.
    pub(crate) fn cut(&self, copy: &File, at: usize, dice: &mut Dice) -> io::Result<u64> {
        let entries = &self.log.entries;
        let later = entries[self.next..].iter().position(|e| e.is(FLUSH));
        let end = later.map_or(entries.len(), |n| self.next + n);
        // Nothing, everything and all between.
        let share = [0, 100, dice.below(101), dice.below(101)][dice.below(4) as usize];
        let mut blocks = 0;
        for i in self.held.into_iter().chain(self.next..end) {
            let is_certain = entries[i].is(FUA) && i <= at;
            let mut keeps = || {
                let kept = is_certain || dice.chance(share);
                blocks += u64::from(kept);
                kept
            };
            self.log.apply(copy, &entries[i], &mut keeps)?;
        }
        Ok(blocks)
    }
}
