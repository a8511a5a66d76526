//! Whether a sender keeps going: it may be slow, but it may not hold a session, a
//! name and memory for nothing.
//!
//! Time counts against a sender only while the next move is its own. What the
//! receiver makes it wait for (memory, disk, answers) is never charged.

use std::time::{Duration, Instant};

/// What is asked of a sender.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PaceLimits {
    /// Bytes a second, on average over `period` of its own time.
    pub(crate) min_bytes_per_second: u64,
    /// Own time after which a sender that owes bytes is judged.
    pub(crate) period: Duration,
    /// A sender that owes nothing may be silent for this long.
    pub(crate) max_silence: Duration,
}

impl Default for PaceLimits {
    fn default() -> Self {
        PaceLimits {
            min_bytes_per_second: 64 << 10,
            period: Duration::from_secs(30),
            max_silence: Duration::from_secs(600),
        }
    }
}

impl PaceLimits {
    /// How often to look: often enough to see whose turn it is most of the time.
    pub(crate) fn tick(&self) -> Duration {
        (self.period / 16).max(Duration::from_millis(1))
    }
}

/// Whose move is the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Turn {
    /// The receiver's.
    Receiver,
    /// The sender's: it has cells to send and room to send them, or has begun a
    /// frame.
    Sender,
    /// Nobody's: the sender may have to produce or compare first.
    Nobody,
}

/// What is to be done about the sender.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// Nothing.
    Fine,
    /// It owed bytes for this long and sent too few.
    TooSlow(Duration),
    /// Nothing came for this long.
    Silent(Duration),
}

/// The pace of one session.
#[derive(Debug)]
pub(crate) struct Pace {
    limits: PaceLimits,
    seen_at: Instant,
    seen_bytes: u64,
    /// Own time of the sender in this period, and what came in the meantime.
    owed_time: Duration,
    owed_bytes: u64,
    silence: Duration,
}

impl Pace {
    /// A session begins.
    pub(crate) fn new(limits: PaceLimits, now: Instant) -> Self {
        Pace {
            limits,
            seen_at: now,
            seen_bytes: 0,
            owed_time: Duration::ZERO,
            owed_bytes: 0,
            silence: Duration::ZERO,
        }
    }

    /// Looks at the session. `total_bytes` = all that has come since it began, as
    /// bytes of the wire or of cells that the sender needed not send in full;
    /// `unseen_bytes` = what may have come on top of it and shows only once it is whole.
    pub(crate) fn verdict(
        &mut self,
        now: Instant,
        total_bytes: u64,
        unseen_bytes: u64,
        turn: Turn,
    ) -> Verdict {
        // A machine that slept, or was too busy to look, charges nobody for it.
        let elapsed = now
            .saturating_duration_since(self.seen_at)
            .min(self.limits.tick() * 2);
        let bytes = total_bytes.saturating_sub(self.seen_bytes);
        (self.seen_at, self.seen_bytes) = (now, total_bytes);

        self.silence = match (bytes, turn) {
            (0, Turn::Nobody | Turn::Sender) => self.silence + elapsed,
            _ => Duration::ZERO,
        };
        if self.silence >= self.limits.max_silence {
            return Verdict::Silent(self.silence);
        }
        self.owed_bytes = self.owed_bytes.saturating_add(bytes);
        if turn == Turn::Sender {
            self.owed_time += elapsed;
        }
        if self.owed_time < self.limits.period {
            return Verdict::Fine;
        }
        let due = u128::from(self.limits.min_bytes_per_second) * self.owed_time.as_millis() / 1000;
        if u128::from(self.owed_bytes) + u128::from(unseen_bytes) < due {
            return Verdict::TooSlow(self.owed_time);
        }
        if u128::from(self.owed_bytes) < due {
            // Not known yet: the time counts on, and so does what is due.
            return Verdict::Fine;
        }
        (self.owed_time, self.owed_bytes) = (Duration::ZERO, 0);
        Verdict::Fine
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Looks once a second, with what comes in each and whose turn it is; returns the
    /// second of the first verdict other than fine.
    fn first_verdict(seconds: u64, each: impl Fn(u64) -> (u64, Turn)) -> Option<(u64, Verdict)> {
        let begun = Instant::now();
        let mut pace = Pace::new(PaceLimits::default(), begun);
        let mut total = 0;
        (1..=seconds).find_map(|second| {
            let (bytes, turn) = each(second);
            total += bytes;
            let verdict = pace.verdict(begun + SECOND * second as u32, total, 0, turn);
            (verdict != Verdict::Fine).then_some((second, verdict))
        })
    }

    #[test]
    fn who_owes_and_trickles_is_judged_after_the_period() {
        for bytes in [0, 1, (64 << 10) - 1] {
            assert_eq!(
                first_verdict(100, |_| (bytes, Turn::Sender)),
                Some((30, Verdict::TooSlow(SECOND * 30))),
                "{bytes}"
            );
        }
        assert_eq!(first_verdict(10_000, |_| (64 << 10, Turn::Sender)), None);
    }

    #[test]
    fn a_burst_pays_for_one_period_only() {
        let burst = |second| (if second == 1 { 1 << 30 } else { 0 }, Turn::Sender);
        assert_eq!(
            first_verdict(1000, burst),
            Some((60, Verdict::TooSlow(SECOND * 30)))
        );
    }

    #[test]
    fn what_shows_only_when_it_is_whole_is_waited_for_but_not_forever() {
        const LANES: u64 = 16;
        const FRAME_BYTES: u64 = 1 << 20;
        // All lanes of a slow link are in the middle of a frame for most of the time.
        let begun = Instant::now();
        let judge = |bytes_per_second: u64| {
            let mut pace = Pace::new(PaceLimits::default(), begun);
            (1..=3000).find(|&second: &u64| {
                let whole = second * bytes_per_second / (LANES * FRAME_BYTES);
                let seen = whole * LANES * FRAME_BYTES;
                let now = begun + SECOND * second as u32;
                let unseen = LANES * FRAME_BYTES;
                let verdict = pace.verdict(now, seen, unseen, Turn::Sender);
                verdict != Verdict::Fine
            })
        };
        assert_eq!(judge(200 << 10), None);
        assert_eq!(judge(0), Some(257));
    }

    #[test]
    fn time_of_the_receiver_is_never_charged() {
        assert_eq!(first_verdict(100_000, |_| (0, Turn::Receiver)), None);
        // Every other second it is the sender's turn.
        let turns = |second: u64| match second % 2 {
            0 => (0, Turn::Sender),
            _ => (0, Turn::Receiver),
        };
        assert_eq!(
            first_verdict(1000, turns),
            Some((60, Verdict::TooSlow(SECOND * 30)))
        );
    }

    #[test]
    fn who_owes_nothing_may_be_silent_for_long_but_not_forever() {
        assert_eq!(first_verdict(599, |_| (0, Turn::Nobody)), None);
        assert_eq!(
            first_verdict(1000, |_| (0, Turn::Nobody)),
            Some((600, Verdict::Silent(SECOND * 600)))
        );
        let now_and_then = |second: u64| (u64::from(second.is_multiple_of(500)), Turn::Nobody);
        assert_eq!(first_verdict(100_000, now_and_then), None);
    }

    #[test]
    fn a_jump_of_the_clock_is_nobodys_fault() {
        let begun = Instant::now();
        let mut pace = Pace::new(PaceLimits::default(), begun);
        let verdict = pace.verdict(begun + SECOND * 86_400, 0, 0, Turn::Sender);
        assert_eq!(verdict, Verdict::Fine);
    }
}
