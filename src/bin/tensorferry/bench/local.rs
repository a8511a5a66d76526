//! The bench of a folder: ceilings and runs in turn, round by round.

use super::{
    chart,
    figures::{CeilingEvent, Figures, RunEvent, Spread, run_rates},
    machine::{self, Machine},
    processes, source,
    steps::{Ends, Run, Step},
    table,
    verdict::{self, Limit},
    work::{Work, check_bytes, default_bytes, fitting_bytes},
};
use crate::{args::BenchArgs, exit::Failure, interrupt::Interrupt, output::Output, units};
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;
use std::{
    fs, io,
    path::{Path, PathBuf},
};
use tensorferry::{
    Error,
    measure::{Ceiling, Halt, Site},
    protocol::Reason,
    source::SourceError,
};

/// Bytes by which the speed is guessed before a size is chosen.
const PROBE_BYTES: u64 = 64 << 20;
/// Of what is quick to warm.
const WARM_UP_BYTES: u64 = 64 << 20;

/// One measurement of a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Ceiling(Ceiling),
    Run(Run),
}

#[derive(Serialize)]
struct BestRun<'a> {
    lanes: u32,
    gib_per_s: f64,
    ceiling: &'a str,
    share: Option<f64>,
    limiting_stage: Option<String>,
    limiting_words: Option<String>,
    /// `stages` = the run said so, `ceilings` = the slowest of them.
    limit_by: Option<&'a str>,
}

#[derive(Serialize)]
struct SummaryEvent<'a> {
    version: &'a str,
    date: &'a str,
    machine: &'a Machine,
    folder: &'a str,
    file_system: &'a str,
    durability: &'a str,
    bytes: u64,
    rounds: u32,
    file_to_file: Option<BestRun<'a>>,
    sentences: &'a [String],
}

/// What the bench of a folder works with.
struct Plan {
    dir: PathBuf,
    args: BenchArgs,
    turns: Vec<Turn>,
    halt: Halt,
}

pub(super) async fn run(args: BenchArgs, dir: PathBuf, output: &Output) -> Result<(), Failure> {
    let mut interrupt = Interrupt::listen()?;
    if !dir.is_dir() {
        let missing = SourceError::NotFound { path: dir };
        return Err(Failure::from(missing));
    }
    let machine = Machine::here();
    let file_system = machine::file_system(&dir);
    let halt = Halt::default();
    let plan = Plan {
        turns: turns(&args.only),
        dir: dir.clone(),
        halt: halt.clone(),
        args: args.clone(),
    };
    output.talk(&format!(
        "measuring {} ({file_system}) on {}",
        units::shown(&dir.display().to_string()),
        machine.words()
    ));
    let meter = Meter::new(output);
    let mut measuring = tokio::task::spawn_blocking({
        let meter = meter.clone();
        move || plan.measure(&meter)
    });
    let measured = tokio::select! {
        measured = &mut measuring => measured,
        () = interrupt.first() => {
            halt.set();
            meter.clear();
            output.talk("stopping: what was made is removed");
            measuring.await
        }
    };
    meter.clear();
    let (figures, bytes) = measured.map_err(|e| Error::Bug(e.to_string()))??;
    let date = machine::date();
    tell(&figures, output);
    if !figures.runs.is_empty() || figures.ceilings.len() > 1 {
        let sentences = verdict::sentences(&figures);
        output.event(
            "summary",
            &SummaryEvent {
                version: env!("CARGO_PKG_VERSION"),
                date: &date,
                machine: &machine,
                folder: &dir.display().to_string(),
                file_system: &file_system,
                durability: figures.durability.as_str(),
                bytes,
                rounds: args.rounds,
                file_to_file: best(&figures),
                sentences: &sentences,
            },
        );
        output.human(&format!(
            "{} on {file_system} (durability {}), medians of {}; {}; {date}",
            units::bytes(bytes),
            figures.durability.as_str(),
            units::count(args.rounds.into(), "round"),
            machine.words(),
        ));
    }
    if let Some(path) = &args.out {
        let caption = chart::Caption {
            machine: machine.words(),
            place: format!("{file_system}, durability {}", figures.durability.as_str()),
            amount: format!(
                "{}, medians of {}",
                units::bytes(bytes),
                units::count(args.rounds.into(), "round")
            ),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            date,
        };
        let drawn = chart::draw(&figures, &caption);
        fs::write(path, drawn).map_err(|e| io_error("write the chart", e))?;
        output.talk(&format!("chart in {}", path.display()));
    }
    Ok(())
}

fn best(figures: &Figures) -> Option<BestRun<'static>> {
    let (run, samples) = figures.best(Ends::File, true)?;
    let ceiling = figures.ceiling_of(*run);
    let limit = Limit::of(figures, *run, samples);
    let by = |limit: &Limit| {
        if limit.is_observed {
            "stages"
        } else {
            "ceilings"
        }
    };
    Some(BestRun {
        lanes: run.lanes,
        gib_per_s: Spread::of(run_rates(samples)).median,
        ceiling: ceiling.name(),
        share: figures.share(samples, ceiling),
        limit_by: limit.as_ref().map(by),
        limiting_words: limit.as_ref().map(|limit| limit.words.clone()),
        limiting_stage: limit.map(|limit| limit.stage),
    })
}

fn tell(figures: &Figures, output: &Output) {
    for (ceiling, samples) in &figures.ceilings {
        let event = CeilingEvent::new(*ceiling, samples, figures.durability);
        output.event("ceiling", &event);
    }
    for (run, samples) in &figures.runs {
        output.event("run", &RunEvent::new(figures, *run, samples));
    }
    table::show(figures, output);
}

/// What a round consists of; what is compared stands close together.
fn turns(only: &[Step]) -> Vec<Turn> {
    let is_wanted = |step: Step| only.is_empty() || only.contains(&step);
    let mut turns = Vec::new();
    for ceiling in Ceiling::ALL {
        if is_wanted(Step::Ceiling(ceiling)) {
            turns.push(Turn::Ceiling(ceiling));
        }
        let ends = match ceiling {
            Ceiling::TcpMemory => Ends::Memory,
            Ceiling::TcpFile => Ends::File,
            _ => continue,
        };
        if is_wanted(Step::Run(ends)) {
            turns.extend(Run::all(ends).map(Turn::Run));
        }
    }
    turns
}

impl Plan {
    /// Everything, with the number of bytes that were moved each time.
    fn measure(&self, meter: &Meter) -> Result<(Figures, u64), Error> {
        let work = Work::make(&self.dir).map_err(|e| io_error("work in the folder", e))?;
        // For the probe only.
        let site = Site::new(&self.dir, PROBE_BYTES).map_err(|e| io_error("measure", e))?;
        let needs_source = self.turns.iter().any(|turn| match turn {
            Turn::Ceiling(ceiling) => ceiling.needs_source(),
            Turn::Run(run) => run.ends == Ends::File,
        });
        let makes_source = needs_source && self.args.source.is_none();
        let fitting = fitting_bytes(&self.dir, site.durability(), makes_source)
            .map_err(|e| io_error("ask for free space", e))?;
        let bytes = match (&self.args.source, self.args.bytes) {
            (Some(path), None) => {
                let len = fs::metadata(path).map_err(|_| {
                    let path = path.clone();
                    Error::Source(SourceError::NotFound { path })
                })?;
                check_bytes(len.len(), fitting, &self.dir)?
            }
            (_, Some(bytes)) => check_bytes(bytes, fitting, &self.dir)?,
            (None, None) => self.default_bytes(fitting)?,
        };
        let source = match &self.args.source {
            Some(path) => path.clone(),
            None => work.source(),
        };
        if makes_source {
            meter.say(&format!("making {} of values", units::bytes(bytes)));
            source::write(&source, bytes, &self.halt).map_err(|e| io_error("make a source", e))?;
        }
        let site = self.site(bytes, needs_source.then_some(source.as_path()))?;
        let durability = site.durability();
        let mut figures = Figures {
            durability,
            ceilings: Vec::new(),
            runs: Vec::new(),
        };
        for turn in &self.turns {
            match turn {
                Turn::Ceiling(ceiling) => figures.ceilings.push((*ceiling, Vec::new())),
                Turn::Run(run) => figures.runs.push((*run, Vec::new())),
            }
        }
        if !self.args.no_warm_up {
            self.warm_up(&site, &source, &work, meter)?;
        }
        meter.begin(self.turns.len() as u64 * u64::from(self.args.rounds));
        for round in 1..=self.args.rounds {
            // What drifts within a round must not always hit the same ones.
            let mut order = self.turns.clone();
            if round % 2 == 0 {
                order.reverse();
            }
            for turn in order {
                let rate = self.take_turn(turn, &site, &source, &work, &mut figures)?;
                meter.step(round, self.args.rounds, &turn.words(), rate);
            }
        }
        Ok((figures, bytes))
    }

    /// Measures one thing and notes it. Returns its rate in GiB/s.
    fn take_turn(
        &self,
        turn: Turn,
        site: &Site,
        source: &Path,
        work: &Work,
        figures: &mut Figures,
    ) -> Result<f64, Error> {
        self.halt.check().map_err(|_| Error::Interrupted)?;
        if turn.writes() {
            // So that every turn finds the same memory: a virtual machine gives what is free
            // back to its host, and getting it again costs more than a whole turn.
            let filled = Ceiling::Pwrite.measure(site);
            filled.map_err(|e| io_error("fill a file", e))?;
        }
        self.drain(site)?;
        match turn {
            Turn::Ceiling(ceiling) => {
                let sample = ceiling
                    .measure(site)
                    .map_err(|e| io_error(ceiling.name(), e))?;
                let found = figures.ceilings.iter_mut().find(|(c, _)| *c == ceiling);
                if let Some((_, samples)) = found {
                    samples.push(sample);
                }
                Ok(sample.bytes_per_second() / (1u64 << 30) as f64)
            }
            Turn::Run(run) => {
                let sample = processes::measure(run, site.bytes(), source, work, &self.halt)?;
                let rate = super::figures::gib_per_s(sample.bytes, sample.seconds);
                if let Some((_, samples)) = figures.runs.iter_mut().find(|(r, _)| *r == run) {
                    samples.push(sample);
                }
                Ok(rate)
            }
        }
    }

    /// A disk must not still be busy with what came before.
    fn drain(&self, site: &Site) -> Result<(), Error> {
        if site.durability() == tensorferry::protocol::Durability::Process {
            return Ok(());
        }
        let synced = fs::File::open(&self.dir).and_then(|dir| Ok(rustix::fs::syncfs(dir)?));
        synced.map_err(|e| io_error("sync the file system", e))
    }

    /// Programs and sources are read from disk once.
    fn warm_up(&self, site: &Site, source: &Path, work: &Work, meter: &Meter) -> Result<(), Error> {
        meter.say("warming up");
        let failed = |e| io_error("warm up", e);
        let small = self.site(site.bytes().min(WARM_UP_BYTES), None)?;
        let mut warm_ends = Vec::new();
        for turn in &self.turns {
            self.halt.check().map_err(|_| Error::Interrupted)?;
            match turn {
                Turn::Ceiling(ceiling) if ceiling.needs_source() => {
                    ceiling.measure(site).map_err(failed)?;
                }
                Turn::Ceiling(ceiling) => {
                    ceiling.measure(&small).map_err(failed)?;
                }
                Turn::Run(run) if !warm_ends.contains(&run.ends) => {
                    warm_ends.push(run.ends);
                    processes::measure(*run, site.bytes(), source, work, &self.halt)?;
                }
                Turn::Run(_) => {}
            }
        }
        Ok(())
    }

    fn site(&self, bytes: u64, source: Option<&Path>) -> Result<Site, Error> {
        let failed = |e| io_error("measure", e);
        let site = Site::new(&self.dir, bytes).map_err(failed)?;
        let site = site.with_halt(self.halt.clone());
        match source {
            Some(path) => site.with_source(path).map_err(failed),
            None => Ok(site),
        }
    }

    /// By a short look at how fast the folder is.
    fn default_bytes(&self, fitting: u64) -> Result<u64, Error> {
        let probe = self.site(PROBE_BYTES.min(fitting.max(1)), None)?;
        let failed = |e| io_error("measure", e);
        let rate = |ceiling: Ceiling| -> Result<f64, Error> {
            ceiling.measure(&probe).map_err(failed)?;
            Ok(ceiling.measure(&probe).map_err(failed)?.bytes_per_second())
        };
        let slowest = rate(Ceiling::TcpMemory)?.min(rate(Ceiling::Fdatasync)?);
        // With the warm-up.
        let moves = self.turns.len() as u64 * u64::from(self.args.rounds + 1);
        Ok(default_bytes(fitting, slowest, moves))
    }
}

impl Turn {
    /// Whether it fills files, and thus memory.
    fn writes(&self) -> bool {
        match self {
            Turn::Ceiling(ceiling) => ceiling.writes(),
            Turn::Run(run) => run.ends == Ends::File,
        }
    }

    fn words(&self) -> String {
        match self {
            Turn::Ceiling(ceiling) => ceiling.name().to_owned(),
            Turn::Run(run) => {
                let crc = if run.crc { "crc on" } else { "crc off" };
                format!("{}, {crc}", table::run_words(*run))
            }
        }
    }
}

fn io_error(what: &str, error: io::Error) -> Error {
    if error.kind() == io::ErrorKind::Interrupted {
        return Error::Interrupted;
    }
    let reason = match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => Reason::DiskQuota,
        _ => Reason::StorageIoError,
    };
    Error::Store {
        reason,
        message: format!("cannot {what}"),
        source: Some(error),
    }
}

/// How far the bench is, on standard error.
#[derive(Clone, Debug)]
struct Meter {
    bar: ProgressBar,
    /// Off a terminal each step is a line.
    speaks: bool,
}

impl Meter {
    fn new(output: &Output) -> Meter {
        let draws = output.can_draw();
        let target = match draws {
            true => ProgressDrawTarget::stderr(),
            false => ProgressDrawTarget::hidden(),
        };
        let bar = ProgressBar::with_draw_target(Some(1), target);
        if let Ok(style) = ProgressStyle::with_template("{bar:24} {percent:>3} %  ETA {eta}  {msg}")
        {
            bar.set_style(style);
        }
        Meter {
            bar,
            speaks: !draws && output.talks(),
        }
    }

    fn begin(&self, steps: u64) {
        self.bar.set_length(steps);
        self.bar.reset();
    }

    fn say(&self, text: &str) {
        self.bar.set_message(text.to_owned());
        self.line(text);
    }

    fn step(&self, round: u32, rounds: u32, what: &str, gib_per_s: f64) {
        let text = format!("round {round} of {rounds}: {what} {gib_per_s:.2} GiB/s");
        self.bar.inc(1);
        self.say(&text);
    }

    fn line(&self, text: &str) {
        if self.speaks {
            crate::output::complain(text);
        }
    }

    fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_round_has_everything_once_and_a_choice_nothing_else() {
        let all = turns(&[]);
        assert_eq!(all.len(), Ceiling::ALL.len() + 12);
        for (i, turn) in all.iter().enumerate() {
            assert!(!all[..i].contains(turn), "{turn:?}");
        }
        let tcp = Ceiling::TcpFile;
        assert_eq!(turns(&[Step::Ceiling(tcp)]), [Turn::Ceiling(tcp)]);
        let runs = turns(&[Step::Run(Ends::Memory)]);
        assert!(runs.len() == 6 && runs.iter().all(|t| matches!(t, Turn::Run(_))));
    }
}
