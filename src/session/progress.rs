//! Where a transfer stands, readable from any thread at any time.

use crate::protocol::{Durability, SendProgress};
use std::sync::{Mutex, PoisonError};

/// What a transfer is doing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Stage {
    /// Reaching the server.
    #[default]
    Connecting,
    /// Waiting before the next attempt.
    Waiting,
    /// Moving bytes.
    Sending,
    /// Everything is written; the receiver makes it durable and publishes.
    Publishing,
    /// Published.
    Done,
}

/// A snapshot. All bytes are raw bytes of the checkpoint unless said otherwise.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct Progress {
    /// What is going on.
    pub stage: Stage,
    /// Bytes of the checkpoint.
    pub total_bytes: u64,
    /// Bytes that survive a crash of the receiver.
    pub durable_bytes: u64,
    /// Bytes on the receiver, durable or only written.
    pub settled_bytes: u64,
    /// Payload bytes sent since the call began, all attempts together.
    pub wire_bytes: u64,
    /// Bytes that did not travel: durable at the start, or equal after comparison.
    pub resumed_bytes: u64,
    /// Sessions opened.
    pub session_count: u32,
    /// What durable means, once the receiver has said so.
    pub durability: Option<Durability>,
}

/// The shared cell behind [`Progress`].
#[derive(Debug, Default)]
pub(crate) struct ProgressCell {
    now: Mutex<Progress>,
}

impl ProgressCell {
    /// A copy.
    pub(crate) fn snapshot(&self) -> Progress {
        *self.now.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes it.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.now.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// Takes over what the role knows.
    pub(crate) fn set(&self, state: SendProgress) {
        self.update(|p| {
            p.total_bytes = state.total_bytes;
            p.durable_bytes = state.durable_bytes;
            p.settled_bytes = state.settled_bytes;
        });
    }
}
