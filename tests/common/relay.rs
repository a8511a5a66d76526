//! A relay between client and server that fails its first connection.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
};

/// What happens to the first connection after its share of bytes to the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Then {
    /// Nothing more gets through, and neither side is told.
    Stall,
    /// It is closed in both directions.
    Cut,
}

/// Relays every connection to `server`, the first for `limit` bytes only. Plain
/// threads, so that tests with and without a runtime can use it.
pub(crate) fn start(server: SocketAddr, limit: usize, then: Then) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    thread::spawn(move || {
        let mut limit = Some(limit);
        for near in listener.incoming() {
            let (near, far) = (near.unwrap(), TcpStream::connect(server).unwrap());
            let (from, to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
            thread::spawn(move || pass(from, to, None, then));
            let limit = limit.take();
            thread::spawn(move || pass(near, far, limit, then));
        }
    });
    address
}

fn pass(mut from: TcpStream, mut to: TcpStream, limit: Option<usize>, then: Then) {
    let (mut buf, mut left) = (vec![0; 64 << 10], limit.unwrap_or(usize::MAX));
    loop {
        let got = from.read(&mut buf).unwrap_or(0);
        let passed = got.min(left);
        left -= passed;
        let is_over = got == 0 || (left == 0 && then == Then::Cut);
        if to.write_all(&buf[..passed]).is_err() || is_over {
            break;
        }
    }
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
}
