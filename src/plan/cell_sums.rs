//! Checksums of the cells of one entry, sparse.

use std::collections::BTreeMap;

/// Cells per page.
const PAGE: u64 = 1024;

/// CRC-32C by cell number. Memory grows with the cells set, not with the highest
/// cell number, so a length claimed by a peer costs nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CellSums {
    pages: BTreeMap<u64, Vec<u32>>,
}

impl CellSums {
    /// Records the sum of a cell.
    pub fn set(&mut self, cell: u64, crc: u32) {
        let page = self.pages.entry(cell / PAGE).or_default();
        let at = (cell % PAGE) as usize;
        if page.len() <= at {
            page.resize(at + 1, 0);
        }
        page[at] = crc;
    }

    /// The sum of a cell; 0 when it was never set.
    pub fn get(&self, cell: u64) -> u32 {
        self.pages
            .get(&(cell / PAGE))
            .and_then(|page| page.get((cell % PAGE) as usize))
            .copied()
            .unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn far_cells_cost_no_more_than_near_ones() {
        let mut sums = CellSums::default();
        sums.set(u64::MAX, 7);
        sums.set(0, 1);
        sums.set(1025, 3);
        assert_eq!((sums.get(u64::MAX), sums.get(0), sums.get(1025)), (7, 1, 3));
        assert_eq!((sums.get(1), sums.get(1024), sums.get(1 << 40)), (0, 0, 0));
    }
}
