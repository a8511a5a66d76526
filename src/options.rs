//! What users may choose, with defaults and units.

use crate::{
    error::Error,
    format::codec::CodecChoice,
    plan::{CHUNK_LEN_DEFAULT, CHUNK_LEN_MAX, Grid},
    protocol::{CommitMode, Layout, NpyDtype, OutFormat},
    source::{Globs, ReadMode, SourceSet},
};
use std::{fmt, path::PathBuf, str::FromStr, time::Duration};

/// Memory for chunks on their way, in one role of one process.
pub const BUDGET_BYTES_DEFAULT: u64 = 128 << 20;
/// Chunks that the memory of a push holds for each of its lanes at least: one that
/// travels and one that is made ready.
pub(crate) const CHUNKS_PER_LANE: u64 = 2;
/// Least rate of a push, in bytes a second: twice what a server asks of a sender.
pub(crate) const RATE_MIN: u64 = 128 << 10;
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
    /// What the receiver writes. One safetensors file takes only what the format has a name
    /// for, in C order and little-endian, and no [`OpenPush`](crate::OpenPush).
    pub out_format: OutFormat,
    /// How `.npy` files name types that numpy has no name for.
    pub npy_dtype: NpyDtype,
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
    /// Connections; the receiver may allow fewer. The memory of `budget_bytes` must hold
    /// two chunks for each.
    pub lanes: Lanes,
    /// Most payload bytes a second, as they go on the wire, over all lanes together.
    pub rate_limit: RateLimit,
    /// How chunks are compressed.
    pub codec: CodecChoice,
    /// How the source is read.
    pub read_mode: ReadMode,
    /// Tensors with names like one of these go before the others, and the receiver makes
    /// each durable as soon as it is complete. Changes nothing in what lands.
    pub first: Vec<String>,
}

impl Default for PushOptions {
    fn default() -> Self {
        PushOptions {
            chunk_len: None,
            commit_mode: CommitMode::Group,
            layout: Layout::Named,
            out_format: OutFormat::Npy,
            npy_dtype: NpyDtype::Bytes,
            overwrite: false,
            restart: false,
            verify: false,
            retries: 5,
            budget_bytes: BUDGET_BYTES_DEFAULT,
            lanes: Lanes::Auto,
            rate_limit: RateLimit::None,
            codec: CodecChoice::Auto,
            read_mode: ReadMode::Auto,
            first: Vec::new(),
        }
    }
}

impl PushOptions {
    /// Whether a push of this source can begin, as far as this side can tell.
    ///
    /// # Errors
    /// [`Error::Usage`]: a value is out of its range, or the source does not fit
    /// [`PushOptions::out_format`].
    pub fn check_for(&self, source: &SourceSet) -> Result<(), Error> {
        self.check()?;
        Globs::new("send first", &self.first)?.check_used_in(source)?;
        match self.out_format {
            OutFormat::Npy => Ok(()),
            OutFormat::Safetensors => source.for_safetensors().map(drop).map_err(Error::Usage),
        }
    }

    /// # Errors
    /// A value is out of its range.
    pub(crate) fn check(&self) -> Result<(), Error> {
        let chunk_len = self.chunk_len.unwrap_or(CHUNK_LEN_DEFAULT);
        Grid::new(chunk_len)?;
        let lanes = match self.lanes {
            Lanes::Auto => 1,
            Lanes::Fixed(count) => count,
        };
        if !(1..=LANES_MAX).contains(&lanes) {
            return Err(Error::Usage(format!(
                "{lanes} lanes: from 1 to {LANES_MAX} are possible"
            )));
        }
        let needed = u64::from(lanes) * CHUNKS_PER_LANE * u64::from(chunk_len);
        if self.budget_bytes < needed {
            return Err(Error::Usage(format!(
                "a budget of {} bytes does not hold {CHUNKS_PER_LANE} chunks of {chunk_len} bytes for each of \
                 {lanes} lanes, {needed} bytes: raise the budget, or take fewer lanes or shorter chunks",
                self.budget_bytes
            )));
        }
        let is_npy = self.out_format == OutFormat::Npy;
        if !is_npy && (self.layout != Layout::Named || self.npy_dtype != NpyDtype::Bytes) {
            return Err(Error::Usage(
                "layout and npy dtype are about .npy files: a safetensors file has neither"
                    .to_owned(),
            ));
        }
        if let RateLimit::BytesPerSecond(rate) = self.rate_limit {
            check_rate(rate).map_err(Error::Usage)?;
        }
        Ok(())
    }
}

/// How many connections a push has.
///
/// ```
/// use tensorferry::{Lanes, PushOptions};
///
/// let mut options = PushOptions::default();
/// assert_eq!(options.lanes, Lanes::Auto);
/// options.lanes = Lanes::Fixed(4);
/// assert_eq!("4".parse(), Ok(options.lanes));
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Lanes {
    /// Two, or one on a machine with a single core; more as long as each brings clearly
    /// more, at most four for each core.
    #[default]
    Auto,
    /// So many, from 1 to [`LANES_MAX`].
    Fixed(u32),
}

impl FromStr for Lanes {
    type Err = String;

    /// Reads `auto` or a number.
    fn from_str(text: &str) -> Result<Lanes, String> {
        match text {
            "auto" => Ok(Lanes::Auto),
            number => number
                .parse()
                .ok()
                .filter(|count| (1..=LANES_MAX).contains(count))
                .map(Lanes::Fixed)
                .ok_or_else(|| format!("not `auto` nor a number from 1 to {LANES_MAX}")),
        }
    }
}

impl fmt::Display for Lanes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Lanes::Auto => f.write_str("auto"),
            Lanes::Fixed(count) => count.fmt(f),
        }
    }
}

/// How fast a push may be.
///
/// ```
/// use tensorferry::RateLimit;
///
/// assert_eq!("10M".parse(), Ok(RateLimit::BytesPerSecond(10 << 20)));
/// assert_eq!("1.5MB".parse(), Ok(RateLimit::BytesPerSecond(1_500_000)));
/// assert_eq!("off".parse(), Ok(RateLimit::None));
/// assert_eq!("@/run/rate".parse(), Ok(RateLimit::File("/run/rate".into())));
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum RateLimit {
    /// As fast as it can.
    #[default]
    None,
    /// So many bytes a second, at least 131,072: a server ends sessions of a sender that
    /// is half as slow.
    BytesPerSecond(u64),
    /// What this file says, read again each second: a rate as [`RateLimit`] is parsed.
    /// When it cannot be read or understood, the last rate stays in force.
    File(PathBuf),
}

impl RateLimit {
    /// Reads `10M`, `1.5GiB` (powers of 1,024), `5MB` (powers of 1,000) or bytes, a
    /// second; `None` for `0` and `off`.
    pub(crate) fn parse_rate(text: &str) -> Result<Option<u64>, String> {
        if matches!(text, "0" | "off") {
            return Ok(None);
        }
        let bad = || {
            "a rate is bytes a second with a unit, such as 10M, 1.5GiB or 5MB, or `off`".to_owned()
        };
        let number_len = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(number_len);
        let factor: u64 = match unit.trim_start().to_ascii_lowercase().as_str() {
            "" | "b" => 1,
            "k" | "kib" => 1 << 10,
            "m" | "mib" => 1 << 20,
            "g" | "gib" => 1 << 30,
            "kb" => 1_000,
            "mb" => 1_000_000,
            "gb" => 1_000_000_000,
            _ => return Err(bad()),
        };
        // Digits and at most one point: no sign, no exponent, nothing endless.
        let number: f64 = number.parse().map_err(|_| bad())?;
        let rate = (number * factor as f64) as u64;
        check_rate(rate).map(|()| Some(rate))
    }
}

impl FromStr for RateLimit {
    type Err = String;

    /// Reads a rate, `off` or `0`, or `@FILE`.
    fn from_str(text: &str) -> Result<RateLimit, String> {
        match text.strip_prefix('@') {
            Some("") => Err("no file after `@`".to_owned()),
            Some(path) => Ok(RateLimit::File(path.into())),
            None => {
                Ok(RateLimit::parse_rate(text)?.map_or(RateLimit::None, RateLimit::BytesPerSecond))
            }
        }
    }
}

fn check_rate(rate: u64) -> Result<(), String> {
    match rate {
        RATE_MIN.. => Ok(()),
        _ => Err(format!(
            "{rate} bytes a second are less than the least rate of {RATE_MIN}"
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_in_both_kinds_of_units_and_with_fractions() {
        for (text, rate) in [
            ("0", None),
            ("off", None),
            ("131072", Some(131_072)),
            ("256K", Some(262_144)),
            ("1.5G", Some(3 << 29)),
            ("12.5 MB", Some(12_500_000)),
            ("1gib", Some(1 << 30)),
        ] {
            assert_eq!(RateLimit::parse_rate(text), Ok(rate), "{text}");
        }
        for bad in [
            "", "fast", "-1M", "1e9", "nan", "inf", ".", "1..5M", "100K", "1X", "00", "0.0",
        ] {
            assert!(RateLimit::parse_rate(bad).is_err(), "{bad}");
        }
        assert!("@".parse::<RateLimit>().is_err());
    }

    #[test]
    fn memory_that_does_not_hold_the_lanes_is_refused_with_both_numbers() {
        let mut options = PushOptions {
            budget_bytes: 16 << 20,
            chunk_len: Some(1 << 20),
            lanes: Lanes::Fixed(8),
            ..PushOptions::default()
        };
        options.check().unwrap();
        options.lanes = Lanes::Fixed(9);
        let error = options.check().unwrap_err().to_string();
        assert!(
            error.contains("16777216") && error.contains("18874368"),
            "{error}"
        );
        // Left open, there are as many as it holds.
        options.lanes = Lanes::Auto;
        options.check().unwrap();
        options.budget_bytes = 1 << 20;
        assert!(options.check().is_err());
        for count in [0, LANES_MAX + 1] {
            options = PushOptions::default();
            options.lanes = Lanes::Fixed(count);
            assert!(options.check().is_err(), "{count}");
        }
    }
}
