//! The root folder: published checkpoints and the service folder beside them.

use super::{
    dir::{Dir, Node, is_not_found},
    error::StoreError,
    journal::replay,
    lock::NameLock,
    manifest::{MANIFEST_FILE, Manifest},
    publish,
    quota::{Quota, QuotaLimits},
    space::Space,
    staging::{DATA_DIR, JOURNAL_FILE},
};
use crate::plan::{CheckpointName, Digest16};
use std::path::{Path, PathBuf};

const SERVICE_DIR: &str = ".tensorferry";
const TRANSFERS: &str = ".tensorferry/transfers";
const LOCKS: &str = ".tensorferry/locks";
/// Attempts to lock a name while others remove the empty service folder.
const LOCK_ATTEMPTS: usize = 16;
/// Folders deep that checkpoints are looked for.
const MAX_DEPTH: usize = 16;

/// A root folder. Cloning shares it.
#[derive(Clone, Debug)]
pub(crate) struct Catalog {
    root: Dir,
    space: Space,
    quota: Quota,
}

/// An unfinished transfer as its journal tells.
#[derive(Clone, Debug)]
pub(crate) struct TransferSummary {
    pub(crate) name: CheckpointName,
    pub(crate) entry_count: u64,
    pub(crate) total_bytes: u64,
    pub(crate) durable_bytes: u64,
    pub(crate) modified_unix_seconds: u64,
    /// Stands for its sender, the sources and the options: all that the journal knows of
    /// whose it is.
    pub(crate) transfer_id: Option<Digest16>,
}

impl Catalog {
    /// Opens or makes a root folder.
    pub(crate) fn open(root: &Path) -> Result<Self, StoreError> {
        Ok(Catalog {
            root: Dir::open_root(root)?,
            space: Space::default(),
            quota: Quota::default(),
        })
    }

    /// From now on unfinished work has limits; what lies there already counts.
    pub(crate) fn limit(&mut self, limits: QuotaLimits) -> Result<(), StoreError> {
        self.quota = Quota::new(limits);
        if self.quota.is_limited() {
            for transfer in self.list_transfers()? {
                let hash = transfer.name.short_hash();
                self.quota.found(hash, transfer.total_bytes);
            }
        }
        Ok(())
    }

    /// The folder.
    pub(crate) fn root(&self) -> &Dir {
        &self.root
    }

    /// Promised space.
    pub(super) fn space(&self) -> &Space {
        &self.space
    }

    /// What unfinished work may take.
    pub(super) fn quota(&self) -> &Quota {
        &self.quota
    }

    pub(super) fn transfers(&self) -> Result<Dir, StoreError> {
        self.root.make_all(TRANSFERS, true)
    }

    /// As [`Catalog::transfers`], without making it.
    pub(super) fn try_transfers(&self) -> Result<Option<Dir>, StoreError> {
        self.root.try_sub(TRANSFERS)
    }

    pub(super) fn locks(&self) -> Result<Dir, StoreError> {
        self.root.make_all(LOCKS, true)
    }

    /// Locks a name for this process.
    pub(super) fn lock(&self, name: &CheckpointName) -> Result<NameLock, StoreError> {
        for _ in 0..LOCK_ATTEMPTS {
            match NameLock::take(&self.locks()?, name) {
                // Another process that finished took the empty folder away.
                Err(e) if is_not_found(&e) => {}
                other => return other,
            }
        }
        NameLock::take(&self.locks()?, name)
    }

    /// No checkpoint may lie inside another.
    pub(super) fn check_nesting(&self, name: &CheckpointName) -> Result<(), StoreError> {
        let mut prefix = String::new();
        let count = name.parts().count();
        for part in name.parts().take(count - 1) {
            prefix.push_str(part);
            let Some(dir) = self.root.try_sub(&prefix)? else {
                break;
            };
            if dir.inode(MANIFEST_FILE)?.is_some() {
                return Err(StoreError::Exists {
                    name: prefix,
                    why: "it is a checkpoint, and none can lie inside another",
                });
            }
            prefix.push('/');
        }
        Ok(())
    }

    /// The folder that holds the final name, and its last part.
    pub(super) fn target(&self, name: &CheckpointName) -> Result<(Dir, String), StoreError> {
        Ok(match name.as_str().rsplit_once('/') {
            Some((parent, last)) => (self.root.sub(parent)?, last.to_owned()),
            None => (self.root.clone(), name.as_str().to_owned()),
        })
    }

    /// Makes the ancestors of the final name and proves that a rename can reach it.
    pub(super) fn prepare_target(&self, name: &CheckpointName) -> Result<(), StoreError> {
        let parent = match name.as_str().rsplit_once('/') {
            Some((parent, _)) => self.root.make_all(parent, false)?,
            None => self.root.clone(),
        };
        if parent.device()? != self.transfers()?.device()? {
            return Err(StoreError::UnsafePath {
                path: parent.shown(""),
                why: "it lies on another file system than its root".to_owned(),
            });
        }
        Ok(())
    }

    /// Removes the staging of a name, the journal after the data.
    pub(super) fn remove_staging(&self, name: &CheckpointName) -> Result<(), StoreError> {
        let transfers = self.transfers()?;
        let hash = name.short_hash();
        if let Some(dir) = transfers.try_sub(&hash)? {
            dir.remove_all(DATA_DIR)?;
            transfers.remove_all(&hash)?;
        }
        self.quota.release(&hash);
        Ok(())
    }

    /// Throws an unfinished transfer away. Returns the durable bytes lost, or
    /// `None` when there was none.
    pub(crate) fn discard(&self, name: &CheckpointName) -> Result<Option<u64>, StoreError> {
        let lock = self.lock(name)?;
        ignore_obstacles(publish::recover(self, name, false))?;
        let summary = self.transfer(name)?;
        self.remove_staging(name)?;
        self.transfers()?.sync()?;
        lock.remove()?;
        Ok(summary.map(|s| s.durable_bytes))
    }

    /// Finishes publications that a crash interrupted. Names that another process
    /// works on are left to it.
    pub(crate) fn recover(&self) -> Result<(), StoreError> {
        if let Some(transfers) = self.root.try_sub(TRANSFERS)? {
            for (child, _) in transfers.list()? {
                // What is left when a crash cut short the removal of a staging;
                // under its lock, for it looks like one that is being made.
                if let Ok(lock) = NameLock::take_hash(&self.locks()?, &child, &child) {
                    transfers.remove_empty_dir(&child);
                    lock.remove()?;
                }
            }
        }
        for transfer in self.list_transfers()? {
            let name = &transfer.name;
            match NameLock::take(&self.locks()?, name) {
                Ok(lock) => {
                    // One that cannot be finished must not keep the others from being served.
                    if let Err(error) = publish::recover(self, name, false) {
                        tracing::warn!(%name, %error, "an interrupted publication cannot be finished now");
                    }
                    lock.remove()?;
                }
                Err(StoreError::Locked { .. }) => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// The unfinished transfer of a name.
    pub(crate) fn transfer(
        &self,
        name: &CheckpointName,
    ) -> Result<Option<TransferSummary>, StoreError> {
        let Some(transfers) = self.root.try_sub(TRANSFERS)? else {
            return Ok(None);
        };
        match transfers.try_sub(&name.short_hash())? {
            Some(dir) => Ok(summarise(&dir)),
            None => Ok(None),
        }
    }

    /// All unfinished transfers, sorted by name.
    pub(crate) fn list_transfers(&self) -> Result<Vec<TransferSummary>, StoreError> {
        let Some(transfers) = self.root.try_sub(TRANSFERS)? else {
            return Ok(Vec::new());
        };
        let mut out = Vec::new();
        for (child, node) in transfers.list()? {
            if node == Node::Dir
                && let Some(dir) = transfers.try_sub(&child)?
            {
                out.extend(summarise(&dir));
            }
        }
        out.sort_by(|a: &TransferSummary, b| a.name.cmp(&b.name));
        Ok(out)
    }

    /// Manifest of a published checkpoint, with its bytes.
    pub(crate) fn manifest(
        &self,
        name: &CheckpointName,
    ) -> Result<Option<(Manifest, Vec<u8>)>, StoreError> {
        match self.root.try_sub(name.as_str())? {
            Some(dir) => Manifest::read(&dir),
            None => Ok(None),
        }
    }

    /// All published checkpoints, sorted by name, with the time of publication.
    pub(crate) fn list_published(
        &self,
    ) -> Result<Vec<(CheckpointName, Manifest, u64)>, StoreError> {
        let mut out = Vec::new();
        walk(&self.root, "", 0, &mut out)?;
        out.sort_by(|a: &(CheckpointName, Manifest, u64), b| a.0.cmp(&b.0));
        Ok(out)
    }

    /// The landed checkpoint that `folder` is or lies in, if any.
    pub(crate) fn enclosing_checkpoint(folder: &Path) -> Option<PathBuf> {
        folder
            .ancestors()
            .find(|a| is_checkpoint(a))
            .map(Path::to_owned)
    }

    /// Removes the service folder when nothing is in it.
    pub(crate) fn remove_empty_service_dir(&self) {
        if let Ok(Some(service)) = self.root.try_sub(SERVICE_DIR) {
            // Locks first: whoever works on a transfer has one there.
            let _ = service.remove_empty_dir("locks") && service.remove_empty_dir("transfers");
            let _ = self.root.remove_empty_dir(SERVICE_DIR);
        }
    }
}

/// A publication that something is in the way of can be thrown away too.
pub(super) fn ignore_obstacles(recovered: Result<(), StoreError>) -> Result<(), StoreError> {
    match recovered {
        Err(
            StoreError::Exists { .. } | StoreError::UnsafePath { .. } | StoreError::Manifest { .. },
        ) => Ok(()),
        other => other,
    }
}

fn is_checkpoint(folder: &Path) -> bool {
    folder.join(MANIFEST_FILE).is_file()
        && Dir::open_root(folder).is_ok_and(|dir| matches!(Manifest::read(&dir), Ok(Some(_))))
}

fn walk(
    dir: &Dir,
    prefix: &str,
    depth: usize,
    out: &mut Vec<(CheckpointName, Manifest, u64)>,
) -> Result<(), StoreError> {
    if depth > MAX_DEPTH {
        return Ok(());
    }
    for (child, node) in dir.list()? {
        if node != Node::Dir {
            continue;
        }
        let path = format!("{prefix}{child}");
        let Ok(name) = path.parse::<CheckpointName>() else {
            continue;
        };
        let Some(sub) = dir.try_sub(&child)? else {
            continue;
        };
        match Manifest::read(&sub) {
            Ok(Some((manifest, _))) => out.push((name, manifest, sub.modified_unix_seconds())),
            Ok(None) => walk(&sub, &format!("{path}/"), depth + 1, out)?,
            // Somebody else's manifest.json: not a checkpoint of ours.
            Err(_) => {}
        }
    }
    Ok(())
}

/// What a journal says of its transfer; `None` when it says nothing usable.
pub(super) fn summarise(dir: &Dir) -> Option<TransferSummary> {
    let file = dir.try_open(JOURNAL_FILE, false).ok()??;
    let replay = replay(&file).ok()?;
    let grid = replay.header.grid().ok()?;
    let name = replay
        .header
        .checkpoint
        .parse()
        .or_else(|_| CheckpointName::local(&replay.header.checkpoint));
    let mut summary = TransferSummary {
        name: name.ok()?,
        entry_count: replay.state.entries.len() as u64,
        total_bytes: 0,
        durable_bytes: 0,
        modified_unix_seconds: file
            .metadata()
            .and_then(|m| m.modified())
            .ok()
            .and_then(|t| t.duration_since(std::time::UNIX_EPOCH).ok())
            .map_or(0, |d| d.as_secs()),
        transfer_id: replay.state.transfer_id,
    };
    for entry in replay.state.entries.values() {
        let len = entry.record.header.byte_len;
        summary.total_bytes += len;
        let durable = entry.durable.iter();
        summary.durable_bytes += durable
            .map(|r| grid.span_bytes(len, r.start, r.end - r.start))
            .sum::<u64>();
    }
    Some(summary)
}
