//! A push whose entries are added while it runs.

use crate::{
    error::Error,
    format::Dtype,
    plan::EntryHeader,
    source::{GrowingSource, MemoryEntry, SourceSet},
    transfer::{Canceller, Transfer, Watcher},
};
use bytes::Bytes;
use std::sync::Arc;

/// Handle of a push that [`Client::push_open`](crate::Client::push_open) began.
///
/// What is added is announced and sent at once, while the next entries are being
/// produced. The bytes are shared, not copied, and kept until the push ends, so
/// that a lost connection can be made good; `Bytes::from_owner` lends those of an
/// array. Dropping the handle, or the transfer that [`OpenPush::finish`] returns,
/// gives up: nothing is published, and what is durable stays for the next push of
/// the same key.
#[derive(Debug)]
#[must_use = "nothing is published before `finish`"]
pub struct OpenPush {
    source: Arc<GrowingSource>,
    transfer: Transfer,
}

impl OpenPush {
    pub(crate) fn new(source: Arc<GrowingSource>, transfer: Transfer) -> Self {
        OpenPush { source, transfer }
    }

    /// Adds a tensor: its little-endian bytes in C order.
    ///
    /// # Errors
    /// A bad name or shape, a name that was added before, or bytes that are not as
    /// many as `dtype` and `shape` (element counts) make.
    pub fn add_tensor(
        &self,
        name: &str,
        dtype: Dtype,
        shape: &[u64],
        bytes: Bytes,
    ) -> Result<(), Error> {
        let header = EntryHeader::tensor(name, dtype, shape)?;
        Ok(self.source.add(header, bytes)?)
    }

    /// Adds a side file.
    ///
    /// # Errors
    /// A bad name, or one that was added before.
    pub fn add_blob(&self, name: &str, bytes: Bytes) -> Result<(), Error> {
        let header = EntryHeader::blob(name, bytes.len() as u64)?;
        Ok(self.source.add(header, bytes)?)
    }

    /// Adds an entry by its header, for other orders of bytes.
    ///
    /// # Errors
    /// As [`OpenPush::add_tensor`].
    pub fn add(&self, header: EntryHeader, bytes: Bytes) -> Result<(), Error> {
        Ok(self.source.add(header, bytes)?)
    }

    /// Adds an entry with all that is known of it: whether it is trainable, and a sum by
    /// which a change of its memory on the way shows.
    ///
    /// # Errors
    /// As [`OpenPush::add_tensor`].
    pub fn add_entry(&self, entry: MemoryEntry) -> Result<(), Error> {
        Ok(self.source.add_entry(entry)?)
    }

    /// Adds everything in an opened checkpoint; its files are read as they are sent.
    ///
    /// # Errors
    /// A name that was added before; entries in front of it stay.
    pub fn add_set(&self, set: &Arc<SourceSet>) -> Result<(), Error> {
        Ok(self.source.add_set(set)?)
    }

    /// Looks at where the push stands.
    pub fn watcher(&self) -> Watcher {
        self.transfer.watcher()
    }

    /// Stops the push in good order from elsewhere.
    pub fn canceller(&self) -> Canceller {
        self.transfer.canceller()
    }

    /// Whether the push has ended already, which without `finish` means that it failed:
    /// producing more is of no use. [`OpenPush::finish`] tells why.
    pub fn is_finished(&self) -> bool {
        self.transfer.is_finished()
    }

    /// Nothing more will be added: await the transfer until it is published.
    pub fn finish(self) -> Transfer {
        self.source.seal();
        self.transfer
    }
}
