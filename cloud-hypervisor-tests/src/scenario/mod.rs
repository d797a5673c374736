//! Whole-system scenarios that do not care what carries the data: each takes a lab, whose fabric is TCP or verbs, and an
//! effort, for real processors or emulated ones. Tests run them here; `vm-scenario` runs them inside the lab's
//! Soft-RoCE guest.

mod counters;
mod cuts;
pub mod data;
mod digests;
mod effort;
mod failures;
mod faults;
mod growth;
mod handover;
mod interrupted;
mod keys;
mod membership;
mod pool_key;
pub mod recovery;
mod standstill;
mod system;
mod verify;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use serde::{Deserialize, Serialize};

pub use counters::Counters;
pub use effort::Effort;
pub use system::System;
pub use writer::{Writer, check_everything};

use crate::lab::{self, Fabric, Lab, Roce};

/// What a scenario counted, for reports and assertions of whoever ran it.
pub type Counts = BTreeMap<String, u64>;

/// How often a scenario is run in the guest with Soft-RoCE, where everything takes long.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Turn {
    /// Each time.
    Always,
    /// Where all are wanted: `make test-verbs ALL=1`.
    Long,
}

/// One scenario.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// What it is called on command lines.
    pub name: &'static str,
    /// What it proves, as a sentence.
    pub sentence: &'static str,
    /// When it is run in the guest.
    pub turn: Turn,
    run: Run,
}

type Run = fn(&Lab, Effort) -> Result<Counts>;

const fn each_time(name: &'static str, sentence: &'static str, run: Run) -> Scenario {
    Scenario { name, sentence, turn: Turn::Always, run }
}

const fn long(name: &'static str, sentence: &'static str, run: Run) -> Scenario {
    Scenario { name, sentence, turn: Turn::Long, run }
}

/// All scenarios, those of single requests first.
pub const ALL: [Scenario; 27] = [
    each_time("io", "every block that is read holds what was written, and all copies are the same", data::io),
    each_time(
        "counts",
        "a request costs the messages, work requests and copies that the design says",
        data::counts,
    ),
    each_time("segments", "requests of 1 MiB in 128 segments are carried whole", data::segments),
    each_time(
        "exhaustion",
        "a guest that asks for more than a node has memory for waits, and gets it all",
        data::exhaustion,
    ),
    each_time(
        "wrong-keys",
        "a peer with wrong keys is refused, and no byte of the guest's memory changes",
        keys::wrong_keys,
    ),
    each_time(
        "windows",
        "in the read mode window each read has a key of its own, which is refused when the read is over",
        keys::windows,
    ),
    each_time(
        "resync",
        "a member that was away is brought up to date by exactly what it missed, from node to node",
        data::resync,
    ),
    each_time(
        "pool-key",
        "who has the key of a pool is let in, nobody else is, and it is changed under a running disk",
        pool_key::pool_key,
    ),
    each_time(
        "changing-buffers",
        "buffers that change in flight leave equal stores with digests, and different ones without",
        digests::changing_buffers,
    ),
    each_time(
        "racing-writes",
        "overlapping writes that race on four queues leave equal stores",
        digests::racing_writes,
    ),
    each_time(
        "second-daemon",
        "a second daemon for a pool is refused, and told who holds it",
        failures::second_daemon,
    ),
    each_time(
        "vanishing-front-end",
        "a front end that vanishes with a full queue again and again costs nothing",
        failures::vanishing_front_end,
    ),
    each_time(
        "handover",
        "a pool is handed over at the first ring of the next guest and no earlier, and no member is lost by it",
        handover::handover,
    ),
    long(
        "verify-majority",
        "under load a verify finds the block that was damaged and no other, and the majority mends it",
        verify::by_majority,
    ),
    long(
        "verify-trust",
        "without a guest rmrctl finds the block and repairs it by the member that is trusted",
        verify::by_trust,
    ),
    each_time(
        "members",
        "copies are added, moved and removed under a writer that remembers",
        membership::members,
    ),
    long(
        "maintenance",
        "a replaced disk is filled, and planned maintenance costs what was missed",
        membership::maintenance,
    ),
    long("growth", "a pool grows with a guest and without one, and while a copy is down", growth::growth),
    long(
        "no-guest",
        "without a guest rmrctl changes the pool, brings copies up to date, goes on from one of them, and leaves",
        membership::no_guest,
    ),
    long(
        "killed-commands",
        "every change is finished by repeating it, whoever was killed in its middle",
        interrupted::killed_commands,
    ),
    each_time(
        "killed-nodes",
        "nodes killed one after the other under load come back, and no promise is broken",
        recovery::killed_nodes,
    ),
    each_time(
        "killed-daemon",
        "a daemon killed under load again and again leaves copies that agree",
        recovery::killed_daemon,
    ),
    each_time(
        "killed-everything",
        "everything killed at once comes back with all that was promised",
        recovery::killed_everything,
    ),
    each_time(
        "standstill",
        "a daemon that stood still loses no leg by that, and a node that did so comes back",
        standstill::standstill,
    ),
    each_time(
        "cut",
        "a leg whose cable is cut is given up in time, the guest goes on, and the member comes back by itself",
        faults::cut,
    ),
    long(
        "cuts",
        "every cable cut in every direction under load, and during a resync, heals, and no promise is broken",
        cuts::cuts,
    ),
    each_time(
        "device-removed",
        "an RDMA device that is taken away costs a leg, and when it is back the member comes back by itself",
        faults::device_removed,
    ),
];

/// How a scenario ended.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "outcome", content = "why")]
pub enum Outcome {
    /// It held.
    Passed,
    /// It did not, for this reason.
    Failed(String),
    /// It cannot be run here, for this reason. Whoever sees this says so loudly.
    NotRun(String),
}

/// What a run of one scenario says of itself, as one line of JSON.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Report {
    /// The scenario's name.
    pub scenario: String,
    /// What carried the data.
    pub fabric: String,
    /// How it ended.
    #[serde(flatten)]
    pub outcome: Outcome,
    /// What it counted.
    pub counts: Counts,
    /// How long it took.
    pub seconds: f64,
}

impl Scenario {
    /// Runs it in a lab of its own.
    #[must_use]
    pub fn report(&self, fabric: Fabric, effort: Effort) -> Report {
        let started = Instant::now();
        let result = lab::run_on(fabric, self.name, |lab| (self.run)(lab, effort));
        let (outcome, counts) = match result {
            Ok(counts) => (Outcome::Passed, counts),
            Err(error) => match error.downcast_ref::<NotRun>() {
                Some(NotRun(why)) => (Outcome::NotRun(why.clone()), Counts::new()),
                None => (Outcome::Failed(format!("{error:#}")), Counts::new()),
            },
        };
        Report {
            scenario: self.name.to_owned(),
            fabric: fabric.to_string(),
            outcome,
            counts,
            seconds: started.elapsed().as_secs_f64(),
        }
    }

    /// Runs it in a lab of its own, on the fabric of the environment, as a test does.
    ///
    /// # Errors
    /// When it does not hold, or cannot be run.
    pub fn test(&self, effort: Effort) -> Result<()> {
        let counts = lab::run_on(Fabric::from_environment()?, self.name, |lab| (self.run)(lab, effort))?;
        eprintln!("'{}' counted {counts:?}", self.name);
        Ok(())
    }
}

/// Runs a scenario inside a guest, which `vm-scenario` was put into, and returns what it said of itself.
///
/// # Errors
/// When `vm-scenario` ends otherwise than by its own account, or takes longer than `limit`.
pub fn run_in_guest(roce: &Roce, fabric: Fabric, name: &str, limit: Duration) -> Result<Report> {
    let script = format!("RMR_BIN_DIR=/usr/bin vm-scenario --fabric {fabric} {name}");
    let command = roce.vm().start(&script)?;
    let output = roce.vm().wait_within(limit, command)?;
    let report: Report = serde_json::from_str(&output.stdout).with_context(|| {
        format!("expected a report, found '{}{}', exit status {}", output.stdout, output.stderr, output.exit)
    })?;
    eprintln!("  {name} on {fabric} took {:.1} s and counted {:?}", report.seconds, report.counts);
    if matches!(report.outcome, Outcome::Failed(_)) {
        // The lab's own words in the guest, with the logs.
        eprint!("{}", output.stderr);
    }
    Ok(report)
}

/// Runs the scenario called `name` with the processors of this machine, on the fabric of the environment.
///
/// # Errors
/// When it does not hold, cannot be run, or there is none of this name.
pub fn test(name: &str) -> Result<()> {
    find(name).with_context(|| format!("there is no scenario '{name}'"))?.test(Effort::FULL)
}

/// The scenario called `name`.
#[must_use]
pub fn find(name: &str) -> Option<&'static Scenario> {
    ALL.iter().find(|scenario| scenario.name == name)
}

/// Why a scenario cannot be run here; an error that is no failure.
#[derive(Debug)]
struct NotRun(String);

impl fmt::Display for NotRun {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for NotRun {}

fn not_run(why: impl Into<String>) -> Error {
    Error::new(NotRun(why.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_one_line_of_json_and_is_read_back_whatever_the_outcome() {
        let outcomes =
            [Outcome::Passed, Outcome::Failed("two\nlines".into()), Outcome::NotRun("no device".into())];
        for outcome in outcomes {
            let report = Report {
                scenario: "io".into(),
                fabric: "rdma://10.77.0.1".into(),
                outcome,
                counts: [("writes".to_owned(), 7)].into(),
                seconds: 0.5,
            };
            let line = serde_json::to_string(&report).expect("serialisable");
            assert!(!line.contains('\n'), "{line}");
            assert_eq!(serde_json::from_str::<Report>(&line).expect(&line), report);
        }
    }

    #[test]
    fn a_scenario_that_cannot_run_is_told_from_one_that_failed() {
        let fabric: Fabric = "tcp://127.0.0.1".parse().expect("a fabric");
        let with = |run| long("try", "", run).report(fabric, Effort::FULL).outcome;
        assert_eq!(with(|_, _| Err(not_run("no device"))), Outcome::NotRun("no device".into()));
        assert_eq!(with(|_, _| anyhow::bail!("broken")), Outcome::Failed("broken".into()));
        assert_eq!(with(|_, _| Ok(Counts::new())), Outcome::Passed);
    }

    #[test]
    fn names_of_scenarios_are_different() {
        let names: std::collections::BTreeSet<_> = ALL.iter().map(|scenario| scenario.name).collect();
        assert_eq!(names.len(), ALL.len());
        assert!(names.iter().all(|name| find(name).is_some()) && find("x").is_none());
    }
}
