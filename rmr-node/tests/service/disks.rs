//! Disks that fail: the kernel refuses writes beyond a limit (RLIMIT_FSIZE), a file is cut short, a file system is full.

use std::path::Path;
use std::process::Command;
use std::sync::mpsc;
use std::time::Duration;

use rmr_common::client::{IoError, PoolSelector};
use rmr_common::driver::Pool;
use rmr_common::pool::Slot;
use rmr_common::wire::{Kind, MessageHeader, Status};
use rmr_node::store::Store;

use crate::support::*;

/// Where the data of a small pool begins in its store.
const DATA: u64 = 1 << 20;
/// Where the maps of a store begin; before it there are both superblocks.
const MAPS: u64 = 128 << 10;

/// Whether a node says that metadata of a store cannot be written: the store is about to be closed, or is left out.
fn failing(node: &Node) -> bool {
    let pools = node.admin_get("/v1/pools");
    pools.contains("its metadata cannot be written") || pools.contains("writing the store's metadata failed")
}

#[test]
fn data_that_the_disk_does_not_take_is_answered_as_failed_and_all_else_goes_on() {
    let node = Node::start_with(SURVIVES_LIMITS, 1, &[]);
    node.limit_files(DATA + u64::from(MIB));
    let mut raw = Raw::attached(&node, 0);
    let data = pattern(1, 8192);
    // The first is taken, the second refused, of the third one half is taken.
    for (slot, offset, expected) in [
        (0, 0, Status::Ok),
        (1, u64::from(MIB), Status::IoError),
        (2, u64::from(MIB) - 4096, Status::IoError),
        (3, 8192, Status::Ok),
    ] {
        let header = raw.write_header(slot, offset, 8192);
        raw.send(&[(header, &data)]);
        let (reply, _) = raw.receive();
        assert_eq!(
            (reply.kind, reply.slot, reply.status),
            (Kind::IoReply, Slot(slot), expected),
            "at {offset}"
        );
    }
    for (kind, expected) in [(Kind::WriteZeroes, Status::IoError), (Kind::Flush, Status::Ok)] {
        let length = if kind == Kind::Flush { 0 } else { 4096 };
        let header = MessageHeader {
            offset: u64::from(MIB) * u64::from(length.min(1)),
            length,
            ..raw.header(kind, 4, 0)
        };
        raw.send(&[(header, &[])]);
        let status = raw.receive().0.status;
        // Zeroes that are a hole already need no write.
        assert!(
            status == expected || kind == Kind::WriteZeroes && status == Status::Ok,
            "{kind:?}: {status:?}"
        );
    }
    let read = raw.read_header(5, 8192, 8192);
    raw.send(&[(read, &[])]);
    assert!(raw.receive().1 == data);
    assert!(!failing(&node), "the metadata are well");
    assert!(node.log().contains("disk error"), "{}", node.log());
}

#[test]
fn data_that_the_disk_does_not_have_any_more_is_answered_as_failed_and_without_data() {
    let node = Node::start(1, &["--buffer-memory", "8M"]);
    let mut raw = Raw::attached(&node, 0);
    let store = std::fs::File::options().write(true).open(node.store_path(0)).unwrap();
    store.set_len(DATA + u64::from(MIB)).unwrap();
    for (slot, offset, expected) in [
        (0, 0, Status::Ok),
        (1, u64::from(MIB), Status::IoError),
        (2, u64::from(MIB) - 4096, Status::IoError),
    ] {
        let header = raw.read_header(slot, offset, 8192);
        raw.send(&[(header, &[])]);
        let (reply, data) = raw.receive();
        assert_eq!(
            (reply.kind, reply.slot, reply.status),
            (Kind::IoReply, Slot(slot), expected),
            "at {offset}"
        );
        assert_eq!(data.len(), if expected == Status::Ok { 8192 } else { 0 });
    }
    // What failed keeps no memory: it is more than one client may have, and the next read finds some.
    for slot in 3..13 {
        let header = raw.read_header(slot, u64::from(MIB), MIB);
        raw.send(&[(header, &[])]);
        assert_eq!(raw.receive().0.status, Status::IoError);
    }
    let header = raw.read_header(13, 0, MIB);
    raw.send(&[(header, &[])]);
    assert_eq!(raw.receive().0.status, Status::Ok);
    let (pool, mut back) = (node.attach_over(0), vec![0; 8192]);
    assert_eq!(pool.blocking().read_at(&mut back, u64::from(MIB)), Err(IoError::Media));
    pool.blocking().read_at(&mut back, 0).unwrap();
}

#[test]
fn a_leg_whose_disk_refuses_a_write_is_left_and_the_guest_sees_nothing_of_it() {
    let nodes = Node::start_pair([SURVIVES_LIMITS, ""]);
    let seeds = [nodes[0].data_address(), nodes[1].data_address()];
    let selector = PoolSelector::Id(nodes[0].pools[0].id);
    let pool = Pool::connect(Node::config("a client"), selector, &seeds, PATIENCE).unwrap();
    nodes[0].limit_files(DATA + u64::from(MIB));
    let data = pattern(2, MIB);
    for offset in [0, 1, 2] {
        pool.blocking().write_at(&data, offset * u64::from(MIB)).unwrap();
    }
    pool.blocking().flush().unwrap();
    let mut back = vec![0; MIB as usize];
    for offset in [0, 1, 2] {
        pool.blocking().read_at(&mut back, offset * u64::from(MIB)).unwrap();
        assert!(back == data, "MiB {offset}");
    }
    // What the first one misses is on record with the other, durably, or the write had not been answered.
    assert!(nodes[1].log().contains("are absent, what they miss is recorded"), "{}", nodes[1].log());
    assert!(!failing(&nodes[0]) && !failing(&nodes[1]));
}

#[test]
fn metadata_that_cannot_be_written_end_the_service_of_a_store_and_hold_nothing_up() {
    let mut node = Node::start_with(SURVIVES_LIMITS, 2, &["--stop-timeout-s", "30"]);
    let mut raw = Raw::attached(&node, 0);
    let other = node.attach(1).unwrap();
    let data = pattern(3, 4096);
    let write = raw.write_header(0, 0, 4096);
    raw.send(&[(write, &data)]);
    assert_eq!(raw.receive().0.status, Status::Ok);
    // Superblocks and data could be written still, maps not.
    node.limit_files(MAPS);
    let headers: Vec<_> = (0..8u16).map(|i| raw.write_header(i, (1 + u64::from(i)) << 20, 4096)).collect();
    let writes: Vec<_> = headers.iter().map(|h| (*h, data.as_slice())).collect();
    raw.send(&writes);
    while let Ok((reply, _)) = raw.try_receive() {
        assert_ne!(reply.status, Status::Ok, "its bit in the intent map is not durable");
    }
    // Whoever comes next is told, and so are operators.
    let mut next = Raw::greeted(&node, 0);
    let (reply, words) = next.try_attach().unwrap();
    assert_eq!((reply.kind, reply.status), (Kind::AttachReply, Status::IoError));
    assert_eq!(String::from_utf8_lossy(&words), "its metadata cannot be written");
    assert!(failing(&node));
    let health = node.admin_get("/v1/health");
    assert!(!health.starts_with("HTTP/1.1 200"), "{health}");
    // The other pool of the node has its own metadata, and they can be written where there is nothing new in the maps.
    let mut back = vec![1; 4096];
    other.blocking().read_at(&mut back, 0).unwrap();
    drop((other, next));
    node.limit_files(u64::from(u32::MAX));
    node.terminate();
    let (in_order, took) = node.ended();
    assert!(took < QUICK, "{took:?}: it waited for what never ends:\n{}", node.log());
    assert!(!in_order, "a store that is not marked clean is an error");
    let report = Store::inspect(&node.store_path(0)).unwrap().to_string();
    assert!(report.contains("closed in order: no"), "{report}");
}

#[test]
fn an_epoch_that_cannot_be_written_is_not_agreed_to() {
    let node = Node::start_with(SURVIVES_LIMITS, 1, &[]);
    node.limit_files(0);
    // The first who asks finds the fault: the node has nothing more to say to it. The next one is told why.
    let mut first = Raw::greeted(&node, 0);
    assert!(first.try_attach().is_err(), "an answer, though the epoch is not durable");
    let mut raw = Raw::greeted(&node, 0);
    let (reply, words) = raw.try_attach().unwrap();
    assert_eq!((reply.kind, reply.status), (Kind::AttachReply, Status::IoError));
    assert_eq!(String::from_utf8_lossy(&words), "its metadata cannot be written");
    assert!(failing(&node));
}

#[test]
fn a_view_that_cannot_be_written_is_not_agreed_to() {
    let mut nodes = Node::start_pair([SURVIVES_LIMITS, ""]);
    let seeds = [nodes[0].data_address(), nodes[1].data_address()];
    let selector = PoolSelector::Id(nodes[0].pools[0].id);
    let pool = Pool::connect(Node::config("a client"), selector, &seeds, PATIENCE).unwrap();
    pool.blocking().write_at(&pattern(4, 8192), 0).unwrap();
    nodes[0].limit_files(0);
    // The first one would have to record that the second one is absent.
    nodes[1].stop();
    let (sender, receiver) = mpsc::channel();
    pool.write(0, vec![pattern(5, 8192)], move |result| {
        let _ = sender.send(result.map(drop));
    });
    wait_for("the first one gives up", || failing(&nodes[0]));
    let answer = receiver.recv_timeout(Duration::from_secs(1));
    assert!(answer.is_err(), "no copy has it for good, and no view says who is current: {answer:?}");
    assert!(failing(&nodes[0]), "{}", nodes[0].admin_get("/v1/pools"));
    // The client waits for the nodes; it gives up with the process.
    std::mem::forget(pool);
}

/// A mounted tmpfs, unmounted when dropped; `None` (said loudly) where mounting is not allowed.
struct Tiny(tempfile::TempDir);

impl Tiny {
    fn mount(size: &str) -> Option<Self> {
        let directory = tempfile::tempdir().unwrap();
        let options = format!("size={size}");
        let mut mount = Command::new("mount");
        mount.args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(directory.path());
        if !mount.status().is_ok_and(|status| status.success()) {
            eprintln!("NOT RUN: no tmpfs can be mounted here, so a full disk is not tested");
            return None;
        }
        Some(Self(directory))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0.path()).status();
    }
}

#[test]
fn a_full_disk_is_told_from_a_broken_one_and_takes_writes_again_when_there_is_space() {
    let Some(tiny) = Tiny::mount("8m") else { return };
    let node = Node::start_in(tiny.path());
    let mut raw = Raw::attached(&node, 0);
    let data = pattern(5, MIB);
    let mut write = |slot: u16, offset: u64| {
        let header = raw.write_header(slot, offset, MIB);
        raw.send(&[(header, &data)]);
        raw.receive().0.status
    };
    let statuses: Vec<_> = (0..10u16).map(|slot| write(slot, u64::from(slot) << 20)).collect();
    assert_eq!(statuses[0], Status::Ok);
    assert_eq!(statuses[9], Status::NoSpace, "{statuses:?}");
    assert!(statuses.iter().all(|s| matches!(s, Status::Ok | Status::NoSpace)), "{statuses:?}");
    // What is allocated can be written, and what an operator makes room for too.
    assert_eq!(write(0, 0), Status::Ok);
    let remount = Command::new("mount").args(["-o", "remount,size=32m"]).arg(tiny.path()).status();
    assert!(remount.unwrap().success());
    assert_eq!(write(9, 9 << 20), Status::Ok);
    assert!(!failing(&node));
}
