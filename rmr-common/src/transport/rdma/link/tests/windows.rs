//! Reads by memory windows: one key for one piece of memory and one request, on a card that does what a real one does.

use super::*;

/// A read that the node has seen and not answered.
fn asked(places: &[(usize, usize)]) -> (Pair, MessageHeader) {
    let mut pair = Pair::new(ReadMode::Window);
    let segments: Vec<_> = places.iter().map(|(at, length)| pair.guest.segment(*at, *length)).collect();
    let request = pair.read(2, &segments);
    pair.run();
    (pair, request)
}

fn keys_of(pair: &Pair) -> Vec<(u32, usize, usize)> {
    let guest = pair.guest.segment(0, GUEST).base() as usize;
    let wire = pair.wire.borrow();
    wire[0].exposed.iter().map(|(key, s)| (*key, s.base() as usize - guest, s.length())).collect()
}

fn operations(work: &[WorkRequest]) -> Vec<&'static str> {
    work.iter()
        .map(|w| match w.operation {
            Operation::Send => "send",
            Operation::Write { .. } => "write",
            Operation::WriteWithImmediate { .. } => "write with immediate",
            Operation::Bind { .. } => "bind",
            Operation::Invalidate { .. } => "invalidate",
        })
        .collect()
}

#[test]
fn a_read_by_window_tells_a_key_of_its_range_alone_which_is_invalid_before_its_answer_is_delivered() {
    let (mut pair, request) = asked(&[(8192, 4096)]);
    let exposed = keys_of(&pair);
    assert_eq!(exposed.len(), 1);
    assert_eq!((exposed[0].1, exposed[0].2), (8192, 4096), "exactly the guest's range");
    assert_ne!(exposed[0].0, GUEST_KEY);
    let data = fill(&pair.buffers, 0, 4096, 4);
    // The card takes its time with what is posted from here.
    pair.wire.borrow_mut()[0].delays = true;
    pair.answer(&request, 77);
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 8192, 4096), data);
    assert!(
        pair.at_client.delivered.is_empty(),
        "nobody hears of it while the card has not said that the key is gone"
    );
    pair.let_late_work_complete(0);
    pair.run();
    assert_eq!(pair.at_client.delivered.len(), 1);
    assert!(keys_of(&pair).is_empty());
    assert_eq!(operations(&pair.posted(0)), ["bind", "send", "invalidate"]);
    let counters = pair.client.counters();
    assert_eq!((counters.windows_bound, counters.windows_invalidated), (1, 1));
    assert_eq!(counters.data_copied_bytes, 0);
    assert!(pair.client.reads.is_empty() && pair.client.pool.in_use() == 0);
}

#[test]
fn each_piece_of_a_read_has_a_window_and_pieces_in_a_row_have_one() {
    let (mut pair, request) = asked(&[(0, 512), (512, 512), (4096, 1024), (8192, 512)]);
    let mut ranges: Vec<_> = keys_of(&pair).into_iter().map(|(_, at, length)| (at, length)).collect();
    ranges.sort_unstable();
    assert_eq!(ranges, [(0, 1024), (4096, 1024), (8192, 512)]);
    let data = fill(&pair.buffers, 0, 2560, 5);
    pair.answer(&request, 1);
    pair.run();
    assert_eq!(pair.at_client.delivered.len(), 1);
    let found =
        [bytes_of(&pair.guest, 0, 1024), bytes_of(&pair.guest, 4096, 1024), bytes_of(&pair.guest, 8192, 512)]
            .concat();
    assert_eq!(found, data);
    assert!(keys_of(&pair).is_empty());
}

#[test]
fn windows_are_used_again_by_other_keys_and_more_reads_than_windows_wait() {
    let mut pair = Pair::with(ReadMode::Window, 64, 32, 64);
    pair.wire.borrow_mut()[0].most_windows = 3;
    let mut seen = std::collections::HashSet::new();
    let requests: Vec<_> =
        (0..20).map(|i| pair.read(i, &[pair.guest.segment(usize::from(i) * 8192, 4096)])).collect();
    let mut answered = 0;
    while answered < requests.len() {
        pair.run();
        let there = pair.at_node.delivered.len();
        assert!(
            there > answered && there <= answered + 3,
            "three windows, {there} asked, {answered} answered"
        );
        for (key, _, length) in keys_of(&pair) {
            assert!(seen.insert(key), "a key was used twice");
            assert_eq!(length, 4096);
        }
        for request in &requests[answered..there] {
            pair.answer(request, u32::from(request.slot.0));
        }
        answered = there;
    }
    pair.run();
    assert_eq!(pair.at_client.delivered.len(), 20);
    assert_eq!((seen.len(), pair.client.pool.in_use()), (20, 0));
    assert_eq!(pair.client.counters().data_copied_bytes, 0);
}

#[test]
fn a_read_of_more_pieces_than_there_are_windows_is_copied_through_one() {
    let mut pair = Pair::with(ReadMode::Window, 64, 32, 64);
    pair.wire.borrow_mut()[0].most_windows = 2;
    let places: Vec<_> = (0..5).map(|i| pair.guest.segment(i * 1024, 512)).collect();
    let request = pair.read(1, &places);
    pair.run();
    assert_eq!(pair.wire.borrow()[0].exposed.len(), 1);
    assert_eq!(pair.wire.borrow()[0].exposed[0].1.length(), 2560, "that much of our own memory");
    let data = fill(&pair.buffers, 0, 2560, 6);
    pair.at_client.place = places;
    pair.answer(&request, 1);
    pair.run();
    for i in 0..5 {
        assert_eq!(bytes_of(&pair.guest, i * 1024, 512), data[i * 512..][..512], "piece {i}");
    }
    assert_eq!(pair.client.counters().data_copied_bytes, 2560);
    assert!(pair.client.staging.iter().all(|(_, map)| map.is_free()));
    assert!(pair.wire.borrow()[0].exposed.is_empty());
}

#[test]
fn a_card_that_has_no_window_at_all_ends_the_connection_in_words() {
    let mut pair = Pair::new(ReadMode::Window);
    pair.wire.borrow_mut()[0].most_windows = 0;
    pair.read(1, &[pair.guest.segment(0, 4096)]);
    let error = pair.client.flush().unwrap_err().to_string();
    assert!(error.contains("making a memory window"), "{error}");
    assert!(pair.at_node.delivered.is_empty());
}

#[test]
fn a_bind_that_fails_ends_the_connection_and_the_node_hears_of_no_key() {
    let mut pair = Pair::new(ReadMode::Window);
    pair.wire.borrow_mut()[0].bindable.clear();
    pair.read(1, &[pair.guest.segment(0, 4096)]);
    pair.client.flush().unwrap();
    let error = pair.client.receive(&mut pair.at_client).unwrap_err();
    assert!(matches!(&error, ConnectionError::Link(text) if text.contains("bind")), "{error}");
    pair.node.receive(&mut pair.at_node).unwrap();
    assert!(pair.at_node.delivered.is_empty());
}

#[test]
fn an_invalidation_that_fails_ends_the_connection_and_the_answer_is_not_delivered() {
    let (mut pair, request) = asked(&[(0, 4096)]);
    pair.wire.borrow_mut()[0].refuses_invalidation = true;
    pair.answer(&request, 1);
    pair.node.flush().unwrap();
    pair.client.receive(&mut pair.at_client).unwrap();
    let error = pair.client.receive(&mut pair.at_client).unwrap_err();
    assert!(matches!(&error, ConnectionError::Link(text) if text.contains("local QP")), "{error}");
    assert!(pair.at_client.delivered.is_empty());
    pair.client.shut_down();
    assert!(pair.client.reads.is_empty() && pair.client.ending.is_empty());
}

#[test]
fn a_key_is_refused_when_its_read_is_over_though_its_memory_is_registered() {
    let (mut pair, request) = asked(&[(4096, 4096)]);
    let before = bytes_of(&pair.guest, 0, 16384);
    // The client asks again by the same name: what the node knows of is not good any more.
    pair.read(2, &[pair.guest.segment(4096, 4096)]);
    pair.client.flush().unwrap();
    fill(&pair.buffers, 0, 4096, 9);
    pair.answer(&request, 1);
    pair.node.flush().unwrap();
    let mut at_node = Owner::default();
    let error = loop {
        if let Err(error) = pair.node.receive(&mut at_node) {
            break error;
        }
    };
    assert!(matches!(&error, ConnectionError::Link(text) if text.contains("remote access")), "{error}");
    assert_eq!(bytes_of(&pair.guest, 0, 16384), before);
    pair.client.receive(&mut pair.at_client).unwrap();
    assert!(pair.at_client.delivered.is_empty());
}

#[test]
fn an_error_answer_makes_the_key_invalid_before_it_is_delivered_and_frees_the_window() {
    let (mut pair, request) = asked(&[(0, 4096)]);
    pair.wire.borrow_mut()[0].delays = true;
    pair.node.queue(&request.reply(Kind::IoReply, Status::IoError), None);
    pair.run();
    assert!(pair.at_client.delivered.is_empty());
    pair.let_late_work_complete(0);
    pair.run();
    assert_eq!(pair.at_client.delivered[0].0.status, Status::IoError);
    assert!(keys_of(&pair).is_empty() && pair.client.pool.in_use() == 0);
}

#[test]
fn a_second_answer_cannot_end_a_read_whose_key_is_still_good() {
    let (mut pair, request) = asked(&[(0, 4096)]);
    pair.wire.borrow_mut()[0].delays = true;
    for _ in 0..2 {
        pair.node.queue(&request.reply(Kind::IoReply, Status::Ok), None);
    }
    pair.node.flush().unwrap();
    let error = pair.client.receive(&mut pair.at_client).unwrap_err().to_string();
    assert!(error.contains("answered twice"), "{error}");
    assert!(pair.at_client.delivered.is_empty());
}

#[test]
fn answers_wait_for_room_in_the_send_queue_and_come_all_the_same() {
    let mut pair = Pair::with(ReadMode::Window, 64, 32, 16);
    let requests: Vec<_> = (0..12)
        .map(|i| {
            let at = |part: usize| pair.guest.segment(usize::from(i) * 16384 + part * 1024, 512);
            let places: Vec<_> = (0..4).map(at).collect();
            pair.read(i, &places)
        })
        .collect();
    // The card fails the test when the send queue has no place.
    let mut answered = 0;
    for _ in 0..50 {
        pair.run();
        let there = pair.at_node.delivered.len();
        for request in &requests[answered..there] {
            pair.answer(request, 1);
        }
        answered = there;
    }
    assert_eq!(pair.at_client.delivered.len(), 12);
    assert!(keys_of(&pair).is_empty());
}

#[test]
fn an_answer_to_what_was_not_sent_yet_ends_the_connection_before_anybody_takes_it_for_one() {
    for mode in [ReadMode::Direct, ReadMode::Window, ReadMode::Bounce] {
        for guesses_write in [false, true] {
            let mut pair = Pair::new(mode);
            // The node lends nothing: the write waits, and the read behind it.
            let segments = [pair.guest.segment(0, 4096)];
            pair.write(0, &segments);
            let read = pair.read(1, &[pair.guest.segment(8192, 4096)]);
            pair.run();
            assert!(pair.at_node.delivered.is_empty());
            let write = header(Kind::Write, 0, 4096, 4096);
            let mut answer = if guesses_write { write } else { read }.reply(Kind::IoReply, Status::Ok);
            answer.payload = if guesses_write { 0 } else { 4096 };
            pair.node.queue(&answer, None);
            pair.node.flush().unwrap();
            let error = pair.client.receive(&mut pair.at_client).unwrap_err().to_string();
            assert!(error.contains("not sent yet"), "{mode:?}: {error}");
            assert!(pair.at_client.delivered.is_empty());
        }
    }
}

#[test]
fn an_answer_to_another_request_of_a_slot_that_waits_to_be_sent_again_is_none_of_that() {
    let mut pair = Pair::new(ReadMode::Direct);
    let first = pair.read(1, &[pair.guest.segment(0, 4096)]);
    pair.run();
    pair.write(0, &[pair.guest.segment(0, 4096)]);
    let again = MessageHeader { sequence: Sequence(9), ..first };
    let memory = pair.guest.segment(0, 4096);
    pair.client.queue_read(&again, &mut |list| list.push(memory));
    pair.answer(&first, 1);
    pair.run();
    assert_eq!(pair.at_client.delivered.len(), 1);
    assert_eq!(pair.client.backlog(), 2);
    // What was sent counts no longer.
    pair.lend(0, 0, 65536);
    pair.run();
    pair.answer(&again, 2);
    pair.run();
    assert_eq!(pair.at_client.delivered.len(), 2);
}
