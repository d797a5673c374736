//! Both ends of a connection over a card that does what a real one does, and fails when it is told to.

use std::cell::RefCell;
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::sync::Arc;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::endpoint::{Done, Keys, LinkEvent, QueueSizes};
use super::super::memory::Pages;
use super::*;
use crate::buffer::{copy_from_segments, copy_to_segments, for_tests};
use crate::pool::{PoolId, Sequence, Slot as RequestSlot};
use crate::wire::{Kind, MAX_BODY, Status};

mod failures;
mod lent;
mod pulls;
mod refusals;
mod transfers;
mod windows;

const GUEST: usize = 4 << 20;
const GUEST_KEY: u32 = 7;
const BUFFER_KEY: u32 = 8;

/// One side of the wire.
struct Side {
    completions: VecDeque<Completion>,
    /// Of signaled work, until the test lets them come.
    late: VecDeque<Completion>,
    delays: bool,
    receives: VecDeque<u32>,
    memory: Arc<Pages>,
    events: VecDeque<LinkEvent>,
    /// Memory that the other side may write to, by key.
    exposed: Vec<(u32, Segment)>,
    /// Memory that windows can be bound to, by its key.
    bindable: Vec<(u32, Segment)>,
    /// How many windows the card has, and the keys of those that were made.
    most_windows: usize,
    has_windows: bool,
    windows: Vec<u32>,
    /// What was exposed without windows, as long as the other end of this lives.
    registrations: Vec<(u32, std::sync::Weak<()>)>,
    refuses_invalidation: bool,
    is_closed: bool,
    is_broken: bool,
    /// The call that fails from now on.
    refuses: Option<&'static str>,
    /// The work after so many more fails, with these words.
    fails_after: Option<(usize, &'static str)>,
    posted: Vec<WorkRequest>,
    given_back: Vec<u32>,
    sizes: QueueSizes,
    max_pieces: usize,
    next_key: u32,
    completed: u64,
    wake: [EventFd; 2],
}

impl Side {
    fn new(sizes: QueueSizes, max_pieces: usize) -> Self {
        let wake = || EventFd::new(EFD_NONBLOCK).unwrap();
        Self {
            completions: VecDeque::new(),
            late: VecDeque::new(),
            delays: false,
            receives: (0..sizes.receives).collect(),
            memory: Arc::new(Pages::new(sizes.receives as usize * sizes.receive_size as usize).unwrap()),
            events: VecDeque::new(),
            exposed: Vec::new(),
            bindable: Vec::new(),
            most_windows: 1000,
            has_windows: true,
            windows: Vec::new(),
            registrations: Vec::new(),
            refuses_invalidation: false,
            is_closed: false,
            is_broken: false,
            refuses: None,
            fails_after: None,
            posted: Vec::new(),
            given_back: Vec::new(),
            sizes,
            max_pieces,
            next_key: 100,
            completed: 0,
            wake: [wake(), wake()],
        }
    }

    /// Fails if it was told to.
    fn called(&self, what: &'static str) -> Result<(), RdmaError> {
        let source = std::io::Error::from_raw_os_error(libc::EIO);
        if self.refuses == Some(what) { Err(RdmaError::Call { what, source }) } else { Ok(()) }
    }

    fn fail(&mut self, number: u64, status: &str, flushed: bool) {
        let done = Done::Failed { status: status.to_owned(), flushed };
        self.completions.push_back(Completion { is_receive: false, number, done });
        self.is_broken = true;
    }

    fn target(&self, address: u64, length: usize, key: u32) -> Option<Segment> {
        let (_, memory) = self.exposed.iter().find(|(k, _)| *k == key)?;
        if self.registrations.iter().any(|(k, kept)| *k == key && kept.strong_count() == 0) {
            return None;
        }
        let offset = usize::try_from(address).unwrap().checked_sub(memory.base() as usize)?;
        (offset.checked_add(length)? <= memory.length()).then(|| memory.part(offset, length))
    }

    /// What a card demands of a bind, and of the end of one.
    fn of_windows(&mut self, request: &WorkRequest) {
        assert_eq!(request.count, 0, "it has no data");
        let words = match request.operation {
            Operation::Bind { window, key, address, length, memory } => {
                let last = self.windows[window];
                assert_eq!(
                    (key >> 8, key & 0xff),
                    (last >> 8, (last + 1) & 0xff),
                    "not the window's next key"
                );
                let is_bound = self.exposed.iter().any(|(k, _)| *k == last);
                let found = self.bindable.iter().find(|(k, _)| *k == memory).and_then(|(_, segment)| {
                    let offset = usize::try_from(address).unwrap().checked_sub(segment.base() as usize)?;
                    let fits = offset + length as usize <= segment.length();
                    fits.then(|| segment.part(offset, length as usize))
                });
                match found {
                    Some(segment) if !is_bound => {
                        self.windows[window] = key;
                        return self.exposed.push((key, segment));
                    }
                    _ => "memory bind operation error",
                }
            }
            Operation::Invalidate { key } => {
                let before = self.exposed.len();
                if !self.refuses_invalidation {
                    self.exposed.retain(|(k, _)| *k != key);
                }
                if self.exposed.len() < before {
                    return;
                }
                "local QP operation error"
            }
            _ => "not of windows",
        };
        self.fail(request.number, words, false);
    }

    /// Fills a receive buffer.
    fn arrive(&mut self, bytes: &[u8], immediate: Option<u32>) {
        let buffer = self.receives.pop_front().expect("the sender had no credit for it");
        let done = match immediate {
            Some(immediate) => Done::Placed { immediate },
            None => {
                let size = self.sizes.receive_size as usize;
                assert!(bytes.len() <= size, "a packet of {} bytes", bytes.len());
                let memory = self.memory.segment(buffer as usize * size, size);
                assert_eq!(copy_to_segments(bytes, &[memory]), bytes.len());
                Done::Received { length: u32::try_from(bytes.len()).unwrap() }
            }
        };
        self.completions.push_back(Completion { is_receive: true, number: buffer.into(), done });
    }
}

type Wire = Rc<RefCell<[Side; 2]>>;

/// A scripted card.
struct Card {
    wire: Wire,
    side: usize,
}

impl Card {
    fn with<T>(&self, work: impl FnOnce(&mut Side) -> T) -> T {
        work(&mut self.wire.borrow_mut()[self.side])
    }
}

impl Verbs for Card {
    fn sizes(&self) -> QueueSizes {
        self.with(|side| side.sizes)
    }

    fn max_pieces(&self) -> usize {
        self.with(|side| side.max_pieces)
    }

    fn descriptors(&self) -> [RawFd; 2] {
        self.with(|side| [side.wake[0].as_raw_fd(), side.wake[1].as_raw_fd()])
    }

    fn slab(&mut self, length: usize, exposure: Exposure) -> Result<Slab, RdmaError> {
        let pages = Arc::new(Pages::new(length).unwrap());
        self.with(|side| {
            side.called("slab")?;
            side.next_key += 1;
            match exposure {
                Exposure::Local => {}
                Exposure::Peers => side.exposed.push((side.next_key, pages.segment(0, usize::MAX))),
                Exposure::Windows => side.bindable.push((side.next_key, pages.segment(0, usize::MAX))),
            }
            Ok(Slab::new(pages, Keys { local: side.next_key, remote: side.next_key }, None))
        })
    }

    fn has_windows(&self) -> bool {
        self.with(|side| side.has_windows)
    }

    fn expose(&mut self, memory: &Segment) -> Result<(u32, Box<dyn Any + Send + Sync>), RdmaError> {
        let kept = Arc::new(());
        self.with(|side| {
            side.called("expose")?;
            side.next_key += 1;
            side.exposed.push((side.next_key, *memory));
            side.registrations.push((side.next_key, Arc::downgrade(&kept)));
            Ok((side.next_key, Box::new(kept) as Box<dyn Any + Send + Sync>))
        })
    }

    fn window(&mut self) -> Result<u32, RdmaError> {
        self.with(|side| {
            let number = u32::try_from(side.windows.len()).unwrap();
            if side.windows.len() >= side.most_windows {
                let source = std::io::Error::from_raw_os_error(libc::ENOMEM);
                return Err(RdmaError::Call { what: "making a memory window", source });
            }
            // The last byte is at its end, so that its turning over is seen.
            side.windows.push(0x10_00ff + (number << 8));
            Ok(side.windows[side.windows.len() - 1])
        })
    }

    fn post(&mut self, requests: &[WorkRequest], pieces: &[Piece]) -> Result<(), RdmaError> {
        let mut wire = self.wire.borrow_mut();
        let [first, second] = &mut *wire;
        let (own, peer) = if self.side == 0 { (first, second) } else { (second, first) };
        if own.is_closed {
            return Err(RdmaError::Over);
        }
        for request in requests {
            own.posted.push(*request);
            assert!(request.count <= own.max_pieces, "{} pieces", request.count);
            assert!(request.number - own.completed <= own.sizes.sends.into(), "the send queue is full");
            let mut bytes = Vec::new();
            for piece in &pieces[request.first..request.first + request.count] {
                let memory = for_tests(usize::try_from(piece.address).unwrap(), piece.length as usize);
                let at = bytes.len();
                bytes.resize(at + piece.length as usize, 0);
                copy_from_segments(&[memory], &mut bytes[at..]);
            }
            if let Some((left, status)) = &mut own.fails_after {
                if *left == 0 {
                    let status = *status;
                    own.fails_after = None;
                    own.fail(request.number, status, false);
                } else {
                    *left -= 1;
                }
            }
            if own.is_broken || peer.is_closed {
                own.fail(request.number, "flushed", true);
                continue;
            }
            match request.operation {
                Operation::Send => peer.arrive(&bytes, None),
                Operation::Bind { .. } | Operation::Invalidate { .. } => own.of_windows(request),
                Operation::Write { address, key } => match peer.target(address, bytes.len(), key) {
                    Some(memory) => assert_eq!(copy_to_segments(&bytes, &[memory]), bytes.len()),
                    None => own.fail(request.number, "remote access error", false),
                },
                Operation::WriteWithImmediate { address, key, immediate } => {
                    match peer.target(address, bytes.len(), key) {
                        Some(memory) => {
                            assert_eq!(copy_to_segments(&bytes, &[memory]), bytes.len());
                            peer.arrive(&[], Some(immediate));
                        }
                        None => own.fail(request.number, "remote access error", false),
                    }
                }
            }
            if request.signaled && !own.is_broken {
                let done = Completion { is_receive: false, number: request.number, done: Done::Sent };
                if own.delays { own.late.push_back(done) } else { own.completions.push_back(done) }
            }
        }
        Ok(())
    }

    fn post_receive(&mut self, number: u32) -> Result<(), RdmaError> {
        self.with(|side| {
            side.called("post_receive")?;
            side.receives.push_back(number);
            Ok(())
        })
    }

    fn give_back(&mut self, number: u32) {
        self.with(|side| side.given_back.push(number));
    }

    fn receive_buffer(&self, number: u32) -> Option<(Arc<Pages>, usize, usize)> {
        self.with(|side| {
            let size = side.sizes.receive_size as usize;
            (number < side.sizes.receives).then(|| (Arc::clone(&side.memory), number as usize * size, size))
        })
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, RdmaError> {
        self.with(|side| {
            side.called("poll")?;
            let count = side.completions.len().min(5);
            for completion in side.completions.drain(..count) {
                if completion.done == Done::Sent {
                    side.completed = completion.number;
                }
                completions.push(completion);
            }
            Ok(count)
        })
    }

    fn quench(&mut self) {}

    fn arm(&mut self) -> Result<(), RdmaError> {
        self.with(|side| side.called("arm"))
    }

    fn event(&mut self) -> Result<Option<LinkEvent>, RdmaError> {
        self.with(|side| side.called("event").map(|()| side.events.pop_front()))
    }

    fn close(&mut self) {
        self.with(|side| side.is_closed = true);
    }
}

/// Who owns an end.
struct Owner {
    delivered: Vec<(MessageHeader, Vec<u8>)>,
    placed: Vec<(u16, u32, u32)>,
    keeps: bool,
    longest: u32,
    place: Vec<Segment>,
}

impl Default for Owner {
    fn default() -> Self {
        let (delivered, placed, place) = (Vec::new(), Vec::new(), Vec::new());
        Self { delivered, placed, keeps: true, longest: MAX_BODY, place }
    }
}

impl Receiver for Owner {
    fn place(&mut self, _header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        segments.extend_from_slice(&self.place);
        if self.place.is_empty() { Place::Discard } else { Place::Data }
    }

    fn longest_body(&self) -> u32 {
        self.longest
    }

    fn placed(&mut self, _header: &MessageHeader, window: u16, offset: u32, mark: u32) -> bool {
        self.placed.push((window, offset, mark));
        self.keeps
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        self.delivered.push((*header, body.to_vec()));
    }
}

/// A client and a node, connected.
struct Pair {
    wire: Wire,
    client: Link<Card>,
    node: Link<Card>,
    at_client: Owner,
    at_node: Owner,
    guest: Arc<Pages>,
    buffers: Arc<Pages>,
}

impl Pair {
    fn new(mode: ReadMode) -> Self {
        Self::with(mode, 8, 32, 64)
    }

    fn with(mode: ReadMode, receives: u32, max_pieces: usize, sends: u32) -> Self {
        let sizes = QueueSizes { sends, receives, receive_size: 4096, inline: 256 };
        let wire: Wire = Rc::new(RefCell::new([Side::new(sizes, max_pieces), Side::new(sizes, max_pieces)]));
        let (guest, buffers) = (Arc::new(Pages::new(GUEST).unwrap()), Arc::new(Pages::new(GUEST).unwrap()));
        let all = |pages: &Arc<Pages>| pages.segment(0, usize::MAX);
        match mode {
            ReadMode::Direct => wire.borrow_mut()[0].exposed.push((GUEST_KEY, all(&guest))),
            ReadMode::Window => wire.borrow_mut()[0].bindable.push((GUEST_KEY, all(&guest))),
            ReadMode::Bounce => {}
        }
        wire.borrow_mut()[1].bindable.push((BUFFER_KEY, all(&buffers)));
        let key = |n| Keys { local: n, remote: n };
        let peer = Introduction { receives: u16::try_from(receives).unwrap(), receive_size: 4096 };
        let end = |side, pages: &Arc<Pages>, n, role| {
            let card = Card { wire: Rc::clone(&wire), side };
            Link::new(card, Keyring::fixed(&[(all(pages), key(n))]), role, peer).unwrap()
        };
        let client = end(0, &guest, GUEST_KEY, Role::Opener(mode));
        let node = end(1, &buffers, BUFFER_KEY, Role::Acceptor);
        let (at_client, at_node) = (Owner::default(), Owner::default());
        Self { wire, client, node, at_client, at_node, guest, buffers }
    }

    /// Lets both ends work until nothing happens any more.
    fn run(&mut self) {
        for _ in 0..200 {
            self.client.flush().unwrap();
            self.node.receive(&mut self.at_node).unwrap();
            self.node.flush().unwrap();
            self.client.receive(&mut self.at_client).unwrap();
        }
    }

    fn lend(&mut self, window: u16, offset: usize, length: usize) {
        self.node.grant(window, &self.buffers.segment(offset, length)).unwrap();
    }

    fn write(&mut self, slot: u16, segments: &[Segment]) {
        let length = u32::try_from(segments.iter().map(Segment::length).sum::<usize>()).unwrap();
        let header = header(Kind::Write, slot, length, length);
        self.client.queue_data(&header, None, &mut |list| list.extend_from_slice(segments));
    }

    fn read(&mut self, slot: u16, segments: &[Segment]) -> MessageHeader {
        let length = u32::try_from(segments.iter().map(Segment::length).sum::<usize>()).unwrap();
        let header = header(Kind::Read, slot, 0, length);
        self.client.queue_read(&header, &mut |list| list.extend_from_slice(segments));
        header
    }

    /// Answers a read with data from the node's buffers.
    fn answer(&mut self, request: &MessageHeader, tag: u32) {
        let mut answer = request.reply(Kind::IoReply, Status::Ok);
        answer.payload = request.length;
        let data = self.buffers.segment(0, request.length as usize);
        self.node.queue_data(&answer, Some(tag), &mut |list| list.push(data));
    }

    /// Lets signaled work that was held back complete.
    fn let_late_work_complete(&self, side: usize) {
        let side = &mut self.wire.borrow_mut()[side];
        let late: Vec<_> = side.late.drain(..).collect();
        side.completions.extend(late);
    }

    fn posted(&self, side: usize) -> Vec<WorkRequest> {
        std::mem::take(&mut self.wire.borrow_mut()[side].posted)
    }
}

fn header(kind: Kind, slot: u16, payload: u32, length: u32) -> MessageHeader {
    let pool = PoolId::from_bytes([3; 16]);
    MessageHeader {
        slot: RequestSlot(slot),
        sequence: Sequence(slot.into()),
        payload,
        length,
        ..MessageHeader::new(kind, pool)
    }
}

fn fill(pages: &Pages, offset: usize, length: usize, seed: usize) -> Vec<u8> {
    let bytes: Vec<u8> = (0..length).map(|i| u8::try_from((i * 7 + seed) % 251).unwrap()).collect();
    copy_to_segments(&bytes, &[pages.segment(offset, length)]);
    bytes
}

fn bytes_of(pages: &Pages, offset: usize, length: usize) -> Vec<u8> {
    pages.bytes(offset, length).to_vec()
}
