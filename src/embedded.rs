//! A push into a local folder: the same path as over the network, through a
//! server that lives only as long as the push.

use crate::{
    checkpoint::{landing_place, local_target},
    client::Client,
    error::Error,
    open_push::OpenPush,
    options::{BUDGET_BYTES_MIN, PushOptions},
    server::Server,
    source::SourceSet,
    store::Catalog,
    transfer::Transfer,
};
use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    sync::Arc,
};
use tokio::{sync::oneshot, task::JoinHandle};

/// Name of the only checkpoint on the wire of an embedded server.
const WIRE_NAME: &str = "local";

/// A server inside this process that receives one folder.
///
/// ```
/// use tensorferry::{BUDGET_BYTES_DEFAULT, Checkpoint, Embedded, PushOptions, SourceSet};
///
/// # #[tokio::main]
/// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let temp = tempfile::tempdir()?;
/// # let model = temp.path().join("w.npy");
/// # let header = tensorferry::format::npy::encode_header("|u1", false, &[1 << 20]);
/// # std::fs::write(&model, [header, vec![7; 1 << 20]].concat())?;
/// let folder = temp.path().join("landed");
/// // Both roles are in this process and share its memory.
/// let embedded = Embedded::start(&folder, BUDGET_BYTES_DEFAULT / 2).await?;
/// let source = SourceSet::open(&[model], &Default::default())?;
/// let report = embedded.push(source, PushOptions::default())?.await?;
/// embedded.stop().await?;
///
/// let landed = Checkpoint::open(&folder)?;
/// assert_eq!(landed.total_bytes(), report.bytes);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "it stops when it is dropped"]
pub struct Embedded {
    parent: PathBuf,
    folder: String,
    client: Client,
    stop: Option<oneshot::Sender<()>>,
    serving: JoinHandle<Result<(), Error>>,
}

impl Embedded {
    /// A server on a free port of this machine that makes `folder`, whose parent
    /// is made if need be. Unfinished work lies in `.tensorferry` beside it.
    ///
    /// # Errors
    /// The parent cannot be used, or `folder` has no name of its own.
    pub async fn start(folder: impl AsRef<Path>, budget_bytes: u64) -> Result<Embedded, Error> {
        let (parent, local) = landing_place(folder.as_ref()).await?;
        let name = local.as_str().to_owned();
        let server = Server::builder(&parent)
            .budget_bytes(budget_bytes.max(BUDGET_BYTES_MIN))
            .alias(WIRE_NAME.parse()?, local)
            .bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
            .await?;
        let client = Client::new(&server.local_addr().to_string())?;
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server.serve(async {
            let _ = stopped.await;
        }));
        Ok(Embedded {
            parent,
            folder: name,
            client,
            stop: Some(stop),
            serving,
        })
    }

    /// Pushes into the folder.
    ///
    /// # Errors
    /// [`Error::Bug`] only.
    pub fn push(
        &self,
        source: impl Into<Arc<SourceSet>>,
        options: PushOptions,
    ) -> Result<Transfer, Error> {
        let target = local_target(&self.parent, &self.folder);
        Ok(self
            .client
            .push_as(source.into(), &WIRE_NAME.parse()?, target, options))
    }

    /// Pushes what is still being produced into the folder, as
    /// [`Client::push_open_with`](crate::Client::push_open_with) does.
    ///
    /// # Errors
    /// [`Error::Source`] when the system has no random numbers.
    pub fn push_open_with(
        &self,
        key: &str,
        metadata: BTreeMap<String, String>,
        options: PushOptions,
    ) -> Result<OpenPush, Error> {
        let target = local_target(&self.parent, &self.folder);
        let name = WIRE_NAME.parse()?;
        self.client
            .push_open_as(&name, target, key, metadata, options)
    }

    /// Stops the server; what is written is committed. Removes the service folder
    /// when nothing is in it.
    ///
    /// # Errors
    /// The server failed.
    pub async fn stop(mut self) -> Result<(), Error> {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        (&mut self.serving)
            .await
            .unwrap_or_else(|e| Err(Error::Bug(e.to_string())))?;
        let parent = self.parent.clone();
        let cleaned = tokio::task::spawn_blocking(move || {
            Catalog::open(&parent).map(|c| c.remove_empty_service_dir())
        });
        cleaned.await.map_err(|e| Error::Bug(e.to_string()))??;
        Ok(())
    }
}

impl Drop for Embedded {
    fn drop(&mut self) {
        self.serving.abort();
    }
}
