//! Commands that change a pool, each cut short in its middle by the death of somebody who takes part, and finished by being
//! repeated, as an operator would.

use std::collections::BTreeMap;
use std::process::{Child, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::membership::{admin, attach, lose_disk, store_files};
use super::system::{LIMIT, System};
use super::{Counts, Effort};
use crate::bench::load::Pattern;
use crate::lab::{Daemon, Frontend, Lab, Pool, wait_until};

/// Every change is finished by repeating it, whoever was killed in its middle.
pub(super) fn killed_commands(lab: &Lab, effort: Effort) -> Result<Counts> {
    let mut system = System::patient(lab, effort, 2, 2)?;
    let daemon = system.patient_daemon(lab, "daemon")?;
    system.load(&daemon, &System::spec(Pattern::RandWrite, 8, Some(effort.blocks)))?;
    let disk = Some(attach(&daemon)?);
    let asked = system.pool.clone().with(&system.nodes[2]).with(&system.nodes[3]);
    let usual = BTreeMap::new();
    let mut interrupted = Interrupted { lab, system, asked, daemon, disk, usual, kills: 0, hits: 0 };
    interrupted.all_changes((Victim::None, 0), effort.pool_mib)?;
    let cuts = [(Victim::Rmrctl, 30), (Victim::Daemon, 50), (Victim::Node, 60), (Victim::Rmrctl, 80)];
    for (size_mib, cut) in (effort.pool_mib + 4..).step_by(4).zip(cuts) {
        interrupted.all_changes(cut, size_mib).with_context(|| format!("with {cut:?}"))?;
    }
    let Interrupted { mut system, daemon, disk, kills, hits, .. } = interrupted;
    ensure!(hits * 3 > kills, "only {hits} of {kills} kills came while the command ran");
    drop(disk);
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([("kills".to_owned(), kills), ("while_running".to_owned(), hits)]))
}

/// Who is killed in the middle of a command.
#[derive(Clone, Copy, Debug)]
enum Victim {
    /// Nobody: to learn how long the command takes.
    None,
    Rmrctl,
    /// The coordinator.
    Daemon,
    /// The node of the new store, or of member 1.
    Node,
}

/// A pool on nodes a and b, two nodes besides, and commands that are cut short.
struct Interrupted<'a> {
    lab: &'a Lab,
    system: System,
    /// The pool, as an operator asks for it who names every node.
    asked: Pool,
    daemon: Daemon,
    disk: Option<Frontend>,
    /// How long each command takes when nobody is killed.
    usual: BTreeMap<String, Duration>,
    kills: u64,
    /// Those that came while the command ran.
    hits: u64,
}

impl Interrupted<'_> {
    /// Gives a command, kills the victim after this share of the usual time, and repeats the command until it is done.
    fn command(
        &mut self,
        (victim, percent): (Victim, u32),
        node: usize,
        command: &str,
        arguments: &[&str],
    ) -> Result<Value> {
        let begin = Instant::now();
        if !matches!(victim, Victim::None) {
            let mut child = self.begin(command, arguments, percent)?;
            self.kill(victim, node, &mut child)?;
            // It goes on with the coordinator or the node that is back, or says that it cannot.
            wait_until("rmrctl to end", LIMIT, || Ok(child.try_wait()?.is_some()))?;
        }
        let done = until_done(command, || self.asked.operate(command, arguments))
            .with_context(|| format!("{command} {arguments:?}, {victim:?} killed after {percent} %"))?;
        self.usual.entry(command.to_owned()).or_insert_with(|| begin.elapsed());
        Ok(done)
    }

    /// A command of which so much of the usual time is over.
    fn begin(&mut self, command: &str, arguments: &[&str], percent: u32) -> Result<Child> {
        let mut child = self.asked.operator(command, arguments)?;
        let mut child = child.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let usual = self.usual.get_mut(command).context("a command that was not measured")?;
        let (began, delay) = (Instant::now(), *usual * percent / 100);
        while child.try_wait()?.is_none() && began.elapsed() < delay {
            thread::sleep(Duration::from_millis(1));
        }
        let is_running = child.try_wait()?.is_none();
        if !is_running {
            // The machine was more crowded when the command was measured than it is now.
            *usual = began.elapsed();
        }
        self.kills += 1;
        self.hits += u64::from(is_running);
        Ok(child)
    }

    fn kill(&mut self, victim: Victim, node: usize, rmrctl: &mut Child) -> Result<()> {
        match victim {
            Victim::None => Ok(()),
            Victim::Rmrctl => Ok(rmrctl.kill()?),
            Victim::Node => {
                let node = &mut self.system.nodes[node];
                node.kill().and_then(|()| node.restart(self.lab))
            }
            Victim::Daemon => {
                self.daemon.kill()?;
                self.disk = None;
                self.daemon = self.system.patient_daemon(self.lab, &format!("daemon-{}", self.kills))?;
                self.disk = Some(attach(&self.daemon)?);
                Ok(())
            }
        }
    }

    /// Every change once, each cut short in this way; at the end the pool is as it was, and larger.
    fn all_changes(&mut self, cut: (Victim, u32), size_mib: u64) -> Result<()> {
        let [at_b, at_c, at_d] = [1, 2, 3].map(|node| admin(&self.system.nodes[node]));
        let added = self.command(cut, 2, "add-member", &["--member", &at_c])?["member"].to_string();
        let to_d = [&added, "--to", &at_d, "--delete-store"];
        let moved = self.command(cut, 3, "move", &to_d)?["member"].to_string();
        self.command(cut, 3, "maintenance", &[&moved, "on"])?;
        self.command(cut, 1, "grow", &["--size", &format!("{size_mib}M")])?;
        self.command(cut, 3, "maintenance", &[&moved, "off"])?;
        self.command(cut, 3, "remove-member", &[&moved, "--delete-store"])?;
        for node in [2, 3] {
            let left = store_files(&self.system.nodes[node])?;
            ensure!(left == 0, "the store of a removed member is still there");
        }
        let disk = self.disk.as_mut().context("the guest is attached")?;
        ensure!(disk.capacity()? * 512 == size_mib << 20, "the guest was not told that its disk has grown");

        self.system.pool.wait_for_level("safe", LIMIT)?;
        lose_disk(self.lab, &mut self.system.nodes[1])?;
        self.system.pool.wait_for_level("degraded", LIMIT)?;
        self.command(cut, 1, "replace", &["1", "--member", &at_b])?;
        self.system.pool.wait_for_level("safe", LIMIT)
    }
}

/// Repeats a command as an operator would until it is done.
fn until_done(what: &str, mut command: impl FnMut() -> Result<Value>) -> Result<Value> {
    let start = Instant::now();
    loop {
        match command() {
            Ok(value) => return Ok(value),
            Err(error) if start.elapsed() > LIMIT => {
                return Err(error.context(format!("{what}, again and again")));
            }
            Err(_) => thread::sleep(Duration::from_millis(200)),
        }
    }
}
