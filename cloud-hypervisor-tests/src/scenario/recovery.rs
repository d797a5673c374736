//! Nodes, the daemon, and all of them at once are killed again and again under a writer that remembers what it was promised.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::system::LIMIT;
use super::{Counters, Counts, Effort, System};
use crate::lab::{Lab, Node};

/// How long things stay as they are before something happens again.
const WARM_UP: Duration = Duration::from_millis(700);

/// Nodes killed one after the other under load come back, and no promise is broken.
pub(super) fn killed_nodes(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::new(lab, effort, 3, "")?;
    let daemon = system.daemon(lab, "daemon")?;
    let writer = system.writer();
    let System { nodes, pool, promises, .. } = &mut system;
    writer.during(pool, &daemon, promises, || {
        wait_for_writes(&nodes[0])?;
        (0..effort.rounds).try_for_each(|round| {
            let node = &mut nodes[round % 3];
            thread::sleep(WARM_UP);
            node.kill()?;
            pool.wait_for_level("degraded", LIMIT)?;
            thread::sleep(WARM_UP);
            node.restart(lab)?;
            pool.wait_for_level("safe", LIMIT).with_context(|| format!("round {round}"))
        })
    })?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("rounds".to_owned(), effort.rounds as u64)]))
}

/// Waits until a node has answered a write.
pub(super) fn wait_for_writes(node: &Node) -> Result<()> {
    let end = Instant::now() + LIMIT;
    while Counters::of(node)?.since(&Counters::default(), "rmr_store_writes_total")? == 0 {
        ensure!(Instant::now() < end, "no write came to node '{}' within {LIMIT:?}", node.name());
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

/// A daemon killed under load again and again leaves copies that agree.
pub(super) fn killed_daemon(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::new(lab, effort, 3, "")?;
    for round in 0..effort.rounds {
        let daemon = system.daemon(lab, &format!("daemon-{round}"))?;
        system.writer().until_killed(&daemon, &mut system.promises, || daemon.kill())?;
    }
    finish(lab, system)
}

/// Everything killed at once comes back with all that was promised.
pub(super) fn killed_everything(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::new(lab, effort, 3, "")?;
    for round in 0..effort.rounds {
        let daemon = system.daemon(lab, &format!("daemon-{round}"))?;
        let nodes = std::mem::take(&mut system.nodes);
        system.writer().until_killed(&daemon, &mut system.promises, || {
            nodes.iter().try_for_each(Node::kill).and_then(|()| daemon.kill())
        })?;
        system.nodes = nodes;
        system.nodes.iter_mut().try_for_each(|node| node.restart(lab))?;
    }
    finish(lab, system)
}

fn finish(lab: &Lab, mut system: System) -> Result<Counts> {
    let daemon = system.daemon(lab, "last")?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("rounds".to_owned(), system.effort().rounds as u64)]))
}
