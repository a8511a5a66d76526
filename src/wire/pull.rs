//! First frames of a pull.

use super::{
    WireError,
    decode::{array, decode_out_format},
    encode_out_format, pb,
};
use crate::{
    plan::MAX_ENTRY_NAME_LEN,
    protocol::{
        MAX_FIRST_GLOBS, MAX_GLOBS, PROTOCOL_VERSION, ProtocolError, PullFirst, PullOpen, Reason,
    },
};
use bytes::Bytes;
use pb::receiver_frame::Control;

/// A first frame as it travels.
pub(crate) fn encode_pull_first(first: &PullFirst) -> pb::ReceiverFrame {
    let control = match first {
        PullFirst::Open(open) => Control::Open(pb::PullOpen {
            protocol_version: PROTOCOL_VERSION,
            checkpoint: open.checkpoint.as_str().to_owned(),
            transfer_id: Bytes::copy_from_slice(&open.transfer_id),
            codecs: open.codecs,
            include: open.include.clone(),
            exclude: open.exclude.clone(),
            out_format: encode_out_format(open.out_format),
            max_lanes: open.max_lanes,
            lane_token: Bytes::copy_from_slice(&open.lane_token),
            rate_bytes_per_second: open.rate_bytes_per_second.unwrap_or(0),
            first: open.first.clone(),
        }),
        PullFirst::Join(token) => Control::Join(pb::Join {
            session_token: Bytes::copy_from_slice(token),
            lane: 0,
        }),
    };
    pb::ReceiverFrame {
        control: Some(control),
        ..Default::default()
    }
}

/// A first frame, with every limit checked.
pub(crate) fn decode_pull_first(frame: pb::ReceiverFrame) -> Result<PullFirst, WireError> {
    let refuse = |reason, why: &str| WireError::from(ProtocolError::new(reason, why));
    match frame.control {
        Some(Control::Open(open)) => {
            if open.protocol_version != PROTOCOL_VERSION {
                let why = "only version 1 of the protocol is spoken here";
                return Err(refuse(Reason::Version, why));
            }
            for globs in [&open.include, &open.exclude, &open.first] {
                let is_long = |glob: &String| glob.len() > MAX_ENTRY_NAME_LEN;
                if globs.len() > MAX_GLOBS || globs.iter().any(is_long) {
                    return Err(refuse(Reason::TooLarge, "too many globs, or too long ones"));
                }
            }
            if open.first.len() > MAX_FIRST_GLOBS {
                let why = "too many globs of what comes first";
                return Err(refuse(Reason::TooLarge, why));
            }
            let out_format = decode_out_format(open.out_format)
                .ok_or_else(|| refuse(Reason::Unsupported, "an unknown out_format"))?;
            let rate = open.rate_bytes_per_second;
            Ok(PullFirst::Open(Box::new(PullOpen {
                checkpoint: open.checkpoint.parse().map_err(ProtocolError::from)?,
                transfer_id: array(&open.transfer_id, "transfer_id")?,
                codecs: open.codecs,
                include: open.include,
                exclude: open.exclude,
                out_format,
                max_lanes: open.max_lanes.max(1),
                lane_token: array(&open.lane_token, "lane_token")?,
                rate_bytes_per_second: (rate > 0).then_some(rate),
                first: open.first,
            })))
        }
        Some(Control::Join(join)) => Ok(PullFirst::Join(array(
            &join.session_token,
            "session_token",
        )?)),
        _ => {
            let why = "the first frame is neither open nor join";
            Err(refuse(Reason::BadFrame, why))
        }
    }
}
