//! Groups that become durable, and the end of a session that succeeded.

use super::{Group, GroupCells, InCommit, PublishPlan, ReceiveAction, Receiver};
use crate::{
    plan::{RangeSet, clip, digest_entries},
    protocol::{
        Announcement, Finish, ManifestPromise, ProtocolError, Reason,
        slot::{Slot, SlotFile},
    },
};
use std::{collections::HashSet, sync::Arc, time::Instant};

impl Receiver {
    /// Entries that are complete and durable once this group is. Nobody writes to their
    /// files any more in this session.
    pub fn completing(&self, group: &Group) -> Vec<Arc<SlotFile>> {
        let numbers = self.in_commit.iter().filter(|g| g.id == group.id);
        let numbers = numbers.flat_map(|g| &g.numbers);
        let slots = numbers.filter_map(|number| self.slots.get(number));
        let is_last =
            |slot: &&Slot| slot.durable.count() + slot.committing.count() == slot.cell_count;
        slots.filter(is_last).map(|s| Arc::clone(&s.slot)).collect()
    }

    /// The group of [`ReceiveAction::Commit`] is durable. Returns the entries that
    /// are complete now: their files need not stay open.
    pub fn committed(&mut self, id: u64) -> Vec<u32> {
        let mut complete = Vec::new();
        let Some(group) = self.in_commit.take_if(|g| g.id == id) else {
            return complete;
        };
        self.undurable_bytes -= group.bytes;
        for number in group.numbers {
            let Some(slot) = self.slots.get_mut(&number) else {
                continue;
            };
            let committed = std::mem::take(&mut slot.committing);
            slot.durable.union_with(&committed);
            if let Some(entry) = slot.wire_entry
                && !committed.is_empty()
            {
                self.durable_out
                    .entry(entry)
                    .or_default()
                    .union_with(&committed);
            }
            if slot.is_durable() {
                complete.push(number);
            }
        }
        complete
    }

    /// The sender says that everything is written.
    ///
    /// # Errors
    /// It does not match what was announced, or bytes are missing.
    pub fn finish(&mut self, finish: Finish) -> Result<(), ProtocolError> {
        let mismatch = |why: String| Err(ProtocolError::new(Reason::ManifestMismatch, why));
        if self.finish.is_some() {
            return Err(ProtocolError::new(Reason::BadFrame, "finish came twice"));
        }
        let found = self.announced.len() as u64;
        if (finish.entry_count, finish.total_bytes) != (found, self.announced_bytes) {
            return mismatch(format!(
                "finish names {} entries and {} bytes, announced were {found} and {}",
                finish.entry_count, finish.total_bytes, self.announced_bytes
            ));
        }
        let digest = digest_entries(self.announced.iter().map(|(_, a)| &a.header));
        let promised = match self.config.manifest {
            ManifestPromise::Complete {
                entries_digest,
                entry_count,
                total_bytes,
            } => {
                (entry_count, total_bytes) == (found, self.announced_bytes)
                    && entries_digest == digest
            }
            ManifestPromise::Open => true,
        };
        if finish.entries_digest != digest || !promised {
            return mismatch("the digest of the entries is not that of the announcements".into());
        }
        for (number, announcement) in &self.announced {
            let slot = self.slots.get(number);
            let missing = slot.map_or(u64::MAX, |s| s.missing().count() + s.held.count());
            if missing > 0 || slot.is_some_and(|s| !s.answered) {
                return mismatch(format!(
                    "finish came while {missing} cells of {:?} are missing",
                    clip(&announcement.header.name)
                ));
            }
        }
        self.finish = Some(finish);
        Ok(())
    }

    pub(super) fn poll_commit(&mut self, now: Instant) -> Option<Group> {
        if self.in_commit.is_some() {
            return None;
        }
        let policy = &self.config.commit;
        let aged = policy.interval.is_some_and(|interval| {
            self.dirty_since
                .is_some_and(|since| now.saturating_duration_since(since) >= interval)
        });
        let full = self.dirty_bytes >= policy.bytes || self.dirty.len() >= policy.files;
        let finishing = self.finish.is_some() && self.placing_count == 0 && self.has_unrecorded();
        let ending = self.ending && self.placing_count == 0 && !self.dirty.is_empty();
        let urgent = self.is_urgent;
        if !(aged || urgent || full || finishing || ending || !self.barrier.is_empty()) {
            return None;
        }
        Some(self.take_group())
    }

    /// Whether anything that was announced is not yet in the journal.
    pub(super) fn has_unrecorded(&self) -> bool {
        !self.dirty.is_empty()
            || !self.new_sources.is_empty()
            || self
                .announced
                .iter()
                .any(|(n, _)| self.slots.get(n).is_some_and(|s| !s.journaled))
    }

    pub(super) fn take_group(&mut self) -> Group {
        let id = self.next_group_id;
        self.next_group_id += 1;
        let barrier = std::mem::take(&mut self.barrier);
        let is_barrier = !barrier.is_empty();
        let mut numbers: Vec<u32> = std::mem::take(&mut self.dirty).into_iter().collect();
        if self.finish.is_some() {
            // Entries without bytes get their file and record at the end.
            let empty = self.announced.iter().map(|(n, _)| *n);
            let empty = empty.filter(|n| self.slots.get(n).is_some_and(|s| !s.journaled));
            let known: HashSet<u32> = numbers.iter().copied().collect();
            numbers.extend(empty.filter(|n| !known.contains(n)).collect::<Vec<_>>());
        }
        let mut group = Group {
            id,
            forget: barrier.forget,
            sources: barrier.demoted,
            ..Group::default()
        };
        group.sources.append(&mut self.new_sources);
        for number in barrier.rebound {
            if let Some(slot) = self.slots.get(&number) {
                group.entries.push(Arc::clone(&slot.slot));
            }
        }
        for &number in &numbers {
            let Some(slot) = self.slots.get_mut(&number) else {
                continue;
            };
            group.files.push((Arc::clone(&slot.slot), slot.journaled));
            if !slot.journaled {
                slot.journaled = true;
                group.entries.push(Arc::clone(&slot.slot));
            }
            let written = std::mem::take(&mut slot.written);
            let keeping = std::mem::take(&mut slot.keeping);
            let runs = |set: &RangeSet| {
                let run = |r: std::ops::Range<u64>| GroupCells {
                    number,
                    first: r.start,
                    crcs: r.map(|cell| slot.sums.get(cell)).collect(),
                };
                set.iter().map(run).collect::<Vec<_>>()
            };
            group.cells.extend(runs(&written));
            group.kept.extend(runs(&keeping));
            slot.committing.union_with(&written);
            slot.committing.union_with(&keeping);
        }
        self.in_commit = Some(InCommit {
            id,
            is_barrier,
            bytes: std::mem::take(&mut self.dirty_bytes),
            numbers,
        });
        self.dirty_since = None;
        self.is_urgent = false;
        group
    }

    pub(super) fn poll_publish(&mut self) -> Option<ReceiveAction> {
        let finish = self.finish?;
        let idle = self.is_settled() && self.comparing_count == 0 && !self.has_unrecorded();
        let complete = |(number, _): &(u32, Announcement)| {
            self.slots.get(number).is_some_and(Slot::is_durable)
        };
        if !idle || !self.announced.iter().all(complete) {
            return None;
        }
        self.publishing = true;
        let entries = self.announced.iter().filter_map(|(number, announcement)| {
            let slot = self.slots.get(number)?;
            Some((
                Arc::clone(&slot.slot),
                announcement.clone(),
                self.entry_crc(slot),
            ))
        });
        Some(ReceiveAction::Publish(Box::new(PublishPlan {
            entries: entries.collect(),
            fingerprint: finish.fingerprint.or(self.config.fingerprint),
            entries_digest: finish.entries_digest,
        })))
    }

    /// CRC-32C of a whole entry, combined from its cells.
    pub(super) fn entry_crc(&self, slot: &Slot) -> u32 {
        let byte_len = slot.slot.header.byte_len;
        (0..slot.cell_count).fold(0, |crc, cell| {
            let len = self
                .config
                .grid
                .cell_span(byte_len, cell)
                .map_or(0, |(_, n)| n);
            crate::format::checksum::combine(crc, slot.sums.get(cell), u64::from(len))
        })
    }
}
