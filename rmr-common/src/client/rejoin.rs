//! Bringing members back in: rejoin behind a short barrier, the source of each resync, promotion.
//!
//! ```text
//!   Out, link up ─▶ Attaching ─▶ [Growing] ─▶ Preparing ─▶ Quiescing ─▶ Changing ─▶ Syncing … all current ─▶ Promote ─▶ Clean
//!                   same epoch   link to      no write     Rejoin view,
//!                                the source   in flight    maps handed over
//! ```
//! Only Quiescing and Changing hold requests back: the time for writes in flight to be answered, and for the maps to be
//! read from the source and written down.

use std::time::Duration;

use super::health::FIRST_PAUSE;
use super::{Client, OverReason, State};
use crate::pool::{Cause, MemberId, MemberSet, MemberState, ViewStep};
use crate::time::Time;
use crate::wire::{Attach, AttachReply, ChunkList, DirtyAddition, Kind, MessageHeader, Prepare, Status};

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Phase {
    Attaching,
    /// The pool has grown while the member was away.
    Growing,
    Preparing,
    Quiescing,
    Changing,
}

#[derive(Clone, Debug)]
pub(super) struct Rejoin {
    member: MemberId,
    phase: Phase,
    since: Time,
    /// What the member may have lost with its last run, beyond what the others have on record.
    additions: Vec<DirtyAddition>,
    /// How long requests may be held for it.
    hold: Duration,
    /// When the others had all answered the view that makes it Syncing.
    others: Option<Time>,
    /// When requests began to be held.
    held: Option<Time>,
}

/// What the client knows of members that are not Clean.
#[derive(Default)]
pub(super) struct Stale {
    rejoin: Option<Rejoin>,
    /// When a source may be named again to a Syncing member.
    not_before: [Time; crate::pool::MAX_MEMBERS],
    /// The source that each Syncing member was told.
    sources: [Option<MemberId>; crate::pool::MAX_MEMBERS],
    /// Sources with which it did not work, to be tried again when all others were.
    avoided: [MemberSet; crate::pool::MAX_MEMBERS],
    /// Syncing members with nothing stale left.
    current: MemberSet,
    /// Clean members whose maps of others are exact to the block: all but those that were promoted by this client.
    inexact: MemberSet,
    /// Members that cannot hold the pool, and of which that was told.
    no_room: MemberSet,
}

impl Client {
    /// Whether requests are held back for a barrier.
    pub(super) fn is_quiescing(&self) -> bool {
        self.is_rejoin_quiescing() || self.faults.holds_requests() || self.is_command_quiescing()
    }

    /// Whether they are for that of a rejoin.
    pub(super) fn is_rejoin_quiescing(&self) -> bool {
        self.stale.rejoin.as_ref().is_some_and(|r| r.phase == Phase::Quiescing)
    }

    /// The member that is being brought back in.
    pub(super) fn rejoin_member(&self) -> Option<MemberId> {
        self.stale.rejoin.as_ref().map(|r| r.member)
    }

    /// The member that is being brought back in, and how far that has come.
    #[must_use]
    pub(crate) fn rejoin_phase(&self) -> Option<(MemberId, &'static str)> {
        let rejoin = self.stale.rejoin.as_ref()?;
        let phase = match rejoin.phase {
            Phase::Attaching => "attaching",
            Phase::Growing => "growing",
            Phase::Preparing => "preparing",
            Phase::Quiescing => "quiescing",
            Phase::Changing => "changing",
        };
        Some((rejoin.member, phase))
    }

    /// Starts what is due for members that are not Clean.
    pub(super) fn tick_stale(&mut self) {
        self.end_late_rejoin();
        if !self.is_active() || self.detach_requested {
            return;
        }
        self.name_sources();
        self.try_promote();
        self.start_rejoin();
    }

    /// Ends a rejoin that takes too long. Before requests are held a step has the time of any request. While they are held for
    /// the member alone, it has the time that it may cost the guest; while members in service answer the view, theirs.
    fn end_late_rejoin(&mut self) {
        let Some(rejoin) = self.stale.rejoin.as_ref() else { return };
        let (member, phase, waited) = (rejoin.member, rejoin.phase, self.now - rejoin.since);
        let timeout = self.config.leg_timeout;
        match phase {
            Phase::Attaching if waited > timeout => {
                self.fail_rejoin(member, Cause::Silent, "the attach of its rejoin was not answered in time");
            }
            Phase::Growing if waited > timeout => {
                self.fail_rejoin(
                    member,
                    Cause::NoRoom,
                    "it was not ready in time to hold the pool's present size",
                );
            }
            Phase::Preparing if waited > timeout => {
                self.fail_rejoin(
                    member,
                    Cause::HandoverFailed,
                    "it did not reach its source, or could not take a map from it and make a change durable, in time",
                );
            }
            // Writes of before are under way at members that are in service: the one that waits is not to blame.
            Phase::Quiescing if waited > self.quiet_limit() => self.abort_rejoin(member),
            Phase::Changing if self.rejoin_deadline().is_some_and(|due| due < self.now) => {
                let reason = format!("the view of its rejoin was not answered within {waited:.1?}");
                self.drop_member_for(member, Cause::ViewNotAnswered, &reason);
            }
            Phase::Attaching | Phase::Growing | Phase::Preparing | Phase::Quiescing | Phase::Changing => {}
        }
    }

    /// How long a rejoin waits for writes under way, while new requests are held.
    fn quiet_limit(&self) -> Duration {
        let usual = self.config.rejoin_hold.max(self.slowest_in_service() * 2);
        usual.min(self.config.leg_timeout)
    }

    /// When the member that is being brought in has held requests for long enough, while only it has not answered the view.
    fn rejoin_deadline(&self) -> Option<Time> {
        let rejoin = self.stale.rejoin.as_ref().filter(|r| r.phase == Phase::Changing)?;
        let others = rejoin.others?;
        let theirs = others - rejoin.since;
        let deadline = (rejoin.since + rejoin.hold).max(others + theirs * 3);
        Some(if mutant!(HoldNotBounded) { others + self.config.leg_timeout * 4 } else { deadline })
    }

    /// The member that is being brought in, if requests are held for it alone; when it was sent the view, and when the others had
    /// answered that.
    #[must_use]
    pub(crate) fn held_for_joining(&self) -> Option<(MemberId, Time, Time)> {
        let rejoin = self.stale.rejoin.as_ref().filter(|r| r.phase == Phase::Changing)?;
        Some((rejoin.member, rejoin.since, rejoin.others?))
    }

    /// How long requests were held for the member that is being brought in.
    pub(super) fn rejoin_hold_so_far(&self, member: MemberId) -> Duration {
        let rejoin = self.stale.rejoin.as_ref().filter(|r| r.member == member);
        rejoin.and_then(|r| r.held).map_or(Duration::ZERO, |held| self.now - held)
    }

    /// All members but one have answered the view under way. If that one is being brought in, its time runs.
    pub(super) fn note_only_waits_for(&mut self, waiting: MemberSet) {
        let now = self.now;
        if let Some(rejoin) = &mut self.stale.rejoin
            && rejoin.phase == Phase::Changing
            && waiting == MemberSet::only(rejoin.member)
        {
            rejoin.others.get_or_insert(now);
            self.schedule_rejoin();
        }
    }

    /// A rejoin that holds requests is looked at when its time is over.
    pub(super) fn schedule_rejoin(&mut self) {
        if let Some(due) = self.rejoin_deadline() {
            let due = due.max(self.now) + Duration::from_millis(1);
            self.next_tick = self.next_tick.min(due);
        }
    }

    /// A view is sent: if it makes a member Syncing in place of one that was replaced, all begin to answer again.
    pub(super) fn restart_hold(&mut self) {
        let now = self.now;
        if let Some(rejoin) = self.stale.rejoin.as_mut().filter(|r| r.phase == Phase::Changing) {
            (rejoin.since, rejoin.others) = (now, None);
        }
    }

    fn start_rejoin(&mut self) {
        if self.stale.rejoin.is_some() || !self.is_active() {
            return;
        }
        let due = |m: &MemberId| self.health.not_before(*m) <= self.now && self.faults.excluded(*m).is_none();
        let is_free = |m: &MemberId| !self.is_held_out(*m);
        let candidates =
            self.view_out().intersection(self.ready_members()).iter().filter(due).filter(is_free);
        // One that was well so far does not wait for those that fail again and again.
        let Some(member) = candidates.min_by_key(|m| self.health.failures(*m)) else { return };
        let additions = Vec::new();
        self.stale.rejoin = Some(Rejoin {
            member,
            phase: Phase::Attaching,
            since: self.now,
            additions,
            hold: self.config.leg_timeout,
            others: None,
            held: None,
        });
        let body = Attach {
            client: self.config.client,
            takeover: self.config.takeover,
            rejoin: true,
            yields: self.config.yields,
            description: self.config.description.clone(),
            held_ms: self.held_ms(),
        };
        let header = self.header(Kind::Attach);
        self.send_body(member, header, body.encode());
    }

    /// True if the answer was to the attach of a rejoin.
    pub(super) fn rejoin_attached(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) -> bool {
        let is_its = |r: &Rejoin| r.member == member && r.phase == Phase::Attaching;
        if !self.stale.rejoin.as_ref().is_some_and(is_its) {
            return false;
        }
        match AttachReply::decode(body) {
            Ok(reply) if header.status == Status::Ok && self.is_active() => {
                self.go_on_above(&reply);
                let members = MemberSet::only(member);
                let additions: Vec<_> = if self.is_regressed_at_rejoin(member, &reply) {
                    self.regress(members, &[(member, reply.position)]).into_iter().collect()
                } else {
                    let addition = |&(offset, length): &(u64, u64)| DirtyAddition { members, offset, length };
                    self.left_behind(&reply).iter().map(addition).collect()
                };
                if let Some(rejoin) = &mut self.stale.rejoin {
                    rejoin.additions = additions;
                }
                let size = self.spec.as_ref().map_or(0, |s| s.size);
                if reply.spec.size < size {
                    self.set_phase(Phase::Growing);
                    let header = MessageHeader { offset: size, ..self.header(Kind::Grow) };
                    self.send(member, header, super::Payload::None);
                } else {
                    self.set_phase(Phase::Preparing);
                    self.name_source(member);
                }
            }
            // It was forced into use since the hello, and its client is there: this one would be refused for ever.
            _ if header.status == Status::Held && self.is_of_older_branch(header.epoch) => {
                self.end(OverReason::Fenced(header.epoch));
            }
            _ if header.status == Status::StaleEpoch && self.is_active() => {
                // Somebody tried to attach there and did not come far. Only an epoch above that one brings it back in.
                self.gather();
            }
            Ok(_) if header.status == Status::Ok => self.abort_rejoin(member),
            // Another client is there. That is no failure of the member, and whose branch it is of must be found out soon.
            _ if header.status == Status::Held => self.abort_rejoin(member),
            _ => {
                let cause = match header.status {
                    Status::IoError => Cause::MetadataErrors,
                    Status::NoSpace => Cause::DiskFull,
                    _ => Cause::Refused,
                };
                let text = String::from_utf8_lossy(body);
                self.fail_rejoin(
                    member,
                    cause,
                    &format!("the attach was answered with {:?} {text}", header.status),
                );
            }
        }
        true
    }

    /// True if the answer was to the question of a rejoin whether the member has room for the pool.
    pub(super) fn rejoin_grown(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) -> bool {
        let is_its = |r: &Rejoin| r.member == member && r.phase == Phase::Growing;
        if !self.stale.rejoin.as_ref().is_some_and(is_its) {
            return false;
        }
        if header.status == Status::Ok && self.is_active() {
            self.stale.no_room.remove(member);
            self.set_phase(Phase::Preparing);
            self.name_source(member);
            return true;
        }
        let text = String::from_utf8_lossy(body).into_owned();
        match header.status {
            Status::Ok => self.abort_rejoin(member),
            Status::NoSpace => {
                if !self.stale.no_room.contains(member) {
                    self.stale.no_room.insert(member);
                    self.notice(super::Notice::NoRoom(member, text.clone()));
                }
                self.fail_rejoin(member, Cause::NoRoom, &text);
            }
            status => {
                self.fail_rejoin(member, Cause::Refused, &format!("room was refused with {status:?} {text}"))
            }
        }
        true
    }

    /// What a member may have, or have lost, of an earlier attachment without anybody knowing: the writes that were in
    /// flight when that ended, and what was not flushed. A member that was lost under the present one has nothing of the
    /// kind: all of it went on record when it was lost. That is one that has a view of the present epoch. The epoch alone it
    /// may have from a rejoin that was given up before its view, and what that one had found is forgotten.
    fn left_behind(&self, reply: &AttachReply) -> Vec<(u64, u64)> {
        if reply.view.epoch == self.epoch || mutant!(LeftBehindIgnored) {
            return Vec::new();
        }
        if reply.tables_lost {
            return self.intent_ranges(reply);
        }
        let open = reply.slots.iter().filter(|s| s.sequence > reply.watermark);
        open.map(|s| (s.offset, s.length.into())).collect()
    }

    fn set_phase(&mut self, phase: Phase) {
        let now = self.now;
        if let Some(rejoin) = &mut self.stale.rejoin {
            rejoin.phase = phase;
            rejoin.since = now;
        }
    }

    /// The member from which `member` is to be brought up to date: one that is Clean, if possible since before, and with
    /// which it did work; when it did with none, all are tried again.
    fn name_source(&mut self, member: MemberId) {
        let clean = self.view_clean();
        let mut usable = clean.without(self.stale.avoided[member.index()]);
        if usable.is_empty() {
            // The last one that failed is tried last.
            let last = self.stale.sources[member.index()].map_or(MemberSet::EMPTY, MemberSet::only);
            self.stale.avoided[member.index()] = last;
            usable = if clean.is_subset(last) { clean } else { clean.without(last) };
        }
        let exact = usable.without(self.stale.inexact);
        let stale = self.view_active().without(clean).without(MemberSet::only(member));
        let stale = if mutant!(PullFromStale) { stale } else { MemberSet::EMPTY };
        let wrong = self.known_wrong();
        // An exact one hands out what was missed and nothing beside it, so what else is wrong there stays there.
        let best = [stale, exact.without(wrong), exact, usable.without(wrong), usable];
        let source = best.iter().find_map(|set| set.iter().next());
        let (Some(source), Some(spec)) = (source, self.spec.clone()) else { return };
        let Some(address) = spec.member(source).map(|m| m.address.clone()) else { return };
        self.stale.sources[member.index()] = Some(source);
        self.stale.current.remove(member);
        let header = self.header(Kind::Prepare);
        self.send_body(member, header, Prepare { source, address, spec }.encode());
    }

    /// A Syncing member cannot get what it misses from its source: another one is named, if there is one.
    pub(super) fn source_failed(&mut self, member: MemberId, header: &MessageHeader) {
        let source = self.stale.sources[member.index()];
        let is_present = source.is_some_and(|s| u16::from(s.as_u8()) == header.slot.0);
        let is_syncing = self.view.as_ref().and_then(|v| v.state(member)) == Some(MemberState::Syncing);
        if header.epoch != self.epoch || !is_present || !is_syncing || !self.is_active() {
            return;
        }
        self.avoid_source(member);
        if self.view_clean().len() > 1 {
            self.name_source(member);
        }
    }

    /// The source that a member was told.
    #[cfg(test)]
    pub(super) fn source_of(&self, member: MemberId) -> Option<MemberId> {
        self.stale.sources[member.index()]
    }

    fn avoid_source(&mut self, member: MemberId) {
        if let Some(source) = self.stale.sources[member.index()] {
            self.stale.avoided[member.index()].insert(source);
        }
    }

    /// Tells each Syncing member its source, if it has none that is Clean.
    pub(super) fn name_sources(&mut self) {
        let clean = self.view_clean();
        let syncing = self.view.as_ref().map_or(MemberSet::EMPTY, |v| v.in_state(MemberState::Syncing));
        for member in syncing.iter() {
            let has_source = self.stale.sources[member.index()].is_some_and(|s| clean.contains(s));
            if !has_source && self.stale.not_before[member.index()] <= self.now {
                self.name_source(member);
            }
        }
    }

    pub(super) fn prepare_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        if header.epoch != self.epoch {
            return;
        }
        let is_rejoin =
            self.stale.rejoin.as_ref().is_some_and(|r| r.member == member && r.phase == Phase::Preparing);
        match (header.status, is_rejoin) {
            (Status::Ok, true) => {
                // The rehearsal of the view, on the member's own clock.
                let rehearsal = Duration::from_micros(header.length.into());
                match self.allowed_hold(member, rehearsal) {
                    Ok(hold) => {
                        self.set_phase(Phase::Quiescing);
                        let now = self.now;
                        if let Some(rejoin) = &mut self.stale.rejoin {
                            (rejoin.hold, rejoin.held) = (hold, Some(now));
                        }
                        self.try_quiesced();
                    }
                    Err(reason) => self.fail_rejoin(member, Cause::TooSlow, &reason),
                }
            }
            (Status::Ok, false) => {}
            (_, true) => {
                let text = String::from_utf8_lossy(body).into_owned();
                self.fail_rejoin(member, Cause::HandoverFailed, &text);
            }
            (_, false) => {
                self.avoid_source(member);
                self.stale.sources[member.index()] = None;
                self.stale.not_before[member.index()] = self.now + FIRST_PAUSE;
            }
        }
    }

    /// Ends the barrier when no write is in flight: commits the view that has the member Syncing.
    pub(super) fn try_quiesced(&mut self) {
        // In this order: the last question looks at all parts.
        if !self.is_rejoin_quiescing() || !self.is_active() {
            return;
        }
        if self.parts.has_sent_write() && !mutant!(NoBarrier) {
            return;
        }
        let Some(rejoin) = &mut self.stale.rejoin else { return };
        let (member, additions) = (rejoin.member, std::mem::take(&mut rejoin.additions));
        let source = self.stale.sources[member.index()];
        let is_usable = |s| self.view_clean().contains(s) || mutant!(PullFromStale);
        if !source.is_some_and(is_usable) || self.is_held_out(member) {
            // It was lost meanwhile, and does not have what was written since; or the member is to stay Out.
            return self.abort_rejoin(member);
        }
        let next = self.view.as_ref().map(|v| v.step(ViewStep::Rejoin(member), self.epoch));
        match (next, self.spec.clone()) {
            (Some(Ok(next)), Some(spec)) => {
                self.set_phase(Phase::Changing);
                self.change_view(next, spec, additions, false);
            }
            _ => self.abort_rejoin(member),
        }
    }

    /// Gives a rejoin up for now, and lets requests go on that were held back for it.
    pub(super) fn abort_rejoin(&mut self, member: MemberId) {
        let Some(rejoin) = self.stale.rejoin.take_if(|r| r.member == member) else { return };
        self.health.rest(member, self.now);
        if matches!(rejoin.phase, Phase::Preparing | Phase::Changing) {
            // It may be the source that keeps the member out.
            self.avoid_source(member);
        }
        self.stale.sources[member.index()] = None;
        if rejoin.phase == Phase::Quiescing && self.is_active() {
            self.resume_requests();
        }
    }

    /// The attachment is over, and the rejoin that is under way in it.
    pub(super) fn forget_rejoin(&mut self) {
        self.stale.rejoin = None;
    }

    /// A view was committed.
    pub(super) fn stale_committed(&mut self, attach: bool, replaced: MemberSet) {
        let syncing = self.view.as_ref().map_or(MemberSet::EMPTY, |v| v.in_state(MemberState::Syncing));
        let clean = self.view_clean();
        for member in replaced.iter() {
            self.abort_rejoin(member);
            self.health.forget(member, self.now);
            self.stale.not_before[member.index()] = self.now;
            self.stale.sources[member.index()] = None;
            self.stale.current.remove(member);
            self.stale.inexact.remove(member);
            self.stale.no_room.remove(member);
            self.stale.avoided[member.index()] = MemberSet::EMPTY;
            self.faults.forget(member);
        }
        if attach {
            self.stale = Stale { inexact: self.stale.inexact.intersection(clean), ..Stale::default() };
        }
        if self.view.as_ref().is_some_and(|v| v.members.iter().all(|m| m.state == MemberState::Clean)) {
            // Every map is empty, and what is recorded from now on is exact everywhere.
            self.stale.inexact = MemberSet::EMPTY;
        }
        if self.stale.rejoin.as_ref().is_some_and(|r| r.phase == Phase::Changing) {
            self.stale.rejoin = None;
        }
        self.stale.current = self.stale.current.intersection(syncing);
        self.health_committed();
        self.name_sources();
    }

    /// Members were lost: what was under way for them is over.
    pub(super) fn stale_lost(&mut self, members: MemberSet, cause: impl Fn(MemberId) -> Cause, reason: &str) {
        for member in members.iter() {
            let (cause, is_joining) = (cause(member), self.rejoin_member() == Some(member));
            if is_joining && !cause.is_planned() {
                self.fail_rejoin(member, cause, reason);
            } else {
                self.abort_rejoin(member);
                self.health.rest(member, self.now);
            }
            self.stale.current.remove(member);
            self.stale.inexact.remove(member);
            self.stale.sources[member.index()] = None;
            self.stale.not_before[member.index()] = self.now + FIRST_PAUSE;
        }
    }

    /// A Syncing member has chunks current and durable: the others may forget that it missed them. The message goes out in
    /// order with the views, so that nothing which is missed later can be forgotten by it.
    pub(super) fn chunks_done(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        let list = match ChunkList::decode(Kind::ChunksDone, body) {
            Ok(list) => list,
            Err(error) => {
                return self.drop_member_for(member, Cause::Refused, &format!("protocol error: {error}"));
            }
        };
        let proposed = match &self.state {
            State::Changing { next, .. } => Some(next),
            State::Active => self.view.as_ref(),
            _ => None,
        };
        let is_syncing = proposed.is_some_and(|v| v.state(member) == Some(MemberState::Syncing));
        if header.epoch != self.epoch || list.member != member || !is_syncing {
            return;
        }
        // One that was lost in the view under way has no link.
        let others = self.view_active().intersection(self.ready_members()).without(MemberSet::only(member));
        self.history_reported(member);
        let done = list.blocks_left == 0 || mutant!(PromotedWhileStale);
        let body = list.encode();
        for other in others.iter() {
            let header = self.header(Kind::ClearDirty);
            self.send_body(other, header, body.clone());
        }
        if done {
            self.stale.current.insert(member);
            self.try_promote();
        }
    }

    /// Promotes a member that has nothing stale left.
    pub(super) fn try_promote(&mut self) {
        if !self.is_active() || self.is_quiescing() {
            return;
        }
        let Some(member) = self.stale.current.iter().next() else { return };
        if !self.is_report_marked(member) {
            return;
        }
        self.stale.current.remove(member);
        let next = self.view.as_ref().map(|v| v.step(ViewStep::Promote(member), self.epoch));
        if let (Some(Ok(next)), Some(spec)) = (next, self.spec.clone()) {
            self.stale.inexact.insert(member);
            self.change_view(next, spec, Vec::new(), false);
        }
    }
}
