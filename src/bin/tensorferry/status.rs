//! `status`: what stands under one name, and how far its unfinished transfer is; or all
//! unfinished transfers of a server.

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

/// Digits of an owner that tell two apart in a table.
const OWNER_LEN: usize = 12;

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
    owner: Option<String>,
}

/// One of the unfinished transfers of a server.
#[derive(Serialize)]
struct TransferEvent<'a> {
    name: &'a str,
    #[serde(flatten)]
    row: TransferRow,
}

impl From<&CheckpointSummary> for TransferRow {
    fn from(row: &CheckpointSummary) -> TransferRow {
        TransferRow {
            active: row.active,
            entries: row.entry_count,
            bytes: row.total_bytes,
            durable_bytes: row.durable_bytes,
            modified_unix_seconds: row.modified_unix_seconds,
            owner: row.owner.clone(),
        }
    }
}

pub(crate) async fn run(args: StatusArgs, output: &Output) -> Result<(), Failure> {
    let target = Target::parse(&args.target)?;
    let destination = target.to_string();
    if let Target::Server { authority, name } = &target
        && name.is_empty()
    {
        return list_unfinished(authority, output).await;
    }
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

/// All unfinished transfers of a server.
async fn list_unfinished(authority: &str, output: &Output) -> Result<(), Failure> {
    let mut rows = Client::new(authority)?.list("").await?;
    rows.retain(|row| !row.published);
    let mut table = vec![
        ["NAME", "STATE", "CHANGED", "OWNER", "SIZE"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for row in &rows {
        output.event(
            "transfer",
            &TransferEvent {
                name: &row.name,
                row: row.into(),
            },
        );
        if output.is_quiet() {
            output.line(&units::shown(&row.name));
        }
        let owner = row.owner.as_deref().unwrap_or("-");
        table.push(vec![
            units::brief(&row.name),
            list::state(row),
            list::age(row.modified_unix_seconds),
            owner.chars().take(OWNER_LEN).collect(),
            format!("{}+", units::bytes(row.total_bytes)),
        ]);
    }
    if rows.is_empty() {
        output.talk(&format!(
            "nothing is unfinished on {}",
            units::shown(authority)
        ));
        return Ok(());
    }
    output.table(4, &table);
    Ok(())
}
