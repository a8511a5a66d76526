//! Sessions that leave part of the work out, so that a measurement can tell what it
//! costs. Their bytes are made up, both sides know, and nothing of them is published.

use super::{buffers::Reserved, error::SessionError};
use crate::{
    plan::CHUNK_LEN_MAX,
    protocol::{Open, ProtocolError, Reason},
};
use bytes::Bytes;
use std::sync::{Arc, OnceLock};

/// What Open calls the source of a rehearsal: no real source is called so.
pub(crate) const REHEARSAL_FORMAT: &str = "rehearsal";

/// What both sides leave out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Rehearsal {
    /// No checksum is made or compared.
    pub(crate) skips_checksums: bool,
    /// Payload is neither read from a file nor written to one.
    pub(crate) skips_files: bool,
}

/// Bytes together with their share of the budget.
struct Lent {
    bytes: Bytes,
    _reserved: Arc<Reserved>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Rehearsal {
    /// What is sent instead of bytes of the source: the same ones for every cell.
    pub(super) fn payload(self, len: usize, reserved: &Arc<Reserved>) -> Bytes {
        static PAYLOAD: OnceLock<Bytes> = OnceLock::new();
        let payload = PAYLOAD.get_or_init(|| {
            let mut bytes = vec![0; CHUNK_LEN_MAX as usize];
            blake3::Hasher::new().finalize_xof().fill(&mut bytes);
            Bytes::from(bytes)
        });
        Bytes::from_owner(Lent {
            bytes: payload.slice(..len.min(payload.len())),
            _reserved: Arc::clone(reserved),
        })
    }
}

/// Neither does a rehearsal take bytes that somebody wants to keep, nor does a server
/// that keeps what it gets take part in one.
pub(super) fn check_open(rehearsal: Option<Rehearsal>, open: &Open) -> Result<(), SessionError> {
    let why = match (rehearsal, open.source_format == REHEARSAL_FORMAT) {
        (Some(_), true) | (None, false) => return Ok(()),
        (Some(_), false) => "this server only measures and keeps nothing",
        (None, true) => "this server takes no bytes that are made up for a measurement",
    };
    Err(ProtocolError::new(Reason::Unsupported, why).into())
}
