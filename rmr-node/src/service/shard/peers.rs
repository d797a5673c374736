//! Connections of clients and nodes: accepted, greeted, read from, and closed.

use std::collections::{BTreeMap, HashMap};
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};

use rmr_common::reactor::WatchChange;
use rmr_common::replica::{ConnectionId, Event};
use rmr_common::time::Time;
use rmr_common::transport::Connection as _;
use rmr_common::wire::{Hello, Kind, MessageHeader, Status};
use vmm_sys_util::epoll::EventSet;

use super::super::ConnectionPlace;
use super::super::connection::{Greeting, MAX_BACKLOG, MAX_RDMA_BACKLOG_BYTES, Peer, Sink};
use super::super::member::Member;
use super::{Handover, Phase, Shard, Turn, Waiter};

/// Connections that are accepted in one wake-up, so that a flood of them does not stop I/O.
const ACCEPT_BATCH: usize = 16;
/// What the connections of one member may make the shard do in one loop iteration, in bytes: several times what one
/// connection may. The other members of the shard wait no longer than that.
const TURN_BUDGET: usize = 4 << 20;
/// A connection is read after so many loop iterations in which others of its member had spent that.
const MAX_PASSED_OVER: u8 = 16;

impl Shard {
    /// What follows when something came over RDMA: memory that was given back, or is wanted, and completions.
    pub(super) fn rdma_received(&mut self, id: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let stands = peer.in_line;
        let Some(rdma) = peer.wire.rdma() else { return };
        let mut returned = Vec::new();
        rdma.take_returned(&mut returned);
        if let Some(windows) = self.windows.get_mut(&id) {
            returned.into_iter().for_each(|window| windows.take_back(window));
        }
        if peer.wire.backlog() > MAX_BACKLOG || peer.wire.backlog_bytes() > MAX_RDMA_BACKLOG_BYTES {
            // Over TCP it would not be read any more; here it does not keep to what it may have outstanding.
            return self.lost(id, "it asks, and does not take the answers");
        }
        let Some(rdma) = peer.wire.rdma() else { return };
        if rdma.peer_wants() > 0 && !stands && (self.short || !matches!(self.lend(id), Turn::Served)) {
            self.stand_in_line(Waiter::Connection(id));
        }
        self.queue(id);
    }

    pub(super) fn receive(&mut self, id: ConnectionId) {
        self.take_in(id);
        self.rdma_received(id);
        if self.peers.get(&id).is_some_and(|p| p.wire.is_starved()) {
            self.stand_in_line(Waiter::Connection(id));
        }
    }

    /// Takes in what has arrived; returns how many buffers it was given.
    pub(super) fn take_in(&mut self, id: ConnectionId) -> usize {
        let Some(peer) = self.peers.get_mut(&id) else { return 0 };
        let (mut greeting, mut proof, mut error, mut found, mut delivered) = (None, None, None, 0, false);
        let mut commands = Vec::new();
        let (index, was_starved) = (peer.member, peer.wire.is_starved());
        let member = index.and_then(|index| self.members[index].as_mut());
        // A member whose clients have had their share of this loop iteration is not read before the next one.
        // The client that holds the pool always is, and so is a connection whose turn did not come for long.
        let is_over = |m: &&mut Member| m.spent >= TURN_BUDGET && m.replica.holder_connection() != Some(id);
        if member.as_ref().is_some_and(is_over) && peer.passed_over < MAX_PASSED_OVER {
            peer.passed_over += 1;
            self.again = true;
            return 0;
        }
        peer.passed_over = 0;
        let mut spent = 0;
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
            role: peer.role,
            spent: &mut spent,
            commands: &mut commands,
            error: &mut error,
            now: self.now,
        };
        let received = peer.wire.receive(&mut sink);
        if let Some(member) = index.and_then(|index| self.members[index].as_mut()) {
            member.spent += spent;
        }
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
    pub(super) fn greet(&mut self, id: ConnectionId, greeting: Greeting) {
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
                if let Some(why) = self.shared.why_left_out(greeting.pool, &hello.pool_name) {
                    // Not that there is no such pool: it may be back in a moment, and the client continues to ask.
                    let text = format!("node {}: {why}", self.shared.config.node_name);
                    return self.turn_away(id, &greeting.header, Status::Stopping, text);
                }
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

    pub(in crate::service) fn refuse(
        &mut self,
        id: ConnectionId,
        header: &MessageHeader,
        status: Status,
        text: String,
    ) {
        if let Some(peer) = self.peers.get(&id)
            && let Some(withheld) = self.throttles.refused.admit(self.now)
        {
            tracing::info!(client = %peer.address, withheld, "{text}");
        }
        self.turn_away(id, header, status, text);
    }

    /// Answers a hello with these words, and nothing after them.
    pub(in crate::service) fn turn_away(
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

    pub(super) fn accept(&mut self, descriptor: RawFd) {
        let Some(listener) = self.listeners.iter_mut().find(|l| l.as_raw_fd() == descriptor) else { return };
        let mut accepted = 0;
        let throttles = &mut self.throttles;
        while accepted < ACCEPT_BATCH {
            accepted += 1;
            let mut place = None;
            let mut admit = |address: SocketAddr| match ConnectionPlace::take(&self.shared, address.ip()) {
                Ok(taken) => {
                    place = Some(taken);
                    true
                }
                Err((setting, most)) => {
                    if let Some(withheld) = throttles.full.admit(self.now) {
                        tracing::warn!(
                            client = %address, withheld,
                            "connection refused: there are {most}, as many as {setting}"
                        );
                    }
                    false
                }
            };
            let (wire, address) = match listener.accept(&mut admit) {
                Ok(accepted) => accepted,
                Err(error) => match error.kind() {
                    ErrorKind::WouldBlock => break,
                    ErrorKind::ConnectionRefused => continue,
                    ErrorKind::AddrNotAvailable => {
                        self.logs.log("device", |withheld| {
                            tracing::error!(
                                withheld,
                                "no clients come over RDMA until the device is back: {error}"
                            );
                        });
                        return;
                    }
                    // It went away before it was accepted, or is no peer.
                    ErrorKind::ConnectionAborted | ErrorKind::Interrupted => {
                        if let Some(withheld) = throttles.accept.admit(self.now) {
                            tracing::warn!(withheld, "a connection was not accepted: {error}");
                        }
                        continue;
                    }
                    _ => {
                        // For want of descriptors or memory as a rule. The listener stays readable all the while.
                        self.logs.log("accept", |withheld| {
                            tracing::warn!(
                                withheld,
                                "cannot accept connections, trying again in a second: {error}"
                            );
                        });
                        return self.listen(false);
                    }
                },
            };
            let (Some(descriptor), Some(place)) = (wire.descriptor(), place) else { continue };
            let peer = Peer::new(wire, descriptor, address, place, self.now);
            Self::insert(&mut self.next_connection, &mut self.peers, &mut self.by_descriptor, peer);
            self.changes.push(WatchChange::Add(descriptor, EventSet::IN));
        }
        self.limit_strangers();
    }

    /// Closes connections that have not been greeted, when there are too many of them: the oldest one of the address that has
    /// most, until the others fit. So who comes to be greeted finds a place, and a flood displaces itself.
    fn limit_strangers(&mut self) {
        let most = self.shared.config.max_strangers();
        loop {
            let mut all = 0;
            // The oldest of each address, and how many it has.
            let mut by_address: BTreeMap<IpAddr, (usize, Time, ConnectionId)> = BTreeMap::new();
            for (id, peer) in self.peers.iter().filter(|(_, p)| p.member.is_none()) {
                all += 1;
                let entry = by_address.entry(peer.address.ip()).or_insert((0, peer.since, *id));
                entry.0 += 1;
                if (peer.since, *id) < (entry.1, entry.2) {
                    (entry.1, entry.2) = (peer.since, *id);
                }
            }
            if all <= most {
                return;
            }
            let Some(&(of_address, _, oldest)) =
                by_address.values().max_by_key(|(n, since, _)| (*n, std::cmp::Reverse(*since)))
            else {
                return;
            };
            if let (Some(withheld), Some(peer)) =
                (self.throttles.strangers.admit(self.now), self.peers.get(&oldest))
            {
                tracing::warn!(
                    client = %peer.address, withheld,
                    "closing a connection that has not said which pool it wants: there are {all} of them, {of_address} of this \
                     address, and {most} may be (a quarter of max_connections)"
                );
            }
            self.lost(oldest, "too many connections that were not greeted");
        }
    }

    /// Watches the listeners, or leaves them alone for a while.
    pub(super) fn listen(&mut self, listens: bool) {
        self.listens = listens;
        let set = if listens { EventSet::IN } else { EventSet::empty() };
        self.changes.extend(self.listeners.iter().map(|l| WatchChange::Modify(l.as_raw_fd(), set)));
    }

    pub(super) fn insert(
        next: &mut u32,
        peers: &mut BTreeMap<ConnectionId, Peer>,
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
    pub(super) fn lost(&mut self, id: ConnectionId, reason: &str) {
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
    pub(super) fn close(&mut self, id: ConnectionId, reason: &str) {
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

    /// Tells clients that the node stops. Those that hold a pool end what they are doing and leave; nobody waits for
    /// others.
    pub(super) fn say_goodbye(&mut self) {
        self.say_goodbye_for(None, "the node is stopping");
    }

    /// The same for the clients of one member, whose store is being closed, or of all.
    pub(super) fn say_goodbye_for(&mut self, index: Option<usize>, reason: &str) {
        let is_its = |peer: &Peer| index.is_none() || peer.member == index;
        let all: Vec<_> = self.peers.iter().filter(|(_, p)| is_its(p)).map(|(id, _)| *id).collect();
        for id in all {
            let Some(peer) = self.peers.get_mut(&id) else { continue };
            let member = peer.member.and_then(|m| self.members[m].as_ref());
            if let Some(member) = member {
                let (header, body) = member.replica.goodbye();
                peer.wire.queue(&header, Some(body));
            }
            if member.is_some_and(|m| m.replica.holder_connection() == Some(id)) {
                self.queue(id);
            } else {
                // What does not go out at once is lost with the connection, which says the same.
                let _ = peer.wire.flush();
                peer.parts = true;
                self.lost(id, reason);
            }
        }
    }

    pub(super) fn close_all(&mut self, reason: &str) {
        let all: Vec<_> = self.peers.keys().copied().collect();
        for id in all {
            self.lost(id, reason);
        }
    }
}
