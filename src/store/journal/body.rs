//! Records as protobuf bodies and back, with every check that needs no other record.

use bytes::Bytes;
use prost::Message;

use super::chain::MAX_BODY_LEN;
use super::record::{EntryRecord, Record, RecordError, Run};
use super::wire;
use crate::format::Dtype;
use crate::plan::{EntryHeader, EntryKind, Order, SourceState, clip};

const SESSION: u8 = 1;
const SOURCE: u8 = 2;
const ENTRY: u8 = 3;
const CELLS: u8 = 4;
const KEPT: u8 = 5;
const FORGET: u8 = 6;
const PUBLISH: u8 = 7;

/// Kind numbers of the wire protocol.
const KIND_TENSOR: i32 = 1;
const KIND_BLOB: i32 = 2;

/// Most bytes of a run besides its sums: tag and length of the run (1 + 3), entry
/// (1 + 5), first (1 + 10), tag and length of the sums (1 + 3).
const RUN_EXTRA_LEN: usize = 25;
/// Most bytes of one CRC or one entry number.
const CRC_LEN: usize = 4;
const NUMBER_LEN: usize = 5;
/// Most entry numbers of one FORGET body, behind tag and length (1 + 3).
const FORGET_COUNT_MAX: usize = (MAX_BODY_LEN - 4) / NUMBER_LEN;

/// Whether a record of this type exists.
pub(super) fn is_known(kind: u8) -> bool {
    (SESSION..=PUBLISH).contains(&kind)
}

/// The type of a record and its bodies: usually one, several when cells or entry
/// numbers do not fit in one, none when there is nothing to say.
pub(super) fn encode(record: &Record) -> Result<(u8, Vec<Vec<u8>>), RecordError> {
    let (kind, bodies) = match record {
        Record::Session {
            epoch,
            nonce,
            transfer_id,
            entries_digest,
            adopted,
            unsynced,
        } => {
            let body = wire::Session {
                epoch: *epoch,
                nonce: copy(nonce),
                transfer_id: copy(transfer_id),
                entries_digest: entries_digest.as_ref().map_or_else(Bytes::new, |d| copy(d)),
                adopted: *adopted,
                unsynced: *unsynced,
            };
            (SESSION, vec![body.encode_to_vec()])
        }
        Record::Source(source) => {
            let body = wire::Source {
                key: copy(&source.key),
                fingerprint: copy(&source.fingerprint),
                settled: source.settled,
            };
            (SOURCE, vec![body.encode_to_vec()])
        }
        Record::Entry(entry) => (ENTRY, vec![encode_entry(entry)?]),
        Record::Cells(runs) => {
            let split = split_runs(runs)?;
            let bodies = split
                .into_iter()
                .map(|runs| wire::Cells { runs }.encode_to_vec());
            (CELLS, bodies.collect())
        }
        Record::Kept(runs) => {
            let split = split_runs(runs)?;
            let bodies = split
                .into_iter()
                .map(|runs| wire::Kept { runs }.encode_to_vec());
            (KEPT, bodies.collect())
        }
        Record::Forget(entries) => {
            let split = entries.chunks(FORGET_COUNT_MAX);
            let bodies = split.map(|part| {
                wire::Forget {
                    entries: part.to_vec(),
                }
                .encode_to_vec()
            });
            (FORGET, bodies.collect())
        }
        Record::Publish {
            manifest_blake3,
            overwrite,
        } => {
            let body = wire::Publish {
                manifest_blake3: copy(manifest_blake3),
                overwrite: *overwrite,
            };
            (PUBLISH, vec![body.encode_to_vec()])
        }
    };
    match bodies.iter().map(Vec::len).find(|&len| len > MAX_BODY_LEN) {
        Some(len) => Err(RecordError::TooLong(len)),
        None => Ok((kind, bodies)),
    }
}

/// The record of a body, or `None` for a type that does not exist.
pub(super) fn decode(kind: u8, body: &[u8]) -> Result<Option<Record>, RecordError> {
    let record = match kind {
        SESSION => {
            let session: wire::Session = parse(body)?;
            let digest = &session.entries_digest;
            Record::Session {
                epoch: session.epoch,
                nonce: exactly("nonce", &session.nonce)?,
                transfer_id: exactly("transfer id", &session.transfer_id)?,
                entries_digest: match digest.is_empty() {
                    true => None,
                    false => Some(exactly("entries digest", digest)?),
                },
                adopted: session.adopted,
                unsynced: session.unsynced,
            }
        }
        SOURCE => {
            let source: wire::Source = parse(body)?;
            Record::Source(SourceState {
                key: exactly("source key", &source.key)?,
                fingerprint: exactly("fingerprint", &source.fingerprint)?,
                settled: source.settled,
            })
        }
        ENTRY => Record::Entry(decode_entry(parse(body)?)?),
        CELLS => Record::Cells(decode_runs(parse::<wire::Cells>(body)?.runs)?),
        KEPT => Record::Kept(decode_runs(parse::<wire::Kept>(body)?.runs)?),
        FORGET => Record::Forget(parse::<wire::Forget>(body)?.entries),
        PUBLISH => {
            let publish: wire::Publish = parse(body)?;
            Record::Publish {
                manifest_blake3: exactly("manifest digest", &publish.manifest_blake3)?,
                overwrite: publish.overwrite,
            }
        }
        _ => return Ok(None),
    };
    Ok(Some(record))
}

fn encode_entry(entry: &EntryRecord) -> Result<Vec<u8>, RecordError> {
    entry.check()?;
    let header = &entry.header;
    let body = wire::Entry {
        number: entry.number,
        name: header.name.clone(),
        kind: match header.kind {
            EntryKind::Tensor { .. } => KIND_TENSOR,
            EntryKind::Blob => KIND_BLOB,
        },
        dtype: header
            .dtype()
            .map_or_else(String::new, |d| d.name().to_owned()),
        shape: header.shape.clone(),
        fortran_order: header.order == Order::Fortran,
        big_endian: header.big_endian,
        byte_len: header.byte_len,
        file: entry.file.clone(),
        data_offset: entry.data_offset.unwrap_or(0),
        source_keys: entry.source_keys.iter().map(|key| copy(key)).collect(),
    };
    Ok(body.encode_to_vec())
}

fn decode_entry(body: wire::Entry) -> Result<EntryRecord, RecordError> {
    let kind = match (body.kind, body.dtype.as_str()) {
        (KIND_TENSOR, name) => Dtype::from_name(name).map(|dtype| EntryKind::Tensor { dtype }),
        (KIND_BLOB, "") => Some(EntryKind::Blob),
        _ => None,
    };
    let kind = kind.ok_or_else(|| RecordError::Kind {
        kind: body.kind,
        dtype: clip(&body.dtype),
    })?;
    let keys = body.source_keys.iter();
    let entry = EntryRecord {
        number: body.number,
        header: EntryHeader {
            name: body.name,
            kind,
            shape: body.shape,
            order: match body.fortran_order {
                true => Order::Fortran,
                false => Order::C,
            },
            big_endian: body.big_endian,
            byte_len: body.byte_len,
        },
        file: body.file,
        data_offset: Some(body.data_offset).filter(|&offset| offset > 0),
        source_keys: keys
            .map(|key| exactly("source key", key))
            .collect::<Result<_, _>>()?,
    };
    entry.check()?;
    Ok(entry)
}

fn decode_runs(runs: Vec<wire::Run>) -> Result<Vec<Run>, RecordError> {
    let run = |run: wire::Run| {
        let run = Run {
            entry: run.entry,
            first: run.first,
            crcs: run.crc32c,
        };
        run.cells()?;
        Ok(run)
    };
    runs.into_iter().map(run).collect()
}

/// The runs in portions that each fit in one body. A run may be cut: cells mean the
/// same in one record or in two.
fn split_runs(runs: &[Run]) -> Result<Vec<Vec<wire::Run>>, RecordError> {
    for run in runs {
        run.cells()?;
    }
    let mut bodies = Vec::new();
    let mut body = Vec::new();
    let mut room_len = MAX_BODY_LEN;
    for run in runs {
        let mut first = run.first;
        let mut crcs = run.crcs.as_slice();
        while !crcs.is_empty() {
            let fit_count = room_len.saturating_sub(RUN_EXTRA_LEN) / CRC_LEN;
            if fit_count == 0 {
                bodies.push(std::mem::take(&mut body));
                room_len = MAX_BODY_LEN;
                continue;
            }
            let (part, rest) = crcs.split_at(fit_count.min(crcs.len()));
            body.push(wire::Run {
                entry: run.entry,
                first,
                crc32c: part.to_vec(),
            });
            room_len = room_len.saturating_sub(RUN_EXTRA_LEN + CRC_LEN * part.len());
            // Cannot overflow: the end of the run was checked.
            first += part.len() as u64;
            crcs = rest;
        }
    }
    if !body.is_empty() {
        bodies.push(body);
    }
    Ok(bodies)
}

fn parse<M: Message + Default>(body: &[u8]) -> Result<M, RecordError> {
    M::decode(body).map_err(|e| RecordError::Parse(e.to_string()))
}

fn copy(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(bytes)
}

fn exactly<const N: usize>(what: &'static str, bytes: &[u8]) -> Result<[u8; N], RecordError> {
    bytes.try_into().map_err(|_| RecordError::FieldLen {
        what,
        expected: N,
        found: bytes.len(),
    })
}

#[cfg(test)]
mod tests;
