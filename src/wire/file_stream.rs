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
    /// The kernel cannot send the pages of what is mapped here: they are copied.
    copies: bool,
}

impl FileStream {
    pub(crate) fn new(tcp: TcpStream) -> Self {
        FileStream { tcp, copies: false }
    }

    /// The connection itself.
    pub(crate) fn tcp(&self) -> &TcpStream {
        &self.tcp
    }

    /// Where a run lies that is worth it.
    fn file_run(&self, bytes: &[u8]) -> Option<(Arc<File>, u64)> {
        match bytes.len() >= MIN_RUN_LEN && !self.copies {
            true => file_of(bytes),
            false => None,
        }
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

/// Errors of `sendfile` that say nothing of the connection.
fn is_of_file(error: &io::Error) -> bool {
    let of_file = [
        Errno::INVAL,
        Errno::NOSYS,
        Errno::OPNOTSUPP,
        Errno::PERM,
        Errno::IO,
        Errno::OVERFLOW,
    ];
    let errno = error.raw_os_error();
    of_file.iter().any(|of| errno == Some(of.raw_os_error()))
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
        if let Some((file, offset)) = bufs.first().and_then(|run| self.file_run(run)) {
            let len = bufs.first().map_or(0, |run| run.len());
            let sent = ready!(self.poll_write_with(cx, |tcp| {
                let mut at = offset;
                sendfile(tcp, &file, Some(&mut at), len)
            }));
            match sent {
                // Not "written nothing": the file was cut, and what it held is not there
                // to be sent any more.
                Ok(0) => return Poll::Ready(Err(io::ErrorKind::UnexpectedEof.into())),
                // The file cannot be sent in this way, or not be read: from the map it can,
                // or the guard and the sum of the chunk find that.
                Err(e) if is_of_file(&e) => self.copies = true,
                done => return Poll::Ready(done),
            }
        }
        match bufs {
            // The head of a frame waits for the run that follows it.
            [head, run, ..] if self.file_run(run).is_some() => {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::{SourceMap, install_sigbus_guard, mapped_bytes};
    use std::{future::poll_fn, os::unix::fs::FileExt};
    use tokio::{io::AsyncReadExt, net::TcpListener};

    async fn pair() -> (FileStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let near = TcpStream::connect(listener.local_addr().unwrap());
        let (near, far) = tokio::join!(near, listener.accept());
        (FileStream::new(near.unwrap()), far.unwrap().0)
    }

    async fn write_all(stream: &mut FileStream, bufs: &[&[u8]]) -> io::Result<()> {
        let mut slices: Vec<IoSlice<'_>> = bufs.iter().map(|buf| IoSlice::new(buf)).collect();
        let mut rest = &mut slices[..];
        while rest.iter().any(|slice| !slice.is_empty()) {
            let sent = poll_fn(|cx| Pin::new(&mut *stream).poll_write_vectored(cx, rest)).await?;
            IoSlice::advance_slices(&mut rest, sent);
        }
        Ok(())
    }

    #[tokio::test]
    async fn heads_and_runs_of_a_map_arrive_in_order_whatever_the_socket_takes() {
        install_sigbus_guard().unwrap();
        let content: Vec<u8> = (0..3_000_000u64).map(|i| ((i * 7919) >> 5) as u8).collect();
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.write_all_at(&content, 0).unwrap();
        let map = Arc::new(SourceMap::new(&file, content.len()).unwrap().unwrap());
        let (mut stream, mut far) = pair().await;
        // Longer than what a socket holds, not at the start of a page, and a short one.
        let (long, short) = (
            mapped_bytes(&map, 130..2_900_000, ()),
            mapped_bytes(&map, 5..100, ()),
        );
        let sending = async {
            let bufs: [&[u8]; 5] = [b"", b"head", &long, b"tail", &short];
            write_all(&mut stream, &bufs).await.unwrap();
            drop(stream);
        };
        let mut received = Vec::new();
        let (_, read) = tokio::join!(sending, far.read_to_end(&mut received));
        read.unwrap();
        let expected = [b"head", &content[130..2_900_000], b"tail", &content[5..100]].concat();
        assert!(received == expected, "{} bytes came", received.len());
    }

    #[tokio::test]
    async fn a_file_that_is_cut_ends_the_connection_instead_of_stalling_it() {
        install_sigbus_guard().unwrap();
        let file = Arc::new(tempfile::tempfile().unwrap());
        file.set_len(1 << 20).unwrap();
        let map = Arc::new(SourceMap::new(&file, 1 << 20).unwrap().unwrap());
        let run = mapped_bytes(&map, 0..1 << 20, ());
        let (mut stream, _far) = pair().await;
        file.set_len(0).unwrap();
        let error = write_all(&mut stream, &[b"head", &run]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }
}
