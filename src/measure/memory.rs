//! What one thread does with bytes that lie in memory.

use super::{Sample, Site, clock::Clock, pieces};
use crate::format::checksum::crc32c;
use std::{hint::black_box, io};

/// Copies into memory that was written before.
pub(super) fn copy(site: &Site) -> io::Result<Sample> {
    let from = site.noise();
    let mut to = from.to_vec();
    let mut at = 0;
    let clock = Clock::start();
    for len in pieces(site.bytes()) {
        site.check()?;
        if at + len > from.len() {
            at = 0;
        }
        if let (Some(from), Some(to)) = (from.get(at..at + len), to.get_mut(at..at + len)) {
            to.copy_from_slice(from);
        }
        at += len;
        black_box(&mut to);
    }
    Ok(clock.stop(site.bytes()))
}

/// Sums chunk by chunk.
pub(super) fn sum(site: &Site) -> io::Result<Sample> {
    over_pieces(site, site.noise(), |piece| {
        black_box(crc32c(piece));
    })
}

/// Gives `work` pieces of warm memory until all bytes were seen.
pub(super) fn over_pieces(
    site: &Site,
    memory: &[u8],
    mut work: impl FnMut(&[u8]),
) -> io::Result<Sample> {
    let mut at = 0;
    let clock = Clock::start();
    for len in pieces(site.bytes()) {
        site.check()?;
        if at + len > memory.len() {
            at = 0;
        }
        work(memory.get(at..at + len).unwrap_or_default());
        at += len;
    }
    Ok(clock.stop(site.bytes()))
}
