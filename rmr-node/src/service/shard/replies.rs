//! Messages to peers: queued, filled with the data that they carry, and sent.

use rmr_common::buffer::Segment;
use rmr_common::reactor::WatchChange;
use rmr_common::replica::{ConnectionId, PulledData, ReplyPayload};
use rmr_common::transport::Connection as _;
use rmr_common::wire::{HEADER_SIZE, Kind, MessageHeader, Status};

use super::super::pulls::PULLS_PART;
use super::{Sending, Shard, tag_for};
use crate::disk::{Buffer, MIN_BUFFER};

impl Shard {
    /// Queues an answer on its connection, if that is still there.
    pub(super) fn reply(
        &mut self,
        index: usize,
        id: ConnectionId,
        header: &MessageHeader,
        payload: ReplyPayload,
    ) {
        if let ReplyPayload::Pulled(data) = payload {
            return self.reply_pulled(index, id, header, &data);
        }
        let buffer = match &payload {
            ReplyPayload::Data(io) => self.members[index].as_mut().and_then(|m| m.take_read(*io)),
            ReplyPayload::None | ReplyPayload::Body(_) | ReplyPayload::Pulled(_) => None,
        };
        let Some(peer) = self.peers.get_mut(&id) else { return };
        if matches!(header.kind, Kind::IoReply | Kind::FlushReply) {
            peer.requests = peer.requests.saturating_sub(1);
        }
        match (payload, buffer) {
            (ReplyPayload::Body(body), _) => peer.wire.queue(header, Some(body)),
            (_, Some(buffer)) => {
                let segment = buffer.segment();
                let mut header = *header;
                header.digest = header.digest.map(|_| buffer.digest());
                let header = &header;
                let sending = Sending::One(buffer);
                let tag = tag_for(&mut self.free_tags, &mut self.sending);
                peer.sending_bytes += sending.bytes();
                self.sending[tag as usize] = Some(sending);
                peer.wire.queue_data(header, Some(tag), &mut |segments| segments.push(segment));
                peer.sending.push_back(tag);
            }
            (ReplyPayload::None | ReplyPayload::Data(_) | ReplyPayload::Pulled(_), None) => {
                peer.wire.queue(header, None);
            }
        }
        // As `queue` does, without looking for the connection again: this is done for each request.
        if !std::mem::replace(&mut peer.queued, true) {
            self.queued.push(id);
        }
    }

    /// Notes that a connection has something to send.
    pub(super) fn queue(&mut self, id: ConnectionId) {
        if let Some(peer) = self.peers.get_mut(&id)
            && !std::mem::replace(&mut peer.queued, true)
        {
            self.queued.push(id);
        }
    }

    /// Answers a pull with the data of its reads, from where they lie.
    pub(super) fn reply_pulled(
        &mut self,
        index: usize,
        id: ConnectionId,
        header: &MessageHeader,
        data: &PulledData,
    ) {
        let Some(member) = self.members[index].as_mut() else { return };
        let buffers: Vec<Buffer> = data.reads.iter().filter_map(|io| member.take_read(*io)).collect();
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let mut header = *header;
        let (mut zeroes, mut full): (Vec<bool>, Vec<Segment>) = (Vec::new(), Vec::new());
        for buffer in &buffers {
            let (memory, first) = (buffer.segment(), zeroes.len());
            zeroes.extend(buffer.zero_blocks());
            let mut at = 0;
            for run in zeroes[first..].chunk_by(PartialEq::eq) {
                let length = run.len() * MIN_BUFFER;
                full.extend((!run[0]).then(|| memory.part(at, length)));
                at += length;
            }
        }
        let most = self.buffers.total_bytes() / PULLS_PART;
        let sending = Sending::Several(buffers);
        if header.status == Status::Ok && zeroes.len() != data.blocks.len() {
            header.status = Status::IoError;
        } else if peer.sending_bytes > 0 && peer.sending_bytes + sending.bytes() > most {
            // A node that does not take its answers keeps no buffers from guests.
            header.status = Status::Limit;
        }
        let body = (header.status == Status::Ok).then(|| data.encode(&zeroes));
        header.payload = body.as_ref().map_or(0, |b| u32::try_from(b.len()).unwrap_or(u32::MAX));
        let mut sent = HEADER_SIZE as u64 + u64::from(header.payload);
        let there: usize = full.iter().map(Segment::length).sum();
        if header.status == Status::Ok && there > 0 {
            let payload = u32::try_from(there).unwrap_or(u32::MAX);
            let data = MessageHeader { kind: Kind::PullData, payload, ..header };
            let tag = tag_for(&mut self.free_tags, &mut self.sending);
            peer.sending_bytes += sending.bytes();
            self.sending[tag as usize] = Some(sending);
            peer.wire.queue_data(&data, Some(tag), &mut |segments| segments.append(&mut full));
            peer.sending.push_back(tag);
            sent += u64::from(payload) + if peer.wire.is_rdma() { 0 } else { HEADER_SIZE as u64 };
        }
        peer.wire.queue(&header, body);
        if let Some(member) = &mut self.members[index] {
            member.resync_sent += sent;
        }
        self.queue(id);
    }

    /// Queues a message with a body on a connection, if that is still there.
    pub(in crate::service) fn send_body(
        &mut self,
        connection: ConnectionId,
        header: &MessageHeader,
        body: Vec<u8>,
    ) {
        if let Some(peer) = self.peers.get_mut(&connection) {
            peer.wire.queue(header, Some(body));
        }
        self.queue(connection);
    }

    /// Sends what is queued.
    pub(super) fn send_all(&mut self) {
        self.send_to_sources();
        let mut queued = std::mem::take(&mut self.queued);
        for id in queued.drain(..) {
            self.send(id);
        }
        self.queued = queued;
    }

    pub(super) fn send(&mut self, id: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        peer.queued = false;
        if let (Some(rdma), Some(windows)) = (peer.wire.rdma(), self.windows.get_mut(&id)) {
            windows.dealt_with(|mark| rdma.release(mark));
        }
        let sent = peer.wire.flush();
        peer.wire.take_sent(&mut self.tags);
        for tag in self.tags.drain(..) {
            // Data is sent in the order in which it was queued.
            let first = peer.sending.pop_front();
            debug_assert_eq!(first, Some(tag), "tags come back in order");
            peer.sending_bytes -= self.sending[tag as usize].take().map_or(0, |sending| sending.bytes());
            self.free_tags.push(tag);
        }
        match sent {
            Ok(()) => self.watch(id),
            Err(error) => self.lost(id, &error.to_string()),
        }
    }

    /// Sees to it that a connection's descriptor wakes the loop when something can be done, and only then.
    pub(super) fn watch(&mut self, id: ConnectionId) {
        let Some(peer) = self.peers.get_mut(&id) else { return };
        let set = peer.interest();
        if set != peer.watched {
            peer.watched = set;
            self.changes.push(WatchChange::Modify(peer.descriptor, set));
        }
    }
}
