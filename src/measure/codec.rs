//! What one thread encodes and decodes.

use super::{PIECE_BYTES, Sample, Site, clock::Clock, memory::over_pieces, pieces};
use crate::format::codec::{Codec, constant_element, decode_into, encode_lz4};
use std::{hint::black_box, io};

/// LZ4 of sparse values.
pub(super) fn encode(site: &Site) -> io::Result<Sample> {
    let sparse = site.sparse();
    over_pieces(site, &sparse, |piece| {
        black_box(encode_lz4(piece));
    })
}

/// Back again. Bytes are those that come out.
pub(super) fn decode(site: &Site) -> io::Result<Sample> {
    let sparse = site.sparse();
    let encode = |chunk: &[u8]| encode_lz4(chunk).map(|encoded| (encoded, chunk.len()));
    let chunks: Vec<_> = sparse.chunks(PIECE_BYTES).filter_map(encode).collect();
    let rest = (site.bytes() % PIECE_BYTES as u64) as usize;
    // The last piece may be shorter, and is a block of its own.
    let short = sparse.get(..rest).and_then(encode_lz4);
    let mut raw = vec![1; PIECE_BYTES];
    let mut blocks = chunks.iter().cycle();
    let clock = Clock::start();
    for len in pieces(site.bytes()) {
        site.check()?;
        let encoded = match blocks.next() {
            Some((encoded, raw_len)) if *raw_len == len => encoded,
            _ => match &short {
                Some(encoded) => encoded,
                // A few bytes that do not shrink.
                None => continue,
            },
        };
        let raw = raw.get_mut(..len).unwrap_or_default();
        decode_into(Codec::Lz4, encoded, raw).map_err(io::Error::other)?;
        black_box(raw);
    }
    Ok(clock.stop(site.bytes()))
}

/// Chunks of one value.
pub(super) fn constant(site: &Site) -> io::Result<Sample> {
    let value = 0.25f32.to_le_bytes();
    let constant = value.repeat(site.noise().len() / value.len());
    over_pieces(site, &constant, |piece| {
        black_box(constant_element(piece, value.len()));
    })
}
