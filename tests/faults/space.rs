//! Disks without room: refused in time, resumable, and nothing is left behind.

use crate::{
    campaign::{Episode, Ground},
    frames::{CHUNK, Load, frame_open, tensor},
    mount::Image,
    oracle::{End, Manner, end_of},
    scenario::{Report, Setting, is_root, soon},
    server::{Serve, Server, has_tool},
    strike::{Moment, Strike, When},
    track::Track,
};
use std::{fs::File, time::Duration};
use tensorferry::wire::pb::{self, ferry_client::FerryClient};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Code;

const MAX_BYTES: u64 = 40 << 20;

fn no_room() -> End {
    End::Refused(Code::ResourceExhausted, "DISK_QUOTA".to_owned())
}

/// Full before, full meanwhile, and a limit on the length of files.
pub(crate) fn space(setting: &Setting) -> Report {
    let title = "disks without room";
    if !is_root() || !has_tool("losetup") {
        return Report::skipped(title, "only root can mount");
    }
    let mut report = Report::new(title);
    for kind in ["ext4", "xfs"] {
        if !has_tool(&format!("mkfs.{kind}")) {
            report.remarks.push(format!("not run: {kind}"));
            continue;
        }
        let folder = setting.folder(&format!("space-{kind}"));
        let mib = if kind == "xfs" { 320 } else { 160 };
        let made = Image::make(&folder, kind, mib);
        match made {
            Ok(image) => one_disk(setting, image, &mut report, kind),
            Err(why) => report.check("space", Err(why)),
        }
    }
    let folder = setting.folder("space-limit");
    let mut episode = Episode::new(
        &setting.runtime,
        Serve::new(&setting.binary),
        Ground::Folder(folder),
        setting.seed,
    );
    limited_files(&mut episode);
    let (tally, failures) = episode.run(0);
    report.take("space (file limit)", &tally, failures);
    report
}

fn one_disk(setting: &Setting, image: Image, report: &mut Report, kind: &str) {
    let (serve, seed) = (Serve::new(&setting.binary), setting.seed);
    let mut episode = Episode::new(&setting.runtime, serve, Ground::Disk(image), seed);
    refused_before(&mut episode);
    for mode in [pb::CommitMode::Strict, pb::CommitMode::Group] {
        full_meanwhile(&mut episode, mode);
    }
    let (tally, failures) = episode.run(0);
    report.take(&format!("space --seed {seed} ({kind})"), &tally, failures);
}

fn free_bytes(episode: &Episode<'_>) -> u64 {
    let Ground::Disk(image) = &episode.ground else {
        return 0;
    };
    if let Ok(point) = File::open(image.point()) {
        // What is allocated late is allocated now.
        let _ = rustix::fs::syncfs(&point);
    }
    image.free_bytes()
}

/// More than there is: no Accept, and the disk is as it was.
fn refused_before(episode: &mut Episode<'_>) {
    let server = episode.serve.start(&episode.ground.root());
    let Some(server) = episode.note(server) else {
        return;
    };
    // The first one makes the service folders.
    let mut before = 0;
    for _ in 0..2 {
        before = free_bytes(episode);
        let load = Load::of(vec![tensor("big", 100)]);
        let open = pb::SenderOpen {
            total_bytes: before + (1 << 20),
            chunk_len: CHUNK as u32,
            ..load.open("too/big", [8; 16])
        };
        let address = server.address.to_string();
        let (accepted, end) = episode.runtime.block_on(open_only(&address, open));
        episode.tally.points += 1;
        if accepted || end != no_room() {
            episode.failures.push(format!(
                "too much for the disk: accepted {accepted}, then {end:?}"
            ));
        }
    }
    let after = free_bytes(episode);
    if after != before {
        episode.failures.push(format!(
            "a refusal changed the free bytes from {before} to {after}"
        ));
    }
    let stopped = server.stop();
    episode.note(stopped);
}

/// Opens and listens.
async fn open_only(address: &str, open: pb::SenderOpen) -> (bool, End) {
    let Ok(mut ferry) = FerryClient::connect(format!("http://{address}")).await else {
        return (false, End::Gone("no connection".to_owned()));
    };
    let (out, frames_out) = mpsc::channel(16);
    let mut frames = match ferry.push(ReceiverStream::new(frames_out)).await {
        Ok(answer) => answer.into_inner(),
        Err(status) => return (false, end_of(&status)),
    };
    let _ = out.send(frame_open(open)).await;
    match frames.message().await {
        Ok(frame) => (frame.is_some(), End::Done),
        Err(status) => (false, end_of(&status)),
    }
}

/// A rival takes all the room while a push is under way.
fn full_meanwhile(episode: &mut Episode<'_>, mode: pb::CommitMode) {
    let server = episode.serve.start(&episode.ground.root());
    let Some(mut server) = episode.note(server) else {
        return;
    };
    let mut track = large_track(episode, &format!("full/{}", mode as i32));
    track.mode = mode;
    episode.tracks = vec![track];
    let before = free_bytes(episode);
    let rival = match &episode.ground {
        Ground::Disk(image) => image.point().join("rival"),
        other => other.root().join("rival"),
    };
    let file = rival.clone();
    let at = When::At(Moment::Sent(30), Duration::ZERO);
    let strike = Strike::new(at, false, move || fill(&file));
    let manner = Manner {
        pause: Duration::from_millis(2),
        ..Manner::default()
    };
    let ends = episode.sessions(&server, &strike, 0, &manner);
    episode.tally.points += 1;
    if ends != [no_room()] {
        episode
            .failures
            .push(format!("the disk ran full, and it ended with {ends:?}"));
    }
    if !server.is_alive() {
        episode
            .failures
            .push("the server died of a full disk".to_owned());
    }
    let _ = std::fs::remove_file(&rival);
    // First resumed to its end; the name is then free again by hand.
    let ends = episode.sessions(&server, &Strike::none(), 0, &Manner::default());
    if ends != [End::Done] {
        episode
            .failures
            .push(format!("there is room again, and it ended with {ends:?}"));
    }
    let root = episode.ground.root();
    for track in &mut episode.tracks {
        track.check_disk(&root);
        episode.failures.append(&mut track.failures);
        let _ = std::fs::remove_dir_all(root.join(&track.name));
    }
    // The same once more, and this time it is thrown away.
    let name = format!("full/discard{}", mode as i32);
    let mut track = large_track(episode, &name);
    track.mode = mode;
    episode.tracks = vec![track];
    let manner = Manner {
        pause: Duration::ZERO,
        leave_after: Some(60),
        ..Manner::default()
    };
    episode.sessions(&server, &Strike::none(), 0, &manner);
    let discarded = episode.runtime.block_on(discard(&server, &name));
    if let Err(why) = discarded {
        episode.failures.push(format!("discard: {why}"));
    }
    // A few folders and locks may stay; xfs takes a moment.
    let mut after = 0;
    soon(Duration::from_secs(5), || {
        after = free_bytes(episode);
        after + (256 << 10) >= before
    });
    if after + (256 << 10) < before {
        episode.failures.push(format!(
            "after discard there are {after} free bytes of {before}"
        ));
    }
    episode.tracks.clear();
    let stopped = server.stop();
    episode.note(stopped);
}

fn large_track(episode: &mut Episode<'_>, name: &str) -> Track {
    loop {
        // A shared file has all its room from the beginning: no rival can take that.
        let track = Track::new(name, &mut episode.dice, MAX_BYTES).in_files();
        // Enough that a group is committed, and a disk can run full meanwhile.
        if track.load.total_bytes() > MAX_BYTES / 2 {
            return track;
        }
    }
}

/// Everything that is free, block by block at the end.
fn fill(path: &std::path::Path) {
    let Ok(file) = File::create(path) else {
        return;
    };
    let mut at = 0;
    for step in [16 << 20, 1 << 20, 64 << 10, 4096_u64] {
        let flags = rustix::fs::FallocateFlags::empty();
        while rustix::fs::fallocate(&file, flags, at, step).is_ok() {
            at += step;
        }
    }
}

async fn discard(server: &Server, name: &str) -> Result<(), String> {
    // The session before may still be ending.
    let mut last = String::new();
    for _ in 0..100 {
        let mut ferry = FerryClient::connect(format!("http://{}", server.address))
            .await
            .map_err(|e| e.to_string())?;
        let request = pb::DiscardRequest {
            checkpoint: name.to_owned(),
        };
        match ferry.discard(request).await {
            Ok(_) => return Ok(()),
            Err(status) => last = format!("{:?}", end_of(&status)),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Err(last)
}

/// No file may be longer than a MiB: a typed error, not the signal that comes with it.
fn limited_files(episode: &mut Episode<'_>) {
    let plain = episode.serve.clone();
    episode.serve.wrapper = ["prlimit", "--fsize=1048576"].map(str::to_owned).to_vec();
    let server = episode.serve.start(&episode.ground.root());
    let Some(mut server) = episode.note(server) else {
        return;
    };
    episode.tracks = vec![large_track(episode, "limit/step")];
    let ends = episode.sessions(&server, &Strike::none(), 0, &Manner::default());
    episode.tally.points += 1;
    let is_typed = ends.iter().all(|end| {
        matches!(end, End::Refused(Code::ResourceExhausted | Code::Internal, reason)
            if reason == "DISK_QUOTA" || reason == "STORAGE_IO_ERROR")
    });
    if !is_typed {
        episode.failures.push(format!("a limit on files: {ends:?}"));
    }
    if !server.is_alive() {
        episode
            .failures
            .push("the server died of a limit on files".to_owned());
    }
    server.kill();
    episode.serve = plain;
    episode.complete();
}
