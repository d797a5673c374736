//! The clean side of a resync: hands out what another member is on record to have missed, with the data of exactly
//! those blocks.

use std::collections::HashMap;

use super::{ConnectionId, DiskOperation, DiskResult, IoId, Output, Replica, ReplyPayload};
use crate::map::{ChunkMap, MAP_PAGE_BYTES, MapId, MapPage};
use crate::pool::{BLOCK_SIZE, Block, MemberId, MemberState};
use crate::wire::{Kind, MessageHeader, PullReply, Status};

/// Most pulls that one member may have under way here; more are answered with [`Status::Limit`] and come again.
const MAX_PULLS: usize = 64;

/// A pull whose data is being read.
struct ServedPull {
    connection: ConnectionId,
    header: MessageHeader,
    blocks: Vec<Block>,
    /// The runs of blocks, in order, by the disk read that fetches each.
    runs: Vec<IoId>,
    left: usize,
    failed: bool,
}

/// The pulls under way.
#[derive(Default)]
pub(super) struct Source {
    pulls: HashMap<u64, ServedPull>,
    by_io: HashMap<IoId, u64>,
    next: u64,
}

/// What the node needs to put an answer together: reads that are done, whose data is in their buffers. The data of blocks that
/// are not all zeroes goes first, as [`Kind::PullData`] with the answer's header; without any there is no such message.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PulledData {
    /// The blocks, by index from the first block of the range.
    pub blocks: Vec<u32>,
    /// The disk reads that have their data, one after the other. The node frees their buffers.
    pub reads: Vec<IoId>,
}

impl PulledData {
    /// The body of the answer. `zeroes` says of each block that the reads found, in order, whether it is all zeroes.
    #[must_use]
    pub fn encode(&self, zeroes: &[bool]) -> Vec<u8> {
        PullReply::encode(self.blocks.iter().copied().zip(zeroes.iter().copied()))
    }
}

impl Replica {
    /// A member that is stale may only be told by one that is Clean in the same attachment, and has not started anew since: one that has
    /// may have lost with its cache what the stale one missed, and the client, which has not noticed, would promote that one
    /// without it. The same holds for one whose flush failed.
    pub(super) fn may_be_source(&self, header: &MessageHeader) -> bool {
        header.epoch == self.epoch
            && (self.session > 0 || mutant!(SourceStartedAnew))
            && (self.view.state(self.member) == Some(MemberState::Clean) || mutant!(PullFromStale))
            && !self.broken
            && (!self.distrusted || mutant!(SourceServesAfterFailedFlush))
            && self.attach.is_none()
    }

    pub(super) fn pull_map(&mut self, connection: ConnectionId, header: &MessageHeader) {
        let member = u8::try_from(header.slot.0).ok().and_then(MemberId::new);
        let page = u32::try_from(header.offset).unwrap_or(u32::MAX);
        let pages = ChunkMap::pages_for(self.spec.chunk_count());
        let (status, body) = match member {
            Some(member) if page < pages && self.may_be_source(header) => {
                let bits = self.maps.page(MapPage { map: MapId::Dirty(member), page });
                (Status::Ok, bits.map_or_else(|| vec![0; MAP_PAGE_BYTES], |bits| bits.to_vec()))
            }
            Some(_) if page < pages => (Status::NotAttached, Vec::new()),
            _ => (Status::BadRequest, Vec::new()),
        };
        self.answer(connection, header, Kind::PullMapReply, status, body);
    }

    pub(super) fn pull(&mut self, connection: ConnectionId, header: &MessageHeader) {
        let member = u8::try_from(header.slot.0).ok().and_then(MemberId::new);
        let end = header.offset.checked_add(header.length.into());
        let fits = end.is_some_and(|end| end <= self.spec.size)
            && header.offset.is_multiple_of(BLOCK_SIZE)
            && (1..=PullReply::MAX_RANGE).contains(&header.length);
        let Some(member) = member.filter(|_| fits) else {
            return self.answer(connection, header, Kind::PullReply, Status::BadRequest, Vec::new());
        };
        if !self.may_be_source(header) {
            return self.answer(connection, header, Kind::PullReply, Status::NotAttached, Vec::new());
        }
        if header.view > self.view.number {
            // What the view says to be missed is not on record here yet.
            return self.answer(connection, header, Kind::PullReply, Status::StaleView, Vec::new());
        }
        if self.source.pulls.len() >= MAX_PULLS {
            return self.answer(connection, header, Kind::PullReply, Status::Limit, Vec::new());
        }
        let most = usize::try_from(u64::from(PullReply::MAX_DATA) / BLOCK_SIZE).unwrap_or(64);
        let mut blocks: Vec<Block> =
            self.maps.missed_in(member, header.offset, header.length.into()).take(most + 1).collect();
        let mut answered = *header;
        if blocks.len() > most {
            // The answer covers the range up to the first block that does not fit.
            let next = blocks.pop().map_or(0, |b| b.0 * BLOCK_SIZE);
            answered.length = u32::try_from(next - header.offset).unwrap_or(u32::MAX);
        }
        self.source.next += 1;
        let number = self.source.next;
        let mut pull =
            ServedPull { connection, header: answered, blocks, runs: Vec::new(), left: 0, failed: false };
        for (first, count) in runs(&pull.blocks) {
            let io = self.insert_own(DiskOperation::Read);
            self.source.by_io.insert(io, number);
            pull.runs.push(io);
            let length = u32::try_from(count * BLOCK_SIZE).unwrap_or(u32::MAX);
            let offset = first.0 * BLOCK_SIZE;
            self.outputs.push_back(Output::Disk { io, operation: DiskOperation::Read, offset, length });
        }
        pull.left = pull.runs.len();
        self.source.pulls.insert(number, pull);
        self.answer_pull(number);
    }

    /// True if the disk read was for a pull.
    pub(super) fn pull_read_done(&mut self, io: IoId, result: DiskResult) -> bool {
        let Some(number) = self.source.by_io.remove(&io) else { return false };
        if let Some(pull) = self.source.pulls.get_mut(&number) {
            pull.left -= 1;
            pull.failed |= result != DiskResult::Done;
        }
        self.answer_pull(number);
        true
    }

    fn answer_pull(&mut self, number: u64) {
        if self.source.pulls.get(&number).is_none_or(|p| p.left > 0) {
            return;
        }
        let Some(pull) = self.source.pulls.remove(&number) else { return };
        let first = pull.header.offset / BLOCK_SIZE;
        let blocks = pull.blocks.iter().map(|b| u32::try_from(b.0 - first).unwrap_or(u32::MAX)).collect();
        self.counters.pulled_out_blocks += pull.blocks.len() as u64;
        self.counters.read_errors += u64::from(pull.failed);
        // A flush may have failed while the disk read: then this may be from before writes that were lost with it.
        let is_doubtful = self.distrusted && !mutant!(SourceServesAfterFailedFlush);
        let status = if pull.failed || is_doubtful { Status::IoError } else { Status::Ok };
        let reply = pull.header.reply(Kind::PullReply, status);
        let data = PulledData { blocks, reads: pull.runs };
        self.free_ios(&data.reads);
        self.outputs.push_back(Output::Send(pull.connection, reply, ReplyPayload::Pulled(data)));
    }
}

/// Neighbouring blocks as `(first, count)`.
pub(super) fn runs(blocks: &[Block]) -> Vec<(Block, u64)> {
    let mut runs: Vec<(Block, u64)> = Vec::new();
    for &block in blocks {
        match runs.last_mut() {
            Some((first, count)) if first.0 + *count == block.0 => *count += 1,
            _ => runs.push((block, 1)),
        }
    }
    runs
}
