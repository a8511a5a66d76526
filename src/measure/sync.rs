//! What durability costs.

use super::{Sample, Site, clock::Clock, pieces, site::allocate};
use std::{
    io,
    os::unix::fs::FileExt,
    time::{Duration, Instant},
};

/// Bytes of a group, as a receiver commits them.
const GROUP_BYTES: u64 = 128 << 20;
/// Small syncs are counted for this long at most, and so many.
const SMALL_TIME: Duration = Duration::from_millis(500);
const SMALL_CALLS: u32 = 64;

/// Writes a preallocated file and syncs after each group; then counts small syncs.
pub(super) fn groups(site: &Site) -> io::Result<Sample> {
    let file = site.fresh_file()?;
    allocate(&file, site.bytes())?;
    let noise = site.noise();
    let (mut at, mut unsynced_bytes) = (0, 0);
    let clock = Clock::start();
    for len in pieces(site.bytes()) {
        site.check()?;
        file.write_all_at(noise.get(..len).unwrap_or_default(), at)?;
        at += len as u64;
        unsynced_bytes += len as u64;
        if unsynced_bytes >= GROUP_BYTES || at == site.bytes() {
            file.sync_data()?;
            unsynced_bytes = 0;
        }
    }
    let sample = clock.stop(site.bytes());
    Ok(Sample {
        calls_per_second: Some(small_syncs(site)?),
        ..sample
    })
}

/// Syncs a second of 4 KiB each at the end of a file, as a journal makes them.
fn small_syncs(site: &Site) -> io::Result<f64> {
    let file = site.fresh_file()?;
    let begun = Instant::now();
    let mut count = 0;
    while count < SMALL_CALLS && begun.elapsed() < SMALL_TIME {
        site.check()?;
        file.write_all_at(&[1; 4096], u64::from(count) * 4096)?;
        file.sync_data()?;
        count += 1;
    }
    Ok(f64::from(count) / begun.elapsed().as_secs_f64().max(1e-9))
}
