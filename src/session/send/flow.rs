//! How much each lane may have under way, so that none holds what others would carry
//! sooner, and how much all of them together need: from what comes back, and when.
//!
//! A lane is given what it carries in its round trip and a little more. What it was
//! seen to carry grows with what it is given until the lane is full, so it starts
//! small and finds its share in a few round trips. Time is an argument.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
    time::{Duration, Instant},
};

/// A lane holds as much beyond its round trip as it carries in this time, or in two
/// more round trips: enough that it never runs dry, little enough to wait for.
const SLACK: Duration = Duration::from_millis(150);
/// A lane may always have so many chunks under way: one that travels, one behind it.
const MIN_CHUNKS: u64 = 2;
/// And so many as long as nothing is known about it.
const START_CHUNKS: u64 = 4;
/// What a chunk costs on the wire beside its bytes.
const CHUNK_OVERHEAD_BYTES: u64 = 64;
/// The best rate and the least round trip count for this long, and up to twice that.
const RATE_PERIOD: Duration = Duration::from_millis(500);
const ROUND_TRIP_PERIOD: Duration = Duration::from_secs(10);
/// Lanes that would be done this much later than all the others are as good as they.
const TAIL_SLACK: Duration = Duration::from_millis(20);
/// The shortest wait of a lane that leaves a chunk to others.
const MIN_PATIENCE: Duration = Duration::from_millis(10);

/// The lanes of one session.
pub(super) struct Flow {
    lanes: BTreeMap<u32, LaneFlow>,
    chunk_len: u64,
    /// Bounds of the window that all lanes share, in raw bytes.
    min_window_bytes: u64,
    max_window_bytes: u64,
    /// Lanes of this slot and above take no chunks.
    active_count: u32,
    acked_bytes: u64,
}

#[derive(Debug)]
struct LaneFlow {
    slot: u32,
    on_way: VecDeque<OnWay>,
    on_way_bytes: u64,
    settled_count: u64,
    /// What has been acked in its life, and when the last of that was.
    acked: Sizes,
    acked_at: Instant,
    wire_rate: Best,
    raw_rate: Best,
    round_trip: Best,
    /// Since when it has left a chunk to others.
    declined_since: Option<Instant>,
}

/// One chunk on a lane, and where the lane stood when it was sent.
#[derive(Debug)]
struct OnWay {
    sizes: Sizes,
    sent_at: Instant,
    acked: Sizes,
    acked_at: Instant,
}

#[derive(Clone, Copy, Debug, Default)]
struct Sizes {
    wire: u64,
    raw: u64,
}

/// Whether a lane may take the next chunk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Now.
    Take,
    /// Not before one of its own is acked.
    Full,
    /// Another lane would bring it sooner; if none has taken it after this time, ask
    /// again.
    Leave(Duration),
}

impl Flow {
    /// Lane 0 alone. The window is what round trips need, between these bounds.
    pub(super) fn new(
        chunk_len: u32,
        window_bytes: std::ops::RangeInclusive<u64>,
        now: Instant,
    ) -> Self {
        let mut flow = Flow {
            lanes: BTreeMap::new(),
            chunk_len: u64::from(chunk_len),
            min_window_bytes: *window_bytes.start(),
            max_window_bytes: *window_bytes.end(),
            active_count: 1,
            acked_bytes: 0,
        };
        flow.join(0, 0, now);
        flow
    }

    /// A lane more, in a slot.
    pub(super) fn join(&mut self, lane: u32, slot: u32, now: Instant) {
        self.lanes.insert(
            lane,
            LaneFlow {
                slot,
                on_way: VecDeque::new(),
                on_way_bytes: 0,
                settled_count: 0,
                acked: Sizes::default(),
                acked_at: now,
                wire_rate: Best::most(RATE_PERIOD),
                raw_rate: Best::most(RATE_PERIOD),
                round_trip: Best::least(ROUND_TRIP_PERIOD),
                declined_since: None,
            },
        );
    }

    /// A lane less.
    pub(super) fn leave(&mut self, lane: u32) {
        self.lanes.remove(&lane);
    }

    /// Only lanes of the first `count` slots take chunks from now on.
    pub(super) fn set_active(&mut self, count: u32) {
        self.active_count = count;
    }

    /// Chunks are handed to a lane in this order.
    pub(super) fn sent(&mut self, lane: u32, wire_len: u32, raw_len: u32, now: Instant) {
        let Some(lane) = self.lanes.get_mut(&lane) else {
            return;
        };
        if lane.on_way.is_empty() {
            // Time in which it had nothing to do says nothing about it.
            lane.acked_at = now;
        }
        let sizes = Sizes {
            wire: u64::from(wire_len) + CHUNK_OVERHEAD_BYTES,
            raw: u64::from(raw_len),
        };
        lane.on_way_bytes += sizes.wire;
        lane.on_way.push_back(OnWay {
            sizes,
            sent_at: now,
            acked: lane.acked,
            acked_at: lane.acked_at,
        });
    }

    /// The first `settled_count` chunks of a lane have arrived.
    pub(super) fn acked(&mut self, lane: u32, settled_count: u64, now: Instant) {
        let Some(lane) = self.lanes.get_mut(&lane) else {
            return;
        };
        let fresh = settled_count.saturating_sub(lane.settled_count);
        let mut newest = None;
        for _ in 0..fresh {
            let Some(item) = lane.on_way.pop_front() else {
                break;
            };
            lane.settled_count += 1;
            lane.on_way_bytes -= item.sizes.wire;
            lane.acked.wire += item.sizes.wire;
            lane.acked.raw += item.sizes.raw;
            self.acked_bytes += item.sizes.wire;
            newest = Some(item);
        }
        let Some(item) = newest else {
            return;
        };
        lane.acked_at = now;
        let round_trip = now.saturating_duration_since(item.sent_at).as_secs_f64();
        lane.round_trip.add(round_trip, now);
        let seconds = now.saturating_duration_since(item.acked_at).as_secs_f64();
        let wire = lane.acked.wire - item.acked.wire;
        // A small chunk alone is all round trip and no rate.
        if wire >= self.chunk_len / 2 && seconds > 0.0 {
            lane.wire_rate.add(wire as f64 / seconds, now);
            let raw = lane.acked.raw - item.acked.raw;
            lane.raw_rate.add(raw as f64 / seconds, now);
        }
    }

    /// Whether a lane takes the next chunk. `remaining_bytes` = raw bytes that are not
    /// settled yet, on a lane or not; `None` while nobody knows.
    pub(super) fn verdict(
        &mut self,
        lane: u32,
        wire_len: u32,
        remaining_bytes: Option<u64>,
        now: Instant,
    ) -> Verdict {
        let len = u64::from(wire_len) + CHUNK_OVERHEAD_BYTES;
        let Some(own) = self.lanes.get(&lane) else {
            // It is being closed; its writer ends with the next chunk.
            return Verdict::Take;
        };
        if own.on_way_bytes + len > self.limit_bytes(own) {
            return Verdict::Full;
        }
        let verdict = self.tail_verdict(own, len, remaining_bytes, now);
        if let Some(own) = self.lanes.get_mut(&lane) {
            match verdict {
                Verdict::Leave(_) => own.declined_since = own.declined_since.or(Some(now)),
                _ => own.declined_since = None,
            }
        }
        verdict
    }

    /// The lanes that take chunks.
    fn active(&self) -> impl Iterator<Item = &LaneFlow> {
        let lanes = self.lanes.values();
        lanes.filter(|lane| lane.slot < self.active_count)
    }

    /// What a lane may have under way.
    fn limit_bytes(&self, lane: &LaneFlow) -> u64 {
        let chunk_bytes = self.chunk_len + CHUNK_OVERHEAD_BYTES;
        match (lane.wire_rate.get(), self.round_trip_seconds()) {
            (Some(rate), Some(round_trip)) => {
                let slack = (2.0 * round_trip).max(SLACK.as_secs_f64());
                (MIN_CHUNKS * chunk_bytes).max((rate * (round_trip + slack)) as u64)
            }
            _ => START_CHUNKS * chunk_bytes,
        }
    }

    /// The least of all lanes: they go the same way, and what a slow one needs beyond it
    /// is time in which its own chunks wait for each other.
    fn round_trip_seconds(&self) -> Option<f64> {
        let times = self.lanes.values().filter_map(|lane| lane.round_trip.get());
        times.reduce(f64::min)
    }

    /// Towards the end a slow lane leaves the rest to those that are done with it first.
    fn tail_verdict(
        &self,
        own: &LaneFlow,
        len: u64,
        remaining_bytes: Option<u64>,
        now: Instant,
    ) -> Verdict {
        let (Some(remaining_bytes), Some(own_seconds)) = (remaining_bytes, own.seconds_with(len))
        else {
            return Verdict::Take;
        };
        let total_rate: f64 = self.active().filter_map(|l| l.raw_rate.get()).sum();
        if own_seconds <= remaining_bytes as f64 / total_rate + TAIL_SLACK.as_secs_f64() {
            return Verdict::Take;
        }
        let is_best = self
            .active()
            .filter_map(|l| l.seconds_with(len))
            .all(|seconds| own_seconds <= seconds);
        // The others had as much time as it would have needed itself: they are stuck.
        let patience = Duration::try_from_secs_f64(own_seconds).unwrap_or(Duration::MAX);
        let waited = own
            .declined_since
            .map_or(Duration::ZERO, |since| now.saturating_duration_since(since));
        match patience.checked_sub(waited) {
            Some(left) if !is_best && !left.is_zero() => Verdict::Leave(left.max(MIN_PATIENCE)),
            _ => Verdict::Take,
        }
    }

    /// Most raw bytes that may be asked for and not be acked: twice what all lanes carry
    /// in their round trips.
    pub(super) fn window_bytes(&self) -> u64 {
        let rate: f64 = self.active().filter_map(|l| l.raw_rate.get()).sum();
        let needed = 2.0 * rate * self.round_trip_seconds().unwrap_or(0.0);
        (needed as u64)
            .max(self.min_window_bytes)
            .min(self.max_window_bytes)
    }

    /// Bytes acked so far, over all lanes that ever were.
    pub(super) fn acked_bytes(&self) -> u64 {
        self.acked_bytes
    }

    /// The least round trip of late.
    pub(super) fn round_trip(&self) -> Duration {
        let seconds = self.round_trip_seconds().unwrap_or(0.0);
        Duration::try_from_secs_f64(seconds).unwrap_or_default()
    }
}

/// What somebody looks for who wonders why a push is slow.
impl fmt::Debug for Flow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "window {} KiB", self.window_bytes() >> 10)?;
        for (number, lane) in &self.lanes {
            let rate = lane.wire_rate.get().unwrap_or(0.0) / 1024.0;
            let round_trip = lane.round_trip.get().unwrap_or(0.0) * 1e3;
            let on_way = lane.on_way_bytes >> 10;
            write!(
                f,
                ", lane {number} (slot {}): {rate:.0} KiB/s, {round_trip:.2} ms, {on_way} KiB on the way",
                lane.slot
            )?;
        }
        Ok(())
    }
}

impl LaneFlow {
    /// When it would be done with what it has and `len` bytes more.
    fn seconds_with(&self, len: u64) -> Option<f64> {
        Some((self.on_way_bytes + len) as f64 / self.wire_rate.get()?)
    }
}

/// The best of what was measured in the last one to two periods. What is older counts
/// until there is something new.
#[derive(Debug)]
struct Best {
    period: Duration,
    better: fn(f64, f64) -> f64,
    since: Option<Instant>,
    current: Option<f64>,
    previous: Option<f64>,
}

impl Best {
    fn most(period: Duration) -> Self {
        Best {
            period,
            better: f64::max,
            since: None,
            current: None,
            previous: None,
        }
    }

    fn least(period: Duration) -> Self {
        Best {
            better: f64::min,
            ..Best::most(period)
        }
    }

    fn add(&mut self, value: f64, now: Instant) {
        let since = *self.since.get_or_insert(now);
        if now.saturating_duration_since(since) >= self.period {
            (self.previous, self.current, self.since) = (self.current, None, Some(now));
        }
        self.current = Some(
            self.current
                .map_or(value, |best| (self.better)(best, value)),
        );
    }

    fn get(&self) -> Option<f64> {
        match (self.current, self.previous) {
            (Some(a), Some(b)) => Some((self.better)(a, b)),
            (a, b) => a.or(b),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u32 = 1 << 20;
    const MIB: f64 = (1 << 20) as f64;
    const STEP: Duration = Duration::from_millis(1);

    /// A link that carries chunks of one lane at a rate, one after the other.
    struct Link {
        bytes_per_second: f64,
        delay: Duration,
        free_at: Instant,
        arrivals: VecDeque<Instant>,
        settled_count: u64,
    }

    /// Sends `chunks` over links of these rates (MiB/s) and delays; seconds, and what
    /// each carried.
    struct Run {
        flow: Flow,
        links: Vec<Link>,
        begun: Instant,
        now: Instant,
        most_window_bytes: u64,
    }

    impl Run {
        fn new(links: &[(f64, Duration)]) -> Run {
            let now = Instant::now();
            let mut flow = Flow::new(CHUNK, 16 << 20..=64 << 20, now);
            flow.set_active(links.len() as u32);
            (1..links.len() as u32).for_each(|lane| flow.join(lane, lane, now));
            let links = links.iter().map(|&(rate, delay)| Link {
                bytes_per_second: rate * MIB,
                delay,
                free_at: now,
                arrivals: VecDeque::new(),
                settled_count: 0,
            });
            Run {
                flow,
                links: links.collect(),
                begun: now,
                now,
                most_window_bytes: 0,
            }
        }

        /// Seconds until all chunks are acked.
        fn push(&mut self, chunks: u64) -> f64 {
            let (mut unsent, mut settled) = (chunks, 0);
            while settled < chunks {
                self.now += STEP;
                for (lane, link) in self.links.iter_mut().enumerate() {
                    while link.arrivals.front().is_some_and(|at| *at <= self.now) {
                        link.arrivals.pop_front();
                        link.settled_count += 1;
                        settled += 1;
                    }
                    self.flow.acked(lane as u32, link.settled_count, self.now);
                }
                let window = self.flow.window_bytes();
                self.most_window_bytes = self.most_window_bytes.max(window);
                // Whoever asks first has no advantage.
                let (mut at, mut refusals) = (unsent as usize, 0);
                while unsent > 0 && refusals < self.links.len() {
                    let lane = at % self.links.len();
                    at += 1;
                    let in_flight = (chunks - settled - unsent + 1) * u64::from(CHUNK);
                    let remaining = (chunks - settled) * u64::from(CHUNK);
                    let verdict = self
                        .flow
                        .verdict(lane as u32, CHUNK, Some(remaining), self.now);
                    if verdict != Verdict::Take || in_flight > window {
                        refusals += 1;
                        continue;
                    }
                    refusals = 0;
                    unsent -= 1;
                    self.flow.sent(lane as u32, CHUNK, CHUNK, self.now);
                    let link = &mut self.links[lane];
                    let time = Duration::from_secs_f64(f64::from(CHUNK) / link.bytes_per_second);
                    link.free_at = link.free_at.max(self.now) + time;
                    link.arrivals.push_back(link.free_at + link.delay);
                }
                assert!(
                    self.now < self.begun + Duration::from_secs(3600),
                    "it hangs"
                );
            }
            (self.now - self.begun).as_secs_f64()
        }
    }

    #[test]
    fn a_lane_at_a_tenth_never_holds_the_tail() {
        let ms = Duration::from_millis;
        for (rates, delay) in [
            (vec![10.0, 100.0], ms(1)),
            (vec![100.0, 10.0], ms(1)),
            (vec![100.0, 100.0, 10.0, 100.0], ms(20)),
            (vec![1.0, 10.0], ms(5)),
        ] {
            let links: Vec<_> = rates.iter().map(|&rate| (rate, delay)).collect();
            let total_rate: f64 = rates.iter().sum();
            for chunks in [100, 256, 1000] {
                let seconds = Run::new(&links).push(chunks);
                let ideal = chunks as f64 / total_rate;
                // Round trips until the lanes are known are not the tail.
                let most = ideal * 1.1 + 6.0 * delay.as_secs_f64();
                assert!(
                    seconds <= most,
                    "{rates:?} {chunks}: {seconds} s, ideal {ideal} s"
                );
            }
        }
    }

    #[test]
    fn a_long_fat_link_is_filled_within_a_few_round_trips() {
        let delay = Duration::from_millis(100);
        let mut run = Run::new(&[(60.0, delay), (60.0, delay)]);
        let seconds = run.push(2048);
        assert!(seconds <= 2048.0 / 120.0 + 1.0, "{seconds} s");
        let bytes_in_flight = (120.0 * MIB * 0.1) as u64;
        assert!(run.most_window_bytes >= 2 * bytes_in_flight);
    }

    #[test]
    fn a_short_link_needs_no_more_than_the_least_window() {
        let mut run = Run::new(&[(1000.0, Duration::from_millis(1)); 2]);
        run.push(4096);
        assert_eq!(run.most_window_bytes, 16 << 20);
    }

    #[test]
    fn what_others_do_not_take_in_time_is_taken_after_all() {
        let mut run = Run::new(&[(100.0, STEP), (10.0, STEP)]);
        run.push(100);
        let (flow, now) = (&mut run.flow, run.now);
        let last = Some(u64::from(CHUNK));
        let Verdict::Leave(patience) = flow.verdict(1, CHUNK, last, now) else {
            panic!("the slow lane takes the last chunk");
        };
        assert_eq!(flow.verdict(0, CHUNK, last, now), Verdict::Take);
        assert_eq!(flow.verdict(1, CHUNK, last, now + patience), Verdict::Take);
        // A lane that takes none is no reason to wait.
        assert!(matches!(
            flow.verdict(1, CHUNK, last, now),
            Verdict::Leave(_)
        ));
        flow.leave(0);
        assert_eq!(flow.verdict(1, CHUNK, last, now), Verdict::Take);
    }
}
