//! Floor 2: the two roles of a session as state machines.
//!
//! Neither knows a socket, a file or a clock: frames and results of work go in
//! (`handle_*`, `arrive`, `written`, …), work to do comes out of `poll`. Time is
//! an argument. The same code runs in a real session and, two roles in one
//! thread, over a simulated link and disk (`simulation`).
//!
//! On the receiver a cell of an announced entry is in exactly one of these
//! states:
//!
//! ```text
//!             Source changed                  Compare: equal
//!   durable ----------------> held ---------------------------> keeping --+
//!      ^                       |  Compare: different / new chunk          |
//!      |                       v                                          |
//!      |                    missing --grant--> placing --written--> written
//!      |                                                              |   |
//!      +------------------- committing <-------- commit of a group ---+---+
//! ```
//!
//! A [`Placement`] is minted only on the way from missing (or held) to placing,
//! is not `Clone` and is consumed by the write: whoever holds it is the only
//! writer of that cell.

mod error;
mod frame;
mod lane;
mod pull_open;
mod receiver;
mod sender;
mod slot;
mod stage;

pub use error::{ProtocolError, Reason};
pub use frame::{
    Abort, Accept, Announcement, Batch, CONTAINER_FILE, ChunkHead, CommitMode, Compare, Done,
    Durability, Durable, Finish, Join, Keep, Layout, ManifestPromise, NpyDtype, Open, OutFormat,
    ReceiverControl, ReceiverFrame, Reject, SenderFrame, Wanted,
};
pub use pull_open::{MAX_FIRST_GLOBS, MAX_GLOBS, PullFirst, PullOpen};
pub use receiver::{
    Arrival, CommitPolicy, CompareJob, DiskWait, Group, GroupCells, PublishPlan, ReceiveAction,
    Receiver, ReceiverConfig, Recovered,
};
pub(crate) use sender::MAX_IN_FLIGHT_CELLS;
pub use sender::{SendAction, SendProgress, Sender, SenderConfig};
pub use slot::{Placement, RecoveredEntry, SlotFile, Ticket, Written};
pub use stage::{PipelineStage, ReceiverStages, SenderStages, Side, StageTimes};

/// Version of the wire protocol that this code speaks.
pub const PROTOCOL_VERSION: u32 = 1;

/// Most bytes of a frame beyond its payload.
pub const MAX_HEAD_BYTES: usize = 64 << 10;

/// Most bytes of a frame without payload (announcements, answers).
pub const MAX_CONTROL_BYTES: usize = (1 << 20) + MAX_HEAD_BYTES;

/// Most cells in one Compare.
pub const MAX_COMPARE_CELLS: u64 = 1024;

/// Most cells that may be under comparison at once.
pub const MAX_COMPARING_CELLS: u64 = 4096;
