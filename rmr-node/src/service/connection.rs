//! One data connection of a shard: greeting first, then the messages of one pool's client.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::os::fd::RawFd;

use rmr_common::buffer::Segment;
use rmr_common::pool::PoolId;
use rmr_common::replica::{BufferToken, ConnectionId, Event};
use rmr_common::time::Time;
use rmr_common::transport::tcp::TcpConnection;
use rmr_common::transport::{Place, Receiver};
use rmr_common::wire::{Kind, MessageHeader};

use super::member::Member;
use crate::disk::{Buffer, BufferPool};

/// Longest body of a hello in bytes: the texts and numbers that it has, and room for later versions.
const MAX_HELLO: u32 = 4096;

/// A connection and what the shard knows of it.
pub(super) struct Peer {
    pub(super) wire: TcpConnection,
    pub(super) descriptor: RawFd,
    pub(super) address: SocketAddr,
    /// Index of the member it talks to; `None` until it was greeted.
    pub(super) member: Option<usize>,
    pub(super) since: Time,
    pub(super) last_heard: Time,
    pub(super) watches_write: bool,
    /// There was no buffer for what arrives; tried again when one is free.
    pub(super) starved: bool,
    /// Buffers of writes whose data is arriving, in order.
    pub(super) arriving: VecDeque<BufferToken>,
    /// Tags of data that is on its way to the client.
    pub(super) sending: Vec<u32>,
}

/// Buffers that hold the data of writes, by their token.
#[derive(Default)]
pub(super) struct WriteBuffers {
    buffers: Vec<Option<Buffer>>,
    free: Vec<u32>,
}

impl WriteBuffers {
    fn insert(&mut self, buffer: Buffer) -> BufferToken {
        if let Some(index) = self.free.pop() {
            self.buffers[index as usize] = Some(buffer);
            return BufferToken(index);
        }
        self.buffers.push(Some(buffer));
        BufferToken(u32::try_from(self.buffers.len() - 1).unwrap_or(u32::MAX))
    }

    /// Takes the buffer out; `None` when the disk has it already.
    pub(super) fn take(&mut self, token: BufferToken) -> Option<Buffer> {
        self.buffers.get_mut(token.0 as usize).and_then(Option::take)
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
    pub(super) arriving: &'a mut VecDeque<BufferToken>,
    pub(super) buffers: &'a BufferPool,
    pub(super) writes: &'a mut WriteBuffers,
    pub(super) starved: &'a mut bool,
    pub(super) greeting: &'a mut Option<Greeting>,
    pub(super) error: &'a mut Option<&'static str>,
    pub(super) now: Time,
}

impl Receiver for Sink<'_> {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        if self.member.is_none() || header.kind != Kind::Write {
            return Place::Discard;
        }
        let Some(buffer) = self.buffers.try_acquire(header.payload as usize) else {
            *self.starved = true;
            return Place::Wait;
        };
        segments.push(buffer.segment());
        let token = self.writes.insert(buffer);
        self.arriving.push_back(token);
        Place::Data
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        match &mut self.member {
            Some(member) => {
                let buffer = if header.kind == Kind::Write { self.arriving.pop_front() } else { None };
                if header.pool != member.pool() {
                    *self.error = Some("a message for another pool than the one it greeted");
                    if let Some(buffer) = buffer {
                        self.writes.release(buffer);
                    }
                    return;
                }
                let event = Event::Message { connection: self.id, header, body, buffer };
                member.replica.apply(event, self.now);
            }
            None if header.kind == Kind::Hello && self.greeting.is_none() && header.payload <= MAX_HELLO => {
                *self.greeting = Some(Greeting { pool: header.pool, header: *header, body: body.to_vec() });
            }
            None => *self.error = Some("it did not begin with one hello"),
        }
    }
}
