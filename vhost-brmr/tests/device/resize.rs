//! A disk that changes its size under a running guest.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::VhostUserConfigFlags;

use crate::support::*;

/// Code of VHOST_USER_BACKEND_CONFIG_CHANGE_MSG, flags for version 1 without an answer, no payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];
const LARGER: usize = 2 * DISK_SIZE as usize;

/// The socket on which the device speaks first.
fn channel(guest: &mut Guest) -> UnixStream {
    let (ours, theirs) = UnixStream::pair().unwrap();
    guest.frontend.set_backend_request_fd(&theirs).unwrap();
    ours.set_read_timeout(Some(PATIENCE)).unwrap();
    ours
}

fn next_message(channel: &mut UnixStream) -> [u32; 3] {
    let mut bytes = [0; 12];
    channel.read_exact(&mut bytes).expect("the device says nothing");
    let word = |at: usize| u32::from_ne_bytes(bytes[at..at + 4].try_into().unwrap());
    [word(0), word(4), word(8)]
}

fn is_silent(channel: &mut UnixStream) -> bool {
    channel.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
    let silent = channel.read(&mut [0]).is_err();
    channel.set_read_timeout(Some(PATIENCE)).unwrap();
    silent
}

fn capacity(guest: &mut Guest) -> u64 {
    let (_, config) = guest.frontend.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8]).unwrap();
    u64::from_le_bytes(config.try_into().unwrap()) * 512
}

#[test]
fn a_disk_that_grows_is_announced_and_served_to_its_new_end() {
    let (daemon, mut guest) = Setup::default().boot();
    assert_eq!(capacity(&mut guest), DISK_SIZE);
    let mut channel = channel(&mut guest);
    assert!(is_silent(&mut channel), "nothing has changed");
    let end = DISK_SIZE / 512;
    assert_eq!(guest.write_disk(end, &[7; 512]), IOERR);

    daemon.disk.resize(LARGER);
    assert_eq!(next_message(&mut channel), CONFIG_CHANGE);
    assert_eq!(capacity(&mut guest), LARGER as u64);
    assert_eq!(guest.write_disk(end, &[7; 512]), OK);
    assert_eq!(guest.write_disk(2 * end - 1, &[8; 512]), OK);
    assert_eq!(guest.write_disk(2 * end, &[9; 512]), IOERR);
    assert!(is_silent(&mut channel), "one change is told once");
    drop(guest);
    daemon.join().unwrap();
}

#[test]
fn a_front_end_that_has_not_asked_for_the_size_is_told_once_its_guest_runs() {
    // It may have asked a daemon that was here before this one, when the disk was smaller.
    let setup = Setup::default();
    let (_daemon, stream) = setup.device();
    let mut guest = Guest::connect(stream, &setup);
    let mut channel = channel(&mut guest);
    guest.share_memory();
    assert!(is_silent(&mut channel), "a guest that does not run takes no notice");
    guest.start_ring(0, 0);
    assert_eq!(next_message(&mut channel), CONFIG_CHANGE);
    assert!(is_silent(&mut channel));
}

#[test]
fn a_front_end_without_a_channel_sees_the_new_size_when_it_asks() {
    let (daemon, mut guest) = Setup::default().boot();
    assert_eq!(capacity(&mut guest), DISK_SIZE);
    daemon.disk.resize(LARGER);
    eventually("the new size is in the configuration", || capacity(&mut guest) == LARGER as u64);
    assert_eq!(guest.write_disk(DISK_SIZE / 512, &[7; 512]), OK);
}

#[test]
fn a_channel_that_the_front_end_closed_costs_nothing_but_the_message() {
    let (daemon, mut guest) = Setup::default().boot();
    drop(channel(&mut guest));
    daemon.disk.resize(LARGER);
    eventually("the new size is in the configuration", || capacity(&mut guest) == LARGER as u64);
    assert_eq!(guest.write_disk(DISK_SIZE / 512, &[7; 512]), OK);
}
