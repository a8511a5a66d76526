//! `status`: what stands under one name, and how far its unfinished transfer is.

use crate::{
    args::StatusArgs,
    exit::Failure,
    list,
    output::Output,
    target::{self, Target},
    units,
};
use serde::Serialize;
use tensorferry::{CheckpointSummary, Client, Error, status_folder};

#[derive(Serialize)]
struct StatusEvent<'a> {
    destination: &'a str,
    published: bool,
    transfer: Option<TransferRow>,
}

#[derive(Serialize)]
struct TransferRow {
    active: bool,
    entries: u64,
    bytes: u64,
    durable_bytes: u64,
    modified_unix_seconds: u64,
}

impl From<&CheckpointSummary> for TransferRow {
    fn from(row: &CheckpointSummary) -> TransferRow {
        TransferRow {
            active: row.active,
            entries: row.entry_count,
            bytes: row.total_bytes,
            durable_bytes: row.durable_bytes,
            modified_unix_seconds: row.modified_unix_seconds,
        }
    }
}

pub(crate) async fn run(args: StatusArgs, output: &Output) -> Result<(), Failure> {
    let target = Target::parse(&args.target)?;
    let destination = target.to_string();
    let status = match target {
        Target::Server { authority, name } => {
            let name = target::checkpoint_name(&authority, &name)?;
            Client::new(&authority)?.status(&name).await?
        }
        Target::Folder(folder) => tokio::task::spawn_blocking(move || status_folder(&folder))
            .await
            .map_err(|e| Error::Bug(e.to_string()))??,
    };
    output.event(
        "status",
        &StatusEvent {
            destination: &destination,
            published: status.published,
            transfer: status.transfer.as_ref().map(TransferRow::from),
        },
    );
    let published = status.published.then(|| "complete".to_owned());
    let unfinished = status.transfer.as_ref().map(list::state);
    let words = [published, unfinished].into_iter().flatten();
    let words = words.collect::<Vec<_>>().join("; a replacement is ");
    if output.is_quiet() {
        output.line(&words);
    }
    output.human(&format!("{}: {words}", units::shown(&destination)));
    if let Some(row) = &status.transfer {
        // A lower bound, for the receiver knows only of entries that have begun.
        output.human(&format!(
            "known so far: {} in {} {}, changed {}",
            units::bytes(row.total_bytes),
            row.entry_count,
            if row.entry_count == 1 {
                "entry"
            } else {
                "entries"
            },
            list::age(row.modified_unix_seconds)
        ));
    }
    Ok(())
}
