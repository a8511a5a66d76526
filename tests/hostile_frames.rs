//! A hostile client speaks out of turn, and asks for publications that it did
//! not earn.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::{raw::raw_push, *};
use prost::Message as _;
use std::os::unix::fs::MetadataExt;
use tensorferry::wire::pb;
use tonic::Code;

fn load() -> Load {
    Load::of(vec![tensor("w", 2 * CHUNK + 1), blob("config.json", b"{}")])
}

/// A gRPC message: flag, length, bytes.
fn message(flag: u8, body: &[u8]) -> Vec<u8> {
    [&[flag], &(body.len() as u32).to_be_bytes()[..], body].concat()
}

#[tokio::test]
async fn h8_the_first_frame_is_open_and_comes_once() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let expected = refused(Code::InvalidArgument, "BAD_FRAME");
    let open = || frame_open(load.open("victim", [1; 16]));
    for first in [
        load.announcement(),
        load.chunk(0, 0),
        frame_compare(load.compare(0, 0, 1)),
        frame_finish(load.finish()),
        frame_abort("INTERRUPTED"),
        pb::SenderFrame::default(),
        pb::SenderFrame {
            entries: load.announcement().entries,
            ..open()
        },
        pb::SenderFrame {
            payload: vec![1].into(),
            ..open()
        },
    ] {
        assert_eq!(server.call(first).await.end().await, expected);
    }
    let mut session = server.open(load.open("victim", [1; 16])).await;
    assert_eq!(session.refused(open()).await, expected);
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_ids_and_digests_have_their_length() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let (good, short) = (load.open("victim", [1; 16]), || vec![1; 15].into());
    for open in [
        pb::SenderOpen {
            transfer_id: short(),
            ..good.clone()
        },
        pb::SenderOpen {
            transfer_id: Vec::new().into(),
            ..good.clone()
        },
        pb::SenderOpen {
            entries_digest: short(),
            ..good.clone()
        },
        pb::SenderOpen {
            fingerprint: vec![1; 17].into(),
            ..good
        },
    ] {
        assert_eq!(
            server.refusal(open).await,
            refused(Code::InvalidArgument, "BAD_FRAME")
        );
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_what_this_version_does_not_speak_is_said_so() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let good = load.open("victim", [1; 16]);
    for protocol_version in [0, 2, u32::MAX] {
        let open = pb::SenderOpen {
            protocol_version,
            ..good.clone()
        };
        assert_eq!(
            server.refusal(open).await,
            refused(Code::FailedPrecondition, "VERSION")
        );
    }
    let unsupported = refused(Code::Unimplemented, "UNSUPPORTED");
    let ending = server.call(frame_join(&[1; 16], 1)).await.end().await;
    assert_eq!(ending, refused(Code::NotFound, "NOT_FOUND"));
    let container = pb::OutFormat::Safetensors.into();
    for open in [
        pb::SenderOpen {
            out_format: container,
            ..good.clone()
        },
        pb::SenderOpen {
            out_format: 77,
            ..good.clone()
        },
        pb::SenderOpen {
            layout: 77,
            ..good.clone()
        },
    ] {
        assert_eq!(server.refusal(open).await, unsupported);
    }
    for chunk_len in [1, 3 << 18, 128 << 10, 16 << 20, u32::MAX] {
        let open = pb::SenderOpen {
            chunk_len,
            ..good.clone()
        };
        assert_eq!(
            server.refusal(open).await,
            refused(Code::OutOfRange, "BAD_RANGE")
        );
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_messages_over_the_limit_are_refused_by_their_length() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let expected = refused(Code::ResourceExhausted, "TOO_LARGE");
    let load = load();
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    let huge = pb::SenderFrame {
        payload: vec![0; 4 << 20].into(),
        ..load.chunk(0, 0)
    };
    assert_eq!(session.refused(huge).await, expected);
    // The length alone is enough: nothing is held for what never comes.
    for len in [[0x7f, 0xff, 0xff, 0xff], [0xff; 4]] {
        assert_eq!(
            raw_push(&server, None, [&[0], &len[..]].concat()).await,
            expected
        );
    }
    let mut open = load.open("victim", [1; 16]);
    open.metadata.insert("k".to_owned(), "v".repeat(1 << 20));
    assert_eq!(server.refusal(open).await, expected);
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h9_compressed_messages_are_not_accepted() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let expected = refused(Code::Unimplemented, "UNSUPPORTED");
    let open = frame_open(load().open("victim", [1; 16])).encode_to_vec();
    assert_eq!(raw_push(&server, None, message(1, &open)).await, expected);
    assert_eq!(
        raw_push(&server, Some("gzip"), message(0, &open)).await,
        expected
    );
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_what_is_no_protobuf_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let expected = refused(Code::InvalidArgument, "BAD_FRAME");
    for bytes in [
        message(0, &[0xff; 40]),
        message(0, &[0x0a, 200, 1]),
        message(7, b""),
        message(0, b"\x0a\x03\x12\x01\xff"),
    ] {
        assert_eq!(raw_push(&server, None, bytes).await, expected);
    }
    assert_eq!(raw_push(&server, None, Vec::new()).await, expected);
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_numbers_of_entries_and_sources_leave_no_gap() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::from_sources(
        vec![source(1, 1, true), source(2, 1, true)],
        vec![tensor("a", 1), tensor("b", 2)],
    );
    let good = load.announcement();
    let mut bad = vec![good.clone(); 6];
    bad[0].entries[1].index = 2;
    bad[1].entries.remove(0);
    bad[2].sources[1].index = 0;
    bad[3].sources[1].key = good.sources[0].key.clone();
    bad[4].sources.pop();
    bad[5].sources[0].fingerprint = vec![1; 31].into();
    for frame in bad {
        let mut session = server.open(open_ended("victim", [1; 16])).await;
        assert_eq!(
            session.refused(frame).await,
            refused(Code::InvalidArgument, "BAD_FRAME")
        );
    }
    let mut session = server.open(open_ended("victim", [1; 16])).await;
    let mut many = good;
    many.entries[0].aliases = (0..65).map(|i| i.to_string()).collect();
    assert_eq!(
        session.refused(many).await,
        refused(Code::ResourceExhausted, "TOO_MANY")
    );
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_a_compare_is_about_held_cells_only() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let good = load.compare(0, 0, 1);
    for compare in [
        good.clone(),
        pb::Compare {
            entry: 9,
            ..good.clone()
        },
        pb::Compare {
            first_cell: u64::MAX,
            ..good.clone()
        },
        pb::Compare {
            blake3: vec![0; 31].into(),
            ..good.clone()
        },
        pb::Compare {
            blake3: Vec::new().into(),
            ..good.clone()
        },
        pb::Compare {
            blake3: vec![0; 1025 * 32].into(),
            ..good
        },
    ] {
        let mut session = server.open(load.open("victim", [1; 16])).await;
        session.announce(&load).await;
        let ending = session.refused(frame_compare(compare)).await;
        assert_eq!(ending, refused(Code::InvalidArgument, "BAD_FRAME"));
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h24_finish_publishes_only_what_is_all_there_and_as_announced() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let expected = refused(Code::FailedPrecondition, "MANIFEST_MISMATCH");
    let good = load.finish();
    // Cells are missing.
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    assert_eq!(session.refused(frame_finish(good.clone())).await, expected);
    // Entries are missing.
    let mut session = server.open(load.open("victim", [1; 16])).await;
    assert_eq!(session.refused(frame_finish(good.clone())).await, expected);
    for finish in [
        pb::Finish {
            entries_digest: vec![0; 16].into(),
            ..good.clone()
        },
        pb::Finish {
            entry_count: 1,
            ..good.clone()
        },
        pb::Finish {
            entry_count: u64::MAX,
            ..good.clone()
        },
        pb::Finish {
            total_bytes: good.total_bytes + 1,
            ..good.clone()
        },
    ] {
        let mut session = server.open(load.open("victim", [1; 16])).await;
        session.announce(&load).await;
        session.send_wanted(&load).await;
        assert_eq!(session.refused(frame_finish(finish)).await, expected);
    }
    // What open promised counts too.
    let mut open = load.open("victim", [1; 16]);
    open.entries_digest = vec![9; 16].into();
    let mut session = server.open(open).await;
    session.announce(&load).await;
    session.send_wanted(&load).await;
    assert_eq!(session.refused(frame_finish(good)).await, expected);
    server.assert_unpublished("victim").await;
    server.push(load.open("victim", [1; 16]), &load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h24_nothing_is_announced_after_finish() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    // Nothing to send, so that both frames can follow each other at once; which of
    // them wins is open, but never is anything published that was not finished.
    let load = Load::of(vec![tensor("w", 0), blob("empty", b"")]);
    let mut session = server.open(load.open("empty", [1; 16])).await;
    session.announce(&load).await;
    session.finish(&load).await;
    server.assert_landed("empty", &load);
    server.assert_quiet().await;
    let mut session = server.open(open_ended("victim", [2; 16])).await;
    session.announce(&load).await;
    session.send(frame_finish(load.finish())).await;
    let mut late = Load::of(vec![tensor("late", 1)]).announcement();
    late.entries[0].index = 2;
    let ending = session.refused(late).await;
    if ending.is_ok() {
        server.assert_landed("victim", &load);
    } else {
        assert_eq!(ending, refused(Code::InvalidArgument, "BAD_FRAME"));
        server.assert_unpublished("victim").await;
    }
}

#[tokio::test]
async fn h24_what_is_in_the_way_is_refused_before_a_byte_is_taken() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let exists = refused(Code::AlreadyExists, "EXISTS");
    server.push(load.open("taken", [1; 16]), &load).await;
    let other = Load::of(vec![tensor("other", CHUNK)]);
    assert_eq!(server.refusal(other.open("taken", [2; 16])).await, exists);
    // A checkpoint inside a checkpoint, also one that would replace a part of it.
    for name in ["taken/inside", "taken/files", "taken/a/b"] {
        let open = pb::SenderOpen {
            overwrite: true,
            ..other.open(name, [3; 16])
        };
        assert_eq!(server.refusal(open).await, exists, "{name}");
    }
    server.assert_landed("taken", &load);
    let old = std::fs::metadata(temp.path().join("taken")).unwrap().ino();
    server
        .push(
            pb::SenderOpen {
                overwrite: true,
                ..other.open("taken", [2; 16])
            },
            &other,
        )
        .await;
    server.assert_landed("taken", &other);
    assert_ne!(
        std::fs::metadata(temp.path().join("taken")).unwrap().ino(),
        old,
        "exchanged, not written over"
    );
    server.assert_quiet().await;
}

#[tokio::test]
async fn h24_a_checkpoint_does_not_swallow_others_below_its_name() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    server.push(load.open("runs/one", [1; 16]), &load).await;
    let open = pb::SenderOpen {
        overwrite: true,
        ..load.open("runs", [2; 16])
    };
    assert_eq!(
        server.refusal(open).await,
        refused(Code::AlreadyExists, "EXISTS")
    );
    server.assert_landed("runs/one", &load);
}

#[tokio::test]
async fn h24_a_folder_that_is_no_checkpoint_is_never_replaced() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let mine = temp.path().join("mine");
    std::fs::create_dir(&mine).unwrap();
    let open = |name: &str| pb::SenderOpen {
        overwrite: true,
        ..load.open(name, [1; 16])
    };
    // An empty folder is nobody's work.
    server.push(open("mine"), &load).await;
    server.assert_landed("mine", &load);
    for (i, foreign) in ["notes.txt", "manifest.json"].into_iter().enumerate() {
        let name = format!("foreign{i}");
        std::fs::create_dir(temp.path().join(&name)).unwrap();
        let file = temp.path().join(&name).join(foreign);
        std::fs::write(&file, b"{\"format\":\"other\"}").unwrap();
        let expected = match foreign {
            "manifest.json" => refused(Code::FailedPrecondition, "UNSAFE_PATH"),
            _ => refused(Code::AlreadyExists, "EXISTS"),
        };
        assert_eq!(server.refusal(open(&name)).await, expected);
        assert_eq!(std::fs::read(&file).unwrap(), b"{\"format\":\"other\"}");
    }
    server.serves_others().await;
}

#[tokio::test]
async fn h24_a_folder_made_during_the_transfer_is_not_replaced_either() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let open = pb::SenderOpen {
        overwrite: true,
        ..load.open("victim", [1; 16])
    };
    let mut session = server.open(open.clone()).await;
    session.announce(&load).await;
    session.send_wanted(&load).await;
    let mine = temp.path().join("victim/notes.txt");
    std::fs::create_dir(temp.path().join("victim")).unwrap();
    std::fs::write(&mine, b"mine").unwrap();
    let ending = session.refused(frame_finish(load.finish())).await;
    assert_eq!(ending, refused(Code::AlreadyExists, "EXISTS"));
    assert_eq!(std::fs::read(&mine).unwrap(), b"mine");
    server.assert_unpublished("victim").await;
    // It is no obstacle for the next start, nor for a resume once it is gone.
    server.stop().await;
    let server = TestServer::start(temp.path()).await;
    assert_eq!(std::fs::read(&mine).unwrap(), b"mine");
    std::fs::remove_dir_all(temp.path().join("victim")).unwrap();
    let mut session = server.open(open).await;
    session.announce(&load).await;
    assert!(session.wanted.values().all(|cells| cells.is_empty()));
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h9_h10_questions_are_bounded_like_frames() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let long = pb::ListRequest {
        prefix: "a".repeat(5 << 20),
        ..Default::default()
    };
    // Stock code of the gRPC library answers these two.
    let answer = server.ferry().await.list(long).await;
    assert_eq!(answer.unwrap_err().code(), Code::OutOfRange);
    let mut packed = tonic::Request::new(pb::ListRequest::default());
    let gzip = tonic::metadata::MetadataValue::from_static("gzip");
    packed.metadata_mut().insert("grpc-encoding", gzip);
    let answer = server.ferry().await.list(packed).await;
    assert_eq!(answer.unwrap_err().code(), Code::Unimplemented);
    server.serves_others().await;
}

#[tokio::test]
async fn h14_a_server_that_cannot_hold_the_longest_chunk_does_not_start() {
    let temp = tempfile::tempdir().unwrap();
    let start = |budget_bytes| {
        tensorferry::Server::builder(temp.path())
            .budget_bytes(budget_bytes)
            .bind(([127, 0, 0, 1], 0).into())
    };
    let refused = start((8 << 20) - 1).await.unwrap_err();
    assert!(matches!(refused, tensorferry::Error::Usage(_)), "{refused}");
    let _server = start(8 << 20).await.unwrap();
}
