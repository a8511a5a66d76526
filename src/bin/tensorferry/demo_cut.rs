//! Connections that break: relays TCP connections and cuts them all at once.

use std::{
    io::{self, Read, Write},
    net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex, PoisonError},
    thread,
};

/// Bytes moved at once.
const BUFFER_BYTES: usize = 64 << 10;

/// The connections of a push, and how much they may still carry to the server.
#[derive(Debug)]
struct Relay {
    left_bytes: Mutex<u64>,
    sockets: Mutex<Vec<TcpStream>>,
}

/// Relays connections to `server` and cuts all of them after `limit` bytes towards
/// the server. Returns where to connect to.
///
/// Plain threads: the relay must not share the runtime whose tasks it disturbs.
pub(crate) fn start(server: SocketAddr, limit: u64) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let address = listener.local_addr()?;
    let relay = Arc::new(Relay {
        left_bytes: Mutex::new(limit),
        sockets: Mutex::default(),
    });
    thread::spawn(move || {
        while let Ok((client, _)) = listener.accept() {
            if !relay.may_pass() {
                break;
            }
            let relay = Arc::clone(&relay);
            thread::spawn(move || relay.serve(client, server));
        }
    });
    Ok(address)
}

impl Relay {
    fn may_pass(&self) -> bool {
        *self
            .left_bytes
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            > 0
    }

    fn serve(&self, client: TcpStream, server: SocketAddr) -> io::Result<()> {
        let server = TcpStream::connect(server)?;
        {
            let mut sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
            sockets.extend([client.try_clone()?, server.try_clone()?]);
        }
        let (mut answers_from, mut answers_to) = (server.try_clone()?, client.try_clone()?);
        let back = thread::spawn(move || {
            let _ = io::copy(&mut answers_from, &mut answers_to);
            let _ = answers_to.shutdown(Shutdown::Both);
        });
        let result = self.forward(client, server);
        let _ = back.join();
        result
    }

    /// Copies until the end, an error or the limit.
    fn forward(&self, mut from: TcpStream, mut to: TcpStream) -> io::Result<()> {
        let mut buf = vec![0; BUFFER_BYTES];
        loop {
            let got = from.read(&mut buf)?;
            if got == 0 {
                return to.shutdown(Shutdown::Write);
            }
            let pass = {
                let mut left = self
                    .left_bytes
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner);
                let pass = got.min(usize::try_from(*left).unwrap_or(usize::MAX));
                *left -= pass as u64;
                pass
            };
            to.write_all(&buf[..pass])?;
            if !self.may_pass() {
                self.cut();
                return Ok(());
            }
        }
    }

    fn cut(&self) {
        let sockets = self.sockets.lock().unwrap_or_else(PoisonError::into_inner);
        for socket in sockets.iter() {
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}
