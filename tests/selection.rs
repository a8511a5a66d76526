//! The flags that say which tensors are taken and what they are called, from outside: what they
//! show, what they refuse, and that another selection is another transfer.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

#[path = "common/relay.rs"]
mod relay;

use relay::Then;
use serde_json::Value;
use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};
use tempfile::TempDir;
use tensorferry::format::npy::encode_header;

/// Bytes of each of the two tensors of a source: more than passes before the first cut.
const TENSOR_LEN: u64 = 6 << 20;
/// Bytes that reach the server before its first connection stalls.
const FIRST_BYTES: usize = 4 << 20;

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
fn succeed(dir: &Path, words: &[&str]) -> Vec<Value> {
    let output = run(dir, &[words, &["--format", "json"]].concat());
    assert!(output.status.success(), "{words:?}: {output:?}");
    events(&String::from_utf8(output.stdout).unwrap())
}

#[track_caller]
fn fail(dir: &Path, words: &[&str], code: i32) -> String {
    let output = run(dir, words);
    assert_eq!(output.status.code(), Some(code), "{words:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

fn events(stdout: &str) -> Vec<Value> {
    let lines = stdout.lines();
    lines
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[track_caller]
fn only(events: &[Value], event: &str) -> Value {
    let mut found = events.iter().filter(|row| row["event"] == event);
    let one = found.next().unwrap().clone();
    assert!(found.next().is_none(), "{event} occurs twice");
    one
}

/// A folder of small tensors: `a.kernel`, `a.bias`, `b.kernel`.
fn make_small(dir: &Path) {
    let source = dir.join("model");
    fs::create_dir(&source).unwrap();
    for (name, fill) in [("a.kernel", 1), ("a.bias", 2), ("b.kernel", 3)] {
        let header = encode_header("|u1", false, &[5]);
        let bytes = [header, vec![fill; 5]].concat();
        fs::write(source.join(format!("{name}.npy")), bytes).unwrap();
    }
    fs::write(source.join("config.json"), "{}").unwrap();
}

/// Files, each with the name that its tensor has in the source.
type Files<'a> = &'a [(&'a str, &'a str)];

/// What each tensor becomes: its name in the source, by its file.
fn mapping(events: &[Value]) -> BTreeMap<String, String> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let tensors = events.iter().filter(|row| row["event"] == "tensor");
    tensors
        .map(|row| {
            let source = row.get("source_name").unwrap_or(&row["name"]);
            (text(&row["file"]), text(source))
        })
        .collect()
}

#[test]
fn a_dry_run_shows_what_is_selected_and_a_push_lands_exactly_that() {
    let temp = TempDir::new().unwrap();
    make_small(temp.path());
    let cases: [(&[&str], Files<'_>); 4] = [
        (
            &["--include", "*.kernel"],
            &[("a.kernel.npy", "a.kernel"), ("b.kernel.npy", "b.kernel")],
        ),
        (&["--exclude", "a.*"], &[("b.kernel.npy", "b.kernel")]),
        (
            &[
                "--include",
                "a.*",
                "--exclude",
                "*.bias",
                "--rename",
                "*.kernel=*.weight",
            ],
            &[("a.weight.npy", "a.kernel")],
        ),
        (
            &[
                "--rename",
                "a.*=first.*",
                "--rename",
                "a.*=never.*",
                "--rename",
                "*.kernel=*.w",
            ],
            &[
                ("b.w.npy", "b.kernel"),
                ("first.bias.npy", "a.bias"),
                ("first.kernel.npy", "a.kernel"),
            ],
        ),
    ];
    for (number, (flags, expected)) in cases.into_iter().enumerate() {
        let dest = format!("out{number}");
        let expected: BTreeMap<String, String> = expected
            .iter()
            .map(|(file, name)| ((*file).to_owned(), (*name).to_owned()))
            .collect();
        let dry = succeed(
            temp.path(),
            &[&["push", "-n", "model", &dest], flags].concat(),
        );
        assert_eq!(mapping(&dry), expected, "{flags:?}");
        let bytes = 5 * expected.len() as u64 + 2;
        assert_eq!(only(&dry, "left")["left_bytes"], bytes, "{flags:?}");
        assert!(!temp.path().join(&dest).exists());

        let done = succeed(temp.path(), &[&["push", "model", &dest], flags].concat());
        assert_eq!(only(&done, "done")["tensors"], expected.len() as u64);
        let landed: Vec<String> = fs::read_dir(temp.path().join(&dest))
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.ends_with(".npy"))
            .collect();
        let mut landed: Vec<&str> = landed.iter().map(String::as_str).collect();
        landed.sort_unstable();
        assert_eq!(landed, expected.keys().collect::<Vec<_>>(), "{flags:?}");
        for (file, name) in &expected {
            let fill = match &name[..] {
                "a.kernel" => 1,
                "a.bias" => 2,
                _ => 3,
            };
            let bytes = fs::read(temp.path().join(&dest).join(file)).unwrap();
            assert_eq!(bytes[bytes.len() - 5..], [fill; 5], "{file}");
        }
    }
}

#[test]
fn a_selection_that_cannot_be_meant_is_wrong_usage_and_says_why() {
    let temp = TempDir::new().unwrap();
    make_small(temp.path());
    for (flags, words) in [
        (
            &["--include", "c.*"][..],
            "no tensor has a name like \"c.*\"",
        ),
        (
            &["--include", "a.*", "--include", "x"],
            "no tensor has a name like \"x\"",
        ),
        (
            &["--exclude", "a.bais"],
            "no tensor has a name like \"a.bais\"",
        ),
        (
            &["--include", "a.*", "--exclude", "a.*", "--exclude", "c.*"],
            "no tensor has a name like \"c.*\"",
        ),
        (&["--include", ""], "empty"),
        (&["--exclude", ""], "empty"),
        (&["--exclude", "*"], "no tensor is left"),
        (
            &["--include", "*.bias", "--exclude", "a.*"],
            "no tensor is left",
        ),
        (&["--rename", "a.kernel"], "OLD=NEW"),
        (&["--rename", "a.kernel="], "empty"),
        (&["--rename", "a.*=*.*"], "more `*`"),
        (&["--rename", "*.kernel=same"], "called \"same\""),
        (&["--rename", "a.bias=a.kernel"], "called \"a.kernel\""),
        (&["--trainable"], "does not say which are"),
    ] {
        for verb in [
            &["push", "model", "out"][..],
            &["push", "-n", "model", "out"],
            &["inspect", "model"],
        ] {
            let stderr = fail(temp.path(), &[verb, flags].concat(), 2);
            assert!(stderr.contains(words), "{verb:?} {flags:?}: {stderr}");
        }
    }
    assert!(!temp.path().join("out").exists());
}

#[test]
fn side_files_are_no_tensors_and_can_be_left() {
    let temp = TempDir::new().unwrap();
    make_small(temp.path());
    let push = ["push", "model", "out", "--include", "a.bias"];
    assert_eq!(only(&succeed(temp.path(), &push), "done")["files"], 1);
    let push = ["push", "model", "bare", "--include", "a.bias", "--no-files"];
    assert_eq!(only(&succeed(temp.path(), &push), "done")["files"], 0);
}

#[test]
fn inspect_tells_how_much_the_sender_puts_together() {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures");
    let total = |file: &str| {
        let path = fixtures.join(file);
        let rows = succeed(&fixtures, &["inspect", path.to_str().unwrap()]);
        let total = only(&rows, "total");
        (
            total["bytes"].as_u64().unwrap(),
            total["derived_bytes"].as_u64().unwrap(),
        )
    };
    let (_, derived) = total("npz/stored.npz");
    assert_eq!(derived, 0);
    let (bytes, derived) = total("npz/deflated.npz");
    assert!(
        derived > bytes / 2 && derived <= bytes,
        "{derived} of {bytes}"
    );
    let (bytes, derived) = total("torch/views.pt");
    assert!(derived > 0 && derived < bytes, "{derived} of {bytes}");
    let human = |file: &str| {
        let output = run(&fixtures, &["inspect", file]);
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    };
    assert!(human("npz/deflated.npz").contains("do not lie in the source as they are sent"));
    assert!(!human("npz/stored.npz").contains("as they are sent"));
}

struct Serving {
    child: Child,
    address: SocketAddr,
}

impl Serving {
    fn start(dir: &Path) -> Serving {
        let words = [
            "serve",
            "root",
            "--listen",
            "127.0.0.1:0",
            "--format",
            "json",
        ];
        let mut command = program();
        command.current_dir(dir).args(words);
        let mut child = command
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let mut stdout = BufReader::new(child.stdout.as_mut().unwrap());
        stdout.read_line(&mut line).unwrap();
        let address = only(&events(&line), "listening")["address"].clone();
        let address = address.as_str().unwrap().parse().unwrap();
        Serving { child, address }
    }

    fn dest(&self) -> String {
        format!("ferry://{}/run", self.address)
    }
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two tensors that no codec can shrink.
fn make_large(dir: &Path) -> PathBuf {
    let source = dir.join("large");
    fs::create_dir(&source).unwrap();
    for name in ["a", "b"] {
        let mut noise = vec![0; TENSOR_LEN as usize];
        blake3::Hasher::new()
            .update(name.as_bytes())
            .finalize_xof()
            .fill(&mut noise);
        let header = encode_header("|u1", false, &[TENSOR_LEN]);
        fs::write(source.join(format!("{name}.npy")), [header, noise].concat()).unwrap();
    }
    source
}

/// Pushes `large` with these flags through a connection that stalls once some of it is
/// there, and stops as Ctrl-C does. How many bytes are durable then.
fn push_a_part(dir: &Path, serving: &Serving, flags: &[&str]) -> u64 {
    let relay = relay::start(serving.address, FIRST_BYTES, Then::Stall);
    let dest = format!("ferry://{relay}/run");
    let mut child = program()
        .current_dir(dir)
        .args(["push", "large", &dest, "--format", "json", "--lanes", "1"])
        .args(["--durability", "strict"])
        .args(flags)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(child.stdout.take().unwrap());
    loop {
        let mut line = String::new();
        assert!(stdout.read_line(&mut line).unwrap() > 0, "it ended early");
        let event: Value = serde_json::from_str(&line).unwrap();
        if event["event"] == "progress" && event["durable_bytes"] != 0 {
            break;
        }
    }
    let pid = rustix::process::Pid::from_child(&child);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).unwrap();
    let mut rest = String::new();
    stdout.read_to_string(&mut rest).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130), "{rest}");
    let error = only(&events(&rest), "error");
    error["durable_bytes"].as_u64().unwrap()
}

#[test]
fn another_selection_does_not_go_on_with_what_the_first_one_left() {
    let temp = TempDir::new().unwrap();
    make_large(temp.path());
    let serving = Serving::start(temp.path());
    let dest = serving.dest();
    let first = ["--include", "a", "--rename", "a=one"];
    let durable = push_a_part(temp.path(), &serving, &first);
    assert!(durable > 0 && durable < TENSOR_LEN, "{durable}");

    // Each differs in one thing from what is unfinished, and takes none of it.
    let others: [&[&str]; 4] = [
        &[],
        &["--include", "a"],
        &["--include", "a", "--rename", "a=two"],
        &["--include", "*", "--exclude", "b", "--rename", "a=two"],
    ];
    for flags in others {
        let stderr = fail(
            temp.path(),
            &[&["push", "large", &dest], flags].concat(),
            11,
        );
        assert!(stderr.contains("--restart"), "{flags:?}: {stderr}");
    }
    let left = only(
        &succeed(
            temp.path(),
            &[&["push", "-n", "large", &dest], &first[..]].concat(),
        ),
        "left",
    );
    assert_eq!(left["left_bytes"], TENSOR_LEN - durable);

    // The same one goes on.
    let done = succeed(
        temp.path(),
        &[&["push", "large", &dest], &first[..]].concat(),
    );
    let done = only(&done, "done");
    assert_eq!(done["resumed_bytes"], durable, "{done}");
    assert_eq!(done["wire_bytes"], TENSOR_LEN - durable, "{done}");
}

#[test]
fn a_selection_that_looks_the_same_is_compared_before_anything_is_kept() {
    let temp = TempDir::new().unwrap();
    make_large(temp.path());
    let serving = Serving::start(temp.path());
    let dest = serving.dest();
    push_a_part(
        temp.path(),
        &serving,
        &["--include", "a", "--rename", "a=one"],
    );
    // One tensor of the same name, type and shape, out of another file.
    let push = [
        "push",
        "large",
        &dest,
        "--include",
        "b",
        "--rename",
        "b=one",
    ];
    let done = only(&succeed(temp.path(), &push), "done");
    assert_eq!(
        (&done["resumed_bytes"], &done["wire_bytes"]),
        (&0.into(), &TENSOR_LEN.into())
    );
    let landed = fs::read(temp.path().join("root/run/one.npy")).unwrap();
    assert_eq!(landed, fs::read(temp.path().join("large/b.npy")).unwrap());
}

#[test]
fn a_restart_with_another_selection_sends_all_of_it() {
    let temp = TempDir::new().unwrap();
    make_large(temp.path());
    let serving = Serving::start(temp.path());
    let dest = serving.dest();
    push_a_part(temp.path(), &serving, &["--include", "a"]);
    let push = [
        "push",
        "large",
        &dest,
        "--include",
        "b",
        "--rename",
        "b=a",
        "--restart",
    ];
    let done = only(&succeed(temp.path(), &push), "done");
    assert_eq!(
        (&done["resumed_bytes"], &done["wire_bytes"]),
        (&0.into(), &TENSOR_LEN.into())
    );
    let landed = fs::read(temp.path().join("root/run/a.npy")).unwrap();
    assert_eq!(landed, fs::read(temp.path().join("large/b.npy")).unwrap());
}

#[test]
fn a_dry_run_knows_what_stands_there_already() {
    let temp = TempDir::new().unwrap();
    make_small(temp.path());
    // Younger files could change without showing it, so nothing would be known of them.
    std::thread::sleep(std::time::Duration::from_millis(2100));
    let serving = Serving::start(temp.path());
    for dest in [serving.dest(), "out/run".to_owned()] {
        succeed(temp.path(), &["push", "model", &dest]);
        let left = |more: &[&str]| {
            let words = [&["push", "-n", "model", &dest], more].concat();
            let left = only(&succeed(temp.path(), &words), "left");
            (left["left_bytes"].clone(), left["unchanged"].clone())
        };
        assert_eq!(left(&[]), (0.into(), true.into()), "{dest}");
        // Another shape of the same is another checkpoint.
        let other = left(&["--layout", "indexed"]);
        assert_eq!(other, (17.into(), false.into()), "{dest}");
        let other = left(&["--exclude", "b.*"]).1;
        assert_eq!(other, false, "{dest}");
    }
}

#[test]
fn a_dry_run_says_when_the_receiver_does_not_answer() {
    let temp = TempDir::new().unwrap();
    make_small(temp.path());
    let output = run(
        temp.path(),
        &[
            "push",
            "-n",
            "model",
            "ferry://127.0.0.1:1/run",
            "--format",
            "json",
        ],
    );
    assert!(output.status.success(), "{output:?}");
    let left = only(&events(&String::from_utf8(output.stdout).unwrap()), "left");
    assert_eq!(
        (&left["left_bytes"], &left["durable_bytes"]),
        (&17.into(), &Value::Null)
    );
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(stderr.contains("has already is not known"), "{stderr}");
}
