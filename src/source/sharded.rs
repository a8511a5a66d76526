//! safetensors or PyTorch in several files, with an index that says which tensor is where.

use super::sniff::{self, Kind};
use super::{SourceError, builder::Builder, files::OpenFile, safetensors, torch};
use crate::plan::clip;
use serde::Deserialize;
use std::collections::{BTreeMap, HashSet};
use std::io;
use std::path::Path;

/// Longest index in bytes.
const MAX_INDEX_LEN: u64 = 64 << 20;

/// Which file holds which tensor.
#[derive(Debug)]
pub(super) struct Index {
    file_by_tensor: BTreeMap<String, String>,
}

#[derive(Deserialize)]
struct RawIndex {
    weight_map: Option<BTreeMap<String, String>>,
}

impl Index {
    /// Reads an index; `None` when it is JSON of another kind.
    pub(super) fn read(path: &Path) -> Result<Option<Index>, SourceError> {
        let file = OpenFile::open(path)?;
        if file.byte_len() > MAX_INDEX_LEN {
            let why = format!(
                "an index of {} bytes is longer than the limit of {MAX_INDEX_LEN}",
                file.byte_len()
            );
            return Err(SourceError::malformed(path, why));
        }
        let raw: RawIndex = serde_json::from_slice(&file.prefix(MAX_INDEX_LEN)?)
            .map_err(|error| SourceError::malformed(path, format!("bad index: {error}")))?;
        let Some(file_by_tensor) = raw.weight_map else {
            return Ok(None);
        };
        if let Some(bad) = file_by_tensor.values().find(|name| !is_base_name(name)) {
            let why = format!("shard {:?} is not a plain file name", clip(bad));
            return Err(SourceError::malformed(path, why));
        }
        Ok(Some(Index { file_by_tensor }))
    }

    /// The tensors of every shard, by file name.
    fn shards(&self) -> BTreeMap<&str, HashSet<&str>> {
        let mut shards = BTreeMap::<&str, HashSet<&str>>::new();
        for (tensor, file) in &self.file_by_tensor {
            shards.entry(file).or_default().insert(tensor);
        }
        shards
    }

    /// Names of the shards.
    pub(super) fn shard_names(&self) -> HashSet<&str> {
        self.file_by_tensor.values().map(String::as_str).collect()
    }

    /// The kind of the first shard that is there. Folders often hold the index of a
    /// variant whose shards were not downloaded.
    pub(super) fn kind(&self, folder: &Path) -> Option<Kind> {
        self.shard_names().iter().find_map(|name| {
            let file = OpenFile::open(&folder.join(name)).ok()?;
            let kind = sniff::kind(&file).ok()?;
            matches!(kind, Kind::Safetensors | Kind::Torch).then_some(kind)
        })
    }

    /// Adds the tensors of all shards, which must hold what the index says.
    pub(super) fn load(
        &self,
        path: &Path,
        folder: &Path,
        builder: &mut Builder,
    ) -> Result<(), SourceError> {
        for (shard, mut missing) in self.shards() {
            let shard_path = folder.join(shard);
            let file = OpenFile::open(&shard_path).map_err(|error| match error {
                SourceError::NotFound { .. } => {
                    SourceError::malformed(path, format!("shard {shard:?} does not exist"))
                }
                error => error,
            })?;
            let wanted = |builder: &mut Builder, name: &str| {
                let wanted = missing.remove(name);
                if !wanted {
                    builder.skip(name, format!("the index does not list it in {shard}"));
                }
                wanted
            };
            match sniff::kind(&file)? {
                Kind::Safetensors => safetensors::load_some(&file, builder, wanted)?,
                Kind::Torch => torch::load_some(&file, builder, wanted)?,
                _ => {
                    sniff::check_extension(&shard_path, &file)?;
                    let why = format!(
                        "shard of {}: it is neither safetensors nor of torch.save",
                        path.display()
                    );
                    return Err(SourceError::unsupported(&shard_path, shard, why));
                }
            }
            if let Some(name) = missing.iter().min() {
                let why = format!(
                    "shard {shard:?} lacks {:?} and {} more tensors",
                    clip(name),
                    missing.len() - 1
                );
                return Err(SourceError::malformed(path, why));
            }
        }
        if self.file_by_tensor.is_empty() {
            builder.add_format("safetensors");
        }
        Ok(())
    }
}

/// Loads the shards of an index that was named by the user, without side files.
pub(super) fn load_index(path: &Path, builder: &mut Builder) -> Result<(), SourceError> {
    let index = Index::read(path)?
        .ok_or_else(|| SourceError::malformed(path, "bad index: it has no weight_map"))?;
    // The folder of the name, not of what a link leads to: shards are beside it.
    let folder = path.parent().ok_or_else(|| {
        SourceError::io("open", path, io::Error::from(io::ErrorKind::InvalidInput))
    })?;
    index.load(path, folder, builder)
}

/// Whether a file is named like an index.
pub(super) fn is_index_name(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().ends_with(".index.json"))
}

/// Whether a name is that of a file in the folder that it stands in.
pub(super) fn is_base_name(name: &str) -> bool {
    !matches!(name, "" | "." | "..") && !name.contains(['/', '\\', '\0'])
}
