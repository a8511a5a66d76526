//! `pull`: fetches a checkpoint from a server into a local folder.

use crate::{
    args::PullArgs,
    exit::Failure,
    interrupt::Interrupt,
    output::Output,
    push::{self, RouteEvent, Way},
    ready,
    target::{self, Target},
};
use tensorferry::{Client, Error, ErrorCode, OnReady, PullOptions, Reason};

pub(crate) async fn run(args: PullArgs, output: &'static Output) -> Result<(), Failure> {
    let mut options = PullOptions::default();
    options.transfer = push::transfer_options(&args.transfer);
    options.include = args.include;
    options.exclude = args.exclude;
    options.on_ready = match args.ready {
        true => Some(OnReady::new(|tensor| ready::tell(tensor, output))),
        false if options.transfer.first.is_empty() => None,
        false => Some(OnReady::of_first(|tensor| ready::tell(tensor, output))),
    };
    options.write_mode = args.write.into();
    options.max_bytes = (args.max_bytes > 0).then_some(args.max_bytes);
    let (authority, name) = match Target::parse(&args.src)? {
        Target::Server { authority, name } => (authority, name),
        Target::Folder(folder) => {
            let why = format!(
                "{} is no address: pull takes ferry://HOST[:PORT]/NAME or HOST:NAME; what lies on this \
                 machine is pushed",
                folder.display()
            );
            return Err(Error::Usage(why).into());
        }
    };
    if let address @ Target::Server { .. } = Target::parse(args.dir.as_os_str())? {
        let why = format!(
            "{address} is no folder: pull brings a checkpoint here; copy takes it from server to server"
        );
        return Err(Error::Usage(why).into());
    }
    let name = target::checkpoint_name(&authority, &name)?;
    let client = Client::new(&authority)?;
    // From here on Ctrl-C keeps what is durable.
    let mut interrupt = Interrupt::listen()?;
    let place = args.dir.display().to_string();
    output.event(
        "begin",
        &RouteEvent {
            source: &format!("ferry://{authority}/{name}"),
            destination: &place,
        },
    );
    let transfer = client.pull(&name, &args.dir, options);
    let (progress, result) = push::follow(transfer, 0, &mut interrupt, output).await;
    match result {
        Ok(report) => {
            push::tell_done(&report, Way::Pull, &place, output);
            Ok(())
        }
        Err(error) if error.code() == ErrorCode::NoSpace && args.max_bytes > 0 => {
            let hint = "raise --max-bytes, or take a part of it with --include; or free space here";
            Err(Failure::with_hint(error, hint))
        }
        Err(error)
            if matches!(
                &error,
                Error::Store {
                    reason: Reason::Locked,
                    ..
                }
            ) =>
        {
            let hint = "another transfer to DIR is unfinished, of another source or selection: run that one \
                        again, or add --restart to throw it away";
            Err(Failure::with_hint(error, hint))
        }
        Err(error) => Err(push::tell_failed(error, &progress, &place, output)),
    }
}
