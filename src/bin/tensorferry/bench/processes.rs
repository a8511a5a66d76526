//! tensorferry as users run it: this program again, as server and as client, with the
//! processor time of each.

use super::{
    steps::{Ends, Run},
    work::Work,
};
use crate::choices::RehearsalArg;
use serde::Deserialize;
use std::{
    ffi::{OsStr, OsString},
    fs::{self, File},
    io::{self, BufRead, BufReader, Read},
    path::Path,
    process::{Child, ChildStdout, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tensorferry::{Error, ErrorCode, measure::Halt};

/// How often a process is looked at.
const TICK: Duration = Duration::from_millis(2);
/// A server that was asked to stop gets this long.
const STOP_TIMEOUT: Duration = Duration::from_secs(10);
/// A push that takes longer hangs.
const PUSH_TIMEOUT: Duration = Duration::from_secs(1800);
/// Of what a process says at most so much is read.
const MAX_WORDS: u64 = 1 << 20;

/// What a push says at its end, of which this is looked at.
#[derive(Debug, Deserialize)]
struct Done {
    event: String,
    bytes: u64,
    seconds: f64,
    durability: String,
    bottleneck: Option<String>,
}

/// One run.
#[derive(Clone, Debug)]
pub(super) struct RunSample {
    pub(super) bytes: u64,
    /// From the first connection to the answer that all is there.
    pub(super) seconds: f64,
    pub(super) durability: String,
    pub(super) bottleneck: Option<String>,
    pub(super) client_cpu: Duration,
    pub(super) server_cpu: Duration,
}

/// Does one run in a fresh folder with a fresh server.
pub(super) fn measure(
    run: Run,
    bytes: u64,
    source: &Path,
    work: &Work,
    halt: &Halt,
) -> Result<RunSample, Error> {
    let what = match (run.ends, run.crc) {
        (Ends::File, true) => None,
        (Ends::File, false) => Some(RehearsalArg::FilesUnchecked),
        (Ends::Memory, true) => Some(RehearsalArg::Memory),
        (Ends::Memory, false) => Some(RehearsalArg::MemoryUnchecked),
    };
    let (root, lanes) = (work.root(), run.lanes.to_string());
    let server = Server::start(what, &root, &work.log(), halt)?;
    let mut client = program()?;
    match what {
        None => {
            let target = format!("ferry://{}/bench", server.address);
            client.args(["push", "--lanes", &lanes, "--retries", "0"]);
            client.args([source.as_os_str(), OsStr::new(&target)]);
        }
        Some(what) => {
            client.args(["rehearse", what.as_str(), "send", &server.address, &lanes]);
            match run.ends {
                Ends::Memory => client.arg(bytes.to_string()),
                Ends::File => client.arg(source),
            };
        }
    }
    let (client_before, server_before) = (children_cpu(), server.cpu());
    let done = push(client, halt);
    let client_cpu = children_cpu().saturating_sub(client_before);
    let server_cpu = server.cpu().saturating_sub(server_before);
    server.stop();
    remove(&root)?;
    let done = done?;
    Ok(RunSample {
        bytes: done.bytes,
        seconds: done.seconds,
        durability: done.durability,
        bottleneck: done.bottleneck,
        client_cpu,
        server_cpu,
    })
}

/// This program, deaf to what the environment would make of its flags.
fn program() -> Result<Command, Error> {
    let path = std::env::current_exe()
        .map_err(|e| Error::Bug(format!("this program cannot be found: {e}")))?;
    let mut command = Command::new(path);
    let is_ours = |name: &OsString| name.to_string_lossy().starts_with("TENSORFERRY_");
    for (name, _) in std::env::vars_os().filter(|(name, _)| is_ours(name)) {
        command.env_remove(name);
    }
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command.args(["--format", "json", "--quiet"]);
    Ok(command)
}

/// A server that ends with this value.
struct Server {
    child: Child,
    address: String,
}

impl Server {
    fn start(
        what: Option<RehearsalArg>,
        root: &Path,
        log: &Path,
        halt: &Halt,
    ) -> Result<Server, Error> {
        let mut command = program()?;
        match what {
            None => command
                .arg("serve")
                .arg(root)
                .args(["--listen", "127.0.0.1:0"]),
            Some(what) => command
                .args(["rehearse", what.as_str(), "receive"])
                .arg(root),
        };
        let errors = File::create(log).map_err(|e| failed("make a log for", e))?;
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(errors)
            .spawn()
            .map_err(|e| failed("start", e))?;
        let stdout = child.stdout.take();
        let mut server = Server {
            child,
            address: String::new(),
        };
        server.address = stdout.and_then(listening_address).ok_or_else(|| {
            let said = fs::read_to_string(log).unwrap_or_default();
            match halt.check() {
                Err(_) => Error::Interrupted,
                Ok(()) => Error::Bug(format!("the server did not start: {}", said.trim())),
            }
        })?;
        Ok(server)
    }

    fn cpu(&self) -> Duration {
        let (used, _) = cpu_of(&self.child.id().to_string());
        used
    }

    /// Asks it to stop; dropping it does not ask.
    fn stop(mut self) {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let begun = Instant::now();
        while begun.elapsed() < STOP_TIMEOUT {
            if !matches!(self.child.try_wait(), Ok(None)) {
                return;
            }
            thread::sleep(TICK);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Its first line says where it listens.
fn listening_address(stdout: ChildStdout) -> Option<String> {
    #[derive(Deserialize)]
    struct Listening {
        address: String,
    }
    let mut line = String::new();
    let mut first = BufReader::new(stdout.take(MAX_WORDS));
    first.read_line(&mut line).ok()?;
    let event: Listening = serde_json::from_str(&line).ok()?;
    Some(event.address)
}

/// Runs a push to its end.
fn push(mut command: Command, halt: &Halt) -> Result<Done, Error> {
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| failed("start", e))?;
    let stdout = child.stdout.take();
    let reading = thread::spawn(move || {
        let mut words = String::new();
        if let Some(stdout) = stdout {
            let _ = stdout.take(MAX_WORDS).read_to_string(&mut words);
        }
        words
    });
    let begun = Instant::now();
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break Ok(status),
            Ok(None) if halt.check().is_err() => break Err(Error::Interrupted),
            Ok(None) if begun.elapsed() > PUSH_TIMEOUT => {
                break Err(Error::Bug("a push does not end".to_owned()));
            }
            Ok(None) => thread::sleep(TICK),
            Err(e) => break Err(failed("wait for", e)),
        }
    };
    if status.is_err() {
        let _ = child.kill();
        let _ = child.wait();
    }
    let words = reading.join().unwrap_or_default();
    let status = status?;
    if status.code() == Some(ErrorCode::Interrupted.exit_code().into()) {
        return Err(Error::Interrupted);
    }
    let last = words.lines().last().unwrap_or_default();
    match serde_json::from_str::<Done>(last) {
        Ok(done) if status.success() && done.event == "done" => Ok(done),
        _ => Err(Error::Bug(format!("a push ended with {status}: {last}"))),
    }
}

fn failed(what: &str, error: io::Error) -> Error {
    Error::Bug(format!("cannot {what} a process: {error}"))
}

/// What a server left behind. One that is gone is fine.
fn remove(folder: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(Error::Bug(format!(
            "{} cannot be removed: {e}",
            folder.display()
        ))),
        _ => Ok(()),
    }
}

/// Processor time of this program's children that have ended and were waited for.
fn children_cpu() -> Duration {
    let (_, children) = cpu_of("self");
    children
}

/// Processor time of a process, and of its children that it has waited for.
fn cpu_of(pid: &str) -> (Duration, Duration) {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let ticks = ticks_in(&stat);
    let per_second = rustix::param::clock_ticks_per_second().max(1) as f64;
    let time = |ticks: u64| Duration::from_secs_f64(ticks as f64 / per_second);
    (time(ticks.0), time(ticks.1))
}

/// The line of `/proc/PID/stat`: behind the name, which may hold anything, utime, stime,
/// cutime and cstime are the 12th to 15th word.
fn ticks_in(stat: &str) -> (u64, u64) {
    let words = stat.rsplit_once(')').map_or("", |(_, words)| words);
    let mut times = words.split_whitespace().skip(11);
    let mut next = || times.next().and_then(|t| t.parse().ok()).unwrap_or(0u64);
    (next() + next(), next() + next())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_stand_behind_a_name_that_may_hold_anything() {
        let stat = "7 (a) b (c) R 1 1 1 0 -1 4194304 100 0 0 0 11 22 33 44 20 0 1 0 5";
        assert_eq!(ticks_in(stat), (33, 77));
        assert_eq!(ticks_in(""), (0, 0));
    }
}
