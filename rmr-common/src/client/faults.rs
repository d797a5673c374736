//! Legs whose disks are at fault: the range that a leg could not read, and another one could, or in which a verify found it
//! wrong, is marked stale on it; and a leg whose disk fails reads again and again is left out.
//!
//! The leg leaves the view with exactly that range on record, and comes back by the usual rejoin: resync then writes the
//! range anew, which is what makes a disk give up a bad sector. Its link stays up. So that no answer of it touches memory
//! of a request that is over, and so that errors which come together are one view change, requests are held back before the
//! step until nothing is in flight to it.

use std::collections::VecDeque;
use std::time::Duration;

use super::Client;
use crate::pool::{BLOCK_SIZE, Cause, MAX_MEMBERS, MemberId, MemberSet, MemberState, View};
use crate::time::Time;
use crate::wire::DirtyAddition;

/// Errors older than this do not count towards [`super::Config::read_error_limit`].
const WINDOW: Duration = Duration::from_secs(3600);

/// What is known of the disks behind the legs since the attachment.
#[derive(Default)]
pub(super) struct Faults {
    legs: [LegFaults; MAX_MEMBERS],
    /// Those that have ranges: asked for with each request.
    bad: MemberSet,
    /// The leg that is about to leave the view; requests are held back for it.
    leaving: Option<MemberId>,
    /// Legs that a verify wants repaired, which leave together; requests are held back for them.
    expelled: MemberSet,
}

#[derive(Default)]
struct LegFaults {
    /// Reads that the leg failed, since the client started.
    errors: u64,
    /// What it could not read and another leg could, and no committed view has on record yet.
    ranges: Vec<(u64, u64)>,
    /// How many of `ranges` the view under way brings.
    told: usize,
    /// When it left the view for that.
    left: VecDeque<Time>,
    /// Why it is not brought back in.
    excluded: Option<String>,
}

impl Faults {
    fn leg(&self, member: MemberId) -> &LegFaults {
        &self.legs[member.index()]
    }

    fn leg_mut(&mut self, member: MemberId) -> &mut LegFaults {
        &mut self.legs[member.index()]
    }

    /// Whether requests are held back until a leg can leave the view.
    pub(super) const fn holds_requests(&self) -> bool {
        self.leaving.is_some() || self.is_expelling()
    }

    /// Whether legs that a verify wants repaired are still to leave.
    pub(super) const fn is_expelling(&self) -> bool {
        !self.expelled.is_empty()
    }

    pub(super) fn count(&mut self, member: MemberId) {
        self.leg_mut(member).errors += 1;
    }

    pub(super) fn errors(&self, member: MemberId) -> u64 {
        self.leg(member).errors
    }

    /// Why a member is not brought back in, if it is not.
    pub(super) fn excluded(&self, member: MemberId) -> Option<&str> {
        self.leg(member).excluded.as_deref()
    }

    /// Some ranges are not to be remembered any more.
    fn note_bad(&mut self) {
        self.bad = MemberId::all().filter(|&m| !self.leg(m).ranges.is_empty()).collect();
    }

    /// What a view that is proposed has to say of members that are not Clean in it.
    pub(super) fn tell(&mut self, next: &View, additions: &mut Vec<DirtyAddition>) {
        self.legs.iter_mut().for_each(|leg| leg.told = 0);
        for member in self.bad.iter() {
            if next.state(member).is_none_or(|s| s == MemberState::Clean) {
                continue;
            }
            let leg = self.leg_mut(member);
            leg.told = leg.ranges.len();
            let members = MemberSet::only(member);
            additions.extend(leg.ranges.iter().map(|&(offset, length)| DirtyAddition {
                members,
                offset,
                length,
            }));
        }
    }

    /// The view is committed. The first one of an attachment begins with nothing known.
    pub(super) fn committed(&mut self, view: &View, attach: bool) {
        for leg in &mut self.legs {
            if attach {
                // One that is left out stays out: only an operator knows that its disk is well again.
                let (left, excluded) = (std::mem::take(&mut leg.left), leg.excluded.take());
                *leg = LegFaults { errors: leg.errors, left, excluded, ..LegFaults::default() };
            }
            leg.ranges.drain(..leg.told.min(leg.ranges.len()));
            leg.told = 0;
        }
        self.note_bad();
        self.leaving = self.leaving.filter(|&m| !attach && view.clean().contains(m));
        self.expelled = if attach { MemberSet::EMPTY } else { self.expelled.intersection(view.clean()) };
    }

    /// The member is gone, or has another store.
    pub(super) fn forget(&mut self, member: MemberId) {
        *self.leg_mut(member) = LegFaults::default();
        self.bad.remove(member);
        self.leaving = self.leaving.filter(|m| *m != member);
    }

    /// An operator brings the member back in, whatever its disk did.
    pub(super) fn pardon(&mut self, member: MemberId) {
        let leg = self.leg_mut(member);
        leg.excluded = None;
        leg.left.clear();
    }

    /// The attachment is over.
    pub(super) fn forget_leaving(&mut self) {
        self.leaving = None;
        self.expelled = MemberSet::EMPTY;
    }
}

impl Client {
    /// A verify found these members wrong in these ranges: they leave the view with them on record.
    pub(super) fn expel(&mut self, members: MemberSet, ranges: &[DirtyAddition]) {
        for range in ranges {
            range.members.iter().for_each(|m| self.note_bad_range(m, range.offset, range.length));
        }
        self.faults.expelled = members;
        self.try_leave();
    }

    /// Another leg has served a range that this one could not read.
    pub(super) fn note_bad_range(&mut self, member: MemberId, offset: u64, length: u64) {
        let size = self.spec.as_ref().map_or(0, |s| s.size);
        let start = offset / BLOCK_SIZE * BLOCK_SIZE;
        let end = (offset + length).next_multiple_of(BLOCK_SIZE).min(size);
        let range = (start, end - start);
        let leg = self.faults.leg_mut(member);
        if !leg.ranges[leg.told..].contains(&range) {
            leg.ranges.push(range);
        }
        self.faults.bad.insert(member);
    }

    /// Lets a leg with unreadable ranges leave the view, once nothing is in flight to it.
    pub(super) fn try_leave(&mut self) {
        let bad = self.faults.bad;
        if bad.is_empty() || !self.is_active() {
            return;
        }
        let clean = self.view_clean();
        if clean.without(bad).is_empty() {
            // Nobody would be left whose disk is known to be good. The reads go on to be repeated; whichever leg is found
            // to be the only bad one is seen to.
            return self.give_up_leaving(bad);
        }
        let expelled = self.faults.expelled.intersection(clean);
        if !expelled.is_empty() {
            let is_awaited = expelled.iter().any(|m| self.parts.is_awaited_from(m));
            if !self.is_rejoin_quiescing() && !self.parts.has_sent_write() && !is_awaited {
                self.faults.expelled = MemberSet::EMPTY;
                expelled.iter().for_each(|m| self.health.blame(m, Cause::Differs));
                self.lose(expelled, "a verify found blocks in which it is wrong");
            }
            return;
        }
        let Some(member) = self.faults.leaving.or_else(|| bad.intersection(clean).iter().next()) else {
            return;
        };
        // One barrier at a time.
        if self.is_rejoin_quiescing() || self.is_command_quiescing() {
            return;
        }
        self.faults.leaving = Some(member);
        if self.parts.has_sent_write() || self.parts.is_awaited_from(member) {
            return;
        }
        self.faults.leaving = None;
        let (now, limit) = (self.now, self.config.read_error_limit);
        let leg = self.faults.leg_mut(member);
        leg.left.push_back(now);
        while leg.left.front().is_some_and(|&at| now - at > WINDOW) {
            leg.left.pop_front();
        }
        let times = leg.left.len();
        let mut reason = format!("its disk failed reads that another copy served ({} so far)", leg.errors);
        if times > usize::try_from(limit).unwrap_or(usize::MAX) {
            reason = format!(
                "its disk failed reads {times} times within an hour, {limit} are allowed: it is left out until an operator \
                 brings it back"
            );
            leg.excluded = Some(reason.clone());
        }
        let cause = if leg.excluded.is_some() { Cause::ReadErrorLimit } else { Cause::ReadErrors };
        self.health.blame(member, cause);
        self.lose(MemberSet::only(member), &reason);
    }

    fn give_up_leaving(&mut self, members: MemberSet) {
        for member in members.iter() {
            self.faults.leg_mut(member).ranges.clear();
            self.faults.leg_mut(member).told = 0;
        }
        self.faults.note_bad();
        let was_held = self.faults.holds_requests();
        self.faults.forget_leaving();
        if was_held {
            self.resume_requests();
        }
    }
}
