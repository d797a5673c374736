//! A Linux guest on replicated disks: what works for a file system, for direct I/O of every kind, and for an administrator
//! who looks at the disk's properties. One boot serves all; the stores are compared byte for byte at the end.

use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::lab::{
    self, Checks, Daemon, DaemonBuilder, Disk, Hypervisor, Lab, Node, NodeBuilder, Pool, PoolBuilder, Vm,
    VmBuilder, stores,
};

const FIO_LIMIT: Duration = Duration::from_secs(180);
const PATTERN: u8 = 0xa5;

/// Two nodes, and on them five pools: one per kind of disk that the guest gets.
struct Topology {
    nodes: [Node; 2],
    disks: Vec<(Pool, Daemon)>,
}

impl Topology {
    fn start(lab: &Lab) -> Result<Self> {
        let nodes = [NodeBuilder::new("a").start(lab)?, NodeBuilder::new("b").shards(2).start(lab)?];
        let pool = |name: &str, size_mib: u64| {
            PoolBuilder::new(name).size_mib(size_mib).block_size(4096).member(&nodes[0]).member(&nodes[1])
        };
        let read_only = pool("readonly", 16).create(lab)?;
        {
            // Something to read: the pool is written once through a daemon that allows it.
            let daemon = DaemonBuilder::new(&read_only).name("filler").start(lab)?;
            let mut disk = lab::FrontendBuilder::new(daemon.socket()).connect()?;
            ensure!(disk.write(0, 8, &[PATTERN; 4096])? == lab::Status::Ok);
            ensure!(disk.flush(0)? == lab::Status::Ok);
            drop(disk);
            daemon.stop()?;
        }
        let (one, four) = (pool("one", 64).create(lab)?, pool("four", 96).create(lab)?);
        let (zero, small) = (pool("zero", 32).create(lab)?, pool("small", 32).block_size(512).create(lab)?);
        let start = |pool: Pool, queues: u16| -> Result<(Pool, Daemon)> {
            let builder = DaemonBuilder::new(&pool).queues(queues).serial(&format!("serial-{}", pool.name()));
            let builder = if pool.name() == "readonly" { builder.read_only() } else { builder };
            let daemon = builder.start(lab)?;
            Ok((pool, daemon))
        };
        let disks =
            vec![start(one, 1)?, start(four, 4)?, start(zero, 1)?, start(small, 2)?, start(read_only, 1)?];
        Ok(Self { nodes, disks })
    }

    fn boot(&self, lab: &Lab, hypervisor: Hypervisor) -> Result<Vm> {
        let mut vm = VmBuilder::new("guest").hypervisor(hypervisor).cpus(4);
        for (pool, daemon) in &self.disks {
            let queues = match pool.name() {
                "four" => 4,
                "small" => 2,
                _ => 1,
            };
            vm = vm.disk(Disk::vhost_user(daemon.socket()).queues(queues).queue_size(256));
        }
        vm.boot(lab)
    }

    fn pool(&self, name: &str) -> Result<&Pool> {
        self.disks.iter().map(|(pool, _)| pool).find(|pool| pool.name() == name).context("pool of this test")
    }
}

#[test]
fn a_guest_finds_its_replicated_disks_complete_and_correct() -> Result<()> {
    lab::run("guest disks", |lab| guest_disks(lab, Hypervisor::Qemu))
}

#[test]
fn a_guest_on_cloud_hypervisor_finds_its_replicated_disks_complete_and_correct() -> Result<()> {
    match Hypervisor::cloud_hypervisor_or_say_not_run("a guest's disks on cloud-hypervisor") {
        Some(hypervisor) => lab::run("guest disks on cloud-hypervisor", |lab| guest_disks(lab, hypervisor)),
        None => Ok(()),
    }
}

fn guest_disks(lab: &Lab, hypervisor: Hypervisor) -> Result<()> {
    let topology = Topology::start(lab)?;
    let vm = topology.boot(lab, hypervisor)?;
    let mut checks = Checks::new();

    checks.check("every disk is found by the serial that was asked for", || {
        for (pool, _) in &topology.disks {
            vm.device(&format!("serial-{}", pool.name()))?;
        }
        Ok(())
    });
    checks.check("sizes are those of the pools", || {
        for (pool, _) in &topology.disks {
            expect(&vm, pool.name(), "blockdev --getsize64 $D", &pool.size().to_string())?;
        }
        Ok(())
    });
    checks.check("geometry is as asked: logical and physical block, preferred I/O, queues", || {
        for (name, logical) in [("one", "4096"), ("four", "4096"), ("small", "512")] {
            expect(&vm, name, "blockdev --getss $D", logical)?;
            expect(&vm, name, "blockdev --getpbsz $D", "4096")?;
        }
        expect(&vm, "four", "ls /sys/block/${D#/dev/}/mq | wc -l", "4")?;
        expect(&vm, "one", "ls /sys/block/${D#/dev/}/mq | wc -l", "1")?;
        let granularity: u64 =
            on(&vm, "one", "cat /sys/block/${D#/dev/}/queue/discard_granularity")?.trim().parse()?;
        ensure!(granularity >= 4096 && granularity.is_power_of_two(), "discard granularity {granularity}");
        expect(&vm, "one", "cat /sys/block/${D#/dev/}/ro", "0")
    });
    for name in ["one", "four"] {
        checks.check(
            &format!("on disk '{name}', ext4 is made, used, verified by fio, and clean afterwards"),
            || file_system(&vm, name),
        );
    }
    checks.check("direct random writes at depth from four jobs verify on four queues", || {
        let fio = "fio --name=jobs --filename=$D --rw=randwrite --bs=4k-64k --size=12m --offset_increment=12m --numjobs=4 \
                   --direct=1 --ioengine=libaio --iodepth=32 --verify=crc32c --verify_fatal=1 --group_reporting";
        on(&vm, "four", fio).map(|_| ())
    });
    checks.check("discarded and zeroed ranges read as zeroes in the guest", || {
        on(&vm, "zero", "tr '\\0' '\\245' </dev/zero | dd of=$D bs=1M count=24 iflag=fullblock oflag=direct")?;
        // Aligned and odd, small and large; 4 KiB at 9 MiB + 4 KiB stays as it was.
        on(&vm, "zero", "blkdiscard -o 1M -l 4M $D && blkdiscard -o $((7 << 20)) -l 4096 $D")?;
        on(&vm, "zero", "blkdiscard -z -o 8M -l $(((1 << 20) + 4096)) $D && blkdiscard -z -o 16M -l 8M $D && sync")?;
        for (mib, bytes) in [(1, 4 << 20), (7, 4096), (8, (1 << 20) + 4096), (16, 8 << 20)] {
            let script = format!("dd if=$D bs=4k skip={} count={} iflag=direct | tr -d '\\0' | wc -c", mib << 8, bytes >> 12);
            expect(&vm, "zero", &script, "0")?;
        }
        let around = "for at in 255 1280 1791 1793 2047 2305 4095; do dd if=$D bs=4k skip=$at count=1 iflag=direct; done";
        expect(&vm, "zero", &format!("( {around} ) 2>/dev/null | tr -d '\\245' | wc -c"), "0")
    });
    checks.check("discarded and zeroed ranges are zeroes on every leg", || {
        let areas = topology.pool("zero")?.areas()?;
        for (offset, length) in
            [(1 << 20, 4 << 20), (7 << 20, 4096), (8 << 20, (1 << 20) + 4096), (16 << 20, 8 << 20)]
        {
            stores::assert_zero(&areas, offset, length)?;
        }
        for area in &areas {
            ensure!(
                area.read((9 << 20) + 4096, 4096)? == [PATTERN; 4096],
                "{}: too much was zeroed",
                area.path.display()
            );
        }
        Ok(())
    });
    checks.check("a guest with sectors of 512 bytes writes and verifies at odd sectors", || {
        expect(&vm, "small", "blockdev --getss $D", "512")?;
        let fio = "fio --name=odd --filename=$D --rw=randwrite --bs=512 --blockalign=512 --offset=3584 --size=1m --direct=1 \
                   --ioengine=libaio --iodepth=32 --numjobs=1 --verify=crc32c --verify_fatal=1";
        on(&vm, "small", fio)?;
        let fio = "fio --name=mixed --filename=$D --rw=randwrite --bsrange=512-9728 --blockalign=512 --offset=8m --size=4m \
                   --direct=1 --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1";
        on(&vm, "small", fio)?;
        // One sector in the middle of a block, its neighbours untouched.
        on(&vm, "small", "tr '\\0' '\\245' </dev/zero | dd of=$D bs=512 seek=40963 count=1 iflag=fullblock oflag=direct")?;
        expect(&vm, "small", "dd if=$D bs=512 skip=40963 count=1 iflag=direct | tr -d '\\245' | wc -c", "0")?;
        for neighbour in [40962, 40964] {
            let script = format!("dd if=$D bs=512 skip={neighbour} count=1 iflag=direct | tr -d '\\0' | wc -c");
            expect(&vm, "small", &script, "0")?;
        }
        Ok(())
    });
    checks.check("a read-only disk is readable, says so, and refuses to be written", || {
        expect(&vm, "readonly", "cat /sys/block/${D#/dev/}/ro", "1")?;
        expect(&vm, "readonly", "dd if=$D bs=4k skip=1 count=1 iflag=direct | tr -d '\\245' | wc -c", "0")?;
        for refused in
            ["dd if=/dev/zero of=$D bs=4k count=1 oflag=direct", "mkfs.ext4 -q -F $D", "blkdiscard $D"]
        {
            let output = vm.try_run(&with_device(&vm, "readonly", refused)?)?;
            ensure!(output.exit != 0, "'{refused}' succeeded: {output:?}");
        }
        Ok(())
    });
    checks.check("the kernel met no I/O error, but on the disk that refuses", || {
        let log = vm.run("dmesg")?;
        let device = vm.device("serial-readonly")?;
        let read_only = device.trim_start_matches("/dev/");
        let errors: Vec<_> =
            log.lines().filter(|line| line.contains("I/O error") && !line.contains(read_only)).collect();
        ensure!(errors.is_empty(), "{errors:?}");
        Ok(())
    });

    checks.check("daemons and nodes use no processor time while the guest is idle", || idle(&topology));
    checks.check("a daemon needs at most 32 MiB beyond the guest's memory", || {
        for (pool, daemon) in &topology.disks {
            let memory = daemon.process().own_memory()?;
            ensure!(memory <= 32 << 20, "the daemon of '{}' has {memory} bytes", pool.name());
        }
        Ok(())
    });

    vm.shutdown()?;
    for (pool, daemon) in &topology.disks {
        checks.check(
            &format!("the daemon of '{}' is alive and stops when it is asked to", pool.name()),
            || daemon.stop(),
        );
        checks.check(&format!("all stores of '{}' are identical", pool.name()), || pool.assert_identical());
    }
    checks.finish()
}

fn idle(topology: &Topology) -> Result<()> {
    const WATCHED: Duration = Duration::from_secs(3);
    const LOOKS: usize = 10;
    let nodes = topology.nodes.iter().map(Node::process);
    let processes: Vec<_> = nodes.chain(topology.disks.iter().map(|(_, daemon)| daemon.process())).collect();
    // One percent, and one tick of the clock that this is measured with.
    let limit = WATCHED / 100 + Duration::from_millis(10);
    // What the checks before have left to do, such as the clearing of maps, may end first; so may what the guest does of itself.
    // Whoever does not rest by design is never seen at rest.
    let mut busy = String::new();
    for _ in 0..LOOKS {
        let before = processes.iter().map(|process| process.cpu_time()).collect::<Result<Vec<_>>>()?;
        thread::sleep(WATCHED);
        busy.clear();
        for (process, before) in processes.iter().zip(before) {
            let used = process.cpu_time()?.saturating_sub(before);
            if used > limit {
                busy += &format!(" '{}' {used:?}", process.name());
            }
        }
        if busy.is_empty() {
            return Ok(());
        }
    }
    bail!(
        "expected at most {limit:?} of processor time in {WATCHED:?}, found at the last of {LOOKS} looks:{busy}"
    )
}

fn file_system(vm: &Vm, name: &str) -> Result<()> {
    on(vm, name, "mkfs.ext4 -q -F $D && mount -t ext4 $D /mnt && mkdir /mnt/many")?;
    on(vm, name, "for n in $(seq 200); do echo file $n >/mnt/many/$n; done; cp /usr/bin/fio /mnt/program")?;
    let fio = "fio --name=files --directory=/mnt --rw=randwrite --bs=4k --size=8m --nrfiles=4 --ioengine=libaio --iodepth=16 \
               --direct=1 --verify=crc32c --verify_fatal=1 --end_fsync=1";
    vm.run_within(FIO_LIMIT, fio)?;
    on(vm, name, "sync && umount /mnt && e2fsck -fn $D")?;
    // Once more, from the disk: nothing of it is in the page cache after the unmount.
    on(vm, name, "mount -t ext4 -o ro $D /mnt && cmp /usr/bin/fio /mnt/program")?;
    expect(vm, name, "cat /mnt/many/* | sort | uniq | wc -l; umount /mnt", "200")
}

/// Runs `script` with `$D` being the device of the disk of pool `name`.
fn on(vm: &Vm, name: &str, script: &str) -> Result<String> {
    vm.run_within(FIO_LIMIT, &with_device(vm, name, script)?)
}

fn with_device(vm: &Vm, name: &str, script: &str) -> Result<String> {
    Ok(format!("D={}\n{script}", vm.device(&format!("serial-{name}"))?))
}

fn expect(vm: &Vm, name: &str, script: &str, expected: &str) -> Result<()> {
    let found = on(vm, name, script)?;
    ensure!(
        found.trim() == expected,
        "disk '{name}': expected {expected} from '{script}', found '{}'",
        found.trim()
    );
    Ok(())
}
