//! Nodes and the daemon are killed again and again under a guest that verifies what it wrote; `scenarios.rs` does the same under a
//! writer that remembers what it was promised.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cloud_hypervisor_tests::lab::{
    self, Daemon, DaemonBuilder, Disk, Lab, Node, NodeBuilder, Pool, PoolBuilder, VmBuilder,
};

const MIB: u64 = 64;
/// How long a member may take to be missed, or to be Clean again.
const LIMIT: Duration = Duration::from_secs(60);

#[test]
fn a_guest_whose_nodes_and_daemon_are_killed_again_and_again_verifies_what_it_wrote() -> Result<()> {
    /// What fio does meanwhile; emulated, it is slow enough as it is.
    const FIO: &str = "fio --name=verified --filename=/dev/vda --size=24m --rw=randwrite --bs=8k --direct=1 \
                       --ioengine=libaio --iodepth=16 --verify=crc32c --verify_fatal=1 --verify_backlog=128 \
                       --time_based --runtime=40";
    const FIO_LIMIT: Duration = Duration::from_secs(200);
    const ROUNDS: usize = 3;
    lab::run("killed under a guest", |lab| {
        let mut nodes = start_nodes(lab)?;
        let pool = create(lab, &nodes)?;
        let builder = DaemonBuilder::new(&pool);
        let mut daemon = builder.start(lab)?;
        let vm = VmBuilder::new("guest").disk(Disk::vhost_user(daemon.socket()).reconnect()).boot(lab)?;
        let mut load = vm.start(FIO)?;
        let mut rounds = 0;
        let mut begin = Instant::now();
        loop {
            if let Some(ended) = load.poll() {
                ended.success().context("fio in the guest")?;
                if rounds >= ROUNDS {
                    break;
                }
                // A crowded machine takes its time for a round.
                (load, begin) = (vm.start(FIO)?, Instant::now());
            }
            if begin.elapsed() > FIO_LIMIT {
                // Whether the guest waits for an answer, or is merely slow.
                let disk = vm
                    .run("for i in 1 2; do cat /sys/block/vda/inflight /sys/block/vda/stat; sleep 5; done")?;
                bail!(
                    "fio still runs after {FIO_LIMIT:?} and {rounds} rounds; requests in flight, and done, twice:\n{disk}"
                );
            }
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
        }
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
