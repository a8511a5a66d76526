//! What the receiver has on disk: the journal's state and the cells in its files.

use super::super::input::Input;
use crate::{
    plan::Grid,
    protocol::{Group, GroupCells, Receiver, Recovered, RecoveredEntry, SlotFile},
    store::journal::{EntryRecord, Record, Run, State},
};
use std::collections::HashMap;

#[derive(Debug)]
pub(super) struct Store {
    state: State,
    /// Sum of each written cell, by entry number and cell.
    cells: HashMap<(u32, u64), u32>,
    /// A lying sender brought other bytes than the source has.
    pub(super) is_tainted: bool,
}

impl Store {
    pub(super) fn new() -> Self {
        Store {
            state: State::new(Grid::tiny(super::CELL_LEN)),
            cells: HashMap::new(),
            is_tainted: false,
        }
    }

    fn apply(&mut self, record: Record) {
        let applied = self.state.apply(record);
        applied.expect("the journal takes what the role records");
    }

    /// A session begins.
    pub(super) fn begin(&mut self, is_adopted: bool) -> Recovered {
        self.apply(Record::Session {
            epoch: self.state.epoch + 1,
            nonce: [0; 16],
            transfer_id: [u8::from(is_adopted); 16],
            entries_digest: None,
            adopted: is_adopted,
            unsynced: false,
        });
        let entries = self
            .state
            .entries
            .iter()
            .map(|(&number, entry)| RecoveredEntry {
                slot: SlotFile {
                    number,
                    file: entry.record.file.clone(),
                    data_offset: entry.record.data_offset,
                    header: entry.record.header.clone(),
                    source_keys: entry.record.source_keys.clone(),
                },
                durable: entry.durable.clone(),
                held: entry.held.clone(),
                sums: entry.sums.clone(),
            });
        Recovered {
            entries: entries.collect(),
            sources: self.state.sources.clone(),
            next_number: self.state.next_entry_number,
        }
    }

    /// Somebody may have removed a file.
    pub(super) fn lose(&mut self, input: &mut Input) {
        if input.chance(8) {
            let numbers: Vec<u32> = self.state.entries.keys().copied().collect();
            if !numbers.is_empty() {
                self.apply(Record::Forget(vec![input.pick(&numbers)]));
            }
        }
    }

    pub(super) fn write(&mut self, slot: &SlotFile, cell: u64, crc: u32) {
        let other = self
            .state
            .entries
            .values()
            .find(|e| e.record.file == slot.file && e.record.number != slot.number);
        assert!(
            other.is_none(),
            "the journal still cites the file: {other:?}"
        );
        self.cells.insert((slot.number, cell), crc);
    }

    pub(super) fn cell(&self, number: u32, cell: u64) -> u32 {
        self.cells.get(&(number, cell)).copied().unwrap_or(0)
    }

    /// As a commit records it.
    pub(super) fn commit(&mut self, group: &Group) {
        if !group.forget.is_empty() {
            self.apply(Record::Forget(group.forget.clone()));
        }
        for source in &group.sources {
            self.apply(Record::Source(source.clone()));
        }
        for slot in &group.entries {
            self.apply(Record::Entry(EntryRecord {
                number: slot.number,
                header: slot.header.clone(),
                file: slot.file.clone(),
                data_offset: slot.data_offset,
                source_keys: slot.source_keys.clone(),
            }));
        }
        let cells = self.runs(&group.cells);
        self.apply(Record::Cells(cells));
        let kept = self.runs(&group.kept);
        self.apply(Record::Kept(kept));
    }

    fn runs(&self, groups: &[GroupCells]) -> Vec<Run> {
        for group in groups {
            for (cell, &crc) in (group.first..).zip(&group.crcs) {
                assert_eq!(self.cell(group.number, cell), crc, "a sum of other bytes");
            }
        }
        let run = |group: &GroupCells| Run {
            entry: group.number,
            first: group.first,
            crcs: group.crcs.clone(),
        };
        groups.iter().map(run).collect()
    }

    /// Whatever the role takes for durable is so in the journal.
    pub(super) fn check(&self, receiver: &Receiver) {
        for (name, durable) in receiver.durable_cells() {
            let entry = self
                .state
                .entries
                .values()
                .find(|e| e.record.header.name == name);
            let in_journal = entry.is_some_and(|e| e.durable.is_superset(&durable));
            assert!(
                durable.is_empty() || in_journal,
                "{name:?} is not in the journal"
            );
        }
    }

    /// The sum that the journal has of a durable cell.
    pub(super) fn durable_sum(&self, name: &str, cell: u64) -> Option<u32> {
        let entry = self
            .state
            .entries
            .values()
            .find(|e| e.record.header.name == name)?;
        entry.durable.contains(cell).then(|| entry.sums.get(cell))
    }
}
