//! Encoding and decoding of one cell of 1 MiB. Throughput is that of raw bytes.

#![allow(clippy::expect_used, reason = "a bench stops at the first failure")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{hint::black_box, time::Duration};
use tensorferry::format::codec::{Codec, constant_element, decode_into, encode_lz4};

const CELL_LEN: usize = 1 << 20;

/// Floats with few distinct values and runs of zeros, as pruned weights have.
fn compressible() -> Vec<u8> {
    let value = |i: u32| match i / 64 % 3 {
        0 => 0.0,
        _ => (i.wrapping_mul(2_654_435_761) >> 28) as f32 * 0.125,
    };
    (0..CELL_LEN as u32 / 4)
        .flat_map(|i| f32::to_le_bytes(value(i)))
        .collect()
}

/// Bytes that no codec makes smaller.
fn noise() -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    };
    (0..CELL_LEN).map(|_| next()).collect()
}

fn chunk(c: &mut Criterion) {
    let (floats, noise) = (compressible(), noise());
    let zeros = vec![0; CELL_LEN];
    let filled = 1.5f32.to_le_bytes().repeat(CELL_LEN / 4);
    let mut group = c.benchmark_group("chunk");
    group.throughput(Throughput::Bytes(CELL_LEN as u64));

    for (name, raw) in [("encode_lz4_f32", &floats), ("encode_lz4_noise", &noise)] {
        group.bench_function(name, |b| b.iter(|| encode_lz4(black_box(raw))));
    }
    for (name, raw) in [
        ("is_constant_zeros", &zeros),
        ("is_constant_fill", &filled),
        ("is_constant_f32", &floats),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| constant_element(black_box(raw), 4).is_some())
        });
    }
    let lz4 = encode_lz4(&floats).expect("these floats become smaller");
    let mut raw = vec![0; CELL_LEN];
    for (name, codec, encoded) in [
        ("decode_none", Codec::None, &noise[..]),
        ("decode_lz4_f32", Codec::Lz4, &lz4),
        ("decode_zero", Codec::Zero, &[]),
        ("decode_fill", Codec::Fill, &filled[..4]),
    ] {
        group.bench_function(name, |b| {
            b.iter(|| decode_into(codec, black_box(encoded), &mut raw).expect("it decodes"))
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
    targets = chunk
}
criterion_main!(benches);
