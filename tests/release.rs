//! However a push ends early, what it held is free again soon, and its staging stays.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a helper of a test may panic, and says what it measured"
)]

mod common;

use common::{
    product::{name, options},
    torn::Relay,
    *,
};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tensorferry::{
    Client, Server,
    format::npy::encode_header,
    source::{SourceOptions, SourceSet},
};
use tokio::sync::{Mutex, oneshot};

/// Descriptors, locks, memory and tasks are free again within this time.
const RELEASE_LIMIT: Duration = Duration::from_secs(5);
const CELLS: usize = 24;
/// Descriptors are counted for the whole process.
static ALONE: Mutex<()> = Mutex::const_new(());

/// What this process and the server's root hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Held {
    descriptors: usize,
    tasks: usize,
    locks: usize,
}

fn held(root: &Path) -> Held {
    let locks = std::fs::read_dir(root.join(".tensorferry/locks"));
    Held {
        descriptors: std::fs::read_dir("/proc/self/fd").unwrap().count(),
        tasks: tokio::runtime::Handle::current()
            .metrics()
            .num_alive_tasks(),
        locks: locks.map_or(0, Iterator::count),
    }
}

/// Waits until no more is held than before; returns how long that took.
async fn released(root: &Path, before: Held) -> Duration {
    let begun = Instant::now();
    loop {
        let now = held(root);
        if now.descriptors <= before.descriptors
            && now.tasks <= before.tasks
            && now.locks <= before.locks
        {
            return begun.elapsed();
        }
        assert!(
            begun.elapsed() < RELEASE_LIMIT,
            "before {before:?}, still {now:?}"
        );
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

fn source(folder: &Path) -> Arc<SourceSet> {
    std::fs::create_dir_all(folder).unwrap();
    let bytes = noise("a", CELLS * CHUNK);
    let header = encode_header("|u1", false, &[bytes.len() as u64]);
    std::fs::write(folder.join("a.npy"), [header, bytes].concat()).unwrap();
    let set = SourceSet::open(&[PathBuf::from(folder)], &SourceOptions::default());
    Arc::new(set.unwrap())
}

/// One push that ends early, `way` saying how.
async fn end_early(server: &TestServer, source: &Arc<SourceSet>, way: usize) {
    let load = Load::of(vec![tensor("a", CELLS * CHUNK)]);
    match way {
        // The program drops its transfer.
        0 => {
            let client = server.client();
            let transfer = client.push(Arc::clone(source), &name("victim"), options(|_| ()));
            let watcher = transfer.watcher();
            while watcher.progress().session_count == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            drop(transfer);
        }
        // The stream is reset in the middle of a frame: the connection goes on.
        1 => {
            let mut channel = raw::connect(server.address).await;
            let mut call = raw::RawCall::begin(&mut channel, None).await;
            call.send(raw::message(&frame_open(load.open("victim", [1; 16]))));
            call.send(raw::message(&load.announcement()));
            while !call.next().await.unwrap().wanted.iter().any(|w| w.last) {}
            call.send(raw::message(&load.chunk(0, 0)));
            while call.next().await.unwrap().ack.is_none() {}
            call.send(raw::message(&load.chunk(0, 1))[..CHUNK / 2].to_vec());
            drop(call);
        }
        // The connection is killed.
        2 => {
            let mut relay = Relay::start(server.address, usize::MAX).await;
            let client = Client::new(&relay.address.to_string()).unwrap();
            let push = options(|o| o.retries = 0);
            let transfer = client.push(Arc::clone(source), &name("victim"), push);
            let watcher = transfer.watcher();
            while watcher.progress().session_count == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            relay.cut();
            // It may have been through already.
            let _ = transfer.await;
        }
        // The server ends it, for the sender breaks a rule.
        _ => {
            let mut session = server.open(load.open("victim", [1; 16])).await;
            session.announce(&load).await;
            session.send(load.chunk(0, 0)).await;
            session.settle().await;
            let mut wrong = load.chunk(0, 1);
            wrong.chunks[0].offset = 1;
            session.refused(wrong).await.unwrap_err();
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_push_that_ends_early_frees_all_it_held_a_hundred_times_over() {
    let _alone = ALONE.lock().await;
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("root");
    let server = TestServer::start(&root).await;
    let source = source(&temp.path().join("source"));
    let load = Load::of(vec![tensor("a", CELLS * CHUNK)]);
    // Whatever is made once and kept (threads, the service folder) is made now.
    for way in 0..4 {
        end_early(&server, &source, way).await;
        tokio::time::sleep(Duration::from_millis(300)).await;
        discard(&server).await;
    }
    let before = held(&root);
    let mut longest = Duration::ZERO;
    for round in 0..100 {
        end_early(&server, &source, round % 4).await;
        longest = longest.max(released(&root, before).await);
        if round % 10 == 9 {
            // The name is free, and what was left is resumed by whoever left it.
            let mut session = server.open(load.open("victim", [1; 16])).await;
            assert!(session.accept.as_ref().unwrap().durable_bytes >= CHUNK as u64);
            session.announce(&load).await;
            session.send_wanted(&load).await;
            session.finish(&load).await;
            server.assert_landed("victim", &load);
            drop(session);
            server.serves_others().await;
            released(&root, before).await;
        } else {
            discard(&server).await;
        }
        let _ = std::fs::remove_dir_all(root.join("victim"));
    }
    println!("released within {longest:?}");
}

/// Throws away what is there, so that the next push is of another owner's choice.
async fn discard(server: &TestServer) {
    let begun = Instant::now();
    loop {
        match server.client().discard(&name("victim")).await {
            Ok(_) => return,
            // The session has not quite ended.
            Err(error) => assert!(begun.elapsed() < RELEASE_LIMIT, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Bytes of frames that never end are out of the budget again as soon as they are
/// given up: with all of it taken, the next push would not move.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn memory_of_frames_that_never_end_is_given_back() {
    let _alone = ALONE.lock().await;
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::with_budget(temp.path(), 8 << 20).await;
    let load = Load::of(vec![tensor("a", 4 << 20)]);
    for round in 0..20 {
        let mut calls = Vec::new();
        for i in 0..4 {
            let mut channel = raw::connect(server.address).await;
            let mut call = raw::RawCall::begin(&mut channel, None).await;
            let mut open = load.open(&format!("v{i}"), [1; 16]);
            open.chunk_len = 4 << 20;
            call.send(raw::message(&frame_open(open)));
            call.send(raw::message(&load.announcement()));
            while !call.next().await.unwrap().wanted.iter().any(|w| w.last) {}
            let mut whole = frame_chunk(head(0, 0, &load.parts[0].bytes), &load.parts[0].bytes);
            whole.chunks[0].offset = 0;
            call.send(raw::message(&whole)[..100_000].to_vec());
            calls.push((channel, call));
        }
        // Two of them hold the whole budget.
        if round % 2 == 0 {
            drop(calls);
        } else {
            for (_, call) in &mut calls {
                call.close();
            }
            for (_, mut call) in calls {
                let ending = tokio::time::timeout(HANG, call.end()).await;
                ending.expect("the call ends").unwrap_err();
            }
        }
        let others = tokio::time::timeout(HANG, server.serves_others()).await;
        others.expect("the budget is free again");
    }
}

/// A server that is stopped in the middle of pushes leaves nothing behind either.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_stops_frees_its_sessions_and_keeps_their_staging() {
    let _alone = ALONE.lock().await;
    let temp = tempfile::tempdir().unwrap();
    let load = Load::of(vec![tensor("a", 4 * CHUNK)]);
    let mut before = None;
    for round in 0..10 {
        let server = Server::builder(temp.path())
            .chunk_len(CHUNK as u32)
            .bind(([127, 0, 0, 1], 0).into())
            .await
            .unwrap();
        let address = server.local_addr();
        let (stop, stopped) = oneshot::channel::<()>();
        let serving = tokio::spawn(server.serve(async {
            let _ = stopped.await;
        }));
        let mut channel = raw::connect(address).await;
        let mut call = raw::RawCall::begin(&mut channel, None).await;
        call.send(raw::message(&frame_open(load.open("victim", [1; 16]))));
        call.send(raw::message(&load.announcement()));
        while !call.next().await.unwrap().wanted.iter().any(|w| w.last) {}
        if round == 0 {
            call.send(raw::message(&load.chunk(0, 0)));
            while call.next().await.unwrap().ack.is_none() {}
        }
        stop.send(()).unwrap();
        assert_eq!(
            call.end().await,
            refused(tonic::Code::Unavailable, "DRAINING")
        );
        serving.await.unwrap().unwrap();
        drop((call, channel));
        match before {
            None => {
                tokio::time::sleep(Duration::from_millis(300)).await;
                before = Some(held(temp.path()));
            }
            Some(before) => {
                released(temp.path(), before).await;
            }
        }
    }
    let server = TestServer::start(temp.path()).await;
    let session = server.open(load.open("victim", [1; 16])).await;
    assert_eq!(session.accept.as_ref().unwrap().durable_bytes, CHUNK as u64);
}
