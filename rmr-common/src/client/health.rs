//! Which members are sick, why, and when each may be brought in again.
//!
//! A rejoin holds the guest's requests for a moment, and a member that is in service holds each write until it answers. So
//! a member that fails again and again is tried ever more seldom: each failure doubles the pause before the next rejoin,
//! up to [`super::Config::rejoin_backoff_max`]. Only a time in service that lasted ends that, or an operator who says "now".
//!
//! ```text
//!   in service ── lost ──▶ Out, 1 s ── rejoin fails, or lost again ──▶ Out, 2 s, 4 s, 8 s … up to five minutes
//!       ▲                                                                 │
//!       └────────────── in service for LASTED: no failures ◀─────────────┘
//! ```
//! The client also drops a member in service whose delays add up to the leg timeout within [`STALL_WINDOW`]. A delay counts only while
//! another Clean member has answered the same write or flush. If the network or the host is slow for all members, no member is dropped.
//!
//! It counts what the member did, and nothing else: a rejoin that was given up because its source was lost, or because
//! members in service are slow themselves, is tried again after the shortest pause.

use std::time::Duration;

use super::{Client, LinkState, Notice, State};
use crate::pool::{Cause, Condition, MAX_MEMBERS, MemberId, MemberSet, MemberState};
use crate::time::Time;
use crate::wire::{Conditions, Kind};

/// Pause before a member is brought in that failed once, and before a rejoin is repeated that was given up.
pub(super) const FIRST_PAUSE: Duration = Duration::from_secs(1);
/// A member that was in service for so long has no failures on record any more.
const LASTED: Duration = Duration::from_secs(300);
/// A failure that stalled the guest is followed by a pause of so many times the stall, from the second one on.
const PAUSE_PER_STALL: u32 = 8;
/// The shortest time for which a joining member may hold requests.
const SHORTEST_HOLD: Duration = Duration::from_millis(100);
/// A joining member may take so many times as long as its rehearsal, or as the slowest member in service.
const HOLD_FACTOR: u32 = 4;

/// Time in which one leg timeout of counted delays is forgiven.
const STALL_WINDOW: Duration = Duration::from_secs(60);
/// Delays up to the leg timeout divided by this are not counted.
const STALL_SHARE: u32 = 8;

/// What is known of one member.
#[derive(Clone, Default)]
struct MemberHealth {
    /// Why it was lost, or not brought in, last; in the words of whoever noticed it.
    cause: Option<(Cause, String)>,
    /// The first of the failures that are counted.
    since: Option<Time>,
    /// Losses and failed rejoins in a row.
    failures: u32,
    /// The pause after the last of them.
    pause: Duration,
    /// No rejoin begins before.
    not_before: Time,
    /// Since when it is active in the committed view.
    in_service: Option<Time>,
    /// An operator wants it brought in, however slow it is.
    is_wanted: bool,
    /// Why it is about to be dropped, for the loss that follows.
    blame: Option<Cause>,
    /// How long it takes to answer a write, of late.
    answers_in: Duration,
    /// Counted delay, less what is forgiven.
    stalled: Duration,
    /// End of the last delay that is counted.
    stalled_until: Time,
}

/// What the client knows of the members' fitness. It outlives attachments: one that breaks down at once says nothing good.
#[derive(Default)]
pub(super) struct Health {
    members: [MemberHealth; MAX_MEMBERS],
    /// What the members were told last, without its times; and which members.
    told: Vec<(MemberId, Cause, u32, bool)>,
    told_to: MemberSet,
}

impl Health {
    fn of(&self, member: MemberId) -> &MemberHealth {
        &self.members[member.index()]
    }

    fn of_mut(&mut self, member: MemberId) -> &mut MemberHealth {
        &mut self.members[member.index()]
    }

    /// When the next rejoin of a member may begin.
    pub(super) fn not_before(&self, member: MemberId) -> Time {
        self.of(member).not_before
    }

    /// Number of losses and failed rejoins in a row.
    pub(super) fn failures(&self, member: MemberId) -> u32 {
        self.of(member).failures
    }

    /// Notes why a member is about to be dropped.
    pub(super) fn blame(&mut self, member: MemberId, cause: Cause) {
        self.of_mut(member).blame = Some(cause);
    }

    /// Why a member is dropped, if that was noted; else its connection is gone.
    pub(super) fn take_blame(&mut self, member: MemberId) -> Cause {
        self.of_mut(member).blame.take().unwrap_or(Cause::Unreachable)
    }

    /// Lets a member rest for the shortest pause, without a failure on record.
    pub(super) fn rest(&mut self, member: MemberId, now: Time) {
        let health = self.of_mut(member);
        health.not_before = health.not_before.max(now + FIRST_PAUSE);
    }

    /// A member has another store, or an operator wants it brought in now.
    pub(super) fn forget(&mut self, member: MemberId, now: Time) {
        *self.of_mut(member) = MemberHealth { not_before: now, ..MemberHealth::default() };
    }

    /// An operator wants a member brought in now. Why it is not current stays known until it is.
    fn want(&mut self, member: MemberId, now: Time) {
        let health = self.of_mut(member);
        (health.failures, health.pause, health.not_before) = (0, Duration::ZERO, now);
        health.is_wanted = true;
    }

    /// Notes how long a member took to answer a write: the longest of late, which fades.
    pub(super) fn note_answer(&mut self, member: MemberId, took: Duration) {
        let health = self.of_mut(member);
        health.answers_in = took.max(health.answers_in - health.answers_in / 64);
    }

    /// Counts the delay of a request that the member has not answered since `since`; time counted before is not counted twice. Returns
    /// the member's counted delay. `limit` is forgiven in [`STALL_WINDOW`].
    fn note_stall(&mut self, member: MemberId, since: Time, now: Time, limit: Duration) -> Duration {
        let health = self.of_mut(member);
        let forgiven = (now - health.stalled_until).as_secs_f64() / STALL_WINDOW.as_secs_f64();
        let left = health.stalled.saturating_sub(limit.mul_f64(forgiven.min(1.0)));
        health.stalled = left + (now - since.max(health.stalled_until));
        health.stalled_until = now;
        health.stalled
    }

    /// The slowest of these members, by their answers to writes of late.
    fn slowest(&self, members: MemberSet) -> Duration {
        members.iter().map(|m| self.of(m).answers_in).max().unwrap_or_default()
    }

    /// A failure of a member. `stall` is how long the guest waited for it.
    fn failed(
        &mut self,
        member: MemberId,
        (cause, text): (Cause, &str),
        now: Time,
        (stall, most): (Duration, Duration),
    ) {
        let health = self.of_mut(member);
        let is_first = health.failures == 0;
        health.failures = health.failures.saturating_add(1);
        health.pause = if is_first {
            FIRST_PAUSE.min(most)
        } else if mutant!(BackoffNotDoubled) {
            health.pause
        } else {
            (health.pause * 2).max(stall * PAUSE_PER_STALL).min(most)
        };
        health.not_before = now + health.pause;
        health.cause = Some((cause, text.to_owned()));
        health.since.get_or_insert(now);
        health.in_service = None;
        health.is_wanted = false;
        health.stalled = Duration::ZERO;
    }
}

impl Client {
    /// Drops a member, and says why for those who look at the pool.
    pub(super) fn drop_member_for(&mut self, member: MemberId, cause: Cause, reason: &str) {
        self.health.blame(member, cause);
        self.drop_member(member, reason);
    }

    /// A member that was active, or on its way to be, is lost. A planned loss is no failure.
    pub(super) fn note_lost(&mut self, member: MemberId, cause: Cause, reason: &str) {
        if cause.is_planned() {
            let now = self.now;
            self.health.rest(member, now);
            let health = self.health.of_mut(member);
            health.cause = Some((cause, reason.to_owned()));
            health.since.get_or_insert(now);
            health.in_service = None;
            return;
        }
        let is_stall = matches!(cause, Cause::Silent | Cause::TooSlow);
        let stall = if is_stall { self.config.leg_timeout } else { Duration::ZERO };
        let most = self.config.rejoin_backoff_max;
        self.health.failed(member, (cause, reason), self.now, (stall, most));
    }

    /// A rejoin failed, and it is the member that is to blame.
    pub(super) fn fail_rejoin(&mut self, member: MemberId, cause: Cause, reason: &str) {
        let stall = self.rejoin_hold_so_far(member);
        self.abort_rejoin(member);
        let most = self.config.rejoin_backoff_max;
        self.health.failed(member, (cause, reason), self.now, (stall, most));
        let health = self.health.of(member);
        let (failures, pause) = (health.failures, health.pause);
        self.notice(Notice::RejoinFailed { member, cause, reason: reason.to_owned(), failures, pause });
    }

    /// Counts the delay of a request that was sent at `since` and that only the members of `pending` have not answered. Returns the member
    /// whose counted delay is longest, if it exceeds the leg timeout, and that delay.
    pub(super) fn stalls(&mut self, pending: MemberSet, since: Time) -> Option<(MemberId, Duration)> {
        let (now, limit) = (self.now, self.config.leg_timeout);
        let others = self.view_clean().without(pending);
        let least = self.least_stall().max(self.health.slowest(others) * HOLD_FACTOR);
        if others.is_empty() || now - since <= least || mutant!(StallsForgiven) {
            return None;
        }
        let is_wanted = |m: &MemberId| self.health.of(*m).is_wanted;
        let blamed: Vec<_> = pending.iter().filter(|m| !is_wanted(m)).collect();
        let stalled = blamed.into_iter().map(|m| (m, self.health.note_stall(m, since, now, limit)));
        stalled.filter(|(_, stalled)| *stalled > limit).max_by_key(|(_, stalled)| *stalled)
    }

    /// The delay of a request up to which no member is blamed.
    pub(super) fn least_stall(&self) -> Duration {
        self.config.leg_timeout / STALL_SHARE
    }

    /// How long requests may be held for this member, whose rehearsal took this long; an error says why it may not hold them at all.
    pub(super) fn allowed_hold(&self, member: MemberId, rehearsal: Duration) -> Result<Duration, String> {
        let (health, config) = (self.health.of(member), &self.config);
        let others = self.health.slowest(self.view_clean());
        let bound = config.rejoin_hold.min(config.leg_timeout);
        // If all are slow, the network is, or they share a disk: this one is no worse than they are.
        let most = bound.max(others * HOLD_FACTOR * 2).min(config.leg_timeout);
        if rehearsal > most && !health.is_wanted {
            return Err(format!(
                "it took {rehearsal:.1?} to rehearse the view of its rejoin, and {most:.1?} are allowed"
            ));
        }
        if health.is_wanted {
            return Ok(config.leg_timeout);
        }
        // What fails again and again with little time gets more, at the same share of the guest's time.
        let share = health.pause.as_secs_f64() / config.rejoin_backoff_max.as_secs_f64().max(0.001);
        let grown = config.leg_timeout.mul_f64(share.clamp(0.0, 1.0));
        Ok((rehearsal * HOLD_FACTOR).clamp(SHORTEST_HOLD.min(bound), bound).max(grown))
    }

    /// The longest that a member in service took of late to answer a write.
    pub(super) fn slowest_in_service(&self) -> Duration {
        self.health.slowest(self.view_clean())
    }

    /// A view is committed: who is in service, and who is not.
    pub(super) fn health_committed(&mut self) {
        let (now, active) = (self.now, self.view_active());
        for member in MemberId::all() {
            let health = self.health.of_mut(member);
            health.in_service = if active.contains(member) { health.in_service.or(Some(now)) } else { None };
            if mutant!(BackoffResetByFlap) && active.contains(member) {
                health.failures = 0;
            }
        }
    }

    /// Time has passed: members that have proved themselves are well again, and the nodes hear of those that are not.
    pub(super) fn tick_health(&mut self) {
        let (now, clean) = (self.now, self.view_clean());
        for member in self.view_active().iter() {
            let health = self.health.of_mut(member);
            let lasted = LASTED.min(self.config.rejoin_backoff_max).max(health.pause);
            if health.in_service.is_none_or(|since| now - since < lasted) {
                continue;
            }
            (health.failures, health.pause, health.is_wanted) = (0, Duration::ZERO, false);
            if clean.contains(member) {
                (health.cause, health.since) = (None, None);
            }
        }
        self.tell_conditions();
    }

    /// An operator wants members brought in now: whatever keeps them out for a while is forgotten.
    pub(super) fn bring_in_now(&mut self, members: MemberSet) {
        for member in members.iter() {
            self.health.want(member, self.now);
            self.faults.pardon(member);
        }
    }

    /// Why members are not current, as far as this client knows.
    #[must_use]
    pub(crate) fn conditions(&self) -> Vec<Condition> {
        let Some(view) = &self.view else { return Vec::new() };
        let stale = view.members.iter().filter(|m| m.state != MemberState::Clean).map(|m| m.id);
        let milliseconds = |d: Duration| u64::try_from(d.as_millis()).unwrap_or(u64::MAX);
        let of = |member: MemberId| {
            let health = self.health.of(member);
            let excluded = self.faults.excluded(member).map(|text| (Cause::ReadErrorLimit, text.to_owned()));
            let is_out = view.state(member) == Some(MemberState::Out);
            let unreachable = || {
                let link = self.legs[member.index()].and_then(|id| self.link(id))?;
                let is_down = matches!(link.state, LinkState::Down { .. });
                (is_down && is_out).then(|| (Cause::Unreachable, link.last_error.clone()))
            };
            let waits = excluded.is_some() || self.is_held_out(member) || !is_out;
            // Of one that is in service again, what was before says something only if it came again and again.
            let before = || health.cause.clone().filter(|_| is_out || health.failures > 1);
            let unknown = || is_out.then(|| (Cause::BeforeAttach, String::new()));
            let (cause, text) = excluded.or_else(before).or_else(unreachable).or_else(unknown)?;
            let retry = (!waits).then(|| milliseconds(health.not_before - self.now));
            Some(Condition {
                member,
                cause,
                text,
                failures: health.failures,
                age_ms: health.since.map_or(0, |since| milliseconds(self.now - since)),
                retry_in_ms: retry,
            })
        };
        stale.filter_map(of).collect()
    }

    /// Tells the members in service what is the matter with the others, if that has changed.
    fn tell_conditions(&mut self) {
        if !matches!(self.state, State::Active) {
            return;
        }
        let conditions = self.conditions();
        let known: Vec<_> =
            conditions.iter().map(|c| (c.member, c.cause, c.failures, c.retry_in_ms.is_some())).collect();
        let listeners = self.view_active().intersection(self.ready_members());
        let is_news = known != self.health.told;
        let missing = if is_news { listeners } else { listeners.without(self.health.told_to) };
        self.health.told = known;
        self.health.told_to = listeners;
        if missing.is_empty() || !is_news && conditions.is_empty() {
            return;
        }
        let body = Conditions(conditions).encode();
        for member in missing.iter() {
            let header = self.header(Kind::Conditions);
            self.send_body(member, header, body.clone());
        }
    }

    /// The members were told under an attachment that is over.
    pub(super) fn forget_told(&mut self) {
        self.health.told_to = MemberSet::EMPTY;
    }
}
