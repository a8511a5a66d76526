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
    // Examples and tables lose their lines when they are filled as text.
    let tables = command.get_after_long_help().map(ToString::to_string);
    let mut page = Vec::new();
    let rendered = clap_mangen::Man::new(command.after_long_help(None)).render(&mut page);
    rendered.map_err(|e| Error::Bug(format!("the manual page cannot be made: {e}")))?;
    page.extend(sections(tables.as_deref().unwrap_or_default()).into_bytes());
    output.raw(&page);
    Ok(())
}

/// Each line that ends in a colon and stands at the margin begins a section, whose
/// lines stay as they are.
fn sections(text: &str) -> String {
    let mut out = String::new();
    let mut is_open = false;
    for line in text.lines() {
        match line.strip_suffix(':').filter(|_| !line.starts_with(' ')) {
            Some(title) => {
                out.push_str(if is_open { ".fi\n" } else { "" });
                out.push_str(&format!(".SH {}\n.nf\n", title.to_uppercase()));
                is_open = true;
            }
            None => {
                // Only a dot or a quote at the margin would be read as a request.
                let line = line.replace('\\', "\\e").replace('-', "\\-");
                out.push_str(&format!("\\&{line}\n"));
            }
        }
    }
    out.push_str(if is_open { ".fi\n" } else { "" });
    out
}
