//! TCP: all messages of a wake-up in one frame, data straight from and to the memory of whoever asked for it.
//!
//! The one copy of data on each side is the kernel's; under TLS the cipher makes another. A frame's table tells the receiver where every payload byte
//! belongs before it arrives, so one `recvmsg` fills the memory of many requests and the head of the next frame.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io;
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use super::socket::{self, MAX_SEGMENTS};
use super::tls::{ClientTls, ServerTls, TlsStream};
use super::unsent::{ANSWERED, Request, Unsent};
use super::{Connection, ConnectionError, Counters, Place, Receiver};
use crate::buffer::Segment;
use crate::pool::{Sequence, Slot};
use crate::wire::{
    FRAME_HEADER_SIZE, FrameHeader, HEADER_SIZE, Kind, MAX_FRAME_MESSAGES, MAX_SLOTS, MessageHeader,
    WireError, frame_crc,
};

/// A frame's header and first message: what every frame has at least.
const HEAD: usize = FRAME_HEADER_SIZE + HEADER_SIZE;
/// Headers of the most messages that a frame may have.
const TABLE: usize = HEADER_SIZE * MAX_FRAME_MESSAGES;
/// What is taken in one call of `receive` in bytes, messages and work, so that other connections get their turn.
const RECEIVE_BUDGET: usize = 1 << 20;
/// A message counts as at least so many bytes of the budget: short ones cost their receiver about as much as a block.
const MESSAGE_COST: usize = 4096;
/// Most bytes of payload in a frame; a frame that reaches it is closed, and the next message starts another.
const FRAME_PAYLOAD: u32 = 8 << 20;
/// Where payload goes that nobody waits for any more.
const DISCARD: usize = 64 << 10;
/// Most frames that are kept for use again; one is filled while one is sent.
const MAX_SPARE: usize = 8;
/// Smallest unit in which memory can be taken away from this process.
const PAGE: usize = 4096;
/// Sent in place of a page that cannot be read.
static FILLER: [u8; PAGE] = [0; PAGE];

/// Whether the kernel could not reach the memory of a system call.
fn is_fault(error: &io::Error) -> bool {
    error.raw_os_error() == Some(libc::EFAULT)
}

/// The part of a segment from `offset` to the end of its first page.
fn first_page(segment: &Segment, offset: usize) -> Segment {
    let start = segment.base().addr().wrapping_add(offset);
    segment.part(offset, PAGE - start % PAGE)
}

/// What frames go over.
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream>),
}

impl Stream {
    fn socket(&self) -> &TcpStream {
        match self {
            Self::Plain(stream) => stream,
            Self::Tls(stream) => stream.socket(),
        }
    }

    fn send(&mut self, segments: &[Segment]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => socket::send(stream.as_fd(), segments),
            Self::Tls(stream) => stream.send(segments),
        }
    }

    /// Fills `segments`; without `pulls`, only with what [`Stream::has_received`] speaks of.
    fn receive(&mut self, segments: &[Segment], pulls: bool) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => socket::receive(stream.as_fd(), segments),
            Self::Tls(stream) => stream.receive(segments, pulls),
        }
    }

    /// Sends what a session has taken, or says of its own accord.
    fn push(&mut self) -> io::Result<()> {
        match self {
            Self::Plain(_) => Ok(()),
            Self::Tls(stream) => stream.push().map(drop),
        }
    }

    fn wants_to_send(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.wants_to_send(),
        }
    }

    /// Whether bytes have arrived that the socket does not show as readable.
    fn has_received(&self) -> bool {
        match self {
            Self::Plain(_) => false,
            Self::Tls(stream) => stream.has_received(),
        }
    }
}

/// A TCP connection with its queues.
pub struct TcpConnection {
    stream: Stream,
    sender: Sender,
    receiver: ReceiveState,
    counters: Counters,
}

impl TcpConnection {
    /// Takes over a connected stream. `dead_after` is how long sent data may stay unacknowledged.
    ///
    /// # Errors
    /// When the stream's options cannot be set.
    pub fn new(stream: TcpStream, dead_after: Duration) -> io::Result<Self> {
        Self::prepare(&stream, dead_after)?;
        Ok(Self::over(Stream::Plain(stream)))
    }

    /// The same for the connecting side of TLS. `host` is what the peer's certificate has to name.
    ///
    /// # Errors
    /// When the stream's options cannot be set, or `host` is neither a name nor an address.
    pub fn with_tls(
        stream: TcpStream,
        dead_after: Duration,
        tls: &ClientTls,
        host: &str,
    ) -> io::Result<Self> {
        Self::prepare(&stream, dead_after)?;
        Ok(Self::over(Stream::Tls(Box::new(tls.begin(stream, host)?))))
    }

    /// The same for the accepting side of TLS.
    ///
    /// # Errors
    /// When the stream's options cannot be set.
    pub fn accepted_with_tls(stream: TcpStream, dead_after: Duration, tls: &ServerTls) -> io::Result<Self> {
        Self::prepare(&stream, dead_after)?;
        Ok(Self::over(Stream::Tls(Box::new(tls.begin(stream)?))))
    }

    fn over(stream: Stream) -> Self {
        Self {
            stream,
            sender: Sender::default(),
            receiver: ReceiveState::new(),
            counters: Counters::default(),
        }
    }

    fn prepare(stream: &TcpStream, dead_after: Duration) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        stream.set_nodelay(true)?;
        let timeout = i32::try_from(dead_after.as_millis()).unwrap_or(i32::MAX);
        socket::set_option(stream.as_fd(), libc::IPPROTO_TCP, libc::TCP_USER_TIMEOUT, timeout)?;
        // An algorithm that paces what it sends (BBR, where that is the system's default) makes short exchanges wait for
        // timers. These two do not; where neither is allowed, the system's stays.
        let _ = ["cubic", "reno"].iter().find(|name| socket::set_congestion(stream.as_fd(), name).is_ok());
        Ok(())
    }

    /// What was done so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.counters
    }

    /// Ends the connection at once for the peer, and touches no memory of requests any more, while the descriptor stays
    /// open until the value is dropped.
    pub fn shut_down(&mut self) {
        if let Stream::Tls(stream) = &mut self.stream {
            stream.say_goodbye();
        }
        // A connection that is broken already cannot be shut down, and need not be.
        let _ = self.stream.socket().shutdown(std::net::Shutdown::Both);
        self.sender = Sender::default();
        self.receiver = ReceiveState::new();
    }
}

impl Connection for TcpConnection {
    fn queue(&mut self, header: &MessageHeader, body: Option<Vec<u8>>) {
        self.sender.body_bytes += body.as_ref().map_or(0, Vec::len);
        self.sender.queue(header, None, |frame| {
            if let Some(body) = body {
                // SAFETY: the bytes live in the frame until it is sent, and moving a `Vec` does not move its bytes.
                frame.segments.push(unsafe { Segment::new(body.as_ptr().cast_mut(), body.len()) });
                frame.bodies.push(body);
            }
        });
    }

    fn backlog_bytes(&self) -> usize {
        self.sender.body_bytes
    }

    fn queue_data(
        &mut self,
        header: &MessageHeader,
        tag: Option<u32>,
        gather: &mut dyn FnMut(&mut Vec<Segment>),
    ) {
        self.sender.queue(header, tag, |frame| gather(&mut frame.segments));
    }

    fn flush(&mut self) -> Result<(), ConnectionError> {
        self.stream.push()?;
        self.sender.flush(&mut self.stream, &mut self.counters)
    }

    fn receive(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        self.receiver.run(&mut self.stream, &self.sender, receiver, &mut self.counters)
    }

    fn take_sent(&mut self, tags: &mut Vec<u32>) {
        tags.append(&mut self.sender.sent);
    }

    fn take_faults(&mut self, faults: &mut Vec<(Slot, Sequence)>) {
        faults.extend(self.sender.faults.drain(..).map(|request| (request.slot, request.sequence)));
    }

    fn wants_to_send(&self) -> bool {
        !self.sender.frames.is_empty() || self.stream.wants_to_send()
    }

    fn backlog(&self) -> usize {
        self.sender.backlog
    }

    fn is_starved(&self) -> bool {
        self.receiver.starved
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.stream.socket().as_raw_fd())
    }
}

/// A frame to send. The first segment is `head`; the others are payloads.
#[derive(Default)]
struct Frame {
    head: Vec<u8>,
    count: u16,
    payload: u32,
    segments: Vec<Segment>,
    bodies: Vec<Vec<u8>>,
    tags: Vec<u32>,
    /// For each message the number of segments up to its end, and the request that it is, if it is one.
    messages: Vec<(usize, Option<Request>)>,
}

impl Frame {
    fn reset(&mut self) {
        self.head.clear();
        self.head.resize(FRAME_HEADER_SIZE, 0);
        self.count = 0;
        self.payload = 0;
        self.segments.clear();
        // Filled in when the frame is closed; the head may still grow and move until then.
        // SAFETY: a segment of no bytes is never read.
        self.segments.push(unsafe { Segment::new(std::ptr::null_mut(), 0) });
        self.bodies.clear();
        self.messages.clear();
    }

    fn close(&mut self) {
        let checksum = frame_crc(&self.head[FRAME_HEADER_SIZE..]);
        let header = FrameHeader { count: self.count, payload: self.payload, checksum };
        self.head[..FRAME_HEADER_SIZE].copy_from_slice(&header.encode());
        // SAFETY: the head is not changed from now until the frame is sent and reset.
        self.segments[0] = unsafe { Segment::new(self.head.as_mut_ptr(), self.head.len()) };
    }
}

#[derive(Default)]
struct Sender {
    /// Closed frames, the first one partly sent.
    frames: VecDeque<Frame>,
    /// How much of the first frame is sent: whole segments, and bytes of the next.
    position: (usize, usize),
    open: Option<Frame>,
    /// Messages in `frames` and `open`.
    backlog: usize,
    /// Bytes of bodies in `frames` and `open`.
    body_bytes: usize,
    spare: Vec<Frame>,
    scratch: Vec<Segment>,
    sent: Vec<u32>,
    unsent: Unsent,
    /// Bytes that are sent page by page, because memory near them cannot be read.
    narrow: usize,
    /// Bytes of these that are sent as [`FILLER`].
    filler: usize,
    /// Writes that were sent with filler.
    faults: Vec<Request>,
}

impl Sender {
    fn queue(&mut self, header: &MessageHeader, tag: Option<u32>, payload: impl FnOnce(&mut Frame)) {
        let full = |f: &Frame| usize::from(f.count) == MAX_FRAME_MESSAGES || f.payload >= FRAME_PAYLOAD;
        if self.open.as_ref().is_some_and(full) {
            self.close_open();
        }
        let frame = self.open.get_or_insert_with(|| {
            let mut frame = self.spare.pop().unwrap_or_default();
            frame.reset();
            frame
        });
        frame.head.extend_from_slice(&header.encode());
        frame.count += 1;
        self.backlog += 1;
        frame.payload += header.payload;
        frame.tags.extend(tag);
        payload(frame);
        frame.messages.push((frame.segments.len(), Request::of(header)));
        self.unsent.queued(header);
    }

    /// Whether a message answers a request that is not sent whole.
    fn is_unsent(&self, answer: &MessageHeader) -> bool {
        if self.backlog == 0 {
            return false;
        }
        let (segments, _) = self.position;
        let is_sent = |(end, _): &(usize, Option<Request>)| *end <= segments;
        let sent = self.frames.front().map_or(0, |first| first.messages.partition_point(is_sent));
        let wanted = self.unsent.suspect(answer, self.backlog - sent);
        wanted.is_some() && {
            let frames = self.frames.iter().chain(&self.open);
            frames.flat_map(|frame| &frame.messages).skip(sent).any(|(_, request)| *request == wanted)
        }
    }

    fn close_open(&mut self) {
        if let Some(mut frame) = self.open.take() {
            frame.close();
            self.frames.push_back(frame);
        }
    }

    fn flush(&mut self, stream: &mut Stream, counters: &mut Counters) -> Result<(), ConnectionError> {
        self.close_open();
        while !self.frames.is_empty() {
            let wanted = self.collect();
            match stream.send(&self.scratch) {
                Ok(sent) => {
                    counters.tcp_sent_bytes += sent as u64;
                    self.narrow = self.narrow.saturating_sub(sent);
                    self.filler = self.filler.saturating_sub(sent);
                    let was_short = sent < wanted;
                    self.advance(sent);
                    // Short of a page that cannot be read, or of what the network takes: the next call tells.
                    if was_short {
                        return Ok(());
                    }
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_fault(&error) && self.fault() => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// The kernel could not read the memory of what is to be sent next. The frame's table has been sent, so the peer expects the
    /// bytes: what can be read is sent page by page to the end of the message, and filler in place of the rest. False if that is
    /// no help: only the owner of a write can repeat it.
    fn fault(&mut self) -> bool {
        let (index, offset) = self.position;
        let Some(frame) = self.frames.front() else { return false };
        let at = frame.messages.partition_point(|(end, _)| *end <= index);
        let Some((end, request)) = frame.messages.get(at) else { return false };
        if self.narrow == 0 {
            let left = frame.segments[index..*end].iter().map(Segment::length).sum::<usize>();
            self.narrow = left - offset;
            return true;
        }
        // Of the requests only writes have data to send.
        let Some(request) = request.filter(|_| self.filler == 0) else { return false };
        self.filler = first_page(&frame.segments[index], offset).length();
        if self.faults.last() != Some(&request) {
            self.faults.push(request);
        }
        true
    }

    /// Collects the segments of one system call from as many frames as fit; returns their bytes.
    fn collect(&mut self) -> usize {
        self.scratch.clear();
        if self.narrow > 0 {
            return self.collect_page();
        }
        let (mut skip, mut offset) = self.position;
        for frame in &self.frames {
            for segment in &frame.segments[skip..] {
                if self.scratch.len() == MAX_SEGMENTS {
                    break;
                }
                self.scratch.push(segment.part(offset, usize::MAX));
                offset = 0;
            }
            skip = 0;
        }
        self.scratch.iter().map(Segment::length).sum()
    }

    /// Collects the next page, or filler for it.
    fn collect_page(&mut self) -> usize {
        let (mut index, mut offset) = self.position;
        let Some(frame) = self.frames.front() else { return 0 };
        while frame.segments.get(index).is_some_and(|segment| segment.length() == offset) {
            (index, offset) = (index + 1, 0);
        }
        let Some(segment) = frame.segments.get(index) else { return 0 };
        let page = if self.filler > 0 {
            // SAFETY: the bytes are never written: what is sent is only read.
            unsafe { Segment::new(FILLER.as_ptr().cast_mut(), self.filler) }
        } else {
            first_page(segment, offset)
        };
        self.scratch.push(page);
        page.length()
    }

    fn advance(&mut self, mut sent: usize) {
        while let Some(frame) = self.frames.front() {
            let (mut index, mut offset) = self.position;
            while let Some(segment) = frame.segments.get(index) {
                let left = segment.length() - offset;
                if sent < left {
                    self.position = (index, offset + sent);
                    return;
                }
                sent -= left;
                index += 1;
                offset = 0;
            }
            self.position = (0, 0);
            if let Some(mut frame) = self.frames.pop_front() {
                self.sent.append(&mut frame.tags);
                self.body_bytes -= frame.bodies.iter().map(Vec::len).sum::<usize>();
                frame.bodies.clear();
                self.backlog -= usize::from(frame.count);
                if self.spare.len() < MAX_SPARE {
                    self.spare.push(frame);
                }
            }
        }
    }
}

/// One message of the frame that is being received.
struct Incoming {
    header: MessageHeader,
    body: Vec<u8>,
    /// Some of its data went nowhere: the memory for it cannot be written.
    faulted: bool,
}

/// What is received: head, rest of the table, then payloads.
struct ReceiveState {
    head: Box<[u8; HEAD]>,
    /// Bytes of the head that are there.
    head_filled: usize,
    /// The frame whose head is complete.
    frame: Option<FrameHeader>,
    /// Headers of the frame's messages, with room for the most that there may be.
    table: Box<[u8; TABLE]>,
    table_length: usize,
    table_filled: usize,
    messages: VecDeque<Incoming>,
    /// How many of `messages` have a place for their payload.
    placed: usize,
    /// Where the payload of placed messages goes, less what has arrived.
    segments: VecDeque<Segment>,
    /// Bytes of the first message's payload that have not arrived.
    first_left: usize,
    /// There is no place for the first message's payload.
    starved: bool,
    /// The first message is received page by page, because memory near its place cannot be written.
    narrow: bool,
    /// What the messages that were delivered in this call count for in its budget.
    spent: usize,
    scratch: Vec<Segment>,
    discard: Box<[u8]>,
}

impl ReceiveState {
    fn new() -> Self {
        Self {
            head: Box::new([0; HEAD]),
            head_filled: 0,
            frame: None,
            table: Box::new([0; TABLE]),
            table_length: 0,
            table_filled: 0,
            messages: VecDeque::with_capacity(MAX_FRAME_MESSAGES),
            placed: 0,
            segments: VecDeque::new(),
            first_left: 0,
            starved: false,
            narrow: false,
            spent: 0,
            scratch: Vec::new(),
            discard: Box::new([]),
        }
    }

    fn run(
        &mut self,
        stream: &mut Stream,
        sender: &Sender,
        receiver: &mut dyn Receiver,
        counters: &mut Counters,
    ) -> Result<(), ConnectionError> {
        let mut taken = 0;
        self.spent = 0;
        self.starved = false;
        loop {
            self.place(sender, receiver)?;
            if !self.messages.is_empty() && self.placed == 0 {
                self.starved = true;
                return Ok(()); // No memory for the next payload; the owner calls again when there is.
            }
            let wanted = self.collect();
            let received = match stream.receive(&self.scratch, taken.max(self.spent) < RECEIVE_BUDGET) {
                Ok(0) => return Err(ConnectionError::Closed),
                Ok(received) => received,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) if is_fault(&error) && self.fault() => continue,
                Err(error) => return Err(error.into()),
            };
            counters.tcp_received_bytes += received as u64;
            self.take(received, sender, receiver)?;
            taken += received;
            let is_spent = taken.max(self.spent) >= RECEIVE_BUDGET;
            // A lone message without payload is mostly the only thing there; asking again would only be told so.
            let lone = received == HEAD && self.messages.is_empty() && self.frame.is_none();
            if (received < wanted || is_spent || lone) && !stream.has_received() {
                return Ok(()); // Drained, or others' turn; the loop calls again while there is more.
            }
        }
    }

    /// The kernel could not write to the place of what comes next. To the end of the message, what can be written is received page
    /// by page, and the rest goes nowhere. False if no message's data is to come next.
    fn fault(&mut self) -> bool {
        let (Some(first), Some(message)) = (self.segments.front().copied(), self.messages.front_mut()) else {
            return false;
        };
        if !std::mem::replace(&mut self.narrow, true) {
            return true;
        }
        message.faulted = true;
        let page = first_page(&first, 0);
        self.segments[0] = first.part(page.length(), usize::MAX);
        if self.segments[0].length() == 0 {
            self.segments.pop_front();
        }
        let nowhere = self.nowhere(page.length());
        self.segments.push_front(nowhere);
        true
    }

    /// The destinations of the next system call.
    fn collect(&mut self) -> usize {
        self.scratch.clear();
        if self.narrow
            && let Some(first) = self.segments.front()
        {
            self.scratch.push(first_page(first, 0));
        } else if self.messages.is_empty() && self.frame.is_some() {
            let rest = &mut self.table[self.table_filled..self.table_length];
            // SAFETY: the table is not moved or read while the system call fills it.
            self.scratch.push(unsafe { Segment::new(rest.as_mut_ptr(), rest.len()) });
        } else {
            self.scratch.extend(self.segments.iter().take(MAX_SEGMENTS - 1));
            if self.placed == self.messages.len() && self.scratch.len() == self.segments.len() {
                let rest = &mut self.head[self.head_filled..];
                // SAFETY: the head is not moved or read while the system call fills it.
                self.scratch.push(unsafe { Segment::new(rest.as_mut_ptr(), rest.len()) });
            }
        }
        self.scratch.iter().map(Segment::length).sum()
    }

    /// Accounts for received bytes in the order in which `collect` asked for them.
    fn take(
        &mut self,
        mut received: usize,
        sender: &Sender,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        if self.messages.is_empty() && self.frame.is_some() {
            self.table_filled += received;
            if self.table_filled == self.table_length {
                self.begin_messages(sender, receiver)?;
            }
            return Ok(());
        }
        while received > 0 {
            let Some(first) = self.segments.front_mut() else { break };
            let arrived = received.min(first.length());
            *first = first.part(arrived, usize::MAX);
            if first.length() == 0 {
                self.segments.pop_front();
            }
            received -= arrived;
            self.arrived(arrived, sender, receiver)?;
        }
        self.head_filled += received;
        if self.head_filled == HEAD {
            self.begin_frame(sender, receiver)?;
        }
        Ok(())
    }

    /// Counts payload bytes of the first messages, and delivers those that are complete.
    fn arrived(
        &mut self,
        mut bytes: usize,
        sender: &Sender,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        while bytes > 0 {
            let part = bytes.min(self.first_left);
            bytes -= part;
            self.first_left -= part;
            self.deliver_complete(sender, receiver)?;
        }
        Ok(())
    }

    fn deliver_complete(
        &mut self,
        sender: &Sender,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        while self.placed > 0 && self.first_left == 0 {
            let Some(message) = self.messages.front() else { break };
            // Not before: requests may have been queued since its frame began to arrive.
            if sender.is_unsent(&message.header) {
                return Err(ConnectionError::Broken(ANSWERED));
            }
            let payload = message.header.payload as usize;
            self.spent += MESSAGE_COST.max(HEADER_SIZE + payload) + receiver.weight(&message.header);
            if message.faulted {
                if !receiver.deliver_faulted(&message.header) {
                    return Err(io::Error::from_raw_os_error(libc::EFAULT).into());
                }
            } else {
                receiver.deliver(&message.header, &message.body);
            }
            self.narrow = false;
            self.messages.pop_front();
            self.placed -= 1;
            self.first_left = self.messages.front().map_or(0, |m| m.header.payload as usize);
            if self.messages.is_empty() {
                self.frame = None;
            }
        }
        Ok(())
    }

    fn begin_frame(&mut self, sender: &Sender, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        self.head_filled = 0;
        let (start, first) = self.head.split_at(FRAME_HEADER_SIZE);
        let frame = FrameHeader::decode(start.first_chunk().unwrap_or(&[0; FRAME_HEADER_SIZE]))?;
        self.table[..HEADER_SIZE].copy_from_slice(first);
        self.table_filled = HEADER_SIZE;
        self.table_length = HEADER_SIZE * usize::from(frame.count);
        self.frame = Some(frame);
        if frame.count == 1 { self.begin_messages(sender, receiver) } else { Ok(()) }
    }

    fn begin_messages(
        &mut self,
        sender: &Sender,
        receiver: &mut dyn Receiver,
    ) -> Result<(), ConnectionError> {
        let Some(frame) = self.frame else { return Ok(()) };
        let table = &self.table[..self.table_length];
        let checksum = frame_crc(table);
        if checksum != frame.checksum {
            return Err(WireError::Checksum { expected: checksum, found: frame.checksum }.into());
        }
        let longest = receiver.longest_body();
        let mut answered = [0u64; MAX_SLOTS as usize / 64];
        let mut total = 0u64;
        for bytes in table.as_chunks::<HEADER_SIZE>().0 {
            let header = MessageHeader::decode(bytes)?;
            if !header.kind.carries_data() && header.payload > longest {
                let (what, found) = ("body", header.payload.into());
                return Err(
                    WireError::Limit { what, found, expected: "no more than is taken from it now" }.into()
                );
            }
            if header.kind == Kind::IoReply {
                // All payloads of a frame get their places before the first message is delivered. Data behind an answer
                // to the same request would go to memory that is the owner's again.
                let (word, bit) = (usize::from(header.slot.0) / 64, 1 << (header.slot.0 % 64));
                if answered[word] & bit != 0 && header.payload > 0 {
                    let reason = "one answer to a request, before any data of the next";
                    return Err(WireError::Unexpected { kind: header.kind, reason }.into());
                }
                answered[word] |= bit;
            }
            total += u64::from(header.payload);
            self.messages.push_back(Incoming { header, body: Vec::new(), faulted: false });
        }
        if total != u64::from(frame.payload) {
            return Err(WireError::Limit {
                what: "sum of payloads",
                found: total,
                expected: "the payload of the frame",
            }
            .into());
        }
        self.placed = 0;
        self.first_left = self.messages.front().map_or(0, |m| m.header.payload as usize);
        self.place(sender, receiver)
    }

    /// Finds places for payloads, as far as there is memory, and delivers leading messages without payload.
    fn place(&mut self, sender: &Sender, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        while let Some(message) = self.messages.get_mut(self.placed) {
            let length = message.header.payload as usize;
            if length == 0 {
                // Nothing to place.
            } else if message.header.kind.carries_data() {
                self.scratch.clear();
                match receiver.place(&message.header, &mut self.scratch) {
                    Place::Wait => return Ok(()),
                    Place::Data if self.scratch.iter().map(Segment::length).sum::<usize>() == length => {
                        self.segments.extend(self.scratch.drain(..));
                    }
                    Place::Data | Place::Discard => self.discard(length),
                }
            } else if self.placed > 0 {
                return Ok(()); // One body at a time: a table of them does not set aside memory for all.
            } else {
                message.body = vec![0; length];
                // SAFETY: the body lives in `messages` until it is delivered; moving a `Vec` does not move its bytes.
                self.segments.push_back(unsafe { Segment::new(message.body.as_mut_ptr(), length) });
            }
            self.placed += 1;
            self.deliver_complete(sender, receiver)?;
        }
        Ok(())
    }

    fn discard(&mut self, mut length: usize) {
        while length > 0 {
            let part = length.min(DISCARD);
            let nowhere = self.nowhere(part);
            self.segments.push_back(nowhere);
            length -= part;
        }
    }

    /// A segment of at most [`DISCARD`] bytes for what is not wanted.
    fn nowhere(&mut self, length: usize) -> Segment {
        if self.discard.is_empty() {
            self.discard = vec![0; DISCARD].into_boxed_slice();
        }
        // SAFETY: the buffer lives as long as the connection and is never read.
        unsafe { Segment::new(self.discard.as_mut_ptr(), length.min(DISCARD)) }
    }
}

#[cfg(test)]
pub(crate) use tests::faults::torn_pages;
#[cfg(test)]
mod tests;
