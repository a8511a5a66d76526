//! Where something is measured: a folder and with it a file system, how many bytes,
//! and what is sent.

use super::Noise;
use crate::{map::ReadMap, protocol::Durability, store::durability_of};
use rustix::fs::{FallocateFlags, Mode, OFlags};
use std::{
    fs::File,
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
    },
};

/// Memory that is worked on over and over: more than the caches hold.
const WARM_BYTES: u64 = 64 << 20;
const SEED: u64 = 0x7e45_0fe1_1700_0001;

/// Stops measurements from elsewhere. Cloning shares it.
#[derive(Clone, Debug, Default)]
pub struct Halt(Arc<AtomicBool>);

impl Halt {
    /// Whatever is being measured ends soon, with an error.
    pub fn set(&self) {
        self.0.store(true, Ordering::Relaxed);
    }

    /// # Errors
    /// [`io::ErrorKind::Interrupted`] once it was set.
    pub fn check(&self) -> io::Result<()> {
        match self.0.load(Ordering::Relaxed) {
            true => Err(io::ErrorKind::Interrupted.into()),
            false => Ok(()),
        }
    }
}

/// Where and how much.
#[derive(Debug)]
pub struct Site {
    dir: PathBuf,
    bytes: u64,
    durability: Durability,
    source: Option<ReadMap>,
    noise: OnceLock<Vec<u8>>,
    halt: Halt,
}

impl Site {
    /// A folder, and how many bytes each measurement moves.
    ///
    /// # Errors
    /// The folder cannot be opened; no bytes.
    pub fn new(dir: &Path, bytes: u64) -> io::Result<Site> {
        if bytes == 0 {
            let why = "nothing can be measured with no bytes";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(Site {
            dir: dir.to_owned(),
            bytes,
            durability: durability_of(dir)?,
            source: None,
            noise: OnceLock::new(),
            halt: Halt::default(),
        })
    }

    /// With a file to send, of which the first bytes are taken. It is mapped: whoever
    /// cuts it short meanwhile ends the process.
    ///
    /// # Errors
    /// It cannot be mapped, or is shorter than what is to be moved.
    pub fn with_source(mut self, path: &Path) -> io::Result<Site> {
        let map = ReadMap::new(&File::open(path)?)?;
        if (map.len() as u64) < self.bytes {
            let why = format!("{} bytes are too few to move {}", map.len(), self.bytes);
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        self.source = Some(map);
        Ok(self)
    }

    /// What a sync in this folder is worth.
    pub fn durability(&self) -> Durability {
        self.durability
    }

    /// How many bytes a measurement moves.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Stopped together with others.
    #[must_use]
    pub fn with_halt(mut self, halt: Halt) -> Site {
        self.halt = halt;
        self
    }

    /// Stops what is measured here.
    pub fn halt(&self) -> Halt {
        self.halt.clone()
    }

    pub(super) fn check(&self) -> io::Result<()> {
        self.halt.check()
    }

    /// The bytes to send.
    pub(super) fn source(&self) -> io::Result<&[u8]> {
        let source = self.source.as_deref();
        source
            .and_then(|bytes| bytes.get(..usize::try_from(self.bytes).ok()?))
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "there is nothing to send"))
    }

    /// Warm memory with values in it: whole pieces, at least one.
    pub(super) fn noise(&self) -> &[u8] {
        self.noise.get_or_init(|| {
            let len = self.bytes.min(WARM_BYTES) as usize;
            let mut bytes = vec![0; len.next_multiple_of(super::PIECE_BYTES)];
            Noise::new(SEED).fill(&mut bytes);
            bytes
        })
    }

    /// The same with three values of four zero.
    pub(super) fn sparse(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.noise().len()];
        Noise::sparse(SEED).fill(&mut bytes);
        bytes
    }

    /// A new file without a name.
    pub(super) fn fresh_file(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        match rustix::fs::open(&self.dir, flags, mode) {
            Ok(fd) => Ok(File::from(fd)),
            // The file system has no such files.
            Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::ISDIR) => self.unlinked_file(),
            Err(e) => Err(e.into()),
        }
    }

    /// A new file whose name is gone at once.
    fn unlinked_file(&self) -> io::Result<File> {
        let name = format!(".tensorferry-measure-{}", std::process::id());
        let path = self.dir.join(name);
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)?;
        std::fs::remove_file(&path)?;
        Ok(file)
    }
}

/// Gives a file its length and, where the file system can do that, its blocks.
pub(super) fn allocate(file: &File, len: u64) -> io::Result<()> {
    use rustix::io::Errno;
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, len) {
        Ok(()) => Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => file.set_len(len),
        Err(e) => Err(e.into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_fresh_file_has_no_name_either_way() {
        let temp = tempfile::tempdir().unwrap();
        let site = Site::new(temp.path(), 1).unwrap();
        for file in [site.fresh_file(), site.unlinked_file()] {
            let file = file.unwrap();
            allocate(&file, 5000).unwrap();
            assert_eq!(file.metadata().unwrap().len(), 5000);
            assert_eq!(std::fs::read_dir(temp.path()).unwrap().count(), 0);
        }
    }
}
