//! Attempts at the same transfer, one after the other, as long as they help.

use crate::{
    error::Error,
    session::{Progress, cancelled},
};
use std::time::Duration;
use tokio::sync::watch;

/// Waits between attempts double from the first to the second of these.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// How many in a row have failed, and how many may.
#[derive(Debug)]
pub(crate) struct Attempts {
    fruitless: u32,
    retries: u32,
}

impl Attempts {
    /// `retries` = attempts in a row without progress after which it is enough.
    pub(crate) fn new(retries: u32) -> Self {
        Attempts {
            fruitless: 0,
            retries,
        }
    }

    /// One has failed. Returns how many without progress have by now, if another may
    /// follow: only bytes that stay on the receiver are progress.
    pub(crate) fn failed(&mut self, before: &Progress, after: &Progress) -> Option<u32> {
        self.fruitless = match after.durable_bytes > before.durable_bytes {
            true => 0,
            false => self.fruitless + 1,
        };
        (self.fruitless <= self.retries).then_some(self.fruitless)
    }

    /// Waits before the next one: a random half to whole of the doubled time, so that
    /// those who were cut off together do not come back together.
    ///
    /// # Errors
    /// [`Error::Interrupted`].
    pub(crate) async fn pause(&self, cancel: &mut watch::Receiver<bool>) -> Result<(), Error> {
        let doubled = BACKOFF.0.saturating_mul(1 << self.fruitless.min(10));
        let doubled = doubled.min(BACKOFF.1);
        let mut random = [0; 2];
        let _ = getrandom::fill(&mut random);
        let part = doubled / 2 * u32::from(u16::from_le_bytes(random)) / u32::from(u16::MAX);
        tokio::select! {
            () = tokio::time::sleep(doubled / 2 + part) => Ok(()),
            () = cancelled(cancel) => Err(Error::Interrupted),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_starts_the_count_anew() {
        let mut attempts = Attempts::new(2);
        let at = |durable_bytes| Progress {
            durable_bytes,
            ..Progress::default()
        };
        assert_eq!(attempts.failed(&at(0), &at(0)), Some(1));
        assert_eq!(attempts.failed(&at(0), &at(0)), Some(2));
        assert_eq!(attempts.failed(&at(0), &at(1)), Some(0));
        assert_eq!(attempts.failed(&at(1), &at(1)), Some(1));
        assert_eq!(attempts.failed(&at(1), &at(1)), Some(2));
        assert_eq!(attempts.failed(&at(1), &at(1)), None);
    }
}
