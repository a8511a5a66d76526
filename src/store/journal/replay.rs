//! Reading a journal back, up to the first record that is not in order.

use std::io::{self, BufReader, Read};

use super::chain::{Chain, Fault, Step};
use super::header::{HeaderFault, JournalHeader};
use super::state::{State, Violation};
use crate::fault;

/// How much is read ahead, in bytes.
const READ_AHEAD_LEN: usize = 64 << 10;

/// What a journal says.
#[derive(Debug)]
pub(crate) struct Replay {
    /// The file header.
    pub(crate) header: JournalHeader,
    /// The fold of all records in order.
    pub(crate) state: State,
    /// Length in bytes of the header and these records.
    pub(crate) good_len: u64,
    /// The chain behind them.
    pub(crate) chain: Chain,
    /// What stopped the replay, for the log only.
    pub(crate) end: End,
}

/// What stands behind the last record in order.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum End {
    /// Nothing.
    #[error("nothing follows")]
    Clean,
    /// The beginning of a record.
    #[error("the last record is torn")]
    Torn,
    /// Not a record of this chain.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// A record that contradicts those before it.
    #[error(transparent)]
    Violation(#[from] Violation),
}

/// Why a journal says nothing at all.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// It could not be read.
    #[error("the journal cannot be read")]
    Io(#[from] io::Error),
    /// Another kind of file.
    #[error("the file is not a journal")]
    NotAJournal,
    /// Written by a version with another format.
    #[error("journal version {0} is not known")]
    Version(u32),
    /// The header is torn, absent or damaged: start over.
    #[error("the header of the journal is torn or damaged")]
    BadHeader,
}

/// Reads a journal, one record at a time.
///
/// # Errors
/// [`JournalError`]; bad records are no error, they end the journal.
pub(crate) fn replay(read: impl Read) -> Result<Replay, JournalError> {
    let mut read = BufReader::with_capacity(READ_AHEAD_LEN, read);
    let mut bytes = Vec::new();
    let (header, len, mut chain) = loop {
        match JournalHeader::decode(&bytes)? {
            Step::Done { value, len, next } => break (value, len, next),
            Step::More(len) => {
                if !fill(&mut read, &mut bytes, len)? {
                    // Another kind of file may be short, too.
                    JournalHeader::decode(&bytes)?;
                    return Err(JournalError::BadHeader);
                }
            }
        }
    };
    let grid = header.grid().map_err(|_| JournalError::BadHeader)?;
    let mut state = State::new(grid);
    let mut good_len = len as u64;
    bytes.clear();
    let end = loop {
        match chain.decode(&bytes) {
            Ok(Step::More(len)) => {
                if !fill(&mut read, &mut bytes, len)? {
                    break if bytes.is_empty() {
                        End::Clean
                    } else {
                        End::Torn
                    };
                }
            }
            Ok(Step::Done { value, len, next }) => {
                if let Err(violation) = state.apply(value) {
                    break violation.into();
                }
                good_len += len as u64;
                chain = next;
                bytes.clear();
            }
            Err(fault) => break fault.into(),
        }
    };
    Ok(Replay {
        header,
        state,
        good_len,
        chain,
        end,
    })
}

/// Reads until there are `len` bytes, `false` if the end comes first. Memory grows
/// with what is there, not with `len`.
fn fill(read: &mut impl Read, bytes: &mut Vec<u8>, len: usize) -> io::Result<bool> {
    let missing_len = len.saturating_sub(bytes.len());
    fault::call("read", || {
        read.by_ref().take(missing_len as u64).read_to_end(bytes)
    })?;
    Ok(bytes.len() >= len)
}

impl From<HeaderFault> for JournalError {
    fn from(fault: HeaderFault) -> Self {
        match fault {
            HeaderFault::Magic => JournalError::NotAJournal,
            HeaderFault::Version(version) => JournalError::Version(version),
            HeaderFault::Damaged => JournalError::BadHeader,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    fn header_bytes() -> (Vec<u8>, Chain) {
        let header = JournalHeader {
            checkpoint: "m".into(),
            chunk_len: 1 << 20,
            layout: 1,
            out_format: 1,
            npy_dtype: 1,
        };
        header.encode().unwrap()
    }

    #[test]
    fn a_torn_or_foreign_beginning_is_told_apart() {
        let (header, _) = header_bytes();
        for cut in 0..header.len() {
            assert!(
                matches!(replay(&header[..cut]), Err(JournalError::BadHeader)),
                "{cut}"
            );
        }
        assert!(matches!(
            replay(&[0; 4096][..]),
            Err(JournalError::BadHeader)
        ));
        assert!(matches!(
            replay(&b"\x93NUMPY"[..]),
            Err(JournalError::NotAJournal)
        ));
        assert_eq!(replay(header.as_slice()).unwrap().end, End::Clean);
    }

    #[test]
    fn a_failing_disk_is_an_error_and_not_an_end() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::other("EIO"))
            }
        }
        let (header, _) = header_bytes();
        assert!(matches!(
            replay(header.chain(Failing)),
            Err(JournalError::Io(_))
        ));
    }

    #[test]
    fn a_claimed_length_is_not_believed() {
        // Endless zeros behind the claim, counted.
        let read_len_after = |bytes: Vec<u8>| {
            let read_len = Cell::new(0);
            struct Zeros<'a>(&'a Cell<usize>);
            impl Read for Zeros<'_> {
                fn read(&mut self, out: &mut [u8]) -> io::Result<usize> {
                    out.fill(0);
                    self.0.set(self.0.get() + out.len());
                    Ok(out.len())
                }
            }
            let result = replay(bytes.chain(Zeros(&read_len)));
            (result.map(|r| r.end), read_len.get())
        };
        let (mut header, _) = header_bytes();
        let frame = [1, 0, 16, 0, 4, 0, 0, 0];
        let (end, read_len) = read_len_after([header.as_slice(), &frame].concat());
        assert_eq!(end.unwrap(), End::Fault(Fault::BodyLen((1 << 20) + 1)));
        assert!(read_len <= READ_AHEAD_LEN);
        let frame = [0, 0, 16, 0, 4, 0, 0, 0];
        let (end, read_len) = read_len_after([header.as_slice(), &frame].concat());
        assert_eq!(end.unwrap(), End::Fault(Fault::Crc));
        assert!(read_len <= (1 << 20) + READ_AHEAD_LEN);
        header[12..16].copy_from_slice(&(1 << 16 | 1u32).to_le_bytes());
        let (end, read_len) = read_len_after(header);
        assert!(matches!(end, Err(JournalError::BadHeader)) && read_len <= READ_AHEAD_LEN);
    }
}
