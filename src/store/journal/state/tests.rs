use super::*;
use crate::plan::EntryHeader;

const CHUNK_LEN: u32 = 1 << 18;

fn session(epoch: u64, adopted: bool) -> Record {
    let (nonce, transfer_id) = ([1; 16], [2; 16]);
    Record::Session {
        epoch,
        nonce,
        transfer_id,
        entries_digest: None,
        adopted,
        unsynced: false,
    }
}

fn entry(number: u32, name: &str, file: &str) -> Record {
    let header = EntryHeader::blob(name, 10 * u64::from(CHUNK_LEN)).unwrap();
    Record::Entry(EntryRecord {
        number,
        header,
        file: file.into(),
        data_offset: None,
        source_keys: vec![[7; 16]],
    })
}

fn source(fingerprint: u8, settled: bool) -> Record {
    Record::Source(SourceState {
        key: [7; 16],
        fingerprint: [fingerprint; 32],
        settled,
    })
}

fn run(entry: u32, first: u64, count: u32) -> Vec<Run> {
    vec![Run {
        entry,
        first,
        crcs: (1..=count).collect(),
    }]
}

fn after(records: impl IntoIterator<Item = Record>) -> State {
    let mut state = State::new(Grid::new(CHUNK_LEN).unwrap());
    records.into_iter().for_each(|r| state.apply(r).unwrap());
    state
}

/// The violation, and that it changed nothing.
fn refused(state: &State, record: Record) -> Violation {
    let mut tried = state.clone();
    let violation = tried.apply(record).unwrap_err();
    assert_eq!(&tried, state);
    violation
}

#[test]
fn sessions_rise_and_clear_the_announced_rename() {
    let publish = Record::Publish {
        manifest_blake3: [3; 32],
        overwrite: true,
    };
    let mut state = after([session(1, false), publish.clone()]);
    assert_eq!(state.publish, Some(([3; 32], true)));
    assert!(matches!(
        refused(&state, session(1, false)),
        Violation::Epoch { .. }
    ));
    state.apply(session(5, false)).unwrap();
    assert_eq!((state.publish, state.epoch), (None, 5));
    assert_eq!(refused(&after([]), publish), Violation::NoSession);
    assert!(matches!(
        refused(&after([]), session(0, false)),
        Violation::Epoch { .. }
    ));
}

#[test]
fn only_a_settled_and_equal_source_keeps_its_cells() {
    for (before, now, stays) in [
        (source(1, true), source(1, true), true),
        (source(1, true), source(1, false), true),
        (source(1, false), source(1, true), false),
        (source(1, true), source(2, true), false),
    ] {
        let mut state = after([session(1, false), before, entry(0, "a", "a")]);
        state.apply(Record::Cells(run(0, 2, 3))).unwrap();
        state.apply(now).unwrap();
        let entry = &state.entries[&0];
        let (durable, held) = (entry.durable.count(), entry.held.count());
        assert_eq!((durable, held), if stays { (3, 0) } else { (0, 3) });
        assert_eq!(entry.sums.get(4), 3);
        assert!(!stays || state.sources[&[7; 16]].settled);
    }
}

#[test]
fn adopted_cells_are_held_until_kept_or_sent_again() {
    let cells = Record::Cells(run(0, 0, 6));
    let mut state = after([
        session(1, false),
        entry(0, "a", "a"),
        cells,
        session(2, true),
    ]);
    assert_eq!(state.entries[&0].held, RangeSet::of(0..6));
    let twice = [run(0, 0, 2), run(0, 1, 2)].concat();
    assert!(matches!(
        refused(&state, Record::Kept(twice)),
        Violation::NotHeld { .. }
    ));
    assert!(matches!(
        refused(&state, Record::Kept(run(0, 5, 2))),
        Violation::NotHeld { .. }
    ));
    state.apply(Record::Kept(run(0, 0, 2))).unwrap();
    state.apply(Record::Cells(run(0, 4, 3))).unwrap();
    assert_eq!(state.entries[&0].held, RangeSet::of(2..4));
    let both = state.entries[&0].durable.iter().collect::<Vec<_>>();
    assert_eq!(both, [0..2, 4..7]);
}

#[test]
fn numbers_are_fresh_and_files_have_one_entry() {
    let mut state = after([session(1, false), entry(3, "a", "a"), entry(4, "b", "b")]);
    for used in [3, 4] {
        assert_eq!(
            refused(&state, entry(used, "c", "c")),
            Violation::EntryNumber(used)
        );
    }
    // Entries get their records in the order in which their bytes arrive.
    let mut late = state.clone();
    late.apply(entry(0, "c", "c")).unwrap();
    assert_eq!(late.next_entry_number, 5);
    late.apply(Record::Forget(vec![0])).unwrap();
    assert_eq!(
        refused(&late, entry(0, "c", "c")),
        Violation::EntryNumber(0)
    );
    let last = refused(&state, entry(u32::MAX, "c", "c"));
    assert_eq!(last, Violation::EntryNumber(u32::MAX));
    let taken = Violation::FileInUse { live: 3, new: 5 };
    assert_eq!(refused(&state, entry(5, "c", "a")), taken);
    assert_eq!(refused(&state, entry(5, "b", "a")), taken);
    state.apply(Record::Cells(run(3, 0, 1))).unwrap();
    state.apply(entry(5, "a", "a")).unwrap();
    assert!(!state.entries.contains_key(&3) && state.entries[&5].durable.is_empty());
    state.apply(Record::Forget(vec![4, 5, 5, 99])).unwrap();
    assert_eq!(
        state,
        State {
            next_entry_number: 6,
            unsynced: false,
            used_numbers: RangeSet::of(3..6),
            ..after([session(1, false)])
        }
    );
}

#[test]
fn cells_exist_and_belong_to_live_entries() {
    let state = after([session(1, false), entry(0, "a", "a")]);
    assert_eq!(
        refused(&state, Record::Cells(run(1, 0, 1))),
        Violation::NoEntry(1)
    );
    for (first, count) in [(9, 2), (10, 1), (u64::MAX, 1), (11, 0)] {
        let runs = [run(0, 0, 1), run(0, first, count)].concat();
        assert!(matches!(
            refused(&state, Record::Cells(runs)),
            Violation::NoCell { .. }
        ));
    }
}

#[test]
fn an_entry_that_comes_from_other_sources_keeps_its_cells_only_as_held() {
    let mut state = State::new(Grid::new(CHUNK_LEN).unwrap());
    state.apply(session(1, false)).unwrap();
    state.apply(source(1, true)).unwrap();
    state.apply(entry(0, "a", "a")).unwrap();
    state.apply(Record::Cells(run(0, 0, 3))).unwrap();
    let Record::Entry(mut again) = entry(0, "a", "a") else {
        panic!()
    };
    again.source_keys = vec![[8; 16]];
    state.apply(Record::Entry(again)).unwrap();
    assert_eq!(state.entries[&0].held.count(), 3);
    assert!(state.entries[&0].durable.is_empty());
    // The former source has no say any more, the new one has.
    state.apply(Record::Kept(run(0, 0, 3))).unwrap();
    state.apply(source(2, true)).unwrap();
    assert_eq!(state.entries[&0].durable.count(), 3);
    // Another header under the same number is refused.
    let Record::Entry(mut other) = entry(0, "a", "a") else {
        panic!()
    };
    other.header.byte_len += 1;
    assert!(state.apply(Record::Entry(other)).is_err());
}
