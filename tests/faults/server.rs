//! A server process of the real program.

use crate::turned::is_turned;
use std::{
    fs::File,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, ChildStderr, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

/// A start that takes longer hangs.
const START: Duration = Duration::from_secs(30);

/// A running `serve`, perhaps beneath a tracer.
pub(crate) struct Server {
    pub(crate) address: SocketAddr,
    child: Child,
    group: Group,
}

/// The group of a child, to be killed as a whole: a tracer must not outlive its tracee.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Group(i32);

impl Group {
    pub(crate) fn of(child: &Child) -> Group {
        Group(child.id() as i32)
    }

    pub(crate) fn signal(self, signal: rustix::process::Signal) {
        if let Some(pid) = rustix::process::Pid::from_raw(self.0) {
            let _ = rustix::process::kill_process_group(pid, signal);
        }
    }

    pub(crate) fn kill(self) {
        self.signal(rustix::process::Signal::KILL);
    }
}

/// How a server is started.
#[derive(Clone, Debug)]
pub(crate) struct Serve {
    pub(crate) binary: PathBuf,
    /// Words in front of the command.
    pub(crate) wrapper: Vec<String>,
    /// Words behind it.
    pub(crate) options: Vec<String>,
    pub(crate) port: u16,
}

impl Serve {
    pub(crate) fn new(binary: &Path) -> Self {
        Serve {
            binary: binary.to_owned(),
            wrapper: turning(),
            options: Vec::new(),
            port: 0,
        }
    }

    /// Beneath strace, which does something at the `when`-th call of a thread.
    pub(crate) fn injecting(mut self, call: &str, fault: &str, when: &str, log: &Path) -> Self {
        let words = [
            "strace",
            "-f",
            "-qq",
            "-I",
            "2",
            "-o",
            &log.display().to_string(),
            "-e",
            &format!("trace={call},renameat,renameat2"),
            "-e",
            &format!("inject={call}:{fault}:when={when}"),
        ];
        self.wrapper = words.map(str::to_owned).to_vec();
        self.wrapper.extend(turning());
        self
    }

    /// Starts and waits until it listens.
    pub(crate) fn start(&self, root: &Path) -> Result<Server, String> {
        let listen = format!("127.0.0.1:{}", self.port);
        let mut words = self.wrapper.clone();
        words.push(self.binary.display().to_string());
        words.extend(["serve".to_owned(), root.display().to_string()]);
        words.extend(["--listen".to_owned(), listen]);
        words.extend(self.options.iter().cloned());
        launch(&words)
    }
}

/// Words that make a server a client that pulls, where that is wished.
fn turning() -> Vec<String> {
    let this = || std::env::current_exe().expect("this program has a path");
    match is_turned() {
        true => vec![this().display().to_string(), "turned".to_owned()],
        false => Vec::new(),
    }
}

/// Runs a command whose output says where a server listens.
pub(crate) fn launch(words: &[String]) -> Result<Server, String> {
    let mut child = Command::new(&words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .current_dir("/")
        .process_group(0)
        .spawn()
        .map_err(|e| format!("{}: {e}", words[0]))?;
    let group = Group::of(&child);
    let stdout = child.stdout.take().expect("it is piped");
    let first = first_line(stdout);
    let address = first.strip_prefix("listening on ").map(str::parse);
    let Some(Ok(address)) = address else {
        // It may be about to end by itself, with a status that says why.
        let until = Instant::now() + Duration::from_secs(5);
        while matches!(child.try_wait(), Ok(None)) && Instant::now() < until {
            std::thread::sleep(Duration::from_millis(5));
        }
        group.kill();
        let status = child
            .wait()
            .map_or_else(|e| e.to_string(), |s| s.to_string());
        let stderr = child.stderr.take().map(read_all).unwrap_or_default();
        return Err(format!("said {first:?}, {status}: {stderr}"));
    };
    Ok(Server {
        address,
        child,
        group,
    })
}

fn first_line(stdout: std::process::ChildStdout) -> String {
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut lines = BufReader::new(stdout);
        let mut line = String::new();
        // A kernel may have something to say before.
        while lines.read_line(&mut line).is_ok_and(|n| n > 0) && !line.starts_with("listening") {
            line.clear();
        }
        let _ = tell.send(line.trim_end().to_owned());
        // Read on, or the process would stall on a full pipe.
        let _ = std::io::copy(&mut lines, &mut std::io::sink());
    });
    told.recv_timeout(START).unwrap_or_default()
}

fn read_all(mut stderr: ChildStderr) -> String {
    let mut text = String::new();
    let _ = stderr.read_to_string(&mut text);
    text
}

impl Server {
    pub(crate) fn group(&self) -> Group {
        self.group
    }

    /// Process id of the server itself, also beneath a tracer.
    pub(crate) fn pid(&self) -> u32 {
        let id = self.child.id();
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children"));
        let first = children
            .ok()
            .and_then(|c| c.split(' ').next()?.parse().ok());
        let name = std::fs::read_to_string(format!("/proc/{id}/comm")).unwrap_or_default();
        if name.starts_with("tensorferry") {
            id
        } else {
            first.unwrap_or(id)
        }
    }

    pub(crate) fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// `kill -9` of all of it.
    pub(crate) fn kill(mut self) {
        self.group.kill();
        let _ = self.child.wait();
    }

    /// Waits for its end.
    pub(crate) fn ends_within(&mut self, limit: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                _ if Instant::now() > until => return None,
                _ => std::thread::sleep(Duration::from_millis(5)),
            }
        }
    }

    /// Stops it as a service manager would; an error unless it ends in good order.
    pub(crate) fn stop(mut self) -> Result<(), String> {
        self.group.signal(rustix::process::Signal::TERM);
        match self.ends_within(Duration::from_secs(20)) {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(format!(
                "the server ended with {status}, signal {:?}",
                status.signal()
            )),
            None => Err("the server does not stop".to_owned()),
        }
    }

    /// Open descriptors, threads and anonymous memory in KiB.
    pub(crate) fn usage(&self) -> Usage {
        let pid = self.pid();
        let count = |what: &str| {
            let list = std::fs::read_dir(format!("/proc/{pid}/{what}"));
            list.map_or(0, |entries| entries.count() as u64)
        };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let anonymous = status.lines().find_map(|l| l.strip_prefix("RssAnon:"));
        let kib = anonymous.and_then(|l| l.split_whitespace().next()?.parse().ok());
        Usage {
            fd_count: count("fd"),
            thread_count: count("task"),
            anonymous_kib: kib.unwrap_or(0),
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.group.kill();
        let _ = self.child.wait();
    }
}

/// What a process holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Usage {
    pub(crate) fd_count: u64,
    pub(crate) thread_count: u64,
    pub(crate) anonymous_kib: u64,
}

/// Runs a command to its end; its output when it fails.
pub(crate) fn run(words: &[&str]) -> Result<String, String> {
    let done = Command::new(words[0])
        .args(&words[1..])
        .stdin(Stdio::null())
        .output()
        .map_err(|e| format!("{}: {e}", words[0]))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if done.status.success() {
        return Ok(text(&done.stdout));
    }
    Err(format!("{words:?}: {} {}", done.status, text(&done.stderr)))
}

/// Whether a tool can be had.
pub(crate) fn has_tool(name: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':')
        .chain(["/usr/sbin", "/sbin"])
        .any(|folder| File::open(Path::new(folder).join(name)).is_ok())
}
