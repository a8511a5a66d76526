//! Reasons as gRPC statuses, and back.

use crate::{plan::MAX_TEXT_LEN, protocol::Reason};
use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

/// Domain of `google.rpc.ErrorInfo`.
const DOMAIN: &str = "tensorferry";

/// The gRPC code of a reason: UNAVAILABLE says "call again", ABORTED "open a new
/// session", FAILED_PRECONDITION "not before something else has changed".
fn code(reason: Reason) -> Code {
    match reason {
        Reason::BadName | Reason::DuplicateTensor | Reason::BadShape => Code::InvalidArgument,
        Reason::BadCompression | Reason::BadFrame => Code::InvalidArgument,
        Reason::BadRange => Code::OutOfRange,
        Reason::TooLarge | Reason::TooMany | Reason::DiskQuota => Code::ResourceExhausted,
        Reason::Checksum => Code::DataLoss,
        Reason::ManifestMismatch | Reason::Version => Code::FailedPrecondition,
        Reason::UnsafePath | Reason::Locked => Code::FailedPrecondition,
        Reason::Exists => Code::AlreadyExists,
        Reason::NotFound => Code::NotFound,
        Reason::Unsupported => Code::Unimplemented,
        Reason::Superseded | Reason::SourceChanged => Code::Aborted,
        Reason::Draining => Code::Unavailable,
        Reason::Interrupted => Code::Cancelled,
        Reason::Idle => Code::DeadlineExceeded,
        Reason::StorageIoError | Reason::SourceIoError | Reason::Bug => Code::Internal,
    }
}

/// A status with its reason as ErrorInfo. The message travels in a header.
pub(crate) fn to_status(reason: Reason, message: &str) -> Status {
    let mut text = message.to_owned();
    while text.len() > MAX_TEXT_LEN {
        text.pop();
    }
    let details = ErrorDetails::with_error_info(reason.as_str(), DOMAIN, []);
    Status::with_error_details(code(reason), text, details)
}

/// The reason of a status, when it has one that this version knows.
pub(crate) fn reason_of(status: &Status) -> Option<Reason> {
    let info = status.get_details_error_info()?;
    (info.domain == DOMAIN)
        .then(|| Reason::from_word(&info.reason))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_survives_the_way_through_a_status() {
        for &reason in Reason::ALL {
            let status = to_status(reason, "why");
            assert_eq!(reason_of(&status), Some(reason));
            assert_ne!(status.code(), Code::Ok);
        }
        assert_eq!(reason_of(&Status::unavailable("x")), None);
    }
}
