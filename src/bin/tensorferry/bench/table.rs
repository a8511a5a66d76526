//! The figures for people.

use super::{
    figures::{Figures, Spread, cpu_per_gib, rates, run_rates},
    steps::{Ends, Run},
    verdict,
};
use crate::output::Output;
use tensorferry::measure::{Ceiling, Sample};

const GIB: f64 = (1u64 << 30) as f64;

/// What a ceiling is, in a few words.
pub(super) fn words_of(ceiling: Ceiling) -> &'static str {
    match ceiling {
        Ceiling::Memcpy => "copy in memory, one thread",
        Ceiling::Crc32c => "checksum, one thread",
        Ceiling::Lz4Encode => "encode sparse values, one thread",
        Ceiling::Lz4Decode => "decode them, one thread",
        Ceiling::Constant => "find that a chunk is constant, one thread",
        Ceiling::MapStore => "fill a fresh file by map",
        Ceiling::MapPopulate => "the same, pages made ahead",
        Ceiling::Pwrite => "the same by pwrite",
        Ceiling::TcpMemory => "plain TCP, memory to memory",
        Ceiling::TcpFile => "plain TCP, file to fresh file",
        Ceiling::TcpFileCrc => "the same with crc32c on both sides",
        Ceiling::TcpFileSync => "the same with one fdatasync at the end",
        Ceiling::Fdatasync => "write, and sync every 128 MiB",
        _ => "",
    }
}

pub(super) fn show(figures: &Figures, output: &Output) {
    if !figures.ceilings.is_empty() {
        output.human("");
        output.table(2, &ceiling_rows(figures));
        notes(figures, output);
    }
    if !figures.runs.is_empty() {
        output.human("");
        output.table(2, &run_rows(figures));
    }
    let sentences = verdict::sentences(figures);
    if !sentences.is_empty() {
        output.human("");
    }
    // The bare answer is all that a quiet bench says.
    if !output.is_json() {
        sentences.iter().for_each(|sentence| output.line(sentence));
    }
}

fn words(cells: &[&str]) -> Vec<String> {
    cells.iter().map(|cell| (*cell).to_owned()).collect()
}

fn spread_cells(spread: Spread) -> [String; 2] {
    let range = format!("{:.2}-{:.2}", spread.min, spread.max);
    [format!("{:.2}", spread.median), range]
}

fn ceiling_rows(figures: &Figures) -> Vec<Vec<String>> {
    let head = ["the machine", "", "GiB/s", "range", "core-s/GiB"];
    let mut rows = vec![words(&head)];
    for (ceiling, samples) in &figures.ceilings {
        let cpu = |s: &Sample| s.cpu.as_secs_f64() * GIB / s.bytes.max(1) as f64;
        let cpu = Spread::of(samples.iter().map(cpu)).median;
        let mut row = words(&[ceiling.name(), words_of(*ceiling)]);
        row.extend(spread_cells(Spread::of(rates(samples))));
        row.push(format!("{cpu:.2}"));
        rows.push(row);
    }
    rows
}

/// What does not fit into the columns.
fn notes(figures: &Figures, output: &Output) {
    if let (Some(rate), Some(alone)) = (figures.page_rate(), figures.ceiling_rate(Ceiling::Pwrite))
    {
        output.human(&format!(
            "fresh pages: pwrite {alone:.2} GiB/s, {rate:.2} GiB/s with the fallocate before it"
        ));
    }
    let syncs = figures.ceiling(Ceiling::Fdatasync).unwrap_or_default();
    let calls: Vec<f64> = syncs.iter().filter_map(|s| s.calls_per_second).collect();
    if !calls.is_empty() {
        output.human(&format!(
            "small syncs: {:.0} a second",
            Spread::of(calls).median
        ));
    }
}

/// `file to file, 2 lanes`.
pub(super) fn run_words(run: Run) -> String {
    let ends = match run.ends {
        Ends::Memory => "memory to memory",
        Ends::File => "file to file",
    };
    let lanes = crate::units::count(run.lanes.into(), "lane");
    format!("{ends}, {lanes}")
}

fn run_rows(figures: &Figures) -> Vec<Vec<String>> {
    let head = [
        "tensorferry",
        "",
        "GiB/s",
        "range",
        "share",
        "of",
        "sender",
        "receiver",
    ];
    let mut rows = vec![words(&head)];
    for (run, samples) in &figures.runs {
        let crc = if run.crc { "crc on" } else { "crc off" };
        let ceiling = figures.ceiling_of(*run);
        let share = figures.share(samples, ceiling);
        let share = share.map_or("-".to_owned(), |share| format!("{share:.2}"));
        let sender = cpu_per_gib(samples, |s| s.client_cpu.as_secs_f64());
        let receiver = cpu_per_gib(samples, |s| s.server_cpu.as_secs_f64());
        let mut row = vec![run_words(*run), crc.to_owned()];
        row.extend(spread_cells(Spread::of(run_rates(samples))));
        row.extend([share, ceiling.name().to_owned()]);
        row.extend([format!("{sender:.2}"), format!("{receiver:.2}")]);
        rows.push(row);
    }
    rows
}
