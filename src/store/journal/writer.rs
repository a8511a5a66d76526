//! Appending to a journal.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::chain::Chain;
use super::header::JournalHeader;
use super::record::Record;
use super::replay::Replay;
use crate::fault;

/// The end of a journal file.
///
/// Only records that [`State::apply`](super::State::apply) takes may be appended:
/// replay stops at any other, and what follows it would be lost.
#[derive(Debug)]
pub(crate) struct JournalWriter {
    file: File,
    chain: Chain,
    len: u64,
    // Without a SESSION record of its own a writer would go on under the nonce of
    // a former one, and the stale tail of that one could fit again.
    in_session: bool,
    poisoned: bool,
}

/// An earlier write or sync failed. Whether its bytes are on disk is not known and
/// cannot be found out: a sync that is tried again may succeed without them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("an earlier write or sync of the journal failed, nothing more can be recorded")]
pub(crate) struct Poisoned;

impl JournalWriter {
    /// Begins a journal: empties the file and writes the header. The caller syncs
    /// the file and its folder.
    ///
    /// # Errors
    /// Of the file, or `InvalidInput` for a header that breaks its rules.
    pub(crate) fn create(file: File, header: &JournalHeader) -> io::Result<Self> {
        let (bytes, chain) = header.encode().map_err(invalid)?;
        // A former journal of the same header would go on behind the new one.
        fault::call("ftruncate", || file.set_len(0))?;
        fault::call("pwrite", || file.write_all_at(&bytes, 0))?;
        let len = bytes.len() as u64;
        Ok(JournalWriter {
            file,
            chain,
            len,
            in_session: false,
            poisoned: false,
        })
    }

    /// Goes on with a journal: cuts off what is not in order.
    ///
    /// # Errors
    /// Of the file.
    pub(crate) fn resume(file: File, replay: &Replay) -> io::Result<Self> {
        fault::call("ftruncate", || file.set_len(replay.good_len))?;
        Ok(JournalWriter {
            file,
            chain: replay.chain.clone(),
            len: replay.good_len,
            in_session: false,
            poisoned: false,
        })
    }

    /// Appends records with one positional write. The first record of a writer is
    /// its SESSION.
    ///
    /// # Errors
    /// Of the file, `InvalidInput` for a record that breaks its rules, or
    /// [`Poisoned`]. After any of them the writer is poisoned.
    pub(crate) fn append(&mut self, records: &[Record]) -> io::Result<()> {
        self.unless_poisoned(|writer| {
            let mut chain = writer.chain.clone();
            let mut in_session = writer.in_session;
            let mut bytes = Vec::new();
            for record in records {
                in_session |= matches!(record, Record::Session { .. });
                if !in_session {
                    return Err(invalid("a journal writer must begin with a SESSION record"));
                }
                chain.append(record, &mut bytes).map_err(invalid)?;
            }
            fault::call("append", || writer.file.write_all_at(&bytes, writer.len))?;
            writer.len += bytes.len() as u64;
            writer.chain = chain;
            writer.in_session = in_session;
            Ok(())
        })
    }

    /// Syncs what was appended: only then may it be acknowledged.
    ///
    /// # Errors
    /// Of the file, or [`Poisoned`]. After either the writer is poisoned.
    pub(crate) fn sync(&mut self) -> io::Result<()> {
        self.unless_poisoned(|writer| fault::call("fdatasync_journal", || writer.file.sync_data()))
    }

    /// Length of the journal in bytes.
    #[cfg(test)]
    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    fn unless_poisoned(&mut self, act: impl FnOnce(&mut Self) -> io::Result<()>) -> io::Result<()> {
        if self.poisoned {
            return Err(io::Error::other(Poisoned));
        }
        // Set first, so that a panic in between poisons, too.
        self.poisoned = true;
        let result = act(self);
        self.poisoned = result.is_err();
        result
    }
}

fn invalid(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, why)
}

#[cfg(test)]
mod tests {
    use super::super::script::{header, session};
    use super::super::{Run, replay, replay::End};
    use super::*;
    use std::fs::OpenOptions;

    fn temporary() -> File {
        tempfile::tempfile().unwrap()
    }

    fn contents(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn is_poisoned(error: io::Error) -> bool {
        error.get_ref().is_some_and(|e| e.is::<Poisoned>())
    }

    /// A writer whose file is a device; `/dev/null` cannot be synced, `/dev/full`
    /// cannot be written.
    fn on_device(path: &str) -> JournalWriter {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        let (_, chain) = header().encode().unwrap();
        JournalWriter {
            file,
            chain,
            len: 0,
            in_session: false,
            poisoned: false,
        }
    }

    #[test]
    fn a_failed_sync_is_final() {
        let mut writer = on_device("/dev/null");
        writer.append(&[session(1)]).unwrap();
        assert!(!is_poisoned(writer.sync().unwrap_err()));
        assert!(is_poisoned(writer.sync().unwrap_err()));
        assert!(is_poisoned(writer.append(&[session(2)]).unwrap_err()));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn a_failed_write_is_final() {
        let mut writer = on_device("/dev/full");
        let error = writer.append(&[session(1)]).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::StorageFull);
        assert!(is_poisoned(writer.append(&[session(1)]).unwrap_err()));
        assert!(is_poisoned(writer.sync().unwrap_err()));
        assert_eq!(writer.len(), 0);
    }

    #[test]
    fn a_refused_record_is_final_and_leaves_no_byte() {
        let file = temporary();
        let mut writer = JournalWriter::create(file.try_clone().unwrap(), &header()).unwrap();
        let run = Run {
            entry: 0,
            first: u64::MAX,
            crcs: vec![1],
        };
        let error = writer
            .append(&[session(1), Record::Cells(vec![run])])
            .unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
        assert!(is_poisoned(writer.sync().unwrap_err()));
        assert_eq!(replay(contents(&file).as_slice()).unwrap().state.epoch, 0);
    }

    #[test]
    fn a_writer_begins_with_its_session() {
        let file = temporary();
        let mut writer = JournalWriter::create(file.try_clone().unwrap(), &header()).unwrap();
        writer
            .append(&[session(1), Record::Forget(vec![1])])
            .unwrap();
        let replayed = replay(contents(&file).as_slice()).unwrap();
        let mut writer = JournalWriter::resume(file, &replayed).unwrap();
        assert!(writer.append(&[Record::Forget(vec![1])]).is_err());
    }

    #[test]
    fn creating_over_a_former_journal_leaves_nothing_of_it() {
        let file = temporary();
        for _ in 0..2 {
            let mut writer = JournalWriter::create(file.try_clone().unwrap(), &header()).unwrap();
            writer.append(&[]).unwrap();
            assert_eq!(replay(contents(&file).as_slice()).unwrap().state.epoch, 0);
            writer.append(&[session(1)]).unwrap();
        }
    }

    #[test]
    fn resume_cuts_the_tail_and_goes_on() {
        let file = temporary();
        let mut writer = JournalWriter::create(file.try_clone().unwrap(), &header()).unwrap();
        writer
            .append(&[session(1), Record::Forget(vec![1; 500])])
            .unwrap();
        writer.sync().unwrap();
        let good_len = writer.len();
        file.write_all_at(&[0xa5; 3000], good_len).unwrap();
        let replayed = replay(contents(&file).as_slice()).unwrap();
        assert_eq!((replayed.good_len, replayed.state.epoch), (good_len, 1));
        let mut writer = JournalWriter::resume(file.try_clone().unwrap(), &replayed).unwrap();
        assert_eq!(file.metadata().unwrap().len(), good_len);
        writer.append(&[session(2)]).unwrap();
        writer.sync().unwrap();
        let replayed = replay(contents(&file).as_slice()).unwrap();
        assert_eq!((replayed.state.epoch, replayed.good_len), (2, writer.len()));
        assert_eq!(replayed.end, End::Clean);
    }
}
