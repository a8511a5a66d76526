//! Which checkpoint names have a live session, and how a newer one takes over.

use super::error::SessionError;
use crate::{
    plan::{CheckpointName, Digest16},
    protocol::{ProtocolError, Reason},
    store::StoreError,
};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};
use tokio::sync::watch;

/// Live sessions of one server.
const MAX_SESSIONS: usize = 256;

#[derive(Debug)]
struct Live {
    transfer_id: Digest16,
    /// Order in which sessions came to the server.
    arrival: u64,
    /// Only its staging is left to be removed.
    is_published: bool,
    /// Set to true to make the session end.
    supersede: watch::Sender<bool>,
    /// Closed when the session is over.
    over: watch::Receiver<()>,
}

/// Live sessions of one server. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Registry {
    live: Arc<Mutex<HashMap<CheckpointName, Live>>>,
    arrival_count: Arc<AtomicU64>,
}

/// The place of a session in the registry; dropping it ends the session there.
#[derive(Debug)]
pub(crate) struct Seat {
    registry: Registry,
    name: CheckpointName,
    /// Becomes true when a newer session wants the place.
    pub(crate) superseded: watch::Receiver<bool>,
    _over: watch::Sender<()>,
}

impl Registry {
    /// Takes the place of `name`. A live session of the same transfer is told to
    /// end and waited for, with all its writes, and so is one that has published;
    /// any other of another transfer keeps the place. Of several that wait the one that
    /// came last gets it: those before it may belong to clients that are gone.
    pub(crate) async fn take(
        &self,
        name: &CheckpointName,
        transfer_id: Digest16,
    ) -> Result<Seat, SessionError> {
        let arrival = self.arrival_count.fetch_add(1, Ordering::Relaxed);
        loop {
            let mut over = {
                let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
                match live.get(name) {
                    None if live.len() >= MAX_SESSIONS => {
                        let why = "the server has as many sessions as it takes; try again later";
                        return Err(ProtocolError::new(Reason::TooMany, why).into());
                    }
                    None => return Ok(self.sit(&mut live, name, transfer_id, arrival)),
                    Some(other)
                        if other.transfer_id == transfer_id
                            && other.arrival > arrival
                            && !other.is_published =>
                    {
                        return Err(SessionError::Superseded);
                    }
                    Some(other) if other.transfer_id == transfer_id || other.is_published => {
                        // Nobody may be listening any more; then it ends anyway.
                        let _ = other.supersede.send(true);
                        other.over.clone()
                    }
                    Some(_) => {
                        return Err(StoreError::Locked {
                            name: name.to_string(),
                            why: "another transfer is writing it now",
                        }
                        .into());
                    }
                }
            };
            // Resolves with an error once the seat is dropped.
            while over.changed().await.is_ok() {}
        }
    }

    fn sit(
        &self,
        live: &mut HashMap<CheckpointName, Live>,
        name: &CheckpointName,
        transfer_id: Digest16,
        arrival: u64,
    ) -> Seat {
        let (supersede, superseded) = watch::channel(false);
        let (over_sender, over) = watch::channel(());
        live.insert(
            name.clone(),
            Live {
                transfer_id,
                arrival,
                is_published: false,
                supersede,
                over,
            },
        );
        Seat {
            registry: self.clone(),
            name: name.clone(),
            superseded,
            _over: over_sender,
        }
    }

    /// Takes the place of a name that has no session, for work without a sender: a
    /// session that comes meanwhile waits for its end.
    pub(crate) fn take_idle(&self, name: &CheckpointName) -> Option<Seat> {
        let mut live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        if live.contains_key(name) {
            return None;
        }
        let arrival = self.arrival_count.fetch_add(1, Ordering::Relaxed);
        let seat = self.sit(&mut live, name, Digest16::default(), arrival);
        drop(live);
        // Whoever comes next waits, whatever transfer it is of.
        seat.published();
        Some(seat)
    }

    /// Whether no session is live.
    pub(crate) fn is_idle(&self) -> bool {
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_empty()
    }

    /// Whether a session of this name is live.
    pub(crate) fn is_live(&self, name: &CheckpointName) -> bool {
        self.live
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .contains_key(name)
    }
}

impl Seat {
    /// The checkpoint stands under its name: whoever comes next may wait.
    pub(crate) fn published(&self) {
        let mut live = self
            .registry
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(live) = live.get_mut(&self.name) {
            live.is_published = true;
        }
    }
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut live = self
            .registry
            .live
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        live.remove(&self.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_same_transfer_takes_over_and_another_is_locked_out() {
        let registry = Registry::default();
        let name: CheckpointName = "a".parse().unwrap();
        let mut first = registry.take(&name, [1; 16]).await.unwrap();
        assert!(matches!(
            registry.take(&name, [2; 16]).await,
            Err(SessionError::Store(StoreError::Locked { .. }))
        ));
        let second = tokio::spawn({
            let (registry, name) = (registry.clone(), name.clone());
            async move { registry.take(&name, [1; 16]).await.unwrap() }
        });
        first.superseded.changed().await.unwrap();
        assert!(*first.superseded.borrow() && !second.is_finished());
        drop(first);
        let second = second.await.unwrap();
        assert!(registry.is_live(&name));
        second.published();
        let third = tokio::spawn({
            let (registry, name) = (registry.clone(), name.clone());
            async move { registry.take(&name, [3; 16]).await.unwrap() }
        });
        drop(second);
        drop(third.await.unwrap());
        assert!(!registry.is_live(&name));
    }

    #[tokio::test]
    async fn of_those_that_wait_the_last_one_gets_the_place() {
        // Which of the two wakes first is chance.
        for _ in 0..100 {
            let registry = Registry::default();
            let name: CheckpointName = "a".parse().unwrap();
            let first = registry.take(&name, [1; 16]).await.unwrap();
            let take = |registry: Registry| {
                let name = name.clone();
                async move { registry.take(&name, [1; 16]).await }
            };
            let gone = tokio::spawn(take(registry.clone()));
            tokio::task::yield_now().await;
            let last = tokio::spawn(take(registry.clone()));
            tokio::task::yield_now().await;
            drop(first);
            // One that is gone gives its place up as soon as it is told to.
            let loser = tokio::spawn(async move {
                match gone.await.unwrap() {
                    Ok(mut seat) => drop(seat.superseded.changed().await),
                    Err(error) => assert!(matches!(error, SessionError::Superseded)),
                }
            });
            let seat = last.await.unwrap().unwrap();
            loser.await.unwrap();
            assert!(!*seat.superseded.borrow());
        }
    }

    #[tokio::test]
    async fn sessions_are_counted_and_a_take_over_is_none_too_many() {
        let registry = Registry::default();
        let name = |i: usize| format!("n{i}").parse::<CheckpointName>().unwrap();
        let mut seats = Vec::new();
        for i in 0..MAX_SESSIONS {
            seats.push(registry.take(&name(i), [1; 16]).await.unwrap());
        }
        let refused = registry.take(&name(MAX_SESSIONS), [1; 16]).await;
        assert!(matches!(refused, Err(SessionError::Protocol(e)) if e.reason == Reason::TooMany));
        let next = tokio::spawn({
            let (registry, name) = (registry.clone(), name(0));
            async move { registry.take(&name, [1; 16]).await }
        });
        seats.remove(0);
        assert!(next.await.unwrap().is_ok());
    }
}
