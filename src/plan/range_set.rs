//! A set of numbers kept as sorted, disjoint, non-adjacent ranges.

use std::ops::Range;

/// A set of `u64`, compact where members are consecutive.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RangeSet {
    // Sorted by start; no two touch.
    ranges: Vec<Range<u64>>,
}

impl RangeSet {
    /// The empty set.
    pub fn new() -> Self {
        RangeSet::default()
    }

    /// All numbers of one range.
    pub fn of(range: Range<u64>) -> Self {
        let mut set = RangeSet::new();
        set.insert(range);
        set
    }

    /// Whether there is no member.
    pub fn is_empty(&self) -> bool {
        self.ranges.is_empty()
    }

    /// Number of members.
    pub fn count(&self) -> u64 {
        self.ranges.iter().map(|r| r.end - r.start).sum()
    }

    /// The ranges, in order.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = Range<u64>> + '_ {
        self.ranges.iter().cloned()
    }

    /// Every member, in order.
    pub fn members(&self) -> impl Iterator<Item = u64> + '_ {
        self.ranges.iter().cloned().flatten()
    }

    /// The smallest member.
    pub fn first(&self) -> Option<u64> {
        self.ranges.first().map(|r| r.start)
    }

    /// Removes and returns the smallest member.
    pub fn pop_first(&mut self) -> Option<u64> {
        let first = self.ranges.first_mut()?;
        let n = first.start;
        first.start += 1;
        if first.start == first.end {
            self.ranges.remove(0);
        }
        Some(n)
    }

    /// Whether `n` is a member.
    pub fn contains(&self, n: u64) -> bool {
        let after = self.ranges.partition_point(|r| r.start <= n);
        after > 0 && n < self.ranges[after - 1].end
    }

    /// Adds a range.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        // All ranges that touch or overlap the new one melt into it.
        let from = self.ranges.partition_point(|r| r.end < range.start);
        let to = self.ranges.partition_point(|r| r.start <= range.end);
        let mut merged = range;
        if from < to {
            merged.start = merged.start.min(self.ranges[from].start);
            merged.end = merged.end.max(self.ranges[to - 1].end);
        }
        self.ranges.splice(from..to, [merged]);
    }

    /// Removes a range.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.start >= range.end {
            return;
        }
        let from = self.ranges.partition_point(|r| r.end <= range.start);
        let to = self.ranges.partition_point(|r| r.start < range.end);
        if from >= to {
            return;
        }
        let left = self.ranges[from].start..range.start;
        let right = range.end..self.ranges[to - 1].end;
        let rest = [left, right].into_iter().filter(|r| r.start < r.end);
        self.ranges.splice(from..to, rest);
    }

    /// Adds all members of another set.
    pub fn union_with(&mut self, other: &RangeSet) {
        for range in other.iter() {
            self.insert(range);
        }
    }

    /// Removes all members of another set.
    pub fn subtract(&mut self, other: &RangeSet) {
        for range in other.iter() {
            self.remove(range);
        }
    }

    /// Members that are also members of `other`.
    pub fn intersection(&self, other: &RangeSet) -> RangeSet {
        let mut both = RangeSet::new();
        for range in other.iter() {
            let from = self.ranges.partition_point(|r| r.end <= range.start);
            for r in self.ranges[from..]
                .iter()
                .take_while(|r| r.start < range.end)
            {
                both.insert(r.start.max(range.start)..r.end.min(range.end));
            }
        }
        both
    }

    /// The numbers below `end` that are not members.
    pub fn missing_below(&self, end: u64) -> RangeSet {
        let mut missing = RangeSet::of(0..end);
        missing.subtract(self);
        missing
    }

    /// Whether every member of `other` is one of this set.
    pub fn is_superset(&self, other: &RangeSet) -> bool {
        other.iter().all(|r| {
            let after = self.ranges.partition_point(|s| s.start <= r.start);
            after > 0 && r.end <= self.ranges[after - 1].end
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_plain_set(ops in prop::collection::vec((any::<bool>(), 0u64..60, 0u64..20), 0..60)) {
            let mut set = RangeSet::new();
            let mut model = BTreeSet::new();
            for (add, start, len) in ops {
                let range = start..start + len;
                if add {
                    set.insert(range.clone());
                    model.extend(range);
                } else {
                    set.remove(range.clone());
                    for n in range { model.remove(&n); }
                }
                prop_assert!(set.ranges.windows(2).all(|w| w[0].end < w[1].start));
                prop_assert!(set.ranges.iter().all(|r| r.start < r.end));
            }
            prop_assert_eq!(set.members().collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count(), model.len() as u64);
            for n in 0..90 { prop_assert_eq!(set.contains(n), model.contains(&n)); }
            prop_assert_eq!(set.missing_below(80).count(), 80 - model.len() as u64);
            prop_assert!(set.is_superset(&set.clone()));
            let mut popped = set.clone();
            prop_assert_eq!(popped.pop_first(), model.first().copied());
        }
    }
}
