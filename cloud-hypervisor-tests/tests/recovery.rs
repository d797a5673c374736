//! Nodes, the daemon, and all of them at once are killed again and again under a writer that remembers what it was
//! promised, and under a guest that verifies what it wrote.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::bench::disk::{Disk, DiskOptions};
use cloud_hypervisor_tests::bench::load::{self, LoadSpec, Pattern, Surroundings};
use cloud_hypervisor_tests::bench::processes::{Role, Watched};
use cloud_hypervisor_tests::bench::verify::{Promises, Unwritten};
use cloud_hypervisor_tests::lab::{
    self, Daemon, DaemonBuilder, Disk as VmDisk, Lab, Node, NodeBuilder, Pool, PoolBuilder, VmBuilder,
};

const MIB: u64 = 64;
/// How long a member may take to be missed, or to be Clean again.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn nodes_killed_one_after_the_other_under_load_come_back_and_no_promise_is_broken() -> Result<()> {
    lab::run("killed nodes", |lab| {
        let mut nodes = start_nodes(lab)?;
        let pool = create(lab, &nodes)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let mut promises = Promises::new(MIB << 20, 4096, 7, Unwritten::Zeroes);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let load = scope.spawn(|| run_load(&daemon, &mut promises, &stop, 600));
            let outcome = (0..5).try_for_each(|round| {
                let node = &mut nodes[round % 3];
                thread::sleep(Duration::from_millis(300));
                node.kill()?;
                pool.wait_for_level("degraded", LIMIT)?;
                thread::sleep(Duration::from_millis(500));
                node.restart(lab)?;
                pool.wait_for_level("safe", LIMIT).with_context(|| format!("round {round}"))
            });
            stop.store(true, Ordering::Relaxed);
            let loaded = load.join().map_err(|_| anyhow::anyhow!("the load panicked"))?;
            outcome.and(loaded)
        })?;
        check_everything(&pool, &daemon, &mut promises)?;
        daemon.stop()
    })
}

#[test]
fn a_daemon_killed_under_load_again_and_again_leaves_copies_that_agree() -> Result<()> {
    lab::run("killed daemon", |lab| {
        let nodes = start_nodes(lab)?;
        let pool = create(lab, &nodes)?;
        let mut promises = Promises::new(MIB << 20, 4096, 8, Unwritten::Zeroes);
        for round in 0..5 {
            let daemon = DaemonBuilder::new(&pool).name(&format!("daemon-{round}")).start(lab)?;
            kill_daemon_under_load(&daemon, &mut promises)?;
        }
        let daemon = DaemonBuilder::new(&pool).name("last").start(lab)?;
        check_everything(&pool, &daemon, &mut promises)?;
        daemon.stop()
    })
}

#[test]
fn everything_killed_at_once_comes_back_with_all_that_was_promised() -> Result<()> {
    lab::run("killed everything", |lab| {
        let mut nodes = start_nodes(lab)?;
        let pool = create(lab, &nodes)?;
        let mut promises = Promises::new(MIB << 20, 4096, 9, Unwritten::Zeroes);
        for round in 0..3 {
            let daemon = DaemonBuilder::new(&pool).name(&format!("daemon-{round}")).start(lab)?;
            let stop = AtomicBool::new(false);
            thread::scope(|scope| {
                // Its requests are never answered once all is gone; what they may have done is remembered.
                let load = scope.spawn(|| run_load(&daemon, &mut promises, &stop, 600));
                thread::sleep(Duration::from_millis(700));
                let killed = nodes.iter().try_for_each(Node::kill).and_then(|()| daemon.kill());
                stop.store(true, Ordering::Relaxed);
                drop(load.join());
                killed
            })?;
            nodes.iter_mut().try_for_each(|node| node.restart(lab))?;
        }
        let daemon = DaemonBuilder::new(&pool).name("last").start(lab)?;
        check_everything(&pool, &daemon, &mut promises)?;
        daemon.stop()
    })
}

#[test]
fn a_guest_whose_nodes_and_daemon_are_killed_again_and_again_verifies_what_it_wrote() -> Result<()> {
    /// What fio does meanwhile; emulated, it is slow enough as it is.
    const FIO: &str = "fio --name=verified --filename=/dev/vda --size=24m --rw=randwrite --bs=8k --direct=1 \
                       --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_backlog=128 \
                       --time_based --runtime=40";
    const FIO_LIMIT: Duration = Duration::from_secs(150);
    lab::run("killed under a guest", |lab| {
        let mut nodes = start_nodes(lab)?;
        let pool = create(lab, &nodes)?;
        let builder = DaemonBuilder::new(&pool);
        let mut daemon = builder.start(lab)?;
        let vm = VmBuilder::new("guest").disk(VmDisk::vhost_user(daemon.socket()).reconnect()).boot(lab)?;
        let load = vm.start(FIO)?;
        let mut rounds = 0;
        let begin = Instant::now();
        let ended = loop {
            if let Some(ended) = load.poll() {
                break ended;
            }
            ensure!(begin.elapsed() < FIO_LIMIT, "fio still runs after {FIO_LIMIT:?} and {rounds} rounds");
            let node = &mut nodes[rounds % 3];
            node.kill()?;
            pool.wait_for_level("degraded", LIMIT)?;
            thread::sleep(Duration::from_millis(400));
            node.restart(lab)?;
            if rounds % 2 == 1 {
                // The member is still away, or in the middle of its return.
                daemon = kill_and_start(lab, &builder, &daemon)?;
            }
            pool.wait_for_level("safe", LIMIT).with_context(|| format!("round {rounds}"))?;
            daemon = kill_and_start(lab, &builder, &daemon)?;
            pool.wait_for_level("safe", LIMIT).with_context(|| format!("daemon of round {rounds}"))?;
            rounds += 1;
        };
        ended.success().context("fio in the guest")?;
        ensure!(rounds >= 3, "only {rounds} rounds of kills in the time of the load");
        eprintln!("  {rounds} rounds: a node and the daemon killed in each");
        let log = vm.run("dmesg")?;
        ensure!(!log.contains("I/O error"), "the guest's kernel met an I/O error:\n{log}");
        vm.shutdown()?;
        daemon.stop()?;
        pool.assert_identical_within(LIMIT)
    })
}

/// Kills a daemon and starts the next one; returns when the guest's hypervisor has found it, and it has the pool.
fn kill_and_start(lab: &Lab, builder: &DaemonBuilder, daemon: &Daemon) -> Result<Daemon> {
    daemon.kill()?;
    let next = builder.start(lab)?;
    next.process().wait_for_log("attached with", LIMIT)?;
    Ok(next)
}

fn start_nodes(lab: &Lab) -> Result<Vec<Node>> {
    ["a", "b", "c"].into_iter().map(|name| NodeBuilder::new(name).start(lab)).collect()
}

fn create(lab: &Lab, nodes: &[Node]) -> Result<Pool> {
    let builder = PoolBuilder::new("disk").size_mib(MIB);
    nodes.iter().fold(builder, |pool, node| pool.member(node)).create(lab)
}

fn run_load(daemon: &Daemon, promises: &mut Promises, stop: &AtomicBool, seconds: u64) -> Result<()> {
    let spec = LoadSpec {
        name: "recovery".into(),
        pattern: Pattern::RandRw,
        read_percent: 30,
        depth: 16,
        rate: Some(3000),
        runtime_ms: seconds * 1000,
        ..LoadSpec::default()
    };
    // A daemon that ends also ends the load, at once.
    let watched = [Watched { role: Role::Client, pid: daemon.process().pid() }];
    let around = Surroundings { stop: Some(stop), promises: Some(promises), watched: &watched };
    let report = load::run(daemon.socket(), &spec, around)?;
    ensure!(
        report.is_good(),
        "{} errors, {} broken promises: {:?}",
        report.errors,
        report.violations,
        report.first_violations
    );
    Ok(())
}

fn kill_daemon_under_load(daemon: &Daemon, promises: &mut Promises) -> Result<()> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let load = scope.spawn(|| run_load(daemon, promises, &stop, 600));
        thread::sleep(Duration::from_millis(600));
        let killed = daemon.kill();
        stop.store(true, Ordering::Relaxed);
        // It ends with an error: its disk is gone.
        drop(load.join());
        killed
    })
}

/// A guest on the disk sees what was promised, every member becomes Clean, and all copies are the same.
fn check_everything(pool: &Pool, daemon: &Daemon, promises: &mut Promises) -> Result<()> {
    let options = DiskOptions { daemons: vec![daemon.process().pid()], ..DiskOptions::new(daemon.socket()) };
    let mut disk = Disk::attach(options)?;
    let check = promises.check_disk(&mut disk, 3)?;
    ensure!(check.is_good() && check.blocks > 0, "the disk does not hold what was promised: {check:?}");
    pool.wait_for_level("safe", LIMIT)?;
    drop(disk);
    pool.assert_identical_within(LIMIT)
}
