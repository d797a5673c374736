//! One connection over RDMA: what is queued, posted and held, by credits and slots.
//!
//! ```text
//!   queue ──flush──▶ batch ──post──▶ card ──completion──▶ held memory is free again
//!                      │ needs: places in the send queue, a receive buffer of the peer (credit), for a write a slot
//!   receive buffer ──completion──▶ packet ──▶ message to the owner; the buffer is posted again, and owed as a credit
//! ```
//! Messages go in the order in which they were queued; one that has to wait holds up those behind it. Work completes in
//! order too, so only the last of a batch is signaled, and only when memory waits for it or many are under way.

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::endpoint::{Completion, Done, LinkEvent, Operation, Piece, Slab, Verbs, WorkRequest};
use super::fabric::Keyring;
use super::packet::{
    self, Affairs, Grant, Introduction, MAX_LIST, MAX_TARGETS, Packet, PacketKind, TAIL, Target, UNIT,
};
use super::slots::{PageMap, Windows};
use super::{Exposure, MAX_WINDOW, RdmaError, ReadMode};
use crate::buffer::{Segment, copy_from_segments, copy_to_segments};
use crate::transport::{ConnectionError, Counters, Place, Receiver};
use crate::wire::{HEADER_SIZE, Kind, MessageHeader, WireError};

/// Registered bytes that go with each place in the send queue: a small packet, or what stands behind written data.
const RING_ENTRY: usize = 256;
/// Buffers for packets that are larger.
const PACKETS: usize = 16;
/// Most slabs of a window's size for data that has to be copied.
const MAX_STAGING: usize = 16;
/// Most reads of a peer at a time; the node allows fewer requests.
const MAX_READS: usize = 4096;
/// Most completions that one call deals with, so that other connections get their turn.
const RECEIVE_BUDGET: usize = 512;
/// Released slots, and windows given back, that go with one packet: with one grant they fit a small one.
const LISTED_RELEASED: usize = MAX_LIST;
const LISTED_RETURNS: usize = 8;
const _: () =
    assert!(packet::ENVELOPE + 4 * (LISTED_RELEASED + LISTED_RETURNS) + 24 + HEADER_SIZE <= RING_ENTRY);
/// Released slots that are told by a packet of their own when nothing else goes.
const MANY_RELEASED: usize = 16;

/// Which side of the connection this is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Role {
    /// Opened it: writes data to slots, and asks for data.
    Opener(ReadMode),
    /// Accepted it: lends slots, and writes data to where it is asked to.
    Acceptor,
}

/// A message that is not posted, or only in part.
struct Outgoing {
    header: MessageHeader,
    content: Content,
}

enum Content {
    /// Header and body, of which so many bytes are posted; `None` before the first.
    Plain { body: Vec<u8>, posted: Option<usize> },
    /// Data for a slot.
    Write(Vec<Segment>),
    /// Memory for the data of a read.
    Read(Vec<Segment>),
    /// Data for the memory of a read.
    Data(Vec<Segment>, Option<u32>),
}

/// What is free again when work has completed.
enum Held {
    Tag(u32),
    Packet(usize),
    Staging(Staged),
}

/// A part of a staging slab.
#[derive(Clone, Copy)]
struct Staged {
    slab: usize,
    offset: usize,
    length: usize,
}

/// A message whose body comes in several packets.
struct Incoming {
    header: MessageHeader,
    targets: Vec<Target>,
    body: Vec<u8>,
}

/// A window that was lent to the peer.
struct Lent {
    memory: Segment,
    map: PageMap,
}

/// Work that is posted together.
#[derive(Default)]
struct Batch {
    requests: Vec<WorkRequest>,
    pieces: Vec<Piece>,
    /// Something waits for its completion.
    holds: bool,
}

/// See the module's comment.
pub(super) struct Link<V: Verbs> {
    verbs: V,
    role: Role,
    keyring: Keyring,
    /// Readable when there are completions or events.
    wake: Epoll,
    is_over: bool,
    counters: Counters,
    peer: Introduction,

    queue: VecDeque<Outgoing>,
    spare_lists: Vec<Vec<Segment>>,
    batch: Batch,
    /// Number of the next work, from 1.
    next_number: u64,
    /// All work up to this number has completed.
    completed: u64,
    /// Number of the last work that was signaled.
    signaled: u64,
    held: VecDeque<(u64, Held)>,
    sent_tags: Vec<u32>,
    ring: Slab,
    packets: Option<Slab>,
    free_packets: Vec<usize>,
    staging: Vec<(Slab, PageMap)>,
    scratch: Vec<u8>,

    /// Receive buffers that the peer has for us.
    credits: u32,
    /// Receive buffers of ours that are posted again, and the peer does not know.
    owed: u32,
    completions: Vec<Completion>,
    incoming: Option<Incoming>,
    segments: Vec<Segment>,

    /// As opener.
    windows: Windows,
    wanted: u32,
    told_wanted: u32,
    returns: Vec<u16>,
    /// Reads whose data is copied, by slot and sequence.
    reads: HashMap<(u16, u64), Staged>,

    /// As acceptor.
    lent: HashMap<u16, Lent>,
    grants: VecDeque<Grant>,
    /// Slots whose data is in the owner's hands, by mark: where it begins, and how long it is with its tail.
    in_use: HashMap<u32, (u16, usize, usize)>,
    released: VecDeque<u32>,
    peer_wants: u32,
    returned: Vec<u16>,
    targets: HashMap<(u16, u64), Vec<Target>>,
}

/// Whether a message could be posted.
#[derive(PartialEq, Eq)]
enum Step {
    Posted,
    /// Something has to come back first.
    Blocked,
}

fn broken(reason: &'static str) -> ConnectionError {
    ConnectionError::Broken(reason)
}

impl From<RdmaError> for ConnectionError {
    fn from(error: RdmaError) -> Self {
        Self::Link(error.to_string())
    }
}

impl<V: Verbs> Link<V> {
    pub(super) fn new(
        mut verbs: V,
        keyring: Keyring,
        role: Role,
        peer: Introduction,
    ) -> Result<Self, RdmaError> {
        let failed = |source| RdmaError::Call { what: "making an event queue for a connection", source };
        let wake = Epoll::new().map_err(failed)?;
        for descriptor in verbs.descriptors() {
            let event = EpollEvent::new(EventSet::IN, 0);
            wake.ctl(ControlOperation::Add, descriptor, event).map_err(failed)?;
        }
        let ring = verbs.slab(verbs.sizes().sends as usize * RING_ENTRY, Exposure::Local)?;
        Ok(Self {
            verbs,
            role,
            keyring,
            wake,
            is_over: false,
            counters: Counters::default(),
            credits: peer.receives.into(),
            peer,
            queue: VecDeque::new(),
            spare_lists: Vec::new(),
            batch: Batch::default(),
            next_number: 1,
            completed: 0,
            signaled: 0,
            held: VecDeque::new(),
            sent_tags: Vec::new(),
            ring,
            packets: None,
            free_packets: Vec::new(),
            staging: Vec::new(),
            scratch: Vec::new(),
            owed: 0,
            completions: Vec::new(),
            incoming: None,
            segments: Vec::new(),
            windows: Windows::default(),
            wanted: 0,
            told_wanted: 0,
            returns: Vec::new(),
            reads: HashMap::new(),
            lent: HashMap::new(),
            grants: VecDeque::new(),
            in_use: HashMap::new(),
            released: VecDeque::new(),
            peer_wants: 0,
            returned: Vec::new(),
            targets: HashMap::new(),
        })
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.wake.as_raw_fd()
    }

    pub(super) const fn counters(&self) -> Counters {
        self.counters
    }

    pub(super) fn backlog(&self) -> usize {
        self.queue.len()
    }

    pub(super) fn take_sent(&mut self, tags: &mut Vec<u32>) {
        tags.append(&mut self.sent_tags);
    }

    pub(super) fn queue(&mut self, header: &MessageHeader, body: Option<Vec<u8>>) {
        let content = Content::Plain { body: body.unwrap_or_default(), posted: None };
        self.queue.push_back(Outgoing { header: *header, content });
    }

    pub(super) fn queue_data(
        &mut self,
        header: &MessageHeader,
        tag: Option<u32>,
        gather: &mut dyn FnMut(&mut Vec<Segment>),
    ) {
        let segments = self.list(gather);
        let content = match self.role {
            Role::Opener(_) => Content::Write(segments),
            Role::Acceptor => Content::Data(segments, tag),
        };
        self.queue.push_back(Outgoing { header: *header, content });
    }

    pub(super) fn queue_read(&mut self, header: &MessageHeader, gather: &mut dyn FnMut(&mut Vec<Segment>)) {
        let content = Content::Read(self.list(gather));
        self.queue.push_back(Outgoing { header: *header, content });
    }

    fn list(&mut self, gather: &mut dyn FnMut(&mut Vec<Segment>)) -> Vec<Segment> {
        let mut segments = self.spare_lists.pop().unwrap_or_default();
        gather(&mut segments);
        segments
    }

    fn spare(&mut self, mut list: Vec<Segment>) {
        if self.spare_lists.len() < 64 {
            list.clear();
            self.spare_lists.push(list);
        }
    }

    pub(super) const fn peer_wants(&self) -> u32 {
        self.peer_wants
    }

    pub(super) fn grant(&mut self, window: u16, memory: &Segment) -> bool {
        let Some(keys) = self.keyring.find(memory) else { return false };
        let Ok(length) = u32::try_from(memory.length()) else { return false };
        if length > MAX_WINDOW || self.lent.contains_key(&window) {
            return false;
        }
        let map = PageMap::new(memory.length());
        self.lent.insert(window, Lent { memory: *memory, map });
        self.grants.push_back(Grant { window, length, key: keys.remote, address: memory.base() as u64 });
        self.peer_wants = 0;
        true
    }

    pub(super) fn release(&mut self, mark: u32) {
        if let Some((window, offset, length)) = self.in_use.remove(&mark) {
            if let Some(lent) = self.lent.get_mut(&window) {
                lent.map.give_back(offset, length);
            }
            self.released.push_back(mark);
        }
    }

    pub(super) fn take_returned(&mut self, windows: &mut Vec<u16>) {
        windows.append(&mut self.returned);
    }

    pub(super) fn beat(&mut self) {
        if matches!(self.role, Role::Opener(_)) {
            self.windows.take_idle(&mut self.returns);
        }
    }

    pub(super) fn shut_down(&mut self) {
        self.is_over = true;
        self.verbs.close();
        self.queue.clear();
        self.held.clear();
        self.reads.clear();
        self.lent.clear();
        self.targets.clear();
        self.incoming = None;
    }

    /// Whether work is under way, or messages wait.
    pub(super) fn has_unsent(&self) -> bool {
        !self.is_over && (!self.queue.is_empty() || self.completed + 1 < self.next_number)
    }

    /// Takes completions for a connection that is only to get its last words out; true while there is something to wait for.
    pub(super) fn linger(&mut self) -> bool {
        struct Nobody;
        impl Receiver for Nobody {
            fn place(&mut self, _header: &MessageHeader, _segments: &mut Vec<Segment>) -> Place {
                Place::Discard
            }
            fn deliver(&mut self, _header: &MessageHeader, _body: &[u8]) {
                // Nobody waits for it any more.
            }
        }
        // The peer closes when it has read them, which ends this as well.
        self.receive(&mut Nobody).is_ok() && self.flush().is_ok() && self.has_unsent()
    }

    fn room(&self) -> usize {
        let under_way = self.next_number - 1 - self.completed;
        (self.verbs.sizes().sends as usize).saturating_sub(usize::try_from(under_way).unwrap_or(usize::MAX))
    }

    /// Posts what is queued, as far as it goes.
    pub(super) fn flush(&mut self) -> Result<(), ConnectionError> {
        if self.is_over {
            return Err(ConnectionError::Closed);
        }
        self.wanted = 0;
        while let Some(outgoing) = self.queue.pop_front() {
            if let Some(waits) = self.send(outgoing)? {
                self.queue.push_front(waits);
                break;
            }
        }
        while self.must_tell() && self.credits > 0 && self.room() > 0 {
            let affairs = self.affairs();
            self.scratch.clear();
            packet::begin(PacketKind::Flow, &affairs, 0, 0, &mut self.scratch);
            if self.post_packet()? == Step::Blocked {
                return Err(broken("no buffer for a packet of its own affairs"));
            }
        }
        self.post()
    }

    /// Whether the peer has to be told something, though no message goes.
    fn must_tell(&self) -> bool {
        // Half of the buffers: the peer is never stuck, and two idle sides do not tell one another for ever.
        self.owed * 2 >= self.verbs.sizes().receives
            || self.wanted != self.told_wanted
            || !self.grants.is_empty()
            || !self.returns.is_empty()
            || self.released.len() >= MANY_RELEASED
            || !self.released.is_empty() && self.peer_wants > 0
    }

    fn affairs(&mut self) -> Affairs {
        let receives = u16::try_from(self.owed).unwrap_or(u16::MAX);
        self.owed -= u32::from(receives);
        self.told_wanted = self.wanted;
        // So few of each that they always fit a small packet beside a header.
        let released = self.released.len().min(LISTED_RELEASED);
        let (grants, returns) = (self.grants.len().min(1), self.returns.len().min(LISTED_RETURNS));
        Affairs {
            receives,
            wanted: self.wanted,
            released: self.released.drain(..released).collect(),
            grants: self.grants.drain(..grants).collect(),
            returns: self.returns.drain(..returns).collect(),
        }
    }

    /// Posts a message; gives it back if it has to wait.
    fn send(&mut self, outgoing: Outgoing) -> Result<Option<Outgoing>, ConnectionError> {
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

    fn send_plain(
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

    /// An answer without data ends a read that named places for it.
    fn forget_read(&mut self, header: &MessageHeader) {
        if header.kind == Kind::IoReply && !self.targets.is_empty() {
            self.targets.remove(&(header.slot.0, header.sequence.0));
        }
    }

    /// Data, then padding, envelope and header, into a slot of the peer.
    fn send_write(
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
            address += now.iter().map(|p| u64::from(p.length)).sum::<u64>();
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

    fn take_owed(&mut self) -> u16 {
        let owed = u16::try_from(self.owed).unwrap_or(u16::MAX);
        self.owed -= u32::from(owed);
        owed
    }

    /// Pieces for the card, if all of the memory is registered.
    fn pieces_of(&mut self, segments: &[Segment]) -> Option<Vec<Piece>> {
        segments
            .iter()
            .map(|segment| {
                let keys = self.keyring.find(segment)?;
                let length = u32::try_from(segment.length()).ok()?;
                Some(Piece { address: segment.base() as u64, length, key: keys.local })
            })
            .collect()
    }

    fn send_read(
        &mut self,
        header: &MessageHeader,
        segments: Vec<Segment>,
    ) -> Result<Option<Vec<Segment>>, ConnectionError> {
        let length: usize = segments.iter().map(Segment::length).sum();
        if length != header.length as usize || length == 0 || length > MAX_WINDOW as usize {
            return Err(broken("a read whose memory has another length"));
        }
        let direct = self.role == Role::Opener(ReadMode::Direct) && segments.len() <= MAX_TARGETS;
        let found = if direct { self.targets_of(&segments) } else { None };
        let (targets, staged) = match found {
            Some(targets) => (targets, None),
            None => {
                let Some(staged) = self.stage(length)? else { return Ok(Some(segments)) };
                let (slab, _) = &self.staging[staged.slab];
                let piece = slab.piece(staged.offset, length);
                let target = Target { address: piece.address, length: piece.length, key: slab.keys.remote };
                (vec![target], Some(staged))
            }
        };
        if !self.has_packet(HEADER_SIZE + targets.len() * 16) {
            if let Some(staged) = staged {
                self.unstage(staged);
            }
            return Ok(Some(segments));
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
        if let Some(staged) = staged {
            let before = self.reads.insert((header.slot.0, header.sequence.0), staged);
            if let Some(before) = before {
                self.unstage(before);
            }
        }
        self.spare(segments);
        Ok(None)
    }

    fn targets_of(&mut self, segments: &[Segment]) -> Option<Vec<Target>> {
        segments
            .iter()
            .map(|segment| {
                let keys = self.keyring.find(segment)?;
                let length = u32::try_from(segment.length()).ok()?;
                Some(Target { address: segment.base() as u64, length, key: keys.remote })
            })
            .collect()
    }

    /// Data into the memory that the read named, and behind it the answer.
    fn send_data(
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
        if wanted != there {
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
                if now.len() == self.verbs.max_pieces() || left == 0 {
                    let written: u64 = now.iter().map(|p| u64::from(p.length)).sum();
                    self.push(Operation::Write { address: at, key: target.key }, &now, None, false);
                    self.counters.writes += 1;
                    at += written;
                    now.clear();
                }
            }
        }
        let affairs = self.affairs();
        self.scratch.clear();
        let total = u32::try_from(HEADER_SIZE).unwrap_or(u32::MAX);
        packet::begin(PacketKind::Message, &affairs, total, 0, &mut self.scratch);
        self.scratch.extend_from_slice(&header.encode());
        if self.post_packet()? == Step::Blocked {
            return Err(broken("no buffer for an answer, though there was one"));
        }
        if let Some(tag) = tag {
            self.hold(self.next_number - 1, Held::Tag(tag));
        }
        self.spare(segments);
        Ok(None)
    }

    /// Whether a packet with so much content can be posted now.
    fn has_packet(&self, content: usize) -> bool {
        content <= HEADER_SIZE || self.packets.is_none() || !self.free_packets.is_empty()
    }

    /// Queues the packet in `scratch` for posting.
    fn post_packet(&mut self) -> Result<Step, ConnectionError> {
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
    fn ring_piece(&self) -> Piece {
        let place = usize::try_from(self.next_number % u64::from(self.verbs.sizes().sends)).unwrap_or(0);
        copy_to_segments(&self.scratch, &[self.ring.pages.segment(place * RING_ENTRY, RING_ENTRY)]);
        self.ring.piece(place * RING_ENTRY, self.scratch.len())
    }

    fn push(&mut self, operation: Operation, pieces: &[Piece], last: Option<Piece>, inline: bool) -> u64 {
        let first = self.batch.pieces.len();
        self.batch.pieces.extend_from_slice(pieces);
        self.batch.pieces.extend(last);
        let count = self.batch.pieces.len() - first;
        let number = self.next_number;
        self.next_number += 1;
        self.batch.requests.push(WorkRequest { number, operation, first, count, signaled: false, inline });
        number
    }

    fn hold(&mut self, number: u64, held: Held) {
        self.held.push_back((number, held));
        self.batch.holds = true;
    }

    /// Hands the batch to the card.
    fn post(&mut self) -> Result<(), ConnectionError> {
        let Some(last) = self.batch.requests.last_mut() else { return Ok(()) };
        let quarter = u64::from(self.verbs.sizes().sends / 4).max(1);
        if self.batch.holds || last.number - self.signaled >= quarter {
            last.signaled = true;
            self.signaled = last.number;
        }
        self.batch.holds = false;
        self.counters.posts += 1;
        let posted = self.verbs.post(&self.batch.requests, &self.batch.pieces);
        self.batch.requests.clear();
        self.batch.pieces.clear();
        posted.map_err(Into::into)
    }

    /// Room in registered memory of our own; `None` when there is none now.
    fn stage(&mut self, length: usize) -> Result<Option<Staged>, RdmaError> {
        for (slab, (_, map)) in self.staging.iter_mut().enumerate() {
            if let Some(offset) = map.take(length) {
                return Ok(Some(Staged { slab, offset, length }));
            }
        }
        if self.staging.len() == MAX_STAGING {
            return Ok(None);
        }
        let slab = self.verbs.slab(MAX_WINDOW as usize, Exposure::Peers)?;
        let mut map = PageMap::new(MAX_WINDOW as usize);
        let offset = map.take(length);
        self.staging.push((slab, map));
        Ok(offset.map(|offset| Staged { slab: self.staging.len() - 1, offset, length }))
    }

    fn unstage(&mut self, staged: Staged) {
        if let Some((_, map)) = self.staging.get_mut(staged.slab) {
            map.give_back(staged.offset, staged.length);
        }
    }

    /// Takes in what has arrived and what has completed.
    pub(super) fn receive(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        if self.is_over {
            return Err(ConnectionError::Closed);
        }
        let result = self.take_in(receiver);
        if result.is_err() {
            // What is not dealt with goes back to those who share it.
            for completion in std::mem::take(&mut self.completions).iter().filter(|c| c.is_receive) {
                self.verbs.give_back(u32::try_from(completion.number).unwrap_or(u32::MAX));
            }
        }
        result
    }

    fn take_in(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
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
    fn reason(&mut self, error: ConnectionError) -> ConnectionError {
        if matches!(error, ConnectionError::Closed)
            && let Ok(Some(LinkEvent::Lost(words))) = self.verbs.event()
        {
            return ConnectionError::Link(words);
        }
        error
    }

    fn complete(
        &mut self,
        completion: Completion,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        let Completion { is_receive, number, done } = completion;
        let buffer = u32::try_from(number).unwrap_or(u32::MAX);
        match done {
            Done::Sent => {
                self.completed = self.completed.max(number);
                self.let_go();
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
        self.owed += 1;
        Ok(())
    }

    /// Frees what waited for work that has completed.
    fn let_go(&mut self) {
        while let Some((number, _)) = self.held.front()
            && *number <= self.completed
        {
            match self.held.pop_front() {
                Some((_, Held::Tag(tag))) => self.sent_tags.push(tag),
                Some((_, Held::Packet(index))) => self.free_packets.push(index),
                Some((_, Held::Staging(staged))) => self.unstage(staged),
                None => {}
            }
        }
    }

    fn take_affairs(&mut self, affairs: &Affairs) -> Result<(), ConnectionError> {
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
                        Some(lent) if lent.map.is_free() => self.returned.push(*window),
                        _ => return Err(broken("a window was given back that is in use, or was not lent")),
                    }
                }
            }
        }
        Ok(())
    }

    fn packet(&mut self, bytes: &[u8], receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
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

    fn message(&mut self, packet: &Packet<'_>, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        if self.incoming.is_some() {
            return Err(broken("a message within another"));
        }
        let (header, targets, body) = packet::decode_message(packet)?;
        // The data of a read is in its place already; that of a write does not come this way.
        let expected = match header.kind {
            Kind::IoReply => 0,
            Kind::Write => return Err(broken("a write outside of any slot")),
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

    fn deliver(
        &mut self,
        header: &MessageHeader,
        targets: Vec<Target>,
        body: &[u8],
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        let name = (header.slot.0, header.sequence.0);
        match (self.role, header.kind) {
            (Role::Acceptor, Kind::Read) => {
                let wanted: u64 = targets.iter().map(|t| u64::from(t.length)).sum();
                if wanted != u64::from(header.length) || self.targets.len() >= MAX_READS {
                    return Err(broken("a read whose places have another length, or one too many"));
                }
                self.targets.insert(name, targets);
            }
            _ if !targets.is_empty() => return Err(broken("places for data of what is no read")),
            (Role::Opener(_), Kind::IoReply) => {
                if let Some(staged) = self.reads.remove(&name) {
                    self.unpack(header, staged, receiver);
                }
            }
            _ => {}
        }
        receiver.deliver(header, body);
        Ok(())
    }

    /// Copies the data of a read to whoever asked for it.
    fn unpack(&mut self, header: &MessageHeader, staged: Staged, receiver: &mut dyn Receiver) {
        let length = header.payload as usize;
        if length > 0 && length <= staged.length {
            self.segments.clear();
            if receiver.place(header, &mut self.segments) == Place::Data
                && let Some((slab, _)) = self.staging.get(staged.slab)
            {
                let copied = copy_to_segments(slab.pages.bytes(staged.offset, length), &self.segments);
                self.counters.data_copied_bytes += copied as u64;
            }
        }
        self.unstage(staged);
    }

    /// The peer has written to a slot.
    fn placed(&mut self, mark: u32, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
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

#[cfg(test)]
mod tests;
