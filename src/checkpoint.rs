//! Landed checkpoints on this machine: opened and mapped, verified, listed,
//! and the unfinished ones discarded.

mod folder;
mod verify;

pub use folder::{discard_folder, list_folder};
pub use verify::{Damage, VerifyReport};

use crate::{
    error::Error,
    format::Dtype,
    source::SourceError,
    store::{Catalog, MANIFEST_FILE, Manifest, ManifestBlob, ManifestTensor, ReadMap, StoreError},
};
use bytemuck::AnyBitPattern;
use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    sync::Arc,
};
use verify::check_header;

/// A folder that this program has landed.
#[derive(Debug)]
pub struct Checkpoint {
    folder: Catalog,
    dir: PathBuf,
    name: String,
    tensors: Vec<Arc<TensorInfo>>,
    files: Vec<FileInfo>,
    index_by_name: HashMap<String, usize>,
}

/// What the manifest says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Unique in the checkpoint.
    pub name: String,
    /// Further names of the same bytes.
    pub aliases: Vec<String>,
    /// Element type.
    pub dtype: Dtype,
    /// Elements per dimension.
    pub shape: Vec<u64>,
    /// The first index varies fastest.
    pub fortran_order: bool,
    /// Elements are big-endian.
    pub big_endian: bool,
    /// The `.npy` file, beneath the folder.
    pub file: String,
    /// Bytes before the first element.
    pub data_offset: u64,
    /// Length of the elements in bytes.
    pub byte_len: u64,
    /// CRC-32C of the elements.
    pub crc32c: u32,
}

/// What the manifest says of one side file.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileInfo {
    /// Name in the source.
    pub name: String,
    /// The file, beneath the folder.
    pub file: String,
    /// Length in bytes.
    pub byte_len: u64,
    /// CRC-32C of the bytes.
    pub crc32c: u32,
}

/// One tensor, mapped. It stays valid when the [`Checkpoint`] is dropped.
///
/// The bytes are those of the file: if another program cuts the file while it is
/// mapped, touching the lost part ends the process, as with every map.
#[derive(Debug)]
pub struct TensorView {
    info: Arc<TensorInfo>,
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
        let tensors = manifest
            .tensors
            .iter()
            .map(|t| tensor_info(t).map(Arc::new));
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let files = manifest
            .files
            .iter()
            .map(file_info)
            .collect::<Result<Vec<_>, _>>()?;
        let sum = tensors
            .iter()
            .map(|t| t.byte_len)
            .chain(files.iter().map(|f| f.byte_len));
        let sum = sum.fold(0, u64::saturating_add);
        if sum != manifest.total_nbytes {
            let why = format!(
                "total_nbytes is {}, its entries have {sum}",
                manifest.total_nbytes
            );
            return Err(damaged(MANIFEST_FILE, why));
        }
        let mut index_by_name: HashMap<_, _> = tensors
            .iter()
            .enumerate()
            .map(|(i, t)| (t.name.clone(), i))
            .collect();
        for (index, tensor) in tensors.iter().enumerate() {
            for alias in &tensor.aliases {
                // A tensor of its own beats the further name of another.
                index_by_name.entry(alias.clone()).or_insert(index);
            }
        }
        Ok(Checkpoint {
            folder,
            dir: dir.to_owned(),
            name: manifest.checkpoint,
            tensors,
            files,
            index_by_name,
        })
    }

    /// The folder, as it was given.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The name it was published under.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its tensors, in the order of their announcement.
    pub fn tensors(&self) -> impl ExactSizeIterator<Item = &TensorInfo> {
        self.tensors.iter().map(Arc::as_ref)
    }

    /// Its side files.
    pub fn files(&self) -> &[FileInfo] {
        &self.files
    }

    /// Bytes of all tensors and side files.
    pub fn total_bytes(&self) -> u64 {
        let tensors = self.tensors.iter().map(|t| t.byte_len);
        tensors.chain(self.files.iter().map(|f| f.byte_len)).sum()
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
            .and_then(|&index| self.tensors.get(index))
        else {
            return Ok(None);
        };
        let file = match self.open_file(&info.file, info.data_offset + info.byte_len)? {
            Ok(file) => file,
            Err(why) => return Err(damaged(&info.name, why)),
        };
        check_header(info, &file).map_err(|why| damaged(&info.name, why))?;
        let map = ReadMap::new(&file).map_err(|source| StoreError::Io {
            op: "map",
            path: self.folder.root().shown(&info.file),
            source,
        })?;
        let info = Arc::clone(info);
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
        let at = usize::try_from(self.info.data_offset).unwrap_or(usize::MAX);
        self.map.get(at..).unwrap_or_default()
    }

    /// The elements as values, in the order of the file.
    ///
    /// # Errors
    /// [`Error::Usage`] when `T` is not as wide as an element, or the elements are
    /// packed or not in the byte order of this machine.
    pub fn as_slice<T: AnyBitPattern>(&self) -> Result<&[T], Error> {
        let info = &*self.info;
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

fn tensor_info(tensor: &ManifestTensor) -> Result<TensorInfo, Error> {
    let bad = |why: String| damaged(&tensor.name, format!("{MANIFEST_FILE}: {why}"));
    let dtype = Dtype::from_name(&tensor.dtype)
        .ok_or_else(|| bad(format!("dtype {:?} is not known", tensor.dtype)))?;
    let byte_len = dtype.byte_len(&tensor.shape);
    if byte_len != Some(tensor.nbytes) {
        let expected = byte_len.map_or("more than 64 bits can count".to_owned(), |n| n.to_string());
        let shape = &tensor.shape;
        return Err(bad(format!(
            "nbytes of shape {shape:?} of {dtype} is {}, not {expected}",
            tensor.nbytes
        )));
    }
    if tensor.data_offset.checked_add(tensor.nbytes).is_none() {
        return Err(bad(format!(
            "data_offset {} is out of range",
            tensor.data_offset
        )));
    }
    let big_endian = tensor.npy_descr.starts_with('>');
    let descr = dtype.npy_descr(big_endian);
    if tensor.npy_descr != descr {
        return Err(bad(format!(
            "npy_descr of {dtype} is {:?}, not {descr:?}",
            tensor.npy_descr
        )));
    }
    Ok(TensorInfo {
        name: tensor.name.clone(),
        aliases: tensor.aliases.clone(),
        dtype,
        shape: tensor.shape.clone(),
        fortran_order: tensor.fortran_order,
        big_endian,
        file: tensor.file.clone(),
        data_offset: tensor.data_offset,
        byte_len: tensor.nbytes,
        crc32c: parse_crc(&tensor.crc32c)
            .ok_or_else(|| bad(format!("crc32c {:?} is not 8 hex digits", tensor.crc32c)))?,
    })
}

fn file_info(blob: &ManifestBlob) -> Result<FileInfo, Error> {
    let bad = || {
        damaged(
            &blob.name,
            format!(
                "{MANIFEST_FILE}: crc32c {:?} is not 8 hex digits",
                blob.crc32c
            ),
        )
    };
    Ok(FileInfo {
        name: blob.name.clone(),
        file: blob.file.clone(),
        byte_len: blob.nbytes,
        crc32c: parse_crc(&blob.crc32c).ok_or_else(bad)?,
    })
}

fn parse_crc(hex: &str) -> Option<u32> {
    // from_str_radix alone takes a sign and fewer digits.
    let plain = hex.len() == 8 && hex.bytes().all(|b| b.is_ascii_hexdigit());
    plain.then(|| u32::from_str_radix(hex, 16).ok()).flatten()
}

#[cfg(test)]
mod tests;
