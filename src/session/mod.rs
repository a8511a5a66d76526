//! Floor 5: the loops around the two roles. Frames come from and go to a
//! connection, bytes from and to files; checksums run on rayon workers, file I/O
//! on a small pool of I/O threads, and no task that serves the network ever waits
//! for a disk.

mod buffers;
mod error;
mod offer;
mod pace;
mod progress;
mod rate;
mod receive;
mod registry;
mod rehearsal;
mod relay;
mod send;
#[cfg(test)]
mod simulation;
mod stages;
mod task;
mod workers;

pub(crate) use buffers::Budget;
pub(crate) use error::{SendError, SessionError};
pub(crate) use offer::{Export, MAX_PULLS, MAX_SNAPSHOTS, OfferContext, OfferedLanes, offer};
pub(crate) use pace::PaceLimits;
pub(crate) use progress::ProgressCell;
pub use progress::{Progress, Stage};
pub(crate) use rate::{Throttle, read_rate};
pub(crate) use receive::{ReceiveContext, ReceiveOptions, Terms, receive};
pub(crate) use registry::Registry;
pub(crate) use rehearsal::{REHEARSAL_FORMAT, Rehearsal};
pub(crate) use relay::{Account, RelayEnd, RelayError, SenderFrames, farewell, relay};
pub(crate) use send::{Connect, SendContext, SendLane, cancelled, send, status_error};
#[cfg(test)]
pub(crate) use stages::throttle;
pub use stages::{StageShare, Stages};
pub(crate) use task::Task;
