//! What the two roles say to each other, without protobuf.

use super::{Reason, ReceiverStages};
use crate::plan::{CheckpointName, Digest16, EntryHeader, RangeSet, SourceState};
use std::collections::BTreeMap;

/// How often written bytes become durable.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum CommitMode {
    /// Every 8 MiB.
    Strict,
    /// At 128 MiB, 500 ms or 512 files.
    #[default]
    Group,
    /// Once before publishing, and when a session ends.
    End,
    /// Never synced.
    None,
}

/// What `durable` means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Durability {
    /// Survives loss of power.
    Disk,
    /// Survives the death of either process.
    Process,
}

impl Durability {
    /// `disk` or `process`.
    pub fn as_str(self) -> &'static str {
        match self {
            Durability::Disk => "disk",
            Durability::Process => "process",
        }
    }
}

/// File names on the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Layout {
    /// Safe form of the tensor's name.
    #[default]
    Named,
    /// `weight_<index>.npy`.
    Indexed,
}

/// Container on the receiver.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OutFormat {
    /// A folder of `.npy` files.
    #[default]
    Npy,
    /// One `.safetensors` file for all tensors.
    Safetensors,
}

/// The file of [`OutFormat::Safetensors`].
pub const CONTAINER_FILE: &str = "model.safetensors";

/// How `.npy` files name element types that numpy has no name for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum NpyDtype {
    /// As so many bytes (`<V2`, `|V1`), which any numpy opens.
    #[default]
    Bytes,
    /// By the names of `ml_dtypes` (`bfloat16`), which must be imported to open them.
    Named,
}

/// What the sender knows of its manifest when it opens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ManifestPromise {
    /// All of it.
    Complete {
        /// Sum of all entry lengths.
        total_bytes: u64,
        /// Number of entries.
        entry_count: u64,
        /// [`crate::plan::digest_entries`] of them.
        entries_digest: Digest16,
    },
    /// Entries are still being produced.
    Open,
}

/// Opens a session.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Open {
    /// Where to.
    pub checkpoint: CheckpointName,
    /// Same in every session of a transfer.
    pub transfer_id: Digest16,
    /// Complete or open.
    pub manifest: ManifestPromise,
    /// Over all sources and headers; `None` when a source is not settled.
    pub fingerprint: Option<Digest16>,
    /// Bitmap of codecs the sender can encode.
    pub codecs: u32,
    /// Wished chunk length in bytes.
    pub chunk_len: Option<u32>,
    /// How often to commit.
    pub commit_mode: CommitMode,
    /// File names.
    pub layout: Layout,
    /// Container.
    pub out_format: OutFormat,
    /// Bytes in front of the tensors of a container; 0 where each has a file of its own.
    pub container_header_len: u64,
    /// Element types in `.npy` headers.
    pub npy_dtype: NpyDtype,
    /// Replace a published checkpoint.
    pub overwrite: bool,
    /// Throw away staging first.
    pub restart: bool,
    /// Re-read everything before publishing.
    pub verify: bool,
    /// Goes into the manifest.
    pub metadata: BTreeMap<String, String>,
    /// Goes into the manifest.
    pub source_format: String,
}

/// The receiver's terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Accept {
    /// Cell length in bytes.
    pub chunk_len: u32,
    /// Codecs that may be used.
    pub codecs: u32,
    /// Meaning of durable.
    pub durability: Durability,
    /// Most raw bytes sent and not yet acked.
    pub window_bytes: u64,
    /// Names the session.
    pub session_token: Digest16,
    /// Number of this session of the transfer.
    pub epoch: u64,
    /// Most lanes.
    pub max_lanes: u32,
    /// Raw bytes durable at the start.
    pub durable_bytes: u64,
}

/// Adds a lane.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Join {
    /// From [`Accept::session_token`].
    pub session_token: Vec<u8>,
    /// Lane number.
    pub lane: u32,
}

/// An entry and what belongs to it beside its identity.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Identity.
    pub header: EntryHeader,
    /// Session numbers of its sources.
    pub sources: Vec<u32>,
    /// Key in the source when it differs.
    pub source_name: Option<String>,
    /// Further names.
    pub aliases: Vec<String>,
    /// The format's own checksum.
    pub crc32c: Option<u32>,
    /// The format's trainable flag.
    pub trainable: Option<bool>,
    /// Wanted before the others: made durable as soon as it is complete.
    pub is_first: bool,
}

/// Head of one chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHead {
    /// Session number of the entry.
    pub entry: u32,
    /// First byte of the cell.
    pub offset: u64,
    /// Raw length in bytes.
    pub raw_len: u32,
    /// Length in the payload in bytes.
    pub encoded_len: u32,
    /// Codec id as sent.
    pub codec: u32,
    /// CRC-32C of the raw bytes.
    pub crc32c: u32,
}

/// Announcements and chunks of one frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// Number of the first source below.
    pub first_source: u32,
    /// Sources, numbered consecutively.
    pub sources: Vec<SourceState>,
    /// Number of the first entry below.
    pub first_entry: u32,
    /// Entries, numbered consecutively.
    pub entries: Vec<Announcement>,
    /// Chunks whose bytes are in the payload, in order.
    pub chunks: Vec<ChunkHead>,
}

/// Digests of held cells.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Compare {
    /// Session number of the entry.
    pub entry: u32,
    /// First cell.
    pub first_cell: u64,
    /// BLAKE3 of each consecutive cell.
    pub hashes: Vec<[u8; 32]>,
}

/// Asks for publication.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finish {
    /// Entries announced.
    pub entry_count: u64,
    /// Sum of their lengths.
    pub total_bytes: u64,
    /// Digest of their headers.
    pub entries_digest: Digest16,
    /// As in [`Open::fingerprint`].
    pub fingerprint: Option<Digest16>,
}

/// One side gives up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Abort {
    /// Known reason, or `None` for a word from a newer version.
    pub reason: Option<Reason>,
    /// For a person.
    pub message: String,
}

/// Everything a sender can say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SenderFrame {
    /// First of lane 0.
    Open(Box<Open>),
    /// First of another lane.
    Join(Join),
    /// Announcements and chunks.
    Batch(Batch),
    /// Digests of held cells.
    Compare(Compare),
    /// Publish.
    Finish(Finish),
    /// Give up.
    Abort(Abort),
}

/// Cells to send or compare.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wanted {
    /// Session number of the entry.
    pub entry: u32,
    /// Cells to send.
    pub wanted: RangeSet,
    /// Cells to compare.
    pub held: RangeSet,
    /// The answer is complete.
    pub last: bool,
}

/// A refused chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reject {
    /// Session number of the entry.
    pub entry: u32,
    /// First byte of the cell.
    pub offset: u64,
    /// What the head said.
    pub expected_crc32c: u32,
    /// What arrived.
    pub found_crc32c: u32,
}

/// Cells that are durable now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Durable {
    /// Session number of the entry.
    pub entry: u32,
    /// Cells.
    pub ranges: RangeSet,
}

/// Compared cells that are equal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keep {
    /// Session number of the entry.
    pub entry: u32,
    /// Cells.
    pub ranges: RangeSet,
}

/// Published.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Done {
    /// It had been published before.
    pub unchanged: bool,
    /// Entries published.
    pub entry_count: u64,
    /// Raw bytes published.
    pub total_bytes: u64,
    /// BLAKE3 of the manifest.
    pub manifest_blake3: [u8; 32],
    /// What that is worth.
    pub durability: Durability,
    /// How the receiver's stages spent the session; `None` from one that does not say.
    pub stages: Option<ReceiverStages>,
}

/// Control part of a receiver's frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReceiverControl {
    /// Terms.
    Accept(Accept),
    /// Published.
    Done(Done),
    /// Give up.
    Abort(Abort),
}

/// Everything a receiver can say in one frame.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ReceiverFrame {
    /// At most one of these.
    pub control: Option<ReceiverControl>,
    /// Answers to announcements.
    pub wanted: Vec<Wanted>,
    /// Refused chunks, before the ack that counts them.
    pub rejects: Vec<Reject>,
    /// Settled chunks of this lane.
    pub ack: Option<u64>,
    /// Durable cells.
    pub durable: Vec<Durable>,
    /// Equal cells.
    pub keeps: Vec<Keep>,
}

impl ReceiverFrame {
    /// A frame with nothing but this.
    pub fn control(control: ReceiverControl) -> Self {
        ReceiverFrame {
            control: Some(control),
            ..ReceiverFrame::default()
        }
    }

    /// Only what lanes other than the control lane may carry: rejects and an ack.
    pub fn is_of_any_lane(&self) -> bool {
        self.control.is_none()
            && self.wanted.is_empty()
            && self.durable.is_empty()
            && self.keeps.is_empty()
    }

    /// Nothing in it.
    pub fn is_empty(&self) -> bool {
        *self == ReceiverFrame::default()
    }
}
