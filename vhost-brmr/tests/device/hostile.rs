//! What a guest may do to its device: every chain ends in a status or a stopped ring, never in a panic, a spin, or a
//! byte where none belongs.

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use vhost::VhostBackend;
use virtio_bindings::virtio_blk::*;
use vmm_sys_util::eventfd::EventFd;

use crate::support::*;

/// Makes descriptor 0 available; `None` if the ring was stopped instead of an answer.
fn send(guest: &mut Guest) -> Option<u8> {
    guest.write(Guest::buffer(0, 0) + 31, &[0xee]);
    guest.make_available(0, 0);
    guest.kick(0);
    let mut answer = None;
    eventually("an answer or a stopped ring", || {
        let used = guest.used_within(0, 1, Duration::from_millis(2));
        if !used.is_empty() {
            answer = Some(guest.status(0, 0));
        }
        !used.is_empty() || guest.rings[0].error.read().is_ok()
    });
    answer
}

/// The ring can be set up again after a fault, and works.
fn recover(guest: &mut Guest) {
    let base = guest.frontend.get_vring_base(0).unwrap();
    let base = u16::try_from(base).unwrap();
    guest.set_avail_index(0, base);
    guest.rings[0].seen = guest.used_index(0);
    guest.start_ring(0, base);
    assert_eq!(guest.flush(), OK);
}

#[test]
fn requests_that_make_no_sense_get_a_status() {
    let (_daemon, mut guest) = Setup::default().boot();
    let end = DISK_SIZE / 512;
    for (kind, sector, out, input, status) in [
        (VIRTIO_BLK_T_IN, end, 0, 512, IOERR),
        (VIRTIO_BLK_T_IN, end - 1, 0, 1024, IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX, 0, 512, IOERR),
        (VIRTIO_BLK_T_IN, u64::MAX / 512, 0, 512, IOERR),
        (VIRTIO_BLK_T_IN, 1 << 55, 0, 512, IOERR),
        (VIRTIO_BLK_T_IN, 0, 0, 511, IOERR),
        (VIRTIO_BLK_T_IN, 0, 0, 0, IOERR),
        (VIRTIO_BLK_T_IN, 0, 512, 0, IOERR),
        (VIRTIO_BLK_T_OUT, end, 512, 0, IOERR),
        (VIRTIO_BLK_T_OUT, 0, 513, 0, IOERR),
        (VIRTIO_BLK_T_OUT, 0, 0, 0, IOERR),
        (VIRTIO_BLK_T_OUT, 0, 0, 512, IOERR),
        (VIRTIO_BLK_T_GET_ID, 0, 0, 0, IOERR),
        (VIRTIO_BLK_T_SCSI_CMD, 0, 0, 512, UNSUPP),
        (VIRTIO_BLK_T_SECURE_ERASE, 0, 16, 0, UNSUPP),
        (u32::MAX, 0, 0, 512, UNSUPP),
        (VIRTIO_BLK_T_BARRIER, 0, 0, 0, UNSUPP),
        (VIRTIO_BLK_T_IN, end - 1, 0, 512, OK),
    ] {
        let reply = guest.request(0, kind, sector, &vec![0; out], input);
        assert_eq!(reply.status, status, "type {kind}, sector {sector}, {out} out, {input} in");
    }
}

#[test]
fn chains_that_make_no_sense_get_a_status_or_stop_their_ring() {
    let (_daemon, mut guest) = Setup::default().boot();
    let at = guest.fill(0, 0, VIRTIO_BLK_T_IN, 0, &[]);
    let (base, table) = (GUEST_BASE + at, Guest::table(0));
    let (header, data, status) = (base, base + 512, base + 31);
    let outside = GUEST_BASE + MEMORY_SIZE;
    type Chain<'a> = &'a [(u64, u32, u16, u16)];
    let cases: &[(&str, Chain<'_>, Option<u8>)] = &[
        (
            "a sound one",
            &[(header, 16, NEXT, 1), (data, 512, NEXT | WRITE, 2), (status, 1, WRITE, 0)],
            Some(OK),
        ),
        ("header of 15 bytes", &[(header, 15, NEXT, 1), (status, 1, WRITE, 0)], Some(IOERR)),
        ("no header", &[(status, 1, WRITE, 0)], Some(IOERR)),
        ("no status", &[(header, 16, 0, 0)], None),
        ("empty status", &[(header, 16, NEXT, 1), (status, 0, WRITE, 0)], None),
        ("status outside memory", &[(header, 16, NEXT, 1), (outside, 1, WRITE, 0)], None),
        ("status at the end of all", &[(header, 16, NEXT, 1), (u64::MAX, 1, WRITE, 0)], None),
        ("header outside memory", &[(outside, 16, NEXT, 1), (status, 1, WRITE, 0)], Some(IOERR)),
        (
            "data outside memory",
            &[(header, 16, NEXT, 1), (outside, 512, NEXT | WRITE, 2), (status, 1, WRITE, 0)],
            Some(IOERR),
        ),
        (
            "data across the end of memory",
            &[(header, 16, NEXT, 1), (outside - 256, 512, NEXT | WRITE, 2), (status, 1, WRITE, 0)],
            Some(IOERR),
        ),
        (
            "data across the end of addresses",
            &[(header, 16, NEXT, 1), (u64::MAX - 255, 512, NEXT | WRITE, 2), (status, 1, WRITE, 0)],
            Some(IOERR),
        ),
        (
            "a huge segment",
            &[(header, 16, NEXT, 1), (data, u32::MAX - 64, NEXT | WRITE, 2), (status, 1, WRITE, 0)],
            Some(IOERR),
        ),
        (
            "more than 4 GiB",
            &[(header, 16, NEXT, 1), (data, u32::MAX, NEXT | WRITE, 2), (status, 1, WRITE, 0)],
            None,
        ),
        ("a loop", &[(header, 16, NEXT, 1), (data, 512, NEXT | WRITE, 1)], None),
        ("a link beyond the table", &[(header, 16, NEXT, 64)], None),
        (
            "readable after writable",
            &[(header, 16, NEXT, 1), (status, 1, WRITE | NEXT, 2), (data, 512, 0, 0)],
            None,
        ),
        ("an empty indirect table", &[(base, 0, INDIRECT_FLAG, 0)], None),
        ("an uneven indirect table", &[(base, 17, INDIRECT_FLAG, 0)], None),
        ("an indirect table outside memory", &[(outside, 32, INDIRECT_FLAG, 0)], None),
        ("an indirect table in itself", &[(GUEST_BASE + table, 16, INDIRECT_FLAG, 0)], None),
    ];
    for (name, chain, expected) in cases {
        for (index, (address, length, flags, next)) in (0..).zip(*chain) {
            guest.descriptor(table, index, *address, *length, *flags, *next);
        }
        assert_eq!(send(&mut guest), *expected, "{name}");
        if expected.is_none() {
            recover(&mut guest);
        }
        guest.fill(0, 0, VIRTIO_BLK_T_IN, 0, &[]);
    }
    assert!(guest.guards_are_intact());
}

#[test]
fn a_ring_whose_indices_make_no_sense_is_stopped_and_the_others_go_on() {
    let setup = Setup { queues: 2, ..Setup::default() };
    let (daemon, mut guest) = setup.boot();
    let stopped = |guest: &Guest| {
        eventually("the ring is stopped", || guest.rings[1].error.read().is_ok());
    };
    let restart = |guest: &mut Guest| {
        let base = u16::try_from(guest.frontend.get_vring_base(1).unwrap()).unwrap();
        guest.set_avail_index(1, base);
        guest.start_ring(1, base);
    };
    // More than the ring is long.
    guest.set_avail_index(1, 65);
    guest.kick(1);
    stopped(&guest);
    assert_eq!(guest.flush(), OK);
    restart(&mut guest);
    // A head beyond the table.
    guest.make_available(1, 64);
    guest.kick(1);
    stopped(&guest);
    assert_eq!(guest.flush(), OK);
    restart(&mut guest);
    // A head that is in flight already.
    daemon.disk.hold(true);
    guest.submit(1, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.make_available(1, 0);
    guest.kick(1);
    stopped(&guest);
    daemon.disk.hold(false);
    assert_eq!(guest.flush(), OK);
    restart(&mut guest);
    guest.rings[1].seen = guest.used_index(1);
    guest.submit(1, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(1);
    assert_eq!(guest.used(1, 1).len(), 1);
}

#[test]
fn a_request_of_too_many_segments_gets_a_status() {
    let (_daemon, mut guest) = Setup::default().boot();
    let at = guest.fill(0, 0, VIRTIO_BLK_T_OUT, 0, &[]);
    let table = Guest::buffer(0, 2);
    let count = 4000;
    guest.descriptor(table, 0, GUEST_BASE + at, 16, NEXT, 1);
    for index in 1..count - 1 {
        guest.descriptor(table, index, GUEST_BASE + at + 512, 512, NEXT, index + 1);
    }
    guest.descriptor(table, count - 1, GUEST_BASE + at + 31, 1, WRITE, 0);
    guest.descriptor(Guest::table(0), 0, GUEST_BASE + table, u32::from(count) * 16, INDIRECT_FLAG, 0);
    assert_eq!(send(&mut guest), Some(IOERR));
}

/// A descriptor that is somewhat likely to mean something.
fn descriptor() -> impl Strategy<Value = (u64, u32, u16, u16)> {
    let buffer = Guest::buffer(0, 0);
    let address = prop_oneof![
        6 => (0..64u64).prop_map(move |at| GUEST_BASE + buffer + at * 64),
        1 => (0..256u64).prop_map(|at| GUEST_BASE + MEMORY_SIZE - 128 + at),
        1 => (0..256u64).prop_map(|at| GUEST_BASE - 128 + at),
        1 => any::<u64>(),
        2 => Just(GUEST_BASE + Guest::indirect_table(0)),
    ];
    let length = prop_oneof![
        4 => prop::sample::select(vec![0u32, 1, 15, 16, 17, 32, 48, 512, 513, 4096]),
        // A length between these two could reach the quiet part of memory, and rightly so.
        1 => (1 << 23)..=u32::MAX,
    ];
    let flags = prop_oneof![
        6 => 0..4u16,
        1 => 0..8u16,
        1 => any::<u16>(),
    ];
    (address, length, flags, prop_oneof![4 => 0..8u16, 1 => any::<u16>()])
}

#[test]
fn random_descriptor_tables_never_hurt() {
    let (_daemon, guest) = Setup::default().boot();
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 1500, failure_persistence: None, ..Default::default() });
    // The last part of memory is named by no descriptor but those that reach over its end.
    let quiet = Guest::buffer(0, 4);
    let length = usize::try_from(MEMORY_SIZE - 128 - quiet).unwrap();
    guest.write(quiet, &vec![0x5a; length]);
    let strategy = (vec(descriptor(), 8), vec(descriptor(), 4), 0..15u32, 0..4096u64, vec(0..8u16, 1..4));
    let guest = std::cell::RefCell::new(guest);
    runner
        .run(&strategy, |(direct, indirect, kind, sector, heads)| {
            let mut guest = guest.borrow_mut();
            let buffer = Guest::buffer(0, 0);
            for at in 0..64 {
                guest.write(buffer + at * 64, &header(kind, sector));
            }
            for (index, (address, length, flags, next)) in (0..).zip(direct) {
                guest.descriptor(Guest::table(0), index, address, length, flags, next);
            }
            for (index, (address, length, flags, next)) in (0..).zip(indirect) {
                guest.descriptor(Guest::indirect_table(0), index, address, length, flags, next);
            }
            let used = guest.used_index(0);
            for head in &heads {
                guest.make_available(0, *head);
            }
            guest.kick(0);
            let expected = used.wrapping_add(u16::try_from(heads.len()).unwrap());
            let mut failed = false;
            eventually("all requests are answered or the ring is stopped", || {
                failed |= error_of(&guest.rings[0].error);
                failed || guest.used_index(0) == expected
            });
            guest.rings[0].seen = guest.used_index(0);
            if failed {
                recover(&mut guest);
            }
            Ok(())
        })
        .unwrap();
    let mut guest = guest.into_inner();
    assert!(guest.guards_are_intact());
    assert!(guest.read(quiet, length).iter().all(|byte| *byte == 0x5a));
    recover(&mut guest);
}

fn error_of(error: &EventFd) -> bool {
    error.read().is_ok()
}
