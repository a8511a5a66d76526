//! How far a transfer is: one bar for the whole job on a terminal, now and then a
//! line elsewhere, events for programs.

use crate::{output::Output, units};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::time::{Duration, Instant};
use tensorferry::{Progress, Stage};

/// Off a terminal a line comes at least this often …
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// … and at every step of this many percent.
const LINE_STEP_PERCENT: u64 = 5;
/// A rate measured for less than this says nothing.
const RATE_AFTER: Duration = Duration::from_millis(300);
/// Programs hear of it at most this often.
const EVENT_INTERVAL: Duration = Duration::from_secs(1);

/// Shows where a transfer stands, in one of three ways.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    output: &'a Output,
    way: Way,
    work: Work,
    /// When bytes began to move, and how many were settled then.
    moving: Option<(Instant, u64)>,
}

/// What is under way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    /// A transfer.
    Push,
    /// Writing files: bytes are settled when they are written.
    Export,
}

#[derive(Debug)]
enum Way {
    Bar(ProgressBar),
    Lines { last: Instant, step: u64 },
    Events { last: Option<Instant> },
    Nothing,
}

#[derive(Serialize)]
struct ProgressEvent {
    total_bytes: u64,
    durable_bytes: u64,
    settled_bytes: u64,
    wire_bytes: u64,
    resumed_bytes: u64,
}

#[derive(Serialize)]
struct WrittenEvent {
    total_bytes: u64,
    written_bytes: u64,
}

impl<'a> Meter<'a> {
    pub(crate) fn new(output: &'a Output, total_bytes: u64, work: Work) -> Meter<'a> {
        let way = if output.is_json() {
            Way::Events { last: None }
        } else if output.is_quiet() {
            Way::Nothing
        } else if output.can_draw() {
            Way::Bar(bar(total_bytes))
        } else {
            Way::Lines {
                last: Instant::now(),
                step: 0,
            }
        };
        Meter {
            output,
            way,
            work,
            moving: None,
        }
    }

    /// Takes the state of a moment.
    pub(crate) fn tick(&mut self, progress: &Progress) {
        let begins = self.moving.is_none() && progress.stage == Stage::Sending;
        if begins {
            // Bytes that were there before say nothing about the speed.
            self.moving = Some((Instant::now(), progress.settled_bytes));
        }
        match &mut self.way {
            Way::Nothing => {}
            Way::Bar(bar) => {
                if begins {
                    bar.set_position(progress.settled_bytes);
                    bar.reset_eta();
                }
                // A pull learns on the way how much there is.
                bar.set_length(progress.total_bytes);
                bar.set_position(progress.settled_bytes);
                bar.set_message(stage_words(progress, self.work));
            }
            Way::Events { last } => {
                if last.is_none_or(|at| at.elapsed() >= EVENT_INTERVAL) {
                    *last = Some(Instant::now());
                    match self.work {
                        Work::Push => self.output.event("progress", &ProgressEvent::of(progress)),
                        Work::Export => self.output.event(
                            "progress",
                            &WrittenEvent {
                                total_bytes: progress.total_bytes,
                                written_bytes: progress.settled_bytes,
                            },
                        ),
                    }
                }
            }
            Way::Lines { last, step } => {
                let percent = units::percent(progress.settled_bytes, progress.total_bytes);
                let is_due = last.elapsed() >= LINE_INTERVAL;
                if is_due || percent / LINE_STEP_PERCENT > *step {
                    *last = Instant::now();
                    *step = percent / LINE_STEP_PERCENT;
                    self.output
                        .talk(&line(progress, percent, self.moving, self.work));
                }
            }
        }
    }

    /// Takes the bar away before anything else is said.
    pub(crate) fn clear(&self) {
        if let Way::Bar(bar) = &self.way {
            bar.finish_and_clear();
        }
    }
}

/// A bar that counts bytes, on standard error.
fn bar(total_bytes: u64) -> ProgressBar {
    let template = "{bar:24} {percent:>3} %  {binary_bytes} of {binary_total_bytes}  {binary_bytes_per_sec}  ETA {eta}  {msg}";
    let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar
}

/// A bar for work that only counts bytes, invisible where none can be drawn.
pub(crate) fn byte_bar(output: &Output, total_bytes: u64) -> ProgressBar {
    if output.can_draw() {
        bar(total_bytes)
    } else {
        ProgressBar::hidden()
    }
}

impl ProgressEvent {
    fn of(progress: &Progress) -> ProgressEvent {
        ProgressEvent {
            total_bytes: progress.total_bytes,
            durable_bytes: progress.durable_bytes,
            settled_bytes: progress.settled_bytes,
            wire_bytes: progress.wire_bytes,
            resumed_bytes: progress.resumed_bytes,
        }
    }
}

fn stage_words(progress: &Progress, work: Work) -> String {
    match progress.stage {
        _ if work == Work::Export => "writing".to_owned(),
        Stage::Connecting => "connecting".to_owned(),
        Stage::Waiting => "waiting to connect again".to_owned(),
        Stage::Publishing => "publishing".to_owned(),
        _ => format!("durable {}", units::bytes(progress.durable_bytes)),
    }
}

fn line(progress: &Progress, percent: u64, moving: Option<(Instant, u64)>, work: Work) -> String {
    let mut text = format!(
        "{percent:>3} %  {} of {}",
        units::bytes(progress.settled_bytes),
        units::bytes(progress.total_bytes)
    );
    if let Some((begun, settled)) = moving {
        let (moved, time) = (
            progress.settled_bytes.saturating_sub(settled),
            begun.elapsed(),
        );
        let left = progress.total_bytes.saturating_sub(progress.settled_bytes);
        if moved > 0 && time >= RATE_AFTER {
            let seconds_left = left as f64 / moved as f64 * time.as_secs_f64();
            let eta = Duration::try_from_secs_f64(seconds_left).unwrap_or(Duration::MAX);
            text += &format!(
                "  {}  ETA {}",
                units::rate(moved, time),
                units::duration(eta)
            );
        }
    }
    text + "  " + &stage_words(progress, work)
}
