//! Unit tests of operators' commands, event by event.

use std::time::Duration;

use super::super::{Event, IoError, LinkId, Operation, Output, Token};
use super::{Bench, member};
use crate::pool::{
    Address, Command, CommandReply, MemberAddress, MemberSet, MemberState, Refusal, StoreId, TransportKind,
};
use crate::wire::{DirtyAddition, Kind, Status};

const SIZE: u64 = 16 << 20;

/// The answer to the last command.
fn reason(bench: &Bench) -> Option<Refusal> {
    match bench.replies.last().expect("an answer") {
        CommandReply::Done { .. } | CommandReply::Verify { .. } => None,
        CommandReply::Refused { reason, .. } => Some(*reason),
    }
}

fn refused(bench: &mut Bench, command: Command) -> Option<Refusal> {
    let before = bench.views.clone();
    bench.command(command);
    let reason = reason(bench);
    assert_eq!(bench.views, before, "a refusal changes nothing");
    reason
}

fn maintenance(index: u8, on: bool) -> Command {
    Command::Maintenance { member: member(index), on }
}

fn remove(index: u8) -> Command {
    Command::Remove { member: member(index), store: None }
}

#[test]
fn each_refusal_says_what_is_wrong_and_changes_nothing() {
    let mut bench = Bench::new(2, |_| {});
    let (store, address) = (StoreId::random(), Address::tcp("elsewhere", 9));
    let known = bench.spec.members[1].clone();
    let add = |store, address: &Address, member| Command::Add { store, address: address.clone(), member };
    let replace = |store, address: &Address, index| Command::Replace {
        member: member(index),
        store,
        address: address.clone(),
    };
    for (command, expected) in [
        (remove(5), Refusal::UnknownMember),
        (maintenance(5, true), Refusal::UnknownMember),
        (replace(store, &address, 5), Refusal::UnknownMember),
        (add(known.store, &address, None), Refusal::StoreInUse),
        (add(store, &known.address, None), Refusal::AddressInUse),
        (add(store, &address, Some(member(1))), Refusal::MemberIdTaken),
        (replace(known.store, &address, 0), Refusal::StoreInUse),
        (replace(store, &known.address, 0), Refusal::AddressInUse),
        (Command::Grow { size: SIZE - 4096 }, Refusal::BadSize),
        (Command::Grow { size: SIZE + 512 }, Refusal::BadSize),
        (Command::Grow { size: 1 << 60 }, Refusal::BadSize),
    ] {
        assert_eq!(refused(&mut bench, command.clone()), Some(expected), "{command}");
    }
}

#[test]
fn the_last_clean_member_is_never_taken_away() {
    let mut bench = Bench::new(1, |_| {});
    let (store, address) = (StoreId::random(), Address::tcp("elsewhere", 9));
    for command in [remove(0), maintenance(0, true), Command::Replace { member: member(0), store, address }] {
        assert_eq!(refused(&mut bench, command), Some(Refusal::LastClean));
    }
}

#[test]
fn a_ninth_member_is_refused() {
    let mut bench = Bench::new(8, |_| {});
    let command =
        Command::Add { store: StoreId::random(), address: Address::tcp("elsewhere", 9), member: None };
    assert_eq!(refused(&mut bench, command), Some(Refusal::TooManyMembers));
}

#[test]
fn a_suspended_pool_takes_no_command_and_one_under_way_is_answered() {
    let mut bench = Bench::new(2, |_| {});
    bench.command(maintenance(1, true));
    assert_eq!(bench.replies, [], "it waits for a flush");
    bench.client.apply(Event::Cancel, bench.now);
    while let Some(output) = bench.client.take_output() {
        if let Output::CommandDone(_, reply) = output {
            bench.replies.push(reply);
        }
    }
    assert_eq!(reason(&bench), Some(Refusal::Suspended));
    bench.command(Command::Grow { size: SIZE * 2 });
    assert_eq!(bench.replies.len(), 2);
    assert_eq!(reason(&bench), Some(Refusal::Suspended));
}

#[test]
fn commands_that_wait_are_bounded() {
    let mut bench = Bench::new(2, |_| {});
    bench.command(maintenance(1, true));
    for _ in 0..17 {
        bench.command(maintenance(1, true));
    }
    assert_eq!((bench.replies.len(), reason(&bench)), (1, Some(Refusal::Busy)));
}

#[test]
fn a_member_goes_into_maintenance_with_nothing_missed_and_comes_back_when_it_ends() {
    let mut bench = Bench::new(2, |_| {});
    bench.write_through = false;
    bench.submit(1, Operation::Write, 0, 4096);
    bench.answer_all();
    bench.command(maintenance(1, true));
    // Requests go on during the first flush.
    bench.submit(2, Operation::Write, 8192, 4096);
    let is_write = |bench: &Bench| bench.sent.iter().any(|(_, h)| h.kind == Kind::Write);
    assert!(is_write(&bench));
    bench.sent.sort_by_key(|(_, h)| h.kind == Kind::Write);
    while bench.sent[0].1.kind == Kind::Flush {
        let who = bench.sent[0].0;
        bench.answer(Some(who), Status::Ok);
    }
    // The barrier: the write has to end, no other one begins, and what was written is flushed.
    bench.submit(3, Operation::Write, 16384, 4096);
    assert_eq!(bench.sent.iter().filter(|(_, h)| h.kind == Kind::Write).count(), 2, "those of before");
    assert_eq!(bench.replies, []);
    bench.answer(None, Status::Ok);
    bench.answer(None, Status::Ok);
    assert!(bench.sent.iter().all(|(_, h)| h.kind == Kind::Flush), "{:?}", bench.sent);
    bench.answer(None, Status::Ok);
    bench.answer(None, Status::Ok);
    assert_eq!((reason(&bench), bench.state(member(1))), (None, Some(MemberState::Out)));
    assert_eq!(bench.additions, [], "nothing is missed");
    assert_eq!(bench.sent.len(), 1, "the write that was held goes to the other member");
    bench.answer_all();
    assert_eq!(bench.done.len(), 3);
    bench.command(maintenance(1, true));
    assert_eq!(reason(&bench), None, "done is done");
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.state(member(1)), Some(MemberState::Out), "nobody brings it back in");
    bench.command(maintenance(1, false));
    bench.pass(Duration::from_secs(2));
    assert_eq!((reason(&bench), bench.state(member(1))), (None, Some(MemberState::Syncing)));
}

#[test]
fn the_flag_of_maintenance_binds_the_next_client_too() {
    let mut bench = Bench::new(2, |_| {});
    bench.command(maintenance(1, true));
    bench.answer_all();
    assert_eq!(reason(&bench), None);
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(10));
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
}

#[test]
fn a_pool_that_is_too_busy_for_a_member_to_leave_goes_on_as_before() {
    let mut bench = Bench::new(2, |c| c.leg_timeout = Duration::from_secs(3600));
    bench.client.config.leg_timeout = Duration::from_secs(5);
    bench.command(maintenance(1, true));
    bench.pass(Duration::from_secs(4));
    bench.answer_all();
    assert_eq!(reason(&bench), None);
}

#[test]
fn a_removal_takes_two_views_and_the_node_is_let_go() {
    let mut bench = Bench::new(2, |_| {});
    let number = bench.client.view.as_ref().unwrap().number.0;
    bench.command(remove(1));
    bench.answer_all();
    assert_eq!((reason(&bench), bench.state(member(1))), (None, None));
    assert_eq!(bench.client.view.as_ref().unwrap().number.0, number + 2);
    assert_eq!(bench.specs[0].members.len(), 1);
    assert_eq!(bench.specs[1].members.len(), 2, "the removed store knows nothing of it");
    bench.pass(Duration::from_secs(5));
    assert!(bench.client.links.iter().any(|l| l.retired), "and is not called again");
    let store = Some(bench.spec.members[1].store);
    bench.command(Command::Remove { member: member(1), store });
    assert_eq!(reason(&bench), None, "done is done");
}

#[test]
fn a_repeated_removal_never_hits_another_store_that_has_the_id_by_then() {
    let mut bench = Bench::new(2, |_| {});
    bench.command(Command::Remove { member: member(1), store: Some(StoreId::random()) });
    assert_eq!((reason(&bench), bench.state(member(1))), (None, Some(MemberState::Clean)));
}

#[test]
fn a_new_member_starts_out_with_everything_missed_and_is_brought_in() {
    let mut bench = Bench::new(2, |_| {});
    let (store, address) = bench.add_node(2);
    let command = Command::Add { store, address, member: Some(member(2)) };
    bench.command(command.clone());
    assert_eq!((reason(&bench), bench.state(member(2))), (None, Some(MemberState::Out)));
    let missed = DirtyAddition { members: MemberSet::only(member(2)), offset: 0, length: SIZE };
    assert_eq!(bench.additions, [missed]);
    assert_eq!(bench.specs[0], bench.specs[1]);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.state(member(2)), Some(MemberState::Syncing));
    bench.command(command);
    assert_eq!(reason(&bench), None, "done is done");
}

#[test]
fn a_store_that_is_not_there_or_is_another_one_is_not_added() {
    let mut bench = Bench::new(2, |_| {});
    let before = bench.views.clone();
    let (store, address) = bench.add_node(2);
    bench.up[2] = false;
    bench.command(Command::Add { store, address: address.clone(), member: Some(member(2)) });
    bench.pass(Duration::from_secs(15));
    assert_eq!(reason(&bench), Some(Refusal::Unreachable));
    bench.up[2] = true;
    bench.command(Command::Add { store, address: address.clone(), member: Some(member(3)) });
    bench.pass(Duration::from_secs(15));
    assert_eq!(reason(&bench), Some(Refusal::StoreNotFound));
    // Of another history of the pool, later than this one.
    bench.views[2] = bench.views[0].clone();
    bench.views[2].number.0 += 1 << 32;
    bench.views[2].epoch.0 += 1 << 32;
    bench.specs[2] = bench.specs[0].clone();
    bench.views[2].members[1].store = store;
    bench.specs[2].members[1].store = store;
    bench.specs[2].members[1].address = address.clone();
    bench.command(Command::Replace { member: member(1), store, address });
    assert_eq!(reason(&bench), Some(Refusal::StoreInUse));
    assert_eq!(bench.views[..2], before[..]);
}

#[test]
fn a_replaced_store_is_another_one_and_the_old_one_gets_nothing() {
    let mut bench = Bench::new(2, |_| {});
    let (store, address) = bench.add_node(1);
    bench.command(Command::Replace { member: member(1), store, address });
    bench.answer_all();
    assert_eq!(reason(&bench), None);
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 0, length: SIZE };
    assert_eq!(bench.additions, [missed]);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    assert_eq!(bench.views[2], bench.views[0]);
    assert!(!bench.views[1].has_store(member(1), store), "the old one knows nothing of it");
}

#[test]
fn a_store_that_moved_to_another_address_has_missed_nothing() {
    let mut bench = Bench::new(2, |_| {});
    let (store, address) = (bench.spec.members[1].store, Address::tcp("elsewhere", 9));
    bench.command(Command::Replace { member: member(1), store, address: address.clone() });
    assert_eq!((reason(&bench), bench.state(member(1))), (None, Some(MemberState::Clean)));
    assert_eq!((bench.additions.len(), &bench.specs[0].members[1].address), (0, &address));
}

#[test]
fn two_nodes_that_have_each_others_address_are_told_to_the_pool_in_one_view() {
    let mut bench = Bench::new(2, |_| {});
    let line = |bench: &Bench, of: usize, at: usize| MemberAddress {
        member: bench.spec.members[of].id,
        store: bench.spec.members[of].store,
        address: bench.spec.members[at].address.clone(),
    };
    let swapped = vec![line(&bench, 0, 1), line(&bench, 1, 0)];
    let addresses =
        |bench: &Bench| -> Vec<_> { bench.specs[0].members.iter().map(|m| m.address.clone()).collect() };
    let before = addresses(&bench);
    // One alone would have the address of the other.
    bench.command(Command::Readdress { members: swapped[..1].to_vec() });
    assert_eq!((reason(&bench), addresses(&bench)), (Some(Refusal::AddressInUse), before.clone()));
    // A member that was replaced meanwhile is another one.
    let mut other = swapped.clone();
    other[0].store = StoreId::random();
    bench.command(Command::Readdress { members: other });
    assert_eq!((reason(&bench), addresses(&bench)), (Some(Refusal::StoreNotFound), before.clone()));
    // An address of another transport would take the member out of TLS, or off RDMA.
    let mut weaker = swapped.clone();
    weaker[0].address = Address::new(TransportKind::Tls, "node-0", 99);
    bench.command(Command::Readdress { members: weaker });
    assert_eq!((reason(&bench), addresses(&bench)), (Some(Refusal::BadCommand), before.clone()));
    bench.command(Command::Readdress { members: swapped });
    let after: Vec<_> = before.iter().rev().cloned().collect();
    assert_eq!((reason(&bench), addresses(&bench)), (None, after));
    assert_eq!(bench.state(member(1)), Some(MemberState::Clean), "nothing was missed");
}

#[test]
fn a_pool_grows_only_when_every_active_member_has_room() {
    let mut bench = Bench::new(2, |_| {});
    let command = Command::Grow { size: SIZE * 2 };
    bench.room[1] = Some(Status::NoSpace);
    assert_eq!(refused(&mut bench, command.clone()), Some(Refusal::NoRoom));
    bench.room[1] = None;
    bench.command(command.clone());
    bench.submit(1, Operation::Write, SIZE, 4096);
    assert_eq!(bench.done, [(Token(1), Err(IoError::BadRange))], "not yet");
    // It is lost before it has answered: it makes room when it comes back.
    bench.up[1] = false;
    let link = u8::try_from(bench.nodes.iter().position(|n| *n == 1).unwrap()).unwrap();
    bench.client.apply(Event::LinkDown(LinkId(link), "gone"), bench.now);
    bench.run();
    bench.pass(Duration::from_secs(1));
    assert_eq!(reason(&bench), None);
    assert_eq!((bench.specs[0].size, bench.specs[1].size), (SIZE * 2, SIZE));
    bench.submit(2, Operation::Write, SIZE, 4096);
    bench.answer_all();
    assert_eq!(bench.done[1], (Token(2), Ok(())));
    bench.up[1] = true;
    bench.room[1] = Some(Status::NoSpace);
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.state(member(1)), Some(MemberState::Out), "it has no room");
    bench.room[1] = Some(Status::Ok);
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    bench.command(command);
    assert_eq!(reason(&bench), None, "done is done");
}

#[test]
fn a_client_takes_over_an_addition_that_only_some_members_heard_of() {
    let mut bench = Bench::new(2, |_| {});
    let (store, address) = bench.add_node(2);
    let older = (bench.views[1].clone(), bench.specs[1].clone());
    bench.command(Command::Add { store, address, member: Some(member(2)) });
    // As if member 1 had not heard of it, and the client had died.
    (bench.views[1], bench.specs[1]) = older;
    bench.never_had_more(1);
    bench.up[2] = false;
    bench.additions.clear();
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.state(member(2)), Some(MemberState::Out));
    let missed = DirtyAddition { members: MemberSet::only(member(2)), offset: 0, length: SIZE };
    assert!(bench.additions.contains(&missed), "{:?}", bench.additions);
    assert_eq!(bench.specs[1].members.len(), 3);
}
