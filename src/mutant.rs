//! Floor 0: safeguards that a build for the tests can leave out, to show that the checks
//! notice. `scripts/mutants.py` makes that build and names one safeguard at a time.

/// Whether the safeguard of this name is left out: never, but in a build with the feature
/// `__mutants`, and there in a process whose `TENSORFERRY_MUTANT` says so.
#[inline(always)]
pub(crate) fn is(name: &str) -> bool {
    #[cfg(not(feature = "__mutants"))]
    {
        let _ = name;
        false
    }
    #[cfg(feature = "__mutants")]
    {
        static LEFT_OUT: std::sync::OnceLock<String> = std::sync::OnceLock::new();
        let left_out = || std::env::var("TENSORFERRY_MUTANT").unwrap_or_default();
        LEFT_OUT.get_or_init(left_out) == name
    }
}
