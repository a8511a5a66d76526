//! Entry headers: everything about a tensor or blob except its bytes.

use super::{MAX_ENTRY_NAME_LEN, PlanError, clip};
use crate::format::Dtype;

/// Most entries of one checkpoint.
pub const MAX_ENTRIES: u64 = 1 << 20;
/// Longest entry in bytes: no file is longer, and sums of offsets cannot overflow.
pub const MAX_ENTRY_BYTES: u64 = 1 << 62;
/// Most dimensions of one tensor, as numpy 1 has it.
pub const MAX_DIMENSIONS: usize = 32;
/// Most sources that one entry may cite.
pub const MAX_ENTRY_SOURCES: usize = 1024;
/// Most further names of one entry.
pub const MAX_ALIASES: usize = 64;

/// A BLAKE3 output cut to 128 bits.
pub type Digest16 = [u8; 16];

/// Names a source file in every session of a transfer.
pub type SourceKey = Digest16;

/// What a source looked like when its fingerprint was taken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SourceState {
    /// Which source.
    pub key: SourceKey,
    /// Digest of device, inode, size, mtime, ctime and header.
    pub fingerprint: [u8; 32],
    /// The last change was long enough ago for any later one to show.
    pub settled: bool,
}

impl SourceState {
    /// Whether bytes taken under `earlier` are still those of the source now.
    pub fn unchanged_since(&self, earlier: &SourceState) -> bool {
        earlier.settled && self.fingerprint == earlier.fingerprint
    }
}

/// Tensor or side file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum EntryKind {
    /// Becomes one `.npy` file.
    Tensor {
        /// Element type.
        dtype: Dtype,
    },
    /// Kept byte for byte.
    Blob,
}

/// Order of the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Order {
    /// Last index varies fastest.
    #[default]
    C,
    /// First index varies fastest.
    Fortran,
}

/// What identifies the bytes of an entry: two headers that are equal describe
/// files of equal length and equal header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EntryHeader {
    /// Unique in the checkpoint; never a path.
    pub name: String,
    /// Tensor or blob.
    pub kind: EntryKind,
    /// Elements per dimension; empty for a scalar and for a blob.
    pub shape: Vec<u64>,
    /// Order of the elements.
    pub order: Order,
    /// Elements are big-endian.
    pub big_endian: bool,
    /// Raw length in bytes.
    pub byte_len: u64,
}

impl EntryHeader {
    /// Bytes of one element: 1 for blobs and packed types.
    pub fn item_len(&self) -> u32 {
        match self.kind {
            EntryKind::Tensor { dtype } => (dtype.bits() / 8).max(1) as u32,
            EntryKind::Blob => 1,
        }
    }

    /// A tensor header with its length computed.
    ///
    /// # Errors
    /// The rules of [`EntryHeader::check`].
    pub fn tensor(name: impl Into<String>, dtype: Dtype, shape: &[u64]) -> Result<Self, PlanError> {
        let name = name.into();
        let byte_len = dtype.byte_len(shape).ok_or_else(|| PlanError::Shape {
            name: clip(&name),
            why: format!("shape {shape:?} of {dtype} does not fit in 64 bits"),
        })?;
        let header = EntryHeader {
            name,
            kind: EntryKind::Tensor { dtype },
            shape: shape.to_vec(),
            order: Order::C,
            big_endian: false,
            byte_len,
        };
        header.check()?;
        Ok(header)
    }

    /// A blob header.
    ///
    /// # Errors
    /// The rules of [`EntryHeader::check`].
    pub fn blob(name: impl Into<String>, byte_len: u64) -> Result<Self, PlanError> {
        let header = EntryHeader {
            name: name.into(),
            kind: EntryKind::Blob,
            shape: Vec::new(),
            order: Order::C,
            big_endian: false,
            byte_len,
        };
        header.check()?;
        Ok(header)
    }

    /// The element type of a tensor.
    pub fn dtype(&self) -> Option<Dtype> {
        match self.kind {
            EntryKind::Tensor { dtype } => Some(dtype),
            EntryKind::Blob => None,
        }
    }

    /// Checks every rule that does not need another entry.
    ///
    /// # Errors
    /// [`PlanError::Name`] or [`PlanError::Shape`].
    pub fn check(&self) -> Result<(), PlanError> {
        let bad_name = |why| PlanError::Name {
            what: "entry name",
            name: clip(&self.name),
            why,
        };
        if self.name.is_empty() {
            return Err(bad_name("it is empty"));
        }
        if self.name.len() > MAX_ENTRY_NAME_LEN {
            return Err(bad_name("it is longer than 4,096 bytes"));
        }
        if self.name.contains('\0') {
            return Err(bad_name("it contains NUL"));
        }
        let bad_shape = |why| PlanError::Shape {
            name: clip(&self.name),
            why,
        };
        if self.byte_len > MAX_ENTRY_BYTES {
            return Err(bad_shape(format!(
                "{} bytes are more than {MAX_ENTRY_BYTES}",
                self.byte_len
            )));
        }
        match self.kind {
            EntryKind::Blob => {
                super::name::check_blob_name(&self.name)?;
                if !self.shape.is_empty() || self.big_endian || self.order != Order::C {
                    return Err(bad_shape("a blob has no shape, order or byte order".into()));
                }
            }
            EntryKind::Tensor { dtype } => {
                if self.shape.len() > MAX_DIMENSIONS {
                    return Err(bad_shape(format!(
                        "{} dimensions are more than {MAX_DIMENSIONS}",
                        self.shape.len()
                    )));
                }
                if self.big_endian && !dtype.can_be_big_endian() {
                    return Err(bad_shape(format!("{dtype} cannot be big-endian")));
                }
                match dtype.byte_len(&self.shape) {
                    Some(expected) if expected == self.byte_len => {}
                    Some(expected) => {
                        return Err(bad_shape(format!(
                            "shape {:?} of {dtype} is {expected} bytes, not {}",
                            self.shape, self.byte_len
                        )));
                    }
                    None => {
                        return Err(bad_shape(format!(
                            "shape {:?} of {dtype} has no length in bytes",
                            self.shape
                        )));
                    }
                }
            }
        }
        Ok(())
    }

    /// The canonical bytes of this header, for digests: every field with its
    /// length in front, integers little-endian.
    fn canonical(&self, out: &mut Vec<u8>) {
        let mut text = |s: &str| {
            out.extend_from_slice(&(s.len() as u64).to_le_bytes());
            out.extend_from_slice(s.as_bytes());
        };
        text(&self.name);
        match self.kind {
            EntryKind::Tensor { dtype } => text(dtype.name()),
            EntryKind::Blob => text(""),
        }
        out.push(match self.kind {
            EntryKind::Tensor { .. } => 1,
            EntryKind::Blob => 2,
        });
        out.push(match self.order {
            Order::C => 1,
            Order::Fortran => 2,
        });
        out.push(u8::from(self.big_endian));
        out.extend_from_slice(&(self.shape.len() as u64).to_le_bytes());
        for d in &self.shape {
            out.extend_from_slice(&d.to_le_bytes());
        }
        out.extend_from_slice(&self.byte_len.to_le_bytes());
    }
}

/// BLAKE3-128 of the canonical headers in bytewise order of their names, so it
/// is a property of the set and not of the order of announcement.
pub fn digest_entries<'a>(entries: impl IntoIterator<Item = &'a EntryHeader>) -> Digest16 {
    let mut sorted: Vec<&EntryHeader> = entries.into_iter().collect();
    sorted.sort_by(|a, b| a.name.as_bytes().cmp(b.name.as_bytes()));
    let mut hasher = blake3::Hasher::new_derive_key("tensorferry v1 entries");
    let mut bytes = Vec::new();
    for entry in sorted {
        bytes.clear();
        entry.canonical(&mut bytes);
        hasher.update(&bytes);
    }
    first_16(hasher.finalize())
}

/// The first 128 bits of a digest.
pub(crate) fn first_16(hash: blake3::Hash) -> Digest16 {
    let mut out = [0; 16];
    out.copy_from_slice(&hash.as_bytes()[..16]);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_length_that_does_not_fit_the_shape_is_refused() {
        let mut header = EntryHeader::tensor("w", Dtype::F32, &[2, 3]).unwrap();
        assert_eq!(header.byte_len, 24);
        header.byte_len = 23;
        assert!(matches!(header.check(), Err(PlanError::Shape { .. })));
    }

    #[test]
    fn a_length_near_the_end_of_the_numbers_is_refused() {
        for byte_len in [MAX_ENTRY_BYTES + 1, u64::MAX] {
            let tensor = EntryHeader::tensor("w", Dtype::U8, &[byte_len]);
            let blob = EntryHeader::blob("b", byte_len);
            for refused in [tensor, blob] {
                assert!(matches!(refused, Err(PlanError::Shape { .. })));
            }
        }
        let longest = EntryHeader::blob("b", MAX_ENTRY_BYTES).unwrap();
        let grid = crate::plan::Grid::new(crate::plan::CHUNK_LEN_MAX).unwrap();
        let count = grid.cell_count(longest.byte_len);
        assert_eq!(grid.span_bytes(longest.byte_len, 0, count), MAX_ENTRY_BYTES);
    }

    #[test]
    fn names_with_nul_or_no_bytes_are_refused() {
        for name in ["", "a\0b", &"x".repeat(4097)] {
            assert!(EntryHeader::tensor(name, Dtype::U8, &[1]).is_err());
        }
    }

    #[test]
    fn the_digest_ignores_order_and_sees_every_field() {
        let a = EntryHeader::tensor("a", Dtype::F32, &[4]).unwrap();
        let b = EntryHeader::tensor("b", Dtype::F32, &[4]).unwrap();
        let ab = digest_entries([&a, &b]);
        assert_eq!(ab, digest_entries([&b, &a]));
        let mut c = b.clone();
        c.order = Order::Fortran;
        assert_ne!(ab, digest_entries([&a, &c]));
        let mut c = b.clone();
        c.kind = EntryKind::Tensor { dtype: Dtype::I32 };
        assert_ne!(ab, digest_entries([&a, &c]));
        let mut c = b;
        c.shape = vec![2, 2];
        assert_ne!(ab, digest_entries([&a, &c]));
    }
}
