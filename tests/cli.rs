//! The command line program, from outside: what it prints, writes and exits with.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "common/relay.rs"]
mod relay;

use relay::Then;
use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tensorferry::{Checkpoint, format::npy::encode_header};

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tensorferry"));
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TENSORFERRY_"))
    {
        // The same claims hold with several lanes and with a codec.
        let is_kept = ["LANES", "CODEC", "CHUNK"]
            .iter()
            .any(|flag| name == format!("TENSORFERRY_{flag}").as_str());
        if !is_kept {
            command.env_remove(name);
        }
    }
    command.env_remove("RUST_LOG").stdin(Stdio::null());
    command
}

/// Runs it; paths of the test are given relative to its folder.
fn run(dir: &Path, words: &[&str]) -> Output {
    program().current_dir(dir).args(words).output().unwrap()
}

#[track_caller]
fn succeed(dir: &Path, words: &[&str]) -> String {
    let output = run(dir, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn fail(dir: &Path, words: &[&str], code: i32) -> String {
    let output = run(dir, words);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn events(stdout: &str) -> Vec<Value> {
    stdout
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[track_caller]
fn last_event(stdout: &str, event: &str) -> Value {
    let last = events(stdout).pop().unwrap();
    assert_eq!(last["event"], event, "{stdout}");
    last
}

/// A folder of three `.npy` files and a config: 3 tensors, 1 side file.
fn make_source(dir: &Path, name: &str, fill: u8) -> PathBuf {
    let source = dir.join(name);
    fs::create_dir_all(&source).unwrap();
    write_npy(
        &source.join("layer.weight.npy"),
        "<f4",
        &[300, 1024],
        4,
        fill,
    );
    write_npy(&source.join("layer.bias.npy"), "<f2", &[1024], 2, fill);
    write_npy(&source.join("scale.npy"), "<f8", &[], 8, fill);
    fs::write(source.join("config.json"), format!("{{\"fill\": {fill}}}")).unwrap();
    source
}

fn write_npy(path: &Path, descr: &str, shape: &[u64], item_len: u64, fill: u8) {
    let len = shape.iter().product::<u64>() * item_len;
    let mut bytes = encode_header(descr, false, shape);
    bytes.extend((0..len).map(|i| (i.wrapping_mul(31) >> 3) as u8 ^ fill));
    fs::write(path, bytes).unwrap();
}

const SOURCE_BYTES: u64 = 300 * 1024 * 4 + 1024 * 2 + 8 + 11;

/// A server that is killed when the test ends.
struct Serving {
    child: Child,
    address: String,
}

impl Serving {
    fn start(dir: &Path, root: &str) -> Serving {
        let mut child = program()
            .current_dir(dir)
            .args(["serve", root, "--listen", "127.0.0.1:0", "--format", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        let event = last_event(&line, "listening");
        let address = event["address"].as_str().unwrap().to_owned();
        Serving { child, address }
    }

    fn dest(&self, name: &str) -> String {
        format!("ferry://{}/{name}", self.address)
    }

    fn signal(&self, signal: rustix::process::Signal) {
        rustix::process::kill_process(rustix::process::Pid::from_child(&self.child), signal)
            .unwrap();
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_push_into_a_folder_lands_and_again_sends_nothing() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    // Younger sources cannot prove that they are unchanged.
    sleep(Duration::from_millis(2_100));
    let words = [
        "push",
        "model",
        "out/landed",
        "--format",
        "json",
        "--codec",
        "none",
    ];
    let stdout = succeed(temp.path(), &words);
    assert_eq!(events(&stdout)[0]["event"], "begin");
    let done = last_event(&stdout, "done");
    for key in [
        "checkpoint",
        "tensors",
        "bytes",
        "wire_bytes",
        "resumed_bytes",
        "seconds",
        "durability",
        "bottleneck",
    ] {
        assert!(done.get(key).is_some(), "{key}: {done}");
    }
    assert_eq!(
        (&done["tensors"], &done["bytes"]),
        (&3.into(), &SOURCE_BYTES.into())
    );
    assert_eq!(
        (&done["wire_bytes"], &done["resumed_bytes"]),
        (&SOURCE_BYTES.into(), &0.into())
    );
    let landed = temp.path().join("out/landed");
    for (file, original) in [
        ("layer.weight.npy", "layer.weight.npy"),
        ("files/config.json", "config.json"),
    ] {
        assert_eq!(
            fs::read(landed.join(file)).unwrap(),
            fs::read(temp.path().join("model").join(original)).unwrap()
        );
    }
    assert!(!temp.path().join("out/.tensorferry").exists());

    let again = last_event(&succeed(temp.path(), &words), "done");
    assert_eq!(
        (&again["wire_bytes"], &again["resumed_bytes"]),
        (&0.into(), &SOURCE_BYTES.into())
    );
    assert_eq!(again["unchanged"], true);
    let human = succeed(temp.path(), &["push", "model", "out/landed"]);
    assert!(human.starts_with("unchanged: 3 tensors"), "{human}");
    assert_eq!(
        succeed(temp.path(), &["push", "-q", "model", "out/landed"]),
        ""
    );
}

#[test]
fn a_server_receives_lists_and_refuses() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    make_source(temp.path(), "other", 1);
    let serving = Serving::start(temp.path(), "root");
    let dest = serving.dest("runs/one");
    let done = last_event(
        &succeed(temp.path(), &["push", "model", &dest, "--format", "json"]),
        "done",
    );
    assert_eq!(
        (&done["checkpoint"], &done["bytes"]),
        (&"runs/one".into(), &SOURCE_BYTES.into())
    );
    assert!(["disk", "process"].contains(&done["durability"].as_str().unwrap()));
    succeed(temp.path(), &["verify", "root/runs/one"]);

    // The same name with other content: refused, and replaced when asked.
    let output = run(temp.path(), &["push", "other", &dest, "--format", "json"]);
    assert_eq!(output.status.code(), Some(9), "{output:?}");
    let error = last_event(&String::from_utf8(output.stdout).unwrap(), "error");
    assert_eq!(
        (&error["code"], &error["exit"]),
        (&"exists".into(), &9.into())
    );
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("error: ") && stderr.contains("hint: "),
        "{stderr}"
    );
    succeed(temp.path(), &["push", "other", &dest, "--overwrite"]);

    // The journal goes after the sender has heard of the end.
    let rows = || events(&succeed(temp.path(), &["list", "root", "--format", "json"])).len();
    while rows() > 1 {
        sleep(Duration::from_millis(20));
    }
    for place in [
        format!("ferry://{}", serving.address),
        serving.dest("runs"),
        "root".to_owned(),
    ] {
        let rows = events(&succeed(temp.path(), &["list", &place, "--format", "json"]));
        assert_eq!(rows.len(), 1, "{place}: {rows:?}");
        assert_eq!(
            (&rows[0]["event"], &rows[0]["name"]),
            (&"checkpoint".into(), &"runs/one".into())
        );
        assert_eq!(
            (&rows[0]["published"], &rows[0]["bytes"]),
            (&true.into(), &SOURCE_BYTES.into())
        );
        assert!(succeed(temp.path(), &["list", &place]).contains("complete"));
    }
    assert_eq!(
        events(&succeed(
            temp.path(),
            &["list", &serving.dest("none"), "--format", "json"]
        ))
        .len(),
        0
    );
    let discarded = last_event(
        &succeed(temp.path(), &["discard", &dest, "--format", "json"]),
        "discarded",
    );
    assert_eq!(discarded["existed"], false);
}

#[test]
fn a_server_stops_in_good_order() {
    for signal in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let temp = TempDir::new().unwrap();
        let mut serving = Serving::start(temp.path(), "root");
        serving.signal(signal);
        assert_eq!(serving.child.wait().unwrap().code(), Some(0));
    }
}

#[test]
fn failures_have_their_own_exit_status() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    for words in [
        &["push", "model"][..],
        &["push", "model", "out", "--chunk", "3M"],
        &["push", "model", "http://lab/x"],
        &["push", "model", "lab:"],
        &["push", "model", "lab:../x"],
        &["serve", "--listen", "nonsense"],
        &["frobnicate"],
    ] {
        fail(temp.path(), words, 2);
    }
    assert!(fail(temp.path(), &["push", "absent", "out"], 3).contains("absent does not exist"));
    fail(temp.path(), &["inspect", "absent"], 3);
    fail(temp.path(), &["verify", "model"], 3);
    fail(temp.path(), &["list", "absent"], 3);
    assert!(fail(temp.path(), &["list", "127.0.0.1:7745"], 2).contains("ferry://127.0.0.1:7745"));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().unwrap().to_string();
    let why = fail(temp.path(), &["serve", "root", "--listen", &taken], 1);
    assert!(
        why.contains(&taken) && why.contains("another port with --listen"),
        "{why}"
    );
    // A port that was free a moment ago: nobody listens there.
    let port = std::net::TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let dest = format!("ferry://127.0.0.1:{port}/x");
    assert!(fail(temp.path(), &["push", "model", &dest, "--retries", "0"], 5).contains("hint: "));
    let quiet = run(
        temp.path(),
        &["push", "-q", "model", &dest, "--retries", "0"],
    );
    assert!(
        quiet.stdout.is_empty() && quiet.stderr.starts_with(b"error: "),
        "{quiet:?}"
    );
    assert!(!temp.path().join("out").exists());
}

#[test]
fn a_dry_run_shows_the_mapping_and_writes_nothing() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let rows = events(&succeed(
        temp.path(),
        &[
            "push", "-n", "model", "out", "--layout", "indexed", "--format", "json",
        ],
    ));
    let weight = rows
        .iter()
        .find(|row| row["name"] == "layer.weight")
        .unwrap();
    assert_eq!(
        (&weight["event"], &weight["dtype"]),
        (&"tensor".into(), &"float32".into())
    );
    assert_eq!(weight["shape"], serde_json::json!([300, 1024]));
    assert!(weight["file"].as_str().unwrap().starts_with("weight_"));
    assert_eq!(rows.last().unwrap()["bytes"], SOURCE_BYTES);
    let human = succeed(temp.path(), &["push", "-n", "model", "nowhere.invalid:x"]);
    assert!(
        human.contains("layer.weight.npy") && human.contains("[300, 1024]"),
        "{human}"
    );
    assert_eq!(fs::read_dir(temp.path()).unwrap().count(), 1);
}

#[test]
fn verify_finds_a_flipped_byte_and_a_missing_file() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    succeed(
        temp.path(),
        &["push", "model", "out", "--layout", "indexed", "--verify"],
    );
    let checkpoint = Checkpoint::open(temp.path().join("out")).unwrap();
    let info = checkpoint
        .tensors()
        .find(|t| t.name == "layer.weight")
        .unwrap();
    assert!(info.file.starts_with("weight_"));
    assert_eq!(
        checkpoint
            .tensor("layer.weight")
            .unwrap()
            .unwrap()
            .as_slice::<f32>()
            .unwrap()
            .len(),
        300 * 1024
    );
    let verified = last_event(
        &succeed(temp.path(), &["verify", "out", "--format", "json"]),
        "verified",
    );
    assert_eq!(
        (&verified["damaged"], &verified["bytes"]),
        (&0.into(), &SOURCE_BYTES.into())
    );

    let path = temp.path().join("out").join(&info.file);
    let mut bytes = fs::read(&path).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&path, &bytes).unwrap();
    fs::remove_file(temp.path().join("out/files/config.json")).unwrap();
    let output = run(temp.path(), &["verify", "out"]);
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(
        stdout.contains("layer.weight") && stdout.contains("crc32c"),
        "{stdout}"
    );
    assert!(
        stdout.contains("config.json") && stdout.contains("missing"),
        "{stdout}"
    );
}

#[test]
fn inspect_tells_every_tensor_as_json() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let rows = events(&succeed(
        temp.path(),
        &["inspect", "model", "--format", "json"],
    ));
    let tensors: Vec<_> = rows.iter().filter(|row| row["event"] == "tensor").collect();
    assert_eq!(tensors.len(), 3);
    let scalar = tensors.iter().find(|row| row["name"] == "scale").unwrap();
    assert_eq!(
        (&scalar["dtype"], &scalar["bytes"]),
        (&"float64".into(), &8.into())
    );
    assert_eq!(scalar["shape"], serde_json::json!([]));
    // The place of the bytes, which begin behind a header.
    for tensor in tensors {
        let file = tensor["source_file"].as_str().unwrap();
        let offset = tensor["offset"].as_u64().unwrap();
        assert!(
            offset > 0
                && offset + tensor["bytes"].as_u64().unwrap() <= fs::metadata(file).unwrap().len()
        );
    }
    let human = succeed(temp.path(), &["inspect", "model"]);
    assert!(human.lines().next().unwrap().contains("OFFSET"), "{human}");
    assert!(human.contains("3 tensors, 1 file"), "{human}");
}

#[test]
fn flags_come_from_the_environment_too() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let output = program()
        .current_dir(temp.path())
        .args(["push", "model", "out"])
        .env("TENSORFERRY_DRY_RUN", "1")
        .env("TENSORFERRY_FORMAT", "json")
        .output()
        .unwrap();
    assert!(output.status.success(), "{output:?}");
    last_event(&String::from_utf8(output.stdout).unwrap(), "total");
    assert!(!temp.path().join("out").exists());
}

#[test]
fn an_interrupted_push_says_how_to_go_on_and_does() {
    let temp = TempDir::new().unwrap();
    let source = temp.path().join("my model");
    fs::create_dir(&source).unwrap();
    write_npy(&source.join("big.npy"), "|u1", &[200 << 20], 1, 7);
    let words = ["push", "my model", "out", "--format", "json"];
    let mut child = program()
        .current_dir(temp.path())
        .args(words)
        .args(["--restart", "--durability", "strict"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // Signals are heard before the first line is printed.
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    last_event(&line, "begin");
    rustix::process::kill_process(
        rustix::process::Pid::from_child(&child),
        rustix::process::Signal::INT,
    )
    .unwrap();
    let (mut rest, mut stderr) = (String::new(), String::new());
    stdout.read_to_string(&mut rest).unwrap();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut stderr)
        .unwrap();
    match child.wait().unwrap().code() {
        // A very fast machine may be done first.
        Some(0) => drop(last_event(&rest, "done")),
        Some(130) => {
            assert_eq!(last_event(&rest, "error")["code"], "interrupted");
            assert!(
                stderr.contains("stopped: ") && stderr.contains(" safe on out ("),
                "{stderr}"
            );
            let resume = stderr
                .lines()
                .find_map(|line| line.strip_prefix("resume with: "))
                .unwrap();
            assert!(
                resume.ends_with("push 'my model' out --format json --durability strict"),
                "{resume}"
            );
        }
        other => panic!("{other:?}: {rest} {stderr}"),
    }
    last_event(&succeed(temp.path(), &words), "done");
    succeed(temp.path(), &["verify", "out"]);
}

#[test]
fn what_is_unfinished_is_listed_and_discarded() {
    let temp = TempDir::new().unwrap();
    let source = temp.path().join("model");
    fs::create_dir(&source).unwrap();
    write_npy(&source.join("big.npy"), "|u1", &[200 << 20], 1, 7);
    let mut child = program()
        .current_dir(temp.path())
        .args(["push", "model", "out", "--durability", "strict"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Killed as soon as the transfer is on disk, or finished by then.
    let is_there = || {
        let rows = run(temp.path(), &["list", "--format", "json"]);
        rows.stdout.windows(5).any(|w| w == b"\"out\"")
    };
    while !is_there() && child.try_wait().unwrap().is_none() {
        sleep(Duration::from_millis(20));
    }
    child.kill().unwrap();
    child.wait().unwrap();
    let rows = events(&succeed(temp.path(), &["list", "--format", "json"]));
    let is_unfinished = rows.iter().any(|row| row["published"] == false);
    let discarded = last_event(
        &succeed(temp.path(), &["discard", "out", "--format", "json"]),
        "discarded",
    );
    assert_eq!(discarded["existed"], is_unfinished, "{rows:?}");
    assert!(!temp.path().join(".tensorferry").exists());
    let again = last_event(
        &succeed(temp.path(), &["discard", "out", "--format", "json"]),
        "discarded",
    );
    assert_eq!(again["existed"], false);
}

#[test]
fn the_demo_survives_its_own_cut() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let output = run(
        temp.path(),
        &["demo", "model", "--dir", "work", "--format", "json"],
    );
    assert!(output.status.success(), "{output:?}");
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(!stderr.contains("panicked"), "{stderr}");
    let demo = last_event(&String::from_utf8(output.stdout).unwrap(), "demo");
    assert_eq!(
        (&demo["bytes"], &demo["compared_bytes"]),
        (&SOURCE_BYTES.into(), &SOURCE_BYTES.into())
    );
    succeed(temp.path(), &["verify", "work/received/demo"]);
    // It never works in a folder that has something in it.
    fail(temp.path(), &["demo", "model", "--dir", "work"], 2);
}

#[test]
fn completions_manual_and_help_are_there() {
    let temp = TempDir::new().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        assert!(succeed(temp.path(), &["completions", shell]).contains("tensorferry"));
    }
    assert!(succeed(temp.path(), &["man"]).contains(".TH tensorferry"));
    assert!(succeed(temp.path(), &["man", "push"]).contains("durability"));
    fail(temp.path(), &["man", "frobnicate"], 2);
    let help = succeed(temp.path(), &["--help"]);
    assert!(
        help.contains("Examples:") && help.contains("Exit status:"),
        "{help}"
    );
    assert!(succeed(temp.path(), &["push", "--help"]).contains("TENSORFERRY_DURABILITY"));
}

/// Nothing here takes this long; only a hang does.
const HANG: Duration = Duration::from_secs(60);
const BIG_BYTES: u64 = 12 << 20;
/// Bytes that reach the server before its first connection fails.
const FIRST_BYTES: usize = 4 << 20;

/// A source that does not fit through a connection that fails.
fn make_big_source(dir: &Path) {
    let source = dir.join("big model");
    fs::create_dir(&source).unwrap();
    // Noise, so that no codec makes it fit.
    let mut noise = vec![0; BIG_BYTES as usize];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    let header = encode_header("|u1", false, &[BIG_BYTES]);
    fs::write(source.join("big.npy"), [header, noise].concat()).unwrap();
}

fn dest_through(serving: &Serving, then: Then, name: &str) -> String {
    let relay = relay::start(serving.address.parse().unwrap(), FIRST_BYTES, then);
    format!("ferry://{relay}/{name}")
}

/// A push that has made something durable and goes no further.
fn stalled_push(dir: &Path, dest: &str) -> (Child, BufReader<std::process::ChildStdout>) {
    let mut child = program()
        .current_dir(dir)
        // With several lanes the first may be left with so little that it never fails.
        .args([
            "push",
            "big model",
            dest,
            "--format",
            "json",
            "--lanes",
            "1",
        ])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    let mut has_durable = false;
    while !has_durable {
        let mut line = String::new();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended early");
        let event: Value = serde_json::from_str(&line).unwrap();
        has_durable = event["event"] == "progress" && event["durable_bytes"] != 0;
    }
    (child, stdout)
}

fn interrupt(child: &Child) {
    rustix::process::kill_process(
        rustix::process::Pid::from_child(child),
        rustix::process::Signal::INT,
    )
    .unwrap();
}

/// Runs a command line that was printed for a shell.
fn run_printed(dir: &Path, command: &str) -> Output {
    Command::new("sh")
        .current_dir(dir)
        .args(["-c", command])
        .output()
        .unwrap()
}

#[test]
fn json_is_printed_even_when_quiet_and_nothing_else_is() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let words = ["push", "-q", "model", "out", "--format", "json"];
    let output = run(temp.path(), &words);
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    last_event(&String::from_utf8(output.stdout).unwrap(), "done");
    let output = run(temp.path(), &["list", "out", "--format", "json", "--quiet"]);
    last_event(&String::from_utf8(output.stdout).unwrap(), "checkpoint");
}

#[test]
fn wrong_usage_is_told_to_programs_too() {
    let temp = TempDir::new().unwrap();
    for words in [
        &["push", "model", "--format", "json"][..],
        &["frobnicate", "--format=json"],
        &["--format", "json", "push", "a", "b", "--chunk", "3M"],
        &["push", "a", "b", "--format", "json", "--frobnicate"],
    ] {
        let output = run(temp.path(), words);
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        let error = last_event(&String::from_utf8(output.stdout).unwrap(), "error");
        assert_eq!(
            (&error["code"], &error["exit"]),
            (&"usage".into(), &2.into())
        );
        let message = error["message"].as_str().unwrap();
        assert!(
            !message.is_empty() && !message.contains("Usage:") && !message.contains('\u{1b}'),
            "{message}"
        );
        assert!(output.stderr.starts_with(b"error: "));
    }
    let output = program()
        .arg("frobnicate")
        .env("TENSORFERRY_FORMAT", "json")
        .output()
        .unwrap();
    last_event(&String::from_utf8(output.stdout).unwrap(), "error");
    // People get no JSON, and neither does whoever names a file so.
    for words in [
        &["frobnicate"][..],
        &["frobnicate", "--", "--format", "json"],
    ] {
        assert!(run(temp.path(), words).stdout.is_empty());
    }
}

#[test]
fn an_interrupted_push_tells_programs_how_to_go_on() {
    let temp = TempDir::new().unwrap();
    make_big_source(temp.path());
    let serving = Serving::start(temp.path(), "root");
    let dest = dest_through(&serving, Then::Stall, "one");
    let (mut child, mut stdout) = stalled_push(temp.path(), &dest);
    interrupt(&child);
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let error = last_event(&rest, "error");
    assert_eq!(
        (&error["code"], &error["total_bytes"]),
        (&"interrupted".into(), &BIG_BYTES.into())
    );
    let durable_bytes = error["durable_bytes"].as_u64().unwrap();
    assert!((1..BIG_BYTES).contains(&durable_bytes), "{error}");
    let resume = error["resume"].as_str().unwrap();
    assert!(resume.contains("push 'big model' ferry://"), "{resume}");
    let resumed = run_printed(temp.path(), resume);
    assert!(resumed.status.success(), "{resumed:?}");
    let done = last_event(&String::from_utf8(resumed.stdout).unwrap(), "done");
    assert!(
        done["resumed_bytes"].as_u64().unwrap() >= durable_bytes,
        "{done}"
    );
}

#[test]
fn a_push_that_is_cut_off_tells_programs_how_to_go_on() {
    let temp = TempDir::new().unwrap();
    make_big_source(temp.path());
    let serving = Serving::start(temp.path(), "root");
    let dest = dest_through(&serving, Then::Cut, "one");
    let output = run(
        temp.path(),
        &[
            "push",
            "big model",
            &dest,
            "--retries=0",
            "--lanes=1",
            "--format",
            "json",
        ],
    );
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    let error = last_event(&String::from_utf8(output.stdout).unwrap(), "error");
    assert_eq!(
        (&error["code"], &error["total_bytes"]),
        (&"network".into(), &BIG_BYTES.into())
    );
    assert!(error["durable_bytes"].as_u64().unwrap() < BIG_BYTES);
    let resumed = run_printed(temp.path(), error["resume"].as_str().unwrap());
    assert!(resumed.status.success(), "{resumed:?}");
    succeed(temp.path(), &["verify", "root/one"]);
}

#[test]
fn the_status_of_a_name_is_told() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    make_big_source(temp.path());
    let serving = Serving::start(temp.path(), "root");
    let status = |target: &str| {
        last_event(
            &succeed(temp.path(), &["status", target, "--format", "json"]),
            "status",
        )
    };
    fail(temp.path(), &["status", &serving.dest("one")], 3);
    let whole_server = serving.dest("");
    assert_eq!(succeed(temp.path(), &["status", &whole_server]), "");
    fail(temp.path(), &["status", "absent"], 3);
    fail(temp.path(), &["status", "absent/deeper"], 3);
    fail(temp.path(), &["status", "ferry://127.0.0.1:1/x"], 5);

    // Under way, cut off, complete.
    let dest = serving.dest("one");
    let (mut child, _stdout) =
        stalled_push(temp.path(), &dest_through(&serving, Then::Stall, "one"));
    let under_way = status(&dest);
    assert_eq!(
        (&under_way["published"], &under_way["transfer"]["active"]),
        (&false.into(), &true.into())
    );
    // Without a name: everything that is unfinished, and whose it is.
    let row = last_event(
        &succeed(temp.path(), &["status", &whole_server, "--format", "json"]),
        "transfer",
    );
    assert_eq!(
        (&row["name"], &row["active"]),
        (&"one".into(), &true.into())
    );
    assert_eq!(row["owner"].as_str().map(str::len), Some(32), "{row}");
    let human = succeed(temp.path(), &["status", &dest]);
    assert!(
        human.starts_with(&format!("{dest}: receiving, ")),
        "{human}"
    );
    child.kill().unwrap();
    child.wait().unwrap();
    let begun = Instant::now();
    while status(&dest)["transfer"]["active"] == true {
        assert!(begun.elapsed() < HANG);
        sleep(Duration::from_millis(20));
    }
    let cut_off = status(&dest);
    assert_ne!(cut_off["transfer"]["durable_bytes"], 0, "{cut_off}");
    // The same seen from the server's own disk.
    assert_eq!(status("root/one")["transfer"], cut_off["transfer"]);
    succeed(temp.path(), &["push", "big model", &dest]);
    assert_eq!(status(&dest)["published"], true);

    succeed(temp.path(), &["push", "model", "out"]);
    let local = status("out");
    assert_eq!(
        (&local["published"], &local["transfer"]),
        (&true.into(), &Value::Null)
    );
    assert_eq!(succeed(temp.path(), &["status", "out"]), "out: complete\n");
    assert_eq!(succeed(temp.path(), &["status", "out", "-q"]), "complete\n");
}

#[test]
fn an_interrupted_demo_leaves_nothing_behind() {
    let temp = TempDir::new().unwrap();
    fs::create_dir_all(temp.path().join("given")).unwrap();
    fs::create_dir_all(temp.path().join("tmp")).unwrap();
    // While it makes its source in a fresh folder; while it pushes in one of ours.
    for (words, wait_for) in [
        (&["demo"][..], "working in "),
        (&["demo", "--dir", "given"], "source "),
    ] {
        let mut child = program()
            .current_dir(temp.path())
            .args(words)
            .env("TMPDIR", temp.path().join("tmp"))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let (stdout, stderr) = (child.stdout.take().unwrap(), child.stderr.take().unwrap());
        let reader: Box<dyn Read> = match wait_for {
            "working in " => Box::new(stderr),
            _ => Box::new(stdout),
        };
        let mut lines = BufReader::new(reader).lines();
        assert!(lines.any(|line| line.unwrap().starts_with(wait_for)));
        assert!(
            fs::read_dir(temp.path().join("tmp")).unwrap().count() == 1
                || fs::read_dir(temp.path().join("given")).unwrap().count() > 0
        );
        interrupt(&child);
        drop(lines.collect::<Vec<_>>());
        assert_eq!(child.wait().unwrap().code(), Some(130), "{words:?}");
        for dir in ["tmp", "given"] {
            assert_eq!(fs::read_dir(temp.path().join(dir)).unwrap().count(), 0);
        }
    }
}

#[test]
fn verify_goes_on_after_a_failure_and_the_first_one_decides() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    for out in ["a", "b"] {
        succeed(temp.path(), &["push", "model", out]);
    }
    fs::remove_file(temp.path().join("b/files/config.json")).unwrap();
    for (dirs, code) in [
        (["absent", "b", "a"], 3),
        (["b", "absent", "a"], 6),
        (["a", "b", "absent"], 6),
    ] {
        let words = [&["verify"], &dirs[..], &["--format", "json"]].concat();
        let output = run(temp.path(), &words);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        let stdout = String::from_utf8(output.stdout).unwrap();
        assert_eq!(last_event(&stdout, "error")["exit"], code);
        let told = |event: &str| {
            events(&stdout)
                .iter()
                .filter(|e| e["event"] == event)
                .count()
        };
        assert_eq!((told("verified"), told("unverified")), (2, 1), "{stdout}");
        // Every failure once.
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(stderr.matches("error: ").count(), 2, "{stderr}");
    }
}

#[test]
fn inspect_looks_at_a_server_too() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let serving = Serving::start(temp.path(), "root");
    let dest = serving.dest("runs/one");
    fail(temp.path(), &["inspect", &dest], 3);
    succeed(temp.path(), &["push", "model", &dest]);
    let rows = events(&succeed(
        temp.path(),
        &["inspect", &dest, "--format", "json"],
    ));
    let weight = rows
        .iter()
        .find(|row| row["name"] == "layer.weight")
        .unwrap();
    assert_eq!(
        (&weight["event"], &weight["dtype"], &weight["file"]),
        (
            &"tensor".into(),
            &"float32".into(),
            &"layer.weight.npy".into()
        )
    );
    let total = rows.last().unwrap();
    assert_eq!(
        (&total["event"], &total["tensors"], &total["bytes"]),
        (&"total".into(), &3.into(), &SOURCE_BYTES.into())
    );
    let human = succeed(temp.path(), &["inspect", &dest]);
    assert!(human.contains("3 tensors, 1 file"), "{human}");
    fail(temp.path(), &["inspect", &dest, "model"], 2);
    fail(temp.path(), &["inspect", &serving.dest("")], 2);
    fail(temp.path(), &["inspect", "ferry://127.0.0.1:1/x"], 5);
    // A file with a colon in its name is a file.
    fs::rename(temp.path().join("model"), temp.path().join("a:b")).unwrap();
    assert!(succeed(temp.path(), &["inspect", "a:b"]).contains("3 tensors"));
}

#[test]
fn manual_pages_keep_the_lines_of_tables() {
    let temp = TempDir::new().unwrap();
    let page = succeed(temp.path(), &["man"]);
    let help = succeed(temp.path(), &["--help"]);
    let (_, table) = page.split_once(".SH EXIT STATUS\n.nf\n").unwrap();
    let (table, _) = table.split_once(".fi").unwrap();
    let lines = table.lines().collect::<Vec<_>>();
    assert_eq!(lines.len(), 6, "{table}");
    for line in lines {
        let line = line.strip_prefix("\\&").unwrap().replace("\\-", "-");
        assert!(help.contains(&format!("{line}\n")), "{line}");
    }
    assert!(page.contains(".SH EXAMPLES\n.nf\n"));
    assert!(succeed(temp.path(), &["man", "push"]).contains(".SH EXAMPLES\n.nf\n"));
    assert!(!succeed(temp.path(), &["man", "list"]).contains(".nf"));
}

#[test]
fn a_server_takes_as_many_open_files_as_it_may() {
    let temp = TempDir::new().unwrap();
    for (limits, is_few) in [("ulimit -Sn 200", false), ("ulimit -n 1000", true)] {
        let mut child = Command::new("sh")
            .current_dir(temp.path())
            .args(["-c", &format!("{limits}; exec \"$0\" \"$@\"")])
            .args([env!("CARGO_BIN_EXE_tensorferry"), "serve", "root", "-v"])
            .args(["--listen", "127.0.0.1:0"])
            .env_remove("RUST_LOG")
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        assert!(line.starts_with("listening on "), "{line}");
        let table = fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
        let row = table.lines().find(|l| l.starts_with("Max open files"));
        let numbers = row.unwrap().split_whitespace().skip(3).collect::<Vec<_>>();
        assert_eq!(numbers[0], numbers[1], "{table}");
        child.kill().unwrap();
        child.wait().unwrap();
        let mut stderr = String::new();
        child.stderr.unwrap().read_to_string(&mut stderr).unwrap();
        let hard: Option<u64> = numbers[1].parse().ok();
        let is_warned = stderr.contains("few files may be open");
        assert_eq!(is_warned, hard.is_some_and(|n| n < 4096), "{stderr}");
        assert!(is_warned || !is_few, "{stderr}");
    }
}

#[test]
fn a_limit_on_the_length_of_files_is_told_and_no_signal() {
    let temp = TempDir::new().unwrap();
    make_big_source(temp.path());
    let output = Command::new("sh")
        .current_dir(temp.path())
        // In blocks of 512 bytes.
        .args(["-c", "ulimit -f 64; exec \"$0\" \"$@\""])
        .args([
            env!("CARGO_BIN_EXE_tensorferry"),
            "push",
            "big model",
            "landed",
        ])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(8), "{stderr}");
    assert!(stderr.contains("no file that long"), "{stderr}");
    assert!(!temp.path().join("landed/manifest.json").exists());
}

#[test]
fn an_export_of_what_landed_is_what_was_pushed() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path();
    make_source(dir, "model", 3);
    succeed(dir, &["push", "model", "landed"]);
    let stdout = succeed(
        dir,
        &["export", "landed", "m.safetensors", "--format", "json"],
    );
    assert_eq!(events(&stdout)[0]["event"], "begin");
    let done = last_event(&stdout, "done");
    assert_eq!(done["files"], serde_json::json!(["m.safetensors"]));
    // Without the side file.
    assert_eq!(
        (&done["tensors"], &done["bytes"]),
        (&3.into(), &(SOURCE_BYTES - 11).into())
    );
    let human = succeed(dir, &["export", "landed", "m.npz"]);
    assert!(human.starts_with("exported 3 tensors, "), "{human}");
    assert_eq!(
        succeed(dir, &["export", "landed", "q.npz", "--format", "quiet"]),
        ""
    );

    // Back again, both are the same checkpoint as the source.
    for (at, name) in ["m.safetensors", "m.npz"].into_iter().enumerate() {
        let folder = format!("again{at}");
        succeed(dir, &["push", name, &folder]);
        let first = Checkpoint::open(dir.join("landed")).unwrap();
        let again = Checkpoint::open(dir.join(&folder)).unwrap();
        assert_eq!(again.tensors().len(), 3);
        for tensor in first.tensors() {
            let found = again.tensor(&tensor.name).unwrap().unwrap();
            assert_eq!(found.info().crc32c, tensor.crc32c);
            assert_eq!(
                (found.info().dtype, &found.info().shape),
                (tensor.dtype, &tensor.shape)
            );
        }
    }

    let one = [
        "export",
        "landed",
        "bias.npz",
        "--include",
        "*.bias",
        "--rename",
        "layer.*=*",
    ];
    succeed(dir, &one);
    assert!(succeed(dir, &["inspect", "bias.npz", "--format", "quiet"]).contains("bias"));
    succeed(
        dir,
        &["export", "landed", "m.safetensors", "--max-shard", "1M"],
    );
    assert!(dir.join("m.safetensors.index.json").is_file());
    fail(dir, &["export", "landed", "m.safetensors"], 9);
    assert!(fail(dir, &["export", "landed", "m.npz"], 9).contains("--overwrite"));
    succeed(dir, &["export", "landed", "m.npz", "--overwrite"]);
    fail(dir, &["export", "landed", "m.npy"], 2);
    fail(dir, &["export", "absent", "n.npz"], 3);
    fail(dir, &["export", "landed"], 2);
}

#[test]
fn a_damaged_checkpoint_is_not_exported() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path();
    make_source(dir, "model", 3);
    succeed(dir, &["push", "model", "landed"]);
    let file = dir.join("landed/layer.weight.npy");
    let mut bytes = fs::read(&file).unwrap();
    let last = bytes.len() - 1;
    bytes[last] ^= 1;
    fs::write(&file, bytes).unwrap();
    for name in ["m.safetensors", "m.npz"] {
        let stderr = fail(dir, &["export", "landed", name], 6);
        assert!(stderr.contains("layer.weight"), "{stderr}");
        let output = run(dir, &["export", "landed", name, "--format", "json"]);
        let error = last_event(&String::from_utf8(output.stdout).unwrap(), "error");
        assert_eq!(error["code"], "integrity");
    }
    let mut left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    left.sort();
    assert_eq!(left, ["landed", "model"]);
}

#[test]
fn an_interrupted_export_leaves_nothing_behind() {
    let temp = TempDir::new().unwrap();
    let dir = temp.path();
    // A hole takes no room, and yet it must all be read and written.
    let source = fs::File::create(dir.join("w.npy")).unwrap();
    let header = encode_header("|u1", false, &[8 << 30]);
    std::io::Write::write_all(&mut &source, &header).unwrap();
    source.set_len(header.len() as u64 + (8 << 30)).unwrap();
    let mut child = program()
        .current_dir(dir)
        .args(["export", "w.npy", "m.npz", "--format", "json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let begin: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(begin["event"], "begin");
    // The first word of progress comes when bytes have been written.
    let progress: Value = serde_json::from_str(&lines.next().unwrap().unwrap()).unwrap();
    assert_eq!(progress["event"], "progress");
    interrupt(&child);
    let last = lines.map(Result::unwrap).last().unwrap();
    assert_eq!(last_event(&last, "error")["code"], "interrupted");
    assert_eq!(child.wait().unwrap().code(), Some(130));
    let left: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["w.npy"]);
}

#[test]
fn a_copy_goes_from_server_to_server_and_what_comes_first_is_named() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let (near, far) = (
        Serving::start(temp.path(), "near"),
        Serving::start(temp.path(), "far"),
    );
    let (from, to) = (near.dest("run7"), far.dest("backup/run7"));
    succeed(temp.path(), &["push", "model", &from]);
    let human = succeed(temp.path(), &["copy", &from, &to]);
    assert!(human.contains("copied 3 tensors, 1 file"), "{human}");
    succeed(temp.path(), &["verify", "far/backup/run7"]);
    let again = events(&succeed(
        temp.path(),
        &["copy", &from, &to, "--format", "json"],
    ));
    assert_eq!(again.last().unwrap()["unchanged"], true);
    fail(temp.path(), &["copy", &from, &from], 2);
    fail(temp.path(), &["copy", "model", &to], 2);
    fail(
        temp.path(),
        &["copy", &near.dest("absent"), &far.dest("x")],
        3,
    );

    let first = [
        "pull", &to, "here", "--first", "layer.*", "--format", "json",
    ];
    let told = events(&succeed(temp.path(), &first));
    let ready: Vec<_> = told.iter().filter(|e| e["event"] == "ready").collect();
    assert!(!ready.is_empty());
    for event in ready {
        assert!(event["name"].as_str().unwrap().starts_with("layer."));
        assert_eq!(event["first"], true);
    }
    fail(temp.path(), &["pull", &to, "x", "--first", "nothing"], 3);
    let all = events(&succeed(
        temp.path(),
        &["pull", &to, "all", "--ready", "--format", "json"],
    ));
    assert_eq!(all.iter().filter(|e| e["event"] == "ready").count(), 4);
}

#[test]
fn a_pull_lands_and_says_how_it_ended() {
    let temp = TempDir::new().unwrap();
    make_source(temp.path(), "model", 0);
    let serving = Serving::start(temp.path(), "root");
    let dest = serving.dest("run7");
    succeed(temp.path(), &["push", "model", &dest]);
    let human = succeed(temp.path(), &["pull", &dest, "here/run7"]);
    assert!(human.contains("pulled 3 tensors, 1 file"), "{human}");
    succeed(temp.path(), &["verify", "here/run7"]);
    let again = events(&succeed(
        temp.path(),
        &["pull", &dest, "here/run7", "--format", "json"],
    ));
    assert_eq!(again.last().unwrap()["unchanged"], true);

    let part = ["pull", &dest, "part", "--include", "layer.*"];
    assert!(succeed(temp.path(), &part).contains("pulled 2 tensors"));
    let absent = serving.dest("absent");
    fail(temp.path(), &["pull", &absent, "x"], 3);
    fail(temp.path(), &["pull", "model", "x"], 2);
    let address = fail(temp.path(), &["pull", &dest, &serving.dest("y")], 2);
    assert!(address.contains("copy"), "{address}");
    fail(
        temp.path(),
        &["pull", "ferry://127.0.0.1:1/x", "x", "--retries", "0"],
        5,
    );
    let small = fail(temp.path(), &["pull", &dest, "x", "--max-bytes", "1000"], 8);
    assert!(small.contains("--max-bytes"), "{small}");
    fail(temp.path(), &["pull", &dest, "model"], 9);
    assert!(!temp.path().join("x").exists());
}
