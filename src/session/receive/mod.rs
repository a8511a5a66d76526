//! The receiving loop.
//!
//! One task for each lane reads frames and hands complete chunks to CPU workers
//! (checksum) and, with their placements, to I/O threads (write). The task of the
//! call that opened the session drives the role: it sends answers on lane 0 and has
//! groups committed. Lanes that join later bring chunks and take their own acks.

mod chunk;
mod disk;
mod lane;
#[cfg(test)]
mod models;
mod open;
mod sessions;
mod teller;
mod turns;

use self::{
    disk::{finish_commit, spawn_commit, spawn_compare, tell_complete},
    lane::{run_lane, send_control, send_frame, serve_joined, set_limits},
    open::{
        First, check_supported, commit_policy, container_header_len, random_token, read_first,
        staging_options,
    },
    sessions::Sessions,
    teller::Teller,
    turns::Turns,
};
use super::{
    buffers::Budget,
    error::SessionError,
    pace::{Pace, PaceLimits, Turn, Verdict},
    progress::ProgressCell,
    registry::{Registry, Seat},
    rehearsal::{Rehearsal, check_open},
    send::cancelled,
    stages::ReceiveStages,
    task::Task,
};
use crate::{
    format::codec,
    options::{CHUNKS_PER_LANE, HTTP2_FRAME_BYTES},
    plan::{CHUNK_LEN_DEFAULT, Grid},
    protocol::{
        Accept, Done, Durability, MAX_CONTROL_BYTES, ManifestPromise, Open, ProtocolError,
        PublishPlan, ReceiveAction, Receiver, ReceiverConfig, ReceiverControl,
    },
    ready::OnReady,
    store::{Catalog, Opened, Staging, WriteMode},
    wire::{FrameParser, LaneSender, encode_message, encode_receiver_frame},
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, watch},
    task::JoinHandle,
    time::{MissedTickBehavior, timeout},
};
use tonic::body::Body;

/// A session must open within this time, unless told otherwise.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Lanes of one session: more than saturate any link, few enough to bound memory.
const MAX_LANES: u32 = 16;
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
    /// Most lanes of a session, the control lane among them.
    pub(crate) max_lanes: u32,
    /// How chunks are written.
    pub(crate) write_mode: WriteMode,
    /// What is asked of a sender.
    pub(crate) pace: PaceLimits,
    /// What is left out; `None` wherever bytes matter.
    pub(crate) rehearsal: Option<Rehearsal>,
    /// How long the first frame of a lane is waited for.
    pub(crate) open_timeout: Duration,
}

impl Default for ReceiveOptions {
    fn default() -> Self {
        ReceiveOptions {
            window_bytes: 64 << 20,
            chunk_len: CHUNK_LEN_DEFAULT,
            max_lanes: MAX_LANES,
            write_mode: WriteMode::Auto,
            pace: PaceLimits::default(),
            rehearsal: None,
            open_timeout: OPEN_TIMEOUT,
        }
    }
}

/// What all sessions of a server share.
#[derive(Clone, Debug)]
pub(crate) struct ReceiveContext {
    pub(crate) catalog: Catalog,
    pub(crate) registry: Registry,
    /// Those that lanes may join.
    pub(crate) sessions: Sessions,
    pub(crate) options: ReceiveOptions,
    pub(crate) budget: Budget,
    /// Becomes true when the server shuts down.
    pub(crate) draining: watch::Receiver<bool>,
    /// Told how far the session is, where somebody on this side wants to know.
    pub(crate) progress: Option<Arc<ProgressCell>>,
    /// Told of each tensor that is complete and durable.
    pub(crate) on_ready: Option<OnReady>,
}

/// State shared by the tasks and jobs of one session.
struct Session {
    core: Mutex<Receiver>,
    staging: Arc<Staging>,
    rehearsal: Option<Rehearsal>,
    /// Something happened that the driver should look at.
    wake: Notify,
    failure: Mutex<Option<SessionError>>,
    job_count: AtomicUsize,
    budget: Budget,
    /// Chunks on their way into the files.
    turns: Turns<chunk::Job>,
    /// The terms, which every lane gets.
    accept: Accept,
    /// Changes when lanes should look for acks to send.
    turn: watch::Sender<()>,
    /// Becomes true when the session ends.
    over: watch::Sender<bool>,
    /// For the pace: what has come, and lanes that wait for the rest of a frame or
    /// for memory.
    heard_bytes: AtomicU64,
    /// Raw bytes of all entries that were announced.
    announced_bytes: AtomicU64,
    open_frame_count: AtomicUsize,
    short_of_memory_count: AtomicUsize,
    stages: ReceiveStages,
    progress: Option<Arc<ProgressCell>>,
    teller: Option<Arc<Teller>>,
}

impl Session {
    fn core(&self) -> MutexGuard<'_, Receiver> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell_progress(&self) {
        if let Some(progress) = &self.progress {
            let durable_bytes = self.core().durable_bytes();
            progress.receive(durable_bytes);
        }
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

    /// Ends the session of a sender that holds it for nothing.
    fn check_pace(&self, pace: &mut Pace) {
        let is_counted = |count: &AtomicUsize| count.load(Ordering::Relaxed) > 0;
        let is_working = is_counted(&self.short_of_memory_count) || is_counted(&self.job_count);
        let turn = if is_counted(&self.open_frame_count) {
            // Memory is set aside for a frame that has begun.
            Turn::Sender
        } else if is_working || self.core().is_busy() {
            Turn::Receiver
        } else if self.core().is_owed() {
            Turn::Sender
        } else {
            Turn::Nobody
        };
        let heard = self.heard_bytes.load(Ordering::Relaxed);
        // A DATA frame shows once all of it is here. One comes soon enough at the least
        // rate; several lanes are in one each and share the rate.
        let open_frames = self.open_frame_count.load(Ordering::Relaxed) as u64;
        let unseen = open_frames.saturating_sub(1) * u64::from(HTTP2_FRAME_BYTES);
        match pace.verdict(Instant::now(), heard, unseen, turn) {
            Verdict::Fine => {}
            Verdict::TooSlow(time) => self.fail(SessionError::Slow(time.as_secs())),
            Verdict::Silent(time) => self.fail(SessionError::Idle(time.as_secs())),
        }
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

/// What becomes of the sender's opening before it is heeded, if anything: its names and
/// wishes are not always those that count here.
pub(crate) type Terms = Option<Arc<dyn Fn(Open) -> Result<Open, ProtocolError> + Send + Sync>>;

/// Takes in one lane: frames come in `body`, answers go to `out`. Returns once the
/// checkpoint is published, with what was said of it on the control lane, or when nothing
/// of the session is under way any more.
pub(crate) async fn receive(
    context: ReceiveContext,
    terms: Terms,
    mut body: Body,
    out: LaneSender,
) -> Result<Option<Done>, SessionError> {
    let mut parser = FrameParser::new(MAX_CONTROL_BYTES, MAX_CONTROL_BYTES);
    let patience = context.options.open_timeout;
    let mut draining = context.draining.clone();
    let first = tokio::select! {
        first = timeout(patience, read_first(&mut body, &mut parser)) => {
            first.map_err(|_| SessionError::Idle(patience.as_secs()))??
        }
        () = cancelled(&mut draining) => return Err(SessionError::Draining),
    };
    match first {
        First::Open(open) => {
            let session = receive_session(context, terms, *open, body, parser, out);
            session.await.map(Some)
        }
        First::Join(join) => {
            let session = context.sessions.get(&join.session_token)?;
            serve_joined(&session, &join, body, parser, out).await?;
            Ok(None)
        }
    }
}

/// Serves the control lane of a session, and with it the session.
async fn receive_session(
    context: ReceiveContext,
    terms: Terms,
    mut open: Open,
    body: Body,
    mut parser: FrameParser,
    out: LaneSender,
) -> Result<Done, SessionError> {
    let mut draining = context.draining.clone();
    if *draining.borrow_and_update() {
        return Err(SessionError::Draining);
    }
    check_supported(&open)?;
    check_open(context.options.rehearsal, &open)?;
    if let Some(terms) = terms {
        open = terms(open)?;
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
                    "disk" => Durability::Disk,
                    _ => Durability::Process,
                },
                stages: None,
            };
            send_control(&out, ReceiverControl::Done(done)).await?;
            return Ok(done);
        }
        Opened::Ready { staging, recovered } => (staging, recovered),
    };

    let chunk_len = staging.chunk_len();
    let grid = Grid::new(chunk_len).map_err(ProtocolError::from)?;
    let open = staging.options();
    // More lanes than there is memory for would only wait for each other.
    let held = context.budget.total_bytes() / (CHUNKS_PER_LANE * u64::from(chunk_len));
    let max_lanes = u32::try_from(held).unwrap_or(u32::MAX);
    let max_lanes = max_lanes.clamp(1, context.options.max_lanes.max(1));
    let core = Receiver::new(
        ReceiverConfig {
            grid,
            codecs: CODECS & open.codecs,
            max_lanes,
            commit: commit_policy(open.commit_mode),
            layout: open.layout,
            container_header_len: container_header_len(open),
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
        max_lanes,
        durable_bytes: core.durable_bytes(),
    };
    tracing::info!(
        checkpoint = %open.checkpoint,
        epoch = accept.epoch,
        durable_bytes = accept.durable_bytes,
        "a session was opened"
    );
    if let Some(progress) = &context.progress {
        progress.begin_receiving(&accept, promised_bytes(open));
    }
    let session = Arc::new(Session {
        progress: context.progress.clone(),
        teller: context.on_ready.clone().map(Teller::new),
        stages: ReceiveStages::new(&open.checkpoint),
        core: Mutex::new(core),
        staging,
        rehearsal: context.options.rehearsal,
        wake: Notify::new(),
        failure: Mutex::new(None),
        job_count: AtomicUsize::new(0),
        budget: context.budget.clone(),
        turns: Turns::default(),
        accept,
        turn: watch::Sender::new(()),
        over: watch::Sender::new(false),
        heard_bytes: AtomicU64::new(0),
        announced_bytes: AtomicU64::new(0),
        open_frame_count: AtomicUsize::new(0),
        short_of_memory_count: AtomicUsize::new(0),
    });
    send_control(&out, ReceiverControl::Accept(accept)).await?;
    set_limits(&mut parser, chunk_len);

    let listed = context.sessions.add(&session);
    // Whoever drops this call ends its lanes too.
    let over = Over(Arc::clone(&session));
    let mut lane = Some(Task::spawn(run_lane(Arc::clone(&session), 0, body, parser)));
    let pace = context.options.pace;
    let result = drive(&session, &out, &seat, &mut draining, &mut lane, pace).await;
    drop(listed);
    drop(over);
    // Dropping the lane's body tells the sender that nothing more is read.
    if let Some(mut lane) = lane {
        lane.abort();
        let _ = (&mut lane).await;
    }
    let result = match result {
        Ok(plan) => publish(&session, plan, &out, &seat).await,
        Err(error) => Err(error),
    };
    if let Err(error) = &result {
        end(&session, &out, error).await;
        if let Some(teller) = &session.teller {
            teller.stop();
        }
        session.tell_progress();
    }
    // The lock of the name goes before its seat, or the next session finds it locked.
    session.staging.unlock();
    drop(seat);
    result
}

/// Tells the lanes that joined that the session is over, however it ends.
struct Over(Arc<Session>);

impl Drop for Over {
    fn drop(&mut self) {
        self.0.over.send_replace(true);
    }
}

/// Bytes of all entries, where the sender knows them.
fn promised_bytes(open: &Open) -> u64 {
    match open.manifest {
        ManifestPromise::Complete { total_bytes, .. } => total_bytes,
        ManifestPromise::Open => 0,
    }
}

/// Drives the role until everything is to be published.
async fn drive(
    session: &Arc<Session>,
    out: &LaneSender,
    seat: &Seat,
    draining: &mut watch::Receiver<bool>,
    lane: &mut Option<Task<Result<(), SessionError>>>,
    limits: PaceLimits,
) -> Result<Box<PublishPlan>, SessionError> {
    let mut pace = Pace::new(limits, Instant::now());
    let mut pace_ticks = tokio::time::interval(limits.tick());
    pace_ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut superseded = seat.superseded.clone();
    let mut commit: Option<JoinHandle<()>> = None;
    loop {
        if let Some(error) = session.take_failure() {
            finish_commit(commit).await;
            return Err(error);
        }
        let (action, disk_wait) = {
            let mut core = session.core();
            (core.poll(Instant::now()), core.disk_wait())
        };
        session.stages.set_disk_wait(disk_wait);
        let complete = session.core().take_complete_at_start();
        tell_complete(session, complete).await;
        session.tell_progress();
        match action {
            Some(ReceiveAction::Send(frame)) => {
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
            Some(ReceiveAction::Publish(plan)) => {
                finish_commit(commit).await;
                // Paths that are told of are those of staging.
                if let Some(teller) = &session.teller {
                    teller.finish().await;
                }
                return match session.take_failure() {
                    Some(error) => Err(error),
                    None => Ok(plan),
                };
            }
            None => {}
        }
        session.turn.send_replace(());
        let wake_at = session.core().wake_at();
        tokio::select! {
            () = session.wake.notified() => {}
            () = sleep_until(wake_at) => {}
            _ = pace_ticks.tick() => session.check_pace(&mut pace),
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
    lane: &mut Option<Task<Result<(), SessionError>>>,
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
    let mut listens = true;
    loop {
        let action = session.core().poll(Instant::now());
        match action {
            Some(ReceiveAction::Commit(group)) => {
                finish_commit(Some(spawn_commit(session, group))).await
            }
            Some(ReceiveAction::Send(frame)) => {
                let bytes = encode_message(&encode_receiver_frame(&frame));
                // One that takes nothing in keeps the name locked once only.
                listens = listens
                    && timeout(Duration::from_secs(1), out.send([bytes]))
                        .await
                        .is_ok();
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
) -> Result<Done, SessionError> {
    let entry_count = plan.entries.len() as u64;
    let total_bytes = plan
        .entries
        .iter()
        .map(|(slot, ..)| slot.header.byte_len)
        .sum();
    let staging = Arc::clone(&session.staging);
    let manifest_blake3 = match session.rehearsal {
        // Its bytes are not what its sums say: it is never seen under a name.
        Some(_) => [0; 32],
        None => blocking(move || Ok(staging.publish(&plan)?)).await?,
    };
    if session.rehearsal.is_none() {
        seat.published();
        tracing::info!(entry_count, total_bytes, "a checkpoint was published");
    }
    let done = Done {
        unchanged: false,
        entry_count,
        total_bytes,
        manifest_blake3,
        durability: session.staging.durability(),
        stages: Some(session.stages.figures()),
    };
    // Published is published, whether or not the sender still listens.
    let told = send_control(out, ReceiverControl::Done(done)).await;
    if session.rehearsal.is_some() {
        return told.map(|()| done);
    }
    let staging = Arc::clone(&session.staging);
    if let Err(error) = blocking(move || Ok(staging.clean_up()?)).await {
        tracing::warn!(%error, "the staging of a published checkpoint could not be removed");
    }
    told.map(|()| done)
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
