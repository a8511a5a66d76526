use super::*;
use crate::{
    BUDGET_BYTES_DEFAULT, Checkpoint, Client, PushOptions, Server,
    format::{checksum, npy},
    source::SourceSet,
    wire::{encode_message, frame_head, pb, reason_of},
};
use bytes::Bytes;
use http_body::Frame;
use std::{
    future::IntoFuture,
    path::Path,
    sync::{Arc, Mutex},
    thread::ThreadId,
    time::Duration,
};
use tokio::{
    sync::{mpsc, oneshot},
    time::timeout,
};
use tonic::{Code, Streaming};

/// Nothing here may take this long; only a hang does.
const HANG: Duration = Duration::from_secs(60);
const CELL: usize = 256 << 10;

/// The body of a request whose connection panics where the test wants it.
struct Scripted(mpsc::UnboundedReceiver<Option<Bytes>>);

impl http_body::Body for Scripted {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        self.0.poll_recv(cx).map(|item| {
            let bytes = item.map(|bytes| bytes.unwrap_or_else(|| panic!("a body that panics")));
            bytes.map(|bytes| Ok(Frame::data(bytes)))
        })
    }
}

/// Payload that panics in whichever job lets go of it last.
struct Explosive {
    bytes: Vec<u8>,
    dropped_by: Arc<Mutex<Option<ThreadId>>>,
}

impl AsRef<[u8]> for Explosive {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Explosive {
    fn drop(&mut self) {
        *self.dropped_by.lock().unwrap() = Some(std::thread::current().id());
        panic!("a payload that panics when it is dropped");
    }
}

/// A session that panics at some point, fed straight into the service.
struct Victim {
    feed: mpsc::UnboundedSender<Option<Bytes>>,
    answers: Streaming<pb::ReceiverFrame>,
}

impl Victim {
    async fn call(service: &FerryService) -> Victim {
        let (feed, script) = mpsc::unbounded_channel();
        let mut request = Request::new(Body::new(Scripted(script)));
        *request.uri_mut() = http::Uri::from_static(PUSH_PATH);
        let response = service.clone().call(request).await.unwrap();
        let decoder = tonic_prost::ProstDecoder::default();
        let code = response.status();
        let answers = Streaming::new_response(decoder, response.into_body(), code, None, None);
        Victim { feed, answers }
    }

    fn send(&self, bytes: impl Into<Option<Bytes>>) {
        self.feed.send(bytes.into()).unwrap();
    }

    fn open(&self) {
        let open = pb::SenderOpen {
            protocol_version: 1,
            checkpoint: "victim".to_owned(),
            transfer_id: vec![7; 16].into(),
            codecs: 1,
            chunk_len: CELL as u32,
            commit_mode: pb::CommitMode::Group.into(),
            layout: pb::Layout::Named.into(),
            out_format: pb::OutFormat::Npy.into(),
            container_header_len: 0,
            npy_dtype: 0,
            source_format: "npy".to_owned(),
            ..Default::default()
        };
        self.control(pb::sender_frame::Control::Open(open));
    }

    fn control(&self, control: pb::sender_frame::Control) {
        self.send(encode_message(&pb::SenderFrame {
            control: Some(control),
            ..Default::default()
        }));
    }

    /// Announces a blob of one cell and waits until it is wanted.
    async fn announce(&mut self) {
        self.send(encode_message(&pb::SenderFrame {
            entries: vec![pb::Entry {
                name: "blob".to_owned(),
                kind: pb::EntryKind::Blob.into(),
                byte_len: CELL as u64,
                ..Default::default()
            }],
            ..Default::default()
        }));
        while self.answer().await.unwrap().wanted.is_empty() {}
    }

    /// Sends the cell as payload that panics; says who dropped it, once it is.
    fn explode(&self, crc32c: u32) -> Arc<Mutex<Option<ThreadId>>> {
        let head = pb::SenderFrame {
            chunks: vec![pb::ChunkHead {
                raw_len: CELL as u32,
                encoded_len: CELL as u32,
                crc32c,
                ..Default::default()
            }],
            ..Default::default()
        };
        self.send(frame_head(&head, CELL));
        let dropped_by = Arc::new(Mutex::new(None));
        self.send(Bytes::from_owner(Explosive {
            bytes: vec![9; CELL],
            dropped_by: Arc::clone(&dropped_by),
        }));
        dropped_by
    }

    async fn answer(&mut self) -> Result<pb::ReceiverFrame, Status> {
        let answer = timeout(HANG, self.answers.message()).await.unwrap();
        answer.map(|frame| frame.expect("the session goes on"))
    }

    /// The session ends with the reason of what cannot happen.
    async fn ends_as_bug(mut self) {
        let status = loop {
            if let Err(status) = self.answer().await {
                break status;
            }
        };
        assert_eq!(
            (status.code(), reason_of(&status)),
            (Code::Internal, Some(Reason::Bug)),
            "{status:?}"
        );
    }
}

fn write_source(dir: &Path) -> SourceSet {
    let path = dir.join("w.npy");
    let header = npy::encode_header("|u1", false, &[3 * CELL as u64]);
    std::fs::write(&path, [header, vec![1; 3 * CELL]].concat()).unwrap();
    SourceSet::open(&[path], &Default::default()).unwrap()
}

#[tokio::test]
async fn a_panic_in_a_session_ends_that_session_and_nothing_else() {
    let temp = tempfile::tempdir().unwrap();
    let root = temp.path().join("root");
    let address = ([127, 0, 0, 1], 0).into();
    let server = Server::builder(&root).bind(address).await.unwrap();
    let context = server.context.clone();
    let client = Client::new(&server.local_addr().to_string()).unwrap();
    // Sessions of this service and of the server share everything.
    let service = FerryService::new(context.clone(), None, None);
    let (stop, stopped) = oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async {
        let _ = stopped.await;
    }));
    let right_crc = checksum::crc32c(&[9; CELL]);

    // A session of somebody else that is open all the while.
    let mut bystander = Victim::call(&service).await;
    bystander.control(pb::sender_frame::Control::Open(pb::SenderOpen {
        protocol_version: 1,
        checkpoint: "bystander".to_owned(),
        transfer_id: vec![8; 16].into(),
        codecs: 1,
        source_format: "npy".to_owned(),
        ..Default::default()
    }));
    bystander.answer().await.unwrap();

    // In the session's own task, before it is opened.
    let victim = Victim::call(&service).await;
    victim.send(None);
    victim.ends_as_bug().await;
    // In the task that reads its lane.
    let mut victim = Victim::call(&service).await;
    victim.open();
    victim.answer().await.unwrap();
    victim.send(None);
    victim.ends_as_bug().await;
    // In a job: on an I/O thread once the cell is written, on a CPU worker when its
    // checksum is wrong.
    for crc32c in [right_crc, !right_crc] {
        let mut victim = Victim::call(&service).await;
        victim.open();
        victim.announce().await;
        let dropped_by = victim.explode(crc32c);
        victim.ends_as_bug().await;
        let dropped_by = dropped_by.lock().unwrap().expect("it was dropped");
        assert_ne!(dropped_by, std::thread::current().id());
    }

    // The other session was not disturbed, and the server takes the same name.
    bystander.announce().await;
    let source = write_source(temp.path());
    let options = PushOptions {
        restart: true,
        codec: crate::CodecChoice::None,
        ..PushOptions::default()
    };
    let pushing = client.push(source, &"victim".parse().unwrap(), options);
    let report = timeout(HANG, pushing.into_future()).await.unwrap().unwrap();
    assert_eq!(report.wire_bytes, 3 * CELL as u64);
    let landed = Checkpoint::open(root.join("victim")).unwrap();
    assert!(landed.verify(|_| {}).unwrap().damages.is_empty());
    // Nothing of the memory was lost with the sessions.
    drop(context.budget.reserve(BUDGET_BYTES_DEFAULT).await);
    drop(bystander);
    stop.send(()).unwrap();
    timeout(HANG, serving).await.unwrap().unwrap().unwrap();
}
