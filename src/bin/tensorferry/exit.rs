//! How failures are told, and the exit status.

use crate::{
    output::{Format, Output},
    units,
};
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
    /// What an unfinished push leaves behind.
    left: Option<Box<Left>>,
}

/// How far an unfinished push came, and how it goes on.
#[derive(Debug, Serialize)]
pub(crate) struct Left {
    /// Bytes that are safe on the receiver.
    pub(crate) durable_bytes: u64,
    /// Bytes of the checkpoint.
    pub(crate) total_bytes: u64,
    /// The command that goes on from there.
    pub(crate) resume: String,
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
    pub(crate) fn interrupted(left: Left) -> Failure {
        Failure {
            error: Error::Interrupted,
            hint: Some(format!("resume with: {}", left.resume)),
            is_told: true,
            left: Some(Box::new(left)),
        }
    }

    /// A push that the same command takes up again.
    pub(crate) fn leaving(error: Error, left: Left) -> Failure {
        Failure {
            left: Some(Box::new(left)),
            ..Failure::from(error)
        }
    }

    /// Tells people now; the exit status and programs come at the end.
    pub(crate) fn tell(&mut self, output: &Output) {
        if std::mem::replace(&mut self.is_told, true) {
            return;
        }
        for (i, message) in messages(&self.error).iter().enumerate() {
            let label = if i == 0 { "error" } else { "caused by" };
            output.complain(&format!("{label}: {}", units::shown(message)));
        }
        if let Some(hint) = &self.hint {
            output.complain(&format!("hint: {hint}"));
        }
    }

    /// Its class.
    pub(crate) fn code(&self) -> ErrorCode {
        self.error.code()
    }

    /// The error and its causes on one line.
    pub(crate) fn message(&self) -> String {
        messages(&self.error).join(": ")
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure {
            hint: error.hint().map(str::to_owned),
            error,
            is_told: false,
            left: None,
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
    #[serde(flatten)]
    left: Option<&'a Left>,
}

/// Tells of a failure in every way that is asked for.
pub(crate) fn report(mut failure: Failure, output: &Output) -> ExitCode {
    failure.tell(output);
    let code = failure.code();
    output.event(
        "error",
        &ErrorEvent {
            code: word(code),
            exit: code.exit_code(),
            message: failure.message(),
            hint: failure.hint.as_deref(),
            left: failure.left.as_deref(),
        },
    );
    ExitCode::from(code.exit_code())
}

/// Tells of a command line that makes no sense.
pub(crate) fn report_usage(error: &clap::Error, format: Format) -> ExitCode {
    let _ = error.print();
    let text = error.render().to_string();
    // The first paragraph says what is wrong, the others how it is done right.
    let message = text.split("\n\n").next().unwrap_or_default();
    let message = message.strip_prefix("error: ").unwrap_or(message);
    let message = message.split_whitespace().collect::<Vec<_>>().join(" ");
    let mut failure = Failure::with_hint(Error::Usage(message), "see --help");
    failure.is_told = true;
    report(failure, &Output::new(format, false, 0))
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
pub(crate) fn word(code: ErrorCode) -> &'static str {
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
