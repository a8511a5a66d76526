//! Connections to this very machine: there is no network whose sharing would have to be
//! controlled, and what controls it only costs.

use crate::wire::FileStream;
use http::Uri;
use hyper_util::{client::legacy::connect::HttpConnector, rt::TokioIo};
use rustix::net::sockopt;
use std::{
    error::Error,
    pin::Pin,
    task::{Context, Poll},
};
use tokio::net::TcpStream;

/// Congestion control that every Linux has and every user may choose. On loopback nothing
/// is lost and nothing is far: what paces its packets (BBR) spends a fifteenth of the
/// processor time of a whole push on timers (docs/figures.md).
const UNPACED: &str = "reno";

/// Takes the pacing off a connection that stays on this machine.
pub(crate) fn unpace(stream: &TcpStream) {
    let is_local = stream
        .peer_addr()
        .is_ok_and(|peer| peer.ip().to_canonical().is_loopback());
    if is_local {
        // A wish: the connection works all the same.
        let _ = sockopt::set_tcp_congestion(stream, UNPACED);
    }
}

/// Connects as tonic would, and looks at where the connection goes.
#[derive(Clone, Debug)]
pub(crate) struct Connector {
    http: HttpConnector,
}

impl Connector {
    pub(crate) fn new() -> Self {
        let mut http = HttpConnector::new();
        // The scheme is the endpoint's business.
        http.enforce_http(false);
        http.set_nodelay(true);
        Connector { http }
    }
}

impl tower_service::Service<Uri> for Connector {
    type Response = TokioIo<FileStream>;
    type Error = Box<dyn Error + Send + Sync>;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.http.poll_ready(cx).map_err(Into::into)
    }

    fn call(&mut self, uri: Uri) -> Self::Future {
        let connecting = self.http.call(uri);
        Box::pin(async move {
            let stream = connecting.await?;
            let tcp = stream.into_inner();
            unpace(&tcp);
            Ok(TokioIo::new(FileStream::new(tcp)))
        })
    }
}
