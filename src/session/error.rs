//! Why a session ended.

use crate::{
    error::Error,
    protocol::{Abort, ProtocolError, Reason},
    source::SourceError,
    store::StoreError,
    wire::WireError,
};

/// Why a receiving session ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The peer broke a rule.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The peer sent something that is not a frame.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The receiver's disk failed or refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The connection ended in the middle.
    #[error("the connection ended: {0}")]
    Disconnected(String),
    /// The peer gave up.
    #[error("the sender gave up: {}", .0.message)]
    Aborted(Abort),
    /// A newer session of the same transfer took over.
    #[error("a newer session of this transfer took over")]
    Superseded,
    /// The server is shutting down.
    #[error("the server is shutting down; run the same command again")]
    Draining,
    /// The peer was silent for too long.
    #[error("the sender was silent for {0} seconds")]
    Idle(u64),
    /// The peer owed bytes and hardly sent any.
    #[error("the sender was too slow for {0} seconds in which it could have sent")]
    Slow(u64),
    /// Something that cannot happen did.
    #[error("internal error: {0}")]
    Bug(String),
}

impl SessionError {
    /// Whether what was written before can still be made durable.
    pub(crate) fn leaves_disk_trusted(&self) -> bool {
        !matches!(self, SessionError::Store(_) | SessionError::Bug(_))
    }

    /// Whether only a connection was lost: of a lane that joined, the session goes on
    /// without it.
    pub(crate) fn is_lost_connection(&self) -> bool {
        matches!(self, SessionError::Disconnected(_) | SessionError::Idle(_))
    }

    /// The stable reason.
    pub(crate) fn reason(&self) -> Reason {
        match self {
            SessionError::Protocol(e) => e.reason,
            SessionError::Wire(e) => e.reason(),
            SessionError::Store(e) => e.reason(),
            SessionError::Aborted(abort) => abort.reason.unwrap_or(Reason::Interrupted),
            SessionError::Superseded => Reason::Superseded,
            SessionError::Disconnected(_) => Reason::Interrupted,
            SessionError::Idle(_) | SessionError::Slow(_) => Reason::Idle,
            SessionError::Draining => Reason::Draining,
            SessionError::Bug(_) => Reason::Bug,
        }
    }
}

/// Why a sending session ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SendError {
    /// The receiver said why.
    #[error("{message}")]
    Refused {
        /// Known reason.
        reason: Reason,
        /// The receiver's words.
        message: String,
    },
    /// The receiver broke a rule.
    #[error(transparent)]
    Protocol(#[from] ProtocolError),
    /// The receiver sent something that is not a frame.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The connection could not be made or ended in the middle.
    #[error("the connection to the receiver failed: {message}")]
    Disconnected {
        /// What the transport says.
        message: String,
    },
    /// The source could not be read, or changed.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// The user stopped it.
    #[error("interrupted")]
    Interrupted,
    /// Something that cannot happen did.
    #[error("internal error: {0}")]
    Bug(String),
}

impl From<SendError> for Error {
    fn from(error: SendError) -> Self {
        match error {
            SendError::Refused { reason, message } => Error::Refused { reason, message },
            SendError::Protocol(e) if e.reason == Reason::SourceChanged => Error::Refused {
                reason: e.reason,
                message: e.message,
            },
            SendError::Protocol(e) => Error::Protocol(e),
            SendError::Wire(e) => Error::Protocol(ProtocolError::new(e.reason(), e.to_string())),
            SendError::Disconnected { message } => Error::Transport {
                endpoint: "the receiver".to_owned(),
                message,
            },
            SendError::Source(e) => Error::Source(e),
            SendError::Interrupted => Error::Interrupted,
            SendError::Bug(why) => Error::Bug(why),
        }
    }
}

impl From<SessionError> for Error {
    fn from(error: SessionError) -> Self {
        Error::Refused {
            reason: error.reason(),
            message: error.to_string(),
        }
    }
}
