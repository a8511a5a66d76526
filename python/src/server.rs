//! A server in the background of this process.

use crate::{
    error::raise,
    lend::lend,
    open_push::Meaning,
    runtime::{runtime, wait},
};
use pyo3::{exceptions::PyRuntimeError, prelude::*};
use std::{
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
};
use tensorferry::{Error, GrowingSource, MemoryEntry, NameFilter, plan::CheckpointName};
use tokio::{sync::oneshot, task::JoinHandle};

/// Serves until it is stopped or dropped.
#[pyclass(frozen, module = "tensorferry._native")]
pub(crate) struct Server {
    address: SocketAddr,
    background: Mutex<Option<Background>>,
}

struct Background {
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), Error>>,
}

/// Starts a server that takes checkpoints of at most `quota` bytes. `exports`: names and
/// paths; `snapshots`: names and callables that return an iterable of
/// `(tensor name, callable)`, of which the second gives
/// `(meaning, flat uint8 array, trainable)`.
#[pyfunction]
pub(crate) fn serve(
    py: Python<'_>,
    root: PathBuf,
    listen: String,
    exports: Vec<(String, PathBuf)>,
    snapshots: Vec<(String, Py<PyAny>)>,
    insecure: bool,
    quota: Option<u64>,
) -> PyResult<Server> {
    let began = wait(py, async move {
        let mut builder = tensorferry::Server::builder(root)
            .insecure(insecure)
            .quota_checkpoint(quota.unwrap_or(0));
        for (name, path) in exports {
            builder = builder.export(name.parse()?, path);
        }
        for (name, callable) in snapshots {
            let name: CheckpointName = name.parse()?;
            let callable = Arc::new(callable);
            builder = builder.export_with(name, move |filter| snapshot(&callable, filter));
        }
        let no_address =
            |why: String| Error::Usage(format!("{listen:?} is no address to listen on: {why}"));
        let mut found = tokio::net::lookup_host(&listen).await;
        let found = found.as_mut().map_err(|e| no_address(e.to_string()))?;
        let address = found
            .next()
            .ok_or_else(|| no_address("unknown".to_owned()))?;
        builder.bind(address).await
    })?;
    let server = began.map_err(|error| raise(py, &error))?;
    let address = server.local_addr();
    let (stop, stopped) = oneshot::channel();
    let serving = runtime()?.spawn(server.serve(async {
        let _ = stopped.await;
    }));
    Ok(Server {
        address,
        background: Mutex::new(Some(Background { stop, serving })),
    })
}

#[pymethods]
impl Server {
    /// `host:port`.
    #[getter]
    fn address(&self) -> String {
        self.address.to_string()
    }

    /// Stops in good order: every session makes durable what it has. Again it does nothing.
    fn stop(&self, py: Python<'_>) -> PyResult<()> {
        let background = {
            let mut background = self
                .background
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            background.take()
        };
        let Some(Background { stop, serving }) = background else {
            return Ok(());
        };
        let _ = stop.send(());
        let ended = wait(py, serving)?;
        let result = ended.map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
        result.map_err(|error| raise(py, &error))
    }
}

/// Copies what the callable offers, one tensor at a time.
fn snapshot(callable: &Py<PyAny>, filter: &NameFilter) -> Result<GrowingSource, Error> {
    let source = GrowingSource::new()?;
    let taken = Python::try_attach(|py| -> PyResult<()> {
        let tensors = callable.bind(py).call0()?;
        for pair in tensors.try_iter()? {
            let (name, tensor): (String, Bound<'_, PyAny>) = pair?.extract()?;
            if !filter.takes(&name) {
                continue;
            }
            let tensor = tensor.call0()?;
            let (meaning, array, trainable): (Meaning, Bound<'_, PyAny>, Option<bool>) =
                tensor.extract()?;
            let bytes = lend(&array)?.to_vec();
            let header = meaning.header().map_err(|error| raise(py, &error))?;
            let mut entry = MemoryEntry::new(header, bytes.into());
            if let Some(trainable) = trainable {
                entry = entry.trainable(trainable);
            }
            let added = source.add_entry(entry).map_err(Error::from);
            added.map_err(|error| raise(py, &error))?;
        }
        Ok(())
    });
    match taken {
        Some(Ok(())) => Ok(source),
        Some(Err(raised)) => Err(Error::Usage(raised.to_string())),
        None => Err(Error::Usage("Python is shutting down".to_owned())),
    }
}
