//! A node for tests of drivers: it keeps one member's data in memory, answers over TCP on a thread of its own, and does what a test tells
//! it. It knows nothing of a second member, and nothing of what makes a real one safe.
//!
//! Also part of the tests of `vhost-brmr`, which include this file.

use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rmr_common::buffer::{Segment, copy_out};
use rmr_common::pool::{
    Address, Attested, BootId, ChunkSize, Epoch, Mark, MemberId, MemberSpec, PoolId, PoolSpec, Position,
    Sequence, StoreId, View,
};
use rmr_common::transport::tcp::TcpConnection;
use rmr_common::transport::{Connection, Place, Receiver};
use rmr_common::wire::{
    AttachReply, HelloReply, Kind, Limits, MessageHeader, PROTOCOL_VERSION, SetView, Status, data_digest,
};

/// How long tests wait for what comes in any case.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
const SIZE: usize = 1 << 20;

/// What a test sees and sets.
pub(super) struct State {
    /// The bytes of the store.
    pub(super) data: Vec<u8>,
    /// The last mark.
    mark: Mark,
    /// Requests in the order in which they came.
    pub(super) requests: Vec<MessageHeader>,
    /// Requests are not answered.
    pub(super) holds: bool,
    /// The next answer to a read brings other data than the store has.
    pub(super) spoils: bool,
    /// Writes whose data did not fit their digest.
    pub(super) mismatches: usize,
    /// Answers to reads carry this digest instead of none.
    pub(super) digest: Option<u32>,
    /// The run of its machine; a write-back store loses by another what was not flushed.
    pub(super) host_boot: u8,
    /// Requests are answered as to a client that another one has displaced.
    pub(super) fences: bool,
    /// All connections are closed once.
    pub(super) cut: bool,
    /// How many connections were made.
    pub(super) connections: usize,
    spec: PoolSpec,
    view: View,
    epoch: Epoch,
    held: Vec<(usize, MessageHeader)>,
}

/// The node, seen from a test.
#[derive(Clone)]
pub(super) struct FakeNode(Arc<Mutex<State>>);

/// The memory of a message, and what came with it.
#[derive(Default)]
struct Inbox {
    data: Vec<Vec<u8>>,
    messages: Vec<(MessageHeader, Vec<u8>)>,
}

impl Receiver for Inbox {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        let mut bytes = vec![0; header.payload as usize];
        // SAFETY: the bytes stay where they are when the list of them grows, and as long as the connection.
        segments.push(unsafe { Segment::new(bytes.as_mut_ptr(), bytes.len()) });
        self.data.push(bytes);
        Place::Data
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        self.messages.push((*header, body.to_vec()));
    }
}

struct Peer {
    connection: TcpConnection,
    inbox: Inbox,
    /// Data of answers that are being sent.
    sending: Vec<Vec<u8>>,
}

impl FakeNode {
    /// A node with the one member of a pool.
    pub(super) fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = Address::tcp("127.0.0.1", listener.local_addr().expect("an address").port());
        let member = MemberId::all().next().expect("a member");
        let store = StoreId::from_bytes([1; 16]);
        let spec = PoolSpec {
            id: PoolId::from_bytes([9; 16]),
            name: "p".into(),
            size: SIZE as u64,
            chunk_size: ChunkSize::from_bytes(64 << 10).expect("a size"),
            logical_block_size: 512,
            members: vec![MemberSpec::new(member, store, address)],
        };
        let node = Self(Arc::new(Mutex::new(State {
            mark: Mark(0),
            data: vec![0; SIZE],
            requests: Vec::new(),
            holds: false,
            spoils: false,
            mismatches: 0,
            digest: None,
            host_boot: 1,
            fences: false,
            cut: false,
            connections: 0,
            view: View::initial([(member, store)]),
            spec,
            epoch: Epoch(0),
            held: Vec::new(),
        })));
        let of_thread = node.clone();
        // It ends with the test's process.
        std::thread::spawn(move || of_thread.serve(&listener));
        node
    }

    /// Its state, between two messages.
    pub(super) fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The pool.
    pub(super) fn spec(&self) -> PoolSpec {
        self.state().spec.clone()
    }

    /// Where it listens.
    pub(super) fn address(&self) -> Address {
        self.state().spec.members[0].address.clone()
    }

    fn serve(&self, listener: &TcpListener) {
        listener.set_nonblocking(true).expect("a flag");
        let mut peers: Vec<Option<Peer>> = Vec::new();
        loop {
            if let Ok((stream, _)) = listener.accept() {
                peers.push(Some(Peer::new(stream)));
                self.state().connections += 1;
            }
            if std::mem::take(&mut self.state().cut) {
                peers.iter_mut().for_each(|peer| *peer = None);
                self.state().held.clear();
            }
            for (index, slot) in peers.iter_mut().enumerate() {
                let Some(peer) = slot else { continue };
                if peer.connection.receive(&mut peer.inbox).is_err() || !self.answer(index, peer) {
                    *slot = None;
                }
            }
            std::thread::sleep(Duration::from_micros(200));
        }
    }

    /// Answers what a peer has sent; false when it is gone.
    fn answer(&self, index: usize, peer: &mut Peer) -> bool {
        let mut state = self.state();
        if !state.holds {
            let held = std::mem::take(&mut state.held);
            for (of, header) in held {
                if of == index {
                    peer.reply_to_request(&mut state, &header);
                } else {
                    state.held.push((of, header));
                }
            }
        }
        let mut data = peer.inbox.data.drain(..);
        for (header, body) in peer.inbox.messages.drain(..) {
            if header.kind.carries_data() && header.payload > 0 {
                let (bytes, at) =
                    (data.next().expect("data"), usize::try_from(header.offset).expect("an offset"));
                state.mismatches += usize::from(header.digest.is_some_and(|d| d != data_digest(&bytes)));
                state.data[at..at + bytes.len()].copy_from_slice(&bytes);
            }
            let is_request = header.kind.is_request();
            if is_request {
                state.requests.push(header);
                state.held.push((index, header));
                continue;
            }
            let Some((kind, body)) = state.control(&header, &body) else { continue };
            let mut reply = header.reply(kind, Status::Ok);
            reply.payload = u32::try_from(body.len()).expect("a body");
            peer.connection.queue(&reply, Some(body).filter(|body| !body.is_empty()));
        }
        drop(data);
        peer.connection.flush().is_ok()
    }
}

impl State {
    fn control(&mut self, header: &MessageHeader, body: &[u8]) -> Option<(Kind, Vec<u8>)> {
        Some(match header.kind {
            Kind::Hello => {
                let reply = HelloReply {
                    version: PROTOCOL_VERSION,
                    capabilities: 0,
                    limits: Limits { max_io: 1 << 20, slots: 64, max_bytes: 8 << 20 },
                    member: self.spec.members[0].id,
                    write_through: false,
                    host_boot: BootId::from_bytes([self.host_boot; 16]),
                    process_boot: BootId::from_bytes([1; 16]),
                    spec: self.spec.clone(),
                    view: self.view.clone(),
                    epoch: self.epoch,
                    position: Position::new(self.epoch, &self.view, self.mark),
                    attested: Attested::default(),
                    clean_detach: false,
                };
                (Kind::HelloReply, reply.encode())
            }
            Kind::Attach => {
                let position = Position::new(self.epoch, &self.view, self.mark);
                self.epoch = header.epoch;
                let reply = AttachReply {
                    view: self.view.clone(),
                    spec: self.spec.clone(),
                    last_client: None,
                    clean_detach: false,
                    slots: Vec::new(),
                    watermark: Sequence(0),
                    tables_lost: false,
                    intents: Vec::new(),
                    position,
                    attested: Attested::default(),
                    flush_failed: false,
                };
                (Kind::AttachReply, reply.encode())
            }
            Kind::SetView => {
                let set = SetView::decode(body).expect("a view");
                if set.view.epoch > self.view.epoch {
                    self.mark = Mark(0);
                }
                (self.view, self.spec) = (set.view, set.spec);
                (Kind::SetViewReply, Vec::new())
            }
            Kind::Mark => {
                self.mark = Mark(header.sequence.0);
                (Kind::MarkReply, Vec::new())
            }
            Kind::Ping => (Kind::Pong, Vec::new()),
            Kind::Detach => (Kind::DetachReply, Vec::new()),
            _ => return None,
        })
    }
}

impl Peer {
    fn new(stream: TcpStream) -> Self {
        let connection = TcpConnection::new(stream, PATIENCE).expect("a connection");
        Self { connection, inbox: Inbox::default(), sending: Vec::new() }
    }

    fn reply_to_request(&mut self, state: &mut State, header: &MessageHeader) {
        let kind = if header.kind == Kind::Flush { Kind::FlushReply } else { Kind::IoReply };
        let status = if state.fences { Status::StaleEpoch } else { Status::Ok };
        let mut reply = header.reply(kind, status);
        if header.kind != Kind::Read || state.fences {
            return self.connection.queue(&reply, None);
        }
        let at = usize::try_from(header.offset).expect("an offset");
        let mut bytes = state.data[at..at + header.length as usize].to_vec();
        if std::mem::take(&mut state.spoils) {
            bytes[0] ^= 0xff;
        }
        (reply.payload, reply.digest) = (header.length, state.digest);
        // SAFETY: kept as long as the connection.
        let segment = unsafe { Segment::new(bytes.as_mut_ptr(), bytes.len()) };
        self.connection.queue_data(&reply, None, &mut |list| list.push(segment));
        self.sending.push(bytes);
    }
}

/// Waits until something is so, and does something between two looks.
pub(super) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(Duration::from_micros(500));
    }
}

/// The bytes of segments, for memory that tests own.
pub(super) fn bytes_of(segments: &[Segment]) -> Vec<u8> {
    let mut bytes = Vec::new();
    copy_out(segments, 0, segments.iter().map(Segment::length).sum(), &mut bytes);
    bytes
}
