//! What the data path costs per request, without sockets, threads or a disk. Run it optimised:
//! `cargo test --release -p vhost-brmr --test device -- --ignored --nocapture cost`.

use std::os::fd::{FromRawFd, IntoRawFd, RawFd};
use std::time::{Duration, Instant};

use rmr_common::reactor::WatchChange;
use vhost::vhost_user::VhostUserBackendReqHandlerMut;
use vhost::vhost_user::message::{VhostUserMemoryRegion, VhostUserVringAddrFlags};
use vhost_brmr::device::{Device, DeviceOptions};
use vhost_brmr::disk::{Attachment, Disk, DiskError, Geometry, Request, Token};
use vhost_brmr::engine::Engine;
use vhost_brmr::frontend::Session;
use vhost_brmr::testing::geometry;
use virtio_bindings::virtio_blk::VIRTIO_BLK_T_IN;
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::support::header;

const DEPTH: u16 = 32;
const ROUNDS: u32 = 20_000;

/// Completes everything at once, and moves no data.
struct Null(Vec<(Token, Result<(), DiskError>)>);

impl Disk for Null {
    fn geometry(&self) -> Geometry {
        geometry(1 << 30)
    }
    fn attach(&mut self) {}
    fn detach(&mut self) {}
    fn reset(&mut self) {}
    fn attachment(&self) -> Attachment<'_> {
        Attachment::Attached
    }
    fn submit(&mut self, token: Token, _request: Request<'_>) {
        self.0.push((token, Ok(())));
    }
    fn cancel(&mut self) {}
    fn completions(&mut self, done: &mut Vec<(Token, Result<(), DiskError>)>) {
        done.append(&mut self.0);
    }
    fn watch_changes(&mut self, _changes: &mut Vec<WatchChange>) {}
    fn ready(&mut self, _fd: RawFd, _set: EventSet) {}
    fn upkeep(&mut self) {}
    fn timeout(&self) -> Option<Duration> {
        None
    }
}

#[test]
#[ignore = "a measurement, not a check"]
fn cost_of_the_data_path_per_request() {
    let mut disk = Null(Vec::with_capacity(1024));
    let options = DeviceOptions { queues: 1, queue_size: 256, serial: String::new(), read_only: false };
    let mut session = Session::new(Device::new(options, disk.geometry())).unwrap();
    let features = session.get_features().unwrap() & !(1 << 30);
    session.set_features(features).unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4 << 20).unwrap();
    session.set_mem_table(&[VhostUserMemoryRegion::new(0, 4 << 20, 0, 0)], vec![file], None).unwrap();
    session.set_vring_num(0, 256).unwrap();
    session.set_vring_base(0, 0).unwrap();
    session.set_vring_addr(0, VhostUserVringAddrFlags::empty(), 0x1000, 0x4000, 0x3000, 0).unwrap();
    let kick = EventFd::new(EFD_NONBLOCK).unwrap();
    // SAFETY: the descriptor is handed over.
    let kick = unsafe { std::fs::File::from_raw_fd(kick.into_raw_fd()) };
    session.set_vring_kick(0, Some(kick)).unwrap();
    assert!(session.is_running());

    let memory = std::sync::Arc::clone(session.memory.snapshot());
    for slot in 0..u64::from(DEPTH) {
        let at = 0x10000 + slot * 0x4000;
        memory.write_slice(&header(VIRTIO_BLK_T_IN, slot * 8), GuestAddress(at)).unwrap();
        let chain = [(at, 16u32, 1u16), (at + 4096, 4096, 3), (at + 16, 1, 2)];
        for (index, (address, length, flags)) in (slot * 4..).zip(chain) {
            let base = 0x1000 + index * 16;
            memory.write_obj(address, GuestAddress(base)).unwrap();
            memory.write_obj(length, GuestAddress(base + 8)).unwrap();
            memory.write_obj(flags, GuestAddress(base + 12)).unwrap();
            memory.write_obj(index as u16 + 1, GuestAddress(base + 14)).unwrap();
        }
    }
    let mut engine = Engine::new(256);
    let mut avail = 0u16;
    let mut batch = |serve: bool| {
        for slot in 0..DEPTH {
            memory.write_obj(slot * 4, GuestAddress(0x3004 + u64::from(avail % 256) * 2)).unwrap();
            avail = avail.wrapping_add(1);
        }
        memory.write_obj(avail, GuestAddress(0x3002)).unwrap();
        if serve {
            session.kicked[0] = true;
            assert!(engine.turn(&mut session, &mut disk, true, true).active);
            assert!(engine.turn(&mut session, &mut disk, true, true).active);
        }
    };
    let mut time = |serve| {
        let start = Instant::now();
        (0..ROUNDS).for_each(|_| batch(serve));
        start.elapsed().as_secs_f64() * 1e9 / f64::from(ROUNDS) / f64::from(DEPTH)
    };
    let served = time(true);
    let driver = time(false);
    println!("{served:.0} ns per request at depth {DEPTH}, of which {driver:.0} ns are the test's own");
    let used: u16 = memory.read_obj(GuestAddress(0x4002)).unwrap();
    assert_eq!(u32::from(used), (ROUNDS * u32::from(DEPTH)) & 0xffff);
}
