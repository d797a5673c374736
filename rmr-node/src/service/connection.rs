//! One data connection of a shard: greeting first, then the messages of one pool's client.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::RawFd;
use std::time::Duration;

use rmr_common::buffer::Segment;
use rmr_common::pool::PoolId;
use rmr_common::replica::{BufferToken, ConnectionId, Event};
use rmr_common::time::Time;
use rmr_common::transport::{Connection, Place, Receiver, Wire};
use rmr_common::wire::{HEADER_SIZE, Kind, MAX_BODY, MAX_SLOTS, MessageHeader, Role, Status};
use vmm_sys_util::epoll::EventSet;

use super::ConnectionPlace;
use super::keys::Challenged;
use super::member::Member;
use super::windows::Windows;
use crate::disk::{BufferPool, Payload};

/// Longest body of a hello in bytes: the texts and numbers that it has, and room for later versions.
const MAX_HELLO: u32 = 4096;
/// Most messages that wait for a client to take them before nothing more is read from it. A session has fewer answers
/// outstanding; only one that asks and does not listen comes here.
pub(super) const MAX_BACKLOG: usize = 4 * MAX_SLOTS as usize;
/// Most bytes of bodies that wait so. One answer has up to 1 MiB.
const MAX_BACKLOG_BYTES: usize = 1 << 20;
/// The same over RDMA, where what has been asked cannot be left unread: a member that is brought back in asks for all pages of
/// all maps at once.
pub(super) const MAX_RDMA_BACKLOG_BYTES: usize = 32 << 20;
/// A message counts as at least so many bytes of what the clients of a pool may have done in one loop iteration.
const MESSAGE_COST: usize = 4096;
/// So many bytes of a range without data count as one byte of it: bits are set for the range, and the disk is asked for it.
const RANGE_PART: u32 = 64;
/// Most requests of a connection at a time. A session has a slot for each; twice that allows for slots that a client
/// uses again after it gave the request up.
const MAX_REQUESTS: usize = 2 * MAX_SLOTS as usize;

/// A connection and what the shard knows of it.
pub(super) struct Peer {
    pub(super) wire: Wire,
    pub(super) descriptor: RawFd,
    pub(super) address: SocketAddr,
    pub(super) place: ConnectionPlace,
    /// Index of the member it talks to; `None` until it was greeted.
    pub(super) member: Option<usize>,
    /// It has to prove that it has the pool's key before it is greeted.
    pub(super) challenged: Option<Box<Challenged>>,
    /// Who opened it, as the hello says.
    pub(super) role: Role,
    pub(super) since: Time,
    pub(super) last_heard: Time,
    /// What the event loop watches its descriptor for.
    pub(super) watched: EventSet,
    /// It stands in the shard's line for memory.
    pub(super) in_line: bool,
    /// It stands in the shard's list of connections with something to send.
    pub(super) queued: bool,
    /// Loop iterations in which it was not read, because others of its member had spent what there is for one.
    pub(super) passed_over: u8,
    /// Requests that are not answered.
    pub(super) requests: usize,
    /// For each write whose data is arriving, in order: where to, or `None` when it goes nowhere.
    pub(super) arriving: VecDeque<Option<BufferToken>>,
    /// Bytes of buffers in `arriving`.
    pub(super) arriving_bytes: usize,
    /// It is closed with a last word, and was lent nothing.
    pub(super) parts: bool,
    /// Tags of data that is on its way to the client, in order.
    pub(super) sending: VecDeque<u32>,
    /// Bytes of buffers in `sending`.
    pub(super) sending_bytes: usize,
}

impl Peer {
    pub(super) fn new(
        wire: Wire,
        descriptor: RawFd,
        address: SocketAddr,
        place: ConnectionPlace,
        now: Time,
    ) -> Self {
        Self {
            wire,
            descriptor,
            address,
            place,
            member: None,
            challenged: None,
            role: Role::Client,
            since: now,
            last_heard: now,
            watched: EventSet::IN,
            in_line: false,
            queued: false,
            passed_over: 0,
            requests: 0,
            arriving: VecDeque::new(),
            arriving_bytes: 0,
            parts: false,
            sending: VecDeque::new(),
            sending_bytes: 0,
        }
    }

    /// Whether it has said nothing for so long that it is given up: `silent` for clients, and for a stranger no longer than
    /// `idle`. To be asked once in a while; `is_short` says that the shard has no memory for those who wait.
    ///
    /// One that cannot say anything for want of this node's memory is not silent: over TCP it is not read, over RDMA all that
    /// it has to say waits behind a write. But it is when the node owes it nothing, and it could go on with what it has.
    pub(super) fn is_overdue(&mut self, now: Time, silent: Duration, idle: Duration, is_short: bool) -> bool {
        if self.member.is_none() {
            return now - self.since > idle.min(silent);
        }
        if !self.watched.contains(EventSet::IN) {
            return false;
        }
        if self.wire.peer_wants() > 0 && (self.requests > 0 || is_short) {
            self.last_heard = now;
        }
        now - self.last_heard > silent
    }

    /// What its descriptor is to be watched for. A connection that waits for memory, or does not take its answers, is
    /// not read, although it is readable; that its peer hangs up counts all the same.
    pub(super) fn interest(&self) -> EventSet {
        if self.wire.is_rdma() {
            // It shows completions of what was sent as well, and its credits bound what may arrive.
            return EventSet::IN;
        }
        let takes = !self.wire.is_starved()
            && self.wire.backlog() < MAX_BACKLOG
            && self.wire.backlog_bytes() < MAX_BACKLOG_BYTES;
        let read = if takes { EventSet::IN } else { EventSet::READ_HANG_UP };
        if self.wire.wants_to_send() { read | EventSet::OUT } else { read }
    }
}

/// Buffers that hold the data of writes, by their token.
#[derive(Default)]
pub(super) struct WriteBuffers {
    buffers: Vec<Option<Payload>>,
    free: Vec<u32>,
}

impl WriteBuffers {
    fn insert(&mut self, buffer: Payload) -> BufferToken {
        if let Some(index) = self.free.pop() {
            self.buffers[index as usize] = Some(buffer);
            return BufferToken(index);
        }
        self.buffers.push(Some(buffer));
        BufferToken(u32::try_from(self.buffers.len() - 1).unwrap_or(u32::MAX))
    }

    /// Takes the buffer out; `None` when the disk has it already.
    pub(super) fn take(&mut self, token: BufferToken) -> Option<Payload> {
        self.buffers.get_mut(token.0 as usize).and_then(Option::take)
    }

    /// Whether a buffer's data is not what the digest says.
    fn differs(&self, token: BufferToken, digest: u32) -> bool {
        let buffer = self.buffers.get(token.0 as usize).and_then(Option::as_ref);
        buffer.is_some_and(|buffer| buffer.digest() != digest)
    }

    /// Ends the life of a token.
    pub(super) fn release(&mut self, token: BufferToken) {
        self.take(token);
        self.free.push(token.0);
    }
}

/// What a hello asked for.
pub(super) struct Greeting {
    pub(super) pool: PoolId,
    pub(super) header: MessageHeader,
    pub(super) body: Vec<u8>,
}

/// Takes what arrives on one connection.
pub(super) struct Sink<'a> {
    pub(super) id: ConnectionId,
    pub(super) member: Option<&'a mut Member>,
    pub(super) arriving: &'a mut VecDeque<Option<BufferToken>>,
    pub(super) arriving_bytes: &'a mut usize,
    /// Bytes of buffers that the connection may have arriving.
    pub(super) share: usize,
    pub(super) buffers: &'a BufferPool,
    /// What the client was lent to write to, over RDMA.
    pub(super) windows: Option<&'a Windows>,
    /// Others stand in line for memory that is not there.
    pub(super) short: &'a mut bool,
    /// Buffers that were found.
    pub(super) found: &'a mut usize,
    pub(super) writes: &'a mut WriteBuffers,
    pub(super) requests: &'a mut usize,
    pub(super) heard: &'a mut Time,
    /// A message arrived.
    pub(super) delivered: &'a mut bool,
    pub(super) greeting: &'a mut Option<Greeting>,
    /// A proof is expected, and no hello any more.
    pub(super) is_challenged: bool,
    pub(super) proof: &'a mut Option<Vec<u8>>,
    pub(super) role: Role,
    /// What the member's connections have made it do in this loop iteration, in bytes.
    pub(super) spent: &'a mut usize,
    /// Operators' commands that another node passes on.
    pub(super) commands: &'a mut Vec<(MessageHeader, Vec<u8>)>,
    pub(super) error: &'a mut Option<&'static str>,
    pub(super) now: Time,
}

impl Sink<'_> {
    fn holds(&self) -> bool {
        self.member.as_ref().is_some_and(|m| m.replica.holder_connection() == Some(self.id))
    }
}

impl Receiver for Sink<'_> {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        if header.kind != Kind::Write {
            return Place::Discard;
        }
        // Only who may write gets memory: whoever has not attached will be refused, and could keep it for long.
        if !self.holds() {
            self.arriving.push_back(None);
            return Place::Discard;
        }
        let length = header.payload as usize;
        let has_share =
            *self.arriving_bytes + length <= self.share || *self.arriving_bytes == 0 && self.share > 0;
        if *self.short || !has_share {
            return Place::Wait;
        }
        let Some(buffer) = self.buffers.try_acquire(length) else {
            *self.short = true;
            return Place::Wait;
        };
        segments.push(buffer.segment());
        let token = self.writes.insert(Payload::Buffer(buffer));
        self.arriving.push_back(Some(token));
        *self.arriving_bytes += length;
        *self.found += 1;
        Place::Data
    }

    fn placed(&mut self, header: &MessageHeader, window: u16, offset: u32, mark: u32) -> bool {
        let data = self.windows.filter(|_| self.holds());
        let data = data.and_then(|windows| windows.written(window, offset, header.payload, mark));
        *self.arriving_bytes += if data.is_some() { header.payload as usize } else { 0 };
        let token = data.map(|data| self.writes.insert(data));
        self.arriving.push_back(token);
        token.is_some()
    }

    fn longest_body(&self) -> u32 {
        if self.member.is_some() { MAX_BODY } else { MAX_HELLO }
    }

    fn weight(&self, header: &MessageHeader) -> usize {
        match header.kind {
            Kind::Discard | Kind::WriteZeroes => (header.length / RANGE_PART) as usize,
            // A pass over maps, a superblock, a connection to another node.
            Kind::Attach | Kind::SetView | Kind::Prepare | Kind::Detach | Kind::Grow | Kind::Command => {
                64 << 10
            }
            _ => 0,
        }
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        *self.spent += MESSAGE_COST.max(HEADER_SIZE + header.payload as usize) + self.weight(header);
        // What counts is a whole message: a peer that sends a byte now and then keeps what it has been given.
        *self.heard = self.now;
        *self.delivered = true;
        // A write without data had no place, and the next buffer is another one's.
        let has_data = header.kind == Kind::Write && header.payload > 0;
        let buffer = if has_data { self.arriving.pop_front().flatten() } else { None };
        if buffer.is_some() {
            *self.arriving_bytes -= header.payload as usize;
        }
        match &mut self.member {
            Some(member) => {
                if header.pool != member.pool() {
                    *self.error = Some("a message for another pool than the one it greeted");
                    if let Some(buffer) = buffer {
                        self.writes.release(buffer);
                    }
                    return;
                }
                if !header.kind.is_from(self.role) {
                    *self.error = Some(match self.role {
                        Role::Client => "a message that no client sends",
                        Role::Peer => "a message that nodes do not send one another",
                    });
                    if let Some(buffer) = buffer {
                        self.writes.release(buffer);
                    }
                    return;
                }
                if header.kind == Kind::Command {
                    return self.commands.push((*header, body.to_vec()));
                }
                if header.kind.is_request() {
                    *self.requests += 1;
                    if *self.requests > MAX_REQUESTS {
                        *self.error = Some("more requests outstanding than a session has slots");
                    }
                }
                let mut checked = *header;
                if let (Some(token), Some(digest)) = (buffer, header.digest)
                    && self.writes.differs(token, digest)
                {
                    checked.status = Status::DigestDiffers;
                }
                let (connection, role) = (self.id, self.role);
                let event = Event::Message { connection, role, header: &checked, body, buffer };
                member.replica.apply(event, self.now);
            }
            None if header.payload > MAX_HELLO => *self.error = Some("a greeting of more than 4096 bytes"),
            None if self.is_challenged => {
                if header.kind == Kind::Proof && self.proof.is_none() {
                    *self.proof = Some(body.to_vec());
                } else {
                    *self.error = Some("it did not answer the challenge with one proof");
                }
            }
            None if header.kind == Kind::Hello && self.greeting.is_none() => {
                *self.greeting = Some(Greeting { pool: header.pool, header: *header, body: body.to_vec() });
            }
            None => *self.error = Some("it did not begin with one hello"),
        }
    }
}
