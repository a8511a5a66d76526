//! Floor 3: bytes on the wire. Protobuf frames to and from the protocol's own
//! types with every limit checked once, an incremental parser that never copies
//! a payload, and the HTTP body that sends one.

mod body;
mod decode;
mod encode;
mod file_stream;
mod parser;
mod pull;
mod status;

pub(crate) use body::{LaneBody, LaneSender, encode_message, frame_head};
pub(crate) use decode::{decode_receiver_frame, decode_sender_frame};
pub(crate) use encode::{
    encode_layout, encode_npy_dtype, encode_out_format, encode_receiver_frame, encode_sender_frame,
    encode_sources_and_entries,
};
pub(crate) use file_stream::FileStream;
pub(crate) use parser::{Event, FrameParser, Rope};
pub(crate) use pull::{decode_pull_first, encode_pull_first};
pub(crate) use status::{reason_of, to_status};

/// Code generated from `proto/tensorferry/v1/ferry.proto`: the raw messages, and
/// tonic's client and server for the unary calls.
#[allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "generated from the commented schema"
)]
pub mod pb {
    tonic::include_proto!("tensorferry.v1");

    /// The schema, for the reflection service.
    pub const FILE_DESCRIPTOR_SET: &[u8] =
        include_bytes!(concat!(env!("OUT_DIR"), "/ferry_descriptor.bin"));
}

/// Path of the Push call.
pub(crate) const PUSH_PATH: &str = "/tensorferry.v1.Ferry/Push";

/// Path of the Pull call.
pub(crate) const PULL_PATH: &str = "/tensorferry.v1.Ferry/Pull";

/// A message from a peer could not be understood.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WireError {
    /// Not a gRPC message with a protobuf inside.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// The message is longer than allowed.
    #[error("a message of {found} bytes is more than the limit of {limit}")]
    TooLarge {
        /// Declared length.
        found: u64,
        /// Most that is accepted.
        limit: u64,
    },
    /// A compressed message.
    #[error("compressed messages are not accepted: send grpc-encoding identity")]
    Compressed,
    /// Well formed, but it breaks a rule of the protocol.
    #[error(transparent)]
    Protocol(#[from] crate::protocol::ProtocolError),
}

impl WireError {
    /// The stable reason.
    pub(crate) fn reason(&self) -> crate::protocol::Reason {
        use crate::protocol::Reason;
        match self {
            WireError::Malformed(_) => Reason::BadFrame,
            WireError::TooLarge { .. } => Reason::TooLarge,
            WireError::Compressed => Reason::Unsupported,
            WireError::Protocol(e) => e.reason,
        }
    }
}
