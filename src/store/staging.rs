//! The staging of one transfer: its journal and the files that grow.
//!
//! ```text
//! ROOT/.tensorferry/transfers/<16 hex of BLAKE3(name)>/journal
//!                                                     /data/…
//! ROOT/.tensorferry/locks/<16 hex>.lock
//! ```

use super::{
    catalog::Catalog,
    dir::Dir,
    durability::FileSystem,
    error::{IoContext, StoreError},
    files::{FileOptions, Files, WriteMode},
    journal::{
        EntryRecord, EntryState, JournalError, JournalHeader, JournalWriter, Record, Replay, Run,
        State, replay,
    },
    lock::NameLock,
    manifest::Manifest,
    publish,
    space::Reservation,
};
use crate::{
    fault, mutant,
    plan::{CheckpointName, Grid},
    protocol::{
        CommitMode, Durability, Group, GroupCells, ManifestPromise, Open, PublishPlan, Recovered,
        RecoveredEntry, SlotFile,
    },
};
use std::{
    collections::HashSet,
    fs::File,
    io::{Read, Seek, SeekFrom},
    sync::{Arc, Mutex, PoisonError},
};

pub(super) const JOURNAL_FILE: &str = "journal";
/// A journal being rewritten.
const NEW_JOURNAL_FILE: &str = "journal.new";
pub(super) const DATA_DIR: &str = "data";
/// Bytes set aside per entry for its header, journal records and manifest.
const OVERHEAD_BYTES: u64 = 1024;

/// What the server decides about a staging beyond what Open says.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StagingOptions {
    /// Cell length of a new transfer, in bytes.
    pub(crate) chunk_len: u32,
    /// Number of the layout in the wire protocol.
    pub(crate) layout: i32,
    /// Number of the container in the wire protocol.
    pub(crate) out_format: i32,
    /// Number of the wire protocol for how `.npy` files name types.
    pub(crate) npy_dtype: i32,
    /// How chunks are written.
    pub(crate) write_mode: WriteMode,
}

/// What became of an Open.
#[derive(Debug)]
pub(crate) enum Opened {
    /// The very same checkpoint is published already.
    Unchanged {
        /// The manifest.
        manifest: Box<Manifest>,
        /// BLAKE3 of its bytes.
        manifest_blake3: [u8; 32],
    },
    /// Go on from here.
    Ready {
        /// The staging, locked.
        staging: Arc<Staging>,
        /// What its journal says.
        recovered: Recovered,
    },
}

/// The journal and what a replay of it would say. Every record is tried on the
/// state first: one that replay would stop at must never be written, for it would
/// hide all that follow.
#[derive(Debug)]
struct Journal {
    writer: JournalWriter,
    state: State,
}

/// The staging of one transfer, locked for this session.
#[derive(Debug)]
pub(crate) struct Staging {
    pub(super) catalog: Catalog,
    pub(super) name: CheckpointName,
    pub(super) dir: Dir,
    pub(super) files: Files,
    journal: Mutex<Journal>,
    lock: Mutex<Option<NameLock>>,
    reservation: Mutex<Reservation>,
    pub(super) open: Open,
    pub(super) chunk_len: u32,
    epoch: u64,
    pub(super) durability: Durability,
    is_synced: bool,
}

impl Staging {
    /// Locks the name, finishes an interrupted publication, reserves space and
    /// goes on with the journal, or begins one.
    ///
    /// # Errors
    /// Everything that refuses the transfer does so here, before a byte is
    /// accepted and with the disk as it was.
    pub(crate) fn open(
        catalog: &Catalog,
        open: Open,
        options: StagingOptions,
    ) -> Result<Opened, StoreError> {
        let name = open.checkpoint.clone();
        let lock = catalog.lock(&name)?;
        let hash = name.short_hash();
        catalog.check_nesting(&name)?;
        if !open.restart {
            publish::recover(catalog, &name, open.overwrite)?;
        }
        if let Some(unchanged) = check_published(catalog, &open)? {
            lock.remove()?;
            return Ok(unchanged);
        }

        let transfers = catalog.transfers()?;
        let is_synced = open.commit_mode != CommitMode::None;
        let mut earlier = match transfers.try_sub(&hash)? {
            Some(dir) if open.restart => Earlier::read(dir, &name).unwrap_or(None),
            Some(dir) => Earlier::read(dir, &name)?,
            None => None,
        };
        let present_bytes = earlier.as_ref().map_or(0, Earlier::present_bytes);
        if open.restart {
            // Removed when the new transfer begins: a refusal before that leaves
            // everything as it was.
            earlier = None;
        }
        let mut adopted = match &earlier {
            Some(earlier) => earlier.check_owner(&open, &options)?,
            None => false,
        };
        if is_synced && earlier.as_ref().is_some_and(|e| e.replay.state.unsynced) {
            // What was never synced is compared before it counts, and its names
            // and pages go to the disk first.
            transfers.sync_file_system()?;
            adopted = true;
        }
        let chunk_len = earlier
            .as_ref()
            .map_or(options.chunk_len, |e| e.replay.header.chunk_len);
        let grid = Grid::new(chunk_len)?;

        let promised_bytes = match open.manifest {
            ManifestPromise::Complete { total_bytes, .. } => {
                total_bytes.saturating_add(open.container_header_len)
            }
            ManifestPromise::Open => 0,
        };
        let recorded_bytes = earlier.as_ref().map_or(0, Earlier::total_bytes);
        let restart = earlier.is_none();
        let claim = (catalog.quota()).claim(&hash, promised_bytes, recorded_bytes, restart)?;
        let reservation = catalog
            .space()
            .reserve(catalog.root(), needed_bytes(&open, present_bytes))?;
        let durability = match open.commit_mode {
            CommitMode::None => Durability::Process,
            _ => FileSystem::of(catalog.root())?.durability,
        };
        catalog.prepare_target(&name)?;

        let (dir, journal) = match earlier {
            Some(earlier) => earlier.resume()?,
            None => begin(&transfers, &hash, &name, grid, &options)?,
        };
        let data = dir.make_all(DATA_DIR, false)?;
        let file_options = FileOptions {
            write_mode: options.write_mode,
            is_synced,
            npy_dtype: open.npy_dtype,
            container_len: promised_bytes,
        };
        let epoch = journal.state.epoch.saturating_add(1);
        let staging = Staging {
            catalog: catalog.clone(),
            name,
            dir,
            files: Files::new(data, file_options)?,
            journal: Mutex::new(journal),
            lock: Mutex::new(Some(lock)),
            reservation: Mutex::new(reservation),
            open,
            chunk_len,
            epoch,
            durability,
            is_synced,
        };
        let recovered = staging.begin_session(adopted)?;
        claim.keep();
        Ok(Opened::Ready {
            staging: Arc::new(staging),
            recovered,
        })
    }

    /// Writes the SESSION record, and gives up entries whose file is not what the
    /// journal says.
    fn begin_session(&self, adopted: bool) -> Result<Recovered, StoreError> {
        let mut nonce = [0; 16];
        getrandom::fill(&mut nonce)
            .map_err(std::io::Error::other)
            .context("get random bytes for", self.dir.shown(JOURNAL_FILE))?;
        let entries_digest = match self.open.manifest {
            ManifestPromise::Complete { entries_digest, .. } => Some(entries_digest),
            ManifestPromise::Open => None,
        };
        let mut records = vec![Record::Session {
            epoch: self.epoch,
            nonce,
            transfer_id: self.open.transfer_id,
            entries_digest,
            adopted,
            unsynced: !self.is_synced,
        }];
        let lost = self.lost_entries()?;
        if !lost.is_empty() {
            records.push(Record::Forget(lost));
        }
        self.append(&records)?;
        Ok(self.recovered())
    }

    /// Entries whose file is missing or was changed by somebody else.
    fn lost_entries(&self) -> Result<Vec<u32>, StoreError> {
        let journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let mut lost = Vec::new();
        for (&number, entry) in &journal.state.entries {
            let slot = slot_file(&entry.record);
            if !self.files.is_intact(&slot)? {
                tracing::warn!(file = %slot.file, "a staged file is missing or was changed; its bytes are sent again");
                lost.push(number);
            }
        }
        Ok(lost)
    }

    /// What the journal says now.
    fn recovered(&self) -> Recovered {
        let journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &journal.state;
        let entry = |entry: &EntryState| {
            let recovered = RecoveredEntry {
                slot: slot_file(&entry.record),
                durable: entry.durable.clone(),
                held: entry.held.clone(),
                sums: entry.sums.clone(),
            };
            match mutant::is("size_resume") {
                true => self.trust_length(recovered),
                false => recovered,
            }
        };
        Recovered {
            entries: state.entries.values().map(entry).collect(),
            sources: state.sources.clone(),
            next_number: state.next_entry_number,
        }
    }

    /// A file of full length counts as complete, whatever the journal says.
    fn trust_length(&self, mut entry: RecoveredEntry) -> RecoveredEntry {
        let len = entry.slot.header.byte_len;
        for cell in 0..len.div_ceil(u64::from(self.chunk_len)) {
            let at = cell * u64::from(self.chunk_len);
            let mut bytes = vec![0; u64::from(self.chunk_len).min(len - at) as usize];
            if !entry.durable.contains(cell) && self.files.read(&entry.slot, at, &mut bytes).is_ok()
            {
                entry.durable.insert(cell..cell + 1);
                let sum = crate::format::checksum::crc32c(&bytes);
                entry.sums.set(cell, sum);
            }
        }
        entry
    }

    /// Cell length in bytes, fixed for the life of the transfer.
    pub(crate) fn chunk_len(&self) -> u32 {
        self.chunk_len
    }

    /// Number of this session.
    pub(crate) fn epoch(&self) -> u64 {
        self.epoch
    }

    /// What durable means here.
    pub(crate) fn durability(&self) -> Durability {
        self.durability
    }

    /// What the sender asked for.
    pub(crate) fn options(&self) -> &Open {
        &self.open
    }

    /// The growing files.
    pub(crate) fn files(&self) -> &Files {
        &self.files
    }

    /// Makes a group durable: data, then records, each synced, in this order.
    ///
    /// # Errors
    /// Any error is final: nothing of the group may be acknowledged.
    pub(crate) fn commit(&self, group: &Group) -> Result<(), StoreError> {
        let mut records = Vec::new();
        if !group.forget.is_empty() {
            records.push(Record::Forget(group.forget.clone()));
        }
        records.extend(group.sources.iter().cloned().map(Record::Source));
        records.extend(
            group
                .entries
                .iter()
                .map(|slot| Record::Entry(entry_record(slot))),
        );
        if !group.cells.is_empty() {
            records.push(Record::Cells(group.cells.iter().map(run).collect()));
        }
        if !group.kept.is_empty() {
            records.push(Record::Kept(group.kept.iter().map(run).collect()));
        }
        if mutant::is("journal_first") {
            self.append(&records)?;
            self.sync_files(group)?;
        } else {
            self.sync_files(group)?;
            self.append(&records)?;
        }
        let mut reservation = self
            .reservation
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        reservation.used(self.files.take_written_bytes());
        Ok(())
    }

    fn sync_files(&self, group: &Group) -> Result<(), StoreError> {
        if self.is_synced {
            self.files.sync(&group.files)
        } else {
            self.files.touch(&group.files)
        }
    }

    /// Appends records and makes them durable.
    pub(super) fn append(&self, records: &[Record]) -> Result<(), StoreError> {
        let shown = self.dir.shown(JOURNAL_FILE);
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        for record in records {
            let applied = journal.state.apply(record.clone());
            applied
                .map_err(std::io::Error::other)
                .context("record a change in", &shown)?;
        }
        journal
            .writer
            .append(records)
            .context("append to", &shown)?;
        if self.is_synced {
            journal.writer.sync().context("sync", &shown)?;
            self.dir.check_alive(JOURNAL_FILE)?;
        }
        Ok(())
    }

    /// Records that entries of earlier sessions that are not part of the checkpoint are gone.
    pub(super) fn forget_others(&self, plan: &PublishPlan) -> Result<(), StoreError> {
        let kept: HashSet<u32> = plan.entries.iter().map(|(slot, ..)| slot.number).collect();
        let journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let known = journal.state.entries.keys().copied();
        let others: Vec<u32> = known.filter(|number| !kept.contains(number)).collect();
        drop(journal);
        match others.is_empty() {
            true => Ok(()),
            false => self.append(&[Record::Forget(others)]),
        }
    }

    /// The session has announced so many raw bytes.
    ///
    /// # Errors
    /// They are more than a quota allows.
    pub(crate) fn announced(&self, bytes: u64) -> Result<(), StoreError> {
        let quota = self.catalog.quota();
        match quota.is_limited() {
            true => quota.announced(&self.name.short_hash(), bytes),
            false => Ok(()),
        }
    }

    /// No session of this transfer was before.
    pub(super) fn is_first_session(&self) -> bool {
        self.epoch == 1
    }

    /// Puts the checkpoint under its name. Returns BLAKE3 of its manifest.
    pub(crate) fn publish(&self, plan: &PublishPlan) -> Result<[u8; 32], StoreError> {
        publish::publish(self, plan, self.is_synced)
    }

    /// Lets another session or process work on the name.
    pub(crate) fn unlock(&self) {
        self.lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
    }

    /// After Done: removes what publishing left, journal last, and unlocks.
    pub(crate) fn clean_up(&self) -> Result<(), StoreError> {
        self.catalog.remove_staging(&self.name)?;
        let lock = self
            .lock
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        lock.map_or(Ok(()), NameLock::remove)
    }
}

/// Published under this name already: the same, or in the way.
fn check_published(catalog: &Catalog, open: &Open) -> Result<Option<Opened>, StoreError> {
    let name = &open.checkpoint;
    let Some(dir) = catalog.root().try_sub(name.as_str())? else {
        return Ok(None);
    };
    let Some((manifest, bytes)) = Manifest::read(&dir)? else {
        if dir.is_empty()? {
            return Ok(None);
        }
        return Err(StoreError::Exists {
            name: name.to_string(),
            why: "the folder is not empty and was not made by tensorferry",
        });
    };
    let hex = |d: [u8; 16]| super::manifest::hex(&d);
    let same = open.fingerprint.is_some()
        && manifest.fingerprint == open.fingerprint.map(hex)
        && manifest.transfer_id == hex(open.transfer_id);
    if same {
        // A publication whose last syncs failed may be what stands here.
        if let Some(staging) = catalog.transfers()?.try_sub(&name.short_hash())?
            && staging.try_open(JOURNAL_FILE, false)?.is_some()
        {
            catalog.target(name)?.0.sync()?;
            staging.sync()?;
            staging.check_alive(JOURNAL_FILE)?;
        }
        catalog.remove_staging(name)?;
        return Ok(Some(Opened::Unchanged {
            manifest: Box::new(manifest),
            manifest_blake3: *blake3::hash(&bytes).as_bytes(),
        }));
    }
    if !open.overwrite {
        return Err(StoreError::Exists {
            name: name.to_string(),
            why: "it is published with other content or from another source",
        });
    }
    Ok(None)
}

fn needed_bytes(open: &Open, present_bytes: u64) -> u64 {
    match open.manifest {
        ManifestPromise::Complete {
            total_bytes,
            entry_count,
            ..
        } => total_bytes
            .saturating_sub(present_bytes)
            .saturating_add(open.container_header_len)
            .saturating_add(entry_count.saturating_mul(OVERHEAD_BYTES)),
        ManifestPromise::Open => 0,
    }
}

/// What an earlier session left.
struct Earlier {
    dir: Dir,
    file: File,
    replay: Replay,
}

impl Earlier {
    /// Reads the journal; without a usable one the staging is worth nothing and is
    /// removed.
    fn read(dir: Dir, name: &CheckpointName) -> Result<Option<Self>, StoreError> {
        let Some(file) = dir.try_open(JOURNAL_FILE, true)? else {
            return Ok(None);
        };
        let path = dir.shown(JOURNAL_FILE);
        match replay(&file) {
            Ok(replay) if replay.header.checkpoint == name.as_str() && replay.state.epoch > 0 => {
                Ok(Some(Earlier { dir, file, replay }))
            }
            // Torn while it was made: nothing was acknowledged on it.
            Ok(_) | Err(JournalError::BadHeader) => Ok(None),
            Err(source) => Err(StoreError::Journal { path, source }),
        }
    }

    /// Whether this owner may go on; `true` = only after comparing everything.
    fn check_owner(&self, open: &Open, options: &StagingOptions) -> Result<bool, StoreError> {
        let (state, header) = (&self.replay.state, &self.replay.header);
        let same_shape = header.layout == options.layout
            && header.out_format == options.out_format
            && header.npy_dtype == options.npy_dtype;
        if state.transfer_id == Some(open.transfer_id) && same_shape {
            return Ok(false);
        }
        let digest = match open.manifest {
            ManifestPromise::Complete { entries_digest, .. } => Some(entries_digest),
            ManifestPromise::Open => None,
        };
        if same_shape && digest.is_some() && state.entries_digest == digest {
            return Ok(true);
        }
        Err(StoreError::Locked {
            name: open.checkpoint.to_string(),
            why: "an unfinished transfer of something else waits there; restart or discard it",
        })
    }

    /// Raw bytes of the entries that were announced before.
    fn total_bytes(&self) -> u64 {
        let entries = self.replay.state.entries.values();
        entries.fold(0, |sum: u64, e| {
            sum.saturating_add(e.record.header.byte_len)
        })
    }

    fn present_bytes(&self) -> u64 {
        let Ok(grid) = self.replay.header.grid() else {
            return 0;
        };
        let entries = self.replay.state.entries.values();
        let sizes = entries.map(|e| {
            let len = e.record.header.byte_len;
            let cells = e.durable.iter().chain(e.held.iter());
            cells
                .map(|r| grid.span_bytes(len, r.start, r.end - r.start))
                .sum::<u64>()
        });
        sizes.sum()
    }

    /// The good part of the journal as a new file, durable under its name. What was
    /// read may have come from pages that an earlier sync failed to write and left
    /// marked as clean; written anew, they reach the disk or fail loudly.
    fn rewrite(&self) -> Result<File, StoreError> {
        let shown = self.dir.shown(NEW_JOURNAL_FILE);
        self.dir.remove_file(NEW_JOURNAL_FILE)?;
        let mut file = self.dir.create(NEW_JOURNAL_FILE)?;
        let mut good = (&self.file).take(self.replay.good_len);
        (&self.file)
            .seek(SeekFrom::Start(0))
            .context("read", &shown)?;
        fault::call("copy", || std::io::copy(&mut good, &mut file)).context("write", &shown)?;
        fault::call("fsync", || file.sync_all()).context("sync", &shown)?;
        self.dir.rename(NEW_JOURNAL_FILE, &self.dir, JOURNAL_FILE)?;
        self.dir.sync()?;
        Ok(file)
    }

    fn resume(self) -> Result<(Dir, Journal), StoreError> {
        let file = self.rewrite()?;
        let writer = JournalWriter::resume(file, &self.replay)
            .context("go on with", self.dir.shown(JOURNAL_FILE))?;
        tracing::debug!(end = ?self.replay.end, good_len = self.replay.good_len, "the journal was replayed");
        let state = self.replay.state;
        Ok((self.dir, Journal { writer, state }))
    }
}

/// Makes the staging of a new transfer, its names durable.
fn begin(
    transfers: &Dir,
    hash: &str,
    name: &CheckpointName,
    grid: Grid,
    options: &StagingOptions,
) -> Result<(Dir, Journal), StoreError> {
    transfers.remove_all(hash)?;
    let dir = transfers.make_all(hash, true)?;
    let file = dir.create(JOURNAL_FILE)?;
    let header = JournalHeader {
        checkpoint: name.as_str().to_owned(),
        chunk_len: grid.chunk_len(),
        layout: options.layout,
        out_format: options.out_format,
        npy_dtype: options.npy_dtype,
    };
    let shown = dir.shown(JOURNAL_FILE);
    let mut writer = JournalWriter::create(file, &header).context("begin", &shown)?;
    writer.sync().context("sync", &shown)?;
    dir.sync()?;
    let state = State::new(grid);
    Ok((dir, Journal { writer, state }))
}

fn slot_file(record: &EntryRecord) -> SlotFile {
    SlotFile {
        number: record.number,
        file: record.file.clone(),
        data_offset: record.data_offset,
        header: record.header.clone(),
        source_keys: record.source_keys.clone(),
    }
}

fn entry_record(slot: &SlotFile) -> EntryRecord {
    EntryRecord {
        number: slot.number,
        header: slot.header.clone(),
        file: slot.file.clone(),
        data_offset: slot.data_offset,
        source_keys: slot.source_keys.clone(),
    }
}

fn run(cells: &GroupCells) -> Run {
    Run {
        entry: cells.number,
        first: cells.first,
        crcs: cells.crcs.clone(),
    }
}
