//! Faults for tests of a whole service in the test's own process. Nothing else uses them.

use std::sync::atomic::{AtomicU32, Ordering};

static FLUSHES: AtomicU32 = AtomicU32::new(0);

/// Lets the next flushes of data fail, of any disk in this process. The disk is not asked.
pub fn fail_flushes(count: u32) {
    FLUSHES.store(count, Ordering::SeqCst);
}

/// The number of flushes that are still to fail.
#[must_use]
pub fn flushes_to_fail() -> u32 {
    FLUSHES.load(Ordering::SeqCst)
}

/// Whether this flush fails.
pub(super) fn take_flush() -> bool {
    let mut left = FLUSHES.load(Ordering::Relaxed);
    while left > 0 {
        match FLUSHES.compare_exchange(left, left - 1, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => return true,
            Err(found) => left = found,
        }
    }
    false
}
