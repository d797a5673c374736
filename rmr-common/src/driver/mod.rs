//! Drives a [`Client`] over real connections, inside the event loop of whoever owns it.
//!
//! The driver owns the sockets and the memory references of requests in flight. Its owner watches the descriptors that
//! [`PoolDriver::watch_changes`] names, passes readiness in, and calls [`PoolDriver::upkeep`] once at the end of each
//! wake-up, which sends everything that was queued, one system call for each leg.

mod bounce;
mod clock;
mod pool;
mod traffic;

use std::io;
use std::os::fd::RawFd;
use std::time::Duration;

use vmm_sys_util::epoll::EventSet;

pub use pool::{BlockingPool, Buffers, NO_ANSWER, Pool, PoolError, discover, discover_while};
pub use traffic::Traffic;

use crate::auth::Nonce;
use crate::buffer::{self, Segment, gather};
use crate::client::Protection;
use crate::client::{
    Client, CommandToken, Config, Event, IoError, LinkId, MAX_LINKS, Notice, Operation, Output, OverReason,
    Payload, PoolSelector, PoolStatus, Token,
};
use crate::pool::{Address, Command, CommandReply, PoolSpec, Sequence, Slot, TransportKind};
use crate::reactor::WatchChange;
use crate::time::Time;
use crate::transport::connect::Connector;
use crate::transport::{Connection, ConnectionError, Counters, Place, Receiver, Wire as AnyConnection};
use crate::wire::{Kind, MessageHeader, Status, data_digest};
use bounce::Bounces;
use clock::Clock;

/// Slot memory that a connection over RDMA did not use for so long goes back.
const BEAT: Duration = Duration::from_secs(1);

struct Wire {
    connection: AnyConnection,
    descriptor: RawFd,
    watched: EventSet,
}

/// While requests come or are answered faster than this, the leading link alone may wake the loop.
const QUIET: Duration = Duration::from_millis(2);

/// Answers that a link owes. Decides which links may wake the loop: see [`PoolDriver::watch_wires`].
#[derive(Clone, Copy, Default)]
struct Owed {
    /// Answers to requests.
    answers: u32,
    /// Those of them that only this link will give.
    reads: u32,
    /// Kinds of other messages that are not answered, as bits.
    control: u64,
}

impl Owed {
    fn sent(&mut self, kind: Kind) {
        if kind.is_request() {
            self.answers += 1;
            self.reads += u32::from(kind == Kind::Read);
        } else if !matches!(kind, Kind::ClearDirty | Kind::Goodbye | Kind::CommandReply | Kind::Conditions) {
            self.control |= 1 << (kind as u16 % 64);
        }
    }

    fn received(&mut self, header: &MessageHeader) {
        match header.kind {
            Kind::IoReply | Kind::FlushReply => {
                self.answers = self.answers.saturating_sub(1);
                let is_read = header.kind == Kind::IoReply && header.payload > 0;
                self.reads = self.reads.saturating_sub(is_read.into());
            }
            // An answer has the code that follows that of its question. What nobody asked for follows none.
            kind => self.control &= !(1 << ((kind as u16 - 1) % 64)),
        }
    }

    /// Whether the link is to wake the loop. `led` is what the leading link owes; `is_watched` whether the link wakes the
    /// loop now; `is_quiet` whether no request came or was answered of late.
    const fn wakes(self, is_leading: bool, led: u32, is_watched: bool, is_quiet: bool) -> bool {
        // A leading link that hangs must not keep the others' answers from being heard, which would make all of them late;
        // and a node may say something unasked.
        if is_quiet || self.control != 0 {
            return true;
        }
        match self.answers {
            // The next request would only change it back.
            0 => is_watched,
            answers => is_leading || self.reads > 0 || answers > led,
        }
    }
}

/// Most calls in which a link is emptied before the time is told. Messages that are alone are few: answers come in frames.
const MAX_CALLS: usize = 16;

struct Request {
    /// The owner's name for it; `None` when the entry is free.
    token: Option<Token>,
    segments: Vec<Segment>,
}

/// One pool, driven by its owner's event loop.
pub struct PoolDriver {
    client: Client,
    connector: Connector,
    wires: [Option<Wire>; MAX_LINKS],
    owed: [Owed; MAX_LINKS],
    /// The link whose answers wake the loop for those of the others as well.
    leading: usize,
    /// Where each link leads.
    addresses: [Option<Address>; MAX_LINKS],
    /// Links whose last connection ended in distrust, and the words.
    distrusted: [Option<String>; MAX_LINKS],
    /// Tells an attempt to connect from an earlier one on the same link.
    attempts: [u64; MAX_LINKS],
    requests: Vec<Request>,
    free_requests: Vec<u32>,
    bounces: Bounces,
    faults: Vec<(Slot, Sequence)>,
    done: Vec<(Token, Result<(), IoError>)>,
    replies: Vec<(CommandToken, CommandReply)>,
    notices: Vec<Notice>,
    changes: Vec<WatchChange>,
    /// Connections that are over, kept until the loop does not watch them any more.
    closing: Vec<AnyConnection>,
    /// What connections that are over have done.
    closed: Counters,
    next_beat: Time,
    traffic: Traffic,
    /// When a request was last sent or answered.
    last_request: Time,
    clock: Clock,
    now: Time,
    /// `now` is of this wake-up.
    is_now: bool,
}

impl PoolDriver {
    /// Starts to look for a pool at the nodes `seeds`.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(config: Config, selector: PoolSelector, seeds: &[Address]) -> io::Result<Self> {
        let connector = Self::connector(&config, seeds)?;
        let clock = Clock::default();
        Ok(Self::start(Client::new(config, selector, seeds, clock.now()), connector, clock))
    }

    /// Starts to attach to a pool whose specification is known from [`discover`].
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn with_spec(config: Config, spec: PoolSpec, seeds: &[Address]) -> io::Result<Self> {
        let connector = Self::connector(&config, seeds)?;
        let clock = Clock::default();
        Ok(Self::start(Client::with_spec(config, spec, seeds, clock.now()), connector, clock))
    }

    /// Who names nothing but `tls://` addresses wants TLS: what a node says of other members does not change that.
    fn connector(config: &Config, seeds: &[Address]) -> io::Result<Connector> {
        let tls_only = !seeds.is_empty() && seeds.iter().all(|seed| seed.transport() == TransportKind::Tls);
        let connector = Connector::new(config.leg_timeout, config.tls.clone(), config.fabric.clone())?;
        Ok(connector.leaving_tls_never(tls_only))
    }

    fn start(client: Client, connector: Connector, clock: Clock) -> Self {
        let now = clock.now();
        let changes = vec![WatchChange::Add(connector.descriptor(), EventSet::IN)];
        let mut driver = Self {
            client,
            connector,
            wires: std::array::from_fn(|_| None),
            owed: [Owed::default(); MAX_LINKS],
            leading: 0,
            addresses: std::array::from_fn(|_| None),
            distrusted: std::array::from_fn(|_| None),
            attempts: [0; MAX_LINKS],
            requests: Vec::new(),
            free_requests: Vec::new(),
            bounces: Bounces::default(),
            faults: Vec::new(),
            done: Vec::new(),
            replies: Vec::new(),
            notices: Vec::new(),
            changes,
            closing: Vec::new(),
            closed: Counters::default(),
            next_beat: now + BEAT,
            traffic: Traffic::default(),
            last_request: Time(0),
            clock,
            now,
            is_now: false,
        };
        driver.carry_out();
        driver
    }

    /// Takes in a request. `segments` have the length of the range for a read or a write, and their memory must stay
    /// until [`PoolDriver::completions`] returns the token; they are empty for other operations.
    pub fn submit(
        &mut self,
        token: Token,
        operation: Operation,
        offset: u64,
        length: u64,
        segments: &[Segment],
    ) {
        let index = self.free_requests.pop().unwrap_or_else(|| {
            self.requests.push(Request { token: None, segments: Vec::new() });
            u32::try_from(self.requests.len() - 1).unwrap_or(u32::MAX)
        });
        let request = &mut self.requests[index as usize];
        request.token = Some(token);
        request.segments.extend_from_slice(segments);
        // The loop may have slept for long; by its last time the legs would seem to be late already.
        self.look_at_clock();
        self.client.submit(Token(index.into()), operation, offset, length, self.now);
        self.carry_out();
    }

    /// Moves finished requests to `done`.
    pub fn completions(&mut self, done: &mut Vec<(Token, Result<(), IoError>)>) {
        done.append(&mut self.done);
    }

    /// Whether there are finished requests to take. Also [`PoolDriver::upkeep`] and [`PoolDriver::submit`] finish some.
    #[must_use]
    pub fn has_completions(&self) -> bool {
        !self.done.is_empty()
    }

    /// Takes in an operator's command: this client is the coordinator. It is answered once, in
    /// [`PoolDriver::take_replies`].
    pub fn command(&mut self, token: CommandToken, command: Command) {
        self.look_at_clock();
        self.client.command(token, command, self.now);
        self.carry_out();
    }

    /// Moves the answers to commands to `replies`.
    pub fn take_replies(&mut self, replies: &mut Vec<(CommandToken, CommandReply)>) {
        replies.append(&mut self.replies);
    }

    /// Moves what operators want to know to `notices`.
    pub fn take_notices(&mut self, notices: &mut Vec<Notice>) {
        notices.append(&mut self.notices);
    }

    /// Moves changes of what is to be watched to `changes`. They are to be applied before the next wait.
    pub fn watch_changes(&mut self, changes: &mut Vec<WatchChange>) {
        changes.append(&mut self.changes);
    }

    /// A watched descriptor is ready.
    pub fn ready(&mut self, descriptor: RawFd, _set: EventSet) {
        self.look_at_clock();
        if descriptor == self.connector.descriptor() {
            while let Some((mark, result)) = self.connector.next() {
                self.connected(mark, result);
            }
        } else if let Some(index) =
            self.wires.iter().position(|w| w.as_ref().is_some_and(|w| w.descriptor == descriptor))
        {
            self.receive(index);
            for other in 0..MAX_LINKS {
                let is_quiet = |w: &Wire| !w.watched.contains(EventSet::IN);
                if other != index && self.wires[other].as_ref().is_some_and(is_quiet) {
                    self.receive(other);
                }
            }
        }
        self.carry_out();
    }

    /// Time has passed, and work was queued: sends it. Called once at the end of each wake-up.
    pub fn upkeep(&mut self) {
        self.is_now = false;
        self.look_at_clock();
        if self.changes.is_empty() {
            self.closing.clear();
        }
        if self.client.deadline() <= self.now {
            // What has arrived is not late, however long nobody had the time to look.
            for index in 0..MAX_LINKS {
                self.receive_all(index);
            }
            self.client.apply(Event::Tick, self.now);
            self.carry_out();
        }
        if self.next_beat <= self.now {
            self.next_beat = self.now + BEAT;
            for wire in self.wires.iter_mut().flatten() {
                if let Some(connection) = wire.connection.rdma() {
                    connection.beat();
                }
            }
        }
        // A connection that is lost gives the others something to send, also those that were flushed before it. So does a write
        // whose memory could not be read.
        while self.flush_all() {}
        self.watch_wires();
        self.is_now = false;
    }

    /// Sends what is queued; true if there may be more to send by that.
    fn flush_all(&mut self) -> bool {
        let mut more = false;
        for index in 0..MAX_LINKS {
            let Some(wire) = &mut self.wires[index] else { continue };
            let flushed = wire.connection.flush();
            wire.connection.take_faults(&mut self.faults);
            if let Err(error) = flushed {
                self.lost(index, &error);
                self.carry_out();
                more = true;
            }
        }
        more | self.take_faults()
    }

    /// Tells the client of writes whose memory could not be read; whether there were any.
    fn take_faults(&mut self) -> bool {
        if self.faults.is_empty() {
            return false;
        }
        for (slot, sequence) in std::mem::take(&mut self.faults) {
            self.client.apply(Event::MemoryFault(slot, sequence), self.now);
        }
        self.carry_out();
        true
    }

    /// Lets as few links wake the loop as will do. A write is complete when every leg answered it, so a wake-up for the
    /// first answer is wasted: only the leading link is watched, which is the one that was last to answer of late, and
    /// the others are looked at when it has something. A link is watched by itself while it owes a read, or more answers
    /// than the leading one, or an answer to something else than a request; and all are when nothing happened for a while. The
    /// end of any connection is always noticed.
    fn watch_wires(&mut self) {
        let most = (0..MAX_LINKS).max_by_key(|&i| (self.owed[i].answers, i == self.leading)).unwrap_or(0);
        if self.owed[most].answers > self.owed[self.leading].answers {
            self.leading = most;
        }
        let led = self.owed[self.leading].answers;
        let is_quiet = self.now - self.last_request >= QUIET;
        for (index, wire) in self.wires.iter_mut().enumerate() {
            let Some(wire) = wire else { continue };
            let owed = self.owed[index];
            let is_watched = wire.watched.contains(EventSet::IN);
            let watches = owed.wakes(index == self.leading, led, is_watched, is_quiet)
                // A completion may also be a slot that is free, for which a write waits.
                || wire.connection.is_rdma();
            let mut set = EventSet::READ_HANG_UP;
            set.set(EventSet::IN, watches);
            set.set(EventSet::OUT, wire.connection.wants_to_send());
            if set != wire.watched {
                wire.watched = set;
                self.changes.push(WatchChange::Modify(wire.descriptor, set));
            }
        }
    }

    fn look_at_clock(&mut self) {
        if !self.is_now {
            self.now = self.clock.look(self.client.deadline());
            self.is_now = true;
        }
    }

    /// How long the loop may wait before it calls [`PoolDriver::upkeep`] again.
    #[must_use]
    pub fn timeout(&self) -> Duration {
        let now = self.clock.now();
        // Once it is quiet, all links are watched.
        let is_deaf = |wire: &Wire| !wire.watched.contains(EventSet::IN);
        let deadline = self.client.deadline();
        let has_deaf = self.wires.iter().flatten().any(is_deaf);
        let due = if has_deaf { deadline.min(self.last_request + QUIET) } else { deadline };
        due - now
    }

    /// Leaves the pool in good order; [`PoolDriver::over`] tells when that is done.
    pub fn detach(&mut self) {
        self.look_at_clock();
        self.client.apply(Event::Detach, self.now);
        self.carry_out();
    }

    /// Ends all watching, for a driver that is to be dropped: once the changes are applied, nothing refers to it.
    pub fn retire(&mut self) {
        for index in 0..MAX_LINKS {
            self.close(index);
        }
        self.changes.push(WatchChange::Remove(self.connector.descriptor()));
    }

    /// Gives up every request that is outstanding; each completes with an error before anything else happens.
    pub fn cancel(&mut self) {
        self.look_at_clock();
        self.client.apply(Event::Cancel, self.now);
        self.carry_out();
    }

    /// Whether writes were lost that had completed: every request fails until that is acknowledged.
    #[must_use]
    pub const fn has_lost_writes(&self) -> bool {
        self.client.has_lost_writes()
    }

    /// Whoever uses the pool knows that writes were lost, and starts from what is there.
    pub fn acknowledge_loss(&mut self) {
        self.client.acknowledge_loss();
    }

    /// The pool's specification, once a node has answered.
    #[must_use]
    pub const fn spec(&self) -> Option<&PoolSpec> {
        self.client.spec()
    }

    /// See [`Client::has_asked_all`].
    #[must_use]
    pub fn has_asked_all(&self) -> bool {
        self.client.has_asked_all()
    }

    /// Why no node can be reached, if all were tried and none is trusted, or trusts this client: see [`ConnectionError::is_distrust`].
    #[must_use]
    pub fn distrust(&self) -> Option<String> {
        let mut links = self.addresses.iter().zip(&self.distrusted).filter(|(address, _)| address.is_some());
        let has_none = self.distrusted.iter().all(Option::is_none);
        if has_none || !self.client.has_asked_all() || !links.all(|(_, distrusted)| distrusted.is_some()) {
            return None;
        }
        Some(self.distrusted.iter().flatten().cloned().collect::<Vec<_>>().join("; "))
    }

    /// Whether requests flow.
    #[must_use]
    pub const fn is_active(&self) -> bool {
        self.client.is_active()
    }

    /// Why the client is over, once it is.
    #[must_use]
    pub const fn over(&self) -> Option<&OverReason> {
        self.client.over()
    }

    /// How many requests are not finished.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.client.in_flight()
    }

    /// What the connections have done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        let mut counters = self.closed;
        for wire in self.wires.iter().flatten() {
            counters += wire.connection.counters();
        }
        counters
    }

    /// What the client is doing.
    #[must_use]
    pub fn status(&self) -> PoolStatus {
        self.client.status()
    }

    /// Bytes that its connections carried so far.
    #[must_use]
    pub const fn traffic(&self) -> &Traffic {
        &self.traffic
    }

    fn connected(&mut self, mark: u64, result: Result<AnyConnection, String>) {
        let index = usize::try_from(mark % MAX_LINKS as u64).unwrap_or(0);
        if self.attempts[index] != mark {
            return; // The link was given up meanwhile; the connection closes itself.
        }
        let id = LinkId(u8::try_from(index).unwrap_or(u8::MAX));
        let result = result.and_then(|connection| {
            let nonce = Nonce::random().map_err(|e| e.to_string())?;
            Ok((connection, nonce))
        });
        match result {
            Ok((connection, nonce)) => {
                let Some(descriptor) = connection.descriptor() else { return };
                let watched = EventSet::IN | EventSet::READ_HANG_UP;
                self.changes.push(WatchChange::Add(descriptor, watched));
                self.wires[index] = Some(Wire { connection, descriptor, watched });
                self.owed[index] = Owed::default();
                self.client.apply(Event::LinkUp(id, nonce), self.now);
            }
            Err(error) => {
                self.distrusted[index] = None;
                self.client.apply(Event::LinkDown(id, &error), self.now);
            }
        }
    }

    /// Receives what has arrived, within bounds: one call may stop after a message that was alone.
    fn receive_all(&mut self, index: usize) {
        let arrived =
            |s: &Self| s.wires[index].as_ref().map(|wire| wire.connection.counters().tcp_received_bytes);
        for _ in 0..MAX_CALLS {
            let before = arrived(self);
            self.receive(index);
            if arrived(self) == before {
                return;
            }
        }
    }

    fn receive(&mut self, index: usize) {
        let Some(wire) = &mut self.wires[index] else { return };
        let link = LinkId(u8::try_from(index).unwrap_or(u8::MAX));
        let owed = &mut self.owed[index];
        let mut sink = Sink {
            client: &mut self.client,
            requests: &self.requests,
            bounces: &mut self.bounces,
            owed,
            traffic: &mut self.traffic,
            link,
            now: self.now,
        };
        let owed_before = sink.owed.answers;
        let received = wire.connection.receive(&mut sink);
        if self.owed[index].answers != owed_before {
            self.last_request = self.now;
        }
        if let Err(error) = received {
            self.lost(index, &error);
        }
    }

    fn lost(&mut self, index: usize, error: &ConnectionError) {
        let reason = error.to_string();
        let address = self.addresses[index].as_ref().filter(|_| error.is_distrust());
        self.distrusted[index] = address.map(|address| format!("{address}: {reason}"));
        self.close(index);
        self.client.apply(Event::LinkDown(LinkId(u8::try_from(index).unwrap_or(u8::MAX)), &reason), self.now);
    }

    fn close(&mut self, index: usize) {
        self.attempts[index] += MAX_LINKS as u64;
        self.owed[index] = Owed::default();
        if let Some(mut wire) = self.wires[index].take() {
            wire.connection.shut_down();
            self.closed += wire.connection.counters();
            self.changes.push(WatchChange::Remove(wire.descriptor));
            self.closing.push(wire.connection);
        }
    }

    /// Does what the client wants done.
    fn carry_out(&mut self) {
        while let Some(output) = self.client.take_output() {
            match output {
                Output::Send(link, header, payload) => {
                    let Some(wire) = &mut self.wires[usize::from(link.0)] else { continue };
                    self.owed[usize::from(link.0)].sent(header.kind);
                    self.traffic.sent(&header);
                    if header.kind.is_request() {
                        self.last_request = self.now;
                    }
                    match payload {
                        Payload::None if header.kind == Kind::Read => {
                            // The answer's data may come by itself, to where it will be asked for.
                            wire.connection.queue_read(&header, &mut |parts| {
                                let mut answer = header.reply(Kind::IoReply, Status::Ok);
                                answer.payload = header.length;
                                let target = self.client.payload_target(link, &answer);
                                let Some((token, offset)) = target else { return };
                                if self.client.is_bounced(header.slot) {
                                    return parts.push(self.bounces.room(&answer));
                                }
                                let offset = usize::try_from(offset).unwrap_or(usize::MAX);
                                let segments = segments_of(&self.requests, token);
                                gather(segments, offset, header.length as usize, parts);
                            });
                        }
                        Payload::None => wire.connection.queue(&header, None),
                        Payload::Body(body) => wire.connection.queue(&header, Some(body)),
                        Payload::Request { token, offset, protection } => {
                            let segments = segments_of(&self.requests, token);
                            let mut offset = usize::try_from(offset).unwrap_or(usize::MAX);
                            let mut header = header;
                            let copy;
                            let segments = match protection {
                                Protection::None => segments,
                                Protection::Digest => {
                                    header.digest = Some(self.bounces.digest(&header, segments, offset));
                                    segments
                                }
                                Protection::Bounce | Protection::Salvage => {
                                    let copy_out = if protection == Protection::Salvage {
                                        buffer::salvage
                                    } else {
                                        buffer::copy_out
                                    };
                                    let (segment, digest) =
                                        self.bounces.copy(&header, segments, offset, copy_out);
                                    (header.digest, offset) = (Some(digest), 0);
                                    copy = [segment];
                                    &copy[..]
                                }
                            };
                            wire.connection.queue_data(&header, None, &mut |parts| {
                                gather(segments, offset, header.payload as usize, parts);
                            });
                        }
                    }
                }
                Output::Unbounce(slot) => self.bounces.end(slot),
                Output::Complete(token, result) => self.complete(token, result),
                Output::CommandDone(token, reply) => self.replies.push((token, reply)),
                Output::Connect(link, address) => {
                    let index = usize::from(link.0);
                    let attempt = &mut self.attempts[index];
                    *attempt += MAX_LINKS as u64;
                    *attempt = *attempt / MAX_LINKS as u64 * MAX_LINKS as u64 + u64::from(link.0);
                    self.connector.connect(*attempt, &address);
                    self.addresses[index] = Some(address);
                }
                Output::Disconnect(link) => {
                    let index = usize::from(link.0);
                    if let Some(wire) = &mut self.wires[index] {
                        // What is queued, a last word perhaps, may go out; the connection ends either way.
                        let _ = wire.connection.flush();
                    }
                    self.close(index);
                }
                Output::Notice(notice) => self.notices.push(notice),
            }
        }
    }

    fn complete(&mut self, token: Token, result: Result<(), IoError>) {
        let Ok(index) = u32::try_from(token.0) else { return };
        let request = &mut self.requests[index as usize];
        request.segments.clear();
        if let Some(token) = request.token.take() {
            self.done.push((token, result));
            self.free_requests.push(index);
        }
    }
}

fn segments_of(requests: &[Request], token: Token) -> &[Segment] {
    let index = usize::try_from(token.0).unwrap_or(usize::MAX);
    requests.get(index).map_or(&[], |r| &r.segments)
}

/// Hands arriving messages to the client, and their data to the memory of the requests.
struct Sink<'a> {
    client: &'a mut Client,
    requests: &'a [Request],
    bounces: &'a mut Bounces,
    owed: &'a mut Owed,
    traffic: &'a mut Traffic,
    link: LinkId,
    now: Time,
}

impl Sink<'_> {
    /// Holds the data of an answer against its digest, and brings what came into a copy to where it belongs. False if the data is
    /// another than the digest says.
    fn settle_data(&mut self, header: &MessageHeader) -> bool {
        let has_data = header.kind == Kind::IoReply && header.payload > 0;
        let target = if has_data { self.client.payload_target(self.link, header) } else { None };
        let Some((token, offset)) = target else { return true };
        let (segments, offset) =
            (segments_of(self.requests, token), usize::try_from(offset).unwrap_or(usize::MAX));
        let is_bounced = self.client.is_bounced(header.slot);
        let differs = header.digest.is_some_and(|digest| {
            digest
                != if is_bounced {
                    data_digest(self.bounces.data(header.slot))
                } else {
                    buffer::digest(segments, offset, header.payload as usize)
                }
        });
        if !differs && is_bounced {
            buffer::copy_in(self.bounces.data(header.slot), segments, offset);
        }
        !differs
    }
}

impl Receiver for Sink<'_> {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        let Some((token, offset)) = self.client.payload_target(self.link, header) else {
            return Place::Discard;
        };
        if self.client.is_bounced(header.slot) {
            segments.push(self.bounces.room(header));
            return Place::Data;
        }
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        gather(segments_of(self.requests, token), offset, header.payload as usize, segments);
        Place::Data
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        self.owed.received(header);
        self.traffic.received(header);
        if !self.settle_data(header) {
            let header = MessageHeader { status: Status::DigestDiffers, ..*header };
            return self.client.apply(Event::Message(self.link, &header, body), self.now);
        }
        self.client.apply(Event::Message(self.link, header, body), self.now);
    }

    fn deliver_faulted(&mut self, header: &MessageHeader) -> bool {
        self.owed.received(header);
        self.traffic.received(header);
        self.client.apply(Event::MemoryFault(header.slot, header.sequence), self.now);
        true
    }
}

#[cfg(test)]
#[allow(unsafe_code, clippy::expect_used)]
mod fake_node;
#[cfg(test)]
#[allow(clippy::cast_possible_truncation)]
mod node_tests;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{ClientId, PoolId};

    fn header(kind: Kind) -> MessageHeader {
        MessageHeader::new(kind, PoolId::random())
    }

    #[test]
    fn a_link_wakes_the_loop_for_what_no_other_link_will_say() {
        let write = |owed: &mut Owed| owed.sent(Kind::Write);
        let mut owed = Owed::default();
        write(&mut owed);
        assert!(owed.wakes(true, 1, false, false) && !owed.wakes(false, 1, true, false));
        assert!(owed.wakes(false, 1, false, true), "the leading link says nothing");
        write(&mut owed);
        assert!(owed.wakes(false, 1, false, false), "it owes more than the leading one");
        owed.received(&header(Kind::IoReply));
        owed.received(&header(Kind::IoReply));
        assert!(!owed.wakes(false, 0, false, false) && owed.wakes(false, 0, true, false));
        assert!(owed.wakes(false, 0, false, true), "what it says unasked is heard");
        owed.sent(Kind::SetView);
        assert!(owed.wakes(false, 9, false, false));
        owed.received(&header(Kind::SetViewReply));
        assert!(!owed.wakes(false, 9, false, false));
    }

    #[test]
    fn messages_that_are_not_answered_or_not_asked_for_change_nothing_of_what_is_owed() {
        let mut owed = Owed::default();
        owed.sent(Kind::Write);
        for kind in [Kind::ClearDirty, Kind::Goodbye, Kind::CommandReply, Kind::Conditions] {
            owed.sent(kind);
        }
        for kind in [Kind::ChunksDone, Kind::Goodbye, Kind::Command, Kind::SourceFailed] {
            owed.received(&header(kind));
        }
        assert!((owed.answers, owed.control) == (1, 0), "{} {}", owed.answers, owed.control);
        // A view in several parts is answered once.
        owed.sent(Kind::SetView);
        owed.sent(Kind::SetView);
        owed.received(&header(Kind::SetViewReply));
        assert!((owed.answers, owed.control) == (1, 0), "{} {}", owed.answers, owed.control);
    }

    #[test]
    fn a_request_is_timed_from_when_it_was_made_and_not_from_the_last_wake_up() {
        let config = Config::new(ClientId::random(), "a test");
        let selector = PoolSelector::Id(PoolId::random());
        let mut driver = PoolDriver::new(config, selector, &[Address::tcp("127.0.0.1", 1)]).unwrap();
        driver.upkeep();
        let pause = Duration::from_millis(50);
        std::thread::sleep(pause);
        let before = driver.clock.now();
        driver.submit(Token(1), Operation::Flush, 0, 0, &[]);
        assert!(driver.now >= before, "the driver's time is {:?} old", before - driver.now);
    }
}
