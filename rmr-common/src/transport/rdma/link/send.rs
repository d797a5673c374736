//! How messages become work: packets for receive buffers, data for slots of a node, data for the memory of a read.

use super::{
    Affairs, Content, Held, Link, MAX_STAGING, Operation, Outgoing, PACKETS, Piece, RING_ENTRY, ReadState,
    ReadUnderWay, Role, Staged, Step, broken, packet,
};
use crate::buffer::{Segment, copy_from_segments, copy_to_segments};
use crate::transport::ConnectionError;
use crate::transport::rdma::endpoint::{Keys, Verbs, WorkRequest};
use crate::transport::rdma::packet::{MAX_TARGETS, PacketKind, TAIL, Target, UNIT};
use crate::transport::rdma::slots::PageMap;
use crate::transport::rdma::{Exposure, MAX_WINDOW, RdmaError, ReadMode};
use crate::wire::{HEADER_SIZE, Kind, MessageHeader};

impl<V: Verbs> Link<V> {
    /// Posts a message; gives it back if it has to wait.
    pub(super) fn send(&mut self, outgoing: Outgoing) -> Result<Option<Outgoing>, ConnectionError> {
        // The last credit is for a packet that gives credits to the peer.
        if self.credits < 2 || self.room() < 2 {
            return Ok(Some(outgoing));
        }
        let Outgoing { header, content } = outgoing;
        let waits = match content {
            Content::Plain { body, posted } => self.send_plain(&header, body, posted)?,
            Content::Write(segments) => self.send_write(&header, segments)?.map(Content::Write),
            Content::Read(segments) => self.send_read(&header, segments)?.map(Content::Read),
            Content::Data(segments, tag) => {
                self.send_data(&header, segments, tag)?.map(|s| Content::Data(s, tag))
            }
        };
        Ok(waits.map(|content| Outgoing { header, content }))
    }

    pub(super) fn send_plain(
        &mut self,
        header: &MessageHeader,
        body: Vec<u8>,
        mut posted: Option<usize>,
    ) -> Result<Option<Content>, ConnectionError> {
        self.forget_read(header);
        let total = u32::try_from(HEADER_SIZE + body.len()).unwrap_or(u32::MAX);
        loop {
            if self.credits < 2 || self.room() < 2 || !self.has_packet(HEADER_SIZE + body.len()) {
                return Ok(Some(Content::Plain { body, posted }));
            }
            let affairs = self.affairs();
            self.scratch.clear();
            let done = posted.unwrap_or(0);
            if posted.is_none() {
                packet::begin(PacketKind::Message, &affairs, total, 0, &mut self.scratch);
                self.scratch.extend_from_slice(&header.encode());
            } else {
                packet::begin(PacketKind::Continuation, &affairs, total, 0, &mut self.scratch);
            }
            let part = (self.peer.receive_size as usize - self.scratch.len()).min(body.len() - done);
            self.scratch.extend_from_slice(&body[done..done + part]);
            self.counters.body_copied_bytes += part as u64;
            if self.post_packet()? == Step::Blocked {
                return Err(broken("no buffer for a packet, though there was one"));
            }
            if done + part == body.len() {
                return Ok(None);
            }
            posted = Some(done + part);
        }
    }

    /// An answer without data ends a read that named places for it, and a pull.
    pub(super) fn forget_read(&mut self, header: &MessageHeader) {
        if matches!(header.kind, Kind::IoReply | Kind::PullReply) && !self.targets.is_empty() {
            self.targets.remove(&(header.slot.0, header.sequence.0));
        }
    }

    /// Data, then padding, envelope and header, into a slot of the peer.
    pub(super) fn send_write(
        &mut self,
        header: &MessageHeader,
        segments: Vec<Segment>,
    ) -> Result<Option<Vec<Segment>>, ConnectionError> {
        let length: usize = segments.iter().map(Segment::length).sum();
        if length != header.payload as usize || length == 0 {
            return Err(broken("a write whose memory has another length"));
        }
        let padded = length.next_multiple_of(UNIT);
        if padded + TAIL > MAX_WINDOW as usize {
            return Err(broken("a write that is longer than a slot"));
        }
        let most = self.verbs.max_pieces();
        let works = (segments.len() + 1).div_ceil(most);
        let limit = self.verbs.sizes().sends as usize / 2;
        let pieces = if works <= limit { self.pieces_of(&segments) } else { None };
        let works = if pieces.is_some() { works } else { 1 };
        if self.room() < works {
            return Ok(Some(segments));
        }
        let staged = match pieces {
            Some(_) => None,
            None => match self.stage(length)? {
                Some(staged) => Some(staged),
                None => return Ok(Some(segments)),
            },
        };
        let Some(slot) = self.windows.take(padded, TAIL) else {
            if let Some(staged) = staged {
                self.unstage(staged);
            }
            self.wanted = u32::try_from(padded + TAIL).unwrap_or(u32::MAX);
            return Ok(Some(segments));
        };
        let pieces = match (pieces, staged) {
            (Some(pieces), _) => pieces,
            (None, Some(staged)) => {
                let (slab, _) = &self.staging[staged.slab];
                copy_between(&segments, &slab.pages.segment(staged.offset, length));
                self.counters.data_copied_bytes += length as u64;
                vec![slab.piece(staged.offset, length)]
            }
            (None, None) => Vec::new(),
        };
        let mut address = slot.address;
        let (mut last, mut rest) = (0, &pieces[..]);
        // Whatever does not fit beside the tail in the last one goes ahead of it; the tail is seen when all is there.
        while rest.len() + 1 > most {
            let (now, later) = rest.split_at(most);
            let operation = Operation::Write { address, key: slot.key };
            address = address.wrapping_add(now.iter().map(|p| u64::from(p.length)).sum());
            self.push(operation, now, None, false);
            self.counters.writes += 1;
            rest = later;
            last += 1;
        }
        debug_assert!(last < works);
        let padding = padded - length;
        let affairs = Affairs { receives: self.take_owed(), wanted: 0, ..Affairs::default() };
        self.told_wanted = 0;
        self.scratch.clear();
        self.scratch.resize(padding, 0);
        packet::begin(PacketKind::Tail, &affairs, 0, 0, &mut self.scratch);
        self.scratch.extend_from_slice(&header.encode());
        let tail = self.ring_piece();
        let operation = Operation::WriteWithImmediate { address, key: slot.key, immediate: slot.mark };
        let number = self.push(operation, rest, Some(tail), false);
        self.credits -= 1;
        self.counters.writes_with_immediate += 1;
        if let Some(staged) = staged {
            self.hold(number, Held::Staging(staged));
        }
        self.spare(segments);
        Ok(None)
    }

    pub(super) fn take_owed(&mut self) -> u16 {
        let owed = u16::try_from(self.owed).unwrap_or(u16::MAX);
        self.owed -= u32::from(owed);
        owed
    }

    /// Pieces for the card, if all of the memory is registered.
    pub(super) fn pieces_of(&mut self, segments: &[Segment]) -> Option<Vec<Piece>> {
        segments
            .iter()
            .map(|segment| {
                let keys = self.keyring.find(segment)?;
                let length = u32::try_from(segment.length()).ok()?;
                Some(Piece { address: segment.base() as u64, length, key: keys.local })
            })
            .collect()
    }

    pub(super) fn send_read(
        &mut self,
        header: &MessageHeader,
        segments: Vec<Segment>,
    ) -> Result<Option<Vec<Segment>>, ConnectionError> {
        let length: usize = segments.iter().map(Segment::length).sum();
        let fits = header.kind == Kind::Pull || length == header.length as usize;
        if !fits || length == 0 || length > MAX_WINDOW as usize {
            return Err(broken("a read whose memory has another length"));
        }
        let mode = if let Role::Opener(mode) = self.role { mode } else { ReadMode::Bounce };
        let name = (header.slot.0, header.sequence.0);
        if let Some(ReadState::UnderWay(before)) = self.reads.remove(&name) {
            self.end_read(None, before);
        }
        let found = if mode == ReadMode::Bounce { None } else { self.ranges_of(&segments) };
        let most = match mode {
            ReadMode::Direct => MAX_TARGETS,
            ReadMode::Window => {
                let wanted = found.as_ref().map_or(1, Vec::len).clamp(1, MAX_TARGETS);
                self.pool.provide(&mut self.verbs, wanted)?;
                // What is bound and made invalid for one read has to fit the send queue beside other work.
                self.pool.most().min(self.verbs.sizes().sends as usize / 4).min(MAX_TARGETS)
            }
            ReadMode::Bounce => 0,
        };
        let (ranges, staged) = match found.filter(|ranges| ranges.len() <= most) {
            Some(ranges) => (ranges, None),
            None => {
                let Some(staged) = self.stage(length)? else { return Ok(Some(segments)) };
                let (slab, _) = &self.staging[staged.slab];
                let piece = slab.piece(staged.offset, length);
                (vec![Range { address: piece.address, length: piece.length, keys: slab.keys }], Some(staged))
            }
        };
        let windows = if mode == ReadMode::Window { ranges.len() } else { 0 };
        let fits = self.pool.free() >= windows && self.room() >= windows + 2;
        if !fits || !self.has_packet(HEADER_SIZE + ranges.len() * 16) {
            if let Some(staged) = staged {
                self.unstage(staged);
            }
            return Ok(Some(segments));
        }
        let mut bound = Vec::with_capacity(windows);
        let mut targets = Vec::with_capacity(ranges.len());
        for Range { address, length, keys } in ranges {
            let mut key = keys.remote;
            if mode == ReadMode::Window {
                let window = self.bind(address, length, keys);
                let window = window.ok_or_else(|| broken("no memory window, though there was one"))?;
                key = window.key();
                bound.push(window);
            }
            targets.push(Target { address, length, key });
        }
        let affairs = self.affairs();
        self.scratch.clear();
        let total = HEADER_SIZE + 16 * targets.len();
        let count = u16::try_from(targets.len()).unwrap_or(u16::MAX);
        packet::begin(
            PacketKind::Message,
            &affairs,
            u32::try_from(total).unwrap_or(u32::MAX),
            count,
            &mut self.scratch,
        );
        self.scratch.extend_from_slice(&header.encode());
        for target in &targets {
            packet::push_target(target, &mut self.scratch);
        }
        if self.post_packet()? == Step::Blocked {
            return Err(broken("no buffer for a packet, though there was one"));
        }
        if staged.is_some() || !bound.is_empty() {
            self.reads.insert(name, ReadState::UnderWay(ReadUnderWay { staged, windows: bound }));
        }
        self.spare(segments);
        Ok(None)
    }

    /// The ranges that segments make up, if all of them are registered; those that follow one another are one.
    fn ranges_of(&mut self, segments: &[Segment]) -> Option<Vec<Range>> {
        let mut ranges: Vec<Range> = Vec::with_capacity(segments.len());
        for segment in segments {
            let keys = self.keyring.find(segment)?;
            let (address, length) = (segment.base() as u64, u32::try_from(segment.length()).ok()?);
            match ranges.last_mut() {
                Some(last) if last.keys == keys && last.address + u64::from(last.length) == address => {
                    last.length = last.length.checked_add(length)?;
                }
                _ => ranges.push(Range { address, length, keys }),
            }
        }
        Some(ranges)
    }

    /// Data into the memory that the read named, and behind it the answer. That of a pull follows as a message of its own.
    pub(super) fn send_data(
        &mut self,
        header: &MessageHeader,
        segments: Vec<Segment>,
        tag: Option<u32>,
    ) -> Result<Option<Vec<Segment>>, ConnectionError> {
        let name = (header.slot.0, header.sequence.0);
        let Some(targets) = self.targets.get(&name) else {
            return Err(broken("data for a read that named no place for it"));
        };
        let wanted: u64 = targets.iter().map(|t| u64::from(t.length)).sum();
        let works = targets.len() + segments.len() + 1;
        if works > self.verbs.sizes().sends as usize {
            return Err(broken("a read with more places than the send queue has"));
        }
        if self.room() < works {
            return Ok(Some(segments));
        }
        let Some(pieces) = self.pieces_of(&segments) else {
            return Err(broken("data of a read in memory that is not registered"));
        };
        let there: u64 = pieces.iter().map(|p| u64::from(p.length)).sum();
        let is_pulled = header.kind == Kind::PullData;
        if wanted != there && (!is_pulled || wanted < there) || there == 0 {
            return Err(broken("data of a read that has another length than its places"));
        }
        let targets = self.targets.remove(&name).unwrap_or_default();
        let mut rest = pieces.into_iter();
        let mut current = rest.next();
        for target in &targets {
            let (mut at, mut left) = (target.address, target.length);
            let mut now = Vec::new();
            while left > 0 {
                let Some(piece) = current.take() else { break };
                let length = piece.length.min(left);
                now.push(Piece { length, ..piece });
                left -= length;
                current = if length == piece.length {
                    rest.next()
                } else {
                    Some(Piece {
                        address: piece.address + u64::from(length),
                        length: piece.length - length,
                        key: piece.key,
                    })
                };
                if now.len() == self.verbs.max_pieces() || left == 0 || current.is_none() {
                    let written: u64 = now.iter().map(|p| u64::from(p.length)).sum();
                    self.push(Operation::Write { address: at, key: target.key }, &now, None, false);
                    self.counters.writes += 1;
                    // An address that wraps is the peer's own doing, and its card refuses it.
                    at = at.wrapping_add(written);
                    now.clear();
                }
            }
        }
        if !is_pulled {
            let affairs = self.affairs();
            self.scratch.clear();
            let total = u32::try_from(HEADER_SIZE).unwrap_or(u32::MAX);
            packet::begin(PacketKind::Message, &affairs, total, 0, &mut self.scratch);
            self.scratch.extend_from_slice(&header.encode());
            if self.post_packet()? == Step::Blocked {
                return Err(broken("no buffer for an answer, though there was one"));
            }
        }
        if let Some(tag) = tag {
            self.hold(self.next_number - 1, Held::Tag(tag));
        }
        self.spare(segments);
        Ok(None)
    }

    /// Whether a packet with so much content can be posted now.
    pub(super) fn has_packet(&self, content: usize) -> bool {
        content <= HEADER_SIZE || self.packets.is_none() || !self.free_packets.is_empty()
    }

    /// Queues the packet in `scratch` for posting.
    pub(super) fn post_packet(&mut self) -> Result<Step, ConnectionError> {
        let length = self.scratch.len();
        if length > self.peer.receive_size as usize {
            return Err(broken("a packet that is longer than the peer's buffers"));
        }
        if length <= RING_ENTRY {
            let piece = self.ring_piece();
            let inline = length <= self.verbs.sizes().inline as usize;
            self.push(Operation::Send, &[], Some(piece), inline);
        } else {
            let size = self.peer.receive_size as usize;
            if self.packets.is_none() {
                self.packets = Some(self.verbs.slab(PACKETS * size, Exposure::Local)?);
                self.free_packets = (0..PACKETS).collect();
            }
            let (Some(slab), Some(index)) = (&self.packets, self.free_packets.pop()) else {
                return Ok(Step::Blocked);
            };
            copy_to_segments(&self.scratch, &[slab.pages.segment(index * size, length)]);
            let piece = slab.piece(index * size, length);
            let number = self.push(Operation::Send, &[], Some(piece), false);
            self.hold(number, Held::Packet(index));
        }
        self.credits -= 1;
        self.counters.sends += 1;
        Ok(Step::Posted)
    }

    /// Puts `scratch` into the bytes that go with the next work.
    pub(super) fn ring_piece(&self) -> Piece {
        let place = usize::try_from(self.next_number % u64::from(self.verbs.sizes().sends)).unwrap_or(0);
        copy_to_segments(&self.scratch, &[self.ring.pages.segment(place * RING_ENTRY, RING_ENTRY)]);
        self.ring.piece(place * RING_ENTRY, self.scratch.len())
    }

    pub(super) fn push(
        &mut self,
        operation: Operation,
        pieces: &[Piece],
        last: Option<Piece>,
        inline: bool,
    ) -> u64 {
        let first = self.batch.pieces.len();
        self.batch.pieces.extend_from_slice(pieces);
        self.batch.pieces.extend(last);
        let count = self.batch.pieces.len() - first;
        let number = self.next_number;
        self.next_number += 1;
        self.batch.requests.push(WorkRequest { number, operation, first, count, signaled: false, inline });
        number
    }

    pub(super) fn hold(&mut self, number: u64, held: Held) {
        self.held.push_back((number, held));
        self.batch.holds = true;
    }

    /// Room in registered memory of our own; `None` when there is none now.
    pub(super) fn stage(&mut self, length: usize) -> Result<Option<Staged>, RdmaError> {
        for (slab, (_, map)) in self.staging.iter_mut().enumerate() {
            if let Some(offset) = map.take(length) {
                return Ok(Some(Staged { slab, offset, length }));
            }
        }
        if self.staging.len() == MAX_STAGING {
            return Ok(None);
        }
        let windows = self.role == Role::Opener(ReadMode::Window);
        let exposure = if windows { Exposure::Windows } else { Exposure::Peers };
        let slab = self.verbs.slab(MAX_WINDOW as usize, exposure)?;
        let mut map = PageMap::new(MAX_WINDOW as usize);
        let offset = map.take(length);
        self.staging.push((slab, map));
        Ok(offset.map(|offset| Staged { slab: self.staging.len() - 1, offset, length }))
    }

    pub(super) fn unstage(&mut self, staged: Staged) {
        if let Some((_, map)) = self.staging.get_mut(staged.slab) {
            map.give_back(staged.offset, staged.length);
        }
    }
}

/// Memory in a row, within one registration.
struct Range {
    address: u64,
    length: u32,
    keys: Keys,
}

/// Copies all of `from` to `to`.
fn copy_between(from: &[Segment], to: &Segment) {
    let mut done = 0;
    let mut block = [0; 4096];
    for segment in from {
        let mut at = 0;
        while at < segment.length() {
            let part = copy_from_segments(&[segment.part(at, block.len())], &mut block);
            copy_to_segments(&block[..part], &[to.part(done, part)]);
            at += part;
            done += part;
        }
    }
}
