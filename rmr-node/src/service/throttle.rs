//! Limits for log lines that a peer or a stranger can cause, on a shard's clock.

use std::time::Duration;

use rmr_common::throttle::Withheld;
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
    /// Number of events withheld since the last one that passed, if this one passes; else `None`.
    pub(super) fn admit(&mut self, now: Time) -> Option<Withheld> {
        if self.last.is_some_and(|last| now - last < INTERVAL) {
            self.withheld += 1;
            return None;
        }
        self.last = Some(now);
        Some(Some(std::mem::take(&mut self.withheld)).filter(|&count| count > 0))
    }
}

/// Lets a number of events of a kind through each second, and counts the others.
#[derive(Default)]
pub(super) struct Burst {
    second: Option<Time>,
    events: u32,
}

impl Burst {
    /// Most events that are let through in one second.
    pub(super) const MOST: u32 = 40;

    /// Whether this event is let through; and, where a second is over, how many of it were not.
    pub(super) fn admit(&mut self, now: Time) -> (bool, Option<u32>) {
        let mut left_out = None;
        if self.second.is_none_or(|second| now - second >= INTERVAL) {
            left_out = self.events.checked_sub(Self::MOST).filter(|&n| n > 0);
            (self.second, self.events) = (Some(now), 0);
        }
        self.events = self.events.saturating_add(1);
        (self.events <= Self::MOST, left_out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_let_through_up_to_a_number_and_the_rest_is_counted() {
        let (mut burst, start) = (Burst::default(), Time(5_000_000_000));
        let all: Vec<_> = (0..100).map(|i| burst.admit(start + Duration::from_millis(i))).collect();
        assert!(all.iter().all(|(_, left_out)| left_out.is_none()));
        assert_eq!(all.iter().filter(|(through, _)| *through).count(), 40);
        assert_eq!(burst.admit(start + INTERVAL), (true, Some(60)));
        assert_eq!(burst.admit(start + 2 * INTERVAL), (true, None));
    }

    #[test]
    fn of_many_events_one_a_second_is_let_through_with_the_number_of_the_others() {
        let mut throttle = Throttle::default();
        let start = Time(5_000_000_000);
        assert_eq!(throttle.admit(start), Some(None));
        assert!((1..9).all(|i| throttle.admit(start + Duration::from_millis(i)).is_none()));
        assert_eq!(throttle.admit(start + INTERVAL), Some(Some(8)));
        assert_eq!(throttle.admit(start + 3 * INTERVAL), Some(None));
    }
}
