//! The sending role.

use super::{
    Durable, Finish, Keep, MAX_COMPARE_CELLS, ProtocolError, Reason, ReceiverFrame, Reject, Wanted,
};
use crate::plan::{CellId, Digest16, EntryHeader, Grid, RangeSet, digest_entries};
use std::{
    collections::{BTreeMap, VecDeque},
    ops::Range,
};

/// Entries announced at a time.
const ANNOUNCE_BATCH: u32 = 512;
/// Entries that may wait for their answer: the cells of earlier ones travel meanwhile.
const MAX_UNANSWERED: u64 = 1024;

/// Cells on their way, however small they are: what is kept for each is bounded too.
pub(crate) const MAX_IN_FLIGHT_CELLS: usize = 1 << 16;

/// Terms of one session, from Accept.
#[derive(Clone, Copy, Debug)]
pub struct SenderConfig {
    /// The transfer's grid.
    pub grid: Grid,
    /// Most raw bytes sent and not acked, until [`Sender::set_window_bytes`].
    pub window_bytes: u64,
}

/// Work that the sender asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SendAction {
    /// Announce these entries, and their sources before them.
    Announce(Range<u32>),
    /// Read a cell and send it, then call [`Sender::sent`].
    Send(CellId),
    /// Hash these cells of one entry and send a Compare.
    Compare {
        /// Entry number.
        entry: u32,
        /// Cells.
        cells: Range<u64>,
    },
    /// Read a refused cell again, then call [`Sender::rechecked`].
    Recheck {
        /// The cell.
        cell: CellId,
        /// CRC-32C that was sent for it.
        sent_crc32c: u32,
    },
    /// Check the source once more and send Finish.
    Finish(Finish),
}

/// Where a transfer stands, in raw bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SendProgress {
    /// Announced so far.
    pub total_bytes: u64,
    /// Durable on the receiver.
    pub durable_bytes: u64,
    /// On the receiver, durable or only written.
    pub settled_bytes: u64,
    /// Sent in this session and acked.
    pub acked_bytes: u64,
    /// Not sent in this session: durable when it began, or kept after comparison.
    pub resumed_bytes: u64,
}

#[derive(Debug)]
struct Sending {
    header: EntryHeader,
    cell_count: u64,
    /// To be sent before the others.
    is_first: bool,
    /// The last part of the first answer has come.
    answered: bool,
    pending: RangeSet,
    held: RangeSet,
    comparing: RangeSet,
    /// Being read, or on a lane and not acked.
    unsettled: RangeSet,
    /// Refused, being read again.
    rechecking: RangeSet,
    durable: RangeSet,
    /// In some answer, as wanted or held.
    asked: RangeSet,
    /// It stands in the queue of those with work, once: a receiver must not make that long.
    is_ready: bool,
}

impl Sending {
    fn has_work(&self) -> bool {
        !self.pending.is_empty() || !self.held.is_empty()
    }
}

#[derive(Debug)]
struct OnLane {
    cell: CellId,
    rejected: bool,
}

#[derive(Debug, Default)]
struct SendLane {
    on_way: VecDeque<OnLane>,
    acked_count: u64,
}

/// The sending role of one session.
#[derive(Debug)]
pub struct Sender {
    config: SenderConfig,
    entries: Vec<Sending>,
    sealed: bool,
    fingerprint: Option<Digest16>,
    announced_count: u32,
    unanswered_count: u64,
    /// Entries that have cells to send or compare.
    ready: VecDeque<u32>,
    /// Those of them that go before the others.
    ready_first: VecDeque<u32>,
    /// Entries that go before the others and have no answer yet: what they want is not
    /// known, and nothing else is sent meanwhile.
    awaited_first_count: u64,
    /// Cells of such entries that are being read or wait for a lane: what is read beside
    /// them might be taken before them.
    first_on_hand: u64,
    /// Cells that are anywhere between wanted and settled.
    open_cells: u64,
    comparing_count: u64,
    in_flight_bytes: u64,
    in_flight_count: usize,
    lanes: BTreeMap<u32, SendLane>,
    rechecks: VecDeque<(CellId, u32)>,
    progress: SendProgress,
    finish_sent: bool,
}

impl Sender {
    /// A session under these terms.
    pub fn new(config: SenderConfig, fingerprint: Option<Digest16>) -> Self {
        Sender {
            config,
            entries: Vec::new(),
            sealed: false,
            fingerprint,
            announced_count: 0,
            unanswered_count: 0,
            ready: VecDeque::new(),
            ready_first: VecDeque::new(),
            awaited_first_count: 0,
            first_on_hand: 0,
            open_cells: 0,
            comparing_count: 0,
            in_flight_bytes: 0,
            in_flight_count: 0,
            lanes: BTreeMap::from([(0, SendLane::default())]),
            rechecks: VecDeque::new(),
            progress: SendProgress::default(),
            finish_sent: false,
        }
    }

    /// One more entry; its number is how many came before it. One that `is_first` is sent
    /// before all that are not and have not been sent by now.
    pub fn add(&mut self, header: EntryHeader, is_first: bool) {
        self.progress.total_bytes += header.byte_len;
        self.awaited_first_count += u64::from(is_first);
        self.entries.push(Sending {
            cell_count: self.config.grid.cell_count(header.byte_len),
            header,
            is_first,
            answered: false,
            pending: RangeSet::new(),
            held: RangeSet::new(),
            comparing: RangeSet::new(),
            unsettled: RangeSet::new(),
            rechecking: RangeSet::new(),
            durable: RangeSet::new(),
            asked: RangeSet::new(),
            is_ready: false,
        });
    }

    /// Entries added so far.
    pub fn entry_count(&self) -> usize {
        self.entries.len()
    }

    /// No further entry will come.
    pub fn seal(&mut self) {
        self.sealed = true;
    }

    /// Where the transfer stands.
    pub fn progress(&self) -> SendProgress {
        self.progress
    }

    /// Raw bytes between wanted and acked.
    pub fn in_flight_bytes(&self) -> u64 {
        self.in_flight_bytes
    }

    /// Whether cells are wanted that [`Sender::poll`] does not ask for: the window is
    /// full, or too many are under comparison.
    pub fn has_no_room(&self) -> bool {
        !self.ready.is_empty() || !self.ready_first.is_empty()
    }

    /// Whether cells wait until those that go before them are on their way.
    pub fn holds_back(&self) -> bool {
        self.awaited_first_count > 0 || self.first_on_hand > 0
    }

    /// From now on at most this many raw bytes are sent and not acked.
    pub fn set_window_bytes(&mut self, window_bytes: u64) {
        self.config.window_bytes = window_bytes;
    }

    /// Raw bytes that are not on the receiver yet; `None` while entries are missing or
    /// unanswered.
    pub fn remaining_bytes(&self) -> Option<u64> {
        let is_known = self.sealed
            && self.unanswered_count == 0
            && self.announced_count as usize == self.entries.len();
        is_known.then(|| {
            let progress = &self.progress;
            progress.total_bytes.saturating_sub(progress.settled_bytes)
        })
    }

    /// Whether Finish has been asked for.
    pub fn is_finishing(&self) -> bool {
        self.finish_sent
    }

    /// Offset and length in bytes of a cell of an entry.
    pub fn span(&self, cell: CellId) -> Option<(u64, u32)> {
        let entry = self.entries.get(cell.entry as usize)?;
        self.config.grid.cell_span(entry.header.byte_len, cell.cell)
    }

    /// Adds a lane, which may send from now on. Numbers are never used again.
    pub fn join(&mut self, lane: u32) {
        self.lanes.entry(lane).or_default();
    }

    /// A lane is gone. What was on its way goes back to the pool, unless it is
    /// known to have arrived.
    pub fn leave(&mut self, lane: u32) {
        let Some(state) = self.lanes.remove(&lane) else {
            return;
        };
        for item in state.on_way {
            let len = self.span(item.cell).map_or(0, |(_, len)| u64::from(len));
            self.land(len);
            // A refused cell is being read again and goes its own way.
            if !item.rejected {
                self.take_back(item.cell, len);
            }
        }
    }

    /// A cell is not on its way any more.
    fn land(&mut self, len: u64) {
        self.in_flight_bytes -= len;
        self.in_flight_count -= 1;
    }

    /// A cell that was to be sent will not be acked: it is sent again, unless it is
    /// durable already.
    fn take_back(&mut self, cell: CellId, len: u64) {
        let Some(entry) = self.entries.get_mut(cell.entry as usize) else {
            return;
        };
        let range = cell.cell..cell.cell + 1;
        entry.unsettled.remove(range.clone());
        if entry.durable.contains(cell.cell) {
            self.open_cells -= 1;
            self.progress.settled_bytes += len;
        } else {
            entry.pending.insert(range);
            self.make_ready(cell.entry);
        }
    }

    /// An entry has cells to be sent or compared.
    fn make_ready(&mut self, number: u32) {
        if let Some(entry) = self.entries.get_mut(number as usize)
            && !entry.is_ready
        {
            entry.is_ready = true;
            match entry.is_first {
                true => self.ready_first.push_back(number),
                false => self.ready.push_back(number),
            }
        }
    }

    /// Takes in a frame of lane `lane`, except its control part.
    ///
    /// # Errors
    /// The receiver broke a rule.
    pub fn handle(&mut self, lane: u32, frame: &ReceiverFrame) -> Result<(), ProtocolError> {
        if lane != 0 && !frame.is_of_any_lane() {
            return Err(ProtocolError::new(
                Reason::BadFrame,
                format!("lane {lane} brings what belongs to the control lane"),
            ));
        }
        for wanted in &frame.wanted {
            self.handle_wanted(wanted)?;
        }
        for reject in &frame.rejects {
            self.handle_reject(lane, reject)?;
        }
        if let Some(count) = frame.ack {
            self.handle_ack(lane, count)?;
        }
        for durable in &frame.durable {
            self.handle_durable(durable)?;
        }
        for keep in &frame.keeps {
            self.handle_keep(keep)?;
        }
        Ok(())
    }

    fn handle_wanted(&mut self, wanted: &Wanted) -> Result<(), ProtocolError> {
        let bad = |why: &str| ProtocolError::new(Reason::BadFrame, why);
        let entry = self.entry_mut(wanted.entry)?;
        let all = RangeSet::of(0..entry.cell_count);
        if !all.is_superset(&wanted.wanted) || !all.is_superset(&wanted.held) {
            return Err(bad("a wanted cell does not exist"));
        }
        if entry.answered {
            // After the first answer only compared cells may be asked for.
            if !wanted.held.is_empty() || !entry.comparing.is_superset(&wanted.wanted) {
                return Err(bad("a cell is wanted that was not compared"));
            }
            entry.comparing.subtract(&wanted.wanted);
            entry.pending.union_with(&wanted.wanted);
            self.comparing_count -= wanted.wanted.count();
            self.make_ready(wanted.entry);
            return Ok(());
        }
        for set in [&wanted.wanted, &wanted.held] {
            let before = entry.asked.count();
            entry.asked.union_with(set);
            if entry.asked.count() != before + set.count() {
                return Err(bad("a cell is wanted twice"));
            }
        }
        entry.pending.union_with(&wanted.wanted);
        entry.held.union_with(&wanted.held);
        entry.answered = wanted.last;
        let (has_work, is_first) = (entry.has_work(), entry.is_first);
        let (mut at_start, mut fresh) = (RangeSet::new(), RangeSet::new());
        if wanted.last {
            at_start = entry.asked.missing_below(entry.cell_count);
            fresh = at_start.clone();
            // A Durable that came before its Wanted has counted already.
            fresh.subtract(&entry.durable);
            entry.durable.union_with(&fresh);
            self.unanswered_count -= 1;
            self.awaited_first_count -= u64::from(is_first);
        }
        self.open_cells += wanted.wanted.count() + wanted.held.count();
        if has_work {
            self.make_ready(wanted.entry);
        }
        let bytes = self.bytes_of(wanted.entry, &at_start);
        self.progress.durable_bytes += self.bytes_of(wanted.entry, &fresh);
        self.progress.settled_bytes += bytes;
        self.progress.resumed_bytes += bytes;
        Ok(())
    }

    fn handle_reject(&mut self, lane: u32, reject: &Reject) -> Result<(), ProtocolError> {
        let bad = |why: &str| ProtocolError::new(Reason::BadFrame, why);
        let grid = self.config.grid;
        let entry = self.entry_mut(reject.entry)?;
        let cell = grid
            .cell_at(entry.header.byte_len, reject.offset)
            .ok_or_else(|| bad("a refused cell does not exist"))?;
        let id = CellId {
            entry: reject.entry,
            cell,
        };
        let on_way = self.lanes.get_mut(&lane).map(|l| l.on_way.iter_mut());
        let item = on_way
            .into_iter()
            .flatten()
            .find(|item| item.cell == id && !item.rejected);
        item.ok_or_else(|| bad("a cell is refused that was not sent"))?
            .rejected = true;
        let entry = self.entry_mut(reject.entry)?;
        entry.unsettled.remove(cell..cell + 1);
        entry.rechecking.insert(cell..cell + 1);
        self.rechecks.push_back((id, reject.expected_crc32c));
        Ok(())
    }

    fn handle_ack(&mut self, lane: u32, count: u64) -> Result<(), ProtocolError> {
        let bad = |why: String| ProtocolError::new(Reason::BadFrame, why);
        let state = self
            .lanes
            .get_mut(&lane)
            .ok_or_else(|| bad(format!("an ack for lane {lane}, which does not exist")))?;
        let sent = state.acked_count + state.on_way.len() as u64;
        if count < state.acked_count || count > sent {
            return Err(bad(format!(
                "lane {lane} acks {count} chunks after {}, {sent} were sent",
                state.acked_count
            )));
        }
        let settled: Vec<OnLane> = state
            .on_way
            .drain(..(count - state.acked_count) as usize)
            .collect();
        state.acked_count = count;
        for item in settled {
            let len = self.span(item.cell).map_or(0, |(_, len)| u64::from(len));
            self.land(len);
            if item.rejected {
                continue;
            }
            let entry = self.entry_mut(item.cell.entry)?;
            entry.unsettled.remove(item.cell.cell..item.cell.cell + 1);
            self.open_cells -= 1;
            self.progress.settled_bytes += len;
            self.progress.acked_bytes += len;
        }
        Ok(())
    }

    fn handle_durable(&mut self, durable: &Durable) -> Result<(), ProtocolError> {
        let entry = self.entry_mut(durable.entry)?;
        if !RangeSet::of(0..entry.cell_count).is_superset(&durable.ranges) {
            return Err(ProtocolError::new(
                Reason::BadFrame,
                "a durable cell does not exist",
            ));
        }
        let mut fresh = durable.ranges.clone();
        fresh.subtract(&entry.durable);
        entry.durable.union_with(&fresh);
        // What a dead lane brought may be durable although its ack was lost.
        let arrived = entry.pending.intersection(&fresh);
        entry.pending.subtract(&arrived);
        self.open_cells -= arrived.count();
        self.progress.settled_bytes += self.bytes_of(durable.entry, &arrived);
        self.progress.durable_bytes += self.bytes_of(durable.entry, &fresh);
        Ok(())
    }

    fn handle_keep(&mut self, keep: &Keep) -> Result<(), ProtocolError> {
        let entry = self.entry_mut(keep.entry)?;
        if !entry.comparing.is_superset(&keep.ranges) {
            return Err(ProtocolError::new(
                Reason::BadFrame,
                "a cell is kept that was not compared",
            ));
        }
        entry.comparing.subtract(&keep.ranges);
        self.comparing_count -= keep.ranges.count();
        self.open_cells -= keep.ranges.count();
        let bytes = self.bytes_of(keep.entry, &keep.ranges);
        self.progress.settled_bytes += bytes;
        self.progress.resumed_bytes += bytes;
        Ok(())
    }

    /// A cell is about to be handed to a lane, after all that were handed to it
    /// before. `false`: it is not to be sent, because the lane is gone or the cell
    /// became durable while it waited.
    pub fn sent(&mut self, lane: u32, cell: CellId) -> bool {
        let is_first = self.entries.get(cell.entry as usize);
        let is_first = is_first.is_some_and(|entry| entry.is_first);
        self.first_on_hand = self.first_on_hand.saturating_sub(u64::from(is_first));
        let len = self.span(cell).map_or(0, |(_, len)| u64::from(len));
        let durable = self
            .entries
            .get(cell.entry as usize)
            .is_some_and(|entry| entry.durable.contains(cell.cell));
        if !durable && let Some(lane) = self.lanes.get_mut(&lane) {
            lane.on_way.push_back(OnLane {
                cell,
                rejected: false,
            });
            return true;
        }
        self.land(len);
        self.take_back(cell, len);
        false
    }

    /// A refused cell was read again. `same` = with the checksum that was sent:
    /// it was damaged on the way and goes out again.
    ///
    /// # Errors
    /// The source changed.
    pub fn rechecked(&mut self, cell: CellId, same: bool) -> Result<(), ProtocolError> {
        let entry = self.entry_mut(cell.entry)?;
        if !same {
            return Err(ProtocolError::new(
                Reason::SourceChanged,
                format!(
                    "the bytes of {:?} changed while they were sent",
                    entry.header.name
                ),
            ));
        }
        entry.rechecking.remove(cell.cell..cell.cell + 1);
        let len = self.span(cell).map_or(0, |(_, len)| u64::from(len));
        self.take_back(cell, len);
        Ok(())
    }

    /// The next thing to do, or `None` until a frame or a result comes.
    pub fn poll(&mut self) -> Option<SendAction> {
        if let Some((cell, sent_crc32c)) = self.rechecks.pop_front() {
            return Some(SendAction::Recheck { cell, sent_crc32c });
        }
        let keeps_up = self.unanswered_count < MAX_UNANSWERED;
        if (self.announced_count as usize) < self.entries.len() && keeps_up {
            let end = (self.announced_count + ANNOUNCE_BATCH).min(self.entries.len() as u32);
            let range = self.announced_count..end;
            self.announced_count = range.end;
            self.unanswered_count += u64::from(range.end - range.start);
            return Some(SendAction::Announce(range));
        }
        self.poll_cell().or_else(|| self.poll_finish())
    }

    fn poll_cell(&mut self) -> Option<SendAction> {
        loop {
            let queue = match self.ready_first.is_empty() {
                false => &mut self.ready_first,
                true if self.holds_back() => return None,
                true => &mut self.ready,
            };
            let &number = queue.front()?;
            let grid = self.config.grid;
            let Some(entry) = self.entries.get_mut(number as usize) else {
                queue.pop_front();
                continue;
            };
            let first_held = entry.held.iter().next();
            if let Some(held) = first_held
                && self.comparing_count < MAX_COMPARE_CELLS
            {
                let room = MAX_COMPARE_CELLS - self.comparing_count;
                let cells = held.start..held.end.min(held.start + room.min(MAX_COMPARE_CELLS / 4));
                entry.held.remove(cells.clone());
                entry.comparing.insert(cells.clone());
                self.comparing_count += cells.end - cells.start;
                return Some(SendAction::Compare {
                    entry: number,
                    cells,
                });
            }
            if let Some(cell) = entry.pending.first() {
                let (_, len) = grid.cell_span(entry.header.byte_len, cell)?;
                let len = u64::from(len);
                let is_full = self.in_flight_bytes + len > self.config.window_bytes
                    || self.in_flight_count >= MAX_IN_FLIGHT_CELLS;
                if self.in_flight_count > 0 && is_full {
                    return None;
                }
                entry.pending.pop_first();
                self.first_on_hand += u64::from(entry.is_first);
                entry.unsettled.insert(cell..cell + 1);
                self.in_flight_bytes += len;
                self.in_flight_count += 1;
                return Some(SendAction::Send(CellId {
                    entry: number,
                    cell,
                }));
            }
            if !entry.held.is_empty() {
                // Too many cells are under comparison already.
                return None;
            }
            entry.is_ready = false;
            queue.pop_front();
        }
    }

    fn poll_finish(&mut self) -> Option<SendAction> {
        let all_settled = self.open_cells == 0 && self.unanswered_count == 0;
        if !self.sealed || self.finish_sent || !all_settled {
            return None;
        }
        self.finish_sent = true;
        Some(SendAction::Finish(Finish {
            entry_count: self.entries.len() as u64,
            total_bytes: self.progress.total_bytes,
            entries_digest: digest_entries(self.entries.iter().map(|e| &e.header)),
            fingerprint: self.fingerprint,
        }))
    }

    fn entry_mut(&mut self, number: u32) -> Result<&mut Sending, ProtocolError> {
        let known = number < self.announced_count;
        self.entries
            .get_mut(number as usize)
            .filter(|_| known)
            .ok_or_else(|| {
                ProtocolError::new(
                    Reason::BadFrame,
                    format!("entry {number} was not announced"),
                )
            })
    }

    fn bytes_of(&self, number: u32, cells: &RangeSet) -> u64 {
        let Some(entry) = self.entries.get(number as usize) else {
            return 0;
        };
        let len = entry.header.byte_len;
        let bytes = |r: Range<u64>| self.config.grid.span_bytes(len, r.start, r.end - r.start);
        cells.iter().map(bytes).sum()
    }

    /// For tests: nothing that is durable is still to be sent.
    #[cfg(any(test, feature = "__internals"))]
    pub(crate) fn check_invariants(&self) {
        for entry in &self.entries {
            for cell in entry.pending.members() {
                assert!(
                    !entry.durable.contains(cell),
                    "a durable cell is to be sent again"
                );
            }
        }
    }

    /// Durable cells by entry, for tests.
    #[cfg(any(test, feature = "__internals"))]
    pub(crate) fn durable_cells(&self) -> impl Iterator<Item = &RangeSet> {
        self.entries.iter().map(|entry| &entry.durable)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{format::Dtype, plan::CHUNK_LEN_MIN};

    #[test]
    fn nothing_overtakes_what_goes_first() {
        let config = SenderConfig {
            grid: Grid::new(CHUNK_LEN_MIN).unwrap(),
            window_bytes: 1 << 30,
        };
        let mut sender = Sender::new(config, None);
        let len = 2 * u64::from(CHUNK_LEN_MIN);
        for (name, is_first) in [("a", false), ("b", true)] {
            let header = EntryHeader::tensor(name, Dtype::U8, &[len]).unwrap();
            sender.add(header, is_first);
        }
        sender.seal();
        assert_eq!(sender.poll(), Some(SendAction::Announce(0..2)));
        let answer = |entry| ReceiverFrame {
            wanted: vec![Wanted {
                entry,
                wanted: RangeSet::of(0..2),
                held: RangeSet::new(),
                last: true,
            }],
            ..ReceiverFrame::default()
        };
        sender.handle(0, &answer(0)).unwrap();
        // The other is wanted, and nothing is known of this one.
        assert_eq!(sender.poll(), None);
        sender.handle(0, &answer(1)).unwrap();
        let cell = |entry, cell| CellId { entry, cell };
        let send = |entry, number| Some(SendAction::Send(cell(entry, number)));
        assert_eq!(sender.poll(), send(1, 0));
        assert_eq!(sender.poll(), send(1, 1));
        // They are being read, one of them longer than the other.
        assert_eq!(sender.poll(), None);
        assert!(sender.sent(0, cell(1, 1)));
        assert_eq!(sender.poll(), None);
        assert!(sender.sent(0, cell(1, 0)));
        assert_eq!(sender.poll(), send(0, 0));
    }

    #[test]
    fn a_receiver_that_asks_again_and_again_makes_nothing_grow() {
        let config = SenderConfig {
            grid: Grid::new(CHUNK_LEN_MIN).unwrap(),
            window_bytes: 1,
        };
        let mut sender = Sender::new(config, None);
        let len = 4 * u64::from(CHUNK_LEN_MIN);
        sender.add(EntryHeader::tensor("t", Dtype::U8, &[len]).unwrap(), false);
        sender.seal();
        sender.poll();
        let ask = |wanted, last| ReceiverFrame {
            wanted: vec![Wanted {
                entry: 0,
                wanted,
                held: RangeSet::new(),
                last,
            }],
            ..ReceiverFrame::default()
        };
        sender.handle(0, &ask(RangeSet::of(0..4), false)).unwrap();
        for last in [false, true, false] {
            // Nothing is wanted, which is no offence.
            for _ in 0..if last { 1 } else { 1000 } {
                sender.handle(0, &ask(RangeSet::new(), last)).unwrap();
            }
            assert_eq!(sender.ready.len(), 1);
        }
    }
}
