//! Unit tests of the machine; the simulator tests it together with clients.

use std::time::Duration;

use super::*;
use crate::pool::{
    Address, ChunkSize, Mark, MemberSet, MemberSpec, MemberState, PoolId, Position, Slot, StoreId, ViewStep,
};
use crate::wire::{Attach, DirtyAddition, Kind, Limits, SetView, Status};

const CHUNK: u64 = 64 << 10;
/// A pool of this size has two pages in each map.
const TWO_PAGES: u64 = (crate::map::MAP_PAGE_BITS + 16) * CHUNK;

pub(super) fn member(index: u8) -> MemberId {
    MemberId::new(index).unwrap()
}

/// The body of a mark or a detach whose client remembers nothing of the members.
pub(super) fn nothing_known() -> Vec<u8> {
    crate::wire::encode_attested(&Attested::default())
}

/// A replica with the outputs that nobody has looked at yet.
pub(super) struct Bench {
    pub(super) replica: Replica,
    pub(super) outputs: Vec<Output>,
}

impl Bench {
    pub(super) fn new(write_through: bool) -> Self {
        Self::of_size(write_through, 16 << 20)
    }

    fn of_size(write_through: bool, size: u64) -> Self {
        let line = |i: u8| {
            let store = StoreId::from_bytes([i + 1; 16]);
            MemberSpec::new(member(i), store, Address::tcp("node", 1 + u16::from(i)))
        };
        let spec = PoolSpec {
            id: PoolId::from_bytes([9; 16]),
            name: "p".into(),
            size,
            chunk_size: ChunkSize::from_bytes(CHUNK).unwrap(),
            logical_block_size: 512,
            members: (0..3).map(line).collect(),
        };
        let view = View::initial(spec.members.iter().map(|m| (m.id, m.store)));
        let config = Config {
            resync: super::ResyncLimits { max_inflight: 4, bytes_per_s: None },
            limits: Limits { max_io: 1 << 20, slots: 8, max_bytes: 1 << 20 },
            intent_idle: Duration::ZERO,
            host_boot: BootId::from_bytes([1; 16]),
            process_boot: BootId::from_bytes([1; 16]),
            write_through,
            max_size: size.max(1 << 30),
            tls_only: false,
        };
        let state = DurableState::new(view, spec.clone());
        let maps = MemberMaps::new(&spec);
        Self { replica: Replica::new(config, member(0), state, maps), outputs: Vec::new() }
    }

    pub(super) fn apply(&mut self, event: Event<'_>) {
        self.replica.apply(event, Time(0));
        self.collect();
    }

    pub(super) fn command(&mut self, id: CommandId, command: &crate::pool::Command) {
        self.replica.command(id, command);
        self.collect();
    }

    fn collect(&mut self) {
        while let Some(output) = self.replica.take_output() {
            self.outputs.push(output);
        }
    }

    pub(super) fn message(&mut self, connection: u32, header: MessageHeader, body: &[u8]) {
        let role = if header.kind.is_from(Role::Client) { Role::Client } else { Role::Peer };
        self.message_as(role, connection, header, body);
    }

    pub(super) fn message_as(&mut self, role: Role, connection: u32, header: MessageHeader, body: &[u8]) {
        let is_write = header.kind == Kind::Write;
        let buffer = is_write.then_some(BufferToken(u32::from(header.slot.0)));
        let connection = ConnectionId(connection);
        self.apply(Event::Message { connection, role, header: &header, body, buffer });
    }

    pub(super) fn header(&self, kind: Kind, epoch: u64) -> MessageHeader {
        MessageHeader {
            epoch: Epoch(epoch),
            view: self.replica.view().number,
            ..MessageHeader::new(kind, self.replica.spec().id)
        }
    }

    pub(super) fn attach(&mut self, connection: u32, epoch: u64) {
        self.attach_as(connection, epoch, false);
    }

    pub(super) fn attach_as(&mut self, connection: u32, epoch: u64, rejoin: bool) {
        let client = ClientId::from_bytes([1; 16]);
        let description = "test".into();
        self.attach_with(
            connection,
            epoch,
            &Attach { client, takeover: false, rejoin, yields: false, description, held_ms: 0 },
        );
    }

    fn attach_with(&mut self, connection: u32, epoch: u64, attach: &Attach) {
        self.message(connection, self.header(Kind::Attach, epoch), &attach.encode());
    }

    /// A view without `lost`, which has missed the chunks at these indices.
    pub(super) fn set_view(&mut self, connection: u32, epoch: u64, lost: u8, chunks: &[u64]) {
        let lost = MemberSet::only(member(lost));
        let view = self.replica.view().step(ViewStep::Lose(lost), Epoch(epoch)).unwrap();
        let missed = |c: &u64| DirtyAddition { members: lost, offset: c * CHUNK, length: 4096 };
        let body = SetView {
            view,
            spec: self.replica.spec().clone(),
            additions: chunks.iter().map(missed).collect(),
            more: false,
            attested: Attested::default(),
        }
        .encode();
        self.message(connection, self.header(Kind::SetView, epoch), &body);
    }

    /// The tickets of metadata that was asked for and not looked at.
    pub(super) fn take_tickets(&mut self) -> Vec<(Ticket, Metadata)> {
        let (persists, rest) = std::mem::take(&mut self.outputs)
            .into_iter()
            .partition::<Vec<_>, _>(|o| matches!(o, Output::Persist(..)));
        self.outputs = rest;
        let ticket = |o| if let Output::Persist(t, m) = o { Some((t, m)) } else { None };
        persists.into_iter().filter_map(ticket).collect()
    }

    pub(super) fn durable(&mut self) {
        for (ticket, _) in self.take_tickets() {
            self.apply(Event::Durable(ticket, Ok(())));
        }
    }

    pub(super) fn take_flush(&mut self) -> Option<IoId> {
        let is_flush = |o: &Output| matches!(o, Output::Disk { operation: DiskOperation::Flush, .. });
        let at = self.outputs.iter().position(is_flush)?;
        if let Output::Disk { io, .. } = self.outputs.remove(at) { Some(io) } else { None }
    }

    pub(super) fn answer(&self, kind: Kind) -> Option<Status> {
        self.outputs.iter().rev().find_map(|o| match o {
            Output::Send(_, header, _) if header.kind == kind => Some(header.status),
            _ => None,
        })
    }
}

#[test]
fn a_write_back_member_flushes_before_it_answers_an_attach() {
    let mut bench = Bench::new(false);
    bench.attach(1, 1);
    bench.durable();
    assert_eq!(bench.answer(Kind::AttachReply), None);
    let flush = bench.take_flush().expect("a flush");
    bench.apply(Event::Disk(flush, DiskResult::Done));
    assert_eq!(bench.answer(Kind::AttachReply), Some(Status::Ok));
}

#[test]
fn only_a_rejoin_may_attach_under_the_present_epoch() {
    let mut bench = Bench::new(true);
    bench.attach_as(1, 4, false);
    bench.durable();
    assert_eq!(bench.answer(Kind::AttachReply), Some(Status::Ok));
    bench.attach_as(2, 4, false);
    // The same identity, and perhaps another process, which would take its own views for those of the first.
    assert_eq!(bench.answer(Kind::AttachReply), Some(Status::StaleEpoch));
    bench.attach_as(2, 4, true);
    bench.durable();
    assert_eq!(bench.answer(Kind::AttachReply), Some(Status::Ok));
}

#[test]
fn a_member_that_cannot_flush_refuses_an_attach() {
    let mut bench = Bench::new(false);
    bench.attach(1, 1);
    bench.durable();
    let flush = bench.take_flush().expect("a flush");
    bench.apply(Event::Disk(flush, DiskResult::Failed));
    assert_eq!(bench.answer(Kind::AttachReply), Some(Status::IoError));
}

#[test]
fn a_page_that_a_view_of_another_attachment_waits_for_does_not_count_twice() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    // The dirty maps of members 1 and 2 are on their way to disk for view 2 of epoch 1.
    bench.set_view(1, 1, 1, &[0]);
    let first = bench.take_tickets();
    assert_eq!(first.len(), 1);
    // The client attaches anew, and proposes another view 2, which waits for that page and for one more.
    bench.attach(2, 2);
    bench.durable();
    bench.set_view(2, 2, 2, &[5]);
    let second = bench.take_tickets();
    assert_eq!(second.len(), 1);
    bench.apply(Event::Durable(first[0].0, Ok(())));
    assert!(bench.take_tickets().is_empty(), "the view must not be adopted before its own page is durable");
    bench.apply(Event::Durable(second[0].0, Ok(())));
    assert!(matches!(bench.take_tickets()[..], [(_, Metadata::State(_))]));
}

#[test]
fn a_detach_keeps_the_intents_of_writes_above_the_watermark() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    bench.set_view(1, 1, 1, &[]);
    bench.durable();
    for (slot, sequence) in [(0, 1), (1, 2)] {
        let write = MessageHeader {
            slot: Slot(slot),
            sequence: Sequence(sequence),
            offset: u64::from(slot) * CHUNK,
            length: 4096,
            payload: 4096,
            missing: MemberSet::only(member(1)),
            ..bench.header(Kind::Write, 1)
        };
        bench.message(1, write, &[]);
        bench.durable();
    }
    let detach = MessageHeader { watermark: Sequence(1), ..bench.header(Kind::Detach, 1) };
    bench.message(1, detach, &nothing_known());
    let flush = bench.take_flush().expect("a flush");
    bench.apply(Event::Disk(flush, DiskResult::Done));
    bench.durable();
    bench.durable();
    assert_eq!(bench.answer(Kind::DetachReply), Some(Status::Ok));
    assert_eq!(bench.replica.maps().intent().iter().collect::<Vec<_>>(), vec![Chunk(1)]);
}

impl Bench {
    /// The last one.
    pub(super) fn attach_reply(&self) -> crate::wire::AttachReply {
        let body = self.outputs.iter().rev().find_map(|o| match o {
            Output::Send(_, header, ReplyPayload::Body(body)) if header.kind == Kind::AttachReply => {
                Some(body)
            }
            _ => None,
        });
        crate::wire::AttachReply::decode(body.expect("an answer")).unwrap()
    }
}

#[test]
fn the_watermark_of_a_client_counts_from_its_first_view_on() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    bench.set_view(1, 1, 1, &[0]);
    bench.durable();
    bench.durable();
    let ping = |bench: &mut Bench, connection, epoch, watermark| {
        let header = MessageHeader { watermark: Sequence(watermark), ..bench.header(Kind::Ping, epoch) };
        bench.message(connection, header, &[]);
    };
    ping(&mut bench, 1, 1, 40);
    // A client that brings this member back in, and does not come far. Its writes have higher sequences.
    for connection in [2, 3] {
        bench.attach_as(connection, 2, true);
        bench.durable();
        assert_eq!(bench.attach_reply().watermark, Sequence(40));
        ping(&mut bench, connection, 2, 1000);
    }
    bench.set_view(3, 2, 2, &[0]);
    bench.durable();
    bench.durable();
    ping(&mut bench, 3, 2, 30);
    bench.attach(4, 3);
    bench.durable();
    assert_eq!(bench.attach_reply().watermark, Sequence(30));
}

impl Bench {
    /// Attached and linked to member 2 as its source.
    pub(super) fn prepare(&mut self) {
        self.attach_as(1, 1, true);
        self.durable();
        let spec = self.replica.spec().clone();
        let body =
            crate::wire::Prepare { source: member(2), address: Address::tcp("node", 3), spec }.encode();
        self.message(1, self.header(Kind::Prepare, 1), &body);
        self.apply(Event::PeerUp);
        self.rehearse();
        assert_eq!(self.answer(Kind::PrepareReply), Some(Status::Ok));
    }

    /// The source answers what a rehearsal asks of it, and the state is durable.
    fn rehearse(&mut self) {
        for ask in self.take_sent(Kind::PullMap) {
            let reply = ask.reply(Kind::PullMapReply, Status::Ok);
            self.apply(Event::PeerMessage(&reply, &[0; crate::map::MAP_PAGE_BYTES]));
        }
        self.durable();
    }

    /// A view that has this member Syncing and member 1 Out, which adds to what that one misses.
    pub(super) fn syncing(&mut self) {
        self.syncing_in(1, 7);
    }

    /// The view with this number, on this connection.
    pub(super) fn syncing_in(&mut self, connection: u32, number: u64) {
        let states = [MemberState::Syncing, MemberState::Out, MemberState::Clean];
        let mut view = self.replica.view().clone();
        (view.number, view.epoch) = (ViewNumber(number), Epoch(1));
        view.members.iter_mut().zip(states).for_each(|(line, state)| line.state = state);
        let addition = DirtyAddition { members: MemberSet::only(member(1)), offset: 0, length: 4096 };
        let header = MessageHeader { view: view.number, ..self.header(Kind::SetView, 1) };
        let body = SetView {
            view,
            spec: self.replica.spec().clone(),
            additions: vec![addition],
            more: false,
            attested: Attested::default(),
        }
        .encode();
        self.message(connection, header, &body);
    }

    /// Answers every page that was asked for; the source has on record that this member misses chunk 0.
    fn hand_over(&mut self) {
        self.hand_over_chunks(1);
    }

    /// The same with the first eight chunks of which this member misses those whose bits are set.
    pub(super) fn hand_over_chunks(&mut self, chunks: u8) {
        for ask in self.take_sent(Kind::PullMap) {
            let mut bits = [0; crate::map::MAP_PAGE_BYTES];
            bits[0] = if ask.slot == Slot(0) { chunks } else { 0 };
            self.apply(Event::PeerMessage(&ask.reply(Kind::PullMapReply, Status::Ok), &bits));
        }
        self.durable();
        self.durable();
    }

    pub(super) fn take_sent(&mut self, kind: Kind) -> Vec<MessageHeader> {
        let sent = |o: &Output| if let Output::PeerSend(h) = o { Some(*h) } else { None };
        let found = self.outputs.iter().filter_map(sent).filter(|h| h.kind == kind).collect();
        self.outputs.retain(|o| sent(o).is_none_or(|h| h.kind != kind));
        found
    }
}

#[test]
fn a_view_of_an_earlier_session_is_no_reason_to_report_that_nothing_is_stale() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over();
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
    let mut again = Bench::new(true);
    let maps = MemberMaps::new(bench.replica.spec());
    let state = bench.replica.present_state();
    again.replica = Replica::new(bench.replica.config.clone(), member(0), state, maps);
    again.prepare();
    again.replica.apply(Event::Tick, Time(5_000_000_000));
    again.apply(Event::Tick);
    assert_eq!((again.take_flush(), again.answer(Kind::ChunksDone)), (None, None));
}

#[test]
fn a_lost_slot_table_is_told_until_a_message_shows_that_the_view_is_committed() {
    let mut bench = Bench::new(true);
    bench.prepare();
    let maps = MemberMaps::new(bench.replica.spec());
    let state = bench.replica.present_state();
    bench.replica = Replica::new(bench.replica.config.clone(), member(0), state, maps);
    bench.prepare();
    assert!(bench.attach_reply().tables_lost);
    bench.syncing();
    bench.hand_over();
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
    // Under the view before, as long as not all have answered.
    let ping = bench.header(Kind::Ping, 1);
    bench.message(1, MessageHeader { view: ViewNumber(6), watermark: Sequence(90), ..ping }, &[]);
    bench.prepare();
    let reply = bench.attach_reply();
    assert!(reply.tables_lost && reply.watermark == Sequence(0));
    bench.syncing_in(1, 9);
    bench.hand_over();
    let ping = bench.header(Kind::Ping, 1);
    bench.message(1, MessageHeader { watermark: Sequence(90), ..ping }, &[]);
    bench.prepare();
    let reply = bench.attach_reply();
    assert!(!reply.tables_lost && reply.watermark == Sequence(90));
}

#[test]
fn a_syncing_member_takes_over_no_maps_for_a_view_that_follows_one_which_it_did_not_get_to_see() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over();
    // It covers all that is stale. The source may not have carried it out yet, and knows nothing better than before.
    let missing = MemberSet::only(member(1));
    let write = MessageHeader { length: 65536, payload: 65536, missing, ..bench.header(Kind::Write, 1) };
    bench.message(1, MessageHeader { sequence: Sequence(1), ..write }, &[]);
    bench.durable();
    let written = |o: &Output| match o {
        Output::Disk { io, operation: DiskOperation::Write(_), .. } => Some(*io),
        _ => None,
    };
    let io = bench.outputs.iter().find_map(written).expect("a write");
    bench.apply(Event::Disk(io, DiskResult::Done));
    assert_eq!(bench.replica.maps().missed(member(0)), (0, 0));
    // Another leg was lost, and one more before the view without the first was durable everywhere.
    bench.syncing_in(1, 8);
    bench.syncing_in(1, 9);
    bench.hand_over();
    assert_eq!(
        (bench.replica.view().number, bench.replica.maps().missed(member(0))),
        (ViewNumber(9), (0, 0))
    );
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
}

#[test]
fn a_member_whose_promotion_gave_way_to_another_view_reports_again_that_nothing_is_stale() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over();
    bench.apply(Event::Tick);
    let nothing = crate::wire::PullReply::encode(std::iter::empty());
    for pull in bench.take_sent(Kind::Pull) {
        bench.apply(Event::PeerMessage(&pull.reply(Kind::PullReply, Status::Ok), &nothing));
    }
    // View 8 would have it Clean, and never comes.
    for _ in 0..2 {
        let flush = bench.take_flush().expect("the flush before a report");
        bench.durable();
        bench.outputs.clear();
        bench.apply(Event::Disk(flush, DiskResult::Done));
        assert_eq!(bench.answer(Kind::ChunksDone), Some(Status::Ok));
        bench.syncing_in(1, 9);
        bench.durable();
        bench.durable();
    }
}

#[test]
fn a_member_that_is_brought_back_in_takes_over_maps_whatever_the_number_of_the_view() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over();
    bench.prepare();
    bench.syncing_in(1, 8);
    assert!(!bench.take_sent(Kind::PullMap).is_empty());
}

#[test]
fn a_handover_keeps_what_the_view_adds() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over();
    assert_eq!(bench.replica.maps().missed(member(0)), (16, 1));
    assert_eq!(bench.replica.maps().missed(member(1)), (1, 1));
}

#[test]
fn a_block_that_an_urgent_pull_and_the_sweep_bring_is_written_once() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over();
    bench.apply(Event::Tick);
    let missing = MemberSet::only(member(1));
    let write = MessageHeader { length: 512, payload: 512, missing, ..bench.header(Kind::Write, 1) };
    bench.message(1, MessageHeader { sequence: Sequence(1), ..write }, &[]);
    bench.durable();
    let pulls = bench.take_sent(Kind::Pull);
    assert_eq!(pulls.iter().map(|p| p.length).collect::<Vec<_>>(), vec![65536, 4096]);
    let reply = crate::wire::PullReply::encode([(0, false)].into_iter());
    for pull in pulls {
        bench.apply(Event::PeerMessage(&pull.reply(Kind::PullReply, Status::Ok), &reply));
    }
    let writes = bench.outputs.iter().filter(|o| matches!(o, Output::WritePulled { .. })).count();
    assert_eq!(writes, 1);
}

#[test]
fn what_was_written_after_the_flush_before_a_report_began_keeps_the_member_from_being_current() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over_chunks(0b11);
    // Long after the last guest write, so that it does not yield.
    bench.replica.apply(Event::Tick, Time(0) + Duration::from_secs(1));
    bench.collect();
    let missing = MemberSet::only(member(1));
    let write = MessageHeader { length: 512, payload: 512, missing, ..bench.header(Kind::Write, 1) };
    bench.message(1, MessageHeader { sequence: Sequence(1), ..write }, &[]);
    bench.durable();
    let pulls = bench.take_sent(Kind::Pull);
    let [first, second, urgent] = pulls[..] else { panic!("{pulls:?}") };
    assert_eq!((first.offset, second.offset, urgent.length), (0, CHUNK, 4096));
    // Chunk 1 is finished; block 0 of chunk 0 is on its way to disk, and the urgent pull is still out.
    let nothing = crate::wire::PullReply::encode(std::iter::empty());
    bench.apply(Event::PeerMessage(&second.reply(Kind::PullReply, Status::Ok), &nothing));
    let block = crate::wire::PullReply::encode([(0, false)].into_iter());
    bench.apply(Event::PeerMessage(&first.reply(Kind::PullReply, Status::Ok), &block));
    let write = |o: &Output| if let Output::WritePulled { io, .. } = o { Some(*io) } else { None };
    let write = bench.outputs.iter().find_map(write).expect("the pulled block is written");
    bench.replica.apply(Event::Tick, Time(0) + Duration::from_secs(2));
    bench.collect();
    let flush = bench.take_flush().expect("the flush before the report of chunk 1");
    bench.apply(Event::Disk(write, DiskResult::Done));
    bench.apply(Event::Disk(flush, DiskResult::Done));
    let reported = bench.outputs.iter().find_map(|o| match o {
        Output::Send(_, header, ReplyPayload::Body(body)) if header.kind == Kind::ChunksDone => {
            Some(crate::wire::ChunkList::decode(Kind::ChunksDone, body).unwrap())
        }
        _ => None,
    });
    assert!(reported.is_some_and(|list| list.blocks_left > 0));
}

#[test]
fn a_source_that_does_not_have_the_view_yet_is_asked_again_at_once() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.syncing();
    bench.hand_over();
    bench.apply(Event::Tick);
    let pulls = bench.take_sent(Kind::Pull);
    assert!(!pulls.is_empty());
    for pull in &pulls {
        bench.apply(Event::PeerMessage(&pull.reply(Kind::PullReply, Status::StaleView), &[]));
    }
    let soon = Time(0) + std::time::Duration::from_millis(10);
    assert!(bench.replica.deadline().is_some_and(|due| due <= soon), "{:?}", bench.replica.deadline());
    assert_eq!(bench.replica.status().resync.and_then(|r| r.last_error), None);
    bench.replica.apply(Event::Tick, soon);
    bench.collect();
    assert_eq!(bench.take_sent(Kind::Pull).len(), pulls.len());
}

#[test]
fn a_member_that_has_started_anew_is_no_source_until_its_client_is_back() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    bench.set_view(1, 1, 1, &[3]);
    bench.durable();
    let asks = |bench: &mut Bench| {
        let (map, data) = (bench.header(Kind::PullMap, 1), bench.header(Kind::Pull, 1));
        let stale = Slot(1);
        bench.message(7, MessageHeader { slot: stale, ..map }, &[]);
        bench.message(7, MessageHeader { slot: stale, offset: 3 * CHUNK, length: 4096, ..data }, &[]);
    };
    asks(&mut bench);
    assert_eq!(bench.answer(Kind::PullMapReply), Some(Status::Ok));
    let is_read = |o: &Output| matches!(o, Output::Disk { operation: DiskOperation::Read, .. });
    assert!(bench.outputs.iter().any(is_read));

    // Its process ends; its view and maps are durable.
    let old = bench.replica;
    let (config, member, state, maps) = (old.config, old.member, old.durable_state, old.maps);
    bench = Bench { replica: Replica::new(config, member, state, maps), outputs: Vec::new() };
    asks(&mut bench);
    assert_eq!(bench.answer(Kind::PullMapReply), Some(Status::NotAttached));
    assert_eq!(bench.answer(Kind::PullReply), Some(Status::NotAttached));
    assert!(!bench.outputs.iter().any(is_read));
    bench.attach_as(2, 1, true);
    bench.durable();
    asks(&mut bench);
    assert_eq!(bench.answer(Kind::PullMapReply), Some(Status::Ok));
}

/// A member with a client whose view is durable.
fn in_use() -> Bench {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    let view = bench.replica.view().step(ViewStep::Attach(MemberSet::EMPTY), Epoch(1)).unwrap();
    let header = MessageHeader { view: view.number, ..bench.header(Kind::SetView, 1) };
    let (spec, additions, attested) = (bench.replica.spec().clone(), Vec::new(), Attested::default());
    let body = SetView { view, spec, additions, more: false, attested }.encode();
    bench.message(1, header, &body);
    bench.durable();
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
    bench
}

pub(super) fn mark(bench: &mut Bench, number: u64, watermark: u64, attested: &Attested) {
    let header = MessageHeader {
        sequence: Sequence(number),
        watermark: Sequence(watermark),
        ..bench.header(Kind::Mark, 1)
    };
    bench.message(1, header, &crate::wire::encode_attested(attested));
}

/// What a client knows when all three members have this mark.
pub(super) fn all_at(bench: &Bench, number: u64) -> Attested {
    let mut attested = Attested::default();
    for index in 0..3 {
        attested.note(member(index), &Position::new(Epoch(1), bench.replica.view(), Mark(number)));
    }
    attested
}

#[test]
fn a_mark_is_answered_when_it_is_durable_and_what_came_with_it_is_remembered() {
    let mut bench = in_use();
    let known = all_at(&bench, 3);
    mark(&mut bench, 4, 0, &known);
    assert_eq!(bench.answer(Kind::MarkReply), None);
    bench.durable();
    assert_eq!(bench.answer(Kind::MarkReply), Some(Status::Ok));
    let state = &bench.replica.durable_state;
    assert_eq!((state.mark, state.attested), (Mark(4), known));
    mark(&mut bench, 4, 0, &known);
    assert_eq!(bench.answer(Kind::MarkReply), Some(Status::BadRequest), "marks grow");
    bench.message(1, MessageHeader { sequence: Sequence(5), ..bench.header(Kind::Mark, 1) }, &[9]);
    assert_eq!(bench.answer(Kind::MarkReply), Some(Status::BadRequest));
    bench.message(
        2,
        MessageHeader { sequence: Sequence(5), ..bench.header(Kind::Mark, 1) },
        &nothing_known(),
    );
    assert_eq!(bench.answer(Kind::MarkReply), Some(Status::NotAttached));
    bench.attach(3, 2);
    bench.durable();
    assert_eq!(bench.attach_reply().position, Position::new(Epoch(1), bench.replica.view(), Mark(4)));
    assert_eq!(bench.attach_reply().attested, known);
}

#[test]
fn an_intent_stays_until_a_mark_that_covers_its_write_is_known_to_be_everywhere() {
    let mut bench = in_use();
    let write = MessageHeader {
        slot: Slot(0),
        sequence: Sequence(1),
        length: 4096,
        payload: 4096,
        ..bench.header(Kind::Write, 1)
    };
    bench.message(1, write, &[]);
    bench.durable();
    let is_write = |o: &Output| matches!(o, Output::Disk { operation: DiskOperation::Write(_), .. });
    let at = bench.outputs.iter().position(is_write).unwrap();
    let Output::Disk { io, .. } = bench.outputs.remove(at) else { unreachable!() };
    bench.apply(Event::Disk(io, DiskResult::Done));
    let tick = |bench: &mut Bench| {
        bench.apply(Event::Tick);
        if let Some(flush) = bench.take_flush() {
            bench.apply(Event::Disk(flush, DiskResult::Done));
        }
        bench.durable();
        bench.replica.maps().intent().count()
    };
    let ping = MessageHeader { watermark: Sequence(1), ..bench.header(Kind::Ping, 1) };
    bench.message(1, ping, &[]);
    assert_eq!(tick(&mut bench), 1, "no mark covers it");
    mark(&mut bench, 1, 1, &Attested::default());
    assert_eq!(tick(&mut bench), 1, "others may not have the mark");
    let known = all_at(&bench, 1);
    mark(&mut bench, 2, 1, &known);
    assert_eq!(tick(&mut bench), 0);
}

#[test]
fn a_detach_ends_the_resync() {
    let mut bench = Bench::new(true);
    bench.prepare();
    bench.message(1, bench.header(Kind::Detach, 1), &nothing_known());
    let flush = bench.take_flush().unwrap();
    bench.apply(Event::Disk(flush, DiskResult::Done));
    bench.durable();
    assert_eq!(bench.answer(Kind::DetachReply), Some(Status::Ok));
    assert!(bench.outputs.contains(&Output::PeerClose) && bench.replica.deadline().is_none());
}

#[test]
fn a_write_that_the_disk_failed_is_told_to_the_next_client_as_such() {
    let mut bench = Bench::new(true);
    bench.attach(1, 1);
    bench.durable();
    let write = MessageHeader {
        slot: Slot(3),
        sequence: Sequence(7),
        offset: 4096,
        length: 4096,
        payload: 4096,
        ..bench.header(Kind::Write, 1)
    };
    bench.message(1, write, &[]);
    bench.durable();
    let io = bench.outputs.iter().rev().find_map(|o| match o {
        Output::Disk { io, operation: DiskOperation::Write(_), .. } => Some(*io),
        _ => None,
    });
    bench.apply(Event::Disk(io.unwrap(), DiskResult::Failed));
    assert_eq!(bench.answer(Kind::IoReply), Some(Status::IoError));
    bench.attach(2, 2);
    bench.durable();
    let reply = bench.attach_reply();
    let [entry] = reply.slots[..] else { panic!("{:?}", reply.slots) };
    assert_eq!((entry.sequence, entry.offset, entry.length), (Sequence(7), 4096, 4096));
    assert!(entry.slot == Slot(3) && entry.failed);
}

#[test]
fn a_client_that_is_displaced_is_told_so_before_its_connection_is_closed() {
    let told = |client, takeover| {
        let mut bench = Bench::new(true);
        let attach = |client, takeover| Attach {
            client: ClientId::from_bytes([client; 16]),
            takeover,
            rejoin: false,
            yields: false,
            description: format!("client {client}"),
            held_ms: 0,
        };
        bench.attach_with(1, 1, &attach(1, false));
        bench.durable();
        bench.outputs.clear();
        bench.attach_with(2, 2, &attach(client, takeover));
        let outputs = std::mem::take(&mut bench.outputs);
        let end = outputs.iter().position(|o| matches!(o, Output::Close(ConnectionId(1), _)));
        let word = outputs.iter().position(|o| {
            matches!(o, Output::Send(ConnectionId(1), header, _) if header.kind == Kind::Goodbye
                && (header.status, header.epoch) == (Status::StaleEpoch, Epoch(2)))
        });
        (end.is_some(), word.is_some_and(|word| Some(word) < end))
    };
    assert_eq!(told(2, true), (true, true));
    assert_eq!(told(2, false), (false, false), "it is not displaced");
    assert_eq!(told(1, false), (true, false), "it has another connection now, and goes on");
}

#[test]
fn a_client_that_yields_makes_room_for_a_guest_and_for_no_other_that_yields() {
    let mut bench = Bench::new(true);
    let attach = |client, yields| Attach {
        client: ClientId::from_bytes([client; 16]),
        takeover: false,
        rejoin: false,
        yields,
        description: format!("client {client}"),
        held_ms: 0,
    };
    let status = |bench: &mut Bench, to: u32| {
        bench.durable();
        let outputs = std::mem::take(&mut bench.outputs);
        outputs.iter().find_map(|o| match o {
            Output::Send(c, header, _) if *c == ConnectionId(to) => Some(header.status),
            _ => None,
        })
    };
    bench.attach_with(1, 1, &attach(1, true));
    assert_eq!(status(&mut bench, 1), Some(Status::Ok));
    bench.attach_with(2, 2, &attach(2, true));
    assert_eq!(status(&mut bench, 2), Some(Status::Held));
    bench.attach_with(3, 2, &attach(3, false));
    assert_eq!(status(&mut bench, 3), Some(Status::Ok));
    bench.attach_with(4, 3, &attach(4, false));
    assert_eq!(status(&mut bench, 4), Some(Status::Held), "a guest's client does not yield");
}

#[test]
fn every_page_of_every_map_is_taken_over_before_the_view_is_answered() {
    let mut bench = Bench::of_size(true, TWO_PAGES);
    bench.prepare();
    bench.syncing();
    let asked = bench.take_sent(Kind::PullMap);
    let pages: Vec<_> = asked.iter().map(|ask| (ask.slot.0, ask.offset)).collect();
    assert_eq!(pages, [(0, 0), (0, 1), (1, 0), (1, 1)], "by member and page");
    for (answered, ask) in asked.iter().enumerate() {
        bench.durable();
        bench.durable();
        assert_eq!(bench.answer(Kind::SetViewReply), None, "after {answered} of 4 pages");
        // The source has on record that both miss a chunk of the second page.
        let mut bits = [0; crate::map::MAP_PAGE_BYTES];
        bits[0] = if ask.offset == 1 { 0b1000 } else { 0 };
        bench.apply(Event::PeerMessage(&ask.reply(Kind::PullMapReply, Status::Ok), &bits));
    }
    bench.durable();
    bench.durable();
    assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
    let far = Chunk(crate::map::MAP_PAGE_BITS + 3);
    for stale in [0, 1] {
        let map = bench.replica.maps().dirty_chunks(member(stale)).expect("it misses something");
        assert!(map.contains(far), "member {stale}: {:?}", map.iter().collect::<Vec<_>>());
    }
}

#[test]
fn a_write_across_the_border_of_two_map_pages_waits_for_the_pages_on_both_sides() {
    let border = crate::map::MAP_PAGE_BITS * CHUNK;
    for last in 0..4 {
        let mut bench = Bench::of_size(true, TWO_PAGES);
        bench.attach(1, 1);
        bench.durable();
        bench.set_view(1, 1, 1, &[]);
        bench.durable();
        bench.durable();
        let write = |bench: &mut Bench, slot: u16, offset, length| {
            let header = MessageHeader {
                slot: Slot(slot),
                sequence: Sequence(u64::from(slot) + 1),
                offset,
                length,
                payload: length,
                missing: MemberSet::only(member(1)),
                ..bench.header(Kind::Write, 1)
            };
            bench.message(1, header, &[]);
        };
        let is_started = |bench: &Bench, slot: u32| {
            let operation = DiskOperation::Write(BufferToken(slot));
            bench.outputs.iter().any(|o| matches!(o, Output::Disk { operation: o, .. } if *o == operation))
        };
        // One on each side: the intent and the dirty bit of each chunk are on their way to disk.
        write(&mut bench, 0, border - CHUNK, 4096);
        write(&mut bench, 1, border + CHUNK - 4096, 4096);
        // All bits of this one are set already, and none is durable.
        write(&mut bench, 2, border - 4096, 8192);
        let mut tickets = bench.take_tickets();
        assert_eq!(tickets.len(), 4, "{tickets:?}");
        let slowest = tickets.remove(last);
        for (ticket, _) in tickets {
            bench.apply(Event::Durable(ticket, Ok(())));
        }
        assert!(!is_started(&bench, 2), "{:?} is not durable", slowest.1);
        bench.apply(Event::Durable(slowest.0, Ok(())));
        assert!((0..3).all(|slot| is_started(&bench, slot)));
    }
}

#[test]
fn zeroes_of_a_pull_become_holes_by_the_run_and_are_reported_after_a_flush() {
    let mut bench = Bench::new(false);
    let finish_flush = |bench: &mut Bench| {
        let flush = bench.take_flush().expect("a flush");
        bench.apply(Event::Disk(flush, DiskResult::Done));
    };
    bench.attach_as(1, 1, true);
    bench.durable();
    finish_flush(&mut bench);
    let spec = bench.replica.spec().clone();
    let body = crate::wire::Prepare { source: member(2), address: Address::tcp("node", 3), spec }.encode();
    bench.message(1, bench.header(Kind::Prepare, 1), &body);
    bench.apply(Event::PeerUp);
    bench.syncing();
    bench.hand_over();
    bench.replica.apply(Event::Tick, Time(0) + Duration::from_secs(1));
    bench.collect();
    let pulls = bench.take_sent(Kind::Pull);
    let [pull] = pulls[..] else { panic!("{pulls:?}") };
    let found = (0..16).map(|block| (block, block != 5)).collect::<Vec<_>>();
    let body = crate::wire::PullReply::encode(found.into_iter());
    bench.apply(Event::PeerMessage(&pull.reply(Kind::PullReply, Status::Ok), &body));
    let zeroes = |o: &Output| match o {
        Output::Disk { io, operation: DiskOperation::ZeroPulled, offset, length } => {
            Some((*io, *offset, *length))
        }
        _ => None,
    };
    let holes: Vec<_> = bench.outputs.iter().filter_map(zeroes).collect();
    let ranges: Vec<_> = holes.iter().map(|(_, offset, length)| (*offset, *length)).collect();
    assert_eq!(ranges, [(0, 5 * 4096), (6 * 4096, 10 * 4096)]);
    let data = |o: &Output| if let Output::WritePulled { io, .. } = o { Some(*io) } else { None };
    let data = bench.outputs.iter().find_map(data).expect("block 5 is written");
    for io in holes.iter().map(|(io, ..)| *io).chain([data]) {
        assert_eq!((bench.take_flush(), bench.answer(Kind::ChunksDone)), (None, None));
        bench.apply(Event::Disk(io, DiskResult::Done));
    }
    bench.durable();
    bench.replica.apply(Event::Tick, Time(0) + Duration::from_secs(2));
    bench.collect();
    assert_eq!(bench.answer(Kind::ChunksDone), None, "a hole may come back with a power cut");
    finish_flush(&mut bench);
    assert_eq!(bench.answer(Kind::ChunksDone), Some(Status::Ok));
}

#[test]
fn a_member_knows_for_how_long_its_client_has_had_the_pool() {
    let mut bench = Bench::new(true);
    let client = ClientId::from_bytes([1; 16]);
    let description = "test".into();
    let attach =
        Attach { client, takeover: false, rejoin: false, yields: false, description, held_ms: 90_000 };
    bench.attach_with(1, 1, &attach);
    bench.durable();
    let held = bench.replica.status().holder.map(|holder| holder.held);
    assert_eq!(held, Some(Duration::from_secs(90)));
}

#[test]
fn a_prepare_is_answered_when_a_map_page_came_from_the_source_and_the_state_is_durable() {
    let prepare = |bench: &mut Bench| {
        bench.attach_as(1, 1, true);
        bench.durable();
        let spec = bench.replica.spec().clone();
        let body =
            crate::wire::Prepare { source: member(2), address: Address::tcp("node", 3), spec }.encode();
        bench.message(1, bench.header(Kind::Prepare, 1), &body);
        bench.apply(Event::PeerUp);
        bench.take_sent(Kind::PullMap).pop().expect("a page of a map")
    };
    let page = [0; crate::map::MAP_PAGE_BYTES];
    let mut bench = Bench::new(true);
    let ask = prepare(&mut bench);
    bench.durable();
    assert_eq!(bench.answer(Kind::PrepareReply), None, "the source has not answered");
    bench.replica.apply(Event::Tick, Time(70_000_000));
    bench
        .replica
        .apply(Event::PeerMessage(&ask.reply(Kind::PullMapReply, Status::Ok), &page), Time(70_000_000));
    bench.collect();
    let took = bench.outputs.iter().find_map(|o| match o {
        Output::Send(_, h, _) if h.kind == Kind::PrepareReply => Some((h.status, h.length)),
        _ => None,
    });
    assert_eq!(took, Some((Status::Ok, 70_000)), "in microseconds");
    let mut bench = Bench::new(true);
    let ask = prepare(&mut bench);
    bench.apply(Event::PeerMessage(&ask.reply(Kind::PullMapReply, Status::Ok), &page));
    assert_eq!(bench.answer(Kind::PrepareReply), None, "the state is not durable");
    bench.durable();
    assert_eq!(bench.answer(Kind::PrepareReply), Some(Status::Ok));
    let mut bench = Bench::new(true);
    let ask = prepare(&mut bench);
    bench.apply(Event::PeerMessage(&ask.reply(Kind::PullMapReply, Status::NotAttached), &[]));
    assert_eq!(bench.answer(Kind::PrepareReply), Some(Status::IoError));
}
