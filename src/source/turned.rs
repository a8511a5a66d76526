//! A tensor in Fortran order, read in C order.

use super::{SourceEntry, SourceError, SourceSet, boxes, gathered::Window};
use crate::plan::Order;

impl SourceSet {
    /// Fills `buf` with the bytes that an entry has in C order, from `offset` on. Needs no
    /// more memory than a window of 256 KiB, reads the entry from front to back, and so
    /// costs the less the longer `buf` is.
    ///
    /// # Errors
    /// Those of [`SourceSet::read_at`].
    pub(crate) fn read_turned_at(
        &self,
        entry_index: usize,
        offset: u64,
        buf: &mut [u8],
    ) -> Result<(), SourceError> {
        self.check_range(entry_index, offset, buf.len() as u64)?;
        let Some(entry) = self.entries.get(entry_index) else {
            return Ok(());
        };
        if !entry.is_turned() {
            return self.read_at(entry_index, offset, buf);
        }
        let (shape, item_len) = (&entry.header.shape, u64::from(entry.header.item_len()));
        let end = offset + buf.len() as u64;
        if !offset.is_multiple_of(item_len) || !end.is_multiple_of(item_len) {
            // Whole elements first.
            let first = offset / item_len * item_len;
            let whole_len = end.next_multiple_of(item_len) - first;
            let mut whole = vec![0; whole_len as usize];
            self.read_turned_at(entry_index, first, &mut whole)?;
            let skip = (offset - first) as usize;
            buf.copy_from_slice(&whole[skip..skip + buf.len()]);
            return Ok(());
        }
        // None overflows: the length of the entry was computed from them.
        let reversed: Vec<u64> = shape.iter().rev().copied().collect();
        let mut from_steps = boxes::steps(&reversed, item_len).unwrap_or_default();
        from_steps.reverse();
        let to_steps = boxes::steps(shape, item_len).unwrap_or_default();
        let mut window = Window::new(entry.header.byte_len, |at, bytes: &mut [u8]| {
            self.read_at(entry_index, at, bytes)
        });
        let (first, last) = (offset / item_len, end / item_len);
        boxes::cut(shape, first, last, &mut |start, lens| {
            let from = boxes::place(start, &from_steps);
            let to = boxes::place(start, &to_steps) - offset;
            let steps = (&from_steps[..], &to_steps[..]);
            boxes::runs(lens, item_len, steps.0, steps.1, &mut |f, t, len| {
                let to = (to + t) as usize;
                window.copy(from + f, &mut buf[to..to + len as usize])
            })
        })
    }
}

impl SourceEntry {
    /// Whether the bytes would be others in C order.
    pub(crate) fn is_turned(&self) -> bool {
        let long_count = self.header.shape.iter().filter(|&&len| len != 1).count();
        self.header.order == Order::Fortran && long_count > 1 && self.header.byte_len > 0
    }
}

#[cfg(test)]
mod tests {
    use super::super::SourceOptions;
    use super::*;
    use crate::format::npy::encode_header;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn any_run_of_a_turned_tensor_is_that_of_its_elements_in_c_order(
            shape in proptest::collection::vec(0u64..6, 0..5),
            a in 0u64..3000,
            b in 0u64..3000,
        ) {
            let count: u64 = shape.iter().product();
            // Element `i` in C order holds `i`.
            let c_steps = boxes::steps(&shape, 1).unwrap();
            let reversed: Vec<u64> = shape.iter().rev().copied().collect();
            let f_steps: Vec<u64> = boxes::steps(&reversed, 1).unwrap().into_iter().rev().collect();
            let mut values = vec![0u32; count as usize];
            for i in 0..count {
                let index: Vec<u64> = c_steps.iter().zip(&shape).map(|(step, len)| i / step % len).collect();
                values[boxes::place(&index, &f_steps) as usize] = i as u32;
            }
            let temp = tempfile::tempdir().unwrap();
            let path = temp.path().join("w.npy");
            let bytes: Vec<u8> = values.iter().flat_map(|v| v.to_le_bytes()).collect();
            std::fs::write(&path, [encode_header("<u4", true, &shape), bytes].concat()).unwrap();
            let source = SourceSet::open(&[&path], &SourceOptions::default()).unwrap();

            let expected: Vec<u8> = (0..count as u32).flat_map(u32::to_le_bytes).collect();
            let len = expected.len() as u64;
            let (a, b) = (a % (len + 1), b % (len + 1));
            let mut found = vec![0; a.abs_diff(b) as usize];
            source.read_turned_at(0, a.min(b), &mut found).unwrap();
            prop_assert_eq!(&found[..], &expected[a.min(b) as usize..a.max(b) as usize]);
            prop_assert!(source.read_turned_at(0, len, &mut [0]).is_err());
        }
    }
}
