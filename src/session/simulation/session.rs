//! One session: both roles, their jobs, and the link between them.

use super::{
    Mutant, Rng,
    source::{Source, View, grid},
};
use crate::{
    format::{
        checksum::crc32c,
        codec::{Codec, CodecChoice, Encoded, decode_into},
    },
    plan::CellId,
    protocol::{
        Announcement, Arrival, Batch, ChunkHead, Compare, CompareJob, Finish, Group, Placement,
        ProtocolError, Receiver, ReceiverFrame, SendAction, Sender, SenderConfig, Ticket,
    },
};
use std::collections::VecDeque;

/// What travels to the receiver, with the bytes of its chunks.
#[derive(Clone, Debug)]
pub(super) enum Frame {
    Batch(Batch, Vec<Vec<u8>>),
    Compare(Compare),
    Finish(Finish),
    Abort,
}

/// Work that the sender has under way.
#[derive(Debug)]
pub(super) enum Reading {
    Cell(CellId),
    Hashes {
        entry: u32,
        cells: std::ops::Range<u64>,
    },
    Again {
        cell: CellId,
        sent_crc32c: u32,
    },
}

/// A group on its way to the disk: syncs of single files, names, records.
#[derive(Debug)]
pub(super) struct Committing {
    pub(super) group: Group,
    pub(super) steps: VecDeque<CommitStep>,
}

/// One thing that a crash may fall before or behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CommitStep {
    File(usize),
    Names,
    Append,
    SyncJournal,
    Acknowledge,
}

/// A lane beside the control lane. Its ends notice its loss one after the other.
#[derive(Debug)]
pub(super) struct Joined {
    pub(super) number: u32,
    pub(super) to_receiver: VecDeque<Frame>,
    pub(super) to_sender: VecDeque<ReceiverFrame>,
    pub(super) is_lost_to_sender: bool,
    pub(super) is_lost_to_receiver: bool,
}

#[derive(Debug)]
pub(super) struct Session {
    pub(super) view: View,
    /// `None` once it is gone.
    pub(super) sender: Option<Sender>,
    /// It said Abort and only listens.
    pub(super) is_leaving: bool,
    pub(super) sender_idle: bool,
    pub(super) readings: Vec<Reading>,
    prepared: VecDeque<(CellId, ChunkHead, Vec<u8>)>,
    pub(super) sent_count: u64,
    /// What the source had when it was checked before Finish.
    pub(super) finished: Option<Vec<Vec<u8>>>,

    pub(super) receiver: Receiver,
    pub(super) has_ended: bool,
    pub(super) receiver_idle: bool,
    /// With codec and encoded bytes.
    pub(super) verifying: Vec<(Ticket, Codec, Vec<u8>)>,
    pub(super) placing: Vec<(Placement, Vec<u8>)>,
    pub(super) comparing: Vec<(CompareJob, Option<Vec<u8>>)>,
    pub(super) committing: Option<Committing>,

    pub(super) to_receiver: VecDeque<Frame>,
    pub(super) to_sender: VecDeque<ReceiverFrame>,
    pub(super) lanes: Vec<Joined>,
    pub(super) last_lane: u32,
    codec: CodecChoice,
    /// A cell may be durable without its sender having heard of it.
    pub(super) has_lost_lane: bool,
    /// The link lost, doubled or swapped something, which the real one never does.
    pub(super) is_link_broken: bool,
    pub(super) is_link_noisy: bool,
    pub(super) has_source_changed: bool,
}

/// Some entries of every schedule go before the others.
fn is_first(header: &crate::plan::EntryHeader) -> bool {
    header.name.bytes().map(u32::from).sum::<u32>() % 3 == 0
}

impl Session {
    pub(super) fn new(
        view: View,
        receiver: Receiver,
        window_bytes: u64,
        codec: CodecChoice,
    ) -> Self {
        let mut sender = Sender::new(
            SenderConfig {
                grid: grid(),
                window_bytes,
            },
            None,
        );
        view.entries
            .iter()
            .for_each(|(_, header, _)| sender.add(header.clone(), is_first(header)));
        sender.seal();
        let sources = Batch {
            sources: view.states.clone(),
            ..Batch::default()
        };
        Session {
            to_receiver: VecDeque::from([Frame::Batch(sources, Vec::new())]),
            view,
            sender: Some(sender),
            is_leaving: false,
            sender_idle: false,
            readings: Vec::new(),
            prepared: VecDeque::new(),
            sent_count: 0,
            finished: None,
            receiver,
            has_ended: false,
            receiver_idle: false,
            verifying: Vec::new(),
            placing: Vec::new(),
            comparing: Vec::new(),
            committing: None,
            to_sender: VecDeque::new(),
            lanes: Vec::new(),
            last_lane: 0,
            codec,
            has_lost_lane: false,
            is_link_broken: false,
            is_link_noisy: false,
            has_source_changed: false,
        }
    }

    /// The connection is gone: nothing under way arrives, both sides notice.
    pub(super) fn cut(&mut self) {
        self.drop_sender();
        self.to_receiver.clear();
        self.to_sender.clear();
        self.lanes.clear();
        self.end_receiver();
    }

    /// One lane more, as far as the receiver allows.
    pub(super) fn join(&mut self) -> Result<(), ProtocolError> {
        let Some(sender) = &mut self.sender else {
            return Ok(());
        };
        self.last_lane += 1;
        self.receiver.join(self.last_lane)?;
        sender.join(self.last_lane);
        self.lanes.push(Joined {
            number: self.last_lane,
            to_receiver: VecDeque::new(),
            to_sender: VecDeque::new(),
            is_lost_to_sender: false,
            is_lost_to_receiver: false,
        });
        Ok(())
    }

    /// One end of a lane notices that it is broken; what the other end has sent
    /// before may still arrive there or not.
    pub(super) fn lose_lane(&mut self, at: usize, rng: &mut Rng) {
        let lane = &mut self.lanes[at];
        self.has_lost_lane = true;
        if !lane.is_lost_to_sender && (lane.is_lost_to_receiver || rng.chance(500)) {
            lane.is_lost_to_sender = true;
            lane.to_sender.clear();
            self.sender_idle = false;
            if let Some(sender) = &mut self.sender {
                sender.leave(lane.number);
            }
        } else {
            lane.is_lost_to_receiver = true;
            lane.to_receiver.clear();
            self.receiver_idle = false;
            self.receiver.leave(lane.number);
        }
        self.lanes
            .retain(|l| !l.is_lost_to_sender || !l.is_lost_to_receiver);
    }

    pub(super) fn drop_sender(&mut self) {
        self.sender = None;
        self.readings.clear();
        self.prepared.clear();
    }

    /// What the receiving loop does when its session is over.
    pub(super) fn end_receiver(&mut self) {
        self.has_ended = true;
        self.receiver_idle = false;
        self.receiver.end();
    }

    /// The receiver's process has nothing left to do for this session.
    pub(super) fn is_over(&self) -> bool {
        let no_jobs =
            self.verifying.is_empty() && self.placing.is_empty() && self.comparing.is_empty();
        self.has_ended && self.receiver_idle && no_jobs && self.committing.is_none()
    }

    pub(super) fn can_hand_over(&self) -> bool {
        !self.prepared.is_empty() && !self.is_leaving
    }

    /// The next thing that the sending role asks for.
    pub(super) fn poll_sender(&mut self, source: &Source) -> Option<SendAction> {
        let action = self.sender.as_mut()?.poll();
        self.sender_idle = action.is_none();
        match action.clone()? {
            SendAction::Announce(range) => {
                let entries = range.clone().map(|i| {
                    let (_, header, sources) = &self.view.entries[i as usize];
                    Announcement {
                        header: header.clone(),
                        sources: sources.clone(),
                        source_name: None,
                        aliases: Vec::new(),
                        crc32c: None,
                        trainable: None,
                        is_first: is_first(header),
                    }
                });
                let batch = Batch {
                    first_entry: range.start,
                    entries: entries.collect(),
                    ..Batch::default()
                };
                self.to_receiver.push_back(Frame::Batch(batch, Vec::new()));
            }
            SendAction::Send(cell) => self.readings.push(Reading::Cell(cell)),
            SendAction::Compare { entry, cells } => {
                self.readings.push(Reading::Hashes { entry, cells })
            }
            SendAction::Recheck { cell, sent_crc32c } => {
                self.readings.push(Reading::Again { cell, sent_crc32c })
            }
            SendAction::Finish(finish) => {
                if source.is_as_opened(&self.view) {
                    let bytes = self
                        .view
                        .entries
                        .iter()
                        .map(|(i, ..)| source.contents[*i].bytes.clone());
                    self.finished = Some(bytes.collect());
                    self.to_receiver.push_back(Frame::Finish(finish));
                } else {
                    self.leave();
                }
            }
        }
        action
    }

    /// The sender gives up and listens a little longer.
    pub(super) fn leave(&mut self) {
        self.to_receiver.push_back(Frame::Abort);
        self.is_leaving = true;
        self.sender_idle = true;
        self.readings.clear();
    }

    /// Reads from the source as it is now.
    pub(super) fn read(&mut self, at: usize, source: &Source) -> Result<(), ProtocolError> {
        let Some(sender) = &mut self.sender else {
            return Ok(());
        };
        let read = |sender: &Sender, cell: CellId| {
            let (offset, len) = sender
                .span(cell)
                .expect("the role named a cell that exists");
            let bytes = &source.contents[self.view.entries[cell.entry as usize].0].bytes;
            (offset, bytes[offset as usize..][..len as usize].to_vec())
        };
        match self.readings.swap_remove(at) {
            Reading::Cell(cell) => {
                let (offset, bytes) = read(sender, cell);
                let (raw_len, sum) = (bytes.len() as u32, crc32c(&bytes));
                let (codec, bytes) = match self.codec.encode(u32::MAX, &bytes, 1) {
                    Encoded::Raw => (Codec::None, bytes),
                    Encoded::As(codec, encoded) => (codec, encoded),
                };
                let head = ChunkHead {
                    entry: cell.entry,
                    offset,
                    raw_len,
                    encoded_len: bytes.len() as u32,
                    codec: codec.id(),
                    crc32c: sum,
                };
                self.prepared.push_back((cell, head, bytes));
            }
            Reading::Hashes { entry, cells } => {
                let hash = |cell| *blake3::hash(&read(sender, CellId { entry, cell }).1).as_bytes();
                let (first_cell, hashes) = (cells.start, cells.map(hash).collect());
                self.to_receiver.push_back(Frame::Compare(Compare {
                    entry,
                    first_cell,
                    hashes,
                }));
            }
            Reading::Again { cell, sent_crc32c } => {
                let same = crc32c(&read(sender, cell).1) == sent_crc32c;
                self.sender_idle = false;
                sender.rechecked(cell, same)?;
            }
        }
        Ok(())
    }

    /// Some prepared chunks go out in one frame of some lane.
    pub(super) fn hand_over(&mut self, rng: &mut Rng) {
        let Some(sender) = &mut self.sender else {
            return;
        };
        let count = 1 + rng.below(self.prepared.len().min(3));
        let at = rng.below(self.lanes.len() + 1);
        let lane = at.checked_sub(1).map(|at| &mut self.lanes[at]);
        let number = lane.as_ref().map_or(0, |lane| lane.number);
        let (mut batch, mut payload) = (Batch::default(), Vec::new());
        for (cell, head, bytes) in self.prepared.drain(..count) {
            if sender.sent(number, cell) {
                self.sent_count += 1;
                batch.chunks.push(head);
                payload.push(bytes);
            } else {
                self.sender_idle = false;
            }
        }
        match lane {
            _ if batch.chunks.is_empty() => {}
            None => self.to_receiver.push_back(Frame::Batch(batch, payload)),
            Some(lane) if !lane.is_lost_to_receiver => {
                lane.to_receiver.push_back(Frame::Batch(batch, payload));
            }
            // Sent into a void.
            Some(_) => {}
        }
    }

    /// A frame reaches the receiver.
    pub(super) fn take_frame(&mut self, lane: u32, frame: Frame) -> Result<(), ProtocolError> {
        self.receiver_idle = false;
        match frame {
            Frame::Batch(batch, payload) => {
                if lane == 0 {
                    self.receiver.announce(&batch)?;
                }
                for (head, bytes) in batch.chunks.iter().zip(payload) {
                    if let Arrival::Take(ticket) = self.receiver.arrive(lane, head)? {
                        let codec = Codec::from_id(head.codec).expect("a codec of ours");
                        self.verifying.push((ticket, codec, bytes));
                    }
                }
            }
            Frame::Compare(compare) => self.receiver.compare(&compare)?,
            Frame::Finish(finish) => self.receiver.finish(finish)?,
            Frame::Abort => self.end_receiver(),
        }
        Ok(())
    }

    /// A worker checks a chunk and asks for its place.
    pub(super) fn verify(&mut self, at: usize, mutant: Mutant) -> Result<(), ProtocolError> {
        self.receiver_idle = false;
        let (ticket, codec, encoded) = self.verifying.swap_remove(at);
        let mut bytes = vec![0; ticket.raw_len as usize];
        decode_into(codec, &encoded, &mut bytes).expect("only payloads are damaged");
        let found = crc32c(&bytes);
        if found != ticket.crc32c && mutant != Mutant::SkipCrc {
            return self.receiver.reject(ticket, found);
        }
        if let Some(placement) = self.receiver.grant(ticket) {
            let same = |(other, _): &(Placement, _)| {
                (other.slot().number, other.offset())
                    == (placement.slot().number, placement.offset())
            };
            assert!(!self.placing.iter().any(same), "two placements of one cell");
            self.placing.push((placement, bytes));
        }
        Ok(())
    }
}
