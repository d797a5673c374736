//! The one clock of the drivers.
#![allow(unsafe_code)]

use crate::time::Time;

/// The time of `CLOCK_MONOTONIC`, as the state machines want it.
#[must_use]
pub fn monotonic_now() -> Time {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the pointer is to a timespec that lives on this stack; this clock always exists on Linux.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &mut now) };
    let seconds = u64::try_from(now.tv_sec).unwrap_or(0);
    Time(seconds * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0))
}
