//! Floor 0: where tests make the file system fail. Every call of it that the store makes,
//! and those that read sources, pass by here under a name; outside of tests that is
//! nothing at all.

use rustix::io::Errno;

/// Makes a call of the file system, unless a test wants it to fail.
#[inline(always)]
pub(crate) fn call<T, E: From<Errno>>(
    name: &'static str,
    act: impl FnOnce() -> Result<T, E>,
) -> Result<T, E> {
    #[cfg(not(test))]
    let _ = name;
    #[cfg(test)]
    match plan::next(name) {
        None => {}
        Some((errno, plan::Moment::Before)) => return Err(errno.into()),
        Some((errno, plan::Moment::After)) => {
            act()?;
            return Err(errno.into());
        }
    }
    act()
}

/// Which call fails. There is one plan for the whole process, because the calls come from
/// every thread: a test that makes one has a process of its own.
#[cfg(test)]
pub(crate) mod plan {
    use super::Errno;
    use std::sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    };

    /// Whether a call that fails has done its work all the same.
    #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
    pub(crate) enum Moment {
        #[default]
        Before,
        After,
    }

    #[derive(Clone, Copy, Debug)]
    pub(crate) struct Plan {
        /// Number of the first call that fails, from 1.
        pub(crate) at: u64,
        /// All that come after it fail, too.
        pub(crate) forever: bool,
        pub(crate) errno: Errno,
        pub(crate) moment: Moment,
        /// No calls but those of this name are counted.
        pub(crate) only: Option<&'static str>,
    }

    impl Default for Plan {
        fn default() -> Self {
            Plan {
                at: 1,
                forever: false,
                errno: Errno::IO,
                moment: Moment::Before,
                only: None,
            }
        }
    }

    #[derive(Debug, Default)]
    struct Armed {
        plan: Option<Plan>,
        call_count: u64,
        hit: Option<&'static str>,
        names: std::collections::BTreeMap<&'static str, u64>,
    }

    static IS_ARMED: AtomicBool = AtomicBool::new(false);
    static ARMED: Mutex<Option<Armed>> = Mutex::new(None);

    fn armed() -> MutexGuard<'static, Option<Armed>> {
        ARMED.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts calls from now on and makes those of the plan fail.
    pub(crate) fn arm(plan: Option<Plan>) {
        *armed() = Some(Armed {
            plan,
            ..Armed::default()
        });
        IS_ARMED.store(true, Ordering::SeqCst);
    }

    /// What came of a plan.
    #[derive(Debug)]
    pub(crate) struct Outcome {
        pub(crate) call_count: u64,
        /// Name of the first call that failed.
        pub(crate) hit: Option<&'static str>,
        /// How often each call was made.
        pub(crate) names: std::collections::BTreeMap<&'static str, u64>,
    }

    /// From now on nothing fails.
    pub(crate) fn disarm() -> Outcome {
        IS_ARMED.store(false, Ordering::SeqCst);
        let armed = armed().take().unwrap_or_default();
        Outcome {
            call_count: armed.call_count,
            hit: armed.hit,
            names: armed.names,
        }
    }

    pub(super) fn next(name: &'static str) -> Option<(Errno, Moment)> {
        if !IS_ARMED.load(Ordering::Relaxed) {
            return None;
        }
        let mut armed = armed();
        let armed = armed.as_mut()?;
        if armed
            .plan
            .is_some_and(|plan| plan.only.is_some_and(|only| only != name))
        {
            return None;
        }
        armed.call_count += 1;
        *armed.names.entry(name).or_default() += 1;
        let plan = armed.plan?;
        let fails = match plan.forever {
            false => armed.call_count == plan.at,
            true => armed.call_count >= plan.at,
        };
        fails.then(|| {
            armed.hit.get_or_insert(name);
            (plan.errno, plan.moment)
        })
    }
}
