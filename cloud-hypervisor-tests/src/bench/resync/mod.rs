//! What `make bench-resync` measures: how much a resync moves, how long it takes, what the guest has meanwhile, how long
//! it is kept waiting when something dies or comes back, and what the maps cost.

pub mod experiment;
mod stage;

pub use experiment::Run;

use anyhow::Result;
use crate::lab::Lab;

/// Q
pub fn quick(lab: &Lab, mb: u64, disk_mib: u64, rounds: u32) -> Result<Run> {
    experiment::measure(lab, mb, disk_mib.max(experiment::disk_mib_of(mb)), rounds, &|s| println!("{s}"))
}

/// The middle value; of two the mean.
fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        odd if odd % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}
