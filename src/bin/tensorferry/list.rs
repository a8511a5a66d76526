//! `list`: checkpoints and unfinished transfers, on a server or in a folder.

use crate::{args::ListArgs, exit::Failure, output::Output, target::Target, units};
use serde::Serialize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use tensorferry::{CheckpointSummary, Client, Error, list_folder};

#[derive(Serialize)]
struct CheckpointEvent<'a> {
    name: &'a str,
    published: bool,
    offered: bool,
    active: bool,
    entries: u64,
    bytes: u64,
    durable_bytes: u64,
    modified_unix_seconds: u64,
}

pub(crate) async fn run(args: ListArgs, output: &Output) -> Result<(), Failure> {
    let place = Target::parse_place(&args.place)?;
    let checkpoints = match place.clone() {
        Target::Server { authority, name } => Client::new(&authority)?.list(&name).await?,
        Target::Folder(folder) => tokio::task::spawn_blocking(move || list_folder(&folder))
            .await
            .map_err(|e| Error::Bug(e.to_string()))??,
    };
    for row in &checkpoints {
        output.event(
            "checkpoint",
            &CheckpointEvent {
                name: &row.name,
                published: row.published,
                offered: row.offered,
                active: row.active,
                entries: row.entry_count,
                bytes: row.total_bytes,
                durable_bytes: row.durable_bytes,
                modified_unix_seconds: row.modified_unix_seconds,
            },
        );
        if output.is_quiet() {
            output.line(&units::shown(&row.name));
        }
    }
    if checkpoints.is_empty() {
        output.talk(&format!(
            "nothing is in {}",
            units::shown(&place.to_string())
        ));
        return Ok(());
    }
    let mut rows = vec![
        ["NAME", "STATE", "CHANGED", "ENTRIES", "SIZE"]
            .map(str::to_owned)
            .to_vec(),
    ];
    rows.extend(checkpoints.iter().map(|row| {
        vec![
            units::brief(&row.name),
            state(row),
            match row.offered {
                true => "-".to_owned(),
                false => age(row.modified_unix_seconds),
            },
            so_far(row, row.entry_count.to_string()),
            so_far(row, units::bytes(row.total_bytes)),
        ]
    }));
    output.table(3, &rows);
    Ok(())
}

pub(crate) fn state(row: &CheckpointSummary) -> String {
    if row.published {
        return "complete".to_owned();
    }
    if row.offered {
        return "offered".to_owned();
    }
    let doing = if row.active {
        "receiving"
    } else {
        "unfinished"
    };
    // No share of the whole: the receiver knows only of entries that have begun.
    format!("{doing}, {} safe", units::bytes(row.durable_bytes))
}

/// What is known of an unfinished transfer is a lower bound.
fn so_far(row: &CheckpointSummary, text: String) -> String {
    if row.published || row.offered {
        text
    } else {
        format!("{text}+")
    }
}

pub(crate) fn age(unix_seconds: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let seconds = now.as_secs().saturating_sub(unix_seconds);
    match seconds {
        0..2 => "just now".to_owned(),
        2..172_800 => format!(
            "{} ago",
            units::duration(Duration::from_secs(seconds.max(10)))
        ),
        _ => format!("{} days ago", seconds / 86_400),
    }
}
