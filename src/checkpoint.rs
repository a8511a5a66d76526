//! Landed checkpoints on this machine: opened and mapped, verified, listed,
//! and the unfinished ones discarded.

mod container;
mod folder;
mod info;
mod verify;

pub use folder::{discard_folder, list_folder, status_folder};
pub(crate) use folder::{landing_place, local_target};
pub use info::{CheckpointInfo, FileInfo, TensorInfo};
pub use verify::{Damage, VerifyReport};

use crate::{
    error::Error,
    map::ReadMap,
    source::SourceError,
    store::{Catalog, MANIFEST_FILE, Manifest, StoreError},
};
use bytemuck::AnyBitPattern;
use container::Container;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::OnceLock,
};

/// A folder that this program has landed.
///
/// ```
/// use tensorferry::Checkpoint;
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temp = tempfile::tempdir()?;
/// # let model = temp.path().join("w.npy");
/// # let header = tensorferry::format::npy::encode_header("|u1", false, &[1 << 20]);
/// # std::fs::write(&model, [header, vec![7; 1 << 20]].concat())?;
/// # let folder = temp.path().join("landed");
/// # let embedded = tensorferry::Embedded::start(&folder, 64 << 20).await?;
/// # let source = tensorferry::SourceSet::open(&[model], &Default::default())?;
/// # embedded.push(source, Default::default())?.await?;
/// # embedded.stop().await?;
/// let checkpoint = Checkpoint::open(&folder)?;
/// for tensor in checkpoint.tensors() {
///     println!("{} {} {:?} in {}", tensor.name, tensor.dtype, tensor.shape, tensor.file);
/// }
/// let w = checkpoint.tensor("w")?.expect("it was pushed");
/// assert!(w.as_slice::<u8>()?.iter().all(|&value| value == 7));
/// assert!(checkpoint.tensor("v")?.is_none());
///
/// let report = checkpoint.verify(|_bytes_read| {})?;
/// assert!(report.damages.is_empty());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Checkpoint {
    folder: Catalog,
    dir: PathBuf,
    info: CheckpointInfo,
    index_by_name: HashMap<String, usize>,
    container: OnceLock<Container>,
}

/// One tensor, mapped. It stays valid when the [`Checkpoint`] is dropped.
///
/// The bytes are those of the file: if another program cuts the file while it is
/// mapped, touching the lost part ends the process, as with every map.
#[derive(Debug)]
pub struct TensorView {
    info: TensorInfo,
    map: ReadMap,
}

impl Checkpoint {
    /// Opens a landed folder by its manifest. Looks at no other file yet.
    ///
    /// # Errors
    /// [`SourceError::NotFound`] when there is no folder or no manifest in it,
    /// [`Error::Damaged`] when the manifest contradicts itself.
    pub fn open(dir: impl AsRef<Path>) -> Result<Checkpoint, Error> {
        let dir = dir.as_ref();
        let folder = open_existing(dir)?;
        let manifest = match Manifest::read(folder.root()) {
            Ok(Some((manifest, _))) => manifest,
            Ok(None) => return Err(not_found(dir.join(MANIFEST_FILE))),
            Err(StoreError::Manifest { why, .. }) => return Err(damaged(MANIFEST_FILE, why)),
            Err(error) => return Err(error.into()),
        };
        let info = CheckpointInfo::of(manifest)?;
        let mut index_by_name: HashMap<_, _> = info
            .tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        for (index, tensor) in info.tensors.iter().enumerate() {
            for alias in &tensor.aliases {
                // A tensor of its own beats the further name of another.
                index_by_name.entry(alias.clone()).or_insert(index);
            }
        }
        Ok(Checkpoint {
            folder,
            dir: dir.to_owned(),
            info,
            index_by_name,
            container: OnceLock::new(),
        })
    }

    /// The folder, as it was given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name it was published under.
    pub fn name(&self) -> &str {
        &self.info.name
    }

    /// All that its manifest says.
    pub fn info(&self) -> &CheckpointInfo {
        &self.info
    }

    /// Its tensors, in the order of their announcement.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.info.tensors.iter()
    }

    /// Its side files.
    pub fn files(&self) -> &[FileInfo] {
        &self.info.files
    }

    /// Bytes of all tensors and side files.
    pub fn total_bytes(&self) -> u64 {
        self.info.total_bytes
    }

    /// Maps a tensor by its name or an alias; `None` when there is none of that
    /// name. Bytes are not verified: that is what [`Checkpoint::verify`] is for.
    ///
    /// # Errors
    /// [`Error::Damaged`] when length or header of the file are not those of the
    /// manifest, [`Error::Store`] when the file cannot be mapped.
    pub fn tensor(&self, name: &str) -> Result<Option<TensorView>, Error> {
        let Some(info) = self
            .index_by_name
            .get(name)
            .and_then(|&index| self.info.tensors.get(index))
        else {
            return Ok(None);
        };
        let file = match self.open_tensor(info)? {
            Ok(file) => file,
            Err(why) => return Err(damaged(&info.name, why)),
        };
        let map = ReadMap::new(&file).map_err(|source| StoreError::Io {
            op: "map",
            path: self.folder.root().shown(&info.file),
            source,
        })?;
        let info = info.clone();
        Ok(Some(TensorView { info, map }))
    }
}

impl TensorView {
    /// What the manifest says of it.
    pub fn info(&self) -> &TensorInfo {
        &self.info
    }

    /// The elements as raw bytes.
    pub fn bytes(&self) -> &[u8] {
        // The map is as long as the manifest promises: checked when it was made.
        let end = self.info.data_offset.saturating_add(self.info.byte_len);
        let range = usize::try_from(self.info.data_offset)
            .ok()
            .zip(usize::try_from(end).ok());
        range
            .and_then(|(at, end)| self.map.get(at..end))
            .unwrap_or_default()
    }

    /// The elements as values, in the order of the file.
    ///
    /// # Errors
    /// [`Error::Usage`] when `T` is not as wide as an element, or the elements are
    /// packed or not in the byte order of this machine.
    pub fn as_slice<T: AnyBitPattern>(&self) -> Result<&[T], Error> {
        let info = &self.info;
        let usage = |why: String| Err(Error::Usage(format!("tensor {:?}: {why}", info.name)));
        if size_of::<T>() as u64 * 8 != info.dtype.bits() {
            return usage(format!(
                "an element of {} has {} bits, the asked-for type has {}",
                info.dtype,
                info.dtype.bits(),
                size_of::<T>() * 8
            ));
        }
        if info.dtype.bits() > 8 && info.big_endian != cfg!(target_endian = "big") {
            return usage("its elements are in the other byte order".to_owned());
        }
        bytemuck::try_cast_slice(self.bytes()).or_else(|why| usage(why.to_string()))
    }
}

/// The folder, which opening would otherwise make.
fn open_existing(dir: &Path) -> Result<Catalog, Error> {
    if !dir.is_dir() {
        return Err(not_found(dir.to_owned()));
    }
    Ok(Catalog::open(dir)?)
}

fn not_found(path: PathBuf) -> Error {
    Error::Source(SourceError::NotFound { path })
}

fn damaged(name: &str, why: impl Into<String>) -> Error {
    Error::Damaged {
        name: name.to_owned(),
        why: why.into(),
    }
}

#[cfg(test)]
mod tests;
