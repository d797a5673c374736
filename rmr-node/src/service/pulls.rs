//! Memory for the data that a member pulls from another one: found before the pull is sent, filled by the link, written to
//! disk from where it lies.

use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

use rmr_common::buffer::Segment;
use rmr_common::wire::{MessageHeader, PullReply, Status};

use crate::disk::{Buffer, BufferPool, Part, Payload};

/// Pulls of all members together have at most one such part of the buffers: two nodes that pull from each other would else
/// have none left to read what the other one wants.
pub(super) const PULLS_PART: usize = 4;

/// The pulls of a member, by sequence.
#[derive(Default)]
pub(super) struct Pulls {
    under_way: HashMap<u64, Pull>,
    /// Those that wait for memory, oldest first.
    waiting: VecDeque<MessageHeader>,
}

struct Pull {
    memory: Rc<Buffer>,
    /// Bytes of data that the link has asked a place for.
    placed: usize,
    /// Nothing more comes, and the replica has not said yet that it has dealt with it.
    is_answered: bool,
}

impl Pulls {
    /// Notes a pull that is to be sent when there is memory for it.
    pub(super) fn ask(&mut self, header: MessageHeader) {
        self.waiting.push_back(header);
    }

    /// Bytes of buffers that wait for data, or for the replica.
    pub(super) fn bytes(&self) -> usize {
        self.under_way.values().map(|pull| pull.memory.length()).sum()
    }

    pub(super) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Finds memory for pulls that wait, and has them sent; those of one block before others, which a guest waits for. Of
    /// `room` bytes there may be used no more, but by what is the only one.
    pub(super) fn start(
        &mut self,
        buffers: &BufferPool,
        mut room: usize,
        mut send: impl FnMut(&MessageHeader, Segment),
    ) {
        let length = |header: &MessageHeader| header.length.min(PullReply::MAX_DATA) as usize;
        self.waiting.make_contiguous().sort_by_key(|header| length(header) > 4096);
        while let Some(header) = self.waiting.front() {
            let wanted = length(header);
            if wanted > room && !self.under_way.is_empty() {
                return;
            }
            let Some(memory) = buffers.try_acquire(wanted) else { return };
            room = room.saturating_sub(wanted);
            send(header, memory.segment());
            let pull = Pull { memory: Rc::new(memory), placed: 0, is_answered: false };
            self.under_way.insert(header.sequence.0, pull);
            self.waiting.pop_front();
        }
    }

    /// Where the data of a pull goes that arrives in a message.
    pub(super) fn place(&mut self, header: &MessageHeader) -> Option<Segment> {
        let pull = self.under_way.get_mut(&header.sequence.0).filter(|pull| !pull.is_answered)?;
        let length = header.payload as usize;
        pull.placed += length;
        (pull.placed == length && length <= pull.memory.length())
            .then(|| pull.memory.segment().part(0, length))
    }

    /// Notes the answer to a pull; returns how much data came with it. `is_remote`: the source has written it by itself.
    ///
    /// # Errors
    /// When it is none, in words.
    pub(super) fn answered(
        &mut self,
        header: &MessageHeader,
        body: &[u8],
        is_remote: bool,
    ) -> Result<usize, String> {
        let pull = self.under_way.get_mut(&header.sequence.0).filter(|pull| !pull.is_answered);
        let pull = pull.ok_or("an answer to no pull")?;
        let listed = match header.status {
            Status::Ok => PullReply::decode(body).map_err(|e| e.to_string())?.data_bytes(),
            _ => 0,
        };
        let there = if is_remote { listed } else { pull.placed };
        if there != listed || listed > pull.memory.length() {
            let room = pull.memory.length();
            return Err(format!("{there} bytes of pulled data, expected {listed}, and at most {room}"));
        }
        pull.is_answered = true;
        Ok(listed)
    }

    /// A part of a pull's data, for a disk.
    pub(super) fn part(&self, pull: u64, from: u32, length: u32) -> Option<Payload> {
        let pull = self.under_way.get(&pull)?;
        Part::of(&pull.memory, from as usize, length as usize).map(Payload::Part)
    }

    /// The replica has dealt with a pull; what is being written keeps its memory until then.
    pub(super) fn done(&mut self, pull: u64) {
        self.under_way.remove(&pull);
    }

    /// The link is gone, and nothing of it writes to memory any more: what was not answered never will be.
    pub(super) fn abandon(&mut self) {
        self.waiting.clear();
        self.under_way.retain(|_, pull| pull.is_answered);
    }
}

#[cfg(test)]
mod tests {
    use rmr_common::pool::{PoolId, Sequence};
    use rmr_common::wire::Kind;

    use super::*;

    fn header(kind: Kind, sequence: u64, length: u32) -> MessageHeader {
        let pool = PoolId::from_bytes([7; 16]);
        MessageHeader { sequence: Sequence(sequence), length, ..MessageHeader::new(kind, pool) }
    }

    fn started(pulls: &mut Pulls, buffers: &BufferPool, room: usize) -> Vec<(u64, usize)> {
        let mut sent = Vec::new();
        pulls.start(buffers, room, |header, memory| sent.push((header.sequence.0, memory.length())));
        sent
    }

    #[test]
    fn pulls_wait_for_memory_and_what_a_guest_waits_for_goes_first() {
        let buffers = BufferPool::new(1 << 20).unwrap();
        let mut pulls = Pulls::default();
        for (number, length) in [(1, 1 << 20), (2, 64 << 20), (3, 4096)] {
            pulls.ask(header(Kind::Pull, number, length));
        }
        // One may always go, however little room there is.
        assert_eq!(started(&mut pulls, &buffers, 0), [(3, 4096)]);
        assert_eq!(started(&mut pulls, &buffers, 0), []);
        assert_eq!(started(&mut pulls, &buffers, 300 << 10), [(1, 256 << 10)]);
        assert!(pulls.is_waiting() && pulls.bytes() == (256 << 10) + 4096);
        let others = buffers.try_acquire(512 << 10).unwrap();
        assert_eq!(started(&mut pulls, &buffers, 1 << 20), [], "no memory");
        drop(others);
        assert_eq!(started(&mut pulls, &buffers, 1 << 20), [(2, 256 << 10)]);
        assert!(!pulls.is_waiting());
    }

    #[test]
    fn data_is_written_from_where_it_arrived_and_its_memory_is_free_when_disk_and_replica_are_done() {
        let buffers = BufferPool::new(1 << 20).unwrap();
        let mut pulls = Pulls::default();
        pulls.ask(header(Kind::Pull, 1, 64 << 10));
        started(&mut pulls, &buffers, 1 << 20);
        let data = MessageHeader { payload: 8192, ..header(Kind::PullData, 1, 64 << 10) };
        assert_eq!(pulls.place(&data).map(|memory| memory.length()), Some(8192));
        let reply = header(Kind::PullReply, 1, 64 << 10);
        let body = |blocks: &[(u32, bool)]| PullReply::encode(blocks.iter().copied());
        let two = body(&[(0, false), (1, true), (3, false)]);
        assert!(pulls.answered(&reply, &body(&[(0, false)]), false).is_err(), "8 KiB came, 4 are listed");
        assert!(pulls.answered(&header(Kind::PullReply, 9, 4096), &two, false).is_err(), "never asked");
        assert_eq!(pulls.answered(&reply, &two, false), Ok(8192));
        assert!(pulls.answered(&reply, &two, false).is_err(), "twice");
        // The link is gone; what came over it before is good.
        pulls.abandon();
        assert!(pulls.part(1, 0, (64 << 10) + 1).is_none() && pulls.part(2, 0, 4096).is_none());
        let part = pulls.part(1, 4096, 4096).unwrap();
        pulls.done(1);
        assert_eq!(buffers.free_bytes(), (1 << 20) - (64 << 10));
        drop(part);
        assert_eq!(buffers.free_bytes(), 1 << 20);
    }

    #[test]
    fn what_does_not_fit_its_memory_is_refused_and_what_was_not_answered_is_given_up_with_the_link() {
        let buffers = BufferPool::new(1 << 20).unwrap();
        let mut pulls = Pulls::default();
        pulls.ask(header(Kind::Pull, 1, 4096));
        pulls.ask(header(Kind::Pull, 2, 4096));
        started(&mut pulls, &buffers, 1 << 20);
        let large = MessageHeader { payload: 8192, ..header(Kind::PullData, 1, 4096) };
        assert!(pulls.place(&large).is_none());
        let two = PullReply::encode([(0, false), (1, false)].into_iter());
        assert!(pulls.answered(&header(Kind::PullReply, 2, 4096), &two, true).is_err());
        let refused = MessageHeader { status: Status::StaleView, ..header(Kind::PullReply, 2, 4096) };
        assert_eq!(pulls.answered(&refused, &[], true), Ok(0));
        pulls.done(2);
        pulls.ask(header(Kind::Pull, 3, 4096));
        pulls.abandon();
        assert_eq!((pulls.bytes(), buffers.free_bytes()), (0, 1 << 20));
        assert!(!pulls.is_waiting(), "what was not sent is not sent over the next link");
    }

    #[test]
    fn data_that_comes_twice_for_one_pull_has_no_place() {
        let buffers = BufferPool::new(1 << 20).unwrap();
        let mut pulls = Pulls::default();
        pulls.ask(header(Kind::Pull, 1, 8192));
        started(&mut pulls, &buffers, 1 << 20);
        let half = MessageHeader { payload: 4096, ..header(Kind::PullData, 1, 8192) };
        assert!(pulls.place(&half).is_some());
        // The sum would be what the answer lists, and the second half of the memory holds what was there before.
        assert!(pulls.place(&half).is_none());
    }
}
