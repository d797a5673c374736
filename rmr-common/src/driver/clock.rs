//! The time of one driver: `CLOCK_MONOTONIC` without the time in which the driver itself stood still.

use std::time::Duration;

use crate::clock::monotonic_now;
use crate::time::Time;

/// So much later than it was due a driver is on a crowded machine.
const LATENESS: Duration = Duration::from_millis(500);

/// A clock that stands still while its driver does: its machine was suspended or crowded, a debugger held it, memory was
/// pinned. Nobody else is late by that: what a peer was sent half, it cannot have answered.
#[derive(Default)]
pub(super) struct Clock {
    stood_still: Duration,
}

impl Clock {
    /// The time now, of a driver that was due to look at `due` at the latest.
    pub(super) fn look(&mut self, due: Time) -> Time {
        self.at(monotonic_now(), due)
    }

    fn at(&mut self, monotonic: Time, due: Time) -> Time {
        let late = self.without_standstills(monotonic) - due;
        if late > LATENESS {
            self.stood_still += late;
        }
        self.without_standstills(monotonic)
    }

    /// The time now, if the driver does not stand still.
    pub(super) fn now(&self) -> Time {
        self.without_standstills(monotonic_now())
    }

    fn without_standstills(&self, monotonic: Time) -> Time {
        Time(0) + (monotonic - (Time(0) + self.stood_still))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    #[test]
    fn time_in_which_the_driver_stood_still_does_not_count() {
        let mut clock = Clock::default();
        assert_eq!(clock.at(Time(7 * SECOND), Time(7 * SECOND)), Time(7 * SECOND));
        assert_eq!(clock.at(Time(60 * SECOND), Time(8 * SECOND)), Time(8 * SECOND));
        assert_eq!(clock.at(Time(61 * SECOND), Time(10 * SECOND)), Time(9 * SECOND), "not due yet");
        assert_eq!(clock.at(Time(90 * SECOND), Time(10 * SECOND)), Time(10 * SECOND), "once more");
        assert_eq!(clock.at(Time(92 * SECOND), Time(12 * SECOND)), Time(12 * SECOND));
    }

    #[test]
    fn a_driver_that_is_a_little_late_keeps_its_time() {
        let mut clock = Clock::default();
        let late = Time(3 * SECOND) + LATENESS;
        assert_eq!(clock.at(late, Time(3 * SECOND)), late);
    }
}
