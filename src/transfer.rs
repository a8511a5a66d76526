//! A push or pull under way.

use crate::{
    error::Error,
    format::codec::Codec,
    protocol::Durability,
    session::{Progress, ProgressCell, Stages, Task},
};
use std::{
    future::{Future, IntoFuture},
    pin::Pin,
    sync::Arc,
    time::Duration,
};
use tokio::sync::watch;

/// What a finished transfer did.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct TransferReport {
    /// Checkpoint name.
    pub checkpoint: String,
    /// Tensors of the checkpoint.
    pub tensor_count: u64,
    /// Side files of the checkpoint.
    pub file_count: u64,
    /// Raw bytes of the checkpoint.
    pub bytes: u64,
    /// Payload bytes that this call sent; of a pull all bytes that came.
    pub wire_bytes: u64,
    /// Raw bytes that were on the receiver already and did not travel.
    pub resumed_bytes: u64,
    /// Sessions opened.
    pub session_count: u32,
    /// From the call to Done.
    pub elapsed: Duration,
    /// What cannot be lost any more, and to what.
    pub durability: Durability,
    /// The very same checkpoint had been published before.
    pub unchanged: bool,
    /// How the stages of the last session spent their time, those of the receiver too;
    /// [`Stages::bottleneck`] names the one that limited it.
    pub stages: Stages,
    /// How chunks that this call sent were encoded, in the order of the codecs' numbers.
    pub codecs: Vec<Codec>,
}

/// A push or pull under way. Await it for its report; dropping it stops it, and the
/// same call made again goes on from the bytes that are durable by then.
///
/// ```
/// use std::time::Duration;
/// use tensorferry::{Client, PushOptions, SourceSet};
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
/// let (client, name) = (Client::new(&address)?, "run7".parse()?);
/// let source = std::sync::Arc::new(SourceSet::open(&[model], &Default::default())?);
///
/// // Dropped at once: it stops wherever it is.
/// drop(client.push(source.clone(), &name, PushOptions::default()));
///
/// // Watched from another task while it is awaited here.
/// let transfer = client.push(source, &name, PushOptions::default());
/// let watcher = transfer.watcher();
/// let watching = tokio::spawn(async move {
///     while watcher.progress().stage != tensorferry::Stage::Done {
///         tokio::time::sleep(Duration::from_millis(1)).await;
///     }
///     watcher.progress()
/// });
/// let report = transfer.await?;
/// let last = watching.await?;
/// assert_eq!((last.durable_bytes, last.total_bytes), (report.bytes, report.bytes));
/// assert!(report.wire_bytes + report.resumed_bytes <= report.bytes);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a push or pull stops when its transfer is dropped"]
pub struct Transfer {
    task: Task<Result<TransferReport, Error>>,
    pub(crate) progress: Arc<ProgressCell>,
    pub(crate) cancel: watch::Sender<bool>,
}

impl Transfer {
    pub(crate) fn new(
        task: Task<Result<TransferReport, Error>>,
        progress: Arc<ProgressCell>,
        cancel: watch::Sender<bool>,
    ) -> Self {
        Transfer {
            task,
            progress,
            cancel,
        }
    }

    /// Where it stands.
    pub fn progress(&self) -> Progress {
        self.progress.snapshot()
    }

    /// Whether it has come to its end, well or not: awaiting it takes no time then.
    pub fn is_finished(&self) -> bool {
        self.task.is_finished()
    }

    /// Asks it to stop in good order: it ends with [`Error::Interrupted`] once the
    /// receiver has made durable what it has, or after two seconds; a pull that publishes
    /// already does so to the end.
    pub fn cancel(&self) {
        let _ = self.cancel.send(true);
    }

    /// A handle that can cancel from elsewhere.
    pub fn canceller(&self) -> Canceller {
        Canceller {
            cancel: self.cancel.clone(),
        }
    }

    /// A handle that tells where it stands from elsewhere.
    pub fn watcher(&self) -> Watcher {
        Watcher {
            progress: Arc::clone(&self.progress),
        }
    }
}

/// Cancels a [`Transfer`] from another task.
#[derive(Clone, Debug)]
pub struct Canceller {
    cancel: watch::Sender<bool>,
}

impl Canceller {
    /// See [`Transfer::cancel`].
    pub fn cancel(&self) {
        let _ = self.cancel.send(true);
    }
}

/// Watches a [`Transfer`] from another task.
#[derive(Clone, Debug)]
pub struct Watcher {
    progress: Arc<ProgressCell>,
}

impl Watcher {
    /// See [`Transfer::progress`].
    pub fn progress(&self) -> Progress {
        self.progress.snapshot()
    }
}

impl IntoFuture for Transfer {
    type Output = Result<TransferReport, Error>;
    type IntoFuture = Pin<Box<dyn Future<Output = Self::Output> + Send>>;

    fn into_future(self) -> Self::IntoFuture {
        let task = self.task;
        Box::pin(async move {
            task.await
                .unwrap_or_else(|error| Err(Error::Bug(error.to_string())))
        })
    }
}
