//! A directory handle, and everything that is done beneath it.
//!
//! Every path is resolved beneath the handle without following a symbolic link,
//! by `openat2(RESOLVE_BENEATH | NO_SYMLINKS)` where the kernel has it and by a
//! walk of `openat(O_NOFOLLOW)` where it has not. A link or device that somebody
//! put in the way is an error, never followed.

use super::error::{IoContext, StoreError};
use crate::fault;
use rustix::{
    fs::{self, AtFlags, Mode, OFlags, RenameFlags, ResolveFlags},
    io::Errno,
};
use std::{
    fs::File,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Files and folders are made with these and the process's umask.
const FILE_MODE: Mode = Mode::from_raw_mode(0o666);
const PRIVATE: Mode = Mode::from_raw_mode(0o700);
const PUBLIC: Mode = Mode::from_raw_mode(0o777);

/// How often a question is put that could not be asked for want of descriptors or memory.
const ALIVE_ATTEMPTS: u32 = 50;
/// Between two of these.
const ALIVE_PAUSE: Duration = Duration::from_millis(20);

/// What a name in a directory is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// A regular file.
    File,
    /// A directory.
    Dir,
    /// Anything else.
    Other,
}

/// An open directory. Cloning shares the descriptor.
#[derive(Clone, Debug)]
pub(crate) struct Dir {
    fd: Arc<OwnedFd>,
    path: PathBuf,
}

impl Dir {
    /// Opens a folder by path, making it and its ancestors if need be. This is
    /// the only place where a path of the user is followed.
    pub(crate) fn open_root(path: &Path) -> Result<Self, StoreError> {
        let shown = path.display().to_string();
        make_durable(path)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let fd =
            fault::call("open", || fs::open(path, flags, Mode::empty())).context("open", &shown)?;
        Ok(Dir {
            fd: Arc::new(fd),
            path: path.to_owned(),
        })
    }

    /// A descriptor of its own for the same folder, so that errors of the file
    /// system are reported to it from now on.
    pub(crate) fn reopen(&self) -> Result<OwnedFd, StoreError> {
        self.open_fd(".", OFlags::RDONLY | OFlags::DIRECTORY)
    }

    /// The path of a name beneath, for messages.
    pub(crate) fn shown(&self, name: &str) -> String {
        self.path.join(name).display().to_string()
    }

    /// The path of a name beneath.
    pub(crate) fn path_of(&self, name: &str) -> PathBuf {
        self.path.join(name)
    }

    /// Opens a folder beneath.
    pub(crate) fn sub(&self, name: &str) -> Result<Dir, StoreError> {
        let fd = self.open_fd(name, OFlags::RDONLY | OFlags::DIRECTORY)?;
        Ok(Dir {
            fd: Arc::new(fd),
            path: self.path.join(name),
        })
    }

    /// Opens a folder beneath, or `None` when there is nothing of that name.
    pub(crate) fn try_sub(&self, name: &str) -> Result<Option<Dir>, StoreError> {
        match self.sub(name) {
            Ok(dir) => Ok(Some(dir)),
            Err(e) if is_not_found(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Opens a folder beneath, making what is missing; each folder made has its
    /// entry synced. `private` folders are for the owner only.
    pub(crate) fn make_all(&self, name: &str, private: bool) -> Result<Dir, StoreError> {
        let mut dir = self.clone();
        for part in name.split('/').filter(|p| !p.is_empty()) {
            let mode = if private { PRIVATE } else { PUBLIC };
            match fault::call("mkdirat", || fs::mkdirat(dir.fd.as_fd(), part, mode)) {
                // Also one that exists: whoever made it may have died before its sync.
                Ok(()) | Err(Errno::EXIST) => dir.sync()?,
                Err(e) => return Err(e).context("make", dir.shown(part)),
            }
            dir = dir.sub(part)?;
        }
        Ok(dir)
    }

    /// Makes a file that must not exist.
    pub(crate) fn create(&self, name: &str) -> Result<File, StoreError> {
        let (parent, last) = self.parent_of(name)?;
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || fs::openat(parent.fd.as_fd(), last, flags, FILE_MODE);
        let fd = fault::call("create", open).context("create", self.shown(name))?;
        Ok(File::from(fd))
    }

    /// As [`Dir::create`], in the place of a file that is worth nothing: one that an
    /// earlier session left without a record.
    pub(crate) fn create_anew(&self, name: &str) -> Result<File, StoreError> {
        match self.create(name) {
            Err(StoreError::Io { source, .. })
                if source.kind() == std::io::ErrorKind::AlreadyExists =>
            {
                self.remove_file(name)?;
                self.create(name)
            }
            other => other,
        }
    }

    /// Opens a regular file with one name.
    pub(crate) fn open(&self, name: &str, write: bool) -> Result<File, StoreError> {
        let access = if write { OFlags::RDWR } else { OFlags::RDONLY };
        // Without NONBLOCK a FIFO in the way would hang the server.
        let fd = self.open_fd(name, access | OFlags::NONBLOCK)?;
        let stat = fault::call("fstat", || fs::fstat(&fd)).context("stat", self.shown(name))?;
        if !fs::FileType::from_raw_mode(stat.st_mode).is_file() {
            return Err(self.is_unsafe(name, "it is not a regular file"));
        }
        if write && stat.st_nlink != 1 {
            return Err(self.is_unsafe(name, "the file has other names"));
        }
        Ok(File::from(fd))
    }

    /// Opens a regular file, or `None` when there is nothing of that name.
    pub(crate) fn try_open(&self, name: &str, write: bool) -> Result<Option<File>, StoreError> {
        match self.open(name, write) {
            Ok(file) => Ok(Some(file)),
            Err(e) if is_not_found(&e) => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Opens a lock file, making it if need be.
    pub(crate) fn open_or_create(&self, name: &str) -> Result<File, StoreError> {
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = || fs::openat(self.fd.as_fd(), name, flags, FILE_MODE);
        let fd = fault::call("open_or_create", open).context("open", self.shown(name))?;
        Ok(File::from(fd))
    }

    /// Inode of a name, or `None`.
    pub(crate) fn inode(&self, name: &str) -> Result<Option<u64>, StoreError> {
        let (parent, last) = self.parent_of(name)?;
        let stat = || fs::statat(parent.fd.as_fd(), last, AtFlags::SYMLINK_NOFOLLOW);
        match fault::call("statat", stat) {
            Ok(stat) => Ok(Some(stat.st_ino)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e).context("stat", self.shown(name)),
        }
    }

    /// Device of this folder.
    pub(crate) fn device(&self) -> Result<u64, StoreError> {
        let stat =
            fault::call("fstat", || fs::fstat(self.fd.as_fd())).context("stat", self.shown(""))?;
        Ok(stat.st_dev)
    }

    /// When a name beneath, or this folder (an empty name), was last written to; what
    /// is gone was changed just now.
    pub(crate) fn modified(&self, name: &str) -> Result<SystemTime, StoreError> {
        let stat = fault::call("statat", || match name {
            "" => fs::fstat(self.fd.as_fd()),
            name => fs::statat(self.fd.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW),
        });
        match stat {
            Ok(stat) => {
                let seconds = u64::try_from(stat.st_mtime).unwrap_or(0);
                Ok(UNIX_EPOCH + Duration::from_secs(seconds))
            }
            Err(Errno::NOENT) => Ok(SystemTime::now()),
            Err(e) => Err(e).context("stat", self.shown(name)),
        }
    }

    /// Modification time of this folder in seconds since 1970.
    pub(crate) fn modified_unix_seconds(&self) -> u64 {
        let stat = fault::call("fstat", || fs::fstat(self.fd.as_fd()));
        stat.map_or(0, |s| u64::try_from(s.st_mtime).unwrap_or(0))
    }

    /// Names in this folder, sorted.
    pub(crate) fn list(&self) -> Result<Vec<(String, Node)>, StoreError> {
        let mut out = Vec::new();
        let entries = fault::call("opendir", || fs::Dir::read_from(self.fd.as_fd()))
            .context("list", self.shown(""))?;
        for entry in entries {
            let entry = fault::call("getdents", || entry).context("list", self.shown(""))?;
            let Ok(name) = entry.file_name().to_str() else {
                continue;
            };
            if name == "." || name == ".." {
                continue;
            }
            let node = match entry.file_type() {
                fs::FileType::RegularFile => Node::File,
                fs::FileType::Directory => Node::Dir,
                // Not every file system tells.
                fs::FileType::Unknown => self.node(name)?,
                _ => Node::Other,
            };
            out.push((name.to_owned(), node));
        }
        out.sort_by(|a, b| a.0.cmp(&b.0));
        Ok(out)
    }

    fn node(&self, name: &str) -> Result<Node, StoreError> {
        let stat = || fs::statat(self.fd.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW);
        let stat = match fault::call("statat", stat) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => return Ok(Node::Other),
            Err(e) => return Err(e).context("stat", self.shown(name)),
        };
        Ok(match fs::FileType::from_raw_mode(stat.st_mode) {
            fs::FileType::RegularFile => Node::File,
            fs::FileType::Directory => Node::Dir,
            _ => Node::Other,
        })
    }

    /// Whether nothing is in this folder.
    pub(crate) fn is_empty(&self) -> Result<bool, StoreError> {
        Ok(self.list()?.is_empty())
    }

    /// Removes a file; a missing one is fine.
    pub(crate) fn remove_file(&self, name: &str) -> Result<(), StoreError> {
        let parent = match self.parent_of(name) {
            Ok(parent) => parent,
            Err(e) if is_not_found(&e) => return Ok(()),
            Err(e) => return Err(e),
        };
        let unlink = || fs::unlinkat(parent.0.fd.as_fd(), parent.1, AtFlags::empty());
        match fault::call("unlinkat", unlink) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e).context("remove", self.shown(name)),
        }
    }

    /// Removes an empty folder; a missing one is fine. Returns whether it is gone.
    pub(crate) fn remove_empty_dir(&self, name: &str) -> bool {
        let unlink = || fs::unlinkat(self.fd.as_fd(), name, AtFlags::REMOVEDIR);
        let removed = fault::call("rmdir", unlink);
        matches!(removed, Ok(()) | Err(Errno::NOENT))
    }

    /// Removes a folder and all beneath it, following no link.
    pub(crate) fn remove_all(&self, name: &str) -> Result<(), StoreError> {
        let Some(dir) = self.try_sub(name)? else {
            return Ok(());
        };
        for (child, node) in dir.list()? {
            match node {
                Node::Dir => dir.remove_all(&child)?,
                Node::File | Node::Other => dir.remove_file(&child)?,
            }
        }
        let unlink = || fs::unlinkat(self.fd.as_fd(), name, AtFlags::REMOVEDIR);
        match fault::call("rmdir", unlink) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e).context("remove", self.shown(name)),
        }
    }

    /// Renames onto an absent name or an empty folder.
    pub(crate) fn rename(&self, name: &str, to: &Dir, to_name: &str) -> Result<(), StoreError> {
        let rename = || fs::renameat(self.fd.as_fd(), name, to.fd.as_fd(), to_name);
        fault::call("renameat", rename).context("rename to", to.shown(to_name))
    }

    /// Exchanges two names.
    pub(crate) fn exchange(&self, name: &str, to: &Dir, to_name: &str) -> Result<(), StoreError> {
        let flags = RenameFlags::EXCHANGE;
        let rename = || fs::renameat_with(self.fd.as_fd(), name, to.fd.as_fd(), to_name, flags);
        fault::call("exchange", rename).context("exchange with", to.shown(to_name))
    }

    /// Makes the names in this folder durable.
    pub(crate) fn sync(&self) -> Result<(), StoreError> {
        if crate::mutant::is("no_dir_fsync") {
            return Ok(());
        }
        fault::call("fsync_dir", || fs::fsync(self.fd.as_fd())).context("sync", self.shown(""))
    }

    /// Fails when the file system was shut down, as after an error in its own log. A sync
    /// that such a moment overtakes may report success although nothing is on the disk:
    /// xfs says so of folders, ext4 seemingly of a commit that was given up. Opening a file
    /// fails from that moment on. So whatever is told on the strength of a sync asks this afterwards.
    pub(crate) fn check_alive(&self, file: &str) -> Result<(), StoreError> {
        // Short of descriptors or memory nobody knows: the question is put again, a while.
        for _ in 1..ALIVE_ATTEMPTS {
            match self.open(file, false) {
                Err(StoreError::Io { source, .. }) if is_short_of_means(&source) => {
                    std::thread::sleep(ALIVE_PAUSE);
                }
                known => return known.map(drop),
            }
        }
        self.open(file, false).map(drop)
    }

    /// Makes everything on this folder's file system durable.
    pub(crate) fn sync_file_system(&self) -> Result<(), StoreError> {
        fault::call("syncfs", || fs::syncfs(self.fd.as_fd()))
            .context("sync the file system of", self.shown(""))
    }

    /// Splits a relative path into its folder and last part.
    fn parent_of<'a>(&self, name: &'a str) -> Result<(Dir, &'a str), StoreError> {
        match name.rsplit_once('/') {
            Some((parent, last)) => Ok((self.sub(parent)?, last)),
            None => Ok((self.clone(), name)),
        }
    }

    fn open_fd(&self, name: &str, flags: OFlags) -> Result<OwnedFd, StoreError> {
        let flags = flags | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let open = || fs::openat2(self.fd.as_fd(), name, flags, Mode::empty(), resolve);
        let opened = match fault::call("openat2", open) {
            // Kernels before 5.6, and sandboxes that do not know the call.
            Err(Errno::NOSYS | Errno::PERM) => self.walk(name, flags),
            other => other,
        };
        match opened {
            Err(Errno::LOOP | Errno::XDEV) => {
                Err(self.is_unsafe(name, "a symbolic link is in the way"))
            }
            Err(Errno::NOTDIR) => {
                Err(self.is_unsafe(name, "something that is not a folder is in the way"))
            }
            other => other.context("open", self.shown(name)),
        }
    }

    /// `openat2` by hand: one `openat` per part, none of which may be a link.
    fn walk(&self, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
        let mut fd: Option<OwnedFd> = None;
        let mut parts = name.split('/').filter(|p| !p.is_empty()).peekable();
        while let Some(part) = parts.next() {
            if part == ".." {
                return Err(Errno::XDEV);
            }
            let last = parts.peek().is_none();
            let folder = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let at = fd.as_ref().map_or(self.fd.as_fd(), |f| f.as_fd());
            let next = fs::openat(at, part, if last { flags } else { folder }, Mode::empty());
            // O_NOFOLLOW with O_DIRECTORY says NOTDIR for a link.
            fd = Some(next.map_err(|e| {
                if e == Errno::NOTDIR && !last {
                    Errno::LOOP
                } else {
                    e
                }
            })?);
        }
        fd.ok_or(Errno::NOENT)
    }

    fn is_unsafe(&self, name: &str, why: &str) -> StoreError {
        StoreError::UnsafePath {
            path: self.shown(name),
            why: why.to_owned(),
        }
    }
}

impl AsFd for Dir {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Makes a folder and its ancestors; each one made has its name synced, for a
/// durable file in a folder whose own name is lost is lost.
fn make_durable(path: &Path) -> Result<(), StoreError> {
    let shown = path.display().to_string();
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    make_durable(parent)?;
    match fault::call("mkdir", || std::fs::create_dir(path)) {
        Ok(()) => {}
        // Somebody else made it meanwhile.
        Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists && path.is_dir() => {}
        Err(e) => return Err(e).context("make", shown),
    }
    let parent_dir =
        fault::call("open", || File::open(parent)).context("open", parent.display().to_string())?;
    fault::call("fsync_dir", || parent_dir.sync_all()).context("sync", parent.display().to_string())
}

/// Whether an error says that there is nothing of that name.
pub(crate) fn is_not_found(error: &StoreError) -> bool {
    matches!(error, StoreError::Io { source, .. } if source.kind() == std::io::ErrorKind::NotFound)
}

/// The process or the machine has no descriptor or memory left at the moment.
fn is_short_of_means(error: &std::io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE | Errno::NOMEM))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_and_devices_in_the_way_are_never_followed() {
        let temp = tempfile::tempdir().unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), b"x").unwrap();
        let root = Dir::open_root(temp.path()).unwrap();
        std::os::unix::fs::symlink(outside.path(), temp.path().join("link")).unwrap();
        std::os::unix::fs::symlink(outside.path().join("secret"), temp.path().join("file"))
            .unwrap();
        for bad in ["link/secret", "file", "../x", "link"] {
            let opened = root.open(bad, false);
            assert!(
                matches!(opened, Err(StoreError::UnsafePath { .. })),
                "{bad}: {opened:?}"
            );
            let walked = root.walk(bad, OFlags::RDONLY | OFlags::NOFOLLOW);
            assert!(
                matches!(walked, Err(Errno::LOOP | Errno::XDEV)),
                "{bad}: {walked:?}"
            );
        }
        assert!(root.make_all("link/x", false).is_err());
        assert!(root.create("file").is_err());
        std::fs::write(temp.path().join("a"), b"x").unwrap();
        std::fs::hard_link(temp.path().join("a"), temp.path().join("b")).unwrap();
        assert!(matches!(
            root.open("a", true),
            Err(StoreError::UnsafePath { .. })
        ));
        assert!(root.open("a", false).is_ok());
        root.remove_all("link").unwrap_err();
        assert!(outside.path().join("secret").exists());
    }

    #[test]
    fn folders_are_made_listed_and_removed() {
        let temp = tempfile::tempdir().unwrap();
        let root = Dir::open_root(temp.path()).unwrap();
        let dir = root.make_all("a/b", true).unwrap();
        dir.create("x").unwrap();
        assert!(dir.create("x").is_err());
        assert_eq!(root.list().unwrap(), [("a".to_owned(), Node::Dir)]);
        assert_eq!(
            root.sub("a/b").unwrap().list().unwrap(),
            [("x".to_owned(), Node::File)]
        );
        assert!(root.try_sub("a/c").unwrap().is_none());
        root.remove_all("a").unwrap();
        assert!(root.is_empty().unwrap());
    }
}
