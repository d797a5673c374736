//! Limits for log lines that a peer, a disk or a stranger can cause: a few pass, the rest are counted, and the next line that
//! passes carries the count.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

/// Most subjects that are told apart; the one that was quiet longest makes way for a new one.
const MAX_SUBJECTS: usize = 64;

/// Number of messages withheld since the last one that passed. `None` stands for zero: log lines leave the field out then.
pub type Withheld = Option<u64>;

/// Lets a number of messages through per interval and counts the others.
#[derive(Clone, Debug)]
pub struct Throttle {
    burst: u32,
    interval: Duration,
    /// When the present interval began, and how many messages went through in it.
    window: Option<(Instant, u32)>,
    withheld: u64,
}

impl Throttle {
    /// One that lets `burst` messages through per `interval`.
    #[must_use]
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self { burst, interval, window: None, withheld: 0 }
    }

    /// Calls `message` with the number of messages withheld before, unless this one is withheld as well.
    pub fn log(&mut self, message: impl FnOnce(Withheld)) {
        self.log_at(Instant::now(), message);
    }

    fn log_at(&mut self, now: Instant, message: impl FnOnce(Withheld)) {
        let passed = match self.window {
            Some((since, passed)) if now.duration_since(since) < self.interval => passed,
            _ => {
                self.window = Some((now, 0));
                0
            }
        };
        if passed >= self.burst {
            self.withheld += 1;
            return;
        }
        if let Some((_, passed)) = &mut self.window {
            *passed += 1;
        }
        message(Some(std::mem::take(&mut self.withheld)).filter(|&count| count > 0));
    }
}

impl Default for Throttle {
    /// One message per ten seconds.
    fn default() -> Self {
        Self::new(1, Duration::from_secs(10))
    }
}

/// A throttle for each of several subjects, so that what repeats does not hide what is new.
#[derive(Clone, Debug)]
pub struct Throttles<K> {
    pattern: Throttle,
    each: BTreeMap<K, Throttle>,
}

impl<K: Ord + Clone> Throttles<K> {
    /// Each subject may have `burst` messages per `interval`.
    #[must_use]
    pub const fn new(burst: u32, interval: Duration) -> Self {
        Self { pattern: Throttle::new(burst, interval), each: BTreeMap::new() }
    }

    /// As [`Throttle::log`], for this subject.
    pub fn log(&mut self, subject: K, message: impl FnOnce(Withheld)) {
        if self.each.len() >= MAX_SUBJECTS && !self.each.contains_key(&subject) {
            let begun = |t: &Throttle| t.window.map(|(since, _)| since);
            let oldest = self.each.iter().min_by_key(|(_, t)| begun(t)).map(|(k, _)| k.clone());
            oldest.and_then(|k| self.each.remove(&k));
        }
        let pattern = &self.pattern;
        self.each.entry(subject).or_insert_with(|| pattern.clone()).log(message);
    }
}

impl<K: Ord + Clone> Default for Throttles<K> {
    /// Five messages per subject and ten seconds.
    fn default() -> Self {
        Self::new(5, Duration::from_secs(10))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_few_go_through_and_the_rest_are_counted() {
        let mut throttle = Throttle::new(2, Duration::from_secs(10));
        let start = Instant::now();
        let mut seen = Vec::new();
        for tenths in 0..250 {
            let now = start + Duration::from_millis(tenths * 100);
            throttle.log_at(now, |withheld| seen.push((tenths, withheld)));
        }
        assert_eq!(seen, [(0, None), (1, None), (100, Some(98)), (101, None), (200, Some(98)), (201, None)]);
    }

    #[test]
    fn subjects_do_not_hide_each_other_and_their_number_is_bounded() {
        let mut throttles = Throttles::new(1, Duration::from_secs(3600));
        let mut seen = 0;
        for subject in 0..1000 {
            throttles.log(subject, |_| seen += 1);
            throttles.log(subject, |_| seen += 1);
        }
        assert_eq!((seen, throttles.each.len()), (1000, MAX_SUBJECTS));
    }
}
