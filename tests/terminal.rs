//! Row H27: nothing that a peer or a file says reaches a terminal, a log or an error
//! as it is.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper of a test may panic"
)]

mod common;

use common::*;
use std::{
    io::{BufRead, BufReader, Read},
    net::SocketAddr,
    path::Path,
    pin::Pin,
    process::{Command, Stdio},
};
use tensorferry::{
    Client,
    plan::is_odd,
    wire::pb::{
        self,
        ferry_server::{Ferry, FerryServer},
    },
};
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt};

/// Clears the screen, forges a line, sets a colour by one character, turns the text.
const EVIL: &str = "a\u{1b}[2J\r\nerror: all is lost\u{9b}31m\u{202e}gpj.\u{2066}\u{7f}\u{200b}z";

/// A server that says only this.
struct EvilServer;

type Frames<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

fn evil_status() -> Status {
    let details = ErrorDetails::with_error_info("EXISTS", "tensorferry", []);
    Status::with_error_details(Code::AlreadyExists, EVIL.repeat(100), details)
}

#[tonic::async_trait]
impl Ferry for EvilServer {
    type PushStream = Frames<pb::ReceiverFrame>;
    type PullStream = Frames<pb::SenderFrame>;

    async fn push(
        &self,
        _: Request<Streaming<pb::SenderFrame>>,
    ) -> Result<Response<Self::PushStream>, Status> {
        let abort = pb::Abort {
            reason: "EXISTS".to_owned(),
            message: EVIL.repeat(1000),
        };
        let frame = pb::ReceiverFrame {
            control: Some(pb::receiver_frame::Control::Abort(abort)),
            ..Default::default()
        };
        Ok(Response::new(Box::pin(tokio_stream::iter([Ok(frame)]))))
    }

    async fn pull(
        &self,
        _: Request<Streaming<pb::ReceiverFrame>>,
    ) -> Result<Response<Self::PullStream>, Status> {
        Err(evil_status())
    }

    async fn list(
        &self,
        _: Request<pb::ListRequest>,
    ) -> Result<Response<pb::ListResponse>, Status> {
        let row = pb::CheckpointSummary {
            name: EVIL.repeat(100),
            published: true,
            ..Default::default()
        };
        Ok(Response::new(pb::ListResponse {
            checkpoints: vec![row],
            next_page_token: String::new(),
        }))
    }

    async fn describe(
        &self,
        _: Request<pb::DescribeRequest>,
    ) -> Result<Response<pb::DescribeResponse>, Status> {
        Err(evil_status())
    }

    async fn status(
        &self,
        _: Request<pb::StatusRequest>,
    ) -> Result<Response<pb::StatusResponse>, Status> {
        Err(evil_status())
    }

    async fn discard(
        &self,
        _: Request<pb::DiscardRequest>,
    ) -> Result<Response<pb::DiscardResponse>, Status> {
        Err(evil_status())
    }
}

async fn evil_server() -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let incoming = tonic::transport::server::TcpIncoming::from(listener);
    let serving = tonic::transport::Server::builder()
        .add_service(FerryServer::new(EvilServer))
        .serve_with_incoming(incoming);
    tokio::spawn(serving);
    address
}

/// Runs the program and returns what it printed on both outputs.
fn run(args: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tensorferry"));
    command.args(args).env("RUST_LOG", "tensorferry=debug");
    let output = tokio::task::block_in_place(|| command.output()).unwrap();
    let (out, err) = (output.stdout, output.stderr);
    String::from_utf8([out, err].concat()).unwrap()
}

fn assert_harmless(text: &str, what: &str) {
    let odd = text.chars().find(|&c| is_odd(c) && c != '\n');
    assert_eq!(odd, None, "{what}: {text:?}");
    let forged = text.lines().find(|l| l.starts_with("error: all is lost"));
    assert_eq!(forged, None, "{what}: {text:?}");
}

fn source(folder: &Path) -> String {
    let header = tensorferry::format::npy::encode_header("|u1", false, &[3]);
    std::fs::write(folder.join("a.npy"), [&header[..], b"abc"].concat()).unwrap();
    folder.to_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h27_what_a_server_says_is_shown_harmlessly() {
    let temp = tempfile::tempdir().unwrap();
    let address = evil_server().await;
    let (there, name) = (format!("{address}:"), format!("ferry://{address}/run7"));
    let there = format!("ferry://{}", there.trim_end_matches(':'));
    let source = source(temp.path());
    for format in ["human", "json", "quiet"] {
        for args in [
            vec!["list", &there],
            vec!["discard", &name],
            vec!["push", &source, &name, "--retries", "0"],
        ] {
            let text = run(&[&args[..], &["--format", format]].concat());
            assert_harmless(&text, &format!("{args:?} {format}"));
            // It was told, not left out.
            assert!(text.contains("all is lost"), "{args:?} {format}: {text:?}");
        }
    }
    let human = run(&["list", &there]);
    assert!(human.lines().all(|line| line.len() < 400), "{human:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h27_errors_of_the_library_are_harmless_and_short() {
    let address = evil_server().await;
    let client = Client::new(&address.to_string()).unwrap();
    let name = "run7".parse().unwrap();
    for error in [
        client.discard(&name).await.unwrap_err(),
        client.describe(&name).await.unwrap_err(),
    ] {
        let text = error.to_string();
        assert_harmless(&text, "error");
        assert!(text.contains("all is lost") && text.len() <= 1100, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h27_what_a_file_says_is_shown_harmlessly() {
    let temp = tempfile::tempdir().unwrap();
    let key = serde_json::to_string(&EVIL.repeat(20)).unwrap();
    let good = format!(r#"{{{key}:{{"dtype":"U8","shape":[3],"data_offsets":[0,3]}}}}"#);
    let bad = format!(r#"{{{key}:{{"dtype":{key},"shape":[3],"data_offsets":[0,3]}}}}"#);
    for (header, file) in [(good, "good.safetensors"), (bad, "bad.safetensors")] {
        let path = temp.path().join(file);
        let len = (header.len() as u64).to_le_bytes();
        std::fs::write(&path, [&len[..], header.as_bytes(), b"abc"].concat()).unwrap();
        let path = path.to_str().unwrap();
        for format in ["human", "json", "quiet"] {
            let text = run(&["inspect", path, "--format", format]);
            assert_harmless(&text, format);
            assert!(text.contains("all is lost"), "{format}: {text:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn h27_what_a_sender_says_is_logged_harmlessly() {
    let temp = tempfile::tempdir().unwrap();
    let mut serving = Command::new(env!("CARGO_BIN_EXE_tensorferry"))
        .args(["serve", temp.path().to_str().unwrap(), "-v"])
        .args(["--listen", "127.0.0.1:0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(serving.stdout.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    let address = line.strip_prefix("listening on ").unwrap().parse().unwrap();

    let load = Load::of(vec![tensor(EVIL, 100)]);
    let say = async |frames: Vec<pb::SenderFrame>| {
        let mut channel = raw::connect(address).await;
        let mut call = raw::RawCall::begin(&mut channel, None).await;
        frames.iter().for_each(|f| call.send(raw::message(f)));
        call.end().await.unwrap_err();
    };
    let mut abort = frame_abort(EVIL);
    if let Some(pb::sender_frame::Control::Abort(abort)) = &mut abort.control {
        abort.message = EVIL.repeat(1000);
    }
    let open = frame_open(load.open("victim", [1; 16]));
    say(vec![open.clone(), abort]).await;
    // Twice the same name, a wrong shape, a name that is none.
    let mut announcement = load.announcement();
    announcement.entries.push(pb::Entry {
        index: 1,
        ..announcement.entries[0].clone()
    });
    say(vec![open.clone(), announcement]).await;
    let mut announcement = load.announcement();
    announcement.entries[0].dtype = EVIL.to_owned();
    say(vec![open, announcement]).await;
    say(vec![frame_open(load.open(EVIL, [1; 16]))]).await;

    serving.kill().unwrap();
    let mut log = String::new();
    let stderr = serving.stderr.as_mut().unwrap();
    stderr.read_to_string(&mut log).unwrap();
    serving.wait().unwrap();
    assert_harmless(&log, "log");
    assert_eq!(log.matches("a session ended early").count(), 4, "{log}");
    assert!(log.lines().all(|line| line.len() < 1500), "{log}");
}
