//! The server: receives checkpoints into one root folder.

mod accept;
mod expire;
mod service;
mod unary;

use crate::{
    error::Error,
    options::{
        BUDGET_BYTES_DEFAULT, BUDGET_BYTES_MIN, HTTP2_FRAME_BYTES, HTTP2_WINDOW_BYTES,
        KEEPALIVE_INTERVAL, KEEPALIVE_TIMEOUT,
    },
    plan::{CHUNK_LEN_DEFAULT, CheckpointName, Grid},
    protocol::{Durability, Open, ProtocolError, Reason},
    ready::OnReady,
    session::{
        Budget, Export, MAX_PULLS, MAX_SNAPSHOTS, OfferContext, OfferedLanes, PaceLimits,
        ReceiveContext, ReceiveOptions, Registry, Rehearsal, Terms,
    },
    source::{GrowingSource, NameFilter, SourceOptions, SourceSet},
    store::{Catalog, FileSystem, QuotaLimits, WriteMode},
    wire::pb,
};
use std::{
    collections::BTreeMap,
    future::Future,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use tokio::{
    net::TcpListener,
    sync::{Semaphore, watch},
    task::JoinSet,
};

/// Connections at a time, unless the builder says otherwise.
const MAX_CONNECTIONS_DEFAULT: usize = 256;
/// Streams per connection.
const MAX_STREAMS: u32 = 64;
/// Streams that a peer may reset before they were looked at (rapid reset).
const MAX_PENDING_RESETS: usize = 20;
/// Streams with an error of the peer's in the life of a connection. A sender far
/// away that is refused makes a few of them in all innocence.
const MAX_ERROR_RESETS: usize = 1024;
/// Bytes of HTTP headers of a call.
const MAX_HEADER_BYTES: u32 = 16 << 10;
/// Sessions have this long to commit when the server stops.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(5);

/// Settings of a server that does not listen yet.
#[derive(Clone, Debug)]
#[must_use = "nothing listens before it is bound"]
pub struct ServerBuilder {
    root: PathBuf,
    chunk_len: u32,
    budget_bytes: u64,
    write_mode: WriteMode,
    max_connections: usize,
    pace: PaceLimits,
    staging_ttl: Option<Duration>,
    quotas: QuotaLimits,
    insecure: bool,
    alias: Option<(CheckpointName, CheckpointName)>,
    rehearsal: Option<Rehearsal>,
    exports: Vec<(CheckpointName, Export)>,
    on_ready: Option<OnReady>,
}

/// A server that listens.
///
/// ```
/// use tensorferry::{Client, Server};
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let root = tempfile::tempdir()?;
/// let server = Server::builder(root.path()).bind(([127, 0, 0, 1], 0).into()).await?;
/// let client = Client::new(&server.local_addr().to_string())?;
/// let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
/// let serving = tokio::spawn(server.serve(async { stopped.await.unwrap_or_default() }));
///
/// assert!(client.list("").await?.is_empty());
/// // Sessions under way make durable what they have before it ends.
/// let _ = stop.send(());
/// serving.await??;
/// assert!(client.list("").await.is_err());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "it listens, and serves once `serve` is awaited"]
pub struct Server {
    listener: TcpListener,
    address: SocketAddr,
    file_system: FileSystem,
    max_connections: usize,
    staging_ttl: Option<Duration>,
    context: ReceiveContext,
    drain: watch::Sender<bool>,
    alias: Option<(CheckpointName, CheckpointName)>,
    offers: Option<OfferContext>,
}

impl Server {
    /// A server for the checkpoints below `root`, which is made if need be.
    pub fn builder(root: impl Into<PathBuf>) -> ServerBuilder {
        ServerBuilder {
            root: root.into(),
            chunk_len: CHUNK_LEN_DEFAULT,
            budget_bytes: BUDGET_BYTES_DEFAULT,
            write_mode: WriteMode::Auto,
            max_connections: MAX_CONNECTIONS_DEFAULT,
            pace: PaceLimits::default(),
            staging_ttl: None,
            quotas: QuotaLimits::default(),
            insecure: false,
            alias: None,
            rehearsal: None,
            exports: Vec::new(),
            on_ready: None,
        }
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Type of the file system that the root lies on.
    pub fn file_system(&self) -> &'static str {
        self.file_system.name
    }

    /// What cannot be lost any more once it is durable there.
    pub fn durability(&self) -> Durability {
        self.file_system.durability
    }

    /// Serves until `shutdown` resolves; then every session commits what it has
    /// and ends, and so does this.
    ///
    /// # Errors
    /// The listener fails.
    pub async fn serve(self, shutdown: impl Future<Output = ()> + Send) -> Result<(), Error> {
        let (health, health_service) = tonic_health::server::health_reporter();
        health.set_serving::<service::FerryService>().await;
        let reflection_v1 = reflection()
            .build_v1()
            .map_err(|e| Error::Bug(e.to_string()))?;
        // What grpcio and many other clients still ask for; the messages are the same.
        let reflection_alpha = reflection()
            .build_v1alpha()
            .map_err(|e| Error::Bug(e.to_string()))?;
        let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
        let registry = self.context.registry.clone();
        let terms = match (self.alias, &self.offers) {
            (Some((wire, local)), _) => renaming(wire, local),
            (None, Some(offers)) => keeping_free(Arc::clone(&offers.exports)),
            (None, None) => None,
        };
        // Ends with the server: dropping the set aborts what is in it.
        let mut chores = JoinSet::new();
        if let Some(ttl) = self.staging_ttl {
            chores.spawn(expire::expire(self.context.clone(), ttl));
        }
        let incoming = accept::Incoming::new(self.listener, self.max_connections);
        let serving = tonic::transport::Server::builder()
            .max_frame_size(HTTP2_FRAME_BYTES)
            .initial_stream_window_size(HTTP2_WINDOW_BYTES)
            .initial_connection_window_size(HTTP2_WINDOW_BYTES)
            .max_concurrent_streams(MAX_STREAMS)
            .http2_max_header_list_size(MAX_HEADER_BYTES)
            .http2_max_pending_accept_reset_streams(Some(MAX_PENDING_RESETS))
            .http2_max_local_error_reset_streams(Some(MAX_ERROR_RESETS))
            .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
            .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
            .add_service(service::FerryService::new(self.context, terms, self.offers))
            .add_service(health_service)
            .add_service(reflection_v1)
            .add_service(reflection_alpha)
            .serve_with_incoming_shutdown(incoming, async {
                let _ = stopped.await;
            });
        let serving = tokio::spawn(serving);
        tokio::pin!(serving);
        tokio::select! {
            result = &mut serving => return finished(result),
            () = shutdown => {}
        }
        chores.shutdown().await;
        health.set_not_serving::<service::FerryService>().await;
        // The server as a whole, for those who ask without a name.
        health
            .set_service_status("", tonic_health::ServingStatus::NotServing)
            .await;
        let _ = self.drain.send(true);
        let _ = stop.send(());
        // Sessions outlive their connections: they commit and clean up.
        let idle = async {
            while !registry.is_idle() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let _ = tokio::time::timeout(DRAIN_TIMEOUT, idle).await;
        match tokio::time::timeout(DRAIN_TIMEOUT, &mut serving).await {
            Ok(result) => finished(result),
            Err(_) => {
                // Idle connections are kept open by their clients.
                serving.abort();
                Ok(())
            }
        }
    }
}

/// Takes one checkpoint only, which has another name here.
fn renaming(wire: CheckpointName, local: CheckpointName) -> Terms {
    Some(Arc::new(move |open: Open| {
        if open.checkpoint != wire {
            let why = "this server takes one checkpoint only";
            return Err(ProtocolError::new(Reason::NotFound, why));
        }
        Ok(Open {
            checkpoint: local.clone(),
            ..open
        })
    }))
}

/// Takes nothing under the names of exports, or they would mean two things.
fn keeping_free(exports: Arc<BTreeMap<CheckpointName, Export>>) -> Terms {
    Some(Arc::new(move |open: Open| {
        let name = &open.checkpoint;
        if exports.contains_key(name) {
            let why =
                format!("{name} is what this server offers from elsewhere: push to another name");
            return Err(ProtocolError::new(Reason::Exists, why));
        }
        Ok(open)
    }))
}

/// Exports by name: every one can be opened now, and no name is taken.
fn check_exports(
    exports: Vec<(CheckpointName, Export)>,
    catalog: &Catalog,
) -> Result<BTreeMap<CheckpointName, Export>, Error> {
    let mut checked = BTreeMap::new();
    for (name, export) in exports {
        if catalog.manifest(&name)?.is_some() {
            return Err(Error::Config(format!(
                "a checkpoint {name} is published here already: export under another name, as NAME=PATH"
            )));
        }
        if let Export::Path(path) = &export {
            SourceSet::open(&[path], &SourceOptions::default())?;
        }
        if checked.insert(name.clone(), export).is_some() {
            return Err(Error::Usage(format!(
                "two exports have the name {name}: name them, as NAME=PATH"
            )));
        }
    }
    Ok(checked)
}

/// The schema of every service.
fn reflection() -> tonic_reflection::server::Builder<'static> {
    tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(pb::FILE_DESCRIPTOR_SET)
        .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
}

fn finished(
    result: Result<Result<(), tonic::transport::Error>, tokio::task::JoinError>,
) -> Result<(), Error> {
    result
        .map_err(|e| Error::Bug(e.to_string()))?
        .map_err(|e| Error::Transport {
            endpoint: "the listener".to_owned(),
            message: e.to_string(),
        })
}

impl ServerBuilder {
    /// Chunk length of new transfers whose sender has no wish, in bytes.
    pub fn chunk_len(mut self, chunk_len: u32) -> Self {
        self.chunk_len = chunk_len;
        self
    }

    /// Memory for chunks on their way, all sessions together, in bytes; at least 8 MiB.
    pub fn budget_bytes(mut self, budget_bytes: u64) -> Self {
        self.budget_bytes = budget_bytes;
        self
    }

    /// How chunks get into their files.
    pub fn write_mode(mut self, write_mode: WriteMode) -> Self {
        self.write_mode = write_mode;
        self
    }

    /// Connections at a time (256 by default), half of them from one address. One
    /// too many is closed at once.
    pub fn max_connections(mut self, max_connections: usize) -> Self {
        self.max_connections = max_connections;
        self
    }

    /// Unfinished transfers into which nothing was written for this long are removed,
    /// at the start and every hour, or a quarter of `ttl`; zero, and the default, is never.
    pub fn staging_ttl(mut self, ttl: Duration) -> Self {
        self.staging_ttl = (!ttl.is_zero()).then_some(ttl);
        self
    }

    /// Most raw bytes of one checkpoint; zero, and the default, is as many as there is
    /// room for. More are refused before they are sent.
    pub fn quota_checkpoint(mut self, bytes: u64) -> Self {
        self.quotas.checkpoint = (bytes > 0).then_some(bytes);
        self
    }

    /// Most raw bytes of all unfinished transfers together, as announced; zero, and the
    /// default, is as many as there is room for.
    pub fn quota_staging(mut self, bytes: u64) -> Self {
        self.quotas.staging = (bytes > 0).then_some(bytes);
        self
    }

    /// Judges senders sooner: for tests.
    #[doc(hidden)]
    pub fn pace(mut self, period: Duration, max_silence: Duration) -> Self {
        self.pace = PaceLimits {
            period,
            max_silence,
            ..self.pace
        };
        self
    }

    /// Allows to listen beyond this machine without encryption.
    pub fn insecure(mut self, insecure: bool) -> Self {
        self.insecure = insecure;
        self
    }

    /// Serves one folder of the user's: `wire` on the wire is `local` on disk.
    pub(crate) fn alias(mut self, wire: CheckpointName, local: CheckpointName) -> Self {
        self.alias = Some((wire, local));
        self
    }

    /// Offers a checkpoint that lies elsewhere to those who pull, under a name: a file or
    /// folder of any format that a push takes. It is opened anew for each pull, and once when
    /// the server starts. Nothing can be pushed to that name.
    pub fn export(mut self, name: CheckpointName, path: impl Into<PathBuf>) -> Self {
        self.exports.push((name, Export::Path(path.into())));
        self
    }

    /// Offers what is in memory to those who pull, under a name: each pull gets what
    /// `snapshot` makes when it opens, a connection that was lost and made anew too. It
    /// runs on a thread that may block, and may leave out what the filter does not take;
    /// why it failed goes to the log, not to the puller. The bytes are kept until that pull
    /// ends, and nobody may change them. At most two pulls hold one at a time; a third waits,
    /// trying again. As one safetensors file it cannot be pulled.
    pub fn export_with<F>(mut self, name: CheckpointName, snapshot: F) -> Self
    where
        F: Fn(&NameFilter) -> Result<GrowingSource, Error> + Send + Sync + 'static,
    {
        let snapshot = Export::Memory(Arc::new(snapshot));
        self.exports.push((name, snapshot));
        self
    }

    /// Tells of every tensor that a push has brought as soon as it is complete and durable:
    /// it can be mapped while the rest arrives.
    pub fn on_ready(mut self, on_ready: OnReady) -> Self {
        self.on_ready = Some(on_ready);
        self
    }

    /// Leaves work out and publishes nothing: for measurements, which make up their bytes.
    pub(crate) fn rehearsal(mut self, rehearsal: Rehearsal) -> Self {
        self.rehearsal = Some(rehearsal);
        self
    }

    /// Opens the root, finishes interrupted publications and listens.
    ///
    /// # Errors
    /// The root cannot be used, the address is taken, or it reaches beyond this
    /// machine without [`ServerBuilder::insecure`]; what is to be exported cannot be opened,
    /// or its name is taken.
    pub async fn bind(self, address: SocketAddr) -> Result<Server, Error> {
        if !address.ip().is_loopback() && !self.insecure {
            return Err(Error::Config(format!(
                "{address} can be reached from other machines and there is no encryption yet; allow that with --insecure"
            )));
        }
        let Receiving {
            context,
            file_system,
            drain,
        } = self.prepare().await?;
        let (exports, catalog) = (self.exports.clone(), context.catalog.clone());
        let exports = tokio::task::spawn_blocking(move || check_exports(exports, &catalog))
            .await
            .map_err(|e| Error::Bug(e.to_string()))??;
        let listener = TcpListener::bind(address)
            .await
            .map_err(|source| Error::Listen { address, source })?;
        let address = listener
            .local_addr()
            .map_err(|e| Error::Bug(e.to_string()))?;
        // What takes in one folder or only rehearses has nothing to offer.
        let offers = (self.alias.is_none() && self.rehearsal.is_none()).then(|| OfferContext {
            catalog: context.catalog.clone(),
            root: self.root,
            exports: Arc::new(exports),
            budget_bytes: self.budget_bytes,
            slots: Arc::new(Semaphore::new(MAX_PULLS)),
            snapshots: Arc::new(Semaphore::new(MAX_SNAPSHOTS)),
            lanes: OfferedLanes::default(),
            draining: context.draining.clone(),
        });
        Ok(Server {
            listener,
            address,
            file_system,
            max_connections: self.max_connections,
            staging_ttl: self.staging_ttl,
            context,
            drain,
            alias: self.alias,
            offers,
        })
    }

    /// Opens the root and finishes interrupted publications: all that receiving needs
    /// but a connection.
    pub(crate) async fn prepare(&self) -> Result<Receiving, Error> {
        Grid::new(self.chunk_len)?;
        if self.budget_bytes < BUDGET_BYTES_MIN {
            return Err(Error::Usage(format!(
                "a budget of {} bytes does not hold one chunk of the largest length: a server needs at least {BUDGET_BYTES_MIN} bytes (8 MiB)",
                self.budget_bytes
            )));
        }
        let (root, quotas) = (self.root.clone(), self.quotas);
        let (catalog, file_system) =
            tokio::task::spawn_blocking(move || open_catalog(&root, quotas))
                .await
                .map_err(|e| Error::Bug(e.to_string()))??;
        tracing::info!(
            file_system = file_system.name,
            durability = file_system.durability.as_str(),
            write = ?file_system.write_mode(self.write_mode),
            "what the root offers"
        );
        let (drain, draining) = watch::channel(false);
        let context = ReceiveContext {
            catalog,
            registry: Registry::default(),
            sessions: Default::default(),
            options: ReceiveOptions {
                window_bytes: self.budget_bytes / 2,
                chunk_len: self.chunk_len,
                write_mode: self.write_mode,
                pace: self.pace,
                rehearsal: self.rehearsal,
                ..ReceiveOptions::default()
            },
            budget: Budget::new(self.budget_bytes),
            draining,
            progress: None,
            on_ready: self.on_ready.clone(),
        };
        Ok(Receiving {
            context,
            file_system,
            drain,
        })
    }
}

/// What can receive and does not listen.
pub(crate) struct Receiving {
    pub(crate) context: ReceiveContext,
    file_system: FileSystem,
    /// Ends its sessions in good order.
    pub(crate) drain: watch::Sender<bool>,
}

fn open_catalog(root: &Path, quotas: QuotaLimits) -> Result<(Catalog, FileSystem), Error> {
    let mut catalog = Catalog::open(root)?;
    catalog.recover()?;
    catalog.limit(quotas)?;
    let file_system = FileSystem::of(catalog.root())?;
    Ok((catalog, file_system))
}
