//! Pools that change while they are in use: scenarios over TCP, and a pool that grows under a Linux guest, whose disk `verbs.rs` has no
//! guest for.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cloud_hypervisor_tests::lab::{
    self, DaemonBuilder, Disk, FrontendBuilder, Node, NodeBuilder, PoolBuilder, Status, VmBuilder, wait_until,
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
fn a_new_copy_is_as_thin_as_its_source_and_a_discard_that_a_copy_missed_gives_space_back() -> Result<()> {
    lab::run("thin", |lab| {
        let (a, mut b) = (NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").on_disk().start(lab)?);
        let mut c = NodeBuilder::new("c").on_disk().start(lab)?;
        c.stop()?;
        let Some(_small) = SmallFileSystem::mount(lab.path("small.img"), c.store_dir())? else {
            return Ok(());
        };
        c.restart(lab)?;
        let pool = PoolBuilder::new("disk").size_mib(8 << 10).member(&a).member(&b).create(lab)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
        let data = vec![0x5a; 1 << 20];
        let places: Vec<u64> = (0..16).map(|n| n << 29).collect();
        for place in &places {
            ensure!(disk.write(0, place / 512, &data)? == Status::Ok);
        }
        // More than the file system has room for, if zeroes took any.
        pool.operate("add-member", &["--member", &c.admin_address().to_string(), "--wait"])?;
        let pool = pool.with(&c);
        ensure!(disk.flush(0)? == Status::Ok);
        let [at_a, at_b, at_c] = [allocated(&a)?, allocated(&b)?, allocated(&c)?];
        ensure!(at_a >= 16 << 20, "the source has {at_a} bytes allocated");
        ensure!(at_c * 10 <= at_a * 11 && at_b * 10 <= at_a * 11, "allocated: {at_a}, {at_b}, new {at_c}");

        b.stop()?;
        pool.wait_for_level("degraded", LIMIT)?;
        for place in &places[..8] {
            // With as much that was never written.
            ensure!(disk.discard(0, place / 512, (32 << 20) / 512)? == Status::Ok);
        }
        b.restart(lab)?;
        pool.wait_for_level("safe", LIMIT)?;
        ensure!(disk.flush(0)? == Status::Ok);
        daemon.stop()?;
        let after = [allocated(&a)?, allocated(&b)?, allocated(&c)?];
        for (before, after) in [at_a, at_b, at_c].into_iter().zip(after) {
            ensure!(
                after + (8 << 20) <= before + (before / 10),
                "8 MiB were discarded: {before}, then {after}"
            );
        }
        for area in pool.areas()? {
            for (n, place) in places.iter().enumerate() {
                let found = area.read(*place, 1 << 20)?;
                ensure!(found.iter().all(|byte| *byte == if n < 8 { 0 } else { 0x5a }), "{:?}", area.path);
            }
        }
        Ok(())
    })
}

#[test]
fn what_a_copy_missed_on_both_sides_of_the_border_of_two_map_pages_is_brought_to_it() -> Result<()> {
    /// Chunks of 1 MiB that a page of a map covers.
    const PAGE: u64 = 32256 << 20;
    lab::run("map pages", |lab| {
        let (a, mut b) = (NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").start(lab)?);
        let pool = PoolBuilder::new("disk").size_mib(40 << 10).member(&a).member(&b).create(lab)?;
        let daemon = DaemonBuilder::new(&pool).start(lab)?;
        let mut disk = FrontendBuilder::new(daemon.socket()).connect()?;
        let places = [0, PAGE - (1 << 19), (40 << 30) - (1 << 20)];
        let data = |place: u64| vec![u8::try_from(1 + place % 251).unwrap_or(1); 1 << 20];
        // The daemon is ready before it has attached; a member that stops before that is waited for.
        ensure!(disk.read(0, 0, 512)?.0 == Status::Ok);
        b.stop()?;
        pool.wait_for_level("degraded", LIMIT)?;
        for place in places {
            ensure!(disk.write(0, place / 512, &data(place))? == Status::Ok);
        }
        b.restart(lab)?;
        pool.wait_for_level("safe", LIMIT)?;
        daemon.stop()?;
        for area in pool.areas()? {
            for place in places {
                ensure!(area.read(place, 1 << 20)? == data(place), "{:?} at {place}", area.path);
            }
        }
        Ok(())
    })
}

/// Bytes that the stores of a node have allocated.
fn allocated(node: &Node) -> Result<u64> {
    let mut bytes = 0;
    for entry in std::fs::read_dir(node.store_dir())? {
        let found = entry?.metadata()?;
        bytes += if found.is_file() { found.blocks() * 512 } else { 0 };
    }
    Ok(bytes)
}

/// An ext4 file system of 300 MB, unmounted when the test ends.
struct SmallFileSystem(PathBuf);

impl SmallFileSystem {
    /// `None` (said loudly) where it cannot be mounted.
    fn mount(image: PathBuf, at: &Path) -> Result<Option<Self>> {
        std::fs::File::create(&image)?.set_len(300 << 20)?;
        let is_made = |mut command: Command| Ok::<_, anyhow::Error>(command.output()?.status.success());
        let mut format = Command::new(lab::programs::system("mkfs.ext4")?);
        format.args(["-q", "-F"]).arg(&image);
        ensure!(is_made(format)?, "mkfs.ext4 failed");
        let mut mount = Command::new("mount");
        mount.args(["-o", "loop"]).arg(&image).arg(at);
        if !is_made(mount)? {
            eprintln!("NOT RUN: no loop device can be mounted here, so thin stores are not tested");
            return Ok(None);
        }
        Ok(Some(Self(at.to_owned())))
    }
}

impl Drop for SmallFileSystem {
    fn drop(&mut self) {
        // Lazily: the node may end later than this.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
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
