//! The receiving loop.
//!
//! One task reads the lane: frames in, chunk heads checked, bytes collected as
//! ropes, memory reserved before it is used. Each complete chunk goes to a CPU
//! worker (checksum) and, with its placement, to an I/O thread (write). A second
//! task drives the role: it sends answers and has groups committed.

use super::{
    buffers::{Budget, Reserved},
    error::SessionError,
    registry::{Registry, Seat},
    send::cancelled,
    workers::{on_cpu, on_io},
};
use crate::{
    format::{checksum, codec},
    plan::{CHUNK_LEN_DEFAULT, CheckpointName, Digest16, Grid},
    protocol::{
        Accept, Arrival, Batch, CommitMode, CommitPolicy, CompareJob, Done, Group,
        MAX_CONTROL_BYTES, MAX_HEAD_BYTES, Open, Placement, ProtocolError, PublishPlan, Reason,
        ReceiveAction, Receiver, ReceiverConfig, ReceiverControl, ReceiverFrame, SenderFrame,
        Ticket,
    },
    store::{Catalog, Opened, Staging, StagingOptions},
    wire::{
        Event, FrameParser, LaneSender, Rope, decode_sender_frame, encode_layout, encode_message,
        encode_out_format, encode_receiver_frame,
    },
};
use bytes::Bytes;
use http_body::Body as _;
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{sync::Notify, sync::watch, task::JoinHandle, time::timeout};
use tonic::body::Body;

/// A session must open within this time.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A peer that takes no answer for this long is gone.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Codecs that a chunk may come in.
const CODECS: u32 = codec::Codec::None.bit()
    | codec::Codec::Zero.bit()
    | codec::Codec::Lz4.bit()
    | codec::Codec::Fill.bit();

/// Limits of a server's sessions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ReceiveOptions {
    /// Most bytes a sender may have unacknowledged.
    pub(crate) window_bytes: u64,
    /// Cell length of new transfers when the sender has no wish.
    pub(crate) chunk_len: u32,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        ReceiveOptions {
            window_bytes: 64 << 20,
            chunk_len: CHUNK_LEN_DEFAULT,
        }
    }
}

/// What all sessions of a server share.
#[derive(Clone, Debug)]
pub(crate) struct ReceiveContext {
    pub(crate) catalog: Catalog,
    pub(crate) registry: Registry,
    pub(crate) options: ReceiveOptions,
    pub(crate) budget: Budget,
    /// Becomes true when the server shuts down.
    pub(crate) draining: watch::Receiver<bool>,
}

/// State shared by the tasks and jobs of one session.
struct Session {
    core: Mutex<Receiver>,
    staging: Arc<Staging>,
    /// Something happened that the driver should look at.
    wake: Notify,
    failure: Mutex<Option<SessionError>>,
    job_count: AtomicUsize,
    budget: Budget,
    window_bytes: u64,
}

impl Session {
    fn core(&self) -> MutexGuard<'_, Receiver> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The first failure counts.
    fn fail(&self, error: impl Into<SessionError>) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error.into());
        drop(failure);
        self.wake.notify_one();
    }

    fn take_failure(&self) -> Option<SessionError> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    /// Runs a job whose panic ends this session and nothing else.
    fn job(
        self: &Arc<Self>,
        on_pool: fn(Box<dyn FnOnce() + Send>),
        work: impl FnOnce(&Arc<Session>) + Send + 'static,
    ) {
        let session = Arc::clone(self);
        session.job_count.fetch_add(1, Ordering::AcqRel);
        on_pool(Box::new(move || {
            if catch_unwind(AssertUnwindSafe(|| work(&session))).is_err() {
                session.fail(SessionError::Bug("a worker panicked".to_owned()));
            }
            session.job_count.fetch_sub(1, Ordering::AcqRel);
            session.wake.notify_one();
        }));
    }
}

/// Serves one push: `body` is the request, answers go to `out`. Returns once the
/// checkpoint is published or nothing of the session is under way any more.
///
/// `alias` = a name on the wire and the local one that it stands for.
pub(crate) async fn receive(
    context: ReceiveContext,
    alias: Option<(CheckpointName, CheckpointName)>,
    mut body: Body,
    out: LaneSender,
) -> Result<(), SessionError> {
    let mut parser = FrameParser::new(MAX_CONTROL_BYTES, MAX_CONTROL_BYTES);
    let mut open = timeout(OPEN_TIMEOUT, read_open(&mut body, &mut parser))
        .await
        .map_err(|_| SessionError::Idle(OPEN_TIMEOUT.as_secs()))??;
    let mut draining = context.draining.clone();
    if *draining.borrow_and_update() {
        return Err(SessionError::Draining);
    }
    check_supported(&open)?;
    if let Some((wire, local)) = alias {
        if open.checkpoint != wire {
            return Err(ProtocolError::new(
                Reason::NotFound,
                "this server takes one checkpoint only",
            )
            .into());
        }
        open.checkpoint = local;
    }
    let seat = context
        .registry
        .take(&open.checkpoint, open.transfer_id)
        .await?;
    let options = staging_options(&open, &context.options)?;
    let catalog = context.catalog.clone();
    let opened = blocking(move || Ok(Staging::open(&catalog, open, options)?)).await?;
    let (staging, recovered) = match opened {
        Opened::Unchanged {
            manifest,
            manifest_blake3,
        } => {
            let done = Done {
                unchanged: true,
                entry_count: (manifest.tensors.len() + manifest.files.len()) as u64,
                total_bytes: manifest.total_nbytes,
                manifest_blake3,
                durability: match manifest.durability.as_str() {
                    "disk" => crate::protocol::Durability::Disk,
                    _ => crate::protocol::Durability::Process,
                },
            };
            return send_control(&out, ReceiverControl::Done(done)).await;
        }
        Opened::Ready { staging, recovered } => (staging, recovered),
    };

    let chunk_len = staging.chunk_len();
    let grid = Grid::new(chunk_len).map_err(ProtocolError::from)?;
    let open = staging.options();
    let core = Receiver::new(
        ReceiverConfig {
            grid,
            codecs: CODECS & open.codecs,
            commit: commit_policy(open.commit_mode),
            layout: open.layout,
            manifest: open.manifest,
            fingerprint: open.fingerprint,
        },
        recovered,
    );
    let window_bytes = context.options.window_bytes.max(u64::from(chunk_len));
    let accept = Accept {
        chunk_len,
        codecs: CODECS & open.codecs,
        durability: staging.durability(),
        window_bytes,
        session_token: random_token()?,
        epoch: staging.epoch(),
        max_lanes: 1,
        durable_bytes: core.durable_bytes(),
    };
    tracing::info!(
        checkpoint = %open.checkpoint,
        epoch = accept.epoch,
        durable_bytes = accept.durable_bytes,
        "a session was opened"
    );
    let session = Arc::new(Session {
        core: Mutex::new(core),
        staging,
        wake: Notify::new(),
        failure: Mutex::new(None),
        job_count: AtomicUsize::new(0),
        budget: context.budget.clone(),
        window_bytes,
    });
    send_control(&out, ReceiverControl::Accept(accept)).await?;
    let max_message_bytes = chunk_len as usize + MAX_HEAD_BYTES;
    parser.set_limits(max_message_bytes, max_message_bytes.min(MAX_CONTROL_BYTES));

    let mut lane = Some(tokio::spawn(run_lane(Arc::clone(&session), body, parser)));
    let result = drive(&session, &out, &seat, &mut draining, &mut lane).await;
    // Dropping the lane's body tells the sender that nothing more is read.
    if let Some(lane) = lane {
        lane.abort();
        let _ = lane.await;
    }
    let result = match result {
        Ok(plan) => publish(&session, plan, &out, &seat).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &result {
        end(&session, &out, error).await;
    }
    // The lock of the name goes before its seat, or the next session finds it locked.
    session.staging.unlock();
    drop(seat);
    result
}

/// Drives the role until everything is to be published.
async fn drive(
    session: &Arc<Session>,
    out: &LaneSender,
    seat: &Seat,
    draining: &mut watch::Receiver<bool>,
    lane: &mut Option<JoinHandle<Result<(), SessionError>>>,
) -> Result<Box<PublishPlan>, SessionError> {
    let mut superseded = seat.superseded.clone();
    let mut commit: Option<JoinHandle<()>> = None;
    loop {
        if let Some(error) = session.take_failure() {
            finish_commit(commit).await;
            return Err(error);
        }
        let action = session.core().poll(Instant::now());
        match action {
            Some(ReceiveAction::Send { frame, .. }) => {
                // A sender that does not listen must not keep its successor waiting.
                tokio::select! {
                    sent = send_frame(out, &frame) => {
                        if let Err(error) = sent {
                            session.fail(error);
                        }
                    }
                    () = cancelled(&mut superseded) => session.fail(SessionError::Superseded),
                }
                continue;
            }
            Some(ReceiveAction::Commit(group)) => {
                commit = Some(spawn_commit(session, group));
                continue;
            }
            Some(ReceiveAction::Compare(job)) => {
                spawn_compare(session, job);
                continue;
            }
            Some(ReceiveAction::Publish(plan)) => return Ok(plan),
            None => {}
        }
        let wake_at = session.core().wake_at();
        tokio::select! {
            () = session.wake.notified() => {}
            () = sleep_until(wake_at) => {}
            ended = lane_end(lane) => {
                match ended {
                    // After Finish the sender may close its side.
                    Ok(Ok(())) if session.core().is_finishing() => {}
                    Ok(Ok(())) => session.fail(SessionError::Disconnected("the sender closed the stream before finish".to_owned())),
                    Ok(Err(error)) => session.fail(error),
                    Err(error) => session.fail(SessionError::Bug(error.to_string())),
                }
            }
            () = cancelled(&mut superseded) => session.fail(SessionError::Superseded),
            () = cancelled(draining) => session.fail(SessionError::Draining),
        }
    }
}

/// Resolves when the lane ends, once; its handle must not be asked again.
async fn lane_end(
    lane: &mut Option<JoinHandle<Result<(), SessionError>>>,
) -> Result<Result<(), SessionError>, tokio::task::JoinError> {
    match lane {
        Some(handle) => {
            let ended = handle.await;
            *lane = None;
            ended
        }
        None => std::future::pending().await,
    }
}

/// The session is over: waits for its jobs, commits what is written, and tells
/// the sender, if it still listens, what is safe.
async fn end(session: &Arc<Session>, out: &LaneSender, error: &SessionError) {
    session.core().end();
    while session.job_count.load(Ordering::Acquire) > 0 {
        // Jobs wake the driver as they end; the timeout covers a lost wake-up.
        let _ = timeout(Duration::from_millis(100), session.wake.notified()).await;
    }
    // After a failed sync or write nothing of the transfer can be vouched for.
    if !error.leaves_disk_trusted() {
        return;
    }
    loop {
        let action = session.core().poll(Instant::now());
        match action {
            Some(ReceiveAction::Commit(group)) => {
                finish_commit(Some(spawn_commit(session, group))).await
            }
            Some(ReceiveAction::Send { frame, .. }) => {
                let bytes = encode_message(&encode_receiver_frame(&frame));
                let _ = timeout(Duration::from_secs(1), out.send([bytes])).await;
            }
            _ if session.core().is_settled() => break,
            _ => {
                let _ = timeout(Duration::from_millis(100), session.wake.notified()).await;
            }
        }
        // That the connection broke in yet another way is no reason to stop.
        if session
            .take_failure()
            .is_some_and(|e| !e.leaves_disk_trusted())
        {
            break;
        }
    }
}

async fn publish(
    session: &Arc<Session>,
    plan: Box<PublishPlan>,
    out: &LaneSender,
    seat: &Seat,
) -> Result<(), SessionError> {
    let entry_count = plan.entries.len() as u64;
    let total_bytes = plan
        .entries
        .iter()
        .map(|(slot, ..)| slot.header.byte_len)
        .sum();
    let staging = Arc::clone(&session.staging);
    let manifest_blake3 = blocking(move || Ok(staging.publish(&plan)?)).await?;
    seat.published();
    tracing::info!(entry_count, total_bytes, "a checkpoint was published");
    let done = Done {
        unchanged: false,
        entry_count,
        total_bytes,
        manifest_blake3,
        durability: session.staging.durability(),
    };
    // Published is published, whether or not the sender still listens.
    let told = send_control(out, ReceiverControl::Done(done)).await;
    let staging = Arc::clone(&session.staging);
    if let Err(error) = blocking(move || Ok(staging.clean_up()?)).await {
        tracing::warn!(%error, "the staging of a published checkpoint could not be removed");
    }
    told
}

/// Reads one lane to its end.
async fn run_lane(
    session: Arc<Session>,
    mut body: Body,
    mut parser: FrameParser,
) -> Result<(), SessionError> {
    let mut pending: Vec<Pending> = Vec::new();
    loop {
        while let Some(event) = parser.next_event()? {
            match event {
                Event::Head { frame, payload_len } => {
                    let frame = decode_sender_frame(*frame)?;
                    pending = take_frame(&session, frame, payload_len).await?;
                }
                Event::Payload(rope) => take_payload(&session, std::mem::take(&mut pending), rope),
            }
        }
        // Memory is reserved for a frame that has begun: it must go on.
        let data = if parser.is_at_boundary() {
            next_data(&mut body).await?
        } else {
            timeout(STALL_TIMEOUT, next_data(&mut body))
                .await
                .map_err(|_| SessionError::Idle(STALL_TIMEOUT.as_secs()))??
        };
        match data {
            Some(data) => parser.feed(data),
            None if parser.is_at_boundary() => return Ok(()),
            None => {
                return Err(SessionError::Disconnected(
                    "the stream ended inside a message".to_owned(),
                ));
            }
        }
    }
}

/// A chunk whose head has come and whose bytes have not.
struct Pending {
    /// `None`: a duplicate, whose bytes are dropped.
    ticket: Option<Ticket>,
    codec: u32,
    encoded_len: usize,
    /// Memory for all chunks of the frame.
    reserved: Arc<Reserved>,
}

async fn take_frame(
    session: &Arc<Session>,
    frame: SenderFrame,
    payload_len: usize,
) -> Result<Vec<Pending>, SessionError> {
    let bad_frame = |why: &str| SessionError::from(ProtocolError::new(Reason::BadFrame, why));
    if payload_len > 0 && !matches!(&frame, SenderFrame::Batch(batch) if !batch.chunks.is_empty()) {
        return Err(bad_frame("a payload came without chunks"));
    }
    match frame {
        SenderFrame::Batch(batch) => return take_batch(session, batch, payload_len).await,
        SenderFrame::Compare(compare) => session.core().compare(&compare)?,
        SenderFrame::Finish(finish) => session.core().finish(finish)?,
        SenderFrame::Abort(abort) => return Err(SessionError::Aborted(abort)),
        SenderFrame::Open(_) => return Err(bad_frame("open came twice")),
        SenderFrame::Join(_) => return Err(bad_frame("join came on the control lane")),
    }
    session.wake.notify_one();
    Ok(Vec::new())
}

async fn take_batch(
    session: &Arc<Session>,
    batch: Batch,
    payload_len: usize,
) -> Result<Vec<Pending>, SessionError> {
    session.core().announce(&batch)?;
    let encoded_bytes: u64 = batch.chunks.iter().map(|c| u64::from(c.encoded_len)).sum();
    if encoded_bytes != payload_len as u64 {
        let why = format!(
            "the chunks of a frame have {encoded_bytes} bytes, its payload has {payload_len}"
        );
        return Err(ProtocolError::new(Reason::BadFrame, why).into());
    }
    if batch.chunks.is_empty() {
        session.wake.notify_one();
        return Ok(Vec::new());
    }
    let mut tickets = Vec::with_capacity(batch.chunks.len());
    let (mut raw_bytes, mut bytes) = (0, 0);
    for head in &batch.chunks {
        tickets.push(match session.core().arrive(0, head)? {
            Arrival::Take(ticket) => {
                raw_bytes += u64::from(head.raw_len);
                // Both the encoded and the decoded bytes are in memory for a while.
                bytes += u64::from(head.raw_len)
                    + if head.codec == 0 {
                        0
                    } else {
                        u64::from(head.encoded_len)
                    };
                Some(ticket)
            }
            Arrival::Duplicate => None,
        });
    }
    // Chunks without payload make a short frame of any number of raw bytes.
    if raw_bytes > session.window_bytes {
        let why = format!(
            "the chunks of a frame have {raw_bytes} raw bytes, the window is {}",
            session.window_bytes
        );
        return Err(ProtocolError::new(Reason::TooLarge, why).into());
    }
    // At once: sessions that hold a part each and wait for more would wait forever.
    let reserved = Arc::new(session.budget.reserve(bytes).await);
    let heads = tickets.into_iter().zip(&batch.chunks);
    let mut pending: Vec<Pending> = heads
        .map(|(ticket, head)| Pending {
            ticket,
            codec: head.codec,
            encoded_len: head.encoded_len as usize,
            reserved: Arc::clone(&reserved),
        })
        .collect();
    session.wake.notify_one();
    if payload_len == 0 {
        // Chunks without bytes (all zero) are complete with their head.
        take_payload(session, std::mem::take(&mut pending), Rope::default());
    }
    Ok(pending)
}

fn take_payload(session: &Arc<Session>, pending: Vec<Pending>, mut rope: Rope) {
    for chunk in pending {
        let encoded = rope.split_to(chunk.encoded_len);
        let Some(ticket) = chunk.ticket else { continue };
        let (codec, reserved) = (chunk.codec, chunk.reserved);
        session.job(on_cpu, move |session| {
            verify(session, ticket, codec, encoded, reserved)
        });
    }
}

/// On a CPU worker: raw bytes and their checksum; then on to the disk.
fn verify(
    session: &Arc<Session>,
    ticket: Ticket,
    codec: u32,
    encoded: Rope,
    reserved: Arc<Reserved>,
) {
    let raw = match decode(codec, encoded, ticket.raw_len as usize) {
        Ok(raw) => raw,
        Err(error) => {
            return session.fail(ProtocolError::new(
                Reason::BadCompression,
                error.to_string(),
            ));
        }
    };
    let found = checksum::crc32c_of_parts(raw.parts().map(|p| &p[..]));
    if found != ticket.crc32c && !cfg!(feature = "__mutant_no_crc") {
        if let Err(error) = session.core().reject(ticket, found) {
            session.fail(error);
        }
        return;
    }
    let Some(placement) = session.core().grant(ticket) else {
        return;
    };
    session.job(on_io, move |session| {
        place(session, placement, raw, reserved)
    });
}

/// On an I/O thread: the only write of this cell.
fn place(session: &Arc<Session>, placement: Placement, raw: Rope, reserved: Arc<Reserved>) {
    match session.staging.files().write(placement, raw.parts()) {
        Ok(written) => session.core().written(written, Instant::now()),
        Err((placement, error)) => {
            session.core().abandon(placement);
            session.fail(error);
        }
    }
    drop(reserved);
}

fn decode(codec_id: u32, encoded: Rope, raw_len: usize) -> Result<Rope, codec::CodecError> {
    let codec = codec::Codec::from_id(codec_id).unwrap_or(codec::Codec::None);
    if codec == codec::Codec::None {
        return Ok(encoded);
    }
    let mut flat = Vec::with_capacity(encoded.len());
    encoded.parts().for_each(|p| flat.extend_from_slice(p));
    let mut raw = vec![0; raw_len];
    codec::decode_into(codec, &flat, &mut raw)?;
    let mut rope = Rope::default();
    rope.push(Bytes::from(raw));
    Ok(rope)
}

/// Compares a held cell with what the sender has.
fn spawn_compare(session: &Arc<Session>, job: CompareJob) {
    let session = Arc::clone(session);
    session.job_count.fetch_add(1, Ordering::AcqRel);
    // Thousands of comparisons may be asked for at once; their bytes come out of
    // the same budget as chunks.
    tokio::spawn(async move {
        let reserved = session.budget.reserve(u64::from(job.raw_len)).await;
        read_and_compare(&session, job, reserved);
        session.job_count.fetch_sub(1, Ordering::AcqRel);
    });
}

fn read_and_compare(session: &Arc<Session>, job: CompareJob, reserved: Reserved) {
    session.job(on_io, move |session| {
        let mut bytes = vec![0; job.raw_len as usize];
        match session
            .staging
            .files()
            .read(&job.slot, job.offset, &mut bytes)
        {
            Ok(()) => session.job(on_cpu, move |session| {
                let equal = *blake3::hash(&bytes).as_bytes() == job.blake3;
                let crc = checksum::crc32c(&bytes);
                session.core().compared(&job, equal, crc, Instant::now());
                drop((bytes, reserved));
            }),
            Err(error) => session.fail(error),
        }
    });
}

/// Has a group made durable. The role learns of it only after the syncs.
fn spawn_commit(session: &Arc<Session>, group: Group) -> JoinHandle<()> {
    let session = Arc::clone(session);
    tokio::task::spawn_blocking(move || {
        if cfg!(feature = "__mutant_ack_before_sync") {
            session.core().committed(group.id);
            session.wake.notify_one();
            std::thread::sleep(Duration::from_millis(20));
        }
        let committed = catch_unwind(AssertUnwindSafe(|| session.staging.commit(&group)));
        let bug = || SessionError::Bug("the committer panicked".to_owned());
        match committed.map_err(|_| bug()).and_then(|c| Ok(c?)) {
            Ok(()) => {
                let complete = session.core().committed(group.id);
                complete
                    .into_iter()
                    .for_each(|number| session.staging.files().close(number));
                session.wake.notify_one();
            }
            Err(error) => session.fail(error),
        }
    })
}

async fn finish_commit(commit: Option<JoinHandle<()>>) {
    if let Some(commit) = commit {
        let _ = commit.await;
    }
}

async fn read_open(body: &mut Body, parser: &mut FrameParser) -> Result<Open, SessionError> {
    loop {
        if let Some(event) = parser.next_event()? {
            let Event::Head {
                frame,
                payload_len: 0,
            } = event
            else {
                return Err(ProtocolError::new(Reason::BadFrame, "open has a payload").into());
            };
            return match decode_sender_frame(*frame)? {
                SenderFrame::Open(open) => Ok(*open),
                SenderFrame::Join(_) => Err(ProtocolError::new(
                    Reason::Unsupported,
                    "further lanes are not offered",
                )
                .into()),
                _ => {
                    Err(ProtocolError::new(Reason::BadFrame, "the first frame is not open").into())
                }
            };
        }
        match next_data(body).await? {
            Some(data) => parser.feed(data),
            None => {
                return Err(
                    ProtocolError::new(Reason::BadFrame, "the stream ended before open").into(),
                );
            }
        }
    }
}

/// The next piece of the request, or `None` at its end. A reset is an error,
/// never an end.
async fn next_data(body: &mut Body) -> Result<Option<Bytes>, SessionError> {
    loop {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
        match frame {
            None => return Ok(None),
            Some(Err(status)) => {
                return Err(SessionError::Disconnected(status.message().to_owned()));
            }
            Some(Ok(frame)) => {
                if let Ok(data) = frame.into_data() {
                    return Ok(Some(data));
                }
            }
        }
    }
}

fn check_supported(open: &Open) -> Result<(), SessionError> {
    if open.out_format != crate::protocol::OutFormat::Npy {
        return Err(
            ProtocolError::new(Reason::Unsupported, "only the npy container is written").into(),
        );
    }
    if open.codecs & codec::Codec::None.bit() == 0 {
        return Err(
            ProtocolError::new(Reason::BadCompression, "codec 0 must be among the codecs").into(),
        );
    }
    Ok(())
}

fn staging_options(open: &Open, options: &ReceiveOptions) -> Result<StagingOptions, SessionError> {
    let chunk_len = open.chunk_len.unwrap_or(options.chunk_len);
    Grid::new(chunk_len).map_err(ProtocolError::from)?;
    Ok(StagingOptions {
        chunk_len,
        layout: encode_layout(open.layout),
        out_format: encode_out_format(open.out_format),
    })
}

fn commit_policy(mode: CommitMode) -> CommitPolicy {
    let group = CommitPolicy {
        bytes: 128 << 20,
        files: 512,
        interval: Some(Duration::from_millis(500)),
        max_undurable_bytes: 256 << 20,
    };
    match mode {
        CommitMode::Group | CommitMode::None => group,
        CommitMode::Strict => CommitPolicy {
            bytes: 8 << 20,
            max_undurable_bytes: 16 << 20,
            ..group
        },
        CommitMode::End => CommitPolicy {
            bytes: u64::MAX,
            files: usize::MAX,
            interval: None,
            max_undurable_bytes: u64::MAX,
        },
    }
}

fn random_token() -> Result<Digest16, SessionError> {
    let mut token = [0; 16];
    getrandom::fill(&mut token).map_err(|e| SessionError::Bug(e.to_string()))?;
    Ok(token)
}

async fn send_control(out: &LaneSender, control: ReceiverControl) -> Result<(), SessionError> {
    send_frame(out, &ReceiverFrame::control(control)).await
}

async fn send_frame(out: &LaneSender, frame: &ReceiverFrame) -> Result<(), SessionError> {
    let bytes = encode_message(&encode_receiver_frame(frame));
    match timeout(STALL_TIMEOUT, out.send([bytes])).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(SessionError::Disconnected("the sender has gone".to_owned())),
        Err(_) => Err(SessionError::Idle(STALL_TIMEOUT.as_secs())),
    }
}

async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// Runs disk work where it may block.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, SessionError> + Send + 'static,
) -> Result<T, SessionError> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(SessionError::Bug(error.to_string())))
}
