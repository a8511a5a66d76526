//! Between two sessions: crashes, and what the store does when one begins.

use super::*;
use std::collections::HashMap;

impl World {
    /// The receiver dies; with it its machine, if `power` fails.
    pub(super) fn crash(&mut self, mut session: Session, power: bool) {
        self.story.crashes += 1;
        for (placement, bytes) in session.placing.drain(..) {
            // Some writes are under way, and one may be torn.
            let len = self.rng.below(bytes.len() + 1);
            self.disk.write(
                placement.slot(),
                placement.is_recorded(),
                placement.offset(),
                &bytes[..len],
            );
        }
        self.disk.close_all();
        if power {
            self.disk.power_loss(&mut self.rng);
            self.journal.power_loss(&mut self.rng);
        }
    }

    /// An owner opens its checkpoint anew.
    pub(super) fn reopen(&mut self) {
        let (owner, complete) = (self.view.owner, self.rng.chance(800));
        self.view =
            self.sources[owner].open(owner, complete, self.mutant == Mutant::TrustUnsettled);
    }

    fn between_sessions(&mut self) {
        let source = &mut self.sources[self.view.owner];
        if self.faults.change > 0 {
            match self.rng.below(7) {
                0 => source.change(&mut self.rng),
                1 => source.change_unseen(&mut self.rng),
                2 => source.settle(),
                3 => {
                    source.remap(&mut self.rng);
                    self.reopen();
                }
                _ => {}
            }
            if self.rng.chance(80) {
                self.view.owner = 1 - self.view.owner;
                self.reopen();
            }
        }
        // A sender that only lost its connection goes on with what it opened.
        if self.rng.chance(500) || !self.sources[self.view.owner].is_as_opened(&self.view) {
            self.reopen();
        }
    }

    /// As the store begins a session: replay, one SESSION record, and away with
    /// entries whose file is not what it was.
    pub(super) fn begin_session(&mut self) {
        if self.story.sessions > 0 {
            self.between_sessions();
        }
        let mut state = self.journal.recover();
        if state.epoch == 0 {
            // Nothing was ever recorded: the store begins anew.
            self.ledger.recovered(&Recovered::default());
            (self.disk, self.journal) = (Disk::default(), Journal::new(grid()));
            state = self.journal.recover();
        }
        let owner = |owner: usize| [owner as u8; 16];
        let adopted = state
            .transfer_id
            .is_some_and(|id| id != owner(self.view.owner));
        if adopted && (self.view.digest().is_none() || state.entries_digest != self.view.digest()) {
            // Refused; the former owner comes back.
            self.view.owner = 1 - self.view.owner;
            self.reopen();
            return self.begin_session();
        }
        let mut nonce = [0; 16];
        nonce[..8].copy_from_slice(&self.rng.next().to_le_bytes());
        let mut records = vec![Record::Session {
            epoch: state.epoch + 1,
            nonce,
            transfer_id: owner(self.view.owner),
            entries_digest: self.view.digest(),
            adopted,
            unsynced: false,
        }];
        let mut recovered = Recovered {
            next_number: state.next_entry_number,
            sources: if adopted {
                HashMap::new()
            } else {
                state.sources
            },
            ..Recovered::default()
        };
        let mut lost = Vec::new();
        for (number, mut entry) in state.entries {
            let EntryRecord {
                file,
                data_offset,
                header,
                source_keys,
                ..
            } = entry.record;
            let slot = SlotFile {
                number,
                file,
                data_offset,
                header,
                source_keys,
            };
            if self.rng.chance(self.faults.tamper) {
                self.disk.remove(&slot.file);
                self.ledger.forget(&slot.header.name);
            }
            if !self.disk.is_intact(&slot) {
                let excused = self.disk.was_removed(&slot.file);
                assert!(
                    excused,
                    "{:?} was recorded before its file was durable",
                    slot.header.name
                );
                lost.push(number);
                continue;
            }
            if adopted {
                entry.held.union_with(&std::mem::take(&mut entry.durable));
            }
            self.story.resumed_cells += entry.durable.count();
            self.story.held_cells += entry.held.count();
            recovered.entries.push(RecoveredEntry {
                slot,
                durable: entry.durable,
                held: entry.held,
                sums: entry.sums,
            });
        }
        if adopted {
            self.story.adoptions += 1;
            self.ledger.clear();
        }
        self.ledger.recovered(&recovered);
        if !lost.is_empty() {
            records.push(Record::Forget(lost));
        }
        self.journal.append(&records);
        if self.rng.chance(self.faults.power * 5) {
            self.disk.power_loss(&mut self.rng);
            self.journal.power_loss(&mut self.rng);
            return;
        }
        self.journal.sync();
        self.story.sessions += 1;
        let config = ReceiverConfig {
            max_lanes: 4,
            grid: grid(),
            codecs: CodecChoice::Lz4.codecs(),
            commit: self.commit,
            layout: self.layout,
            container_header_len: None,
            manifest: self.view.promise,
            fingerprint: None,
        };
        let receiver = Receiver::new(config, recovered);
        self.session = Some(Session::new(
            self.view.clone(),
            receiver,
            self.window_bytes.max(CELL_LEN),
            self.codec,
        ));
    }
}

/// The records of a group, in the order of the store.
pub(super) fn records(group: &Group) -> Vec<Record> {
    let mut records = Vec::new();
    if !group.forget.is_empty() {
        records.push(Record::Forget(group.forget.clone()));
    }
    records.extend(group.sources.iter().cloned().map(Record::Source));
    records.extend(group.entries.iter().map(|slot| {
        Record::Entry(EntryRecord {
            number: slot.number,
            header: slot.header.clone(),
            file: slot.file.clone(),
            data_offset: slot.data_offset,
            source_keys: slot.source_keys.clone(),
        })
    }));
    let run = |cells: &GroupCells| Run {
        entry: cells.number,
        first: cells.first,
        crcs: cells.crcs.clone(),
    };
    if !group.cells.is_empty() {
        records.push(Record::Cells(group.cells.iter().map(run).collect()));
    }
    if !group.kept.is_empty() {
        records.push(Record::Kept(group.kept.iter().map(run).collect()));
    }
    records
}
