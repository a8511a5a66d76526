//! Damaged checkpoints end with an error or are read: no panic, no hang, no memory beyond
//! the length of the files and 16 MiB. Each byte of a header is changed, and each length
//! tried.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    cell::Cell,
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};
use tensorferry::{SourceSet, source::SourceOptions};

/// Memory that a source may take beside the length of its files.
const FREE_BYTES: usize = 16 << 20;
/// Damaged files are opened side by side: each waits for its time stamp to settle.
const THREAD_COUNT: usize = 64;
/// One case may take so long on a machine that does much else.
const PATIENCE: Duration = Duration::from_secs(60);

/// Counts what each thread has.
struct Counting;

thread_local! {
    static NOW: Cell<usize> = const { Cell::new(0) };
    static PEAK: Cell<usize> = const { Cell::new(0) };
}

fn add(len: usize) {
    let _ = NOW.try_with(|now| {
        now.set(now.get().saturating_add(len));
        let _ = PEAK.try_with(|peak| peak.set(peak.get().max(now.get())));
    });
}

fn remove(len: usize) {
    let _ = NOW.try_with(|now| now.set(now.get().saturating_sub(len)));
}

#[expect(
    unsafe_code,
    reason = "an allocator is unsafe; this one hands everything on"
)]
// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        remove(layout.size());
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        add(layout.size());
        // SAFETY: as above.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, len: usize) -> *mut u8 {
        add(len);
        remove(layout.size());
        // SAFETY: as above.
        unsafe { System.realloc(pointer, layout, len) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// A damaged version of a file.
#[derive(Clone, Copy, Debug)]
enum Damage {
    Byte { at: usize, mask: u8 },
    Cut { len: usize },
}

impl Damage {
    fn apply(self, whole: &[u8]) -> Vec<u8> {
        match self {
            Damage::Cut { len } => whole[..len].to_vec(),
            Damage::Byte { at, mask } => {
                let mut bytes = whole.to_vec();
                bytes[at] ^= mask;
                bytes
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let path = item.unwrap().path();
        let name = to.join(path.file_name().unwrap());
        match path.is_dir() {
            true => copy(&path, &name),
            false => drop(fs::copy(&path, &name).unwrap()),
        }
    }
}

/// Opens and reads a source in every damaged version of one of its files. `len` bytes from
/// its beginning are damaged one by one, and the file is cut everywhere in them.
fn damage(case: &str, source: &str, file: &str, len: usize) {
    let case = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(case);
    let whole = fs::read(case.join(file)).unwrap();
    let len = len.min(whole.len());
    let bytes = (0..len).flat_map(|at| [0x01, 0x80, 0xff].map(|mask| Damage::Byte { at, mask }));
    let cuts = (0..len).map(|len| Damage::Cut { len });
    let damages: Vec<Damage> = bytes.chain(cuts).collect();
    let temp = tempfile::tempdir().unwrap();
    let (next, refused) = (AtomicUsize::new(0), AtomicUsize::new(0));
    thread::scope(|scope| {
        for number in 0..THREAD_COUNT {
            let folder = temp.path().join(number.to_string());
            let (case, whole, damages, next, refused) = (&case, &whole, &damages, &next, &refused);
            scope.spawn(move || {
                copy(case, &folder);
                while let Some(&damage) = damages.get(next.fetch_add(1, Ordering::Relaxed)) {
                    fs::write(folder.join(file), damage.apply(whole)).unwrap();
                    if !open_and_read(&folder.join(source), damage) {
                        refused.fetch_add(1, Ordering::Relaxed);
                    }
                }
            });
        }
    });
    let refused = refused.into_inner();
    let count = damages.len();
    assert!(
        refused > 0,
        "{source}: none of {count} damaged versions of {file} was refused"
    );
}

/// Whether a source can be opened.
fn open_and_read(source: &Path, damage: Damage) -> bool {
    let start = Instant::now();
    let before = NOW.with(Cell::get);
    PEAK.with(|peak| peak.set(before));
    let opened = SourceSet::open(&[PathBuf::from(source)], &SourceOptions::default());
    let peak = PEAK.with(Cell::get) - before;
    assert!(
        peak <= FREE_BYTES + (1 << 20),
        "{damage:?} took {peak} bytes"
    );
    let is_open = opened.is_ok();
    if let Ok(set) = opened {
        for (index, entry) in set.entries().iter().enumerate() {
            let mut first = vec![0; entry.header.byte_len.min(100) as usize];
            // A lengthened entry may be too long for its file; never for the reader.
            let _ = set.read_at(index, 0, &mut first);
        }
    }
    assert!(
        start.elapsed() < PATIENCE,
        "{damage:?} took {:?}",
        start.elapsed()
    );
    is_open
}

#[test]
fn damaged_tensorflow_checkpoints_do_no_harm() {
    damage(
        "tensorflow/sharded",
        "model.ckpt-3",
        "model.ckpt-3.index",
        usize::MAX,
    );
    damage(
        "tensorflow/module_checkpoint",
        "ckpt",
        "ckpt.index",
        usize::MAX,
    );
    damage(
        "tensorflow/module_checkpoint",
        "ckpt",
        "ckpt.data-00000-of-00001",
        usize::MAX,
    );
}

#[test]
fn damaged_saved_models_do_no_harm() {
    damage(
        "tensorflow/module_export",
        "model",
        "model/variables/variables.index",
        usize::MAX,
    );
    damage(
        "tensorflow/module_export",
        "model",
        "model/saved_model.pb",
        1200,
    );
}

#[test]
fn damaged_gguf_files_do_no_harm() {
    damage("gguf/plain", "model.gguf", "model.gguf", 1100);
    damage("gguf/quantised", "model.gguf", "model.gguf", 1500);
}

#[test]
fn damaged_onnx_models_do_no_harm() {
    damage("onnx/types", "model.onnx", "model.onnx", 2500);
    damage("onnx/outside", "model.onnx", "model.onnx", 1000);
}
