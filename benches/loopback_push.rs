//! 64 MiB from an `.npy` file through a server of this process into a new folder:
//! everything between two disks. In memory where there is a tmpfs.

#![allow(clippy::expect_used, reason = "a bench stops at the first failure")]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tensorferry::{Client, PushOptions, Server, format::npy, source::SourceSet};
use tokio::runtime::Runtime;

const SOURCE_LEN: u64 = 64 << 20;

/// A file of 64 MiB that no codec makes smaller.
fn write_source(dir: &Path) -> PathBuf {
    let mut bytes = npy::encode_header("<f4", false, &[SOURCE_LEN / 4]);
    let mut state = 1u64;
    while (bytes.len() as u64) < SOURCE_LEN + 128 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        bytes.extend_from_slice(&(state >> 32).to_le_bytes()[..4]);
    }
    let path = dir.join("weights.npy");
    std::fs::write(&path, bytes).expect("the source is written");
    path
}

/// A server on a free port, and its address.
fn start(runtime: &Runtime, root: &Path) -> String {
    runtime.block_on(async {
        let builder = Server::builder(root);
        let server = builder.bind(([127, 0, 0, 1], 0).into()).await;
        let server = server.expect("the server starts");
        let address = server.local_addr().to_string();
        tokio::spawn(server.serve(std::future::pending()));
        address
    })
}

fn loopback_push(c: &mut Criterion) {
    let memory = Path::new("/dev/shm");
    let temp = match memory.is_dir() {
        true => TempDir::new_in(memory),
        false => TempDir::new(),
    };
    let temp = temp.expect("a temporary folder");
    let root = temp.path().join("root");
    let path = write_source(temp.path());
    let source = SourceSet::open(&[path], &Default::default()).expect("the source opens");
    let source = Arc::new(source);
    let runtime = Runtime::new().expect("a runtime");
    let client = Client::new(&start(&runtime, &root)).expect("an address");

    let push = || {
        let name = "bench".parse().expect("a name");
        let start = Instant::now();
        let report = runtime.block_on(async {
            let options = PushOptions::default();
            client.push(Arc::clone(&source), &name, options).await
        });
        let elapsed = start.elapsed();
        assert_eq!(report.expect("it arrives").bytes, SOURCE_LEN);
        // Outside of the measured time.
        std::fs::remove_dir_all(root.join("bench")).expect("it was published");
        elapsed
    };
    let mut group = c.benchmark_group("loopback_push");
    group.throughput(Throughput::Bytes(SOURCE_LEN));
    group.bench_function("64_mib", |b| {
        b.iter_custom(|count| (0..count).map(|_| push()).sum())
    });
    group.finish();
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(200))
        .measurement_time(Duration::from_secs(3));
    targets = loopback_push
}
criterion_main!(benches);
