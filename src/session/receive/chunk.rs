//! From the bytes of a chunk to a cell in its file: decoded and summed by a CPU
//! worker, written by an I/O thread.

use super::Session;
use crate::{
    format::{
        checksum,
        codec::{self, Codec, CodecError},
    },
    plan::CellId,
    protocol::{ChunkHead, PipelineStage, Placement, ProtocolError, Reason, Ticket},
    session::{
        buffers::Reserved,
        stages::Held,
        workers::{on_cpu, on_io},
    },
    wire::Rope,
};
use bytes::Bytes;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Instant,
};

/// Raw bytes of small chunks that go through the workers together.
const JOB_BYTES: usize = 64 << 10;
/// Bytes that one thread writes to a file before other jobs get its place.
const TURN_BYTES: usize = 16 << 20;
/// What a zero cell is written from.
static ZEROS: [u8; 256 << 10] = [0; 256 << 10];

/// A chunk whose head has come and whose bytes have not.
pub(super) struct Pending {
    /// `None`: a duplicate, whose bytes are dropped.
    ticket: Option<Ticket>,
    codec: Codec,
    encoded_len: usize,
    /// Memory for all chunks of the frame.
    reserved: Arc<Reserved>,
}

impl Pending {
    pub(super) fn new(ticket: Option<Ticket>, head: &ChunkHead, reserved: &Arc<Reserved>) -> Self {
        Pending {
            ticket,
            // The role has refused what it does not know.
            codec: Codec::from_id(head.codec).unwrap_or(Codec::None),
            encoded_len: head.encoded_len as usize,
            reserved: Arc::clone(reserved),
        }
    }
}

/// Hands the chunks of one frame to the workers. Passing a job from thread to thread
/// costs as much as writing a small file, so small chunks go together.
pub(super) fn take_payload(session: &Arc<Session>, pending: Vec<Pending>, mut rope: Rope) {
    let mut job = Vec::new();
    let mut job_bytes = 0;
    for chunk in pending {
        let encoded = rope.split_to(chunk.encoded_len);
        let Some(ticket) = chunk.ticket else { continue };
        // The sender had more to read than to send.
        let spared = u64::from(ticket.raw_len).saturating_sub(chunk.encoded_len as u64);
        session.heard_bytes.fetch_add(spared, Ordering::Relaxed);
        job_bytes += ticket.raw_len as usize;
        job.push((ticket, chunk.codec, encoded, chunk.reserved));
        if job_bytes >= JOB_BYTES {
            spawn_verify(session, std::mem::take(&mut job));
            job_bytes = 0;
        }
    }
    if !job.is_empty() {
        spawn_verify(session, job);
    }
}

type Arrived = (Ticket, Codec, Rope, Arc<Reserved>);

fn spawn_verify(session: &Arc<Session>, job: Vec<Arrived>) {
    let raw_len: usize = job.iter().map(|(ticket, ..)| ticket.raw_len as usize).sum();
    let held = session.stages.hold(raw_len as u64);
    session.job(on_cpu, move |session| {
        let mut work = session.stages.work(PipelineStage::Codec);
        #[cfg(test)]
        session.stages.slow(PipelineStage::Codec, raw_len);
        // All of a job before any is summed: the clock is read once for each stage.
        let decoded = |(ticket, codec, encoded, reserved): Arrived| match decode(
            codec,
            encoded,
            ticket.raw_len as usize,
        ) {
            Ok(raw) => Some((ticket, raw, reserved)),
            Err(error) => {
                let error = ProtocolError::new(Reason::BadCompression, error.to_string());
                session.fail(error);
                None
            }
        };
        let decoded: Vec<_> = job.into_iter().filter_map(decoded).collect();
        work.turn_to(PipelineStage::Checksum);
        #[cfg(test)]
        session.stages.slow(PipelineStage::Checksum, raw_len);
        let mut writes: Vec<Write> = Vec::with_capacity(decoded.len());
        for (ticket, raw, _reserved) in decoded {
            if let Some(placement) = verify(session, ticket, &raw) {
                writes.push(Write {
                    placement,
                    raw,
                    _reserved,
                });
            }
        }
        drop(work);
        spawn_place(
            session,
            Job {
                writes,
                _held: held,
            },
        );
    });
}

/// A verified chunk on its way to its file.
#[derive(Debug)]
struct Write {
    placement: Placement,
    raw: Rope,
    _reserved: Arc<Reserved>,
}

/// Chunks that are written together.
#[derive(Debug)]
pub(super) struct Job {
    writes: Vec<Write>,
    _held: Held,
}

/// Stands for the file that all tensors share; no entry has this number.
const CONTAINER_TURN: u32 = u32::MAX;

/// Chunks that are not the whole of their file take turns at it.
fn spawn_place(session: &Arc<Session>, job: Job) {
    let file = match &job.writes[..] {
        [] => return,
        [one] if one.placement.slot().data_offset.is_some() => CONTAINER_TURN,
        [one] if !one.placement.is_whole() => one.placement.slot().number,
        _ => return session.job(on_io, move |session| place_all(session, job)),
    };
    let Some(first) = session.turns.begin(file, job) else {
        return;
    };
    session.job(on_io, move |session| write_in_turn(session, file, first));
}

/// Writes what waits at a file, and after a while lets the jobs of others go first: there
/// are few I/O threads, for all sessions.
fn write_in_turn(session: &Arc<Session>, file: u32, first: Job) {
    let mut next = Some(first);
    let mut written_bytes = 0;
    while let Some(job) = next {
        if written_bytes >= TURN_BYTES {
            return session.job(on_io, move |session| write_in_turn(session, file, job));
        }
        written_bytes += job
            .writes
            .iter()
            .map(|write| write.raw.len())
            .sum::<usize>();
        place_all(session, job);
        next = session.turns.next(file);
    }
}

/// On an I/O thread.
fn place_all(session: &Arc<Session>, job: Job) {
    let _work = session.stages.work(PipelineStage::Place);
    #[cfg(test)]
    session.stages.slow(
        PipelineStage::Place,
        job.writes.iter().map(|write| write.raw.len()).sum(),
    );
    for write in job.writes {
        place(session, write);
    }
    // So that the role is asked at once for what follows from it.
    session.wake.notify_one();
}

/// On a CPU worker: the checksum of the raw bytes, and with it the right to write them.
fn verify(session: &Session, ticket: Ticket, raw: &Rope) -> Option<Placement> {
    let found = match session.rehearsal {
        Some(rehearsal) if rehearsal.skips_checksums => ticket.crc32c,
        _ => checksum::crc32c_of_parts(raw.parts().map(|p| &p[..])),
    };
    if found != ticket.crc32c && !crate::mutant::is("no_crc") {
        if let Err(error) = session.core().reject(ticket, found) {
            session.fail(error);
        }
        return None;
    }
    session.core().grant(ticket)
}

/// On an I/O thread: the only write of this cell.
fn place(session: &Arc<Session>, write: Write) {
    let Write {
        placement,
        raw,
        _reserved,
    } = write;
    if session.rehearsal.is_some_and(|r| r.skips_files) {
        let written = placement.into_written();
        return session.core().written(written, Instant::now());
    }
    let cell = CellId {
        entry: placement.slot().number,
        cell: placement.offset() / u64::from(session.accept.chunk_len),
    };
    match session.staging.files().write(placement, raw.parts()) {
        Ok(written) => {
            if let Some(progress) = &session.progress {
                progress.count_received(cell, raw.len() as u32);
            }
            session.core().written(written, Instant::now());
        }
        Err((placement, error)) => {
            session.core().abandon(placement);
            session.fail(error);
        }
    }
}

fn decode(codec: Codec, encoded: Rope, raw_len: usize) -> Result<Rope, CodecError> {
    let mut rope = Rope::default();
    match codec {
        Codec::None => return Ok(encoded),
        Codec::Zero => {
            let mut left = raw_len;
            while left > 0 {
                let part = Bytes::from_static(&ZEROS[..left.min(ZEROS.len())]);
                left -= part.len();
                rope.push(part);
            }
        }
        _ => {
            let mut flat = Vec::with_capacity(encoded.len());
            encoded.parts().for_each(|p| flat.extend_from_slice(p));
            let mut raw = vec![0; raw_len];
            codec::decode_into(codec, &flat, &mut raw)?;
            rope.push(Bytes::from(raw));
        }
    }
    Ok(rope)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes_of(rope: &Rope) -> Vec<u8> {
        rope.parts().flat_map(|p| p.to_vec()).collect()
    }

    #[test]
    fn chunks_are_decoded_to_their_raw_length() {
        let rope = |bytes: &[u8]| {
            let mut rope = Rope::default();
            bytes
                .chunks(3)
                .for_each(|part| rope.push(Bytes::copy_from_slice(part)));
            rope
        };
        for len in [1, ZEROS.len(), ZEROS.len() * 2 + 5] {
            let raw = decode(Codec::Zero, Rope::default(), len).unwrap();
            assert_eq!(bytes_of(&raw), vec![0; len]);
        }
        let raw: Vec<u8> = (0..9000u32).map(|i| (i % 7) as u8).collect();
        let encoded = codec::encode_lz4(&raw).unwrap();
        assert_eq!(
            bytes_of(&decode(Codec::Lz4, rope(&encoded), raw.len()).unwrap()),
            raw
        );
        assert!(decode(Codec::Lz4, rope(&encoded), raw.len() - 1).is_err());
        let filled = decode(Codec::Fill, rope(&[1, 2, 3, 4]), 12).unwrap();
        assert_eq!(bytes_of(&filled), [1, 2, 3, 4].repeat(3));
    }
}
