//! `export`: writes a checkpoint into one file of another format, or into shards.

use crate::{
    args::ExportArgs,
    entries,
    exit::Failure,
    interrupt::Interrupt,
    output::Output,
    progress::{Meter, Work},
    units,
};
use serde::Serialize;
use std::{
    ops::ControlFlow,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tensorferry::{
    Error, ErrorCode, ExportOptions, ExportReport, Progress, SourceSet, Stage, export_npz,
    export_safetensors,
};

const TICK: Duration = Duration::from_millis(200);

#[derive(Serialize)]
struct BeginEvent<'a> {
    destination: &'a str,
    tensors: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct DoneEvent<'a> {
    files: &'a [String],
    tensors: u64,
    bytes: u64,
    aliases: u64,
    seconds: f64,
}

/// What a file becomes, by its ending.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Container {
    Safetensors,
    Npz,
}

pub(crate) async fn run(args: ExportArgs, output: &Output) -> Result<(), Failure> {
    let container = container_of(&args.out)?;
    let mut options = ExportOptions::default();
    options.overwrite = args.overwrite;
    options.max_shard_bytes = args.max_shard;
    if let Some(remote) = args.src.iter().find(|src| src.starts_with("ferry://")) {
        let why = format!(
            "{}: export reads files and folders of this machine; run it where the checkpoint stands",
            remote.display()
        );
        return Err(Error::Usage(why).into());
    }
    let source = entries::open(args.src, args.select.options(false)).await?;
    entries::tell_skipped(&source, output);
    // From here on Ctrl-C tidies up.
    let mut interrupt = Interrupt::listen()?;
    let shown = args.out.display().to_string();
    let (tensors, _) = entries::counts(&source);
    let bytes = source.total_bytes();
    let destination = &shown;
    output.event(
        "begin",
        &BeginEvent {
            destination,
            tensors,
            bytes,
        },
    );
    let begun = Instant::now();
    let state = Arc::new(State::default());
    let job = (Arc::clone(&state), Arc::clone(&source), args.out);
    let mut ending = tokio::task::spawn_blocking(move || {
        let (state, source, out) = job;
        write(container, &source, &out, &options, &state)
    });
    let mut meter = Meter::new(output, bytes, Work::Export);
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    let result = loop {
        tokio::select! {
            result = &mut ending => break result,
            _ = ticks.tick() => meter.tick(&state.progress(bytes)),
            () = interrupt.first(), if !state.is_cancelled() => {
                state.cancel();
                meter.clear();
                output.talk("stopping: nothing is left behind (Ctrl-C again stops at once)");
            }
        }
    };
    meter.clear();
    let report = result
        .map_err(|e| Error::Bug(e.to_string()))?
        .map_err(failure)?;
    tell_done(&report, begun.elapsed(), output);
    Ok(())
}

/// Between the thread that writes and the one that shows and listens.
#[derive(Debug, Default)]
struct State {
    written_bytes: AtomicU64,
    is_cancelled: AtomicBool,
}

impl State {
    fn progress(&self, total_bytes: u64) -> Progress {
        let mut progress = Progress::default();
        progress.stage = Stage::Sending;
        progress.total_bytes = total_bytes;
        progress.settled_bytes = self.written_bytes.load(Ordering::Relaxed);
        progress
    }

    fn cancel(&self) {
        self.is_cancelled.store(true, Ordering::Relaxed);
    }

    fn is_cancelled(&self) -> bool {
        self.is_cancelled.load(Ordering::Relaxed)
    }

    fn add(&self, bytes: u64) -> ControlFlow<()> {
        self.written_bytes.fetch_add(bytes, Ordering::Relaxed);
        match self.is_cancelled() {
            true => ControlFlow::Break(()),
            false => ControlFlow::Continue(()),
        }
    }
}

fn write(
    container: Container,
    source: &SourceSet,
    out: &Path,
    options: &ExportOptions,
    state: &State,
) -> Result<ExportReport, Error> {
    let progress = |bytes| state.add(bytes);
    match container {
        Container::Safetensors => export_safetensors(source, out, options, progress),
        Container::Npz => export_npz(source, out, options, progress),
    }
}

fn container_of(out: &Path) -> Result<Container, Error> {
    match out.extension().and_then(|ending| ending.to_str()) {
        Some("safetensors") => Ok(Container::Safetensors),
        Some("npz") => Ok(Container::Npz),
        _ => Err(Error::Usage(format!(
            "{}: the name of the file must end in .safetensors or .npz",
            out.display()
        ))),
    }
}

/// The library's hints are about transfers.
fn failure(error: Error) -> Failure {
    let hint = match error.code() {
        ErrorCode::Exists => "choose another name, or replace it with --overwrite",
        ErrorCode::NoSpace => "free space there, or export to another disk",
        ErrorCode::Integrity => {
            "nothing was written: `tensorferry verify` names all that is damaged, and a push repairs it"
        }
        ErrorCode::SourceChanged => "run the same command again when nobody writes the source",
        _ => return error.into(),
    };
    Failure::with_hint(error, hint)
}

fn tell_done(report: &ExportReport, time: Duration, output: &Output) {
    let shown = |path: &PathBuf| path.display().to_string();
    let files: Vec<String> = report.files.iter().map(shown).collect();
    output.event(
        "done",
        &DoneEvent {
            files: &files,
            tensors: report.tensor_count,
            bytes: report.bytes,
            aliases: report.alias_count,
            seconds: time.as_secs_f64(),
        },
    );
    // The index names the shards.
    let place = files.last().map_or("", String::as_str);
    let shards = match files.len() {
        0 | 1 => String::new(),
        count => format!(" of {}", units::count(count as u64 - 1, "shard")),
    };
    output.human(&format!(
        "exported {}, {} to {}{shards} in {} ({})",
        units::count(report.tensor_count, "tensor"),
        units::bytes(report.bytes),
        units::shown(place),
        units::duration(time),
        units::rate(report.bytes, time)
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ending_says_what_a_file_becomes() {
        let of = |name: &str| container_of(Path::new(name));
        assert!(matches!(of("a/b.safetensors"), Ok(Container::Safetensors)));
        assert!(matches!(of("b.npz"), Ok(Container::Npz)));
        for bad in ["b", "b.npy", "b.safetensors.index.json", "b.NPZ", ".npz"] {
            assert!(matches!(of(bad), Err(Error::Usage(_))), "{bad}");
        }
    }
}
