//! `rehearse`: the two sides of a transfer that leaves part of its work out, for `bench`.

use crate::{
    args::{RehearseArgs, RehearseSide},
    choices::RehearsalArg,
    entries,
    exit::Failure,
    interrupt::Interrupt,
    output::Output,
    units,
};
use serde::Serialize;
use std::{net::SocketAddr, path::Path};
use tensorferry::{Error, measure::rehearsal};

#[derive(Serialize)]
struct ListeningEvent {
    address: SocketAddr,
}

#[derive(Serialize)]
struct DoneEvent<'a> {
    bytes: u64,
    seconds: f64,
    durability: &'a str,
    bottleneck: Option<&'a str>,
}

pub(crate) async fn run(args: RehearseArgs, output: &Output) -> Result<(), Failure> {
    let what = args.what.into();
    match args.side {
        RehearseSide::Receive { folder } => {
            let mut interrupt = Interrupt::listen()?;
            let listening = |address| output.event("listening", &ListeningEvent { address });
            rehearsal::receive(&folder, what, listening, interrupt.first()).await?;
            Ok(())
        }
        RehearseSide::Send {
            address,
            lanes,
            source,
        } => {
            let transfer = match args.what {
                RehearsalArg::FilesUnchecked => {
                    let source =
                        entries::open(vec![Path::new(&source).to_owned()], Default::default())
                            .await?;
                    rehearsal::send_files(&address, source, lanes)?
                }
                _ => {
                    let bytes = units::parse_size(&source).map_err(Error::Usage)?;
                    rehearsal::send_memory(&address, what, bytes, lanes)?
                }
            };
            let report = transfer.await?;
            output.event(
                "done",
                &DoneEvent {
                    bytes: report.bytes,
                    seconds: report.elapsed.as_secs_f64(),
                    durability: report.durability.as_str(),
                    bottleneck: report.stages.bottleneck().map(|row| row.stage.as_str()),
                },
            );
            Ok(())
        }
    }
}
