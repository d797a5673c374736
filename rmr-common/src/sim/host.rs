//! A client and its guest: what the client asks for, and what becomes of its requests.

use std::collections::BTreeMap;
use std::time::Duration;

use super::network::Message;
use super::oracle::{Oracle, SECTOR, Step, WriteId};
use super::world::{Check, Event, World, trace};
use crate::client::{self, Client, LinkId, Operation, Payload, PoolSelector, Token};
use crate::pool::{ClientId, Epoch, MemberId, Sequence, Slot, View};
use crate::time::Time;
use crate::wire::{Kind, MessageHeader};

/// A request that a client has not finished.
pub(super) struct Request {
    pub(super) operation: Operation,
    pub(super) first: usize,
    pub(super) count: usize,
    pub(super) start: Step,
    pub(super) write: Option<WriteId>,
    pub(super) memory: Vec<u64>,
    /// How often the guest has changed the memory of a write.
    pub(super) changes: u64,
    /// Some of the memory could not be reached.
    pub(super) faulted: bool,
}

/// A client and the machine it runs on.
pub(super) struct Host {
    pub(super) client: Client,
    pub(super) id: u8,
    pub(super) links: Vec<Option<usize>>,
    /// The node that each link that is down led to.
    pub(super) lost_node: Vec<Option<usize>>,
    pub(super) requests: BTreeMap<u64, Request>,
    /// Writes that were sent with something else in place of memory that could not be read, which the client is to hear of.
    pub(super) faults: Vec<(Slot, Sequence)>,
    /// The view that the client last said to be committed.
    pub(super) committed: Option<View>,
    /// Another client has attached since this one did.
    pub(super) is_fenced: bool,
    pub(super) is_crashed: bool,
    /// The operator's decision that it carries out: with which member to go on, and when that was said.
    pub(super) forces: Option<(MemberId, Duration)>,
    /// The history of the pool to which it attached: see `sim/force.rs`.
    pub(super) branch: Option<usize>,
    /// The highest epoch that a node has shown it.
    pub(super) heard: Epoch,
    /// It was started for a command, and has no guest.
    pub(super) is_admin: bool,
    /// A view change is under way.
    pub(super) is_changing: bool,
    /// The machines' runs when the view was committed.
    pub(super) host_boots: Vec<u8>,
    /// It said that writes were lost, and its guest has not reset the device.
    pub(super) has_lost_writes: bool,
    pub(super) last_flush: u64,
    pub(super) tick_at: u64,
    /// What the driver keeps: copies by slot, and the digest of the last message.
    pub(super) copies: BTreeMap<u16, Vec<u64>>,
    pub(super) digest: Option<((u16, u64, u64, u64), u32)>,
    pub(super) partitioned: Vec<bool>,
    /// Messages between the client and a node arrive no earlier than this.
    pub(super) stalled_until: Vec<u64>,
}

impl Host {
    pub(super) fn is_live(&self) -> bool {
        !self.is_crashed && self.client.over().is_none()
    }
}

impl World<'_> {
    pub(super) fn start_host(&mut self, id: u8, takeover: bool) {
        let mut config = self.profile.client.clone();
        config.client = ClientId::from_bytes([id; 16]);
        config.description = format!("client {id}");
        config.takeover = takeover;
        let by_name = self.rng.percent(50);
        let selector =
            if by_name { PoolSelector::Name("pool".into()) } else { PoolSelector::Id(self.spec.id) };
        let mut addresses = self.seeds();
        let seeds = self.rng.range(1, addresses.len() as u64);
        // A client that knows one node finds the others; but then that node must be up.
        let seeds = if self.is_calm || self.rng.percent(50) { addresses.len() as u64 } else { seeds };
        self.prefer_forced(config.force_from, &mut addresses);
        addresses.truncate(usize::try_from(seeds).unwrap_or(1));
        // It may know of a node that was in use once.
        let all: Vec<_> = self.nodes.iter().map(|n| n.address.clone()).collect();
        if self.has_operator() && config.force_from.is_none() && self.rng.percent(30) {
            let turn = self.rng.index(all.len());
            let other = self.asked_at(&all[turn]);
            addresses.retain(|a| *a != other);
            addresses.insert(0, other);
            addresses.truncate(crate::pool::MAX_MEMBERS);
        }
        let client = Client::new(config, selector, &addresses, Time(self.now));
        let nodes = self.nodes.len();
        self.hosts.push(Host {
            client,
            id,
            links: vec![None; client::MAX_LINKS],
            lost_node: vec![None; client::MAX_LINKS],
            requests: BTreeMap::new(),
            faults: Vec::new(),
            committed: None,
            is_fenced: false,
            is_crashed: false,
            forces: None,
            branch: None,
            heard: Epoch(0),
            is_admin: false,
            is_changing: false,
            host_boots: vec![0; nodes],
            has_lost_writes: false,
            last_flush: u64::MAX,
            tick_at: u64::MAX,
            copies: BTreeMap::new(),
            digest: None,
            partitioned: vec![false; nodes],
            stalled_until: vec![0; nodes],
        });
        let host = self.hosts.len() - 1;
        trace!(self, "client {host} starts as {id}, takeover: {takeover}");
        self.aim_at_new(host);
        self.client_outputs(host).unwrap_or_default();
    }

    /// Gives an event to a client, and carries out what it asks for.
    pub(super) fn client(&mut self, host: usize, event: client::Event<'_>) -> Check {
        let now = Time(self.now);
        self.cover_client_event(host, &event);
        self.hosts[host].client.apply(event, now);
        self.check_verify(host)?;
        self.client_outputs(host)?;
        self.check_joining(host)
    }

    pub(super) fn client_outputs(&mut self, host: usize) -> Check {
        loop {
            let Some(output) = self.hosts[host].client.take_output() else {
                // As a driver does: once all of it is sent, and before any answer.
                let Some((slot, sequence)) = self.hosts[host].faults.pop() else { break };
                let now = Time(self.now);
                self.hosts[host].client.apply(client::Event::MemoryFault(slot, sequence), now);
                continue;
            };
            match output {
                client::Output::Connect(link, address) => {
                    let node = self.node_at(&address);
                    let node = node.ok_or_else(|| format!("a connection to {address}, which is no node"))?;
                    let delay = self.rng.range(1, self.profile.network_delay * 2);
                    self.after(delay, Event::Connected { host, link, node, binding: address.transport() });
                }
                client::Output::Disconnect(link) => {
                    if let Some(connection) = self.hosts[host].links[usize::from(link.0)] {
                        trace!(self, "client {host} closes connection {connection}");
                        self.client_closes(connection);
                    }
                }
                client::Output::Send(link, header, payload) => {
                    self.client_sends(host, link, header, payload)?;
                }
                client::Output::Unbounce(slot) => {
                    self.hosts[host].copies.remove(&slot.0);
                }
                client::Output::Complete(token, result) => self.complete(host, token, result)?,
                client::Output::CommandDone(token, reply) => self.answered(token.0, false, reply)?,
                client::Output::Notice(notice) => {
                    trace!(self, "client {host}: {notice:?}");
                    self.client_notice(host, notice)?;
                }
            }
        }
        let deadline = self.hosts[host].client.deadline().0.max(self.now + 1);
        if self.hosts[host].is_live() && deadline < self.hosts[host].tick_at {
            self.hosts[host].tick_at = deadline;
            self.at(deadline, Event::HostTick(host, deadline));
        }
        Ok(())
    }

    fn client_sends(&mut self, host: usize, link: LinkId, header: MessageHeader, payload: Payload) -> Check {
        let connection = self.hosts[host].links[usize::from(link.0)];
        let mut message = Message { header, body: Vec::new(), data: Vec::new() };
        if let Some(connection) = connection {
            if let Payload::Body(body) = &payload {
                self.check_pause(host, self.connections[connection].node, &header, body)?;
            }
            self.cover_conditions(&header);
            self.check_binding(connection, &header)?;
            self.tempt_fate(host, self.connections[connection].node, &header);
            self.tempt_operator(host, self.connections[connection].node, &header);
            self.take_aim(host, self.connections[connection].node, &header);
            self.tempt_force(host, self.connections[connection].node, &header);
        }
        match payload {
            Payload::None => {}
            Payload::Body(body) => message.body = body,
            Payload::Request { token, offset, protection } => {
                let first = usize::try_from(offset / SECTOR).unwrap_or(usize::MAX);
                let count = usize::try_from(u64::from(header.payload) / SECTOR).unwrap_or(usize::MAX);
                self.protected_data(host, token, first..first + count, protection, &mut message)?;
            }
        }
        if header.kind == Kind::Read {
            self.check_read_from(host, connection)?;
        } else if header.kind.is_request() {
            self.check_sent_to(host, connection)?;
        }
        if header.kind == Kind::Hello
            && let Some(connection) = connection
        {
            self.cover_stranger(self.connections[connection].node);
        }
        let Some(connection) = connection else {
            return Err(format!("client {host} sends {:?} on {link:?}, which is not connected", header.kind));
        };
        if header.kind == Kind::SetView {
            self.note_proposal(host, &message.body)?;
        }
        self.send(connection, true, message)
    }

    /// Gives a request to a client.
    pub(super) fn submit(&mut self, host: usize, operation: Operation, first: usize, count: usize) -> Check {
        self.step += 1;
        let token = Token(self.next_token);
        self.next_token += 1;
        let zero = operation != Operation::Write;
        let write = operation.is_write().then(|| {
            // What a client that lost its place writes must never be seen.
            let (step, is_fenced) = (self.step, self.hosts[host].is_fenced);
            let oracle = self.oracle_of(host);
            // It may think of the pool as larger than it is, before it has attached.
            let is_beyond = first + count > oracle.len();
            if is_fenced || is_beyond { oracle.reserve(step) } else { oracle.begin(first, count, zero, step) }
        });
        let memory = match (operation, write) {
            (Operation::Write, Some(id)) => (0..count).map(|i| Oracle::stamp(id, i)).collect(),
            (Operation::Read, _) => vec![u64::MAX; count],
            _ => Vec::new(),
        };
        let request =
            Request { operation, first, count, start: self.step, write, memory, changes: 0, faulted: false };
        trace!(self, "client {host}: {token:?} {operation:?} sectors {first}+{count} as write {write:?}");
        self.hosts[host].requests.insert(token.0, request);
        let (offset, length) = (first as u64 * SECTOR, count as u64 * SECTOR);
        self.hosts[host].client.submit(token, operation, offset, length, Time(self.now));
        self.client_outputs(host)
    }

    pub(super) fn complete(
        &mut self,
        host: usize,
        token: Token,
        result: Result<(), client::IoError>,
    ) -> Check {
        self.step += 1;
        trace!(self, "client {host}: {token:?} ends: {result:?}");
        let request = self.hosts[host].requests.remove(&token.0);
        let request = request.ok_or_else(|| format!("client {host} completed {token:?} twice"))?;
        let step = self.step;
        let described = |e: String| format!("client {host}, {token:?} {:?}: {e}", request.operation);
        if request.faulted != (result == Err(client::IoError::Memory)) && (result.is_ok() || !request.faulted)
        {
            return Err(described(format!("memory faulted: {}, but ends with {result:?}", request.faulted)));
        }
        if let Err(error) = result {
            let end = (request.first + request.count) as u64 * SECTOR;
            let is_beyond = self.hosts[host].client.spec().is_some_and(|s| end > s.size);
            if !(error == client::IoError::BadRange && is_beyond && self.has_branches()) {
                self.check_error(host, error).map_err(described)?;
            }
            if let Some(write) = request.write {
                self.oracle_of(host).refuse(write, request.first, request.count, step);
            }
            return Ok(());
        }
        if self.hosts[host].has_lost_writes {
            return Err(described("served although writes were lost, and the guest does not know".into()));
        }
        self.aim_at_completed(host, &request);
        match request.operation {
            Operation::Read => {
                let oracle = self.oracle_of(host);
                for (i, &value) in request.memory.iter().enumerate() {
                    oracle.read(request.first + i, value, request.start, step).map_err(described)?;
                }
                if self.is_astray(host) {
                    self.coverage.hit("force: a client of an older branch reads");
                }
                Ok(())
            }
            Operation::Flush => self.check_flushed(host, &request).map_err(described),
            Operation::Write | Operation::Discard | Operation::WriteZeroes => {
                let reads = self.hosts.iter().flat_map(|h| h.requests.values());
                let oldest = reads.map(|r| r.start).min().unwrap_or(step).min(step);
                if let Some(write) = request.write {
                    self.oracle_of(host).acknowledge(
                        write,
                        request.first,
                        request.count,
                        step,
                        oldest.saturating_sub(1),
                    );
                }
                self.check_written(host, &request).map_err(described)
            }
        }
    }
}
