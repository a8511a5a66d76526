//! A file system of its own in an image, and its power cuts.
//!
//! `FS_IOC_SHUTDOWN` without flushing the log stops a file system at once: what was not
//! committed is gone after the next mount, as after a loss of power.

use super::server::run;
use std::{
    fs::File,
    os::fd::AsRawFd,
    path::{Path, PathBuf},
    sync::Arc,
};

/// `_IOR('X', 125, __u32)`.
const FS_IOC_SHUTDOWN: libc::Ioctl = 0x8004_587d;
/// Neither data nor log is flushed.
const NO_LOG_FLUSH: u32 = 2;

/// A file system in a file.
pub(crate) struct Image {
    file: PathBuf,
    device: String,
    point: PathBuf,
    mounted: bool,
}

/// The switch that cuts the power; good for one mount.
#[derive(Clone)]
pub(crate) struct Switch(Arc<File>);

impl Switch {
    #[expect(unsafe_code, reason = "no safe wrapper knows this ioctl")]
    pub(crate) fn cut(&self) {
        // SAFETY: the ioctl reads four bytes at the address of a live u32.
        let done = unsafe { libc::ioctl(self.0.as_raw_fd(), FS_IOC_SHUTDOWN, &NO_LOG_FLUSH) };
        assert_eq!(done, 0, "the file system cannot be shut down");
    }
}

impl Image {
    /// Makes and mounts one of `mib` MiB.
    pub(crate) fn make(folder: &Path, kind: &str, mib: u64) -> Result<Image, String> {
        let (file, point) = (folder.join("disk.img"), folder.join("disk"));
        std::fs::create_dir_all(&point).map_err(|e| e.to_string())?;
        let made = File::create(&file).and_then(|f| f.set_len(mib << 20));
        made.map_err(|e| format!("make {}: {e}", file.display()))?;
        let shown = file.display().to_string();
        match kind {
            "ext4" => run(&["mkfs.ext4", "-q", "-F", &shown])?,
            "xfs" => run(&["mkfs.xfs", "-q", "-f", &shown])?,
            other => return Err(format!("no file system {other}")),
        };
        let device = run(&["losetup", "-f", "--show", &shown])?;
        let mut image = Image {
            file,
            device,
            point,
            mounted: false,
        };
        image.mount()?;
        Ok(image)
    }

    /// Mounts the file system in a file that is there.
    pub(crate) fn adopt(file: PathBuf, point: PathBuf) -> Result<Image, String> {
        std::fs::create_dir_all(&point).map_err(|e| e.to_string())?;
        let mut image = Image {
            file,
            device: String::new(),
            point,
            mounted: false,
        };
        image.attach()?;
        Ok(image)
    }

    fn mount(&mut self) -> Result<(), String> {
        run(&["mount", &self.device, &self.point.display().to_string()])?;
        self.mounted = true;
        Ok(())
    }

    fn unmount(&mut self) -> Result<(), String> {
        let point = self.point.display().to_string();
        // Whoever was killed a moment ago may not have let go yet.
        let mut last = String::new();
        for _ in 0..200 {
            match run(&["umount", &point]) {
                Ok(_) => {
                    self.mounted = false;
                    return Ok(());
                }
                Err(e) => last = e,
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
        Err(last)
    }

    /// The image itself, for another kernel; nothing here may hold it.
    pub(crate) fn detach(&mut self) -> Result<(), String> {
        if self.mounted {
            self.unmount()?;
        }
        if !self.device.is_empty() {
            run(&["losetup", "-d", &self.device])?;
            self.device.clear();
        }
        Ok(())
    }

    /// Back from another kernel.
    pub(crate) fn attach(&mut self) -> Result<(), String> {
        self.detach()?;
        self.device = run(&["losetup", "-f", "--show", &self.file.display().to_string()])?;
        self.mount()
    }

    pub(crate) fn file(&self) -> &Path {
        &self.file
    }

    /// The served folder.
    pub(crate) fn root(&self) -> PathBuf {
        self.point.join("root")
    }

    pub(crate) fn point(&self) -> &Path {
        &self.point
    }

    pub(crate) fn switch(&self) -> Switch {
        Switch(Arc::new(
            File::open(&self.point).expect("the mount is there"),
        ))
    }

    /// Power is back: only what the file system made durable is there. Nobody may have a
    /// file or a [`Switch`] open.
    pub(crate) fn power_on(&mut self) -> Result<(), String> {
        self.unmount()?;
        self.mount()
    }

    /// Bytes that can still be had.
    pub(crate) fn free_bytes(&self) -> u64 {
        let stat = rustix::fs::statvfs(&self.point).expect("the mount is there");
        stat.f_bavail * stat.f_frsize
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        if self.mounted {
            let _ = run(&["umount", "-l", &self.point.display().to_string()]);
        }
        if !self.device.is_empty() {
            let _ = run(&["losetup", "-d", &self.device]);
        }
        let _ = std::fs::remove_file(&self.file);
    }
}
