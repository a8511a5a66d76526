//! How many files the program may hold open.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// A server with fewer may run out under many connections.
const ENOUGH_FILES: u64 = 4_096;

/// Raises the soft limit of open files to the hard one. The soft one is low for the
/// sake of programs that still use `select`.
pub(crate) fn raise_open_files() {
    let limit = getrlimit(Resource::Nofile);
    let wished = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    if let Err(error) = setrlimit(Resource::Nofile, wished) {
        tracing::warn!(%error, "the limit of open files cannot be raised");
    }
    match getrlimit(Resource::Nofile).current {
        Some(files) if files < ENOUGH_FILES => tracing::warn!(
            files,
            enough = ENOUGH_FILES,
            "few files may be open at once: connections may be refused (ulimit -Hn)"
        ),
        files => tracing::debug!(?files, "limit of open files"),
    }
}
