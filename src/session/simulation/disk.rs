//! The receiver's disk: what a process sees, and what a loss of power leaves.

use super::Rng;
use crate::{
    plan::{CHUNK_LEN_MIN, EntryHeader, Grid, digest_entries},
    protocol::SlotFile,
    store::journal::{Chain, JournalHeader, Record, State, Step},
};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Stands for the header in front of the data of a file.
const PREFIX_LEN: usize = 8;

fn prefix(header: &EntryHeader) -> [u8; PREFIX_LEN] {
    let mut out = [0; PREFIX_LEN];
    out.copy_from_slice(&digest_entries([header])[..PREFIX_LEN]);
    out
}

#[derive(Debug)]
struct Inode {
    current: Vec<u8>,
    durable: Vec<u8>,
    /// Writes since the last sync, in order.
    pending: Vec<(usize, Vec<u8>)>,
    /// Its length is durable.
    is_synced: bool,
}

/// Files and their names, each with a durable and a volatile side.
#[derive(Debug, Default)]
pub(super) struct Disk {
    inodes: Vec<Inode>,
    names: BTreeMap<String, usize>,
    durable_names: BTreeMap<String, usize>,
    /// Open files of the session by entry number.
    open: HashMap<u32, usize>,
    removed: BTreeSet<String>,
}

impl Disk {
    /// As the store judges a recorded file: length and header.
    pub(super) fn is_intact(&self, slot: &SlotFile) -> bool {
        self.names.get(&slot.file).is_some_and(|&inode| {
            let bytes = &self.inodes[inode].current;
            bytes.len() == PREFIX_LEN + slot.header.byte_len as usize
                && bytes.starts_with(&prefix(&slot.header))
        })
    }

    fn file(&mut self, slot: &SlotFile, recorded: bool) -> &mut Inode {
        let inode = match self.open.get(&slot.number) {
            Some(&inode) => inode,
            None if recorded => *self
                .names
                .get(&slot.file)
                .expect("the file of a recorded entry is gone"),
            None => {
                // A new file in the place of what an earlier session left.
                let len = PREFIX_LEN + slot.header.byte_len as usize;
                self.inodes.push(Inode {
                    current: vec![0; len],
                    durable: vec![0; len],
                    pending: Vec::new(),
                    is_synced: false,
                });
                let inode = self.inodes.len() - 1;
                self.inodes[inode].write(0, &prefix(&slot.header));
                self.names.insert(slot.file.clone(), inode);
                self.removed.remove(&slot.file);
                inode
            }
        };
        self.open.insert(slot.number, inode);
        &mut self.inodes[inode]
    }

    pub(super) fn write(&mut self, slot: &SlotFile, recorded: bool, offset: u64, bytes: &[u8]) {
        self.file(slot, recorded)
            .write(PREFIX_LEN + offset as usize, bytes);
    }

    pub(super) fn read(&mut self, slot: &SlotFile, offset: u64, len: u32) -> Vec<u8> {
        let at = PREFIX_LEN + offset as usize;
        self.file(slot, true).current[at..at + len as usize].to_vec()
    }

    pub(super) fn sync_data(&mut self, slot: &SlotFile, recorded: bool) {
        let inode = self.file(slot, recorded);
        inode.durable = inode.current.clone();
        inode.pending.clear();
        inode.is_synced = true;
    }

    pub(super) fn sync_names(&mut self) {
        self.durable_names = self.names.clone();
    }

    /// Somebody else removes a file, for good.
    pub(super) fn remove(&mut self, file: &str) {
        self.names.remove(file);
        self.durable_names.remove(file);
        self.removed.insert(file.to_owned());
    }

    /// Nobody made it again since.
    pub(super) fn was_removed(&self, file: &str) -> bool {
        self.removed.contains(file)
    }

    pub(super) fn close(&mut self, number: u32) {
        self.open.remove(&number);
    }

    /// The process that had files open is gone.
    pub(super) fn close_all(&mut self) {
        self.open.clear();
    }

    /// What a loss of power right now could not take away.
    pub(super) fn durable_data(&self, file: &str) -> Option<&[u8]> {
        let inode = &self.inodes[*self.durable_names.get(file)?];
        inode.is_synced.then(|| &inode.durable[PREFIX_LEN..])
    }

    /// Whether the header in front of the data is durable.
    pub(super) fn has_durable_header(&self, file: &str, header: &EntryHeader) -> bool {
        let inode = self.durable_names.get(file).map(|&i| &self.inodes[i]);
        inode.is_some_and(|i| i.is_synced && i.durable.starts_with(&prefix(header)))
    }

    /// Everything that was not synced survives or not, each write for itself and
    /// perhaps in part.
    pub(super) fn power_loss(&mut self, rng: &mut Rng) {
        self.open.clear();
        for inode in &mut self.inodes {
            for (at, bytes) in std::mem::take(&mut inode.pending) {
                let len = match rng.below(3) {
                    0 => 0,
                    1 => bytes.len(),
                    _ => rng.below(bytes.len() + 1),
                };
                inode.durable[at..at + len].copy_from_slice(&bytes[..len]);
            }
            if !inode.is_synced && rng.chance(300) {
                inode.durable.clear();
            }
            inode.is_synced = true;
            inode.current = inode.durable.clone();
        }
        let all: BTreeSet<String> = self
            .names
            .keys()
            .chain(self.durable_names.keys())
            .cloned()
            .collect();
        for name in all {
            let (volatile, durable) = (
                self.names.get(&name).copied(),
                self.durable_names.get(&name).copied(),
            );
            if volatile == durable {
                continue;
            }
            // A name that was replaced passes through a moment without any.
            let survivor = [volatile, durable, None][rng.below(3)];
            match survivor {
                Some(inode) => self.durable_names.insert(name, inode),
                None => self.durable_names.remove(&name),
            };
        }
        self.names = self.durable_names.clone();
    }
}

impl Inode {
    fn write(&mut self, at: usize, bytes: &[u8]) {
        self.current[at..at + bytes.len()].copy_from_slice(bytes);
        self.pending.push((at, bytes.to_vec()));
    }
}

/// The journal file, in its real encoding.
#[derive(Debug)]
pub(super) struct Journal {
    grid: Grid,
    bytes: Vec<u8>,
    /// Bytes from the beginning that were synced.
    synced_len: usize,
    /// What was cut off behind the good part and may come back until a sync.
    stale: Vec<u8>,
    stale_at: usize,
    chain: Chain,
    /// What the synced part says.
    durable: State,
}

impl Journal {
    pub(super) fn new(grid: Grid) -> Self {
        // The length of real cells; the tiny grid is not one that a header may name.
        let header = JournalHeader {
            checkpoint: "m".into(),
            chunk_len: CHUNK_LEN_MIN,
            layout: 1,
            out_format: 1,
            npy_dtype: 1,
        };
        let (bytes, chain) = header.encode().expect("the header is in order");
        Journal {
            grid,
            synced_len: bytes.len(),
            bytes,
            stale: Vec::new(),
            stale_at: 0,
            chain,
            durable: State::new(grid),
        }
    }

    pub(super) fn append(&mut self, records: &[Record]) {
        for record in records {
            self.chain
                .append(record, &mut self.bytes)
                .expect("the record is in order");
        }
    }

    pub(super) fn sync(&mut self) {
        self.synced_len = self.bytes.len();
        self.stale.clear();
        self.durable = read(self.grid, &self.bytes).0;
    }

    /// What a loss of power right now could not take away.
    pub(super) fn durable(&self) -> &State {
        &self.durable
    }

    /// Reads the journal as a new session does and cuts off what is not in order.
    pub(super) fn recover(&mut self) -> State {
        let (state, good_len, chain) = read(self.grid, &self.bytes);
        (self.stale, self.stale_at) = (self.bytes.split_off(good_len), good_len);
        self.synced_len = self.synced_len.min(good_len);
        self.chain = chain;
        state
    }

    /// The synced part stays; of the rest any beginning, and garbage behind it.
    pub(super) fn power_loss(&mut self, rng: &mut Rng) {
        let keep = self.synced_len + rng.below(self.bytes.len() - self.synced_len + 1);
        let mut left = self.bytes[..keep].to_vec();
        match rng.below(4) {
            // The length was durable before the bytes were.
            0 => left.resize(self.bytes.len(), 0),
            1 => left.extend((0..rng.below(30)).map(|_| rng.next() as u8)),
            // Cutting off was not durable.
            2 => {
                let behind = keep
                    .checked_sub(self.stale_at)
                    .and_then(|n| self.stale.get(n..));
                left.extend_from_slice(behind.unwrap_or_default());
            }
            _ => {}
        }
        self.bytes = left;
        // What is there after the start is on the disk, for there is nowhere else.
        self.synced_len = self.bytes.len();
        self.stale.clear();
    }
}

/// Replay without the file header's grid. Records that were sealed in the right
/// chain but break a rule were written by us: that is never a torn tail.
fn read(grid: Grid, bytes: &[u8]) -> (State, usize, Chain) {
    let Ok(Step::Done {
        len: mut at,
        next: mut chain,
        ..
    }) = JournalHeader::decode(bytes)
    else {
        panic!("the header was synced when the journal was made");
    };
    let mut state = State::new(grid);
    while let Ok(Step::Done { value, len, next }) = chain.decode(&bytes[at..]) {
        if let Err(violation) = state.apply(value.clone()) {
            panic!("the journal contradicts itself: {violation}: {value:?}");
        }
        (at, chain) = (at + len, next);
    }
    (state, at, chain)
}
