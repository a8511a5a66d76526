//! Several lanes: shared work, lost lanes, hostile ones, and memory that suffices.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{product::*, *};
use std::{
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
};
use tensorferry::{
    Client, Embedded, Lanes, Server,
    format::{codec::CodecChoice, npy::encode_header},
    source::{SourceOptions, SourceSet},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tonic::Code;

/// What a relay saw and does.
#[derive(Debug, Default)]
struct Seen {
    /// Bytes from the client, by connection.
    by_connection: std::sync::Mutex<Vec<u64>>,
    connection_count: AtomicUsize,
    cut_count: AtomicUsize,
}

/// Relays every connection; each but the first is cut after `limit` bytes from the
/// client, as long as `cuts` are left.
async fn relay(server: SocketAddr, limit: u64, cuts: usize) -> (SocketAddr, Arc<Seen>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let seen = Arc::new(Seen::default());
    let all = Arc::clone(&seen);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let seen = Arc::clone(&all);
            tokio::spawn(async move {
                let server = TcpStream::connect(server).await.unwrap();
                let number = seen.connection_count.fetch_add(1, Ordering::SeqCst);
                seen.by_connection.lock().unwrap().push(0);
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let back = tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
                });
                let mut buf = vec![0; 64 << 10];
                let mut passed = 0;
                while let Ok(n @ 1..) = from_client.read(&mut buf).await {
                    passed += n as u64;
                    seen.by_connection.lock().unwrap()[number] = passed;
                    if number > 0 && passed > limit && seen.cut_count.load(Ordering::SeqCst) < cuts
                    {
                        seen.cut_count.fetch_add(1, Ordering::SeqCst);
                        break;
                    }
                    if to_server.write_all(&buf[..n]).await.is_err() {
                        break;
                    }
                }
                back.abort();
            });
        }
    });
    (address, seen)
}

fn noise_source(dir: &Path, len: usize) -> Arc<SourceSet> {
    std::fs::create_dir_all(dir).unwrap();
    let header = encode_header("|u1", false, &[len as u64]);
    std::fs::write(
        dir.join("noise.npy"),
        [header, noise("lanes", len)].concat(),
    )
    .unwrap();
    Arc::new(SourceSet::open(&[dir.to_owned()], &SourceOptions::default()).unwrap())
}

#[tokio::test]
async fn chunks_are_dealt_to_every_lane() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let (relay, seen) = relay(server.address, 0, 0).await;
    let source = noise_source(&temp.path().join("source"), 48 << 20);
    let options = options(|o| (o.lanes, o.codec) = (Lanes::Fixed(3), CodecChoice::None));
    let client = Client::new(&relay.to_string()).unwrap();
    let report = client
        .push(Arc::clone(&source), &name("model"), options)
        .await
        .unwrap();
    assert_eq!((report.session_count, report.wire_bytes), (1, 48 << 20));
    let by_connection = seen.by_connection.lock().unwrap().clone();
    assert_eq!(by_connection.len(), 3);
    for bytes in &by_connection {
        assert!(*bytes > CELL, "a lane had no work: {by_connection:?}");
    }
    server.assert_landed("model", &Load::of_source(&source));
}

#[tokio::test]
async fn what_a_dead_lane_carried_goes_over_the_others() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let (relay, seen) = relay(server.address, 1 << 20, 5).await;
    let source = noise_source(&temp.path().join("source"), 64 << 20);
    let options = options(|o| (o.lanes, o.codec) = (Lanes::Fixed(4), CodecChoice::None));
    let client = Client::new(&relay.to_string()).unwrap();
    let report = client
        .push(Arc::clone(&source), &name("model"), options)
        .await
        .unwrap();
    let cut_count = seen.cut_count.load(Ordering::SeqCst);
    assert!(cut_count >= 3, "only {cut_count} lanes were cut");
    assert_eq!(report.session_count, 1, "the session outlives its lanes");
    server.assert_landed("model", &Load::of_source(&source));
    server.assert_quiet().await;
}

#[tokio::test]
async fn every_codec_lands_the_same_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let dir = temp.path().join("source");
    std::fs::create_dir_all(&dir).unwrap();
    let text = b"all work and no play makes a dull checkpoint ".repeat(40_000);
    let fill: Vec<u8> = 1.5f32.to_le_bytes().repeat(500_000);
    let parts = [
        ("zero", "<f4", vec![0; 2_000_000]),
        ("fill", "<f4", fill),
        ("text", "|u1", text),
        ("noise", "<f8", noise("codec", 1_600_000)),
    ];
    for (name, descr, bytes) in &parts {
        let item_len: u64 = descr[2..].parse().unwrap();
        let header = encode_header(descr, false, &[bytes.len() as u64 / item_len]);
        std::fs::write(
            dir.join(format!("{name}.npy")),
            [&header, bytes].map(|b| &b[..]).concat(),
        )
        .unwrap();
    }
    let source = open_source(&dir);
    for (choice, most) in [
        (CodecChoice::None, source.total_bytes()),
        // Noise, and next to nothing of the rest.
        (CodecChoice::Auto, 1_700_000),
        (CodecChoice::Lz4, 1_700_000),
    ] {
        let server = TestServer::start(&temp.path().join(format!("{choice:?}"))).await;
        let report = push(&server, &dir, options(|o| o.codec = choice))
            .await
            .unwrap();
        assert!(
            report.wire_bytes <= most,
            "{choice:?}: {}",
            report.wire_bytes
        );
        assert_eq!(
            report.wire_bytes == source.total_bytes(),
            choice == CodecChoice::None
        );
        assert_landed(&server, &dir);
    }
}

/// Both roles in one process, the receiver with memory for a single chunk, and many
/// lanes that want it, several transfers at a time, compressible and not.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn little_memory_and_many_lanes_come_to_an_end() {
    const LONG_CHUNK: u32 = 8 << 20;
    let temp = tempfile::tempdir().unwrap();
    let server = Server::builder(temp.path().join("root"))
        .chunk_len(LONG_CHUNK)
        .budget_bytes(u64::from(LONG_CHUNK))
        .bind(SocketAddr::from(([127, 0, 0, 1], 0)))
        .await
        .unwrap();
    let client = Client::new(&server.local_addr().to_string()).unwrap();
    tokio::spawn(server.serve(std::future::pending()));
    // Of both kinds: lz4 takes more memory than it saves.
    let dir = temp.path().join("source");
    std::fs::create_dir_all(&dir).unwrap();
    let len = 2 * LONG_CHUNK as usize + 17;
    let text = b"too little of everything but lanes ".repeat(len / 35 + 1)[..len].to_vec();
    for (file, bytes) in [("noise", noise("little", len)), ("text", text)] {
        let header = encode_header("|u1", false, &[len as u64]);
        std::fs::write(dir.join(format!("{file}.npy")), [header, bytes].concat()).unwrap();
    }
    let source = open_source(&dir);
    let with = |codec| {
        options(|o| {
            (o.lanes, o.codec) = (Lanes::Fixed(8), codec);
            // Two for each lane: with less it would not begin.
            o.budget_bytes = 16 * u64::from(LONG_CHUNK);
            o.chunk_len = Some(LONG_CHUNK);
        })
    };
    let mut pushes = Vec::new();
    for codec in [CodecChoice::None, CodecChoice::Lz4, CodecChoice::Auto] {
        let target = name(&format!("model.{codec:?}"));
        pushes.push(client.push(Arc::clone(&source), &target, with(codec)));
    }
    let folder = temp.path().join("local");
    let embedded = Embedded::start(&folder, u64::from(LONG_CHUNK))
        .await
        .unwrap();
    pushes.push(
        embedded
            .push(Arc::clone(&source), with(CodecChoice::Lz4))
            .unwrap(),
    );
    for push in pushes {
        let ended = tokio::time::timeout(HANG, push).await;
        assert_eq!(ended.unwrap().unwrap().bytes, 2 * len as u64);
    }
    embedded.stop().await.unwrap();
}

#[tokio::test]
async fn a_lane_needs_the_token_a_fresh_number_and_room() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("a", 3 * CHUNK)]);
    let mut control = server.open(load.open("model", [1; 16])).await;
    let accept = control.accept.clone().unwrap();
    let mut unknown = server.call(frame_join(&[9; 16], 1)).await;
    assert_eq!(unknown.end().await, refused(Code::NotFound, "NOT_FOUND"));
    let token = &accept.session_token;
    let mut lanes = Vec::new();
    for number in 1..accept.max_lanes {
        let mut lane = server.call(frame_join(token, number)).await;
        lane.until(|s| s.accept.is_some()).await;
        assert_eq!(lane.accept.as_ref().unwrap().epoch, accept.epoch);
        lanes.push(lane);
    }
    let mut more = server.call(frame_join(token, 99)).await;
    assert_eq!(
        more.end().await,
        refused(Code::ResourceExhausted, "TOO_MANY")
    );
    for number in [0, 1] {
        let mut again = server.call(frame_join(token, number)).await;
        assert_eq!(
            again.end().await,
            refused(Code::InvalidArgument, "BAD_FRAME")
        );
    }
    // None of that disturbs the session.
    control.announce(&load).await;
    for (cell, lane) in lanes.iter_mut().take(3).enumerate() {
        lane.send(load.chunk(0, cell as u64)).await;
        lane.settle().await;
    }
    control.finish(&load).await;
    server.assert_landed("model", &load);
    for lane in lanes {
        assert_eq!(lane.close().await, Ok(()));
    }
}

#[tokio::test]
async fn a_lane_that_breaks_a_rule_ends_its_session() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("a", 3 * CHUNK)]);
    let bad_frame = refused(Code::InvalidArgument, "BAD_FRAME");
    let mut beyond = load.chunk(0, 1);
    beyond.chunks[0].offset += 1;
    for (i, (frame, ending)) in [
        (load.announcement(), bad_frame.clone()),
        (frame_finish(load.finish()), bad_frame.clone()),
        (frame_abort("INTERRUPTED"), bad_frame),
        (beyond, refused(Code::OutOfRange, "BAD_RANGE")),
    ]
    .into_iter()
    .enumerate()
    {
        let mut control = server.open(load.open("model", [i as u8; 16])).await;
        control.announce(&load).await;
        control.send(load.chunk(0, 0)).await;
        control.settle().await;
        let token = control.accept.clone().unwrap().session_token;
        let mut lane = server.call(frame_join(&token, 1)).await;
        lane.until(|s| s.accept.is_some()).await;
        assert_eq!(lane.refused(frame).await, ending);
        assert_eq!(control.end().await, ending);
        server
            .ferry()
            .await
            .discard(tensorferry::wire::pb::DiscardRequest {
                checkpoint: "model".into(),
            })
            .await
            .unwrap();
    }
    server.assert_unpublished("model").await;
}

#[tokio::test]
async fn the_end_of_a_lane_costs_only_what_was_not_acked() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("a", 4 * CHUNK)]);
    let mut control = server.open(load.open("model", [1; 16])).await;
    control.announce(&load).await;
    let token = control.accept.clone().unwrap().session_token;
    for (number, cell) in [(1, 0), (2, 1)] {
        let mut lane = server.call(frame_join(&token, number)).await;
        lane.send(load.chunk(0, cell)).await;
        lane.settle().await;
        // Gone without a word.
        drop(lane);
    }
    for cell in 1..4 {
        control.send(load.chunk(0, cell)).await;
    }
    control.settle().await;
    control.finish(&load).await;
    server.assert_landed("model", &load);
}
