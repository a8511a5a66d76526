//! The gRPC service. Push and Pull are served on the raw HTTP/2 body, so that payload
//! bytes are never copied into messages; every other call goes to the generated code.

use super::unary::Unary;
use crate::{
    plan::{MAX_TEXT_LEN, printable},
    protocol::Reason,
    session::{OfferContext, ReceiveContext, SendError, Terms, offer, receive},
    source::SourceError,
    wire::{LaneBody, LaneSender, PULL_PATH, PUSH_PATH, pb::ferry_server::FerryServer, to_status},
};
use http::{HeaderMap, HeaderValue, Request, Response, header};
use std::{
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};
use tonic::{Status, body::Body, server::NamedService};
use tower_service::Service;

/// Both ways of serving under one service name.
#[derive(Clone)]
pub(super) struct FerryService {
    unary: FerryServer<Unary>,
    context: ReceiveContext,
    terms: Terms,
    /// `None` where nothing can be pulled.
    offers: Option<OfferContext>,
}

impl FerryService {
    pub(super) fn new(context: ReceiveContext, terms: Terms, offers: Option<OfferContext>) -> Self {
        let exports = offers.as_ref().map(|o| Arc::clone(&o.exports));
        let exports = exports.unwrap_or_default();
        FerryService {
            unary: FerryServer::new(Unary::new(context.clone(), exports)),
            context,
            terms,
            offers,
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
        let is_pull = request.uri().path() == PULL_PATH && self.offers.is_some();
        if request.uri().path() != PUSH_PATH && !is_pull {
            return Box::pin(self.unary.call(request));
        }
        let response = match (check_encoding(request.headers()), &self.offers) {
            (Err(response), _) => *response,
            (Ok(()), Some(offers)) if is_pull => {
                let offers = offers.clone();
                answer(|out| async {
                    let offered = offer(offers, request.into_body(), out).await;
                    offered.map_err(|error| (reason_of_send(&error), chain(&error)))
                })
            }
            (Ok(()), _) => {
                let (context, terms) = (self.context.clone(), self.terms.clone());
                answer(|out| async {
                    let received = receive(context, terms, request.into_body(), out).await;
                    received
                        .map(drop)
                        .map_err(|error| (error.reason(), chain(&error)))
                })
            }
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

/// Answers with the lane that a session fills, and its end.
fn answer<F>(session: impl FnOnce(LaneSender) -> F) -> Response<Body>
where
    F: Future<Output = Result<(), (Reason, String)>> + Send + 'static,
{
    let (out, response_body) = LaneBody::channel();
    let session = session(out.clone());
    tokio::spawn(async move {
        // The session runs in a task of its own: a panic in it ends this call only.
        let result = tokio::spawn(session).await;
        let result = result.unwrap_or_else(|e| Err((Reason::Bug, format!("internal error: {e}"))));
        end_call(&out, result).await;
    });
    let mut response = Response::new(Body::new(response_body));
    let grpc = HeaderValue::from_static("application/grpc");
    response.headers_mut().insert(header::CONTENT_TYPE, grpc);
    // A message may still turn out to be compressed, when the head has long left.
    announce_encodings(response.headers_mut());
    response
}

/// Why a pull ended early, for the one that pulls.
fn reason_of_send(error: &SendError) -> Reason {
    match error {
        SendError::Refused { reason, .. } => *reason,
        SendError::Protocol(error) => error.reason,
        SendError::Wire(error) => error.reason(),
        SendError::Source(SourceError::Changed { .. }) => Reason::SourceChanged,
        SendError::Source(_) => Reason::StorageIoError,
        SendError::Disconnected { .. } => Reason::Idle,
        // Only a server that shuts down interrupts what it sends.
        SendError::Interrupted => Reason::Draining,
        SendError::Bug(_) => Reason::Bug,
    }
}

async fn end_call(out: &LaneSender, result: Result<(), (Reason, String)>) {
    let status = match result {
        Ok(()) => Status::ok(""),
        Err((reason, why)) => {
            let why = printable(&why, MAX_TEXT_LEN);
            tracing::info!(%reason, error = %why, "a session ended early");
            to_status(reason, &why)
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
