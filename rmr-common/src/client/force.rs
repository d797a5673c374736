//! The operator's override of the recovery rule: to go on with one member, whatever it has. It makes a branch of the pool of
//! which other members may know nothing, and the epochs of such branches have to be comparable all the same.

use std::time::{SystemTime, UNIX_EPOCH};

use super::{Client, Notice, recovery};
use crate::pool::{Epoch, MemberId, MemberSet, PoolSpec, View, ViewStep};
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
    fn decided_ns(self) -> u64 {
        let since = self.decided.duration_since(UNIX_EPOCH).unwrap_or_default();
        u64::try_from(since.as_nanos()).unwrap_or(0)
    }
}

impl Client {
    /// What the operator has decided, if that is still to be done.
    pub(super) fn forced(&self) -> Option<Force> {
        self.config.force_from.filter(|_| self.own_epochs.is_empty() || mutant!(ForcedAgain))
    }

    pub(super) fn attach_forced(&mut self, force: Force) {
        let member = force.member;
        let found = self.hellos().filter(|r| r.member == member).max_by_key(|r| r.view.order());
        let Some((view, spec)) = found.map(|r| (r.view.clone(), r.spec.clone())) else {
            let text = format!("--force-from names member {member}, which is not connected");
            self.notice(Notice::Waiting(text));
            return;
        };
        // The epoch rises with the view, and not before. One that is forced, of an attach that came to nothing, would make what
        // follows from the member's own view seem to be of the later branch.
        self.epoch = recovery::proposed_epoch(self.highest_epoch, self.epoch);
        if mutant!(ForcedEpochAtAttach) {
            self.epoch = recovery::forced_epoch(self.highest_epoch, self.epoch, force.decided_ns());
        }
        self.attach_to(view, spec, MemberSet::only(member));
    }

    /// What members that are Out miss when the pool grows. Where everybody makes room that is nothing: it reads as zeroes. But
    /// since the pool was forced into use such a member may be of an older branch, which had grown as well, and was written.
    pub(super) fn missed_growth(&self, members: MemberSet, from: u64, to: u64) -> Option<DirtyAddition> {
        let was_forced = Epoch(0).is_of_older_branch(self.epoch);
        let length = to.saturating_sub(from);
        (was_forced && length > 0 && !members.is_empty()).then_some(DirtyAddition {
            members,
            offset: from,
            length,
        })
    }

    /// Makes the forced view: every other member misses everything.
    pub(super) fn force(&mut self, base: &View, mut spec: PoolSpec, force: Force) {
        let (member, length) = (force.member, spec.size);
        // Another member may be of a branch that was forced before.
        let mut epoch = recovery::forced_epoch(self.highest_epoch, self.epoch, force.decided_ns());
        if mutant!(ForcedEpochAtAttach) {
            epoch = self.epoch;
        }
        for line in spec.members.iter_mut().filter(|m| m.id == member) {
            line.maintenance = false;
        }
        match base.step(ViewStep::Force(member), epoch) {
            Ok(next) => {
                let missed = DirtyAddition { members: next.out(), offset: 0, length };
                let is_alone = next.out().is_empty() || mutant!(ForcedOthersNotStale);
                let additions = if is_alone { Vec::new() } else { vec![missed] };
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
    use super::super::{CommandToken, Event, LinkId, OverReason};
    use super::*;
    use crate::pool::{Command, MemberState};

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
        bench.epochs[0] = Epoch(1 << 61);
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
    fn a_client_does_not_go_on_with_a_member_that_a_client_of_a_later_branch_has_met() {
        let mut bench = branched();
        // Member 0 accepted the epoch of the later branch, for its rejoin, and that is how far it came.
        bench.epochs[0] = bench.views[1].epoch.next();
        bench.up = vec![true, false];
        bench.start_client(|_| {});
        bench.pass(Duration::from_secs(30));
        assert!(!bench.client.is_active(), "its own view is of the older branch");
        bench.up = vec![true, true];
        bench.connect();
        bench.pass(Duration::from_secs(2));
        assert_eq!(bench.state(member(1)), Some(MemberState::Clean));
        assert_ne!(bench.state(member(0)), Some(MemberState::Clean));
    }

    #[test]
    fn a_client_that_has_seen_the_later_branch_does_not_go_on_with_the_older_one_when_that_is_away() {
        let mut bench = branched();
        bench.slow = vec![0];
        bench.start_client(|_| {});
        assert!(!bench.client.is_active(), "member 0 has not been asked");
        bench.up = vec![true, false];
        bench.client.apply(Event::LinkDown(LinkId(1), "gone"), bench.now);
        bench.slow.clear();
        bench.connect();
        bench.pass(Duration::from_secs(30));
        assert!(!bench.client.is_active());
    }

    #[test]
    fn a_client_of_the_older_branch_ends_when_it_meets_a_member_that_was_forced_into_use() {
        let mut bench = Bench::new(2, |_| {});
        bench.up[1] = false;
        bench.client.apply(Event::LinkDown(LinkId(1), "gone"), bench.now);
        bench.run();
        assert!(bench.client.is_active());
        let forced = bench.views[1].step(ViewStep::Force(member(1)), Epoch(1 << 50)).unwrap();
        (bench.epochs[1], bench.views[1]) = (forced.epoch, forced);
        bench.up[1] = true;
        bench.connect();
        bench.pass(Duration::from_secs(1));
        assert_eq!(bench.client.over(), Some(&OverReason::Fenced(Epoch(1 << 50))));
    }

    #[test]
    fn a_client_of_the_older_branch_ends_when_a_member_that_it_has_met_was_forced_into_use_since() {
        let mut bench = Bench::new(2, |_| {});
        bench.up[1] = false;
        bench.client.apply(Event::LinkDown(LinkId(1), "gone"), bench.now);
        bench.run();
        (bench.up[1], bench.held) = (true, vec![1]);
        bench.connect();
        bench.pass(Duration::from_secs(3));
        assert!(bench.client.is_active(), "the holder there is of its own branch");
        let forced = bench.views[1].step(ViewStep::Force(member(1)), Epoch(1 << 50)).unwrap();
        (bench.epochs[1], bench.views[1]) = (forced.epoch, forced);
        bench.pass(Duration::from_secs(3));
        assert_eq!(bench.client.over(), Some(&OverReason::Fenced(Epoch(1 << 50))));
    }

    #[test]
    fn a_forced_attach_that_comes_to_nothing_raises_no_epoch() {
        let mut bench = Bench::new(2, |_| {});
        bench.adopts = false;
        bench.start_client(|c| c.force_from = force(1, 0));
        assert!(!bench.client.is_active());
        assert!(!Epoch(7).is_of_older_branch(bench.epochs[1]), "{} with no view of it", bench.epochs[1]);
    }

    #[test]
    fn what_a_pool_grows_by_after_it_was_forced_counts_as_missed_by_those_who_are_out() {
        let mut bench = branched();
        bench.up = vec![false, true];
        let (old, new) = (bench.spec.size, bench.spec.size + (1 << 20));
        bench.client.command(CommandToken(1), Command::Grow { size: new }, bench.now);
        bench.run();
        let area = DirtyAddition { members: MemberSet::only(member(0)), offset: old, length: new - old };
        assert!(bench.additions.contains(&area), "{:?}", bench.additions);
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

    #[test]
    fn a_client_that_waits_asks_those_again_that_are_there() {
        let mut bench = Bench::new(3, |_| {});
        bench.up[0] = false;
        let before = bench.views.clone();
        bench.start_client(|_| {});
        assert!(!bench.client.is_active(), "member 0 is Clean in {}", before[1]);
        // Somebody takes it out of the pool meanwhile.
        let next = bench.views[1].step(ViewStep::Lose(MemberSet::only(member(0))), Epoch(9)).unwrap();
        for node in [1, 2] {
            (bench.epochs[node], bench.views[node]) = (next.epoch, next.clone());
        }
        bench.pass(Duration::from_secs(7));
        assert!(bench.client.is_active());
    }
}
