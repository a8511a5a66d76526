//! What the file system of a folder offers, decided once, by its type: what a sync on it is
//! worth, and how files on it may be written.

use super::{
    dir::Dir,
    error::{IoContext, StoreError},
    files::WriteMode,
};
use crate::{fault, protocol::Durability};
use std::os::fd::AsFd;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const RAMFS_MAGIC: u64 = 0x8584_58f6;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
const OVERLAYFS_MAGIC: u64 = 0x794c_7630;

/// Kinds on which a sync reaches a disk and a store into a map is as good as a write.
const LOCAL_DISKS: [(u64, &str); 5] = [
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0xf2f5_2010, "f2fs"),
    (0xca45_1a4e, "bcachefs"),
];
/// Kinds that answer to somebody else: a sync reaches them, a map may not, or only late.
const REMOTE: [(u64, &str); 8] = [
    (0x6969, "nfs"),
    (0x6573_5546, "fuse"),
    (0xff53_4d42, "cifs"),
    (0xfe53_4d42, "smb2"),
    (0x0102_1997, "9p"),
    (0x00c3_6400, "ceph"),
    (0x0bd0_0bd0, "lustre"),
    (0x2fc1_2fc1, "zfs"),
];

/// A file system as a receiver sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileSystem {
    /// Its type, for people.
    pub(crate) name: &'static str,
    /// What survives once it is synced.
    pub(crate) durability: Durability,
    /// Files are nothing but memory: allocating their blocks ahead only means to find every
    /// page twice.
    pub(crate) is_memory: bool,
    /// Files may be written by stores into a map.
    pub(crate) has_maps: bool,
}

impl FileSystem {
    /// That of an open folder.
    pub(crate) fn of(dir: &Dir) -> Result<Self, StoreError> {
        let stat = fault::call("fstatfs", || rustix::fs::fstatfs(dir.as_fd()))
            .context("stat the file system of", dir.shown(""))?;
        Ok(of_kind(stat.f_type as u64, || {
            dir.device().is_ok_and(overlay_is_volatile)
        }))
    }

    /// How chunks are written where `wish` is asked for.
    pub(crate) fn write_mode(self, wish: WriteMode) -> WriteMode {
        match wish {
            WriteMode::Map if !self.has_maps => WriteMode::Pwrite,
            other => other,
        }
    }
}

/// What a sync below a folder is worth, by its path.
pub(crate) fn of_path(folder: &std::path::Path) -> std::io::Result<Durability> {
    let dir = std::fs::File::open(folder)?;
    let stat = rustix::fs::fstatfs(&dir)?;
    let device = rustix::fs::fstat(&dir)?.st_dev;
    Ok(of_kind(stat.f_type as u64, || overlay_is_volatile(device)).durability)
}

fn of_kind(magic: u64, is_volatile: impl FnOnce() -> bool) -> FileSystem {
    let memory = |name| FileSystem {
        name,
        durability: Durability::Process,
        is_memory: true,
        has_maps: true,
    };
    let disk = |name, has_maps| FileSystem {
        name,
        durability: Durability::Disk,
        is_memory: false,
        has_maps,
    };
    let known = |list: &[(u64, &'static str)]| list.iter().find(|(m, _)| *m == magic).map(|k| k.1);
    match magic {
        TMPFS_MAGIC => memory("tmpfs"),
        RAMFS_MAGIC => memory("ramfs"),
        // Only maps can write there, and only whole huge pages.
        HUGETLBFS_MAGIC => memory("hugetlbfs"),
        OVERLAYFS_MAGIC if is_volatile() => FileSystem {
            durability: Durability::Process,
            ..disk("overlay (volatile)", true)
        },
        OVERLAYFS_MAGIC => disk("overlay", true),
        _ => match (known(&LOCAL_DISKS), known(&REMOTE)) {
            (Some(name), _) => disk(name, true),
            (None, Some(name)) => disk(name, false),
            (None, None) => disk("unknown", false),
        },
    }
}

/// Whether the overlay with this device number ignores every sync.
fn overlay_is_volatile(device: u64) -> bool {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let number = format!(
        "{}:{}",
        rustix::fs::major(device),
        rustix::fs::minor(device)
    );
    is_volatile_in(&mounts, &number)
}

/// The same out of the text of `mountinfo`. A layer without a file system of its own may
/// show another number for its files; then any volatile overlay counts.
fn is_volatile_in(mounts: &str, number: &str) -> bool {
    let overlays = || {
        mounts
            .lines()
            .filter_map(|line| line.split_once(" - overlay "))
    };
    // The second is how newer kernels spell it.
    let is_volatile = |options: &str| {
        let mut options = options.split([',', ' ']);
        options.any(|option| matches!(option, "volatile" | "fsync=volatile"))
    };
    let own = |mount: &str| mount.split(' ').nth(2) == Some(number);
    match overlays().rfind(|(mount, _)| own(mount)) {
        Some((_, options)) => is_volatile(options),
        None => overlays().any(|(_, options)| is_volatile(options)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MOUNTS: &str = "\
22 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 22 0:35 / /a rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w
41 22 0:36 / /b rw,relatime shared:3 - overlay overlay rw,lowerdir=/volatile,upperdir=/u,workdir=/w,volatile
42 22 0:37 / /c rw,relatime - overlay overlay rw,lowerdir=/l,upperdir=/u,workdir=/w,uuid=on,fsync=volatile
";

    #[test]
    fn each_overlay_is_judged_by_its_own_options() {
        assert!(!is_volatile_in(MOUNTS, "0:35"));
        assert!(is_volatile_in(MOUNTS, "0:36"));
        assert!(is_volatile_in(MOUNTS, "0:37"));
        // Not to be told which: the worst counts.
        assert!(is_volatile_in(MOUNTS, "0:99"));
        let harmless: String = MOUNTS.lines().take(2).collect::<Vec<_>>().join("\n");
        assert!(!is_volatile_in(&harmless, "0:99"));
    }

    #[test]
    fn kinds_decide_what_is_durable_and_how_it_is_written() {
        let of = |magic| of_kind(magic, || false);
        for (magic, name) in LOCAL_DISKS {
            let kind = of(magic);
            assert_eq!((kind.name, kind.durability), (name, Durability::Disk));
            assert_eq!(kind.write_mode(WriteMode::Map), WriteMode::Map);
        }
        for magic in REMOTE.map(|kind| kind.0).into_iter().chain([0x1234]) {
            let kind = of(magic);
            assert_eq!(kind.durability, Durability::Disk);
            assert_eq!(kind.write_mode(WriteMode::Map), WriteMode::Pwrite);
            assert_eq!(kind.write_mode(WriteMode::Auto), WriteMode::Auto);
        }
        for magic in [TMPFS_MAGIC, RAMFS_MAGIC, HUGETLBFS_MAGIC] {
            assert_eq!(of(magic).durability, Durability::Process);
        }
        assert_eq!(of(OVERLAYFS_MAGIC).durability, Durability::Disk);
        let volatile = of_kind(OVERLAYFS_MAGIC, || true);
        assert_eq!(volatile.durability, Durability::Process);
    }
}
