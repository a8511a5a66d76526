//! What plain TCP moves over loopback: two threads, one connection, blocking calls of
//! at most 1 MiB.

use super::{PIECE_BYTES, Sample, Site, clock::Clock, pieces, site::allocate};
use crate::format::checksum::RunningCrc32c;
use std::{
    fs::File,
    io::{self, Read, Write},
    net::{Ipv4Addr, TcpListener, TcpStream},
    os::unix::fs::FileExt,
    thread,
};

/// What a transfer into a file does beside moving bytes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Extra {
    Nothing,
    /// CRC-32C on both sides, compared at the end.
    Checksums,
    /// One `fdatasync` at the end.
    Sync,
}

/// From one buffer into another, over and over.
pub(super) fn memory(site: &Site) -> io::Result<Sample> {
    let piece = site.noise().get(..PIECE_BYTES).unwrap_or_default();
    let clock = Clock::start();
    connected(
        |mut stream| {
            for len in pieces(site.bytes()) {
                site.check()?;
                stream.write_all(piece.get(..len).unwrap_or_default())?;
            }
            Ok(())
        },
        |stream| receive(site, stream, |_, _| Ok(())),
    )?;
    Ok(clock.stop(site.bytes()))
}

/// From the mapped source into a new file, whose allocation counts.
pub(super) fn file(site: &Site, extra: Extra) -> io::Result<Sample> {
    let source = site.source()?;
    let file = site.fresh_file()?;
    let sums = extra == Extra::Checksums;
    let clock = Clock::start();
    let (sent, received) = connected(
        |mut stream| {
            let mut sum = RunningCrc32c::default();
            for piece in source.chunks(PIECE_BYTES) {
                site.check()?;
                if sums {
                    sum.update(piece);
                }
                stream.write_all(piece)?;
            }
            Ok(sum)
        },
        |stream| {
            let mut sum = RunningCrc32c::default();
            allocate(&file, site.bytes())?;
            receive(site, stream, |bytes, at| {
                if sums {
                    sum.update(bytes);
                }
                write(&file, bytes, at)
            })?;
            Ok(sum)
        },
    )?;
    if extra == Extra::Sync {
        file.sync_data()?;
    }
    let sample = clock.stop(site.bytes());
    if sent.finish() != received.finish() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "what arrived is not what was sent",
        ));
    }
    Ok(sample)
}

fn write(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    file.write_all_at(bytes, at)
}

/// Reads until the other side ends, which it must do after all bytes.
fn receive(
    site: &Site,
    mut stream: TcpStream,
    mut take: impl FnMut(&[u8], u64) -> io::Result<()>,
) -> io::Result<()> {
    let mut buffer = vec![1; PIECE_BYTES];
    let mut at = 0;
    loop {
        site.check()?;
        let len = match stream.read(&mut buffer) {
            Ok(0) => break,
            Ok(len) => len,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(e),
        };
        take(buffer.get(..len).unwrap_or_default(), at)?;
        at += len as u64;
    }
    match at == site.bytes() {
        true => Ok(()),
        false => Err(io::ErrorKind::UnexpectedEof.into()),
    }
}

/// Runs both ends of one connection. A side that fails ends the other by closing it.
fn connected<S: Send, R>(
    send: impl FnOnce(TcpStream) -> io::Result<S> + Send,
    receive: impl FnOnce(TcpStream) -> io::Result<R>,
) -> io::Result<(S, R)> {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
    let client = TcpStream::connect(listener.local_addr()?)?;
    client.set_nodelay(true)?;
    let (server, _) = listener.accept()?;
    thread::scope(|scope| {
        let sending = scope.spawn(|| send(client));
        let received = receive(server);
        let sent = sending
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("the sending thread panicked")));
        // Why a side stopped on its own says more than that the other did.
        match (sent, received) {
            (Ok(sent), Ok(received)) => Ok((sent, received)),
            (Err(e), Err(_)) if e.kind() == io::ErrorKind::Interrupted => Err(e),
            (_, Err(e)) | (Err(e), _) => Err(e),
        }
    })
}
