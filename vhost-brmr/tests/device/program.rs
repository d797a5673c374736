//! The program itself: exit codes, words, sockets.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use vhost_brmr::args::Args;
use vhost_brmr::socket::{SocketError, SocketFile};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_vhost-brmr")).args(arguments).output().unwrap()
}

#[test]
fn bad_usage_ends_with_code_two_and_one_clear_error() {
    for (arguments, word) in [
        (&["--nonsense"][..], "--nonsense"),
        (&["--num-queues", "many"], "many"),
        (&["--pool", "p", "--node", "a:1"], "--socket-path"),
        (&["--socket-path", "/s", "--fd", "5", "--pool", "p", "--node", "a:1"], "--fd"),
        (&["--socket-path", "/s", "--pool", "p", "--node", "a:1", "--queue-size", "100"], "power of two"),
        (&["--config", "/nonexistent.toml"], "/nonexistent.toml"),
    ] {
        let output = run(arguments);
        let error = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {error}");
        assert!(error.contains(word), "{arguments:?}: {error}");
    }
}

#[test]
fn capabilities_are_json_for_a_block_device_and_the_file_for_management_software_agrees() {
    let output = run(&["--print-capabilities"]);
    assert!(output.status.success());
    let printed: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(printed["type"], "block");
    assert_eq!(printed["features"], serde_json::json!(["read-only"]));
    let file: serde_json::Value = serde_json::from_str(include_str!("../../50-vhost-brmr.json")).unwrap();
    assert_eq!(file["type"], printed["type"]);
    assert!(file["binary"].as_str().unwrap().ends_with("/vhost-brmr"));
}

/// The value of the only line of a unit that sets this.
fn setting<'a>(unit: &'a str, name: &str) -> &'a str {
    let values = unit.lines().filter_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    let values: Vec<_> = values.collect();
    assert_eq!(values.len(), 1, "{name} is {values:?}");
    values[0]
}

#[test]
fn the_units_for_systemd_start_the_daemon_with_options_that_it_has() {
    let (socket, service) =
        (include_str!("../../systemd/vhost-brmr@.socket"), include_str!("../../systemd/vhost-brmr@.service"));
    let mut words = setting(service, "ExecStart").split_whitespace();
    assert_eq!(words.next(), Some("/usr/bin/vhost-brmr"));
    let args = Args::try_parse_from(std::iter::once("vhost-brmr").chain(words)).unwrap();
    // A path would be a second socket.
    assert!(args.options.socket_path.is_none() && args.options.fd.is_none() && args.options.once.is_none());
    assert!(setting(socket, "ListenStream").starts_with('/'));
    assert!(!socket.contains("Accept="), "the daemon accepts by itself");
    assert_eq!(setting(service, "Type"), "notify");
    assert_eq!(setting(service, "RestartPreventExitStatus"), "3");
    assert_eq!(setting(service, "StartLimitIntervalSec"), "0");
    // Otherwise the next attempt of the hypervisor to connect would start a daemon for a guest whose disk was taken.
    assert!(setting(service, "ExecStopPost").contains("!= 3 || systemctl stop"));
}

#[test]
fn help_shows_an_example_and_the_exit_codes() {
    let help = String::from_utf8(run(&["--help"]).stdout).unwrap();
    for word in ["vhost-brmr --socket-path", "Exit code", "[default: 30]", "vhost-user-blk-pci"] {
        assert!(help.contains(word), "{word:?} is missing");
    }
}

#[test]
fn a_runtime_failure_ends_with_code_one_and_leaves_no_socket() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let socket = path.to_str().unwrap();
    fs::write(&path, "a file").unwrap();
    let output = run(&["--socket-path", socket, "--pool", "p", "--node", "127.0.0.1:1"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("not a socket"), "{error}");
    assert_eq!(fs::read(&path).unwrap(), b"a file");
    let output = run(&["--fd", "77", "--pool", "p", "--node", "127.0.0.1:1"]);
    assert_eq!(output.status.code(), Some(1));
}

#[test]
fn a_signal_ends_a_daemon_that_waits_for_its_first_node_and_the_log_says_what_for() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let arguments = ["--socket-path", path.to_str().unwrap(), "--pool", "p", "--node", "127.0.0.1:1"];
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_vhost-brmr"))
        .args(arguments)
        .env_remove("RUST_LOG")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut log = BufReader::new(daemon.stderr.take().unwrap());
    let mut line = String::new();
    while !line.contains("127.0.0.1:1") {
        line.clear();
        assert_ne!(log.read_line(&mut line).unwrap(), 0, "ended without a word");
    }
    assert!(line.contains("WARN") && line.contains("the pool is not found yet"), "{line}");
    // SAFETY: a plain call; the process is ours and not reaped.
    assert_eq!(unsafe { libc::kill(daemon.id().cast_signed(), libc::SIGTERM) }, 0);
    let start = Instant::now();
    assert_eq!(daemon.wait().unwrap().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(10), "took {:?}", start.elapsed());
    line.clear();
    log.read_to_string(&mut line).unwrap();
    assert!(line.contains("told to stop before any node answered"), "{line}");
    assert!(!path.exists(), "left its socket");
}

#[test]
fn a_tls_address_without_an_authority_is_an_error_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let start = Instant::now();
    let output =
        run(&["--socket-path", path.to_str().unwrap(), "--pool", "p", "--node", "tls://127.0.0.1:1"]);
    let error = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("tls-authorities") && start.elapsed() < Duration::from_secs(20), "{error}");
}

#[test]
fn a_socket_is_made_with_its_mode_replaces_a_stale_one_and_is_removed() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("s");
    let (file, listener) = SocketFile::listen(&path, 0o640).unwrap();
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    assert!(matches!(SocketFile::listen(&path, 0o600), Err(SocketError::InUse(_))));
    drop(listener);
    std::mem::forget(file);
    let (file, _listener) = SocketFile::listen(&path, 0o600).unwrap();
    drop(file);
    assert!(!path.exists());
    // One that somebody else put there meanwhile is not ours to remove.
    let (file, _listener) = SocketFile::listen(&path, 0o600).unwrap();
    fs::rename(&path, directory.path().join("old")).unwrap();
    let _other = UnixListener::bind(&path).unwrap();
    drop(file);
    assert!(path.exists());
}

#[test]
fn a_socket_that_is_there_can_be_connected_to_at_once() {
    let directory = tempfile::tempdir().unwrap();
    for round in 0..300 {
        let path = directory.path().join(round.to_string());
        std::thread::scope(|scope| {
            let client = scope.spawn(|| {
                while !path.exists() {
                    std::hint::spin_loop();
                }
                UnixStream::connect(&path)
            });
            let (_file, _listener) = SocketFile::listen(&path, 0o600).unwrap();
            client.join().unwrap().unwrap_or_else(|error| panic!("round {round}: {error}"));
        });
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "something was left behind");
    // The longest name that the kernel takes leaves no room for another one before it.
    let length = 107 - directory.path().as_os_str().len() - 1;
    let path = directory.path().join("s".repeat(length));
    let (_file, _listener) = SocketFile::listen(&path, 0o600).unwrap();
    UnixStream::connect(&path).unwrap();
}
