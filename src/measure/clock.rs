//! Time on the wall and time on processors.

use super::Sample;
use rustix::time::{ClockId, clock_gettime};
use std::time::{Duration, Instant};

/// Runs from its making to [`Clock::stop`].
pub(super) struct Clock {
    begun: Instant,
    cpu: Duration,
}

impl Clock {
    pub(super) fn start() -> Clock {
        Clock {
            cpu: process_time(),
            begun: Instant::now(),
        }
    }

    pub(super) fn stop(self, bytes: u64) -> Sample {
        let elapsed = self.begun.elapsed();
        Sample {
            bytes,
            elapsed,
            cpu: process_time().saturating_sub(self.cpu),
            allocation: None,
            calls_per_second: None,
        }
    }
}

/// Processor time of all threads of this process so far.
fn process_time() -> Duration {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}
