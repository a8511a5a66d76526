//! Between a sender and a receiver that are both elsewhere: what one says is handed to
//! the other, lane by lane. Bytes of tensors pass through as they are and nothing of them
//! is kept; the receiver checks them, makes them durable and says so, to the sender.

use super::{
    error::SendError,
    progress::{ProgressCell, Stage},
    send::{SendLane, status_error},
};
use crate::{
    plan::{CHUNK_LEN_MAX, CellId, Grid, MAX_ENTRIES, MAX_ENTRY_BYTES, RangeSet},
    protocol::{
        Abort, Done, MAX_CONTROL_BYTES, MAX_HEAD_BYTES, ProtocolError, Reason, ReceiverControl,
        ReceiverFrame,
    },
    wire::{
        Event, FrameParser, LaneSender, Rope, decode_receiver_frame, encode_message, frame_head, pb,
    },
};
use http_body::Body as _;
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};
use tonic::{Status, body::Body};

/// Which of the two it was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RelayEnd {
    Sender,
    Receiver,
}

/// Why a relay ended early, and on which side.
#[derive(Debug, thiserror::Error)]
#[error("{error}")]
pub(crate) struct RelayError {
    pub(crate) end: RelayEnd,
    pub(crate) error: SendError,
}

impl RelayError {
    pub(crate) fn of_sender(error: impl Into<SendError>) -> Self {
        let error = error.into();
        let end = RelayEnd::Sender;
        RelayError { end, error }
    }

    pub(crate) fn of_receiver(error: impl Into<SendError>) -> Self {
        let error = error.into();
        let end = RelayEnd::Receiver;
        RelayError { end, error }
    }
}

/// What a sender says on one lane, message by message.
pub(crate) struct SenderFrames {
    body: Body,
    parser: FrameParser,
}

impl SenderFrames {
    pub(crate) fn new(body: Body) -> Self {
        let max_message_bytes = CHUNK_LEN_MAX as usize + MAX_HEAD_BYTES;
        SenderFrames {
            body,
            parser: FrameParser::new(max_message_bytes, MAX_CONTROL_BYTES),
        }
    }

    /// A frame with an empty payload, and its payload; `None` once the sender has ended
    /// the call in order.
    pub(crate) async fn next(&mut self) -> Result<Option<(pb::SenderFrame, Rope)>, SendError> {
        let mut head = None;
        loop {
            match self.parser.next_event()? {
                Some(Event::Head { frame, payload_len }) => match payload_len {
                    0 => return Ok(Some((*frame, Rope::default()))),
                    _ => head = Some(frame),
                },
                Some(Event::Payload(payload)) => {
                    let missing = || ProtocolError::new(Reason::BadFrame, "payload without head");
                    return Ok(Some((*head.ok_or_else(missing)?, payload)));
                }
                None => {
                    let body = &mut self.body;
                    let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx));
                    let Some(frame) = frame.await else {
                        return self.ended();
                    };
                    let frame = frame.map_err(|status| status_error(&status))?;
                    let status = frame.trailers_ref().and_then(Status::from_header_map);
                    if let Some(status) = status {
                        return match status.code() {
                            tonic::Code::Ok => self.ended(),
                            _ => Err(status_error(&status)),
                        };
                    }
                    if let Ok(data) = frame.into_data() {
                        self.parser.feed(data);
                    }
                }
            }
        }
    }

    fn ended(&self) -> Result<Option<(pb::SenderFrame, Rope)>, SendError> {
        match self.parser.is_at_boundary() {
            true => Ok(None),
            false => Err(SendError::Disconnected {
                message: "the stream ended within a message".to_owned(),
            }),
        }
    }
}

#[derive(Debug)]
struct Passing {
    byte_len: u64,
    is_tensor: bool,
    answered: bool,
    asked: RangeSet,
    durable: RangeSet,
}

#[derive(Debug, Default)]
struct Books {
    grid: Option<Grid>,
    total_bytes: u64,
    entries: Vec<Passing>,
    durable_bytes: u64,
}

/// What has passed so far, for the user who waits.
#[derive(Debug)]
pub(crate) struct Account {
    books: Mutex<Books>,
    progress: Arc<ProgressCell>,
}

impl Account {
    /// Of one session, in which so many bytes are to be there in the end.
    pub(crate) fn new(progress: Arc<ProgressCell>, total_bytes: u64) -> Self {
        Account {
            books: Mutex::new(Books {
                total_bytes,
                ..Books::default()
            }),
            progress,
        }
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tensors and side files that were announced.
    pub(crate) fn counts(&self) -> (u64, u64) {
        let books = self.books();
        let tensor_count = books.entries.iter().filter(|e| e.is_tensor).count();
        let file_count = books.entries.len() - tensor_count;
        (tensor_count as u64, file_count as u64)
    }

    /// The sender has said this.
    fn take_sent(&self, frame: &pb::SenderFrame) -> Result<(), ProtocolError> {
        let mut books = self.books();
        for entry in &frame.entries {
            let found = books.entries.len() as u64;
            if u64::from(entry.index) != found || found >= MAX_ENTRIES {
                let why = format!("entry {} was announced where {found} was due", entry.index);
                return Err(ProtocolError::new(Reason::BadFrame, why));
            }
            if entry.byte_len > MAX_ENTRY_BYTES {
                let why = format!("entry {found} of {} bytes", entry.byte_len);
                return Err(ProtocolError::new(Reason::BadShape, why));
            }
            books.entries.push(Passing {
                byte_len: entry.byte_len,
                is_tensor: entry.kind() == pb::EntryKind::Tensor,
                answered: false,
                asked: RangeSet::new(),
                durable: RangeSet::new(),
            });
        }
        for chunk in &frame.chunks {
            let entry = books.entries.get(chunk.entry as usize);
            // What is out of place the receiver will say.
            if let Some((entry, grid)) = entry.zip(books.grid)
                && let Some(cell) = grid.cell_at(entry.byte_len, chunk.offset)
            {
                let cell = CellId {
                    entry: chunk.entry,
                    cell,
                };
                self.progress
                    .count_sent(cell, chunk.raw_len, chunk.encoded_len);
            }
        }
        Ok(())
    }

    /// The receiver has said this on the control lane.
    fn take_heard(&self, frame: &ReceiverFrame) -> Result<(), ProtocolError> {
        let mut books = self.books();
        if let Some(ReceiverControl::Accept(accept)) = &frame.control {
            let grid = Grid::new(accept.chunk_len)?;
            books.grid = Some(grid);
            self.progress.begin_receiving(accept, books.total_bytes);
        }
        let Some(grid) = books.grid else {
            return Ok(());
        };
        let bytes = |byte_len: u64, cells: &RangeSet| -> u64 {
            let runs = cells.iter();
            runs.map(|r| grid.span_bytes(byte_len, r.start, r.end - r.start))
                .sum()
        };
        let mut fresh_bytes: u64 = 0;
        for wanted in &frame.wanted {
            let entry = books.entries.get_mut(wanted.entry as usize);
            let Some(entry) = entry.filter(|entry| !entry.answered) else {
                continue;
            };
            let all = RangeSet::of(0..grid.cell_count(entry.byte_len));
            if !all.is_superset(&wanted.wanted) || !all.is_superset(&wanted.held) {
                let why = "a wanted cell does not exist";
                return Err(ProtocolError::new(Reason::BadFrame, why));
            }
            entry.asked.union_with(&wanted.wanted);
            entry.asked.union_with(&wanted.held);
            if wanted.last {
                entry.answered = true;
                // What is asked for in no way is there.
                let there = entry.asked.missing_below(grid.cell_count(entry.byte_len));
                fresh_bytes = bytes(entry.byte_len, &there).saturating_add(fresh_bytes);
                entry.durable.union_with(&there);
            }
        }
        for durable in &frame.durable {
            let Some(entry) = books.entries.get_mut(durable.entry as usize) else {
                continue;
            };
            let all = RangeSet::of(0..grid.cell_count(entry.byte_len));
            let mut fresh = durable.ranges.intersection(&all);
            fresh.subtract(&entry.durable);
            fresh_bytes = bytes(entry.byte_len, &fresh).saturating_add(fresh_bytes);
            entry.durable.union_with(&fresh);
        }
        books.durable_bytes = books.durable_bytes.saturating_add(fresh_bytes);
        let durable_bytes = books.durable_bytes;
        self.progress.update(|p| {
            p.durable_bytes = p.durable_bytes.max(durable_bytes).min(p.total_bytes);
            p.settled_bytes = p.settled_bytes.max(p.durable_bytes);
        });
        Ok(())
    }
}

/// Hands over what the sender says on one lane, until it has no more to say.
async fn forward(
    account: &Account,
    frames: &mut SenderFrames,
    to_receiver: &LaneSender,
) -> Result<(), RelayError> {
    while let Some((frame, payload)) = frames.next().await.map_err(RelayError::of_sender)? {
        account.take_sent(&frame).map_err(RelayError::of_sender)?;
        if let Some(pb::sender_frame::Control::Finish(_)) = frame.control {
            account.progress.update(|p| p.stage = Stage::Publishing);
        }
        let head = frame_head(&frame, payload.len());
        let parts = std::iter::once(head).chain(payload.parts().cloned());
        // Why it takes no more it says on the way back.
        if to_receiver.send(parts).await.is_err() {
            return std::future::pending().await;
        }
    }
    Ok(())
}

/// Hands over what the receiver says on one lane. Returns what it says in the end.
async fn back(
    account: &Account,
    is_control: bool,
    frames: &mut tonic::Streaming<pb::ReceiverFrame>,
    to_sender: &LaneSender,
) -> Result<Option<Done>, RelayError> {
    loop {
        let frame = frames.message().await;
        let frame = frame.map_err(|status| RelayError::of_receiver(status_error(&status)))?;
        let Some(frame) = frame else { return Ok(None) };
        let message = encode_message(&frame);
        let frame = decode_receiver_frame(frame).map_err(RelayError::of_receiver)?;
        if is_control {
            account
                .take_heard(&frame)
                .map_err(RelayError::of_receiver)?;
        }
        // A sender that is gone says so, or is missed, on the way there.
        let _ = to_sender.send([message]).await;
        match frame.control {
            Some(ReceiverControl::Done(done)) => return Ok(Some(done)),
            Some(ReceiverControl::Abort(Abort { reason, message })) => {
                return Err(RelayError::of_receiver(SendError::Refused {
                    reason: reason.unwrap_or(Reason::Bug),
                    message,
                }));
            }
            Some(ReceiverControl::Accept(_)) | None => {}
        }
    }
}

/// Relays one lane until either side ends it.
pub(crate) async fn relay(
    account: &Account,
    is_control: bool,
    frames: &mut SenderFrames,
    to_sender: &LaneSender,
    receiver: &mut SendLane,
) -> Result<Option<Done>, RelayError> {
    let SendLane {
        out,
        frames: answers,
        ..
    } = receiver;
    tokio::select! {
        ended = back(account, is_control, answers, to_sender) => ended,
        ended = forward(account, frames, out) => {
            ended?;
            Err(RelayError::of_sender(SendError::Disconnected {
                message: "the sender closed the stream before the end".to_owned(),
            }))
        }
    }
}

/// Hears what the receiver has to say to the last, and passes it on to nobody.
pub(crate) async fn farewell(account: &Account, receiver: &mut SendLane) {
    while let Ok(Some(frame)) = receiver.frames.message().await {
        match decode_receiver_frame(frame) {
            Ok(frame) if account.take_heard(&frame).is_ok() => {}
            _ => return,
        }
    }
}
