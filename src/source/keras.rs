//! Keras: HDF5 files, alone, in shards or in a `.keras` archive, with names of layers.

use super::hdf5::{self, Adder, Contents};
use super::view::{Refusal, View};
use super::zip::{self, Archive, STORED};
use super::{SourceError, builder::Builder, files::OpenFile, natural, sharded, sniff};
use crate::plan::{EntryHeader, clip};
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::path::Path;

/// Where the weights are in an archive.
const WEIGHTS: &str = "model.weights.h5";
/// Texts of an archive that go along as side files.
const TEXTS: [&str; 2] = ["config.json", "metadata.json"];
/// Longest index in bytes.
const MAX_INDEX_LEN: u64 = 64 << 20;

/// Whether an archive is of this kind.
pub(super) fn is_keras(archive: &Archive) -> bool {
    archive.member(WEIGHTS).is_some()
}

/// Adds all weights of an archive.
pub(super) fn load(file: &OpenFile, builder: &mut Builder) -> Result<(), SourceError> {
    let view = View::file(file);
    let of_file = |refusal: Refusal| refusal.of(file.path());
    let archive = zip::read(view).map_err(of_file)?;
    let directory = file.bytes_at(archive.directory_offset, archive.directory_len)?;
    let index = builder.files.add(file, &directory)?;
    let Some(member) = archive.member(WEIGHTS) else {
        return Err(SourceError::malformed(
            file.path(),
            format!("it has no {WEIGHTS}"),
        ));
    };
    if member.method != STORED {
        let why = "Keras never compresses it: save the model again, or pack it with zip -0";
        return Err(SourceError::unsupported(file.path(), WEIGHTS, why));
    }
    let contents = view
        .part(member.data_offset, member.byte_len)
        .and_then(hdf5::read)
        .map_err(of_file)?;
    add(vec![(contents, Adder::new(index))], builder)?;
    let stem = file
        .path()
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy();
    for text in TEXTS {
        let Some(member) = archive
            .member(text)
            .filter(|member| member.method == STORED)
        else {
            continue;
        };
        if builder.include_files {
            // The folder that the archive is in may have a file of this name.
            let header = EntryHeader::blob(format!("{stem}.{text}"), member.byte_len)?;
            builder.add(header, index, member.data_offset)?;
        }
    }
    builder.add_format("keras");
    Ok(())
}

/// Adds what one HDF5 file or several shards hold, with the names of layers where they are
/// of Keras. Of a group that is spread over shards, one of them knows the name.
pub(super) fn add(
    mut parts: Vec<(Contents, Adder)>,
    builder: &mut Builder,
) -> Result<(), SourceError> {
    let mut names = HashMap::new();
    for (contents, _) in &mut parts {
        names.extend(std::mem::take(&mut contents.names));
    }
    let all = || parts.iter().flat_map(|(contents, _)| &contents.datasets);
    let renamed: Vec<Option<String>> = all()
        .map(|found| layer_name(&found.header.name, &names))
        .collect();
    let is_keras = renamed.iter().any(Option::is_some);
    // Layers of nested models may have the same name.
    let shown: HashSet<&str> = all()
        .zip(&renamed)
        .map(|(found, name)| name.as_deref().unwrap_or(&found.header.name))
        .collect();
    let is_unique = shown.len() == renamed.len();
    let mut renamed = renamed.clone().into_iter();
    let (mut all, mut adders) = (Vec::new(), Vec::new());
    for (contents, adder) in parts {
        let datasets = contents.datasets.into_iter().zip(&mut renamed);
        all.extend(datasets.map(|(found, name)| (adders.len(), found, name)));
        adders.push(adder);
        for (name, reason) in contents.skipped {
            builder.skip(name, reason);
        }
    }
    // Files keep them in the order of the alphabet, where dense_10 comes before dense_2.
    all.sort_by(|(_, a, _), (_, b, _)| natural::order(&a.header.name, &b.header.name));
    for (number, mut found, name) in all {
        let Some(adder) = adders.get(number) else {
            continue;
        };
        let name = name.filter(|_| is_unique);
        let is_optimizer = is_keras && is_of_optimizer(&found.header.name);
        let source_name = name.map(|name| std::mem::replace(&mut found.header.name, name));
        adder.add(found, source_name, is_optimizer, builder)?;
    }
    builder.add_format(if is_keras { "keras" } else { "hdf5" });
    Ok(())
}

/// Whether Keras puts state of its optimizer there: 3, and whole models of 2.
fn is_of_optimizer(path: &str) -> bool {
    path.starts_with("optimizer/") || path.starts_with("optimizer_weights/")
}

/// What a dataset is called, where Keras has put it.
fn layer_name(path: &str, names: &HashMap<String, String>) -> Option<String> {
    // Whole models of Keras 2: model_weights/LAYER/NAME, where NAME has slashes.
    if let Some(rest) = path.strip_prefix("model_weights/") {
        return rest.split_once('/').map(|(_, name)| name.to_owned());
    }
    // LAYERS/CLASS_NUMBER/vars/NUMBER, and the name of the layer at vars.
    let (group, number) = path.rsplit_once('/')?;
    let name = names.get(group)?;
    let holder = group.strip_suffix("/vars")?;
    match holder.rsplit_once('/') {
        Some((outer, _)) => Some(format!("{outer}/{name}/{number}")),
        // The optimizer has a name too, but there is only one.
        None => Some(format!("{holder}/{number}")),
    }
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, Files>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Files {
    One(String),
    Several(Vec<String>),
}

/// Whether a file is named like an index of shards.
pub(super) fn is_index_name(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.to_string_lossy().ends_with(".weights.json"))
}

/// Adds the shards of an index; gives their names.
pub(super) fn load_index(
    path: &Path,
    builder: &mut Builder,
) -> Result<HashSet<String>, SourceError> {
    let file = OpenFile::open(path)?;
    if file.byte_len() > MAX_INDEX_LEN {
        let why = format!(
            "an index of {} bytes is longer than {MAX_INDEX_LEN}",
            file.byte_len()
        );
        return Err(SourceError::malformed(path, why));
    }
    let index: Index = serde_json::from_slice(&file.bytes_at(0, file.byte_len())?)
        .map_err(|error| SourceError::malformed(path, format!("bad index: {error}")))?;
    let mut groups_by_shard = BTreeMap::<String, BTreeSet<String>>::new();
    for (group, files) in index.weight_map {
        let files = match files {
            Files::One(file) => vec![file],
            Files::Several(files) => files,
        };
        for file in files {
            if !sharded::is_base_name(&file) {
                let why = format!("shard {:?} is not a plain file name", clip(&file));
                return Err(SourceError::malformed(path, why));
            }
            groups_by_shard
                .entry(file)
                .or_default()
                .insert(group.clone());
        }
    }
    let folder = path.parent().unwrap_or(Path::new("."));
    let mut parts = Vec::with_capacity(groups_by_shard.len());
    for (shard, groups) in &groups_by_shard {
        let shard_path = folder.join(shard);
        let file = OpenFile::open(&shard_path).map_err(|error| match error {
            SourceError::NotFound { .. } => {
                SourceError::malformed(path, format!("shard {shard:?} does not exist"))
            }
            error => error,
        })?;
        let Some(start) = hdf5::sniff(&file)? else {
            sniff::check_extension(&shard_path, &file)?;
            let why = format!("shard of {}: it is not HDF5", path.display());
            return Err(SourceError::unsupported(&shard_path, shard, why));
        };
        let read = || hdf5::read(View::file(&file).part(start, file.byte_len() - start)?);
        let contents = read().map_err(|refusal| refusal.of(file.path()))?;
        let is_in = |group: &str| {
            let prefix = format!("{}/", group.trim_matches('/'));
            contents
                .datasets
                .iter()
                .any(|found| found.header.name.starts_with(&prefix))
        };
        if let Some(group) = groups.iter().find(|group| !is_in(group)) {
            let why = format!("shard {shard:?} has nothing of {:?}", clip(group));
            return Err(SourceError::malformed(path, why));
        }
        let index = builder.files.add(&file, &[])?;
        parts.push((contents, Adder::new(index)));
    }
    add(parts, builder)?;
    Ok(groups_by_shard.into_keys().collect())
}
