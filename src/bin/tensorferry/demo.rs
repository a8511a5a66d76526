//! `demo`: a push that is cut off half way, resumed and verified.

use crate::{
    args::DemoArgs, demo_cut, demo_source, entries, exit::Failure, interrupt::Interrupt,
    output::Output, units,
};
use rayon::prelude::*;
use serde::Serialize;
use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};
use tensorferry::{
    Checkpoint, CheckpointSummary, Client, Error, ErrorCode, PushOptions, Server, TransferReport,
    format::Dtype,
    format::codec::CodecChoice,
    plan::{CheckpointName, EntryKind},
    protocol::Reason,
    source::SourceSet,
};

const NAME: &str = "demo";
/// Sources younger than this cannot prove that they did not change since.
const SETTLE: Duration = Duration::from_millis(2_100);
/// The server notices a cut at once; this is for a machine that is very busy.
const CUT_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes compared at once.
const COMPARE_BYTES: u64 = 1 << 20;

#[derive(Serialize)]
struct DemoEvent<'a> {
    tensors: u64,
    bytes: u64,
    first_sent_bytes: u64,
    durable_bytes: u64,
    second_sent_bytes: u64,
    resumed_bytes: u64,
    resent_bytes: u64,
    seconds: f64,
    compared_bytes: u64,
    folder: &'a str,
}

/// What the two pushes did.
struct Story {
    first_sent_bytes: u64,
    durable_bytes: u64,
    second: TransferReport,
}

pub(crate) async fn run(args: DemoArgs, output: &Output) -> Result<(), Failure> {
    let mut interrupt = Interrupt::listen()?;
    let is_ours = args.dir.as_deref().is_none_or(|dir| !dir.exists());
    let dir = make_dir(args.dir.as_deref())?;
    output.talk(&format!("working in {}", dir.display()));
    let result = play(&dir, args.src, &mut interrupt, output).await;
    if matches!(&result, Err(failure) if failure.code() == ErrorCode::Interrupted) {
        output.talk(&format!("stopped; removing {}", dir.display()));
        let removed = tokio::task::spawn_blocking(move || remove(&dir, is_ours)).await;
        removed
            .map_err(|e| Error::Bug(e.to_string()))?
            .map_err(|e| io_failure("remove the folder", e))?;
    }
    result
}

/// Everything that the demo made; a folder that was there before stays.
fn remove(dir: &Path, is_ours: bool) -> io::Result<()> {
    if is_ours {
        return fs::remove_dir_all(dir);
    }
    ["source", "received"]
        .map(|made| dir.join(made))
        .iter()
        .filter(|made| made.exists())
        .try_for_each(fs::remove_dir_all)
}

async fn play(
    dir: &Path,
    src: Option<PathBuf>,
    interrupt: &mut Interrupt,
    output: &Output,
) -> Result<(), Failure> {
    let source_path = match src {
        Some(path) => path,
        None => make_source(dir, interrupt, output).await?,
    };
    let source = entries::open(vec![source_path.clone()], Default::default()).await?;
    entries::tell_skipped(&source, output);
    let (tensors, files) = entries::counts(&source);
    output.human(&format!(
        "source     {}: {}, {}, {}",
        source_path.display(),
        units::count(tensors, "tensor"),
        units::count(files, "file"),
        units::bytes(source.total_bytes())
    ));
    let root = dir.join("received");
    let server = Server::builder(&root)
        .bind(SocketAddr::from((Ipv4Addr::LOCALHOST, 0)))
        .await?;
    let address = server.local_addr();
    let (stop, stopped) = tokio::sync::oneshot::channel::<()>();
    let serving = tokio::spawn(server.serve(async {
        let _ = stopped.await;
    }));
    // What is dropped here stops; the server is waited for, so that nobody writes
    // into the folder any more when it is removed.
    let story = tokio::select! {
        story = Box::pin(push_twice(&source, address, output)) => story,
        () = interrupt.first() => Err(Error::Interrupted.into()),
    };
    let _ = stop.send(());
    serving.await.map_err(|e| Error::Bug(e.to_string()))??;
    let story = story?;

    let folder = root.join(NAME);
    let (source, landed) = (Arc::clone(&source), folder.clone());
    let compared = tokio::task::spawn_blocking(move || {
        compare(&source, &landed).map(|bytes| (bytes, sample(&landed)))
    });
    let compared = tokio::select! {
        compared = compared => compared,
        () = interrupt.first() => return Err(Error::Interrupted.into()),
    };
    let (compared_bytes, sample) = compared.map_err(|e| Error::Bug(e.to_string()))??;
    tell_end(&story, compared_bytes, &folder, sample, output);
    output.talk(&format!(
        "remove it all with: rm -r {}",
        units::shell_quote(&dir.display().to_string())
    ));
    Ok(())
}

/// The given folder, which must be empty, or a fresh one.
fn make_dir(given: Option<&Path>) -> Result<PathBuf, Failure> {
    let failed = |e| io_failure("make the folder", e);
    if let Some(dir) = given {
        fs::create_dir_all(dir).map_err(failed)?;
        if fs::read_dir(dir).map_err(failed)?.next().is_some() {
            return Err(Error::Usage(format!("{} is not empty", dir.display())).into());
        }
        return dir.canonicalize().map_err(failed);
    }
    let parent = std::env::temp_dir();
    for number in 0u32.. {
        let dir = parent.join(format!("tensorferry-demo-{}-{number}", std::process::id()));
        match fs::create_dir(&dir) {
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            made => return made.map(|()| dir).map_err(failed),
        }
    }
    Err(failed(io::ErrorKind::AlreadyExists.into()))
}

async fn make_source(
    dir: &Path,
    interrupt: &mut Interrupt,
    output: &Output,
) -> Result<PathBuf, Failure> {
    let source = dir.join("source");
    output.talk("making a sharded safetensors checkpoint of 256 MiB");
    let path = source.clone();
    let made = tokio::task::spawn_blocking(move || {
        fs::create_dir(&path).and_then(|()| demo_source::write(&path))
    });
    made.await
        .map_err(|e| Error::Bug(e.to_string()))?
        .map_err(|e| io_failure("make the checkpoint", e))?;
    tokio::select! {
        () = tokio::time::sleep(SETTLE) => Ok(source),
        () = interrupt.first() => Err(Error::Interrupted.into()),
    }
}

/// Pushes through a connection that breaks, then again.
async fn push_twice(
    source: &Arc<SourceSet>,
    address: SocketAddr,
    output: &Output,
) -> Result<Story, Failure> {
    let name: CheckpointName = NAME.parse()?;
    let total_bytes = source.total_bytes();
    // At least one byte passes, or there would be no connection to cut.
    let cut =
        demo_cut::start(address, (total_bytes / 2).max(1)).map_err(|e| io_failure("relay", e))?;
    let mut options = PushOptions::default();
    options.retries = 0;
    // Raw, or a compressible source might arrive before the cut.
    options.codec = CodecChoice::None;
    let transfer = Client::new(&cut.to_string())?.push(Arc::clone(source), &name, options);
    let watcher = transfer.watcher();
    let first = transfer.await;
    let first_sent_bytes = watcher.progress().wire_bytes;
    match first {
        Err(Error::Transport { message, .. }) => output.human(&format!(
            "push 1     sent {} of {}, then the connection was cut: {}",
            units::bytes(first_sent_bytes),
            units::bytes(total_bytes),
            units::shown(&message)
        )),
        Err(error) => return Err(error.into()),
        Ok(_) => return Err(Error::Bug("the connection was not cut".to_owned()).into()),
    }

    let client = Client::new(&address.to_string())?;
    let unfinished = wait_until_idle(&client, &name).await?;
    let durable_bytes = unfinished.map_or(0, |row| row.durable_bytes);
    output.human(&format!(
        "durable    {} ({} %) on the receiver, by its journal",
        units::bytes(durable_bytes),
        units::percent(durable_bytes, total_bytes)
    ));

    let second = client
        .push(Arc::clone(source), &name, PushOptions::default())
        .await?;
    output.human(&format!(
        "push 2     resumed {}, sent {} in {} ({})",
        units::bytes(second.resumed_bytes),
        units::bytes(second.wire_bytes),
        units::duration(second.elapsed),
        units::rate(second.wire_bytes, second.elapsed)
    ));
    Ok(Story {
        first_sent_bytes,
        durable_bytes,
        second,
    })
}

/// The unfinished transfer once the server has noticed the cut and committed.
async fn wait_until_idle(
    client: &Client,
    name: &CheckpointName,
) -> Result<Option<CheckpointSummary>, Failure> {
    let begun = Instant::now();
    loop {
        let rows = client.list(name.as_str()).await?;
        let row = rows
            .into_iter()
            .find(|row| row.name == name.as_str() && !row.published);
        if row.as_ref().is_none_or(|row| !row.active) || begun.elapsed() > CUT_TIMEOUT {
            return Ok(row);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Compares every byte that landed with the source. Returns how many they are.
fn compare(source: &SourceSet, folder: &Path) -> Result<u64, Error> {
    let checkpoint = Checkpoint::open(folder)?;
    let landed_count = checkpoint.tensors().len() + checkpoint.files().len();
    if landed_count != source.entries().len() {
        let why = format!(
            "{} entries were sent, {landed_count} landed",
            source.entries().len()
        );
        return Err(Error::Damaged {
            name: NAME.to_owned(),
            why,
        });
    }
    let compared = (0..source.entries().len())
        .into_par_iter()
        .map(|index| compare_entry(source, index, &checkpoint));
    compared.sum()
}

fn compare_entry(source: &SourceSet, index: usize, checkpoint: &Checkpoint) -> Result<u64, Error> {
    let header = &source.entries()[index].header;
    let damaged = |why: String| Error::Damaged {
        name: header.name.clone(),
        why,
    };
    let place = match header.kind {
        EntryKind::Tensor { dtype } => checkpoint
            .tensors()
            .find(|t| t.name == header.name)
            .and_then(|t| {
                let is_same =
                    t.dtype == dtype && t.shape == header.shape && t.byte_len == header.byte_len;
                is_same.then_some((&t.file, t.data_offset))
            }),
        EntryKind::Blob => checkpoint
            .files()
            .iter()
            .find(|f| f.name == header.name)
            .map(|f| (&f.file, 0)),
    };
    let (path, data_offset) =
        place.ok_or_else(|| damaged("it did not land with its dtype and shape".to_owned()))?;
    let unreadable = |e: io::Error| damaged(format!("{path} cannot be read: {e}"));
    let file = File::open(checkpoint.dir().join(path)).map_err(unreadable)?;
    let file_len = file.metadata().map_err(unreadable)?.len();
    if file_len != data_offset + header.byte_len {
        return Err(damaged(format!(
            "{path} has {file_len} bytes, {} were expected",
            data_offset + header.byte_len
        )));
    }
    let (mut sent, mut landed, mut at) = (Vec::new(), Vec::new(), 0);
    while at < header.byte_len {
        let len = COMPARE_BYTES.min(header.byte_len - at) as usize;
        sent.resize(len, 0);
        landed.resize(len, 0);
        source.read_at(index, at, &mut sent)?;
        file.read_exact_at(&mut landed, data_offset + at)
            .map_err(unreadable)?;
        if let Some(differs) = sent.iter().zip(&landed).position(|(a, b)| a != b) {
            let (a, b) = (sent[differs], landed[differs]);
            return Err(damaged(format!(
                "byte {} is {b:#04x}, {a:#04x} was sent",
                at + differs as u64
            )));
        }
        at += len as u64;
    }
    Ok(at)
}

/// A file to open with numpy: one whose type numpy knows, if there is one.
fn sample(folder: &Path) -> Option<PathBuf> {
    let checkpoint = Checkpoint::open(folder).ok()?;
    let plain = |dtype: Dtype| matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::F64 | Dtype::I64);
    let found = checkpoint
        .tensors()
        .find(|t| plain(t.dtype) && t.byte_len > 0);
    let file = found
        .or_else(|| checkpoint.tensors().next())
        .map(|t| t.file.clone())?;
    Some(folder.join(file))
}

fn tell_end(
    story: &Story,
    compared_bytes: u64,
    folder: &Path,
    sample: Option<PathBuf>,
    output: &Output,
) {
    let second = &story.second;
    let sent_bytes = story.first_sent_bytes + second.wire_bytes;
    let resent_bytes = sent_bytes.saturating_sub(second.bytes);
    let shown = folder.display().to_string();
    output.event(
        "demo",
        &DemoEvent {
            tensors: second.tensor_count,
            bytes: second.bytes,
            first_sent_bytes: story.first_sent_bytes,
            durable_bytes: story.durable_bytes,
            second_sent_bytes: second.wire_bytes,
            resumed_bytes: second.resumed_bytes,
            resent_bytes,
            seconds: second.elapsed.as_secs_f64(),
            compared_bytes,
            folder: &shown,
        },
    );
    output.human(&format!(
        "sent twice {} ({:.1} %), what was on its way when the connection broke",
        units::bytes(resent_bytes),
        resent_bytes as f64 * 100.0 / second.bytes.max(1) as f64
    ));
    output.human(&format!(
        "compared   {} ({compared_bytes} bytes) with the source: all equal",
        units::bytes(compared_bytes)
    ));
    output.human(&format!("landed in  {shown}"));
    if let Some(path) = sample {
        let program = "import sys, numpy; print(repr(numpy.load(sys.argv[1], mmap_mode='r')))";
        let path = units::shell_quote(&path.display().to_string());
        output.human(&format!("open one   python3 -c \"{program}\" {path}"));
    }
}

fn io_failure(what: &str, error: io::Error) -> Failure {
    Failure::from(Error::Store {
        reason: Reason::StorageIoError,
        message: format!("cannot {what}"),
        source: Some(error),
    })
}
