//! Faults at system calls, placed by strace: deaths and failed syncs.
//!
//! strace counts for each thread by itself, so the k-th call of a thread is struck, for
//! k = 1, 2, … until a push comes through without one.

use crate::{
    campaign::{Episode, Ground, IMAGE_MIB},
    mount::Image,
    oracle::{End, Manner},
    scenario::{Report, Setting, is_root, soon},
    server::{Serve, has_tool},
    strike::Strike,
    track::Track,
};
use std::{path::Path, time::Duration};

/// Calls by which bytes and names get to the disk.
const DEADLY: &[&str] = &[
    "fdatasync",
    "fsync",
    "renameat",
    "syncfs",
    "fallocate",
    "pwrite64",
    "write",
    "sync_file_range",
    "ftruncate",
    "mkdirat",
    "unlinkat",
    "renameat2",
    "pwritev",
    "msync",
];
const SYNCS: &[&str] = &["fdatasync", "fsync", "syncfs"];
/// Small, so that a thread makes each call some ten times only.
const MAX_BYTES: u64 = 20 << 20;

/// A fault at every k-th call of every kind, in turn over the kinds.
fn sweep(points: u64, calls: &[&'static str], mut strike: impl FnMut(&'static str, u64) -> bool) {
    let mut open: Vec<&str> = calls.to_vec();
    let (mut k, mut done) = (1, 0);
    while !open.is_empty() {
        open.retain(|call| {
            if done >= points {
                return false;
            }
            done += 1;
            strike(call, k)
        });
        k += 1;
    }
}

fn why_not(title: &str) -> Option<Report> {
    if !has_tool("strace") {
        return Some(Report::skipped(title, "no strace"));
    }
    if !is_root() || !has_tool("losetup") {
        return Some(Report::skipped(title, "only root can mount"));
    }
    None
}

/// `kill -9` on entry of a system call, and then the power goes, too.
pub(crate) fn deaths(setting: &Setting) -> Report {
    let title = "kill and power cut at system calls";
    if let Some(skipped) = why_not(title) {
        return skipped;
    }
    let mut report = Report::new(title);
    with_disk(
        setting,
        &mut report,
        "syscalls",
        |setting, episode, report| {
            let log = setting.workdir.join("strace");
            sweep(setting.points(u64::MAX), DEADLY, |call, k| {
                let plain = episode.serve.clone();
                episode.serve =
                    plain
                        .clone()
                        .injecting(call, "signal=SIGKILL", &k.to_string(), &log);
                let struck = death(episode);
                episode.serve = plain;
                let again = format!("syscalls --seed {} (at {call} {k})", setting.seed);
                report.take(
                    &again,
                    &Default::default(),
                    std::mem::take(&mut episode.failures),
                );
                struck && report.failures.len() < 5
            });
        },
    );
    report
}

/// One push beneath a deadly tracer. Whether the server died.
fn death(episode: &mut Episode<'_>) -> bool {
    let started = episode.serve.start(&episode.ground.root());
    let mut died = true;
    if let Ok(mut server) = started {
        let manner = Manner::default();
        episode.sessions(&server, &Strike::none(), 0, &manner);
        // The last calls come when staging is removed after Done.
        died = soon(Duration::from_millis(150), || !server.is_alive());
        server.kill();
    }
    episode.tally.points += u64::from(died);
    finish(episode);
    died
}

/// Whether the sync that failed came after the two that follow the rename of a publish: Done
/// was said by then, and staging was being removed.
fn only_cleaning_failed(log: &Path) -> bool {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let renamed = lines.iter().rposition(|l| l.contains("renameat"));
    let failed = lines.iter().position(|l| l.contains("INJECTED"));
    let (Some(renamed), Some(failed)) = (renamed, failed) else {
        return false;
    };
    let between = lines.get(renamed..failed).unwrap_or_default();
    between.iter().filter(|l| l.contains("fsync(")).count() >= 2
}

/// Without power, and then to the end by a server of its own.
fn finish(episode: &mut Episode<'_>) {
    let serve = Serve::new(&episode.serve.binary);
    let struck = std::mem::replace(&mut episode.serve, serve);
    episode.look();
    if episode.failures.is_empty() {
        episode.complete();
    }
    episode.serve = struck;
    for track in &mut episode.tracks {
        track.next_version(&mut episode.dice);
    }
}

/// The first failure of a sync is final: the transfer ends with a typed error, nothing of
/// the group is acked (the power goes afterwards), and the server lives.
pub(crate) fn failed_syncs(setting: &Setting) -> Report {
    let title = "failed syncs";
    if let Some(skipped) = why_not(title) {
        return skipped;
    }
    let mut report = Report::new(title);
    let mut typed = 0;
    with_disk(setting, &mut report, "eio", |setting, episode, report| {
        let log = setting.workdir.join("strace");
        sweep(setting.points(u64::MAX), SYNCS, |call, k| {
            let plain = episode.serve.clone();
            episode.serve = plain
                .clone()
                .injecting(call, "error=EIO", &k.to_string(), &log);
            let failed = failed_sync(episode, &log);
            episode.serve = plain;
            typed += u64::from(failed == Some(true));
            let again = format!("eio --seed {} (at {call} {k})", setting.seed);
            report.take(
                &again,
                &Default::default(),
                std::mem::take(&mut episode.failures),
            );
            failed.is_some() && report.failures.len() < 5
        });
    });
    report
        .remarks
        .push(format!("{typed} sessions ended with STORAGE_IO_ERROR"));
    report
}

/// `None`: no sync failed. Else whether a session told so.
fn failed_sync(episode: &mut Episode<'_>, log: &Path) -> Option<bool> {
    let _ = std::fs::remove_file(log);
    let injected = || {
        let text = std::fs::read_to_string(log).unwrap_or_default();
        text.lines().filter(|l| l.contains("INJECTED")).count()
    };
    let storage = End::Refused(tonic::Code::Internal, "STORAGE_IO_ERROR".to_owned());
    let mut told = false;
    match episode.serve.start(&episode.ground.root()) {
        // A server that cannot make its folder durable says so and ends.
        Err(why) if injected() > 0 && why.contains("exit") => {}
        Err(why) => episode.failures.push(format!("no start: {why}")),
        Ok(mut server) => {
            let ends = episode.sessions(&server, &Strike::none(), 0, &Manner::default());
            told = ends.contains(&storage);
            for end in &ends {
                match end {
                    End::Done if injected() == 0 || only_cleaning_failed(log) => {}
                    End::Done => episode
                        .failures
                        .push("a sync had failed, and Done was said".to_owned()),
                    end if *end == storage && injected() > 0 => {}
                    other => episode.failures.push(format!("it ended with {other:?}")),
                }
            }
            if !server.is_alive() {
                episode
                    .failures
                    .push("the server died of a failed sync".to_owned());
            }
            server.kill();
        }
    }
    let count = injected();
    episode.tally.points += u64::from(count > 0);
    finish(episode);
    (count > 0).then_some(told)
}

/// The power goes between the rename of a publish and the sync of its folder: Done must
/// not be said, although xfs answers that sync with success.
pub(crate) fn late_cuts(setting: &Setting) -> Report {
    let title = "power cuts before the last sync";
    if let Some(skipped) = why_not(title) {
        return skipped;
    }
    let mut report = Report::new(title);
    for kind in ["ext4", "xfs"] {
        if !has_tool(&format!("mkfs.{kind}")) {
            report.remarks.push(format!("not run: {kind}"));
            continue;
        }
        with_disk_of(
            kind,
            setting,
            &mut report,
            "late-cuts",
            |setting, episode, _| {
                let log = setting.workdir.join("strace");
                let plain = episode.serve.clone();
                let slow = plain.clone();
                episode.serve = slow.injecting("fsync", "delay_enter=100000", "1+", &log);
                late_cut(episode);
                episode.serve = plain;
            },
        );
    }
    report
}

fn late_cut(episode: &mut Episode<'_>) {
    let server = episode.serve.start(&episode.ground.root());
    let Some(server) = episode.note(server) else {
        return;
    };
    let Ground::Disk(image) = &episode.ground else {
        return;
    };
    let manifest = image
        .root()
        .join(&episode.tracks[0].name)
        .join("manifest.json");
    let switch = image.switch();
    // Every fsync takes a while, so what is seen under the name is not yet durable.
    let watch = std::thread::spawn(move || {
        let is_there = || manifest.exists();
        let hit = soon(Duration::from_secs(30), is_there);
        switch.cut();
        hit
    });
    let ends = episode.sessions(&server, &Strike::none(), 0, &Manner::default());
    if !watch.join().unwrap_or(false) {
        episode
            .failures
            .push(format!("nothing was published: {ends:?}"));
    }
    episode.tally.points += 1;
    if ends == [End::Done] {
        episode
            .failures
            .push("Done was said after the power had gone".to_owned());
    }
    server.kill();
    finish(episode);
}

fn with_disk(
    setting: &Setting,
    report: &mut Report,
    title: &str,
    body: impl FnOnce(&Setting, &mut Episode<'_>, &mut Report),
) {
    with_disk_of("ext4", setting, report, title, body);
}

fn with_disk_of(
    kind: &str,
    setting: &Setting,
    report: &mut Report,
    title: &str,
    body: impl FnOnce(&Setting, &mut Episode<'_>, &mut Report),
) {
    let folder = setting.folder(title);
    let image = match Image::make(&folder, kind, IMAGE_MIB) {
        Ok(image) => image,
        Err(why) => return report.check(title, Err(why)),
    };
    let serve = Serve::new(&setting.binary);
    let mut episode = Episode::new(&setting.runtime, serve, Ground::Disk(image), setting.seed);
    episode.tracks = vec![Track::new("traced/step", &mut episode.dice, MAX_BYTES).in_files()];
    body(setting, &mut episode, report);
    let (tally, failures) = episode.run(0);
    report.take(title, &tally, failures);
}
