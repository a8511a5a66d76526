//! The native half of the Python package `tensorferry`. What users call is written in
//! Python, in `python/tensorferry/`; here is what needs the library: transfers that run
//! while Python goes on, memory that is lent without a copy, and errors.

mod error;
mod lend;
mod open_push;
mod options;
mod query;
mod runtime;
mod server;
mod start;
#[path = "../../src/bin/tensorferry/target.rs"]
#[expect(
    dead_code,
    reason = "no call here goes without a name, as the verb `list` does"
)]
mod target;
mod transfer;

/// `tensorferry._native`.
#[pyo3::pymodule]
mod _native {
    #[pymodule_export]
    use crate::{
        open_push::{OpenPush, open_push},
        query::{authority, check_manifest, describe, discard, inspect, list, status, verify},
        server::{Server, serve},
        start::{pull, push},
        transfer::Transfer,
    };

    #[pymodule_init]
    fn init(module: &pyo3::Bound<'_, pyo3::types::PyModule>) -> pyo3::PyResult<()> {
        use pyo3::types::PyModuleMethods;
        module.add("__version__", env!("CARGO_PKG_VERSION"))?;
        // Without it sources are read into buffers instead.
        if let Err(error) = tensorferry::install_sigbus_guard() {
            tracing::warn!(%error, "files cannot be mapped safely");
        }
        Ok(())
    }
}
