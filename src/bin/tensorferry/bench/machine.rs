//! The machine in words, and the day.

use serde::Serialize;
use std::{
    fs,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

/// Where something was measured.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cores: usize,
    pub(super) memory_bytes: u64,
    pub(super) kernel: String,
}

impl Machine {
    pub(super) fn here() -> Machine {
        let info = fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let cpu = value_of(&info, "model name").unwrap_or(std::env::consts::ARCH);
        let uname = rustix::system::uname();
        let release = uname.release().to_string_lossy();
        // What a distribution adds to the version says nothing to others.
        let version = release.split('-').next().unwrap_or_default();
        Machine {
            cpu: cpu.to_owned(),
            cores: std::thread::available_parallelism().map_or(1, usize::from),
            memory_bytes: memory_bytes("MemTotal"),
            kernel: format!("{} {version}", uname.sysname().to_string_lossy()),
        }
    }

    /// `AMD EPYC, 2 cores, 24 GiB, Linux 6.18`.
    pub(super) fn words(&self) -> String {
        format!(
            "{}, {}, {:.0} GiB, {}",
            self.cpu,
            crate::units::count(self.cores as u64, "core"),
            self.memory_bytes as f64 / f64::from(1 << 30),
            self.kernel
        )
    }
}

/// Memory that can be had without swapping.
pub(super) fn available_memory_bytes() -> u64 {
    memory_bytes("MemAvailable")
}

fn memory_bytes(key: &str) -> u64 {
    let info = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let kib = value_of(&info, key).and_then(|v| v.split(' ').next()?.parse().ok());
    kib.map_or(0, |kib: u64| kib << 10)
}

/// The value behind `key : `.
fn value_of<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    let line = text.lines().find(|line| line.starts_with(key))?;
    line.split_once(':').map(|(_, value)| value.trim())
}

/// Type of the file system that holds a folder.
pub(super) fn file_system(folder: &Path) -> String {
    let folder = folder.canonicalize().unwrap_or_else(|_| folder.to_owned());
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let rows = mounts.lines().filter_map(|line| {
        let mut words = line.split(' ').skip(1);
        Some((words.next()?.replace("\\040", " "), words.next()?))
    });
    let holds = rows.filter(|(mount, _)| folder.starts_with(mount));
    let found = holds.max_by_key(|(mount, _)| mount.len());
    found.map_or("unknown".to_owned(), |(_, kind)| kind.to_owned())
}

/// Today in UTC: `2026-11-22`.
pub(super) fn date() -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    date_of_day(now.map_or(0, |now| now.as_secs() / 86_400))
}

/// The date of a day, counted from 1970-01-01: the calendar repeats every 400 years,
/// and a year that begins in March has its odd day at its end.
fn date_of_day(day: u64) -> String {
    let day = day + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let (month, carry) = if month < 10 {
        (month + 3, 0)
    } else {
        (month - 9, 1)
    };
    format!("{:04}-{month:02}-{day:02}", year + era * 400 + carry)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn days_become_dates() {
        for (day, date) in [
            (0, "1970-01-01"),
            (58, "1970-02-28"),
            (59, "1970-03-01"),
            (11_016, "2000-02-29"),
            (11_017, "2000-03-01"),
            (20_779, "2026-11-22"),
            (47_541, "2100-03-01"),
        ] {
            assert_eq!(date_of_day(day), date, "{day}");
        }
    }

    #[test]
    fn the_machine_has_a_name_and_its_folders_a_file_system() {
        let machine = Machine::here();
        assert!(machine.cores > 0 && machine.memory_bytes > 0);
        assert!(machine.kernel.starts_with("Linux "));
        assert_eq!(file_system(Path::new("/proc")), "proc");
    }
}
