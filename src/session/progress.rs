//! Where a transfer stands, readable from any thread at any time.

use super::stages::{SendStages, Stages};
use crate::{
    format::codec::Codec,
    plan::{CellId, RangeSet},
    protocol::{Accept, Done, Durability, ReceiverStages, SendProgress},
};
use std::{
    collections::HashMap,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
};

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

/// A snapshot. All bytes are raw bytes of the checkpoint unless said otherwise, and
/// no count goes back while a push runs.
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
    /// How the stages of the session under way, or of the last one, spend their time.
    pub stages: Stages,
}

/// The shared cell behind [`Progress`].
#[derive(Debug, Default)]
pub(crate) struct ProgressCell {
    now: Mutex<Progress>,
    /// Cells that travelled in this call, over all its sessions, whichever way.
    sent: Mutex<HashMap<u32, RangeSet>>,
    /// Their raw bytes, each cell once.
    sent_bytes: Mutex<u64>,
    /// Bits of the codecs that chunks of this call were encoded with.
    codecs: AtomicU32,
    /// Of the session under way.
    stages: Mutex<Option<SendStages>>,
}

impl ProgressCell {
    /// A copy.
    pub(crate) fn snapshot(&self) -> Progress {
        let stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        let now = *self.now.lock().unwrap_or_else(PoisonError::into_inner);
        match &*stages {
            Some(stages) => Progress {
                stages: stages.report(None),
                ..now
            },
            None => now,
        }
    }

    /// A session begins: from now on its stages are those of the snapshots.
    pub(super) fn follow(&self, stages: &SendStages) {
        *self.stages.lock().unwrap_or_else(PoisonError::into_inner) = Some(stages.clone());
    }

    /// The session is over: what came of its stages stays.
    pub(super) fn unfollow(&self, receiver: Option<ReceiverStages>) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(stages) = stages.take() {
            self.update(|p| p.stages = stages.report(receiver));
        }
    }

    /// Chunks were encoded with these codecs.
    pub(crate) fn count_codecs(&self, bits: u32) {
        self.codecs.fetch_or(bits, Ordering::Relaxed);
    }

    /// Codecs that chunks of this call were encoded with.
    pub(crate) fn codecs(&self) -> Vec<Codec> {
        let bits = self.codecs.load(Ordering::Relaxed);
        let is_used = |codec: &Codec| bits & codec.bit() != 0;
        Codec::ALL.into_iter().filter(is_used).collect()
    }

    /// Changes it.
    pub(crate) fn update(&self, change: impl FnOnce(&mut Progress)) {
        change(&mut self.now.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// A cell of `raw_len` bytes goes out as `encoded_len` bytes.
    pub(crate) fn count_sent(&self, cell: CellId, raw_len: u32, encoded_len: u32) {
        self.count_once(cell, raw_len);
        self.update(|p| p.wire_bytes += u64::from(encoded_len));
    }

    /// A cell that travels again counts once.
    fn count_once(&self, cell: CellId, raw_len: u32) {
        let mut sent = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let cells = sent.entry(cell.entry).or_default();
        if !cells.contains(cell.cell) {
            cells.insert(cell.cell..cell.cell + 1);
            *self
                .sent_bytes
                .lock()
                .unwrap_or_else(PoisonError::into_inner) += u64::from(raw_len);
        }
    }

    fn travelled_bytes(&self) -> u64 {
        *self
            .sent_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Published. What did not travel in this call had been there before.
    pub(crate) fn finish(&self, done: &Done) {
        let sent_bytes = self.travelled_bytes();
        self.unfollow(done.stages);
        self.update(|p| {
            p.stage = Stage::Done;
            p.total_bytes = done.total_bytes;
            p.durable_bytes = done.total_bytes;
            p.settled_bytes = done.total_bytes;
            p.resumed_bytes = done.total_bytes.saturating_sub(sent_bytes);
            p.durability = Some(done.durability);
        });
    }

    /// A receiver on this side begins a session.
    pub(super) fn begin_receiving(&self, accept: &Accept, total_bytes: u64) {
        self.update(|p| {
            p.stage = Stage::Sending;
            p.total_bytes = total_bytes;
            if p.session_count == 0 {
                p.resumed_bytes = accept.durable_bytes;
            }
            p.session_count += 1;
            p.durability = Some(accept.durability);
            p.durable_bytes = p.durable_bytes.max(accept.durable_bytes);
        });
    }

    /// So many bytes came on this side.
    pub(super) fn count_heard(&self, bytes: u64) {
        self.update(|p| p.wire_bytes += bytes);
    }

    /// A cell came on this side and was written.
    pub(super) fn count_received(&self, cell: CellId, raw_len: u32) {
        self.count_once(cell, raw_len);
    }

    /// So many bytes are durable on this side; what came is written at least.
    pub(super) fn receive(&self, durable_bytes: u64) {
        let came = self.travelled_bytes();
        self.update(|p| {
            p.durable_bytes = p.durable_bytes.max(durable_bytes).min(p.total_bytes);
            let there = (p.resumed_bytes + came).max(p.durable_bytes);
            p.settled_bytes = p.settled_bytes.max(there).min(p.total_bytes);
        });
    }

    /// What was received is published. What did not come in this call had been there.
    pub(crate) fn end_receiving(&self, done: &Done) {
        let came = self.travelled_bytes();
        self.update(|p| {
            p.stage = Stage::Done;
            // For what stood there already no session was begun.
            p.session_count = p.session_count.max(1);
            p.total_bytes = done.total_bytes;
            p.durable_bytes = done.total_bytes;
            p.settled_bytes = done.total_bytes;
            p.resumed_bytes = done.total_bytes.saturating_sub(came);
            p.durability = Some(done.durability);
        });
    }

    /// Takes over what the role knows. After a reconnection it learns anew what is
    /// there; until then what it knew before counts.
    pub(crate) fn set(&self, state: SendProgress) {
        self.update(|p| {
            p.total_bytes = state.total_bytes;
            p.durable_bytes = p.durable_bytes.max(state.durable_bytes);
            // Durable may be heard of on one lane before the ack comes on another.
            p.settled_bytes = p
                .settled_bytes
                .max(state.settled_bytes)
                .max(p.durable_bytes);
        });
    }
}
