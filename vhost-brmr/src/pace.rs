//! How soon the guest goes on after it was answered, which decides whether spinning is worth it.
//!
//! A guest that waits for each answer before it sends the next request gains from a daemon that does not go to sleep in
//! between: on an idle virtual processor a wake-up costs more than the request. A guest with pauses, or with many requests
//! in flight, gains nothing, and spinning would only burn its host.

use std::time::{Duration, Instant};

/// A pause that counts as long, so that a device begins without spinning.
const LONG: Duration = Duration::from_millis(10);
/// Weight of the newest pause is one in so many.
const WEIGHT: u32 = 8;

/// The usual pause between the last answer and the next request.
#[derive(Clone, Copy, Debug)]
pub struct Pace {
    pause: Duration,
    idle_since: Option<Instant>,
}

impl Default for Pace {
    fn default() -> Self {
        Self { pause: LONG, idle_since: None }
    }
}

impl Pace {
    /// Notes how many requests are in flight at the end of a turn of the loop. Costs nothing while that stays above zero.
    pub fn note(&mut self, in_flight: usize, now: impl FnOnce() -> Instant) {
        match (in_flight, self.idle_since) {
            (0, None) => self.idle_since = Some(now()),
            (0, Some(_)) | (1.., None) => {}
            (_, Some(since)) => {
                let pause = now().saturating_duration_since(since).min(LONG);
                self.pause = (self.pause * (WEIGHT - 1) + pause) / WEIGHT;
                self.idle_since = None;
            }
        }
    }

    /// Whether the next request usually comes within `limit` after an answer.
    #[must_use]
    pub fn is_within(&self, limit: Duration) -> bool {
        self.pause < limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers and requests in turn, with this pause between.
    fn after(pace: &mut Pace, pause_us: u64, times: usize) {
        let start = Instant::now();
        for i in 0..times {
            let at = start + Duration::from_millis(100) * u32::try_from(i).unwrap();
            pace.note(0, || at);
            pace.note(1, || at + Duration::from_micros(pause_us));
        }
    }

    #[test]
    fn a_guest_that_waits_for_each_answer_is_recognised_and_so_is_the_end_of_that() {
        let (limit, mut pace) = (Duration::from_micros(50), Pace::default());
        assert!(!pace.is_within(limit), "a device begins without spinning");
        after(&mut pace, 20, 64);
        assert!(pace.is_within(limit));
        after(&mut pace, 135, 20);
        assert!(!pace.is_within(limit), "5000 requests a second leave pauses of more than 100 µs");
    }

    #[test]
    fn one_long_pause_is_enough_to_stop() {
        let (limit, mut pace) = (Duration::from_micros(50), Pace::default());
        after(&mut pace, 20, 64);
        after(&mut pace, 1_000_000, 1);
        assert!(!pace.is_within(limit));
    }

    #[test]
    fn a_guest_with_many_requests_in_flight_is_not_taken_for_one_that_waits() {
        let mut pace = Pace::default();
        for in_flight in [32, 31, 32, 30] {
            pace.note(in_flight, || panic!("the clock is not looked at"));
        }
        assert!(!pace.is_within(Duration::from_micros(50)));
    }
}
