//! A checkpoint that is still being produced: entries are added while earlier ones
//! are sent already.

use super::{
    Extent, Globs, MappedRun, MemoryEntry, NameFilter, SourceEntry, SourceError, SourceSet,
};
use crate::plan::{
    Digest16, EntryHeader, EntryKind, MAX_ENTRIES, PlanError, SourceKey, SourceState, clip,
    digest_entries, first_16,
};
use bytes::Bytes;
use std::{
    collections::{HashMap, HashSet},
    io,
    sync::{Arc, PoisonError, RwLock, RwLockReadGuard},
};
use tokio::sync::watch;

/// Where the bytes of an entry are.
#[derive(Clone, Debug)]
enum Origin {
    Memory(Bytes),
    /// An entry of an opened checkpoint.
    Set(Arc<SourceSet>, usize),
}

#[derive(Debug, Default)]
struct Inner {
    entries: Vec<(SourceEntry, Origin)>,
    names: HashSet<String>,
    states: Vec<SourceState>,
    numbers: HashMap<SourceKey, u32>,
    sets: Vec<Arc<SourceSet>>,
    total_bytes: u64,
    is_sealed: bool,
}

/// Entries so far, and whether more may come.
#[derive(Debug)]
pub struct GrowingSource {
    /// Stands for the content of memory: bytes that another handle added are
    /// compared before they are trusted.
    nonce: [u8; 32],
    inner: RwLock<Inner>,
    grown: watch::Sender<()>,
}

impl GrowingSource {
    /// Nothing yet.
    ///
    /// # Errors
    /// The system has no random numbers.
    pub fn new() -> Result<Self, SourceError> {
        let mut nonce = [0; 32];
        getrandom::fill(&mut nonce).map_err(|e| SourceError::Io {
            op: "draw random numbers for",
            path: "memory".into(),
            source: io::Error::other(e),
        })?;
        Ok(GrowingSource {
            nonce,
            inner: RwLock::default(),
            grown: watch::Sender::new(()),
        })
    }

    /// Stands for everything that this handle has and will have.
    pub(crate) fn fingerprint(&self) -> Digest16 {
        let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 open fingerprint");
        hasher.update(&self.nonce);
        first_16(hasher.finalize())
    }

    /// Adds an entry whose bytes are in memory; they are kept until the push ends.
    ///
    /// # Errors
    /// [`SourceError::Range`] when `bytes` is not as long as `header` says,
    /// [`SourceError::Plan`] for a bad or a second header of one name.
    pub fn add(&self, header: EntryHeader, bytes: Bytes) -> Result<(), SourceError> {
        self.add_entry(MemoryEntry::new(header, bytes))
    }

    /// Adds an entry with all that is known of it.
    ///
    /// # Errors
    /// As [`GrowingSource::add`].
    pub fn add_entry(&self, entry: MemoryEntry) -> Result<(), SourceError> {
        let MemoryEntry { header, bytes, .. } = &entry;
        header.check()?;
        if header.byte_len != bytes.len() as u64 {
            return Err(SourceError::Range {
                name: clip(&header.name),
                offset: 0,
                len: bytes.len() as u64,
                byte_len: header.byte_len,
            });
        }
        let key = blake3::derive_key("tensorferry v1 memory source", &[]);
        let state = SourceState {
            key: first_16(key.into()),
            fingerprint: self.nonce,
            // A handle promises its bytes, and a change of lent ones shows in their sum.
            settled: true,
        };
        let (entry, bytes) = entry.into_parts();
        self.change(|inner| {
            let sources = vec![inner.number_of(&state)?];
            inner.push(SourceEntry { sources, ..entry }, Origin::Memory(bytes))
        })
    }

    /// Adds every entry of an opened checkpoint.
    ///
    /// # Errors
    /// [`SourceError::Plan`] for a second entry of one name, [`SourceError::Changed`]
    /// when one of its files was added before in another state. Entries before the
    /// one at fault stay.
    pub fn add_set(&self, set: &Arc<SourceSet>) -> Result<(), SourceError> {
        self.change(|inner| {
            let mut numbers = Vec::with_capacity(set.states().len());
            for (state, path) in set.states().iter().zip(set.paths()) {
                let number = inner.number_of(state);
                numbers.push(number.map_err(|_| SourceError::Changed {
                    path,
                    what: "it was added before in another state".to_owned(),
                })?);
            }
            inner.sets.push(Arc::clone(set));
            for (index, entry) in set.entries().iter().enumerate() {
                let sources = entry.sources.iter();
                let sources = sources.filter_map(|&i| numbers.get(i as usize).copied());
                let entry = SourceEntry {
                    sources: sources.collect(),
                    ..entry.clone()
                };
                inner.push(entry, Origin::Set(Arc::clone(set), index))?;
            }
            Ok(())
        })
    }

    /// Forgets every entry that was not asked for. For a source that nobody reads yet: the
    /// numbers of the others change.
    ///
    /// # Errors
    /// [`SourceError::Selection`] when a pattern fits no name.
    pub(crate) fn select(&self, filter: &NameFilter) -> Result<(), SourceError> {
        self.change(|inner| {
            let takes = |entry: &SourceEntry| match entry.header.kind {
                EntryKind::Tensor { .. } => filter.takes(&entry.header.name),
                EntryKind::Blob => true,
            };
            inner.entries.retain(|(entry, _)| takes(entry));
            let lens = inner.entries.iter().map(|(entry, _)| entry.header.byte_len);
            inner.total_bytes = lens.fold(0, u64::saturating_add);
            filter.check_used()
        })
    }

    /// # Errors
    /// [`SourceError::Selection`]: a pattern fits none of the names so far.
    pub(crate) fn check_used(&self, globs: &Globs) -> Result<(), SourceError> {
        let inner = self.inner();
        let entries = inner.entries.iter();
        globs.check_used(entries.map(|(entry, _)| entry.header.name.as_str()))
    }

    /// What identifies the entries so far.
    pub(crate) fn headers_digest(&self) -> Digest16 {
        digest_entries(self.inner().entries.iter().map(|(entry, _)| &entry.header))
    }

    /// Nothing more will come.
    pub fn seal(&self) {
        let _ = self.change(|inner| {
            inner.is_sealed = true;
            Ok(())
        });
    }

    fn change(
        &self,
        change: impl FnOnce(&mut Inner) -> Result<(), SourceError>,
    ) -> Result<(), SourceError> {
        let result = change(&mut self.inner.write().unwrap_or_else(PoisonError::into_inner));
        self.grown.send_replace(());
        result
    }

    fn inner(&self) -> RwLockReadGuard<'_, Inner> {
        self.inner.read().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Inner {
    /// Number of a source; the same for all entries that cite it.
    fn number_of(&mut self, state: &SourceState) -> Result<u32, SourceError> {
        if let Some(&number) = self.numbers.get(&state.key) {
            return match self.states.get(number as usize) {
                Some(known) if known.fingerprint == state.fingerprint => Ok(number),
                _ => Err(SourceError::Changed {
                    path: "memory".into(),
                    what: "another handle".to_owned(),
                }),
            };
        }
        let number = self.states.len() as u32;
        self.states.push(state.clone());
        self.numbers.insert(state.key, number);
        Ok(number)
    }

    fn push(&mut self, entry: SourceEntry, origin: Origin) -> Result<(), SourceError> {
        let found = self.entries.len() as u64 + 1;
        if found > MAX_ENTRIES {
            let (what, limit) = ("entries of one checkpoint", MAX_ENTRIES);
            return Err(PlanError::TooMany { what, found, limit }.into());
        }
        if !self.names.insert(entry.header.name.clone()) {
            return Err(PlanError::Duplicate {
                name: clip(&entry.header.name),
            }
            .into());
        }
        self.total_bytes = self.total_bytes.saturating_add(entry.header.byte_len);
        self.entries.push((entry, origin));
        Ok(())
    }
}

/// Bytes that need not be read into a buffer.
#[derive(Debug)]
pub(crate) enum InPlace {
    /// The producer holds them.
    Memory(Bytes),
    /// They are in a mapped file.
    Mapped(MappedRun),
}

/// What a push sends: everything known from the start, or still growing.
#[derive(Clone, Debug)]
pub(crate) enum Supply {
    Complete(Arc<SourceSet>),
    Growing(Arc<GrowingSource>),
}

impl Supply {
    /// Entries so far.
    pub(crate) fn entry_count(&self) -> usize {
        match self {
            Supply::Complete(set) => set.entries().len(),
            Supply::Growing(growing) => growing.inner().entries.len(),
        }
    }

    pub(crate) fn with_entry<T>(
        &self,
        index: usize,
        look: impl FnOnce(&SourceEntry) -> T,
    ) -> Option<T> {
        match self {
            Supply::Complete(set) => set.entries().get(index).map(look),
            Supply::Growing(growing) => growing.inner().entries.get(index).map(|(e, _)| look(e)),
        }
    }

    /// Bytes of the entries so far.
    pub(crate) fn total_bytes(&self) -> u64 {
        match self {
            Supply::Complete(set) => set.total_bytes(),
            Supply::Growing(growing) => growing.inner().total_bytes,
        }
    }

    /// No entry will be added any more.
    pub(crate) fn is_sealed(&self) -> bool {
        match self {
            Supply::Complete(_) => true,
            Supply::Growing(growing) => growing.inner().is_sealed,
        }
    }

    /// States of the sources from this number on.
    pub(crate) fn states_from(&self, first: usize) -> Vec<SourceState> {
        let rest = |states: &[SourceState]| states.get(first..).unwrap_or_default().to_vec();
        match self {
            Supply::Complete(set) => rest(set.states()),
            Supply::Growing(growing) => rest(&growing.inner().states),
        }
    }

    /// As [`SourceSet::read_at`].
    pub(crate) fn read_at(
        &self,
        index: usize,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        let growing = match self {
            Supply::Complete(set) => return set.read_at(index, offset, buf),
            Supply::Growing(growing) => growing,
        };
        // Not held while a disk is read.
        let found = growing.inner().entries.get(index).cloned();
        let bytes = match &found {
            Some((_, Origin::Set(set, index))) => return set.read_at(*index, offset, buf),
            Some((_, Origin::Memory(bytes))) => usize::try_from(offset)
                .ok()
                .and_then(|start| bytes.get(start..start.checked_add(buf.len())?)),
            None => None,
        };
        let Some(bytes) = bytes else {
            return Err(SourceError::Range {
                name: index.to_string(),
                offset,
                len: buf.len() as u64,
                byte_len: found.map_or(0, |(entry, _)| entry.header.byte_len),
            });
        };
        buf.copy_from_slice(bytes);
        Ok(())
    }

    /// As [`SourceSet::read_extents`].
    pub(crate) fn read_extents(
        &self,
        extents: impl Iterator<Item = Extent>,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        if let Supply::Complete(set) = self {
            return set.read_extents(extents, buf);
        }
        let mut rest = buf;
        for extent in extents {
            let len = rest.len().min(extent.len as usize);
            let (now, later) = rest.split_at_mut(len);
            self.read_at(extent.entry_index, extent.offset, now)?;
            rest = later;
        }
        Ok(())
    }

    /// The bytes of a run without reading them; `None` where they must be read. Files
    /// are mapped only where `maps` says so.
    pub(crate) fn in_place(
        &self,
        extent: Extent,
        maps: bool,
    ) -> Result<Option<InPlace>, SourceError> {
        let map = |set: &SourceSet, extent| match maps {
            true => Ok(set.map_extent(extent)?.map(InPlace::Mapped)),
            false => Ok(None),
        };
        let growing = match self {
            Supply::Complete(set) => return map(set, extent),
            Supply::Growing(growing) => growing,
        };
        let found = growing.inner().entries.get(extent.entry_index).cloned();
        match found {
            Some((_, Origin::Set(set, entry_index))) => map(
                &set,
                Extent {
                    entry_index,
                    ..extent
                },
            ),
            Some((_, Origin::Memory(bytes))) => {
                let start = usize::try_from(extent.offset).unwrap_or(usize::MAX);
                let end = start.saturating_add(extent.len as usize);
                // What is out of range is said by reading it.
                let is_inside = end <= bytes.len();
                Ok(is_inside.then(|| InPlace::Memory(bytes.slice(start..end))))
            }
            None => Ok(None),
        }
    }

    /// As [`SourceSet::check_unchanged`], for every set.
    pub(crate) fn check_unchanged(&self) -> Result<(), SourceError> {
        match self {
            Supply::Complete(set) => set.check_unchanged(),
            Supply::Growing(growing) => {
                let sets = growing.inner().sets.clone();
                sets.iter().try_for_each(|set| set.check_unchanged())
            }
        }
    }

    /// The entry of this process's memory that a receiver says does not have the sum that
    /// was taken before it was announced. What arrived was checked chunk by chunk, so that
    /// memory has changed in between.
    pub(crate) fn changed_in_memory(&self, refusal: &str) -> Option<String> {
        let Supply::Growing(growing) = self else {
            return None;
        };
        let inner = growing.inner();
        let summed = inner.entries.iter().filter(|(entry, origin)| {
            entry.crc32c.is_some() && matches!(origin, Origin::Memory(_))
        });
        let mut names = summed.map(|(entry, _)| &entry.header.name);
        let found = names.find(|name| refusal.starts_with(&format!("{name:?} ")));
        found.cloned()
    }

    /// Resolves when entries were added or the last one was; never for a complete
    /// checkpoint.
    pub(crate) async fn grown(&self, seen: &mut watch::Receiver<()>) {
        if matches!(self, Supply::Complete(_)) || seen.changed().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// What [`Supply::grown`] waits with.
    pub(crate) fn watch(&self) -> watch::Receiver<()> {
        match self {
            Supply::Complete(_) => watch::channel(()).1,
            Supply::Growing(growing) => growing.grown.subscribe(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::Dtype;

    fn header(name: &str, len: u64) -> EntryHeader {
        EntryHeader::tensor(name, Dtype::U8, &[len]).unwrap()
    }

    #[test]
    fn entries_are_read_from_memory_and_names_are_unique() {
        let growing = Arc::new(GrowingSource::new().unwrap());
        growing
            .add(header("a", 5), Bytes::from_static(b"hello"))
            .unwrap();
        growing.add(header("empty", 0), Bytes::new()).unwrap();
        assert!(matches!(
            growing.add(header("a", 1), Bytes::from_static(b"x")),
            Err(SourceError::Plan(PlanError::Duplicate { .. }))
        ));
        assert!(matches!(
            growing.add(header("b", 2), Bytes::from_static(b"x")),
            Err(SourceError::Range { .. })
        ));
        let supply = Supply::Growing(Arc::clone(&growing));
        assert_eq!((supply.entry_count(), supply.total_bytes()), (2, 5));
        // One source stands for all that one handle has in memory.
        assert_eq!(supply.states_from(0).len(), 1);
        let mut buf = [0; 3];
        supply.read_at(0, 2, &mut buf).unwrap();
        assert_eq!(&buf, b"llo");
        for (index, offset) in [(0, 3), (0, u64::MAX), (1, 0), (7, 0)] {
            assert!(supply.read_at(index, offset, &mut buf).is_err());
        }
        assert!(!supply.is_sealed());
        growing.seal();
        assert!(supply.is_sealed());
    }
}
