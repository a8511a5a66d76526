//! `.npy` headers: each file of a checkpoint has one.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{hint::black_box, time::Duration};
use tensorferry::format::npy::{encode_header, parse_header};

fn npy_header(c: &mut Criterion) {
    let shape = [4096, 14_336];
    let bytes = encode_header("<f4", false, &shape);
    let mut group = c.benchmark_group("npy_header");
    group.throughput(Throughput::Bytes(bytes.len() as u64));
    group.bench_function("write", |b| {
        b.iter(|| encode_header(black_box("<f4"), false, black_box(&shape)))
    });
    group.bench_function("parse", |b| b.iter(|| parse_header(black_box(&bytes))));
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = npy_header
}
criterion_main!(benches);
