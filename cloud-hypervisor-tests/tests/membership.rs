//! Pools that change while they are in use, by `rmrctl` as an operator would: copies come and go, disks are replaced, hosts are
//! taken down by plan, the pool grows; with processes killed in the middle, and every command given twice.

use std::collections::BTreeMap;
use std::fs;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::bench::verify::{Promises, Unwritten};
use cloud_hypervisor_tests::lab::{
    self, Daemon, DaemonBuilder, Disk, FrontendBuilder, Lab, Node, NodeBuilder, Pool, PoolBuilder, Status,
    VmBuilder, wait_until,
};
use cloud_hypervisor_tests::scenario::{Counters, Writer, check_everything};
use serde_json::Value;

const MIB: u64 = 64;
const WRITER: Writer = Writer { depth: 8, rate: 2000, span: Some(MIB << 20) };
/// How long a member may take to be missed, or to be Clean again.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn copies_are_added_moved_and_removed_under_a_writer_that_remembers() -> Result<()> {
    lab::run("copies come and go", |lab| {
        let nodes = start_nodes(lab, &["a", "b", "c", "d"])?;
        let [a, b, c, d] = &nodes[..] else { bail!("four nodes") };
        let start = create(lab, &nodes[..2])?;
        let daemon = DaemonBuilder::new(&start).start(lab)?;
        let mut promises = new_promises(31);
        let end = under_load(&start, &daemon, &mut promises, || {
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
        check_everything(&end, &daemon, &mut promises)?;
        daemon.stop()
    })
}

#[test]
fn a_replaced_disk_is_filled_and_planned_maintenance_costs_what_was_missed() -> Result<()> {
    lab::run("replace and maintenance", |lab| {
        let mut nodes = start_nodes(lab, &["a", "b", "c"])?;
        let pool = create(lab, &nodes)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let mut promises = new_promises(32);
        under_load(&pool, &daemon, &mut promises, || {
            let b = &mut nodes[1];
            b.kill()?;
            for entry in fs::read_dir(b.store_dir())? {
                fs::remove_file(entry?.path())?;
            }
            b.restart(lab)?;
            pool.wait_for_level("degraded", LIMIT)?;
            let at = admin(b);
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
        const MISSED: u64 = 300;
        for block in 0..MISSED {
            ensure!(disk.write(0, block * 5 * 8, &pattern(block))? == Status::Ok);
        }
        nodes[2].restart(lab)?;
        thread::sleep(Duration::from_millis(1500));
        ensure!(pool.level()? == "degraded", "a member in maintenance came back by itself");
        let missed = pool.status()?.pointer("/assessment/members/2/missed_bytes").and_then(Value::as_u64);
        ensure!(
            missed == Some(MISSED * 4096),
            "{missed:?} bytes are to be moved where {MISSED} blocks were missed"
        );
        pool.operate("maintenance", &["2", "off", "--wait"])?;
        let written = Counters::of(&nodes[2])?.get("rmr_store_resync_written_blocks_total")?;
        ensure!(written == MISSED, "{written} blocks were written where {MISSED} were missed");
        pool.operate("maintenance", &["2", "off"])?;
        ensure!(disk.flush(0)? == Status::Ok);
        drop(disk);
        daemon.stop()?;
        pool.assert_identical()
    })
}

#[test]
fn a_pool_grows_with_a_guest_and_without_one_and_while_a_copy_is_down() -> Result<()> {
    lab::run("growth", |lab| {
        let mut nodes = start_nodes(lab, &["a", "b", "c"])?;
        let pool = create(lab, &nodes)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let mut disk = attach(&daemon)?;
        ensure!(disk.write(0, 0, &[1; 4096])? == Status::Ok);
        ensure!(disk.write(0, (MIB << 20) / 512, &[1; 4096])? == Status::IoError, "beyond the end");
        for _ in 0..2 {
            pool.operate("grow", &["--size", "96M"])?;
            ensure!(disk.capacity()? * 512 == 96 << 20, "the device has another size than the pool");
            last_block(&mut disk, 96, 7)?;
        }
        let refused = pool.operate("grow", &["--size", "80M"]).unwrap_err().to_string();
        ensure!(refused.contains("smaller"), "{refused}");
        let refused = pool.operate("grow", &["--size", "900T"]).unwrap_err().to_string();
        ensure!(refused.contains("can hold a pool of at most"), "{refused}");

        // One copy is away meanwhile, and takes part in the larger pool when it is back.
        nodes[1].kill()?;
        pool.wait_for_level("degraded", LIMIT)?;
        pool.operate("grow", &["--size", "128M"])?;
        last_block(&mut disk, 128, 8)?;
        nodes[1].restart(lab)?;
        pool.wait_for_level("safe", LIMIT)?;
        ensure!(disk.flush(0)? == Status::Ok);
        drop(disk);
        daemon.stop()?;
        pool.assert_identical()?;

        // No client is attached: rmrctl is the coordinator for a moment.
        for _ in 0..2 {
            pool.operate("grow", &["--size", "160M"])?;
        }
        let daemon = DaemonBuilder::new(&pool).name("later").start(lab)?;
        let mut disk = attach(&daemon)?;
        ensure!(disk.capacity()? * 512 == 160 << 20);
        last_block(&mut disk, 160, 9)?;
        ensure!(disk.read(0, (128 << 20) / 512 - 8, 4096)? == (Status::Ok, vec![8; 4096]));
        ensure!(
            disk.read(0, (128 << 20) / 512, 4096)? == (Status::Ok, vec![0; 4096]),
            "new space is not zero"
        );
        ensure!(disk.flush(0)? == Status::Ok);
        drop(disk);
        daemon.stop()?;
        pool.assert_identical()
    })
}

#[test]
fn without_a_guest_rmrctl_changes_the_pool_brings_copies_up_to_date_and_goes() -> Result<()> {
    lab::run("no guest", |lab| {
        let mut nodes = start_nodes(lab, &["a", "b", "c"])?;
        let pool = create(lab, &nodes[..2])?;
        fill(lab, &pool, "first")?;
        let at_c = admin(&nodes[2]);
        let added = pool.operate("add-member", &["--member", &at_c])?;
        ensure!(added["changed"] == true, "{added}");
        let pool = pool.with(&nodes[2]);
        ensure!(pool.level()? == "degraded", "nobody brings a copy up to date while no client is attached");
        pool.operate("resync", &[])?;
        ensure!(pool.level()? == "safe");
        pool.assert_identical()?;

        pool.operate("maintenance", &["0", "on"])?;
        nodes[0].stop()?;
        fill(lab, &pool, "second")?;
        nodes[0].restart(lab)?;
        pool.operate("maintenance", &["0", "off", "--wait"])?;
        pool.assert_identical()?;
        pool.operate("remove-member", &["1", "--delete-store"])?;
        let pool = pool.without(&nodes[1]);
        ensure!(pool.level()? == "safe");

        // While rmrctl waits for a copy that is away, a guest starts: it gets its disk, and does the rest.
        pool.operate("maintenance", &["2", "on"])?;
        nodes[2].stop()?;
        pool.operate("maintenance", &["2", "off"])?;
        let mut resync = spawn(pool.operator("resync", &["--wait-timeout", "60"])?)?;
        wait_until("rmrctl to hold the pool", LIMIT, || {
            let client = pool.status()?.pointer("/assessment/client/text").cloned().unwrap_or_default();
            Ok(client.as_str().is_some_and(|text| text.starts_with("rmrctl")))
        })?;
        let daemon = DaemonBuilder::new(&pool).name("guest").start(lab)?;
        let mut disk = attach(&daemon)?;
        ensure!(
            disk.write(0, 0, &[5; 4096])? == Status::Ok,
            "the guest has no disk while rmrctl holds the pool"
        );
        nodes[2].restart(lab)?;
        ensure!(resync.wait()?.success(), "rmrctl gave up when a guest came");
        drop(disk);
        daemon.stop()?;
        pool.assert_identical()?;

        // The newer copy is lost for good.
        pool.operate("maintenance", &["0", "on"])?;
        fill(lab, &pool, "third")?;
        nodes[2].kill()?;
        let refused = pool.operate("force-from", &["0"]).unwrap_err().to_string();
        ensure!(refused.contains("nothing was done") && refused.contains("--yes-lose"), "{refused}");
        let given_up = "--yes-lose-what-others-have";
        let refused = pool.operate("force-from", &["0", given_up]).unwrap_err().to_string();
        ensure!(
            refused.contains("nothing was done") && refused.contains("--unreachable-are-gone"),
            "{refused}"
        );
        let forced = pool.operate("force-from", &["0", given_up, "--unreachable-are-gone"])?;
        ensure!(forced["view"]["members"][0]["state"] == "clean", "{forced}");
        nodes[2].restart(lab)?;
        pool.operate("maintenance", &["0", "off"])?;
        pool.operate("resync", &[])?;
        pool.assert_identical()?;
        let daemon = DaemonBuilder::new(&pool).name("last").start(lab)?;
        drop(attach(&daemon)?);
        daemon.stop()
    })
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
    nodes: Vec<Node>,
    pool: Pool,
    /// The pool, as an operator asks for it who names every node.
    asked: Pool,
    daemon: Daemon,
    disk: Option<lab::Frontend>,
    /// How long each command takes when nobody is killed.
    usual: BTreeMap<String, Duration>,
    kills: u32,
    /// Those that came while the command ran.
    hits: u32,
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
            let mut child = spawn(self.asked.operator(command, arguments)?)?;
            let usual = *self.usual.get(command).context("a command that was not measured")?;
            while child.try_wait()?.is_none() && begin.elapsed() < usual * percent / 100 {
                thread::sleep(Duration::from_millis(1));
            }
            self.kills += 1;
            if child.try_wait()?.is_none() {
                self.hits += 1;
            } else {
                // The machine was more crowded when the command was measured than it is now.
                self.usual.insert(command.to_owned(), begin.elapsed());
            }
            match victim {
                Victim::None => {}
                Victim::Rmrctl => child.kill()?,
                Victim::Node => self.nodes[node].kill()?,
                Victim::Daemon => {
                    self.daemon.kill()?;
                    self.disk = None;
                }
            }
            match victim {
                Victim::None | Victim::Rmrctl => {}
                Victim::Node => self.nodes[node].restart(self.lab)?,
                Victim::Daemon => {
                    let name = format!("daemon-{}", self.kills);
                    self.daemon = DaemonBuilder::new(&self.pool).name(&name).start(self.lab)?;
                    self.disk = Some(attach(&self.daemon)?);
                }
            }
            // It goes on with the coordinator or the node that is back, or says that it cannot.
            wait_until("rmrctl to end", LIMIT, || Ok(child.try_wait()?.is_some()))?;
        }
        let done = until_done(command, || self.asked.operate(command, arguments))
            .with_context(|| format!("{command} {arguments:?}, {victim:?} killed after {percent} %"))?;
        self.usual.entry(command.to_owned()).or_insert_with(|| begin.elapsed());
        Ok(done)
    }

    /// Every change once, each cut short in this way; at the end the pool is as it was, and larger.
    fn all_changes(&mut self, cut: (Victim, u32), size_mib: u64) -> Result<()> {
        let [at_b, at_c, at_d] = [1, 2, 3].map(|node| admin(&self.nodes[node]));
        let added = self.command(cut, 2, "add-member", &["--member", &at_c])?["member"].to_string();
        let to_d = [&added, "--to", &at_d, "--delete-store"];
        let moved = self.command(cut, 3, "move", &to_d)?["member"].to_string();
        self.command(cut, 3, "maintenance", &[&moved, "on"])?;
        self.command(cut, 1, "grow", &["--size", &format!("{size_mib}M")])?;
        self.command(cut, 3, "maintenance", &[&moved, "off"])?;
        self.command(cut, 3, "remove-member", &[&moved, "--delete-store"])?;
        for node in [2, 3] {
            ensure!(store_files(&self.nodes[node])? == 0, "the store of a removed member is still there");
        }
        let disk = self.disk.as_mut().context("the guest is attached")?;
        ensure!(disk.capacity()? * 512 == size_mib << 20, "the guest was not told that its disk has grown");

        self.pool.wait_for_level("safe", LIMIT)?;
        let b = &mut self.nodes[1];
        b.kill()?;
        for entry in fs::read_dir(b.store_dir())? {
            fs::remove_file(entry?.path())?;
        }
        b.restart(self.lab)?;
        self.pool.wait_for_level("degraded", LIMIT)?;
        self.command(cut, 1, "replace", &["1", "--member", &at_b])?;
        self.pool.wait_for_level("safe", LIMIT)
    }
}

#[test]
fn every_change_is_finished_by_repeating_it_whoever_was_killed_in_its_middle() -> Result<()> {
    lab::run("killed commands", |lab| {
        let nodes = start_nodes(lab, &["a", "b", "c", "d"])?;
        let pool = create(lab, &nodes[..2])?;
        let mut promises = new_promises(33);
        let daemon = DaemonBuilder::new(&pool).name("daemon").start(lab)?;
        under_load(&pool, &daemon, &mut promises, || {
            thread::sleep(Duration::from_millis(200));
            Ok(())
        })?;
        let disk = Some(attach(&daemon)?);
        let (asked, usual) = (pool.clone().with(&nodes[2]).with(&nodes[3]), BTreeMap::new());
        let mut system = Interrupted { lab, nodes, pool, asked, daemon, disk, usual, kills: 0, hits: 0 };
        system.all_changes((Victim::None, 0), MIB)?;
        let cuts = [(Victim::Rmrctl, 30), (Victim::Daemon, 50), (Victim::Node, 60), (Victim::Rmrctl, 80)];
        for (size_mib, cut) in (MIB + 4..).step_by(4).zip(cuts) {
            system.all_changes(cut, size_mib).with_context(|| format!("with {cut:?}"))?;
        }
        let Interrupted { pool, daemon, disk, kills, hits, .. } = system;
        eprintln!("{hits} of {kills} kills came while the command ran");
        ensure!(hits * 3 > kills, "only {hits} of {kills} kills came while the command ran");
        drop(disk);
        check_everything(&pool, &daemon, &mut promises)?;
        daemon.stop()
    })
}

#[test]
fn a_linux_guest_sees_a_grown_disk_at_once() -> Result<()> {
    lab::run("grown guest", |lab| {
        let nodes = start_nodes(lab, &["a", "b"])?;
        let pool = create(lab, &nodes)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let vm = VmBuilder::new("guest").disk(Disk::vhost_user(daemon.socket())).boot(lab)?;
        ensure!(sectors(&vm.run("cat /sys/block/vda/size")?)? == (MIB << 20) / 512);
        pool.operate("grow", &["--size", "80M"])?;
        wait_until("the guest to see the new size", LIMIT, || {
            Ok(sectors(&vm.run("cat /sys/block/vda/size")?)? == (80 << 20) / 512)
        })?;
        vm.run("echo end | dd of=/dev/vda bs=4k seek=20479 conv=sync oflag=direct && sync")?;
        vm.shutdown()?;
        daemon.stop()?;
        pool.assert_identical()?;
        for area in pool.areas()? {
            ensure!(area.read((80 << 20) - 4096, 3)? == b"end", "the last block is not at the end");
        }
        Ok(())
    })
}

fn start_nodes(lab: &Lab, names: &[&str]) -> Result<Vec<Node>> {
    names.iter().map(|name| NodeBuilder::new(name).start(lab)).collect()
}

fn create(lab: &Lab, nodes: &[Node]) -> Result<Pool> {
    let builder = PoolBuilder::new("disk").size_mib(MIB);
    nodes.iter().fold(builder, PoolBuilder::member).create(lab)
}

fn admin(node: &Node) -> String {
    node.admin_address().to_string()
}

fn attach(daemon: &Daemon) -> Result<lab::Frontend> {
    FrontendBuilder::new(daemon.socket()).connect()
}

fn new_promises(salt: u64) -> Promises {
    Promises::new(MIB << 20, 4096, salt, Unwritten::Zeroes)
}

/// Does `work` while a writer is busy that remembers what it was promised, and sees no error.
fn under_load<T>(
    pool: &Pool,
    daemon: &Daemon,
    promises: &mut Promises,
    work: impl FnOnce() -> Result<T>,
) -> Result<T> {
    WRITER.during(pool, daemon, promises, work).map(|(outcome, _)| outcome)
}

/// Writes through a daemon of its own, which leaves again.
fn fill(lab: &Lab, pool: &Pool, name: &str) -> Result<()> {
    let daemon = DaemonBuilder::new(pool).name(name).start(lab)?;
    let mut disk = attach(&daemon)?;
    let seed = u64::from(name.as_bytes()[0]);
    for block in 0..200 {
        ensure!(disk.write(0, (block * 11 + seed) * 8, &pattern(block ^ seed))? == Status::Ok);
    }
    ensure!(disk.flush(0)? == Status::Ok);
    drop(disk);
    daemon.stop()
}

fn pattern(seed: u64) -> [u8; 4096] {
    std::array::from_fn(|at| (seed.wrapping_mul(31) ^ at as u64).to_le_bytes()[0] | 1)
}

/// Writes and reads the last block of a disk of so many MiB.
fn last_block(disk: &mut lab::Frontend, mib: u64, byte: u8) -> Result<()> {
    let sector = (mib << 20) / 512 - 8;
    let written = disk.write(0, sector, &[byte; 4096])?;
    ensure!(written == Status::Ok, "the last block of {mib} MiB cannot be written: {written:?}");
    ensure!(disk.read(0, sector, 4096)? == (Status::Ok, vec![byte; 4096]));
    Ok(())
}

fn store_files(node: &Node) -> Result<usize> {
    Ok(fs::read_dir(node.store_dir())?.count())
}

fn sectors(text: &str) -> Result<u64> {
    text.trim().parse().with_context(|| format!("'{text}' is no number of sectors"))
}

fn spawn(mut command: Command) -> Result<std::process::Child> {
    Ok(command.stdout(Stdio::null()).stderr(Stdio::null()).spawn()?)
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
