//! What nearly every scenario begins with: nodes, one pool over all of them, a daemon, and a writer that remembers.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::writer::{ENDLESS, STALL_MS, Writer, attach, check_everything, run_load};
use super::{Counters, Effort, not_run};
use crate::bench::disk::Disk;
use crate::bench::load::{LoadSpec, Pattern, Report};
use crate::bench::verify::{Promises, Unwritten};
use crate::lab::{Daemon, DaemonBuilder, Lab, Node, NodeBuilder, Pool, PoolBuilder, Transport};

/// How long a member may take to be missed, or to be Clean again.
pub(super) const LIMIT: Duration = Duration::from_secs(120);

/// Nodes and the pool that has a member on each.
pub struct System {
    /// The nodes, `a` first.
    pub nodes: Vec<Node>,
    /// The pool.
    pub pool: Pool,
    /// What the disk's writer was promised.
    pub promises: Promises,
    effort: Effort,
}

impl System {
    /// `count` nodes with `settings` in their configuration, their stores in memory, and a new pool over them.
    ///
    /// # Errors
    /// When something does not come up, or cannot on this machine.
    pub fn new(lab: &Lab, effort: Effort, count: usize, settings: &str) -> Result<Self> {
        Self::of(lab, effort, count, &|name| NodeBuilder::new(name).settings(settings))
    }

    /// As [`System::new`], with stores on a disk where O_DIRECT works.
    ///
    /// # Errors
    /// As [`System::new`].
    pub fn on_disk(lab: &Lab, effort: Effort, count: usize) -> Result<Self> {
        Self::of(lab, effort, count, &|name| NodeBuilder::new(name).on_disk())
    }

    /// As [`System::new`], with each node as `builder` makes it.
    ///
    /// # Errors
    /// As [`System::new`].
    pub fn of(
        lab: &Lab,
        effort: Effort,
        count: usize,
        builder: &dyn Fn(&str) -> NodeBuilder,
    ) -> Result<Self> {
        let nodes = start_nodes(lab, count, builder)?;
        Self::over(lab, effort, PoolBuilder::new("disk"), nodes, count)
    }

    /// `members` nodes with a pool over them, and `spares` more; they and the operator wait long for a silent peer.
    ///
    /// # Errors
    /// As [`System::new`].
    pub fn patient(lab: &Lab, effort: Effort, members: usize, spares: usize) -> Result<Self> {
        let nodes = patient_nodes(lab, effort, members + spares)?;
        Self::over(lab, effort, PoolBuilder::new("disk").patience(effort.patience), nodes, members)
    }

    fn over(lab: &Lab, effort: Effort, pool: PoolBuilder, nodes: Vec<Node>, members: usize) -> Result<Self> {
        let pool = pool.size_mib(effort.pool_mib);
        let pool = nodes.iter().take(members).fold(pool, |pool, node| pool.member(node)).create(lab)?;
        let promises = Promises::new(pool.size(), 4096, u64::from(std::process::id()), Unwritten::Zeroes);
        Ok(Self { nodes, pool, promises, effort })
    }

    /// A daemon for the pool.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn daemon(&self, lab: &Lab, name: &str) -> Result<Daemon> {
        DaemonBuilder::new(&self.pool).name(name).start(lab)
    }

    /// A daemon for the pool that waits long for a silent node.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn patient_daemon(&self, lab: &Lab, name: &str) -> Result<Daemon> {
        patient_daemon(&self.pool, self.effort).name(name).start(lab)
    }

    /// Runs `load` to its end and demands that every request was well answered and every read held what was promised.
    ///
    /// # Errors
    /// When that is not so.
    pub fn load(&mut self, daemon: &Daemon, load: &LoadSpec) -> Result<Report> {
        self.load_on(&mut Self::attach(daemon, load)?, load)
    }

    /// As [`System::load`], on a disk that was attached before and stays so.
    ///
    /// # Errors
    /// As [`System::load`].
    pub fn load_on(&mut self, disk: &mut Disk, load: &LoadSpec) -> Result<Report> {
        let report = run_load(disk, load, &mut self.promises, None)?;
        ensure!(report.requests > 0, "the load did nothing: {report:?}");
        Ok(report)
    }

    /// The daemon's disk, for loads like this one. The end of the daemon ends them, at once.
    ///
    /// # Errors
    /// When the daemon does not take part.
    pub fn attach(daemon: &Daemon, load: &LoadSpec) -> Result<Disk> {
        attach(daemon, load)
    }

    /// What a load is whose end is a number of requests, or the stop of whoever runs it.
    #[must_use]
    pub fn spec(pattern: Pattern, depth: u32, requests: Option<u64>) -> LoadSpec {
        LoadSpec {
            name: "scenario".into(),
            pattern,
            depth,
            ramp_ms: 0,
            runtime_ms: ENDLESS,
            stall_timeout_ms: STALL_MS,
            max_requests: requests,
            ..LoadSpec::default()
        }
    }

    /// The writer under which something breaks.
    #[must_use]
    pub fn writer(&self) -> Writer {
        Writer { depth: 16, rate: self.effort.rate, span: None }
    }

    /// As [`check_everything`].
    ///
    /// # Errors
    /// As [`check_everything`].
    pub fn check_everything(&mut self, daemon: &Daemon) -> Result<()> {
        check_everything(&self.pool, daemon, &mut self.promises)
    }

    /// What all nodes together have counted so far.
    ///
    /// # Errors
    /// When one does not answer.
    pub fn counters(&self) -> Result<Counters> {
        self.nodes.iter().map(Counters::of).try_fold(Counters::default(), |sum, one| Ok(sum.plus(&one?)))
    }

    /// How much is to be done.
    #[must_use]
    pub fn effort(&self) -> Effort {
        self.effort
    }
}

/// Nodes that wait long for a silent peer, `a` first.
pub(super) fn patient_nodes(lab: &Lab, effort: Effort, count: usize) -> Result<Vec<Node>> {
    let settings = leg_timeout(effort.patience);
    start_nodes(lab, count, &|name| NodeBuilder::new(name).settings(&settings))
}

/// A daemon to be that waits long for a silent node.
pub(super) fn patient_daemon(pool: &Pool, effort: Effort) -> DaemonBuilder {
    DaemonBuilder::new(pool)
        .arguments(["--leg-timeout-ms".to_owned(), effort.patience.as_millis().to_string()])
}

/// The leg timeout in the configuration of a node.
pub(super) fn leg_timeout(timeout: Duration) -> String {
    format!("leg_timeout_ms = {}\n", timeout.as_millis())
}

fn start_nodes(lab: &Lab, count: usize, builder: &dyn Fn(&str) -> NodeBuilder) -> Result<Vec<Node>> {
    let names = ["a", "b", "c", "d", "e", "f", "g", "h"];
    let start = |name: &&str| builder(name).start(lab).map_err(|error| explain(lab, error));
    names.iter().take(count).map(start).collect()
}

/// A node without the transport says so and ends; that is no failure of a scenario.
fn explain(lab: &Lab, error: anyhow::Error) -> anyhow::Error {
    let text = format!("{error:#}");
    let reason = text.lines().find(|line| line.to_lowercase().contains("this build has no rdma"));
    match reason {
        Some(reason) if lab.fabric().transport() == Transport::Rdma => not_run(reason.trim()),
        _ => error,
    }
}
