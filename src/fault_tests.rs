//! Every call of the file system fails, once and from then on, in a whole push: the
//! process lives, the error has a class, no durable byte is lost, the name shows the old
//! state or the new one, and the next push without faults is complete.
//!
//! `TENSORFERRY_FAULTS=all` = every call with every error; a number = seed of the sample.

use crate::{
    Checkpoint, Client, CommitMode, Error, Lanes, PushOptions, Reason, Server, SourceSet,
    WriteMode,
    fault::plan::{self, Moment, Plan},
    format::npy::encode_header,
    plan::CheckpointName,
    store::{
        Catalog,
        journal::{JournalError, replay},
    },
};
use rustix::io::Errno;
use std::{
    collections::BTreeMap,
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::{sync::oneshot, task::JoinHandle};

/// Tells the process that it is one of its own.
const CHILD: &str = "TENSORFERRY_FAULTS_CHILD";
/// Longer than any push of these takes.
const PATIENCE: Duration = Duration::from_secs(120);
/// Older files than this are known to be unchanged.
const SETTLED: Duration = Duration::from_millis(2_200);
/// The entry whose staged file somebody else removes.
const REMOVED: &str = "second";
const CHUNK_LEN: u32 = 256 << 10;
const ERRORS: [Errno; 3] = [Errno::IO, Errno::NOSPC, Errno::MFILE];
/// About as many calls of each scenario are tried unless all are.
const SAMPLE: u64 = 14;

static PANIC_COUNT: AtomicU64 = AtomicU64::new(0);

/// What is pushed into what.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    /// A first push.
    Fresh,
    /// One that goes on with an unfinished one and replaces an older version.
    Resumed,
    /// So many files that a group is synced by `syncfs`.
    Many,
}

impl Scenario {
    const ALL: [Scenario; 3] = [Scenario::Fresh, Scenario::Resumed, Scenario::Many];

    fn options(self) -> PushOptions {
        let mut options = PushOptions {
            chunk_len: Some(CHUNK_LEN),
            retries: 0,
            lanes: Lanes::Fixed(1),
            ..PushOptions::default()
        };
        match self {
            Scenario::Fresh => {}
            Scenario::Resumed => {
                options.commit_mode = CommitMode::Strict;
                (options.overwrite, options.verify) = (true, true);
            }
            Scenario::Many => options.commit_mode = CommitMode::End,
        }
        options
    }

    fn write_mode(self) -> WriteMode {
        match self {
            Scenario::Resumed => WriteMode::Map,
            _ => WriteMode::Auto,
        }
    }
}

/// A checkpoint of one scenario: file names and data.
fn files(scenario: Scenario, version: u8) -> BTreeMap<String, Vec<u8>> {
    let data = |len: usize, salt: u8| -> Vec<u8> {
        let mut bytes = vec![0; len];
        let mut hasher = blake3::Hasher::new();
        hasher.update(&[version, salt]);
        hasher.finalize_xof().fill(&mut bytes);
        bytes
    };
    let mut files = BTreeMap::new();
    match scenario {
        Scenario::Many => {
            for i in 0..70 {
                files.insert(format!("w{i:02}"), data(i * 7, i as u8));
            }
        }
        _ => {
            files.insert("big".to_owned(), data(5 * CHUNK_LEN as usize + 77, 1));
            files.insert("small".to_owned(), data(100, 2));
            files.insert(REMOVED.to_owned(), data(2 * CHUNK_LEN as usize + 5, 3));
            files.insert("none".to_owned(), Vec::new());
        }
    }
    files
}

fn write_source(dir: &Path, files: &BTreeMap<String, Vec<u8>>) {
    fs::create_dir(dir).unwrap();
    for (name, data) in files {
        let header = encode_header("|u1", false, &[data.len() as u64]);
        fs::write(
            dir.join(format!("{name}.npy")),
            [&header, &data[..]].concat(),
        )
        .unwrap();
    }
    fs::write(dir.join("config.json"), b"{}").unwrap();
}

struct Running {
    client: Client,
    stop: oneshot::Sender<()>,
    serving: JoinHandle<Result<(), Error>>,
}

impl Running {
    async fn start(root: &Path, scenario: Scenario) -> Result<Running, Error> {
        let server = Server::builder(root).write_mode(scenario.write_mode());
        let server = server.bind(([127, 0, 0, 1], 0).into()).await?;
        let client = Client::new(&server.local_addr().to_string())?;
        let (stop, stopped) = oneshot::channel();
        let serving = tokio::spawn(server.serve(async {
            let _ = stopped.await;
        }));
        Ok(Running {
            client,
            stop,
            serving,
        })
    }

    async fn stop(self) {
        let _ = self.stop.send(());
        drop(self.client);
        let served = tokio::time::timeout(PATIENCE, self.serving).await;
        served.expect("the server does not stop").unwrap().unwrap();
    }
}

/// One push, and how many of its bytes were acked durable. The source is opened anew.
async fn push(
    client: &Client,
    source: &Path,
    name: &CheckpointName,
    options: PushOptions,
) -> (Result<(), Error>, u64) {
    let path = [source.to_owned()];
    let opened = tokio::task::spawn_blocking(move || SourceSet::open(&path, &Default::default()));
    let opened = match opened.await.unwrap() {
        Ok(opened) => Arc::new(opened),
        Err(error) => return (Err(Error::Source(error)), 0),
    };
    let transfer = client.push(opened, name, options);
    let watcher = transfer.watcher();
    let result = tokio::time::timeout(PATIENCE, async { transfer.await }).await;
    let result = result.expect("the push hangs");
    (result.map(drop), watcher.progress().durable_bytes)
}

struct Case {
    scenario: Scenario,
    source: PathBuf,
    new: BTreeMap<String, Vec<u8>>,
    old: Option<BTreeMap<String, Vec<u8>>>,
    /// The root as it is before the push.
    template: PathBuf,
    name: CheckpointName,
}

impl Case {
    async fn new(scenario: Scenario, temp: &Path) -> Case {
        let dir = temp.join(format!("{scenario:?}"));
        let (source, template) = (dir.join("source"), dir.join("template"));
        let name: CheckpointName = "runs/step".parse().unwrap();
        let new = files(scenario, 1);
        let mut old = None;
        if scenario != Scenario::Resumed {
            fs::create_dir(&template).unwrap();
        } else {
            let files = files(scenario, 0);
            write_source(&dir.join("old"), &files);
            let staging = format!(".tensorferry/transfers/{}/data", name.short_hash());
            let removed = template.join(staging).join(format!("{REMOVED}.npy"));
            let mut made = false;
            // What a sender that fails has handed over depends on the moment.
            for _ in 0..10 {
                let _ = fs::remove_dir_all(&template);
                fs::create_dir(&template).unwrap();
                let server = Running::start(&template, scenario).await.unwrap();
                let done = push(&server.client, &dir.join("old"), &name, scenario.options()).await;
                done.0.unwrap();
                made = unfinished(&server.client, &source, &name, scenario).await;
                server.stop().await;
                made &= removed.exists();
                if made {
                    break;
                }
            }
            assert!(made, "no unfinished transfer was made");
            // Half of it is to be sent again.
            fs::remove_file(removed).unwrap();
            old = Some(files);
        }
        Case {
            scenario,
            source,
            new,
            old,
            template,
            name,
        }
    }

    /// The name shows nothing, the old version or the new one, whole; `true`: the new one.
    fn check_name(&self, root: &Path, context: &str) -> bool {
        let folder = root.join(self.name.as_str());
        if !folder.join("manifest.json").exists() {
            assert!(self.old.is_none(), "{context}: the old version is gone");
            return false;
        }
        let landed = Checkpoint::open(&folder).unwrap_or_else(|e| panic!("{context}: {e}"));
        let shows = |files: &BTreeMap<String, Vec<u8>>| {
            landed.tensors().count() == files.len()
                && files.iter().all(|(name, data)| {
                    let view = landed.tensor(name).ok().flatten();
                    view.is_some_and(|view| view.bytes() == &data[..])
                })
        };
        if shows(&self.new) {
            return true;
        }
        let is_old = self.old.as_ref().is_some_and(shows);
        assert!(is_old, "{context}: the name shows neither version");
        false
    }

    /// Everything that the journal calls durable is there with the bytes of the source.
    fn check_staging(&self, root: &Path, acked: u64, context: &str) {
        let staging = root
            .join(".tensorferry/transfers")
            .join(self.name.short_hash());
        let mut durable_bytes = 0;
        match fs::File::open(staging.join("journal")).map(|file| replay(&file)) {
            Ok(Ok(replay)) => {
                let grid = replay.header.grid().unwrap();
                for entry in replay.state.entries.values() {
                    let header = &entry.record.header;
                    let cells: Vec<u64> = entry.durable.members().collect();
                    if cells.is_empty() {
                        continue;
                    }
                    let path = staging.join("data").join(&entry.record.file);
                    if header.name == REMOVED && self.old.is_some() && !path.exists() {
                        // No session has come so far as to miss it.
                        continue;
                    }
                    let file = fs::File::open(&path)
                        .unwrap_or_else(|e| panic!("{context}: {}: {e}", path.display()));
                    let base = file.metadata().unwrap().len() - header.byte_len;
                    let config = b"{}".to_vec();
                    let data = self.new.get(header.name.as_str()).unwrap_or(&config);
                    for cell in cells {
                        let (offset, len) = grid.cell_span(header.byte_len, cell).unwrap();
                        let mut found = vec![0; len as usize];
                        file.read_exact_at(&mut found, base + offset).unwrap();
                        let expected = &data[offset as usize..][..len as usize];
                        assert!(
                            found == expected,
                            "{context}: cell {cell} of {}",
                            header.name
                        );
                        durable_bytes += u64::from(len);
                    }
                }
            }
            Ok(Err(JournalError::BadHeader)) | Err(_) => {}
            Ok(Err(error)) => panic!("{context}: {error}"),
        }
        assert!(
            acked <= durable_bytes,
            "{context}: {acked} bytes were acked and {durable_bytes} are durable"
        );
    }

    /// Pushes under a plan, then without. Returns which call failed.
    async fn run(&self, root: &Path, plan: Plan) -> Option<&'static str> {
        let _ = fs::remove_dir_all(root);
        copy(&self.template, root);
        let mut context = format!("{:?}, {plan:?}", self.scenario);
        let (name, options) = (&self.name, self.scenario.options());
        plan::arm(Some(plan));
        let started = Running::start(root, self.scenario).await;
        let (mut server, error, acked) = match started {
            Ok(server) => {
                let (result, acked) =
                    push(&server.client, &self.source, name, options.clone()).await;
                (Some(server), result.err(), acked)
            }
            Err(error) => (None, Some(error), 0),
        };
        // One that stops stops while everything still fails.
        let stops = plan.at.is_multiple_of(2);
        if stops && let Some(server) = server.take() {
            server.stop().await;
        }
        let outcome = plan::disarm();
        context = format!("{context}, {:?}", outcome.hit);
        if let Some(error) = &error {
            check_typed(error, outcome.hit, &context);
            assert!(
                outcome.hit.is_some(),
                "{context}: failed by itself: {error:?}"
            );
        }
        let is_new = self.check_name(root, &context);
        assert!(
            is_new || error.is_some(),
            "{context}: done and not published"
        );
        if !is_new && server.is_none() {
            self.check_staging(root, acked, &context);
        }
        let server = match server {
            Some(server) => server,
            None => Running::start(root, self.scenario)
                .await
                .unwrap_or_else(|e| panic!("{context}: no start after it: {e:?}")),
        };
        let (result, _) = push(&server.client, &self.source, name, options).await;
        result.unwrap_or_else(|e| panic!("{context}: no push after it: {e:?}"));
        server.stop().await;
        assert!(self.check_name(root, &context), "{context}: not published");
        let left = Catalog::open(root).unwrap().list_transfers().unwrap();
        assert!(left.is_empty(), "{context}: staging is left");
        assert_eq!(PANIC_COUNT.load(Ordering::SeqCst), 0, "{context}: a panic");
        outcome.hit
    }
}

/// Makes a transfer whose bytes are durable and that is not finished: its source could not
/// be looked at again.
async fn unfinished(
    client: &Client,
    source: &Path,
    name: &CheckpointName,
    scenario: Scenario,
) -> bool {
    for at in 1..50 {
        plan::arm(Some(Plan {
            at,
            only: Some("source_stat"),
            ..Plan::default()
        }));
        let (result, _) = push(client, source, name, scenario.options()).await;
        plan::disarm();
        if result.is_ok() {
            return false;
        }
        // Its receiver makes durable what it has.
        let left = loop {
            let left = client.status(name).await.unwrap().transfer;
            match left {
                Some(left) if left.active => tokio::time::sleep(Duration::from_millis(1)).await,
                left => break left,
            }
        };
        let durable_bytes = left.map_or(0, |left| left.durable_bytes);
        if durable_bytes >= u64::from(CHUNK_LEN) {
            return true;
        }
    }
    false
}

/// The class of an error says what failed: storage, space or the source.
fn check_typed(error: &Error, hit: Option<&str>, context: &str) {
    let reason = match error {
        Error::Refused { reason, .. } | Error::Store { reason, .. } => *reason,
        Error::Source(_) => return,
        other => panic!("{context}: {other:?}"),
    };
    let is_fit = matches!(
        reason,
        Reason::StorageIoError | Reason::DiskQuota | Reason::TooMany
    );
    assert!(is_fit, "{context}: {hit:?} became {error:?}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for item in fs::read_dir(from).unwrap() {
        let item = item.unwrap();
        let target = to.join(item.file_name());
        match item.file_type().unwrap().is_dir() {
            true => copy(&item.path(), &target),
            false => drop(fs::copy(item.path(), target).unwrap()),
        }
    }
}

/// All that is tried with one scenario: number of runs.
async fn try_all(scenario: Scenario, temp: &Path, everything: bool, seed: u64) -> u64 {
    let case = Case::new(scenario, temp).await;
    let root = temp.join("root");
    let _ = fs::remove_dir_all(&root);
    copy(&case.template, &root);
    plan::arm(None);
    let server = Running::start(&root, scenario).await.unwrap();
    let done = push(&server.client, &case.source, &case.name, scenario.options()).await;
    done.0.unwrap();
    server.stop().await;
    let clean = plan::disarm();
    println!(
        "{scenario:?}: {} calls: {:?}",
        clean.call_count, clean.names
    );
    let stride = match everything {
        true => 1,
        false => clean.call_count.div_ceil(SAMPLE).max(1),
    };
    let mut run_count = 0;
    let mut hits: BTreeMap<&str, u64> = BTreeMap::new();
    let combinations = || {
        ERRORS.into_iter().flat_map(|errno| {
            [Moment::Before, Moment::After]
                .into_iter()
                .flat_map(move |moment| [false, true].map(|forever| (errno, moment, forever)))
        })
    };
    let count = combinations().count() as u64;
    let mut at = 1 + seed % stride;
    loop {
        let mut is_clean = true;
        for (i, (errno, moment, forever)) in combinations().enumerate() {
            // In a sample each call has one of them in turn, in both modes.
            let turn = (at / stride + seed) % (count / 2);
            if !everything && i as u64 / 2 != turn {
                continue;
            }
            let plan = Plan {
                at,
                forever,
                errno,
                moment,
                only: None,
            };
            let hit = case.run(&root, plan).await;
            run_count += 1;
            if let Some(hit) = hit {
                *hits.entry(hit).or_default() += 1;
                is_clean = false;
            }
        }
        if is_clean {
            break;
        }
        at += stride;
    }
    println!("{scenario:?}: {run_count} runs, seed {seed}, last call {at}: {hits:?}");
    assert!(run_count > SAMPLE, "{run_count}");
    run_count
}

#[test]
fn whichever_call_of_the_file_system_fails_nothing_acknowledged_is_lost() {
    if std::env::var_os(CHILD).is_none() {
        let name = concat!(
            module_path!(),
            "::whichever_call_of_the_file_system_fails_nothing_acknowledged_is_lost"
        );
        let name = name.split_once("::").unwrap().1;
        let mut child = Command::new(std::env::current_exe().unwrap());
        child.args([name, "--exact", "--nocapture"]).env(CHILD, "1");
        let output = child.output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{text}{}", String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success() && text.contains("runs, seed"));
        return;
    }
    let choice = std::env::var("TENSORFERRY_FAULTS").unwrap_or_default();
    let (everything, seed) = (choice == "all", choice.parse().unwrap_or(1));
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        PANIC_COUNT.fetch_add(1, Ordering::SeqCst);
        hook(info);
    }));
    let temp = tempfile::tempdir().unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        for scenario in Scenario::ALL {
            let dir = temp.path().join(format!("{scenario:?}"));
            fs::create_dir(&dir).unwrap();
            write_source(&dir.join("source"), &files(scenario, 1));
        }
        // Or their fingerprints would not be trusted, and nothing be unchanged.
        tokio::time::sleep(SETTLED).await;
        for scenario in Scenario::ALL {
            try_all(scenario, temp.path(), everything, seed).await;
        }
    });
}
