//! Announcements: what the session wants to bring, held against the journal.

use super::Receiver;
use crate::{
    format::safetensors,
    plan::{
        EntryHeader, EntryKind, MAX_ENTRIES, MAX_ENTRY_SOURCES, Order, Place, PlanError, SourceKey,
        SourceState, clip,
    },
    protocol::{
        Announcement, Batch, CONTAINER_FILE, Layout, ManifestPromise, ProtocolError, Reason,
        slot::{Slot, SlotFile},
    },
};
use std::sync::Arc;

/// Where an entry has to lie.
struct FixedPlace {
    file: String,
    data_offset: Option<u64>,
}

impl Receiver {
    /// Sources and entries of a frame. Its chunks go to [`Receiver::arrive`].
    ///
    /// # Errors
    /// The sender broke a rule.
    pub fn announce(&mut self, batch: &Batch) -> Result<(), ProtocolError> {
        let bad = |why: String| ProtocolError::new(Reason::BadFrame, why);
        if self.finish.is_some() && !(batch.sources.is_empty() && batch.entries.is_empty()) {
            return Err(bad("an announcement came after finish".into()));
        }
        if !batch.sources.is_empty() && batch.first_source as usize != self.session_sources.len() {
            return Err(bad(format!(
                "source {} was announced where {} was due",
                batch.first_source,
                self.session_sources.len()
            )));
        }
        for source in &batch.sources {
            self.announce_source(source)?;
        }
        if !batch.entries.is_empty() && batch.first_entry as usize != self.announced.len() {
            return Err(bad(format!(
                "entry {} was announced where {} was due",
                batch.first_entry,
                self.announced.len()
            )));
        }
        for entry in &batch.entries {
            self.announce_entry(entry)?;
        }
        Ok(())
    }

    pub(super) fn announce_source(&mut self, state: &SourceState) -> Result<(), ProtocolError> {
        if self.session_sources.len() as u64 >= MAX_ENTRIES {
            return Err(PlanError::TooMany {
                what: "sources",
                found: self.session_sources.len() as u64 + 1,
                limit: MAX_ENTRIES,
            }
            .into());
        }
        if !self.seen_sources.insert(state.key) {
            return Err(ProtocolError::new(
                Reason::BadFrame,
                "a source was announced twice",
            ));
        }
        self.session_sources.push(state.key);
        match self.recorded_sources.get(&state.key) {
            Some(earlier) if state.unchanged_since(earlier) => return Ok(()),
            Some(_) => {
                let numbers = self.recovered_by_source.get(&state.key);
                for number in numbers.into_iter().flatten() {
                    // One that was announced since may come from elsewhere now.
                    if let Some(slot) = self.slots.get_mut(number)
                        && slot.slot.source_keys.contains(&state.key)
                    {
                        slot.demote();
                    }
                }
                self.barrier.demoted.push(state.clone());
            }
            None => self.new_sources.push(state.clone()),
        }
        self.recorded_sources.insert(state.key, state.clone());
        Ok(())
    }

    pub(super) fn announce_entry(&mut self, entry: &Announcement) -> Result<(), ProtocolError> {
        let header = &entry.header;
        header.check()?;
        let wire_entry = self.announced.len();
        if wire_entry as u64 >= MAX_ENTRIES {
            return Err(PlanError::TooMany {
                what: "entries",
                found: wire_entry as u64 + 1,
                limit: MAX_ENTRIES,
            }
            .into());
        }
        let wire_entry = wire_entry as u32;
        if entry.sources.len() > MAX_ENTRY_SOURCES {
            return Err(PlanError::TooMany {
                what: "sources of an entry",
                found: entry.sources.len() as u64,
                limit: MAX_ENTRY_SOURCES as u64,
            }
            .into());
        }
        let mut source_keys = Vec::with_capacity(entry.sources.len());
        for &index in &entry.sources {
            let key = self.session_sources.get(index as usize).ok_or_else(|| {
                ProtocolError::new(
                    Reason::BadFrame,
                    format!(
                        "entry {:?} cites source {index}, which was not announced",
                        clip(&header.name)
                    ),
                )
            })?;
            source_keys.push(*key);
        }
        self.announced_bytes = self
            .announced_bytes
            .checked_add(header.byte_len)
            .ok_or_else(|| ProtocolError::new(Reason::BadShape, "total length overflows"))?;
        if let ManifestPromise::Complete {
            total_bytes,
            entry_count,
            ..
        } = self.config.manifest
            && (self.announced_bytes > total_bytes || u64::from(wire_entry) >= entry_count)
        {
            return Err(ProtocolError::new(
                Reason::ManifestMismatch,
                format!(
                    "more is announced than the {entry_count} entries and {total_bytes} bytes of open"
                ),
            ));
        }

        let known = self.by_name.get(&header.name).copied();
        if known.is_some_and(|n| self.slots.get(&n).is_some_and(|s| s.wire_entry.is_some())) {
            return Err(PlanError::Duplicate {
                name: clip(&header.name),
            }
            .into());
        }
        let is_tensor = matches!(header.kind, EntryKind::Tensor { .. });
        let fixed = self.fixed_place(header)?;
        self.tensor_count += u64::from(is_tensor);
        let number = match known {
            Some(number) if self.fits(number, entry, fixed.as_ref()) => {
                self.rebind(number, source_keys);
                number
            }
            _ => {
                if let Some(old) = known {
                    self.forget(old);
                }
                self.add_slot(entry, fixed, source_keys)?
            }
        };
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.wire_entry = Some(wire_entry);
            slot.is_first = entry.is_first;
        }
        self.announced.push((number, entry.clone()));
        self.unanswered.push_back(number);
        Ok(())
    }

    /// Whether what the journal has under this name is the announced entry.
    fn fits(&self, number: u32, entry: &Announcement, fixed: Option<&FixedPlace>) -> bool {
        self.slots.get(&number).is_some_and(|slot| {
            let (slot, fixed) = (&slot.slot, fixed.map(|f| (&f.file, f.data_offset)));
            slot.header == entry.header
                && fixed.is_none_or(|fixed| fixed == (&slot.file, slot.data_offset))
        })
    }

    /// Where an entry has to lie, if that does not follow from its name.
    fn fixed_place(&mut self, header: &EntryHeader) -> Result<Option<FixedPlace>, ProtocolError> {
        let EntryKind::Tensor { dtype } = header.kind else {
            return Ok(None);
        };
        let Some(offset) = self.container_end else {
            let file = format!("weight_{}.npy", self.tensor_count);
            let place = FixedPlace {
                file,
                data_offset: None,
            };
            return Ok((self.config.layout == Layout::Indexed).then_some(place));
        };
        if !safetensors::can_hold(&header.name, dtype)
            || header.big_endian
            || header.order != Order::C
        {
            return Err(ProtocolError::new(
                Reason::Unsupported,
                format!(
                    "tensor {:?} of {dtype} cannot lie in a safetensors file as it is",
                    clip(&header.name)
                ),
            ));
        }
        let end = offset.checked_add(header.byte_len);
        self.container_end = Some(
            end.ok_or_else(|| ProtocolError::new(Reason::BadShape, "total length overflows"))?,
        );
        Ok(Some(FixedPlace {
            file: CONTAINER_FILE.to_owned(),
            data_offset: Some(offset),
        }))
    }

    /// The entry now comes from these sources; from others than recorded its
    /// cells are no longer trusted.
    pub(super) fn rebind(&mut self, number: u32, source_keys: Vec<SourceKey>) {
        let Some(slot) = self.slots.get_mut(&number) else {
            return;
        };
        if slot.slot.source_keys != source_keys {
            Arc::make_mut(&mut slot.slot).source_keys = source_keys;
            slot.demote();
            self.barrier.rebound.push(number);
        }
    }

    pub(super) fn forget(&mut self, number: u32) {
        if let Some(slot) = self.slots.remove(&number) {
            self.file_names.release(&slot.slot.file);
            self.by_name.remove(&slot.slot.header.name);
            self.places.remove(slot.slot.place());
            self.barrier.forget.push(number);
        }
    }

    fn add_slot(
        &mut self,
        entry: &Announcement,
        fixed: Option<FixedPlace>,
        source_keys: Vec<SourceKey>,
    ) -> Result<u32, ProtocolError> {
        let header = &entry.header;
        let (file, data_offset) = match (fixed, header.kind) {
            (Some(FixedPlace { file, data_offset }), _) => {
                // Entries of an earlier session may sit there.
                let place = Place {
                    file: &file,
                    data_offset,
                    byte_len: header.byte_len,
                };
                for holder in self.places.holders(place) {
                    self.forget(holder);
                }
                self.file_names.reserve(&file);
                (file, data_offset)
            }
            (None, EntryKind::Tensor { .. }) => (self.file_names.tensor(&header.name), None),
            (None, EntryKind::Blob) => (self.file_names.blob(&header.name), None),
        };
        let number = self.next_number;
        self.next_number = number.checked_add(1).ok_or_else(|| {
            ProtocolError::new(Reason::TooMany, "entry numbers are used up; use restart")
        })?;
        let slot = SlotFile {
            number,
            file,
            data_offset,
            header: header.clone(),
            source_keys,
        };
        self.by_name.insert(header.name.clone(), number);
        self.places.insert(slot.place(), number);
        self.slots.insert(number, Slot::new(slot, self.config.grid));
        Ok(number)
    }
}
