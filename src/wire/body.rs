//! The request or response body of a lane: frames of refcounted bytes that go
//! to the connection without being copied.

use bytes::{BufMut, Bytes, BytesMut};
use http_body::{Body, Frame};
use prost::Message;
use std::{
    collections::VecDeque,
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::sync::{mpsc, watch};

/// Messages that may wait between a session and its connection.
const QUEUE_LEN: usize = 8;

/// One gRPC message with its prefix.
pub(crate) fn encode_message(message: &impl Message) -> Bytes {
    let len = message.encoded_len();
    let mut out = BytesMut::with_capacity(len + 5);
    out.put_u8(0);
    out.put_u32(len as u32);
    // Cannot fail: the buffer grows.
    let _ = message.encode(&mut out);
    out.freeze()
}

/// Prefix and head of a message whose payload of `payload_len` bytes follows as
/// frames of their own.
pub(crate) fn frame_head(head: &impl Message, payload_len: usize) -> Bytes {
    let head_len = head.encoded_len();
    let tag_len = match payload_len {
        0 => 0,
        n => 1 + prost::length_delimiter_len(n),
    };
    let mut out = BytesMut::with_capacity(head_len + tag_len + 5);
    out.put_u8(0);
    out.put_u32((head_len + tag_len + payload_len) as u32);
    let _ = head.encode(&mut out);
    if payload_len > 0 {
        out.put_u8(15 << 3 | 2);
        prost::encoding::encode_varint(payload_len as u64, &mut out);
    }
    out.freeze()
}

/// One entry of the queue. A message is one entry, so that messages of several
/// tasks never mix.
#[derive(Debug)]
enum Item {
    Message(VecDeque<Bytes>),
    Trailers(http::HeaderMap),
}

/// Body of one direction of a lane.
#[derive(Debug)]
pub(crate) struct LaneBody {
    items: mpsc::Receiver<Item>,
    /// Rest of the message under way.
    parts: VecDeque<Bytes>,
    /// Ends with the body.
    _over: watch::Sender<()>,
}

impl LaneBody {
    /// A body and the handle that fills it.
    pub(crate) fn channel() -> (LaneSender, LaneBody) {
        let (sender, items) = mpsc::channel(QUEUE_LEN);
        let (over_sender, over) = watch::channel(());
        let body = LaneBody {
            items,
            parts: VecDeque::new(),
            _over: over_sender,
        };
        let items = sender;
        (LaneSender { items, over }, body)
    }
}

impl Body for LaneBody {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        loop {
            if let Some(part) = self.parts.pop_front() {
                return Poll::Ready(Some(Ok(Frame::data(part))));
            }
            match std::task::ready!(self.items.poll_recv(cx)) {
                Some(Item::Message(parts)) => self.parts = parts,
                Some(Item::Trailers(trailers)) => {
                    return Poll::Ready(Some(Ok(Frame::trailers(trailers))));
                }
                None => return Poll::Ready(None),
            }
        }
    }
}

/// The other side has gone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LaneClosed;

/// Fills a [`LaneBody`].
#[derive(Clone, Debug)]
pub(crate) struct LaneSender {
    items: mpsc::Sender<Item>,
    over: watch::Receiver<()>,
}

impl LaneSender {
    /// Sends one message whose parts are given in order.
    pub(crate) async fn send(
        &self,
        parts: impl IntoIterator<Item = Bytes>,
    ) -> Result<(), LaneClosed> {
        // An empty DATA frame would count against the peer's flood budget.
        let parts = parts.into_iter().filter(|p| !p.is_empty()).collect();
        self.items
            .send(Item::Message(parts))
            .await
            .map_err(|_| LaneClosed)
    }

    /// Whether the connection takes nothing any more.
    pub(crate) fn is_closed(&self) -> bool {
        self.items.is_closed()
    }

    /// Waits until the connection has taken everything, or is gone. Nobody else may hold
    /// a sender then.
    pub(crate) async fn drained(self) {
        let LaneSender { items, mut over } = self;
        drop(items);
        while over.changed().await.is_ok() {}
    }

    /// Ends a response.
    pub(crate) async fn send_trailers(&self, trailers: http::HeaderMap) -> Result<(), LaneClosed> {
        self.items
            .send(Item::Trailers(trailers))
            .await
            .map_err(|_| LaneClosed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::pb;

    #[test]
    fn a_head_and_its_payload_are_what_prost_would_write() {
        for len in [0usize, 1, 127, 128, 300, 70_000] {
            let payload = Bytes::from(vec![7u8; len]);
            let mut frame = pb::SenderFrame {
                chunks: vec![pb::ChunkHead {
                    entry: 9,
                    ..Default::default()
                }],
                ..Default::default()
            };
            let mut ours = frame_head(&frame, len).to_vec();
            ours.extend_from_slice(&payload);
            frame.payload = payload;
            assert_eq!(ours, encode_message(&frame), "{len}");
        }
    }
}
