//! Putting a finished transfer under its name, and finishing that after a crash.
//!
//! Order: manifest written and synced, folders synced, PUBLISH record synced,
//! rename, both parents synced. Before the record a crash leaves an unfinished
//! transfer; after it, recovery finds the record and either sees the manifest
//! under the name already or repeats the rename. So the name always shows the
//! old or the new checkpoint, whole.

use super::{
    catalog::Catalog,
    container::encode_container_header,
    dir::{Dir, Node},
    error::{IoContext, StoreError},
    files::{file_prefix, npy_descr},
    journal::{JournalError, Record, replay},
    manifest::{
        self, MANIFEST_FILE, MAX_MANIFEST_BYTES, Manifest, ManifestBlob, ManifestSource,
        ManifestTensor,
    },
    staging::{DATA_DIR, JOURNAL_FILE, Staging},
};
use crate::{
    fault,
    format::checksum,
    plan::{CheckpointName, EntryKind, Order},
    protocol::{CONTAINER_FILE, OutFormat, PublishPlan},
};
use std::{
    collections::{BTreeSet, HashSet},
    io::Write,
};

/// Bytes read at a time when everything is read again.
const VERIFY_BUFFER_LEN: usize = 1 << 20;

/// Publishes. Returns BLAKE3 of the manifest.
pub(super) fn publish(
    staging: &Staging,
    plan: &PublishPlan,
    is_synced: bool,
) -> Result<[u8; 32], StoreError> {
    check_sums(plan)?;
    if staging.open.verify {
        verify(staging, plan)?;
    }
    let data = staging.files.data();
    let manifest = build_manifest(staging, plan);
    // A transfer that began with this session has no files of earlier ones.
    if !staging.is_first_session() {
        let keep = plan.entries.iter().map(|(slot, ..)| slot.file.as_str());
        let container =
            (staging.open.out_format == OutFormat::Safetensors).then_some(CONTAINER_FILE);
        remove_others(data, "", &keep.chain(container).collect())?;
    }

    let bytes = manifest.to_bytes();
    let hash = *blake3::hash(&bytes).as_bytes();
    if bytes.len() as u64 > MAX_MANIFEST_BYTES {
        return Err(StoreError::Manifest {
            path: data.shown(MANIFEST_FILE),
            why: format!("{} bytes are more than {MAX_MANIFEST_BYTES}", bytes.len()),
        });
    }
    if staging.open.out_format == OutFormat::Safetensors {
        // Where their bytes were, there may be none or others in a moment.
        staging.forget_others(plan)?;
        finish_container(staging, plan)?;
    }
    data.remove_file(MANIFEST_FILE)?;
    let mut file = data.create(MANIFEST_FILE)?;
    let shown = data.shown(MANIFEST_FILE);
    fault::call("write", || file.write_all(&bytes)).context("write", &shown)?;
    if is_synced {
        fault::call("fsync", || file.sync_all()).context("sync", &shown)?;
        sync_folders(data, plan)?;
    }
    let overwrite = staging.open.overwrite;
    // After the record the transfer can only be published, so what is in the way
    // must show before it.
    let (parent, last) = staging.catalog.target(&staging.name)?;
    staging.catalog.check_nesting(&staging.name)?;
    must_exchange(&staging.name, &parent, &last, overwrite)?;
    staging.append(&[Record::Publish {
        manifest_blake3: hash,
        overwrite,
    }])?;
    rename(&staging.catalog, &staging.name, &staging.dir, overwrite)?;
    Ok(hash)
}

/// Gives the file that tensors share its header. Until now nobody could take it for a
/// finished one.
fn finish_container(staging: &Staging, plan: &PublishPlan) -> Result<(), StoreError> {
    let header_len = staging.open.container_header_len;
    let shared = || {
        let slots = plan.entries.iter().map(|(slot, ..)| slot);
        slots.filter_map(|slot| Some((&slot.header, slot.data_offset?)))
    };
    let data_len: u64 = shared().map(|(header, _)| header.byte_len).sum();
    let header = encode_container_header(shared(), &staging.open.metadata, header_len);
    let header = header.map_err(|why| StoreError::Container {
        path: staging.files.data().shown(CONTAINER_FILE),
        why,
    })?;
    staging
        .files
        .finish_container(CONTAINER_FILE, &header, header_len.saturating_add(data_len))
}

/// Where the source's format has a checksum of its own, what arrived must have it
/// too: it was there before the sender read the first byte.
fn check_sums(plan: &PublishPlan) -> Result<(), StoreError> {
    for (_, announcement, found) in &plan.entries {
        match announcement.crc32c {
            Some(expected) if expected != *found => {
                return Err(StoreError::SourceDamaged {
                    name: announcement.header.name.clone(),
                    expected,
                    found: *found,
                });
            }
            _ => {}
        }
    }
    Ok(())
}

/// Moves `data/` to the final name and makes the names durable.
fn rename(
    catalog: &Catalog,
    name: &CheckpointName,
    dir: &Dir,
    overwrite: bool,
) -> Result<(), StoreError> {
    let (parent, last) = catalog.target(name)?;
    // The folder is held open: one that became a checkpoint since is found here.
    catalog.check_nesting(name)?;
    if must_exchange(name, &parent, &last, overwrite)? {
        // The old version now lies in staging and goes with it.
        dir.exchange(DATA_DIR, &parent, &last)?;
    } else {
        dir.rename(DATA_DIR, &parent, &last)?;
    }
    parent.sync()?;
    dir.sync()?;
    dir.check_alive(JOURNAL_FILE)
}

/// Whether a checkpoint stands under the final name and is to be replaced. A
/// folder that is not a checkpoint is never replaced: what is exchanged is removed.
fn must_exchange(
    name: &CheckpointName,
    parent: &Dir,
    last: &str,
    overwrite: bool,
) -> Result<bool, StoreError> {
    let Some(target) = parent.try_sub(last)? else {
        return Ok(false);
    };
    if target.is_empty()? {
        return Ok(false);
    }
    if overwrite && Manifest::read(&target)?.is_some() {
        return Ok(true);
    }
    Err(StoreError::Exists {
        name: name.to_string(),
        why: "something was put there while the transfer ran",
    })
}

/// Finishes a publication that a crash interrupted; otherwise changes nothing.
/// The caller holds the lock of the name. `may_replace` = what stands there may be
/// replaced even if the interrupted session did not say so.
pub(super) fn recover(
    catalog: &Catalog,
    name: &CheckpointName,
    may_replace: bool,
) -> Result<(), StoreError> {
    let Some(dir) = catalog.transfers()?.try_sub(&name.short_hash())? else {
        return Ok(());
    };
    let Some(journal) = dir.try_open(JOURNAL_FILE, false)? else {
        return Ok(());
    };
    let path = dir.shown(JOURNAL_FILE);
    let replay = match replay(&journal) {
        Ok(replay) => replay,
        Err(JournalError::BadHeader) => return Ok(()),
        Err(source) => return Err(StoreError::Journal { path, source }),
    };
    let Some((hash, overwrite)) = replay.state.publish else {
        return Ok(());
    };
    if replay.header.checkpoint != name.as_str() {
        return Ok(());
    }
    let published = match catalog.root().try_sub(name.as_str())? {
        Some(target) => Manifest::hash(&target)?,
        None => None,
    };
    if published != Some(hash) {
        let staged = match dir.try_sub(DATA_DIR)? {
            Some(data) => Manifest::hash(&data)?,
            None => None,
        };
        if staged != Some(hash) {
            // Neither side has it: somebody removed the published folder. The
            // journal then speaks of files that are gone, and the next session
            // finds that out file by file.
            return Ok(());
        }
        catalog.prepare_target(name)?;
        rename(catalog, name, &dir, overwrite || may_replace)?;
    } else {
        // The rename happened, but perhaps not the syncs after it.
        catalog.target(name)?.0.sync()?;
        dir.sync()?;
        dir.check_alive(JOURNAL_FILE)?;
    }
    catalog.remove_staging(name)
}

/// Reads every byte back and compares it with what was acknowledged.
fn verify(staging: &Staging, plan: &PublishPlan) -> Result<(), StoreError> {
    let mut buf = vec![0; VERIFY_BUFFER_LEN];
    for (slot, announcement, expected) in &plan.entries {
        let (mut found, mut offset) = (0, 0);
        while offset < slot.header.byte_len {
            let n = (slot.header.byte_len - offset).min(buf.len() as u64);
            let part = &mut buf[..n as usize];
            staging.files.read(slot, offset, part)?;
            found = checksum::combine(found, checksum::crc32c(part), n);
            offset += n;
        }
        // The file may have been closed before; its descriptor is not needed again.
        staging.files.close(slot.number);
        if found != *expected {
            return Err(StoreError::Damaged {
                name: announcement.header.name.clone(),
                expected: *expected,
                found,
            });
        }
    }
    Ok(())
}

/// Removes every file that is not part of the checkpoint, and emptied folders.
fn remove_others(dir: &Dir, prefix: &str, keep: &HashSet<&str>) -> Result<(), StoreError> {
    for (child, node) in dir.list()? {
        let path = format!("{prefix}{child}");
        match node {
            Node::Dir => {
                remove_others(&dir.sub(&child)?, &format!("{path}/"), keep)?;
                // Fails where something is left, which is the point.
                dir.remove_empty_dir(&child);
            }
            Node::File | Node::Other if !keep.contains(path.as_str()) => dir.remove_file(&child)?,
            Node::File | Node::Other => {}
        }
    }
    Ok(())
}

/// Makes the names of all files durable: inner folders before those they lie in.
fn sync_folders(data: &Dir, plan: &PublishPlan) -> Result<(), StoreError> {
    let mut folders = BTreeSet::new();
    for (slot, ..) in &plan.entries {
        let mut path = slot.file.as_str();
        while let Some((folder, _)) = path.rsplit_once('/') {
            folders.insert(folder);
            path = folder;
        }
    }
    for folder in folders.into_iter().rev() {
        data.sub(folder)?.sync()?;
    }
    data.sync()
}

fn build_manifest(staging: &Staging, plan: &PublishPlan) -> Manifest {
    let mut tensors = Vec::with_capacity(plan.entries.len());
    let (mut files, mut total_nbytes) = (Vec::new(), 0);
    for (slot, announcement, crc32c) in &plan.entries {
        let header = &slot.header;
        let crc32c = format!("{crc32c:08x}");
        total_nbytes += header.byte_len;
        match header.kind {
            EntryKind::Blob => files.push(ManifestBlob {
                name: header.name.clone(),
                file: slot.file.clone(),
                nbytes: header.byte_len,
                crc32c,
            }),
            EntryKind::Tensor { dtype } => tensors.push(ManifestTensor {
                index: tensors.len() as u64,
                name: header.name.clone(),
                source_name: announcement
                    .source_name
                    .clone()
                    .unwrap_or_else(|| header.name.clone()),
                aliases: announcement.aliases.clone(),
                file: slot.file.clone(),
                dtype: dtype.name().to_owned(),
                npy_descr: npy_descr(dtype, header.big_endian, staging.open.npy_dtype),
                shape: header.shape.clone(),
                fortran_order: header.order == Order::Fortran,
                byteorder: if header.big_endian { "big" } else { "little" }.to_owned(),
                packed: dtype.is_packed(),
                data_offset: slot
                    .data_offset
                    .unwrap_or_else(|| file_prefix(header, staging.open.npy_dtype).len() as u64),
                nbytes: header.byte_len,
                crc32c,
                trainable: announcement.trainable,
            }),
        }
    }
    Manifest {
        format: "tensorferry".to_owned(),
        version: 1,
        created: manifest::rfc3339_now(),
        checkpoint: staging.name.as_str().to_owned(),
        source: ManifestSource {
            format: staging.open.source_format.clone(),
            metadata: staging.open.metadata.clone(),
        },
        transfer_id: manifest::hex(&staging.open.transfer_id),
        fingerprint: plan.fingerprint.map(|d| manifest::hex(&d)),
        entries_digest: manifest::hex(&plan.entries_digest),
        chunk_len: staging.chunk_len,
        durability: staging.durability.as_str().to_owned(),
        tensors,
        files,
        total_nbytes,
    }
}
