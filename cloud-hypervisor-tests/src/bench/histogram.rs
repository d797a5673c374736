//! A histogram of durations with a bounded relative error: 128 linear steps for each power of two, so that a
//! percentile is off by less than 0.4 % whatever its size.

use std::time::Duration;

const STEP_BITS: u32 = 7;
const STEPS: u64 = 1 << STEP_BITS;

/// Counts durations in nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    sum_ns: u128,
    max_ns: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        // One group of steps for the small values and one for each remaining power of two of a u64.
        let groups = usize::try_from(u64::BITS - STEP_BITS + 1).expect("64 fits");
        let steps = usize::try_from(STEPS).expect("128 fits");
        Self { counts: vec![0; groups * steps], total: 0, sum_ns: 0, max_ns: 0 }
    }
}

impl Histogram {
    /// Counts one duration.
    pub fn record(&mut self, duration: Duration) {
        let nanoseconds = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        self.counts[bucket(nanoseconds)] += 1;
        self.total += 1;
        self.sum_ns += u128::from(nanoseconds);
        self.max_ns = self.max_ns.max(nanoseconds);
    }

    /// How many durations were counted.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.total
    }

    /// The mean, exact, in microseconds. Zero when nothing was counted.
    #[must_use]
    pub fn mean_us(&self) -> f64 {
        if self.total == 0 { 0.0 } else { self.sum_ns as f64 / self.total as f64 / 1e3 }
    }

    /// The longest, exact, in microseconds.
    #[must_use]
    pub fn max_us(&self) -> f64 {
        self.max_ns as f64 / 1e3
    }

    /// The duration in microseconds that `per_mille` thousandths of all do not exceed. Zero when nothing was counted.
    #[must_use]
    pub fn quantile_us(&self, per_mille: u64) -> f64 {
        let rank = (u128::from(self.total) * u128::from(per_mille)).div_ceil(1000).max(1);
        let mut seen = 0_u128;
        for (index, count) in self.counts.iter().enumerate() {
            seen += u128::from(*count);
            if seen >= rank {
                return (midpoint(index) as f64).min(self.max_ns as f64) / 1e3;
            }
        }
        0.0
    }
}

/// Values below 128 have a bucket each; above, the power of two chooses the group and the next bits the step in it.
fn bucket(value: u64) -> usize {
    let group = (u64::BITS - STEP_BITS).saturating_sub(value.leading_zeros());
    let index = match group {
        0 => value,
        _ => u64::from(group) * STEPS + ((value >> (group - 1)) & (STEPS - 1)),
    };
    usize::try_from(index).expect("at most 58 groups of 128 steps")
}

fn midpoint(index: usize) -> u64 {
    let index = u64::try_from(index).expect("an index of a vector fits 64 bits");
    match (index / STEPS, index % STEPS) {
        (0, step) => step,
        (group, step) => ((STEPS + step) << (group - 1)) + ((1 << (group - 1)) >> 1),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_lands_in_a_bucket_whose_midpoint_is_within_half_a_percent() {
        for power in 0..64 {
            for offset in [0_u64, 1, 77, 1 << 20, 1 << 55] {
                let value = (1_u64 << power).saturating_add(offset);
                let found = midpoint(bucket(value));
                assert!(found.abs_diff(value) <= value / 200, "{value} became {found}");
            }
        }
        assert!(bucket(u64::MAX) < Histogram::default().counts.len());
    }

    #[test]
    fn quantiles_of_an_even_spread_are_where_they_should_be() {
        let mut histogram = Histogram::default();
        for microseconds in 1..=10_000 {
            histogram.record(Duration::from_micros(microseconds));
        }
        for (per_mille, expected) in [(500, 5000.0), (990, 9900.0), (999, 9990.0)] {
            let found = histogram.quantile_us(per_mille);
            assert!((found - expected).abs() < expected * 0.005, "{per_mille}: {found} is not {expected}");
        }
        assert!((histogram.mean_us() - 5000.5).abs() < 0.01);
        assert!((histogram.max_us() - 10_000.0).abs() < 0.01);
    }

    #[test]
    fn an_empty_histogram_answers_zero() {
        let histogram = Histogram::default();
        assert!(histogram.quantile_us(500).abs() < f64::EPSILON && histogram.mean_us().abs() < f64::EPSILON);
    }
}
