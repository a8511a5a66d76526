//! Floor 1: what is to be moved and how it is cut. All size arithmetic lives
//! here, once; nothing here performs I/O.

mod cell_sums;
mod entry;
mod grid;
mod name;
mod places;
mod range_set;
mod text;

pub use cell_sums::CellSums;
pub(crate) use entry::first_16;
pub use entry::{
    Digest16, EntryHeader, EntryKind, MAX_ALIASES, MAX_DIMENSIONS, MAX_ENTRIES, MAX_ENTRY_BYTES,
    MAX_ENTRY_SOURCES, Order, SourceKey, SourceState, digest_entries,
};
pub use grid::{CHUNK_LEN_DEFAULT, CHUNK_LEN_MAX, CHUNK_LEN_MIN, CellId, Grid};
pub use name::{CheckpointName, FileNames, MAX_ENTRY_NAME_LEN, safe_file_name};
pub use places::{Place, Places};
pub use range_set::RangeSet;
pub(crate) use text::{MAX_TEXT_LEN, clip};
pub use text::{is_odd, printable};

/// Something about names or sizes is not allowed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PlanError {
    /// A name breaks the rules for its kind.
    #[error("{what} {name:?} is not allowed: {why}")]
    Name {
        /// Which kind of name.
        what: &'static str,
        /// The name, cut to 256 bytes.
        name: String,
        /// The rule.
        why: &'static str,
    },
    /// Shape, type and length of an entry do not fit together.
    #[error("entry {name:?}: {why}")]
    Shape {
        /// The entry, cut to 256 bytes.
        name: String,
        /// What does not fit.
        why: String,
    },
    /// The same name twice.
    #[error("entry name {name:?} occurs twice")]
    Duplicate {
        /// The name, cut to 256 bytes.
        name: String,
    },
    /// More than a limit allows.
    #[error("{what}: {found} is more than the limit of {limit}")]
    TooMany {
        /// What is counted.
        what: &'static str,
        /// How many there are.
        found: u64,
        /// How many may be.
        limit: u64,
    },
    /// The chunk length is not a power of two within its limits.
    #[error("chunk length {0} is not a power of two from {CHUNK_LEN_MIN} to {CHUNK_LEN_MAX} bytes")]
    ChunkLen(u64),
}
