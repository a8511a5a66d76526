//! The product's own client as a process, and a source folder for it.

use crate::{
    dice::Dice,
    frames::{Load, blob, noise, tensor_with},
    server::Group,
};
use std::{
    fs,
    net::SocketAddr,
    os::unix::process::{CommandExt, ExitStatusExt},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};
use tensorferry::format::npy::encode_header;

/// A folder of `.npy` files and what should land of it.
pub(crate) struct Source {
    pub(crate) folder: PathBuf,
    pub(crate) load: Load,
}

impl Source {
    /// `bytes` in some tensors, old enough to count as settled.
    pub(crate) fn make(folder: &Path, dice: &mut Dice, bytes: u64) -> Source {
        fs::create_dir_all(folder).expect("the source can be made");
        let mut parts = Vec::new();
        let lens = [bytes / 2, bytes / 4, bytes / 4, 100, 0];
        for (i, len) in lens.into_iter().enumerate() {
            let content = noise(&format!("{:x}", dice.next()), len as usize);
            let header = encode_header("|u1", false, &[len]);
            let name = format!("layer{i}");
            let file = folder.join(format!("{name}.npy"));
            fs::write(file, [&header[..], &content].concat()).expect("the source can be made");
            parts.push(tensor_with(&name, content));
        }
        let config = noise(&format!("{:x}", dice.next()), 300);
        fs::write(folder.join("config.json"), &config).expect("the source can be made");
        parts.push(blob("config.json", &config));
        std::thread::sleep(Duration::from_millis(2100));
        Source {
            folder: folder.to_owned(),
            load: Load::of(parts),
        }
    }

    /// Its largest file.
    pub(crate) fn largest(&self) -> PathBuf {
        self.folder.join("layer0.npy")
    }
}

/// A push under way.
pub(crate) struct Push {
    child: Child,
    group: Group,
    out: PathBuf,
    err: PathBuf,
}

impl Push {
    pub(crate) fn start(
        binary: &Path,
        source: &Source,
        address: SocketAddr,
        name: &str,
        options: &[&str],
        logs: &Path,
    ) -> Push {
        let (out, err) = (
            logs.join(format!("{}.out", name.replace('/', "-"))),
            logs.join("push.err"),
        );
        let file = |path: &Path| fs::File::create(path).expect("the log can be made");
        let child = Command::new(binary)
            .arg("push")
            .arg(&source.folder)
            .arg(format!("ferry://{address}/{name}"))
            .args(["--format", "json", "--chunk", "256K"])
            .args(options)
            .stdin(Stdio::null())
            .stdout(file(&out))
            .stderr(file(&err))
            .process_group(0)
            .spawn()
            .expect("the program runs");
        let group = Group::of(&child);
        Push {
            child,
            group,
            out,
            err,
        }
    }

    pub(crate) fn group(&self) -> Group {
        self.group
    }

    /// Its exit status, when it ends in time.
    pub(crate) fn wait(&mut self, limit: Duration) -> Option<ExitStatus> {
        let until = Instant::now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return Some(status),
                _ if Instant::now() >= until => return None,
                _ => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Ends with this status in time.
    pub(crate) fn expect(&mut self, code: i32, limit: Duration) -> Result<(), String> {
        match self.wait(limit) {
            Some(status) if status.code() == Some(code) => Ok(()),
            Some(status) => Err(format!(
                "the push ended with {:?}, signal {:?}: {}",
                status.code(),
                status.signal(),
                self.stderr()
            )),
            None => Err(format!(
                "the push still runs after {limit:?}: {}",
                self.stderr()
            )),
        }
    }

    pub(crate) fn stderr(&self) -> String {
        fs::read_to_string(&self.err).unwrap_or_default()
    }

    /// A number of its last line.
    pub(crate) fn figure(&self, key: &str) -> Option<u64> {
        let text = fs::read_to_string(&self.out).ok()?;
        let last: serde_json::Value = serde_json::from_str(text.lines().last()?).ok()?;
        last[key].as_u64()
    }
}

impl Drop for Push {
    fn drop(&mut self) {
        self.group.kill();
        let _ = self.child.wait();
    }
}
