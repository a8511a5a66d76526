//! `inspect`: what is in a checkpoint, from its headers alone.

use crate::{args::InspectArgs, entries, exit::Failure, output::Output, units};
use serde::Serialize;

#[derive(Serialize)]
struct MetadataEvent<'a> {
    key: &'a str,
    value: &'a str,
}

pub(crate) async fn run(args: InspectArgs, output: &Output) -> Result<(), Failure> {
    let source = entries::open(args.src, true).await?;
    for (key, value) in source.metadata() {
        output.event("metadata", &MetadataEvent { key, value });
    }
    entries::tell_skipped(&source, output);
    entries::show(&source, None, output);
    for (key, value) in source.metadata() {
        output.human(&format!(
            "metadata {}: {}",
            units::shown(key),
            units::shown(value)
        ));
    }
    Ok(())
}
