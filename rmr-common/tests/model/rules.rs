//! What must hold in every state of the modelled pool, how far it is explored, and what has to have happened on the way.

use std::sync::atomic::{AtomicU16, Ordering};

use rmr_common::pool::{MemberId, MemberSet};
use stateright::{Model, Property};

use crate::pool::{Action, Bug, Limits, Pool};
use crate::state::{Nameless, Phase, State};

/// Something that a run has to come to, if its limits allow it: a model in which nothing happens proves nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Event {
    WriteWhileOneIsOut,
    LostMemberIsCleanAgain,
    AttachAfterCrash,
    BothAttached,
    LiveClientDisplaced,
    LossByCut,
    AttachWithoutOneThatIsCutOff,
    CompletedWriteLostWithPower,
    PowerLossMadeGood,
}

impl Event {
    const ALL: [Self; 9] = [
        Self::WriteWhileOneIsOut,
        Self::LostMemberIsCleanAgain,
        Self::AttachAfterCrash,
        Self::BothAttached,
        Self::LiveClientDisplaced,
        Self::LossByCut,
        Self::AttachWithoutOneThatIsCutOff,
        Self::CompletedWriteLostWithPower,
        Self::PowerLossMadeGood,
    ];

    /// Whether some path within the limits has it. Views: 2 is the first client's, then come one without the lost member,
    /// one that has it Syncing, and one that has it Clean.
    fn is_due(self, limits: &Limits) -> bool {
        let faults = limits.crashes + limits.cuts + limits.power;
        let is_second_let_in =
            limits.epoch >= 2 && limits.view >= 3 && (limits.takeover || limits.crashes > 0);
        match self {
            Self::WriteWhileOneIsOut => limits.writes > 0 && faults > 0 && limits.view >= 3,
            Self::LostMemberIsCleanAgain => faults > 0 && limits.view >= 5,
            Self::AttachAfterCrash => limits.crashes + limits.power > 0,
            Self::BothAttached => is_second_let_in,
            Self::LiveClientDisplaced => limits.takeover && limits.epoch >= 2 && limits.view >= 3,
            Self::LossByCut => limits.cuts > 0 && limits.view >= 3,
            Self::AttachWithoutOneThatIsCutOff => limits.cuts > 0 && is_second_let_in && limits.view >= 4,
            Self::CompletedWriteLostWithPower => limits.power > 0 && limits.writes > 0,
            Self::PowerLossMadeGood => limits.power > 0 && limits.writes > 0 && limits.view >= 5,
        }
    }

    /// Whether the step from one state to the next is it.
    fn is_step(self, before: &State, after: &State) -> bool {
        let is_committed = after.committed != before.committed;
        let is_attached = after.committed.epoch > before.committed.epoch;
        let out = after.committed.out();
        let is_cut_off =
            |m: MemberId| after.clients.iter().any(|c| c.phase == Phase::Active && c.cut.contains(m));
        let clean_again = after.committed.clean().without(before.committed.clean());
        match self {
            Self::WriteWhileOneIsOut => after.acknowledged > before.acknowledged && !out.is_empty(),
            Self::LostMemberIsCleanAgain => !clean_again.is_empty(),
            Self::AttachAfterCrash => is_attached && after.crashes + after.power > 0,
            Self::BothAttached => {
                is_attached && before.committed.epoch.0 > 0 && {
                    let first = |i: usize| before.clients[i].own_epochs.is_empty();
                    (0..2).any(|i| first(i) && !after.clients[i].own_epochs.is_empty())
                }
            }
            Self::LiveClientDisplaced => {
                before.clients[0].phase == Phase::Active
                    && matches!(before.clients[1].phase, Phase::Attaching { .. })
                    && before
                        .members
                        .iter()
                        .zip(&after.members)
                        .any(|(b, a)| (b.holder, a.holder) == (Some(0), Some(1)))
            }
            Self::LossByCut => {
                is_committed && !is_attached && {
                    let lost = out.without(before.committed.out());
                    lost.iter().any(|m| is_cut_off(m) && after.member(m).is_up)
                }
            }
            Self::AttachWithoutOneThatIsCutOff => {
                is_attached && out.iter().any(|m| is_cut_off(m) && after.member(m).is_up)
            }
            Self::CompletedWriteLostWithPower => {
                after.power > before.power
                    && after.acknowledged == before.acknowledged
                    && after.ids().any(|m| {
                        after.member(m).data < before.acknowledged
                            && before.member(m).data >= before.acknowledged
                    })
            }
            Self::PowerLossMadeGood => {
                after.power > 0 && clean_again.iter().any(|m| after.member(m).data > 0 && after.crashes == 0)
            }
        }
    }
}

/// The events that a run has come to.
#[derive(Default)]
pub(super) struct Reached(AtomicU16);

impl Reached {
    fn note(&self, before: &State, after: &State) {
        let seen = self.0.load(Ordering::Relaxed);
        let is_new = |e: &Event| seen & e.bit() == 0 && e.is_step(before, after);
        let new = Event::ALL.into_iter().filter(is_new).fold(0, |all, e| all | e.bit());
        if new != 0 {
            self.0.fetch_or(new, Ordering::Relaxed);
        }
    }

    /// What the run should have come to by its limits, and has not.
    pub(super) fn missing(&self, limits: &Limits) -> Vec<Event> {
        let seen = self.0.load(Ordering::Relaxed);
        Event::ALL.into_iter().filter(|e| e.is_due(limits) && seen & e.bit() == 0).collect()
    }
}

impl Event {
    const fn bit(self) -> u16 {
        1 << self as u16
    }
}

impl Pool {
    pub(super) fn new(bug: Bug, limits: Limits) -> Self {
        // With these two mistakes there may be two views of one order, of which the code takes one by name.
        let is_nameless = !matches!(bug, Bug::EqualEpoch | Bug::OrderByNumber);
        Self { limits, bug, reached: Reached::default(), is_nameless }
    }

    /// Epochs and views beyond the limits are not explored. Nor is a client that proposes an epoch beyond them: nobody can
    /// take it, and until then nothing depends on whether the client has begun.
    fn is_within(&self, s: &State) -> bool {
        let members = &s.members[..s.count.into()];
        s.broken.is_some()
            || members.iter().all(|m| m.epoch.0 <= self.limits.epoch && m.view.number.0 <= self.limits.view)
                && s.clients.iter().all(|c| c.epoch.0 <= self.limits.epoch)
    }
}

impl Model for Pool {
    type State = Nameless;
    type Action = Action;

    fn init_states(&self) -> Vec<Nameless> {
        vec![Nameless { state: State::new(self.limits.members), is_nameless: self.is_nameless }]
    }

    fn actions(&self, s: &Nameless, actions: &mut Vec<Action>) {
        actions.extend([Action::Begin(0), Action::Begin(1), Action::Submit(0), Action::Submit(1)]);
        actions.push(Action::ClientCrash);
        for m in s.state.ids() {
            actions.extend([Action::Crash(m), Action::PowerCut(m), Action::Start(m)]);
            actions.extend(s.state.ids().map(|k| Action::Pull(m, k)));
            for c in 0..2 {
                actions.extend([Action::Lose(c, m), Action::Write(c, m), Action::Rejoin(c, m)]);
                actions.extend([Action::Promote(c, m), Action::Cut(c, m), Action::Heal(c, m)]);
                actions.extend(s.state.ids().flat_map(|k| [Action::Attach(c, m, k), Action::View(c, m, k)]));
            }
        }
    }

    fn next_state(&self, before: &Nameless, action: Action) -> Option<Nameless> {
        let state = self.after(&before.state, action).filter(|s| self.is_within(s))?;
        self.reached.note(&before.state, &state);
        Some(Nameless { state, ..*before })
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("one client at a time, and never back to an older view", |_, s: &Nameless| {
                s.state.broken.is_none()
            }),
            Property::always(
                "a completed write is on every Clean member of the view in force",
                |_, Nameless { state: s, .. }| s.committed.clean().iter().all(|m| s.has_or_tells(m)),
            ),
            Property::always(
                "what an absent member misses is on record with each active one",
                |_, Nameless { state: s, .. }| {
                    let is_on_record = |m| s.committed.active().iter().all(|k| s.member(k).dirty.contains(m));
                    s.committed.out().iter().all(|m| s.has_or_tells(m) || is_on_record(m))
                },
            ),
            Property::always(
                "whoever may attach finds every completed write",
                |pool: &Pool, Nameless { state: s, .. }| {
                    // With any set of members that the rule is content with, and no client in the middle of an attach.
                    (1u8..1 << s.count).map(MemberSet).all(|reachable| {
                        let Some(latest) = pool.latest(reachable.iter().map(|m| s.member(m).durable)) else {
                            return true;
                        };
                        !pool.may_attach(&latest, reachable)
                            || latest.clean().iter().all(|m| s.has_or_tells(m))
                    })
                },
            ),
        ]
    }
}
