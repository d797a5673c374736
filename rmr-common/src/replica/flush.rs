//! Flushes of the disk, and what a failed one means.
//!
//! A kernel reports a failed write-back once and counts the pages as written; so do many devices. A flush that is repeated
//! after a failure succeeds and proves nothing. Therefore a failed flush counts as a power cut of this member at that moment:
//!
//! * the session ends, so the client records what the member had not flushed as missed;
//! * the slot table counts as lost, so a client that attaches next goes by the intent map;
//! * the superblock says so until a view of a later session is committed, so a new process says it as well;
//! * blocks that became current since the last good flush are stale again, and the member is no source.
//!
//! One flush is under way at a time. Requests that arrive meanwhile share the next one. A failure is then known before any
//! flush that it could belong to is believed.

use super::io::Io;
use super::{DiskOperation, DiskResult, IoId, Notice, Output, Replica, ReplyPayload, Waiter};
use crate::map::BlockMap;
use crate::pool::{Block, MemberSet, MemberState, PoolSpec};
use crate::wire::{Kind, MessageHeader, Status};

/// The flush under way, and the requests for flushes.
pub(super) struct Flushes {
    /// The requests that the flush under way answers. The first one names it at the disk.
    running: Vec<IoId>,
    /// The requests that arrived since, which share the next flush.
    waiting: Vec<IoId>,
    /// Stale blocks that became current since the last flush began.
    fresh: BlockMap,
    /// Stale blocks that became current before the flush under way began, and after the last good one.
    flushing: BlockMap,
}

impl Flushes {
    pub(super) fn new(spec: &PoolSpec) -> Self {
        let map = || BlockMap::new(spec.block_count());
        Self { running: Vec::new(), waiting: Vec::new(), fresh: map(), flushing: map() }
    }

    /// The pool has another size.
    pub(super) fn resize(&mut self, spec: &PoolSpec) {
        for map in [&mut self.fresh, &mut self.flushing] {
            map.remove_range(Block(spec.block_count()), u64::MAX);
            map.resize(spec.block_count());
        }
    }

    /// A block that was stale is current here, and not flushed.
    pub(super) fn note_fresh(&mut self, block: Block) {
        self.fresh.insert(block);
    }
}

impl Replica {
    /// Starts a flush of the replica's own.
    pub(super) fn own_flush(&mut self) -> IoId {
        let session = self.session;
        let operation = DiskOperation::Flush;
        let id = self.insert_io(Io { request: None, session, operation, started: false, awaited: 0 });
        self.start_flush(id);
        id
    }

    /// A request for a flush, which goes to the disk when the flush under way has ended.
    pub(super) fn start_flush(&mut self, id: IoId) {
        self.flushes.waiting.push(id);
        self.next_flush();
    }

    fn next_flush(&mut self) {
        if !self.flushes.running.is_empty() {
            return;
        }
        let (session, broken) = (self.session, self.broken);
        let mut refused = Vec::new();
        let mut running = std::mem::take(&mut self.flushes.waiting);
        running.retain(|id| {
            let io = self.ios.get_mut(id.0 as usize).and_then(Option::as_mut);
            let is_live = io.is_some_and(|io| {
                io.started = io.session == session && !broken;
                io.started
            });
            if !is_live {
                refused.push(*id);
            }
            is_live
        });
        if let Some(&io) = running.first() {
            self.flushes.running = running;
            let Flushes { fresh, flushing, .. } = &mut self.flushes;
            flushing.append(fresh);
            let operation = DiskOperation::Flush;
            self.outputs.push_back(Output::Disk { io, operation, offset: 0, length: 0 });
        }
        // Its client is fenced by now, or metadata cannot be written. The disk was not asked, so nothing is known of it.
        refused.into_iter().for_each(|id| self.answer_flush(id, Status::IoError));
    }

    /// True if the disk request was the flush under way.
    pub(super) fn flush_ended(&mut self, id: IoId, result: DiskResult) -> bool {
        if self.flushes.running.first() != Some(&id) {
            return false;
        }
        let mut answered = std::mem::take(&mut self.flushes.running);
        let status = match result {
            DiskResult::Done => Status::Ok,
            DiskResult::NoSpace => Status::NoSpace,
            DiskResult::Failed => Status::IoError,
        };
        if status == Status::Ok {
            self.flushes.flushing.clear();
            answered.into_iter().for_each(|id| self.answer_flush(id, status));
        } else if self.believes_failed(&answered) {
            answered.into_iter().for_each(|id| self.answer_flush(id, status));
        } else {
            // A repetition of this flush would prove nothing to those that wait for the next one.
            answered.append(&mut self.flushes.waiting);
            let purpose = self.purpose(&answered);
            self.distrust(purpose);
            answered.into_iter().for_each(|id| self.answer_flush(id, status));
            self.end_session();
        }
        self.next_flush();
        true
    }

    /// What a flush was for, in words.
    fn purpose(&self, flush: &[IoId]) -> &'static str {
        let is_its = |io: Option<IoId>| io.is_some_and(|io| flush.contains(&io));
        let is_request = |io: &IoId| {
            self.ios.get(io.0 as usize).is_some_and(|io| io.as_ref().is_some_and(|io| io.request.is_some()))
        };
        if is_its(self.attach_flush()) {
            "before the answer to an attach"
        } else if is_its(self.detach.as_ref().and_then(|d| d.flush)) {
            "before the answer to a detach"
        } else if flush.iter().any(is_request) {
            "requested by the client"
        } else if is_its(self.report_flush()) {
            "before resynchronised chunks are reported"
        } else {
            "before intents are cleared"
        }
    }

    /// The mistakes of a member that repeats a failed flush and believes it.
    fn believes_failed(&self, flush: &[IoId]) -> bool {
        let is_its = |io: Option<IoId>| io.is_some_and(|io| flush.first() == Some(&io));
        if mutant!(OwnFlushRepeated) {
            return is_its(self.clearing.as_ref().map(|(io, _)| *io));
        }
        if mutant!(AttachFlushRepeated) {
            return self.attach.is_some();
        }
        if mutant!(ResyncFlushRepeated) {
            return is_its(self.report_flush());
        }
        if mutant!(ReportAfterFailedFlush) {
            return is_its(self.report_flush());
        }
        false
    }

    /// A flush failed: nothing is known of what the disk had answered and not flushed.
    fn distrust(&mut self, purpose: &'static str) {
        self.counters.failed_flushes += 1;
        self.flush_failed = true;
        self.tables_lost |= !mutant!(FailedFlushKeepsTable);
        self.clean_detach = false;
        // A source would hand out what it may have lost.
        self.distrusted = true;
        self.clearing = None;
        let Flushes { fresh, flushing, .. } = &mut self.flushes;
        flushing.append(fresh);
        if self.view.state(self.member) == Some(MemberState::Syncing) {
            let own = MemberSet::only(self.member);
            for (offset, length) in self.flushes.flushing.ranges() {
                self.maps.set_dirty(own, offset, length, &mut self.changed);
            }
            self.persist_cleared();
        }
        self.flushes.flushing.clear();
        self.persist_mark();
        self.notice(Notice::FlushFailed(purpose));
    }

    /// Writes down for the next process whether a flush failed. Without working metadata there is no use in it.
    pub(super) fn persist_mark(&mut self) {
        if !self.broken {
            self.persist_state(Waiter::Nobody);
        }
    }

    /// Lets the client know that it has lost this leg. One that is attaching is answered as any other, with a lost table.
    fn end_session(&mut self) {
        if self.attach.is_some() || mutant!(FailedFlushKeepsSession) {
            return;
        }
        let Some(connection) = self.holder_connection() else { return };
        let header = MessageHeader { epoch: self.epoch, ..MessageHeader::new(Kind::Goodbye, self.spec.id) };
        let header = header.reply(Kind::Goodbye, Status::IoError);
        self.outputs.push_back(Output::Send(connection, header, ReplyPayload::None));
        self.outputs.push_back(Output::Close(connection, "a flush failed"));
        self.closed(connection);
    }

    /// Ends one request for a flush.
    fn answer_flush(&mut self, id: IoId, status: Status) {
        let Some(io) = self.ios.get_mut(id.0 as usize).and_then(Option::take) else { return };
        self.free_ios.push(id.0);
        match io.request {
            None => self.own_flush_done(id, status),
            Some((connection, header)) => self.request_done(id, connection, &header, status),
        }
    }
}
