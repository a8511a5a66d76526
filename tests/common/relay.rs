//! A relay between client and server that fails its first connections.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

/// What happens to the first connections after their share of bytes to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Nothing more gets through, and neither side is told.
    Stall,
    /// They are closed in both directions.
    Cut,
}

/// Relays every connection to `server`. Those made before `limit` bytes went there share
/// these, for any lane may carry any chunk; later ones are free. Plain threads, so that
/// tests with and without a runtime can use it.
pub(crate) fn start(server: SocketAddr, limit: usize, then: Then) -> SocketAddr {
    relay(server, limit, then, false)
}

/// The same for bytes that come from the server.
#[allow(dead_code, reason = "shared by test crates")]
pub(crate) fn start_back(server: SocketAddr, limit: usize, then: Then) -> SocketAddr {
    relay(server, limit, then, true)
}

fn relay(server: SocketAddr, limit: usize, then: Then, back: bool) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let left = Arc::new(AtomicUsize::new(limit));
    thread::spawn(move || {
        for near in listener.incoming() {
            let near = near.unwrap();
            // The server may be away; whoever connects learns that at once.
            let Ok(far) = TcpStream::connect(server) else {
                continue;
            };
            let (from, to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            let limit = (left.load(Ordering::Relaxed) > 0).then(|| Arc::clone(&left));
            let (there, here) = if back { (None, limit) } else { (limit, None) };
            thread::spawn(move || pass(from, to, here, then));
            thread::spawn(move || pass(near, far, there, then));
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, limit: Option<Arc<AtomicUsize>>, then: Then) {
    let mut buf = vec![0; 64 << 10];
    loop {
        let got = from.read(&mut buf).unwrap_or(0);
        let (passed, left) = limit.as_ref().map_or((got, 1), |left| take(left, got));
        let is_over = got == 0 || (left == 0 && then == Then::Cut);
        if to.write_all(&buf[..passed]).is_err() || is_over {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}

/// Takes up to `wanted` bytes out of what is left. Returns both.
fn take(left: &AtomicUsize, wanted: usize) -> (usize, usize) {
    let mut now = left.load(Ordering::Relaxed);
    loop {
        let taken = now.min(wanted);
        match left.compare_exchange(now, now - taken, Ordering::Relaxed, Ordering::Relaxed) {
            Ok(_) => return (taken, now - taken),
            Err(other) => now = other,
        }
    }
}
