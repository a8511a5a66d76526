//! Where the work runs: checksums and codecs on rayon's threads, file I/O on a
//! small pool of threads that may block.
//!
//! Jobs never wait for budget or channels, and for no lock but that of the files
//! they make or allocate, whose holder waits for the disk alone: so neither pool can
//! come to a standstill.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::{LazyLock, OnceLock};

/// I/O threads: enough to keep a disk busy, few enough not to thrash one.
const IO_THREADS: usize = 4;

static IO: OnceLock<Option<ThreadPool>> = OnceLock::new();
static CPU_IS_UP: LazyLock<()> = LazyLock::new(|| {
    // A panic inside a job is caught at the job's edge; this only says that
    // rayon must not abort the process if one slips through.
    let _ = ThreadPoolBuilder::new()
        .thread_name(|i| format!("ferry-cpu-{i}"))
        .panic_handler(|_| tracing::error!("a worker panicked"))
        .build_global();
});

/// Runs a job on a CPU worker.
pub(crate) fn on_cpu(job: impl FnOnce() + Send + 'static) {
    LazyLock::force(&CPU_IS_UP);
    rayon::spawn(job);
}

/// Runs a job on an I/O thread.
pub(crate) fn on_io(job: impl FnOnce() + Send + 'static) {
    let pool = IO.get_or_init(|| {
        ThreadPoolBuilder::new()
            .num_threads(IO_THREADS)
            .thread_name(|i| format!("ferry-io-{i}"))
            .panic_handler(|_| tracing::error!("an I/O worker panicked"))
            .build()
            .ok()
    });
    match pool {
        Some(pool) => pool.spawn_fifo(job),
        // No threads to be had: slower, but it works.
        None => on_cpu(job),
    }
}
