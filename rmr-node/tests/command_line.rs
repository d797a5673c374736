//! The two programs as an operator starts them: what they print where, and their exit codes.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::mpsc;
use std::time::Duration;

fn rmr_node(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rmr-node"))
        .args(args)
        .env_remove("RMR_LOG")
        .output()
        .expect("the program starts")
}

fn rmrctl(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rmrctl"))
        .args(args)
        .env_remove("RMR_NODES")
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).expect("the output is UTF-8")
}

fn write(dir: &Path, content: &str) -> String {
    let path = dir.join("node.toml");
    std::fs::write(&path, content).expect("the file is written");
    path.to_str().expect("the path is UTF-8").to_owned()
}

#[test]
fn check_config_prints_what_the_node_would_run_with_and_reads_back() {
    let dir = tempfile::tempdir().unwrap();
    let file = write(dir.path(), "node_name = \"node-a\"\nshards = 2\n");
    let first = rmr_node(&["--config", &file, "--resync-max-inflight", "3", "--check-config"]);
    assert_eq!(first.status.code(), Some(0), "{}", text(&first.stderr));
    let printed = text(&first.stdout);
    for line in ["node_name = \"node-a\"", "shards = 2", "max_inflight = 3", "level = \"info\""] {
        assert!(printed.lines().any(|l| l == line), "no {line} in\n{printed}");
    }
    let file = write(dir.path(), &printed);
    assert_eq!(text(&rmr_node(&["--config", &file, "--check-config"]).stdout), printed);
}

#[test]
fn bad_configuration_ends_with_two_and_one_clear_error() {
    let dir = tempfile::tempdir().unwrap();
    for (content, problem) in [
        ("shards = 1\nshard = 2\n", "line 2"),
        ("advertise = [\"0.0.0.0:7700\"]\n", "advertise: tcp://0.0.0.0:7700 stands for every address"),
    ] {
        let output = rmr_node(&["--config", &write(dir.path(), content)]);
        assert_eq!(output.status.code(), Some(2));
        let error = text(&output.stderr);
        assert!(error.starts_with("rmr-node: ") && error.contains(problem), "{error}");
        assert_eq!(error.matches("rmr-node: ").count(), 1, "{error}");
    }
    assert_eq!(rmr_node(&["--config", "/nonexistent"]).status.code(), Some(2));
    assert_eq!(rmr_node(&["--shards", "0"]).status.code(), Some(2));
}

#[test]
fn rmrctl_keeps_errors_out_of_its_output() {
    // A privileged port that has no service.
    let gone = "127.0.0.1:1";
    for (args, exit, out) in [
        (vec!["--node", gone, "pool", "list"], 1, ""),
        (vec!["--node", gone, "pool", "list", "--json"], 1, ""),
        (vec!["--node", gone, "status"], 4, "UNKNOWN: no node answered\n"),
    ] {
        let output = rmrctl(&args);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(exit), out), "{args:?}");
        assert!(text(&output.stderr).starts_with("rmrctl: "), "{}", text(&output.stderr));
    }
    assert_eq!(rmrctl(&["pool", "burn"]).status.code(), Some(2));
    let json = rmrctl(&["--node", gone, "status", "--json"]);
    let parsed: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(parsed["nodes"][0]["answered"], false);
}

/// Reads one request: its first line.
fn request_line(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(20))).expect("a timeout is set");
    let mut bytes = Vec::new();
    let mut part = [0; 4096];
    while !bytes.windows(4).any(|w| w == b"\r\n\r\n") {
        let count = stream.read(&mut part).expect("the request arrives");
        assert!(count > 0, "the request is cut off");
        bytes.extend_from_slice(&part[..count]);
    }
    text(&bytes).lines().next().expect("there is a first line").to_owned()
}

fn answer(mut stream: TcpStream, body: &str) {
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\nconnection: close\r\n\r\n", body.len());
    stream.write_all(format!("{head}{body}").as_bytes()).expect("the answer is taken");
}

/// A node that never finishes a creation. It reports each request line, and ends after a DELETE.
fn node_that_hangs(requests: mpsc::Sender<String>) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let address = listener.local_addr().expect("it has an address");
    std::thread::spawn(move || {
        let mut hanging = Vec::new();
        for stream in listener.incoming().take(10) {
            let mut stream = stream.expect("a connection comes");
            let line = request_line(&mut stream);
            let info = r#"{"name":"n","version":"1","started_unix_ms":0,"now_unix_ms":0,
                "data_addresses":["tcp://n:7700"],"admin_address":"127.0.0.1:1","engine":"uring","shards":1,
                "stores":0,"connections":0,"max_connections":1,"buffer_bytes":0,"buffer_used_bytes":0}"#;
            let deleted = line.strip_prefix("DELETE /v1/stores/").map(|rest| rest[..36].to_owned());
            match &line {
                l if l.starts_with("GET /v1/node") => answer(stream, info),
                l if l.starts_with("GET /v1/pools") => answer(stream, r#"{"pools":[]}"#),
                _ => match deleted {
                    Some(store) => answer(stream, &format!(r#"{{"store":"{store}"}}"#)),
                    None => hanging.push(stream),
                },
            }
            if requests.send(line).is_err() {
                return;
            }
        }
    });
    address
}

#[test]
fn an_interrupted_creation_is_rolled_back() {
    let (sender, requests) = mpsc::channel();
    let node = node_that_hangs(sender).to_string();
    let child = Command::new(env!("CARGO_BIN_EXE_rmrctl"))
        .args(["pool", "create", "vm-1", "--size", "64M", "--member", &node])
        .env_remove("RMR_NODES")
        .stderr(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let next = || requests.recv_timeout(Duration::from_secs(60)).expect("a request comes");
    while !next().starts_with("POST /v1/stores") {}
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-INT", &pid]).status().expect("kill runs").success());
    assert!(next().starts_with("DELETE /v1/stores/"));
    let output = child.wait_with_output().expect("it ends");
    let error = text(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("interrupted while") && error.contains("removed again: store "), "{error}");
    assert!(output.stdout.is_empty());
}

/// A command whose output goes to a pipe that nobody reads.
fn unread(program: &str, args: &[&str]) -> Output {
    let mut child = Command::new(program)
        .args(args)
        .env_remove("RMR_NODES")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    drop(child.stdout.take());
    child.wait_with_output().expect("it ends")
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure_and_not_spoken_of() {
    let (node, ctl) = (env!("CARGO_BIN_EXE_rmr-node"), env!("CARGO_BIN_EXE_rmrctl"));
    let dir = tempfile::tempdir().unwrap();
    let store = dir.path().join("store");
    let store = store.to_str().expect("the path is UTF-8");
    let create =
        ["store", "create", store, "--pool", "p", "--size", "8M", "--member", "0=127.0.0.1:1", "--this", "0"];
    let gone = "127.0.0.1:1";
    for (program, args, exit) in [
        (node, &["--check-config"][..], 0),
        (node, &create, 0),
        (node, &["store", "inspect", store], 0),
        (ctl, &["--help"], 0),
        (ctl, &["doctor", "--json"], 0),
    ] {
        let output = unread(program, args);
        // A doctor has its own codes for what it finds.
        let code = output.status.code();
        assert!(code == Some(exit) || args[0] == "doctor" && code == Some(3), "{args:?}: {output:?}");
        assert_eq!(text(&output.stderr), "", "{args:?}");
    }
    // What is to be said of the command itself is said, once.
    let output = unread(ctl, &["--node", gone, "status"]);
    assert_eq!((output.status.code(), text(&output.stderr).lines().count()), (Some(4), 1), "{output:?}");
}

#[test]
fn nobody_has_to_read_what_goes_wrong() {
    for (program, args, exit) in [
        (env!("CARGO_BIN_EXE_rmrctl"), &["--node", "127.0.0.1:1", "pool", "list"][..], 1),
        (env!("CARGO_BIN_EXE_rmr-node"), &["--config", "/nonexistent"], 2),
    ] {
        let mut child = Command::new(program)
            .args(args)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the program starts");
        drop(child.stderr.take());
        assert_eq!(child.wait().expect("it ends").code(), Some(exit), "{args:?}");
    }
}

#[test]
fn a_cause_is_said_once() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("nothing");
    let path = path.to_str().expect("the path is UTF-8");
    for output in [
        rmr_node(&["store", "inspect", path]),
        rmr_node(&["--config", path]),
        rmr_node(&["--listen", "tls://127.0.0.1:0", "--tls-certificate", path, "--tls-key", path]),
        rmrctl(&["--node", "127.0.0.1:1", "pool", "list"]),
    ] {
        let error = text(&output.stderr);
        let line =
            error.lines().find(|line| line.contains("(os error ")).unwrap_or_else(|| panic!("{error}"));
        assert_eq!(line.matches("(os error ").count(), 1, "{line}");
    }
}

#[test]
fn a_node_outlives_the_reader_of_its_log() {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port is free");
    let admin = listener.local_addr().expect("it has an address").to_string();
    drop(listener);
    let mut child = Command::new(env!("CARGO_BIN_EXE_rmr-node"))
        .args(["--listen", "tcp://127.0.0.1:0", "--admin", &admin, "--log-level", "trace"])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program starts");
    let mut log = child.stderr.take().expect("there is a pipe");
    let mut seen = Vec::new();
    while !text(&seen).contains("serving 0 stores") {
        let mut part = [0; 4096];
        let count = log.read(&mut part).expect("the log is read");
        assert!(count > 0, "{}", text(&seen));
        seen.extend_from_slice(&part[..count]);
    }
    drop(log);
    for _ in 0..3 {
        // Each connection is worth a line of trace at least.
        let mut stream = TcpStream::connect(&admin).expect("it is there");
        stream.write_all(b"GET /v1/pools HTTP/1.1\r\nhost: localhost\r\n\r\n").expect("it takes the request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("it answers");
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    }
    let pid = child.id().to_string();
    assert!(Command::new("kill").args(["-TERM", &pid]).status().expect("kill runs").success());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}
