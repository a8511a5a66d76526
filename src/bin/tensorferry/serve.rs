//! `serve`: receives checkpoints into a folder.

use crate::{args::ServeArgs, exit::Failure, interrupt::Interrupt, limits, output::Output, ready};
use serde::Serialize;
use std::{ffi::OsStr, net::SocketAddr, path::PathBuf};
use tensorferry::{Durability, Error, OnReady, Server, plan::CheckpointName};

#[derive(Serialize)]
struct ListeningEvent {
    address: SocketAddr,
}

pub(crate) async fn run(args: ServeArgs, output: &'static Output) -> Result<(), Failure> {
    let mut interrupt = Interrupt::listen()?;
    limits::raise_open_files();
    let address = resolve(&args.listen).await?;
    let mut builder = Server::builder(&args.root)
        .budget_bytes(args.budget)
        .write_mode(args.write.into())
        .staging_ttl(args.staging_ttl)
        .quota_checkpoint(args.quota_checkpoint)
        .quota_staging(args.quota_staging)
        .insecure(args.insecure);
    if let Some(chunk_len) = args.chunk {
        builder = builder.chunk_len(chunk_len);
    }
    if args.ready {
        builder = builder.on_ready(OnReady::new(|tensor| ready::tell_of_many(tensor, output)));
    }
    for export in &args.export {
        let (name, path) = named_export(export)?;
        builder = builder.export(name, path);
    }
    let server = builder.bind(address).await.map_err(|error| match error {
        Error::Listen { .. } => Failure::with_hint(
            error,
            "choose another port with --listen, or an address of this machine; port 0 picks a free one",
        ),
        error => error.into(),
    })?;
    let address = server.local_addr();
    // Programs that picked port 0 wait for this line, in every format.
    if output.is_json() {
        output.event("listening", &ListeningEvent { address });
    } else {
        output.line(&format!("listening on {address}"));
    }
    output.talk(&format!(
        "receiving into {} ({}: {}); Ctrl-C stops",
        args.root.display(),
        server.file_system(),
        match server.durability() {
            Durability::Disk => "what is durable survives a power cut",
            _ => "nothing survives a power cut",
        }
    ));
    server
        .serve(async {
            interrupt.first().await;
            output.talk("stopping: what has arrived is made durable (Ctrl-C again stops at once)");
        })
        .await?;
    Ok(())
}

/// `NAME=PATH`, or a path that says its own name.
fn named_export(word: &OsStr) -> Result<(CheckpointName, PathBuf), Failure> {
    let named = word.to_str().and_then(|word| word.split_once('='));
    if let Some((name, path)) = named {
        return Ok((name.parse().map_err(Error::from)?, PathBuf::from(path)));
    }
    let path = PathBuf::from(word);
    let name = path.file_name().and_then(OsStr::to_str);
    let unnamed = || Error::Usage(format!("{} has no name: write NAME=PATH", path.display()));
    let name = name.ok_or_else(unnamed)?.parse().map_err(Error::from)?;
    Ok((name, path))
}

async fn resolve(listen: &str) -> Result<SocketAddr, Failure> {
    let usage = |why: String| Error::Usage(format!("cannot listen on {listen:?}: {why}"));
    let mut found = tokio::net::lookup_host(listen)
        .await
        .map_err(|e| usage(e.to_string()))?;
    let address = found
        .next()
        .ok_or_else(|| usage("the host has no address".to_owned()))?;
    Ok(address)
}
