//! The sending side of a pull: the peer that dialled says what it wants, and this side
//! sends it as it would in a push. Further lanes are made by the peer and handed over.

use super::{
    error::SendError,
    progress::ProgressCell,
    rate::Throttle,
    send::{Connect, SendContext, SendLane, send, status_error},
};
use crate::{
    opening::open_of_set,
    options::{LANES_MAX, Lanes, PushOptions},
    plan::{CheckpointName, Digest16, first_16},
    protocol::{
        MAX_CONTROL_BYTES, ManifestPromise, Open, OutFormat, ProtocolError, PullFirst, PullOpen,
        Reason,
    },
    source::{SourceError, SourceOptions, SourceSet, Supply},
    store::Catalog,
    wire::{LaneSender, decode_pull_first, pb},
};
use std::{
    collections::{BTreeMap, HashMap},
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    time::timeout,
};
use tonic::{Streaming, body::Body};

/// The first frame of a call comes within this time.
const OPEN_TIMEOUT: Duration = Duration::from_secs(10);
/// Pulls at a time; each may hold `budget_bytes`.
pub(crate) const MAX_PULLS: usize = 16;

/// What all pulls of a server share.
#[derive(Clone, Debug)]
pub(crate) struct OfferContext {
    pub(crate) catalog: Catalog,
    /// The folder of published checkpoints.
    pub(crate) root: PathBuf,
    /// Checkpoints elsewhere, by their names here.
    pub(crate) exports: Arc<BTreeMap<CheckpointName, PathBuf>>,
    /// Memory for chunks on their way, for each pull.
    pub(crate) budget_bytes: u64,
    pub(crate) slots: Arc<Semaphore>,
    pub(crate) lanes: OfferedLanes,
    /// Becomes true when the server shuts down.
    pub(crate) draining: watch::Receiver<bool>,
}

type ByToken = HashMap<Digest16, mpsc::Sender<SendLane>>;

/// Where lanes of running pulls are handed over, by token. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub(crate) struct OfferedLanes {
    by_token: Arc<Mutex<ByToken>>,
}

/// The place of a pull among those that take lanes; dropping it ends that.
struct Listed {
    lanes: OfferedLanes,
    token: Digest16,
}

impl OfferedLanes {
    fn add(&self, token: Digest16) -> Result<(Listed, mpsc::Receiver<SendLane>), ProtocolError> {
        let (give, take) = mpsc::channel(LANES_MAX as usize);
        let mut by_token = self.by_token.lock().unwrap_or_else(PoisonError::into_inner);
        if by_token.contains_key(&token) {
            let why = "a pull with this lane token is running";
            return Err(ProtocolError::new(Reason::Locked, why));
        }
        by_token.insert(token, give);
        drop(by_token);
        let lanes = self.clone();
        Ok((Listed { lanes, token }, take))
    }

    fn get(&self, token: &Digest16) -> Result<mpsc::Sender<SendLane>, ProtocolError> {
        let by_token = self.by_token.lock().unwrap_or_else(PoisonError::into_inner);
        let why = "no pull of this token is running";
        let found = by_token.get(token).cloned();
        found.ok_or_else(|| ProtocolError::new(Reason::NotFound, why))
    }
}

impl Drop for Listed {
    fn drop(&mut self) {
        let mut by_token = self
            .lanes
            .by_token
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        by_token.remove(&self.token);
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
            let full = || ProtocolError::new(Reason::TooMany, "enough lanes are waiting");
            let give = context.lanes.get(&token)?;
            give.try_send(lane).map_err(|_| full())?;
            drop(give);
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
    let (_listed, lanes) = context.lanes.add(wanted.lane_token)?;
    let (source, open) = {
        let context = context.clone();
        let wanted = wanted.clone();
        let opened = tokio::task::spawn_blocking(move || open_source(&context, &wanted));
        opened.await.map_err(|e| SendError::Bug(e.to_string()))??
    };
    let throttle = Throttle::new(None);
    throttle.set_rate(wanted.rate_bytes_per_second);
    let defaults = PushOptions::default();
    let session = SendContext {
        source: Supply::Complete(source),
        connect: taking(lanes),
        lanes: match wanted.max_lanes {
            1 => Lanes::Fixed(1),
            _ => Lanes::Auto,
        },
        throttle: Arc::new(throttle),
        codec: defaults.codec,
        read_mode: defaults.read_mode,
        rehearsal: None,
        budget_bytes: context.budget_bytes,
        progress: Arc::new(ProgressCell::default()),
        cancel: context.draining.clone(),
    };
    tracing::info!(checkpoint = %wanted.checkpoint, "a pull was opened");
    Box::pin(send(session, &open, lane)).await.map(drop)
}

/// Lanes are not made here but taken as they are offered.
fn taking(lanes: mpsc::Receiver<SendLane>) -> Connect {
    let lanes = Arc::new(tokio::sync::Mutex::new(lanes));
    Arc::new(move || {
        let lanes = Arc::clone(&lanes);
        Box::pin(async move {
            let lane = lanes.lock().await.recv().await;
            lane.ok_or_else(|| SendError::Disconnected {
                message: "no lane is offered any more".to_owned(),
            })
        })
    })
}

/// The checkpoint that is wanted, and how its transfer opens.
fn open_source(
    context: &OfferContext,
    wanted: &PullOpen,
) -> Result<(Arc<SourceSet>, Open), SendError> {
    let name = &wanted.checkpoint;
    let (path, manifest) = match context.exports.get(name) {
        Some(path) => (path.clone(), None),
        None => {
            let manifest = context.catalog.manifest(name);
            let broken = |why: String| ProtocolError::new(Reason::StorageIoError, why);
            let Some((_, manifest)) = manifest.map_err(|e| broken(e.to_string()))? else {
                let why = format!("no checkpoint {name} is published here");
                return Err(ProtocolError::new(Reason::NotFound, why).into());
            };
            (context.root.join(name.as_str()), Some(manifest))
        }
    };
    let mut options = SourceOptions::default();
    (options.include, options.exclude) = (wanted.include.clone(), wanted.exclude.clone());
    let opened = SourceSet::open(&[path], &options);
    let source = opened.map_err(|error| {
        let reason = match &error {
            SourceError::Selection { .. } => Reason::NotFound,
            SourceError::Changed { .. } => Reason::SourceChanged,
            _ => Reason::Unsupported,
        };
        ProtocolError::new(reason, error.to_string())
    })?;
    let unfit = |why: String| ProtocolError::new(Reason::Unsupported, why);
    let (source, container_header_len) = match wanted.out_format {
        OutFormat::Npy => (source, 0),
        OutFormat::Safetensors => source.for_safetensors().map_err(unfit)?,
    };
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
                hasher.update(&manifest).update(&entries_digest);
                Some(first_16(hasher.finalize()))
            }
            _ => open.fingerprint,
        },
        transfer_id: wanted.transfer_id,
        container_header_len,
        codecs: open.codecs & wanted.codecs,
        ..open
    };
    Ok((Arc::new(source), open))
}
