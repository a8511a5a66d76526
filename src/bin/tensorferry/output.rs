//! The only way to the outside: data to standard output, talk to standard error.

use crate::exit::Failure;
use clap::ValueEnum;
use serde::Serialize;
use std::{
    borrow::Cow,
    io::{self, IsTerminal, Write},
    sync::{Mutex, PoisonError},
};
use tensorferry::{Error, plan::is_odd};

/// How to speak.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people.
    Human,
    /// One JSON object per line with an `event` key.
    Json,
    /// The bare answer and errors.
    Quiet,
}

/// Both streams. A closed pipe ends no transfer; other failures are remembered.
#[derive(Debug)]
pub(crate) struct Output {
    format: Format,
    is_silent: bool,
    is_logging: bool,
    failure: Mutex<Option<io::Error>>,
}

#[derive(Serialize)]
struct Event<'a, T> {
    event: &'a str,
    #[serde(flatten)]
    body: &'a T,
}

impl Output {
    /// `is_silent` keeps everything from standard error but failures.
    pub(crate) fn new(format: Format, is_silent: bool, verbose: u8) -> Output {
        Output {
            format,
            is_silent,
            is_logging: verbose > 0,
            failure: Mutex::new(None),
        }
    }

    pub(crate) fn is_human(&self) -> bool {
        self.format == Format::Human
    }

    pub(crate) fn is_json(&self) -> bool {
        self.format == Format::Json
    }

    pub(crate) fn is_quiet(&self) -> bool {
        self.format == Format::Quiet
    }

    /// Whether a moving bar would be seen and not be torn by log lines.
    pub(crate) fn can_draw(&self) -> bool {
        self.is_human() && !self.is_logging && io::stderr().is_terminal()
    }

    /// One line of data, in every format.
    pub(crate) fn line(&self, text: &str) {
        self.raw(format!("{text}\n").as_bytes());
    }

    /// One line of data for people only.
    pub(crate) fn human(&self, text: &str) {
        if self.is_human() {
            self.line(text);
        }
    }

    /// One line of data for programs only.
    pub(crate) fn event(&self, event: &str, body: &impl Serialize) {
        if self.is_json() {
            match serde_json::to_string(&Event { event, body }) {
                Ok(line) => self.line(&escape_odd(&line)),
                Err(error) => self.remember(error.into()),
            }
        }
    }

    /// Bytes as they are.
    pub(crate) fn raw(&self, bytes: &[u8]) {
        let mut stdout = io::stdout().lock();
        if let Err(error) = stdout.write_all(bytes).and_then(|()| stdout.flush()) {
            self.remember(error);
        }
    }

    /// One line of talk, unless silence was asked for.
    pub(crate) fn talk(&self, text: &str) {
        if !self.is_silent {
            self.complain(text);
        }
    }

    /// One line on standard error, always. Nobody can be told when that fails.
    pub(crate) fn complain(&self, text: &str) {
        complain(text);
    }

    /// Whether talk is wanted.
    pub(crate) fn talks(&self) -> bool {
        !self.is_silent
    }

    /// Columns for people: the first `text_columns` to the left, the rest to the right.
    pub(crate) fn table(&self, text_columns: usize, rows: &[Vec<String>]) {
        if !self.is_human() {
            return;
        }
        let column_count = rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            rows.iter()
                .filter_map(|r| r.get(column))
                .map(|c| c.chars().count())
                .max()
                .unwrap_or(0)
        };
        let widths: Vec<usize> = (0..column_count).map(width).collect();
        let mut out = String::new();
        for row in rows {
            let mut line = String::new();
            for (column, (cell, width)) in row.iter().zip(&widths).enumerate() {
                let padding = " ".repeat(width - cell.chars().count());
                match column < text_columns {
                    true => line.extend([cell, padding.as_str(), "  "]),
                    false => line.extend([padding.as_str(), cell, "  "]),
                }
            }
            out.push_str(line.trim_end());
            out.push('\n');
        }
        self.raw(out.as_bytes());
    }

    /// Whether all data reached standard output.
    pub(crate) fn check(&self) -> Result<(), Failure> {
        let failure = self
            .failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        match failure {
            None => Ok(()),
            Some(error) => Err(Failure::from(Error::Bug(format!(
                "standard output cannot be written: {error}"
            )))),
        }
    }

    fn remember(&self, error: io::Error) {
        // Whoever reads may stop reading: `tensorferry list | head`.
        if error.kind() != io::ErrorKind::BrokenPipe {
            self.failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(error);
        }
    }
}

/// One line on standard error, from a thread that cannot share the streams.
pub(crate) fn complain(text: &str) {
    let _ = io::stderr()
        .lock()
        .write_all(format!("{text}\n").as_bytes());
}

/// JSON leaves more characters bare than a terminal can bear; they stand in strings
/// only, where they may be escaped.
fn escape_odd(json: &str) -> Cow<'_, str> {
    // Nearly always, and tens of thousands of lines are printed of large checkpoints.
    if json.bytes().all(|byte| (b' '..=b'~').contains(&byte)) {
        return Cow::Borrowed(json);
    }
    let mut out = String::with_capacity(json.len());
    for c in json.chars() {
        if is_odd(c) {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        } else {
            out.push(c);
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_the_same_and_moves_no_cursor() {
        let text = "a\u{9b}31m\u{7f}\u{202e}\u{e0041}é\n";
        let json = serde_json::to_string(text).unwrap();
        let json = escape_odd(&json);
        assert!(!json.contains(is_odd));
        assert_eq!(serde_json::from_str::<String>(&json).unwrap(), text);
    }
}
