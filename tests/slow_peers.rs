//! Peers that hold what they do not use: connections, frames, sessions. Row H13, and
//! H11 as far as connections go, of the threat model in docs/limits.md.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper of a test may panic"
)]

mod common;

use common::{raw::RawCall, *};
use std::time::Duration;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    time::timeout,
};
use tonic::Code;

/// Judged after this time of their own …
const PERIOD: Duration = Duration::from_millis(600);
/// … or after this long a silence.
const MAX_SILENCE: Duration = Duration::from_secs(3);

async fn strict_server(root: &std::path::Path) -> TestServer {
    TestServer::with(root, |builder| builder.pace(PERIOD, MAX_SILENCE)).await
}

fn idle() -> Ending {
    refused(Code::DeadlineExceeded, "IDLE")
}

fn load() -> Load {
    Load::of(vec![tensor("a", 3 * CHUNK + 7), tensor("b", 100)])
}

/// Whether the server has closed this connection, with or without a last word.
async fn is_closed(stream: &mut TcpStream) -> bool {
    let mut rest = Vec::new();
    timeout(HANG, stream.read_to_end(&mut rest)).await.is_ok()
}

#[tokio::test]
async fn h13_who_connects_and_says_nothing_is_closed_and_keeps_nobody_out() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let mut strangers = Vec::new();
    for i in 0..600 {
        let mut stranger = TcpStream::connect(server.address).await.unwrap();
        // Some say a part of the first words, some say something else.
        match i % 3 {
            0 => stranger.write_all(b"PRI * HTTP/2.0\r\n").await.unwrap(),
            1 => stranger
                .write_all(b"GET / HTTP/1.1\r\nhost: a\r\n\r\n")
                .await
                .unwrap(),
            _ => {}
        }
        strangers.push(stranger);
    }
    server.serves_others().await;
    for stranger in &mut strangers {
        assert!(is_closed(stranger).await);
    }
}

#[tokio::test]
async fn h11_a_connection_too_many_is_closed_at_once_and_a_place_that_is_left_is_free() {
    let temp = tempfile::tempdir().unwrap();
    // All come from one address, which may have half.
    let server = TestServer::with(temp.path(), |builder| builder.max_connections(4)).await;
    let connect = async || {
        let mut stream = TcpStream::connect(server.address).await.unwrap();
        let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
        stream.write_all(preface).await.unwrap();
        stream
    };
    let speaks = async |stream: &mut TcpStream| {
        let read = timeout(HANG, stream.read(&mut [0; 64])).await.unwrap();
        matches!(read, Ok(1..))
    };
    let mut first = connect().await;
    let mut second = connect().await;
    assert!(speaks(&mut first).await && speaks(&mut second).await);
    let mut third = connect().await;
    assert!(!speaks(&mut third).await && is_closed(&mut third).await);
    drop(first);
    // The server notices in its own time that the first has gone.
    let mut tries = 0;
    loop {
        let mut next = connect().await;
        if speaks(&mut next).await {
            break;
        }
        tries += 1;
        assert!(tries < 500, "the place stays taken");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test]
async fn h13_who_owes_cells_and_sends_none_is_ended() {
    let temp = tempfile::tempdir().unwrap();
    let server = strict_server(temp.path()).await;
    let load = load();
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    assert_eq!(session.end().await, idle());
    server.assert_unpublished("victim").await;
    // What came is kept, and whoever comes back is served.
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    assert!(!session.wanted[&0].contains(&0));
    session.send_wanted(&load).await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h13_a_frame_that_trickles_in_is_ended_though_every_byte_is_new() {
    let temp = tempfile::tempdir().unwrap();
    let server = strict_server(temp.path()).await;
    let load = load();
    // An open manifest owes nothing by itself; a frame that has begun is owed.
    let open = open_ended("victim", [1; 16]);
    let mut channel = raw::connect(server.address).await;
    let mut call = RawCall::begin(&mut channel, None).await;
    call.send(raw::message(&frame_open(open)));
    call.send(raw::message(&load.announcement()));
    while !call.next().await.unwrap().wanted.iter().any(|w| w.last) {}
    let chunk = raw::message(&load.chunk(0, 0));
    let trickle = async {
        for byte in chunk.chunks(1) {
            call.send(byte.to_vec());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    // The whole frame would take more than an hour.
    let ending = tokio::select! {
        () = trickle => unreachable!(),
        ending = async { timeout(HANG, server_ended(&server)).await } => ending,
    };
    ending.expect("the server ends the session");
    assert_eq!(call.end().await, idle());
    server.assert_unpublished("victim").await;
}

/// Waits until no session of the victim is live.
async fn server_ended(server: &TestServer) {
    while server
        .status("victim")
        .await
        .is_ok_and(|s| s.transfer.is_some_and(|t| t.active))
    {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test]
async fn h13_who_produces_or_has_nothing_to_send_may_think_but_not_for_ever() {
    let temp = tempfile::tempdir().unwrap();
    let server = strict_server(temp.path()).await;
    let load = load();
    let mut session = server.open(open_ended("victim", [1; 16])).await;
    session.announce(&load).await;
    // Longer than who owes may be silent, shorter than anybody may.
    tokio::time::sleep(PERIOD * 3).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    assert_eq!(session.end().await, idle());
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h13_cells_that_need_few_bytes_count_as_what_they_stand_for() {
    let temp = tempfile::tempdir().unwrap();
    let server = strict_server(temp.path()).await;
    let count = 12;
    let load = Load::of(vec![floats("zeros", vec![0; count * CHUNK])]);
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    for cell in 0..count as u64 {
        let head = tensorferry::wire::pb::ChunkHead {
            codec: 1,
            encoded_len: 0,
            ..head(0, cell, load.cell(0, cell))
        };
        session.send(frame_chunk(head, &[])).await;
        // Some 20 bytes each, far below the least rate.
        tokio::time::sleep(PERIOD / 4).await;
    }
    session.settle().await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}
