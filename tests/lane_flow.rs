//! How a push shares its work among lanes that are not alike, how many it takes, and
//! how fast it may be.

#![expect(clippy::unwrap_used, reason = "a test stops at the first surprise")]

mod common;

use common::{product::*, *};
use std::{
    future::IntoFuture,
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};
use tensorferry::{
    Client, Lanes, RateLimit,
    format::{codec::CodecChoice, npy::encode_header},
    source::{SourceOptions, SourceSet},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpSocket, TcpStream},
    time::sleep_until,
};

const MIB: u64 = 1 << 20;
/// What a socket of the relay holds: little, so that the rate is felt at once.
const SOCKET_BYTES: u32 = 128 << 10;

/// A clock of bytes: who has sent so many waits until they have had their time.
#[derive(Debug)]
struct Pipe {
    bytes_per_second: u64,
    free_at: Mutex<tokio::time::Instant>,
}

impl Pipe {
    fn new(bytes_per_second: u64) -> Arc<Pipe> {
        Arc::new(Pipe {
            bytes_per_second,
            free_at: Mutex::new(tokio::time::Instant::now()),
        })
    }

    async fn pass(&self, bytes: usize) {
        let time = Duration::from_secs_f64(bytes as f64 / self.bytes_per_second as f64);
        let until = {
            let mut free_at = self.free_at.lock().unwrap();
            *free_at = (*free_at).max(tokio::time::Instant::now()) + time;
            *free_at
        };
        sleep_until(until).await;
    }
}

/// Relays connections, each through the pipe that it is given by its number. Bytes of
/// the client by connection.
async fn relay(
    server: SocketAddr,
    pipe_of: impl Fn(usize) -> Arc<Pipe> + Send + 'static,
) -> (SocketAddr, Arc<Mutex<Vec<u64>>>) {
    let socket = TcpSocket::new_v4().unwrap();
    socket.set_recv_buffer_size(SOCKET_BYTES).unwrap();
    socket.bind(([127, 0, 0, 1], 0).into()).unwrap();
    let listener: TcpListener = socket.listen(64).unwrap();
    let address = listener.local_addr().unwrap();
    let by_connection = Arc::new(Mutex::new(Vec::new()));
    let all = Arc::clone(&by_connection);
    tokio::spawn(async move {
        while let Ok((client, _)) = listener.accept().await {
            let number = {
                let mut all = all.lock().unwrap();
                all.push(0);
                all.len() - 1
            };
            let (pipe, all) = (pipe_of(number), Arc::clone(&all));
            tokio::spawn(async move {
                let server = TcpStream::connect(server).await.unwrap();
                let (mut from_client, mut to_client) = client.into_split();
                let (mut from_server, mut to_server) = server.into_split();
                let back = tokio::spawn(async move {
                    let _ = tokio::io::copy(&mut from_server, &mut to_client).await;
                });
                let mut buf = vec![0; 32 << 10];
                while let Ok(n @ 1..) = from_client.read(&mut buf).await {
                    pipe.pass(n).await;
                    all.lock().unwrap()[number] += n as u64;
                    if to_server.write_all(&buf[..n]).await.is_err() {
                        break;
                    }
                }
                back.abort();
            });
        }
    });
    (address, by_connection)
}

fn noise_source(dir: &Path, len: u64) -> Arc<SourceSet> {
    std::fs::create_dir_all(dir).unwrap();
    let header = encode_header("|u1", false, &[len]);
    let bytes = [header, noise("flow", len as usize)].concat();
    std::fs::write(dir.join("noise.npy"), bytes).unwrap();
    Arc::new(SourceSet::open(&[dir.to_owned()], &SourceOptions::default()).unwrap())
}

/// Pushes so many bytes through such a relay; bytes of each connection.
async fn push_through(
    lanes: Lanes,
    len: u64,
    pipe_of: impl Fn(usize) -> Arc<Pipe> + Send + 'static,
) -> Vec<u64> {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let (relay, by_connection) = relay(server.address, pipe_of).await;
    let source = noise_source(&temp.path().join("source"), len);
    let options = options(|o| {
        (o.lanes, o.codec) = (lanes, CodecChoice::None);
        o.chunk_len = Some(256 << 10);
    });
    let client = Client::new(&relay.to_string()).unwrap();
    let push = client.push(Arc::clone(&source), &name("model"), options);
    let report = tokio::time::timeout(HANG, push).await.unwrap().unwrap();
    assert_eq!(report.wire_bytes, len);
    server.assert_landed("model", &Load::of_source(&source));
    std::mem::take(&mut by_connection.lock().unwrap())
}

#[tokio::test]
async fn a_lane_at_a_tenth_gets_its_share_of_the_work_and_no_more() {
    for slow in [0, 1] {
        let len = 48 * MIB;
        let bytes = push_through(Lanes::Fixed(2), len, move |number| {
            Pipe::new(if number == slow { 2 * MIB } else { 20 * MIB })
        })
        .await;
        // One part of eleven, and what was learnt from.
        assert!(
            bytes[slow] >= len / 40 && bytes[slow] <= len / 5,
            "{bytes:?}"
        );
    }
}

#[tokio::test]
async fn where_every_connection_has_a_limit_auto_takes_more_of_them() {
    let len = 80 * MIB;
    let bytes = push_through(Lanes::Auto, len, |_| Pipe::new(5 * MIB)).await;
    assert!(bytes.len() > 2, "{bytes:?}");
    // The third was not only tried.
    assert!(bytes[2] >= 8 * MIB, "{bytes:?}");
}

#[tokio::test]
async fn where_all_share_one_limit_auto_does_not_run_away() {
    let shared = Pipe::new(10 * MIB);
    let bytes = push_through(Lanes::Auto, 80 * MIB, move |_| Arc::clone(&shared)).await;
    assert!(bytes.len() <= 3, "{bytes:?}");
}

#[tokio::test]
async fn a_push_is_never_faster_than_its_rate() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let (len, rate, chunk_len) = (12 * MIB, 8 * MIB, 256 << 10);
    let source = noise_source(&temp.path().join("source"), len);
    let options = options(|o| {
        o.codec = CodecChoice::None;
        o.chunk_len = Some(chunk_len);
        o.rate_limit = RateLimit::BytesPerSecond(rate);
    });
    let begun = Instant::now();
    let push = server.client().push(source, &name("model"), options);
    let report = tokio::time::timeout(HANG, push).await.unwrap().unwrap();
    // And it says that this was why, not the network.
    assert!(report.stages.is_rate_limited(), "{:?}", report.stages);
    // One chunk and a twentieth of a second go at once.
    let least = (len - u64::from(chunk_len)) as f64 / rate as f64 - 0.05;
    let seconds = begun.elapsed().as_secs_f64();
    assert!(seconds >= least, "{seconds} s");
}

#[tokio::test]
async fn the_rate_of_a_file_is_read_again_and_a_bad_file_keeps_the_last() {
    let temp = tempfile::tempdir().unwrap();
    let server = TestServer::start(&temp.path().join("root")).await;
    let source = noise_source(&temp.path().join("source"), 32 * MIB);
    let file = temp.path().join("rate");
    let options = options(|o| o.rate_limit = RateLimit::File(file.clone()));
    let client = server.client();
    // Without a rate to begin with it does not begin.
    let error = client
        .push(Arc::clone(&source), &name("model"), options.clone())
        .await
        .unwrap_err();
    assert!(error.to_string().contains("rate"), "{error}");
    std::fs::write(&file, "256K\n").unwrap();
    let push = client.push(source, &name("model"), options);
    let watcher = push.watcher();
    let pushing = tokio::spawn(push.into_future());
    while watcher.progress().wire_bytes == 0 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    for bad in [Some("a lot"), None] {
        match bad {
            Some(text) => std::fs::write(&file, text).unwrap(),
            None => std::fs::remove_file(&file).unwrap(),
        }
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let progress = watcher.progress();
        assert!(
            !pushing.is_finished(),
            "a bad file lifted the limit: {progress:?}"
        );
    }
    // Some three seconds at that rate, on a busy machine more, and what may go at once.
    let sent = watcher.progress().wire_bytes;
    assert!(sent <= 8 * MIB, "{sent}");
    std::fs::write(&file, "off").unwrap();
    let ended = tokio::time::timeout(HANG, pushing).await;
    assert_eq!(ended.unwrap().unwrap().unwrap().bytes, 32 * MIB);
}

/// The program refuses before it contacts anybody; what it says on standard error.
fn refused(words: &[&str]) -> String {
    let temp = tempfile::tempdir().unwrap();
    let source = temp.path().join("w.npy");
    std::fs::write(&source, encode_header("|u1", false, &[0])).unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_tensorferry"))
        .args(words)
        .current_dir(temp.path())
        .env_remove("TENSORFERRY_LANES")
        .env_remove("TENSORFERRY_CHUNK")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2), "{words:?}: {output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn memory_that_does_not_hold_the_lanes_is_wrong_usage_and_says_what_to_change() {
    let target = "ferry://127.0.0.1:1/model";
    let error = refused(&["push", "w.npy", target, "--lanes", "9", "--budget", "16M"]);
    assert!(
        error.contains("16777216") && error.contains("18874368"),
        "{error}"
    );
    assert!(error.contains("raise the budget"), "{error}");
    let longer = [
        "push", "w.npy", target, "--lanes", "4", "--budget", "16M", "--chunk", "8M",
    ];
    assert!(refused(&longer).contains("67108864"));
    let error = refused(&["serve", "root", "--listen", "127.0.0.1:0", "--budget", "7M"]);
    assert!(
        error.contains("7340032") && error.contains("8388608"),
        "{error}"
    );
}

#[test]
fn lanes_and_rates_that_make_no_sense_are_wrong_usage() {
    let target = "ferry://127.0.0.1:1/model";
    for flag in [
        "--lanes=0",
        "--lanes=17",
        "--lanes=many",
        "--bwlimit=fast",
        "--bwlimit=1K",
        "--bwlimit=@",
    ] {
        refused(&["push", "w.npy", target, flag]);
    }
    // A file of which no rate is known yet.
    let error = refused(&["push", "w.npy", target, "--bwlimit=@nowhere"]);
    assert!(error.contains("nowhere"), "{error}");
}
