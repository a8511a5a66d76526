//! Faults, seen from outside: a real server is killed, loses its power, its disk or its
//! network, and an oracle that survives all of it compares what was promised with what is
//! left.
//!
//! ```text
//! cargo test --test faults                          a short form of the main scenarios
//! cargo test --test faults -- power-ext4 --points 500 --seed 7
//! ```
//!
//! Options: `--points N` faults, `--seed N` of the first episode, `--binary PATH` another
//! program than the one built beside this, `--workdir DIR` for roots and images, `--table
//! FILE` to which a row of Markdown is added. Where a scenario needs root or a tool that is
//! not there, it says `not run`.
//!
//! With `TENSORFERRY_TURNED=1` the roles are swapped: every server is a client that pulls
//! (see `turned`).
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::exit,
    reason = "a program for tests: it prints, and it may end where it cannot go on"
)]

mod campaign;
mod cancels;
mod client;
mod crashes;
mod cut_files;
mod dice;
mod flips;
#[path = "../common/frames.rs"]
#[allow(dead_code, reason = "shared with other test crates")]
mod frames;
mod guest;
mod mount;
mod oracle;
mod peers;
mod ranges;
mod recorder;
mod relay;
mod reorder;
mod scenario;
mod server;
mod space;
mod strike;
mod syscalls;
mod track;
mod turned;
mod write_log;

use scenario::{Report, Setting};
use std::{
    fs::File,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Instant,
};

type Run = fn(&Setting) -> Report;

/// Every scenario with its name on the command line.
const SCENARIOS: &[(&str, Run)] = &[
    ("kills", crashes::kills),
    ("power-ext4", |s| crashes::power(s, "ext4")),
    ("power-xfs", |s| crashes::power(s, "xfs")),
    ("guest", crashes::guests),
    ("reorder", reorder::reorder),
    ("syscalls", syscalls::deaths),
    ("late-cuts", syscalls::late_cuts),
    ("eio", syscalls::failed_syncs),
    ("space", space::space),
    ("ranges", ranges::ranges),
    ("flips", flips::flips),
    ("cut-staging", cut_files::staging),
    ("cut-source", cut_files::source),
    ("clients", peers::clients),
    ("cuts", peers::cuts),
    ("delays", peers::delays),
    ("silence", peers::silence),
    ("cancels", cancels::storm),
];
/// What `cargo test` runs, and how many points of it.
const SHORT: &[(&str, u64)] = &[
    ("kills", 5),
    ("power-ext4", 5),
    ("ranges", 1),
    ("flips", 40),
    ("cancels", 100),
];

fn main() -> ExitCode {
    let mut words = std::env::args().skip(1).peekable();
    if words.next_if(|word| word == "turned").is_some() {
        return match turned::serve(words) {
            Ok(()) => ExitCode::SUCCESS,
            Err(why) => {
                println!("{why}");
                ExitCode::FAILURE
            }
        };
    }
    let mut names = Vec::new();
    let mut setting = Setting {
        runtime: tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .expect("a runtime"),
        binary: PathBuf::from(env!("CARGO_BIN_EXE_tensorferry")),
        workdir: std::env::temp_dir(),
        seed: 1,
        points: None,
    };
    let mut table = None;
    while let Some(word) = words.next() {
        let mut value = || {
            words.next().unwrap_or_else(|| {
                println!("{word} needs a value");
                std::process::exit(2)
            })
        };
        match word.as_str() {
            "--points" => setting.points = Some(value().parse().expect("a number")),
            "--seed" => setting.seed = value().parse().expect("a number"),
            "--binary" => setting.binary = PathBuf::from(value()),
            "--workdir" => setting.workdir = PathBuf::from(value()),
            "--table" => table = Some(PathBuf::from(value())),
            name if SCENARIOS.iter().any(|(n, _)| *n == name) => names.push(name.to_owned()),
            // Whatever the test runner of the others understands; a filter selects none here.
            _ if word.starts_with("--") => {}
            _ => return ExitCode::SUCCESS,
        }
    }
    let folder = tempfile::Builder::new()
        .prefix("tensorferry-faults-")
        .tempdir_in(&setting.workdir)
        .expect("the work folder can be used");
    setting.workdir = folder.path().to_owned();
    let is_short = names.is_empty();
    if is_short {
        names = SHORT.iter().map(|(name, _)| (*name).to_owned()).collect();
    }
    let mut failed = 0;
    for (i, name) in names.iter().enumerate() {
        if is_short && setting.points.is_none() {
            setting.points = Some(SHORT[i].1);
        }
        let started = Instant::now();
        let run = SCENARIOS
            .iter()
            .find(|(n, _)| n == name)
            .expect("it is known")
            .1;
        let mut report = run(&setting);
        report.seconds = started.elapsed().as_secs_f64();
        report.print();
        failed += report.failures.len();
        if let Some(table) = &table {
            add_row(table, &report.row(setting.seed)).expect("the table can be written");
        }
        if is_short {
            setting.points = None;
        }
    }
    if failed > 0 {
        println!("{failed} failures; left in {}", folder.keep().display());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn add_row(path: &Path, row: &str) -> std::io::Result<()> {
    let mut file = File::options().append(true).create(true).open(path)?;
    if file.metadata()?.len() == 0 {
        file.write_all(scenario::TABLE_HEAD.as_bytes())?;
    }
    file.write_all(row.as_bytes())
}
