//! Why a session ends, in words that never change.

use crate::plan::PlanError;
use std::fmt;

macro_rules! reasons {
    ($($(#[$doc:meta])* $variant:ident $word:literal;)*) => {
        /// Stable reason of a failure: the `reason` of `google.rpc.ErrorInfo` and
        /// of an Abort frame.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum Reason {
            $($(#[$doc])* $variant,)*
        }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Reason] = &[$(Reason::$variant,)*];

            /// The word on the wire.
            pub fn as_str(self) -> &'static str {
                match self { $(Reason::$variant => $word,)* }
            }
        }
    };
}

reasons! {
    /// A name breaks the rules.
    BadName "BAD_NAME";
    /// The same entry name twice.
    DuplicateTensor "DUPLICATE_TENSOR";
    /// Shape, dtype and length do not fit together.
    BadShape "BAD_SHAPE";
    /// A chunk or range lies outside its entry or off the grid.
    BadRange "BAD_RANGE";
    /// A codec was not negotiated or its lengths are impossible.
    BadCompression "BAD_COMPRESSION";
    /// A frame makes no sense where it came.
    BadFrame "BAD_FRAME";
    /// A frame is larger than allowed.
    TooLarge "TOO_LARGE";
    /// More entries, sources or lanes than allowed.
    TooMany "TOO_MANY";
    /// Too many chunks in a row arrived damaged, or the disk returned other bytes.
    Checksum "CHECKSUM";
    /// Finish came although bytes are missing, or does not match the announcements.
    ManifestMismatch "MANIFEST_MISMATCH";
    /// The protocol version is not spoken here.
    Version "VERSION";
    /// The call or option is not offered.
    Unsupported "UNSUPPORTED";
    /// Not enough space or quota on the receiver.
    DiskQuota "DISK_QUOTA";
    /// Something in the way is not what the receiver itself made.
    UnsafePath "UNSAFE_PATH";
    /// A published checkpoint has that name.
    Exists "EXISTS";
    /// No such checkpoint or transfer.
    NotFound "NOT_FOUND";
    /// Another owner's transfer of that name is running or waiting.
    Locked "LOCKED";
    /// A newer session of the same transfer took over.
    Superseded "SUPERSEDED";
    /// The source changed while it was sent.
    SourceChanged "SOURCE_CHANGED";
    /// The receiver's storage failed.
    StorageIoError "STORAGE_IO_ERROR";
    /// The sender could not read its source.
    SourceIoError "SOURCE_IO_ERROR";
    /// The user stopped it.
    Interrupted "INTERRUPTED";
    /// The server is shutting down.
    Draining "DRAINING";
    /// The peer was silent for too long.
    Idle "IDLE";
    /// A bug: something that cannot happen did.
    Bug "BUG";
}

impl Reason {
    /// The reason of this word.
    pub fn from_word(word: &str) -> Option<Reason> {
        Reason::ALL.iter().copied().find(|r| r.as_str() == word)
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The conversation cannot go on.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct ProtocolError {
    /// For programs.
    pub reason: Reason,
    /// For people.
    pub message: String,
}

impl ProtocolError {
    /// An error with its text.
    pub fn new(reason: Reason, message: impl Into<String>) -> Self {
        ProtocolError {
            reason,
            message: message.into(),
        }
    }
}

impl From<PlanError> for ProtocolError {
    fn from(error: PlanError) -> Self {
        let reason = match &error {
            PlanError::Name { .. } => Reason::BadName,
            PlanError::Shape { .. } => Reason::BadShape,
            PlanError::Duplicate { .. } => Reason::DuplicateTensor,
            PlanError::TooMany { .. } => Reason::TooMany,
            PlanError::ChunkLen(_) => Reason::BadRange,
        };
        ProtocolError::new(reason, error.to_string())
    }
}
