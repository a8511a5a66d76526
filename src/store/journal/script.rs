//! Journals for tests: random but valid records, their bytes and their states.

use proptest::prelude::*;

use super::{EntryRecord, JournalHeader, Record, Run, State, chain::Chain};
use crate::format::Dtype;
use crate::plan::{CHUNK_LEN_MIN, EntryHeader, Grid, Order, RangeSet, SourceState};

/// A header that all scripts share.
pub(super) fn header() -> JournalHeader {
    JournalHeader {
        checkpoint: "run7/step-900".into(),
        chunk_len: CHUNK_LEN_MIN,
        layout: 1,
        out_format: 1,
        npy_dtype: 1,
    }
}

/// A session whose nonce follows from its epoch.
pub(super) fn session(epoch: u64) -> Record {
    Record::Session {
        epoch,
        nonce: [epoch as u8; 16],
        transfer_id: [9; 16],
        entries_digest: None,
        adopted: false,
        unsynced: false,
    }
}

/// Random numbers that [`Script`] turns into a record that is valid where it stands.
#[derive(Clone, Copy, Debug)]
pub(super) struct Choice {
    what: u8,
    a: u32,
    b: u32,
}

/// Up to `max_count` choices.
pub(super) fn choices(max_count: usize) -> impl Strategy<Value = Vec<Choice>> {
    let choice = (any::<u8>(), any::<u32>(), any::<u32>());
    let choice = choice.prop_map(|(what, a, b)| Choice { what, a, b });
    prop::collection::vec(choice, 1..=max_count)
}

/// A journal with all that it went through.
#[derive(Clone, Debug)]
pub(super) struct Script {
    /// The file.
    pub(super) bytes: Vec<u8>,
    /// Its true records.
    pub(super) records: Vec<Record>,
    /// Where the header ends, then where each record ends.
    pub(super) ends: Vec<usize>,
    /// State before the first record, then after each.
    pub(super) states: Vec<State>,
    /// What the next record continues.
    pub(super) chain: Chain,
    /// Makes the nonces of two scripts differ.
    seed: u8,
}

impl Script {
    /// A session and what the choices make of it.
    pub(super) fn new(seed: u8, choices: &[Choice]) -> Self {
        let (bytes, chain) = header().encode().unwrap();
        let mut script = Script {
            ends: vec![bytes.len()],
            bytes,
            records: Vec::new(),
            states: vec![State::new(Grid::new(CHUNK_LEN_MIN).unwrap())],
            chain,
            seed,
        };
        script.begin_session(0);
        choices.iter().for_each(|&choice| script.choose(choice));
        script
    }

    /// The script as it was after `count` records.
    pub(super) fn cut(&self, count: usize, chain: Chain) -> Self {
        Script {
            bytes: self.bytes[..self.ends[count]].to_vec(),
            records: self.records[..count].to_vec(),
            ends: self.ends[..=count].to_vec(),
            states: self.states[..=count].to_vec(),
            chain,
            seed: self.seed.wrapping_add(101),
        }
    }

    pub(super) fn state(&self) -> &State {
        &self.states[self.states.len() - 1]
    }

    /// The bytes of the record of this index.
    pub(super) fn record_bytes(&self, index: usize) -> &[u8] {
        &self.bytes[self.ends[index]..self.ends[index + 1]]
    }

    pub(super) fn push(&mut self, record: Record) {
        let mut state = self.state().clone();
        state.apply(record.clone()).unwrap();
        self.chain.append(&record, &mut self.bytes).unwrap();
        self.records.push(record);
        self.ends.push(self.bytes.len());
        self.states.push(state);
    }

    pub(super) fn begin_session(&mut self, a: u32) {
        let epoch = self.state().epoch + 1 + u64::from(a % 3);
        let mut nonce = [self.seed; 16];
        nonce[..8].copy_from_slice(&epoch.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
        self.push(Record::Session {
            epoch,
            nonce,
            transfer_id: [a as u8 % 2; 16],
            entries_digest: (!a.is_multiple_of(4)).then_some([a as u8; 16]),
            adopted: a.is_multiple_of(5),
            unsynced: a.is_multiple_of(7),
        });
    }

    pub(super) fn choose(&mut self, Choice { what, a, b }: Choice) {
        match what % 16 {
            0 => self.begin_session(a),
            1 | 2 => self.push(Record::Source(SourceState {
                key: [a as u8 % 3; 16],
                fingerprint: [b as u8 % 2; 32],
                settled: !b.is_multiple_of(3),
            })),
            3..6 => self.announce(a, b),
            6 => self.push(Record::Forget(vec![
                a % (self.state().next_entry_number + 1),
            ])),
            7 => self.push(Record::Publish {
                manifest_blake3: [a as u8; 32],
                overwrite: b.is_multiple_of(2),
            }),
            8..11 => self.keep(a, b),
            _ => self.store(a, b),
        }
    }

    fn announce(&mut self, a: u32, b: u32) {
        let number = self.state().next_entry_number + b % 3 / 2;
        let count = u64::from(a >> 4) % 2000;
        let name = format!("layer.{}", a % 4);
        let mut header = EntryHeader::tensor(name, Dtype::F32, &[count, 1 << 16]).unwrap();
        header.big_endian = b.is_multiple_of(5);
        if b.is_multiple_of(7) {
            header.order = Order::Fortran;
        }
        if a.is_multiple_of(6) {
            header = EntryHeader::blob("config.json", u64::from(a)).unwrap();
        }
        // The file of an entry that another one has now must not be used.
        let file = format!("{}.{}.npy", header.name, number);
        let source_keys = (0..b as u8 % 3).map(|key| [key; 16]).collect();
        self.push(Record::Entry(EntryRecord {
            number,
            header,
            file,
            data_offset: None,
            source_keys,
        }));
    }

    fn store(&mut self, a: u32, b: u32) {
        let entries = self.state().entries.values();
        let sizes = entries.map(|e| (e.record.number, e.record.header.byte_len));
        let sizes: Vec<(u32, u64)> = sizes.filter(|&(_, byte_len)| byte_len > 0).collect();
        if sizes.is_empty() {
            return self.announce(a | 1 << 8, b);
        }
        let run = |a: u32, b: u32| {
            let (entry, byte_len) = sizes[a as usize % sizes.len()];
            let cell_count = byte_len.div_ceil(u64::from(CHUNK_LEN_MIN));
            let first = u64::from(b) % cell_count;
            let count = (cell_count - first).min(1 + u64::from(a >> 8) % 6);
            Run {
                entry,
                first,
                crcs: (0..count as u32)
                    .map(|i| a ^ b.wrapping_mul(i + 1))
                    .collect(),
            }
        };
        let runs = (0..1 + b % 3).map(|i| run(a.wrapping_add(i), b.rotate_left(i * 7)));
        self.push(Record::Cells(runs.collect()));
    }

    fn keep(&mut self, a: u32, b: u32) {
        let entries = self.state().entries.values();
        let held: Vec<(u32, RangeSet)> = entries
            .filter(|e| !e.held.is_empty())
            .map(|e| (e.record.number, e.held.clone()))
            .collect();
        if held.is_empty() {
            return self.store(a, b);
        }
        let (entry, cells) = &held[a as usize % held.len()];
        let run = |range: std::ops::Range<u64>| {
            let count = 1 + u64::from(b) % (range.end - range.start);
            Run {
                entry: *entry,
                first: range.start,
                crcs: (0..count as u32).map(|i| i ^ b).collect(),
            }
        };
        self.push(Record::Kept(cells.iter().take(2).map(run).collect()));
    }
}
