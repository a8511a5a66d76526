//! The first frame of a call, and what a session is to be like.

use super::{ReceiveOptions, lane::next_data};
use crate::{
    format::{codec::Codec, safetensors},
    plan::{Digest16, Grid},
    protocol::{
        CommitMode, CommitPolicy, Join, ManifestPromise, Open, OutFormat, ProtocolError, Reason,
        SenderFrame,
    },
    session::error::SessionError,
    store::StagingOptions,
    wire::{
        Event, FrameParser, decode_sender_frame, encode_layout, encode_npy_dtype, encode_out_format,
    },
};
use std::time::Duration;
use tonic::body::Body;

/// A text grows by this at most when it becomes JSON.
const MAX_JSON_GROWTH: u64 = 6;
/// Longest row of a tensor in a container's header, in bytes: its name and 32 dimensions.
const MAX_HEADER_ROW_LEN: u64 = 4096 * MAX_JSON_GROWTH + 1024;

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
    check_container(open)?;
    if open.codecs & Codec::None.bit() == 0 {
        return Err(
            ProtocolError::new(Reason::BadCompression, "codec 0 must be among the codecs").into(),
        );
    }
    Ok(())
}

fn check_container(open: &Open) -> Result<(), SessionError> {
    let len = open.container_header_len;
    let is_complete = matches!(open.manifest, ManifestPromise::Complete { .. });
    let refuse = |why: String| Err(ProtocolError::new(Reason::Unsupported, why).into());
    match open.out_format {
        OutFormat::Npy if len == 0 => Ok(()),
        OutFormat::Npy => refuse(format!("a header of {len} bytes without a container")),
        OutFormat::Safetensors if !is_complete => {
            refuse("one file for all tensors needs a complete manifest".to_owned())
        }
        OutFormat::Safetensors if len > longest_header(open) => refuse(format!(
            "a container header of {len} bytes is more than any of such a manifest"
        )),
        OutFormat::Safetensors if !safetensors::is_header_len(len) => refuse(format!(
            "a container header of {len} bytes is not a multiple of 8 within the limits of safetensors"
        )),
        OutFormat::Safetensors => Ok(()),
    }
}

/// More bytes than the header of such a manifest can take.
fn longest_header(open: &Open) -> u64 {
    let entry_count = match open.manifest {
        ManifestPromise::Complete { entry_count, .. } => entry_count,
        ManifestPromise::Open => 0,
    };
    // Quotes, colon and comma of a pair count as one more byte of text.
    let texts: usize = (open.metadata.iter())
        .map(|(k, v)| k.len() + v.len() + 1)
        .sum();
    entry_count
        .saturating_mul(MAX_HEADER_ROW_LEN)
        .saturating_add((texts as u64).saturating_mul(MAX_JSON_GROWTH))
        .saturating_add(MAX_HEADER_ROW_LEN)
}

/// Bytes in front of the tensors in the file that they share, where they share one.
pub(super) fn container_header_len(open: &Open) -> Option<u64> {
    (open.out_format == OutFormat::Safetensors).then_some(open.container_header_len)
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
        npy_dtype: encode_npy_dtype(open.npy_dtype),
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
