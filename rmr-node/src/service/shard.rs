//! One I/O thread: an event-manager loop with its connections, its replicas, its disk engine and its buffers.
//!
//! Each wake-up goes the same way: what arrived is taken in, replicas say what to do, disks do it, answers are queued,
//! and at the end every connection with something queued gets one system call.

use std::collections::{HashMap, VecDeque};
use std::io::ErrorKind;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver as Inbox, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use rmr_common::buffer::Segment;
use rmr_common::clock::monotonic_now;
use rmr_common::pool::{Command as PoolCommand, PoolId, StoreId, TransportKind};
use rmr_common::reactor::WatchChange;
use rmr_common::replica::{
    CommandId, ConnectionId, DiskOperation, DiskResult, Event, IoId, Notice, Output, PulledData, ReplyPayload,
};
use rmr_common::time::Time;
use rmr_common::transport::connect::Connector;
use rmr_common::transport::rdma::{Exposure, MIN_WINDOW, Registration};
use rmr_common::transport::{Connection, Counters, Listener};
use rmr_common::wire::{HEADER_SIZE, Hello, Kind, MessageHeader, Status, block_digests};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::command::Answered;
use super::connection::{Greeting, MAX_BACKLOG, Peer, Sink, WriteBuffers};
use super::deletion::{Deletion, Remains, Stage};
use super::member::{IoTag, Member, WaitingRead, buffer_share};
use super::pulls::PULLS_PART;
use super::source_link::SourceLink;
use super::windows::{Lending, RESERVE_PART, Shortage, Windows};
use super::{ConnectionPlace, PoolPlace, Shared};
use crate::admin::Responder;
use crate::admin::api::{ControlError, ErrorCode, PoolStatus, StoreCreated};
use crate::config::EngineChoice;
use crate::disk::{
    self, Buffer, BufferPool, Completion, DiskEngine, DiskId, Engine, EngineOptions, Io, IoKind, MIN_BUFFER,
    Payload,
};
use crate::lifecycle::Shutdown;
use crate::store::{MetadataIo, Store, StoreError};

/// Connections that are accepted in one wake-up, so that a flood of them does not stop I/O.
const ACCEPT_BATCH: usize = 16;
/// Replicas clear intents and connections time out on this beat.
const TICK: Duration = Duration::from_secs(1);
/// A client is dead when it was silent for so many leg timeouts.
const SILENT_LEG_TIMEOUTS: u32 = 3;
/// It is given so long at the least: a client sends a ping each second, however short the leg timeout is.
const SHORTEST_SILENCE: Duration = Duration::from_secs(3);
/// A stop gives disks so long to end what clients left behind that had to be cut off.
const STOP_GRACE: Duration = Duration::from_secs(1);

/// What other threads ask of a shard.
pub(super) enum Command {
    Status(Responder<Vec<PoolStatus>>),
    Adopt(Box<Store>, Responder<StoreCreated>),
    Delete(StoreId, bool, Responder<()>),
    /// An operator's command for a pool.
    Operator(PoolId, PoolCommand, Responder<Answered>),
    /// The work that makes room in a store has ended.
    RoomMade(StoreId, Result<u64, StoreError>),
    Connection(Box<Handover>),
    /// The work that destroys a store has ended.
    Destroyed(StoreId, Result<(), String>),
    /// Clients may come now.
    Listen(Vec<Listener>),
}

/// A connection whose pool is on another shard than the one that accepted it.
pub(super) struct Handover {
    peer: Peer,
    greeting: Greeting,
}

/// How other threads reach a shard.
#[derive(Clone)]
pub(super) struct ShardHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    /// The other end, until the shard's thread takes it.
    inbox: Arc<Mutex<Option<Inbox<Command>>>>,
}

impl ShardHandle {
    pub(super) fn new(_index: usize) -> std::io::Result<Self> {
        let (commands, inbox) = mpsc::channel();
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?);
        Ok(Self { commands, wake, inbox: Arc::new(Mutex::new(Some(inbox))) })
    }

    /// Hands over a command. One for a shard that has ended is dropped, and with it its responder, which answers.
    pub(super) fn send(&self, command: Command) {
        if self.commands.send(command).is_ok() {
            // A counter that is full wakes the thread as well.
            let _ = self.wake.write(1);
        }
    }
}

/// Who waits for memory.
#[derive(Clone, Copy)]
enum Waiter {
    /// The disk reads of a member.
    Reads(usize),
    /// A connection, with data of writes.
    Connection(ConnectionId),
}

/// How a turn of a waiter ended.
enum Turn {
    /// It got something.
    Served,
    /// There is no memory for it.
    NoMemory,
    /// It has its share, and can go on when it gives some of that back.
    HasShare,
    /// It does not wait any more.
    Gone,
}

/// What is on its way to a peer.
enum Sending {
    One(Buffer),
    Several(Vec<Buffer>),
}

impl Sending {
    fn bytes(&self) -> usize {
        match self {
            Self::One(buffer) => buffer.length(),
            Self::Several(buffers) => buffers.iter().map(Buffer::length).sum(),
        }
    }
}

/// A free tag for something that is to be sent.
fn tag_for(free: &mut Vec<u32>, sending: &mut Vec<Option<Sending>>) -> u32 {
    free.pop().unwrap_or_else(|| {
        sending.push(None);
        u32::try_from(sending.len() - 1).unwrap_or(u32::MAX)
    })
}

enum Phase {
    Serving,
    /// A stop was asked for: clients are told, requests end, disks are flushed, stores are marked clean.
    Draining {
        deadline: Time,
        /// The time is over for clients that did not leave.
        closed: bool,
    },
    Marking {
        deadline: Time,
    },
    Done,
}

/// See the module's comment.
pub(super) struct Shard {
    index: usize,
    shared: Arc<Shared>,
    shards: Vec<ShardHandle>,
    inbox: Inbox<Command>,
    listeners: Vec<Listener>,
    /// Listeners of a shard that stops.
    closed_listeners: Vec<Listener>,
    shutdown: Shutdown,
    engine: DiskEngine,
    buffers: BufferPool,
    /// Bytes of buffers that one client may have.
    share: usize,
    writes: WriteBuffers,
    peers: HashMap<ConnectionId, Peer>,
    /// Buffers lent to clients over RDMA.
    windows: HashMap<ConnectionId, Windows>,
    /// The buffers as memory that RDMA devices may use.
    _registrations: Vec<Registration>,
    /// What connections that are over have done.
    counters: Counters,
    by_descriptor: HashMap<RawFd, ConnectionId>,
    next_connection: u32,
    members: Vec<Option<Member>>,
    /// Members whose replica may have something to say.
    active: Vec<usize>,
    /// Connections with something queued.
    queued: Vec<ConnectionId>,
    /// Who waits for memory, first come, first served.
    line: VecDeque<Waiter>,
    /// Somebody in the line found no memory: nobody else may take any before.
    short: bool,
    shortage: Shortage,
    /// Buffers whose data is on its way to a client or another node, by tag.
    sending: Vec<Option<Sending>>,
    free_tags: Vec<u32>,
    /// Stores that are being deleted, or could not be.
    deletions: Vec<Deletion>,
    completions: Vec<Completion>,
    tags: Vec<u32>,
    changes: Vec<WatchChange>,
    closing: Vec<Peer>,
    /// Opens connections to sources of resyncs.
    connector: Connector,
    next_attempt: u64,
    closing_sources: Vec<SourceLink>,
    /// Connections for other shards, once this one does not watch them any more.
    handovers: Vec<(usize, Box<Handover>)>,
    /// Tells an operator's command from others.
    next_command: u64,
    /// Whether the listeners are watched. They are not for a moment when a connection could not be accepted.
    listens: bool,
    phase: Phase,
    /// Stores that a stop could not mark as closed in order.
    unmarked: usize,
    next_tick: Time,
    now: Time,
}

impl Shard {
    /// Runs a shard until the shutdown is requested and done. `opening` is dropped when its stores are open.
    pub(super) fn run(
        index: usize,
        shared: Arc<Shared>,
        shards: Vec<ShardHandle>,
        stores: Vec<Store>,
        opening: Sender<()>,
        shutdown: Shutdown,
    ) -> anyhow::Result<()> {
        let inbox = shards[index].inbox.lock().ok().and_then(|mut inbox| inbox.take());
        let inbox = inbox.ok_or_else(|| anyhow::anyhow!("shard {index} was started twice"))?;
        let choice = match shared.config.engine {
            EngineChoice::Auto => disk::EngineChoice::Auto,
            EngineChoice::Uring => disk::EngineChoice::Uring,
            EngineChoice::Inline => disk::EngineChoice::Inline,
        };
        let mut engine = DiskEngine::new(EngineOptions { choice, ..EngineOptions::default() })?;
        shared.inline[index].store(!engine.has_ring(), Ordering::Relaxed);
        let buffers = BufferPool::new(usize::try_from(shared.config.buffer_memory)?)?;
        engine.register_buffers(&buffers);
        // The pool's mapping stays for the life of the process, so there is nothing to keep.
        let register = |region| shared.fabric.register(region, Arc::new(()), Exposure::Windows);
        let registrations = buffers.regions().into_iter().map(register).collect::<Result<_, _>>()?;
        let (tls, fabric) = (shared.client_tls.clone(), shared.fabric.clone());
        let connector = Connector::new(shared.config.leg_timeout, tls, fabric)?;
        let now = monotonic_now();
        let mut shard = Self {
            index,
            share: buffer_share(&shared),
            shared,
            shards,
            inbox,
            listeners: Vec::new(),
            closed_listeners: Vec::new(),
            shutdown,
            engine,
            buffers,
            writes: WriteBuffers::default(),
            peers: HashMap::new(),
            windows: HashMap::new(),
            _registrations: registrations,
            counters: Counters::default(),
            by_descriptor: HashMap::new(),
            next_connection: 0,
            members: Vec::new(),
            active: Vec::new(),
            queued: Vec::new(),
            line: VecDeque::new(),
            short: false,
            shortage: Shortage::default(),
            sending: Vec::new(),
            free_tags: Vec::new(),
            deletions: Vec::new(),
            completions: Vec::new(),
            tags: Vec::new(),
            changes: Vec::new(),
            closing: Vec::new(),
            connector,
            next_attempt: 0,
            closing_sources: Vec::new(),
            handovers: Vec::new(),
            next_command: 0,
            listens: true,
            phase: Phase::Serving,
            unmarked: 0,
            next_tick: now + TICK,
            now,
        };
        for store in stores {
            let path = store.path().to_owned();
            if let Err(error) = shard.adopt(store) {
                tracing::error!(path = %path.display(), "store left out: {error}");
            }
        }
        drop(opening);
        shard.check_memory();
        shard.serve()
    }

    /// Warns when the least that clients over RDMA are lent is more than what is to be lent.
    fn check_memory(&self) {
        let config = &self.shared.config;
        if !config.listen.iter().any(|address| address.transport() == TransportKind::Rdma) {
            return;
        }
        let least = self.members.iter().flatten().count() * MIN_WINDOW as usize;
        let most = self.buffers.total_bytes() - self.buffers.total_bytes() / RESERVE_PART;
        if least > most {
            tracing::warn!(
                shard = self.index,
                least,
                most,
                "the clients of all pools together need more buffers for writes over RDMA than are lent: raise buffer_memory"
            );
        }
    }

    fn serve(mut self) -> anyhow::Result<()> {
        let fixed = [
            self.shards[self.index].wake.as_raw_fd(),
            self.shutdown.as_raw_fd(),
            self.connector.descriptor(),
        ];
        let fixed = fixed.into_iter().chain(self.engine.fd());
        self.changes.extend(fixed.map(|fd| WatchChange::Add(fd, EventSet::IN)));
        let mut manager = EventManager::<Self>::new().map_err(|e| anyhow::anyhow!("event loop: {e}"))?;
        let id = manager.add_subscriber(self);
        let failed = |e| anyhow::anyhow!("event loop: {e}");
        let mut changes = Vec::new();
        loop {
            let shard = manager.subscriber_mut(id).map_err(failed)?;
            shard.upkeep();
            if matches!(shard.phase, Phase::Done) {
                anyhow::ensure!(
                    shard.unmarked == 0,
                    "shard {}: {} stores are not marked as closed in order",
                    shard.index,
                    shard.unmarked
                );
                return Ok(());
            }
            let resyncs = shard.members.iter().flatten().filter_map(|m| m.replica.deadline());
            let due = resyncs.min().map_or(shard.next_tick, |due| due.min(shard.next_tick));
            let wait = (due - monotonic_now()).as_millis() + 1;
            changes.append(&mut shard.changes);
            let mut ops = manager.event_ops(id).map_err(failed)?;
            let mut refused = Vec::new();
            for change in changes.drain(..) {
                if let Err(error) = change.apply(&mut ops) {
                    refused.push((change, error.to_string()));
                }
            }
            let shard = manager.subscriber_mut(id).map_err(failed)?;
            shard.let_go();
            for (change, error) in refused {
                shard.not_watched(change, &error)?;
            }
            let wait = if shard.changes.is_empty() { wait } else { 0 };
            manager.run_with_timeout(i32::try_from(wait).unwrap_or(i32::MAX)).map_err(failed)?;
        }
    }

    /// The loop refused a change of what is watched. Whoever belongs to the descriptor is lost, and nobody else with it.
    fn not_watched(&mut self, change: WatchChange, error: &str) -> anyhow::Result<()> {
        let descriptor = match change {
            WatchChange::Add(descriptor, _) | WatchChange::Modify(descriptor, _) => descriptor,
            WatchChange::Remove(descriptor) => {
                tracing::warn!(shard = self.index, descriptor, "a descriptor was not watched: {error}");
                return Ok(());
            }
        };
        let reason = format!("its descriptor cannot be watched: {error}");
        if let Some(&id) = self.by_descriptor.get(&descriptor) {
            tracing::error!(shard = self.index, "a connection is closed: {reason}");
            self.lost(id, &reason);
            return Ok(());
        }
        let is_its = |m: &Member| m.source.as_ref().is_some_and(|s| s.descriptor == descriptor);
        if let Some(index) = self.members.iter().position(|m| m.as_ref().is_some_and(is_its)) {
            tracing::error!(shard = self.index, "the connection to a source is closed: {reason}");
            self.source_lost(index, &reason);
            return Ok(());
        }
        let own = [
            self.shards[self.index].wake.as_raw_fd(),
            self.shutdown.as_raw_fd(),
            self.connector.descriptor(),
        ];
        let listeners = self.listeners.iter().map(AsRawFd::as_raw_fd);
        let is_own = own.into_iter().chain(self.engine.fd()).chain(listeners).any(|fd| fd == descriptor);
        // Without one of those the shard is deaf.
        anyhow::ensure!(!is_own, "shard {}: event loop: {error}", self.index);
        tracing::warn!(
            shard = self.index,
            descriptor,
            "a descriptor that is not in use any more was not watched: {error}"
        );
        Ok(())
    }

    /// Lets go of descriptors that the loop does not watch any more.
    fn let_go(&mut self) {
        for peer in self.closing.drain(..) {
            peer.wire.finish(peer.place);
        }
        self.closing_sources.clear();
        // Not before: clients that come now are refused at once, where an answer would never come.
        self.closed_listeners.clear();
        // The other shard may close the connection at once, and its number may then be another file's.
        for (shard, handover) in self.handovers.drain(..) {
            self.shards[shard].send(Command::Connection(handover));
        }
    }

    /// Everything that follows a wake-up.
    fn upkeep(&mut self) {
        self.now = monotonic_now();
        if self.next_tick <= self.now {
            self.next_tick = self.now + TICK;
            self.tick();
        }
        for index in 0..self.members.len() {
            let Some(member) = &mut self.members[index] else { continue };
            if member.replica.deadline().is_some_and(|due| due <= self.now) {
                member.replica.apply(Event::Tick, self.now);
                self.activate(index);
            }
        }
        self.work();
        self.note_shortage();
        self.advance_deletions();
        self.advance_shutdown();
    }

    /// Replicas, disks, sockets and the line for memory, until none has anything to do at once.
    fn work(&mut self) {
        loop {
            self.settle();
            self.send_all();
            let fed = self.feed();
            if !fed && self.active.is_empty() && self.queued.is_empty() {
                return;
            }
        }
    }

    /// Lets replicas and disks work until neither has anything to do at once.
    fn settle(&mut self) {
        loop {
            let mut active = std::mem::take(&mut self.active);
            for index in active.drain(..) {
                if let Some(Some(member)) = self.members.get_mut(index) {
                    member.active = false;
                }
                self.carry_out(index);
            }
            // Empty, unless carrying out one thing led to another.
            active.append(&mut self.active);
            self.active = active;
            self.engine.flush_submissions();
            let mut completions = std::mem::take(&mut self.completions);
            self.engine.completions(&mut completions);
            let idle = completions.is_empty();
            for completion in completions.drain(..) {
                self.disk_done(completion);
            }
            self.completions = completions;
            if idle && self.active.is_empty() {
                return;
            }
        }
    }

    pub(super) fn activate(&mut self, member: usize) {
        if let Some(Some(m)) = self.members.get_mut(member)
            && !std::mem::replace(&mut m.active, true)
        {
            self.active.push(member);
        }
    }

    /// Does what a replica wants done.
    fn carry_out(&mut self, index: usize) {
        loop {
            let Some(Some(member)) = self.members.get_mut(index) else { return };
            let Some(output) = member.replica.take_output() else { break };
            match output {
                Output::Send(connection, header, payload) => self.reply(index, connection, &header, payload),
                Output::Disk { io, operation, offset, length } => {
                    self.start_disk(index, io, operation, offset, length);
                }
                Output::WritePulled { io, pull, from, offset, length } => {
                    let data = member.pulls.part(pull, from, length);
                    self.write_pulled(index, io, data, (offset, length));
                }
                Output::PullDone(pull) => member.pulls.done(pull),
                Output::PeerConnect(address) => self.connect_source(index, &address),
                Output::PeerSend(header) if header.kind == Kind::Pull => member.pulls.ask(header),
                Output::PeerSend(header) => {
                    if let Some(source) = &mut member.source {
                        source.wire.queue(&header, None);
                    }
                }
                Output::PeerClose => self.close_source(index),
                Output::Persist(ticket, metadata) => member.persist(ticket, &metadata, self.now),
                Output::Release(token) => self.writes.release(token),
                Output::Close(connection, reason) => {
                    if let Some(peer) = self.peers.get_mut(&connection) {
                        // Last words, such as that another client attached. What does not go out at once is lost.
                        let _ = peer.wire.flush();
                    }
                    self.close(connection, reason);
                }
                Output::Grow { from, to } => self.make_room(index, from, to),
                Output::CommandDone(id, reply) => self.command_done(index, id, reply),
                Output::Notice(notice) => self.log(index, notice),
            }
        }
        self.send_pulls(index);
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let disk = member.disk;
        let tag = |id| IoTag::Metadata(u16::try_from(index).unwrap_or(u16::MAX), id).encode();
        while let Some(io) = member.next_metadata_io() {
            self.engine.submit(match io {
                MetadataIo::Write { id, offset, page } => Io {
                    disk,
                    id: tag(id),
                    kind: IoKind::Write,
                    offset,
                    length: crate::store::PAGE_SIZE,
                    payload: Payload::Page(page),
                },
                MetadataIo::Flush { id } => Io {
                    disk,
                    id: tag(id),
                    kind: IoKind::Flush,
                    offset: 0,
                    length: 0,
                    payload: Payload::None,
                },
            });
        }
    }

    /// Hands pulled data to the disk, from where it lies.
    fn write_pulled(&mut self, index: usize, io: IoId, data: Option<Payload>, (offset, length): (u64, u32)) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let Some(payload) = data else {
            // What was answered is kept until the replica has dealt with it.
            debug_assert!(false, "pulled data is there while it is written");
            return member.replica.apply(Event::Disk(io, DiskResult::Failed), self.now);
        };
        self.engine.submit(Io {
            disk: member.disk,
            id: IoTag::Replica(u16::try_from(index).unwrap_or(u16::MAX), io).encode(),
            kind: IoKind::Write,
            offset: member.store.superblock().layout.data_offset + offset,
            length: length.into(),
            payload,
        });
    }

    /// Queues the pulls of a member that there is memory for.
    fn send_pulls(&mut self, index: usize) {
        let held: usize = self.members.iter().flatten().map(|m| m.pulls.bytes()).sum();
        let room = (self.buffers.total_bytes() / PULLS_PART).saturating_sub(held);
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let Some(source) = member.source.as_mut().filter(|_| member.pulls.is_waiting()) else { return };
        member.pulls.start(&self.buffers, room, |header, memory| {
            source.wire.queue_read(header, &mut |segments| segments.push(memory));
        });
    }

    fn connect_source(&mut self, index: usize, address: &rmr_common::pool::Address) {
        self.close_source(index);
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        self.next_attempt += 1;
        member.source_attempt = self.next_attempt;
        self.connector.connect(self.next_attempt, address);
    }

    fn close_source(&mut self, index: usize) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        member.source_attempt = 0;
        if let Some(mut source) = member.source.take() {
            source.wire.shut_down();
            self.counters += source.wire.counters();
            self.changes.push(WatchChange::Remove(source.descriptor));
            self.closing_sources.push(source);
        }
        // Not before: until then the source can write to what it was asked to.
        member.pulls.abandon();
    }

    /// Attempts to connect to sources have ended.
    fn sources_connected(&mut self) {
        while let Some((attempt, result)) = self.connector.next() {
            let index =
                self.members.iter().position(|m| m.as_ref().is_some_and(|m| m.source_attempt == attempt));
            let Some((index, member)) = index.and_then(|i| Some((i, self.members[i].as_mut()?))) else {
                continue;
            };
            member.source_attempt = 0;
            let who = format!("node {}, member {}", self.shared.config.node_name, member.replica.member());
            let (pool, keys) = (member.pool(), &self.shared.keys);
            let keys = keys.of(pool, &member.replica.spec().name);
            let link = result.and_then(|wire| SourceLink::new(wire, pool, &keys?, who));
            match link {
                Ok(link) => {
                    self.changes.push(WatchChange::Add(link.descriptor, link.watched));
                    member.source = Some(link);
                }
                Err(error) => member.replica.apply(Event::PeerDown(&error), self.now),
            }
            self.activate(index);
        }
    }

    /// Something arrived from a source, or it can take more. Other descriptors only wake the loop.
    fn source_ready(&mut self, descriptor: RawFd) {
        let is_its = |m: &Member| m.source.as_ref().is_some_and(|s| s.descriptor == descriptor);
        let Some(index) = self.members.iter().position(|m| m.as_ref().is_some_and(is_its)) else { return };
        let Some(member) = self.members[index].as_mut() else { return };
        let Some(mut link) = member.source.take() else { return };
        let received = link.receive(member, self.now);
        member.source = Some(link);
        if let Err(error) = received {
            self.source_lost(index, &error);
        }
        self.activate(index);
    }

    fn source_lost(&mut self, index: usize, reason: &str) {
        self.close_source(index);
        if let Some(Some(member)) = self.members.get_mut(index) {
            member.replica.apply(Event::PeerDown(reason), self.now);
        }
        self.activate(index);
    }

    /// Sends what is queued for sources.
    fn send_to_sources(&mut self) {
        for index in 0..self.members.len() {
            self.send_pulls(index);
            let Some(source) = self.members[index].as_mut().and_then(|m| m.source.as_mut()) else { continue };
            if let Err(error) = source.wire.flush() {
                self.source_lost(index, &error.to_string());
                continue;
            }
            let interest = source.interest();
            if interest != source.watched {
                source.watched = interest;
                self.changes.push(WatchChange::Modify(source.descriptor, interest));
            }
        }
    }

    fn log(&mut self, index: usize, notice: Notice) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let holder = member.replica.holder_connection();
        let address = holder.and_then(|c| self.peers.get(&c)).map(|p| p.address);
        member.log(notice, address);
    }

    fn start_disk(&mut self, index: usize, io: IoId, operation: DiskOperation, offset: u64, length: u32) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let data_offset = member.store.superblock().layout.data_offset;
        let own = u16::try_from(index).unwrap_or(u16::MAX);
        let tag = IoTag::Replica(own, io);
        let (kind, payload) = match operation {
            DiskOperation::Read | DiskOperation::Digest => {
                let digests = operation == DiskOperation::Digest;
                member.waiting_reads.push_back(WaitingRead { io, offset, length, digests });
                // At once, if it is the first and there is no need to stand in line.
                if !member.in_line && (self.short || !matches!(self.feed_reads(index), Turn::Served)) {
                    self.stand_in_line(Waiter::Reads(index));
                }
                return;
            }
            DiskOperation::Write(token) => match self.writes.take(token) {
                Some(data) => (IoKind::Write, data),
                None => (IoKind::Write, Payload::None),
            },
            // Its data is named by `Output::WritePulled`.
            DiskOperation::WritePulled => return,
            DiskOperation::Flush => (IoKind::Flush, Payload::None),
            DiskOperation::Discard => (IoKind::Discard, Payload::None),
            DiskOperation::WriteZeroes => (IoKind::WriteZeroes { unmap: false }, Payload::None),
        };
        self.engine.submit(Io {
            disk: member.disk,
            id: tag.encode(),
            kind,
            offset: data_offset + offset,
            length: length.into(),
            payload,
        });
    }

    fn disk_done(&mut self, completion: Completion) {
        let Completion { id, result, payload, .. } = completion;
        let tag = IoTag::decode(id);
        match tag {
            IoTag::Read(index, io) | IoTag::Digest(index, io) | IoTag::Replica(index, io) => {
                let index = usize::from(index);
                let Some(Some(member)) = self.members.get_mut(index) else { return };
                if let Err(error) = &result {
                    let pool = &member.replica.spec().name;
                    tracing::error!(%pool, member = %member.replica.member(), "disk error: {error}");
                }
                match (tag, payload) {
                    (IoTag::Read(..), Payload::Buffer(buffer)) => {
                        member.reading_bytes -= buffer.length();
                        if result.is_ok() {
                            member.keep_read(io, buffer);
                        }
                    }
                    (IoTag::Digest(..), Payload::Buffer(buffer)) => {
                        member.reading_bytes -= buffer.length();
                        if result.is_ok() {
                            // A few microseconds: a range is short.
                            let digests = block_digests(buffer.bytes());
                            member.replica.apply(Event::Digested(io, &digests), self.now);
                            return self.activate(index);
                        }
                    }
                    _ => {} // What was written; the engine has freed it.
                }
                let result = match result {
                    Ok(()) => DiskResult::Done,
                    Err(error) if error.is_no_space() => DiskResult::NoSpace,
                    Err(_) => DiskResult::Failed,
                };
                member.replica.apply(Event::Disk(io, result), self.now);
                self.activate(index);
            }
            IoTag::Metadata(index, id) => {
                let index = usize::from(index);
                let Some(Some(member)) = self.members.get_mut(index) else { return };
                member.metadata_done(id, result.map_err(|e| e.to_string()), self.now);
                self.activate(index);
            }
        }
    }

    /// Queues an answer on its connection, if that is still there.
    fn reply(&mut self, index: usize, id: ConnectionId, header: &MessageHeader, payload: ReplyPayload) {
        if let ReplyPayload::Pulled(data) = payload {
            return self.reply_pulled(index, id, header, &data);
        }
        let buffer = match &payload {
            ReplyPayload::Data(io) => self.members[index].as_mut().and_then(|m| m.take_read(*io)),
            ReplyPayload::None | ReplyPayload::Body(_) | ReplyPayload::Pulled(_) => None,
        };
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if matches!(header.kind, Kind::IoReply | Kind::FlushReply) {
            peer.requests = peer.requests.saturating_sub(1);
        }
        match (payload, buffer) {
            (ReplyPayload::Body(body), _) => peer.wire.queue(header, Some(body)),
            (_, Some(buffer)) => {
                let segment = buffer.segment();
                let mut header = *header;
                header.digest = header.digest.map(|_| buffer.digest());
                let header = &header;
                let sending = Sending::One(buffer);
                let tag = tag_for(&mut self.free_tags, &mut self.sending);
                peer.sending_bytes += sending.bytes();
                self.sending[tag as usize] = Some(sending);
                peer.wire.queue_data(header, Some(tag), &mut |segments| segments.push(segment));
                peer.sending.push_back(tag);
            }
            (ReplyPayload::None | ReplyPayload::Data(_) | ReplyPayload::Pulled(_), None) => {
                peer.wire.queue(header, None);
            }
        }
        self.queue(id);
    }

    /// Notes that a connection has something to send.
    fn queue(&mut self, id: ConnectionId) {
        if let Some(peer) = self.peers.get_mut(&id)
            && !std::mem::replace(&mut peer.queued, true)
        {
            self.queued.push(id);
        }
    }

    /// Answers a pull with the data of its reads, from where they lie.
    fn reply_pulled(&mut self, index: usize, id: ConnectionId, header: &MessageHeader, data: &PulledData) {
        let Some(member) = self.members[index].as_mut() else { return };
        let buffers: Vec<Buffer> = data.reads.iter().filter_map(|io| member.take_read(*io)).collect();
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let mut header = *header;
        let (mut zeroes, mut full): (Vec<bool>, Vec<Segment>) = (Vec::new(), Vec::new());
        for buffer in &buffers {
            let (memory, first) = (buffer.segment(), zeroes.len());
            zeroes.extend(buffer.zero_blocks());
            let mut at = 0;
            for run in zeroes[first..].chunk_by(PartialEq::eq) {
                let length = run.len() * MIN_BUFFER;
                full.extend((!run[0]).then(|| memory.part(at, length)));
                at += length;
            }
        }
        let most = self.buffers.total_bytes() / PULLS_PART;
        let sending = Sending::Several(buffers);
        if header.status == Status::Ok && zeroes.len() != data.blocks.len() {
            header.status = Status::IoError;
        } else if peer.sending_bytes > 0 && peer.sending_bytes + sending.bytes() > most {
            // A node that does not take its answers keeps no buffers from guests.
            header.status = Status::Limit;
        }
        let body = (header.status == Status::Ok).then(|| data.encode(&zeroes));
        header.payload = body.as_ref().map_or(0, |b| u32::try_from(b.len()).unwrap_or(u32::MAX));
        let mut sent = HEADER_SIZE as u64 + u64::from(header.payload);
        let there: usize = full.iter().map(Segment::length).sum();
        if header.status == Status::Ok && there > 0 {
            let payload = u32::try_from(there).unwrap_or(u32::MAX);
            let data = MessageHeader { kind: Kind::PullData, payload, ..header };
            let tag = tag_for(&mut self.free_tags, &mut self.sending);
            peer.sending_bytes += sending.bytes();
            self.sending[tag as usize] = Some(sending);
            peer.wire.queue_data(&data, Some(tag), &mut |segments| segments.append(&mut full));
            peer.sending.push_back(tag);
            sent += u64::from(payload) + if peer.wire.is_rdma() { 0 } else { HEADER_SIZE as u64 };
        }
        peer.wire.queue(&header, body);
        if let Some(member) = &mut self.members[index] {
            member.resync_sent += sent;
        }
        self.queue(id);
    }

    /// Sends what is queued.
    fn send_all(&mut self) {
        self.send_to_sources();
        let mut queued = std::mem::take(&mut self.queued);
        for id in queued.drain(..) {
            self.send(id);
        }
        self.queued = queued;
    }

    fn send(&mut self, id: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.queued = false;
        if let (Some(rdma), Some(windows)) = (peer.wire.rdma(), self.windows.get_mut(&id)) {
            windows.dealt_with(|mark| rdma.release(mark));
        }
        let sent = peer.wire.flush();
        peer.wire.take_sent(&mut self.tags);
        for tag in self.tags.drain(..) {
            // Data is sent in the order in which it was queued.
            let first = peer.sending.pop_front();
            debug_assert_eq!(first, Some(tag), "tags come back in order");
            peer.sending_bytes -= self.sending[tag as usize].take().map_or(0, |sending| sending.bytes());
            self.free_tags.push(tag);
        }
        match sent {
            Ok(()) => self.watch(id),
            Err(error) => self.lost(id, &error.to_string()),
        }
    }

    /// Sees to it that a connection's descriptor wakes the loop when something can be done, and only then.
    fn watch(&mut self, id: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let set = peer.interest();
        if set != peer.watched {
            peer.watched = set;
            self.changes.push(WatchChange::Modify(peer.descriptor, set));
        }
    }

    fn stand_in_line(&mut self, waiter: Waiter) {
        let stands = match waiter {
            Waiter::Reads(index) => self.members[index].as_mut().map(|m| &mut m.in_line),
            Waiter::Connection(id) => self.peers.get_mut(&id).map(|p| &mut p.in_line),
        };
        if let Some(stands) = stands
            && !std::mem::replace(stands, true)
        {
            self.line.push_back(waiter);
        }
    }

    /// Gives free memory to those who stand in line, each in its turn; true if anybody went on.
    fn feed(&mut self) -> bool {
        let mut fed = false;
        self.short = false;
        for _ in 0..self.line.len() {
            let Some(waiter) = self.line.pop_front() else { break };
            let turn = match waiter {
                Waiter::Reads(index) => self.feed_reads(index),
                Waiter::Connection(id) => self.feed_connection(id),
            };
            match turn {
                Turn::Served => {
                    fed = true;
                    self.line.push_back(waiter);
                }
                Turn::HasShare => self.line.push_back(waiter),
                Turn::NoMemory => {
                    // It stays the first: with one large request among many small ones it would wait for ever.
                    self.short = true;
                    self.line.push_front(waiter);
                    break;
                }
                Turn::Gone => match waiter {
                    Waiter::Reads(index) => {
                        if let Some(Some(member)) = self.members.get_mut(index) {
                            member.in_line = false;
                        }
                    }
                    Waiter::Connection(id) => {
                        if let Some(peer) = self.peers.get_mut(&id) {
                            peer.in_line = false;
                        }
                    }
                },
            }
        }
        fed
    }

    /// Starts the first disk read of a member that waits for a buffer.
    fn feed_reads(&mut self, index: usize) -> Turn {
        let Some(Some(member)) = self.members.get_mut(index) else { return Turn::Gone };
        let Some(&WaitingRead { io, offset, length, digests }) = member.waiting_reads.front() else {
            return Turn::Gone;
        };
        let client = member.replica.holder_connection().and_then(|id| self.peers.get(&id));
        let has = member.reading_bytes + client.map_or(0, |p| p.sending_bytes + p.arriving_bytes);
        if has > 0 && has + length as usize > self.share {
            return Turn::HasShare;
        }
        let Some(buffer) = self.buffers.try_acquire(length as usize) else { return Turn::NoMemory };
        member.waiting_reads.pop_front();
        member.reading_bytes += buffer.length();
        let own = u16::try_from(index).unwrap_or(u16::MAX);
        let tag = if digests { IoTag::Digest(own, io) } else { IoTag::Read(own, io) };
        self.engine.submit(Io {
            disk: member.disk,
            id: tag.encode(),
            kind: IoKind::Read,
            offset: member.store.superblock().layout.data_offset + offset,
            length: length.into(),
            payload: Payload::Buffer(buffer),
        });
        Turn::Served
    }

    /// Lets a connection receive that waits for a buffer.
    fn feed_connection(&mut self, id: ConnectionId) -> Turn {
        if self.peers.get(&id).is_some_and(|p| p.wire.is_rdma()) {
            return self.lend(id);
        }
        if !self.peers.get(&id).is_some_and(|p| p.wire.is_starved()) {
            return Turn::Gone;
        }
        let found = self.take_in(id);
        match self.peers.get(&id) {
            Some(peer) if peer.wire.is_starved() => {
                if found > 0 {
                    Turn::Served
                } else if self.short {
                    Turn::NoMemory
                } else {
                    Turn::HasShare
                }
            }
            _ => Turn::Gone,
        }
    }

    /// Lends a client over RDMA the memory that it waits for.
    fn lend(&mut self, id: ConnectionId) -> Turn {
        let Some(peer) = self.peers.get_mut(&id) else { return Turn::Gone };
        let member = peer.member.and_then(|m| self.members[m].as_ref());
        // As with data over TCP: only who may write gets memory.
        let holds = member.is_some_and(|m| m.replica.holder_connection() == Some(id));
        let Some(rdma) = peer.wire.rdma().filter(|_| holds) else { return Turn::Gone };
        let wanted = rdma.peer_wants();
        if wanted == 0 {
            return Turn::Gone;
        }
        match self.windows.entry(id).or_default().lend(wanted, self.share / 2, &self.buffers) {
            Lending::Lent(window, memory) => {
                if let Err(error) = rdma.grant(window, &memory) {
                    self.lost(id, &error.to_string());
                    return Turn::Gone;
                }
                self.queue(id);
                Turn::Served
            }
            Lending::HasShare => Turn::HasShare,
            Lending::NoMemory => Turn::NoMemory,
        }
    }

    /// What follows when something came over RDMA: memory that was given back, or is wanted, and completions.
    fn rdma_received(&mut self, id: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let stands = peer.in_line;
        let Some(rdma) = peer.wire.rdma() else { return };
        let mut returned = Vec::new();
        rdma.take_returned(&mut returned);
        if let Some(windows) = self.windows.get_mut(&id) {
            returned.into_iter().for_each(|window| windows.take_back(window));
        }
        if peer.wire.backlog() > MAX_BACKLOG {
            // Over TCP it would not be read any more; here it does not keep to what it may have outstanding.
            return self.lost(id, "it asks, and does not take the answers");
        }
        let Some(rdma) = peer.wire.rdma() else { return };
        if rdma.peer_wants() > 0 && !stands && (self.short || !matches!(self.lend(id), Turn::Served)) {
            self.stand_in_line(Waiter::Connection(id));
        }
        self.queue(id);
    }

    fn receive(&mut self, id: ConnectionId) {
        self.take_in(id);
        self.rdma_received(id);
        if self.peers.get(&id).is_some_and(|p| p.wire.is_starved()) {
            self.stand_in_line(Waiter::Connection(id));
        }
    }

    /// Takes in what has arrived; returns how many buffers it was given.
    fn take_in(&mut self, id: ConnectionId) -> usize {
        let Some(peer) = self.peers.get_mut(&id) else { return 0 };
        let (mut greeting, mut proof, mut error, mut found, mut delivered) = (None, None, None, 0, false);
        let mut commands = Vec::new();
        let (index, was_starved) = (peer.member, peer.wire.is_starved());
        let member = index.and_then(|index| self.members[index].as_mut());
        let others = peer.sending_bytes + member.as_ref().map_or(0, |m| m.reading_bytes);
        let mut sink = Sink {
            id,
            member,
            arriving: &mut peer.arriving,
            arriving_bytes: &mut peer.arriving_bytes,
            share: self.share.saturating_sub(others),
            buffers: &self.buffers,
            windows: self.windows.get(&id),
            short: &mut self.short,
            found: &mut found,
            writes: &mut self.writes,
            requests: &mut peer.requests,
            heard: &mut peer.last_heard,
            delivered: &mut delivered,
            greeting: &mut greeting,
            is_challenged: peer.challenged.is_some(),
            proof: &mut proof,
            is_node: peer.is_node,
            commands: &mut commands,
            error: &mut error,
            now: self.now,
        };
        let received = peer.wire.receive(&mut sink);
        if was_starved {
            // It was not read for as long as it waited.
            peer.last_heard = self.now;
        }
        if let Some(index) = index.filter(|_| delivered) {
            self.activate(index);
        }
        match (received, error) {
            (Err(error), _) => self.lost(id, &error.to_string()),
            (Ok(()), Some(reason)) => self.lost(id, reason),
            (Ok(()), None) => {
                self.watch(id);
                if let Some(greeting) = greeting {
                    self.greet(id, greeting);
                }
                if let Some(proof) = proof {
                    self.prove(id, &proof);
                }
                for (header, body) in commands {
                    self.node_command(id, &header, &body);
                }
            }
        }
        found
    }

    /// Finds the pool that a hello asks for, here or on another shard.
    fn greet(&mut self, id: ConnectionId, greeting: Greeting) {
        if !matches!(self.phase, Phase::Serving) {
            let text = format!("node {} is stopping", self.shared.config.node_name);
            return self.refuse(id, &greeting.header, Status::Stopping, text);
        }
        let hello = match Hello::decode(&greeting.body) {
            Ok(hello) => hello,
            Err(error) => return self.lost(id, &error.to_string()),
        };
        let found = self.shared.resolve(greeting.pool, &hello.pool_name);
        match found {
            None => {
                let pool =
                    if hello.pool_name.is_empty() { greeting.pool.to_string() } else { hello.pool_name };
                let text = format!("node {} has no pool '{pool}'", self.shared.config.node_name);
                self.refuse(id, &greeting.header, Status::NoSuchPool, text);
            }
            Some((_, shard)) if shard != self.index => {
                if let Some(peer) = self.peers.remove(&id) {
                    self.by_descriptor.remove(&peer.descriptor);
                    self.changes.push(WatchChange::Remove(peer.descriptor));
                    self.handovers.push((shard, Box::new(Handover { peer, greeting })));
                }
            }
            Some((pool, _)) => self.greet_here(id, &greeting, hello, pool),
        }
    }

    pub(super) fn refuse(&mut self, id: ConnectionId, header: &MessageHeader, status: Status, text: String) {
        if let Some(peer) = self.peers.get(&id) {
            tracing::info!(client = %peer.address, "{text}");
        }
        self.turn_away(id, header, status, text);
    }

    /// Answers a hello with these words, and nothing after them.
    pub(super) fn turn_away(
        &mut self,
        id: ConnectionId,
        header: &MessageHeader,
        status: Status,
        text: String,
    ) {
        if let Some(peer) = self.peers.get_mut(&id) {
            let mut answer = header.reply(Kind::HelloReply, status);
            answer.payload = u32::try_from(text.len()).unwrap_or(0);
            peer.wire.queue(&answer, Some(text.into_bytes()));
            // Sent now; whatever does not go out at once is lost with the connection.
            let _ = peer.wire.flush();
            peer.parts = true;
            self.lost(id, "it was refused");
        }
    }

    fn accept(&mut self, descriptor: RawFd) {
        let Some(listener) = self.listeners.iter_mut().find(|l| l.as_raw_fd() == descriptor) else { return };
        for _ in 0..ACCEPT_BATCH {
            let mut place = None;
            let mut admit = |address| {
                place = ConnectionPlace::take(&self.shared);
                if place.is_none() {
                    let most = self.shared.config.max_connections;
                    tracing::warn!(client = %address, "connection refused: there are {most}, as many as max_connections");
                }
                place.is_some()
            };
            let (wire, address) = match listener.accept(&mut admit) {
                Ok(accepted) => accepted,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => return,
                    ErrorKind::ConnectionRefused => continue,
                    ErrorKind::AddrNotAvailable => {
                        tracing::error!("no clients come over RDMA until the device is back: {error}");
                        return;
                    }
                    // It went away before it was accepted, or is no peer.
                    ErrorKind::ConnectionAborted | ErrorKind::Interrupted => {
                        tracing::warn!("a connection was not accepted: {error}");
                        continue;
                    }
                    _ => {
                        // For want of descriptors or memory as a rule. The listener stays readable all the while.
                        tracing::warn!("cannot accept connections, trying again in a second: {error}");
                        return self.listen(false);
                    }
                },
            };
            let (Some(descriptor), Some(place)) = (wire.descriptor(), place) else { continue };
            let peer = Peer::new(wire, descriptor, address, place, self.now);
            Self::insert(&mut self.next_connection, &mut self.peers, &mut self.by_descriptor, peer);
            self.changes.push(WatchChange::Add(descriptor, EventSet::IN));
        }
    }

    /// Watches the listeners, or leaves them alone for a while.
    fn listen(&mut self, listens: bool) {
        self.listens = listens;
        let set = if listens { EventSet::IN } else { EventSet::empty() };
        self.changes.extend(self.listeners.iter().map(|l| WatchChange::Modify(l.as_raw_fd(), set)));
    }

    fn insert(
        next: &mut u32,
        peers: &mut HashMap<ConnectionId, Peer>,
        by_descriptor: &mut HashMap<RawFd, ConnectionId>,
        peer: Peer,
    ) -> ConnectionId {
        // Numbers come round after four thousand million connections, and some may have lived that long.
        while {
            *next = next.wrapping_add(1);
            peers.contains_key(&ConnectionId(*next))
        } {}
        let id = ConnectionId(*next);
        by_descriptor.insert(peer.descriptor, id);
        peers.insert(id, peer);
        id
    }

    /// A connection ended, or has to.
    fn lost(&mut self, id: ConnectionId, reason: &str) {
        let member = self.peers.get(&id).and_then(|p| p.member);
        self.close(id, reason);
        if let Some(index) = member {
            if let Some(Some(member)) = self.members.get_mut(index) {
                member.replica.apply(Event::Closed(id), self.now);
            }
            self.activate(index);
        }
    }

    /// Closes a connection, without telling its replica.
    fn close(&mut self, id: ConnectionId, reason: &str) {
        let Some(mut peer) = self.peers.remove(&id) else { return };
        tracing::debug!(client = %peer.address, "connection closed: {reason}");
        self.by_descriptor.remove(&peer.descriptor);
        let windows = self.windows.remove(&id);
        // Data that is on its way would go on from buffers that are somebody else's by then.
        if peer.parts && windows.is_none() && peer.sending.is_empty() {
            peer.wire.part();
        } else {
            peer.wire.shut_down();
        }
        // Not before: until then the client can write to it.
        drop(windows);
        self.counters += peer.wire.counters();
        for tag in peer.sending.drain(..) {
            self.sending[tag as usize] = None;
            self.free_tags.push(tag);
        }
        for token in peer.arriving.drain(..).flatten() {
            self.writes.release(token);
        }
        self.changes.push(WatchChange::Remove(peer.descriptor));
        self.closing.push(peer);
    }

    fn tick(&mut self) {
        for index in 0..self.members.len() {
            if let Some(member) = &mut self.members[index] {
                member.replica.apply(Event::Tick, self.now);
                member.note_progress(self.now);
                self.activate(index);
            }
        }
        if !self.listens {
            self.listen(true);
        }
        if self.listeners.iter_mut().filter_map(|l| l.revive().then_some(())).count() > 0 {
            tracing::info!(shard = self.index, "the RDMA device is back, and clients may come over it again");
        }
        let (config, now) = (&self.shared.config, self.now);
        let silent = (config.leg_timeout * SILENT_LEG_TIMEOUTS).max(SHORTEST_SILENCE);
        let overdue = |peer: &Peer| match peer.member {
            // What is not read cannot be heard.
            Some(_) if !peer.watched.contains(EventSet::IN) => false,
            Some(_) => now - peer.last_heard > silent,
            None => now - peer.since > config.idle_timeout.min(silent),
        };
        let late: Vec<_> = self.peers.iter().filter(|(_, p)| overdue(p)).map(|(id, _)| *id).collect();
        for id in late {
            self.lost(id, "the client was silent for too long");
        }
        let used = self.buffers.total_bytes() - self.buffers.free_bytes();
        self.shared.buffer_used[self.index].store(used as u64, Ordering::Relaxed);
        self.shared.buffer_lent[self.index].store(self.lent_bytes() as u64, Ordering::Relaxed);
        self.tell_counters();
    }

    fn lent_bytes(&self) -> usize {
        self.windows.values().map(Windows::bytes).sum()
    }

    /// Tells operators when requests have waited for memory for long.
    fn note_shortage(&mut self) {
        if self.shortage.is_due(self.short, self.now) {
            let (total, free, lent) =
                (self.buffers.total_bytes(), self.buffers.free_bytes(), self.lent_bytes());
            tracing::warn!(
                shard = self.index,
                total,
                free,
                lent,
                waiting = self.line.len(),
                "requests wait for buffers for more than a second: the disks are slow, or buffer_memory is small"
            );
        }
    }

    fn tell_counters(&self) {
        let mut counters = self.counters;
        let sources = self.members.iter().flatten().filter_map(|m| m.source.as_ref()).map(|s| &s.wire);
        for wire in self.peers.values().map(|p| &p.wire).chain(sources) {
            counters += wire.counters();
        }
        self.shared.note_counters(self.index, counters);
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Status(responder) => {
                self.tell_counters();
                let node = &self.shared.config.node_name;
                responder.send(Ok(self.members.iter().flatten().map(|m| m.status(node)).collect()));
            }
            Command::Adopt(store, responder) => {
                let created = StoreCreated { store: store.superblock().store, path: store.path().to_owned() };
                responder.send(self.adopt(*store).map(|()| created));
            }
            Command::Delete(store, force, responder) => self.delete(store, force, responder),
            Command::Operator(pool, command, responder) => self.admin_command(pool, &command, responder),
            Command::RoomMade(store, result) => self.room_made(store, result),
            Command::Destroyed(store, result) => {
                let Some(index) = self.deletions.iter().position(|d| d.remains.store == store) else {
                    return;
                };
                if self.deletions[index].ended(result) {
                    let deletion = self.deletions.swap_remove(index);
                    self.shared.pools().remove(&deletion.remains.pool);
                }
            }
            // One that stops already closes them here.
            Command::Listen(listeners) if matches!(self.phase, Phase::Serving) => {
                self.changes.extend(listeners.iter().map(|l| WatchChange::Add(l.as_raw_fd(), EventSet::IN)));
                self.listeners = listeners;
            }
            Command::Listen(_) => {}
            Command::Connection(handover) => {
                let Handover { peer, greeting } = *handover;
                let descriptor = peer.descriptor;
                let id =
                    Self::insert(&mut self.next_connection, &mut self.peers, &mut self.by_descriptor, peer);
                self.changes.push(WatchChange::Add(descriptor, EventSet::IN));
                self.greet(id, greeting);
            }
        }
    }

    fn adopt(&mut self, store: Store) -> Result<(), ControlError> {
        let internal = |e: &dyn std::fmt::Display| ControlError::new(ErrorCode::Internal, e.to_string());
        let superblock = store.superblock();
        let place =
            PoolPlace { name: superblock.spec.name.clone(), store: superblock.store, shard: self.index };
        let pool = superblock.spec.id;
        {
            let mut pools = self.shared.pools();
            if pools.contains_key(&pool) || pools.values().any(|p| p.name == place.name) {
                let text = format!("this node has a store of pool '{}' already", place.name);
                return Err(ControlError::new(ErrorCode::Exists, text));
            }
            pools.insert(pool, place);
        }
        let disk = store
            .disk_file()
            .map_err(|e| internal(&e))
            .and_then(|file| self.engine.add_disk(file).map_err(|e| internal(&e)));
        let disk = disk.inspect_err(|_| {
            self.shared.pools().remove(&pool);
        })?;
        let member = Member::new(store, disk, &self.shared);
        let (spec, view) = (member.replica.spec(), member.replica.view());
        tracing::info!(
            pool = %spec.name, member = %member.replica.member(), path = %member.store.path().display(),
            clean = member.store.was_clean(), inline = self.engine.is_inline(disk), "store is open: {view}"
        );
        match self.members.iter().position(Option::is_none) {
            Some(free) => self.members[free] = Some(member),
            None => self.members.push(Some(member)),
        }
        Ok(())
    }

    fn delete(&mut self, store: StoreId, force: bool, responder: Responder<()>) {
        if let Some(index) = self.deletions.iter().position(|d| d.remains.store == store) {
            return match self.deletions[index].is_under_way() {
                Some(busy) => responder.send(Err(busy)),
                None => self.destroy(index, responder),
            };
        }
        let store_dir = self.shared.config.store_dir.clone();
        let Some((index, member)) = self.member_of_store(store) else {
            let text = format!("this node has no store {store}");
            return responder.send(Err(ControlError::new(ErrorCode::NotFound, text)));
        };
        if let Some(holder) = member.replica.status().holder.filter(|h| h.connected && !force) {
            let text = format!("pool '{}' is held by {}", member.replica.spec().name, holder.description);
            return responder.send(Err(ControlError::new(ErrorCode::InUse, text)));
        }
        member.closing = true;
        let path = member.store.path().to_owned();
        let remains = Remains {
            store,
            pool: member.pool(),
            name: member.replica.spec().name.clone(),
            own: store_dir.is_some_and(|dir| path.parent() == Some(&dir)),
            path,
            tried: false,
        };
        let clients: Vec<_> =
            self.peers.iter().filter(|(_, p)| p.member == Some(index)).map(|(id, _)| *id).collect();
        for id in clients {
            self.lost(id, "the store is being deleted");
        }
        self.deletions.push(Deletion { remains, stage: Stage::Closing(index, responder) });
    }

    /// Destroys stores that were to be deleted and have nothing under way any more.
    fn advance_deletions(&mut self) {
        for at in 0..self.deletions.len() {
            let Stage::Closing(index, _) = self.deletions[at].stage else { continue };
            let Some(Some(member)) = self.members.get(index) else { continue };
            if member.replica.is_busy()
                || member.makes_room
                || !member.metadata_idle()
                || self.engine.remove_disk(member.disk).is_err()
            {
                self.next_tick = self.next_tick.min(self.now + Duration::from_millis(10));
                continue;
            }
            // The pool stays in the list until nothing of it is left: a store created meanwhile would be destroyed too.
            self.members[index] = None;
            if let Stage::Closing(_, responder) =
                std::mem::replace(&mut self.deletions[at].stage, Stage::Failed)
            {
                self.destroy(at, responder);
            }
        }
    }

    /// Has a closed store destroyed.
    fn destroy(&mut self, at: usize, responder: Responder<()>) {
        let deletion = &mut self.deletions[at];
        deletion.stage = Stage::Destroying(responder);
        let (remains, handle) = (deletion.remains.clone(), self.shards[self.index].clone());
        let work = move || handle.send(Command::Destroyed(remains.store, remains.destroy()));
        if let Err(error) = std::thread::Builder::new().name("delete-store".into()).spawn(work) {
            deletion.ended(Err(format!("no thread for it: {error}")));
        }
    }

    /// Goes through the graceful stop, within its time limit.
    fn advance_shutdown(&mut self) {
        match self.phase {
            Phase::Serving if self.shutdown.requested() => {
                self.changes.push(WatchChange::Remove(self.shutdown.as_raw_fd()));
                let listeners = std::mem::take(&mut self.listeners);
                self.changes.extend(listeners.iter().map(|l| WatchChange::Remove(l.as_raw_fd())));
                // Kept until the loop does not watch them any more; no connection is accepted meanwhile.
                self.closed_listeners = listeners;
                let deadline = self.now + self.shared.config.stop_timeout;
                self.phase = Phase::Draining { deadline, closed: false };
                self.say_goodbye();
                self.next_tick = self.now;
            }
            Phase::Draining { deadline, closed } => {
                let busy = !self.peers.is_empty()
                    || self.members.iter().flatten().any(|m| m.replica.is_busy() || !m.metadata_idle())
                    || self.deletions.iter().any(|d| d.is_under_way().is_some());
                if busy && self.now < deadline {
                    self.next_tick = self.next_tick.min(self.now + Duration::from_millis(20));
                    return;
                }
                if busy && !closed {
                    // Nothing may be written behind the mark of a clean shutdown.
                    self.close_all("the node is stopping, and the client did not leave in time");
                    self.phase = Phase::Draining { deadline: self.now + STOP_GRACE, closed: true };
                    self.next_tick = self.now;
                    return;
                }
                for index in 0..self.members.len() {
                    let Some(member) = &mut self.members[index] else { continue };
                    if member.replica.is_busy() {
                        let pool = &member.replica.spec().name;
                        tracing::error!(%pool, "stopping with requests under way: the store is not marked clean");
                        self.unmarked += 1;
                    } else {
                        member.mark_clean();
                        self.activate(index);
                    }
                }
                self.phase = Phase::Marking { deadline };
                self.next_tick = self.now;
            }
            Phase::Marking { deadline } => {
                if self.members.iter().flatten().all(Member::metadata_idle) {
                    self.unmarked += self.members.iter().flatten().filter(|m| m.metadata_failed()).count();
                    if self.unmarked == 0 {
                        tracing::info!(shard = self.index, "all stores are closed in order");
                    }
                    self.phase = Phase::Done;
                } else if self.now >= deadline {
                    tracing::error!(
                        shard = self.index,
                        "a disk did not finish in time: some stores are not marked clean"
                    );
                    self.unmarked += self.members.iter().flatten().filter(|m| !m.metadata_idle()).count();
                    self.phase = Phase::Done;
                } else {
                    self.next_tick = self.next_tick.min(self.now + Duration::from_millis(20));
                }
            }
            Phase::Serving | Phase::Done => {}
        }
    }
}

/// What the parts of the shard in other files stand on.
impl Shard {
    /// How other threads reach this shard.
    pub(super) fn handle(&self) -> ShardHandle {
        self.shards[self.index].clone()
    }

    pub(super) fn shared(&self) -> &Shared {
        &self.shared
    }

    /// Bytes of buffers that one client may have.
    pub(super) const fn share(&self) -> usize {
        self.share
    }

    pub(super) fn peer_mut(&mut self, id: ConnectionId) -> Option<&mut Peer> {
        self.peers.get_mut(&id)
    }

    /// The member of a pool that is served here, and where it stands.
    pub(super) fn member_at(&self, pool: PoolId) -> Option<(usize, &Member)> {
        let index = self.member_of_pool(pool)?;
        Some((index, self.members[index].as_ref()?))
    }

    pub(super) fn member_mut(&mut self, index: usize) -> Option<&mut Member> {
        self.members.get_mut(index)?.as_mut()
    }

    pub(super) fn member_of_store(&mut self, store: StoreId) -> Option<(usize, &mut Member)> {
        let is_its = |m: &Option<Member>| m.as_ref().is_some_and(|m| m.store.superblock().store == store);
        let index = self.members.iter().position(is_its)?;
        Some((index, self.members[index].as_mut()?))
    }

    pub(super) fn member_of_pool(&self, pool: PoolId) -> Option<usize> {
        self.members.iter().position(|m| m.as_ref().is_some_and(|m| m.pool() == pool && !m.closing))
    }

    pub(super) fn member_of_connection(&self, connection: ConnectionId) -> Option<usize> {
        self.peers.get(&connection)?.member
    }

    pub(super) fn next_command(&mut self) -> CommandId {
        self.next_command += 1;
        CommandId(self.next_command)
    }

    pub(super) fn resize_disk(&mut self, disk: DiskId, size: u64) {
        self.engine.resize_disk(disk, size);
    }

    /// Gives an event to a replica.
    pub(super) fn tell_replica(&mut self, index: usize, event: Event<'_>) {
        let now = self.now;
        if let Some(member) = self.member_mut(index) {
            member.replica.apply(event, now);
        }
        self.activate(index);
    }

    /// Queues a message with a body on a connection, if that is still there.
    pub(super) fn send_body(&mut self, connection: ConnectionId, header: &MessageHeader, body: Vec<u8>) {
        if let Some(peer) = self.peers.get_mut(&connection) {
            peer.wire.queue(header, Some(body));
        }
        self.queue(connection);
    }
}

impl Shard {
    /// Tells clients that the node stops. Those that hold a pool end what they are doing and leave; nobody waits for
    /// others.
    fn say_goodbye(&mut self) {
        let all: Vec<_> = self.peers.keys().copied().collect();
        for id in all {
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            let member = peer.member.and_then(|m| self.members[m].as_ref());
            if let Some(member) = member {
                peer.wire.queue(&MessageHeader::new(Kind::Goodbye, member.pool()), None);
            }
            if member.is_some_and(|m| m.replica.holder_connection() == Some(id)) {
                self.queue(id);
            } else {
                // What does not go out at once is lost with the connection, which says the same.
                let _ = peer.wire.flush();
                peer.parts = true;
                self.lost(id, "the node is stopping");
            }
        }
    }

    fn close_all(&mut self, reason: &str) {
        let all: Vec<_> = self.peers.keys().copied().collect();
        for id in all {
            self.lost(id, reason);
        }
    }
}

impl MutEventSubscriber for Shard {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        self.now = monotonic_now();
        let descriptor = events.fd();
        if let Some(&id) = self.by_descriptor.get(&descriptor) {
            let (set, hang_up) =
                (events.event_set(), EventSet::HANG_UP | EventSet::ERROR | EventSet::READ_HANG_UP);
            if set.contains(EventSet::OUT) {
                self.queue(id);
            }
            let reads = self.peers.get(&id).is_some_and(|p| p.watched.contains(EventSet::IN));
            if reads && set != EventSet::OUT {
                self.receive(id);
            } else if set.intersects(hang_up) {
                // What it sent before will never be answered; and a hang-up that is not dealt with comes again at once.
                self.lost(id, "the peer hung up");
            }
        } else if descriptor == self.shards[self.index].wake.as_raw_fd() {
            // Only the wake-up counts; the commands are in the inbox.
            let _ = self.shards[self.index].wake.read();
            while let Ok(command) = self.inbox.try_recv() {
                self.command(command);
            }
        } else if descriptor == self.connector.descriptor() {
            self.sources_connected();
        } else if self.listeners.iter().any(|l| l.as_raw_fd() == descriptor) {
            self.accept(descriptor);
        } else {
            self.source_ready(descriptor);
        }
        // The disk engine's and the shutdown's descriptors only wake the loop; `upkeep` looks at both.
    }

    fn init(&mut self, _ops: &mut EventOps<'_>) {
        // What is watched goes through `changes`, from the first round on.
    }
}
