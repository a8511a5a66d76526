//! One session: both roles, their jobs and the link between them.

use super::{CELL_LEN, LANES, Source, store::Store};
use crate::{
    format::codec::Codec,
    plan::CellId,
    protocol::{
        Announcement, Arrival, Batch, ChunkHead, Compare, CompareJob, Finish, Group, Placement,
        ProtocolError, PublishPlan, ReceiveAction, Receiver, ReceiverConfig, ReceiverFrame,
        Recovered, SendAction, Sender, SenderConfig, Ticket,
    },
};
use std::{collections::VecDeque, ops::Range, time::Instant};

/// Polls after which an ended receiver must have nothing left.
const MAX_LAST_POLLS: usize = 1000;

/// What a step did to the session.
#[derive(Debug)]
pub(super) enum Fate {
    Goes,
    Published,
    /// The connection broke.
    Broken,
    /// A role found a fault.
    Failed(ProtocolError),
}

impl From<Result<(), ProtocolError>> for Fate {
    fn from(result: Result<(), ProtocolError>) -> Self {
        result.map_or_else(Fate::Failed, |()| Fate::Goes)
    }
}

/// What travels to the receiver. Beside each head stands the sum of the bytes that
/// arrive with it.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    Batch(Batch, Vec<u32>),
    Compare(Compare),
    Finish(Finish),
}

/// Where a chunk came from and the sum of its bytes.
#[derive(Clone, Copy, Debug)]
struct Arrived {
    lane: u32,
    /// How many came before it on the lane.
    sequence: u64,
    sum: u32,
}

#[derive(Debug)]
enum Reading {
    Cell(CellId),
    Hashes { entry: u32, cells: Range<u64> },
    Again(CellId),
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) sender: Sender,
    pub(super) receiver: Receiver,
    /// Somebody lied: errors are in order, and the sender knows nothing for certain.
    pub(super) is_hostile: bool,
    announcements: Vec<Announcement>,
    readings: Vec<Reading>,
    prepared: VecDeque<(CellId, ChunkHead)>,
    pub(super) to_receiver: [VecDeque<Frame>; LANES.len()],
    pub(super) to_sender: VecDeque<(u32, ReceiverFrame)>,
    /// Chunks that arrived on each lane.
    arrived_counts: [u64; LANES.len()],
    verifying: Vec<(Ticket, Arrived)>,
    placing: Vec<(Placement, Arrived)>,
    comparing: Vec<CompareJob>,
    committing: Option<Group>,
}

impl Session {
    pub(super) fn new(
        source: &Source,
        sender: SenderConfig,
        receiver: ReceiverConfig,
        recovered: Recovered,
    ) -> Self {
        let mut sender = Sender::new(sender, None);
        source
            .headers
            .iter()
            .for_each(|h| sender.add(h.clone(), is_first(h)));
        sender.seal();
        let announcement = |(header, sources): (&_, &Vec<u32>)| {
            let header: &crate::plan::EntryHeader = header;
            announcement(header.clone(), sources.clone())
        };
        let sources = Batch {
            sources: source.states(),
            ..Batch::default()
        };
        let mut receiver = Receiver::new(receiver, recovered);
        for &lane in &LANES[1..] {
            sender.join(lane);
            receiver.join(lane).expect("a fresh lane");
        }
        let mut to_receiver: [VecDeque<Frame>; LANES.len()] = Default::default();
        to_receiver[0].push_back(Frame::Batch(sources, Vec::new()));
        Session {
            sender,
            receiver,
            is_hostile: false,
            announcements: source
                .headers
                .iter()
                .zip(&source.cited)
                .map(announcement)
                .collect(),
            readings: Vec::new(),
            prepared: VecDeque::new(),
            to_receiver,
            to_sender: VecDeque::new(),
            arrived_counts: [0; LANES.len()],
            verifying: Vec::new(),
            placing: Vec::new(),
            comparing: Vec::new(),
            committing: None,
        }
    }

    /// After every step.
    pub(super) fn check(&self) {
        self.receiver.check_invariants();
        if !self.is_hostile {
            self.sender.check_invariants();
        }
    }

    pub(super) fn poll_sender(&mut self) -> Fate {
        let frame = match self.sender.poll() {
            None => return Fate::Goes,
            Some(SendAction::Announce(range)) => {
                let entries = &self.announcements[range.start as usize..range.end as usize];
                let batch = Batch {
                    first_entry: range.start,
                    entries: entries.to_vec(),
                    ..Batch::default()
                };
                Frame::Batch(batch, Vec::new())
            }
            Some(SendAction::Finish(finish)) => Frame::Finish(finish),
            Some(SendAction::Send(cell)) => {
                self.readings.push(Reading::Cell(cell));
                return Fate::Goes;
            }
            Some(SendAction::Compare { entry, cells }) => {
                self.readings.push(Reading::Hashes { entry, cells });
                return Fate::Goes;
            }
            Some(SendAction::Recheck { cell, .. }) => {
                self.readings.push(Reading::Again(cell));
                return Fate::Goes;
            }
        };
        self.to_receiver[0].push_back(frame);
        Fate::Goes
    }

    /// A reading is done; `has_changed` = other bytes than at the first time.
    pub(super) fn read(&mut self, source: &Source, at: usize, has_changed: bool) -> Fate {
        if self.readings.is_empty() {
            return Fate::Goes;
        }
        match self.readings.swap_remove(at % self.readings.len()) {
            Reading::Cell(cell) => {
                let (offset, raw_len) = self.sender.span(cell).expect("the cell exists");
                let head = ChunkHead {
                    entry: cell.entry,
                    offset,
                    raw_len,
                    encoded_len: raw_len,
                    codec: Codec::None.id(),
                    crc32c: source.crc(cell.entry, cell.cell),
                };
                self.prepared.push_back((cell, head));
            }
            Reading::Hashes { entry, cells } => {
                let hash = |cell| hash(source.crc(entry, cell));
                self.to_receiver[0].push_back(Frame::Compare(Compare {
                    entry,
                    first_cell: cells.start,
                    hashes: cells.map(hash).collect(),
                }));
            }
            Reading::Again(cell) => return self.sender.rechecked(cell, !has_changed).into(),
        }
        Fate::Goes
    }

    /// Prepared chunks go out on a lane, the first of them perhaps damaged.
    pub(super) fn hand_over(&mut self, lane: u32, count: usize, is_damaged: bool) -> Fate {
        let (mut batch, mut sums) = (Batch::default(), Vec::new());
        for (cell, head) in self.prepared.drain(..count.min(self.prepared.len())) {
            if !self.sender.sent(lane, cell) {
                continue;
            }
            sums.push(head.crc32c ^ u32::from(is_damaged && sums.is_empty()));
            batch.chunks.push(head);
        }
        if !sums.is_empty() {
            self.to_receiver[lane as usize].push_back(Frame::Batch(batch, sums));
        }
        Fate::Goes
    }

    /// A lane other than the control lane breaks; what is on its way is lost.
    pub(super) fn lose_lane(&mut self, lane: u32) -> Fate {
        if lane != 0 {
            self.to_receiver[lane as usize].clear();
            self.to_sender.retain(|(from, _)| *from != lane);
            self.sender.leave(lane);
            self.receiver.leave(lane);
        }
        Fate::Goes
    }

    pub(super) fn reach_receiver(&mut self, lane: u32) -> Fate {
        let Some(frame) = self.to_receiver[lane as usize].pop_front() else {
            return Fate::Goes;
        };
        match frame {
            Frame::Batch(batch, sums) => self.take_batch(lane, &batch, &sums).into(),
            Frame::Compare(compare) => self.receiver.compare(&compare).into(),
            Frame::Finish(finish) => self.receiver.finish(finish).into(),
        }
    }

    fn take_batch(&mut self, lane: u32, batch: &Batch, sums: &[u32]) -> Result<(), ProtocolError> {
        if lane == 0 {
            self.receiver.announce(batch)?;
        }
        for (head, &sum) in batch.chunks.iter().zip(sums) {
            let arrival = self.receiver.arrive(lane, head)?;
            let count = &mut self.arrived_counts[lane as usize];
            let arrived = Arrived {
                lane,
                sequence: *count,
                sum,
            };
            *count += 1;
            if let Arrival::Take(ticket) = arrival {
                assert_eq!((ticket.offset, ticket.raw_len), (head.offset, head.raw_len));
                self.verifying.push((ticket, arrived));
            }
        }
        Ok(())
    }

    pub(super) fn verify(&mut self, at: usize, store: &Store) -> Fate {
        if self.verifying.is_empty() {
            return Fate::Goes;
        }
        let (ticket, arrived) = self.verifying.swap_remove(at % self.verifying.len());
        if arrived.sum != ticket.crc32c {
            return self.receiver.reject(ticket, arrived.sum).into();
        }
        store.check(&self.receiver);
        if let Some(placement) = self.receiver.grant(ticket) {
            let place = |p: &Placement| (p.slot().number, p.offset());
            let same = |(other, _): &(Placement, _)| place(other) == place(&placement);
            assert!(!self.placing.iter().any(same), "two writers of one cell");
            self.placing.push((placement, arrived));
        }
        Fate::Goes
    }

    /// A write is done, or it fails and the session with it.
    pub(super) fn place(
        &mut self,
        at: usize,
        now: Instant,
        store: &mut Store,
        fails: bool,
    ) -> Fate {
        if self.placing.is_empty() {
            return Fate::Goes;
        }
        let (placement, arrived) = self.placing.swap_remove(at % self.placing.len());
        if fails {
            self.receiver.abandon(placement);
            return Fate::Broken;
        }
        let cell = placement.offset() / u64::from(CELL_LEN);
        store.write(placement.slot(), cell, arrived.sum);
        self.receiver.written(placement.into_written(), now);
        Fate::Goes
    }

    pub(super) fn compare(&mut self, at: usize, now: Instant, store: &Store) -> Fate {
        if self.comparing.is_empty() {
            return Fate::Goes;
        }
        let job = self.comparing.swap_remove(at % self.comparing.len());
        let sum = store.cell(job.slot.number, job.cell);
        self.receiver
            .compared(&job, hash(sum) == job.blake3, sum, now);
        Fate::Goes
    }

    pub(super) fn commit(&mut self, store: &mut Store) -> Fate {
        if let Some(group) = self.committing.take() {
            store.commit(&group);
            self.receiver.committed(group.id);
            store.check(&self.receiver);
        }
        Fate::Goes
    }

    pub(super) fn poll_receiver(&mut self, now: Instant, store: &Store, source: &Source) -> Fate {
        for &lane in &LANES[1..] {
            if let Some(frame) = self.receiver.poll_lane(lane, now) {
                self.say(lane, frame);
            }
        }
        match self.receiver.poll(now) {
            None => {}
            Some(ReceiveAction::Send(frame)) => self.say(0, frame),
            Some(ReceiveAction::Commit(group)) => {
                assert!(self.committing.is_none(), "two groups at once");
                self.committing = Some(group);
            }
            Some(ReceiveAction::Compare(job)) => self.comparing.push(job),
            Some(ReceiveAction::Publish(plan)) => {
                assert!(self.placing.is_empty() && self.committing.is_none());
                self.check_publish(&plan, store, source);
                return Fate::Published;
            }
        }
        Fate::Goes
    }

    fn say(&mut self, lane: u32, frame: ReceiverFrame) {
        assert!(lane == 0 || frame.is_of_any_lane());
        if let Some(count) = frame.ack {
            self.check_ack(lane, count);
        }
        self.to_sender.push_back((lane, frame));
    }

    /// An ack counts chunks that arrived and are done with, without a gap.
    fn check_ack(&self, lane: u32, count: u64) {
        assert!(count <= self.arrived_counts[lane as usize]);
        let verifying = self.verifying.iter().map(|(_, arrived)| arrived);
        let placing = self.placing.iter().map(|(_, arrived)| arrived);
        for chunk in verifying.chain(placing) {
            let is_open = chunk.lane == lane && chunk.sequence < count;
            assert!(!is_open, "an ack of a chunk under way: {chunk:?}");
        }
    }

    fn check_publish(&self, plan: &PublishPlan, store: &Store, source: &Source) {
        for (slot, announcement, _) in &plan.entries {
            assert_eq!(slot.header, announcement.header);
            for cell in 0..slot.header.byte_len.div_ceil(u64::from(CELL_LEN)) {
                let sum = store.durable_sum(&slot.header.name, cell);
                assert_eq!(sum, Some(store.cell(slot.number, cell)), "not durable");
            }
        }
        if self.is_hostile || store.is_tainted {
            return;
        }
        assert_eq!(plan.entries.len(), source.headers.len());
        for (i, (slot, ..)) in (0u32..).zip(&plan.entries) {
            for cell in 0..slot.header.byte_len.div_ceil(u64::from(CELL_LEN)) {
                let (found, expected) = (store.cell(slot.number, cell), source.crc(i, cell));
                assert_eq!(found, expected, "mixed content in {slot:?}");
            }
        }
    }

    pub(super) fn reach_sender(&mut self) -> Fate {
        match self.to_sender.pop_front() {
            Some((lane, frame)) => self.sender.handle(lane, &frame).into(),
            None => Fate::Goes,
        }
    }

    /// The connection is gone: what is written becomes durable.
    pub(super) fn end(&mut self, now: Instant, store: &mut Store, source: &Source) {
        self.receiver.end();
        while !self.verifying.is_empty() {
            self.verify(0, store);
        }
        while !self.placing.is_empty() {
            self.place(0, now, store, false);
        }
        for _ in 0..MAX_LAST_POLLS {
            self.commit(store);
            let waiting = self.to_sender.len();
            self.poll_receiver(now, store, source);
            if self.committing.is_none() && self.to_sender.len() == waiting {
                assert!(self.receiver.is_settled(), "ended and not settled");
                return;
            }
        }
        panic!("an ended receiver still asks: {:?}", self.receiver);
    }
}

/// Some entries go before the others.
fn is_first(header: &crate::plan::EntryHeader) -> bool {
    header.name.bytes().map(u32::from).sum::<u32>() % 3 == 0
}

pub(super) fn announcement(header: crate::plan::EntryHeader, sources: Vec<u32>) -> Announcement {
    Announcement {
        is_first: is_first(&header),
        header,
        sources,
        source_name: None,
        aliases: Vec::new(),
        crc32c: None,
        trainable: None,
    }
}

/// Stands for the BLAKE3 of the bytes that have this sum.
fn hash(sum: u32) -> [u8; 32] {
    let mut hash = [0; 32];
    hash[..4].copy_from_slice(&sum.to_le_bytes());
    hash
}
