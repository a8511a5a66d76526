//! A file, or a part of one, as the readers of headers see it.

use super::{SourceError, files::OpenFile};
use crate::plan::PlanError;
use std::path::Path;

/// A run of bytes that can be read at any place. Offsets count from its start.
#[derive(Clone, Copy, Debug)]
pub(crate) struct View<'a> {
    data: Data<'a>,
    start: u64,
    len: u64,
}

#[derive(Clone, Copy, Debug)]
enum Data<'a> {
    File(&'a OpenFile),
    #[cfg(any(test, feature = "__internals"))]
    Memory(&'a [u8]),
}

/// Why a reader does not take what it reads.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The bytes break the rules of their format.
    Malformed {
        /// Where, in bytes from the start of the file.
        at: u64,
        /// Which rule, with the numbers.
        why: String,
    },
    /// Valid, but without a counterpart here.
    Unsupported {
        /// Tensor or other part.
        name: String,
        /// What about it, and the way out.
        why: String,
    },
    /// Names or sizes break the rules for every checkpoint.
    Plan(PlanError),
    /// The file could not be read.
    Source(SourceError),
}

impl From<PlanError> for Refusal {
    fn from(error: PlanError) -> Self {
        Refusal::Plan(error)
    }
}

impl From<SourceError> for Refusal {
    fn from(error: SourceError) -> Self {
        Refusal::Source(error)
    }
}

impl Refusal {
    pub(super) fn unsupported(name: impl Into<String>, why: impl Into<String>) -> Self {
        let (name, why) = (name.into(), why.into());
        Refusal::Unsupported { name, why }
    }

    /// The same with the file in question.
    pub(super) fn of(self, path: &Path) -> SourceError {
        match self {
            Refusal::Malformed { at, why } => {
                SourceError::malformed(path, format!("at byte {at}: {why}"))
            }
            Refusal::Unsupported { name, why } => SourceError::unsupported(path, &name, why),
            Refusal::Plan(error) => error.into(),
            Refusal::Source(error) => error,
        }
    }
}

impl<'a> View<'a> {
    pub(super) fn file(file: &'a OpenFile) -> Self {
        let (data, start, len) = (Data::File(file), 0, file.byte_len());
        View { data, start, len }
    }

    #[cfg(any(test, feature = "__internals"))]
    pub(crate) fn memory(bytes: &'a [u8]) -> Self {
        let (data, start, len) = (Data::Memory(bytes), 0, bytes.len() as u64);
        View { data, start, len }
    }

    pub(crate) fn byte_len(&self) -> u64 {
        self.len
    }

    /// Where a place of this view is in the file.
    pub(crate) fn absolute(&self, offset: u64) -> u64 {
        self.start.saturating_add(offset)
    }

    pub(super) fn malformed(&self, at: u64, why: impl Into<String>) -> Refusal {
        let (at, why) = (self.absolute(at), why.into());
        Refusal::Malformed { at, why }
    }

    /// A part of this view.
    pub(crate) fn part(&self, offset: u64, len: u64) -> Result<View<'a>, Refusal> {
        self.check(offset, len)?;
        let start = self.absolute(offset);
        Ok(View {
            start,
            len,
            ..*self
        })
    }

    /// These bytes, which must all be there: no buffer is longer than the file.
    pub(crate) fn read(&self, offset: u64, len: u64) -> Result<Vec<u8>, Refusal> {
        self.check(offset, len)?;
        let start = self.absolute(offset);
        match self.data {
            Data::File(file) => Ok(file.bytes_at(start, len)?),
            // Inside, as was checked.
            #[cfg(any(test, feature = "__internals"))]
            Data::Memory(bytes) => Ok(bytes
                .get(start as usize..(start + len) as usize)
                .unwrap_or_default()
                .to_vec()),
        }
    }

    /// As many bytes.
    pub(crate) fn array<const N: usize>(&self, offset: u64) -> Result<[u8; N], Refusal> {
        let bytes = self.read(offset, N as u64)?;
        let short = |_| self.malformed(offset, "too few bytes");
        bytes.try_into().map_err(short)
    }

    fn check(&self, offset: u64, len: u64) -> Result<(), Refusal> {
        match offset.checked_add(len) {
            Some(end) if end <= self.len => Ok(()),
            _ => Err(self.malformed(
                offset,
                format!(
                    "{len} bytes are needed, {} are there",
                    self.len.saturating_sub(offset)
                ),
            )),
        }
    }
}
