//! The roles swapped: what the oracle takes for a server is a crowd of `pull` processes.
//!
//! `faults turned BINARY serve ROOT --listen ADDRESS` says that it listens, as a server
//! does. Each push that comes in is given to a `pull` of the real program: that dials this
//! process, asks for the checkpoint, and gets the frames of the oracle as those of its
//! server; what it answers goes to the oracle. Nothing is looked at on the way but how a
//! call begins and ends. So every scenario that strikes a server strikes a client that
//! receives, and the oracle judges its disk and its promises as those of a server.
//!
//! Clients that end by a signal take this process with them, as a server would have died.

use std::{
    collections::HashMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    pin::Pin,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tensorferry::wire::pb::{
    self,
    ferry_server::{Ferry, FerryServer},
    receiver_frame::Control as Answer,
    sender_frame::Control as Word,
};
use tokio::{
    net::TcpListener,
    sync::{mpsc, oneshot},
};
use tokio_stream::{Stream, wrappers::TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;

/// The switch, and the sign for what runs beneath.
pub(crate) const TURNED: &str = "TENSORFERRY_TURNED";
/// A client that does not ask by then will not.
const PATIENCE: Duration = Duration::from_secs(30);
const MAX_MESSAGE_BYTES: usize = 16 << 20;

/// Whether servers are clients that pull.
pub(crate) fn is_turned() -> bool {
    std::env::var_os(TURNED).is_some_and(|value| value == "1")
}

/// One call of a client that pulls.
struct Pulling {
    open: pb::PullOpen,
    frames: Streaming<pb::ReceiverFrame>,
    out: mpsc::Sender<Result<pb::SenderFrame, Status>>,
}

type Lane = (
    Streaming<pb::ReceiverFrame>,
    mpsc::Sender<Result<pb::SenderFrame, Status>>,
);

/// Further lanes of one pull, from those who offer them to those who take them.
#[derive(Clone)]
struct Offers {
    give: mpsc::Sender<Lane>,
    take: Arc<tokio::sync::Mutex<mpsc::Receiver<Lane>>>,
}

#[derive(Default)]
struct Crowd {
    /// Pushes that wait for their client, by name.
    awaited: Mutex<HashMap<String, oneshot::Sender<Pulling>>>,
    by_lane_token: Mutex<HashMap<Vec<u8>, Offers>>,
    by_session_token: Mutex<HashMap<Vec<u8>, Offers>>,
    /// One client at a time for each name.
    names: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
}

#[derive(Clone)]
struct Turned {
    binary: PathBuf,
    root: PathBuf,
    /// Where clients dial: the same for the same root, as it stands for the transfer.
    dialled: SocketAddr,
    options: Vec<String>,
    crowd: Arc<Crowd>,
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs until it is told to stop. `words` = what stands behind `turned`.
pub(crate) fn serve(mut words: impl Iterator<Item = String>) -> Result<(), String> {
    let binary = PathBuf::from(words.next().ok_or("no binary")?);
    if words.next().as_deref() != Some("serve") {
        return Err("only serve can be turned".to_owned());
    }
    let root = PathBuf::from(words.next().ok_or("no root")?);
    if words.next().as_deref() != Some("--listen") {
        return Err("no --listen".to_owned());
    }
    let listen: SocketAddr = words
        .next()
        .and_then(|word| word.parse().ok())
        .ok_or("no address to listen on")?;
    std::fs::create_dir_all(&root).map_err(|e| e.to_string())?;
    let hash = blake3::hash(root.as_os_str().as_encoded_bytes());
    let [a, b, c, ..] = *hash.as_bytes();
    let dialled = SocketAddr::from((Ipv4Addr::new(127, a, b, c.clamp(2, 250)), 7744));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .map_err(|e| e.to_string())?;
    let turned = Turned {
        binary,
        root,
        dialled,
        options: words.collect(),
        crowd: Arc::default(),
    };
    runtime.block_on(run(turned, listen))
}

async fn run(turned: Turned, listen: SocketAddr) -> Result<(), String> {
    let bind = async |address: SocketAddr| {
        let listener = TcpListener::bind(address).await;
        listener.map_err(|e| format!("{address}: {e}"))
    };
    let (outer, inner) = (bind(listen).await?, bind(turned.dialled).await?);
    let address = outer.local_addr().map_err(|e| e.to_string())?;
    let mut stop = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())
        .map_err(|e| e.to_string())?;
    println!("listening on {address}");
    for listener in [outer, inner] {
        let service = FerryServer::new(turned.clone())
            .max_decoding_message_size(MAX_MESSAGE_BYTES)
            .max_encoding_message_size(MAX_MESSAGE_BYTES);
        let serving = tonic::transport::Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(serving);
    }
    stop.recv().await;
    // The clients have the same signal and end in good order.
    let names: Vec<_> = lock(&turned.crowd.names).values().cloned().collect();
    for name in names {
        let _gone = name.lock().await;
    }
    Ok(())
}

impl Turned {
    fn folder(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// The client that receives this push.
    fn client(&self, open: &pb::SenderOpen) -> Command {
        let mode = match open.commit_mode() {
            pb::CommitMode::Strict => "strict",
            pb::CommitMode::End => "end",
            pb::CommitMode::None => "none",
            _ => "group",
        };
        let mut command = Command::new(&self.binary);
        command
            .arg("pull")
            .arg(format!("ferry://{}/{}", self.dialled, open.checkpoint))
            .arg(self.folder(&open.checkpoint))
            .args(["--format", "json", "--retries", "0", "--durability", mode])
            .args(["--chunk", &open.chunk_len.to_string()])
            .args(open.overwrite.then_some("--overwrite"))
            .args(open.verify.then_some("--verify"))
            .args(open.restart.then_some("--restart"))
            .args(&self.options)
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        if open.out_format() == pb::OutFormat::Safetensors {
            command.args(["--out-format", "safetensors"]);
        }
        command
    }

    /// One push and the client that receives it, to the end of both.
    async fn push(
        self,
        open: pb::SenderOpen,
        frames: Streaming<pb::SenderFrame>,
        out: mpsc::Sender<Result<pb::ReceiverFrame, Status>>,
    ) {
        let name = open.checkpoint.clone();
        let turn = Arc::clone(lock(&self.crowd.names).entry(name.clone()).or_default());
        let _turn = turn.lock().await;
        let (tell, told) = oneshot::channel();
        lock(&self.crowd.awaited).insert(name, tell);
        let mut client = match self.client(&open).spawn() {
            Ok(client) => client,
            Err(error) => {
                let _ = out.send(Err(Status::internal(error.to_string()))).await;
                return;
            }
        };
        let pulling = tokio::select! {
            pulling = tokio::time::timeout(PATIENCE, told) => pulling.ok().and_then(Result::ok),
            ended = end_of(&mut client) => {
                let _ = out.send(Err(status_of(ended))).await;
                return;
            }
        };
        let Some(pulling) = pulling else {
            let _ = out
                .send(Err(Status::deadline_exceeded("no client asks")))
                .await;
            return;
        };
        let Pulling {
            open: wanted,
            frames: answers,
            out: to_client,
        } = pulling;
        let (give, take) = mpsc::channel(16);
        let take = Arc::new(tokio::sync::Mutex::new(take));
        let offers = Offers { give, take };
        lock(&self.crowd.by_lane_token).insert(wanted.lane_token.to_vec(), offers.clone());
        let open = pb::SenderOpen {
            transfer_id: wanted.transfer_id,
            ..open
        };
        let first = pb::SenderFrame {
            control: Some(Word::Open(open)),
            ..Default::default()
        };
        let _ = to_client.send(Ok(first)).await;
        let forwarding = tokio::spawn(forward(frames, to_client));
        let said = self.back(answers, &out, Some(&offers)).await;
        // A server ends the call when it has heard the last word, and the client waits for that.
        forwarding.abort();
        let ended = status_of(end_of(&mut client).await);
        let end = match said {
            Last::Done => return,
            Last::Abort(abort) => refusal(&abort),
            Last::Nothing => ended,
        };
        let _ = out.send(Err(end)).await;
    }

    /// Hands over what a client says, but for a refusal, which a server puts into the end of
    /// the call.
    async fn back(
        &self,
        mut answers: Streaming<pb::ReceiverFrame>,
        out: &mpsc::Sender<Result<pb::ReceiverFrame, Status>>,
        offers: Option<&Offers>,
    ) -> Last {
        while let Ok(Some(frame)) = answers.message().await {
            if let Some(Answer::Abort(abort)) = frame.control {
                return Last::Abort(abort);
            }
            let is_done = matches!(frame.control, Some(Answer::Done(_)));
            if let (Some(Answer::Accept(accept)), Some(offers)) = (&frame.control, offers) {
                let token = accept.session_token.to_vec();
                lock(&self.crowd.by_session_token).insert(token, offers.clone());
            }
            let _ = out.send(Ok(frame)).await;
            if is_done {
                return Last::Done;
            }
        }
        Last::Nothing
    }

    /// A further lane of a push, over one that its client offers.
    async fn lane(
        self,
        join: pb::Join,
        frames: Streaming<pb::SenderFrame>,
        out: mpsc::Sender<Result<pb::ReceiverFrame, Status>>,
    ) {
        let offers = lock(&self.crowd.by_session_token)
            .get(&join.session_token.to_vec())
            .cloned();
        let Some(offers) = offers else {
            let _ = out.send(Err(Status::not_found("no such session"))).await;
            return;
        };
        let taken = async { offers.take.lock().await.recv().await };
        let Ok(Some((answers, to_client))) = tokio::time::timeout(PATIENCE, taken).await else {
            let _ = out
                .send(Err(Status::unavailable("no lane is offered")))
                .await;
            return;
        };
        let first = pb::SenderFrame {
            control: Some(Word::Join(join)),
            ..Default::default()
        };
        let _ = to_client.send(Ok(first)).await;
        let forwarding = tokio::spawn(forward(frames, to_client));
        self.back(answers, &out, None).await;
        forwarding.abort();
        let _ = out.send(Err(Status::unavailable("the lane ended"))).await;
    }
}

/// Hands over what the oracle says, and that its connection broke.
async fn forward(
    mut frames: Streaming<pb::SenderFrame>,
    to_client: mpsc::Sender<Result<pb::SenderFrame, Status>>,
) {
    loop {
        match frames.message().await {
            Ok(Some(frame)) => {
                if to_client.send(Ok(frame)).await.is_err() {
                    return;
                }
            }
            Ok(None) => return,
            Err(_) => {
                let gone = Status::unavailable("the connection of the oracle broke");
                let _ = to_client.send(Err(gone)).await;
                return;
            }
        }
    }
}

/// Waits for the end of a client.
async fn end_of(client: &mut Child) -> std::io::Result<ExitStatus> {
    loop {
        match client.try_wait() {
            Ok(Some(status)) => return Ok(status),
            Ok(None) => tokio::time::sleep(Duration::from_millis(2)).await,
            Err(error) => return Err(error),
        }
    }
}

/// What a client says in the end.
enum Last {
    Done,
    Abort(pb::Abort),
    Nothing,
}

fn refuse(code: Code, reason: &str, message: String) -> Status {
    let mut details = tonic_types::ErrorDetails::new();
    details.set_error_info(reason, "tensorferry", HashMap::new());
    Status::with_error_details(code, message, details)
}

/// As the server of a push says it.
fn refusal(abort: &pb::Abort) -> Status {
    let code = match abort.reason.as_str() {
        "STORAGE_IO_ERROR" | "SOURCE_IO_ERROR" | "BUG" => Code::Internal,
        "TOO_LARGE" | "TOO_MANY" | "DISK_QUOTA" => Code::ResourceExhausted,
        "BAD_RANGE" => Code::OutOfRange,
        "CHECKSUM" => Code::DataLoss,
        "EXISTS" => Code::AlreadyExists,
        "NOT_FOUND" => Code::NotFound,
        "UNSUPPORTED" => Code::Unimplemented,
        "INTERRUPTED" => Code::Cancelled,
        "IDLE" => Code::DeadlineExceeded,
        "SUPERSEDED" | "SOURCE_CHANGED" => Code::Aborted,
        "LOCKED" | "UNSAFE_PATH" | "VERSION" | "MANIFEST_MISMATCH" => Code::FailedPrecondition,
        _ => Code::InvalidArgument,
    };
    refuse(code, &abort.reason, abort.message.clone())
}

/// How a client's end looks to the sender.
fn status_of(ended: std::io::Result<ExitStatus>) -> Status {
    use std::os::unix::process::ExitStatusExt;
    let ended = match ended {
        Ok(ended) => ended,
        Err(error) => return Status::internal(error.to_string()),
    };
    if let Some(signal) = ended.signal() {
        // As a server that dies: nobody is told anything any more.
        println!("a pull died of signal {signal}");
        std::process::exit(128 + signal);
    }
    let refuse = |code, reason: &str| refuse(code, reason, format!("a pull ended with {ended}"));
    match ended.code() {
        // Its server, which is the oracle, was gone; or somebody stopped it.
        Some(5 | 130) => Status::unavailable("a pull lost its connection"),
        Some(1) => refuse(Code::Internal, "STORAGE_IO_ERROR"),
        Some(6) => refuse(Code::DataLoss, "CHECKSUM"),
        Some(8) => refuse(Code::ResourceExhausted, "DISK_QUOTA"),
        Some(9) => refuse(Code::AlreadyExists, "EXISTS"),
        Some(11) => refuse(Code::FailedPrecondition, "LOCKED"),
        code => refuse(Code::Unknown, &format!("EXIT_{code:?}")),
    }
}

type FrameStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn stream<T: Send + 'static>(frames: mpsc::Receiver<Result<T, Status>>) -> FrameStream<T> {
    Box::pin(tokio_stream::wrappers::ReceiverStream::new(frames))
}

#[tonic::async_trait]
impl Ferry for Turned {
    type PushStream = FrameStream<pb::ReceiverFrame>;
    type PullStream = FrameStream<pb::SenderFrame>;

    async fn push(
        &self,
        request: Request<Streaming<pb::SenderFrame>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        let mut frames = request.into_inner();
        let (out, answers) = mpsc::channel(4);
        let turned = self.clone();
        tokio::spawn(async move {
            let first = frames.message().await.ok().flatten();
            match first.and_then(|frame| frame.control) {
                Some(Word::Open(open)) => turned.push(open, frames, out).await,
                Some(Word::Join(join)) => turned.lane(join, frames, out).await,
                _ => {
                    let bad = Status::invalid_argument("neither open nor join");
                    let _ = out.send(Err(bad)).await;
                }
            }
        });
        Ok(Response::new(stream(answers)))
    }

    async fn pull(
        &self,
        request: Request<Streaming<pb::ReceiverFrame>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        let mut frames = request.into_inner();
        let (out, words) = mpsc::channel(4);
        let crowd = Arc::clone(&self.crowd);
        tokio::spawn(async move {
            let first = frames.message().await.ok().flatten();
            match first.and_then(|frame| frame.control) {
                Some(Answer::Open(open)) => {
                    let awaited = lock(&crowd.awaited).remove(&open.checkpoint);
                    if let Some(awaited) = awaited {
                        let _ = awaited.send(Pulling { open, frames, out });
                    }
                }
                Some(Answer::Join(join)) => {
                    let offers = lock(&crowd.by_lane_token)
                        .get(&join.session_token.to_vec())
                        .cloned();
                    if let Some(offers) = offers {
                        let _ = offers.give.send((frames, out)).await;
                    }
                }
                _ => {}
            }
        });
        Ok(Response::new(stream(words)))
    }

    async fn list(
        &self,
        _: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        Err(Status::unimplemented("a client lists nothing"))
    }

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        Err(Status::unimplemented("a client describes nothing"))
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Err(Status::unimplemented("a client has no status"))
    }

    async fn discard(
        &self,
        request: Request<pb::DiscardRequest>,
    ) -> Result<Response<pb::DiscardResponse>, Status> {
        // Nobody else than whoever has the folder can.
        let name = request.into_inner().checkpoint;
        let folder = self.folder(&name);
        let turn = Arc::clone(lock(&self.crowd.names).entry(name).or_default());
        let _turn = turn.lock().await;
        let discarded = tokio::task::spawn_blocking(move || tensorferry::discard_folder(&folder));
        let discarded = discarded
            .await
            .map_err(|e| Status::internal(e.to_string()))?;
        let discarded = discarded.map_err(|e| Status::internal(e.to_string()))?;
        Ok(Response::new(pb::DiscardResponse {
            existed: discarded.is_some(),
            discarded_bytes: discarded.unwrap_or(0),
        }))
    }
}

/// Where the unfinished transfer of a name lies: beside the folder that it becomes.
pub(crate) fn staging(root: &Path, name: &str) -> PathBuf {
    let (parent, last) = name.rsplit_once('/').unwrap_or(("", name));
    let hash = blake3::hash(last.as_bytes()).to_hex();
    root.join(parent)
        .join(".tensorferry/transfers")
        .join(&hash[..16])
}
