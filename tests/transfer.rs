//! A push as its caller sees it: snapshots while it runs, and its end when it is
//! dropped.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{
    HANG, TestServer,
    product::{name, open_source},
    relay::{self, Then},
    silent,
};
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};
use tensorferry::{
    Client, ErrorCode, Lanes, Progress, PushOptions, Stage, Watcher, blocking,
    format::npy::encode_header,
};

const SOURCE_BYTES: usize = 12 << 20;
/// Bytes that reach the server before the connection fails.
const FIRST_BYTES: usize = 4 << 20;

fn make_source(dir: &Path) -> PathBuf {
    let source = dir.join("source");
    std::fs::create_dir(&source).unwrap();
    let header = encode_header("|u1", false, &[SOURCE_BYTES as u64]);
    let bytes = common::noise("w", SOURCE_BYTES);
    std::fs::write(source.join("w.npy"), [header, bytes].concat()).unwrap();
    source
}

/// The same bytes as thousands of tensors: they are announced in several frames.
fn make_many(dir: &Path) -> PathBuf {
    const TENSOR_LEN: usize = 4096;
    let rows = (0..SOURCE_BYTES / TENSOR_LEN).map(|i| {
        let at = i * TENSOR_LEN;
        let end = at + TENSOR_LEN;
        format!(r#""t{i}":{{"dtype":"U8","shape":[{TENSOR_LEN}],"data_offsets":[{at},{end}]}}"#)
    });
    let header = format!("{{{}}}", rows.collect::<Vec<_>>().join(","));
    let parts = [
        (header.len() as u64).to_le_bytes().to_vec(),
        header.into_bytes(),
        common::noise("w", SOURCE_BYTES),
    ];
    let path = dir.join("many.safetensors");
    std::fs::write(&path, parts.concat()).unwrap();
    path
}

fn landed(root: &Path) -> Vec<u8> {
    let bytes = std::fs::read(root.join("model/w.npy")).unwrap();
    bytes[bytes.len() - SOURCE_BYTES..].to_vec()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_push_ends_its_session_and_the_next_goes_on() {
    let temp = tempfile::tempdir().unwrap();
    let source = make_source(temp.path());
    let server = TestServer::start(&temp.path().join("root")).await;
    let relay = relay::start(server.address, FIRST_BYTES, Then::Stall);
    let client = Client::new(&relay.to_string()).unwrap();
    let transfer = client.push(open_source(&source), &name("model"), one_lane());
    let begun = Instant::now();
    while transfer.progress().durable_bytes == 0 {
        assert!(begun.elapsed() < HANG && !transfer.is_finished());
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let direct = server.client();
    let status = direct.status(&name("model")).await.unwrap();
    assert!(status.transfer.unwrap().active && !status.published);

    let durable_bytes = transfer.progress().durable_bytes;
    drop(transfer);
    let begun = Instant::now();
    let left = loop {
        let row = direct
            .status(&name("model"))
            .await
            .unwrap()
            .transfer
            .unwrap();
        if !row.active {
            break row;
        }
        assert!(begun.elapsed() < HANG, "the session goes on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(left.durable_bytes >= durable_bytes, "{left:?}");

    let report = direct
        .push(open_source(&source), &name("model"), one_lane())
        .await
        .unwrap();
    assert_eq!(report.resumed_bytes, left.durable_bytes);
    assert_eq!(report.wire_bytes, SOURCE_BYTES as u64 - left.durable_bytes);
    assert!(landed(&server.root) == common::noise("w", SOURCE_BYTES));
}

/// With several lanes the first may be left with so little that it never fails.
fn one_lane() -> PushOptions {
    let mut options = PushOptions::default();
    options.lanes = Lanes::Fixed(1);
    options
}

#[test]
fn a_dropped_push_without_async_ends_its_session_too() {
    let temp = tempfile::tempdir().unwrap();
    let source = make_source(temp.path());
    let root = temp.path().join("root");
    let builder = tensorferry::Server::builder(&root).chunk_len(256 << 10);
    let server = blocking::Server::bind(builder, ([127, 0, 0, 1], 0).into()).unwrap();
    let serving = server.serve().unwrap();
    let relay = relay::start(serving.local_addr(), FIRST_BYTES, Then::Stall);
    let client = blocking::Client::new(&relay.to_string()).unwrap();
    let options = one_lane();
    let push = |client: &blocking::Client| {
        client
            .push(open_source(&source), &name("model"), options.clone())
            .unwrap()
    };
    let transfer = push(&client);
    let begun = Instant::now();
    while transfer.progress().durable_bytes == 0 {
        assert!(begun.elapsed() < HANG && !transfer.is_finished());
        std::thread::sleep(Duration::from_millis(5));
    }
    let durable_bytes = transfer.progress().durable_bytes;
    drop(transfer);
    let direct = blocking::Client::new(&serving.local_addr().to_string()).unwrap();
    let begun = Instant::now();
    while direct
        .status(&name("model"))
        .unwrap()
        .transfer
        .unwrap()
        .active
    {
        assert!(begun.elapsed() < HANG, "the session goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    let report = push(&direct).wait().unwrap();
    assert!(report.resumed_bytes >= durable_bytes, "{report:?}");
    assert!(landed(&root) == common::noise("w", SOURCE_BYTES));
    serving.stop().unwrap();
}

/// A receiver that says nothing cannot end the push: only its own side can.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dropped_push_lets_go_of_its_connection() {
    let temp = tempfile::tempdir().unwrap();
    let source = open_source(&make_source(temp.path()));
    for is_blocking in [false, true] {
        let (address, mut gone) = silent::start().await;
        let (address, source) = (address.to_string(), source.clone());
        let sent = |watcher: Watcher| {
            let begun = Instant::now();
            while watcher.progress().wire_bytes == 0 {
                assert!(begun.elapsed() < HANG, "{:?}", watcher.progress());
                std::thread::sleep(Duration::from_millis(5));
            }
        };
        if is_blocking {
            let pushing = std::thread::spawn(move || {
                let client = blocking::Client::new(&address).unwrap();
                let pushed = client.push(source, &name("model"), one_lane());
                let transfer = pushed.unwrap();
                sent(transfer.watcher());
                drop(transfer);
            });
            pushing.join().unwrap();
        } else {
            let client = Client::new(&address).unwrap();
            let transfer = client.push(source, &name("model"), one_lane());
            let watcher = transfer.watcher();
            tokio::task::spawn_blocking(move || sent(watcher))
                .await
                .unwrap();
            assert!(!*gone.borrow());
            drop(transfer);
        }
        let ended = tokio::time::timeout(HANG, gone.wait_for(|gone| *gone));
        ended.await.expect("the connection is held").unwrap();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_count_goes_back_while_a_push_runs_and_reconnects() {
    let temp = tempfile::tempdir().unwrap();
    let source = make_many(temp.path());
    let server = TestServer::start(&temp.path().join("root")).await;
    let relay = relay::start(server.address, FIRST_BYTES, Then::Cut);
    let client = Client::new(&relay.to_string()).unwrap();
    let transfer = client.push(open_source(&source), &name("model"), one_lane());
    let watcher = transfer.watcher();
    let watching = std::thread::spawn(move || {
        let begun = Instant::now();
        let mut snapshots = vec![Progress::default()];
        while snapshots.last().unwrap().stage != Stage::Done {
            assert!(begun.elapsed() < HANG);
            let now = watcher.progress();
            let counts = |p: &Progress| {
                [
                    p.durable_bytes,
                    p.settled_bytes,
                    p.wire_bytes,
                    p.resumed_bytes,
                    p.session_count.into(),
                ]
            };
            let last = snapshots.last().unwrap();
            if counts(last) != counts(&now) || last.stage != now.stage {
                let pairs = counts(last).into_iter().zip(counts(&now));
                assert!(pairs.into_iter().all(|(a, b)| a <= b), "{last:?} {now:?}");
                assert!(now.durable_bytes <= now.settled_bytes, "{now:?}");
                assert!(now.settled_bytes <= now.total_bytes, "{now:?}");
                snapshots.push(now);
            }
            std::thread::yield_now();
        }
        snapshots
    });
    let report = transfer.await.unwrap();
    let snapshots = watching.join().unwrap();
    assert_eq!(report.session_count, 2, "{report:?}");
    assert!(snapshots.len() > 3, "{snapshots:?}");
    assert_eq!(snapshots.last().unwrap().durable_bytes, SOURCE_BYTES as u64);
}

#[tokio::test]
async fn a_cancelled_push_ends_as_interrupted() {
    let temp = tempfile::tempdir().unwrap();
    let source = make_source(temp.path());
    let server = TestServer::start(&temp.path().join("root")).await;
    let relay = relay::start(server.address, FIRST_BYTES, Then::Stall);
    let client = Client::new(&relay.to_string()).unwrap();
    let transfer = client.push(open_source(&source), &name("model"), one_lane());
    transfer.canceller().cancel();
    assert_eq!(transfer.await.unwrap_err().code(), ErrorCode::Interrupted);
}
