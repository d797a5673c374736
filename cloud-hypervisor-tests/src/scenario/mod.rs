//! Whole-system scenarios that do not care what carries the data: each takes a lab, whose fabric is TCP or verbs, and an
//! effort, for real processors or emulated ones. Tests run them here; `vm-scenario` runs them inside the lab's
//! Soft-RoCE guest.

mod counters;
pub mod data;
mod faults;
mod keys;
mod pool_key;
pub mod recovery;
mod standstill;
mod system;
mod writer;

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Error, Result};
use serde::{Deserialize, Serialize};

pub use counters::Counters;
pub use system::System;
pub use writer::{Writer, check_everything};

use crate::lab::{self, Fabric, Lab, Roce};

/// How much a scenario does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Effort {
    /// Size of the pool in MiB.
    pub pool_mib: u64,
    /// Bytes that small random requests go to, all of them read again at the end.
    pub span: u64,
    /// Requests of a load that runs to its end.
    pub requests: u64,
    /// Requests per second of a load under which something breaks.
    pub rate: u32,
    /// How often it breaks.
    pub rounds: usize,
}

impl Effort {
    /// For the processors of this machine.
    pub const FULL: Self = Self { pool_mib: 64, span: 32 << 20, requests: 20_000, rate: 3000, rounds: 5 };
    /// For the emulated processor of a guest, which does a hundredth of that.
    pub const EMULATED: Self = Self { pool_mib: 24, span: 2 << 20, requests: 600, rate: 100, rounds: 1 };
}

/// What a scenario counted, for reports and assertions of whoever ran it.
pub type Counts = BTreeMap<String, u64>;

/// One scenario.
#[derive(Clone, Copy)]
pub struct Scenario {
    /// What it is called on command lines.
    pub name: &'static str,
    /// What it proves, as a sentence.
    pub sentence: &'static str,
    run: fn(&Lab, Effort) -> Result<Counts>,
}

/// All scenarios, the quick ones first.
pub const ALL: [Scenario; 14] = [
    Scenario {
        name: "io",
        sentence: "every block that is read holds what was written, and all copies are the same",
        run: data::io,
    },
    Scenario {
        name: "counts",
        sentence: "a request costs the messages, work requests and copies that the design says",
        run: data::counts,
    },
    Scenario {
        name: "segments",
        sentence: "requests of 1 MiB in 128 segments are carried whole",
        run: data::segments,
    },
    Scenario {
        name: "exhaustion",
        sentence: "a guest that asks for more than a node has memory for waits, and gets it all",
        run: data::exhaustion,
    },
    Scenario {
        name: "wrong-keys",
        sentence: "a peer with wrong keys is refused, and no byte of the guest's memory changes",
        run: keys::wrong_keys,
    },
    Scenario {
        name: "windows",
        sentence: "in the read mode window each read has a key of its own, which is refused when the read is over",
        run: keys::windows,
    },
    Scenario {
        name: "resync",
        sentence: "a member that was away is brought up to date by exactly what it missed, from node to node",
        run: data::resync,
    },
    Scenario {
        name: "pool-key",
        sentence: "who has the key of a pool is let in, nobody else is, and it is changed under a running disk",
        run: pool_key::pool_key,
    },
    Scenario {
        name: "killed-nodes",
        sentence: "nodes killed one after the other under load come back, and no promise is broken",
        run: recovery::killed_nodes,
    },
    Scenario {
        name: "killed-daemon",
        sentence: "a daemon killed under load again and again leaves copies that agree",
        run: recovery::killed_daemon,
    },
    Scenario {
        name: "killed-everything",
        sentence: "everything killed at once comes back with all that was promised",
        run: recovery::killed_everything,
    },
    Scenario {
        name: "standstill",
        sentence: "a daemon that stood still loses no leg by that, and a node that did so comes back",
        run: standstill::standstill,
    },
    Scenario {
        name: "cut",
        sentence: "a leg whose cable is cut is given up in time, the guest goes on, and the member comes back by itself",
        run: faults::cut,
    },
    Scenario {
        name: "device-removed",
        sentence: "an RDMA device that is taken away costs a leg, and when it is back the member comes back by itself",
        run: faults::device_removed,
    },
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
        let with = |run| Scenario { name: "try", sentence: "", run }.report(fabric, Effort::FULL).outcome;
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
