//! Clients that do what they should: they keep their pool, give it up, and are told things.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use rmr_common::client::{IoError, OverReason, PoolSelector};
use rmr_common::driver::{Pool, PoolError};
use rmr_common::pool::{ClientId, Command as PoolCommand, CommandReply, Refusal, Sequence};
use rmr_common::wire::{Hello, Kind, MAX_SLOTS, MessageHeader, Role, Status};

use crate::support::*;

#[test]
fn a_second_client_is_refused_by_name_and_the_first_works_on() {
    let node = Node::start(1, &[]);
    let pool = node.attach(0).unwrap();
    match node.attach(0) {
        Err(PoolError::Over(OverReason::Held(holder))) => assert_eq!(holder, "a client"),
        other => panic!("{:?}", other.map(|_| ())),
    }
    pool.blocking().write_at(&[7; 4096], 0).unwrap();
}

#[test]
fn a_client_that_is_closed_for_nonsense_does_not_hold_the_pool() {
    let node = Node::start(1, &[]);
    let mut raw = Raw::attached(&node, 0);
    let pong = raw.header(Kind::Pong, 0, 0);
    raw.send(&[(pong, &[])]);
    assert!(raw.is_closed_within(PATIENCE));
    node.attach(0).expect("nobody holds it any more");
}

#[test]
fn clients_reach_pools_on_other_shards_and_leave_them_at_any_moment() {
    let mut node = Node::start(4, &["--shards", "3"]);
    let pools: Vec<Pool> = (0..4).map(|i| node.attach(i).unwrap()).collect();
    let data = pattern(4, 65536);
    for (i, pool) in pools.iter().enumerate() {
        pool.blocking().write_at(&data, (i as u64) << 20).unwrap();
        let mut back = vec![0; 65536];
        pool.blocking().read_at(&mut back, (i as u64) << 20).unwrap();
        assert!(back == data);
    }
    // Handovers of connections that are closed while they change hands, and that reuse one another's descriptors.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                for i in 0..300 {
                    let mut raw = Raw::connect(&node, i % 4);
                    let hello = Hello {
                        versions: if i % 2 == 0 {
                            (9, 9)
                        } else {
                            (rmr_common::wire::PROTOCOL_VERSION, rmr_common::wire::PROTOCOL_VERSION)
                        },
                        capabilities: 0,
                        role: Role::Client,
                        client: ClientId::random(),
                        pool_name: String::new(),
                        description: "raw".into(),
                        nonce: None,
                    };
                    let body = hello.encode();
                    let payload = u32::try_from(body.len()).unwrap();
                    let header = MessageHeader { payload, ..MessageHeader::new(Kind::Hello, raw.pool) };
                    raw.send(&[(header, &body)]);
                    if i % 3 == 0 {
                        let (reply, _) = raw.receive();
                        assert_eq!(reply.kind, Kind::HelloReply);
                    }
                }
            });
        }
    });
    node.assert_running();
    for pool in &pools {
        pool.blocking().write_at(&data, 0).unwrap();
    }
}

#[test]
fn a_node_says_that_it_serves_when_all_its_pools_can_be_reached() {
    let node = Node::start(6, &["--shards", "3"]);
    let log = node.log();
    let before = log.split("serving").next().unwrap();
    assert_eq!(before.matches("store is open").count(), 6, "{log}");
}

#[test]
fn an_idle_client_is_kept_however_short_the_leg_timeout_is() {
    let node = Node::start(1, &["--leg-timeout-ms", "100"]);
    let pool = node.attach(0).unwrap();
    std::thread::sleep(Duration::from_millis(2500));
    pool.blocking().write_at(&[1; 4096], 0).unwrap();
    assert!(!node.log().contains("client lost"), "{}", node.log());
}

#[test]
fn every_request_completes_when_the_client_is_displaced() {
    let node = Node::start(1, &[]);
    for _ in 0..5 {
        let mut config = Node::config("the old one");
        config.takeover = true;
        let seeds = [node.data_address()];
        let selector = PoolSelector::Id(node.pools[0].id);
        let pool = Pool::connect(config, selector, &seeds, PATIENCE)
            .unwrap_or_else(|e| panic!("{e}: {}", node.log()));
        let mut submitted = 0;
        let (completed, fenced) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let displacer = std::thread::scope(|scope| {
            let displacer = scope.spawn(|| Raw::attached(&node, 0));
            let (mut left, end) = (2000, Instant::now() + PATIENCE);
            // Some come before the client knows, some while its thread ends, some after.
            while left > 0 && Instant::now() < end {
                left -= u64::from(fenced.load(Ordering::Relaxed));
                if !fenced.load(Ordering::Relaxed) && submitted > completed.load(Ordering::Relaxed) + 500 {
                    // The others need the processor, if there is but one.
                    std::thread::sleep(Duration::from_micros(50));
                    continue;
                }
                let (completed, fenced) = (Arc::clone(&completed), Arc::clone(&fenced));
                pool.write(0, vec![vec![1; 512]], move |result| {
                    fenced.fetch_or(result == Err(IoError::Fenced), Ordering::Relaxed);
                    completed.fetch_add(1, Ordering::Relaxed);
                });
                submitted += 1;
            }
            displacer.join().expect("it attaches")
        });
        assert!(fenced.load(Ordering::Relaxed));
        wait_for("every completion", || completed.load(Ordering::Relaxed) == submitted);
        drop(displacer);
    }
}

#[test]
fn a_client_that_takes_nothing_at_all_is_dropped() {
    let node = Node::start(1, &["--leg-timeout-ms", "500"]);
    let mut deaf = Raw::attached(&node, 0);
    for i in 0..32 {
        let read = deaf.read_header(i, u64::from(i) << 20, MIB);
        deaf.send(&[(read, &[])]);
    }
    wait_for("its connection is closed", || node.log().contains("client lost"));
    node.attach(0).expect("nobody holds the pool");
}

#[test]
fn an_operators_command_from_another_node_reaches_the_client_and_its_answer_comes_back() {
    let node = Node::start(1, &[]);
    let command = PoolCommand::Grow { size: 1 << 30 };
    let body = serde_json::to_vec(&command).expect("JSON");
    let length = u32::try_from(body.len()).expect("short");
    let mut other = Raw::connect(&node, 0);
    assert_eq!(other.hello_as(other.pool, Role::Peer, None).0.status, Status::Ok);
    let mut ask = |sequence: u64| {
        let header = MessageHeader { sequence: Sequence(sequence), ..other.header(Kind::Command, 0, length) };
        other.send(&[(header, &body)]);
        let (header, body) = other.receive();
        assert_eq!((header.kind, header.sequence), (Kind::CommandReply, Sequence(sequence)));
        serde_json::from_slice::<CommandReply>(&body).expect("a reply")
    };
    let reason = |reply| match reply {
        CommandReply::Refused { reason, .. } => reason,
        CommandReply::Done { .. } | CommandReply::Verify { .. } => panic!("it cannot be done"),
    };
    assert_eq!(reason(ask(7)), Refusal::NoCoordinator);

    let mut holder = Raw::attached(&node, 0);
    let answers = std::thread::spawn(move || {
        let (given, body) = holder.receive();
        assert_eq!(given.kind, Kind::Command);
        assert_eq!(serde_json::from_slice::<PoolCommand>(&body).expect("a command"), command);
        let reply = CommandReply::refused(Refusal::NoRoom, "not today");
        let reply = serde_json::to_vec(&reply).expect("JSON");
        let mut header = given.reply(Kind::CommandReply, Status::Ok);
        header.payload = u32::try_from(reply.len()).expect("short");
        holder.send(&[(header, &reply)]);
        // The next one is not answered: the client goes away instead.
        assert_eq!(holder.receive().0.kind, Kind::Command);
    });
    assert_eq!(ask(8), CommandReply::refused(Refusal::NoRoom, "not today"));
    assert_eq!(reason(ask(9)), Refusal::CoordinatorLost);
    answers.join().expect("the client");
    assert_eq!(reason(ask(10)), Refusal::NoCoordinator);
}

#[test]
fn a_connection_may_make_any_number_of_requests_one_after_another() {
    let node = Node::start(1, &[]);
    let mut raw = Raw::attached(&node, 0);
    // More than may be outstanding at a time.
    for i in 0..2 * MAX_SLOTS + 100 {
        let read = raw.read_header(i % MAX_SLOTS, 0, 512);
        raw.send(&[(read, &[])]);
        assert_eq!(raw.receive().0.status, Status::Ok, "request {i}");
    }
}
