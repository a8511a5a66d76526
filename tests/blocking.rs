//! The library without `async`.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use std::{net::TcpStream, path::Path};
use tensorferry::{
    BUDGET_BYTES_DEFAULT, Checkpoint, ErrorCode, PushOptions, Server, blocking,
    format::npy::encode_header, plan::CheckpointName, source::SourceSet,
};

const LEN: u64 = 1 << 20;

fn source(dir: &Path) -> SourceSet {
    let path = dir.join("w.npy");
    let header = encode_header("|u1", false, &[LEN]);
    let bytes: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
    std::fs::write(&path, [header, bytes].concat()).unwrap();
    SourceSet::open(&[path], &Default::default()).unwrap()
}

fn serve(root: &Path) -> blocking::Serving {
    let address = ([127, 0, 0, 1], 0).into();
    let server = blocking::Server::bind(Server::builder(root), address).unwrap();
    server.serve().unwrap()
}

#[test]
fn a_push_is_made_watched_and_asked_about() {
    let temp = tempfile::tempdir().unwrap();
    let serving = serve(&temp.path().join("root"));
    let client = blocking::Client::new(&serving.local_addr().to_string()).unwrap();
    let name: CheckpointName = "runs/one".parse().unwrap();
    assert_eq!(
        client.status(&name).unwrap_err().code(),
        ErrorCode::SourceMissing
    );
    let transfer = client
        .push(source(temp.path()), &name, PushOptions::default())
        .unwrap();
    let watcher = transfer.watcher();
    let report = transfer.wait().unwrap();
    assert_eq!((report.tensor_count, report.bytes), (1, LEN));
    assert_eq!(watcher.progress().durable_bytes, LEN);

    assert!(client.status(&name).unwrap().published);
    let rows = client.list("runs/").unwrap();
    assert!(
        rows.iter()
            .any(|row| row.published && row.total_bytes == LEN)
    );
    let info = tensorferry::CheckpointInfo::from_json(&client.describe(&name).unwrap()).unwrap();
    let landed = Checkpoint::open(temp.path().join("root/runs/one")).unwrap();
    assert_eq!(&info, landed.info());
    serving.stop().unwrap();
}

#[test]
fn a_cancelled_push_ends_as_interrupted() {
    let temp = tempfile::tempdir().unwrap();
    // Nobody ever accepts: the push cannot end by itself.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let client = blocking::Client::new(&silent.local_addr().unwrap().to_string()).unwrap();
    let transfer = client
        .push(
            source(temp.path()),
            &"x".parse().unwrap(),
            PushOptions::default(),
        )
        .unwrap();
    assert!(!transfer.is_finished());
    transfer.cancel();
    assert_eq!(transfer.wait().unwrap_err().code(), ErrorCode::Interrupted);
}

#[test]
fn a_server_that_is_dropped_listens_no_more() {
    let temp = tempfile::tempdir().unwrap();
    let serving = serve(temp.path());
    let address = serving.local_addr();
    drop(TcpStream::connect(address).unwrap());
    drop(serving);
    assert!(TcpStream::connect(address).is_err());
    // One that never served, too.
    let server =
        blocking::Server::bind(Server::builder(temp.path()), ([127, 0, 0, 1], 0).into()).unwrap();
    let address = server.local_addr();
    drop(server);
    assert!(TcpStream::connect(address).is_err());
}

#[test]
fn a_folder_is_landed_without_a_server_of_ones_own() {
    let temp = tempfile::tempdir().unwrap();
    let folder = temp.path().join("out");
    let embedded = blocking::Embedded::start(&folder, BUDGET_BYTES_DEFAULT / 2).unwrap();
    let transfer = embedded.push(source(temp.path()), PushOptions::default());
    let report = transfer.unwrap().wait().unwrap();
    embedded.stop().unwrap();
    assert_eq!((report.bytes, report.resumed_bytes), (LEN, 0));
    let landed = Checkpoint::open(&folder).unwrap();
    assert!(landed.verify(|_| {}).unwrap().damages.is_empty());
    assert!(!temp.path().join(".tensorferry").exists());
}

#[test]
fn inside_an_async_runtime_every_call_is_refused_and_none_panics() {
    let temp = tempfile::tempdir().unwrap();
    let serving = serve(&temp.path().join("root"));
    let address = serving.local_addr();
    let client = blocking::Client::new(&address.to_string()).unwrap();
    let name: CheckpointName = "x".parse().unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = blocking::Client::new(&silent.local_addr().unwrap().to_string()).unwrap();
    let under_way = silent
        .push(source(temp.path()), &name, PushOptions::default())
        .unwrap();
    let embedded = blocking::Embedded::start(temp.path().join("out"), 4 << 20).unwrap();

    let (root, source) = (temp.path().join("other"), source(temp.path()));
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let refusals = runtime.block_on(async move {
        let source = std::sync::Arc::new(source);
        let (shared, options) = (|| std::sync::Arc::clone(&source), PushOptions::default);
        let any = ([127, 0, 0, 1], 0).into();
        vec![
            client.list("").err(),
            client.describe(&name).err(),
            client.status(&name).err(),
            client.discard(&name).err(),
            client.push(shared(), &name, options()).err(),
            under_way.wait().err(),
            blocking::Server::bind(Server::builder(&root), any).err(),
            blocking::Embedded::start(&root, 4 << 20).err(),
            embedded.push(shared(), options()).err(),
            embedded.stop().err(),
            // It stops all the same, in the background.
            serving.stop().err(),
        ]
    });
    for (number, refusal) in refusals.into_iter().enumerate() {
        let error = refusal.unwrap_or_else(|| panic!("call {number} was let through"));
        assert_eq!(error.code(), ErrorCode::Usage, "{number}: {error}");
        assert!(error.to_string().contains("tensorferry::Client"), "{error}");
    }
    let begun = std::time::Instant::now();
    while TcpStream::connect(address).is_ok() {
        assert!(begun.elapsed().as_secs() < 60, "it listens still");
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
}

#[test]
fn entries_are_added_while_a_push_runs() {
    let temp = tempfile::tempdir().unwrap();
    let server =
        blocking::Server::bind(Server::builder(temp.path()), ([127, 0, 0, 1], 0).into()).unwrap();
    let serving = server.serve().unwrap();
    let client = blocking::Client::new(&serving.local_addr().to_string()).unwrap();
    let name = "open".parse().unwrap();
    let push = client
        .push_open(&name, "a run", PushOptions::default())
        .unwrap();
    for i in 0..3u8 {
        let bytes = vec![i; 100 + usize::from(i)];
        let shape = [bytes.len() as u64];
        push.add_tensor(
            &format!("t{i}"),
            tensorferry::Dtype::U8,
            &shape,
            bytes.into(),
        )
        .unwrap();
    }
    let report = push.finish().wait().unwrap();
    assert_eq!((report.tensor_count, report.bytes), (3, 303));
    serving.stop().unwrap();
    let landed = Checkpoint::open(temp.path().join("open")).unwrap();
    assert!(landed.verify(|_| {}).unwrap().damages.is_empty());
}
