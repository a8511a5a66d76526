//! Tells of tensors that can be used, one after the other, on a thread of its own as long
//! as there are any: whoever listens may take its time and holds up nobody but the end.

use super::Session;
use crate::{
    protocol::SlotFile,
    ready::{OnReady, ReadyTensor},
    session::error::SessionError,
};
use std::{
    collections::VecDeque,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tokio::sync::Notify;

/// The queue of one session: no longer than the checkpoint has entries.
pub(super) struct Teller {
    on_ready: OnReady,
    state: Mutex<State>,
    told: Notify,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<ReadyTensor>,
    is_telling: bool,
}

impl Teller {
    pub(super) fn new(on_ready: OnReady) -> Arc<Self> {
        Arc::new(Teller {
            on_ready,
            state: Mutex::default(),
            told: Notify::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on nobody writes to the files of these entries. Those that share a file
    /// are left out: others are still written to it. Called while the session has its name,
    /// or a later one might be writing to them.
    pub(super) fn seal(
        &self,
        session: &Session,
        complete: Vec<Arc<SlotFile>>,
    ) -> Result<Vec<ReadyTensor>, SessionError> {
        let mut ready = Vec::new();
        for slot in complete {
            let is_first = session.core().is_first(slot.number);
            if slot.data_offset.is_some() || !self.on_ready.wants(is_first) {
                continue;
            }
            let sealed = session.staging.files().seal(&slot)?;
            // Where nothing can be read-only nothing can be promised.
            let Some(path) = sealed else { continue };
            ready.push(ReadyTensor {
                checkpoint: session.staging.options().checkpoint.to_string(),
                name: slot.header.name.clone(),
                path,
                byte_len: slot.header.byte_len,
                is_first,
            });
        }
        Ok(ready)
    }

    /// Tells of these after all that came before.
    pub(super) fn tell(self: &Arc<Self>, ready: Vec<ReadyTensor>) {
        let mut state = self.state();
        state.waiting.extend(ready);
        if state.waiting.is_empty() || std::mem::replace(&mut state.is_telling, true) {
            return;
        }
        drop(state);
        let teller = Arc::clone(self);
        tokio::task::spawn_blocking(move || teller.run());
    }

    fn run(&self) {
        loop {
            let next = {
                let mut state = self.state();
                let next = state.waiting.pop_front();
                state.is_telling = next.is_some();
                next
            };
            let Some(tensor) = next else { break };
            let tell = || self.on_ready.tell(&tensor);
            if catch_unwind(AssertUnwindSafe(tell)).is_err() {
                tracing::warn!(tensor.name, "who was told of a complete tensor panicked");
            }
        }
        self.told.notify_one();
    }

    /// Waits until all are told of.
    pub(super) async fn finish(&self) {
        while self.state().is_telling {
            self.told.notified().await;
        }
    }

    /// Tells of no more: the session failed, and the next one tells of what is there then.
    pub(super) fn stop(&self) {
        self.state().waiting.clear();
    }
}
