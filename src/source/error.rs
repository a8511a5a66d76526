//! What can go wrong with a checkpoint on disk.

use super::safetensors::HeaderError;
use crate::plan::PlanError;
use std::{io, path::Path, path::PathBuf};

/// A source checkpoint cannot be opened, understood or read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SourceError {
    /// Nothing is at this path.
    #[error("{} does not exist", path.display())]
    NotFound {
        /// The path as given.
        path: PathBuf,
    },
    /// No known format.
    #[error("{} is in no known checkpoint format: {looked_at}", path.display())]
    Unknown {
        /// File or folder.
        path: PathBuf,
        /// What was looked at, and what it was.
        looked_at: String,
    },
    /// The format is known and the content breaks its rules.
    #[error("{} is damaged: {why}", path.display())]
    Malformed {
        /// File that breaks the rules.
        path: PathBuf,
        /// Which rule, with the numbers.
        why: String,
    },
    /// Valid, but without a counterpart here.
    #[error("{}", unsupported_text(path, name, why))]
    Unsupported {
        /// File it is in.
        path: PathBuf,
        /// Tensor or other part, by name; empty where it is the whole file.
        name: String,
        /// What about it.
        why: String,
    },
    /// A file is no longer what it was when the checkpoint was opened.
    #[error("{} has changed since it was opened: {what}", path.display())]
    Changed {
        /// File that changed.
        path: PathBuf,
        /// How that shows.
        what: String,
    },
    /// Memory is no longer what it was when it was added.
    #[error(
        "{name:?} was written to while it was sent: what arrived is not what it was when it was added"
    )]
    Mutated {
        /// The tensor.
        name: String,
    },
    /// More bytes asked for than an entry has.
    #[error("entry {name:?} has {byte_len} bytes, asked for {len} at {offset}")]
    Range {
        /// Entry, or its number when there is none.
        name: String,
        /// First byte asked for.
        offset: u64,
        /// Bytes asked for.
        len: u64,
        /// Bytes of the entry.
        byte_len: u64,
    },
    /// A folder holds more than one checkpoint, or names one that is not there; a file is part of
    /// a checkpoint, or has a name that another has.
    #[error("{}: {why}", path.display())]
    Choice {
        /// The folder, or the file that names a checkpoint, is part of one or is the second.
        path: PathBuf,
        /// What there is, and what to name instead.
        why: String,
    },
    /// What the options select is not there.
    #[error("the selection cannot be taken: {why}")]
    Selection {
        /// Which pattern or wish.
        why: String,
    },
    /// Names or sizes break the rules for every checkpoint.
    #[error(transparent)]
    Plan(#[from] PlanError),
    /// The operating system refused.
    #[error("cannot {op} {}: {source}", path.display())]
    Io {
        /// Verb, such as `open`.
        op: &'static str,
        /// File or folder.
        path: PathBuf,
        /// The refusal.
        source: io::Error,
    },
}

/// Bytes of a format break its rules; which file they are from is known elsewhere.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ContentError {
    #[error("{0}")]
    Malformed(String),
    #[error("{name:?} is not supported: {why}")]
    Unsupported { name: String, why: String },
    #[error(transparent)]
    Plan(#[from] PlanError),
}

fn unsupported_text(path: &Path, name: &str, why: &str) -> String {
    let path = path.display();
    match name {
        "" => format!("{path} is not supported: {why}"),
        name => format!("{path}: {name:?} is not supported: {why}"),
    }
}

impl ContentError {
    pub(super) fn unsupported(name: &str, why: impl Into<String>) -> Self {
        ContentError::Unsupported {
            name: crate::plan::clip(name),
            why: why.into(),
        }
    }
}

impl SourceError {
    pub(super) fn content(path: &Path, error: ContentError) -> Self {
        match error {
            ContentError::Malformed(why) => SourceError::malformed(path, why),
            ContentError::Unsupported { name, why } => SourceError::unsupported(path, &name, why),
            ContentError::Plan(error) => SourceError::Plan(error),
        }
    }

    pub(super) fn io(op: &'static str, path: &Path, source: io::Error) -> Self {
        let path = path.to_owned();
        match source.kind() {
            io::ErrorKind::NotFound => SourceError::NotFound { path },
            _ => SourceError::Io { op, path, source },
        }
    }

    pub(super) fn malformed(path: &Path, why: impl Into<String>) -> Self {
        SourceError::Malformed {
            path: path.to_owned(),
            why: why.into(),
        }
    }

    pub(super) fn unsupported(path: &Path, name: &str, why: impl Into<String>) -> Self {
        let (path, name) = (path.to_owned(), crate::plan::clip(name));
        SourceError::Unsupported {
            path,
            name,
            why: why.into(),
        }
    }

    pub(super) fn changed(path: &Path, what: impl Into<String>) -> Self {
        SourceError::Changed {
            path: path.to_owned(),
            what: what.into(),
        }
    }

    pub(super) fn header(path: &Path, error: HeaderError) -> Self {
        match error {
            HeaderError::Malformed(why) => SourceError::malformed(path, why),
            HeaderError::Unsupported { name, why } => SourceError::unsupported(path, &name, why),
            HeaderError::Plan(error) => SourceError::Plan(error),
        }
    }
}
