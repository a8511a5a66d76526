//! A push as bytes, for messages that a gRPC library would not send.

use super::{Ending, TestServer, code_and_reason};
use bytes::Bytes;
use http_body::{Body as _, Frame};
use std::{
    convert::Infallible,
    pin::Pin,
    task::{Context, Poll},
};
use tonic::{Status, body::Body, transport::Endpoint};
use tower_service::Service as _;

/// A request body of one piece.
struct Once(Option<Bytes>);

impl http_body::Body for Once {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        Poll::Ready(self.0.take().map(|bytes| Ok(Frame::data(bytes))))
    }
}

/// Sends these bytes as the whole request of a push and says how it ended.
pub(crate) async fn raw_push(
    server: &TestServer,
    encoding: Option<&'static str>,
    bytes: Vec<u8>,
) -> Ending {
    let endpoint = Endpoint::from_shared(format!("http://{}", server.address)).unwrap();
    let mut channel = endpoint.connect().await.unwrap();
    let mut request = http::Request::post("/tensorferry.v1.Ferry/Push")
        .header("te", "trailers")
        .header("content-type", "application/grpc");
    if let Some(encoding) = encoding {
        request = request.header("grpc-encoding", encoding);
    }
    let request = request.body(Body::new(Once(Some(bytes.into())))).unwrap();
    std::future::poll_fn(|cx| channel.poll_ready(cx))
        .await
        .unwrap();
    let response = channel.call(request).await.unwrap();
    assert_eq!(response.headers()["grpc-accept-encoding"], "identity");
    if let Some(status) = Status::from_header_map(response.headers()) {
        return Err(code_and_reason(&status));
    }
    let mut body = response.into_body();
    loop {
        let frame = std::future::poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)).await;
        let frame = frame.expect("trailers come before the end").unwrap();
        if let Some(trailers) = frame.trailers_ref() {
            let status = Status::from_header_map(trailers).unwrap();
            return if status.code() == tonic::Code::Ok {
                Ok(())
            } else {
                Err(code_and_reason(&status))
            };
        }
    }
}
