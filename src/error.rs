//! The one error of the public API.

use crate::{
    plan::PlanError,
    protocol::{ProtocolError, Reason},
    source::SourceError,
    store::StoreError,
};

/// Class of an error: one stable list for exit codes and for other languages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorCode {
    /// None of the others.
    Other,
    /// The call itself makes no sense.
    Usage,
    /// The source does not exist.
    SourceMissing,
    /// The network failed; the same call goes on where it stopped.
    Network,
    /// Bytes are not what they should be.
    Integrity,
    /// Not allowed, or not configured.
    Auth,
    /// The receiver has no room.
    NoSpace,
    /// Something of that name exists.
    Exists,
    /// Somebody else works on that name.
    Busy,
    /// The source changed while it was sent.
    SourceChanged,
    /// Stopped by the user.
    Interrupted,
}

impl ErrorCode {
    /// Exit status of the command line program.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorCode::Other => 1,
            ErrorCode::Usage => 2,
            ErrorCode::SourceMissing => 3,
            ErrorCode::Network => 5,
            ErrorCode::Integrity => 6,
            ErrorCode::Auth => 7,
            ErrorCode::NoSpace => 8,
            ErrorCode::Exists => 9,
            ErrorCode::Busy => 11,
            ErrorCode::SourceChanged => 24,
            ErrorCode::Interrupted => 130,
        }
    }
}

/// Everything that can go wrong.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The source checkpoint.
    #[error("the checkpoint cannot be used")]
    Source(#[source] SourceError),
    /// The other side refused or gave up, and said why.
    #[error("{message}")]
    Refused {
        /// Stable reason.
        reason: Reason,
        /// The other side's words.
        message: String,
    },
    /// The conversation broke a rule.
    #[error("the two sides did not understand each other")]
    Protocol(#[source] ProtocolError),
    /// The connection failed more often than allowed.
    #[error("{endpoint} cannot be reached or keeps failing: {message}")]
    Transport {
        /// Where to.
        endpoint: String,
        /// What the transport says.
        message: String,
    },
    /// Local storage failed or refused.
    #[error("{message}")]
    Store {
        /// Stable reason.
        reason: Reason,
        /// What failed, on what.
        message: String,
        /// The file system's error.
        #[source]
        source: Option<std::io::Error>,
    },
    /// The server cannot be run like this.
    #[error("{0}")]
    Config(String),
    /// The server cannot have its address: another program has it, or it is not this machine's.
    #[error("cannot listen on {address}")]
    Listen {
        /// Where it was to listen.
        address: std::net::SocketAddr,
        /// What the system says.
        #[source]
        source: std::io::Error,
    },
    /// A name or option is not allowed.
    #[error("{0}")]
    Usage(String),
    /// Something on disk is not what its manifest says.
    #[error("{name:?} is damaged: {why}")]
    Damaged {
        /// Tensor or file.
        name: String,
        /// Expected and found.
        why: String,
    },
    /// Stopped by the user.
    #[error("interrupted")]
    Interrupted,
    /// Something that cannot happen did.
    #[error("internal error: {0}")]
    Bug(String),
}

impl Error {
    /// Its class.
    pub fn code(&self) -> ErrorCode {
        match self {
            Error::Source(SourceError::NotFound { .. }) => ErrorCode::SourceMissing,
            Error::Source(SourceError::Changed { .. } | SourceError::Mutated { .. }) => {
                ErrorCode::SourceChanged
            }
            Error::Source(SourceError::Malformed { .. }) => ErrorCode::Integrity,
            Error::Source(SourceError::Selection { .. } | SourceError::Choice { .. }) => {
                ErrorCode::Usage
            }
            Error::Source(_) => ErrorCode::Other,
            Error::Refused { reason, .. } | Error::Store { reason, .. } => code_of(*reason),
            Error::Protocol(e) => code_of(e.reason),
            Error::Transport { .. } => ErrorCode::Network,
            Error::Config(_) => ErrorCode::Auth,
            Error::Usage(_) => ErrorCode::Usage,
            Error::Damaged { .. } => ErrorCode::Integrity,
            Error::Interrupted => ErrorCode::Interrupted,
            Error::Listen { .. } | Error::Bug(_) => ErrorCode::Other,
        }
    }

    /// Whether the same call may well succeed later, going on where it stopped.
    pub fn is_retryable(&self) -> bool {
        self.code() == ErrorCode::Network
    }

    /// What to do next.
    pub fn hint(&self) -> Option<&'static str> {
        if let Error::Source(SourceError::Unknown { .. }) = self {
            return Some(
                "give a file or folder of one of the formats in docs/formats.md, or the index of shards",
            );
        }
        if let Error::Refused {
            reason: Reason::Superseded,
            ..
        } = self
        {
            return Some(
                "another push took this one's place: it goes on with what is durable, unless it was told to --restart; `tensorferry status` shows how far it is",
            );
        }
        if let Error::Listen { .. } = self {
            return Some(
                "choose another port, or an address of this machine; port 0 picks a free one",
            );
        }
        if let Error::Source(SourceError::Mutated { .. }) = self {
            return Some(
                "save when nothing trains, or take a snapshot first; nothing was published, and what is still equal is not sent again",
            );
        }
        if let Error::Source(SourceError::Malformed { .. }) = self {
            return Some("the source is incomplete or damaged: nothing of it was published");
        }
        if let Error::Refused { message, .. } = self
            && self.code() == ErrorCode::NoSpace
            && message.contains(FILE_TOO_LARGE)
        {
            return Some(
                "the receiver's file system, or a limit there (ulimit -f), takes no file that long; with --out-format npy each tensor has its own",
            );
        }
        Some(match self.code() {
            ErrorCode::Network => {
                "is `tensorferry serve` running there? run the same command again: it goes on where it stopped"
            }
            ErrorCode::SourceMissing => "check the path or name",
            ErrorCode::NoSpace => {
                "free space on the receiver (`tensorferry discard` gives back unfinished transfers), then run the same command again"
            }
            ErrorCode::Exists => {
                "choose another name; a published checkpoint, and nothing else, can be replaced with --overwrite"
            }
            ErrorCode::Busy => {
                "wait for a transfer that is running there, or stop it where it runs (`tensorferry status` tells); unfinished work that nobody goes on with gives way to `tensorferry discard` or `push --restart`"
            }
            ErrorCode::SourceChanged => {
                "run the same command again when nobody writes the source: what is still equal is not sent again"
            }
            ErrorCode::Integrity => {
                "nothing damaged was published; check memory, disk and network of both machines"
            }
            ErrorCode::Auth => "see `tensorferry serve --help`",
            ErrorCode::Usage | ErrorCode::Other | ErrorCode::Interrupted => return None,
        })
    }
}

/// How Linux says EFBIG.
const FILE_TOO_LARGE: &str = "(os error 27)";

fn code_of(reason: Reason) -> ErrorCode {
    match reason {
        Reason::BadName | Reason::DuplicateTensor | Reason::BadShape => ErrorCode::Usage,
        Reason::Checksum => ErrorCode::Integrity,
        Reason::NotFound => ErrorCode::SourceMissing,
        Reason::DiskQuota => ErrorCode::NoSpace,
        Reason::Exists => ErrorCode::Exists,
        Reason::Locked | Reason::Superseded => ErrorCode::Busy,
        Reason::SourceChanged => ErrorCode::SourceChanged,
        Reason::Interrupted => ErrorCode::Interrupted,
        Reason::Draining | Reason::Idle => ErrorCode::Network,
        _ => ErrorCode::Other,
    }
}

impl From<PlanError> for Error {
    fn from(error: PlanError) -> Self {
        Error::Usage(error.to_string())
    }
}

impl From<SourceError> for Error {
    fn from(error: SourceError) -> Self {
        Error::Source(error)
    }
}

impl From<StoreError> for Error {
    fn from(error: StoreError) -> Self {
        let (reason, message) = (error.reason(), error.to_string());
        let source = match error {
            StoreError::Io { source, .. } => Some(source),
            StoreError::Journal { source, .. } => Some(std::io::Error::other(source)),
            _ => None,
        };
        Error::Store {
            reason,
            message,
            source,
        }
    }
}
