//! Writing begins before it is asked for: dirty pages go to the disk while more arrive,
//! so that a sync finds little left to wait for.

#![expect(
    unsafe_code,
    reason = "no library in use has sync_file_range; the contract is below"
)]

use std::{fs::File, os::fd::AsRawFd};

/// Begins to write what is dirty in a file and does not wait for it. Says nothing about
/// durability: whether it worked, the sync that follows tells.
///
/// # Contract
/// `sync_file_range` takes a descriptor and numbers and touches no memory of this process;
/// the descriptor is open as long as the call lasts, because the file is borrowed.
pub(super) fn begin(file: &File) {
    // SAFETY: see the contract. Length 0 means: to the end of the file.
    unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) };
}
