//! From protobuf to the protocol's types. Every limit on what a peer may say is
//! checked here, once.

use super::{WireError, pb};
use crate::{
    format::Dtype,
    plan::{
        CheckpointName, EntryHeader, EntryKind, MAX_ALIASES, MAX_ENTRY_NAME_LEN, MAX_TEXT_LEN,
        Order, RangeSet, SourceState, clip, printable,
    },
    protocol::{
        Abort, Accept, Announcement, Batch, ChunkHead, CommitMode, Compare, Done, Durability,
        Durable, Finish, Join, Keep, Layout, MAX_COMPARE_CELLS, ManifestPromise, NpyDtype, Open,
        OutFormat, PROTOCOL_VERSION, ProtocolError, Reason, ReceiverControl, ReceiverFrame,
        ReceiverStages, Reject, SenderFrame, StageTimes, Wanted,
    },
};
use std::time::Duration;

/// Most bytes of metadata in Open, names and values together.
const MAX_METADATA_BYTES: usize = 1 << 20;

/// Most microseconds or bytes in what a receiver says of its stages.
const MAX_STAGE_FIGURE: u64 = 1 << 53;

fn refuse(reason: Reason, message: impl Into<String>) -> WireError {
    ProtocolError::new(reason, message).into()
}

fn bad_frame(message: impl Into<String>) -> WireError {
    refuse(Reason::BadFrame, message)
}

/// A number that a newer version may know.
fn unsupported(what: &str, number: i32) -> WireError {
    refuse(
        Reason::Unsupported,
        format!("{what} {number} is not known here"),
    )
}

/// A sender's frame; its payload is left alone.
pub(crate) fn decode_sender_frame(frame: pb::SenderFrame) -> Result<SenderFrame, WireError> {
    use pb::sender_frame::Control;
    let has_batch =
        !(frame.sources.is_empty() && frame.entries.is_empty() && frame.chunks.is_empty());
    let Some(control) = frame.control else {
        return decode_batch(frame).map(SenderFrame::Batch);
    };
    if has_batch {
        return Err(bad_frame(
            "a control message shares a frame with announcements",
        ));
    }
    Ok(match control {
        Control::Open(open) => SenderFrame::Open(Box::new(decode_open(open)?)),
        Control::Join(join) => SenderFrame::Join(Join {
            session_token: join.session_token.to_vec(),
            lane: join.lane,
        }),
        Control::Compare(compare) => SenderFrame::Compare(decode_compare(&compare)?),
        Control::Finish(finish) => SenderFrame::Finish(Finish {
            entry_count: finish.entry_count,
            total_bytes: finish.total_bytes,
            entries_digest: array(&finish.entries_digest, "entries_digest")?,
            fingerprint: optional_array(&finish.fingerprint, "fingerprint")?,
        }),
        Control::Abort(abort) => SenderFrame::Abort(decode_abort(abort)),
    })
}

fn decode_open(open: pb::SenderOpen) -> Result<Open, WireError> {
    if open.protocol_version != PROTOCOL_VERSION {
        return Err(refuse(
            Reason::Version,
            format!(
                "protocol version {} is not spoken here, only {PROTOCOL_VERSION}",
                open.protocol_version
            ),
        ));
    }
    let checkpoint: CheckpointName = open.checkpoint.parse().map_err(ProtocolError::from)?;
    let manifest = if open.manifest_complete {
        ManifestPromise::Complete {
            total_bytes: open.total_bytes,
            entry_count: open.entry_count,
            entries_digest: array(&open.entries_digest, "entries_digest")?,
        }
    } else {
        ManifestPromise::Open
    };
    let metadata_bytes: usize = open.metadata.iter().map(|(k, v)| k.len() + v.len()).sum();
    if metadata_bytes > MAX_METADATA_BYTES {
        return Err(refuse(
            Reason::TooLarge,
            format!("{metadata_bytes} bytes of metadata are more than {MAX_METADATA_BYTES}"),
        ));
    }
    Ok(Open {
        checkpoint,
        transfer_id: array(&open.transfer_id, "transfer_id")?,
        manifest,
        fingerprint: optional_array(&open.fingerprint, "fingerprint")?,
        codecs: open.codecs,
        chunk_len: Some(open.chunk_len).filter(|&n| n > 0),
        commit_mode: match pb::CommitMode::try_from(open.commit_mode) {
            Ok(pb::CommitMode::Unspecified | pb::CommitMode::Group) => CommitMode::Group,
            Ok(pb::CommitMode::Strict) => CommitMode::Strict,
            Ok(pb::CommitMode::End) => CommitMode::End,
            Ok(pb::CommitMode::None) => CommitMode::None,
            Err(_) => return Err(unsupported("commit mode", open.commit_mode)),
        },
        layout: decode_layout(open.layout).ok_or_else(|| unsupported("layout", open.layout))?,
        out_format: decode_out_format(open.out_format)
            .ok_or_else(|| unsupported("container", open.out_format))?,
        overwrite: open.overwrite,
        restart: open.restart,
        verify: open.verify,
        metadata: open.metadata.into_iter().collect(),
        source_format: clip(&open.source_format),
        container_header_len: open.container_header_len,
        npy_dtype: match pb::NpyDtype::try_from(open.npy_dtype) {
            Ok(pb::NpyDtype::Unspecified | pb::NpyDtype::Bytes) => NpyDtype::Bytes,
            Ok(pb::NpyDtype::Named) => NpyDtype::Named,
            Err(_) => return Err(unsupported("npy dtype", open.npy_dtype)),
        },
    })
}

/// The layout of this number.
pub(crate) fn decode_layout(number: i32) -> Option<Layout> {
    match pb::Layout::try_from(number).ok()? {
        pb::Layout::Unspecified | pb::Layout::Named => Some(Layout::Named),
        pb::Layout::Indexed => Some(Layout::Indexed),
    }
}

/// The container of this number.
pub(crate) fn decode_out_format(number: i32) -> Option<OutFormat> {
    match pb::OutFormat::try_from(number).ok()? {
        pb::OutFormat::Unspecified | pb::OutFormat::Npy => Some(OutFormat::Npy),
        pb::OutFormat::Safetensors => Some(OutFormat::Safetensors),
    }
}

fn decode_batch(frame: pb::SenderFrame) -> Result<Batch, WireError> {
    let mut batch = Batch {
        first_source: frame.sources.first().map_or(0, |s| s.index),
        first_entry: frame.entries.first().map_or(0, |e| e.index),
        ..Batch::default()
    };
    for (due, source) in (u64::from(batch.first_source)..).zip(&frame.sources) {
        if u64::from(source.index) != due {
            return Err(bad_frame(format!(
                "source {} follows where {due} is due",
                source.index
            )));
        }
        batch.sources.push(SourceState {
            key: array(&source.key, "source key")?,
            fingerprint: array(&source.fingerprint, "source fingerprint")?,
            settled: source.settled,
        });
    }
    for (due, entry) in (u64::from(batch.first_entry)..).zip(frame.entries) {
        if u64::from(entry.index) != due {
            return Err(bad_frame(format!(
                "entry {} follows where {due} is due",
                entry.index
            )));
        }
        batch.entries.push(decode_entry(entry)?);
    }
    batch.chunks = frame.chunks.iter().map(decode_chunk_head).collect();
    Ok(batch)
}

fn decode_entry(entry: pb::Entry) -> Result<Announcement, WireError> {
    let kind = match entry.kind() {
        pb::EntryKind::Tensor => {
            let dtype = Dtype::from_name(&entry.dtype).ok_or_else(|| {
                refuse(
                    Reason::BadShape,
                    format!(
                        "entry {:?} has the unknown dtype {:?}",
                        clip(&entry.name),
                        clip(&entry.dtype)
                    ),
                )
            })?;
            EntryKind::Tensor { dtype }
        }
        pb::EntryKind::Blob => EntryKind::Blob,
        pb::EntryKind::Unspecified => {
            return Err(bad_frame(format!(
                "entry {:?} has no kind",
                clip(&entry.name)
            )));
        }
    };
    if entry.aliases.len() > MAX_ALIASES {
        return Err(refuse(
            Reason::TooMany,
            format!(
                "entry {:?} has {} aliases, {MAX_ALIASES} may be",
                clip(&entry.name),
                entry.aliases.len()
            ),
        ));
    }
    let names = entry.aliases.iter().chain([&entry.source_name]);
    if let Some(long) = names.into_iter().find(|n| n.len() > MAX_ENTRY_NAME_LEN) {
        return Err(refuse(
            Reason::BadName,
            format!(
                "entry {:?} has a name of {} bytes, {MAX_ENTRY_NAME_LEN} may be",
                clip(&entry.name),
                long.len()
            ),
        ));
    }
    let header = EntryHeader {
        kind,
        order: match pb::Order::try_from(entry.order) {
            Ok(pb::Order::Unspecified | pb::Order::C) => Order::C,
            Ok(pb::Order::Fortran) => Order::Fortran,
            Err(_) => return Err(unsupported("order", entry.order)),
        },
        name: entry.name,
        shape: entry.shape,
        big_endian: entry.big_endian,
        byte_len: entry.byte_len,
    };
    header.check().map_err(ProtocolError::from)?;
    Ok(Announcement {
        header,
        sources: entry.sources,
        source_name: Some(entry.source_name).filter(|n| !n.is_empty()),
        aliases: entry.aliases,
        crc32c: entry.crc32c,
        trainable: entry.trainable,
        is_first: entry.first,
    })
}

fn decode_chunk_head(head: &pb::ChunkHead) -> ChunkHead {
    ChunkHead {
        entry: head.entry,
        offset: head.offset,
        raw_len: head.raw_len,
        encoded_len: head.encoded_len,
        codec: head.codec,
        crc32c: head.crc32c,
    }
}

fn decode_compare(compare: &pb::Compare) -> Result<Compare, WireError> {
    let (hashes, rest) = compare.blake3.as_chunks::<32>();
    if !rest.is_empty() || hashes.is_empty() || hashes.len() as u64 > MAX_COMPARE_CELLS {
        return Err(bad_frame(format!(
            "compare has {} bytes of digests, which is not 1 to {MAX_COMPARE_CELLS} times 32",
            compare.blake3.len()
        )));
    }
    Ok(Compare {
        entry: compare.entry,
        first_cell: compare.first_cell,
        hashes: hashes.to_vec(),
    })
}

fn decode_abort(abort: pb::Abort) -> Abort {
    Abort {
        reason: Reason::from_word(&abort.reason),
        message: printable(&abort.message, MAX_TEXT_LEN),
    }
}

/// A receiver's frame.
pub(crate) fn decode_receiver_frame(frame: pb::ReceiverFrame) -> Result<ReceiverFrame, WireError> {
    use pb::receiver_frame::Control;
    let control = match frame.control {
        None => None,
        Some(Control::Accept(accept)) => Some(ReceiverControl::Accept(decode_accept(&accept)?)),
        Some(Control::Done(done)) => Some(ReceiverControl::Done(Done {
            unchanged: done.unchanged,
            entry_count: done.entry_count,
            total_bytes: done.total_bytes,
            manifest_blake3: array(&done.manifest_blake3, "manifest_blake3")?,
            durability: decode_durability(done.durability)?,
            stages: done.stages.as_ref().map(decode_stages).transpose()?,
        })),
        Some(Control::Abort(abort)) => Some(ReceiverControl::Abort(decode_abort(abort))),
        Some(Control::Open(_) | Control::Join(_)) => {
            return Err(bad_frame(
                "a receiver that is a server does not open or join",
            ));
        }
    };
    let mut out = ReceiverFrame {
        control,
        ack: frame.ack.map(|a| a.settled_count),
        ..ReceiverFrame::default()
    };
    for wanted in &frame.wanted {
        out.wanted.push(Wanted {
            entry: wanted.entry,
            wanted: decode_ranges(&wanted.wanted)?,
            held: decode_ranges(&wanted.held)?,
            last: wanted.last,
        });
    }
    for reject in &frame.rejects {
        out.rejects.push(Reject {
            entry: reject.entry,
            offset: reject.offset,
            expected_crc32c: reject.expected_crc32c,
            found_crc32c: reject.found_crc32c,
        });
    }
    for durable in &frame.durable {
        let ranges = decode_ranges(&durable.ranges)?;
        out.durable.push(Durable {
            entry: durable.entry,
            ranges,
        });
    }
    for keep in &frame.keeps {
        let ranges = decode_ranges(&keep.ranges)?;
        out.keeps.push(Keep {
            entry: keep.entry,
            ranges,
        });
    }
    Ok(out)
}

fn decode_accept(accept: &pb::Accept) -> Result<Accept, WireError> {
    if accept.protocol_version != PROTOCOL_VERSION {
        return Err(refuse(
            Reason::Version,
            format!(
                "the receiver answered with protocol version {}",
                accept.protocol_version
            ),
        ));
    }
    Ok(Accept {
        chunk_len: accept.chunk_len,
        codecs: accept.codecs,
        durability: decode_durability(accept.durability)?,
        window_bytes: accept.window_bytes,
        session_token: array(&accept.session_token, "session_token")?,
        epoch: accept.epoch,
        max_lanes: accept.max_lanes,
        durable_bytes: accept.durable_bytes,
    })
}

fn decode_durability(number: i32) -> Result<Durability, WireError> {
    match pb::Durability::try_from(number) {
        Ok(pb::Durability::Disk) => Ok(Durability::Disk),
        Ok(pb::Durability::Process) => Ok(Durability::Process),
        _ => Err(bad_frame(format!("durability {number} has no meaning"))),
    }
}

fn decode_stages(stages: &pb::ReceiverStages) -> Result<ReceiverStages, WireError> {
    Ok(ReceiverStages {
        receive: decode_times(stages.receive)?,
        checksum: decode_times(stages.checksum)?,
        codec: decode_times(stages.codec)?,
        place: decode_times(stages.place)?,
        sync: decode_times(stages.sync)?,
        held_bytes: stage_figure(stages.held_bytes)?,
    })
}

fn decode_times(times: Option<pb::StageTimes>) -> Result<StageTimes, WireError> {
    let times = times.unwrap_or_default();
    Ok(StageTimes {
        busy: Duration::from_micros(stage_figure(times.busy_us)?),
        blocked: Duration::from_micros(stage_figure(times.blocked_us)?),
    })
}

fn stage_figure(figure: u64) -> Result<u64, WireError> {
    if figure > MAX_STAGE_FIGURE {
        return Err(bad_frame(format!(
            "a stage of the receiver has the figure {figure}, {MAX_STAGE_FIGURE} may be"
        )));
    }
    Ok(figure)
}

fn decode_ranges(ranges: &[pb::CellRange]) -> Result<RangeSet, WireError> {
    let mut set = RangeSet::new();
    let mut least = 0;
    for range in ranges {
        // In order, each costs the same however many there are.
        if range.first < least {
            return Err(bad_frame("ranges of cells that overlap or do not ascend"));
        }
        let end = range
            .first
            .checked_add(range.count)
            .filter(|&end| end > range.first);
        let end = end.ok_or_else(|| bad_frame("an empty or overflowing range of cells"))?;
        set.insert(range.first..end);
        least = end;
    }
    Ok(set)
}

pub(super) fn array<const N: usize>(bytes: &[u8], what: &str) -> Result<[u8; N], WireError> {
    bytes
        .try_into()
        .map_err(|_| bad_frame(format!("{what} has {} bytes, {N} are due", bytes.len())))
}

fn optional_array<const N: usize>(bytes: &[u8], what: &str) -> Result<Option<[u8; N]>, WireError> {
    if bytes.is_empty() {
        return Ok(None);
    }
    array(bytes, what).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::{encode_receiver_frame, encode_sender_frame};

    #[test]
    fn frames_come_back_as_they_were() {
        let open = Open {
            checkpoint: "a/b".parse().unwrap(),
            transfer_id: [1; 16],
            manifest: ManifestPromise::Complete {
                total_bytes: 12,
                entry_count: 2,
                entries_digest: [2; 16],
            },
            fingerprint: Some([3; 16]),
            codecs: 1,
            chunk_len: Some(1 << 20),
            commit_mode: CommitMode::End,
            layout: Layout::Indexed,
            out_format: OutFormat::Npy,
            overwrite: true,
            restart: true,
            verify: true,
            metadata: [("format".to_owned(), "pt".to_owned())].into(),
            source_format: "safetensors".into(),
            container_header_len: 0,
            npy_dtype: NpyDtype::Named,
        };
        let entry = Announcement {
            header: EntryHeader::tensor("w", Dtype::Bf16, &[2, 3]).unwrap(),
            sources: vec![0],
            source_name: Some("x".into()),
            aliases: vec!["y".into()],
            crc32c: Some(0),
            trainable: Some(false),
            is_first: true,
        };
        let chunk = ChunkHead {
            entry: 7,
            offset: 1 << 33,
            raw_len: 5,
            encoded_len: 4,
            codec: 3,
            crc32c: 9,
        };
        let source = SourceState {
            key: [4; 16],
            fingerprint: [5; 32],
            settled: true,
        };
        let batch = Batch {
            first_source: 3,
            sources: vec![source],
            first_entry: 7,
            entries: vec![entry],
            chunks: vec![chunk],
        };
        let finish = Finish {
            entry_count: 1,
            total_bytes: 2,
            entries_digest: [6; 16],
            fingerprint: None,
        };
        let frames = [
            SenderFrame::Open(Box::new(open)),
            SenderFrame::Batch(batch),
            SenderFrame::Compare(Compare {
                entry: 1,
                first_cell: 2,
                hashes: vec![[7; 32]; 2],
            }),
            SenderFrame::Finish(finish),
            SenderFrame::Abort(Abort {
                reason: Some(Reason::Interrupted),
                message: "x".into(),
            }),
            SenderFrame::Join(Join {
                session_token: vec![1],
                lane: 2,
            }),
        ];
        for frame in frames {
            assert_eq!(
                decode_sender_frame(encode_sender_frame(&frame)).unwrap(),
                frame
            );
        }
        let mut ranges = RangeSet::of(1..3);
        ranges.insert(9..10);
        let frame = ReceiverFrame {
            control: Some(ReceiverControl::Accept(Accept {
                chunk_len: 1 << 20,
                codecs: 1,
                durability: Durability::Process,
                window_bytes: 5,
                session_token: [8; 16],
                epoch: 4,
                max_lanes: 1,
                durable_bytes: 77,
            })),
            wanted: vec![Wanted {
                entry: 0,
                wanted: ranges.clone(),
                held: RangeSet::new(),
                last: true,
            }],
            rejects: vec![Reject {
                entry: 1,
                offset: 2,
                expected_crc32c: 3,
                found_crc32c: 4,
            }],
            ack: Some(11),
            durable: vec![Durable {
                entry: 2,
                ranges: ranges.clone(),
            }],
            keeps: vec![Keep { entry: 3, ranges }],
        };
        assert_eq!(
            decode_receiver_frame(encode_receiver_frame(&frame)).unwrap(),
            frame
        );
    }

    #[test]
    fn frames_that_lie_are_refused() {
        let range = pb::CellRange {
            first: u64::MAX,
            count: 1,
        };
        let durable = pb::Durable {
            entry: 0,
            ranges: vec![range],
        };
        let frame = pb::ReceiverFrame {
            durable: vec![durable],
            ..Default::default()
        };
        assert!(decode_receiver_frame(frame).is_err());
        let of = |first, count| pb::CellRange { first, count };
        assert!(decode_ranges(&[of(0, 2), of(2, 1), of(9, 1)]).is_ok());
        assert!(decode_ranges(&[of(9, 1), of(0, 2)]).is_err());
        assert!(decode_ranges(&[of(0, 2), of(1, 1)]).is_err());
        let entry = pb::Entry {
            name: "a".into(),
            kind: 1,
            dtype: "object".into(),
            ..Default::default()
        };
        let frame = pb::SenderFrame {
            entries: vec![entry],
            ..Default::default()
        };
        assert!(decode_sender_frame(frame).is_err());
        let skip = [0, 2].map(|index| pb::Source {
            index,
            key: vec![0; 16].into(),
            fingerprint: vec![0; 32].into(),
            settled: true,
        });
        let frame = pb::SenderFrame {
            sources: skip.to_vec(),
            ..Default::default()
        };
        assert!(decode_sender_frame(frame).is_err());
    }

    fn done_with(stages: Option<ReceiverStages>) -> ReceiverFrame {
        ReceiverFrame::control(ReceiverControl::Done(Done {
            unchanged: false,
            entry_count: 1,
            total_bytes: 2,
            manifest_blake3: [3; 32],
            durability: Durability::Disk,
            stages,
        }))
    }

    #[test]
    fn a_receivers_stages_come_back_and_may_be_absent() {
        let times = |n: u64| StageTimes {
            busy: Duration::from_micros(n),
            blocked: Duration::from_micros(n * 7),
        };
        let stages = ReceiverStages {
            receive: times(1),
            checksum: times(2),
            codec: times(0),
            place: times(4),
            sync: times(MAX_STAGE_FIGURE / 7),
            held_bytes: MAX_STAGE_FIGURE,
        };
        for stages in [None, Some(ReceiverStages::default()), Some(stages)] {
            let frame = done_with(stages);
            let encoded = encode_receiver_frame(&frame);
            assert_eq!(decode_receiver_frame(encoded).unwrap(), frame);
        }
    }

    #[test]
    fn figures_of_stages_beyond_the_limit_are_refused() {
        let times = |busy_us, blocked_us| {
            Some(pb::StageTimes {
                busy_us,
                blocked_us,
            })
        };
        let most = MAX_STAGE_FIGURE;
        for (place, held_bytes, is_fine) in [
            (times(most, most), most, true),
            (times(most + 1, 0), 0, false),
            (times(0, most + 1), 0, false),
            (times(0, 0), most + 1, false),
            (times(u64::MAX, u64::MAX), u64::MAX, false),
        ] {
            let stages = pb::ReceiverStages {
                place,
                held_bytes,
                ..Default::default()
            };
            assert_eq!(decode_stages(&stages).is_ok(), is_fine, "{stages:?}");
        }
    }
}
