//! The operator's override of the recovery rule: to go on with one member, whatever it has. It makes a branch of the pool of
//! which other members may know nothing, and the epochs of such branches have to be comparable all the same.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Client, Notice, recovery};
use crate::pool::{MemberId, MemberSet, PoolSpec, View, ViewStep};
use crate::wire::DirtyAddition;

/// What the operator has decided.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Force {
    /// The member to go on with.
    pub member: MemberId,
    /// When that was said, by the clock of the machine where it was. If two members are forced into use that do not hear of
    /// each other, the later decision holds when they meet.
    pub decided: SystemTime,
}

impl Force {
    fn decided_us(self) -> u64 {
        let since = self.decided.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_micros()).unwrap_or(0)
    }
}

impl Client {
    /// What the operator has decided, if that is still to be done.
    pub(super) fn forced(&self) -> Option<Force> {
        self.config.force_from.filter(|_| self.own_epochs.is_empty())
    }

    pub(super) fn attach_forced(&mut self, force: Force) {
        let member = force.member;
        let found = self.hellos().filter(|r| r.member == member).max_by_key(|r| r.view.order());
        let Some((view, spec)) = found.map(|r| (r.view.clone(), r.spec.clone())) else {
            let text = format!("--force-from names member {member}, which is not connected");
            self.notice(Notice::Waiting(text));
            return;
        };
        // Another member may be of a branch that was forced before.
        let highest = self.hellos().map(|r| r.epoch.max(r.view.epoch)).max().unwrap_or_default();
        self.epoch = recovery::forced_epoch(highest, self.epoch, force.decided_us());
        self.attach_to(view, spec, MemberSet::only(member));
    }

    /// Makes the forced view: every other member misses everything.
    pub(super) fn force(&mut self, base: &View, mut spec: PoolSpec, member: MemberId) {
        let length = spec.size;
        for line in spec.members.iter_mut().filter(|m| m.id == member) {
            line.maintenance = false;
        }
        match base.step(ViewStep::Force(member), self.epoch) {
            Ok(next) => {
                let missed = DirtyAddition { members: next.out(), offset: 0, length };
                let additions = if next.out().is_empty() { Vec::new() } else { vec![missed] };
                self.view = Some(base.clone());
                self.change_view(next, spec, additions, true);
            }
            Err(error) => self.notice(Notice::Waiting(format!("--force-from {member}: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::tests::{Bench, member};
    use super::super::{Event, LinkId, OverReason};
    use super::*;
    use crate::pool::{Epoch, MemberState};

    fn force(index: u8, second: u64) -> Option<Force> {
        let decided = UNIX_EPOCH + Duration::from_secs(1_800_000_000 + second);
        Some(Force { member: member(index), decided })
    }

    #[test]
    fn of_two_members_forced_into_use_that_do_not_hear_of_each_other_the_later_decision_holds() {
        let mut bench = Bench::new(2, |_| {});
        bench.up = vec![true, false];
        bench.start_client(|c| c.force_from = force(0, 0));
        for _ in 0..3 {
            bench.start_client(|_| {}); // Clients come and go.
        }
        bench.up = vec![false, true];
        bench.start_client(|c| c.force_from = force(1, 1));
        assert!(bench.client.is_active());
        assert!(bench.epochs[1] > bench.epochs[0], "{:?}", bench.epochs);
        bench.up = vec![true, true];
        bench.start_client(|c| c.attach_grace = Duration::from_secs(1));
        bench.pass(Duration::from_secs(2));
        assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
        assert_eq!(
            bench.state(member(0)),
            Some(MemberState::Syncing),
            "the first one's branch is overwritten"
        );
    }

    #[test]
    fn a_forced_attachment_is_above_all_that_any_node_shows_whatever_the_clock_says() {
        let mut bench = Bench::new(2, |_| {});
        bench.epochs[0] = Epoch(1 << 60);
        bench.start_client(|c| c.force_from = force(1, 0));
        assert!(bench.client.is_active());
        assert!(
            bench.views[1].epoch > bench.epochs[0],
            "{} is fenced by {}",
            bench.views[1],
            bench.epochs[0]
        );
    }

    /// Member 0 went on without member 1, and member 1 was forced into use while member 0 was away.
    fn branched() -> Bench {
        let mut bench = Bench::new(2, |_| {});
        bench.up[1] = false;
        bench.client.apply(Event::LinkDown(LinkId(1), "gone"), bench.now);
        bench.run();
        assert_eq!(bench.views[0].out(), MemberSet::only(member(1)));
        bench.up = vec![false, true];
        bench.start_client(|c| c.force_from = force(1, 0));
        assert!(bench.client.is_active());
        bench.up = vec![true, true];
        bench
    }

    #[test]
    fn a_member_that_is_out_is_waited_for_as_long_as_its_connection_may_take() {
        let mut bench = branched();
        bench.slow = vec![1];
        bench.start_client(|_| {});
        bench.pass(Duration::from_secs(4));
        assert!(!bench.client.is_active(), "member 1 may know more");
        bench.connect();
        bench.pass(Duration::from_secs(1));
        assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
        assert_ne!(bench.state(member(0)), Some(MemberState::Clean));
    }

    #[test]
    fn a_member_that_is_out_and_cannot_be_reached_is_waited_for_once() {
        let mut bench = branched();
        bench.slow = vec![1];
        bench.up[1] = false;
        bench.start_client(|_| {});
        assert!(!bench.client.is_active());
        bench.connect();
        assert!(bench.client.is_active());
        assert_eq!(bench.state(member(0)), Some(MemberState::Clean));
    }

    #[test]
    fn a_client_that_starts_over_asks_those_again_that_were_lost_before() {
        let mut bench = Bench::new(2, |_| {});
        bench.up[1] = false;
        bench.client.apply(Event::LinkDown(LinkId(1), "gone"), bench.now);
        bench.run();
        // Somebody forces member 1 into use, and this client's leg to member 0 breaks.
        bench.up[1] = true;
        let forced = bench.views[1].step(ViewStep::Force(member(1)), Epoch(1 << 50)).unwrap();
        (bench.epochs[1], bench.views[1]) = (forced.epoch, forced);
        bench.client.apply(Event::LinkDown(LinkId(0), "gone"), bench.now);
        bench.pass(Duration::from_secs(2));
        assert_eq!(bench.client.over(), Some(&OverReason::Fenced(Epoch(1 << 50))));
    }
}
