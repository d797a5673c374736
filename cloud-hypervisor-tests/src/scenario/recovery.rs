//! Nodes, the daemon, and all of them at once are killed again and again under a writer that remembers what it was promised.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::system::LIMIT;
use super::{Counters, Counts, Effort, System};
use crate::lab::{Daemon, Lab, Node};

/// How long a load runs before something happens to it.
const WARM_UP: Duration = Duration::from_millis(700);

/// Nodes killed one after the other under load come back, and no promise is broken.
pub(super) fn killed_nodes(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::new(lab, effort, 3, "")?;
    let daemon = system.daemon(lab, "daemon")?;
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| System::mixed_load(&daemon, &mut system.promises, effort, &stop));
        // Without one of its nodes the pool cannot be attached for the first time.
        let outcome = wait_for_writes(&system.nodes[0]).and_then(|()| {
            (0..effort.rounds).try_for_each(|round| {
                let node = &mut system.nodes[round % 3];
                thread::sleep(WARM_UP);
                node.kill()?;
                system.pool.wait_for_level("degraded", LIMIT)?;
                thread::sleep(WARM_UP);
                node.restart(lab)?;
                system.pool.wait_for_level("safe", LIMIT).with_context(|| format!("round {round}"))
            })
        });
        stop.store(true, Ordering::Relaxed);
        let loaded = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        outcome.and(loaded)
    })?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("rounds".to_owned(), effort.rounds as u64)]))
}

/// Waits until a node has answered a write.
fn wait_for_writes(node: &Node) -> Result<()> {
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
        under_load(&daemon, &mut system, || daemon.kill())?;
    }
    finish(lab, system)
}

/// Everything killed at once comes back with all that was promised.
pub(super) fn killed_everything(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::new(lab, effort, 3, "")?;
    for round in 0..effort.rounds {
        let daemon = system.daemon(lab, &format!("daemon-{round}"))?;
        let nodes = std::mem::take(&mut system.nodes);
        under_load(&daemon, &mut system, || {
            nodes.iter().try_for_each(Node::kill).and_then(|()| daemon.kill())
        })?;
        system.nodes = nodes;
        system.nodes.iter_mut().try_for_each(|node| node.restart(lab))?;
    }
    finish(lab, system)
}

/// Runs `kill` in the middle of a load, which does not survive it; what its requests may have done is remembered.
fn under_load(daemon: &Daemon, system: &mut System, kill: impl FnOnce() -> Result<()>) -> Result<()> {
    let stop = AtomicBool::new(false);
    let effort = system.effort();
    thread::scope(|scope| {
        let load = scope.spawn(|| System::mixed_load(daemon, &mut system.promises, effort, &stop));
        thread::sleep(WARM_UP);
        let killed = kill();
        stop.store(true, Ordering::Relaxed);
        // It ends with an error: its disk is gone.
        drop(load.join());
        killed
    })
}

fn finish(lab: &Lab, mut system: System) -> Result<Counts> {
    let daemon = system.daemon(lab, "last")?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("rounds".to_owned(), system.effort().rounds as u64)]))
}
