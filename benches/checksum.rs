//! CRC-32C of one cell, whole and as the slices in which it comes.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{hint::black_box, time::Duration};
use tensorferry::format::checksum::{combine, crc32c, crc32c_of_parts};

const CELL_LEN: usize = 1 << 20;

fn checksum(c: &mut Criterion) {
    let cell: Vec<u8> = (0..CELL_LEN).map(|i| ((i * 7919) >> 3) as u8).collect();
    let mut group = c.benchmark_group("checksum");
    group.throughput(Throughput::Bytes(CELL_LEN as u64));
    group.bench_function("crc32c_1_mib", |b| b.iter(|| crc32c(black_box(&cell))));
    for (name, part_len) in [("parts_of_16_kib", 16 << 10), ("parts_of_64_kib", 64 << 10)] {
        group.bench_function(name, |b| {
            b.iter(|| crc32c_of_parts(black_box(&cell).chunks(part_len)))
        });
    }
    // What it takes to make the sum of a tensor of 1,024 cells.
    group.throughput(Throughput::Bytes(1024 * CELL_LEN as u64));
    group.bench_function("combine_1024_cells", |b| {
        b.iter(|| (0..1024).fold(0, |crc, i| combine(crc, black_box(i), CELL_LEN as u64)))
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(20)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    targets = checksum
}
criterion_main!(benches);
