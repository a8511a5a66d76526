//! The receiving role.

mod announce;
mod chunks;
mod commit;
#[cfg(test)]
mod tests;
mod work;

pub use work::{
    Arrival, CommitPolicy, CompareJob, DiskWait, Group, GroupCells, PublishPlan, ReceiveAction,
    ReceiverConfig, Recovered,
};

use super::{
    Announcement, CONTAINER_FILE, Durable, Finish, Keep, ManifestPromise, ProtocolError, Reason,
    ReceiverFrame, Wanted,
    lane::ReceiveLane,
    slot::{Slot, SlotFile},
};
use crate::plan::{FileNames, Place, Places, RangeSet, SourceKey, SourceState};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Instant,
};

/// Refused chunks in a row that end the session.
const MAX_REJECTS_IN_ROW: u32 = 16;
/// Cell runs in one Wanted, so that it stays far below 1 MiB.
const MAX_WANTED_RUNS: usize = 16 << 10;
/// Answers in one frame.
const MAX_ANSWERS: usize = 512;
/// Entries with durable cells in one frame.
const MAX_DURABLE: usize = 8192;
/// Chunks settled before an ack is sent while others are under way.
const ACK_BATCH: u64 = 4;
/// Commits of one session that do not wait for more, whatever a sender says is urgent.
const MAX_URGENT_COMMITS: u32 = 1024;
/// Lanes that may join one session, one after the other.
const MAX_JOINS: u64 = 1024;

/// The receiving role of one session.
#[derive(Debug)]
pub struct Receiver {
    config: ReceiverConfig,
    slots: BTreeMap<u32, Slot>,
    by_name: HashMap<String, u32>,
    places: Places,
    /// Entries of the journal by source; those of this session cite sources that
    /// were announced before them.
    recovered_by_source: HashMap<SourceKey, Vec<u32>>,
    next_number: u32,
    file_names: FileNames,
    recorded_sources: HashMap<SourceKey, SourceState>,
    session_sources: Vec<SourceKey>,
    seen_sources: HashSet<SourceKey>,
    announced: Vec<(u32, Announcement)>,
    tensor_count: u64,
    /// Where the next tensor begins in the container, if there is one.
    container_end: Option<u64>,
    announced_bytes: u64,
    /// Announced, Wanted not yet out.
    unanswered: VecDeque<u32>,
    /// Rest of an answer that did not fit its frame: entry, wanted, held.
    rest: Option<(u32, RangeSet, RangeSet)>,
    lanes: BTreeMap<u32, ReceiveLane>,
    /// Numbers that lanes have had: one that comes again would be taken for the
    /// earlier one by chunks still under way.
    used_lanes: RangeSet,
    rejects_in_row: u32,

    // Answers waiting for a frame.
    further: Vec<Wanted>,
    durable_out: BTreeMap<u32, RangeSet>,
    keeps_out: BTreeMap<u32, RangeSet>,
    compares: VecDeque<CompareJob>,
    comparing_count: u64,

    // The next group.
    dirty: BTreeSet<u32>,
    dirty_bytes: u64,
    dirty_since: Option<Instant>,
    /// An entry that goes before the others is complete: it need not wait for more.
    is_urgent: bool,
    /// How often that may still be.
    urgent_left: u32,
    /// Entries that were durable when the session began, not told of yet.
    complete_at_start: Vec<Arc<SlotFile>>,
    new_sources: Vec<SourceState>,
    /// Records that must be durable before any further Wanted goes out.
    barrier: Barrier,
    in_commit: Option<InCommit>,
    next_group_id: u64,
    undurable_bytes: u64,
    placing_count: u64,

    finish: Option<Finish>,
    ending: bool,
    publishing: bool,
}

#[derive(Debug, Default)]
struct Barrier {
    forget: Vec<u32>,
    demoted: Vec<SourceState>,
    rebound: Vec<u32>,
}

impl Barrier {
    fn is_empty(&self) -> bool {
        self.forget.is_empty() && self.demoted.is_empty() && self.rebound.is_empty()
    }
}

#[derive(Debug)]
struct InCommit {
    id: u64,
    is_barrier: bool,
    bytes: u64,
    numbers: Vec<u32>,
}

impl Receiver {
    /// A session over what the journal says.
    pub fn new(config: ReceiverConfig, recovered: Recovered) -> Self {
        let mut file_names = FileNames::default();
        let mut by_name = HashMap::new();
        let mut places = Places::default();
        let mut recovered_by_source = HashMap::new();
        let mut slots = BTreeMap::new();
        for entry in recovered.entries {
            file_names.reserve(&entry.slot.file);
            by_name.insert(entry.slot.header.name.clone(), entry.slot.number);
            places.insert(entry.slot.place(), entry.slot.number);
            for &key in &entry.slot.source_keys {
                let numbers: &mut Vec<u32> = recovered_by_source.entry(key).or_default();
                numbers.push(entry.slot.number);
            }
            slots.insert(entry.slot.number, Slot::recovered(entry, config.grid));
        }
        let container_end = config.container_header_len;
        let mut receiver = Receiver {
            config,
            slots,
            by_name,
            places,
            recovered_by_source,
            next_number: recovered.next_number,
            file_names,
            recorded_sources: recovered.sources,
            session_sources: Vec::new(),
            seen_sources: HashSet::new(),
            announced: Vec::new(),
            tensor_count: 0,
            container_end,
            announced_bytes: 0,
            unanswered: VecDeque::new(),
            rest: None,
            lanes: BTreeMap::from([(0, ReceiveLane::default())]),
            used_lanes: RangeSet::of(0..1),
            rejects_in_row: 0,
            further: Vec::new(),
            durable_out: BTreeMap::new(),
            keeps_out: BTreeMap::new(),
            compares: VecDeque::new(),
            comparing_count: 0,
            dirty: BTreeSet::new(),
            dirty_bytes: 0,
            dirty_since: None,
            is_urgent: false,
            urgent_left: MAX_URGENT_COMMITS,
            complete_at_start: Vec::new(),
            new_sources: Vec::new(),
            barrier: Barrier::default(),
            in_commit: None,
            next_group_id: 0,
            undurable_bytes: 0,
            placing_count: 0,
            finish: None,
            ending: false,
            publishing: false,
        };
        receiver.clear_header();
        receiver
    }

    /// Gives up what an earlier session has where the header of the container is going to
    /// be: whether it is announced again or not, those bytes will be others.
    fn clear_header(&mut self) {
        let Some(byte_len) = self.container_end else {
            return;
        };
        let header = Place {
            file: CONTAINER_FILE,
            data_offset: Some(0),
            byte_len,
        };
        for holder in self.places.holders(header) {
            self.forget(holder);
        }
    }

    /// Raw bytes durable in entries that the journal knows.
    pub fn durable_bytes(&self) -> u64 {
        let grid = self.config.grid;
        let bytes = |slot: &Slot| -> u64 {
            let len = slot.slot.header.byte_len;
            slot.durable
                .iter()
                .map(|r| grid.span_bytes(len, r.start, r.end - r.start))
                .sum()
        };
        self.slots.values().map(bytes).sum()
    }

    /// Finish has come and was in order.
    pub fn is_finishing(&self) -> bool {
        self.finish.is_some()
    }

    /// No placement is out and no group is under way.
    pub fn is_settled(&self) -> bool {
        self.placing_count == 0 && self.in_commit.is_none()
    }

    /// The sender has to wait: answers or acks are not out yet, or the session ends.
    pub fn is_busy(&self) -> bool {
        let in_barrier = self.in_commit.as_ref().is_some_and(|g| g.is_barrier);
        let is_answering = !self.unanswered.is_empty() || self.rest.is_some();
        let is_throttling = self.undurable_bytes > self.config.commit.max_undurable_bytes;
        let is_over = self.finish.is_some() || self.ending || self.publishing;
        is_over
            || is_answering
            || is_throttling
            || in_barrier
            || !self.barrier.is_empty()
            || self.placing_count > 0
            || self.comparing_count > 0
    }

    /// Whether the sender waits for the disk.
    pub fn disk_wait(&self) -> DiskWait {
        let in_barrier = self.in_commit.as_ref().is_some_and(|g| g.is_barrier);
        if self.undurable_bytes > self.config.commit.max_undurable_bytes {
            DiskWait::Acks
        } else if self.finish.is_some() || in_barrier || !self.barrier.is_empty() {
            DiskWait::Syncs
        } else {
            DiskWait::Nothing
        }
    }

    /// Cells are wanted that the sender has said it has, and it has none to compare
    /// first: reading those takes it as long as it takes.
    pub fn is_owed(&self) -> bool {
        let announced = self.announced.iter();
        let slots = announced.filter_map(|(number, _)| self.slots.get(number));
        let mut answered = slots.filter(|slot| slot.answered && !slot.is_durable());
        let mut is_owed = false;
        matches!(self.config.manifest, ManifestPromise::Complete { .. })
            && answered.all(|slot| {
                is_owed |= !slot.missing().is_empty();
                slot.held.is_empty()
            })
            && is_owed
    }

    /// The sender brings this entry before the others.
    pub fn is_first(&self, number: u32) -> bool {
        self.slots.get(&number).is_some_and(|slot| slot.is_first)
    }

    /// Lanes at the moment.
    pub fn lane_count(&self) -> u32 {
        self.lanes.len() as u32
    }

    /// The sender gave up, or the connection did: commit what is written.
    pub fn end(&mut self) {
        self.ending = true;
        self.publishing = false;
        self.finish = None;
    }

    /// The next thing to do.
    pub fn poll(&mut self, now: Instant) -> Option<ReceiveAction> {
        if self.publishing {
            return None;
        }
        if let Some(action) = self.poll_frame(now) {
            return Some(action);
        }
        if let Some(group) = self.poll_commit(now) {
            return Some(ReceiveAction::Commit(group));
        }
        if self.ending {
            return None;
        }
        if let Some(job) = self.compares.pop_front() {
            return Some(ReceiveAction::Compare(job));
        }
        self.poll_publish()
    }

    /// When to poll again although nothing happened.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.in_commit.is_some() {
            return None;
        }
        Some(self.dirty_since? + self.config.commit.interval?)
    }

    fn poll_frame(&mut self, now: Instant) -> Option<ReceiveAction> {
        let mut frame = ReceiverFrame {
            wanted: std::mem::take(&mut self.further),
            ..self.poll_lane(0, now).unwrap_or_default()
        };
        while frame.durable.len() < MAX_DURABLE
            && let Some((entry, ranges)) = self.durable_out.pop_first()
        {
            frame.durable.push(Durable { entry, ranges });
        }
        for (entry, ranges) in std::mem::take(&mut self.keeps_out) {
            frame.keeps.push(Keep { entry, ranges });
        }
        if !self.ending {
            self.answer(&mut frame);
        }
        (!frame.is_empty()).then_some(ReceiveAction::Send(frame))
    }

    /// What is to be said on a lane other than lane 0, whose frames come out of
    /// [`Receiver::poll`].
    pub fn poll_lane(&mut self, lane: u32, now: Instant) -> Option<ReceiverFrame> {
        // Withheld acks are how the wire waits for the disk.
        let may_ack =
            !self.ending && self.undurable_bytes <= self.config.commit.max_undurable_bytes;
        let state = self.lanes.get_mut(&lane)?;
        let frame = ReceiverFrame {
            rejects: std::mem::take(&mut state.rejects),
            ack: may_ack.then(|| state.take_ack(ACK_BATCH, now)).flatten(),
            ..ReceiverFrame::default()
        };
        (!frame.is_empty()).then_some(frame)
    }

    /// Adds a lane.
    ///
    /// # Errors
    /// The number was used before, or too many lanes were.
    pub fn join(&mut self, lane: u32) -> Result<(), ProtocolError> {
        let number = u64::from(lane);
        if self.used_lanes.contains(number) {
            return Err(ProtocolError::new(
                Reason::BadFrame,
                format!("lane {lane} joins a second time"),
            ));
        }
        if self.lanes.len() >= self.config.max_lanes as usize
            || self.used_lanes.count() >= MAX_JOINS
        {
            return Err(ProtocolError::new(
                Reason::TooMany,
                format!("a session has at most {} lanes", self.config.max_lanes),
            ));
        }
        self.used_lanes.insert(number..number + 1);
        self.lanes.insert(lane, ReceiveLane::default());
        Ok(())
    }

    /// A lane is gone. Its chunks that have arrived are written all the same.
    pub fn leave(&mut self, lane: u32) {
        self.lanes.remove(&lane);
    }

    /// Adds answers to announcements, as far as the journal allows.
    fn answer(&mut self, frame: &mut ReceiverFrame) {
        let in_barrier = self.in_commit.as_ref().is_some_and(|g| g.is_barrier);
        if !self.barrier.is_empty() || in_barrier {
            return;
        }
        let mut runs = 0;
        while frame.wanted.len() < MAX_ANSWERS && runs < MAX_WANTED_RUNS {
            let Some((entry, mut wanted, mut held)) =
                self.rest.take().or_else(|| self.begin_answer())
            else {
                break;
            };
            let part = Wanted {
                entry,
                wanted: split_off(&mut wanted, MAX_WANTED_RUNS),
                held: split_off(&mut held, MAX_WANTED_RUNS),
                last: wanted.is_empty() && held.is_empty(),
            };
            runs += part.wanted.iter().len() + part.held.iter().len();
            if !part.last {
                self.rest = Some((entry, wanted, held));
            }
            frame.wanted.push(part);
        }
    }

    /// What the next unanswered entry needs.
    fn begin_answer(&mut self) -> Option<(u32, RangeSet, RangeSet)> {
        while let Some(number) = self.unanswered.pop_front() {
            if let Some(slot) = self.slots.get_mut(&number)
                && let Some(entry) = slot.wire_entry
            {
                slot.answered = true;
                // One without bytes has no file before the end.
                if slot.is_durable() && slot.cell_count > 0 {
                    self.complete_at_start.push(Arc::clone(&slot.slot));
                }
                return Some((entry, slot.missing(), slot.held.clone()));
            }
        }
        None
    }

    fn announced_number(&self, wire_entry: u32) -> Result<u32, ProtocolError> {
        self.announced
            .get(wire_entry as usize)
            .map(|(number, _)| *number)
            .ok_or_else(|| {
                ProtocolError::new(
                    Reason::BadFrame,
                    format!("entry {wire_entry} was not announced"),
                )
            })
    }

    fn slot_mut(&mut self, number: u32) -> Result<&mut Slot, ProtocolError> {
        self.slots
            .get_mut(&number)
            .ok_or_else(|| ProtocolError::new(Reason::Bug, "an announced entry has no slot"))
    }

    fn lane_mut(&mut self, lane: u32) -> Result<&mut ReceiveLane, ProtocolError> {
        self.lanes
            .get_mut(&lane)
            .ok_or_else(|| ProtocolError::new(Reason::BadFrame, format!("no lane {lane}")))
    }

    fn settle(&mut self, lane: u32, sequence: u64) {
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.settle(sequence);
        }
    }

    /// Entries of which every byte was durable when the session began, each once.
    pub fn take_complete_at_start(&mut self) -> Vec<Arc<SlotFile>> {
        std::mem::take(&mut self.complete_at_start)
    }

    fn mark_dirty(&mut self, number: u32, bytes: u64, now: Instant) {
        let slot = self.slots.get(&number);
        if slot.is_some_and(|slot| slot.is_first && slot.is_complete()) && self.urgent_left > 0 {
            self.urgent_left -= 1;
            self.is_urgent = true;
        }
        self.dirty.insert(number);
        self.dirty_bytes += bytes;
        self.undurable_bytes += bytes;
        self.dirty_since.get_or_insert(now);
    }

    /// Every cell in exactly one state, for tests.
    #[cfg(any(test, feature = "__internals"))]
    pub(crate) fn check_invariants(&self) {
        for slot in self.slots.values() {
            let sets = [
                &slot.durable,
                &slot.held,
                &slot.placing,
                &slot.written,
                &slot.keeping,
                &slot.committing,
            ];
            let sum: u64 = sets.iter().map(|s| s.count()).sum();
            let mut union = RangeSet::new();
            sets.iter().for_each(|s| union.union_with(s));
            assert_eq!(sum, union.count(), "a cell is in two states: {slot:?}");
            assert!(RangeSet::of(0..slot.cell_count).is_superset(&union));
        }
    }

    /// Name and cells of every durable range, for tests.
    #[cfg(any(test, feature = "__internals"))]
    pub(crate) fn durable_cells(&self) -> Vec<(String, RangeSet)> {
        let slots = self.slots.values();
        slots
            .map(|s| (s.slot.header.name.clone(), s.durable.clone()))
            .collect()
    }
}

/// Takes the first `runs` ranges out of a set.
fn split_off(set: &mut RangeSet, runs: usize) -> RangeSet {
    let mut part = RangeSet::new();
    for range in set.iter().take(runs).collect::<Vec<_>>() {
        part.insert(range.clone());
        set.remove(range);
    }
    part
}
