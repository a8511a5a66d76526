//! Single bits that flip: on the wire, in the journal, in staged and in published files.
//!
//! What is damaged on its way or in the journal is noticed before it is published, or the
//! published files are right all the same. What is damaged on the disk is noticed before
//! with `--verify`, and by `verify` always.

use crate::{
    dice::Dice,
    frames::{Load, blob, noise, tensor_with},
    oracle::{self, End, Manner},
    relay::{Relay, Weather},
    scenario::{Report, Setting},
    server::{Serve, Server},
    strike::Strike,
    track::{Track, file_of, whole},
};
use std::{
    fs::{self, File},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Of a `.npy` file: its header with the padding.
const PREFIX_LEN: u64 = 128;
/// Of the journal: behind this lie its records. The name is one of ours.
const JOURNAL_HEADER_LEN: u64 = 16;

/// Where a bit flips.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    WireHead,
    WirePayload,
    JournalHeader,
    JournalRecord,
    JournalTail,
    StagedHeader,
    StagedPadding,
    StagedPayload,
    StagedPayloadUnverified,
    PublishedHeader,
    PublishedPadding,
    PublishedPayload,
}

const PLACES: [Place; 12] = [
    Place::WireHead,
    Place::WirePayload,
    Place::JournalHeader,
    Place::JournalRecord,
    Place::JournalTail,
    Place::StagedHeader,
    Place::StagedPadding,
    Place::StagedPayload,
    Place::StagedPayloadUnverified,
    Place::PublishedHeader,
    Place::PublishedPadding,
    Place::PublishedPayload,
];

struct Bench<'a> {
    setting: &'a Setting,
    server: Server,
    root: PathBuf,
    dice: Dice,
    /// Flips that were noticed, and those that could do no harm.
    noticed: u64,
    harmless: u64,
}

/// Flips, in turn over all places.
pub(crate) fn flips(setting: &Setting) -> Report {
    let mut report = Report::new("flipped bits");
    let root = setting.folder("flips").join("root");
    let server = match Serve::new(&setting.binary).start(&root) {
        Ok(server) => server,
        Err(why) => {
            report.check("flips", Err(why));
            return report;
        }
    };
    let mut bench = Bench {
        setting,
        server,
        root,
        dice: Dice::new(0),
        noticed: 0,
        harmless: 0,
    };
    for i in 0..setting.points(240) {
        let seed = setting.seed + i;
        let place = PLACES[(seed % PLACES.len() as u64) as usize];
        bench.dice = Dice::new(seed);
        let result = bench.one(place);
        report.tally.points += 1;
        let again = format!("flips --seed {seed} --points 1 ({place:?})");
        report.check(&again, result);
        if report.failures.len() >= 5 {
            break;
        }
        if i % 50 == 0 && !bench.server.is_alive() {
            report.check(&again, Err("the server died".to_owned()));
            break;
        }
    }
    let remark = format!(
        "{} refused or reported, {} published right all the same",
        bench.noticed, bench.harmless
    );
    report.remarks.push(remark);
    let stopped = bench.server.stop();
    report.check("flips", stopped);
    report
}

impl Bench<'_> {
    fn one(&mut self, place: Place) -> Result<(), String> {
        let load = self.load(place);
        let mut track = Track::of("flips/step", &mut self.dice, load);
        let result = match place {
            Place::WireHead | Place::WirePayload => self.on_the_wire(&mut track),
            Place::PublishedHeader | Place::PublishedPadding | Place::PublishedPayload => {
                self.in_published(&mut track, place)
            }
            _ => self.in_staging(&mut track, place),
        };
        let failed = track.failures.pop();
        // The next one begins with an empty folder.
        let _ = fs::remove_dir_all(self.root.join("flips"));
        result.and(failed.map_or(Ok(()), Err))
    }

    /// Heads count for most of the bytes where tensors are tiny.
    fn load(&mut self, place: Place) -> Load {
        let dice = &mut self.dice;
        let mut noise_of = |len: u64| noise(&format!("{:x}", dice.next()), len as usize);
        let mut parts = vec![blob("config.json", &noise_of(60))];
        if place == Place::WireHead {
            for i in 0..30 {
                parts.push(tensor_with(&format!("t{i}"), noise_of(i * 3)));
            }
        } else {
            parts.push(tensor_with("large", noise_of(600_000)));
            parts.push(tensor_with("small", noise_of(5000)));
        }
        Load::of(parts)
    }

    fn push(&mut self, track: &mut Track, manner: &Manner) -> End {
        let address = self.server.address;
        self.push_to(track, manner, address)
    }

    fn push_to(&mut self, track: &mut Track, manner: &Manner, to: std::net::SocketAddr) -> End {
        let dice = Dice::new(self.dice.next());
        let push = oracle::push(track, to, Some(&self.root), Strike::none(), manner, dice);
        self.setting.runtime.block_on(push)
    }

    /// Pushes to the end, from nothing, and compares.
    fn anew(&mut self, track: &mut Track) -> Result<(), String> {
        track.forget_acks();
        track.restart = true;
        let end = self.push(track, &Manner::default());
        track.restart = false;
        if end != End::Done {
            return Err(format!("it cannot be pushed again: {end:?}"));
        }
        self.published(track)
    }

    fn published(&self, track: &Track) -> Result<(), String> {
        whole(&self.root.join(&track.name), &track.load)
    }

    fn on_the_wire(&mut self, track: &mut Track) -> Result<(), String> {
        let total = track.load.total_bytes() + 60 * track.load.parts.len() as u64 + 700;
        let flip = Some((self.dice.below(total), self.dice.below(8) as u8));
        let weather = Weather {
            flip,
            ..Weather::default()
        };
        let relay = Relay::start_on(self.setting.runtime.handle(), self.server.address, weather);
        // A flipped length makes both sides wait for what does not come.
        let manner = Manner {
            patience: Some(Duration::from_millis(700)),
            ..Manner::default()
        };
        let end = self.push_to(track, &manner, relay.address);
        match end {
            End::Done => self.harmless += 1,
            _ => self.noticed += 1,
        }
        // What a damaged answer or name led to is judged by what is published.
        track.failures.clear();
        for folder in checkpoints(&self.root) {
            whole(&folder, &track.load).map_err(|why| format!("published, and {why}"))?;
            fs::remove_dir_all(&folder).map_err(|e| e.to_string())?;
        }
        self.anew(track)
    }

    /// Half is sent, a bit flips, the rest is sent.
    fn in_staging(&mut self, track: &mut Track, place: Place) -> Result<(), String> {
        track.verify = place != Place::StagedPayloadUnverified;
        let manner = Manner {
            leave_after: Some(3),
            says_goodbye: true,
            ..Manner::default()
        };
        let end = self.push(track, &manner);
        let goodbye = matches!(&end, End::Refused(_, reason) if reason == "INTERRUPTED");
        if !goodbye {
            return Err(format!("an interrupted session ended with {end:?}"));
        }
        let Some(file) = self.staged_file(track, place) else {
            return Err("nothing is staged".to_owned());
        };
        self.flip(&file, place)?;
        track.forget_acks();
        // Cells of a damaged disk are the business of what follows, not of the oracle.
        let end = self.push(track, &Manner::default());
        if matches!(place, Place::StagedPayload | Place::StagedPayloadUnverified) {
            track.failures.clear();
        }
        match end {
            End::Done if place == Place::StagedPayloadUnverified => {
                let is_whole = self.published(track).is_ok();
                let exit = self.verify(&track.name)?;
                match (is_whole, exit) {
                    (true, 0) => self.harmless += 1,
                    (false, 6) => self.noticed += 1,
                    other => return Err(format!("whole, exit of verify: {other:?}")),
                }
                Ok(())
            }
            End::Done => {
                self.harmless += 1;
                self.published(track)
            }
            End::Refused(..) => {
                self.noticed += 1;
                if self.root.join(&track.name).join("manifest.json").exists() {
                    return Err("it was refused and published".to_owned());
                }
                self.anew(track)
            }
            End::Gone(why) => Err(format!("the connection was lost: {why}")),
        }
    }

    fn in_published(&mut self, track: &mut Track, place: Place) -> Result<(), String> {
        let end = self.push(track, &Manner::default());
        if end != End::Done {
            return Err(format!("a plain push ended with {end:?}"));
        }
        let part = &track.load.parts[1 + self.dice.below(2) as usize];
        let file = self.root.join(&track.name).join(file_of(part));
        self.flip(&file, place)?;
        match self.verify(&track.name)? {
            6 => {
                self.noticed += 1;
                Ok(())
            }
            exit => Err(format!("verify ends with {exit}")),
        }
    }

    fn staged_file(&mut self, track: &Track, place: Place) -> Option<PathBuf> {
        let staging = track.staging(&self.root);
        if matches!(
            place,
            Place::JournalHeader | Place::JournalRecord | Place::JournalTail
        ) {
            return Some(staging.join("journal"));
        }
        let files = track.load.parts[1..]
            .iter()
            .map(|p| staging.join("data").join(file_of(p)));
        let mut there: Vec<PathBuf> = files.filter(|f| f.exists()).collect();
        self.dice.shuffle(&mut there);
        there.pop()
    }

    fn flip(&mut self, path: &Path, place: Place) -> Result<(), String> {
        let shown = |e: std::io::Error| format!("{}: {e}", path.display());
        let file = File::options()
            .read(true)
            .write(true)
            .open(path)
            .map_err(shown)?;
        let len = file.metadata().map_err(shown)?.len();
        let mut head = [0; PREFIX_LEN as usize];
        let head_len = file.read_at(&mut head, 0).map_err(shown)?;
        // The dict ends with `}`; spaces and a line feed follow.
        let dict = head[..head_len].iter().rposition(|&b| b == b'}');
        let padding = dict.map_or(PREFIX_LEN - 1, |at| at as u64 + 1);
        let body_len = u32::from_le_bytes([head[12], head[13], head[14], head[15]]);
        let records = JOURNAL_HEADER_LEN + u64::from(body_len) + 4;
        let (first, end) = match place {
            Place::JournalHeader => (0, records),
            Place::JournalRecord => (records, len),
            Place::JournalTail => (len.saturating_sub(40), len),
            Place::StagedHeader | Place::PublishedHeader => (0, padding),
            Place::StagedPadding | Place::PublishedPadding => (padding, PREFIX_LEN),
            _ => (PREFIX_LEN, len),
        };
        let at = first + self.dice.below(end - first);
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).map_err(shown)?;
        byte[0] ^= 1 << self.dice.below(8);
        file.write_all_at(&byte, at).map_err(shown)
    }

    /// Exit status of the product's `verify`.
    fn verify(&self, name: &str) -> Result<i32, String> {
        let status = Command::new(&self.setting.binary)
            .arg("verify")
            .arg(self.root.join(name))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(|e| e.to_string())?;
        status.code().ok_or_else(|| format!("verify: {status}"))
    }
}

/// Every published folder beneath, whatever its name.
fn checkpoints(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        let path = entry.path();
        let is_ours = entry.file_name() != ".tensorferry" && path.is_dir();
        if is_ours && path.join("manifest.json").exists() {
            found.push(path);
        } else if is_ours {
            found.extend(checkpoints(&path));
        }
    }
    found
}
