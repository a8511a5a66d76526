//! The journal: raw bytes, records behind sums that fit, and damaged journals.

use super::input::Input;
use crate::{
    plan::{CHUNK_LEN_MIN, EntryHeader, Place, RangeSet, SourceState},
    store::journal::{Chain, EntryRecord, JournalHeader, Record, Replay, Run, State, Step, replay},
};
use std::collections::HashSet;

/// Records of one input.
const MAX_RECORDS: usize = 64;

/// One byte says how the rest is taken.
///
/// # Panics
/// A property is broken.
pub fn journal(data: &[u8]) {
    let mut input = Input::new(data);
    match input.below(3) {
        0 => {
            check_replay(input.rest());
        }
        1 => check_bodies(&mut input),
        _ => check_damage(&mut input),
    }
}

fn header() -> (Vec<u8>, Chain) {
    let header = JournalHeader {
        checkpoint: "run7".into(),
        chunk_len: CHUNK_LEN_MIN,
        layout: 1,
        out_format: 1,
        npy_dtype: 1,
    };
    header.encode().expect("a header in order")
}

/// Replays any bytes. What counts stands at the beginning and nothing behind it
/// matters.
fn check_replay(bytes: &[u8]) -> Option<Replay> {
    let replayed = replay(bytes).ok()?;
    check_state(&replayed);
    let good_len = usize::try_from(replayed.good_len).unwrap();
    for len in [good_len, (good_len + bytes.len()) / 2] {
        let again = replay(&bytes[..len]).expect("the header is there");
        assert_eq!(again.good_len, replayed.good_len);
        assert!(again.state == replayed.state && again.chain == replayed.chain);
    }
    Some(replayed)
}

fn check_state(replayed: &Replay) {
    let grid = replayed.header.grid().expect("the header was checked");
    let state = &replayed.state;
    let (mut names, mut places) = (HashSet::new(), Vec::new());
    for (&number, entry) in &state.entries {
        assert!(number == entry.record.number && number < state.next_entry_number);
        assert!(names.insert(&entry.record.header.name), "a name twice");
        places.push(extent(entry.record.place()));
        entry.record.check().expect("every record was checked");
        let mut cells = entry.durable.clone();
        cells.union_with(&entry.held);
        assert_eq!(cells.count(), entry.durable.count() + entry.held.count());
        let all = RangeSet::of(0..grid.cell_count(entry.record.header.byte_len));
        assert!(all.is_superset(&cells), "a cell that does not exist");
    }
    places.retain(|(_, start, end)| start < end);
    places.sort_unstable();
    let overlap = (places.windows(2)).find(|two| two[0].0 == two[1].0 && two[1].1 < two[0].2);
    assert_eq!(overlap, None, "a byte twice");
}

/// File, first byte and end; the whole of a file that is not shared.
fn extent(place: Place<'_>) -> (&str, u64, u64) {
    match place.data_offset {
        None => (place.file, 0, u64::MAX),
        Some(offset) => (place.file, offset, offset + place.byte_len),
    }
}

/// Bodies of any bytes behind sums that fit.
fn check_bodies(input: &mut Input) {
    let (mut bytes, mut chain) = header();
    for _ in 0..MAX_RECORDS {
        if input.is_empty() {
            break;
        }
        let (kind, len) = (input.byte() % 9, usize::from(input.u16()));
        let body = input.bytes(len);
        let len = (body.len() as u32).to_le_bytes();
        let sealed = chain.seal([len[0], len[1], len[2], len[3], kind, 0, 0, 0], body);
        bytes.extend_from_slice(&sealed);
        match chain.decode(&sealed) {
            Ok(Step::Done { value, len, next }) => {
                assert_eq!(len, sealed.len());
                check_record(&chain, &value);
                chain = next;
            }
            Ok(Step::More(_)) => panic!("a whole record asks for more"),
            Err(_) => break,
        }
    }
    check_replay(&bytes).expect("the header is in order");
}

/// A record written again is the same one.
fn check_record(chain: &Chain, record: &Record) {
    let (mut bytes, mut writer) = (Vec::new(), chain.clone());
    writer.append(record, &mut bytes).expect("it was in order");
    let says_nothing = match record {
        Record::Cells(runs) | Record::Kept(runs) => {
            runs.is_empty() || runs.iter().any(|r| r.crcs.is_empty())
        }
        Record::Forget(entries) => entries.is_empty(),
        _ => false,
    };
    if says_nothing {
        // Runs without cells are not written.
        return;
    }
    match chain.decode(&bytes) {
        Ok(Step::Done { value, len, next }) => {
            assert_eq!((&value, len, &next), (record, bytes.len(), &writer));
        }
        other => panic!("{record:?} came back as {other:?}"),
    }
}

/// A journal in order, then damaged: it is read as far as it is as it was written.
fn check_damage(input: &mut Input) {
    let (how, a, b) = (input.byte(), input.u16(), input.u16());
    let script = Script::new(input);
    let mut bytes = script.bytes.clone();
    let at = usize::from(a) % bytes.len();
    let end = (at + usize::from(b)).min(bytes.len());
    match how % 6 {
        0 => {}
        1 => bytes.truncate(at),
        2 => bytes[at] ^= 1 << (b % 8),
        3 => bytes[at..end].fill(0),
        4 => {
            let to = usize::from(b) % (bytes.len() - (end - at) + 1);
            bytes.copy_within(at..end, to);
        }
        _ => bytes.extend_from_within(at..end),
    }
    let same = bytes.iter().zip(&script.bytes).take_while(|(a, b)| a == b);
    let same_len = same.count();
    let whole_count = script.ends.iter().filter(|&&end| end <= same_len).count();
    let replayed = check_replay(&bytes);
    let Some(count) = whole_count.checked_sub(1) else {
        return assert!(replayed.is_none(), "a damaged header was taken");
    };
    let replayed = replayed.expect("the header is as it was");
    assert_eq!(replayed.good_len, script.ends[count] as u64);
    assert!(replayed.state == script.states[count], "another state");
}

/// A journal with all that it went through.
struct Script {
    bytes: Vec<u8>,
    /// Where the header ends, then where each record ends that counts.
    ends: Vec<usize>,
    /// State before the first record, then after each.
    states: Vec<State>,
}

impl Script {
    fn new(input: &mut Input) -> Self {
        let (bytes, mut chain) = header();
        let mut script = Script {
            ends: vec![bytes.len()],
            bytes,
            states: vec![State::new(crate::plan::Grid::new(CHUNK_LEN_MIN).unwrap())],
        };
        script.push(session(1, input), &mut chain);
        for _ in 0..MAX_RECORDS {
            let record = record(script.state(), input);
            if input.is_empty() || !script.push(record, &mut chain) {
                break;
            }
        }
        script
    }

    fn state(&self) -> &State {
        &self.states[self.states.len() - 1]
    }

    /// Writes a record; `false` = it breaks a rule, so nothing counts from here on.
    fn push(&mut self, record: Record, chain: &mut Chain) -> bool {
        let before = self.bytes.len();
        if chain.append(&record, &mut self.bytes).is_err() {
            assert_eq!(self.bytes.len(), before);
            return false;
        }
        let mut state = self.state().clone();
        let is_valid = state.apply(record).is_ok();
        if !is_valid {
            assert!(&state == self.state(), "a refused record changed the state");
        } else if self.bytes.len() > before {
            self.ends.push(self.bytes.len());
            self.states.push(state);
        }
        is_valid
    }
}

fn session(epoch: u64, input: &mut Input) -> Record {
    let nonce = input.byte();
    Record::Session {
        epoch,
        nonce: [nonce; 16],
        transfer_id: [nonce / 16; 16],
        entries_digest: input.chance(2).then_some([3; 16]),
        adopted: input.chance(3),
        unsynced: input.chance(3),
    }
}

/// A record that is often in order where it stands.
fn record(state: &State, input: &mut Input) -> Record {
    match input.below(12) {
        0 => session(state.epoch + u64::from(!input.chance(8)), input),
        1 | 2 => Record::Source(SourceState {
            key: [input.byte() % 3; 16],
            fingerprint: [input.byte() % 3; 32],
            settled: input.chance(2),
        }),
        3..=5 => entry(state, input),
        6..=8 => Record::Cells(runs(state, input)),
        9 => Record::Kept(runs(state, input)),
        10 => Record::Forget((0..input.below(4)).map(|_| input.u32() % 8).collect()),
        _ => Record::Publish {
            manifest_blake3: [input.byte(); 32],
            overwrite: input.chance(2),
        },
    }
}

fn entry(state: &State, input: &mut Input) -> Record {
    let (name, again) = (input.byte() % 6, input.chance(3));
    let byte_len = u64::from(input.u16()) << input.below(32);
    let same = state.entries.values().nth(usize::from(name));
    let source_keys = (0..input.below(3)).map(|i| [i as u8; 16]).collect();
    if let (true, Some(same)) = (again, same) {
        return Record::Entry(EntryRecord {
            source_keys,
            ..same.record.clone()
        });
    }
    let data_offset = (input.chance(4)).then(|| 16 + u64::from(input.u16()));
    Record::Entry(EntryRecord {
        number: match input.chance(16) {
            true => input.u32(),
            false => state.next_entry_number,
        },
        header: EntryHeader::blob(format!("b{name}"), byte_len).expect("a header in order"),
        file: match data_offset {
            Some(_) => "files/shared".to_owned(),
            None => format!("files/{}", if input.chance(16) { 0 } else { name }),
        },
        data_offset,
        source_keys,
    })
}

fn runs(state: &State, input: &mut Input) -> Vec<Run> {
    let run = |input: &mut Input| {
        let entries: Vec<u32> = state.entries.keys().copied().collect();
        let entry = match entries.is_empty() {
            true => 0,
            false => input.pick(&entries),
        };
        let held = state.entries.get(&entry).and_then(|e| e.held.first());
        Run {
            entry,
            first: match (input.chance(2), held) {
                (true, Some(held)) => held,
                _ => u64::from(input.byte() % 8),
            },
            crcs: vec![input.u32(); 1 + input.below(3)],
        }
    };
    (0..1 + input.below(3)).map(|_| run(input)).collect()
}
