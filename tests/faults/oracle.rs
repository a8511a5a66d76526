//! A sender that is never killed and forgets nothing that it was told.
//!
//! It speaks the protocol by hand. Every durable ack and every Done that it receives goes
//! into its [`Track`]; at a moment that the caller chose it strikes, then hears the rest.

use crate::{
    dice::Dice,
    frames::{CHUNK, frame_abort, frame_finish, frame_open},
    strike::{Moment, Strike},
    track::{Cells, Track},
};
use std::{
    collections::{BTreeSet, VecDeque},
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};
use tensorferry::wire::pb::{self, ferry_client::FerryClient, receiver_frame::Control as Answer};
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_types::StatusExt;

/// Nothing may take this long; only a hang does.
const HANG: Duration = Duration::from_secs(60);
/// How long a session whose disk was struck is listened to.
const FAREWELL: Duration = Duration::from_millis(150);

/// How a session ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum End {
    /// Done, and the call ended with OK.
    Done,
    /// The server refused or gave up, with its reason.
    Refused(Code, String),
    /// The connection is gone, or was left after a strike.
    Gone(String),
}

/// How the oracle sends.
#[derive(Clone, Debug, Default)]
pub(crate) struct Manner {
    /// Time between chunks.
    pub(crate) pause: Duration,
    /// Leave after so many chunks, as a client that dies.
    pub(crate) leave_after: Option<u64>,
    /// Leave by Abort, and hear the end.
    pub(crate) says_goodbye: bool,
    /// Without a word for so long, the call hangs; the server need not be right then.
    pub(crate) patience: Option<Duration>,
}

/// One session on its way.
struct Call<'a> {
    track: &'a mut Track,
    root: Option<&'a Path>,
    strike: Strike,
    dice: Dice,
    out: mpsc::Sender<pb::SenderFrame>,
    queue: VecDeque<(u32, u64)>,
    unsettled: VecDeque<(u32, u64)>,
    wanted: Cells,
    claimed: Cells,
    answered: BTreeSet<u32>,
    settled_count: u64,
    sent_count: u64,
    durable_count: u64,
    window_bytes: u64,
    in_flight: u64,
    stage: Step,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    Opening,
    Announced,
    Sending,
    Finishing,
}

/// A transfer's next session, to its end. `root`: where the server's files can be read.
pub(crate) async fn push(
    track: &mut Track,
    address: SocketAddr,
    root: Option<&Path>,
    strike: Strike,
    manner: &Manner,
    dice: Dice,
) -> End {
    let connected = FerryClient::connect(format!("http://{address}")).await;
    let mut ferry = match connected {
        Ok(ferry) => ferry,
        Err(e) => return End::Gone(e.to_string()),
    };
    let (out, frames_out) = mpsc::channel(4);
    let begun = timeout(HANG, ferry.push(ReceiverStream::new(frames_out))).await;
    let mut frames = match begun {
        Ok(Ok(answer)) => answer.into_inner(),
        Ok(Err(status)) => return end_of(&status),
        Err(_) => return hang(track, "the call does not begin"),
    };
    track.tally.sessions += 1;
    let open = pb::SenderOpen {
        chunk_len: CHUNK as u32,
        commit_mode: track.mode.into(),
        fingerprint: track.fingerprint.to_vec().into(),
        overwrite: true,
        verify: track.verify,
        restart: track.restart,
        out_format: match track.container_header_len {
            0 => pb::OutFormat::Unspecified.into(),
            _ => pb::OutFormat::Safetensors.into(),
        },
        container_header_len: track.container_header_len,
        ..track.load.open(&track.name, track.id)
    };
    if out.send(frame_open(open)).await.is_err() {
        return End::Gone("the call is over".to_owned());
    }
    let nothing = vec![BTreeSet::new(); track.load.parts.len()];
    let call = Call {
        root,
        strike,
        dice,
        out,
        queue: VecDeque::new(),
        unsettled: VecDeque::new(),
        wanted: nothing.clone(),
        claimed: nothing,
        answered: BTreeSet::new(),
        settled_count: 0,
        sent_count: 0,
        durable_count: 0,
        window_bytes: 0,
        in_flight: 0,
        stage: Step::Opening,
        track,
    };
    call.run(&mut frames, manner).await
}

fn hang(track: &mut Track, what: &str) -> End {
    track.fail(format!("nothing happened for {HANG:?}: {what}"));
    End::Gone(what.to_owned())
}

pub(crate) fn end_of(status: &Status) -> End {
    match status.get_details_error_info() {
        Some(info) => End::Refused(status.code(), info.reason),
        None => End::Gone(status.to_string()),
    }
}

impl Call<'_> {
    async fn run(mut self, frames: &mut Streaming<pb::ReceiverFrame>, manner: &Manner) -> End {
        let mut heard_at = Instant::now();
        let mut next_chunk_at = Instant::now();
        let mut tick = tokio::time::interval(Duration::from_millis(1));
        loop {
            let is_enough = manner.leave_after.is_some_and(|n| self.sent_count >= n);
            if is_enough {
                if !manner.says_goodbye {
                    return End::Gone("left on purpose".to_owned());
                }
                if self.stage == Step::Sending && self.unsettled.is_empty() {
                    self.stage = Step::Finishing;
                    let _ = self.out.send(frame_abort("INTERRUPTED")).await;
                }
            }
            if manner
                .patience
                .is_some_and(|most| heard_at.elapsed() > most)
            {
                return End::Gone("out of patience".to_owned());
            }
            if self.strike.fired_for() > FAREWELL && self.strike.leaves() {
                return End::Gone("left after the strike".to_owned());
            }
            if heard_at.elapsed() > HANG {
                return hang(self.track, "the server says nothing");
            }
            let may_send = !is_enough && self.may_send() && Instant::now() >= next_chunk_at;
            let out = self.out.clone();
            tokio::select! {
                frame = frames.message() => {
                    heard_at = Instant::now();
                    match frame {
                        Ok(Some(frame)) => self.hear(frame).await,
                        Ok(None) if self.track.done.is_some() => return End::Done,
                        Ok(None) => {
                            self.track.fail("the call ended with OK and without Done");
                            return End::Gone("no Done".to_owned());
                        }
                        Err(status) => return end_of(&status),
                    }
                }
                permit = out.reserve(), if may_send => {
                    let Ok(permit) = permit else { continue };
                    if let Some((entry, cell)) = self.queue.pop_front() {
                        permit.send(self.track.load.chunk(entry, cell));
                        self.note_sent(entry, cell);
                        next_chunk_at = Instant::now() + manner.pause;
                    }
                }
                _ = tick.tick() => self.strike.at(Moment::Time),
            }
        }
    }

    fn may_send(&self) -> bool {
        self.stage == Step::Sending
            && !self.queue.is_empty()
            && self.in_flight + (CHUNK as u64) <= self.window_bytes.max(CHUNK as u64)
    }

    fn note_sent(&mut self, entry: u32, cell: u64) {
        self.track.sent[entry as usize].insert(cell);
        self.in_flight += self.track.load.cell(entry, cell).len() as u64;
        self.unsettled.push_back((entry, cell));
        self.sent_count += 1;
        self.strike.at(Moment::Sent(self.sent_count));
    }

    async fn hear(&mut self, frame: pb::ReceiverFrame) {
        match frame.control {
            Some(Answer::Accept(accept)) => {
                self.window_bytes = accept.window_bytes;
                self.stage = Step::Announced;
                let _ = self.out.send(self.track.load.announcement()).await;
            }
            Some(Answer::Done(done)) => {
                self.track.note_done(done);
                self.strike.at(Moment::Done);
            }
            Some(other) => self.track.fail(format!("an unexpected frame {other:?}")),
            None => {}
        }
        for wanted in frame.wanted {
            self.hear_wanted(wanted);
        }
        for reject in &frame.rejects {
            self.queue
                .push_back((reject.entry, reject.offset / CHUNK as u64));
        }
        if let Some(ack) = frame.ack {
            while self.settled_count < ack.settled_count {
                let Some((entry, cell)) = self.unsettled.pop_front() else {
                    self.track.fail("an ack of what was not sent");
                    break;
                };
                self.settled_count += 1;
                self.in_flight -= self.track.load.cell(entry, cell).len() as u64;
            }
        }
        for durable in frame.durable {
            self.hear_durable(durable.entry, &durable.ranges);
        }
        for keep in frame.keeps {
            self.hear_durable(keep.entry, &keep.ranges);
        }
        self.go_on().await;
    }

    fn hear_wanted(&mut self, wanted: pb::Wanted) {
        let Some(cells) = self.wanted.get_mut(wanted.entry as usize) else {
            self.track
                .fail("an answer about an entry that was not announced");
            return;
        };
        for range in wanted.wanted.iter().chain(&wanted.held) {
            cells.extend(range.first..range.first + range.count);
        }
        if !wanted.held.is_empty() {
            self.track.fail("cells without a source are held");
        }
        if wanted.last {
            self.answered.insert(wanted.entry);
        }
    }

    fn hear_durable(&mut self, entry: u32, ranges: &[pb::CellRange]) {
        for range in ranges {
            for cell in range.first..range.first + range.count {
                let was_sent = self.track.sent[entry as usize].contains(&cell);
                if !was_sent {
                    self.track
                        .fail(format!("cell {cell} of {entry} was acked and never sent"));
                }
                self.track.note_durable(entry, cell);
            }
        }
        self.durable_count += 1;
        self.strike.at(Moment::Durable(self.durable_count));
    }

    /// Begins to send when everything is answered, and finishes when all is settled.
    async fn go_on(&mut self) {
        if self.stage == Step::Announced && self.answered.len() == self.track.load.parts.len() {
            self.stage = Step::Sending;
            self.judge_answers();
            for (entry, cells) in self.wanted.iter().enumerate() {
                self.queue.extend(cells.iter().map(|&c| (entry as u32, c)));
            }
            if self.dice.chance(50) {
                self.dice.shuffle(self.queue.make_contiguous());
            }
            self.strike.at(Moment::Answered);
        }
        let is_settled = self.queue.is_empty() && self.unsettled.is_empty();
        if self.stage == Step::Sending && is_settled {
            self.stage = Step::Finishing;
            self.track.finish_sent = true;
            let finish = pb::Finish {
                fingerprint: self.track.fingerprint.to_vec().into(),
                ..self.track.load.finish()
            };
            let _ = self.out.send(frame_finish(finish)).await;
            self.strike.at(Moment::Finish);
        }
    }

    /// What was acked must not be wanted, and what is not wanted must be there.
    fn judge_answers(&mut self) {
        let before = (self.track.tally, self.track.failures.len());
        self.judge_each_answer();
        if self.strike.has_fired() {
            // A disk without power cannot be read; the next session judges.
            self.track.tally = before.0;
            self.track.failures.truncate(before.1);
        }
    }

    fn judge_each_answer(&mut self) {
        let mut resent = 0;
        for entry in 0..self.wanted.len() {
            let wanted = &self.wanted[entry];
            let lost = self.track.acked[entry].intersection(wanted).count();
            resent += self.track.sent[entry]
                .intersection(wanted)
                .map(|&cell| self.track.load.cell(entry as u32, cell).len() as u64)
                .sum::<u64>();
            let all = 0..self.track.cell_count(entry);
            self.claimed[entry] = all.filter(|cell| !wanted.contains(cell)).collect();
            if lost > 0 {
                self.track.tally.lost += lost as u64;
                self.track.fail(format!(
                    "{lost} acked cells of entry {entry} are wanted again"
                ));
            }
            let claimed: Vec<u64> = self.claimed[entry].iter().copied().collect();
            if let Some(root) = self.root {
                self.track.check_claimed(root, entry, &claimed);
            }
        }
        self.track.tally.most_resent = self.track.tally.most_resent.max(resent);
    }
}
