//! The journal of a transfer: an append-only file of what is already on disk.
//!
//! Nothing in memory survives a crash, so everything that resume may trust stands
//! here, and it stands here only after the bytes it speaks of were synced. The
//! text for people is `docs/journal.md`; all integers are little-endian.
//!
//! File header, written once:
//!
//! | offset | length | field                                        |
//! |-------:|-------:|----------------------------------------------|
//! |      0 |      8 | magic `TFERRYJ\0`                            |
//! |      8 |      4 | version, 1                                   |
//! |     12 |      4 | `body_len`, at most 64 KiB                   |
//! |     16 |      n | body, protobuf `journal.v1.Header`           |
//! | 16 + n |      4 | CRC-32C of everything before                 |
//!
//! Record, any number of them:
//!
//! | offset | length | field                                        |
//! |-------:|-------:|----------------------------------------------|
//! |      0 |      4 | `body_len`, at most 1 MiB                    |
//! |      4 |      1 | type, 1 to 7                                 |
//! |      5 |      3 | zero                                         |
//! |      8 |      n | body, protobuf                               |
//! |  8 + n |      4 | CRC-32C of nonce ‖ CRC before ‖ all of above |
//!
//! The CRC before is that of the record before, or of the header. The nonce is that
//! of the latest SESSION record before this one, or zeros. So each record vouches
//! for all records in front of it, and a stale tail of a former session never fits
//! behind a new one. Replay stops at the first record that is not in order;
//! everything behind it does not exist. Torn tails are normal.
//!
//! Who does what: [`header`] and [`chain`] turn records into bytes and back without
//! I/O, [`body`] is the protobuf inside, [`state`] holds the rules and is what a
//! journal means, [`replay()`] reads, [`writer`] writes.

mod body;
mod chain;
mod header;
mod record;
mod replay;
mod state;
mod writer;

#[cfg(test)]
mod script;
#[cfg(test)]
mod torture;

#[cfg(any(test, feature = "__internals"))]
pub(crate) use chain::{Chain, Step};
pub(crate) use header::JournalHeader;
pub(crate) use record::{EntryRecord, Record, Run};
pub(crate) use replay::{JournalError, Replay, replay};
pub(crate) use state::{EntryState, State};
pub(crate) use writer::JournalWriter;

/// The generated record bodies.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated from journal.proto, which carries the comments"
)]
mod wire {
    tonic::include_proto!("tensorferry.journal.v1");
}
