//! Headers of HDF5 files.

use crate::source::{hdf5 as source, view::View};

/// Any bytes as a file.
///
/// # Panics
/// A property is broken.
pub fn hdf5(data: &[u8]) {
    let Ok(contents) = source::read(View::memory(data)) else {
        return;
    };
    // A name takes more than a byte, and so does a header.
    assert!(contents.datasets.len() <= data.len());
    for found in &contents.datasets {
        found.header.check().expect("every header was checked");
        assert!(found.aliases.len() <= crate::plan::MAX_ALIASES);
    }
}
