//! When a fault strikes, and what it does.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// What happens in a session, as its oracle sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Moment {
    /// Time passed.
    Time,
    /// Everything announced is answered.
    Answered,
    /// The n-th chunk of this session was handed over.
    Sent(u64),
    /// The n-th durable ack of this session came.
    Durable(u64),
    /// Finish was handed over.
    Finish,
    /// Done came.
    Done,
}

/// The moment to wait for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum When {
    Never,
    /// At this moment, or so much later.
    At(Moment, Duration),
}

type Action = Arc<dyn Fn() + Send + Sync>;

/// A fault that strikes once. Clones are the same fault, seen by several sessions; those
/// that did not arm it only learn that it has struck.
#[derive(Clone)]
pub(crate) struct Strike {
    when: When,
    due: Option<Instant>,
    began: Instant,
    action: Action,
    fired: Arc<AtomicBool>,
    fired_at: Arc<Mutex<Option<Instant>>>,
    leaves: bool,
    finish_seen: Arc<AtomicU64>,
}

impl Strike {
    /// `leaves`: sessions do not end by themselves afterwards.
    pub(crate) fn new(when: When, leaves: bool, action: impl Fn() + Send + Sync + 'static) -> Self {
        Strike {
            when,
            due: None,
            began: Instant::now(),
            action: Arc::new(action),
            fired: Arc::default(),
            fired_at: Arc::default(),
            leaves,
            finish_seen: Arc::default(),
        }
    }

    /// Nothing happens.
    pub(crate) fn none() -> Self {
        Strike::new(When::Never, false, || {})
    }

    /// The same fault for a session that does not choose the moment.
    pub(crate) fn unarmed(&self) -> Self {
        Strike {
            when: When::Never,
            ..self.clone()
        }
    }

    /// Tells that something happens; strikes if it was waited for.
    pub(crate) fn at(&mut self, moment: Moment) {
        if moment == Moment::Finish {
            self.finish_seen.fetch_add(1, Ordering::Relaxed);
        }
        if let When::At(wanted, delay) = self.when {
            let is_it = match (wanted, moment) {
                (Moment::Time, Moment::Time) => self.began.elapsed() >= delay,
                (wanted, moment) => wanted == moment,
            };
            if is_it && self.due.is_none() {
                let extra = if wanted == Moment::Time {
                    Duration::ZERO
                } else {
                    delay
                };
                self.due = Some(Instant::now() + extra);
            }
        }
        if self.due.is_some_and(|due| Instant::now() >= due) {
            self.fire();
        }
    }

    /// Strikes now unless it has struck.
    pub(crate) fn fire(&self) {
        if !self.fired.swap(true, Ordering::AcqRel) {
            (self.action)();
            *self.fired_at.lock().unwrap() = Some(Instant::now());
        }
    }

    pub(crate) fn has_fired(&self) -> bool {
        self.fired.load(Ordering::Acquire)
    }

    pub(crate) fn fired_for(&self) -> Duration {
        let at = *self.fired_at.lock().unwrap();
        at.map_or(Duration::ZERO, |at| at.elapsed())
    }

    pub(crate) fn leaves(&self) -> bool {
        self.leaves
    }

    /// Whether any session had asked to publish.
    pub(crate) fn saw_finish(&self) -> bool {
        self.finish_seen.load(Ordering::Relaxed) > 0
    }
}
