//! Writes that were completed and not flushed, when machines lose their power, and when disks fail a flush.
//!
//! A node whose process is started anew still has them: the kernel below it does. One whose machine was started anew, as its
//! host boot id tells, may have lost them; so may one that says that a flush failed. Where another Clean member kept them, it is stale for them, like any that missed
//! something. Where all lost them, nobody has them: from then on every request fails until whoever uses the pool says that it
//! knows. A guest that would go on without a word would find its file system older than what it was promised.

use super::{Client, IoError, Notice, Output};
use crate::pool::{MemberId, MemberSet, View};

impl Client {
    /// Notes the machines' runs under which writes are made from now on. What a member lost before is on record by now.
    pub(super) fn note_host_boots(&mut self) {
        self.failed_flushes = MemberSet::EMPTY;
        let active = self.view_active();
        for member in MemberId::all() {
            let boot = self.ready(member).filter(|_| active.contains(member)).map(|r| r.host_boot);
            self.host_boots[member.index()] = boot;
        }
    }

    /// A member said that its disk failed a flush.
    pub(super) fn note_failed_flush(&mut self, member: MemberId) {
        self.failed_flushes.insert(member);
    }

    fn has_unflushed(&self) -> bool {
        self.unflushed.count() + self.flushing.count() > 0
    }

    /// The active members of a view that may have lost what was not flushed: their machines were started anew since it was
    /// written, or their disks `failed` a flush.
    pub(super) fn lost_caches(&self, view: &View, failed: MemberSet) -> MemberSet {
        if !self.has_unflushed() {
            return MemberSet::EMPTY;
        }
        let is_another_run = |m: &MemberId| {
            let before = self.host_boots[m.index()];
            before.is_some() && self.ready(*m).is_some_and(|r| Some(r.host_boot) != before)
        };
        let restarted: MemberSet = view.active().iter().filter(is_another_run).collect();
        let failed = failed.union(self.failed_flushes).intersection(view.active());
        restarted.without(self.left_flushed).union(failed).without(self.write_through)
    }

    /// Nobody has the unflushed writes any more: nothing is served until that is acknowledged.
    pub(super) fn lose_writes(&mut self, members: MemberSet) {
        if !self.lost_writes {
            self.lost_writes = true;
            self.notice(Notice::LostWrites(members, self.unflushed.count() + self.flushing.count()));
        }
        self.abandon_all(IoError::LostWrites);
    }

    /// Whether writes were lost that had completed, which nobody has acknowledged yet.
    #[must_use]
    pub const fn has_lost_writes(&self) -> bool {
        self.lost_writes
    }

    /// Whoever uses the pool knows that writes were lost, and starts from what is there: requests are served again.
    pub fn acknowledge_loss(&mut self) {
        if !std::mem::take(&mut self.lost_writes) {
            return;
        }
        self.unflushed.clear();
        if self.flush.is_none() {
            self.flushing.clear();
        }
    }

    /// Refuses a request while a loss is not acknowledged.
    pub(super) fn refuse_after_loss(&mut self, token: super::Token) -> bool {
        if self.lost_writes {
            self.counters.failed += 1;
            self.outputs.push_back(Output::Complete(token, Err(IoError::LostWrites)));
        }
        self.lost_writes
    }
}
