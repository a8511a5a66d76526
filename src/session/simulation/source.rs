//! What is to be sent: files that change under the sender's hands.

use super::Rng;
use crate::{
    format::Dtype,
    plan::{Digest16, EntryHeader, EntryKind, Grid, SourceState, digest_entries},
    protocol::ManifestPromise,
};

/// Cell length in bytes.
pub(super) const CELL_LEN: u64 = 8;

#[derive(Clone, Debug)]
struct SourceFile {
    key: u8,
    /// Stands for everything in a fingerprint.
    version: u64,
    settled: bool,
}

#[derive(Clone, Debug)]
pub(super) struct Content {
    header: EntryHeader,
    files: Vec<usize>,
    pub(super) bytes: Vec<u8>,
    /// Other files that have an entry of this name, and its bytes there.
    elsewhere: Option<(Vec<usize>, Vec<u8>)>,
    is_gone: bool,
}

/// The truth about one owner's checkpoint.
#[derive(Clone, Debug)]
pub(super) struct Source {
    files: Vec<SourceFile>,
    pub(super) contents: Vec<Content>,
    last_version: u64,
}

/// The checkpoint as an owner opened it.
#[derive(Clone, Debug)]
pub(super) struct View {
    pub(super) owner: usize,
    pub(super) states: Vec<SourceState>,
    /// Index into the contents, header and numbers of sources.
    pub(super) entries: Vec<(usize, EntryHeader, Vec<u32>)>,
    pub(super) promise: ManifestPromise,
}

impl Source {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let file_count = 1 + rng.below(2);
        let files = (0..file_count).map(|i| SourceFile {
            key: i as u8,
            version: 1 + i as u64,
            settled: rng.chance(700),
        });
        let files: Vec<_> = files.collect();
        let contents = (0..1 + rng.below(6)).map(|i| {
            let byte_len = match rng.below(5) {
                0 => 0,
                1 => CELL_LEN * rng.below(6) as u64,
                _ => rng.below(CELL_LEN as usize * 5 + 1) as u64,
            };
            let header = match rng.below(5) {
                0 => EntryHeader::blob(format!("b{i}"), byte_len),
                // Names that fall on the same file where case does not count.
                1 => {
                    EntryHeader::tensor(["w", "W"][i % 2].repeat(1 + i / 2), Dtype::U8, &[byte_len])
                }
                _ => EntryHeader::tensor(format!("t{i}"), Dtype::U8, &[byte_len]),
            };
            let mut cited = vec![rng.below(file_count)];
            if file_count == 2 && rng.chance(250) {
                cited = vec![0, 1];
            }
            let constant = rng.chance(200).then(|| rng.below(2) as u8);
            let bytes: Vec<u8> = (0..byte_len)
                .map(|_| constant.unwrap_or(rng.next() as u8))
                .collect();
            let mut other_bytes = bytes.clone();
            scribble(&mut other_bytes, rng);
            let other_files = [vec![0], vec![1], vec![1, 0]][rng.below(3)].clone();
            let has_other = file_count == 2 && other_files != cited && rng.chance(300);
            Content {
                header: header.expect("the header is in order"),
                files: cited,
                elsewhere: has_other.then_some((other_files, other_bytes)),
                bytes,
                is_gone: rng.chance(100),
            }
        });
        Source {
            contents: contents.collect(),
            files,
            last_version: 10,
        }
    }

    /// The same headers on another machine, perhaps under the same paths, perhaps
    /// with the same bytes, and in the worst case with the same fingerprints.
    pub(super) fn of_another_owner(&self, rng: &mut Rng) -> Self {
        let mut other = self.clone();
        other.last_version += 1 << 32;
        let (same_key, same_version) = (rng.chance(500), rng.chance(500));
        for file in &mut other.files {
            file.key += if same_key { 0 } else { 100 };
            file.version += if same_version { 0 } else { 1 << 32 };
            file.settled = rng.chance(600);
        }
        for content in &mut other.contents {
            if rng.chance(500) {
                scribble(&mut content.bytes, rng);
            }
        }
        other
    }

    pub(super) fn open(&self, owner: usize, complete: bool, trust_unsettled: bool) -> View {
        let states = self.files.iter().map(|file| SourceState {
            key: [file.key; 16],
            fingerprint: fingerprint(file.version),
            settled: file.settled || trust_unsettled,
        });
        let there = self.contents.iter().enumerate().filter(|(_, c)| !c.is_gone);
        let entries: Vec<_> = there
            .map(|(i, c)| {
                (
                    i,
                    c.header.clone(),
                    c.files.iter().map(|&f| f as u32).collect(),
                )
            })
            .collect();
        let promise = match complete {
            true => ManifestPromise::Complete {
                total_bytes: entries
                    .iter()
                    .map(|(_, h, _): &(_, EntryHeader, Vec<u32>)| h.byte_len)
                    .sum(),
                entry_count: entries.len() as u64,
                entries_digest: digest_entries(entries.iter().map(|(_, h, _)| h)),
            },
            false => ManifestPromise::Open,
        };
        View {
            owner,
            states: states.collect(),
            entries,
            promise,
        }
    }

    /// What the sender checks before Finish.
    pub(super) fn is_as_opened(&self, view: &View) -> bool {
        let now = self.files.iter().map(|f| fingerprint(f.version));
        now.eq(view.states.iter().map(|s| s.fingerprint))
    }

    /// Time passes for the files.
    pub(super) fn settle(&mut self) {
        self.files.iter_mut().for_each(|f| f.settled = true);
    }

    /// A change that shows in the fingerprint.
    pub(super) fn change(&mut self, rng: &mut Rng) {
        let at = rng.below(self.files.len());
        self.last_version += 1;
        self.files[at].version = self.last_version;
        self.files[at].settled = rng.chance(600);
        let what = rng.below(10);
        for content in self.contents.iter_mut().filter(|c| c.files.contains(&at)) {
            match what {
                0 => {}
                1 if rng.chance(500) => content.is_gone = !content.is_gone,
                2 if rng.chance(500) => content.retype(),
                // From other files than before.
                3 if rng.chance(500) && self.files.len() > 1 && content.elsewhere.is_none() => {
                    content.files = if content.files.len() == 1 {
                        vec![0, 1]
                    } else {
                        vec![at]
                    };
                    scribble(&mut content.bytes, rng);
                }
                _ => scribble(&mut content.bytes, rng),
            }
        }
    }

    /// An index now names other files for some entries; no file of data changes.
    pub(super) fn remap(&mut self, rng: &mut Rng) {
        for content in &mut self.contents {
            if let Some((files, bytes)) = &mut content.elsewhere
                && rng.chance(700)
            {
                std::mem::swap(&mut content.files, files);
                std::mem::swap(&mut content.bytes, bytes);
            }
        }
    }

    /// A change that an unsettled fingerprint does not show.
    pub(super) fn change_unseen(&mut self, rng: &mut Rng) {
        let at = rng.below(self.files.len());
        // What also lies in a settled file would show there.
        if !self.files[at].settled {
            for content in self.contents.iter_mut().filter(|c| c.files == [at]) {
                scribble(&mut content.bytes, rng);
            }
        }
    }
}

impl View {
    pub(super) fn digest(&self) -> Option<Digest16> {
        match self.promise {
            ManifestPromise::Complete { entries_digest, .. } => Some(entries_digest),
            ManifestPromise::Open => None,
        }
    }
}

impl Content {
    /// Another element type of equal width: the same length, another header.
    fn retype(&mut self) {
        if let EntryKind::Tensor { dtype } = &mut self.header.kind {
            *dtype = if *dtype == Dtype::U8 {
                Dtype::I8
            } else {
                Dtype::U8
            };
        }
    }
}

fn scribble(bytes: &mut [u8], rng: &mut Rng) {
    for _ in 0..1 + rng.below(3) {
        let at = rng.below(bytes.len().max(1));
        if let Some(byte) = bytes.get_mut(at) {
            *byte = rng.next() as u8;
        }
    }
}

fn fingerprint(version: u64) -> [u8; 32] {
    let mut out = [0; 32];
    out[..8].copy_from_slice(&version.to_le_bytes());
    out
}

/// The grid of all worlds.
pub(super) fn grid() -> Grid {
    Grid::tiny(CELL_LEN as u32)
}
