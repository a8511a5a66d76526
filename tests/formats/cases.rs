//! TensorFlow, GGUF and ONNX: a folder for each case, with what its library reads in
//! `expected.json` beside it.

use serde::Deserialize;
use sha2::{Digest, Sha256};
use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};
use tensorferry::{
    SourceSet,
    source::{SourceError, SourceOptions},
};

/// What `tests/tools/make_*.py` wrote beside a fixture.
#[derive(Deserialize)]
struct Expected {
    source: String,
    #[serde(default)]
    tensors: Vec<Tensor>,
    #[serde(default)]
    skipped: Vec<String>,
    /// Names of what is trainable, in the order of the model.
    trainable: Option<Vec<String>>,
    /// Names of everything, in the order of the model.
    order: Option<Vec<String>>,
    /// A part of the message with which the source is refused.
    refused: Option<String>,
}

#[derive(Deserialize)]
struct Tensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    sha256: String,
    trainable: Option<bool>,
    source_name: Option<String>,
}

fn cases(family: &str) -> Vec<(PathBuf, Expected)> {
    let family = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(family);
    let mut cases: Vec<_> = fs::read_dir(family)
        .unwrap()
        .map(|case| case.unwrap().path())
        .filter(|case| case.is_dir())
        .collect();
    cases.sort();
    assert!(!cases.is_empty());
    let read = |folder: PathBuf| {
        let expected = fs::read(folder.join("expected.json")).unwrap();
        let expected = serde_json::from_slice(&expected).unwrap();
        (folder, expected)
    };
    cases.into_iter().map(read).collect()
}

fn open(path: &Path, options: &SourceOptions) -> Result<SourceSet, SourceError> {
    SourceSet::open(&[path], options)
}

/// SHA-256 of an entry that is read in steps of odd length, its numbers turned to
/// little-endian ones.
fn sha256(set: &SourceSet, index: usize) -> String {
    let header = &set.entries()[index].header;
    let (mut at, mut bytes) = (0, vec![0; header.byte_len as usize]);
    while at < bytes.len() {
        let len = (bytes.len() - at).min(4099);
        set.read_at(index, at as u64, &mut bytes[at..at + len])
            .unwrap();
        at += len;
    }
    if header.big_endian {
        let dtype = header.dtype().unwrap();
        // A complex number is two numbers.
        let numbers = if dtype.name().starts_with("complex") {
            2
        } else {
            1
        };
        for number in bytes.chunks_exact_mut(header.item_len() as usize / numbers) {
            number.reverse();
        }
    }
    Sha256::new()
        .chain_update(&bytes)
        .finalize()
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

fn tensor_names(set: &SourceSet) -> Vec<&str> {
    let tensors = set.entries().iter().filter(|e| e.header.dtype().is_some());
    tensors.map(|e| e.header.name.as_str()).collect()
}

/// Compares one case; the number of tensors.
fn check(folder: &Path, expected: &Expected) -> usize {
    let source = folder.join(&expected.source);
    let set = match (open(&source, &SourceOptions::default()), &expected.refused) {
        (Ok(set), None) => set,
        (Err(error), Some(words)) => {
            let text = error.to_string();
            assert!(text.contains(words), "{}: {text}", source.display());
            return 0;
        }
        (Ok(_), Some(_)) => panic!("{} is not refused", source.display()),
        (Err(error), None) => panic!("{error}"),
    };
    let wanted: BTreeMap<&str, &Tensor> =
        expected.tensors.iter().map(|t| (&t.name[..], t)).collect();
    let mut names = tensor_names(&set);
    for (index, entry) in set.entries().iter().enumerate() {
        let Some(dtype) = entry.header.dtype() else {
            continue;
        };
        let name = &entry.header.name[..];
        let wanted = wanted
            .get(name)
            .unwrap_or_else(|| panic!("{}: {name}", source.display()));
        assert_eq!(dtype.name(), wanted.dtype, "{name}");
        assert_eq!(entry.header.shape, wanted.shape, "{name}");
        assert_eq!(sha256(&set, index), wanted.sha256, "{name}");
        if wanted.trainable.is_some() {
            assert_eq!(entry.trainable, wanted.trainable, "{name}");
        }
        if wanted.source_name.is_some() {
            assert_eq!(entry.source_name, wanted.source_name, "{name}");
        }
    }
    if let Some(order) = &expected.order {
        assert_eq!(&names, order);
    }
    names.sort_unstable();
    assert_eq!(names, wanted.keys().copied().collect::<Vec<_>>());
    let mut skipped: Vec<_> = set.skipped().iter().map(|s| &s.name).collect();
    skipped.sort();
    assert_eq!(skipped, expected.skipped.iter().collect::<Vec<_>>());
    if let Some(trainable) = &expected.trainable {
        let mut options = SourceOptions::default();
        options.trainable = true;
        assert_eq!(&tensor_names(&open(&source, &options).unwrap()), trainable);
    }
    names.len()
}

fn check_all(family: &str) -> usize {
    cases(family)
        .iter()
        .map(|(folder, expected)| check(folder, expected))
        .sum()
}

#[test]
fn tensorflow_checkpoints_are_read_as_tensorflow_reads_them() {
    assert_eq!(check_all("tensorflow"), TENSORFLOW_COUNT);
}

#[test]
fn gguf_files_are_read_as_their_library_reads_them() {
    assert_eq!(check_all("gguf"), GGUF_COUNT);
}

#[test]
fn onnx_models_are_read_as_their_library_reads_them() {
    assert_eq!(check_all("onnx"), ONNX_COUNT);
}

#[cfg(unix)]
#[test]
fn data_of_an_onnx_model_lie_beneath_its_folder() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("model");
    fs::create_dir(&folder).unwrap();
    let case = fixture("onnx/outside");
    let data = case.join("sub/data.bin");
    fs::copy(case.join("model.onnx"), folder.join("model.onnx")).unwrap();
    fs::copy(case.join("whole.bin"), folder.join("whole.bin")).unwrap();
    let model = folder.join("model.onnx");
    let open = || open(&model, &SourceOptions::default());
    assert!(open().unwrap_err().to_string().contains("do not exist"));
    // A link that leads out is no way around.
    fs::copy(&data, temp.path().join("data.bin")).unwrap();
    fs::create_dir(folder.join("sub")).unwrap();
    std::os::unix::fs::symlink(temp.path().join("data.bin"), folder.join("sub/data.bin")).unwrap();
    assert!(open().unwrap_err().to_string().contains("not beneath"));
    fs::remove_file(folder.join("sub/data.bin")).unwrap();
    fs::copy(&data, folder.join("sub/data.bin")).unwrap();
    open().unwrap();
}

const ONNX_COUNT: usize = 70 + 4;
const GGUF_COUNT: usize = 8 + 4 + 26;
const TENSORFLOW_COUNT: usize = 42 + 83 + 9 + 40 + 23 + 5 + 9 + 5 + 17 + 9 + 30 + 10 + 5;

fn fixture(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures")
        .join(path)
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

#[test]
fn version_1_is_refused_with_the_way_out_also_in_shards() {
    let temp = tempfile::tempdir().unwrap();
    let whole = fixture("tensorflow/version_1/model.ckpt");
    for shard in ["old-00000-of-00002", "old-00001-of-00002"] {
        fs::copy(&whole, temp.path().join(shard)).unwrap();
    }
    let refused = |path: &Path| {
        let text = open(path, &SourceOptions::default())
            .unwrap_err()
            .to_string();
        let said = text.contains("is not supported: version 1") && text.contains("Saver");
        assert!(said, "{}: {text}", path.display());
    };
    refused(&whole);
    refused(&temp.path().join("old"));
    refused(&temp.path().join("old-00001-of-00002"));
    refused(temp.path());
    let state = "model_checkpoint_path: \"old\"\n";
    fs::write(temp.path().join("checkpoint"), state).unwrap();
    refused(temp.path());
    let shards = state.replace("old", "old-?????-of-00002");
    fs::write(temp.path().join("checkpoint"), shards).unwrap();
    refused(temp.path());
    fs::write(
        temp.path().join("checkpoint"),
        state.replace("old", "older"),
    )
    .unwrap();
    let error = open(temp.path(), &SourceOptions::default()).unwrap_err();
    assert!(matches!(error, SourceError::Choice { .. }), "{error}");
}

#[test]
fn a_saved_model_without_bytes_is_damaged_and_not_one_without_an_order() {
    let temp = tempfile::tempdir().unwrap();
    copy(&fixture("tensorflow/keras_export/model"), temp.path());
    fs::write(temp.path().join("saved_model.pb"), "").unwrap();
    let error = open(temp.path(), &SourceOptions::default()).unwrap_err();
    assert!(matches!(error, SourceError::Malformed { .. }), "{error}");
    let text = error.to_string();
    assert!(
        text.ends_with("saved_model.pb is damaged: it is empty"),
        "{text}"
    );
}

#[test]
fn a_tensorflow_checkpoint_has_three_names() {
    let folder = fixture("tensorflow/keras_checkpoint");
    let options = SourceOptions::default();
    let by_folder = open(&folder, &options).unwrap();
    for name in ["ckpt-2", "ckpt-2.index"] {
        let set = open(&folder.join(name), &options).unwrap();
        assert_eq!(tensor_names(&set), tensor_names(&by_folder));
        assert_eq!(set.format(), "tf-bundle");
    }
    let error = open(&folder.join("ckpt-2.data-00000-of-00001"), &options).unwrap_err();
    assert!(error.to_string().contains(".index"), "{error}");
}

#[test]
fn what_keras_calls_its_variables_and_what_belongs_to_the_optimizer_is_known() {
    let set = open(
        &fixture("tensorflow/keras_checkpoint"),
        &SourceOptions::default(),
    )
    .unwrap();
    let find = |name: &str| {
        set.entries()
            .iter()
            .find(|e| e.header.name == name)
            .unwrap()
    };
    let kernel = find("d1/kernel");
    assert!(
        kernel
            .aliases
            .iter()
            .any(|a| a == "optimizer/_trainable_variables/0")
    );
    assert_eq!(
        kernel.source_name.as_deref(),
        Some("_operations/1/_kernel/.ATTRIBUTES/VARIABLE_VALUE")
    );
    assert!(!kernel.is_optimizer && find("adam/d1_kernel_momentum").is_optimizer);
    assert!(!find("bn/moving_mean").is_optimizer);
    assert!(
        set.entries()
            .iter()
            .all(|e| e.header.dtype().is_none() || e.crc32c.is_some())
    );
}

#[test]
fn an_optimizer_is_known_by_what_it_holds_whatever_its_checkpoint_calls_it() {
    let source = fixture("tensorflow/keras_optimizers/ckpt");
    let set = open(&source, &SourceOptions::default()).unwrap();
    let is_state = |name: &str| name.starts_with("adam") || name.starts_with("sgd");
    for entry in set.entries() {
        let name = &entry.header.name;
        assert_eq!(entry.is_optimizer, is_state(name), "{name}");
        assert!(entry.trainable.is_some(), "{name}");
    }
    let states = set.entries().iter().filter(|entry| entry.is_optimizer);
    // Each counts its steps and has a rate; Adam keeps two for each of four, SGD one.
    assert_eq!(states.count(), 2 + 8 + 2 + 4);
}

#[test]
fn weights_that_only_the_optimizer_lists_do_not_go_with_it() {
    let source = fixture("tensorflow/keras_list/ckpt");
    let set = open(&source, &SourceOptions::default()).unwrap();
    let weights = set.entries().iter().filter(|entry| !entry.is_optimizer);
    let weights: Vec<_> = weights.map(|entry| &entry.header.name[..]).collect();
    let listed = (0..6).map(|index| format!("trainable_variables/{index}"));
    let attributes = ["model/head/_kernel", "model/head/bias"].map(str::to_owned);
    assert_eq!(weights, listed.chain(attributes).collect::<Vec<_>>());
}

#[test]
fn selections_choose_by_name_and_rename() {
    let source = fixture("tensorflow/keras_export/model");
    let mut options = SourceOptions::default();
    options.include_files = false;
    options.include = vec!["d?/*".into(), "bn/gamma".into()];
    options.exclude = vec!["*/bias".into()];
    options.rename = vec!["*/kernel=*.weight".parse().unwrap()];
    let set = open(&source, &options).unwrap();
    assert_eq!(tensor_names(&set), ["d1.weight", "bn/gamma", "d2.weight"]);
    assert!(
        set.entries()[0]
            .source_name
            .as_deref()
            .unwrap()
            .starts_with("variables/0/")
    );

    for (include, exclude, rename) in [
        (&["nothing*"][..], &[][..], &[][..]),
        (&[][..], &["*"][..], &[][..]),
        (&[][..], &[][..], &["*=same"][..]),
        (&[][..], &[][..], &["nothing=other"][..]),
        (&[""][..], &[][..], &[][..]),
    ] {
        let mut options = SourceOptions::default();
        options.include = include.iter().map(|&p| p.into()).collect();
        options.exclude = exclude.iter().map(|&p| p.into()).collect();
        options.rename = rename.iter().map(|p| p.parse().unwrap()).collect();
        assert!(
            open(&source, &options).is_err(),
            "{include:?} {exclude:?} {rename:?}"
        );
    }
    // Where nobody said what is trainable, nothing is.
    options = SourceOptions::default();
    options.trainable = true;
    let error = open(&fixture("tensorflow/sharded/model.ckpt-3"), &options).unwrap_err();
    assert!(matches!(error, SourceError::Selection { .. }), "{error}");
}
