//! Takes connections: so many in all, so many from one address, and only from
//! peers that say at once that they speak HTTP/2.
//!
//! Until it has said so a connection is a stranger. There may be a fixed number of
//! strangers, and the oldest goes when one too many comes: who connects and stays
//! silent keeps nobody else out, for an honest client speaks as soon as it is
//! connected.

use crate::{loopback::unpace, wire::FileStream};
use std::{
    collections::{HashMap, VecDeque},
    io,
    net::{IpAddr, Ipv6Addr},
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll, ready},
    time::Duration,
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    task::{AbortHandle, JoinSet},
    time::{Sleep, sleep, timeout},
};
use tokio_stream::Stream;
use tonic::transport::server::{Connected, TcpConnectInfo};

/// The first bytes of every HTTP/2 client (RFC 9113, section 3.4).
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// A stranger has this long to say them.
const PREFACE_TIMEOUT: Duration = Duration::from_secs(5);
/// Strangers at a time.
const MAX_STRANGERS: usize = 256;
/// Pause after a failed accept: out of descriptors, for example.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Connections that have introduced themselves, as a stream for the HTTP server.
#[derive(Debug)]
pub(super) struct Incoming {
    listener: TcpListener,
    strangers: JoinSet<Option<(TcpStream, IpAddr)>>,
    oldest_first: VecDeque<AbortHandle>,
    open: Arc<Open>,
    pause: Option<Pin<Box<Sleep>>>,
}

impl Incoming {
    /// At most `max_connections` at a time, half of them from one address.
    pub(super) fn new(listener: TcpListener, max_connections: usize) -> Self {
        Incoming {
            listener,
            strangers: JoinSet::new(),
            oldest_first: VecDeque::new(),
            open: Open::new(max_connections),
            pause: None,
        }
    }

    fn greet(&mut self, stream: TcpStream, address: IpAddr) {
        self.oldest_first.retain(|task| !task.is_finished());
        if self.oldest_first.len() >= MAX_STRANGERS
            && let Some(oldest) = self.oldest_first.pop_front()
        {
            oldest.abort();
        }
        let task = self.strangers.spawn(introduce(stream, address));
        self.oldest_first.push_back(task);
    }
}

/// Resolves to the connection once its peer has sent the preface, else to nothing.
async fn introduce(mut stream: TcpStream, address: IpAddr) -> Option<(TcpStream, IpAddr)> {
    let mut said = [0; PREFACE.len()];
    let read = timeout(PREFACE_TIMEOUT, stream.read_exact(&mut said)).await;
    if !matches!(read, Ok(Ok(_))) || said != *PREFACE {
        tracing::debug!(%address, "a connection did not begin as HTTP/2");
        return None;
    }
    // Without it small answers would wait for the peer's acknowledgement.
    stream.set_nodelay(true).ok()?;
    unpace(&stream);
    Some((stream, address))
}

impl Stream for Incoming {
    type Item = io::Result<Connection>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let this = self.get_mut();
        loop {
            match this.strangers.poll_join_next(cx) {
                Poll::Ready(Some(Ok(Some((stream, address))))) => {
                    match Open::enter(&this.open, share_of(address)) {
                        Some(place) => {
                            return Poll::Ready(Some(Ok(Connection {
                                stream: FileStream::new(stream),
                                unread: PREFACE,
                                _place: place,
                            })));
                        }
                        None => tracing::debug!(%address, "a connection too many was closed"),
                    }
                    continue;
                }
                Poll::Ready(Some(_)) => continue,
                Poll::Ready(None) | Poll::Pending => {}
            }
            if let Some(pause) = &mut this.pause {
                ready!(pause.as_mut().poll(cx));
                this.pause = None;
            }
            match ready!(this.listener.poll_accept(cx)) {
                Ok((stream, peer)) => this.greet(stream, peer.ip()),
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be taken");
                    this.pause = Some(Box::pin(sleep(ACCEPT_PAUSE)));
                }
            }
        }
    }
}

/// What counts as one address: whoever has one IPv6 address has 2^64 of them.
fn share_of(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => IpAddr::V6(Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64)),
        v4 => v4,
    }
}

/// How many connections are open.
#[derive(Debug)]
struct Open {
    max: usize,
    max_of_one: usize,
    by_address: Mutex<HashMap<IpAddr, usize>>,
}

/// The place of one connection among them; dropping it frees it.
#[derive(Debug)]
struct Place {
    open: Arc<Open>,
    address: IpAddr,
}

impl Open {
    fn new(max: usize) -> Arc<Open> {
        Arc::new(Open {
            max,
            max_of_one: max.div_ceil(2),
            by_address: Mutex::default(),
        })
    }

    fn enter(open: &Arc<Open>, address: IpAddr) -> Option<Place> {
        let mut by_address = open
            .by_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let total: usize = by_address.values().sum();
        let own = by_address.entry(address).or_default();
        if total >= open.max || *own >= open.max_of_one {
            if *own == 0 {
                by_address.remove(&address);
            }
            return None;
        }
        *own += 1;
        let open = Arc::clone(open);
        Some(Place { open, address })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut by_address = self
            .open
            .by_address
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(own) = by_address.get_mut(&self.address) {
            *own -= 1;
            if *own == 0 {
                by_address.remove(&self.address);
            }
        }
    }
}

/// A connection whose preface was read, and is read again by the HTTP server.
#[derive(Debug)]
pub(super) struct Connection {
    /// What a pull sends out of maps of files need not be copied.
    stream: FileStream,
    unread: &'static [u8],
    _place: Place,
}

impl Connected for Connection {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.tcp().connect_info()
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.unread.is_empty() {
            return Pin::new(&mut self.stream).poll_read(cx, buf);
        }
        let (now, later) = self.unread.split_at(self.unread.len().min(buf.remaining()));
        buf.put_slice(now);
        self.unread = later;
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, parts)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_address_gets_half_and_gives_back_what_it_leaves() {
        let open = Open::new(4);
        let [a, b, c] = ["10.0.0.1", "10.0.0.2", "10.0.0.3"].map(|a| a.parse().unwrap());
        let first = Open::enter(&open, a).unwrap();
        let _second = Open::enter(&open, a).unwrap();
        assert!(Open::enter(&open, a).is_none());
        let _third = Open::enter(&open, b).unwrap();
        let _fourth = Open::enter(&open, b).unwrap();
        assert!(Open::enter(&open, c).is_none());
        drop(first);
        let fifth = Open::enter(&open, c).unwrap();
        assert!(Open::enter(&open, a).is_none());
        drop(fifth);
        assert_eq!(open.by_address.lock().unwrap().len(), 2);
    }

    #[test]
    fn a_network_of_ipv6_is_one_address_and_a_mapped_ipv4_is_itself() {
        let share = |text: &str| share_of(text.parse().unwrap());
        assert_eq!(share("2001:db8::1"), share("2001:db8::ffff:1"));
        assert_ne!(share("2001:db8::1"), share("2001:db8:0:1::1"));
        assert_eq!(share("::ffff:10.0.0.1"), share("10.0.0.1"));
        assert_ne!(share("10.0.0.1"), share("10.0.0.2"));
    }
}
