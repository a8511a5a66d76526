//! A User-Mode Linux guest that serves from a disk of its own: killing it is a loss of
//! power that takes the kernel's page cache along.

use crate::{
    mount::Image,
    recorder::Recorder,
    server::{Server, launch, run},
};
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
};

const TAP: &str = "tferry0";
const HOST: &str = "10.208.0.1";
const GUEST: &str = "10.208.0.2";
const PORT: u16 = 7744;

/// A machine that can be switched off.
pub(crate) struct Guest {
    kernel: PathBuf,
    init: PathBuf,
    image: Image,
    log: Option<PathBuf>,
}

impl Guest {
    /// `image` is the guest's disk, `recorder` what notes each write to it. The guest sees
    /// the host's files as they are.
    pub(crate) fn new(
        kernel: PathBuf,
        binary: &Path,
        folder: &Path,
        image: Image,
        recorder: Option<&Recorder>,
    ) -> Result<Guest, String> {
        let _ = run(&["ip", "link", "del", TAP]);
        run(&["ip", "tuntap", "add", "dev", TAP, "mode", "tap"])?;
        run(&["ip", "addr", "add", &format!("{HOST}/24"), "dev", TAP])?;
        run(&["ip", "link", "set", TAP, "up"])?;
        let init = folder.join("init");
        let mount = match recorder {
            None => "mount /dev/ubda /run/disk".to_owned(),
            Some(recorder) => recorder.mount_through(HOST, "/dev/ubda", "/dev/ubdb", "/run/disk"),
        };
        let script = format!(
            "#!/bin/bash\n\
             export PATH=/usr/sbin:/usr/bin:/sbin:/bin\n\
             mount -t proc proc /proc\n\
             mount -t sysfs sys /sys\n\
             mount -t tmpfs tmp /run\n\
             mount -t devtmpfs dev /dev 2>/dev/null\n\
             mkdir -p /run/disk\n\
             ip link set lo up\n\
             ip addr add {GUEST}/24 dev vec0\n\
             ip link set vec0 up\n\
             set -e\n\
             {mount}\n\
             exec {} serve /run/disk/root --insecure --listen {GUEST}:{PORT}\n",
            binary.display()
        );
        let written = std::fs::write(&init, script)
            .and_then(|()| std::fs::set_permissions(&init, std::fs::Permissions::from_mode(0o755)));
        written.map_err(|e| e.to_string())?;
        Ok(Guest {
            kernel,
            init,
            image,
            log: recorder.map(|r| r.log().to_owned()),
        })
    }

    /// Boots it and waits for its server.
    pub(crate) fn start(&mut self) -> Result<Server, String> {
        self.image.detach()?;
        let mut words = vec![
            self.kernel.display().to_string(),
            "mem=512M".to_owned(),
            "root=/dev/root".to_owned(),
            "rootfstype=hostfs".to_owned(),
            "rw".to_owned(),
            format!("ubd0={}", self.image.file().display()),
            format!("init={}", self.init.display()),
            format!("vec0:transport=tap,ifname={TAP},depth=128,gro=1"),
            "con=null".to_owned(),
            "con0=null,fd:1".to_owned(),
            "quiet".to_owned(),
        ];
        // The kernel hands it to its init: a broken program is told how.
        let mutant = std::env::var("TENSORFERRY_MUTANT");
        words.extend(mutant.map(|name| format!("TENSORFERRY_MUTANT={name}")));
        words.extend(self.log.iter().map(|log| format!("ubd1={}", log.display())));
        launch(&words)
    }

    /// Looks at its disk while it is off.
    pub(crate) fn open_disk(&mut self) -> Result<(), String> {
        self.image.attach()
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.image.root()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = run(&["ip", "link", "del", TAP]);
    }
}
