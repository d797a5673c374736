//! The recovery rule and what belongs to it, as functions of nothing but views: who may go on, from which view, without
//! whom. The client decides by these, and the model checker (`tests/model`) explores what follows from them.

use crate::pool::{Epoch, MemberId, MemberSet, MemberState, View};

/// How far a forced attachment is above what was seen.
const FORCED_EPOCHS: u64 = Epoch::FORCED_JUMP;

/// The latest of several views: by attachment first, because one that an older client left behind without committing it may
/// have any number.
pub fn latest<T>(found: impl Iterator<Item = T>, view: impl Fn(&T) -> &View) -> Option<T> {
    found.max_by_key(|one| {
        let (epoch, number) = view(one).order();
        if mutant!(ViewsByNumberOnly) { (Epoch(0), number) } else { (epoch, number) }
    })
}

/// The recovery rule: every member that is Clean in the latest view must be reachable, because any later view would have
/// been recorded on at least one of them.
#[must_use]
pub fn may_attach(latest: &View, reachable: MemberSet) -> bool {
    latest.clean().is_subset(reachable)
        || mutant!(RecoveryIgnoresAMember) && !latest.clean().intersection(reachable).is_empty()
}

/// The view from which the first one of an attachment follows: the latest, with those promotions taken back that a Clean
/// member among `views` has not heard of. That one could go on with its own view, in which the promoted member is not
/// needed; so it must stay Clean, whatever becomes of it in the comparison.
pub fn base_of_attach<'a>(latest: &View, views: impl Iterator<Item = (MemberId, &'a View)>) -> View {
    let unaware = views
        .filter(|(m, v)| latest.state(*m) == Some(MemberState::Clean) && *v != latest)
        .filter(|_| !mutant!(PromotionKept));
    unaware.fold(latest.clone(), |base, (_, view)| base.without_promotions(view.clean()))
}

/// The epoch that a new attachment proposes, above the highest that was seen and its own last one.
#[must_use]
pub fn proposed_epoch(highest_seen: Epoch, own: Epoch) -> Epoch {
    highest_seen.max(own).next()
}

/// The epoch of an attachment that the operator has decided on, so many nanoseconds after 1970. It is above all that was
/// seen, and so far above that a client which was cut off with others does not get there; and it is above what was forced
/// before and is not seen now, with all attachments that followed, because none takes less than a nanosecond.
#[must_use]
pub fn forced_epoch(highest_seen: Epoch, own: Epoch, decided_ns: u64) -> Epoch {
    if mutant!(ForcedEpochNotRaised) {
        return proposed_epoch(highest_seen, own);
    }
    Epoch(highest_seen.max(own).0.saturating_add(FORCED_EPOCHS).max(decided_ns.min(Epoch::LAST_DECISION_NS)))
}

/// Whether another client made the view, after this one was attached: what this one has in flight may be older than what
/// that one wrote, so it may never be sent again. `own` are the epochs of the attachment that was committed last and of
/// those that were tried since; none before the first.
#[must_use]
pub fn is_displaced(own: &[Epoch], latest: Epoch) -> bool {
    own.first().is_some_and(|&last| latest > last) && !own.contains(&latest) && !mutant!(DisplacedGoesOn)
}

/// The members that are Out in the first view of an attachment: the active ones that did not attach, those that may differ
/// from the others (`stale`), and those that were Syncing without having heard of the last view (`behind`), which do not
/// know all that they miss.
#[must_use]
pub fn lost_in_attach(latest: &View, attached: MemberSet, stale: MemberSet, behind: MemberSet) -> MemberSet {
    let behind = behind.intersection(latest.in_state(MemberState::Syncing));
    let behind = if mutant!(BehindStays) { MemberSet::EMPTY } else { behind };
    latest.active().without(attached).union(stale).union(behind)
}

/// Which Clean members have not heard that a member was lost, and so have not on record what it misses: that of its
/// unflushed writes only the client knew, which is dead, and those that it told.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum UnheardLosses {
    /// Every Clean member has heard of every loss.
    None,
    /// These have not, and others that stay Clean have: they leave the view, and take over the maps when they rejoin.
    By(MemberSet),
    /// None that stays Clean has heard of the loss of these members, which may miss anything.
    ByAll(MemberSet),
}

/// What was lost in `latest` without the knowledge of some of its Clean members; `lost` are those that leave it in any case,
/// `views` what each attached member had adopted.
#[must_use]
pub fn unheard_losses(latest: &View, lost: MemberSet, views: &[(MemberId, &View)]) -> UnheardLosses {
    let stays = latest.clean().without(lost);
    let missing = |view: &View| latest.out().without(view.out());
    let staying = || views.iter().filter(|(m, _)| stays.contains(*m));
    let deaf: MemberSet = staying().filter(|(_, v)| !missing(v).is_empty()).map(|(m, _)| *m).collect();
    if deaf.is_empty() {
        UnheardLosses::None
    } else if stays.without(deaf).is_empty() {
        UnheardLosses::ByAll(staying().fold(MemberSet::EMPTY, |all, (_, v)| all.union(missing(v))))
    } else {
        UnheardLosses::By(deaf)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::MemberState::{Clean, Out, Syncing};
    use crate::pool::{MemberView, StoreId, ViewNumber};

    fn members(indices: &[u8]) -> MemberSet {
        indices.iter().map(|&i| MemberId::new(i).unwrap()).collect()
    }

    fn view(epoch: u64, number: u64, states: &[MemberState]) -> View {
        let line = |(i, &state): (u8, &MemberState)| MemberView {
            id: MemberId::new(i).unwrap(),
            store: StoreId::from_bytes([i + 1; 16]),
            state,
        };
        View {
            number: ViewNumber(number),
            epoch: Epoch(epoch),
            members: (0..).zip(states).map(line).collect(),
        }
    }

    #[test]
    fn a_client_goes_on_when_every_clean_member_of_the_latest_view_is_there_and_only_then() {
        let table: &[(&[MemberState], &[u8], bool)] = &[
            (&[Clean, Clean], &[0, 1], true),
            (&[Clean, Clean], &[0], false),
            (&[Clean, Clean], &[1], false),
            (&[Clean, Out], &[0], true),
            (&[Clean, Out], &[1], false),
            (&[Clean, Syncing], &[0], true),
            (&[Clean, Syncing], &[1], false),
            (&[Clean, Syncing, Clean], &[0, 1], false),
            (&[Clean, Syncing, Clean], &[0, 2], true),
            (&[Out, Syncing, Clean], &[0, 1], false),
            (&[Out, Syncing, Clean], &[2], true),
        ];
        for (states, reachable, allowed) in table {
            let view = view(3, 7, states);
            assert_eq!(may_attach(&view, members(reachable)), *allowed, "{view} with {reachable:?}");
        }
    }

    #[test]
    fn the_view_of_the_later_attachment_is_the_latest_and_then_that_of_the_higher_number() {
        let views = [view(2, 9, &[Clean]), view(3, 4, &[Clean]), view(3, 5, &[Clean]), view(1, 20, &[Clean])];
        assert_eq!(latest(views.iter(), |v| v), Some(&views[2]));
        assert_eq!(latest([].iter(), |v: &&View| v), None);
    }

    #[test]
    fn a_client_is_displaced_by_a_view_of_a_later_epoch_that_is_not_its_own() {
        let table: &[(&[u64], u64, bool)] = &[
            (&[], 5, false),
            (&[4], 4, false),
            (&[4], 5, true),
            (&[4, 5], 5, false),
            (&[4, 6], 5, true),
            (&[4], 3, false),
        ];
        for (own, latest, displaced) in table {
            let own: Vec<_> = own.iter().map(|&e| Epoch(e)).collect();
            assert_eq!(is_displaced(&own, Epoch(*latest)), *displaced, "{own:?}, {latest}");
        }
    }

    #[test]
    fn those_who_are_absent_or_stale_or_behind_are_out_at_first() {
        let view = view(3, 7, &[Clean, Syncing, Syncing, Out, Clean]);
        let lost = |attached, stale, behind| {
            lost_in_attach(&view, members(attached), members(stale), members(behind))
        };
        assert_eq!(lost(&[0, 1, 2, 4], &[], &[]), MemberSet::EMPTY);
        assert_eq!(lost(&[0, 1, 4], &[], &[]), members(&[2]));
        assert_eq!(lost(&[0, 1, 2, 4], &[4], &[]), members(&[4]));
        assert_eq!(
            lost(&[0, 1, 2, 4], &[], &[0, 1]),
            members(&[1]),
            "a Clean member needs no map of its own"
        );
    }

    #[test]
    fn a_promotion_that_a_clean_member_has_not_heard_of_is_taken_back() {
        let before = view(3, 7, &[Clean, Syncing, Syncing]);
        let latest = view(3, 8, &[Clean, Clean, Syncing]);
        let base = |list: &[(u8, &View)]| {
            base_of_attach(&latest, list.iter().map(|(i, v)| (MemberId::new(*i).unwrap(), *v)))
        };
        assert_eq!(base(&[(0, &latest), (1, &latest), (2, &before)]), latest);
        assert_eq!(base(&[(0, &before), (1, &latest)]).clean(), members(&[0]));
    }

    #[test]
    fn a_forced_epoch_is_above_all_that_were_seen_and_above_those_of_earlier_decisions() {
        let now = 1_800_000_000_000_000_000;
        assert_eq!(forced_epoch(Epoch(7), Epoch(3), now), Epoch(now));
        assert_eq!(
            forced_epoch(Epoch(7), Epoch(9), 0),
            Epoch(9 + FORCED_EPOCHS),
            "a clock that stands at 1970"
        );
        let first = forced_epoch(Epoch(7), Epoch(0), now);
        assert!(forced_epoch(first, Epoch(0), now) > first, "seen, and decided at once");
        assert!(
            forced_epoch(Epoch(7), Epoch(0), now + 2_000_000_000)
                > forced_epoch(first, Epoch(0), now - 100_000_000)
        );
        assert!(forced_epoch(Epoch(7), Epoch(0), u64::MAX).0 < 1 << 62, "a clock of the far future");
    }

    #[test]
    fn who_has_not_heard_of_a_loss_does_not_stay_clean_beside_one_that_has() {
        let before = view(1, 2, &[Clean, Clean, Clean]);
        let after = view(1, 3, &[Clean, Clean, Out]);
        let [a, b] = [MemberId::new(0).unwrap(), MemberId::new(1).unwrap()];
        let found = |lost: &[u8], views: &[(MemberId, &View)]| unheard_losses(&after, members(lost), views);
        assert_eq!(found(&[], &[(a, &after), (b, &after)]), UnheardLosses::None);
        assert_eq!(found(&[], &[(a, &before), (b, &after)]), UnheardLosses::By(members(&[0])));
        assert_eq!(found(&[0], &[(a, &before), (b, &after)]), UnheardLosses::None);
        assert_eq!(found(&[1], &[(a, &before), (b, &after)]), UnheardLosses::ByAll(members(&[2])));
        let more = view(1, 3, &[Clean, Out, Out]);
        assert_eq!(
            unheard_losses(&more, MemberSet::EMPTY, &[(a, &view(1, 2, &[Clean, Syncing, Out]))]),
            UnheardLosses::ByAll(members(&[1]))
        );
    }

    #[test]
    fn what_is_a_forced_attachment_below_another_is_of_an_older_branch() {
        let forced = forced_epoch(Epoch(7), Epoch(3), 0);
        assert!(Epoch(7).is_of_older_branch(forced));
        assert!(!forced.is_of_older_branch(forced) && !forced.is_of_older_branch(Epoch(7)));
        assert!(!Epoch(7).is_of_older_branch(Epoch(1000)), "attaches that came to nothing");
    }

    #[test]
    fn an_epoch_is_above_all_that_were_seen() {
        assert_eq!(proposed_epoch(Epoch(7), Epoch(3)), Epoch(8));
        assert_eq!(proposed_epoch(Epoch(2), Epoch(9)), Epoch(10));
    }
}
