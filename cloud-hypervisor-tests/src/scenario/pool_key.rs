//! A pool with a key: who has it gets in, everybody else is told so in a sentence, and the key is changed under a running disk.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::system::LIMIT;
use super::{Counts, Effort, System};
use crate::bench::load::{LoadSpec, Pattern};
use crate::lab::{Daemon, DaemonBuilder, Lab, NodeBuilder};

/// Who has the key of a pool is let in, nobody else is, and it can be changed.
pub(super) fn pool_key(lab: &Lab, effort: Effort) -> Result<Counts> {
    let (first, second) = (lab.path("first.key"), lab.path("second.key"));
    put(&first, &[1; 32], 0o600)?;
    put(&second, "5a".repeat(32).as_bytes(), 0o600)?;
    let directories = ["a", "b"].map(|name| lab.path(format!("{name}.keys")));
    for directory in &directories {
        fs::create_dir(directory).with_context(|| format!("making {}", directory.display()))?;
        put(&directory.join("disk.key"), &[1; 32], 0o600)?;
    }
    let builder = |name: &str| {
        let directory = lab.path(format!("{name}.keys"));
        let keys = format!("[keys]\ndirectory = \"{}\"\nrequired = true", directory.display());
        NodeBuilder::new(name).settings(&keys)
    };
    let mut system = System::of(lab, effort, 2, &builder)?;

    refused(lab, &system, "no-key", None, &["requires a key", "--key-file"])?;
    refused(lab, &system, "wrong-key", Some(&second), &["not this pool's", "--key-file"])?;
    let open = lab.path("open.key");
    put(&open, &[1; 32], 0o644)?;
    refused(lab, &system, "open-key", Some(&open), &["0644", "expected 0600"])?;
    let (exit, words) = system.pool.rmrctl_pool("verify", &["--wait"])?;
    ensure!(exit != 0 && words.to_string().contains("requires a key"), "rmrctl without a key: {words}");
    let (exit, words) = system.pool.rmrctl_pool("verify", &["--wait", "--key-file", &text(&first)?])?;
    ensure!(exit == 0, "rmrctl with the key ended with {exit}: {words}");

    // Reads and writes, a node that is killed, and the resync from node to node.
    let daemon = keyed(lab, &system, "keyed", &first)?;
    let load = System::spec(Pattern::RandWrite, 16, Some(effort.requests / 4));
    let mut disk = System::attach(&daemon, &load)?;
    system.load_on(&mut disk, &load)?;
    away_and_back(lab, &mut system, &mut disk, &LoadSpec { seed: 2, ..load.clone() })?;

    // The new key beside the old one, on one node after the other.
    for directory in &directories {
        fs::rename(directory.join("disk.key"), directory.join("disk.key.old"))?;
        put(&directory.join("disk.key"), "5a".repeat(32).as_bytes(), 0o600)?;
        away_and_back(lab, &mut system, &mut disk, &LoadSpec { seed: 3, ..load.clone() })?;
    }
    drop(disk);
    daemon.stop()?;
    let daemon = keyed(lab, &system, "rotated", &second)?;
    let mut disk = System::attach(&daemon, &load)?;
    // It is attached when this is done; before that it would wait for a node that is killed.
    system.load_on(&mut disk, &LoadSpec { seed: 5, ..load.clone() })?;
    for directory in &directories {
        fs::remove_file(directory.join("disk.key.old"))?;
    }
    away_and_back(lab, &mut system, &mut disk, &LoadSpec { seed: 4, ..load })?;
    drop(disk);
    system.check_everything(&daemon)?;
    daemon.stop()?;
    refused(lab, &system, "old-key", Some(&first), &["not this pool's"])?;

    // Node a was never started anew, and has counted everything.
    let failures = system.nodes[0].admin_get("/v1/node")?["authentication_failures"].clone();
    let count = |what: &str| failures[what].as_u64().unwrap_or(0);
    ensure!(count("missing") > 0 && count("wrong") > 1, "failed attempts are not counted: {failures}");
    Ok(Counts::from([("missing".to_owned(), count("missing")), ("wrong".to_owned(), count("wrong"))]))
}

/// Node b is killed, misses writes, comes back and is brought up to date.
fn away_and_back(
    lab: &Lab,
    system: &mut System,
    disk: &mut crate::bench::disk::Disk,
    load: &LoadSpec,
) -> Result<()> {
    system.nodes[1].kill()?;
    system.load_on(disk, load)?;
    system.pool.wait_for_level("degraded", LIMIT)?;
    system.nodes[1].restart(lab)?;
    system.pool.wait_for_level("safe", LIMIT).context("node b is back")
}

fn keyed(lab: &Lab, system: &System, name: &str, key: &Path) -> Result<Daemon> {
    DaemonBuilder::new(&system.pool).name(name).arguments(["--key-file", &text(key)?]).start(lab)
}

/// A daemon with this key, or none, ends with words among which are these.
fn refused(lab: &Lab, system: &System, name: &str, key: Option<&PathBuf>, words: &[&str]) -> Result<()> {
    let mut daemon = DaemonBuilder::new(&system.pool).name(name);
    if let Some(key) = key {
        daemon = daemon.arguments(["--key-file", &text(key)?]);
    }
    let said = daemon.start_refused(lab).with_context(|| format!("daemon '{name}'"))?;
    let missing = words.iter().find(|word| !said.contains(**word));
    ensure!(missing.is_none(), "expected '{}' from daemon '{name}', found:\n{said}", missing.unwrap_or(&""));
    Ok(())
}

fn text(path: &Path) -> Result<String> {
    path.to_str().map(str::to_owned).with_context(|| format!("{} is no UTF-8", path.display()))
}

fn put(path: &Path, content: &[u8], mode: u32) -> Result<()> {
    fs::write(path, content).with_context(|| format!("writing {}", path.display()))?;
    fs::set_permissions(path, Permissions::from_mode(mode))
        .with_context(|| format!("permissions of {}", path.display()))
}
