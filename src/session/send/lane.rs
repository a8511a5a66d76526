//! The lanes of a sending session: chunks go to whichever is free, acks come back on
//! the lane that brought the chunks.

use super::{Prepared, SendLane, Session, refusal, send_frame, status_error, take_control};
use crate::{
    protocol::{Batch, Join, MAX_HEAD_BYTES, ProtocolError, Reason, ReceiverControl, SenderFrame},
    session::error::SendError,
    wire::{LaneSender, decode_receiver_frame, encode_sender_frame, frame_head, pb},
};
use bytes::Bytes;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
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
/// Pause before a lost lane is made again, doubled each time.
const REJOIN_PAUSE: Duration = Duration::from_millis(100);
/// Chunks in one frame.
const MAX_FRAME_CHUNKS: usize = 512;

/// Chunks waiting for a lane.
#[derive(Debug)]
pub(super) struct Queue {
    prepared: mpsc::UnboundedReceiver<Prepared>,
    /// Did not fit into the frame of its predecessors.
    next: Option<Prepared>,
    max_frame_bytes: u64,
}

impl Queue {
    pub(super) fn new(prepared: mpsc::UnboundedReceiver<Prepared>, chunk_len: u32) -> Self {
        Queue {
            prepared,
            next: None,
            max_frame_bytes: u64::from(chunk_len),
        }
    }

    /// The chunks of the next frame: one large or several small ones. `None` once
    /// the session is over.
    async fn take(&mut self) -> Option<Vec<Prepared>> {
        let first = match self.next.take() {
            Some(chunk) => chunk,
            None => self.prepared.recv().await?,
        };
        let mut bytes = u64::from(first.head.encoded_len);
        let mut chunks = vec![first];
        while chunks.len() < MAX_FRAME_CHUNKS && bytes < self.max_frame_bytes {
            let Ok(chunk) = self.prepared.try_recv() else {
                break;
            };
            bytes += u64::from(chunk.head.encoded_len);
            if bytes > self.max_frame_bytes {
                self.next = Some(chunk);
                break;
            }
            chunks.push(chunk);
        }
        Some(chunks)
    }
}

/// Hands prepared chunks to a lane until it is closed or the session is over.
pub(super) async fn write_chunks(
    session: Arc<Session>,
    lane: u32,
    out: LaneSender,
    queue: Arc<Mutex<Queue>>,
) {
    let load = session.stages.lane();
    // Between taking chunks and counting them as sent nothing is awaited: whenever
    // this task is stopped, each chunk is in the queue or in the role's books.
    while let Some(mut chunks) = { queue.lock().await.take().await } {
        let raw_bytes = chunks.iter().map(|c| u64::from(c.head.raw_len)).sum();
        let frame = load.take(raw_bytes);
        {
            let mut core = session.core();
            chunks.retain(|chunk| core.sent(lane, chunk.cell));
            session.stages.set_in_flight(core.in_flight_bytes());
        }
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

/// Keeps one further lane going as long as the session lives.
pub(super) async fn keep_lane(session: Arc<Session>, queue: Arc<Mutex<Queue>>) {
    let mut pause = REJOIN_PAUSE;
    for _ in 0..=MAX_LANE_LOSSES {
        let lane = session.next_lane.fetch_add(1, Ordering::Relaxed);
        match join(&session, lane, &queue).await {
            Err(SendError::Disconnected { message }) => {
                tracing::debug!(lane, message, "a lane was lost");
            }
            // A receiver that refuses a lane, or ends one, has its reasons: what
            // concerns the session is said on lane 0.
            Ok(()) | Err(SendError::Refused { .. }) => return,
            Err(error) => return session.fail(error),
        }
        sleep(pause).await;
        pause *= 2;
    }
}

/// One life of a lane. What was under way on it goes back to the others.
async fn join(
    session: &Arc<Session>,
    lane: u32,
    queue: &Arc<Mutex<Queue>>,
) -> Result<(), SendError> {
    let SendLane {
        out,
        mut frames,
        _channel,
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
    session.core().join(lane);
    let left = Leave { session, lane };
    let result = tokio::select! {
        result = read_acks(session, lane, &mut frames) => result,
        // A lane that takes no more is closed; the reader knows why.
        () = write_chunks(Arc::clone(session), lane, out, Arc::clone(queue)) => {
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
        self.session.core().leave(self.lane);
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
