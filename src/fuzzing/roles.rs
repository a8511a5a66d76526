//! Both roles under any schedule, with peers that lie.
//!
//! Every byte is one thing that happens: a step of either role or of its jobs, a
//! damaged chunk, a frame that no honest peer sends, a broken connection, a crash,
//! another version of the source. In honest sessions no error may come up; in all
//! of them the roles keep their invariants, a cell has one writer, the journal
//! takes every group, and what is said to be durable is in the journal. At the
//! end of every input a session without trouble must publish.

mod hostile;
mod session;
mod store;

use super::input::Input;
use crate::{
    plan::{EntryHeader, Grid, SourceState},
    protocol::{CommitPolicy, Layout, ManifestPromise, Reason, ReceiverConfig, SenderConfig},
};
use session::{Fate, Session};
use std::time::{Duration, Instant};
use store::Store;

/// Small, so that few bytes make many cells.
const CELL_LEN: u32 = 8;
/// Lanes of a session.
const LANES: [u32; 3] = [0, 1, 2];
/// Things that happen in one input.
const MAX_EVENTS: usize = 400;
/// Steps in which a session without trouble must publish.
const MAX_CLEAN_STEPS: usize = 4000;

/// The shape of the world, then one byte for each event.
///
/// # Panics
/// A property is broken.
pub fn roles(data: &[u8]) {
    let mut input = Input::new(data);
    let mut world = World::new(&mut input);
    for _ in 0..MAX_EVENTS {
        if input.is_empty() || world.is_published {
            break;
        }
        world.event(&mut input);
    }
    world.publish();
}

/// What the sender has.
#[derive(Clone, Debug)]
struct Source {
    headers: Vec<EntryHeader>,
    /// Sources cited by each entry.
    cited: Vec<Vec<u32>>,
    version: u8,
    is_settled: bool,
}

impl Source {
    fn new(input: &mut Input) -> Self {
        let header = |i: usize, input: &mut Input| {
            let len = u64::from(input.byte() % (CELL_LEN as u8 * 5));
            match input.below(3) {
                0 => EntryHeader::blob(format!("b{i}"), len),
                // Names that fall on the same file where case does not count.
                1 => EntryHeader::tensor(["w", "W", "ww", "WW"][i], U8, &[len]),
                _ => EntryHeader::tensor(format!("t{i}"), U8, &[len]),
            }
        };
        let headers: Vec<_> = (0..1 + input.below(4))
            .map(|i| header(i, input).expect("a header in order"))
            .collect();
        let cited = headers
            .iter()
            .map(|_| input.pick(&[&[0u32][..], &[1], &[0, 1]]));
        Source {
            cited: cited.map(<[u32]>::to_vec).collect(),
            headers,
            version: 1,
            is_settled: true,
        }
    }

    /// Both sources as they are now.
    fn states(&self) -> Vec<SourceState> {
        let state = |key: u8| SourceState {
            key: [key; 16],
            fingerprint: [self.version; 32],
            settled: self.is_settled,
        };
        vec![state(0), state(1)]
    }

    /// Stands for the bytes of a cell: every other one changes with the version.
    fn crc(&self, entry: u32, cell: u64) -> u32 {
        let version = if cell.is_multiple_of(2) {
            0
        } else {
            self.version
        };
        u32::from_le_bytes([entry as u8, cell as u8, version, 7])
    }
}

const U8: crate::format::Dtype = crate::format::Dtype::U8;

#[derive(Debug)]
struct World {
    now: Instant,
    source: Source,
    store: Store,
    session: Session,
    layout: Layout,
    is_promised: bool,
    window_bytes: u64,
    commit: CommitPolicy,
    is_published: bool,
}

impl World {
    fn new(input: &mut Input) -> Self {
        let source = Source::new(input);
        let layout = input.pick(&[Layout::Named, Layout::Indexed]);
        let is_promised = !input.chance(4);
        let window_bytes = 1 + u64::from(input.byte() % 64);
        let bytes = 1 + u64::from(input.byte() % 64);
        let commit = CommitPolicy {
            bytes,
            files: 1 + input.below(4),
            interval: input.pick(&[None, Some(Duration::from_millis(20))]),
            max_undurable_bytes: bytes + u64::from(input.byte() % 64),
        };
        let mut store = Store::new();
        let (sender, receiver) = terms(&source, layout, is_promised, window_bytes, commit);
        let session = Session::new(&source, sender, receiver, store.begin(false));
        World {
            now: Instant::now(),
            source,
            store,
            session,
            layout,
            is_promised,
            window_bytes,
            commit,
            is_published: false,
        }
    }

    fn event(&mut self, input: &mut Input) {
        let (now, lane) = (self.now, input.pick(&LANES));
        let (session, store, source) = (&mut self.session, &mut self.store, &self.source);
        let fate = match input.byte() % 64 {
            0..=6 => session.poll_sender(),
            7..=12 => session.read(source, input.below(8), input.chance(64)),
            13..=18 => session.hand_over(lane, 1 + input.below(3), input.chance(8)),
            19..=26 => session.reach_receiver(lane),
            27..=34 => session.poll_receiver(now, store, source),
            35..=40 => session.verify(input.below(8), store),
            41..=46 => session.place(input.below(8), now, store, input.chance(64)),
            47..=48 => session.compare(input.below(8), now, store),
            49..=50 => session.commit(store),
            51..=55 => session.reach_sender(),
            56 if input.chance(4) => session.lose_lane(lane),
            56 => {
                self.now += Duration::from_millis(u64::from(input.byte()));
                Fate::Goes
            }
            57..=58 => self.pump(input.below(64)),
            59..=60 => {
                store.is_tainted = true;
                hostile::chunk(session, lane, input)
            }
            // Most of these end a session, so they are rare.
            _ if !input.chance(4) => Fate::Goes,
            61 => {
                store.is_tainted = true;
                hostile::announce(session, input)
            }
            62 if input.chance(2) => hostile::compare_or_finish(session, input),
            62 => hostile::answer(session, input),
            _ => Fate::Broken,
        };
        self.session.check();
        self.meet(fate, input);
    }

    /// A while in which nothing goes wrong.
    fn pump(&mut self, steps: usize) -> Fate {
        for step in 0..steps {
            let (now, store, source) = (self.now, &mut self.store, &self.source);
            let session = &mut self.session;
            let fate = match step % 10 {
                0 => session.poll_sender(),
                1 => session.read(source, 0, false),
                2 => session.hand_over(LANES[step % LANES.len()], 2, false),
                3 => session.reach_receiver(LANES[step / 10 % LANES.len()]),
                4 => session.verify(0, store),
                5 => session.place(0, now, store, false),
                6 => session.compare(0, now, store),
                7 => session.poll_receiver(now, store, source),
                8 => session.commit(store),
                _ => session.reach_sender(),
            };
            session.check();
            if !matches!(fate, Fate::Goes) {
                return fate;
            }
        }
        Fate::Goes
    }

    /// What becomes of the session.
    fn meet(&mut self, fate: Fate, input: &mut Input) {
        match fate {
            Fate::Goes => return,
            Fate::Published => {
                self.is_published = true;
                return;
            }
            Fate::Failed(error) => {
                let is_expected = matches!(error.reason, Reason::Checksum | Reason::SourceChanged);
                assert!(
                    self.session.is_hostile || is_expected,
                    "an error among honest peers: {error:?}"
                );
            }
            Fate::Broken => {}
        }
        // Broken off in good order, or the receiver dies.
        if !input.chance(3) {
            self.session.end(self.now, &mut self.store, &self.source);
        }
        if input.chance(2) {
            self.source.version = self.source.version.wrapping_add(input.byte() % 3);
            self.source.is_settled = input.chance(2);
        }
        if input.chance(4) {
            self.source.cited.rotate_left(1);
        }
        if input.chance(4) {
            self.source.headers.rotate_left(1);
            // What a cell holds follows from its entry's place.
            self.source.version = self.source.version.wrapping_add(1);
        }
        self.store.lose(input);
        self.open(input.chance(8));
    }

    fn open(&mut self, is_adopted: bool) {
        let (sender, receiver) = terms(
            &self.source,
            self.layout,
            self.is_promised,
            self.window_bytes,
            self.commit,
        );
        let recovered = self.store.begin(is_adopted);
        self.session = Session::new(&self.source, sender, receiver, recovered);
    }

    /// A session without trouble comes to its end.
    fn publish(&mut self) {
        if self.is_published {
            return;
        }
        self.session.end(self.now, &mut self.store, &self.source);
        self.open(false);
        for _ in 0..MAX_CLEAN_STEPS / 100 {
            self.now += Duration::from_millis(30);
            match self.pump(100) {
                Fate::Goes => {}
                Fate::Published => return,
                fate => panic!("a clean session failed: {fate:?}"),
            }
        }
        panic!("a clean session does not reach its end: {:?}", self.session);
    }
}

fn terms(
    source: &Source,
    layout: Layout,
    is_promised: bool,
    window_bytes: u64,
    commit: CommitPolicy,
) -> (SenderConfig, ReceiverConfig) {
    let grid = Grid::tiny(CELL_LEN);
    let manifest = match is_promised {
        true => ManifestPromise::Complete {
            total_bytes: source.headers.iter().map(|h| h.byte_len).sum(),
            entry_count: source.headers.len() as u64,
            entries_digest: crate::plan::digest_entries(&source.headers),
        },
        false => ManifestPromise::Open,
    };
    let receiver = ReceiverConfig {
        grid,
        codecs: u32::MAX,
        max_lanes: LANES.len() as u32,
        commit,
        layout,
        container_header_len: None,
        manifest,
        fingerprint: None,
    };
    (SenderConfig { grid, window_bytes }, receiver)
}
