//! `push`: sends a checkpoint to a server or into a local folder.

use crate::{
    args::{PushArgs, TransferArgs},
    entries,
    exit::{Failure, Left},
    interrupt::Interrupt,
    output::Output,
    progress::{Meter, Work},
    stages::{self, StageFigures},
    target::{self, Target},
    units,
};
use serde::Serialize;
use std::{collections::BTreeMap, future::IntoFuture, sync::Arc, time::Duration};
use tensorferry::{
    CheckpointStatus, Client, Embedded, Error, ErrorCode, Progress, PushOptions, Transfer,
    TransferReport,
    protocol::{Durability, Reason},
    source::SourceSet,
    status_folder,
};

const TICK: Duration = Duration::from_millis(200);
/// How long a dry run waits for a server.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

#[derive(Serialize)]
struct BeginEvent<'a> {
    destination: &'a str,
    tensors: u64,
    files: u64,
    bytes: u64,
}

#[derive(Serialize)]
struct LeftEvent {
    left_bytes: u64,
    /// `None` where the receiver did not say.
    durable_bytes: Option<u64>,
    published: bool,
    /// What stands there is of this source, with these options.
    unchanged: bool,
}

#[derive(Serialize)]
struct DoneEvent<'a> {
    checkpoint: &'a str,
    tensors: u64,
    files: u64,
    bytes: u64,
    wire_bytes: u64,
    resumed_bytes: u64,
    seconds: f64,
    durability: &'a str,
    unchanged: bool,
    sessions: u32,
    codec: Option<&'a str>,
    lanes: u32,
    bottleneck: Option<&'a str>,
    bottleneck_side: Option<&'a str>,
    stages: BTreeMap<&'a str, StageFigures>,
}

pub(crate) async fn run(args: PushArgs, output: &Output) -> Result<(), Failure> {
    let mut options = transfer_options(&args.transfer);
    options.read_mode = args.read.into();
    let target = Target::parse(&args.dest)?;
    if let Target::Server { authority, name } = &target {
        // A wrong destination shows before a long look at the source.
        target::checkpoint_name(authority, name)?;
    }
    let source = entries::open(args.src, args.select.options(!args.no_files)).await?;
    entries::tell_skipped(&source, output);
    options.check_for(&source)?;
    if args.dry_run {
        let found = ask(&target).await;
        let left = LeftEvent::new(&found, &source, &options);
        output.event("left", &left);
        let files = (args.transfer.layout.into(), args.transfer.out_format.into());
        entries::show(&source, Some(files), output);
        tell_left(&left, &target, found.err(), output);
        return Ok(());
    }
    // From here on Ctrl-C keeps what is durable.
    let mut interrupt = Interrupt::listen()?;
    let (tensors, files) = entries::counts(&source);
    let bytes = source.total_bytes();
    output.event(
        "begin",
        &BeginEvent {
            destination: &target.to_string(),
            tensors,
            files,
            bytes,
        },
    );
    let (progress, result) = match &target {
        Target::Server { authority, name } => {
            let name = target::checkpoint_name(authority, name)?;
            let transfer = Client::new(authority)?.push(Arc::clone(&source), &name, options);
            follow(transfer, bytes, &mut interrupt, output).await
        }
        Target::Folder(folder) => {
            // Both roles are in this process and share the budget.
            options.budget_bytes = args.transfer.budget / 2;
            let embedded = Embedded::start(folder, options.budget_bytes).await?;
            let transfer = embedded.push(Arc::clone(&source), options)?;
            let followed = follow(transfer, bytes, &mut interrupt, output).await;
            let stopped = embedded.stop().await;
            // Why the push failed says more than why the server did.
            if followed.1.is_ok() {
                stopped?;
            }
            followed
        }
    };
    match result {
        Ok(report) => {
            tell_done(&report, Way::Push, &target.to_string(), output);
            Ok(())
        }
        Err(Error::Interrupted) => Err(tell_stopped(&progress, bytes, &target.to_string(), output)),
        Err(error) => {
            if error.is_retryable() && progress.durable_bytes > 0 {
                output.talk(&safe_words(
                    "cut off",
                    &progress,
                    bytes,
                    &target.to_string(),
                ));
            }
            if let Some(hint) = damaged_place(&error, &source) {
                return Err(Failure::with_hint(error, hint));
            }
            if error.is_retryable() {
                return Err(Failure::leaving(error, left(&progress, bytes)));
            }
            Err(error.into())
        }
    }
}

/// Where the bytes lie that do not fit the source's own checksum.
fn damaged_place(error: &Error, source: &SourceSet) -> Option<String> {
    let Error::Refused {
        reason: Reason::Checksum,
        message,
    } = error
    else {
        return None;
    };
    let is_meant = |name: &str| message.starts_with(&format!("{name:?} "));
    let mut summed = source.entries().iter().filter(|e| e.crc32c.is_some());
    let entry = summed.find(|entry| is_meant(&entry.header.name))?;
    let (file, offset) = entry.first_place()?;
    let path = source.paths().into_iter().nth(file as usize)?;
    Some(format!(
        "its {} bytes begin at {offset} of {}: take another copy of that file, or leave the tensor out with --exclude; nothing was published",
        entry.header.byte_len,
        path.display()
    ))
}

/// What the receiver knows of a name; `None` where that is nothing.
async fn ask(target: &Target) -> Result<Option<CheckpointStatus>, Error> {
    let status = match target {
        Target::Server { authority, name } => {
            let name = target::checkpoint_name(authority, name)?;
            let client = Client::new(authority)?;
            let asked = tokio::time::timeout(ANSWER_TIMEOUT, client.status(&name)).await;
            asked.unwrap_or_else(|_| {
                Err(Error::Transport {
                    endpoint: authority.clone(),
                    message: format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()),
                })
            })
        }
        Target::Folder(folder) => {
            let folder = folder.clone();
            let asked = tokio::task::spawn_blocking(move || status_folder(&folder)).await;
            asked.map_err(|error| Error::Bug(error.to_string()))?
        }
    };
    match status {
        Ok(status) => Ok(Some(status)),
        Err(error) if error.code() == ErrorCode::SourceMissing => Ok(None),
        Err(error) => Err(error),
    }
}

impl LeftEvent {
    fn new(
        found: &Result<Option<CheckpointStatus>, Error>,
        source: &SourceSet,
        options: &PushOptions,
    ) -> LeftEvent {
        let total_bytes = source.total_bytes();
        let status = found.as_ref().ok();
        let known = status.and_then(|status| status.as_ref());
        let unchanged = known.is_some_and(|status| status.is_of(source, options));
        let durable_bytes = status.map(|status| {
            let row = status.as_ref().and_then(|status| status.transfer.as_ref());
            row.map_or(0, |row| row.durable_bytes.min(total_bytes))
        });
        LeftEvent {
            left_bytes: match unchanged {
                true => 0,
                false => total_bytes - durable_bytes.unwrap_or(0),
            },
            durable_bytes,
            published: known.is_some_and(|status| status.published),
            unchanged,
        }
    }
}

/// The end of a dry run. What the receiver has is not compared with the source.
fn tell_left(left: &LeftEvent, target: &Target, unknown: Option<Error>, output: &Output) {
    let place = units::shown(&target.to_string());
    output.talk(&format!(
        "dry run: nothing was sent to {place}, {} bytes are left to send",
        left.left_bytes
    ));
    match (unknown, left.durable_bytes) {
        (Some(error), _) => output.talk(&format!(
            "what {place} has already is not known: {}",
            units::brief(&error.to_string())
        )),
        (None, Some(durable_bytes)) if durable_bytes > 0 => output.talk(&format!(
            "{durable_bytes} bytes of an unfinished transfer are durable there already"
        )),
        _ => {}
    }
    match (left.published, left.unchanged) {
        (_, true) => output.talk("the very same checkpoint stands there already"),
        (true, false) => {
            output.talk("another checkpoint stands there already: replacing it needs --overwrite");
        }
        (false, false) => {}
    }
}

/// The same for the library.
pub(crate) fn transfer_options(args: &TransferArgs) -> PushOptions {
    let mut options = PushOptions::default();
    options.chunk_len = args.chunk;
    options.commit_mode = args.durability.into();
    options.layout = args.layout.into();
    options.out_format = args.out_format.into();
    options.npy_dtype = args.npy_dtype.into();
    options.overwrite = args.overwrite;
    options.restart = args.restart;
    options.verify = args.verify;
    options.retries = args.retries;
    options.lanes = args.lanes;
    options.rate_limit = args.bwlimit.clone();
    options.codec = args.codec.into();
    options.budget_bytes = args.budget;
    options.first = args.first.clone();
    options
}

/// Waits for a transfer, showing where it stands and passing interrupts on.
pub(crate) async fn follow(
    transfer: Transfer,
    total_bytes: u64,
    interrupt: &mut Interrupt,
    output: &Output,
) -> (Progress, Result<TransferReport, Error>) {
    let (watcher, canceller) = (transfer.watcher(), transfer.canceller());
    let mut meter = Meter::new(output, total_bytes, Work::Push);
    let mut ending = transfer.into_future();
    let mut ticks = tokio::time::interval_at(tokio::time::Instant::now() + TICK, TICK);
    let mut is_cancelled = false;
    let result = loop {
        tokio::select! {
            result = &mut ending => break result,
            _ = ticks.tick() => meter.tick(&watcher.progress()),
            () = interrupt.first(), if !is_cancelled => {
                is_cancelled = true;
                canceller.cancel();
                meter.clear();
                output.talk("stopping: what has arrived is made durable (Ctrl-C again stops at once)");
            }
        }
    };
    meter.clear();
    (watcher.progress(), result)
}

/// Which way a checkpoint went.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Push,
    Pull,
    Copy,
}

/// `place` = where it is now.
pub(crate) fn tell_done(report: &TransferReport, way: Way, place: &str, output: &Output) {
    let bottleneck = report.stages.bottleneck();
    output.event(
        "done",
        &DoneEvent {
            checkpoint: &report.checkpoint,
            tensors: report.tensor_count,
            files: report.file_count,
            bytes: report.bytes,
            wire_bytes: report.wire_bytes,
            resumed_bytes: report.resumed_bytes,
            seconds: report.elapsed.as_secs_f64(),
            durability: report.durability.as_str(),
            unchanged: report.unchanged,
            sessions: report.session_count,
            codec: stages::codec_word(&report.codecs),
            lanes: report.stages.lanes,
            bottleneck: match report.stages.is_rate_limited() {
                true => Some("rate_limit"),
                false => bottleneck.map(|row| row.stage.as_str()),
            },
            bottleneck_side: match report.stages.is_rate_limited() {
                true => Some("sender"),
                false => bottleneck.map(|row| row.side.as_str()),
            },
            stages: stages::figures(&report.stages),
        },
    );
    let what = format!(
        "{}, {}, {}",
        units::count(report.tensor_count, "tensor"),
        units::count(report.file_count, "file"),
        units::bytes(report.bytes)
    );
    let place = units::shown(place);
    if report.unchanged {
        return output.human(&format!(
            "unchanged: {what} are in {place} already, nothing was sent"
        ));
    }
    let durability = match report.durability {
        Durability::Disk => "safe from power loss",
        _ => "not safe from power loss",
    };
    let (did, moved) = match way {
        Way::Push => ("pushed", "sent"),
        Way::Pull => ("pulled", "received"),
        Way::Copy => ("copied", "passed on"),
    };
    output.human(&format!(
        "{did} {what} to {place} in {} ({}): {moved} {}, resumed {}, {durability}",
        units::duration(report.elapsed),
        units::rate(report.wire_bytes, report.elapsed),
        units::bytes(report.wire_bytes),
        units::bytes(report.resumed_bytes),
    ));
    if let Some(line) = stages::line(&report.stages) {
        output.human(&line);
    }
}

/// Of a transfer whose checkpoint is known to this side only as far as it was told.
#[derive(Serialize)]
pub(crate) struct RouteEvent<'a> {
    pub(crate) source: &'a str,
    pub(crate) destination: &'a str,
}

/// Says what is safe, where that is of use.
pub(crate) fn tell_failed(
    error: Error,
    progress: &Progress,
    place: &str,
    output: &Output,
) -> Failure {
    let bytes = progress.total_bytes;
    match error {
        Error::Interrupted => tell_stopped(progress, bytes, place, output),
        error if error.is_retryable() => {
            if progress.durable_bytes > 0 {
                output.talk(&safe_words("cut off", progress, bytes, place));
            }
            Failure::leaving(error, left(progress, bytes))
        }
        error => error.into(),
    }
}

pub(crate) fn tell_stopped(
    progress: &Progress,
    total_bytes: u64,
    place: &str,
    output: &Output,
) -> Failure {
    let left = left(progress, total_bytes);
    output.complain(&safe_words("stopped", progress, total_bytes, place));
    output.complain(&format!("resume with: {}", left.resume));
    Failure::interrupted(left)
}

pub(crate) fn left(progress: &Progress, total_bytes: u64) -> Left {
    let words = std::env::args_os().map(|word| word.to_string_lossy().into_owned());
    Left {
        durable_bytes: progress.durable_bytes,
        total_bytes,
        resume: resume_command(words),
    }
}

pub(crate) fn safe_words(what: &str, progress: &Progress, total_bytes: u64, place: &str) -> String {
    format!(
        "{what}: {} of {} safe on {} ({} %)",
        units::bytes(progress.durable_bytes),
        units::bytes(total_bytes),
        units::shown(place),
        units::percent(progress.durable_bytes, total_bytes)
    )
}

/// The same command line, except that it must not throw away what is safe.
fn resume_command(words: impl Iterator<Item = String>) -> String {
    let mut only_paths_follow = false;
    let kept = words.filter(|word| {
        only_paths_follow |= word == "--";
        only_paths_follow || word != "--restart"
    });
    kept.map(|word| units::shell_quote(&word))
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_resume_command_is_the_command_without_restart() {
        let words = [
            "tensorferry",
            "push",
            "--restart",
            "my model",
            "lab:run7",
            "--",
            "--restart",
        ];
        let resume = resume_command(words.into_iter().map(str::to_owned));
        assert_eq!(resume, "tensorferry push 'my model' lab:run7 -- --restart");
    }
}
