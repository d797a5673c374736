//! One connection over RDMA: what is queued, posted and held, by credits and slots.
//!
//! ```text
//!   queue ──flush──▶ batch ──post──▶ card ──completion──▶ held memory is free again
//!                      │ needs: places in the send queue, a receive buffer of the peer (credit), for a write a slot
//!   receive buffer ──completion──▶ packet ──▶ message to the owner; the buffer is posted again, and owed as a credit
//! ```
//! Messages go in the order in which they were queued; one that has to wait holds up those behind it. Work completes in
//! order too, so only the last of a batch is signaled, and only when memory waits for it or many are under way.

mod receive;
mod send;
mod windows;

use std::any::Any;
use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsRawFd, RawFd};

use self::windows::{Bound, Pool};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};

use super::endpoint::{Completion, Keys, Operation, Piece, Slab, Verbs, WorkRequest};
use super::fabric::Keyring;
use super::packet::{self, Affairs, Grant, Introduction, MAX_LIST, PacketKind, Target};
use super::slots::{PageMap, Windows};
use super::{Exposure, MAX_WINDOW, RECEIVE_SIZE, RdmaError, ReadMode};
use crate::buffer::Segment;
use crate::transport::unsent::Unsent;
use crate::transport::{ConnectionError, Counters, Place, Receiver};
use crate::wire::{HEADER_SIZE, MessageHeader};

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
    /// Memory for the data of a read or a pull.
    Read(Vec<Segment>),
    /// Data for the memory of a read or a pull.
    Data(Vec<Segment>, Option<u32>),
}

/// What is free again when work has completed.
enum Held {
    Tag(u32),
    Packet(usize),
    Staging(Staged),
    Ended(Box<Ended>),
}

/// What lets the peer write to memory that it was lent.
enum Access {
    /// A window is to be bound to it, and the peer to be told, when the send queue has room.
    ToCome,
    Window(Bound),
    /// A registration of that memory alone, on a device without windows.
    Registration(Box<dyn Any + Send + Sync>),
}

/// A read whose data goes to windows, or is copied when it is there.
struct ReadUnderWay {
    staged: Option<Staged>,
    windows: Vec<Bound>,
}

/// What is known of a read by its name.
enum ReadState {
    UnderWay(ReadUnderWay),
    /// It was answered, and its keys are not yet known to be invalid.
    Ending,
}

/// What is over, but for its keys.
enum Ended {
    /// A read with its answer, unless nobody waits for that.
    Read { answer: Option<(MessageHeader, Vec<u8>)>, read: ReadUnderWay },
    /// A window that the peer has given back.
    Lent { number: u16, bound: Bound },
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
    keys: Keys,
    map: PageMap,
    access: Access,
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
    unsent: Unsent,
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
    /// Reads whose data is copied or goes to windows, by slot and sequence.
    reads: HashMap<(u16, u64), ReadState>,
    pool: Pool,
    ending: VecDeque<Ended>,

    /// As acceptor.
    lent: HashMap<u16, Lent>,
    /// Windows that the peer is to be told of.
    to_lend: VecDeque<u16>,
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
            // Longer packets than this side's own would cost memory, and gain nothing.
            peer: Introduction { receive_size: peer.receive_size.min(RECEIVE_SIZE), ..peer },
            queue: VecDeque::new(),
            unsent: Unsent::default(),
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
            pool: Pool::default(),
            ending: VecDeque::new(),
            lent: HashMap::new(),
            to_lend: VecDeque::new(),
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

    pub(super) fn backlog_bytes(&self) -> usize {
        let body = |outgoing: &Outgoing| {
            if let Content::Plain { body, .. } = &outgoing.content { body.len() } else { 0 }
        };
        self.queue.iter().map(body).sum()
    }

    pub(super) fn take_sent(&mut self, tags: &mut Vec<u32>) {
        tags.append(&mut self.sent_tags);
    }

    pub(super) fn queue(&mut self, header: &MessageHeader, body: Option<Vec<u8>>) {
        let content = Content::Plain { body: body.unwrap_or_default(), posted: None };
        self.unsent.queued(header);
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
        self.unsent.queued(header);
        self.queue.push_back(Outgoing { header: *header, content });
    }

    pub(super) fn queue_read(&mut self, header: &MessageHeader, gather: &mut dyn FnMut(&mut Vec<Segment>)) {
        let content = Content::Read(self.list(gather));
        self.unsent.queued(header);
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

    pub(super) fn grant(&mut self, window: u16, memory: &Segment) -> Result<(), RdmaError> {
        let refused = |words: &str| Err(RdmaError::Event(words.to_owned()));
        let Some(keys) = self.keyring.find(memory) else {
            return refused("the buffers are not registered with this RDMA device");
        };
        let length = u32::try_from(memory.length()).unwrap_or(u32::MAX);
        if length > MAX_WINDOW || self.lent.contains_key(&window) {
            return refused("a window that is lent already, or longer than 1 MiB");
        }
        let access = if self.verbs.has_windows() {
            self.pool.provide(&mut self.verbs, self.to_lend.len() + 1)?;
            if self.pool.free() <= self.to_lend.len() {
                return refused("no memory window is left for a buffer that is to be lent");
            }
            self.to_lend.push_back(window);
            Access::ToCome
        } else {
            let (key, registration) = self.verbs.expose(memory)?;
            self.grants.push_back(Grant { window, length, key, address: memory.base() as u64 });
            Access::Registration(registration)
        };
        let map = PageMap::new(memory.length());
        self.lent.insert(window, Lent { memory: *memory, keys, map, access });
        self.peer_wants = 0;
        Ok(())
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
        self.unsent = Unsent::default();
        self.held.clear();
        self.reads.clear();
        self.ending.clear();
        self.lent.clear();
        self.to_lend.clear();
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
        self.invalidate();
        self.bind_lent();
        self.wanted = 0;
        while let Some(outgoing) = self.queue.pop_front() {
            if let Some(waits) = self.send(outgoing)? {
                self.queue.push_front(waits);
                break;
            }
        }
        self.invalidate();
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
}

#[cfg(test)]
mod tests;
