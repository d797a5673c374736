//! Live migration: a guest goes from one QEMU to another under load, and its disk goes with it from one daemon to the next. The
//! handover by itself is a scenario.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::lab::{
    self, Checks, Daemon, DaemonBuilder, Disk, NodeBuilder, Pool, PoolBuilder, Vm, VmBuilder, wait_until,
};
use cloud_hypervisor_tests::scenario;
use serde_json::{Value, json};

/// Longest migration; on an idle machine it takes ten seconds.
const MIGRATION_LIMIT: Duration = Duration::from_secs(120);
const END_LIMIT: Duration = Duration::from_secs(60);
/// Exit code of a daemon whose pool was taken over.
const DISPLACED: i32 = 3;
/// Memory that is not sent yet when a migration has gone far enough to look at it.
const REST: u64 = 16 << 20;
/// The guest reads this much of its disk into its page cache while it is migrated; what fio writes is behind it.
const READ_MIB: u32 = 24;

fn disk_of(daemon: &Daemon) -> Disk {
    Disk::vhost_user(daemon.socket()).queues(2).queue_size(256)
}

fn builder(name: &str, daemon: &Daemon) -> VmBuilder {
    VmBuilder::new(name).cpus(2).memory_mib(448).disk(disk_of(daemon))
}

fn migration_status(vm: &Vm) -> Result<Value> {
    vm.qmp()?.execute("query-migrate", &json!({}))
}

fn set_pace(vm: &Vm, bytes_per_second: u64, downtime_ms: u32) -> Result<()> {
    let parameters = json!({ "max-bandwidth": bytes_per_second, "downtime-limit": downtime_ms });
    vm.qmp()?.execute("migrate-set-parameters", &parameters).map(|_| ())
}

/// Begins to send the machine to `socket`, and waits until most of its memory was sent; the rest takes its time, so that what is
/// written to memory now is written behind the back of the migration, unless it is logged.
fn begin(vm: &Vm, socket: &Path) -> Result<()> {
    set_pace(vm, 64 << 20, 1)?;
    vm.qmp()?.execute("migrate", &json!({ "uri": format!("unix:{}", socket.display()) }))?;
    let wait_for = |rest: u64| {
        wait_until("most of the memory to be sent", MIGRATION_LIMIT, || {
            let status = migration_status(vm)?;
            ensure!(status["status"] != "failed" && status["status"] != "completed", "it is over: {status}");
            Ok(status["ram"]["remaining"].as_u64().unwrap_or(u64::MAX) < rest)
        })
    };
    wait_for(4 * REST)?;
    set_pace(vm, 24 << 20, 1)?;
    wait_for(REST)?;
    set_pace(vm, 1 << 20, 1)
}

/// Lets the machine go; how long it stood still.
fn finish(vm: &Vm) -> Result<u64> {
    set_pace(vm, 1 << 32, 2000)?;
    let mut status = Value::Null;
    wait_until("the migration to end", MIGRATION_LIMIT, || {
        status = migration_status(vm)?;
        ensure!(status["status"] != "failed", "the migration failed: {status}");
        Ok(status["status"] == "completed")
    })?;
    status["downtime"].as_u64().with_context(|| format!("no downtime in {status}"))
}

/// Fills memory with what is not on the disk, to be sent with the rest; [`read_again`] puts the disk's data in its place.
fn fill_memory(vm: &Vm) -> Result<()> {
    vm.run("tr '\\0' '\\125' </dev/zero | dd of=/tmp/fill bs=1M count=64 iflag=fullblock 2>&1").map(|_| ())
}

/// Fills the guest's page cache anew from the disk: memory that only the device writes.
fn read_again(vm: &Vm) -> Result<()> {
    vm.run(&format!(
        "rm /tmp/fill; echo 3 >/proc/sys/vm/drop_caches; dd if=$(cat /tmp/disk) of=/dev/null bs=1M count={READ_MIB} 2>&1"
    ))
    .map(|_| ())
}

/// The digest of what the guest believes to be on its disk, from its page cache, and of what is there.
fn digests(vm: &Vm) -> Result<(String, String)> {
    let digest = |flags: &str| {
        vm.run(&format!("dd if=$(cat /tmp/disk) bs=1M count={READ_MIB} {flags} 2>/dev/null | sha256sum"))
    };
    Ok((digest("")?, digest("iflag=direct")?))
}

/// Writes and verifies without end, with eight requests in flight, until [`end_load`].
fn start_load(vm: &Vm) -> Result<()> {
    let fio = format!(
        "fio --name=load --filename=$(cat /tmp/disk) --rw=randwrite --bs=4k-32k --blockalign=4k --offset={READ_MIB}m --size=16m \
         --direct=1 --ioengine=libaio --iodepth=8 --verify=crc32c --verify_fatal=1 --verify_backlog=64"
    );
    let script = format!(
        "rm -f /tmp/end; (n=0; while [ ! -e /tmp/end ]; do {fio} >/tmp/fio.log 2>&1 || {{ echo failed >/tmp/fio.end; exit; }}; \
         n=$((n + 1)); done; echo $n >/tmp/fio.end) </dev/null >/dev/null 2>&1 &"
    );
    vm.run(&script).map(|_| ())
}

/// Ends the load; how often all of its area was written and verified.
fn end_load(vm: &Vm) -> Result<u32> {
    let script = "touch /tmp/end; while [ ! -e /tmp/fio.end ]; do sleep 0.2; done; cat /tmp/fio.end; cat /tmp/fio.log >&2";
    let output = vm.try_run(script)?;
    output.stdout.trim().parse().with_context(|| format!("fio in the guest: {output:?}"))
}

/// Every member is Clean, and has been all along: no view has followed the last attachment.
fn all_clean(pool: &Pool) -> Result<()> {
    pool.wait_for_level("safe", END_LIMIT)
}

#[test]
fn a_guest_is_migrated_under_load_there_and_back_and_its_disk_goes_with_it() -> Result<()> {
    lab::run("live migration", |lab| {
        let nodes = [NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").start(lab)?];
        let pool =
            PoolBuilder::new("moving").size_mib(48).block_size(4096).member(&nodes[0]).member(&nodes[1]);
        let pool = pool.create(lab)?;
        let daemon = |name: &str| DaemonBuilder::new(&pool).name(name).queues(2).serial("moving");
        let first = daemon("first").start(lab)?;
        let source = builder("source", &first).boot(lab)?;
        let device = source.device("moving")?;
        // Somebody keeps the device open: the last one to close it would empty its page cache.
        source.run(&format!(
            "echo {device} >/tmp/disk; sleep 100000 <{device} >/dev/null 2>&1 & dd if=/dev/urandom of={device} bs=1M count={READ_MIB} oflag=direct 2>&1"
        ))?;
        let (expected, _) = digests(&source)?;
        start_load(&source)?;
        let mut checks = Checks::new();

        let second = daemon("second").arguments(["--incoming"]).start(lab)?;
        checks.check("a migration that is cancelled changes nothing for the guest", || {
            let socket = lab.path("cancelled");
            let target = builder("cancelled", &second).receive(lab, &socket)?;
            fill_memory(&source)?;
            begin(&source, &socket)?;
            read_again(&source)?;
            source.qmp()?.execute("migrate_cancel", &json!({}))?;
            wait_until("the migration to be cancelled", MIGRATION_LIMIT, || {
                Ok(migration_status(&source)?["status"] == "cancelled")
            })?;
            target.kill()?;
            ensure!(digests(&source)? == (expected.clone(), expected.clone()));
            ensure!(first.process().is_running()?, "the daemon of the source ended");
            all_clean(&pool)
        });

        let socket = lab.path("there");
        let target = builder("target", &second).receive(lab, &socket)?;
        fill_memory(&source)?;
        begin(&source, &socket)?;
        read_again(&source)?;
        let pause = finish(&source)?;
        eprintln!("lab: the guest stood still for {pause} ms");
        checks.check("what the device wrote to memory in mid-migration has arrived with the guest", || {
            let (cached, on_disk) = digests(&target)?;
            ensure!(on_disk == expected, "the disk is another one");
            ensure!(cached == expected, "the page cache of the guest is not what it read");
            Ok(())
        });
        checks.check("the daemon that the guest left waits in peace for its hypervisor to end", || {
            ensure!(first.process().is_running()?);
            all_clean(&pool)
        });
        checks.check("the guest that was left behind cannot go on with the disk", || {
            source.qmp()?.execute("cont", &json!({}))?;
            let status = first.process().wait_exit(END_LIMIT)?;
            ensure!(status.code() == Some(DISPLACED), "ended with {status}: {}", first.process().log_text());
            source.kill()?;
            ensure!(digests(&target)? == (expected.clone(), expected.clone()));
            Ok(())
        });

        // And back, to a daemon of its own, as for each guest that arrives.
        let third = daemon("third").arguments(["--incoming", "--once"]).start(lab)?;
        let socket = lab.path("back");
        let home = builder("home", &third).receive(lab, &socket)?;
        fill_memory(&target)?;
        begin(&target, &socket)?;
        read_again(&target)?;
        let pause = finish(&target)?;
        eprintln!("lab: the guest stood still for {pause} ms");
        checks.check(
            "the hypervisor that the guest left ends, and its daemon stops when it is told to",
            || {
                target.qmp()?.execute("quit", &json!({}))?;
                target.process().wait_exit(END_LIMIT)?;
                second.stop()
            },
        );
        checks.check(
            "back again, memory and disk are what they were, and no write was lost on the way",
            || {
                let rounds = end_load(&home)?;
                ensure!(rounds > 0, "fio verified nothing in all this time");
                ensure!(digests(&home)? == (expected.clone(), expected.clone()));
                let errors = home.run("dmesg | grep -i 'I/O error' || true")?;
                ensure!(errors.is_empty(), "{errors}");
                Ok(())
            },
        );
        checks.check("no member was lost or brought in line by any of this", || all_clean(&pool));
        home.shutdown()?;
        checks.check("a daemon that is told to ends with its guest", || {
            let status = third.process().wait_exit(END_LIMIT)?;
            ensure!(status.success(), "ended with {status}");
            Ok(())
        });
        checks.check("all stores are identical", || pool.assert_identical());
        checks.finish()
    })
}

#[test]
fn a_pool_is_handed_over_at_the_first_ring_of_the_next_guest_and_no_earlier() -> Result<()> {
    scenario::test("handover")
}
