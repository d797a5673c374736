//! The lab proves itself on QEMU's own vhost-user-blk back end: guest, agent, disks and driver work before anything of this
//! project is under test.

use std::time::Duration;

use anyhow::{Result, ensure};
use cloud_hypervisor_tests::lab::{
    self, Checks, Disk, FrontendBuilder, Status, StorageDaemonBuilder, VmBuilder,
};

#[test]
fn a_guest_on_a_foreign_back_end_boots_and_verifies_what_it_wrote() -> Result<()> {
    lab::run("selftest guest", |lab| {
        let writable = StorageDaemonBuilder::new("writable").queues(2).start(lab)?;
        let read_only = StorageDaemonBuilder::new("read-only").read_only().start(lab)?;
        let vm = VmBuilder::new("guest")
            .disk(Disk::vhost_user(writable.socket()).queues(2).reconnect())
            .disk(Disk::vhost_user(read_only.socket()))
            .boot(lab)?;
        let mut checks = Checks::new();
        checks.check("fio verifies direct writes", || {
            let fio = "fio --name=verify --filename=/dev/vda --rw=randwrite --bs=4k --size=4m --direct=1 \
                       --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1";
            vm.run(fio).map(|_| ())
        });
        checks.check("the agent has all that it needs", || {
            let complaint = vm
                .console()
                .lines()
                .find(|line| line.contains("init") && line.contains("not "))
                .map(str::to_owned);
            ensure!(complaint.is_none(), "{complaint:?}");
            Ok(())
        });
        checks.check("both queues of the disk are in use by the driver", || {
            let queues = vm.run("ls /sys/block/vda/mq | wc -l")?;
            ensure!(queues.trim() == "2", "expected 2, found {queues}");
            Ok(())
        });
        checks.check("an ext4 file system is made, filled and found clean", || {
            vm.run("mkfs.ext4 -q /dev/vda && mount -t ext4 /dev/vda /mnt && seq 10000 >/mnt/numbers && umount /mnt")?;
            vm.run("e2fsck -fn /dev/vda").map(|_| ())
        });
        checks.check("a read-only disk refuses writes", || {
            let output = vm.try_run("dd if=/dev/zero of=/dev/vdb bs=4k count=1 oflag=direct")?;
            ensure!(output.exit != 0, "the write was taken: {output:?}");
            Ok(())
        });
        checks.check("a command's exit status, output and errors come back", || {
            let output = vm.try_run("echo out; echo 'a \"quoted\" word' >&2; exit 7")?;
            let found = (output.exit, output.stdout.as_str(), output.stderr.as_str());
            ensure!(found == (7, "out\n", "a \"quoted\" word\n"), "{output:?}");
            Ok(())
        });
        checks.check("commands run beside one another", || {
            let slow = vm.start("sleep 2; echo slow")?;
            ensure!(vm.run("echo quick")? == "quick\n" && slow.poll().is_none());
            ensure!(vm.wait_within(Duration::from_secs(30), slow)?.success()? == "slow\n");
            Ok(())
        });
        checks.check("QEMU answers on its control socket", || {
            let status = vm.qmp()?.execute("query-status", &serde_json::json!({}))?;
            ensure!(status["running"] == true, "{status}");
            Ok(())
        });
        checks.check("a guest that panics is reported at once, with its last words", || {
            let last = vm.start("echo c >/proc/sysrq-trigger; sleep 60")?;
            let error =
                format!("{:#}", vm.wait_within(Duration::from_secs(30), last).expect_err("it panicked"));
            ensure!(error.contains("Kernel panic"), "{error}");
            Ok(())
        });
        checks.finish()
    })
}

#[test]
fn the_driver_without_a_guest_does_every_request_on_a_foreign_back_end() -> Result<()> {
    lab::run("selftest driver", |lab| {
        let daemon = StorageDaemonBuilder::new("disk").queues(2).start(lab)?;
        let mut disk = FrontendBuilder::new(daemon.socket()).queues(2).connect()?;
        ensure!(disk.capacity()? == (64 << 20) / 512);
        let data: Vec<u8> = (0..65536_u32).flat_map(u32::to_le_bytes).collect();
        for queue in 0..2 {
            let sector = 1000 * (queue as u64 + 1);
            disk.calls(queue)?;
            ensure!(disk.write(queue, sector, &data)? == Status::Ok);
            ensure!(disk.flush(queue)? == Status::Ok);
            let (status, read) = disk.read(queue, sector, u32::try_from(data.len())?)?;
            ensure!(status == Status::Ok && read == data, "{status:?}");
            // It calls when the answers can be seen already.
            lab::wait_until("a call of the device", Duration::from_secs(30), || Ok(disk.calls(queue)? > 0))?;
        }
        ensure!(disk.write_zeroes(0, 1008, 8, false)? == Status::Ok);
        ensure!(disk.read(0, 1008, 4096)? == (Status::Ok, vec![0; 4096]));
        ensure!(disk.discard(0, 1016, 8)? == Status::Ok);
        let end = disk.capacity()?;
        ensure!(disk.write(0, end, &data)? == Status::IoError, "a write beyond the end was taken");
        ensure!(disk.request(0, 77, 0, &[], false)?.0 == Status::Unsupported);
        ensure!(disk.stop_queue(1)? == 3);
        ensure!(!disk.is_hung_up());
        drop(disk);
        let mut next = FrontendBuilder::new(daemon.socket()).queues(1).connect()?;
        let (status, read) = next.read(0, 1000, 4096)?;
        ensure!(status == Status::Ok && read == data[..4096]);
        daemon.process().kill()?;
        lab::wait_until("the driver to notice the end", Duration::from_secs(60), || Ok(next.is_hung_up()))
    })
}
