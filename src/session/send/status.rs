//! What the end of a call says: no, or that the connection broke.

use crate::{
    plan::{MAX_TEXT_LEN, printable},
    protocol::Reason,
    session::error::SendError,
    wire::reason_of,
};

/// A status with one of our reasons is a refusal, and so is one that would come again;
/// anything else is the transport.
pub(crate) fn status_error(status: &tonic::Status) -> SendError {
    match reason_of(status) {
        Some(reason) => SendError::Refused {
            reason,
            message: printable(status.message(), MAX_TEXT_LEN),
        },
        None if status.code() == tonic::Code::Unimplemented => SendError::Refused {
            reason: Reason::Unsupported,
            message: "the server is not a tensorferry server".to_owned(),
        },
        None if is_lasting(status.code()) => SendError::Refused {
            reason: Reason::Unsupported,
            message: format!("{:?}: {}", status.code(), transport_message(status)),
        },
        None => SendError::Disconnected {
            message: transport_message(status),
        },
    }
}

/// Codes by which gRPC itself, a proxy or a server of another version says no.
fn is_lasting(code: tonic::Code) -> bool {
    use tonic::Code;
    matches!(
        code,
        Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::FailedPrecondition
            | Code::OutOfRange
            | Code::Unauthenticated
    )
}

/// The innermost cause says most.
fn transport_message(status: &tonic::Status) -> String {
    let mut message = status.message().to_owned();
    let mut cause = std::error::Error::source(status);
    while let Some(error) = cause {
        message = error.to_string();
        cause = error.source();
    }
    printable(&message, MAX_TEXT_LEN)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tonic::{Code, Status};

    #[test]
    fn what_would_come_again_is_not_tried_again() {
        let is_refused = |code| {
            let error = status_error(&Status::new(code, "why"));
            matches!(error, SendError::Refused { .. })
        };
        for code in [Code::Unimplemented, Code::OutOfRange, Code::Unauthenticated] {
            assert!(is_refused(code), "{code:?}");
        }
        for code in [
            Code::Unavailable,
            Code::Unknown,
            Code::Internal,
            Code::Cancelled,
        ] {
            assert!(!is_refused(code), "{code:?}");
        }
    }
}
