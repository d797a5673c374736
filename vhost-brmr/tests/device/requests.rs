//! Requests of a guest: what each of them does, how it is framed, and when the guest hears of its end.

use std::time::Duration;

use rmr_common::buffer::Segment;
use rmr_common::client::MAX_QUEUED;

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;
use vhost_brmr::disk::{Operation, Token};
use vhost_brmr::flight::{Flight, Origin, Progress};
use vhost_brmr::memory::GuestMemory;
use vhost_brmr::request::MAX_RANGES;
use vhost_brmr::testing::Event;
use virtio_bindings::virtio_blk::*;

use crate::support::*;

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
        // Of no sectors: there is nothing to be done.
        (range(0, 0, 0), OK),
        (range(2048, 0, 0), OK),
        (range(2049, 0, 0), IOERR),
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
    assert_eq!(guest.request(0, VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 0, 0), 0).status, OK);
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
            guest.acknowledge_config_wce();
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
fn a_flush_that_fails_fails_every_write_that_shares_it() {
    let features = !bit(VIRTIO_BLK_F_FLUSH);
    let (daemon, mut guest) = Setup { features, ..Setup::default() }.boot();
    daemon.disk.hold(true);
    for slot in 0..4u16 {
        guest.submit(0, slot, VIRTIO_BLK_T_OUT, u64::from(slot), &pattern(512, slot as u8), 0);
    }
    guest.kick(0);
    eventually("all writes reach the disk", || daemon.disk.waiting() == 4);
    daemon.disk.fail_flushes(1);
    daemon.disk.hold(false);
    assert_eq!(guest.used(0, 4).len(), 4);
    let flushed = |event: &&Event| matches!(event, Event::Submitted(Operation::Flush, ..));
    assert_eq!(daemon.disk.log().iter().filter(flushed).count(), 1);
    for slot in 0..4u16 {
        assert_eq!(guest.status(0, slot), IOERR, "write {slot} shares the flush");
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

/// Enters a request of this many parts; its tokens.
fn enter(flight: &mut Flight, parts: u16, flush_behind: bool) -> Vec<Token> {
    let origin = Origin { queue: 0, head: 0, incarnation: 1 };
    // SAFETY: nothing is ever written through a segment without length.
    let status = unsafe { Segment::new(std::ptr::NonNull::dangling().as_ptr(), 0) };
    let memory = std::sync::Arc::new(GuestMemory::default());
    let index = flight.enter(origin, status, &[], parts, flush_behind, &memory).unwrap();
    (0..parts).map(|part| flight.token(index, part as u8)).collect()
}

#[test]
fn the_table_of_requests_is_full_before_the_disk_has_more_parts_than_it_takes() {
    // As with a thousand queues of 1024.
    let mut flight = Flight::new(1 << 20);
    // Twice, as what is left of the count would show then.
    for _ in 0..2 {
        let mut tokens = Vec::new();
        while !flight.is_full() {
            let parts = if tokens.len() % 3 == 0 { MAX_RANGES as u16 } else { 1 };
            tokens.extend(enter(&mut flight, parts, parts == 1));
            assert!(tokens.len() <= MAX_QUEUED, "{} parts", tokens.len());
        }
        assert!(tokens.len() > MAX_QUEUED - MAX_RANGES, "{} parts", tokens.len());
        let mut written = None;
        for token in tokens {
            match flight.complete(token, false) {
                Progress::Waiting => (),
                Progress::Written(index) => {
                    flight.share_flush(index, written);
                    written = Some(index);
                }
                Progress::Done(index) => assert!(flight.release(index).is_some()),
                Progress::Unknown => panic!("an unknown token"),
            }
        }
        let head = written.unwrap();
        assert_eq!(flight.complete(flight.token(head, u8::MAX), false), Progress::Done(head));
        let mut next = Some(head);
        while let Some((_, rest)) = next.and_then(|index| flight.release(index)) {
            next = rest;
        }
        assert!(flight.is_empty() && !flight.is_full());
    }
}
