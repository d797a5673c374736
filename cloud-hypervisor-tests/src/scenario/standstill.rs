//! A process that stands still under load: its machine is suspended or crowded, a debugger holds it. A daemon that did so holds
//! nothing against the nodes, which have done no wrong; a node that did so is a lost leg, which comes back.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::recovery::wait_for_writes;
use super::system::LIMIT;
use super::writer::{ENDLESS, STALL_MS, attach, run_load};
use super::{Counts, Effort, System};
use crate::bench::load::{LoadSpec, Pattern};
use crate::lab::{DaemonBuilder, NodeBuilder, Process};

/// The leg timeout of both sides. Making a connection takes most of a second on an emulated processor.
const LEG_TIMEOUT: Duration = Duration::from_secs(3);
/// How long a process stands still. A node that hears nothing of a client for three leg timeouts ends its connection.
const STANDSTILL: Duration = Duration::from_secs(6);
/// How long the load runs before and after.
const PAUSE: Duration = Duration::from_secs(1);
/// What the daemon says when it has lost a leg.
const LOST: &str = "members lost";

/// A daemon that stood still for longer than the leg timeout loses no leg by that, and a node that did so comes back.
pub(super) fn standstill(lab: &crate::lab::Lab, effort: Effort) -> Result<Counts> {
    let timeout = LEG_TIMEOUT.as_millis();
    let settings = format!("leg_timeout_ms = {timeout}\n");
    let mut system = System::of(lab, effort, 2, &|name| NodeBuilder::new(name).settings(&settings))?;
    let arguments = ["--leg-timeout-ms".to_owned(), timeout.to_string()];
    let daemon = DaemonBuilder::new(&system.pool).arguments(arguments).start(lab)?;
    // More in flight than sockets hold: when the daemon stops, requests of which a node has seen half are on their way.
    let load = LoadSpec {
        name: "standstill".into(),
        pattern: Pattern::Write,
        block_size: 512 << 10,
        depth: 32,
        ramp_ms: 0,
        runtime_ms: ENDLESS,
        stall_timeout_ms: STALL_MS,
        ..LoadSpec::default()
    };
    let System { nodes, pool, promises, .. } = &mut system;
    let mut disk = attach(&daemon, &load)?;
    let stop = AtomicBool::new(false);
    let stood_still = thread::scope(|scope| {
        let loaded = scope.spawn(|| run_load(&mut disk, &load, promises, Some(&stop)));
        let outcome = wait_for_writes(&nodes[0]).and_then(|()| {
            thread::sleep(PAUSE);
            stand_still(daemon.process())?;
            thread::sleep(PAUSE);
            ensure!(
                !daemon.process().log_text().contains(LOST),
                "the daemon blames a node for its own standstill"
            );
            stand_still(nodes[1].process())?;
            daemon.process().wait_for_log(LOST, LIMIT).context("node b stood still")?;
            pool.wait_for_level("safe", LIMIT).context("node b goes on")
        });
        stop.store(true, Ordering::Relaxed);
        let loaded = loaded.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
        outcome.and(loaded)
    })?;
    drop(disk);
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("requests".to_owned(), stood_still.requests)]))
}

/// Stops a process for a while.
fn stand_still(process: &Process) -> Result<()> {
    process.signal(libc::SIGSTOP)?;
    thread::sleep(STANDSTILL);
    process.signal(libc::SIGCONT)
}
