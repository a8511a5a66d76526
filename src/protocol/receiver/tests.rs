use super::*;
use crate::{
    format::Dtype,
    plan::{CellSums, EntryHeader, Grid, digest_entries},
    protocol::{
        Announcement, Batch, Compare, Finish, Layout,
        slot::{RecoveredEntry, SlotFile},
    },
};
use std::time::Duration;

const OLD: SourceKey = [1; 16];
const NEW: SourceKey = [2; 16];

fn state(key: SourceKey, version: u8) -> SourceState {
    SourceState {
        key,
        fingerprint: [version; 32],
        settled: true,
    }
}

fn header() -> EntryHeader {
    EntryHeader::tensor("x", Dtype::U8, &[16]).unwrap()
}

/// An entry of two cells from the old source, of which the journal has some.
fn resumed(manifest: ManifestPromise, durable: std::ops::Range<u64>) -> Receiver {
    let config = ReceiverConfig {
        grid: Grid::tiny(8),
        codecs: 1,
        max_lanes: 16,
        commit: CommitPolicy {
            bytes: 1,
            files: 1,
            interval: Some(Duration::ZERO),
            max_undurable_bytes: 100,
        },
        layout: Layout::Named,
        container_header_len: None,
        manifest,
        fingerprint: None,
    };
    let slot = SlotFile {
        number: 0,
        file: "x.npy".to_owned(),
        data_offset: None,
        header: header(),
        source_keys: vec![OLD],
    };
    let entry = RecoveredEntry {
        slot,
        durable: RangeSet::of(durable),
        held: RangeSet::new(),
        sums: CellSums::default(),
    };
    let recovered = Recovered {
        entries: vec![entry],
        sources: [(OLD, state(OLD, 1))].into(),
        next_number: 1,
    };
    Receiver::new(config, recovered)
}

fn announce(receiver: &mut Receiver, first_source: u32, source: SourceState, cited: Option<u32>) {
    let entry = cited.map(|source| Announcement {
        header: header(),
        sources: vec![source],
        source_name: None,
        aliases: Vec::new(),
        crc32c: None,
        trainable: None,
        is_first: false,
    });
    let batch = Batch {
        first_source,
        sources: vec![source],
        entries: entry.into_iter().collect(),
        ..Batch::default()
    };
    receiver.announce(&batch).unwrap();
}

/// Does what the role asks for until it asks for nothing.
fn settle(receiver: &mut Receiver) {
    while let Some(action) = receiver.poll(Instant::now()) {
        match action {
            ReceiveAction::Commit(group) => drop(receiver.committed(group.id)),
            ReceiveAction::Compare(job) => receiver.compared(&job, true, 0, Instant::now()),
            ReceiveAction::Send(_) => {}
            ReceiveAction::Publish(_) => return,
        }
    }
}

fn compare(receiver: &mut Receiver, cells: u64) {
    let compare = Compare {
        entry: 0,
        first_cell: 0,
        hashes: vec![[0; 32]; cells as usize],
    };
    receiver.compare(&compare).unwrap();
}

#[test]
fn a_source_that_an_entry_no_longer_comes_from_does_not_touch_it() {
    let mut receiver = resumed(ManifestPromise::Open, 0..2);
    announce(&mut receiver, 0, state(NEW, 1), Some(0));
    settle(&mut receiver);
    compare(&mut receiver, 2);
    settle(&mut receiver);
    // Its old source comes later in the session, and has changed.
    announce(&mut receiver, 1, state(OLD, 2), None);
    settle(&mut receiver);
    let finish = Finish {
        entry_count: 1,
        total_bytes: 16,
        entries_digest: digest_entries([&header()]),
        fingerprint: None,
    };
    receiver.finish(finish).unwrap();
}

#[test]
fn a_sender_that_has_cells_to_compare_owes_none() {
    let manifest = ManifestPromise::Complete {
        total_bytes: 16,
        entry_count: 1,
        entries_digest: digest_entries([&header()]),
    };
    let mut receiver = resumed(manifest, 0..1);
    announce(&mut receiver, 0, state(OLD, 2), Some(0));
    settle(&mut receiver);
    assert!(!receiver.is_busy() && !receiver.is_owed());
    compare(&mut receiver, 1);
    settle(&mut receiver);
    assert!(!receiver.is_busy() && receiver.is_owed());
}
