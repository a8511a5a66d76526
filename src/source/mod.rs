//! Floor 3: checkpoints on disk. Finds out what is in a file or folder by
//! reading headers; tensor bytes are read later, by position, when asked for.
//!
//! | format | what | reader |
//! |---|---|---|
//! | `npy` | one or more `.npy` files | `npy` |
//! | `safetensors` | one file, several, or shards with an index | [`safetensors`], `sharded` |
//! | `npz` | a zip archive of `.npy` files | `zip`, `npz`, `inflate` |
//! | `pytorch` | one file of `torch.save`, or shards with an index | `zip`, `pickle`, `torch`, `gathered` |
//! | `pytorch-distributed` | a folder of `torch.distributed.checkpoint` | `torch_distributed` |
//! | `hdf5` | one file | `hdf5` |
//! | `keras` | `.keras`, `.weights.h5`, shards of these with an index, `.h5` | `keras`, `hdf5`, `zip` |
//! | `tf-bundle` | a TensorFlow checkpoint (version 2) | `tensorflow` |
//! | `savedmodel` | a TensorFlow SavedModel | `tensorflow` |
//! | `gguf` | a GGUF file, quantised or not | `gguf` |
//! | `onnx` | the initializers of a model, also beside it | `onnx` |
//! | `tensorferry` | a folder that this program has written | `landed` |
//!
//! Files are recognised by content, not by extension.

mod archive;
mod boxes;
mod builder;
mod container;
mod derived;
mod error;
mod files;
mod fingerprint;
mod folder;
mod gathered;
pub(crate) mod gguf;
mod globs;
mod growing;
pub(crate) mod hdf5;
mod inflate;
mod keras;
mod landed;
mod mapped;
mod memory;
mod natural;
mod npy;
pub(crate) mod npz;
pub(crate) mod onnx;
mod pages;
pub(crate) mod pickle;
pub(crate) mod protobuf;
pub mod safetensors;
mod selection;
mod sharded;
mod slabs;
mod sniff;
pub(crate) mod tensorflow;
pub(crate) mod torch;
pub(crate) mod torch_distributed;
mod turned;
pub(crate) mod view;
pub(crate) mod zip;

pub use error::SourceError;
pub(crate) use globs::{First, Globs};
pub use growing::GrowingSource;
pub(crate) use growing::{InPlace, Supply};
pub(crate) use mapped::MappedRun;
pub use mapped::ReadMode;
pub use memory::MemoryEntry;
pub use selection::{NameFilter, Rename};

use crate::plan::{EntryHeader, SourceState};
use derived::Derived;
use files::FileTable;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// What to take from a source.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SourceOptions {
    /// Take the other files of a folder along as blobs.
    pub include_files: bool,
    /// Take only tensors whose names fit one of these patterns, in which `*` stands for
    /// any text and `?` for one character; all where there are none. Each must fit one.
    pub include: Vec<String>,
    /// Leave out tensors whose names fit one of these patterns. Each must fit one.
    pub exclude: Vec<String>,
    /// Take only what the source says is trainable, in the order of its model.
    pub trainable: bool,
    /// New names: the first that fits counts.
    pub rename: Vec<Rename>,
}

impl Default for SourceOptions {
    fn default() -> Self {
        SourceOptions {
            include_files: true,
            include: Vec::new(),
            exclude: Vec::new(),
            trainable: false,
            rename: Vec::new(),
        }
    }
}

/// An opened checkpoint: headers are read, tensor bytes are not.
///
/// ```
/// use tensorferry::{Dtype, SourceSet, format::npy};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = tempfile::tempdir()?;
/// let header = npy::encode_header("<f4", false, &[2, 3]);
/// std::fs::write(dir.path().join("w.npy"), [header, vec![0; 24]].concat())?;
/// std::fs::write(dir.path().join("config.json"), "{}")?;
///
/// let source = SourceSet::open(&[dir.path()], &Default::default())?;
/// assert_eq!((source.format(), source.total_bytes()), ("npy", 26));
/// let tensor = &source.entries()[0].header;
/// assert_eq!((tensor.dtype(), &tensor.shape[..]), (Some(Dtype::F32), &[2, 3][..]));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SourceSet {
    format: &'static str,
    metadata: BTreeMap<String, String>,
    entries: Vec<SourceEntry>,
    skipped: Vec<Skipped>,
    total_bytes: u64,
    files: Arc<FileTable>,
    canonical_roots: Vec<PathBuf>,
    selection: Vec<u8>,
}

/// A tensor or side file and where its bytes are.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct SourceEntry {
    /// Name, type and shape.
    pub header: EntryHeader,
    /// Name in the source when that is another.
    pub source_name: Option<String>,
    /// Further names of the same tensor.
    pub aliases: Vec<String>,
    /// CRC-32C of the bytes, where the source has one.
    pub crc32c: Option<u32>,
    /// Whether the tensor is trainable, where the source says so.
    pub trainable: Option<bool>,
    /// State of an optimizer, where the source says so.
    pub is_optimizer: bool,
    /// Numbers of the files that the bytes come from.
    pub sources: Vec<u32>,
    /// Runs of bytes that tile the entry, in order; none where `derived` makes them.
    pub(crate) pieces: Vec<Piece>,
    /// What makes the bytes of the entry where they do not lie in a file as they are sent.
    pub(crate) derived: Option<Arc<dyn Derived>>,
}

impl SourceEntry {
    /// The number of the file and the place in it of the first byte, where bytes lie as they
    /// are sent; those of a partitioned tensor go on elsewhere. `None` for what the sender
    /// puts together, and without bytes.
    pub fn first_place(&self) -> Option<(u32, u64)> {
        self.pieces
            .first()
            .map(|piece| (piece.file_index, piece.file_offset))
    }
}

/// A run of bytes of one file that is a run of bytes of an entry.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Number of the file.
    pub(crate) file_index: u32,
    /// First byte in the file.
    pub(crate) file_offset: u64,
    /// Length in bytes.
    pub(crate) byte_len: u64,
    /// First byte in the entry.
    pub(crate) dst_offset: u64,
}

/// A run of bytes of a file.
#[derive(Clone, Copy, Debug)]
struct Span {
    file_index: u32,
    offset: u64,
    len: u64,
}

/// A run of bytes of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Extent {
    pub(crate) entry_index: usize,
    /// First byte in the entry.
    pub(crate) offset: u64,
    /// Length in bytes.
    pub(crate) len: u32,
}

/// Something in the source that is not part of the checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Skipped {
    /// Tensor or file.
    pub name: String,
    /// Why it is left out.
    pub reason: String,
}

impl SourceSet {
    /// Opens files and folders as one checkpoint. Waits up to 50 ms for files
    /// that were written just now.
    ///
    /// # Errors
    /// Any [`SourceError`] except `Range`; a name that occurs in two files is
    /// [`SourceError::Choice`], one that occurs twice in a file
    /// [`PlanError::Duplicate`](crate::plan::PlanError::Duplicate).
    pub fn open(
        paths: &[impl AsRef<Path>],
        options: &SourceOptions,
    ) -> Result<SourceSet, SourceError> {
        let paths: Vec<PathBuf> = paths.iter().map(|p| p.as_ref().to_owned()).collect();
        builder::open(&paths, options)
    }

    /// `gguf`, `hdf5`, `keras`, `npy`, `npz`, `onnx`, `pytorch`, `pytorch-distributed`,
    /// `safetensors`, `savedmodel`, `tensorferry` or `tf-bundle`; `mixed` for several.
    pub fn format(&self) -> &str {
        self.format
    }

    /// Free text of the source, of all files together; of equal keys the first.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Tensors in the order of the source, then blobs by name.
    pub fn entries(&self) -> &[SourceEntry] {
        &self.entries
    }

    /// What was found and left out.
    pub fn skipped(&self) -> &[Skipped] {
        &self.skipped
    }

    /// Bytes that do not lie in a file as they are sent: what is inflated, or gathered
    /// because its elements lie in another order. They cost the sender a copy.
    pub fn derived_bytes(&self) -> u64 {
        let derived = self.entries.iter().filter(|e| e.derived.is_some());
        derived.map(|entry| entry.header.byte_len).sum()
    }

    /// Bytes of all entries.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// The state of every source file, by file number.
    pub fn states(&self) -> &[SourceState] {
        self.files.states()
    }

    /// The canonical path of every source file, by file number.
    pub fn paths(&self) -> Vec<PathBuf> {
        self.files.paths()
    }

    /// The canonical paths of what [`SourceSet::open`] was given, sorted.
    pub fn canonical_roots(&self) -> &[PathBuf] {
        &self.canonical_roots
    }

    /// Stands for what the options select; empty where they take everything.
    pub(crate) fn selection(&self) -> &[u8] {
        &self.selection
    }

    /// Fills `buf` with the bytes of an entry from `offset` on.
    ///
    /// # Errors
    /// [`SourceError::Range`] for bytes that the entry does not have,
    /// [`SourceError::Changed`] when a file was replaced, removed or cut,
    /// [`SourceError::Io`].
    pub fn read_at(
        &self,
        entry_index: usize,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        let mut spans = Vec::with_capacity(1);
        self.check_range(entry_index, offset, buf.len() as u64)?;
        if let Some(derived) = self.derived(entry_index) {
            return derived.read_at(&self.files, offset, buf);
        }
        self.locate(entry_index, offset, buf.len() as u64, &mut spans)?;
        self.read_spans(&spans, buf).map(drop)
    }

    fn derived(&self, entry_index: usize) -> Option<&dyn Derived> {
        self.entries.get(entry_index)?.derived.as_deref()
    }

    /// Fills `buf` with these runs one after the other. Runs that follow each other in
    /// a file are read at once.
    pub(crate) fn read_extents(
        &self,
        extents: impl Iterator<Item = Extent>,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        let mut spans = Vec::new();
        let mut rest = buf;
        for extent in extents {
            let Extent {
                entry_index,
                offset,
                len,
            } = extent;
            if self.derived(entry_index).is_some() {
                rest = self.read_spans(&spans, rest)?;
                spans.clear();
                let (now, later) = rest.split_at_mut((len as usize).min(rest.len()));
                self.read_at(entry_index, offset, now)?;
                rest = later;
            } else {
                self.locate(entry_index, offset, len.into(), &mut spans)?;
            }
        }
        self.read_spans(&spans, rest).map(drop)
    }

    /// Whether an entry has these bytes.
    fn check_range(&self, entry_index: usize, offset: u64, len: u64) -> Result<(), SourceError> {
        let entry = self.entries.get(entry_index);
        let byte_len = entry.map_or(0, |entry| entry.header.byte_len);
        let end = offset.checked_add(len).filter(|&end| end <= byte_len);
        match entry.and(end) {
            Some(_) => Ok(()),
            None => Err(SourceError::Range {
                name: entry.map_or_else(|| entry_index.to_string(), |e| e.header.name.clone()),
                offset,
                len,
                byte_len,
            }),
        }
    }

    /// Adds the places of a run of bytes of an entry.
    fn locate(
        &self,
        entry_index: usize,
        offset: u64,
        len: u64,
        spans: &mut Vec<Span>,
    ) -> Result<(), SourceError> {
        self.check_range(entry_index, offset, len)?;
        let pieces = self.entries.get(entry_index).map(|entry| &entry.pieces[..]);
        let (pieces, end) = (pieces.unwrap_or_default(), offset + len);
        let mut at = offset;
        let first = pieces.partition_point(|piece| piece.dst_offset + piece.byte_len <= offset);
        for piece in &pieces[first..] {
            if at >= end {
                break;
            }
            // Pieces tile the entry, so `at` lies in this one.
            let skip = at - piece.dst_offset;
            let len = (piece.byte_len - skip).min(end - at);
            at += len;
            let (file_index, offset) = (piece.file_index, piece.file_offset + skip);
            match spans.last_mut() {
                Some(last) if last.file_index == file_index && last.offset + last.len == offset => {
                    last.len += len;
                }
                _ => spans.push(Span {
                    file_index,
                    offset,
                    len,
                }),
            }
        }
        Ok(())
    }

    /// A run of bytes that lies in one piece in one mapped file. `None` where it does
    /// not, or where files cannot be mapped.
    pub(crate) fn map_extent(&self, extent: Extent) -> Result<Option<MappedRun>, SourceError> {
        let mut spans = Vec::with_capacity(1);
        let (index, len) = (extent.entry_index, u64::from(extent.len));
        if self.derived(index).is_some() {
            return Ok(None);
        }
        self.locate(index, extent.offset, len, &mut spans)?;
        let [span] = spans[..] else { return Ok(None) };
        let Ok(start) = usize::try_from(span.offset) else {
            return Ok(None);
        };
        let file = self.files.map(span.file_index)?;
        let range = start..start + extent.len as usize;
        Ok(file.map(|file| MappedRun { file, range }))
    }

    /// Reads runs of files one after the other; what is left of the buffer.
    fn read_spans<'a>(
        &self,
        spans: &[Span],
        buf: &'a mut [u8],
    ) -> Result<&'a mut [u8], SourceError> {
        let mut rest = buf;
        for span in spans {
            let len = usize::try_from(span.len).map_or(rest.len(), |n| n.min(rest.len()));
            let (now, later) = rest.split_at_mut(len);
            self.files.read_at(span.file_index, span.offset, now)?;
            rest = later;
        }
        Ok(rest)
    }

    /// Looks at every source file again.
    ///
    /// # Errors
    /// [`SourceError::Changed`] when one differs from what it was when the
    /// checkpoint was opened, [`SourceError::Io`].
    pub fn check_unchanged(&self) -> Result<(), SourceError> {
        self.files.check_unchanged()
    }
}

#[cfg(test)]
mod tests;
