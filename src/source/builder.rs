//! Collects what the readers find, under the rules for every checkpoint.

use super::files::{FileTable, OpenFile};
use super::{Piece, Skipped, SourceEntry, SourceError, SourceOptions, SourceSet, folder, sniff};
use crate::fault;
use crate::plan::{EntryHeader, MAX_ALIASES, MAX_ENTRIES, PlanError, clip};
use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::path::{Path, PathBuf};

/// See [`SourceSet::open`].
pub(super) fn open(paths: &[PathBuf], options: &SourceOptions) -> Result<SourceSet, SourceError> {
    let mut builder = Builder {
        include_files: options.include_files,
        ..Builder::default()
    };
    let mut canonical_roots = Vec::new();
    for path in paths {
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
    builder.finish(canonical_roots)
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
    names: HashSet<String>,
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
        header.check()?;
        let count = (self.tensors.len() + self.blobs.len()) as u64 + 1;
        if count > MAX_ENTRIES {
            let (what, found, limit) = ("entries of one checkpoint", count, MAX_ENTRIES);
            return Err(PlanError::TooMany { what, found, limit }.into());
        }
        let byte_len = header.byte_len;
        let file_len = self.files.byte_len(file_index);
        if file_offset
            .checked_add(byte_len)
            .is_none_or(|end| end > file_len)
        {
            let path = self.files.paths().swap_remove(file_index as usize);
            let why = format!(
                "entry {:?} has {byte_len} bytes at {file_offset}, the file has {file_len}",
                clip(&header.name),
            );
            return Err(SourceError::malformed(&path, why));
        }
        if !self.names.insert(header.name.clone()) {
            return Err(PlanError::Duplicate {
                name: clip(&header.name),
            }
            .into());
        }
        let piece = Piece {
            file_index,
            file_offset,
            byte_len,
            dst_offset: 0,
        };
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
            sources: vec![file_index],
            pieces: if byte_len == 0 {
                Vec::new()
            } else {
                vec![piece]
            },
        });
        let last = list.len() - 1;
        Ok(&mut list[last])
    }

    /// Adds a whole file as a blob.
    pub(super) fn add_blob(&mut self, name: &str, path: &Path) -> Result<(), SourceError> {
        let file = OpenFile::open(path)?;
        let header = EntryHeader::blob(name, file.byte_len())?;
        let index = self.files.add(&file, &[])?;
        self.add(header, index, 0)?;
        Ok(())
    }

    fn finish(mut self, canonical_roots: Vec<PathBuf>) -> Result<SourceSet, SourceError> {
        self.blobs.sort_by(|a, b| a.header.name.cmp(&b.header.name));
        let mut entries = self.tensors;
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
            files: self.files,
            canonical_roots,
        })
    }
}
