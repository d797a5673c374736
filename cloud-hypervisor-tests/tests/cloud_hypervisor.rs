//! A guest on cloud-hypervisor, where `CLOUD_HYPERVISOR` names a binary and KVM works: its disk through all that happens to guest,
//! hypervisor and daemon. What every hypervisor has to do with a disk is in `guest_disk`; how front ends like this one
//! connect again is in `restarts`, which needs no hypervisor.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::lab::{
    self, Checks, Daemon, DaemonBuilder, Disk, Hypervisor, Lab, NodeBuilder, Pool, PoolBuilder, SocketUnit,
    Vm, VmBuilder, wait_until,
};
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(60);
const LOAD_LIMIT: Duration = Duration::from_secs(200);
/// How often each daemon is ended under load.
const ENDS: usize = 10;
/// Longer than a machine that is paused needs to be paused in fact.
const PAUSE: Duration = Duration::from_secs(1);
/// Size of the pool before and after it grows.
const MIB: u64 = 64;
const GROWN_MIB: u64 = 96;

#[test]
fn a_guest_on_cloud_hypervisor_keeps_its_disk_through_all_that_happens_to_it() -> Result<()> {
    match Hypervisor::cloud_hypervisor_or_say_not_run("the life of a guest on cloud-hypervisor") {
        Some(hypervisor) => lab::run("cloud-hypervisor", |lab| life(lab, &hypervisor)),
        None => Ok(()),
    }
}

/// Writes and verifies for as long as the disk is disturbed.
fn load(seconds: u32) -> String {
    format!(
        "fio --name=load --filename=$(cat /tmp/disk) --offset=16m --size=32m --rw=randwrite --bs=4k-32k --blockalign=4k --direct=1 \
         --ioengine=libaio --iodepth=32 --verify=crc32c --verify_fatal=1 --verify_backlog=128 --time_based --runtime={seconds}"
    )
}

/// Marks the first block of the disk.
fn mark(vm: &Vm, text: &str) -> Result<()> {
    let script =
        format!("echo {text} | dd of=$(cat /tmp/disk) bs=4k count=1 conv=sync,fsync oflag=direct 2>&1");
    vm.run(&script).map(|_| ())
}

fn is_marked(vm: &Vm, text: &str) -> Result<()> {
    let found = vm.run("dd if=$(cat /tmp/disk) bs=4k count=1 iflag=direct 2>/dev/null | head -n 1")?;
    ensure!(found.trim() == text, "expected '{text}' at the start of the disk, found '{}'", found.trim());
    Ok(())
}

/// Tells the guest's scripts which disk is meant: after each boot, as nothing else lasts.
fn find_disk(vm: &Vm) -> Result<String> {
    let device = vm.device("disk")?;
    vm.run(&format!("echo {device} >/tmp/disk"))?;
    Ok(device)
}

fn no_errors(vm: &Vm) -> Result<()> {
    let errors = vm.run("dmesg | grep -i 'I/O error' || true")?;
    ensure!(errors.is_empty(), "the guest's kernel met an I/O error:\n{errors}");
    Ok(())
}

fn bytes(vm: &Vm) -> Result<u64> {
    Ok(vm.run("blockdev --getsize64 $(cat /tmp/disk)")?.trim().parse()?)
}

/// Ends the daemon, by SIGKILL and by SIGTERM in turn, and starts the next; returns when that one has the pool.
fn end_and_start(lab: &Lab, builder: &DaemonBuilder, daemon: &Daemon, round: usize) -> Result<Daemon> {
    if round.is_multiple_of(2) {
        daemon.kill()?
    } else {
        daemon.stop()?
    }
    let next = builder.start(lab)?;
    next.process()
        .wait_for_log("attached with", LIMIT)
        .with_context(|| format!("the hypervisor did not come back after end {round} of its daemon"))?;
    Ok(next)
}

fn life(lab: &Lab, hypervisor: &Hypervisor) -> Result<()> {
    let nodes = [NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").start(lab)?];
    let pool = |name: &str, mib: u64| {
        PoolBuilder::new(name).size_mib(mib).member(&nodes[0]).member(&nodes[1]).create(lab)
    };
    let (disk, hot) = (pool("disk", MIB)?, pool("hot", 32)?);
    let builder = DaemonBuilder::new(&disk).queues(2).serial("disk");
    let mut daemon = builder.start(lab)?;
    // Larger than the 256 that the daemon once offered: then the guest hangs in its first request.
    let wanted = Disk::vhost_user(daemon.socket()).queues(2).queue_size(512);
    let machine = |name: &str| VmBuilder::new(name).hypervisor(hypervisor.clone());
    let mut vm = machine("guest").disk(wanted).boot(lab)?;
    find_disk(&vm)?;
    let mut checks = Checks::new();

    checks.check("it boots, and its disk holds what it writes", || {
        ensure!(bytes(&vm)? == MIB << 20);
        mark(&vm, "booted")?;
        is_marked(&vm, "booted")?;
        vm.run_within(LOAD_LIMIT, &load(5))?;
        no_errors(&vm)
    });
    checks.check("no end of its daemon costs it the disk", || {
        let running = vm.start(&load(60))?;
        for round in 0..ENDS {
            daemon = end_and_start(lab, &builder, &daemon, round)?;
            thread::sleep(Duration::from_millis(500));
        }
        vm.wait_within(LOAD_LIMIT, running)?.success()?;
        no_errors(&vm)?;
        is_marked(&vm, "booted")
    });
    checks.check("it is paused and goes on", || {
        let running = vm.start(&load(10))?;
        for _ in 0..3 {
            vm.api().put("vm.pause", None)?;
            thread::sleep(PAUSE);
            vm.api().put("vm.resume", None)?;
            thread::sleep(PAUSE);
        }
        vm.wait_within(LOAD_LIMIT, running)?.success()?;
        no_errors(&vm)
    });
    checks.check("a reboot, for which the hypervisor connects again, finds the disk as it was", || {
        mark(&vm, "before the reboot")?;
        vm.api().put("vm.reboot", None)?;
        vm.wait_for_reboot()?;
        find_disk(&vm)?;
        is_marked(&vm, "before the reboot")?;
        daemon.process().ensure_running("the next boot")
    });
    checks.check("it sees a pool that has grown, after its next reboot at the latest", || {
        disk.operate("grow", &["--size", &format!("{GROWN_MIB}M")])?;
        thread::sleep(PAUSE);
        let seen = bytes(&vm)?;
        eprintln!("lab: before its reboot the guest sees {} MiB of {GROWN_MIB}", seen >> 20);
        vm.api().put("vm.reboot", None)?;
        vm.wait_for_reboot()?;
        find_disk(&vm)?;
        ensure!(bytes(&vm)? == GROWN_MIB << 20, "{} bytes", bytes(&vm)?);
        vm.run(&format!(
            "dd if=/dev/urandom of=$(cat /tmp/disk) bs=1M count=8 seek={} oflag=direct 2>&1",
            GROWN_MIB - 8
        ))?;
        no_errors(&vm)
    });
    checks.check("a second disk is plugged in, survives its daemon, and is pulled out", || {
        hot_plug(lab, &vm, &hot)
    });
    checks.check("it is restored from a snapshot with the disk that it had", || {
        // It goes on with what its page cache holds, so that has to be what is on the disk.
        mark(&vm, "snapshot")?;
        vm.run("echo kept >/tmp/kept; sync")?;
        let directory = lab.path("snapshot");
        std::fs::create_dir(&directory)?;
        let url = format!("file://{}", directory.display());
        vm.api().put("vm.pause", None)?;
        vm.api().put("vm.snapshot", Some(&json!({ "destination_url": url })))?;
        vm.kill()?;
        vm = machine("restored").empty_cloud_hypervisor(lab)?;
        vm.api().put("vm.restore", Some(&json!({ "source_url": url })))?;
        vm.api().put("vm.resume", None)?;
        ensure!(vm.run("cat /tmp/kept")? == "kept\n");
        is_marked(&vm, "snapshot")?;
        vm.run_within(LOAD_LIMIT, &load(5))?;
        no_errors(&vm)
    });
    checks.check(
        "it moves to another hypervisor of this host, and its disk stays with the same daemon",
        || {
            let target = machine("target").empty_cloud_hypervisor(lab)?;
            migrate(lab, &vm, &target)?;
            vm = target;
            is_marked(&vm, "snapshot")?;
            vm.run_within(LOAD_LIMIT, &load(5))?;
            no_errors(&vm)?;
            daemon = end_and_start(lab, &builder, &daemon, 0)?;
            vm.run_within(LOAD_LIMIT, &load(5))?;
            no_errors(&vm)
        },
    );
    vm.shutdown()?;
    checks.check("the daemon stops when it is told to", || daemon.stop());
    for pool in [&disk, &hot] {
        checks.check(&format!("all stores of '{}' are identical", pool.name()), || {
            pool.assert_identical_within(LIMIT)
        });
    }
    checks.finish()
}

/// Plugs a disk in whose socket is held as systemd holds it, so that no end of its daemon is even seen as a refused connection.
fn hot_plug(lab: &Lab, vm: &Vm, pool: &Pool) -> Result<()> {
    let unit = SocketUnit::listen(lab, "hot")?;
    let builder = DaemonBuilder::new(pool).serial("hot").socket_unit(&unit);
    let mut daemon = builder.start(lab)?;
    let disk = json!({
        "id": "hot", "vhost_user": true, "vhost_socket": unit.path(), "num_queues": 1, "queue_size": 128,
    });
    vm.api().put("vm.add-disk", Some(&disk))?;
    wait_until("the guest to see the disk", LIMIT, || Ok(vm.device("hot").is_ok()))?;
    let device = vm.device("hot")?;
    let running = vm.start(&format!(
        "fio --name=hot --filename={device} --rw=randwrite --bs=4k --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c \
         --verify_fatal=1 --verify_backlog=128 --time_based --runtime=40"
    ))?;
    for round in 0..ENDS {
        daemon = end_and_start(lab, &builder, &daemon, round)?;
        thread::sleep(Duration::from_millis(200));
    }
    vm.wait_within(LOAD_LIMIT, running)?.success()?;
    vm.api().put("vm.remove-device", Some(&json!({ "id": "hot" })))?;
    wait_until("the disk to be gone from the guest", LIMIT, || Ok(vm.device("hot").is_err()))?;
    no_errors(vm)?;
    daemon.stop()
}

/// Sends a machine to another hypervisor of this host, which connects to the same sockets.
fn migrate(lab: &Lab, source: &Vm, target: &Vm) -> Result<()> {
    let socket = lab.path("migration");
    let url = format!("unix:{}", socket.display());
    let receiver = target.api();
    thread::scope(|scope| {
        let request = json!({ "receiver_url": url });
        let received = scope.spawn(move || receiver.put("vm.receive-migration", Some(&request)));
        target.process().wait_for_socket(&socket, LIMIT)?;
        source.api().put("vm.send-migration", Some(&json!({ "destination_url": url, "local": true })))?;
        received.join().map_err(|_| anyhow::anyhow!("the receiver panicked"))??;
        anyhow::Ok(())
    })?;
    // A request may be answered before the machine has arrived, by versions that do the work behind it.
    wait_until("the machine to arrive", LIMIT, || {
        Ok(target.api().get("vm.info").is_ok_and(|info| info["state"] == "Running"))
    })?;
    source.process().wait_exit(LIMIT).map(|_| ())
}
