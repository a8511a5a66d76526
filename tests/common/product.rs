//! Pushes by the product's own client, from sources that are old enough to be
//! settled.

use super::{CHUNK, Load, Session, TestServer, frame_abort, manifest, noise};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::Duration,
};
use tensorferry::{
    Error, ErrorCode, PushOptions, TransferReport,
    format::{codec::CodecChoice, npy::encode_header},
    plan::CheckpointName,
    source::{SourceOptions, SourceSet},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};

pub(crate) const CELL: u64 = CHUNK as u64;
/// Cells of the tensor `a` of every source.
const A_CELLS: u64 = 4;

/// A source folder of its own for each test, old enough to be settled.
pub(crate) fn source_dir(promise: &str) -> PathBuf {
    static ALL: OnceLock<PathBuf> = OnceLock::new();
    let all = ALL.get_or_init(|| {
        let all = Path::new(env!("CARGO_TARGET_TMPDIR")).join("semantics");
        let _ = fs::remove_dir_all(&all);
        for number in 1..=21 {
            write_source(&all.join(format!("s{number:02}")));
        }
        std::thread::sleep(Duration::from_millis(2100));
        all
    });
    all.join(promise)
}

fn write_source(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let a = noise("a", CHUNK * (A_CELLS as usize - 1) + 400);
    fs::write(
        dir.join("a.npy"),
        [encode_header("<f4", false, &[a.len() as u64 / 4]), a].concat(),
    )
    .unwrap();
    fs::write(
        dir.join("b.npy"),
        [encode_header("|u1", false, &[20, 5]), noise("b", 100)].concat(),
    )
    .unwrap();
    fs::write(dir.join("config.json"), b"{\"layers\": 2}").unwrap();
}

pub(crate) fn open_source(dir: &Path) -> Arc<SourceSet> {
    Arc::new(SourceSet::open(&[dir.to_owned()], &SourceOptions::default()).unwrap())
}

pub(crate) fn name(text: &str) -> CheckpointName {
    text.parse().unwrap()
}

/// How tests push unless they say otherwise: as users do, or as the environment
/// says, so that the same claims are checked with several lanes and a codec.
pub(crate) fn defaults() -> PushOptions {
    let mut options = PushOptions::default();
    let wish = |name: &str| std::env::var(name).ok();
    if let Some(lanes) = wish("TENSORFERRY_LANES") {
        options.lanes = lanes.parse().unwrap();
    }
    options.codec = match wish("TENSORFERRY_CODEC").as_deref() {
        None | Some("auto") => CodecChoice::Auto,
        Some("none") => CodecChoice::None,
        Some("lz4") => CodecChoice::Lz4,
        Some(other) => panic!("no codec {other}"),
    };
    options
}

pub(crate) fn options(change: impl FnOnce(&mut PushOptions)) -> PushOptions {
    let mut options = defaults();
    change(&mut options);
    options
}

/// Pushes a source as `model`.
pub(crate) async fn push(
    server: &TestServer,
    dir: &Path,
    options: PushOptions,
) -> Result<TransferReport, Error> {
    server
        .client()
        .push(open_source(dir), &name("model"), options)
        .await
}

pub(crate) async fn push_plain(server: &TestServer, dir: &Path) -> TransferReport {
    push(server, dir, defaults()).await.unwrap()
}

/// The error's class and the exit code of the command line.
pub(crate) fn class(result: Result<TransferReport, Error>) -> (ErrorCode, u8) {
    let code = result.unwrap_err().code();
    (code, code.exit_code())
}

/// The identity that the client gives to a push of this source as `model`.
pub(crate) async fn transfer_id(server: &TestServer, dir: &Path) -> [u8; 16] {
    push_plain(server, dir).await;
    let folder = server.root.join("model");
    let hex = manifest(&folder)["transfer_id"]
        .as_str()
        .unwrap()
        .to_owned();
    fs::remove_dir_all(folder).unwrap();
    std::array::from_fn(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap())
}

/// A session of the push that has sent these cells of `a` and is still open.
pub(crate) async fn half_way(
    server: &TestServer,
    load: &Load,
    id: [u8; 16],
    cells: &[u64],
) -> Session {
    let mut session = server.open(load.open("model", id)).await;
    session.announce(load).await;
    for &cell in cells {
        session.send(load.chunk(0, cell)).await;
    }
    session.settle().await;
    session
}

/// The same, interrupted.
pub(crate) async fn leave(server: &TestServer, load: &Load, id: [u8; 16], cells: &[u64]) {
    let mut session = half_way(server, load, id, cells).await;
    session
        .refused(frame_abort("INTERRUPTED"))
        .await
        .unwrap_err();
}

pub(crate) fn assert_landed(server: &TestServer, dir: &Path) {
    server.assert_landed("model", &Load::of_source(&open_source(dir)));
}

/// Changes one byte of a cell of `a` in place.
pub(crate) fn change_source(dir: &Path, cell: u64) {
    let file = fs::File::options()
        .read(true)
        .write(true)
        .open(dir.join("a.npy"))
        .unwrap();
    let mut byte = [0];
    let offset = 128 + cell * CELL + 9;
    file.read_exact_at(&mut byte, offset).unwrap();
    file.write_all_at(&[byte[0] ^ 1], offset).unwrap();
}

/// Forwards one connection and flips one bit on the way to the server.
pub(crate) async fn damaging_relay(server: &TestServer, at: usize) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (address, target) = (listener.local_addr().unwrap(), server.address);
    tokio::spawn(async move {
        let (mut near, _) = listener.accept().await.unwrap();
        let mut far = TcpStream::connect(target).await.unwrap();
        let (mut near_in, mut near_out) = near.split();
        let (mut far_in, mut far_out) = far.split();
        let up = async {
            let (mut buf, mut seen) = (vec![0; 16 << 10], 0);
            loop {
                let n = near_in.read(&mut buf).await.unwrap_or(0);
                if n == 0 {
                    return;
                }
                if (seen..seen + n).contains(&at) {
                    buf[at - seen] ^= 1;
                }
                seen += n;
                if far_out.write_all(&buf[..n]).await.is_err() {
                    return;
                }
            }
        };
        tokio::join!(up, async {
            tokio::io::copy(&mut far_in, &mut near_out).await.ok()
        });
    });
    address
}
