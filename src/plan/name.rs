//! Checkpoint names, and how tensor names become file names.
//!
//! A name from a peer is never used as a path. Checkpoint names are restricted
//! to an allow-list; tensor names are free text and are mapped to safe names.

use super::{PlanError, clip};
use std::{collections::HashSet, fmt, str::FromStr};

/// Longest entry name in bytes.
pub const MAX_ENTRY_NAME_LEN: usize = 4096;
/// Longest checkpoint name in bytes.
const MAX_CHECKPOINT_NAME_LEN: usize = 1024;
/// Most parts of a checkpoint or blob name.
const MAX_PARTS: usize = 16;
/// Longest part of a name that goes into a file name unchanged, in bytes: leaves
/// room for the mark and the extension within the 255 of file systems.
const MAX_PART_LEN: usize = 200;

/// Name of a checkpoint on a receiver: 1 to 16 parts of `[A-Za-z0-9._-]` joined
/// by `/`, none beginning with `.`, at most 1,024 bytes.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CheckpointName(String);

impl CheckpointName {
    /// The parts, from the outside in.
    pub fn parts(&self) -> impl Iterator<Item = &str> {
        self.0.split('/')
    }

    /// The whole name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// 16 hex digits that stand for the name in paths below `.tensorferry`.
    pub fn short_hash(&self) -> String {
        blake3::hash(self.0.as_bytes()).to_hex()[..16].to_owned()
    }

    /// A name that is the user's own last path component: any file name that is
    /// one component and does not collide with the service folder.
    ///
    /// # Errors
    /// [`PlanError::Name`].
    pub fn local(component: &str) -> Result<Self, PlanError> {
        let bad = |why| PlanError::Name {
            what: "folder name",
            name: clip(component),
            why,
        };
        if component.is_empty() || component == "." || component == ".." {
            return Err(bad("it does not name a folder"));
        }
        if component.contains(['/', '\0']) || component.len() > 255 {
            return Err(bad("it is not one file name"));
        }
        if component == ".tensorferry" {
            return Err(bad("the name is reserved"));
        }
        Ok(CheckpointName(component.to_owned()))
    }
}

impl FromStr for CheckpointName {
    type Err = PlanError;

    fn from_str(name: &str) -> Result<Self, PlanError> {
        let bad = |why| PlanError::Name {
            what: "checkpoint name",
            name: clip(name),
            why,
        };
        if name.len() > MAX_CHECKPOINT_NAME_LEN {
            return Err(bad("it is longer than 1,024 bytes"));
        }
        if name.split('/').count() > MAX_PARTS {
            return Err(bad("it has more than 16 parts"));
        }
        for part in name.split('/') {
            if part.is_empty() {
                return Err(bad("a part is empty"));
            }
            if part.starts_with('.') {
                return Err(bad("a part begins with '.'"));
            }
            if part.len() > 255 {
                return Err(bad("a part is longer than 255 bytes"));
            }
            if !part.bytes().all(is_plain) {
                return Err(bad("only A-Z a-z 0-9 . _ - may stand between the slashes"));
            }
        }
        Ok(CheckpointName(name.to_owned()))
    }
}

impl fmt::Display for CheckpointName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-')
}

/// Blob names are relative paths of plain parts, checked, never used as given.
pub(super) fn check_blob_name(name: &str) -> Result<(), PlanError> {
    let bad = |why| PlanError::Name {
        what: "blob name",
        name: clip(name),
        why,
    };
    if name.len() > MAX_CHECKPOINT_NAME_LEN {
        return Err(bad("it is longer than 1,024 bytes"));
    }
    if name.contains('\\') {
        return Err(bad("it contains a backslash"));
    }
    if name.chars().any(is_control_or_direction) {
        return Err(bad("it contains a control or direction character"));
    }
    if name.split('/').count() > MAX_PARTS {
        return Err(bad("it has more than 16 parts"));
    }
    for part in name.split('/') {
        if part.is_empty() {
            return Err(bad("it is absolute or a part is empty"));
        }
        if part == "." || part == ".." {
            return Err(bad("a part is '.' or '..'"));
        }
        if part.len() > 255 {
            return Err(bad("a part is longer than 255 bytes"));
        }
    }
    Ok(())
}

fn is_control_or_direction(c: char) -> bool {
    c.is_control()
        || matches!(c, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// The file names of one checkpoint, unique also where case is folded.
#[derive(Debug, Default)]
pub struct FileNames {
    folded: HashSet<String>,
    /// Folders of those files: no file may have the name of one, nor the reverse.
    folders: HashSet<String>,
}

impl FileNames {
    /// Marks a name that is already in use (taken from a journal).
    pub fn reserve(&mut self, file: &str) {
        let folded = file.to_ascii_lowercase();
        let slashes = folded.match_indices('/');
        self.folders
            .extend(slashes.map(|(at, _)| folded[..at].to_owned()));
        self.folded.insert(folded);
    }

    /// Frees a name whose file is given up.
    pub fn release(&mut self, file: &str) {
        self.folded.remove(&file.to_ascii_lowercase());
    }

    /// The file for a tensor: `<safe name>.npy`.
    pub fn tensor(&mut self, name: &str) -> String {
        self.pick(name, ".npy", "")
    }

    /// The file for a tensor by number: `weight_<index>.npy`.
    pub fn indexed(&mut self, index: u64) -> String {
        let file = format!("weight_{index}.npy");
        self.reserve(&file);
        file
    }

    /// The file for a blob: `files/<safe name>`, folders kept.
    pub fn blob(&mut self, name: &str) -> String {
        let (folders, last) = name.rsplit_once('/').unwrap_or(("", name));
        let mut prefix = String::from("files/");
        for part in folders.split('/').filter(|p| !p.is_empty()) {
            let mut folder = format!("{prefix}{}", safe_file_name(part, "", false));
            // A marked name may be that of a file, too.
            for digits in [8, 16, 64] {
                if !self.folded.contains(&folder.to_ascii_lowercase()) {
                    break;
                }
                let marked = marked_file_name(part, "", true, digits);
                folder = format!("{prefix}{marked}");
            }
            prefix = folder + "/";
        }
        // The extension stays visible behind the mark.
        let (stem, extension) = match last.rfind('.').filter(|&at| at > 0) {
            Some(at) if last.len() - at <= 16 && last[at..].bytes().all(is_plain) => {
                last.split_at(at)
            }
            _ => (last, ""),
        };
        self.pick(stem, extension, &prefix)
    }

    fn pick(&mut self, name: &str, extension: &str, prefix: &str) -> String {
        let mut file = format!("{prefix}{}", safe_file_name(name, extension, false));
        // 8 digits are few enough for somebody to find two names that share them.
        for digits in [8, 16, 64] {
            let folded = file.to_ascii_lowercase();
            if !self.folded.contains(&folded) && !self.folders.contains(&folded) {
                break;
            }
            file = format!(
                "{prefix}{}",
                marked_file_name(name, extension, true, digits)
            );
        }
        self.reserve(&file);
        file
    }
}

/// One safe file name for `name`: characters outside `[A-Za-z0-9._-]` become
/// `_`, and `~` with 8 hex digits of the name's BLAKE3 is added when that changed
/// it, when it is too long, reserved or hidden, or when `mark` asks for it.
pub fn safe_file_name(name: &str, extension: &str, mark: bool) -> String {
    marked_file_name(name, extension, mark, 8)
}

/// As [`safe_file_name`] with a mark of `digits` hex digits.
fn marked_file_name(name: &str, extension: &str, mark: bool, digits: usize) -> String {
    let mut safe: String = name
        .chars()
        .map(|c| {
            if c.is_ascii() && is_plain(c as u8) {
                c
            } else {
                '_'
            }
        })
        .collect();
    if safe.starts_with('.') {
        safe.replace_range(..1, "_");
    }
    let too_long = safe.len() > MAX_PART_LEN;
    // A longer mark takes its room from the name.
    safe.truncate(MAX_PART_LEN + 8 - digits);
    if mark || safe != name || too_long || is_reserved(&safe) {
        let hash = blake3::hash(name.as_bytes()).to_hex();
        safe.push('~');
        safe.push_str(&hash[..digits]);
    }
    safe + extension
}

/// Device names of Windows, in any case and with any extension, and nothing.
fn is_reserved(name: &str) -> bool {
    let stem = name.split('.').next().unwrap_or("").to_ascii_lowercase();
    matches!(stem.as_str(), "" | "con" | "prn" | "aux" | "nul")
        || ((stem.starts_with("com") || stem.starts_with("lpt"))
            && stem.len() == 4
            && stem.as_bytes()[3].is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checkpoint_names_keep_to_the_allow_list() {
        for good in ["minilm", "run7/step-900", "a.b_c-D", "0"] {
            assert_eq!(good.parse::<CheckpointName>().unwrap().as_str(), good);
        }
        let long = "x".repeat(1025);
        let deep = vec!["a"; 17].join("/");
        for bad in [
            "",
            "/a",
            "a/",
            "a//b",
            "..",
            "a/../b",
            ".hidden",
            "a/.b",
            "a b",
            "a\\b",
            "ä",
            "a\0",
            "a\n",
            "\u{202e}a",
            &long,
            &deep,
        ] {
            assert!(bad.parse::<CheckpointName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn blob_names_cannot_leave_their_folder() {
        for bad in [
            "../x",
            "/x",
            "a/../x",
            "a\\x",
            "a//x",
            ".",
            "a\u{202e}b",
            "a\nb",
        ] {
            assert!(check_blob_name(bad).is_err(), "{bad:?}");
        }
        for good in [
            "config.json",
            "1_Pooling/config.json",
            ".gitattributes",
            "mein text.txt",
        ] {
            assert!(check_blob_name(good).is_ok(), "{good:?}");
        }
    }

    #[test]
    fn tensor_names_become_safe_unique_files() {
        let mut files = FileNames::default();
        assert_eq!(files.tensor("layer.0.weight"), "layer.0.weight.npy");
        let slash = files.tensor("net/d1/kernel");
        assert!(
            slash.starts_with("net_d1_kernel~") && slash.ends_with(".npy"),
            "{slash}"
        );
        let folded = files.tensor("Layer.0.Weight");
        assert!(folded.starts_with("Layer.0.Weight~"), "{folded}");
        for odd in [
            "..",
            "CON",
            "con.x",
            ".hidden",
            "näme",
            "a b",
            &"x".repeat(300),
        ] {
            let file = files.tensor(odd);
            assert!(
                file.len() <= 255 && file.contains('~') && !file.starts_with('.'),
                "{file}"
            );
            assert!(file.bytes().all(|b| is_plain(b) || b == b'~'), "{file}");
        }
        assert_eq!(files.indexed(3), "weight_3.npy");
    }

    #[test]
    fn a_folder_never_has_the_name_of_a_file_even_when_both_are_marked() {
        for name in ["a", "ö"] {
            let mut files = FileNames::default();
            let file = files.blob(name);
            let inside = files.blob(&format!("{name}/x"));
            assert_ne!(inside.strip_suffix("/x"), Some(file.as_str()), "{name}");
            assert_eq!(inside, files.blob(&format!("{name}/x.y")).replace(".y", ""));
        }
    }

    #[test]
    fn blob_files_keep_folders_and_extensions() {
        let mut files = FileNames::default();
        assert_eq!(files.blob("config.json"), "files/config.json");
        assert_eq!(
            files.blob("1_Pooling/config.json"),
            "files/1_Pooling/config.json"
        );
        let spaced = files.blob("my notes.txt");
        assert!(
            spaced.starts_with("files/my_notes~") && spaced.ends_with(".txt"),
            "{spaced}"
        );
        assert!(
            files
                .blob(".gitattributes")
                .starts_with("files/_gitattributes~")
        );
    }
}
