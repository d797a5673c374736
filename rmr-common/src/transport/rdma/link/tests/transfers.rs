//! Writes, reads and messages on a card that works: how they travel, in what order, and what of it a processor copies.

use super::*;

#[test]
fn a_write_is_one_work_request_from_guest_memory_to_the_slot_and_its_answer_one_small_send() {
    let mut pair = Pair::new(ReadMode::Direct);
    let data = [fill(&pair.guest, 100, 1024, 1), fill(&pair.guest, 9000, 3072, 2)].concat();
    let segments = [pair.guest.segment(100, 1024), pair.guest.segment(9000, 3072)];
    pair.write(5, &segments);
    pair.run();
    assert!(pair.at_node.delivered.is_empty(), "there is no slot yet");
    assert_eq!(pair.node.peer_wants(), 4096 + 96);
    pair.lend(3, 65536, 65536);
    pair.run();
    let (header, body) = pair.at_node.delivered[0].clone();
    assert_eq!((header.kind, header.slot.0, header.payload, body.len()), (Kind::Write, 5, 4096, 0));
    let (window, offset, mark) = pair.at_node.placed[0];
    assert_eq!((window, offset), (3, 0));
    assert_eq!(bytes_of(&pair.buffers, 65536, 4096), data);
    pair.posted(0);
    pair.posted(1);
    // The second one finds its slot there.
    pair.write(6, &segments);
    pair.node.release(mark);
    pair.node.queue(&header.reply(Kind::IoReply, Status::Ok), None);
    pair.run();
    let work = pair.posted(0);
    assert_eq!(work.len(), 1, "{work:?}");
    assert!(matches!(work[0].operation, Operation::WriteWithImmediate { .. }) && work[0].count == 3);
    let answers = pair.posted(1);
    assert_eq!(answers.len(), 1, "{answers:?}");
    assert!(answers[0].inline && matches!(answers[0].operation, Operation::Send));
    assert_eq!(pair.at_client.delivered[0].0.slot.0, 5);
    let copied = [pair.client.counters(), pair.node.counters()].map(|c| c.data_copied_bytes);
    assert_eq!(copied, [0, 0]);
}

#[test]
fn many_segments_are_chained_and_arrive_as_one_write() {
    let mut pair = Pair::with(ReadMode::Direct, 8, 4, 64);
    let data = fill(&pair.guest, 0, 40 * 512, 3);
    let segments: Vec<_> = (0..40).map(|i| pair.guest.segment(i * 512, 512)).collect();
    pair.lend(0, 0, 1 << 20);
    pair.write(1, &segments);
    pair.run();
    assert_eq!(bytes_of(&pair.buffers, 0, data.len()), data);
    let work: Vec<_> =
        pair.posted(0).into_iter().filter(|w| !matches!(w.operation, Operation::Send)).collect();
    assert_eq!(work.len(), 41usize.div_ceil(4));
    assert!(matches!(work.last().unwrap().operation, Operation::WriteWithImmediate { .. }));
    assert_eq!(pair.at_node.delivered.len(), 1);
}

#[test]
fn a_read_is_one_send_one_write_into_guest_memory_and_one_answer() {
    let mut pair = Pair::new(ReadMode::Direct);
    let data = fill(&pair.buffers, 0, 4096, 4);
    let request = pair.read(2, &[pair.guest.segment(8192, 4096)]);
    pair.run();
    assert_eq!(pair.at_node.delivered[0].0, request);
    pair.answer(&request, 77);
    pair.wire.borrow_mut()[1].delays = true;
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 8192, 4096), data);
    assert_eq!(pair.at_client.delivered.len(), 1);
    let (asked, answered) = (pair.posted(0), pair.posted(1));
    assert_eq!((asked.len(), answered.len()), (1, 2));
    assert!(matches!(answered[0].operation, Operation::Write { .. }));
    let mut tags = Vec::new();
    pair.node.take_sent(&mut tags);
    assert!(tags.is_empty(), "the card may still read the buffer");
    pair.let_late_work_complete(1);
    pair.run();
    pair.node.take_sent(&mut tags);
    assert_eq!(tags, [77]);
    assert_eq!(pair.client.counters().data_copied_bytes, 0);
}

#[test]
fn a_read_into_many_places_fills_each() {
    let mut pair = Pair::with(ReadMode::Direct, 8, 2, 256);
    let data = fill(&pair.buffers, 0, 100 * 512, 5);
    let places: Vec<_> = (0..100).map(|i| pair.guest.segment(i * 1024, 512)).collect();
    let request = pair.read(1, &places);
    pair.run();
    pair.answer(&request, 1);
    pair.run();
    for i in 0..100 {
        assert_eq!(bytes_of(&pair.guest, i * 1024, 512), data[i * 512..][..512], "place {i}");
    }
}

#[test]
fn without_a_key_of_guest_memory_the_data_of_a_read_is_copied_and_counted() {
    let mut pair = Pair::new(ReadMode::Bounce);
    let data = fill(&pair.buffers, 0, 8192, 6);
    let request = pair.read(2, &[pair.guest.segment(4096, 8192)]);
    pair.run();
    pair.at_client.place = vec![pair.guest.segment(4096, 8192)];
    pair.answer(&request, 1);
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 4096, 8192), data);
    assert_eq!(pair.client.counters().data_copied_bytes, 8192);
    assert!(pair.client.reads.is_empty());
    // One that nobody waits for any more goes nowhere.
    fill(&pair.guest, 4096, 8192, 9);
    let before = bytes_of(&pair.guest, 4096, 8192);
    let request = pair.read(2, &[pair.guest.segment(4096, 8192)]);
    pair.run();
    pair.at_client.place.clear();
    pair.answer(&request, 2);
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 4096, 8192), before);
    assert!(pair.client.staging.iter().all(|(_, map)| map.is_free()));
}

#[test]
fn memory_that_is_not_registered_is_copied_both_ways() {
    let mut pair = Pair::new(ReadMode::Direct);
    let own = Pages::new(8192).unwrap();
    let data = fill(&own, 0, 4096, 7);
    pair.lend(0, 65536, 65536);
    pair.write(1, &[own.segment(0, 4096)]);
    pair.run();
    assert_eq!(bytes_of(&pair.buffers, 65536, 4096), data);
    fill(&pair.buffers, 0, 4096, 8);
    let request = pair.read(2, &[own.segment(4096, 4096)]);
    pair.run();
    pair.at_client.place = vec![own.segment(4096, 4096)];
    pair.answer(&request, 1);
    pair.run();
    assert_eq!(bytes_of(&own, 4096, 4096), bytes_of(&pair.buffers, 0, 4096));
    assert_eq!(pair.client.counters().data_copied_bytes, 8192);
    assert!(pair.client.staging.iter().all(|(_, map)| map.is_free()));
}

#[test]
fn an_error_answer_ends_a_read_and_frees_what_it_had() {
    let mut pair = Pair::new(ReadMode::Bounce);
    let request = pair.read(2, &[pair.guest.segment(0, 4096)]);
    pair.run();
    assert_eq!(pair.node.targets.len(), 1);
    pair.node.queue(&request.reply(Kind::IoReply, Status::IoError), None);
    pair.run();
    assert_eq!(pair.at_client.delivered[0].0.status, Status::IoError);
    assert!(pair.node.targets.is_empty() && pair.client.reads.is_empty());
    assert!(pair.client.staging.iter().all(|(_, map)| map.is_free()));
}

#[test]
fn messages_of_both_sides_go_in_order_and_never_without_a_credit() {
    let mut pair = Pair::with(ReadMode::Direct, 4, 32, 16);
    for i in 0..500 {
        pair.client.queue(&header(Kind::Ping, i, 0, 0), None);
        pair.node.queue(&header(Kind::Pong, i, 0, 0), None);
    }
    // The card fails the test when there is no receive buffer, or no place in the send queue.
    for _ in 0..10 {
        pair.run();
    }
    let slots = |owner: &Owner| owner.delivered.iter().map(|(h, _)| h.slot.0).collect::<Vec<_>>();
    assert_eq!(slots(&pair.at_node), (0..500).collect::<Vec<_>>());
    assert_eq!(slots(&pair.at_client), (0..500).collect::<Vec<_>>());
    assert_eq!(pair.client.backlog() + pair.node.backlog(), 0);
    // Idle sides do not tell one another of credits for ever.
    pair.posted(0);
    pair.posted(1);
    pair.run();
    assert_eq!(pair.posted(0).len() + pair.posted(1).len(), 0);
}

#[test]
fn long_bodies_arrive_whole_and_those_that_are_too_long_are_refused_at_once() {
    let mut pair = Pair::new(ReadMode::Direct);
    let body: Vec<u8> = (0..300_000u32).map(|i| u8::try_from(i % 241).unwrap()).collect();
    for _ in 0..3 {
        pair.client.queue(&header(Kind::SetView, 0, 300_000, 0), Some(body.clone()));
        pair.node.queue(&header(Kind::PullReply, 0, 300_000, 0), Some(body.clone()));
    }
    for _ in 0..5 {
        pair.run();
    }
    for owner in [&pair.at_node, &pair.at_client] {
        assert_eq!(owner.delivered.len(), 3);
        assert!(owner.delivered.iter().all(|(_, b)| *b == body));
    }
    pair.at_node.longest = 4096;
    pair.client.queue(&header(Kind::Hello, 0, 4097, 0), Some(vec![1; 4097]));
    pair.client.flush().unwrap();
    let error = pair.node.receive(&mut pair.at_node).unwrap_err().to_string();
    assert!(error.contains("body is 4097"), "{error}");
    assert!(pair.node.incoming.is_none());
}

#[test]
fn writes_wait_for_slots_in_order_and_go_on_as_they_are_released() {
    let mut pair = Pair::with(ReadMode::Direct, 64, 32, 64);
    pair.lend(0, 65536, 65536);
    for slot in 0..40 {
        fill(&pair.guest, usize::from(slot) * 4096, 4096, usize::from(slot));
        let segment = pair.guest.segment(usize::from(slot) * 4096, 4096);
        pair.write(slot, &[segment]);
    }
    let mut done = 0;
    for _ in 0..10 {
        pair.run();
        assert!(pair.at_node.placed.len() <= done + 8, "a window of 64 KiB has eight slots");
        for index in done..pair.at_node.placed.len() {
            let (_, offset, mark) = pair.at_node.placed[index];
            let found = bytes_of(&pair.buffers, 65536 + offset as usize, 4096);
            assert_eq!(found, bytes_of(&pair.guest, index * 4096, 4096), "write {index}");
            pair.node.release(mark);
        }
        done = pair.at_node.placed.len();
    }
    assert_eq!(done, 40);
    let slots: Vec<_> = pair.at_node.delivered.iter().map(|(h, _)| h.slot.0).collect();
    assert_eq!(slots, (0..40).collect::<Vec<_>>());
}

#[test]
fn a_grant_that_is_too_small_is_asked_for_again() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.write(0, &[pair.guest.segment(0, 128 << 10)]);
    pair.run();
    pair.lend(0, 0, 65536);
    pair.run();
    assert_eq!(pair.node.peer_wants(), (128 << 10) + 96);
    pair.lend(1, 65536, 256 << 10);
    pair.run();
    assert_eq!(pair.at_node.placed.len(), 1);
    assert_eq!(pair.node.peer_wants(), 0);
}

#[test]
fn windows_that_are_idle_are_given_back_and_may_be_lent_again() {
    let mut pair = Pair::new(ReadMode::Direct);
    for window in 0..3 {
        pair.lend(window, usize::from(window) << 16, 65536);
    }
    pair.run();
    pair.client.beat();
    pair.client.beat();
    pair.run();
    let mut returned = Vec::new();
    pair.node.take_returned(&mut returned);
    assert_eq!(returned.len(), 2);
    pair.lend(returned[0], 1 << 20, 65536);
    pair.run();
}

#[test]
fn most_work_is_not_signaled() {
    let mut pair = Pair::with(ReadMode::Direct, 64, 32, 64);
    pair.lend(0, 0, 1 << 20);
    pair.run();
    pair.posted(0);
    for slot in 0..200 {
        let segment = pair.guest.segment(0, 4096);
        pair.write(slot, &[segment]);
        pair.run();
        let (_, _, mark) = pair.at_node.placed.pop().unwrap();
        pair.node.release(mark);
    }
    let work = pair.posted(0);
    let signaled = work.iter().filter(|w| w.signaled).count();
    assert!(signaled * 10 < work.len(), "{signaled} of {}", work.len());
}

#[test]
fn buffers_of_the_peer_that_are_larger_than_ours_cost_no_more_memory() {
    let mut pair = Pair::new(ReadMode::Direct);
    let card = Card { wire: Rc::clone(&pair.wire), side: 1 };
    let peer = Introduction { receives: 8, receive_size: 1 << 20 };
    let mut node = Link::new(card, Keyring::fixed(&[]), Role::Acceptor, peer).unwrap();
    let body: Vec<u8> = (0..9000u32).map(|i| u8::try_from(i % 241).unwrap()).collect();
    node.queue(&header(Kind::HelloReply, 0, 9000, 0), Some(body.clone()));
    node.flush().unwrap();
    let slab = node.packets.as_ref().unwrap().pages.segment(0, usize::MAX);
    assert_eq!(slab.length(), PACKETS * RECEIVE_SIZE as usize);
    assert_eq!(pair.posted(1).len(), 3, "three packets");
    pair.client.receive(&mut pair.at_client).unwrap();
    assert_eq!(pair.at_client.delivered[0].1, body);
}
