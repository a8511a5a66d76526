//! What users may choose, with defaults and units.

use crate::{
    error::Error,
    format::codec::CodecChoice,
    plan::{CHUNK_LEN_DEFAULT, CHUNK_LEN_MAX, Grid},
    protocol::{CommitMode, Layout},
    source::ReadMode,
};
use std::time::Duration;

/// Memory for chunks on their way, in one role of one process.
pub const BUDGET_BYTES_DEFAULT: u64 = 128 << 20;
/// Connections of a push.
pub(crate) const LANES_DEFAULT: u32 = 2;
/// Most connections of a push.
pub const LANES_MAX: u32 = 16;
/// Least memory of a server, in bytes: the longest chunk that a sender may ask for.
pub(crate) const BUDGET_BYTES_MIN: u64 = CHUNK_LEN_MAX as u64;
/// HTTP/2 stream and connection window of one lane, in bytes.
pub(crate) const HTTP2_WINDOW_BYTES: u32 = 32 << 20;
/// Largest HTTP/2 frame, in bytes: the default of 16 KiB costs three quarters of
/// the throughput.
pub(crate) const HTTP2_FRAME_BYTES: u32 = 1 << 20;
/// A silent connection is probed after this time …
pub(crate) const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
/// … and given up after this.
pub(crate) const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(15);

/// How a checkpoint is pushed.
///
/// ```
/// use tensorferry::{CommitMode, PushOptions};
///
/// let mut options = PushOptions::default();
/// options.commit_mode = CommitMode::Strict;
/// options.chunk_len = Some(256 << 10);
/// options.overwrite = true;
/// assert_eq!(options.budget_bytes, 128 << 20);
/// ```
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct PushOptions {
    /// Wished chunk length in bytes: a power of two from 256 KiB to 8 MiB. Only
    /// heeded when a transfer begins.
    pub chunk_len: Option<u32>,
    /// How often written bytes become durable.
    pub commit_mode: CommitMode,
    /// How the files are named.
    pub layout: Layout,
    /// Replace a published checkpoint of the same name.
    pub overwrite: bool,
    /// Throw unfinished work of that name away first, whoever it belongs to.
    pub restart: bool,
    /// The receiver reads everything back before it publishes.
    pub verify: bool,
    /// Attempts in a row without any progress after which the push gives up.
    pub retries: u32,
    /// Memory for chunks on their way, in bytes.
    pub budget_bytes: u64,
    /// Connections, 1 to [`LANES_MAX`]; the receiver may allow fewer.
    pub lanes: u32,
    /// How chunks are compressed.
    pub codec: CodecChoice,
    /// How the source is read.
    pub read_mode: ReadMode,
}

impl Default for PushOptions {
    fn default() -> Self {
        PushOptions {
            chunk_len: None,
            commit_mode: CommitMode::Group,
            layout: Layout::Named,
            overwrite: false,
            restart: false,
            verify: false,
            retries: 5,
            budget_bytes: BUDGET_BYTES_DEFAULT,
            lanes: LANES_DEFAULT,
            codec: CodecChoice::Auto,
            read_mode: ReadMode::Auto,
        }
    }
}

impl PushOptions {
    /// # Errors
    /// A value is out of its range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        if !(1..=LANES_MAX).contains(&self.lanes) {
            return Err(Error::Usage(format!(
                "{} lanes: from 1 to {LANES_MAX} are possible",
                self.lanes
            )));
        }
        Grid::new(self.chunk_len.unwrap_or(CHUNK_LEN_DEFAULT))?;
        Ok(())
    }
}
