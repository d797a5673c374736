//! The dirty log as a front end sees it that migrates its guest: exactly what the device wrote is marked, whenever logging
//! begins, and a log that makes no sense ends the session and nothing else.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};

use vhost::vhost_user::VhostUserFrontend;
use vhost::{VhostBackend, VhostUserDirtyLogRegion, VhostUserMemoryRegionInfo};
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::{FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::support::*;

const PAGE: u64 = 4096;
/// Bytes of a log for all of the guest's memory, and as much again for a used ring that is to be logged elsewhere.
const LOG_SIZE: u64 = (GUEST_BASE + 2 * MEMORY_SIZE) / PAGE / 8;

/// A log of the front end's, and how the front end sees it.
struct Log {
    file: File,
    map: MmapRegion,
}

impl Log {
    fn new(size: u64) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(size).unwrap();
        let shared = FileOffset::new(file.try_clone().unwrap(), 0);
        let map = MmapRegion::from_file(shared, usize::try_from(size.max(1)).unwrap()).unwrap();
        Self { file, map }
    }

    fn region(&self, size: u64) -> Option<VhostUserDirtyLogRegion> {
        Some(VhostUserDirtyLogRegion { mmap_size: size, mmap_offset: 0, mmap_handle: self.file.as_raw_fd() })
    }

    /// Takes all marked pages, as offsets in guest memory; one that is marked meanwhile is taken now or the next time.
    fn take(&self) -> BTreeSet<u64> {
        let bytes = self.map.as_volatile_slice();
        let taken = (0..bytes.len())
            .map(|at| bytes.get_atomic_ref::<AtomicU8>(at).unwrap().swap(0, Ordering::SeqCst));
        let bits = |byte: u8| (0..8).filter(move |bit| byte & 1 << bit != 0);
        let pages = (0u64..).zip(taken).flat_map(|(at, byte)| bits(byte).map(move |bit| at * 8 + bit));
        pages.map(|page| (page * PAGE).wrapping_sub(GUEST_BASE)).collect()
    }
}

impl Guest {
    /// Takes all pages that were marked for what this guest has seen: the device answers first, and marks then.
    fn take(&self, log: &Log) -> BTreeSet<u64> {
        self.settle();
        log.take()
    }

    fn log(&self, on: bool) {
        let features = if on { self.features | LOG_ALL } else { self.features };
        self.frontend.set_features(features).unwrap();
    }

    /// Begins to log as QEMU does: the log, the feature, then the rings.
    fn begin_log(&self) -> Log {
        let log = Log::new(LOG_SIZE);
        self.frontend.set_log_base(0, log.region(LOG_SIZE)).unwrap();
        self.log(true);
        for queue in 0..self.rings.len() {
            let used = GUEST_BASE + Guest::used_ring(queue);
            self.frontend.set_vring_addr(queue, &self.addresses(queue, Some(used))).unwrap();
        }
        log
    }
}

/// The pages of these ranges of guest memory, and those of the first used ring.
fn pages(ranges: &[(u64, u64)]) -> BTreeSet<u64> {
    let touched = |(at, length): &(u64, u64)| (at / PAGE..=(at + length - 1) / PAGE).map(|page| page * PAGE);
    ranges.iter().flat_map(touched).chain([Guest::used_ring(0)]).collect()
}

/// Reads the first bytes of the disk to a place in guest memory, with the status behind the header as always.
fn read_to(guest: &mut Guest, at: u64, length: u32) -> u8 {
    let place = guest.fill(0, 0, VIRTIO_BLK_T_IN, 0, &[]);
    let buffers = [(place, 16, false), (at, length, true), (place + 31, 1, true)];
    guest.chain(Guest::table(0), 0, &buffers);
    guest.make_available(0, 0);
    guest.kick(0);
    guest.used(0, 1);
    guest.status(0, 0)
}

#[test]
fn exactly_what_the_device_writes_is_marked() {
    for features in [ALL, ALL & !bit(29)] {
        let (daemon, mut guest) = Setup { features, ..Setup::default() }.boot();
        let status = (Guest::buffer(0, 0) + 31, 1);
        let data = Guest::buffer(0, 0) + 512;
        let log = guest.begin_log();
        guest.take(&log);
        assert_eq!(guest.write_disk(0, &[7; 8192]), OK);
        assert_eq!(guest.take(&log), pages(&[status]), "a write changes nothing but its status");
        assert_eq!(guest.flush(), OK);
        assert_eq!(guest.take(&log), pages(&[status]));
        assert_eq!(guest.read_disk(0, 512).status, OK);
        assert_eq!(guest.take(&log), pages(&[status, (data, 512)]));
        assert_eq!(guest.request(0, VIRTIO_BLK_T_GET_ID, 0, &[], 20).status, OK);
        assert_eq!(guest.take(&log), pages(&[status, (data, 20)]));
        assert_eq!(guest.request(0, VIRTIO_BLK_T_FLUSH + 100, 0, &[], 0).status, 2);
        assert_eq!(guest.take(&log), pages(&[status]), "a request that is refused");
        // At the edges of pages: the last byte of one, its whole, and one byte into the next.
        let room = 2 * 0x10_0000;
        for (at, length) in [(512, 3584), (0, 4096), (4095 - 511, 512), (4095, 512), (1, 8192)] {
            assert_eq!(read_to(&mut guest, room + at, length / 512 * 512), OK);
            assert_eq!(
                guest.take(&log),
                pages(&[status, (room + at, u64::from(length / 512 * 512))]),
                "{length} at {at}"
            );
        }
        // Whatever came of it: some of the data may be there.
        daemon.disk.fail_next(1);
        assert_eq!(read_to(&mut guest, room, 12288), IOERR);
        assert_eq!(guest.take(&log), pages(&[status, (room, 12288)]));
    }
}

#[test]
fn the_last_page_of_memory_and_pages_of_other_regions_are_marked() {
    let (_daemon, mut guest) = Setup::default().boot();
    let extra = tempfile::tempfile().unwrap();
    extra.set_len(MEMORY_SIZE).unwrap();
    // Right behind the first region, so that a buffer may lie across both.
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST_BASE + MEMORY_SIZE,
        memory_size: MEMORY_SIZE,
        userspace_addr: USER_BASE + (1 << 32),
        mmap_offset: 0,
        mmap_handle: extra.as_raw_fd(),
    };
    let log = guest.begin_log();
    // Memory that comes while pages are logged is logged as well.
    guest.frontend.add_mem_region(&region).unwrap();
    guest.take(&log);
    let status = (Guest::buffer(0, 0) + 31, 1);
    for (at, length) in [
        (MEMORY_SIZE - 512, 512),
        (MEMORY_SIZE - 512, 1024),
        (MEMORY_SIZE - 4096, 12288),
        (MEMORY_SIZE, 512),
        (2 * MEMORY_SIZE - 4096, 4096),
    ] {
        assert_eq!(read_to(&mut guest, at, length), OK);
        assert_eq!(guest.take(&log), pages(&[status, (at, length.into())]), "{length} bytes at {at:#x}");
    }
}

#[test]
fn what_is_in_flight_when_logging_begins_is_marked_and_what_is_written_after_it_ends_is_not() {
    let (daemon, mut guest) = Setup::default().boot();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_IN, 0, &[], 8192);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let log = guest.begin_log();
    guest.take(&log);
    daemon.disk.hold(false);
    guest.used(0, 1);
    let (status, data) = ((Guest::buffer(0, 0) + 31, 1), (Guest::buffer(0, 0) + 512, 8192));
    assert_eq!(guest.take(&log), pages(&[status, data]));
    // A log of the same migration in place of the first: memory has grown.
    let next = guest.begin_log();
    assert_eq!(guest.read_disk(0, 8192).status, OK);
    assert_eq!((guest.take(&log), guest.take(&next)), (BTreeSet::new(), pages(&[status, data])));
    guest.log(false);
    assert_eq!(guest.read_disk(0, 8192).status, OK);
    assert_eq!(guest.take(&next), BTreeSet::new());
    // The next migration.
    let log = guest.begin_log();
    assert_eq!(guest.read_disk(0, 512).status, OK);
    assert_eq!(guest.take(&log), pages(&[status, (data.0, 512)]));
    assert_eq!(guest.take(&next), BTreeSet::new());
    assert_eq!(daemon.disk.resets(), 0, "none of this is a reset of the device");
}

#[test]
fn all_is_marked_when_a_ring_has_stopped_also_what_was_in_flight_then() {
    let (daemon, mut guest) = Setup::default().boot();
    let log = guest.begin_log();
    log.take();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_IN, 0, &[], 4096);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let frontend = guest.frontend.clone();
    let stopper = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
    std::thread::sleep(std::time::Duration::from_millis(30));
    assert!(log.take().is_subset(&pages(&[])), "nothing but the event index of the ring was written");
    daemon.disk.hold(false);
    assert_eq!(stopper.join().unwrap(), 1);
    let (status, data) = ((Guest::buffer(0, 0) + 31, 1), (Guest::buffer(0, 0) + 512, 4096));
    assert_eq!(log.take(), pages(&[status, data]));
}

#[test]
fn a_session_that_begins_in_mid_migration_is_logged_from_its_first_request() {
    // QEMU sends the feature first then, and the log before it enables the rings.
    let setup = Setup::default();
    let (_daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    guest.log(true);
    guest.share_memory();
    guest.configure_ring(0, 0);
    guest.frontend.set_vring_kick(0, &guest.rings[0].kick).unwrap();
    let log = Log::new(LOG_SIZE);
    guest.frontend.set_log_base(0, log.region(LOG_SIZE)).unwrap();
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.read_disk(0, 512).status, OK);
    let (status, data) = ((Guest::buffer(0, 0) + 31, 1), (Guest::buffer(0, 0) + 512, 512));
    assert_eq!(guest.take(&log), pages(&[status, data]));
}

#[test]
fn a_used_ring_is_marked_at_the_address_that_is_given_for_it() {
    for features in [ALL, ALL & !bit(29)] {
        let (_daemon, mut guest) = Setup { features, ..Setup::default() }.boot();
        let log = guest.begin_log();
        // Outside guest memory, and across two pages.
        let elsewhere = MEMORY_SIZE + PAGE - 8;
        let addresses = guest.addresses(0, Some(GUEST_BASE + elsewhere));
        guest.frontend.set_vring_addr(0, &addresses).unwrap();
        guest.take(&log);
        assert_eq!(guest.flush(), OK);
        let status = (Guest::buffer(0, 0) + 31, 1);
        assert_eq!(guest.take(&log), pages(&[status, (elsewhere, 6 + 8 * 64)]));
    }
}

#[test]
fn logs_that_make_no_sense_are_refused_and_the_next_session_goes_on() {
    let small = GUEST_BASE / PAGE / 8 + MEMORY_SIZE / PAGE / 8;
    for (length, size, offset, fits) in [
        (LOG_SIZE, LOG_SIZE, 0, true),
        (small, small, 0, true),
        // Too small for the guest's memory, larger than its file, at an offset that cannot be mapped.
        (LOG_SIZE, small - 1, 0, false),
        (LOG_SIZE, LOG_SIZE + 1, 0, false),
        (LOG_SIZE, LOG_SIZE, 4096, false),
        (LOG_SIZE * 2, LOG_SIZE, 100, false),
        (LOG_SIZE, u64::MAX, 0, false),
        (0, LOG_SIZE, 0, false),
    ] {
        let (daemon, mut guest) = Setup::default().boot();
        let log = Log::new(length);
        let region = VhostUserDirtyLogRegion {
            mmap_size: size,
            mmap_offset: offset,
            mmap_handle: log.file.as_raw_fd(),
        };
        assert_eq!(
            guest.frontend.set_log_base(0, Some(region)).is_ok(),
            fits,
            "{size} of {length} at {offset}"
        );
        if fits {
            guest.log(true);
            assert_eq!(guest.read_disk(0, 512).status, OK);
            assert!(!guest.take(&log).is_empty());
        }
        drop(guest);
        daemon.join().unwrap();
    }
}

#[test]
fn memory_and_rings_beyond_the_log_are_refused_and_the_session_goes_on() {
    let (_daemon, mut guest) = Setup::default().boot();
    let log = guest.begin_log();
    let extra = tempfile::tempfile().unwrap();
    extra.set_len(PAGE).unwrap();
    let end = LOG_SIZE * 8 * PAGE;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: end,
        memory_size: PAGE,
        userspace_addr: USER_BASE + (1 << 32),
        mmap_offset: 0,
        mmap_handle: extra.as_raw_fd(),
    };
    assert!(guest.frontend.add_mem_region(&region).is_err());
    for beyond in [end, end - 8, u64::MAX] {
        assert!(guest.frontend.set_vring_addr(0, &guest.addresses(0, Some(beyond))).is_err());
    }
    guest.take(&log);
    assert_eq!(guest.read_disk(0, 512).status, OK);
    assert!(!guest.take(&log).is_empty());
    // Without a log there is nothing that it could be beyond.
    guest.log(false);
    guest.frontend.add_mem_region(&region).unwrap();
    // A log for the memory before would not do any more.
    assert!(guest.frontend.set_log_base(0, log.region(LOG_SIZE)).is_err());
}

/// Sends a message by hand, with a descriptor, and returns what is answered within a while.
fn send(stream: &mut UnixStream, words: &[u32], descriptor: &File) -> Option<Vec<u8>> {
    let message: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    assert_eq!(stream.send_with_fd(&message[..], descriptor.as_raw_fd()).unwrap(), message.len());
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = vec![0; 20];
    let read = stream.read_exact(&mut answer).is_ok();
    read.then_some(answer)
}

/// Sends a message by hand, and returns what is answered to it.
fn ask(stream: &mut UnixStream, words: &[u32]) -> Option<Vec<u8>> {
    let message: Vec<u8> = words.iter().flat_map(|word| word.to_ne_bytes()).collect();
    stream.write_all(&message).unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = vec![0; 20];
    let read = stream.read_exact(&mut answer).is_ok();
    read.then_some(answer)
}

#[test]
fn a_log_without_shared_memory_is_refused_and_a_descriptor_for_news_of_the_log_is_taken() {
    const NEED_REPLY: u32 = 1 | 1 << 3;
    const GET_FEATURES: u32 = 1;
    const SET_FEATURES: u32 = 2;
    const SET_LOG_BASE: u32 = 6;
    const SET_LOG_FD: u32 = 7;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const SET_PROTOCOL_FEATURES: u32 = 16;
    let setup = Setup::default();
    let (daemon, mut stream) = setup.device();
    ask(&mut stream, &[GET_FEATURES, 1, 0]).unwrap();
    ask(&mut stream, &[GET_PROTOCOL_FEATURES, 1, 0]).unwrap();
    // REPLY_ACK and nothing else.
    let message = [SET_PROTOCOL_FEATURES, 1, 8, 1 << 3, 0].map(u32::to_ne_bytes).concat();
    stream.write_all(&message).unwrap();
    let ack = |code: u32| Some([code, 1 | 1 << 2, 8, 0, 0].map(u32::to_ne_bytes).concat());
    assert_eq!(ask(&mut stream, &[SET_FEATURES, NEED_REPLY, 8, 1 << 30, 1]), ack(SET_FEATURES));
    let eventfd = as_file(&Ring::new(4).call);
    assert_eq!(send(&mut stream, &[SET_LOG_FD, NEED_REPLY, 0], &eventfd), ack(SET_LOG_FD));
    assert_eq!(send(&mut stream, &[SET_LOG_FD, NEED_REPLY, 8, 0, 0], &eventfd), ack(SET_LOG_FD));
    assert_eq!(ask(&mut stream, &[SET_LOG_BASE, 1, 8, 4096, 0]), None, "the session ends");
    daemon.join().unwrap();
}

#[test]
fn a_request_out_of_a_ring_that_failed_is_marked() {
    let (daemon, mut guest) = Setup::default().boot();
    let log = guest.begin_log();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_IN, 0, &[], 4096);
    guest.submit(0, 1, VIRTIO_BLK_T_OUT, 8, &[1; 512], 0);
    guest.kick(0);
    eventually("the requests reach the disk", || daemon.disk.waiting() == 2);
    guest.set_avail_index(0, 1000);
    guest.kick(0);
    eventually("the ring has failed", || guest.rings[0].error.read().is_ok());
    log.take();
    daemon.disk.hold(false);
    let data = Guest::buffer(0, 0) + 512;
    eventually("the page is marked", || log.take().contains(&(data / PAGE * PAGE)));
}
