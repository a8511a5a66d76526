//! What a later session finds of an earlier one, and what it may trust of it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::*;
use tensorferry::wire::pb;
use tonic::Code;

const ID: [u8; 16] = [1; 16];

/// One tensor of four cells from one source in this state.
fn from_source(state: u8, settled: bool) -> Load {
    Load::from_sources(
        vec![source(1, state, settled)],
        vec![tensor("w", 3 * CHUNK + 1)],
    )
}

/// Sends these cells in a session that is then aborted.
async fn leave(server: &TestServer, load: &Load, cells: &[u64]) {
    let mut session = server.open(load.open("victim", ID)).await;
    session.announce(load).await;
    for &cell in cells {
        session.send(load.chunk(0, cell)).await;
    }
    session.settle().await;
    let ending = session.refused(frame_abort("INTERRUPTED")).await;
    assert_eq!(ending, refused(Code::Cancelled, "INTERRUPTED"));
    assert_eq!(
        session.durable[&0],
        cells.iter().copied().collect(),
        "the farewell says what is safe"
    );
}

#[tokio::test]
async fn abort_leaves_the_durable_cells_to_the_next_session() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    leave(&server, &load, &[0, 2]).await;
    server.assert_unpublished("victim").await;
    let row = server.status("victim").await.unwrap();
    let transfer = row.transfer.unwrap();
    assert!(!row.published && !transfer.active);
    assert_eq!(transfer.durable_bytes, 2 * CHUNK as u64);
    let mut session = server.open(load.open("victim", ID)).await;
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [1, 3].into());
    assert!(session.held[&0].is_empty());
    session.send_wanted(&load).await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn a_dropped_connection_leaves_them_too() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    let mut session = server.open(load.open("victim", ID)).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 3)).await;
    session.settle().await;
    drop(session);
    // The next session waits until the old one has committed.
    let mut session = server.open(load.open("victim", ID)).await;
    assert_eq!(session.accept.as_ref().unwrap().durable_bytes, 1);
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [0, 1, 2].into());
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    // The end of the stream before finish is no publication.
    assert_eq!(
        session.close().await,
        refused(Code::Cancelled, "INTERRUPTED")
    );
    server.assert_unpublished("victim").await;
    leave(&server, &load, &[1]).await;
    let mut session = server.open(load.open("victim", ID)).await;
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [2].into());
    session.send_wanted(&load).await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn a_stopped_server_leaves_them_too() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    let mut session = server.open(load.open("victim", ID)).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 1)).await;
    session.settle().await;
    let (ending, ()) = tokio::join!(session.end(), server.stop());
    assert_eq!(ending, refused(Code::Unavailable, "DRAINING"));
    let server = TestServer::start(temp.path()).await;
    let mut session = server.open(load.open("victim", ID)).await;
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [0, 2, 3].into());
}

#[tokio::test]
async fn the_grid_of_the_first_session_stays() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    leave(&server, &load, &[0]).await;
    let open = pb::SenderOpen {
        chunk_len: 1 << 20,
        ..load.open("victim", ID)
    };
    let session = server.open(open).await;
    let accept = session.accept.as_ref().unwrap();
    assert_eq!(
        (accept.chunk_len, accept.durable_bytes),
        (CHUNK as u32, CHUNK as u64)
    );
}

#[tokio::test]
async fn entries_that_are_not_announced_again_are_not_published() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let all = Load::of(vec![
        tensor("old", CHUNK),
        tensor("kept", CHUNK),
        blob("notes/old.txt", b"x"),
    ]);
    let mut session = server.open(open_ended("victim", ID)).await;
    session.announce(&all).await;
    session.send_wanted(&all).await;
    session.refused(frame_abort("")).await.unwrap_err();
    let now = Load::of(vec![tensor("kept", CHUNK), tensor("new", 7)]);
    let mut session = server.open(open_ended("victim", ID)).await;
    session.announce(&now).await;
    assert!(
        session.wanted[&0].is_empty(),
        "known by its name, whatever its number was"
    );
    session.send_wanted(&now).await;
    session.finish(&now).await;
    server.assert_landed("victim", &now);
    let files = tree(&temp.path().join("victim"));
    assert_eq!(files.len(), 3, "{files:?}");
}

#[tokio::test]
async fn an_entry_with_another_header_begins_again() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let first = Load::of(vec![tensor("w", 2 * CHUNK)]);
    let mut session = server.open(open_ended("victim", ID)).await;
    session.announce(&first).await;
    session.send_wanted(&first).await;
    session.refused(frame_abort("")).await.unwrap_err();
    for now in [
        Load::of(vec![tensor("w", 2 * CHUNK + 1)]),
        Load::of(vec![floats("w", noise("w", 2 * CHUNK))]),
    ] {
        let mut session = server.open(open_ended("victim", ID)).await;
        session.announce(&now).await;
        assert!(session.held[&0].is_empty());
        assert_eq!(
            session.wanted[&0].len(),
            now.total_bytes().div_ceil(CHUNK as u64) as usize
        );
        session.send_wanted(&now).await;
        session.refused(frame_abort("")).await.unwrap_err();
    }
    let last = Load::of(vec![floats("w", noise("w", 2 * CHUNK))]);
    let mut session = server.open(open_ended("victim", ID)).await;
    session.announce(&last).await;
    session.finish(&last).await;
    server.assert_landed("victim", &last);
}

#[tokio::test]
async fn h23_cells_of_a_changed_source_come_back_as_held() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    leave(&server, &from_source(1, true), &[0, 1, 2]).await;
    // Of the new content only cell 1 differs.
    let mut now = from_source(2, true);
    now.parts[0].bytes[CHUNK + 5] ^= 1;
    let mut session = server.open(now.open("victim", ID)).await;
    session.announce(&now).await;
    assert_eq!(session.held[&0], [0, 1, 2].into());
    assert_eq!(session.wanted[&0], [3].into());
    session.send_wanted(&now).await;
    // Neither old nor new: mixed content is not published, not even on demand.
    let ending = session.refused(frame_finish(now.finish())).await;
    assert_eq!(
        ending,
        refused(Code::FailedPrecondition, "MANIFEST_MISMATCH")
    );
    server.assert_unpublished("victim").await;

    let mut session = server.open(now.open("victim", ID)).await;
    session.announce(&now).await;
    assert_eq!(session.held[&0], [0, 1, 2].into(), "still not trusted");
    assert!(session.wanted[&0].is_empty());
    session.send(frame_compare(now.compare(0, 0, 2))).await;
    session
        .until(|s| s.kept.contains_key(&0) && !s.wanted[&0].is_empty())
        .await;
    assert_eq!(
        (&session.kept[&0], &session.wanted[&0]),
        (&[0].into(), &[1].into())
    );
    session.send_wanted(&now).await;
    // A held cell may also simply be sent.
    session.send(now.chunk(0, 2)).await;
    session.settle().await;
    session.finish(&now).await;
    server.assert_landed("victim", &now);
    server.serves_others().await;
}

#[tokio::test]
async fn h23_a_comparison_survives_the_next_interruption() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    leave(&server, &from_source(1, true), &[0, 1]).await;
    let now = from_source(2, true);
    let mut session = server.open(now.open("victim", ID)).await;
    session.announce(&now).await;
    session.send(frame_compare(now.compare(0, 0, 1))).await;
    session.until(|s| s.kept.contains_key(&0)).await;
    session.refused(frame_abort("")).await.unwrap_err();
    let mut session = server.open(now.open("victim", ID)).await;
    session.announce(&now).await;
    assert_eq!(
        (&session.held[&0], &session.wanted[&0]),
        (&[1].into(), &[2, 3].into())
    );
}

#[tokio::test]
async fn h23_a_source_that_was_not_settled_is_not_trusted() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    leave(&server, &from_source(1, false), &[0, 1]).await;
    // The same fingerprint, but it could not have shown a change.
    let now = from_source(1, true);
    let mut session = server.open(now.open("victim", ID)).await;
    session.announce(&now).await;
    assert_eq!(
        (&session.held[&0], &session.wanted[&0]),
        (&[0, 1].into(), &[2, 3].into())
    );
    session.send(frame_compare(now.compare(0, 0, 2))).await;
    session
        .until(|s| s.kept.get(&0).is_some_and(|kept| kept.len() == 2))
        .await;
    session.send_wanted(&now).await;
    session.finish(&now).await;
    server.assert_landed("victim", &now);
}

#[tokio::test]
async fn h23_an_entry_from_another_source_is_not_trusted() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    leave(&server, &from_source(1, true), &[0]).await;
    let moved = Load::from_sources(vec![source(2, 1, true)], from_source(1, true).parts);
    let mut session = server.open(moved.open("victim", ID)).await;
    session.announce(&moved).await;
    assert_eq!(session.held[&0], [0].into());
}

#[tokio::test]
async fn h23_one_changed_source_leaves_the_entries_of_others_alone() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let two = |state| {
        let mut load = Load::from_sources(
            vec![source(1, 1, true), source(2, state, true)],
            vec![
                tensor("a", CHUNK),
                tensor("b", CHUNK),
                tensor("none", CHUNK),
            ],
        );
        for (part, sources) in load.parts.iter_mut().zip([vec![0], vec![1], vec![]]) {
            part.entry.sources = sources;
        }
        load
    };
    let mut session = server.open(two(1).open("victim", ID)).await;
    session.announce(&two(1)).await;
    session.send_wanted(&two(1)).await;
    session.refused(frame_abort("")).await.unwrap_err();
    let now = two(2);
    let mut session = server.open(now.open("victim", ID)).await;
    session.announce(&now).await;
    assert!(session.wanted.values().all(|cells| cells.is_empty()));
    // An entry without sources is trusted by the transfer id alone.
    let held: Vec<usize> = (0..3).map(|entry| session.held[&entry].len()).collect();
    assert_eq!(held, [0, 1, 0]);
}

#[tokio::test]
async fn h23_a_staged_file_that_was_removed_or_cut_is_sent_again() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    let damages: [fn(&std::path::Path); 3] = [
        |file| std::fs::remove_file(file).unwrap(),
        |file| {
            std::fs::File::options()
                .write(true)
                .open(file)
                .unwrap()
                .set_len(CHUNK as u64)
                .unwrap()
        },
        |file| std::fs::write(file, vec![0; 3 * CHUNK + 1 + 128]).unwrap(),
    ];
    for damage in damages {
        leave(&server, &load, &[0, 1]).await;
        damage(&server.staging().join("data/w.npy"));
        let mut session = server.open(load.open("victim", ID)).await;
        session.announce(&load).await;
        assert_eq!(session.wanted[&0].len(), 4);
        session.refused(frame_abort("")).await.unwrap_err();
    }
    server.push(load.open("victim", ID), &load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn verify_finds_bytes_that_changed_at_rest_and_publishes_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    leave(&server, &load, &[0, 1]).await;
    let staged = server.staging().join("data/w.npy");
    let mut bytes = std::fs::read(&staged).unwrap();
    bytes[500] ^= 1;
    std::fs::write(&staged, bytes).unwrap();
    let open = pb::SenderOpen {
        verify: true,
        ..load.open("victim", ID)
    };
    let mut session = server.open(open).await;
    session.announce(&load).await;
    session.send_wanted(&load).await;
    let ending = session.refused(frame_finish(load.finish())).await;
    assert_eq!(ending, refused(Code::DataLoss, "CHECKSUM"));
    server.assert_unpublished("victim").await;
}

#[tokio::test]
async fn what_was_never_synced_is_compared_before_a_synced_session_counts_it() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    let unsynced = pb::SenderOpen {
        commit_mode: pb::CommitMode::None as i32,
        ..load.open("victim", ID)
    };
    let mut session = server.open(unsynced.clone()).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 0)).await;
    session.send(load.chunk(0, 2)).await;
    session.settle().await;
    session
        .refused(frame_abort("INTERRUPTED"))
        .await
        .unwrap_err();
    // Another session without syncs takes it as it is.
    let mut session = server.open(unsynced).await;
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [1, 3].into());
    assert!(session.held[&0].is_empty());
    session
        .refused(frame_abort("INTERRUPTED"))
        .await
        .unwrap_err();
    // One that promises more does not.
    let mut session = server.open(load.open("victim", ID)).await;
    assert_eq!(session.accept.as_ref().unwrap().durable_bytes, 0);
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [1, 3].into());
    assert_eq!(session.held[&0], [0, 2].into());
    session.send(frame_compare(load.compare(0, 0, 1))).await;
    session.send(frame_compare(load.compare(0, 2, 1))).await;
    session.send(load.chunk(0, 1)).await;
    session.send(load.chunk(0, 3)).await;
    session.settle().await;
    session
        .until(|s| s.durable.get(&0).is_some_and(|cells| cells.len() == 4))
        .await;
    session.finish(&load).await;
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn a_refused_restart_leaves_unfinished_work_alone() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let (old, new) = (from_source(1, true), from_source(2, true));
    server.push(old.open("victim", ID), &old).await;
    let replacing = pb::SenderOpen {
        overwrite: true,
        ..new.open("victim", ID)
    };
    let mut session = server.open(replacing.clone()).await;
    session.announce(&new).await;
    session.send(new.chunk(0, 1)).await;
    session.settle().await;
    session
        .refused(frame_abort("INTERRUPTED"))
        .await
        .unwrap_err();
    let restart = pb::SenderOpen {
        restart: true,
        overwrite: false,
        ..replacing.clone()
    };
    let ending = server.refusal(restart.clone()).await;
    assert_eq!(ending, refused(Code::AlreadyExists, "EXISTS"));
    let row = server.status("victim").await.unwrap();
    assert_eq!(row.transfer.unwrap().durable_bytes, CHUNK as u64);
    // Where nothing refuses it, it starts over.
    let again = pb::SenderOpen {
        overwrite: true,
        ..restart
    };
    let mut session = server.open(again).await;
    session.announce(&new).await;
    assert_eq!(session.wanted[&0], [0, 1, 2, 3].into());
    session.send_wanted(&new).await;
    session.finish(&new).await;
    server.assert_landed("victim", &new);
}

#[tokio::test]
async fn a_checkpoint_that_appears_around_a_transfer_keeps_it_out() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = from_source(1, true);
    let mut outer = server.open(load.open("outer", ID)).await;
    let mut inner = server.open(load.open("outer/inner", [2; 16])).await;
    for session in [&mut outer, &mut inner] {
        session.announce(&load).await;
        session.send_wanted(&load).await;
        session.settle().await;
    }
    outer.finish(&load).await;
    let ending = inner.refused(frame_finish(load.finish())).await;
    assert_eq!(ending, refused(Code::AlreadyExists, "EXISTS"));
    server.assert_landed("outer", &load);
    assert!(!temp.path().join("outer/inner").exists());
}
