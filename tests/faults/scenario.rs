//! What every scenario gets, and what it says in the end.

use crate::track::Tally;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

/// Choices of the caller.
pub(crate) struct Setting {
    pub(crate) runtime: Runtime,
    pub(crate) binary: PathBuf,
    pub(crate) workdir: PathBuf,
    pub(crate) seed: u64,
    /// Faults of each scenario; the scenario's own short number when absent.
    pub(crate) points: Option<u64>,
}

impl Setting {
    pub(crate) fn points(&self, short: u64) -> u64 {
        self.points.unwrap_or(short)
    }

    /// An empty folder for a scenario.
    pub(crate) fn folder(&self, title: &str) -> PathBuf {
        let folder = self.workdir.join(title.replace(' ', "-"));
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("the work folder can be made");
        folder
    }
}

/// What a scenario did.
#[derive(Default)]
pub(crate) struct Report {
    pub(crate) title: String,
    pub(crate) tally: Tally,
    /// In words, what the tally has no field for.
    pub(crate) remarks: Vec<String>,
    pub(crate) failures: Vec<String>,
    pub(crate) skipped: Option<String>,
    pub(crate) seconds: f64,
}

impl Report {
    pub(crate) fn new(title: impl Into<String>) -> Self {
        Report {
            title: title.into(),
            ..Report::default()
        }
    }

    pub(crate) fn skipped(title: impl Into<String>, why: &str) -> Self {
        Report {
            skipped: Some(why.to_owned()),
            ..Report::new(title)
        }
    }

    /// Takes a result; a failure is kept with the words that repeat it.
    pub(crate) fn take(&mut self, again: &str, tally: &Tally, failures: Vec<String>) {
        self.tally.add(tally);
        for failure in failures {
            let told = format!("{failure} [repeat: {again}]");
            println!("  FAILED: {told}");
            self.failures.push(told);
        }
    }

    pub(crate) fn check(&mut self, again: &str, result: Result<(), String>) {
        let failures = result.err().into_iter().collect();
        self.take(again, &Tally::default(), failures);
    }

    /// One line for a person.
    pub(crate) fn print(&self) {
        let t = &self.tally;
        if let Some(why) = &self.skipped {
            println!("not run: {} ({why})", self.title);
            return;
        }
        let mut line = format!(
            "{}: {} points, {} sessions, {} acked cells ({} bytes) and {} claimed cells read back, \
             {} whole after Done, {} while publishing, lost {}, wrong {}, most re-sent {} bytes, {:.0} s",
            self.title,
            t.points,
            t.sessions,
            t.acked_cells,
            t.acked_bytes,
            t.claimed_cells,
            t.dones,
            t.in_publish,
            t.lost,
            t.wrong,
            t.most_resent,
            self.seconds
        );
        for remark in &self.remarks {
            line.push_str("; ");
            line.push_str(remark);
        }
        println!(
            "{line}: {}",
            if self.failures.is_empty() {
                "ok"
            } else {
                "FAILED"
            }
        );
    }
}

/// Columns of [`Report::row`].
pub(crate) const TABLE_HEAD: &str = "\
| scenario | seed | points | sessions | acked cells read back | bytes of them | claimed cells read back \
| whole after Done | lost | wrong | most bytes re-sent | failures | seconds | remarks |
|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|---|
";

impl Report {
    /// One row of Markdown.
    pub(crate) fn row(&self, seed: u64) -> String {
        let t = &self.tally;
        let remarks = match &self.skipped {
            Some(why) => format!("not run: {why}"),
            None => self.remarks.join("; "),
        };
        format!(
            "| {} | {seed} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {} | {:.0} | {remarks} |\n",
            self.title,
            t.points,
            t.sessions,
            t.acked_cells,
            t.acked_bytes,
            t.claimed_cells,
            t.dones,
            t.lost,
            t.wrong,
            t.most_resent,
            self.failures.len(),
            self.seconds,
        )
    }
}

/// Waits for something that should come soon.
pub(crate) fn soon(limit: Duration, mut holds: impl FnMut() -> bool) -> bool {
    let until = Instant::now() + limit;
    while Instant::now() < until {
        if holds() {
            return true;
        }
        std::thread::sleep(Duration::from_millis(3));
    }
    holds()
}

/// Whether this process may mount.
pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
