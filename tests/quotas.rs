//! Row H26: unfinished work has limits, whoever it belongs to.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper of a test may panic"
)]

mod common;

use common::*;
use tensorferry::wire::pb;
use tonic::Code;

const MIB: u64 = 1 << 20;

fn no_room() -> Ending {
    refused(Code::ResourceExhausted, "DISK_QUOTA")
}

fn load(name: &str, byte_len: usize) -> Load {
    Load::of(vec![tensor(name, byte_len)])
}

/// Leaves a transfer with its first cell durable.
async fn leave(server: &TestServer, name: &str, byte_len: usize) {
    let load = load("a", byte_len);
    let mut session = server.open(load.open(name, [1; 16])).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    session
        .refused(frame_abort("INTERRUPTED"))
        .await
        .unwrap_err();
}

#[tokio::test]
async fn h26_a_checkpoint_beyond_its_quota_is_refused_before_a_byte_is_taken() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::with(temp.path(), |b| b.quota_checkpoint(MIB)).await;
    let fits = load("a", MIB as usize);
    server.push(fits.open("fits", [1; 16]), &fits).await;
    server.assert_landed("fits", &fits);

    let long = load("a", MIB as usize + 1);
    assert_eq!(server.refusal(long.open("long", [2; 16])).await, no_room());
    // Nothing of it lies there.
    assert!(server.status("long").await.is_err());
}

#[tokio::test]
async fn h26_entries_beyond_what_was_promised_do_not_get_round_the_quota() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::with(temp.path(), |b| b.quota_checkpoint(MIB)).await;
    let long = load("a", MIB as usize + 1);
    let mut session = server.open(open_ended("open", [2; 16])).await;
    assert_eq!(session.refused(long.announcement()).await, no_room());
    // One that promised less is refused for that already.
    let lying = pb::SenderOpen {
        total_bytes: 1,
        ..long.open("lying", [3; 16])
    };
    let mut session = server.open(lying).await;
    let mismatch = refused(Code::FailedPrecondition, "MANIFEST_MISMATCH");
    assert_eq!(session.refused(long.announcement()).await, mismatch);
}

#[tokio::test]
async fn h26_all_unfinished_transfers_share_a_quota_and_give_it_back() {
    let temp = tempfile::tempdir().unwrap();
    let three = 3 * CHUNK;
    let server = TestServer::start(temp.path()).await;
    leave(&server, "left", three).await;
    server.stop().await;
    // What lies there at the start counts.
    let quota = 2 * three as u64 + 10;
    let server = TestServer::with(temp.path(), |b| b.quota_staging(quota)).await;
    let second = load("a", three + 11);
    assert_eq!(
        server.refusal(second.open("second", [2; 16])).await,
        no_room()
    );
    let second = load("a", three + 10);
    server.push(second.open("second", [2; 16]), &second).await;
    // Published is not unfinished.
    leave(&server, "third", three + 10).await;
    // Going on with one takes nothing anew.
    leave(&server, "left", three).await;
    let fourth = load("a", 100);
    assert_eq!(
        server.refusal(fourth.open("fourth", [2; 16])).await,
        no_room()
    );
    server
        .client()
        .discard(&"left".parse().unwrap())
        .await
        .unwrap();
    server.push(fourth.open("fourth", [2; 16]), &fourth).await;
    server.assert_landed("fourth", &fourth);
}

#[tokio::test]
async fn a_push_beyond_the_quota_ends_with_no_space() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::with(&temp.path().join("root"), |b| b.quota_staging(100)).await;
    let header = tensorferry::format::npy::encode_header("|u1", false, &[101]);
    let path = temp.path().join("w.npy");
    std::fs::write(&path, [header, vec![7; 101]].concat()).unwrap();
    let source = tensorferry::SourceSet::open(&[path], &Default::default()).unwrap();
    let pushed = server
        .client()
        .push(source, &"a".parse().unwrap(), Default::default())
        .await;
    let error = pushed.unwrap_err();
    assert_eq!(error.code(), tensorferry::ErrorCode::NoSpace);
    assert_eq!(error.code().exit_code(), 8);
    assert!(error.to_string().contains("101") && error.to_string().contains("100"));
}
