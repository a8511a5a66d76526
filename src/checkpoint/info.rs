//! What a manifest says: the same of a folder here and of a checkpoint on a server.

use super::damaged;
use crate::{
    error::Error,
    format::Dtype,
    protocol::{CONTAINER_FILE, Durability},
    store::{MANIFEST_FILE, Manifest, ManifestBlob, ManifestTensor},
};
use std::collections::BTreeMap;

/// What the manifest says of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckpointInfo {
    /// The name it was published under.
    pub name: String,
    /// When it was published, RFC 3339 in UTC.
    pub created: String,
    /// Format of the source, such as `safetensors`.
    pub source_format: String,
    /// Free text of the source.
    pub metadata: BTreeMap<String, String>,
    /// What could not be lost any more when it was published, and to what.
    pub durability: Durability,
    /// Tensors in the order of their announcement.
    pub tensors: Vec<TensorInfo>,
    /// Side files.
    pub files: Vec<FileInfo>,
    /// Bytes of all tensors and side files.
    pub total_bytes: u64,
}

/// What the manifest says of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct TensorInfo {
    /// Unique in the checkpoint.
    pub name: String,
    /// Name in the source when that is another.
    pub source_name: Option<String>,
    /// Further names of the same bytes.
    pub aliases: Vec<String>,
    /// Whether the tensor is trainable, where the source said so.
    pub trainable: Option<bool>,
    /// Element type.
    pub dtype: Dtype,
    /// Elements per dimension.
    pub shape: Vec<u64>,
    /// The first index varies fastest.
    pub fortran_order: bool,
    /// Elements are big-endian.
    pub big_endian: bool,
    /// The file, beneath the folder: a `.npy` of its own, or a `.safetensors` for all.
    pub file: String,
    /// `descr` of a `.npy` header.
    pub npy_descr: String,
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

impl CheckpointInfo {
    /// Reads a `manifest.json`, such as the answer of
    /// [`Client::describe`](crate::Client::describe).
    ///
    /// # Errors
    /// [`Error::Damaged`] when it is none, or contradicts itself.
    pub fn from_json(json: &[u8]) -> Result<CheckpointInfo, Error> {
        let manifest = Manifest::from_bytes(json).map_err(|why| damaged(MANIFEST_FILE, why))?;
        CheckpointInfo::of(manifest)
    }

    pub(super) fn of(manifest: Manifest) -> Result<CheckpointInfo, Error> {
        let tensors = manifest.tensors.iter().map(tensor_info);
        let tensors = tensors.collect::<Result<Vec<_>, _>>()?;
        let files = manifest.files.iter().map(file_info);
        let files = files.collect::<Result<Vec<_>, _>>()?;
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
        Ok(CheckpointInfo {
            name: manifest.checkpoint,
            created: manifest.created,
            source_format: manifest.source.format,
            metadata: manifest.source.metadata,
            durability: match manifest.durability.as_str() {
                "disk" => Durability::Disk,
                _ => Durability::Process,
            },
            tensors,
            files,
            total_bytes: sum,
        })
    }
}

impl TensorInfo {
    /// Other tensors lie in the same file.
    pub(super) fn is_in_container(&self) -> bool {
        self.file == CONTAINER_FILE
    }
}

/// A file beneath the folder, and nothing else. Landing writes neither `\` nor
/// NUL into the name of a file, and elsewhere the first divides folders.
fn is_beneath(file: &str) -> bool {
    let is_plain = |part: &str| !matches!(part, "" | "." | "..") && !part.contains(['\0', '\\']);
    file.split('/').all(is_plain)
}

fn tensor_info(tensor: &ManifestTensor) -> Result<TensorInfo, Error> {
    let bad = |why: String| damaged(&tensor.name, format!("{MANIFEST_FILE}: {why}"));
    if !is_beneath(&tensor.file) {
        return Err(bad(format!(
            "file {:?} is no plain path in the folder",
            tensor.file
        )));
    }
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
    let is_named = dtype.is_of_ml_dtypes() && tensor.npy_descr == dtype.name();
    if tensor.npy_descr != descr && !is_named {
        return Err(bad(format!(
            "npy_descr of {dtype} is {:?}, not {descr:?}",
            tensor.npy_descr
        )));
    }
    Ok(TensorInfo {
        name: tensor.name.clone(),
        source_name: Some(tensor.source_name.clone())
            .filter(|name| !name.is_empty() && *name != tensor.name),
        aliases: tensor.aliases.clone(),
        trainable: tensor.trainable,
        dtype,
        shape: tensor.shape.clone(),
        fortran_order: tensor.fortran_order,
        big_endian,
        file: tensor.file.clone(),
        npy_descr: tensor.npy_descr.clone(),
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
    if !is_beneath(&blob.file) {
        let why = format!(
            "{MANIFEST_FILE}: file {:?} is no plain path in the folder",
            blob.file
        );
        return Err(damaged(&blob.name, why));
    }
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
mod tests {
    use super::*;

    #[test]
    fn files_of_a_manifest_lie_beneath_its_folder() {
        for fine in ["w.npy", "files/config.json", "..w.npy", "files/..."] {
            assert!(is_beneath(fine), "{fine}");
        }
        for bad in [
            "",
            "/etc/passwd",
            "../w.npy",
            "files/../../w",
            ".",
            "a//b",
            "a/",
            "a\0b",
            "a\\b",
        ] {
            assert!(!is_beneath(bad), "{bad}");
        }
    }
}
