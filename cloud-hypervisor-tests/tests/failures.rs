//! Processes that die at the worst moment: a guest in mid-request, a node under load. And who may hold a pool.

use std::thread;
use std::time::Duration;

use anyhow::{Result, bail, ensure};
use cloud_hypervisor_tests::lab::{
    self, Checks, Daemon, DaemonBuilder, Disk, FrontendBuilder, Lab, NodeBuilder, PoolBuilder, Status, Vm,
    VmBuilder,
};
use cloud_hypervisor_tests::scenario;

const FIO_LIMIT: Duration = Duration::from_secs(180);
/// How long a lost leg may take to show in the status.
const NOTICE_LIMIT: Duration = Duration::from_secs(30);

#[test]
fn a_guest_killed_in_mid_request_costs_nothing_and_a_node_killed_under_load_is_no_error() -> Result<()> {
    lab::run("kills", |lab| {
        let mut nodes = Vec::new();
        for name in ["a", "b", "c"] {
            nodes.push(NodeBuilder::new(name).start(lab)?);
        }
        let pool = nodes
            .iter()
            .fold(PoolBuilder::new("disk").size_mib(96), |pool, node| pool.member(node))
            .create(lab)?;
        let daemon = DaemonBuilder::new(&pool).queues(2).serial("disk").start(lab)?;
        let mut checks = Checks::new();

        let first = boot(lab, "first", &daemon)?;
        first.run(
            "mkfs.ext4 -q /dev/vda 60m && mount -t ext4 /dev/vda /mnt && echo kept >/mnt/kept && sync",
        )?;
        let load = first.start(
            "fio --name=load --filename=/mnt/load --rw=randwrite --bs=4k-128k --size=32m --direct=1 --ioengine=libaio \
             --iodepth=64 --time_based --runtime=120",
        )?;
        wait_for_load(&first, "vda")?;
        ensure!(load.poll().is_none(), "the load ended before the guest was killed");
        first.kill()?;
        drop(first);
        checks.check("the daemon outlives its guest", || {
            ensure!(daemon.process().is_running()?, "the daemon ended with its guest");
            Ok(())
        });
        checks.check("all stores are identical after the guest was killed in mid-request", || {
            pool.assert_identical_within(NOTICE_LIMIT)
        });

        let second = boot(lab, "second", &daemon)?;
        checks.check("the next guest finds a consistent file system with what was synced", || {
            // The mount replays the journal; what e2fsck says afterwards is final.
            second.run("mount -t ext4 /dev/vda /mnt && grep -qx kept /mnt/kept && umount /mnt && e2fsck -fn /dev/vda")?;
            Ok(())
        });

        // Behind the file system's end.
        let load = second.start(
            "fio --name=verified --filename=/dev/vda --offset=64m --size=16m --rw=randwrite --bs=4k --direct=1 \
             --ioengine=libaio --iodepth=32 --verify=crc32c --verify_fatal=1 --verify_backlog=512 --loops=4",
        )?;
        wait_for_load(&second, "vda")?;
        nodes[2].kill()?;
        checks.check("fio goes on without an error when a node is killed under it", || {
            ensure!(load.poll().is_none(), "the load ended before the node was killed");
            second.wait_within(FIO_LIMIT, load)?.success()?;
            let log = second.run("dmesg")?;
            ensure!(!log.contains("I/O error"), "the guest's kernel met an I/O error:\n{log}");
            Ok(())
        });
        checks.check("the status of the pool is degraded", || pool.wait_for_level("degraded", NOTICE_LIMIT));
        checks.check("the guest writes and reads on the legs that are left", || {
            second.run(
                "mount -t ext4 /dev/vda /mnt && echo later >/mnt/later && umount /mnt && e2fsck -fn /dev/vda",
            )?;
            Ok(())
        });
        nodes[2].restart(lab)?;
        checks.check("the node comes back, and its member is Clean again by itself", || {
            pool.wait_for_level("safe", FIO_LIMIT)
        });
        second.shutdown()?;
        daemon.stop()?;
        checks.check("all stores are identical after the resync", || {
            pool.assert_identical_within(NOTICE_LIMIT)
        });
        checks.finish()
    })
}

#[test]
fn a_node_stopped_in_order_misses_nothing_that_it_had_answered_and_status_says_why_it_is_away() -> Result<()>
{
    lab::run("stopped", |lab| {
        let mut nodes = Vec::new();
        for name in ["a", "b"] {
            // Stores with a cache below them, which is what has to be flushed.
            nodes.push(NodeBuilder::new(name).on_disk().start(lab)?);
        }
        let pool = nodes
            .iter()
            .fold(PoolBuilder::new("disk").size_mib(16), |pool, node| pool.member(node))
            .create(lab)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
        for megabyte in 0..8 {
            ensure!(disk.write(0, megabyte * 2048, &[7; 65536])? == Status::Ok, "write {megabyte}");
        }
        nodes[1].stop()?;
        pool.wait_for_level("degraded", NOTICE_LIMIT)?;
        let away = |status: &serde_json::Value| status["assessment"]["members"][1].clone();
        lab::wait_until("the client to say why member 1 is away", NOTICE_LIMIT, || {
            Ok(away(&pool.status()?)["condition"]["cause"] == "node_stopped")
        })?;
        let found = away(&pool.status()?);
        ensure!(found["missed_bytes"] == 0, "expected that nothing is missed, found {found}");
        nodes[1].restart(lab)?;
        pool.wait_for_level("safe", NOTICE_LIMIT)?;
        drop(disk);
        daemon.stop()?;
        pool.assert_identical_within(NOTICE_LIMIT)
    })
}

#[test]
fn a_second_daemon_for_a_pool_is_refused_and_told_who_holds_it() -> Result<()> {
    scenario::test("second-daemon")
}

#[test]
fn a_front_end_that_vanishes_with_a_full_queue_twenty_times_costs_nothing() -> Result<()> {
    scenario::test("vanishing-front-end")
}

fn boot(lab: &Lab, name: &str, daemon: &Daemon) -> Result<Vm> {
    VmBuilder::new(name).disk(Disk::vhost_user(daemon.socket()).queues(2)).boot(lab)
}

/// Waits until the guest's disk has taken a few hundred writes and has some in flight.
fn wait_for_load(vm: &Vm, disk: &str) -> Result<()> {
    // Fields of /sys/block/*/stat: the fifth is writes completed, the ninth is requests in flight.
    let script = format!("cat /sys/block/{disk}/stat");
    let writes = |vm: &Vm| -> Result<(u64, u64)> {
        let text = vm.run(&script)?;
        let fields: Vec<u64> = text.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        match fields[..] {
            [_, _, _, _, completed, _, _, _, in_flight, ..] => Ok((completed, in_flight)),
            _ => bail!("expected nine fields and more in {text}"),
        }
    };
    let (before, _) = writes(vm)?;
    for _ in 0..300 {
        let (completed, in_flight) = writes(vm)?;
        if completed > before + 300 && in_flight > 0 {
            return Ok(());
        }
        thread::sleep(Duration::from_millis(100));
    }
    bail!("the guest's load did not start within 300 looks");
}
