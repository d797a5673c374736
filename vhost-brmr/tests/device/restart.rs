//! The end of a daemon, in order or not, and the one that follows it: requests in flight are lost to nobody.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserInflight;
use vhost_brmr::event_loop::{EventLoop, FrontEnds, LoopError};
use vhost_brmr::inflight::Inflight;
use vhost_brmr::sys::StopSignals;
use vhost_brmr::testing::{Event, Handle, MemoryDisk};
use virtio_bindings::virtio_blk::*;

use crate::support::*;

/// A region for the guest's rings, as a front end keeps it.
pub(crate) fn inflight_region(guest: &mut Guest) -> (VhostUserInflight, File) {
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
pub(crate) fn with_signals(
    setup: &Setup,
    stream: UnixStream,
) -> (Handle, impl Fn(), JoinHandle<Result<(), LoopError>>) {
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
fn a_disk_that_is_refused_while_requests_wait_for_it_leaves_them_to_the_next_daemon() {
    let setup = Setup::default();
    let (first, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let (region, file) = inflight_region(&mut guest);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 0);
    first.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 1), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || first.disk.waiting() == 1);
    first.disk.refuse_late("still held by the daemon that was killed");
    assert!(matches!(first.join(), Err(LoopError::Refused(_))));
    assert_eq!(guest.used_index(0), 0, "the guest was told of an end that there was not");
    let (second, stream) = setup.device();
    guest.reconnect(stream, &setup);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 1);
    assert_eq!(guest.used(0, 1), [(0, 1)]);
    assert_eq!(guest.status(0, 0), OK);
    assert!(second.disk.data()[..512] == pattern(512, 1));
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
