//! Damaged files in the formats of many headers: each byte of the metadata changed, the
//! file cut at each place. A reader may take or refuse them; it must not panic, nor
//! allocate more than the file is long and 16 MiB.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::Duration,
};
use tensorferry::{SourceOptions, SourceSet};

/// Bytes that a reader may take beyond the length of its file.
const ALLOWED_BYTES: usize = 16 << 20;
/// Most bytes of one entry that are read.
const READ_LEN: u64 = 64 << 10;
/// Files opened after one pause: those written just now are waited for.
const BATCH: usize = 4096;

struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

#[expect(
    unsafe_code,
    reason = "an allocator is unsafe; this one hands everything on"
)]
// SAFETY: everything is left to the system's allocator; the counts do not touch memory.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: as promised by the caller.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

/// Opens a path and reads the ends of all entries; whether that went well.
fn use_it(path: &Path, len: usize, what: &str) -> bool {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    let opened = SourceSet::open(&[path], &SourceOptions::default());
    let is_good = opened.is_ok_and(|set| {
        (0..set.entries().len()).all(|index| {
            let byte_len = set.entries()[index].header.byte_len;
            let mut buf = vec![0; byte_len.min(READ_LEN) as usize];
            let end = byte_len - buf.len() as u64;
            [0, end]
                .into_iter()
                .all(|offset| set.read_at(index, offset, &mut buf).is_ok())
        })
    });
    let taken = PEAK.load(Ordering::Relaxed) - before;
    assert!(
        taken <= len + ALLOWED_BYTES,
        "{what}: {taken} bytes for a file of {len}"
    );
    is_good
}

/// Every damaged copy of a file, a batch at a time; how many were taken.
fn damage(relative: &str, places: impl Iterator<Item = usize> + Clone) -> (usize, usize) {
    let original = fs::read(fixtures().join(relative)).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let extension = Path::new(relative)
        .extension()
        .unwrap()
        .to_string_lossy()
        .into_owned();
    let mut copies = Vec::new();
    for at in places.clone().filter(|&at| at < original.len()) {
        for change in [0x01, 0x80, 0xff] {
            let mut copy = original.clone();
            copy[at] ^= change;
            copies.push((format!("{relative}: byte {at} ^ {change:#x}"), copy));
        }
        copies.push((format!("{relative}: cut at {at}"), original[..at].to_vec()));
    }
    let (mut count, mut good) = (0, 0);
    for batch in copies.chunks(BATCH) {
        let path = |index| dir.path().join(format!("{index}.{extension}"));
        for (index, (_, bytes)) in batch.iter().enumerate() {
            fs::write(path(index), bytes).unwrap();
        }
        thread::sleep(Duration::from_millis(100));
        for (index, (what, bytes)) in batch.iter().enumerate() {
            count += 1;
            good += usize::from(use_it(&path(index), bytes.len(), what));
        }
    }
    (count, good)
}

/// One test, because the allocator counts for all.
#[test]
fn no_damaged_file_panics_or_takes_memory_that_it_does_not_have() {
    let every = |step| (0..usize::MAX).step_by(step);
    let mut count = 0;
    for (file, step) in [
        ("npz/bf16.npz", 1),
        ("npz/objects.npz", 1),
        ("npz/deflated.npz", 3),
        ("torch/alone.pt", 1),
        ("torch/nested.pth", 1),
        ("torch/views.pt", 7),
        ("torch/protocol_4.pt", 7),
        ("hdf5/many_earliest.h5", 31),
        ("hdf5/latest.h5", 61),
        ("hdf5/old.h5", 97),
        ("keras/float32.keras", 61),
    ] {
        let (damaged, good) = damage(
            file,
            every(step).take(1 << 20).take_while(|&at| at < 1 << 18),
        );
        println!("{file}: {good} of {damaged} damaged copies were taken");
        assert!(good < damaged, "{file}: no damage was seen");
        count += damaged;
    }
    println!("{count} damaged copies");
}
