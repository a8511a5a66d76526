//! A push as bytes, for messages that a gRPC library would not send.

use super::{Ending, TestServer, code_and_reason};
use bytes::{Bytes, BytesMut};
use http_body::{Body as _, Frame};
use prost::Message as _;
use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::Pin,
    task::{Context, Poll},
};
use tensorferry::wire::pb;
use tokio::sync::mpsc;
use tonic::{
    Status,
    body::Body,
    transport::{Channel, Endpoint},
};
use tower_service::Service as _;

/// A request body that is given piece by piece.
struct Pieces(mpsc::UnboundedReceiver<Bytes>);

impl http_body::Body for Pieces {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = std::task::ready!(self.0.poll_recv(cx));
        Poll::Ready(piece.map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// A push whose bytes are the test's own.
pub(crate) struct RawCall {
    out: Option<mpsc::UnboundedSender<Bytes>>,
    answer: Result<Body, Status>,
    heard: BytesMut,
}

impl RawCall {
    pub(crate) async fn begin(channel: &mut Channel, encoding: Option<&'static str>) -> RawCall {
        let (out, pieces) = mpsc::unbounded_channel();
        let mut request = http::Request::post("/tensorferry.v1.Ferry/Push")
            .header("te", "trailers")
            .header("content-type", "application/grpc");
        if let Some(encoding) = encoding {
            request = request.header("grpc-encoding", encoding);
        }
        let request = request.body(Body::new(Pieces(pieces))).unwrap();
        std::future::poll_fn(|cx| channel.poll_ready(cx))
            .await
            .unwrap();
        let answer = match channel.call(request).await {
            Ok(response) => match Status::from_header_map(response.headers()) {
                Some(status) => Err(status),
                None => Ok(response.into_body()),
            },
            Err(error) => Err(Status::unavailable(error.to_string())),
        };
        RawCall {
            out: Some(out),
            answer,
            heard: BytesMut::new(),
        }
    }

    /// Sends bytes as they are. That the call is over shows when it is read.
    pub(crate) fn send(&self, bytes: impl Into<Bytes>) {
        if let Some(out) = &self.out {
            let _ = out.send(bytes.into());
        }
    }

    /// Half-closes.
    pub(crate) fn close(&mut self) {
        self.out = None;
    }

    /// The next message, or how the call ended.
    pub(crate) async fn next(&mut self) -> Result<pb::ReceiverFrame, Status> {
        loop {
            if let Some(frame) = self.take_message() {
                return Ok(frame);
            }
            let body = match &mut self.answer {
                Ok(body) => body,
                Err(status) => return Err(status.clone()),
            };
            let frame = std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await;
            let ended = match frame {
                None => Status::unavailable("the response has no trailers"),
                Some(Err(status)) => status,
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        self.heard.extend_from_slice(&data);
                        continue;
                    }
                    Err(frame) => frame
                        .trailers_ref()
                        .and_then(Status::from_header_map)
                        .expect("trailers carry a status"),
                },
            };
            self.answer = Err(ended);
        }
    }

    fn take_message(&mut self) -> Option<pb::ReceiverFrame> {
        let len = u32::from_be_bytes(self.heard.get(1..5)?.try_into().unwrap()) as usize;
        if self.heard.len() < 5 + len {
            return None;
        }
        let message = self.heard.split_to(5 + len).split_off(5);
        Some(pb::ReceiverFrame::decode(message).expect("the server sends protobuf"))
    }

    /// Reads to the end.
    pub(crate) async fn end(&mut self) -> Ending {
        loop {
            match self.next().await {
                Ok(_) => {}
                Err(status) if status.code() == tonic::Code::Ok => return Ok(()),
                Err(status) => return Err(code_and_reason(&status)),
            }
        }
    }
}

/// A connection of its own.
pub(crate) async fn connect(address: SocketAddr) -> Channel {
    let endpoint = Endpoint::from_shared(format!("http://{address}")).unwrap();
    endpoint.connect().await.unwrap()
}

/// One message with its gRPC prefix.
pub(crate) fn message(frame: &pb::SenderFrame) -> Vec<u8> {
    let body = frame.encode_to_vec();
    [&[0], &(body.len() as u32).to_be_bytes()[..], &body].concat()
}

/// Sends these bytes as the whole request of a push and says how it ended.
pub(crate) async fn raw_push(
    server: &TestServer,
    encoding: Option<&'static str>,
    bytes: Vec<u8>,
) -> Ending {
    let mut channel = connect(server.address).await;
    let mut call = RawCall::begin(&mut channel, encoding).await;
    call.send(bytes);
    call.close();
    call.end().await
}
