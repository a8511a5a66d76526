//! The lanes of a sending session: chunks go to whichever is free, acks come back on
//! the lane that brought the chunks.

use super::{
    Prepared, SendLane, Session, flow::Verdict, lane_count::LaneCount, refusal, send_frame,
    status_error, take_control,
};
use crate::{
    protocol::{
        Batch, ChunkHead, Join, MAX_HEAD_BYTES, ProtocolError, Reason, ReceiverControl, SenderFrame,
    },
    session::{
        error::SendError,
        stages::{FrameOnLane, LaneLoad},
    },
    wire::{LaneSender, decode_receiver_frame, encode_sender_frame, frame_head, pb},
};
use bytes::Bytes;
use std::{
    pin::pin,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::{
    sync::{Mutex, mpsc},
    time::{sleep, timeout},
};
use tonic::Streaming;

/// The receiver takes a further lane within this time.
const JOIN_TIMEOUT: Duration = Duration::from_secs(15);
/// Times that a lane is made again after it was lost.
const MAX_LANE_LOSSES: u32 = 8;
/// A lane that lasted so long is no sign that the next one will be lost, too.
const LASTING_LANE: Duration = Duration::from_secs(30);
/// Pause before a lost lane is made again, doubled each time.
const REJOIN_PAUSE: Duration = Duration::from_millis(100);
/// A full lane looks again after this time even if nothing is heard.
const FULL_PATIENCE: Duration = Duration::from_secs(1);
/// How often the number of lanes is looked at.
const COUNT_INTERVAL: Duration = Duration::from_millis(250);
/// Chunks in one frame.
const MAX_FRAME_CHUNKS: usize = 512;

/// Chunks waiting for a lane.
#[derive(Debug)]
pub(super) struct Queue {
    prepared: mpsc::Receiver<Prepared>,
    /// Not taken yet, or did not fit into the frame of its predecessors.
    next: Option<Prepared>,
    max_frame_bytes: u64,
}

impl Queue {
    pub(super) fn new(prepared: mpsc::Receiver<Prepared>, chunk_len: u32) -> Self {
        Queue {
            prepared,
            next: None,
            max_frame_bytes: u64::from(chunk_len),
        }
    }

    /// Waits for a chunk; returns its encoded length. `None` once the session is over.
    async fn peek(&mut self) -> Option<u32> {
        if self.next.is_none() {
            self.next = Some(self.prepared.recv().await?);
        }
        self.next.as_ref().map(|chunk| chunk.head.encoded_len)
    }

    /// The chunks of the next frame: one large or several small ones.
    fn take(&mut self) -> Vec<Prepared> {
        let mut chunks = Vec::new();
        let mut bytes = 0;
        while chunks.len() < MAX_FRAME_CHUNKS {
            let next = self.next.take().or_else(|| self.prepared.try_recv().ok());
            let Some(chunk) = next else { break };
            bytes += u64::from(chunk.head.encoded_len);
            if bytes > self.max_frame_bytes && !chunks.is_empty() {
                self.next = Some(chunk);
                break;
            }
            chunks.push(chunk);
            if bytes >= self.max_frame_bytes {
                break;
            }
        }
        chunks
    }
}

/// Hands prepared chunks to a lane until it is closed or the session is over.
pub(super) async fn write_chunks(
    session: Arc<Session>,
    lane: u32,
    slot: u32,
    out: LaneSender,
    queue: Arc<Mutex<Queue>>,
) {
    let load = session.stages.lane();
    while let Some((chunks, frame)) = next_frame(&session, lane, slot, &queue, &load).await {
        if chunks.is_empty() {
            session.wake.notify_one();
            continue;
        }
        let payload_len = chunks.iter().map(|c| c.bytes.len()).sum();
        let progress = &session.context.progress;
        for Prepared { cell, head, .. } in &chunks {
            progress.count_sent(*cell, head.raw_len, head.encoded_len);
        }
        let batch = Batch {
            chunks: chunks.iter().map(|c| c.head).collect(),
            ..Batch::default()
        };
        let head = encode_sender_frame(&SenderFrame::Batch(batch));
        let head = frame_head(&head, payload_len);
        debug_assert!(head.len() <= MAX_HEAD_BYTES);
        #[cfg(test)]
        session.stages.slow_down(payload_len).await;
        let mut parts: Vec<Bytes> = std::iter::once(head)
            .chain(chunks.into_iter().map(|c| c.bytes))
            .collect();
        frame.end_with_last_of(&mut parts);
        if out.send(parts).await.is_err() {
            // The reader of the lane learns why.
            return;
        }
    }
}

/// The chunks of the next frame of a lane, which are on their way from now on. They
/// may be none, because all became durable meanwhile; `None` once the session is over.
async fn next_frame(
    session: &Session,
    lane: u32,
    slot: u32,
    queue: &Mutex<Queue>,
    load: &LaneLoad,
) -> Option<(Vec<Prepared>, FrameOnLane)> {
    let mut active = session.active_lanes.subscribe();
    loop {
        // The session holds the other end as long as it lives.
        active.wait_for(|count| slot < *count).await.ok()?;
        // From here on no ack is missed.
        let mut acked = pin!(session.acked.notified());
        acked.as_mut().enable();
        let patience = {
            let mut queue = queue.lock().await;
            let wire_len = queue.peek().await?;
            // The rate holds for all lanes together, so all may wait here.
            let limited = session.stages.limit_rate();
            session.context.throttle.ready().await;
            drop(limited);
            // Between taking chunks and counting them as sent nothing is awaited: whenever
            // this task is stopped, each chunk is in the queue or in the role's books.
            let now = Instant::now();
            let mut core = session.core();
            let mut flow = session.flow();
            match flow.verdict(lane, wire_len, core.remaining_bytes(), now) {
                Verdict::Take => {
                    let mut chunks = queue.take();
                    let raw_bytes = chunks.iter().map(|c| u64::from(c.head.raw_len)).sum();
                    let frame = load.take(raw_bytes);
                    let held_back = core.holds_back();
                    chunks.retain(|chunk| core.sent(lane, chunk.cell));
                    if held_back && !core.holds_back() {
                        session.wake.notify_one();
                    }
                    session.stages.set_in_flight(core.in_flight_bytes());
                    for ChunkHead {
                        encoded_len,
                        raw_len,
                        ..
                    } in chunks.iter().map(|c| c.head)
                    {
                        flow.sent(lane, encoded_len, raw_len, now);
                        session.context.throttle.take(u64::from(encoded_len));
                    }
                    return Some((chunks, frame));
                }
                Verdict::Full => FULL_PATIENCE,
                Verdict::Leave(patience) => patience,
            }
        };
        let _full = load.wait_full();
        let _ = timeout(patience, acked).await;
    }
}

/// Keeps one further lane going as long as the session lives, from the moment it is
/// wanted. One that is not wanted any more stays open and idle.
pub(super) async fn keep_lane(session: Arc<Session>, slot: u32, queue: Arc<Mutex<Queue>>) {
    let mut active = session.active_lanes.subscribe();
    if active.wait_for(|count| slot < *count).await.is_err() {
        return;
    }
    let (mut pause, mut loss_count) = (REJOIN_PAUSE, 0);
    while loss_count <= MAX_LANE_LOSSES {
        let lane = session.next_lane.fetch_add(1, Ordering::Relaxed);
        let begun = Instant::now();
        match join(&session, lane, slot, &queue).await {
            Err(SendError::Disconnected { message }) => {
                tracing::debug!(lane, message, "a lane was lost");
            }
            // The receiver may not have noticed yet that this slot's last lane is gone.
            Err(SendError::Refused {
                reason: Reason::TooMany,
                message,
            }) if loss_count > 0 => tracing::debug!(lane, message, "no room for a lane yet"),
            // A receiver that refuses a lane, or ends one, has its reasons: what
            // concerns the session is said on lane 0.
            Ok(()) | Err(SendError::Refused { .. }) => return,
            Err(error) => return session.fail(error),
        }
        if begun.elapsed() >= LASTING_LANE {
            (pause, loss_count) = (REJOIN_PAUSE, 0);
        }
        loss_count += 1;
        sleep(pause).await;
        pause *= 2;
    }
}

/// Adapts the number of lanes as long as the session lives.
pub(super) async fn adapt_count(session: Arc<Session>, start_count: u32, max_count: u32) {
    let mut lanes = LaneCount::new(start_count, max_count, Instant::now());
    let mut count = start_count;
    loop {
        sleep(COUNT_INTERVAL).await;
        let (acked_bytes, round_trip) = {
            let flow = session.flow();
            tracing::debug!(?flow, "lanes");
            (flow.acked_bytes(), flow.round_trip())
        };
        let wanted = lanes.tick(Instant::now(), acked_bytes, round_trip);
        if wanted != count {
            tracing::info!(lanes = wanted, "another number of lanes");
            count = wanted;
            session.set_active_lanes(count);
        }
    }
}

/// One life of a lane. What was under way on it goes back to the others.
async fn join(
    session: &Arc<Session>,
    lane: u32,
    slot: u32,
    queue: &Arc<Mutex<Queue>>,
) -> Result<(), SendError> {
    let SendLane {
        out,
        mut frames,
        _keeps,
    } = timeout(JOIN_TIMEOUT, (session.context.connect)())
        .await
        .map_err(|_| no_answer())??;
    let join = Join {
        session_token: session.session_token.to_vec(),
        lane,
    };
    send_frame(&out, &SenderFrame::Join(join)).await?;
    let first = timeout(JOIN_TIMEOUT, frames.message())
        .await
        .map_err(|_| no_answer())?;
    match take_control(first)? {
        ReceiverControl::Accept(_) => {}
        ReceiverControl::Abort(abort) => return Err(refusal(abort)),
        ReceiverControl::Done(_) => return Ok(()),
    }
    {
        let mut core = session.core();
        core.join(lane);
        session.flow().join(lane, slot, Instant::now());
    }
    let left = Leave { session, lane };
    let result = tokio::select! {
        result = read_acks(session, lane, &mut frames) => result,
        // A lane that takes no more is closed; the reader knows why.
        () = write_chunks(Arc::clone(session), lane, slot, out, Arc::clone(queue)) => {
            read_acks(session, lane, &mut frames).await
        }
    };
    drop(left);
    result
}

/// Takes a lane out of the role's books however its task ends.
struct Leave<'a> {
    session: &'a Session,
    lane: u32,
}

impl Drop for Leave<'_> {
    fn drop(&mut self) {
        {
            let mut core = self.session.core();
            core.leave(self.lane);
            self.session.flow().leave(self.lane);
        }
        // Others may have waited for what it was to take.
        self.session.acked.notify_waiters();
        self.session.wake.notify_one();
    }
}

async fn read_acks(
    session: &Session,
    lane: u32,
    frames: &mut Streaming<pb::ReceiverFrame>,
) -> Result<(), SendError> {
    loop {
        let frame = frames.message().await.map_err(|s| status_error(&s))?;
        let Some(frame) = frame else {
            return Ok(());
        };
        let frame = decode_receiver_frame(frame)?;
        if frame.control.is_some() {
            return Err(ProtocolError::new(
                Reason::BadFrame,
                format!("lane {lane} brings what belongs to the control lane"),
            )
            .into());
        }
        session.take_answer(lane, &frame)?;
        session.wake.notify_one();
    }
}

fn no_answer() -> SendError {
    SendError::Disconnected {
        message: format!("no answer to join for {} seconds", JOIN_TIMEOUT.as_secs()),
    }
}
