//! The stages of a session, and what one side may tell the other of its own.

use std::time::Duration;

/// What is done with a chunk on its way from the source to the receiver's disk.
/// Checksum and codec come on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PipelineStage {
    /// The source is read.
    Read,
    /// Checksums, and digests of what is compared.
    Checksum,
    /// Chunks are encoded or decoded.
    Codec,
    /// Chunks are on their way: the connections, and the network behind them.
    Send,
    /// The receiver takes them in.
    Receive,
    /// They are written into their files.
    Place,
    /// They are made durable and published.
    Sync,
}

impl PipelineStage {
    /// The name in one word, in lower case.
    pub const fn as_str(self) -> &'static str {
        match self {
            PipelineStage::Read => "read",
            PipelineStage::Checksum => "checksum",
            PipelineStage::Codec => "codec",
            PipelineStage::Send => "send",
            PipelineStage::Receive => "receive",
            PipelineStage::Place => "place",
            PipelineStage::Sync => "sync",
        }
    }
}

/// One of the two roles of a session.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Has the checkpoint.
    Sender,
    /// Writes it.
    Receiver,
}

impl Side {
    /// `sender` or `receiver`.
    pub const fn as_str(self) -> &'static str {
        match self {
            Side::Sender => "sender",
            Side::Receiver => "receiver",
        }
    }
}

/// How a stage spent a session.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct StageTimes {
    /// At work: the time of all its workers, divided by the most that were at it at once.
    /// So it never exceeds the session, and comes near to it only where no worker rests.
    pub busy: Duration,
    /// Stopped by what comes after it.
    pub blocked: Duration,
}

/// The sender's stages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SenderStages {
    /// Blocked while nothing is read though cells are wanted: there is no room for them.
    pub read: StageTimes,
    /// Never blocked.
    pub checksum: StageTimes,
    /// Never blocked.
    pub codec: StageTimes,
    /// Busy while chunks wait for the network, blocked while they wait for the receiver.
    pub send: StageTimes,
}

/// The receiver's stages, which it tells the sender at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ReceiverStages {
    /// Blocked while a lane waits for memory.
    pub receive: StageTimes,
    /// Never blocked.
    pub checksum: StageTimes,
    /// Never blocked.
    pub codec: StageTimes,
    /// Blocked while so much is written and not durable that acks are withheld.
    pub place: StageTimes,
    /// Busy while the sender waits for the disk; what is synced beside the writes costs
    /// the transfer nothing and does not count.
    pub sync: StageTimes,
    /// Raw bytes that had arrived and were not yet written, on average over the session.
    pub held_bytes: u64,
}
