//! Rounds of push, fault and judgement over one folder or file system.
//!
//! An episode begins on an empty disk and holds several rounds. In each round all tracks
//! push at the same time, a fault strikes, the disk is looked at, and the next round's
//! sessions resume what is unfinished. The last round of an episode has no fault.

use crate::{
    dice::Dice,
    guest::Guest,
    mount::Image,
    oracle::{self, End, Manner},
    server::{Serve, Server},
    strike::{Moment, Strike, When},
    track::{Tally, Track},
};
use std::{
    path::{Path, PathBuf},
    time::Duration,
};
use tensorferry::wire::pb;
use tokio::{runtime::Runtime, task::JoinSet};

/// Rounds of one episode.
pub(crate) const ROUNDS: u64 = 10;
/// Most raw bytes of one checkpoint.
pub(crate) const MAX_BYTES: u64 = 48 << 20;
/// Of an image; room for two versions of every track.
pub(crate) const IMAGE_MIB: u64 = 400;

/// Where the served folder lies.
pub(crate) enum Ground {
    /// On whatever file system the work folder is on: a fault kills the server.
    Folder(PathBuf),
    /// On a file system of its own: a fault cuts its power.
    Disk(Image),
    /// On the disk of a guest: a fault kills the guest.
    Machine(Guest),
}

impl Ground {
    pub(crate) fn root(&self) -> PathBuf {
        match self {
            Ground::Folder(folder) => folder.join("root"),
            Ground::Disk(image) => image.root(),
            Ground::Machine(guest) => guest.root(),
        }
    }

    /// The served folder, when it can be read while a server has it.
    fn shared_root(&self) -> Option<PathBuf> {
        (!matches!(self, Ground::Machine(_))).then(|| self.root())
    }
}

/// One episode.
pub(crate) struct Episode<'a> {
    pub(crate) runtime: &'a Runtime,
    pub(crate) serve: Serve,
    pub(crate) ground: Ground,
    pub(crate) dice: Dice,
    pub(crate) tracks: Vec<Track>,
    pub(crate) tally: Tally,
    pub(crate) failures: Vec<String>,
}

impl<'a> Episode<'a> {
    pub(crate) fn new(runtime: &'a Runtime, serve: Serve, ground: Ground, seed: u64) -> Self {
        let mut dice = Dice::new(seed);
        let count = dice.between(1, 2);
        let tracks = (0..count)
            .map(|i| Track::new(&format!("run{i}/step"), &mut dice, MAX_BYTES / count))
            .collect();
        Episode {
            runtime,
            serve,
            ground,
            dice,
            tracks,
            tally: Tally::default(),
            failures: Vec::new(),
        }
    }

    /// All rounds; what is left at the end is whole.
    pub(crate) fn run(mut self, rounds: u64) -> (Tally, Vec<String>) {
        for _ in 0..rounds {
            self.round();
            if !self.failures.is_empty() {
                return self.result();
            }
        }
        self.complete();
        self.result()
    }

    fn result(mut self) -> (Tally, Vec<String>) {
        for track in &mut self.tracks {
            self.tally.add(&track.tally);
        }
        (self.tally, self.failures)
    }

    /// Ends the episode's judgement with this text when it is a failure.
    pub(crate) fn note<T>(&mut self, result: Result<T, String>) -> Option<T> {
        result.map_err(|why| self.failures.push(why)).ok()
    }

    fn start(&mut self) -> Result<Server, String> {
        match &mut self.ground {
            Ground::Machine(guest) => guest.start(),
            ground => self.serve.start(&ground.root()),
        }
    }

    fn round(&mut self) {
        let server = self.start();
        let Some(mut server) = self.note(server.map_err(|e| format!("no start: {e}"))) else {
            return;
        };
        if self.dice.chance(25) {
            // A session that just ends, as that of a client that dies: resumed below.
            let manner = self.manner(true);
            self.sessions(&server, &Strike::none(), 0, &manner);
        }
        let armed = self.dice.below(self.tracks.len() as u64) as usize;
        let when = self.when(armed);
        let strike = match &self.ground {
            Ground::Folder(_) | Ground::Machine(_) => {
                let group = server.group();
                // A machine that is off does not close its connections.
                let leaves = matches!(&self.ground, Ground::Machine(_));
                Strike::new(when, leaves, move || group.kill())
            }
            Ground::Disk(image) => {
                let switch = image.switch();
                Strike::new(when, true, move || switch.cut())
            }
        };
        let manner = self.manner(false);
        let ends = self.sessions(&server, &strike, armed, &manner);
        // Whatever was waited for did not come, so it comes now.
        strike.fire();
        self.tally.points += 1;
        self.tally.in_publish += u64::from(strike.saw_finish());
        self.judge_ends(&ends);
        if matches!(self.ground, Ground::Disk(_)) && !server.is_alive() {
            self.failures
                .push("the server died of a disk without power".to_owned());
        }
        server.kill();
        drop(strike);
        self.look();
        for track in &mut self.tracks {
            if track.done.is_some() && self.dice.chance(85) {
                track.next_version(&mut self.dice);
            }
        }
    }

    /// Brings the power back and compares the disk with every promise.
    pub(crate) fn look(&mut self) {
        let powered = match &mut self.ground {
            Ground::Folder(_) => Ok(()),
            Ground::Disk(image) => image.power_on(),
            Ground::Machine(guest) => guest.open_disk(),
        };
        if self.note(powered).is_none() {
            return;
        }
        let root = self.ground.root();
        for track in &mut self.tracks {
            track.check_disk(&root);
            self.failures.append(&mut track.failures);
        }
    }

    /// Pushes everything to its end, without a fault, and looks once more.
    pub(crate) fn complete(&mut self) {
        let server = self.start();
        let Some(server) = self.note(server.map_err(|e| format!("no start: {e}"))) else {
            return;
        };
        let ends = self.sessions(&server, &Strike::none(), 0, &Manner::default());
        for (i, end) in ends.iter().enumerate() {
            if *end != End::Done {
                self.failures
                    .push(format!("track {i} cannot be completed: {end:?}"));
            }
        }
        match &self.ground {
            // A kernel does not end by a signal in good order.
            Ground::Machine(_) => server.kill(),
            _ => {
                let stopped = server.stop();
                self.note(stopped);
            }
        }
        self.look();
    }

    /// All tracks push at the same time.
    pub(crate) fn sessions(
        &mut self,
        server: &Server,
        strike: &Strike,
        armed: usize,
        manner: &Manner,
    ) -> Vec<End> {
        let (root, address) = (self.ground.shared_root(), server.address);
        let mut set = JoinSet::new();
        for (i, mut track) in self.tracks.drain(..).enumerate() {
            let strike = if i == armed {
                strike.clone()
            } else {
                strike.unarmed()
            };
            let (root, manner, dice) = (root.clone(), manner.clone(), Dice::new(self.dice.next()));
            set.spawn_on(
                async move {
                    let end =
                        oracle::push(&mut track, address, root.as_deref(), strike, &manner, dice)
                            .await;
                    (i, track, end)
                },
                self.runtime.handle(),
            );
        }
        let mut all = self.runtime.block_on(set.join_all());
        all.sort_by_key(|(i, ..)| *i);
        let mut ends = Vec::new();
        for (_, mut track, end) in all {
            self.failures.append(&mut track.failures);
            self.tracks.push(track);
            ends.push(end);
        }
        ends
    }

    /// A struck session may lose its connection or hear of the disk; nothing else.
    fn judge_ends(&mut self, ends: &[End]) {
        let is_disk = matches!(self.ground, Ground::Disk(_));
        for end in ends {
            match end {
                End::Done | End::Gone(_) => {}
                End::Refused(tonic::Code::Internal, reason)
                    if is_disk && reason == "STORAGE_IO_ERROR" => {}
                other => self
                    .failures
                    .push(format!("a struck session ended with {other:?}")),
            }
        }
    }

    fn manner(&mut self, leaves: bool) -> Manner {
        // A group of the default mode is due after half a second.
        let is_slow = self.tracks.iter().any(|t| t.mode == pb::CommitMode::Group);
        let pause = match self.dice.chance(if is_slow { 60 } else { 20 }) {
            true => self.dice.below(if is_slow { 12_000 } else { 5000 }),
            false => 0,
        };
        Manner {
            pause: Duration::from_micros(pause),
            leave_after: leaves.then(|| self.dice.below(60)),
            ..Manner::default()
        }
    }

    /// Moments at which something is at stake, and any moment at all.
    fn when(&mut self, armed: usize) -> When {
        let left = self.tracks[armed].cells_left();
        let dice = &mut self.dice;
        let soon = Duration::from_micros(if dice.chance(50) {
            0
        } else {
            dice.below(20_000)
        });
        match dice.below(100) {
            0..15 => When::At(Moment::Time, Duration::from_micros(dice.below(300_000))),
            15..18 => When::At(Moment::Answered, soon),
            18..50 => When::At(Moment::Sent(dice.between(1, left.max(1))), soon),
            // Strict mode commits every 8 MiB.
            50..75 => When::At(Moment::Durable(dice.between(1, 1 + left / 32)), soon),
            75..88 => When::At(Moment::Finish, Duration::from_micros(dice.below(60_000))),
            _ => When::At(Moment::Done, soon),
        }
    }
}

/// What is left of a failed episode, for whoever looks at it.
pub(crate) fn folder_of(workdir: &Path, title: &str, seed: u64) -> PathBuf {
    workdir.join(format!("{title}-{seed}"))
}
