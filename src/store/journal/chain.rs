//! Framing of records: each CRC continues the one before.

use super::body;
use super::record::{Record, RecordError};
use crate::format::checksum::crc32c_of_parts;

/// Longest record body, in bytes.
pub(crate) const MAX_BODY_LEN: usize = 1 << 20;
/// Body length, type, padding.
const FRAME_LEN: usize = 8;
const CRC_LEN: usize = 4;

/// What the CRC of the next record depends on besides the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Chain {
    nonce: [u8; 16],
    prev_crc: u32,
}

/// What decoding the beginning of some bytes led to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step<T> {
    /// It takes this many bytes, more than there were.
    More(usize),
    /// One whole value.
    Done {
        /// The value.
        value: T,
        /// Bytes that it took.
        len: usize,
        /// The chain behind it.
        next: Chain,
    },
}

/// Why bytes are not the next record.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Fault {
    /// Longer than a body may be.
    #[error("a body of {0} bytes is longer than a record may be")]
    BodyLen(u32),
    /// No such type; zeros behind the last record are seen as this.
    #[error("record type {0} is not known")]
    Type(u8),
    /// The padding is not zero.
    #[error("the padding is not zero")]
    Padding,
    /// Damaged, out of order, or of another session.
    #[error("the checksum does not continue the chain")]
    Crc,
    /// The body breaks a rule of its own.
    #[error(transparent)]
    Body(#[from] RecordError),
}

impl Chain {
    /// The chain behind a file header with this CRC.
    pub(super) fn after_header(crc: u32) -> Self {
        Chain {
            nonce: [0; 16],
            prev_crc: crc,
        }
    }

    /// Appends a record to `out`: as several when it is too long for one, as
    /// nothing when it names no cell and no entry.
    ///
    /// # Errors
    /// [`RecordError`]; `self` and `out` are then as before.
    pub(crate) fn append(&mut self, record: &Record, out: &mut Vec<u8>) -> Result<(), RecordError> {
        let (kind, bodies) = body::encode(record)?;
        for body in bodies {
            // Fits: `encode` holds bodies to the limit.
            let len = (body.len() as u32).to_le_bytes();
            let frame = [len[0], len[1], len[2], len[3], kind, 0, 0, 0];
            let crc = self.crc(&frame, &body);
            out.extend_from_slice(&frame);
            out.extend_from_slice(&body);
            out.extend_from_slice(&crc.to_le_bytes());
            self.prev_crc = crc;
        }
        if let Record::Session { nonce, .. } = record {
            self.nonce = *nonce;
        }
        Ok(())
    }

    /// The record at the beginning of `bytes`, or how many bytes it takes to know.
    /// The limits are checked before a length is asked for, the CRC before the body
    /// is looked at.
    ///
    /// # Errors
    /// [`Fault`].
    pub(crate) fn decode(&self, bytes: &[u8]) -> Result<Step<Record>, Fault> {
        let Some((frame, rest)) = bytes.split_at_checked(FRAME_LEN) else {
            return Ok(Step::More(FRAME_LEN));
        };
        let claimed_len = le_u32(frame, 0);
        let body_len = claimed_len as usize;
        if body_len > MAX_BODY_LEN {
            return Err(Fault::BodyLen(claimed_len));
        }
        let kind = frame[4];
        if !body::is_known(kind) {
            return Err(Fault::Type(kind));
        }
        if frame[5..] != [0; 3] {
            return Err(Fault::Padding);
        }
        let len = FRAME_LEN + body_len + CRC_LEN;
        if bytes.len() < len {
            return Ok(Step::More(len));
        }
        let body = &rest[..body_len];
        let crc = self.crc(frame, body);
        if crc != le_u32(rest, body_len) {
            return Err(Fault::Crc);
        }
        let value = body::decode(kind, body)?.ok_or(Fault::Type(kind))?;
        let nonce = match &value {
            Record::Session { nonce, .. } => *nonce,
            _ => self.nonce,
        };
        let next = Chain {
            nonce,
            prev_crc: crc,
        };
        Ok(Step::Done { value, len, next })
    }

    fn crc(&self, frame: &[u8], body: &[u8]) -> u32 {
        crc32c_of_parts([&self.nonce[..], &self.prev_crc.to_le_bytes(), frame, body])
    }

    /// One frame with a CRC that fits, whatever the bytes mean.
    #[cfg(any(test, feature = "__internals"))]
    pub(crate) fn seal(&self, frame: [u8; 8], body: &[u8]) -> Vec<u8> {
        let crc = self.crc(&frame, body);
        [&frame, body, &crc.to_le_bytes()].concat()
    }
}

/// The four bytes at `at`; bytes that are not there count as zero.
pub(super) fn le_u32(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.iter().skip(at).take(4).enumerate();
    four.fold(0, |n, (i, &b)| n | u32::from(b) << (8 * i))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(nonce: u8) -> Record {
        Record::Session {
            epoch: 1,
            nonce: [nonce; 16],
            transfer_id: [2; 16],
            entries_digest: None,
            adopted: false,
            unsynced: false,
        }
    }

    #[test]
    fn decoding_follows_encoding() {
        let mut chain = Chain::after_header(5);
        let mut reader = chain.clone();
        let records = [
            session(1),
            Record::Forget(vec![1, 2]),
            session(3),
            Record::Forget(vec![4]),
        ];
        let mut bytes = Vec::new();
        for record in &records {
            chain.append(record, &mut bytes).unwrap();
        }
        let mut rest = bytes.as_slice();
        for record in records {
            let Step::Done { value, len, next } = reader.decode(rest).unwrap() else {
                panic!()
            };
            assert_eq!(value, record);
            (rest, reader) = (&rest[len..], next);
        }
        assert_eq!((rest, reader), (&[][..], chain));
    }

    #[test]
    fn the_same_record_has_another_sum_in_another_session() {
        let record = Record::Forget(vec![1]);
        let tail = |nonce| {
            let mut chain = Chain::after_header(5);
            let mut bytes = Vec::new();
            chain.append(&session(nonce), &mut bytes).unwrap();
            // As if the CRC before were the same by chance.
            chain.prev_crc = 9;
            bytes.clear();
            chain.append(&record, &mut bytes).unwrap();
            bytes
        };
        assert_ne!(tail(1), tail(2));
        assert_eq!(tail(1), tail(1));
    }

    #[test]
    fn frames_are_checked_before_bodies_are_asked_for() {
        let chain = Chain::after_header(0);
        let decode = |frame: [u8; 8]| chain.decode(&frame);
        assert_eq!(
            decode([1, 0, 16, 0, 4, 0, 0, 0]),
            Err(Fault::BodyLen((1 << 20) + 1))
        );
        assert_eq!(
            decode([0, 0, 16, 0, 4, 0, 0, 0]),
            Ok(Step::More((1 << 20) + 12))
        );
        assert_eq!(decode([0; 8]), Err(Fault::Type(0)));
        assert_eq!(decode([0, 0, 0, 0, 8, 0, 0, 0]), Err(Fault::Type(8)));
        assert_eq!(decode([0, 0, 0, 0, 4, 0, 1, 0]), Err(Fault::Padding));
        assert_eq!(chain.decode(&[]), Ok(Step::More(8)));
        assert_eq!(
            chain.decode(&chain.seal([0, 0, 0, 0, 4, 0, 1, 0], b"")),
            Err(Fault::Padding)
        );
        let parse = chain.decode(&chain.seal([1, 0, 0, 0, 4, 0, 0, 0], &[0xff]));
        assert!(matches!(parse, Err(Fault::Body(RecordError::Parse(_)))));
    }
}
