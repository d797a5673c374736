//! Unit tests of views that change the pool: room comes first, and view and specification are durable together.

use super::tests::Bench;
use super::*;
use crate::map::{MapId, MapPage};
use crate::pool::{Address, MemberSet, MemberSpec, StoreId, ViewStep};
use crate::wire::{DirtyAddition, Kind, SetView, Status};

fn id(index: u8) -> MemberId {
    MemberId::new(index).expect("below 8")
}

fn attached() -> Bench {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    bench
}

/// The next view after a step, with the pool as it is to be in it.
fn set(bench: &mut Bench, step: ViewStep, change: impl FnOnce(&mut PoolSpec), missed: Option<MemberId>) {
    let view = bench.replica.view().step(step, Epoch(1)).expect("a legal step");
    let mut spec = bench.replica.spec().clone();
    change(&mut spec);
    let addition = |m| DirtyAddition { members: MemberSet::only(m), offset: 0, length: spec.size };
    let additions = missed.map(addition).into_iter().collect();
    let number = view.number;
    let body = SetView { view, spec, additions, more: false, attested: Attested::default() }.encode();
    let header = MessageHeader { view: number, ..bench.header(Kind::SetView, 1) };
    bench.message(1, header, &body);
}

fn asked(bench: &mut Bench) -> Option<(u64, u64)> {
    let at = bench.outputs.iter().position(|o| matches!(o, Output::Grow { .. }))?;
    if let Output::Grow { from, to } = bench.outputs.remove(at) { Some((from, to)) } else { None }
}

fn grow(bench: &mut Bench, size: u64) {
    let header = MessageHeader { offset: size, ..bench.header(Kind::Grow, 1) };
    bench.message(1, header, &[]);
}

/// The superblocks that are asked for.
fn states(bench: &mut Bench) -> Vec<DurableState> {
    let tickets = bench.take_tickets();
    let mut states = Vec::new();
    for (ticket, metadata) in tickets {
        if let Metadata::State(state) = metadata {
            states.push(*state);
        }
        bench.apply(Event::Durable(ticket, Ok(())));
    }
    states
}

#[test]
fn a_view_with_a_larger_pool_waits_for_room_and_its_maps_cover_it() {
    let mut bench = attached();
    let size = bench.replica.spec().size;
    set(&mut bench, ViewStep::Amend, |s| s.size = size * 64, None);
    assert_eq!(asked(&mut bench), Some((size, size * 64)));
    assert_eq!((bench.take_tickets(), bench.replica.spec().size), (vec![], size), "nothing before that");
    bench.apply(Event::Grown(Ok(())));
    let states = states(&mut bench);
    assert_eq!(states.len(), 1, "one write");
    assert_eq!((states[0].spec.size, states[0].view.number), (size * 64, ViewNumber(2)));
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
    let last = (size * 64) / (64 << 10) - 1;
    let page = crate::map::ChunkMap::page_of(Chunk(last));
    assert!(bench.replica.page(MapPage { map: MapId::Intent, page }).is_some());
}

#[test]
fn room_that_was_made_ahead_is_not_made_again_and_a_new_process_makes_it_anew() {
    let mut bench = attached();
    let size = bench.replica.spec().size;
    grow(&mut bench, size * 2);
    grow(&mut bench, size * 2);
    assert_eq!((asked(&mut bench), asked(&mut bench)), (Some((size, size * 2)), None), "once");
    bench.apply(Event::Grown(Ok(())));
    assert_eq!(bench.answer(Kind::GrowReply), Some(Status::Ok));
    assert_eq!(bench.replica.spec().size, size, "the pool is as it was");
    set(&mut bench, ViewStep::Amend, |s| s.size = size * 2, None);
    assert_eq!(asked(&mut bench), None);
    let mut again = attached();
    set(&mut again, ViewStep::Amend, |s| s.size = size * 2, None);
    assert_eq!(asked(&mut again), Some((size, size * 2)), "it does not know of it");
}

#[test]
fn without_room_a_view_is_refused_and_nothing_has_changed() {
    let mut bench = attached();
    let size = bench.replica.spec().size;
    set(&mut bench, ViewStep::Amend, |s| s.size = size * 2, Some(id(2)));
    asked(&mut bench);
    bench.apply(Event::Grown(Err("the disk is small")));
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::NoSpace));
    assert_eq!((bench.take_tickets(), bench.replica.maps().missed(id(2))), (vec![], (0, 0)));
    assert_eq!(bench.replica.view().number, ViewNumber(1));
    grow(&mut bench, size * 2);
    assert!(asked(&mut bench).is_some(), "it is tried again when it is asked for again");
}

#[test]
fn a_client_that_goes_while_room_is_made_leaves_the_room_and_no_view() {
    let mut bench = attached();
    let size = bench.replica.spec().size;
    set(&mut bench, ViewStep::Amend, |s| s.size = size * 2, None);
    asked(&mut bench);
    bench.apply(Event::Closed(ConnectionId(1)));
    bench.apply(Event::Grown(Ok(())));
    assert_eq!((bench.take_tickets(), bench.replica.spec().size), (vec![], size));
    bench.attach(2, 2);
    bench.durable();
    let header = MessageHeader { offset: size * 2, ..bench.header(Kind::Grow, 2) };
    bench.message(2, header, &[]);
    assert_eq!((asked(&mut bench), bench.answer(Kind::GrowReply)), (None, Some(Status::Ok)));
}

#[test]
fn a_pool_becomes_smaller_only_with_a_later_attachment_that_does_not_know_of_its_size() {
    let mut bench = attached();
    let size = bench.replica.spec().size;
    set(&mut bench, ViewStep::Amend, |_| {}, None);
    bench.durable();
    set(&mut bench, ViewStep::Amend, |s| s.size = size / 2, None);
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::IllegalView));
    bench.attach(1, 2);
    bench.durable();
    let view = bench.replica.view().step(ViewStep::Attach(MemberSet::EMPTY), Epoch(2)).expect("a legal step");
    let mut spec = bench.replica.spec().clone();
    spec.size = size / 2;
    let body =
        SetView { view, spec, additions: Vec::new(), more: false, attested: Attested::default() }.encode();
    bench.message(1, bench.header(Kind::SetView, 2), &body);
    bench.durable();
    assert_eq!((bench.answer(Kind::SetViewReply), bench.replica.spec().size), (Some(Status::Ok), size / 2));
    let header = MessageHeader { offset: size, ..bench.header(Kind::Grow, 2) };
    bench.message(1, header, &[]);
    assert_eq!(asked(&mut bench), Some((size / 2, size)), "what was there is nobody's, and becomes zeroes");
}

#[test]
fn room_that_was_made_while_the_pool_became_smaller_is_made_again() {
    let mut bench = attached();
    let size = bench.replica.spec().size;
    grow(&mut bench, size * 4);
    assert_eq!(asked(&mut bench), Some((size, size * 4)));
    // A client of a branch in which the pool is smaller brings its view.
    bench.attach(2, 2);
    bench.durable();
    let view = bench.replica.view().step(ViewStep::Attach(MemberSet::EMPTY), Epoch(2)).expect("a legal step");
    let mut spec = bench.replica.spec().clone();
    spec.size = size / 2;
    let body =
        SetView { view, spec, additions: Vec::new(), more: false, attested: Attested::default() }.encode();
    bench.message(2, bench.header(Kind::SetView, 2), &body);
    bench.durable();
    assert_eq!((bench.answer(Kind::SetViewReply), bench.replica.spec().size), (Some(Status::Ok), size / 2));
    bench.outputs.clear();
    // The old request asked for more than there is room for: it is made once more, from the new end on.
    bench.apply(Event::Grown(Ok(())));
    assert_eq!(asked(&mut bench), Some((size / 2, size * 4)), "the part in between was not zeroed");
    assert_eq!(bench.answer(Kind::GrowReply), None);
    bench.apply(Event::Grown(Ok(())));
    assert_eq!((asked(&mut bench), bench.answer(Kind::GrowReply)), (None, Some(Status::Ok)));
}

#[test]
fn a_view_that_waits_for_room_which_does_not_count_is_not_refused() {
    let mut bench = attached();
    let size = bench.replica.spec().size;
    grow(&mut bench, size * 4);
    asked(&mut bench);
    let next = |bench: &mut Bench, epoch: u64, size: u64| {
        let connection = u32::try_from(epoch).expect("small");
        bench.attach(connection, epoch);
        bench.durable();
        let step = ViewStep::Attach(MemberSet::EMPTY);
        let view = bench.replica.view().step(step, Epoch(epoch)).expect("a legal step");
        let mut spec = bench.replica.spec().clone();
        spec.size = size;
        let body = SetView { view, spec, additions: Vec::new(), more: false, attested: Attested::default() }
            .encode();
        bench.message(connection, bench.header(Kind::SetView, epoch), &body);
        bench.durable();
    };
    next(&mut bench, 2, size / 2);
    next(&mut bench, 3, size * 2);
    bench.outputs.clear();
    bench.apply(Event::Grown(Ok(())));
    assert_eq!(bench.answer(Kind::SetViewReply), None);
    assert!(asked(&mut bench).is_some_and(|(from, to)| from == size / 2 && to >= size * 2));
    bench.apply(Event::Grown(Ok(())));
    bench.durable();
    assert_eq!((bench.answer(Kind::SetViewReply), bench.replica.spec().size), (Some(Status::Ok), size * 2));
}

#[test]
fn a_new_store_is_on_record_as_missing_everything_before_the_view_is_durable() {
    let mut bench = attached();
    let store = StoreId::random();
    let line = MemberSpec::new(id(3), store, Address::tcp("node", 4));
    set(&mut bench, ViewStep::Add(id(3), store), |s| s.members.push(line), Some(id(3)));
    let pages = bench.take_tickets();
    assert!(!pages.is_empty() && pages.iter().all(|(_, m)| matches!(m, Metadata::Page(_))), "{pages:?}");
    for (ticket, _) in pages {
        bench.apply(Event::Durable(ticket, Ok(())));
    }
    let states = states(&mut bench);
    assert_eq!(states[0].spec.members.len(), 4);
    let blocks = bench.replica.spec().block_count();
    assert_eq!(bench.replica.maps().missed(id(3)).0, blocks);
}

#[test]
fn what_a_removed_member_missed_is_forgotten_once_the_view_is_durable_and_not_before() {
    let mut bench = attached();
    set(&mut bench, ViewStep::Lose(MemberSet::only(id(2))), |_| {}, Some(id(2)));
    bench.durable();
    bench.durable();
    let missed = bench.replica.maps().missed(id(2));
    assert!(missed.0 > 0);
    set(&mut bench, ViewStep::Remove(id(2)), |s| s.members.retain(|m| m.id != id(2)), None);
    assert_eq!(bench.replica.maps().missed(id(2)), missed, "the view may not become durable");
    bench.durable();
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
    assert_eq!(bench.replica.maps().missed(id(2)), (0, 0));
}

#[test]
fn a_view_in_which_the_store_is_another_one_is_refused() {
    let mut bench = attached();
    let (view, mut spec) = (bench.replica.view().clone(), bench.replica.spec().clone());
    let mut next = view.step(ViewStep::Amend, Epoch(1)).expect("a legal step");
    let store = StoreId::random();
    (next.members[0].store, spec.members[0].store) = (store, store);
    let body =
        SetView { view: next, spec, additions: Vec::new(), more: false, attested: Attested::default() }
            .encode();
    bench.message(1, bench.header(Kind::SetView, 1), &body);
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::IllegalView));
}
