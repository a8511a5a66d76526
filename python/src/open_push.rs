//! A push out of the memory of this process: arrays are added while earlier ones travel.

use crate::{
    error::raise,
    lend::lend,
    options::Options,
    runtime::wait,
    start::Place,
    transfer::{Transfer, progress_dict},
};
use pyo3::{
    exceptions::{PyRuntimeError, PyValueError},
    prelude::*,
    types::PyDict,
};
use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tensorferry::{
    BUDGET_BYTES_DEFAULT, Dtype, Embedded, Error, MemoryEntry,
    plan::{EntryHeader, Order},
};
use tokio::task::spawn_blocking;

/// A push that is given up has this long to stop in good order.
const FAREWELL: Duration = Duration::from_secs(3);

/// What a flat `uint8` array means.
#[derive(FromPyObject)]
pub(crate) struct Meaning {
    #[pyo3(item)]
    name: String,
    #[pyo3(item)]
    dtype: String,
    #[pyo3(item)]
    shape: Vec<u64>,
    #[pyo3(item)]
    fortran_order: bool,
    #[pyo3(item)]
    big_endian: bool,
}

impl Meaning {
    /// # Errors
    /// A type that is not known, or a bad name or shape.
    pub(crate) fn header(&self) -> Result<EntryHeader, Error> {
        let dtype = Dtype::from_name(&self.dtype);
        let unknown = || Error::Usage(format!("{:?}: no type {:?}", self.name, self.dtype));
        let mut header =
            EntryHeader::tensor(self.name.as_str(), dtype.ok_or_else(unknown)?, &self.shape)?;
        header.big_endian = self.big_endian;
        if self.fortran_order {
            header.order = Order::Fortran;
        }
        header.check()?;
        Ok(header)
    }
}

/// A push whose entries are added. Dropping it gives it up.
#[pyclass(frozen, module = "tensorferry._native")]
pub(crate) struct OpenPush {
    /// Nothing after its end.
    running: Mutex<Option<Running>>,
}

struct Running {
    push: Arc<tensorferry::OpenPush>,
    embedded: Option<Embedded>,
}

/// Begins a push to a server or a local folder and returns at once.
#[pyfunction]
pub(crate) fn open_push(
    py: Python<'_>,
    dest: PathBuf,
    key: String,
    metadata: BTreeMap<String, String>,
    options: Options,
) -> PyResult<OpenPush> {
    let mut options = options.push()?;
    let began = wait(py, async move {
        Ok(match Place::parse(dest.as_os_str())? {
            Place::Server(client, name) => Running {
                push: Arc::new(client.push_open_with(&name, &key, metadata, options)?),
                embedded: None,
            },
            Place::Folder(folder) => {
                options.budget_bytes = BUDGET_BYTES_DEFAULT / 2;
                let embedded = Embedded::start(&folder, options.budget_bytes).await?;
                let push = embedded.push_open_with(&key, metadata, options)?;
                Running {
                    push: Arc::new(push),
                    embedded: Some(embedded),
                }
            }
        })
    })?;
    let running = began.map_err(|error: Error| raise(py, &error))?;
    Ok(OpenPush {
        running: Mutex::new(Some(running)),
    })
}

impl OpenPush {
    fn push(&self) -> PyResult<Arc<tensorferry::OpenPush>> {
        let running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let push = running.as_ref().map(|running| Arc::clone(&running.push));
        push.ok_or_else(ended)
    }

    fn take(&self) -> PyResult<Running> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        running.take().ok_or_else(ended)
    }
}

#[pymethods]
impl OpenPush {
    /// Adds a tensor whose bytes are those of a flat `uint8` array, which is lent until the
    /// push has ended. With `checked` they are summed first.
    #[pyo3(signature = (meaning, array, trainable, checked))]
    fn add(
        &self,
        py: Python<'_>,
        meaning: Meaning,
        array: &Bound<'_, PyAny>,
        trainable: Option<bool>,
        checked: bool,
    ) -> PyResult<()> {
        let push = self.push()?;
        let header = meaning.header().map_err(|error| raise(py, &error))?;
        let mut entry = MemoryEntry::new(header, lend(array)?);
        if let Some(trainable) = trainable {
            entry = entry.trainable(trainable);
        }
        if checked {
            let summed = wait(py, async { spawn_blocking(|| entry.checked()).await })?;
            entry = summed.map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
        }
        let added = push.add_entry(entry);
        added.map_err(|error| raise(py, &error))
    }

    /// Whether it has ended, which before `finish` means that it failed.
    fn has_ended(&self) -> PyResult<bool> {
        Ok(self.push()?.is_finished())
    }

    /// Where it stands.
    fn progress<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        progress_dict(py, &self.push()?.watcher().progress())
    }

    /// Nothing more will be added.
    fn finish(&self) -> PyResult<Transfer> {
        let Running { push, embedded } = self.take()?;
        let alone = |_| PyValueError::new_err("an entry is being added");
        let push = Arc::try_unwrap(push).map_err(alone)?;
        Ok(Transfer::new(push.finish(), embedded))
    }

    /// Gives it up in good order: nothing is published, and what has arrived is kept for the
    /// next push of the same key.
    fn abandon(&self, py: Python<'_>) -> PyResult<()> {
        let Running { push, embedded } = self.take()?;
        push.canceller().cancel();
        wait(py, async move {
            let ended = async {
                while !push.is_finished() {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            };
            let _ = tokio::time::timeout(FAREWELL, ended).await;
            drop(push);
            if let Some(embedded) = embedded {
                let _ = embedded.stop().await;
            }
        })
    }

    /// Asks it to stop, from another thread.
    fn cancel(&self) -> PyResult<()> {
        self.push()?.canceller().cancel();
        Ok(())
    }
}

fn ended() -> PyErr {
    PyRuntimeError::new_err("the push has ended")
}
