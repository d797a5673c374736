//! The operator's override, `rmrctl pool force-from`, against a guest that nobody can see: its daemon and the only current copy stand
//! still, and go on when another copy was decided for. `forced.rs` has the cases in which operator and guest see different nodes.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::membership::attach;
use super::system::{LIMIT, System, leg_timeout};
use super::{Counts, Effort};
use crate::lab::{Daemon, DaemonBuilder, Lab, NodeBuilder, Pool, Status};

/// Exit code of a daemon whose disk another client took.
const DISPLACED: i32 = 3;
const GIVEN_UP: &str = "--yes-lose-what-others-have";
const GONE: &str = "--unreachable-are-gone";

/// A guest whose copy was given up is fenced when it comes back, and its copy becomes like the other one.
pub(super) fn older_branch(lab: &Lab, effort: Effort) -> Result<Counts> {
    let settings = leg_timeout(effort.leg_timeout);
    let system = System::of(lab, effort, 2, &|name| NodeBuilder::new(name).settings(&settings))?;
    let [a, b] = [0, 1].map(|node| system.nodes[node].process());
    let daemon = start(lab, &system, effort, "guest")?;
    let mut disk = attach(&daemon)?;
    write(&mut disk, 0, 1)?;
    ensure!(disk.flush(0)? == Status::Ok, "the flush");
    b.signal(libc::SIGSTOP)?;
    // This one may be on its way to b when b is given up; the next is on a alone.
    write(&mut disk, 8, 2).context("member b was given up")?;
    write(&mut disk, 16, 3).context("member a alone")?;
    daemon.process().signal(libc::SIGSTOP)?;
    a.signal(libc::SIGSTOP)?;
    b.signal(libc::SIGCONT)?;

    let began = Instant::now();
    loop {
        let words = refusal(&system.pool, &["1", GIVEN_UP])?;
        ensure!(words.contains("nothing was done"), "{words}");
        if words.contains(GONE) {
            break;
        }
        // Until b has found out that the guest is silent.
        ensure!(began.elapsed() < LIMIT, "after {:?}: {words}", began.elapsed());
        thread::sleep(Duration::from_millis(300));
    }
    let forced = system.pool.operate("force-from", &["1", GIVEN_UP, GONE])?;
    ensure!(states(&forced) == ["out", "clean"], "{forced}");

    a.signal(libc::SIGCONT)?;
    daemon.process().signal(libc::SIGCONT)?;
    // It cannot go on with what it has in memory: its daemon ends, and says why.
    system.pool.operate("resync", &[])?;
    let status = daemon.process().wait_exit(LIMIT)?;
    ensure!(status.code() == Some(DISPLACED), "ended with {status}: {}", daemon.process().log_text());
    drop(disk);
    system.pool.assert_identical()?;

    let daemon = start(lab, &system, effort, "the next guest")?;
    let mut disk = attach(&daemon)?;
    for (sector, expected) in [(0, &[1_u8][..]), (8, &[0, 2]), (16, &[0])] {
        let (status, found) = disk.read(0, sector, 4096)?;
        ensure!(
            status == Status::Ok && expected.iter().any(|byte| found == [*byte; 4096]),
            "sector {sector}: {status:?}, {:?}",
            found.first()
        );
    }
    drop(disk);
    daemon.stop()?;
    Ok(Counts::new())
}

fn start(lab: &Lab, system: &System, effort: Effort, name: &str) -> Result<Daemon> {
    let timeout = effort.leg_timeout.as_millis().to_string();
    let daemon = DaemonBuilder::new(&system.pool).name(name);
    let daemon = daemon.arguments(["--leg-timeout-ms".to_owned(), timeout]).start(lab)?;
    Ok(daemon)
}

fn write(disk: &mut crate::lab::Frontend, sector: u64, byte: u8) -> Result<()> {
    let status = disk.write(0, sector, &[byte; 4096])?;
    ensure!(status == Status::Ok, "writing {byte} at sector {sector}: {status:?}");
    Ok(())
}

/// What `rmrctl` said that did nothing.
fn refusal(pool: &Pool, arguments: &[&str]) -> Result<String> {
    let output = pool.operator("force-from", arguments)?.output()?;
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.code() == Some(1), "{:?}: {said}", output.status);
    Ok(said)
}

fn states(forced: &Value) -> Vec<&str> {
    let members = forced["view"]["members"].as_array().map_or(&[][..], Vec::as_slice);
    members.iter().filter_map(|m| m["state"].as_str()).collect()
}
