//! A network between client and server that can be bad in several ways.

use crate::dice::Dice;
use std::{
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{mpsc, watch},
};

/// Bytes under way in one direction of one connection.
const PIECES: usize = 256;

/// What the network does to bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Weather {
    /// One way.
    pub(crate) delay: Duration,
    /// At most this much more, drawn for each piece; order is kept.
    pub(crate) jitter: Duration,
    /// This bit of this byte towards the server arrives wrong, once for each connection.
    pub(crate) flip: Option<(u64, u8)>,
}

/// Forwards every connection.
pub(crate) struct Relay {
    pub(crate) address: SocketAddr,
    cut: watch::Sender<u64>,
    silent: Arc<AtomicBool>,
    passed: Arc<AtomicU64>,
    accepted: Arc<AtomicU64>,
}

impl Relay {
    pub(crate) async fn start(server: SocketAddr, weather: Weather) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("it is bound");
        let (cut, cuts) = watch::channel(0);
        let silent = Arc::new(AtomicBool::new(false));
        let passed = Arc::new(AtomicU64::new(0));
        let accepted = Arc::new(AtomicU64::new(0));
        let (quiet, count) = (Arc::clone(&silent), Arc::clone(&passed));
        let dials = Arc::clone(&accepted);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                dials.fetch_add(1, Ordering::Relaxed);
                let (quiet, count, mut cuts) = (quiet.clone(), count.clone(), cuts.clone());
                cuts.mark_unchanged();
                tokio::spawn(async move {
                    if quiet.load(Ordering::Relaxed) {
                        let _held = near;
                        return std::future::pending().await;
                    }
                    let Ok(far) = TcpStream::connect(server).await else {
                        return;
                    };
                    for stream in [&near, &far] {
                        let _ = stream.set_zero_linger();
                        let _ = stream.set_nodelay(true);
                    }
                    let (near_in, near_out) = near.into_split();
                    let (far_in, far_out) = far.into_split();
                    let dice = Dice::new(address.port().into());
                    let back = Weather {
                        flip: None,
                        ..weather
                    };
                    let uncounted = AtomicU64::new(0);
                    tokio::select! {
                        () = pass(near_in, far_out, weather, &quiet, &count, dice.clone()) => {}
                        () = pass(far_in, near_out, back, &quiet, &uncounted, dice) => {}
                        _ = cuts.changed() => {}
                    }
                });
            }
        });
        Relay {
            address,
            cut,
            silent,
            passed,
            accepted,
        }
    }

    pub(crate) fn start_on(handle: &Handle, server: SocketAddr, weather: Weather) -> Relay {
        handle.block_on(Relay::start(server, weather))
    }

    /// Resets every connection.
    pub(crate) fn cut(&self) {
        self.cut.send_modify(|n| *n += 1);
    }

    /// Nothing gets through any more, and nobody is told.
    pub(crate) fn fall_silent(&self) {
        self.silent.store(true, Ordering::Relaxed);
    }

    /// Connections so far: who dials again has given up the one before.
    pub(crate) fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
    }

    /// Bytes that went to the server.
    pub(crate) fn passed(&self) -> u64 {
        self.passed.load(Ordering::Relaxed)
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    weather: Weather,
    silent: &AtomicBool,
    passed: &AtomicU64,
    dice: Dice,
) {
    let (pieces_in, mut pieces) = mpsc::channel::<(Instant, Vec<u8>)>(PIECES);
    let dice = Mutex::new(dice);
    // Ends with its half of the queue, so that what is under way still arrives.
    let reading = async move {
        let (mut buf, mut seen) = (vec![0; 64 << 10], 0);
        loop {
            let n = from.read(&mut buf).await.unwrap_or(0);
            if n == 0 {
                return;
            }
            if let Some((at, bit)) = weather.flip
                && (seen..seen + n as u64).contains(&at)
            {
                buf[(at - seen) as usize] ^= 1 << bit;
            }
            seen += n as u64;
            let jitter = weather.jitter.as_micros() as u64;
            let extra = dice.lock().map_or(0, |mut d| d.below(jitter + 1));
            let due = Instant::now() + weather.delay + Duration::from_micros(extra);
            if pieces_in.send((due, buf[..n].to_vec())).await.is_err() {
                return;
            }
        }
    };
    let writing = async {
        while let Some((due, piece)) = pieces.recv().await {
            tokio::time::sleep_until(due.into()).await;
            if silent.load(Ordering::Relaxed) {
                std::future::pending::<()>().await;
            }
            if to.write_all(&piece).await.is_err() {
                return;
            }
            passed.fetch_add(piece.len() as u64, Ordering::Relaxed);
        }
    };
    tokio::join!(reading, writing);
}
