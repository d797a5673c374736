//! The listening socket at the end of a daemon: a front end that connects again at the moment of the hang-up is refused and tries
//! again. One that connects to a daemon that is about to end is cut off, and cloud-hypervisor gives the disk up for good then.

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use vhost_brmr::event_loop::{EventLoop, FrontEnds, LoopError, OnDisconnect};
use vhost_brmr::socket::{Listener, SocketFile};
use vhost_brmr::sys::StopSignals;
use vhost_brmr::testing::{Event, MemoryDisk};

use crate::support::*;

/// How often what depends on which of two is quicker is tried.
const ROUNDS: usize = 40;

/// A message without payload: code, version 1, no length.
fn message(code: u32) -> Vec<u8> {
    [code, 1, 0].map(u32::to_ne_bytes).concat()
}

/// What is read up to the end of the connection.
fn wait_for_hang_up(mut stream: &UnixStream) {
    let mut bytes = [0; 64];
    while stream.read(&mut bytes).is_ok_and(|length| length > 0) {}
}

fn is_refused(path: &Path) -> bool {
    let Err(error) = UnixStream::connect(path) else { return false };
    assert!(matches!(error.kind(), ErrorKind::ConnectionRefused | ErrorKind::NotFound), "{error}");
    true
}

#[test]
fn a_daemon_that_ends_by_itself_refuses_front_ends_before_it_closes_the_connection() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..ROUNDS {
        for (end, with_file) in [("once", true), ("once", false), ("refused", true), ("displaced", false)] {
            let path = directory.path().join(format!("{round}-{end}-{with_file}"));
            let front_ends = if with_file {
                let (file, socket) = SocketFile::listen(&path, 0o600).unwrap();
                FrontEnds::Path(file, socket)
            } else {
                FrontEnds::Listener(UnixListener::bind(&path).unwrap())
            };
            let setup = Setup::default();
            let (disk, handle) = MemoryDisk::new(setup.geometry).unwrap();
            let (options, mut behaviour) = setup.options();
            if end == "once" {
                behaviour.on_disconnect = OnDisconnect::Exit;
            }
            let event_loop = EventLoop::new(disk, options, behaviour, front_ends, None).unwrap();
            let thread = std::thread::spawn(move || event_loop.run());
            let mut stream = UnixStream::connect(&path).unwrap();
            if end == "once" {
                // A code that no message has, so that the daemon closes the connection.
                stream.write_all(&message(9999)).unwrap();
                wait_for_hang_up(&stream);
            } else {
                let again = stream.try_clone().unwrap();
                if end == "refused" {
                    handle.refuse("by a test");
                }
                let guest = Guest::boot(stream, &setup);
                if end == "displaced" {
                    handle.displace();
                }
                wait_for_hang_up(&again);
                drop(guest);
            }
            assert!(is_refused(&path), "{end}, round {round}: connected to a daemon that ends");
            match (end, thread.join().unwrap()) {
                ("once", Ok(()))
                | ("refused", Err(LoopError::Refused(_)))
                | ("displaced", Err(LoopError::Displaced(_))) => (),
                (_, result) => panic!("{end}: {result:?}"),
            }
            assert_eq!(path.exists(), !with_file, "its file is removed");
        }
    }
}

#[test]
fn told_to_stop_the_daemon_refuses_front_ends_while_it_still_serves_the_one_that_it_has() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    // However long it would keep the disk for another front end.
    let setup = Setup { linger: PATIENCE * 2, ..Setup::default() };
    let (disk, handle) = MemoryDisk::new(setup.geometry).unwrap();
    let (options, behaviour) = setup.options();
    let (file, socket) = SocketFile::listen(&path, 0o600).unwrap();
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let signals = StopSignals::new().unwrap();
        // SAFETY: has no preconditions.
        sender.send(unsafe { libc::pthread_self() }).unwrap();
        EventLoop::new(disk, options, behaviour, FrontEnds::Path(file, socket), Some(signals)).unwrap().run()
    });
    let thread_id = receiver.recv().unwrap();
    let mut guest = Guest::boot(UnixStream::connect(&path).unwrap(), &setup);
    handle.hold(true);
    guest.submit(0, 0, virtio_bindings::virtio_blk::VIRTIO_BLK_T_OUT, 0, &pattern(512, 1), 0);
    guest.kick(0);
    eventually("the request reaches the disk", || handle.waiting() == 1);
    // SAFETY: the thread is not joined yet.
    assert_eq!(unsafe { libc::pthread_kill(thread_id, libc::SIGTERM) }, 0);
    // Signal and messages come from one epoll set, in either order: an answer does not say that the signal was seen.
    eventually("it stops listening", || is_refused(&path));
    guest.settle();
    assert_eq!(handle.waiting(), 1, "the front end is still served");
    // The next daemon may have the path already; what the first removes is its own.
    let next = SocketFile::listen(&path, 0o600).unwrap();
    handle.hold(false);
    thread.join().unwrap().unwrap();
    assert_eq!(guest.used(0, 1), [(0, 1)]);
    assert_eq!(handle.log().last(), Some(&Event::Detached));
    assert!(path.exists());
    drop(next);
}

/// The kernel closes the descriptors of a killed process from the highest number down. That they are closed so in fact, and that the
/// daemon profits from it, is tested with the whole system.
#[test]
fn the_listening_socket_is_above_every_other_descriptor() {
    let directory = tempfile::tempdir().unwrap();
    let socket = UnixListener::bind(directory.path().join("s")).unwrap();
    let low = socket.as_raw_fd();
    let listener = Listener::new(None, socket).unwrap();
    let later: Vec<_> = (0..64).map(|_| UnixStream::pair().unwrap()).collect();
    let highest = later.iter().map(|(one, other)| one.as_raw_fd().max(other.as_raw_fd())).max().unwrap();
    let number = listener.as_raw_fd();
    assert!(number > 900 && number > highest && low < 900, "{low} moved to {number}, others up to {highest}");
    assert!(listener.accept().is_err_and(|error| error.kind() == ErrorKind::WouldBlock));
}

/// Starts the daemon for a pool of which no node answers within a second, with what a service manager passes as standard input.
fn daemon_without_nodes(arguments: &[&str], socket: Option<UnixListener>) -> Child {
    let mut command = match &socket {
        None => Command::new(env!("CARGO_BIN_EXE_vhost-brmr")),
        Some(_) => {
            let mut shell = Command::new("/bin/sh");
            let script = "exec 3<&0 </dev/null; LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\"";
            shell.args(["-c", script, env!("CARGO_BIN_EXE_vhost-brmr")]);
            shell
        }
    };
    command.stdin(socket.map_or_else(Stdio::null, |socket| Stdio::from(OwnedFd::from(socket))));
    command.args(arguments).args(["--pool", "p", "--node", "127.0.0.1:1", "--suspend-timeout-s", "1"]);
    command.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().unwrap()
}

/// Waits for the end of a daemon that found no node; the last of what it said.
fn ends_for_want_of_nodes(child: Child) {
    let output = child.wait_with_output().unwrap();
    let log = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{log}");
    assert!(log.contains("pool p"), "{log}");
    assert!(!log.contains("front end connected"), "{log}");
}

#[test]
fn no_front_end_is_accepted_before_a_node_has_answered() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let mut child = daemon_without_nodes(&["--socket-path", path.to_str().unwrap()], None);
    let deadline = Instant::now() + PATIENCE;
    while child.try_wait().unwrap().is_none() {
        assert!(is_refused(&path), "accepted a front end, and is about to end");
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    ends_for_want_of_nodes(child);
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[test]
fn a_front_end_that_waits_at_the_service_managers_socket_outlives_a_daemon_that_found_no_node() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let listener = UnixListener::bind(&path).unwrap();
    let mut front_end = UnixStream::connect(&path).unwrap();
    front_end.write_all(&message(1)).unwrap();
    for arguments in [&[][..], &["--fd", "3"]] {
        ends_for_want_of_nodes(daemon_without_nodes(arguments, Some(listener.try_clone().unwrap())));
        front_end.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let error = front_end.read(&mut [0; 1]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "it still waits for its answer");
    }
    // And what it asked is there for the next daemon.
    let (mut accepted, _) = listener.accept().unwrap();
    let mut asked = [0; 12];
    accepted.read_exact(&mut asked).unwrap();
    assert_eq!(asked[..], message(1));
    let both = daemon_without_nodes(&["--socket-path", "/s"], Some(listener)).wait_with_output().unwrap();
    assert_eq!(both.status.code(), Some(2));
    assert!(String::from_utf8(both.stderr).unwrap().contains("leave socket-path out"));
}
