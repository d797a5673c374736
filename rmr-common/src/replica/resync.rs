//! The stale side of a resync: takes over the maps, pulls what it misses, lets guest writes go first.
//!
//! ```text
//!            Prepare                 view with this member Syncing            maps durable
//!   Idle ───────────▶ link to source ─────────────────────────────▶ Handover ──────────────▶ Pulling
//!     ▲                                                                                        │
//!     └──────────────── nothing stale, flushed, reported; promotion, or the client is gone ────┘
//! ```
//! A block is stale until a write that covers it whole was carried out here, or a Clean member's copy of it was written
//! here, or a Clean member says that it is not missed. Its flag goes only when that is done, never before: a pull that
//! comes back while such a write is under way leaves the block alone, and the block is pulled again if the write fails.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use super::source::runs;
use super::{DiskOperation, DiskResult, IoId, Output, Replica, ReplyPayload};
use crate::map::{ChunkMap, ClearReason, ClearTarget, MAP_PAGE_BYTES};
use crate::pool::{Address, BLOCK_SIZE, Block, Chunk, MemberId, MemberState, View};
use crate::time::Time;
use crate::wire::{ChunkList, Kind, MessageHeader, PullReply, Status};

/// Bytes of a block in a pull's data.
const BLOCK_BYTES: u32 = 4096;
/// Pause before a link to the source is tried again, and before a chunk whose pull failed is.
const RETRY: Duration = Duration::from_millis(500);
/// Pause before a source is asked again that does not have the view yet in which this member is Syncing.
const SOURCE_BEHIND: Duration = Duration::from_millis(2);
/// Finished chunks are flushed and reported at the latest after this long, or when this many are waiting.
const REPORT_AFTER: Duration = Duration::from_millis(100);
const REPORT_CHUNKS: usize = 256;
/// While guest writes arrived within this time, resync yields to them.
const GUEST_ACTIVE: Duration = Duration::from_millis(50);
/// A yielding resync pauses after each pull for this many times as long as the pull took.
const YIELD_FACTOR: u32 = 2;
/// But no longer than this: it is never starved.
const LONGEST_YIELD: Duration = Duration::from_millis(5);

/// How hard a resync may work.
#[derive(Clone, Copy, Debug)]
pub struct ResyncLimits {
    /// Pulls under way at a time.
    pub max_inflight: usize,
    /// Most bytes per second; `None` is no limit.
    pub bytes_per_s: Option<u64>,
}

/// What a resync is doing, for operators.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct ResyncStatus {
    /// The member it pulls from.
    pub source: MemberId,
    /// Whether the link to it stands.
    pub linked: bool,
    /// Blocks that are stale or not yet looked at.
    pub blocks_left: u64,
    /// Blocks pulled since it began.
    pub blocks_pulled: u64,
    /// Whether it goes slow in favour of guest writes.
    pub yielding: bool,
    /// The last error.
    pub last_error: Option<String>,
}

#[derive(PartialEq, Eq, Debug)]
enum Link {
    Down { retry_at: Time },
    Connecting,
    Up,
}

struct PullUnderWay {
    chunk: Chunk,
    offset: u64,
    end: u64,
    sent: Time,
    /// For a write that waits; not part of the sweep over its chunk.
    urgent: bool,
}

/// Pulled data on its way to disk.
pub(super) struct Writing {
    chunk: Chunk,
    first: u64,
    end: u64,
}

/// The state of a resync; present from the first [`Kind::Prepare`] on.
pub(super) struct Resync {
    source: MemberId,
    address: Address,
    link: Link,
    prepare: Option<(super::ConnectionId, MessageHeader)>,
    /// What the view of a rejoin will ask for is tried before requests are held for it.
    rehearsal: Option<Rehearsal>,
    /// Maps that are being taken over, with the pages that are still to come.
    handover: Option<Handover>,
    pulls: HashMap<u64, PullUnderWay>,
    next_pull: u64,
    /// Where the sweep is, chunk by chunk, round and round while anything is stale.
    cursor: Chunk,
    busy_chunks: BTreeSet<Chunk>,
    finished: Vec<Chunk>,
    finished_since: Time,
    flush: Option<(IoId, Vec<Chunk>)>,
    next_pull_at: Time,
    last_guest_write: Time,
    reported_done: bool,
    blocks_pulled: u64,
    last_error: Option<String>,
}

/// A page of a map is taken from the source, and the state is made durable: what a rejoin needs, but in small.
struct Rehearsal {
    since: Time,
    has_page: bool,
    is_durable: bool,
}

struct Handover {
    maps: Vec<(MemberId, ChunkMap)>,
    left: usize,
}

impl Replica {
    /// What the resync of this member is doing.
    pub(super) fn resync_status(&self) -> Option<ResyncStatus> {
        let resync = self.resync.as_ref()?;
        Some(ResyncStatus {
            source: resync.source,
            linked: resync.link == Link::Up,
            blocks_left: self.maps.missed(self.member).0,
            blocks_pulled: resync.blocks_pulled,
            yielding: self.now - resync.last_guest_write < GUEST_ACTIVE,
            last_error: resync.last_error.clone(),
        })
    }

    /// The coordinator names the source. Links to it at once, so that the barrier later is short.
    pub(super) fn prepare(&mut self, connection: super::ConnectionId, header: &MessageHeader, body: &[u8]) {
        if self.holder_connection() != Some(connection) || header.epoch != self.epoch || self.attach.is_some()
        {
            return self.answer(connection, header, Kind::PrepareReply, Status::NotAttached, Vec::new());
        }
        let prepare = match crate::wire::Prepare::decode(body) {
            Ok(prepare) => prepare,
            Err(error) => {
                let text = error.to_string().into_bytes();
                return self.answer(connection, header, Kind::PrepareReply, Status::BadRequest, text);
            }
        };
        if let Some(text) = self.refuses_spec(&prepare.spec) {
            return self.answer(
                connection,
                header,
                Kind::PrepareReply,
                Status::BadRequest,
                text.into_bytes(),
            );
        }
        self.drop_resync();
        self.drop_verify();
        self.resync = Some(Resync {
            source: prepare.source,
            address: prepare.address,
            link: Link::Down { retry_at: self.now },
            prepare: Some((connection, *header)),
            rehearsal: None,
            handover: None,
            pulls: HashMap::new(),
            next_pull: 0,
            cursor: Chunk(0),
            busy_chunks: BTreeSet::new(),
            finished: Vec::new(),
            finished_since: self.now,
            flush: None,
            next_pull_at: self.now,
            last_guest_write: Time(0),
            reported_done: false,
            blocks_pulled: 0,
            last_error: None,
        });
        self.pump_resync();
    }

    /// Ends the resync: another begins, or the client is gone. Pulled data that is on its way to disk gets there, and
    /// overlapping writes wait for it all the same.
    pub(super) fn drop_resync(&mut self) {
        if self.resync.take().is_some() {
            self.outputs.push_back(Output::PeerClose);
        }
    }

    /// Fails the guest writes that are held: their client is gone, or fenced.
    pub(super) fn fail_held_writes(&mut self) {
        for io in std::mem::take(&mut self.held) {
            self.disk_done(io, DiskResult::Failed);
        }
    }

    /// The link to the source stands.
    pub(super) fn peer_up(&mut self) {
        let Some(resync) = self.resync.as_mut() else { return };
        resync.link = Link::Up;
        resync.last_error = None;
        if self.view.state(self.member) == Some(MemberState::Syncing) {
            // It is in service, and was told another source.
            if let Some((connection, header)) = resync.prepare.take() {
                self.answer(connection, &header, Kind::PrepareReply, Status::Ok, Vec::new());
            }
        } else if resync.prepare.is_some() {
            resync.rehearsal = Some(Rehearsal { since: self.now, has_page: false, is_durable: false });
            let slot = crate::pool::Slot(self.member.as_u8().into());
            let (epoch, pool) = (self.epoch, self.spec.id);
            // No view has the number zero, so the answer is not taken for that of a handover.
            let ask = MessageHeader { slot, epoch, ..MessageHeader::new(Kind::PullMap, pool) };
            self.outputs.push_back(Output::PeerSend(ask));
            self.persist_state(super::Waiter::Rehearsal(self.session));
        }
        self.unblock_writes();
        self.pump_resync();
    }

    /// The link to the source is gone: what was asked there is asked again.
    pub(super) fn peer_down(&mut self, reason: &str) {
        let retry_at = self.now + RETRY;
        self.report_source(reason);
        let Some(resync) = self.resync.as_mut() else { return };
        resync.link = Link::Down { retry_at };
        resync.last_error = Some(reason.to_owned());
        resync.pulls.clear();
        resync.rehearsal = None;
        resync.busy_chunks = self.pulled_writes.values().map(|w| w.chunk).collect();
        let in_handover = resync.handover.take().is_some();
        if let Some((connection, header)) = resync.prepare.take() {
            let text = format!("member {} at {}: {reason}", resync.source, resync.address);
            self.answer(connection, &header, Kind::PrepareReply, Status::IoError, text.into_bytes());
        }
        if in_handover {
            self.fail_handover(reason);
        }
    }

    /// Tells the coordinator that this source is of no use, so that it may name another one. Until it does, what failed is
    /// tried again here.
    fn report_source(&mut self, reason: &str) {
        let Some(resync) = self.resync.as_ref().filter(|r| r.prepare.is_none()) else { return };
        let (source, is_syncing) =
            (resync.source, self.view.state(self.member) == Some(MemberState::Syncing));
        let Some(connection) = self.holder_connection().filter(|_| is_syncing) else { return };
        let header = MessageHeader {
            slot: crate::pool::Slot(source.as_u8().into()),
            epoch: self.epoch,
            view: self.view.number,
            ..MessageHeader::new(Kind::SourceFailed, self.spec.id)
        };
        let body: String = reason.chars().take(crate::wire::MAX_TEXT / 4).collect();
        let body = body.into_bytes();
        let header = MessageHeader { payload: u32::try_from(body.len()).unwrap_or(u32::MAX), ..header };
        self.outputs.push_back(Output::Send(connection, header, ReplyPayload::Body(body)));
    }

    /// A message of the source.
    pub(super) fn peer_message(&mut self, header: &MessageHeader, body: &[u8]) {
        if self.resync.is_none() && header.kind != Kind::PullReply {
            return;
        }
        match header.kind {
            Kind::PullMapReply => self.map_page(header, body),
            Kind::PullReply => {
                self.pulled(header, body);
                self.outputs.push_back(Output::PullDone(header.sequence.0));
                self.pump_resync();
            }
            kind => {
                self.outputs.push_back(Output::PeerClose);
                self.peer_down(&format!("protocol error: {kind:?} is not expected from a source"));
            }
        }
    }

    /// The coordinator's view makes this member Syncing: takes over the maps of every member that is not Clean in it.
    /// False when that cannot be done now.
    pub(super) fn begin_handover(&mut self, view: &View) -> bool {
        // By now they have the size of the pool as the view has it.
        let chunks = self.maps.chunk_count();
        let pages = ChunkMap::pages_for(chunks);
        let epoch = self.epoch;
        let header =
            MessageHeader { epoch, view: view.number, ..MessageHeader::new(Kind::PullMap, self.spec.id) };
        let Some(resync) = self.resync.as_mut().filter(|r| r.link == Link::Up) else { return false };
        let members: Vec<_> =
            view.members.iter().filter(|m| m.state != MemberState::Clean).map(|m| m.id).collect();
        let members: Vec<_> =
            members.into_iter().filter(|&m| m == self.member || !mutant!(HandoverOfOwnMapOnly)).collect();
        resync.handover = Some(Handover {
            maps: members.iter().map(|m| (*m, ChunkMap::new(chunks))).collect(),
            left: members.len() * pages as usize,
        });
        for member in members {
            for page in 0..pages {
                let slot = crate::pool::Slot(member.as_u8().into());
                let ask = MessageHeader { slot, offset: page.into(), ..header };
                self.outputs.push_back(Output::PeerSend(ask));
            }
        }
        true
    }

    /// A step of the rehearsal is done. With the last one the coordinator hears how long it took.
    fn rehearsed(&mut self, step: impl FnOnce(&mut Rehearsal)) {
        let Some(resync) = self.resync.as_mut() else { return };
        let Some(rehearsal) = resync.rehearsal.as_mut() else { return };
        step(rehearsal);
        if !rehearsal.has_page || !rehearsal.is_durable {
            return;
        }
        let took = u32::try_from((self.now - rehearsal.since).as_micros()).unwrap_or(u32::MAX);
        resync.rehearsal = None;
        if let Some((connection, header)) = resync.prepare.take() {
            let header = MessageHeader { length: took, ..header };
            self.answer(connection, &header, Kind::PrepareReply, Status::Ok, Vec::new());
        }
    }

    /// The state that was written for a rehearsal is durable.
    pub(super) fn rehearsal_durable(&mut self, session: u64) {
        if session == self.session && !self.broken {
            self.rehearsed(|rehearsal| rehearsal.is_durable = true);
        }
    }

    /// The source has answered for a rehearsal; true if it was for that.
    fn rehearsal_page(&mut self, header: &MessageHeader, body: &[u8]) -> bool {
        let Some(resync) = self.resync.as_mut().filter(|r| r.rehearsal.is_some()) else { return false };
        if header.status == Status::Ok && body.len() == MAP_PAGE_BYTES {
            self.rehearsed(|rehearsal| rehearsal.has_page = true);
            return true;
        }
        resync.rehearsal = None;
        if let Some((connection, prepare)) = resync.prepare.take() {
            let text =
                format!("member {} answered {:?} when it was asked for a map", resync.source, header.status);
            self.answer(connection, &prepare, Kind::PrepareReply, Status::IoError, text.into_bytes());
        }
        true
    }

    fn map_page(&mut self, header: &MessageHeader, body: &[u8]) {
        if header.view == crate::pool::ViewNumber(0) && self.rehearsal_page(header, body) {
            return;
        }
        let Some(resync) = self.resync.as_mut() else { return };
        let Some(handover) = resync.handover.as_mut() else { return };
        let pending = self.set_view.as_ref().map(|p| p.view.number);
        if Some(header.view) != pending || header.epoch != self.epoch {
            return; // The answer to a handover that was given up.
        }
        let member = u8::try_from(header.slot.0).ok().and_then(MemberId::new);
        let map = handover.maps.iter_mut().find(|(m, _)| Some(*m) == member).map(|(_, map)| map);
        let bits: Option<&[u8; MAP_PAGE_BYTES]> = body.try_into().ok();
        match (header.status, map, bits) {
            (Status::Ok, Some(map), Some(bits)) => {
                map.load_page(u32::try_from(header.offset).unwrap_or(u32::MAX), bits);
                handover.left -= 1;
                if handover.left == 0 {
                    let maps = resync.handover.take().map(|h| h.maps).unwrap_or_default();
                    for (member, map) in maps {
                        if member == self.member {
                            self.maps.replace(member, map, &mut self.changed);
                        } else {
                            // The view that is pending may have added to it.
                            self.maps.merge(member, &map, &mut self.changed);
                        }
                    }
                    // What was finished is stale again by this record, and is looked at again.
                    resync.finished.clear();
                    resync.flush.iter_mut().for_each(|(_, chunks)| chunks.clear());
                    resync.reported_done = false;
                    self.handover_done();
                }
            }
            (status, _, _) => {
                resync.handover = None;
                self.fail_handover(&format!("the source refused: {status}"));
            }
        }
    }

    /// Starts what is due: the link, pulls, the flush before a report.
    pub(super) fn pump_resync(&mut self) {
        let now = self.now;
        let Some(resync) = self.resync.as_mut() else { return };
        if let Link::Down { retry_at } = resync.link
            && retry_at <= now
        {
            resync.link = Link::Connecting;
            self.outputs.push_back(Output::PeerConnect(resync.address.clone()));
        }
        let is_syncing = self.view.state(self.member) == Some(MemberState::Syncing);
        if !is_syncing || self.view_session != self.session || self.holder_connection().is_none() {
            return;
        }
        self.start_pulls();
        self.start_report();
    }

    /// When [`Replica::pump_resync`] is due next, if a resync is under way.
    pub(super) fn resync_deadline(&self) -> Option<Time> {
        let resync = self.resync.as_ref()?;
        match resync.link {
            Link::Down { retry_at } => Some(retry_at),
            Link::Connecting => None,
            // Nothing is due while nobody listens to reports.
            Link::Up if self.holder_connection().is_none() => None,
            Link::Up if resync.next_pull_at > self.now => Some(resync.next_pull_at),
            Link::Up if !resync.finished.is_empty() && resync.flush.is_none() => {
                Some(resync.finished_since + REPORT_AFTER)
            }
            // Everything else goes on with the next completion.
            Link::Up => None,
        }
    }

    fn start_pulls(&mut self) {
        let (member, limits, now) = (self.member, self.config.resync, self.now);
        loop {
            let Some(resync) = self.resync.as_mut() else { return };
            let yielding = now - resync.last_guest_write < GUEST_ACTIVE;
            // On a busy machine a pull waits for a processor more often than for anything else: one at a time would crawl.
            let most = if yielding { limits.max_inflight.div_ceil(2) } else { limits.max_inflight };
            let waiting = resync.pulls.values().filter(|p| !p.urgent).count();
            // Data on its way to disk counts as well: the disk is what may be slow.
            if resync.link != Link::Up
                || waiting + self.pulled_writes.len() >= most
                || now < resync.next_pull_at
            {
                return;
            }
            let Some(map) = self.maps.dirty_chunks(member) else { return };
            let free = |c: &Chunk| !resync.busy_chunks.contains(c);
            let next = map.iter_from(resync.cursor).find(free).or_else(|| map.iter().find(free));
            let Some(chunk) = next else { return };
            resync.cursor = chunk.next();
            resync.busy_chunks.insert(chunk);
            let size = self.spec.chunk_size.bytes();
            let offset = chunk.0 * size;
            self.send_pull(chunk, offset, (offset + size).min(self.spec.size), false);
        }
    }

    fn send_pull(&mut self, chunk: Chunk, offset: u64, end: u64, urgent: bool) {
        let Some(resync) = self.resync.as_mut() else { return };
        resync.next_pull += 1;
        let tag = resync.next_pull;
        resync.pulls.insert(tag, PullUnderWay { chunk, offset, end, sent: self.now, urgent });
        let header = MessageHeader {
            slot: crate::pool::Slot(self.member.as_u8().into()),
            epoch: self.epoch,
            view: self.view.number,
            sequence: crate::pool::Sequence(tag),
            offset,
            length: u32::try_from(end - offset).unwrap_or(PullReply::MAX_RANGE).min(PullReply::MAX_RANGE),
            ..MessageHeader::new(Kind::Pull, self.spec.id)
        };
        self.outputs.push_back(Output::PeerSend(header));
    }

    /// The source's answer: the blocks of the range that are missed, with their data.
    fn pulled(&mut self, header: &MessageHeader, body: &[u8]) {
        let now = self.now;
        let Some(resync) = self.resync.as_mut() else { return };
        let Some(pull) = resync.pulls.remove(&header.sequence.0) else { return };
        let covered =
            pull.offset.checked_add(header.length.into()).filter(|&end| end <= pull.end && end > pull.offset);
        let reply = PullReply::decode(body);
        let (Status::Ok, Ok(reply), Some(covered)) = (header.status, reply, covered) else {
            let reason = format!("pull of chunk {} failed at the source: {}", pull.chunk, header.status);
            resync.busy_chunks.remove(&pull.chunk);
            if header.status == Status::StaleView {
                // The view is durable here before it is there; both are about to have it.
                resync.next_pull_at = now + SOURCE_BEHIND;
                return;
            }
            resync.next_pull_at = now + RETRY;
            // Its disk failed: another member may have what is missed. Every other refusal passes.
            if header.status == Status::IoError {
                self.report_source(&reason);
            }
            if let Some(resync) = self.resync.as_mut() {
                resync.last_error = Some(reason);
            }
            return;
        };
        self.pace(now - pull.sent, reply.data_bytes() as u64);
        let missed: Vec<Block> =
            reply.blocks.iter().map(|(b, _)| Block(pull.offset / BLOCK_SIZE + u64::from(*b))).collect();
        // What the source does not have on record as missed is current here.
        let own: Vec<Block> = self.maps.missed_in(self.member, pull.offset, covered - pull.offset).collect();
        for block in own.into_iter().filter(|b| missed.binary_search(b).is_err()) {
            self.maps.clear(
                ClearTarget::Block(self.member, block),
                ClearReason::NotMissed,
                &mut self.changed,
            );
        }
        self.write_pulled(header.sequence.0, &pull, &reply, &missed);
        if covered < pull.end {
            self.send_pull(pull.chunk, covered, pull.end, pull.urgent);
        }
        self.finish_chunk(pull.chunk);
        self.unblock_writes();
    }

    /// Writes those pulled blocks that are still stale and that no guest write is about to cover.
    fn write_pulled(&mut self, number: u64, pull: &PullUnderWay, reply: &PullReply, missed: &[Block]) {
        // An urgent pull and the sweep over its chunk may both bring a block.
        let mut busy: Vec<(u64, u64)> = self.writes_under_way(pull.offset, pull.end);
        if mutant!(PulledOverGuestWrite) {
            busy.clear();
        }
        let pulled = self.pulled_writes.values().map(|w| (w.first, w.end));
        busy.extend(pulled.filter(|(first, end)| *first < pull.end && pull.offset < *end));
        let is_busy = |block: Block| {
            let (start, end) = (block.0 * BLOCK_SIZE, (block.0 + 1) * BLOCK_SIZE);
            busy.iter().any(|(first, last)| *first < end && start < *last)
        };
        let stale = self.maps.dirty_blocks(self.member);
        let is_stale = |block: Block| stale.is_some_and(|map| map.contains(block));
        // Blocks with their data's place, in the order of both.
        let (mut full, mut zeroes, mut from) = (Vec::with_capacity(missed.len()), Vec::new(), 0);
        for (&block, (_, is_zero)) in missed.iter().zip(&reply.blocks) {
            let is_wanted = is_stale(block) && !is_busy(block);
            match (is_zero, is_wanted) {
                (true, true) => zeroes.push(block),
                (false, true) => full.push((block, from)),
                (_, false) => {}
            }
            from += if *is_zero { 0 } else { BLOCK_BYTES };
        }
        let blocks: Vec<Block> = full.iter().map(|(block, _)| *block).collect();
        let mut rest = &full[..];
        for (first, count) in runs(&blocks) {
            // With the blocks, their data is in a row.
            let (run, after) = rest.split_at(usize::try_from(count).unwrap_or(usize::MAX).min(rest.len()));
            rest = after;
            self.write_run(pull.chunk, first, count, run.first().map(|(_, from)| (number, *from)));
        }
        for (first, count) in runs(&zeroes) {
            self.write_run(pull.chunk, first, count, None);
        }
    }

    /// Writes blocks in a row: data of a pull from a place in it on, or makes them a hole.
    fn write_run(&mut self, chunk: Chunk, first: Block, count: u64, data: Option<(u64, u32)>) {
        let zeroes =
            if mutant!(ZeroesWritten) { DiskOperation::WriteZeroes } else { DiskOperation::ZeroPulled };
        let operation = data.map_or(zeroes, |_| DiskOperation::WritePulled);
        let io = self.insert_own(operation);
        let offset = first.0 * BLOCK_SIZE;
        let length = u32::try_from(count * BLOCK_SIZE).unwrap_or(u32::MAX);
        let writing = Writing { chunk, first: offset, end: offset + u64::from(length) };
        self.pulled_writes.insert(io, writing);
        self.outputs.push_back(match data {
            Some((pull, from)) => Output::WritePulled { io, pull, from, offset, length },
            None => Output::Disk { io, operation, offset, length },
        });
    }

    /// True if the disk request was for pulled data.
    pub(super) fn pulled_written(&mut self, io: IoId, result: DiskResult) -> bool {
        let Some(writing) = self.pulled_writes.remove(&io) else { return false };
        if result == DiskResult::Done || mutant!(FreshWhenPullFailed) {
            let blocks = writing.first / BLOCK_SIZE..writing.end / BLOCK_SIZE;
            let count = blocks.end - blocks.start;
            if let Some(resync) = self.resync.as_mut() {
                resync.blocks_pulled += count;
            }
            self.counters.pulled_in_blocks += count;
            for block in blocks.map(Block) {
                self.maps.clear(
                    ClearTarget::Block(self.member, block),
                    ClearReason::Pulled,
                    &mut self.changed,
                );
                self.flushes.note_fresh(block);
            }
        } else if let Some(resync) = self.resync.as_mut() {
            resync.last_error = Some("the disk failed to write pulled data".into());
            resync.next_pull_at = self.now + RETRY;
        }
        self.finish_chunk(writing.chunk);
        self.unblock_writes();
        self.pump_resync();
        true
    }

    /// Ends the work on a chunk when nothing of it is under way: it is finished, or comes again with the next sweep.
    fn finish_chunk(&mut self, chunk: Chunk) {
        let Some(resync) = self.resync.as_mut() else { return };
        let is_under_way = resync.pulls.values().any(|p| p.chunk == chunk)
            || self.pulled_writes.values().any(|w| w.chunk == chunk);
        if is_under_way {
            return;
        }
        resync.busy_chunks.remove(&chunk);
        if self.maps.dirty_chunks(self.member).is_some_and(|map| map.contains(chunk)) {
            return;
        }
        self.note_finished(chunk);
    }

    fn note_finished(&mut self, chunk: Chunk) {
        let now = self.now;
        let Some(resync) = self.resync.as_mut() else { return };
        if resync.finished.is_empty() {
            resync.finished_since = now;
        }
        resync.finished.push(chunk);
        resync.reported_done = false;
        self.persist_cleared();
    }

    /// Slows down: by the configured rate, and in favour of guest writes.
    fn pace(&mut self, took: Duration, bytes: u64) {
        let (now, limit) = (self.now, self.config.resync.bytes_per_s);
        let Some(resync) = self.resync.as_mut() else { return };
        if now - resync.last_guest_write < GUEST_ACTIVE {
            let pause = (took * YIELD_FACTOR).min(LONGEST_YIELD);
            resync.next_pull_at = resync.next_pull_at.max(now + pause);
        }
        if let Some(limit) = limit {
            let nanos = bytes.saturating_mul(1_000_000_000) / limit.max(1);
            resync.next_pull_at = resync.next_pull_at.max(now) + Duration::from_nanos(nanos);
        }
    }

    /// Flushes finished chunks, so that they may be reported.
    fn start_report(&mut self) {
        let stale = self.maps.missed(self.member).0;
        let now = self.now;
        let Some(resync) = self.resync.as_mut() else { return };
        let is_due = resync.finished.len() >= REPORT_CHUNKS || now - resync.finished_since >= REPORT_AFTER;
        let is_done = stale == 0 && resync.pulls.is_empty() && self.pulled_writes.is_empty();
        let has_news = !resync.finished.is_empty() && is_due || is_done && !resync.reported_done;
        if resync.flush.is_some() || !has_news {
            return;
        }
        let most = resync.finished.len().min(ChunkList::MAX_CHUNKS);
        let chunks: Vec<_> = resync.finished.drain(..most).collect();
        let io = self.own_flush();
        if let Some(resync) = self.resync.as_mut() {
            resync.flush = Some((io, chunks));
        }
        if mutant!(ReportBeforeFlush) {
            self.report_flushed(io, Status::Ok);
        }
    }

    /// A view was adopted. When this member was to be promoted, and a view with another loss came first, nobody remembers what
    /// it reported.
    pub(super) fn report_again(&mut self) {
        if let Some(resync) = self.resync.as_mut() {
            resync.reported_done = false;
        }
        self.pump_resync();
    }

    /// The flush before a report, if it is under way.
    pub(super) fn report_flush(&self) -> Option<IoId> {
        self.resync.as_ref()?.flush.as_ref().map(|(io, _)| *io)
    }

    /// True if the flush was that before a report.
    pub(super) fn report_flushed(&mut self, io: IoId, status: Status) -> bool {
        let (member, stale) = (self.member, self.maps.missed(self.member).0);
        let Some(resync) = self.resync.as_mut() else { return false };
        let Some((_, chunks)) = resync.flush.take_if(|(flush, _)| *flush == io) else { return false };
        if status != Status::Ok && !mutant!(ReportAfterFailedFlush) {
            // They are stale again, by `distrust`.
            resync.last_error = Some("the disk failed to flush pulled data".into());
            if mutant!(ResyncFlushRepeated) {
                resync.finished.extend(chunks);
                resync.finished_since = self.now + RETRY;
            }
            return true;
        }
        // What is under way may have been written after the flush began, or not at all.
        let under_way = resync.pulls.len() + self.pulled_writes.len();
        let left = stale + (resync.finished.len() + under_way) as u64;
        resync.reported_done = left == 0;
        if let Some(connection) = self.holder_connection() {
            let body = ChunkList { member, blocks_left: left, chunks }.encode();
            let header = MessageHeader {
                epoch: self.epoch,
                view: self.view.number,
                payload: u32::try_from(body.len()).unwrap_or(u32::MAX),
                ..MessageHeader::new(Kind::ChunksDone, self.spec.id)
            };
            self.outputs.push_back(Output::Send(connection, header, ReplyPayload::Body(body)));
        }
        self.pump_resync();
        true
    }

    /// Whether a guest write must wait: for the rest of a stale block that it covers in part, or for pulled data that is
    /// being written to its range. It is then held, and started when it may go.
    pub(super) fn holds_write(&mut self, io: IoId, offset: u64, length: u64) -> bool {
        let now = self.now;
        if let Some(resync) = self.resync.as_mut() {
            resync.last_guest_write = now;
        }
        if self.maps.missed(self.member).0 == 0 && self.pulled_writes.is_empty() {
            return false;
        }
        let end = offset + length;
        let edges = [offset, end].into_iter().filter(|edge| !edge.is_multiple_of(BLOCK_SIZE));
        let wanted: BTreeSet<Block> = edges
            .map(|edge| Block(edge / BLOCK_SIZE))
            .filter(|b| self.maps.dirty_blocks(self.member).is_some_and(|m| m.contains(*b)))
            .filter(|_| !mutant!(PartialWriteNotHeld))
            .filter(|_| !mutant!(FreshWhenPartlyWritten))
            .collect();
        let overlaps = self.pulled_writes.values().any(|w| w.first < end && offset < w.end)
            && !mutant!(GuestWriteOverPulled);
        if wanted.is_empty() && !overlaps {
            return false;
        }
        self.held.push_back(io);
        for block in wanted {
            let (from, to) = (block.0 * BLOCK_SIZE, (block.0 + 1) * BLOCK_SIZE);
            let Some(resync) = self.resync.as_ref().filter(|r| r.link == Link::Up) else { break };
            let is_asked = resync.pulls.values().any(|p| p.urgent && p.offset == from)
                || self.pulled_writes.values().any(|w| w.first <= from && to <= w.end);
            if !is_asked {
                self.send_pull(self.spec.chunk_size.chunk_of_block(block), from, to, true);
            }
        }
        true
    }

    fn unblock_writes(&mut self) {
        for io in std::mem::take(&mut self.held) {
            self.start_io(io);
        }
    }

    /// A guest write was carried out: the blocks that it covers whole are current.
    pub(super) fn note_written(&mut self, offset: u64, length: u64) {
        let member = self.member;
        if self.maps.missed(member).0 == 0 {
            return;
        }
        let blocks = if mutant!(FreshWhenPartlyWritten) {
            offset / BLOCK_SIZE..(offset + length).div_ceil(BLOCK_SIZE)
        } else {
            offset.div_ceil(BLOCK_SIZE)..(offset + length) / BLOCK_SIZE
        };
        let mut chunks = BTreeSet::new();
        for block in blocks.map(Block) {
            self.maps.clear(ClearTarget::Block(member, block), ClearReason::Overwritten, &mut self.changed);
            self.flushes.note_fresh(block);
            chunks.insert(self.spec.chunk_size.chunk_of_block(block));
        }
        for chunk in chunks {
            let is_busy = self.resync.as_ref().is_none_or(|r| r.busy_chunks.contains(&chunk));
            let is_stale = self.maps.dirty_chunks(member).is_some_and(|map| map.contains(chunk));
            if !is_busy && !is_stale && self.changed.iter().any(|p| p.map == crate::map::MapId::Dirty(member))
            {
                self.note_finished(chunk);
            }
        }
    }
}
