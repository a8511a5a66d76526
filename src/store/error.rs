//! What can go wrong at rest.

use super::journal::JournalError;
use crate::{plan::PlanError, protocol::Reason};
use std::io;

/// A failure of the receiver's storage, or a refusal by it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// A file system call failed.
    #[error("cannot {op} {path}")]
    Io {
        op: &'static str,
        path: String,
        source: io::Error,
    },
    /// Not enough room for what was announced.
    #[error("{needed} bytes are needed and {available} are free on the receiver")]
    Space { needed: u64, available: u64 },
    /// More than this server takes.
    #[error("{what} {needed} bytes, the quota of the receiver is {limit}")]
    Quota {
        what: &'static str,
        needed: u64,
        limit: u64,
    },
    /// Something with that name is there already.
    #[error("{name} already exists: {why}")]
    Exists { name: String, why: &'static str },
    /// Somebody else works on that name.
    #[error("{name} is locked: {why}")]
    Locked { name: String, why: &'static str },
    /// Something in the way that this program did not make.
    #[error("{path} is not safe to use: {why}")]
    UnsafePath { path: String, why: String },
    /// The journal cannot be used.
    #[error("the journal {path} cannot be used")]
    Journal { path: String, source: JournalError },
    /// Bytes on disk are not those that were acknowledged.
    #[error("{name:?} is damaged: crc32c {expected:08x} was expected, {found:08x} found")]
    Damaged {
        name: String,
        expected: u32,
        found: u32,
    },
    /// What arrived is what was read, and not what the source's own checksum is of.
    #[error(
        "{name:?} is damaged in its source: its own crc32c is {expected:08x}, its bytes have {found:08x}"
    )]
    SourceDamaged {
        name: String,
        expected: u32,
        found: u32,
    },
    /// manifest.json is not what this program writes.
    #[error("{path} is not a manifest of this program: {why}")]
    Manifest { path: String, why: String },
    /// The file that tensors share cannot have a header.
    #[error("{path} cannot be finished: {why}")]
    Container { path: String, why: String },
    /// A name is not allowed.
    #[error(transparent)]
    Plan(#[from] PlanError),
}

impl StoreError {
    /// The stable reason.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            StoreError::Io { source, .. } if is_space(source) => Reason::DiskQuota,
            StoreError::Io { .. } | StoreError::Journal { .. } => Reason::StorageIoError,
            StoreError::Space { .. } | StoreError::Quota { .. } => Reason::DiskQuota,
            StoreError::Exists { .. } => Reason::Exists,
            StoreError::Locked { .. } => Reason::Locked,
            StoreError::UnsafePath { .. } | StoreError::Manifest { .. } => Reason::UnsafePath,
            StoreError::Damaged { .. } | StoreError::SourceDamaged { .. } => Reason::Checksum,
            StoreError::Container { .. } => Reason::ManifestMismatch,
            StoreError::Plan(_) => Reason::BadName,
        }
    }
}

/// Whether an error means that the disk, quota or file size limit is reached.
fn is_space(error: &io::Error) -> bool {
    use io::ErrorKind::{FileTooLarge, QuotaExceeded, StorageFull};
    matches!(error.kind(), StorageFull | QuotaExceeded | FileTooLarge)
}

/// Adds what was done to what to an I/O error.
pub(crate) trait IoContext<T> {
    /// `op` = verb, `path` = on what.
    fn context(self, op: &'static str, path: impl Into<String>) -> Result<T, StoreError>;
}

impl<T, E: Into<io::Error>> IoContext<T> for Result<T, E> {
    fn context(self, op: &'static str, path: impl Into<String>) -> Result<T, StoreError> {
        self.map_err(|e| StoreError::Io {
            op,
            path: path.into(),
            source: e.into(),
        })
    }
}
