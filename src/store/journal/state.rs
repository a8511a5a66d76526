//! What the records of a journal amount to, and the rules between them.
//!
//! A cell of a live entry is in exactly one of three conditions: unknown, *durable*
//! (resume may trust it) or *held* (on disk, but its source or its owner may have
//! changed since: to be compared or sent again).

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::ops::Range;

use super::record::{EntryRecord, Record, Run};
use crate::plan::{CellSums, Digest16, Grid, Places, RangeSet, SourceKey, SourceState};

/// The fold of all records up to some point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct State {
    /// Of the latest session; 0 before the first.
    pub(crate) epoch: u64,
    /// Who owns the transfer; `None` before the first session.
    pub(crate) transfer_id: Option<Digest16>,
    /// Digest of the entries, if the latest session knew it.
    pub(crate) entries_digest: Option<Digest16>,
    /// What the sources looked like when their cells were taken.
    pub(crate) sources: HashMap<SourceKey, SourceState>,
    /// Live entries by number.
    pub(crate) entries: BTreeMap<u32, EntryState>,
    /// No entry has or had this number or a higher one.
    pub(crate) next_entry_number: u32,
    /// Manifest digest and overwrite, once the latest session announced the rename.
    pub(crate) publish: Option<([u8; 32], bool)>,
    /// Some durable cells were recorded by a session that synced nothing.
    pub(crate) unsynced: bool,
    /// Records come in the order in which entries got bytes, not in that of their
    /// numbers.
    used_numbers: RangeSet,
    grid: Grid,
    // All three follow from `entries`; without them a journal of a million entries
    // takes a million times a million steps.
    by_name: HashMap<String, u32>,
    places: Places,
    by_source: HashMap<SourceKey, BTreeSet<u32>>,
}

/// A live entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EntryState {
    /// As it was recorded.
    pub(crate) record: EntryRecord,
    /// Cells that resume may trust.
    pub(crate) durable: RangeSet,
    /// Cells on disk that must be compared first.
    pub(crate) held: RangeSet,
    /// Sums of the durable and the held cells.
    pub(crate) sums: CellSums,
}

/// A record that contradicts the records before it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Violation {
    /// Something other than SESSION came first.
    #[error("no session has begun")]
    NoSession,
    /// The epoch did not rise.
    #[error("epoch {found} does not follow epoch {latest}")]
    Epoch {
        /// Of the session before.
        latest: u64,
        /// Of this one.
        found: u64,
    },
    /// The entry number was used before, or is the highest there is.
    #[error("entry number {0} is not fresh")]
    EntryNumber(u32),
    /// Two entries in one place.
    #[error("the place of entry {new} is that of entry {live}")]
    FileInUse {
        /// The entry that has it.
        live: u32,
        /// The entry that wants it.
        new: u32,
    },
    /// No such live entry.
    #[error("there is no entry {0}")]
    NoEntry(u32),
    /// Cells beyond the end of the entry.
    #[error("entry {entry} has no {count} cells from cell {first}")]
    NoCell {
        /// Entry number.
        entry: u32,
        /// First cell.
        first: u64,
        /// How many were named.
        count: u64,
    },
    /// Kept cells that were not held.
    #[error("not all cells from {first} of entry {entry} were held")]
    NotHeld {
        /// Entry number.
        entry: u32,
        /// First cell.
        first: u64,
    },
}

impl State {
    /// The state of a journal without records.
    pub(crate) fn new(grid: Grid) -> Self {
        State {
            epoch: 0,
            transfer_id: None,
            entries_digest: None,
            sources: HashMap::new(),
            entries: BTreeMap::new(),
            next_entry_number: 0,
            publish: None,
            unsynced: false,
            used_numbers: RangeSet::new(),
            grid,
            by_name: HashMap::new(),
            places: Places::default(),
            by_source: HashMap::new(),
        }
    }

    /// Takes one more record.
    ///
    /// # Errors
    /// [`Violation`]; the state is then as before, so that replay can stop here.
    pub(crate) fn apply(&mut self, record: Record) -> Result<(), Violation> {
        if self.epoch == 0 && !matches!(record, Record::Session { .. }) {
            return Err(Violation::NoSession);
        }
        match record {
            Record::Session {
                epoch,
                nonce: _,
                transfer_id,
                entries_digest,
                adopted,
                unsynced,
            } => {
                if epoch <= self.epoch {
                    return Err(Violation::Epoch {
                        latest: self.epoch,
                        found: epoch,
                    });
                }
                self.epoch = epoch;
                self.transfer_id = Some(transfer_id);
                self.entries_digest = entries_digest;
                self.publish = None;
                if adopted {
                    // The files of another owner only look like this one's.
                    self.sources.clear();
                    self.entries.values_mut().for_each(EntryState::hold);
                    self.unsynced = false;
                }
                self.unsynced |= unsynced;
            }
            Record::Source(source) => self.apply_source(source),
            Record::Entry(entry) => self.apply_entry(entry)?,
            Record::Cells(runs) => {
                for run in &runs {
                    self.cells(run)?;
                }
                self.mark_durable(&runs);
            }
            Record::Kept(runs) => {
                self.check_held(&runs)?;
                self.mark_durable(&runs);
            }
            Record::Forget(numbers) => {
                for number in numbers {
                    self.remove(number);
                }
            }
            Record::Publish {
                manifest_blake3,
                overwrite,
            } => {
                self.publish = Some((manifest_blake3, overwrite));
            }
        }
        Ok(())
    }

    fn apply_source(&mut self, source: SourceState) {
        if let Some(earlier) = self.sources.get(&source.key) {
            if source.unchanged_since(earlier) {
                // The earlier one stays: it was settled, and the new one may not be.
                return;
            }
            for number in self.by_source.get(&source.key).into_iter().flatten() {
                if let Some(entry) = self.entries.get_mut(number) {
                    entry.hold();
                }
            }
        }
        self.sources.insert(source.key, source);
    }

    fn apply_entry(&mut self, record: EntryRecord) -> Result<(), Violation> {
        let number = record.number;
        if let Some(entry) = self.entries.get_mut(&number)
            && entry.record.header == record.header
            && entry.record.place() == record.place()
        {
            // The same entry, from other sources: what was taken from the former
            // ones is no longer trusted.
            entry.hold();
            let former = std::mem::replace(&mut entry.record.source_keys, record.source_keys);
            let current = entry.record.source_keys.clone();
            self.unlink_sources(number, &former);
            self.link_sources(number, &current);
            return Ok(());
        }
        let next = number
            .checked_add(1)
            .filter(|_| !self.used_numbers.contains(u64::from(number)));
        let next = next.ok_or(Violation::EntryNumber(number))?;
        let replaced = self.by_name.get(&record.header.name).copied();
        let holders = self.places.holders(record.place());
        if let Some(&live) = holders.iter().find(|&&live| Some(live) != replaced) {
            return Err(Violation::FileInUse { live, new: number });
        }
        if let Some(replaced) = replaced {
            self.remove(replaced);
        }
        self.next_entry_number = self.next_entry_number.max(next);
        self.used_numbers
            .insert(u64::from(number)..u64::from(number) + 1);
        self.by_name.insert(record.header.name.clone(), number);
        self.places.insert(record.place(), number);
        self.link_sources(number, &record.source_keys);
        let entry = EntryState {
            record,
            durable: RangeSet::new(),
            held: RangeSet::new(),
            sums: CellSums::default(),
        };
        self.entries.insert(number, entry);
        Ok(())
    }

    /// Forgetting an entry that is not there changes nothing, so that a long list
    /// means the same in one record or in two.
    fn remove(&mut self, number: u32) {
        let Some(EntryState { record, .. }) = self.entries.remove(&number) else {
            return;
        };
        self.by_name.remove(&record.header.name);
        self.places.remove(record.place());
        self.unlink_sources(number, &record.source_keys);
    }

    fn link_sources(&mut self, number: u32, keys: &[SourceKey]) {
        for key in keys {
            self.by_source.entry(*key).or_default().insert(number);
        }
    }

    fn unlink_sources(&mut self, number: u32, keys: &[SourceKey]) {
        for key in keys {
            if let Some(numbers) = self.by_source.get_mut(key) {
                numbers.remove(&number);
                if numbers.is_empty() {
                    self.by_source.remove(key);
                }
            }
        }
    }

    /// The cells of a run, if its entry has them.
    fn cells(&self, run: &Run) -> Result<Range<u64>, Violation> {
        let entry = self
            .entries
            .get(&run.entry)
            .ok_or(Violation::NoEntry(run.entry))?;
        let cell_count = self.grid.cell_count(entry.record.header.byte_len);
        match run.cells() {
            Ok(cells) if cells.end <= cell_count => Ok(cells),
            _ => Err(Violation::NoCell {
                entry: run.entry,
                first: run.first,
                count: run.crcs.len() as u64,
            }),
        }
    }

    /// As if the runs were taken one after the other, so that a cell named twice is
    /// refused in one record as it is in two.
    fn check_held(&self, runs: &[Run]) -> Result<(), Violation> {
        let mut left: HashMap<u32, RangeSet> = HashMap::new();
        for run in runs {
            let cells = self.cells(run)?;
            if cells.is_empty() {
                continue;
            }
            let entry = self
                .entries
                .get(&run.entry)
                .ok_or(Violation::NoEntry(run.entry))?;
            let held = left.entry(run.entry).or_insert_with(|| entry.held.clone());
            if !held.is_superset(&RangeSet::of(cells.clone())) {
                return Err(Violation::NotHeld {
                    entry: run.entry,
                    first: run.first,
                });
            }
            held.remove(cells);
        }
        Ok(())
    }

    /// Only for runs that were checked.
    fn mark_durable(&mut self, runs: &[Run]) {
        for run in runs {
            let (Some(entry), Ok(cells)) = (self.entries.get_mut(&run.entry), run.cells()) else {
                continue;
            };
            entry.held.remove(cells.clone());
            entry.durable.insert(cells.clone());
            for (cell, &crc) in cells.zip(&run.crcs) {
                entry.sums.set(cell, crc);
            }
        }
    }
}

impl EntryState {
    fn hold(&mut self) {
        let durable = std::mem::take(&mut self.durable);
        self.held.union_with(&durable);
    }
}

#[cfg(test)]
mod tests;
