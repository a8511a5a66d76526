//! What a journal can say.

use crate::plan::{
    Digest16, EntryHeader, MAX_ENTRY_SOURCES, Place, PlanError, SourceKey, SourceState,
};

/// Longest file path below `data/`, in bytes.
const MAX_FILE_LEN: usize = 4096;
/// Longest part of such a path: what file systems take.
const MAX_FILE_PART_LEN: usize = 255;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Record {
    /// A session began.
    Session {
        /// Higher than that of the session before.
        epoch: u64,
        /// Random; seeds the chain of all records that follow.
        nonce: [u8; 16],
        /// Who owns the transfer from here on.
        transfer_id: Digest16,
        /// Digest of the entries; `None` while the manifest is open.
        entries_digest: Option<Digest16>,
        /// Another owner took over: all durable cells become held.
        adopted: bool,
        /// What this session records survives the death of the process only.
        unsynced: bool,
    },
    /// What a source looks like from here on.
    Source(SourceState),
    /// An entry has a file whose header is durable.
    Entry(EntryRecord),
    /// Cells that are on disk.
    Cells(Vec<Run>),
    /// Held cells that were compared with the source and are equal.
    Kept(Vec<Run>),
    /// Entries whose file is no longer what was recorded.
    Forget(Vec<u32>),
    /// Everything is on disk; the rename may happen from here on.
    Publish {
        /// BLAKE3 of `data/manifest.json`.
        manifest_blake3: [u8; 32],
        /// A published checkpoint of this name is to be replaced.
        overwrite: bool,
    },
}

/// An entry and its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EntryRecord {
    /// Number in this journal, never used again.
    pub(crate) number: u32,
    /// What identifies its bytes.
    pub(crate) header: EntryHeader,
    /// Path below `data/`.
    pub(crate) file: String,
    /// First byte in a file that it shares with others; `None` where it has its own.
    pub(crate) data_offset: Option<u64>,
    /// Its sources.
    pub(crate) source_keys: Vec<SourceKey>,
}

/// Consecutive cells of one entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Entry number of this journal.
    pub(crate) entry: u32,
    /// First cell.
    pub(crate) first: u64,
    /// CRC-32C of the raw bytes of each cell, in order.
    pub(crate) crcs: Vec<u32>,
}

/// A record that cannot stand in a journal, whatever stands before it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum RecordError {
    /// The body is not the protobuf message of its type.
    #[error("the body does not parse: {0}")]
    Parse(String),
    /// A field of fixed length has another.
    #[error("{what} is {found} bytes, not {expected}")]
    FieldLen {
        /// Which field.
        what: &'static str,
        /// Length in bytes that it must have.
        expected: usize,
        /// Length in bytes that it has.
        found: usize,
    },
    /// The entry header breaks its rules.
    #[error(transparent)]
    Header(#[from] PlanError),
    /// The kind number or the element type is unknown, or they contradict.
    #[error("entry kind {kind} with element type {dtype:?} is not known")]
    Kind {
        /// Kind number.
        kind: i32,
        /// Element type, cut.
        dtype: String,
    },
    /// The file could be outside `data/` or is no file name.
    #[error("file {0:?} is not a relative path of plain parts")]
    File(String),
    /// Not behind the header of a shared file, or beyond the end of all numbers.
    #[error("an entry cannot begin at byte {0} of a shared file")]
    Offset(u64),
    /// Cell numbers beyond 64 bits.
    #[error("cells from {first} of entry {entry} run over the end of all numbers")]
    Run {
        /// Entry number.
        entry: u32,
        /// First cell.
        first: u64,
    },
    /// The body is longer than a record may be.
    #[error("a body of {0} bytes is longer than a record may be")]
    TooLong(usize),
}

impl Run {
    /// The cells, unless their numbers overflow.
    pub(crate) fn cells(&self) -> Result<std::ops::Range<u64>, RecordError> {
        match self.first.checked_add(self.crcs.len() as u64) {
            Some(end) => Ok(self.first..end),
            None => Err(RecordError::Run {
                entry: self.entry,
                first: self.first,
            }),
        }
    }
}

impl EntryRecord {
    /// Where it lies below `data/`.
    pub(crate) fn place(&self) -> Place<'_> {
        Place {
            file: &self.file,
            data_offset: self.data_offset,
            byte_len: self.header.byte_len,
        }
    }

    /// Checks every rule that does not need another record.
    pub(crate) fn check(&self) -> Result<(), RecordError> {
        self.header.check()?;
        check_file(&self.file)?;
        if let Some(offset) = self.data_offset
            && (offset == 0 || offset.checked_add(self.header.byte_len).is_none())
        {
            return Err(RecordError::Offset(offset));
        }
        if self.source_keys.len() > MAX_ENTRY_SOURCES {
            return Err(RecordError::Header(PlanError::TooMany {
                what: "sources of one entry",
                found: self.source_keys.len() as u64,
                limit: MAX_ENTRY_SOURCES as u64,
            }));
        }
        Ok(())
    }
}

/// The journal is read back and its paths are opened, so they are held to the same
/// rules as if a peer had named them.
fn check_file(file: &str) -> Result<(), RecordError> {
    let plain = |part: &str| {
        !part.is_empty() && part != "." && part != ".." && part.len() <= MAX_FILE_PART_LEN
    };
    if file.len() > MAX_FILE_LEN || file.contains(['\\', '\0']) || !file.split('/').all(plain) {
        return Err(RecordError::File(crate::plan::clip(file)));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_cannot_leave_their_folder() {
        let long = "x".repeat(256);
        let deep = ["x"; 3000].join("/");
        for bad in [
            "",
            "/",
            "/etc/passwd",
            "..",
            "../x",
            "a/..",
            "a/../b",
            ".",
            "./a",
            "a//b",
            "a/",
            "a\\b",
            "a\0",
            &long,
            &deep,
        ] {
            assert!(
                matches!(check_file(bad), Err(RecordError::File(_))),
                "{bad:?}"
            );
        }
        for good in [
            "w.npy",
            "files/a/config.json",
            "files/_gitattributes~0a1b2c3d",
            "..x",
        ] {
            assert_eq!(check_file(good), Ok(()));
        }
    }

    #[test]
    fn a_run_ends_within_64_bits() {
        let run = |first, count| Run {
            entry: 0,
            first,
            crcs: vec![0; count],
        };
        assert_eq!(run(5, 2).cells(), Ok(5..7));
        assert_eq!(run(u64::MAX - 1, 1).cells(), Ok(u64::MAX - 1..u64::MAX));
        assert!(run(u64::MAX, 1).cells().is_err());
    }
}
