//! The same without `async`, for scripts, threads and other languages.
//!
//! All of it runs on one tokio runtime that is started when it is first needed and
//! lives as long as the process. A thread of an async runtime must not be blocked:
//! there (in `spawn_blocking` too) every call gives [`Error::Usage`], and
//! [`crate::Client`] is the right one.
//!
//! ```
//! use tensorferry::{Checkpoint, PushOptions, blocking, format::npy, source::SourceSet};
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let dir = tempfile::tempdir()?;
//! let model = dir.path().join("model.npy");
//! std::fs::write(&model, [npy::encode_header("<f4", false, &[2]), vec![0; 8]].concat())?;
//!
//! let address = ([127, 0, 0, 1], 0).into();
//! let server = blocking::Server::bind(tensorferry::Server::builder(dir.path().join("root")), address)?;
//! let serving = server.serve()?;
//!
//! let client = blocking::Client::new(&serving.local_addr().to_string())?;
//! let source = SourceSet::open(&[model], &Default::default())?;
//! let transfer = client.push(source, &"run7".parse()?, PushOptions::default())?;
//! println!("{} bytes durable so far", transfer.progress().durable_bytes);
//! let report = transfer.wait()?;
//! assert_eq!((report.tensor_count, report.bytes), (1, 8));
//!
//! assert!(client.status(&"run7".parse()?)?.published);
//! serving.stop()?;
//! assert_eq!(Checkpoint::open(dir.path().join("root/run7"))?.total_bytes(), 8);
//! # Ok(())
//! # }
//! ```

use crate::{
    client::{CheckpointStatus, CheckpointSummary},
    error::Error,
    options::PushOptions,
    plan::CheckpointName,
    server::ServerBuilder,
    session::Progress,
    source::SourceSet,
    transfer::{Canceller, TransferReport, Watcher},
};
use std::{
    future::IntoFuture,
    net::SocketAddr,
    path::Path,
    sync::{Arc, OnceLock},
};
use tokio::{
    runtime::{Builder, Handle, Runtime},
    sync::oneshot,
    task::JoinHandle,
};

/// A push whose entries are added while it runs. The twin of [`crate::OpenPush`].
#[derive(Debug)]
#[must_use = "nothing is published before `finish`"]
pub struct OpenPush(crate::OpenPush);

impl OpenPush {
    /// Nothing more will be added: wait for the transfer until it is published.
    pub fn finish(self) -> Transfer {
        Transfer(self.0.finish())
    }
}

/// Everything that needs no waiting: adding entries, watching, cancelling.
impl std::ops::Deref for OpenPush {
    type Target = crate::OpenPush;

    fn deref(&self) -> &crate::OpenPush {
        &self.0
    }
}

/// A server, by address. The twin of [`crate::Client`].
#[derive(Clone, Debug)]
pub struct Client(crate::Client);

impl Client {
    /// See [`crate::Client::new`].
    ///
    /// # Errors
    /// [`Error::Usage`] when that is no address.
    pub fn new(authority: &str) -> Result<Client, Error> {
        crate::Client::new(authority).map(Client)
    }

    /// `host:port`.
    pub fn authority(&self) -> &str {
        self.0.authority()
    }

    /// Begins a push and returns at once. See [`crate::Client::push`].
    ///
    /// # Errors
    /// [`Error::Usage`] on a thread of an async runtime.
    pub fn push(
        &self,
        source: impl Into<Arc<SourceSet>>,
        name: &CheckpointName,
        options: PushOptions,
    ) -> Result<Transfer, Error> {
        let _entered = runtime()?.enter();
        Ok(Transfer(self.0.push(source, name, options)))
    }

    /// Begins a push whose entries are added while it runs. See
    /// [`crate::Client::push_open`].
    ///
    /// # Errors
    /// [`Error::Usage`] on a thread of an async runtime, [`Error::Source`] when the
    /// system has no random numbers.
    pub fn push_open(
        &self,
        name: &CheckpointName,
        key: &str,
        options: PushOptions,
    ) -> Result<OpenPush, Error> {
        let _entered = runtime()?.enter();
        Ok(OpenPush(self.0.push_open(name, key, options)?))
    }

    /// See [`crate::Client::list`].
    ///
    /// # Errors
    /// The server cannot be reached or refuses.
    pub fn list(&self, prefix: &str) -> Result<Vec<CheckpointSummary>, Error> {
        runtime()?.block_on(self.0.list(prefix))
    }

    /// See [`crate::Client::describe`].
    ///
    /// # Errors
    /// The server cannot be reached, or has none of that name.
    pub fn describe(&self, name: &CheckpointName) -> Result<Vec<u8>, Error> {
        runtime()?.block_on(self.0.describe(name))
    }

    /// See [`crate::Client::status`].
    ///
    /// # Errors
    /// The server cannot be reached, or knows nothing of that name.
    pub fn status(&self, name: &CheckpointName) -> Result<CheckpointStatus, Error> {
        runtime()?.block_on(self.0.status(name))
    }

    /// See [`crate::Client::discard`].
    ///
    /// # Errors
    /// The server cannot be reached, or a session of that name is running.
    pub fn discard(&self, name: &CheckpointName) -> Result<Option<u64>, Error> {
        runtime()?.block_on(self.0.discard(name))
    }
}

/// A push under way. The twin of [`crate::Transfer`]: dropping it stops the push,
/// and the same push made again goes on from what is durable by then.
#[derive(Debug)]
#[must_use = "a push stops when its transfer is dropped"]
pub struct Transfer(crate::Transfer);

impl Transfer {
    /// Where it stands.
    pub fn progress(&self) -> Progress {
        self.0.progress()
    }

    /// Whether it has come to its end: [`Transfer::wait`] takes no time then.
    pub fn is_finished(&self) -> bool {
        self.0.is_finished()
    }

    /// See [`crate::Transfer::cancel`].
    pub fn cancel(&self) {
        self.0.cancel();
    }

    /// A handle that can cancel from another thread.
    pub fn canceller(&self) -> Canceller {
        self.0.canceller()
    }

    /// A handle that tells where it stands from another thread.
    pub fn watcher(&self) -> Watcher {
        self.0.watcher()
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// Why the push failed, [`Error::Interrupted`] when it was cancelled.
    pub fn wait(self) -> Result<TransferReport, Error> {
        runtime()?.block_on(self.0.into_future())
    }
}

/// A server that listens and does not serve yet. The twin of [`crate::Server`].
#[derive(Debug)]
pub struct Server(crate::Server);

impl Server {
    /// See [`ServerBuilder::bind`].
    ///
    /// # Errors
    /// The root cannot be used, the address is taken, or it reaches beyond this
    /// machine without [`ServerBuilder::insecure`].
    pub fn bind(builder: ServerBuilder, address: SocketAddr) -> Result<Server, Error> {
        runtime()?.block_on(builder.bind(address)).map(Server)
    }

    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.0.local_addr()
    }

    /// Serves in the background until the handle is stopped or dropped.
    ///
    /// # Errors
    /// [`Error::Usage`] on a thread of an async runtime.
    pub fn serve(self) -> Result<Serving, Error> {
        let address = self.local_addr();
        let (stop, stopped) = oneshot::channel();
        let serving = self.0.serve(async {
            let _ = stopped.await;
        });
        let task = runtime()?.spawn(serving);
        Ok(Serving {
            address,
            background: Some(Background { stop, task }),
        })
    }
}

/// A [`Server`] at work. Dropping it stops the server as [`Serving::stop`] does,
/// which takes up to ten seconds when clients hold on.
#[derive(Debug)]
#[must_use = "a server stops when its handle is dropped"]
pub struct Serving {
    address: SocketAddr,
    background: Option<Background>,
}

#[derive(Debug)]
struct Background {
    stop: oneshot::Sender<()>,
    task: JoinHandle<Result<(), Error>>,
}

impl Serving {
    /// Where it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.address
    }

    /// Stops in good order: every session makes durable what it has and ends.
    ///
    /// # Errors
    /// The listener failed.
    pub fn stop(mut self) -> Result<(), Error> {
        self.background.take().map_or(Ok(()), Background::stop)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        // On a thread that must not wait it still stops, a little later.
        if let Some(Err(error)) = self.background.take().map(Background::stop) {
            tracing::debug!(%error, "a server was dropped");
        }
    }
}

impl Background {
    fn stop(self) -> Result<(), Error> {
        let _ = self.stop.send(());
        runtime()?
            .block_on(self.task)
            .unwrap_or_else(|e| Err(Error::Bug(e.to_string())))
    }
}

/// A server inside this process that receives one folder. The twin of
/// [`crate::Embedded`].
#[derive(Debug)]
pub struct Embedded(crate::Embedded);

impl Embedded {
    /// See [`crate::Embedded::start`].
    ///
    /// # Errors
    /// The parent cannot be used, or `folder` has no name of its own.
    pub fn start(folder: impl AsRef<Path>, budget_bytes: u64) -> Result<Embedded, Error> {
        let starting = crate::Embedded::start(folder.as_ref(), budget_bytes);
        runtime()?.block_on(starting).map(Embedded)
    }

    /// Begins a push into the folder and returns at once.
    ///
    /// # Errors
    /// [`Error::Usage`] on a thread of an async runtime.
    pub fn push(
        &self,
        source: impl Into<Arc<SourceSet>>,
        options: PushOptions,
    ) -> Result<Transfer, Error> {
        let _entered = runtime()?.enter();
        self.0.push(source, options).map(Transfer)
    }

    /// See [`crate::Embedded::stop`].
    ///
    /// # Errors
    /// The server failed.
    pub fn stop(self) -> Result<(), Error> {
        runtime()?.block_on(self.0.stop())
    }
}

/// The runtime behind everything here, on a thread that may wait for it. It is
/// never shut down: that would have to wait, wherever the last user is dropped.
fn runtime() -> Result<&'static Runtime, Error> {
    static RUNTIME: OnceLock<Result<Runtime, String>> = OnceLock::new();
    if Handle::try_current().is_ok() {
        return Err(Error::Usage(
            "tensorferry::blocking cannot be used on a thread of an async runtime, which it would block; use tensorferry::Client there".to_owned(),
        ));
    }
    let made = RUNTIME.get_or_init(|| {
        Builder::new_multi_thread()
            .enable_all()
            .thread_name("ferry-blocking")
            .build()
            .map_err(|e| e.to_string())
    });
    made.as_ref()
        .map_err(|e| Error::Bug(format!("the runtime cannot be started: {e}")))
}
