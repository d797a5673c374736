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
        (offset + length <= memory.length()).then(|| memory.part(offset, length))
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

mod lent;
mod pulls;
mod refusals;
mod windows;

const GUEST: usize = 4 << 20;
const GUEST_KEY: u32 = 7;
const BUFFER_KEY: u32 = 8;

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

#[test]
fn a_write_is_one_work_request_from_guest_memory_to_the_slot_and_its_answer_one_small_send() {
    let mut pair = Pair::new(ReadMode::Direct);
    let data = [fill(&pair.guest, 100, 1024, 1), fill(&pair.guest, 9000, 3072, 2)].concat();
    let segments = [pair.guest.segment(100, 1024), pair.guest.segment(9000, 3072)];
    pair.write(5, &segments);
    pair.run();
    assert!(pair.at_node.delivered.is_empty(), "there is no slot yet");
    assert_eq!(pair.node.peer_wants(), 4096 + 96);
    pair.lend(3, 65536, 65536);
    pair.run();
    let (header, body) = pair.at_node.delivered[0].clone();
    assert_eq!((header.kind, header.slot.0, header.payload, body.len()), (Kind::Write, 5, 4096, 0));
    let (window, offset, mark) = pair.at_node.placed[0];
    assert_eq!((window, offset), (3, 0));
    assert_eq!(bytes_of(&pair.buffers, 65536, 4096), data);
    pair.posted(0);
    pair.posted(1);
    // The second one finds its slot there.
    pair.write(6, &segments);
    pair.node.release(mark);
    pair.node.queue(&header.reply(Kind::IoReply, Status::Ok), None);
    pair.run();
    let work = pair.posted(0);
    assert_eq!(work.len(), 1, "{work:?}");
    assert!(matches!(work[0].operation, Operation::WriteWithImmediate { .. }) && work[0].count == 3);
    let answers = pair.posted(1);
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert!(answers[0].inline && matches!(answers[0].operation, Operation::Send));
    assert_eq!(pair.at_client.delivered[0].0.slot.0, 5);
    let copied = [pair.client.counters(), pair.node.counters()].map(|c| c.data_copied_bytes);
    assert_eq!(copied, [0, 0]);
}

#[test]
fn many_segments_are_chained_and_arrive_as_one_write() {
    let mut pair = Pair::with(ReadMode::Direct, 8, 4, 64);
    let data = fill(&pair.guest, 0, 40 * 512, 3);
    let segments: Vec<_> = (0..40).map(|i| pair.guest.segment(i * 512, 512)).collect();
    pair.lend(0, 0, 1 << 20);
    pair.write(1, &segments);
    pair.run();
    assert_eq!(bytes_of(&pair.buffers, 0, data.len()), data);
    let work: Vec<_> =
        pair.posted(0).into_iter().filter(|w| !matches!(w.operation, Operation::Send)).collect();
    assert_eq!(work.len(), 41usize.div_ceil(4));
    assert!(matches!(work.last().unwrap().operation, Operation::WriteWithImmediate { .. }));
    assert_eq!(pair.at_node.delivered.len(), 1);
}

#[test]
fn a_read_is_one_send_one_write_into_guest_memory_and_one_answer() {
    let mut pair = Pair::new(ReadMode::Direct);
    let data = fill(&pair.buffers, 0, 4096, 4);
    let request = pair.read(2, &[pair.guest.segment(8192, 4096)]);
    pair.run();
    assert_eq!(pair.at_node.delivered[0].0, request);
    pair.answer(&request, 77);
    pair.wire.borrow_mut()[1].delays = true;
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 8192, 4096), data);
    assert_eq!(pair.at_client.delivered.len(), 1);
    let (asked, answered) = (pair.posted(0), pair.posted(1));
    assert_eq!((asked.len(), answered.len()), (1, 2));
    assert!(matches!(answered[0].operation, Operation::Write { .. }));
    let mut tags = Vec::new();
    pair.node.take_sent(&mut tags);
    assert!(tags.is_empty(), "the card may still read the buffer");
    pair.let_late_work_complete(1);
    pair.run();
    pair.node.take_sent(&mut tags);
    assert_eq!(tags, [77]);
    assert_eq!(pair.client.counters().data_copied_bytes, 0);
}

#[test]
fn a_read_into_many_places_fills_each() {
    let mut pair = Pair::with(ReadMode::Direct, 8, 2, 256);
    let data = fill(&pair.buffers, 0, 100 * 512, 5);
    let places: Vec<_> = (0..100).map(|i| pair.guest.segment(i * 1024, 512)).collect();
    let request = pair.read(1, &places);
    pair.run();
    pair.answer(&request, 1);
    pair.run();
    for i in 0..100 {
        assert_eq!(bytes_of(&pair.guest, i * 1024, 512), data[i * 512..][..512], "place {i}");
    }
}

#[test]
fn without_a_key_of_guest_memory_the_data_of_a_read_is_copied_and_counted() {
    let mut pair = Pair::new(ReadMode::Bounce);
    let data = fill(&pair.buffers, 0, 8192, 6);
    let request = pair.read(2, &[pair.guest.segment(4096, 8192)]);
    pair.run();
    pair.at_client.place = vec![pair.guest.segment(4096, 8192)];
    pair.answer(&request, 1);
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 4096, 8192), data);
    assert_eq!(pair.client.counters().data_copied_bytes, 8192);
    assert!(pair.client.reads.is_empty());
    // One that nobody waits for any more goes nowhere.
    fill(&pair.guest, 4096, 8192, 9);
    let before = bytes_of(&pair.guest, 4096, 8192);
    let request = pair.read(2, &[pair.guest.segment(4096, 8192)]);
    pair.run();
    pair.at_client.place.clear();
    pair.answer(&request, 2);
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 4096, 8192), before);
    assert!(pair.client.staging.iter().all(|(_, map)| map.is_free()));
}

#[test]
fn memory_that_is_not_registered_is_copied_both_ways() {
    let mut pair = Pair::new(ReadMode::Direct);
    let own = Pages::new(8192).unwrap();
    let data = fill(&own, 0, 4096, 7);
    pair.lend(0, 65536, 65536);
    pair.write(1, &[own.segment(0, 4096)]);
    pair.run();
    assert_eq!(bytes_of(&pair.buffers, 65536, 4096), data);
    fill(&pair.buffers, 0, 4096, 8);
    let request = pair.read(2, &[own.segment(4096, 4096)]);
    pair.run();
    pair.at_client.place = vec![own.segment(4096, 4096)];
    pair.answer(&request, 1);
    pair.run();
    assert_eq!(bytes_of(&own, 4096, 4096), bytes_of(&pair.buffers, 0, 4096));
    assert_eq!(pair.client.counters().data_copied_bytes, 8192);
    assert!(pair.client.staging.iter().all(|(_, map)| map.is_free()));
}

#[test]
fn an_error_answer_ends_a_read_and_frees_what_it_had() {
    let mut pair = Pair::new(ReadMode::Bounce);
    let request = pair.read(2, &[pair.guest.segment(0, 4096)]);
    pair.run();
    assert_eq!(pair.node.targets.len(), 1);
    pair.node.queue(&request.reply(Kind::IoReply, Status::IoError), None);
    pair.run();
    assert_eq!(pair.at_client.delivered[0].0.status, Status::IoError);
    assert!(pair.node.targets.is_empty() && pair.client.reads.is_empty());
    assert!(pair.client.staging.iter().all(|(_, map)| map.is_free()));
}

#[test]
fn messages_of_both_sides_go_in_order_and_never_without_a_credit() {
    let mut pair = Pair::with(ReadMode::Direct, 4, 32, 16);
    for i in 0..500 {
        pair.client.queue(&header(Kind::Ping, i, 0, 0), None);
        pair.node.queue(&header(Kind::Pong, i, 0, 0), None);
    }
    // The card fails the test when there is no receive buffer, or no place in the send queue.
    for _ in 0..10 {
        pair.run();
    }
    let slots = |owner: &Owner| owner.delivered.iter().map(|(h, _)| h.slot.0).collect::<Vec<_>>();
    assert_eq!(slots(&pair.at_node), (0..500).collect::<Vec<_>>());
    assert_eq!(slots(&pair.at_client), (0..500).collect::<Vec<_>>());
    assert_eq!(pair.client.backlog() + pair.node.backlog(), 0);
    // Idle sides do not tell one another of credits for ever.
    pair.posted(0);
    pair.posted(1);
    pair.run();
    assert_eq!(pair.posted(0).len() + pair.posted(1).len(), 0);
}

#[test]
fn long_bodies_arrive_whole_and_those_that_are_too_long_are_refused_at_once() {
    let mut pair = Pair::new(ReadMode::Direct);
    let body: Vec<u8> = (0..300_000u32).map(|i| u8::try_from(i % 241).unwrap()).collect();
    for _ in 0..3 {
        pair.client.queue(&header(Kind::SetView, 0, 300_000, 0), Some(body.clone()));
        pair.node.queue(&header(Kind::PullReply, 0, 300_000, 0), Some(body.clone()));
    }
    for _ in 0..5 {
        pair.run();
    }
    for owner in [&pair.at_node, &pair.at_client] {
        assert_eq!(owner.delivered.len(), 3);
        assert!(owner.delivered.iter().all(|(_, b)| *b == body));
    }
    pair.at_node.longest = 4096;
    pair.client.queue(&header(Kind::Hello, 0, 4097, 0), Some(vec![1; 4097]));
    pair.client.flush().unwrap();
    let error = pair.node.receive(&mut pair.at_node).unwrap_err().to_string();
    assert!(error.contains("body is 4097"), "{error}");
    assert!(pair.node.incoming.is_none());
}

#[test]
fn writes_wait_for_slots_in_order_and_go_on_as_they_are_released() {
    let mut pair = Pair::with(ReadMode::Direct, 64, 32, 64);
    pair.lend(0, 65536, 65536);
    for slot in 0..40 {
        fill(&pair.guest, usize::from(slot) * 4096, 4096, usize::from(slot));
        let segment = pair.guest.segment(usize::from(slot) * 4096, 4096);
        pair.write(slot, &[segment]);
    }
    let mut done = 0;
    for _ in 0..10 {
        pair.run();
        assert!(pair.at_node.placed.len() <= done + 8, "a window of 64 KiB has eight slots");
        for index in done..pair.at_node.placed.len() {
            let (_, offset, mark) = pair.at_node.placed[index];
            let found = bytes_of(&pair.buffers, 65536 + offset as usize, 4096);
            assert_eq!(found, bytes_of(&pair.guest, index * 4096, 4096), "write {index}");
            pair.node.release(mark);
        }
        done = pair.at_node.placed.len();
    }
    assert_eq!(done, 40);
    let slots: Vec<_> = pair.at_node.delivered.iter().map(|(h, _)| h.slot.0).collect();
    assert_eq!(slots, (0..40).collect::<Vec<_>>());
}

#[test]
fn a_grant_that_is_too_small_is_asked_for_again() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.write(0, &[pair.guest.segment(0, 128 << 10)]);
    pair.run();
    pair.lend(0, 0, 65536);
    pair.run();
    assert_eq!(pair.node.peer_wants(), (128 << 10) + 96);
    pair.lend(1, 65536, 256 << 10);
    pair.run();
    assert_eq!(pair.at_node.placed.len(), 1);
    assert_eq!(pair.node.peer_wants(), 0);
}

#[test]
fn windows_that_are_idle_are_given_back_and_may_be_lent_again() {
    let mut pair = Pair::new(ReadMode::Direct);
    for window in 0..3 {
        pair.lend(window, usize::from(window) << 16, 65536);
    }
    pair.run();
    pair.client.beat();
    pair.client.beat();
    pair.run();
    let mut returned = Vec::new();
    pair.node.take_returned(&mut returned);
    assert_eq!(returned.len(), 2);
    pair.lend(returned[0], 1 << 20, 65536);
    pair.run();
}

#[test]
fn most_work_is_not_signaled() {
    let mut pair = Pair::with(ReadMode::Direct, 64, 32, 64);
    pair.lend(0, 0, 1 << 20);
    pair.run();
    pair.posted(0);
    for slot in 0..200 {
        let segment = pair.guest.segment(0, 4096);
        pair.write(slot, &[segment]);
        pair.run();
        let (_, _, mark) = pair.at_node.placed.pop().unwrap();
        pair.node.release(mark);
    }
    let work = pair.posted(0);
    let signaled = work.iter().filter(|w| w.signaled).count();
    assert!(signaled * 10 < work.len(), "{signaled} of {}", work.len());
}

#[test]
fn work_that_fails_ends_the_connection_with_the_cards_words() {
    for words in ["transport retry counter exceeded", "RNR retry counter exceeded", "remote access error"] {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.lend(0, 0, 65536);
        pair.run();
        pair.wire.borrow_mut()[0].fails_after = Some((1, words));
        for slot in 0..3 {
            let segment = pair.guest.segment(0, 4096);
            pair.write(slot, &[segment]);
        }
        pair.client.flush().unwrap();
        let error = pair.client.receive(&mut pair.at_client).unwrap_err();
        assert!(matches!(&error, ConnectionError::Link(text) if text == words), "{error}");
        pair.client.shut_down();
        assert!(pair.wire.borrow()[0].is_closed);
        assert!(matches!(pair.client.flush(), Err(ConnectionError::Closed)));
        assert!(matches!(pair.client.receive(&mut pair.at_client), Err(ConnectionError::Closed)));
        assert!(!pair.client.has_unsent());
    }
}

#[test]
fn what_happens_to_a_connection_is_told_in_words_also_behind_work_that_was_flushed() {
    for words in
        ["the peer disconnected", "the RDMA device was removed", "the address moved to another device"]
    {
        for flushes in [false, true] {
            let mut pair = Pair::new(ReadMode::Direct);
            pair.wire.borrow_mut()[0].events.push_back(LinkEvent::Established);
            pair.run();
            pair.wire.borrow_mut()[0].events.push_back(LinkEvent::Lost(words.to_owned()));
            if flushes {
                pair.wire.borrow_mut()[0].fail(1, "flushed", true);
            }
            let error = pair.client.receive(&mut pair.at_client).unwrap_err();
            assert!(matches!(&error, ConnectionError::Link(text) if text == words), "{error}");
        }
    }
}

#[test]
fn a_card_that_takes_no_work_ends_the_connection() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.wire.borrow_mut()[0].is_closed = true;
    pair.client.queue(&header(Kind::Ping, 0, 0, 0), None);
    assert!(matches!(pair.client.flush(), Err(ConnectionError::Link(_))));
}

#[test]
fn shared_receive_buffers_go_back_when_the_connection_breaks() {
    let mut pair = Pair::new(ReadMode::Direct);
    for slot in 0..4 {
        pair.client.queue(&header(Kind::Ping, slot, 0, 0), None);
    }
    pair.client.flush().unwrap();
    // The first of them is no packet.
    let size = 4096;
    let memory = pair.wire.borrow()[1].memory.segment(0, size);
    copy_to_segments(&[0xff; 16], &[memory]);
    assert!(pair.node.receive(&mut pair.at_node).is_err());
    let mut given_back = pair.wire.borrow()[1].given_back.clone();
    given_back.sort_unstable();
    assert_eq!(given_back, [0, 1, 2, 3]);
    assert!(pair.at_node.delivered.is_empty());
}

#[test]
fn data_that_nobody_keeps_frees_its_slot_at_once() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.at_node.keeps = false;
    pair.lend(0, 0, 65536);
    for slot in 0..30 {
        let segment = pair.guest.segment(0, 4096);
        pair.write(slot, &[segment]);
    }
    pair.run();
    assert_eq!(pair.at_node.delivered.len(), 30);
}

#[test]
fn wrong_keys_are_refused_and_end_the_connection() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.lend(0, 0, 65536);
    pair.run();
    // The node has taken the memory back, and the client does not know.
    pair.wire.borrow_mut()[1].exposed.clear();
    let segment = pair.guest.segment(0, 4096);
    pair.write(0, &[segment]);
    pair.client.flush().unwrap();
    let error = pair.client.receive(&mut pair.at_client).unwrap_err();
    assert!(matches!(&error, ConnectionError::Link(text) if text.contains("remote access")), "{error}");
    pair.node.receive(&mut pair.at_node).unwrap();
    assert!(pair.at_node.delivered.is_empty());
}

#[test]
fn a_peer_that_breaks_the_rules_is_refused_whatever_it_sends() {
    let packet = |kind, affairs: &Affairs, message: Option<(MessageHeader, u16)>, rest: &[u8]| {
        let mut bytes = Vec::new();
        let total = message.map_or(0, |(_, targets)| HEADER_SIZE + 16 * usize::from(targets));
        let targets = message.map_or(0, |(_, targets)| targets);
        packet::begin(kind, affairs, u32::try_from(total).unwrap(), targets, &mut bytes);
        if let Some((header, _)) = message {
            bytes.extend_from_slice(&header.encode());
        }
        bytes.extend_from_slice(rest);
        bytes
    };
    let none = Affairs::default();
    let read = header(Kind::Read, 0, 0, 4096);
    let target = |length: u32| {
        let mut bytes = Vec::new();
        packet::push_target(&Target { address: 1, length, key: 1 }, &mut bytes);
        bytes
    };
    let cases = [
        packet(PacketKind::Flow, &Affairs { receives: 1, ..none.clone() }, None, &[]),
        packet(PacketKind::Flow, &Affairs { released: vec![1], ..none.clone() }, None, &[]),
        packet(PacketKind::Flow, &Affairs { returns: vec![9], ..none.clone() }, None, &[]),
        packet(PacketKind::Tail, &none, Some((read, 0)), &[]),
        packet(PacketKind::Continuation, &none, None, &[1]),
        packet(PacketKind::Message, &none, Some((header(Kind::Write, 0, 512, 512), 0)), &[]),
        packet(PacketKind::Message, &none, Some((read, 0)), &[]),
        packet(PacketKind::Message, &none, Some((read, 1)), &target(512)),
        packet(PacketKind::Message, &none, Some((header(Kind::Ping, 0, 0, 0), 1)), &target(0)),
        packet(PacketKind::Message, &none, Some((header(Kind::Ping, 0, 0, 0), 0)), &[1]),
        vec![1, 2, 3],
    ];
    for (index, bytes) in cases.iter().enumerate() {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.lend(0, 0, 65536);
        pair.wire.borrow_mut()[1].arrive(bytes, None);
        assert!(pair.node.receive(&mut pair.at_node).is_err(), "case {index}");
        assert!(pair.at_node.delivered.is_empty(), "case {index}");
    }
    // To a client nobody writes data, and a node returns nothing.
    for affairs in [
        Affairs { returns: vec![1], ..none.clone() },
        Affairs { wanted: 1, ..none.clone() },
        Affairs { released: vec![1], ..none.clone() },
    ] {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.wire.borrow_mut()[0].arrive(&packet(PacketKind::Flow, &affairs, None, &[]), None);
        assert!(pair.client.receive(&mut pair.at_client).is_err());
    }
}

#[test]
fn a_peer_that_sends_more_than_it_has_credits_for_is_refused() {
    let mut pair = Pair::new(ReadMode::Direct);
    let mut bytes = Vec::new();
    packet::begin(PacketKind::Flow, &Affairs::default(), 0, 0, &mut bytes);
    for _ in 0..8 {
        pair.wire.borrow_mut()[1].arrive(&bytes, None);
        pair.node.receive(&mut pair.at_node).unwrap();
    }
    pair.wire.borrow_mut()[1].arrive(&bytes, None);
    let error = pair.node.receive(&mut pair.at_node).unwrap_err();
    assert!(error.to_string().contains("credits"), "{error}");
}

#[test]
fn data_outside_of_free_slots_is_refused() {
    let tail = |kind, header: MessageHeader| {
        let mut bytes = Vec::new();
        packet::begin(kind, &Affairs::default(), 0, 0, &mut bytes);
        bytes.extend_from_slice(&header.encode());
        bytes
    };
    let good = || tail(PacketKind::Tail, header(Kind::Write, 0, 4096, 4096));
    let place = |pair: &mut Pair, bytes: &[u8], at: usize, mark: u32| {
        let memory = pair.buffers.segment(at, bytes.len());
        copy_to_segments(bytes, &[memory]);
        pair.wire.borrow_mut()[1].arrive(&[], Some(mark));
        pair.node.receive(&mut pair.at_node)
    };
    let mut pair = Pair::new(ReadMode::Direct);
    pair.lend(2, 0, 65536);
    let at = |offset: usize| 2 << 16 | u32::try_from(offset / 16).unwrap();
    place(&mut pair, &good(), 4096, at(4096)).unwrap();
    for (bytes, position, mark, what) in [
        (good(), 4096, at(4096), "in use"),
        (good(), 4112, at(4112), "no page"),
        (good(), 2048, at(2048), "before its window"),
        (good(), 12288, (3 << 16) + 12288 / 16, "not lent"),
        (good(), 65536 - 16, at(65536 - 16), "end of its window"),
        (tail(PacketKind::Message, header(Kind::Write, 0, 4096, 4096)), 20480, at(20480), "no write"),
        (tail(PacketKind::Tail, header(Kind::Ping, 0, 0, 0)), 20480, at(20480), "no write"),
    ] {
        let error = place(&mut pair, &bytes, position, mark).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
    assert_eq!(pair.at_node.delivered.len(), 1);
}

#[test]
fn closing_leaves_nothing_that_could_touch_memory() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.lend(0, 0, 65536);
    pair.run();
    let segment = pair.guest.segment(0, 4096);
    pair.write(0, &[segment]);
    pair.node.shut_down();
    pair.client.flush().unwrap();
    assert!(matches!(pair.client.receive(&mut pair.at_client), Err(ConnectionError::Closed)));
    pair.client.shut_down();
    assert!(pair.at_node.placed.is_empty());
    assert_eq!(pair.client.backlog(), 0);
}
