//! The receiving role.

use super::{
    Abort, Announcement, Batch, ChunkHead, Compare, Durable, Finish, Keep, Layout,
    MAX_COMPARE_CELLS, MAX_COMPARING_CELLS, ManifestPromise, ProtocolError, Reason, ReceiverFrame,
    Reject, Wanted,
    lane::ReceiveLane,
    slot::{Placement, RecoveredEntry, Slot, SlotFile, Ticket, Written},
};
use crate::{
    format::codec::{self, Codec},
    plan::{
        Digest16, EntryKind, FileNames, Grid, MAX_ENTRIES, MAX_ENTRY_SOURCES, PlanError, RangeSet,
        SourceKey, SourceState, clip, digest_entries,
    },
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::{Duration, Instant},
};

/// Refused chunks in a row that end the session.
const MAX_REJECTS_IN_ROW: u32 = 16;
/// Cell runs in one Wanted, so that it stays far below 1 MiB.
const MAX_WANTED_RUNS: usize = 16 << 10;
/// Answers in one frame.
const MAX_ANSWERS: usize = 512;
/// Chunks settled before an ack is sent while others are under way.
const ACK_BATCH: u64 = 4;

/// When a group of writes is committed.
#[derive(Clone, Copy, Debug)]
pub struct CommitPolicy {
    /// At this many bytes.
    pub bytes: u64,
    /// At this many files.
    pub files: usize,
    /// At this age of the oldest write; `None` = only at the end.
    pub interval: Option<Duration>,
    /// The wire waits while more is written than durable.
    pub max_undurable_bytes: u64,
}

/// Terms of one session.
#[derive(Clone, Copy, Debug)]
pub struct ReceiverConfig {
    /// The transfer's grid.
    pub grid: Grid,
    /// Bitmap of codecs accepted.
    pub codecs: u32,
    /// When to commit.
    pub commit: CommitPolicy,
    /// File names.
    pub layout: Layout,
    /// What the sender promised at Open.
    pub manifest: ManifestPromise,
    /// From [`super::Open::fingerprint`].
    pub fingerprint: Option<Digest16>,
}

/// What the journal of a transfer says when a session begins.
#[derive(Clone, Debug, Default)]
pub struct Recovered {
    /// Entries with their files.
    pub entries: Vec<RecoveredEntry>,
    /// Last recorded state of each source.
    pub sources: HashMap<SourceKey, SourceState>,
    /// First entry number that was never used.
    pub next_number: u32,
}

/// What became of a chunk head.
#[derive(Debug)]
pub enum Arrival {
    /// Verify it, then ask for a placement.
    Take(Ticket),
    /// The cell is already here: drop the bytes.
    Duplicate,
}

/// Cells of one entry in a group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GroupCells {
    /// Receiver's number of the entry.
    pub number: u32,
    /// First cell.
    pub first: u64,
    /// CRC-32C of each cell.
    pub crcs: Vec<u32>,
}

/// Work for the committer: sync the files, then append the records in the order
/// of the fields, then sync the journal.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Group {
    /// Number of the group in the session.
    pub id: u64,
    /// Files to sync; `false` = no record cites the file yet, so it may have to be
    /// made and its name is to be synced too.
    pub files: Vec<(Arc<SlotFile>, bool)>,
    /// Entries whose file is given up.
    pub forget: Vec<u32>,
    /// Source states.
    pub sources: Vec<SourceState>,
    /// Entries that get their record now.
    pub entries: Vec<Arc<SlotFile>>,
    /// Cells written.
    pub cells: Vec<GroupCells>,
    /// Held cells that proved equal.
    pub kept: Vec<GroupCells>,
}

/// A held cell to be read and compared.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CompareJob {
    /// The file of the entry.
    pub slot: Arc<SlotFile>,
    /// Cell.
    pub cell: u64,
    /// First byte of the cell.
    pub offset: u64,
    /// Length in bytes.
    pub raw_len: u32,
    /// BLAKE3 of the sender's bytes.
    pub blake3: [u8; 32],
}

/// What to publish.
#[derive(Clone, Debug)]
pub struct PublishPlan {
    /// Announced entries in order, each with CRC-32C of its bytes.
    pub entries: Vec<(Arc<SlotFile>, Announcement, u32)>,
    /// Fingerprint of the source.
    pub fingerprint: Option<Digest16>,
    /// Digest of the entry headers.
    pub entries_digest: Digest16,
}

/// Work that the receiver asks for.
#[derive(Debug)]
pub enum ReceiveAction {
    /// Send a frame on lane 0, except the ack, which belongs to `lane`.
    Send {
        /// Lane of the ack.
        lane: u32,
        /// What to say.
        frame: ReceiverFrame,
    },
    /// Make a group durable, then call [`Receiver::committed`].
    Commit(Group),
    /// Compare a cell, then call [`Receiver::compared`].
    Compare(CompareJob),
    /// Publish; the session ends with Done.
    Publish(Box<PublishPlan>),
}

/// The receiving role of one session.
#[derive(Debug)]
pub struct Receiver {
    config: ReceiverConfig,
    slots: BTreeMap<u32, Slot>,
    by_name: HashMap<String, u32>,
    next_number: u32,
    file_names: FileNames,
    recorded_sources: HashMap<SourceKey, SourceState>,
    session_sources: Vec<SourceKey>,
    seen_sources: HashSet<SourceKey>,
    announced: Vec<(u32, Announcement)>,
    tensor_count: u64,
    announced_bytes: u64,
    /// Announced, Wanted not yet out.
    unanswered: VecDeque<u32>,
    lanes: BTreeMap<u32, ReceiveLane>,
    rejects_in_row: u32,

    // Answers waiting for a frame.
    rejects: Vec<Reject>,
    further: Vec<Wanted>,
    durable_out: BTreeMap<u32, RangeSet>,
    keeps_out: BTreeMap<u32, RangeSet>,
    compares: VecDeque<CompareJob>,
    comparing_count: u64,

    // The next group.
    dirty: BTreeSet<u32>,
    dirty_bytes: u64,
    dirty_since: Option<Instant>,
    new_sources: Vec<SourceState>,
    /// Records that must be durable before any further Wanted goes out.
    barrier: Barrier,
    in_commit: Option<InCommit>,
    next_group_id: u64,
    undurable_bytes: u64,
    placing_count: u64,

    finish: Option<Finish>,
    ending: bool,
    publishing: bool,
}

#[derive(Debug, Default)]
struct Barrier {
    forget: Vec<u32>,
    demoted: Vec<SourceState>,
    rebound: Vec<u32>,
}

impl Barrier {
    fn is_empty(&self) -> bool {
        self.forget.is_empty() && self.demoted.is_empty() && self.rebound.is_empty()
    }
}

#[derive(Debug)]
struct InCommit {
    id: u64,
    is_barrier: bool,
    bytes: u64,
    numbers: Vec<u32>,
}

impl Receiver {
    /// A session over what the journal says.
    pub fn new(config: ReceiverConfig, recovered: Recovered) -> Self {
        let mut file_names = FileNames::default();
        let mut by_name = HashMap::new();
        let mut slots = BTreeMap::new();
        for entry in recovered.entries {
            file_names.reserve(&entry.slot.file);
            by_name.insert(entry.slot.header.name.clone(), entry.slot.number);
            slots.insert(entry.slot.number, Slot::recovered(entry, config.grid));
        }
        Receiver {
            config,
            slots,
            by_name,
            next_number: recovered.next_number,
            file_names,
            recorded_sources: recovered.sources,
            session_sources: Vec::new(),
            seen_sources: HashSet::new(),
            announced: Vec::new(),
            tensor_count: 0,
            announced_bytes: 0,
            unanswered: VecDeque::new(),
            lanes: BTreeMap::from([(0, ReceiveLane::default())]),
            rejects_in_row: 0,
            rejects: Vec::new(),
            further: Vec::new(),
            durable_out: BTreeMap::new(),
            keeps_out: BTreeMap::new(),
            compares: VecDeque::new(),
            comparing_count: 0,
            dirty: BTreeSet::new(),
            dirty_bytes: 0,
            dirty_since: None,
            new_sources: Vec::new(),
            barrier: Barrier::default(),
            in_commit: None,
            next_group_id: 0,
            undurable_bytes: 0,
            placing_count: 0,
            finish: None,
            ending: false,
            publishing: false,
        }
    }

    /// Raw bytes durable in entries that the journal knows.
    pub fn durable_bytes(&self) -> u64 {
        let grid = self.config.grid;
        let bytes = |slot: &Slot| -> u64 {
            let len = slot.slot.header.byte_len;
            slot.durable
                .iter()
                .map(|r| grid.span_bytes(len, r.start, r.end - r.start))
                .sum()
        };
        self.slots.values().map(bytes).sum()
    }

    /// Finish has come and was in order.
    pub fn is_finishing(&self) -> bool {
        self.finish.is_some()
    }

    /// No placement is out and no group is under way.
    pub fn is_settled(&self) -> bool {
        self.placing_count == 0 && self.in_commit.is_none()
    }

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

    fn announce_source(&mut self, state: &SourceState) -> Result<(), ProtocolError> {
        if self.session_sources.len() as u64 >= MAX_ENTRIES {
            return Err(PlanError::TooMany {
                what: "sources",
                found: self.session_sources.len() as u64 + 1,
                limit: MAX_ENTRIES,
            }
            .into());
        }
        if !self.seen_sources.insert(state.key) {
            return Err(ProtocolError::new(Reason::BadFrame, "a source was announced twice"));
        }
        self.session_sources.push(state.key);
        match self.recorded_sources.get(&state.key) {
            Some(earlier) if state.unchanged_since(earlier) => return Ok(()),
            Some(_) => {
                for slot in self.slots.values_mut() {
                    if slot.slot.source_keys.contains(&state.key) {
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

    fn announce_entry(&mut self, entry: &Announcement) -> Result<(), ProtocolError> {
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
                    format!("entry {:?} cites source {index}, which was not announced", clip(&header.name)),
                )
            })?;
            source_keys.push(*key);
        }
        self.announced_bytes = self
            .announced_bytes
            .checked_add(header.byte_len)
            .ok_or_else(|| ProtocolError::new(Reason::BadShape, "total length overflows"))?;
        if let ManifestPromise::Complete { total_bytes, entry_count, .. } = self.config.manifest
            && (self.announced_bytes > total_bytes || u64::from(wire_entry) >= entry_count)
        {
            return Err(ProtocolError::new(
                Reason::ManifestMismatch,
                format!("more is announced than the {entry_count} entries and {total_bytes} bytes of open"),
            ));
        }

        let known = self.by_name.get(&header.name).copied();
        if known.is_some_and(|n| self.slots.get(&n).is_some_and(|s| s.wire_entry.is_some())) {
            return Err(PlanError::Duplicate { name: clip(&header.name) }.into());
        }
        let is_tensor = matches!(header.kind, EntryKind::Tensor { .. });
        let fixed_file = (is_tensor && self.config.layout == Layout::Indexed)
            .then(|| format!("weight_{}.npy", self.tensor_count));
        self.tensor_count += u64::from(is_tensor);
        let number = match known {
            Some(number) if self.fits(number, entry, fixed_file.as_deref()) => {
                self.rebind(number, source_keys);
                number
            }
            _ => {
                if let Some(old) = known {
                    self.forget(old);
                }
                self.add_slot(entry, fixed_file, source_keys)?
            }
        };
        if let Some(slot) = self.slots.get_mut(&number) {
            slot.wire_entry = Some(wire_entry);
        }
        self.announced.push((number, entry.clone()));
        self.unanswered.push_back(number);
        Ok(())
    }

    /// Whether what the journal has under this name is the announced entry.
    fn fits(&self, number: u32, entry: &Announcement, file: Option<&str>) -> bool {
        self.slots.get(&number).is_some_and(|slot| {
            slot.slot.header == entry.header && file.is_none_or(|f| f == slot.slot.file)
        })
    }

    /// The entry now comes from these sources; from others than recorded its
    /// cells are no longer trusted.
    fn rebind(&mut self, number: u32, source_keys: Vec<SourceKey>) {
        let Some(slot) = self.slots.get_mut(&number) else { return };
        if slot.slot.source_keys != source_keys {
            Arc::make_mut(&mut slot.slot).source_keys = source_keys;
            slot.demote();
            self.barrier.rebound.push(number);
        }
    }

    fn forget(&mut self, number: u32) {
        if let Some(slot) = self.slots.remove(&number) {
            self.file_names.release(&slot.slot.file);
            self.by_name.remove(&slot.slot.header.name);
            self.barrier.forget.push(number);
        }
    }

    fn add_slot(
        &mut self,
        entry: &Announcement,
        fixed_file: Option<String>,
        source_keys: Vec<SourceKey>,
    ) -> Result<u32, ProtocolError> {
        let header = &entry.header;
        let file = match (fixed_file, header.kind) {
            (Some(file), _) => {
                // An entry of an earlier session may sit on this number.
                let holder = self.slots.values().find(|s| s.slot.file == file);
                if let Some(holder) = holder.map(|s| s.slot.number) {
                    self.forget(holder);
                }
                self.file_names.reserve(&file);
                file
            }
            (None, EntryKind::Tensor { .. }) => self.file_names.tensor(&header.name),
            (None, EntryKind::Blob) => self.file_names.blob(&header.name),
        };
        let number = self.next_number;
        self.next_number = number
            .checked_add(1)
            .ok_or_else(|| ProtocolError::new(Reason::TooMany, "entry numbers are used up; use restart"))?;
        let slot = SlotFile { number, file, header: header.clone(), source_keys };
        self.by_name.insert(header.name.clone(), number);
        self.slots.insert(number, Slot::new(slot, self.config.grid));
        Ok(number)
    }

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
        let cell = grid.cell_at(header.byte_len, head.offset).ok_or_else(|| {
            range(format!(
                "offset {} is not the start of a cell of {:?} with {} bytes",
                head.offset, clip(&header.name), header.byte_len
            ))
        })?;
        let (offset, cell_len) = grid
            .cell_span(header.byte_len, cell)
            .ok_or_else(|| range("no such cell".into()))?;
        if head.raw_len != cell_len {
            return Err(range(format!(
                "chunk at {offset} of {:?} has {} bytes, the cell has {cell_len}",
                clip(&header.name), head.raw_len
            )));
        }
        let item_len = match header.kind {
            EntryKind::Tensor { dtype } => (dtype.bits() / 8).max(1) as u32,
            EntryKind::Blob => 1,
        };
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
        let slot = self.slots.get_mut(&ticket.number)?;
        if slot.is_taken(ticket.cell) || self.publishing || self.ending {
            let (lane, sequence) = (ticket.lane, ticket.sequence);
            self.settle(lane, sequence);
            return None;
        }
        slot.held.remove(ticket.cell..ticket.cell + 1);
        slot.placing.insert(ticket.cell..ticket.cell + 1);
        self.placing_count += 1;
        Some(Placement { ticket, slot: Arc::clone(&slot.slot), recorded: slot.journaled })
    }

    /// The bytes of a chunk do not match their checksum.
    ///
    /// # Errors
    /// Too many in a row did not.
    pub fn reject(&mut self, ticket: Ticket, found_crc32c: u32) -> Result<(), ProtocolError> {
        self.rejects.push(Reject {
            entry: ticket.wire_entry,
            offset: ticket.offset,
            expected_crc32c: ticket.crc32c,
            found_crc32c,
        });
        self.settle(ticket.lane, ticket.sequence);
        self.rejects_in_row += 1;
        if self.rejects_in_row > MAX_REJECTS_IN_ROW {
            let name = self.slots.get(&ticket.number).map(|s| clip(&s.slot.header.name));
            return Err(ProtocolError::new(
                Reason::Checksum,
                format!(
                    "{} chunks in a row arrived damaged, the last at byte {} of {:?}: expected crc32c {:08x}, found {found_crc32c:08x}",
                    self.rejects_in_row, ticket.offset, name.unwrap_or_default(), ticket.crc32c
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
            jobs.push(CompareJob { slot: Arc::clone(&slot.slot), cell, offset, raw_len, blake3 });
        }
        self.comparing_count += count;
        self.compares.extend(jobs);
        Ok(())
    }

    /// A comparison is done; `crc32c` is that of the bytes on disk.
    pub fn compared(&mut self, job: &CompareJob, equal: bool, crc32c: u32, now: Instant) {
        self.comparing_count -= 1;
        let number = job.slot.number;
        let Some(slot) = self.slots.get_mut(&number) else { return };
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

    /// The group of [`ReceiveAction::Commit`] is durable. Returns the entries that
    /// are complete now: their files need not stay open.
    pub fn committed(&mut self, id: u64) -> Vec<u32> {
        let mut complete = Vec::new();
        let Some(group) = self.in_commit.take_if(|g| g.id == id) else { return complete };
        self.undurable_bytes -= group.bytes;
        for number in group.numbers {
            let Some(slot) = self.slots.get_mut(&number) else { continue };
            let committed = std::mem::take(&mut slot.committing);
            slot.durable.union_with(&committed);
            if let Some(entry) = slot.wire_entry
                && !committed.is_empty()
            {
                self.durable_out.entry(entry).or_default().union_with(&committed);
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
            ManifestPromise::Complete { entries_digest, entry_count, total_bytes } => {
                (entry_count, total_bytes) == (found, self.announced_bytes) && entries_digest == digest
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

    /// The sender gave up, or the connection did: commit what is written.
    pub fn end(&mut self) {
        self.ending = true;
        self.publishing = false;
        self.finish = None;
    }

    /// Handles an Abort like the end of the connection.
    pub fn abort(&mut self, _abort: &Abort) {
        self.end();
    }

    /// The next thing to do.
    pub fn poll(&mut self, now: Instant) -> Option<ReceiveAction> {
        if self.publishing {
            return None;
        }
        if let Some(action) = self.poll_frame() {
            return Some(action);
        }
        if let Some(group) = self.poll_commit(now) {
            return Some(ReceiveAction::Commit(group));
        }
        if self.ending {
            return None;
        }
        if let Some(job) = self.compares.pop_front() {
            return Some(ReceiveAction::Compare(job));
        }
        self.poll_publish()
    }

    /// When to poll again although nothing happened.
    pub fn wake_at(&self) -> Option<Instant> {
        if self.in_commit.is_some() {
            return None;
        }
        Some(self.dirty_since? + self.config.commit.interval?)
    }

    fn poll_frame(&mut self) -> Option<ReceiveAction> {
        let mut frame = ReceiverFrame {
            rejects: std::mem::take(&mut self.rejects),
            wanted: std::mem::take(&mut self.further),
            ..ReceiverFrame::default()
        };
        for (entry, ranges) in std::mem::take(&mut self.durable_out) {
            frame.durable.push(Durable { entry, ranges });
        }
        for (entry, ranges) in std::mem::take(&mut self.keeps_out) {
            frame.keeps.push(Keep { entry, ranges });
        }
        if !self.ending {
            self.answer(&mut frame);
        }
        let mut ack_lane = 0;
        // Withheld acks are how the wire waits for the disk.
        if !self.ending && self.undurable_bytes <= self.config.commit.max_undurable_bytes {
            for (&lane, state) in &mut self.lanes {
                if let Some(count) = state.take_ack(ACK_BATCH) {
                    ack_lane = lane;
                    frame.ack = Some(count);
                    break;
                }
            }
        }
        (!frame.is_empty()).then_some(ReceiveAction::Send { lane: ack_lane, frame })
    }

    /// Adds answers to announcements, as far as the journal allows.
    fn answer(&mut self, frame: &mut ReceiverFrame) {
        let in_barrier = self.in_commit.as_ref().is_some_and(|g| g.is_barrier);
        if !self.barrier.is_empty() || in_barrier {
            return;
        }
        let mut runs = 0;
        while frame.wanted.len() < MAX_ANSWERS && runs < MAX_WANTED_RUNS {
            let Some(number) = self.unanswered.pop_front() else { break };
            let Some(slot) = self.slots.get_mut(&number) else { continue };
            let Some(entry) = slot.wire_entry else { continue };
            slot.answered = true;
            let (mut wanted, mut held) = (slot.missing(), slot.held.clone());
            // A scattered answer is cut into messages of bounded size.
            loop {
                let part = Wanted {
                    entry,
                    wanted: split_off(&mut wanted, MAX_WANTED_RUNS),
                    held: split_off(&mut held, MAX_WANTED_RUNS),
                    last: wanted.is_empty() && held.is_empty(),
                };
                runs += part.wanted.iter().len() + part.held.iter().len();
                let last = part.last;
                frame.wanted.push(part);
                if last {
                    break;
                }
            }
        }
    }

    fn poll_commit(&mut self, now: Instant) -> Option<Group> {
        if self.in_commit.is_some() {
            return None;
        }
        let policy = &self.config.commit;
        let aged = policy.interval.is_some_and(|interval| {
            self.dirty_since.is_some_and(|since| now.saturating_duration_since(since) >= interval)
        });
        let full = self.dirty_bytes >= policy.bytes || self.dirty.len() >= policy.files;
        let finishing = self.finish.is_some() && self.placing_count == 0 && self.has_unrecorded();
        let ending = self.ending && self.placing_count == 0 && !self.dirty.is_empty();
        if !(aged || full || finishing || ending || !self.barrier.is_empty()) {
            return None;
        }
        Some(self.take_group())
    }

    /// Whether anything that was announced is not yet in the journal.
    fn has_unrecorded(&self) -> bool {
        !self.dirty.is_empty()
            || !self.new_sources.is_empty()
            || self.announced.iter().any(|(n, _)| self.slots.get(n).is_some_and(|s| !s.journaled))
    }

    fn take_group(&mut self) -> Group {
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
            let Some(slot) = self.slots.get_mut(&number) else { continue };
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
        group
    }

    fn poll_publish(&mut self) -> Option<ReceiveAction> {
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
            Some((Arc::clone(&slot.slot), announcement.clone(), self.entry_crc(slot)))
        });
        Some(ReceiveAction::Publish(Box::new(PublishPlan {
            entries: entries.collect(),
            fingerprint: finish.fingerprint.or(self.config.fingerprint),
            entries_digest: finish.entries_digest,
        })))
    }

    /// CRC-32C of a whole entry, combined from its cells.
    fn entry_crc(&self, slot: &Slot) -> u32 {
        let byte_len = slot.slot.header.byte_len;
        (0..slot.cell_count).fold(0, |crc, cell| {
            let len = self.config.grid.cell_span(byte_len, cell).map_or(0, |(_, n)| n);
            crate::format::checksum::combine(crc, slot.sums.get(cell), u64::from(len))
        })
    }

    fn announced_number(&self, wire_entry: u32) -> Result<u32, ProtocolError> {
        self.announced.get(wire_entry as usize).map(|(number, _)| *number).ok_or_else(|| {
            ProtocolError::new(Reason::BadFrame, format!("entry {wire_entry} was not announced"))
        })
    }

    fn slot_mut(&mut self, number: u32) -> Result<&mut Slot, ProtocolError> {
        self.slots
            .get_mut(&number)
            .ok_or_else(|| ProtocolError::new(Reason::Bug, "an announced entry has no slot"))
    }

    fn lane_mut(&mut self, lane: u32) -> Result<&mut ReceiveLane, ProtocolError> {
        self.lanes
            .get_mut(&lane)
            .ok_or_else(|| ProtocolError::new(Reason::BadFrame, format!("no lane {lane}")))
    }

    fn settle(&mut self, lane: u32, sequence: u64) {
        if let Some(lane) = self.lanes.get_mut(&lane) {
            lane.settle(sequence);
        }
    }

    fn mark_dirty(&mut self, number: u32, bytes: u64, now: Instant) {
        self.dirty.insert(number);
        self.dirty_bytes += bytes;
        self.undurable_bytes += bytes;
        self.dirty_since.get_or_insert(now);
    }

    /// Every cell in exactly one state, for tests.
    #[cfg(test)]
    pub(super) fn check_invariants(&self) {
        for slot in self.slots.values() {
            let sets = [&slot.durable, &slot.held, &slot.placing, &slot.written, &slot.keeping, &slot.committing];
            let sum: u64 = sets.iter().map(|s| s.count()).sum();
            let mut union = RangeSet::new();
            sets.iter().for_each(|s| union.union_with(s));
            assert_eq!(sum, union.count(), "a cell is in two states: {slot:?}");
            assert!(RangeSet::of(0..slot.cell_count).is_superset(&union));
        }
    }

    /// Name and cells of every durable range, for tests.
    #[cfg(test)]
    pub(super) fn durable_cells(&self) -> Vec<(String, RangeSet)> {
        let slots = self.slots.values();
        slots.map(|s| (s.slot.header.name.clone(), s.durable.clone())).collect()
    }
}

/// Takes the first `runs` ranges out of a set.
fn split_off(set: &mut RangeSet, runs: usize) -> RangeSet {
    let mut part = RangeSet::new();
    for range in set.iter().take(runs).collect::<Vec<_>>() {
        part.insert(range.clone());
        set.remove(range);
    }
    part
}
