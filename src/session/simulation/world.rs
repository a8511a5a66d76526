//! One world: two owners, one disk, sessions one after the other.

use super::{
    Mutant, Rng,
    checks::{self, Ledger},
    disk::{Disk, Journal},
    session::{CommitStep, Committing, Frame, Joined, Session},
    source::{CELL_LEN, Source, View, grid},
};
use crate::{
    format::{checksum::crc32c, codec::CodecChoice},
    protocol::{
        CommitPolicy, Group, GroupCells, Layout, ProtocolError, PublishPlan, Reason, ReceiveAction,
        Receiver, ReceiverConfig, Recovered, RecoveredEntry, SendAction, SlotFile,
    },
    store::journal::{EntryRecord, Record, Run},
};
use std::time::{Duration, Instant};

/// What goes wrong in a world, each per mille of the steps.
#[derive(Clone, Copy, Debug, Default)]
struct Faults {
    lose: u32,
    double: u32,
    swap: u32,
    damage: u32,
    cut: u32,
    kill: u32,
    power: u32,
    change: u32,
    tamper: u32,
    full: u32,
    lane_loss: u32,
}

/// What can happen next.
#[derive(Clone, Copy, Debug)]
enum Event {
    PollSender,
    Read,
    HandOver,
    ToReceiver,
    PollReceiver,
    Verify,
    Place,
    Compare,
    Commit,
    ToSender,
    Join,
    MoveLane,
}

impl Story {
    /// Everything in it with its name.
    pub(super) fn counts(&self) -> [(&'static str, u64); 14] {
        [
            ("sessions", self.sessions),
            ("steps", self.steps),
            ("protocol errors", self.protocol_errors),
            ("crashes", self.crashes),
            ("rejects", self.rejected),
            ("resumed cells", self.resumed_cells),
            ("held cells", self.held_cells),
            ("kept cells", self.kept_cells),
            ("differing cells", self.differing_cells),
            ("forgotten entries", self.forgotten),
            ("adoptions", self.adoptions),
            ("lanes", self.lanes),
            ("lost lanes", self.lost_lanes),
            ("published after trouble", self.recovered),
        ]
    }
}

/// What happened in a world.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Story {
    pub(super) sessions: u64,
    pub(super) steps: u64,
    pub(super) protocol_errors: u64,
    pub(super) crashes: u64,
    pub(super) rejected: u64,
    pub(super) resumed_cells: u64,
    pub(super) held_cells: u64,
    pub(super) kept_cells: u64,
    pub(super) differing_cells: u64,
    pub(super) forgotten: u64,
    pub(super) adoptions: u64,
    pub(super) lanes: u64,
    pub(super) lost_lanes: u64,
    /// Sessions that published once the trouble stopped.
    pub(super) recovered: u64,
}

#[derive(Debug)]
pub(super) struct World {
    rng: Rng,
    mutant: Mutant,
    now: Instant,
    faults: Faults,
    layout: Layout,
    commit: CommitPolicy,
    window_bytes: u64,
    /// Lanes that a session tries to have beside the control lane.
    lane_wish: usize,
    codec: CodecChoice,
    sources: [Source; 2],
    view: View,
    disk: Disk,
    journal: Journal,
    ledger: Ledger,
    session: Option<Session>,
    is_published: bool,
    story: Story,
}

impl World {
    pub(super) fn new(seed: u64, mutant: Mutant) -> Self {
        let mut rng = Rng::new(seed);
        let first = Source::new(&mut rng);
        let sources = [first.clone(), first.of_another_owner(&mut rng)];
        let mut faults = Faults {
            cut: rng.pick(&[0, 3, 10]),
            kill: rng.pick(&[0, 3, 10]),
            power: rng.pick(&[0, 5, 20]),
            change: rng.pick(&[0, 3, 20]),
            damage: rng.pick(&[0, 30, 200]),
            tamper: rng.pick(&[0, 0, 20]),
            full: rng.pick(&[0, 0, 20]),
            lane_loss: rng.pick(&[0, 10, 100]),
            ..Faults::default()
        };
        if rng.chance(250) {
            (faults.lose, faults.double, faults.swap) =
                (rng.pick(&[0, 20]), rng.pick(&[0, 20]), rng.pick(&[0, 20]));
        }
        let bytes = 8 + rng.below(100) as u64;
        let commit = CommitPolicy {
            bytes,
            files: 1 + rng.below(6),
            interval: rng
                .chance(700)
                .then(|| Duration::from_millis(1 + rng.below(50) as u64)),
            max_undurable_bytes: bytes + rng.below(64) as u64,
        };
        World {
            mutant,
            now: Instant::now(),
            faults,
            layout: rng.pick(&[Layout::Named, Layout::Indexed]),
            commit,
            window_bytes: 8 + rng.below(57) as u64,
            lane_wish: rng.pick(&[0, 1, 2, 2]),
            codec: rng.pick(&[CodecChoice::None, CodecChoice::Lz4]),
            view: sources[0].open(0, true, mutant == Mutant::TrustUnsettled),
            sources,
            disk: Disk::default(),
            journal: Journal::new(grid()),
            ledger: Ledger::default(),
            session: None,
            is_published: false,
            story: Story::default(),
            rng,
        }
    }

    /// Trouble first, then a clean session that must reach its end.
    pub(super) fn run(mut self) -> Story {
        let budget = 50 + self.rng.below(400);
        for _ in 0..budget {
            self.step();
            if self.is_published {
                return self.story;
            }
        }
        self.faults = Faults::default();
        // What is under way goes on by itself, unless the link has lost something.
        let goes_on = self.rng.chance(500);
        if let Some(session) = &mut self.session {
            // Of a broken lane both ends come to know.
            let is_lost = |l: &Joined| l.is_lost_to_sender || l.is_lost_to_receiver;
            while let Some(at) = session.lanes.iter().position(is_lost) {
                session.lose_lane(at, &mut self.rng);
            }
            if session.is_link_broken || !goes_on {
                session.cut();
            }
        }
        for _ in 0..3000 {
            if self.session.is_none() {
                break;
            }
            self.step();
            if self.is_published {
                self.story.recovered += 1;
                return self.story;
            }
        }
        assert!(self.session.is_none(), "a session does not end");
        self.reopen();
        let last = self.story.sessions + 1;
        for _ in 0..3000 {
            self.step();
            if self.is_published {
                return self.story;
            }
            assert!(self.story.sessions <= last, "a clean session failed");
        }
        panic!("a clean session does not reach its end");
    }

    fn step(&mut self) {
        self.story.steps += 1;
        self.now += Duration::from_micros(self.rng.below(2000) as u64);
        let Some(mut session) = self.session.take() else {
            self.begin_session();
            self.check();
            return;
        };
        if self.rng.chance(self.faults.change) {
            self.sources[session.view.owner].change(&mut self.rng);
            session.has_source_changed = true;
        }
        if self.rng.chance(self.faults.cut) {
            match self.rng.below(3) {
                0 if session.sender.is_some() && !session.is_leaving => session.leave(),
                _ => session.cut(),
            }
        }
        let kill = self.rng.chance(self.faults.kill);
        if kill || self.rng.chance(self.faults.power) {
            self.crash(session, !kill);
            self.check();
            return;
        }
        if !session.placing.is_empty() && self.rng.chance(self.faults.full) {
            // The disk takes no more: the session ends, and nothing of it is committed.
            let (placement, _) = session.placing.swap_remove(0);
            session.receiver.abandon(placement);
            session.receiver.check_invariants();
            self.crash(session, false);
            self.check();
            return;
        }
        let result = self.act(&mut session);
        if let Err(error) = result {
            self.judge(&session, &error);
            session.cut();
        }
        if session.is_over() {
            self.disk.close_all();
        } else if !self.is_published {
            self.session = Some(session);
        }
        self.check();
    }

    fn check(&self) {
        checks::check(
            self.session.as_ref(),
            &self.ledger,
            &self.disk,
            &self.journal,
        );
    }

    /// Errors are the link's fault or the source's, never that of a role.
    fn judge(&mut self, session: &Session, error: &ProtocolError) {
        self.story.protocol_errors += 1;
        let is_excused = session.is_link_broken
            || (error.reason == Reason::SourceChanged && session.has_source_changed)
            || (error.reason == Reason::Checksum && session.is_link_noisy);
        assert!(is_excused, "{}: {}", error.reason, error.message);
    }

    /// One event out of those that can happen.
    fn act(&mut self, session: &mut Session) -> Result<(), ProtocolError> {
        let listens = session.sender.is_some();
        let possible = [
            (
                listens && !session.sender_idle && !session.is_leaving,
                Event::PollSender,
            ),
            (!session.readings.is_empty(), Event::Read),
            (session.can_hand_over(), Event::HandOver),
            (
                !session.to_receiver.is_empty() && !session.has_ended,
                Event::ToReceiver,
            ),
            (!session.receiver_idle, Event::PollReceiver),
            (!session.verifying.is_empty(), Event::Verify),
            (!session.placing.is_empty(), Event::Place),
            (!session.comparing.is_empty(), Event::Compare),
            (session.committing.is_some(), Event::Commit),
            (listens && !session.to_sender.is_empty(), Event::ToSender),
            (
                listens
                    && !session.has_ended
                    && session.lanes.len() < self.lane_wish
                    && session.last_lane < 6,
                Event::Join,
            ),
            (
                session.lanes.iter().any(|l| {
                    !l.to_receiver.is_empty()
                        || !l.to_sender.is_empty()
                        || l.is_lost_to_sender
                        || l.is_lost_to_receiver
                }),
                Event::MoveLane,
            ),
        ];
        let count = possible
            .iter()
            .filter(|(is_possible, _)| *is_possible)
            .count();
        if count == 0 {
            self.wait(session);
            return Ok(());
        }
        let chosen = self.rng.below(count);
        let Some((_, event)) = possible
            .iter()
            .filter(|(is_possible, _)| *is_possible)
            .nth(chosen)
        else {
            return Ok(());
        };
        let source = &self.sources[session.view.owner];
        match event {
            Event::PollSender => {
                if let Some(SendAction::Send(cell)) = session.poll_sender(source) {
                    let name = &session.view.entries[cell.entry as usize].1.name;
                    let again = self.ledger.contains(name, cell.cell)
                        && !session.is_link_broken
                        && !session.has_lost_lane;
                    assert!(
                        !again,
                        "cell {} of {name:?} was acked durable and is sent again",
                        cell.cell
                    );
                }
                Ok(())
            }
            Event::Read => {
                let at = self.rng.below(session.readings.len());
                session.read(at, source)
            }
            Event::HandOver => {
                session.hand_over(&mut self.rng);
                Ok(())
            }
            Event::ToReceiver => self.deliver(session),
            Event::PollReceiver => {
                self.poll_receiver(session);
                Ok(())
            }
            Event::Verify => {
                let at = self.rng.below(session.verifying.len());
                session.verify(at, self.mutant)
            }
            Event::Place => {
                let (placement, bytes) = session
                    .placing
                    .swap_remove(self.rng.below(session.placing.len()));
                self.disk.write(
                    placement.slot(),
                    placement.is_recorded(),
                    placement.offset(),
                    &bytes,
                );
                session.receiver_idle = false;
                session.receiver.written(placement.into_written(), self.now);
                Ok(())
            }
            Event::Compare => {
                self.compare(session);
                Ok(())
            }
            Event::Commit => {
                self.commit_step(session);
                Ok(())
            }
            Event::ToSender => self.answer(session),
            Event::Join => {
                self.story.lanes += 1;
                session.join()
            }
            Event::MoveLane => self.move_lane(session),
        }
    }

    /// Nothing can happen but the passing of time.
    fn wait(&mut self, session: &mut Session) {
        match session.receiver.wake_at() {
            Some(at) if !session.has_ended => {
                self.now = self.now.max(at);
                session.receiver_idle = false;
            }
            _ => {
                assert!(
                    session.is_link_broken,
                    "the session stands still: {session:#?}"
                );
                session.cut();
            }
        }
    }
}

mod link;
mod recover;
mod store;
