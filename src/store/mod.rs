//! Floor 3: bytes at rest. Everything below one root folder is reached through
//! one directory handle; nothing a peer says is ever used as a path.
//!
//! The calls are synchronous and positional: they run on I/O threads and on the
//! committer, never on the tasks that serve the network, and many may write into
//! the same file at once because a [`crate::protocol::Placement`] exists only
//! once per cell.

mod catalog;
mod container;
mod dir;
mod durability;
mod error;
mod expire;
mod files;
pub(crate) mod journal;
mod lock;
mod manifest;
mod publish;
mod quota;
mod space;
mod staging;
mod write_out;

pub(crate) use catalog::{Catalog, TransferSummary};
pub(crate) use container::encode_container_header;
pub(crate) use durability::{FileSystem, of_path as durability_of};
pub(crate) use error::StoreError;
pub use files::WriteMode;
pub(crate) use files::read_exact_at_most;
pub(crate) use manifest::{MANIFEST_FILE, Manifest, ManifestBlob, ManifestTensor, hex};
pub(crate) use quota::QuotaLimits;
pub(crate) use staging::{Opened, Staging, StagingOptions};
