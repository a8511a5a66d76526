//! Pull: what a server has lands here as a push would have landed it, resumes, and a
//! server is trusted with nothing.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::{relay::Then, *};
use std::{
    collections::BTreeMap,
    fs,
    path::Path,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tensorferry::{
    Checkpoint, Client, Dtype, Error, ErrorCode, GrowingSource, Lanes, NameFilter, OutFormat,
    PullOptions, PushOptions, RateLimit, Stage, TransferReport,
    format::npy::encode_header,
    plan::{CheckpointName, EntryHeader},
    protocol::Reason,
    source::{SourceOptions, SourceSet},
    wire::pb::{
        self,
        ferry_server::{Ferry, FerryServer},
    },
};
use tokio_stream::{Stream, StreamExt};
use tonic::{Request, Response, Status, Streaming};

/// Bytes of the large tensor: many cells, and more than every buffer on the way.
const LARGE: usize = 24 << 20;

fn name(text: &str) -> CheckpointName {
    text.parse().unwrap()
}

/// Files of a source: a large tensor, small ones, a side file.
fn files(seed: &str) -> BTreeMap<String, Vec<u8>> {
    let tensor = |name: &str, len: usize| {
        let header = encode_header("|u1", false, &[len as u64]);
        let bytes = noise(&format!("{seed} {name}"), len);
        (format!("{name}.npy"), [header, bytes].concat())
    };
    let mut files: BTreeMap<_, _> = (0..20).map(|i| tensor(&format!("s{i}"), 100 + i)).collect();
    files.extend([tensor("large", LARGE), tensor("empty", 0)]);
    files.insert("config.json".to_owned(), seed.as_bytes().to_vec());
    files
}

async fn publish(server: &TestServer, temp: &Path, seed: &str, overwrite: bool) {
    let dir = temp.join(format!("source {seed}"));
    fs::create_dir(&dir).unwrap();
    for (name, bytes) in files(seed) {
        fs::write(dir.join(name), bytes).unwrap();
    }
    let source = SourceSet::open(&[dir], &SourceOptions::default()).unwrap();
    let mut options = PushOptions::default();
    options.overwrite = overwrite;
    server
        .client()
        .push(source, &name("run"), options)
        .await
        .unwrap();
}

/// What landed is the source, byte for byte, and nothing else is left beside it.
#[track_caller]
fn assert_landed(folder: &Path, seed: &str) {
    for (name, bytes) in files(seed) {
        let path = match name.ends_with(".npy") {
            true => folder.join(&name),
            false => folder.join("files").join(&name),
        };
        assert!(fs::read(&path).unwrap() == bytes, "{name} differs");
    }
    let service = folder.parent().unwrap().join(".tensorferry");
    assert!(!service.exists(), "the service folder is left");
}

fn options() -> PullOptions {
    let mut options = PullOptions::default();
    options.transfer = common::product::defaults();
    options
}

async fn pull(server: std::net::SocketAddr, folder: &Path) -> Result<TransferReport, Error> {
    let client = Client::new(&server.to_string()).unwrap();
    client.pull(&name("run"), folder, options()).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_lands_what_was_pushed() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    for lanes in [Lanes::Auto, Lanes::Fixed(1), Lanes::Fixed(5)] {
        let folder = temp.path().join(format!("here/{lanes}"));
        let mut options = options();
        options.transfer.lanes = lanes;
        let report = server.client().pull(&name("run"), &folder, options).await;
        let report = report.unwrap();
        assert_eq!((report.tensor_count, report.file_count), (22, 1));
        assert_eq!(report.session_count, 1);
        assert_landed(&folder, "a");
    }
    // The very same once more: nothing travels.
    let again = pull(server.address, &temp.path().join("here/auto")).await;
    let again = again.unwrap();
    assert!(
        again.unchanged && again.resumed_bytes == again.bytes,
        "{again:?}"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_lands_in_one_file_where_that_is_asked_for() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    let mut options = options();
    options.include = vec!["s?".to_owned(), "large".to_owned()];
    options.exclude = vec!["s1".to_owned()];
    options.transfer.out_format = OutFormat::Safetensors;
    let folder = temp.path().join("here");
    let client = server.client();
    let report = client.pull(&name("run"), &folder, options).await.unwrap();
    assert_eq!(report.tensor_count, 10);
    let landed = SourceSet::open(
        &[folder.join("model.safetensors")],
        &SourceOptions::default(),
    );
    let landed = landed.unwrap();
    for (index, entry) in landed.entries().iter().enumerate() {
        let mut bytes = vec![0; entry.header.byte_len as usize];
        landed.read_at(index, 0, &mut bytes).unwrap();
        assert!(bytes == noise(&format!("a {}", entry.header.name), bytes.len()));
    }
    assert_eq!(landed.entries().len(), 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_is_cut_off_goes_on_by_itself() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    let relay = relay::start_back(server.address, LARGE / 2, Then::Cut);
    let report = pull(relay, &temp.path().join("here")).await.unwrap();
    assert!(report.session_count > 1, "{report:?}");
    assert_landed(&temp.path().join("here"), "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_was_stopped_goes_on_where_the_disk_stands() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    let relay = relay::start_back(server.address, LARGE / 2, Then::Stall);
    let folder = temp.path().join("here");
    let client = Client::new(&relay.to_string()).unwrap();
    let transfer = client.pull(&name("run"), &folder, options());
    while transfer.progress().durable_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    transfer.cancel();
    let stopped = transfer.await.unwrap_err();
    assert!(matches!(stopped, Error::Interrupted), "{stopped:?}");
    assert!(!folder.exists() && temp.path().join(".tensorferry").exists());

    // Later connections through the relay are free.
    let report = client.pull(&name("run"), &folder, options()).await.unwrap();
    assert!(report.resumed_bytes > 0, "{report:?}");
    assert!(report.resumed_bytes < report.bytes);
    assert_landed(&folder, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn old_and_new_content_of_a_name_never_mix() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    let relay = relay::start_back(server.address, LARGE / 2, Then::Stall);
    let folder = temp.path().join("here");
    let client = Client::new(&relay.to_string()).unwrap();
    let transfer = client.pull(&name("run"), &folder, options());
    while transfer.progress().durable_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    transfer.cancel();
    transfer.await.unwrap_err();
    publish(&server, temp.path(), "b", true).await;
    client.pull(&name("run"), &folder, options()).await.unwrap();
    assert_landed(&folder, "b");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_exported_is_pulled_without_being_imported() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model.npy");
    fs::write(&model, &files("a")["large.npy"]).unwrap();
    let (root, elsewhere) = (temp.path().join("root"), model.clone());
    let server = TestServer::with(&root, |b| b.export(name("live"), elsewhere)).await;
    let folder = temp.path().join("here");
    let client = server.client();
    let report = client.pull(&name("live"), &folder, options()).await;
    assert_eq!(report.unwrap().tensor_count, 1);
    assert!(fs::read(folder.join("model.npy")).unwrap() == fs::read(&model).unwrap());
    let rows = client.list("").await.unwrap();
    assert!(rows.iter().all(|row| row.offered && !row.published));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_pulled_is_refused_and_leaves_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    let client = server.client();
    let folder = temp.path().join("here");
    let mut absent = options();
    absent.include = vec!["nothing*".to_owned()];
    let mut large = options();
    large.max_bytes = Some(1000);
    for (wanted, options, code) in [
        ("none", options(), ErrorCode::SourceMissing),
        ("run", absent, ErrorCode::SourceMissing),
        ("run", large, ErrorCode::NoSpace),
    ] {
        let error = client.pull(&name(wanted), &folder, options).await;
        assert_eq!(error.unwrap_err().code(), code, "{wanted}");
        assert!(!folder.exists() && !temp.path().join(".tensorferry").exists());
    }
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("mine"), "").unwrap();
    let taken = client.pull(&name("run"), &folder, options()).await;
    assert_eq!(taken.unwrap_err().code(), ErrorCode::Exists);
    assert!(folder.join("mine").exists());
}

/// What is said to whoever asks so.
type Script = dyn Fn(&pb::PullOpen) -> Vec<pb::SenderFrame> + Send + Sync;

/// A server that says whatever a test wants in the answer to a pull.
struct Liar {
    script: Arc<Script>,
    /// What it says on every lane that is offered.
    on_lane: Arc<Vec<pb::SenderFrame>>,
}

/// A liar waits so long for an answer.
const ANSWER: Duration = Duration::from_millis(50);

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Ferry for Liar {
    type PushStream = Frames<pb::ReceiverFrame>;
    type PullStream = Frames<pb::SenderFrame>;

    async fn push(
        &self,
        _: Request<Streaming<pb::SenderFrame>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn pull(
        &self,
        request: Request<Streaming<pb::ReceiverFrame>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let mut heard = request.into_inner();
        let (script, on_lane) = (Arc::clone(&self.script), Arc::clone(&self.on_lane));
        let (tell, told) = tokio::sync::mpsc::channel(64);
        tokio::spawn(async move {
            let first = heard.message().await.ok().flatten().and_then(|f| f.control);
            let frames = match first {
                Some(pb::receiver_frame::Control::Open(open)) => script(&open),
                Some(pb::receiver_frame::Control::Join(_)) => on_lane.as_ref().clone(),
                _ => return,
            };
            for frame in frames {
                let _ = tell.send(Ok(frame)).await;
                // What comes next may be meant as an answer.
                let _ = tokio::time::timeout(ANSWER, heard.message()).await;
            }
            // Listens to the end, as an honest sender would.
            while heard.message().await.is_ok_and(|frame| frame.is_some()) {}
        });
        let told = tokio_stream::wrappers::ReceiverStream::new(told);
        Ok(Response::new(Box::pin(told.map(|frame| frame))))
    }

    async fn list(
        &self,
        _: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Err(Status::unimplemented(""))
    }

    async fn discard(
        &self,
        _: Request<pb::DiscardRequest>,
    ) -> Result<Response<pb::DiscardResponse>, Status> {
        Err(Status::unimplemented(""))
    }
}

async fn lie(
    temp: &Path,
    script: impl Fn(&pb::PullOpen) -> Vec<pb::SenderFrame> + Send + Sync + 'static,
) -> Error {
    lie_on_lanes(temp, script, Vec::new()).await
}

async fn lie_on_lanes(
    temp: &Path,
    script: impl Fn(&pb::PullOpen) -> Vec<pb::SenderFrame> + Send + Sync + 'static,
    on_lane: Vec<pb::SenderFrame>,
) -> Error {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let liar = FerryServer::new(Liar {
        script: Arc::new(script),
        on_lane: Arc::new(on_lane),
    });
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener);
    let serving = tonic::transport::Server::builder()
        .add_service(liar)
        .serve_with_incoming(incoming);
    let serving = tokio::spawn(serving);
    let mut options = options();
    options.transfer.retries = 0;
    let client = Client::new(&address.to_string()).unwrap();
    let folder = temp.join("inner/here");
    let pulled = client.pull(&name("run"), &folder, options);
    let error = tokio::time::timeout(HANG, pulled)
        .await
        .unwrap()
        .unwrap_err();
    serving.abort();
    assert!(!folder.exists(), "{error:?}");
    let outside: Vec<_> = fs::read_dir(temp).unwrap().flatten().collect();
    assert!(
        outside.iter().all(|e| e.file_name() == "inner"),
        "{outside:?}"
    );
    error
}

/// An honest opening of this load, as an answer to what was asked.
fn opening(load: &Load, asked: &pb::PullOpen) -> pb::SenderOpen {
    let id = asked.transfer_id.to_vec().try_into().unwrap();
    load.open(&asked.checkpoint, id)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_lies_gets_nowhere() {
    let temp = tempfile::tempdir().unwrap();
    let load = || Load::of(vec![tensor("w", 3 * CHUNK)]);
    let whole = |open: pb::SenderOpen, load: &Load| {
        let chunks = (0..3).map(|cell| load.chunk(0, cell));
        let begin = [frame_open(open), load.announcement()];
        begin.into_iter().chain(chunks).collect::<Vec<_>>()
    };

    // Another transfer, another name, another kind of file than was asked for.
    let error = lie(temp.path(), move |asked| {
        let load = load();
        let open = pb::SenderOpen {
            transfer_id: vec![7; 16].into(),
            ..opening(&load, asked)
        };
        whole(open, &load)
    });
    assert!(error.await.to_string().contains("another checkpoint"));
    let error = lie(temp.path(), move |asked| {
        let load = load();
        let open = pb::SenderOpen {
            checkpoint: "other".to_owned(),
            ..opening(&load, asked)
        };
        whole(open, &load)
    });
    assert!(error.await.to_string().contains("another checkpoint"));
    let error = lie(temp.path(), move |asked| {
        let load = load();
        let open = pb::SenderOpen {
            out_format: pb::OutFormat::Safetensors.into(),
            container_header_len: 4096,
            ..opening(&load, asked)
        };
        whole(open, &load)
    });
    assert!(error.await.to_string().contains("another kind"));

    // A chunk with a wrong checksum is refused and comes no better.
    let error = lie(temp.path(), move |asked| {
        let load = load();
        let mut frames = whole(opening(&load, asked), &load);
        for frame in &mut frames[2..] {
            frame.chunks[0].crc32c ^= 1;
        }
        frames.push(frame_finish(load.finish()));
        frames
    });
    let error = error.await;
    let is_refusal = matches!(error, Error::Refused { reason, .. } if reason != Reason::Bug);
    assert!(is_refusal, "{error:?}");

    // A chunk that lies beyond its tensor, and one of a tensor that was never announced.
    for (offset, entry) in [(1u64 << 40, 0), (0, 9)] {
        let error = lie(temp.path(), move |asked| {
            let load = load();
            let mut frames = whole(opening(&load, asked), &load);
            frames[2].chunks[0].offset = offset;
            frames[2].chunks[0].entry = entry;
            frames
        });
        let error = error.await;
        let is_refusal = matches!(error, Error::Refused { reason, .. } if reason != Reason::Bug);
        assert!(is_refusal, "{error:?}");
    }

    // More than it promised, and sizes that nothing could hold.
    let error = lie(temp.path(), move |asked| {
        let load = load();
        let open = pb::SenderOpen {
            total_bytes: 1,
            ..opening(&load, asked)
        };
        whole(open, &load)
    });
    assert!(matches!(error.await, Error::Refused { .. }));
    let error = lie(temp.path(), move |asked| {
        let load = load();
        let open = pb::SenderOpen {
            total_bytes: u64::MAX / 2,
            ..opening(&load, asked)
        };
        whole(open, &load)
    });
    assert_eq!(error.await.code(), ErrorCode::NoSpace);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lane_that_was_offered_opens_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let victim = temp.path().join("inner/victim");
    fs::create_dir_all(&victim).unwrap();
    fs::write(victim.join("mine"), "").unwrap();
    let load = Load::of(vec![tensor("w", CHUNK)]);
    let open = pb::SenderOpen {
        overwrite: true,
        restart: true,
        ..load.open("planted", [7; 16])
    };
    let on_lane = vec![
        frame_open(open),
        load.announcement(),
        load.chunk(0, 0),
        frame_finish(load.finish()),
    ];
    // On the control lane it says nothing until the others had their time.
    let script = |asked: &pb::PullOpen| {
        std::thread::sleep(Duration::from_millis(1500));
        let load = Load::of(vec![tensor("w", CHUNK)]);
        let open = pb::SenderOpen {
            checkpoint: "other".to_owned(),
            ..opening(&load, asked)
        };
        vec![frame_open(open)]
    };
    lie_on_lanes(temp.path(), script, on_lane).await;
    assert!(!temp.path().join("inner/planted").exists());
    assert!(victim.join("mine").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pull_that_was_dropped_lets_go_of_its_name() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    let relay = relay::start_back(server.address, LARGE / 2, Then::Stall);
    let folder = temp.path().join("here");
    let client = Client::new(&relay.to_string()).unwrap();
    let transfer = client.pull(&name("run"), &folder, options());
    while transfer.progress().durable_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    drop(transfer);
    let report = client.pull(&name("run"), &folder, options()).await.unwrap();
    assert!(report.resumed_bytes > 0, "{report:?}");
    assert!(report.wire_bytes >= report.bytes - report.resumed_bytes);
    assert_landed(&folder, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn names_from_a_server_stay_in_the_folder() {
    let temp = tempfile::tempdir().unwrap();
    for bad in ["../../escaped", "/escaped", "..", "a\0b"] {
        let error = lie(temp.path(), move |asked| {
            let load = Load::of(vec![tensor_with("w", noise("x", CHUNK))]);
            let mut announcement = load.announcement();
            announcement.entries[0].name = bad.to_owned();
            let finish = frame_finish(load.finish());
            vec![
                frame_open(opening(&load, asked)),
                announcement,
                load.chunk(0, 0),
                finish,
            ]
        });
        // Made harmless or refused; and the digest of all names fits no more.
        assert!(matches!(error.await, Error::Refused { .. }));
        assert!(!Path::new("/escaped.npy").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stops_lets_a_pull_go_on_later() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("root");
    let server = TestServer::start(&root).await;
    publish(&server, temp.path(), "a", false).await;
    let address = server.address;
    let folder = temp.path().join("here");
    let client = server.client();
    let mut slow = options();
    slow.transfer.rate_limit = RateLimit::BytesPerSecond(LARGE as u64 / 2);
    let transfer = client.pull(&name("run"), &folder, slow);
    let watcher = transfer.watcher();
    while watcher.progress().durable_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    server.stop().await;
    let server = TestServer::start_at(&root, address).await;
    transfer.await.unwrap();
    assert_eq!(watcher.progress().stage, Stage::Done);
    assert!(watcher.progress().session_count > 1);
    assert_landed(&folder, "a");
    server.stop().await;
}

/// What a receiver by hand says on one call, each after an answer or a moment; how the
/// server ends that.
async fn say(server: &TestServer, frames: Vec<pb::ReceiverFrame>) -> Result<(), Status> {
    let (tell, told) = tokio::sync::mpsc::channel(4);
    let told = tokio_stream::wrappers::ReceiverStream::new(told);
    let answers = server.ferry().await.pull(told).await;
    let mut answers = answers?.into_inner();
    for frame in frames {
        let _ = tell.send(frame).await;
        if let Ok(answer) = tokio::time::timeout(ANSWER, answers.message()).await {
            answer?;
        }
    }
    drop(tell);
    // However much it still sends, it comes to an end.
    let end = async {
        while answers.message().await?.is_some() {}
        Ok(())
    };
    tokio::time::timeout(HANG, end).await.unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_receiver_that_lies_harms_nobody() {
    use pb::receiver_frame::Control;
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    publish(&server, temp.path(), "a", false).await;
    let control = |control| pb::ReceiverFrame {
        control: Some(control),
        ..Default::default()
    };
    let open = |name: &str, token: u8| {
        control(Control::Open(pb::PullOpen {
            protocol_version: 1,
            checkpoint: name.to_owned(),
            transfer_id: vec![1; 16].into(),
            codecs: 1,
            lane_token: vec![token; 16].into(),
            ..Default::default()
        }))
    };
    let accept = |chunk_len, codecs| {
        control(Control::Accept(pb::Accept {
            protocol_version: 1,
            chunk_len,
            codecs,
            durability: pb::Durability::Disk.into(),
            window_bytes: u64::MAX,
            session_token: vec![2; 16].into(),
            epoch: 1,
            max_lanes: u32::MAX,
            durable_bytes: u64::MAX,
        }))
    };
    let wanted = |entry, first, count| pb::ReceiverFrame {
        wanted: vec![pb::Wanted {
            entry,
            wanted: vec![pb::CellRange { first, count }],
            held: Vec::new(),
            last: true,
        }],
        ..Default::default()
    };
    let ack = |settled_count| pb::ReceiverFrame {
        ack: Some(pb::Ack { settled_count }),
        ..Default::default()
    };
    let done = control(Control::Done(pb::Done {
        manifest_blake3: vec![0; 32].into(),
        durability: pb::Durability::Disk.into(),
        ..Default::default()
    }));
    let chunk_len = CHUNK as u32;
    let lies: Vec<Vec<pb::ReceiverFrame>> = vec![
        vec![pb::ReceiverFrame::default()],
        vec![accept(chunk_len, 1)],
        vec![open("../run", 1)],
        vec![open("run", 1), open("run", 2)],
        vec![open("run", 1), accept(3, 1)],
        vec![open("run", 1), accept(u32::MAX, 1)],
        vec![open("run", 1), accept(chunk_len, 0)],
        vec![open("run", 1), accept(chunk_len, 1), wanted(0, 1 << 40, 1)],
        vec![open("run", 1), accept(chunk_len, 1), wanted(9999, 0, 1)],
        vec![open("run", 1), accept(chunk_len, 1), wanted(0, 0, u64::MAX)],
        vec![open("run", 1), accept(chunk_len, 1), ack(u64::MAX)],
        vec![open("run", 1), ack(1)],
    ];
    for (i, frames) in lies.into_iter().enumerate() {
        let ended = say(&server, frames).await;
        assert!(ended.is_err(), "lie {i} was believed");
    }
    // Whoever says that it has everything is told nothing more, and that is all.
    let _ = say(&server, vec![open("run", 1), done]).await;
    let folder = temp.path().join("here");
    pull(server.address, &folder).await.unwrap();
    assert_landed(&folder, "a");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_in_memory_is_pulled_as_it_is_at_that_moment() {
    let temp = tempfile::tempdir().unwrap();
    let state = Arc::new(std::sync::Mutex::new(1u8));
    let (now, taken) = (Arc::clone(&state), Arc::new(AtomicU64::new(0)));
    let count = Arc::clone(&taken);
    let snapshot = move |filter: &NameFilter| {
        let value = *now.lock().unwrap();
        let source = GrowingSource::new()?;
        for (name, len) in [("a/w", LARGE), ("a/b", 3), ("b/w", 0)] {
            if filter.takes(name) {
                count.fetch_add(len as u64, Ordering::Relaxed);
                let header = EntryHeader::tensor(name, Dtype::U8, &[len as u64])?;
                source.add(header, vec![value; len].into())?;
            }
        }
        Ok(source)
    };
    let root = temp.path().join("root");
    let server =
        TestServer::with(&root, |builder| builder.export_with(name("run"), snapshot)).await;
    let folder = temp.path().join("here");
    let landed = |folder: &Path, name: &str| {
        let tensor = Checkpoint::open(folder).unwrap().tensor(name).unwrap();
        tensor.map(|tensor| tensor.bytes().to_vec())
    };
    let report = pull(server.address, &folder).await.unwrap();
    assert_eq!((report.tensor_count, report.bytes), (3, LARGE as u64 + 3));
    assert!(landed(&folder, "a/w") == Some(vec![1; LARGE]));

    // Another state under the same name, and only a part of it.
    *state.lock().unwrap() = 2;
    taken.store(0, Ordering::Relaxed);
    let mut part = options();
    (part.include, part.exclude) = (vec!["a/*".to_owned()], vec!["*/w".to_owned()]);
    part.transfer.overwrite = true;
    let report = server.client().pull(&name("run"), &folder, part).await;
    assert_eq!(report.unwrap().tensor_count, 1);
    assert_eq!(landed(&folder, "a/b"), Some(vec![2; 3]));
    assert_eq!(landed(&folder, "a/w"), None);
    assert_eq!(
        taken.load(Ordering::Relaxed),
        3,
        "more was copied than was asked for"
    );

    // What nobody offers, and what does not fit.
    for (include, first, out_format, max_bytes) in [
        ("c/*", "", OutFormat::Npy, None),
        ("*", "c", OutFormat::Npy, None),
        ("*", "", OutFormat::Safetensors, None),
        ("*", "", OutFormat::Npy, Some(LARGE as u64)),
    ] {
        let mut refused = options();
        refused.include = vec![include.to_owned()];
        refused
            .transfer
            .first
            .extend((!first.is_empty()).then(|| first.to_owned()));
        (refused.transfer.out_format, refused.max_bytes) = (out_format, max_bytes);
        let folder = temp.path().join("refused");
        let result = server.client().pull(&name("run"), &folder, refused).await;
        assert!(
            result.is_err(),
            "{include} {first} {out_format:?} {max_bytes:?}"
        );
        assert!(!folder.exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_name_of_an_export_means_one_thing() {
    let temp = tempfile::tempdir().unwrap();
    let model = temp.path().join("model.npy");
    fs::write(&model, &files("a")["large.npy"]).unwrap();
    let root = temp.path().join("root");
    let server = TestServer::with(&root, |b| b.export(name("live"), &model)).await;
    let source = SourceSet::open(&[&model], &SourceOptions::default()).unwrap();
    let client = server.client();
    let push = client.push(source.clone(), &name("live"), PushOptions::default());
    let refused = push.await.unwrap_err();
    assert_eq!(refused.code(), ErrorCode::Exists, "{refused}");
    let rows = client.list("").await.unwrap();
    let row = rows.iter().find(|row| row.name == "live").unwrap();
    assert!(row.offered && !row.published);
    assert_eq!((row.entry_count, row.total_bytes), (1, LARGE as u64));
    let unknown = client.describe(&name("live")).await.unwrap_err();
    assert!(unknown.to_string().contains("pull it"), "{unknown}");
    let push = client.push(source, &name("taken"), PushOptions::default());
    push.await.unwrap();
    server.stop().await;

    let bind = async |exports: &[(&str, &Path)]| {
        let mut builder = tensorferry::Server::builder(&root);
        for (export, path) in exports {
            builder = builder.export(name(export), *path);
        }
        builder.bind(([127, 0, 0, 1], 0).into()).await.unwrap_err()
    };
    let absent = temp.path().join("absent.npy");
    let missing = bind(&[("x", &absent)]).await;
    assert_eq!(missing.code(), ErrorCode::SourceMissing, "{missing}");
    let twice = bind(&[("x", &model), ("x", &model)]).await;
    assert_eq!(twice.code(), ErrorCode::Usage, "{twice}");
    let taken = bind(&[("taken", &model)]).await;
    assert!(taken.to_string().contains("taken"), "{taken}");
}
