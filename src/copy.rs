//! Copy: from one server to another through this machine, whose disk it never touches.
//! The first sends as in a pull, the second receives as in a push, and what this side has
//! to say is under which names.

use crate::{
    attempts::Attempts,
    checkpoint::CheckpointInfo,
    client::{Client, is_retryable},
    error::Error,
    opening::machine_id,
    options::PushOptions,
    plan::{CheckpointName, Digest16, first_16},
    protocol::{
        Abort, Done, Layout, ManifestPromise, NpyDtype, Open, OutFormat, ProtocolError, PullFirst,
        PullOpen, Reason, SenderFrame,
    },
    pull::{OPEN_TIMEOUT, begin_pull, check, lane_count, with_wishes},
    session::{
        Account, ProgressCell, RelayEnd, RelayError, SendError, SendLane, SenderFrames, Stage,
        Task, cancelled, farewell, relay,
    },
    transfer::{Transfer, TransferReport},
    wire::{decode_sender_frame, encode_message, encode_sender_frame, frame_head, pb},
};
use std::{
    sync::Arc,
    time::{Duration, Instant},
};
use tokio::{sync::watch, task::JoinSet, time::timeout};

/// Who was told of the end has this long to hear it, and to say what is safe.
const FAREWELL_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause before a lane is offered again at first, and later.
const PAUSE: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// How a checkpoint is copied from server to server.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CopyOptions {
    /// How it travels and what it becomes, as in a push. How it is read, and how much memory
    /// chunks may take, is the affair of the servers; a rate is a number of bytes, not a
    /// file.
    pub transfer: PushOptions,
    /// Take only tensors with names like one of these; all when there are none.
    pub include: Vec<String>,
    /// Leave these out.
    pub exclude: Vec<String>,
}

impl Client {
    /// Copies a checkpoint of this server to another one, reconnecting to both as long as
    /// that helps. Bytes pass through this machine's memory, a few chunks at a time, and
    /// neither the servers nor their checksums depend on it. It begins at once, in a task
    /// of its own; the same call made again goes on from what is durable over there.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    ///
    /// ```
    /// use tensorferry::{Client, CopyOptions, PushOptions, Server, SourceSet};
    ///
    /// # #[tokio::main]
    /// # async fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # let temp = tempfile::tempdir()?;
    /// # let model = temp.path().join("w.npy");
    /// # let header = tensorferry::format::npy::encode_header("<f4", false, &[4]);
    /// # std::fs::write(&model, [header, vec![7; 16]].concat())?;
    /// # let [near, far] = ["near", "far"].map(|root| Server::builder(temp.path().join(root)));
    /// # let near = near.bind(([127, 0, 0, 1], 0).into()).await?;
    /// # let far = far.bind(([127, 0, 0, 1], 0).into()).await?;
    /// let from = Client::new(&near.local_addr().to_string())?;
    /// let to = Client::new(&far.local_addr().to_string())?;
    /// # tokio::spawn(near.serve(std::future::pending()));
    /// # tokio::spawn(far.serve(std::future::pending()));
    /// # let source = SourceSet::open(&[model], &Default::default())?;
    /// # from.push(source, &"run7".parse()?, PushOptions::default()).await?;
    /// let copy = from.copy(&"run7".parse()?, &to, &"backup/run7".parse()?, CopyOptions::default());
    /// let report = copy.await?;
    /// assert_eq!((report.tensor_count, report.bytes), (1, 16));
    /// assert!(to.status(&"backup/run7".parse()?).await?.published);
    /// # Ok(())
    /// # }
    /// ```
    pub fn copy(
        &self,
        name: &CheckpointName,
        to: &Client,
        to_name: &CheckpointName,
        options: CopyOptions,
    ) -> Transfer {
        let progress = Arc::new(ProgressCell::default());
        let (cancel, cancelled) = watch::channel(false);
        let copy = Copy {
            from: self.clone(),
            name: name.clone(),
            to: to.clone(),
            to_name: to_name.clone(),
            options,
            progress: Arc::clone(&progress),
            cancel: cancelled,
        };
        Transfer::new(Task::spawn(copy.run()), progress, cancel)
    }
}

/// One copy with all its attempts.
struct Copy {
    from: Client,
    name: CheckpointName,
    to: Client,
    to_name: CheckpointName,
    options: CopyOptions,
    progress: Arc<ProgressCell>,
    cancel: watch::Receiver<bool>,
}

/// How a session ended well, and what passed in it.
struct Copied {
    done: Done,
    account: Arc<Account>,
}

impl Copy {
    async fn run(mut self) -> Result<TransferReport, Error> {
        let begun = Instant::now();
        let rate = check(&self.options.transfer)?;
        let transfer_id = self.transfer_id();
        let mut attempts = Attempts::new(self.options.transfer.retries);
        let mut restart = self.options.transfer.restart;
        loop {
            let before = self.progress.snapshot();
            self.progress.update(|p| p.stage = Stage::Connecting);
            let error = match Box::pin(self.attempt(transfer_id, rate, restart)).await {
                Ok(copied) => return Ok(self.report(&copied, begun).await),
                Err(error) => error,
            };
            if *self.cancel.borrow() {
                return Err(Error::Interrupted);
            }
            let after = self.progress.snapshot();
            let was_accepted = after.session_count > before.session_count;
            let is_changed = matches!(
                error.error,
                // What took its place is copied instead.
                SendError::Refused {
                    reason: Reason::SourceChanged,
                    ..
                }
            );
            if !(is_changed || is_retryable(&error.error, was_accepted)) {
                return Err(self.blame(error));
            }
            let Some(fruitless) = attempts.failed(&before, &after) else {
                return Err(self.blame(error));
            };
            tracing::info!(%error, attempt = fruitless, "a connection failed; trying again");
            // What an accepted restart threw away must not be thrown away again.
            restart &= !was_accepted;
            self.progress.update(|p| p.stage = Stage::Waiting);
            attempts.pause(&mut self.cancel).await?;
        }
    }

    /// With the address of the server that it came from: there are two.
    fn blame(&self, error: RelayError) -> Error {
        let client = match error.end {
            RelayEnd::Sender => &self.from,
            RelayEnd::Receiver => &self.to,
        };
        match client.error(error.error) {
            Error::Refused { reason, message } => Error::Refused {
                reason,
                message: format!("{}: {message}", client.authority()),
            },
            other => other,
        }
    }

    /// Stands for this work in every session of it, whichever machine does it, unless the
    /// sender is on that machine.
    fn transfer_id(&self) -> Digest16 {
        let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 copy");
        let mut field = |bytes: &[u8]| {
            hasher.update(&(bytes.len() as u64).to_le_bytes());
            hasher.update(bytes);
        };
        let transfer = &self.options.transfer;
        // The same address is another server on each machine.
        if is_loopback(self.from.authority()) {
            field(&machine_id());
        }
        field(self.from.authority().as_bytes());
        field(self.name.as_str().as_bytes());
        field(self.to_name.as_str().as_bytes());
        field(&[
            u8::from(transfer.layout == Layout::Indexed),
            u8::from(transfer.out_format == OutFormat::Safetensors),
            u8::from(transfer.npy_dtype == NpyDtype::Named),
        ]);
        for (kind, globs) in [(b"+", &self.options.include), (b"-", &self.options.exclude)] {
            for glob in globs {
                field(kind);
                field(glob.as_bytes());
            }
        }
        first_16(hasher.finalize())
    }

    /// One session, from dialling to its end.
    async fn attempt(
        &self,
        transfer_id: Digest16,
        rate: Option<u64>,
        restart: bool,
    ) -> Result<Copied, RelayError> {
        let mut lane_token = [0; 16];
        getrandom::fill(&mut lane_token)
            .map_err(|e| RelayError::of_sender(SendError::Bug(e.to_string())))?;
        let transfer = &self.options.transfer;
        let wanted = PullFirst::Open(Box::new(PullOpen {
            checkpoint: self.name.clone(),
            transfer_id,
            codecs: transfer.codec.codecs(),
            include: self.options.include.clone(),
            exclude: self.options.exclude.clone(),
            out_format: transfer.out_format,
            max_lanes: lane_count(transfer),
            lane_token,
            rate_bytes_per_second: rate,
            first: transfer.first.clone(),
        }));
        let mut cancel = self.cancel.clone();
        let interrupted = || RelayError::of_sender(SendError::Interrupted);
        let opening = async {
            let begun = begin_pull(&self.from, &wanted).await;
            let (to_sender, body, channel) = begun.map_err(RelayError::of_sender)?;
            let mut frames = SenderFrames::new(body);
            let open = first_of(&mut frames).await?;
            let open = self.terms(open, transfer_id, restart)?;
            let receiver = open_lane(&self.to).await?;
            Ok::<_, RelayError>((to_sender, channel, frames, open, receiver))
        };
        let (to_sender, _channel, mut frames, open, mut receiver) = tokio::select! {
            opened = opening => opened?,
            () = cancelled(&mut cancel) => return Err(interrupted()),
        };
        let total_bytes = match open.manifest {
            ManifestPromise::Complete { total_bytes, .. } => total_bytes,
            ManifestPromise::Open => 0,
        };
        let account = Arc::new(Account::new(Arc::clone(&self.progress), total_bytes));
        let open = encode_sender_frame(&SenderFrame::Open(Box::new(open)));
        // That the receiver takes no more it says on the way back.
        let _ = receiver.out.send([encode_message(&open)]).await;
        // They end with this attempt.
        let mut lanes = JoinSet::new();
        for _ in 1..lane_count(transfer) {
            let (from, to) = (self.from.clone(), self.to.clone());
            lanes.spawn(keep_offering(from, to, Arc::clone(&account), lane_token));
        }
        let ended = tokio::select! {
            ended = relay(&account, true, &mut frames, &to_sender, &mut receiver) => ended?,
            () = cancelled(&mut cancel) => {
                let abort = SenderFrame::Abort(Abort {
                    reason: Some(Reason::Interrupted),
                    message: "the copy was stopped".to_owned(),
                });
                let abort = encode_message(&encode_sender_frame(&abort));
                // It commits, and says how far it is, if it listens at all.
                let _ = timeout(FAREWELL_TIMEOUT, async {
                    let _ = receiver.out.send([abort]).await;
                    farewell(&account, &mut receiver).await;
                })
                .await;
                return Err(interrupted());
            }
        };
        drop(lanes);
        let done = ended.ok_or_else(|| {
            RelayError::of_receiver(SendError::Disconnected {
                message: "the receiver closed the stream before the end".to_owned(),
            })
        })?;
        // The sender has heard that it is done when it ends the call.
        let _ = timeout(FAREWELL_TIMEOUT, async {
            to_sender.drained().await;
            while let Ok(Some(_)) = frames.next().await {}
        })
        .await;
        Ok(Copied { done, account })
    }

    /// The sender's opening, under the names and with the wishes of this side.
    fn terms(&self, open: Open, transfer_id: Digest16, restart: bool) -> Result<Open, RelayError> {
        if open.checkpoint != self.name || open.transfer_id != transfer_id {
            let why = "the server opens another checkpoint than the one that was asked for";
            let error = ProtocolError::new(Reason::BadFrame, why);
            return Err(RelayError::of_sender(error));
        }
        let open = with_wishes(open, &self.options.transfer, restart);
        Ok(Open {
            checkpoint: self.to_name.clone(),
            ..open.map_err(RelayError::of_sender)?
        })
    }

    async fn report(&self, copied: &Copied, begun: Instant) -> TransferReport {
        let Copied { done, account } = copied;
        self.progress.end_receiving(done);
        let (tensor_count, file_count) = match account.counts() {
            // What stood there already was not announced: its manifest tells.
            (0, 0) => {
                let manifest = self.to.describe(&self.to_name).await;
                let info = manifest.and_then(|json| CheckpointInfo::from_json(&json));
                match info {
                    Ok(info) => (info.tensors.len() as u64, info.files.len() as u64),
                    Err(_) => (done.entry_count, 0),
                }
            }
            counts => counts,
        };
        let progress = self.progress.snapshot();
        TransferReport {
            checkpoint: self.to_name.to_string(),
            tensor_count,
            file_count,
            bytes: done.total_bytes,
            wire_bytes: progress.wire_bytes,
            resumed_bytes: progress.resumed_bytes,
            session_count: progress.session_count,
            elapsed: begun.elapsed(),
            durability: done.durability,
            unchanged: done.unchanged,
            stages: progress.stages,
            codecs: Vec::new(),
        }
    }
}

fn is_loopback(authority: &str) -> bool {
    let host = authority
        .rsplit_once(':')
        .map_or(authority, |(host, _)| host);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let address = host.parse::<std::net::IpAddr>();
    host == "localhost" || address.is_ok_and(|address| address.is_loopback())
}

/// A lane to the receiver, which may be slow but not silent.
async fn open_lane(to: &Client) -> Result<SendLane, RelayError> {
    let opened = timeout(OPEN_TIMEOUT, to.open_lane()).await;
    let silent = |_| {
        RelayError::of_receiver(SendError::Disconnected {
            message: format!("no answer to the call for {} s", OPEN_TIMEOUT.as_secs()),
        })
    };
    opened.map_err(silent)?.map_err(RelayError::of_receiver)
}

/// The opening, which comes first.
async fn first_of(frames: &mut SenderFrames) -> Result<Open, RelayError> {
    let first = timeout(OPEN_TIMEOUT, frames.next()).await;
    let silent = |_| {
        RelayError::of_sender(SendError::Disconnected {
            message: format!("no opening for {} s", OPEN_TIMEOUT.as_secs()),
        })
    };
    let first = first.map_err(silent)?.map_err(RelayError::of_sender)?;
    let (frame, _) = first.ok_or_else(|| {
        RelayError::of_sender(SendError::Disconnected {
            message: "the stream ended before the opening".to_owned(),
        })
    })?;
    match decode_sender_frame(frame).map_err(RelayError::of_sender)? {
        SenderFrame::Open(open) => Ok(*open),
        SenderFrame::Abort(Abort { reason, message }) => {
            Err(RelayError::of_sender(SendError::Refused {
                reason: reason.unwrap_or(Reason::Bug),
                message,
            }))
        }
        _ => {
            let why = "the first frame is not open";
            Err(RelayError::of_sender(ProtocolError::new(
                Reason::BadFrame,
                why,
            )))
        }
    }
}

/// Offers the sender a further lane as long as the attempt lasts, and another when it is
/// lost.
async fn keep_offering(from: Client, to: Client, account: Arc<Account>, token: Digest16) {
    let mut pause = PAUSE.0;
    loop {
        let begun = Instant::now();
        // Why a lane ended is said on the control lane.
        if let Err(error) = relay_lane(&from, &to, &account, token).await {
            tracing::debug!(%error, "a lane ended");
        }
        pause = match begun.elapsed() > PAUSE.1 {
            true => PAUSE.0,
            false => (pause * 2).min(PAUSE.1),
        };
        tokio::time::sleep(pause).await;
    }
}

async fn relay_lane(
    from: &Client,
    to: &Client,
    account: &Account,
    token: Digest16,
) -> Result<(), RelayError> {
    let begun = begin_pull(from, &PullFirst::Join(token)).await;
    let (to_sender, body, _channel) = begun.map_err(RelayError::of_sender)?;
    let mut frames = SenderFrames::new(body);
    // It may wait as long as the attempt lasts.
    let first = frames.next().await.map_err(RelayError::of_sender)?;
    let Some((frame, _)) = first else {
        return Ok(());
    };
    // What is to be received is said on the control lane and nowhere else.
    if !matches!(frame.control, Some(pb::sender_frame::Control::Join(_))) {
        let why = "a lane that was offered opens a session";
        return Err(RelayError::of_sender(ProtocolError::new(
            Reason::BadFrame,
            why,
        )));
    }
    let mut receiver = open_lane(to).await?;
    let _ = receiver.out.send([frame_head(&frame, 0)]).await;
    relay(account, false, &mut frames, &to_sender, &mut receiver).await?;
    Ok(())
}
