//! What has arrived and what has completed: packets, data in slots, memory that is free again.

use super::{
    Access, Affairs, Ended, Held, Incoming, Lent, Link, MAX_READS, RECEIVE_BUDGET, ReadState, ReadUnderWay,
    Role, Staged, broken, packet,
};
use crate::buffer::{copy_from_segments, copy_segment};
use crate::transport::rdma::endpoint::{Completion, Done, LinkEvent, Verbs};
use crate::transport::rdma::packet::{Packet, PacketKind, TAIL, Target, UNIT};
use crate::transport::unsent::{ANSWERED, Request};
use crate::transport::{ConnectionError, Place, Receiver};
use crate::wire::{HEADER_SIZE, Kind, MessageHeader, PullReply, WireError};

impl<V: Verbs> Link<V> {
    /// Takes in what has arrived and what has completed.
    pub(in crate::transport::rdma) fn receive(
        &mut self,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        if self.is_over {
            return Err(ConnectionError::Closed);
        }
        let result = self.take_in(receiver).and_then(|()| self.invalidate_now());
        if result.is_err() {
            // What is not dealt with goes back to those who share it.
            for completion in std::mem::take(&mut self.completions).iter().filter(|c| c.is_receive) {
                self.verbs.give_back(u32::try_from(completion.number).unwrap_or(u32::MAX));
            }
        }
        result
    }

    /// Answers wait until the keys of their reads are invalid: that is not left to the owner's next turn.
    fn invalidate_now(&mut self) -> Result<(), ConnectionError> {
        if self.ending.is_empty() {
            return Ok(());
        }
        self.invalidate();
        self.post()
    }

    pub(super) fn take_in(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        let mut budget = RECEIVE_BUDGET;
        let mut is_armed = false;
        loop {
            while self.verbs.poll(&mut self.completions)? > 0 {
                let mut completions = std::mem::take(&mut self.completions);
                completions.reverse();
                budget = budget.saturating_sub(completions.len());
                while let Some(completion) = completions.pop() {
                    if let Err(error) = self.complete(completion, receiver) {
                        self.completions = completions;
                        return Err(self.reason(error));
                    }
                }
                self.completions = completions;
                if budget == 0 && !is_armed {
                    // The descriptor is still readable: the event that it shows was not taken.
                    return Ok(());
                }
            }
            if is_armed {
                break;
            }
            self.verbs.quench();
            self.verbs.arm()?;
            is_armed = true;
        }
        while let Some(event) = self.verbs.event()? {
            match event {
                LinkEvent::Established => {}
                LinkEvent::Lost(words) => return Err(ConnectionError::Link(words)),
            }
        }
        Ok(())
    }

    /// Work that was only flushed says nothing of why; the connection's events may.
    pub(super) fn reason(&mut self, error: ConnectionError) -> ConnectionError {
        if matches!(error, ConnectionError::Closed)
            && let Ok(Some(LinkEvent::Lost(words))) = self.verbs.event()
        {
            return ConnectionError::Link(words);
        }
        error
    }

    pub(super) fn complete(
        &mut self,
        completion: Completion,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        let Completion { is_receive, number, done } = completion;
        let buffer = u32::try_from(number).unwrap_or(u32::MAX);
        match done {
            Done::Sent => {
                self.completed = self.completed.max(number);
                self.let_go(receiver);
                return Ok(());
            }
            Done::Failed { status, flushed } => {
                if is_receive {
                    self.verbs.give_back(buffer);
                }
                return Err(if flushed { ConnectionError::Closed } else { ConnectionError::Link(status) });
            }
            Done::Received { length } => {
                let Some((pages, offset, room)) = self.verbs.receive_buffer(buffer) else {
                    return Err(broken("a receive buffer that is not known"));
                };
                let bytes = pages.bytes(offset, room.min(length as usize));
                if let Err(error) = self.packet(bytes, receiver) {
                    self.verbs.give_back(buffer);
                    return Err(error);
                }
            }
            Done::Placed { immediate } => {
                if let Err(error) = self.placed(immediate, receiver) {
                    self.verbs.give_back(buffer);
                    return Err(error);
                }
            }
        }
        self.counters.receives += 1;
        self.verbs.post_receive(buffer)?;
        if self.owed >= self.verbs.sizes().receives {
            return Err(broken("more messages than it has credits for"));
        }
        self.owed += 1;
        Ok(())
    }

    /// Frees what waited for work that has completed.
    pub(super) fn let_go(&mut self, receiver: &mut dyn Receiver) {
        while let Some((number, _)) = self.held.front()
            && *number <= self.completed
        {
            match self.held.pop_front() {
                Some((_, Held::Tag(tag))) => self.sent_tags.push(tag),
                Some((_, Held::Packet(index))) => self.free_packets.push(index),
                Some((_, Held::Staging(staged))) => self.unstage(staged),
                Some((_, Held::Ended(ended))) => self.finish(*ended, receiver),
                None => {}
            }
        }
    }

    pub(super) fn take_affairs(&mut self, affairs: &Affairs) -> Result<(), ConnectionError> {
        self.credits += u32::from(affairs.receives);
        if self.credits > u32::from(self.peer.receives) {
            return Err(broken("the peer gives more credits than it has receive buffers"));
        }
        match self.role {
            Role::Opener(_) => {
                for mark in &affairs.released {
                    self.windows.release(*mark).map_err(broken)?;
                }
                for grant in &affairs.grants {
                    self.windows.add(*grant).map_err(broken)?;
                    // The peer takes the wish as fulfilled; it is told again if it is not.
                    self.told_wanted = 0;
                }
                if !affairs.returns.is_empty() || affairs.wanted > 0 {
                    return Err(broken("a node that gives back windows, or wants some"));
                }
            }
            Role::Acceptor => {
                if !affairs.released.is_empty() || !affairs.grants.is_empty() {
                    return Err(broken("a client that releases slots, or lends windows"));
                }
                self.peer_wants = affairs.wanted;
                for window in &affairs.returns {
                    match self.lent.remove(window) {
                        Some(Lent { map, access: Access::Window(bound), .. }) if map.is_free() => {
                            // It may be used otherwise when the peer's key is good for nothing any more.
                            self.ending.push_back(Ended::Lent { number: *window, bound });
                        }
                        Some(Lent { map, access: Access::Registration(registration), .. })
                            if map.is_free() =>
                        {
                            drop(registration);
                            self.returned.push(*window);
                        }
                        _ => return Err(broken("a window was given back that is in use, or was not lent")),
                    }
                }
            }
        }
        Ok(())
    }

    pub(super) fn packet(
        &mut self,
        bytes: &[u8],
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        let packet = packet::decode(bytes)?;
        self.take_affairs(&packet.affairs)?;
        match packet.kind {
            PacketKind::Flow => Ok(()),
            PacketKind::Message => self.message(&packet, receiver),
            PacketKind::Continuation => {
                let Some(mut incoming) = self.incoming.take() else {
                    return Err(broken("the next part of no message"));
                };
                let missing = incoming.header.payload as usize - incoming.body.len();
                if packet.content.is_empty() || packet.content.len() > missing {
                    return Err(broken("a part of a message that is empty, or too long"));
                }
                self.counters.body_copied_bytes += packet.content.len() as u64;
                incoming.body.extend_from_slice(packet.content);
                if incoming.body.len() < incoming.header.payload as usize {
                    self.incoming = Some(incoming);
                    return Ok(());
                }
                self.deliver(&incoming.header, incoming.targets, &incoming.body, receiver)
            }
            PacketKind::Tail => Err(broken("what stands behind data came without any")),
        }
    }

    pub(super) fn message(
        &mut self,
        packet: &Packet<'_>,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        if self.incoming.is_some() {
            return Err(broken("a message within another"));
        }
        let (header, targets, body) = packet::decode_message(packet)?;
        // The data of a read is in its place already; that of a write does not come this way.
        let expected = match header.kind {
            Kind::IoReply => 0,
            Kind::Write => return Err(broken("a write outside of any slot")),
            Kind::PullData => return Err(broken("pulled data outside of the places for it")),
            _ => header.payload as usize,
        };
        if packet.total as usize != HEADER_SIZE + 16 * targets.len() + expected || body.len() > expected {
            return Err(broken("a message of another length than its header says"));
        }
        if expected > receiver.longest_body() as usize {
            let (what, found) = ("body", header.payload.into());
            return Err(
                WireError::Limit { what, found, expected: "no more than is taken from it now" }.into()
            );
        }
        if body.len() == expected {
            return self.deliver(&header, targets, body, receiver);
        }
        let mut collected = Vec::with_capacity(expected);
        collected.extend_from_slice(body);
        self.counters.body_copied_bytes += body.len() as u64;
        self.incoming = Some(Incoming { header, targets, body: collected });
        Ok(())
    }

    pub(super) fn deliver(
        &mut self,
        header: &MessageHeader,
        targets: Vec<Target>,
        body: &[u8],
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        let name = (header.slot.0, header.sequence.0);
        match (self.role, header.kind) {
            (Role::Acceptor, Kind::Read | Kind::Pull) => {
                let wanted: u64 = targets.iter().map(|t| u64::from(t.length)).sum();
                // How much of its range a pull finds missed, nobody knows before.
                let fits = header.kind == Kind::Pull || wanted == u64::from(header.length);
                if !fits || self.targets.len() >= MAX_READS {
                    return Err(broken("a read whose places have another length, or one too many"));
                }
                self.targets.insert(name, targets);
            }
            _ if !targets.is_empty() => return Err(broken("places for data of what is no read")),
            _ if self.is_unsent(header) => return Err(broken(ANSWERED)),
            (Role::Opener(_), Kind::IoReply | Kind::PullReply) => match self.reads.remove(&name) {
                Some(ReadState::UnderWay(read)) if !read.windows.is_empty() => {
                    self.reads.insert(name, ReadState::Ending);
                    self.end_read(Some((*header, body.to_vec())), read);
                    return Ok(());
                }
                Some(ReadState::UnderWay(ReadUnderWay { staged: Some(staged), .. })) => {
                    self.unpack(header, body, staged, receiver);
                }
                // Whoever asked would take it for the answer, while the peer may still write there.
                Some(ReadState::Ending) => return Err(broken("a read was answered twice")),
                _ => {}
            },
            _ => {}
        }
        receiver.deliver(header, body);
        Ok(())
    }

    /// Whether a message answers what still waits to be sent.
    fn is_unsent(&self, answer: &MessageHeader) -> bool {
        let request = self.unsent.suspect(answer, self.queue.len());
        request.is_some() && self.queue.iter().any(|waits| Request::of(&waits.header) == request)
    }

    /// The peer can write nothing more to what it gave back, or for a read that was answered: whoever asked hears of it.
    fn finish(&mut self, ended: Ended, receiver: &mut dyn Receiver) {
        self.free_windows(&ended);
        let (answer, read) = match ended {
            Ended::Read { answer, read } => (answer, read),
            Ended::Lent { number, .. } => return self.returned.push(number),
        };
        // Another one of its name may have been sent since; nobody waits for this one then.
        let waits = |header: &MessageHeader| {
            let name = (header.slot.0, header.sequence.0);
            matches!(self.reads.get(&name), Some(ReadState::Ending)).then_some(name)
        };
        let waits = answer.as_ref().and_then(|(header, _)| waits(header));
        if let (Some((header, body)), Some(name)) = (answer, waits) {
            self.reads.remove(&name);
            if let Some(staged) = read.staged {
                self.unpack(&header, &body, staged, receiver);
            }
            receiver.deliver(&header, &body);
        } else if let Some(staged) = read.staged {
            self.unstage(staged);
        }
    }

    /// Copies the data of a read or a pull to whoever asked for it.
    pub(super) fn unpack(
        &mut self,
        header: &MessageHeader,
        body: &[u8],
        staged: Staged,
        receiver: &mut dyn Receiver,
    ) {
        let mut header = *header;
        if header.kind == Kind::PullReply {
            let pulled = PullReply::decode(body).map_or(0, |reply| reply.data_bytes());
            header.kind = Kind::PullData;
            header.payload = u32::try_from(pulled).unwrap_or(u32::MAX);
        }
        let length = header.payload as usize;
        if length > 0 && length <= staged.length {
            self.segments.clear();
            if receiver.place(&header, &mut self.segments) == Place::Data
                && let Some((slab, _)) = self.staging.get(staged.slab)
            {
                // The peer can write there still, if it breaks the rules: bytes that change are copied, and never looked at.
                let copied = copy_segment(&slab.pages.segment(staged.offset, length), &self.segments);
                self.counters.data_copied_bytes += copied as u64;
            }
        }
        self.unstage(staged);
    }

    /// The peer has written to a slot.
    pub(super) fn placed(&mut self, mark: u32, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        let (window, position) = ((mark >> 16) as usize, (mark & 0xffff) as usize * UNIT);
        let window = u16::try_from(window).unwrap_or(u16::MAX);
        let Some(lent) = self.lent.get_mut(&window) else {
            return Err(broken("data in a window that was not lent"));
        };
        // The peer can change it at any time: it is read once.
        let mut tail = [0; TAIL];
        if copy_from_segments(&[lent.memory.part(position, TAIL)], &mut tail) != TAIL {
            return Err(broken("data beyond the end of its window"));
        }
        let tail = packet::decode(&tail)?;
        let (header, targets, _) = packet::decode_message(&tail)?;
        let padded = (header.payload as usize).next_multiple_of(UNIT);
        if tail.kind != PacketKind::Tail || header.kind != Kind::Write || !targets.is_empty() || padded == 0 {
            return Err(broken("data in a window that is no write"));
        }
        let Some(start) = position.checked_sub(padded) else {
            return Err(broken("data that begins before its window"));
        };
        if !lent.map.take_at(start, padded + TAIL) {
            return Err(broken("data in a slot that is in use, or begins at no page"));
        }
        self.in_use.insert(mark, (window, start, padded + TAIL));
        self.take_affairs(&tail.affairs)?;
        if !receiver.placed(&header, window, u32::try_from(start).unwrap_or(u32::MAX), mark) {
            self.release(mark);
        }
        receiver.deliver(&header, &[]);
        Ok(())
    }
}
