//! How failures are told, and the exit status.

use crate::{output::Output, units};
use serde::Serialize;
use std::process::ExitCode;
use tensorferry::{Error, ErrorCode, plan::PlanError, source::SourceError};

/// Why a verb failed.
#[derive(Debug)]
pub(crate) struct Failure {
    error: Error,
    hint: Option<String>,
    /// People have been told already.
    is_told: bool,
}

impl Failure {
    /// With a better hint than the library's.
    pub(crate) fn with_hint(error: Error, hint: impl Into<String>) -> Failure {
        Failure {
            hint: Some(hint.into()),
            ..Failure::from(error)
        }
    }

    /// An interrupt of which people have been told.
    pub(crate) fn interrupted(resume: String) -> Failure {
        Failure {
            error: Error::Interrupted,
            hint: Some(format!("resume with: {resume}")),
            is_told: true,
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure {
            hint: error.hint().map(str::to_owned),
            error,
            is_told: false,
        }
    }
}

impl From<SourceError> for Failure {
    fn from(error: SourceError) -> Failure {
        Error::from(error).into()
    }
}

impl From<PlanError> for Failure {
    fn from(error: PlanError) -> Failure {
        Error::from(error).into()
    }
}

#[derive(Serialize)]
struct ErrorEvent<'a> {
    code: &'a str,
    exit: u8,
    message: String,
    hint: Option<&'a str>,
}

/// Tells of a failure in every way that is asked for.
pub(crate) fn report(failure: &Failure, output: &Output) -> ExitCode {
    let code = failure.error.code();
    let messages = messages(&failure.error);
    if !failure.is_told {
        for (i, message) in messages.iter().enumerate() {
            let label = if i == 0 { "error" } else { "caused by" };
            output.complain(&format!("{label}: {}", units::shown(message)));
        }
        if let Some(hint) = &failure.hint {
            output.complain(&format!("hint: {hint}"));
        }
    }
    output.event(
        "error",
        &ErrorEvent {
            code: word(code),
            exit: code.exit_code(),
            message: messages.join(": "),
            hint: failure.hint.as_deref(),
        },
    );
    ExitCode::from(code.exit_code())
}

/// The error and its causes, without those that only repeat what was said.
fn messages(error: &Error) -> Vec<String> {
    let mut messages = vec![error.to_string()];
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        let text = error.to_string();
        if !messages.last().is_some_and(|said| said.ends_with(&text)) {
            messages.push(text);
        }
        cause = error.source();
    }
    messages
}

/// Stable word of a class of errors.
fn word(code: ErrorCode) -> &'static str {
    match code {
        ErrorCode::Usage => "usage",
        ErrorCode::SourceMissing => "source_missing",
        ErrorCode::Network => "network",
        ErrorCode::Integrity => "integrity",
        ErrorCode::Auth => "auth",
        ErrorCode::NoSpace => "no_space",
        ErrorCode::Exists => "exists",
        ErrorCode::Busy => "busy",
        ErrorCode::SourceChanged => "source_changed",
        ErrorCode::Interrupted => "interrupted",
        _ => "other",
    }
}
