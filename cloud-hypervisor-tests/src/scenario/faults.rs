//! What happens to the network under a writer that remembers what it was promised: a cable is cut, an RDMA device is taken
//! away and put back. Each node has a cable of its own, in the guest that has them.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::recovery::wait_for_writes;
use super::system::{LIMIT, leg_timeout};
use super::{Counters, Counts, Effort, System, not_run};
use crate::lab::cable::{Cable, End};
use crate::lab::{Daemon, DaemonBuilder, Lab, Node, NodeBuilder, Transport};

/// What the daemon says when it has lost a leg.
const LOST: &str = "members lost";

/// By when a lost leg has to be noticed, on a machine that may be crowded.
fn noticed_by(effort: Effort) -> Duration {
    effort.leg_timeout * 7
}

/// Two nodes with these `settings` besides, each at the end of its own cable, with a daemon at the other ends.
pub(super) fn wired(lab: &Lab, effort: Effort, settings: &str) -> Result<(System, Daemon)> {
    if !Cable::are_there() {
        return Err(not_run("it needs the cables of the Soft-RoCE guest"));
    }
    let settings = leg_timeout(effort.leg_timeout) + settings;
    let system = System::of(lab, effort, 2, &|name| {
        let cable = Cable::ALL[usize::from(name == "b")];
        NodeBuilder::new(name).address(cable.address(End::Node)).settings(&settings)
    })?;
    let timeout = effort.leg_timeout.as_millis().to_string();
    let daemon =
        DaemonBuilder::new(&system.pool).arguments(["--leg-timeout-ms", timeout.as_str()]).start(lab)?;
    Ok((system, daemon))
}

/// Does `work` while what these ends of cables send is lost. Returns what `work` did, and how long it took to cut them all:
/// what `work` sees begins so long before it at most.
pub(super) fn during_cut<T>(
    cuts: &[(Cable, End)],
    work: impl FnOnce() -> Result<T>,
) -> Result<(T, Duration)> {
    let began = Instant::now();
    let cut = cuts.iter().try_for_each(|(cable, end)| cable.cut(*end));
    let took = began.elapsed();
    let worked = cut.and_then(|()| work());
    // Whatever came of it, the next scenario needs the cables.
    let mended: Vec<_> = cuts.iter().map(|(cable, end)| cable.mend(*end)).collect();
    let worked = worked?;
    mended.into_iter().collect::<Result<()>>()?;
    Ok((worked, took))
}

/// A leg whose cable is cut is given up within its timeout, the guest goes on, and the member comes back by itself.
pub(super) fn cut(lab: &Lab, effort: Effort) -> Result<Counts> {
    let (mut system, daemon) = wired(lab, effort, "")?;
    let writer = system.writer();
    let System { nodes, pool, promises, .. } = &mut system;
    let ((noticed, cutting), _) = writer.during(pool, &daemon, promises, || {
        wait_for_writes(&nodes[1])?;
        let both = End::BOTH.map(|end| (Cable::ALL[1], end));
        let times = during_cut(&both, || {
            let began = Instant::now();
            daemon.process().wait_for_log(LOST, noticed_by(effort)).context("the cable of node b was cut")?;
            let noticed = began.elapsed();
            wait_for_more_writes(&nodes[0]).map(|()| noticed)
        })?;
        pool.wait_for_level("safe", LIMIT).context("the cable was mended")?;
        Ok(times)
    })?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([
        ("cutting_ms".to_owned(), u64::try_from(cutting.as_millis())?),
        ("noticed_ms".to_owned(), u64::try_from(noticed.as_millis())?),
    ]))
}

/// An RDMA device that is taken away, at a node and then at the daemon, costs a leg and nothing else: nobody keeps it, the guest
/// goes on, and when it is back the member comes back by itself.
pub(super) fn device_removed(lab: &Lab, effort: Effort) -> Result<Counts> {
    if lab.fabric().transport() == Transport::Tcp {
        return Err(not_run("over TCP there is no RDMA device"));
    }
    let (mut system, daemon) = wired(lab, effort, "")?;
    let writer = system.writer();
    let System { nodes, pool, promises, .. } = &mut system;
    let (took, _) = writer.during(pool, &daemon, promises, || {
        wait_for_writes(&nodes[1])?;
        let at_node = without(End::Node, || {
            nodes[1].process().wait_for_log("the RDMA device was removed", noticed_by(effort))?;
            gone_on(pool, nodes)
        })?;
        pool.wait_for_level("safe", LIMIT).context("the device of node b is back")?;
        let at_daemon = without(End::Client, || {
            daemon.process().wait_for_log("the RDMA device was removed", noticed_by(effort))?;
            gone_on(pool, nodes)
        })?;
        pool.wait_for_level("safe", LIMIT).context("the daemon's device is back")?;
        Ok([("node_let_go_ms", at_node), ("daemon_let_go_ms", at_daemon)])
    })?;
    system.nodes[1].process().ensure_running("its device was removed")?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    took.into_iter().map(|(name, took)| Ok((name.to_owned(), u64::try_from(took.as_millis())?))).collect()
}

/// Does `work` while node b's cable has no RDMA device at one end; returns how long it took to take it away.
fn without(end: End, work: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let cable = Cable::ALL[1];
    let removed = cable.remove_device(end);
    let worked = if removed.is_ok() { work() } else { Ok(()) };
    cable.add_device(end).and(worked).and(removed)
}

fn gone_on(pool: &crate::lab::Pool, nodes: &[Node]) -> Result<()> {
    pool.wait_for_level("degraded", LIMIT)?;
    wait_for_more_writes(&nodes[0])
}

/// Waits until a node has answered more writes than it has by now.
fn wait_for_more_writes(node: &Node) -> Result<()> {
    const NAME: &str = "rmr_store_writes_total";
    let (before, end) = (Counters::of(node)?, Instant::now() + LIMIT);
    while Counters::of(node)?.since(&before, NAME)? == 0 {
        ensure!(Instant::now() < end, "no write came to node '{}' within {LIMIT:?}", node.name());
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}
