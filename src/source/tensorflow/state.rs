//! What a folder of checkpoints says of itself, and what names alone say.

use super::super::SourceError;
use crate::plan::clip;
use std::path::{Component, Path, PathBuf};

/// What the optimizers of TensorFlow 1 add to the name of a variable.
const SLOTS: [&str; 12] = [
    "Adam",
    "Adam_1",
    "AdamW",
    "Momentum",
    "RMSProp",
    "RMSProp_1",
    "RMSProp_2",
    "Adagrad",
    "Adadelta",
    "Adadelta_1",
    "Ftrl",
    "Ftrl_1",
];

/// Whether a name is that of something an optimizer keeps for a variable that is there.
pub(super) fn is_slot_name(name: &str, is_name: impl Fn(&str) -> bool) -> bool {
    if super::graph::is_optimizer_path(name) {
        return true;
    }
    match name.rsplit_once('/') {
        Some((variable, slot)) => SLOTS.contains(&slot) && is_name(variable),
        None => matches!(name, "beta1_power" | "beta2_power"),
    }
}

/// The index that the file `checkpoint` of a folder names; `None` where its text names
/// none. Only what lies in the folder can be meant.
pub(crate) fn latest_index(folder: &Path, text: &str) -> Result<Option<PathBuf>, SourceError> {
    let Some(path) = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("model_checkpoint_path:"))
    else {
        return Ok(None);
    };
    let state = folder.join("checkpoint");
    let bad = |why: String| SourceError::malformed(&state, why);
    let path = unquote(path.trim())
        .ok_or_else(|| bad("a path that is not quoted as it should be".to_owned()))?;
    let path = Path::new(&path);
    // What was written elsewhere names a place that may be another's here.
    let relative = match path.is_absolute() {
        true => path.file_name().map(Path::new).unwrap_or(path),
        false => path,
    };
    let is_plain = relative
        .components()
        .all(|part| matches!(part, Component::Normal(_)));
    if relative.as_os_str().is_empty() || !is_plain {
        let why = format!("{:?} is not in this folder", clip(&path.to_string_lossy()));
        return Err(bad(why));
    }
    let prefix = folder.join(relative);
    let index = super::with_suffix(&prefix, super::INDEX_SUFFIX);
    if index.is_file() {
        return Ok(Some(index));
    }
    // Version 1 is one file without an ending; what is wrong with it is said elsewhere.
    if prefix.is_file() {
        return Ok(Some(prefix));
    }
    if let Some(shard) = super::version_1_shard(&prefix) {
        return Ok(Some(shard));
    }
    let why = format!(
        "it names {:?}, whose index {} does not exist; \
         where another checkpoint is in this folder, name that one",
        clip(&path.to_string_lossy()),
        index.display()
    );
    Err(SourceError::Choice { path: state, why })
}

/// A text between quotes, as protobuf writes it.
fn unquote(text: &str) -> Option<String> {
    let quote = text
        .chars()
        .next()
        .filter(|&quote| quote == '"' || quote == '\'')?;
    let inner = text.strip_prefix(quote)?.strip_suffix(quote)?.as_bytes();
    let mut out = Vec::with_capacity(inner.len());
    let mut at = 0;
    while let Some(&byte) = inner.get(at) {
        at += 1;
        if byte != b'\\' {
            out.push(byte);
            continue;
        }
        let escaped = *inner.get(at)?;
        at += 1;
        out.push(match escaped {
            b'n' => b'\n',
            b't' => b'\t',
            b'r' => b'\r',
            b'\\' | b'\'' | b'"' => escaped,
            b'0'..=b'3' => {
                let digits = std::str::from_utf8(inner.get(at - 1..at + 2)?).ok()?;
                at += 2;
                u8::from_str_radix(digits, 8).ok()?
            }
            _ => return None,
        });
    }
    String::from_utf8(out).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_known_by_the_variable_they_belong_to() {
        let is_name = |name: &str| name == "net/w";
        for slot in [
            "net/w/Adam",
            "net/w/Adam_1",
            "net/w/Momentum",
            "beta1_power",
            "model/optimizer/lr",
        ] {
            assert!(is_slot_name(slot, is_name), "{slot}");
        }
        for other in ["net/w", "net/v/Adam", "Adam", "net/Adam/w", "myoptimizer/w"] {
            assert!(!is_slot_name(other, is_name), "{other}");
        }
    }

    #[test]
    fn quoted_paths_are_read_as_protobuf_writes_them() {
        assert_eq!(unquote(r#""ckpt-1""#).as_deref(), Some("ckpt-1"));
        assert_eq!(
            unquote(r#""\303\244 \"b\" \\""#).as_deref(),
            Some("ä \"b\" \\")
        );
        for bad in [
            "ckpt",
            "\"ckpt",
            r#""\""#,
            r#""\3""#,
            r#""\x41""#,
            r#""\377""#,
            "",
        ] {
            assert_eq!(unquote(bad), None, "{bad}");
        }
    }

    #[test]
    fn only_a_checkpoint_in_the_folder_is_taken() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        std::fs::write(at.join("ckpt-7.index"), "").unwrap();
        let latest =
            |path: &str| latest_index(at, &format!("x: 1\nmodel_checkpoint_path: {path}\n"));
        let found = Some(at.join("ckpt-7.index"));
        assert_eq!(latest("\"ckpt-7\"").unwrap(), found);
        assert_eq!(latest("\"/home/somebody/run/ckpt-7\"").unwrap(), found);
        for bad in ["\"../ckpt-7\"", "\"\"", "\"/\"", "\"ckpt-8\"", "ckpt-7"] {
            assert!(latest(bad).is_err(), "{bad}");
        }
        assert_eq!(
            latest_index(at, "all_model_checkpoint_paths: \"x\"").unwrap(),
            None
        );
    }
}
