//! The grid of cells that every entry is cut into.

use super::PlanError;

/// Smallest chunk length in bytes.
pub const CHUNK_LEN_MIN: u32 = 256 << 10;
/// Largest chunk length in bytes.
pub const CHUNK_LEN_MAX: u32 = 8 << 20;
/// Chunk length when nobody wishes another.
pub const CHUNK_LEN_DEFAULT: u32 = 1 << 20;

/// One cell of one entry. The entry number's meaning (session or receiver) is
/// that of whoever holds the id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CellId {
    /// Entry number.
    pub entry: u32,
    /// Cell number in the entry, from 0.
    pub cell: u64,
}

/// Cuts entries into cells of one length, counted from byte 0 of each entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    chunk_len: u32,
}

impl Grid {
    /// A grid of this cell length in bytes.
    ///
    /// # Errors
    /// [`PlanError::ChunkLen`] unless it is a power of two within the limits.
    pub fn new(chunk_len: u32) -> Result<Self, PlanError> {
        if !chunk_len.is_power_of_two() || !(CHUNK_LEN_MIN..=CHUNK_LEN_MAX).contains(&chunk_len) {
            return Err(PlanError::ChunkLen(u64::from(chunk_len)));
        }
        Ok(Grid { chunk_len })
    }

    /// A grid without the limits, for simulation.
    #[cfg(any(test, feature = "__internals"))]
    pub(crate) fn tiny(chunk_len: u32) -> Self {
        Grid { chunk_len }
    }

    /// Cell length in bytes.
    pub fn chunk_len(self) -> u32 {
        self.chunk_len
    }

    /// Number of cells of an entry.
    pub fn cell_count(self, byte_len: u64) -> u64 {
        byte_len.div_ceil(u64::from(self.chunk_len))
    }

    /// Offset and length in bytes of a cell, or `None` when the entry has no
    /// such cell.
    pub fn cell_span(self, byte_len: u64, cell: u64) -> Option<(u64, u32)> {
        let offset = cell.checked_mul(u64::from(self.chunk_len))?;
        let left = byte_len.checked_sub(offset).filter(|&n| n > 0)?;
        // The minimum fits: chunk_len does.
        Some((offset, left.min(u64::from(self.chunk_len)) as u32))
    }

    /// The cell that begins at `offset`, or `None` when none does.
    pub fn cell_at(self, byte_len: u64, offset: u64) -> Option<u64> {
        let chunk_len = u64::from(self.chunk_len);
        (offset < byte_len && offset.is_multiple_of(chunk_len)).then(|| offset / chunk_len)
    }

    /// Bytes in the cells from `first`, `count` of them, which must exist.
    pub fn span_bytes(self, byte_len: u64, first: u64, count: u64) -> u64 {
        let chunk_len = u64::from(self.chunk_len);
        let end = ((first + count) * chunk_len).min(byte_len);
        end.saturating_sub(first * chunk_len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_powers_of_two_within_the_limits() {
        for bad in [0, 1, 1 << 17, 3 << 18, (1 << 20) + 1, 1 << 24] {
            assert_eq!(Grid::new(bad), Err(PlanError::ChunkLen(u64::from(bad))));
        }
        assert!(Grid::new(CHUNK_LEN_MIN).is_ok() && Grid::new(CHUNK_LEN_MAX).is_ok());
    }

    #[test]
    fn cells_tile_an_entry_exactly() {
        let grid = Grid::tiny(8);
        for len in [0u64, 1, 7, 8, 9, 16, 17] {
            let mut at = 0;
            for cell in 0..grid.cell_count(len) {
                let (offset, n) = grid.cell_span(len, cell).unwrap();
                assert_eq!(offset, at);
                assert_eq!(grid.cell_at(len, offset), Some(cell));
                at += u64::from(n);
            }
            assert_eq!(at, len);
            assert_eq!(grid.cell_span(len, grid.cell_count(len)), None);
            assert_eq!(grid.span_bytes(len, 0, grid.cell_count(len)), len);
        }
        assert_eq!(grid.cell_span(u64::MAX, u64::MAX), None);
        assert_eq!(grid.cell_at(16, 4), None);
        assert_eq!(grid.cell_at(16, 16), None);
    }
}
