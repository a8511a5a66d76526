//! The sending loop.
//!
//! The driver asks the role what to do next; cells are read by I/O threads into
//! pooled buffers, summed and encoded by CPU workers, and wait in one queue from
//! which every lane takes when it is free. On each lane one task hands chunks over in
//! the order in which the role counts them, and one takes in what comes back.

mod cell;
mod encoder;
mod flow;
mod lane;
mod lane_count;
mod status;

pub(crate) use self::status::status_error;
use self::{
    cell::{RUN_CELLS, SMALL_BYTES, prepare},
    encoder::Encoder,
    flow::Flow,
    lane::{Queue, adapt_count, keep_lane, write_chunks},
};
use super::{
    buffers::{Budget, BufferPool},
    error::SendError,
    progress::{ProgressCell, Stage},
    rate::Throttle,
    rehearsal::Rehearsal,
    stages::SendStages,
    task::Task,
    workers::on_io,
};
use crate::{
    format::{
        checksum,
        codec::{Codec, CodecChoice},
    },
    options::{CHUNKS_PER_LANE, LANES_MAX, Lanes},
    plan::{CellId, Digest16, Grid, SourceState},
    protocol::{
        Abort, Accept, Announcement, ChunkHead, Compare, Done, Finish, MAX_IN_FLIGHT_CELLS, Open,
        PipelineStage, ProtocolError, Reason, ReceiverControl, ReceiverFrame, SendAction, Sender,
        SenderConfig, SenderFrame,
    },
    source::{Extent, First, ReadMode, SourceEntry, Supply},
    wire::{
        LaneSender, decode_receiver_frame, encode_message, encode_sender_frame,
        encode_sources_and_entries, pb,
    },
};
use bytes::Bytes;
use prost::Message as _;
use std::{
    ops::Range,
    panic::{AssertUnwindSafe, catch_unwind},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError, atomic::AtomicU32},
    time::{Duration, Instant},
};
use tokio::{
    sync::{Notify, mpsc, watch},
    task::JoinSet,
    time::timeout,
};
use tonic::Streaming;

/// The receiver answers Open within this time: it may have to wait for the
/// writes of an older session.
const ACCEPT_TIMEOUT: Duration = Duration::from_secs(60);
/// After Done and after an interrupt the receiver has this long to end the call.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// The source is read this far ahead of the connections, or this many chunks where
/// they are long: what has not been sent is only a cost to caches and memory.
const READ_AHEAD_BYTES: u64 = 32 << 20;
const READ_AHEAD_CHUNKS: u64 = 8;
/// The window is at least this long, or this many chunks where they are long: what the
/// stages between the disks of both sides keep busy with, whatever the round trip.
const MIN_WINDOW_BYTES: u64 = 16 << 20;
const MIN_WINDOW_CHUNKS: u64 = 8;
/// Lanes that a push begins with when the user leaves it open, and at most for each core.
const AUTO_START_LANES: u32 = 2;
const MAX_LANES_PER_CORE: u32 = 4;
/// Bytes of announcements in one frame.
const ANNOUNCE_FRAME_BYTES: usize = 60 << 10;

/// Makes one more connection to the receiver.
pub(crate) type Connect = Arc<
    dyn Fn() -> Pin<Box<dyn Future<Output = Result<SendLane, SendError>> + Send>> + Send + Sync,
>;

/// What a session needs beside its connection.
#[derive(Clone)]
pub(crate) struct SendContext {
    pub(crate) source: Supply,
    pub(crate) connect: Connect,
    /// Connections wished, the control lane among them.
    pub(crate) lanes: Lanes,
    /// Shared by all sessions of the push.
    pub(crate) throttle: Arc<Throttle>,
    pub(crate) codec: CodecChoice,
    pub(crate) read_mode: ReadMode,
    /// What goes before the rest.
    pub(crate) first: Arc<First>,
    /// What is left out; `None` wherever bytes matter.
    pub(crate) rehearsal: Option<Rehearsal>,
    /// Memory for chunks on their way; half of it bounds the window.
    pub(crate) budget_bytes: u64,
    pub(crate) progress: Arc<ProgressCell>,
    /// Becomes true when the user wants to stop.
    pub(crate) cancel: watch::Receiver<bool>,
}

/// The connection of a session: what was opened and the two directions of the lane.
pub(crate) struct SendLane {
    pub(crate) out: LaneSender,
    pub(crate) frames: Streaming<pb::ReceiverFrame>,
    /// Keeps the connection open, or tells by its end that the lane is done with.
    pub(crate) _keeps: Box<dyn Send + Sync>,
}

struct Session {
    core: Mutex<Sender>,
    context: SendContext,
    pool: BufferPool,
    wake: Notify,
    failure: Mutex<Option<SendError>>,
    /// Becomes true with the first failure.
    failed: watch::Sender<bool>,
    done: Mutex<Option<Done>>,
    /// How much each lane may have under way. Locked after `core` where both are.
    flow: Mutex<Flow>,
    /// An ack came, or a lane is gone.
    acked: Notify,
    /// Lanes that take chunks; the others are idle.
    active_lanes: watch::Sender<u32>,
    /// As long as cells may be in flight, so it is never full.
    prepared: mpsc::Sender<Prepared>,
    encoder: Encoder,
    /// Bytes read and not yet handed to a connection.
    budget: Budget,
    stages: SendStages,
    session_token: Digest16,
    /// Number of the next lane.
    next_lane: AtomicU32,
    /// No payload was sent by this call before: what is there now was resumed.
    is_first: bool,
}

/// A cell ready to go.
#[derive(Debug)]
struct Prepared {
    cell: CellId,
    head: ChunkHead,
    bytes: Bytes,
}

impl Session {
    fn core(&self) -> MutexGuard<'_, Sender> {
        self.core.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn flow(&self) -> MutexGuard<'_, Flow> {
        self.flow.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_active_lanes(&self, count: u32) {
        self.flow().set_active(count);
        self.active_lanes.send_replace(count);
        self.acked.notify_waiters();
    }

    fn fail(&self, error: impl Into<SendError>) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(error.into());
        drop(failure);
        self.failed.send_replace(true);
        self.wake.notify_one();
    }

    fn take_failure(&self) -> Option<SendError> {
        self.failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }

    fn done(&self) -> Option<Done> {
        *self.done.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what came on a lane.
    fn take_answer(&self, lane: u32, frame: &ReceiverFrame) -> Result<(), ProtocolError> {
        let state = {
            let mut core = self.core();
            core.handle(lane, frame)?;
            self.stages.set_in_flight(core.in_flight_bytes());
            if let Some(settled_count) = frame.ack {
                let mut flow = self.flow();
                flow.acked(lane, settled_count, Instant::now());
                core.set_window_bytes(flow.window_bytes());
            }
            core.progress()
        };
        self.acked.notify_waiters();
        self.context.progress.set(state);
        if self.is_first {
            self.context
                .progress
                .update(|p| p.resumed_bytes = p.resumed_bytes.max(state.resumed_bytes));
        }
        Ok(())
    }

    /// Runs a job whose panic ends this session and nothing else.
    fn job(
        self: &Arc<Self>,
        on_pool: fn(Box<dyn FnOnce() + Send>),
        work: impl FnOnce(&Arc<Session>) + Send + 'static,
    ) {
        let session = Arc::clone(self);
        on_pool(Box::new(move || {
            if catch_unwind(AssertUnwindSafe(|| work(&session))).is_err() {
                session.fail(SendError::Bug("a worker panicked".to_owned()));
            }
        }));
    }
}

/// Runs one session to its end.
pub(crate) async fn send(
    context: SendContext,
    open: &Open,
    lane: SendLane,
) -> Result<Done, SendError> {
    let SendLane {
        out,
        mut frames,
        _keeps,
    } = lane;
    send_frame(&out, &SenderFrame::Open(Box::new(open.clone()))).await?;
    let mut cancel = context.cancel.clone();
    let first = tokio::select! {
        first = timeout(ACCEPT_TIMEOUT, frames.message()) => first.map_err(|_| SendError::Disconnected {
            message: format!("no answer to open for {} seconds", ACCEPT_TIMEOUT.as_secs()),
        })?,
        () = cancelled(&mut cancel) => return Err(SendError::Interrupted),
    };
    let accept = match take_control(first)? {
        ReceiverControl::Accept(accept) => accept,
        ReceiverControl::Done(done) => {
            context.progress.update(|p| p.session_count += 1);
            context.progress.finish(&done);
            return Ok(done);
        }
        ReceiverControl::Abort(abort) => return Err(refusal(abort)),
    };
    tracing::info!(
        epoch = accept.epoch,
        durable_bytes = accept.durable_bytes,
        chunk_len = accept.chunk_len,
        "the receiver accepted"
    );
    let grid = Grid::new(accept.chunk_len).map_err(ProtocolError::from)?;
    if accept.codecs & Codec::None.bit() == 0 {
        return Err(ProtocolError::new(
            Reason::BadCompression,
            "the receiver does not take raw chunks",
        )
        .into());
    }
    let (session, prepared) = start(context, open, &accept, grid);
    // All of them hold a lane: they must not outlive a push that is dropped.
    let mut reader = Task::spawn(read_frames(Arc::clone(&session), frames));
    let queue = Arc::new(tokio::sync::Mutex::new(Queue::new(
        prepared,
        accept.chunk_len,
    )));
    let mut writer = Task::spawn(write_chunks(
        Arc::clone(&session),
        0,
        0,
        out.clone(),
        Arc::clone(&queue),
    ));
    let mut lanes = JoinSet::new();
    let (start_count, max_count) = lane_counts(&session.context, &accept);
    session.set_active_lanes(start_count);
    for slot in 1..max_count {
        lanes.spawn(keep_lane(Arc::clone(&session), slot, Arc::clone(&queue)));
    }
    if start_count < max_count {
        lanes.spawn(adapt_count(Arc::clone(&session), start_count, max_count));
    }
    let mut cancel = session.context.cancel.clone();
    let mut failed = session.failed.subscribe();
    let result = tokio::select! {
        result = drive(&session, &out) => result,
        () = panicked(&mut reader) => Err(SendError::Bug("the reader of answers panicked".to_owned())),
        () = panicked(&mut writer) => Err(SendError::Bug("the writer of chunks panicked".to_owned())),
        // A receiver that reads nothing must not keep the user waiting.
        () = cancelled_for(&mut cancel, FAREWELL_TIMEOUT) => Err(SendError::Interrupted),
        // Nor may one that said why it gives up, and takes nothing any more.
        () = cancelled_for(&mut failed, FAREWELL_TIMEOUT) => {
            let lost = || SendError::Bug("a failure was lost".to_owned());
            Err(session.take_failure().unwrap_or_else(lost))
        }
    };
    session.context.progress.unfollow(None);
    let is_over = result.is_ok() || matches!(result, Err(SendError::Interrupted));
    if is_over && !reader.is_finished() {
        // The receiver commits and tells how far it got, or cleans up after Done;
        // the reader takes that in.
        let _ = timeout(FAREWELL_TIMEOUT, &mut reader).await;
    }
    result
}

/// Lanes at the start and at most, the control lane among them.
fn lane_counts(context: &SendContext, accept: &Accept) -> (u32, u32) {
    // The chunks may be longer than this side had reckoned with when it began.
    let held = context.budget_bytes / (CHUNKS_PER_LANE * u64::from(accept.chunk_len));
    let max = u32::try_from(held)
        .unwrap_or(u32::MAX)
        .min(accept.max_lanes)
        .clamp(1, LANES_MAX);
    match context.lanes {
        Lanes::Fixed(count) => (count.min(max), count.min(max)),
        Lanes::Auto => {
            let cores = std::thread::available_parallelism().map_or(1, |n| n.get() as u32);
            let max = max.min(cores.saturating_mul(MAX_LANES_PER_CORE));
            (cores.min(AUTO_START_LANES).min(max), max)
        }
    }
}

fn start(
    context: SendContext,
    open: &Open,
    accept: &Accept,
    grid: Grid,
) -> (Arc<Session>, mpsc::Receiver<Prepared>) {
    let max_window_bytes = accept
        .window_bytes
        .min(context.budget_bytes / 2)
        .max(u64::from(accept.chunk_len));
    let min_window_bytes = MIN_WINDOW_BYTES
        .max(u64::from(accept.chunk_len) * MIN_WINDOW_CHUNKS)
        .min(max_window_bytes);
    let flow = Flow::new(
        accept.chunk_len,
        min_window_bytes..=max_window_bytes,
        Instant::now(),
    );
    let window_bytes = flow.window_bytes();
    let read_ahead_bytes = READ_AHEAD_BYTES
        .max(u64::from(accept.chunk_len) * READ_AHEAD_CHUNKS)
        .min(context.budget_bytes);
    let core = Sender::new(SenderConfig { grid, window_bytes }, open.fingerprint);
    context.progress.update(|p| {
        p.stage = Stage::Sending;
        p.session_count += 1;
        p.durability = Some(accept.durability);
    });
    let (sender, prepared) = mpsc::channel(MAX_IN_FLIGHT_CELLS);
    let is_first = context.progress.snapshot().wire_bytes == 0;
    let stages = SendStages::new(&open.checkpoint);
    context.progress.follow(&stages);
    let session = Session {
        is_first,
        stages,
        core: Mutex::new(core),
        pool: BufferPool::new(accept.chunk_len as usize, read_ahead_bytes),
        encoder: Encoder::new(context.codec, accept.codecs & open.codecs),
        budget: Budget::new(read_ahead_bytes),
        context,
        wake: Notify::new(),
        failure: Mutex::new(None),
        failed: watch::Sender::new(false),
        done: Mutex::new(None),
        flow: Mutex::new(flow),
        acked: Notify::new(),
        active_lanes: watch::Sender::new(1),
        prepared: sender,
        session_token: accept.session_token,
        next_lane: AtomicU32::new(1),
    };
    (Arc::new(session), prepared)
}

/// Asks the role what to do until the checkpoint is published.
async fn drive(session: &Arc<Session>, out: &LaneSender) -> Result<Done, SendError> {
    let mut cancel = session.context.cancel.clone();
    let source = &session.context.source;
    let mut grown = source.watch();
    let mut source_count = 0;
    // What the role said after the last cell of a run.
    let mut ahead = None;
    take_entries(&session.context, &mut session.core());
    loop {
        if let Some(error) = session.take_failure() {
            tell_why(out, &error).await;
            return Err(error);
        }
        if let Some(done) = session.done() {
            session.context.progress.finish(&done);
            return Ok(done);
        }
        if *cancel.borrow() {
            tell_why(out, &SendError::Interrupted).await;
            return Err(SendError::Interrupted);
        }
        let action = match ahead.take() {
            Some(action) => Some(action),
            None => session.core().poll(),
        };
        match action {
            Some(SendAction::Announce(entries)) => {
                // Each source before the first entry that cites it.
                source_count += send_sources(session, out, source_count).await?;
                announce(session, out, entries).await?;
            }
            Some(SendAction::Send(cell)) => {
                let cells = take_run(session, cell, &mut ahead);
                let bytes = cells.iter().map(|(_, extent)| u64::from(extent.len)).sum();
                let in_flight_bytes = session.core().in_flight_bytes();
                session.stages.prepare(bytes, in_flight_bytes);
                session.stages.set_waiting(true, false);
                tokio::select! {
                    reserved = session.budget.reserve(bytes) => prepare(session, cells, reserved),
                    () = cancelled(&mut cancel) => {}
                }
                session.stages.set_waiting(false, false);
            }
            Some(SendAction::Compare { entry, cells }) => compare(session, out, entry, cells),
            Some(SendAction::Recheck { cell, sent_crc32c }) => recheck(session, cell, sent_crc32c),
            Some(SendAction::Finish(finish)) => finish_up(session, out, finish).await?,
            None => {
                let has_no_room = session.core().has_no_room();
                session.stages.set_waiting(has_no_room, !source.is_sealed());
                tokio::select! {
                    () = session.wake.notified() => {}
                    () = source.grown(&mut grown) => take_entries(&session.context, &mut session.core()),
                    () = cancelled(&mut cancel) => {}
                }
                session.stages.set_waiting(false, false);
            }
        }
    }
}

/// A cell together with the small ones that the role wants sent next.
fn take_run(
    session: &Session,
    first: CellId,
    ahead: &mut Option<SendAction>,
) -> Vec<(CellId, Extent)> {
    let mut core = session.core();
    let mut run: Vec<(CellId, Extent)> = Vec::new();
    let (mut next, mut bytes) = (first, 0);
    loop {
        let Some((offset, len)) = core.span(next) else {
            return run;
        };
        if len >= SMALL_BYTES && !run.is_empty() {
            *ahead = Some(SendAction::Send(next));
            return run;
        }
        let entry_index = next.entry as usize;
        run.push((
            next,
            Extent {
                entry_index,
                offset,
                len,
            },
        ));
        bytes += len as usize;
        // One more small cell still fits into a buffer of the pool.
        let is_full = bytes + SMALL_BYTES as usize > session.pool.buffer_len();
        if len >= SMALL_BYTES || is_full || run.len() >= RUN_CELLS {
            return run;
        }
        match core.poll() {
            Some(SendAction::Send(cell)) => next = cell,
            other => {
                *ahead = other;
                return run;
            }
        }
    }
}

/// Tells the role of entries that it does not know yet.
fn take_entries(context: &SendContext, core: &mut Sender) {
    let source = &context.source;
    // Asked first: entries that come in between are taken now or next time.
    let is_sealed = source.is_sealed();
    for index in core.entry_count()..source.entry_count() {
        if let Some(header) = source.with_entry(index, |entry| entry.header.clone()) {
            let is_first = context.first.is_first(index, &header.name);
            core.add(header, is_first);
        }
    }
    if is_sealed {
        core.seal();
    }
}

/// Sends the states of sources from number `sent_count` on. Returns how many.
async fn send_sources(
    session: &Session,
    out: &LaneSender,
    sent_count: usize,
) -> Result<usize, SendError> {
    let states = session.context.source.states_from(sent_count);
    // 70 bytes a source on the wire.
    let per_frame = ANNOUNCE_FRAME_BYTES / 70;
    for (i, part) in states.chunks(per_frame).enumerate() {
        let first = (sent_count + i * per_frame) as u32;
        let frame = encode_sources_and_entries(first, part as &[SourceState], 0, &[]);
        send_message(out, [encode_message(&frame)]).await?;
    }
    Ok(states.len())
}

async fn announce(
    session: &Session,
    out: &LaneSender,
    entries: Range<u32>,
) -> Result<(), SendError> {
    let source = &session.context.source;
    let mut batch = Vec::new();
    let (mut first, mut bytes) = (entries.start, 0);
    for index in entries {
        let number = index as usize;
        let look = |entry: &SourceEntry| {
            let is_first = session.context.first.is_first(number, &entry.header.name);
            announcement_of(entry, is_first)
        };
        let Some(announcement) = source.with_entry(number, look) else {
            break;
        };
        let frame = encode_sources_and_entries(0, &[], index, std::slice::from_ref(&announcement));
        let len = frame.encoded_len();
        if bytes + len > ANNOUNCE_FRAME_BYTES && !batch.is_empty() {
            let frame = encode_sources_and_entries(0, &[], first, &batch);
            send_message(out, [encode_message(&frame)]).await?;
            (first, bytes) = (index, 0);
            batch.clear();
        }
        bytes += len;
        batch.push(announcement);
    }
    let frame = encode_sources_and_entries(0, &[], first, &batch);
    send_message(out, [encode_message(&frame)]).await
}

fn announcement_of(entry: &SourceEntry, is_first: bool) -> Announcement {
    Announcement {
        header: entry.header.clone(),
        sources: entry.sources.clone(),
        source_name: entry.source_name.clone(),
        aliases: entry.aliases.clone(),
        crc32c: entry.crc32c,
        trainable: entry.trainable,
        is_first,
    }
}

/// Takes in what the receiver says until it ends the call.
async fn read_frames(session: Arc<Session>, mut frames: Streaming<pb::ReceiverFrame>) {
    loop {
        let frame = match frames.message().await {
            Ok(Some(frame)) => frame,
            Ok(None) => {
                if session.done().is_none() {
                    let message = "the receiver closed the stream before it was done".to_owned();
                    session.fail(SendError::Disconnected { message });
                }
                return;
            }
            Err(status) => {
                // After Done a broken connection changes nothing.
                if session.done().is_none() {
                    session.fail(status_error(&status));
                }
                return;
            }
        };
        if let Err(error) = take_frame(&session, frame) {
            session.fail(error);
            return;
        }
        session.wake.notify_one();
    }
}

fn take_frame(session: &Session, frame: pb::ReceiverFrame) -> Result<(), SendError> {
    let frame = decode_receiver_frame(frame)?;
    session.take_answer(0, &frame)?;
    match frame.control {
        None => Ok(()),
        Some(ReceiverControl::Done(done)) => {
            if !session.core().is_finishing() {
                return Err(ProtocolError::new(Reason::BadFrame, "done came before finish").into());
            }
            *session.done.lock().unwrap_or_else(PoisonError::into_inner) = Some(done);
            Ok(())
        }
        Some(ReceiverControl::Abort(abort)) => Err(refusal(abort)),
        Some(ReceiverControl::Accept(_)) => {
            Err(ProtocolError::new(Reason::BadFrame, "accept came twice").into())
        }
    }
}

/// Hashes held cells and sends their digests.
fn compare(session: &Arc<Session>, out: &LaneSender, entry: u32, cells: Range<u64>) {
    let out = out.clone();
    let runtime = tokio::runtime::Handle::current();
    session.job(on_io, move |session| {
        let mut hashes = Vec::new();
        let mut work = session.stages.work(PipelineStage::Read);
        for cell in cells.clone() {
            let span = session.core().span(CellId { entry, cell });
            let Some((offset, len)) = span else { return };
            let mut bytes = vec![0; len as usize];
            if let Err(error) = session
                .context
                .source
                .read_at(entry as usize, offset, &mut bytes)
            {
                return session.fail(error);
            }
            work.turn_to(PipelineStage::Checksum);
            hashes.push(*blake3::hash(&bytes).as_bytes());
            work.turn_to(PipelineStage::Read);
        }
        drop(work);
        let compare = Compare {
            entry,
            first_cell: cells.start,
            hashes,
        };
        runtime.spawn(async move {
            // A closed lane shows at the reader.
            let _ = send_frame(&out, &SenderFrame::Compare(compare)).await;
        });
    });
}

/// Reads a refused cell again: the same bytes were damaged on the way, others
/// mean that the source changed.
fn recheck(session: &Arc<Session>, cell: CellId, sent_crc32c: u32) {
    let span = session.core().span(cell);
    let Some((offset, len)) = span else { return };
    session.job(on_io, move |session| {
        let mut bytes = vec![0; len as usize];
        if let Err(error) = session
            .context
            .source
            .read_at(cell.entry as usize, offset, &mut bytes)
        {
            return session.fail(error);
        }
        let same = checksum::crc32c(&bytes) == sent_crc32c;
        let rechecked = session.core().rechecked(cell, same);
        if let Err(error) = rechecked {
            return session.fail(error);
        }
        session.wake.notify_one();
    });
}

async fn finish_up(
    session: &Arc<Session>,
    out: &LaneSender,
    finish: Finish,
) -> Result<(), SendError> {
    let source = session.context.source.clone();
    let unchanged = tokio::task::spawn_blocking(move || source.check_unchanged()).await;
    match unchanged {
        Ok(Ok(())) => {}
        Ok(Err(error)) => {
            session.fail(error);
            return Ok(());
        }
        Err(error) => {
            session.fail(SendError::Bug(error.to_string()));
            return Ok(());
        }
    }
    session
        .context
        .progress
        .update(|p| p.stage = Stage::Publishing);
    send_frame(out, &SenderFrame::Finish(finish)).await
}

/// Tells the receiver why the sender gives up, if it still listens.
async fn tell_why(out: &LaneSender, error: &SendError) {
    let reason = match error {
        SendError::Interrupted => Reason::Interrupted,
        SendError::Source(crate::source::SourceError::Changed { .. }) => Reason::SourceChanged,
        SendError::Source(_) => Reason::SourceIoError,
        SendError::Protocol(e) => e.reason,
        SendError::Bug(_) => Reason::Bug,
        SendError::Wire(_) => Reason::BadFrame,
        SendError::Refused { .. } | SendError::Disconnected { .. } => return,
    };
    let abort = Abort {
        reason: Some(reason),
        message: error.to_string(),
    };
    let _ = timeout(
        Duration::from_secs(1),
        send_frame(out, &SenderFrame::Abort(abort)),
    )
    .await;
}

async fn send_frame(out: &LaneSender, frame: &SenderFrame) -> Result<(), SendError> {
    send_message(out, [encode_message(&encode_sender_frame(frame))]).await
}

/// A lane that is closed is no error here: the reader learns why.
async fn send_message(out: &LaneSender, parts: [Bytes; 1]) -> Result<(), SendError> {
    let _ = out.send(parts).await;
    Ok(())
}

fn take_control(
    first: Result<Option<pb::ReceiverFrame>, tonic::Status>,
) -> Result<ReceiverControl, SendError> {
    let frame = first.map_err(|status| status_error(&status))?;
    let frame = frame.ok_or_else(|| SendError::Disconnected {
        message: "the receiver closed the stream without an answer".to_owned(),
    })?;
    let ReceiverFrame { control, .. } = decode_receiver_frame(frame)?;
    control.ok_or_else(|| {
        ProtocolError::new(Reason::BadFrame, "the first answer is not accept").into()
    })
}

fn refusal(abort: Abort) -> SendError {
    SendError::Refused {
        reason: abort.reason.unwrap_or(Reason::Bug),
        message: abort.message,
    }
}

/// Resolves when a task panicked; never when it ended in order.
async fn panicked(task: &mut Task<()>) {
    if task.await.is_ok() {
        std::future::pending::<()>().await;
    }
}

/// Resolves a while after the user wanted to stop.
async fn cancelled_for(cancel: &mut watch::Receiver<bool>, time: Duration) {
    cancelled(cancel).await;
    tokio::time::sleep(time).await;
}

/// Resolves when the user wants to stop; never when nobody can want it any more.
pub(crate) async fn cancelled(cancel: &mut watch::Receiver<bool>) {
    if cancel.wait_for(|c| *c).await.is_err() {
        std::future::pending::<()>().await;
    }
}
