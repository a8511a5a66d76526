//! Clients that die, networks that fail, and peers that fall silent: seen with the
//! product's own client.

use crate::{
    client::{Push, Source},
    dice::Dice,
    relay::{Relay, Weather},
    scenario::{Report, Setting, soon},
    server::{Serve, Server, Usage},
    track::whole,
};
use rustix::process::Signal;
use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

/// A push that takes longer hangs.
const HANG: Duration = Duration::from_secs(180);
/// Within this time a silent peer is noticed.
const NOTICED: Duration = Duration::from_secs(30);
const BYTES: u64 = 40 << 20;

/// A server, a source, and folders for both.
struct Stage {
    server: Server,
    source: Source,
    root: PathBuf,
    folder: PathBuf,
    dice: Dice,
}

impl Stage {
    fn set(setting: &Setting, title: &str, bytes: u64) -> Result<Stage, String> {
        let folder = setting.folder(title);
        let mut dice = Dice::new(setting.seed);
        let source = Source::make(&folder.join("source"), &mut dice, bytes);
        let root = folder.join("root");
        Ok(Stage {
            server: Serve::new(&setting.binary).start(&root)?,
            source,
            root,
            folder,
            dice,
        })
    }

    fn push(&self, setting: &Setting, relay: &Relay, name: &str, options: &[&str]) -> Push {
        let binary = &setting.binary;
        Push::start(
            binary,
            &self.source,
            relay.address,
            name,
            options,
            &self.folder,
        )
    }

    fn relay(&self, setting: &Setting, weather: Weather) -> Relay {
        Relay::start_on(setting.runtime.handle(), self.server.address, weather)
    }

    fn landed(&self, name: &str) -> Result<(), String> {
        whole(&self.root.join(name), &self.source.load)
    }

    fn forget(&self, name: &str) {
        let _ = std::fs::remove_dir_all(self.root.join(name));
    }
}

fn run(
    setting: &Setting,
    title: &str,
    command: &str,
    bytes: u64,
    body: impl FnOnce(&mut Stage, &mut Report) -> Result<(), String>,
) -> Report {
    let mut report = Report::new(title);
    let again = format!("{command} --seed {}", setting.seed);
    match Stage::set(setting, command, bytes) {
        Ok(mut stage) => {
            let mut result = body(&mut stage, &mut report);
            if result.is_ok() && !stage.server.is_alive() {
                result = Err("the server died".to_owned());
            }
            report.check(&again, result);
        }
        Err(why) => report.check(&again, Err(why)),
    }
    report
}

/// `kill -9` of the client program; what it had heard to be durable must not travel again.
pub(crate) fn clients(setting: &Setting) -> Report {
    run(
        setting,
        "kill -9 of the client",
        "clients",
        BYTES,
        |stage, report| {
            let points = setting.points(10);
            let mut round = 0;
            while report.tally.points < points {
                let name = format!("clients/{round}");
                round += 1;
                let relay = stage.relay(setting, Weather::default());
                loop {
                    let mut push = stage.push(setting, &relay, &name, &["--durability", "strict"]);
                    let patience = Duration::from_millis(stage.dice.below(700));
                    let status = push.wait(patience);
                    report.tally.sessions += 1;
                    if let Some(status) = status {
                        if !status.success() {
                            return Err(format!("it ended with {status}: {}", push.stderr()));
                        }
                        break;
                    }
                    push.group().kill();
                    report.tally.points += 1;
                }
                stage.landed(&name)?;
                report.tally.dones += 1;
                let resent = relay.passed().saturating_sub(BYTES);
                report.tally.most_resent = report.tally.most_resent.max(resent);
                stage.forget(&name);
            }
            Ok(())
        },
    )
}

/// Resets of every connection at random moments; the same command goes on by itself.
pub(crate) fn cuts(setting: &Setting) -> Report {
    run(setting, "network cuts", "cuts", BYTES, |stage, report| {
        let points = setting.points(10);
        let mut round = 0;
        while report.tally.points < points {
            let name = format!("cuts/{round}");
            round += 1;
            let relay = stage.relay(setting, Weather::default());
            let options = ["--bwlimit", "60M", "--retries", "50"];
            let mut push = stage.push(setting, &relay, &name, &options);
            let count = stage.dice.between(1, 4);
            let mut hit = 0;
            for _ in 0..count {
                let patience = Duration::from_millis(stage.dice.between(100, 700));
                if push.wait(patience).is_some() {
                    break;
                }
                relay.cut();
                hit += 1;
            }
            push.expect(0, HANG)?;
            stage.landed(&name)?;
            report.tally.points += hit;
            report.tally.sessions += 1 + hit;
            report.tally.dones += 1;
            let wire = push.figure("wire_bytes").ok_or("no figure of wire_bytes")?;
            let resent = wire.saturating_sub(stage.source.load.total_bytes());
            report.tally.most_resent = report.tally.most_resent.max(resent);
            stage.forget(&name);
        }
        Ok(())
    })
}

/// Long and uneven ways.
pub(crate) fn delays(setting: &Setting) -> Report {
    run(
        setting,
        "slow networks",
        "delays",
        6 << 20,
        |stage, report| {
            let all = [(1, 0), (25, 10), (100, 100), (250, 50)];
            let points = setting.points(all.len() as u64) as usize;
            for (one_way, jitter) in all.into_iter().cycle().take(points) {
                let weather = Weather {
                    delay: Duration::from_millis(one_way),
                    jitter: Duration::from_millis(jitter),
                    flip: None,
                };
                let relay = stage.relay(setting, weather);
                let name = format!("delays/{one_way}");
                let started = Instant::now();
                stage.push(setting, &relay, &name, &[]).expect(0, HANG)?;
                stage.landed(&name)?;
                stage.forget(&name);
                report.tally.points += 1;
                report.remarks.push(format!(
                    "{one_way} + 0..{jitter} ms one way: {:.1} s",
                    started.elapsed().as_secs_f64()
                ));
            }
            Ok(())
        },
    )
}

/// Stopped processes and half-open connections: noticed, and everything is given back.
pub(crate) fn silence(setting: &Setting) -> Report {
    run(
        setting,
        "silent peers",
        "silence",
        BYTES,
        |stage, report| {
            let slow = ["--bwlimit", "4M", "--lanes", "1"];
            // Pools and the like are made by the first push.
            let warm = stage.relay(setting, Weather::default());
            stage
                .push(setting, &warm, "silence/warm", &[])
                .expect(0, HANG)?;
            drop(warm);
            let before = settled(&stage.server);
            // A stopped client.
            let direct = stage.relay(setting, Weather::default());
            let stopped = stage.push(setting, &direct, "silence/stopped", &slow);
            // A client behind a network that swallows everything.
            let broken = stage.relay(setting, Weather::default());
            let cut_off = stage.push(setting, &broken, "silence/cut", &slow);
            // A client of a stopped server.
            let other = Serve::new(&setting.binary).start(&stage.folder.join("other"))?;
            let to_other =
                Relay::start_on(setting.runtime.handle(), other.address, Weather::default());
            let waiting = stage.push(setting, &to_other, "silence/waiting", &slow);
            std::thread::sleep(Duration::from_millis(1500));
            let dialled = [broken.accepted(), to_other.accepted()];
            stopped.group().signal(Signal::STOP);
            broken.fall_silent();
            other.group().signal(Signal::STOP);
            let since = Instant::now();
            let both = soon(NOTICED, || {
                broken.accepted() > dialled[0] && to_other.accepted() > dialled[1]
            });
            if !both {
                return Err(format!(
                    "connections {dialled:?} and then {} and {} within {NOTICED:?}",
                    broken.accepted(),
                    to_other.accepted()
                ));
            }
            report.remarks.push(format!(
                "the clients dialled again within {:.0} s",
                since.elapsed().as_secs_f64()
            ));
            // Who dials again and again does not count; the stopped client and what the silent
            // network holds do.
            drop(cut_off);
            let left = NOTICED.saturating_sub(since.elapsed());
            let is_free = soon(left, || stage.server.usage().fd_count <= before.fd_count);
            let usage = stage.server.usage();
            if !is_free {
                return Err(format!("the server had {before:?} and still has {usage:?}"));
            }
            report.remarks.push(format!(
                "the server was free of them after {:.0} s",
                since.elapsed().as_secs_f64()
            ));
            report.tally.points += 3;
            other.group().signal(Signal::CONT);
            stopped.group().signal(Signal::CONT);
            drop((stopped, waiting));
            // The names can be used again.
            for name in ["silence/stopped", "silence/cut"] {
                let fresh = stage.relay(setting, Weather::default());
                stage.push(setting, &fresh, name, &[]).expect(0, HANG)?;
                stage.landed(name)?;
            }
            Ok(())
        },
    )
}

/// What a server holds that has nothing to do.
pub(crate) fn settled(server: &Server) -> Usage {
    let mut last = server.usage();
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(50));
        let now = server.usage();
        if now.fd_count == last.fd_count {
            return now;
        }
        last = now;
    }
    last
}
