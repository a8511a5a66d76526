//! Begins pushes and pulls of files.

use crate::{
    error::raise,
    options::{Options, open_source},
    runtime::{runtime, wait},
    target::{Target, checkpoint_name},
    transfer::Transfer,
};
use pyo3::prelude::*;
use std::{ffi::OsStr, path::PathBuf};
use tensorferry::{BUDGET_BYTES_DEFAULT, Client, Embedded, Error, plan::CheckpointName};

/// Where something goes, checked.
pub(crate) enum Place {
    Server(Box<Client>, CheckpointName),
    Folder(PathBuf),
}

impl Place {
    pub(crate) fn parse(dest: &OsStr) -> Result<Place, Error> {
        Ok(match Target::parse(dest)? {
            Target::Server { authority, name } => {
                let name = checkpoint_name(&authority, &name)?;
                Place::Server(Box::new(Client::new(&authority)?), name)
            }
            Target::Folder(folder) => Place::Folder(folder),
        })
    }

    /// A name on a server, which a pull comes from.
    fn server(dest: &OsStr) -> Result<(Box<Client>, CheckpointName), Error> {
        match Place::parse(dest)? {
            Place::Server(client, name) => Ok((client, name)),
            Place::Folder(folder) => Err(Error::Usage(format!(
                "{} is a folder: a pull comes from ferry://HOST/NAME",
                folder.display()
            ))),
        }
    }
}

/// Opens the sources and begins to push them. Returns at once after that.
#[pyfunction]
pub(crate) fn push(
    py: Python<'_>,
    sources: Vec<PathBuf>,
    dest: PathBuf,
    options: Options,
) -> PyResult<Transfer> {
    let (mut push, select) = (options.push()?, options.source()?);
    let began = wait(py, async move {
        // A wrong destination shows before a long look at the source.
        let place = Place::parse(dest.as_os_str())?;
        let source = open_source(sources, select).await?;
        push.check_for(&source)?;
        match place {
            Place::Server(client, name) => Ok((client.push(source, &name, push), None)),
            Place::Folder(folder) => {
                // Both roles are in this process and share the budget.
                push.budget_bytes = BUDGET_BYTES_DEFAULT / 2;
                let embedded = Embedded::start(&folder, push.budget_bytes).await?;
                let transfer = embedded.push(source, push)?;
                Ok((transfer, Some(embedded)))
            }
        }
    })?;
    let (transfer, embedded) = began.map_err(|error: Error| raise(py, &error))?;
    Ok(Transfer::new(transfer, embedded))
}

/// Begins to pull and returns at once.
#[pyfunction]
pub(crate) fn pull(
    py: Python<'_>,
    url: PathBuf,
    folder: PathBuf,
    options: Options,
) -> PyResult<Transfer> {
    let options = options.pull()?;
    let place = Place::server(url.as_os_str());
    let (client, name) = place.map_err(|error| raise(py, &error))?;
    let _entered = runtime()?.enter();
    Ok(Transfer::new(client.pull(&name, folder, options), None))
}
