//! Schedules of the receiving side that no test would meet by chance: lanes, workers,
//! committer and driver around the real role, its turns and its budget, each call of them a
//! step that any other thread may get in front of. Shuttle chooses who runs.
//!
//! `TENSORFERRY_SCHEDULES` = schedules of each model, 1,000 unless set. A failure prints the
//! schedule; each model is shown to find a bug that is planted around the real code.

use super::turns::Turns;
use crate::{
    format::{Dtype, checksum::crc32c},
    plan::{EntryHeader, Grid, SourceState},
    protocol::{
        Announcement, Arrival, Batch, ChunkHead, CommitPolicy, Layout, ManifestPromise, Placement,
        ReceiveAction, Receiver, ReceiverConfig, Recovered,
    },
    session::buffers::{Budget, BufferPool},
};
use shuttle::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};
use std::{
    collections::BTreeSet,
    panic::{AssertUnwindSafe, catch_unwind},
    time::{Duration, Instant},
};

const SCHEDULE_COUNT_DEFAULT: usize = 1_000;
/// Schedules within which a planted bug must show.
const MUTANT_SCHEDULE_COUNT: usize = 20_000;
const CELL_LEN: usize = 8;
const CELL_COUNT: u64 = 4;

/// What is wrong around the real code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    /// A worker writes although it was not granted the cell.
    WriteUngranted,
    /// Chunks of a file do not wait for each other.
    SkipTurns,
    /// The role hears of a commit before the sync.
    CommitFirst,
    /// A part of the budget is never given back.
    LeakBudget,
    /// Whoever needs memory takes it in two parts.
    ReserveTwice,
}

fn schedule_count() -> usize {
    let wish = std::env::var("TENSORFERRY_SCHEDULES").ok();
    wish.and_then(|n| n.parse().ok())
        .unwrap_or(SCHEDULE_COUNT_DEFAULT)
}

fn check(model: fn(Mutant)) {
    let count = schedule_count();
    shuttle::check_random(move || model(Mutant::None), count);
    println!("{count} schedules");
}

#[track_caller]
fn assert_caught(model: fn(Mutant), mutant: Mutant) {
    let run = || shuttle::check_random(move || model(mutant), MUTANT_SCHEDULE_COUNT);
    assert!(
        catch_unwind(AssertUnwindSafe(run)).is_err(),
        "{mutant:?} was not caught"
    );
}

/// The disk: who writes, what is written, and what a sync has made durable.
#[derive(Debug, Default)]
struct Disk {
    writing: BTreeSet<u64>,
    written: BTreeSet<u64>,
    durable: BTreeSet<u64>,
}

struct Model {
    mutant: Mutant,
    core: Mutex<Receiver>,
    turns: Turns<Placement>,
    disk: Mutex<Disk>,
}

fn bytes_of(cell: u64) -> [u8; CELL_LEN] {
    [cell as u8 + 1; CELL_LEN]
}

impl Model {
    fn new(mutant: Mutant) -> Arc<Model> {
        let config = ReceiverConfig {
            grid: Grid::tiny(CELL_LEN as u32),
            codecs: 1,
            max_lanes: 4,
            commit: CommitPolicy {
                bytes: 1,
                files: 1,
                interval: Some(Duration::ZERO),
                max_undurable_bytes: 1 << 10,
            },
            layout: Layout::Named,
            container_header_len: None,
            manifest: ManifestPromise::Open,
            fingerprint: None,
        };
        let mut core = Receiver::new(config, Recovered::default());
        let byte_len = CELL_COUNT * CELL_LEN as u64;
        let entry = Announcement {
            header: EntryHeader::tensor("x", Dtype::U8, &[byte_len]).unwrap(),
            sources: vec![0],
            source_name: None,
            aliases: Vec::new(),
            crc32c: None,
            trainable: None,
            is_first: false,
        };
        let source = SourceState {
            key: [1; 16],
            fingerprint: [1; 32],
            settled: true,
        };
        let batch = Batch {
            sources: vec![source],
            entries: vec![entry],
            ..Batch::default()
        };
        core.announce(&batch).unwrap();
        core.join(1).unwrap();
        Arc::new(Model {
            mutant,
            core: Mutex::new(core),
            turns: Turns::default(),
            disk: Mutex::default(),
        })
    }

    /// One lane: all cells, one of them damaged on lane 1.
    fn lane(self: &Arc<Self>, lane: u32) {
        let mut workers = Vec::new();
        for cell in 0..CELL_COUNT {
            let bytes = bytes_of(cell);
            let head = ChunkHead {
                entry: 0,
                offset: cell * CELL_LEN as u64,
                raw_len: CELL_LEN as u32,
                encoded_len: CELL_LEN as u32,
                codec: 0,
                crc32c: crc32c(&bytes),
            };
            let is_damaged = lane == 1 && cell == 0;
            let arrival = self.core.lock().unwrap().arrive(lane, &head).unwrap();
            if let Arrival::Take(ticket) = arrival {
                let model = Arc::clone(self);
                workers.push(thread::spawn(move || {
                    if is_damaged {
                        let mut core = model.core.lock().unwrap();
                        return core.reject(ticket, !head.crc32c).unwrap();
                    }
                    let placement = model.core.lock().unwrap().grant(ticket);
                    match placement {
                        Some(placement) => model.place(placement),
                        None if model.mutant == Mutant::WriteUngranted => model.write(cell),
                        None => {}
                    }
                }));
            }
        }
        for worker in workers {
            worker.join().unwrap();
        }
    }

    fn place(&self, placement: Placement) {
        if self.mutant == Mutant::SkipTurns {
            return self.write_placed(placement);
        }
        let file = placement.slot().number;
        let mut next = self.turns.begin(file, placement);
        while let Some(placement) = next {
            self.write_placed(placement);
            thread::yield_now();
            next = self.turns.next(file);
        }
    }

    fn write_placed(&self, placement: Placement) {
        self.write(placement.offset() / CELL_LEN as u64);
        let now = Instant::now();
        let mut core = self.core.lock().unwrap();
        core.written(placement.into_written(), now);
        core.check_invariants();
    }

    /// Takes a while, in which nobody else may write to the file.
    fn write(&self, cell: u64) {
        {
            let mut disk = self.disk.lock().unwrap();
            assert!(disk.writing.is_empty(), "two writers in one file");
            assert!(!disk.written.contains(&cell), "a cell is written twice");
            disk.writing.insert(cell);
        }
        thread::yield_now();
        let mut disk = self.disk.lock().unwrap();
        disk.writing.remove(&cell);
        disk.written.insert(cell);
    }

    /// The driver: does what the role asks for until everything is durable.
    fn drive(self: &Arc<Self>) {
        let mut committers = Vec::new();
        let mut acked = BTreeSet::new();
        while acked.len() < CELL_COUNT as usize {
            let action = self.core.lock().unwrap().poll(Instant::now());
            match action {
                Some(ReceiveAction::Commit(group)) => {
                    let model = Arc::clone(self);
                    committers.push(thread::spawn(move || {
                        if model.mutant == Mutant::CommitFirst {
                            model.core.lock().unwrap().committed(group.id);
                            thread::yield_now();
                        }
                        {
                            // What is there now is what a sync covers.
                            let mut disk = model.disk.lock().unwrap();
                            let written = disk.written.clone();
                            for cells in &group.cells {
                                let upto = cells.first + cells.crcs.len() as u64;
                                let is_written = |c| written.contains(&c);
                                assert!(
                                    (cells.first..upto).all(is_written),
                                    "a group names what is not written"
                                );
                            }
                            disk.durable.extend(written);
                        }
                        thread::yield_now();
                        model.core.lock().unwrap().committed(group.id);
                    }));
                }
                Some(ReceiveAction::Send(frame)) => {
                    let disk = self.disk.lock().unwrap();
                    for durable in &frame.durable {
                        for cell in durable.ranges.members() {
                            assert!(disk.durable.contains(&cell), "acked before it was synced");
                            assert!(acked.insert(cell), "acked durable twice");
                        }
                    }
                }
                Some(other) => panic!("{other:?}"),
                None => thread::yield_now(),
            }
        }
        for committer in committers {
            committer.join().unwrap();
        }
    }
}

/// Two lanes bring the same cells while the driver has groups committed.
fn cells(mutant: Mutant) {
    let model = Model::new(mutant);
    // The entry's Wanted goes out first.
    let answered = model.core.lock().unwrap().poll(Instant::now());
    assert!(matches!(answered, Some(ReceiveAction::Send(_))));
    let mut threads: Vec<_> = (0..2)
        .map(|lane| {
            let model = Arc::clone(&model);
            thread::spawn(move || model.lane(lane))
        })
        .collect();
    let driver = Arc::clone(&model);
    threads.push(thread::spawn(move || driver.drive()));
    for thread in threads {
        thread.join().unwrap();
    }
    let disk = model.disk.lock().unwrap();
    assert_eq!(disk.durable.len(), CELL_COUNT as usize);
    let file_is_free = model.turns.next(0).is_none() && disk.writing.is_empty();
    assert!(file_is_free, "a chunk was left waiting for its turn");
}

/// Tasks take memory of different sizes, and buffers with it, and give both back.
fn budget(mutant: Mutant) {
    const TOTAL: u64 = 8 << 10;
    let budget = Budget::new(TOTAL);
    let pool = BufferPool::new(4 << 10, TOTAL);
    let held = Arc::new(AtomicU64::new(0));
    let mut tasks = Vec::new();
    for (i, bytes) in [TOTAL, 3 << 10, 5 << 10, 4 << 10, 1, u64::MAX]
        .into_iter()
        .enumerate()
    {
        let (budget, pool, held) = (budget.clone(), pool.clone(), Arc::clone(&held));
        tasks.push(shuttle::future::spawn(async move {
            for round in 0..2 {
                let whole = bytes.min(TOTAL);
                let first = match mutant {
                    // Each may hold a part and wait for the rest for ever.
                    Mutant::ReserveTwice => Some(budget.reserve(whole.div_ceil(2)).await),
                    _ => None,
                };
                shuttle::future::yield_now().await;
                let reserved = match mutant {
                    Mutant::ReserveTwice => budget.reserve(whole / 2).await,
                    _ => budget.reserve(bytes).await,
                };
                let now = held.fetch_add(whole, Ordering::SeqCst) + whole;
                assert!(now <= TOTAL, "{now} of {TOTAL} bytes are held");
                let mut buffer = pool.take(whole as usize, reserved);
                buffer.as_mut().fill(i as u8);
                shuttle::future::yield_now().await;
                // Nobody else has it meanwhile.
                assert!(buffer.as_ref().iter().all(|b| *b == i as u8));
                held.fetch_sub(whole, Ordering::SeqCst);
                if mutant == Mutant::LeakBudget && i == 1 && round == 0 {
                    std::mem::forget(buffer.reserved());
                }
                drop((buffer, first));
            }
        }));
    }
    shuttle::future::block_on(async {
        for task in tasks {
            task.await.unwrap();
        }
    });
    assert_eq!(held.load(Ordering::SeqCst), 0);
}

#[test]
fn in_every_schedule_a_cell_has_one_writer_and_acks_follow_syncs() {
    check(cells);
}

#[test]
fn in_every_schedule_memory_is_bounded_and_everybody_gets_some() {
    check(budget);
}

#[test]
fn the_models_find_what_is_planted() {
    assert_caught(cells, Mutant::WriteUngranted);
    assert_caught(cells, Mutant::SkipTurns);
    assert_caught(cells, Mutant::CommitFirst);
    assert_caught(budget, Mutant::LeakBudget);
    assert_caught(budget, Mutant::ReserveTwice);
}
