//! Incremental parser of the stream of SenderFrames.
//!
//! Input is the body of an HTTP/2 stream in pieces of any size; output are frame
//! heads (decoded) and payloads as ropes: lists of slices of the very buffers
//! that came from the connection, so no payload byte is copied here.
//!
//! Field 15 is `payload`. Canonical encoders write it last; then the head is
//! known before the first payload byte and [`Event::Head`] lets the caller check
//! and reserve first. A frame whose head comes only after its payload is legal
//! protobuf: its payload is kept (it is bounded by the message limit) and the
//! events come out in the usual order once the message ends.

use super::{WireError, pb};
use bytes::{Buf, Bytes, BytesMut};
use prost::Message;
use std::collections::VecDeque;

const PREFIX_LEN: usize = 5;
const PAYLOAD_FIELD: u64 = 15;
/// Fields of one message beside the payload: decoded, each takes hundreds of bytes
/// however few it has on the wire.
const MAX_ITEMS: u64 = 16 << 10;

/// Slices that follow each other.
#[derive(Clone, Debug, Default)]
pub(crate) struct Rope {
    parts: VecDeque<Bytes>,
    len: usize,
}

impl Rope {
    /// Total length in bytes.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// Adds a slice at the end.
    pub(crate) fn push(&mut self, part: Bytes) {
        if !part.is_empty() {
            self.len += part.len();
            self.parts.push_back(part);
        }
    }

    /// Takes the first `len` bytes off, without copying them.
    pub(crate) fn split_to(&mut self, len: usize) -> Rope {
        let mut head = Rope::default();
        let mut left = len.min(self.len);
        self.len -= left;
        while left > 0 {
            let Some(mut part) = self.parts.pop_front() else {
                break;
            };
            if part.len() > left {
                let rest = part.split_off(left);
                self.parts.push_front(rest);
            }
            left -= part.len();
            head.push(part);
        }
        head
    }

    /// The slices in order.
    pub(crate) fn parts(&self) -> impl ExactSizeIterator<Item = &Bytes> {
        self.parts.iter()
    }
}

/// What the parser found.
#[derive(Debug)]
pub(crate) enum Event {
    /// All of a frame but its payload, which has `payload_len` bytes.
    Head {
        /// The frame with an empty payload.
        frame: Box<pb::SenderFrame>,
        /// Bytes that follow in [`Event::Payload`].
        payload_len: usize,
    },
    /// The payload of the last head, when it has one.
    Payload(Rope),
}

#[derive(Clone, Copy, Debug)]
enum State {
    Prefix,
    Tag,
    /// A varint whose field is kept or dropped.
    Varint {
        keep: bool,
    },
    /// The length of a delimited field.
    Length {
        field: u64,
        keep: bool,
    },
    /// Bytes of a field.
    Run {
        left: usize,
        keep: bool,
    },
    Payload {
        left: usize,
    },
}

/// Parser of one lane.
#[derive(Debug)]
pub(crate) struct FrameParser {
    state: State,
    input: VecDeque<Bytes>,
    prefix: [u8; PREFIX_LEN],
    prefix_len: usize,
    /// Bytes of the message not yet consumed.
    left: usize,
    varint: u64,
    varint_shift: u32,
    /// Known fields other than the payload, as they came.
    head: BytesMut,
    /// Bytes of the tag under way, which goes into `head` when it is kept.
    tag: BytesMut,
    payload: Option<Rope>,
    /// The head went out before the payload.
    head_out: bool,
    /// Known fields in the message so far.
    item_count: u64,
    max_message_bytes: usize,
    max_head_bytes: usize,
}

impl FrameParser {
    /// A parser that takes messages of at most `max_message_bytes`, of which at
    /// most `max_head_bytes` beside the payload.
    pub(crate) fn new(max_message_bytes: usize, max_head_bytes: usize) -> Self {
        FrameParser {
            state: State::Prefix,
            input: VecDeque::new(),
            prefix: [0; PREFIX_LEN],
            prefix_len: 0,
            left: 0,
            varint: 0,
            varint_shift: 0,
            head: BytesMut::new(),
            tag: BytesMut::new(),
            payload: None,
            head_out: false,
            item_count: 0,
            max_message_bytes,
            max_head_bytes,
        }
    }

    /// Changes the limits for the messages that follow.
    pub(crate) fn set_limits(&mut self, max_message_bytes: usize, max_head_bytes: usize) {
        self.max_message_bytes = max_message_bytes;
        self.max_head_bytes = max_head_bytes;
    }

    /// Whether the stream may end here.
    pub(crate) fn is_at_boundary(&self) -> bool {
        matches!(self.state, State::Prefix) && self.prefix_len == 0 && self.input.is_empty()
    }

    /// Adds a piece of the stream.
    pub(crate) fn feed(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.input.push_back(piece);
        }
    }

    /// The next event, or `None` until more is fed.
    pub(crate) fn next_event(&mut self) -> Result<Option<Event>, WireError> {
        loop {
            if let State::Tag = self.state
                && self.left == 0
                && self.varint_shift == 0
            {
                if let Some(event) = self.end_of_message()? {
                    return Ok(Some(event));
                }
                continue;
            }
            let Some(mut piece) = self.input.pop_front() else {
                return Ok(None);
            };
            let event = self.step(&mut piece);
            if !piece.is_empty() {
                self.input.push_front(piece);
            }
            if let Some(event) = event? {
                return Ok(Some(event));
            }
        }
    }

    fn step(&mut self, piece: &mut Bytes) -> Result<Option<Event>, WireError> {
        match self.state {
            State::Prefix => self.step_prefix(piece)?,
            State::Tag => {
                let Some(tag) = self.step_varint(piece, true)? else {
                    return Ok(None);
                };
                return self.begin_field(tag);
            }
            State::Varint { keep } => {
                let Some(value) = self.step_varint(piece, false)? else {
                    return Ok(None);
                };
                if keep {
                    prost::encoding::encode_varint(value, &mut self.head);
                }
                self.state = State::Tag;
            }
            State::Length { field, keep } => {
                let Some(len) = self.step_varint(piece, false)? else {
                    return Ok(None);
                };
                let len = usize::try_from(len).unwrap_or(usize::MAX);
                if len > self.left {
                    return Err(malformed("a field runs past its message"));
                }
                if field == PAYLOAD_FIELD {
                    return self.begin_payload(len);
                }
                if keep {
                    prost::encoding::encode_varint(len as u64, &mut self.head);
                }
                self.begin_run(len, keep)?;
            }
            State::Run { left, keep } => {
                let part = self.take(piece, left);
                if keep {
                    self.head.extend_from_slice(&part);
                }
                let left = left - part.len();
                self.state = if left == 0 {
                    State::Tag
                } else {
                    State::Run { left, keep }
                };
            }
            State::Payload { left } => {
                let part = self.take(piece, left);
                let left = left - part.len();
                if let Some(rope) = &mut self.payload {
                    rope.push(part);
                }
                self.state = if left == 0 {
                    State::Tag
                } else {
                    State::Payload { left }
                };
            }
        }
        Ok(None)
    }

    fn step_prefix(&mut self, piece: &mut Bytes) -> Result<(), WireError> {
        let n = (PREFIX_LEN - self.prefix_len).min(piece.len());
        self.prefix[self.prefix_len..self.prefix_len + n].copy_from_slice(&piece[..n]);
        piece.advance(n);
        self.prefix_len += n;
        if self.prefix_len < PREFIX_LEN {
            return Ok(());
        }
        let [flag, len @ ..] = self.prefix;
        match flag {
            0 => {}
            1 => return Err(WireError::Compressed),
            other => return Err(malformed(&format!("compression flag {other}"))),
        }
        self.left = u32::from_be_bytes(len) as usize;
        if self.left > self.max_message_bytes {
            return Err(WireError::TooLarge {
                found: self.left as u64,
                limit: self.max_message_bytes as u64,
            });
        }
        self.prefix_len = 0;
        self.head.clear();
        self.item_count = 0;
        self.payload = None;
        self.head_out = false;
        self.state = State::Tag;
        Ok(())
    }

    /// Consumes bytes of a varint; the value once it is complete.
    fn step_varint(&mut self, piece: &mut Bytes, is_tag: bool) -> Result<Option<u64>, WireError> {
        while !piece.is_empty() {
            if self.left == 0 {
                return Err(malformed("the message ends inside a number"));
            }
            if self.varint_shift >= 64 {
                return Err(malformed("a number is longer than 10 bytes"));
            }
            let byte = piece.get_u8();
            self.left -= 1;
            if self.varint_shift == 63 && byte > 1 {
                return Err(malformed("a number does not fit in 64 bits"));
            }
            if is_tag {
                self.tag.extend_from_slice(&[byte]);
            }
            self.varint |= u64::from(byte & 0x7f) << self.varint_shift;
            self.varint_shift += 7;
            if byte & 0x80 == 0 {
                self.varint_shift = 0;
                return Ok(Some(std::mem::take(&mut self.varint)));
            }
        }
        if self.left == 0 {
            return Err(malformed("the message ends inside a number"));
        }
        Ok(None)
    }

    fn begin_field(&mut self, tag: u64) -> Result<Option<Event>, WireError> {
        let (field, wire_type) = (tag >> 3, tag & 7);
        let tag_bytes = self.tag.split();
        let keep = is_known(field);
        if field == 0 || tag > u64::from(u32::MAX) {
            return Err(malformed(&format!("there is no field {field}")));
        }
        if field == PAYLOAD_FIELD && wire_type != 2 {
            return Err(malformed("the payload is not bytes"));
        }
        if keep {
            if self.head_out {
                return Err(bad_frame("fields stand both before and after the payload"));
            }
            self.item_count += 1;
            if self.item_count > MAX_ITEMS {
                return Err(WireError::TooLarge {
                    found: self.item_count,
                    limit: MAX_ITEMS,
                });
            }
            self.head.extend_from_slice(&tag_bytes);
        }
        self.state = match wire_type {
            0 => State::Varint { keep },
            1 => return self.begin_run(8, keep).map(|()| None),
            2 => State::Length { field, keep },
            5 => return self.begin_run(4, keep).map(|()| None),
            other => return Err(malformed(&format!("wire type {other} in field {field}"))),
        };
        Ok(None)
    }

    fn begin_run(&mut self, left: usize, keep: bool) -> Result<(), WireError> {
        if left > self.left {
            return Err(malformed("a field runs past its message"));
        }
        if keep && self.head.len() + left > self.max_head_bytes {
            return Err(WireError::TooLarge {
                found: (self.head.len() + left) as u64,
                limit: self.max_head_bytes as u64,
            });
        }
        self.state = if left == 0 {
            State::Tag
        } else {
            State::Run { left, keep }
        };
        Ok(())
    }

    fn begin_payload(&mut self, len: usize) -> Result<Option<Event>, WireError> {
        if self.payload.is_some() {
            return Err(bad_frame("the payload stands twice in one frame"));
        }
        self.payload = Some(Rope::default());
        self.state = if len == 0 {
            State::Tag
        } else {
            State::Payload { left: len }
        };
        if self.head.is_empty() {
            // The head comes late: keep the payload until the message ends.
            return Ok(None);
        }
        self.head_out = true;
        Ok(Some(Event::Head {
            frame: self.decode_head()?,
            payload_len: len,
        }))
    }

    /// The message is complete. A payload whose head is out, or nothing but a
    /// head, is one event; a late head makes two.
    fn end_of_message(&mut self) -> Result<Option<Event>, WireError> {
        if self.head_out || self.payload.is_none() {
            self.state = State::Prefix;
        }
        if self.head_out {
            return Ok(self.payload.take().map(Event::Payload));
        }
        let payload_len = self.payload.as_ref().map_or(0, Rope::len);
        self.head_out = true;
        Ok(Some(Event::Head {
            frame: self.decode_head()?,
            payload_len,
        }))
    }

    fn decode_head(&self) -> Result<Box<pb::SenderFrame>, WireError> {
        pb::SenderFrame::decode(&self.head[..])
            .map(Box::new)
            .map_err(|e| malformed(&e.to_string()))
    }

    fn take(&mut self, piece: &mut Bytes, most: usize) -> Bytes {
        let part = piece.split_to(most.min(piece.len()));
        self.left -= part.len();
        part
    }
}

/// Fields of SenderFrame that this version knows, other than the payload.
fn is_known(field: u64) -> bool {
    matches!(field, 1..=5 | 8..=10)
}

fn malformed(why: &str) -> WireError {
    WireError::Malformed(why.to_owned())
}

fn bad_frame(why: &str) -> WireError {
    crate::protocol::ProtocolError::new(crate::protocol::Reason::BadFrame, why).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::BufMut;

    fn chunk_frame(entry: u32, payload: &[u8]) -> pb::SenderFrame {
        pb::SenderFrame {
            chunks: vec![pb::ChunkHead {
                entry,
                offset: 1 << 40,
                raw_len: payload.len() as u32,
                encoded_len: payload.len() as u32,
                codec: 0,
                crc32c: 7,
            }],
            payload: Bytes::copy_from_slice(payload),
            ..Default::default()
        }
    }

    fn message(body: &[u8]) -> Vec<u8> {
        let mut out = vec![0];
        out.put_u32(body.len() as u32);
        out.extend_from_slice(body);
        out
    }

    /// Runs a stream through the parser in pieces of `step` bytes.
    fn run(stream: &[u8], step: usize) -> Result<Vec<(pb::SenderFrame, Vec<u8>)>, WireError> {
        let mut parser = FrameParser::new(1 << 20, 1 << 16);
        let mut out: Vec<(pb::SenderFrame, Vec<u8>)> = Vec::new();
        for piece in stream.chunks(step) {
            parser.feed(Bytes::copy_from_slice(piece));
            while let Some(event) = parser.next_event()? {
                match event {
                    Event::Head { frame, .. } => out.push((*frame, Vec::new())),
                    Event::Payload(rope) => {
                        let bytes = rope.parts().flat_map(|p| p.to_vec()).collect();
                        out.last_mut().unwrap().1 = bytes;
                    }
                }
            }
        }
        assert!(parser.is_at_boundary());
        Ok(out)
    }

    #[test]
    fn frames_survive_every_split_of_the_stream() {
        let payloads: [&[u8]; 4] = [b"", b"x", &[5; 300], &[9; 129]];
        let mut stream = Vec::new();
        for (i, payload) in payloads.iter().enumerate() {
            stream.extend(message(&chunk_frame(i as u32, payload).encode_to_vec()));
        }
        for step in 1..stream.len() {
            let frames = run(&stream, step).unwrap();
            assert_eq!(frames.len(), 4);
            for (i, (frame, payload)) in frames.iter().enumerate() {
                assert_eq!(frame.chunks[0].entry, i as u32);
                assert_eq!(payload, payloads[i], "step {step}");
            }
        }
    }

    #[test]
    fn a_head_after_the_payload_is_replayed_and_unknown_fields_are_skipped() {
        let frame = chunk_frame(3, b"hello");
        let head = pb::SenderFrame {
            payload: Bytes::new(),
            ..frame.clone()
        }
        .encode_to_vec();
        let mut body = vec![0x7a, 5];
        body.extend_from_slice(b"hello");
        // Unknown: field 20 varint, field 21 bytes, field 22 fixed32, 23 fixed64.
        body.extend_from_slice(&[0xa0, 1, 0x96, 1, 0xaa, 1, 2, 1, 2]);
        body.extend_from_slice(&[0xb5, 1, 1, 2, 3, 4, 0xb9, 1, 1, 2, 3, 4, 5, 6, 7, 8]);
        body.extend_from_slice(&head);
        let stream = message(&body);
        for step in [1, 2, 3, stream.len()] {
            let frames = run(&stream, step).unwrap();
            assert_eq!(frames.len(), 1);
            assert_eq!(frames[0].0.chunks, frame.chunks);
            assert_eq!(frames[0].1, b"hello");
        }
    }

    #[test]
    fn bad_messages_are_refused() {
        let frame = chunk_frame(1, b"hello").encode_to_vec();
        let head = pb::SenderFrame {
            payload: Bytes::new(),
            ..chunk_frame(1, b"hello")
        };
        let mut both = frame.clone();
        both.extend(head.encode_to_vec());
        let mut twice = frame.clone();
        twice.extend_from_slice(&[0x7a, 1, 0]);
        let long_varint = [0x80; 11];
        for body in [
            &both[..],
            &twice[..],
            &long_varint[..],
            &[0x7a, 200, 1],
            &[0x0b],
            &[0x80],
            // Field 0, field 2^29, and a number of 65 bits in an unknown field.
            &[0, 0],
            &[0x80, 0x80, 0x80, 0x80, 0x10, 0],
            &[0xa0, 1, 255, 255, 255, 255, 255, 255, 255, 255, 255, 2],
        ] {
            assert!(run(&message(body), 7).is_err(), "{body:?}");
        }
        let mut compressed = message(&frame);
        compressed[0] = 1;
        assert!(matches!(run(&compressed, 9), Err(WireError::Compressed)));
        let huge = [0, 0x7f, 0xff, 0xff, 0xff];
        assert!(matches!(run(&huge, 5), Err(WireError::TooLarge { .. })));
    }

    #[test]
    fn a_rope_splits_without_losing_a_byte() {
        let mut rope = Rope::default();
        for part in ["ab", "", "cdef", "g"] {
            rope.push(Bytes::from_static(part.as_bytes()));
        }
        let head = rope.split_to(3);
        let text = |r: &Rope| r.parts().flat_map(|p| p.to_vec()).collect::<Vec<_>>();
        assert_eq!(
            (text(&head), text(&rope)),
            (b"abc".to_vec(), b"defg".to_vec())
        );
        assert_eq!((head.len(), rope.len()), (3, 4));
    }
}
