//! Pulls between nodes: the source writes the blocks that are missed straight to the memory that was named, and says
//! afterwards which ones they are.

use super::*;
use crate::wire::PullReply;

const RANGE: u32 = 1 << 20;
const ROOM: usize = 64 << 10;

/// A pull that the source has seen, with the first 64 KiB of memory for its data.
fn asked(pair: &mut Pair, number: u16) -> MessageHeader {
    let header = header(Kind::Pull, number, 0, RANGE);
    let memory = pair.guest.segment(0, ROOM);
    pair.client.queue_read(&header, &mut |list| list.push(memory));
    pair.run();
    assert_eq!(pair.at_node.delivered.last().map(|(h, _)| h.kind), Some(Kind::Pull));
    header
}

/// The source's answer: blocks 0 and 2 from two places of its buffers, and a block of zeroes between them.
fn answer(pair: &mut Pair, pull: &MessageHeader, tag: u32) -> Vec<u8> {
    let mut data = pull.reply(Kind::PullData, Status::Ok);
    data.payload = 8192;
    let pieces = [pair.buffers.segment(4096, 4096), pair.buffers.segment(16384, 4096)];
    pair.node.queue_data(&data, Some(tag), &mut |list| list.extend(pieces));
    let body = PullReply::encode([(0, false), (1, true), (2, false)].into_iter());
    let mut reply = pull.reply(Kind::PullReply, Status::Ok);
    reply.payload = u32::try_from(body.len()).unwrap();
    pair.node.queue(&reply, Some(body.clone()));
    body
}

#[test]
fn pulled_data_goes_from_disk_buffer_to_disk_buffer_and_only_the_list_of_blocks_is_copied() {
    let mut pair = Pair::new(ReadMode::Window);
    let pull = asked(&mut pair, 3);
    let data = [fill(&pair.buffers, 4096, 4096, 1), fill(&pair.buffers, 16384, 4096, 2)].concat();
    let behind = fill(&pair.guest, 8192, 4096, 9);
    pair.posted(1);
    let body = answer(&mut pair, &pull, 7);
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 0, 8192), data);
    assert_eq!(bytes_of(&pair.guest, 8192, 4096), behind, "what the data does not reach stays");
    let (header, found) = pair.at_client.delivered.pop().unwrap();
    assert_eq!((header.kind, found), (Kind::PullReply, body.clone()));
    assert!(pair.at_client.delivered.is_empty(), "the data is no message");
    let work = pair.posted(1);
    assert!(matches!(work[0].operation, Operation::Write { .. }) && work[0].count == 2, "{work:?}");
    assert!(matches!(work[1].operation, Operation::Send), "{work:?}");
    let mut tags = Vec::new();
    pair.node.take_sent(&mut tags);
    assert_eq!(tags, [7]);
    for counters in [pair.client.counters(), pair.node.counters()] {
        assert_eq!(counters.data_copied_bytes, 0);
        assert!(counters.body_copied_bytes <= body.len() as u64, "{counters:?}");
    }
    // Its key is of no use any more, and nothing of it is left.
    assert!(pair.wire.borrow()[0].exposed.is_empty());
    assert!(pair.client.reads.is_empty() && pair.node.targets.is_empty());
}

#[test]
fn the_answer_to_a_pull_is_told_when_the_source_can_write_no_more() {
    let mut pair = Pair::new(ReadMode::Window);
    let pull = asked(&mut pair, 3);
    pair.wire.borrow_mut()[0].delays = true;
    let body = answer(&mut pair, &pull, 7);
    pair.run();
    assert!(pair.at_client.delivered.is_empty());
    pair.let_late_work_complete(0);
    pair.run();
    assert_eq!(pair.at_client.delivered.pop().map(|(_, found)| found), Some(body));
}

#[test]
fn a_pull_that_is_refused_or_finds_only_zeroes_ends_without_data() {
    let mut pair = Pair::new(ReadMode::Window);
    for (number, status) in [(1, Status::StaleView), (2, Status::IoError), (3, Status::Ok)] {
        let pull = asked(&mut pair, number);
        let body = PullReply::encode([(5, true)].into_iter());
        let body = (status == Status::Ok).then_some(body);
        let mut reply = pull.reply(Kind::PullReply, status);
        reply.payload = body.as_ref().map_or(0, |b| u32::try_from(b.len()).unwrap());
        pair.node.queue(&reply, body.clone());
        pair.run();
        let (header, found) = pair.at_client.delivered.pop().unwrap();
        assert_eq!((header.status, found), (status, body.unwrap_or_default()));
        assert!(pair.wire.borrow()[0].exposed.is_empty());
        assert!(pair.client.reads.is_empty() && pair.node.targets.is_empty());
    }
}

#[test]
fn without_windows_pulled_data_is_copied_once_and_counted() {
    let mut pair = Pair::new(ReadMode::Bounce);
    let pull = asked(&mut pair, 3);
    let data = [fill(&pair.buffers, 4096, 4096, 1), fill(&pair.buffers, 16384, 4096, 2)].concat();
    pair.at_client.place = vec![pair.guest.segment(0, 8192)];
    answer(&mut pair, &pull, 7);
    pair.run();
    assert_eq!(bytes_of(&pair.guest, 0, 8192), data);
    assert_eq!(pair.at_client.delivered.len(), 1);
    assert_eq!((pair.client.counters().data_copied_bytes, pair.node.counters().data_copied_bytes), (8192, 0));
}

#[test]
fn more_data_than_a_pull_has_places_for_ends_the_connection_at_the_source() {
    let mut pair = Pair::new(ReadMode::Window);
    let pull = asked(&mut pair, 3);
    let mut data = pull.reply(Kind::PullData, Status::Ok);
    data.payload = u32::try_from(ROOM).unwrap() + 4096;
    let memory = pair.buffers.segment(0, ROOM + 4096);
    pair.node.queue_data(&data, Some(1), &mut |list| list.push(memory));
    let error = pair.node.flush().unwrap_err().to_string();
    assert!(error.contains("another length than its places"), "{error}");
}

#[test]
fn pulled_data_as_a_message_is_refused() {
    let mut pair = Pair::new(ReadMode::Window);
    asked(&mut pair, 3);
    pair.node.queue(&header(Kind::PullData, 3, 5, 0), Some(vec![1; 5]));
    pair.node.flush().unwrap();
    let error = pair.client.receive(&mut pair.at_client).unwrap_err().to_string();
    assert!(error.contains("pulled data outside of the places"), "{error}");
}
