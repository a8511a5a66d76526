//! The sending side of a pull: the peer that dialled says what it wants, and this side
//! sends it as it would in a push. Further lanes are made by the peer and handed over.

use super::{
    error::SendError,
    progress::ProgressCell,
    rate::Throttle,
    send::{Connect, SendContext, SendLane, send, status_error},
};
use crate::{
    error::Error,
    opening::{open_of_key, open_of_set},
    options::{LANES_MAX, Lanes, PushOptions, RATE_MIN},
    plan::{CheckpointName, Digest16, first_16},
    protocol::{
        MAX_CONTROL_BYTES, ManifestPromise, Open, OutFormat, ProtocolError, PullFirst, PullOpen,
        Reason,
    },
    source::{
        First, Globs, GrowingSource, NameFilter, SourceError, SourceOptions, SourceSet, Supply,
    },
    store::Catalog,
    wire::{LaneSender, decode_pull_first, pb},
};
use std::{
    collections::{BTreeMap, HashMap},
    error::Error as _,
    fmt,
    path::{Path, PathBuf},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Notify, Semaphore, oneshot, watch},
    time::timeout,
};
use tonic::{Streaming, body::Body};

/// The first frame of a call comes within this time.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// A pull in which nothing moves for so long ends. Reading everything back before it is
/// published may take the receiver a while.
const STALL_TIMEOUT: Duration = Duration::from_secs(600);
/// Times that a checkpoint is opened which is replaced in that moment.
const MAX_OPENINGS: u32 = 3;
/// Pulls at a time; each may hold `budget_bytes`.
pub(crate) const MAX_PULLS: usize = 16;
/// Of what is in memory: each may hold a copy of all of it.
pub(crate) const MAX_SNAPSHOTS: usize = 2;

/// What all pulls of a server share.
#[derive(Clone, Debug)]
pub(crate) struct OfferContext {
    pub(crate) catalog: Catalog,
    /// The folder of published checkpoints.
    pub(crate) root: PathBuf,
    /// Checkpoints elsewhere, by their names here.
    pub(crate) exports: Arc<BTreeMap<CheckpointName, Export>>,
    /// Memory for chunks on their way, for each pull.
    pub(crate) budget_bytes: u64,
    pub(crate) slots: Arc<Semaphore>,
    /// Of these, pulls of what is in memory.
    pub(crate) snapshots: Arc<Semaphore>,
    pub(crate) lanes: OfferedLanes,
    /// Becomes true when the server shuts down.
    pub(crate) draining: watch::Receiver<bool>,
}

/// A checkpoint that is offered and was never published here.
#[derive(Clone)]
pub(crate) enum Export {
    /// A file or folder of any format.
    Path(PathBuf),
    /// What this makes when a pull opens.
    Memory(Arc<Snapshot>),
}

type Snapshot = dyn Fn(&NameFilter) -> Result<GrowingSource, Error> + Send + Sync;

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Export::Path(path) => f.debug_tuple("Path").field(path).finish(),
            Export::Memory(_) => f.debug_tuple("Memory").finish_non_exhaustive(),
        }
    }
}

type ByToken = HashMap<Digest16, Arc<Waiting>>;

/// Where lanes of running pulls are handed over, by token. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub(crate) struct OfferedLanes {
    by_token: Arc<Mutex<ByToken>>,
}

/// Lanes of one pull that nobody has taken yet.
#[derive(Default)]
struct Waiting {
    lanes: Mutex<Vec<SendLane>>,
    came: Notify,
}

impl fmt::Debug for Waiting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Waiting").finish_non_exhaustive()
    }
}

impl Waiting {
    /// Those that are still there.
    fn lanes(&self) -> MutexGuard<'_, Vec<SendLane>> {
        let mut lanes = self.lanes.lock().unwrap_or_else(PoisonError::into_inner);
        lanes.retain(|lane| !lane.out.is_closed());
        lanes
    }

    fn give(&self, lane: SendLane) -> Result<(), ProtocolError> {
        let mut lanes = self.lanes();
        if lanes.len() >= LANES_MAX as usize {
            let why = "enough lanes are waiting";
            return Err(ProtocolError::new(Reason::TooMany, why));
        }
        lanes.push(lane);
        self.came.notify_one();
        Ok(())
    }

    /// The oldest one, once there is one.
    async fn take(&self) -> SendLane {
        loop {
            {
                let mut lanes = self.lanes();
                if !lanes.is_empty() {
                    let lane = lanes.remove(0);
                    if !lanes.is_empty() {
                        self.came.notify_one();
                    }
                    return lane;
                }
            }
            self.came.notified().await;
        }
    }
}

/// The place of a pull among those that take lanes; dropping it ends that, and what
/// waits there.
struct Listed {
    lanes: OfferedLanes,
    token: Digest16,
    waiting: Arc<Waiting>,
}

impl OfferedLanes {
    fn by_token(&self) -> MutexGuard<'_, ByToken> {
        self.by_token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, token: Digest16) -> Result<Listed, ProtocolError> {
        let waiting = Arc::new(Waiting::default());
        let mut by_token = self.by_token();
        if by_token.contains_key(&token) {
            let why = "a pull with this lane token is running";
            return Err(ProtocolError::new(Reason::Locked, why));
        }
        by_token.insert(token, Arc::clone(&waiting));
        Ok(Listed {
            lanes: self.clone(),
            token,
            waiting,
        })
    }

    fn get(&self, token: &Digest16) -> Result<Arc<Waiting>, ProtocolError> {
        let why = "no pull of this token is running";
        let found = self.by_token().get(token).cloned();
        found.ok_or_else(|| ProtocolError::new(Reason::NotFound, why))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        self.lanes.by_token().remove(&self.token);
        self.waiting.lanes().clear();
    }
}

/// Serves one call of Pull: frames of the receiver come in `body`, chunks go to `out`.
pub(crate) async fn offer(
    context: OfferContext,
    body: Body,
    out: LaneSender,
) -> Result<(), SendError> {
    let decoder = tonic_prost::ProstDecoder::<pb::ReceiverFrame>::default();
    let mut frames = Streaming::new_request(decoder, body, None, Some(MAX_CONTROL_BYTES));
    let first = timeout(OPEN_TIMEOUT, frames.message()).await;
    let first = first.map_err(|_| ProtocolError::new(Reason::Idle, "the call does not begin"))?;
    let Some(first) = first.map_err(|status| status_error(&status))? else {
        return Err(ProtocolError::new(Reason::BadFrame, "the stream ended before open").into());
    };
    let first = decode_pull_first(first)?;
    // Tells when the lane is done with.
    let (keeps, over) = oneshot::channel::<()>();
    let lane = SendLane {
        out,
        frames,
        _keeps: Box::new(keeps),
    };
    match first {
        PullFirst::Open(open) => serve(context, *open, lane).await,
        PullFirst::Join(token) => {
            context.lanes.get(&token)?.give(lane)?;
            let _ = over.await;
            Ok(())
        }
    }
}

/// Serves the control lane of a pull, and with it the pull.
async fn serve(context: OfferContext, wanted: PullOpen, lane: SendLane) -> Result<(), SendError> {
    if *context.draining.borrow() {
        return Err(ProtocolError::new(Reason::Draining, "the server is shutting down").into());
    }
    let Ok(_slot) = context.slots.try_acquire() else {
        let why = "the server serves as many pulls as it takes; try again later";
        return Err(ProtocolError::new(Reason::TooMany, why).into());
    };
    // Each may be a copy of a whole model, and is kept until its pull ends.
    let is_memory = matches!(
        context.exports.get(&wanted.checkpoint),
        Some(Export::Memory(_))
    );
    let _snapshot = match is_memory.then(|| context.snapshots.try_acquire()) {
        Some(Err(_)) => {
            let why = "as many pulls as may hold a copy of what is in memory are under way; try again later";
            return Err(ProtocolError::new(Reason::TooMany, why).into());
        }
        Some(Ok(permit)) => Some(permit),
        None => None,
    };
    let listed = context.lanes.add(wanted.lane_token)?;
    let (source, open, first) = {
        let context = context.clone();
        let wanted = wanted.clone();
        let opened = tokio::task::spawn_blocking(move || open_source(&context, &wanted));
        opened.await.map_err(|e| SendError::Bug(e.to_string()))??
    };
    let throttle = Throttle::new(None);
    throttle.set_rate(wanted.rate_bytes_per_second.map(|rate| rate.max(RATE_MIN)));
    let defaults = PushOptions::default();
    let progress = Arc::new(ProgressCell::default());
    let session = SendContext {
        source,
        connect: taking(Arc::clone(&listed.waiting)),
        lanes: match wanted.max_lanes {
            1 => Lanes::Fixed(1),
            _ => Lanes::Auto,
        },
        throttle: Arc::new(throttle),
        codec: defaults.codec,
        read_mode: defaults.read_mode,
        first: Arc::new(first),
        rehearsal: None,
        budget_bytes: context.budget_bytes,
        progress: Arc::clone(&progress),
        cancel: context.draining.clone(),
    };
    tracing::info!(checkpoint = %wanted.checkpoint, "a pull was opened");
    tokio::select! {
        sent = Box::pin(send(session, &open, lane)) => sent.map(drop),
        () = stalled(&progress) => {
            let why = format!("nothing moved for {} s", STALL_TIMEOUT.as_secs());
            Err(ProtocolError::new(Reason::Idle, why).into())
        }
    }
}

/// Lanes are not made here but taken as they are offered.
fn taking(waiting: Arc<Waiting>) -> Connect {
    Arc::new(move || {
        let waiting = Arc::clone(&waiting);
        Box::pin(async move { Ok(waiting.take().await) })
    })
}

/// Returns once nothing has moved for too long: whoever asks for a checkpoint and takes
/// nothing must not keep its slot.
async fn stalled(progress: &ProgressCell) {
    let moved = || {
        let now = progress.snapshot();
        (now.wire_bytes, now.settled_bytes, now.durable_bytes)
    };
    let mut last = moved();
    loop {
        tokio::time::sleep(STALL_TIMEOUT).await;
        let now = moved();
        if now == last {
            return;
        }
        last = now;
    }
}

/// What is sent, how its transfer opens, and what goes before the rest.
type Opened = (Supply, Open, First);

/// The checkpoint that is wanted, and how its transfer opens. One that is replaced in
/// that moment is opened again: the sums of one must not meet the files of another.
fn open_source(context: &OfferContext, wanted: &PullOpen) -> Result<Opened, SendError> {
    let name = &wanted.checkpoint;
    match context.exports.get(name) {
        Some(Export::Path(path)) => return open_path(path, None, wanted),
        Some(Export::Memory(snapshot)) => return open_memory(&**snapshot, wanted),
        None => {}
    }
    let manifest = || -> Result<Vec<u8>, ProtocolError> {
        let read = context.catalog.manifest(name).map_err(|error| {
            tracing::error!(%name, %error, "a manifest cannot be read");
            let why = format!("the manifest of {name} cannot be read; the server's log says why");
            ProtocolError::new(Reason::StorageIoError, why)
        })?;
        let why = || format!("no checkpoint {name} is published here");
        let absent = || ProtocolError::new(Reason::NotFound, why());
        read.map(|(_, bytes)| bytes).ok_or_else(absent)
    };
    let path = context.root.join(name.as_str());
    let mut before = manifest()?;
    for _ in 0..MAX_OPENINGS {
        let opened = open_path(&path, Some(&before), wanted);
        let after = manifest()?;
        if after == before {
            return opened;
        }
        before = after;
    }
    let why = format!("{name} is replaced again and again");
    Err(ProtocolError::new(Reason::SourceChanged, why).into())
}

fn open_path(path: &Path, manifest: Option<&[u8]>, wanted: &PullOpen) -> Result<Opened, SendError> {
    let name = &wanted.checkpoint;
    let mut options = SourceOptions::default();
    (options.include, options.exclude) = (wanted.include.clone(), wanted.exclude.clone());
    let opened = SourceSet::open(&[path], &options);
    let source = opened.map_err(|error| unopened(name, error))?;
    let unfit = |why: String| ProtocolError::new(Reason::Unsupported, why);
    let (source, container_header_len) = match wanted.out_format {
        OutFormat::Npy => (source, 0),
        OutFormat::Safetensors => source.for_safetensors().map_err(unfit)?,
    };
    let first = Globs::new("send first", &wanted.first);
    let first = first.and_then(|first| First::of_set(first, &source));
    let first = first.map_err(|e| ProtocolError::new(Reason::NotFound, e.to_string()))?;
    let asked = PushOptions {
        out_format: wanted.out_format,
        ..PushOptions::default()
    };
    let open = open_of_set(name, name.as_str(), &source, &asked);
    let open = Open {
        // What is published never changes, and its manifest has the sums of all of it: of
        // that no file need be old enough to be known again.
        fingerprint: match (manifest, open.manifest) {
            (Some(manifest), ManifestPromise::Complete { entries_digest, .. }) => {
                let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 published");
                hasher.update(manifest).update(&entries_digest);
                Some(first_16(hasher.finalize()))
            }
            _ => open.fingerprint,
        },
        transfer_id: wanted.transfer_id,
        container_header_len,
        codecs: open.codecs & wanted.codecs,
        ..open
    };
    Ok((Supply::Complete(Arc::new(source)), open, first))
}

/// Takes what is in memory now. A later session of the same pull gets what is there then,
/// and what has come is compared with it.
fn open_memory(snapshot: &Snapshot, wanted: &PullOpen) -> Result<Opened, SendError> {
    let name = &wanted.checkpoint;
    if wanted.out_format != OutFormat::Npy {
        let why = format!("{name} is in the memory of a process: it lands as .npy files only");
        return Err(ProtocolError::new(Reason::Unsupported, why).into());
    }
    let filter = NameFilter::new(&wanted.include, &wanted.exclude);
    let filter = filter.map_err(|error| unopened(name, error))?;
    let source = snapshot(&filter).map_err(|error| {
        tracing::error!(%name, %error, "a snapshot failed");
        let why = format!("no snapshot of {name} can be had; the server's log says why");
        ProtocolError::new(Reason::Unsupported, why)
    })?;
    let selected = source.select(&filter);
    selected.map_err(|error| unopened(name, error))?;
    source.seal();
    let first = Globs::new("send first", &wanted.first).and_then(|first| {
        source.check_used(&first)?;
        Ok(First::of_growing(first))
    });
    let first = first.map_err(|error| unopened(name, error))?;
    let (fingerprint, entries_digest) = (source.fingerprint(), source.headers_digest());
    let supply = Supply::Growing(Arc::new(source));
    let open = open_of_key(name, name.as_str(), name.as_str(), &PushOptions::default());
    let open = Open {
        manifest: ManifestPromise::Complete {
            total_bytes: supply.total_bytes(),
            entry_count: supply.entry_count() as u64,
            entries_digest,
        },
        fingerprint: Some(fingerprint),
        transfer_id: wanted.transfer_id,
        codecs: open.codecs & wanted.codecs,
        ..open
    };
    Ok((supply, open, first))
}

fn unopened(name: &CheckpointName, error: SourceError) -> ProtocolError {
    match error {
        SourceError::Selection { .. } => ProtocolError::new(Reason::NotFound, error.to_string()),
        // Where it lies is nobody's business.
        _ => {
            let cause = error.source().map(ToString::to_string);
            tracing::error!(%name, %error, cause, "what was to be pulled cannot be opened");
            let why = format!("{name} cannot be opened; the server's log says why");
            ProtocolError::new(Reason::Unsupported, why)
        }
    }
}
