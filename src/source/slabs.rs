//! An entry that lies in its source as several boxes of which some are not one run of
//! its bytes: columns of a matrix, for example. Reading it copies.

use super::{SourceError, derived::Derived, files::FileTable};

/// Bytes that are read at once.
const SCRATCH_LEN: u64 = 64 << 10;

/// A box of an entry, in C order in one run of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Slab {
    pub(super) file_index: u32,
    pub(super) file_offset: u64,
    /// First index in each dimension.
    pub(super) start: Vec<u64>,
    /// Length in each dimension.
    pub(super) shape: Vec<u64>,
}

/// Boxes that tile an entry. The bytes of an element are the last dimension.
#[derive(Debug)]
pub(crate) struct Slabs {
    shape: Vec<u64>,
    /// Bytes from one index to the next, in each dimension.
    strides: Vec<u64>,
    slabs: Vec<Slab>,
}

impl Slabs {
    /// Boxes of a tensor of this shape, whose length in bytes fits 64 bits.
    pub(super) fn new(shape: &[u64], item_len: u32, slabs: Vec<Slab>) -> Result<Slabs, String> {
        let item_len = u64::from(item_len);
        let mut slabs = slabs;
        // Nothing lies in an empty one.
        slabs.retain(|slab| !slab.shape.contains(&0));
        for slab in &mut slabs {
            slab.start.push(0);
            slab.shape.push(item_len);
        }
        let shape = [shape, &[item_len]].concat();
        if shape.contains(&0) {
            let strides = vec![0; shape.len()];
            return Ok(Slabs {
                shape,
                strides,
                slabs: Vec::new(),
            });
        }
        let mut strides = vec![1; shape.len()];
        for d in (1..shape.len()).rev() {
            strides[d - 1] = strides[d] * shape[d];
        }
        let byte_len: u64 = shape.iter().product();
        let covered: u128 = slabs.iter().map(|s| u128::from(s.byte_len())).sum();
        if covered != u128::from(byte_len) {
            return Err(format!("its parts have {covered} bytes, it has {byte_len}"));
        }
        for (index, a) in slabs.iter().enumerate() {
            if let Some(b) = slabs[index + 1..].iter().find(|b| a.overlaps(b)) {
                return Err(format!(
                    "its parts at {:?} and {:?} overlap",
                    &a.start[..shape.len() - 1],
                    &b.start[..shape.len() - 1]
                ));
            }
        }
        Ok(Slabs {
            shape,
            strides,
            slabs,
        })
    }

    /// The boxes as runs of the entry, in order, when all of them are runs: length in
    /// bytes, file and offset.
    pub(super) fn runs(&self) -> Option<Vec<(u64, u32, u64)>> {
        let mut runs = Vec::with_capacity(self.slabs.len());
        for slab in &self.slabs {
            let last = slab.last_partial(&self.shape);
            if slab.shape[..last].iter().any(|&len| len > 1) {
                return None;
            }
            runs.push((self.offset_of(slab, 0, last), slab));
        }
        runs.sort_by_key(|&(at, _)| at);
        let run = |&(_, slab): &(u64, &Slab)| (slab.byte_len(), slab.file_index, slab.file_offset);
        Some(runs.iter().map(run).collect())
    }

    /// The boxes.
    pub(super) fn slabs(&self) -> &[Slab] {
        &self.slabs
    }

    /// Where a row of a box begins in the entry. A row is what follows the dimension
    /// `last`, that one included.
    fn offset_of(&self, slab: &Slab, mut row: u64, last: usize) -> u64 {
        let mut offset = slab.start[last] * self.strides[last];
        for d in (0..last).rev() {
            offset += (slab.start[d] + row % slab.shape[d]) * self.strides[d];
            row /= slab.shape[d];
        }
        offset
    }

    /// How many bytes of a box come before this one of the entry.
    fn rank(&self, slab: &Slab, offset: u64) -> u64 {
        let byte_len = slab.byte_len();
        let (mut rank, mut rest, mut inner) = (0, offset, byte_len);
        for d in 0..self.shape.len() {
            // The first dimension may be passed: then all of the box was.
            let index = rest / self.strides[d];
            rest %= self.strides[d];
            inner /= slab.shape[d];
            let Some(index) = index.checked_sub(slab.start[d]) else {
                return rank;
            };
            if index >= slab.shape[d] {
                return rank + slab.shape[d] * inner;
            }
            rank += index * inner;
        }
        rank
    }
}

impl Derived for Slabs {
    fn read_at(&self, files: &FileTable, offset: u64, buf: &mut [u8]) -> Result<(), SourceError> {
        let end = offset + buf.len() as u64;
        let mut scratch = Vec::new();
        for slab in &self.slabs {
            let last = slab.last_partial(&self.shape);
            let row_len: u64 = slab.shape[last..].iter().product();
            let (mut at, to) = (self.rank(slab, offset), self.rank(slab, end));
            while at < to {
                let now = (to - at).min(SCRATCH_LEN);
                scratch.resize(now as usize, 0);
                files.read_at(slab.file_index, slab.file_offset + at, &mut scratch)?;
                let mut rest = &scratch[..];
                while !rest.is_empty() {
                    let (row, within) = (at / row_len, at % row_len);
                    let len = (row_len - within).min(rest.len() as u64);
                    let start = (self.offset_of(slab, row, last) + within - offset) as usize;
                    let (run, later) = rest.split_at(len as usize);
                    buf[start..start + run.len()].copy_from_slice(run);
                    rest = later;
                    at += len;
                }
            }
        }
        Ok(())
    }
}

impl Slab {
    fn byte_len(&self) -> u64 {
        self.shape.iter().product()
    }

    /// The last dimension that it has not all of; the first where there is none.
    fn last_partial(&self, whole: &[u64]) -> usize {
        let partial = |&d: &usize| self.shape[d] != whole[d];
        (0..whole.len()).rev().find(partial).unwrap_or(0)
    }

    fn overlaps(&self, other: &Slab) -> bool {
        (0..self.shape.len()).all(|d| {
            self.start[d] < other.start[d] + other.shape[d]
                && other.start[d] < self.start[d] + self.shape[d]
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn slab(file_offset: u64, start: &[u64], shape: &[u64]) -> Slab {
        Slab {
            file_index: 0,
            file_offset,
            start: start.to_vec(),
            shape: shape.to_vec(),
        }
    }

    /// Cuts an entry of consecutive bytes into a grid of boxes and reads it back.
    fn check(shape: &[u64], item_len: u32, cuts: &[&[u64]]) {
        let len = shape.iter().product::<u64>() * u64::from(item_len);
        let entry: Vec<u8> = (0..len).map(|i| (i % 251) as u8).collect();
        let mut boxes = vec![(vec![], vec![])];
        for (d, cuts) in cuts.iter().enumerate() {
            let ends: Vec<u64> = cuts.iter().copied().chain([shape[d]]).collect();
            let one = |(start, size): &(Vec<u64>, Vec<u64>)| {
                let mut at = 0;
                let mut out = Vec::new();
                for &end in &ends {
                    out.push((
                        [&start[..], &[at]].concat(),
                        [&size[..], &[end - at]].concat(),
                    ));
                    at = end;
                }
                out
            };
            boxes = boxes.iter().flat_map(one).collect();
        }
        boxes.reverse();
        let mut file = vec![0xee; 3];
        let mut slabs = Vec::new();
        for (start, size) in &boxes {
            slabs.push(slab(file.len() as u64, start, size));
            for row in 0..size.iter().product::<u64>() {
                let (mut rest, mut at, mut stride) = (row, 0, u64::from(item_len));
                for d in (0..shape.len()).rev() {
                    at += (start[d] + rest % size[d]) * stride;
                    rest /= size[d];
                    stride *= shape[d];
                }
                file.extend_from_slice(&entry[at as usize..][..item_len as usize]);
            }
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("data");
        std::fs::write(&path, &file).unwrap();
        let mut files = FileTable::default();
        files
            .add(&super::super::files::OpenFile::open(&path).unwrap(), &[])
            .unwrap();
        let slabs = Slabs::new(shape, item_len, slabs).unwrap();
        for offset in 0..len {
            for end in [offset, offset + 1, offset + 7, len] {
                let mut buf = vec![0; (end.min(len) - offset) as usize];
                slabs.read_at(&files, offset, &mut buf).unwrap();
                assert_eq!(
                    buf,
                    entry[offset as usize..][..buf.len()],
                    "{shape:?} from {offset}"
                );
            }
        }
    }

    #[test]
    fn boxes_are_put_together_from_any_byte_on() {
        check(&[6], 4, &[&[2, 3]]);
        check(&[5, 6], 2, &[&[], &[1, 4]]);
        check(&[5, 6], 1, &[&[2], &[3]]);
        check(&[3, 4, 5], 4, &[&[1], &[2], &[1, 2]]);
        check(&[2, 1, 7], 8, &[&[], &[], &[3]]);
        check(&[1, 1], 3, &[&[], &[]]);
    }

    #[test]
    fn runs_are_told_from_boxes() {
        let rows = vec![slab(20, &[2, 0], &[1, 4]), slab(0, &[0, 0], &[2, 4])];
        let runs = Slabs::new(&[3, 4], 2, rows).unwrap().runs();
        assert_eq!(runs, Some(vec![(16, 0, 0), (8, 0, 20)]));
        let columns = vec![slab(0, &[0, 0], &[3, 1]), slab(9, &[0, 1], &[3, 3])];
        assert_eq!(
            Slabs::new(&[3, 4], 1, columns.clone()).unwrap().runs(),
            None
        );
        // Of a single row, columns are runs.
        let columns = vec![slab(5, &[0, 1], &[1, 3]), slab(0, &[0, 0], &[1, 1])];
        let runs = Slabs::new(&[1, 4], 1, columns).unwrap().runs();
        assert_eq!(runs, Some(vec![(1, 0, 0), (3, 0, 5)]));
    }

    #[test]
    fn holes_and_overlaps_are_refused() {
        let hole = vec![slab(0, &[0, 0], &[3, 1])];
        assert!(
            Slabs::new(&[3, 2], 1, hole)
                .unwrap_err()
                .contains("3 bytes")
        );
        let overlap = vec![slab(0, &[0, 0], &[3, 1]), slab(0, &[0, 0], &[3, 1])];
        assert!(
            Slabs::new(&[3, 2], 1, overlap)
                .unwrap_err()
                .contains("overlap")
        );
    }
}
