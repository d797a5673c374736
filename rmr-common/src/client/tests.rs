//! Unit tests of the machine; the simulator tests it together with replicas.

use super::*;
use crate::pool::{
    Attested, BootId, ChunkSize, Command, CommandReply, Mark, MemberSpec, MemberState, Position, StoreId,
    TransportKind, ViewStep,
};
use crate::wire::{Attach, DirtyAddition, Kind, Limits, SetView, SlotEntry, Status, decode_attested};

mod auth;
mod bindings;
mod change;
mod digests;
mod history;
mod memory;
mod reads;
mod sessions;
mod sick;
mod unflushed;

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
    /// The nodes whose disks failed a flush.
    pub(super) flush_failed: Vec<bool>,
    pub(super) write_through: bool,
    pub(super) up: Vec<bool>,
    /// Nodes to which connections take until [`Bench::connect`].
    pub(super) slow: Vec<usize>,
    connecting: Vec<LinkId>,
    /// The binding over which they do.
    slow_binding: Option<TransportKind>,
    /// What was sent over which binding.
    kinds: Vec<(TransportKind, Kind)>,
    /// Nodes that refuse an attach, because another client is there.
    pub(super) held: Vec<usize>,
    /// Whether nodes answer an attach.
    admits: bool,
    /// Whether they take a view.
    pub(super) adopts: bool,
    /// Whether they answer a prepare.
    prepares: bool,
    /// How long they say that the rehearsal of a view took.
    rehearsal: Duration,
    /// Nodes that answer everything but views.
    deaf: Vec<usize>,
    /// Nodes that answer an attach with this.
    refusing: Vec<(usize, Status)>,
    /// What the client said of members that are not current, last.
    conditions: Vec<crate::pool::Condition>,
    /// Rejoins that began.
    rejoins: Vec<(MemberId, Time)>,
    /// What they tell of their slot tables.
    slots: Vec<Vec<SlotEntry>>,
    /// The intents that each tells with an attach: the first chunk of a range, and how many.
    pub(super) intents: Vec<Vec<(crate::pool::Chunk, u64)>>,
    /// And of the watermark that they know.
    known: Vec<Sequence>,
    /// The watermark of the last message that each was sent.
    watermarks: Vec<Sequence>,
    /// Requests that were sent and not answered, by member.
    pub(super) sent: Vec<(MemberId, MessageHeader)>,
    /// The node that each link leads to.
    pub(super) nodes: Vec<usize>,
    /// For how long the client has had the pool, as it told with each attach.
    held_ms: Vec<u64>,
    /// What came with views.
    pub(super) additions: Vec<DirtyAddition>,
    pub(super) done: Vec<(Token, Result<(), IoError>)>,
    /// How far each store has come beyond its view, and what it remembers of the others.
    pub(super) marks: Vec<Mark>,
    pub(super) attested: Vec<Attested>,
    /// Whether the last client left it in good order.
    pub(super) clean: Vec<bool>,
    /// Whether nodes answer marks.
    pub(super) marks_answered: bool,
    /// Those that were not.
    pub(super) marks_held: Vec<(LinkId, MessageHeader, Vec<u8>)>,
    pub(super) notices: Vec<Notice>,
    /// Nobody is at this address any more.
    pub(super) gone: Option<Address>,
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
            flush_failed: vec![false; count],
            write_through: true,
            up: vec![true; count],
            slow: Vec::new(),
            connecting: Vec::new(),
            slow_binding: None,
            kinds: Vec::new(),
            admits: true,
            adopts: true,
            prepares: true,
            rehearsal: Duration::from_millis(1),
            deaf: Vec::new(),
            refusing: Vec::new(),
            conditions: Vec::new(),
            rejoins: Vec::new(),
            slots: vec![Vec::new(); count],
            intents: vec![Vec::new(); count],
            known: vec![Sequence(0); count],
            watermarks: vec![Sequence(0); count],
            sent: Vec::new(),
            nodes: Vec::new(),
            held: Vec::new(),
            held_ms: Vec::new(),
            additions: Vec::new(),
            done: Vec::new(),
            marks: vec![Mark(0); count],
            attested: vec![Attested::default(); count],
            clean: vec![false; count],
            marks_answered: true,
            marks_held: Vec::new(),
            notices: Vec::new(),
            gone: None,
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
        let seeds: Vec<_> = self.spec.members.iter().map(|m| m.address.clone()).collect();
        self.start_client_at(&seeds, configure);
    }

    /// The same, with nodes that are asked at these addresses.
    fn start_client_at(&mut self, seeds: &[Address], configure: impl FnOnce(&mut Config)) {
        let mut config = Config::new(ClientId::from_bytes([2; 16]), "another test");
        config.attach_grace = Duration::ZERO;
        configure(&mut config);
        self.client = Client::new(config, PoolSelector::Id(self.spec.id), seeds, self.now);
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
                    let is_up =
                        self.up.get(node).copied().unwrap_or(false) && self.gone.as_ref() != Some(&address);
                    if self.nodes.len() <= usize::from(link.0) {
                        self.nodes.resize(usize::from(link.0) + 1, 0);
                    }
                    self.nodes[usize::from(link.0)] = node;
                    if self.slow.contains(&node) || self.slow_binding == Some(address.transport()) {
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
                Output::Notice(notice) => self.notices.push(notice),
                Output::Disconnect(_) | Output::Unbounce(_) => {}
            }
        }
    }

    fn deliver(&mut self, link: LinkId, header: &MessageHeader, payload: Payload) {
        let node = self.nodes[usize::from(link.0)];
        let of_node = self.of_node(node);
        self.kinds.push((self.client.links[usize::from(link.0)].address.transport(), header.kind));
        self.watermarks[node] = header.watermark;
        let body = if let Payload::Body(body) = payload { body } else { Vec::new() };
        // At another host stands a copy of the node.
        let host = self.client.links[usize::from(link.0)].address.host().to_owned();
        let process = if host == "node" { 1 } else { u8::try_from(host.len()).unwrap() };
        let (kind, body) = match header.kind {
            Kind::Hello => {
                let reply = HelloReply {
                    version: crate::wire::PROTOCOL_VERSION,
                    capabilities: 0,
                    limits: Limits { max_io: 1 << 20, slots: 64, max_bytes: 8 << 20 },
                    member: of_node,
                    write_through: self.write_through,
                    host_boot: BootId::from_bytes([self.host_boots[node]; 16]),
                    process_boot: BootId::from_bytes([process; 16]),
                    spec: self.specs[node].clone(),
                    view: self.views[node].clone(),
                    epoch: self.epochs[node],
                    position: self.position(node),
                    attested: self.attested[node],
                    clean_detach: self.clean[node],
                };
                (Kind::HelloReply, reply.encode())
            }
            Kind::Attach if !self.admits => return,
            Kind::Attach if self.held.contains(&node) => {
                let reply = header.reply(Kind::AttachReply, Status::Held);
                let reply = MessageHeader { epoch: self.epochs[node], ..reply };
                return self.client.apply(Event::Message(link, &reply, b"another"), self.now);
            }
            Kind::Attach if self.refusing.iter().any(|(n, _)| *n == node) => {
                let status = self.refusing.iter().find(|(n, _)| *n == node).unwrap().1;
                let reply = header.reply(Kind::AttachReply, status);
                return self.client.apply(Event::Message(link, &reply, b"no"), self.now);
            }
            Kind::Attach => {
                let position = self.position(node);
                self.held_ms.push(Attach::decode(&body).unwrap().held_ms);
                if Attach::decode(&body).unwrap().rejoin {
                    self.rejoins.push((of_node, self.now));
                }
                self.epochs[node] = header.epoch;
                let reply = AttachReply {
                    view: self.views[node].clone(),
                    spec: self.specs[node].clone(),
                    last_client: None,
                    clean_detach: std::mem::take(&mut self.clean[node]),
                    slots: self.slots[node].clone(),
                    watermark: self.known[node],
                    tables_lost: false,
                    intents: self.intents[node].clone(),
                    position,
                    attested: self.attested[node],
                    flush_failed: self.flush_failed[node],
                };
                (Kind::AttachReply, reply.encode())
            }
            Kind::SetView if !self.adopts || self.deaf.contains(&node) => return,
            Kind::Conditions => {
                self.conditions = crate::wire::Conditions::decode(&body).unwrap().0;
                return;
            }
            Kind::SetView => {
                let set = SetView::decode(&body).unwrap();
                self.epochs[node] = set.view.epoch;
                if self.views.iter().all(|v| v.order() < set.view.order()) {
                    self.additions.extend(set.additions);
                }
                if set.view.epoch > self.views[node].epoch {
                    self.marks[node] = Mark(0);
                }
                self.attested[node] = set.attested;
                self.views[node] = set.view;
                self.specs[node] = set.spec;
                (Kind::SetViewReply, Vec::new())
            }
            Kind::Prepare if !self.prepares => return,
            Kind::Prepare => {
                let mut reply = header.reply(Kind::PrepareReply, Status::Ok);
                reply.length = u32::try_from(self.rehearsal.as_micros()).unwrap();
                return self.client.apply(Event::Message(link, &reply, &[]), self.now);
            }
            Kind::Mark if !self.marks_answered => return self.marks_held.push((link, *header, body)),
            Kind::Mark => {
                self.marks[node] = Mark(header.sequence.0);
                self.attested[node] = decode_attested(Kind::Mark, &body).unwrap();
                (Kind::MarkReply, Vec::new())
            }
            Kind::Detach => {
                self.attested[node] = decode_attested(Kind::Detach, &body).unwrap();
                self.clean[node] = true;
                (Kind::DetachReply, Vec::new())
            }
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

    /// Marks are answered again, and those that were not are now.
    pub(super) fn answer_marks(&mut self) {
        self.marks_answered = true;
        for (link, header, body) in std::mem::take(&mut self.marks_held) {
            self.deliver(link, &header, Payload::Body(body));
        }
        self.run();
    }

    /// What this node has not got was never on its disk: nobody was told of it.
    pub(super) fn never_had_more(&mut self, node: usize) {
        let member = self.of_node(node);
        self.marks[node] = Mark(0);
        self.attested.iter_mut().for_each(|a| a.forget(member));
        self.client.history.attested.forget(member);
    }

    /// How far a node's store has come.
    pub(super) fn position(&self, node: usize) -> Position {
        Position::new(self.epochs[node], &self.views[node], self.marks[node])
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
        self.flush_failed.push(false);
        self.up.push(true);
        self.slots.push(Vec::new());
        self.intents.push(Vec::new());
        self.known.push(Sequence(0));
        self.watermarks.push(Sequence(0));
        self.marks.push(Mark(0));
        self.attested.push(Attested::default());
        self.clean.push(false);
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
        let leg = self.client.legs[member.index()].unwrap_or(LinkId(member.as_u8()));
        self.client.apply(Event::Message(leg, &reply, &[]), self.now);
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

    fn attach_anew(&mut self) {
        self.client.apply(Event::Cancel, self.now);
        self.pass(Duration::from_millis(500));
        assert!(self.client.is_active());
    }
}
