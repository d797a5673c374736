//! Another client takes the disk: what becomes of the daemon depends on what its guest is doing.

use std::os::unix::net::{UnixListener, UnixStream};

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
