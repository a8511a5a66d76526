//! Deflated members of a zip archive, read at any place.
//!
//! A deflated stream can only be read from its start. Cells are asked for nearly in
//! order, so where a read ended the decoder is kept (44 KiB), and the next read goes on
//! from the last one that stands before it. What lies further back than those that are
//! kept is inflated again from the start.

use super::derived::Derived;
use super::view::{Refusal, View};
use super::{SourceError, files::FileTable, zip::Member};
use crate::plan::clip;
use crc_fast::{CrcAlgorithm, Digest};
use miniz_oxide::inflate::TINFLStatus;
use miniz_oxide::inflate::core::{DecompressorOxide, decompress_with_limit, inflate_flags};
use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Decoders kept for one archive: 44 KiB each.
const MAX_KEPT: usize = 64;
/// How far back a stream may point.
const WINDOW_LEN: usize = 32 << 10;
/// Bytes read from the file at a time.
const INPUT_LEN: u64 = 64 << 10;
/// A byte of a deflated stream is at most so many of its content.
const MAX_RATIO: u64 = 1032;

/// A decoder in the middle of a stream.
#[derive(Clone)]
struct Decoder {
    state: Box<DecompressorOxide>,
    /// What was inflated last; wraps.
    window: Box<[u8]>,
    /// Bytes consumed and produced.
    consumed: u64,
    produced: u64,
    sum: Digest,
    is_done: bool,
}

/// Where a deflated stream is, and what it must become.
#[derive(Clone, Debug)]
struct Stream {
    name: String,
    offset: u64,
    stored_len: u64,
    byte_len: u64,
    crc32: u32,
}

/// The decoders kept for one archive, those used last at the end.
#[derive(Default)]
pub(super) struct Kept(Mutex<VecDeque<(u64, Decoder)>>);

impl std::fmt::Debug for Kept {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Kept")
    }
}

/// A deflated member without its first bytes.
#[derive(Debug)]
pub(super) struct Inflated {
    file_index: u32,
    stream: Stream,
    /// Bytes of the content that stand before the entry.
    skip: u64,
    kept: Arc<Kept>,
    /// One at a time: each goes on where the other ended.
    turn: Mutex<()>,
}

impl Inflated {
    pub(super) fn new(
        view: View<'_>,
        member: &Member,
        file_index: u32,
        skip: u64,
        kept: &Arc<Kept>,
    ) -> Self {
        Inflated {
            file_index,
            stream: Stream::new(view, member),
            skip,
            kept: Arc::clone(kept),
            turn: Mutex::new(()),
        }
    }
}

impl Derived for Inflated {
    fn read_at(&self, files: &FileTable, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        let offset = offset.saturating_add(self.skip);
        let mut decoder = self
            .kept
            .before(self.stream.offset, offset)
            .unwrap_or_default();
        let read = |at, input: &mut [u8]| files.read_at(self.file_index, at, input);
        let malformed = |why: String| {
            let path = files.path(self.file_index);
            let at = self.stream.offset;
            SourceError::malformed(path, format!("at byte {at}: {why}"))
        };
        decoder.fill(&self.stream, offset, buf, read, malformed)?;
        self.kept.put(self.stream.offset, decoder);
        Ok(())
    }
}

/// The first bytes of a deflated member; fewer when it has fewer.
pub(super) fn prefix(view: View<'_>, member: &Member, len: u64) -> Result<Vec<u8>, Refusal> {
    let limit = member.stored_len.saturating_mul(MAX_RATIO);
    if member.byte_len > limit {
        let why = format!(
            "{:?}: {} deflated bytes cannot be {}",
            clip(&member.name),
            member.stored_len,
            member.byte_len
        );
        return Err(view.malformed(member.data_offset, why));
    }
    let stream = Stream::new(view, member);
    let len = usize::try_from(len.min(member.byte_len)).unwrap_or(usize::MAX);
    // Grows with what the stream really holds.
    let mut bytes = Vec::new();
    let mut decoder = Decoder::default();
    while bytes.len() < len {
        let mut next = vec![0; (len - bytes.len()).min(WINDOW_LEN)];
        let read = |at: u64, input: &mut [u8]| {
            let at = at - view.absolute(0);
            input.copy_from_slice(&view.read(at, input.len() as u64)?);
            Ok(())
        };
        let malformed = |why| view.malformed(member.data_offset, why);
        decoder.fill(&stream, bytes.len() as u64, &mut next, read, malformed)?;
        bytes.append(&mut next);
    }
    Ok(bytes)
}

impl Stream {
    fn new(view: View<'_>, member: &Member) -> Self {
        Stream {
            name: clip(&member.name),
            offset: view.absolute(member.data_offset),
            stored_len: member.stored_len,
            byte_len: member.byte_len,
            crc32: member.crc32,
        }
    }
}

impl Kept {
    /// A copy of the decoder of a stream that stands nearest before a place.
    fn before(&self, stream: u64, offset: u64) -> Option<Decoder> {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let nearest = (kept.iter().enumerate())
            .filter(|(_, (of, decoder))| *of == stream && decoder.produced <= offset)
            .max_by_key(|(_, (_, decoder))| decoder.produced)
            .map(|(index, _)| index)?;
        let found = kept.remove(nearest)?;
        let decoder = found.1.clone();
        kept.push_back(found);
        Some(decoder)
    }

    fn put(&self, stream: u64, decoder: Decoder) {
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        kept.retain(|(of, known)| *of != stream || known.produced != decoder.produced);
        if kept.len() >= MAX_KEPT {
            kept.pop_front();
        }
        kept.push_back((stream, decoder));
    }
}

impl Default for Decoder {
    fn default() -> Self {
        Decoder {
            state: Box::default(),
            window: vec![0; WINDOW_LEN].into(),
            consumed: 0,
            produced: 0,
            sum: Digest::new(CrcAlgorithm::Crc32IsoHdlc),
            is_done: false,
        }
    }
}

impl Decoder {
    /// Inflates up to the end of a run of the content, which begins at or after the place
    /// where this stands, and puts the run into `buf`. Checks the sum at the end.
    fn fill<E>(
        &mut self,
        stream: &Stream,
        offset: u64,
        buf: &mut [u8],
        mut read: impl FnMut(u64, &mut [u8]) -> Result<(), E>,
        malformed: impl Fn(String) -> E,
    ) -> Result<(), E> {
        let end = offset + buf.len() as u64;
        let bad = |what: &str, at: u64| {
            malformed(format!(
                "{:?}: {what} after {at} bytes of content",
                stream.name
            ))
        };
        let mut input = Vec::new();
        let mut input_at = 0;
        while self.produced < end || (end == stream.byte_len && !self.is_done) {
            if self.is_done {
                return Err(bad("its deflated bytes end", self.produced));
            }
            if input_at == input.len() {
                let rest = stream.stored_len - self.consumed;
                input.resize(rest.min(INPUT_LEN) as usize, 0);
                read(stream.offset + self.consumed, &mut input)?;
                input_at = 0;
            }
            let has_more = self.consumed + ((input.len() - input_at) as u64) < stream.stored_len;
            let flags = u32::from(has_more) * inflate_flags::TINFL_FLAG_HAS_MORE_INPUT;
            let at = (self.produced % WINDOW_LEN as u64) as usize;
            // Not further than was asked for, so that what is kept stands there.
            let room = (end - self.produced).min((WINDOW_LEN - at) as u64) as usize;
            let (state, window) = (&mut self.state, &mut self.window);
            let (status, used, made) =
                decompress_with_limit(state, &input[input_at..], window, at, room, flags);
            input_at += used;
            self.consumed += used as u64;
            let made_bytes = self.window.get(at..at + made).unwrap_or_default();
            self.sum.update(made_bytes);
            let skip = offset.saturating_sub(self.produced).min(made as u64) as usize;
            let to = (self.produced + skip as u64).saturating_sub(offset) as usize;
            if let Some(buf) = buf.get_mut(to..to + made - skip) {
                buf.copy_from_slice(&made_bytes[skip..]);
            }
            self.produced += made as u64;
            match status {
                TINFLStatus::Done => self.is_done = true,
                TINFLStatus::NeedsMoreInput | TINFLStatus::HasMoreOutput
                    if used > 0 || made > 0 => {}
                _ => return Err(bad("its deflated bytes are damaged", self.produced)),
            }
        }
        if self.is_done && self.produced == stream.byte_len {
            let found = self.sum.finalize() as u32;
            if found != stream.crc32 {
                let why = format!("crc-32 is {found:08x}, not {:08x}:", stream.crc32);
                return Err(bad(&why, self.produced));
            }
        }
        Ok(())
    }
}
