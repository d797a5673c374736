//! The data path: requests become parts, parts become messages, answers complete them.

use super::{
    Client, DataDigest, FlushRound, IoError, Notice, Op, Operation, Output, Payload, Protection, State, Token,
};
use crate::client::parts::{OpIndex, Part, PartState};
use crate::pool::{Cause, Chunk, MemberId, MemberSet, Sequence, Slot};
use crate::time::Time;
use crate::wire::{DirtyAddition, Kind, MAX_RANGE, MessageHeader, Status};

impl Client {
    /// Takes in a request. Its memory must stay as it is until [`Output::Complete`] with its token.
    ///
    /// `offset` and `length` are bytes, multiples of the pool's logical block size; a flush has neither.
    pub fn submit(&mut self, token: Token, operation: Operation, offset: u64, length: u64, now: Time) {
        self.now = now;
        if self.refuse_after_loss(token) {
            return;
        }
        self.last_request = Some(now);
        if let Err(error) = self.check(operation, offset, length) {
            self.counters.failed += 1;
            self.outputs.push_back(Output::Complete(token, Err(error)));
            return;
        }
        let stuck = (!self.is_in_service()).then_some(now);
        let op = Op { token, operation, offset, length, issued: 0, parts: 0, error: None, stuck };
        let index = self.insert_op(op);
        if operation == Operation::Flush {
            self.flush_queue.push(index);
        } else {
            self.backlog.push_back(index);
        }
        self.pump();
    }

    fn check(&self, operation: Operation, offset: u64, length: u64) -> Result<(), IoError> {
        match &self.state {
            State::Over(super::OverReason::Fenced(_)) => return Err(IoError::Fenced),
            State::Over(_) | State::Detaching { .. } => return Err(IoError::Detached),
            State::Gathering { .. } | State::Attaching { .. } | State::Changing { .. } | State::Active => {}
        }
        if self.in_flight() >= super::MAX_QUEUED {
            return Err(IoError::TooMany);
        }
        if operation == Operation::Flush {
            return Ok(());
        }
        let Some(spec) = &self.spec else { return Err(IoError::Suspended) };
        let unit = u64::from(spec.logical_block_size);
        let end = offset.checked_add(length).ok_or(IoError::BadRange)?;
        if length == 0 || end > spec.size || !offset.is_multiple_of(unit) || !length.is_multiple_of(unit) {
            return Err(IoError::BadRange);
        }
        Ok(())
    }

    fn insert_op(&mut self, op: Op) -> OpIndex {
        if let Some(index) = self.free_ops.pop() {
            self.ops[index as usize] = Some(op);
            return index;
        }
        self.ops.push(Some(op));
        u32::try_from(self.ops.len() - 1).unwrap_or(u32::MAX)
    }

    fn op_mut(&mut self, index: OpIndex) -> Option<&mut Op> {
        self.ops.get_mut(index as usize)?.as_mut()
    }

    /// Turns waiting operations into parts while there are slots, credits and an active pool.
    pub(super) fn pump(&mut self) {
        if self.is_quiescing() {
            self.try_quiesced();
        }
        if self.is_command_quiescing() {
            self.advance_command();
        }
        self.try_leave();
        if !self.is_active() || self.is_quiescing() {
            return;
        }
        while let Some(&index) = self.backlog.front() {
            if !self.issue(index) {
                break;
            }
            self.backlog.pop_front();
        }
        if self.wants_flush() {
            self.start_flush();
        }
    }

    /// Makes parts of an operation; false when it has to wait for slots or credits.
    fn issue(&mut self, index: OpIndex) -> bool {
        loop {
            let Some(Some(op)) = self.ops.get(index as usize) else { return true };
            let (operation, at, left) = (op.operation, op.offset + op.issued, op.length - op.issued);
            if left == 0 || op.error.is_some() {
                return true;
            }
            let length = self.part_length(operation, at, left);
            let credit = if operation.has_data() { u64::from(length) } else { 0 };
            let full =
                self.parts.in_flight() - self.held_slots() >= self.slot_limit || !self.parts.has_free();
            if full || (self.bytes_in_flight > 0 && self.bytes_in_flight + credit > self.max_bytes) {
                return false;
            }
            let sequence = self.next_sequence();
            let Some(Some(op)) = self.ops.get_mut(index as usize) else { return true };
            let op_offset = op.issued;
            op.issued += u64::from(length);
            op.parts += 1;
            self.bytes_in_flight += credit;
            let Some(slot) = self.parts.admit(operation, index, op_offset, (at, length), sequence) else {
                return false;
            };
            if self.parts.get(slot).is_some_and(|p| p.state == PartState::Unsent) {
                self.send_part(slot);
            } else {
                self.counters.overlapping += 1;
            }
        }
    }

    /// How much of an operation goes into its next part.
    fn part_length(&self, operation: Operation, at: u64, left: u64) -> u32 {
        let most = match operation {
            Operation::Read => self.same_home(at, u64::from(self.max_io).min(left)),
            Operation::Write => u64::from(self.max_io),
            Operation::Discard | Operation::WriteZeroes | Operation::Flush => u64::from(MAX_RANGE),
        };
        u32::try_from(left.min(most)).unwrap_or(u32::MAX)
    }

    /// The home leg of a chunk: the one Clean member that serves its reads, so that caches stay warm and a read never
    /// goes back in time between two legs while a write is in flight.
    fn home(&self, chunk: Chunk, but: MemberSet) -> Option<MemberId> {
        // The highest score wins: when a member is lost, only its own chunks move, and no read that is in flight to
        // another leg comes to be at the wrong one.
        let score = |m: &MemberId| {
            let key = (chunk.0 * crate::pool::MAX_MEMBERS as u64 + u64::from(m.as_u8()) + 1)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15);
            (key ^ (key >> 29)).wrapping_mul(0xbf58_476d_1ce4_e5b9) >> 32
        };
        let readable = if mutant!(ReadFromSyncing) { self.view_active() } else { self.view_clean() };
        readable.without(but).iter().max_by_key(score)
    }

    /// The first bytes of a range that have one home leg, at most `length`.
    fn same_home(&self, at: u64, length: u64) -> u64 {
        let Some(size) = self.spec.as_ref().map(|s| s.chunk_size) else { return length };
        let first = self.home(size.chunk_of(at), MemberSet::EMPTY);
        let mut end = (size.chunk_of(at).0 + 1) << size.shift();
        while end < at + length && self.home(size.chunk_of(end), MemberSet::EMPTY) == first {
            end += size.bytes();
        }
        length.min(end - at)
    }

    fn send_part(&mut self, slot: Slot) {
        if self.is_hold(slot) {
            return; // Its range is quiet now.
        }
        let protection = self.protect(slot);
        let Some(part) = self.parts.get(slot).copied() else { return };
        if self.spec.as_ref().is_some_and(|s| part.offset + u64::from(part.length) > s.size) {
            // The operator forced a pool into use that had not been made larger yet.
            return self.part_failed(slot, IoError::BadRange);
        }
        let legs = if part.operation == Operation::Read {
            let chunk = self.spec.as_ref().map_or(Chunk(0), |s| s.chunk_size.chunk_of(part.offset));
            match self.home(chunk, part.failed) {
                Some(home) => MemberSet::only(home),
                // Every Clean copy has failed the read: only then does the guest see an error.
                None => return self.part_failed(slot, IoError::Media),
            }
        } else {
            self.view_active()
        };
        let kind = match part.operation {
            Operation::Read => Kind::Read,
            Operation::Write => Kind::Write,
            Operation::Discard => Kind::Discard,
            Operation::WriteZeroes | Operation::Flush => Kind::WriteZeroes,
        };
        let token = self.ops.get(part.op as usize).and_then(Option::as_ref).map_or(Token(0), |op| op.token);
        let write = part.operation == Operation::Write;
        let header = MessageHeader {
            slot,
            sequence: part.sequence,
            offset: part.offset,
            length: part.length,
            payload: if write { part.length } else { 0 },
            // The answer is to carry one; the digest of a write is the driver's to compute.
            digest: (part.operation == Operation::Read && self.config.data_digest != DataDigest::Off)
                .then_some(0),
            missing: if part.operation.is_write() { self.view_out() } else { MemberSet::EMPTY },
            ..self.header(kind)
        };
        let now = self.now;
        if part.operation.is_write() {
            self.history.written();
        }
        if let Some(part) = self.parts.get_mut(slot) {
            part.state = PartState::Sent;
            part.pending = legs;
            part.sent_at = now;
            if part.operation.is_write() {
                part.erred = MemberSet::EMPTY;
            }
        }
        for leg in legs.iter() {
            let offset = part.op_offset;
            let payload = if write { Payload::Request { token, offset, protection } } else { Payload::None };
            self.send(leg, header, payload);
        }
    }

    /// What protects the data of a part that is about to be sent.
    fn protect(&mut self, slot: Slot) -> Protection {
        let mode = self.config.data_digest;
        let Some(part) = self.parts.get_mut(slot).filter(|p| p.operation == Operation::Write) else {
            return Protection::None;
        };
        let (was_sent, was_bounced, is_faulted) = (part.barrier, part.bounce, part.fault);
        if is_faulted {
            // Legs may have filler on record under the sequence of before, if an attachment ended before the repetition.
            if !was_bounced {
                let sequence = self.next_sequence();
                if let Some(part) = self.parts.get_mut(slot) {
                    part.sequence = sequence;
                    part.bounce = true;
                }
            }
            self.counters.bounced += 1;
            return Protection::Salvage;
        }
        match mode {
            DataDigest::Off => return Protection::None,
            DataDigest::Detect if !was_bounced => {
                if was_sent {
                    // Its memory may have changed since: not what members have on record under the sequence of before.
                    let sequence = self.next_sequence();
                    if let Some(part) = self.parts.get_mut(slot) {
                        part.sequence = sequence;
                    }
                }
                return Protection::Digest;
            }
            DataDigest::Detect | DataDigest::Bounce => part.bounce = true,
        }
        self.counters.bounced += 1;
        Protection::Bounce
    }

    /// Whether the data of this slot goes by way of a copy of the driver's.
    #[must_use]
    pub fn is_bounced(&self, slot: Slot) -> bool {
        self.parts.get(slot).is_some_and(|p| p.bounce)
    }

    /// Memory of a part could not be reached. A read fails. A write fails as well, but some legs may have other data than others by
    /// now: first it is repeated on all from one copy, in which zeroes stand for what cannot be read.
    pub(super) fn memory_fault(&mut self, slot: Slot, sequence: Sequence) {
        let Some(part) = self.parts.get_mut(slot) else { return };
        if part.sequence != sequence || part.state != PartState::Sent {
            return;
        }
        self.counters.memory_faults += 1;
        match part.operation {
            Operation::Write => {
                part.fault = true;
                part.repeat = !mutant!(FaultedWriteNotRepeated);
            }
            _ => self.part_failed(slot, IoError::Memory),
        }
    }

    /// A transfer did not bring the data that its digest says.
    fn digest_differs(&mut self, member: MemberId, slot: Slot) {
        self.counters.digest_mismatches += 1;
        let Some(part) = self.parts.get_mut(slot) else { return };
        match (part.operation, part.bounce) {
            (Operation::Read, false) => {
                // The owner may have changed the memory meanwhile. Into a copy that nobody else knows it is asked for once more.
                part.bounce = true;
                self.requeue_read(slot);
                self.send_unsent(slot);
            }
            (Operation::Read, true) => self.read_failed(member, slot),
            (_, false) => {
                part.pending.remove(member);
                part.repeat = true;
                self.part_progress(slot);
            }
            (_, true) => self.drop_member_for(
                member,
                Cause::Refused,
                "data arrives there with another digest than it was sent with",
            ),
        }
    }

    /// Where the data of a read answer belongs: the request and the offset in its memory. `None` when nobody waits for
    /// it any more; the driver then drops the data. Called before [`super::Event::Message`] for the same header.
    #[must_use]
    pub fn payload_target(&self, link: super::LinkId, header: &MessageHeader) -> Option<(Token, u64)> {
        let member = self.links.get(usize::from(link.0))?.member?;
        let part = self.parts.get(header.slot)?;
        let awaited = self.is_awaited(member, part, header) && part.operation == Operation::Read;
        if !awaited || header.payload != part.length || header.status != Status::Ok {
            return None;
        }
        Some((self.ops.get(part.op as usize)?.as_ref()?.token, part.op_offset))
    }

    fn is_awaited(&self, member: MemberId, part: &Part, header: &MessageHeader) -> bool {
        header.epoch == self.epoch && part.sequence == header.sequence && part.pending.contains(member)
    }

    pub(super) fn io_reply(&mut self, member: MemberId, header: &MessageHeader) {
        let Some(part) = self.parts.get(header.slot) else { return };
        // Answers to what was given up meanwhile are of no interest.
        if !self.is_awaited(member, part, header) {
            return;
        }
        let (operation, offset, length) = (part.operation, part.offset, part.length);
        match header.status {
            Status::Ok if operation == Operation::Read && header.payload != length => {
                self.drop_member_for(
                    member,
                    Cause::Refused,
                    "protocol error: a read was answered with another length",
                );
            }
            Status::Ok => {
                let (erred, sent_at) = (part.erred, part.sent_at);
                if let Some(part) = self.parts.get_mut(header.slot) {
                    part.pending.remove(member);
                }
                if operation == Operation::Read {
                    erred.iter().for_each(|m| self.note_bad_range(m, offset, length.into()));
                } else {
                    self.health.note_answer(member, self.now - sent_at);
                }
                self.part_progress(header.slot);
            }
            Status::StaleEpoch | Status::NotAttached => {
                self.end(super::OverReason::Fenced(header.epoch));
            }
            Status::IoError | Status::NoSpace if operation == Operation::Read => {
                self.read_failed(member, header.slot);
            }
            Status::DigestDiffers => self.digest_differs(member, header.slot),
            Status::IoError | Status::NoSpace if self.is_last_clean(member) => {
                if let Some(part) = self.parts.get_mut(header.slot) {
                    part.pending.remove(member);
                    part.erred.insert(member);
                }
                // If the view under way has the others Out, the guest hears of it when that is committed.
                self.part_progress(header.slot);
            }
            status => {
                let cause = disk_cause(status, Cause::WriteErrors);
                let text = format!("{operation} of {length} bytes at {offset} failed: {status}");
                self.drop_member_for(member, cause, &text);
            }
        }
    }

    /// A leg could not read, or not bring what it read: another one is asked.
    fn read_failed(&mut self, member: MemberId, slot: Slot) {
        let Some(part) = self.parts.get_mut(slot) else { return };
        part.failed.insert(member);
        part.erred.insert(member);
        let (offset, length) = (part.offset, part.length);
        self.counters.read_errors += 1;
        self.faults.count(member);
        self.notice(Notice::ReadError(member, offset, length));
        self.requeue_read(slot);
        self.send_unsent(slot);
    }

    fn send_unsent(&mut self, slot: Slot) {
        if self.parts.get(slot).is_some_and(|p| p.state == PartState::Unsent) {
            self.send_if_active(slot);
        }
    }

    fn requeue_read(&mut self, slot: Slot) {
        let sequence = self.next_sequence();
        self.parts.requeue(slot, sequence);
    }

    fn send_if_active(&mut self, slot: Slot) {
        if self.is_active() && !self.is_quiescing() {
            self.send_part(slot);
        }
    }

    /// Completes a part when every leg answered, and those that did not are Out in the committed view.
    fn part_progress(&mut self, slot: Slot) {
        let Some(part) = self.parts.get(slot) else { return };
        let is_failed = part.state == PartState::Sent && part.operation.is_write() && !part.erred.is_empty();
        if is_failed && self.is_active() && self.view_clean().is_subset(part.erred) {
            return self.write_failed(slot);
        }
        let is_answered =
            part.pending.is_empty() || mutant!(WriteByOneLeg) && part.pending != self.view_active();
        if part.state != PartState::Sent || !is_answered {
            return;
        }
        if part.repeat {
            let sequence = self.next_sequence();
            self.parts.repeat(slot, sequence);
            // A barrier waits for it too: some legs may have carried it out, and a member that pulled that from one of them would be
            // left with it if the client died.
            if self.is_active() && !(self.is_quiescing() && mutant!(RepeatAfterBarrier)) {
                self.send_part(slot);
            }
            return;
        }
        if part.operation.is_write() {
            if !self.is_inactive(part.failed.union(part.erred)) && !mutant!(CompleteBeforeCommit) {
                return; // Completes at the commit of the view that has them Out.
            }
            let (offset, length) = (part.offset, part.length);
            if self.any_write_back() {
                self.unflushed.insert_bytes(offset, length.into());
            }
        }
        let fault = self.parts.get(slot).is_some_and(|p| p.fault);
        self.finish_part(slot, fault.then_some(IoError::Memory));
    }

    /// Whether a disk error of this member leaves no Clean one: the others are lost already, or were never there.
    fn is_last_clean(&self, member: MemberId) -> bool {
        let clean = match &self.state {
            State::Changing { next, attach: false, .. } => next.clean(),
            _ => self.view_clean(),
        };
        clean == MemberSet::only(member)
    }

    /// The disk of every Clean member failed a write. The guest must know: to lose the last leg would help nobody, and the next
    /// attachment would end in the same way.
    fn write_failed(&mut self, slot: Slot) {
        let clean = self.view_clean();
        // Syncing members may carry the write out, now or later: they are lost, and come back with what the Clean one has.
        let others = self.view_active().without(clean).intersection(self.ready_members());
        others.iter().for_each(|m| {
            self.drop_member_for(m, Cause::WriteErrors, "the only Clean member failed a write");
        });
        self.part_failed(slot, IoError::Media);
    }

    /// Whether the committed view does not need these members any more: they are Out, or were removed since.
    fn is_inactive(&self, members: MemberSet) -> bool {
        members.is_empty() || members.intersection(self.view_active()).is_empty()
    }

    fn part_failed(&mut self, slot: Slot, error: IoError) {
        self.finish_part(slot, Some(error));
    }

    fn finish_part(&mut self, slot: Slot, error: Option<IoError>) {
        let Some(part) = self.parts.get(slot).copied() else { return };
        if part.operation.has_data() {
            self.bytes_in_flight -= u64::from(part.length);
        }
        if part.bounce {
            self.outputs.push_back(Output::Unbounce(slot));
        }
        self.release_part(slot);
        if let Some(op) = self.op_mut(part.op) {
            op.parts -= 1;
            op.error = op.error.or(error);
            if op.parts == 0 && (op.issued == op.length || op.error.is_some()) {
                self.finish_op(part.op);
            }
        }
    }

    /// Frees a slot, and sends what waited for it alone.
    pub(super) fn release_part(&mut self, slot: Slot) {
        let mut ready = std::mem::take(&mut self.ready_slots);
        self.parts.release(slot, |s| ready.push(s));
        for slot in ready.drain(..) {
            self.send_if_active(slot);
        }
        self.ready_slots = ready;
    }

    fn finish_op(&mut self, index: OpIndex) {
        let Some(op) = self.ops.get_mut(index as usize).and_then(Option::take) else { return };
        self.free_ops.push(index);
        let result = op.error.map_or(Ok(()), Err);
        match result {
            Ok(()) => self.counters.completed += 1,
            Err(_) => self.counters.failed += 1,
        }
        self.outputs.push_back(Output::Complete(op.token, result));
        if self.detach_requested {
            self.try_detach();
        }
    }

    /// A view was committed: completes what waited for it and sends what is not sent.
    pub(super) fn resume_requests(&mut self) {
        let mut slots = std::mem::take(&mut self.slot_scratch);
        slots.extend(self.parts.slots().map(|(slot, p)| (p.sequence, slot)));
        slots.sort_unstable();
        let clean = self.view_clean();
        for (_, slot) in slots.drain(..) {
            // A leg that was lost with a read may serve it when it is back.
            if let Some(part) = self.parts.get_mut(slot).filter(|p| p.operation == Operation::Read) {
                part.failed = part.failed.intersection(clean);
            }
            let Some(part) = self.parts.get(slot).copied().filter(|_| !self.is_hold(slot)) else { continue };
            let is_lost =
                part.state == PartState::Unsent || (part.state == PartState::Sent && part.pending.is_empty());
            if part.operation == Operation::Read && is_lost {
                self.requeue_read(slot);
            }
            match self.parts.get(slot).map(|p| p.state) {
                // A write that failed on the only Clean member may have begun another view.
                Some(PartState::Unsent) if !self.is_active() => {}
                Some(PartState::Unsent) => self.send_part(slot),
                Some(PartState::Sent) => self.part_progress(slot),
                Some(PartState::Blocked | PartState::Free) | None => {}
            }
        }
        self.slot_scratch = slots;
        self.resume_flush();
    }

    /// By what each member's last hello said: a leg that is down may come back with what it had not flushed.
    fn any_write_back(&self) -> bool {
        !self.view_active().is_subset(self.write_through)
    }

    /// What members miss that are lost now: every write that is or was in flight and is not finished, and for a write-back store all that it had answered
    /// but not flushed.
    pub(super) fn missed_by(&self, members: MemberSet) -> Vec<DirtyAddition> {
        let was_sent = |p: &Part| p.operation.is_write() && (p.state == PartState::Sent || p.barrier);
        let in_flight = self.parts.slots().filter(|(_, p)| was_sent(p) && !mutant!(InFlightForgotten));
        let mut additions: Vec<_> = in_flight
            .map(|(_, p)| DirtyAddition { members, offset: p.offset, length: p.length.into() })
            .collect();
        // A store that is gone can not be asked any more; what its last hello said is kept with the link.
        let kept = self.write_through.union(self.left_flushed);
        let write_back = members.without(kept);
        if !write_back.is_empty() && !mutant!(UnflushedForgotten) {
            let unflushed = self.unflushed.ranges().chain(self.flushing.ranges());
            additions.extend(unflushed.map(|(offset, length)| DirtyAddition {
                members: write_back,
                offset,
                length,
            }));
        }
        additions
    }

    fn wants_flush(&self) -> bool {
        !self.flush_queue.is_empty() || self.commands.wants_flush
    }

    /// Starts a flush round for every flush that waits. Flushes that arrive while one is under way share the next.
    pub(super) fn start_flush(&mut self) {
        if self.flush.is_some() || !self.wants_flush() || !self.is_active() {
            return;
        }
        let ops = std::mem::take(&mut self.flush_queue);
        self.begin_flush(ops);
    }

    /// Starts a flush round, which completes these operations.
    pub(super) fn begin_flush(&mut self, ops: Vec<OpIndex>) -> Sequence {
        let for_command = std::mem::take(&mut self.commands.wants_flush);
        let sequence = self.next_sequence();
        self.flushing.append(&mut self.unflushed);
        let (epoch, since) = (self.epoch, self.now);
        let none = MemberSet::EMPTY;
        self.flush =
            Some(FlushRound { sequence, epoch, pending: none, failed: none, since, ops, for_command });
        self.send_flush();
        sequence
    }

    fn send_flush(&mut self) {
        let (legs, now, epoch) = (self.view_active(), self.now, self.epoch);
        let Some(flush) = &mut self.flush else { return };
        flush.epoch = epoch;
        flush.pending = legs;
        flush.failed = MemberSet::EMPTY;
        flush.since = now;
        let sequence = flush.sequence;
        for leg in legs.iter() {
            let header = MessageHeader { sequence, ..self.header(Kind::Flush) };
            self.send(leg, header, Payload::None);
        }
    }

    fn resume_flush(&mut self) {
        let Some(flush) = &self.flush else { return };
        if flush.epoch != self.epoch {
            self.send_flush();
        } else {
            self.flush_progress();
        }
    }

    pub(super) fn flush_reply(&mut self, member: MemberId, header: &MessageHeader) {
        let Some(flush) = &mut self.flush else { return };
        if header.epoch != self.epoch || flush.sequence != header.sequence || !flush.pending.contains(member)
        {
            return;
        }
        if matches!(header.status, Status::IoError | Status::NoSpace) && !mutant!(LastFlushRepeated) {
            self.failed_flushes.insert(member);
        }
        match header.status {
            Status::Ok => {
                flush.pending.remove(member);
                self.flush_progress();
            }
            Status::StaleEpoch | Status::NotAttached => self.end(super::OverReason::Fenced(header.epoch)),
            Status::IoError | Status::NoSpace if self.view_clean() == MemberSet::only(member) => {
                // The guest has to know. What was not flushed may be gone, and no other member has it.
                self.finish_flush(Some(IoError::Media));
                if !mutant!(LastFlushRepeated) {
                    self.drop_member(member, "the only Clean member failed a flush");
                }
            }
            status => {
                let cause = disk_cause(status, Cause::FlushErrors);
                self.drop_member_for(member, cause, &format!("flush failed: {status}"));
            }
        }
    }

    fn flush_progress(&mut self) {
        let done = self.flush.as_ref().is_some_and(|f| f.pending.is_empty() && self.is_inactive(f.failed));
        let by_one =
            mutant!(FlushByOneLeg) && self.flush.as_ref().is_some_and(|f| f.pending != self.view_active());
        if done || by_one {
            self.finish_flush(None);
        }
    }

    fn finish_flush(&mut self, error: Option<IoError>) {
        let Some(flush) = self.flush.take() else { return };
        match error {
            None if mutant!(FlushCoversTooMuch) => {
                self.flushing.clear();
                self.unflushed.clear();
            }
            None => self.flushing.clear(),
            // Nothing is known to be durable; what was to be flushed stays unflushed.
            Some(_) => self.unflushed.append(&mut self.flushing),
        }
        for index in flush.ops {
            if let Some(op) = self.op_mut(index) {
                op.error = error;
                self.finish_op(index);
            }
        }
        if flush.for_command {
            self.command_flushed();
        }
        if self.commands.wants_flush {
            self.start_flush();
        }
    }

    /// Fails every request.
    pub(super) fn fail_all(&mut self, error: IoError) {
        self.backlog.clear();
        self.flush_queue.clear();
        self.flush = None;
        let slots: Vec<_> = self.parts.slots().map(|(slot, _)| slot).collect();
        for slot in slots {
            self.outputs.push_back(Output::Unbounce(slot));
            self.parts.release(slot, |_| {});
        }
        self.bytes_in_flight = 0;
        for index in 0..self.ops.len() {
            if let Some(op) = &mut self.ops[index] {
                op.error = Some(error);
                self.finish_op(u32::try_from(index).unwrap_or(u32::MAX));
            }
        }
    }

    /// Finds requests that have waited too long: for a leg, which is then lost, or for the pool, which then fails them.
    pub(super) fn tick_requests(&mut self) {
        let (now, leg_timeout) = (self.now, self.config.leg_timeout);
        if self.is_active() {
            let late = |since: Time, pending: MemberSet| {
                if now - since > leg_timeout { pending } else { MemberSet::EMPTY }
            };
            let silent = self
                .parts
                .slots()
                .fold(MemberSet::EMPTY, |set, (_, p)| set.union(late(p.sent_at, p.pending)));
            let silent = self.flush.as_ref().map_or(silent, |f| silent.union(late(f.since, f.pending)));
            silent.iter().for_each(|m| {
                self.drop_member_for(m, Cause::Silent, "no answer within the leg timeout");
            });
        }
        if self.is_active() {
            self.drop_slow_member();
        }
        if matches!(self.state, State::Gathering { .. } | State::Attaching { .. }) {
            // Where every current copy is there and its disk refuses, there is nothing to wait for.
            let clean = self.view_clean();
            let is_hopeless = !clean.is_empty() && clean.is_subset(self.disks_refuse);
            let (limit, error) = if is_hopeless {
                (leg_timeout.min(self.config.suspend_timeout), IoError::Media)
            } else {
                (self.config.suspend_timeout, IoError::Suspended)
            };
            for index in 0..self.ops.len() {
                // What counts is how long a request has waited for the pool, not how long the pool took before.
                let stuck = self.ops[index].as_ref().map(|op| op.stuck.unwrap_or(now));
                if stuck.is_some_and(|since| now - since > limit) {
                    self.abandon(u32::try_from(index).unwrap_or(u32::MAX), error);
                }
            }
        }
    }

    /// Drops the member whose counted delays exceed the leg timeout. Drops at most one: after that the others may have no Clean member to
    /// be compared with.
    fn drop_slow_member(&mut self) {
        let (now, least) = (self.now, self.least_stall());
        let writes = self.parts.slots().filter(|(_, p)| p.operation != Operation::Read);
        let flush = self.flush.iter().map(|f| (f.since, f.pending));
        let requests = writes.map(|(_, p)| (p.sent_at, p.pending)).chain(flush);
        let is_late = |(since, pending): &(Time, MemberSet)| !pending.is_empty() && now - *since > least;
        let mut waiting: Vec<_> = requests.filter(is_late).collect();
        waiting.sort_unstable_by_key(|(since, _)| *since);
        for (since, pending) in waiting {
            if let Some((member, stalled)) = self.stalls(pending, since) {
                let reason = format!(
                    "it delayed requests by {stalled:.1?} in all within a minute, and other members did not"
                );
                return self.drop_member_for(member, Cause::TooSlow, &reason);
            }
        }
    }

    /// Whether a request can be served now, or as soon as the view under way is committed.
    pub(super) const fn is_in_service(&self) -> bool {
        matches!(self.state, State::Active | State::Changing { attach: false, .. })
    }

    /// The pool is about to be suspended: the requests that it has wait for it from now on, unless they did before.
    pub(super) fn note_stuck(&mut self) {
        if !self.is_in_service() {
            return;
        }
        let now = self.now;
        for op in self.ops.iter_mut().flatten() {
            let since = op.stuck.get_or_insert(now);
            if mutant!(SuspensionResets) {
                *since = now;
            }
        }
    }

    /// Fails every request of a suspended pool.
    pub(super) fn abandon_all(&mut self, error: IoError) {
        for index in 0..self.ops.len() {
            if self.ops[index].is_some() {
                self.abandon(u32::try_from(index).unwrap_or(u32::MAX), error);
            }
        }
    }

    /// Fails one request of a suspended pool: nothing of it is under way.
    fn abandon(&mut self, index: OpIndex, error: IoError) {
        self.backlog.retain(|&i| i != index);
        self.flush_queue.retain(|&i| i != index);
        if let Some(flush) = &mut self.flush {
            flush.ops.retain(|&i| i != index);
        }
        let slots: Vec<_> = self.parts.slots().filter(|(_, p)| p.op == index).map(|(slot, _)| slot).collect();
        for slot in slots {
            let credit = self.parts.get(slot).filter(|p| p.operation.has_data()).map_or(0, |p| p.length);
            self.bytes_in_flight -= u64::from(credit);
            self.outputs.push_back(Output::Unbounce(slot));
            self.parts.give_up(slot);
        }
        if let Some(op) = self.op_mut(index) {
            op.error = Some(error);
            self.finish_op(index);
        }
    }
}

/// What an answer to a request says of the disk.
const fn disk_cause(status: Status, failed: Cause) -> Cause {
    match status {
        Status::NoSpace => Cause::DiskFull,
        Status::IoError => failed,
        _ => Cause::Refused,
    }
}
