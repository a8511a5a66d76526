//! Bytes a second, at most: a bucket that fills at the rate and from which all lanes of
//! a push take.

use crate::options::RateLimit;
use std::{
    io::Read as _,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::{sync::Notify, task::spawn_blocking, time::sleep};

/// What is not used is kept for this long: enough to make up for a timer that fires
/// late.
const BURST: Duration = Duration::from_millis(50);
/// How often a file with a rate is read.
const READ_INTERVAL: Duration = Duration::from_secs(1);
/// Most bytes of such a file.
const MAX_FILE_BYTES: u64 = 256;

/// A token bucket. What goes out may take it below nothing by one frame; the next one
/// waits until that is made up for. Time is an argument.
#[derive(Debug)]
pub(crate) struct TokenBucket {
    /// `None`: no limit.
    bytes_per_second: Option<u64>,
    credit_bytes: f64,
    at: Instant,
}

impl TokenBucket {
    pub(crate) fn new(bytes_per_second: Option<u64>, now: Instant) -> Self {
        TokenBucket {
            bytes_per_second,
            credit_bytes: 0.0,
            at: now,
        }
    }

    /// From now on another rate.
    pub(crate) fn set_rate(&mut self, bytes_per_second: Option<u64>, now: Instant) {
        self.fill(now);
        self.bytes_per_second = bytes_per_second;
    }

    /// How long the next frame has to wait.
    pub(crate) fn wait(&mut self, now: Instant) -> Duration {
        self.fill(now);
        let Some(rate) = self.bytes_per_second else {
            return Duration::ZERO;
        };
        let seconds = -self.credit_bytes / rate as f64;
        Duration::try_from_secs_f64(seconds.max(0.0)).unwrap_or(Duration::MAX)
    }

    /// A frame goes out.
    pub(crate) fn take(&mut self, bytes: u64, now: Instant) {
        self.fill(now);
        if self.bytes_per_second.is_some() {
            self.credit_bytes -= bytes as f64;
        }
    }

    fn fill(&mut self, now: Instant) {
        let elapsed = now.saturating_duration_since(self.at).as_secs_f64();
        self.at = self.at.max(now);
        match self.bytes_per_second {
            Some(rate) => {
                let most = rate as f64 * BURST.as_secs_f64();
                self.credit_bytes = (self.credit_bytes + rate as f64 * elapsed).min(most);
            }
            // What was sent without a limit is nobody's debt.
            None => self.credit_bytes = 0.0,
        }
    }
}

/// The bucket of one push, for all its sessions and lanes.
#[derive(Debug)]
pub(crate) struct Throttle {
    bucket: Mutex<TokenBucket>,
    /// Another rate is in force.
    changed: Notify,
}

impl Throttle {
    pub(crate) fn new(bytes_per_second: Option<u64>) -> Self {
        Throttle {
            bucket: Mutex::new(TokenBucket::new(bytes_per_second, Instant::now())),
            changed: Notify::new(),
        }
    }

    fn bucket(&self) -> MutexGuard<'_, TokenBucket> {
        self.bucket.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until a frame may go.
    pub(crate) async fn ready(&self) {
        loop {
            let changed = self.changed.notified();
            let wait = self.bucket().wait(Instant::now());
            if wait.is_zero() {
                return;
            }
            tokio::select! {
                () = sleep(wait) => {}
                () = changed => {}
            }
        }
    }

    /// A frame goes.
    pub(crate) fn take(&self, bytes: u64) {
        self.bucket().take(bytes, Instant::now());
    }

    pub(crate) fn set_rate(&self, bytes_per_second: Option<u64>) {
        self.bucket().set_rate(bytes_per_second, Instant::now());
        self.changed.notify_waiters();
    }

    /// Reads a file with a rate again and again. What cannot be read or understood
    /// leaves the rate as it is.
    pub(crate) async fn follow(self: Arc<Self>, path: std::path::PathBuf) {
        let mut is_bad = false;
        loop {
            sleep(READ_INTERVAL).await;
            let file = path.clone();
            let read = spawn_blocking(move || read_rate(&file)).await;
            match read.unwrap_or_else(|error| Err(error.to_string())) {
                Ok(rate) => {
                    is_bad = false;
                    self.set_rate(rate);
                }
                Err(error) if !is_bad => {
                    is_bad = true;
                    tracing::warn!(%error, "the last rate stays in force");
                }
                Err(_) => {}
            }
        }
    }
}

/// The rate that a file holds; `None` = no limit.
pub(crate) fn read_rate(path: &Path) -> Result<Option<u64>, String> {
    let at = |error: String| format!("{}: {error}", path.display());
    let mut text = String::new();
    std::fs::File::open(path)
        .and_then(|file| file.take(MAX_FILE_BYTES).read_to_string(&mut text))
        .map_err(|error| at(error.to_string()))?;
    RateLimit::parse_rate(text.trim()).map_err(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Sends frames of these lengths in turn whenever the bucket lets it, for a time, with
    /// timers that fire up to `late` after their time. Returns when each went.
    fn send(
        bucket: &mut TokenBucket,
        begun: Instant,
        time: Duration,
        lens: &[u64],
        late: Duration,
    ) -> Vec<(Duration, u64)> {
        let (mut now, mut sent) = (begun, Vec::new());
        for (i, len) in lens.iter().cycle().enumerate() {
            let wait = bucket.wait(now);
            if !wait.is_zero() {
                now += wait + late * (i as u32 % 3) / 2;
            }
            if now >= begun + time {
                return sent;
            }
            bucket.take(*len, now);
            sent.push((now - begun, *len));
        }
        sent
    }

    #[test]
    fn the_rate_is_exact_whatever_the_frames_and_however_late_the_timers() {
        for rate in [100_000u64, 10_000_000, 1_500_000_000] {
            for lens in [&[1 << 20][..], &[1 << 18, 100, 1 << 20], &[8 << 20]] {
                for late_ms in [0, 2, 40] {
                    let begun = Instant::now();
                    let mut bucket = TokenBucket::new(Some(rate), begun);
                    let time = SECOND * 1000;
                    let late = Duration::from_millis(late_ms);
                    let sent: u64 = send(&mut bucket, begun, time, lens, late)
                        .iter()
                        .map(|(_, len)| len)
                        .sum();
                    let share = sent as f64 / (rate as f64 * time.as_secs_f64());
                    // The first frame goes at once.
                    let most = 1.0 + (8 << 20) as f64 / (rate as f64 * 1000.0) + 1e-6;
                    assert!(
                        (0.999..=most).contains(&share),
                        "{rate} {lens:?} {late_ms}: {share}"
                    );
                }
            }
        }
    }

    #[test]
    fn no_burst_is_longer_than_a_frame_and_a_twentieth_of_a_second() {
        let (rate, len) = (10_000_000u64, 1 << 18);
        let begun = Instant::now();
        let mut bucket = TokenBucket::new(Some(rate), begun);
        // After a minute of silence too.
        let resumed = begun + SECOND * 60;
        let sent = send(
            &mut bucket,
            resumed,
            SECOND * 10,
            &[len],
            Duration::from_millis(5),
        );
        for (i, (first, _)) in sent.iter().enumerate() {
            let mut bytes = 0;
            for (at, len) in &sent[i..] {
                bytes += len;
                let fair = (*at - *first).as_secs_f64() * rate as f64;
                let burst = bytes as f64 - fair;
                // A frame, and what a twentieth of a second brings.
                let most = *len as f64 + rate as f64 * 0.05;
                assert!(burst <= most + 1.0, "{burst} bytes at once");
            }
        }
    }

    #[test]
    fn another_rate_counts_from_the_moment_it_is_set() {
        let begun = Instant::now();
        let mut bucket = TokenBucket::new(Some(1_000), begun);
        bucket.take(1_000_000, begun);
        assert_eq!(bucket.wait(begun), SECOND * 1000);
        bucket.set_rate(Some(1_000_000), begun + SECOND * 500);
        let wait = bucket.wait(begun + SECOND * 500);
        assert!(wait <= SECOND && wait >= SECOND / 4, "{wait:?}");
        bucket.set_rate(None, begun + SECOND * 500);
        assert_eq!(bucket.wait(begun + SECOND * 500), Duration::ZERO);
        // And back: what went without a limit is no debt.
        bucket.take(1 << 40, begun + SECOND * 501);
        bucket.set_rate(Some(1_000), begun + SECOND * 502);
        assert_eq!(bucket.wait(begun + SECOND * 502), Duration::ZERO);
    }

    #[tokio::test]
    async fn who_waits_for_a_slow_rate_goes_when_it_is_lifted() {
        let throttle = Arc::new(Throttle::new(Some(1)));
        throttle.take(1 << 30);
        let waiting = tokio::spawn({
            let throttle = Arc::clone(&throttle);
            async move { throttle.ready().await }
        });
        tokio::task::yield_now().await;
        throttle.set_rate(None);
        tokio::time::timeout(SECOND * 60, waiting)
            .await
            .unwrap()
            .unwrap();
    }
}
