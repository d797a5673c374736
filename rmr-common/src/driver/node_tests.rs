//! The driver against a node, event by event.

use super::fake_node::{FakeNode, PATIENCE, bytes_of, eventually};
use super::*;
use crate::buffer::segments_of_buffers;
use crate::client::DataDigest;
use crate::pool::ClientId;
use crate::transport::tcp::TcpConnection;
use std::net::{TcpListener, TcpStream};

/// A driver that looks at everything in each turn, as if all were ready.
struct Turns {
    driver: PoolDriver,
    done: Vec<(Token, Result<(), IoError>)>,
}

impl Turns {
    fn attached(node: &FakeNode, configure: impl FnOnce(&mut Config)) -> Self {
        let mut config = Config::new(ClientId::random(), "a test");
        config.reconnect_interval = Duration::from_millis(10);
        configure(&mut config);
        let driver = PoolDriver::with_spec(config, node.spec(), &[node.address()]).unwrap();
        let mut turns = Self { driver, done: Vec::new() };
        turns.until("the attachment", |t| t.driver.is_active());
        turns
    }

    fn turn(&mut self) {
        let wires = self.driver.wires.iter().flatten().map(|wire| wire.descriptor);
        let descriptors: Vec<_> = wires.chain([self.driver.connector.descriptor()]).collect();
        for descriptor in descriptors {
            self.driver.ready(descriptor, EventSet::IN);
        }
        self.driver.upkeep();
        self.driver.watch_changes(&mut Vec::new());
        self.driver.completions(&mut self.done);
    }

    fn until(&mut self, what: &str, mut condition: impl FnMut(&mut Self) -> bool) {
        eventually(what, || {
            self.turn();
            condition(self)
        });
    }

    /// One request from start to end.
    fn request(&mut self, operation: Operation, offset: u64, memory: &mut [Vec<u8>]) -> Result<(), IoError> {
        let mut segments = Vec::new();
        segments_of_buffers(memory, &mut segments);
        let length = segments.iter().map(Segment::length).sum::<usize>() as u64;
        self.driver.submit(Token(7), operation, offset, length, &segments);
        self.until("the completion", |t| !t.done.is_empty());
        assert_eq!(self.done.len(), 1);
        let (token, result) = self.done.remove(0);
        assert_eq!(token, Token(7));
        result
    }
}

fn pattern(seed: u8, length: usize) -> Vec<u8> {
    (0..length).map(|i| (i % 251) as u8 ^ seed).collect()
}

/// Memory of the kernel's, of which the second page cannot be reached.
fn torn(bytes: &[u8; 3 * 4096]) -> Segment {
    crate::transport::tcp::torn_pages(bytes, 1)
}

#[test]
fn what_is_written_is_read_back_in_every_mode_and_only_the_requests_own_memory_is_used() {
    for digest in [DataDigest::Off, DataDigest::Detect, DataDigest::Bounce] {
        let node = FakeNode::start();
        let mut turns = Turns::attached(&node, |c| c.data_digest = digest);
        // One after the other in the same entries of all tables.
        for round in 0..4u8 {
            let bytes = pattern(round, 8192);
            let mut memory = [bytes[..5000].to_vec(), bytes[5000..].to_vec()];
            turns.request(Operation::Write, 4096, &mut memory).unwrap();
            assert!(node.state().data[4096..12288] == bytes, "{digest:?}, {round}");
            assert_eq!(node.state().requests.last().unwrap().digest.is_some(), digest != DataDigest::Off);
            let mut memory = [vec![0; 3000], vec![0; 5192]];
            turns.request(Operation::Read, 4096, &mut memory).unwrap();
            assert!(memory.concat() == bytes, "{digest:?}, {round}");
        }
        assert_eq!(node.state().mismatches, 0, "{digest:?}");
    }
}

#[test]
fn data_that_arrives_with_another_digest_is_no_data() {
    let node = FakeNode::start();
    let mut turns = Turns::attached(&node, |c| {
        c.data_digest = DataDigest::Detect;
        c.suspend_timeout = Duration::from_millis(200);
    });
    node.state().data[..512].copy_from_slice(&pattern(1, 512));
    node.state().digest = Some(0x1234_5678);
    let mut memory = [vec![0; 512]];
    turns.request(Operation::Read, 0, &mut memory).unwrap_err();
    let reads = node.state().requests.iter().filter(|h| h.kind == Kind::Read).count();
    assert_eq!(reads, 2, "once more into a copy, and no other leg is there to be asked");
    // By way of the copy, when its second answer is right.
    {
        let mut state = node.state();
        (state.digest, state.spoils) = (Some(data_digest(&pattern(1, 512))), true);
    }
    turns.request(Operation::Read, 0, &mut memory).unwrap();
    assert!(memory[0] == pattern(1, 512));
}

#[test]
fn a_request_whose_memory_is_gone_fails_and_its_leg_stays() {
    let node = FakeNode::start();
    let mut turns = Turns::attached(&node, |_| {});
    let mut bytes = [0; 3 * 4096];
    bytes.copy_from_slice(&pattern(3, 3 * 4096));
    let segment = torn(&bytes);
    node.state().data.fill(0xee);
    turns.driver.submit(Token(1), Operation::Write, 0, 3 * 4096, &[segment]);
    turns.until("the completion", |t| !t.done.is_empty());
    assert_eq!(turns.done.remove(0), (Token(1), Err(IoError::Memory)));
    let data = node.state().data[..3 * 4096].to_vec();
    assert!(data[..4096] == bytes[..4096] && data[8192..] == bytes[8192..], "what could be read");
    assert!(data[4096..8192] == [0; 4096]);
    let writes: Vec<_> = node.state().requests.iter().map(|h| (h.kind, h.digest.is_some())).collect();
    assert_eq!(writes, [(Kind::Write, false), (Kind::Write, true)], "repeated from a copy");
    turns.driver.submit(Token(2), Operation::Read, 0, 3 * 4096, &[segment]);
    turns.until("the completion", |t| !t.done.is_empty());
    assert_eq!(turns.done.remove(0), (Token(2), Err(IoError::Memory)));
    assert!(bytes_of(&[segment.part(0, 4096)]) == bytes[..4096]);
    let mut memory = [vec![0; 512]];
    turns.request(Operation::Read, 0, &mut memory).unwrap();
    assert!(memory[0] == bytes[..512]);
    assert_eq!(node.state().connections, 1, "the leg was lost");
}

#[test]
fn the_result_of_an_attempt_that_was_given_up_is_not_taken() {
    let node = FakeNode::start();
    let mut turns = Turns::attached(&node, |_| {});
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let connect = || {
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        AnyConnection::Tcp(TcpConnection::new(stream, PATIENCE).unwrap())
    };
    let index = turns.driver.wires.iter().position(Option::is_some).unwrap();
    let (mark, own) = (turns.driver.attempts[index], turns.driver.wires[index].as_ref().unwrap().descriptor);
    for stale in [mark - MAX_LINKS as u64, mark + MAX_LINKS as u64] {
        turns.driver.connected(stale, Ok(connect()));
        turns.driver.connected(stale, Err("refused".into()));
    }
    assert_eq!(turns.driver.wires[index].as_ref().map(|wire| wire.descriptor), Some(own));
    turns.request(Operation::Flush, 0, &mut []).unwrap();
    // Also when the link was closed while an attempt was under way: its mark is another one from then on.
    turns.driver.close(index);
    turns.driver.connected(mark, Ok(connect()));
    assert!(turns.driver.wires[index].is_none());
}

#[test]
fn a_link_that_is_made_anew_owes_nothing_and_what_was_asked_on_it_is_asked_again() {
    let node = FakeNode::start();
    let mut turns = Turns::attached(&node, |_| {});
    node.state().holds = true;
    let mut memory = [pattern(5, 4096)];
    let mut segments = Vec::new();
    segments_of_buffers(&mut memory, &mut segments);
    turns.driver.submit(Token(1), Operation::Write, 0, 4096, &segments);
    turns.until("the request", |_| !node.state().requests.is_empty());
    assert_eq!(turns.driver.owed.iter().map(|owed| owed.answers).sum::<u32>(), 1);
    node.state().cut = true;
    turns.until("another connection", |_| node.state().requests.len() == 2);
    assert_eq!(turns.driver.owed.iter().map(|owed| owed.answers).sum::<u32>(), 1);
    node.state().holds = false;
    turns.until("the completion", |t| !t.done.is_empty());
    assert_eq!(turns.done, [(Token(1), Ok(()))]);
    assert_eq!(turns.driver.owed.iter().map(|owed| owed.answers).sum::<u32>(), 0);
    assert_eq!(turns.driver.bounces.data(Slot(0)), [] as [u8; 0]);
}

#[test]
fn an_answer_that_was_there_in_time_is_not_late_however_late_the_driver_looks() {
    let node = FakeNode::start();
    let mut turns = Turns::attached(&node, |c| c.leg_timeout = Duration::from_millis(300));
    let mut memory = [pattern(5, 4096)];
    let mut segments = Vec::new();
    segments_of_buffers(&mut memory, &mut segments);
    turns.driver.submit(Token(1), Operation::Write, 0, 4096, &segments);
    turns.driver.upkeep();
    // Less than counts as a standstill, more than the leg has.
    std::thread::sleep(Duration::from_millis(400));
    turns.driver.upkeep();
    turns.driver.completions(&mut turns.done);
    assert_eq!(turns.done, [(Token(1), Ok(()))]);
    assert_eq!(node.state().connections, 1);
}
