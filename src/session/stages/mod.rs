//! What each stage of a session does with its time, and which one the transfer waits for.
//!
//! Both sides keep a ledger of piecewise constant counts: workers at each stage, bytes
//! that wait somewhere. Whoever begins or ends a job of about a chunk, or a run of small
//! ones, passes the time since the last change to what was counted then. So a figure
//! is exact, costs one short lock for each job, and nothing for each small cell.
//!
//! **Busy** is the time of all workers of a stage divided by the most that were at it at
//! once: its utilisation. Of a pipeline with queues between its stages the limiting
//! one is the one whose workers never rest: what comes before it is stopped by full
//! queues, what comes after it by empty ones. A stage that shares its threads with others
//! is charged for its own work alone, not for its turn in the queue.
//!
//! Two stages have no workers of ours, and are busy while the transfer waits for them:
//!
//! - *send*, the network: a lane has a frame that the socket has not taken; or nothing
//!   can be begun until acks come, as far as what is in flight is on its way and not still
//!   on the sender. Either can also be the receiver's fault, which only its own figures
//!   tell. So the time in which its lanes were at work or waited for memory is taken off
//!   as blocked; and of the second the part of the bytes on their way that the receiver
//!   held all along.
//! - *sync*, the disk: acks are withheld because too much is not durable, answers wait
//!   for a record, or everything has arrived and only syncs and the publication are
//!   left. A sync beside the writes stops nobody and does not count.

mod meter;
mod receiving;
mod report;
mod sending;
#[cfg(test)]
pub(crate) mod throttle;

pub(super) use receiving::{Held, ReceiveStages};
pub use report::{StageShare, Stages};
pub(super) use sending::{FrameOnLane, LaneLoad, SendStages};
