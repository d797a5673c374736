//! Members at one binding, nodes that are asked over another: data goes the way that a member's address says, and no other.

use std::time::SystemTime;

use super::*;
use crate::pool::Command;

fn rdma(node: u16) -> Address {
    Address::new(TransportKind::Rdma, "node", 1 + node)
}

/// A pool whose members are at RDMA addresses, and a client that was told those on TCP. Nothing is connected over RDMA yet.
fn asked_over_tcp(configure: impl FnOnce(&mut Config)) -> Bench {
    let mut bench = Bench::new(2, |_| {});
    let seeds: Vec<_> = bench.spec.members.iter().map(|m| m.address.clone()).collect();
    for spec in bench.specs.iter_mut().chain([&mut bench.spec]) {
        for (line, node) in spec.members.iter_mut().zip(0..) {
            line.address = rdma(node);
        }
    }
    bench.slow_binding = Some(TransportKind::Rdma);
    bench.kinds.clear();
    bench.start_client_at(&seeds, |config| {
        config.takeover = true;
        configure(config);
    });
    bench
}

fn sent_over(bench: &Bench, binding: TransportKind) -> Vec<Kind> {
    let all = bench.kinds.iter().filter(|(b, kind)| *b == binding && *kind != Kind::Ping);
    all.map(|(_, kind)| *kind).collect()
}

/// The bindings of the connections that there are.
fn connected(bench: &Bench) -> Vec<TransportKind> {
    let is_up = |l: &&Link| matches!(l.state, LinkState::Ready(_));
    bench.client.links.iter().filter(is_up).map(|l| l.address.transport()).collect()
}

#[test]
fn a_member_is_used_as_its_address_says_however_its_node_was_found() {
    let mut bench = asked_over_tcp(|_| {});
    bench.pass(Duration::from_secs(2));
    assert!(!bench.client.is_active(), "what can be reached is not where the members are");
    bench.connect();
    bench.pass(Duration::from_secs(1));
    assert!(bench.client.is_active());
    bench.submit(1, Operation::Write, 0, 4096);
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert!(sent_over(&bench, TransportKind::Tcp).iter().all(|kind| *kind == Kind::Hello));
    assert!(sent_over(&bench, TransportKind::Rdma).contains(&Kind::Write));
    assert_eq!(connected(&bench), [TransportKind::Rdma; 2], "the others were let go of");
}

#[test]
fn a_leg_that_is_lost_is_not_made_over_another_binding() {
    let mut bench = asked_over_tcp(|_| {});
    bench.connect();
    bench.pass(Duration::from_secs(1));
    assert!(bench.client.is_active());
    let leg = bench.client.legs[1].unwrap();
    bench.client.apply(Event::LinkDown(leg, "gone"), bench.now);
    bench.pass(Duration::from_secs(20));
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
    assert!(sent_over(&bench, TransportKind::Tcp).iter().all(|kind| *kind == Kind::Hello));
    assert_eq!(connected(&bench), [TransportKind::Rdma]);
    bench.connect();
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
}

#[test]
fn an_address_that_is_changed_while_its_member_is_in_use_counts_from_the_next_connection_on() {
    let mut bench = Bench::new(2, |_| {});
    let store = bench.spec.members[1].store;
    bench.command(Command::Replace { member: member(1), store, address: rdma(1) });
    assert!(matches!(bench.replies[..], [CommandReply::Done { .. }]), "{:?}", bench.replies);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
    bench.submit(1, Operation::Write, 0, 4096);
    assert_eq!(bench.sent.len(), 2, "both members are written to");
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert!(sent_over(&bench, TransportKind::Rdma).is_empty());
    let leg = bench.client.legs[1].unwrap();
    bench.client.apply(Event::LinkDown(leg, "gone"), bench.now);
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    let mut bindings = connected(&bench);
    bindings.sort_unstable_by_key(ToString::to_string);
    assert_eq!(bindings, [TransportKind::Rdma, TransportKind::Tcp]);
}

#[test]
fn a_member_that_is_forced_into_use_is_taken_as_it_can_be_reached() {
    let force = crate::client::Force { member: member(0), decided: SystemTime::now() };
    let mut bench = asked_over_tcp(|config| config.force_from = Some(force));
    bench.pass(Duration::from_secs(10));
    assert!(bench.client.is_active());
    bench.submit(1, Operation::Write, 0, 4096);
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
}

#[test]
fn a_later_branch_is_heard_of_over_any_binding() {
    let mut bench = asked_over_tcp(|_| {});
    bench.connect();
    bench.pass(Duration::from_secs(1));
    assert!(bench.client.is_active());
    // The node comes back with a branch that was forced meanwhile, and the cable of its other card is out.
    bench.epochs[1] = Epoch(crate::pool::FORCED_JUMP + 5);
    let leg = bench.client.legs[1].unwrap();
    bench.client.apply(Event::LinkDown(leg, "gone"), bench.now);
    bench.pass(Duration::from_secs(5));
    assert!(matches!(bench.client.state, State::Over(OverReason::Fenced(_))));
}

#[test]
fn what_was_made_for_one_binding_can_go_over_every_other() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Write, 0, 1 << 20);
    let lengths: Vec<_> = bench.sent.iter().map(|(_, header)| header.payload).collect();
    assert_eq!(
        lengths,
        [512 << 10; 4],
        "nodes would take 1 MiB at once, but no window holds that and a header"
    );
}
