//! `inspect`: what is in a checkpoint, from its headers or its manifest alone.

use crate::{
    args::InspectArgs,
    entries,
    exit::Failure,
    output::Output,
    target::{self, Target},
    units,
};
use serde::Serialize;
use std::{collections::BTreeMap, path::PathBuf};
use tensorferry::{CheckpointInfo, Client, Error};

#[derive(Serialize)]
struct MetadataEvent<'a> {
    key: &'a str,
    value: &'a str,
}

pub(crate) async fn run(args: InspectArgs, output: &Output) -> Result<(), Failure> {
    if let Some((authority, name)) = on_server(&args.src)? {
        if args.select.is_given() {
            let why = "of a checkpoint on a server everything is shown: leave the selection out"
                .to_owned();
            return Err(Error::Usage(why).into());
        }
        let name = target::checkpoint_name(&authority, &name)?;
        let manifest = Client::new(&authority)?.describe(&name).await?;
        let info = CheckpointInfo::from_json(&manifest)?;
        tell(&info.metadata, output, || {
            entries::show_landed(&info, output);
        });
        return Ok(());
    }
    let source = entries::open(args.src, args.select.options(true)).await?;
    tell(source.metadata(), output, || {
        entries::tell_skipped(&source, output);
        entries::show(&source, None, output);
    });
    Ok(())
}

/// Host and name, when the only source is on a server. `a:b` is one only where no
/// file is called so.
fn on_server(src: &[PathBuf]) -> Result<Option<(String, String)>, Failure> {
    for path in src {
        let is_url = path.to_str().is_some_and(|p| p.starts_with("ferry://"));
        if !is_url && path.symlink_metadata().is_ok() {
            continue;
        }
        if let Ok(Target::Server { authority, name }) = Target::parse(path.as_os_str()) {
            if src.len() > 1 {
                let why = "a checkpoint on a server is inspected alone".to_owned();
                return Err(Error::Usage(why).into());
            }
            return Ok(Some((authority, name)));
        }
    }
    Ok(None)
}

/// Metadata come first for programs and last for people.
fn tell(metadata: &BTreeMap<String, String>, output: &Output, entries: impl FnOnce()) {
    for (key, value) in metadata {
        output.event("metadata", &MetadataEvent { key, value });
    }
    entries();
    for (key, value) in metadata {
        output.human(&format!(
            "metadata {}: {}",
            units::shown(key),
            units::shown(value)
        ));
    }
}
