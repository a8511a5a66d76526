//! npz, PyTorch, HDF5 and Keras: `make_formats.py --small` made them, and the one
//! `expected.json` of all fixtures says what their libraries read.

use serde::Deserialize;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};
use tensorferry::{SourceError, SourceOptions, SourceSet};

#[derive(Deserialize)]
struct Expected {
    dtype: String,
    descr: String,
    shape: Vec<u64>,
    fortran: bool,
    blake3: String,
}

fn fixtures() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures")
}

fn open(relative: &str) -> Result<SourceSet, SourceError> {
    SourceSet::open(&[fixtures().join(relative)], &SourceOptions::default())
}

/// All bytes of an entry, in pieces of this length, the last piece first.
fn read(set: &SourceSet, index: usize, piece_len: usize) -> Vec<u8> {
    let len = set.entries()[index].header.byte_len as usize;
    let mut bytes = vec![0; len];
    let mut pieces: Vec<(usize, &mut [u8])> = bytes.chunks_mut(piece_len).enumerate().collect();
    pieces.reverse();
    for (number, piece) in pieces {
        set.read_at(index, (number * piece_len) as u64, piece)
            .unwrap();
    }
    bytes
}

#[test]
fn every_tensor_is_what_the_format_s_own_library_reads() {
    let json = std::fs::read(fixtures().join("expected.json")).unwrap();
    let all: BTreeMap<String, BTreeMap<String, Expected>> = serde_json::from_slice(&json).unwrap();
    let mut count = 0;
    for (file, mut expected) in all {
        let set = open(&file).unwrap_or_else(|error| panic!("{file}: {error}"));
        for (index, entry) in set.entries().iter().enumerate() {
            let header = &entry.header;
            let Some(dtype) = header.dtype() else {
                continue;
            };
            for name in std::iter::once(&header.name).chain(&entry.aliases) {
                let expected = expected
                    .remove(name)
                    .unwrap_or_else(|| panic!("{file}: {name}"));
                let what = format!("{file}: {name}");
                assert_eq!(dtype.name(), expected.dtype, "{what}");
                assert_eq!(dtype.npy_descr(header.big_endian), expected.descr, "{what}");
                assert_eq!(header.shape, expected.shape, "{what}");
                let is_fortran = header.order == tensorferry::plan::Order::Fortran;
                assert_eq!(is_fortran, expected.fortran, "{what}");
                for piece_len in [7, 1000, 1 << 20] {
                    let bytes = read(&set, index, piece_len);
                    let found = blake3::hash(&bytes).to_hex();
                    assert_eq!(
                        found.as_str(),
                        expected.blake3,
                        "{what}, pieces of {piece_len}"
                    );
                }
                count += 1;
            }
        }
        let left: Vec<_> = expected.keys().collect();
        assert!(left.is_empty(), "{file} lacks {left:?}");
        set.check_unchanged().unwrap();
    }
    println!("{count} tensors are equal");
    assert!(count > 100, "only {count} tensors were compared");
}

#[test]
fn stored_arrays_of_an_archive_lie_in_the_file_and_deflated_ones_are_copied() {
    let set = open("npz/stored.npz").unwrap();
    assert_eq!((set.format(), set.derived_bytes()), ("npz", 0));
    let deflated = open("npz/deflated.npz").unwrap();
    assert_eq!(deflated.derived_bytes(), set.total_bytes());
}

#[test]
fn tensors_of_keras_come_in_the_order_of_their_numbers() {
    for file in [
        "float32.keras",
        "bfloat16.weights.h5",
        "sharded/m.weights.json",
    ] {
        let set = open(&format!("keras/{file}")).unwrap();
        let states = set.entries().iter().filter(|entry| entry.is_optimizer);
        let states: Vec<_> = states.map(|e| e.header.name.as_str()).collect();
        let expected: Vec<_> = (0..18).map(|i| format!("optimizer/{i}")).collect();
        assert_eq!(states, expected, "{file}");
    }
}

#[test]
fn state_under_the_key_of_an_optimizer_is_known_as_such() {
    let set = open("torch/nested.pth").unwrap();
    let states = set.entries().iter().filter(|entry| entry.is_optimizer);
    let states: Vec<_> = states.map(|e| e.header.name.as_str()).collect();
    assert_eq!(states, ["optimizer.state.0.exp_avg"]);
}

#[test]
fn arrays_of_objects_are_left_out_and_listed() {
    let set = open("npz/objects.npz").unwrap();
    let names: Vec<_> = set
        .entries()
        .iter()
        .map(|e| e.header.name.as_str())
        .collect();
    assert_eq!(names, ["w"]);
    let skipped = &set.skipped()[0];
    assert!(skipped.name == "names" && skipped.reason.contains("python objects"));
}

#[test]
fn views_of_one_storage_that_are_equal_are_sent_once() {
    let set = open("torch/views.pt").unwrap();
    let whole = set
        .entries()
        .iter()
        .find(|e| e.header.name == "whole")
        .unwrap();
    assert_eq!(whole.aliases, ["tied"]);
    // What follows in either order lies in the file; the rest is gathered.
    let copied = [
        "columns",
        "every_third",
        "expanded",
        "channels_last",
        "permuted",
    ];
    let len_of = |name: &&str| {
        let entry = set.entries().iter().find(|e| e.header.name == *name);
        entry.unwrap().header.byte_len
    };
    assert_eq!(set.derived_bytes(), copied.iter().map(len_of).sum::<u64>());
}

#[test]
fn parts_along_the_first_axis_lie_in_their_files() {
    let set = open("distributed").unwrap();
    assert_eq!(set.format(), "pytorch-distributed");
    let len_of = |entry: &tensorferry::source::SourceEntry| match entry.header.name.as_str() {
        "columns" | "both" => entry.header.byte_len,
        _ => 0,
    };
    assert_eq!(
        set.derived_bytes(),
        set.entries().iter().map(len_of).sum::<u64>()
    );
    assert!(set.skipped().iter().any(|skipped| skipped.name == "step"));
}

#[test]
fn what_would_run_or_is_no_checkpoint_is_refused_with_the_way_out() {
    for (file, words) in [
        ("refused/executes.pt", ["exec", "nothing was executed"]),
        ("refused/torchscript.pt", ["TorchScript", "state_dict"]),
        ("refused/legacy.pt", ["before 1.6", "torch.save"]),
    ] {
        let error = open(file).unwrap_err().to_string();
        for word in words {
            assert!(error.contains(word), "{file}: {error}");
        }
    }
}
