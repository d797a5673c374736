//! The network between clients and nodes: connections that keep order, break, and damage what they carry.

use super::oracle::{Oracle, SECTOR};
use super::world::{Check, Event, World, trace};
use crate::auth::Nonce;
use crate::client::{self, LinkId, Protection, Token};
use crate::pool::{Address, MemberSpec, TransportKind, View};
use crate::replica::{self, BufferToken, ConnectionId};
use crate::wire::{Hello, Kind, MessageHeader, Role, Status};

/// A message on its way.
pub(super) struct Message {
    pub(super) header: MessageHeader,
    pub(super) body: Vec<u8>,
    pub(super) data: Vec<u64>,
}

/// A connection. Messages keep their order in each direction.
pub(super) struct Connection {
    pub(super) host: usize,
    link: LinkId,
    pub(super) node: usize,
    binding: TransportKind,
    life: u32,
    /// The run of the node's machine.
    pub(super) host_boot: u8,
    is_greeted: bool,
    /// Nothing that is on its way arrives any more.
    pub(super) is_cut: bool,
    pub(super) client_closed: bool,
    node_closed: bool,
    /// The client does not hear of its end before.
    pub(super) silent_until: u64,
    /// The node was told, so that nothing of the connection may come up any more.
    is_forgotten: bool,
    last_to_node: u64,
    last_to_client: u64,
}

impl Connection {
    /// Whether the node still listens to it.
    pub(super) const fn is_open(&self) -> bool {
        !self.is_cut && !self.client_closed && !self.node_closed
    }
}

impl World<'_> {
    /// Sends data with the digest that it has; the guest may have changed it since, before any leg was sent it or between.
    pub(super) fn protected_data(
        &mut self,
        host: usize,
        token: Token,
        range: std::ops::Range<usize>,
        protection: Protection,
        message: &mut Message,
    ) -> Check {
        let header = message.header;
        let missing = || format!("{token:?} sends data it does not have");
        let memory = |world: &Self| {
            let request = world.hosts[host].requests.get(&token.0);
            request.and_then(|r| r.memory.get(range.clone())).map(<[u64]>::to_vec).ok_or_else(missing)
        };
        let slot = header.slot.0;
        match protection {
            Protection::None => {
                message.data = memory(self)?;
                if self.is_memory_taken() {
                    self.take_memory(host, token, &range, message);
                }
            }
            Protection::Bounce | Protection::Salvage => {
                let copy = match self.hosts[host].copies.get(&slot) {
                    Some(copy) if copy.len() == range.len() => copy.clone(),
                    Some(_) => return Err(format!("slot {slot} has a copy of another request")),
                    None => memory(self)?,
                };
                self.hosts[host].copies.insert(slot, copy.clone());
                message.header.digest = Some(digest_of(&copy));
                message.data = copy;
                self.coverage.hit("write sent from a copy");
            }
            Protection::Digest => {
                let key = (slot, header.sequence.0, header.epoch.0, header.view.0);
                let digest = match self.hosts[host].digest {
                    Some((last, digest)) if last == key => digest,
                    _ => digest_of(&memory(self)?),
                };
                self.hosts[host].digest = Some((key, digest));
                message.header.digest = Some(digest);
                if self.rng.percent(self.profile.restless) {
                    self.change_memory(host, token, &range);
                }
                message.data = memory(self)?;
            }
        }
        Ok(())
    }

    /// Whether a transfer finds that the guest's memory cannot be reached. Not where clients die often: none dies before it has
    /// dealt with that ([`World::can_die`]).
    fn is_memory_taken(&mut self) -> bool {
        let profile = &self.profile;
        profile.restless > 0 && !profile.client_crashes && !self.is_calm && self.rng.percent(2)
    }

    /// Some of the memory of a write cannot be read for this leg: it is sent zeroes in place of it. The client may find the memory
    /// readable again, or not.
    fn take_memory(
        &mut self,
        host: usize,
        token: Token,
        range: &std::ops::Range<usize>,
        message: &mut Message,
    ) {
        let first = self.rng.index(range.len());
        let is_back = self.rng.percent(50);
        let Some(request) = self.hosts[host].requests.get_mut(&token.0) else { return };
        let Some(write) = request.write else { return };
        request.faulted = true;
        let start = request.first + range.start;
        message.data[first..].fill(0);
        if !is_back {
            request.memory[range.start + first..range.end].fill(0);
        }
        for sector in start + first..start + range.len() {
            self.oracle_of(host).vary(write, sector, 0);
        }
        self.hosts[host].faults.push((message.header.slot, message.header.sequence));
        self.coverage.hit("memory of a write taken away");
    }

    /// The guest changes a sector of the memory that it writes from.
    fn change_memory(&mut self, host: usize, token: Token, range: &std::ops::Range<usize>) {
        let index = range.start + self.rng.index(range.len());
        let Some(request) = self.hosts[host].requests.get_mut(&token.0) else { return };
        let Some(write) = request.write else { return };
        request.changes += 1;
        let value = Oracle::stamp(write, index) | (request.changes & 0xff) << 16;
        request.memory[index] = value;
        let sector = request.first + index;
        self.oracle_of(host).vary(write, sector, value);
        self.coverage.hit("guest changed memory in flight");
    }

    pub(super) fn send(&mut self, index: usize, to_node: bool, mut message: Message) -> Check {
        let decoded = MessageHeader::decode(&message.header.encode());
        if decoded != Ok(message.header) {
            return Err(format!("{:?} does not survive the wire: {decoded:?}", message.header));
        }
        let is_damaged = message.header.digest.is_some()
            && !self.is_calm
            && self.profile.damage > 0
            && self.rng.range(0, 999) < self.profile.damage;
        if is_damaged && let Some(first) = message.data.first_mut() {
            self.coverage.hit("data damaged on its way");
            self.had_errors = true;
            *first ^= 1 << 63;
        }
        let delay = self.rng.range(1, self.profile.network_delay);
        let connection = &self.connections[index];
        let closed = if to_node { connection.client_closed } else { connection.node_closed };
        if closed || connection.is_cut {
            return Ok(());
        }
        trace!(
            self,
            "connection {index} {} {:?} slot {} sequence {} epoch {} view {} {}+{} {:?}",
            if to_node { "→" } else { "←" },
            message.header.kind,
            message.header.slot,
            message.header.sequence,
            message.header.epoch,
            message.header.view,
            message.header.offset,
            message.header.length,
            message.header.status
        );
        let connection = &mut self.connections[index];
        let stalled = self.hosts[connection.host].stalled_until[connection.node];
        let last = if to_node { &mut connection.last_to_node } else { &mut connection.last_to_client };
        *last = (self.now + delay).max(stalled).max(*last + 1);
        let (at, event) = if to_node {
            (*last, Event::ToNode(index, message))
        } else {
            (*last, Event::ToClient(index, message))
        };
        self.at(at, event);
        Ok(())
    }

    pub(super) fn deliver_to_node(&mut self, index: usize, message: Message) -> Check {
        let connection = &self.connections[index];
        let (node, is_greeted) = (connection.node, connection.is_greeted);
        // A node that closes a connection may have read messages before that it looks at afterwards.
        let is_late = connection.node_closed && !connection.is_forgotten && self.rng.percent(50);
        let connection = &self.connections[index];
        let is_deaf = connection.is_cut || connection.is_forgotten || (connection.node_closed && !is_late);
        if is_deaf || self.nodes[node].life != connection.life || self.nodes[node].replica.is_none() {
            return Ok(());
        }
        self.lie(node)?;
        let header = message.header;
        if self.is_unheard(node, &header) {
            return Ok(());
        }
        if header.kind == Kind::Hello {
            return self.greet(index, node, &header, &message.body);
        }
        if !is_greeted || header.pool != self.spec.id {
            return Err(format!("{:?} for pool {} before the hello", header.kind, header.pool));
        }
        let mut header = header;
        if header.kind == Kind::Write && header.digest.is_some_and(|d| d != digest_of(&message.data)) {
            header.status = Status::DigestDiffers;
            self.coverage.hit("write refused for its digest");
        }
        let buffer = (header.kind == Kind::Write).then(|| {
            let node = &mut self.nodes[node];
            node.next_buffer += 1;
            node.buffers.insert(node.next_buffer, (message.data, header));
            BufferToken(node.next_buffer)
        });
        self.cover_message(node, &header);
        let connection = ConnectionId(u32::try_from(index).unwrap_or(u32::MAX));
        let event = replica::Event::Message {
            connection,
            role: Role::Client,
            header: &header,
            body: &message.body,
            buffer,
        };
        let before = self.before_message(node, &header, &message.body);
        let held = self.held_against(node, &header, &message.body);
        self.replica(node, event)?;
        self.check_held(node, held)?;
        self.after_message(node, before)
    }

    fn greet(&mut self, index: usize, node: usize, header: &MessageHeader, body: &[u8]) -> Check {
        let hello = Hello::decode(body).map_err(|e| e.to_string())?;
        let Some(replica) = &self.nodes[node].replica else { return Ok(()) };
        let is_known = header.pool == self.spec.id || hello.pool_name == self.spec.name;
        let mut reply = header.reply(Kind::HelloReply, Status::Ok);
        let body = match replica.greet(&hello) {
            Ok(reply) if is_known => reply.encode(),
            Ok(_) => return Err(format!("a hello asks for pool {} '{}'", header.pool, hello.pool_name)),
            Err(error) => return Err(error),
        };
        reply.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.connections[index].is_greeted = true;
        self.send(index, false, Message { header: reply, body, data: Vec::new() })
    }

    pub(super) fn deliver_to_client(&mut self, index: usize, mut message: Message) -> Check {
        let connection = &self.connections[index];
        let (host, link) = (connection.host, connection.link);
        if connection.is_cut || connection.client_closed {
            return Ok(());
        }
        if !message.data.is_empty()
            && let Some((token, offset)) = self.hosts[host].client.payload_target(link, &message.header)
        {
            // A guest may scribble over the memory that it reads into; then its data is not what was sent.
            let is_scribbled = !self.hosts[host].client.is_bounced(message.header.slot) && self.scribbles > 0;
            self.scribbles -= u64::from(is_scribbled);
            let differs = message.header.digest.is_some_and(|d| d != digest_of(&message.data));
            if message.header.digest.is_some() && (is_scribbled || differs) {
                message.header.status = Status::DigestDiffers;
                self.coverage.hit("read repeated for its digest");
                let bytes = message.header.offset..message.header.offset + u64::from(message.header.length);
                self.nodes[self.connections[index].node].disk.read_badly(&bytes);
            }
            let is_taken = !self.hosts[host].client.is_bounced(message.header.slot) && self.is_memory_taken();
            let request = self.hosts[host].requests.get_mut(&token.0);
            let request = request.ok_or_else(|| format!("data for {token:?}, which is finished"))?;
            if is_taken {
                request.faulted = true;
                self.coverage.hit("memory of a read taken away");
                let (slot, sequence) = (message.header.slot, message.header.sequence);
                return self.client(host, client::Event::MemoryFault(slot, sequence));
            }
            let first = usize::try_from(offset / SECTOR).unwrap_or(usize::MAX);
            let place = request.memory.get_mut(first..first + message.data.len());
            place.ok_or("data beyond the memory of a request")?.copy_from_slice(&message.data);
        }
        self.cover_to_client(host, &message.header);
        let node = self.connections[index].node;
        let is_hello = message.header.kind == Kind::HelloReply;
        let must_end = is_hello && self.heard_of(host, node, &message.body);
        self.client(host, client::Event::Message(link, &message.header, &message.body))?;
        if must_end { self.check_ended(host, node) } else { Ok(()) }
    }

    pub(super) fn connected(
        &mut self,
        host: usize,
        link: LinkId,
        node: usize,
        binding: TransportKind,
    ) -> Check {
        if !self.hosts[host].is_live() {
            return Ok(());
        }
        let is_reachable = self.nodes[node].replica.is_some() && !self.hosts[host].partitioned[node];
        if !is_reachable || (!self.is_calm && self.rng.percent(3)) {
            return self.client(host, client::Event::LinkDown(link, "connection refused"));
        }
        self.connections.push(Connection {
            host,
            link,
            node,
            binding,
            life: self.nodes[node].life,
            host_boot: self.nodes[node].host_boot,
            is_greeted: false,
            is_cut: false,
            client_closed: false,
            node_closed: false,
            silent_until: 0,
            is_forgotten: false,
            last_to_node: 0,
            last_to_client: 0,
        });
        self.hosts[host].links[usize::from(link.0)] = Some(self.connections.len() - 1);
        self.client(host, client::Event::LinkUp(link, Nonce([0; 32])))
    }

    /// A member is used in no other way than its address says, unless the operator said to use it.
    pub(super) fn check_binding(&mut self, connection: usize, header: &MessageHeader) -> Check {
        let Connection { host, node, binding, .. } = self.connections[connection];
        if binding == self.nodes[node].address.transport() {
            return Ok(());
        }
        self.coverage.hit("node asked over another binding");
        let is_forced = self.hosts[host].forces.is_some_and(|(member, _)| member == self.nodes[node].member);
        if is_forced || matches!(header.kind, Kind::Hello | Kind::Proof | Kind::Ping) {
            return Ok(());
        }
        Err(format!("{:?} over {binding} for node {node}, at {}", header.kind, self.nodes[node].address))
    }

    /// A connection breaks: what is on its way is lost, and each side learns of it in its own time.
    pub(super) fn cut(&mut self, index: usize) {
        let most = self.profile.network_delay * 4;
        let (a, b) = (self.rng.range(1, most), self.rng.range(1, most));
        if !self.connections[index].is_cut {
            let host = self.connections[index].host;
            self.cover_command("leg cut", Some(host));
        }
        let connection = &mut self.connections[index];
        if std::mem::replace(&mut connection.is_cut, true) {
            return;
        }
        self.after(a, Event::NodeLoses(index));
        let heard = (self.now + b).max(self.connections[index].silent_until);
        self.at(heard, Event::ClientLoses(index));
        trace!(self, "connection {index} is cut");
    }

    /// A side closed: the other one gets what is on its way, or not, and then the end.
    pub(super) fn closed(&mut self, index: usize, by_node: bool) {
        let delay = self.rng.range(1, self.profile.network_delay);
        let in_order = self.rng.percent(70);
        let connection = &mut self.connections[index];
        if connection.is_cut {
            return;
        }
        let last = if by_node { connection.last_to_client } else { connection.last_to_node };
        let at = if in_order { (self.now + delay).max(last + 1) } else { self.now + delay };
        self.at(at, if by_node { Event::ClientLoses(index) } else { Event::NodeLoses(index) });
    }

    pub(super) fn node_closes(&mut self, index: usize) {
        if !std::mem::replace(&mut self.connections[index].node_closed, true) {
            self.closed(index, true);
        }
    }

    pub(super) fn client_closes(&mut self, index: usize) {
        let (host, link) = (self.connections[index].host, self.connections[index].link);
        self.hosts[host].links[usize::from(link.0)] = None;
        if !std::mem::replace(&mut self.connections[index].client_closed, true) {
            self.closed(index, false);
        }
    }

    pub(super) fn node_loses(&mut self, index: usize) -> Check {
        let connection = &mut self.connections[index];
        let (node, life) = (connection.node, connection.life);
        connection.is_forgotten = true;
        if std::mem::replace(&mut connection.node_closed, true) || self.nodes[node].life != life {
            return Ok(());
        }
        trace!(self, "node {node} loses connection {index}");
        let connection = ConnectionId(u32::try_from(index).unwrap_or(u32::MAX));
        self.replica(node, replica::Event::Closed(connection))
    }

    pub(super) fn client_loses(&mut self, index: usize) -> Check {
        let connection = &mut self.connections[index];
        let (host, link) = (connection.host, connection.link);
        if std::mem::replace(&mut connection.client_closed, true) {
            return Ok(());
        }
        self.hosts[host].lost_node[usize::from(link.0)] = Some(self.connections[index].node);
        self.hosts[host].links[usize::from(link.0)] = None;
        if !self.hosts[host].is_live() {
            return Ok(());
        }
        trace!(self, "client {host} loses connection {index}");
        self.client(host, client::Event::LinkDown(link, "connection lost"))
    }

    /// Addresses that a client is started with: some member that is active comes first.
    pub(super) fn seeds(&mut self) -> Vec<Address> {
        let active = self.committed.as_ref().map(View::active);
        let is_active = |m: &MemberSpec| active.is_none_or(|a| a.contains(m.id));
        let (first, rest): (Vec<_>, Vec<_>) =
            self.committed_spec.members.clone().into_iter().partition(is_active);
        let mut addresses: Vec<_> = first.into_iter().map(|m| m.address).collect();
        let turn = self.rng.index(addresses.len());
        addresses.rotate_left(turn);
        addresses.extend(rest.into_iter().map(|m| m.address));
        addresses.into_iter().map(|address| self.asked_at(&address)).collect()
    }

    /// Where a node is asked for the pool: where its member is, or over another binding.
    pub(super) fn asked_at(&self, address: &Address) -> Address {
        if self.asks_otherwise { Address::tcp(address.host(), address.port()) } else { address.clone() }
    }
}

/// The digest of sectors.
pub(super) fn digest_of(sectors: &[u64]) -> u32 {
    let mut bytes = Vec::with_capacity(std::mem::size_of_val(sectors));
    sectors.iter().for_each(|s| bytes.extend_from_slice(&s.to_le_bytes()));
    crate::wire::data_digest(&bytes)
}
