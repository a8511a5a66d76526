//! `.safetensors` files of a checkpoint, and the index of shards.

use super::{ExportOptions, Tensors, failed, outputs, outputs::Outputs, pieces::Pieces};
use crate::{
    error::Error,
    fault,
    format::safetensors::{EncodeError, Encoded, TensorSpec, encode_header, name_of},
    plan::{Order, clip},
    source::SourceEntry,
};
use serde::Serialize;
use std::{
    collections::{BTreeMap, HashSet},
    ffi::{OsStr, OsString},
    io::Write,
    path::{Path, PathBuf},
};

/// Ending of the files.
const ENDING: &str = ".safetensors";
/// Tensors that a refusal names.
const MAX_NAMED_COUNT: usize = 10;

/// One file.
struct Shard {
    name: OsString,
    /// Numbers of the entries.
    indices: Vec<usize>,
    encoded: Encoded,
}

/// See [`super::export_safetensors`].
pub(super) fn write(
    tensors: &Tensors<'_>,
    out: &Path,
    options: &ExportOptions,
    pieces: &mut Pieces<'_>,
) -> Result<Vec<PathBuf>, Error> {
    let (dir, name) = outputs::split(out)?;
    check_expressible(tensors)?;
    let shards = shards(tensors, &name, options.max_shard_bytes)?;
    let index = match &shards[..] {
        [_] => None,
        shards => Some((
            with_ending(&name, ".index.json"),
            index_json(tensors, shards),
        )),
    };
    let mut names: Vec<&OsStr> = shards.iter().map(|shard| shard.name.as_os_str()).collect();
    names.extend(index.iter().map(|(name, _)| name.as_os_str()));
    let mut outputs = Outputs::begin(&dir, &names, options.overwrite, tensors.source)?;
    for shard in &shards {
        write_shard(shard, &mut outputs, pieces)?;
    }
    if let Some((name, json)) = &index {
        let mut file = outputs.create(name, 0)?;
        fault::call("export_write", || file.write_all(json))
            .map_err(failed("write", &outputs.path(name)))?;
        outputs.keep(name, &file)?;
    }
    pieces.check_unchanged()?;
    outputs.publish()
}

fn write_shard(shard: &Shard, outputs: &mut Outputs, pieces: &mut Pieces<'_>) -> Result<(), Error> {
    let shown = outputs.path(&shard.name);
    let mut file = outputs.create(&shard.name, shard.encoded.file_len)?;
    let mut write = |bytes: &[u8]| {
        fault::call("export_write", || file.write_all(bytes)).map_err(failed("write", &shown))
    };
    write(&shard.encoded.header)?;
    for &at in &shard.encoded.order {
        pieces.copy_in_c_order(shard.indices[at], &mut write)?;
    }
    outputs.keep(&shard.name, &file)
}

/// Refuses what the format cannot say, all at once.
fn check_expressible(tensors: &Tensors<'_>) -> Result<(), Error> {
    let entries = tensors
        .indices
        .iter()
        .map(|&index| &tensors.source.entries()[index]);
    let mut refused = entries.filter_map(|entry| Some((entry, reason(entry)?)));
    let named: Vec<String> = (refused.by_ref().take(MAX_NAMED_COUNT))
        .map(|(entry, reason)| format!("{:?} ({reason})", clip(&entry.header.name)))
        .collect();
    if named.is_empty() {
        return Ok(());
    }
    let more = match refused.count() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Err(Error::Usage(format!(
        "safetensors cannot express {}{more}: export to .npz, or select other tensors",
        named.join(", ")
    )))
}

/// Why a tensor cannot be written.
fn reason(entry: &SourceEntry) -> Option<String> {
    let header = &entry.header;
    let dtype = header.dtype()?;
    if name_of(dtype).is_none() {
        return Some(dtype.name().to_owned());
    }
    if header.big_endian {
        return Some("big-endian".to_owned());
    }
    if dtype.is_packed() && header.order == Order::Fortran {
        return Some(format!("{dtype} in Fortran order"));
    }
    None
}

/// Cuts the tensors, in the order of the source, into files.
fn shards(
    tensors: &Tensors<'_>,
    name: &OsStr,
    max_shard_bytes: Option<u64>,
) -> Result<Vec<Shard>, Error> {
    let entries = tensors.source.entries();
    let mut groups: Vec<Vec<usize>> = vec![Vec::new()];
    if max_shard_bytes == Some(0) {
        return Err(Error::Usage(
            "a shard of at most 0 bytes holds nothing".to_owned(),
        ));
    }
    let mut group_bytes = 0u64;
    for &index in &tensors.indices {
        let byte_len = entries[index].header.byte_len;
        let is_full = max_shard_bytes
            .is_some_and(|most| group_bytes > 0 && group_bytes.saturating_add(byte_len) > most);
        if is_full {
            groups.push(Vec::new());
            group_bytes = 0;
        }
        group_bytes = group_bytes.saturating_add(byte_len);
        if let Some(last) = groups.last_mut() {
            last.push(index);
        }
    }
    let tensor_names: HashSet<&str> = (tensors.indices.iter())
        .map(|&index| entries[index].header.name.as_str())
        .collect();
    let shard_count = groups.len();
    if shard_count > 1 && name.to_str().is_none() {
        // The index is JSON.
        let why = format!("{}: shards need a name in UTF-8", name.display());
        return Err(Error::Usage(why));
    }
    let named = groups.into_iter().enumerate().map(|(at, indices)| {
        let name = match shard_count {
            1 => name.to_owned(),
            _ => shard_name(name, at + 1, shard_count),
        };
        let mut metadata = tensors.source.metadata().clone();
        for &index in &indices {
            for alias in &entries[index].aliases {
                // A tensor of its own beats the further name of another.
                if !tensor_names.contains(alias.as_str()) {
                    let kept = entries[index].header.name.clone();
                    metadata.entry(alias.clone()).or_insert(kept);
                }
            }
        }
        let specs: Vec<TensorSpec<'_>> = (indices.iter())
            .filter_map(|&index| {
                let header = &entries[index].header;
                Some(TensorSpec {
                    name: &header.name,
                    dtype: header.dtype()?,
                    shape: &header.shape,
                })
            })
            .collect();
        let encoded = encode_header(&specs, &metadata)
            .map_err(|error: EncodeError| Error::Usage(error.to_string()))?;
        Ok(Shard {
            name,
            indices,
            encoded,
        })
    });
    named.collect()
}

/// `model.safetensors` becomes `model-00001-of-00002.safetensors`.
fn shard_name(name: &OsStr, number: usize, shard_count: usize) -> OsString {
    let name = name.to_string_lossy();
    let stem = name.strip_suffix(ENDING).unwrap_or(&name);
    format!("{stem}-{number:05}-of-{shard_count:05}{ENDING}").into()
}

fn with_ending(name: &OsStr, ending: &str) -> OsString {
    let mut name = name.to_owned();
    name.push(ending);
    name
}

#[derive(Serialize)]
struct Index<'a> {
    metadata: IndexMetadata,
    weight_map: BTreeMap<&'a str, &'a str>,
}

#[derive(Serialize)]
struct IndexMetadata {
    total_size: u64,
}

/// Which file holds which tensor, as `transformers` reads it.
fn index_json(tensors: &Tensors<'_>, shards: &[Shard]) -> Vec<u8> {
    let entries = tensors.source.entries();
    let header = |index: usize| &entries[index].header;
    let lens = tensors.indices.iter().map(|&index| header(index).byte_len);
    let rows = shards.iter().flat_map(|shard| {
        let file = shard.name.to_str().unwrap_or_default();
        let names = shard.indices.iter();
        names.map(move |&index| (header(index).name.as_str(), file))
    });
    let index = Index {
        metadata: IndexMetadata {
            total_size: lens.sum(),
        },
        weight_map: rows.collect(),
    };
    // Texts and numbers cannot fail.
    let mut json = serde_json::to_vec_pretty(&index).unwrap_or_default();
    json.push(b'\n');
    json
}
