//! How much unfinished work may lie on a receiver: for one checkpoint, and for all of it.
//!
//! What counts is raw bytes as announced: of a transfer that a session of this process
//! opened, the most that it promised or announced; of one that nobody has continued yet,
//! what its journal knows.

use super::error::StoreError;
use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// Most raw bytes; `None` = as much as there is room for.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct QuotaLimits {
    /// Of one checkpoint.
    pub(crate) checkpoint: Option<u64>,
    /// Of all unfinished transfers together.
    pub(crate) staging: Option<u64>,
}

/// The unfinished transfers of one root, by their folder. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub(crate) struct Quota {
    limits: QuotaLimits,
    bytes_by_hash: Arc<Mutex<HashMap<String, u64>>>,
}

/// A claim that is given back unless its transfer begins.
#[derive(Debug)]
pub(super) struct Claim {
    quota: Quota,
    hash: String,
    before: Option<u64>,
    is_kept: bool,
}

impl Quota {
    pub(super) fn new(limits: QuotaLimits) -> Self {
        Quota {
            limits,
            bytes_by_hash: Arc::default(),
        }
    }

    /// Whether there is any limit.
    pub(super) fn is_limited(&self) -> bool {
        self.limits.checkpoint.is_some() || self.limits.staging.is_some()
    }

    /// A transfer that was found, whether or not it fits.
    pub(super) fn found(&self, hash: String, bytes: u64) {
        self.bytes_by_hash().insert(hash, bytes);
    }

    /// A session begins that is to bring so many bytes, as far as is known; `present` were
    /// announced before. `restart` = what was there before does not count any more.
    pub(super) fn claim(
        &self,
        hash: &str,
        promised: u64,
        present: u64,
        restart: bool,
    ) -> Result<Claim, StoreError> {
        let before = self.bytes_by_hash().get(hash).copied();
        if restart {
            self.release(hash);
        }
        let claim = Claim {
            quota: self.clone(),
            hash: hash.to_owned(),
            before,
            is_kept: false,
        };
        // The sender's word counts for a complete manifest: entries that it leaves out go.
        self.set(hash, promised.max(if promised == 0 { present } else { 0 }))?;
        Ok(claim)
    }

    /// The transfer has announced so many bytes in its session.
    pub(super) fn announced(&self, hash: &str, bytes: u64) -> Result<(), StoreError> {
        let claimed = self.bytes_by_hash().get(hash).copied().unwrap_or(0);
        if bytes > claimed {
            self.set(hash, bytes)?;
        }
        Ok(())
    }

    /// Its staging is gone.
    pub(super) fn release(&self, hash: &str) {
        self.bytes_by_hash().remove(hash);
    }

    fn set(&self, hash: &str, bytes: u64) -> Result<(), StoreError> {
        if let Some(limit) = self.limits.checkpoint
            && bytes > limit
        {
            return Err(StoreError::Quota {
                what: "the checkpoint has",
                needed: bytes,
                limit,
            });
        }
        let mut bytes_by_hash = self.bytes_by_hash();
        if let Some(limit) = self.limits.staging {
            let others = bytes_by_hash.iter().filter(|(other, _)| *other != hash);
            let sum = others.fold(bytes, |sum, (_, bytes)| sum.saturating_add(*bytes));
            if sum > limit {
                return Err(StoreError::Quota {
                    what: "unfinished transfers would have",
                    needed: sum,
                    limit,
                });
            }
        }
        bytes_by_hash.insert(hash.to_owned(), bytes);
        Ok(())
    }

    fn bytes_by_hash(&self) -> MutexGuard<'_, HashMap<String, u64>> {
        self.bytes_by_hash
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Claim {
    /// The transfer has a staging now.
    pub(super) fn keep(mut self) {
        self.is_kept = true;
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        if self.is_kept {
            return;
        }
        let mut bytes_by_hash = self.quota.bytes_by_hash();
        match self.before {
            Some(bytes) => bytes_by_hash.insert(self.hash.clone(), bytes),
            None => bytes_by_hash.remove(&self.hash),
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn quota(checkpoint: u64, staging: u64) -> Quota {
        Quota::new(QuotaLimits {
            checkpoint: Some(checkpoint),
            staging: Some(staging),
        })
    }

    #[test]
    fn a_checkpoint_has_at_most_its_quota_promised_or_announced() {
        let quota = quota(10, 100);
        assert!(quota.claim("a", 11, 0, false).is_err());
        quota.claim("a", 10, 0, false).unwrap().keep();
        quota.announced("a", 10).unwrap();
        let refused = quota.announced("a", 11).unwrap_err();
        assert!(
            matches!(
                refused,
                StoreError::Quota {
                    needed: 11,
                    limit: 10,
                    ..
                }
            ),
            "{refused}"
        );
    }

    #[test]
    fn all_transfers_together_have_at_most_theirs() {
        let quota = quota(100, 10);
        quota.found("idle".to_owned(), 4);
        quota.claim("a", 5, 0, false).unwrap().keep();
        assert!(quota.claim("b", 2, 0, false).is_err());
        quota.claim("b", 1, 0, false).unwrap().keep();
        assert!(quota.announced("b", 2).is_err());
        // Going on with one takes nothing anew.
        quota.claim("a", 5, 5, false).unwrap().keep();
        quota.release("idle");
        quota.announced("b", 5).unwrap();
        assert!(quota.announced("b", 6).is_err());
    }

    #[test]
    fn a_session_that_does_not_begin_gives_its_claim_back() {
        let quota = quota(100, 10);
        quota.found("a".to_owned(), 6);
        drop(quota.claim("a", 1, 6, true).unwrap());
        assert!(quota.claim("b", 5, 0, false).is_err());
        drop(quota.claim("b", 4, 0, false).unwrap());
        quota.claim("c", 4, 0, false).unwrap().keep();
    }

    #[test]
    fn what_was_announced_before_counts_where_nothing_is_promised() {
        let quota = quota(10, 10);
        assert!(quota.claim("a", 0, 11, false).is_err());
        quota.claim("a", 0, 9, false).unwrap().keep();
        assert!(quota.claim("b", 2, 0, false).is_err());
    }
}
