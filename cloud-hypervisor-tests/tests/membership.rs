//! Pools that change while they are in use: scenarios over TCP, and a pool that grows under a Linux guest, whose disk `verbs.rs` has no
//! guest for.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::lab::{
    self, DaemonBuilder, Disk, NodeBuilder, PoolBuilder, VmBuilder, wait_until,
};
use cloud_hypervisor_tests::scenario;

const MIB: u64 = 64;
/// How long a guest may take to be told.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn copies_are_added_moved_and_removed_under_a_writer_that_remembers() -> Result<()> {
    scenario::test("members")
}

#[test]
fn a_replaced_disk_is_filled_and_planned_maintenance_costs_what_was_missed() -> Result<()> {
    scenario::test("maintenance")
}

#[test]
fn a_pool_grows_with_a_guest_and_without_one_and_while_a_copy_is_down() -> Result<()> {
    scenario::test("growth")
}

#[test]
fn without_a_guest_rmrctl_changes_the_pool_brings_copies_up_to_date_and_goes() -> Result<()> {
    scenario::test("no-guest")
}

#[test]
fn every_change_is_finished_by_repeating_it_whoever_was_killed_in_its_middle() -> Result<()> {
    scenario::test("killed-commands")
}

#[test]
fn a_linux_guest_sees_a_grown_disk_at_once() -> Result<()> {
    lab::run("grown guest", |lab| {
        let (a, b) = (NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").start(lab)?);
        let pool = PoolBuilder::new("disk").size_mib(MIB).member(&a).member(&b).create(lab)?;
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

fn sectors(text: &str) -> Result<u64> {
    text.trim().parse().with_context(|| format!("'{text}' is no number of sectors"))
}
