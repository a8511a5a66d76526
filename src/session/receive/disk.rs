//! What a session has its disk do beside writing: comparisons of held cells, and
//! groups that become durable.

use super::Session;
use crate::{
    format::checksum,
    protocol::{CompareJob, Group, PipelineStage, SlotFile},
    ready::ReadyTensor,
    session::{
        buffers::Reserved,
        error::SessionError,
        workers::{on_cpu, on_io},
    },
};
use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;

/// Compares a held cell with what the sender has.
pub(super) fn spawn_compare(session: &Arc<Session>, job: CompareJob) {
    let session = Arc::clone(session);
    session.job_count.fetch_add(1, Ordering::AcqRel);
    // Thousands of comparisons may be asked for at once; their bytes come out of
    // the same budget as chunks.
    tokio::spawn(async move {
        let reserved = session.budget.reserve(u64::from(job.raw_len)).await;
        // What a session that is over wanted to know keeps its name from the next one.
        if !*session.over.borrow() {
            read_and_compare(&session, job, reserved);
        }
        session.job_count.fetch_sub(1, Ordering::AcqRel);
    });
}

fn read_and_compare(session: &Arc<Session>, job: CompareJob, reserved: Reserved) {
    session.job(on_io, move |session| {
        if *session.over.borrow() {
            return;
        }
        let mut bytes = vec![0; job.raw_len as usize];
        let work = session.stages.work(PipelineStage::Place);
        match session
            .staging
            .files()
            .read(&job.slot, job.offset, &mut bytes)
        {
            Ok(()) => session.job(on_cpu, move |session| {
                let _work = session.stages.work(PipelineStage::Checksum);
                let equal = *blake3::hash(&bytes).as_bytes() == job.blake3;
                let crc = checksum::crc32c(&bytes);
                session.core().compared(&job, equal, crc, Instant::now());
                drop((bytes, reserved));
            }),
            Err(error) => session.fail(error),
        }
        drop(work);
    });
}

/// Has a group made durable. The role learns of it only after the syncs.
pub(super) fn spawn_commit(session: &Arc<Session>, group: Group) -> JoinHandle<()> {
    let session = Arc::clone(session);
    tokio::task::spawn_blocking(move || {
        if crate::mutant::is("ack_before_sync") {
            session.core().committed(group.id);
            session.wake.notify_one();
            std::thread::sleep(Duration::from_millis(20));
        }
        #[cfg(test)]
        session
            .stages
            .slow(PipelineStage::Sync, raw_bytes_of(&session, &group));
        let committed = catch_unwind(AssertUnwindSafe(|| session.staging.commit(&group)));
        let bug = || SessionError::Bug("the committer panicked".to_owned());
        let committed = committed.map_err(|_| bug()).and_then(|c| Ok(c?));
        // Before the role says that it is durable: what comes after that must not find the
        // file writable.
        let sealed = committed.and_then(|()| match session.on_ready {
            Some(_) => {
                let complete = session.core().completing(&group);
                seal(&session, complete)
            }
            None => Ok(Vec::new()),
        });
        match sealed {
            Ok(ready) => {
                let complete = session.core().committed(group.id);
                complete
                    .into_iter()
                    .for_each(|number| session.staging.files().close(number));
                session.wake.notify_one();
                tell_ready(&session, &ready);
            }
            Err(error) => session.fail(error),
        }
    })
}

/// Tells of entries that were complete when the session began, after `before`.
pub(super) fn spawn_tell_ready(
    session: &Arc<Session>,
    complete: Vec<Arc<SlotFile>>,
    before: Option<JoinHandle<()>>,
) -> JoinHandle<()> {
    let session = Arc::clone(session);
    tokio::spawn(async move {
        finish_commit(before).await;
        let telling = tokio::task::spawn_blocking(move || match seal(&session, complete) {
            Ok(ready) => tell_ready(&session, &ready),
            Err(error) => session.fail(error),
        });
        let _ = telling.await;
    })
}

/// From now on nobody writes to the files of these entries. Those that share a file are
/// left out: others are still written to it.
fn seal(session: &Session, complete: Vec<Arc<SlotFile>>) -> Result<Vec<ReadyTensor>, SessionError> {
    let Some(on_ready) = &session.on_ready else {
        return Ok(Vec::new());
    };
    let is_told = |slot: &Arc<SlotFile>| {
        slot.data_offset.is_none() && on_ready.wants(session.core().is_first(slot.number))
    };
    let sealed = complete.into_iter().filter(is_told).map(|slot| {
        Ok(ReadyTensor {
            checkpoint: session.staging.options().checkpoint.to_string(),
            name: slot.header.name.clone(),
            path: session.staging.files().seal(&slot)?,
            byte_len: slot.header.byte_len,
            is_first: session.core().is_first(slot.number),
        })
    });
    sealed.collect()
}

fn tell_ready(session: &Session, ready: &[ReadyTensor]) {
    let Some(on_ready) = &session.on_ready else {
        return;
    };
    let told = catch_unwind(AssertUnwindSafe(|| {
        ready.iter().for_each(|tensor| on_ready.tell(tensor));
    }));
    if told.is_err() {
        tracing::warn!("who was told of complete tensors panicked");
    }
}

#[cfg(test)]
fn raw_bytes_of(session: &Session, group: &Group) -> usize {
    let cell_count: usize = group.cells.iter().map(|cells| cells.crcs.len()).sum();
    cell_count * session.accept.chunk_len as usize
}

pub(super) async fn finish_commit(commit: Option<JoinHandle<()>>) {
    if let Some(commit) = commit {
        let _ = commit.await;
    }
}
