//! Deaths of the server process, and losses of power.

use crate::{
    campaign::{Episode, Ground, IMAGE_MIB, ROUNDS, folder_of},
    guest::Guest,
    mount::Image,
    scenario::{Report, Setting, is_root},
    server::{Serve, has_tool},
};

/// `kill -9` of the server at random moments.
pub(crate) fn kills(setting: &Setting) -> Report {
    let mut report = Report::new("kill -9 of the server");
    let points = setting.points(20);
    episodes(setting, &mut report, "kills", points, |folder| {
        Ok(Ground::Folder(folder.to_owned()))
    });
    report
}

/// Power cuts of a file system.
pub(crate) fn power(setting: &Setting, kind: &str) -> Report {
    let title = format!("power cuts, {kind}");
    if !is_root() {
        return Report::skipped(title, "only root can mount");
    }
    if !has_tool(&format!("mkfs.{kind}")) || !has_tool("losetup") {
        return Report::skipped(title, "no tools for this file system");
    }
    let mut report = Report::new(title);
    let command = format!("power-{kind}");
    let points = setting.points(20);
    episodes(setting, &mut report, &command, points, |folder| {
        Image::make(folder, kind, IMAGE_MIB).map(Ground::Disk)
    });
    report
}

/// `kill -9` of a guest: everything that its kernel had not written is gone.
pub(crate) fn guests(setting: &Setting) -> Report {
    let title = "power cuts of a guest";
    let Some(kernel) = std::env::var_os("TENSORFERRY_UML") else {
        return Report::skipped(title, "TENSORFERRY_UML names no User-Mode Linux kernel");
    };
    if !is_root() || !has_tool("losetup") || !has_tool("ip") {
        return Report::skipped(title, "only root can mount, and ip is needed");
    }
    let mut report = Report::new(title);
    let points = setting.points(3);
    episodes(setting, &mut report, "guest", points, |folder| {
        let image = Image::make(folder, "ext4", IMAGE_MIB)?;
        let guest = Guest::new(kernel.clone().into(), &setting.binary, folder, image, None)?;
        Ok(Ground::Machine(guest))
    });
    report
}

fn episodes(
    setting: &Setting,
    report: &mut Report,
    command: &str,
    points: u64,
    ground: impl Fn(&std::path::Path) -> Result<Ground, String>,
) {
    let mut left = points;
    let mut seed = setting.seed;
    while left > 0 && report.failures.len() < 5 {
        let rounds = left.min(ROUNDS);
        let folder = folder_of(&setting.workdir, command, seed);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("the work folder can be made");
        let again = format!("{command} --seed {seed} --points {rounds}");
        match ground(&folder) {
            Ok(ground) => {
                let serve = Serve::new(&setting.binary);
                let episode = Episode::new(&setting.runtime, serve, ground, seed);
                let (tally, failures) = episode.run(rounds);
                report.take(&again, &tally, failures);
            }
            Err(why) => report.check(&again, Err(why)),
        }
        if report.failures.is_empty() {
            let _ = std::fs::remove_dir_all(&folder);
        }
        left -= rounds;
        seed += 1;
    }
}
