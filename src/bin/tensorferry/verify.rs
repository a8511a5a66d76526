//! `verify`: reads landed checkpoints again and compares every byte.

use crate::{args::VerifyArgs, exit::Failure, output::Output, progress, units};
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

pub(crate) async fn run(args: VerifyArgs, output: &Output) -> Result<(), Failure> {
    let mut first_damage = None;
    for dir in args.dirs {
        let shown = dir.display().to_string();
        let (report, time) = verify(dir, output).await?;
        tell(&shown, &report, time, output);
        if !report.damages.is_empty() && first_damage.is_none() {
            let why = format!(
                "{} of {} files are not what the manifest says",
                report.damages.len(),
                report.file_count
            );
            first_damage = Some(Error::Damaged { name: shown, why });
        }
    }
    match first_damage {
        None => Ok(()),
        Some(error) => Err(Failure::with_hint(
            error,
            "push it again into another name or with --overwrite, and check the disk",
        )),
    }
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
            "damaged: {} in {dir}: {}",
            units::shown(&damage.name),
            units::shown(&damage.why)
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
