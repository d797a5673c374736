//! Tests of what a member does for an operator who forces the pool into use.

use super::tests::Bench;
use super::*;
use crate::pool::{ClientId, ViewStep};
use crate::wire::{Attach, Kind, Role, SetView, Status};

fn force(bench: &mut Bench, number: u8, session: u64, epoch: u64) {
    let member = MemberId::new(number).unwrap();
    let view = bench.replica.view().step(ViewStep::Force(member), Epoch(epoch)).unwrap();
    let header = MessageHeader { view: view.number, ..bench.header(Kind::SetView, session) };
    let spec = bench.replica.spec().clone();
    bench.message(
        1,
        header,
        &SetView { view, spec, additions: Vec::new(), more: false, attested: Attested::default() }.encode(),
    );
}

#[test]
fn a_forced_view_and_its_epoch_are_durable_together() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    force(&mut bench, 0, 1, 1 << 40);
    let written = bench.take_tickets();
    let [(ticket, Metadata::State(state))] = &written[..] else { panic!("{written:?}") };
    assert_eq!((state.epoch, state.view.epoch), (Epoch(1 << 40), Epoch(1 << 40)));
    assert_eq!(bench.answer(Kind::SetViewReply), None);
    bench.apply(Event::Durable(*ticket, Ok(())));
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
}

#[test]
fn a_hello_shows_a_forced_view_and_its_epoch_only_when_they_are_durable() {
    let hello = Hello {
        versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
        capabilities: 0,
        role: Role::Client,
        client: ClientId::from_bytes([7; 16]),
        pool_name: String::new(),
        description: "a client".into(),
        nonce: None,
    };
    let shown = |bench: &Bench| {
        let reply = bench.replica.greet(&hello).unwrap();
        (reply.epoch, reply.view.epoch)
    };
    for result in [Ok(()), Err(())] {
        let mut bench = Bench::new(true);
        bench.attach(1, 1);
        bench.durable();
        force(&mut bench, 0, 1, 1 << 40);
        assert_eq!(bench.replica.view().epoch, Epoch(1 << 40), "it is adopted");
        let before = shown(&bench);
        assert!(
            before.0 < Epoch(1 << 40) && before.1 < Epoch(1 << 40),
            "{before:?}: it is on its way to disk"
        );
        let (ticket, _) = bench.take_tickets().remove(0);
        bench.apply(Event::Durable(ticket, result));
        let after = if result.is_ok() { (Epoch(1 << 40), Epoch(1 << 40)) } else { before };
        assert_eq!(shown(&bench), after);
    }
}

#[test]
fn only_a_view_of_this_member_alone_brings_an_epoch_with_it() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    force(&mut bench, 1, 1, 1 << 40);
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::IllegalView));
    let view = View { epoch: Epoch(2), ..bench.replica.view().step(ViewStep::Amend, Epoch(1)).unwrap() };
    let header = MessageHeader { view: view.number, ..bench.header(Kind::SetView, 1) };
    let spec = bench.replica.spec().clone();
    bench.message(
        1,
        header,
        &SetView { view, spec, additions: Vec::new(), more: false, attested: Attested::default() }.encode(),
    );
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::IllegalView));
}

#[test]
fn a_client_of_a_later_branch_gets_a_member_that_a_client_of_an_older_one_holds() {
    let attach = |bench: &mut Bench, connection, epoch| {
        let client = ClientId::from_bytes([7; 16]);
        let attach = Attach {
            client,
            takeover: false,
            rejoin: true,
            yields: false,
            description: "another".into(),
            held_ms: 0,
        };
        bench.message(connection, bench.header(Kind::Attach, epoch), &attach.encode());
        bench.durable();
        bench.answer(Kind::AttachReply)
    };
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    assert_eq!(attach(&mut bench, 2, 1000), Some(Status::Held));
    assert_eq!(attach(&mut bench, 2, 1 << 40), Some(Status::Ok));
    let closes = |o: &Output| matches!(o, Output::Close(ConnectionId(1), _));
    assert!(bench.outputs.iter().any(closes), "the older one is fenced");
}

#[test]
fn a_client_that_is_refused_for_another_is_shown_a_forced_epoch_only_when_it_is_durable() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    force(&mut bench, 0, 1, 1 << 40);
    let client = ClientId::from_bytes([7; 16]);
    let description = "another client".into();
    let attach =
        Attach { client, takeover: false, rejoin: true, yields: false, description, held_ms: 0 }.encode();
    let refused = |bench: &mut Bench| {
        bench.message(2, bench.header(Kind::Attach, 1), &attach);
        let held = bench.outputs.iter().rev().find_map(|o| match o {
            Output::Send(_, header, _) if header.status == Status::Held => Some(header.epoch),
            _ => None,
        });
        held.unwrap()
    };
    assert_eq!(refused(&mut bench), Epoch(1));
    bench.durable();
    assert_eq!(refused(&mut bench), Epoch(1 << 40));
}
