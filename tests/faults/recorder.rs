//! Has a guest's kernel record every write to its disk, with marks that say how much had
//! been promised by then.

use crate::{track::Clock, write_log::WriteLog};
use std::{
    fs::File,
    io::Write,
    net::TcpListener,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

/// The name of the last mark.
const END: &str = "end";
/// Between two marks; each costs the guest a process.
const STEP: Duration = Duration::from_millis(15);
const PATIENCE: Duration = Duration::from_secs(60);

/// A log of writes and the thread that asks for its marks.
pub(crate) struct Recorder {
    modules: PathBuf,
    kmod: PathBuf,
    log: PathBuf,
    disk_bytes: u64,
    port: u16,
    begun: mpsc::Sender<Clock>,
    ended: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Recorder {
    /// For a disk of so many bytes. `tree` is where the guest's kernel was unpacked, with
    /// its modules and with insmod.
    pub(crate) fn new(tree: &Path, folder: &Path, disk_bytes: u64) -> Result<Recorder, String> {
        let all = tree.join("usr/lib/uml/modules");
        let version = std::fs::read_dir(&all)
            .ok()
            .and_then(|mut d| d.next()?.ok());
        let version = version.ok_or_else(|| format!("no modules in {}", all.display()))?;
        let log = folder.join("log.img");
        let made = File::create(&log).and_then(|f| f.set_len(16 << 30));
        made.map_err(|e| format!("make {}: {e}", log.display()))?;
        let listener = TcpListener::bind("0.0.0.0:0").map_err(|e| e.to_string())?;
        let port = listener.local_addr().map_err(|e| e.to_string())?.port();
        let (begun, begins) = mpsc::channel();
        let ended = Arc::new(AtomicBool::new(false));
        let is_over = ended.clone();
        let thread = std::thread::spawn(move || ask_for_marks(&listener, &begins, &is_over));
        Ok(Recorder {
            modules: version.path().join("kernel/drivers/md"),
            kmod: tree.join("bin/kmod"),
            log,
            disk_bytes,
            port,
            begun,
            ended,
            thread: Some(thread),
        })
    }

    pub(crate) fn log(&self) -> &Path {
        &self.log
    }

    /// Lines of the guest's init that mount `disk` on `point` and note its writes on `log`.
    pub(crate) fn mount_through(&self, host: &str, disk: &str, log: &str, point: &str) -> String {
        let (kmod, modules) = (self.kmod.display(), self.modules.display());
        let (sectors, port) = (self.disk_bytes / 512, self.port);
        format!(
            "export DM_DISABLE_UDEV=1\n\
             (exec -a insmod {kmod} {modules}/dm-mod.ko)\n\
             (exec -a insmod {kmod} {modules}/dm-log-writes.ko)\n\
             dmsetup create written \
             --table '0 {sectors} log-writes {disk} {log}'\n\
             mount /dev/mapper/written {point}\n\
             (renice -n -20 $BASHPID; exec 3<>/dev/tcp/{host}/{port}\n\
             while read -r mark <&3; do dmsetup message written 0 mark $mark; done) >/dev/null 2>&1 &"
        )
    }

    /// From now on marks are set, named by what `clock` shows.
    pub(crate) fn begin(&self, clock: &Clock) {
        let _ = self.begun.send(clock.clone());
    }

    /// Sets the last mark and waits until the guest has logged it.
    pub(crate) fn end(&mut self) -> Result<WriteLog, String> {
        self.ended.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            thread.join().map_err(|_| "no marks could be set")?;
        }
        let until = Instant::now() + PATIENCE;
        while Instant::now() < until {
            match WriteLog::read(&self.log, END) {
                Ok(Some(log)) => return Ok(log),
                Ok(None) => std::thread::sleep(Duration::from_millis(100)),
                Err(e) => return Err(format!("{}: {e}", self.log.display())),
            }
        }
        Err("the last mark does not come".to_owned())
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        let _ = &self.log;
    }
}

/// The guest takes one line for each mark.
fn ask_for_marks(listener: &TcpListener, begins: &mpsc::Receiver<Clock>, ended: &AtomicBool) {
    let (mut guest, _) = listener.accept().expect("the guest connects");
    guest.set_nodelay(true).expect("a socket");
    let Ok(clock) = begins.recv() else { return };
    let mut last = None;
    while !ended.load(Ordering::Acquire) {
        // Whatever is counted here was heard before, so its writes are logged before the mark.
        let now = clock.load(Ordering::Acquire);
        if last != Some(now) {
            writeln!(guest, "{now}").expect("the guest reads");
            last = Some(now);
        }
        std::thread::sleep(STEP);
    }
    writeln!(guest, "{}\n{END}", clock.load(Ordering::Acquire)).expect("the guest reads");
    // The guest reads what is on its way also after this end is closed.
}
