//! The commands against fake nodes with real admin servers.

use std::net::TcpListener;
use std::path::PathBuf;
use std::time::Duration;

use clap::{CommandFactory, Parser};
use rmr_common::pool::{MemberState, PoolId, StoreId};

use super::*;
use crate::admin::api::{ControlError, ErrorCode, StoreState, UnixMs};
use crate::admin::fake::{FakeNode, client, pool_status, set_state};

/// Runs a command line, with a timeout that no answer takes and without what the environment says.
fn rmrctl(args: &[&str]) -> Result<Outcome, String> {
    rmrctl_within("20", args)
}

/// The same with another timeout.
pub(super) fn rmrctl_within(timeout: &str, args: &[&str]) -> Result<Outcome, String> {
    let all = ["rmrctl", "--timeout", timeout].into_iter().chain(args.iter().copied());
    let cli = Cli::try_parse_from(all).map_err(|e| e.to_string())?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(execute(&cli)).map_err(|e| e.to_string())
}

/// Two nodes that hold the members of `vm-1`, both Clean.
pub(super) fn two_nodes() -> (FakeNode, FakeNode) {
    let (a, b) = (FakeNode::start("n0"), FakeNode::start("n1"));
    a.hold(pool_status("vm-1", 2, 0));
    b.hold(pool_status("vm-1", 2, 1));
    (a, b)
}

/// An address where nobody listens: a privileged port that has no service (a port that was free a moment ago could
/// be another test's by now).
fn nobody() -> String {
    "127.0.0.1:1".into()
}

fn create(name: &str, members: &[&str], more: &[&str]) -> Result<Outcome, String> {
    let mut args = vec!["pool", "create", name, "--size", "64M"];
    for member in members {
        args.extend(["--member", member]);
    }
    args.extend(more);
    rmrctl(&args)
}

#[test]
fn a_pool_is_created_on_every_member_and_is_safe() {
    let (a, b) = (FakeNode::start("node-a"), FakeNode::start("node-b"));
    let with_path = format!("{}=/dev/vdb", b.address());
    let more = ["--chunk-size", "64K", "--block-size", "4096", "--overwrite", "--max-size", "1G"];
    let created = create("vm-1", &[&a.address(), &with_path], &more).unwrap();
    assert!(created.text.starts_with("pool vm-1 created: 64 MiB, 2 copies, uuid "), "{}", created.text);
    assert_eq!((created.exit, created.warnings), (0, vec![]));

    let on = |node: &FakeNode| node.state.lock().unwrap().stores.values().next().unwrap().clone();
    let (on_a, on_b) = (on(&a), on(&b));
    assert_eq!((&on_a.spec, &on_a.view), (&on_b.spec, &on_b.view));
    assert_eq!(on_a.spec.chunk_size.bytes(), 64 << 10);
    assert_eq!((on_a.spec.logical_block_size, on_a.spec.size), (4096, 64 << 20));
    assert_eq!(on_a.view.clean(), on_a.spec.member_set());
    assert_eq!((on_a.member.as_u8(), on_b.member.as_u8()), (0, 1));
    let addresses: Vec<_> = on_a.spec.members.iter().map(|m| m.address.to_string()).collect();
    assert_eq!(addresses, ["tcp://node-a:7700", "tcp://node-b:7700"]);
    assert_eq!(on_b.path, PathBuf::from("/dev/vdb"));
    let asked = a.state.lock().unwrap().requests.clone();
    assert_eq!((asked.len(), asked[0].overwrite, asked[0].assume_zero), (1, true, false));
    assert_eq!(asked[0].max_size_bytes, Some(1 << 30));
    assert_eq!(created.json["members"][1]["path"], "/dev/vdb");
    assert_eq!(created.json["pool"], json!(on_a.spec.id));

    let status = rmrctl(&["--node", &a.address(), "--node", &b.address(), "status"]).unwrap();
    assert!(status.text.contains("SAFE: 2 of 2 copies current"), "{}", status.text);
    assert_eq!(status.exit, 0);
}

#[test]
fn a_creation_that_fails_in_the_middle_leaves_nothing() {
    let (a, b, c) = (FakeNode::start("node-a"), FakeNode::start("node-b"), FakeNode::start("node-c"));
    // A store that this call did not make must survive the roll-back.
    a.hold(pool_status("other", 1, 0));
    let refusal = ControlError::new(ErrorCode::HoldsData, "/dev/vdb holds an ext4 file system");
    c.state.lock().unwrap().refuse_create = Some(refusal);
    let error = create("vm-1", &[&a.address(), &b.address(), &c.address()], &[]).unwrap_err();
    assert!(error.contains("pool 'vm-1' was not created"), "{error}");
    assert!(error.contains(&format!("node {}: /dev/vdb holds an ext4", c.address())), "{error}");
    for node in [&a, &b] {
        let line = error.lines().find(|l| l.starts_with("removed again: ") && l.ends_with(&node.address()));
        assert!(line.is_some(), "{error}");
    }
    assert_eq!((a.store_count(), b.store_count(), c.store_count()), (1, 0, 0));
}

#[test]
fn what_cannot_be_rolled_back_is_named_with_the_way_to_remove_it() {
    let (a, b) = (FakeNode::start("node-a"), FakeNode::start("node-b"));
    a.state.lock().unwrap().refuse_delete = Some(ControlError::new(ErrorCode::Busy, "stopping"));
    b.state.lock().unwrap().refuse_create = Some(ControlError::new(ErrorCode::NoSpace, "too small"));
    let error = create("vm-1", &[&a.address(), &b.address()], &[]).unwrap_err();
    let id = a.state.lock().unwrap().stores.values().next().unwrap().spec.id;
    assert!(error.contains("NOT removed: store "), "{error}");
    let way = format!("rmrctl --node {} pool delete {id} --force --yes-destroy-all-data", a.address());
    assert!(error.contains(&way), "{error}");

    // And that way works.
    a.state.lock().unwrap().refuse_delete = None;
    let words: Vec<_> = way.split(' ').skip(1).collect();
    assert_eq!(rmrctl(&words).unwrap().exit, 0);
    assert_eq!(a.store_count(), 0);
}

#[test]
fn a_creation_without_an_answer_is_rolled_back_too() {
    let (a, b) = (FakeNode::start("node-a"), FakeNode::start("node-b"));
    b.state.lock().unwrap().create_takes = Duration::from_secs(60);
    let error = create("vm-1", &[&a.address(), &b.address()], &["--create-timeout", "0.3"]).unwrap_err();
    assert!(error.contains("no answer within 300 ms"), "{error}");
    assert_eq!((a.store_count(), b.store_count()), (0, 0), "{error}");
}

#[test]
fn a_node_that_cannot_be_reached_stops_the_creation_before_it_begins() {
    let a = FakeNode::start("node-a");
    let gone = nobody();
    let error = create("vm-1", &[&a.address(), &gone], &[]).unwrap_err();
    assert!(error.starts_with(&format!("nothing was created: node {gone}: ")), "{error}");
    assert_eq!(a.store_count(), 0);
}

#[test]
fn a_name_that_a_node_has_is_refused_with_a_hint() {
    let (a, b) = (FakeNode::start("n0"), FakeNode::start("n1"));
    b.hold(pool_status("vm-1", 2, 1));
    a.hold(pool_status("vm-1", 2, 0));
    let same = create("vm-1", &[&a.address(), &b.address()], &[]).unwrap_err();
    assert!(same.contains("a pool 'vm-1' exists already") && same.contains("on n0, n1"), "{same}");
    assert!(same.contains("nothing left to do"), "{same}");
    a.state.lock().unwrap().stores.clear();
    let other = create("vm-1", &[&b.address()], &[]).unwrap_err();
    assert!(other.contains("choose another name"), "{other}");
    // Also on a node that is only named beside the members.
    let error = create("vm-1", &[&a.address()], &["--node", &b.address()]).unwrap_err();
    assert!(error.contains("exists already"), "{error}");
    assert_eq!((a.store_count(), b.store_count()), (0, 1));
}

#[test]
fn a_creation_that_was_cut_short_is_completed_by_the_same_command() {
    let (a, b) = (FakeNode::start("node-a"), FakeNode::start("node-b"));
    create("vm-1", &[&a.address(), &b.address()], &[]).unwrap();
    let on = |node: &FakeNode| node.state.lock().unwrap().stores.values().next().cloned();
    let (first, second) = (on(&a).unwrap(), on(&b).unwrap());
    // As if the command had been killed in between; the members may be named in another order now.
    b.state.lock().unwrap().stores.clear();
    let again = create("vm-1", &[&b.address(), &a.address()], &[]).unwrap();
    assert!(
        again.text.contains("made in part by another command") && again.text.contains("1 of 2 stores"),
        "{}",
        again.text
    );
    assert_eq!((on(&a), on(&b).unwrap().store), (Some(first.clone()), second.store));
    assert_eq!(on(&b).unwrap().spec, first.spec);
    assert_eq!(again.json["members"].as_array().unwrap().len(), 2);
    // Another size is another pool, and so is one that a client has used.
    b.state.lock().unwrap().stores.clear();
    let other = rmrctl(&[
        "pool",
        "create",
        "vm-1",
        "--size",
        "32M",
        "--member",
        &a.address(),
        "--member",
        &b.address(),
    ]);
    assert!(other.unwrap_err().contains("exists already"));
    a.state.lock().unwrap().stores.values_mut().for_each(|s| s.client = Some(client(1)));
    let used = create("vm-1", &[&a.address(), &b.address()], &[]);
    assert!(used.unwrap_err().contains("exists already"));
    assert_eq!(b.store_count(), 0);
}

#[test]
fn two_creations_begin_on_the_same_node_in_whatever_order_they_name_it() {
    let (a, b) = (FakeNode::start("node-a"), FakeNode::start("node-b"));
    b.state.lock().unwrap().refuse_create = Some(ControlError::new(ErrorCode::Exists, "there is one"));
    let error = create("vm-1", &[&b.address(), &a.address()], &[]).unwrap_err();
    // On node-a first, whose store is removed again.
    let asked = a.state.lock().unwrap().requests.len();
    assert_eq!((asked, a.store_count()), (1, 0), "{error}");
    assert!(error.contains("there is one"), "{error}");
}

#[test]
fn a_store_that_a_node_left_out_is_shown_with_the_reason() {
    let (a, b) = two_nodes();
    b.state.lock().unwrap().stores.clear();
    b.state.lock().unwrap().left_out.push(crate::admin::fake::left_out("/dev/vdb", "vm-1", 1));
    let (on_a, on_b) = (a.address(), b.address());
    let status = rmrctl(&["--node", &on_a, "--node", &on_b, "status"]).unwrap();
    assert!(status.text.contains("member 1: n1 left it out: /dev/vdb: I/O error"), "{}", status.text);
    assert!(!status.text.contains("not asked") && status.text.contains("left out"), "{}", status.text);
    assert_eq!(status.exit, 4);
    // It is the same with one that is Out, of which the headline says nothing by itself.
    let mut out = pool_status("vm-1", 2, 0);
    set_state(&mut out, 1, MemberState::Out);
    a.hold(out);
    let status = rmrctl(&["--node", &on_a, "--node", &on_b, "status", "vm-1"]).unwrap();
    assert!(status.text.contains("left it out: /dev/vdb: I/O error"), "{}", status.text);
    assert_eq!(status.exit, 3);
    // A pool of which nothing else is known.
    a.state.lock().unwrap().stores.clear();
    let status = rmrctl(&["--node", &on_a, "--node", &on_b, "status"]).unwrap();
    assert!(
        status.text.contains("n1: store /dev/vdb of pool 'vm-1' member 1 is left out: I/O error"),
        "{}",
        status.text
    );
    assert_eq!(status.exit, 4);
    let error = rmrctl(&["--node", &on_a, "--node", &on_b, "status", "vm-1"]).unwrap_err();
    assert!(error.contains("n1: store /dev/vdb of pool 'vm-1'"), "{error}");
}

#[test]
fn stores_are_listed_opened_closed_and_deleted() {
    let (a, b) = two_nodes();
    b.state.lock().unwrap().left_out.push(crate::admin::fake::left_out("/dev/vdb", "vm-2", 0));
    let (on_a, on_b) = (a.address(), b.address());
    let both = ["--node", &on_a, "--node", &on_b];
    let run = |nodes: &[&str], args: &[&str]| rmrctl(&[nodes, args].concat());
    let list = run(&both, &["store", "list"]).unwrap();
    assert!(list.text.contains("LEFT OUT") && list.text.contains("tried again in 1 s"), "{}", list.text);
    assert_eq!(list.exit, EXIT_FAILED);
    // A path is one of a node.
    assert!(run(&both, &["store", "open", "/dev/vdb"]).unwrap_err().contains("name that node alone"));
    let opened = run(&["--node", &on_b], &["store", "open", "/dev/vdb"]).unwrap();
    assert!(
        opened.text.contains("of pool vm-2 at /dev/vdb") && opened.text.contains("is opened"),
        "{}",
        opened.text
    );
    // A store is looked for on all nodes.
    let store = pool_status("vm-1", 2, 1).store.to_string();
    let closed = run(&both, &["store", "close", &store]).unwrap();
    assert!(closed.text.contains("is closed"), "{}", closed.text);
    assert_eq!(run(&both, &["store", "list"]).unwrap().exit, 0, "it is closed on purpose");
    let error = run(&both, &["store", "delete", &store]).unwrap_err();
    assert!(error.contains("--yes-destroy-all-data"), "{error}");
    run(&both, &["store", "delete", &store, "--yes-destroy-all-data"]).unwrap();
    assert!(b.state.lock().unwrap().left_out.is_empty());
    assert!(run(&both, &["store", "close", "vdb"]).is_err());
}

#[test]
fn an_unreachable_node_beside_the_members_is_only_a_warning() {
    let a = FakeNode::start("n0");
    let gone = nobody();
    let created = create("vm-1", &[&a.address()], &["--node", &gone]).unwrap();
    assert_eq!(created.warnings.len(), 1);
    assert!(
        created.warnings[0].contains("whether it has a pool 'vm-1' is not known"),
        "{:?}",
        created.warnings
    );
}

#[test]
fn members_that_cannot_be_one_pool_are_refused() {
    let (a, twin) = (FakeNode::start("same"), FakeNode::start("same"));
    let twice = create("vm-1", &[&a.address(), &a.address()], &[]).unwrap_err();
    assert!(twice.contains("is given twice"), "{twice}");
    let twins = create("vm-1", &[&a.address(), &twin.address()], &[]).unwrap_err();
    assert!(twins.contains("both advertise tcp://same:7700"), "{twins}");
    let rdma = create("vm-1", &[&a.address()], &["--transport", "rdma"]).unwrap_err();
    assert!(rdma.contains("advertises no rdma address, only: tcp://same:7700"), "{rdma}");
    let nine: Vec<_> = (1..10).map(|i| format!("127.0.0.{i}:1")).collect();
    let nine = create("vm-1", &nine.iter().map(String::as_str).collect::<Vec<_>>(), &[]).unwrap_err();
    assert!(nine.contains("9 members: expected 1 to 8"), "{nine}");
    assert_eq!((a.store_count(), twin.store_count()), (0, 0));
}

#[test]
fn an_address_that_only_one_machine_can_reach_is_warned_of() {
    let (a, b) = (FakeNode::start("127.0.0.1"), FakeNode::start("node-b"));
    let created = create("vm-1", &[&a.address(), &b.address()], &[]).unwrap();
    assert!(created.warnings[0].contains("which only its own machine can reach"), "{:?}", created.warnings);
    let (a, b) = (FakeNode::start("127.0.0.1"), FakeNode::start("127.0.0.2"));
    assert_eq!(create("vm-1", &[&a.address(), &b.address()], &[]).unwrap().warnings, Vec::<String>::new());
}

#[test]
fn bad_arguments_are_refused_in_words() {
    let a = FakeNode::start("n0");
    let address = a.address();
    let member = ["--member", &address];
    let run = |args: &[&str]| rmrctl(&[&["pool", "create"], args].concat()).unwrap_err();
    for (args, problem) in [
        (vec!["vm-1", "--size", "10GB"], "decimal units are not used"),
        (vec!["vm-1", "--size", "4095"], "pool size 4095 bytes: expected a multiple of 4096"),
        (vec!["a b", "--size", "64M"], "pool name 'a b'"),
        (vec!["vm-1", "--size", "64M", "--chunk-size", "3M"], "chunk size 3145728 bytes"),
        (vec!["vm-1", "--size", "64M", "--block-size", "1024"], "logical block size 1024"),
    ] {
        let error = run(&[&args[..], &member[..]].concat());
        assert!(error.contains(problem), "{args:?}: {error}");
    }
    assert!(run(&["vm-1", "--size", "64M"]).contains("--member"));
    assert!(run(&["vm-1", "--size", "64M", "--member", "a=b"]).contains("expected an absolute path"));
    assert!(rmrctl(&["pool", "show", "a/b"]).unwrap_err().contains("pool name 'a/b'"));
    let timeout = Cli::try_parse_from(["rmrctl", "--timeout", "0", "status"]).unwrap_err().to_string();
    assert!(timeout.contains("expected seconds from 0.1"), "{timeout}");
    assert_eq!(a.store_count(), 0);
}

#[test]
fn status_merges_what_the_nodes_say() {
    let (a, b) = two_nodes();
    {
        let mut state = a.state.lock().unwrap();
        let status = state.stores.values_mut().next().unwrap();
        set_state(status, 1, MemberState::Out);
        status.client = Some(client(5));
        status.peers[0].missed.blocks = Some(3200);
        status.peers[0].state_since_unix_ms = Some(UnixMs(UnixMs::now().0 - 61_000));
    }
    // The member that was left behind still believes the old view; asked first, it must not win.
    let nodes = ["--node", &b.address(), "--node", &a.address()];
    let status = rmrctl(&[&nodes[..], &["status", "vm-1"]].concat()).unwrap();
    assert_eq!(status.exit, 3);
    assert!(
        status.text.contains("DEGRADED: 1 of 2 copies current; member 1 (n1) is Out since "),
        "{}",
        status.text
    );
    assert!(status.text.contains("(1 min 1 s ago), missed 12.5 MiB"), "{}", status.text);
    assert!(status.text.contains("client: vhost-brmr on hv-1, pid 77"), "{}", status.text);
    let table: Vec<Vec<_>> = status
        .text
        .lines()
        .filter(|l| l.contains("  tcp://"))
        .map(|l| l.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect())
        .collect();
    assert_eq!(table.len(), 2, "{}", status.text);
    assert_eq!(table[0], ["0", "n0", "tcp://n0:7700", "Clean", "-", "serving", "client up", "-"]);
    assert_eq!(table[1], ["1", "n1", "tcp://n1:7700", "Out", "12.5 MiB", "serving", "no client", "-"]);
}

#[test]
fn a_node_that_does_not_answer_makes_the_state_unknown() {
    let (a, _) = two_nodes();
    let gone = nobody();
    let status = rmrctl(&["--node", &a.address(), "--node", &gone, "status"]).unwrap();
    assert_eq!(status.exit, 4);
    let words = "UNKNOWN: only 1 of 2 current copies seen; member 1 (tcp://n1:7700) was not seen";
    assert!(status.text.contains(words), "{}", status.text);
    assert!(status.warnings[0].starts_with(&format!("node {gone}: ")), "{:?}", status.warnings);
    assert_eq!(status.json["nodes"][1]["answered"], false);

    let alone = rmrctl(&["--node", &a.address(), "status"]).unwrap();
    assert!(alone.text.contains("was not asked; give its admin address with --node"), "{}", alone.text);

    let nothing = rmrctl(&["--node", &gone, "status"]).unwrap();
    assert_eq!((nothing.exit, nothing.text.as_str()), (4, "UNKNOWN: no node answered\n"));
}

#[test]
fn status_of_all_pools_and_of_one_agree_while_a_node_is_silent() {
    let a = FakeNode::start("n0");
    let gone = nobody();
    let nodes = ["--node", &a.address(), "--node", &gone];
    let exit = |args: &[&str]| rmrctl(&[&nodes[..], args].concat()).unwrap().exit;
    assert_eq!(exit(&["status"]), 6, "it may have pools, and no other node does");
    a.hold(pool_status("vm-1", 1, 0));
    assert_eq!((exit(&["status"]), exit(&["status", "vm-1"])), (6, 6));
    let all = rmrctl(&[&nodes[..], &["status"]].concat()).unwrap();
    assert!(all.text.contains("SAFE: 1 of 1 copies current, one copy only"), "{}", all.text);
    assert!(all.text.contains(&format!("note: {gone} did not answer")), "{}", all.text);
    // What is worse than that counts.
    a.state.lock().unwrap().stores.values_mut().next().unwrap().store_state =
        StoreState::Failed { reason: "I/O error".into() };
    assert_eq!((exit(&["status"]), exit(&["status", "vm-1"])), (4, 4));
    let alone = ["--node", &a.address(), "pool", "list"];
    a.state.lock().unwrap().stores.values_mut().next().unwrap().store_state = StoreState::Serving;
    let list = rmrctl(&alone).unwrap().text;
    assert!(list.contains("SAFE, one copy only"), "{list}");
}

#[test]
fn the_worst_pool_decides_the_exit_code() {
    let a = FakeNode::start("n0");
    assert_eq!(rmrctl(&["--node", &a.address(), "status"]).unwrap().exit, 0);
    a.hold(pool_status("vm-1", 1, 0));
    let mut broken = pool_status("vm-2", 1, 0);
    broken.spec.id = PoolId::random();
    broken.store = StoreId::random();
    broken.view.members[0].store = broken.store;
    broken.store_state = StoreState::Failed { reason: "I/O error".into() };
    a.hold(broken);
    let status = rmrctl(&["--node", &a.address(), "status"]).unwrap();
    assert!(status.text.contains("SAFE: 1 of 1") && status.text.contains("SUSPENDED: "), "{}", status.text);
    assert_eq!(status.exit, 4);
}

#[test]
fn the_json_of_status_keeps_its_form() {
    let (a, b) = two_nodes();
    let nodes = ["--node", &a.address(), "--node", &b.address()];
    let status = rmrctl(&[&nodes[..], &["--json", "status", "vm-1"]].concat()).unwrap();
    let member = |id: u8| {
        json!({
            "member": id, "node": format!("n{id}"), "address": format!("tcp://n{id}:7700"), "state": "clean", "maintenance": false,
            "since_unix_ms": null, "missed_bytes": 0, "missed_exact": true, "leg": "none",
            "store_state": {"state": "serving"}, "resync": null, "condition": null, "disk": null, "left_out": null,
        })
    };
    let expected = json!({
        "pools": [{
            "pool": "aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa",
            "name": "vm-1",
            "size_bytes": 64 << 20,
            "view": 1,
            "epoch": 0,
            "assessment": {
                "level": "safe", "headline": "SAFE: 2 of 2 copies current", "current": 2, "copies": 2, "planned": false,
                "members": [member(0), member(1)], "client": null, "notes": [],
            },
        }],
        "nodes": [
            {"address": a.address(), "answered": true, "error": null},
            {"address": b.address(), "answered": true, "error": null},
        ],
        "left_out": [],
    });
    assert_eq!(status.json, expected, "{:#}", status.json);
}

#[test]
fn pools_are_listed_once_and_shown_by_name_or_uuid() {
    let (a, b) = two_nodes();
    let nodes = ["--node", &a.address(), "--node", &b.address()];
    let list = rmrctl(&[&nodes[..], &["pool", "list"]].concat()).unwrap();
    let lines: Vec<_> = list.text.lines().collect();
    assert_eq!(lines.len(), 2, "{}", list.text);
    assert!(
        lines[1]
            .starts_with("vm-1  aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa  64 MiB  2       2     -       SAFE")
    );
    for key in ["vm-1", "aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa"] {
        let show = rmrctl(&[&nodes[..], &["pool", "show", key]].concat()).unwrap();
        for text in
            ["chunk size  1 MiB", "block size  512 bytes", "/stores/aaaaaaaa", &a.address(), &b.address()]
        {
            assert!(show.text.contains(text), "{text} is not in\n{}", show.text);
        }
        assert_eq!(show.json["stores"].as_array().unwrap().len(), 2);
    }
    let error = rmrctl(&[&nodes[..], &["pool", "show", "vm-9"]].concat()).unwrap_err();
    assert!(error.starts_with("there is no pool 'vm-9' on the nodes asked ("), "{error}");

    let gone = nobody();
    let partial = rmrctl(&["--node", &a.address(), "--node", &gone, "pool", "list"]).unwrap();
    assert_eq!((partial.exit, partial.warnings.len()), (1, 1));
    let error = rmrctl(&["--node", &gone, "pool", "list"]).unwrap_err();
    assert!(error.starts_with("no node answered: "), "{error}");
}

#[test]
fn a_name_of_two_pools_is_refused_with_both_uuids() {
    let (a, b) = (FakeNode::start("n0"), FakeNode::start("n1"));
    a.hold(pool_status("vm-1", 1, 0));
    let mut other = pool_status("vm-1", 1, 0);
    other.spec.id = PoolId::from_bytes([0xBB; 16]);
    b.hold(other);
    let error =
        rmrctl(&["--node", &a.address(), "--node", &b.address(), "pool", "show", "vm-1"]).unwrap_err();
    assert!(error.contains("aaaaaaaa-aaaa") && error.contains("bbbbbbbb-bbbb"), "{error}");
}

#[test]
fn a_pool_is_deleted_only_when_meant_and_unused_and_whole() {
    let (a, b) = two_nodes();
    let (node_a, node_b) = (a.address(), b.address());
    let nodes = ["--node", &node_a, "--node", &node_b];
    let delete = |nodes: &[&str], more: &[&str]| rmrctl(&[nodes, &["pool", "delete", "vm-1"], more].concat());
    let yes = "--yes-destroy-all-data";

    let error = delete(&nodes, &[]).unwrap_err();
    assert!(error.contains("would destroy all 64 MiB of pool 'vm-1'") && error.contains(yes), "{error}");
    assert!(delete(&nodes, &["--force"]).unwrap_err().contains(yes));

    a.state.lock().unwrap().stores.values_mut().next().unwrap().client = Some(client(5));
    let error = delete(&nodes, &[yes]).unwrap_err();
    assert!(error.contains("vhost-brmr on hv-1, pid 77") && error.contains("--force"), "{error}");
    a.state.lock().unwrap().stores.values_mut().next().unwrap().client = None;

    let error = delete(&nodes[..2], &[yes]).unwrap_err();
    assert!(error.contains("the store of member 1 (tcp://n1:7700) would be left behind"), "{error}");
    assert_eq!((a.store_count(), b.store_count()), (1, 1));

    b.state.lock().unwrap().refuse_delete = Some(ControlError::new(ErrorCode::Busy, "stopping"));
    let error = delete(&nodes, &[yes]).unwrap_err();
    assert!(error.contains("deleted only in part (1 of 2 stores): member 1 is still there"), "{error}");
    b.state.lock().unwrap().refuse_delete = None;

    // The rest: its other member is gone already, so it takes --force.
    let rest = delete(&nodes, &[yes, "--force"]).unwrap();
    assert!(rest.text.starts_with("pool vm-1 (aaaaaaaa"), "{}", rest.text);
    assert_eq!(rest.warnings, ["left behind: the store of member 0 (tcp://n0:7700)"]);
    assert_eq!((a.store_count(), b.store_count()), (0, 0));
}

#[test]
fn force_deletes_under_a_client() {
    let (a, b) = two_nodes();
    a.state.lock().unwrap().stores.values_mut().next().unwrap().client = Some(client(5));
    let nodes = ["--node", &a.address(), "--node", &b.address()];
    let args = ["pool", "delete", "vm-1", "--yes-destroy-all-data", "--force"];
    let outcome = rmrctl(&[&nodes[..], &args[..]].concat()).unwrap();
    assert_eq!((outcome.exit, outcome.json["deleted"].as_array().unwrap().len()), (0, 2));
    assert_eq!((a.store_count(), b.store_count()), (0, 0));
}

#[test]
fn nodes_are_shown_and_silent_ones_make_it_fail() {
    let a = FakeNode::start("node-a");
    let gone = nobody();
    let shown = rmrctl(&["--node", &a.address(), "node", "show"]).unwrap();
    assert_eq!(shown.exit, 0);
    assert!(shown.text.lines().nth(1).unwrap().starts_with("node-a  "), "{}", shown.text);
    assert_eq!(shown.json["nodes"][0]["info"]["name"], "node-a");
    let shown = rmrctl(&["--node", &a.address(), "--node", &gone, "node", "show"]).unwrap();
    assert_eq!((shown.exit, shown.warnings.len()), (1, 1));
}

#[test]
fn a_server_that_is_no_node_is_told_apart_and_costs_no_more_than_the_timeout() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let begun = std::time::Instant::now();
    let args = ["rmrctl", "--timeout", "0.3", "--node", &address, "node", "show"];
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let silent = runtime.block_on(execute(&Cli::try_parse_from(args).unwrap())).unwrap();
    assert!(silent.warnings[0].contains("no answer within 300 ms"), "{:?}", silent.warnings);
    // A request may take 10 s where nothing else is said.
    assert!(begun.elapsed() < Duration::from_secs(8));
    // The connection of the first request waits unanswered in the queue.
    let server = std::thread::spawn(move || {
        drop(listener.accept().unwrap());
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        let _ = std::io::Read::read(&mut stream, &mut request).unwrap();
        stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 3\r\n\r\nno\n").unwrap();
    });
    let other = rmrctl(&["--node", &address, "node", "show"]).unwrap();
    assert!(other.warnings[0].contains("is this the admin address of an rmr-node?"), "{:?}", other.warnings);
    server.join().unwrap();
}

#[test]
fn every_help_is_consistent_and_mentions_examples() {
    let mut command = Cli::command();
    command.clone().debug_assert();
    command.build();
    let help = |c: &mut clap::Command| c.render_long_help().to_string();
    assert!(help(&mut command).contains("Examples:\n  rmrctl pool create"));
    let status = command.find_subcommand_mut("status").unwrap();
    assert!(help(status).contains("Examples:\n  rmrctl --node node-a"));
    let create = command.find_subcommand_mut("pool").unwrap().find_subcommand_mut("create").unwrap();
    assert!(help(create).contains("Examples:\n  rmrctl pool create"));
}

#[test]
fn only_the_level_words_are_coloured() {
    assert_eq!(colour_levels("  SAFE: 2 of 2\n"), "  \x1b[1;32mSAFE:\x1b[0m 2 of 2\n");
    assert_eq!(colour_levels("SAFELY\n"), "SAFELY\n");
}
