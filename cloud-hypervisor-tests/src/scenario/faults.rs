//! What happens to the network under a writer that remembers what it was promised: a cable is cut, an RDMA device is taken
//! away and put back. Each node has a cable of its own, in the guest that has them.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::recovery::wait_for_writes;
use super::system::LIMIT;
use super::{Counters, Counts, Effort, System, not_run};
use crate::lab::cable::{Cable, End};
use crate::lab::{Daemon, DaemonBuilder, Lab, Node, NodeBuilder, Transport};

/// The leg timeout of both sides. Making a connection takes most of a second on an emulated processor.
const LEG_TIMEOUT: Duration = Duration::from_secs(3);
/// By when a lost leg has to be noticed, on a machine that may be crowded.
const NOTICED: Duration = Duration::from_secs(20);
/// What the daemon says when it has lost a leg.
const LOST: &str = "members lost";

/// Two nodes, each at the end of its own cable, with a daemon at the other ends.
fn wired(lab: &Lab, effort: Effort) -> Result<(System, Daemon)> {
    if !Cable::are_there() {
        return Err(not_run("it needs the cables of the Soft-RoCE guest"));
    }
    let settings = format!("leg_timeout_ms = {}\n", LEG_TIMEOUT.as_millis());
    let system = System::of(lab, effort, 2, &|name| {
        let cable = Cable::ALL[usize::from(name == "b")];
        NodeBuilder::new(name).address(cable.address(End::Node)).settings(&settings)
    })?;
    let timeout = LEG_TIMEOUT.as_millis().to_string();
    let daemon =
        DaemonBuilder::new(&system.pool).arguments(["--leg-timeout-ms", timeout.as_str()]).start(lab)?;
    Ok((system, daemon))
}

/// A leg whose cable is cut is given up within its timeout, the guest goes on, and the member comes back by itself.
pub(super) fn cut(lab: &Lab, effort: Effort) -> Result<Counts> {
    let (mut system, daemon) = wired(lab, effort)?;
    let writer = system.writer();
    let System { nodes, pool, promises, .. } = &mut system;
    let (noticed, _) = writer.during(pool, &daemon, promises, || {
        wait_for_writes(&nodes[1])?;
        let began = Instant::now();
        Cable::ALL[1].cut()?;
        let lost = daemon.process().wait_for_log(LOST, NOTICED).context("the cable of node b was cut");
        let noticed = began.elapsed();
        let gone_on = lost.and_then(|()| wait_for_more_writes(&nodes[0]));
        // Whatever came of it, the next scenario needs the cable.
        Cable::ALL[1].mend().and(gone_on)?;
        pool.wait_for_level("safe", LIMIT).context("the cable was mended")?;
        Ok(noticed)
    })?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("noticed_ms".to_owned(), u64::try_from(noticed.as_millis())?)]))
}

/// An RDMA device that is taken away, at a node and then at the daemon, costs a leg and nothing else: nobody keeps it, the guest
/// goes on, and when it is back the member comes back by itself.
pub(super) fn device_removed(lab: &Lab, effort: Effort) -> Result<Counts> {
    if lab.fabric().transport() == Transport::Tcp {
        return Err(not_run("over TCP there is no RDMA device"));
    }
    let (mut system, daemon) = wired(lab, effort)?;
    let writer = system.writer();
    let System { nodes, pool, promises, .. } = &mut system;
    let (took, _) = writer.during(pool, &daemon, promises, || {
        wait_for_writes(&nodes[1])?;
        let at_node = without(End::Node, || {
            nodes[1].process().wait_for_log("the RDMA device was removed", NOTICED)?;
            gone_on(pool, nodes)
        })?;
        pool.wait_for_level("safe", LIMIT).context("the device of node b is back")?;
        let at_daemon = without(End::Client, || {
            daemon.process().wait_for_log("the RDMA device was removed", NOTICED)?;
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
