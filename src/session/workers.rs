//! Where the work runs: checksums and codecs on rayon's threads, file I/O on a
//! small pool of threads that may block.
//!
//! Jobs never wait for budget or channels, and for no lock but that of the files
//! they make or allocate, whose holder waits for the disk alone: so neither pool can
//! come to a standstill.

use rayon::{ThreadPool, ThreadPoolBuilder};
use std::sync::OnceLock;

/// I/O threads: enough to keep a disk busy, few enough not to thrash one.
const IO_THREADS: usize = 4;

static IO: Pool = Pool::new("io", Some(IO_THREADS));
/// A pool of its own and not rayon's global one: a job spawned there from an I/O thread
/// would stay on the I/O threads.
static CPU: Pool = Pool::new("cpu", None);

struct Pool {
    name: &'static str,
    /// `None`: as many as there are cores.
    thread_count: Option<usize>,
    pool: OnceLock<Option<ThreadPool>>,
}

impl Pool {
    const fn new(name: &'static str, thread_count: Option<usize>) -> Self {
        Pool {
            name,
            thread_count,
            pool: OnceLock::new(),
        }
    }

    fn spawn(&self, job: impl FnOnce() + Send + 'static) {
        let pool = self.pool.get_or_init(|| {
            let name = self.name;
            // A panic inside a job is caught at the job's edge; the handler only says
            // that rayon must not abort the process if one slips through.
            ThreadPoolBuilder::new()
                .num_threads(self.thread_count.unwrap_or(0))
                .thread_name(move |i| format!("ferry-{name}-{i}"))
                .panic_handler(|_| tracing::error!("a worker panicked"))
                .build()
                .ok()
        });
        match pool {
            Some(pool) => pool.spawn_fifo(job),
            // No threads to be had: slower, but it works.
            None => rayon::spawn(job),
        }
    }
}

/// Runs a job on a CPU worker.
pub(crate) fn on_cpu(job: impl FnOnce() + Send + 'static) {
    CPU.spawn(job);
}

/// Runs a job on an I/O thread.
pub(crate) fn on_io(job: impl FnOnce() + Send + 'static) {
    IO.spawn(job);
}
