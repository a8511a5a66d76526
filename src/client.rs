//! The client: reaches a server, pushes, asks.

use crate::{
    attempts::Attempts,
    error::Error,
    loopback::Connector,
    open_push::OpenPush,
    opening::{fingerprint, open_of_key, open_of_set, transfer_id},
    options::{
        HTTP2_FRAME_BYTES, HTTP2_WINDOW_BYTES, KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT, PushOptions,
        RateLimit,
    },
    plan::{CheckpointName, EntryKind, digest_entries},
    protocol::{Done, Open, OutFormat, Reason},
    session::{
        Connect, ProgressCell, REHEARSAL_FORMAT, Rehearsal, SendContext, SendError, SendLane,
        Stage, Task, Throttle, cancelled, read_rate, send, status_error,
    },
    source::{First, Globs, GrowingSource, SourceError, SourceSet, Supply},
    store::hex,
    transfer::{Transfer, TransferReport},
    wire::{LaneBody, LaneSender, PUSH_PATH, pb},
};
use http::{HeaderValue, Request, Response, Version, header};
use std::{
    collections::BTreeMap,
    future::poll_fn,
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::sync::watch;
use tonic::{
    Status, Streaming,
    body::Body,
    transport::{Channel, Endpoint},
};
use tower_service::Service as _;

/// Port of a server that names none.
pub const DEFAULT_PORT: u16 = 7744;
/// A server must take the connection within this time.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// A server, by address. Connections are made when they are needed.
///
/// ```
/// use tensorferry::{Client, ErrorCode, PushOptions, SourceSet};
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temp = tempfile::tempdir()?;
/// # let model = temp.path().join("w.npy");
/// # let header = tensorferry::format::npy::encode_header("|u1", false, &[1 << 20]);
/// # std::fs::write(&model, [header, vec![7; 1 << 20]].concat())?;
/// # let server = tensorferry::Server::builder(temp.path().join("root"));
/// # let server = server.bind(([127, 0, 0, 1], 0).into()).await?;
/// # let address = server.local_addr().to_string();
/// # tokio::spawn(server.serve(std::future::pending()));
/// let client = Client::new(&address)?;
/// let name = "runs/7".parse()?;
/// let unknown = client.status(&name).await.unwrap_err();
/// assert_eq!(unknown.code(), ErrorCode::SourceMissing);
///
/// let source = SourceSet::open(&[model], &Default::default())?;
/// let report = client.push(source, &name, PushOptions::default()).await?;
/// assert_eq!((report.bytes, report.resumed_bytes), (1 << 20, 0));
///
/// assert!(client.status(&name).await?.published);
/// let rows = client.list("runs/").await?;
/// assert!(rows.iter().any(|row| row.name == "runs/7" && row.total_bytes == 1 << 20));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    endpoint: Endpoint,
    authority: String,
}

/// A published checkpoint or an unfinished transfer on a server.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CheckpointSummary {
    /// Its name.
    pub name: String,
    /// Complete under its name, or still in staging.
    pub published: bool,
    /// It lies elsewhere, and the server offers it to those who pull.
    pub offered: bool,
    /// Tensors and side files.
    pub entry_count: u64,
    /// Raw bytes known so far.
    pub total_bytes: u64,
    /// Raw bytes that are durable.
    pub durable_bytes: u64,
    /// A session is running now.
    pub active: bool,
    /// Seconds since 1970 of the last change.
    pub modified_unix_seconds: u64,
    /// Whose an unfinished transfer is: hex digits that are the same for the same sender,
    /// sources and options. Nothing else of its sender is kept.
    pub owner: Option<String>,
}

/// What a server or folder has under one name.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct CheckpointStatus {
    /// A complete checkpoint stands under the name.
    pub published: bool,
    /// The unfinished transfer into the name: a first one, or one that is to
    /// replace what stands there.
    pub transfer: Option<CheckpointSummary>,
    /// What a push has to have for the answer that it is there already.
    pub(crate) published_as: PublishedAs,
}

/// Which transfer made what stands under a name.
#[derive(Clone, Debug)]
pub(crate) struct PublishedAs {
    /// What stands for the target in the identity of a transfer.
    pub(crate) target: String,
    /// As 32 hex digits; empty where nothing is published.
    pub(crate) transfer_id: String,
    /// The same; empty where the source could not be trusted to show a change.
    pub(crate) fingerprint: String,
}

impl CheckpointStatus {
    /// Whether a push of this source with these options would find itself published
    /// already, and send nothing.
    pub fn is_of(&self, source: &SourceSet, options: &PushOptions) -> bool {
        let entries_digest = digest_entries(source.entries().iter().map(|e| &e.header));
        let PublishedAs {
            target,
            transfer_id: id,
            fingerprint: print,
        } = &self.published_as;
        self.published
            && *id == hex(&transfer_id(target, source, options))
            && *print == hex(&fingerprint(source, entries_digest))
    }
}

impl Client {
    /// A client of the server at `host` or `host:port`.
    ///
    /// # Errors
    /// [`Error::Usage`] when that is no address.
    pub fn new(authority: &str) -> Result<Client, Error> {
        let authority = with_port(authority);
        // What is no port would silently become that of http.
        let port = authority.rsplit_once(':').map(|(_, port)| port.parse());
        if !matches!(port, Some(Ok(1..=u16::MAX))) {
            return Err(Error::Usage(format!(
                "{authority:?} does not end in a port from 1 to 65535"
            )));
        }
        let endpoint = Endpoint::from_shared(format!("http://{authority}"))
            .map_err(|e| Error::Usage(format!("{authority:?} is not an address: {e}")))?
            .connect_timeout(CONNECT_TIMEOUT)
            .max_frame_size(HTTP2_FRAME_BYTES)
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        Ok(Client {
            endpoint,
            authority,
        })
    }

    /// `host:port`.
    pub fn authority(&self) -> &str {
        &self.authority
    }

    /// Pushes a checkpoint under a name, reconnecting as long as that helps. It
    /// begins at once, in a task of its own.
    ///
    /// # Panics
    /// Outside of a tokio runtime, as `tokio::spawn` does; there
    /// [`blocking::Client`](crate::blocking::Client) is the right one.
    pub fn push(
        &self,
        source: impl Into<Arc<SourceSet>>,
        name: &CheckpointName,
        options: PushOptions,
    ) -> Transfer {
        self.push_as(source.into(), name, name.as_str().to_owned(), options)
    }

    /// As [`Client::push`], with the text that stands for the target in the
    /// identity of the transfer.
    pub(crate) fn push_as(
        &self,
        source: Arc<SourceSet>,
        name: &CheckpointName,
        target: String,
        options: PushOptions,
    ) -> Transfer {
        let (source, container_header_len, checked) = match options.out_format {
            OutFormat::Npy => (source, 0, Ok(())),
            OutFormat::Safetensors => match source.for_safetensors() {
                Ok((ordered, header_len)) => (Arc::new(ordered), header_len, Ok(())),
                Err(why) => (source, 0, Err(Error::Usage(why))),
            },
        };
        let open = Open {
            container_header_len,
            ..open_of_set(name, &target, &source, &options)
        };
        self.start(
            Supply::Complete(source),
            open,
            target,
            options,
            None,
            checked,
        )
    }

    /// Pushes a checkpoint that is still being produced: its entries are added to the
    /// returned handle and sent as they come. `key` stands for the source in the
    /// identity of the transfer: after a crash, a push of the same key to the same
    /// name goes on with what arrived, once that proves equal to what is added now.
    /// Once published, the name is taken ([`crate::ErrorCode::Exists`]) like any other:
    /// use one name for each state of a model, or [`PushOptions::overwrite`].
    ///
    /// # Errors
    /// [`Error::Source`] when the system has no random numbers.
    ///
    /// # Panics
    /// Outside a tokio runtime.
    ///
    /// ```
    /// use tensorferry::{Client, Dtype, PushOptions, Server};
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let temp = tempfile::tempdir()?;
    /// # let server = Server::builder(temp.path()).bind(([127, 0, 0, 1], 0).into()).await?;
    /// let client = Client::new(&server.local_addr().to_string())?;
    /// # tokio::spawn(server.serve(std::future::pending()));
    /// let push = client.push_open(&"run7".parse()?, "training of run 7", PushOptions::default())?;
    /// for layer in 0..3 {
    ///     // While this travels the next one is computed.
    ///     let values = [layer as f32; 4].map(f32::to_le_bytes).concat();
    ///     push.add_tensor(&format!("layer.{layer}"), Dtype::F32, &[4], values.into())?;
    /// }
    /// let report = push.finish().await?;
    /// assert_eq!((report.tensor_count, report.bytes), (3, 48));
    /// # Ok(())
    /// # }
    /// ```
    pub fn push_open(
        &self,
        name: &CheckpointName,
        key: &str,
        options: PushOptions,
    ) -> Result<OpenPush, Error> {
        self.push_open_with(name, key, BTreeMap::new(), options)
    }

    /// As [`Client::push_open`], with free text for the manifest, by key.
    ///
    /// # Errors
    /// As [`Client::push_open`].
    ///
    /// # Panics
    /// Outside a tokio runtime.
    pub fn push_open_with(
        &self,
        name: &CheckpointName,
        key: &str,
        metadata: BTreeMap<String, String>,
        options: PushOptions,
    ) -> Result<OpenPush, Error> {
        self.push_open_as(name, name.as_str().to_owned(), key, metadata, options)
    }

    /// With the text that stands for the target in the identity of the transfer.
    pub(crate) fn push_open_as(
        &self,
        name: &CheckpointName,
        target: String,
        key: &str,
        metadata: BTreeMap<String, String>,
        options: PushOptions,
    ) -> Result<OpenPush, Error> {
        if options.out_format != OutFormat::Npy {
            let why = "a checkpoint that is still being produced lands as .npy files only";
            return Err(Error::Usage(why.to_owned()));
        }
        let source = Arc::new(GrowingSource::new()?);
        let open = Open {
            metadata,
            // Known to no other push: should the answer to Finish be lost, what stands
            // there then is recognised.
            fingerprint: Some(source.fingerprint()),
            ..open_of_key(name, &target, key, &options)
        };
        let supply = Supply::Growing(Arc::clone(&source));
        let transfer = self.start(supply, open, target, options, None, Ok(()));
        Ok(OpenPush::new(source, transfer))
    }

    /// Sends to a receiver that takes part in the same rehearsal, and to no other.
    pub(crate) fn rehearse(
        &self,
        source: Supply,
        options: PushOptions,
        rehearsal: Rehearsal,
    ) -> Result<Transfer, Error> {
        let (name, target) = (REHEARSAL_FORMAT.parse()?, REHEARSAL_FORMAT.to_owned());
        let open = match &source {
            Supply::Complete(set) => open_of_set(&name, &target, set, &options),
            Supply::Growing(_) => open_of_key(&name, &target, REHEARSAL_FORMAT, &options),
        };
        let open = Open {
            source_format: REHEARSAL_FORMAT.to_owned(),
            ..open
        };
        Ok(self.start(source, open, target, options, Some(rehearsal), Ok(())))
    }

    fn start(
        &self,
        source: Supply,
        open: Open,
        target: String,
        options: PushOptions,
        rehearsal: Option<Rehearsal>,
        checked: Result<(), Error>,
    ) -> Transfer {
        let progress = Arc::new(ProgressCell::default());
        let (cancel, cancelled) = watch::channel(false);
        let first = Globs::new("send first", &options.first).and_then(|first| match &source {
            Supply::Complete(set) => First::of_set(first, set),
            Supply::Growing(_) => Ok(First::of_growing(first)),
        });
        let (first, checked) = match first {
            Ok(first) => (first, checked),
            Err(error) => (First::default(), checked.and(Err(error.into()))),
        };
        let push = Push {
            client: self.clone(),
            context: SendContext {
                connect: self.connector(),
                lanes: options.lanes,
                throttle: Arc::new(Throttle::new(None)),
                codec: options.codec,
                read_mode: options.read_mode,
                first: Arc::new(first),
                rehearsal,
                source,
                budget_bytes: options.budget_bytes,
                progress: Arc::clone(&progress),
                cancel: cancelled,
            },
            open,
            target,
            options,
        };
        Transfer::new(Task::spawn(push.run(checked)), progress, cancel)
    }

    /// Checkpoints and transfers whose names begin with `prefix`.
    ///
    /// # Errors
    /// The server cannot be reached or refuses.
    pub async fn list(&self, prefix: &str) -> Result<Vec<CheckpointSummary>, Error> {
        let mut client = self.unary().await?;
        let (mut out, mut page_token) = (Vec::new(), String::new());
        loop {
            let request = pb::ListRequest {
                prefix: prefix.to_owned(),
                page_size: 0,
                page_token,
            };
            let page = client
                .list(request)
                .await
                .map_err(|s| self.error(status_error(&s)))?
                .into_inner();
            out.extend(page.checkpoints.into_iter().map(summary));
            page_token = page.next_page_token;
            if page_token.is_empty() {
                return Ok(out);
            }
        }
    }

    /// The manifest of a published checkpoint, as JSON;
    /// [`CheckpointInfo::from_json`](crate::CheckpointInfo::from_json) reads it.
    ///
    /// # Errors
    /// The server cannot be reached, or has none of that name.
    pub async fn describe(&self, name: &CheckpointName) -> Result<Vec<u8>, Error> {
        let request = pb::DescribeRequest {
            checkpoint: name.to_string(),
        };
        let mut client = self.unary().await?;
        let response = client
            .describe(request)
            .await
            .map_err(|s| self.error(status_error(&s)))?;
        Ok(response.into_inner().manifest_json.to_vec())
    }

    /// Whether a name is published, and how far its unfinished transfer is.
    ///
    /// # Errors
    /// The server cannot be reached, or knows nothing of that name.
    pub async fn status(&self, name: &CheckpointName) -> Result<CheckpointStatus, Error> {
        let request = pb::StatusRequest {
            checkpoint: name.to_string(),
        };
        let mut client = self.unary().await?;
        let response = client
            .status(request)
            .await
            .map_err(|s| self.error(status_error(&s)))?;
        let response = response.into_inner();
        Ok(CheckpointStatus {
            published: response.published,
            transfer: response.transfer.map(summary),
            published_as: PublishedAs {
                target: name.as_str().to_owned(),
                transfer_id: response.published_transfer_id,
                fingerprint: response.published_fingerprint,
            },
        })
    }

    /// Throws the unfinished transfer of a name away. Returns the durable bytes
    /// lost, or `None` when there was none.
    ///
    /// # Errors
    /// The server cannot be reached, or a session of that name is running.
    pub async fn discard(&self, name: &CheckpointName) -> Result<Option<u64>, Error> {
        let request = pb::DiscardRequest {
            checkpoint: name.to_string(),
        };
        let mut client = self.unary().await?;
        let response = client
            .discard(request)
            .await
            .map_err(|s| self.error(status_error(&s)))?;
        let response = response.into_inner();
        Ok(response.existed.then_some(response.discarded_bytes))
    }

    async fn unary(&self) -> Result<pb::ferry_client::FerryClient<Channel>, Error> {
        let channel = self.connect().await.map_err(|e| self.error(e))?;
        Ok(pb::ferry_client::FerryClient::new(channel).max_decoding_message_size(64 << 20))
    }

    async fn connect(&self) -> Result<Channel, SendError> {
        self.endpoint
            .connect_with_connector(Connector::new())
            .await
            .map_err(|e| SendError::Disconnected {
                message: innermost(&e),
            })
    }

    /// Makes lanes for a session.
    fn connector(&self) -> Connect {
        let client = self.clone();
        Arc::new(move || {
            let client = client.clone();
            Box::pin(async move { client.open_lane().await })
        })
    }

    /// Opens one lane of a push.
    pub(crate) async fn open_lane(&self) -> Result<SendLane, SendError> {
        let (out, response, channel) = self.open_call(PUSH_PATH).await?;
        let code = response.status();
        let decoder = tonic_prost::ProstDecoder::<pb::ReceiverFrame>::default();
        let frames = Streaming::new_response(decoder, response.into_body(), code, None, None);
        Ok(SendLane {
            out,
            frames,
            _keeps: Box::new(channel),
        })
    }

    /// Begins a call with a connection of its own; the channel keeps that open.
    pub(crate) async fn open_call(
        &self,
        path: &'static str,
    ) -> Result<(LaneSender, Response<Body>, Channel), SendError> {
        let mut channel = self.connect().await?;
        let (out, body) = LaneBody::channel();
        let mut request = Request::new(Body::new(body));
        *request.method_mut() = http::Method::POST;
        *request.version_mut() = Version::HTTP_2;
        *request.uri_mut() = http::Uri::from_static(path);
        let headers = request.headers_mut();
        headers.insert(header::TE, HeaderValue::from_static("trailers"));
        headers.insert(
            header::CONTENT_TYPE,
            HeaderValue::from_static("application/grpc"),
        );
        let disconnected = |e: &(dyn std::error::Error + 'static)| SendError::Disconnected {
            message: innermost(e),
        };
        poll_fn(|cx| channel.poll_ready(cx))
            .await
            .map_err(|e| disconnected(&e))?;
        let response = channel.call(request).await.map_err(|e| disconnected(&e))?;
        if let Some(status) = Status::from_header_map(response.headers()) {
            return Err(status_error(&status));
        }
        Ok((out, response, channel))
    }

    pub(crate) fn error(&self, error: SendError) -> Error {
        match error {
            SendError::Disconnected { message } => Error::Transport {
                endpoint: self.authority.clone(),
                message,
            },
            other => other.into(),
        }
    }
}

/// One push with all its attempts.
struct Push {
    client: Client,
    context: SendContext,
    open: Open,
    target: String,
    options: PushOptions,
}

impl Push {
    async fn run(mut self, checked: Result<(), Error>) -> Result<TransferReport, Error> {
        let begun = Instant::now();
        self.options.check()?;
        checked?;
        let _follower = self.limit_rate().await?;
        let mut open = self.open.clone();
        self.context.progress.update(|p| {
            p.total_bytes = self.context.source.total_bytes();
        });
        let mut attempts = Attempts::new(self.options.retries);
        loop {
            let before = self.context.progress.snapshot();
            let error = match self.attempt(&open).await {
                Ok(done) => return Ok(self.report(&done, begun)),
                Err(error) => self.blame(error).await,
            };
            let after = self.context.progress.snapshot();
            let was_accepted = after.session_count > before.session_count;
            if !is_retryable(&error, was_accepted) {
                return Err(self.client.error(error));
            }
            let Some(fruitless) = attempts.failed(&before, &after) else {
                return Err(self.client.error(error));
            };
            tracing::info!(%error, attempt = fruitless, "the connection failed; trying again");
            // What an accepted --restart threw away must not be thrown away again.
            open.restart &= !was_accepted;
            self.context.progress.update(|p| p.stage = Stage::Waiting);
            attempts.pause(&mut self.context.cancel).await?;
        }
    }

    /// A connection breaks, too, when the file that is being sent out of its map is cut:
    /// then the source is to blame, and trying again would not help.
    async fn blame(&self, error: SendError) -> SendError {
        if let SendError::Refused { reason, message } = &error
            && *reason == Reason::Checksum
            && let Some(name) = self.context.source.changed_in_memory(message)
        {
            return SourceError::Mutated { name }.into();
        }
        if !matches!(error, SendError::Disconnected { .. }) {
            return error;
        }
        let source = self.context.source.clone();
        match tokio::task::spawn_blocking(move || source.check_unchanged()).await {
            Ok(Err(changed @ SourceError::Changed { .. })) => changed.into(),
            _ => error,
        }
    }

    /// Sets the rate that the user wants. The task keeps it up to date.
    async fn limit_rate(&self) -> Result<Option<Task<()>>, Error> {
        let throttle = &self.context.throttle;
        let path = match &self.options.rate_limit {
            RateLimit::None => return Ok(None),
            RateLimit::BytesPerSecond(rate) => {
                throttle.set_rate(Some(*rate));
                return Ok(None);
            }
            RateLimit::File(path) => path.clone(),
        };
        let file = path.clone();
        let rate = tokio::task::spawn_blocking(move || read_rate(&file))
            .await
            .map_err(|error| Error::Bug(error.to_string()))?;
        throttle.set_rate(rate.map_err(Error::Usage)?);
        Ok(Some(Task::spawn(Arc::clone(throttle).follow(path))))
    }

    async fn attempt(&self, open: &Open) -> Result<Done, SendError> {
        self.context
            .progress
            .update(|p| p.stage = Stage::Connecting);
        let mut cancel = self.context.cancel.clone();
        let lane = tokio::select! {
            lane = self.client.open_lane() => lane?,
            () = cancelled(&mut cancel) => return Err(SendError::Interrupted),
        };
        Box::pin(send(self.context.clone(), open, lane)).await
    }

    fn report(&self, done: &Done, begun: Instant) -> TransferReport {
        let source = &self.context.source;
        let progress = self.context.progress.snapshot();
        let is_tensor = |index: &usize| {
            let kind = source.with_entry(*index, |entry| entry.header.kind);
            matches!(kind, Some(EntryKind::Tensor { .. }))
        };
        let entry_count = source.entry_count();
        let tensor_count = (0..entry_count).filter(is_tensor).count() as u64;
        TransferReport {
            checkpoint: self.target.clone(),
            tensor_count,
            file_count: entry_count as u64 - tensor_count,
            bytes: done.total_bytes,
            wire_bytes: progress.wire_bytes,
            resumed_bytes: progress.resumed_bytes,
            session_count: progress.session_count,
            elapsed: begun.elapsed(),
            durability: done.durability,
            unchanged: done.unchanged,
            stages: progress.stages,
            codecs: self.context.progress.codecs(),
        }
    }
}

/// Whether another attempt can do better than the one that ended so.
pub(crate) fn is_retryable(error: &SendError, was_accepted: bool) -> bool {
    match error {
        SendError::Disconnected { .. } => true,
        SendError::Refused { reason, .. } => match reason {
            Reason::Draining | Reason::Idle => true,
            // Before a session there can only be too many sessions.
            Reason::TooMany => !was_accepted,
            _ => false,
        },
        _ => false,
    }
}

/// Adds the default port where none is given.
fn with_port(authority: &str) -> String {
    let after_host = authority
        .rsplit_once(']')
        .map_or(authority, |(_, rest)| rest);
    if after_host.contains(':') {
        authority.to_owned()
    } else {
        format!("{authority}:{DEFAULT_PORT}")
    }
}

fn summary(row: pb::CheckpointSummary) -> CheckpointSummary {
    CheckpointSummary {
        name: row.name,
        published: row.published,
        offered: row.offered,
        entry_count: row.entry_count,
        total_bytes: row.total_bytes,
        durable_bytes: row.durable_bytes,
        active: row.active,
        modified_unix_seconds: row.modified_unix_seconds,
        owner: owner(&row.transfer_id),
    }
}

/// A server may send anything: it is shown in hex, and no more of it than 16 bytes.
fn owner(transfer_id: &[u8]) -> Option<String> {
    let known = &transfer_id[..transfer_id.len().min(16)];
    (!known.is_empty()).then(|| known.iter().map(|b| format!("{b:02x}")).collect())
}

/// The last error of a chain says most about a connection.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut error = error;
    while let Some(cause) = error.source() {
        error = cause;
    }
    error.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_port_is_added_where_none_is() {
        assert_eq!(with_port("host"), "host:7744");
        assert_eq!(with_port("host:1"), "host:1");
        assert_eq!(with_port("[::1]"), "[::1]:7744");
        assert_eq!(with_port("[::1]:9"), "[::1]:9");
    }
}
