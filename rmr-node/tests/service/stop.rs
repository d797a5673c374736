//! The end of a node: quick, in good order, and for everybody at once.

use std::io::Write;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use rmr_node::store::Store;

use crate::support::*;

#[test]
fn a_stop_under_load_is_quick_and_in_good_order() {
    let mut node = Node::start(2, &[]);
    let pool = Arc::new(node.attach(0).unwrap());
    let (stop, written) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    // Peers that will not go by themselves: one that says nothing, one that only looks, one that holds a pool.
    let _silent = Raw::connect(&node, 0);
    let _greeted = Raw::greeted(&node, 0);
    let load = {
        let (pool, stop, written) = (Arc::clone(&pool), Arc::clone(&stop), Arc::clone(&written));
        std::thread::spawn(move || {
            let (sender, receiver) = mpsc::sync_channel(8);
            for i in 0u64.. {
                let sender = sender.clone();
                if stop.load(Ordering::Relaxed) {
                    return;
                }
                pool.write((i % 1000) * 8192, vec![pattern(i, 8192)], move |r| {
                    let _ = sender.try_send(r.is_ok());
                });
                if i >= 8 && receiver.recv_timeout(Duration::from_millis(100)) == Ok(true) {
                    written.fetch_add(1, Ordering::Relaxed);
                }
            }
        })
    };
    wait_for("writes", || written.load(Ordering::Relaxed) > 100);
    let took = node.stop();
    stop.store(true, Ordering::Relaxed);
    load.join().unwrap();
    assert!(took < QUICK, "it took {took:?}, and a node that waits in vain takes 20 s:\n{}", node.log());
    let log = node.log();
    assert!(log.contains("all stores are closed in order"), "{log}");
    assert!(!log.contains("not marked clean"), "{log}");
    let report = Store::inspect(&node.log.with_file_name("pool-0.store")).unwrap().to_string();
    assert!(report.contains("closed in order: yes"), "{report}");
    // Requests still wait for the node; the client gives up with the process.
    std::mem::forget(pool);
}

#[test]
fn a_holder_that_ignores_the_goodbye_cannot_write_behind_the_clean_mark() {
    let mut node = Node::start(1, &["--stop-timeout-s", "2", "--log-level", "debug"]);
    let mut raw = Raw::attached(&node, 0);
    let stop = std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut slot = 0;
            loop {
                let write = raw.write_header(slot % 512, 0, 4096);
                let frame = [Raw::frame(&[write]), vec![3; 4096]].concat();
                if raw.stream.write_all(&frame).is_err() || raw.try_receive().is_err() {
                    return;
                }
                slot += 1;
            }
        });
        let stop = node.stop();
        writer.join().unwrap();
        stop
    });
    assert!(stop < QUICK, "{stop:?}");
    // The mark follows the end of the connection, not the end of the process.
    let log = node.log();
    assert!(
        log.contains("connection closed: the node is stopping, and the client did not leave in time"),
        "{log}"
    );
}

#[test]
fn a_node_that_stops_refuses_connections_at_once() {
    let mut node = Node::start(1, &["--stop-timeout-s", "30"]);
    let _holder = Raw::attached(&node, 0);
    node.terminate();
    let refuses = || TcpStream::connect(node.address).is_err();
    wait_for("a refusal: a client would wait for an answer that never comes", refuses);
    // It waits for the holder, so it is not its end that refuses.
    node.assert_running();
}
