//! Cells of 1 MiB into staging, and the group commit behind them: in the
//! temporary folder, and in memory where there is a tmpfs.

#![allow(clippy::expect_used, reason = "a bench stops at the first failure")]

use criterion::{
    BatchSize, BenchmarkGroup, Criterion, Throughput, criterion_group, criterion_main,
    measurement::WallTime,
};
use std::{path::Path, time::Duration};
use tempfile::TempDir;
use tensorferry::internals::StagedTensor;

const CELL_COUNT: u32 = 32;

/// A transfer in a folder of its own, which lives as long.
fn begin(parent: &Path) -> (StagedTensor, TempDir) {
    let root = TempDir::new_in(parent).expect("a temporary folder");
    (StagedTensor::begin(root.path(), CELL_COUNT), root)
}

fn bench_in(group: &mut BenchmarkGroup<'_, WallTime>, place: &str, parent: &Path) {
    group.throughput(Throughput::Bytes(u64::from(CELL_COUNT) << 20));
    // The folder is removed outside of the measured time: it is returned.
    group.bench_function(format!("write_{place}"), |b| {
        b.iter_batched(
            || begin(parent),
            |(mut tensor, root)| {
                tensor.write();
                (tensor, root)
            },
            BatchSize::PerIteration,
        )
    });
    group.bench_function(format!("commit_{place}"), |b| {
        b.iter_batched(
            || {
                let (mut tensor, root) = begin(parent);
                tensor.write();
                (tensor, root)
            },
            |(mut tensor, root)| {
                tensor.commit();
                (tensor, root)
            },
            BatchSize::PerIteration,
        )
    });
}

fn store_write(c: &mut Criterion) {
    let mut group = c.benchmark_group("store_write");
    bench_in(&mut group, "temp", &std::env::temp_dir());
    let memory = Path::new("/dev/shm");
    if memory.is_dir() {
        bench_in(&mut group, "memory", memory);
    }
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(2));
    targets = store_write
}
criterion_main!(benches);
