//! A hostile client announces names, shapes and sizes; somebody on the receiver
//! puts links and devices in the way.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::*;
use std::{os::unix::fs::symlink, path::Path};
use tensorferry::wire::pb;
use tonic::Code;

/// Announces one entry in a session of its own.
async fn announce(server: &TestServer, parts: Vec<Part>) -> Ending {
    let load = Load::of(parts);
    let mut session = server.open(open_ended("victim", [1; 16])).await;
    session.refused(load.announcement()).await
}

fn mkfifo(path: &Path) {
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path,
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::from_raw_mode(0o600),
        0,
    )
    .unwrap();
}

#[tokio::test]
async fn h1_bad_checkpoint_names_are_refused_before_accept() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    server.serves_others().await;
    let before = tree(temp.path());
    let (long, deep, part) = ("x/".repeat(600) + "x", ["a"; 17].join("/"), "p".repeat(256));
    for name in [
        "",
        "..",
        "../x",
        "a/../b",
        "/a",
        "a/",
        "a//b",
        ".",
        ".hidden",
        "a/.hidden",
        "a\\b",
        "a\0b",
        "a\nb",
        "a b",
        "ä",
        "a\u{202e}b",
        ".tensorferry",
        ".tensorferry/transfers/x",
        &long,
        &deep,
        &part,
    ] {
        let ending = server.refusal(open_ended(name, [1; 16])).await;
        assert_eq!(
            ending,
            refused(Code::InvalidArgument, "BAD_NAME"),
            "{name:?}"
        );
    }
    assert_eq!(tree(temp.path()), before);
    server.serves_others().await;
}

#[tokio::test]
async fn h1_bad_entry_names_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let long = "x".repeat(4097);
    for name in ["", "a\0b", &long] {
        let mut part = tensor("w", 5);
        part.entry.name = name.to_owned();
        let ending = announce(&server, vec![part]).await;
        assert_eq!(
            ending,
            refused(Code::InvalidArgument, "BAD_NAME"),
            "{name:?}"
        );
    }
    let (long, deep) = ("y".repeat(1025), ["a"; 17].join("/"));
    for name in [
        "../x",
        "/etc/passwd",
        "a/../x",
        "a/./x",
        "a//x",
        "a/",
        ".",
        "..",
        "a\\x",
        "a\nx",
        "a\u{202e}x",
        &long,
        &deep,
    ] {
        let ending = announce(&server, vec![blob(name, b"x")]).await;
        assert_eq!(
            ending,
            refused(Code::InvalidArgument, "BAD_NAME"),
            "{name:?}"
        );
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h1_tensor_names_are_never_paths() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let names = [
        "../../escape",
        "/abs",
        "..",
        ".",
        "manifest.json",
        "a/b",
        "CON",
        "a\\b",
        "\u{202e}x",
        "files",
    ];
    let load = Load::of(names.iter().map(|n| tensor(n, 9)).collect());
    server.push(load.open("odd", [1; 16]), &load).await;
    server.assert_landed("odd", &load);
    let files: Vec<_> = std::fs::read_dir(temp.path().join("odd"))
        .unwrap()
        .collect();
    assert_eq!(
        files.len(),
        names.len() + 1,
        "all lie flat beside the manifest"
    );
}

#[tokio::test]
async fn h2_a_name_announced_twice_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let expected = refused(Code::InvalidArgument, "DUPLICATE_TENSOR");
    assert_eq!(
        announce(&server, vec![tensor("w", 5), tensor("w", 5)]).await,
        expected
    );
    assert_eq!(
        announce(&server, vec![tensor("w", 5), tensor("w", 6)]).await,
        expected
    );
    assert_eq!(
        announce(&server, vec![tensor("w", 5), blob("w", b"x")]).await,
        expected
    );
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h2_names_that_collide_as_files_land_in_files_of_their_own() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![
        tensor("Weight", 5),
        tensor("weight", 6),
        tensor("a/b", 7),
        tensor("a:b", 8),
        blob("README", b"one"),
        blob("readme", b"two"),
        // A file and a folder of one name.
        blob("notes", b"file"),
        blob("notes/today", b"inside"),
        blob("log/today", b"inside"),
        blob("log", b"file"),
    ]);
    server.push(load.open("folded", [1; 16]), &load).await;
    server.assert_landed("folded", &load);
    let files = load
        .parts
        .iter()
        .map(|p| server.landed_file("folded", &p.entry.name));
    let mut folded: Vec<String> = files.map(|f| f.to_str().unwrap().to_lowercase()).collect();
    folded.sort();
    folded.dedup();
    assert_eq!(folded.len(), load.parts.len());
}

#[tokio::test]
async fn h2_names_ground_to_share_their_mark_land_in_files_of_their_own() {
    // Both become w_________________~ with the same 8 hex digits: found by trying
    // 2^18 names of equal safe form.
    let (mut seen, mut pair) = (std::collections::HashMap::new(), None);
    for bits in 0..1u32 << 18 {
        let name: String = (0..18)
            .map(|i| if bits >> i & 1 == 0 { ':' } else { '/' })
            .collect();
        let mark = blake3::hash(name.as_bytes()).to_hex()[..8].to_owned();
        if let Some(other) = seen.insert(mark, name.clone()) {
            pair = Some((other, name));
            break;
        }
    }
    let (one, two) = pair.expect("2^35 pairs of 32 bits");
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor(&one, 50), tensor(&two, 50)]);
    server.push(load.open("ground", [1; 16]), &load).await;
    server.assert_landed("ground", &load);
    assert_ne!(
        server.landed_file("ground", &one),
        server.landed_file("ground", &two)
    );
}

#[tokio::test]
async fn h3_a_link_or_device_under_the_final_name_is_never_followed() {
    let (temp, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = TestServer::start(temp.path()).await;
    let expected = refused(Code::FailedPrecondition, "UNSAFE_PATH");
    symlink(outside.path(), temp.path().join("link")).unwrap();
    symlink(outside.path().join("absent"), temp.path().join("dangling")).unwrap();
    mkfifo(&temp.path().join("fifo"));
    std::fs::write(temp.path().join("file"), b"mine").unwrap();
    let load = Load::of(vec![tensor("w", 5)]);
    for name in [
        "link",
        "link/inside",
        "dangling",
        "fifo",
        "fifo/inside",
        "file",
        "file/inside",
    ] {
        for overwrite in [false, true] {
            let mut open = load.open(name, [1; 16]);
            open.overwrite = overwrite;
            assert_eq!(server.refusal(open).await, expected, "{name} {overwrite}");
        }
    }
    assert_eq!(std::fs::read(temp.path().join("file")).unwrap(), b"mine");
    assert!(tree(outside.path()).is_empty());
    server.serves_others().await;
}

#[tokio::test]
async fn h3_a_link_put_under_the_final_name_during_the_transfer_is_not_followed() {
    let (temp, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("w", 2 * CHUNK)]);
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    session.send_wanted(&load).await;
    let link = temp.path().join("victim");
    symlink(outside.path(), &link).unwrap();
    let ending = session.refused(frame_finish(load.finish())).await;
    assert_eq!(ending, refused(Code::FailedPrecondition, "UNSAFE_PATH"));
    assert!(tree(outside.path()).is_empty());
    server.assert_unpublished("victim").await;
    // Without the link the same transfer goes on, and nothing is sent again.
    std::fs::remove_file(link).unwrap();
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    assert!(session.wanted[&0].is_empty());
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h3_a_staged_file_that_was_replaced_by_a_link_or_device_is_never_written() {
    let (temp, outside) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("w", 3 * CHUNK)]);
    let secret = outside.path().join("secret");
    let links: [fn(&Path, &Path); 3] = [
        |secret, staged| symlink(secret, staged).unwrap(),
        |secret, staged| std::fs::hard_link(secret, staged).unwrap(),
        |_, staged| mkfifo(staged),
    ];
    for (id, link) in (1..).zip(links) {
        let mut session = server.open(load.open("victim", [id; 16])).await;
        session.announce(&load).await;
        session.send(load.chunk(0, 0)).await;
        session.settle().await;
        assert_eq!(
            session.refused(frame_abort("INTERRUPTED")).await,
            refused(Code::Cancelled, "INTERRUPTED")
        );
        let staged = server.staging().join("data/w.npy");
        // As long as the staged file and with its header, so that only its kind tells.
        std::fs::copy(&staged, &secret).unwrap();
        let before = std::fs::read(&secret).unwrap();
        std::fs::remove_file(&staged).unwrap();
        link(&secret, &staged);
        let ending = server.refusal(load.open("victim", [id; 16])).await;
        assert_eq!(ending, refused(Code::FailedPrecondition, "UNSAFE_PATH"));
        server.assert_unpublished("victim").await;
        let mut open = load.open("victim", [id; 16]);
        open.restart = true;
        open.overwrite = true;
        server.push(open, &load).await;
        server.assert_landed("victim", &load);
        assert!(
            std::fs::read(&secret).unwrap() == before,
            "the file outside was written"
        );
        std::fs::remove_dir_all(temp.path().join("victim")).unwrap();
    }
}

#[tokio::test]
async fn h3_a_journal_that_was_replaced_by_a_device_hangs_nobody() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("w", CHUNK)]);
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    session.refused(frame_abort("")).await.unwrap_err();
    let journal = server.staging().join("journal");
    std::fs::remove_file(&journal).unwrap();
    mkfifo(&journal);
    let ending = server.refusal(load.open("victim", [1; 16])).await;
    assert_eq!(ending, refused(Code::FailedPrecondition, "UNSAFE_PATH"));
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h4_shapes_and_types_that_do_not_fit_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let entry = |dtype: &str, shape: &[u64], byte_len| pb::Entry {
        name: "w".to_owned(),
        kind: pb::EntryKind::Tensor.into(),
        dtype: dtype.to_owned(),
        shape: shape.to_vec(),
        byte_len,
        ..Default::default()
    };
    let mut bad = vec![
        entry("float32", &[u64::MAX, 2], 8),
        entry("float32", &[1 << 40, 1 << 40], 1 << 63),
        entry("float32", &[u64::MAX], u64::MAX),
        entry("float32", &[2, 3], 23),
        entry("float32", &[2, 3], 25),
        entry("float32", &[0], 4),
        entry("float32", &[], 0),
        entry("uint8", &[1; 33], 1),
        entry("object", &[1], 8),
        entry("float31", &[1], 4),
        entry("", &[1], 1),
        entry("O", &[1], 8),
        // Three 4-bit elements do not fill whole bytes.
        entry("float4_e2m1fn", &[3], 2),
        pb::Entry {
            big_endian: true,
            ..entry("uint8", &[4], 4)
        },
        pb::Entry {
            big_endian: true,
            ..entry("bfloat16", &[4], 8)
        },
    ];
    let blob = blob("config.json", b"1234").entry;
    bad.push(pb::Entry {
        shape: vec![4],
        ..blob.clone()
    });
    bad.push(pb::Entry {
        big_endian: true,
        ..blob.clone()
    });
    bad.push(pb::Entry {
        order: pb::Order::Fortran.into(),
        ..blob
    });
    for entry in bad {
        let mut part = tensor("w", 1);
        part.entry = entry;
        let shown = part.entry.clone();
        let ending = announce(&server, vec![part]).await;
        assert_eq!(
            ending,
            refused(Code::InvalidArgument, "BAD_SHAPE"),
            "{shown:?}"
        );
    }
    let mut part = tensor("w", 1);
    part.entry.kind = 0;
    assert_eq!(
        announce(&server, vec![part]).await,
        refused(Code::InvalidArgument, "BAD_FRAME")
    );
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h5_more_than_the_disk_holds_is_refused_and_leaves_no_trace() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    server.serves_others().await;
    let before = tree(temp.path());
    let load = Load::of(vec![tensor("w", 5)]);
    for (total_bytes, entry_count) in [
        (1 << 60, 1),
        (u64::MAX, 1),
        (5, 1 << 60),
        (u64::MAX, u64::MAX),
    ] {
        let open = pb::SenderOpen {
            total_bytes,
            entry_count,
            ..load.open("deep/below/huge", [1; 16])
        };
        assert_eq!(
            server.refusal(open).await,
            refused(Code::ResourceExhausted, "DISK_QUOTA")
        );
    }
    assert_eq!(tree(temp.path()), before);
    server.serves_others().await;
}

#[tokio::test]
async fn h5_more_entries_or_bytes_than_open_said_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("a", 5), tensor("b", 6)]);
    let promised = load.open("victim", [1; 16]);
    for open in [
        pb::SenderOpen {
            total_bytes: 10,
            ..promised.clone()
        },
        pb::SenderOpen {
            entry_count: 1,
            ..promised
        },
    ] {
        let mut session = server.open(open).await;
        let ending = session.refused(load.announcement()).await;
        assert_eq!(
            ending,
            refused(Code::FailedPrecondition, "MANIFEST_MISMATCH")
        );
    }
    server.assert_unpublished("victim").await;
}
