//! `man`: manual pages in roff.

use crate::{
    args::{Cli, ManArgs},
    exit::Failure,
    output::Output,
};
use clap::CommandFactory;
use tensorferry::Error;

pub(crate) fn run(args: &ManArgs, output: &Output) -> Result<(), Failure> {
    let mut command = Cli::command();
    // Flags of every verb are told on every page.
    command.build();
    let command = match &args.page {
        None => command,
        Some(verb) => {
            let found = command.find_subcommand(verb).cloned();
            let found = found.ok_or_else(|| Error::Usage(format!("there is no verb {verb:?}")))?;
            found.display_name(format!("tensorferry-{verb}"))
        }
    };
    let mut page = Vec::new();
    let rendered = clap_mangen::Man::new(command).render(&mut page);
    rendered.map_err(|e| Error::Bug(format!("the manual page cannot be made: {e}")))?;
    output.raw(&page);
    Ok(())
}
