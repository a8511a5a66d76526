//! What servers, folders and sources say of themselves.

use crate::{
    error::raise,
    options::{Options, open_source},
    runtime::wait,
};
use pyo3::{
    exceptions::PyRuntimeError,
    prelude::*,
    types::{PyBytes, PyDict},
};
use std::path::PathBuf;
use tensorferry::{
    Checkpoint, CheckpointSummary, Client, Error,
    plan::{CheckpointName, EntryKind, Order},
    source::SourceEntry,
};
use tokio::task::spawn_blocking;

/// `host:port` of an authority, with the port that is used where none is given.
#[pyfunction]
pub(crate) fn authority(py: Python<'_>, authority: &str) -> PyResult<String> {
    let client = Client::new(authority).map_err(|error| raise(py, &error))?;
    Ok(client.authority().to_owned())
}

/// Checkpoints and transfers of a server whose names begin with `prefix`.
#[pyfunction]
pub(crate) fn list<'py>(
    py: Python<'py>,
    authority: String,
    prefix: String,
) -> PyResult<Vec<Bound<'py, PyDict>>> {
    let rows = ask(
        py,
        async move { Client::new(&authority)?.list(&prefix).await },
    )?;
    rows.iter().map(|row| summary(py, row)).collect()
}

/// Whether a name is published, and how far its unfinished transfer is.
#[pyfunction]
pub(crate) fn status<'py>(
    py: Python<'py>,
    authority: String,
    name: String,
) -> PyResult<Bound<'py, PyDict>> {
    let status = ask(py, async move {
        let name: CheckpointName = name.parse()?;
        Client::new(&authority)?.status(&name).await
    })?;
    let dict = PyDict::new(py);
    dict.set_item("published", status.published)?;
    let transfer = status.transfer.as_ref();
    let transfer = transfer.map(|row| summary(py, row)).transpose()?;
    dict.set_item("transfer", transfer)?;
    Ok(dict)
}

/// The manifest of a published checkpoint, as JSON.
#[pyfunction]
pub(crate) fn describe<'py>(
    py: Python<'py>,
    authority: String,
    name: String,
) -> PyResult<Bound<'py, PyBytes>> {
    let json = ask(py, async move {
        let name: CheckpointName = name.parse()?;
        Client::new(&authority)?.describe(&name).await
    })?;
    Ok(PyBytes::new(py, &json))
}

/// Throws an unfinished transfer away; the durable bytes that were lost, or `None`.
#[pyfunction]
pub(crate) fn discard(py: Python<'_>, authority: String, name: String) -> PyResult<Option<u64>> {
    ask(py, async move {
        let name: CheckpointName = name.parse()?;
        Client::new(&authority)?.discard(&name).await
    })
}

/// What is in a source of any format; the metadata, names, types and shapes.
#[pyfunction]
pub(crate) fn inspect<'py>(
    py: Python<'py>,
    paths: Vec<PathBuf>,
    options: Options,
) -> PyResult<Bound<'py, PyDict>> {
    let select = options.source()?;
    let source = ask(py, open_source(paths, select))?;
    let (mut tensors, mut files) = (Vec::new(), Vec::new());
    for entry in source.entries() {
        match entry.header.kind {
            EntryKind::Tensor { dtype } => tensors.push(tensor(py, entry, dtype.name())?),
            EntryKind::Blob => {
                let file = PyDict::new(py);
                file.set_item("name", &entry.header.name)?;
                file.set_item("nbytes", entry.header.byte_len)?;
                files.push(file);
            }
        }
    }
    let dict = PyDict::new(py);
    dict.set_item("format", source.format())?;
    dict.set_item("metadata", source.metadata().clone())?;
    dict.set_item("total_bytes", source.total_bytes())?;
    dict.set_item("tensors", tensors)?;
    dict.set_item("files", files)?;
    Ok(dict)
}

fn tensor<'py>(py: Python<'py>, entry: &SourceEntry, dtype: &str) -> PyResult<Bound<'py, PyDict>> {
    let header = &entry.header;
    let dict = PyDict::new(py);
    dict.set_item("name", &header.name)?;
    dict.set_item("dtype", dtype)?;
    dict.set_item("shape", &header.shape)?;
    dict.set_item("nbytes", header.byte_len)?;
    dict.set_item("fortran_order", header.order == Order::Fortran)?;
    dict.set_item("big_endian", header.big_endian)?;
    dict.set_item("aliases", &entry.aliases)?;
    dict.set_item("trainable", entry.trainable)?;
    Ok(dict)
}

/// Checks a landed folder against its manifest: reads that only, and fails where it
/// contradicts itself.
#[pyfunction]
pub(crate) fn check_manifest(py: Python<'_>, folder: PathBuf) -> PyResult<()> {
    blocking(py, move || Checkpoint::open(&folder).map(drop))
}

/// Reads a landed folder again and compares everything with its manifest.
#[pyfunction]
pub(crate) fn verify<'py>(py: Python<'py>, folder: PathBuf) -> PyResult<Bound<'py, PyDict>> {
    let report = blocking(py, move || Checkpoint::open(&folder)?.verify(|_| {}))?;
    let dict = PyDict::new(py);
    let damages = report.damages.into_iter();
    let damages: Vec<_> = damages.map(|d| (d.name, d.file, d.why)).collect();
    dict.set_item("files", report.file_count)?;
    dict.set_item("bytes", report.byte_count)?;
    dict.set_item("damages", damages)?;
    Ok(dict)
}

fn summary<'py>(py: Python<'py>, row: &CheckpointSummary) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    dict.set_item("name", &row.name)?;
    dict.set_item("published", row.published)?;
    dict.set_item("offered", row.offered)?;
    dict.set_item("entries", row.entry_count)?;
    dict.set_item("total_bytes", row.total_bytes)?;
    dict.set_item("durable_bytes", row.durable_bytes)?;
    dict.set_item("active", row.active)?;
    dict.set_item("modified", row.modified_unix_seconds)?;
    Ok(dict)
}

fn ask<T: Send>(
    py: Python<'_>,
    question: impl Future<Output = Result<T, Error>> + Send,
) -> PyResult<T> {
    wait(py, question)?.map_err(|error| raise(py, &error))
}

/// On a thread that may block.
fn blocking<T: Send + 'static>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> PyResult<T> {
    let done = wait(py, async { spawn_blocking(work).await })?;
    let result = done.map_err(|e| PyRuntimeError::new_err(e.to_string()))?;
    result.map_err(|error| raise(py, &error))
}
