//! A folder: one checkpoint, in whatever format its files are.

use super::sniff::{self, Kind};
use super::{
    SourceError, builder::Builder, files::OpenFile, gguf, hdf5, keras, landed, npy, npz, onnx,
    safetensors, sharded, tensorflow, torch, torch_distributed,
};
use crate::{fault, plan::EntryHeader};
use sharded::Index;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest side file in bytes.
const MAX_SIDE_LEN: u64 = 64 << 20;

/// Bytes of the file `checkpoint` that are looked at.
const MAX_STATE_LEN: u64 = 1 << 20;

/// A regular file directly in the folder.
struct Listed {
    name: String,
    path: PathBuf,
    /// Reached through a link.
    is_linked: bool,
}

/// Loads a folder.
pub(super) fn load(folder: &Path, builder: &mut Builder) -> Result<(), SourceError> {
    if landed::load(folder, builder)? {
        return Ok(());
    }
    let files = list(folder, builder)?;
    if tensorflow::saved_model::load(folder, builder)? {
        return add_side_files(files.iter(), builder);
    }
    if let Some(index) = latest_tensorflow(folder, &files)? {
        tensorflow::load(&index, &OpenFile::open(&index)?, builder)?;
        return add_side_files(beside_tensorflow(&files)?.into_iter(), builder);
    }
    if torch_distributed::load(folder, builder)? {
        let rest = files.iter().filter(|f| !f.name.ends_with(".distcp"));
        return add_side_files(rest, builder);
    }
    let mut indexes = files.iter().filter(|file| keras::is_index_name(&file.path));
    if let (Some(index), None) = (indexes.next(), indexes.next()) {
        let shards = keras::load_index(&index.path, builder)?;
        let rest = files
            .iter()
            .filter(|f| f.path != index.path && !shards.contains(&f.name));
        return add_side_files(rest, builder);
    }
    match choose_index(folder, &files)? {
        Some((path, index)) => {
            index.load(&path, folder, builder)?;
            let shards = index.shard_names();
            let rest = files
                .iter()
                .filter(|f| f.path != path && !shards.contains(&f.name[..]));
            add_side_files(rest, builder)
        }
        None => load_each(folder, &files, builder),
    }
}

/// Without an index: every file for itself.
fn load_each(folder: &Path, files: &[Listed], builder: &mut Builder) -> Result<(), SourceError> {
    let (mut rest, mut tables) = (Vec::new(), Vec::new());
    let canonical_folder =
        fs::canonicalize(folder).map_err(|error| SourceError::io("resolve", folder, error))?;
    let mut refusal = None;
    let mut has_safetensors = None;
    for listed in files {
        let file = match listed.is_linked {
            true => OpenFile::open(&listed.path)?,
            false => OpenFile::open_in(&canonical_folder, &listed.name)?,
        };
        match sniff::kind(&file)? {
            Kind::Npy => npy::load(&listed.path, &file, builder)?,
            Kind::Safetensors => safetensors::load(&file, builder)?,
            Kind::Gguf => gguf::load(&file, builder)?,
            Kind::Onnx => onnx::load(&listed.path, &file, builder)?,
            Kind::Tensorflow => tables.push(listed),
            Kind::Npz => npz::load(&file, builder)?,
            kind @ (Kind::Torch | Kind::Keras | Kind::Hdf5(_)) => {
                if *has_safetensors.get_or_insert_with(|| any_safetensors(files)) {
                    let why = "the folder has safetensors beside it: name it to take it";
                    builder.skip(&listed.name, why);
                    continue;
                }
                let result = match kind {
                    Kind::Keras => keras::load(&file, builder),
                    Kind::Hdf5(start) => hdf5::load(&file, start, builder),
                    _ => torch::load(&file, builder),
                };
                match result {
                    // Not every pickle is a checkpoint: the state of a trainer is a side file.
                    Err(error @ SourceError::Unsupported { .. }) => {
                        refusal.get_or_insert(error);
                        rest.push(listed);
                    }
                    result => result?,
                }
            }
            Kind::Zip | Kind::Other => {
                sniff::check_extension(&listed.path, &file)?;
                rest.push(listed);
            }
        }
    }
    match tables[..] {
        [] => {}
        [table] => {
            tensorflow::load(&table.path, &OpenFile::open(&table.path)?, builder)?;
            rest.retain(|listed| !tensorflow::is_data_name(&listed.name));
        }
        [first, second, ..] => {
            if tensorflow::shard_prefix(&first.name).is_some() {
                // A checkpoint of version 1, whose shards are tables; reading one says so.
                tensorflow::load(&first.path, &OpenFile::open(&first.path)?, builder)?;
            }
            let why = format!(
                "it holds several TensorFlow checkpoints, {} and {}: name the one to take",
                first.name, second.name
            );
            let path = folder.to_owned();
            return Err(SourceError::Choice { path, why });
        }
    }
    if let (true, Some(refusal)) = (rest.len() == files.len(), refusal) {
        return Err(refusal);
    }
    if rest.len() == files.len() {
        let looked_for = "looked for manifest.json, .metadata, saved_model.pb, checkpoint, *.index.json, *.weights.json";
        let looked_at = match files.len() {
            0 => format!("{looked_for}: no file lies directly in it"),
            1 => format!("{looked_for}, and at the first bytes of its one file: none fits"),
            count => format!("{looked_for}, and at the first bytes of {count} files: none fits"),
        };
        return Err(SourceError::Unknown {
            path: folder.to_owned(),
            looked_at,
        });
    }
    add_side_files(rest.into_iter(), builder)
}

/// The checkpoint that a folder of TensorFlow checkpoints names as its latest.
fn latest_tensorflow(folder: &Path, files: &[Listed]) -> Result<Option<PathBuf>, SourceError> {
    let Some(state) = files.iter().find(|listed| listed.name == "checkpoint") else {
        return Ok(None);
    };
    let text = OpenFile::open(&state.path)?.prefix(MAX_STATE_LEN)?;
    tensorflow::state::latest_index(folder, &String::from_utf8_lossy(&text))
}

/// The files of a folder that belong to none of its TensorFlow checkpoints.
fn beside_tensorflow(files: &[Listed]) -> Result<Vec<&Listed>, SourceError> {
    let mut beside = Vec::new();
    for listed in files {
        let is_part = listed.name == "checkpoint"
            || tensorflow::is_data_name(&listed.name)
            || tensorflow::is_index(&OpenFile::open(&listed.path)?)?;
        if !is_part {
            beside.push(listed);
        }
    }
    Ok(beside)
}

/// Folders of models often hold the same tensors in two formats.
fn any_safetensors(files: &[Listed]) -> bool {
    files.iter().any(|listed| {
        let kind = OpenFile::open(&listed.path).and_then(|file| sniff::kind(&file));
        kind.is_ok_and(|kind| kind == Kind::Safetensors)
    })
}

/// The index whose shards are meant, if there is one.
fn choose_index(folder: &Path, files: &[Listed]) -> Result<Option<(PathBuf, Index)>, SourceError> {
    let mut found = Vec::new();
    for listed in files.iter().filter(|f| sharded::is_index_name(&f.path)) {
        if let Some(index) = Index::read(&listed.path)? {
            found.push((listed.path.clone(), index));
        }
    }
    if found.len() > 1 {
        let kinds: HashMap<PathBuf, Kind> = (found.iter())
            .filter_map(|(path, index)| Some((path.clone(), index.kind(folder)?)))
            .collect();
        // With none present, the first one says which shard is missing.
        if !kinds.is_empty() {
            found.retain(|(path, _)| kinds.contains_key(path));
            // The same tensors in two formats.
            if kinds.values().any(|&kind| kind == Kind::Safetensors) {
                found.retain(|(path, _)| kinds.get(path) == Some(&Kind::Safetensors));
            }
            if let [(first, _), (second, _), ..] = &found[..] {
                let name = |path: &Path| {
                    path.file_name()
                        .unwrap_or_default()
                        .to_string_lossy()
                        .into_owned()
                };
                let why = format!(
                    "it holds two indexes, {} and {}: name the one to take",
                    name(first),
                    name(second)
                );
                return Err(SourceError::malformed(folder, why));
            }
        }
    }
    Ok(found.into_iter().next())
}

fn add_side_files<'a>(
    files: impl Iterator<Item = &'a Listed>,
    builder: &mut Builder,
) -> Result<(), SourceError> {
    if !builder.include_files {
        return Ok(());
    }
    for listed in files {
        let metadata = fs::metadata(&listed.path)
            .map_err(|error| SourceError::io("stat", &listed.path, error))?;
        if metadata.len() > MAX_SIDE_LEN {
            let reason = format!(
                "side file of {} bytes, longer than the limit of {MAX_SIDE_LEN}",
                metadata.len()
            );
            builder.skip(&listed.name, reason);
        } else if let Err(error) = EntryHeader::blob(&listed.name, 0) {
            builder.skip(&listed.name, error.to_string());
        } else {
            builder.add_blob(&listed.name, &listed.path)?;
        }
    }
    Ok(())
}

/// Regular files directly in a folder that are not hidden, also behind links,
/// sorted by name.
fn list(folder: &Path, builder: &mut Builder) -> Result<Vec<Listed>, SourceError> {
    let read_error = |error| SourceError::io("list", folder, error);
    let mut files = Vec::new();
    for item in fault::call("source_list", || fs::read_dir(folder)).map_err(read_error)? {
        let item = item.map_err(read_error)?;
        let (name, path) = (item.file_name(), item.path());
        let shown = name.to_string_lossy();
        if shown.starts_with('.') {
            continue;
        }
        // The folder itself says what is a plain file; only the rest is looked at.
        let is_linked = !item.file_type().is_ok_and(|file_type| file_type.is_file());
        let file_type = match is_linked {
            true => fs::metadata(&path).map(|metadata| metadata.file_type()),
            false => item.file_type(),
        };
        let reason = match file_type {
            Ok(file_type) if file_type.is_dir() => continue,
            Ok(file_type) if !file_type.is_file() => "it is not a regular file".to_owned(),
            Ok(_) => match name.to_str() {
                Some(name) => {
                    files.push(Listed {
                        name: name.to_owned(),
                        path,
                        is_linked,
                    });
                    continue;
                }
                None => "its name is not utf-8".to_owned(),
            },
            Err(error) => format!("cannot stat it: {error}"),
        };
        if builder.include_files {
            builder.skip(shown, reason);
        }
    }
    files.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(files)
}
