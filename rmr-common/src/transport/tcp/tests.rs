//! Messages over a loopback socket: every size, every cut, and bytes that are no messages.

use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use super::*;
use crate::pool::{PoolId, Slot};
use crate::wire::{Kind, Status};

pub(crate) mod faults;

/// Longest wait for what comes in any case, and the time after which a silent peer is dead.
const PATIENCE: Duration = Duration::from_secs(60);

/// Takes messages; data goes to one buffer per message. Waits as often as it is told to.
#[derive(Default)]
struct Sink {
    waits: usize,
    discard: bool,
    longest_body: Option<u32>,
    buffers: Vec<Vec<u8>>,
    messages: Vec<(MessageHeader, Vec<u8>)>,
}

impl Receiver for Sink {
    fn place(&mut self, header: &MessageHeader, segments: &mut Vec<Segment>) -> Place {
        if self.waits > 0 {
            self.waits -= 1;
            return Place::Wait;
        }
        if self.discard {
            return Place::Discard;
        }
        let mut buffer = vec![0; header.payload as usize];
        let half = buffer.len() / 2;
        // SAFETY: the bytes stay where they are when the `Vec` moves into `buffers`.
        let whole = unsafe { Segment::new(buffer.as_mut_ptr(), buffer.len()) };
        segments.push(whole.part(0, half));
        segments.push(whole.part(half, usize::MAX));
        self.buffers.push(buffer);
        Place::Data
    }

    fn longest_body(&self) -> u32 {
        self.longest_body.unwrap_or(1 << 20)
    }

    fn deliver(&mut self, header: &MessageHeader, body: &[u8]) {
        self.messages.push((*header, body.to_vec()));
    }
}

fn pair() -> (TcpConnection, TcpConnection) {
    let (a, b) = raw_pair();
    let new = |s| TcpConnection::new(s, PATIENCE).unwrap();
    (new(a), new(b))
}

fn raw_pair() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (a, listener.accept().unwrap().0)
}

fn write_header(slot: u16, length: u32) -> MessageHeader {
    MessageHeader {
        slot: Slot(slot),
        length,
        payload: length,
        ..MessageHeader::new(Kind::Write, PoolId::from_bytes([7; 16]))
    }
}

/// Runs both ends until `sink` has `count` messages.
fn pump(from: &mut TcpConnection, to: &mut TcpConnection, sink: &mut Sink, count: usize) {
    let deadline = Instant::now() + PATIENCE;
    while sink.messages.len() < count {
        assert!(Instant::now() < deadline, "only {} of {count} messages arrived", sink.messages.len());
        from.flush().unwrap();
        to.receive(sink).unwrap();
    }
}

fn pattern(seed: usize, length: usize) -> Vec<u8> {
    (0..length).map(|i| u8::try_from((i * 31 + seed * 7) % 251).unwrap()).collect()
}

#[test]
fn data_and_bodies_of_every_size_arrive_in_order_where_they_belong() {
    let (mut a, mut b) = pair();
    let sizes: Vec<usize> = (0..200).map(|i| [0, 512, 4096, 1, 70_000, 1 << 20][i % 6]).collect();
    let data: Vec<Vec<u8>> = sizes.iter().enumerate().map(|(i, &s)| pattern(i, s)).collect();
    for (i, bytes) in data.iter().enumerate() {
        let header = write_header(u16::try_from(i).unwrap(), u32::try_from(bytes.len()).unwrap());
        if i % 6 == 3 {
            let hello = MessageHeader { kind: Kind::Hello, length: 0, ..header };
            a.queue(&hello, Some(bytes.clone()));
        } else {
            // SAFETY: `data` outlives both connections' use of it.
            let segment = unsafe { Segment::new(bytes.as_ptr().cast_mut(), bytes.len()) };
            a.queue_data(&header, Some(u32::try_from(i).unwrap()), &mut |s| {
                s.push(segment.part(0, 100));
                s.push(segment.part(100, usize::MAX));
            });
        }
    }
    let mut sink = Sink { waits: 3, ..Sink::default() };
    pump(&mut a, &mut b, &mut sink, data.len());
    let mut buffers = sink.buffers.iter();
    for (i, (header, body)) in sink.messages.iter().enumerate() {
        assert_eq!(usize::from(header.slot.0), i);
        let got =
            if header.kind == Kind::Hello || data[i].is_empty() { body } else { buffers.next().unwrap() };
        assert!(*got == data[i], "message {i} of {} bytes", data[i].len());
    }
    let mut tags = Vec::new();
    a.take_sent(&mut tags);
    let expected: Vec<u32> = (0..200).filter(|i| i % 6 != 3).collect();
    assert_eq!(tags, expected, "every tag comes back once, in order");
    assert!(!a.wants_to_send());
}

#[test]
fn a_flood_of_short_messages_is_taken_in_a_part_at_a_time() {
    /// Counts messages, each of which makes as much work as it says.
    struct Count(usize, usize);
    impl Receiver for Count {
        fn place(&mut self, _: &MessageHeader, _: &mut Vec<Segment>) -> Place {
            Place::Discard
        }
        fn weight(&self, _: &MessageHeader) -> usize {
            self.1
        }
        fn deliver(&mut self, _: &MessageHeader, _: &[u8]) {
            self.0 += 1;
        }
    }
    for (weight, most) in [(0, RECEIVE_BUDGET / MESSAGE_COST), (RECEIVE_BUDGET, 1)] {
        let (mut a, mut b) = pair();
        let ping = MessageHeader::new(Kind::Ping, PoolId::from_bytes([7; 16]));
        let all = 2000;
        (0..all).for_each(|_| a.queue(&ping, None));
        let (mut count, mut calls) = (Count(0, weight), 0);
        while count.0 < all {
            a.flush().unwrap();
            let before = count.0;
            b.receive(&mut count).unwrap();
            // A frame that has begun is taken whole.
            assert!(count.0 - before <= most + MAX_FRAME_MESSAGES, "{} at once", count.0 - before);
            calls += usize::from(count.0 > before);
        }
        assert!(calls >= all / (most + MAX_FRAME_MESSAGES), "{calls} calls");
    }
}

#[test]
fn bodies_that_wait_to_be_sent_are_counted_by_their_bytes() {
    let (mut a, mut b) = pair();
    let hello =
        MessageHeader { payload: 1000, ..MessageHeader::new(Kind::Hello, PoolId::from_bytes([7; 16])) };
    (0..5).for_each(|_| a.queue(&hello, Some(vec![1; 1000])));
    assert_eq!(a.backlog_bytes(), 5000);
    let mut sink = Sink::default();
    pump(&mut a, &mut b, &mut sink, 5);
    assert_eq!(a.backlog_bytes(), 0);
}

#[test]
fn data_that_nobody_waits_for_is_dropped_and_the_next_message_is_whole() {
    let (mut a, mut b) = pair();
    let bytes = pattern(1, 300_000);
    // SAFETY: `bytes` outlives the connections' use of it.
    let segment = unsafe { Segment::new(bytes.as_ptr().cast_mut(), bytes.len()) };
    a.queue_data(&write_header(1, 300_000), None, &mut |s| s.push(segment));
    let mut sink = Sink { discard: true, ..Sink::default() };
    pump(&mut a, &mut b, &mut sink, 1);
    a.queue_data(&write_header(2, 300_000), None, &mut |s| s.push(segment));
    sink.discard = false;
    pump(&mut a, &mut b, &mut sink, 2);
    assert!(sink.buffers[0] == bytes);
}

#[test]
fn frames_cut_at_every_byte_are_put_together_again() {
    let (mut raw, b) = raw_pair();
    raw.set_nodelay(true).unwrap();
    let mut b = TcpConnection::new(b, PATIENCE).unwrap();
    let mut table = Vec::new();
    for slot in 0..3 {
        table.extend_from_slice(&write_header(slot, 5).encode());
    }
    let frame = FrameHeader { count: 3, payload: 15, checksum: frame_crc(&table) };
    let bytes = [frame.encode().as_slice(), &table, b"aaaaabbbbbccccc"].concat();
    let mut sink = Sink::default();
    for byte in bytes {
        raw.write_all(&[byte]).unwrap();
        b.receive(&mut sink).unwrap();
    }
    let deadline = Instant::now() + PATIENCE;
    while sink.messages.len() < 3 && Instant::now() < deadline {
        b.receive(&mut sink).unwrap();
    }
    assert_eq!(sink.buffers, vec![b"aaaaa".to_vec(), b"bbbbb".to_vec(), b"ccccc".to_vec()]);
}

#[test]
fn bytes_that_are_no_frame_close_the_connection_with_a_reason() {
    let good = write_header(0, 4).encode();
    let frame = |checksum, payload| FrameHeader { count: 1, payload, checksum }.encode().to_vec();
    let cases = [
        (b"GET / HTTP/1.1\r\n".repeat(8), "does not speak RMR"),
        ([frame(1, 4), good.to_vec()].concat(), "checksum"),
        ([frame(frame_crc(&good), 5), good.to_vec()].concat(), "sum of payloads"),
        ([frame(frame_crc(&[0; 80]), 0), vec![0; 80]].concat(), "message kind"),
    ];
    for (bytes, reason) in cases {
        let (mut raw, b) = raw_pair();
        let mut b = TcpConnection::new(b, PATIENCE).unwrap();
        raw.write_all(&bytes).unwrap();
        let deadline = Instant::now() + PATIENCE;
        let error = loop {
            assert!(Instant::now() < deadline);
            if let Err(error) = b.receive(&mut Sink::default()) {
                break error;
            }
        };
        assert!(error.to_string().contains(reason), "{error}");
    }
}

#[test]
fn a_closed_peer_is_noticed() {
    let (a, mut b) = pair();
    drop(a);
    let deadline = Instant::now() + PATIENCE;
    loop {
        match b.receive(&mut Sink::default()) {
            Err(ConnectionError::Closed) => break,
            Ok(()) => assert!(Instant::now() < deadline),
            Err(error) => panic!("{error}"),
        }
    }
}

#[test]
fn a_second_answer_with_data_for_one_request_is_refused_before_it_gets_a_place() {
    let data = |slot| MessageHeader { kind: Kind::IoReply, ..write_header(slot, 8) };
    let error = |slot| MessageHeader { kind: Kind::IoReply, ..write_header(slot, 0) };
    for (headers, refused) in [
        (vec![data(1), data(2), error(3)], false),
        (vec![data(1), data(1)], true),
        (vec![error(1), data(1)], true),
        (vec![data(1023), data(0), data(1023)], true),
    ] {
        let (mut raw, b) = raw_pair();
        let mut b = TcpConnection::new(b, PATIENCE).unwrap();
        let table: Vec<u8> = headers.iter().flat_map(MessageHeader::encode).collect();
        let payload = headers.iter().map(|h| h.payload).sum();
        let count = u16::try_from(headers.len()).unwrap();
        let frame = FrameHeader { count, payload, checksum: frame_crc(&table) };
        raw.write_all(&[frame.encode().as_slice(), &table, &vec![7; payload as usize]].concat()).unwrap();
        let (mut sink, deadline) = (Sink::default(), Instant::now() + PATIENCE);
        let outcome = loop {
            assert!(Instant::now() < deadline);
            match b.receive(&mut sink) {
                Ok(()) if sink.messages.len() == headers.len() => break Ok(()),
                Ok(()) => {}
                Err(error) => break Err(error),
            }
        };
        assert_eq!(outcome.is_err(), refused, "{headers:?}");
        assert!(!refused || sink.buffers.is_empty(), "it had a place before it was refused");
    }
}

#[test]
fn a_body_that_is_not_wanted_and_all_but_one_of_many_take_no_memory() {
    let body = MessageHeader { kind: Kind::Hello, length: 0, ..write_header(0, 1 << 20) };
    let table: Vec<u8> = [body; 64].iter().flat_map(MessageHeader::encode).collect();
    let frame = FrameHeader { count: 64, payload: 64 << 20, checksum: frame_crc(&table) };
    let head = [frame.encode().as_slice(), &table].concat();
    for longest_body in [4096, 1 << 20] {
        let (mut raw, b) = raw_pair();
        let mut b = TcpConnection::new(b, PATIENCE).unwrap();
        raw.write_all(&head).unwrap();
        let mut sink = Sink { longest_body: Some(longest_body), ..Sink::default() };
        let deadline = Instant::now() + PATIENCE;
        let refused = loop {
            assert!(Instant::now() < deadline);
            match b.receive(&mut sink) {
                Ok(()) if b.receiver.placed > 0 => break false,
                Ok(()) => {}
                Err(_) => break true,
            }
        };
        assert_eq!(refused, longest_body == 4096);
        let set_aside: usize = b.receiver.messages.iter().map(|m| m.body.len()).sum();
        assert_eq!(set_aside, if refused { 0 } else { 1 << 20 });
    }
}

#[test]
fn a_connection_says_when_it_waits_for_memory_and_how_much_it_has_to_send() {
    let (mut a, mut b) = pair();
    let bytes = pattern(1, 4096);
    // SAFETY: `bytes` outlives the connections' use of it.
    let segment = unsafe { Segment::new(bytes.as_ptr().cast_mut(), bytes.len()) };
    for slot in 0..3 {
        a.queue_data(&write_header(slot, 4096), None, &mut |s| s.push(segment));
    }
    assert_eq!(a.backlog(), 3);
    let mut sink = Sink { waits: usize::MAX, ..Sink::default() };
    let deadline = Instant::now() + PATIENCE;
    while !b.is_starved() {
        assert!(Instant::now() < deadline);
        a.flush().unwrap();
        b.receive(&mut sink).unwrap();
    }
    assert_eq!((a.backlog(), sink.messages.len()), (0, 0));
    sink.waits = 0;
    pump(&mut a, &mut b, &mut sink, 3);
    assert!(!b.is_starved());
}

#[test]
fn an_answer_to_a_write_that_is_not_sent_whole_ends_the_connection_and_one_that_is_does_not() {
    let answer =
        |slot| MessageHeader { payload: 0, ..write_header(slot, 4096).reply(Kind::IoReply, Status::Ok) };
    let (small, large) = (pattern(1, 4096), pattern(2, 48 << 20));
    let queue = |connection: &mut TcpConnection, slot, bytes: &Vec<u8>| {
        let header = write_header(slot, u32::try_from(bytes.len()).unwrap());
        // SAFETY: the bytes outlive both connections' use of them.
        let segment = unsafe { Segment::new(bytes.as_ptr().cast_mut(), bytes.len()) };
        connection.queue_data(&header, None, &mut |list| list.push(segment));
    };
    // In frames of their own, and in one.
    for in_one in [false, true] {
        for (answered, is_sent) in [(0, true), (1, false), (2, false)] {
            let (mut client, mut node) = pair();
            queue(&mut client, 0, &small);
            if !in_one {
                client.flush().unwrap();
            }
            queue(&mut client, 1, &large);
            queue(&mut client, 2, &small);
            client.flush().unwrap();
            assert!(client.wants_to_send(), "more than sockets hold");
            node.queue(&answer(answered), None);
            let (mut sink, deadline) = (Sink::default(), Instant::now() + PATIENCE);
            let result = loop {
                assert!(Instant::now() < deadline, "the answer did not arrive");
                node.flush().unwrap();
                match client.receive(&mut sink) {
                    Ok(()) if sink.messages.is_empty() => {}
                    result => break result,
                }
            };
            assert_eq!(result.is_ok(), is_sent, "{answered}: {result:?}");
            assert_eq!(sink.messages.len(), usize::from(is_sent));
        }
    }
}

#[test]
fn an_answer_that_waits_behind_others_is_none_to_a_request_that_was_queued_since() {
    let (mut socket, other) = raw_pair();
    let mut client = TcpConnection::new(other, PATIENCE).unwrap();
    let body = MessageHeader { kind: Kind::Command, payload: 2, length: 0, ..write_header(0, 2) };
    let guess = MessageHeader { payload: 0, ..write_header(3, 4096).reply(Kind::IoReply, Status::Ok) };
    let table = [body.encode(), guess.encode()].concat();
    let frame = FrameHeader { count: 2, payload: 2, checksum: frame_crc(&table) };
    socket.write_all(&[&frame.encode()[..], &table, &[7]].concat()).unwrap();
    let mut sink = Sink::default();
    for _ in 0..20 {
        client.receive(&mut sink).unwrap();
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(sink.messages.is_empty(), "half of the first body is there");
    let large = pattern(3, 48 << 20);
    // SAFETY: the bytes outlive the connection's use of them.
    let segment = unsafe { Segment::new(large.as_ptr().cast_mut(), large.len()) };
    client.queue_data(&write_header(3, 48 << 20), None, &mut |list| list.push(segment));
    client.flush().unwrap();
    assert!(client.wants_to_send());
    socket.write_all(&[8]).unwrap();
    let deadline = Instant::now() + PATIENCE;
    let error = loop {
        assert!(Instant::now() < deadline, "the rest did not arrive");
        if let Err(error) = client.receive(&mut sink) {
            break error;
        }
    };
    assert!(error.to_string().contains("not sent yet"), "{error}");
    assert!(sink.messages.iter().all(|(header, _)| header.kind == Kind::Command));
}
