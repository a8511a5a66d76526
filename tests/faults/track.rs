//! What the oracle knows of one name: what was promised, and whether the disk keeps it.

use crate::{
    dice::Dice,
    frames::{CHUNK, Load, Part, blob, noise, tensor_with},
    turned,
};
use std::{
    collections::BTreeSet,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};
use tensorferry::wire::pb;

/// Figures of a campaign.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Tally {
    /// Faults that hit.
    pub(crate) points: u64,
    pub(crate) sessions: u64,
    /// Acked cells that were read back after a fault, and their bytes.
    pub(crate) acked_cells: u64,
    pub(crate) acked_bytes: u64,
    /// Cells that the receiver did not ask for, read back.
    pub(crate) claimed_cells: u64,
    /// Whole checkpoints that were compared after their Done.
    pub(crate) dones: u64,
    /// Points that struck between Finish and the first look after it.
    pub(crate) in_publish: u64,
    /// Acked cells that were gone or wanted again.
    pub(crate) lost: u64,
    /// Cells and files with wrong bytes that counted as right.
    pub(crate) wrong: u64,
    /// Most bytes of one transfer that had been sent before a fault and were wanted after it.
    pub(crate) most_resent: u64,
}

impl Tally {
    pub(crate) fn add(&mut self, other: &Tally) {
        self.points += other.points;
        self.sessions += other.sessions;
        self.acked_cells += other.acked_cells;
        self.acked_bytes += other.acked_bytes;
        self.claimed_cells += other.claimed_cells;
        self.dones += other.dones;
        self.in_publish += other.in_publish;
        self.lost += other.lost;
        self.wrong += other.wrong;
        self.most_resent = self.most_resent.max(other.most_resent);
    }
}

/// Cells of one entry, by its index.
pub(crate) type Cells = Vec<BTreeSet<u64>>;

/// The shared file of tensors, and the longest header that it gets here: its half has room
/// for the most tensors of a random load.
const CONTAINER: &str = "model.safetensors";
const MAX_CONTAINER_HEADER_LEN: u64 = 64 << 10;

/// Counts promises over several tracks, so that each has its place in time.
pub(crate) type Clock = Arc<AtomicU64>;

/// What the receiver said for good.
#[derive(Clone)]
enum Promise {
    Durable { entry: u32, cell: u64 },
    Done(pb::Done),
}

/// One name, and the transfer under way to it.
#[derive(Clone)]
pub(crate) struct Track {
    pub(crate) name: String,
    pub(crate) load: Arc<Load>,
    pub(crate) id: [u8; 16],
    pub(crate) fingerprint: [u8; 16],
    pub(crate) mode: pb::CommitMode,
    pub(crate) verify: bool,
    /// No tensors ever share a file.
    pub(crate) only_files: bool,
    /// All tensors share a file whose header has this length; 0 when each has its own.
    pub(crate) container_header_len: u64,
    /// Throw away what lies there.
    pub(crate) restart: bool,
    /// What stood under the name before.
    pub(crate) old: Option<Arc<Load>>,
    /// Cells that were acked as durable, or kept.
    pub(crate) acked: Cells,
    /// Cells that were ever sent.
    pub(crate) sent: Cells,
    pub(crate) finish_sent: bool,
    pub(crate) done: Option<pb::Done>,
    /// Every promise of this version and how many came before it, by `clock`.
    history: Vec<(u64, Promise)>,
    clock: Clock,
    /// Broken promises.
    pub(crate) failures: Vec<String>,
    pub(crate) tally: Tally,
    max_bytes: u64,
}

impl Track {
    pub(crate) fn new(name: &str, dice: &mut Dice, max_bytes: u64) -> Self {
        let mut track = Track {
            name: name.to_owned(),
            load: Arc::new(Load::of(Vec::new())),
            id: [0; 16],
            fingerprint: [0; 16],
            mode: pb::CommitMode::Strict,
            verify: false,
            only_files: false,
            container_header_len: 0,
            restart: false,
            old: None,
            acked: Vec::new(),
            sent: Vec::new(),
            finish_sent: false,
            done: None,
            history: Vec::new(),
            clock: Clock::default(),
            failures: Vec::new(),
            tally: Tally::default(),
            max_bytes,
        };
        track.next_version(dice);
        track.old = None;
        track
    }

    /// Each tensor has a file of its own, now and later.
    pub(crate) fn in_files(mut self) -> Self {
        (self.only_files, self.container_header_len) = (true, 0);
        self
    }

    /// A content of the caller's choice under a name that is free.
    pub(crate) fn of(name: &str, dice: &mut Dice, load: Load) -> Self {
        let mut track = Track::new(name, dice, 1 << 20);
        track.begin(Arc::new(load), dice.id());
        track.old = None;
        track.mode = pb::CommitMode::Group;
        track.verify = false;
        track.container_header_len = 0;
        track
    }

    /// The disk was damaged, so what was acked need not be there.
    pub(crate) fn forget_acks(&mut self) {
        self.acked.iter_mut().for_each(BTreeSet::clear);
    }

    /// What is published becomes the old version, and another content is to replace it.
    pub(crate) fn next_version(&mut self, dice: &mut Dice) {
        let load = Arc::new(random_load(dice, self.max_bytes));
        self.begin(load, dice.id());
        self.fingerprint = dice.id();
        self.mode = match dice.below(10) {
            0..=5 => pb::CommitMode::Strict,
            6..=8 => pb::CommitMode::Group,
            _ => pb::CommitMode::End,
        };
        self.verify = dice.chance(15);
        // Dice of its own: what the seeds of the scenarios show stays what it is.
        let mut aside = Dice::new(u64::from_le_bytes(self.id[..8].try_into().unwrap()));
        self.container_header_len = match aside.chance(30) && !self.only_files {
            true => 8 * aside.between(MAX_CONTAINER_HEADER_LEN / 16, MAX_CONTAINER_HEADER_LEN / 8),
            false => 0,
        };
    }

    fn begin(&mut self, load: Arc<Load>, id: [u8; 16]) {
        self.acked = vec![BTreeSet::new(); load.parts.len()];
        self.sent = self.acked.clone();
        self.old = Some(std::mem::replace(&mut self.load, load));
        self.id = id;
        self.finish_sent = false;
        self.done = None;
        self.history.clear();
    }

    /// Tells the order of its promises by a clock that others tell theirs by too.
    pub(crate) fn set_clock(&mut self, clock: &Clock) {
        self.clock = clock.clone();
    }

    /// The receiver says that a cell is durable.
    pub(crate) fn note_durable(&mut self, entry: u32, cell: u64) {
        if self.acked[entry as usize].insert(cell) {
            self.note(Promise::Durable { entry, cell });
        }
    }

    /// The receiver says that the checkpoint is published.
    pub(crate) fn note_done(&mut self, done: pb::Done) {
        self.done = Some(done.clone());
        self.note(Promise::Done(done));
    }

    fn note(&mut self, promise: Promise) {
        let before = self.clock.fetch_add(1, Ordering::AcqRel);
        self.history.push((before, promise));
    }

    /// With nothing but the first `count` promises of its clock.
    pub(crate) fn as_of(&self, count: u64) -> Track {
        let mut then = self.clone();
        then.forget_acks();
        then.done = None;
        for (_, promise) in self.history.iter().filter(|(before, _)| *before < count) {
            match promise {
                Promise::Durable { entry, cell } => {
                    then.acked[*entry as usize].insert(*cell);
                }
                Promise::Done(done) => then.done = Some(done.clone()),
            }
        }
        then
    }

    /// Notes a broken promise.
    pub(crate) fn fail(&mut self, what: impl Into<String>) {
        if self.failures.len() < 20 {
            self.failures
                .push(format!("{}: {}", self.name, what.into()));
        }
    }

    pub(crate) fn cell_count(&self, entry: usize) -> u64 {
        (self.load.parts[entry].bytes.len() as u64).div_ceil(CHUNK as u64)
    }

    /// Cells that are not acked yet.
    pub(crate) fn cells_left(&self) -> u64 {
        let left =
            |(entry, acked): (usize, &BTreeSet<u64>)| self.cell_count(entry) - acked.len() as u64;
        self.acked.iter().enumerate().map(left).sum()
    }

    /// The folder in which its unfinished files lie.
    pub(crate) fn staging(&self, root: &Path) -> PathBuf {
        if turned::is_turned() {
            return turned::staging(root, &self.name);
        }
        let hash = blake3::hash(self.name.as_bytes()).to_hex();
        root.join(".tensorferry/transfers").join(&hash[..16])
    }

    /// Compares what is on the disk with everything that was promised. No server runs.
    pub(crate) fn check_disk(&mut self, root: &Path) {
        let folder = root.join(&self.name);
        match self.published(&folder) {
            Published::New => {
                self.tally.dones += 1;
                if !self.finish_sent {
                    self.fail("it was published before Finish");
                }
                return;
            }
            Published::Broken(why) => {
                self.tally.wrong += 1;
                self.fail(format!("the name shows neither version whole: {why}"));
            }
            Published::Absent if self.old.is_some() => {
                self.tally.lost += 1;
                self.fail("the old version is gone");
            }
            Published::Absent | Published::Old if self.done.is_some() => {
                self.tally.lost += 1;
                self.fail("Done was said, and the name does not show it");
            }
            Published::Absent | Published::Old => {}
        }
        self.check_acked(root);
    }

    /// Every acked cell is in the staged files.
    fn check_acked(&mut self, root: &Path) {
        let data = self.staging(root).join("data");
        for entry in 0..self.acked.len() {
            let cells: Vec<u64> = self.acked[entry].iter().copied().collect();
            let checked = self.check_cells(&data, entry, &cells);
            self.tally.acked_cells += checked.cells;
            self.tally.acked_bytes += checked.bytes;
            if let Some(why) = checked.wrong {
                self.tally.lost += 1;
                self.fail(format!("acked, and not on the disk: {why}"));
            }
        }
    }

    /// Cells that the receiver says it has, read while it holds them.
    pub(crate) fn check_claimed(&mut self, root: &Path, entry: usize, cells: &[u64]) {
        let data = self.staging(root).join("data");
        let checked = self.check_cells(&data, entry, cells);
        self.tally.claimed_cells += checked.cells;
        if let Some(why) = checked.wrong {
            self.tally.wrong += 1;
            self.fail(format!("not asked for, and not on the disk: {why}"));
        }
    }

    fn check_cells(&self, data: &Path, entry: usize, cells: &[u64]) -> Checked {
        let mut checked = Checked::default();
        if cells.is_empty() {
            return checked;
        }
        let part = &self.load.parts[entry];
        let shared_at = self.shared_at(entry);
        let path = match shared_at {
            Some(_) => data.join(CONTAINER),
            None => data.join(file_of(part)),
        };
        let opened = File::open(&path).and_then(|f| Ok((f.metadata()?.len(), f)));
        let (len, file) = match opened {
            Ok(opened) => opened,
            Err(e) => {
                checked.wrong = Some(format!("{}: {e}", path.display()));
                return checked;
            }
        };
        let own_at = len.checked_sub(part.bytes.len() as u64);
        let Some(prefix_len) = shared_at.or(own_at) else {
            checked.wrong = Some(format!("{} has {len} bytes", path.display()));
            return checked;
        };
        let mut found = vec![0; CHUNK];
        for &cell in cells {
            let wanted = self.load.cell(entry as u32, cell);
            let found = &mut found[..wanted.len()];
            let read = file.read_exact_at(found, prefix_len + cell * CHUNK as u64);
            checked.cells += 1;
            checked.bytes += wanted.len() as u64;
            if read.is_err() || found != wanted {
                let zeros = found.iter().filter(|&&b| b == 0).count();
                checked.wrong = Some(format!(
                    "cell {cell} of {}: {read:?}, {zeros} zeros of {} bytes",
                    path.display(),
                    wanted.len()
                ));
            }
        }
        checked
    }

    /// Where a tensor begins in the shared file: each behind the one before it.
    fn shared_at(&self, entry: usize) -> Option<u64> {
        let is_tensor = |part: &&Part| part.entry.kind() != pb::EntryKind::Blob;
        let part = &self.load.parts[entry];
        if self.container_header_len == 0 || !is_tensor(&part) {
            return None;
        }
        let before = self.load.parts[..entry].iter().filter(is_tensor);
        let len: u64 = before.map(|part| part.bytes.len() as u64).sum();
        Some(self.container_header_len + len)
    }

    /// What stands under the name.
    pub(crate) fn published(&self, folder: &Path) -> Published {
        if !folder.join("manifest.json").exists() {
            let is_empty = std::fs::read_dir(folder).map_or(true, |mut d| d.next().is_none());
            return match is_empty {
                true => Published::Absent,
                false => Published::Broken("there is a folder without a manifest".to_owned()),
            };
        }
        let new = match whole(folder, &self.load) {
            Ok(()) => return self.check_manifest(folder),
            Err(why) => why,
        };
        match self.old.as_ref().map(|old| whole(folder, old)) {
            Some(Ok(())) => Published::Old,
            Some(Err(old)) => Published::Broken(format!("not new: {new}; not old: {old}")),
            None => Published::Broken(new),
        }
    }

    fn check_manifest(&self, folder: &Path) -> Published {
        let Some(done) = &self.done else {
            return Published::New;
        };
        let bytes = std::fs::read(folder.join("manifest.json")).unwrap_or_default();
        match blake3::hash(&bytes).as_bytes()[..] == done.manifest_blake3[..] {
            true => Published::New,
            false => Published::Broken("the manifest is not the one of Done".to_owned()),
        }
    }
}

/// What a name shows.
#[derive(Debug)]
pub(crate) enum Published {
    Absent,
    Old,
    New,
    Broken(String),
}

#[derive(Default)]
struct Checked {
    cells: u64,
    bytes: u64,
    wrong: Option<String>,
}

/// Where an entry lies: its names are all safe ones.
pub(crate) fn file_of(part: &Part) -> String {
    match part.entry.kind() {
        pb::EntryKind::Blob => format!("files/{}", part.entry.name),
        _ => format!("{}.npy", part.entry.name),
    }
}

/// Exactly these entries are there, byte for byte, as the manifest says.
pub(crate) fn whole(folder: &Path, load: &Load) -> Result<(), String> {
    let text = std::fs::read(folder.join("manifest.json")).map_err(|e| e.to_string())?;
    let manifest: serde_json::Value = serde_json::from_slice(&text).map_err(|e| e.to_string())?;
    let mut count = 0;
    for list in ["tensors", "files"] {
        let rows = manifest[list].as_array().ok_or("no rows")?;
        count += rows.len();
        for row in rows {
            let name = row["name"].as_str().ok_or("no name")?;
            let part = load.parts.iter().find(|p| p.entry.name == name);
            let part = part.ok_or_else(|| format!("{name} is too many"))?;
            let file = row["file"].as_str().ok_or("no file")?;
            let bytes = std::fs::read(folder.join(file)).map_err(|e| format!("{file}: {e}"))?;
            let offset = row["data_offset"].as_u64().unwrap_or(0) as usize;
            let end = offset + part.bytes.len();
            let has_header = match file {
                _ if list == "files" => true,
                CONTAINER => in_header(&bytes, name) == Some((offset, end)),
                _ => bytes.starts_with(b"\x93NUMPY\x01\x00") && end == bytes.len(),
            };
            if !has_header || bytes.get(offset..end) != Some(&part.bytes[..]) {
                return Err(format!("{file} has other bytes ({} in all)", bytes.len()));
            }
        }
    }
    match count == load.parts.len() {
        true => Ok(()),
        false => Err(format!("{count} of {} entries", load.parts.len())),
    }
}

/// Where a tensor begins and ends, as the header of a safetensors file says.
fn in_header(bytes: &[u8], name: &str) -> Option<(usize, usize)> {
    let len = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?) as usize;
    let header: serde_json::Value = serde_json::from_slice(bytes.get(8..8 + len)?).ok()?;
    let place = |i: usize| Some(8 + len + header[name]["data_offsets"][i].as_u64()? as usize);
    Some((place(0)?, place(1)?))
}

/// Few large tensors, many small ones, or one: each kind syncs differently.
fn random_load(dice: &mut Dice, max_bytes: u64) -> Load {
    let mut parts = Vec::new();
    let mut add = |dice: &mut Dice, len: u64| {
        let seed = format!("{:x}", dice.next());
        let name = format!("t{:03}", parts.len());
        parts.push(tensor_with(&name, noise(&seed, len as usize)));
    };
    let chunk = CHUNK as u64;
    let sizes = [0, 1, chunk - 1, chunk, chunk + 1];
    match dice.below(4) {
        0 => {
            let len = dice.between(max_bytes / 2, max_bytes);
            add(dice, len);
        }
        1 => {
            for _ in 0..dice.between(66, 130) {
                let len = dice.between(1, max_bytes / 1000);
                add(dice, len);
            }
            let len = dice.between(chunk, max_bytes / 3);
            add(dice, len);
        }
        _ => {
            for _ in 0..dice.between(2, 6) {
                let len = dice.between(max_bytes / 50, max_bytes / 6);
                add(dice, len);
            }
            for len in sizes {
                add(dice, len);
            }
        }
    }
    let config = noise(&format!("{:x}", dice.next()), 700);
    parts.push(blob("config.json", &config));
    Load::of(parts)
}
