//! Pools that change while they are in use, by `rmrctl` as an operator would: copies come and go, disks are replaced, hosts are
//! taken down by plan; with a guest and without one, and every command given twice.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use serde_json::Value;

use super::system::{LIMIT, System};
use super::{Counters, Counts, Effort};
use crate::lab::{Daemon, Frontend, FrontendBuilder, Lab, Node, Pool, Status, wait_until};

/// Longer than a client waits between two attempts to reach a member.
const A_WHILE: Duration = Duration::from_millis(1500);

/// Copies are added, moved and removed under a writer that remembers.
pub(super) fn members(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::patient(lab, effort, 2, 2)?;
    let daemon = system.patient_daemon(lab, "daemon")?;
    let writer = system.writer();
    let System { nodes, pool: start, promises, .. } = &mut system;
    let [a, b, c, d] = &nodes[..] else { bail!("expected four nodes, found {}", nodes.len()) };
    let (end, report) = writer.during(start, &daemon, promises, || {
        let mut pool = start.clone();
        for again in [false, true] {
            let added = pool.operate("add-member", &["--member", &admin(c), "--wait"])?;
            ensure!(added["member"] == 2 && added["changed"] == !again, "{added}");
        }
        pool = pool.with(c);
        for again in [false, true] {
            let to = ["0", "--to", &admin(d), "--delete-store"];
            let moved = pool.operate("move", &to)?;
            ensure!(moved["member"] == 3, "{moved}");
            ensure!(moved["deleted_stores"].as_array().is_some_and(|s| s.is_empty() == again), "{moved}");
        }
        ensure!(store_files(a)? == 0, "the store that was moved away from is still there");
        pool = pool.without(a).with(d);
        pool.wait_for_level("safe", LIMIT)?;
        for again in [false, true] {
            let removed = pool.operate("remove-member", &["1", "--delete-store"])?;
            ensure!(removed["changed"] == !again, "{removed}");
        }
        Ok(pool.without(b))
    })?;
    // The daemon was told of these two only, and needs them no more.
    a.stop()?;
    b.stop()?;
    system.pool = end;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("requests".to_owned(), report.requests)]))
}

/// A replaced disk is filled, and planned maintenance costs what was missed.
pub(super) fn maintenance(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::patient(lab, effort, 3, 0)?;
    let daemon = system.patient_daemon(lab, "daemon")?;
    let writer = system.writer();
    let System { nodes, pool, promises, .. } = &mut system;
    writer.during(pool, &daemon, promises, || {
        lose_disk(lab, &mut nodes[1])?;
        pool.wait_for_level("degraded", LIMIT)?;
        let at = admin(&nodes[1]);
        for again in [false, true] {
            let replaced = pool.operate("replace", &["1", "--member", &at, "--wait"])?;
            ensure!(replaced["changed"] == !again, "{replaced}");
        }
        pool.wait_for_level("safe", LIMIT)
    })?;

    let mut disk = attach(&daemon)?;
    for _ in 0..2 {
        pool.operate("maintenance", &["2", "on"])?;
    }
    let status = pool.status()?;
    ensure!(
        status["assessment"]["level"] == "degraded" && status["assessment"]["planned"] == true,
        "{status}"
    );
    nodes[2].stop()?;
    for block in 0..effort.blocks {
        ensure!(disk.write(0, block * 5 * 8, &pattern(block))? == Status::Ok, "block {block}");
    }
    nodes[2].restart(lab)?;
    thread::sleep(A_WHILE);
    ensure!(pool.level()? == "degraded", "a member in maintenance came back by itself");
    let missed = pool.status()?.pointer("/assessment/members/2/missed_bytes").and_then(Value::as_u64);
    ensure!(
        missed == Some(effort.blocks * 4096),
        "{missed:?} bytes are to be moved where {} blocks were missed",
        effort.blocks
    );
    pool.operate("maintenance", &["2", "off", "--wait"])?;
    let written = Counters::of(&nodes[2])?.get("rmr_store_resync_written_blocks_total")?;
    ensure!(written == effort.blocks, "{written} blocks were written where {} were missed", effort.blocks);
    pool.operate("maintenance", &["2", "off"])?;
    ensure!(disk.flush(0)? == Status::Ok, "the last flush");
    drop(disk);
    daemon.stop()?;
    pool.assert_identical()?;
    Ok(Counts::from([("missed_blocks".to_owned(), written)]))
}

/// Without a guest, `rmrctl` changes the pool, brings copies up to date, goes on from one of them, and leaves.
pub(super) fn no_guest(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::patient(lab, effort, 2, 1)?;
    system.fill(lab, "first")?;
    let at_c = admin(&system.nodes[2]);
    let added = system.pool.operate("add-member", &["--member", &at_c])?;
    ensure!(added["changed"] == true, "{added}");
    system.pool = system.pool.clone().with(&system.nodes[2]);
    ensure!(
        system.pool.level()? == "degraded",
        "nobody brings a copy up to date while no client is attached"
    );
    system.pool.operate("resync", &[])?;
    ensure!(system.pool.level()? == "safe", "after the resync");
    system.pool.assert_identical()?;

    system.pool.operate("maintenance", &["0", "on"])?;
    system.nodes[0].stop()?;
    system.fill(lab, "second")?;
    system.nodes[0].restart(lab)?;
    system.pool.operate("maintenance", &["0", "off", "--wait"])?;
    system.pool.assert_identical()?;
    system.pool.operate("remove-member", &["1", "--delete-store"])?;
    system.pool = system.pool.clone().without(&system.nodes[1]);
    ensure!(system.pool.level()? == "safe", "after the removal");

    guest_comes(lab, &mut system)?;
    forced(lab, &mut system)?;
    Ok(Counts::new())
}

/// While `rmrctl` waits for a copy that is away, a guest starts: it gets its disk, and does the rest.
fn guest_comes(lab: &Lab, system: &mut System) -> Result<()> {
    system.pool.operate("maintenance", &["2", "on"])?;
    system.nodes[2].stop()?;
    system.pool.operate("maintenance", &["2", "off"])?;
    let limit = LIMIT.as_secs().to_string();
    let mut resync = system.pool.operator("resync", &["--wait-timeout", &limit])?;
    let mut resync = resync.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
    wait_until("rmrctl to hold the pool", LIMIT, || {
        let client = system.pool.status()?.pointer("/assessment/client/text").cloned().unwrap_or_default();
        Ok(client.as_str().is_some_and(|text| text.starts_with("rmrctl")))
    })?;
    let daemon = system.patient_daemon(lab, "guest")?;
    let mut disk = attach(&daemon)?;
    let written = disk.write(0, 0, &[5; 4096])?;
    ensure!(written == Status::Ok, "the guest has no disk while rmrctl holds the pool: {written:?}");
    system.nodes[2].restart(lab)?;
    ensure!(resync.wait()?.success(), "rmrctl gave up when a guest came");
    drop(disk);
    daemon.stop()?;
    system.pool.assert_identical()
}

/// The newer copy is lost for good, and the operator goes on with the older one.
fn forced(lab: &Lab, system: &mut System) -> Result<()> {
    const GIVEN_UP: &str = "--yes-lose-what-others-have";
    system.pool.operate("maintenance", &["0", "on"])?;
    system.fill(lab, "third")?;
    system.nodes[2].kill()?;
    let pool = &system.pool;
    refused(pool, &["0"], GIVEN_UP)?;
    refused(pool, &["0", GIVEN_UP], "--unreachable-are-gone")?;
    let forced = pool.operate("force-from", &["0", GIVEN_UP, "--unreachable-are-gone"])?;
    ensure!(forced["view"]["members"][0]["state"] == "clean", "{forced}");
    system.nodes[2].restart(lab)?;
    pool.operate("maintenance", &["0", "off"])?;
    pool.operate("resync", &[])?;
    pool.assert_identical()?;
    let daemon = system.patient_daemon(lab, "last")?;
    drop(attach(&daemon)?);
    daemon.stop()
}

/// `force-from` does nothing, and says which words are lacking.
fn refused(pool: &Pool, arguments: &[&str], lacking: &str) -> Result<()> {
    match pool.operate("force-from", arguments) {
        Ok(forced) => bail!("force-from {arguments:?} was expected to be refused, and said {forced}"),
        Err(error) => {
            let words = format!("{error:#}");
            ensure!(words.contains("nothing was done") && words.contains(lacking), "{words}");
            Ok(())
        }
    }
}

impl System {
    /// Writes through a daemon of its own, which leaves again.
    fn fill(&self, lab: &Lab, name: &str) -> Result<()> {
        let daemon = self.patient_daemon(lab, name)?;
        let mut disk = attach(&daemon)?;
        let seed = u64::from(name.as_bytes()[0]);
        for block in 0..self.effort().blocks {
            let written = disk.write(0, (block * 11 + seed) * 8, &pattern(block ^ seed))?;
            ensure!(written == Status::Ok, "block {block} of '{name}': {written:?}");
        }
        ensure!(disk.flush(0)? == Status::Ok, "the flush of '{name}'");
        drop(disk);
        daemon.stop()
    }
}

/// A node is killed, and comes back with an empty disk.
pub(super) fn lose_disk(lab: &Lab, node: &mut Node) -> Result<()> {
    node.kill()?;
    for entry in fs::read_dir(node.store_dir())? {
        fs::remove_file(entry?.path())?;
    }
    node.restart(lab)
}

/// The admin address of a node, as `rmrctl` takes it.
pub(super) fn admin(node: &Node) -> String {
    node.admin_address().to_string()
}

/// A driver on the daemon's disk.
pub(super) fn attach(daemon: &Daemon) -> Result<Frontend> {
    FrontendBuilder::new(daemon.socket()).connect()
}

/// How many stores a node has.
pub(super) fn store_files(node: &Node) -> Result<usize> {
    Ok(fs::read_dir(node.store_dir())?.count())
}

fn pattern(seed: u64) -> [u8; 4096] {
    std::array::from_fn(|at| (seed.wrapping_mul(31) ^ at as u64).to_le_bytes()[0] | 1)
}
