//! Which entry lies where on the receiver.

use std::collections::{BTreeMap, HashMap};

/// Where an entry lies: in a file of its own, or in a part of one that it shares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place<'a> {
    /// Path of the file.
    pub file: &'a str,
    /// First byte in a shared file; `None` where it has its own.
    pub data_offset: Option<u64>,
    /// Length in bytes.
    pub byte_len: u64,
}

/// The places of entries, which have numbers. Nothing overlaps.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Places {
    whole: HashMap<String, u32>,
    /// By file and first byte: the end, and whose it is. Entries without bytes share
    /// their place with others and are not here.
    parts: BTreeMap<(String, u64), (u64, u32)>,
}

impl Places {
    /// Who has bytes of this place, or its file.
    pub fn holders(&self, place: Place<'_>) -> Vec<u32> {
        let mut holders: Vec<u32> = self.whole.get(place.file).copied().into_iter().collect();
        let (start, end) = match place.data_offset {
            None => (0, u64::MAX),
            Some(_) if place.byte_len == 0 => return holders,
            Some(offset) => (offset, offset.saturating_add(place.byte_len)),
        };
        let until_end = self.parts.range(..(place.file.to_owned(), end));
        let overlapping = until_end
            .rev()
            .take_while(|((file, _), (end, _))| file == place.file && *end > start);
        holders.extend(overlapping.map(|(_, (_, number))| number));
        holders
    }

    /// This entry lies there from now on; nobody else does.
    pub fn insert(&mut self, place: Place<'_>, number: u32) {
        let file = place.file.to_owned();
        match place.data_offset {
            None => {
                self.whole.insert(file, number);
            }
            Some(_) if place.byte_len == 0 => {}
            Some(offset) => {
                let end = offset.saturating_add(place.byte_len);
                self.parts.insert((file, offset), (end, number));
            }
        }
    }

    /// Nobody lies there any more.
    pub fn remove(&mut self, place: Place<'_>) {
        match place.data_offset {
            None => {
                self.whole.remove(place.file);
            }
            Some(_) if place.byte_len == 0 => {}
            Some(offset) => {
                self.parts.remove(&(place.file.to_owned(), offset));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(file: &str, offset: u64, byte_len: u64) -> Place<'_> {
        Place {
            file,
            data_offset: Some(offset),
            byte_len,
        }
    }

    fn whole(file: &str) -> Place<'_> {
        Place {
            file,
            data_offset: None,
            byte_len: 5,
        }
    }

    #[test]
    fn whoever_has_a_byte_of_a_place_is_found() {
        let mut places = Places::default();
        places.insert(whole("a"), 1);
        places.insert(part("b", 100, 50), 2);
        places.insert(part("b", 150, 10), 3);
        places.insert(part("b", 160, 0), 4);
        places.insert(part("c", 100, 50), 5);
        let holders = |place| {
            let mut found = places.holders(place);
            found.sort_unstable();
            found
        };
        let nobody: [u32; 0] = [];
        assert_eq!(holders(whole("a")), [1]);
        assert_eq!(holders(whole("b")), [2, 3]);
        assert_eq!(holders(part("a", 7, 1)), [1]);
        assert_eq!(holders(part("b", 0, 100)), nobody);
        assert_eq!(holders(part("b", 99, 2)), [2]);
        assert_eq!(holders(part("b", 149, 2)), [2, 3]);
        assert_eq!(holders(part("b", 120, 1)), [2]);
        assert_eq!(holders(part("b", 120, 0)), nobody);
        assert_eq!(holders(part("b", 160, u64::MAX)), nobody);
        assert_eq!(holders(part("d", 0, u64::MAX)), nobody);
    }

    #[test]
    fn a_place_that_was_left_is_free() {
        let mut places = Places::default();
        places.insert(part("b", 100, 50), 2);
        places.remove(part("b", 100, 50));
        places.insert(whole("a"), 1);
        places.remove(whole("a"));
        assert_eq!(places, Places::default());
    }
}
