//! A folder: one checkpoint, in whatever format its files are.

use super::sniff::{self, Kind};
use super::{SourceError, builder::Builder, files::OpenFile, landed, npy, safetensors, sharded};
use crate::{fault, plan::EntryHeader};
use sharded::Index;
use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// Longest side file in bytes.
const MAX_SIDE_LEN: u64 = 64 << 20;

/// A regular file directly in the folder.
struct Listed {
    name: String,
    path: PathBuf,
}

/// Loads a folder.
pub(super) fn load(folder: &Path, builder: &mut Builder) -> Result<(), SourceError> {
    if landed::load(folder, builder)? {
        return Ok(());
    }
    let files = list(folder, builder)?;
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
    let mut rest = Vec::new();
    for listed in files {
        let file = OpenFile::open(&listed.path)?;
        match sniff::kind(&file)? {
            Kind::Npy => npy::load(&listed.path, &file, builder)?,
            Kind::Safetensors => safetensors::load(&file, builder)?,
            Kind::Other => {
                sniff::check_extension(&listed.path, &file)?;
                rest.push(listed);
            }
        }
    }
    if rest.len() == files.len() {
        let looked_at = format!(
            "manifest.json, *.index.json and the first bytes of {} files directly in it",
            files.len()
        );
        return Err(SourceError::Unknown {
            path: folder.to_owned(),
            looked_at,
        });
    }
    add_side_files(rest.into_iter(), builder)
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
        let is_present: HashSet<PathBuf> = found
            .iter()
            .filter(|(_, index)| index.is_present(folder))
            .map(|(path, _)| path.clone())
            .collect();
        // With none present, the first one says which shard is missing.
        if !is_present.is_empty() {
            found.retain(|(path, _)| is_present.contains(path));
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
        let reason = match fs::metadata(&path) {
            Ok(metadata) if metadata.is_dir() => continue,
            Ok(metadata) if !metadata.is_file() => "it is not a regular file".to_owned(),
            Ok(_) => match name.to_str() {
                Some(name) => {
                    files.push(Listed {
                        name: name.to_owned(),
                        path,
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
