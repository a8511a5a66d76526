//! Order of chunks on one lane, seen from the receiver.

use super::Reject;
use crate::plan::RangeSet;
use std::time::{Duration, Instant};

/// A lane that is slow, or given little, hears after this time what has settled: it
/// waits for that before it sends more.
const ACK_INTERVAL: Duration = Duration::from_millis(20);

/// Which of the chunks that arrived on a lane are settled.
#[derive(Debug, Default)]
pub(super) struct ReceiveLane {
    arrived_count: u64,
    settled: RangeSet,
    acked_count: u64,
    acked_at: Option<Instant>,
    /// Refused chunks of this lane that the sender has not been told of: they go out
    /// on the lane itself, so that no ack can overtake them.
    pub(super) rejects: Vec<Reject>,
}

impl ReceiveLane {
    /// A chunk arrived; returns its number on the lane.
    pub(super) fn arrive(&mut self) -> u64 {
        self.arrived_count += 1;
        self.arrived_count - 1
    }

    /// A chunk was written or rejected.
    pub(super) fn settle(&mut self, sequence: u64) {
        self.settled.insert(sequence..sequence + 1);
    }

    /// Chunks settled without a gap from the first.
    fn settled_count(&self) -> u64 {
        let first = self.settled.iter().next();
        first.filter(|r| r.start == 0).map_or(0, |r| r.end)
    }

    /// The next ack worth sending: once everything that arrived is settled, or at
    /// least `batch` chunks more than at the last, or the last is a while ago.
    pub(super) fn take_ack(&mut self, batch: u64, now: Instant) -> Option<u64> {
        let settled = self.settled_count();
        let fresh = settled - self.acked_count;
        let is_late = self
            .acked_at
            .is_none_or(|at| now.saturating_duration_since(at) >= ACK_INTERVAL);
        (fresh > 0 && (fresh >= batch || settled == self.arrived_count || is_late)).then(|| {
            (self.acked_count, self.acked_at) = (settled, Some(now));
            settled
        })
    }
}
