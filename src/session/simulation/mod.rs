//! Both roles in one thread, over a link that fails and a disk that forgets.
//!
//! Everything follows from one number: what the source holds, in which order jobs
//! complete, what the link loses and where the power fails, also between any two
//! steps of a commit. The journal is the real one, byte for byte; the disk keeps
//! apart what was written and what was synced. After every step it is checked that
//! each durable ack is true ([`checks`]). Once the trouble stops, a session whose link
//! lost nothing must come to its end by itself, and one begun then must publish.
//!
//! `TENSORFERRY_SEEDS` = how many worlds, `TENSORFERRY_SEED` = this one alone.

mod checks;
mod disk;
mod session;
mod source;
mod world;

use std::panic::{AssertUnwindSafe, catch_unwind};
use world::{Story, World};

const SEED_COUNT_DEFAULT: u64 = 10_000;
/// A mutant that lives this long is not caught.
const MUTANT_SEED_COUNT: u64 = 5_000;

/// A wrong turn of what stands around the roles, to show that the checks see it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mutant {
    None,
    AckFirst,
    JournalFirst,
    SkipJournalSync,
    SkipNames,
    SkipCrc,
    TrustUnsettled,
}

/// SplitMix64.
#[derive(Clone, Debug)]
struct Rng(u64);

impl Rng {
    fn new(seed: u64) -> Self {
        Rng(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// From 0 to below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    fn chance(&mut self, per_mille: u32) -> bool {
        self.below(1000) < per_mille as usize
    }

    fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len())]
    }
}

fn run(seed: u64, mutant: Mutant) -> Result<Story, String> {
    catch_unwind(AssertUnwindSafe(|| World::new(seed, mutant).run())).map_err(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        text.or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_default()
    })
}

fn number_from_env(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(
        text.parse()
            .unwrap_or_else(|_| panic!("{name}={text} is not a number")),
    )
}

#[test]
fn acks_are_true_in_every_world() {
    let seeds = match number_from_env("TENSORFERRY_SEED") {
        Some(seed) => seed..seed + 1,
        None => 0..number_from_env("TENSORFERRY_SEEDS").unwrap_or(SEED_COUNT_DEFAULT),
    };
    let mut total = Story::default().counts();
    for seed in seeds.clone() {
        match run(seed, Mutant::None) {
            Ok(story) => total
                .iter_mut()
                .zip(story.counts())
                .for_each(|(sum, (_, n))| sum.1 += n),
            Err(why) => panic!("run again with TENSORFERRY_SEED={seed}: {why}"),
        }
    }
    let count = seeds.count();
    println!("{count} worlds: {total:?}");
    // Worlds in which nothing happens would prove nothing.
    let unseen = total.iter().find(|(_, sum)| *sum == 0);
    assert!(count < 1000 || unseen.is_none(), "no world had {unseen:?}");
}

/// Worlds until the mutant is caught, and by what.
fn caught(mutant: Mutant) -> (u64, String) {
    let mut worlds = (0..MUTANT_SEED_COUNT).map(|seed| (seed, run(seed, mutant)));
    let caught = worlds.find_map(|(seed, result)| result.err().map(|why| (seed, why)));
    caught.unwrap_or_else(|| panic!("{mutant:?} was not caught in {MUTANT_SEED_COUNT} worlds"))
}

#[track_caller]
fn assert_caught(mutant: Mutant) {
    let (seed, why) = caught(mutant);
    println!("{mutant:?} fell in world {seed}: {why}");
}

#[test]
fn an_ack_before_the_syncs_is_caught() {
    assert_caught(Mutant::AckFirst);
}

#[test]
fn records_before_the_data_are_caught() {
    assert_caught(Mutant::JournalFirst);
}

#[test]
fn records_that_are_not_synced_are_caught() {
    assert_caught(Mutant::SkipJournalSync);
}

#[test]
fn names_that_are_not_synced_are_caught() {
    assert_caught(Mutant::SkipNames);
}

#[test]
fn chunks_that_are_not_checked_are_caught() {
    assert_caught(Mutant::SkipCrc);
}

#[test]
fn unsettled_fingerprints_that_are_trusted_are_caught() {
    assert_caught(Mutant::TrustUnsettled);
}
