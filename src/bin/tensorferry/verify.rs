//! `verify`: reads landed checkpoints again and compares every byte.

use crate::{
    args::VerifyArgs,
    exit::{self, Failure},
    output::Output,
    progress, units,
};
use serde::Serialize;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};
use tensorferry::{Checkpoint, Error, VerifyReport};

#[derive(Serialize)]
struct DamagedEvent<'a> {
    dir: &'a str,
    name: &'a str,
    file: &'a str,
    why: &'a str,
}

#[derive(Serialize)]
struct VerifiedEvent<'a> {
    dir: &'a str,
    files: u64,
    bytes: u64,
    damaged: u64,
    seconds: f64,
}

#[derive(Serialize)]
struct UnverifiedEvent<'a> {
    dir: &'a str,
    code: &'a str,
    exit: u8,
    message: String,
}

/// Looks at every folder, whatever is the matter with those before; the first
/// failure decides the exit status.
pub(crate) async fn run(args: VerifyArgs, output: &Output) -> Result<(), Failure> {
    let mut first = None;
    for dir in args.dirs {
        let shown = dir.display().to_string();
        let mut failure = match verify(dir, output).await {
            Ok((report, time)) => {
                tell(&shown, &report, time, output);
                if report.damages.is_empty() {
                    continue;
                }
                damaged(shown, &report)
            }
            Err(failure) => {
                let (code, message) = (failure.code(), failure.message());
                let event = UnverifiedEvent {
                    dir: &shown,
                    code: exit::word(code),
                    exit: code.exit_code(),
                    message,
                };
                output.event("unverified", &event);
                failure
            }
        };
        failure.tell(output);
        first.get_or_insert(failure);
    }
    first.map_or(Ok(()), Err)
}

fn damaged(dir: String, report: &VerifyReport) -> Failure {
    let why = format!(
        "{} of {} files are not what the manifest says",
        report.damages.len(),
        report.file_count
    );
    Failure::with_hint(
        Error::Damaged { name: dir, why },
        "push it again into another name or with --overwrite, and check the disk",
    )
}

async fn verify(dir: PathBuf, output: &Output) -> Result<(VerifyReport, Duration), Failure> {
    let begun = Instant::now();
    let opened = tokio::task::spawn_blocking(move || Checkpoint::open(&dir)).await;
    let checkpoint = opened.map_err(|e| Error::Bug(e.to_string()))??;
    let bar = progress::byte_bar(output, checkpoint.total_bytes());
    let counter = bar.clone();
    let verified =
        tokio::task::spawn_blocking(move || checkpoint.verify(|bytes| counter.inc(bytes))).await;
    bar.finish_and_clear();
    let report = verified.map_err(|e| Error::Bug(e.to_string()))??;
    Ok((report, begun.elapsed()))
}

fn tell(dir: &str, report: &VerifyReport, time: Duration, output: &Output) {
    for damage in &report.damages {
        output.event(
            "damaged",
            &DamagedEvent {
                dir,
                name: &damage.name,
                file: &damage.file,
                why: &damage.why,
            },
        );
        let line = format!(
            "damaged: {} in {}: {}",
            units::brief(&damage.name),
            units::shown(dir),
            units::brief(&damage.why)
        );
        output.human(&line);
    }
    output.event(
        "verified",
        &VerifiedEvent {
            dir,
            files: report.file_count,
            bytes: report.byte_count,
            damaged: report.damages.len() as u64,
            seconds: time.as_secs_f64(),
        },
    );
    if report.damages.is_empty() {
        output.human(&format!(
            "{}: {}, {}, all as written ({})",
            units::shown(dir),
            units::count(report.file_count, "file"),
            units::bytes(report.byte_count),
            units::rate(report.byte_count, time)
        ));
    }
}
