//! Files that are cut while they are mapped, written or read.

use crate::{
    campaign::{Episode, Ground},
    client::{Push, Source},
    dice::Dice,
    oracle::{End, Manner},
    scenario::{Report, Setting},
    server::Serve,
    strike::{Moment, Strike, When},
    track::{Track, file_of},
};
use std::{fs::File, time::Duration};

/// The largest file of a staging is cut under the server; the other transfer goes on.
pub(crate) fn staging(setting: &Setting) -> Report {
    let mut report = Report::new("staged files cut");
    for (i, write) in ["auto", "map"].into_iter().cycle().enumerate() {
        if i as u64 >= setting.points(4) {
            break;
        }
        let seed = setting.seed + i as u64;
        let mut serve = Serve::new(&setting.binary);
        serve.options = vec!["--write".to_owned(), write.to_owned()];
        let folder = setting.folder("cut-staging");
        let ground = Ground::Folder(folder);
        let mut episode = Episode::new(&setting.runtime, serve, ground, seed);
        one_staging(&mut episode);
        let (tally, failures) = episode.run(0);
        report.take(
            &format!("cut-staging --seed {seed} --points 1 ({write})"),
            &tally,
            failures,
        );
    }
    report
}

fn one_staging(episode: &mut Episode<'_>) {
    let server = episode.serve.start(&episode.ground.root());
    let Some(mut server) = episode.note(server) else {
        return;
    };
    let mut cut = Track::new("cut/step", &mut episode.dice, 24 << 20).in_files();
    // What lies on the disk may have changed after it was acked: read again, it must show.
    cut.verify = true;
    let largest = cut.load.parts.iter().max_by_key(|p| p.bytes.len());
    let file = largest.map(file_of).unwrap_or_default();
    let path = cut.staging(&episode.ground.root()).join("data").join(file);
    episode.tracks = vec![cut, Track::new("whole/step", &mut episode.dice, 24 << 20)];
    let count = episode.tracks[0].cells_left();
    let at = When::At(Moment::Sent(count / 2), Duration::ZERO);
    let strike = Strike::new(at, false, move || {
        if let Ok(file) = File::options().write(true).open(&path) {
            let _ = file.set_len(4096);
        }
    });
    let manner = Manner {
        pause: Duration::from_millis(3),
        ..Manner::default()
    };
    let ends = episode.sessions(&server, &strike, 0, &manner);
    episode.tally.points += 1;
    let is_typed = matches!(&ends[0], End::Refused(_, reason)
        if reason == "STORAGE_IO_ERROR" || reason == "CHECKSUM");
    // Nothing of the file may have been there yet; then it is right in the end.
    let is_done = ends[0] == End::Done;
    if !is_typed && !is_done {
        episode.failures.push(format!(
            "a staged file was cut, and it ended with {:?}",
            ends[0]
        ));
    }
    if ends[1] != End::Done {
        episode
            .failures
            .push(format!("the other transfer ended with {:?}", ends[1]));
    }
    if !server.is_alive() {
        episode
            .failures
            .push("the server died of a cut file".to_owned());
    }
    let root = episode.ground.root();
    if !is_done {
        episode.tracks.remove(0);
    }
    for track in &mut episode.tracks {
        track.check_disk(&root);
        episode.failures.append(&mut track.failures);
    }
    let stopped = server.stop();
    episode.note(stopped);
}

/// The largest source file is cut under a push: an error that names it, never a signal.
pub(crate) fn source(setting: &Setting) -> Report {
    let mut report = Report::new("source files cut");
    let again = format!("cut-source --seed {}", setting.seed);
    for (i, read) in ["map", "pread"].into_iter().cycle().enumerate() {
        if i as u64 >= setting.points(2) {
            break;
        }
        let folder = setting.folder("cut-source");
        let mut dice = Dice::new(setting.seed + i as u64);
        let source = Source::make(&folder.join("source"), &mut dice, 40 << 20);
        let server = match Serve::new(&setting.binary).start(&folder.join("root")) {
            Ok(server) => server,
            Err(why) => {
                report.check(&again, Err(why));
                break;
            }
        };
        let options = ["--read", read, "--bwlimit", "10M", "--lanes", "1"];
        let binary = &setting.binary;
        let mut push = Push::start(binary, &source, server.address, "cut", &options, &folder);
        std::thread::sleep(Duration::from_millis(dice.between(300, 1200)));
        let cut = File::options().write(true).open(source.largest());
        let cut = cut.and_then(|file| file.set_len(1 << 20));
        report.check(&again, cut.map_err(|e| e.to_string()));
        report.tally.points += 1;
        let ended = push.wait(Duration::from_secs(60));
        let code = ended.and_then(|status| status.code());
        let stderr = push.stderr();
        let names_it = stderr.contains("layer0");
        if code != Some(24) && code != Some(1) && code != Some(3) || !names_it {
            let what = format!("{read}: exit {code:?} ({ended:?}): {stderr}");
            report.check(&again, Err(what));
        }
        report.remarks.push(format!("{read}: exit {code:?}"));
        if folder.join("root/cut/manifest.json").exists() {
            report.check(&again, Err("a cut source was published".to_owned()));
        }
        let stopped = server.stop();
        report.check(&again, stopped);
    }
    report
}
