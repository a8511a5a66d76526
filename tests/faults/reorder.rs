//! Losses of power between any two writes of a disk that keeps only what was flushed.
//!
//! A guest records every write to its disk while the oracle pushes to it. From the log come
//! the disks that a cut could have left: all up to a flush, and of what came after it any
//! blocks. Each is mounted, compared with what had been promised by then, and served again.

use crate::{
    campaign::{IMAGE_MIB, MAX_BYTES, folder_of},
    dice::Dice,
    guest::Guest,
    mount::Image,
    oracle::{self, End, Manner},
    recorder::Recorder,
    scenario::{Report, Setting, is_root},
    server::{Serve, Server, has_tool, run},
    strike::Strike,
    track::{Clock, Published, Tally, Track},
    write_log::{Replay, WriteLog},
};
use std::{
    fs::File,
    path::{Path, PathBuf},
    time::Duration,
};

/// Cuts of one recording.
const CUTS: u64 = 50;
/// Every so many cuts, the push is brought to its end.
const COMPLETED: u64 = 10;

/// Cuts of a disk that reorders.
pub(crate) fn reorder(setting: &Setting) -> Report {
    let title = "power cuts between any two writes (dm-log-writes)";
    let Some(kernel) = std::env::var_os("TENSORFERRY_UML").map(PathBuf::from) else {
        return Report::skipped(title, "TENSORFERRY_UML names no User-Mode Linux kernel");
    };
    let Some(tree) = kernel.ancestors().nth(3).map(Path::to_owned) else {
        return Report::skipped(
            title,
            "TENSORFERRY_UML does not lie in usr/bin of its package",
        );
    };
    if !is_root() || !["losetup", "ip", "dmsetup"].iter().all(|t| has_tool(t)) {
        return Report::skipped(
            title,
            "only root can mount; losetup, ip, dmsetup are needed",
        );
    }
    let mut report = Report::new(title);
    let (mut left, mut seed, mut barriers) = (setting.points(20), setting.seed, 0);
    while left > 0 && report.failures.len() < 5 {
        let cuts = left.min(CUTS);
        let folder = folder_of(&setting.workdir, "reorder", seed);
        let _ = std::fs::remove_dir_all(&folder);
        std::fs::create_dir_all(&folder).expect("the work folder can be made");
        let again = format!("reorder --seed {seed} --points {cuts}");
        let mut recording = Recording {
            setting,
            folder: &folder,
            dice: Dice::new(seed),
            tracks: Vec::new(),
            tally: Tally::default(),
            failures: Vec::new(),
        };
        let result = recording.run(&kernel, &tree, cuts);
        recording.failures.extend(result.as_ref().err().cloned());
        barriers += result.unwrap_or(0);
        let (tally, failures) = (recording.tally, recording.failures);
        report.take(&again, &tally, failures);
        if report.failures.is_empty() {
            let _ = std::fs::remove_dir_all(&folder);
        }
        left -= cuts;
        seed += 1;
    }
    report.remarks.push(format!("{barriers} flushes recorded"));
    report
}

/// One boot of the guest, and the cuts of what it wrote.
struct Recording<'a> {
    setting: &'a Setting,
    folder: &'a Path,
    dice: Dice,
    tracks: Vec<Track>,
    tally: Tally,
    failures: Vec<String>,
}

impl Recording<'_> {
    /// How many flushes there were.
    fn run(&mut self, kernel: &Path, tree: &Path, cuts: u64) -> Result<usize, String> {
        let mut image = Image::make(self.folder, "ext4", IMAGE_MIB)?;
        image.detach()?;
        let before = self.folder.join("before.img");
        run(&["cp", &shown(image.file()), &shown(&before)])?;
        let log = self.record(kernel, tree, image)?;
        let disk = File::options().read(true).write(true).open(&before);
        let disk = disk.map_err(|e| e.to_string())?;
        let mut replay = Replay::new(&log, &disk);
        let mut points: Vec<usize> = (0..cuts).map(|_| self.pick(&log)).collect();
        points.sort_unstable();
        for (i, at) in (0..).zip(points) {
            let copy = self.folder.join("cut.img");
            let cut = (|| {
                replay.advance(at)?;
                std::fs::remove_file(&copy).or_else(|e| match e.kind() {
                    std::io::ErrorKind::NotFound => Ok(()),
                    _ => Err(e),
                })?;
                run(&["cp", &shown(&before), &shown(&copy)]).map_err(std::io::Error::other)?;
                let copy = File::options().write(true).open(&copy)?;
                replay.cut(&copy, at, &mut self.dice)
            })();
            cut.map_err(|e: std::io::Error| format!("the cut after write {at}: {e}"))?;
            let count = log.mark_before(at).ok_or("a cut before the first mark")?;
            self.judge(copy, count, at, i % COMPLETED == 0)?;
            self.tally.points += 1;
        }
        Ok(log.barriers().len())
    }

    /// Pushes to a guest whose disk is recorded.
    fn record(&mut self, kernel: &Path, tree: &Path, image: Image) -> Result<WriteLog, String> {
        let mut recorder = Recorder::new(tree, self.folder, IMAGE_MIB << 20)?;
        let (binary, folder) = (&self.setting.binary, self.folder);
        let mut guest = Guest::new(kernel.to_owned(), binary, folder, image, Some(&recorder))?;
        let server = guest.start()?;
        let clock = Clock::default();
        let track_count = self.dice.between(1, 2);
        for i in 0..track_count {
            let name = format!("run{i}/step");
            let mut track = Track::new(&name, &mut self.dice, MAX_BYTES / track_count);
            if self.dice.chance(50) {
                // Something to be replaced.
                self.push(&mut track, &server, None, &Manner::default(), true)?;
                track.next_version(&mut self.dice);
            }
            track.set_clock(&clock);
            self.tracks.push(track);
        }
        recorder.begin(&clock);
        let mut tracks = std::mem::take(&mut self.tracks);
        for track in &mut tracks {
            // A mark takes the guest some 30 ms.
            let pause = Duration::from_micros(self.dice.below(40_000));
            let leave_after = Some(self.dice.below(60));
            for leave_after in [leave_after, None] {
                let manner = Manner {
                    pause,
                    leave_after,
                    ..Manner::default()
                };
                self.push(track, &server, None, &manner, leave_after.is_none())?;
            }
        }
        self.tracks = tracks;
        let log = recorder.end()?;
        server.kill();
        // The file is gone by its name only.
        drop(recorder);
        Ok(log)
    }

    fn push(
        &mut self,
        track: &mut Track,
        server: &Server,
        root: Option<&Path>,
        manner: &Manner,
        completes: bool,
    ) -> Result<(), String> {
        let dice = Dice::new(self.dice.next());
        let session = oracle::push(track, server.address, root, Strike::none(), manner, dice);
        let end = self.setting.runtime.block_on(session);
        self.failures.append(&mut track.failures);
        match completes && end != End::Done {
            true => Err(format!("{} cannot be completed: {end:?}", track.name)),
            false => Ok(()),
        }
    }

    /// A place in the log; flushes are few, and most is at stake right at one.
    fn pick(&mut self, log: &WriteLog) -> usize {
        let cuts = log.cuts();
        let barriers = log.barriers();
        match barriers.is_empty() || self.dice.chance(50) {
            true => cuts.start + self.dice.below(cuts.len() as u64) as usize,
            false => barriers[self.dice.below(barriers.len() as u64) as usize],
        }
    }

    /// Compares a disk with what had been promised, and serves from it.
    fn judge(
        &mut self,
        disk: PathBuf,
        count: u64,
        at: usize,
        completes: bool,
    ) -> Result<(), String> {
        let image = Image::adopt(disk, self.folder.join("cut"))
            .map_err(|e| format!("the disk of the cut after write {at}: {e}"))?;
        let root = image.root();
        let mut tracks: Vec<Track> = self.tracks.iter().map(|t| t.as_of(count)).collect();
        for track in &mut tracks {
            track.tally = Tally::default();
            track.check_disk(&root);
        }
        let server = Serve::new(&self.setting.binary).start(&root)?;
        for track in &mut tracks {
            let is_new = matches!(track.published(&root.join(&track.name)), Published::New);
            if is_new && !completes {
                continue;
            }
            let leaves = Manner {
                leave_after: Some(1),
                ..Manner::default()
            };
            self.push(track, &server, Some(&root), &leaves, false)?;
            if completes {
                self.push(track, &server, Some(&root), &Manner::default(), true)?;
                track.check_disk(&root);
            }
        }
        server.kill();
        for track in &mut tracks {
            self.tally.add(&track.tally);
            let told = track.failures.drain(..);
            self.failures
                .extend(told.map(|why| format!("{why} (cut after write {at})")));
        }
        Ok(())
    }
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}
