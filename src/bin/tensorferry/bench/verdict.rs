//! What limits a transfer, in words.

use super::{
    figures::{Figures, Spread, bottleneck, run_rates},
    processes::RunSample,
    steps::{Ends, Run},
};
use tensorferry::{measure::Ceiling, protocol::Durability};

/// What limits a run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Limit {
    /// The stage as `push` calls it.
    pub(super) stage: String,
    /// The same for people.
    pub(super) words: String,
    /// What that stage does alone, and its rate in GiB/s.
    pub(super) alone: Option<(Ceiling, f64)>,
    /// The run itself said so; else it is the slowest of the ceilings.
    pub(super) is_observed: bool,
}

/// A stage of a transfer for people, and what it is like alone.
fn stage_words(stage: &str) -> (&str, Option<Ceiling>) {
    match stage {
        "read" => ("reading the source", Some(Ceiling::Memcpy)),
        "checksum" => ("checksums", Some(Ceiling::Crc32c)),
        "codec" => ("the codec", Some(Ceiling::Lz4Encode)),
        "send" => ("sending", Some(Ceiling::TcpMemory)),
        "receive" => ("receiving", Some(Ceiling::TcpMemory)),
        "place" => ("page writes", Some(Ceiling::Pwrite)),
        "sync" => ("syncs", Some(Ceiling::Fdatasync)),
        other => (other, None),
    }
}

impl Limit {
    pub(super) fn of(figures: &Figures, run: Run, samples: &[RunSample]) -> Option<Limit> {
        match bottleneck(samples) {
            Some(stage) => Some(Limit::named(figures, stage, true)),
            None => slowest(figures, run).map(|stage| Limit::named(figures, stage, false)),
        }
    }

    fn named(figures: &Figures, stage: &str, is_observed: bool) -> Limit {
        let (words, ceiling) = stage_words(stage);
        let alone = ceiling.and_then(|c| Some((c, rate_alone(figures, c)?)));
        Limit {
            stage: stage.to_owned(),
            words: words.to_owned(),
            alone,
            is_observed,
        }
    }
}

/// The allocation of fresh pages is part of writing them.
fn rate_alone(figures: &Figures, ceiling: Ceiling) -> Option<f64> {
    match ceiling {
        Ceiling::Pwrite => figures.page_rate(),
        other => figures.ceiling_rate(other),
    }
}

/// The stage of a run that is slowest alone.
fn slowest(figures: &Figures, run: Run) -> Option<&'static str> {
    let mut stages = vec!["receive"];
    if run.crc {
        stages.push("checksum");
    }
    if run.ends == Ends::File {
        stages.push("place");
        if figures.durability == Durability::Disk {
            stages.push("sync");
        }
    }
    let rate = |stage: &str| rate_alone(figures, stage_words(stage).1?);
    let rated = stages.into_iter().filter_map(|s| Some((s, rate(s)?)));
    let least = rated.min_by(|a, b| a.1.total_cmp(&b.1));
    least.map(|(stage, _)| stage)
}

/// The end of a table: how near the best run came, and what holds it.
pub(super) fn sentences(figures: &Figures) -> Vec<String> {
    let mut out = Vec::new();
    if let Some((run, samples)) = figures.best(Ends::Memory, false) {
        let rate = Spread::of(run_rates(samples)).median;
        if let Some(share) = figures.share(samples, figures.ceiling_of(*run)) {
            out.push(format!(
                "both sides discarding, crc off: {rate:.2} GiB/s = {share:.2} of plain TCP discarding"
            ));
        }
    }
    let best = figures.best(Ends::File, true);
    let best = best.or_else(|| figures.best(Ends::Memory, true));
    if let Some((run, samples)) = best {
        out.push(sentence(figures, *run, samples));
    }
    out
}

fn sentence(figures: &Figures, run: Run, samples: &[RunSample]) -> String {
    let rate = Spread::of(run_rates(samples)).median;
    let mut text = format!("received {rate:.2} GiB/s");
    if let Some(share) = figures.share(samples, figures.ceiling_of(run)) {
        text += &format!(" = {share:.2} of the ceiling");
    }
    if let Some(limit) = Limit::of(figures, run, samples) {
        text += &format!("; limiting stage: {}", limit.words);
        if let Some((ceiling, rate)) = limit.alone {
            let how = if limit.is_observed {
                ""
            } else {
                ", the slowest alone"
            };
            text += &format!(" ({} {rate:.2} GiB/s{how})", ceiling.name());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::{super::figures::tests::figures, *};
    use std::time::Duration;

    const RUN: Run = Run {
        ends: Ends::File,
        lanes: 2,
        crc: true,
    };

    fn slow_down(figures: &mut Figures, ceiling: Ceiling) {
        for (found, samples) in &mut figures.ceilings {
            if *found == ceiling {
                samples.iter_mut().for_each(|s| s.elapsed *= 3);
            }
        }
    }

    #[test]
    fn without_a_word_of_the_run_the_slowest_ceiling_is_the_limit() {
        for (ceiling, words) in [
            (Ceiling::Pwrite, "page writes"),
            (Ceiling::TcpMemory, "receiving"),
            (Ceiling::Crc32c, "checksums"),
        ] {
            let mut figures = figures(&[1.0, 1.1, 1.2]);
            slow_down(&mut figures, ceiling);
            let samples = figures.runs[0].1.clone();
            let limit = Limit::of(&figures, RUN, &samples).unwrap();
            assert_eq!((limit.words.as_str(), limit.is_observed), (words, false));
        }
    }

    #[test]
    fn the_word_of_the_run_counts_and_the_sentence_has_it() {
        let mut figures = figures(&[1.0]);
        for (_, samples) in &mut figures.runs {
            samples[0].bottleneck = Some("sync".to_owned());
        }
        figures.runs.retain(|(run, _)| run.ends == Ends::File);
        assert_eq!(
            sentences(&figures),
            [
                "received 0.50 GiB/s = 0.50 of the ceiling; limiting stage: syncs (fdatasync 1.00 GiB/s)"
            ]
        );
    }

    #[test]
    fn allocation_counts_where_pages_are_written() {
        let mut figures = figures(&[1.0]);
        for (ceiling, samples) in &mut figures.ceilings {
            if *ceiling == Ceiling::Pwrite {
                samples[0].allocation = Some(Duration::from_secs(1));
            }
        }
        assert_eq!(figures.page_rate(), Some(0.5));
        assert_eq!(slowest(&figures, RUN), Some("place"));
    }
}
