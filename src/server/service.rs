//! The gRPC service. Push is served on the raw HTTP/2 body, so that payload bytes
//! are never copied into messages; every other call goes to the generated code.

use super::unary::Unary;
use crate::{
    plan::{CheckpointName, MAX_TEXT_LEN, printable},
    protocol::Reason,
    session::{ReceiveContext, SessionError, receive},
    wire::{LaneBody, LaneSender, PUSH_PATH, pb::ferry_server::FerryServer, to_status},
};
use http::{HeaderMap, HeaderValue, Request, Response, header};
use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    task::{Context, Poll},
};
use tonic::{Status, body::Body, server::NamedService};
use tower_service::Service;

/// Both ways of serving under one service name.
#[derive(Clone, Debug)]
pub(super) struct FerryService {
    unary: FerryServer<Unary>,
    context: ReceiveContext,
    alias: Option<(CheckpointName, CheckpointName)>,
}

impl FerryService {
    pub(super) fn new(
        context: ReceiveContext,
        alias: Option<(CheckpointName, CheckpointName)>,
    ) -> Self {
        FerryService {
            unary: FerryServer::new(Unary::new(context.clone())),
            context,
            alias,
        }
    }
}

impl NamedService for FerryService {
    const NAME: &'static str = <FerryServer<Unary> as NamedService>::NAME;
}

impl Service<Request<Body>> for FerryService {
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Service::<Request<Body>>::poll_ready(&mut self.unary, cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if request.uri().path() != PUSH_PATH {
            return Box::pin(self.unary.call(request));
        }
        let response = match check_encoding(request.headers()) {
            Ok(()) => serve_push(
                self.context.clone(),
                self.alias.clone(),
                request.into_body(),
            ),
            Err(response) => *response,
        };
        Box::pin(std::future::ready(Ok(response)))
    }
}

/// Message compression would cost a copy and a bomb; chunks have their own codecs.
fn check_encoding(headers: &HeaderMap) -> Result<(), Box<Response<Body>>> {
    match headers.get("grpc-encoding") {
        Some(encoding) if encoding != "identity" => {
            let message = "compressed messages are not accepted: send grpc-encoding identity";
            let mut response = to_status(Reason::Unsupported, message).into_http::<Body>();
            announce_encodings(response.headers_mut());
            Err(Box::new(response))
        }
        _ => Ok(()),
    }
}

/// Says which message encodings a client may use: none.
fn announce_encodings(headers: &mut HeaderMap) {
    let identity = HeaderValue::from_static("identity");
    headers.insert("grpc-accept-encoding", identity);
}

fn serve_push(
    context: ReceiveContext,
    alias: Option<(CheckpointName, CheckpointName)>,
    body: Body,
) -> Response<Body> {
    let (out, response_body) = LaneBody::channel();
    tokio::spawn(async move {
        // The session runs in a task of its own: a panic in it ends this call only.
        let session = tokio::spawn(receive(context, alias, body, out.clone()));
        let result = session
            .await
            .unwrap_or_else(|e| Err(SessionError::Bug(e.to_string())));
        end_call(&out, result).await;
    });
    let mut response = Response::new(Body::new(response_body));
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(header::CONTENT_TYPE, grpc);
    // A message may still turn out to be compressed, when the head has long left.
    announce_encodings(response.headers_mut());
    response
}

async fn end_call(out: &LaneSender, result: Result<(), SessionError>) {
    let status = match result {
        Ok(()) => Status::ok(""),
        Err(error) => {
            let why = printable(&chain(&error), MAX_TEXT_LEN);
            tracing::info!(reason = %error.reason(), error = %why, "a session ended early");
            to_status(error.reason(), &why)
        }
    };
    let mut trailers = HeaderMap::new();
    if status.add_header(&mut trailers).is_ok() {
        let _ = out.send_trailers(trailers).await;
    }
}

/// An error with its causes on one line.
fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = error.to_string();
        if !text.ends_with(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
#[path = "service_tests.rs"]
mod tests;
