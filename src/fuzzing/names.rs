//! Names from strangers: of checkpoints, of entries, and the files made of them.

use super::input::Input;
use crate::plan::{CheckpointName, EntryHeader, FileNames, safe_file_name};
use std::collections::HashSet;

/// Most names of one input.
const MAX_NAMES: usize = 24;

/// Any bytes as names, cut at zeros: each as a checkpoint, a tensor and a blob, all in one
/// folder.
///
/// # Panics
/// A property is broken.
pub fn names(data: &[u8]) {
    let mut input = Input::new(data);
    let indexed = input.chance(8);
    let (mut names, mut files) = (FileNames::default(), HashSet::new());
    let (mut folders, mut seen) = (HashSet::new(), HashSet::new());
    for (i, part) in input.rest().split(|b| *b == 0).take(MAX_NAMES).enumerate() {
        let text = String::from_utf8_lossy(part);
        checkpoint(&text);
        // The receiving role refuses both.
        if text.is_empty() || !seen.insert(text.clone()) {
            continue;
        }
        let tensor = match indexed {
            // These begin with what no other name becomes.
            true if i == 0 => Some(names.indexed(7)),
            _ => Some(names.tensor(&text)),
        };
        let is_blob = EntryHeader::blob(text.as_ref(), 1).is_ok();
        let blob = is_blob.then(|| names.blob(&text));
        for file in tensor.into_iter().chain(blob) {
            check_file(&file);
            let folded = file.to_ascii_lowercase();
            for (at, _) in folded.match_indices('/') {
                folders.insert(folded[..at].to_owned());
            }
            assert!(files.insert(folded), "{file:?} is the file of two entries");
        }
    }
    let both = files.intersection(&folders).next();
    assert_eq!(both, None, "a file in the place of a folder");
}

fn checkpoint(text: &str) {
    let Ok(name) = text.parse::<CheckpointName>() else {
        return;
    };
    assert_eq!(name.as_str(), text);
    assert!(text.len() <= 1024 && name.parts().count() <= 16);
    for part in name.parts() {
        assert!(!part.is_empty() && !part.starts_with('.') && part.len() <= 255);
        assert!(part.bytes().all(is_plain), "{part:?}");
    }
    assert_eq!(name.short_hash().len(), 16);
}

/// A relative path of plain parts that every file system takes.
fn check_file(file: &str) {
    assert!(!file.is_empty() && file.len() <= 16 * 256);
    for part in file.split('/') {
        assert!(!part.is_empty() && !part.starts_with('.'), "{file:?}");
        assert!(part.len() <= 255, "{file:?}");
        assert!(part.bytes().all(|b| is_plain(b) || b == b'~'), "{file:?}");
    }
    assert_ne!(file, "manifest.json");
    // One that is safe already stays as it is, or is told apart by a mark.
    let again = safe_file_name(file.trim_end_matches(".npy"), ".npy", false);
    assert!(!again.contains('/'));
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}
