//! A client that means harm: what it may not change, and what its messages may cost.

use proptest::prelude::*;

use super::tests::{Bench, member};
use super::*;
use crate::map::MAP_PAGE_BYTES;
use crate::pool::{Address, MAX_NUMBER, MemberSet, PoolId, Slot, ViewStep};
use crate::wire::{Attach, ChunkList, Compare, DirtyAddition, Kind, Prepare, SetView, Status};

fn attached() -> Bench {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    bench
}

fn attach(bench: &mut Bench, epoch: u64, rejoin: bool) -> Option<Status> {
    let client = ClientId::from_bytes([1; 16]);
    let attach =
        Attach { client, takeover: true, rejoin, yields: false, description: "x".into(), held_ms: 0 };
    bench.outputs.clear();
    bench.message(1, bench.header(Kind::Attach, epoch), &attach.encode());
    bench.durable();
    bench.answer(Kind::AttachReply)
}

/// Proposes the view after the present one, as `change` makes it.
fn set_view(bench: &mut Bench, change: impl FnOnce(&mut View, &mut PoolSpec)) -> Option<Status> {
    let epoch = bench.replica.shown_epoch();
    let mut view = bench.replica.view().step(ViewStep::Amend, epoch).unwrap();
    let mut spec = bench.replica.spec().clone();
    change(&mut view, &mut spec);
    let header = MessageHeader { view: view.number, ..bench.header(Kind::SetView, epoch.0) };
    bench.outputs.clear();
    bench.message(
        1,
        header,
        &SetView { view, spec, additions: Vec::new(), more: false, attested: Attested::default() }.encode(),
    );
    bench.durable();
    bench.durable();
    bench.answer(Kind::SetViewReply)
}

#[test]
fn no_attach_and_no_view_uses_the_epochs_or_the_view_numbers_up() {
    for rejoin in [false, true] {
        let mut bench = Bench::new(true);
        for epoch in [MAX_NUMBER, 1 << 63, (1 << 62) + (1 << 32)] {
            assert_eq!(attach(&mut bench, epoch, rejoin), Some(Status::BadRequest), "{epoch}");
        }
        assert!(bench.outputs.iter().any(|o| matches!(
            o, Output::Send(_, _, ReplyPayload::Body(text)) if String::from_utf8_lossy(text).contains("reset-epoch")
        )));
        // What the operators' decisions may have led to, and what follows from it.
        for epoch in [1_900_000_000_000_000_000, 1 << 62, (1 << 62) + 1, (1 << 62) + Epoch::FORCED_JUMP] {
            assert_eq!(attach(&mut bench, epoch, rejoin), Some(Status::Ok), "{epoch}");
        }
    }
    let mut bench = attached();
    for number in [MAX_NUMBER, 1 << 63] {
        let status = set_view(&mut bench, |view, _| view.number = ViewNumber(number));
        assert_eq!(status, Some(Status::IllegalView), "{number}");
    }
    let forced = |view: &mut View, epoch| {
        *view = view.step(ViewStep::Force(member(0)), Epoch(epoch)).unwrap();
    };
    assert_eq!(set_view(&mut bench, |view, _| forced(view, MAX_NUMBER)), Some(Status::IllegalView));
    assert_eq!(set_view(&mut bench, |view, _| forced(view, 1 << 61)), Some(Status::Ok));
}

#[test]
fn a_client_cannot_take_protection_from_a_members_address() {
    let mut bench = attached();
    let to = |text: &str| {
        let address: Address = text.parse().unwrap();
        move |_: &mut View, spec: &mut PoolSpec| spec.members[2].address = address
    };
    assert_eq!(set_view(&mut bench, to("tls://node:3")), Some(Status::Ok));
    for weaker in ["tcp://node:3", "tcp://elsewhere:1", "rdma://node:3"] {
        assert_eq!(set_view(&mut bench, to(weaker)), Some(Status::IllegalView), "{weaker}");
    }
    assert_eq!(set_view(&mut bench, to("tls://elsewhere:3")), Some(Status::Ok));
}

#[test]
fn a_node_that_listens_over_tls_alone_takes_no_new_member_without_it() {
    let mut bench = attached();
    bench.replica.config.tls_only = true;
    let replace =
        |_: &mut View, spec: &mut PoolSpec| spec.members[2].address = "tcp://new:3".parse().unwrap();
    assert_eq!(set_view(&mut bench, replace), Some(Status::IllegalView));
    assert_eq!(set_view(&mut bench, |_, _| ()), Some(Status::Ok), "those that it has may stay");
}

#[test]
fn other_nodes_are_connected_to_at_addresses_of_the_specification_only() {
    let mut bench = attached();
    let own = bench.replica.spec().clone();
    let connects = |bench: &mut Bench, kind: Kind, body: &[u8]| {
        bench.outputs.clear();
        let header = MessageHeader { length: 4096, ..bench.header(kind, 1) };
        bench.message(1, header, body);
        bench.outputs.iter().any(|o| matches!(o, Output::PeerConnect(_)))
    };
    let elsewhere = Address::tcp("victim", 22);
    let compare = |address: &Address| Compare { reference: member(2), address: address.clone() }.encode();
    assert!(!connects(&mut bench, Kind::Compare, &compare(&elsewhere)));
    assert_eq!(bench.answer(Kind::CompareReply), Some(Status::BadRequest));
    assert!(connects(&mut bench, Kind::Compare, &compare(&own.members[2].address)));
    let prepare = |address: &Address, spec: &PoolSpec| {
        Prepare { source: member(2), address: address.clone(), spec: spec.clone() }.encode()
    };
    assert!(!connects(&mut bench, Kind::Prepare, &prepare(&elsewhere, &own)));
    assert_eq!(bench.answer(Kind::PrepareReply), Some(Status::BadRequest));
    // One of another pool, and one that was moved meanwhile.
    let mut other = own.clone();
    other.id = PoolId::from_bytes([8; 16]);
    assert!(!connects(&mut bench, Kind::Prepare, &prepare(&own.members[2].address, &other)));
    let mut moved = own;
    moved.members[2].address = elsewhere.clone();
    assert!(connects(&mut bench, Kind::Prepare, &prepare(&elsewhere, &moved)));
}

#[test]
fn a_size_that_the_store_can_never_hold_is_refused_before_anything_is_set_aside() {
    let mut bench = attached();
    let grow = |bench: &mut Bench, size| {
        bench.outputs.clear();
        bench.message(1, MessageHeader { offset: size, ..bench.header(Kind::Grow, 1) }, &[]);
        assert!(bench.outputs.iter().all(|o| !matches!(o, Output::Grow { .. })), "{size}");
        bench.answer(Kind::GrowReply)
    };
    assert_eq!(grow(&mut bench, 1 << 60), Some(Status::NoSpace));
    assert_eq!(grow(&mut bench, u64::MAX), Some(Status::BadRequest));
    assert_eq!(grow(&mut bench, (1 << 30) + 1), Some(Status::BadRequest));
    let status = set_view(&mut bench, |_, spec| spec.size = 1 << 50);
    assert_eq!(status, Some(Status::NoSpace));
    assert_eq!(bench.replica.additions.blocks(), 0);
    // Questions that wait are bounded, too.
    for i in 0..40 {
        bench.message(1, MessageHeader { offset: (17 << 20) + i * 4096, ..bench.header(Kind::Grow, 1) }, &[]);
    }
    assert_eq!(bench.answer(Kind::GrowReply), Some(Status::Limit));
}

#[test]
fn each_kind_comes_from_those_who_may_send_it() {
    const CLOSES: [(Role, Kind); 9] = [
        (Role::Client, Kind::PullMap),
        (Role::Client, Kind::Pull),
        (Role::Client, Kind::Command),
        (Role::Client, Kind::Hello),
        (Role::Client, Kind::IoReply),
        (Role::Peer, Kind::Attach),
        (Role::Peer, Kind::Write),
        (Role::Peer, Kind::SetView),
        (Role::Peer, Kind::Compare),
    ];
    for (role, kind) in CLOSES {
        let mut bench = attached();
        bench.message_as(role, 7, bench.header(kind, 1), &[]);
        assert!(
            bench.outputs.iter().any(|o| matches!(o, Output::Close(ConnectionId(7), _))),
            "{role:?} {kind:?}"
        );
        assert_eq!(bench.replica.holder_connection(), Some(ConnectionId(1)), "the client keeps its pool");
    }
    // Who does not hold the pool changes nothing in it, and does not learn what is in it.
    let refused = [
        (Kind::Write, Kind::IoReply),
        (Kind::Read, Kind::IoReply),
        (Kind::Flush, Kind::FlushReply),
        (Kind::Discard, Kind::IoReply),
        (Kind::SetView, Kind::SetViewReply),
        (Kind::Detach, Kind::DetachReply),
        (Kind::Prepare, Kind::PrepareReply),
        (Kind::Grow, Kind::GrowReply),
        (Kind::Digest, Kind::DigestReply),
    ];
    for (kind, reply) in refused {
        let mut bench = attached();
        bench.outputs.clear();
        let header = MessageHeader { length: 4096, ..bench.header(kind, 1) };
        bench.message_as(Role::Client, 7, header, &[]);
        assert_eq!(bench.answer(reply), Some(Status::NotAttached), "{kind:?}");
        assert!(
            bench.outputs.iter().all(|o| !matches!(o, Output::Disk { .. } | Output::Persist(..))),
            "{kind:?}"
        );
    }
    let mut bench = attached();
    bench.outputs.clear();
    let header = MessageHeader { length: 4096, ..bench.header(Kind::Digest, 1) };
    bench.message_as(Role::Peer, 7, header, &[]);
    assert!(bench.outputs.iter().any(|o| matches!(o, Output::Disk { .. })), "another node compares");
}

#[test]
fn a_train_of_detaches_flushes_once() {
    let mut bench = attached();
    bench.outputs.clear();
    for _ in 0..100 {
        bench.message(1, bench.header(Kind::Detach, 1), &super::tests::nothing_known());
    }
    let flushes =
        bench.outputs.iter().filter(|o| matches!(o, Output::Disk { operation: DiskOperation::Flush, .. }));
    assert_eq!(flushes.count(), 1);
}

#[test]
fn a_discard_names_no_more_than_one_message_may() {
    let mut bench = Bench::new(true);
    bench.replica.spec.size = 1 << 40;
    bench.attach(1, 1);
    bench.durable();
    let ask = |bench: &mut Bench, length| {
        bench.outputs.clear();
        bench.message(1, MessageHeader { length, ..bench.header(Kind::Discard, 1) }, &[]);
        bench.answer(Kind::IoReply)
    };
    assert_eq!(ask(&mut bench, crate::wire::MAX_RANGE + 512), Some(Status::BadRequest));
    assert_eq!(ask(&mut bench, !511), Some(Status::BadRequest));
}

/// One message of a client that holds the pool, of any kind, with any numbers.
#[derive(Clone, Debug)]
enum Absurd {
    Views { additions: Vec<(u8, u64, u64)>, more: bool, number: u64, repeat: u8 },
    Clears(Vec<u64>, u8),
    Header(u16, u64, u32, u8),
    Attach(u64, bool),
    Prepare(u8),
    Compare(u8),
}

fn absurd() -> impl Strategy<Value = Absurd> {
    let number = prop_oneof![any::<u64>(), 0u64..64, (0u64..64).prop_map(|s| 1 << s)];
    let addition = (any::<u8>(), number.clone(), number.clone());
    prop_oneof![
        (proptest::collection::vec(addition, 0..64), any::<bool>(), 0u64..9, 1u8..64)
            .prop_map(|(additions, more, number, repeat)| Absurd::Views { additions, more, number, repeat }),
        (proptest::collection::vec(number.clone(), 0..64), any::<u8>())
            .prop_map(|(c, m)| Absurd::Clears(c, m)),
        (1u16..45, number.clone(), any::<u32>(), any::<u8>())
            .prop_map(|(k, o, l, m)| Absurd::Header(k, o, l, m)),
        (number, any::<bool>()).prop_map(|(e, r)| Absurd::Attach(e, r)),
        any::<u8>().prop_map(Absurd::Prepare),
        any::<u8>().prop_map(Absurd::Compare),
    ]
}

/// Sends it, and returns how many messages it was.
fn send(bench: &mut Bench, message: Absurd) -> usize {
    let (epoch, spec) = (bench.replica.epoch.0, bench.replica.spec().clone());
    match message {
        Absurd::Views { additions, more, number, repeat } => {
            let Ok(mut view) = bench.replica.view().step(ViewStep::Amend, Epoch(epoch)) else { return 0 };
            view.number = ViewNumber(view.number.0 + number);
            let whole = |(members, offset, length): (u8, u64, u64)| DirtyAddition {
                members: MemberSet(members),
                offset,
                length: (length % (u64::MAX - offset).max(1)).max(1),
            };
            let additions =
                additions.into_iter().map(whole).filter(|a| a.offset.checked_add(a.length).is_some());
            let set =
                SetView { view, spec, additions: additions.collect(), more, attested: Attested::default() };
            let header = MessageHeader { view: set.view.number, ..bench.header(Kind::SetView, epoch) };
            let body = set.encode();
            (0..repeat).for_each(|_| bench.message(1, header, &body));
            repeat.into()
        }
        Absurd::Clears(chunks, of) => {
            let chunks = chunks.into_iter().map(Chunk).collect();
            let list = ChunkList { member: member(of % 8), blocks_left: 1, chunks };
            bench.message(1, bench.header(Kind::ClearDirty, epoch), &list.encode());
            1
        }
        Absurd::Header(code, offset, length, missing) => {
            let Some(kind) = Kind::from_code(code) else { return 0 };
            let header = MessageHeader {
                offset,
                length,
                missing: MemberSet(missing),
                slot: Slot(u16::from(missing)),
                sequence: Sequence(offset % (MAX_NUMBER + 1)),
                watermark: Sequence(u64::from(length)),
                ..bench.header(kind, epoch)
            };
            bench.message(1, header, &[]);
            1
        }
        Absurd::Attach(named, rejoin) => {
            let client = ClientId::from_bytes([1; 16]);
            let attach =
                Attach { client, takeover: true, rejoin, yields: false, description: "x".into(), held_ms: 0 };
            bench.message(1, bench.header(Kind::Attach, named % (MAX_NUMBER + 1)), &attach.encode());
            1
        }
        Absurd::Prepare(index) => {
            let line = &spec.members[usize::from(index) % spec.members.len()];
            let (source, address) = (line.id, line.address.clone());
            bench.message(1, bench.header(Kind::Prepare, epoch), &Prepare { source, address, spec }.encode());
            1
        }
        Absurd::Compare(index) => {
            let line = &spec.members[usize::from(index) % spec.members.len()];
            let body = Compare { reference: line.id, address: line.address.clone() }.encode();
            let header = MessageHeader { length: 4096, ..bench.header(Kind::Compare, epoch) };
            bench.message(1, header, &body);
            1
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Nothing that a train of messages names makes the member keep or ask for more than its own pool is large and its
    /// requests are many, or use up its numbers.
    #[test]
    fn trains_of_absurd_messages_cost_what_the_pool_is_large_and_no_more(
        train in proptest::collection::vec((absurd(), any::<bool>()), 1..40),
    ) {
        let mut bench = attached();
        let blocks = bench.replica.spec().block_count();
        bench.outputs.clear();
        let (mut all_messages, mut answers) = (0, 0);
        for (message, is_durable) in train {
            let (messages, mut pages) = (send(&mut bench, message), 0);
            all_messages += messages;
            let replica = &bench.replica;
            prop_assert!(replica.additions.blocks() <= 8 * blocks);
            prop_assert!(replica.coming_states.len() <= 70, "{} superblocks", replica.coming_states.len());
            prop_assert!(replica.room.asked() <= 16);
            for other in MemberId::all() {
                prop_assert!(replica.maps().missed(other).0 <= blocks.next_multiple_of(1 << 15));
            }
            prop_assert!(replica.epoch.0 <= (1 << 62) + 40 * 2 * Epoch::FORCED_JUMP);
            prop_assert!(replica.view().number.0 <= 1 << 62);
            for output in &bench.outputs {
                match output {
                    Output::Send(_, _, ReplyPayload::Body(body)) => {
                        prop_assert!(body.len() <= 4096 + MAP_PAGE_BYTES, "{} bytes", body.len());
                        answers += 1;
                    }
                    Output::Send(..) => answers += 1,
                    Output::Persist(_, Metadata::Page(_)) => pages += 1,
                    Output::PeerConnect(address) => {
                        let spec = bench.replica.spec();
                        prop_assert!(spec.members.iter().any(|m| m.address == *address));
                    }
                    Output::Grow { to, .. } => prop_assert!(*to <= 1 << 30),
                    _ => {}
                }
            }
            // Each message is answered once, at once or with a later one, and writes each page of the maps (one, here) of each
            // member once.
            prop_assert!(answers <= 2 * all_messages, "{answers} answers to {all_messages} messages");
            prop_assert!(pages <= 9 * messages, "{pages} pages by {messages} messages");
            let is_durable = is_durable || bench.replica.holder_connection().is_none();
            if is_durable {
                bench.durable();
                bench.durable();
            }
            if bench.replica.holder_connection().is_none() {
                let next = bench.replica.epoch.0 + 1;
                bench.attach(1, next);
                bench.durable();
                bench.outputs.clear();
            }
            bench.outputs.clear();
        }
        bench.apply(Event::Closed(ConnectionId(1)));
        prop_assert_eq!(bench.replica.additions.blocks(), 0, "the memory is given back");
    }
}

#[test]
fn intents_of_a_pool_that_was_written_everywhere_are_looked_at_a_part_at_a_time() {
    let mut bench = Bench::new(true);
    let size = 6u64 << 30;
    bench.replica.spec.size = size;
    let spec = bench.replica.spec.clone();
    bench.replica.maps.resize(&spec, &mut Vec::new());
    bench.replica.room = super::room::Room::new(size);
    bench.replica.config.max_size = size;
    bench.attach(1, 1);
    bench.durable();
    assert_eq!(set_view(&mut bench, |_, _| ()), Some(Status::Ok));
    for i in 0..size >> 26 {
        let sequence = Sequence(i + 1);
        let header = bench.header(Kind::Discard, 1);
        bench.message(1, MessageHeader { sequence, offset: i << 26, length: 64 << 20, ..header }, &[]);
        bench.durable();
        complete(&mut bench);
    }
    let watermark = Sequence(size);
    super::tests::mark(&mut bench, 1, size, &Attested::default());
    let known = super::tests::all_at(&bench, 1);
    super::tests::mark(&mut bench, 2, size, &known);
    bench.durable();
    bench.message(1, MessageHeader { watermark, ..bench.header(Kind::Ping, 1) }, &[]);
    let mut left = vec![bench.replica.maps().intent().count()];
    while left.last() != Some(&0) {
        assert!(left.len() < 5, "{left:?}");
        bench.apply(Event::Tick);
        complete(&mut bench);
        left.push(bench.replica.maps().intent().count());
    }
    assert_eq!(left, [98304, 32768, 0]);
}

/// The disk does all that it was asked for.
fn complete(bench: &mut Bench) {
    let asked: Vec<_> = bench
        .outputs
        .iter()
        .filter_map(|o| if let Output::Disk { io, .. } = o { Some(*io) } else { None })
        .collect();
    bench.outputs.clear();
    asked.into_iter().for_each(|io| bench.apply(Event::Disk(io, DiskResult::Done)));
    bench.durable();
}
