//! The command line program: arguments → options → library → words.

mod args;
mod bench;
mod choices;
mod completions;
mod copy;
mod demo;
mod demo_cut;
mod demo_source;
mod discard;
mod entries;
mod exit;
mod export;
mod inspect;
mod interrupt;
mod limits;
mod list;
mod man;
mod output;
mod progress;
mod pull;
mod push;
mod ready;
mod rehearse;
mod serve;
mod stages;
mod status;
mod target;
mod units;
mod verify;

use args::{Cli, Verb};
use clap::Parser;
use exit::Failure;
use output::Output;
use std::{io::IsTerminal, process::ExitCode};
use tracing_subscriber::EnvFilter;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        // Help and version come this way too, with status 0.
        Err(error) if error.exit_code() == 0 => {
            let _ = error.print();
            return ExitCode::SUCCESS;
        }
        Err(error) => return exit::report_usage(&error, args::format_of(std::env::args_os())),
    };
    let global = &cli.global;
    // Threads that outlive the verb may still print.
    let output: &'static Output = Box::leak(Box::new(Output::new(
        global.format(),
        global.is_silent(),
        global.verbose,
    )));
    start_log(cli.global.verbose);
    // Without it sources are read into buffers instead.
    if let Err(error) = tensorferry::install_sigbus_guard() {
        tracing::warn!(%error, "files cannot be mapped safely");
    }
    let result = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .map_err(|e| Failure::from(tensorferry::Error::Bug(format!("no runtime: {e}"))))
        .and_then(|runtime| runtime.block_on(run(cli.verb, output)));
    match result.and_then(|()| output.check()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => exit::report(failure, output),
    }
}

async fn run(verb: Verb, output: &'static Output) -> Result<(), Failure> {
    match verb {
        Verb::Serve(args) => Box::pin(serve::run(args, output)).await,
        Verb::Push(args) => Box::pin(push::run(args, output)).await,
        Verb::Pull(args) => Box::pin(pull::run(args, output)).await,
        Verb::Copy(args) => Box::pin(copy::run(args, output)).await,
        Verb::List(args) => list::run(args, output).await,
        Verb::Status(args) => status::run(args, output).await,
        Verb::Inspect(args) => inspect::run(args, output).await,
        Verb::Verify(args) => verify::run(args, output).await,
        Verb::Export(args) => export::run(args, output).await,
        Verb::Discard(args) => discard::run(args, output).await,
        Verb::Bench(args) => Box::pin(bench::run(args, output)).await,
        Verb::Rehearse(args) => Box::pin(rehearse::run(args, output)).await,
        Verb::Demo(args) => Box::pin(demo::run(args, output)).await,
        Verb::Completions(args) => completions::run(&args, output),
        Verb::Man(args) => man::run(&args, output),
    }
}

/// What the library logs goes to standard error; `RUST_LOG` beats `-v`.
fn start_log(verbose: u8) {
    let level = match verbose {
        0 => "error",
        1 => "tensorferry=info,warn",
        2 => "tensorferry=debug,info",
        _ => "trace",
    };
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new(level));
    let is_plain = std::env::var_os("NO_COLOR").is_some() || !std::io::stderr().is_terminal();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_ansi(!is_plain)
        .with_env_filter(filter)
        .init();
}
