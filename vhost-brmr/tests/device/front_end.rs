//! What a front end may give or withhold: descriptors that block, answers that it does not read, memory that it takes away. Nothing
//! of it stops the loop.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::Command;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vhost_brmr::event_loop::FrontEnds;
use vhost_brmr::sys;
use virtio_bindings::virtio_blk::*;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::restart::{inflight_region, with_signals};
use crate::support::*;

const GET_FEATURES: u32 = 1;

fn message(code: u32, payload: &[u32]) -> Vec<u8> {
    let length = u32::try_from(payload.len() * 4).unwrap();
    [&[code, 1, length], payload].concat().iter().flat_map(|word| word.to_ne_bytes()).collect()
}

/// Descriptors of every kind that a process may come by, but no eventfd.
fn other_kinds() -> Vec<OwnedFd> {
    let (pipe, other) = std::io::pipe().unwrap();
    let (socket, _) = UnixStream::pair().unwrap();
    let epoll = vmm_sys_util::epoll::Epoll::new().unwrap();
    // SAFETY: the descriptor is open; the copy is owned here.
    let epoll =
        unsafe { std::os::fd::BorrowedFd::borrow_raw(epoll.as_raw_fd()) }.try_clone_to_owned().unwrap();
    vec![
        pipe.into(),
        other.into(),
        socket.into(),
        epoll,
        tempfile::tempfile().unwrap().into(),
        File::open("/dev/null").unwrap().into(),
        File::open("/").unwrap().into(),
    ]
}

/// Makes the next write of anyone else wait.
fn fill(event: &EventFd) {
    // It may have been written to meanwhile.
    let _ = event.read();
    event.write(u64::MAX - 1).unwrap();
    // SAFETY: plain fcntl on a descriptor that is open.
    assert_eq!(unsafe { libc::fcntl(event.as_raw_fd(), libc::F_SETFL, 0) }, 0);
}

#[test]
fn descriptors_that_are_no_eventfds_are_refused_and_the_session_goes_on() {
    let (_daemon, mut guest) = Setup { queues: 2, ..Setup::default() }.boot();
    guest.frontend.get_vring_base(1).unwrap();
    guest.configure_ring(1, 0);
    for other in other_kinds() {
        let other = as_eventfd(File::from(other));
        assert!(guest.frontend.set_vring_call(1, &other).is_err());
        assert!(guest.frontend.set_vring_err(1, &other).is_err());
        assert!(guest.frontend.set_vring_kick(1, &other).is_err());
    }
    assert_eq!(guest.flush(), OK);
}

#[test]
fn a_call_descriptor_that_blocks_stops_its_ring_and_nothing_else() {
    let setup = Setup { queues: 2, ..Setup::default() };
    let (ours, theirs) = UnixStream::pair().unwrap();
    let (_disk, stop, thread) = with_signals(&setup, theirs);
    let mut guest = Guest::boot(ours, &setup);
    assert_eq!(guest.flush(), OK);
    fill(&guest.rings[0].call);
    fill(&guest.rings[1].error);
    guest.set_used_event(0, guest.used_index(0));
    guest.submit(0, 0, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    eventually("the ring is stopped", || guest.rings[0].error.read().is_ok());
    assert_eq!(guest.request(1, VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, OK);
    // One that blocks when it is given is refused, and an error descriptor that blocks is let be.
    let full = EventFd::new(EFD_NONBLOCK).unwrap();
    fill(&full);
    assert!(guest.frontend.set_vring_call(1, &full).is_err());
    guest.set_avail_index(1, 1000);
    guest.kick(1);
    guest.settle();
    stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn answers_that_are_not_read_hold_up_nobody_but_who_does_not_read_them() {
    let setup = Setup::default();
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    let (_disk, stop, thread) = with_signals(&setup, theirs);
    let mut guest = Guest::boot(ours.try_clone().unwrap(), &setup);
    // More than both directions hold.
    ours.set_nonblocking(true).unwrap();
    let one = message(GET_FEATURES, &[]);
    let mut sent = 0;
    let mut idle = Instant::now();
    while idle.elapsed() < Duration::from_millis(300) {
        match ours.write(&one) {
            Ok(length) => {
                assert_eq!(length, one.len());
                (sent, idle) = (sent + 1, Instant::now());
            }
            Err(_) => std::thread::sleep(Duration::from_millis(5)),
        }
    }
    // The guest is served, and all is answered once the front end reads.
    assert_eq!(guest.flush(), OK);
    ours.set_nonblocking(false).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answers = vec![0; sent * 20];
    ours.read_exact(&mut answers).unwrap();
    assert!(answers.chunks(20).all(|answer| answer[..4] == GET_FEATURES.to_ne_bytes()));
    // And a signal is heard while it does not.
    for _ in 0..sent {
        if ours.write(&one).is_err() {
            break;
        }
        ours.set_nonblocking(true).unwrap();
    }
    stop();
    thread.join().unwrap().unwrap();
}

#[test]
fn a_message_with_more_descriptors_than_any_has_ends_its_session_only() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let setup = Setup::default();
    let daemon = setup.serve(FrontEnds::Listener(UnixListener::bind(&path).unwrap()));
    let file = tempfile::tempfile().unwrap();
    for count in [1, 32, 33, 64, 253] {
        let descriptors: Vec<RawFd> = vec![file.as_raw_fd(); count];
        let mut stream = UnixStream::connect(&path).unwrap();
        let bytes = message(GET_FEATURES, &[]);
        stream.send_with_fds(&[&bytes[..]], &descriptors).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let ended = matches!(stream.read(&mut [0; 20]), Ok(0) | Err(_));
        assert!(ended, "{count} descriptors: was answered");
    }
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    assert_eq!(guest.flush(), OK);
    comes_to_rest(&daemon, Duration::from_millis(40));
}

#[test]
fn what_an_earlier_daemon_left_in_flight_is_served_before_its_ring_is_stopped() {
    let setup = Setup::default();
    let (first, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let (region, file) = inflight_region(&mut guest);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 0);
    first.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 1), 0);
    guest.submit(0, 1, VIRTIO_BLK_T_OUT, 1, &pattern(512, 2), 0);
    guest.kick(0);
    eventually("the requests reach the disk", || first.disk.waiting() == 2);
    guest.disconnect();
    let (second, mut stream) = setup.device();
    guest.reconnect(stream.try_clone().unwrap(), &setup);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.configure_ring(0, 2);
    let kick = guest.rings[0].kick.try_clone().unwrap();
    guest.frontend.set_vring_kick(0, &kick).unwrap();
    // Not looked at before the ring is enabled; and this one must not be taken any more.
    guest.submit(0, 2, VIRTIO_BLK_T_OUT, 2, &pattern(512, 3), 0);
    second.disk.hold(true);
    // Enabled and stopped before the loop has looked at it in between.
    stream.write_all(&[message(18, &[0, 1]), message(11, &[0, 0])].concat()).unwrap();
    eventually("what was in flight reaches the disk", || second.disk.waiting() == 2);
    second.disk.hold(false);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = [0; 20];
    stream.read_exact(&mut answer).unwrap();
    assert_eq!(answer[16..], 2u32.to_ne_bytes(), "the index behind what was taken");
    assert_eq!(guest.used(0, 2), [(0, 1), (4, 1)]);
    assert_eq!(guest.used_index(0), 2, "took what was made available since");
    assert!(second.disk.data()[..1024] == [pattern(512, 1), pattern(512, 2)].concat());
}

#[test]
fn the_order_of_requests_outlives_two_daemons_and_a_session_without_a_region_leaves_it_alone() {
    let setup = Setup::default();
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let (first, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let (region, file) = inflight_region(&mut guest);
    let resume = |guest: &mut Guest, base| {
        guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
        guest.share_memory();
        guest.start_ring(0, base);
    };
    resume(&mut guest, 0);
    first.disk.hold(true);
    for slot in [2, 1] {
        guest.submit(0, slot, VIRTIO_BLK_T_OUT, u64::from(slot), &pattern(512, slot as u8), 0);
    }
    guest.kick(0);
    eventually("the requests reach the disk", || first.disk.waiting() == 2);
    guest.disconnect();
    let (second, stream) = setup.device();
    guest.reconnect(stream, &setup);
    second.disk.hold(true);
    resume(&mut guest, 2);
    guest.submit(0, 0, VIRTIO_BLK_T_OUT, 0, &pattern(512, 0), 0);
    guest.kick(0);
    eventually("the requests reach the disk", || second.disk.waiting() == 3);
    guest.disconnect();
    let third = setup.serve(FrontEnds::Listener(UnixListener::bind(&path).unwrap()));
    guest.reconnect(UnixStream::connect(&path).unwrap(), &setup);
    resume(&mut guest, 3);
    let heads: Vec<_> = guest.used(0, 3).into_iter().map(|(head, _)| head).collect();
    assert_eq!(heads, [8, 4, 0], "in the order in which the guest made them available");
    // The next front end of the same daemon keeps no region.
    guest.settle();
    let content = || std::fs::read(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let before = content();
    guest.disconnect();
    drop(guest);
    eventually("the disk is free", || !third.disk.is_attached());
    let mut other = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    assert_eq!(other.flush(), OK);
    other.settle();
    assert!(content() == before, "notes of another guest");
}

#[test]
fn recovered_requests_that_find_no_room_stay_in_the_region_and_are_served_when_there_is_some() {
    let drain_timeout = Duration::from_millis(20);
    let setup = Setup { queue_size: 4, drain_timeout, ..Setup::default() };
    let (daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let (region, file) = inflight_region(&mut guest);
    guest.frontend.set_inflight_fd(&region, file.as_raw_fd()).unwrap();
    guest.share_memory();
    guest.start_ring(0, 0);
    daemon.disk.hold(true);
    daemon.disk.ignore_cancel();
    // One descriptor each, so that there are as many as the daemon keeps at a time.
    for slot in 0..4 {
        let at = guest.fill(0, slot, VIRTIO_BLK_T_OUT, slot.into(), &pattern(512, slot as u8));
        let table = Guest::indirect_table(0) + u64::from(slot) * 64;
        guest.chain(table, 0, &Guest::buffers(at, 512, 0));
        guest.descriptor(Guest::table(0), slot, GUEST_BASE + table, 48, INDIRECT_FLAG, 0);
        guest.make_available(0, slot);
    }
    guest.kick(0);
    eventually("all requests reach the disk", || daemon.disk.waiting() == 4);
    // The front end gives up on them, and starts the ring again: they are in flight twice.
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0, 4);
    guest.settle();
    assert_eq!(daemon.disk.waiting(), 4, "there is no room for more");
    let mapped = vhost_brmr::inflight::Inflight::map(&region, &file).unwrap();
    assert_eq!(mapped.recover(0, 4, 0).unwrap().heads, [0, 1, 2, 3], "the next daemon would not find them");
    daemon.disk.hold(false);
    // Nobody kicks for them.
    let heads: Vec<_> = guest.used(0, 4).into_iter().map(|(head, _)| head).collect();
    assert_eq!(heads, [0, 1, 2, 3]);
    guest.settle();
    assert!(mapped.recover(0, 4, 4).unwrap().heads.is_empty());
}

#[test]
fn a_disabled_ring_has_nothing_in_flight_once_that_is_answered() {
    let (daemon, mut guest) = Setup::default().boot();
    daemon.disk.hold(true);
    guest.submit(0, 0, VIRTIO_BLK_T_IN, 0, &[], 512);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    let frontend = guest.frontend.clone();
    let mut frontend_of_thread = frontend;
    let disabler = std::thread::spawn(move || frontend_of_thread.set_vring_enable(0, false).is_ok());
    std::thread::sleep(Duration::from_millis(50));
    assert!(!disabler.is_finished(), "answered while the disk may still write to the guest");
    daemon.disk.hold(false);
    assert!(disabler.join().unwrap());
    assert_eq!(guest.used_index(0), 1);
    // What comes now waits until it is enabled again.
    guest.submit(0, 1, VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.kick(0);
    guest.settle();
    assert_eq!(guest.used_index(0), 1);
    guest.frontend.set_vring_enable(0, true).unwrap();
    assert_eq!(guest.used(0, 2).len(), 2);
}

#[test]
fn a_pause_at_index_zero_is_no_reset() {
    let (daemon, mut guest) = Setup::default().boot();
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0, 0);
    assert_eq!(guest.flush(), OK);
    // As after 65,535 more requests.
    guest.frontend.get_vring_base(0).unwrap();
    guest.set_avail_index(0, 0);
    guest.write(Guest::used_ring(0) + 2, &[0; 2]);
    guest.rings[0].seen = 0;
    guest.start_ring(0, 0);
    eventually("the disk is told of the reset", || daemon.disk.resets() == 1);
    guest.frontend.get_vring_base(0).unwrap();
    guest.start_ring(0, 0);
    assert_eq!(guest.flush(), OK);
    assert_eq!(daemon.disk.resets(), 1, "the guest was paused where its rings were at their beginning");
}

#[test]
fn a_region_that_was_made_here_cannot_be_cut_short() {
    let (_daemon, mut guest) = Setup::default().boot();
    let (_, file) = inflight_region(&mut guest);
    assert!(file.set_len(0).is_err());
    assert!(file.set_len(1 << 20).is_err());
}

#[test]
fn memory_that_is_cut_short_ends_the_process_with_words_and_a_code() {
    let Ok(form) = std::env::var("RMR_TEST_BUS_ERROR") else {
        // The same test again, as the process that ends.
        for form in ["text", "json"] {
            let test = "front_end::memory_that_is_cut_short_ends_the_process_with_words_and_a_code";
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", test, "--nocapture"])
                .env("RMR_TEST_BUS_ERROR", form)
                .output()
                .unwrap();
            let error = String::from_utf8(output.stderr).unwrap();
            assert_eq!(output.status.code(), Some(i32::from(sys::MEMORY_LOST)), "{error}");
            let last = error.lines().last().unwrap();
            assert!(last.contains("memory that the front end shares"), "{error}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(last).is_ok(), form == "json", "{last}");
        }
        return;
    };
    sys::explain_bus_errors(form == "json").unwrap();
    let (_daemon, guest) = Setup::default().boot();
    guest.file.set_len(0).unwrap();
    guest.kick(0);
    std::thread::sleep(PATIENCE);
}
