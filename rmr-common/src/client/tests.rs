//! Unit tests of the machine; the simulator tests it together with replicas.

use super::*;
use crate::pool::{BootId, ChunkSize, CommandReply, MemberSpec, MemberState, StoreId, ViewStep};
use crate::wire::{DirtyAddition, Kind, Limits, SetView, SlotEntry, Status};

const SECOND: u64 = 1_000_000_000;

pub(super) fn member(index: u8) -> MemberId {
    MemberId::new(index).unwrap()
}

/// A client with nodes that answer whatever is no request of the guest by themselves, and well.
pub(super) struct Bench {
    pub(super) client: Client,
    pub(super) now: Time,
    pub(super) spec: PoolSpec,
    /// By node, as the others.
    pub(super) specs: Vec<PoolSpec>,
    /// What a node says of room for a larger pool; `None` for no answer.
    pub(super) room: Vec<Option<Status>>,
    pub(super) replies: Vec<CommandReply>,
    pub(super) views: Vec<View>,
    pub(super) epochs: Vec<Epoch>,
    pub(super) host_boots: Vec<u8>,
    pub(super) write_through: bool,
    pub(super) up: Vec<bool>,
    /// Nodes to which connections take until [`Bench::connect`].
    pub(super) slow: Vec<usize>,
    connecting: Vec<LinkId>,
    /// Nodes that refuse an attach, because another client is there.
    pub(super) held: Vec<usize>,
    /// Whether nodes answer an attach.
    admits: bool,
    /// Whether they take a view.
    pub(super) adopts: bool,
    /// Whether they answer a prepare.
    prepares: bool,
    /// What they tell of their slot tables.
    slots: Vec<Vec<SlotEntry>>,
    /// And of the watermark that they know.
    known: Vec<Sequence>,
    /// The watermark of the last message that each was sent.
    watermarks: Vec<Sequence>,
    /// Requests that were sent and not answered, by member.
    pub(super) sent: Vec<(MemberId, MessageHeader)>,
    /// The node that each link leads to.
    pub(super) nodes: Vec<usize>,
    /// What came with views.
    pub(super) additions: Vec<DirtyAddition>,
    pub(super) done: Vec<(Token, Result<(), IoError>)>,
}

impl Bench {
    pub(super) fn new(members: u8, configure: impl FnOnce(&mut Config)) -> Self {
        let line = |i: u8| MemberSpec {
            id: member(i),
            store: StoreId::from_bytes([i + 1; 16]),
            address: Address::tcp("node", 1 + u16::from(i)),
            maintenance: false,
        };
        let spec = PoolSpec {
            id: PoolId::from_bytes([9; 16]),
            name: "p".into(),
            size: 16 << 20,
            chunk_size: ChunkSize::from_bytes(64 << 10).unwrap(),
            logical_block_size: 512,
            members: (0..members).map(line).collect(),
        };
        let view = View::initial(spec.members.iter().map(|m| (m.id, m.store)));
        let mut config = Config::new(ClientId::from_bytes([1; 16]), "test");
        config.attach_grace = Duration::ZERO;
        configure(&mut config);
        let seeds: Vec<_> = spec.members.iter().map(|m| m.address.clone()).collect();
        let count = usize::from(members);
        let client = Client::new(config, PoolSelector::Id(spec.id), &seeds, Time(SECOND));
        let mut bench = Self {
            client,
            now: Time(SECOND),
            specs: vec![spec.clone(); count],
            room: vec![Some(Status::Ok); count],
            replies: Vec::new(),
            spec,
            views: vec![view; count],
            epochs: vec![Epoch(0); count],
            host_boots: vec![1; count],
            write_through: true,
            up: vec![true; count],
            slow: Vec::new(),
            connecting: Vec::new(),
            admits: true,
            adopts: true,
            prepares: true,
            slots: vec![Vec::new(); count],
            known: vec![Sequence(0); count],
            watermarks: vec![Sequence(0); count],
            sent: Vec::new(),
            nodes: Vec::new(),
            held: Vec::new(),
            additions: Vec::new(),
            done: Vec::new(),
        };
        bench.run();
        assert!(bench.client.is_active());
        bench
    }

    /// Connections that take long come to an end.
    pub(super) fn connect(&mut self) {
        for link in std::mem::take(&mut self.connecting) {
            let is_up = self.up[self.nodes[usize::from(link.0)]];
            let event =
                if is_up { Event::LinkUp(link, Nonce([1; 32])) } else { Event::LinkDown(link, "timed out") };
            self.client.apply(event, self.now);
            self.run();
        }
    }

    /// Another client, with the nodes as they are.
    pub(super) fn start_client(&mut self, configure: impl FnOnce(&mut Config)) {
        let mut config = Config::new(ClientId::from_bytes([2; 16]), "another test");
        config.attach_grace = Duration::ZERO;
        configure(&mut config);
        let seeds: Vec<_> = self.spec.members.iter().map(|m| m.address.clone()).collect();
        self.client = Client::new(config, PoolSelector::Id(self.spec.id), &seeds, self.now);
        self.sent.clear();
        self.nodes.clear();
        self.connecting.clear();
        self.run();
    }

    /// Carries out what the client wants until it waits for something that the test has to do.
    pub(super) fn run(&mut self) {
        while let Some(output) = self.client.take_output() {
            match output {
                Output::Connect(link, address) => {
                    let node = usize::from(address.port() - 1);
                    let is_up = self.up.get(node).copied().unwrap_or(false);
                    if self.nodes.len() <= usize::from(link.0) {
                        self.nodes.resize(usize::from(link.0) + 1, 0);
                    }
                    self.nodes[usize::from(link.0)] = node;
                    if self.slow.contains(&node) {
                        self.connecting.push(link);
                        continue;
                    }
                    let event = if is_up {
                        Event::LinkUp(link, Nonce([1; 32]))
                    } else {
                        Event::LinkDown(link, "down")
                    };
                    self.client.apply(event, self.now);
                }
                Output::Send(link, header, payload) => self.deliver(link, &header, payload),
                Output::Complete(token, result) => self.done.push((token, result)),
                Output::CommandDone(_, reply) => self.replies.push(reply),
                Output::Disconnect(_) | Output::Notice(_) | Output::Unbounce(_) => {}
            }
        }
    }

    fn deliver(&mut self, link: LinkId, header: &MessageHeader, payload: Payload) {
        let node = self.nodes[usize::from(link.0)];
        let of_node = self.of_node(node);
        self.watermarks[node] = header.watermark;
        let body = if let Payload::Body(body) = payload { body } else { Vec::new() };
        let (kind, body) = match header.kind {
            Kind::Hello => {
                let reply = HelloReply {
                    version: 1,
                    capabilities: 0,
                    limits: Limits { max_io: 1 << 20, slots: 64, max_bytes: 8 << 20 },
                    member: of_node,
                    write_through: self.write_through,
                    host_boot: BootId::from_bytes([self.host_boots[node]; 16]),
                    process_boot: BootId::from_bytes([1; 16]),
                    spec: self.specs[node].clone(),
                    view: self.views[node].clone(),
                    epoch: self.epochs[node],
                };
                (Kind::HelloReply, reply.encode())
            }
            Kind::Attach if !self.admits => return,
            Kind::Attach if self.held.contains(&node) => {
                let reply = header.reply(Kind::AttachReply, Status::Held);
                let reply = MessageHeader { epoch: self.epochs[node], ..reply };
                return self.client.apply(Event::Message(link, &reply, b"another"), self.now);
            }
            Kind::Attach => {
                self.epochs[node] = header.epoch;
                let reply = AttachReply {
                    view: self.views[node].clone(),
                    spec: self.specs[node].clone(),
                    last_client: None,
                    clean_detach: false,
                    slots: self.slots[node].clone(),
                    watermark: self.known[node],
                    tables_lost: false,
                    intents: Vec::new(),
                };
                (Kind::AttachReply, reply.encode())
            }
            Kind::SetView if !self.adopts => return,
            Kind::SetView => {
                let set = SetView::decode(&body).unwrap();
                self.epochs[node] = set.view.epoch;
                if self.views.iter().all(|v| v.order() < set.view.order()) {
                    self.additions.extend(set.additions);
                }
                self.views[node] = set.view;
                self.specs[node] = set.spec;
                (Kind::SetViewReply, Vec::new())
            }
            Kind::Prepare if !self.prepares => return,
            Kind::Prepare => (Kind::PrepareReply, Vec::new()),
            Kind::Ping => (Kind::Pong, Vec::new()),
            Kind::Grow => {
                let Some(status) = self.room[node] else { return };
                let reply = header.reply(Kind::GrowReply, status);
                return self.client.apply(Event::Message(link, &reply, &[]), self.now);
            }
            _ => return self.sent.push((of_node, *header)),
        };
        let mut reply = header.reply(kind, Status::Ok);
        reply.payload = u32::try_from(body.len()).unwrap();
        self.client.apply(Event::Message(link, &reply, &body), self.now);
    }

    /// The member that a node has the store of.
    fn of_node(&self, node: usize) -> MemberId {
        let store = StoreId::from_bytes([u8::try_from(node).unwrap() + 1; 16]);
        self.specs[node].members.iter().find(|m| m.store == store).unwrap().id
    }

    /// A further node, with an empty store for this member.
    pub(super) fn add_node(&mut self, id: u8) -> (StoreId, Address) {
        let number = u8::try_from(self.specs.len()).unwrap();
        let store = StoreId::from_bytes([number + 1; 16]);
        let address = Address::tcp("node", 1 + u16::from(number));
        let mut spec = self.specs[0].clone();
        spec.members.retain(|m| m.id != member(id));
        spec.members.push(MemberSpec::new(member(id), store, address.clone()));
        spec.members.sort_by_key(|m| m.id);
        self.views.push(View::unjoined(spec.members.iter().map(|m| (m.id, m.store)), member(id)));
        self.specs.push(spec);
        self.room.push(Some(Status::Ok));
        self.epochs.push(Epoch(0));
        self.host_boots.push(1);
        self.up.push(true);
        self.slots.push(Vec::new());
        self.known.push(Sequence(0));
        self.watermarks.push(Sequence(0));
        (store, address)
    }

    pub(super) fn command(&mut self, command: crate::pool::Command) {
        self.client.command(CommandToken(1), command, self.now);
        self.run();
    }

    pub(super) fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        while self.now < end {
            self.now = self.now + Duration::from_millis(100);
            self.client.apply(Event::Tick, self.now);
            self.run();
        }
    }

    pub(super) fn submit(&mut self, token: u64, operation: Operation, offset: u64, length: u64) {
        self.client.submit(Token(token), operation, offset, length, self.now);
        self.run();
    }

    /// Answers the oldest request that a member, or any, was sent. Returns who that was.
    pub(super) fn answer(&mut self, who: Option<MemberId>, status: Status) -> MemberId {
        let at = self.sent.iter().position(|(m, _)| who.is_none_or(|who| *m == who)).expect("a request");
        let (member, header) = self.sent.remove(at);
        let kind = if header.kind == Kind::Flush { Kind::FlushReply } else { Kind::IoReply };
        let mut reply = header.reply(kind, status);
        if header.kind == Kind::Read && status == Status::Ok {
            reply.payload = header.length;
        }
        self.client.apply(Event::Message(LinkId(member.as_u8()), &reply, &[]), self.now);
        self.run();
        member
    }

    /// Answers all requests well, until no more come.
    pub(super) fn answer_all(&mut self) {
        while !self.sent.is_empty() {
            self.answer(None, Status::Ok);
        }
    }

    pub(super) fn state(&self, member: MemberId) -> Option<MemberState> {
        self.client.view.as_ref().and_then(|v| v.state(member))
    }

    fn excluded(&self, member: MemberId) -> Option<String> {
        self.client.status().legs.into_iter().find(|l| l.member == member).and_then(|l| l.excluded)
    }

    /// A read that its home leg fails and another one serves. Returns the home leg.
    fn fail_read(&mut self, token: u64, offset: u64) -> MemberId {
        self.submit(token, Operation::Read, offset, 512);
        let bad = self.answer(None, Status::IoError);
        self.answer_all();
        bad
    }

    /// Tells the client that a Syncing member has everything.
    pub(super) fn synced(&mut self, member: MemberId) {
        let list = crate::wire::ChunkList { member, blocks_left: 0, chunks: Vec::new() };
        let body = list.encode();
        let header = MessageHeader {
            epoch: self.client.epoch,
            payload: u32::try_from(body.len()).unwrap(),
            ..MessageHeader::new(Kind::ChunksDone, self.spec.id)
        };
        self.client.apply(Event::Message(LinkId(member.as_u8()), &header, &body), self.now);
        self.run();
        self.sent.retain(|(_, h)| h.kind != Kind::ClearDirty);
    }
}

/// A write to the block with this index, as a slot table has it.
fn written(sequence: u64, block: u64) -> SlotEntry {
    let slot = Slot(5);
    SlotEntry { slot, sequence: Sequence(sequence), offset: block * 4096, length: 4096, failed: false }
}

impl Bench {
    /// The node is gone, or there again.
    fn set_up(&mut self, node: u8, is_up: bool) {
        self.up[usize::from(node)] = is_up;
        if !is_up {
            self.client.apply(Event::LinkDown(LinkId(node), "gone"), self.now);
        }
        self.run();
    }

    fn attach_anew(&mut self) {
        self.client.apply(Event::Cancel, self.now);
        self.pass(Duration::from_millis(500));
        assert!(self.client.is_active());
    }
}

#[test]
fn what_a_member_has_of_an_earlier_attachment_is_looked_at_again_after_a_rejoin_that_broke_off() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    // Another attachment, of which the member has heard nothing. Nobody else knows of a write that it has.
    bench.attach_anew();
    bench.slots[1] = vec![written(7, 3)];
    bench.additions.clear();
    bench.prepares = false;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.epochs[1], bench.client.epoch, "it has the epoch");
    assert!(bench.views[1].epoch < bench.client.epoch, "and no view of it");
    bench.set_up(1, false);
    bench.prepares = true;
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(5));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 3 * 4096, length: 4096 };
    assert_eq!(bench.additions, [missed]);
}

#[test]
fn a_client_that_waits_for_a_member_finds_out_that_another_one_took_it_out() {
    let mut bench = Bench::new(2, |_| ());
    bench.up[1] = false;
    bench.start_client(|_| ());
    bench.pass(Duration::from_secs(3));
    assert!(!bench.client.is_active(), "member 1 is Clean, and may know of more");
    // Somebody who reached both goes on without member 1, whose disk is then replaced.
    let next = bench.views[0].step(ViewStep::Lose(MemberSet::only(member(1))), bench.epochs[0].next());
    bench.views[0] = next.unwrap();
    bench.epochs[0] = bench.epochs[0].next();
    bench.pass(Duration::from_secs(3));
    assert!(bench.client.is_active());
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
}

#[test]
fn sequences_go_on_above_those_that_a_member_brings_back() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    bench.attach_anew();
    bench.slots[1] = vec![written(700, 3)];
    bench.set_up(1, true);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    bench.submit(1, Operation::Write, 0, 4096);
    assert!(bench.sent[0].1.sequence > Sequence(700), "{:?}", bench.sent[0].1.sequence);
}

#[test]
fn sequences_of_a_forced_attachment_go_on_above_those_that_the_member_remembers() {
    let mut bench = Bench::new(2, |_| {});
    bench.slots[0] = vec![written(500, 0)];
    let force = Force { member: member(0), decided: std::time::UNIX_EPOCH };
    bench.start_client(|c| c.force_from = Some(force));
    bench.submit(1, Operation::Write, 0, 4096);
    assert!(bench.sent[0].1.sequence > Sequence(500), "{:?}", bench.sent[0].1.sequence);
}

#[test]
fn a_write_that_was_given_up_holds_the_watermark_until_members_were_made_to_agree() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Write, 0, 4096);
    bench.admits = false;
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(1));
    assert_eq!(bench.done, [(Token(1), Err(IoError::Cancelled))]);
    assert_eq!((bench.client.status().state, &bench.watermarks), ("attaching", &vec![Sequence(0); 2]));
    bench.admits = true;
    bench.sent.clear();
    bench.attach_anew();
    bench.submit(2, Operation::Write, 0, 4096);
    bench.answer_all();
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.watermarks, vec![bench.client.sequence; 2]);
}

#[test]
fn a_write_is_not_waiting_for_a_member_that_was_lost_and_then_removed() {
    let mut bench = Bench::new(3, |_| {});
    bench.submit(1, Operation::Write, 0, 4096);
    bench.submit(2, Operation::Flush, 0, 0);
    bench.set_up(1, false);
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
    bench.command(crate::pool::Command::Remove { member: member(1), store: None });
    bench.pass(Duration::from_millis(300));
    assert_eq!(bench.state(member(1)), None, "it is removed, with the write in flight to the others");
    assert!(bench.done.is_empty());
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(())), (Token(2), Ok(()))]);
}

/// Both members were attached to by a client that died; these are their slot tables.
fn after_a_death(slots: [Vec<SlotEntry>; 2]) -> Bench {
    let mut bench = Bench::new(2, |_| {});
    bench.slots = slots.to_vec();
    bench.additions.clear();
    bench.attach_anew();
    bench
}

#[test]
fn what_a_member_brought_back_counts_until_the_view_of_its_rejoin_is_committed() {
    let mut bench = Bench::new(2, |_| {});
    bench.set_up(1, false);
    bench.attach_anew();
    bench.set_up(1, true);
    let before = (bench.views[0].clone(), bench.specs[0].clone());
    assert_eq!(before.0.state(member(1)), Some(MemberState::Out));
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(member(1)), Some(MemberState::Syncing));
    // As if the view had reached the Syncing member alone, which has a write of an earlier client, and has that on record.
    (bench.views[0], bench.specs[0]) = before;
    bench.slots = vec![vec![written(900, 6)], vec![written(7, 3), written(900, 6)]];
    bench.known[0] = Sequence(1000);
    bench.additions.clear();
    bench.attach_anew();
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 3 * 4096, length: 4096 };
    assert!(bench.additions.contains(&missed), "{:?}", bench.additions);
}

#[test]
fn after_a_death_in_a_view_change_only_those_stay_clean_that_heard_of_the_loss() {
    let mut bench = Bench::new(3, |_| {});
    let lost = MemberSet::only(member(2));
    // What member 2 had not flushed was told to member 1, and then the client died.
    bench.set_up(2, false);
    bench.views[0] = View { number: ViewNumber(bench.views[0].number.0 - 1), ..bench.views[0].clone() };
    bench.views[0].members[2].state = MemberState::Clean;
    bench.prepares = false;
    bench.start_client(|_| {});
    assert!(bench.client.is_active());
    let view = bench.client.view.clone().unwrap();
    assert_eq!(view.state(member(1)), Some(MemberState::Clean));
    assert_eq!(
        view.state(member(0)),
        Some(MemberState::Out),
        "{view}: it does not know what member 2 misses"
    );
    assert!(!bench.additions.iter().any(|a| a.members.contains(member(0)) && a.length > 4096));

    // When nobody is left who was told, member 2 may miss anything.
    let mut bench = Bench::new(3, |_| {});
    bench.set_up(2, false);
    bench.views[0] = View { number: ViewNumber(bench.views[0].number.0 - 1), ..bench.views[0].clone() };
    bench.views[0].members[2].state = MemberState::Clean;
    // Member 0 is ahead, so that member 1 is brought in line with it.
    bench.slots[0] = vec![written(900, 6)];
    bench.prepares = false;
    bench.additions.clear();
    bench.start_client(|_| {});
    let view = bench.client.view.clone().unwrap();
    assert_eq!(
        (view.state(member(0)), view.state(member(1))),
        (Some(MemberState::Clean), Some(MemberState::Out))
    );
    let all = DirtyAddition { members: lost, offset: 0, length: bench.specs[0].size };
    assert!(bench.additions.contains(&all), "{:?}", bench.additions);
}

#[test]
fn a_member_whose_disk_failed_a_write_is_not_the_reference_when_another_one_carried_it_out() {
    let failed = SlotEntry { failed: true, ..written(7, 3) };
    let later = written(8, 4);
    for (torn, tables) in [
        (0, [vec![failed], vec![written(7, 3)]]),
        (1, [vec![written(7, 3)], vec![failed]]),
        // The newer write counts for nothing.
        (0, [vec![failed, later], vec![written(7, 3)]]),
        // Nor does it help that the other one has nothing.
        (0, [vec![failed], vec![]]),
    ] {
        let bench = after_a_death(tables);
        let missed = DirtyAddition { members: MemberSet::only(member(torn)), offset: 3 * 4096, length: 4096 };
        assert!(bench.additions.contains(&missed), "{torn}: {:?}", bench.additions);
        assert!(bench.additions.iter().all(|a| a.members == missed.members), "{:?}", bench.additions);
        assert_eq!(bench.state(member(1 - torn)), Some(MemberState::Clean));
    }
}

#[test]
fn a_write_that_the_disks_of_two_members_failed_is_not_taken_for_the_same() {
    let failed = SlotEntry { failed: true, ..written(7, 3) };
    let mut bench = after_a_death([vec![failed], vec![failed]]);
    let missed = DirtyAddition { members: MemberSet::only(member(1)), offset: 3 * 4096, length: 4096 };
    // It comes with the first view, and once more with the rejoin.
    bench.additions.dedup();
    assert_eq!(bench.additions, [missed]);
}

#[test]
fn a_client_whose_attach_was_cut_short_by_another_gives_that_one_time_to_come_through() {
    let mut bench = Bench::new(2, |_| {});
    bench.admits = false;
    bench.restart_all(&[1, 1]);
    assert_eq!(bench.client.status().state, "attaching");
    // The nodes took another client in meanwhile.
    bench.admits = true;
    bench.epochs = vec![bench.client.epoch.next(); 2];
    bench.restart_all(&[1, 1]);
    assert!(!bench.client.is_active(), "it displaces the other one at once");
    bench.pass(bench.client.config.leg_timeout);
    assert!(bench.client.is_active(), "the other one is gone, and it waits for ever");
}

#[test]
fn a_client_that_is_told_that_another_attached_ends_and_leaves_no_view_in_its_way() {
    let told = |bench: &mut Bench, epoch| {
        let pool = PoolId::from_bytes([9; 16]);
        let header = MessageHeader { epoch, ..MessageHeader::new(Kind::Goodbye, pool) };
        let header = header.reply(Kind::Goodbye, Status::StaleEpoch);
        bench.client.apply(Event::Message(LinkId(0), &header, &[]), bench.now);
        bench.run();
    };
    let mut bench = Bench::new(2, |_| {});
    let (epoch, views) = (bench.client.epoch, bench.client.counters.views);
    told(&mut bench, epoch.next());
    assert_eq!(bench.client.over(), Some(&OverReason::Fenced(epoch.next())));
    assert_eq!(bench.client.counters.views, views);
    assert!(bench.additions.is_empty(), "{:?}", bench.additions);
    // Of an attachment before its own it is no news, and the member is lost like any that closes the connection.
    let mut bench = Bench::new(2, |_| {});
    told(&mut bench, epoch);
    assert_eq!((bench.client.over(), bench.state(member(0))), (None, Some(MemberState::Out)));
}

#[test]
fn a_range_that_one_leg_cannot_read_is_on_record_as_missed_by_it_and_it_comes_back() {
    let mut bench = Bench::new(2, |_| {});
    let bad = bench.fail_read(1, 5 * 4096 + 512);
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert_eq!(bench.state(bad), Some(MemberState::Out));
    let missed = DirtyAddition { members: MemberSet::only(bad), offset: 5 * 4096, length: 4096 };
    assert_eq!(bench.additions, [missed], "exactly the block");
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(bad), Some(MemberState::Syncing));
    bench.synced(bad);
    assert_eq!(bench.state(bad), Some(MemberState::Clean));
}

#[test]
fn read_errors_that_come_together_are_one_view_change() {
    let mut bench = Bench::new(2, |_| {});
    let before = bench.client.counters.views;
    (0..8).for_each(|i| bench.submit(i, Operation::Read, i * 512, 512));
    let bad = bench.sent[0].0;
    (0..8).for_each(|_| _ = bench.answer(Some(bad), Status::IoError));
    bench.answer_all();
    assert_eq!((bench.done.len(), bench.client.counters.views), (8, before + 1));
    assert_eq!(bench.state(bad), Some(MemberState::Out));
}

#[test]
fn a_leg_does_not_leave_for_a_read_error_before_all_that_it_was_sent_is_answered() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Read, 0, 512);
    let bad = bench.sent[0].0;
    bench.submit(2, Operation::Write, 1 << 20, 4096);
    let other = member(1 - bad.as_u8());
    bench.answer(Some(bad), Status::IoError);
    bench.answer(Some(other), Status::Ok);
    bench.answer(Some(other), Status::Ok);
    assert_eq!(bench.state(bad), Some(MemberState::Clean), "it has the guest's memory still");
    bench.answer(Some(bad), Status::Ok);
    assert_eq!(bench.state(bad), Some(MemberState::Out));
    assert_eq!(bench.additions.len(), 1, "the write is not missed: {:?}", bench.additions);
}

#[test]
fn what_no_leg_can_read_is_an_error_to_the_guest_and_costs_no_leg() {
    let mut bench = Bench::new(2, |_| {});
    bench.submit(1, Operation::Read, 0, 512);
    bench.answer(None, Status::IoError);
    bench.answer(None, Status::IoError);
    assert_eq!(bench.done, [(Token(1), Err(IoError::Media))]);
    bench.pass(Duration::from_secs(1));
    assert_eq!([bench.state(member(0)), bench.state(member(1))], [Some(MemberState::Clean); 2]);
}

#[test]
fn a_read_that_lost_its_leg_goes_to_it_again_when_it_is_the_clean_one_that_is_left() {
    for fails_first in [false, true] {
        let mut bench = Bench::new(2, |_| {});
        bench.submit(1, Operation::Read, 0, 4096);
        let home = bench.answer(None, Status::Ok);
        bench.submit(2, Operation::Write, 0, 4096);
        bench.submit(3, Operation::Read, 0, 4096);
        // Stands in line behind the first write, and is not sent before the read is lost.
        bench.submit(4, Operation::Write, 0, 4096);
        if fails_first {
            let at = bench.sent.iter().position(|(_, h)| h.kind == Kind::Read).unwrap();
            bench.sent.swap(0, at);
            bench.answer(None, Status::IoError);
        }
        let other = 1 - home.as_u8();
        bench.set_up(home.as_u8(), false);
        bench.sent.retain(|(m, _)| *m != home);
        assert_eq!(bench.state(home), Some(MemberState::Out));
        bench.set_up(home.as_u8(), true);
        bench.pass(Duration::from_secs(2));
        bench.answer(Some(member(other)), Status::Ok);
        bench.pass(Duration::from_secs(2));
        bench.synced(home);
        assert_eq!(bench.state(home), Some(MemberState::Clean));
        bench.set_up(other, false);
        bench.sent.retain(|(m, _)| *m == home);
        bench.answer_all();
        bench.done.sort_by_key(|(token, _)| token.0);
        assert_eq!(bench.done, [1, 2, 3, 4].map(|t| (Token(t), Ok(()))), "{fails_first}");
    }
}

#[test]
fn a_leg_that_fails_reads_too_often_is_left_out_until_the_next_attachment() {
    let mut bench = Bench::new(2, |c| c.read_error_limit = 1);
    let bad = bench.fail_read(1, 0);
    bench.pass(Duration::from_secs(2));
    bench.synced(bad);
    assert_eq!(bench.excluded(bad), None);
    assert_eq!(bench.fail_read(2, 0), bad);
    assert!(bench.excluded(bad).unwrap().contains("2 times"));
    bench.pass(Duration::from_secs(30));
    assert_eq!(bench.state(bad), Some(MemberState::Out));
    bench.client.apply(Event::Cancel, bench.now);
    bench.pass(Duration::from_secs(3));
    assert_eq!(bench.state(bad), Some(MemberState::Syncing), "a new attachment takes it in again");
}

#[test]
fn a_syncing_member_whose_source_fails_is_told_another_one() {
    let mut bench = Bench::new(3, |_| {});
    let bad = bench.fail_read(1, 0);
    bench.pass(Duration::from_secs(2));
    assert_eq!(bench.state(bad), Some(MemberState::Syncing));
    let source = |bench: &Bench| bench.client.source_of(bad).unwrap();
    let mut named = vec![source(&bench)];
    for _ in 0..2 {
        let header = MessageHeader {
            epoch: bench.client.epoch,
            slot: crate::pool::Slot(source(&bench).as_u8().into()),
            ..MessageHeader::new(Kind::SourceFailed, bench.spec.id)
        };
        bench.client.apply(Event::Message(LinkId(bad.as_u8()), &header, &[]), bench.now);
        bench.run();
        named.push(source(&bench));
    }
    assert!(named[0] != named[1] && named[0] == named[2], "{named:?}");
}

impl Bench {
    /// All machines go, and come back as these runs.
    fn restart_all(&mut self, host_boots: &[u8]) {
        self.host_boots = host_boots.to_vec();
        self.sent.clear();
        for link in 0..u8::try_from(host_boots.len()).unwrap() {
            self.client.apply(Event::LinkDown(LinkId(link), "gone"), self.now);
        }
        self.run();
        self.pass(Duration::from_secs(2));
    }

    /// Two write-back members with a write that completed and was not flushed.
    fn unflushed() -> Self {
        let mut bench = Self::new(2, |_| {});
        bench.write_through = false;
        bench.client.apply(Event::Cancel, bench.now);
        bench.pass(Duration::from_secs(1));
        bench.submit(1, Operation::Write, 8192, 4096);
        bench.answer_all();
        assert_eq!(bench.done, [(Token(1), Ok(()))]);
        bench.done.clear();
        bench
    }
}

#[test]
fn when_every_machine_lost_unflushed_writes_all_fails_until_that_is_acknowledged() {
    let mut bench = Bench::unflushed();
    bench.restart_all(&[2, 2]);
    assert!(bench.client.is_active() && bench.client.status().lost_writes);
    bench.submit(2, Operation::Flush, 0, 0);
    bench.submit(3, Operation::Read, 0, 512);
    assert_eq!(bench.done, [2, 3].map(|t| (Token(t), Err(IoError::LostWrites))));
    bench.client.acknowledge_loss();
    bench.submit(4, Operation::Read, 0, 512);
    bench.answer_all();
    assert_eq!(bench.done.last(), Some(&(Token(4), Ok(()))));
    bench.restart_all(&[3, 3]);
    assert!(!bench.client.has_lost_writes(), "nothing was unflushed any more");
}

#[test]
fn a_flush_that_was_under_way_when_every_machine_went_fails() {
    let mut bench = Bench::unflushed();
    bench.submit(2, Operation::Flush, 0, 0);
    bench.restart_all(&[2, 2]);
    assert_eq!(bench.done, [(Token(2), Err(IoError::LostWrites))]);
}

#[test]
fn processes_that_are_started_anew_on_machines_that_run_on_have_lost_nothing() {
    let mut bench = Bench::unflushed();
    bench.restart_all(&[1, 1]);
    assert!(!bench.client.has_lost_writes());
    bench.submit(2, Operation::Flush, 0, 0);
    bench.answer_all();
    assert_eq!(bench.done, [(Token(2), Ok(()))]);
}

#[test]
fn a_machine_that_lost_unflushed_writes_is_stale_for_them_when_another_kept_them() {
    let mut bench = Bench::unflushed();
    bench.restart_all(&[2, 1]);
    assert!(!bench.client.has_lost_writes());
    let missed = DirtyAddition { members: MemberSet::only(member(0)), offset: 8192, length: 4096 };
    assert!(bench.additions.contains(&missed), "{:?}", bench.additions);
    assert_ne!(bench.state(member(0)), Some(MemberState::Clean));
    assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
}

#[test]
fn what_was_flushed_is_not_lost_with_the_machines() {
    let mut bench = Bench::unflushed();
    bench.submit(2, Operation::Flush, 0, 0);
    bench.answer_all();
    bench.restart_all(&[2, 2]);
    assert!(!bench.client.has_lost_writes());
}

#[test]
fn a_write_that_one_leg_got_with_other_data_is_repeated_on_all_from_a_copy_under_another_sequence() {
    let mut bench = Bench::new(2, |c| c.data_digest = DataDigest::Detect);
    bench.submit(1, Operation::Write, 0, 4096);
    let first = bench.sent[0].1.sequence;
    bench.answer(Some(member(0)), Status::Ok);
    bench.answer(Some(member(1)), Status::DigestDiffers);
    assert!(bench.done.is_empty(), "one leg has not got it");
    let sent: Vec<_> = bench.sent.iter().map(|(m, h)| (*m, h.kind, h.slot, h.sequence > first)).collect();
    let slot = crate::pool::Slot(0);
    assert_eq!(sent, [0, 1].map(|m| (member(m), Kind::Write, slot, true)));
    assert!(bench.client.is_bounced(slot));
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert!(!bench.client.is_bounced(slot));
    let counters = bench.client.status().counters;
    assert_eq!((counters.digest_mismatches, counters.bounced), (1, 1));
}

#[test]
fn a_copy_that_arrives_with_another_digest_costs_its_leg() {
    let mut bench = Bench::new(2, |c| c.data_digest = DataDigest::Bounce);
    bench.submit(1, Operation::Write, 0, 4096);
    bench.answer(Some(member(0)), Status::Ok);
    bench.answer(Some(member(1)), Status::DigestDiffers);
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert_eq!(bench.state(member(1)), Some(MemberState::Out));
}

#[test]
fn a_read_with_another_digest_is_asked_for_once_more_before_it_counts_against_its_leg() {
    let mut bench = Bench::new(2, |c| c.data_digest = DataDigest::Detect);
    bench.submit(1, Operation::Read, 0, 4096);
    let home = bench.answer(None, Status::DigestDiffers);
    assert_eq!((bench.sent.len(), bench.sent[0].0), (1, home), "the guest may have written there");
    bench.answer(Some(home), Status::DigestDiffers);
    assert_ne!(bench.sent[0].0, home);
    bench.answer_all();
    assert_eq!(bench.done, [(Token(1), Ok(()))]);
    assert_eq!(bench.state(home), Some(MemberState::Out));
}
