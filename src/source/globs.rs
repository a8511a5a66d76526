//! Patterns over names, as users give them.

use super::{SourceError, SourceSet};
use crate::plan::clip;
use wildmatch::WildMatch;

/// Most patterns of one kind.
const MAX_PATTERNS: usize = 1024;

/// Patterns in which `*` stands for any text and `?` for one character.
#[derive(Clone, Debug, Default)]
pub(crate) struct Globs {
    patterns: Vec<String>,
    globs: Vec<WildMatch>,
}

impl Globs {
    /// `purpose` = what the patterns are for, in the words of an error.
    ///
    /// # Errors
    /// [`SourceError::Selection`]: one is empty, or there are too many.
    pub(crate) fn new(purpose: &str, patterns: &[String]) -> Result<Globs, SourceError> {
        let selection = |why: String| SourceError::Selection { why };
        if let Some(empty) = patterns.iter().position(String::is_empty) {
            return Err(selection(format!("pattern {empty} to {purpose} is empty")));
        }
        if patterns.len() > MAX_PATTERNS {
            let why = format!("more than {MAX_PATTERNS} patterns to {purpose}");
            return Err(selection(why));
        }
        Ok(Globs {
            patterns: patterns.to_vec(),
            globs: patterns.iter().map(|p| WildMatch::new(p)).collect(),
        })
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.globs.is_empty()
    }

    /// Whether a name fits one of them.
    pub(crate) fn matches(&self, name: &str) -> bool {
        self.globs.iter().any(|glob| glob.matches(name))
    }

    /// # Errors
    /// [`SourceError::Selection`]: one fits none of these names.
    pub(crate) fn check_used<'a>(
        &self,
        names: impl Iterator<Item = &'a str> + Clone,
    ) -> Result<(), SourceError> {
        let is_unused = |glob: &WildMatch| !names.clone().any(|name| glob.matches(name));
        match self.globs.iter().position(is_unused) {
            Some(unused) => {
                let unused = clip(&self.patterns[unused]);
                let why = format!("no tensor has a name like {unused:?}");
                Err(SourceError::Selection { why })
            }
            None => Ok(()),
        }
    }

    /// As [`Globs::check_used`], of all that is in a source.
    pub(crate) fn check_used_in(&self, source: &SourceSet) -> Result<(), SourceError> {
        let entries = source.entries().iter();
        self.check_used(entries.map(|entry| entry.header.name.as_str()))
    }
}

/// Which entries go before the others.
#[derive(Clone, Debug, Default)]
pub(crate) struct First {
    globs: Globs,
    /// Looked up once where all entries are known: a peer's patterns may be many.
    known: Option<Vec<bool>>,
}

impl First {
    /// Of entries that are all there.
    ///
    /// # Errors
    /// As [`Globs::check_used`].
    pub(crate) fn of_set(globs: Globs, source: &SourceSet) -> Result<First, SourceError> {
        globs.check_used_in(source)?;
        let entries = source.entries().iter();
        let known = entries.map(|entry| globs.matches(&entry.header.name));
        Ok(First {
            known: Some(known.collect()),
            globs,
        })
    }

    /// Of entries that are still to come.
    pub(crate) fn of_growing(globs: Globs) -> First {
        First { globs, known: None }
    }

    pub(crate) fn is_first(&self, index: usize, name: &str) -> bool {
        match &self.known {
            Some(known) => known.get(index).copied().unwrap_or(false),
            None => self.globs.matches(name),
        }
    }
}
