//! Memory of a node: what takes some, who waits for it, and that everybody has it in turn.

use std::io::Write;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use rmr_common::wire::{Kind, MessageHeader, Status};

use crate::support::*;

#[test]
fn a_write_without_data_takes_no_buffer_of_another_write() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let other = node.attach(1).unwrap();
    let mut raw = Raw::attached(&node, 0);
    let (first, empty, third) =
        (raw.write_header(0, 0, 4096), raw.write_header(1, 0, 0), raw.write_header(2, MIB.into(), MIB));
    let data = pattern(3, MIB);
    raw.stream.write_all(&Raw::frame(&[first, empty, third])).unwrap();
    raw.stream.write_all(&[9; 4096]).unwrap();
    raw.stream.write_all(&data[..1 << 19]).unwrap();
    let mut statuses = vec![raw.receive().0.status, raw.receive().0.status];
    // Whoever gets memory now must not get what the third write still arrives in.
    for i in 0..7u64 {
        other.blocking().write_at(&pattern(10 + i, MIB), i << 20).unwrap();
    }
    raw.stream.write_all(&data[1 << 19..]).unwrap();
    statuses.push(raw.receive().0.status);
    assert_eq!(statuses.iter().filter(|s| **s == Status::Ok).count(), 2, "{statuses:?}");
    let read = raw.read_header(3, MIB.into(), MIB);
    raw.send(&[(read, &[])]);
    assert!(raw.receive().1 == data, "the third write arrived as a whole");
}

#[test]
fn a_write_that_is_cut_in_its_payload_changes_nothing_and_gives_its_memory_back() {
    let node = Node::start(1, &["--buffer-memory", "8M"]);
    for _ in 0..4 {
        let mut raw = Raw::attached(&node, 0);
        let headers: Vec<_> = (0..8).map(|i| raw.write_header(i, u64::from(i) << 20, MIB)).collect();
        raw.stream.write_all(&Raw::frame(&headers)).unwrap();
        raw.stream.write_all(&vec![0xee; 300_000]).unwrap();
        raw.stream.shutdown(std::net::Shutdown::Both).unwrap();
    }
    let pool = node.attach(0).unwrap();
    let mut back = vec![1; 8 << 20];
    pool.blocking().read_at(&mut back, 0).unwrap();
    assert!(back.iter().all(|b| *b == 0), "a part of a write is on the disk");
}

#[test]
fn a_greeted_peer_that_is_not_attached_takes_no_buffers() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let mut raws = Vec::new();
    for _ in 0..3 {
        let mut raw = Raw::greeted(&node, 0);
        let headers: Vec<_> = (0..8).map(|i| raw.write_header(i, u64::from(i) << 20, MIB)).collect();
        raw.stream.write_all(&Raw::frame(&headers)).unwrap();
        raws.push(raw);
    }
    std::thread::sleep(Duration::from_millis(100));
    let pool = node.attach(1).unwrap();
    let start = Instant::now();
    pool.blocking().write_at(&pattern(1, MIB), 0).unwrap();
    assert!(start.elapsed() < QUICK, "it waited for a peer that has no right to anything");
}

#[test]
fn a_connection_that_waits_for_memory_costs_no_processor_time() {
    let node = Node::start(3, &["--buffer-memory", "8M", "--leg-timeout-ms", "20000"]);
    let hogs = [hog(&node, 0), hog(&node, 1)];
    let mut waiting = Raw::attached(&node, 2);
    let data = pattern(5, MIB);
    let write = waiting.write_header(0, 0, MIB);
    waiting.stream.write_all(&Raw::frame(&[write])).unwrap();
    waiting.stream.write_all(&data[..1 << 18]).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    node.comes_to_rest(5, Duration::from_secs(1), "while it waits for memory");
    waiting.stream.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
    assert!(waiting.try_receive().is_err(), "it did not have to wait");
    waiting.stream.set_read_timeout(Some(PATIENCE)).unwrap();
    // It goes on when there is memory.
    drop(hogs);
    waiting.stream.write_all(&data[1 << 18..]).unwrap();
    let (reply, _) = waiting.receive();
    assert_eq!((reply.kind, reply.status), (Kind::IoReply, Status::Ok));
}

/// A client that announces data for all the buffers and sends none of it.
fn hog(node: &Node, pool: usize) -> Raw {
    let mut hog = Raw::attached(node, pool);
    let headers: Vec<_> = (0..9).map(|i| hog.write_header(i, u64::from(i) << 20, MIB)).collect();
    hog.stream.write_all(&Raw::frame(&headers)).expect("it takes it");
    std::thread::sleep(Duration::from_millis(100));
    hog
}

#[test]
fn a_connection_that_waits_for_memory_and_hangs_up_is_gone_at_once() {
    let node = Node::start(3, &["--buffer-memory", "8M", "--leg-timeout-ms", "20000"]);
    let _hogs = [hog(&node, 0), hog(&node, 1)];
    let mut waiting = Raw::attached(&node, 2);
    let write = waiting.write_header(0, 0, MIB);
    waiting.stream.write_all(&Raw::frame(&[write])).unwrap();
    std::thread::sleep(Duration::from_millis(100));
    drop(waiting);
    std::thread::sleep(Duration::from_millis(100));
    node.comes_to_rest(5, Duration::from_millis(500), "for a connection that is gone");
    node.attach(2).expect("the client that hung up does not hold the pool");
}

#[test]
fn everybody_gets_memory_in_turn_when_there_is_little() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let pools = [node.attach(0).unwrap(), node.attach(1).unwrap()];
    let data = Arc::new(pattern(1, MIB));
    let (sender, receiver) = mpsc::channel();
    let start = Instant::now();
    for round in 0..2u64 {
        for i in 0..64u64 {
            for (p, pool) in pools.iter().enumerate() {
                let (sender, data) = (sender.clone(), Arc::clone(&data));
                if round == 0 {
                    pool.write((i % 60) << 20, vec![data.to_vec()], move |r| {
                        let _ = sender.send((p, r.map(drop)));
                    });
                } else {
                    pool.read((i % 60) << 20, vec![vec![0; MIB as usize]], move |r| {
                        let _ = sender.send((p, r.map(|b| assert!(b[0] == *data))));
                    });
                }
            }
        }
    }
    for n in 0..256 {
        let (p, result) =
            receiver.recv_timeout(PATIENCE).unwrap_or_else(|_| panic!("stalled after {n} of 256"));
        result.unwrap_or_else(|e| panic!("pool {p}: {e}"));
    }
    assert!(start.elapsed() < PATIENCE);
    assert!(!node.log().contains("lost"), "{}", node.log());
}

#[test]
fn readers_do_not_starve_a_writer() {
    let node = Node::start(3, &["--buffer-memory", "8M"]);
    let stop = Arc::new(AtomicBool::new(false));
    let reads = Arc::new(AtomicU64::new(0));
    let mut greedy: Vec<Raw> = vec![Raw::attached(&node, 0), Raw::attached(&node, 1)];
    let writer = node.attach(2).unwrap();
    let mut longest = Duration::ZERO;
    std::thread::scope(|scope| {
        for raw in &mut greedy {
            let (stop, reads) = (Arc::clone(&stop), Arc::clone(&reads));
            scope.spawn(move || {
                // More than all the memory is asked for at any time.
                let header =
                    |raw: &Raw, i: u64| raw.read_header(u16::try_from(i % 16).unwrap(), (i % 64) << 20, MIB);
                for i in 0..16 {
                    let read = header(raw, i);
                    raw.send(&[(read, &[])]);
                }
                let mut next = 16;
                while !stop.load(Ordering::Relaxed) {
                    raw.receive();
                    reads.fetch_add(1, Ordering::Relaxed);
                    let read = header(raw, next);
                    raw.send(&[(read, &[])]);
                    next += 1;
                }
            });
        }
        let end = Instant::now() + Duration::from_secs(2);
        while Instant::now() < end {
            let start = Instant::now();
            let written = writer.blocking().write_at(&pattern(1, MIB), 0);
            longest = longest.max(start.elapsed());
            assert_eq!(written, Ok(()));
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert!(reads.load(Ordering::Relaxed) > 32);
    assert!(longest < QUICK, "a write waited for {longest:?}");
}

#[test]
fn a_client_that_does_not_take_its_answers_leaves_memory_for_others() {
    let node = Node::start(2, &["--buffer-memory", "8M"]);
    let mut slow = Raw::attached(&node, 0);
    let pool = node.attach(1).unwrap();
    for i in 0..32 {
        let read = slow.read_header(i, u64::from(i) << 20, MIB);
        slow.send(&[(read, &[])]);
    }
    std::thread::sleep(Duration::from_millis(200));
    let start = Instant::now();
    for i in 0..20 {
        pool.blocking().write_at(&pattern(i, MIB), i << 20).unwrap();
    }
    assert!(start.elapsed() < QUICK, "others waited for {:?}", start.elapsed());
    node.comes_to_rest(5, Duration::from_millis(500), "for a client that takes nothing");
    // When it reads at last, every answer is there.
    for i in 0..32 {
        let (reply, data) = slow.receive();
        assert_eq!(
            (reply.kind, reply.status, data.len()),
            (Kind::IoReply, Status::Ok, MIB as usize),
            "answer {i}"
        );
    }
}

#[test]
fn a_client_that_asks_and_never_listens_cannot_fill_the_memory() {
    let mut node = Node::start(1, &["--leg-timeout-ms", "60000"]);
    let before = node.resident_kib();
    for flood in [Kind::Ping, Kind::Read] {
        let mut raw = Raw::attached(&node, 0);
        let header =
            if flood == Kind::Read { raw.read_header(0, 0, 512) } else { raw.header(Kind::Ping, 0, 0) };
        let frame = Raw::frame(&[header; 64]);
        raw.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        // 200 MiB of questions, of which the node takes a few.
        for _ in 0..40_000 {
            if raw.stream.write_all(&frame).is_err() {
                break;
            }
        }
        let grown = node.resident_kib().saturating_sub(before) / 1024;
        assert!(grown < 96, "{flood:?}: {grown} MiB more than before");
        node.assert_running();
    }
}

#[test]
fn bodies_before_the_hello_take_no_memory() {
    let node = Node::start(1, &[]);
    let before = node.resident_kib();
    let mut raws = Vec::new();
    for _ in 0..8 {
        let mut raw = Raw::connect(&node, 0);
        let header = MessageHeader { payload: MIB, ..MessageHeader::new(Kind::Hello, raw.pool) };
        raw.stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        // Refused at any point of it.
        let _ = raw.stream.write_all(&Raw::frame(&[header; 64]));
        let _ = raw.stream.write_all(&vec![1; 16 << 20]);
        raws.push(raw);
    }
    let grown = node.resident_kib().saturating_sub(before) / 1024;
    assert!(grown < 16, "{grown} MiB for peers that never said hello");
    assert!(raws.iter_mut().all(|raw| raw.is_closed_within(PATIENCE)));
}
