//! `copy`: from one server to another.

use crate::{
    args::CopyArgs,
    exit::Failure,
    interrupt::Interrupt,
    output::Output,
    push::{self, RouteEvent, Way},
    target::{self, Target},
};
use std::ffi::OsStr;
use tensorferry::{Client, CopyOptions, Error, plan::CheckpointName};

pub(crate) async fn run(args: CopyArgs, output: &Output) -> Result<(), Failure> {
    let mut options = CopyOptions::default();
    options.transfer = push::transfer_options(&args.transfer);
    options.include = args.include;
    options.exclude = args.exclude;
    let (from, name) = server(&args.src)?;
    let (to, to_name) = server(&args.dest)?;
    if (from.authority(), &name) == (to.authority(), &to_name) {
        let why = format!("ferry://{}/{name} is both SRC and DEST", from.authority());
        return Err(Error::Usage(why).into());
    }
    // From here on Ctrl-C keeps what is durable.
    let mut interrupt = Interrupt::listen()?;
    let place = format!("ferry://{}/{to_name}", to.authority());
    output.event(
        "begin",
        &RouteEvent {
            source: &format!("ferry://{}/{name}", from.authority()),
            destination: &place,
        },
    );
    let transfer = from.copy(&name, &to, &to_name, options);
    let (progress, result) = push::follow(transfer, 0, &mut interrupt, output).await;
    match result {
        Ok(report) => {
            push::tell_done(&report, Way::Copy, &place, output);
            Ok(())
        }
        Err(error) => Err(push::tell_failed(error, &progress, &place, output)),
    }
}

/// A server and the name of a checkpoint there.
fn server(word: &OsStr) -> Result<(Client, CheckpointName), Failure> {
    match Target::parse(word)? {
        Target::Server { authority, name } => {
            let name = target::checkpoint_name(&authority, &name)?;
            Ok((Client::new(&authority)?, name))
        }
        Target::Folder(folder) => {
            let why = format!(
                "{} is no address: copy is from server to server; push what lies on this machine, and \
                 pull what shall lie here",
                folder.display()
            );
            Err(Error::Usage(why).into())
        }
    }
}
