//! The calls that ask one question.

use crate::{
    error::Error,
    plan::CheckpointName,
    protocol::Reason,
    session::{Export, ReceiveContext},
    source::{SourceOptions, SourceSet},
    store::{Catalog, TransferSummary},
    wire::{
        pb::{self, ferry_server::Ferry},
        to_status,
    },
};
use std::{collections::BTreeMap, path::PathBuf, pin::Pin, sync::Arc, time::Duration};
use tokio::{sync::Semaphore, time::timeout};
use tokio_stream::Stream;
use tonic::{Request, Response, Status, Streaming};

const PAGE_SIZE_DEFAULT: usize = 1_000;
const PAGE_SIZE_MAX: usize = 10_000;
/// Questions that look at the disk at a time: a flood of them must not take the threads
/// on which sessions commit.
const MAX_QUESTIONS: usize = 16;
/// Exports are opened for a list within this time, or are listed by name only.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);

/// Implements the generated trait.
#[derive(Clone, Debug)]
pub(super) struct Unary {
    context: ReceiveContext,
    exports: Arc<BTreeMap<CheckpointName, Export>>,
    questions: Arc<Semaphore>,
    /// Looking at exports.
    looking: Arc<Semaphore>,
}

impl Unary {
    pub(super) fn new(
        context: ReceiveContext,
        exports: Arc<BTreeMap<CheckpointName, Export>>,
    ) -> Self {
        let questions = Arc::new(Semaphore::new(MAX_QUESTIONS));
        Unary {
            context,
            exports,
            questions,
            looking: Arc::new(Semaphore::new(1)),
        }
    }

    /// Runs a question where it may block on the disk.
    async fn ask<T: Send + 'static>(
        &self,
        question: impl FnOnce(&Catalog) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Status> {
        let catalog = self.context.catalog.clone();
        let turn = Arc::clone(&self.questions).acquire_owned().await;
        let answer = tokio::task::spawn_blocking(move || {
            // Given back when the work is done, whether or not the caller still waits.
            let _turn = turn;
            question(&catalog)
        })
        .await;
        answer
            .map_err(|e| to_status(Reason::Bug, &e.to_string()))?
            .map_err(|e| status_of(&e))
    }

    /// Fills in what is offered from elsewhere, as it is now. One call at a time looks, and
    /// not for long: the others, and one that waits for a dead disk, tell the names alone.
    async fn measure_offered(&self, rows: &mut [pb::CheckpointSummary]) {
        let paths = rows.iter().enumerate().filter(|(_, row)| row.offered);
        let paths = paths.filter_map(|(index, row)| {
            let name = row.name.parse::<CheckpointName>().ok()?;
            match self.exports.get(&name)? {
                Export::Path(path) => Some((index, path.clone())),
                Export::Memory(_) => None,
            }
        });
        let paths: Vec<(usize, PathBuf)> = paths.collect();
        let Ok(turn) = Arc::clone(&self.looking).try_acquire_owned() else {
            return;
        };
        if paths.is_empty() {
            return;
        }
        let opening = tokio::task::spawn_blocking(move || {
            let _turn = turn;
            let opened = paths.into_iter().filter_map(|(index, path)| {
                let set = SourceSet::open(&[path], &SourceOptions::default()).ok()?;
                Some((index, set.entries().len() as u64, set.total_bytes()))
            });
            opened.collect::<Vec<_>>()
        });
        let Ok(Ok(opened)) = timeout(LOOK_TIMEOUT, opening).await else {
            return;
        };
        for (index, entry_count, total_bytes) in opened {
            if let Some(row) = rows.get_mut(index) {
                (row.entry_count, row.total_bytes) = (entry_count, total_bytes);
            }
        }
    }

    fn not_found(&self, name: &CheckpointName) -> Status {
        let why = match self.exports.contains_key(name) {
            true => format!("{name} is offered from elsewhere and has no manifest here: pull it"),
            false => format!("there is no checkpoint or transfer {name}"),
        };
        to_status(Reason::NotFound, &why)
    }

    fn transfer_row(&self, transfer: &TransferSummary) -> pb::CheckpointSummary {
        pb::CheckpointSummary {
            name: transfer.name.to_string(),
            published: false,
            offered: false,
            entry_count: transfer.entry_count,
            total_bytes: transfer.total_bytes,
            durable_bytes: transfer.durable_bytes,
            active: self.context.registry.is_live(&transfer.name),
            modified_unix_seconds: transfer.modified_unix_seconds,
            transfer_id: transfer
                .transfer_id
                .map_or_else(Vec::new, |id| id.to_vec())
                .into(),
        }
    }
}

fn status_of(error: &Error) -> Status {
    match error {
        Error::Store {
            reason,
            message,
            source,
        } => {
            let cause = source
                .as_ref()
                .map(|s| format!(": {s}"))
                .unwrap_or_default();
            to_status(*reason, &format!("{message}{cause}"))
        }
        Error::Refused { reason, message } => to_status(*reason, message),
        Error::Usage(message) => to_status(Reason::BadName, message),
        other => to_status(Reason::Bug, &other.to_string()),
    }
}

fn parse_name(name: &str) -> Result<CheckpointName, Status> {
    name.parse::<CheckpointName>()
        .map_err(|e| to_status(Reason::BadName, &e.to_string()))
}

type FrameStream<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl Ferry for Unary {
    type PushStream = FrameStream<pb::ReceiverFrame>;
    type PullStream = FrameStream<pb::SenderFrame>;

    async fn push(
        &self,
        _: Request<Streaming<pb::SenderFrame>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        Err(to_status(Reason::Bug, "push is served on the raw body"))
    }

    async fn pull(
        &self,
        _: Request<Streaming<pb::ReceiverFrame>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        Err(to_status(
            Reason::Unsupported,
            "pull is not offered by this server",
        ))
    }

    async fn list(
        &self,
        request: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        let request = request.into_inner();
        let (published, transfers) = self
            .ask(|catalog| Ok((catalog.list_published()?, catalog.list_transfers()?)))
            .await?;
        let mut rows: Vec<pb::CheckpointSummary> = published
            .into_iter()
            .map(|(name, manifest, modified)| pb::CheckpointSummary {
                name: name.to_string(),
                published: true,
                offered: false,
                entry_count: (manifest.tensors.len() + manifest.files.len()) as u64,
                total_bytes: manifest.total_nbytes,
                durable_bytes: manifest.total_nbytes,
                active: false,
                modified_unix_seconds: modified,
                transfer_id: Default::default(),
            })
            .collect();
        rows.extend(transfers.iter().map(|t| self.transfer_row(t)));
        rows.extend(self.exports.keys().map(|name| pb::CheckpointSummary {
            name: name.to_string(),
            offered: true,
            ..Default::default()
        }));
        // A name can be there twice: published, and being replaced. The token
        // carries both parts of the order.
        let order =
            |row: &pb::CheckpointSummary| format!("{}\n{}", row.name, u8::from(!row.published));
        rows.retain(|row| row.name.starts_with(&request.prefix) && order(row) > request.page_token);
        rows.sort_by_key(order);
        let page_size = match request.page_size as usize {
            0 => PAGE_SIZE_DEFAULT,
            n => n.min(PAGE_SIZE_MAX),
        };
        let mut next_page_token = String::new();
        if rows.len() > page_size {
            rows.truncate(page_size);
            next_page_token = rows.last().map(order).unwrap_or_default();
        }
        self.measure_offered(&mut rows).await;
        Ok(Response::new(pb::ListResponse {
            checkpoints: rows,
            next_page_token,
        }))
    }

    async fn describe(
        &self,
        request: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        let name = parse_name(&request.into_inner().checkpoint)?;
        let wanted = name.clone();
        let manifest = self
            .ask(move |catalog| Ok(catalog.manifest(&wanted)?))
            .await?;
        let (_, bytes) = manifest.ok_or_else(|| self.not_found(&name))?;
        Ok(Response::new(pb::DescribeResponse {
            manifest_json: bytes.into(),
        }))
    }

    async fn status(
        &self,
        request: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        let name = parse_name(&request.into_inner().checkpoint)?;
        let wanted = name.clone();
        let (manifest, transfer) = self
            .ask(move |catalog| Ok((catalog.manifest(&wanted)?, catalog.transfer(&wanted)?)))
            .await?;
        if manifest.is_none() && transfer.is_none() {
            return Err(self.not_found(&name));
        }
        let manifest = manifest.map(|(manifest, _)| manifest);
        let fingerprint = manifest.as_ref().and_then(|m| m.fingerprint.clone());
        Ok(Response::new(pb::StatusResponse {
            published: manifest.is_some(),
            published_fingerprint: fingerprint.unwrap_or_default(),
            published_transfer_id: manifest.map_or_else(String::new, |m| m.transfer_id),
            transfer: transfer.map(|t| self.transfer_row(&t)),
        }))
    }

    async fn discard(
        &self,
        request: Request<pb::DiscardRequest>,
    ) -> Result<Response<pb::DiscardResponse>, Status> {
        let name = parse_name(&request.into_inner().checkpoint)?;
        if self.context.registry.is_live(&name) {
            return Err(to_status(
                Reason::Locked,
                &format!("{name} is being written now; stop that transfer first"),
            ));
        }
        let discarded = self.ask(move |catalog| Ok(catalog.discard(&name)?)).await?;
        Ok(Response::new(pb::DiscardResponse {
            discarded_bytes: discarded.unwrap_or(0),
            existed: discarded.is_some(),
        }))
    }
}
