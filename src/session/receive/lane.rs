//! One lane: frames in, chunk heads checked, memory reserved before it is used,
//! bytes collected as ropes, acks out.

use super::{
    Session,
    chunk::{Pending, take_payload},
};
use crate::{
    format::codec::Codec,
    protocol::{
        Arrival, Batch, ChunkHead, Join, MAX_CONTROL_BYTES, MAX_HEAD_BYTES, PipelineStage,
        ProtocolError, Reason, ReceiverControl, ReceiverFrame, SenderFrame,
    },
    session::error::SessionError,
    wire::{
        Event, FrameParser, LaneSender, Rope, decode_sender_frame, encode_message,
        encode_receiver_frame,
    },
};
use bytes::Bytes;
use http_body::Body as _;
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::time::timeout;
use tonic::body::Body;

/// A peer that takes no answer for this long is gone.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// What the slowest link that is allowed needs for one DATA frame.
const DATA_FRAME_TIME: Duration = Duration::from_secs(16);

/// What a chunk takes in memory beside its bytes: most of what a tiny one takes.
const CHUNK_OVERHEAD_BYTES: u64 = 512;

/// Limits of messages once the chunk length is known.
pub(super) fn set_limits(parser: &mut FrameParser, chunk_len: u32) {
    let max_message_bytes = chunk_len as usize + MAX_HEAD_BYTES;
    parser.set_limits(max_message_bytes, max_message_bytes.min(MAX_CONTROL_BYTES));
}

/// Serves a lane that joined a running session, until either ends. A lane that is
/// cut off takes nothing with it; one that breaks a rule ends the session.
pub(super) async fn serve_joined(
    session: &Arc<Session>,
    join: &Join,
    body: Body,
    mut parser: FrameParser,
    out: LaneSender,
) -> Result<(), SessionError> {
    let lane = join.lane;
    session.core().join(lane)?;
    tracing::debug!(lane, "a lane joined");
    set_limits(&mut parser, session.accept.chunk_len);
    let mut over = session.over.subscribe();
    let reading = async {
        run_lane(Arc::clone(session), lane, body, parser).await?;
        // Nothing more comes, but what came is still to be acked.
        std::future::pending::<Result<(), SessionError>>().await
    };
    let result = tokio::select! {
        result = reading => result,
        result = answer(session, lane, &out) => result,
        _ = over.wait_for(|over| *over) => Ok(()),
    };
    session.core().leave(lane);
    match result {
        Err(error) if !error.is_lost_connection() => {
            let status =
                SessionError::Protocol(ProtocolError::new(error.reason(), error.to_string()));
            session.fail(error);
            Err(status)
        }
        other => other,
    }
}

/// Sends what the role has to say on a lane other than lane 0.
async fn answer(session: &Session, lane: u32, out: &LaneSender) -> Result<(), SessionError> {
    let mut turn = session.turn.subscribe();
    send_control(out, ReceiverControl::Accept(session.accept)).await?;
    loop {
        turn.mark_unchanged();
        loop {
            let frame = session.core().poll_lane(lane, Instant::now());
            match frame {
                Some(frame) => send_frame(out, &frame).await?,
                None => break,
            }
        }
        // The session holds the other end as long as it lives.
        let _ = turn.changed().await;
    }
}

/// Reads one lane to its end.
pub(super) async fn run_lane(
    session: Arc<Session>,
    lane: u32,
    mut body: Body,
    mut parser: FrameParser,
) -> Result<(), SessionError> {
    let mut pending: Vec<Pending> = Vec::new();
    loop {
        let work = session.stages.work(PipelineStage::Receive);
        while let Some(event) = parser.next_event()? {
            match event {
                Event::Head { frame, payload_len } => {
                    let frame = decode_sender_frame(*frame)?;
                    pending = take_frame(&session, lane, frame, payload_len).await?;
                }
                Event::Payload(rope) => {
                    #[cfg(test)]
                    session.stages.slow_down(rope.len()).await;
                    take_payload(&session, std::mem::take(&mut pending), rope);
                }
            }
        }
        drop(work);
        // Memory is reserved for a frame that has begun: it must go on.
        let data = if parser.is_at_boundary() {
            next_data(&mut body).await?
        } else {
            let _open = Counted::new(&session.open_frame_count);
            // The lanes share the link, and each is in a frame of its own.
            let patience = (DATA_FRAME_TIME * session.core().lane_count()).max(STALL_TIMEOUT);
            timeout(patience, next_data(&mut body))
                .await
                .map_err(|_| SessionError::Idle(patience.as_secs()))??
        };
        match data {
            Some(data) => {
                let heard = data.len() as u64;
                session.heard_bytes.fetch_add(heard, Ordering::Relaxed);
                if let Some(progress) = &session.progress {
                    progress.count_heard(heard);
                }
                parser.feed(data);
            }
            None if parser.is_at_boundary() => return Ok(()),
            None => {
                return Err(SessionError::Disconnected(
                    "the stream ended inside a message".to_owned(),
                ));
            }
        }
    }
}

/// Counts for as long as it lives.
struct Counted<'a>(&'a AtomicUsize);

impl<'a> Counted<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Counted(count)
    }
}

impl Drop for Counted<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

async fn take_frame(
    session: &Arc<Session>,
    lane: u32,
    frame: SenderFrame,
    payload_len: usize,
) -> Result<Vec<Pending>, SessionError> {
    let bad_frame = |why: &str| SessionError::from(ProtocolError::new(Reason::BadFrame, why));
    if payload_len > 0 && !matches!(&frame, SenderFrame::Batch(batch) if !batch.chunks.is_empty()) {
        return Err(bad_frame("a payload came without chunks"));
    }
    if lane != 0
        && !matches!(&frame, SenderFrame::Batch(batch) if batch.entries.is_empty() && batch.sources.is_empty())
    {
        return Err(bad_frame("only chunks belong on a lane that joined"));
    }
    match frame {
        SenderFrame::Batch(batch) => return take_batch(session, lane, batch, payload_len).await,
        SenderFrame::Compare(compare) => {
            session.core().compare(&compare)?;
            let read = compare.hashes.len() as u64 * u64::from(session.accept.chunk_len);
            session.heard_bytes.fetch_add(read, Ordering::Relaxed);
        }
        SenderFrame::Finish(finish) => session.core().finish(finish)?,
        SenderFrame::Abort(abort) => return Err(SessionError::Aborted(abort)),
        SenderFrame::Open(_) => return Err(bad_frame("open came twice")),
        SenderFrame::Join(_) => return Err(bad_frame("join came after the first frame")),
    }
    session.wake.notify_one();
    Ok(Vec::new())
}

async fn take_batch(
    session: &Arc<Session>,
    lane: u32,
    batch: Batch,
    payload_len: usize,
) -> Result<Vec<Pending>, SessionError> {
    if lane == 0 {
        session.core().announce(&batch)?;
        let new_bytes = batch.entries.iter().map(|e| e.header.byte_len);
        let new_bytes = new_bytes.fold(0, u64::saturating_add);
        if new_bytes > 0 {
            let earlier = session
                .announced_bytes
                .fetch_add(new_bytes, Ordering::Relaxed);
            // A refusal, and no failure of the disk: what was written is still good.
            (session.staging.announced(earlier.saturating_add(new_bytes)))
                .map_err(|e| ProtocolError::new(e.reason(), e.to_string()))?;
        }
    }
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
    {
        let mut core = session.core();
        for head in &batch.chunks {
            tickets.push(match core.arrive(lane, head)? {
                Arrival::Take(ticket) => {
                    raw_bytes += u64::from(head.raw_len);
                    bytes += CHUNK_OVERHEAD_BYTES + memory_of(head);
                    Some(ticket)
                }
                Arrival::Duplicate => None,
            });
        }
    }
    // Chunks without payload make a short frame of any number of raw bytes.
    if raw_bytes > session.accept.window_bytes {
        let why = format!(
            "the chunks of a frame have {raw_bytes} raw bytes, the window is {}",
            session.accept.window_bytes
        );
        return Err(ProtocolError::new(Reason::TooLarge, why).into());
    }
    // At once: lanes that hold a part each and wait for more would wait forever.
    let short = Counted::new(&session.short_of_memory_count);
    let waiting = session.stages.short_of_memory();
    let reserved = Arc::new(session.budget.reserve(bytes).await);
    drop((short, waiting));
    let heads = tickets.into_iter().zip(&batch.chunks);
    let mut pending: Vec<Pending> = heads
        .map(|(ticket, head)| Pending::new(ticket, head, &reserved))
        .collect();
    session.wake.notify_one();
    if payload_len == 0 {
        // Chunks without bytes (all zero) are complete with their head.
        take_payload(session, std::mem::take(&mut pending), Rope::default());
    }
    Ok(pending)
}

/// Bytes that a chunk takes in memory on its way to the file.
fn memory_of(head: &ChunkHead) -> u64 {
    let (raw, encoded) = (u64::from(head.raw_len), u64::from(head.encoded_len));
    match Codec::from_id(head.codec) {
        // Written as it came, or from zeros that all chunks share.
        Some(Codec::None) => raw,
        Some(Codec::Zero) => 0,
        // Both the encoded and the decoded bytes are in memory for a while.
        _ => raw + encoded,
    }
}

/// The next piece of the request, or `None` at its end. A reset is an error,
/// never an end.
pub(super) async fn next_data(body: &mut Body) -> Result<Option<Bytes>, SessionError> {
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

pub(super) async fn send_control(
    out: &LaneSender,
    control: ReceiverControl,
) -> Result<(), SessionError> {
    send_frame(out, &ReceiverFrame::control(control)).await
}

pub(super) async fn send_frame(
    out: &LaneSender,
    frame: &ReceiverFrame,
) -> Result<(), SessionError> {
    let bytes = encode_message(&encode_receiver_frame(frame));
    match timeout(STALL_TIMEOUT, out.send([bytes])).await {
        Ok(Ok(())) => Ok(()),
        Ok(Err(_)) => Err(SessionError::Disconnected("the sender has gone".to_owned())),
        Err(_) => Err(SessionError::Idle(STALL_TIMEOUT.as_secs())),
    }
}
