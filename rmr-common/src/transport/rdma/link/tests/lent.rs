//! What a client can reach of a node's buffers: the windows that it was lent, by a key for each, until it gives them back.

use super::*;

/// What the client's card says to a write of its own making.
fn written(pair: &mut Pair, address: u64, key: u32) -> Result<(), String> {
    let number = pair.client.next_number;
    pair.client.next_number += 1;
    let piece = Piece { address: pair.guest.segment(0, 512).base() as u64, length: 512, key: GUEST_KEY };
    let operation = Operation::Write { address, key };
    let request = WorkRequest { number, operation, first: 0, count: 1, signaled: true, inline: false };
    pair.client.verbs.post(&[request], &[piece]).unwrap();
    let found = pair.wire.borrow_mut()[0].completions.pop_back().unwrap();
    match found.done {
        Done::Failed { status, .. } => Err(status),
        _ => {
            pair.wire.borrow_mut()[0].completed = number;
            pair.client.completed = number;
            Ok(())
        }
    }
}

fn address(pair: &Pair, offset: usize) -> u64 {
    pair.buffers.segment(offset, 1).base() as u64
}

/// Keys by which the node's buffers can be written, with what they reach.
fn keys(pair: &Pair) -> Vec<(u32, usize, usize)> {
    let base = pair.buffers.segment(0, 1).base() as usize;
    let wire = pair.wire.borrow();
    wire[1].exposed.iter().map(|(key, s)| (*key, s.base() as usize - base, s.length())).collect()
}

/// Two windows lent, of which the client gives the second back.
fn given_back(pair: &mut Pair) {
    pair.lend(0, 0, 65536);
    pair.lend(1, 1 << 20, 65536);
    pair.run();
    pair.client.beat();
    pair.client.beat();
}

#[test]
fn a_lent_window_is_reached_by_a_key_of_its_own_and_nothing_else_is() {
    for has_windows in [true, false] {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.wire.borrow_mut()[1].has_windows = has_windows;
        pair.lend(0, 65536, 65536);
        pair.lend(1, 1 << 20, 65536);
        pair.run();
        let found = keys(&pair);
        let reach: Vec<_> = found.iter().map(|(_, at, length)| (*at, *length)).collect();
        assert_eq!(reach, [(65536, 65536), (1 << 20, 65536)]);
        assert!(found[0].0 != found[1].0 && found.iter().all(|(key, ..)| *key != BUFFER_KEY));
        let (first, own) = (found[0].0, address(&pair, 65536));
        assert_eq!(written(&mut pair, own, first), Ok(()));
        let bound = pair.node.counters().windows_bound;
        assert_eq!(bound, if has_windows { 2 } else { 0 });
        let others = address(&pair, 1 << 20);
        assert!(written(&mut pair, others, first).unwrap_err().contains("remote access"));
    }
}

#[test]
fn a_window_is_free_for_others_when_its_key_is_invalid_and_not_before() {
    let mut pair = Pair::new(ReadMode::Direct);
    given_back(&mut pair);
    // The client keeps the first one of the two, which are equally large.
    let (key, at, _) = keys(&pair)[1];
    pair.wire.borrow_mut()[1].delays = true;
    pair.run();
    let mut returned = Vec::new();
    pair.node.take_returned(&mut returned);
    assert!(returned.is_empty(), "the card has not said that the key is invalid");
    pair.let_late_work_complete(1);
    pair.run();
    pair.node.take_returned(&mut returned);
    assert_eq!((returned.len(), keys(&pair).len()), (1, 1));
    assert_eq!(pair.node.pool.in_use(), 1);
    assert_ne!(keys(&pair)[0].0, key);
    let gone = address(&pair, at);
    assert!(written(&mut pair, gone, key).unwrap_err().contains("remote access"));
}

#[test]
fn a_registration_for_a_lent_window_ends_when_it_is_given_back() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.wire.borrow_mut()[1].has_windows = false;
    given_back(&mut pair);
    let (key, at, _) = keys(&pair)[1];
    pair.run();
    let mut returned = Vec::new();
    pair.node.take_returned(&mut returned);
    assert_eq!(returned, [1]);
    let gone = address(&pair, at);
    assert!(written(&mut pair, gone, key).unwrap_err().contains("remote access"));
}

#[test]
fn a_bind_that_fails_ends_the_nodes_connection_before_the_client_is_told_of_the_window() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.wire.borrow_mut()[1].bindable.clear();
    pair.lend(0, 0, 65536);
    pair.node.flush().unwrap();
    let error = pair.node.receive(&mut pair.at_node).unwrap_err();
    assert!(matches!(&error, ConnectionError::Link(text) if text.contains("bind")), "{error}");
    pair.client.receive(&mut pair.at_client).unwrap();
    assert_eq!(pair.client.windows.take(4096, 96), None);
}

#[test]
fn an_invalidation_that_fails_ends_the_nodes_connection_and_the_window_is_not_returned() {
    let mut pair = Pair::new(ReadMode::Direct);
    given_back(&mut pair);
    pair.wire.borrow_mut()[1].refuses_invalidation = true;
    pair.client.flush().unwrap();
    pair.node.receive(&mut pair.at_node).unwrap();
    let error = pair.node.receive(&mut pair.at_node).unwrap_err();
    assert!(matches!(&error, ConnectionError::Link(text) if text.contains("local QP")), "{error}");
    let mut returned = Vec::new();
    pair.node.take_returned(&mut returned);
    assert!(returned.is_empty());
}

#[test]
fn a_node_whose_card_has_no_window_left_says_so_and_lends_nothing() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.wire.borrow_mut()[1].most_windows = 1;
    pair.lend(0, 0, 65536);
    let error = pair.node.grant(1, &pair.buffers.segment(65536, 65536)).unwrap_err().to_string();
    assert!(error.contains("no memory window is left"), "{error}");
    pair.run();
    assert_eq!(keys(&pair).len(), 1);
    let strange = Pages::new(65536).unwrap();
    let error = pair.node.grant(1, &strange.segment(0, 65536)).unwrap_err().to_string();
    assert!(error.contains("not registered"), "{error}");
}
