//! Every function with its seeds, its regressions and seeded mutations of both.
//!
//! `TENSORFERRY_FUZZ_RUNS` = how many mutations of each target,
//! `TENSORFERRY_FUZZ_SEED` = another beginning, `TENSORFERRY_WRITE_CORPUS=1` =
//! write the seeds anew instead of comparing them.

use super::{
    mutate::{Rng, mutate},
    seeds::{self, Seeds},
};
use std::{
    fs,
    panic::{AssertUnwindSafe, catch_unwind},
    path::PathBuf,
};

const RUN_COUNT_DEFAULT: u64 = 20_000;
const MAX_LEN: usize = 4096;
/// Most memory that a target has in use at one time beyond the length of its input.
const MAX_USED_BYTES: u64 = 16 << 20;

fn from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    let number = text.parse();
    Some(number.unwrap_or_else(|_| panic!("{name}={text} is not a number")))
}

fn corpus_dir(target: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    root.join("fuzz/corpus").join(target)
}

/// The committed seeds are those of the generator; more files may stand beside
/// them: what once failed.
fn corpus(target: &str, seeds: Seeds) -> Vec<Vec<u8>> {
    let dir = corpus_dir(target);
    if from_env("TENSORFERRY_WRITE_CORPUS") == Some(1) {
        fs::create_dir_all(&dir).unwrap();
        for (name, bytes) in &seeds {
            fs::write(dir.join(name), bytes).unwrap();
        }
    }
    for (name, bytes) in &seeds {
        let committed = fs::read(dir.join(name)).unwrap_or_default();
        assert!(
            &committed == bytes,
            "{target}/{name} is not what the generator makes: TENSORFERRY_WRITE_CORPUS=1"
        );
    }
    let mut files: Vec<PathBuf> = fs::read_dir(&dir)
        .unwrap()
        .map(|f| f.unwrap().path())
        .collect();
    files.sort();
    files.iter().map(|file| fs::read(file).unwrap()).collect()
}

/// Feeds a target; whatever panics is printed so that it can be kept.
fn feed(target: &str, body: fn(&[u8]), seeds: Seeds) {
    let corpus = corpus(target, seeds);
    let seed = from_env("TENSORFERRY_FUZZ_SEED").unwrap_or(1);
    let run_count = from_env("TENSORFERRY_FUZZ_RUNS").unwrap_or(RUN_COUNT_DEFAULT);
    let run = |what: &dyn Fn() -> String, bytes: &[u8]| {
        let mut panicked = false;
        let used = allocation_counter::measure(|| {
            panicked = catch_unwind(AssertUnwindSafe(|| body(bytes))).is_err();
        });
        let is_greedy = used.bytes_max > bytes.len() as u64 + MAX_USED_BYTES;
        if panicked || is_greedy {
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            let (what, used) = (what(), used.bytes_max);
            panic!(
                "{target}: {what}, TENSORFERRY_FUZZ_SEED={seed}, failed with {used} bytes of memory on {hex}"
            );
        }
    };
    let begun = std::time::Instant::now();
    run(&|| "nothing".to_owned(), &[]);
    for bytes in &corpus {
        run(&|| "a file of the corpus".to_owned(), bytes);
    }
    let mut rng = Rng::new(seed);
    // Some come from mutations, which leads further; most from the corpus, or all
    // would soon be noise.
    let mut recent = corpus.clone();
    for i in 0..run_count {
        let base = match rng.below(4) {
            0 => &recent[rng.below(recent.len())],
            _ => &corpus[rng.below(corpus.len())],
        };
        let other = &corpus[rng.below(corpus.len())];
        let bytes = mutate(base, other, MAX_LEN, &mut rng);
        run(&|| format!("mutation {i}"), &bytes);
        let at = rng.below(recent.len());
        recent[at] = bytes;
    }
    let seconds = begun.elapsed().as_secs_f64();
    println!("{target}: {run_count} mutations in {seconds:.1} s, seed {seed}");
}

#[test]
fn npy_headers() {
    feed("npy", super::npy, seeds::npy_seeds());
}

#[test]
fn safetensors_headers() {
    feed(
        "safetensors",
        super::safetensors,
        seeds::safetensors_seeds(),
    );
}

#[test]
fn gguf_headers() {
    feed("gguf", super::gguf, seeds::gguf_seeds());
}

#[test]
fn onnx_models() {
    feed("onnx", super::onnx, seeds::onnx_seeds());
}

#[test]
fn tensorflow_indexes() {
    let seeds = seeds::tensorflow_index_seeds();
    feed("tensorflow_index", super::tensorflow_index, seeds);
}

#[test]
fn tensorflow_graphs() {
    let seeds = seeds::tensorflow_graph_seeds();
    feed("tensorflow_graph", super::tensorflow_graph, seeds);
}

#[test]
fn saved_models() {
    feed(
        "saved_model",
        super::saved_model,
        seeds::saved_model_seeds(),
    );
}

#[test]
fn archives() {
    feed("archive", super::archive, Vec::new());
}

#[test]
fn pickles_of_pytorch() {
    feed("torch", super::torch, Vec::new());
}

#[test]
fn headers_of_hdf5() {
    feed("hdf5", super::hdf5, Vec::new());
}

#[test]
fn streams_of_sender_frames() {
    feed(
        "sender_frames",
        super::sender_frames,
        seeds::sender_frames_seeds(),
    );
}

#[test]
fn receiver_frames() {
    feed(
        "receiver_frames",
        super::receiver_frames,
        seeds::receiver_frames_seeds(),
    );
}

#[test]
fn journals() {
    feed("journal", super::journal, seeds::journal_seeds());
}

#[test]
fn schedules_of_both_roles() {
    feed("roles", super::roles, seeds::roles_seeds());
}

#[test]
fn names() {
    feed("names", super::names, seeds::names_seeds());
}

#[test]
fn encoded_chunks() {
    feed("chunk", super::chunk, seeds::chunk_seeds());
}

/// A mutator that changes nothing would find nothing.
#[test]
fn mutations_differ_and_repeat() {
    let seed = [5; 100];
    let all = |start| {
        let mut rng = Rng::new(start);
        let one = |_| mutate(&seed, b"other", 80, &mut rng);
        (0..500).map(one).collect::<Vec<_>>()
    };
    let changed = all(1)
        .iter()
        .filter(|bytes| bytes[..] != seed[..80])
        .count();
    assert!(changed > 300, "{changed}");
    assert!(all(1).iter().all(|bytes| bytes.len() <= 80));
    assert_eq!(all(1), all(1));
    assert_ne!(all(1), all(2));
}
