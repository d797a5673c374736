//! A storage node: the replica's state machine, its disk, and what of its metadata is durable.

use std::collections::BTreeMap;

use super::disk::Disk;
use super::network::{Message, digest_of};
use super::oracle::SECTOR;
use super::peers::FIRST_PEER;
use super::world::{Check, Event, MILLISECOND, World, trace};
use crate::map::{ChunkMap, MAP_PAGE_BYTES, MapId, MapPage, MemberMaps};
use crate::pool::{Address, BootId, Chunk, Epoch, MemberId, StoreId};
use crate::replica::{
    self, Config, ConnectionId, DiskOperation, DiskResult, DurableState, IoId, Metadata, Replica,
    ReplyPayload, ResyncLimits, Ticket,
};
use crate::time::Time;
use crate::wire::{AttachReply, Kind, Limits, MessageHeader, Status};

pub(super) type PageBytes = Box<[u8; MAP_PAGE_BYTES]>;

/// Something of the metadata that is written as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Target {
    Page(MapPage),
    State,
}

/// What is written to a target.
pub(super) enum Content {
    Page(PageBytes),
    State(Box<DurableState>),
}

/// The writes to one target: one at a time, and the next covers all that was asked for meanwhile.
#[derive(Default)]
pub(super) struct MetadataQueue {
    pub(super) writing: Option<(Vec<Ticket>, Content)>,
    pub(super) waiting: Vec<Ticket>,
    /// The newest superblock that waits.
    pub(super) state: Option<Box<DurableState>>,
}

/// One node of the pool.
pub(super) struct Node {
    pub(super) member: MemberId,
    pub(super) store: StoreId,
    pub(super) address: Address,
    /// The history of the pool of which it has a view: see `sim/force.rs`.
    pub(super) branch: usize,
    /// Its disk is lost: it never comes back.
    pub(super) is_gone: bool,
    /// Bytes of a pool that the store has room for: what lies beyond was never made to read as zeroes.
    pub(super) room: u64,
    /// Grows with every start, so that events of an earlier life are told apart.
    pub(super) life: u32,
    /// `None` while the process is down.
    pub(super) replica: Option<Replica>,
    pub(super) disk: Disk,
    pub(super) durable: DurableState,
    pub(super) pages: BTreeMap<MapPage, PageBytes>,
    pub(super) metadata: BTreeMap<Target, MetadataQueue>,
    /// Buffers that hold the data of writes, with the header each came with.
    pub(super) buffers: BTreeMap<u32, (Vec<u64>, MessageHeader)>,
    pub(super) next_buffer: u32,
    /// What reads found, until it is sent.
    pub(super) reads: BTreeMap<u32, Vec<u64>>,
    /// The data of answers to pulls, until it is with the disk.
    pub(super) pulled: BTreeMap<u64, Vec<u64>>,
    /// The last epoch whose attach was answered well.
    pub(super) answered: Epoch,
    /// The connection of that attach, in this life of the node.
    pub(super) holder: Option<ConnectionId>,
    /// The open link to a source, and which attempt to make one is the last.
    pub(super) peer: Option<usize>,
    pub(super) peer_attempt: u64,
    pub(super) wake_at: u64,
    /// A view was received and not answered.
    pub(super) has_pending_view: bool,
    /// The power was cut, and the machine was not started since.
    pub(super) lost_power: bool,
    pub(super) host_boot: u8,
    /// Per cent of the disk requests that fail.
    pub(super) disk_errors: u64,
    /// Per cent of the flushes that fail, beyond those.
    pub(super) flush_errors: u64,
    /// The next flush fails, and those after it do not.
    pub(super) flush_fails: bool,
    /// A flush has failed since the run began.
    pub(super) has_failed_flush: bool,
    /// The next metadata write fails.
    pub(super) metadata_fails: bool,
    /// It answers everything but views.
    pub(super) is_deaf_to_views: bool,
    /// It was told to stop.
    pub(super) stops: bool,
}

impl Node {
    pub(super) fn new(
        member: MemberId,
        store: StoreId,
        address: Address,
        durable: DurableState,
        write_back: bool,
        capacity: usize,
    ) -> Self {
        let sectors = usize::try_from(durable.spec.size / super::oracle::SECTOR).unwrap_or(0);
        Self {
            member,
            store,
            address,
            branch: 0,
            is_gone: false,
            room: durable.spec.size,
            life: 0,
            replica: None,
            disk: Disk::new(sectors, capacity, write_back),
            durable,
            pages: BTreeMap::new(),
            metadata: BTreeMap::new(),
            buffers: BTreeMap::new(),
            next_buffer: 0,
            reads: BTreeMap::new(),
            pulled: BTreeMap::new(),
            answered: Epoch(0),
            holder: None,
            peer: None,
            peer_attempt: 0,
            wake_at: u64::MAX,
            has_pending_view: false,
            lost_power: false,
            host_boot: 1,
            disk_errors: 0,
            flush_errors: 0,
            flush_fails: false,
            has_failed_flush: false,
            metadata_fails: false,
            is_deaf_to_views: false,
            stops: false,
        }
    }

    /// Starts the process from what is durable.
    pub(super) fn start(&mut self, limits: Limits, intent_idle: std::time::Duration, resync: ResyncLimits) {
        self.life += 1;
        self.peer = None;
        self.holder = None;
        self.wake_at = u64::MAX;
        self.has_pending_view = false;
        self.stops = false;
        if self.lost_power {
            self.host_boot += 1;
            self.lost_power = false;
        }
        let spec = &self.durable.spec;
        let mut maps = MemberMaps::new(spec);
        for id in std::iter::once(MapId::Intent).chain(MemberId::all().map(MapId::Dirty)) {
            let mut map = ChunkMap::new(spec.chunk_count());
            for (page, bytes) in self.pages.iter().filter(|(page, _)| page.map == id) {
                map.load_page(page.page, bytes);
            }
            maps.load(id, map);
        }
        let member = self.member.as_u8();
        let life = self.life.to_le_bytes();
        let config = Config {
            resync,
            limits,
            intent_idle,
            host_boot: BootId::from_bytes([
                member,
                self.host_boot,
                self.store.as_bytes()[0],
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
            ]),
            process_boot: BootId::from_bytes([
                member,
                life[0],
                life[1],
                self.store.as_bytes()[0],
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
            ]),
            write_through: !self.disk.write_back,
            max_size: crate::pool::MAX_POOL_SIZE,
            tls_only: false,
        };
        let state = self.durable.clone();
        self.replica = Some(Replica::new(config, self.member, state, maps));
    }

    /// What a read of the pool finds in a sector. Beyond what the store has room for, there is nothing yet.
    pub(super) fn value(&self, sector: usize) -> u64 {
        if sector as u64 * super::oracle::SECTOR >= self.room { 0 } else { self.disk.sectors[sector] }
    }

    /// Whether the bit of a chunk is durable.
    pub(super) fn has_bit(&self, map: MapId, chunk: Chunk) -> bool {
        let page = MapPage { map, page: ChunkMap::page_of(chunk) };
        self.pages.get(&page).is_some_and(|bytes| bit(bytes, chunk))
    }
}

/// The bit of a chunk in its page.
pub(super) fn bit(page: &[u8; MAP_PAGE_BYTES], chunk: Chunk) -> bool {
    let bit = usize::try_from(chunk.0 % crate::map::MAP_PAGE_BITS).unwrap_or(0);
    page[bit / 8] & (1 << (bit % 8)) != 0
}

impl World<'_> {
    pub(super) fn start_node(&mut self, node: usize) {
        let (limits, idle) = (self.profile.limits, self.profile.intent_idle);
        let resync = self.profile.resync;
        self.nodes[node].start(limits, idle, resync);
        let life = self.nodes[node].life;
        let delay = self.rng.range(1, 1000) * MILLISECOND;
        self.after(delay, Event::NodeTick { node, life });
        trace!(self, "node {node} starts with {}", self.nodes[node].durable.view);
    }

    /// Gives an event to a replica, and carries out what it asks for.
    pub(super) fn replica(&mut self, node: usize, event: replica::Event<'_>) -> Check {
        let now = Time(self.now);
        let (stale, blocks) = (self.own_stale(node), self.blocks_at(node));
        let may_freshen = matches!(event, replica::Event::Disk(..) | replica::Event::PeerMessage(..));
        let Some(replica) = &mut self.nodes[node].replica else { return Ok(()) };
        replica.apply(event, now);
        // A member that comes to another branch loses what lies beyond the end that the pool has there.
        let is_smaller = self.has_branches() && self.blocks_at(node) < blocks;
        if !may_freshen && !is_smaller && self.own_stale(node) < stale && !self.is_clean_at(node) {
            return Err(format!(
                "node {node} takes a stale block for current before its disk has written it"
            ));
        }
        while let Some(output) = self.nodes[node].replica.as_mut().and_then(replica::Replica::take_output) {
            match output {
                replica::Output::Send(connection, header, payload) => {
                    self.node_sends(node, connection, header, payload)?;
                }
                replica::Output::Disk { io, operation, offset, length } => {
                    self.submit_disk(node, io, operation, offset, length)?;
                }
                replica::Output::Persist(ticket, metadata) => {
                    let target = match &metadata {
                        Metadata::Page(page) => Target::Page(*page),
                        Metadata::State(_) => Target::State,
                    };
                    let queue = self.nodes[node].metadata.entry(target).or_default();
                    queue.waiting.push(ticket);
                    if let Metadata::State(state) = metadata {
                        queue.state = Some(state);
                    }
                    self.start_metadata(node, target)?;
                }
                replica::Output::WritePulled { io, pull, from, offset, length } => {
                    self.write_pulled(node, io, (pull, from), (offset, length))?;
                }
                replica::Output::PullDone(pull) => {
                    let known = self.nodes[node].pulled.remove(&pull);
                    known.ok_or_else(|| format!("node {node} is done with pull {pull} twice"))?;
                }
                replica::Output::PeerConnect(address) => self.peer_connect(node, &address)?,
                replica::Output::PeerSend(header) => self.peer_send(node, header)?,
                replica::Output::PeerClose => self.peer_close(node),
                replica::Output::Release(token) => {
                    if self.nodes[node].disk.uses(token) {
                        return Err(format!("node {node} released {token:?} while the disk writes from it"));
                    }
                    if self.nodes[node].buffers.remove(&token.0).is_none() {
                        return Err(format!("node {node} released {token:?} twice"));
                    }
                }
                replica::Output::Close(connection, reason) => {
                    trace!(self, "node {node} closes connection {}: {reason}", connection.0);
                    if super::liar::is_its(connection) {
                        self.coverage.hit("a liar is refused");
                    } else if connection.0 >= FIRST_PEER {
                        self.source_closes(connection);
                    } else {
                        self.node_closes(connection.0 as usize);
                    }
                }
                replica::Output::Grow { from, to } => self.make_room(node, from, to)?,
                replica::Output::CommandDone(id, reply) => self.answered(id.0, true, reply)?,
                replica::Output::Notice(notice) => {
                    trace!(self, "node {node}: {notice:?}");
                    self.node_notice(node, &notice);
                }
            }
        }
        self.schedule_wake(node);
        Ok(())
    }

    fn node_sends(
        &mut self,
        node: usize,
        connection: ConnectionId,
        mut header: MessageHeader,
        payload: ReplyPayload,
    ) -> Check {
        if super::liar::is_its(connection) {
            return self.liar_answered(node, &header);
        }
        let mut message = Message { header, body: Vec::new(), data: Vec::new() };
        match payload {
            ReplyPayload::None => {}
            ReplyPayload::Pulled(pulled) => {
                (message.body, message.data) = self.pulled_answer(node, &header, &pulled)?;
                header.payload = u32::try_from(message.body.len()).unwrap_or(u32::MAX);
                message.header = header;
            }
            ReplyPayload::Data(io) => {
                let found = self.nodes[node].reads.remove(&io.0);
                let found = found.ok_or_else(|| format!("node {node} sends a read that found nothing"))?;
                message.data = found.into_iter().map(super::verify::strip).collect();
                header.digest = header.digest.map(|_| digest_of(&message.data));
                message.header = header;
            }
            ReplyPayload::Body(body) => message.body = body,
        }
        // Pulled data is a message of its own, or no message at all.
        let has_data = header.kind != Kind::PullReply;
        let data = if has_data { message.data.len() as u64 * SECTOR } else { 0 };
        let length = message.body.len() as u64 + data;
        if length != u64::from(header.payload) {
            return Err(format!("node {node} sends {length} bytes with a header that says {header:?}"));
        }
        if header.kind == Kind::AttachReply && header.status == Status::Ok {
            let reply = AttachReply::decode(&message.body).map_err(|e| e.to_string())?;
            self.unclean |= !reply.clean_detach;
            if reply.flush_failed {
                self.coverage.hit("attach tells of a failed flush");
            }
        }
        self.note_told(node, &header, &message.body);
        self.check_answer(node, &header)?;
        self.check_attach_answer(node, connection, &header)?;
        if connection.0 >= FIRST_PEER {
            return self.peer_answer(connection, message);
        }
        self.send(connection.0 as usize, false, message)
    }

    fn submit_disk(
        &mut self,
        index: usize,
        io: IoId,
        operation: DiskOperation,
        offset: u64,
        length: u32,
    ) -> Check {
        let data = match operation {
            DiskOperation::Write(token) => {
                self.nodes[index].buffers.get(&token.0).map(|b| b.0.clone()).unwrap_or_default()
            }
            _ => Vec::new(),
        };
        self.submit_data(index, io, operation, (offset, length), data)
    }

    pub(super) fn submit_data(
        &mut self,
        index: usize,
        io: IoId,
        operation: DiskOperation,
        (offset, length): (u64, u32),
        data: Vec<u64>,
    ) -> Check {
        let is_pulled = self.is_pulled_write(index, operation, offset, length);
        if is_pulled {
            self.check_pulled(index, offset, length)?;
        } else {
            self.check_disk(index, operation, offset, length)?;
        }
        let is_read = matches!(operation, DiskOperation::Read | DiskOperation::Digest);
        let is_unreadable = is_read && self.nodes[index].disk.is_bad(offset, length);
        let is_flush = operation == DiskOperation::Flush;
        let errors =
            self.nodes[index].disk_errors + if is_flush { self.nodes[index].flush_errors } else { 0 };
        let fails = is_flush && self.fails_flush(index);
        let is_bad = self.rng.percent(errors) || is_unreadable || fails;
        let no_space = self.rng.percent(30) && !is_read;
        let result = match (is_bad, no_space) {
            (false, _) => DiskResult::Done,
            (true, true) => DiskResult::NoSpace,
            (true, false) => DiskResult::Failed,
        };
        let node = &mut self.nodes[index];
        node.disk
            .submit(io, operation, (offset, length), data, result, is_pulled)
            .map_err(|e| format!("node {index}: {e}"))?;
        let life = node.life;
        let most = self.profile.disk_delay * if self.rng.percent(2) && !self.is_calm { 20 } else { 1 };
        let is_write = !is_read && operation != DiskOperation::Flush;
        let effect = self.rng.range(1, most)
            + if is_write { self.slowness(index) } else { 0 }
            + if is_flush { self.slowness_of_flush() } else { 0 };
        let done = effect + self.rng.range(1, most / 2);
        trace!(self, "node {index}: disk request {} {operation:?} at {offset}+{length} begins", io.0);
        self.after(effect, Event::DiskEffect { node: index, life, io: io.0 });
        self.after(done, Event::DiskDone { node: index, life, io: io.0 });
        Ok(())
    }

    fn start_metadata(&mut self, index: usize, target: Target) -> Check {
        let node = &mut self.nodes[index];
        let Some(queue) = node.metadata.get_mut(&target) else { return Ok(()) };
        if queue.writing.is_some() || queue.waiting.is_empty() {
            return Ok(());
        }
        let content = match target {
            Target::Page(page) => {
                let bytes = node.replica.as_ref().and_then(|r| r.page(page)).copied();
                Content::Page(Box::new(bytes.ok_or_else(|| format!("node {index} has no page {page:?}"))?))
            }
            Target::State => {
                Content::State(queue.state.take().ok_or("a superblock was asked for without its content")?)
            }
        };
        queue.writing = Some((std::mem::take(&mut queue.waiting), content));
        let life = node.life;
        let usual = self.profile.disk_delay * 2;
        let most = if self.is_calm { usual } else { self.profile.metadata_delay.max(usual) };
        let delay = self.rng.range(1, most);
        self.after(delay, Event::MetadataDone { node: index, life, target });
        Ok(())
    }

    pub(super) fn metadata_done(&mut self, index: usize, target: Target) -> Check {
        let queue = self.nodes[index].metadata.get_mut(&target);
        let Some((tickets, content)) = queue.and_then(|q| q.writing.take()) else { return Ok(()) };
        let failed = std::mem::take(&mut self.nodes[index].metadata_fails);
        self.had_errors |= failed;
        if !failed {
            self.make_durable(index, target, content)?;
        }
        trace!(self, "node {index}: {target:?} durable: {}", !failed);
        for ticket in tickets {
            self.replica(index, replica::Event::Durable(ticket, if failed { Err(()) } else { Ok(()) }))?;
        }
        self.start_metadata(index, target)
    }

    pub(super) fn make_durable(&mut self, index: usize, target: Target, content: Content) -> Check {
        match (target, content) {
            (Target::Page(page), Content::Page(bytes)) => {
                self.check_page(index, page, &bytes)?;
                self.nodes[index].pages.insert(page, bytes);
            }
            (_, Content::State(state)) => {
                self.check_state(index, &state)?;
                self.nodes[index].durable = *state;
                self.note_durable(index)?;
            }
            (Target::State, Content::Page(_)) => return Err("a map page for the superblock".into()),
        }
        Ok(())
    }
}
