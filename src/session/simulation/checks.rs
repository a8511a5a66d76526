//! What must be true after every step.

use super::{
    disk::{Disk, Journal},
    session::Session,
    source::{View, grid},
};
use crate::{
    format::checksum::crc32c,
    plan::{EntryHeader, EntryKind, SourceState},
    protocol::{Batch, Layout, PublishPlan, ReceiverFrame, Recovered},
    store::journal::EntryState,
};
use std::collections::BTreeMap;

/// A cell that the receiver called durable to the sender's face.
#[derive(Clone, Debug)]
struct Acked {
    crc: u32,
    header: EntryHeader,
    file: String,
    /// States of its sources when it was acked.
    sources: Vec<SourceState>,
}

/// Every cell that was acked durable and has had no reason since to be doubted.
#[derive(Debug, Default)]
pub(super) struct Ledger {
    cells: BTreeMap<(String, u64), Acked>,
}

impl Ledger {
    pub(super) fn contains(&self, name: &str, cell: u64) -> bool {
        self.cells.contains_key(&(name.to_owned(), cell))
    }

    /// Another owner believes nothing.
    pub(super) fn clear(&mut self) {
        self.cells.clear();
    }

    /// A frame of the receiver goes out.
    pub(super) fn sent(&mut self, frame: &ReceiverFrame, view: &View, journal: &Journal) {
        for durable in &frame.durable {
            let (_, header, sources) = &view.entries[durable.entry as usize];
            let entry = journal_entry(journal, &header.name)
                .expect("an entry is durable of which the journal knows nothing");
            for cell in durable.ranges.members() {
                assert!(
                    entry.durable.contains(cell),
                    "cell {cell} of {:?} was acked too early",
                    header.name
                );
                let acked = Acked {
                    crc: entry.sums.get(cell),
                    header: header.clone(),
                    file: entry.record.file.clone(),
                    sources: sources
                        .iter()
                        .map(|&i| view.states[i as usize].clone())
                        .collect(),
                };
                self.cells.insert((header.name.clone(), cell), acked);
            }
        }
    }

    /// The receiver hears of sources and entries: what was taken from other ones,
    /// or from ones that could change unseen, is to be doubted. In the indexed
    /// layout so is what lies in a file that is another's now.
    pub(super) fn announced(&mut self, batch: &Batch, view: &View, layout: Layout) {
        for source in &batch.sources {
            self.cells.retain(|_, acked| {
                let earlier = acked.sources.iter().find(|s| s.key == source.key);
                earlier.is_none_or(|s| s.settled && s.fingerprint == source.fingerprint)
            });
        }
        let is_tensor = |header: &EntryHeader| header.kind != EntryKind::Blob;
        for (i, entry) in batch.entries.iter().enumerate() {
            let earlier = view.entries.iter().take(batch.first_entry as usize + i);
            let index = earlier.filter(|(_, header, _)| is_tensor(header)).count();
            let fixed = layout == Layout::Indexed && is_tensor(&entry.header);
            let fixed = fixed.then(|| format!("weight_{index}.npy"));
            let keys = entry.sources.iter().map(|&i| view.states[i as usize].key);
            self.cells.retain(|(name, _), acked| {
                if *name != entry.header.name {
                    return fixed.as_ref().is_none_or(|f| *f != acked.file);
                }
                let same_sources = acked.sources.iter().map(|s| s.key).eq(keys.clone());
                let same_file = fixed.as_ref().is_none_or(|f| *f == acked.file);
                acked.header == entry.header && same_sources && same_file
            });
        }
    }

    /// The file of an entry is gone.
    pub(super) fn forget(&mut self, name: &str) {
        self.cells.retain(|(n, _), _| n != name);
    }

    /// A new session knows everything that was ever acked.
    pub(super) fn recovered(&self, recovered: &Recovered) {
        for ((name, cell), acked) in &self.cells {
            let entry = recovered
                .entries
                .iter()
                .find(|e| e.slot.header.name == *name);
            let entry = entry.unwrap_or_else(|| panic!("{name:?} is lost with its acked cells"));
            assert!(
                entry.durable.contains(*cell),
                "acked cell {cell} of {name:?} is lost"
            );
            assert_eq!(
                entry.sums.get(*cell),
                acked.crc,
                "cell {cell} of {name:?} has another sum"
            );
        }
    }

    fn on_disk(&self, disk: &Disk, journal: &Journal) {
        for ((name, cell), acked) in &self.cells {
            let entry = journal_entry(journal, name)
                .unwrap_or_else(|| panic!("{name:?} has left the journal"));
            assert!(
                entry.durable.contains(*cell),
                "acked cell {cell} of {name:?} has left the journal"
            );
            check_cell(disk, entry, *cell, acked.crc);
        }
    }
}

fn journal_entry<'a>(journal: &'a Journal, name: &str) -> Option<&'a EntryState> {
    journal
        .durable()
        .entries
        .values()
        .find(|e| e.record.header.name == name)
}

fn check_cell(disk: &Disk, entry: &EntryState, cell: u64, crc: u32) {
    let (name, file) = (&entry.record.header.name, &entry.record.file);
    let data = disk
        .durable_data(file)
        .unwrap_or_else(|| panic!("the file of {name:?} is not durable"));
    assert!(
        disk.has_durable_header(file, &entry.record.header),
        "the header of {name:?} is not durable"
    );
    let (offset, len) = grid()
        .cell_span(data.len() as u64, cell)
        .expect("the cell is in the file");
    let found = crc32c(&data[offset as usize..][..len as usize]);
    assert_eq!(
        found, crc,
        "cell {cell} of {name:?} is durable with other bytes"
    );
}

/// Everything that holds at every moment.
pub(super) fn check(session: Option<&Session>, ledger: &Ledger, disk: &Disk, journal: &Journal) {
    ledger.on_disk(disk, journal);
    let Some(session) = session else { return };
    session.receiver.check_invariants();
    let durable = session.receiver.durable_cells();
    for (name, cells) in durable.iter().filter(|(_, cells)| !cells.is_empty()) {
        let entry = journal_entry(journal, name)
            .unwrap_or_else(|| panic!("the journal does not know {name:?}"));
        assert!(
            entry.durable.is_superset(cells),
            "the journal of {name:?} says less than the role"
        );
        for cell in cells.members() {
            check_cell(disk, entry, cell, entry.sums.get(cell));
        }
    }
    let Some(sender) = &session.sender else {
        return;
    };
    // A chunk that came twice, once damaged, is asked for again although it is there.
    if !session.is_link_broken {
        sender.check_invariants();
    }
    for (believed, (_, header, _)) in sender.durable_cells().zip(&session.view.entries) {
        let known = durable.iter().find(|(name, _)| *name == header.name);
        let is_known =
            believed.is_empty() || known.is_some_and(|(_, cells)| cells.is_superset(believed));
        assert!(
            is_known,
            "the sender believes too much of {:?}",
            header.name
        );
    }
    let progress = sender.progress();
    assert!(progress.settled_bytes <= progress.total_bytes || session.is_link_broken);
}

/// What is about to be published is what the source had, durably.
pub(super) fn check_publish(session: &Session, plan: &PublishPlan, disk: &Disk) {
    let finished = session
        .finished
        .as_ref()
        .expect("publishing without finish");
    assert_eq!(
        plan.entries.len(),
        session.view.entries.len(),
        "not what was announced"
    );
    for ((slot, announcement, crc), ((_, header, _), bytes)) in plan
        .entries
        .iter()
        .zip(session.view.entries.iter().zip(finished))
    {
        assert_eq!((&slot.header, &announcement.header), (header, header));
        let data = disk
            .durable_data(&slot.file)
            .unwrap_or_else(|| panic!("{:?} is not durable", header.name));
        assert!(
            disk.has_durable_header(&slot.file, header),
            "{:?} has another header",
            header.name
        );
        assert_eq!(
            data, bytes,
            "{:?} is published with other bytes",
            header.name
        );
        assert_eq!(
            *crc,
            crc32c(bytes),
            "{:?} is published with another sum",
            header.name
        );
    }
    let mut files: Vec<_> = plan
        .entries
        .iter()
        .map(|(slot, ..)| slot.file.to_ascii_lowercase())
        .collect();
    files.sort_unstable();
    files.dedup();
    assert_eq!(files.len(), plan.entries.len(), "two entries in one file");
}
