//! What a receiver is told and what it asks for.

use crate::{
    plan::{Digest16, Grid, SourceKey, SourceState},
    protocol::{
        Announcement, Layout, ManifestPromise, ReceiverFrame,
        slot::{RecoveredEntry, SlotFile, Ticket},
    },
};
use std::{collections::HashMap, sync::Arc, time::Duration};

/// When a group of writes is committed.
#[derive(Clone, Copy, Debug)]
pub struct CommitPolicy {
    /// At this many bytes.
    pub bytes: u64,
    /// At this many files.
    pub files: usize,
    /// At this age of the oldest write; `None` = only at the end.
    pub interval: Option<Duration>,
    /// The wire waits while more is written than durable.
    pub max_undurable_bytes: u64,
}

/// Terms of one session.
#[derive(Clone, Copy, Debug)]
pub struct ReceiverConfig {
    /// The transfer's grid.
    pub grid: Grid,
    /// Bitmap of codecs accepted.
    pub codecs: u32,
    /// Most lanes at a time, the control lane among them.
    pub max_lanes: u32,
    /// When to commit.
    pub commit: CommitPolicy,
    /// File names.
    pub layout: Layout,
    /// Bytes in front of the tensors in the file that they share, where they share one.
    pub container_header_len: Option<u64>,
    /// What the sender promised at Open.
    pub manifest: ManifestPromise,
    /// From [`crate::protocol::Open::fingerprint`].
    pub fingerprint: Option<Digest16>,
}

/// What the journal of a transfer says when a session begins.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// Entries with their files.
    pub entries: Vec<RecoveredEntry>,
    /// Last recorded state of each source.
    pub sources: HashMap<SourceKey, SourceState>,
    /// First entry number that was never used.
    pub next_number: u32,
}

/// What became of a chunk head.
#[derive(Debug)]
pub enum Arrival {
    /// Verify it, then ask for a placement.
    Take(Ticket),
    /// The cell is already here: drop the bytes.
    Duplicate,
}

/// Cells of one entry in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupCells {
    /// Receiver's number of the entry.
    pub number: u32,
    /// First cell.
    pub first: u64,
    /// CRC-32C of each cell.
    pub crcs: Vec<u32>,
}

/// Work for the committer: sync the files, then append the records in the order
/// of the fields, then sync the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Number of the group in the session.
    pub id: u64,
    /// Files to sync; `false` = no record cites the file yet, so it may have to be
    /// made and its name is to be synced too.
    pub files: Vec<(Arc<SlotFile>, bool)>,
    /// Entries whose file is given up.
    pub forget: Vec<u32>,
    /// Source states.
    pub sources: Vec<SourceState>,
    /// Entries that get their record now.
    pub entries: Vec<Arc<SlotFile>>,
    /// Cells written.
    pub cells: Vec<GroupCells>,
    /// Held cells that proved equal.
    pub kept: Vec<GroupCells>,
}

/// A held cell to be read and compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareJob {
    /// The file of the entry.
    pub slot: Arc<SlotFile>,
    /// Cell.
    pub cell: u64,
    /// First byte of the cell.
    pub offset: u64,
    /// Length in bytes.
    pub raw_len: u32,
    /// BLAKE3 of the sender's bytes.
    pub blake3: [u8; 32],
}

/// What to publish.
#[derive(Clone, Debug)]
pub struct PublishPlan {
    /// Announced entries in order, each with CRC-32C of its bytes.
    pub entries: Vec<(Arc<SlotFile>, Announcement, u32)>,
    /// Fingerprint of the source.
    pub fingerprint: Option<Digest16>,
    /// Digest of the entry headers.
    pub entries_digest: Digest16,
}

/// Work that the receiver asks for.
#[derive(Debug)]
pub enum ReceiveAction {
    /// Send a frame on lane 0.
    Send(ReceiverFrame),
    /// Make a group durable, then call [`super::Receiver::committed`].
    Commit(Group),
    /// Compare a cell, then call [`super::Receiver::compared`].
    Compare(CompareJob),
    /// Publish; the session ends with Done.
    Publish(Box<PublishPlan>),
}

/// Whether the sender has to wait for the receiver's disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskWait {
    /// It has not.
    #[default]
    Nothing,
    /// Acks are withheld until less is written and not durable.
    Acks,
    /// Answers need a record first, or the end of the session needs syncs.
    Syncs,
}
