//! Connections between nodes: a stale member's link to its source, which breaks, stalls and is refused like any other.
//!
//! A node has at most one such link to another; what arrives on it at the source is a message like a client's, on a
//! connection with a number of its own.

use super::disk::SECTORS_PER_BLOCK;
use super::network::Message;
use super::oracle::SECTOR;
use super::world::{Check, Event, World, trace};
use crate::pool::Address;
use crate::replica::{self, ConnectionId, PulledData};
use crate::wire::{Kind, MAX_BODY, MessageHeader, Role, Status};

/// Connections with at least this number lead to other nodes.
pub(super) const FIRST_PEER: u32 = 1 << 24;

/// A link from a stale member's node to its source's.
pub(super) struct Peer {
    pub(super) stale: usize,
    stale_life: u32,
    pub(super) source: usize,
    source_life: u32,
    pub(super) is_cut: bool,
    stale_closed: bool,
    source_closed: bool,
    last_to_source: u64,
    last_to_stale: u64,
    /// Blocks that the stale member had pulled before.
    pub(super) pulled_before: u64,
}

impl Peer {
    /// Whether it is of these lives of its two ends.
    pub(super) const fn is_between(&self, stale: u32, source: u32) -> bool {
        self.stale_life == stale && self.source_life == source
    }

    /// Whether something can still come over it.
    pub(super) const fn is_open(&self) -> bool {
        !self.is_cut && !self.stale_closed && !self.source_closed
    }
}

impl World<'_> {
    pub(super) fn peer_connect(&mut self, node: usize, address: &Address) -> Check {
        let source = self.node_at(address);
        let source = source.ok_or_else(|| format!("a connection to {address}, which is no node"))?;
        if source == node || self.nodes[node].peer.is_some() {
            return Err(format!(
                "node {node} connects to node {source}, with {:?} open",
                self.nodes[node].peer
            ));
        }
        self.cover_peer_connect(node, source);
        self.nodes[node].peer_attempt += 1;
        let (life, attempt) = (self.nodes[node].life, self.nodes[node].peer_attempt);
        let delay = self.rng.range(1, self.profile.network_delay * 3);
        self.after(delay, Event::PeerConnected { node, life, attempt, source });
        Ok(())
    }

    pub(super) fn peer_connected(&mut self, node: usize, life: u32, attempt: u64, source: usize) -> Check {
        if self.nodes[node].life != life || self.nodes[node].peer_attempt != attempt {
            return Ok(()); // Given up meanwhile.
        }
        let is_reachable = self.nodes[source].replica.is_some() && !self.is_parted(node, source);
        if !is_reachable || (!self.is_calm && self.rng.percent(5)) {
            self.coverage.hit("link to a source refused");
            return self.replica(node, replica::Event::PeerDown("connection refused"));
        }
        let counters = self.nodes[node].replica.as_ref().map(|r| r.status().counters);
        self.peers.push(Peer {
            stale: node,
            stale_life: life,
            source,
            source_life: self.nodes[source].life,
            is_cut: false,
            stale_closed: false,
            source_closed: false,
            last_to_source: 0,
            last_to_stale: 0,
            pulled_before: counters.map_or(0, |c| c.pulled_in_blocks),
        });
        let index = self.peers.len() - 1;
        trace!(self, "node {node} has link {index} to node {source}");
        self.nodes[node].peer = Some(index);
        self.replica(node, replica::Event::PeerUp)
    }

    pub(super) fn peer_close(&mut self, node: usize) {
        self.nodes[node].peer_attempt += 1;
        let Some(index) = self.nodes[node].peer.take() else { return };
        trace!(self, "node {node} closes link {index}");
        let delay = self.rng.range(1, self.profile.network_delay);
        let peer = &mut self.peers[index];
        peer.stale_closed = true;
        let at = (self.now + delay).max(peer.last_to_source + 1);
        self.at(at, Event::SourceLoses(index));
    }

    pub(super) fn peer_send(&mut self, node: usize, header: MessageHeader) -> Check {
        let Some(index) = self.nodes[node].peer else {
            return Err(format!("node {node} sends {:?} to a source, and has no link", header.kind));
        };
        if header.payload != 0 {
            return Err(format!("node {node} sends a payload to a source: {header:?}"));
        }
        self.peer_message(index, true, Message { header, body: Vec::new(), data: Vec::new() })
    }

    /// The source answers, or closes: a connection of the node's that leads to another node.
    pub(super) fn peer_answer(&mut self, connection: ConnectionId, message: Message) -> Check {
        self.peer_message((connection.0 - FIRST_PEER) as usize, false, message)
    }

    pub(super) fn source_closes(&mut self, connection: ConnectionId) {
        let index = (connection.0 - FIRST_PEER) as usize;
        let delay = self.rng.range(1, self.profile.network_delay);
        let peer = &mut self.peers[index];
        if !std::mem::replace(&mut peer.source_closed, true) {
            let at = (self.now + delay).max(peer.last_to_stale + 1);
            self.at(at, Event::StaleLoses(index));
        }
    }

    fn peer_message(&mut self, index: usize, to_source: bool, message: Message) -> Check {
        let decoded = MessageHeader::decode(&message.header.encode());
        if decoded != Ok(message.header) {
            return Err(format!("{:?} does not survive the wire: {decoded:?}", message.header));
        }
        if message.header.payload > MAX_BODY {
            return Err(format!("a body of {} bytes: {:?}", message.header.payload, message.header));
        }
        let delay = self.rng.range(1, self.profile.network_delay);
        let peer = &self.peers[index];
        if peer.is_cut || if to_source { peer.stale_closed } else { peer.source_closed } {
            return Ok(());
        }
        if to_source && message.header.kind == Kind::Pull {
            self.aim_at_pull(self.peers[index].stale, self.peers[index].source);
        }
        let h = &message.header;
        trace!(
            self,
            "link {index} {} {:?} slot {} tag {} epoch {} view {} {}+{} {:?} payload {}",
            if to_source { "→" } else { "←" },
            h.kind,
            h.slot,
            h.sequence,
            h.epoch,
            h.view,
            h.offset,
            h.length,
            h.status,
            h.payload
        );
        let stalled = self.stalled.get(&pair(self.peers[index].stale, self.peers[index].source));
        let earliest = (self.now + delay).max(stalled.copied().unwrap_or(0));
        let peer = &mut self.peers[index];
        let last = if to_source { &mut peer.last_to_source } else { &mut peer.last_to_stale };
        *last = earliest.max(*last + 1);
        let at = *last;
        self.at(at, if to_source { Event::ToSource(index, message) } else { Event::ToStale(index, message) });
        Ok(())
    }

    pub(super) fn deliver_to_source(&mut self, index: usize, message: &Message) -> Check {
        let peer = &self.peers[index];
        let node = peer.source;
        if peer.is_cut || peer.source_closed || self.nodes[node].life != peer.source_life {
            return Ok(());
        }
        let connection = ConnectionId(FIRST_PEER + u32::try_from(index).unwrap_or(0));
        let (header, body) = (&message.header, &message.body[..]);
        self.cover_pull(node, header);
        let role = Role::Peer;
        self.replica(node, replica::Event::Message { connection, role, header, body, buffer: None })
    }

    pub(super) fn deliver_to_stale(&mut self, index: usize, message: &Message) -> Check {
        let peer = &self.peers[index];
        let node = peer.stale;
        if peer.is_cut || peer.stale_closed || self.nodes[node].life != peer.stale_life {
            return Ok(());
        }
        self.cover_pulled(node, &message.header, &message.body);
        if message.header.kind == Kind::PullReply {
            self.nodes[node].pulled.insert(message.header.sequence.0, message.data.clone());
        }
        self.replica(node, replica::Event::PeerMessage(&message.header, &message.body))?;
        if let Some(pull) = self.nodes[node].pulled.keys().next() {
            return Err(format!("node {node} keeps the data of pull {pull}, and has dealt with the answer"));
        }
        Ok(())
    }

    pub(super) fn source_loses(&mut self, index: usize) -> Check {
        let peer = &mut self.peers[index];
        let (node, life) = (peer.source, peer.source_life);
        if std::mem::replace(&mut peer.source_closed, true) || self.nodes[node].life != life {
            return Ok(());
        }
        let connection = ConnectionId(FIRST_PEER + u32::try_from(index).unwrap_or(0));
        self.replica(node, replica::Event::Closed(connection))
    }

    pub(super) fn stale_loses(&mut self, index: usize) -> Check {
        let peer = &mut self.peers[index];
        let (node, life) = (peer.stale, peer.stale_life);
        if std::mem::replace(&mut peer.stale_closed, true) || self.nodes[node].life != life {
            return Ok(());
        }
        trace!(self, "node {node} loses link {index}");
        self.nodes[node].peer = None;
        self.coverage.hit("link to a source lost");
        self.replica(node, replica::Event::PeerDown("connection lost"))
    }

    /// A link between nodes breaks.
    pub(super) fn cut_peer(&mut self, index: usize) {
        let most = self.profile.network_delay * 4;
        let (a, b) = (self.rng.range(1, most), self.rng.range(1, most));
        if !std::mem::replace(&mut self.peers[index].is_cut, true) {
            trace!(self, "link {index} is cut");
            self.after(a, Event::SourceLoses(index));
            self.after(b, Event::StaleLoses(index));
        }
    }

    /// Every link of a node that is open, to other nodes.
    pub(super) fn links_of(&self, node: usize) -> Vec<usize> {
        let is_its = |p: &Peer| p.is_open() && (p.stale == node || p.source == node);
        (0..self.peers.len()).filter(|&i| is_its(&self.peers[i])).collect()
    }

    fn is_parted(&self, a: usize, b: usize) -> bool {
        self.parted.contains(&pair(a, b))
    }

    /// The body of an answer to a pull, and its data, from what the disk reads found.
    pub(super) fn pulled_answer(
        &mut self,
        node: usize,
        header: &MessageHeader,
        pulled: &PulledData,
    ) -> Check<(Vec<u8>, Vec<u64>)> {
        let found: Vec<_> = pulled.reads.iter().map(|io| self.nodes[node].reads.remove(&io.0)).collect();
        if header.status != Status::Ok {
            return Ok((Vec::new(), Vec::new()));
        }
        let mut sectors = Vec::new();
        for found in found {
            let found = found.ok_or_else(|| format!("node {node} sends a pull whose read found nothing"))?;
            sectors.extend(found);
        }
        let blocks = sectors.chunks_exact(SECTORS_PER_BLOCK);
        let zeroes: Vec<bool> = blocks.clone().map(|block| block.iter().all(|stamp| *stamp == 0)).collect();
        let full = blocks.zip(&zeroes).filter(|(_, is_zero)| !**is_zero);
        Ok((pulled.encode(&zeroes), full.flat_map(|(block, _)| block.to_vec()).collect()))
    }

    /// A part of a pull's data goes to disk.
    pub(super) fn write_pulled(
        &mut self,
        node: usize,
        io: replica::IoId,
        (pull, from): (u64, u32),
        (offset, length): (u64, u32),
    ) -> Check {
        let sector = |bytes: u32| usize::try_from(u64::from(bytes) / SECTOR).unwrap_or(usize::MAX);
        let data = self.nodes[node].pulled.get(&pull);
        let part = data.and_then(|data| data.get(sector(from)..sector(from) + sector(length)));
        let part = part.ok_or_else(|| {
            format!("node {node} writes {length} bytes from {from} of pull {pull}, which it does not have")
        })?;
        let stamps = part.to_vec();
        self.submit_data(node, io, replica::DiskOperation::WritePulled, (offset, length), stamps)
    }

    /// The node wants to be woken.
    pub(super) fn schedule_wake(&mut self, node: usize) {
        let Some(at) = self.nodes[node].replica.as_ref().and_then(replica::Replica::deadline) else { return };
        let (at, life) = (at.0.max(self.now + 1), self.nodes[node].life);
        if at < self.nodes[node].wake_at {
            self.nodes[node].wake_at = at;
            self.at(at, Event::NodeWake { node, life, at });
        }
    }

    fn cover_pulled(&mut self, node: usize, header: &MessageHeader, body: &[u8]) {
        if header.kind != Kind::PullReply || header.status != Status::Ok {
            return;
        }
        let (Ok(reply), Some(replica)) = (crate::wire::PullReply::decode(body), &self.nodes[node].replica)
        else {
            return;
        };
        let first = header.offset / crate::pool::BLOCK_SIZE;
        let stale = replica.maps().dirty_blocks(replica.member());
        let disk = &self.nodes[node].disk;
        let (mut skipped, mut fresh) = (false, false);
        for (index, _) in &reply.blocks {
            let block = crate::pool::Block(first + u64::from(*index));
            let is_stale = stale.is_some_and(|s| s.contains(block));
            fresh |= !is_stale;
            skipped |= is_stale && disk.is_written_by_guest(block);
        }
        if skipped {
            self.coverage.hit("pulled block skipped for a guest write under way");
        }
        if fresh {
            self.coverage.hit("pulled block was fresh already");
        }
    }
}

/// Two nodes in any order.
pub(super) fn pair(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}
