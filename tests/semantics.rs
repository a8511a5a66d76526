//! The promises of docs/semantics.md, one test for each, through the public
//! library. Where a push must stop at a certain byte, a peer that speaks by hand
//! plays its earlier session.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

mod common;

use common::{product::*, *};
use std::{
    fs,
    os::unix::fs::{FileExt, MetadataExt, symlink},
};
use tensorferry::{
    Embedded, Error, ErrorCode, PullOptions,
    format::{checksum::crc32c, npy::encode_header},
    plan::CheckpointName,
    protocol::{CommitMode, Durability, Layout},
    wire::pb,
};
use tonic::Code;

#[tokio::test]
async fn s01_what_is_published_is_the_source() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s01"));
    let server = TestServer::start(temp.path()).await;
    let report = push_plain(&server, &dir).await;
    assert_eq!((report.tensor_count, report.file_count), (2, 1));
    assert_eq!(report.wire_bytes, report.bytes);
    assert_landed(&server, &dir);
    let manifest = manifest(&temp.path().join("model"));
    assert_eq!(manifest["tensors"][1]["shape"], serde_json::json!([20, 5]));
    for (i, part) in Load::of_source(&open_source(&dir)).parts[..2]
        .iter()
        .enumerate()
    {
        assert_eq!(
            manifest["tensors"][i]["crc32c"],
            format!("{:08x}", crc32c(&part.bytes))
        );
    }
    // The whole file as numpy writes it.
    assert_eq!(
        fs::read(temp.path().join("model/b.npy")).unwrap(),
        fs::read(dir.join("b.npy")).unwrap()
    );
    // Byte 100,000 of the connection is in the middle of the first cell.
    let relay = damaging_relay(&server, 100_000).await;
    let client = tensorferry::Client::new(&relay.to_string()).unwrap();
    let damaged = client
        .push(open_source(&dir), &name("damaged"), defaults())
        .await
        .unwrap();
    assert_eq!(damaged.wire_bytes, report.bytes + CELL);
    server.assert_landed("damaged", &Load::of_source(&open_source(&dir)));
}

#[tokio::test]
async fn s02_a_name_shows_the_old_state_or_the_new_one() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s02"));
    let server = TestServer::start(temp.path()).await;
    let load = Load::of_source(&open_source(&dir));
    leave(&server, &load, [9; 16], &[0, 1, 2]).await;
    let visible = || {
        fs::read_dir(temp.path())
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect::<Vec<_>>()
    };
    assert_eq!(visible(), [".tensorferry"]);
    server.push(load.open("model", [9; 16]), &load).await;
    assert_landed(&server, &dir);
    // Replacing: the old one is whole until the new one is.
    let mut other = load.clone();
    other.parts[0].bytes[0] ^= 1;
    let open = pb::SenderOpen {
        overwrite: true,
        ..other.open("model", [8; 16])
    };
    let mut session = server.open(open).await;
    session.announce(&other).await;
    session.send_wanted(&other).await;
    assert_landed(&server, &dir);
    session.finish(&other).await;
    server.assert_landed("model", &other);
}

#[tokio::test]
async fn s03_every_entry_has_a_file_of_its_own() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s03"));
    let server = TestServer::start(temp.path()).await;
    for odd in ["A.npy", "a b.npy", "con.npy"] {
        fs::copy(dir.join("b.npy"), dir.join(odd)).unwrap();
    }
    push_plain(&server, &dir).await;
    assert_landed(&server, &dir);
    let file = |entry| {
        server
            .landed_file("model", entry)
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned()
    };
    assert_eq!(file("b"), "b.npy");
    assert_eq!(file("config.json"), "config.json");
    assert!(file("a b").starts_with("a_b~") && file("con").starts_with("con~"));
    assert!(file("a").to_lowercase() != file("A").to_lowercase());
    let indexed = options(|o| (o.layout, o.overwrite) = (Layout::Indexed, true));
    push(&server, &dir, indexed).await.unwrap();
    assert_landed(&server, &dir);
    assert!((0..5).all(|i| temp.path().join(format!("model/weight_{i}.npy")).exists()));
}

#[tokio::test]
async fn s04_no_name_leads_out_of_the_folder() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s04"));
    let server = TestServer::start(&temp.path().join("root")).await;
    for bad in ["..", "../x", "/x", "a//b", "a/../b", ".hidden", ""] {
        assert!(bad.parse::<CheckpointName>().is_err(), "{bad}");
    }
    let json = r#"{"../../escape":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}"#;
    let file = [&(json.len() as u64).to_le_bytes(), json.as_bytes(), b"data"].concat();
    fs::write(dir.join("x.safetensors"), file).unwrap();
    push_plain(&server, &dir).await;
    assert_landed(&server, &dir);
    assert_eq!(
        fs::read_dir(temp.path()).unwrap().count(),
        1,
        "nothing beside the root"
    );
    let outside = tempfile::tempdir().unwrap();
    symlink(outside.path(), server.root.join("link")).unwrap();
    let refused = server
        .client()
        .push(open_source(&dir), &name("link"), defaults())
        .await;
    assert!(matches!(refused, Err(Error::Refused { .. })), "{refused:?}");
    assert!(tree(outside.path()).is_empty());
}

#[tokio::test]
async fn s05_the_report_says_what_durable_meant() {
    const TMPFS: i64 = 0x0102_1994;
    let dir = source_dir("s05");
    let here = tempfile::tempdir().unwrap();
    let mut roots = vec![here];
    roots.extend(tempfile::tempdir_in("/dev/shm"));
    for root in roots {
        let server = TestServer::start(root.path()).await;
        let in_memory = rustix::fs::statfs(root.path()).unwrap().f_type as i64 == TMPFS;
        let report = push_plain(&server, &dir).await;
        assert!(!in_memory || report.durability == Durability::Process);
        assert_eq!(
            manifest(&root.path().join("model"))["durability"],
            report.durability.as_str()
        );
        let never = options(|o| (o.commit_mode, o.overwrite) = (CommitMode::None, true));
        fs::remove_dir_all(root.path().join("model")).unwrap();
        let report = push(&server, &dir, never).await.unwrap();
        assert_eq!(report.durability, Durability::Process);
    }
}

#[tokio::test]
async fn s06_the_mode_does_not_change_what_is_published() {
    let dir = source_dir("s06");
    let mut promised = Vec::new();
    for mode in [
        CommitMode::Strict,
        CommitMode::Group,
        CommitMode::End,
        CommitMode::None,
    ] {
        let temp = tempfile::tempdir().unwrap();
        let server = TestServer::start(temp.path()).await;
        let report = push(&server, &dir, options(|o| o.commit_mode = mode))
            .await
            .unwrap();
        promised.push(report.durability);
        assert_landed(&server, &dir);
    }
    assert_eq!(promised[..3], [promised[0]; 3]);
    assert_eq!(promised[3], Durability::Process);
}

#[tokio::test]
async fn s07_what_is_written_when_a_session_ends_is_made_durable() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s07"));
    let server = TestServer::start(temp.path()).await;
    let id = transfer_id(&server, &dir).await;
    let load = Load::of_source(&open_source(&dir));
    // Until the end nothing is committed in this mode.
    let open = pb::SenderOpen {
        commit_mode: pb::CommitMode::End.into(),
        ..load.open("model", id)
    };
    let mut session = server.open(open.clone()).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 2)).await;
    session.settle().await;
    assert!(session.durable.is_empty());
    drop(session);
    let mut session = server.open(open).await;
    session.announce(&load).await;
    session.send(load.chunk(0, 0)).await;
    session.settle().await;
    let (ending, ()) = tokio::join!(session.end(), server.stop());
    assert_eq!(ending, refused(Code::Unavailable, "DRAINING"));
    let server = TestServer::start(temp.path()).await;
    let stopped = server
        .client()
        .push(open_source(&dir), &name("model"), defaults());
    stopped.cancel();
    assert_eq!(class(stopped.await), (ErrorCode::Interrupted, 130));
    assert_eq!(push_plain(&server, &dir).await.resumed_bytes, 2 * CELL);
    assert_landed(&server, &dir);
}

#[tokio::test]
async fn s08_only_what_is_not_durable_is_sent() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s08"));
    let server = TestServer::start(temp.path()).await;
    let id = transfer_id(&server, &dir).await;
    leave(&server, &Load::of_source(&open_source(&dir)), id, &[0, 1]).await;
    let report = push_plain(&server, &dir).await;
    assert_eq!(
        (report.resumed_bytes, report.wire_bytes),
        (2 * CELL, report.bytes - 2 * CELL)
    );
    assert_landed(&server, &dir);
}

#[tokio::test]
async fn s09_an_unchanged_source_is_not_sent_twice() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s09"));
    let server = TestServer::start(temp.path()).await;
    assert!(!push_plain(&server, &dir).await.unchanged);
    let inode = || fs::metadata(temp.path().join("model")).unwrap().ino();
    let before = inode();
    for overwrite in [false, true] {
        let report = push(&server, &dir, options(|o| o.overwrite = overwrite))
            .await
            .unwrap();
        assert!(report.unchanged);
        assert_eq!(
            (report.wire_bytes, report.resumed_bytes, inode()),
            (0, report.bytes, before)
        );
    }
    fs::write(dir.join("config.json"), b"{\"layers\": 2}").unwrap();
    let unsettled = options(|o| o.overwrite = true);
    assert!(!push(&server, &dir, unsettled).await.unwrap().unchanged);
    assert_eq!(
        class(push(&server, &dir, defaults()).await),
        (ErrorCode::Exists, 9)
    );
}

#[tokio::test]
async fn s10_bytes_of_a_source_that_may_have_changed_are_held() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s10"));
    let server = TestServer::start(temp.path()).await;
    let held = async |load: &Load| {
        let mut session = server.open(load.open("model", [9; 16])).await;
        session.announce(load).await;
        session
            .refused(frame_abort("INTERRUPTED"))
            .await
            .unwrap_err();
        session.held[&0].len()
    };
    let load = Load::of_source(&open_source(&dir));
    assert!(load.sources.iter().all(|s| s.settled));
    leave(&server, &load, [9; 16], &[0, 1]).await;
    assert_eq!(held(&Load::of_source(&open_source(&dir))).await, 0);
    // Same size and mtime, same bytes: ctime tells that somebody wrote.
    let file = fs::File::options()
        .write(true)
        .open(dir.join("a.npy"))
        .unwrap();
    let mtime = file.metadata().unwrap().modified().unwrap();
    change_source(&dir, 0);
    change_source(&dir, 0);
    file.set_modified(mtime).unwrap();
    let touched = Load::of_source(&open_source(&dir));
    assert_eq!(held(&touched).await, 2);
    // Sent anew, but from a source that was not settled: not trusted either.
    let mut session = half_way(&server, &touched, [9; 16], &[0, 1]).await;
    session
        .refused(frame_abort("INTERRUPTED"))
        .await
        .unwrap_err();
    assert!(touched.sources.iter().any(|s| !s.settled));
    assert_eq!(held(&touched).await, 2);
}

#[tokio::test]
async fn s11_held_bytes_are_compared_and_only_different_ones_travel() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s11"));
    let server = TestServer::start(temp.path()).await;
    let id = transfer_id(&server, &dir).await;
    leave(
        &server,
        &Load::of_source(&open_source(&dir)),
        id,
        &[0, 1, 2],
    )
    .await;
    change_source(&dir, 1);
    let report = push_plain(&server, &dir).await;
    assert_eq!(
        (report.resumed_bytes, report.wire_bytes),
        (2 * CELL, report.bytes - 2 * CELL)
    );
    assert_landed(&server, &dir);
}

#[tokio::test]
async fn s12_a_source_that_changes_on_the_way_is_not_published() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s12"));
    let server = TestServer::start(temp.path()).await;
    let opened = open_source(&dir);
    change_source(&dir, 3);
    let result = server
        .client()
        .push(opened, &name("model"), defaults())
        .await;
    assert_eq!(class(result), (ErrorCode::SourceChanged, 24));
    assert!(!temp.path().join("model").exists());
    push_plain(&server, &dir).await;
    assert_landed(&server, &dir);
}

#[tokio::test]
async fn s13_entries_without_a_source_are_trusted_by_the_transfer_alone() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s13"));
    let server = TestServer::start(temp.path()).await;
    let mut load = Load::of_source(&open_source(&dir));
    load.sources.clear();
    load.parts
        .iter_mut()
        .for_each(|part| part.entry.sources.clear());
    leave(&server, &load, [9; 16], &[0, 1]).await;
    let mut session = half_way(&server, &load, [9; 16], &[]).await;
    assert!(session.held[&0].is_empty());
    assert_eq!(session.wanted[&0], [2, 3].into());
    session.send_wanted(&load).await;
    session.finish(&load).await;
    server.assert_landed("model", &load);
}

#[tokio::test]
async fn s14_work_of_another_source_is_adopted_only_with_the_same_entries() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s14"));
    let server = TestServer::start(temp.path()).await;
    let mut load = Load::of_source(&open_source(&dir));
    load.parts[0].bytes[CHUNK] ^= 1;
    leave(&server, &load, [9; 16], &[0, 1]).await;
    let report = push_plain(&server, &dir).await;
    assert_eq!(
        (report.resumed_bytes, report.wire_bytes),
        (CELL, report.bytes - CELL)
    );
    assert_landed(&server, &dir);
    fs::remove_dir_all(temp.path().join("model")).unwrap();
    let other = Load::of(vec![tensor("other", 2 * CHUNK)]);
    leave(&server, &other, [9; 16], &[0]).await;
    assert_eq!(
        class(push(&server, &dir, defaults()).await),
        (ErrorCode::Busy, 11)
    );
    let report = push(&server, &dir, options(|o| o.restart = true))
        .await
        .unwrap();
    assert_eq!(report.resumed_bytes, 0);
    assert_landed(&server, &dir);
}

#[tokio::test]
async fn s15_a_checkpoint_is_replaced_only_when_asked_for() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s15"));
    let server = TestServer::start(temp.path()).await;
    let other = Load::of(vec![tensor("other", CHUNK)]);
    server.push(other.open("model", [9; 16]), &other).await;
    assert_eq!(
        class(push(&server, &dir, defaults()).await),
        (ErrorCode::Exists, 9)
    );
    server.assert_landed("model", &other);
    let before = fs::metadata(temp.path().join("model")).unwrap().ino();
    push(&server, &dir, options(|o| o.overwrite = true))
        .await
        .unwrap();
    assert_landed(&server, &dir);
    assert_ne!(
        fs::metadata(temp.path().join("model")).unwrap().ino(),
        before
    );
}

#[tokio::test]
async fn s16_a_folder_of_somebody_else_is_never_replaced() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s16"));
    let server = TestServer::start(temp.path()).await;
    let model = temp.path().join("model");
    fs::create_dir(&model).unwrap();
    fs::write(model.join("thesis.tex"), b"years").unwrap();
    let overwrite = || options(|o| o.overwrite = true);
    assert_eq!(
        class(push(&server, &dir, overwrite()).await),
        (ErrorCode::Exists, 9)
    );
    assert_eq!(fs::read(model.join("thesis.tex")).unwrap(), b"years");
    fs::remove_file(model.join("thesis.tex")).unwrap();
    push_plain(&server, &dir).await;
    let inside = server
        .client()
        .push(open_source(&dir), &name("model/inside"), overwrite())
        .await;
    assert_eq!(class(inside), (ErrorCode::Exists, 9));
    assert_landed(&server, &dir);
}

#[tokio::test]
async fn s17_a_name_has_one_writer() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s17"));
    let server = TestServer::start(temp.path()).await;
    let id = transfer_id(&server, &dir).await;
    let load = Load::of_source(&open_source(&dir));
    let mut other = half_way(&server, &load, [9; 16], &[]).await;
    assert_eq!(
        class(push(&server, &dir, defaults()).await),
        (ErrorCode::Busy, 11)
    );
    other.refused(frame_abort("INTERRUPTED")).await.unwrap_err();
    let mut older = half_way(&server, &load, id, &[0]).await;
    let second = TestServer::start(temp.path()).await;
    assert_eq!(
        class(push(&second, &dir, defaults()).await),
        (ErrorCode::Busy, 11)
    );
    let (ending, report) = tokio::join!(older.end(), push_plain(&server, &dir));
    assert_eq!(ending, refused(Code::Aborted, "SUPERSEDED"));
    assert_eq!(report.resumed_bytes, CELL);
    assert_landed(&server, &dir);
}

#[tokio::test]
async fn s18_what_does_not_fit_is_refused_before_a_byte_is_sent() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s18"));
    let server = TestServer::start(temp.path()).await;
    push_plain(&server, &dir).await;
    let before = tree(temp.path());
    // A hole: takes no space here, and would there.
    let len = 15u64 << 40;
    let hole = fs::File::create(dir.join("hole.npy")).unwrap();
    let header = encode_header("|u1", false, &[len]);
    hole.write_all_at(&header, 0).unwrap();
    hole.set_len(header.len() as u64 + len).unwrap();
    let refused = server
        .client()
        .push(open_source(&dir), &name("huge"), defaults())
        .await;
    fs::remove_file(dir.join("hole.npy")).unwrap();
    assert_eq!(class(refused), (ErrorCode::NoSpace, 8));
    assert_eq!(tree(temp.path()), before);
}

#[tokio::test]
async fn s19_a_local_folder_is_pushed_into_in_the_same_way() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s19"));
    let folder = temp.path().join("my model (1)");
    for unchanged in [false, true] {
        let embedded = Embedded::start(&folder, 16 << 20).await.unwrap();
        let report = embedded
            .push(open_source(&dir), defaults())
            .unwrap()
            .await
            .unwrap();
        assert_eq!(report.unchanged, unchanged);
        embedded.stop().await.unwrap();
        assert!(folder.join("manifest.json").exists());
        assert!(!temp.path().join(".tensorferry").exists());
    }
    assert_eq!(
        fs::read(folder.join("a.npy")).unwrap(),
        fs::read(dir.join("a.npy")).unwrap()
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn s20_a_pull_lands_what_stands_on_the_server_and_the_new_one_when_that_is_replaced() {
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s20"));
    let server = TestServer::start(&temp.path().join("root")).await;
    push_plain(&server, &dir).await;
    let published: Vec<_> = server.client().list("").await.unwrap();
    let run = name(&published[0].name);
    let folder = temp.path().join("here/run");
    for (fill, unchanged) in [(None, false), (None, true), (Some(9u8), false)] {
        if let Some(fill) = fill {
            fs::write(dir.join("config.json"), [fill; 40]).unwrap();
            let mut options = defaults();
            options.overwrite = true;
            let pushed = server.client().push(open_source(&dir), &run, options);
            pushed.await.unwrap();
        }
        let mut options = PullOptions::default();
        options.transfer = defaults();
        options.transfer.overwrite = fill.is_some();
        let report = server.client().pull(&run, &folder, options).await.unwrap();
        assert_eq!(report.unchanged, unchanged);
        for file in ["a.npy", "b.npy"] {
            assert_eq!(
                fs::read(folder.join(file)).unwrap(),
                fs::read(dir.join(file)).unwrap()
            );
        }
        let side = fs::read(folder.join("files/config.json")).unwrap();
        assert_eq!(side, fs::read(dir.join("config.json")).unwrap());
        assert!(!temp.path().join("here/.tensorferry").exists());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn s21_what_is_ready_is_what_is_published() {
    use std::os::unix::fs::MetadataExt;
    let (temp, dir) = (tempfile::tempdir().unwrap(), source_dir("s21"));
    let (tell, told) = std::sync::mpsc::channel();
    let on_ready = tensorferry::OnReady::new(move |tensor| {
        let file = fs::File::open(&tensor.path).unwrap();
        let _ = tell.send((tensor.name.clone(), file));
    });
    let root = temp.path().join("root");
    let server = TestServer::with(&root, |b| b.on_ready(on_ready)).await;
    push_plain(&server, &dir).await;
    let run = &server.client().list("").await.unwrap()[0].name;
    let mut names = Vec::new();
    for (name, file) in told.try_iter().filter(|(name, _)| name != "config.json") {
        let published = fs::metadata(root.join(run).join(format!("{name}.npy"))).unwrap();
        let ready = file.metadata().unwrap();
        assert_eq!(
            (ready.ino(), ready.mode()),
            (published.ino(), published.mode())
        );
        assert_eq!(published.mode() & 0o222, 0, "{name} can be written to");
        names.push(name);
    }
    names.sort();
    assert_eq!(names, ["a", "b"]);
}

#[test]
fn every_promise_has_its_test() {
    let numbers = |text: &str, before: &str, after: &str| -> Vec<u32> {
        let parts = text.split(before).skip(1);
        parts
            .filter_map(|part| part.split_once(after)?.0.parse().ok())
            .collect()
    };
    let promised = numbers(include_str!("../docs/semantics.md"), "- **S", "**");
    let tested = numbers(include_str!("semantics.rs"), "async fn s", "_");
    assert_eq!(promised, (1..=promised.len() as u32).collect::<Vec<_>>());
    assert_eq!(promised, tested);
}
