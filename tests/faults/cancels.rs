//! Sessions that end in the middle, thousands of them: the server is then as before.

use crate::{
    campaign::{Episode, Ground},
    oracle::{self, End, Manner},
    peers::settled,
    scenario::{Report, Setting, soon},
    server::Serve,
    strike::Strike,
    track::Track,
};
use std::time::Duration;

/// Sessions at the same time, each of a name of its own.
const LANES: u64 = 4;
/// Anonymous memory that an allocator may keep.
const SLACK_KIB: u64 = 96 << 10;

/// A storm of cancelled sessions.
pub(crate) fn storm(setting: &Setting) -> Report {
    let mut report = Report::new("cancelled sessions");
    let points = setting.points(300);
    let folder = setting.folder("cancels");
    let mut serve = Serve::new(&setting.binary);
    serve.options = vec!["--budget".to_owned(), "16M".to_owned()];
    let ground = Ground::Folder(folder);
    let mut episode = Episode::new(&setting.runtime, serve, ground, setting.seed);
    let again = format!("cancels --seed {} --points {points}", setting.seed);
    let server = match episode.serve.start(&episode.ground.root()) {
        Ok(server) => server,
        Err(why) => {
            report.check(&again, Err(why));
            return report;
        }
    };
    episode.tracks = (0..LANES)
        .map(|i| Track::new(&format!("storm{i}/step"), &mut episode.dice, 3 << 20))
        .collect();
    // The first ones warm it up: pools, threads, the allocator. On a busy machine only those
    // that come to their end are sure to have needed all of them.
    episode.sessions(&server, &Strike::none(), 0, &Manner::default());
    for track in &mut episode.tracks {
        track.next_version(&mut episode.dice);
    }
    wave(&mut episode, &server, 20);
    let before = settled(&server);
    let mut highest = before;
    while report.tally.points < points && episode.failures.is_empty() {
        report.tally.points += wave(&mut episode, &server, 25.min(points));
        let now = server.usage();
        highest.fd_count = highest.fd_count.max(now.fd_count);
        highest.anonymous_kib = highest.anonymous_kib.max(now.anonymous_kib);
    }
    let is_back = soon(Duration::from_secs(20), || {
        let now = server.usage();
        now.fd_count <= before.fd_count
            && now.thread_count <= before.thread_count
            && now.anonymous_kib <= before.anonymous_kib + SLACK_KIB
    });
    let after = server.usage();
    report.remarks.push(format!(
        "before {before:?}, highest {highest:?}, after {after:?}"
    ));
    if !is_back {
        let what = format!("the server had {before:?} and keeps {after:?}");
        report.check(&again, Err(what));
    }
    // Everything is still there to be resumed.
    let ends = episode.sessions(&server, &Strike::none(), 0, &Manner::default());
    if ends.iter().any(|end| *end != End::Done) {
        episode.failures.push(format!("after the storm: {ends:?}"));
    }
    let stopped = server.stop();
    episode.note(stopped);
    episode.look();
    let (tally, failures) = episode.run(0);
    report.take(&again, &tally, failures);
    report
}

/// `count` sessions of each name, cancelled at any point. Returns how many in all.
fn wave(episode: &mut Episode<'_>, server: &crate::server::Server, count: u64) -> u64 {
    let (root, address) = (episode.ground.root(), server.address);
    let mut set = tokio::task::JoinSet::new();
    for mut track in episode.tracks.drain(..) {
        let (root, mut dice) = (root.clone(), crate::dice::Dice::new(episode.dice.next()));
        set.spawn_on(
            async move {
                for _ in 0..count {
                    let limit = Duration::from_micros(dice.below(9000));
                    let manner = Manner {
                        pause: Duration::from_millis(1),
                        leave_after: Some(dice.below(6)),
                        ..Manner::default()
                    };
                    let next = crate::dice::Dice::new(dice.next());
                    let push = oracle::push(
                        &mut track,
                        address,
                        Some(&root),
                        Strike::none(),
                        &manner,
                        next,
                    );
                    let _ = tokio::time::timeout(limit, push).await;
                    if track.done.is_some() {
                        track.next_version(&mut dice);
                    }
                }
                track
            },
            episode.runtime.handle(),
        );
    }
    let mut tracks = episode.runtime.block_on(set.join_all());
    tracks.sort_by(|a, b| a.name.cmp(&b.name));
    for track in &mut tracks {
        episode.failures.append(&mut track.failures);
    }
    episode.tracks = tracks;
    count * LANES
}
