//! Local folders: what is in them, and what is unfinished beside them.

use super::{not_found, open_existing};
use crate::{
    client::{CheckpointStatus, CheckpointSummary, PublishedAs},
    error::Error,
    plan::CheckpointName,
    store::{Catalog, Manifest, TransferSummary, hex},
};
use std::path::{Path, PathBuf};

/// Holds unfinished transfers, beside the checkpoints.
const SERVICE_DIR: &str = ".tensorferry";

/// Checkpoints and unfinished transfers below a folder, sorted by name; a folder
/// that is a checkpoint itself is listed alone. Makes nothing. Whether a session
/// is running cannot be told from here: `active` is always false.
///
/// # Errors
/// [`SourceError::NotFound`](crate::source::SourceError::NotFound) when there is no such folder, [`Error::Store`].
pub fn list_folder(root: impl AsRef<Path>) -> Result<Vec<CheckpointSummary>, Error> {
    let root = root.as_ref();
    let catalog = open_existing(root)?;
    let published = |name: String, manifest: &Manifest, modified_unix_seconds| CheckpointSummary {
        name,
        published: true,
        offered: false,
        entry_count: (manifest.tensors.len() + manifest.files.len()) as u64,
        total_bytes: manifest.total_nbytes,
        durable_bytes: manifest.total_nbytes,
        active: false,
        modified_unix_seconds,
        owner: None,
    };
    if let Ok(Some((manifest, _))) = Manifest::read(catalog.root()) {
        let modified = catalog.root().modified_unix_seconds();
        return Ok(vec![published(
            root.display().to_string(),
            &manifest,
            modified,
        )]);
    }
    let mut out = Vec::new();
    for (name, manifest, modified) in catalog.list_published()? {
        out.push(published(name.to_string(), &manifest, modified));
    }
    for transfer in catalog.list_transfers()? {
        out.push(unfinished(&transfer));
    }
    out.sort_by(|a, b| (&a.name, !a.published).cmp(&(&b.name, !b.published)));
    Ok(out)
}

/// What stands in a local folder, and the unfinished push into it. Makes nothing.
/// Whether a session is running cannot be told from here.
///
/// # Errors
/// [`SourceError::NotFound`](crate::source::SourceError::NotFound) when there is neither, [`Error::Usage`] when
/// that names no folder, [`Error::Store`].
pub fn status_folder(folder: impl AsRef<Path>) -> Result<CheckpointStatus, Error> {
    let folder = folder.as_ref();
    let (parent, name) = place(folder)?;
    let catalog = open_existing(&parent).map_err(|error| match error {
        Error::Source(_) => not_found(folder.to_owned()),
        error => error,
    })?;
    let manifest = catalog.manifest(&name)?.map(|(manifest, _)| manifest);
    let fingerprint = manifest.as_ref().and_then(|m| m.fingerprint.clone());
    let status = CheckpointStatus {
        published: manifest.is_some(),
        transfer: catalog.transfer(&name)?.as_ref().map(unfinished),
        published_as: PublishedAs {
            target: local_target(&parent, &name.to_string()),
            transfer_id: manifest.map_or_else(String::new, |m| m.transfer_id),
            fingerprint: fingerprint.unwrap_or_default(),
        },
    };
    if !status.published && status.transfer.is_none() {
        return Err(not_found(folder.to_owned()));
    }
    Ok(status)
}

/// Throws away the unfinished push into a local folder, which lies in
/// `.tensorferry` beside it. Returns the durable bytes lost, or `None` when there
/// was none. What is published in the folder stays.
///
/// # Errors
/// [`Error::Usage`] when that names no folder, [`Error::Store`] when the push is
/// running or cannot be removed.
pub fn discard_folder(folder: impl AsRef<Path>) -> Result<Option<u64>, Error> {
    let (parent, name) = place(folder.as_ref())?;
    if !parent.join(SERVICE_DIR).is_dir() {
        return Ok(None);
    }
    let catalog = Catalog::open(&parent)?;
    let discarded = catalog.discard(&name)?;
    catalog.remove_empty_service_dir();
    Ok(discarded)
}

/// What stands for a local folder in the identity of a transfer into it.
pub(crate) fn local_target(parent: &Path, name: &str) -> String {
    let parent = parent.canonicalize().unwrap_or_else(|_| parent.to_owned());
    parent.join(name).display().to_string()
}

/// Where a checkpoint in this folder lies, and what it is called there: not inside another
/// one.
///
/// # Errors
/// [`Error::Usage`].
pub(crate) async fn landing_place(folder: &Path) -> Result<(PathBuf, CheckpointName), Error> {
    let (parent, name) = place(folder)?;
    let inner = parent.clone();
    let outer = tokio::task::spawn_blocking(move || Catalog::enclosing_checkpoint(&inner));
    match outer.await.map_err(|e| Error::Bug(e.to_string()))? {
        Some(outer) => Err(Error::Usage(format!(
            "{} is a checkpoint, and none can lie inside another",
            outer.display()
        ))),
        None => Ok((parent, name)),
    }
}

/// The folder that holds a local destination, and the name in it.
fn place(folder: &Path) -> Result<(PathBuf, CheckpointName), Error> {
    let usage = || Error::Usage(format!("{} does not name a folder", folder.display()));
    let absolute = std::path::absolute(folder).map_err(|_| usage())?;
    let name = absolute.file_name().and_then(|n| n.to_str());
    let (Some(name), Some(parent)) = (name, absolute.parent()) else {
        return Err(usage());
    };
    Ok((parent.to_owned(), CheckpointName::local(name)?))
}

fn unfinished(transfer: &TransferSummary) -> CheckpointSummary {
    CheckpointSummary {
        name: transfer.name.to_string(),
        published: false,
        offered: false,
        entry_count: transfer.entry_count,
        total_bytes: transfer.total_bytes,
        durable_bytes: transfer.durable_bytes,
        active: false,
        modified_unix_seconds: transfer.modified_unix_seconds,
        owner: transfer.transfer_id.map(|id| hex(&id)),
    }
}
