//! Copy: from one server to another, through this process and not its disk.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::{relay::Then, *};
use std::{fs, net::SocketAddr, path::Path, time::Duration};
use tensorferry::{
    Client, CopyOptions, Error, ErrorCode, Lanes, OutFormat, PushOptions, TransferReport,
    format::npy::encode_header,
    plan::CheckpointName,
    protocol::Reason,
    source::{SourceOptions, SourceSet},
};

const LARGE: usize = 24 << 20;

fn name(text: &str) -> CheckpointName {
    text.parse().unwrap()
}

fn tensors() -> Vec<(String, usize)> {
    let small = (0..20).map(|i| (format!("s{i}"), 100 + i));
    small
        .chain([("empty".to_owned(), 0), ("large".to_owned(), LARGE)])
        .collect()
}

fn file_of(seed: &str, tensor: &str, len: usize) -> Vec<u8> {
    let header = encode_header("|u1", false, &[len as u64]);
    [header, noise(&format!("{seed} {tensor}"), len)].concat()
}

async fn publish(server: &TestServer, temp: &Path, seed: &str, overwrite: bool) {
    let dir = temp.join(format!("source {seed}"));
    fs::create_dir(&dir).unwrap();
    for (tensor, len) in tensors() {
        fs::write(
            dir.join(format!("{tensor}.npy")),
            file_of(seed, &tensor, len),
        )
        .unwrap();
    }
    fs::write(dir.join("config.json"), seed).unwrap();
    let source = SourceSet::open(&[dir], &SourceOptions::default()).unwrap();
    let mut options = PushOptions::default();
    options.overwrite = overwrite;
    let push = server.client().push(source, &name("run"), options);
    push.await.unwrap();
}

fn options() -> CopyOptions {
    let mut options = CopyOptions::default();
    options.transfer = common::product::defaults();
    options
}

async fn copy(from: SocketAddr, to: SocketAddr) -> Result<TransferReport, Error> {
    let [from, to] = [from, to].map(|address| Client::new(&address.to_string()).unwrap());
    from.copy(&name("run"), &to, &name("backup/run"), options())
        .await
}

#[track_caller]
fn assert_landed(root: &Path, seed: &str) {
    let folder = root.join("backup/run");
    for (tensor, len) in tensors() {
        let landed = fs::read(folder.join(format!("{tensor}.npy"))).unwrap();
        assert!(landed == file_of(seed, &tensor, len), "{tensor} differs");
    }
    let config = fs::read(folder.join("files/config.json")).unwrap();
    assert_eq!(config, seed.as_bytes());
}

struct Two {
    temp: tempfile::TempDir,
    near: TestServer,
    far: TestServer,
}

async fn two() -> Two {
    let temp = tempfile::tempdir().unwrap();
    let near = TestServer::start(&temp.path().join("near")).await;
    let far = TestServer::start(&temp.path().join("far")).await;
    publish(&near, temp.path(), "a", false).await;
    Two { temp, near, far }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_lands_what_the_other_server_has() {
    let two = two().await;
    for lanes in [Lanes::Auto, Lanes::Fixed(1), Lanes::Fixed(5)] {
        let mut options = options();
        options.transfer.lanes = lanes;
        options.transfer.overwrite = true;
        let to_name = name(&format!("copies/{lanes}"));
        let (from, to) = (two.near.client(), two.far.client());
        let copy = from.copy(&name("run"), &to, &to_name, options);
        let report = copy.await.unwrap();
        assert_eq!((report.tensor_count, report.file_count), (22, 1));
        assert_eq!((report.session_count, report.resumed_bytes), (1, 0));
        let landed = two.far.root.join(to_name.as_str()).join("large.npy");
        assert!(fs::read(landed).unwrap() == file_of("a", "large", LARGE));
    }
    copy(two.near.address, two.far.address).await.unwrap();
    assert_landed(&two.far.root, "a");
    // The same once more, from whatever machine: nothing travels.
    let again = copy(two.near.address, two.far.address).await.unwrap();
    assert!(again.unchanged && again.wire_bytes == 0, "{again:?}");
    assert_eq!((again.tensor_count, again.file_count), (22, 1));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_it_becomes_one_file_where_that_is_asked_for() {
    let two = two().await;
    let mut options = options();
    options.include = vec!["s?".to_owned(), "large".to_owned()];
    options.exclude = vec!["s1".to_owned()];
    options.transfer.out_format = OutFormat::Safetensors;
    let (from, to) = (two.near.client(), two.far.client());
    let report = from.copy(&name("run"), &to, &name("part"), options).await;
    assert_eq!(report.unwrap().tensor_count, 10);
    let landed = two.far.root.join("part/model.safetensors");
    let landed = SourceSet::open(&[landed], &SourceOptions::default()).unwrap();
    assert_eq!(landed.entries().len(), 10);
    for (index, entry) in landed.entries().iter().enumerate() {
        let mut bytes = vec![0; entry.header.byte_len as usize];
        landed.read_at(index, 0, &mut bytes).unwrap();
        assert!(bytes == noise(&format!("a {}", entry.header.name), bytes.len()));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_on_either_side_is_made_good() {
    let two = two().await;
    let sender = relay::start_back(two.near.address, LARGE / 2, Then::Cut);
    let report = copy(sender, two.far.address).await.unwrap();
    assert!(report.session_count > 1, "{report:?}");
    assert_landed(&two.far.root, "a");

    fs::remove_dir_all(two.far.root.join("backup")).unwrap();
    let receiver = relay::start(two.far.address, LARGE / 2, Then::Cut);
    let report = copy(two.near.address, receiver).await.unwrap();
    assert!(report.session_count > 1, "{report:?}");
    assert_landed(&two.far.root, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_copy_that_was_stopped_goes_on_where_the_far_disk_stands() {
    let two = two().await;
    let sender = relay::start_back(two.near.address, LARGE / 2, Then::Stall);
    let (from, to) = (Client::new(&sender.to_string()).unwrap(), two.far.client());
    // Further lanes would go on when the first one stalls.
    let start = || {
        let mut options = options();
        options.transfer.lanes = Lanes::Fixed(1);
        from.copy(&name("run"), &to, &name("backup/run"), options)
    };
    let transfer = start();
    while transfer.progress().durable_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    transfer.cancel();
    let watcher = transfer.watcher();
    let stopped = transfer.await.unwrap_err();
    assert!(matches!(stopped, Error::Interrupted), "{stopped:?}");
    // What was promised is there.
    let durable_bytes = watcher.progress().durable_bytes;
    let status = to.status(&name("backup/run")).await.unwrap();
    let there = status.transfer.unwrap().durable_bytes;
    assert!(
        durable_bytes > 0 && there >= durable_bytes,
        "{there} of {durable_bytes}"
    );

    // Later connections through the relay are free.
    let report = start().await.unwrap();
    assert!(report.resumed_bytes >= durable_bytes, "{report:?}");
    assert_eq!(report.resumed_bytes + report.wire_bytes, report.bytes);
    assert_landed(&two.far.root, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_and_new_content_of_the_source_never_mix() {
    let two = two().await;
    let sender = relay::start_back(two.near.address, LARGE / 2, Then::Stall);
    let (from, to) = (Client::new(&sender.to_string()).unwrap(), two.far.client());
    let start = || {
        let mut options = options();
        options.transfer.lanes = Lanes::Fixed(1);
        from.copy(&name("run"), &to, &name("backup/run"), options)
    };
    let transfer = start();
    while transfer.progress().durable_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    transfer.cancel();
    transfer.await.unwrap_err();
    publish(&two.near, two.temp.path(), "b", true).await;
    start().await.unwrap();
    assert_landed(&two.far.root, "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_server_that_refuses_is_named() {
    let two = two().await;
    let (from, to) = (two.near.client(), two.far.client());
    let absent = from.copy(&name("absent"), &to, &name("x"), options()).await;
    let absent = absent.unwrap_err();
    assert_eq!(absent.code(), ErrorCode::SourceMissing);
    let near = two.near.address.to_string();
    assert!(absent.to_string().contains(&near), "{absent}");

    publish(&two.far, &two.temp.path().join("far"), "b", false).await;
    let taken = from.copy(&name("run"), &to, &name("run"), options()).await;
    let taken = taken.unwrap_err();
    let far = two.far.address.to_string();
    assert!(
        matches!(&taken, Error::Refused { reason: Reason::Exists, message } if message.contains(&far)),
        "{taken:?}"
    );
    two.near.stop().await;
    let mut options = options();
    options.transfer.retries = 0;
    let gone = from.copy(&name("run"), &to, &name("x"), options).await;
    let gone = gone.unwrap_err();
    assert_eq!(gone.code(), ErrorCode::Network);
    assert!(gone.to_string().contains(&near), "{gone}");
}
