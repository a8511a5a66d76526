//! The stream of SenderFrames, in pieces of any length.

use super::input::Input;
use crate::{
    protocol::{MAX_COMPARE_CELLS, SenderFrame},
    wire::{
        Event, FrameParser, WireError, decode_sender_frame, encode_message, encode_sender_frame, pb,
    },
};
use bytes::Bytes;
use prost::Message;

/// So small that inputs of a few KiB reach them.
const MAX_MESSAGE_BYTES: usize = 1024;
const MAX_HEAD_BYTES: usize = 512;
/// Lengths of pieces that stand in front of the stream.
const SPLIT_COUNT: usize = 16;

/// [`SPLIT_COUNT`] lengths of pieces, then a stream.
///
/// # Panics
/// A property is broken.
pub fn sender_frames(data: &[u8]) {
    let mut input = Input::new(data);
    let splits = input.bytes(SPLIT_COUNT);
    let stream = input.rest();
    let whole = parse(stream, &[]);
    let split = parse(stream, splits);
    assert!(
        split == whole,
        "other events when split: {split:?} {whole:?}"
    );
    let bytewise = parse(stream, &[0]);
    assert!(
        bytewise == whole,
        "other events bytewise: {bytewise:?} {whole:?}"
    );

    let mut at = 0;
    let frame_count = whole.frames.len();
    for (i, (frame, payload)) in (1..).zip(whole.frames) {
        // A head before an empty payload is out before its message has ended.
        if i < frame_count || whole.is_at_boundary || !payload.is_empty() {
            at = check_message(stream, at, &frame, &payload);
        }
        if let Ok(frame) = decode_sender_frame(frame) {
            check_decoded(frame);
        }
    }
}

/// All that came out of a stream.
#[derive(Debug, PartialEq)]
struct Parsed {
    /// Whole frames with their payload.
    frames: Vec<(pb::SenderFrame, Vec<u8>)>,
    /// A head whose payload did not come.
    last: Option<(pb::SenderFrame, usize)>,
    error: Option<String>,
    is_at_boundary: bool,
}

/// Feeds the stream in pieces, 1 byte longer than said; the last length goes on.
fn parse(stream: &[u8], splits: &[u8]) -> Parsed {
    let mut parser = FrameParser::new(MAX_MESSAGE_BYTES, MAX_HEAD_BYTES);
    let mut parsed = Parsed {
        frames: Vec::new(),
        last: None,
        error: None,
        is_at_boundary: false,
    };
    let mut input = Input::new(stream);
    let mut lens = splits.iter().map(|&n| usize::from(n) + 1);
    let last_len = splits.last().map_or(stream.len(), |&n| usize::from(n) + 1);
    'stream: while !input.is_empty() {
        let len = lens.next().unwrap_or(last_len);
        parser.feed(Bytes::copy_from_slice(input.bytes(len)));
        loop {
            match parser.next_event() {
                Ok(None) => break,
                Ok(Some(event)) => take(&mut parsed, event),
                Err(error) => {
                    check_error(&error);
                    parsed.error = Some(error.to_string());
                    break 'stream;
                }
            }
        }
    }
    parsed.is_at_boundary = parsed.error.is_none() && parser.is_at_boundary();
    assert!(!parsed.is_at_boundary || parsed.last.is_none());
    parsed
}

fn take(parsed: &mut Parsed, event: Event) {
    match event {
        Event::Head { frame, payload_len } => {
            assert!(
                parsed.last.is_none(),
                "a head before the payload of another"
            );
            assert!(frame.payload.is_empty() && payload_len <= MAX_MESSAGE_BYTES);
            match payload_len {
                0 => parsed.frames.push((*frame, Vec::new())),
                _ => parsed.last = Some((*frame, payload_len)),
            }
        }
        Event::Payload(mut rope) => {
            let len = rope.len();
            let bytes = rope
                .parts()
                .flat_map(|part| part.to_vec())
                .collect::<Vec<_>>();
            assert_eq!(bytes.len(), len);
            let half = rope.split_to(len / 2);
            assert_eq!((half.len(), rope.len()), (len / 2, len - len / 2));
            let Some((frame, payload_len)) = parsed.last.take() else {
                // A payload of no bytes is an event, too.
                return assert_eq!(len, 0, "a payload without a head");
            };
            assert_eq!(len, payload_len);
            parsed.frames.push((frame, bytes));
        }
    }
}

fn check_error(error: &WireError) {
    if let WireError::TooLarge { found, limit } = error {
        assert!(found > limit);
    }
    assert!(error.to_string().len() < 4096, "a peer fills our log");
}

/// The frame is what an ordinary protobuf decoder makes of the message. Returns
/// where the next message begins.
fn check_message(stream: &[u8], at: usize, frame: &pb::SenderFrame, payload: &[u8]) -> usize {
    let mut prefix = Input::new(&stream[at + 1..]);
    let len = prefix
        .bytes(4)
        .iter()
        .fold(0, |n, &b| n << 8 | usize::from(b));
    assert!(len <= MAX_MESSAGE_BYTES);
    let ordinary = pb::SenderFrame::decode(prefix.bytes(len));
    let ordinary = ordinary.expect("what the parser takes is protobuf");
    let ours = pb::SenderFrame {
        payload: Bytes::copy_from_slice(payload),
        ..frame.clone()
    };
    assert_eq!(ours, ordinary);
    at + 5 + len
}

/// Limits hold, and what is written again says the same.
fn check_decoded(frame: SenderFrame) {
    match &frame {
        SenderFrame::Batch(batch) => {
            for entry in &batch.entries {
                entry.header.check().expect("every header was checked");
            }
            let last_entry = batch.entries.len().saturating_sub(1) as u64;
            assert!(u64::from(batch.first_entry) + last_entry <= u64::from(u32::MAX));
        }
        SenderFrame::Compare(compare) => {
            assert!((1..=MAX_COMPARE_CELLS).contains(&(compare.hashes.len() as u64)));
        }
        SenderFrame::Abort(abort) => assert!(abort.message.len() <= 1024),
        SenderFrame::Open(open) => assert!(open.source_format.len() <= 256),
        SenderFrame::Join(_) | SenderFrame::Finish(_) => {}
    }
    let message = encode_sender_frame(&frame);
    let bytes = encode_message(&message);
    assert_eq!(pb::SenderFrame::decode(&bytes[5..]).as_ref(), Ok(&message));
    let again = decode_sender_frame(message).expect("what was written is in order");
    assert_eq!(again, frame);
}
