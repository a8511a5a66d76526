//! From a cell of the source to a chunk ready to go: read by an I/O thread into a
//! pooled buffer, summed and encoded by a CPU worker.

use super::{Prepared, Session};
use crate::{
    format::{
        checksum,
        codec::{Codec, Encoded},
    },
    plan::CellId,
    protocol::ChunkHead,
    session::{
        buffers::{PooledBuffer, Reserved},
        workers::{on_cpu, on_io},
    },
};
use bytes::Bytes;
use std::sync::Arc;

/// Encoded bytes with their share of the budget.
struct EncodedBuffer {
    bytes: Vec<u8>,
    _reserved: Option<Reserved>,
}

impl AsRef<[u8]> for EncodedBuffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

/// Has a cell read and queued for the lanes.
pub(super) fn prepare(session: &Arc<Session>, cell: CellId, reserved: Reserved) {
    let span = session.core().span(cell);
    let Some((offset, len)) = span else { return };
    session.job(on_io, move |session| {
        let mut buffer = session.pool.take(len as usize, reserved);
        if let Err(error) =
            session
                .context
                .source
                .read_at(cell.entry as usize, offset, buffer.as_mut())
        {
            return session.fail(error);
        }
        session.job(on_cpu, move |session| {
            sum_and_queue(session, cell, offset, buffer)
        });
    });
}

fn sum_and_queue(session: &Session, cell: CellId, offset: u64, buffer: PooledBuffer) {
    let raw_len = buffer.as_ref().len() as u32;
    let crc32c = checksum::crc32c(buffer.as_ref());
    let source = &session.context.source;
    let item_len = source.with_entry(cell.entry as usize, |entry| entry.header.item_len());
    let item_len = item_len.unwrap_or(1);
    let choice = session.context.codec;
    let (codec, bytes) = match choice.encode(session.codecs, buffer.as_ref(), item_len) {
        Encoded::Raw => (Codec::None, Bytes::from_owner(buffer)),
        // A constant chunk takes no memory worth counting.
        Encoded::As(codec @ (Codec::Zero | Codec::Fill), bytes) => (codec, Bytes::from(bytes)),
        Encoded::As(codec, bytes) => {
            let _reserved = buffer.into_reserved();
            (codec, Bytes::from_owner(EncodedBuffer { bytes, _reserved }))
        }
    };
    let head = ChunkHead {
        entry: cell.entry,
        offset,
        raw_len,
        encoded_len: bytes.len() as u32,
        codec: codec.id(),
        crc32c,
    };
    // Unbounded in form only: every chunk in it is part of the window.
    let _ = session.prepared.send(Prepared { cell, head, bytes });
}
