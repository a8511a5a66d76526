//! Transfers that leave part of their work out, to see what that part costs: with their
//! files, their checksums or both left out.
//!
//! They cannot be mistaken for real ones. What is sent is made up here or, where only
//! checksums are left out, goes to a receiver that publishes nothing. The receiver works
//! in a folder that it makes itself and removes at its end. Neither side talks to one
//! that means it.

use crate::{
    client::Client,
    error::Error,
    format::{Dtype, codec::CodecChoice},
    options::{Lanes, PushOptions},
    plan::EntryHeader,
    protocol::{CommitMode, Reason},
    server::Server,
    session::Rehearsal as Parts,
    source::{GrowingSource, SourceSet, Supply},
    transfer::Transfer,
};
use bytes::Bytes;
use std::{future::Future, io, net::SocketAddr, path::Path, sync::Arc};

/// Longest tensor of a made-up checkpoint, in bytes.
const TENSOR_BYTES: u64 = 64 << 20;

/// What a rehearsal leaves out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Rehearsal {
    /// Files: the same bytes are sent over and over, verified and dropped.
    Memory,
    /// Files and checksums.
    MemoryUnchecked,
    /// Checksums: files are read and written, and not published.
    FilesUnchecked,
}

impl Rehearsal {
    fn parts(self) -> Parts {
        Parts {
            skips_checksums: self != Rehearsal::Memory,
            skips_files: self != Rehearsal::FilesUnchecked,
        }
    }
}

/// Receives in `folder`, which must not exist and does not afterwards, on a free port of
/// this machine until `shutdown` resolves.
///
/// # Errors
/// The folder exists or cannot be made, or the listener fails.
pub async fn receive(
    folder: &Path,
    rehearsal: Rehearsal,
    listening: impl FnOnce(SocketAddr),
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), Error> {
    let failed = |what: &str, source: io::Error| match source.kind() {
        io::ErrorKind::AlreadyExists => Error::Usage(format!(
            "{} exists, and a rehearsal keeps nothing: it works in a new folder only",
            folder.display()
        )),
        _ => Error::Store {
            reason: Reason::StorageIoError,
            message: format!("cannot {what} {}", folder.display()),
            source: Some(source),
        },
    };
    std::fs::create_dir(folder).map_err(|e| failed("make", e))?;
    let served = async {
        let server = Server::builder(folder)
            .rehearsal(rehearsal.parts())
            .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
            .await?;
        listening(server.local_addr());
        server.serve(shutdown).await
    };
    let served = served.await;
    std::fs::remove_dir_all(folder).map_err(|e| failed("remove", e))?;
    served
}

/// Sends made-up bytes to a rehearsal that leaves files out.
///
/// # Errors
/// `authority` is no address, or the rehearsal needs files.
pub fn send_memory(
    authority: &str,
    rehearsal: Rehearsal,
    bytes: u64,
    lanes: u32,
) -> Result<Transfer, Error> {
    if !rehearsal.parts().skips_files {
        return Err(Error::Usage("this rehearsal needs files".to_owned()));
    }
    let source = GrowingSource::new()?;
    // Shared by all tensors and never looked at.
    let blank = Bytes::from(vec![0; bytes.min(TENSOR_BYTES) as usize]);
    for number in 0..bytes.div_ceil(TENSOR_BYTES) {
        let len = TENSOR_BYTES.min(bytes - number * TENSOR_BYTES);
        let header = EntryHeader::tensor(format!("layer.{number}"), Dtype::U8, &[len])?;
        source.add(header, blank.slice(..len as usize))?;
    }
    source.seal();
    let options = PushOptions {
        // Nothing is there that a sync could save.
        commit_mode: CommitMode::None,
        codec: CodecChoice::None,
        lanes: Lanes::Fixed(lanes),
        retries: 0,
        ..PushOptions::default()
    };
    let supply = Supply::Growing(Arc::new(source));
    Client::new(authority)?.rehearse(supply, options, rehearsal.parts())
}

/// Sends a checkpoint without checksums to a [`Rehearsal::FilesUnchecked`].
///
/// # Errors
/// `authority` is no address.
pub fn send_files(authority: &str, source: Arc<SourceSet>, lanes: u32) -> Result<Transfer, Error> {
    let options = PushOptions {
        lanes: Lanes::Fixed(lanes),
        retries: 0,
        ..PushOptions::default()
    };
    let parts = Rehearsal::FilesUnchecked.parts();
    Client::new(authority)?.rehearse(Supply::Complete(source), options, parts)
}
