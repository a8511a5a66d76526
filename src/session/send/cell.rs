//! From cells of the source to chunks ready to go: read by an I/O thread into a
//! pooled buffer, summed and encoded by a CPU worker. Small cells go through it in
//! runs, which are one buffer and, where they follow each other in a file, one read.

use super::{Prepared, Session};
use crate::{
    format::{
        checksum,
        codec::{Codec, Encoded},
    },
    plan::CellId,
    protocol::{ChunkHead, PipelineStage},
    session::{
        buffers::Reserved,
        error::SendError,
        workers::{on_cpu, on_io},
    },
    source::{Extent, InPlace, MappedRun, ReadMode, SourceError},
};
use bytes::Bytes;
use std::sync::Arc;
use tokio::sync::mpsc::error::TrySendError;

/// Cells shorter than this share a run.
pub(super) const SMALL_BYTES: u32 = 64 << 10;
/// Most cells of a run.
pub(super) const RUN_CELLS: usize = 512;

/// Encoded bytes with their share of the budget.
struct EncodedBuffer {
    bytes: Vec<u8>,
    _reserved: Arc<Reserved>,
}

impl AsRef<[u8]> for EncodedBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Has cells read and queued for the lanes, in their order.
pub(super) fn prepare(session: &Arc<Session>, cells: Vec<(CellId, Extent)>, reserved: Reserved) {
    if let Some(rehearsal) = session.context.rehearsal.filter(|r| r.skips_files) {
        let len = cells.iter().map(|(_, extent)| extent.len as usize).sum();
        let reserved = Arc::new(reserved);
        let raw = Raw {
            bytes: rehearsal.payload(len, &reserved),
            reserved,
            mapped: None,
        };
        return session.job(on_cpu, move |session| sum_and_queue(session, &cells, raw));
    }
    session.job(on_io, move |session| {
        match read(session, &cells, reserved) {
            Ok(raw) => session.job(on_cpu, move |session| sum_and_queue(session, &cells, raw)),
            Err(error) => session.fail(error),
        }
    });
}

/// The bytes of a run of cells, with their share of the budget.
struct Raw {
    bytes: Bytes,
    reserved: Arc<Reserved>,
    /// Where they are a part of a mapped file.
    mapped: Option<MappedRun>,
}

/// Long cells are taken where they are, short ones are gathered in a buffer.
fn read(
    session: &Session,
    cells: &[(CellId, Extent)],
    reserved: Reserved,
) -> Result<Raw, SourceError> {
    let len = cells.iter().map(|(_, extent)| extent.len as usize).sum();
    let _work = session.stages.work(PipelineStage::Read);
    #[cfg(test)]
    session.stages.slow(PipelineStage::Read, len);
    let source = &session.context.source;
    if let [(_, extent)] = cells
        && extent.len >= SMALL_BYTES
    {
        let maps = session.context.read_mode != ReadMode::Pread;
        match source.in_place(*extent, maps)? {
            Some(InPlace::Mapped(run)) => {
                run.populate()?;
                let reserved = Arc::new(reserved);
                return Ok(Raw {
                    bytes: run.bytes(Arc::clone(&reserved)),
                    reserved,
                    mapped: Some(run),
                });
            }
            Some(InPlace::Memory(bytes)) => {
                return Ok(Raw {
                    bytes,
                    reserved: Arc::new(reserved),
                    mapped: None,
                });
            }
            None => {}
        }
    }
    let mut buffer = session.pool.take(len, reserved);
    let extents = cells.iter().map(|(_, extent)| *extent);
    source.read_extents(extents, buffer.as_mut())?;
    let reserved = buffer.reserved();
    Ok(Raw {
        bytes: Bytes::from_owner(buffer),
        reserved,
        mapped: None,
    })
}

fn sum_and_queue(session: &Session, cells: &[(CellId, Extent)], raw: Raw) {
    let Raw {
        bytes: buffer,
        reserved,
        mapped,
    } = raw;
    let mut work = session.stages.work(PipelineStage::Checksum);
    // All of a run before any is encoded: the clock is read once for each stage.
    let crcs = match session.context.rehearsal {
        Some(rehearsal) if rehearsal.skips_checksums => vec![0; cells.len()],
        _ => crcs_of(cells, &buffer),
    };
    #[cfg(test)]
    session.stages.slow(PipelineStage::Checksum, buffer.len());
    work.turn_to(PipelineStage::Codec);
    #[cfg(test)]
    session.stages.slow(PipelineStage::Codec, buffer.len());
    let mut codecs = 0;
    let mut at = 0;
    for ((cell, extent), crc32c) in cells.iter().zip(crcs) {
        let raw = buffer.slice(at..at + extent.len as usize);
        at += raw.len();
        let source = &session.context.source;
        let item_len = source.with_entry(extent.entry_index, |entry| entry.header.item_len());
        let (codec, bytes) = match session.encoder.encode(&raw, item_len.unwrap_or(1)) {
            Encoded::Raw => (Codec::None, raw),
            // A constant chunk takes no memory worth counting.
            Encoded::As(codec, bytes) if codec.is_constant() => (codec, Bytes::from(bytes)),
            Encoded::As(codec, bytes) => {
                let _reserved = Arc::clone(&reserved);
                (codec, Bytes::from_owner(EncodedBuffer { bytes, _reserved }))
            }
        };
        codecs |= codec.bit();
        let head = ChunkHead {
            entry: cell.entry,
            offset: extent.offset,
            raw_len: extent.len,
            encoded_len: bytes.len() as u32,
            codec: codec.id(),
            crc32c,
        };
        // The file may have been cut while it was looked at.
        if let Some(Err(error)) = mapped.as_ref().map(MappedRun::check) {
            return session.fail(error);
        }
        let cell = *cell;
        // There is room for every cell in flight; closed once the session is over.
        match session.prepared.try_send(Prepared { cell, head, bytes }) {
            Ok(()) => {}
            // The session is over.
            Err(TrySendError::Closed(_)) => return,
            Err(TrySendError::Full(_)) => {
                return session.fail(SendError::Bug(
                    "more cells were in flight than may be".to_owned(),
                ));
            }
        }
    }
    session.context.progress.count_codecs(codecs);
}

/// CRC-32C of each cell of a run.
fn crcs_of(cells: &[(CellId, Extent)], mut bytes: &[u8]) -> Vec<u32> {
    let sum = |(_, extent): &(CellId, Extent)| {
        let (raw, rest) = bytes.split_at(extent.len as usize);
        bytes = rest;
        checksum::crc32c(raw)
    };
    cells.iter().map(sum).collect()
}
