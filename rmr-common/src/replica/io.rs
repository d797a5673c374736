//! Requests of the attached client: checks, the order of durability, and the clearing of intents.

use super::{
    Activity, BufferToken, ConnectionId, DiskOperation, DiskResult, IoId, Output, Replica, ReplyPayload,
    Waiter,
};
use crate::map::{ChunkMap, ClearReason, ClearTarget, MapId, MapPage};
use crate::pool::{Chunk, MemberState, Sequence};
use crate::wire::{Kind, MAX_RANGE, MAX_SLOTS, MessageHeader, SlotEntry, Status};

/// Most chunks that are looked at for their intent bits in one go, once a second.
const MAX_CLEARED: usize = 64 << 10;

/// A disk request, and the message that asked for it.
pub(super) struct Io {
    /// `None` for one of the replica's own: a flush, or a part of a resync or a verify.
    pub(super) request: Option<(ConnectionId, MessageHeader)>,
    pub(super) session: u64,
    pub(super) operation: DiskOperation,
    /// Whether the disk has it.
    pub(super) started: bool,
    /// Metadata pages that must be durable before the disk request starts.
    pub(super) awaited: usize,
}

impl Io {
    /// Whether it changes data for a client.
    pub(super) const fn is_write_of_client(&self) -> bool {
        self.request.is_some() && self.operation.is_write()
    }
}

impl Replica {
    /// An I/O request of the attached client.
    pub(super) fn request(
        &mut self,
        connection: ConnectionId,
        header: &MessageHeader,
        buffer: Option<BufferToken>,
    ) {
        if self.takes_no_requests() {
            return self.ignore_request(buffer);
        }
        let mut status = self.check_request(connection, header);
        if status == Status::Ok && header.status == Status::DigestDiffers {
            self.counters.digest_mismatches += 1;
            status = Status::DigestDiffers;
        }
        if status != Status::Ok {
            return self.refuse(connection, header, status, buffer);
        }
        self.note_committed(header);
        let operation = match (header.kind, buffer) {
            (Kind::Read, _) => DiskOperation::Read,
            (Kind::Write, Some(buffer)) => DiskOperation::Write(buffer),
            (Kind::Discard, _) => DiskOperation::Discard,
            (Kind::WriteZeroes, _) => DiskOperation::WriteZeroes,
            (Kind::Flush, _) => DiskOperation::Flush,
            _ => return self.refuse(connection, header, Status::BadRequest, buffer),
        };
        let io = self.insert_io(Io {
            request: Some((connection, *header)),
            session: self.session,
            operation,
            started: false,
            awaited: 0,
        });
        if matches!(operation, DiskOperation::Read | DiskOperation::Flush) {
            self.start_io(io);
        } else {
            self.start_write(io, header);
        }
    }

    fn refuse(
        &mut self,
        connection: ConnectionId,
        header: &MessageHeader,
        status: Status,
        buffer: Option<BufferToken>,
    ) {
        self.counters.refused += 1;
        if let Some(buffer) = buffer {
            self.outputs.push_back(Output::Release(buffer));
        }
        let mut reply = header.reply(reply_kind(header.kind), status);
        if status == Status::StaleEpoch {
            reply.epoch = self.epoch;
        }
        self.outputs.push_back(Output::Send(connection, reply, ReplyPayload::None));
    }

    fn check_request(&self, connection: ConnectionId, header: &MessageHeader) -> Status {
        if header.epoch < self.epoch && !mutant!(FencedRequestsAccepted) {
            return Status::StaleEpoch;
        }
        let is_holder = self.holder_connection() == Some(connection)
            && header.epoch == self.epoch
            && self.attach.is_none();
        if !is_holder && !mutant!(FencedRequestsAccepted) {
            return Status::NotAttached;
        }
        if header.view != self.view.number && !mutant!(FencedRequestsAccepted) {
            return Status::StaleView;
        }
        if self.broken {
            return Status::IoError;
        }
        if header.kind == Kind::Flush {
            return Status::Ok;
        }
        let unit = self.spec.logical_block_size;
        let within = header.offset.checked_add(header.length.into()).is_some_and(|end| end <= self.spec.size);
        let aligned = header.offset.is_multiple_of(unit.into()) && header.length.is_multiple_of(unit);
        let most = match header.kind {
            Kind::Read | Kind::Write => self.config.limits.max_io,
            _ => MAX_RANGE,
        };
        let fits = header.length <= most;
        let known_missing = header.kind == Kind::Read || header.missing == self.view.out();
        if within && aligned && fits && known_missing && header.length > 0 {
            Status::Ok
        } else {
            Status::BadRequest
        }
    }

    /// A message of the client under the view that this member has: so it is committed, and what earlier clients left behind
    /// is on record wherever it has to be. Before that it may be known here alone, and the watermark says nothing about it.
    pub(super) fn note_committed(&mut self, header: &MessageHeader) {
        if header.view != self.view.number || self.view_session != self.session {
            return;
        }
        self.watermark = self.watermark.max(header.watermark);
        if self.settled_session == self.session {
            return;
        }
        self.settled_session = self.session;
        self.tables_lost = false;
        if std::mem::take(&mut self.flush_failed) {
            self.persist_mark();
        }
        for chunk in std::mem::take(&mut self.frozen) {
            let settled = Activity { sequence: Sequence(0), last_write: self.now };
            self.activity.entry(chunk).or_insert(settled);
        }
    }

    /// The disk may have carried a write out in part: whatever the other members have, this one is not known to have the
    /// same.
    fn note_failed_write(&mut self, header: &MessageHeader) {
        let watermark = self.watermark;
        self.failed_writes.retain(|entry| entry.sequence > watermark);
        if self.failed_writes.len() >= usize::from(MAX_SLOTS) {
            self.tables_lost = true;
            return;
        }
        self.failed_writes.push(SlotEntry {
            slot: header.slot,
            sequence: header.sequence,
            offset: header.offset,
            length: header.length,
            failed: true,
        });
    }

    pub(super) fn insert_io(&mut self, io: Io) -> IoId {
        if let Some(index) = self.free_ios.pop() {
            self.ios[index as usize] = Some(io);
            return IoId(index);
        }
        self.ios.push(Some(io));
        IoId(u32::try_from(self.ios.len() - 1).unwrap_or(u32::MAX))
    }

    /// Steps 1 and 2 of a write: intent and dirty bits, which must be durable before the data goes to disk.
    fn start_write(&mut self, id: IoId, header: &MessageHeader) {
        let (offset, length) = (header.offset, u64::from(header.length));
        self.maps.set_intent(offset, length, &mut self.changed);
        if !header.missing.is_empty() {
            self.maps.set_dirty(header.missing, offset, length, &mut self.changed);
        }
        let size = self.spec.chunk_size;
        for chunk in size.chunk_of(offset).0..=size.chunk_of(offset + length - 1).0 {
            let new = Activity { sequence: header.sequence, last_write: self.now };
            let activity = self.activity.entry(Chunk(chunk)).or_insert(new);
            // A write that waited for an overlapping one comes after writes with higher numbers.
            activity.sequence = activity.sequence.max(header.sequence);
            activity.last_write = self.now;
        }
        if mutant!(IntentNotDurable) {
            self.changed.retain(|p| p.map != MapId::Intent);
        }
        if mutant!(DirtyBitsNotDurable) {
            self.changed.retain(|p| p.map == MapId::Intent);
        }
        if mutant!(WriteBeforeBitsDurable) {
            self.persist_cleared();
        }
        // A bit that is set already may still be on its way to disk for an earlier write.
        let no_page = self.pending_pages.is_empty() || mutant!(BitsOnTheirWayCount);
        let awaited = if self.changed.is_empty() && (no_page || mutant!(WriteBeforeBitsDurable)) {
            0
        } else if self.changed.is_empty() {
            self.await_pages(id, header)
        } else {
            self.persist_changed(Waiter::Io(id))
        };
        if awaited == 0 {
            self.start_io(id);
        } else if let Some(Some(io)) = self.ios.get_mut(id.0 as usize) {
            io.awaited = awaited;
        }
    }

    /// Waits for those pages on their way to disk that hold bits of this write.
    fn await_pages(&mut self, id: IoId, header: &MessageHeader) -> usize {
        let size = self.spec.chunk_size;
        let first = ChunkMap::page_of(size.chunk_of(header.offset));
        let last = ChunkMap::page_of(size.chunk_of(header.offset + u64::from(header.length) - 1));
        let mut awaited = 0;
        let maps = std::iter::once(MapId::Intent).chain(header.missing.iter().map(MapId::Dirty));
        for (map, page) in maps.flat_map(|map| (first..=last).map(move |page| (map, page))) {
            let ticket = self.pending_pages.get(&MapPage { map, page });
            if let Some((_, waiters)) = ticket.and_then(|ticket| self.tickets.get_mut(ticket)) {
                waiters.push(Waiter::Io(id));
                awaited += 1;
            }
        }
        awaited
    }

    pub(super) fn io_metadata_durable(&mut self, id: IoId) {
        let Some(Some(io)) = self.ios.get_mut(id.0 as usize) else { return };
        io.awaited -= 1;
        if io.awaited == 0 {
            self.start_io(id);
        }
    }

    pub(super) fn start_io(&mut self, id: IoId) {
        let Some(Some(io)) = self.ios.get(id.0 as usize) else { return };
        if self.broken || io.session != self.session {
            // The client that asked is fenced by now, or the metadata the write needs is not durable.
            return self.disk_done(id, DiskResult::Failed);
        }
        let (offset, length) = io.request.as_ref().map_or((0, 0), |(_, h)| (h.offset, h.length));
        let operation = io.operation;
        if operation == DiskOperation::Flush {
            return self.start_flush(id);
        }
        if operation.is_write() && self.holds_write(id, offset, length.into()) {
            return;
        }
        if operation.is_write() && mutant!(FreshBeforeWritten) {
            self.note_written(offset, length.into());
        }
        if let Some((connection, header)) = self.ios[id.0 as usize].as_ref().and_then(|io| io.request)
            && operation.is_write()
            && mutant!(AnswerBeforeWritten)
        {
            let reply = header.reply(reply_kind(header.kind), Status::Ok);
            self.outputs.push_back(Output::Send(connection, reply, ReplyPayload::None));
        }
        if let Some(Some(io)) = self.ios.get_mut(id.0 as usize) {
            io.started = true;
        }
        self.outputs.push_back(Output::Disk { io: id, operation, offset, length });
    }

    /// The ranges of those writes of the client that are with the disk and touch the bytes from `start` to `end`.
    pub(super) fn writes_under_way(&self, start: u64, end: u64) -> Vec<(u64, u64)> {
        let with_disk = self.ios.iter().flatten().filter(|io| io.started && io.operation.is_write());
        let ranges = with_disk.filter_map(|io| {
            let (_, header) = io.request.as_ref()?;
            Some((header.offset, header.offset + u64::from(header.length)))
        });
        ranges.filter(|(first, last)| *first < end && start < *last).collect()
    }

    /// Makes a disk request of the replica's own; the caller puts it out.
    pub(super) fn insert_own(&mut self, operation: DiskOperation) -> IoId {
        let session = self.session;
        self.insert_io(Io { request: None, session, operation, started: true, awaited: 0 })
    }

    /// Makes the names of disk requests free again, which were kept for the sake of the data that they read.
    pub(super) fn free_ios(&mut self, ios: &[IoId]) {
        self.free_ios.extend(ios.iter().map(|io| io.0));
    }

    pub(super) fn disk_done(&mut self, id: IoId, result: DiskResult) {
        if self.flush_ended(id, result) {
            return self.check_drained();
        }
        let Some(io) = self.ios.get_mut(id.0 as usize).and_then(Option::take) else { return };
        let is_own = io.request.is_none();
        if is_own && self.pull_read_done(id, result) {
            return self.check_drained();
        }
        self.free_ios.push(id.0);
        if is_own && (self.pulled_written(id, result) || self.digest_read_done(id, None)) {
            return self.check_drained();
        }
        let status = match result {
            _ if mutant!(FailedWriteAnsweredWell) && io.operation.is_write() => Status::Ok,
            DiskResult::Done => Status::Ok,
            DiskResult::NoSpace => Status::NoSpace,
            DiskResult::Failed => Status::IoError,
        };
        if let DiskOperation::Write(buffer) = io.operation {
            self.outputs.push_back(Output::Release(buffer));
        }
        match io.request {
            None => self.own_flush_done(id, status),
            Some((connection, header)) => {
                if io.started && io.operation.is_write() && status != Status::Ok {
                    self.note_failed_write(&header);
                }
                self.request_done(id, connection, &header, status);
            }
        }
        self.advance_leave();
        self.check_drained();
    }

    /// What a comparison had to read is read.
    pub(super) fn digested(&mut self, id: IoId, digests: &[u64]) {
        if self.ios.get_mut(id.0 as usize).and_then(Option::take).is_some() {
            self.free_ios.push(id.0);
            self.digest_read_done(id, Some(digests));
            self.check_drained();
        }
    }

    pub(super) fn request_done(
        &mut self,
        id: IoId,
        connection: ConnectionId,
        header: &MessageHeader,
        status: Status,
    ) {
        self.counters.count(header, status);
        let is_write = matches!(header.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        let is_kept =
            mutant!(SlotKeepsTheOlder) && self.slots[usize::from(header.slot.0)].sequence > Sequence(0);
        if is_write && status == Status::Ok {
            self.note_written(header.offset, header.length.into());
        }
        if is_write && status == Status::Ok && !is_kept {
            self.slots[usize::from(header.slot.0)] = SlotEntry {
                slot: header.slot,
                sequence: header.sequence,
                offset: header.offset,
                length: header.length,
                failed: false,
            };
        }
        let mut reply = header.reply(reply_kind(header.kind), status);
        let payload = if header.kind == Kind::Read && status == Status::Ok {
            reply.payload = header.length;
            // The value is the node's to fill in.
            reply.digest = header.digest;
            ReplyPayload::Data(id)
        } else {
            ReplyPayload::None
        };
        self.outputs.push_back(Output::Send(connection, reply, payload));
    }

    /// How many disk requests of sessions before the present one are under way.
    pub(super) fn older_ios(&self) -> usize {
        self.ios.iter().flatten().filter(|io| io.session < self.session).count()
    }

    /// Once a second: chunks that were idle for long and are complete everywhere lose their intent bit, after a flush
    /// that began when both were known. While no client is attached the watermark stands still, so that nothing
    /// that was in flight when it died is forgotten.
    pub(super) fn clear_intents(&mut self) {
        // While this member is Syncing, pulled data that is not flushed may be in any chunk.
        let is_clean = self.view.state(self.member) == Some(MemberState::Clean);
        if self.clearing.is_some() || self.broken || self.holder_connection().is_none() || !is_clean {
            return;
        }
        // What the watermark says is of the client before, until the next one is answered. A flush that failed since may have
        // covered these chunks, and another one proves nothing.
        if self.attach.is_some() || self.flush_failed && !mutant!(OwnFlushRepeated) {
            return;
        }
        let (now, watermark, idle) = (self.now, self.watermark, self.config.intent_idle);
        // Until then a member that went back in time could not be told from one that did not.
        let settled = self.history.settled;
        let is_done = |c: &Chunk, a: &Activity| {
            let is_settled = a.sequence <= settled || mutant!(IntentClearedUnsettled);
            // No mark passes the watermark.
            let is_complete = a.sequence <= watermark && is_settled || mutant!(WatermarkIgnored);
            is_complete && now - a.last_write >= idle && !self.frozen.contains(c)
        };
        // A part of them at a time: a client may have written everywhere, and others' pools wait meanwhile.
        let from = std::mem::take(&mut self.next_clearing);
        let part = self.activity.range(from..).chain(self.activity.range(..from)).take(MAX_CLEARED);
        let chunks: Vec<_> = part.filter(|(c, a)| is_done(c, a)).map(|(c, a)| (*c, a.sequence)).collect();
        if self.activity.len() > MAX_CLEARED {
            let next = self.activity.range(from..).nth(MAX_CLEARED).map(|(chunk, _)| *chunk);
            self.next_clearing = next.unwrap_or_default();
        }
        if !chunks.is_empty() {
            let io = self.own_flush();
            self.clearing = Some((io, chunks));
            if mutant!(IntentClearedUnflushed) {
                self.own_flush_done(io, Status::Ok);
            }
        }
    }

    pub(super) fn own_flush_done(&mut self, id: IoId, status: Status) {
        if self.detach.as_ref().is_some_and(|d| d.flush == Some(id)) {
            return self.detach_flushed(status);
        }
        if self.attach_flushed(id, status)
            || self.leave_flushed(id, status)
            || self.report_flushed(id, status)
        {
            return;
        }
        let Some((_, chunks)) = self.clearing.take_if(|(io, _)| *io == id) else { return };
        if status != Status::Ok {
            return;
        }
        for (chunk, sequence) in chunks {
            let is_same = |a: &Activity| a.sequence == sequence || mutant!(IntentClearedAfterNewWrite);
            if self.activity.get(&chunk).is_some_and(is_same) {
                self.activity.remove(&chunk);
                self.maps.clear(
                    ClearTarget::Intent(chunk),
                    ClearReason::CompleteEverywhere,
                    &mut self.changed,
                );
            }
        }
        self.persist_cleared();
    }
}

const fn reply_kind(request: Kind) -> Kind {
    if matches!(request, Kind::Flush) { Kind::FlushReply } else { Kind::IoReply }
}
