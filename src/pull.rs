//! Pull: the receiver dials. It takes in what a server sends with the very code by which
//! a server takes in a push, and trusts the server no more than that one trusts a client.

use crate::{
    attempts::Attempts,
    checkpoint::{landing_place, local_target},
    client::{Client, is_retryable},
    error::Error,
    opening::machine_id,
    options::{BUDGET_BYTES_MIN, CHUNKS_PER_LANE, LANES_MAX, Lanes, PushOptions, RateLimit},
    plan::{CHUNK_LEN_DEFAULT, CheckpointName, Digest16, first_16},
    protocol::{
        Abort, Done, Layout, NpyDtype, Open, OutFormat, ProtocolError, PullFirst, PullOpen, Reason,
        ReceiverControl, ReceiverFrame,
    },
    ready::OnReady,
    server::{Receiving, Server},
    session::{
        ProgressCell, ReceiveContext, SendError, SessionError, Stage, Task, Terms, cancelled,
        receive, status_error,
    },
    store::{Catalog, Manifest, StoreError, WriteMode},
    transfer::{Transfer, TransferReport},
    wire::{LaneSender, PULL_PATH, encode_message, encode_pull_first, encode_receiver_frame},
};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use std::{
    future::poll_fn,
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};
use tokio::{sync::watch, task::JoinSet, time::timeout};
use tonic::{Status, body::Body, transport::Channel};

/// Lanes that are offered when the user leaves their number open.
const AUTO_LANES: u32 = 4;
/// A server that opens a large checkpoint may need some time before it speaks.
pub(crate) const OPEN_TIMEOUT: Duration = Duration::from_secs(60);
/// After the end the server has this long to end the call.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause before a lane is offered again, and before the next attempt at first.
const PAUSE: Duration = Duration::from_millis(200);
/// A pull that was dropped lets go of its name within this time.
const LOCK_PATIENCE: Duration = Duration::from_secs(2);
/// Longest pause between attempts.
const MAX_PAUSE: Duration = Duration::from_secs(10);

/// How a checkpoint is pulled.
///
/// ```
/// use tensorferry::PullOptions;
///
/// let mut options = PullOptions::default();
/// options.include = vec!["decoder/*".to_owned()];
/// options.transfer.overwrite = true;
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct PullOptions {
    /// How it travels and what it becomes, as in a push. How the source is read is the
    /// server's affair; a rate is a number of bytes here, not a file.
    pub transfer: PushOptions,
    /// Take only tensors with names like one of these; all when there are none.
    pub include: Vec<String>,
    /// Leave these out.
    pub exclude: Vec<String>,
    /// Refuse a checkpoint of more raw bytes, before anything of it arrives.
    pub max_bytes: Option<u64>,
    /// How chunks get into their files.
    pub write_mode: WriteMode,
    /// Told of every tensor as soon as it is complete and durable.
    pub on_ready: Option<OnReady>,
}

impl Client {
    /// Pulls a checkpoint of the server into a folder of this machine, reconnecting as long
    /// as that helps. It begins at once, in a task of its own. The same call made again goes
    /// on from what is durable in the folder's place.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    ///
    /// ```
    /// use tensorferry::{Checkpoint, Client, PullOptions, PushOptions, Server, SourceSet};
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let temp = tempfile::tempdir()?;
    /// # let model = temp.path().join("w.npy");
    /// # let header = tensorferry::format::npy::encode_header("<f4", false, &[4]);
    /// # std::fs::write(&model, [header, vec![7; 16]].concat())?;
    /// # let server = Server::builder(temp.path().join("root")).bind(([127, 0, 0, 1], 0).into()).await?;
    /// let client = Client::new(&server.local_addr().to_string())?;
    /// # tokio::spawn(server.serve(std::future::pending()));
    /// # let source = SourceSet::open(&[model], &Default::default())?;
    /// # client.push(source, &"run7".parse()?, PushOptions::default()).await?;
    /// let folder = temp.path().join("here");
    /// let report = client.pull(&"run7".parse()?, &folder, PullOptions::default()).await?;
    /// assert_eq!((report.tensor_count, report.bytes), (1, 16));
    /// assert_eq!(Checkpoint::open(&folder)?.info().tensors[0].name, "w");
    /// # Ok(())
    /// # }
    /// ```
    pub fn pull(
        &self,
        name: &CheckpointName,
        folder: impl AsRef<Path>,
        options: PullOptions,
    ) -> Transfer {
        let progress = Arc::new(ProgressCell::default());
        let (cancel, cancelled) = watch::channel(false);
        let pull = Pull {
            client: self.clone(),
            name: name.clone(),
            folder: folder.as_ref().to_owned(),
            options,
            progress: Arc::clone(&progress),
            cancel: cancelled,
        };
        Transfer::new(Task::spawn(pull.run()), progress, cancel)
    }
}

/// One pull with all its attempts.
struct Pull {
    client: Client,
    name: CheckpointName,
    folder: PathBuf,
    options: PullOptions,
    progress: Arc<ProgressCell>,
    cancel: watch::Receiver<bool>,
}

/// Where it lands.
struct Place {
    parent: PathBuf,
    local: CheckpointName,
}

impl Pull {
    async fn run(mut self) -> Result<TransferReport, Error> {
        let begun = Instant::now();
        let rate = self.check()?;
        let (parent, local) = landing_place(&self.folder).await?;
        let place = Place { parent, local };
        let result = self.attempts(&place, rate).await;
        let left = tokio::task::spawn_blocking(move || {
            let catalog = Catalog::open(&place.parent)?;
            let published = catalog.manifest(&place.local)?;
            // Opening makes it, and a pull that was refused leaves nothing in it.
            catalog.remove_empty_service_dir();
            Ok::<_, StoreError>(published.map(|(manifest, _)| manifest))
        });
        let left = left.await;
        let done = result?;
        let published = left.map_err(|e| Error::Bug(e.to_string()))??;
        Ok(self.report(&done, begun, published.as_ref()))
    }

    async fn attempts(&mut self, place: &Place, rate: Option<u64>) -> Result<Done, Error> {
        let Receiving { context, drain, .. } = self.receiving(place).await?;
        let transfer_id = self.transfer_id(place);
        // Ctrl-C ends a session as the end of a server does: what has come is committed.
        let mut cancel = self.cancel.clone();
        let _stopper = Task::spawn(async move {
            cancelled(&mut cancel).await;
            let _ = drain.send(true);
            std::future::pending::<()>().await;
        });
        let mut attempts = Attempts::new(self.options.transfer.retries);
        let mut restart = self.options.transfer.restart;
        let begun = Instant::now();
        loop {
            let before = self.progress.snapshot();
            self.progress.update(|p| p.stage = Stage::Connecting);
            let error = match self
                .attempt(&context, place, transfer_id, rate, restart)
                .await
            {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if *self.cancel.borrow() {
                return Err(Error::Interrupted);
            }
            let after = self.progress.snapshot();
            let was_accepted = after.session_count > before.session_count;
            if error.is_locked() && begun.elapsed() < LOCK_PATIENCE {
                tokio::time::sleep(PAUSE).await;
                continue;
            }
            if !error.is_retryable(was_accepted) {
                return Err(error.into_error(&self.client));
            }
            let Some(fruitless) = attempts.failed(&before, &after) else {
                return Err(error.into_error(&self.client));
            };
            tracing::info!(%error, attempt = fruitless, "the connection failed; trying again");
            // What an accepted restart threw away must not be thrown away again.
            restart &= !was_accepted;
            self.progress.update(|p| p.stage = Stage::Waiting);
            attempts.pause(&mut self.cancel).await?;
        }
    }

    fn check(&self) -> Result<Option<u64>, Error> {
        if self.options.max_bytes == Some(0) {
            let why = "0 as the most bytes of a pull allows nothing";
            return Err(Error::Usage(why.to_owned()));
        }
        check(&self.options.transfer)
    }

    /// Stands for this work in every session of it. The parent exists by now, so that it has
    /// one name only.
    fn transfer_id(&self, place: &Place) -> Digest16 {
        let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 pull");
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        let transfer = &self.options.transfer;
        field(self.client.authority().as_bytes());
        field(self.name.as_str().as_bytes());
        field(&machine_id());
        field(local_target(&place.parent, place.local.as_str()).as_bytes());
        field(&[
            u8::from(transfer.layout == Layout::Indexed),
            u8::from(transfer.out_format == OutFormat::Safetensors),
            u8::from(transfer.npy_dtype == NpyDtype::Named),
        ]);
        for (kind, globs) in [(b"+", &self.options.include), (b"-", &self.options.exclude)] {
            for glob in globs {
                field(kind);
                field(glob.as_bytes());
            }
        }
        first_16(hasher.finalize())
    }

    /// All that a server has to receive, for one folder.
    async fn receiving(&self, place: &Place) -> Result<Receiving, Error> {
        let transfer = &self.options.transfer;
        let mut receiving = Server::builder(&place.parent)
            .budget_bytes(transfer.budget_bytes.max(BUDGET_BYTES_MIN))
            .chunk_len(transfer.chunk_len.unwrap_or(CHUNK_LEN_DEFAULT))
            .write_mode(self.options.write_mode)
            .quota_checkpoint(self.options.max_bytes.unwrap_or(0))
            .prepare()
            .await?;
        receiving.context.options.max_lanes = lane_count(transfer);
        receiving.context.options.open_timeout = OPEN_TIMEOUT;
        receiving.context.progress = Some(Arc::clone(&self.progress));
        receiving.context.on_ready = self.options.on_ready.clone();
        Ok(receiving)
    }

    /// One session, from dialling to its end.
    async fn attempt(
        &self,
        context: &ReceiveContext,
        place: &Place,
        transfer_id: Digest16,
        rate: Option<u64>,
        restart: bool,
    ) -> Result<Done, PullError> {
        let mut lane_token = [0; 16];
        getrandom::fill(&mut lane_token).map_err(|e| SendError::Bug(e.to_string()))?;
        let first = PullFirst::Open(Box::new(PullOpen {
            checkpoint: self.name.clone(),
            transfer_id,
            codecs: self.options.transfer.codec.codecs(),
            include: self.options.include.clone(),
            exclude: self.options.exclude.clone(),
            out_format: self.options.transfer.out_format,
            max_lanes: lane_count(&self.options.transfer),
            lane_token,
            rate_bytes_per_second: rate,
            first: self.options.transfer.first.clone(),
        }));
        let mut cancel = self.cancel.clone();
        let dialled = tokio::select! {
            dialled = dial(&self.client, &first) => dialled?,
            () = cancelled(&mut cancel) => return Err(SendError::Interrupted.into()),
        };
        let terms = self.terms(place, transfer_id, restart);
        // They end with this attempt.
        let mut lanes = JoinSet::new();
        for _ in 1..lane_count(&self.options.transfer) {
            lanes.spawn(keep_offering(
                self.client.clone(),
                context.clone(),
                lane_token,
            ));
        }
        take_in(context, terms, dialled)
            .await?
            .ok_or_else(|| SendError::Bug("a control lane without an end".to_owned()).into())
    }

    /// The server's opening, with this side's names and wishes.
    fn terms(&self, place: &Place, transfer_id: Digest16, restart: bool) -> Terms {
        let transfer = self.options.transfer.clone();
        let (wire, local) = (self.name.clone(), place.local.clone());
        Some(Arc::new(move |open: Open| {
            if open.checkpoint != wire || open.transfer_id != transfer_id {
                let why = "the server opens another checkpoint than the one that was asked for";
                return Err(ProtocolError::new(Reason::BadFrame, why));
            }
            let open = with_wishes(open, &transfer, restart)?;
            Ok(Open {
                checkpoint: local.clone(),
                ..open
            })
        }))
    }

    fn report(&self, done: &Done, begun: Instant, published: Option<&Manifest>) -> TransferReport {
        self.progress.end_receiving(done);
        let tensor_count = published.map_or(0, |m| m.tensors.len() as u64);
        let progress = self.progress.snapshot();
        TransferReport {
            checkpoint: self.name.to_string(),
            tensor_count,
            file_count: done.entry_count.saturating_sub(tensor_count),
            bytes: done.total_bytes,
            wire_bytes: progress.wire_bytes,
            resumed_bytes: progress.resumed_bytes,
            session_count: progress.session_count,
            elapsed: begun.elapsed(),
            durability: done.durability,
            unchanged: done.unchanged,
            stages: progress.stages,
            codecs: Vec::new(),
        }
    }
}

/// The opening of a server that sends, with the wishes of this side.
pub(crate) fn with_wishes(
    open: Open,
    transfer: &PushOptions,
    restart: bool,
) -> Result<Open, ProtocolError> {
    if open.out_format != transfer.out_format {
        let why = "the server sends for another kind of file";
        return Err(ProtocolError::new(Reason::Unsupported, why));
    }
    Ok(Open {
        chunk_len: transfer.chunk_len,
        commit_mode: transfer.commit_mode,
        layout: transfer.layout,
        npy_dtype: transfer.npy_dtype,
        overwrite: transfer.overwrite,
        verify: transfer.verify,
        restart,
        ..open
    })
}

/// Whether such a transfer can begin where a server sends; the rate that it keeps.
pub(crate) fn check(transfer: &PushOptions) -> Result<Option<u64>, Error> {
    transfer.check()?;
    match transfer.rate_limit {
        RateLimit::None => Ok(None),
        RateLimit::BytesPerSecond(rate) => Ok(Some(rate)),
        RateLimit::File(_) => Err(Error::Usage(
            "a rate out of a file is for a push: here it is a number, which the server keeps"
                .to_owned(),
        )),
    }
}

/// Lanes that are offered to a server that sends.
pub(crate) fn lane_count(transfer: &PushOptions) -> u32 {
    match transfer.lanes {
        Lanes::Fixed(count) => count,
        Lanes::Auto => {
            let chunk_len = transfer.chunk_len.unwrap_or(CHUNK_LEN_DEFAULT);
            let held = transfer.budget_bytes / (CHUNKS_PER_LANE * u64::from(chunk_len));
            AUTO_LANES
                .min(u32::try_from(held).unwrap_or(LANES_MAX))
                .max(1)
        }
    }
}

/// A call that has begun: its first frame is on its way.
struct Dialled {
    out: LaneSender,
    body: Body,
    /// The same, to be read to its end when the session has done with it.
    answer: Answer,
    /// How the server ended the call.
    status: Arc<Mutex<Option<Status>>>,
    _keeps: Channel,
}

/// Begins a call in which the server sends, with this first frame; the channel keeps its
/// connection open.
pub(crate) async fn begin_pull(
    client: &Client,
    first: &PullFirst,
) -> Result<(LaneSender, Body, Channel), SendError> {
    let opened = timeout(OPEN_TIMEOUT, client.open_call(PULL_PATH)).await;
    let (out, response, channel) = opened.map_err(|_| SendError::Disconnected {
        message: format!("no answer to the call for {} s", OPEN_TIMEOUT.as_secs()),
    })??;
    let closed = |_| SendError::Disconnected {
        message: "the call is over".to_owned(),
    };
    let first = encode_message(&encode_pull_first(first));
    out.send([first]).await.map_err(closed)?;
    Ok((out, response.into_body(), channel))
}

async fn dial(client: &Client, first: &PullFirst) -> Result<Dialled, SendError> {
    let (out, inner, channel) = begin_pull(client, first).await?;
    let (status, answer) = (Arc::default(), Arc::new(Mutex::new(inner)));
    let body = Body::new(Ended {
        answer: Arc::clone(&answer),
        status: Arc::clone(&status),
    });
    Ok(Dialled {
        out,
        body,
        answer,
        status,
        _keeps: channel,
    })
}

/// Receives on one lane. What the server says at the end of its call counts more than
/// that the stream is over.
async fn take_in(
    context: &ReceiveContext,
    terms: Terms,
    dialled: Dialled,
) -> Result<Option<Done>, PullError> {
    let Dialled {
        out,
        body,
        answer,
        status,
        _keeps,
    } = dialled;
    let result = receive(context.clone(), terms, body, out.clone()).await;
    let said = status.lock().unwrap_or_else(PoisonError::into_inner).take();
    match result {
        Ok(done) => {
            // The last frame is in the queue of the connection, and would go with it: the
            // server has heard it when it ends the call.
            farewell(out, &answer).await;
            Ok(done)
        }
        Err(error) => match said {
            Some(status) if status.code() != tonic::Code::Ok => Err(status_error(&status).into()),
            _ => {
                if !error.is_lost_connection() {
                    let abort = ReceiverControl::Abort(farewell_of(&error));
                    let frame = encode_receiver_frame(&ReceiverFrame::control(abort));
                    if let Ok(Ok(())) =
                        timeout(FAREWELL_TIMEOUT, out.send([encode_message(&frame)])).await
                    {
                        farewell(out, &answer).await;
                    }
                }
                Err(error.into())
            }
        },
    }
}

/// Offers a further lane as long as the attempt lasts, and another when it is lost.
async fn keep_offering(client: Client, mut context: ReceiveContext, token: Digest16) {
    // It may wait as long as the attempt lasts.
    context.options.open_timeout = Duration::MAX;
    // A lane joins; what is to be received is said on the control lane and nowhere else.
    let terms: Terms = Some(Arc::new(|_| {
        let why = "a lane that was offered opens a session";
        Err(ProtocolError::new(Reason::BadFrame, why))
    }));
    let mut pause = PAUSE;
    loop {
        let begun = Instant::now();
        if let Ok(dialled) = dial(&client, &PullFirst::Join(token)).await {
            // Why a lane ended is said on the control lane.
            let _ = take_in(&context, terms.clone(), dialled).await;
        }
        pause = match begun.elapsed() > MAX_PAUSE {
            true => PAUSE,
            false => (pause * 2).min(MAX_PAUSE),
        };
        tokio::time::sleep(pause).await;
    }
}

/// Lets what was said go out, and waits until the server ends the call.
async fn farewell(out: LaneSender, answer: &Answer) {
    let _ = timeout(FAREWELL_TIMEOUT, async {
        out.drained().await;
        while let Some(Ok(_)) = poll_fn(|cx| poll_answer(answer, cx)).await {}
    })
    .await;
}

/// Why this side gives up, in words for the server: its paths and files are not its affair.
fn farewell_of(error: &SessionError) -> Abort {
    let (reason, message) = match error {
        SessionError::Draining => (Reason::Interrupted, "the receiver was stopped".to_owned()),
        SessionError::Store(error) => {
            let what = "the receiver cannot store it";
            (error.reason(), what.to_owned())
        }
        error => (error.reason(), error.to_string()),
    };
    Abort {
        reason: Some(reason),
        message,
    }
}

type Answer = Arc<Mutex<Body>>;

fn poll_answer(
    answer: &Answer,
    cx: &mut Context<'_>,
) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
    let mut body = answer.lock().unwrap_or_else(PoisonError::into_inner);
    Pin::new(&mut *body).poll_frame(cx)
}

/// The body of an answer, which keeps how the call ended.
struct Ended {
    answer: Answer,
    status: Arc<Mutex<Option<Status>>>,
}

impl http_body::Body for Ended {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(poll_answer(&self.answer, cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
            && let Some(status) = Status::from_header_map(trailers)
        {
            *self.status.lock().unwrap_or_else(PoisonError::into_inner) = Some(status);
        }
        Poll::Ready(frame)
    }
}

/// Why an attempt failed: on the way, or on this side.
#[derive(Debug, thiserror::Error)]
enum PullError {
    #[error(transparent)]
    Remote(#[from] SendError),
    #[error(transparent)]
    Local(#[from] SessionError),
}

impl PullError {
    fn is_retryable(&self, was_accepted: bool) -> bool {
        match self {
            // What took its place is pulled instead.
            PullError::Remote(SendError::Refused {
                reason: Reason::SourceChanged,
                ..
            }) => true,
            PullError::Remote(error) => is_retryable(error, was_accepted),
            PullError::Local(error) => match error {
                SessionError::Aborted(abort) => matches!(
                    abort.reason,
                    Some(Reason::Interrupted | Reason::SourceChanged)
                ),
                SessionError::Disconnected(_) | SessionError::Idle(_) | SessionError::Slow(_) => {
                    true
                }
                _ => false,
            },
        }
    }

    /// Another receiver of this process may be about to let go of the name.
    fn is_locked(&self) -> bool {
        match self {
            PullError::Local(SessionError::Store(error)) => error.reason() == Reason::Locked,
            _ => false,
        }
    }

    fn into_error(self, client: &Client) -> Error {
        match self {
            PullError::Remote(error) => client.error(error),
            PullError::Local(SessionError::Store(error)) => error.into(),
            PullError::Local(SessionError::Disconnected(message)) => {
                client.error(SendError::Disconnected { message })
            }
            PullError::Local(SessionError::Aborted(abort)) => Error::Refused {
                reason: abort.reason.unwrap_or(Reason::Interrupted),
                message: abort.message,
            },
            PullError::Local(error) => error.into(),
        }
    }
}
