//! Buffer memory: who waits for it stands in line, and clients over RDMA are lent some of it.

use rmr_common::replica::ConnectionId;
use rmr_common::transport::Connection as _;

use super::super::member::{IoTag, WaitingRead};
use super::super::windows::{Lending, Windows};
use super::{Shard, Turn, Waiter};
use crate::disk::Engine as _;
use crate::disk::{Io, IoKind, Payload};

impl Shard {
    pub(super) fn stand_in_line(&mut self, waiter: Waiter) {
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
    pub(super) fn feed(&mut self) -> bool {
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
    pub(super) fn feed_reads(&mut self, index: usize) -> Turn {
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
    pub(super) fn feed_connection(&mut self, id: ConnectionId) -> Turn {
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
    pub(super) fn lend(&mut self, id: ConnectionId) -> Turn {
        let Some(peer) = self.peers.get_mut(&id) else { return Turn::Gone };
        let member = peer.member.and_then(|m| self.members[m].as_ref());
        // As with data over TCP: only who may write gets memory.
        let holds = member.is_some_and(|m| m.replica.holder_connection() == Some(id));
        let Some(rdma) = peer.wire.rdma().filter(|_| holds) else { return Turn::Gone };
        let wanted = rdma.peer_wants();
        if wanted == 0 {
            return Turn::Gone;
        }
        let windows = self.windows.entry(id).or_default();
        let mut refusal = None;
        loop {
            match windows.lend(wanted, self.share / 2, &self.buffers) {
                Lending::Lent(window, memory) => match rdma.grant(window, &memory) {
                    Ok(()) => {
                        self.queue(id);
                        return Turn::Served;
                    }
                    // Then a smaller one, if that will do: so this ends.
                    Err(error) => {
                        windows.refuse(window);
                        refusal = Some(error);
                    }
                },
                Lending::NoMemory => return Turn::NoMemory,
                Lending::HasShare => {
                    let Some(error) = refusal else { return Turn::HasShare };
                    if !windows.suffices(wanted) {
                        self.lost(id, &error.to_string());
                        return Turn::Gone;
                    }
                    if windows.tell() {
                        let (client, lent) = (peer.address, windows.bytes());
                        self.logs.log("lent", |withheld| {
                            tracing::warn!(%client, lent, withheld, "a client has to do with the memory that it was lent: {error}");
                        });
                    }
                    return Turn::HasShare;
                }
            }
        }
    }

    pub(super) fn lent_bytes(&self) -> usize {
        self.windows.values().map(Windows::bytes).sum()
    }

    /// Tells operators when requests have waited for memory for long.
    pub(super) fn note_shortage(&mut self) {
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
}
