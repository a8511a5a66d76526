//! However a source is read, the same lands; and a source that is cut is an error.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "helpers of tests may panic"
)]

use std::{
    fs::OpenOptions,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use tensorferry::format::npy::encode_header;

const SOURCE_BYTES: usize = 24 << 20;

fn write_source(dir: &Path) -> PathBuf {
    let mut bytes = encode_header("|u1", false, &[SOURCE_BYTES as u64]);
    let start = bytes.len();
    bytes.resize(start + SOURCE_BYTES, 0);
    blake3::Hasher::new()
        .finalize_xof()
        .fill(&mut bytes[start..]);
    let path = dir.join("w.npy");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn push(dir: &Path, words: &[&str]) -> Child {
    Command::new(env!("CARGO_BIN_EXE_tensorferry"))
        .current_dir(dir)
        .env_remove("TENSORFERRY_READ")
        .args(["push", "w.npy", "out/landed", "--codec", "none"])
        .args(words)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn the_same_lands_however_the_source_is_read() {
    for mode in ["map", "pread", "auto"] {
        let temp = tempfile::tempdir().unwrap();
        let source = write_source(temp.path());
        let output = push(temp.path(), &["--read", mode])
            .wait_with_output()
            .unwrap();
        assert!(output.status.success(), "{mode}: {output:?}");
        let landed = temp.path().join("out/landed/w.npy");
        assert!(
            std::fs::read(source).unwrap() == std::fs::read(landed).unwrap(),
            "{mode}"
        );
    }
}

/// A map of a file that is cut raises SIGBUS where it is touched and fails writes out of
/// it: neither may end the program otherwise than with the source's own status.
#[test]
fn a_source_cut_under_a_push_is_an_error_and_no_signal() {
    for mode in ["map", "pread"] {
        let temp = tempfile::tempdir().unwrap();
        let source = write_source(temp.path());
        // Slow enough to be cut in the middle: some of it is read ahead, some is not.
        let child = push(
            temp.path(),
            &["--read", mode, "--bwlimit", "8M", "--budget", "8M"],
        );
        let staging = temp.path().join("out/.tensorferry/transfers");
        let until = Instant::now() + Duration::from_secs(60);
        while !staging.exists() {
            assert!(Instant::now() < until, "the push did not begin");
            std::thread::sleep(Duration::from_millis(10));
        }
        std::thread::sleep(Duration::from_millis(500));
        let file = OpenOptions::new().write(true).open(&source).unwrap();
        file.set_len(4096).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(output.status.code(), Some(24), "{mode}: {output:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(said.contains("w.npy"), "{mode}: {said}");
        assert!(
            !temp
                .path()
                .join("out/landed")
                .join("manifest.json")
                .exists()
        );
    }
}
