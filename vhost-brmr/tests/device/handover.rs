//! Another client takes the disk: what becomes of the daemon depends on what its guest is doing.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::{Duration, Instant};

use vhost::VhostBackend;
use vhost_brmr::event_loop::{FrontEnds, LoopError};
use vhost_brmr::testing::Event;

use crate::support::*;

/// A guest that made three requests and was paused then, as at the end of a live migration.
fn paused() -> (Daemon, Guest) {
    let (daemon, mut guest) = Setup::default().boot();
    for _ in 0..3 {
        assert_eq!(guest.flush(), 0);
    }
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 3);
    (daemon, guest)
}

/// Another client takes the disk; returns when the disk has noticed.
fn displace(daemon: &Daemon) {
    daemon.disk.displace();
    eventually("the disk notices that it was taken", || !daemon.disk.is_attached());
}

fn attachments(daemon: &Daemon) -> usize {
    daemon.disk.log().iter().filter(|event| **event == Event::Attached).count()
}

#[test]
fn a_guest_that_goes_on_after_a_pause_keeps_its_disk_all_the_while() {
    let (daemon, mut guest) = paused();
    guest.start_ring(0, 3);
    assert_eq!(guest.flush(), 0);
    assert_eq!(attachments(&daemon), 1);
    assert!(!daemon.disk.log().contains(&Event::Detached), "somebody else could have taken it meanwhile");
}

#[test]
fn a_guest_that_runs_when_its_disk_is_taken_is_not_served_any_more() {
    let (daemon, mut guest) = Setup::default().boot();
    assert_eq!(guest.flush(), 0);
    daemon.disk.displace();
    assert!(matches!(daemon.join(), Err(LoopError::Displaced(_))));
}

#[test]
fn a_paused_guest_whose_disk_was_taken_may_not_go_on() {
    let (daemon, mut guest) = paused();
    displace(&daemon);
    assert!(!daemon.thread.as_ref().unwrap().is_finished(), "it waits for its front end");
    guest.submit(0, 0, virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT, 0, &[1; 512], 0);
    guest.configure_ring(0, 3);
    // The daemon may end as soon as the ring is started.
    let _ = guest.frontend.set_vring_kick(0, &guest.rings[0].kick);
    let _ = vhost::vhost_user::VhostUserFrontend::set_vring_enable(&mut guest.frontend, 0, true);
    let log =
        |disk: &vhost_brmr::testing::Handle| disk.log().iter().filter(|e| **e == Event::Attached).count();
    let Daemon { disk, thread } = daemon;
    assert!(matches!(thread.unwrap().join().unwrap(), Err(LoopError::Displaced(_))));
    assert_eq!(log(&disk), 1, "its memory is older than the disk");
    assert_eq!(guest.used_index(0), 3, "and its write is not answered");
}

#[test]
fn a_paused_guest_whose_disk_was_taken_may_begin_anew() {
    let (daemon, mut guest) = paused();
    displace(&daemon);
    // The driver of a guest that was reset writes its rings anew.
    guest.write(Guest::table(0), &vec![0; 0xb000]);
    (guest.rings[0].avail, guest.rings[0].seen) = (0, 0);
    guest.start_ring(0, 0);
    assert_eq!(guest.flush(), 0);
    assert_eq!(attachments(&daemon), 2);
}

#[test]
fn a_daemon_whose_guest_went_away_serves_the_next_one() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let setup = Setup::default();
    let daemon = setup.serve(FrontEnds::Listener(listener));
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    assert_eq!(guest.flush(), 0);
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 1);
    displace(&daemon);
    drop(guest);
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    assert_eq!(guest.flush(), 0);
    assert_eq!(attachments(&daemon), 2);
}

/// A daemon at `path` that keeps its disk for the next front end, and one that has used it and was paused.
fn lingering(path: &Path, linger: Duration) -> (Daemon, Guest, Setup) {
    let setup = Setup { linger, ..Setup::default() };
    let daemon = setup.serve(FrontEnds::Listener(UnixListener::bind(path).unwrap()));
    let mut guest = Guest::boot(UnixStream::connect(path).unwrap(), &setup);
    assert_eq!(guest.flush(), 0);
    assert_eq!(guest.frontend.get_vring_base(0).unwrap(), 1);
    (daemon, guest, setup)
}

fn is_detached(daemon: &Daemon) -> bool {
    daemon.disk.log().contains(&Event::Detached)
}

#[test]
fn a_disk_is_kept_for_the_front_end_that_takes_the_guest_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let (daemon, mut guest, setup) = lingering(&path, PATIENCE * 2);
    // As cloud-hypervisor migrates to another process of its host: the one closes its connection before the other makes its own.
    guest.disconnect();
    std::thread::sleep(Duration::from_millis(100));
    guest.reconnect(UnixStream::connect(&path).unwrap(), &setup);
    guest.share_memory();
    guest.start_ring(0, 1);
    assert_eq!(guest.flush(), 0);
    assert_eq!(attachments(&daemon), 1);
    assert!(!is_detached(&daemon), "somebody else could have taken it meanwhile");
}

#[test]
fn a_disk_that_nobody_comes_for_is_given_back_when_the_time_is_over() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let linger = Duration::from_millis(300);
    let (daemon, mut guest, setup) = lingering(&path, linger);
    let start = Instant::now();
    guest.disconnect();
    // Only one that starts its rings uses the disk.
    eventually("the disk is given back", || {
        drop(UnixStream::connect(&path).unwrap());
        is_detached(&daemon)
    });
    assert!(start.elapsed() >= linger, "given back after {:?}", start.elapsed());
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    assert_eq!(guest.flush(), 0);
    assert_eq!(attachments(&daemon), 2);
}

#[test]
fn a_disk_that_another_client_takes_or_whose_guest_was_cut_off_is_not_kept() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("taken");
    let (daemon, mut guest, setup) = lingering(&path, PATIENCE * 2);
    guest.disconnect();
    std::thread::sleep(Duration::from_millis(50));
    displace(&daemon);
    eventually("the disk is given up", || is_detached(&daemon));
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    assert_eq!(guest.flush(), 0);
    assert_eq!(attachments(&daemon), 2);

    let path = directory.path().join("cut off");
    let (daemon, mut guest, _) = lingering(&path, PATIENCE * 2);
    guest.start_ring(0, 1);
    daemon.disk.hold(true);
    guest.submit(0, 0, virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT, 0, &[1; 512], 0);
    guest.kick(0);
    eventually("the request reaches the disk", || daemon.disk.waiting() == 1);
    guest.disconnect();
    eventually("the disk is told to detach", || daemon.disk.is_detaching());
    daemon.disk.hold(false);
    eventually("the disk is detached", || is_detached(&daemon));
}
