//! What a session has its disk do beside writing: comparisons of held cells, and
//! groups that become durable.

use super::Session;
use crate::{
    format::checksum,
    protocol::{CompareJob, Group, PipelineStage, SlotFile},
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
        let sealed = committed.and_then(|()| match &session.teller {
            Some(teller) => {
                let complete = session.core().completing(&group);
                teller.seal(&session, complete)
            }
            None => Ok(Vec::new()),
        });
        match sealed {
            Ok(ready) => {
                // Before the driver can think of publishing.
                if let Some(teller) = &session.teller {
                    teller.tell(ready);
                }
                let complete = session.core().committed(group.id);
                complete
                    .into_iter()
                    .for_each(|number| session.staging.files().close(number));
                session.wake.notify_one();
            }
            Err(error) => session.fail(error),
        }
    })
}

/// Seals what was complete when the session began, and tells of it.
pub(super) async fn tell_complete(session: &Arc<Session>, complete: Vec<Arc<SlotFile>>) {
    let Some(teller) = session.teller.clone().filter(|_| !complete.is_empty()) else {
        return;
    };
    let sealing = Arc::clone(session);
    // Holds the session, and with it the lock of the name, also when nobody waits any more.
    let sealed = tokio::task::spawn_blocking(move || {
        let sealed = teller.seal(&sealing, complete);
        sealed.map(|ready| teller.tell(ready))
    });
    match sealed.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => session.fail(error),
        Err(error) => session.fail(SessionError::Bug(error.to_string())),
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
