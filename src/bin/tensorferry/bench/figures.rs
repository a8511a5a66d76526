//! What was measured, and what programs are told of it.

use super::{
    processes::RunSample,
    steps::{Ends, Run},
};
use serde::Serialize;
use std::collections::BTreeMap;
use tensorferry::{
    measure::{Ceiling, Sample},
    protocol::Durability,
};

const GIB: f64 = (1u64 << 30) as f64;

/// Everything that was measured. Of each thing there is one sample for each round.
#[derive(Debug)]
pub(super) struct Figures {
    pub(super) durability: Durability,
    pub(super) ceilings: Vec<(Ceiling, Vec<Sample>)>,
    pub(super) runs: Vec<(Run, Vec<RunSample>)>,
}

/// Median, least and most.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
}

impl Spread {
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
        let count = values.len();
        Spread {
            median: (at(count.saturating_sub(1) / 2) + at(count / 2)) / 2.0,
            min: at(0),
            max: at(count.saturating_sub(1)),
        }
    }
}

pub(super) fn gib_per_s(bytes: u64, seconds: f64) -> f64 {
    bytes as f64 / GIB / seconds.max(1e-9)
}

/// Rates of a ceiling, round by round.
pub(super) fn rates(samples: &[Sample]) -> impl Iterator<Item = f64> + '_ {
    samples
        .iter()
        .map(|s| gib_per_s(s.bytes, s.elapsed.as_secs_f64()))
}

/// Rates of a run, round by round.
pub(super) fn run_rates(samples: &[RunSample]) -> impl Iterator<Item = f64> + '_ {
    samples.iter().map(|s| gib_per_s(s.bytes, s.seconds))
}

/// Processor time of one side, in core-seconds for each GiB.
pub(super) fn cpu_per_gib(samples: &[RunSample], cpu: impl Fn(&RunSample) -> f64) -> f64 {
    Spread::of(samples.iter().map(|s| cpu(s) * GIB / s.bytes.max(1) as f64)).median
}

impl Figures {
    pub(super) fn ceiling(&self, ceiling: Ceiling) -> Option<&[Sample]> {
        let found = self.ceilings.iter().find(|(c, _)| *c == ceiling);
        found.map(|(_, samples)| samples.as_slice())
    }

    fn has(&self, ceiling: Ceiling) -> bool {
        self.ceiling(ceiling).is_some()
    }

    pub(super) fn ceiling_rate(&self, ceiling: Ceiling) -> Option<f64> {
        self.ceiling(ceiling).map(|s| Spread::of(rates(s)).median)
    }

    /// The rate of `pwrite` with the allocation, which a receiver pays too.
    pub(super) fn page_rate(&self) -> Option<f64> {
        let samples = self.ceiling(Ceiling::Pwrite)?;
        let rate = |s: &Sample| gib_per_s(s.bytes, whole_seconds(s));
        Some(Spread::of(samples.iter().map(rate)).median)
    }

    /// What a run is judged by: a plain program that does as much, or nearly, where that
    /// was not measured.
    pub(super) fn ceiling_of(&self, run: Run) -> Ceiling {
        match (run.ends, self.durability) {
            (Ends::Memory, _) => Ceiling::TcpMemory,
            (Ends::File, Durability::Disk) if self.has(Ceiling::TcpFileSync) => {
                Ceiling::TcpFileSync
            }
            (Ends::File, _) => Ceiling::TcpFile,
        }
    }

    /// Its share of a ceiling: the median of the shares within each round.
    pub(super) fn share(&self, samples: &[RunSample], ceiling: Ceiling) -> Option<f64> {
        let ceiling = self.ceiling(ceiling)?;
        let pairs = run_rates(samples).zip(rates(ceiling));
        Some(Spread::of(pairs.map(|(run, most)| run / most)).median)
    }

    /// The fastest of these runs.
    pub(super) fn best(&self, ends: Ends, crc: bool) -> Option<&(Run, Vec<RunSample>)> {
        let rate = |samples: &[RunSample]| Spread::of(run_rates(samples)).median;
        let like = |run: &Run| run.ends == ends && run.crc == crc;
        let runs = self.runs.iter().filter(|(run, _)| like(run));
        runs.max_by(|a, b| rate(&a.1).total_cmp(&rate(&b.1)))
    }
}

/// With the allocation of the file.
pub(super) fn whole_seconds(sample: &Sample) -> f64 {
    (sample.elapsed + sample.allocation.unwrap_or_default()).as_secs_f64()
}

#[derive(Serialize)]
pub(super) struct CeilingEvent<'a> {
    name: &'a str,
    bytes: u64,
    seconds: f64,
    min_seconds: f64,
    max_seconds: f64,
    gib_per_s: f64,
    cpu_seconds: f64,
    rounds: Vec<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    durability: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    allocation_seconds: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    gib_per_s_with_allocation: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    calls_per_s: Option<f64>,
}

impl<'a> CeilingEvent<'a> {
    pub(super) fn new(ceiling: Ceiling, samples: &[Sample], durability: Durability) -> Self {
        let rounds: Vec<f64> = samples.iter().map(|s| s.elapsed.as_secs_f64()).collect();
        let seconds = Spread::of(rounds.iter().copied());
        let bytes = samples.first().map_or(0, |s| s.bytes);
        let middle = |value: &dyn Fn(&Sample) -> Option<f64>| {
            let values: Vec<f64> = samples.iter().filter_map(value).collect();
            (!values.is_empty()).then(|| Spread::of(values).median)
        };
        let allocation_seconds = middle(&|s| s.allocation.map(|a| a.as_secs_f64()));
        CeilingEvent {
            name: ceiling.name(),
            bytes,
            seconds: seconds.median,
            min_seconds: seconds.min,
            max_seconds: seconds.max,
            gib_per_s: gib_per_s(bytes, seconds.median),
            cpu_seconds: Spread::of(samples.iter().map(|s| s.cpu.as_secs_f64())).median,
            rounds,
            durability: ceiling.writes().then(|| durability.as_str()),
            allocation_seconds,
            gib_per_s_with_allocation: allocation_seconds
                .map(|a| gib_per_s(bytes, seconds.median + a)),
            calls_per_s: middle(&|s| s.calls_per_second),
        }
    }
}

#[derive(Serialize)]
pub(super) struct RunEvent<'a> {
    name: &'a str,
    lanes: u32,
    crc: bool,
    durability: &'a str,
    published: bool,
    bytes: u64,
    seconds: f64,
    min_seconds: f64,
    max_seconds: f64,
    gib_per_s: f64,
    cpu_seconds_client: f64,
    cpu_seconds_server: f64,
    rounds: Vec<f64>,
    ceiling: &'a str,
    share: Option<f64>,
    /// Of everything that is like it and was measured.
    shares: BTreeMap<&'a str, f64>,
    bottleneck: Option<&'a str>,
}

impl<'a> RunEvent<'a> {
    pub(super) fn new(figures: &Figures, run: Run, samples: &'a [RunSample]) -> Self {
        let rounds: Vec<f64> = samples.iter().map(|s| s.seconds).collect();
        let seconds = Spread::of(rounds.iter().copied());
        let bytes = samples.first().map_or(0, |s| s.bytes);
        let ceiling = figures.ceiling_of(run);
        let like: &[Ceiling] = match run.ends {
            Ends::Memory => &[Ceiling::TcpMemory],
            Ends::File => &[Ceiling::TcpFile, Ceiling::TcpFileCrc, Ceiling::TcpFileSync],
        };
        let share = |&c: &Ceiling| Some((c.name(), figures.share(samples, c)?));
        RunEvent {
            name: run.ends.name(),
            lanes: run.lanes,
            crc: run.crc,
            durability: samples.first().map_or("", |s| &s.durability),
            published: run.ends == Ends::File && run.crc,
            bytes,
            seconds: seconds.median,
            min_seconds: seconds.min,
            max_seconds: seconds.max,
            gib_per_s: gib_per_s(bytes, seconds.median),
            cpu_seconds_client: Spread::of(samples.iter().map(|s| s.client_cpu.as_secs_f64()))
                .median,
            cpu_seconds_server: Spread::of(samples.iter().map(|s| s.server_cpu.as_secs_f64()))
                .median,
            rounds,
            ceiling: ceiling.name(),
            share: figures.share(samples, ceiling),
            shares: like.iter().filter_map(share).collect(),
            bottleneck: bottleneck(samples),
        }
    }
}

/// What most rounds say that the run waited for.
pub(super) fn bottleneck(samples: &[RunSample]) -> Option<&str> {
    let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
    for stage in samples.iter().filter_map(|s| s.bottleneck.as_deref()) {
        *counts.entry(stage).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|(_, count)| *count);
    most.map(|(stage, _)| stage)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use std::time::Duration;

    pub(crate) fn run_sample(seconds: f64) -> RunSample {
        RunSample {
            bytes: 1 << 30,
            seconds,
            durability: "process".to_owned(),
            bottleneck: None,
            client_cpu: Duration::from_millis(700),
            server_cpu: Duration::from_millis(1300),
        }
    }

    /// Ceilings at `1 / seconds` GiB/s, runs at half of that.
    pub(crate) fn figures(seconds: &[f64]) -> Figures {
        let temp = tempfile::tempdir().unwrap();
        let site = tensorferry::measure::Site::new(temp.path(), 1).unwrap();
        let blank = Ceiling::Memcpy.measure(&site).unwrap();
        let sample = |&seconds: &f64| {
            let mut sample = blank;
            sample.bytes = 1 << 30;
            sample.elapsed = Duration::from_secs_f64(seconds);
            sample
        };
        let runs = Ends::ALL.into_iter().flat_map(Run::all);
        Figures {
            durability: Durability::Process,
            ceilings: Ceiling::ALL
                .map(|c| (c, seconds.iter().map(sample).collect()))
                .to_vec(),
            runs: runs
                .map(|run| (run, seconds.iter().map(|s| run_sample(s * 2.0)).collect()))
                .collect(),
        }
    }

    #[test]
    fn spreads_are_taken_of_odd_and_even_counts() {
        let spread = |values: &[f64]| Spread::of(values.iter().copied());
        let expected = |median, min, max| Spread { median, min, max };
        assert_eq!(spread(&[]), expected(0.0, 0.0, 0.0));
        assert_eq!(spread(&[3.0]), expected(3.0, 3.0, 3.0));
        assert_eq!(spread(&[9.0, 1.0, 2.0]), expected(2.0, 1.0, 9.0));
        assert_eq!(spread(&[4.0, 1.0, 2.0, 8.0]), expected(3.0, 1.0, 8.0));
    }

    #[test]
    fn shares_are_paired_by_round() {
        // Rounds differ tenfold, the share does not.
        let figures = figures(&[0.5, 5.0, 1.0]);
        for (run, samples) in &figures.runs {
            let ceiling = figures.ceiling_of(*run);
            let share = figures.share(samples, ceiling).unwrap();
            assert!((share - 0.5).abs() < 1e-9, "{run:?}: {share}");
        }
        let disk = Figures {
            durability: Durability::Disk,
            ..figures
        };
        let run = Run {
            ends: Ends::File,
            lanes: 1,
            crc: true,
        };
        assert_eq!(disk.ceiling_of(run), Ceiling::TcpFileSync);
        let mut few = disk;
        few.ceilings.retain(|(c, _)| *c == Ceiling::TcpFile);
        assert_eq!(few.ceiling_of(run), Ceiling::TcpFile);
    }

    #[test]
    fn a_share_of_what_was_not_measured_is_none() {
        let mut figures = figures(&[1.0]);
        figures.ceilings.clear();
        let (run, samples) = &figures.runs[0];
        assert_eq!(figures.share(samples, figures.ceiling_of(*run)), None);
    }

    #[test]
    fn most_rounds_decide_on_the_bottleneck() {
        let sample = |stage: Option<&str>| RunSample {
            bottleneck: stage.map(str::to_owned),
            ..run_sample(1.0)
        };
        let samples = [
            sample(Some("send")),
            sample(Some("place")),
            sample(Some("place")),
        ];
        assert_eq!(bottleneck(&samples), Some("place"));
        assert_eq!(bottleneck(&[sample(None)]), None);
    }
}
