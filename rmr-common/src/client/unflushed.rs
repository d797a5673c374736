//! Writes that were completed and not flushed, when machines lose their power.
//!
//! A node whose process is started anew still has them: the kernel below it does. One whose machine was started anew, as its
//! host boot id tells, may have lost them. Where another Clean member kept them, it is stale for them, like any that missed
//! something. Where all lost them, nobody has them: from then on every request fails until whoever uses the pool says that it
//! knows. A guest that would go on without a word would find its file system older than what it was promised.

use super::{Client, IoError, Notice, Output};
use crate::pool::{MemberId, MemberSet, View};

impl Client {
    /// Notes the machines' runs under which writes are made from now on.
    pub(super) fn note_host_boots(&mut self) {
        let active = self.view_active();
        for member in MemberId::all() {
            let boot = self.ready(member).filter(|_| active.contains(member)).map(|r| r.host_boot);
            self.host_boots[member.index()] = boot;
        }
    }

    fn has_unflushed(&self) -> bool {
        self.unflushed.count() + self.flushing.count() > 0
    }

    /// The active members of a view that may have lost what was not flushed: their machines were started anew since it was
    /// written.
    pub(super) fn lost_caches(&self, view: &View) -> MemberSet {
        if !self.has_unflushed() {
            return MemberSet::EMPTY;
        }
        let is_another_run = |m: &MemberId| {
            let before = self.host_boots[m.index()];
            before.is_some() && self.ready(*m).is_some_and(|r| Some(r.host_boot) != before)
        };
        view.active()
            .without(self.write_through)
            .without(self.left_flushed)
            .iter()
            .filter(is_another_run)
            .collect()
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
