//! Lines of the log that others can cause as often as they like.

use std::time::Duration;

use rmr_common::time::Time;

/// Of one kind there is no more than one line in so long.
const INTERVAL: Duration = Duration::from_secs(1);

/// Lets one event of a kind through each second, and counts the others.
#[derive(Default)]
pub(super) struct Throttle {
    last: Option<Time>,
    withheld: u64,
}

impl Throttle {
    /// The number of events since the last one that was let through, if this one is to be let through.
    pub(super) fn admit(&mut self, now: Time) -> Option<u64> {
        if self.last.is_some_and(|last| now - last < INTERVAL) {
            self.withheld += 1;
            return None;
        }
        self.last = Some(now);
        Some(std::mem::take(&mut self.withheld))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_many_events_one_a_second_is_let_through_with_the_number_of_the_others() {
        let mut throttle = Throttle::default();
        let start = Time(5_000_000_000);
        assert_eq!(throttle.admit(start), Some(0));
        assert!((1..9).all(|i| throttle.admit(start + Duration::from_millis(i)).is_none()));
        assert_eq!(throttle.admit(start + INTERVAL), Some(8));
        assert_eq!(throttle.admit(start + 3 * INTERVAL), Some(0));
    }
}
