//! A connection that breaks: relays one TCP connection and cuts it.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    thread,
};

/// Bytes moved at once.
const BUFFER_BYTES: usize = 64 << 10;

/// Relays the first connection it gets to `server` and cuts both directions after
/// `limit` bytes towards the server. Returns where to connect to.
///
/// Plain threads: the relay must not share the runtime whose tasks it disturbs.
pub(crate) fn start(server: SocketAddr, limit: u64) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    thread::spawn(move || relay_one(&listener, server, limit));
    Ok(address)
}

fn relay_one(listener: &TcpListener, server: SocketAddr, limit: u64) -> io::Result<()> {
    let (client, _) = listener.accept()?;
    let server = TcpStream::connect(server)?;
    let (answers_from, answers_to) = (server.try_clone()?, client.try_clone()?);
    let back = thread::spawn(move || relay(answers_from, answers_to, u64::MAX));
    let result = relay(client, server, limit);
    let _ = back.join();
    result
}

/// Copies until the end, an error or the limit, and closes both.
fn relay(mut from: TcpStream, mut to: TcpStream, limit: u64) -> io::Result<()> {
    let mut buf = vec![0; BUFFER_BYTES];
    let mut left = limit;
    let result = loop {
        let got = match from.read(&mut buf) {
            Ok(0) => break Ok(()),
            Ok(got) => got.min(usize::try_from(left).unwrap_or(usize::MAX)),
            Err(error) => break Err(error),
        };
        if let Err(error) = to.write_all(&buf[..got]) {
            break Err(error);
        }
        left -= got as u64;
        if left == 0 {
            break Ok(());
        }
    };
    let _ = (from.shutdown(Shutdown::Both), to.shutdown(Shutdown::Both));
    result
}
