//! A folder that this program has written: `manifest.json` says what is where.

use super::{SourceError, builder::Builder, files::OpenFile, npy};
use crate::format::{Dtype, npy::MAGIC};
use crate::plan::{EntryHeader, EntryKind, Order, clip};
use serde::Deserialize;
use serde_json::Value;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Component, Path, PathBuf};

/// Longest manifest in bytes: 1 KiB for each of the most entries.
const MAX_MANIFEST_LEN: u64 = 1 << 30;
/// Bytes that stand for the header of a container other than `.npy`.
const OTHER_HEADER_LEN: u64 = 4096;

#[derive(Deserialize)]
struct Probe {
    format: Option<Value>,
    version: Option<Value>,
}

#[derive(Deserialize)]
struct Manifest {
    source: Option<Source>,
    tensors: Vec<Tensor>,
    #[serde(default)]
    files: Vec<Blob>,
}

#[derive(Deserialize)]
struct Source {
    metadata: Option<BTreeMap<String, Value>>,
}

#[derive(Deserialize)]
struct Tensor {
    index: u64,
    name: String,
    source_name: Option<String>,
    #[serde(default)]
    aliases: Vec<String>,
    file: String,
    dtype: String,
    npy_descr: String,
    shape: Vec<u64>,
    fortran_order: bool,
    data_offset: u64,
    nbytes: u64,
    crc32c: Option<String>,
    trainable: Option<bool>,
}

#[derive(Deserialize)]
struct Blob {
    name: String,
    file: String,
    nbytes: u64,
    crc32c: Option<String>,
}

/// Loads a folder, or says `false` when no manifest of ours is in it.
pub(super) fn load(folder: &Path, builder: &mut Builder) -> Result<bool, SourceError> {
    let path = folder.join("manifest.json");
    if !fs::metadata(&path).is_ok_and(|metadata| metadata.is_file()) {
        return Ok(false);
    }
    let file = OpenFile::open(&path)?;
    if file.byte_len() > MAX_MANIFEST_LEN {
        let why = format!("{} bytes are more than {MAX_MANIFEST_LEN}", file.byte_len());
        return Err(SourceError::malformed(&path, why));
    }
    let json = file.prefix(MAX_MANIFEST_LEN)?;
    let is_text = |value: &Option<Value>, text| value.as_ref().is_some_and(|v| *v == text);
    // A manifest that cannot be read may be ours and damaged: without it names and
    // types would silently be others. Any other readable one is a side file.
    if let Err(error) = serde_json::from_slice::<serde::de::IgnoredAny>(&json) {
        return Err(SourceError::malformed(
            &path,
            format!("it is not JSON: {error}"),
        ));
    }
    let Ok(probe) = serde_json::from_slice::<Probe>(&json) else {
        return Ok(false);
    };
    if !is_text(&probe.format, "tensorferry") {
        return Ok(false);
    }
    if let Some(version) = probe.version.filter(|version| *version != 1) {
        let why = format!("version {version} of the manifest is not known, only 1");
        return Err(SourceError::unsupported(&path, "manifest.json", why));
    }
    let manifest: Manifest = serde_json::from_slice(&json)
        .map_err(|error| SourceError::malformed(&path, format!("bad manifest: {error}")))?;
    let root =
        fs::canonicalize(folder).map_err(|error| SourceError::io("resolve", folder, error))?;
    let mut reader = Reader {
        manifest: &path,
        root,
        index_by_file: HashMap::new(),
        builder,
    };
    reader.load(manifest)?;
    Ok(true)
}

struct Reader<'a> {
    manifest: &'a Path,
    root: PathBuf,
    index_by_file: HashMap<String, u32>,
    builder: &'a mut Builder,
}

impl Reader<'_> {
    fn load(&mut self, mut manifest: Manifest) -> Result<(), SourceError> {
        manifest.tensors.sort_by_key(|tensor| tensor.index);
        for tensor in manifest.tensors {
            self.add_tensor(tensor)?;
        }
        if self.builder.include_files {
            for blob in manifest.files {
                self.add_blob(blob)?;
            }
        }
        let texts = manifest
            .source
            .and_then(|source| source.metadata)
            .unwrap_or_default();
        let texts = texts.into_iter().filter_map(|(key, value)| match value {
            Value::String(text) => Some((key, text)),
            _ => None,
        });
        self.builder.add_metadata(texts.collect());
        self.builder.add_format("tensorferry");
        Ok(())
    }

    fn add_tensor(&mut self, tensor: Tensor) -> Result<(), SourceError> {
        let Some(dtype) = Dtype::from_name(&tensor.dtype) else {
            let why = format!("element type {:?} is not known", clip(&tensor.dtype));
            return Err(SourceError::unsupported(self.manifest, &tensor.name, why));
        };
        let big_endian = tensor.npy_descr.starts_with('>');
        if tensor.npy_descr != dtype.npy_descr(big_endian) && tensor.npy_descr != dtype.name() {
            return Err(self.malformed(
                &tensor.name,
                format!(
                    "npy_descr {:?} does not fit {dtype}",
                    clip(&tensor.npy_descr)
                ),
            ));
        }
        let crc32c = self.crc(&tensor.name, tensor.crc32c.as_deref())?;
        let index = match self.index_by_file.get(&tensor.file) {
            Some(&index) => index,
            None => self.open_tensor_file(&tensor, dtype)?,
        };
        let header = EntryHeader {
            name: tensor.name,
            kind: EntryKind::Tensor { dtype },
            shape: tensor.shape,
            order: if tensor.fortran_order {
                Order::Fortran
            } else {
                Order::C
            },
            big_endian,
            byte_len: tensor.nbytes,
        };
        let entry = self.builder.add(header, index, tensor.data_offset)?;
        entry.source_name = tensor.source_name;
        entry.aliases = tensor.aliases;
        entry.trainable = tensor.trainable;
        entry.crc32c = crc32c;
        Ok(())
    }

    fn open_tensor_file(&mut self, tensor: &Tensor, dtype: Dtype) -> Result<u32, SourceError> {
        let file = self.open(&tensor.name, &tensor.file)?;
        let is_npy = tensor.file.ends_with(".npy") || file.prefix(MAGIC.len() as u64)? == MAGIC;
        let bytes = if is_npy {
            // A file that was overwritten since must not pass for the tensor.
            let (header, bytes) = npy::read_header(&file)?;
            let packed_shape = [tensor.nbytes];
            let shape = if dtype.is_packed() {
                &packed_shape[..]
            } else {
                &tensor.shape[..]
            };
            let same = header.descr == tensor.npy_descr
                && header.fortran_order == tensor.fortran_order
                && header.shape == shape
                && header.data_offset == tensor.data_offset;
            if !same {
                let why = format!("the header of {:?} says otherwise", clip(&tensor.file));
                return Err(self.malformed(&tensor.name, why));
            }
            bytes
        } else {
            file.prefix(OTHER_HEADER_LEN)?
        };
        let index = self.builder.files.add(&file, &bytes)?;
        self.index_by_file.insert(tensor.file.clone(), index);
        Ok(index)
    }

    fn add_blob(&mut self, blob: Blob) -> Result<(), SourceError> {
        let crc32c = self.crc(&blob.name, blob.crc32c.as_deref())?;
        let file = self.open(&blob.name, &blob.file)?;
        if file.byte_len() != blob.nbytes {
            let why = format!(
                "the file has {} bytes, not {}",
                file.byte_len(),
                blob.nbytes
            );
            return Err(self.malformed(&blob.name, why));
        }
        let index = self.builder.files.add(&file, &[])?;
        let header = EntryHeader::blob(blob.name, blob.nbytes)?;
        self.builder.add(header, index, 0)?.crc32c = crc32c;
        Ok(())
    }

    /// Opens a file beneath the folder, and only there.
    fn open(&self, name: &str, file: &str) -> Result<OpenFile, SourceError> {
        let relative = Path::new(file);
        let plain = relative
            .components()
            .all(|part| matches!(part, Component::Normal(_)));
        let outside = || {
            self.malformed(
                name,
                format!("file {:?} is not beneath the folder", clip(file)),
            )
        };
        if file.is_empty() || !plain || file.contains('\0') {
            return Err(outside());
        }
        // What lies directly in the folder can only be led elsewhere by being a link.
        let opened = match relative.components().count() {
            1 => OpenFile::open_in(&self.root, file),
            _ => OpenFile::open(&self.root.join(relative)),
        };
        let opened = opened.map_err(|error| match error {
            SourceError::NotFound { .. } => {
                self.malformed(name, format!("file {:?} does not exist", clip(file)))
            }
            error => error,
        })?;
        // A link may still have led elsewhere.
        if opened.path().starts_with(&self.root) {
            Ok(opened)
        } else {
            Err(outside())
        }
    }

    fn crc(&self, name: &str, hex: Option<&str>) -> Result<Option<u32>, SourceError> {
        let Some(hex) = hex else { return Ok(None) };
        // from_str_radix alone takes a sign and fewer digits.
        let plain = hex.len() == 8 && hex.bytes().all(|b| b.is_ascii_hexdigit());
        match u32::from_str_radix(hex, 16) {
            Ok(crc) if plain => Ok(Some(crc)),
            _ => Err(self.malformed(name, format!("crc32c {:?} is not 8 hex digits", clip(hex)))),
        }
    }

    fn malformed(&self, name: &str, why: String) -> SourceError {
        SourceError::malformed(self.manifest, format!("entry {:?}: {why}", clip(name)))
    }
}
