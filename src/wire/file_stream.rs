//! A connection that has the kernel send what lies in mapped source files.
//!
//! Bytes that are written out of a map of a file need not be copied into the socket:
//! `sendfile` gives it the very pages of the page cache. What is in memory goes as ever.

use crate::map::file_of;
use rustix::{
    fs::sendfile,
    io::Errno,
    net::{SendFlags, send},
};
use std::{
    fs::File,
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::TcpStream,
};

/// Shorter runs are copied: that is cheaper than the pipe which `sendfile` fills inside.
const MIN_RUN_LEN: usize = 16 << 10;

/// A TCP connection.
#[derive(Debug)]
pub(crate) struct FileStream {
    tcp: TcpStream,
}

impl FileStream {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        FileStream { tcp }
    }

    /// Tries until the socket takes something or has no room.
    fn poll_write_with(
        &self,
        cx: &mut Context<'_>,
        mut write: impl FnMut(&TcpStream) -> rustix::io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.tcp.poll_write_ready(cx))?;
            let tried = self.tcp.try_io(Interest::WRITABLE, || {
                loop {
                    match write(&self.tcp) {
                        Err(Errno::INTR) => {}
                        other => return other.map_err(io::Error::from),
                    }
                }
            });
            match tried {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                done => return Poll::Ready(done),
            }
        }
    }
}

/// Where a run lies that is worth it.
fn file_run(bytes: &[u8]) -> Option<(Arc<File>, u64)> {
    match bytes.len() >= MIN_RUN_LEN {
        true => file_of(bytes),
        false => None,
    }
}

impl AsyncWrite for FileStream {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.as_mut().poll_write_vectored(cx, &[IoSlice::new(buf)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let skipped = bufs.iter().take_while(|buf| buf.is_empty()).count();
        let bufs = bufs.get(skipped..).unwrap_or_default();
        if let Some((file, offset)) = bufs.first().and_then(|run| file_run(run)) {
            let len = bufs.first().map_or(0, |run| run.len());
            let sent = ready!(self.poll_write_with(cx, |tcp| {
                let mut at = offset;
                sendfile(tcp, &file, Some(&mut at), len)
            }))?;
            return Poll::Ready(match sent {
                // Not "written nothing": the file was cut, and what it held is not there
                // to be sent any more.
                0 => Err(io::ErrorKind::UnexpectedEof.into()),
                sent => Ok(sent),
            });
        }
        match bufs {
            // The head of a frame waits for the run that follows it.
            [head, run, ..] if file_run(run).is_some() => {
                self.poll_write_with(cx, |tcp| send(tcp, head, SendFlags::MORE))
            }
            _ => Pin::new(&mut self.tcp).poll_write_vectored(cx, bufs),
        }
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_shutdown(cx)
    }
}

impl AsyncRead for FileStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.tcp).poll_read(cx, buf)
    }
}
