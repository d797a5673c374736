//! The commands that change a pool in use, against fake nodes whose coordinator answers as told.

use rmr_common::pool::{
    Address, Command, CommandReply, MemberAddress, MemberSpec, MemberState, Refusal, StoreId,
};

use super::tests::{rmrctl_within, two_nodes};
use crate::admin::api::{ClientState, ControlError, ErrorCode, PoolStatus};
use crate::admin::fake::{FakeNode, client, member, pool_status, set_state};

/// Two nodes with a pool, of which the first one's coordinator will answer with these.
fn in_use(replies: impl IntoIterator<Item = CommandReply>) -> (FakeNode, FakeNode) {
    let (a, b) = two_nodes();
    a.state.lock().unwrap().replies.extend(replies);
    (a, b)
}

fn done() -> CommandReply {
    let status = pool_status("vm-1", 2, 0);
    CommandReply::Done { view: status.view, spec: status.spec }
}

fn refused(reason: Refusal) -> CommandReply {
    CommandReply::refused(reason, "no, because of the moon")
}

fn commands(node: &FakeNode) -> Vec<Command> {
    node.state.lock().unwrap().commands.clone()
}

fn run(nodes: &[&FakeNode], args: &[&str]) -> Result<super::Outcome, String> {
    let addresses: Vec<_> = nodes.iter().map(|node| node.address()).collect();
    let mut all: Vec<&str> = addresses.iter().flat_map(|a| ["--node", a]).collect();
    all.extend(args);
    rmrctl_within("3", &all)
}

#[test]
fn a_member_is_added_with_a_store_that_nobody_can_take_for_current() {
    let (a, b) = in_use([done()]);
    let c = FakeNode::start("n2");
    let at = format!("{}=/dev/vdb", c.address());
    let added = run(&[&a, &b], &["pool", "add-member", "vm-1", "--member", &at]).unwrap();
    assert!(added.text.starts_with("pool vm-1: member 2 is added\n"), "{}", added.text);
    let request = c.state.lock().unwrap().requests[0].clone();
    assert_eq!((request.member, request.view.number.0, request.view.epoch.0), (member(2), 0, 0));
    assert_eq!(request.view.state(member(2)), Some(MemberState::Out));
    assert_eq!(request.view.clean(), pool_status("vm-1", 2, 0).view.clean());
    assert_eq!(request.path.as_deref(), Some(std::path::Path::new("/dev/vdb")));
    assert_eq!(request.max_size_bytes, Some(512 << 20), "it can grow as far as the others");
    let spec = request.spec.member(member(2)).unwrap().clone();
    assert_eq!(spec.address.to_string(), "tcp://n2:7700");
    let add = Command::Add { store: spec.store, address: spec.address, member: Some(member(2)) };
    assert_eq!(commands(&a), [add]);
}

#[test]
fn a_store_that_was_made_and_did_not_join_is_used_when_the_command_is_run_again() {
    let (a, b) = in_use([refused(Refusal::Busy), done()]);
    let c = FakeNode::start("n2");
    let at = c.address();
    let args = ["pool", "add-member", "vm-1", "--member", &at];
    let error = run(&[&a, &b], &args).unwrap_err();
    assert!(error.contains("because of the moon") && error.contains("will be used"), "{error}");
    let status = run(&[&a, &b, &c], &["status"]).unwrap();
    assert!(status.text.contains("was made for member 2, which has not joined"), "{}", status.text);
    run(&[&a, &b], &args).unwrap();
    assert_eq!(c.state.lock().unwrap().requests.len(), 1);
    let given = commands(&a);
    assert_eq!(given[0], given[1]);
}

#[test]
fn a_refusal_for_good_leaves_no_store_behind() {
    let (a, b) = in_use([refused(Refusal::TooManyMembers)]);
    let c = FakeNode::start("n2");
    let error = run(&[&a, &b], &["pool", "add-member", "vm-1", "--member", &c.address()]).unwrap_err();
    assert!(error.contains("because of the moon") && error.contains("removed again: store"), "{error}");
    assert_eq!(c.store_count(), 0);
}

#[test]
fn a_member_that_is_there_already_is_not_added_again() {
    let (a, b) = in_use([]);
    let again = run(&[&a], &["pool", "add-member", "vm-1", "--member", &b.address()]).unwrap();
    assert!(again.text.contains("member 1 is on node") && again.text.contains("already"), "{}", again.text);
    assert_eq!(again.json["changed"], false);
    assert_eq!(commands(&a), []);
}

#[test]
fn a_store_of_an_earlier_time_is_refused_with_the_way_to_delete_it() {
    let (a, b) = in_use([]);
    let c = FakeNode::start("n2");
    let mut former = pool_status("vm-1", 2, 1);
    former.store = StoreId::from_bytes([9; 16]);
    c.hold(former);
    let error = run(&[&a, &b], &["pool", "add-member", "vm-1", "--member", &c.address()]).unwrap_err();
    assert!(error.contains("nothing was done"), "{error}");
    let way = error.lines().last().unwrap().trim().to_owned();
    assert!(way.ends_with("remove-member vm-1 1 --delete-store"), "{way}");
    assert!(way.contains(&format!("--node {} ", c.address())), "it is on a node that was not asked: {way}");
}

#[test]
fn a_replaced_member_keeps_its_number_and_gets_a_store_of_its_own() {
    let (a, b) = in_use([done()]);
    b.state.lock().unwrap().stores.clear();
    let replaced = run(&[&a], &["pool", "replace", "vm-1", "1", "--member", &b.address()]).unwrap();
    assert!(replaced.text.starts_with("pool vm-1: member 1 has a new store"), "{}", replaced.text);
    let request = b.state.lock().unwrap().requests[0].clone();
    let store = request.spec.member(member(1)).unwrap().store;
    assert_ne!(store, pool_status("vm-1", 2, 1).store);
    assert_eq!((request.spec.members.len(), request.view.state(member(1))), (2, Some(MemberState::Out)));
    assert!(matches!(&commands(&a)[..], [Command::Replace { store: given, .. }] if *given == store));

    let error = run(&[&a], &["pool", "replace", "vm-1", "5", "--member", &b.address()]).unwrap_err();
    assert!(error.contains("no member 5") && error.contains("add-member"), "{error}");
}

#[test]
fn a_member_is_removed_and_its_store_deleted_only_when_said() {
    for delete in [false, true] {
        let (a, b) = in_use([done()]);
        let store = pool_status("vm-1", 2, 1).store;
        let args = ["pool", "remove-member", "vm-1", "1", "--delete-store"];
        let removed = run(&[&a, &b], &args[..if delete { 5 } else { 4 }]).unwrap();
        assert!(removed.text.starts_with("pool vm-1: member 1 is removed"), "{}", removed.text);
        assert_eq!(commands(&a), [Command::Remove { member: member(1), store: Some(store) }]);
        assert_eq!(b.store_count(), usize::from(!delete));
        assert_eq!(removed.text.contains("remove-member vm-1 1 --delete-store"), !delete, "{}", removed.text);
    }
}

#[test]
fn a_store_that_cannot_be_deleted_since_nobody_has_it_is_said_before_anything_is_done() {
    let (a, b) = in_use([]);
    let c = FakeNode::start("n2");
    for command in [&["remove-member", "vm-1", "1"][..], &["move", "vm-1", "1", "--to", &c.address()]] {
        let error = run(&[&a], &[&["pool"], command, &["--delete-store"]].concat()).unwrap_err();
        assert!(error.contains("nothing was done") && error.contains("tcp://n1:7700"), "{error}");
        assert!(error.contains("--node"), "{error}");
    }
    assert_eq!((commands(&a), b.store_count(), c.store_count()), (vec![], 1, 0));
}

#[test]
fn a_removal_that_is_run_again_deletes_what_is_left() {
    let (a, b) = in_use([]);
    let mut alone = pool_status("vm-1", 1, 0);
    alone.view.number = alone.view.number.next();
    a.hold(alone);
    let args = ["pool", "remove-member", "vm-1", "1"];
    let again = run(&[&a, &b], &args).unwrap();
    assert!(again.text.contains("has no member 1") && again.text.contains("stays"), "{}", again.text);
    assert_eq!((commands(&a), b.store_count()), (vec![], 1));
    let deleted = run(&[&a, &b], &[&args[..], &["--delete-store"]].concat()).unwrap();
    assert!(deleted.text.contains("is deleted"), "{}", deleted.text);
    assert_eq!(b.store_count(), 0);
}

#[test]
fn commands_agree_on_a_member_that_is_not_there() {
    let (a, b) = in_use([]);
    let words = "pool vm-1 has no member 5, only 0, 1; nothing was to be done";
    for args in [
        &["remove-member", "vm-1", "5"][..],
        &["remove-member", "vm-1", "5", "--delete-store"],
        &["maintenance", "vm-1", "5", "on"],
        &["maintenance", "vm-1", "5", "off", "--wait"],
    ] {
        let outcome = run(&[&a, &b], &[&["pool"], args].concat()).unwrap();
        assert!(outcome.text.starts_with(words), "{args:?}: {}", outcome.text);
        assert_eq!((outcome.exit, &outcome.warnings[..]), (0, &[words.to_owned()][..]), "{args:?}");
        assert_eq!(outcome.json["changed"], false, "{args:?}");
    }
    // Nothing can be moved away from there, and no copy is added for it.
    let c = FakeNode::start("n2");
    let error = run(&[&a, &b], &["pool", "move", "vm-1", "5", "--to", &c.address()]).unwrap_err();
    assert_eq!(error, words);
    assert_eq!((commands(&a), c.store_count()), (vec![], 0));
}

#[test]
fn another_path_on_the_members_own_node_is_refused_with_the_way() {
    let (a, b) = in_use([]);
    let here = pool_status("vm-1", 2, 1).path.display().to_string();
    for (path, refused) in [("/dev/vdc", true), (here.as_str(), false)] {
        let at = format!("{}={path}", b.address());
        for args in [&["replace", "vm-1", "1", "--member", &at][..], &["add-member", "vm-1", "--member", &at]]
        {
            let result = run(&[&a], &[&["pool"], args].concat());
            match result {
                Err(error) if refused => {
                    assert!(error.contains("nothing was done") && error.contains(&here), "{error}");
                    let ways: Vec<_> = error.lines().skip(1).map(str::trim).collect();
                    let node = format!("rmrctl --node {}", b.address());
                    assert_eq!(ways[0], format!("{node} store close {here} --force"), "{error}");
                    assert!(ways[1].ends_with(&format!("pool replace vm-1 1 --member {at}")), "{error}");
                    assert_eq!(ways[2], format!("{node} store delete {here} --yes-destroy-all-data"));
                }
                Ok(outcome) if !refused => assert_eq!(outcome.json["changed"], false),
                other => panic!("{args:?}: {other:?}"),
            }
        }
    }
    assert_eq!((commands(&a), b.store_count()), (vec![], 1));
}

#[test]
fn a_prepared_store_at_another_path_is_not_used() {
    let (a, b) = in_use([refused(Refusal::Busy), done()]);
    let c = FakeNode::start("n2");
    for path in ["/dev/vdb", "/dev/vdc"] {
        let at = format!("{}={path}", c.address());
        let _ = run(&[&a, &b], &["pool", "add-member", "vm-1", "--member", &at]);
    }
    let state = c.state.lock().unwrap();
    let paths: Vec<_> = state.stores.values().map(|s| s.path.display().to_string()).collect();
    assert_eq!((state.requests.len(), paths), (2, vec!["/dev/vdc".to_owned()]));
}

#[test]
fn without_a_client_rmrctl_tries_to_be_the_coordinator_and_says_what_it_waits_for() {
    let (a, b) = in_use([]);
    let error = run(&[&a, &b], &["pool", "maintenance", "vm-1", "1", "on"]).unwrap_err();
    assert!(error.contains("rmrctl could not attach itself") && error.contains(":7700"), "{error}");
    assert_eq!(commands(&a).len() + commands(&b).len(), 2, "every node is asked for a client before");
}

#[test]
fn growing_says_both_sizes_and_repeating_it_that_it_is_so() {
    let mut larger = pool_status("vm-1", 2, 0);
    larger.spec.size = 128 << 20;
    let reply = CommandReply::Done { view: larger.view, spec: larger.spec };
    let (a, b) = in_use([reply, done()]);
    let grown = run(&[&a, &b], &["pool", "grow", "vm-1", "--size", "128M"]).unwrap();
    assert!(grown.text.starts_with("pool vm-1 has 128 MiB now, 64 MiB before."), "{}", grown.text);
    assert_eq!(commands(&a), [Command::Grow { size: 128 << 20 }]);
    let again = run(&[&a, &b], &["pool", "grow", "vm-1", "--size", "64M"]).unwrap();
    assert!(again.text.starts_with("pool vm-1 has 64 MiB already"), "{}", again.text);
    let error = run(&[&a, &b], &["pool", "grow", "vm-1", "--size", "12X"]).unwrap_err();
    assert!(error.contains("no size"), "{error}");
}

/// The pool with member 1 out by plan, as both members see it.
fn in_maintenance() -> [PoolStatus; 2] {
    [0, 1].map(|of| {
        let mut status = pool_status("vm-1", 2, of);
        set_state(&mut status, 1, MemberState::Out);
        status.spec.members[1].maintenance = true;
        status
    })
}

#[test]
fn maintenance_is_told_from_failure() {
    let (a, b) = two_nodes();
    let [on_a, on_b] = in_maintenance();
    a.hold(on_a.clone());
    b.hold(on_b);
    let status = run(&[&a, &b], &["status"]).unwrap();
    assert_eq!(status.exit, 3);
    assert!(status.text.contains("member 1 (n1) is in maintenance, by plan, missed 0 B"), "{}", status.text);
    assert!(status.text.contains("Out by plan"), "{}", status.text);
    let way = format!("rmrctl --node {} --node {} pool maintenance vm-1 1 off", a.address(), b.address());
    assert!(status.text.contains(&way), "{}", status.text);
    assert_eq!(status.json["pools"][0]["assessment"]["planned"], true);
    let mut failed = on_a;
    failed.spec.members[1] = MemberSpec { maintenance: false, ..failed.spec.members[1].clone() };
    failed.view.number = failed.view.number.next();
    a.hold(failed);
    let status = run(&[&a, &b], &["status"]).unwrap();
    assert_eq!(status.json["pools"][0]["assessment"]["planned"], false);
    assert!(status.text.contains(" pool resync vm-1"), "{}", status.text);
    let error = run(&[&a, &b], &["pool", "resync", "vm-1", "--wait-timeout", "0.1"]).unwrap_err();
    assert!(error.contains("not done within 100 ms: member 1 (n1) Out"), "{error}");
}

#[test]
fn waiting_ends_at_once_when_all_are_current() {
    let (a, b) = two_nodes();
    let synced = run(&[&a, &b], &["pool", "resync", "vm-1"]).unwrap();
    assert!(synced.text.contains("every copy that is to be current is"), "{}", synced.text);
    let [on_a, on_b] = in_maintenance();
    a.hold(on_a);
    b.hold(on_b);
    run(&[&a, &b], &["pool", "resync", "vm-1"]).unwrap();
}

#[test]
fn forcing_says_what_is_lost_and_never_displaces_a_client() {
    let (a, b) = two_nodes();
    let [mut on_a, on_b] = in_maintenance();
    on_a.peers[0].missed.blocks = Some(256);
    a.hold(on_a.clone());
    b.hold(on_b);
    let said = run(&[&a, &b], &["pool", "force-from", "vm-1", "1"]).unwrap_err();
    assert!(said.contains("nothing was done") && said.contains("1 MiB of it are known to be old"), "{said}");
    assert!(said.contains("member 0 (n0, Clean, seen) counts as wholly old"), "{said}");
    assert!(said.contains("--yes-lose-what-others-have"), "{said}");
    on_a.client = Some(client(5));
    a.hold(on_a);
    let args = ["pool", "force-from", "vm-1", "1", "--yes-lose-what-others-have"];
    let said = run(&[&a, &b], &args).unwrap_err();
    assert!(
        said.contains("nothing was done: vhost-brmr on hv-1") && said.contains("stop it first"),
        "{said}"
    );
}

#[test]
fn forcing_past_a_member_that_cannot_hear_of_it_takes_a_word_more() {
    let (a, b) = two_nodes();
    let [on_a, on_b] = in_maintenance();
    a.hold(on_a);
    b.hold(on_b);
    let mut args = vec!["pool", "force-from", "vm-1", "1", "--yes-lose-what-others-have"];
    let said = run(&[&b], &args).unwrap_err();
    assert!(said.contains("nothing was done. member 0 (") && said.contains("was not seen"), "{said}");
    assert!(said.contains("--unreachable-are-gone"), "{said}");
    args.push("--unreachable-are-gone");
    let said = run(&[&b], &args).unwrap_err();
    assert!(said.contains("not done: "), "it goes on, and finds no pool at the address: {said}");
}

#[test]
fn a_node_that_cannot_make_the_store_changes_nothing() {
    let (a, b) = in_use([]);
    let c = FakeNode::start("n2");
    let refusal = ControlError::new(ErrorCode::HoldsData, "/dev/vdb holds an ext4 file system");
    c.state.lock().unwrap().refuse_create = Some(refusal);
    let error = run(&[&a, &b], &["pool", "add-member", "vm-1", "--member", &c.address()]).unwrap_err();
    assert!(error.starts_with("nothing was changed: ") && error.contains("ext4"), "{error}");
    assert_eq!(commands(&a), []);
}

#[test]
fn a_client_that_left_without_a_goodbye_is_not_displaced_unless_it_is_said_to_be_gone() {
    let (a, b) = in_use([]);
    let mut lost = pool_status("vm-1", 2, 1);
    lost.client = Some(client(5));
    lost.client.as_mut().unwrap().state = ClientState::Crashed;
    b.hold(lost);
    let args = ["pool", "maintenance", "vm-1", "0", "on"];
    let error = run(&[&a, &b], &args).unwrap_err();
    assert!(error.contains("vhost-brmr on hv-1") && error.contains("--client-is-gone"), "{error}");
    let error = run(&[&a, &b], &[&args[..], &["--client-is-gone"]].concat()).unwrap_err();
    assert!(error.contains("did not become active"), "it goes on to attach: {error}");
}

#[test]
fn waiting_does_not_end_by_the_words_of_one_node_that_may_be_behind() {
    let (a, _b) = two_nodes();
    let error = run(&[&a], &["pool", "resync", "vm-1", "--wait-timeout", "0.1"]).unwrap_err();
    assert!(error.contains("not done within 100 ms"), "{error}");
}

#[test]
fn a_pool_is_told_where_its_nodes_are_now() {
    let (a, b) = in_use([done()]);
    let mut moved = pool_status("vm-1", 2, 1);
    moved.spec.members[1].address = Address::tcp("old", 7700);
    let mut other = pool_status("vm-1", 2, 0);
    other.spec.members[1].address = Address::tcp("old", 7700);
    a.hold(other);
    b.hold(moved.clone());
    let status = run(&[&a, &b], &["status"]).unwrap();
    let way = format!("rmrctl --node {} --node {} member address vm-1", a.address(), b.address());
    let words = format!("tcp://n1:7700, and the pool has tcp://old:7700: {way}");
    assert!(status.text.contains(&words), "{}", status.text);
    let told = run(&[&a, &b], &["member", "address", "vm-1"]).unwrap();
    assert!(told.text.contains("member 1: tcp://old:7700 is now tcp://n1:7700"), "{}", told.text);
    let address = Address::tcp("n1", 7700);
    let members = vec![MemberAddress { member: member(1), store: moved.store, address }];
    assert_eq!(commands(&a), [Command::Readdress { members: members.clone() }]);
    // So does the command that an operator may think of first.
    a.state.lock().unwrap().replies.push_back(done());
    let at = b.address();
    run(&[&a, &b], &["pool", "replace", "vm-1", "1", "--member", &at]).unwrap();
    assert_eq!(commands(&a)[1], Command::Readdress { members });
}
