//! What a sender says, built by hand.

use tensorferry::{
    format::{Dtype, checksum::crc32c},
    plan::{EntryHeader, EntryKind, digest_entries},
    source::SourceSet,
    wire::pb::{self, sender_frame::Control},
};

/// Cell length of the tests: the smallest that there is.
pub(crate) const CHUNK: usize = 256 << 10;
/// Bits of every codec that a receiver of version 1 knows.
pub(crate) const ALL_CODECS: u32 = 1 | 1 << 1 | 1 << 3 | 1 << 4;

/// An entry with its bytes.
#[derive(Clone)]
pub(crate) struct Part {
    pub(crate) entry: pb::Entry,
    pub(crate) bytes: Vec<u8>,
    header: Option<EntryHeader>,
}

/// What one session announces.
#[derive(Clone)]
pub(crate) struct Load {
    pub(crate) sources: Vec<pb::Source>,
    pub(crate) parts: Vec<Part>,
}

/// Bytes that are the same in every run and differ from cell to cell.
pub(crate) fn noise(seed: &str, len: usize) -> Vec<u8> {
    let mut bytes = vec![0; len];
    blake3::Hasher::new()
        .update(seed.as_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    bytes
}

/// A tensor of bytes.
pub(crate) fn tensor(name: &str, len: usize) -> Part {
    tensor_with(name, noise(name, len))
}

/// A tensor of these bytes.
pub(crate) fn tensor_with(name: &str, bytes: Vec<u8>) -> Part {
    let header = EntryHeader::tensor(name, Dtype::U8, &[bytes.len() as u64]).unwrap();
    Part {
        entry: pb::Entry {
            name: name.to_owned(),
            kind: pb::EntryKind::Tensor.into(),
            dtype: "uint8".to_owned(),
            shape: vec![bytes.len() as u64],
            byte_len: bytes.len() as u64,
            ..Default::default()
        },
        bytes,
        header: Some(header),
    }
}

/// A tensor of single floats.
pub(crate) fn floats(name: &str, bytes: Vec<u8>) -> Part {
    let count = bytes.len() as u64 / 4;
    let mut part = tensor_with(name, bytes);
    part.entry.dtype = "float32".to_owned();
    part.entry.shape = vec![count];
    part.header = Some(EntryHeader::tensor(name, Dtype::F32, &[count]).unwrap());
    part
}

/// A side file.
pub(crate) fn blob(name: &str, bytes: &[u8]) -> Part {
    Part {
        entry: pb::Entry {
            name: name.to_owned(),
            kind: pb::EntryKind::Blob.into(),
            byte_len: bytes.len() as u64,
            ..Default::default()
        },
        bytes: bytes.to_vec(),
        header: EntryHeader::blob(name, bytes.len() as u64).ok(),
    }
}

/// A source file: `state` stands for all that its fingerprint covers.
pub(crate) fn source(key: u8, state: u8, settled: bool) -> pb::Source {
    pb::Source {
        index: 0,
        key: vec![key; 16].into(),
        fingerprint: vec![state; 32].into(),
        settled,
    }
}

impl Load {
    /// Entries without sources.
    pub(crate) fn of(parts: Vec<Part>) -> Self {
        Load::from_sources(Vec::new(), parts)
    }

    /// Entries that all come from all these sources.
    pub(crate) fn from_sources(mut sources: Vec<pb::Source>, mut parts: Vec<Part>) -> Self {
        for (i, source) in sources.iter_mut().enumerate() {
            source.index = i as u32;
        }
        for (i, part) in parts.iter_mut().enumerate() {
            part.entry.index = i as u32;
            part.entry.sources = (0..sources.len() as u32).collect();
        }
        Load { sources, parts }
    }

    /// What the product's own client would announce of a source.
    pub(crate) fn of_source(set: &SourceSet) -> Self {
        let sources = set.states().iter().map(|state| pb::Source {
            index: 0,
            key: state.key.to_vec().into(),
            fingerprint: state.fingerprint.to_vec().into(),
            settled: state.settled,
        });
        let parts = set.entries().iter().enumerate().map(|(i, entry)| {
            let header = &entry.header;
            let mut bytes = vec![0; header.byte_len as usize];
            set.read_at(i, 0, &mut bytes).unwrap();
            let mut part = blob("placeholder", &bytes);
            part.entry.name = header.name.clone();
            part.entry.shape = header.shape.clone();
            if let EntryKind::Tensor { dtype } = header.kind {
                part.entry.kind = pb::EntryKind::Tensor.into();
                part.entry.dtype = dtype.name().to_owned();
            }
            part.header = Some(header.clone());
            part
        });
        let mut load = Load::from_sources(sources.collect(), parts.collect());
        for (part, entry) in load.parts.iter_mut().zip(set.entries()) {
            part.entry.sources = entry.sources.clone();
        }
        load
    }

    pub(crate) fn total_bytes(&self) -> u64 {
        self.parts.iter().map(|p| p.bytes.len() as u64).sum()
    }

    /// The digest of the headers, as docs/wire.md has it.
    pub(crate) fn digest(&self) -> Vec<u8> {
        digest_entries(self.parts.iter().filter_map(|p| p.header.as_ref())).to_vec()
    }

    /// An Open that promises exactly this.
    pub(crate) fn open(&self, name: &str, transfer_id: [u8; 16]) -> pb::SenderOpen {
        pb::SenderOpen {
            manifest_complete: true,
            total_bytes: self.total_bytes(),
            entry_count: self.parts.len() as u64,
            entries_digest: self.digest().into(),
            ..open_ended(name, transfer_id)
        }
    }

    pub(crate) fn finish(&self) -> pb::Finish {
        pb::Finish {
            entry_count: self.parts.len() as u64,
            total_bytes: self.total_bytes(),
            entries_digest: self.digest().into(),
            fingerprint: Vec::new().into(),
        }
    }

    /// Sources and entries in one frame.
    pub(crate) fn announcement(&self) -> pb::SenderFrame {
        pb::SenderFrame {
            sources: self.sources.clone(),
            entries: self.parts.iter().map(|p| p.entry.clone()).collect(),
            ..Default::default()
        }
    }

    /// The bytes of one cell.
    pub(crate) fn cell(&self, entry: u32, cell: u64) -> &[u8] {
        let bytes = &self.parts[entry as usize].bytes;
        let first = cell as usize * CHUNK;
        &bytes[first..bytes.len().min(first + CHUNK)]
    }

    /// The right chunk of a cell, uncompressed.
    pub(crate) fn chunk(&self, entry: u32, cell: u64) -> pb::SenderFrame {
        let raw = self.cell(entry, cell);
        frame_chunk(head(entry, cell, raw), raw)
    }

    /// The right BLAKE3 of cells of an entry.
    pub(crate) fn compare(&self, entry: u32, first_cell: u64, count: u64) -> pb::Compare {
        let cells = first_cell..first_cell + count;
        let hashes = cells.flat_map(|cell| *blake3::hash(self.cell(entry, cell)).as_bytes());
        pb::Compare {
            entry,
            first_cell,
            blake3: hashes.collect::<Vec<u8>>().into(),
        }
    }
}

/// An Open whose manifest is still being produced.
pub(crate) fn open_ended(name: &str, transfer_id: [u8; 16]) -> pb::SenderOpen {
    pb::SenderOpen {
        protocol_version: 1,
        checkpoint: name.to_owned(),
        transfer_id: transfer_id.to_vec().into(),
        codecs: ALL_CODECS,
        ..Default::default()
    }
}

/// The head of an uncompressed chunk.
pub(crate) fn head(entry: u32, cell: u64, raw: &[u8]) -> pb::ChunkHead {
    pb::ChunkHead {
        entry,
        offset: cell * CHUNK as u64,
        raw_len: raw.len() as u32,
        encoded_len: raw.len() as u32,
        codec: 0,
        crc32c: crc32c(raw),
    }
}

/// One chunk in a frame of its own.
pub(crate) fn frame_chunk(head: pb::ChunkHead, payload: &[u8]) -> pb::SenderFrame {
    pb::SenderFrame {
        chunks: vec![head],
        payload: payload.to_vec().into(),
        ..Default::default()
    }
}

fn control(control: Control) -> pb::SenderFrame {
    pb::SenderFrame {
        control: Some(control),
        ..Default::default()
    }
}

pub(crate) fn frame_open(open: pb::SenderOpen) -> pb::SenderFrame {
    control(Control::Open(open))
}

pub(crate) fn frame_join(session_token: &[u8], lane: u32) -> pb::SenderFrame {
    let session_token = session_token.to_vec().into();
    control(Control::Join(pb::Join {
        session_token,
        lane,
    }))
}

pub(crate) fn frame_compare(compare: pb::Compare) -> pb::SenderFrame {
    control(Control::Compare(compare))
}

pub(crate) fn frame_finish(finish: pb::Finish) -> pb::SenderFrame {
    control(Control::Finish(finish))
}

pub(crate) fn frame_abort(reason: &str) -> pb::SenderFrame {
    let (reason, message) = (reason.to_owned(), "the test gives up".to_owned());
    control(Control::Abort(pb::Abort { reason, message }))
}
