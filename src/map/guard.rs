//! A guard against SIGBUS: what happens when somebody cuts a file that is mapped.
//!
//! Touching a page of a map beyond the end of its file, or one that the disk cannot
//! read, ends the process. With the guard in place the handler puts an empty page there
//! and marks the map as damaged; whoever read from it asks afterwards and drops what it
//! read. Faults outside the watched maps go to whoever handled them before.
//!
//! # Contract
//! The handler touches only atomics that live for ever and calls `mmap` and `sigaction`,
//! which are plain system calls. A range is watched only while its map exists, because
//! [`Watched`] is dropped before it.

use std::{
    io, mem, ptr,
    sync::{
        OnceLock,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

/// Maps that are watched at a time; more are not made.
const SLOTS: usize = 512;

struct Slot {
    /// 0: free; 1: being filled; otherwise the first address.
    start: AtomicUsize,
    len: AtomicUsize,
    is_hit: AtomicBool,
}

static SLOT: [Slot; SLOTS] = [const {
    Slot {
        start: AtomicUsize::new(0),
        len: AtomicUsize::new(0),
        is_hit: AtomicBool::new(false),
    }
}; SLOTS];

/// What handled the signal before, and the length of a page.
static EARLIER: OnceLock<(libc::sigaction, usize)> = OnceLock::new();
/// The handler is in force.
static IS_INSTALLED: AtomicBool = AtomicBool::new(false);

/// Handles SIGBUS for the whole process from now on, once.
///
/// # Errors
/// What the system says.
pub(super) fn install() -> io::Result<()> {
    if is_installed() {
        return Ok(());
    }
    // SAFETY: an all-zero sigaction is a valid value; the call only reads the old one.
    let mut earlier: libc::sigaction = unsafe { mem::zeroed() };
    // SAFETY: as above.
    if unsafe { libc::sigaction(libc::SIGBUS, ptr::null(), &mut earlier) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // Not rustix: its way to the length of a page crashes under valgrind.
    // SAFETY: takes and gives a number.
    let page_len = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    let page_len = usize::try_from(page_len).map_err(|_| io::Error::last_os_error())?;
    let _ = EARLIER.set((earlier, page_len));
    // SAFETY: as above; the handler has the form that SA_SIGINFO asks for and keeps to
    // what the module's contract says.
    let done = unsafe {
        let mut action: libc::sigaction = mem::zeroed();
        let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = handle;
        action.sa_sigaction = handler as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        libc::sigaction(libc::SIGBUS, &action, ptr::null_mut())
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    IS_INSTALLED.store(true, Ordering::Release);
    Ok(())
}

pub(super) fn is_installed() -> bool {
    IS_INSTALLED.load(Ordering::Acquire)
}

extern "C" fn handle(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    let Some((earlier, page_len)) = EARLIER.get() else {
        return;
    };
    // SAFETY: the kernel hands a valid siginfo to a SA_SIGINFO handler.
    let address = unsafe { (*info).si_addr() } as usize;
    for slot in &SLOT {
        let (start, len) = (
            slot.start.load(Ordering::Acquire),
            slot.len.load(Ordering::Acquire),
        );
        if start <= 1 || address < start || address - start >= len {
            continue;
        }
        let page = address & !(page_len - 1);
        slot.is_hit.store(true, Ordering::Release);
        // SAFETY: the page belongs to a map that its owner keeps alive (contract), so
        // nothing else is replaced; the access that failed is tried again on it.
        let made = unsafe {
            libc::mmap(
                page as *mut libc::c_void,
                *page_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED,
                -1,
                0,
            )
        };
        if made != libc::MAP_FAILED {
            return;
        }
    }
    // Not ours: the access fails again, under the handler of before. If that lets the
    // process live, nothing is mapped any more.
    IS_INSTALLED.store(false, Ordering::Release);
    // SAFETY: the action came from the system.
    unsafe { libc::sigaction(libc::SIGBUS, earlier, ptr::null_mut()) };
}

/// A range of addresses under the guard.
#[derive(Debug)]
pub(super) struct Watched {
    slot_index: usize,
}

impl Watched {
    /// `None`: there is no guard, or too much is watched already.
    pub(super) fn new(start: *const u8, len: usize) -> Option<Self> {
        if !is_installed() || len == 0 {
            return None;
        }
        let slot_index = SLOT.iter().position(|slot| {
            slot.start
                .compare_exchange(0, 1, Ordering::AcqRel, Ordering::Relaxed)
                .is_ok()
        })?;
        let slot = SLOT.get(slot_index)?;
        slot.is_hit.store(false, Ordering::Release);
        slot.len.store(len, Ordering::Release);
        slot.start.store(start as usize, Ordering::Release);
        Some(Watched { slot_index })
    }

    /// Whether a page of the range could not be read or written.
    pub(super) fn is_hit(&self) -> bool {
        SLOT.get(self.slot_index)
            .is_some_and(|slot| slot.is_hit.load(Ordering::Acquire))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(slot) = SLOT.get(self.slot_index) {
            slot.len.store(0, Ordering::Release);
            slot.start.store(0, Ordering::Release);
        }
    }
}
