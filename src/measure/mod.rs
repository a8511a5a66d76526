//! What this machine and a file system of it can do at most, measured by plain loops:
//! the ceilings beside which a transfer is to be judged. Everything is measured where
//! and when it is asked for; nothing is remembered.
//!
//! | ceiling | what it is |
//! |---|---|
//! | memory | one thread copies, sums, encodes or decodes what lies in memory |
//! | pages | a fresh preallocated file is filled, by map or by `pwrite` |
//! | TCP | two threads, one loopback connection, blocking calls of 1 MiB |
//! | syncs | written groups are made durable |
//!
//! Files that a ceiling writes have no name: nothing is left behind, whatever happens.
//! [`rehearsal`] has the transfers that leave part of their work out.
//!
//! ```
//! use tensorferry::measure::{Ceiling, Site};
//!
//! # fn main() -> std::io::Result<()> {
//! let temp = tempfile::tempdir()?;
//! let site = Site::new(temp.path(), 4 << 20)?;
//! let sample = Ceiling::Pwrite.measure(&site)?;
//! assert_eq!(sample.bytes, 4 << 20);
//! assert!(sample.bytes_per_second() > 0.0);
//! # Ok(())
//! # }
//! ```

mod clock;
mod codec;
mod memory;
mod noise;
mod pages;
pub mod rehearsal;
mod site;
mod sync;
mod tcp;

pub use noise::Noise;
pub use site::{Halt, Site};

use std::{io, time::Duration};

/// Bytes that one call reads, writes, sums or encodes: one chunk of the default length.
const PIECE_BYTES: usize = 1 << 20;

/// Something that can be measured beside a transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Ceiling {
    /// Copying from warm memory into warm memory, beyond the caches.
    Memcpy,
    /// CRC-32C.
    Crc32c,
    /// Encoding sparse values by LZ4.
    Lz4Encode,
    /// Decoding them.
    Lz4Decode,
    /// Finding that chunks hold one value only.
    Constant,
    /// Stores into a map of a fresh preallocated file, page by page faulted in.
    MapStore,
    /// The same with the pages of each map made by one call.
    MapPopulate,
    /// `pwrite` into a fresh preallocated file.
    Pwrite,
    /// TCP from memory to memory, discarded.
    TcpMemory,
    /// TCP from a mapped file into a fresh file whose allocation counts: the ceiling of
    /// a transfer.
    TcpFile,
    /// The same with CRC-32C on both sides.
    TcpFileCrc,
    /// The same with one `fdatasync` at the end.
    TcpFileSync,
    /// Groups written and made durable.
    Fdatasync,
}

impl Ceiling {
    /// Every one, in the order in which they are best told.
    pub const ALL: [Ceiling; 13] = [
        Ceiling::Memcpy,
        Ceiling::Crc32c,
        Ceiling::Lz4Encode,
        Ceiling::Lz4Decode,
        Ceiling::Constant,
        Ceiling::MapStore,
        Ceiling::MapPopulate,
        Ceiling::Pwrite,
        Ceiling::Fdatasync,
        Ceiling::TcpMemory,
        Ceiling::TcpFile,
        Ceiling::TcpFileCrc,
        Ceiling::TcpFileSync,
    ];

    /// Its stable name.
    pub const fn name(self) -> &'static str {
        match self {
            Ceiling::Memcpy => "memcpy",
            Ceiling::Crc32c => "crc32c",
            Ceiling::Lz4Encode => "lz4_encode",
            Ceiling::Lz4Decode => "lz4_decode",
            Ceiling::Constant => "constant",
            Ceiling::MapStore => "map_store",
            Ceiling::MapPopulate => "map_populate",
            Ceiling::Pwrite => "pwrite",
            Ceiling::TcpMemory => "tcp_memory",
            Ceiling::TcpFile => "tcp_file",
            Ceiling::TcpFileCrc => "tcp_file_crc",
            Ceiling::TcpFileSync => "tcp_file_sync",
            Ceiling::Fdatasync => "fdatasync",
        }
    }

    /// Whether [`Site::with_source`] must have given it something to send.
    pub const fn needs_source(self) -> bool {
        matches!(
            self,
            Ceiling::TcpFile | Ceiling::TcpFileCrc | Ceiling::TcpFileSync
        )
    }

    /// Whether it writes into the folder.
    pub const fn writes(self) -> bool {
        self.needs_source()
            || matches!(
                self,
                Ceiling::MapStore | Ceiling::MapPopulate | Ceiling::Pwrite | Ceiling::Fdatasync
            )
    }

    /// Measures it once.
    ///
    /// # Errors
    /// The file system or the network refuses; [`io::ErrorKind::Interrupted`] when the
    /// site was told to stop.
    pub fn measure(self, site: &Site) -> io::Result<Sample> {
        match self {
            Ceiling::Memcpy => memory::copy(site),
            Ceiling::Crc32c => memory::sum(site),
            Ceiling::Lz4Encode => codec::encode(site),
            Ceiling::Lz4Decode => codec::decode(site),
            Ceiling::Constant => codec::constant(site),
            Ceiling::MapStore => pages::fill(site, pages::Way::Map),
            Ceiling::MapPopulate => pages::fill(site, pages::Way::MapPopulated),
            Ceiling::Pwrite => pages::fill(site, pages::Way::Pwrite),
            Ceiling::TcpMemory => tcp::memory(site),
            Ceiling::TcpFile => tcp::file(site, tcp::Extra::Nothing),
            Ceiling::TcpFileCrc => tcp::file(site, tcp::Extra::Checksums),
            Ceiling::TcpFileSync => tcp::file(site, tcp::Extra::Sync),
            Ceiling::Fdatasync => sync::groups(site),
        }
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Sample {
    /// Bytes moved.
    pub bytes: u64,
    /// Time that it took.
    pub elapsed: Duration,
    /// Processor time of the whole process meanwhile.
    pub cpu: Duration,
    /// Time for the allocation of the file, where that is not in `elapsed`.
    pub allocation: Option<Duration>,
    /// Syncs of 4 KiB a second, for [`Ceiling::Fdatasync`].
    pub calls_per_second: Option<f64>,
}

impl Sample {
    /// Its rate.
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 / self.elapsed.as_secs_f64().max(1e-9)
    }
}

/// Lengths of the pieces that `bytes` are worked through in.
fn pieces(bytes: u64) -> impl Iterator<Item = usize> {
    let whole = bytes / PIECE_BYTES as u64;
    let rest = (bytes % PIECE_BYTES as u64) as usize;
    (0..whole)
        .map(|_| PIECE_BYTES)
        .chain((rest > 0).then_some(rest))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Not a whole number of pieces.
    const BYTES: u64 = (3 << 20) + 5;

    #[test]
    fn every_ceiling_moves_what_it_is_asked_for_and_leaves_nothing() {
        let temp = tempfile::tempdir().unwrap();
        let source = tempfile::NamedTempFile::new().unwrap();
        let mut bytes = vec![0; BYTES as usize];
        Noise::new(1).fill(&mut bytes);
        std::fs::write(source.path(), &bytes).unwrap();
        let site = Site::new(temp.path(), BYTES).unwrap();
        let site = site.with_source(source.path()).unwrap();
        for ceiling in Ceiling::ALL {
            let sample = ceiling.measure(&site).unwrap();
            assert_eq!(sample.bytes, BYTES, "{ceiling:?}");
            assert!(sample.elapsed > Duration::ZERO, "{ceiling:?}");
        }
        assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
    }

    #[test]
    fn names_are_told_apart() {
        let mut names = Ceiling::ALL.map(Ceiling::name).to_vec();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Ceiling::ALL.len());
    }

    #[test]
    fn a_halted_site_stops_every_ceiling() {
        let temp = tempfile::tempdir().unwrap();
        let source = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(source.path(), vec![1; BYTES as usize]).unwrap();
        let site = Site::new(temp.path(), BYTES).unwrap();
        let site = site.with_source(source.path()).unwrap();
        site.halt().set();
        for ceiling in Ceiling::ALL {
            let error = ceiling.measure(&site).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::Interrupted, "{ceiling:?}");
        }
    }

    #[test]
    fn a_folder_that_is_none_and_a_source_that_is_too_short_are_errors() {
        let temp = tempfile::tempdir().unwrap();
        assert!(Site::new(&temp.path().join("none"), BYTES).is_err());
        let site = Site::new(temp.path(), BYTES).unwrap();
        assert!(Ceiling::TcpFile.measure(&site).is_err());
        let short = temp.path().join("short");
        std::fs::write(&short, [1; 5]).unwrap();
        assert!(site.with_source(&short).is_err());
    }
}
