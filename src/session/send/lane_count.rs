//! How many lanes a push has when the user leaves it open: one more is tried now and
//! then, and kept only if it brings clearly more.
//!
//! There are never fewer than at the start, so that a bad hour of the network cannot
//! take away what made it fast; and what has failed is tried again ever more rarely.

use std::time::{Duration, Instant};

/// A trial and what it is compared with take this long, or so many round trips.
const PERIOD: Duration = Duration::from_secs(1);
/// Time in which a push gets going, of which nothing is concluded.
const START: Duration = Duration::from_secs(2);
/// What a change has to settle before it is looked at.
const SETTLE: Duration = Duration::from_millis(500);
const ROUND_TRIPS: u32 = 8;
/// Half as many lanes more must carry this much more …
const GAIN: f64 = 1.2;
/// … and fewer may carry this much less.
const LOSS: f64 = 0.95;
/// Below this share of what they once carried, fewer lanes are tried.
const FALL: f64 = 0.7;
/// Pauses after a trial that failed double from the first to the second of these.
const PAUSE: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));

/// The number of lanes of one session.
#[derive(Debug)]
pub(super) struct LaneCount {
    count: u32,
    start_count: u32,
    max_count: u32,
    phase: Phase,
    /// Bytes a second that `count` lanes carried when they were chosen.
    proven_rate: f64,
    pause: Duration,
    next_trial_at: Instant,
}

#[derive(Clone, Copy, Debug)]
enum Phase {
    /// Until then what is carried says nothing.
    Settling { until: Instant, then: Then },
    Measuring {
        since: Instant,
        bytes: u64,
        then: Then,
    },
}

/// What a measurement is for.
#[derive(Clone, Copy, Debug)]
enum Then {
    /// To know what the lanes carry. `before` = in the period before.
    Watch { before: Option<f64> },
    /// To judge a trial: the number and the rate to compare with.
    Judge { count: u32, rate: f64 },
}

impl LaneCount {
    /// Begins with `start_count` lanes of at most `max_count`.
    pub(super) fn new(start_count: u32, max_count: u32, now: Instant) -> Self {
        LaneCount {
            count: start_count,
            start_count,
            max_count,
            phase: Phase::Settling {
                until: now + START,
                then: Then::Watch { before: None },
            },
            proven_rate: 0.0,
            pause: PAUSE.0,
            next_trial_at: now,
        }
    }

    /// Lanes wanted, now that `acked_bytes` have been acked in all.
    pub(super) fn tick(&mut self, now: Instant, acked_bytes: u64, round_trip: Duration) -> u32 {
        let period = PERIOD.max(round_trip * ROUND_TRIPS);
        match self.phase {
            Phase::Settling { until, then } if now >= until => {
                let (since, bytes) = (now, acked_bytes);
                self.phase = Phase::Measuring { since, bytes, then };
            }
            Phase::Measuring { since, bytes, then } if now >= since + period => {
                let seconds = (now - since).as_secs_f64();
                let rate = acked_bytes.saturating_sub(bytes) as f64 / seconds;
                let (settle, then) = match then {
                    Then::Watch { before } => self.watched(rate, before, now),
                    Then::Judge { count, rate: base } => self.judged(rate, count, base, now),
                };
                self.phase = match settle {
                    true => Phase::Settling {
                        until: now + SETTLE.max(round_trip * ROUND_TRIPS),
                        then,
                    },
                    false => Phase::Measuring {
                        since: now,
                        bytes: acked_bytes,
                        then,
                    },
                };
            }
            _ => {}
        }
        self.count
    }

    /// A period has passed without a change. Two of them are what a trial is compared
    /// with, so that one bad moment does not make it look good.
    fn watched(&mut self, rate: f64, before: Option<f64>, now: Instant) -> (bool, Then) {
        let on = (false, Then::Watch { before: Some(rate) });
        let Some(before) = before else { return on };
        let best = rate.max(before);
        self.proven_rate = self.proven_rate.max(best);
        let (count, rate) = (self.count, best);
        if best == 0.0 || now < self.next_trial_at {
            return on;
        }
        if count > self.start_count && best < self.proven_rate * FALL {
            self.count -= 1;
        } else if count < self.max_count {
            // In steps that show.
            self.count = (count + (count / 2).max(1)).min(self.max_count);
        } else {
            return on;
        }
        (true, Then::Judge { count, rate })
    }

    fn judged(&mut self, rate: f64, before: u32, base: f64, now: Instant) -> (bool, Then) {
        let is_more = self.count > before;
        let least = if is_more { GAIN } else { LOSS };
        if rate >= base * least {
            if is_more {
                self.proven_rate = rate;
            }
            // Fewer that do no worse: what they once carried still is the measure, for the
            // next one to go.
            self.pause = PAUSE.0;
            self.next_trial_at = now;
        } else {
            self.count = before;
            self.proven_rate = base;
            self.next_trial_at = now + self.pause;
            self.pause = (self.pause * 2).min(PAUSE.1);
        }
        (true, Then::Watch { before: None })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TICK: Duration = Duration::from_millis(250);

    /// Runs for some seconds over a network that carries this with so many lanes at such
    /// a second. Returns the numbers of lanes, one for each tick.
    fn run(max: u32, seconds: u64, network: impl Fn(u32, f64) -> f64) -> Vec<u32> {
        let begun = Instant::now();
        let mut lanes = LaneCount::new(2, max, begun);
        let (mut acked, mut count) = (0.0, 2);
        (1..=seconds * 4)
            .map(|tick| {
                let now = begun + TICK * tick as u32;
                acked += network(count, (now - begun).as_secs_f64()) * TICK.as_secs_f64();
                count = lanes.tick(now, acked as u64, Duration::from_millis(10));
                count
            })
            .collect()
    }

    /// Noise of a busy machine, the same in every run: up to `share` more or less.
    fn noise(at: f64, share: f64) -> f64 {
        let hash = blake3::hash(&at.to_le_bytes());
        1.0 + share * (f64::from(hash.as_bytes()[0]) / 127.5 - 1.0)
    }

    #[test]
    fn lanes_that_each_bring_their_own_are_all_taken_soon() {
        let counts = run(8, 20, |count, at| f64::from(count) * 10e6 * noise(at, 0.1));
        assert_eq!(counts.last(), Some(&8));
    }

    #[test]
    fn one_limit_for_all_is_met_by_two_lanes_and_rarely_tried_again() {
        for share in [0.0, 0.05, 0.2] {
            let counts = run(16, 600, |_, at| 100e6 * noise(at, share));
            assert!(counts.iter().all(|count| (2..=4).contains(count)));
            let trials = counts.iter().filter(|count| **count > 2).count();
            assert!(
                trials * 10 < counts.len(),
                "{share}: {trials} of {}",
                counts.len()
            );
        }
    }

    #[test]
    fn a_limit_between_is_found_and_kept() {
        let counts = run(16, 120, |count, _| (f64::from(count) * 10e6).min(58e6));
        let last = *counts.last().unwrap();
        assert!((6..=9).contains(&last), "{last}");
    }

    #[test]
    fn lanes_that_hinder_each_other_are_given_up_and_a_bad_hour_takes_none_of_the_first() {
        // From second 30 on every lane beyond the second costs a fifth.
        let counts = run(16, 300, |count, at| match at {
            ..30.0 => f64::from(count.min(6)) * 10e6,
            _ => 20e6 * 0.8f64.powi(count as i32 - 2),
        });
        assert!(counts.iter().any(|count| *count >= 6));
        assert_eq!(counts.last(), Some(&2));
        // Nothing moves at all for a while, and then slowly.
        let counts = run(16, 300, |_, at| match at {
            ..100.0 => 100e6,
            100.0..200.0 => 0.0,
            _ => 1e6,
        });
        assert!(counts.iter().all(|count| *count >= 2));
    }
}
