//! Collects what the readers find, under the rules for every checkpoint.

use super::files::{FileTable, OpenFile};
use super::{
    Derived, Piece, Skipped, SourceEntry, SourceError, SourceOptions, SourceSet, derived::Memory,
    folder, selection, slabs::Slabs, sniff, tensorflow,
};
use crate::fault;
use crate::plan::{EntryHeader, MAX_ALIASES, MAX_ENTRIES, PlanError, clip};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// See [`SourceSet::open`].
pub(super) fn open(paths: &[PathBuf], options: &SourceOptions) -> Result<SourceSet, SourceError> {
    let mut builder = Builder {
        include_files: options.include_files,
        ..Builder::default()
    };
    let mut canonical_roots = Vec::new();
    for path in paths {
        // The name of a TensorFlow checkpoint is the beginning of the names of its files.
        let path = &tensorflow::index_of_prefix(path).unwrap_or_else(|| path.clone());
        let io = |op| move |source| SourceError::io(op, path, source);
        canonical_roots.push(fs::canonicalize(path).map_err(io("resolve"))?);
        if fault::call("source_stat", || fs::metadata(path))
            .map_err(io("stat"))?
            .is_dir()
        {
            folder::load(path, &mut builder)?;
        } else {
            sniff::load_file(path, &mut builder)?;
        }
    }
    canonical_roots.sort();
    builder.finish(canonical_roots, options)
}

/// A checkpoint in the making.
#[derive(Debug, Default)]
pub(super) struct Builder {
    pub(super) include_files: bool,
    pub(super) files: FileTable,
    metadata: BTreeMap<String, String>,
    formats: Vec<&'static str>,
    tensors: Vec<SourceEntry>,
    blobs: Vec<SourceEntry>,
    skipped: Vec<Skipped>,
    /// Names of all entries, and the first file that each is from.
    names: HashMap<String, Option<u32>>,
}

impl Builder {
    /// Says that part of the checkpoint is in this format.
    pub(super) fn add_format(&mut self, format: &'static str) {
        if !self.formats.contains(&format) {
            self.formats.push(format);
        }
    }

    /// Adds free text; keys that are there already keep their text.
    pub(super) fn add_metadata(&mut self, metadata: BTreeMap<String, String>) {
        for (key, text) in metadata {
            self.metadata.entry(key).or_insert(text);
        }
    }

    pub(super) fn skip(&mut self, name: impl Into<String>, reason: impl Into<String>) {
        self.skipped.push(Skipped {
            name: name.into(),
            reason: reason.into(),
        });
    }

    /// Adds an entry whose bytes are one run of one file.
    pub(super) fn add(
        &mut self,
        header: EntryHeader,
        file_index: u32,
        file_offset: u64,
    ) -> Result<&mut SourceEntry, SourceError> {
        let byte_len = header.byte_len;
        self.add_runs(header, &[(byte_len, file_index, file_offset)])
    }

    /// Adds an entry whose bytes are these runs, one after the other: length, file and
    /// offset of each.
    pub(super) fn add_runs(
        &mut self,
        header: EntryHeader,
        runs: &[(u64, u32, u64)],
    ) -> Result<&mut SourceEntry, SourceError> {
        header.check()?;
        let mut pieces = Vec::with_capacity(runs.len());
        let mut sources = Vec::new();
        let mut dst_offset = 0u64;
        for &(byte_len, file_index, file_offset) in runs {
            self.check_run(&header, byte_len, file_index, file_offset)?;
            if !sources.contains(&file_index) {
                sources.push(file_index);
            }
            if byte_len > 0 {
                pieces.push(Piece {
                    file_index,
                    file_offset,
                    byte_len,
                    dst_offset,
                });
                dst_offset = dst_offset.saturating_add(byte_len);
            }
        }
        if dst_offset != header.byte_len {
            return Err(PlanError::Shape {
                name: clip(&header.name),
                why: format!(
                    "its parts have {dst_offset} bytes, it has {}",
                    header.byte_len
                ),
            }
            .into());
        }
        let entry = self.admit(header, sources)?;
        entry.pieces = pieces;
        Ok(entry)
    }

    /// Adds a tensor that is put together of boxes.
    pub(super) fn add_slabs(
        &mut self,
        header: EntryHeader,
        slabs: Slabs,
    ) -> Result<&mut SourceEntry, SourceError> {
        let mut sources = Vec::new();
        for slab in slabs.slabs() {
            let byte_len = slab.shape.iter().product();
            self.check_run(&header, byte_len, slab.file_index, slab.file_offset)?;
            if !sources.contains(&slab.file_index) {
                sources.push(slab.file_index);
            }
        }
        self.add_derived(header, sources, Arc::new(slabs))
    }

    /// Adds a tensor whose bytes were made of others in this file, as many as it has.
    pub(super) fn add_memory(
        &mut self,
        header: EntryHeader,
        bytes: Vec<u8>,
        file_index: u32,
    ) -> Result<&mut SourceEntry, SourceError> {
        if bytes.len() as u64 != header.byte_len {
            return Err(PlanError::Shape {
                name: clip(&header.name),
                why: format!(
                    "{} bytes were made for it, it has {}",
                    bytes.len(),
                    header.byte_len
                ),
            }
            .into());
        }
        self.add_derived(header, vec![file_index], Arc::new(Memory(bytes)))
    }

    /// Adds an entry whose bytes are made out of those of some files.
    pub(super) fn add_derived(
        &mut self,
        header: EntryHeader,
        sources: Vec<u32>,
        derived: Arc<dyn Derived>,
    ) -> Result<&mut SourceEntry, SourceError> {
        let entry = self.admit(header, sources)?;
        entry.derived = Some(derived);
        Ok(entry)
    }

    /// A run lies in its file.
    fn check_run(
        &self,
        header: &EntryHeader,
        byte_len: u64,
        file_index: u32,
        file_offset: u64,
    ) -> Result<(), SourceError> {
        let file_len = self.files.byte_len(file_index);
        let end = file_offset.checked_add(byte_len);
        if end.is_some_and(|end| end <= file_len) {
            return Ok(());
        }
        let path = self.files.paths().swap_remove(file_index as usize);
        let why = format!(
            "entry {:?} has {byte_len} bytes at {file_offset}, the file has {file_len}",
            clip(&header.name),
        );
        Err(SourceError::malformed(&path, why))
    }

    /// Adds an entry whose bytes have no place yet.
    fn admit(
        &mut self,
        header: EntryHeader,
        sources: Vec<u32>,
    ) -> Result<&mut SourceEntry, SourceError> {
        header.check()?;
        let count = (self.tensors.len() + self.blobs.len()) as u64 + 1;
        if count > MAX_ENTRIES {
            let (what, found, limit) = ("entries of one checkpoint", count, MAX_ENTRIES);
            return Err(PlanError::TooMany { what, found, limit }.into());
        }
        let file = sources.first().copied();
        if let Some(earlier) = self.names.insert(header.name.clone(), file) {
            return Err(self.twice(&header.name, earlier, file));
        }
        let list = match header.dtype() {
            Some(_) => &mut self.tensors,
            None => &mut self.blobs,
        };
        list.push(SourceEntry {
            header,
            source_name: None,
            aliases: Vec::new(),
            crc32c: None,
            trainable: None,
            is_optimizer: false,
            sources,
            pieces: Vec::new(),
            derived: None,
        });
        let last = list.len() - 1;
        Ok(&mut list[last])
    }

    /// A name that was there already.
    fn twice(&self, name: &str, earlier: Option<u32>, file: Option<u32>) -> SourceError {
        let name = clip(name);
        match (earlier, file) {
            (Some(earlier), Some(file)) if earlier != file => {
                let why = format!(
                    "entry name {name:?} occurs in {} as well: name one of the two",
                    self.files.path(earlier).display()
                );
                let path = self.files.path(file).to_owned();
                SourceError::Choice { path, why }
            }
            _ => PlanError::Duplicate { name }.into(),
        }
    }

    /// Adds a whole file as a blob.
    pub(super) fn add_blob(&mut self, name: &str, path: &Path) -> Result<(), SourceError> {
        let file = OpenFile::open(path)?;
        let header = EntryHeader::blob(name, file.byte_len())?;
        let index = self.files.add(&file, &[])?;
        self.add(header, index, 0)?;
        Ok(())
    }

    fn finish(
        mut self,
        canonical_roots: Vec<PathBuf>,
        options: &SourceOptions,
    ) -> Result<SourceSet, SourceError> {
        self.blobs.sort_by(|a, b| a.header.name.cmp(&b.header.name));
        let selection = selection::identity(options);
        let mut entries = self.tensors;
        if !selection.is_empty() {
            entries = selection::select(entries, options)?;
            let mut names = HashSet::new();
            if let Some(twice) = entries.iter().find(|e| !names.insert(&e.header.name)) {
                let why = format!("two tensors would be called {:?}", clip(&twice.header.name));
                return Err(SourceError::Selection { why });
            }
            if entries.is_empty() {
                let why = "no tensor is left".to_owned();
                return Err(SourceError::Selection { why });
            }
        }
        entries.append(&mut self.blobs);
        let mut total_bytes = 0u64;
        for entry in &entries {
            let (what, limit) = ("entry: number of further names", MAX_ALIASES as u64);
            let found = entry.aliases.len() as u64;
            if found > limit {
                return Err(PlanError::TooMany { what, found, limit }.into());
            }
            total_bytes =
                total_bytes
                    .checked_add(entry.header.byte_len)
                    .ok_or(PlanError::TooMany {
                        what: "bytes of all entries",
                        found: u64::MAX,
                        limit: u64::MAX,
                    })?;
        }
        Ok(SourceSet {
            format: match self.formats[..] {
                [format] => format,
                _ => "mixed",
            },
            metadata: self.metadata,
            entries,
            skipped: self.skipped,
            total_bytes,
            files: Arc::new(self.files),
            canonical_roots,
            selection,
        })
    }
}
