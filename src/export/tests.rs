use super::*;
use crate::{
    ErrorCode,
    format::{checksum, npy::encode_header},
    plan::Order,
    source::SourceOptions,
    store::MANIFEST_FILE,
};
use serde_json::{Value, json};
use std::{collections::BTreeMap, fs};
use tempfile::TempDir;

/// A tensor as it lands: name, aliases, dtype, descr, shape, whether in Fortran order, bytes.
struct Landed {
    name: &'static str,
    aliases: &'static [&'static str],
    dtype: &'static str,
    descr: &'static str,
    shape: Vec<u64>,
    fortran: bool,
    bytes: Vec<u8>,
}

fn tensor(name: &'static str, dtype: &'static str, descr: &'static str, shape: &[u64]) -> Landed {
    let len = crate::Dtype::from_name(dtype)
        .unwrap()
        .byte_len(shape)
        .unwrap();
    let seed = checksum::crc32c(name.as_bytes());
    Landed {
        name,
        aliases: &[],
        dtype,
        descr,
        shape: shape.to_vec(),
        fortran: false,
        bytes: (0..len)
            .map(|i| (i.wrapping_mul(0x9e37_79b9) >> 7) as u8 ^ seed as u8)
            .collect(),
    }
}

/// Tensors of several types, one of them longer than a piece; in Fortran order, empty, a
/// scalar, with a further name.
fn tensors() -> Vec<Landed> {
    let mut all = vec![
        tensor("b/weight", "bfloat16", "<V2", &[3, 5]),
        tensor("a long one", "float32", "<f4", &[(5 << 20) / 4 + 3]),
        tensor("scalar", "float64", "<f8", &[]),
        tensor("empty", "int32", "<i4", &[0, 7]),
        tensor("f8", "float8_e4m3fn", "|V1", &[2, 2]),
        tensor("turned", "int16", "<i2", &[2, 3, 4]),
    ];
    all[0].aliases = &["tied", "scalar"];
    all[5].fortran = true;
    all
}

fn land(dir: &Path, tensors: &[Landed], metadata: Value) {
    let rows = tensors.iter().enumerate().map(|(index, tensor)| {
        let file = format!("{index}.npy");
        let packed = crate::Dtype::from_name(tensor.dtype).unwrap().is_packed();
        let shape = match packed {
            true => vec![tensor.bytes.len() as u64],
            false => tensor.shape.clone(),
        };
        let header = encode_header(tensor.descr, tensor.fortran, &shape);
        let data_offset = header.len();
        fs::write(dir.join(&file), [header, tensor.bytes.clone()].concat()).unwrap();
        json!({
            "index": index, "name": tensor.name, "aliases": tensor.aliases, "file": file,
            "dtype": tensor.dtype, "npy_descr": tensor.descr, "shape": tensor.shape,
            "fortran_order": tensor.fortran, "data_offset": data_offset,
            "nbytes": tensor.bytes.len(),
            "crc32c": format!("{:08x}", checksum::crc32c(&tensor.bytes)),
        })
    });
    let manifest = json!({
        "format": "tensorferry", "version": 1, "source": {"metadata": metadata},
        "tensors": rows.collect::<Vec<_>>(), "files": [],
    });
    fs::write(dir.join(MANIFEST_FILE), manifest.to_string()).unwrap();
}

struct World {
    temp: TempDir,
}

impl World {
    fn of(tensors: &[Landed]) -> World {
        let temp = tempfile::tempdir().unwrap();
        fs::create_dir(temp.path().join("landed")).unwrap();
        fs::create_dir(temp.path().join("out")).unwrap();
        land(
            &temp.path().join("landed"),
            tensors,
            json!({"format": "pt"}),
        );
        World { temp }
    }

    fn source(&self) -> SourceSet {
        open(&self.temp.path().join("landed"))
    }

    fn out(&self, name: &str) -> PathBuf {
        self.temp.path().join("out").join(name)
    }

    /// Names in the folder of the exports, hidden ones too.
    fn names(&self) -> Vec<String> {
        let found = fs::read_dir(self.temp.path().join("out")).unwrap();
        let mut names: Vec<String> = found
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }
}

fn open(path: &Path) -> SourceSet {
    SourceSet::open(&[path], &SourceOptions::default()).unwrap()
}

fn go_on(_: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn plain() -> ExportOptions {
    ExportOptions::default()
}

/// Name, type, shape, bytes in C order.
fn contents(source: &SourceSet) -> BTreeMap<String, (String, Vec<u64>, Vec<u8>)> {
    let entries = source.entries().iter().enumerate();
    entries
        .map(|(index, entry)| {
            let header = &entry.header;
            let mut bytes = vec![0; header.byte_len as usize];
            source.read_turned_at(index, 0, &mut bytes).unwrap();
            let dtype = header.dtype().unwrap().name().to_owned();
            (header.name.clone(), (dtype, header.shape.clone(), bytes))
        })
        .collect()
}

#[test]
fn a_safetensors_file_holds_what_landed() {
    let world = World::of(&tensors());
    let source = world.source();
    let mut told = 0;
    let report = export_safetensors(&source, world.out("m.safetensors"), &plain(), |bytes| {
        told += bytes;
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(world.names(), ["m.safetensors"]);
    assert_eq!(report.files, [world.out("m.safetensors")]);
    assert_eq!((report.tensor_count, report.alias_count), (6, 2));
    assert_eq!(
        (report.bytes, told),
        (source.total_bytes(), source.total_bytes())
    );
    let exported = open(&world.out("m.safetensors"));
    assert_eq!(exported.format(), "safetensors");
    assert!(contents(&exported) == contents(&source));
    assert!(
        exported
            .entries()
            .iter()
            .all(|e| e.header.order == Order::C)
    );
    // A further name that is a tensor of its own is not told.
    let texts = [("format", "pt"), ("tied", "b/weight")];
    let texts = texts.map(|(key, text)| (key.to_owned(), text.to_owned()));
    assert_eq!(exported.metadata(), &BTreeMap::from(texts));
}

#[test]
fn shards_and_their_index_hold_what_landed() {
    let world = World::of(&tensors());
    let source = world.source();
    let mut options = plain();
    options.max_shard_bytes = Some(100);
    let report = export_safetensors(&source, world.out("m.safetensors"), &options, go_on).unwrap();
    // 30 | 5 MiB and more | 8 + 0 + 4 + 48: the second is alone, and none is empty.
    let expected = [
        "m-00001-of-00003.safetensors",
        "m-00002-of-00003.safetensors",
        "m-00003-of-00003.safetensors",
        "m.safetensors.index.json",
    ];
    assert_eq!(world.names(), expected);
    assert_eq!(report.files, expected.map(|name| world.out(name)));
    let index = world.out("m.safetensors.index.json");
    let json: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
    assert_eq!(json["metadata"]["total_size"], source.total_bytes());
    assert_eq!(json["weight_map"]["a long one"], expected[1]);
    assert_eq!(json["weight_map"].as_object().unwrap().len(), 6);
    assert!(contents(&open(&index)) == contents(&source));
    // All in one needs no index.
    options.max_shard_bytes = Some(source.total_bytes());
    let report = export_safetensors(&source, world.out("n.safetensors"), &options, go_on).unwrap();
    assert_eq!(report.files, [world.out("n.safetensors")]);
    options.max_shard_bytes = Some(0);
    let refused = export_safetensors(&source, world.out("o.safetensors"), &options, go_on);
    assert_eq!(refused.unwrap_err().code(), ErrorCode::Usage);
}

#[test]
fn an_npz_file_holds_what_landed_as_it_landed() {
    let mut all = tensors();
    all.push(tensor("z", "complex128", "<c16", &[2]));
    all.push(tensor("big", "uint32", ">u4", &[3]));
    all.push(tensor("blocks", "q8_0", "|u1", &[2, 32]));
    all.push(tensor("../näme", "uint8", "|u1", &[1]));
    let world = World::of(&all);
    let source = world.source();
    let report = export_npz(&source, world.out("m.npz"), &plain(), go_on).unwrap();
    assert_eq!(world.names(), ["m.npz"]);
    assert_eq!(report.tensor_count, 10);
    let exported = open(&world.out("m.npz"));
    assert!(exported.skipped().is_empty(), "{:?}", exported.skipped());
    assert_eq!(exported.format(), "npz");
    for (index, (entry, tensor)) in exported.entries().iter().zip(&all).enumerate() {
        let header = &entry.header;
        assert_eq!(header.name, tensor.name);
        assert_eq!(
            header.order == Order::Fortran,
            tensor.fortran,
            "{}",
            tensor.name
        );
        assert_eq!(header.big_endian, tensor.descr.starts_with('>'));
        let mut bytes = vec![0; header.byte_len as usize];
        exported.read_at(index, 0, &mut bytes).unwrap();
        assert!(bytes == tensor.bytes, "{}", tensor.name);
    }
    let mut options = plain();
    options.max_shard_bytes = Some(1 << 20);
    let refused = export_npz(&source, world.out("n.npz"), &options, go_on);
    assert_eq!(refused.unwrap_err().code(), ErrorCode::Usage);
}

#[test]
fn what_safetensors_cannot_express_is_named_and_nothing_is_written() {
    let mut all = tensors();
    all.push(tensor("z", "complex128", "<c16", &[2]));
    all.push(tensor("big", "uint32", ">u4", &[3]));
    all.push(tensor("blocks", "q8_0", "|u1", &[2, 32]));
    let world = World::of(&all);
    let refused = export_safetensors(&world.source(), world.out("m.safetensors"), &plain(), go_on);
    let error = refused.unwrap_err();
    assert_eq!(error.code(), ErrorCode::Usage);
    let text = error.to_string();
    for part in [
        "\"z\" (complex128)",
        "\"big\" (big-endian)",
        "\"blocks\" (q8_0)",
        ".npz",
    ] {
        assert!(text.contains(part), "{text}");
    }
    assert!(!text.contains("scalar"), "{text}");
    assert!(world.names().is_empty());
}

/// Both kinds, for what holds for both.
type Export = fn(
    &SourceSet,
    &Path,
    &ExportOptions,
    &mut dyn FnMut(u64) -> ControlFlow<()>,
) -> Result<ExportReport, Error>;
const BOTH: [(&str, Export); 2] = [
    ("m.safetensors", |source, out, options, progress| {
        export_safetensors(source, out, options, progress)
    }),
    ("m.npz", |source, out, options, progress| {
        export_npz(source, out, options, progress)
    }),
];

#[test]
fn a_file_that_exists_is_replaced_only_on_request() {
    for (name, export) in BOTH {
        let world = World::of(&tensors());
        fs::write(world.out(name), "mine").unwrap();
        let mut options = plain();
        let refused = export(&world.source(), &world.out(name), &options, &mut go_on);
        assert_eq!(refused.unwrap_err().code(), ErrorCode::Exists);
        assert_eq!(fs::read(world.out(name)).unwrap(), b"mine");
        options.overwrite = true;
        export(&world.source(), &world.out(name), &options, &mut go_on).unwrap();
        assert_eq!(open(&world.out(name)).entries().len(), 6);
        assert_eq!(world.names(), [name]);
        fs::remove_file(world.out(name)).unwrap();
        fs::create_dir(world.out(name)).unwrap();
        let refused = export(&world.source(), &world.out(name), &options, &mut go_on);
        assert_eq!(refused.unwrap_err().code(), ErrorCode::Usage);
    }
}

#[test]
fn a_file_that_appears_meanwhile_is_not_replaced() {
    for (name, export) in BOTH {
        let world = World::of(&tensors());
        let mut meddle = |_| {
            fs::write(world.out(name), "mine").unwrap();
            ControlFlow::Continue(())
        };
        let refused = export(&world.source(), &world.out(name), &plain(), &mut meddle);
        assert_eq!(refused.unwrap_err().code(), ErrorCode::Exists);
        assert_eq!(fs::read(world.out(name)).unwrap(), b"mine");
        assert_eq!(world.names(), [name]);
    }
    // The shards before it lose their names again.
    let world = World::of(&tensors());
    let index = "m.safetensors.index.json";
    let mut options = plain();
    options.max_shard_bytes = Some(100);
    let refused = export_safetensors(
        &world.source(),
        world.out("m.safetensors"),
        &options,
        |_| {
            fs::write(world.out(index), "mine").unwrap();
            ControlFlow::Continue(())
        },
    );
    assert_eq!(refused.unwrap_err().code(), ErrorCode::Exists);
    assert_eq!(world.names(), [index]);
}

#[test]
fn damaged_bytes_are_refused_and_leave_nothing() {
    // The first, the last of the second, and one in Fortran order.
    for (file, from_end) in [("0.npy", 1), ("1.npy", 1), ("5.npy", 48)] {
        for (name, export) in BOTH {
            let world = World::of(&tensors());
            let path = world.temp.path().join("landed").join(file);
            let mut bytes = fs::read(&path).unwrap();
            let at = bytes.len() - from_end;
            bytes[at] ^= 0x10;
            fs::write(&path, bytes).unwrap();
            let refused = export(&world.source(), &world.out(name), &plain(), &mut go_on);
            let error = refused.unwrap_err();
            assert!(matches!(error, Error::Damaged { .. }), "{file}: {error:?}");
            assert_eq!(error.code(), ErrorCode::Integrity);
            assert!(world.names().is_empty(), "{:?}", world.names());
        }
    }
}

#[test]
fn a_source_that_changes_meanwhile_is_refused_and_leaves_nothing() {
    for (name, export) in BOTH {
        let world = World::of(&tensors());
        let first = world.temp.path().join("landed/0.npy");
        let mut change = |_| {
            // Read already: only looking again shows it.
            fs::write(&first, "other").unwrap();
            ControlFlow::Continue(())
        };
        let refused = export(&world.source(), &world.out(name), &plain(), &mut change);
        assert_eq!(refused.unwrap_err().code(), ErrorCode::SourceChanged);
        assert!(world.names().is_empty());
    }
}

#[test]
fn an_interrupt_at_any_piece_leaves_nothing() {
    for (name, export) in BOTH {
        let world = World::of(&tensors());
        let mut piece_count = 0;
        let mut count = |_| {
            piece_count += 1;
            ControlFlow::Continue(())
        };
        export(&world.source(), &world.out(name), &plain(), &mut count).unwrap();
        fs::remove_file(world.out(name)).unwrap();
        assert!(piece_count > 5);
        for last in 0..piece_count {
            let mut left = last;
            let mut stop = |_| {
                if left == 0 {
                    return ControlFlow::Break(());
                }
                left -= 1;
                ControlFlow::Continue(())
            };
            let stopped = export(&world.source(), &world.out(name), &plain(), &mut stop);
            assert!(matches!(stopped, Err(Error::Interrupted)), "{last}");
            assert!(world.names().is_empty(), "{:?}", world.names());
        }
    }
}

#[test]
fn what_a_killed_export_left_is_removed_and_what_a_live_one_needs_is_kept() {
    let world = World::of(&tensors());
    let dead = world.out(".tensorferry-export-00000000000000aa");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("m.npz"), "half").unwrap();
    // A second export into the same folder, in the middle of the first.
    let mut was_run = false;
    export_npz(&world.source(), world.out("m.npz"), &plain(), |_| {
        assert!(!dead.exists());
        if !was_run {
            was_run = true;
            let out = world.out("m.safetensors");
            export_safetensors(&world.source(), out, &plain(), go_on).unwrap();
        }
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(world.names(), ["m.npz", "m.safetensors"]);
    let exported = open(&world.out("m.safetensors"));
    assert!(contents(&exported) == contents(&world.source()));
    assert_eq!(open(&world.out("m.npz")).entries().len(), 6);
}

#[test]
fn a_folder_that_does_not_exist_and_a_source_without_tensors_are_refused() {
    let world = World::of(&[]);
    for (name, export) in BOTH {
        let none = export(&world.source(), &world.out(name), &plain(), &mut go_on);
        assert_eq!(none.unwrap_err().code(), ErrorCode::Usage);
        let world = World::of(&tensors());
        let absent = world.out("absent").join(name);
        let refused = export(&world.source(), &absent, &plain(), &mut go_on);
        assert_eq!(refused.unwrap_err().code(), ErrorCode::Usage);
        assert!(world.names().is_empty());
    }
}
