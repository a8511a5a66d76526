//! `discard`: gives the space of an unfinished transfer back.

use crate::{
    args::DiscardArgs,
    exit::Failure,
    output::Output,
    target::{self, Target},
    units,
};
use serde::Serialize;
use tensorferry::{Client, Error, discard_folder};

#[derive(Serialize)]
struct DiscardedEvent<'a> {
    destination: &'a str,
    existed: bool,
    bytes: u64,
}

pub(crate) async fn run(args: DiscardArgs, output: &Output) -> Result<(), Failure> {
    let target = Target::parse(&args.dest)?;
    let destination = target.to_string();
    let discarded = match target {
        Target::Server { authority, name } => {
            let name = target::checkpoint_name(&authority, &name)?;
            Client::new(&authority)?.discard(&name).await?
        }
        Target::Folder(folder) => tokio::task::spawn_blocking(move || discard_folder(&folder))
            .await
            .map_err(|e| Error::Bug(e.to_string()))??,
    };
    output.event(
        "discarded",
        &DiscardedEvent {
            destination: &destination,
            existed: discarded.is_some(),
            bytes: discarded.unwrap_or(0),
        },
    );
    let destination = units::shown(&destination);
    output.human(&match discarded {
        Some(bytes) => format!(
            "discarded the unfinished transfer of {destination}, {} durable",
            units::bytes(bytes)
        ),
        None => format!("no unfinished transfer of {destination}"),
    });
    Ok(())
}
