//! All tensors in one safetensors file: the same promises as for a file each.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::*;
use std::{fs, os::unix::fs::FileExt, path::Path};
use tensorferry::{
    Checkpoint, Dtype, Error, NpyDtype, OutFormat, PushOptions, SourceSet,
    format::{npy::encode_header, safetensors},
    wire::pb,
};
use tonic::Code;

const ID: [u8; 16] = [1; 16];

/// A session that asks for one file, whose header takes what it takes.
fn open_one_file(load: &Load, name: &str) -> pb::SenderOpen {
    let tensors = load.parts.iter().filter(|p| !p.entry.dtype.is_empty());
    let specs: Vec<_> = tensors
        .map(|part| safetensors::TensorSpec {
            name: &part.entry.name,
            dtype: Dtype::from_name(&part.entry.dtype).unwrap(),
            shape: &part.entry.shape,
        })
        .collect();
    let encoded = safetensors::encode_header(&specs, &Default::default()).unwrap();
    pb::SenderOpen {
        out_format: pb::OutFormat::Safetensors.into(),
        container_header_len: encoded.header.len() as u64,
        ..load.open(name, ID)
    }
}

/// Every tensor of a load is in the published file, as the format's reader sees it.
fn assert_in_one_file(server: &TestServer, name: &str, load: &Load) {
    let set = SourceSet::open(
        &[server.root.join(name).join("model.safetensors")],
        &Default::default(),
    )
    .unwrap();
    assert_eq!(set.format(), "safetensors");
    for part in load.parts.iter().filter(|p| !p.entry.dtype.is_empty()) {
        let mut entries = set.entries().iter();
        let index = entries.position(|e| e.header.name == part.entry.name);
        let index = index.unwrap_or_else(|| panic!("{} is there", part.entry.name));
        let header = &set.entries()[index].header;
        assert_eq!(header.dtype().unwrap().name(), part.entry.dtype);
        assert_eq!(header.shape, part.entry.shape);
        let mut found = vec![0; part.bytes.len()];
        set.read_at(index, 0, &mut found).unwrap();
        assert!(
            found == part.bytes,
            "the bytes of {} differ",
            part.entry.name
        );
    }
    let report = Checkpoint::open(server.root.join(name))
        .unwrap()
        .verify(|_| {});
    assert_eq!(report.unwrap().damages, []);
}

/// Leaves these cells of each entry in an unfinished transfer.
async fn leave(server: &TestServer, load: &Load, cells: &[(u32, u64)]) {
    let mut session = server.open(open_one_file(load, "victim")).await;
    session.announce(load).await;
    for &(entry, cell) in cells {
        session.send(load.chunk(entry, cell)).await;
    }
    session.settle().await;
    let ending = session.refused(frame_abort("INTERRUPTED")).await;
    assert_eq!(ending, refused(Code::Cancelled, "INTERRUPTED"));
}

fn write_npy(dir: &Path, name: &str, descr: &str, shape: &[u64], bytes: &[u8]) {
    fs::create_dir_all(dir).unwrap();
    let header = encode_header(descr, false, shape);
    fs::write(dir.join(name), [&header, bytes].concat()).unwrap();
}

fn one_file() -> PushOptions {
    let mut options = PushOptions::default();
    options.out_format = OutFormat::Safetensors;
    options
}

#[tokio::test]
async fn a_push_lands_aligned_tensors_and_side_files_and_is_recognised_again() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path().join("root").as_path()).await;
    let dir = temp.path().join("source");
    write_npy(&dir, "a.npy", "|u1", &[5], &noise("a", 5));
    write_npy(&dir, "b.npy", "<f8", &[3, 2], &noise("b", 48));
    write_npy(
        &dir,
        "c.npy",
        "<V2",
        &[CHUNK as u64],
        &noise("c", 2 * CHUNK),
    );
    write_npy(&dir, "empty.npy", "<f4", &[0, 7], &[]);
    fs::write(dir.join("config.json"), "{}").unwrap();
    let source = common::product::open_source(&dir);
    let name = "model".parse().unwrap();
    let report = server
        .client()
        .push(source.clone(), &name, one_file())
        .await
        .unwrap();
    assert_eq!(report.bytes, source.total_bytes());

    let folder = server.root.join("model");
    let load = Load::of_source(&source);
    assert_in_one_file(&server, "model", &load);
    assert_eq!(fs::read(folder.join("files/config.json")).unwrap(), b"{}");
    let mut files: Vec<_> = fs::read_dir(&folder)
        .unwrap()
        .map(|f| f.unwrap().file_name())
        .collect();
    files.sort();
    assert_eq!(files, ["files", "manifest.json", "model.safetensors"]);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    for tensor in checkpoint.tensors() {
        let width = tensor.dtype.bits() / 8;
        assert_eq!(tensor.data_offset % width, 0, "{} is aligned", tensor.name);
    }
    let b = checkpoint.tensor("b").unwrap().unwrap();
    assert_eq!(b.bytes(), noise("b", 48));
    assert_eq!(checkpoint.tensor("empty").unwrap().unwrap().bytes(), b"");
    // And it is a source like any other.
    let again = SourceSet::open(&[&folder], &Default::default()).unwrap();
    assert_eq!(again.total_bytes(), source.total_bytes());
}

#[tokio::test]
async fn an_interrupted_transfer_goes_on_inside_the_file() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let sources = vec![source(1, 1, true)];
    let parts = vec![
        tensor("a", 2 * CHUNK + 1),
        tensor("b", 3 * CHUNK),
        blob("c.json", b"{}"),
    ];
    let load = Load::from_sources(sources, parts);
    leave(&server, &load, &[(0, 2), (1, 1)]).await;
    assert!(
        !fs::read(server.staging().join("data/model.safetensors")).unwrap()[..8]
            .iter()
            .any(|&b| b != 0),
        "an unfinished file has no header"
    );
    let mut session = server.open(open_one_file(&load, "victim")).await;
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [0, 1].into());
    assert_eq!(session.wanted[&1], [0, 2].into());
    session.send_wanted(&load).await;
    session.finish(&load).await;
    assert_in_one_file(&server, "victim", &load);
}

#[tokio::test]
async fn a_tensor_that_grew_pushes_the_next_one_on_and_nothing_is_mixed() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let before = Load::from_sources(
        vec![source(1, 1, true)],
        vec![
            tensor("a", CHUNK),
            tensor("b", 2 * CHUNK),
            tensor("c", CHUNK),
        ],
    );
    leave(&server, &before, &[(0, 0), (1, 0), (1, 1), (2, 0)]).await;
    let after = Load::from_sources(
        vec![source(1, 1, true)],
        vec![
            tensor("a", 2 * CHUNK),
            tensor("b", 2 * CHUNK),
            tensor("c", CHUNK),
        ],
    );
    let mut session = server.open(open_one_file(&after, "victim")).await;
    session.announce(&after).await;
    for entry in 0..3 {
        let cells = after.parts[entry as usize].bytes.len().div_ceil(CHUNK) as u64;
        assert_eq!(
            session.wanted[&entry],
            (0..cells).collect(),
            "entry {entry}"
        );
    }
    session.send_wanted(&after).await;
    session.finish(&after).await;
    assert_in_one_file(&server, "victim", &after);
}

#[tokio::test]
async fn bytes_where_a_longer_header_goes_are_never_taken_for_durable_again() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    // `a` of the first manifest lies where the header of the second one goes.
    let first = Load::from_sources(vec![source(1, 1, true)], vec![tensor("a", 16)]);
    leave(&server, &first, &[(0, 0)]).await;
    let long = "b".repeat(500);
    let parts = vec![tensor(&long, CHUNK), tensor("c", 8)];
    let second = Load::from_sources(vec![source(1, 1, true)], parts);
    leave(&server, &second, &[(1, 0)]).await;
    let mut session = server.open(open_one_file(&first, "victim")).await;
    session.announce(&first).await;
    assert_eq!(session.wanted[&0], [0].into(), "it is asked for again");
    session.send_wanted(&first).await;
    session.finish(&first).await;
    assert_in_one_file(&server, "victim", &first);
}

#[tokio::test]
async fn what_cannot_be_one_file_is_refused_before_a_byte_is_taken() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("a", 10)]);
    let open = open_one_file(&load, "victim");
    for header_len in [0, 8, open.container_header_len + 4, 100_000_000, u64::MAX] {
        let open = pb::SenderOpen {
            container_header_len: header_len,
            ..open.clone()
        };
        let ending = server.refusal(open).await;
        assert_eq!(
            ending,
            refused(Code::Unimplemented, "UNSUPPORTED"),
            "{header_len}"
        );
    }
    let without = pb::SenderOpen {
        out_format: pb::OutFormat::Npy.into(),
        ..open.clone()
    };
    let ending = server.refusal(without).await;
    assert_eq!(ending, refused(Code::Unimplemented, "UNSUPPORTED"));
    assert!(!server.root.join(".tensorferry/transfers").exists());

    // A complex number of 128 bits has no name in the format.
    let mut part = tensor("z", 16);
    part.entry.dtype = "complex128".to_owned();
    part.entry.shape = vec![1];
    let foreign = Load::of(vec![part]);
    let open = pb::SenderOpen {
        entries_digest: vec![0; 16].into(),
        container_header_len: 128,
        out_format: pb::OutFormat::Safetensors.into(),
        ..foreign.open("victim", ID)
    };
    let mut session = server.open(open).await;
    session.send(foreign.announcement()).await;
    assert_eq!(
        session.end().await,
        refused(Code::Unimplemented, "UNSUPPORTED")
    );
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn a_header_that_does_not_fit_is_never_published() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("a", CHUNK)]);
    let open = pb::SenderOpen {
        container_header_len: 16,
        ..open_one_file(&load, "victim")
    };
    let mut session = server.open(open).await;
    session.announce(&load).await;
    session.send_wanted(&load).await;
    let ending = session.refused(frame_finish(load.finish())).await;
    assert_eq!(
        ending,
        refused(Code::FailedPrecondition, "MANIFEST_MISMATCH")
    );
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn the_client_names_the_tensors_that_do_not_fit_and_contacts_nobody() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path().join("root").as_path()).await;
    let dir = temp.path().join("source");
    write_npy(&dir, "fine.npy", "<f4", &[1], &[0; 4]);
    write_npy(&dir, "wide.npy", "<c16", &[1], &[0; 16]);
    write_npy(&dir, "big.npy", ">f4", &[1], &[0; 4]);
    let source = common::product::open_source(&dir);
    let name = "model".parse().unwrap();
    let pushed = server.client().push(source, &name, one_file()).await;
    let Err(Error::Usage(why)) = pushed else {
        panic!("{pushed:?}");
    };
    assert!(
        why.contains("\"wide\"") && why.contains("\"big\"") && !why.contains("fine"),
        "{why}"
    );
    assert!(server.status("model").await.is_err());

    let mut options = one_file();
    options.npy_dtype = NpyDtype::Named;
    assert!(matches!(
        options.check_for(&SourceSet::open(&[dir.join("fine.npy")], &Default::default()).unwrap()),
        Err(Error::Usage(_))
    ));
    assert!(matches!(
        server.client().push_open(&name, "key", one_file()),
        Err(Error::Usage(_))
    ));
}

#[tokio::test]
async fn verify_sees_damage_in_the_header_and_in_a_tensor() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("a", CHUNK), tensor("b", 9)]);
    server.push(open_one_file(&load, "victim"), &load).await;
    let folder = server.root.join("victim");
    let path = folder.join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    let offset = Checkpoint::open(&folder)
        .unwrap()
        .tensors()
        .nth(1)
        .unwrap()
        .data_offset;
    for (at, damaged) in [(12, 2), (offset, 1)] {
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[whole[at as usize] ^ 1], at).unwrap();
        let checkpoint = Checkpoint::open(&folder).unwrap();
        assert_eq!(
            checkpoint.verify(|_| {}).unwrap().damages.len(),
            damaged,
            "byte {at}"
        );
        file.write_all_at(&[whole[at as usize]], at).unwrap();
    }
    let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.set_len(whole.len() as u64 + 1).unwrap();
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert!(matches!(checkpoint.tensor("a"), Err(Error::Damaged { .. })));
}

#[tokio::test]
async fn npy_files_can_name_the_types_of_ml_dtypes() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path().join("root").as_path()).await;
    let dir = temp.path().join("source");
    write_npy(&dir, "w.npy", "<V2", &[3], &[1, 2, 3, 4, 5, 6]);
    write_npy(&dir, "x.npy", "<f4", &[1], &[0; 4]);
    let source = common::product::open_source(&dir);
    let name = "model".parse().unwrap();
    let mut options = PushOptions::default();
    options.npy_dtype = NpyDtype::Named;
    server.client().push(source, &name, options).await.unwrap();
    let folder = server.root.join("model");
    let w = fs::read(folder.join("w.npy")).unwrap();
    assert!(String::from_utf8_lossy(&w[..128]).contains("'descr': 'bfloat16'"));
    assert_eq!(w[128..], [1, 2, 3, 4, 5, 6]);
    let checkpoint = Checkpoint::open(&folder).unwrap();
    assert_eq!(checkpoint.verify(|_| {}).unwrap().damages, []);
    let descrs: Vec<_> = checkpoint.tensors().map(|t| t.npy_descr.as_str()).collect();
    assert_eq!(descrs, ["bfloat16", "<f4"]);
    let again = SourceSet::open(&[&folder], &Default::default()).unwrap();
    assert_eq!(again.entries()[0].header.dtype(), Some(Dtype::Bf16));
}
