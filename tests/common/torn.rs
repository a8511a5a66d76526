//! A connection that can be cut at any byte.

use std::net::SocketAddr;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::oneshot,
};

/// One connection to a server on the other side of a wire that tears.
pub(crate) struct Relay {
    /// Where to connect to.
    pub(crate) address: SocketAddr,
    cut: Option<oneshot::Sender<()>>,
}

impl Relay {
    /// Forwards one connection. It is reset after `max_bytes` towards the server.
    pub(crate) async fn start(server: SocketAddr, max_bytes: usize) -> Relay {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let (cut, cut_now) = oneshot::channel::<()>();
        tokio::spawn(async move {
            let Ok((near, _)) = listener.accept().await else {
                return;
            };
            let Ok(far) = TcpStream::connect(server).await else {
                return;
            };
            for stream in [&near, &far] {
                // Closing becomes a reset, as when a machine goes away.
                stream.set_zero_linger().unwrap();
            }
            let (mut near_in, mut near_out) = near.into_split();
            let (mut far_in, mut far_out) = far.into_split();
            let up = async {
                let (mut buf, mut left) = (vec![0; 64 << 10], max_bytes);
                while left > 0 {
                    let most = left.min(buf.len());
                    let n = near_in.read(&mut buf[..most]).await.unwrap_or(0);
                    if n == 0 || far_out.write_all(&buf[..n]).await.is_err() {
                        return;
                    }
                    left -= n;
                }
            };
            let down = async { tokio::io::copy(&mut far_in, &mut near_out).await.ok() };
            tokio::select! {
                () = up => {}
                _ = down => {}
                _ = cut_now => {}
            }
        });
        let cut = Some(cut);
        Relay { address, cut }
    }

    /// Resets the connection now.
    pub(crate) fn cut(&mut self) {
        if let Some(cut) = self.cut.take() {
            let _ = cut.send(());
        }
    }
}
