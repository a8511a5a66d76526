//! The parser of the stream, fed as HTTP/2 brings it: DATA frames of 64 KiB.
//! Payload is sliced, not copied, so the figures are far above memory speed.

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{hint::black_box, time::Duration};
use tensorferry::internals::{chunk_message, parse};

const PIECE_LEN: usize = 64 << 10;
const MAX_MESSAGE_BYTES: usize = 2 << 20;

fn wire(c: &mut Criterion) {
    let mut group = c.benchmark_group("wire");
    for (name, chunk_lens) in [
        ("parse_1_chunk_of_1_mib", vec![1 << 20]),
        ("parse_512_chunks_of_2_kib", vec![2 << 10; 512]),
    ] {
        // Eight messages, so that pieces and messages do not end together.
        let stream = Bytes::from(chunk_message(&chunk_lens).repeat(8));
        let piece = |at: usize| stream.slice(at..stream.len().min(at + PIECE_LEN));
        let pieces: Vec<Bytes> = (0..stream.len()).step_by(PIECE_LEN).map(piece).collect();
        let expected = (chunk_lens.len() * 8, 8 << 20);
        assert_eq!(parse(&pieces, MAX_MESSAGE_BYTES), expected);
        group.throughput(Throughput::Bytes(stream.len() as u64));
        group.bench_function(name, |b| {
            b.iter(|| parse(black_box(&pieces), MAX_MESSAGE_BYTES))
        });
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = wire
}
criterion_main!(benches);
