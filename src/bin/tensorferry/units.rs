//! Sizes, times and names as people read and write them.

use std::time::Duration;
use tensorferry::plan::{CHUNK_LEN_MAX, CHUNK_LEN_MIN, printable};

/// Smallest memory budget: two chunks of the default length in flight.
const BUDGET_MIN: u64 = 4 << 20;

/// Reads `256K`, `1M`, `8MiB` (powers of 1,024), `5MB` (powers of 1,000) or bytes.
pub(crate) fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        "t" | "tib" => 1 << 40,
        "kb" => 1_000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "tb" => 1_000_000_000_000,
        _ => return Err("a size is a number and a unit, such as 256K, 1M or 8MiB".to_owned()),
    };
    let number: u64 = number
        .parse()
        .map_err(|_| "a size begins with a whole number".to_owned())?;
    number
        .checked_mul(factor)
        .ok_or_else(|| "more than 64 bits can count".to_owned())
}

/// A chunk length.
pub(crate) fn parse_chunk_len(text: &str) -> Result<u32, String> {
    let bytes = parse_size(text)?;
    u32::try_from(bytes)
        .ok()
        .filter(|len| len.is_power_of_two() && (CHUNK_LEN_MIN..=CHUNK_LEN_MAX).contains(len))
        .ok_or_else(|| {
            format!("{bytes} bytes are not a power of two from {CHUNK_LEN_MIN} to {CHUNK_LEN_MAX}")
        })
}

/// A memory budget.
pub(crate) fn parse_budget(text: &str) -> Result<u64, String> {
    let bytes = parse_size(text)?;
    if bytes < BUDGET_MIN {
        return Err(format!(
            "{bytes} bytes are less than the least budget of {BUDGET_MIN}"
        ));
    }
    Ok(bytes)
}

/// Reads `7d`, `12h`, `30m`, `45s`, or `0`.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let bad = || "a time is a whole number and a unit, such as 7d, 12h, 30m or 45s".to_owned();
    let digits = text
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| bad())?;
    let factor = match unit {
        "" if number == 0 => 1,
        "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86_400,
        _ => return Err(bad()),
    };
    number
        .checked_mul(factor)
        .map(Duration::from_secs)
        .ok_or_else(bad)
}

/// `41.2 MiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    if count < 1024 {
        return format!("{count} B");
    }
    let mut value = count as f64 / 1024.0;
    let mut unit = 0;
    // Rounding must not print 1024.0.
    while value >= 1023.95 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{value:.1} {}", UNITS[unit])
}

/// `380.0 MiB/s`.
pub(crate) fn rate(count: u64, time: Duration) -> String {
    let seconds = time.as_secs_f64().max(1e-6);
    format!("{}/s", bytes((count as f64 / seconds) as u64))
}

/// `0.42 s`, `12 s`, `3 min 20 s`, `2 h 5 min`.
pub(crate) fn duration(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..10 => format!("{:.2} s", time.as_secs_f64()),
        10..60 => format!("{seconds} s"),
        60..3600 => format!("{} min {} s", seconds / 60, seconds % 60),
        _ => format!("{} h {} min", seconds / 3600, seconds / 60 % 60),
    }
}

/// Whole percent, 100 only when it is all.
pub(crate) fn percent(part: u64, whole: u64) -> u64 {
    if whole == 0 {
        return 100;
    }
    (u128::from(part.min(whole)) * 100 / u128::from(whole)) as u64
}

/// `1 tensor`, `2 tensors`.
pub(crate) fn count(n: u64, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// Text from a file or a peer, harmless on a terminal.
pub(crate) fn shown(text: &str) -> String {
    printable(text, usize::MAX)
}

/// The same for people, who need not see all of it.
pub(crate) fn brief(text: &str) -> String {
    printable(text, 256)
}

/// One word of a command line for a POSIX shell.
pub(crate) fn shell_quote(word: &str) -> String {
    let is_plain = |b: u8| b.is_ascii_alphanumeric() || b"_@%+=:,./-".contains(&b);
    if !word.is_empty() && word.bytes().all(is_plain) {
        return word.to_owned();
    }
    format!("'{}'", word.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_in_both_kinds_of_units() {
        for (text, expected) in [
            ("0", 0),
            ("256K", 256 << 10),
            ("1m", 1 << 20),
            ("8MiB", 8 << 20),
            ("5MB", 5_000_000),
            ("2 GiB", 2 << 30),
        ] {
            assert_eq!(parse_size(text), Ok(expected), "{text}");
        }
        for bad in ["", "K", "1.5M", "-1", "1X", "99999999T"] {
            assert!(parse_size(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_chunk_len("1M"), Ok(1 << 20));
        for bad in ["3M", "128K", "16M", "8G"] {
            assert!(parse_chunk_len(bad).is_err(), "{bad}");
        }
        assert!(parse_budget("1M").is_err());
        for (text, seconds) in [("7d", 604_800), ("12h", 43_200), ("30m", 1800), ("45s", 45)] {
            assert_eq!(parse_duration(text), Ok(Duration::from_secs(seconds)));
        }
        assert_eq!(parse_duration("0"), Ok(Duration::ZERO));
        for bad in ["", "7", "d", "-1d", "1.5h", "1w", "999999999999999999d"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn numbers_are_short_and_never_round_up_to_the_whole() {
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1 << 20), "1.0 MiB");
        assert_eq!(bytes((1 << 20) - 1), "1.0 MiB");
        assert_eq!(bytes(u64::MAX), "16.0 EiB");
        assert_eq!(percent(999, 1000), 99);
        assert_eq!(percent(0, 0), 100);
        assert_eq!(duration(Duration::from_secs(200)), "3 min 20 s");
    }

    #[test]
    fn words_survive_a_shell_and_a_terminal() {
        assert_eq!(
            shell_quote("ferry://lab:7744/run7"),
            "ferry://lab:7744/run7"
        );
        assert_eq!(shell_quote("it's here"), r"'it'\''s here'");
        assert_eq!(shell_quote(""), "''");
        assert_eq!(shown("a\u{1b}[2J"), "a\\u{1b}[2J");
        assert_eq!(brief(&"n".repeat(4096)).len(), 256);
    }
}
