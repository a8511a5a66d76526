//! A hostile client sends chunks that are not what they claim to be.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::*;
use tensorferry::{format::checksum::crc32c, wire::pb};
use tonic::Code;

/// A session whose entries are announced and answered.
async fn begin(server: &TestServer, load: &Load) -> Session {
    let mut session = server.open(load.open("victim", [1; 16])).await;
    session.announce(load).await;
    session
}

/// Two cells and a bit of floats, and a side file.
fn load() -> Load {
    Load::of(vec![
        floats("w", noise("w", 2 * CHUNK + 400)),
        blob("config.json", &noise("c", 300)),
    ])
}

#[tokio::test]
async fn h6_chunks_off_the_grid_or_outside_their_entry_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let raw = load.cell(0, 0);
    let good = head(0, 0, raw);
    let chunk = CHUNK as u64;
    for (bad, len) in [
        (pb::ChunkHead { offset: 1, ..good }, CHUNK),
        (
            pb::ChunkHead {
                offset: chunk / 2,
                ..good
            },
            CHUNK,
        ),
        (
            pb::ChunkHead {
                offset: 3 * chunk,
                ..good
            },
            CHUNK,
        ),
        (
            pb::ChunkHead {
                offset: u64::MAX,
                ..good
            },
            CHUNK,
        ),
        (
            pb::ChunkHead {
                offset: u64::MAX - chunk + 1,
                ..good
            },
            CHUNK,
        ),
        // Runs past the end of the entry.
        (
            pb::ChunkHead {
                offset: 2 * chunk,
                ..good
            },
            CHUNK,
        ),
        (pb::ChunkHead { entry: 1, ..good }, CHUNK),
        (
            pb::ChunkHead {
                raw_len: 100,
                encoded_len: 100,
                ..good
            },
            100,
        ),
        (
            pb::ChunkHead {
                raw_len: u32::MAX,
                ..good
            },
            CHUNK,
        ),
        (
            pb::ChunkHead {
                raw_len: 0,
                encoded_len: 0,
                ..good
            },
            0,
        ),
    ] {
        let mut session = begin(&server, &load).await;
        let ending = session.refused(frame_chunk(bad, &raw[..len])).await;
        assert_eq!(ending, refused(Code::OutOfRange, "BAD_RANGE"), "{bad:?}");
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h6_chunks_of_unknown_or_unanswered_entries_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let expected = refused(Code::InvalidArgument, "BAD_FRAME");
    for entry in [2, u32::MAX] {
        let mut session = begin(&server, &load).await;
        let raw = load.cell(0, 0);
        assert_eq!(
            session.refused(frame_chunk(head(entry, 0, raw), raw)).await,
            expected
        );
    }
    // The answer cannot be out yet when entry and chunk share a frame.
    let mut session = server.open(load.open("victim", [1; 16])).await;
    let frame = pb::SenderFrame {
        entries: load.announcement().entries,
        ..load.chunk(0, 0)
    };
    assert_eq!(session.refused(frame).await, expected);
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h6_a_second_chunk_of_a_written_cell_is_acked_and_ignored() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let mut session = begin(&server, &load).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    // The same again, then other bytes with a checksum that fits them.
    session.send(load.chunk(0, 0)).await;
    let other = noise("other", CHUNK);
    session.send(frame_chunk(head(0, 0, &other), &other)).await;
    // And twice in one frame.
    let (mut twice, second) = (load.chunk(1, 0), load.chunk(1, 0));
    twice.chunks.extend(second.chunks);
    twice.payload = [twice.payload, second.payload].concat().into();
    session.send(twice).await;
    session.settle().await;
    assert!(session.rejects.is_empty());
    session.send(load.chunk(0, 1)).await;
    session.send(load.chunk(0, 2)).await;
    session.settle().await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
    server.serves_others().await;
}

#[tokio::test]
async fn h7_a_damaged_chunk_is_rejected_counted_and_may_be_sent_again() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let mut session = begin(&server, &load).await;
    let mut damaged = load.cell(0, 1).to_vec();
    damaged[7] ^= 1;
    session
        .send(frame_chunk(head(0, 1, load.cell(0, 1)), &damaged))
        .await;
    session.settle().await;
    let expected = pb::Reject {
        entry: 0,
        offset: CHUNK as u64,
        expected_crc32c: crc32c(load.cell(0, 1)),
        found_crc32c: crc32c(&damaged),
    };
    assert_eq!(session.rejects, [expected]);
    let ending = session.refused(frame_finish(load.finish())).await;
    assert_eq!(
        ending,
        refused(Code::FailedPrecondition, "MANIFEST_MISMATCH")
    );
    let mut session = begin(&server, &load).await;
    assert_eq!(
        session.wanted[&0].len(),
        3,
        "the damaged cell is not among the durable ones"
    );
    session
        .send(frame_chunk(head(0, 1, load.cell(0, 1)), &damaged))
        .await;
    session.send_wanted(&load).await;
    assert_eq!(session.rejects.len(), 1);
    session.finish(&load).await;
    server.assert_landed("victim", &load);
    server.serves_others().await;
}

#[tokio::test]
async fn h7_seventeen_damaged_chunks_in_a_row_end_the_session() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let bad = || {
        frame_chunk(
            pb::ChunkHead {
                crc32c: 1,
                ..head(0, 1, load.cell(0, 1))
            },
            load.cell(0, 1),
        )
    };
    let mut session = begin(&server, &load).await;
    for _ in 0..16 {
        session.send(bad()).await;
    }
    session.settle().await;
    // A good one in between starts the count again.
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    for _ in 0..16 {
        session.send(bad()).await;
    }
    session.settle().await;
    assert_eq!(session.rejects.len(), 32);
    assert_eq!(
        session.refused(bad()).await,
        refused(Code::DataLoss, "CHECKSUM")
    );
    assert_eq!(session.rejects.len(), 33, "the last one is told too");
    server.assert_unpublished("victim").await;
    // What was good stays.
    let mut session = begin(&server, &load).await;
    assert_eq!(session.wanted[&0], [1, 2].into());
    session.send_wanted(&load).await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h8_codecs_that_were_not_agreed_on_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let good = head(0, 0, load.cell(0, 0));
    let expected = refused(Code::InvalidArgument, "BAD_COMPRESSION");
    for codec in [1, 2, 3, 4, 5, 31, 32, u32::MAX] {
        let mut session = server
            .open(pb::SenderOpen {
                codecs: 1,
                ..load.open("victim", [1; 16])
            })
            .await;
        assert_eq!(session.accept.as_ref().unwrap().codecs, 1);
        session.announce(&load).await;
        let encoded_len = if codec == 1 { 0 } else { 4 };
        let bad = pb::ChunkHead {
            codec,
            encoded_len,
            ..good
        };
        let ending = session
            .refused(frame_chunk(bad, &[1; 4][..encoded_len as usize]))
            .await;
        assert_eq!(ending, expected, "codec {codec}");
    }
    // Ids that nobody knows cannot be agreed on.
    let mut session = server
        .open(pb::SenderOpen {
            codecs: u32::MAX,
            ..load.open("victim", [1; 16])
        })
        .await;
    assert_eq!(session.accept.as_ref().unwrap().codecs, ALL_CODECS);
    session.announce(&load).await;
    let bad = pb::ChunkHead {
        codec: 2,
        encoded_len: 0,
        ..good
    };
    assert_eq!(session.refused(frame_chunk(bad, &[])).await, expected);
    // Raw chunks are the one codec that everybody has.
    let open = pb::SenderOpen {
        codecs: ALL_CODECS & !1,
        ..load.open("victim", [1; 16])
    };
    assert_eq!(server.refusal(open).await, expected);
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_lengths_that_lie_are_refused_before_anything_is_decoded() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let good = head(0, 0, load.cell(0, 0));
    for (codec, encoded_len) in [
        (0, CHUNK - 1),
        (0, CHUNK + 1),
        (0, 0),
        (1, 1),
        (3, 0),
        (3, CHUNK),
        (3, CHUNK + 1),
        (4, 0),
        // One element of float32 is 4 bytes.
        (4, 1),
        (4, 8),
        (4, 17),
    ] {
        let mut session = begin(&server, &load).await;
        let bad = pb::ChunkHead {
            codec,
            encoded_len: encoded_len as u32,
            ..good
        };
        let ending = session
            .refused(frame_chunk(bad, &vec![7; encoded_len]))
            .await;
        assert_eq!(
            ending,
            refused(Code::InvalidArgument, "BAD_COMPRESSION"),
            "codec {codec}, {encoded_len} bytes"
        );
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_blocks_that_decode_to_something_else_are_refused() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let good = head(0, 0, load.cell(0, 0));
    let mut cut = lz4_flex::block::compress(&[7; CHUNK]);
    cut.truncate(cut.len() / 2);
    for block in [
        lz4_flex::block::compress(&[7; CHUNK - 1]),
        lz4_flex::block::compress(&[7; CHUNK + 1]),
        // A bomb: asks for a thousand times the cell.
        lz4_flex::block::compress(&vec![0; 200 * CHUNK]),
        lz4_flex::block::compress(&[]),
        noise("garbage", 1000),
        vec![0xff; 1000],
        cut,
    ] {
        let mut session = begin(&server, &load).await;
        let bad = pb::ChunkHead {
            codec: 3,
            encoded_len: block.len() as u32,
            ..good
        };
        let ending = session.refused(frame_chunk(bad, &block)).await;
        assert_eq!(
            ending,
            refused(Code::InvalidArgument, "BAD_COMPRESSION"),
            "{} bytes",
            block.len()
        );
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_a_payload_is_exactly_its_chunks() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let expected = refused(Code::InvalidArgument, "BAD_FRAME");
    let raw = load.cell(0, 0);
    let longer = [raw, b"x"].concat();
    let mut overflowing = frame_chunk(head(0, 0, raw), raw);
    overflowing.chunks.extend(
        [pb::ChunkHead {
            encoded_len: u32::MAX,
            ..head(0, 1, raw)
        }; 3],
    );
    for frame in [
        frame_chunk(head(0, 0, raw), &raw[1..]),
        frame_chunk(head(0, 0, raw), &longer),
        frame_chunk(head(0, 0, raw), &[]),
        overflowing,
        // Bytes that belong to nothing.
        pb::SenderFrame {
            payload: vec![1].into(),
            ..Default::default()
        },
        pb::SenderFrame {
            payload: vec![1].into(),
            ..frame_finish(load.finish())
        },
    ] {
        let mut session = begin(&server, &load).await;
        assert_eq!(session.refused(frame).await, expected);
    }
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn h8_agreed_codecs_land_the_raw_bytes() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let mut bytes = vec![0; CHUNK];
    bytes.extend([0, 0, 0x80, 0x3f].repeat(CHUNK / 4));
    let text = b"the quick brown fox ".repeat(CHUNK / 20 + 1);
    bytes.extend(&text[..CHUNK]);
    bytes.extend(noise("raw", 400));
    let load = Load::of(vec![floats("w", bytes)]);
    let mut session = begin(&server, &load).await;
    assert_eq!(session.accept.as_ref().unwrap().codecs, ALL_CODECS);
    let block = lz4_flex::block::compress(load.cell(0, 2));
    // All four in one frame.
    let (cells, payload): (Vec<_>, Vec<&[u8]>) = [
        (1, &[][..]),
        (4, &load.cell(0, 1)[..4]),
        (3, &block),
        (0, load.cell(0, 3)),
    ]
    .into_iter()
    .unzip();
    let chunks = (0..)
        .zip(cells.iter().zip(&payload))
        .map(|(cell, (&codec, encoded))| pb::ChunkHead {
            codec,
            encoded_len: encoded.len() as u32,
            ..head(0, cell, load.cell(0, cell))
        });
    session
        .send(pb::SenderFrame {
            chunks: chunks.collect(),
            payload: payload.concat().into(),
            ..Default::default()
        })
        .await;
    session.settle().await;
    assert!(session.rejects.is_empty());
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h8_a_wrong_checksum_shows_under_every_codec() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![floats("w", vec![0; CHUNK])]);
    let mut session = begin(&server, &load).await;
    let block = lz4_flex::block::compress(&[1; CHUNK]);
    for (codec, payload) in [(4, &[0, 0, 0x80, 0x3f][..]), (3, &block)] {
        let bad = pb::ChunkHead {
            codec,
            encoded_len: payload.len() as u32,
            ..head(0, 0, load.cell(0, 0))
        };
        session.send(frame_chunk(bad, payload)).await;
    }
    session.settle().await;
    assert_eq!(session.rejects.len(), 2);
    session.send_wanted(&load).await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h8_a_short_frame_cannot_claim_more_memory_than_the_window() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::with_budget(temp.path(), 8 << 20).await;
    // 32 MiB of zeros in 32 heads without a payload byte.
    let load = Load::of(vec![floats("zeros", vec![0; 32 << 20])]);
    let mut session = begin(&server, &load).await;
    let window = session.accept.as_ref().unwrap().window_bytes;
    assert!(window <= 4 << 20);
    let zeros = |cells: std::ops::Range<u64>| pb::SenderFrame {
        chunks: cells
            .map(|cell| pb::ChunkHead {
                codec: 1,
                encoded_len: 0,
                ..head(0, cell, &[0; CHUNK])
            })
            .collect(),
        ..Default::default()
    };
    let count = load.total_bytes() / CHUNK as u64;
    assert_eq!(
        session.refused(zeros(0..count)).await,
        refused(Code::ResourceExhausted, "TOO_LARGE")
    );
    server.assert_unpublished("victim").await;
    // Within the window it works, however many frames there are.
    let mut session = begin(&server, &load).await;
    for first in (0..count).step_by((window / CHUNK as u64) as usize) {
        session
            .send(zeros(first..(first + window / CHUNK as u64).min(count)))
            .await;
    }
    session.settle().await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}
