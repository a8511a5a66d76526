//! A checkpoint as one file of another format: what may be chosen, and what came of it.

mod npz;
mod outputs;
mod pieces;
mod safetensors;

use crate::{error::Error, source::SourceSet, store::StoreError};
use pieces::Pieces;
use std::{
    io,
    ops::ControlFlow,
    path::{Path, PathBuf},
};

/// How a checkpoint is exported.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct ExportOptions {
    /// Replace files of the same name.
    pub overwrite: bool,
    /// Most bytes of tensors in one `.safetensors` file; a tensor that is longer has a file
    /// of its own. `None` makes one file of all.
    pub max_shard_bytes: Option<u64>,
}

/// What was written.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct ExportReport {
    /// The files: the file, or the shards and then their index.
    pub files: Vec<PathBuf>,
    /// Tensors in them.
    pub tensor_count: u64,
    /// Bytes of these tensors.
    pub bytes: u64,
    /// Further names of tensors. A `.safetensors` file has them in its metadata, each with
    /// the name under which the tensor stands; a `.npz` file has no place for them.
    pub alias_count: u64,
}

/// Writes the tensors of a checkpoint into a `.safetensors` file, or into several and an
/// index where [`ExportOptions::max_shard_bytes`] asks for more than one. Side files are
/// left out.
///
/// Under their names files appear whole and synced, after the source was compared with
/// its checksums, where it has some; shards before their index. Until then they lie in a
/// hidden folder beside them, which is removed whatever happens; what a killed process left
/// of that, the next export into the same folder removes.
///
/// Elements in Fortran order are put in C order. A tensor with several names is written
/// once; in the metadata each further name stands with the name of the tensor, as the
/// Python package does it. The metadata of the source are kept.
///
/// Blocks until done. `progress` is told how many more bytes of tensors were written, and
/// ends it by [`ControlFlow::Break`].
///
/// ```
/// use std::ops::ControlFlow;
/// use tensorferry::{ExportOptions, SourceSet, export_safetensors, format::npy};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = tempfile::tempdir()?;
/// let header = npy::encode_header("<f4", false, &[2, 3]);
/// std::fs::write(dir.path().join("w.npy"), [header, vec![7; 24]].concat())?;
///
/// let source = SourceSet::open(&[dir.path()], &Default::default())?;
/// let out = dir.path().join("model.safetensors");
/// let go_on = |_bytes| ControlFlow::Continue(());
/// let report = export_safetensors(&source, &out, &ExportOptions::default(), go_on)?;
/// assert_eq!((report.tensor_count, report.bytes), (1, 24));
///
/// let exported = SourceSet::open(&[out], &Default::default())?;
/// assert_eq!(exported.entries()[0].header, source.entries()[0].header);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Usage`] for tensors that the format cannot express (big-endian elements, types
/// that it has no name for), with their names; [`Error::Store`] when a file exists or cannot
/// be written; [`Error::Damaged`] when bytes do not fit the checksum of the source;
/// [`Error::Source`] when it cannot be read or changed meanwhile; [`Error::Interrupted`].
pub fn export_safetensors(
    source: &SourceSet,
    out: impl AsRef<Path>,
    options: &ExportOptions,
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<ExportReport, Error> {
    let tensors = Tensors::of(source)?;
    let mut pieces = Pieces::new(source, &mut progress);
    let files = safetensors::write(&tensors, out.as_ref(), options, &mut pieces)?;
    Ok(tensors.report(files))
}

/// Writes the tensors of a checkpoint into a `.npz` file, which is a zip archive of `.npy`
/// files that are not compressed. Side files, metadata and further names are left out.
///
/// Types that numpy does not have are called as in a landed folder (`bfloat16` is `<V2`);
/// blocks of quantised elements are an array of bytes. Orders are kept. All else is as in
/// [`export_safetensors`].
///
/// ```
/// use std::ops::ControlFlow;
/// use tensorferry::{ExportOptions, SourceSet, export_npz, format::npy};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let dir = tempfile::tempdir()?;
/// let header = npy::encode_header("<c16", false, &[2]);
/// std::fs::write(dir.path().join("z.npy"), [header, vec![7; 32]].concat())?;
///
/// let source = SourceSet::open(&[dir.path()], &Default::default())?;
/// let out = dir.path().join("model.npz");
/// let go_on = |_bytes| ControlFlow::Continue(());
/// export_npz(&source, &out, &ExportOptions::default(), go_on)?;
/// assert_eq!(SourceSet::open(&[out], &Default::default())?.total_bytes(), 32);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// Those of [`export_safetensors`]; [`Error::Usage`] when shards are asked for.
pub fn export_npz(
    source: &SourceSet,
    out: impl AsRef<Path>,
    options: &ExportOptions,
    mut progress: impl FnMut(u64) -> ControlFlow<()>,
) -> Result<ExportReport, Error> {
    let tensors = Tensors::of(source)?;
    let mut pieces = Pieces::new(source, &mut progress);
    let file = npz::write(&tensors, out.as_ref(), options, &mut pieces)?;
    Ok(tensors.report(vec![file]))
}

/// The tensors of a source, by the numbers of their entries.
struct Tensors<'a> {
    source: &'a SourceSet,
    indices: Vec<usize>,
}

impl<'a> Tensors<'a> {
    fn of(source: &'a SourceSet) -> Result<Self, Error> {
        let entries = source.entries().iter().enumerate();
        let tensors = entries.filter(|(_, entry)| entry.header.dtype().is_some());
        let indices: Vec<usize> = tensors.map(|(index, _)| index).collect();
        if indices.is_empty() {
            let why = "the source has no tensor, so there is nothing to export";
            return Err(Error::Usage(why.to_owned()));
        }
        Ok(Tensors { source, indices })
    }

    fn report(&self, files: Vec<PathBuf>) -> ExportReport {
        let entries = || {
            self.indices
                .iter()
                .map(|&index| &self.source.entries()[index])
        };
        ExportReport {
            files,
            tensor_count: self.indices.len() as u64,
            bytes: entries().map(|entry| entry.header.byte_len).sum(),
            alias_count: entries().map(|entry| entry.aliases.len() as u64).sum(),
        }
    }
}

/// A call of the file system failed.
fn failed(op: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    move |source| {
        let path = path.display().to_string();
        StoreError::Io { op, path, source }.into()
    }
}

#[cfg(test)]
mod tests;
