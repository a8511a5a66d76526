//! One entry as the receiver sees it, and the tokens that chunks carry.

use crate::plan::{CellSums, EntryHeader, Grid, Place, RangeSet, SourceKey};
use std::sync::Arc;

/// A chunk that arrived and may be verified; not yet allowed to be written.
#[derive(Debug)]
pub struct Ticket {
    pub(super) lane: u32,
    pub(super) sequence: u64,
    pub(super) number: u32,
    pub(super) cell: u64,
    /// First byte of the cell in the entry.
    pub offset: u64,
    /// Raw length in bytes.
    pub raw_len: u32,
    /// CRC-32C that the head promised.
    pub crc32c: u32,
    pub(super) wire_entry: u32,
}

/// The right to write one cell, once. Minted by the receiver alone, not `Clone`,
/// consumed by the write: so no two threads ever write the same bytes.
#[derive(Debug)]
pub struct Placement {
    pub(super) ticket: Ticket,
    pub(super) slot: Arc<SlotFile>,
    pub(super) recorded: bool,
}

impl Placement {
    /// The file of the entry.
    pub fn slot(&self) -> &SlotFile {
        &self.slot
    }

    /// The journal cites the file: it exists. Otherwise the first write makes it.
    pub fn is_recorded(&self) -> bool {
        self.recorded
    }

    /// First byte of the cell in the entry.
    pub fn offset(&self) -> u64 {
        self.ticket.offset
    }

    /// Length of the cell in bytes.
    pub fn raw_len(&self) -> u32 {
        self.ticket.raw_len
    }

    /// The cell is the entry.
    pub fn is_whole(&self) -> bool {
        self.ticket.offset == 0 && u64::from(self.ticket.raw_len) == self.slot.header.byte_len
    }

    /// The bytes are in the file (not yet durable).
    pub fn into_written(self) -> Written {
        Written {
            ticket: self.ticket,
        }
    }
}

/// Proof that a placement was used.
#[derive(Debug)]
pub struct Written {
    pub(super) ticket: Ticket,
}

/// The file of an entry below the staging folder.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SlotFile {
    /// Receiver's number of the entry.
    pub number: u32,
    /// Relative path, safe by construction.
    pub file: String,
    /// Where its bytes begin in a file that it shares with other entries; `None` where it
    /// has a file of its own.
    pub data_offset: Option<u64>,
    /// What it holds.
    pub header: EntryHeader,
    /// Sources of its bytes.
    pub source_keys: Vec<SourceKey>,
}

impl SlotFile {
    /// Where it lies.
    pub fn place(&self) -> Place<'_> {
        Place {
            file: &self.file,
            data_offset: self.data_offset,
            byte_len: self.header.byte_len,
        }
    }
}

/// What a journal knows of an entry.
#[derive(Clone, Debug)]
pub struct RecoveredEntry {
    /// Number, file and header.
    pub slot: SlotFile,
    /// Cells on disk.
    pub durable: RangeSet,
    /// Cells on disk from a state of the source that may be gone.
    pub held: RangeSet,
    /// CRC-32C of those cells.
    pub sums: CellSums,
}

/// State of every cell of one entry.
#[derive(Debug)]
pub(super) struct Slot {
    pub(super) slot: Arc<SlotFile>,
    pub(super) cell_count: u64,
    /// An ENTRY record is in the journal, or in a group under way.
    pub(super) journaled: bool,
    /// Number in the session, once announced.
    pub(super) wire_entry: Option<u32>,
    /// The first Wanted answer has gone out.
    pub(super) answered: bool,
    /// To become durable as soon as it is complete.
    pub(super) is_first: bool,
    pub(super) durable: RangeSet,
    pub(super) held: RangeSet,
    pub(super) comparing: RangeSet,
    pub(super) placing: RangeSet,
    pub(super) written: RangeSet,
    pub(super) keeping: RangeSet,
    pub(super) committing: RangeSet,
    pub(super) sums: CellSums,
}

impl Slot {
    pub(super) fn new(slot: SlotFile, grid: Grid) -> Self {
        let cell_count = grid.cell_count(slot.header.byte_len);
        Slot {
            slot: Arc::new(slot),
            cell_count,
            journaled: false,
            wire_entry: None,
            answered: false,
            is_first: false,
            durable: RangeSet::new(),
            held: RangeSet::new(),
            comparing: RangeSet::new(),
            placing: RangeSet::new(),
            written: RangeSet::new(),
            keeping: RangeSet::new(),
            committing: RangeSet::new(),
            sums: CellSums::default(),
        }
    }

    pub(super) fn recovered(entry: RecoveredEntry, grid: Grid) -> Self {
        Slot {
            journaled: true,
            durable: entry.durable,
            held: entry.held,
            sums: entry.sums,
            ..Slot::new(entry.slot, grid)
        }
    }

    /// Some chunk of this cell was already granted, written or is durable.
    pub(super) fn is_taken(&self, cell: u64) -> bool {
        [
            &self.placing,
            &self.written,
            &self.keeping,
            &self.committing,
            &self.durable,
        ]
        .iter()
        .any(|set| set.contains(cell))
    }

    /// All durable cells become held. Returns whether there were any.
    pub(super) fn demote(&mut self) -> bool {
        let any = !self.durable.is_empty();
        let durable = std::mem::take(&mut self.durable);
        self.held.union_with(&durable);
        any
    }

    /// Cells that nobody has brought yet and that are not held.
    pub(super) fn missing(&self) -> RangeSet {
        let mut missing = RangeSet::of(0..self.cell_count);
        for set in [
            &self.placing,
            &self.written,
            &self.keeping,
            &self.committing,
            &self.durable,
            &self.held,
        ] {
            missing.subtract(set);
        }
        missing
    }

    /// Every cell is on disk, durable or not, and proven.
    pub(super) fn is_complete(&self) -> bool {
        let parts = [
            &self.written,
            &self.keeping,
            &self.committing,
            &self.durable,
        ];
        // A cell is in one of them at most.
        parts.iter().map(|set| set.count()).sum::<u64>() == self.cell_count
    }

    /// Nothing is left to do: every cell is durable.
    pub(super) fn is_durable(&self) -> bool {
        self.durable.count() == self.cell_count
    }
}
