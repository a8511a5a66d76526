//! Pushes whose entries are produced while they are sent.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use bytes::Bytes;
use common::{product::*, *};
use std::collections::BTreeMap;
use tensorferry::{
    Checkpoint, Embedded, Error, ErrorCode, MemoryEntry, OpenPush, SourceError, format::Dtype,
    plan::EntryHeader,
};

const LAYERS: usize = 6;

fn layer(i: usize) -> Bytes {
    noise(&format!("layer {i}"), 2 * CHUNK + 100 * i).into()
}

fn add_layer(push: &OpenPush, i: usize) {
    let bytes = layer(i);
    let shape = [bytes.len() as u64];
    push.add_tensor(&format!("layer.{i}"), Dtype::U8, &shape, bytes)
        .unwrap();
}

fn begin(server: &TestServer, key: &str) -> OpenPush {
    server
        .client()
        .push_open(&name("model"), key, defaults())
        .unwrap()
}

fn assert_layers(server: &TestServer) {
    for i in 0..LAYERS {
        let bytes = layer(i);
        let landed = server.landed("model", &format!("layer.{i}"), bytes.len());
        assert!(landed == bytes, "layer {i}");
    }
}

/// Waits until this many bytes are on the receiver.
async fn settled(push: &OpenPush, bytes: u64) {
    let watcher = push.watcher();
    tokio::time::timeout(HANG, async {
        while watcher.progress().settled_bytes < bytes {
            assert!(!push.is_finished());
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
}

#[tokio::test]
async fn entries_travel_before_the_last_one_is_known() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let push = begin(&server, "run");
    for i in 0..LAYERS {
        add_layer(&push, i);
        // Each arrives although nobody knows yet what comes after it.
        settled(&push, (0..=i).map(|i| layer(i).len() as u64).sum()).await;
    }
    push.add_blob("config.json", Bytes::from_static(b"{}"))
        .unwrap();
    let again = push.add_blob("config.json", Bytes::new());
    assert!(matches!(again, Err(Error::Source(_))), "{again:?}");
    let wrong = push.add_tensor("short", Dtype::F32, &[4], Bytes::from_static(b"abc"));
    assert!(wrong.is_err());
    assert!(!server.root.join("model").exists());
    let report = push.finish().await.unwrap();
    assert_eq!((report.tensor_count, report.file_count), (LAYERS as u64, 1));
    assert_layers(&server);
    assert_eq!(server.landed("model", "config.json", 2), b"{}");
}

#[tokio::test]
async fn nothing_added_is_an_empty_checkpoint() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let report = begin(&server, "run").finish().await.unwrap();
    assert_eq!((report.tensor_count, report.bytes), (0, 0));
    assert!(server.root.join("model/manifest.json").exists());
}

#[tokio::test]
async fn a_producer_that_dies_goes_on_with_what_arrived() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let push = begin(&server, "run");
    (0..3).for_each(|i| add_layer(&push, i));
    let arrived = (0..3).map(|i| layer(i).len() as u64).sum();
    settled(&push, arrived).await;
    drop(push);
    server.assert_unpublished("model").await;

    // Equal bytes are kept after comparison and do not travel again.
    let push = begin(&server, "run");
    (0..LAYERS).for_each(|i| add_layer(&push, i));
    let report = push.finish().await.unwrap();
    assert_eq!(report.resumed_bytes, arrived);
    assert_eq!(report.bytes, report.resumed_bytes + report.wire_bytes);
    assert_layers(&server);
}

#[tokio::test]
async fn other_bytes_under_the_same_key_are_sent_anew() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let push = begin(&server, "run");
    let old = Bytes::from(noise("old", layer(0).len()));
    let shape = [old.len() as u64];
    push.add_tensor("layer.0", Dtype::U8, &shape, old.clone())
        .unwrap();
    settled(&push, old.len() as u64).await;
    drop(push);
    server.assert_quiet().await;
    let push = begin(&server, "run");
    (0..LAYERS).for_each(|i| add_layer(&push, i));
    let report = push.finish().await.unwrap();
    assert_eq!(report.resumed_bytes, 0);
    assert_layers(&server);
}

#[tokio::test]
async fn a_lost_connection_is_made_good_from_memory() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let push = begin(&server, "run");
    (0..3).for_each(|i| add_layer(&push, i));
    settled(&push, layer(0).len() as u64).await;
    let address = server.address;
    server.stop().await;
    add_layer(&push, 3);
    let server = TestServer::start_at(temp.path(), address).await;
    (4..LAYERS).for_each(|i| add_layer(&push, i));
    let report = push.finish().await.unwrap();
    assert!(report.session_count > 1);
    assert_layers(&server);
}

#[tokio::test]
async fn checkpoints_on_disk_can_be_part_of_it() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let source = open_source(&source_dir("s02"));
    let push = begin(&server, "run");
    (0..LAYERS).for_each(|i| add_layer(&push, i));
    push.add_set(&source).unwrap();
    assert!(push.add_set(&source).is_err(), "every name is taken");
    push.finish().await.unwrap();
    assert_layers(&server);
    for part in Load::of_source(&source).parts {
        let found = server.landed("model", &part.entry.name, part.bytes.len());
        assert!(found == part.bytes, "{}", part.entry.name);
    }
}

#[tokio::test]
async fn a_push_that_failed_says_so_before_the_end() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    begin(&server, "first").finish().await.unwrap();
    let push = begin(&server, "second");
    tokio::time::timeout(HANG, async {
        while !push.is_finished() {
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    assert_eq!(class(push.finish().await).0, ErrorCode::Exists);
}

/// Relays connections; those made before `published` exists are cut instead of bringing
/// the client anything after that.
fn relay_until(published: std::path::PathBuf, server: std::net::SocketAddr) -> String {
    use std::{
        io::{Read, Write, copy},
        net::{Shutdown, TcpListener, TcpStream},
        thread::spawn,
    };
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    spawn(move || {
        for near in listener.incoming() {
            let (mut near, mut far) = (near.unwrap(), TcpStream::connect(server).unwrap());
            let (mut from, mut to) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            spawn(move || copy(&mut from, &mut to));
            let is_early = !published.exists();
            let published = published.clone();
            spawn(move || {
                let mut buf = vec![0; 64 << 10];
                while let Ok(n @ 1..) = far.read(&mut buf) {
                    if is_early && published.exists() || near.write_all(&buf[..n]).is_err() {
                        break;
                    }
                }
                let _ = (near.shutdown(Shutdown::Both), far.shutdown(Shutdown::Both));
            });
        }
    });
    address
}

#[tokio::test]
async fn a_lost_answer_to_finish_is_asked_for_again() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let address = relay_until(server.root.join("model/manifest.json"), server.address);
    let client = tensorferry::Client::new(&address).unwrap();
    let push = client.push_open(&name("model"), "run", defaults()).unwrap();
    (0..LAYERS).for_each(|i| add_layer(&push, i));
    let report = push.finish().await.unwrap();
    assert!(report.unchanged && report.session_count > 1);
    assert_layers(&server);
    // Another handle is another content.
    let push = begin(&server, "run");
    add_layer(&push, 0);
    let refused = push.finish().await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::Exists);
}

#[tokio::test]
async fn a_receiver_that_gives_up_and_reads_nothing_more_is_not_waited_for() {
    let (address, _gone) = silent::start_as(true).await;
    let client = tensorferry::Client::new(&address.to_string()).unwrap();
    let push = client.push_open(&name("model"), "run", defaults()).unwrap();
    // More than is read ahead, so that the push waits for room.
    let bytes = Bytes::from(vec![7; 56 << 20]);
    let shape = [bytes.len() as u64];
    push.add_tensor("w", Dtype::U8, &shape, bytes).unwrap();
    let ended = tokio::time::timeout(HANG, push.finish()).await.unwrap();
    let error = ended.unwrap_err();
    assert!(error.to_string().contains("the disk is gone"), "{error}");
}

#[tokio::test]
#[expect(
    unsafe_code,
    reason = "only a shared map can be written while it is lent"
)]
async fn memory_that_is_written_while_it_travels_is_noticed() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let path = temp.path().join("memory");
    let old = noise("old", 8 * CHUNK);
    std::fs::write(&path, &old).unwrap();
    let file = std::fs::File::open(&path).unwrap();
    // SAFETY: what changes below is what the test is about; the file keeps its length.
    let lent = Bytes::from_owner(unsafe { memmap2::Mmap::map(&file) }.unwrap());
    let header = EntryHeader::tensor("w", Dtype::U8, &[lent.len() as u64]).unwrap();
    let entry = MemoryEntry::new(header.clone(), lent).trainable(true);

    let entry = entry.checked();
    let change = |byte: u8| {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.write_all_at(&[byte], 5 * CHUNK as u64).unwrap();
    };
    change(!old[5 * CHUNK]);
    let push = begin(&server, "run");
    push.add_entry(entry.clone()).unwrap();
    let error = push.finish().await.unwrap_err();
    assert_eq!(error.code(), ErrorCode::SourceChanged);
    assert!(
        matches!(&error, Error::Source(SourceError::Mutated { name }) if name == "w"),
        "{error:?}"
    );
    assert!(!server.root.join("model").exists());

    // As it was again, only what differed travels again.
    change(old[5 * CHUNK]);
    let push = begin(&server, "run");
    push.add_entry(entry).unwrap();
    let report = push.finish().await.unwrap();
    assert_eq!(report.resumed_bytes, 7 * CHUNK as u64);
    assert!(server.landed("model", "w", old.len()) == old);
    let manifest = std::fs::read_to_string(server.root.join("model/manifest.json")).unwrap();
    assert!(manifest.contains("\"trainable\":true") || manifest.contains("\"trainable\": true"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_local_folder_takes_memory_and_its_metadata() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("here");
    let embedded = Embedded::start(&folder, 16 << 20).await.unwrap();
    let metadata = BTreeMap::from([("step".to_owned(), "9".to_owned())]);
    let push = embedded.push_open_with("run", metadata.clone(), defaults());
    let push = push.unwrap();
    (0..2).for_each(|i| add_layer(&push, i));
    push.finish().await.unwrap();
    embedded.stop().await.unwrap();
    let landed = Checkpoint::open(&folder).unwrap();
    assert_eq!(landed.info().metadata, metadata);
    assert!(landed.tensor("layer.1").unwrap().unwrap().bytes() == layer(1));
}
