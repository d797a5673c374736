//! What a well-behaved guest and its hypervisor may expect.

use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::{Duration, Instant};

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserProtocolFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo};
use vhost_brmr::event_loop::FrontEnds;
use vhost_brmr::testing::Event;
use virtio_bindings::virtio_blk::*;

use crate::support::*;

#[test]
fn the_offer_holds_every_feature_that_the_disk_can_serve_and_no_other() {
    let setup = Setup { queues: 2, ..Setup::default() };
    let (daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let features = guest.frontend.get_features().unwrap();
    for number in [1, 2, 6, 9, 10, 12, 13, 14, 26, 28, 29, 30, 32] {
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
    assert_eq!(daemon.disk.resets(), 0);
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
fn the_configuration_space_is_read_at_any_offset_and_nothing_in_it_changes() {
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
    assert!(guest.frontend.set_config(32, flags, &[0]).is_err(), "the cache cannot be turned off");
    guest.frontend.set_config(30, flags, &[0, 0, 1, 0]).unwrap();
    assert!(guest.frontend.set_config(0, flags, &[9]).is_err());
    assert!(guest.frontend.set_config(30, flags, &[7, 0, 0]).is_err());
    assert_eq!(guest.frontend.get_config(32, 1, flags, &[0]).unwrap().1, [1]);
}

/// Whether the disk is flushed behind a write.
fn flushes_behind_a_write(daemon: &Daemon, guest: &mut Guest) -> bool {
    let before = daemon.disk.log().len();
    assert_eq!(guest.write_disk(0, &pattern(512, 1)), OK);
    daemon.disk.log()[before..].contains(&Event::Completed(vhost_brmr::disk::Operation::Flush, 0, 0))
}

/// A front end tells a daemon once whether the cache is on. What it told an earlier one, the next does not know: after a restart of the
/// daemon, and where the guest has come by migration.
#[test]
fn a_guest_that_may_have_turned_the_cache_off_gets_write_through_until_it_says_that_it_flushes() {
    let setup = Setup::default();
    let flags = VhostUserConfigFlags::WRITABLE;
    let (first, mut guest) = setup.boot();
    assert!(!flushes_behind_a_write(&first, &mut guest), "a guest of today");
    guest.acknowledge_config_wce();
    for (said, flushes) in [(None, true), (Some(1), false), (Some(0), true), (Some(1), false)] {
        if let Some(said) = said {
            guest.frontend.set_config(32, flags, &[said]).unwrap();
        }
        assert_eq!(flushes_behind_a_write(&first, &mut guest), flushes, "after {said:?}");
        let byte = guest.frontend.get_config(32, 1, flags, &[0]).unwrap().1;
        assert_eq!(byte, [u8::from(!flushes)]);
    }
    // Another daemon goes on with the rings as they are: the first was started again, or the guest moved.
    guest.disconnect();
    let (second, stream) = setup.device();
    guest.reconnect(stream, &setup);
    guest.acknowledge_config_wce();
    guest.share_memory();
    let avail = guest.rings[0].avail;
    guest.start_ring(0, avail);
    assert!(flushes_behind_a_write(&second, &mut guest), "it may have turned the cache off since");
    guest.frontend.set_config(32, flags, &[1]).unwrap();
    assert!(!flushes_behind_a_write(&second, &mut guest));
    // A front end keeps the byte over a reset of the guest, and does not repeat the message.
    guest.frontend.reset_device().unwrap();
    guest.acknowledge_config_wce();
    let avail = guest.rings[0].avail;
    guest.start_ring(0, avail);
    assert!(flushes_behind_a_write(&second, &mut guest));
}

#[test]
fn a_ring_that_is_larger_than_offered_is_refused_with_what_to_do() {
    let setup = Setup::default();
    let (_daemon, stream) = setup.device();
    let guest = Guest::connect(stream, &setup);
    guest.frontend.set_vring_num(0, setup.queue_size).unwrap();
    assert!(guest.frontend.set_vring_num(0, setup.queue_size * 2).is_err());
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
    assert_eq!(daemon.disk.resets(), 1);
}

#[test]
fn a_guest_that_starts_its_rings_anew_has_reset_the_device_and_one_that_goes_on_has_not() {
    let (daemon, mut guest) = Setup::default().boot();
    assert_eq!(guest.flush(), OK);
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0, 1);
    assert_eq!(guest.flush(), OK);
    assert_eq!(daemon.disk.resets(), 0);
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0, 0);
    eventually("the disk is told of the reset", || daemon.disk.resets() == 1);
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
fn what_is_made_available_while_memory_changes_is_served_afterwards() {
    for removes in [false, true] {
        make_available_while_memory_changes(removes);
    }
}

fn make_available_while_memory_changes(removes: bool) {
    let (daemon, mut guest) = Setup::default().boot();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let extra = VhostUserMemoryRegionInfo {
        guest_phys_addr: GUEST_BASE << 8,
        memory_size: 4096,
        userspace_addr: USER_BASE << 1,
        mmap_offset: 0,
        mmap_handle: file.as_raw_fd(),
    };
    guest.frontend.add_mem_region(&extra).unwrap();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let (mut frontend, region) = (guest.frontend.clone(), guest.region());
    let replacer = std::thread::spawn(move || match removes {
        true => frontend.remove_mem_region(&extra).is_ok(),
        false => frontend.set_mem_table(&[region]).is_ok(),
    });
    std::thread::sleep(Duration::from_millis(50));
    assert!(!replacer.is_finished(), "answered while the disk may still use the memory of before");
    guest.submit(0, 1, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    std::thread::sleep(Duration::from_millis(50));
    assert_eq!(daemon.disk.waiting(), 1, "took a request while it waits for the end of all");
    daemon.disk.hold(false);
    assert!(replacer.join().unwrap());
    // The kick was for nothing, and none comes after it.
    assert_eq!(guest.used(0, 2).len(), 2);
}

#[test]
fn what_completes_in_a_stopped_ring_is_told_to_nobody_and_the_ring_can_be_started_again() {
    let setup = Setup { drain_timeout: Duration::from_millis(20), ..Setup::default() };
    let (daemon, mut guest) = setup.boot();
    daemon.disk.hold(true);
    daemon.disk.ignore_cancel();
    guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 1);
    daemon.disk.hold(false);
    eventually("the request completes", || daemon.disk.waiting() == 0);
    guest.settle();
    assert_eq!(guest.used_index(0), 0, "the guest was told by a ring that is stopped");
    guest.start_ring(0, 1);
    assert_eq!(guest.flush(), OK);
    assert_eq!(guest.used_index(0), 1);
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
