//! Which tensors of a source are taken, and what they are called.

use super::{SourceEntry, SourceError, SourceOptions, globs::Globs};
use crate::plan::{MAX_ENTRY_NAME_LEN, clip};
use std::{
    str::FromStr,
    sync::{Mutex, PoisonError},
};

/// Gives every tensor whose name fits another name. `*` stands for any text, also across
/// `/`, and means the same text in the new name, one after the other.
///
/// ```
/// use tensorferry::source::Rename;
///
/// let rename: Rename = "model/*/kernel=*.weight".parse()?;
/// assert_eq!(rename.apply("model/layers/0/kernel").as_deref(), Some("layers/0.weight"));
/// assert_eq!(rename.apply("model/layers/0/bias"), None);
/// # Ok::<(), String>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rename {
    old: String,
    new: String,
}

impl FromStr for Rename {
    type Err = String;

    /// Reads `OLD=NEW`, divided at the first `=`.
    fn from_str(text: &str) -> Result<Rename, String> {
        let (old, new) = text.split_once('=').ok_or("not OLD=NEW")?;
        let stars = |text: &str| text.matches('*').count();
        if old.is_empty() || new.is_empty() {
            return Err("neither name may be empty".to_owned());
        }
        if old.len() > MAX_ENTRY_NAME_LEN || new.len() > MAX_ENTRY_NAME_LEN {
            return Err(format!("a name of more than {MAX_ENTRY_NAME_LEN} bytes"));
        }
        if stars(new) > stars(old) {
            return Err(format!("{new:?} has more `*` than {old:?}"));
        }
        Ok(Rename {
            old: old.to_owned(),
            new: new.to_owned(),
        })
    }
}

impl Rename {
    /// The new name of a tensor; `None` where the old one does not fit.
    pub fn apply(&self, name: &str) -> Option<String> {
        let mut parts = self.old.split('*');
        let mut rest = name.strip_prefix(parts.next()?)?;
        let mut parts: Vec<&str> = parts.collect();
        let mut texts = Vec::with_capacity(parts.len());
        match parts.pop() {
            None if rest.is_empty() => {}
            None => return None,
            Some(last) => {
                for part in parts {
                    let (text, after) = rest.split_once(part)?;
                    texts.push(text);
                    rest = after;
                }
                texts.push(rest.strip_suffix(last)?);
            }
        }
        let mut texts = texts.into_iter();
        let mut new = String::new();
        for (index, part) in self.new.split('*').enumerate() {
            if index > 0 {
                new.push_str(texts.next().unwrap_or_default());
            }
            new.push_str(part);
        }
        Some(new)
    }
}

/// Which tensors a puller wants, by name.
///
/// ```
/// use tensorferry::NameFilter;
///
/// let filter = NameFilter::new(&["decoder/*".to_owned()], &["*/bias".to_owned()])?;
/// assert!(filter.takes("decoder/0/kernel"));
/// assert!(!filter.takes("decoder/0/bias") && !filter.takes("encoder/0/kernel"));
/// # Ok::<(), tensorferry::SourceError>(())
/// ```
#[derive(Debug)]
pub struct NameFilter {
    include: Globs,
    exclude: Globs,
    /// Names so far that fit a pattern to include; one of each is enough.
    seen: Mutex<Vec<String>>,
}

impl NameFilter {
    /// Patterns in which `*` stands for any text and `?` for one character. Without any to
    /// include, all names are.
    ///
    /// # Errors
    /// [`SourceError::Selection`] for an empty pattern, or too many.
    pub fn new(include: &[String], exclude: &[String]) -> Result<Self, SourceError> {
        Ok(NameFilter {
            include: Globs::new("include", include)?,
            exclude: Globs::new("exclude", exclude)?,
            seen: Mutex::default(),
        })
    }

    /// Whether a tensor of this name is wanted.
    pub fn takes(&self, name: &str) -> bool {
        if self.include.is_empty() {
            return !self.exclude.matches(name);
        }
        if !self.include.matches(name) {
            return false;
        }
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.push(name.to_owned());
        !self.exclude.matches(name)
    }

    /// # Errors
    /// No name that was looked at fits one of the patterns to include.
    pub(super) fn check_used(&self) -> Result<(), SourceError> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        self.include.check_used(seen.iter().map(String::as_str))
    }
}

/// Takes what the options ask for, and gives new names. Side files are no tensors.
pub(super) fn select(
    tensors: Vec<SourceEntry>,
    options: &SourceOptions,
) -> Result<Vec<SourceEntry>, SourceError> {
    let selection = |why: String| SourceError::Selection { why };
    let include = Globs::new("include", &options.include)?;
    let exclude = Globs::new("exclude", &options.exclude)?;
    let names = tensors.iter().map(|t| t.header.name.as_str());
    include.check_used(names.clone())?;
    exclude.check_used(names)?;
    let mut kept = Vec::new();
    let mut trainable_count = 0;
    for tensor in tensors {
        let name = &tensor.header.name;
        let is_included = include.is_empty() || include.matches(name);
        let is_trainable = tensor.trainable == Some(true);
        trainable_count += u64::from(is_trainable);
        let is_excluded = exclude.matches(name);
        if is_included && !is_excluded && (is_trainable || !options.trainable) {
            kept.push(tensor);
        }
    }
    if options.trainable && trainable_count == 0 {
        return Err(selection(
            "none that is trainable: this source does not say which are, so choose by name, \
             with --include and --exclude"
                .to_owned(),
        ));
    }
    let mut was_used = vec![false; options.rename.len()];
    for tensor in &mut kept {
        let name = &tensor.header.name;
        let mut first = None;
        for (rename, was_used) in options.rename.iter().zip(&mut was_used) {
            if let Some(new) = rename.apply(name) {
                *was_used = true;
                first.get_or_insert(new);
            }
        }
        let Some(new) = first else { continue };
        let old = std::mem::replace(&mut tensor.header.name, new);
        tensor.header.check()?;
        tensor.aliases.retain(|alias| *alias != tensor.header.name);
        if tensor.source_name.is_none() && old != tensor.header.name {
            tensor.source_name = Some(old);
        }
    }
    if let Some(unused) = was_used.iter().position(|used| !used) {
        let old = clip(&options.rename[unused].old);
        return Err(selection(format!(
            "no tensor that is taken has a name like {old:?}, to be renamed"
        )));
    }
    Ok(kept)
}

/// Stands for what the options select, in the identity of a transfer; empty where they
/// take everything as it is.
pub(super) fn identity(options: &SourceOptions) -> Vec<u8> {
    let mut out = Vec::new();
    let renames = options
        .rename
        .iter()
        .flat_map(|rename| [&rename.old, &rename.new]);
    let lists: [(u8, Vec<&String>); 3] = [
        (1, options.include.iter().collect()),
        (2, options.exclude.iter().collect()),
        (3, renames.collect()),
    ];
    for (kind, texts) in lists {
        for text in texts {
            out.push(kind);
            out.extend_from_slice(&(text.len() as u64).to_le_bytes());
            out.extend_from_slice(text.as_bytes());
        }
    }
    if options.trainable {
        out.push(4);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    fn apply(rename: &str, name: &str) -> Option<String> {
        rename.parse::<Rename>().unwrap().apply(name)
    }

    #[test]
    fn stars_carry_text_over() {
        for (rename, name, expected) in [
            ("a=b", "a", Some("b")),
            ("a=b", "ab", None),
            ("a*=b*", "a", Some("b")),
            ("model.*=*", "model.x.y", Some("x.y")),
            ("*/kernel=*/w", "d1/kernel", Some("d1/w")),
            ("*/*/kernel=*-*", "a/b/c/kernel", Some("a-b/c")),
            ("a*b*c=x*", "aXbYc", Some("xX")),
            ("a*a=x*", "a", None),
            ("*=same", "anything", Some("same")),
            ("x=y=z", "x", Some("y=z")),
        ] {
            assert_eq!(
                apply(rename, name).as_deref(),
                expected,
                "{rename} of {name}"
            );
        }
    }

    #[test]
    fn renames_that_cannot_be_meant_are_refused() {
        for bad in ["", "a", "=b", "a=", "a=*", "*=**"] {
            assert!(bad.parse::<Rename>().is_err(), "{bad}");
        }
    }

    #[test]
    fn only_what_selects_something_changes_the_identity() {
        let plain = SourceOptions::default();
        assert!(identity(&plain).is_empty());
        let mut one = plain.clone();
        one.include = vec!["a".into(), "b".into()];
        let mut other = plain.clone();
        other.include = vec!["ab".into()];
        let mut third = plain.clone();
        third.exclude = vec!["a".into(), "b".into()];
        let all = [&plain, &one, &other, &third].map(identity);
        for (i, a) in all.iter().enumerate() {
            assert!(all[i + 1..].iter().all(|b| a != b));
        }
    }
}
