//! The command line program, from outside: what it prints, writes and exits with.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use serde_json::Value;
use std::{
    fs,
    io::{BufRead, BufReader, Read},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::Duration,
};
use tempfile::TempDir;
use tensorferry::{Checkpoint, format::npy::encode_header};

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tensorferry"));
    for (name, _) in
        std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("TENSORFERRY_"))
    {
        // The same claims hold with several lanes and with a codec.
        if name != "TENSORFERRY_LANES" && name != "TENSORFERRY_CODEC" {
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
    let human = succeed(temp.path(), &["inspect", "model"]);
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
