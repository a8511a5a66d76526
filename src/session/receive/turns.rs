//! Whose turn it is to write to a file.
//!
//! The kernel lets one writer at a time into a file. Threads that wait for each other
//! there burn a core or sleep, so chunks of one file queue here instead, and the thread
//! that writes the first writes all that came meanwhile.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

/// Writes that wait, by file. Bounded by what is in flight.
#[derive(Debug)]
pub(super) struct Turns<W> {
    waiting: Mutex<HashMap<u32, VecDeque<W>>>,
}

impl<W> Default for Turns<W> {
    fn default() -> Self {
        Turns {
            waiting: Mutex::default(),
        }
    }
}

impl<W> Turns<W> {
    /// Hands a write back to whoever is first at its file, who must then call
    /// [`Turns::next`] until that gives `None`; keeps it for them otherwise.
    pub(super) fn begin(&self, file: u32, write: W) -> Option<W> {
        let mut waiting = self.waiting();
        match waiting.get_mut(&file) {
            Some(queue) => {
                queue.push_back(write);
                None
            }
            None => {
                waiting.insert(file, VecDeque::new());
                Some(write)
            }
        }
    }

    /// The next write to the same file; `None`: the turn is over.
    pub(super) fn next(&self, file: u32) -> Option<W> {
        let mut waiting = self.waiting();
        let write = waiting.get_mut(&file).and_then(VecDeque::pop_front);
        if write.is_none() {
            waiting.remove(&file);
        }
        write
    }

    fn waiting(&self) -> MutexGuard<'_, HashMap<u32, VecDeque<W>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_writes_all_that_comes_meanwhile_and_files_do_not_wait_for_each_other() {
        let turns = Turns::default();
        assert_eq!(turns.begin(1, 'a'), Some('a'));
        assert_eq!(turns.begin(1, 'b'), None);
        assert_eq!(turns.begin(2, 'x'), Some('x'));
        assert_eq!(turns.begin(1, 'c'), None);
        assert_eq!((turns.next(1), turns.next(2)), (Some('b'), None));
        assert_eq!((turns.next(1), turns.next(1)), (Some('c'), None));
        // Over: the next to come is first again.
        assert_eq!(turns.begin(1, 'd'), Some('d'));
        assert_eq!(turns.next(1), None);
    }
}
