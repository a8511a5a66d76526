//! What a receiver asks for when it is the one that dials.

use super::OutFormat;
use crate::plan::{CheckpointName, Digest16};

/// Most globs of each kind.
pub const MAX_GLOBS: usize = 1024;

/// Most globs of what comes first.
pub const MAX_FIRST_GLOBS: usize = 64;

/// Opens a pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PullOpen {
    /// Which checkpoint.
    pub checkpoint: CheckpointName,
    /// Same in every session of a transfer.
    pub transfer_id: Digest16,
    /// Bitmap of codecs the receiver can decode.
    pub codecs: u32,
    /// Globs over tensor names; empty is all.
    pub include: Vec<String>,
    /// Globs over tensor names.
    pub exclude: Vec<String>,
    /// What the receiver writes.
    pub out_format: OutFormat,
    /// Most lanes, the control lane among them.
    pub max_lanes: u32,
    /// Stands for this session when further lanes join; secret.
    pub lane_token: Digest16,
    /// Most payload bytes a second.
    pub rate_bytes_per_second: Option<u64>,
    /// Globs over the names of tensors that are wanted before the others.
    pub first: Vec<String>,
}

/// First frame of any lane of a pull.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PullFirst {
    /// Of lane 0.
    Open(Box<PullOpen>),
    /// Of a further lane: the token of the session.
    Join(Digest16),
}
