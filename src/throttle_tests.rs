//! Every stage is made the slow one in turn, in a whole push, and is named as what
//! limited it.

use crate::{
    Client, CodecChoice, CommitMode, Lanes, PipelineStage, PushOptions, Server, Side, SourceSet,
    Stages,
    format::npy::encode_header,
    session::throttle::{self, Throttle},
};
use std::{path::Path, sync::Arc};

const SOURCE_BYTES: usize = 24 << 20;
/// What the slow stage does in a second, all its workers together: many times slower
/// than any other, on a machine that has other things to do too.
const STAGE_BYTES_PER_SECOND: u64 = 24 << 20;
/// Threads that read and write files.
const IO_WORKERS: u64 = 4;

/// Bytes that lz4 shortens a little, so that both ends have a codec to run.
fn write_source(dir: &Path) -> Arc<SourceSet> {
    std::fs::create_dir(dir).unwrap();
    let mut bytes = vec![0; SOURCE_BYTES];
    for (i, cell) in bytes.chunks_mut(1 << 16).enumerate() {
        let (noise, text) = cell.split_at_mut(1 << 15);
        let mut hasher = blake3::Hasher::new();
        hasher.update(&i.to_le_bytes());
        hasher.finalize_xof().fill(noise);
        text.fill(i as u8);
    }
    let header = encode_header("|u1", false, &[SOURCE_BYTES as u64]);
    std::fs::write(dir.join("w.npy"), [header, bytes].concat()).unwrap();
    Arc::new(SourceSet::open(&[dir.to_owned()], &Default::default()).unwrap())
}

/// Pushes with one slow stage over as many lanes. `workers` share the stage.
fn push(side: Side, stage: PipelineStage, workers: u64, lanes: u32, mode: CommitMode) -> Stages {
    let name = format!("{}.{}.{lanes}.{mode:?}", side.as_str(), stage.as_str());
    let name = name.parse().unwrap();
    let bytes_per_second = STAGE_BYTES_PER_SECOND / workers;
    throttle::set(
        &name,
        Throttle {
            side,
            stage,
            bytes_per_second,
        },
    );
    let mut options = PushOptions::default();
    (options.lanes, options.codec, options.commit_mode) =
        (Lanes::Fixed(lanes), CodecChoice::Lz4, mode);
    let temp = tempfile::tempdir().unwrap();
    let source = write_source(&temp.path().join("source"));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    let report = runtime.unwrap().block_on(async {
        let server = Server::builder(temp.path().join("root"));
        let server = server.bind(([127, 0, 0, 1], 0).into()).await.unwrap();
        let client = Client::new(&server.local_addr().to_string()).unwrap();
        tokio::spawn(server.serve(std::future::pending()));
        client.push(source, &name, options).await.unwrap()
    });
    assert_eq!(report.bytes, SOURCE_BYTES as u64);
    report.stages
}

/// The slow stage is the one that is named, over one lane and over three.
fn assert_named(side: Side, stage: PipelineStage, workers: impl Fn(u32) -> u64) {
    for lanes in [1, 3] {
        let stages = push(side, stage, workers(lanes), lanes, CommitMode::Group);
        let named = stages.bottleneck().map(|row| (row.side, row.stage));
        assert_eq!(named, Some((side, stage)), "{lanes} lanes: {stages:#?}");
        assert_eq!(stages.lanes, lanes);
    }
}

fn cpu_workers() -> u64 {
    std::thread::available_parallelism().map_or(1, |n| n.get() as u64)
}

#[test]
fn a_slow_source_is_named() {
    assert_named(Side::Sender, PipelineStage::Read, |_| IO_WORKERS);
}

#[test]
fn slow_checksums_on_the_sender_are_named() {
    assert_named(Side::Sender, PipelineStage::Checksum, |_| cpu_workers());
}

#[test]
fn slow_compression_is_named() {
    assert_named(Side::Sender, PipelineStage::Codec, |_| cpu_workers());
}

#[test]
fn slow_lanes_are_named() {
    assert_named(Side::Sender, PipelineStage::Send, u64::from);
}

#[test]
fn a_receiver_that_is_slow_to_take_in_is_named() {
    assert_named(Side::Receiver, PipelineStage::Receive, u64::from);
}

#[test]
fn slow_checksums_on_the_receiver_are_named() {
    assert_named(Side::Receiver, PipelineStage::Checksum, |_| cpu_workers());
}

#[test]
fn slow_decompression_is_named() {
    assert_named(Side::Receiver, PipelineStage::Codec, |_| cpu_workers());
}

#[test]
fn slow_writes_are_named() {
    assert_named(Side::Receiver, PipelineStage::Place, |_| IO_WORKERS);
}

#[test]
fn slow_syncs_are_named() {
    assert_named(Side::Receiver, PipelineStage::Sync, |_| 1);
}

#[test]
fn syncs_that_withhold_acks_are_named_and_block_the_writes() {
    let (side, stage) = (Side::Receiver, PipelineStage::Sync);
    let stages = push(side, stage, 1, 2, CommitMode::Strict);
    let named = stages.bottleneck().map(|row| (row.side, row.stage));
    assert_eq!(named, Some((side, stage)), "{stages:#?}");
    assert!(
        !stages.receiver.unwrap().place.blocked.is_zero(),
        "{stages:#?}"
    );
}
