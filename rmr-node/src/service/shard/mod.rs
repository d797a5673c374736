//! One I/O thread: an event-manager loop with its connections, its replicas, its disk engine and its buffers.
//!
//! Each wake-up goes the same way: what arrived is taken in, replicas say what to do, disks do it, answers are queued,
//! and at the end every connection with something queued gets one system call.

mod disks;
mod memory;
mod peers;
mod replies;
mod sources;
mod stop;
mod stores;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;
use std::sync::mpsc::{self, Receiver as Inbox, Sender};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use rmr_common::clock::monotonic_now;
use rmr_common::pool::{Command as PoolCommand, PoolId, StoreId, TransportKind};
use rmr_common::reactor::WatchChange;
use rmr_common::replica::{CommandId, ConnectionId, Event, Notice, Output};
use rmr_common::throttle::{Throttles as LineThrottles, Withheld};
use rmr_common::time::Time;
use rmr_common::transport::connect::Connector;
use rmr_common::transport::rdma::{Exposure, MIN_WINDOW, Registration};
use rmr_common::transport::{Connection, Counters, Listener};
use rmr_common::wire::Kind;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Shared;
use super::command::Answered;
use super::connection::{Greeting, Peer, WriteBuffers};
use super::deletion::{Closure, Deletion};
use super::member::{IoTag, Member, buffer_share};
use super::source_link::SourceLink;
use super::throttle::{Burst, Throttle};
use super::windows::{RESERVE_PART, Shortage, Windows};
use crate::admin::Responder;
use crate::admin::api::{ControlError, PoolStatus, StoreChanged};
use crate::config::EngineChoice;
use crate::disk::{
    self, Buffer, BufferPool, Completion, DiskEngine, DiskId, Engine, EngineOptions, Io, IoKind, Payload,
};
use crate::lifecycle::Shutdown;
use crate::store::{MetadataIo, Store, StoreError};

/// Replicas clear intents and connections time out on this beat.
const TICK: Duration = Duration::from_secs(1);
/// Most rounds of replicas, disks and sockets before the loop looks at what else has arrived.
const MAX_ROUNDS: usize = 32;
/// A client is dead when it was silent for so many leg timeouts.
const SILENT_LEG_TIMEOUTS: u32 = 3;
/// It is given so long at the least: a client sends a ping each second, however short the leg timeout is.
const SHORTEST_SILENCE: Duration = Duration::from_secs(3);
/// A stop gives disks so long to end what clients left behind that had to be cut off, and so long at the least to take the
/// marks of stores that are closed in order. With the longest stop by default, both together end before systemd's patience.
const STOP_GRACE: Duration = Duration::from_secs(4);

/// What other threads ask of a shard.
pub(super) enum Command {
    Status(Responder<Vec<PoolStatus>>),
    Adopt(Box<Store>, Sender<Result<(), ControlError>>),
    Delete(Deleting, Responder<()>),
    /// A store is to be closed, by force although a client has it.
    Close(StoreId, bool, Responder<StoreChanged>),
    /// An operator's command for a pool.
    Operator(PoolId, PoolCommand, Responder<Answered>),
    /// The work that makes room in a store has ended.
    RoomMade(StoreId, Result<u64, StoreError>),
    Connection(Box<Handover>),
    /// The work that destroys a store has ended.
    Destroyed(StoreId, Result<(), String>),
    /// Clients may come now: the stores that there are at the start are open.
    Listen(Vec<Listener>),
}

/// A store that is to be deleted.
pub(super) struct Deleting {
    pub(super) store: StoreId,
    pub(super) force: bool,
    /// The node made the file, so it goes too.
    pub(super) own: bool,
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

/// Lines of the log that others may cause as often as they like.
#[derive(Default)]
pub(super) struct Throttles {
    /// Connections refused because there are too many.
    full: Throttle,
    /// Connections that could not be accepted.
    accept: Throttle,
    /// Connections that were not greeted, and closed for others.
    strangers: Throttle,
    /// Hellos refused.
    refused: Throttle,
    /// Operators' commands that other nodes pass on.
    pub(in crate::service) commands: Throttle,
    /// Stores that were asked for room which they do not have.
    pub(in crate::service) room: Throttle,
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
    /// A stop was asked for: what clients were answered is flushed. Nobody waits for that longer than `until`.
    Leaving {
        until: Time,
        deadline: Time,
    },
    /// Clients are told, requests end, disks are flushed, stores are marked clean.
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
    peers: BTreeMap<ConnectionId, Peer>,
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
    /// Stores that are being closed.
    closures: Vec<Closure>,
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
    /// Something was left for the next loop iteration, which begins at once.
    again: bool,
    throttles: Throttles,
    /// Log lines that strangers and peers can cause.
    logs: LineThrottles<&'static str>,
    /// Stores that a stop could not mark as closed in order.
    unmarked: usize,
    next_tick: Time,
    now: Time,
}

impl Shard {
    /// Runs a shard until the shutdown is requested and done.
    pub(super) fn run(
        index: usize,
        shared: Arc<Shared>,
        shards: Vec<ShardHandle>,
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
        let connector = connector.leaving_tls_never(shared.config.is_tls_only());
        let now = monotonic_now();
        let shard = Self {
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
            peers: BTreeMap::new(),
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
            closures: Vec::new(),
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
            again: false,
            throttles: Throttles::default(),
            logs: LineThrottles::default(),
            unmarked: 0,
            next_tick: now + TICK,
            now,
        };
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
            let wait = if shard.changes.is_empty() && !shard.again { wait } else { 0 };
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
        self.again = false;
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
        self.advance_closures();
        self.advance_shutdown();
    }

    /// Replicas, disks, sockets and the line for memory, until none has anything to do at once.
    fn work(&mut self) {
        for member in self.members.iter_mut().flatten() {
            member.spent = 0;
        }
        for _ in 0..MAX_ROUNDS {
            self.settle();
            self.send_all();
            let fed = self.feed();
            if !fed && self.active.is_empty() && self.queued.is_empty() {
                return;
            }
        }
        // A client that sends as fast as its data is dealt with would keep the shard here.
        self.again = true;
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
                    kind: IoKind::FlushMetadata,
                    offset: 0,
                    length: 0,
                    payload: Payload::None,
                },
            });
        }
    }

    fn log(&mut self, index: usize, notice: Notice) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let holder = member.replica.holder_connection();
        let address = holder.and_then(|c| self.peers.get(&c)).map(|p| p.address);
        // A client may attach and leave as often as it likes.
        let (is_logged, left_out) = member.lines.admit(self.now);
        if let Some(left_out) = left_out {
            let (pool, most) = (&member.replica.spec().name, Burst::MOST);
            tracing::warn!(
                %pool, member = %member.replica.member(), left_out,
                "lines about attachments and views were left out: there were more than {most} in a second"
            );
        }
        let is_quiet = !is_logged && notice != Notice::MetadataFailed;
        let _quiet =
            is_quiet.then(|| tracing::subscriber::set_default(tracing::subscriber::NoSubscriber::new()));
        member.log(notice, address);
    }

    fn tick(&mut self) {
        for index in 0..self.members.len() {
            if let Some(member) = &mut self.members[index] {
                member.replica.apply(Event::Tick, self.now);
                member.note_progress(self.now);
                member.troubles.tick();
                self.activate(index);
            }
        }
        self.close_failed();
        self.windows.values_mut().for_each(Windows::try_again);
        if !self.listens {
            self.listen(true);
        }
        if self.listeners.iter_mut().filter_map(|l| l.revive().then_some(())).count() > 0 {
            tracing::info!(shard = self.index, "the RDMA device is back, and clients may come over it again");
        }
        let (config, now) = (&self.shared.config, self.now);
        let silent = (config.leg_timeout * SILENT_LEG_TIMEOUTS).max(SHORTEST_SILENCE);
        let (idle, short) = (config.idle_timeout, self.short);
        let late =
            self.peers.iter_mut().filter_map(|(id, p)| p.is_overdue(now, silent, idle, short).then_some(*id));
        let late: Vec<_> = late.collect();
        for id in late {
            self.lost(id, "the client was silent for too long");
        }
        let used = self.buffers.total_bytes() - self.buffers.free_bytes();
        self.shared.buffer_used[self.index].store(used as u64, Ordering::Relaxed);
        self.shared.buffer_lent[self.index].store(self.lent_bytes() as u64, Ordering::Relaxed);
        self.tell_counters();
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
            Command::Adopt(store, answer) => {
                // Whoever asked has given up if nobody is there to hear it.
                let _ = answer.send(self.adopt(*store));
            }
            Command::Delete(deleting, responder) => self.delete(&deleting, responder),
            Command::Close(store, force, responder) => self.close_store(store, force, responder),
            Command::Operator(pool, command, responder) => self.admin_command(pool, &command, responder),
            Command::RoomMade(store, result) => self.room_made(store, result),
            Command::Destroyed(store, result) => {
                let Some(index) = self.deletions.iter().position(|d| d.remains.store == store) else {
                    return;
                };
                if self.deletions[index].ended(result) {
                    let deletion = self.deletions.swap_remove(index);
                    self.shared.pools().remove(deletion.remains.pool);
                }
            }
            // One that stops already closes them here.
            Command::Listen(listeners) if matches!(self.phase, Phase::Serving) => {
                self.changes.extend(listeners.iter().map(|l| WatchChange::Add(l.as_raw_fd(), EventSet::IN)));
                self.listeners = listeners;
                self.check_memory();
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

    /// Whether a line that others may cause as often as they like goes to the log, and how many before it did not.
    pub(super) fn may_log(&mut self, of: impl FnOnce(&mut Throttles) -> &mut Throttle) -> Option<Withheld> {
        of(&mut self.throttles).admit(self.now)
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
