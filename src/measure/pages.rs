//! What fresh pages of a file cost.

use super::{Sample, Site, clock::Clock, pieces, site::allocate};
use crate::map::WriteMap;
use std::{fs::File, io, os::unix::fs::FileExt, time::Instant};

/// How the bytes get into the file, a piece at a time.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Way {
    Map,
    MapPopulated,
    Pwrite,
}

/// Fills a new file that has its blocks. Their allocation is told apart.
pub(super) fn fill(site: &Site, way: Way) -> io::Result<Sample> {
    let file = site.fresh_file()?;
    let begun = Instant::now();
    allocate(&file, site.bytes())?;
    let allocation = begun.elapsed();
    let noise = site.noise();
    let mut at = 0;
    let clock = Clock::start();
    for len in pieces(site.bytes()) {
        site.check()?;
        let piece = noise.get(..len).unwrap_or_default();
        store(&file, at, piece, way)?;
        at += len as u64;
    }
    Ok(Sample {
        allocation: Some(allocation),
        ..clock.stop(site.bytes())
    })
}

fn store(file: &File, at: u64, piece: &[u8], way: Way) -> io::Result<()> {
    let mut map = match way {
        Way::Pwrite => return file.write_all_at(piece, at),
        Way::Map => WriteMap::unpopulated(file, at, piece.len())?,
        Way::MapPopulated => WriteMap::new(file, at, piece.len())?,
    };
    map.bytes().copy_from_slice(piece);
    Ok(())
}
