//! What the program says at the end of a push of what limited it.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};
use tensorferry::format::npy::encode_header;

/// Several times what sockets, the relay and HTTP/2 hold on the way.
const SOURCE_BYTES: usize = 48 << 20;
/// What the narrow network lets through in a second, all connections together.
const BYTES_PER_SECOND: usize = 16 << 20;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tensorferry"));
    for (name, _) in std::env::vars_os() {
        if name.to_string_lossy().starts_with("TENSORFERRY_") {
            command.env_remove(name);
        }
    }
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

#[track_caller]
fn succeed(dir: &Path, words: &[&str]) -> String {
    let output = program().current_dir(dir).args(words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// The done event of a push.
#[track_caller]
fn push(dir: &Path, words: &[&str]) -> Value {
    let words = [&["push", "--format", "json"], words].concat();
    let stdout = succeed(dir, &words);
    let last: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "done", "{stdout}");
    last
}

/// Bytes that no codec shortens.
fn write_source(dir: &Path, len: usize) {
    fs::create_dir(dir).unwrap();
    let mut bytes = vec![0; len];
    blake3::Hasher::new().finalize_xof().fill(&mut bytes);
    let header = encode_header("|u1", false, &[len as u64]);
    fs::write(dir.join("w.npy"), [header, bytes].concat()).unwrap();
}

/// A server that is killed when the test ends.
struct Serving {
    child: Child,
    address: SocketAddr,
}

impl Serving {
    fn start(dir: &Path) -> Serving {
        let mut child = program()
            .current_dir(dir)
            .args([
                "serve",
                "root",
                "--listen",
                "127.0.0.1:0",
                "--format",
                "json",
            ])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        let address = event["address"].as_str().unwrap().parse().unwrap();
        Serving { child, address }
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A network of `lanes` connections that share [`BYTES_PER_SECOND`] to the server.
fn narrow_network(server: SocketAddr, lanes: usize) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(server).unwrap());
            let (from, to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            thread::spawn(move || pass(from, to, None));
            thread::spawn(move || pass(near, far, Some(BYTES_PER_SECOND / lanes)));
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, bytes_per_second: Option<usize>) {
    let mut buf = vec![0; 64 << 10];
    let mut free_at = Instant::now();
    while let Ok(got @ 1..) = from.read(&mut buf) {
        if let Some(rate) = bytes_per_second {
            let time = Duration::from_secs_f64(got as f64 / rate as f64);
            free_at = free_at.max(Instant::now()) + time;
            thread::sleep(free_at - Instant::now());
        }
        if to.write_all(&buf[..got]).is_err() {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

#[test]
fn a_narrow_network_is_named() {
    let temp = tempfile::tempdir().unwrap();
    write_source(&temp.path().join("model"), SOURCE_BYTES);
    let server = Serving::start(temp.path());
    for lanes in [1, 3] {
        let network = narrow_network(server.address, lanes);
        let (dest, lanes) = (format!("ferry://{network}/run{lanes}"), lanes.to_string());
        let done = push(temp.path(), &["--lanes", &lanes, "model", &dest]);
        assert_eq!(done["bottleneck"], "send", "{done}");
        assert_eq!(done["bottleneck_side"], "sender", "{done}");
        assert_eq!(done["lanes"].to_string(), lanes, "{done}");
        assert_eq!(done["codec"], "none", "{done}");
    }
}

#[test]
fn a_window_smaller_than_what_is_under_way_hides_no_narrow_network() {
    let temp = tempfile::tempdir().unwrap();
    write_source(&temp.path().join("model"), SOURCE_BYTES / 2);
    let server = Serving::start(temp.path());
    let network = narrow_network(server.address, 1);
    let dest = format!("ferry://{network}/run");
    let words = ["--lanes", "1", "--budget", "4M", "model", &dest];
    let done = push(temp.path(), &words);
    assert_eq!(done["bottleneck"], "send", "{done}");
}

#[test]
fn every_push_says_what_its_stages_did_and_one_that_sent_nothing_names_none() {
    const STAGES: [&str; 9] = [
        "read",
        "checksum",
        "codec",
        "send",
        "receive",
        "receiver_checksum",
        "receiver_codec",
        "place",
        "sync",
    ];
    let temp = tempfile::tempdir().unwrap();
    write_source(&temp.path().join("model"), 2 << 20);
    // Younger sources cannot prove that they are unchanged.
    thread::sleep(Duration::from_millis(2_100));
    let done = push(temp.path(), &["model", "out/landed"]);
    let names: Vec<&str> = STAGES
        .into_iter()
        .filter(|name| done["stages"].get(name).is_some())
        .collect();
    assert_eq!(names, STAGES, "{done}");
    let words = [
        "read", "checksum", "codec", "send", "receive", "place", "sync",
    ];
    let named = done["bottleneck"].as_str().unwrap();
    assert!(words.contains(&named), "{done}");
    for name in STAGES {
        let [busy, blocked] =
            ["busy_s", "blocked_s"].map(|key| done["stages"][name][key].as_f64().unwrap());
        let most = done["seconds"].as_f64().unwrap();
        assert!((0.0..=most).contains(&busy), "{name}: {done}");
        assert!((0.0..=most).contains(&blocked), "{name}: {done}");
    }
    assert!(done["stages"]["read"]["busy_s"].as_f64().unwrap() > 0.0);
    assert!(done["stages"]["place"]["busy_s"].as_f64().unwrap() > 0.0);

    let again = push(temp.path(), &["model", "out/landed"]);
    assert_eq!(again["unchanged"], true);
    for key in ["bottleneck", "bottleneck_side", "codec"] {
        assert!(again[key].is_null(), "{key}: {again}");
    }
    assert_eq!(again["lanes"], 0, "{again}");

    let human = succeed(temp.path(), &["push", "model", "out/other"]);
    let last = human.lines().last().unwrap();
    assert!(
        last.starts_with("limited by: ") && last.contains("(busy ") && last.contains(" %)"),
        "{human}"
    );
    assert_eq!(human.lines().count(), 2, "{human}");
    let human = succeed(temp.path(), &["push", "model", "out/other"]);
    assert!(human.starts_with("unchanged") && human.lines().count() == 1);
}
