//! From the protocol's types to protobuf.

use super::pb;
use crate::{
    plan::{EntryKind, Order, RangeSet, SourceState},
    protocol::{
        Abort, Accept, Announcement, ChunkHead, CommitMode, Compare, Done, Durability, Finish,
        Layout, ManifestPromise, NpyDtype, Open, OutFormat, PROTOCOL_VERSION, ReceiverControl,
        ReceiverFrame, ReceiverStages, SenderFrame, StageTimes,
    },
};
use bytes::Bytes;

/// A sender's frame, without payload.
pub(crate) fn encode_sender_frame(frame: &SenderFrame) -> pb::SenderFrame {
    use pb::sender_frame::Control;
    let control = match frame {
        SenderFrame::Open(open) => Control::Open(encode_open(open)),
        SenderFrame::Join(join) => Control::Join(pb::Join {
            session_token: Bytes::copy_from_slice(&join.session_token),
            lane: join.lane,
        }),
        SenderFrame::Compare(compare) => Control::Compare(encode_compare(compare)),
        SenderFrame::Finish(finish) => Control::Finish(encode_finish(finish)),
        SenderFrame::Abort(abort) => Control::Abort(encode_abort(abort)),
        SenderFrame::Batch(batch) => {
            let mut frame = encode_sources_and_entries(
                batch.first_source,
                &batch.sources,
                batch.first_entry,
                &batch.entries,
            );
            frame.chunks = batch.chunks.iter().map(encode_chunk_head).collect();
            return frame;
        }
    };
    pb::SenderFrame {
        control: Some(control),
        ..Default::default()
    }
}

/// Announcements, numbered from the given numbers.
pub(crate) fn encode_sources_and_entries(
    first_source: u32,
    sources: &[SourceState],
    first_entry: u32,
    entries: &[Announcement],
) -> pb::SenderFrame {
    let source = |(i, s): (u32, &SourceState)| pb::Source {
        index: first_source + i,
        key: Bytes::copy_from_slice(&s.key),
        fingerprint: Bytes::copy_from_slice(&s.fingerprint),
        settled: s.settled,
    };
    let entry = |(i, a): (u32, &Announcement)| encode_entry(first_entry + i, a);
    pb::SenderFrame {
        sources: (0..).zip(sources).map(source).collect(),
        entries: (0..).zip(entries).map(entry).collect(),
        ..Default::default()
    }
}

fn encode_open(open: &Open) -> pb::SenderOpen {
    let (manifest_complete, total_bytes, entry_count, entries_digest) = match open.manifest {
        ManifestPromise::Complete {
            total_bytes,
            entry_count,
            entries_digest,
        } => (
            true,
            total_bytes,
            entry_count,
            Bytes::copy_from_slice(&entries_digest),
        ),
        ManifestPromise::Open => (false, 0, 0, Bytes::new()),
    };
    pb::SenderOpen {
        protocol_version: PROTOCOL_VERSION,
        checkpoint: open.checkpoint.as_str().to_owned(),
        transfer_id: Bytes::copy_from_slice(&open.transfer_id),
        manifest_complete,
        total_bytes,
        entry_count,
        entries_digest,
        fingerprint: optional_bytes(open.fingerprint),
        codecs: open.codecs,
        chunk_len: open.chunk_len.unwrap_or(0),
        commit_mode: match open.commit_mode {
            CommitMode::Strict => pb::CommitMode::Strict,
            CommitMode::Group => pb::CommitMode::Group,
            CommitMode::End => pb::CommitMode::End,
            CommitMode::None => pb::CommitMode::None,
        } as i32,
        layout: encode_layout(open.layout),
        out_format: encode_out_format(open.out_format),
        overwrite: open.overwrite,
        restart: open.restart,
        verify: open.verify,
        metadata: open.metadata.clone().into_iter().collect(),
        source_format: open.source_format.clone(),
        container_header_len: open.container_header_len,
        npy_dtype: encode_npy_dtype(open.npy_dtype),
    }
}

/// Number of a layout, on the wire and in the journal.
pub(crate) fn encode_layout(layout: Layout) -> i32 {
    match layout {
        Layout::Named => pb::Layout::Named as i32,
        Layout::Indexed => pb::Layout::Indexed as i32,
    }
}

/// Number of a container, on the wire and in the journal.
pub(crate) fn encode_out_format(format: OutFormat) -> i32 {
    match format {
        OutFormat::Npy => pb::OutFormat::Npy as i32,
        OutFormat::Safetensors => pb::OutFormat::Safetensors as i32,
    }
}

/// Number of a way to name types, on the wire and in the journal.
pub(crate) fn encode_npy_dtype(npy_dtype: NpyDtype) -> i32 {
    match npy_dtype {
        NpyDtype::Bytes => pb::NpyDtype::Bytes as i32,
        NpyDtype::Named => pb::NpyDtype::Named as i32,
    }
}

fn encode_entry(index: u32, entry: &Announcement) -> pb::Entry {
    let header = &entry.header;
    let (kind, dtype) = match header.kind {
        EntryKind::Tensor { dtype } => (pb::EntryKind::Tensor, dtype.name().to_owned()),
        EntryKind::Blob => (pb::EntryKind::Blob, String::new()),
    };
    pb::Entry {
        index,
        name: header.name.clone(),
        kind: kind as i32,
        dtype,
        shape: header.shape.clone(),
        order: match header.order {
            Order::C => pb::Order::C,
            Order::Fortran => pb::Order::Fortran,
        } as i32,
        big_endian: header.big_endian,
        byte_len: header.byte_len,
        sources: entry.sources.clone(),
        source_name: entry.source_name.clone().unwrap_or_default(),
        aliases: entry.aliases.clone(),
        crc32c: entry.crc32c,
        trainable: entry.trainable,
        first: entry.is_first,
    }
}

fn encode_chunk_head(head: &ChunkHead) -> pb::ChunkHead {
    pb::ChunkHead {
        entry: head.entry,
        offset: head.offset,
        raw_len: head.raw_len,
        encoded_len: head.encoded_len,
        codec: head.codec,
        crc32c: head.crc32c,
    }
}

fn encode_compare(compare: &Compare) -> pb::Compare {
    pb::Compare {
        entry: compare.entry,
        first_cell: compare.first_cell,
        blake3: compare.hashes.concat().into(),
    }
}

fn encode_finish(finish: &Finish) -> pb::Finish {
    pb::Finish {
        entry_count: finish.entry_count,
        total_bytes: finish.total_bytes,
        entries_digest: Bytes::copy_from_slice(&finish.entries_digest),
        fingerprint: optional_bytes(finish.fingerprint),
    }
}

fn encode_abort(abort: &Abort) -> pb::Abort {
    pb::Abort {
        reason: abort.reason.map_or("", |r| r.as_str()).to_owned(),
        message: abort.message.clone(),
    }
}

/// A receiver's frame.
pub(crate) fn encode_receiver_frame(frame: &ReceiverFrame) -> pb::ReceiverFrame {
    use pb::receiver_frame::Control;
    pb::ReceiverFrame {
        control: frame.control.as_ref().map(|control| match control {
            ReceiverControl::Accept(accept) => Control::Accept(encode_accept(accept)),
            ReceiverControl::Done(done) => Control::Done(encode_done(done)),
            ReceiverControl::Abort(abort) => Control::Abort(encode_abort(abort)),
        }),
        wanted: frame
            .wanted
            .iter()
            .map(|w| pb::Wanted {
                entry: w.entry,
                wanted: encode_ranges(&w.wanted),
                held: encode_ranges(&w.held),
                last: w.last,
            })
            .collect(),
        rejects: frame
            .rejects
            .iter()
            .map(|r| pb::Reject {
                entry: r.entry,
                offset: r.offset,
                expected_crc32c: r.expected_crc32c,
                found_crc32c: r.found_crc32c,
            })
            .collect(),
        ack: frame.ack.map(|settled_count| pb::Ack { settled_count }),
        durable: frame
            .durable
            .iter()
            .map(|d| pb::Durable {
                entry: d.entry,
                ranges: encode_ranges(&d.ranges),
            })
            .collect(),
        keeps: frame
            .keeps
            .iter()
            .map(|k| pb::Keep {
                entry: k.entry,
                ranges: encode_ranges(&k.ranges),
            })
            .collect(),
    }
}

fn encode_accept(accept: &Accept) -> pb::Accept {
    pb::Accept {
        protocol_version: PROTOCOL_VERSION,
        chunk_len: accept.chunk_len,
        codecs: accept.codecs,
        durability: encode_durability(accept.durability),
        window_bytes: accept.window_bytes,
        session_token: Bytes::copy_from_slice(&accept.session_token),
        epoch: accept.epoch,
        max_lanes: accept.max_lanes,
        durable_bytes: accept.durable_bytes,
    }
}

fn encode_done(done: &Done) -> pb::Done {
    pb::Done {
        unchanged: done.unchanged,
        entry_count: done.entry_count,
        total_bytes: done.total_bytes,
        manifest_blake3: Bytes::copy_from_slice(&done.manifest_blake3),
        durability: encode_durability(done.durability),
        stages: done.stages.as_ref().map(encode_stages),
    }
}

fn encode_stages(stages: &ReceiverStages) -> pb::ReceiverStages {
    pb::ReceiverStages {
        receive: encode_times(stages.receive),
        checksum: encode_times(stages.checksum),
        codec: encode_times(stages.codec),
        place: encode_times(stages.place),
        sync: encode_times(stages.sync),
        held_bytes: stages.held_bytes,
    }
}

fn encode_times(times: StageTimes) -> Option<pb::StageTimes> {
    // A stage that had nothing to do takes no room.
    (times != StageTimes::default()).then_some(pb::StageTimes {
        busy_us: times.busy.as_micros() as u64,
        blocked_us: times.blocked.as_micros() as u64,
    })
}

fn encode_durability(durability: Durability) -> i32 {
    match durability {
        Durability::Disk => pb::Durability::Disk as i32,
        Durability::Process => pb::Durability::Process as i32,
    }
}

fn encode_ranges(ranges: &RangeSet) -> Vec<pb::CellRange> {
    ranges
        .iter()
        .map(|r| pb::CellRange {
            first: r.start,
            count: r.end - r.start,
        })
        .collect()
}

fn optional_bytes(digest: Option<[u8; 16]>) -> Bytes {
    digest.map_or(Bytes::new(), |d| Bytes::copy_from_slice(&d))
}
