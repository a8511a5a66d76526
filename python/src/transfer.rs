//! A transfer under way, as Python waits for it.

use crate::{
    error::raise,
    runtime::{TICK, step},
};
use pyo3::{exceptions::PyRuntimeError, prelude::*, types::PyDict};
use std::{
    future::{Future, IntoFuture},
    pin::Pin,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};
use tensorferry::{
    Canceller, Embedded, Error, Progress, Stage, TransferReport, Watcher, format::codec::Codec,
};

/// After Ctrl-C the transfer has this long to stop in good order: the library itself waits
/// for two seconds.
const FAREWELL: Duration = Duration::from_secs(3);
/// Progress is told at most this often.
const TELL: Duration = Duration::from_millis(100);

type Ending = Pin<Box<dyn Future<Output = Result<TransferReport, Error>> + Send>>;

/// A push or pull. Dropping it stops it.
#[pyclass(frozen, module = "tensorferry._native")]
pub(crate) struct Transfer {
    /// Nothing while a thread waits for it, and after its end.
    ending: Mutex<Option<Ending>>,
    watcher: Watcher,
    canceller: Canceller,
}

impl Transfer {
    /// `embedded`: the server of a local folder, which is stopped at the end.
    pub(crate) fn new(transfer: tensorferry::Transfer, embedded: Option<Embedded>) -> Self {
        let (watcher, canceller) = (transfer.watcher(), transfer.canceller());
        let ending = async move {
            let result = transfer.into_future().await;
            if let Some(embedded) = embedded {
                let stopped = embedded.stop().await;
                // Why the push failed says more than why the server did.
                if result.is_ok() {
                    stopped?;
                }
            }
            result
        };
        Transfer {
            ending: Mutex::new(Some(Box::pin(ending))),
            watcher,
            canceller,
        }
    }

    fn take(&self) -> PyResult<Ending> {
        let mut ending = self.ending.lock().unwrap_or_else(PoisonError::into_inner);
        let taken = || PyRuntimeError::new_err("the transfer is waited for, or has ended");
        ending.take().ok_or_else(taken)
    }
}

#[pymethods]
impl Transfer {
    /// Waits for the end; `tell` is called with the progress from this thread. When a signal
    /// handler or `tell` raises, the transfer stops in good order first.
    #[pyo3(signature = (tell=None))]
    fn wait<'py>(
        &self,
        py: Python<'py>,
        tell: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let mut ending = self.take()?;
        let mut told = Instant::now();
        loop {
            if let Some(result) = step(py, ending.as_mut())? {
                let report = result.map_err(|error| raise(py, &error))?;
                if let Some(tell) = &tell {
                    tell.call1((self.progress(py)?,))?;
                }
                return report_dict(py, &report);
            }
            let mut heard = py.check_signals();
            if let Some(tell) = &tell
                && heard.is_ok()
                && told.elapsed() + TICK / 2 >= TELL
            {
                told = Instant::now();
                heard = tell.call1((self.progress(py)?,)).map(drop);
            }
            if let Err(raised) = heard {
                self.stop(py, ending);
                return Err(raised);
            }
        }
    }

    /// Where it stands.
    fn progress<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        progress_dict(py, &self.watcher.progress())
    }

    /// Asks it to stop in good order; whoever waits for it is told that it was interrupted.
    fn cancel(&self) {
        self.canceller.cancel();
    }
}

impl Transfer {
    /// Makes durable what has arrived, unless that takes too long or is interrupted again.
    fn stop(&self, py: Python<'_>, mut ending: Ending) {
        self.canceller.cancel();
        let begun = Instant::now();
        while begun.elapsed() < FAREWELL {
            let stepped = step(py, ending.as_mut());
            if !matches!(stepped, Ok(None)) || py.check_signals().is_err() {
                return;
            }
        }
    }
}

pub(crate) fn progress_dict<'py>(
    py: Python<'py>,
    progress: &Progress,
) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let stage = match progress.stage {
        Stage::Connecting => "connecting",
        Stage::Waiting => "waiting",
        Stage::Sending => "sending",
        Stage::Publishing => "publishing",
        Stage::Done => "done",
        _ => "other",
    };
    dict.set_item("stage", stage)?;
    dict.set_item("total_bytes", progress.total_bytes)?;
    dict.set_item("durable_bytes", progress.durable_bytes)?;
    dict.set_item("settled_bytes", progress.settled_bytes)?;
    dict.set_item("wire_bytes", progress.wire_bytes)?;
    dict.set_item("resumed_bytes", progress.resumed_bytes)?;
    dict.set_item("sessions", progress.session_count)?;
    Ok(dict)
}

fn report_dict<'py>(py: Python<'py>, report: &TransferReport) -> PyResult<Bound<'py, PyDict>> {
    let dict = PyDict::new(py);
    let bottleneck = report.stages.bottleneck();
    let codec = match report.codecs.as_slice() {
        [] => None,
        [Codec::None] => Some("none"),
        [Codec::Lz4] => Some("lz4"),
        codecs if codecs.iter().all(|codec| codec.is_constant()) => Some("constant"),
        _ => Some("mixed"),
    };
    dict.set_item("checkpoint", &report.checkpoint)?;
    dict.set_item("tensors", report.tensor_count)?;
    dict.set_item("files", report.file_count)?;
    dict.set_item("bytes", report.bytes)?;
    dict.set_item("wire_bytes", report.wire_bytes)?;
    dict.set_item("resumed_bytes", report.resumed_bytes)?;
    dict.set_item("seconds", report.elapsed.as_secs_f64())?;
    dict.set_item("sessions", report.session_count)?;
    dict.set_item("durability", report.durability.as_str())?;
    dict.set_item("unchanged", report.unchanged)?;
    dict.set_item("lanes", report.stages.lanes)?;
    dict.set_item("codec", codec)?;
    dict.set_item("bottleneck", bottleneck.map(|row| row.stage.as_str()))?;
    dict.set_item("bottleneck_side", bottleneck.map(|row| row.side.as_str()))?;
    Ok(dict)
}
