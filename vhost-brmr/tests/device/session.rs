//! What a well-behaved guest and its hypervisor may expect.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_brmr::disk::Operation;
use vhost_brmr::event_loop::{EventLoop, FrontEnds, LoopError};
use vhost_brmr::inflight::Inflight;
use vhost_brmr::sys::StopSignals;
use vhost_brmr::testing::{Event, Handle, MemoryDisk};
use virtio_bindings::virtio_blk::*;

use crate::support::*;

const OK: u8 = 0;
const IOERR: u8 = 1;
const UNSUPP: u8 = 2;

fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8 ^ seed).collect()
}

#[test]
fn the_offer_holds_every_feature_that_the_disk_can_serve_and_no_other() {
    let setup = Setup { queues: 2, ..Setup::default() };
    let (daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let features = guest.frontend.get_features().unwrap();
    for number in [1, 2, 6, 9, 10, 11, 12, 13, 14, 26, 28, 29, 30, 32] {
        assert_ne!(features & bit(number), 0, "feature {number} is missing");
    }
    assert_eq!(features & bit(VIRTIO_BLK_F_RO), 0);
    let protocol = guest.frontend.get_protocol_features().unwrap();
    let expected = VhostUserProtocolFeatures::MQ
        | VhostUserProtocolFeatures::CONFIG
        | VhostUserProtocolFeatures::REPLY_ACK
        | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
        | VhostUserProtocolFeatures::RESET_DEVICE
        | VhostUserProtocolFeatures::BACKEND_REQ
        | VhostUserProtocolFeatures::INFLIGHT_SHMFD
        | VhostUserProtocolFeatures::LOG_SHMFD;
    assert_eq!(protocol, expected);
    assert_eq!(guest.frontend.get_queue_num().unwrap(), 2);
    assert_eq!(guest.frontend.get_max_mem_slots().unwrap(), 509);
    drop(guest);
    daemon.join().unwrap();

    let mut geometry = setup.geometry;
    (geometry.discard, geometry.write_zeroes) = (None, None);
    let setup = Setup { geometry, ..Setup::default() };
    let (_daemon, stream) = setup.device();
    let features = Guest::connect(stream, &setup).frontend.get_features().unwrap();
    for number in [VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES] {
        assert_eq!(features & bit(number), 0, "feature {number} cannot be served");
    }
}

#[test]
fn what_is_written_is_read_back_and_used_lengths_count_what_the_guest_got() {
    let (daemon, mut guest) = Setup::default().boot();
    let data = pattern(8192, 1);
    let write = guest.request(0, VIRTIO_BLK_T_OUT, 8, &data, 0);
    assert_eq!((write.status, write.used_length), (OK, 1));
    assert_eq!(guest.flush(), OK);
    let read = guest.read_disk(8, 8192);
    assert_eq!((read.status, read.used_length), (OK, 8193));
    assert!(read.data == data);
    assert!(daemon.disk.data()[4096..12288] == data[..]);
    let sector = pattern(512, 9);
    assert_eq!(guest.write_disk(2047, &sector), OK);
    assert!(guest.read_disk(2047, 512).data == sector);
    drop(guest);
    daemon.join().unwrap();
}

#[test]
fn get_id_returns_the_serial_padded_with_zeroes() {
    let (_daemon, mut guest) = Setup::default().boot();
    let reply = guest.request(0, VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((reply.status, reply.used_length), (OK, 21));
    assert_eq!(&reply.data, b"serial-0123\0\0\0\0\0\0\0\0\0");
    let short = guest.request(0, VIRTIO_BLK_T_GET_ID, 0, &[], 6);
    assert_eq!((short.status, &short.data[..]), (OK, &b"serial"[..]));
}

#[test]
fn discard_and_write_zeroes_work_on_all_their_ranges_and_complete_once() {
    let (daemon, mut guest) = Setup::default().boot();
    assert_eq!(guest.write_disk(0, &pattern(16384, 7)), OK);
    let ranges = [range(0, 8, 0), range(16, 8, 0)].concat();
    daemon.disk.hold(true);
    guest.submit(0, 1, VIRTIO_BLK_T_WRITE_ZEROES, 0, &ranges, 0);
    guest.kick(0);
    eventually("both ranges reach the disk", || daemon.disk.waiting() == 2);
    assert!(guest.used_within(0, 1, Duration::from_millis(50)).is_empty());
    daemon.disk.hold(false);
    assert_eq!(guest.used(0, 1), [(4, 1)]);
    assert!(guest.used_within(0, 1, Duration::from_millis(50)).is_empty());
    assert_eq!(guest.status(0, 1), OK);
    let zeroed = guest.read_disk(0, 16384).data;
    assert!(zeroed[..4096].iter().all(|byte| *byte == 0));
    assert!(zeroed[4096..8192] == pattern(16384, 7)[4096..8192]);
    assert!(zeroed[8192..12288].iter().all(|byte| *byte == 0));
    assert_eq!(guest.request(0, VIRTIO_BLK_T_DISCARD, 0, &range(8, 8, 0), 0).status, OK);
    assert_eq!(guest.request(0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(8, 8, 1), 0).status, OK);
    let log = daemon.disk.log();
    assert!(log.contains(&Event::Submitted(Operation::Discard, 4096, 4096)));
    assert!(log.contains(&Event::Submitted(Operation::WriteZeroes { unmap: true }, 4096, 4096)));
    // One failed range fails the request.
    daemon.disk.fail_next(1);
    assert_eq!(guest.request(0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &ranges, 0).status, IOERR);
}

#[test]
fn discards_beyond_the_limits_are_refused() {
    let (daemon, mut guest) = Setup::default().boot();
    let five = [(); 5].map(|()| range(0, 1, 0)).concat();
    for (ranges, status) in [
        (range(0, 2049, 0), IOERR),
        (range(2048, 1, 0), IOERR),
        (range(u64::MAX / 512, 8, 0), IOERR),
        (range(u64::MAX, 1, 0), IOERR),
        (range(0, 0, 0), IOERR),
        (range(0, 8, 1), UNSUPP),
        (range(0, 8, 2), UNSUPP),
        (five, IOERR),
        (range(0, 8, 0)[..15].to_vec(), IOERR),
        ([range(0, 8, 0), vec![0; 8]].concat(), IOERR),
        (Vec::new(), IOERR),
    ] {
        assert_eq!(guest.request(0, VIRTIO_BLK_T_DISCARD, 0, &ranges, 0).status, status, "{ranges:?}");
    }
    let submitted = daemon.disk.log().iter().filter(|event| matches!(event, Event::Submitted(..))).count();
    assert_eq!(submitted, 0);
    assert_eq!(guest.request(0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 2), 0).status, UNSUPP);
}

#[test]
fn four_queues_are_served_side_by_side() {
    let setup = Setup { queues: 4, ..Setup::default() };
    let (_daemon, mut guest) = setup.boot();
    for queue in 0..4 {
        let data = pattern(4096, queue as u8);
        guest.submit(queue, 3, VIRTIO_BLK_T_OUT, queue as u64 * 8, &data, 0);
    }
    for queue in (0..4).rev() {
        guest.kick(queue);
    }
    for queue in 0..4 {
        assert_eq!(guest.used(queue, 1), [(12, 1)]);
        assert_eq!(guest.status(queue, 3), OK);
    }
    for queue in 0..4u8 {
        assert!(guest.read_disk(u64::from(queue) * 8, 4096).data == pattern(4096, queue));
    }
}

#[test]
fn a_request_may_be_an_indirect_table_of_any_framing() {
    let (_daemon, mut guest) = Setup::default().boot();
    let data = pattern(1024, 3);
    let at = guest.fill(0, 0, VIRTIO_BLK_T_OUT, 4, &data);
    // The header in three pieces, the last of which also holds the first data bytes.
    guest.write(at + 528, &data);
    let mut joined = header(VIRTIO_BLK_T_OUT, 4)[9..].to_vec();
    joined.extend(&data[..100]);
    guest.write(at + 4096, &joined);
    let buffers = [
        (at, 4, false),
        (at + 4, 5, false),
        (at + 4096, 107, false),
        (at + 528 + 100, 900, false),
        (at + 528, 0, false),
        (at + 528 + 1000, 24, false),
        (at + 31, 1, true),
    ];
    let table = Guest::indirect_table(0);
    guest.chain(table, 0, &buffers);
    let length = 16 * u32::try_from(buffers.len()).unwrap();
    guest.descriptor(Guest::table(0), 5, GUEST_BASE + table, length, INDIRECT_FLAG, 0);
    guest.make_available(0, 5);
    guest.kick(0);
    assert_eq!(guest.used(0, 1), [(5, 1)]);
    assert_eq!(guest.status(0, 0), OK);
    // Data and status of a read in one descriptor.
    let at = guest.fill(0, 1, VIRTIO_BLK_T_IN, 4, &[]);
    guest.chain(Guest::table(0), 8, &[(at, 16, false), (at + 512, 1, true), (at + 513, 1024, true)]);
    guest.make_available(0, 8);
    guest.kick(0);
    assert_eq!(guest.used(0, 1), [(8, 1025)]);
    assert!(guest.read(at + 512, 1024) == data);
    assert_eq!(guest.read(at + 1536, 1), [OK]);
}

#[test]
fn completions_may_come_in_any_order() {
    let (daemon, mut guest) = Setup::default().boot();
    daemon.disk.hold(true);
    daemon.disk.reverse(true);
    for slot in 0..8u16 {
        let data = pattern(512, slot as u8);
        guest.submit(0, slot, VIRTIO_BLK_T_OUT, u64::from(slot), &data, 0);
    }
    guest.kick(0);
    eventually("all requests reach the disk", || daemon.disk.waiting() == 8);
    daemon.disk.hold(false);
    let heads: Vec<_> = guest.used(0, 8).into_iter().map(|(head, _)| head).collect();
    assert_eq!(heads, [28, 24, 20, 16, 12, 8, 4, 0]);
    for slot in 0..8u16 {
        assert_eq!(guest.status(0, slot), OK);
        assert!(guest.read_disk(u64::from(slot), 512).data == pattern(512, slot as u8));
    }
}

#[test]
fn with_event_indices_the_guest_is_notified_when_it_asked_to_be() {
    let (daemon, mut guest) = Setup::default().boot();
    daemon.disk.hold(true);
    for slot in 0..4 {
        guest.submit(0, slot, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    }
    guest.kick(0);
    eventually("all requests reach the disk", || daemon.disk.waiting() == 4);
    eventually("the device asks for the next kick", || guest.avail_event(0) == 4);
    guest.set_used_event(0, 10);
    daemon.disk.hold(false);
    eventually("all requests are used", || guest.used_index(0) == 4);
    assert!(!guest.rings[0].wait_call(Duration::from_millis(50)), "notified too early");
    assert_eq!(guest.used(0, 4).len(), 4);
    // A batch that passes the event notifies once.
    daemon.disk.hold(true);
    for slot in 0..4 {
        guest.submit(0, slot, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    }
    guest.kick(0);
    eventually("all requests reach the disk", || daemon.disk.waiting() == 4);
    guest.set_used_event(0, 5);
    daemon.disk.hold(false);
    assert!(guest.rings[0].wait_call(PATIENCE));
    assert_eq!(guest.used_index(0), 8);
    assert!(!guest.rings[0].wait_call(Duration::from_millis(50)), "notified twice");
}

#[test]
fn without_event_indices_the_flag_of_the_avail_ring_is_respected() {
    let setup = Setup { features: !bit(29), ..Setup::default() };
    let (_daemon, mut guest) = setup.boot();
    guest.set_avail_flags(0, 1);
    guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    eventually("the request is used", || guest.used_index(0) == 1);
    assert!(!guest.rings[0].wait_call(Duration::from_millis(50)), "notified although interrupts are off");
    assert_eq!(guest.used(0, 1).len(), 1);
    guest.set_avail_flags(0, 0);
    assert_eq!(guest.flush(), OK);
}

#[test]
fn what_is_used_before_a_call_descriptor_comes_is_notified_through_it() {
    for features in [ALL, ALL & !bit(29)] {
        let (_daemon, mut guest) = Setup { features, ..Setup::default() }.boot();
        if guest.event_idx {
            guest.set_used_event(0, 0);
        }
        guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
        guest.kick(0);
        // As QEMU does after each start of a ring: the first descriptor is one that no interrupt of the guest hangs on.
        eventually("the request is used", || guest.used_index(0) == 1);
        guest.rings[0].replace_call();
        guest.frontend.set_vring_call(0, &guest.rings[0].call).unwrap();
        assert!(guest.rings[0].wait_call(PATIENCE), "the guest waits for ever");
    }
}

#[test]
fn get_vring_base_drains_keeps_the_index_and_the_ring_goes_on_from_there() {
    let (daemon, mut guest) = Setup { queues: 2, ..Setup::default() }.boot();
    for _ in 0..3 {
        assert_eq!(guest.flush(), OK);
    }
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 5), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let frontend = guest.frontend.clone();
    let stopper = std::thread::spawn(move || frontend.get_vring_base(0).unwrap());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!stopper.is_finished(), "answered with a request in flight");
    // The other ring and the disk are served meanwhile.
    guest.submit(1, 0, VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    guest.kick(1);
    assert_eq!(guest.used(1, 1).len(), 1);
    daemon.disk.hold(false);
    assert_eq!(stopper.join().unwrap(), 4);
    assert_eq!(guest.used_index(0), 4);
    assert_eq!(guest.used(0, 1), [(0, 1)]);
    // Nothing is served while stopped, and a kick that came meanwhile is not lost.
    guest.submit(0, 1, VIRTIO_BLK_T_OUT, 1, &pattern(512, 6), 0);
    guest.kick(0);
    assert!(guest.used_within(0, 1, Duration::from_millis(50)).is_empty());
    guest.start_ring(0, 4);
    assert_eq!(guest.used(0, 1), [(4, 1)]);
    assert!(guest.read_disk(1, 512).data == pattern(512, 6));
    assert_eq!(daemon.disk.resets(), 1, "by the start of the guest, and not by its pause");
}

#[test]
fn a_drain_that_takes_too_long_cancels_and_still_answers() {
    let setup = Setup { drain_timeout: Duration::from_millis(100), ..Setup::default() };
    let (daemon, mut guest) = setup.boot();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 5), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 1);
    assert_eq!(guest.used(0, 1), [(0, 1)]);
    assert_eq!(guest.status(0, 0), IOERR);
    assert!(daemon.disk.log().contains(&Event::Cancelled));
    // A disk that does not even let go of a request does not hold up the hypervisor for ever.
    guest.start_ring(0, 1);
    daemon.disk.ignore_cancel();
    guest.submit(0, 1, VIRTIO_BLK_T_OUT, 0, &pattern(512, 5), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let start = Instant::now();
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 2);
    assert!(start.elapsed() < PATIENCE);
    // What completes too late is not given to a ring that was started anew.
    guest.start_ring(0, 2);
    daemon.disk.hold(false);
    eventually("the request completes", || daemon.disk.waiting() == 0);
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.used_index(0), 2);
}

#[test]
fn a_disabled_ring_rests_and_is_looked_at_when_it_is_enabled() {
    let (_daemon, mut guest) = Setup::default().boot();
    guest.frontend.set_vring_enable(0, false).unwrap();
    guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    assert!(guest.used_within(0, 1, Duration::from_millis(50)).is_empty());
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.used(0, 1).len(), 1);
}

#[test]
fn a_request_that_was_available_before_the_first_kick_is_served() {
    let setup = Setup::default();
    let (_daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    guest.share_memory();
    guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.start_ring(0, 0);
    assert_eq!(guest.used(0, 1).len(), 1);
}

#[test]
fn the_disk_is_attached_with_the_first_ring_and_detached_with_the_front_end() {
    let setup = Setup::default();
    let (daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    guest.share_memory();
    guest.configure_ring(0, 0);
    assert_eq!(daemon.disk.log(), []);
    guest.start_ring(0, 0);
    eventually("the disk is attached", || daemon.disk.log() == [Event::Attached]);
    drop(guest);
    eventually("the disk is detached", || daemon.disk.log() == [Event::Attached, Event::Detached]);
    daemon.join().unwrap();
}

#[test]
fn a_disk_that_is_refused_ends_the_daemon_with_the_reason() {
    let setup = Setup::default();
    let (daemon, stream) = setup.device();
    daemon.disk.refuse("held by client 7 on host x");
    let _guest = Guest::boot(stream, &setup);
    let error = daemon.join().unwrap_err().to_string();
    assert!(error.contains("held by client 7 on host x"), "{error}");
}

#[test]
fn a_front_end_that_comes_back_finds_the_disk_as_it_left_it() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let setup = Setup::default();
    let daemon = setup.serve(FrontEnds::Listener(listener));
    for round in 0..3u8 {
        let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
        if round > 0 {
            assert!(guest.read_disk(0, 512).data == pattern(512, round - 1));
        }
        assert_eq!(guest.write_disk(0, &pattern(512, round)), OK);
        // A second front end is turned away, and the first does not notice.
        let mut second = vhost::vhost_user::Frontend::from_stream(UnixStream::connect(&path).unwrap(), 1);
        assert!(second.get_features().is_err());
        assert!(second.get_queue_num().is_err());
        assert_eq!(guest.flush(), OK);
    }
    let detached = || daemon.disk.log().iter().filter(|event| **event == Event::Detached).count() == 3;
    eventually("the disk is detached for the third time", detached);
}

#[test]
fn a_guest_that_vanishes_in_mid_request_costs_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    let setup = Setup::default();
    let daemon = setup.serve(FrontEnds::Listener(listener));
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    let data = pattern(4096, 77);
    assert_eq!(guest.write_disk(8, &data), OK);
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &data, 0);
    guest.submit(0, 1, VIRTIO_BLK_T_IN, 8, &[], 4096);
    guest.kick(0);
    eventually("both requests reach the disk", || daemon.disk.waiting() == 2);
    let file = guest.file.try_clone().unwrap();
    drop(guest);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!daemon.disk.log().contains(&Event::Detached), "detached with requests in flight");
    // The disk reads and writes the memory of the guest that is gone: it is still mapped.
    daemon.disk.hold(false);
    eventually("the disk is detached", || daemon.disk.log().contains(&Event::Detached));
    assert!(daemon.disk.data()[..4096] == data[..]);
    let mut late = vec![0; 4096];
    let at = GUARD + Guest::buffer(0, 1) + 512;
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut late, at).unwrap();
    assert!(late == data);
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    assert!(guest.read_disk(0, 4096).data == data);
}

#[test]
fn a_front_end_that_goes_while_it_waits_for_a_drain_ends_the_session() {
    let (daemon, mut guest) = Setup::default().boot();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 5), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    // GET_VRING_BASE for ring 0, by hand, because the front end would wait for the answer.
    let message: Vec<u8> = [11u32, 1, 8, 0, 0].into_iter().flat_map(u32::to_ne_bytes).collect();
    let fd = guest.frontend.as_raw_fd();
    // SAFETY: the descriptor is open and stays owned by the front end.
    let stream = unsafe { <UnixStream as std::os::fd::FromRawFd>::from_raw_fd(fd) };
    std::io::Write::write_all(&mut &stream, &message).unwrap();
    std::mem::forget(stream);
    std::thread::sleep(Duration::from_millis(20));
    assert!(!daemon.disk.is_detaching());
    drop(guest);
    eventually("the session ends", || daemon.disk.is_detaching());
    daemon.disk.hold(false);
    daemon.join().unwrap();
}

#[test]
fn memory_is_added_and_removed_while_the_guest_runs() {
    let (daemon, mut guest) = Setup::default().boot();
    let extra = tempfile::tempfile().unwrap();
    extra.set_len(1 << 20).unwrap();
    let base = GUEST_BASE + MEMORY_SIZE;
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: base,
        memory_size: 1 << 20,
        userspace_addr: USER_BASE + (1 << 32),
        mmap_offset: 0,
        mmap_handle: extra.as_raw_fd(),
    };
    let read_into = |guest: &mut Guest, address: u64| {
        let at = guest.fill(0, 0, VIRTIO_BLK_T_IN, 0, &[]);
        let table = Guest::table(0);
        guest.descriptor(table, 0, GUEST_BASE + at, 16, NEXT, 1);
        guest.descriptor(table, 1, address, 4096, NEXT | WRITE, 2);
        guest.descriptor(table, 2, GUEST_BASE + at + 31, 1, WRITE, 0);
        guest.make_available(0, 0);
        guest.kick(0);
    };
    assert_eq!(guest.write_disk(0, &pattern(4096, 3)), OK);
    read_into(&mut guest, base);
    guest.used(0, 1);
    assert_eq!(guest.status(0, 0), IOERR);
    guest.frontend.add_mem_region(&region).unwrap();
    assert!(guest.frontend.add_mem_region(&region).is_err(), "an overlapping region was accepted");
    // One buffer across two regions.
    read_into(&mut guest, base - 2048);
    guest.used(0, 1);
    assert_eq!(guest.status(0, 0), OK);
    let mut bytes = vec![0; 2048];
    std::os::unix::fs::FileExt::read_exact_at(&extra, &mut bytes, 0).unwrap();
    assert!(bytes == pattern(4096, 3)[2048..]);
    // Removal waits for what is in flight.
    daemon.disk.hold(true);
    read_into(&mut guest, base);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let mut frontend = guest.frontend.clone();
    let remover = std::thread::spawn(move || frontend.remove_mem_region(&region).is_ok());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!remover.is_finished(), "removed with a request in flight");
    daemon.disk.hold(false);
    assert!(remover.join().unwrap());
    guest.used(0, 1);
    assert_eq!(guest.status(0, 0), OK);
    assert!(guest.frontend.remove_mem_region(&region).is_err(), "removed twice");
    read_into(&mut guest, base);
    guest.used(0, 1);
    assert_eq!(guest.status(0, 0), IOERR);
    // The whole table may be announced again while the ring runs.
    guest.share_memory();
    assert_eq!(guest.flush(), OK);
}

#[test]
fn impossible_memory_regions_are_refused_and_the_session_goes_on() {
    let (_daemon, mut guest) = Setup::default().boot();
    let good = guest.region();
    let other = VhostUserMemoryRegionInfo { guest_phys_addr: GUEST_BASE + (1 << 32), ..good };
    let size = MEMORY_SIZE + 2 * GUARD;
    for bad in [
        VhostUserMemoryRegionInfo { mmap_offset: size, ..other },
        VhostUserMemoryRegionInfo { mmap_offset: GUARD * 2 + 4096, ..other },
        VhostUserMemoryRegionInfo { mmap_offset: 100, memory_size: 4096, ..other },
        VhostUserMemoryRegionInfo { mmap_offset: u64::MAX - 4095, ..other },
        VhostUserMemoryRegionInfo { guest_phys_addr: u64::MAX - 4095, ..other },
        VhostUserMemoryRegionInfo { userspace_addr: u64::MAX - 4095, ..other },
        VhostUserMemoryRegionInfo { guest_phys_addr: GUEST_BASE + 4096, ..other },
    ] {
        assert!(guest.frontend.add_mem_region(&bad).is_err());
        assert_eq!(guest.flush(), OK);
    }
}

#[test]
fn the_configuration_space_is_read_at_any_offset_and_only_writeback_is_written() {
    let setup = Setup { queues: 3, ..Setup::default() };
    let (_daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let flags = VhostUserConfigFlags::WRITABLE;
    let mut get = |offset: u32, length: usize| {
        guest.frontend.get_config(offset, u32::try_from(length).unwrap(), flags, &vec![0; length]).unwrap().1
    };
    let all = get(0, 60);
    assert_eq!(all[..8], (DISK_SIZE / 512).to_le_bytes());
    assert_eq!(all[12..16], 126u32.to_le_bytes());
    assert_eq!(all[20..24], 512u32.to_le_bytes());
    assert_eq!(all[24..28], [3, 0, 8, 0]);
    assert_eq!(all[28..32], 128u32.to_le_bytes());
    assert_eq!(all[32], 1);
    assert_eq!(all[34..36], [3, 0]);
    assert_eq!(all[36..40], 2048u32.to_le_bytes());
    assert_eq!(all[40..44], 4u32.to_le_bytes());
    assert_eq!(all[44..48], 8u32.to_le_bytes());
    for (offset, length) in [(0, 1), (3, 7), (32, 1), (33, 27), (58, 10), (59, 1), (1000, 3)] {
        let mut expected = all.get(offset..(offset + length).min(60)).unwrap_or(&[]).to_vec();
        expected.resize(length, 0);
        assert_eq!(get(u32::try_from(offset).unwrap(), length), expected, "{length} bytes at {offset}");
    }
    assert_eq!(get(0, 256).len(), 256);
    guest.frontend.set_config(32, flags, &[0]).unwrap();
    assert_eq!(guest.frontend.get_config(32, 1, flags, &[0]).unwrap().1, [0]);
    guest.frontend.set_config(30, flags, &[0, 0, 1, 0]).unwrap();
    assert_eq!(guest.frontend.get_config(32, 1, flags, &[0]).unwrap().1, [1]);
    assert!(guest.frontend.set_config(0, flags, &[9]).is_err());
    assert!(guest.frontend.set_config(30, flags, &[7, 0, 0]).is_err());
    assert_eq!(guest.frontend.get_config(32, 1, flags, &[0]).unwrap().1, [1]);
}

#[test]
fn a_read_only_disk_refuses_every_change_and_allows_flushes() {
    let setup = Setup { read_only: true, ..Setup::default() };
    let (daemon, mut guest) = setup.boot();
    let features = guest.frontend.get_features().unwrap();
    assert_ne!(features & bit(VIRTIO_BLK_F_RO), 0);
    assert_eq!(features & (bit(VIRTIO_BLK_F_DISCARD) | bit(VIRTIO_BLK_F_WRITE_ZEROES)), 0);
    assert_eq!(guest.write_disk(0, &pattern(512, 1)), IOERR);
    assert_eq!(guest.request(0, VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 0), 0).status, IOERR);
    assert_eq!(guest.request(0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 0), 0).status, IOERR);
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.read_disk(0, 512).status, OK);
    let changed =
        |event: &Event| matches!(event, Event::Submitted(operation, ..) if *operation != Operation::Read);
    assert!(!daemon.disk.log().iter().any(changed));
}

#[test]
fn a_write_through_disk_answers_a_write_only_after_the_flush_behind_it() {
    for no_flush in [true, false] {
        let features = if no_flush { !bit(VIRTIO_BLK_F_FLUSH) } else { ALL };
        let (daemon, mut guest) = Setup { features, ..Setup::default() }.boot();
        if !no_flush {
            guest.frontend.set_config(32, VhostUserConfigFlags::WRITABLE, &[0]).unwrap();
        }
        daemon.disk.hold(true);
        for slot in 0..3u16 {
            guest.submit(0, slot, VIRTIO_BLK_T_OUT, u64::from(slot), &pattern(512, slot as u8), 0);
        }
        guest.submit(0, 3, VIRTIO_BLK_T_IN, 100, &[], 512);
        guest.kick(0);
        eventually("all requests reach the disk", || daemon.disk.waiting() == 4);
        daemon.disk.hold(false);
        assert_eq!(guest.used(0, 4).len(), 4);
        let flushed = |event: &&Event| matches!(event, Event::Submitted(Operation::Flush, ..));
        let flushes = || daemon.disk.log().iter().filter(flushed).count();
        assert_eq!(flushes(), 1, "writes that complete together share one flush");
        // A flush that fails fails the writes before it: the first failure is for the write, so let that pass.
        daemon.disk.hold(true);
        guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 1), 0);
        guest.kick(0);
        eventually("the write reaches the disk", || daemon.disk.waiting() == 1);
        let before = guest.used_index(0);
        daemon.disk.step();
        eventually("the flush reaches the disk", || flushes() == 2);
        assert_eq!(guest.used_index(0), before, "answered before the flush");
        daemon.disk.fail_next(1);
        daemon.disk.hold(false);
        assert_eq!(guest.used(0, 1).len(), 1);
        assert_eq!(guest.status(0, 0), IOERR);
        assert_eq!(guest.write_disk(0, &pattern(512, 1)), OK);
    }
}

#[test]
fn a_write_back_disk_answers_a_write_without_a_flush() {
    let (daemon, mut guest) = Setup::default().boot();
    assert_eq!(guest.write_disk(0, &pattern(512, 1)), OK);
    assert!(!daemon.disk.log().contains(&Event::Submitted(Operation::Flush, 0, 0)));
}

#[test]
fn errors_of_the_disk_become_io_errors_of_the_guest() {
    let (daemon, mut guest) = Setup::default().boot();
    daemon.disk.fail_next(3);
    assert_eq!(guest.write_disk(0, &pattern(512, 1)), IOERR);
    let read = guest.read_disk(0, 512);
    assert_eq!((read.status, read.used_length), (IOERR, 1));
    assert_eq!(guest.flush(), IOERR);
    assert_eq!(guest.flush(), OK);
}

#[test]
fn reset_device_stops_everything_and_the_device_can_be_set_up_again() {
    let setup = Setup::default();
    let (daemon, mut guest) = setup.boot();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 5), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let mut frontend = guest.frontend.clone();
    let resetter = std::thread::spawn(move || frontend.reset_device().is_ok());
    std::thread::sleep(Duration::from_millis(20));
    assert!(!resetter.is_finished(), "answered with a request in flight");
    daemon.disk.hold(false);
    assert!(resetter.join().unwrap());
    guest.used(0, 1);
    guest.submit(0, 1, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    assert!(guest.used_within(0, 1, Duration::from_millis(50)).is_empty());
    guest.frontend.set_features(guest.frontend.get_features().unwrap()).unwrap();
    let avail = guest.rings[0].avail;
    guest.start_ring(0, avail - 1);
    assert_eq!(guest.used(0, 1), [(4, 1)]);
    assert_eq!(daemon.disk.resets(), 2, "by the start of the guest, and by its reset");
}

#[test]
fn a_guest_that_starts_its_rings_anew_has_reset_the_device_and_one_that_goes_on_has_not() {
    let (daemon, mut guest) = Setup::default().boot();
    assert_eq!(guest.flush(), OK);
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0, 1);
    assert_eq!(guest.flush(), OK);
    assert_eq!(daemon.disk.resets(), 1);
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0, 0);
    eventually("the disk is told of the reset", || daemon.disk.resets() == 2);
}

#[test]
fn messages_that_make_no_sense_are_refused_and_the_session_goes_on() {
    let (_daemon, mut guest) = Setup { queues: 2, ..Setup::default() }.boot();
    assert!(guest.frontend.set_vring_base(0, 5).is_err(), "base of a running ring");
    assert!(guest.frontend.set_vring_num(0, 32).is_err(), "size of a running ring");
    guest.frontend.get_vring_base(1).unwrap();
    assert!(guest.frontend.set_vring_num(1, 3).is_err(), "size that is no power of two");
    assert!(guest.frontend.set_vring_num(1, 128).is_err(), "size above the limit");
    let nowhere = vhost::VringConfigData {
        queue_max_size: 64,
        queue_size: 64,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    assert!(guest.frontend.set_vring_addr(1, &nowhere).is_err(), "addresses outside memory");
    assert!(guest.frontend.set_features(bit(50)).is_err(), "a feature that was not offered");
    assert_eq!(guest.flush(), OK);
    // A ring whose last part lies beyond the end of memory.
    let end = USER_BASE + MEMORY_SIZE;
    let cut = vhost::VringConfigData {
        desc_table_addr: USER_BASE,
        avail_ring_addr: USER_BASE + 0x8000,
        used_ring_addr: end - 64,
        ..nowhere
    };
    guest.frontend.set_vring_num(1, 64).unwrap();
    guest.frontend.set_vring_addr(1, &cut).unwrap();
    let kick = guest.rings[1].kick.try_clone().unwrap();
    assert!(guest.frontend.set_vring_kick(1, &kick).is_err(), "a ring beyond the end of memory");
    assert_eq!(guest.flush(), OK);
}

#[test]
fn a_kick_descriptor_that_cannot_be_watched_fails_its_ring_only() {
    let (_daemon, mut guest) = Setup { queues: 2, ..Setup::default() }.boot();
    guest.frontend.get_vring_base(1).unwrap();
    guest.configure_ring(1, 0);
    let regular = as_eventfd(File::open("/proc/self/exe").unwrap());
    guest.frontend.set_vring_kick(1, &regular).unwrap();
    eventually("the error descriptor is written", || guest.rings[1].error.read().is_ok());
    assert_eq!(guest.flush(), OK);
}

#[test]
fn a_polling_device_serves_and_sleeps_again() {
    let setup = Setup { poll: Duration::from_micros(500), features: !bit(29), ..Setup::default() };
    let (_daemon, mut guest) = setup.boot();
    for round in 0..200u8 {
        assert_eq!(guest.write_disk(u64::from(round), &pattern(512, round)), OK);
        if round % 20 == 0 {
            eventually("it sleeps, and wants to be kicked", || guest.used_flags(0) & 1 == 0);
        }
    }
    assert!(guest.read_disk(100, 512).data == pattern(512, 100));
}

#[test]
fn a_kick_for_nothing_does_not_make_a_polling_device_deaf() {
    let setup = Setup { poll: Duration::from_micros(100), features: !bit(29), ..Setup::default() };
    let (_daemon, mut guest) = setup.boot();
    for _ in 0..3 {
        guest.kick(0);
        std::thread::sleep(Duration::from_millis(20));
        eventually("it sleeps, and wants to be kicked", || guest.used_flags(0) & 1 == 0);
        assert_eq!(guest.flush(), OK);
    }
}

/// A region for the guest's rings, as a front end keeps it.
fn inflight_region(guest: &mut Guest) -> (VhostUserInflight, File) {
    let queues = u16::try_from(guest.rings.len()).unwrap();
    let wanted = VhostUserInflight::new(0, 0, queues, guest.rings[0].size);
    guest.frontend.get_inflight_fd(&wanted).unwrap()
}

#[test]
fn a_daemon_that_was_killed_is_followed_by_one_that_serves_what_was_in_flight_in_order() {
    let setup = Setup::default();
    let (first, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let (region, file) = inflight_region(&mut guest);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 0);
    assert_eq!(guest.flush(), OK);
    first.disk.hold(true);
    for slot in [3, 1, 0, 2] {
        guest.submit(0, slot, VIRTIO_BLK_T_OUT, u64::from(slot), &pattern(512, slot as u8), 0);
    }
    guest.kick(0);
    eventually("all requests reach the disk", || first.disk.waiting() == 4);
    // The last of them completes first.
    first.disk.reverse(true);
    first.disk.step();
    assert_eq!(guest.used(0, 1), [(8, 1)]);
    // The note is written after the used index that was just seen.
    guest.settle();
    let mut noted = [0; 4];
    std::os::unix::fs::FileExt::read_exact_at(&file, &mut noted, 12).unwrap();
    assert_eq!(noted, [8, 0, 2, 0], "last head and used index in the region");
    // For the guest and its hypervisor, a daemon whose socket closes is dead; what this one holds stays held.
    guest.disconnect();
    let (second, stream) = setup.device();
    guest.reconnect(stream, &setup);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    // Made available while no daemon was there; and the front end names the avail index as cloud-hypervisor does.
    guest.submit(0, 4, VIRTIO_BLK_T_OUT, 4, &pattern(512, 4), 0);
    let avail = guest.rings[0].avail;
    guest.start_ring(0, avail);
    let heads: Vec<_> = guest.used(0, 4).into_iter().map(|(head, _)| head).collect();
    assert_eq!(heads, [12, 4, 0, 16]);
    assert_eq!(guest.used_index(0), 6);
    let data = second.disk.data();
    for slot in [0, 1, 3, 4usize] {
        assert!(data[slot * 512..][..512] == pattern(512, slot as u8)[..], "slot {slot}");
    }
    // Nothing is left in flight, so nothing is served twice.
    guest.disconnect();
    let (third, stream) = setup.device();
    guest.reconnect(stream, &setup);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 0);
    assert_eq!(guest.flush(), OK);
    assert_eq!(third.disk.log().iter().filter(|event| matches!(event, Event::Submitted(..))).count(), 1);
}

#[test]
fn a_crash_between_the_used_element_and_its_note_does_not_serve_a_request_twice() {
    let setup = Setup::default();
    let (_daemon, mut guest) = setup.boot();
    let (region, file) = inflight_region(&mut guest);
    let write = |at: u64, bytes: &[u8]| std::os::unix::fs::FileExt::write_all_at(&file, bytes, at).unwrap();
    // As a daemon leaves it: version 1, 64 descriptors, last head 8, used index 6; heads 8 and 20 are noted.
    write(8, &[1, 0, 64, 0, 8, 0, 6, 0]);
    write(16 + 8 * 16, &[1]);
    write(16 + 20 * 16, &[1]);
    let inflight = Inflight::map(&region, &file).unwrap();
    let same = inflight.recover(0, 64, 6).unwrap();
    assert_eq!(same.heads, [8, 20]);
    let later = inflight.recover(0, 64, 7).unwrap();
    assert_eq!(later.heads, [20]);
    assert_eq!(inflight.recover(0, 64, 7).unwrap().heads, [20]);
    // Counters decide on the order.
    write(16 + 3 * 16, &[1, 0, 0, 0, 0, 0, 0, 0, 5]);
    write(16 + 20 * 16, &[1, 0, 0, 0, 0, 0, 0, 0, 9]);
    let ordered = inflight.recover(0, 64, 7).unwrap();
    assert_eq!((ordered.heads, ordered.counter), (vec![3, 20], 10));
}

#[test]
fn an_inflight_region_that_makes_no_sense_is_refused_and_a_fresh_one_is_empty() {
    let setup = Setup::default();
    let (_daemon, mut guest) = setup.boot();
    assert!(
        guest
            .frontend
            .set_inflight_fd(&VhostUserInflight::new(64, 0, 1, 64), guest.file.as_raw_fd())
            .is_err()
    );
    guest.frontend.get_vring_base(0).unwrap();
    let (region, file) = inflight_region(&mut guest);
    let size = region.mmap_size;
    for bad in [
        VhostUserInflight::new(size - 64, 0, 1, 64),
        VhostUserInflight::new(size + 4096, 0, 1, 64),
        VhostUserInflight::new(size, u64::MAX - 4095, 1, 64),
        VhostUserInflight::new(size, 0, 1, 65535),
    ] {
        assert!(guest.frontend.set_inflight_fd(&bad, file.as_raw_fd()).is_err());
    }
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    for bad in [[2, 0, 64, 0], [1, 0, 32, 0]] {
        std::os::unix::fs::FileExt::write_all_at(&file, &bad, 8).unwrap();
        guest.configure_ring(0, 0);
        let kick = guest.rings[0].kick.try_clone().unwrap();
        assert!(guest.frontend.set_vring_kick(0, &kick).is_err());
    }
    // In a region never used, slot 0 means nothing.
    std::os::unix::fs::FileExt::write_all_at(&file, &[0; 16], 0).unwrap();
    guest.start_ring(0, 0);
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.used_index(0), 1);
}

/// Runs the loop in a thread that takes SIGTERM, and gives the means to send it.
fn with_signals(setup: &Setup, stream: UnixStream) -> (Handle, impl Fn(), JoinHandle<Result<(), LoopError>>) {
    let (disk, handle) = MemoryDisk::new(setup.geometry).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let (options, behaviour) = setup.options();
    let thread = std::thread::spawn(move || {
        let signals = StopSignals::new().unwrap();
        // SAFETY: has no preconditions.
        sender.send(unsafe { libc::pthread_self() }).unwrap();
        EventLoop::new(disk, options, behaviour, FrontEnds::Connected(stream), Some(signals)).unwrap().run()
    });
    let thread_id = receiver.recv().unwrap();
    // SAFETY: the thread is not joined before the last signal.
    let stop = move || assert_eq!(unsafe { libc::pthread_kill(thread_id, libc::SIGTERM) }, 0);
    (handle, stop, thread)
}

#[test]
fn told_to_stop_the_daemon_waits_for_requests_in_flight_and_detaches_the_disk() {
    let setup = Setup::default();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (disk, stop, thread) = with_signals(&setup, theirs);
    let mut guest = Guest::boot(ours, &setup);
    disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 1), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || disk.waiting() == 1);
    stop();
    guest.settle();
    guest.submit(0, 1, VIRTIO_BLK_T_OUT, 0, &pattern(512, 2), 0);
    guest.kick(0);
    std::thread::sleep(Duration::from_millis(50));
    assert!(!thread.is_finished(), "ended with a request in flight");
    assert_eq!(disk.waiting(), 1, "took a request after it was told to stop");
    disk.hold(false);
    thread.join().unwrap().unwrap();
    assert_eq!(guest.used(0, 1), [(0, 1)]);
    assert_eq!(disk.log().last(), Some(&Event::Detached));
}

#[test]
fn a_stop_is_bounded_and_a_second_signal_ends_it_at_once() {
    for signals in [1, 2] {
        let drain_timeout = if signals == 1 { Duration::from_millis(100) } else { PATIENCE * 2 };
        let setup = Setup { drain_timeout, ..Setup::default() };
        let (ours, theirs) = UnixStream::pair().unwrap();
        let (disk, stop, thread) = with_signals(&setup, theirs);
        let mut guest = Guest::boot(ours, &setup);
        disk.hold(true);
        disk.ignore_cancel();
        guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 1), 0);
        guest.kick(0);
        eventually("the request reaches the disk", || disk.waiting() == 1);
        stop();
        if signals == 2 {
            // Two signals that it has not read yet are one.
            guest.settle();
            assert!(!thread.is_finished());
            stop();
        }
        let start = Instant::now();
        thread.join().unwrap().unwrap();
        assert!(start.elapsed() < PATIENCE);
    }
}

#[test]
fn a_stop_that_runs_out_of_time_leaves_what_is_in_flight_to_the_next_daemon() {
    let setup = Setup { drain_timeout: Duration::from_millis(100), ..Setup::default() };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (disk, stop, thread) = with_signals(&setup, theirs);
    let mut guest = Guest::connect(ours, &setup);
    let (region, file) = inflight_region(&mut guest);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 0);
    disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 1), 0);
    guest.submit(0, 1, VIRTIO_BLK_T_OUT, 1, &pattern(512, 2), 0);
    guest.kick(0);
    eventually("the requests reach the disk", || disk.waiting() == 2);
    stop();
    thread.join().unwrap().unwrap();
    assert!(disk.log().contains(&Event::Cancelled));
    assert_eq!(guest.used_index(0), 0, "the guest was told of an end that there was not");
    let second = setup.device();
    guest.reconnect(second.1, &setup);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 2);
    assert_eq!(guest.used(0, 2), [(0, 1), (4, 1)]);
    assert_eq!((guest.status(0, 0), guest.status(0, 1)), (OK, OK));
    assert!(second.0.disk.data()[..1024] == [pattern(512, 1), pattern(512, 2)].concat());
}

#[test]
fn a_front_end_whose_socket_cannot_be_watched_does_not_end_the_daemon_with_an_error() {
    let (disk, _handle) = MemoryDisk::new(Setup::default().geometry).unwrap();
    let (options, behaviour) = Setup::default().options();
    // epoll takes no ordinary file.
    let socket = UnixStream::from(OwnedFd::from(tempfile::tempfile().unwrap()));
    EventLoop::new(disk, options, behaviour, FrontEnds::Connected(socket), None).unwrap().run().unwrap();
}

#[test]
fn a_listener_that_cannot_accept_is_left_alone_for_a_while() {
    // Readable, and it refuses every accept, as one does in a process without free descriptors.
    let (socket, other) = UnixDatagram::pair().unwrap();
    other.send(b"x").unwrap();
    let daemon = Setup::default().serve(FrontEnds::Listener(UnixListener::from(OwnedFd::from(socket))));
    comes_to_rest(&daemon, Duration::from_millis(40));
}

/// Waits for 400 ms in which the loop uses less processor time than `limit`. It may take a while to get to where it waits, and
/// where it is woken again and again there are no such 400 ms.
fn comes_to_rest(daemon: &Daemon, limit: Duration) {
    let thread = daemon.thread.as_ref().unwrap();
    let mut spent = Vec::new();
    while spent.last().is_none_or(|spent| *spent >= limit) {
        assert!(spent.len() < 20, "{spent:?} of processor time, each in 400 ms of waiting");
        let before = cpu_time(thread);
        std::thread::sleep(Duration::from_millis(400));
        spent.push(cpu_time(thread) - before);
    }
}

/// CPU time that a thread has used.
fn cpu_time<T>(thread: &JoinHandle<T>) -> Duration {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the thread was not joined, and both results are valid for writing.
    let failed = unsafe {
        libc::pthread_getcpuclockid(std::os::unix::thread::JoinHandleExt::as_pthread_t(thread), &mut clock)
            + libc::clock_gettime(clock, &mut time)
    };
    assert_eq!(failed, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn an_idle_device_uses_no_cpu_also_with_requests_in_flight_and_after_polling() {
    for poll in [0, 500] {
        let setup = Setup { poll: Duration::from_micros(poll), ..Setup::default() };
        let (daemon, mut guest) = setup.boot();
        assert_eq!(guest.flush(), OK);
        daemon.disk.hold(true);
        guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
        guest.kick(0);
        eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
        let frontend = guest.frontend.clone();
        let stopper = std::thread::spawn(move || frontend.get_vring_base(0).is_ok());
        std::thread::sleep(Duration::from_millis(50));
        comes_to_rest(&daemon, Duration::from_millis(4));
        daemon.disk.hold(false);
        assert!(stopper.join().unwrap());
    }
}
