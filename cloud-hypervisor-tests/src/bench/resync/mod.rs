//! What `make bench-resync` measures: how much a resync moves, how long it takes, what the guest has meanwhile, how long
//! it is kept waiting when something dies or comes back, and what the maps cost.

pub mod amplification;
pub mod costs;
pub mod experiment;
pub mod pauses;
mod report;
mod stage;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::Serialize;

pub use amplification::Case;
pub use costs::Costs;
pub use experiment::{Elsewhere, Run};
pub use pauses::Pause;

use self::experiment::Experiment;
use crate::lab;

/// Longer than a chunk must be idle before its intent bit is cleared, and the beat on which that is done.
const INTENTS_IDLE: Duration = Duration::from_millis(7500);
/// Most rounds of one size of the experiment.
const MOST_ROUNDS: u64 = 3;
/// How much larger the larger disk is.
const LARGER: u64 = 4;
/// Least rounds of the same size on both disks.
const PAIRS: u32 = 5;
/// Memory that processes and page tables need besides the stores.
const MEMORY_BESIDE: u64 = 1 << 30;

/// A part of the measurement.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Bytes moved for each byte missed.
    Amplification,
    /// The published experiment, and what belongs to it.
    Experiment,
    /// What a guest notices.
    Pauses,
    /// Memory and metadata.
    Costs,
}

impl Part {
    /// All parts, with their names on the command line.
    pub const ALL: [(&'static str, Self); 4] = [
        ("amplification", Self::Amplification),
        ("experiment", Self::Experiment),
        ("pauses", Self::Pauses),
        ("costs", Self::Costs),
    ];

    /// The one named so, or an error that lists all.
    ///
    /// # Errors
    /// When there is none.
    pub fn named(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|(known, _)| *known == name);
        let all = || Self::ALL.map(|(name, _)| name).join(", ");
        found.map(|(_, part)| part).ok_or_else(|| format!("expected one of {}, found \"{name}\"", all()))
    }
}

/// What is measured.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Which parts.
    pub parts: Vec<Part>,
    /// Sizes of the experiment in MB of 10^6 bytes, ascending.
    pub sizes_mb: Vec<u64>,
    /// Trials of each event that a guest may notice.
    pub trials: usize,
}

impl Plan {
    fn has(&self, part: Part) -> bool {
        self.parts.contains(&part)
    }

    /// Bytes of memory that the largest stage needs: two stores on tmpfs, and the programs.
    fn memory(&self) -> u64 {
        let sizes = self.sizes_mb.iter().map(|mb| experiment::bytes_of(*mb));
        // The smallest size is also written on two disks at a time, and on one with two halves of it.
        let largest = sizes.clone().max().unwrap_or(0).max(2 * sizes.min().unwrap_or(0));
        let stores = if self.has(Part::Experiment) { largest } else { 1 << 30 };
        2 * stores + MEMORY_BESIDE
    }
}

/// What was found.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Outcome {
    /// The published experiment.
    pub runs: Vec<Run>,
    /// Its smallest size on a disk four times as large.
    pub larger_disk: Option<Run>,
    /// A resync under a load that writes elsewhere.
    pub elsewhere: Option<Elsewhere>,
    /// What a guest notices.
    pub pauses: Vec<Pause>,
    /// Bytes moved for bytes missed.
    pub amplification: Vec<Case>,
    /// Memory and metadata.
    pub costs: Option<Costs>,
    /// The bars.
    pub bars: Vec<Verdict>,
    /// Load averages of the machine before and after: what else ran.
    pub load_averages: [String; 2],
}

/// Whether a bar is held.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Verdict {
    /// The bar in words, with the figure.
    pub text: String,
    /// Held?
    pub held: bool,
}

impl Outcome {
    /// Whether all bars that were judged are held.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.bars.iter().all(|bar| bar.held)
    }

    /// Writes it as JSON.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub fn save(&self, path: &PathBuf) -> Result<()> {
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory).with_context(|| format!("making {}", directory.display()))?;
        }
        let text = serde_json::to_string_pretty(self)?;
        fs::write(path, text + "\n").with_context(|| format!("writing {}", path.display()))
    }
}

/// Measures. `say` is told each step in words.
///
/// # Errors
/// When there is not enough memory, or something fails that must not.
pub fn measure(plan: &Plan, say: &dyn Fn(&str)) -> Result<Outcome> {
    ensure!(plan.trials > 0 && !plan.sizes_mb.is_empty(), "expected trials and sizes, found {plan:?}");
    check_memory(plan.memory())?;
    let mut outcome = Outcome { load_averages: [load_averages(), String::new()], ..Outcome::default() };
    let fabric = lab::Fabric::from_environment()?;
    if plan.has(Part::Amplification) {
        say("amplification");
        outcome.amplification = lab::run_on(fabric, "amplification", |lab| amplification::measure(lab, say))?;
    }
    if plan.has(Part::Experiment) {
        let largest = plan.sizes_mb.iter().copied().max().unwrap_or(0);
        let smallest = plan.sizes_mb.iter().copied().min().unwrap_or(0);
        for mb in &plan.sizes_mb {
            // Small ones are measured more often: they are over sooner, and vary more.
            let rounds = u32::try_from((largest / mb.max(&1)).clamp(1, MOST_ROUNDS))?;
            let [run, larger] = measure_size(fabric, *mb, rounds, *mb == smallest, say)?;
            outcome.runs.extend(run);
            outcome.larger_disk = outcome.larger_disk.or(larger);
        }
        outcome.elsewhere =
            Some(lab::run_on(fabric, "elsewhere", |lab| experiment::elsewhere(lab, smallest, say))?);
    }
    if plan.has(Part::Pauses) {
        say(&format!("pauses, {} trials of each event", plan.trials));
        outcome.pauses = lab::run_on(fabric, "pauses", |lab| pauses::measure(lab, plan.trials, say))?;
    }
    if plan.has(Part::Costs) {
        say("costs of the maps");
        let memory = lab::run_on(fabric, "memory", |lab| costs::memory(lab, say))?;
        let metadata = lab::run_on(fabric, "metadata", costs::metadata)?;
        outcome.costs = Some(Costs { memory, metadata });
    }
    outcome.load_averages[1] = load_averages();
    outcome.judge();
    Ok(outcome)
}

/// One size, `rounds` times; and on a disk four times as large, turn by turn, since the machine may have better and worse minutes.
fn measure_size(
    fabric: lab::Fabric,
    mb: u64,
    rounds: u32,
    on_larger_disk: bool,
    say: &dyn Fn(&str),
) -> Result<[Option<Run>; 2]> {
    let disk_mib = experiment::disk_mib_of(mb);
    lab::run_on(fabric, &format!("{mb} MB"), |lab| {
        let mut small = Experiment::start(lab, mb, disk_mib, say)?;
        let larger = if on_larger_disk {
            let name = format!("{mb} MB on a larger disk");
            lab::run_on(fabric, &name, |lab| {
                let mut large = Experiment::start(lab, mb, disk_mib * LARGER, say)?;
                for _ in 0..rounds.max(PAIRS) {
                    small.round(say)?;
                    large.round(say)?;
                }
                large.finish().map(Some)
            })?
        } else {
            (0..rounds).try_for_each(|_| small.round(say))?;
            None
        };
        Ok([Some(small.finish()?), larger])
    })
}

fn load_averages() -> String {
    fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned()
}

/// Says so if there is too little memory, before anything is written to it.
fn check_memory(needed: u64) -> Result<()> {
    let text = fs::read_to_string("/proc/meminfo").context("reading /proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib: Option<u64> = line.and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    let Some(available) = kib.map(|kib| kib << 10) else {
        bail!("expected MemAvailable in /proc/meminfo, found:\n{text}")
    };
    ensure!(
        available >= needed,
        "the stores lie on tmpfs and need {} MiB of memory, {} are available; --gb with smaller sizes needs less",
        needed >> 20,
        available >> 20
    );
    Ok(())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_named_and_a_wrong_name_lists_the_right_ones() {
        for (name, part) in Part::ALL {
            assert_eq!(Part::named(name), Ok(part));
        }
        assert!(Part::named("all").unwrap_err().contains("amplification, experiment, pauses, costs"));
    }

    #[test]
    fn memory_is_asked_for_both_stores_of_the_largest_stage() {
        let plan = |sizes_mb: &[u64], parts: &[Part]| {
            Plan { parts: parts.to_vec(), sizes_mb: sizes_mb.to_vec(), trials: 1 }.memory() >> 20
        };
        assert_eq!(plan(&[1000, 5000], &[Part::Experiment]), 2 * 4768 + 1024);
        assert_eq!(plan(&[1000], &[Part::Experiment]), 4 * 953 + 1024 + 2);
        assert_eq!(plan(&[5000], &[Part::Pauses]), 3 * 1024);
        let error = check_memory(u64::MAX).unwrap_err().to_string();
        assert!(error.contains("are available"), "{error}");
    }

    #[test]
    fn the_middle_of_values() {
        assert!((median(vec![3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(vec![4.0, 1.0]) - 2.5).abs() < 1e-9);
        assert!(median(Vec::new()).abs() < 1e-9);
    }
}
