//! The pages of a file that small reads of its header have touched.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

/// Bytes of a page.
const PAGE_LEN: usize = 4096;
/// Longest read that goes through pages; a longer one costs a call of its own.
const MAX_READ_LEN: usize = PAGE_LEN;
/// Most pages held for one file: 2 MiB.
const MAX_PAGE_COUNT: usize = 512;

/// Headers of some formats are thousands of small parts that lie near each other: a call
/// for each page costs far less than a call for each part.
#[derive(Debug, Default)]
pub(super) struct Pages {
    pages: Mutex<HashMap<u64, Box<[u8]>>>,
}

impl Pages {
    /// Fills `buf` from `offset` on, all of which lies within `file_len`, or says `false`
    /// where that is not for pages to do. `read` fills a buffer from a place of the file.
    pub(super) fn read<E>(
        &self,
        offset: u64,
        buf: &mut [u8],
        file_len: u64,
        read: impl Fn(u64, &mut [u8]) -> Result<(), E>,
    ) -> Result<bool, E> {
        if buf.len() > MAX_READ_LEN || buf.is_empty() {
            return Ok(false);
        }
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        let (mut at, mut rest) = (offset, buf);
        while !rest.is_empty() {
            let start = at - at % PAGE_LEN as u64;
            if !pages.contains_key(&start) {
                let len = (file_len - start).min(PAGE_LEN as u64) as usize;
                let mut page = vec![0; len].into_boxed_slice();
                read(start, &mut page)?;
                // Headers are read more or less from front to back.
                if pages.len() == MAX_PAGE_COUNT {
                    pages.clear();
                }
                pages.insert(start, page);
            }
            let page = pages.get(&start).map_or(&[][..], |page| page);
            let skip = (at - start) as usize;
            let found = page.get(skip..).unwrap_or_default();
            let len = found.len().min(rest.len());
            if len == 0 {
                return Ok(false);
            }
            let (now, later) = rest.split_at_mut(len);
            now.copy_from_slice(&found[..len]);
            (at, rest) = (at + len as u64, later);
        }
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::RefCell;

    /// What a file of this length would give, and which pages were asked for.
    fn ask(pages: &Pages, asked: &RefCell<Vec<u64>>, offset: u64, len: usize) -> Option<Vec<u8>> {
        let content: Vec<u8> = (0..10_000u64).map(|i| (i % 251) as u8).collect();
        let mut buf = vec![0; len];
        let done = pages.read(offset, &mut buf, 10_000, |at, buf| {
            asked.borrow_mut().push(at);
            buf.copy_from_slice(&content[at as usize..at as usize + buf.len()]);
            Ok::<(), ()>(())
        });
        let expected = &content[offset as usize..offset as usize + len];
        done.unwrap().then(|| {
            assert_eq!(buf, expected, "{len} at {offset}");
            buf
        })
    }

    #[test]
    fn every_page_is_read_once_whatever_is_asked_of_it() {
        let (pages, asked) = (Pages::default(), RefCell::default());
        for (offset, len) in [
            (0, 1),
            (4095, 1),
            (4095, 2),
            (9999, 1),
            (4000, 4096),
            (8191, 1809),
        ] {
            assert!(ask(&pages, &asked, offset, len).is_some());
        }
        assert_eq!(*asked.borrow(), [0, 4096, 8192]);
    }

    #[test]
    fn long_reads_and_those_of_nothing_are_left_to_the_file() {
        let (pages, asked) = (Pages::default(), RefCell::default());
        for (offset, len) in [(0, 4097), (10_000, 0)] {
            assert!(ask(&pages, &asked, offset, len).is_none());
        }
        assert!(asked.borrow().is_empty());
    }

    #[test]
    fn memory_is_bounded() {
        let pages = Pages::default();
        for page in 0..3 * MAX_PAGE_COUNT as u64 {
            let read = |_, buf: &mut [u8]| {
                buf.fill(7);
                Ok::<(), ()>(())
            };
            let mut buf = [0; 3];
            assert!(pages.read(page * 4096, &mut buf, u64::MAX, read).unwrap());
            assert_eq!(buf, [7; 3]);
            assert!(pages.pages.lock().unwrap().len() <= MAX_PAGE_COUNT);
        }
    }

    #[test]
    fn what_could_not_be_read_is_not_kept() {
        let pages = Pages::default();
        let mut buf = [0; 3];
        assert!(pages.read(0, &mut buf, 9, |_, _| Err(())).is_err());
        assert!(pages.pages.lock().unwrap().is_empty());
    }
}
