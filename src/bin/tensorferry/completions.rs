//! `completions`: scripts that complete commands in a shell.

use crate::{
    args::{Cli, CompletionsArgs},
    exit::Failure,
    output::Output,
};
use clap::CommandFactory;

pub(crate) fn run(args: &CompletionsArgs, output: &Output) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "tensorferry", &mut script);
    output.raw(&script);
    Ok(())
}
