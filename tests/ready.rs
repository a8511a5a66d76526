//! Tensors that can be used before the rest of their checkpoint is there, and that never
//! change under whoever uses them.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::{relay::Then, *};
use std::{
    error::Error as _,
    fs::{self, File},
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, channel},
};
use tensorferry::{
    Client, ErrorCode, Lanes, OnReady, PullOptions, PushOptions, ReadyTensor,
    format::npy::encode_header, plan::CheckpointName, source::SourceSet,
};

const LARGE: usize = 16 << 20;
const WANTED: usize = 1 << 20;

fn name(text: &str) -> CheckpointName {
    text.parse().unwrap()
}

fn file_of(seed: &str, tensor: &str, len: usize) -> Vec<u8> {
    let header = encode_header("|u1", false, &[len as u64]);
    [header, noise(&format!("{seed} {tensor}"), len)].concat()
}

/// The one that is wanted comes last in the source.
const TENSORS: [(&str, usize); 4] = [
    ("a_large", LARGE),
    ("b_small", 10),
    ("c_empty", 0),
    ("z_wanted", WANTED),
];

fn write_source(dir: &Path, seed: &str) -> SourceSet {
    let _ = fs::create_dir(dir);
    for (tensor, len) in TENSORS {
        let path = dir.join(format!("{tensor}.npy"));
        let _ = fs::remove_file(&path);
        fs::write(path, file_of(seed, tensor, len)).unwrap();
    }
    SourceSet::open(&[dir], &Default::default()).unwrap()
}

fn listening() -> (OnReady, Receiver<ReadyTensor>) {
    let (tell, told) = channel();
    let on_ready = OnReady::new(move |tensor: &ReadyTensor| {
        let _ = tell.send(tensor.clone());
    });
    (on_ready, told)
}

/// Waits for an event off the runtime's threads.
async fn next(told: Receiver<ReadyTensor>) -> (ReadyTensor, Receiver<ReadyTensor>) {
    let wait = move || (told.recv_timeout(HANG).expect("a tensor is ready"), told);
    tokio::task::spawn_blocking(wait).await.unwrap()
}

fn all_of(mut file: &File) -> Vec<u8> {
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).unwrap();
    bytes
}

fn inode(path: &Path) -> u64 {
    fs::metadata(path).unwrap().ino()
}

fn options() -> PushOptions {
    let mut options = common::product::defaults();
    options.first = vec!["z_*".to_owned()];
    options
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_pull_wants_first_can_be_used_while_the_rest_is_missing() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let source = write_source(&temp.path().join("source"), "a");
    let push = server.client().push(source, &name("run"), options());
    push.await.unwrap();

    let relay = relay::start_back(server.address, LARGE / 2, Then::Stall);
    let folder = temp.path().join("here");
    let (on_ready, told) = listening();
    let mut pull = PullOptions::default();
    pull.transfer = options();
    // Others would go on when the first one stalls.
    pull.transfer.lanes = Lanes::Fixed(1);
    pull.on_ready = Some(on_ready);
    let client = Client::new(&relay.to_string()).unwrap();
    let transfer = client.pull(&name("run"), &folder, pull.clone());
    let (ready, told) = next(told).await;
    assert_eq!((&*ready.name, ready.is_first), ("z_wanted", true));
    assert_eq!(ready.byte_len, WANTED as u64);
    let progress = transfer.progress();
    assert!(progress.durable_bytes < progress.total_bytes);
    let held = File::open(&ready.path).unwrap();
    assert!(all_of(&held) == file_of("a", "z_wanted", WANTED));
    assert_eq!(fs::metadata(&ready.path).unwrap().mode() & 0o222, 0);
    let before = inode(&ready.path);
    transfer.cancel();
    transfer.await.unwrap_err();
    assert!(!folder.exists());

    // The rest comes later, and it is told of again, with all the others.
    let transfer = client.pull(&name("run"), &folder, pull);
    let report = transfer.await.unwrap();
    assert!(report.resumed_bytes >= WANTED as u64, "{report:?}");
    let mut names: Vec<_> = told.try_iter().map(|tensor| tensor.name).collect();
    assert_eq!(names.first().map(String::as_str), Some("z_wanted"));
    names.sort();
    assert_eq!(names, TENSORS.map(|(name, _)| name));
    let landed = folder.join("z_wanted.npy");
    assert_eq!(inode(&landed), before, "another file was published");
    assert_eq!(held.metadata().unwrap().ino(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_tells_of_every_tensor_of_a_push_once_and_of_what_is_true() {
    let temp = tempfile::tempdir().unwrap();
    let (tell, told) = channel::<(ReadyTensor, Vec<u8>)>();
    // What is there in the moment of the call.
    let on_ready = OnReady::new(move |tensor: &ReadyTensor| {
        let bytes = fs::read(&tensor.path).unwrap();
        let _ = tell.send((tensor.clone(), bytes));
    });
    let root = temp.path().join("root");
    let server = TestServer::with(&root, |b| b.on_ready(on_ready)).await;
    let source = write_source(&temp.path().join("source"), "a");
    let push = server.client().push(source, &name("run"), options());
    push.await.unwrap();
    let told: Vec<_> = told.try_iter().collect();
    assert_eq!(told[0].0.name, "z_wanted");
    assert_eq!(told.len(), TENSORS.len());
    for (tensor, len) in TENSORS {
        let (ready, bytes) = told.iter().find(|(t, _)| t.name == tensor).unwrap();
        assert!(*bytes == file_of("a", tensor, len), "{tensor}");
        assert_eq!(ready.checkpoint, "run");
        assert!(ready.path.starts_with(&root), "{:?}", ready.path);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_listens_slowly_hears_of_each_before_it_is_published_and_of_one_at_a_time() {
    let temp = tempfile::tempdir().unwrap();
    let (tell, told) = channel();
    let calls = std::sync::Mutex::new(());
    // Longer than the push itself takes.
    let on_ready = OnReady::new(move |tensor: &ReadyTensor| {
        let alone = calls.try_lock().is_ok();
        std::thread::sleep(std::time::Duration::from_millis(300));
        let _ = tell.send((tensor.name.clone(), alone, tensor.path.exists()));
    });
    let root = temp.path().join("root");
    let server = TestServer::with(&root, |b| b.on_ready(on_ready)).await;
    let source = write_source(&temp.path().join("source"), "a");
    let push = server.client().push(source, &name("run"), options());
    push.await.unwrap();
    let told: Vec<_> = told.try_iter().collect();
    assert_eq!(told.len(), TENSORS.len());
    assert!(
        told.iter().all(|(_, alone, there)| *alone && *there),
        "{told:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn who_wants_to_hear_of_the_first_only_hears_of_no_other() {
    let temp = tempfile::tempdir().unwrap();
    let (tell, told) = channel();
    let on_ready = OnReady::of_first(move |tensor: &ReadyTensor| {
        let _ = tell.send(tensor.name.clone());
    });
    let root = temp.path().join("root");
    let server = TestServer::with(&root, |b| b.on_ready(on_ready)).await;
    let source = write_source(&temp.path().join("source"), "a");
    let push = server.client().push(source, &name("run"), options());
    push.await.unwrap();
    assert_eq!(told.try_iter().collect::<Vec<_>>(), ["z_wanted"]);
    // The others are files as ever.
    let others = fs::metadata(root.join("run/a_large.npy")).unwrap().mode();
    assert_ne!(others & 0o200, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_ready_tensor_whose_source_changes_is_made_anew_beside_it() {
    let temp = tempfile::tempdir().unwrap();
    let (on_ready, told) = listening();
    let root = temp.path().join("root");
    let server = TestServer::with(&root, |b| b.on_ready(on_ready)).await;
    let dir = temp.path().join("source");
    let source = write_source(&dir, "a");
    let relay = relay::start(server.address, LARGE / 2, Then::Stall);
    let client = Client::new(&relay.to_string()).unwrap();
    let mut one = options();
    one.lanes = Lanes::Fixed(1);
    let transfer = client.push(source, &name("run"), one);
    let (ready, told) = next(told).await;
    assert_eq!(ready.name, "z_wanted");
    let held = File::open(&ready.path).unwrap();
    transfer.cancel();
    transfer.await.unwrap_err();

    // One cell of it is another now.
    write_source(&dir, "a");
    let mut changed = file_of("a", "z_wanted", WANTED);
    *changed.last_mut().unwrap() ^= 1;
    fs::write(dir.join("z_wanted.npy"), &changed).unwrap();
    let source = SourceSet::open(&[&dir], &Default::default()).unwrap();
    let push = server.client().push(source, &name("run"), options());
    let report = push.await.unwrap();
    assert!(report.resumed_bytes > 0, "{report:?}");
    let landed: PathBuf = root.join("run/z_wanted.npy");
    assert!(fs::read(&landed).unwrap() == changed);
    assert!(
        all_of(&held) == file_of("a", "z_wanted", WANTED),
        "a ready tensor changed under its reader"
    );
    assert_ne!(inode(&landed), held.metadata().unwrap().ino());
    assert!(told.try_iter().any(|tensor| tensor.name == "z_wanted"));
    let names: Vec<_> = fs::read_dir(root.join("run"))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name.starts_with('.'))
        .collect();
    assert!(names.is_empty(), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pattern_for_the_first_that_fits_nothing_is_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let source = write_source(&temp.path().join("source"), "a");
    let mut wrong = options();
    wrong.first = vec!["none*".to_owned()];
    let client = server.client();
    let push = client.push(source.clone(), &name("run"), wrong.clone());
    let refused = push.await.unwrap_err();
    let why = refused.source().unwrap().to_string();
    assert!(why.contains("none*"), "{refused}: {why}");
    client.push(source, &name("run"), options()).await.unwrap();
    let mut pull = PullOptions::default();
    pull.transfer = wrong;
    let folder = temp.path().join("here");
    let refused = client.pull(&name("run"), &folder, pull).await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::SourceMissing, "{refused}");
    assert!(!folder.exists());
}
