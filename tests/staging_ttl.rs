//! Row H26: what nobody continues goes, and nothing else.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper of a test may panic"
)]

mod common;

use common::*;
use std::{
    fs,
    path::Path,
    time::{Duration, SystemTime},
};

const DAY: Duration = Duration::from_secs(86_400);

fn load() -> Load {
    Load::of(vec![tensor("a", 3 * CHUNK + 7), tensor("b", 100)])
}

/// Leaves a transfer with its first cell durable.
async fn leave(server: &TestServer, name: &str) {
    let load = load();
    let mut session = server.open(load.open(name, [1; 16])).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    session
        .refused(frame_abort("INTERRUPTED"))
        .await
        .unwrap_err();
}

/// Makes everything below a folder that many days old.
fn age(folder: &Path, age: Duration) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            self::age(&path, age);
        }
        set_age(&path, age);
    }
    set_age(folder, age);
}

fn set_age(path: &Path, age: Duration) {
    let file = fs::File::open(path).unwrap();
    file.set_modified(SystemTime::now() - age).unwrap();
}

fn folder(root: &Path, name: &str) -> std::path::PathBuf {
    let hash = blake3::hash(name.as_bytes()).to_hex();
    root.join(".tensorferry/transfers").join(&hash[..16])
}

#[tokio::test]
async fn h26_an_abandoned_transfer_goes_when_the_server_starts_and_begins_anew() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let server = TestServer::start(root).await;
    for name in ["old", "recent", "touched"] {
        leave(&server, name).await;
    }
    let load = load();
    server.push(load.open("published", [2; 16]), &load).await;
    server.stop().await;
    age(&folder(root, "old"), DAY * 8);
    age(&folder(root, "touched"), DAY * 8);
    let data = fs::read_dir(folder(root, "touched").join("data")).unwrap();
    set_age(&data.last().unwrap().unwrap().path(), DAY);
    age(&root.join("published"), DAY * 800);

    // Without a limit everything stays.
    let server = TestServer::start(root).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(folder(root, "old").exists());
    server.stop().await;

    let server = TestServer::with(root, |builder| builder.staging_ttl(DAY * 7)).await;
    let gone = async {
        while folder(root, "old").exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, gone)
        .await
        .expect("it is removed");
    for name in ["recent", "touched"] {
        let transfer = server.status(name).await.unwrap().transfer.unwrap();
        assert_eq!(transfer.durable_bytes, CHUNK as u64, "{name}");
    }
    server.assert_landed("published", &load);
    let mut session = server.open(load.open("old", [1; 16])).await;
    assert_eq!(session.accept.as_ref().unwrap().durable_bytes, 0);
    session.announce(&load).await;
    assert!(session.wanted[&0].contains(&0));
    session.send_wanted(&load).await;
    session.finish(&load).await;
    server.assert_landed("old", &load);
}

#[tokio::test]
async fn h26_a_live_transfer_stays_however_old_its_files_are() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path();
    let first = TestServer::start(root).await;
    let load = load();
    let mut session = first.open(load.open("live", [1; 16])).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 0)).await;
    session.until(|s| s.durable.contains_key(&0)).await;
    age(&folder(root, "live"), DAY * 8);
    leave(&first, "abandoned").await;
    age(&folder(root, "abandoned"), DAY * 8);
    // A second server on the same root looks while the session lives in the first.
    let second = TestServer::with(root, |builder| builder.staging_ttl(DAY * 7)).await;
    let gone = async {
        while folder(root, "abandoned").exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(HANG, gone)
        .await
        .expect("it is removed");
    second.stop().await;
    session.wanted.get_mut(&0).unwrap().remove(&0);
    session.send_wanted(&load).await;
    session.finish(&load).await;
    first.assert_landed("live", &load);
}
