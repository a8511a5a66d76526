//! Errors of the library as exceptions of Python.

use pyo3::{PyErr, prelude::*, types::PyDict};
use std::error::Error as _;
use tensorferry::{Error, ErrorCode, SourceError};

/// The exception for an error, made by `tensorferry._errors`.
pub(crate) fn raise(py: Python<'_>, error: &Error) -> PyErr {
    exception(py, error).unwrap_or_else(|failure| failure)
}

fn exception(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let details = PyDict::new(py);
    let mut causes = Vec::new();
    let mut cause = error.source();
    while let Some(error) = cause {
        causes.push(error.to_string());
        cause = error.source();
    }
    details.set_item("message", error.to_string())?;
    details.set_item("code", word(error.code()))?;
    details.set_item("exit_code", error.code().exit_code())?;
    details.set_item("retryable", error.is_retryable())?;
    details.set_item("hint", error.hint())?;
    details.set_item("causes", causes)?;
    details.set_item("tensor", tensor(error))?;
    let make = py.import("tensorferry._errors")?.getattr("from_native")?;
    Ok(PyErr::from_value(make.call1((details,))?))
}

/// What the error itself knows; a refusal says it in its words.
fn tensor(error: &Error) -> Option<&str> {
    match error {
        Error::Source(SourceError::Mutated { name } | SourceError::Range { name, .. })
        | Error::Damaged { name, .. } => Some(name),
        _ => None,
    }
}

/// Stable name of a class of errors.
fn word(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Usage => "usage",
        ErrorCode::SourceMissing => "source-missing",
        ErrorCode::Network => "network",
        ErrorCode::Integrity => "integrity",
        ErrorCode::Auth => "auth",
        ErrorCode::NoSpace => "no-space",
        ErrorCode::Exists => "exists",
        ErrorCode::Busy => "busy",
        ErrorCode::SourceChanged => "source-changed",
        ErrorCode::Interrupted => "interrupted",
        _ => "other",
    }
}
