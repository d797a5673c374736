//! What ends a connection: work that fails, a card or a path that is lost, a peer that breaks the rules.

use super::*;

#[test]
fn work_that_fails_ends_the_connection_with_the_cards_words() {
    for words in ["transport retry counter exceeded", "RNR retry counter exceeded", "remote access error"] {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.lend(0, 0, 65536);
        pair.run();
        pair.wire.borrow_mut()[0].fails_after = Some((1, words));
        for slot in 0..3 {
            let segment = pair.guest.segment(0, 4096);
            pair.write(slot, &[segment]);
        }
        pair.client.flush().unwrap();
        let error = pair.client.receive(&mut pair.at_client).unwrap_err();
        assert!(matches!(&error, ConnectionError::Link(text) if text == words), "{error}");
        pair.client.shut_down();
        assert!(pair.wire.borrow()[0].is_closed);
        assert!(matches!(pair.client.flush(), Err(ConnectionError::Closed)));
        assert!(matches!(pair.client.receive(&mut pair.at_client), Err(ConnectionError::Closed)));
        assert!(!pair.client.has_unsent());
    }
}

#[test]
fn what_happens_to_a_connection_is_told_in_words_also_behind_work_that_was_flushed() {
    for words in
        ["the peer disconnected", "the RDMA device was removed", "the address moved to another device"]
    {
        for flushes in [false, true] {
            let mut pair = Pair::new(ReadMode::Direct);
            pair.wire.borrow_mut()[0].events.push_back(LinkEvent::Established);
            pair.run();
            pair.wire.borrow_mut()[0].events.push_back(LinkEvent::Lost(words.to_owned()));
            if flushes {
                pair.wire.borrow_mut()[0].fail(1, "flushed", true);
            }
            let error = pair.client.receive(&mut pair.at_client).unwrap_err();
            assert!(matches!(&error, ConnectionError::Link(text) if text == words), "{error}");
        }
    }
}

#[test]
fn a_card_that_takes_no_work_ends_the_connection() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.wire.borrow_mut()[0].is_closed = true;
    pair.client.queue(&header(Kind::Ping, 0, 0, 0), None);
    assert!(matches!(pair.client.flush(), Err(ConnectionError::Link(_))));
}

#[test]
fn shared_receive_buffers_go_back_when_the_connection_breaks() {
    let mut pair = Pair::new(ReadMode::Direct);
    for slot in 0..4 {
        pair.client.queue(&header(Kind::Ping, slot, 0, 0), None);
    }
    pair.client.flush().unwrap();
    // The first of them is no packet.
    let size = 4096;
    let memory = pair.wire.borrow()[1].memory.segment(0, size);
    copy_to_segments(&[0xff; 16], &[memory]);
    assert!(pair.node.receive(&mut pair.at_node).is_err());
    let mut given_back = pair.wire.borrow()[1].given_back.clone();
    given_back.sort_unstable();
    assert_eq!(given_back, [0, 1, 2, 3]);
    assert!(pair.at_node.delivered.is_empty());
}

#[test]
fn data_that_nobody_keeps_frees_its_slot_at_once() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.at_node.keeps = false;
    pair.lend(0, 0, 65536);
    for slot in 0..30 {
        let segment = pair.guest.segment(0, 4096);
        pair.write(slot, &[segment]);
    }
    pair.run();
    assert_eq!(pair.at_node.delivered.len(), 30);
}

#[test]
fn wrong_keys_are_refused_and_end_the_connection() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.lend(0, 0, 65536);
    pair.run();
    // The node has taken the memory back, and the client does not know.
    pair.wire.borrow_mut()[1].exposed.clear();
    let segment = pair.guest.segment(0, 4096);
    pair.write(0, &[segment]);
    pair.client.flush().unwrap();
    let error = pair.client.receive(&mut pair.at_client).unwrap_err();
    assert!(matches!(&error, ConnectionError::Link(text) if text.contains("remote access")), "{error}");
    pair.node.receive(&mut pair.at_node).unwrap();
    assert!(pair.at_node.delivered.is_empty());
}

#[test]
fn a_peer_that_breaks_the_rules_is_refused_whatever_it_sends() {
    let packet = |kind, affairs: &Affairs, message: Option<(MessageHeader, u16)>, rest: &[u8]| {
        let mut bytes = Vec::new();
        let total = message.map_or(0, |(_, targets)| HEADER_SIZE + 16 * usize::from(targets));
        let targets = message.map_or(0, |(_, targets)| targets);
        packet::begin(kind, affairs, u32::try_from(total).unwrap(), targets, &mut bytes);
        if let Some((header, _)) = message {
            bytes.extend_from_slice(&header.encode());
        }
        bytes.extend_from_slice(rest);
        bytes
    };
    let none = Affairs::default();
    let read = header(Kind::Read, 0, 0, 4096);
    let target = |length: u32| {
        let mut bytes = Vec::new();
        packet::push_target(&Target { address: 1, length, key: 1 }, &mut bytes);
        bytes
    };
    let cases = [
        packet(PacketKind::Flow, &Affairs { receives: 1, ..none.clone() }, None, &[]),
        packet(PacketKind::Flow, &Affairs { released: vec![1], ..none.clone() }, None, &[]),
        packet(PacketKind::Flow, &Affairs { returns: vec![9], ..none.clone() }, None, &[]),
        packet(PacketKind::Tail, &none, Some((read, 0)), &[]),
        packet(PacketKind::Continuation, &none, None, &[1]),
        packet(PacketKind::Message, &none, Some((header(Kind::Write, 0, 512, 512), 0)), &[]),
        packet(PacketKind::Message, &none, Some((read, 0)), &[]),
        packet(PacketKind::Message, &none, Some((read, 1)), &target(512)),
        packet(PacketKind::Message, &none, Some((header(Kind::Ping, 0, 0, 0), 1)), &target(0)),
        packet(PacketKind::Message, &none, Some((header(Kind::Ping, 0, 0, 0), 0)), &[1]),
        vec![1, 2, 3],
    ];
    for (index, bytes) in cases.iter().enumerate() {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.lend(0, 0, 65536);
        pair.wire.borrow_mut()[1].arrive(bytes, None);
        assert!(pair.node.receive(&mut pair.at_node).is_err(), "case {index}");
        assert!(pair.at_node.delivered.is_empty(), "case {index}");
    }
    // To a client nobody writes data, and a node returns nothing.
    for affairs in [
        Affairs { returns: vec![1], ..none.clone() },
        Affairs { wanted: 1, ..none.clone() },
        Affairs { released: vec![1], ..none.clone() },
    ] {
        let mut pair = Pair::new(ReadMode::Direct);
        pair.wire.borrow_mut()[0].arrive(&packet(PacketKind::Flow, &affairs, None, &[]), None);
        assert!(pair.client.receive(&mut pair.at_client).is_err());
    }
}

#[test]
fn a_peer_that_sends_more_than_it_has_credits_for_is_refused() {
    let mut pair = Pair::new(ReadMode::Direct);
    let mut bytes = Vec::new();
    packet::begin(PacketKind::Flow, &Affairs::default(), 0, 0, &mut bytes);
    for _ in 0..8 {
        pair.wire.borrow_mut()[1].arrive(&bytes, None);
        pair.node.receive(&mut pair.at_node).unwrap();
    }
    pair.wire.borrow_mut()[1].arrive(&bytes, None);
    let error = pair.node.receive(&mut pair.at_node).unwrap_err();
    assert!(error.to_string().contains("credits"), "{error}");
}

#[test]
fn data_outside_of_free_slots_is_refused() {
    let tail = |kind, header: MessageHeader| {
        let mut bytes = Vec::new();
        packet::begin(kind, &Affairs::default(), 0, 0, &mut bytes);
        bytes.extend_from_slice(&header.encode());
        bytes
    };
    let good = || tail(PacketKind::Tail, header(Kind::Write, 0, 4096, 4096));
    let place = |pair: &mut Pair, bytes: &[u8], at: usize, mark: u32| {
        let memory = pair.buffers.segment(at, bytes.len());
        copy_to_segments(bytes, &[memory]);
        pair.wire.borrow_mut()[1].arrive(&[], Some(mark));
        pair.node.receive(&mut pair.at_node)
    };
    let mut pair = Pair::new(ReadMode::Direct);
    pair.lend(2, 0, 65536);
    let at = |offset: usize| 2 << 16 | u32::try_from(offset / 16).unwrap();
    place(&mut pair, &good(), 4096, at(4096)).unwrap();
    for (bytes, position, mark, what) in [
        (good(), 4096, at(4096), "in use"),
        (good(), 4112, at(4112), "no page"),
        (good(), 2048, at(2048), "before its window"),
        (good(), 12288, (3 << 16) + 12288 / 16, "not lent"),
        (good(), 65536 - 16, at(65536 - 16), "end of its window"),
        (tail(PacketKind::Message, header(Kind::Write, 0, 4096, 4096)), 20480, at(20480), "no write"),
        (tail(PacketKind::Tail, header(Kind::Ping, 0, 0, 0)), 20480, at(20480), "no write"),
    ] {
        let error = place(&mut pair, &bytes, position, mark).unwrap_err().to_string();
        assert!(error.contains(what), "{what}: {error}");
    }
    assert_eq!(pair.at_node.delivered.len(), 1);
}

#[test]
fn closing_leaves_nothing_that_could_touch_memory() {
    let mut pair = Pair::new(ReadMode::Direct);
    pair.lend(0, 0, 65536);
    pair.run();
    let segment = pair.guest.segment(0, 4096);
    pair.write(0, &[segment]);
    pair.node.shut_down();
    pair.client.flush().unwrap();
    assert!(matches!(pair.client.receive(&mut pair.at_client), Err(ConnectionError::Closed)));
    pair.client.shut_down();
    assert!(pair.at_node.placed.is_empty());
    assert_eq!(pair.client.backlog(), 0);
}

#[test]
fn a_place_for_data_at_the_end_of_all_addresses_is_the_cards_to_refuse() {
    let mut pair = Pair::with(ReadMode::Direct, 8, 2, 64);
    let mut bytes = Vec::new();
    let read = header(Kind::Read, 0, 0, 8192);
    packet::begin(PacketKind::Message, &Affairs::default(), 96, 1, &mut bytes);
    bytes.extend_from_slice(&read.encode());
    packet::push_target(&Target { address: u64::MAX - 511, length: 8192, key: 1 }, &mut bytes);
    pair.wire.borrow_mut()[1].arrive(&bytes, None);
    pair.node.receive(&mut pair.at_node).unwrap();
    let mut answer = read.reply(Kind::IoReply, Status::Ok);
    answer.payload = 8192;
    // More pieces than go with one work request, so that a second one begins behind the first.
    let pieces: Vec<_> = (0..4).map(|n| pair.buffers.segment(n * 8192, 2048)).collect();
    pair.node.queue_data(&answer, None, &mut |list| list.extend_from_slice(&pieces));
    pair.node.flush().unwrap();
    let error = pair.node.receive(&mut pair.at_node).unwrap_err().to_string();
    assert!(error.contains("remote access"), "{error}");
}

#[test]
fn a_window_at_the_end_of_all_addresses_is_the_cards_to_refuse() {
    let mut pair = Pair::new(ReadMode::Direct);
    let grant = Grant { window: 0, length: 65536, key: 1, address: u64::MAX - 4095 };
    let mut bytes = Vec::new();
    let affairs = Affairs { grants: vec![grant], ..Affairs::default() };
    packet::begin(PacketKind::Flow, &affairs, 0, 0, &mut bytes);
    pair.wire.borrow_mut()[0].arrive(&bytes, None);
    pair.client.receive(&mut pair.at_client).unwrap();
    for slot in 0..2 {
        let segment = pair.guest.segment(0, 4096);
        pair.write(slot, &[segment]);
    }
    pair.client.flush().unwrap();
    let error = pair.client.receive(&mut pair.at_client).unwrap_err().to_string();
    assert!(error.contains("remote access"), "{error}");
}
