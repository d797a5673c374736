//! Calls that the libraries refuse, one by one: each ends the connection in words, and no message is lost before or told twice.

use super::*;

fn refuse(pair: &Pair, side: usize, what: &'static str) {
    pair.wire.borrow_mut()[side].refuses = Some(what);
}

fn says(error: &ConnectionError, what: &str) -> bool {
    matches!(error, ConnectionError::Link(text) if text.starts_with(what))
}

#[test]
fn a_call_that_fails_while_something_is_received_ends_the_connection_in_its_words() {
    for what in ["poll", "arm", "event", "post_receive"] {
        let mut pair = Pair::new(ReadMode::Direct);
        for slot in 0..3 {
            pair.client.queue(&header(Kind::Ping, slot, 0, 0), None);
        }
        pair.client.flush().unwrap();
        refuse(&pair, 1, what);
        let error = pair.node.receive(&mut pair.at_node).unwrap_err();
        assert!(says(&error, what), "{what}: {error}");
        let told = pair.at_node.delivered.len();
        let expected = match what {
            "poll" => 0,
            "post_receive" => 1,
            _ => 3,
        };
        assert_eq!(told, expected, "{what}");
        pair.wire.borrow_mut()[1].refuses = None;
        pair.node.shut_down();
        assert!(matches!(pair.node.receive(&mut pair.at_node), Err(ConnectionError::Closed)));
        assert_eq!(pair.at_node.delivered.len(), told, "nothing is told behind the end");
    }
}

#[test]
fn what_was_received_behind_a_buffer_that_cannot_be_posted_goes_back_to_those_who_share_it() {
    let mut pair = Pair::new(ReadMode::Direct);
    for slot in 0..4 {
        pair.client.queue(&header(Kind::Ping, slot, 0, 0), None);
    }
    pair.client.flush().unwrap();
    refuse(&pair, 1, "post_receive");
    assert!(pair.node.receive(&mut pair.at_node).is_err());
    let mut given_back = pair.wire.borrow()[1].given_back.clone();
    given_back.sort_unstable();
    assert_eq!(given_back, [1, 2, 3]);
}

#[test]
fn memory_that_cannot_be_had_for_what_is_sent_ends_the_connection_in_words() {
    // A packet that fits no place of the ring, and data that has to be copied.
    let mut pair = Pair::new(ReadMode::Direct);
    refuse(&pair, 0, "slab");
    pair.client.queue(&header(Kind::SetView, 0, 1000, 0), Some(vec![1; 1000]));
    assert!(says(&pair.client.flush().unwrap_err(), "slab"));
    let mut pair = Pair::new(ReadMode::Bounce);
    refuse(&pair, 0, "slab");
    let place = pair.guest.segment(0, 4096);
    pair.read(1, &[place]);
    assert!(says(&pair.client.flush().unwrap_err(), "slab"));
    assert!(pair.client.reads.is_empty());
}

#[test]
fn a_connection_without_memory_of_its_own_is_none() {
    let pair = Pair::new(ReadMode::Direct);
    refuse(&pair, 0, "slab");
    let card = Card { wire: Rc::clone(&pair.wire), side: 0 };
    let peer = Introduction { receives: 8, receive_size: 4096 };
    let made = Link::new(card, Keyring::fixed(&[]), Role::Acceptor, peer);
    assert!(made.is_err_and(|error| error.to_string().starts_with("slab")));
}

#[test]
fn a_buffer_that_cannot_be_registered_once_more_is_not_lent_and_may_be_lent_later() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.wire.borrow_mut()[1].has_windows = false;
    refuse(&pair, 1, "expose");
    let memory = pair.buffers.segment(0, 65536);
    assert!(pair.node.grant(3, &memory).is_err_and(|error| error.to_string().starts_with("expose")));
    pair.wire.borrow_mut()[1].refuses = None;
    pair.node.grant(3, &memory).unwrap();
    let data = fill(&pair.guest, 0, 4096, 1);
    let segment = pair.guest.segment(0, 4096);
    pair.write(1, &[segment]);
    pair.run();
    assert_eq!(bytes_of(&pair.buffers, 0, 4096), data);
}

#[test]
fn a_receive_that_fails_ends_the_connection_with_the_cards_words_and_its_buffer_goes_back() {
    let mut pair = Pair::new(ReadMode::Direct);
    let done = Done::Failed { status: "local length error".to_owned(), flushed: false };
    pair.wire.borrow_mut()[1].completions.push_back(Completion { is_receive: true, number: 5, done });
    let error = pair.node.receive(&mut pair.at_node).unwrap_err();
    assert!(says(&error, "local length error"), "{error}");
    assert_eq!(pair.wire.borrow()[1].given_back, [5]);
}

#[test]
fn a_receive_buffer_that_nobody_knows_ends_the_connection() {
    let mut pair = Pair::new(ReadMode::Direct);
    let done = Done::Received { length: 96 };
    pair.wire.borrow_mut()[1].completions.push_back(Completion { is_receive: true, number: 99, done });
    let error = pair.node.receive(&mut pair.at_node).unwrap_err();
    assert!(error.to_string().contains("not known"), "{error}");
}

#[test]
fn last_words_are_waited_for_until_they_have_arrived_or_the_card_gives_up() {
    for fails in [false, true] {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.wire.borrow_mut()[1].delays = true;
        // Longer than a place of the ring, so that its end is told.
        pair.node.queue(&header(Kind::HelloReply, 0, 1000, 0), Some(vec![1; 1000]));
        pair.node.flush().unwrap();
        assert!(pair.node.has_unsent() && pair.node.linger(), "the card is not done");
        if fails {
            pair.wire.borrow_mut()[1].fail(9, "transport retry counter exceeded", false);
        } else {
            pair.let_late_work_complete(1);
        }
        assert!(!pair.node.linger(), "there is nothing to wait for any more");
    }
}
