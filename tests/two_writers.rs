//! Two sessions want the same name.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::*;
use tensorferry::wire::pb;
use tonic::Code;

fn load() -> Load {
    Load::of(vec![tensor("w", 3 * CHUNK + 1), blob("config.json", b"{}")])
}

/// A session that has sent one cell and is still open.
async fn half_way(server: &TestServer, load: &Load, id: [u8; 16]) -> Session {
    let mut session = server.open(load.open("victim", id)).await;
    session.announce(load).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    session
}

#[tokio::test]
async fn h21_a_repeated_push_is_told_that_nothing_changed() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let open = pb::SenderOpen {
        fingerprint: vec![7; 16].into(),
        ..load.open("victim", [1; 16])
    };
    let first = server.push(open.clone(), &load).await;
    assert!(!first.unchanged && first.stages.is_some());
    let before = tree(&temp.path().join("victim"));
    for overwrite in [false, true] {
        let mut again = server
            .call(frame_open(pb::SenderOpen {
                overwrite,
                ..open.clone()
            }))
            .await;
        assert_eq!(again.end().await, Ok(()));
        assert!(again.accept.is_none());
        assert_eq!(
            again.done,
            Some(pb::Done {
                unchanged: true,
                // Nothing was to be done.
                stages: None,
                ..first.clone()
            })
        );
    }
    assert_eq!(tree(&temp.path().join("victim")), before);
    let hash = blake3::hash(&std::fs::read(temp.path().join("victim/manifest.json")).unwrap());
    assert_eq!(first.manifest_blake3[..], hash.as_bytes()[..]);
    server.assert_quiet().await;
}

#[tokio::test]
async fn h21_the_same_content_is_only_assumed_of_the_same_transfer_and_fingerprint() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let open = pb::SenderOpen {
        fingerprint: vec![7; 16].into(),
        ..load.open("victim", [1; 16])
    };
    server.push(open.clone(), &load).await;
    let exists = refused(Code::AlreadyExists, "EXISTS");
    for other in [
        pb::SenderOpen {
            transfer_id: vec![2; 16].into(),
            ..open.clone()
        },
        pb::SenderOpen {
            fingerprint: vec![8; 16].into(),
            ..open.clone()
        },
        pb::SenderOpen {
            fingerprint: Vec::new().into(),
            ..open.clone()
        },
    ] {
        assert_eq!(server.refusal(other).await, exists);
    }
    // No fingerprint equals no fingerprint: nobody knows whether it changed.
    let unknown = load.open("unsettled", [1; 16]);
    server.push(unknown.clone(), &load).await;
    assert_eq!(server.refusal(unknown).await, exists);
    server.assert_landed("victim", &load);
}

#[tokio::test]
async fn h22_another_transfer_of_a_live_name_is_locked_out() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let mut live = half_way(&server, &load, [1; 16]).await;
    let locked = refused(Code::FailedPrecondition, "LOCKED");
    for (overwrite, restart) in [(false, false), (true, true)] {
        let open = pb::SenderOpen {
            overwrite,
            restart,
            ..load.open("victim", [2; 16])
        };
        assert_eq!(server.refusal(open).await, locked);
    }
    let request = pb::DiscardRequest {
        checkpoint: "victim".to_owned(),
    };
    let discard = server.ferry().await.discard(request).await.unwrap_err();
    assert_eq!(
        code_and_reason(&discard),
        (Code::FailedPrecondition, "LOCKED".to_owned())
    );
    assert!(
        server
            .status("victim")
            .await
            .unwrap()
            .transfer
            .unwrap()
            .active
    );
    // The one that was there does not notice.
    live.wanted.get_mut(&0).unwrap().remove(&0);
    live.send_wanted(&load).await;
    live.finish(&load).await;
    server.assert_landed("victim", &load);
    server.serves_others().await;
}

#[tokio::test]
async fn h22_the_same_transfer_takes_over_from_its_older_session() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let mut older = half_way(&server, &load, [1; 16]).await;
    let mut newer = server.open(load.open("victim", [1; 16])).await;
    assert_eq!(older.end().await, refused(Code::Aborted, "SUPERSEDED"));
    let (old, new) = (older.accept.unwrap(), newer.accept.clone().unwrap());
    assert_eq!((old.epoch, new.epoch), (1, 2));
    assert_ne!(old.session_token, new.session_token);
    // What the older one had written is durable before the newer one begins.
    assert_eq!(new.durable_bytes, CHUNK as u64);
    newer.announce(&load).await;
    assert_eq!(newer.wanted[&0], [1, 2, 3].into());
    newer.send_wanted(&load).await;
    newer.finish(&load).await;
    server.assert_landed("victim", &load);
    server.serves_others().await;
}

#[tokio::test]
async fn h22_many_takeovers_in_a_row_lose_nothing() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = Load::of(vec![tensor("w", 12 * CHUNK)]);
    let mut older: Option<Session> = None;
    for cell in 0..12 {
        let mut session = server.open(load.open("victim", [1; 16])).await;
        if let Some(mut older) = older {
            assert_eq!(older.end().await, refused(Code::Aborted, "SUPERSEDED"));
        }
        assert_eq!(
            session.accept.as_ref().unwrap().durable_bytes,
            cell * CHUNK as u64
        );
        session.announce(&load).await;
        session.send(load.chunk(0, cell)).await;
        session.settle().await;
        older = Some(session);
    }
    older.unwrap().finish(&load).await;
    server.assert_landed("victim", &load);
    server.assert_quiet().await;
}

#[tokio::test]
async fn h22_idle_work_of_another_transfer_is_kept_unless_restart_says_otherwise() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let (load, other) = (load(), Load::of(vec![tensor("w", 3 * CHUNK + 2)]));
    half_way(&server, &load, [1; 16])
        .await
        .refused(frame_abort(""))
        .await
        .unwrap_err();
    let locked = refused(Code::FailedPrecondition, "LOCKED");
    assert_eq!(server.refusal(other.open("victim", [2; 16])).await, locked);
    // An open manifest says nothing of what will come, so nothing can be adopted.
    assert_eq!(server.refusal(open_ended("victim", [2; 16])).await, locked);
    // The owner with other options would land something else in the same files.
    let indexed = pb::SenderOpen {
        layout: pb::Layout::Indexed.into(),
        ..load.open("victim", [1; 16])
    };
    assert_eq!(server.refusal(indexed).await, locked);
    let kept = server.status("victim").await.unwrap().transfer.unwrap();
    assert_eq!((kept.durable_bytes, kept.active), (CHUNK as u64, false));
    let restart = pb::SenderOpen {
        restart: true,
        ..other.open("victim", [2; 16])
    };
    assert_eq!(
        server.push(restart, &other).await.total_bytes,
        other.total_bytes()
    );
    server.assert_landed("victim", &other);
    server.assert_quiet().await;
}

#[tokio::test]
async fn h22_idle_work_with_the_same_entries_is_adopted_but_not_trusted() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(temp.path()).await;
    let load = load();
    let mut first = half_way(&server, &load, [1; 16]).await;
    first.send(load.chunk(0, 1)).await;
    first.settle().await;
    first.refused(frame_abort("")).await.unwrap_err();
    // The same names and shapes from another machine, where cell 1 has other bytes.
    let mut other = load.clone();
    other.parts[0].bytes[CHUNK] ^= 1;
    let mut session = server.open(other.open("victim", [2; 16])).await;
    assert_eq!(session.accept.as_ref().unwrap().durable_bytes, 0);
    session.announce(&other).await;
    assert_eq!(session.held[&0], [0, 1].into());
    assert_eq!(session.wanted[&0], [2, 3].into());
    // Held is not sent: finish must wait for the comparison.
    session.send_wanted(&other).await;
    session.wanted.clear();
    session.send(frame_compare(other.compare(0, 0, 2))).await;
    session
        .until(|s| s.kept.contains_key(&0) && s.wanted.contains_key(&0))
        .await;
    assert_eq!(
        (&session.kept[&0], &session.wanted[&0]),
        (&[0].into(), &[1].into())
    );
    session.send_wanted(&other).await;
    session.finish(&other).await;
    server.assert_landed("victim", &other);
    server.serves_others().await;
}

#[tokio::test]
async fn h22_two_servers_on_one_root_lock_each_other_out() {
    let temp = tempfile::tempdir().unwrap();
    let (one, two) = (
        TestServer::start(temp.path()).await,
        TestServer::start(temp.path()).await,
    );
    let load = load();
    let mut live = half_way(&one, &load, [1; 16]).await;
    let locked = refused(Code::FailedPrecondition, "LOCKED");
    // The same transfer too: the other server cannot end a session of this one.
    for id in [1, 2] {
        assert_eq!(two.refusal(load.open("victim", [id; 16])).await, locked);
        let restart = pb::SenderOpen {
            restart: true,
            ..load.open("victim", [id; 16])
        };
        assert_eq!(two.refusal(restart).await, locked);
    }
    let request = pb::DiscardRequest {
        checkpoint: "victim".to_owned(),
    };
    let discard = two.ferry().await.discard(request).await.unwrap_err();
    assert_eq!(
        code_and_reason(&discard),
        (Code::FailedPrecondition, "LOCKED".to_owned())
    );
    // Other names are free on both.
    two.serves_others().await;
    live.send(load.chunk(0, 1)).await;
    live.settle().await;
    live.refused(frame_abort("")).await.unwrap_err();
    // What one began the other goes on with.
    let mut session = two.open(load.open("victim", [1; 16])).await;
    session.announce(&load).await;
    assert_eq!(session.wanted[&0], [2, 3].into());
    session.send_wanted(&load).await;
    session.finish(&load).await;
    one.assert_landed("victim", &load);
    one.assert_quiet().await;
}
