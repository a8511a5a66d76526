//! The bench from outside: every figure is there, nothing is left behind, and what keeps
//! no bytes takes none that matter.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Output, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tensorferry::measure;

/// Nothing here takes longer unless it hangs.
const DEADLINE: Duration = Duration::from_secs(120);
const CEILINGS: [&str; 13] = [
    "memcpy",
    "crc32c",
    "lz4_encode",
    "lz4_decode",
    "constant",
    "map_store",
    "map_populate",
    "pwrite",
    "fdatasync",
    "tcp_memory",
    "tcp_file",
    "tcp_file_crc",
    "tcp_file_sync",
];

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

fn run(dir: &Path, words: &[&str]) -> Output {
    program().current_dir(dir).args(words).output().unwrap()
}

#[track_caller]
fn events(dir: &Path, words: &[&str]) -> Vec<Value> {
    let output = run(dir, words);
    assert!(output.status.success(), "{words:?}: {output:?}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    let lines = stdout.lines();
    lines.map(|l| serde_json::from_str(l).unwrap()).collect()
}

#[track_caller]
fn fail(dir: &Path, words: &[&str], code: i32) {
    let output = run(dir, words);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
}

fn names_in(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = entries
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

fn is_positive(event: &Value, key: &str) -> bool {
    event[key].as_f64().is_some_and(|value| value > 0.0)
}

/// Processes that have a path in their command line.
fn processes_of(dir: &Path) -> Vec<String> {
    let shown = dir.to_str().unwrap();
    let all = fs::read_dir("/proc").unwrap().filter_map(Result::ok);
    all.filter_map(|e| fs::read(e.path().join("cmdline")).ok())
        .map(|words| String::from_utf8_lossy(&words).replace('\0', " "))
        .filter(|words| words.contains(shown))
        .collect()
}

#[track_caller]
fn wait_until(what: &str, is_so: impl Fn() -> bool) {
    let begun = Instant::now();
    while !is_so() {
        assert!(begun.elapsed() < DEADLINE, "{what} does not happen");
        sleep(Duration::from_millis(5));
    }
}

/// A process that says where it listens, killed when the test ends.
struct Listening {
    child: Child,
    address: String,
}

impl Listening {
    fn start(dir: &Path, words: &[&str]) -> Listening {
        let mut child = program()
            .current_dir(dir)
            .args(words)
            .args(["--format", "json"])
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap())
            .read_line(&mut line)
            .unwrap();
        let event: Value = serde_json::from_str(&line).unwrap();
        let address = event["address"].as_str().unwrap().to_owned();
        Listening { child, address }
    }

    fn interrupt(&mut self) -> Option<i32> {
        kill_process(Pid::from_child(&self.child), Signal::INT).unwrap();
        self.child.wait().unwrap().code()
    }
}

impl Drop for Listening {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// One tensor in a file.
fn make_model(path: &Path) {
    let mut bytes = tensorferry::format::npy::encode_header("<f4", false, &[1 << 18]);
    let at = bytes.len();
    bytes.resize(at + (1 << 20), 0);
    measure::Noise::new(3).fill(&mut bytes[at..]);
    fs::write(path, bytes).unwrap();
}

#[test]
fn every_figure_is_there_once_and_nothing_else_afterwards() {
    let temp = TempDir::new().unwrap();
    let place = temp.path().join("place");
    fs::create_dir(&place).unwrap();
    let words = [
        "bench", "place", "--bytes", "8M", "--rounds", "1", "--format", "json", "--out", "c.svg",
    ];
    let events = events(temp.path(), &words);
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    for event in &events {
        let key = match event["event"].as_str().unwrap() {
            "run" => format!("{} {} {}", event["name"], event["lanes"], event["crc"]),
            "ceiling" => event["name"].as_str().unwrap().to_owned(),
            other => other.to_owned(),
        };
        *counts.entry(key).or_default() += 1;
        if event["event"] == "summary" {
            continue;
        }
        for key in ["seconds", "gib_per_s", "bytes"] {
            assert!(is_positive(event, key), "{key} of {event}");
        }
        assert_eq!(event["rounds"].as_array().unwrap().len(), 1, "{event}");
    }
    let mut expected: Vec<String> = CEILINGS.map(str::to_owned).to_vec();
    for name in ["memory_to_memory", "file_to_file"] {
        for lanes in [1, 2, 4] {
            expected.extend([true, false].map(|crc| format!("\"{name}\" {lanes} {crc}")));
        }
    }
    expected.push("summary".to_owned());
    expected.sort();
    assert_eq!(counts.keys().cloned().collect::<Vec<_>>(), expected);
    assert!(counts.values().all(|count| *count == 1), "{counts:?}");
    for run in events.iter().filter(|e| e["event"] == "run") {
        assert!(is_positive(run, "share"), "{run}");
        assert_eq!(run["bytes"], 8 << 20, "{run}");
        let is_published = run["name"] == "file_to_file" && run["crc"] == true;
        assert_eq!(run["published"], is_published, "{run}");
    }
    let summary = events.last().unwrap();
    let best = &summary["file_to_file"];
    assert!(
        is_positive(best, "share") && best["limiting_stage"].is_string(),
        "{summary}"
    );
    let chart = fs::read_to_string(temp.path().join("c.svg")).unwrap();
    assert!(chart.starts_with("<svg") && chart.ends_with("</svg>\n"));
    assert!(chart.contains(summary["date"].as_str().unwrap()));
    assert_eq!(names_in(&place), Vec::<String>::new());
    assert_eq!(processes_of(temp.path()), Vec::<String>::new());
}

#[test]
fn one_ceiling_of_a_given_file_is_one_line() {
    let temp = TempDir::new().unwrap();
    let model = temp.path().join("model.npy");
    make_model(&model);
    let before = fs::read(&model).unwrap();
    let words = [
        "bench",
        ".",
        "--only",
        "tcp_file",
        "--rounds",
        "1",
        "--source",
        "model.npy",
        "--format",
        "json",
    ];
    let events = events(temp.path(), &words);
    assert_eq!(events.len(), 1, "{events:?}");
    assert_eq!(events[0]["name"], "tcp_file");
    assert_eq!(events[0]["bytes"], before.len());
    assert_eq!(fs::read(&model).unwrap(), before);
    assert_eq!(names_in(temp.path()), ["model.npy"]);
}

#[test]
fn people_get_a_table_that_ends_in_what_limits() {
    let temp = TempDir::new().unwrap();
    let words = [
        "bench",
        ".",
        "--bytes",
        "4M",
        "--rounds",
        "2",
        "--only",
        "pwrite,tcp_memory,tcp_file,file_to_file",
    ];
    let output = run(temp.path(), &words);
    assert!(output.status.success(), "{output:?}");
    let stdout = String::from_utf8(output.stdout).unwrap();
    assert!(stdout.contains("file to file, 2 lanes"), "{stdout}");
    let verdict = stdout.lines().find(|line| line.starts_with("received "));
    let verdict = verdict.unwrap();
    for words in ["GiB/s = ", " of the ceiling; limiting stage: "] {
        assert!(verdict.contains(words), "{verdict}");
    }
    assert!(stdout.contains("durability "), "{stdout}");
    let words = [
        "bench",
        "-q",
        "--bytes",
        "2M",
        "--rounds",
        "1",
        "--only",
        "memory_to_memory",
    ];
    let quiet = run(temp.path(), &words);
    let stdout = String::from_utf8(quiet.stdout).unwrap();
    assert!(
        stdout.starts_with("received ") && stdout.lines().count() == 1,
        "{stdout}"
    );
    assert!(quiet.stderr.is_empty(), "{:?}", quiet.stderr);
}

#[test]
fn what_cannot_be_measured_is_refused_and_leaves_the_place_alone() {
    let temp = TempDir::new().unwrap();
    fs::write(temp.path().join("kept"), "x").unwrap();
    fail(temp.path(), &["bench", ".", "--bytes", "1000T"], 8);
    fail(temp.path(), &["bench", ".", "--bytes", "1K"], 2);
    fail(temp.path(), &["bench", ".", "--only", "warp"], 2);
    fail(temp.path(), &["bench", "none"], 3);
    fail(temp.path(), &["bench", ".", "--source", "none"], 3);
    fail(temp.path(), &["bench", "ferry://127.0.0.1:1/name"], 2);
    fail(
        temp.path(),
        &["bench", "ferry://127.0.0.1:1", "--only", "memcpy"],
        2,
    );
    fail(temp.path(), &["bench", "ferry://127.0.0.1:1"], 5);
    assert_eq!(names_in(temp.path()), ["kept"]);
}

#[test]
fn an_interrupt_leaves_no_file_and_no_process() {
    let temp = TempDir::new().unwrap();
    let mut child = program()
        .current_dir(temp.path())
        .args(["bench", "--bytes", "64M", "--rounds", "1000"])
        .args(["--only", "file_to_file"])
        .arg(temp.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // The server of a run is the second process that has the folder in its words.
    wait_until("a run", || processes_of(temp.path()).len() >= 2);
    kill_process(Pid::from_child(&child), Signal::INT).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));
    assert_eq!(names_in(temp.path()), Vec::<String>::new());
    assert_eq!(processes_of(temp.path()), Vec::<String>::new());
}

#[test]
fn a_rehearsal_takes_a_new_folder_only_and_removes_it() {
    let temp = TempDir::new().unwrap();
    let root = temp.path().join("root");
    fs::create_dir(&root).unwrap();
    fs::write(root.join("precious"), "x").unwrap();
    for what in ["memory", "memory-unchecked", "files-unchecked"] {
        fail(temp.path(), &["rehearse", what, "receive", "root"], 2);
    }
    assert_eq!(names_in(&root), ["precious"]);
    let mut server = Listening::start(temp.path(), &["rehearse", "memory", "receive", "new"]);
    let sent = [
        "rehearse",
        "memory",
        "send",
        &server.address,
        "2",
        "5M",
        "--format",
        "json",
    ];
    let done = events(temp.path(), &sent);
    assert_eq!(
        (&done[0]["event"], &done[0]["bytes"]),
        (&"done".into(), &(5 << 20).into())
    );
    assert!(!temp.path().join("new/rehearsal").exists());
    assert_eq!(server.interrupt(), Some(0));
    assert_eq!(names_in(temp.path()), ["root"]);
}

#[test]
fn nothing_real_gets_into_a_rehearsal_and_nothing_of_one_into_a_real_server() {
    let temp = TempDir::new().unwrap();
    make_model(&temp.path().join("model.npy"));
    for what in ["memory", "memory-unchecked", "files-unchecked"] {
        let server = Listening::start(temp.path(), &["rehearse", what, "receive", "new"]);
        // Under the very name that rehearsals use, too.
        for name in ["run7", "rehearsal"] {
            let dest = format!("ferry://{}/{name}", server.address);
            fail(temp.path(), &["push", "model.npy", &dest], 1);
        }
        drop(server);
        fs::remove_dir_all(temp.path().join("new")).unwrap();
    }
    let server = Listening::start(temp.path(), &["serve", "root", "--listen", "127.0.0.1:0"]);
    let address = server.address.as_str();
    fail(
        temp.path(),
        &["rehearse", "memory", "send", address, "1", "1M"],
        1,
    );
    fail(
        temp.path(),
        &["rehearse", "memory-unchecked", "send", address, "1", "1M"],
        1,
    );
    fail(
        temp.path(),
        &[
            "rehearse",
            "files-unchecked",
            "send",
            address,
            "1",
            "model.npy",
        ],
        1,
    );
    // Refused before anything was made.
    assert_eq!(names_in(&temp.path().join("root")), Vec::<String>::new());
}

#[test]
fn a_server_is_measured_and_keeps_nothing_of_it() {
    let temp = TempDir::new().unwrap();
    let server = Listening::start(temp.path(), &["serve", "root", "--listen", "127.0.0.1:0"]);
    let place = format!("ferry://{}", server.address);
    let words = [
        "bench", &place, "--bytes", "3M", "--rounds", "1", "--format", "json",
    ];
    let events = events(temp.path(), &words);
    let kinds: Vec<String> = events
        .iter()
        .map(|e| format!("{} {} {}", e["event"], e["data"], e["lanes"]).replace('"', ""))
        .collect();
    assert_eq!(
        kinds,
        [
            "link null null",
            "run noise 1",
            "run noise 2",
            "run noise 4",
            "run sparse 2",
            "summary null null"
        ]
    );
    for run in events.iter().filter(|e| e["event"] == "run") {
        assert!(
            is_positive(run, "gib_per_s") && run["published"] == false,
            "{run}"
        );
        // Each push begins with nothing.
        let is_encoded = run["data"] == "sparse";
        let wire_bytes = run["wire_bytes"].as_u64().unwrap();
        assert_eq!(wire_bytes < 3 << 20, is_encoded, "{run}");
    }
    let root = temp.path().join("root");
    assert_eq!(names_in(&root), [".tensorferry"]);
    assert_eq!(
        names_in(&root.join(".tensorferry/transfers")),
        Vec::<String>::new()
    );
}
