//! Unit tests of failed flushes: what one covered is gone, and nothing that follows says otherwise.

use super::tests::{Bench, all_at, mark, member};
use super::*;
use crate::pool::{MemberSet, MemberState, Slot, ViewStep};
use crate::wire::{Attach, AttachReply, Kind, SetView, Status};

const CHUNK: u64 = 64 << 10;

impl Bench {
    /// A write-back member with a client attached under a view of its own.
    fn in_service() -> Self {
        let mut bench = Self::new(false);
        bench.attach(1, 1);
        bench.durable();
        bench.end_flush(DiskResult::Done);
        bench.first_view(1, 1);
        bench
    }

    /// The first view of an attachment, with nobody lost.
    fn first_view(&mut self, connection: u32, epoch: u64) {
        let step = ViewStep::Attach(MemberSet::EMPTY);
        let view = self.replica.view().step(step, Epoch(epoch)).unwrap();
        let header = MessageHeader { view: view.number, ..self.header(Kind::SetView, epoch) };
        let set = SetView {
            view,
            spec: self.replica.spec().clone(),
            additions: Vec::new(),
            more: false,
            attested: Attested::default(),
        };
        self.message(connection, header, &set.encode());
        self.durable();
        self.durable();
        assert_eq!(self.answer(Kind::SetViewReply), Some(Status::Ok));
        self.outputs.clear();
    }

    fn write_chunk(&mut self, sequence: u64, chunk: u64) {
        let slot = u16::try_from(sequence % 8).unwrap();
        let header = MessageHeader {
            slot: Slot(slot),
            sequence: Sequence(sequence),
            offset: chunk * CHUNK,
            length: 4096,
            payload: 4096,
            missing: self.replica.view().out(),
            ..self.header(Kind::Write, 1)
        };
        self.message(1, header, &[]);
        self.durable();
        let is_write = |o: &Output| matches!(o, Output::Disk { operation: DiskOperation::Write(_), .. });
        let at = self.outputs.iter().position(is_write).expect("a write");
        let Output::Disk { io, .. } = self.outputs.remove(at) else { return };
        self.apply(Event::Disk(io, DiskResult::Done));
        assert_eq!(self.answer(Kind::IoReply), Some(Status::Ok));
    }

    fn end_flush(&mut self, result: DiskResult) {
        let io = self.take_flush().expect("a flush");
        self.apply(Event::Disk(io, result));
    }

    /// All writes up to this one are complete everywhere and covered by a mark, and time goes by.
    fn idle(&mut self, watermark: u64, seconds: u64) {
        let next = self.replica.history.mark.0 + 1;
        mark(self, next, watermark, &Attested::default());
        let known = all_at(self, next);
        mark(self, next + 1, watermark, &known);
        self.durable();
        let ping = MessageHeader { watermark: Sequence(watermark), ..self.header(Kind::Ping, 1) };
        self.message(1, ping, &[]);
        self.replica.apply(Event::Tick, Time(0) + Duration::from_secs(seconds));
        self.apply(Event::Tick);
    }

    fn client_flush(&mut self, connection: u32, sequence: u64) {
        let header = MessageHeader { sequence: Sequence(sequence), ..self.header(Kind::Flush, 1) };
        self.message(connection, header, &[]);
    }

    fn is_closed(&self, connection: u32) -> bool {
        let is_close = |o: &Output| matches!(o, Output::Close(c, _) if c.0 == connection);
        self.outputs.iter().any(is_close)
    }

    /// Another client attaches, and its flush succeeds.
    fn next_client(&mut self, connection: u32, epoch: u64) -> AttachReply {
        self.start_attach(connection, epoch);
        self.end_flush(DiskResult::Done);
        assert_eq!(self.answer(Kind::AttachReply), Some(Status::Ok));
        self.attach_reply()
    }

    fn start_attach(&mut self, connection: u32, epoch: u64) {
        let client = ClientId::from_bytes([2; 16]);
        let description = "next".into();
        let attach =
            Attach { client, takeover: false, rejoin: false, yields: false, description, held_ms: 0 };
        self.message(connection, self.header(Kind::Attach, epoch), &attach.encode());
        self.durable();
    }

    /// The process is started again from what is durable.
    fn restart(&mut self) {
        let mut maps = MemberMaps::new(self.replica.spec());
        for chunk in self.replica.maps().intent().iter() {
            maps.set_intent(chunk.0 * CHUNK, 1, &mut Vec::new());
        }
        let state = self.replica.durable_state.clone();
        self.replica = Replica::new(self.replica.config.clone(), member(0), state, maps);
        self.outputs.clear();
    }
}

fn assert_doubted(reply: &AttachReply, chunks: &[u64]) {
    assert!(reply.tables_lost && reply.flush_failed && !reply.clean_detach, "{reply:?}");
    let covers = |c: &u64| reply.intents.iter().any(|(first, count)| (first.0..first.0 + count).contains(c));
    assert!(chunks.iter().all(covers), "{chunks:?} in {:?}", reply.intents);
}

#[test]
fn a_failed_flush_of_its_own_costs_the_member_its_session_and_its_table() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 3);
    bench.idle(5, 10);
    bench.outputs.retain(|o| !matches!(o, Output::Send(..)));
    bench.end_flush(DiskResult::Failed);
    assert!(bench.is_closed(1), "the client records what was not flushed as missed");
    let told =
        bench.outputs.iter().position(|o| matches!(o, Output::Send(_, h, _) if h.kind == Kind::Goodbye));
    let closed = bench.outputs.iter().position(|o| matches!(o, Output::Close(..)));
    assert!(told.is_some() && told < closed, "it is told why before the connection is closed");
    assert_eq!(bench.answer(Kind::Goodbye), Some(Status::IoError));
    // Whatever the client had sent before it knew.
    bench.client_flush(1, 6);
    assert_eq!((bench.take_flush(), bench.answer(Kind::FlushReply)), (None, Some(Status::NotAttached)));
    bench.idle(5, 20);
    assert_eq!(bench.take_flush(), None, "the flush is not repeated");
    assert_eq!(bench.replica.maps().intent().iter().collect::<Vec<_>>(), vec![Chunk(3)]);
    bench.durable();
    assert_doubted(&bench.next_client(2, 2), &[3]);
}

#[test]
fn a_failed_flush_of_the_client_is_answered_and_ends_the_session() {
    for result in [DiskResult::Failed, DiskResult::NoSpace] {
        let mut bench = Bench::in_service();
        bench.write_chunk(5, 3);
        bench.client_flush(1, 6);
        bench.end_flush(result);
        assert_ne!(bench.answer(Kind::FlushReply), Some(Status::Ok));
        assert!(bench.is_closed(1));
        bench.durable();
        assert_doubted(&bench.next_client(2, 2), &[3]);
    }
}

#[test]
fn a_flush_that_failed_in_an_attach_is_not_believed_by_the_next_attach() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 0);
    bench.apply(Event::Closed(ConnectionId(1)));
    bench.start_attach(2, 2);
    bench.end_flush(DiskResult::Failed);
    assert_eq!(bench.answer(Kind::AttachReply), Some(Status::IoError));
    assert!(bench.is_closed(2));
    bench.durable();
    for epoch in 3..6 {
        let reply = bench.next_client(u32::try_from(epoch).unwrap(), epoch);
        assert_doubted(&reply, &[0]);
    }
    // Nor is it after the process was restarted.
    bench.restart();
    assert_doubted(&bench.next_client(7, 7), &[0]);
}

#[test]
fn intents_are_not_cleared_by_a_flush_that_follows_a_failed_one_while_the_next_client_attaches() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 0);
    let ping = MessageHeader { watermark: Sequence(5), ..bench.header(Kind::Ping, 1) };
    bench.message(1, ping, &[]);
    bench.client_flush(1, 6);
    bench.end_flush(DiskResult::Failed);
    // The attach is not durable yet, and the watermark of the client before covers the write.
    let client = ClientId::from_bytes([2; 16]);
    let description = "next".into();
    let attach = Attach { client, takeover: false, rejoin: false, yields: false, description, held_ms: 0 };
    bench.message(2, bench.header(Kind::Attach, 2), &attach.encode());
    bench.replica.apply(Event::Tick, Time(0) + Duration::from_secs(30));
    bench.apply(Event::Tick);
    assert_eq!(bench.take_flush(), None);
    bench.durable();
    bench.end_flush(DiskResult::Done);
    assert_doubted(&bench.attach_reply(), &[0]);
}

#[test]
fn a_failed_flush_is_told_until_a_view_of_a_later_session_is_committed_and_no_longer() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 0);
    bench.client_flush(1, 6);
    bench.end_flush(DiskResult::Failed);
    bench.durable();
    assert!(bench.replica.durable_state.flush_failed, "on record for the next process");
    bench.next_client(2, 2);
    bench.first_view(2, 2);
    assert!(bench.replica.flush_failed(), "the view may not be committed");
    bench.message(2, bench.header(Kind::Ping, 2), &[]);
    bench.durable();
    assert!(!bench.replica.flush_failed() && !bench.replica.durable_state.flush_failed);
    bench.apply(Event::Closed(ConnectionId(2)));
    let reply = bench.next_client(3, 3);
    assert!(!reply.flush_failed && !reply.tables_lost);
}

#[test]
fn a_detach_whose_flush_failed_is_not_one_in_good_order() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 2);
    let detach = MessageHeader { watermark: Sequence(5), ..bench.header(Kind::Detach, 1) };
    bench.message(1, detach, &super::tests::nothing_known());
    bench.end_flush(DiskResult::Failed);
    assert_eq!(bench.answer(Kind::DetachReply), Some(Status::IoError));
    bench.durable();
    bench.durable();
    assert!(bench.replica.durable_state.last_client.as_ref().is_some_and(|c| c.attached));
    assert_eq!(bench.replica.maps().intent().count(), 1);
    bench.restart();
    assert_doubted(&bench.next_client(2, 2), &[2]);
}

#[test]
fn a_flush_waits_for_the_one_under_way_and_fails_with_it() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 2);
    bench.idle(5, 10);
    let own = bench.take_flush().expect("a flush");
    for sequence in [6, 7] {
        bench.client_flush(1, sequence);
    }
    assert_eq!(bench.take_flush(), None, "its success could hide the failure of the other");
    bench.apply(Event::Disk(own, DiskResult::Failed));
    let answers: Vec<_> = bench
        .outputs
        .iter()
        .filter_map(|o| match o {
            Output::Send(_, h, _) if h.kind == Kind::FlushReply => Some((h.sequence.0, h.status)),
            _ => None,
        })
        .collect();
    assert_eq!(
        answers,
        [(6, Status::IoError), (7, Status::IoError)],
        "every request fails, not only the first"
    );
    assert_eq!(bench.take_flush(), None);
}

#[test]
fn flushes_that_wait_share_the_next_one() {
    let mut bench = Bench::in_service();
    bench.client_flush(1, 6);
    let first = bench.take_flush().expect("a flush");
    for sequence in [7, 8, 9] {
        bench.client_flush(1, sequence);
    }
    bench.outputs.clear();
    bench.apply(Event::Disk(first, DiskResult::Done));
    let answered = |bench: &Bench| {
        let is_reply = |o: &&Output| matches!(o, Output::Send(_, h, _) if h.kind == Kind::FlushReply);
        bench.outputs.iter().filter(is_reply).count()
    };
    assert_eq!(answered(&bench), 1, "what began before the others is no answer to them");
    bench.end_flush(DiskResult::Done);
    assert_eq!((answered(&bench), bench.take_flush()), (4, None));
}

#[test]
fn a_flush_of_a_client_that_is_gone_counts_when_it_fails() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 2);
    bench.client_flush(1, 6);
    let old = bench.take_flush().expect("a flush");
    // It has lost its connection, and is back before the disk has answered.
    bench.apply(Event::Closed(ConnectionId(1)));
    bench.start_attach(2, 2);
    assert_eq!(bench.take_flush(), None, "requests of the session before end first");
    bench.apply(Event::Disk(old, DiskResult::Failed));
    assert!(!bench.is_closed(2), "it is answered, with what it has to know");
    bench.durable();
    bench.end_flush(DiskResult::Done);
    assert_doubted(&bench.attach_reply(), &[2]);
}

#[test]
fn what_was_pulled_before_a_failed_flush_is_stale_again_and_not_reported() {
    let mut bench = Bench::new(false);
    bench.attach_as(1, 1, true);
    bench.durable();
    bench.end_flush(DiskResult::Done);
    let spec = bench.replica.spec().clone();
    let address = crate::pool::Address::tcp("node", 3);
    let body = crate::wire::Prepare { source: member(2), address, spec };
    bench.message(1, bench.header(Kind::Prepare, 1), &body.encode());
    bench.apply(Event::PeerUp);
    bench.syncing();
    // Chunks 0 and 1 are missed.
    bench.hand_over_chunks(3);
    bench.apply(Event::Tick);
    let pulls = bench.take_sent(Kind::Pull);
    let block = |index: u32| crate::wire::PullReply::encode([(index, false)].into_iter());
    // All of chunk 0, and one block of chunk 1.
    for (pull, length) in pulls.iter().zip([65536, 4096]) {
        let reply = MessageHeader { length, ..pull.reply(Kind::PullReply, Status::Ok) };
        bench.apply(Event::PeerMessage(&reply, &block(0)));
    }
    let writes: Vec<_> = bench
        .outputs
        .iter()
        .filter_map(|o| if let Output::WritePulled { io, .. } = o { Some(*io) } else { None })
        .collect();
    writes.iter().for_each(|io| bench.apply(Event::Disk(*io, DiskResult::Done)));
    let own = |bench: &Bench| bench.replica.maps().missed(member(0));
    assert_eq!(own(&bench).1, 1, "chunk 0 is current");
    bench.replica.apply(Event::Tick, Time(0) + Duration::from_secs(1));
    bench.apply(Event::Tick);
    bench.end_flush(DiskResult::Failed);
    assert_eq!(bench.answer(Kind::ChunksDone), None);
    assert!(bench.is_closed(1));
    let stale = bench.replica.maps().dirty_blocks(member(0)).expect("a map");
    assert!(stale.contains(crate::pool::Block(0)), "of the chunk that was to be reported");
    assert!(stale.contains(crate::pool::Block(16)), "of a chunk that was not finished");
    bench.durable();
    assert_eq!(bench.replica.view().state(member(0)), Some(MemberState::Syncing));
    assert!(
        bench.next_client(2, 2).tables_lost,
        "the next client takes it out, and the source has all on record"
    );
}

#[test]
fn a_member_whose_flush_failed_is_no_source_before_it_has_a_view_of_a_later_session() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 2);
    let pull = |bench: &mut Bench, epoch| {
        bench.outputs.clear();
        let ask = MessageHeader { slot: Slot(1), length: 4096, ..bench.header(Kind::Pull, epoch) };
        bench.message(9, ask, &[]);
        bench.answer(Kind::PullReply)
    };
    assert_eq!(pull(&mut bench, 1), Some(Status::Ok));
    bench.client_flush(1, 6);
    // Of another pull the disk is reading what the other member misses.
    let missed = MemberSet::only(member(1));
    bench.replica.maps.set_dirty(missed, 0, 4096, &mut Vec::new());
    let flush = bench.take_flush().expect("a flush");
    assert_eq!(pull(&mut bench, 1), None);
    let is_read = |o: &Output| matches!(o, Output::Disk { operation: DiskOperation::Read, .. });
    let at = bench.outputs.iter().position(is_read).expect("a read");
    let Output::Disk { io: read, .. } = bench.outputs.remove(at) else { return };
    bench.apply(Event::Disk(flush, DiskResult::Failed));
    bench.durable();
    bench.apply(Event::Disk(read, DiskResult::Done));
    assert_eq!(bench.answer(Kind::PullReply), Some(Status::IoError), "it may be what was there before");
    assert_eq!(pull(&mut bench, 1), Some(Status::NotAttached));
    bench.next_client(2, 2);
    assert_eq!(pull(&mut bench, 2), Some(Status::NotAttached), "it may be on its way out of the view");
    bench.first_view(2, 2);
    assert_eq!(pull(&mut bench, 2), Some(Status::Ok));
}

/// A client that is gone may have left writes in flight. Another one knows nothing of them, and its watermark says nothing.
#[test]
fn intents_of_the_client_before_stay_until_the_next_view_is_committed() {
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 2);
    bench.apply(Event::Closed(ConnectionId(1)));
    bench.next_client(2, 2);
    bench.outputs.clear();
    let tick = |bench: &mut Bench, seconds| {
        bench.replica.apply(Event::Tick, Time(0) + Duration::from_secs(seconds));
        bench.apply(Event::Tick);
    };
    // Its view is on its way. The watermark of its detach covers the old sequence.
    let detach = MessageHeader { watermark: Sequence(90), ..bench.header(Kind::Detach, 2) };
    bench.message(2, detach, &super::tests::nothing_known());
    tick(&mut bench, 10);
    while bench.take_flush().map(|io| bench.apply(Event::Disk(io, DiskResult::Done))).is_some() {
        bench.durable();
    }
    assert_eq!(bench.replica.maps().intent().iter().collect::<Vec<_>>(), vec![Chunk(2)]);
    let mut bench = Bench::in_service();
    bench.write_chunk(5, 2);
    bench.apply(Event::Closed(ConnectionId(1)));
    let reply = bench.next_client(2, 2);
    assert_eq!(reply.intents, vec![(Chunk(2), 1)]);
    assert!(bench.replica.frozen.contains(&Chunk(2)));
    bench.first_view(2, 2);
    bench.message(2, MessageHeader { watermark: Sequence(90), ..bench.header(Kind::Ping, 2) }, &[]);
    assert!(bench.replica.frozen.is_empty());
    tick(&mut bench, 20);
    bench.end_flush(DiskResult::Done);
    assert_eq!(bench.replica.maps().intent().count(), 0, "the attachment has dealt with them");
}

/// What a member misses comes with views. A report that was passed on under an earlier one knows nothing of it.
#[test]
fn a_clear_dirty_of_another_view_or_epoch_or_client_is_not_carried_out() {
    let mut bench = Bench::new(true);
    bench.prepare();
    let states = [MemberState::Clean, MemberState::Syncing, MemberState::Clean];
    let set = |bench: &mut Bench, number| {
        let mut view = bench.replica.view().clone();
        (view.number, view.epoch) = (ViewNumber(number), Epoch(1));
        view.members.iter_mut().zip(states).for_each(|(line, state)| line.state = state);
        let missed = MemberSet::only(member(1));
        let addition = crate::wire::DirtyAddition { members: missed, offset: 0, length: 4096 };
        let header = MessageHeader { view: view.number, ..bench.header(Kind::SetView, 1) };
        let spec = bench.replica.spec().clone();
        let body =
            SetView { view, spec, additions: vec![addition], more: false, attested: Attested::default() }
                .encode();
        bench.message(1, header, &body);
        bench.durable();
        bench.durable();
        assert_eq!(bench.answer(Kind::SetViewReply), Some(Status::Ok));
    };
    set(&mut bench, 7);
    let under_7 = bench.header(Kind::ClearDirty, 1);
    set(&mut bench, 8);
    let under_8 = bench.header(Kind::ClearDirty, 1);
    let list = crate::wire::ChunkList { member: member(1), blocks_left: 0, chunks: vec![Chunk(0)] }.encode();
    let missed = |bench: &Bench| bench.replica.maps().missed(member(1)).0;
    for (connection, header) in [
        (1, under_7),
        (1, MessageHeader { view: ViewNumber(9), ..under_8 }),
        (1, MessageHeader { epoch: Epoch(2), ..under_8 }),
        (2, under_8),
    ] {
        bench.message(connection, header, &list);
        assert_eq!(missed(&bench), 1, "{header:?} on connection {connection}");
    }
    bench.message(1, under_8, &list);
    assert_eq!(missed(&bench), 0);
}
