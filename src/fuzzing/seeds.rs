//! Inputs that begin where random bytes never come: real encodings, the same at
//! every run. They are the committed corpus in `fuzz/corpus`.

use super::mutate::Rng;
use crate::{
    format::{Dtype, codec, npy},
    plan::{EntryHeader, RangeSet, SourceState},
    protocol::{
        Abort, Accept, Announcement, Batch, ChunkHead, CommitMode, Compare, Done, Durability,
        Durable, Finish, Join, Keep, Layout, ManifestPromise, NpyDtype, Open, OutFormat, Reason,
        ReceiverControl, ReceiverFrame, ReceiverStages, Reject, SenderFrame, Wanted,
    },
    store::journal::{EntryRecord, JournalHeader, Record, Run},
    wire::{encode_message, encode_receiver_frame, encode_sender_frame, frame_head},
};
use std::time::Duration;

/// Name and bytes of every seed of a target.
pub(super) type Seeds = Vec<(&'static str, Vec<u8>)>;

pub(super) fn npy_seeds() -> Seeds {
    let header = |descr: &str, order, shape: &[u64]| npy::encode_header(descr, order, shape);
    let version_3 = {
        let mut bytes = header("<f4", false, &[3, 4]);
        bytes.splice(6..10, [3, 0, 118, 0, 0, 0]);
        bytes
    };
    vec![
        ("f4_matrix", header("<f4", false, &[768, 3072])),
        ("f8_fortran", header(">f8", true, &[3, 4, 5])),
        ("version_2", with_version_2(header("<f4", false, &[1; 4]))),
        ("version_3", version_3),
        (
            "other_spelling",
            b"\x93NUMPY\x01\x00\x3d\x00{\"shape\":( 2L,),u'fortran_order':True,b'descr':'\\x3cf4'}\n             "
                .to_vec(),
        ),
        ("object", header("|O", false, &[2])),
    ]
}

/// The same header with a length of 32 bits.
fn with_version_2(mut header: Vec<u8>) -> Vec<u8> {
    let len = u32::from(u16::from_le_bytes([header[8], header[9]])).to_le_bytes();
    header.splice(6..10, [2, 0].into_iter().chain(len));
    header
}

pub(super) fn names_seeds() -> Seeds {
    let joined = |names: &[&str]| [&[1][..], names.join("\0").as_bytes()].concat();
    vec![
        (
            "tensors",
            joined(&[
                "model.layers.0.weight",
                "Model.Layers.0.weight",
                "a/b",
                "a_b",
                "CON",
            ]),
        ),
        (
            "blobs",
            joined(&[
                "config.json",
                "a/config.json",
                "a",
                "a/b/c.txt",
                "../x",
                ".hidden",
            ]),
        ),
        (
            "checkpoints",
            joined(&["runs/step-100", "a//b", "a/.b", "/a", "x.y_z-1"]),
        ),
        (
            "odd",
            joined(&[
                "\u{202e}gnp.exe",
                "na\u{ef}ve",
                "a\\b",
                "~",
                "a~12345678",
                "manifest.json",
            ]),
        ),
        (
            "indexed",
            [&[0][..], b"first\0weight_7\0weight_7.npy\0WEIGHT_7"].concat(),
        ),
        (
            "long",
            joined(&[&"x".repeat(300), &"x/".repeat(20), &"y".repeat(250)]),
        ),
    ]
}

pub(super) fn safetensors_seeds() -> Seeds {
    let file = |data_len: u64, json: &str| [&data_len.to_le_bytes()[..], json.as_bytes()].concat();
    vec![
        (
            "two_tensors",
            file(
                44,
                r#"{"__metadata__":{"format":"pt"},"b":{"dtype":"F32","shape":[2,4],"data_offsets":[12,44]},"a":{"dtype":"BF16","shape":[6],"data_offsets":[0,12]}}"#,
            ),
        ),
        (
            "packed_and_empty",
            file(
                4,
                r#"{"q":{"dtype":"F4","shape":[8],"data_offsets":[0,4]},"e":{"dtype":"I64","shape":[0,3],"data_offsets":[0,0]}}"#,
            ),
        ),
        (
            "scalar_and_escapes",
            file(
                1,
                "{ \"\\u00e9\\n\\\"/\" : {\"data_offsets\":[0,1],\"shape\":[],\"dtype\":\"U8\"} }  ",
            ),
        ),
        (
            "hole",
            file(
                8,
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
            ),
        ),
        (
            "twice",
            file(
                2,
                r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#,
            ),
        ),
        (
            "odd_metadata",
            file(0, r#"{"__metadata__":{"a":1,"b":[{"c":null}],"d":"e"}}"#),
        ),
    ]
}

/// A part of a fixture: what real libraries wrote.
fn fixture(path: &str, range: std::ops::Range<usize>) -> Vec<u8> {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let bytes = std::fs::read(root.join(path)).unwrap();
    bytes[range.start.min(bytes.len())..range.end.min(bytes.len())].to_vec()
}

pub(super) fn tensorflow_index_seeds() -> Seeds {
    let index = |path: &str| fixture(&format!("tensorflow/{path}.index"), 0..usize::MAX);
    vec![
        ("dtypes", index("dtypes/ckpt")),
        ("sharded", index("sharded/model.ckpt-3")),
        ("many", index("many/ckpt")),
        ("keras", index("keras_checkpoint/ckpt-2")),
        (
            "version_1",
            fixture("tensorflow/version_1/model.ckpt", 0..usize::MAX),
        ),
    ]
}

pub(super) fn tensorflow_graph_seeds() -> Seeds {
    // The graph is the first tensor of these, for the names of all others come later.
    let module = "tensorflow/module_checkpoint/ckpt.data-00000-of-00001";
    let keras = "tensorflow/keras_checkpoint/ckpt-2.data-00000-of-00001";
    vec![
        ("module", graph_of(&fixture(module, 0..usize::MAX))),
        ("keras", graph_of(&fixture(keras, 0..usize::MAX))),
    ]
}

pub(super) fn gguf_seeds() -> Seeds {
    let header = |path: &str| fixture(&format!("gguf/{path}/model.gguf"), 0..4000);
    vec![
        ("plain", header("plain")),
        ("quantised", header("quantised")),
    ]
}

pub(super) fn onnx_seeds() -> Seeds {
    let model = |path: &str| fixture(&format!("onnx/{path}/model.onnx"), 0..4000);
    vec![("types", model("types")), ("outside", model("outside"))]
}

/// The graph of objects in the data of a checkpoint: the bytes that read as one.
fn graph_of(data: &[u8]) -> Vec<u8> {
    use crate::source::protobuf::{take, varint};
    let text_at = |at: usize| {
        let mut rest = &data[at..];
        let len = varint(&mut rest).ok()?;
        take(&mut rest, 4).ok()?;
        let text = take(&mut rest, len).ok()?;
        (len > 16 && crate::source::tensorflow::graph::Graph::parse(text).is_ok())
            .then(|| text.to_vec())
    };
    (0..data.len())
        .filter_map(text_at)
        .max_by_key(Vec::len)
        .unwrap()
}

pub(super) fn saved_model_seeds() -> Seeds {
    // Only the graph of objects counts, and that stands in the middle of the file.
    let nodes = |path: &str| {
        use crate::source::protobuf::Fields;
        let bytes = fixture(path, 0..usize::MAX);
        let field = |message: &[u8], number| {
            let fields = Fields::new(message).map(Result::unwrap);
            let found = fields.filter(|field| field.number == number).last();
            found.unwrap().value.bytes().unwrap().to_vec()
        };
        let wrap = |number: u8, message: &[u8]| {
            let mut out = vec![number << 3 | 2];
            let mut len = message.len();
            while len >= 0x80 {
                out.push(len as u8 | 0x80);
                len >>= 7;
            }
            out.push(len as u8);
            [out, message.to_vec()].concat()
        };
        wrap(2, &wrap(7, &field(&field(&bytes, 2), 7)))
    };
    vec![
        (
            "keras",
            nodes("tensorflow/keras_export/model/saved_model.pb"),
        ),
        (
            "module",
            nodes("tensorflow/module_export/model/saved_model.pb"),
        ),
    ]
}

fn open() -> SenderFrame {
    SenderFrame::Open(Box::new(Open {
        checkpoint: "run7/step-900".parse().unwrap(),
        transfer_id: [1; 16],
        manifest: ManifestPromise::Complete {
            total_bytes: 24,
            entry_count: 1,
            entries_digest: [2; 16],
        },
        fingerprint: Some([3; 16]),
        codecs: 27,
        chunk_len: Some(1 << 20),
        commit_mode: CommitMode::Strict,
        layout: Layout::Indexed,
        out_format: OutFormat::Npy,
        container_header_len: 0,
        npy_dtype: NpyDtype::Bytes,
        overwrite: true,
        restart: false,
        verify: true,
        metadata: [("format".to_owned(), "pt".to_owned())].into(),
        source_format: "safetensors".into(),
    }))
}

fn announcements() -> SenderFrame {
    let announcement = |header| Announcement {
        header,
        sources: vec![0],
        source_name: Some("x".into()),
        aliases: vec!["y".into()],
        crc32c: Some(0),
        trainable: Some(false),
        is_first: false,
    };
    SenderFrame::Batch(Batch {
        first_source: 0,
        sources: vec![SourceState {
            key: [4; 16],
            fingerprint: [5; 32],
            settled: true,
        }],
        first_entry: 0,
        entries: vec![
            announcement(EntryHeader::tensor("w", Dtype::Bf16, &[2, 3]).unwrap()),
            announcement(EntryHeader::blob("config.json", 12).unwrap()),
        ],
        chunks: Vec::new(),
    })
}

fn chunk_heads(lens: &[u32]) -> SenderFrame {
    let head = |(entry, &len)| ChunkHead {
        entry,
        offset: 1 << 20,
        raw_len: len,
        encoded_len: len,
        codec: 0,
        crc32c: 9,
    };
    SenderFrame::Batch(Batch {
        chunks: (0..).zip(lens).map(head).collect(),
        ..Batch::default()
    })
}

pub(super) fn sender_frames_seeds() -> Seeds {
    let message = |frame: &SenderFrame| encode_message(&encode_sender_frame(frame)).to_vec();
    let with_payload = |lens: &[u32]| {
        let len = lens.iter().sum::<u32>() as usize;
        let head = frame_head(&encode_sender_frame(&chunk_heads(lens)), len);
        [&head[..], &vec![7; len]].concat()
    };
    // The payload first, then fields that no version knows, then the head.
    let late_head = {
        let head = message(&chunk_heads(&[5]))[5..].to_vec();
        let mut body = b"\x7a\x05hello\xa0\x01\x96\x01\xaa\x01\x02ab\xb5\x01abcd".to_vec();
        body.extend(head);
        [&[0, 0, 0, 0, body.len() as u8][..], &body].concat()
    };
    let finish = SenderFrame::Finish(Finish {
        entry_count: 2,
        total_bytes: 24,
        entries_digest: [6; 16],
        fingerprint: None,
    });
    let compare = SenderFrame::Compare(Compare {
        entry: 1,
        first_cell: 2,
        hashes: vec![[7; 32]; 3],
    });
    let abort = SenderFrame::Abort(Abort {
        reason: Some(Reason::Interrupted),
        message: "enough".into(),
    });
    let join = SenderFrame::Join(Join {
        session_token: vec![8; 16],
        lane: 2,
    });
    let streams = [
        (
            "open_and_announcements",
            [message(&open()), message(&announcements())].concat(),
        ),
        ("one_chunk", with_payload(&[300])),
        (
            "many_chunks",
            [with_payload(&[3; 12]), with_payload(&[100, 1])].concat(),
        ),
        ("late_head", late_head),
        (
            "controls",
            [&compare, &finish, &abort, &join].map(message).concat(),
        ),
    ];
    streams
        .map(|(name, stream)| {
            let splits: Vec<u8> = (0..16).map(|i| i * 7).collect();
            (name, [splits, stream].concat())
        })
        .into()
}

fn receiver_stages() -> ReceiverStages {
    let mut stages = ReceiverStages::default();
    stages.place.busy = Duration::from_millis(700);
    stages.place.blocked = Duration::from_micros(3);
    stages.sync.busy = Duration::from_secs(2);
    stages.held_bytes = 1 << 20;
    stages
}

pub(super) fn receiver_frames_seeds() -> Seeds {
    let set = |ranges: &[(u64, u64)]| {
        let mut set = RangeSet::new();
        ranges.iter().for_each(|r| set.insert(r.0..r.1));
        set
    };
    let accept = ReceiverFrame::control(ReceiverControl::Accept(Accept {
        chunk_len: 1 << 20,
        codecs: 27,
        durability: Durability::Disk,
        window_bytes: 64 << 20,
        session_token: [8; 16],
        epoch: 4,
        max_lanes: 8,
        durable_bytes: 77,
    }));
    let wanted = |entry, wanted, held| Wanted {
        entry,
        wanted,
        held,
        last: true,
    };
    let answers = ReceiverFrame {
        wanted: vec![
            wanted(0, set(&[(1, 3), (5, 20)]), set(&[(3, 4)])),
            wanted(1, set(&[]), set(&[])),
            wanted(2, set(&[(0, 1)]), set(&[])),
            wanted(3, set(&[]), set(&[(0, 1)])),
        ],
        ..ReceiverFrame::default()
    };
    let progress = ReceiverFrame {
        ack: Some(3),
        rejects: vec![Reject {
            entry: 0,
            offset: 256 << 10,
            expected_crc32c: 3,
            found_crc32c: 4,
        }],
        durable: vec![Durable {
            entry: 2,
            ranges: set(&[(0, 1)]),
        }],
        keeps: vec![Keep {
            entry: 0,
            ranges: set(&[(3, 4)]),
        }],
        ..ReceiverFrame::default()
    };
    let done = ReceiverFrame::control(ReceiverControl::Done(Done {
        unchanged: false,
        entry_count: 4,
        total_bytes: 99,
        manifest_blake3: [1; 32],
        durability: Durability::Process,
        stages: Some(receiver_stages()),
    }));
    let abort = ReceiverFrame::control(ReceiverControl::Abort(Abort {
        reason: Some(Reason::DiskQuota),
        message: "no room".into(),
    }));
    let frames = |frames: &[&ReceiverFrame]| {
        let mut out = Vec::new();
        for frame in frames {
            let message = &encode_message(&encode_receiver_frame(frame))[5..];
            out.extend_from_slice(&(message.len() as u16).to_le_bytes());
            out.extend_from_slice(message);
        }
        out
    };
    let durable_first = ReceiverFrame {
        durable: vec![Durable {
            entry: 2,
            ranges: set(&[(0, 1)]),
        }],
        ..ReceiverFrame::default()
    };
    let nothing_wanted = ReceiverFrame {
        wanted: vec![wanted(2, set(&[]), set(&[]))],
        ..ReceiverFrame::default()
    };
    vec![
        (
            "durable_before_wanted",
            frames(&[&durable_first, &nothing_wanted]),
        ),
        ("session", frames(&[&accept, &answers, &progress, &done])),
        ("progress", frames(&[&answers, &progress, &progress])),
        ("abort", frames(&[&accept, &abort])),
    ]
}

pub(super) fn journal_seeds() -> Seeds {
    let header = JournalHeader {
        checkpoint: "run7".into(),
        chunk_len: 256 << 10,
        layout: 1,
        out_format: 1,
        npy_dtype: 1,
    };
    let session = Record::Session {
        epoch: 1,
        nonce: [1; 16],
        transfer_id: [2; 16],
        entries_digest: Some([3; 16]),
        adopted: false,
        unsynced: false,
    };
    let source = Record::Source(SourceState {
        key: [4; 16],
        fingerprint: [5; 32],
        settled: true,
    });
    let entry = Record::Entry(EntryRecord {
        number: 0,
        header: EntryHeader::tensor("w", Dtype::F32, &[1 << 20]).unwrap(),
        file: "w.npy".into(),
        data_offset: None,
        source_keys: vec![[4; 16]],
    });
    let run = |first, crcs| Run {
        entry: 0,
        first,
        crcs,
    };
    let records = [
        session,
        source,
        entry,
        Record::Cells(vec![run(0, vec![1, 2, 3]), run(9, vec![4])]),
        Record::Source(SourceState {
            key: [4; 16],
            fingerprint: [6; 32],
            settled: false,
        }),
        Record::Kept(vec![run(1, vec![2, 3])]),
        Record::Publish {
            manifest_blake3: [7; 32],
            overwrite: true,
        },
        Record::Forget(vec![0, 300]),
    ];
    let (mut raw, mut chain) = header.encode().unwrap();
    raw.insert(0, 0);
    let mut bodies = vec![1];
    for record in &records {
        let mut one = Vec::new();
        chain.append(record, &mut one).unwrap();
        let body = &one[8..one.len() - 4];
        bodies.push(one[4]);
        bodies.extend_from_slice(&(body.len() as u16).to_le_bytes());
        bodies.extend_from_slice(body);
        raw.extend(one);
    }
    let mut seeds = vec![("raw", raw), ("bodies", bodies)];
    let damage = ["in_order", "cut", "bit", "zeros", "moved", "doubled"];
    for (how, name) in (0..).zip(damage) {
        let mut bytes = vec![2, how];
        bytes.extend(noise(80 + u64::from(how), 200));
        seeds.push((name, bytes));
    }
    seeds
}

pub(super) fn roles_seeds() -> Seeds {
    // Shape of the world and schedule; the last with long quiet stretches.
    let shape = noise(1, 24);
    let quiet = [&shape[..], &[0, 57, 63].repeat(20)].concat();
    let interrupted = [
        &shape[..],
        &[0, 57, 40, 0, 63, 0, 1, 0, 1, 3, 0, 0, 1].repeat(12),
    ]
    .concat();
    vec![
        ("quiet", quiet),
        ("interrupted", interrupted),
        ("noise_1", noise(2, 200)),
        ("noise_2", noise(4, 800)),
    ]
}

pub(super) fn chunk_seeds() -> Seeds {
    let chunk = |codec: u8, raw_len: usize, item_len: u8, bytes: &[u8]| {
        let len = (raw_len as u16).to_le_bytes();
        [&[codec, len[0], len[1], item_len], bytes].concat()
    };
    let weights: Vec<u8> = (0..512u32)
        .flat_map(|i| ((i % 17) as f32 * 0.5).to_le_bytes())
        .collect();
    let lz4 = codec::encode_lz4(&weights).unwrap();
    let long_match = codec::encode_lz4(&[7; 4096]).unwrap();
    vec![
        ("zero", chunk(1, 4096, 4, &[])),
        ("lz4_weights", chunk(2, weights.len(), 4, &lz4)),
        ("lz4_long_match", chunk(2, 4096, 1, &long_match)),
        ("lz4_lying", chunk(2, 4097, 1, &long_match)),
        ("fill", chunk(3, 4096, 4, &[1, 2, 3, 4])),
        ("raw_constant", chunk(0, 9, 2, &[5, 6].repeat(100))),
    ]
}

fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut rng = Rng::new(seed);
    (0..len).map(|_| rng.next() as u8).collect()
}
