//! The first frame of a call, and what a session is to be like.

use super::{ReceiveOptions, lane::next_data};
use crate::{
    format::codec::Codec,
    plan::{Digest16, Grid},
    protocol::{
        CommitMode, CommitPolicy, Join, Open, OutFormat, ProtocolError, Reason, SenderFrame,
    },
    session::error::SessionError,
    store::StagingOptions,
    wire::{Event, FrameParser, decode_sender_frame, encode_layout, encode_out_format},
};
use std::time::Duration;
use tonic::body::Body;

/// How a call begins.
pub(super) enum First {
    /// A session.
    Open(Box<Open>),
    /// A further lane of one.
    Join(Join),
}

pub(super) async fn read_first(
    body: &mut Body,
    parser: &mut FrameParser,
) -> Result<First, SessionError> {
    let bad_frame = |why: &str| SessionError::from(ProtocolError::new(Reason::BadFrame, why));
    loop {
        if let Some(event) = parser.next_event()? {
            let Event::Head {
                frame,
                payload_len: 0,
            } = event
            else {
                return Err(bad_frame("the first frame has a payload"));
            };
            return match decode_sender_frame(*frame)? {
                SenderFrame::Open(open) => Ok(First::Open(open)),
                SenderFrame::Join(join) => Ok(First::Join(join)),
                _ => Err(bad_frame("the first frame is neither open nor join")),
            };
        }
        match next_data(body).await? {
            Some(data) => parser.feed(data),
            None => return Err(bad_frame("the stream ended before open")),
        }
    }
}

pub(super) fn check_supported(open: &Open) -> Result<(), SessionError> {
    if open.out_format != OutFormat::Npy {
        return Err(
            ProtocolError::new(Reason::Unsupported, "only the npy container is written").into(),
        );
    }
    if open.codecs & Codec::None.bit() == 0 {
        return Err(
            ProtocolError::new(Reason::BadCompression, "codec 0 must be among the codecs").into(),
        );
    }
    Ok(())
}

pub(super) fn staging_options(
    open: &Open,
    options: &ReceiveOptions,
) -> Result<StagingOptions, SessionError> {
    let chunk_len = open.chunk_len.unwrap_or(options.chunk_len);
    Grid::new(chunk_len).map_err(ProtocolError::from)?;
    Ok(StagingOptions {
        chunk_len,
        layout: encode_layout(open.layout),
        out_format: encode_out_format(open.out_format),
        write_mode: options.write_mode,
    })
}

pub(super) fn commit_policy(mode: CommitMode) -> CommitPolicy {
    let group = CommitPolicy {
        bytes: 128 << 20,
        files: 512,
        interval: Some(Duration::from_millis(500)),
        max_undurable_bytes: 256 << 20,
    };
    match mode {
        CommitMode::Group | CommitMode::None => group,
        CommitMode::Strict => CommitPolicy {
            bytes: 8 << 20,
            max_undurable_bytes: 16 << 20,
            ..group
        },
        CommitMode::End => CommitPolicy {
            bytes: u64::MAX,
            files: usize::MAX,
            interval: None,
            max_undurable_bytes: u64::MAX,
        },
    }
}

pub(super) fn random_token() -> Result<Digest16, SessionError> {
    let mut token = [0; 16];
    getrandom::fill(&mut token).map_err(|e| SessionError::Bug(e.to_string()))?;
    Ok(token)
}
