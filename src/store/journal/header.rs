//! The file header: what never changes during a transfer.

use prost::Message;

use super::chain::{Chain, Step, le_u32};
use super::wire;
use crate::format::checksum::crc32c;
use crate::plan::{CheckpointName, Grid, PlanError};

/// First bytes of every journal.
const MAGIC: [u8; 8] = *b"TFERRYJ\0";
/// The only version there is.
const VERSION: u32 = 1;
/// Longest header body, in bytes.
pub(crate) const MAX_HEADER_BODY_LEN: usize = 64 << 10;
/// Magic, version, body length.
const FIXED_LEN: usize = 16;
const CRC_LEN: usize = 4;

/// Body of the file header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct JournalHeader {
    /// Name of the checkpoint.
    pub(crate) checkpoint: String,
    /// Cell length in bytes.
    pub(crate) chunk_len: u32,
    /// Layout number of the wire protocol, as it was given.
    pub(crate) layout: i32,
    /// Container number of the wire protocol, as it was given.
    pub(crate) out_format: i32,
    /// Number of the wire protocol for how `.npy` files name types, as it was given.
    pub(crate) npy_dtype: i32,
}

/// Why bytes are not a file header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderFault {
    /// The magic is another.
    #[error("the magic is not that of a journal")]
    Magic,
    /// The magic fits, the version is not known.
    #[error("version {0} is not known")]
    Version(u32),
    /// Length, CRC or body are damaged, or it was never written.
    #[error("the header is damaged")]
    Damaged,
}

impl JournalHeader {
    /// The grid of all entries.
    ///
    /// # Errors
    /// [`PlanError::ChunkLen`].
    pub(crate) fn grid(&self) -> Result<Grid, PlanError> {
        Grid::new(self.chunk_len)
    }

    /// The bytes at the beginning of the file, and the chain that goes on from them.
    ///
    /// # Errors
    /// The rules of names and chunk lengths.
    pub(crate) fn encode(&self) -> Result<(Vec<u8>, Chain), PlanError> {
        self.check()?;
        let body = wire::Header {
            checkpoint: self.checkpoint.clone(),
            chunk_len: self.chunk_len,
            layout: self.layout,
            out_format: self.out_format,
            // Left out where it is the first: what journals of before say.
            npy_dtype: if self.npy_dtype == 1 {
                0
            } else {
                self.npy_dtype
            },
        };
        let body = body.encode_to_vec();
        let mut out = Vec::with_capacity(FIXED_LEN + body.len() + CRC_LEN);
        out.extend_from_slice(&MAGIC);
        out.extend_from_slice(&VERSION.to_le_bytes());
        // Fits: names are at most 1,024 bytes.
        out.extend_from_slice(&(body.len() as u32).to_le_bytes());
        out.extend_from_slice(&body);
        let crc = crc32c(&out);
        out.extend_from_slice(&crc.to_le_bytes());
        Ok((out, Chain::after_header(crc)))
    }

    /// The header at the beginning of `bytes`, or how many bytes it takes to know.
    ///
    /// # Errors
    /// [`HeaderFault`].
    pub(crate) fn decode(bytes: &[u8]) -> Result<Step<JournalHeader>, HeaderFault> {
        let magic = bytes.get(..MAGIC.len()).unwrap_or(bytes);
        if !MAGIC.starts_with(magic) {
            // A crash right after creation can leave the length without the bytes.
            return Err(match magic.iter().all(|&b| b == 0) {
                true => HeaderFault::Damaged,
                false => HeaderFault::Magic,
            });
        }
        if bytes.len() < FIXED_LEN {
            return Ok(Step::More(FIXED_LEN));
        }
        let version = le_u32(bytes, 8);
        if version != VERSION {
            return Err(HeaderFault::Version(version));
        }
        let body_len = le_u32(bytes, 12) as usize;
        if body_len > MAX_HEADER_BODY_LEN {
            return Err(HeaderFault::Damaged);
        }
        let crc_at = FIXED_LEN + body_len;
        let len = crc_at + CRC_LEN;
        let (Some(covered), true) = (bytes.get(..crc_at), bytes.len() >= len) else {
            return Ok(Step::More(len));
        };
        let crc = crc32c(covered);
        if crc != le_u32(bytes, crc_at) {
            return Err(HeaderFault::Damaged);
        }
        let body = wire::Header::decode(&covered[FIXED_LEN..]).map_err(|_| HeaderFault::Damaged)?;
        let value = JournalHeader {
            checkpoint: body.checkpoint,
            chunk_len: body.chunk_len,
            layout: body.layout,
            out_format: body.out_format,
            // Journals of before say nothing.
            npy_dtype: body.npy_dtype.max(1),
        };
        value.check().map_err(|_| HeaderFault::Damaged)?;
        let next = Chain::after_header(crc);
        Ok(Step::Done { value, len, next })
    }

    fn check(&self) -> Result<(), PlanError> {
        // Either name of a service or the last component of a user's own path.
        if CheckpointName::local(&self.checkpoint).is_err() {
            self.checkpoint.parse::<CheckpointName>()?;
        }
        self.grid().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header() -> JournalHeader {
        JournalHeader {
            checkpoint: "run7/step-900".into(),
            chunk_len: 1 << 20,
            layout: 1,
            out_format: 1,
            npy_dtype: 1,
        }
    }

    #[test]
    fn comes_back_and_asks_for_what_is_missing() {
        let (bytes, chain) = header().encode().unwrap();
        let mut have = 0;
        loop {
            match JournalHeader::decode(&bytes[..have]).unwrap() {
                Step::More(len) => {
                    assert!(len > have && len <= bytes.len());
                    have = len;
                }
                Step::Done { value, len, next } => {
                    assert_eq!((value, len, next), (header(), bytes.len(), chain));
                    break;
                }
            }
        }
    }

    #[test]
    fn names_and_chunk_lengths_keep_their_rules() {
        for checkpoint in ["", "../x", "a/", &"x".repeat(2000)] {
            assert!(
                JournalHeader {
                    checkpoint: checkpoint.into(),
                    ..header()
                }
                .encode()
                .is_err()
            );
        }
        assert!(
            JournalHeader {
                checkpoint: "mein Modell".into(),
                ..header()
            }
            .encode()
            .is_ok()
        );
        for chunk_len in [0, 3, 1 << 30] {
            assert!(
                JournalHeader {
                    chunk_len,
                    ..header()
                }
                .encode()
                .is_err()
            );
        }
    }

    #[test]
    fn each_damage_has_its_name() {
        let (bytes, _) = header().encode().unwrap();
        let with = |at: usize, byte: u8| {
            let mut bytes = bytes.clone();
            bytes[at] = byte;
            JournalHeader::decode(&bytes)
        };
        assert_eq!(with(0, b'X'), Err(HeaderFault::Magic));
        assert_eq!(with(8, 2), Err(HeaderFault::Version(2)));
        assert_eq!(with(15, 1), Err(HeaderFault::Damaged));
        assert_eq!(with(20, 0), Err(HeaderFault::Damaged));
        assert_eq!(JournalHeader::decode(&[0; 512]), Err(HeaderFault::Damaged));
        assert_eq!(JournalHeader::decode(b"{}"), Err(HeaderFault::Magic));
        assert_eq!(JournalHeader::decode(b""), Ok(Step::More(16)));
    }
}
