//! The runtime behind every call, and how a thread of Python waits for it.

use pyo3::{exceptions::PyRuntimeError, prelude::*};
use std::{future::Future, pin::pin, sync::OnceLock, time::Duration};
use tokio::runtime::{Builder, Runtime};

/// Ctrl-C is noticed, and lent arrays are given back, at least this often.
pub(crate) const TICK: Duration = Duration::from_millis(50);

struct Running {
    runtime: std::io::Result<Runtime>,
    process: u32,
}

/// Started when it is first needed. Never shut down: that would have to wait, wherever the
/// last user is dropped.
///
/// # Errors
/// In a process that was forked off one that used it: threads do not survive a fork.
pub(crate) fn runtime() -> PyResult<&'static Runtime> {
    static RUNNING: OnceLock<Running> = OnceLock::new();
    let running = RUNNING.get_or_init(|| Running {
        runtime: Builder::new_multi_thread()
            .enable_all()
            .thread_name("ferry-python")
            .build(),
        process: std::process::id(),
    });
    if running.process != std::process::id() {
        return Err(PyRuntimeError::new_err(
            "this process was forked off one that had used tensorferry, whose threads are not here: \
             start it with the method \"spawn\" or \"forkserver\"",
        ));
    }
    running
        .runtime
        .as_ref()
        .map_err(|error| PyRuntimeError::new_err(format!("no runtime: {error}")))
}

/// Waits without the GIL and drops the future when a signal handler raises, such as that
/// of Ctrl-C.
///
/// # Errors
/// What the handler raised.
pub(crate) fn wait<F>(py: Python<'_>, future: F) -> PyResult<F::Output>
where
    F: Future + Send,
    F::Output: Send,
{
    let mut future = pin!(future);
    loop {
        if let Some(output) = step(py, future.as_mut())? {
            return Ok(output);
        }
        py.check_signals()?;
    }
}

/// Waits for one tick at most.
pub(crate) fn step<F>(py: Python<'_>, future: F) -> PyResult<Option<F::Output>>
where
    F: Future + Send,
    F::Output: Send,
{
    let runtime = runtime()?;
    // The timer is made inside the runtime.
    let ticked = async { tokio::time::timeout(TICK, future).await };
    Ok(py.detach(|| runtime.block_on(ticked)).ok())
}
