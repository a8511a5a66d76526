use super::*;
use crate::format::npy::encode_header;
use crate::plan::{EntryKind, PlanError};
use std::fs;
use std::path::Path;
use tempfile::tempdir;

fn open(path: impl AsRef<Path>) -> Result<SourceSet, SourceError> {
    SourceSet::open(&[path.as_ref().to_owned()], &SourceOptions::default())
}

fn names(set: &SourceSet) -> Vec<&str> {
    set.entries()
        .iter()
        .map(|entry| entry.header.name.as_str())
        .collect()
}

/// A safetensors file of `u8` vectors, each filled with a value.
fn write_safetensors(path: impl AsRef<Path>, tensors: &[(&str, usize, u8)]) {
    let (mut fields, mut data) = (Vec::new(), Vec::new());
    for &(name, len, value) in tensors {
        let start = data.len();
        data.resize(start + len, value);
        fields.push(format!(
            r#""{name}":{{"dtype":"U8","shape":[{len}],"data_offsets":[{start},{}]}}"#,
            data.len()
        ));
    }
    let json = format!(
        r#"{{"__metadata__":{{"format":"pt"}},{}}}"#,
        fields.join(",")
    );
    let len = (json.len() as u64).to_le_bytes();
    fs::write(path, [&len[..], json.as_bytes(), &data].concat()).unwrap();
}

fn write_npy(path: impl AsRef<Path>, data: &[u8]) {
    let header = encode_header("|u1", false, &[data.len() as u64]);
    fs::write(path, [&header[..], data].concat()).unwrap();
}

#[test]
fn sets_can_be_shared_between_threads() {
    fn shared<T: Send + Sync>() {}
    shared::<SourceSet>();
    shared::<SourceError>();
}

#[test]
fn headers_of_odd_length_leave_data_unaligned_and_readable() {
    let folder = tempdir().unwrap();
    for extra in ["a", "ab", "abc"] {
        let path = folder.path().join(extra);
        write_safetensors(&path, &[("w", 5, 1), (extra, 0, 0), ("z", 3, 2)]);
        let set = open(&path).unwrap();
        assert_eq!(
            (set.format(), names(&set)),
            ("safetensors", vec!["w", extra, "z"])
        );
        assert_eq!(
            (set.total_bytes(), set.metadata()["format"].as_str()),
            (8, "pt")
        );
        let mut bytes = [0; 2];
        set.read_at(2, 1, &mut bytes).unwrap();
        assert_eq!(bytes, [2, 2]);
        set.check_unchanged().unwrap();
    }
}

#[test]
fn damaged_and_truncated_files_are_named_with_both_numbers() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("m.safetensors");
    write_safetensors(&path, &[("w", 50, 1)]);
    let whole = fs::read(&path).unwrap();
    for len in [whole.len() - 1, 100, 20] {
        fs::write(&path, &whole[..len]).unwrap();
        assert!(
            matches!(open(&path), Err(SourceError::Malformed { .. })),
            "{len}"
        );
    }
    fs::write(&path, b"version https://git-lfs.github.com/spec/v1\n").unwrap();
    assert!(open(&path).unwrap_err().to_string().contains("git lfs"));
    assert!(
        open(folder.path())
            .unwrap_err()
            .to_string()
            .contains("git lfs")
    );
}

#[test]
fn what_is_no_checkpoint_is_said_so() {
    let folder = tempdir().unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(SourceError::Unknown { .. })
    ));
    assert!(matches!(
        open(folder.path().join("x")),
        Err(SourceError::NotFound { .. })
    ));
    fs::write(folder.path().join("model.pt"), b"PK\x03\x04....").unwrap();
    let error = open(folder.path().join("model.pt"))
        .unwrap_err()
        .to_string();
    assert!(error.contains("zip"), "{error}");
    // By its extension it is meant to be a checkpoint, so it is a damaged one.
    assert!(matches!(
        open(folder.path()),
        Err(SourceError::Malformed { .. })
    ));
}

#[test]
fn a_folder_is_sniffed_and_side_files_come_along() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_safetensors(at("b.bin"), &[("w", 4, 1)]);
    write_npy(at("a.npy"), &[1, 2, 3]);
    fs::write(at("config.json"), b"{}").unwrap();
    fs::write(at("manifest.json"), b"[1]").unwrap();
    fs::write(at(".hidden"), b"x").unwrap();
    fs::create_dir(at("sub")).unwrap();
    fs::write(at("odd\nname"), b"x").unwrap();
    fs::File::create(at("big"))
        .unwrap()
        .set_len((64 << 20) + 1)
        .unwrap();
    std::os::unix::fs::symlink(at("gone"), at("dangling")).unwrap();
    std::os::unix::fs::symlink(at(".hidden"), at("linked.txt")).unwrap();

    let set = open(folder.path()).unwrap();
    assert_eq!(set.format(), "mixed");
    assert_eq!(
        names(&set),
        ["a", "w", "config.json", "linked.txt", "manifest.json"]
    );
    assert_eq!(set.entries()[2].header.kind, EntryKind::Blob);
    let mut skipped: Vec<&str> = set.skipped().iter().map(|s| s.name.as_str()).collect();
    skipped.sort_unstable();
    assert_eq!(skipped, ["big", "dangling", "odd\nname"]);
    assert_eq!(
        set.canonical_roots(),
        [fs::canonicalize(folder.path()).unwrap()]
    );
    assert_eq!(set.states().len(), set.paths().len());
    let mut text = [0; 2];
    set.read_at(2, 0, &mut text).unwrap();
    assert_eq!(&text, b"{}");

    let plain = SourceOptions {
        include_files: false,
        ..SourceOptions::default()
    };
    let set = SourceSet::open(&[folder.path().to_owned()], &plain).unwrap();
    assert_eq!((names(&set).len(), set.skipped().len()), (2, 0));
}

#[test]
fn names_that_occur_in_two_files_are_refused() {
    let folder = tempdir().unwrap();
    write_safetensors(folder.path().join("a"), &[("w", 4, 1)]);
    write_npy(folder.path().join("w.npy"), &[1]);
    let error = open(folder.path()).unwrap_err();
    assert!(matches!(error, SourceError::Choice { .. }), "{error}");
    // It names both, the second one first.
    let (first, second) = (folder.path().join("a"), folder.path().join("w.npy"));
    let [first, second] = [first, second].map(|path| path.canonicalize().unwrap());
    let text = format!(
        "{}: entry name \"w\" occurs in {} as well: name one of the two",
        second.display(),
        first.display()
    );
    assert_eq!(error.to_string(), text);
    let both = [folder.path().join("a"), folder.path().join("a")];
    let error = SourceSet::open(&both, &SourceOptions::default()).unwrap_err();
    assert!(matches!(
        error,
        SourceError::Plan(PlanError::Duplicate { .. })
    ));
}

#[test]
fn what_is_named_like_a_format_and_begins_otherwise_is_damaged() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_safetensors(at("a.safetensors"), &[("w", 4, 1)]);
    let mut bytes = fs::read(at("a.safetensors")).unwrap();
    bytes[7] = 1;
    for (name, bytes, words) in [
        (
            "a.safetensors",
            &bytes[..],
            "named .safetensors, but at byte 0: a header of",
        ),
        (
            "a.npy",
            b"\x93NUMPX\x01\x00",
            "named .npy, but its first bytes are 93 4e",
        ),
        ("a.h5", b"", "named .h5, but it is empty"),
        (
            "a.gguf",
            b"GGUX\x03",
            "named .gguf, but its first bytes are 47",
        ),
        ("a.onnx", b"", "named .onnx, but it is empty"),
        // A version, then a graph of 100 bytes, of which one is there.
        (
            "a.onnx",
            b"\x08\x0a\x3a\x64\x00",
            "at byte 2: field 7 has 100 bytes at 4",
        ),
        (
            "a.onnx",
            b"\x08\x0a\x3a\xff",
            "at byte 3: a message that is cut off",
        ),
        ("a.index", &[0; 250], "it does not end like a table"),
    ] {
        fs::write(at(name), bytes).unwrap();
        let error = open(at(name)).unwrap_err();
        assert!(matches!(error, SourceError::Malformed { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
}

#[test]
fn damage_in_gguf_and_deflated_members_is_told_with_file_and_byte() {
    let folder = tempdir().unwrap();
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let path = folder.path().join("m.gguf");
    let whole = fs::read(fixtures.join("gguf/plain/model.gguf")).unwrap();
    // The counts of tensors and of values: what follows is read as something else.
    for at in [8, 16] {
        let mut damaged = whole.clone();
        damaged[at] ^= 0xff;
        fs::write(&path, damaged).unwrap();
        let text = open(&path).unwrap_err().to_string();
        assert!(
            text.contains("m.gguf is damaged: ") && text.contains("t byte "),
            "{text}"
        );
    }
    let path = folder.path().join("d.npz");
    let mut bytes = fs::read(fixtures.join("npz/deflated.npz")).unwrap();
    let set = open(fixtures.join("npz/deflated.npz")).unwrap();
    let longest = (0..set.entries().len())
        .max_by_key(|&index| set.entries()[index].header.byte_len)
        .unwrap();
    let name = format!("{}.npy", set.entries()[longest].header.name);
    let local = bytes
        .windows(name.len())
        .position(|part| part == name.as_bytes());
    // Its compressed bytes begin behind name and extra field; the last of them are damaged.
    let next = bytes[local.unwrap() + 1..]
        .windows(4)
        .position(|part| part == b"PK\x03\x04");
    let end = next.map_or(bytes.len() / 2, |next| local.unwrap() + 1 + next);
    bytes[end - 8] ^= 0xff;
    fs::write(&path, &bytes).unwrap();
    let error = open(&path).and_then(|set| {
        let mut content = vec![0; set.entries()[longest].header.byte_len as usize];
        set.read_at(longest, 0, &mut content)
    });
    let text = error.unwrap_err().to_string();
    assert!(text.contains("d.npz is damaged: at byte "), "{text}");
}

#[test]
fn an_index_of_something_else_is_a_side_file_and_one_beside_its_data_is_none() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    write_npy(at("w.npy"), &[1]);
    fs::write(at("faiss.index"), [0; 250]).unwrap();
    assert_eq!(names(&open(folder.path()).unwrap()), ["w", "faiss.index"]);
    fs::write(at("faiss.data-00000-of-00001"), "").unwrap();
    let error = open(folder.path()).unwrap_err();
    assert!(error.to_string().contains("like a table"), "{error}");
}

#[test]
fn a_folder_without_a_checkpoint_says_what_was_looked_for() {
    let folder = tempdir().unwrap();
    let text = || open(folder.path()).unwrap_err().to_string();
    assert!(
        text().contains("format: looked for manifest.json, "),
        "{}",
        text()
    );
    assert!(
        text().ends_with("no file lies directly in it"),
        "{}",
        text()
    );
    fs::write(folder.path().join("a"), "text").unwrap();
    assert!(text().ends_with("of its one file: none fits"), "{}", text());
    fs::write(folder.path().join("b"), "text").unwrap();
    assert!(text().ends_with("of 2 files: none fits"), "{}", text());
}

#[test]
fn a_part_of_a_checkpoint_says_what_to_name_instead() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let (distributed, tensorflow) = (fixtures.join("distributed"), fixtures.join("tensorflow"));
    fs::write(at("ckpt.meta"), "\x0a\x01").unwrap();
    fs::write(at("ckpt.index"), "").unwrap();
    for (path, words) in [
        (distributed.join("__0_0.distcp"), "name the folder"),
        (distributed.join(".metadata"), "name the folder"),
        (
            tensorflow.join("keras_export/model/saved_model.pb"),
            "name the folder",
        ),
        (
            tensorflow.join("keras_checkpoint/checkpoint"),
            "name the folder",
        ),
        (at("ckpt.meta"), "name the checkpoint, "),
    ] {
        let error = open(&path).unwrap_err();
        assert!(matches!(error, SourceError::Choice { .. }), "{error}");
        assert!(error.to_string().contains(words), "{error}");
    }
    // Others have such names, too.
    for name in ["other.meta", "checkpoint", ".metadata"] {
        fs::write(at(name), "text").unwrap();
        let error = open(at(name)).unwrap_err();
        assert!(matches!(error, SourceError::Unknown { .. }), "{error}");
    }
}

#[test]
fn shards_are_those_of_the_index() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    let index = at("model.safetensors.index.json");
    write_safetensors(at("1.safetensors"), &[("a", 4, 1), ("extra", 1, 9)]);
    write_safetensors(at("2.safetensors"), &[("b", 4, 2)]);
    fs::write(at("config.json"), b"{}").unwrap();
    let map =
        r#"{"metadata":{"total_size":8},"weight_map":{"a":"1.safetensors","b":"2.safetensors"}}"#;
    fs::write(&index, map).unwrap();
    let set = open(folder.path()).unwrap();
    assert_eq!(
        (set.format(), names(&set)),
        ("safetensors", vec!["a", "b", "config.json"])
    );
    assert_eq!(set.skipped()[0].name, "extra");
    assert_eq!(names(&open(&index).unwrap()), ["a", "b"]);

    // The index of a variant that was not downloaded is a side file.
    let other = at("pytorch_model.bin.index.json");
    fs::write(&other, r#"{"weight_map":{"a":"1.bin"}}"#).unwrap();
    assert!(names(&open(folder.path()).unwrap()).contains(&"pytorch_model.bin.index.json"));
    fs::write(&other, map).unwrap();
    let error = open(folder.path()).unwrap_err().to_string();
    assert!(error.contains("two indexes"), "{error}");
    assert!(open(&index).is_ok());
    fs::remove_file(&other).unwrap();

    for (shard, tensor, text) in [
        ("../2.safetensors", "b", "not a plain file name"),
        ("/etc/passwd", "b", "not a plain file name"),
        ("..", "b", "not a plain file name"),
        ("3.safetensors", "b", "does not exist"),
        ("2.safetensors", "c", "lacks \"c\""),
    ] {
        fs::write(
            &index,
            format!(r#"{{"weight_map":{{"{tensor}":"{shard}"}}}}"#),
        )
        .unwrap();
        let error = open(folder.path()).unwrap_err().to_string();
        assert!(error.contains(text), "{shard}: {error}");
    }
    fs::write(&index, b"{").unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(SourceError::Malformed { .. })
    ));
}

fn manifest(tensor_file: &str, crc32c: &str, nbytes: u64) -> String {
    format!(
        r#"{{"format":"tensorferry","version":1,"source":{{"metadata":{{"k":"v","n":1}}}},
        "tensors":[{{"index":1,"name":"z","source_name":null,"aliases":[],"file":"z.npy","dtype":"uint8",
        "npy_descr":"|u1","shape":[1],"fortran_order":false,"data_offset":128,"nbytes":1,"crc32c":null}},
        {{"index":0,"name":"net/w","source_name":"w","aliases":["t"],"file":"{tensor_file}","dtype":"uint8",
        "npy_descr":"|u1","shape":[3],"fortran_order":false,"data_offset":128,"nbytes":{nbytes},"crc32c":"{crc32c}"}}],
        "files":[{{"name":"config.json","file":"files/config.json","nbytes":2,"crc32c":"00000001"}}]}}"#
    )
}

#[test]
fn a_landed_checkpoint_is_read_by_its_manifest() {
    let folder = tempdir().unwrap();
    let at = |name: &str| folder.path().join(name);
    fs::create_dir(at("files")).unwrap();
    fs::write(at("files/config.json"), b"{}").unwrap();
    write_npy(at("w.npy"), &[1, 2, 3]);
    write_npy(at("z.npy"), &[9]);
    let outside = tempdir().unwrap();
    write_npy(outside.path().join("w.npy"), &[1, 2, 3]);
    std::os::unix::fs::symlink(outside.path(), at("link")).unwrap();

    fs::write(at("manifest.json"), manifest("w.npy", "0a0B0c0d", 3)).unwrap();
    let set = open(folder.path()).unwrap();
    assert_eq!(
        (set.format(), names(&set)),
        ("tensorferry", vec!["net/w", "z", "config.json"])
    );
    let first = &set.entries()[0];
    assert_eq!(
        (first.crc32c, first.source_name.as_deref()),
        (Some(0x0a0b_0c0d), Some("w"))
    );
    assert_eq!(first.aliases, ["t"]);
    assert_eq!(set.metadata().len(), 1);
    let mut bytes = [0; 3];
    set.read_at(0, 0, &mut bytes).unwrap();
    assert_eq!(bytes, [1, 2, 3]);

    for (file, crc32c, nbytes) in [
        ("../w.npy", "0a0b0c0d", 3),
        ("/w.npy", "0a0b0c0d", 3),
        ("link/w.npy", "0a0b0c0d", 3),
        ("gone.npy", "0a0b0c0d", 3),
        ("z.npy", "0a0b0c0d", 3),
        ("w.npy", "+a0b0c0d", 3),
        ("w.npy", "a0b0c0d", 3),
        ("w.npy", "0a0b0c0d", 2),
    ] {
        fs::write(at("manifest.json"), manifest(file, crc32c, nbytes)).unwrap();
        assert!(open(folder.path()).is_err(), "{file} {crc32c} {nbytes}");
    }
    // What does not begin like .npy is no container either when it is named so.
    fs::write(at("manifest.json"), manifest("w.npy", "0a0b0c0d", 3)).unwrap();
    let whole = fs::read(at("w.npy")).unwrap();
    for byte in 0..6 {
        let mut damaged = whole.clone();
        damaged[byte] ^= 0xff;
        fs::write(at("w.npy"), damaged).unwrap();
        let error = open(folder.path()).unwrap_err();
        assert!(matches!(error, SourceError::Malformed { .. }), "{error}");
    }
    fs::write(at("w.npy"), whole).unwrap();
    let newer = manifest("w.npy", "0a0b0c0d", 3).replace("\"version\":1", "\"version\":2");
    fs::write(at("manifest.json"), newer).unwrap();
    assert!(matches!(
        open(folder.path()),
        Err(SourceError::Unsupported { .. })
    ));
}

#[test]
fn a_rewrite_in_place_with_its_time_set_back_is_seen() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("w.npy");
    write_npy(&path, &[1, 2, 3]);
    let modified = fs::metadata(&path).unwrap().modified().unwrap();
    let set = open(&path).unwrap();
    set.check_unchanged().unwrap();
    write_npy(&path, &[4, 5, 6]);
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_modified(modified)
        .unwrap();
    assert!(matches!(
        set.check_unchanged(),
        Err(SourceError::Changed { .. })
    ));
    let again = open(&path).unwrap();
    assert_eq!(set.states()[0].key, again.states()[0].key);
    assert_ne!(set.states()[0].fingerprint, again.states()[0].fingerprint);
}

#[test]
fn replaced_removed_and_cut_files_have_changed() {
    let folder = tempdir().unwrap();
    let (path, other) = (folder.path().join("w.npy"), folder.path().join("o.npy"));
    let changed = |result: Result<(), SourceError>| {
        assert!(
            matches!(result, Err(SourceError::Changed { .. })),
            "{result:?}"
        );
    };
    let mut bytes = [0; 3];
    write_npy(&path, &[1, 2, 3]);
    let (unread, read) = (open(&path).unwrap(), open(&path).unwrap());
    read.read_at(0, 0, &mut bytes).unwrap();
    fs::File::options()
        .write(true)
        .open(&path)
        .unwrap()
        .set_len(130)
        .unwrap();
    changed(read.read_at(0, 0, &mut bytes));
    changed(unread.read_at(0, 0, &mut bytes));

    write_npy(&path, &[1, 2, 3]);
    let (unread, read) = (open(&path).unwrap(), open(&path).unwrap());
    read.read_at(0, 0, &mut bytes).unwrap();
    write_npy(&other, &[1, 2, 3]);
    fs::rename(&other, &path).unwrap();
    changed(read.check_unchanged());
    changed(unread.read_at(0, 0, &mut bytes));

    let gone = open(&path).unwrap();
    fs::remove_file(&path).unwrap();
    changed(gone.check_unchanged());
    changed(gone.read_at(0, 0, &mut bytes));
}

#[test]
fn many_files_share_few_descriptors() {
    let folder = tempdir().unwrap();
    for i in 0..300u32 {
        write_npy(folder.path().join(format!("w{i:03}.npy")), &i.to_le_bytes());
    }
    let set = open(folder.path()).unwrap();
    assert_eq!((set.entries().len(), set.files.open_count()), (300, 0));
    for _ in 0..2 {
        for i in 0..300u32 {
            let mut bytes = [0; 4];
            set.read_at(i as usize, 0, &mut bytes).unwrap();
            assert_eq!(u32::from_le_bytes(bytes), i);
            assert!(set.files.open_count() <= 256);
        }
    }
    assert_eq!(set.files.open_count(), 256);
    set.check_unchanged().unwrap();
}

#[test]
fn bytes_are_gathered_over_pieces() {
    let folder = tempdir().unwrap();
    let path = folder.path().join("w.npy");
    write_npy(&path, &[0, 1, 2, 3, 4, 5]);
    let mut set = open(&path).unwrap();
    let piece = |file_offset, byte_len, dst_offset| Piece {
        file_index: 0,
        file_offset,
        byte_len,
        dst_offset,
    };
    set.entries[0].pieces = vec![piece(132, 2, 0), piece(128, 1, 2), piece(129, 3, 3)];
    for start in 0..6 {
        for end in start..=6 {
            let mut bytes = vec![0; end - start];
            set.read_at(0, start as u64, &mut bytes).unwrap();
            assert_eq!(bytes, [4, 5, 0, 1, 2, 3][start..end]);
        }
    }
    for (offset, len) in [(6, 1), (0, 7), (u64::MAX, 1)] {
        let result = set.read_at(0, offset, &mut vec![0; len]);
        assert!(matches!(result, Err(SourceError::Range { .. })));
    }
    assert!(matches!(
        set.read_at(1, 0, &mut []),
        Err(SourceError::Range { .. })
    ));
}
