//! The two programs as an operator starts them: what they print where, and their exit codes.

use std::net::TcpListener;
use std::path::Path;
use std::process::{Command, Output};

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
    let gone = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    for (args, exit, out) in [
        (vec!["--node", &gone, "pool", "list"], 1, ""),
        (vec!["--node", &gone, "pool", "list", "--json"], 1, ""),
        (vec!["--node", &gone, "status"], 4, "UNKNOWN: no node answered\n"),
    ] {
        let output = rmrctl(&args);
        assert_eq!((output.status.code(), text(&output.stdout).as_str()), (Some(exit), out), "{args:?}");
        assert!(text(&output.stderr).starts_with("rmrctl: "), "{}", text(&output.stderr));
    }
    assert_eq!(rmrctl(&["pool", "burn"]).status.code(), Some(2));
    let json = rmrctl(&["--node", &gone, "status", "--json"]);
    let parsed: serde_json::Value = serde_json::from_slice(&json.stdout).unwrap();
    assert_eq!(parsed["nodes"][0]["answered"], false);
}
