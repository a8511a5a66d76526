//! What benches may reach of the inside. Not part of the public API.

#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "for benches, which stop at the first failure"
)]

use crate::{
    format::{Dtype, checksum::crc32c, codec::Codec},
    plan::{CHUNK_LEN_DEFAULT, EntryHeader, Grid},
    protocol::{
        Announcement, Arrival, Batch, ChunkHead, CommitMode, CommitPolicy, Group, Layout,
        ManifestPromise, NpyDtype, Open, OutFormat, Placement, ReceiveAction, Receiver,
        ReceiverConfig, SenderFrame,
    },
    store::{Catalog, Opened, Staging, StagingOptions},
    wire::{Event, FrameParser, encode_sender_frame, frame_head},
};
use bytes::Bytes;
use std::{path::Path, sync::Arc, time::Instant};

/// A gRPC message of chunks of these lengths with zeros as payload.
pub fn chunk_message(chunk_lens: &[u32]) -> Vec<u8> {
    let head = |(entry, &len)| chunk_head(entry, 0, len, 0);
    let batch = Batch {
        chunks: (0..).zip(chunk_lens).map(head).collect(),
        ..Batch::default()
    };
    let len = chunk_lens.iter().sum::<u32>() as usize;
    let mut message = frame_head(&encode_sender_frame(&SenderFrame::Batch(batch)), len).to_vec();
    message.resize(message.len() + len, 0);
    message
}

/// Parses a stream in these pieces: how many chunks and payload bytes it had.
pub fn parse(pieces: &[Bytes], max_message_bytes: usize) -> (usize, usize) {
    let mut parser = FrameParser::new(max_message_bytes, max_message_bytes);
    let (mut chunk_count, mut payload_bytes) = (0, 0);
    for piece in pieces {
        parser.feed(piece.clone());
        while let Some(event) = parser.next_event().unwrap() {
            match event {
                Event::Head { frame, .. } => chunk_count += frame.chunks.len(),
                Event::Payload(rope) => payload_bytes += rope.len(),
            }
        }
    }
    (chunk_count, payload_bytes)
}

/// A transfer of one tensor, all its cells ready to be written.
#[derive(Debug)]
pub struct StagedTensor {
    staging: Arc<Staging>,
    receiver: Receiver,
    placements: Vec<Placement>,
    bytes: Bytes,
}

impl StagedTensor {
    /// Begins a transfer below `root` of that many cells of 1 MiB.
    pub fn begin(root: &Path, cell_count: u32) -> Self {
        let cell_len = CHUNK_LEN_DEFAULT;
        let bytes = Bytes::from(vec![7; cell_len as usize]);
        let options = StagingOptions {
            write_mode: Default::default(),
            chunk_len: cell_len,
            layout: 1,
            out_format: 1,
            npy_dtype: 1,
        };
        let opened = Staging::open(&Catalog::open(root).unwrap(), open(), options).unwrap();
        let Opened::Ready { staging, recovered } = opened else {
            panic!("it is published already");
        };
        let mut receiver = Receiver::new(receiver_config(), recovered);
        let len = u64::from(cell_len) * u64::from(cell_count);
        receiver.announce(&announcement(len)).unwrap();
        while receiver.poll(Instant::now()).is_some() {}
        let crc = crc32c(&bytes);
        let place = |cell: u32| {
            let offset = u64::from(cell) * u64::from(cell_len);
            let head = chunk_head(0, offset, cell_len, crc);
            match receiver.arrive(0, &head).unwrap() {
                Arrival::Take(ticket) => receiver.grant(ticket).unwrap(),
                Arrival::Duplicate => panic!("the cell is there already"),
            }
        };
        StagedTensor {
            placements: (0..cell_count).map(place).collect(),
            staging,
            receiver,
            bytes,
        }
    }

    /// Writes every cell.
    pub fn write(&mut self) {
        for placement in self.placements.drain(..) {
            let written = self.staging.files().write(placement, [&self.bytes]);
            let written = written.map_err(|(_, error)| error).unwrap();
            self.receiver.written(written, Instant::now());
        }
    }

    /// Makes what is written durable, as one group.
    pub fn commit(&mut self) {
        self.receiver.end();
        let group = self.group();
        self.staging.commit(&group).unwrap();
        self.receiver.committed(group.id);
        assert!(self.receiver.is_settled());
    }

    fn group(&mut self) -> Group {
        loop {
            match self.receiver.poll(Instant::now()) {
                Some(ReceiveAction::Commit(group)) => return group,
                Some(_) => {}
                None => panic!("nothing is to be committed"),
            }
        }
    }
}

fn open() -> Open {
    Open {
        checkpoint: "bench".parse().unwrap(),
        transfer_id: [1; 16],
        manifest: ManifestPromise::Open,
        fingerprint: None,
        codecs: Codec::None.bit(),
        chunk_len: None,
        commit_mode: CommitMode::Group,
        layout: Layout::Named,
        out_format: OutFormat::Npy,
        container_header_len: 0,
        npy_dtype: NpyDtype::Bytes,
        overwrite: false,
        restart: false,
        verify: false,
        metadata: Default::default(),
        source_format: String::new(),
    }
}

fn receiver_config() -> ReceiverConfig {
    ReceiverConfig {
        max_lanes: 1,
        grid: Grid::new(CHUNK_LEN_DEFAULT).unwrap(),
        codecs: Codec::None.bit(),
        commit: CommitPolicy {
            bytes: u64::MAX,
            files: usize::MAX,
            interval: None,
            max_undurable_bytes: u64::MAX,
        },
        layout: Layout::Named,
        container_header_len: None,
        manifest: ManifestPromise::Open,
        fingerprint: None,
    }
}

fn announcement(byte_len: u64) -> Batch {
    Batch {
        entries: vec![Announcement {
            header: EntryHeader::tensor("w", Dtype::U8, &[byte_len]).unwrap(),
            sources: Vec::new(),
            source_name: None,
            aliases: Vec::new(),
            crc32c: None,
            trainable: None,
            is_first: false,
        }],
        ..Batch::default()
    }
}

fn chunk_head(entry: u32, offset: u64, len: u32, crc32c: u32) -> ChunkHead {
    ChunkHead {
        entry,
        offset,
        raw_len: len,
        encoded_len: len,
        codec: Codec::None.id(),
        crc32c,
    }
}
