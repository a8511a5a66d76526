//! Chunks and comparisons: from a head on the wire to bytes in the file.

use super::{Arrival, CompareJob, MAX_REJECTS_IN_ROW, Receiver};
use crate::{
    format::codec::{self, Codec},
    mutant,
    plan::{RangeSet, clip},
    protocol::{
        ChunkHead, Compare, MAX_COMPARE_CELLS, MAX_COMPARING_CELLS, ProtocolError, Reason, Reject,
        Wanted,
        slot::{Placement, Ticket, Written},
    },
};
use std::{sync::Arc, time::Instant};

impl Receiver {
    /// The head of a chunk, before its bytes are taken in.
    ///
    /// # Errors
    /// The chunk does not fit the grid, the entry or the negotiated codecs.
    pub fn arrive(&mut self, lane: u32, head: &ChunkHead) -> Result<Arrival, ProtocolError> {
        let range = |why: String| ProtocolError::new(Reason::BadRange, why);
        let number = self.announced_number(head.entry)?;
        let grid = self.config.grid;
        let slot = self.slot_mut(number)?;
        let header = &slot.slot.header;
        if !slot.answered {
            return Err(ProtocolError::new(
                Reason::BadFrame,
                format!("a chunk of {:?} came before its wanted", clip(&header.name)),
            ));
        }
        let on_grid = match grid.cell_at(header.byte_len, head.offset) {
            None if mutant::is("no_range_check") => Some(0),
            cell => cell,
        };
        let cell = on_grid.ok_or_else(|| {
            range(format!(
                "offset {} is not the start of a cell of {:?} with {} bytes",
                head.offset,
                clip(&header.name),
                header.byte_len
            ))
        })?;
        let (offset, cell_len) = grid
            .cell_span(header.byte_len, cell)
            .ok_or_else(|| range("no such cell".into()))?;
        if head.raw_len != cell_len && !mutant::is("no_range_check") {
            return Err(range(format!(
                "chunk at {offset} of {:?} has {} bytes, the cell has {cell_len}",
                clip(&header.name),
                head.raw_len
            )));
        }
        let item_len = header.item_len();
        let taken = slot.is_taken(cell);
        Codec::from_id(head.codec)
            .filter(|codec| self.config.codecs & codec.bit() != 0)
            .ok_or_else(|| {
                ProtocolError::new(
                    Reason::BadCompression,
                    format!("codec {} was not agreed on", head.codec),
                )
            })
            .and_then(|codec| {
                codec::check_lengths(codec, head.raw_len, head.encoded_len, item_len)
                    .map_err(|e| ProtocolError::new(Reason::BadCompression, e.to_string()))
            })?;
        let lane_state = self.lane_mut(lane)?;
        let sequence = lane_state.arrive();
        if taken {
            lane_state.settle(sequence);
            return Ok(Arrival::Duplicate);
        }
        Ok(Arrival::Take(Ticket {
            lane,
            sequence,
            number,
            cell,
            offset,
            raw_len: cell_len,
            crc32c: head.crc32c,
            wire_entry: head.entry,
        }))
    }

    /// The bytes of a chunk are verified: may they be written? `None` when
    /// another chunk got the cell meanwhile.
    pub fn grant(&mut self, ticket: Ticket) -> Option<Placement> {
        let Some(slot) = self.slots.get_mut(&ticket.number) else {
            self.settle(ticket.lane, ticket.sequence);
            return None;
        };
        if slot.is_taken(ticket.cell) || self.publishing || self.ending {
            let (lane, sequence) = (ticket.lane, ticket.sequence);
            self.settle(lane, sequence);
            return None;
        }
        slot.held.remove(ticket.cell..ticket.cell + 1);
        slot.placing.insert(ticket.cell..ticket.cell + 1);
        self.placing_count += 1;
        Some(Placement {
            ticket,
            slot: Arc::clone(&slot.slot),
            recorded: slot.journaled,
        })
    }

    /// The bytes of a chunk do not match their checksum.
    ///
    /// # Errors
    /// Too many in a row did not.
    pub fn reject(&mut self, ticket: Ticket, found_crc32c: u32) -> Result<(), ProtocolError> {
        // The sender of a lane that is gone sends the cell again by itself.
        if let Some(lane) = self.lanes.get_mut(&ticket.lane) {
            lane.rejects.push(Reject {
                entry: ticket.wire_entry,
                offset: ticket.offset,
                expected_crc32c: ticket.crc32c,
                found_crc32c,
            });
        }
        self.settle(ticket.lane, ticket.sequence);
        self.rejects_in_row += 1;
        if self.rejects_in_row > MAX_REJECTS_IN_ROW {
            let name = self
                .slots
                .get(&ticket.number)
                .map(|s| clip(&s.slot.header.name));
            return Err(ProtocolError::new(
                Reason::Checksum,
                format!(
                    "{} chunks in a row arrived damaged, the last at byte {} of {:?}: expected crc32c {:08x}, found {found_crc32c:08x}",
                    self.rejects_in_row,
                    ticket.offset,
                    name.unwrap_or_default(),
                    ticket.crc32c
                ),
            ));
        }
        Ok(())
    }

    /// The bytes of a placement are in the file.
    pub fn written(&mut self, written: Written, now: Instant) {
        let ticket = written.ticket;
        self.rejects_in_row = 0;
        self.placing_count -= 1;
        if let Some(slot) = self.slots.get_mut(&ticket.number) {
            slot.placing.remove(ticket.cell..ticket.cell + 1);
            slot.written.insert(ticket.cell..ticket.cell + 1);
            slot.sums.set(ticket.cell, ticket.crc32c);
        }
        self.mark_dirty(ticket.number, u64::from(ticket.raw_len), now);
        self.settle(ticket.lane, ticket.sequence);
    }

    /// The bytes of a placement could not be written. The session must end.
    pub fn abandon(&mut self, placement: Placement) {
        let ticket = placement.ticket;
        self.placing_count -= 1;
        if let Some(slot) = self.slots.get_mut(&ticket.number) {
            slot.placing.remove(ticket.cell..ticket.cell + 1);
        }
    }

    /// Digests of held cells.
    ///
    /// # Errors
    /// A cell is not held, or too many are under comparison.
    pub fn compare(&mut self, compare: &Compare) -> Result<(), ProtocolError> {
        let bad = |why: &str| ProtocolError::new(Reason::BadFrame, why);
        let number = self.announced_number(compare.entry)?;
        let grid = self.config.grid;
        let count = compare.hashes.len() as u64;
        if count > MAX_COMPARE_CELLS || self.comparing_count + count > MAX_COMPARING_CELLS {
            return Err(bad("too many cells under comparison"));
        }
        let slot = self.slot_mut(number)?;
        let mut jobs = Vec::with_capacity(compare.hashes.len());
        for (i, &blake3) in compare.hashes.iter().enumerate() {
            let cell = compare.first_cell.saturating_add(i as u64);
            if !slot.answered || !slot.held.contains(cell) || slot.comparing.contains(cell) {
                return Err(bad("a cell is compared that is not held"));
            }
            let (offset, raw_len) = grid
                .cell_span(slot.slot.header.byte_len, cell)
                .ok_or_else(|| bad("no such cell"))?;
            slot.comparing.insert(cell..cell + 1);
            jobs.push(CompareJob {
                slot: Arc::clone(&slot.slot),
                cell,
                offset,
                raw_len,
                blake3,
            });
        }
        self.comparing_count += count;
        self.compares.extend(jobs);
        Ok(())
    }

    /// A comparison is done; `crc32c` is that of the bytes on disk.
    pub fn compared(&mut self, job: &CompareJob, equal: bool, crc32c: u32, now: Instant) {
        self.comparing_count -= 1;
        let number = job.slot.number;
        let Some(slot) = self.slots.get_mut(&number) else {
            return;
        };
        let cell = job.cell..job.cell + 1;
        slot.comparing.remove(cell.clone());
        // A chunk for the cell may have come meanwhile; then the answer is moot.
        if !slot.held.contains(job.cell) {
            return;
        }
        slot.held.remove(cell.clone());
        let Some(entry) = slot.wire_entry else { return };
        if equal {
            slot.keeping.insert(cell.clone());
            slot.sums.set(job.cell, crc32c);
            self.keeps_out.entry(entry).or_default().insert(cell);
            self.mark_dirty(number, u64::from(job.raw_len), now);
        } else {
            self.further.push(Wanted {
                entry,
                wanted: RangeSet::of(cell),
                held: RangeSet::new(),
                last: true,
            });
        }
    }
}
