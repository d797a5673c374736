//! The coordinator's part in noticing stores that went back in time: marks, and what members are known to have reached.
//!
//! A **mark** is a number that every active member makes durable together with what the client knows of all of them. It is sent when
//! something happened that a store could lose without a trace: writes, and chunks that a resync brought. A member that later
//! shows less than it had acknowledged has lost a part of its history, and is copied over in full.

use super::{Client, Notice, Payload, State};
use crate::pool::{Attested, Epoch, Mark, MemberId, MemberSet, MemberState, Position, StoreId, View};
use crate::time::Time;
use crate::wire::{AttachReply, DirtyAddition, Kind, MessageHeader, Status, encode_attested};

/// A mark that not all members have answered.
struct Pending {
    waiting: MemberSet,
    since: Time,
    /// It covers something that the mark before did not.
    is_news: bool,
}

/// What the members that are connected say of their history.
pub(super) struct Found {
    pub(super) known: Attested,
    /// Members that show less than they had: what they had, and what they show.
    pub(super) behind: Vec<(MemberId, Position, Position)>,
    /// Members that the last client left in good order, with the latest view.
    pub(super) proves: MemberSet,
}

/// Number of stores of which a client remembers what it heard in hellos.
const MAX_HEARD: usize = 64;
/// Number of epochs that a client remembers to have sent views of. After more, any later one may have been.
const MAX_SENT: usize = 64;

/// What the client knows of the history of each member's store.
#[derive(Default)]
pub(super) struct History {
    pub(super) attested: Attested,
    /// The stores that this is about.
    stores: [Option<StoreId>; crate::pool::MAX_MEMBERS],
    /// The last mark that was sent in this attachment.
    mark: Mark,
    pending: Option<Pending>,
    sent_at: Time,
    /// Something happened that no mark covers.
    is_due: bool,
    /// The last mark is durable everywhere, and no member knows that of the others.
    is_untold: bool,
    /// Syncing members that reported chunks which no mark covers.
    reported: MemberSet,
    /// Where members were found that had lost a part of their history, until they come back in.
    found: [Option<Position>; crate::pool::MAX_MEMBERS],
    /// Those of which no committed view says that they miss the whole pool.
    unrecorded: MemberSet,
    /// The epochs of the views that were sent since, which they may have although nobody answered.
    sent_in: Vec<Epoch>,
    /// What hellos told of stores, oldest first. It stays true when the node that told it is gone.
    heard: Vec<(StoreId, Position)>,
}

impl History {
    /// A write goes out.
    pub(super) const fn written(&mut self) {
        self.is_due = true;
    }

    /// Remembers what hellos told of the stores in a view.
    pub(super) fn hear(&mut self, view: &View, known: &Attested) {
        for line in &view.members {
            let position = known.of(line.id);
            match self.heard.iter_mut().find(|(store, _)| *store == line.store) {
                Some((_, heard)) => heard.advance(position),
                None => self.heard.push((line.store, *position)),
            }
        }
        let excess = self.heard.len().saturating_sub(MAX_HEARD);
        self.heard.drain(..excess);
    }

    /// Forgets what is known of stores that are no members any more.
    fn rebase(&mut self, view: &View) {
        for member in MemberId::all() {
            let store = view.member(member).map(|m| m.store);
            if self.stores[member.index()] != store {
                self.attested.forget(member);
                self.stores[member.index()] = store;
                self.found[member.index()] = None;
                self.unrecorded.remove(member);
            }
        }
    }

    /// What is told to the members of a view.
    fn told_in(&self, view: &View) -> Attested {
        let mut told = self.attested;
        for line in &view.members {
            if self.stores[line.id.index()] != Some(line.store) {
                told.forget(line.id);
            }
        }
        told.regressed = told.regressed.without(view.clean());
        told
    }
}

impl Client {
    /// What the client knows of the history of each member's store.
    pub(crate) const fn attested(&self) -> &Attested {
        &self.history.attested
    }

    /// What the members of `next` are told of each other with it.
    pub(super) fn attested_in(&self, next: &View) -> Attested {
        self.history.told_in(next)
    }

    /// A member has a view durable.
    pub(super) fn attest_view(&mut self, member: MemberId, view: &View) {
        let known = self.history.attested.of(member);
        let mark = if known.view_epoch == view.epoch { known.mark } else { Mark(0) };
        let position = Position::new(self.epoch.max(view.epoch), view, mark);
        if self.history.stores[member.index()] == view.member(member).map(|m| m.store) {
            self.history.attested.note(member, &position);
        }
    }

    /// A view is committed: that every active member has it goes on record with each.
    pub(super) fn history_committed(&mut self, attach: bool) {
        let Some(view) = self.view.clone() else { return };
        self.history.rebase(&view);
        for member in view.active().iter() {
            self.attest_view(member, &view);
        }
        self.history.attested.regressed = self.history.attested.regressed.without(view.clean());
        self.history.reported = self.history.reported.intersection(view.in_state(MemberState::Syncing));
        if attach {
            self.history.mark = Mark(0);
            self.history.unrecorded = MemberSet::EMPTY;
        }
        // One that is brought back in was told with the view of its rejoin, and moves on from there.
        for member in view.active().iter() {
            self.history.found[member.index()] = None;
            self.history.unrecorded.remove(member);
        }
        self.history.pending = None;
        self.history.is_due = true;
        self.send_mark();
    }

    /// Members were lost, or the attachment is over.
    pub(super) fn history_lost(&mut self, members: MemberSet) {
        if let Some(pending) = &mut self.history.pending {
            pending.waiting = pending.waiting.without(members);
        }
        self.history.reported = self.history.reported.without(members);
    }

    /// A Syncing member has chunks current that it had not before.
    pub(super) fn history_reported(&mut self, member: MemberId) {
        self.history.reported.insert(member);
        self.history.is_due = true;
    }

    /// Whether a member could be promoted, as far as its history goes: what it reported is covered by a mark that it has
    /// durable. Else it could go back to before that, and be Clean by the view of the others. Asks for the mark.
    pub(super) fn is_report_marked(&mut self, member: MemberId) -> bool {
        if mutant!(PromotedUnmarked) {
            return true;
        }
        if self.history.reported.contains(member) && self.history.pending.is_none() {
            self.send_mark();
        }
        !self.history.reported.contains(member) && self.history.pending.is_none()
    }

    /// Whether all that was written is covered by a mark that every active member has durable. Asks for the mark.
    pub(super) fn is_all_marked(&mut self) -> bool {
        if mutant!(DetachedUnmarked) {
            return true;
        }
        if self.history.is_due && self.history.pending.is_none() {
            self.send_mark();
        }
        !self.history.is_due && self.history.pending.is_none()
    }

    fn send_mark(&mut self) {
        let waiting = self.view_active();
        if !self.is_active() || self.history.pending.is_some() || waiting.is_empty() {
            return;
        }
        let Some(view) = &self.view else { return };
        let body = encode_attested(&self.history.told_in(view));
        self.history.mark = self.history.mark.next();
        let header = MessageHeader {
            sequence: crate::pool::Sequence(self.history.mark.0),
            payload: u32::try_from(body.len()).unwrap_or(u32::MAX),
            ..self.header(Kind::Mark)
        };
        let is_news = self.history.is_due;
        // What is in flight may reach a member's disk after the mark did.
        self.history.is_due = self.parts.has_sent_write();
        self.history.is_untold = false;
        self.history.reported = MemberSet::EMPTY;
        self.history.sent_at = self.now;
        self.history.pending = Some(Pending { waiting, since: self.now, is_news });
        for member in waiting.iter() {
            self.send(member, header, Payload::Body(body.clone()));
        }
    }

    pub(super) fn mark_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        if header.status != Status::Ok {
            let is_of_present = self.history.pending.as_ref().is_some_and(|p| p.waiting.contains(member));
            if is_of_present && matches!(self.state, State::Active | State::Changing { .. }) {
                let text = String::from_utf8_lossy(body).into_owned();
                self.drop_member(
                    member,
                    &format!("mark {} refused: {:?} {text}", header.sequence, header.status),
                );
            }
            return;
        }
        if header.epoch != self.epoch {
            return; // The answer to an attachment that was given up.
        }
        let (view_epoch, mark) = (header.epoch, Mark(header.sequence.0));
        let position = Position { epoch: header.epoch, view_epoch, view: header.view, mark };
        self.history.attested.note(member, &position);
        let Some(pending) = self.history.pending.as_mut().filter(|_| self.history.mark == mark) else {
            return;
        };
        pending.waiting.remove(member);
        self.mark_progress();
    }

    /// Ends a mark that all members have answered which are still there.
    fn mark_progress(&mut self) {
        let Some(pending) = self.history.pending.take_if(|p| p.waiting.is_empty()) else { return };
        self.history.is_untold = pending.is_news;
        self.try_promote();
        self.try_detach();
    }

    pub(super) fn tick_history(&mut self) {
        if !self.is_active() {
            return;
        }
        if let Some(pending) = &self.history.pending {
            if self.now - pending.since > self.config.leg_timeout {
                let silent = pending.waiting;
                silent.iter().for_each(|m| self.drop_member(m, "the mark was not answered in time"));
            }
            return self.mark_progress();
        }
        let is_wanted = self.history.is_due || self.history.is_untold;
        if is_wanted && self.now - self.history.sent_at >= self.config.mark_interval {
            self.send_mark();
        }
    }

    /// An attachment begins from `best`: takes over what the members remember of each other, and gives those whose store shows
    /// less than it had.
    pub(super) fn hear_history(&mut self, best: &View, replies: &[(MemberId, AttachReply)]) -> MemberSet {
        self.history.rebase(best);
        self.history.pending = None;
        self.history.reported = MemberSet::EMPTY;
        for (_, reply) in replies {
            self.history.attested.merge(best, &reply.attested, &reply.view);
        }
        self.history.attested.regressed = self.history.attested.regressed.without(best.clean());
        let mut regressed = MemberSet::EMPTY;
        for (member, reply) in replies {
            if self.refutes(*member, &reply.position) || self.is_unrecorded(*member, &reply.position) {
                regressed.insert(*member);
            } else {
                self.history.unrecorded.remove(*member);
                let position = Position { epoch: self.epoch, ..reply.position };
                self.history.attested.note(*member, &position);
            }
        }
        regressed
    }

    /// Whether a member was found to have lost a part of its history, no committed view says so, and it is not known to show the right
    /// store again. One that still shows the other one is behind, or has a view that this client sent it since.
    fn is_unrecorded(&self, member: MemberId, position: &Position) -> bool {
        let sent = &self.history.sent_in;
        let is_later =
            sent.len() >= MAX_SENT && sent.first().is_some_and(|first| position.view_epoch >= *first);
        let may_be_it = self.refutes(member, position)
            || sent.contains(&position.view_epoch)
            || is_later
            || mutant!(RightStoreRefused);
        self.history.unrecorded.contains(member) && may_be_it
    }

    /// A view of this epoch is sent.
    pub(super) fn history_sent(&mut self, epoch: Epoch) {
        if self.history.unrecorded.is_empty() {
            self.history.sent_in.clear();
        } else if self.history.sent_in.len() < MAX_SENT && !self.history.sent_in.contains(&epoch) {
            self.history.sent_in.push(epoch);
        }
    }

    fn refutes(&self, member: MemberId, position: &Position) -> bool {
        self.history.attested.refutes(member, position) && !mutant!(RegressionIgnored)
    }

    /// What goes on record for members that were found to have lost a part of their history: they miss the whole pool.
    pub(super) fn regress(
        &mut self,
        members: MemberSet,
        found: &[(MemberId, Position)],
    ) -> Option<DirtyAddition> {
        for (member, shown) in found.iter().filter(|(m, _)| members.contains(*m)) {
            let known = *self.history.attested.of(*member);
            let found = self.history.found[member.index()].replace(*shown);
            if !found.is_some_and(|found| found.is_same_point(shown)) {
                self.notice(Notice::Regressed { member: *member, known, shown: *shown });
            }
        }
        self.history.unrecorded = self.history.unrecorded.union(members);
        self.history.attested.regressed = self.history.attested.regressed.union(members);
        let length = self.spec.as_ref().map_or(0, |s| s.size);
        let is_due = !members.is_empty() && length > 0 && !mutant!(RegressedNotStale);
        is_due.then_some(DirtyAddition { members, offset: 0, length })
    }

    /// Members that some said to have lost a part of their history, and that not all of `replies` who stay Clean have on record as
    /// wholly stale: the view that said so was not committed.
    pub(super) fn half_told_regressions(
        &self,
        stays: MemberSet,
        replies: &[(MemberId, AttachReply)],
    ) -> MemberSet {
        let staying = replies.iter().filter(|(m, _)| stays.contains(*m));
        let all = staying.fold(self.history.attested.regressed, |told, (_, reply)| {
            told.intersection(reply.attested.regressed)
        });
        self.history.attested.regressed.without(all)
    }

    /// Members of a view that were found to have lost a part of their history, which no committed view says.
    pub(super) fn unrecorded_in(&self, view: &View) -> MemberSet {
        let members = view.members.iter().map(|m| m.id).collect();
        if mutant!(FoundInRejoinForgotten) {
            return MemberSet::EMPTY;
        }
        self.history.unrecorded.intersection(members)
    }

    /// A member is being brought back in: whether its store shows less than it had. What it remembers of the others is taken over.
    pub(super) fn is_regressed_at_rejoin(&mut self, member: MemberId, reply: &AttachReply) -> bool {
        let Some(view) = self.view.clone() else { return false };
        let was_known = self.history.attested.regressed;
        let found = self.history.found[member.index()];
        let is_known = found.is_some_and(|found| found.is_same_point(&reply.position));
        let is_unrecorded = self.is_unrecorded(member, &reply.position);
        let is_behind = self.refutes(member, &reply.position) && !is_known;
        self.history.attested.merge(&view, &reply.attested, &reply.view);
        self.history.attested.regressed = was_known;
        // It may have been told so with a view that nobody else has.
        let says_so = reply.attested.regressed.contains(member) && !was_known.contains(member);
        is_behind || (says_so || is_unrecorded) && !mutant!(RegressionIgnored)
    }

    /// Whether the Clean members of `best` that kept their history may go on, though others, `regressed`, did not. One of those may
    /// have been the last that was Clean, in a later view that is lost with its history: so one that goes on has to prove that there was
    /// none. The client itself can, if it was attached and has committed a view with that member Clean; and a member that the last client
    /// left in good order, because every later attachment would have needed it.
    pub(super) fn may_go_on_without(
        &self,
        best: &View,
        known: &Attested,
        regressed: MemberSet,
        proves: MemberSet,
    ) -> bool {
        let lost = regressed.intersection(best.clean());
        if lost.is_empty() {
            return true;
        }
        let rest = best.clean().without(lost);
        let had_later = |m: MemberId| (known.of(m).view_epoch, known.of(m).view) > best.order();
        let is_own = !self.own_epochs.is_empty()
            && (!rest.intersection(self.committed_clean).is_empty() || mutant!(PromotionProves));
        let is_proved = (is_own || !proves.intersection(rest).is_empty()) && !lost.iter().any(had_later);
        !rest.is_empty() && (is_proved || mutant!(LostHistoryNotProved))
    }

    /// The members that show less in their hellos than they had, as far as the nodes that are connected know; and those that prove
    /// that they were there to the end.
    pub(super) fn history_in_hellos(&self, best: &View) -> Found {
        let mut known = Attested::default();
        let is_member = |r: &&crate::wire::HelloReply| best.has_store(r.member, r.store());
        for line in best.members.iter().filter(|m| self.history.stores[m.id.index()] == Some(m.store)) {
            known.note(line.id, self.history.attested.of(line.id));
        }
        // A store that went back may know a view without the members that know better, and those are asked again now.
        for line in best.members.iter().filter(|_| !mutant!(HeardForgotten)) {
            if let Some((_, heard)) = self.history.heard.iter().find(|(store, _)| *store == line.store) {
                known.note(line.id, heard);
            }
        }
        for reply in self.hellos().filter(is_member) {
            known.merge(best, &reply.attested, &reply.view);
        }
        let mut behind = Vec::new();
        let mut proves = MemberSet::EMPTY;
        for reply in self.hellos().filter(is_member) {
            let is_behind = known.refutes(reply.member, &reply.position) && !mutant!(RegressionIgnored);
            if is_behind || self.is_unrecorded(reply.member, &reply.position) {
                behind.push((reply.member, *known.of(reply.member), reply.position));
            } else if reply.clean_detach && reply.view == *best {
                proves.insert(reply.member);
            }
        }
        Found { known, behind, proves }
    }
}
