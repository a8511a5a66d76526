//! `bench`: what the machine can do at most, what tensorferry does, and what limits it.

mod chart;
mod figures;
mod local;
mod machine;
mod processes;
mod remote;
mod source;
mod steps;
mod table;
mod verdict;
mod work;

pub(crate) use steps::{Step, parse_step};

use crate::{args::BenchArgs, exit::Failure, output::Output, target::Target};
use tensorferry::Error;

pub(crate) async fn run(args: BenchArgs, output: &Output) -> Result<(), Failure> {
    match Target::parse_place(&args.place)? {
        Target::Folder(folder) => Box::pin(local::run(args, folder, output)).await,
        Target::Server { name, .. } if !name.is_empty() => Err(Error::Usage(format!(
            "a server is measured as a whole: leave /{name} away"
        ))
        .into()),
        Target::Server { authority, .. } => {
            let flags = [
                ("--only", !args.only.is_empty()),
                ("--source", args.source.is_some()),
                ("--out", args.out.is_some()),
            ];
            if let Some((flag, _)) = flags.iter().find(|(_, is_given)| *is_given) {
                return Err(Error::Usage(format!("{flag} is for a local folder")).into());
            }
            Box::pin(remote::run(args, &authority, output)).await
        }
    }
}
