//! Workers at each stage, over time.

use crate::protocol::{PipelineStage, StageTimes};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

const STAGE_COUNT: usize = 7;

/// Workers at one stage.
#[derive(Debug, Default)]
pub(in crate::session) struct Load {
    now: u32,
    most: u32,
    /// Of all workers together.
    time: Duration,
}

impl Load {
    pub(super) fn pass(&mut self, time: Duration) {
        if self.now > 0 {
            self.time += time * self.now;
        }
    }

    pub(super) fn begin(&mut self) {
        self.now += 1;
        self.most = self.most.max(self.now);
    }

    pub(super) fn end(&mut self) {
        self.now = self.now.saturating_sub(1);
    }

    pub(super) fn is_idle(&self) -> bool {
        self.now == 0
    }

    /// How much of it is at work, 0 to 1.
    pub(super) fn share(&self) -> f64 {
        f64::from(self.now) / f64::from(self.most.max(1))
    }

    /// Time of all workers, divided by the most that there were at once.
    pub(super) fn busy(&self) -> Duration {
        self.time / self.most.max(1)
    }
}

/// What one side counts beside its workers.
pub(in crate::session) trait Flow {
    /// `time` went by in which nothing changed.
    fn pass(&mut self, loads: &Loads, time: Duration);
}

/// The workers of all stages.
#[derive(Debug, Default)]
pub(in crate::session) struct Loads([Load; STAGE_COUNT]);

impl Loads {
    pub(super) fn of(&self, stage: PipelineStage) -> &Load {
        // As many as there are variants.
        &self.0[stage as usize]
    }

    pub(super) fn of_mut(&mut self, stage: PipelineStage) -> &mut Load {
        &mut self.0[stage as usize]
    }

    /// Of a stage that nothing stops.
    pub(super) fn times(&self, stage: PipelineStage) -> StageTimes {
        StageTimes {
            busy: self.of(stage).busy(),
            blocked: Duration::ZERO,
        }
    }
}

/// The ledger of one side at the moment of its last change.
#[derive(Debug)]
pub(super) struct Ledger<F> {
    at: Instant,
    pub(super) loads: Loads,
    pub(super) flow: F,
}

/// The ledger of one side.
#[derive(Debug)]
pub(super) struct Meter<F> {
    begun: Instant,
    ledger: Mutex<Ledger<F>>,
}

impl<F: Flow> Meter<F> {
    pub(super) fn new(flow: F) -> Self {
        let begun = Instant::now();
        Meter {
            begun,
            ledger: Mutex::new(Ledger {
                at: begun,
                loads: Loads::default(),
                flow,
            }),
        }
    }

    /// Since the session began.
    pub(super) fn elapsed(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The ledger, up to now; what is changed in it counts from now on.
    pub(super) fn ledger(&self) -> MutexGuard<'_, Ledger<F>> {
        let mut guard = self.ledger.lock().unwrap_or_else(PoisonError::into_inner);
        let Ledger { at, loads, flow } = &mut *guard;
        let now = Instant::now();
        let time = now.saturating_duration_since(*at);
        *at = now;
        flow.pass(loads, time);
        loads.0.iter_mut().for_each(|load| load.pass(time));
        guard
    }

    /// A worker is at this stage as long as the value lives.
    pub(super) fn work(&self, stage: PipelineStage) -> Work<'_, F> {
        self.ledger().loads.of_mut(stage).begin();
        Work { meter: self, stage }
    }
}

/// One worker at a stage.
#[derive(Debug)]
#[must_use = "the work ends when it is dropped"]
pub(in crate::session) struct Work<'a, F: Flow> {
    meter: &'a Meter<F>,
    stage: PipelineStage,
}

impl<F: Flow> Work<'_, F> {
    /// The worker goes on to another stage of the same job.
    pub(in crate::session) fn turn_to(&mut self, stage: PipelineStage) {
        let mut ledger = self.meter.ledger();
        ledger.loads.of_mut(self.stage).end();
        ledger.loads.of_mut(stage).begin();
        self.stage = stage;
    }
}

impl<F: Flow> Drop for Work<'_, F> {
    fn drop(&mut self) {
        self.meter.ledger().loads.of_mut(self.stage).end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stage_is_busy_all_the_time_only_while_no_worker_rests() {
        let second = Duration::from_secs(1);
        let mut load = Load::default();
        load.pass(second);
        assert_eq!(load.busy(), Duration::ZERO);
        load.begin();
        load.pass(second);
        assert_eq!((load.most, load.busy()), (1, second));
        // Four of them for a second, then one of four.
        (0..3).for_each(|_| load.begin());
        load.pass(second);
        (0..3).for_each(|_| load.end());
        load.pass(second);
        assert_eq!((load.most, load.busy()), (4, second * 6 / 4));
        // One end too many counts no worker below none.
        load.end();
        load.end();
        assert!(load.is_idle());
    }
}
