//! Damaged journals: whatever happens to the bytes, what is read back is a state
//! that the transfer once was in, and none that stands on a damaged record.
//!
//! One rule decides every case. A record counts if and only if the file is as it was
//! written up to the end of that record. The chance that a CRC fits by accident,
//! 1 in 4 thousand million, is neglected.

use proptest::prelude::*;
use proptest::test_runner::Config;

use super::script::{Choice, Script, choices, header};
use super::{JournalWriter, Record, Replay, Run, replay, replay::End};

fn config() -> Config {
    let cases = std::env::var("TENSORFERRY_JOURNAL_CASES");
    let cases = cases.ok().and_then(|n| n.parse().ok()).unwrap_or(64);
    Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    }
}

/// Replays bytes that share a beginning with those of the script, and compares with
/// the state after the records in that beginning.
fn check(script: &Script, bytes: &[u8]) -> Option<Replay> {
    let same = bytes.iter().zip(&script.bytes).take_while(|(a, b)| a == b);
    let same_len = same.count();
    let whole_count = script.ends.iter().filter(|&&end| end <= same_len).count();
    let result = replay(bytes);
    let Some(count) = whole_count.checked_sub(1) else {
        assert!(result.is_err(), "a damaged header was taken");
        return None;
    };
    let replayed = result.unwrap();
    assert_eq!(replayed.good_len, script.ends[count] as u64);
    assert!(
        replayed.state == script.states[count],
        "not the state after {count} records"
    );
    Some(replayed)
}

/// The chain after `count` records, by replay.
fn cut(script: &Script, count: usize) -> Script {
    let replayed = replay(&script.bytes[..script.ends[count]]).unwrap();
    assert_eq!(replayed.end, End::Clean);
    script.cut(count, replayed.chain)
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn cut_at_every_byte(choices in choices(30)) {
        let script = Script::new(1, &choices);
        for len in 0..=script.bytes.len() {
            let replayed = check(&script, &script.bytes[..len]);
            if let Some(replayed) = replayed {
                let at_an_end = script.ends.contains(&len);
                prop_assert_eq!(replayed.end, if at_an_end { End::Clean } else { End::Torn });
            }
        }
        prop_assert_eq!(replay(script.bytes.as_slice()).unwrap().chain, script.chain);
    }

    #[test]
    fn every_bit_flipped(choices in choices(8)) {
        let script = Script::new(2, &choices);
        let mut bytes = script.bytes.clone();
        for at in 0..bytes.len() {
            for bit in 0..8 {
                bytes[at] ^= 1 << bit;
                check(&script, &bytes);
                bytes[at] ^= 1 << bit;
            }
        }
    }

    #[test]
    fn records_twice_or_exchanged_or_left_out(choices in choices(14)) {
        let script = Script::new(3, &choices);
        let header = &script.bytes[..script.ends[0]];
        let count = script.records.len();
        let with = |order: Vec<usize>| {
            let records = order.iter().map(|&i| script.record_bytes(i));
            check(&script, &[&[header][..], &records.collect::<Vec<_>>()].concat().concat());
        };
        let all: Vec<usize> = (0..count).collect();
        for i in 0..count {
            let mut without = all.clone();
            without.remove(i);
            with(without);
            for j in 0..=count {
                let mut twice = all.clone();
                twice.insert(j, i);
                with(twice);
                let mut exchanged = all.clone();
                exchanged.swap(i, j.min(count - 1));
                with(exchanged);
            }
        }
    }

    #[test]
    fn spliced_with_a_journal_of_another_nonce(choices in choices(20), other in choices(20)) {
        let script = Script::new(4, &choices);
        // Once with other records, once with the very same ones.
        for other in [Script::new(5, &other), Script::new(5, &choices)] {
            for &end in &script.ends {
                for &start in &other.ends {
                    if (end, start) == (script.ends[0], other.ends[0]) {
                        // Nothing of the first one but an equal header: no splice.
                        continue;
                    }
                    check(&script, &[&script.bytes[..end], &other.bytes[start..]].concat());
                }
            }
        }
    }

    #[test]
    fn blocks_of_zeros(choices in choices(60)) {
        let script = Script::new(6, &choices);
        for block_len in [512, 4096] {
            for at in (0..script.bytes.len()).step_by(block_len) {
                let mut bytes = script.bytes.clone();
                let end = (at + block_len).min(bytes.len());
                bytes[at..end].fill(0);
                check(&script, &bytes);
                // Sizes reach the disk before contents: a tail of zeros.
                bytes.truncate(at);
                bytes.resize(script.bytes.len() + block_len, 0);
                check(&script, &bytes);
            }
        }
    }

    #[test]
    fn a_stale_tail_never_joins_again(
        choices in choices(24),
        later in choices(6),
        at in any::<prop::sample::Index>(),
    ) {
        let script = Script::new(7, &choices);
        let mut next = cut(&script, at.index(script.ends.len()));
        next.begin_session(1);
        later.iter().for_each(|&choice| next.choose(choice));
        // The cut never reached the disk, what was appended behind it did: the old
        // tail shows at its old place, or right behind the new records.
        let old_place = script.bytes.get(next.bytes.len()..).unwrap_or(&[]);
        check(&next, &[&next.bytes, old_place].concat());
        for &start in &script.ends {
            check(&next, &[&next.bytes, &script.bytes[start..]].concat());
        }
        // What was appended did not reach the disk as a whole, either.
        let mut bytes = script.bytes.clone();
        bytes.resize(bytes.len().max(next.bytes.len()), 0);
        for &end in &next.ends {
            bytes[..end].copy_from_slice(&next.bytes[..end]);
            let state = replay(bytes.as_slice()).unwrap().state;
            let known = next.states.contains(&state) || script.states.contains(&state);
            prop_assert!(known);
        }
    }

    #[test]
    fn every_resumed_writer_goes_on_where_the_records_end(
        choices in choices(20),
        cuts in prop::collection::vec(any::<prop::sample::Index>(), 1..4),
    ) {
        let file = tempfile::tempfile().unwrap();
        let read = || replay(&Reader(&file, 0.into()));
        let mut writer = JournalWriter::create(file.try_clone().unwrap(), &header()).unwrap();
        let mut script = Script::new(8, &choices);
        writer.append(&script.records).unwrap();
        for cut_at in cuts {
            prop_assert_eq!(writer.len(), script.bytes.len() as u64);
            let cut_len = cut_at.index(script.bytes.len() - script.ends[0]) + script.ends[0];
            file.set_len(cut_len as u64).unwrap();
            let replayed = read().unwrap();
            let count = script.ends.iter().filter(|&&end| end <= cut_len).count() - 1;
            prop_assert!(replayed.state == script.states[count]);
            writer = JournalWriter::resume(file.try_clone().unwrap(), &replayed).unwrap();
            script = cut(&script, count);
            script.begin_session(2);
            choices.iter().for_each(|&choice| script.choose(choice));
            writer.append(&script.records[count..]).unwrap();
            writer.sync().unwrap();
            let replayed = read().unwrap();
            prop_assert!(&replayed.state == script.state());
            prop_assert_eq!(replayed.end, End::Clean);
        }
    }

    #[test]
    fn arbitrary_bytes_do_no_harm(
        tail in prop::collection::vec(any::<u8>(), 0..600),
        kind in 0u8..9,
        choices in choices(6),
    ) {
        let _ = replay(tail.as_slice());
        let script = Script::new(9, &choices);
        check(&script, &[&script.bytes, tail.as_slice()].concat());
        // Behind a CRC that fits, the body has to do with the rules alone.
        let len = (tail.len() as u32).to_le_bytes();
        let sealed = script.chain.seal([len[0], len[1], len[2], len[3], kind, 0, 0, 0], &tail);
        let _ = replay([script.bytes.as_slice(), &sealed].concat().as_slice());
    }

    #[test]
    fn bent_bodies_behind_a_fitting_sum_do_no_harm(
        choices in choices(12),
        at in any::<prop::sample::Index>(),
        byte in any::<u8>(),
    ) {
        let script = Script::new(10, &choices);
        for count in 1..script.records.len() {
            let before = cut(&script, count);
            let frame = script.record_bytes(count);
            let mut body = frame[8..frame.len() - 4].to_vec();
            if let Some(last) = body.len().checked_sub(1) {
                body[at.index(last + 1)] = byte;
            }
            let mut head = [0; 8];
            head.copy_from_slice(&frame[..8]);
            let sealed = before.chain.seal(head, &body);
            let replayed = replay([before.bytes.as_slice(), &sealed].concat().as_slice()).unwrap();
            // Either it counts as a whole or it changed nothing.
            if replayed.end != End::Clean {
                prop_assert!(&replayed.state == before.state());
                prop_assert_eq!(replayed.good_len, before.bytes.len() as u64);
            }
        }
    }
}

/// Reads a file from its beginning whatever its cursor says.
struct Reader<'a>(&'a std::fs::File, std::cell::Cell<u64>);

impl std::io::Read for &Reader<'_> {
    fn read(&mut self, out: &mut [u8]) -> std::io::Result<usize> {
        let len = std::os::unix::fs::FileExt::read_at(self.0, out, self.1.get())?;
        self.1.set(self.1.get() + len as u64);
        Ok(len)
    }
}

/// A stale record of the same length at the same place: only the nonce tells.
#[test]
fn a_stale_tail_of_equal_records_does_not_join() {
    let mut old = Script::new(20, &[]);
    let again = cut(&old, 0);
    let forget = || Record::Forget(vec![1]);
    (0..4).for_each(|_| old.push(forget()));
    let mut new = again;
    new.begin_session(0);
    assert_eq!(new.ends, old.ends[..2]);
    (0..2).for_each(|_| new.push(forget()));
    let bytes = [&new.bytes, &old.bytes[new.bytes.len()..]].concat();
    let replayed = check(&new, &bytes).unwrap();
    assert!(matches!(replayed.end, End::Fault(_)));
    assert_eq!(&replayed.state, new.state());
}

#[test]
fn records_too_long_for_one_body_mean_the_same() {
    let mut script = Script::new(21, &[]);
    let header = crate::plan::EntryHeader::blob("big", 1 << 40).unwrap();
    let entry = super::EntryRecord {
        number: 0,
        header,
        file: "files/big".into(),
        data_offset: None,
        source_keys: vec![],
    };
    script.push(Record::Entry(entry));
    let first = script.ends[script.ends.len() - 1];
    script.push(Record::Cells(vec![Run {
        entry: 0,
        first: 5,
        crcs: (0..700_000).collect(),
    }]));
    let replayed = replay(script.bytes.as_slice()).unwrap();
    assert_eq!(&replayed.state, script.state());
    assert_eq!(
        (replayed.chain, replayed.end),
        (script.chain.clone(), End::Clean)
    );
    // Cut in the second of its parts, the first stays: 1 MiB is a record.
    let replayed = replay(&script.bytes[..first + (3 << 19)]).unwrap();
    let cells: Vec<_> = replayed.state.entries[&0].durable.iter().collect();
    assert!(
        cells.len() == 1 && cells[0].start == 5 && cells[0].end > 250_000,
        "{cells:?}"
    );
}

#[test]
fn the_generator_reaches_every_kind_of_record() {
    use proptest::strategy::{Strategy, ValueTree};
    let mut runner = proptest::test_runner::TestRunner::deterministic();
    let mut seen = [0; 7];
    let mut held_again = 0;
    for _ in 0..20 {
        let choices: Vec<Choice> = choices(60).new_tree(&mut runner).unwrap().current();
        let script = Script::new(0, &choices);
        for record in &script.records {
            seen[match record {
                Record::Session { .. } => 0,
                Record::Source(_) => 1,
                Record::Entry(_) => 2,
                Record::Cells(_) => 3,
                Record::Kept(_) => 4,
                Record::Forget(_) => 5,
                Record::Publish { .. } => 6,
            }] += 1;
        }
        let entries = script.states.iter().flat_map(|s| s.entries.values());
        held_again += entries
            .filter(|e| !e.held.is_empty() && !e.durable.is_empty())
            .count();
    }
    assert!(
        seen.iter().all(|&count| count > 5) && held_again > 5,
        "{seen:?} {held_again}"
    );
}

/// The format is fixed: these bytes are those of version 1.
#[test]
fn the_bytes_of_version_1_do_not_change() {
    let (mut bytes, mut chain) = header().encode().unwrap();

    for record in [super::script::session(1), Record::Forget(vec![0, 300])] {
        chain.append(&record, &mut bytes).unwrap();
    }
    let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
    let expected = concat!(
        "5446455252594a0001000000170000000a0d72756e372f737465702d39303010808010180120010c",
        "e10c1c",
        "260000000100000008011210010101010101010101010101010101011a1009090909090909090909",
        "0909090909093e74bf47",
        "05000000060000000a0300ac02cc6631e1",
    );
    assert_eq!(hex, expected);
    assert_eq!(replay(bytes.as_slice()).unwrap().chain, chain);
}
