//! Transfers that nobody continues.

use super::{
    catalog::{Catalog, TransferSummary, ignore_obstacles, summarise},
    dir::{Dir, Node},
    error::StoreError,
    journal::{JournalError, replay},
    lock::NameLock,
    publish,
    staging::{DATA_DIR, JOURNAL_FILE},
};
use std::time::{Duration, SystemTime};

/// The staging of a transfer that was left alone for a while.
#[derive(Debug)]
pub(crate) struct Idle {
    /// Folder below the transfers.
    hash: String,
    /// What its journal says, if that can be read.
    pub(crate) summary: Option<TransferSummary>,
}

impl Catalog {
    /// Stagings into which nothing was written for `ttl`.
    pub(crate) fn idle_transfers(&self, ttl: Duration) -> Result<Vec<Idle>, StoreError> {
        let Some(transfers) = self.try_transfers()? else {
            return Ok(Vec::new());
        };
        let mut idle = Vec::new();
        for (hash, node) in transfers.list()? {
            if node == Node::Dir
                && let Some(dir) = transfers.try_sub(&hash)?
                && is_idle(&dir, ttl)?
            {
                let summary = summarise(&dir);
                idle.push(Idle { hash, summary });
            }
        }
        Ok(idle)
    }

    /// Removes such a staging, unless somebody works on it or has written into it
    /// meanwhile. Returns whether it is gone.
    pub(crate) fn remove_idle(&self, idle: &Idle, ttl: Duration) -> Result<bool, StoreError> {
        let Some(transfers) = self.try_transfers()? else {
            return Ok(false);
        };
        let lock = match NameLock::take_hash(&self.locks()?, &idle.hash, &idle.hash) {
            Ok(lock) => lock,
            Err(StoreError::Locked { .. }) => return Ok(false),
            Err(error) => return Err(error),
        };
        let Some(dir) = transfers.try_sub(&idle.hash)? else {
            return Ok(false);
        };
        if !is_idle(&dir, ttl)? {
            return Ok(false);
        }
        match &idle.summary {
            // A publication that was begun is finished rather than thrown away.
            Some(summary) => ignore_obstacles(publish::recover(self, &summary.name, false))?,
            None => check_worthless(&dir)?,
        }
        // The journal last: it says whose the folder is.
        dir.remove_all(DATA_DIR)?;
        transfers.remove_all(&idle.hash)?;
        self.quota().release(&idle.hash);
        transfers.sync()?;
        lock.remove()?;
        Ok(true)
    }
}

/// A journal that is no longer, or not yet, understood is for a person to look at; one
/// that was torn when it was made is worth nothing.
fn check_worthless(dir: &Dir) -> Result<(), StoreError> {
    let Some(file) = dir.try_open(JOURNAL_FILE, false)? else {
        return Ok(());
    };
    let path = dir.shown(JOURNAL_FILE);
    match replay(&file) {
        Ok(_) | Err(JournalError::BadHeader) => Ok(()),
        Err(source) => Err(StoreError::Journal { path, source }),
    }
}

/// Whether nothing in the folder of a transfer was written for `ttl`. What cannot be
/// dated counts as new.
fn is_idle(dir: &Dir, ttl: Duration) -> Result<bool, StoreError> {
    // Every session writes into the journal, so the files need seldom be looked at.
    let has_journal = dir.inode(JOURNAL_FILE)?.is_some();
    let is_old = |name| dir.modified(name).map(|modified| is_older(modified, ttl));
    Ok((!has_journal || is_old(JOURNAL_FILE)?) && is_old("")? && all_older(dir, ttl)?)
}

fn all_older(dir: &Dir, ttl: Duration) -> Result<bool, StoreError> {
    for (child, node) in dir.list()? {
        if !is_older(dir.modified(&child)?, ttl) {
            return Ok(false);
        }
        if node == Node::Dir
            && let Some(sub) = dir.try_sub(&child)?
            && !all_older(&sub, ttl)?
        {
            return Ok(false);
        }
    }
    Ok(true)
}

fn is_older(modified: SystemTime, ttl: Duration) -> bool {
    modified.elapsed().is_ok_and(|age| age >= ttl)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::CheckpointName;
    use std::{fs, path::Path};

    const DAY: Duration = Duration::from_secs(86_400);

    /// A staging of the given age with a file in its data, and its name.
    fn staging(root: &Path, name: &str, age: Duration) -> CheckpointName {
        let name: CheckpointName = name.parse().unwrap();
        let folder = root.join(".tensorferry/transfers").join(name.short_hash());
        fs::create_dir_all(folder.join("data/files")).unwrap();
        for file in ["journal", "data/files/a", "data/files", "data", ""] {
            let path = folder.join(file);
            if !path.is_dir() {
                // Torn while it was made.
                fs::write(&path, b"TFERRYJ").unwrap();
            }
            set_age(&path, age);
        }
        name
    }

    fn set_age(path: &Path, age: Duration) {
        let file = fs::File::open(path).unwrap();
        file.set_modified(SystemTime::now() - age).unwrap();
    }

    fn remove_all(catalog: &Catalog, ttl: Duration) -> usize {
        let idle = catalog.idle_transfers(ttl).unwrap();
        let removed = idle.iter().filter(|i| catalog.remove_idle(i, ttl).unwrap());
        removed.count()
    }

    #[test]
    fn only_what_is_old_all_through_goes() {
        let temp = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(temp.path()).unwrap();
        let old = staging(temp.path(), "old", DAY * 8);
        let fresh = staging(temp.path(), "fresh", DAY);
        let touched = staging(temp.path(), "touched", DAY * 8);
        let folder = |n: &CheckpointName| {
            temp.path()
                .join(".tensorferry/transfers")
                .join(n.short_hash())
        };
        set_age(&folder(&touched).join("data/files/a"), DAY);
        assert_eq!(remove_all(&catalog, DAY * 7), 1);
        assert!(!folder(&old).exists() && folder(&fresh).exists() && folder(&touched).exists());
    }

    #[test]
    fn what_somebody_holds_or_has_touched_since_stays() {
        let temp = tempfile::tempdir().unwrap();
        let catalog = Catalog::open(temp.path()).unwrap();
        let name = staging(temp.path(), "a", DAY * 8);
        let idle = catalog.idle_transfers(DAY * 7).unwrap().pop().unwrap();
        let lock = catalog.lock(&name).unwrap();
        assert!(!catalog.remove_idle(&idle, DAY * 7).unwrap());
        drop(lock);
        let journal = format!(".tensorferry/transfers/{}/journal", name.short_hash());
        set_age(&temp.path().join(&journal), Duration::ZERO);
        assert!(!catalog.remove_idle(&idle, DAY * 7).unwrap());
        set_age(&temp.path().join(&journal), DAY * 8);
        fs::write(temp.path().join(&journal), b"a foreign file").unwrap();
        set_age(&temp.path().join(&journal), DAY * 8);
        assert!(catalog.remove_idle(&idle, DAY * 7).is_err());
        fs::write(temp.path().join(&journal), b"").unwrap();
        set_age(&temp.path().join(&journal), DAY * 8);
        assert!(catalog.remove_idle(&idle, DAY * 7).unwrap());
        assert!(!catalog.remove_idle(&idle, DAY * 7).unwrap());
    }
}
