//! The attach protocol and view changes.

use super::recovery::UnheardLosses;
use super::{Client, LinkId, LinkState, Notice, Output, OverReason, State, recovery};
use crate::pool::{
    Cause, Epoch, MemberId, MemberSet, MemberSpec, MemberView, PoolSpec, Position, Refusal, Sequence, View,
    ViewStep,
};
use crate::time::Time;
use crate::wire::{
    Attach, AttachReply, DirtyAddition, Goodbye, Kind, MessageHeader, SetView, Status, WireError,
    encode_attested,
};

/// More writes than a pool can have in a thousand years.
const HIGHEST_HONEST_SEQUENCE: u64 = 1 << 62;

impl Client {
    pub(super) fn message(&mut self, id: LinkId, header: &MessageHeader, body: &[u8]) {
        let Some(link) = self.link(id) else { return };
        match (&link.state, header.kind) {
            (LinkState::Greeting { .. }, Kind::Challenge | Kind::HelloReply) => {
                self.greeting_message(id, header, body);
            }
            // Also of a store that is no member yet: it may become one, and its link must live until then.
            (LinkState::Ready(_), Kind::Pong) => {
                if let Some(link) = self.link_mut(id) {
                    link.ping_since = None;
                }
            }
            (LinkState::Ready(_), kind) => {
                let Some(member) = link.member.filter(|m| self.legs[m.index()] == Some(id)) else {
                    if kind == Kind::Goodbye {
                        self.drop_link(id, "the node is stopping");
                    }
                    return; // Its store is no member, and has nothing to say.
                };
                match kind {
                    Kind::IoReply => self.io_reply(member, header),
                    Kind::FlushReply => self.flush_reply(member, header),
                    Kind::AttachReply => self.attach_reply(member, header, body),
                    Kind::SetViewReply => self.set_view_reply(member, header, body),
                    Kind::PrepareReply => self.prepare_reply(member, header, body),
                    Kind::GrowReply => self.grow_reply(member, header, body),
                    Kind::ChunksDone => self.chunks_done(member, header, body),
                    Kind::SourceFailed => self.source_failed(member, header),
                    Kind::MarkReply => self.mark_reply(member, header, body),
                    Kind::DetachReply => self.detach_reply(member, header.status == Status::Ok),
                    Kind::CompareReply => self.compare_reply(member, header, body),
                    Kind::DigestReply => self.digest_reply(member, header, body),
                    Kind::Command => self.command_message(id, header, body),
                    Kind::Goodbye if header.status == Status::StaleEpoch => {
                        self.told_fenced(id, header.epoch)
                    }
                    Kind::Goodbye if header.status == Status::IoError => {
                        self.note_failed_flush(member);
                        self.drop_member_for(
                            member,
                            Cause::FlushErrors,
                            "its disk failed a flush; what it had not flushed counts as missed",
                        );
                    }
                    Kind::Goodbye => self.node_stops(id, member, header, body),
                    _ => self.drop_link(id, &format!("protocol error: {kind:?} is not expected by a client")),
                }
            }
            (_, kind) => {
                self.drop_link(id, &format!("protocol error: {kind:?} before the hello was answered"))
            }
        }
    }

    /// A node stops in order. What it claims counts if it is in service: it flushed after the last write that it answered, so
    /// none of those is missed by it, also if its machine loses power. See `docs/replication.md`.
    fn node_stops(&mut self, id: LinkId, member: MemberId, header: &MessageHeader, body: &[u8]) {
        let is_flushed = Goodbye::decode(body).is_ok_and(|goodbye| goodbye.flushed);
        let is_in_service = matches!(self.state, State::Active | State::Changing { attach: false, .. });
        if is_flushed && is_in_service && header.epoch == self.epoch && self.view_active().contains(member) {
            self.left_flushed.insert(member);
        }
        self.health.blame(member, Cause::NodeStopped);
        self.drop_link(id, "the node is stopping");
    }

    /// A member refused an attach; why, as far as its answer tells.
    fn note_attach_refused(&mut self, member: MemberId, status: Status) -> Cause {
        if matches!(status, Status::IoError | Status::NoSpace) {
            self.disks_refuse.insert(member);
        }
        match status {
            Status::IoError => Cause::MetadataErrors,
            Status::NoSpace => Cause::DiskFull,
            _ => Cause::Refused,
        }
    }

    /// Why a member refused a view, as far as its answer tells.
    fn cause_of_refused_view(&self, member: MemberId, status: Status) -> Cause {
        match status {
            Status::IoError if self.rejoin_member() == Some(member) => Cause::HandoverFailed,
            Status::IoError => Cause::MetadataErrors,
            Status::NoSpace => Cause::NoRoom,
            _ => Cause::Refused,
        }
    }

    /// A member has let another client attach, and closes this connection. There is nothing left to do for this one: a view
    /// without the member would only be in the way of the other, which comes to the rest of the members in a moment.
    fn told_fenced(&mut self, id: LinkId, epoch: Epoch) {
        match self.state {
            State::Active | State::Changing { attach: false, .. } if epoch > self.epoch => {
                self.end(OverReason::Fenced(epoch));
            }
            // Not attached yet, or on the way out: as if the leg were lost.
            _ => self.drop_link(id, "another client attached"),
        }
    }

    /// Goes from Gathering to Attaching when the recovery rule allows it: every Clean member of the highest view must
    /// be reachable, because any later view would have been recorded on at least one of them.
    pub(super) fn try_attach(&mut self) {
        let State::Gathering { possible_since, .. } = &self.state else { return };
        if self.config.observe {
            return;
        }
        let possible_since = *possible_since;
        let Some(best) = recovery::latest(self.hellos(), |r| &r.view) else { return };
        let (view, spec) = (best.view.clone(), best.spec.clone());
        if recovery::is_displaced(&self.own_epochs, view.epoch) {
            return self.end(OverReason::Fenced(view.epoch));
        }
        if let Some(force) = self.forced() {
            return self.attach_forced(force);
        }
        if view.epoch.is_of_older_branch(self.highest_epoch) && !mutant!(LaterBranchIgnored) {
            return self.tell_later_branch();
        }
        let ready = self.ready_in(&view);
        if !recovery::may_attach(&view, ready) {
            return self.tell_waiting(&view, &spec, ready);
        }
        let found = self.history_in_hellos(&view);
        self.history.hear(&view, &found.known);
        let lost = found.behind.iter().map(|(member, ..)| *member).collect();
        if !self.may_go_on_without(&view, &found.known, lost, found.proves) {
            return self.tell_history_lost(&view, &found.behind);
        }
        let since = possible_since.unwrap_or(self.now);
        let is_early = self.now - since < self.config.attach_grace;
        // A member that is not needed may have been forced into use meanwhile, and know of a later view. So each one is tried
        // once, for as long as a connection and a hello may take.
        let is_absent = view.members.iter().any(|m| !ready.contains(m.id));
        // A node that has not answered yet may know another pool of the same name, or members that a store which went back in time
        // has not heard of.
        let is_stranger = |l: &super::Link| l.member.is_none() && !l.asked && !l.is_idle();
        let has_stranger = self.links.iter().any(is_stranger) && !mutant!(StrangersNotAsked);
        let is_asking = !self.has_asked_all()
            && (is_absent || is_early || has_stranger || self.goes_by_name() || self.has_leg_away());
        if is_asking || is_early && !view.active().is_subset(ready) {
            if let State::Gathering { possible_since, .. } = &mut self.state {
                *possible_since = Some(since);
            }
            return;
        }
        let highest = self.hellos().map(|r| r.epoch).max().unwrap_or_default();
        if self.yields_to_rival(highest) {
            return;
        }
        self.epoch = recovery::proposed_epoch(highest, self.epoch);
        let asked = view.active().intersection(ready);
        self.attach_to(view, spec, asked);
    }

    /// Whether another client, whose epoch is the `highest`, cut an attach of this one short a moment ago. It is given the
    /// time to come through; else two that may displace each other could do so for ever.
    fn yields_to_rival(&mut self, highest: Epoch) -> bool {
        if !self.was_cut_short || highest <= self.epoch {
            return false;
        }
        match self.rival {
            Some((epoch, since)) if epoch == highest => self.now - since < self.config.leg_timeout,
            Some(_) | None => {
                self.rival = Some((highest, self.now));
                true
            }
        }
    }

    /// The members of a view whose stores are connected.
    fn ready_in(&self, view: &View) -> MemberSet {
        let is_up = |l: &super::Link| matches!(l.state, LinkState::Ready(_)) && self.suits(l);
        let is_there = |store| self.links.iter().any(|l| l.store == Some(store) && is_up(l));
        view.members.iter().filter(|m| is_there(m.store)).map(|m| m.id).collect()
    }

    pub(super) fn attach_to(&mut self, view: View, spec: PoolSpec, asked: MemberSet) {
        self.adopt_spec(spec, Some(view.order()));
        self.view = Some(view);
        self.assign_legs();
        let body = Attach {
            client: self.config.client,
            // A client that was displaced must not displace in turn.
            takeover: self.config.takeover && self.own_epochs.is_empty(),
            rejoin: false,
            yields: self.config.yields,
            description: self.config.description.clone(),
            held_ms: self.held_ms(),
        }
        .encode();
        self.state = State::Attaching { waiting: asked, replies: Vec::new(), since: self.now };
        for member in asked.iter() {
            let header = self.header(Kind::Attach);
            self.send_body(member, header, body.clone());
        }
    }

    /// For how long this client has had the pool.
    pub(super) fn held_ms(&self) -> u64 {
        let held = self.held_since.map(|since| self.now - since).unwrap_or_default();
        u64::try_from(held.as_millis()).unwrap_or(u64::MAX)
    }

    /// Some node has met a client of a branch that the operator forced into use, and nobody has shown a view of it.
    fn tell_later_branch(&mut self) {
        if self.own_epochs.is_empty() {
            let text = format!(
                "the operator has forced another member into use: a node has met a client with epoch {}, and no node that is \
                 connected has a view of that branch. To give it up, force a member into use again",
                self.highest_epoch
            );
            self.tell_once(text);
            self.ask_again();
        } else {
            self.end(OverReason::Fenced(self.highest_epoch));
        }
    }

    /// What nodes said a while ago may be of the past: another client may have made views since. They are asked once more.
    fn ask_again(&mut self) {
        let (now, timeout) = (self.now, self.config.leg_timeout);
        let retry_at = now + self.config.reconnect_interval / 4;
        for (link, id) in self.links.iter_mut().zip(0u8..) {
            if matches!(link.state, LinkState::Ready(_)) && now - link.greeted >= timeout {
                link.state = LinkState::Down { retry_at };
                link.again = true;
                self.outputs.push_back(Output::Disconnect(LinkId(id)));
            }
        }
    }

    /// Asks members that seem to be behind again, if other nodes have been asked since: another client may have moved all of them on in
    /// between. Returns whether there are any.
    fn ask_again_whose_hello_is_older(&mut self, behind: &[(MemberId, Position, Position)]) -> bool {
        let retry_at = self.now + self.config.reconnect_interval / 4;
        let is_ready = |l: &super::Link| matches!(l.state, LinkState::Ready(_));
        let newest = self.links.iter().filter(|l| is_ready(l)).map(|l| l.greeted).max();
        let is_behind = |l: &super::Link| {
            let LinkState::Ready(reply) = &l.state else { return false };
            Some(l.greeted) < newest && behind.iter().any(|(member, ..)| *member == reply.member)
        };
        let mut is_asked = false;
        for (link, id) in self.links.iter_mut().zip(0u8..).filter(|(link, _)| is_behind(link)) {
            link.state = LinkState::Down { retry_at };
            link.again = true;
            self.outputs.push_back(Output::Disconnect(LinkId(id)));
            is_asked = true;
        }
        is_asked
    }

    /// Says why the client waits, unless it said so before.
    fn tell_once(&mut self, text: String) {
        if let State::Gathering { told, possible_since } = &mut self.state {
            *possible_since = None;
            if *told != text {
                told.clone_from(&text);
                self.notice(Notice::Waiting(text));
            }
        }
    }

    /// A Clean member lost a part of its history, and nobody can prove that nothing later is lost with it.
    fn tell_history_lost(&mut self, view: &View, behind: &[(MemberId, Position, Position)]) {
        if self.ask_again_whose_hello_is_older(behind) {
            return;
        }
        let lost = behind.iter().filter(|(m, ..)| view.clean().contains(*m));
        let name = |(member, known, shown): &(MemberId, Position, Position)| {
            format!("member {member} was at {known} and shows {shown}")
        };
        let list: Vec<_> = lost.clone().map(name).collect();
        let rest = view.clean().without(lost.map(|(m, ..)| *m).collect());
        let advice = match rest.iter().next() {
            Some(member) => format!(
                "the last client did not leave in good order, so a later state may be lost with it. Put the right store back. If \
                 member {member} was in use to the end, continue with it instead: --force-from {member}"
            ),
            None => "no other member is current. Put the right store back. --force-from continues with what a member has; what was \
                     written later is lost"
                .to_owned(),
        };
        let text =
            format!("a store went back in time (restored from a copy?): {}; {advice}", list.join(", "));
        self.tell_once(text);
        self.ask_again();
    }

    fn tell_waiting(&mut self, view: &View, spec: &PoolSpec, ready: MemberSet) {
        let missing = view.clean().without(ready);
        if self.links.iter().any(|l| matches!(l.state, LinkState::Connecting | LinkState::Greeting { .. })) {
            return; // The first attempts may well succeed.
        }
        let name = |m: MemberId| {
            let address = spec.member(m).map(|m| m.address.to_string());
            let link =
                self.links.iter().find(|l| l.member == Some(m) || Some(l.address.to_string()) == address);
            let error = link.map_or("not connected", |l| l.last_error.as_str());
            format!("member {m} at {} ({error})", address.unwrap_or_default())
        };
        let list: Vec<_> = missing.iter().map(name).collect();
        let text = format!(
            "view {} has them Clean, so they may know of newer data: {}",
            view.number,
            list.join(", ")
        );
        self.tell_once(text);
        self.ask_again();
    }

    fn attach_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        if header.epoch < self.epoch && header.status == Status::Ok {
            return; // The answer to an attempt that was given up.
        }
        if self.rejoin_attached(member, header, body) {
            return;
        }
        let State::Attaching { waiting, .. } = &self.state else { return };
        if !waiting.contains(member) {
            return;
        }
        match header.status {
            Status::Ok => {}
            Status::Held => return self.end(OverReason::Held(String::from_utf8_lossy(body).into_owned())),
            Status::StaleEpoch => {
                // Somebody attached since the hello; the next one tells the epoch to beat.
                return self.gather();
            }
            status => {
                let text = String::from_utf8_lossy(body).into_owned();
                let cause = self.note_attach_refused(member, status);
                return self.drop_member_for(member, cause, &refusal("attach", status, &text));
            }
        }
        let reply = match AttachReply::decode(body) {
            Ok(reply) => reply,
            Err(error) => return self.drop_member_for(member, Cause::Refused, &protocol(&error)),
        };
        self.disks_refuse.remove(member);
        if let State::Attaching { waiting, replies, .. } = &mut self.state {
            waiting.remove(member);
            replies.push((member, reply));
            if waiting.is_empty() {
                let replies = std::mem::take(replies);
                self.attach_complete(replies);
            }
        }
    }

    /// All members that were asked have accepted the epoch: commit a view of this attachment on them.
    fn attach_complete(&mut self, replies: Vec<(MemberId, AttachReply)>) {
        let attached: MemberSet = replies.iter().map(|(m, _)| *m).collect();
        let replied = replies.iter().map(|(_, r)| r);
        let Some(newest) = recovery::latest(replied, |r| &r.view) else { return };
        let (best, spec) = (newest.view.clone(), newest.spec.clone());
        for (member, reply) in &replies {
            self.note_view(*member, &reply.view, &reply.spec);
        }
        if recovery::is_displaced(&self.own_epochs, best.epoch) {
            return self.end(OverReason::Fenced(best.epoch));
        }
        replies.iter().for_each(|(_, reply)| self.go_on_above(reply));
        if let Some(force) = self.forced() {
            return self.force(&best, spec, force);
        }
        let is_same = self.view.as_ref().is_some_and(|v| v.has_stores_of(&best));
        if !recovery::may_attach(&best, attached) || !is_same {
            // The view moved on between hello and attach; gather again with what is known now.
            return self.gather();
        }
        self.adopt_spec(spec.clone(), Some(best.order()));
        let regressed = self.hear_history(&best, &replies);
        let is_proof =
            |m: MemberId, r: &AttachReply| r.clean_detach && r.view == best && !regressed.contains(m);
        let proves = replies.iter().filter(|(m, r)| is_proof(*m, r)).map(|(m, _)| *m).collect();
        if !self.may_go_on_without(&best, &self.history.attested, regressed, proves) {
            return self.gather(); // The hellos tell, and say what is waited for.
        }
        let found: Vec<_> = replies.iter().map(|(m, r)| (*m, r.position)).collect();
        // Whatever one says that lost a part of its history counts as if it were not there.
        let replies: Vec<_> = replies.into_iter().filter(|(m, _)| !regressed.contains(*m)).collect();
        let attached = attached.without(regressed);
        let best = recovery::base_of_attach(&best, replies.iter().map(|(m, r)| (*m, &r.view)));
        // A Syncing member that did not hear of the last view does not know all that it misses: it is brought back in anew. So
        // is one whose promotion is taken back.
        let behind = replies.iter().filter(|(_, r)| r.view != best).map(|(member, _)| *member).collect();
        let absent = best.active().without(attached);
        let failed: MemberSet = replies.iter().filter(|(_, r)| r.flush_failed).map(|(m, _)| *m).collect();
        let powerless = self.lost_caches(&best, failed);
        let is_all = best.clean().is_subset(powerless);
        if is_all {
            self.lose_writes(powerless.intersection(best.clean()));
        }
        let (stale, mut additions) = self.reconcile(&best, &replies, absent, powerless);
        let stale = if is_all { stale } else { stale.union(powerless) };
        let mut lost = recovery::lost_in_attach(&best, attached, stale, behind);
        if self.own_epochs.is_empty() && !mutant!(DeafStaysClean) {
            let views: Vec<_> = replies.iter().map(|(m, r)| (*m, &r.view)).collect();
            match recovery::unheard_losses(&best, lost, &views) {
                UnheardLosses::None => {}
                UnheardLosses::By(deaf) => lost = lost.union(deaf),
                UnheardLosses::ByAll(members) => {
                    additions.push(DirtyAddition { members, offset: 0, length: spec.size });
                }
            }
        }
        additions.extend(self.regress(regressed, &found));
        let half_told = self.half_told_regressions(best.clean().without(lost), &replies);
        // What a rejoin found that was broken off is on record nowhere.
        let half_told = half_told.union(self.unrecorded_in(&best));
        additions.extend(self.regress(half_told, &[]));
        lost = lost.union(half_told.intersection(best.active()));
        // A view that was given up half-way told what its absent members miss to some members only.
        let newly_out = best.out().union(lost).without(self.committed_out);
        if !self.own_epochs.is_empty() && !newly_out.is_empty() && !mutant!(GivenUpViewForgotten) {
            additions.extend(self.missed_by(newly_out));
        }
        // So did one that was given up with a new store in it: the store has nothing, and some do not know that.
        let is_news = |m: &&MemberView| replies.iter().any(|(_, r)| !r.view.has_store(m.id, m.store));
        let new: MemberSet = best.members.iter().filter(is_news).map(|m| m.id).collect();
        if !new.is_empty() && !mutant!(NewStoreNotTold) {
            additions.push(DirtyAddition { members: new, offset: 0, length: spec.size });
        }
        // And one that was given up with a larger pool, of which some know nothing.
        let smallest = replies.iter().map(|(_, r)| r.spec.size).min().unwrap_or(spec.size);
        additions.extend(self.missed_growth(best.out().union(lost), smallest, spec.size));
        match best.step(ViewStep::Attach(lost), self.epoch) {
            Ok(next) => {
                if !self.own_epochs.is_empty() {
                    self.own_epochs.push(self.epoch);
                }
                self.view = Some(best);
                self.change_view(next, spec, additions, true);
            }
            Err(error) => {
                let text = format!("no view can follow {best}: {error}");
                self.notice(Notice::Waiting(text));
                self.gather();
            }
        }
    }

    /// Makes `next`, and the pool as it is in it, durable on every member that is active in it.
    pub(super) fn change_view(
        &mut self,
        next: View,
        spec: PoolSpec,
        mut additions: Vec<DirtyAddition>,
        attach: bool,
    ) {
        debug_assert!(spec.describes(&next), "{next} goes with another specification");
        self.verify_disturbed();
        let waiting = next.active();
        let attested = self.attested_in(&next);
        self.history_sent(next.epoch);
        self.faults.tell(&next, &mut additions);
        let mut batches: Vec<Vec<DirtyAddition>> =
            additions.chunks(SetView::MAX_ADDITIONS).map(<[DirtyAddition]>::to_vec).collect();
        if batches.is_empty() {
            batches.push(Vec::new());
        }
        let last = batches.len() - 1;
        for (i, additions) in batches.into_iter().enumerate() {
            let body =
                SetView { view: next.clone(), spec: spec.clone(), additions, more: i < last, attested }
                    .encode();
            for member in waiting.iter() {
                let mut header = self.header(Kind::SetView);
                header.view = next.number;
                self.send_body(member, header, body.clone());
            }
        }
        self.restart_hold();
        self.state = State::Changing { next, spec, waiting, since: self.now, attach };
    }

    fn set_view_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        let State::Changing { next, waiting, .. } = &mut self.state else { return };
        if header.epoch != self.epoch || header.view != next.number || !waiting.contains(member) {
            return;
        }
        match header.status {
            Status::Ok => {
                waiting.remove(member);
                let (waiting, view) = (*waiting, next.clone());
                self.attest_view(member, &view);
                if waiting.is_empty() || mutant!(CommitWithoutAll) {
                    self.commit();
                } else {
                    self.note_only_waits_for(waiting);
                }
            }
            Status::StaleEpoch | Status::NotAttached => self.end(OverReason::Fenced(header.epoch)),
            status => {
                let text = String::from_utf8_lossy(body).into_owned();
                let cause = self.cause_of_refused_view(member, status);
                self.drop_member_for(
                    member,
                    cause,
                    &refusal(&format!("view {}", header.view), status, &text),
                );
            }
        }
    }

    fn commit(&mut self) {
        let State::Changing { next, spec, attach, .. } = std::mem::replace(&mut self.state, State::Active)
        else {
            return;
        };
        self.counters.views += 1;
        if attach {
            // Writes are given up before an attachment is complete only, so its comparison has seen all of them.
            self.parts.settled();
        }
        // That of a view that was forced comes with it.
        self.epoch = next.epoch;
        self.highest_epoch = self.highest_epoch.max(self.epoch);
        self.own_epochs.clear();
        self.own_epochs.push(self.epoch);
        self.held_since.get_or_insert(self.now);
        self.was_cut_short = false;
        self.committed_out = next.out();
        self.committed_clean = next.clean();
        let notice = if attach { Notice::Attached(next.clone()) } else { Notice::Committed(next.clone()) };
        let replaced = self.replaced_by(&spec);
        self.adopt_spec(spec.clone(), Some(next.order()));
        self.dismiss_strangers();
        self.assign_legs();
        self.set_strays_aside();
        let limits: Vec<_> = next.active().iter().filter_map(|m| self.ready(m)).map(|r| r.limits).collect();
        self.max_io = limits.iter().map(|l| l.max_io).min().unwrap_or(self.max_io).min(super::MAX_PART);
        self.max_bytes = limits.iter().map(|l| u64::from(l.max_bytes)).min().unwrap_or(u64::MAX);
        if self.config.data_digest != super::DataDigest::Off {
            // A copy of everything in flight fits.
            self.max_bytes = self.max_bytes.min(self.config.bounce_memory.into());
            self.max_io = self.max_io.min(self.config.bounce_memory / 4096 * 4096).max(4096);
        }
        self.slot_limit = limits.iter().map(|l| usize::from(l.slots)).min().unwrap_or(1);
        for member in next.active().iter() {
            self.note_view(member, &next, &spec);
            self.note_epoch(member, self.epoch);
        }
        self.faults.committed(&next, attach);
        self.view = Some(next);
        (self.disks_refuse, self.left_flushed) =
            (MemberSet::EMPTY, self.left_flushed.without(self.view_active()));
        self.note_host_boots();
        self.notice(notice);
        if self.told_spec.as_ref() != Some(&spec) {
            self.told_spec = Some(spec.clone());
            self.notice(Notice::Spec(Box::new(spec)));
        }
        self.stale_committed(attach, replaced);
        self.connect_members();
        self.parts.raise_barriers();
        self.resume_requests();
        self.history_committed(attach);
        self.try_promote();
        self.advance_command();
        self.try_detach();
    }

    /// The members that another specification has not, or with another store.
    fn replaced_by(&self, next: &PoolSpec) -> MemberSet {
        let is_same = |m: &&MemberSpec| next.member(m.id).is_some_and(|n| n.store == m.store);
        self.spec.iter().flat_map(|s| &s.members).filter(|m| !is_same(m)).map(|m| m.id).collect()
    }

    /// Members can not be reached any more. The pool goes on with the others if a Clean one is left.
    pub(super) fn lose(&mut self, members: MemberSet, reason: &str) {
        self.history_lost(members);
        let causes: Vec<_> = MemberId::all().map(|m| self.health.take_blame(m)).collect();
        let cause_of = |m: MemberId| causes[m.index()];
        self.stale_lost(members, cause_of, reason);
        self.commands_lost(members);
        for member in members.iter() {
            self.parts.fail_member(member);
            if let Some(flush) = &mut self.flush
                && flush.pending.remove(member)
            {
                flush.failed.insert(member);
            }
        }
        let (base, spec, mut gone) = match &self.state {
            State::Gathering { .. } | State::Over(_) => return,
            State::Attaching { waiting, replies, .. } => {
                let asked = replies.iter().fold(*waiting, |mut set, (m, _)| {
                    set.insert(*m);
                    set
                });
                if !asked.intersection(members).is_empty() {
                    self.gather();
                }
                return;
            }
            State::Detaching { .. } => {
                members.iter().for_each(|m| self.detach_reply(m, false));
                return;
            }
            // Nothing was promised under this attachment yet: begin it anew.
            State::Changing { next, attach: true, .. } => {
                if !next.active().intersection(members).is_empty() {
                    self.gather();
                }
                return;
            }
            // A promotion that is not committed is taken back: those who were Clean before it know nothing of it, and could
            // go on without the members of the view that follows.
            State::Changing { next, spec, .. } if mutant!(PromotionKept) => {
                (next.clone(), spec.clone(), members)
            }
            State::Changing { next, spec, .. } => {
                (next.without_promotions(self.view_clean()), spec.clone(), members)
            }
            State::Active => match (&self.view, &self.spec) {
                (Some(view), Some(spec)) => (view.clone(), spec.clone(), members),
                _ => return,
            },
        };
        gone = gone.intersection(base.active());
        if gone.is_empty() {
            return;
        }
        match base.step(ViewStep::Lose(gone), self.epoch) {
            Ok(next) => {
                let additions = self.missed_by(next.out().intersection(self.view_active().union(gone)));
                // When the last Clean one is lost, nobody can tell which of them is sick.
                for member in gone.intersection(self.view_active()).iter() {
                    self.note_lost(member, cause_of(member), reason);
                }
                let cause = gone.iter().next().map_or(Cause::Unreachable, cause_of);
                self.notice(Notice::Lost(gone, cause, reason.to_owned()));
                self.change_view(next, spec, additions, false);
            }
            Err(_) => {
                self.notice(Notice::Suspended(reason.to_owned()));
                self.gather();
            }
        }
    }

    /// Starts over and fails every request.
    pub(super) fn cancel(&mut self) {
        self.gather();
        self.abandon_all(super::IoError::Cancelled);
    }

    /// Starts over: connect, collect views, then attach with a new epoch. Requests wait meanwhile. The links are made
    /// anew, so that no message of the old attachment touches a request's memory any more.
    pub(super) fn gather(&mut self) {
        self.forget_rejoin();
        self.verify_disturbed();
        self.give_up_commands(
            Refusal::Suspended,
            "the pool is suspended: no Clean member can be reached now",
        );
        self.faults.forget_leaving();
        self.parts.unsend_all();
        let retry_at = self.now + self.config.reconnect_interval / 4;
        for (link, id) in self.links.iter_mut().zip(0u8..) {
            link.asked = false;
            if matches!(link.state, LinkState::Ready(_) | LinkState::Greeting { .. }) {
                link.state = LinkState::Down { retry_at };
                self.outputs.push_back(Output::Disconnect(LinkId(id)));
            }
        }
        self.note_stuck();
        self.forget_told();
        self.was_cut_short |=
            matches!(self.state, State::Attaching { .. } | State::Changing { attach: true, .. });
        self.state = State::Gathering { possible_since: None, told: String::new() };
        self.next_tick = self.now + self.config.reconnect_interval / 4;
    }

    pub(super) fn end(&mut self, reason: OverReason) {
        self.drop_hold();
        self.interrupt_verify(&reason.to_string());
        for i in 0..self.links.len() {
            if !matches!(self.links[i].state, LinkState::Down { .. }) {
                self.links[i].state = LinkState::Down { retry_at: Time(u64::MAX) };
                self.outputs.push_back(Output::Disconnect(LinkId(u8::try_from(i).unwrap_or(u8::MAX))));
            }
        }
        let error = match &reason {
            OverReason::Fenced(_) | OverReason::Held(_) => super::IoError::Fenced,
            _ => super::IoError::Detached,
        };
        self.give_up_commands(Refusal::NoCoordinator, &format!("the client has ended: {reason}"));
        self.notice(Notice::Over(reason.clone()));
        self.state = State::Over(reason);
        self.fail_all(error);
    }

    pub(super) fn try_detach(&mut self) {
        if !self.detach_requested {
            return;
        }
        match &self.state {
            State::Active if self.in_flight() == 0 => {
                // Durable with the word that the client has left, on each member: that all have what was written.
                if !self.is_all_marked() {
                    return;
                }
                let waiting = self.view_active();
                let Some(view) = &self.view else { return };
                let body = encode_attested(&self.attested_in(view));
                let failed = MemberSet::EMPTY;
                self.state = State::Detaching { waiting, failed, since: self.now };
                for member in waiting.iter() {
                    let header = self.header(Kind::Detach);
                    self.send_body(member, header, body.clone());
                }
            }
            // Nothing was ever attached: there is nobody to say goodbye to.
            State::Gathering { .. } if self.in_flight() == 0 => self.end(OverReason::Detached),
            // Requests or a view change are under way; tried again when they finish.
            State::Active
            | State::Gathering { .. }
            | State::Attaching { .. }
            | State::Changing { .. }
            | State::Detaching { .. }
            | State::Over(_) => {}
        }
    }

    /// The end of a detach at one member. Unless it was in order, the member keeps its intents, and the next client compares it
    /// with the others.
    fn detach_reply(&mut self, member: MemberId, in_order: bool) {
        let State::Detaching { waiting, failed, .. } = &mut self.state else { return };
        if !waiting.remove(member) {
            return;
        }
        if !in_order {
            failed.insert(member);
        }
        if waiting.is_empty() {
            self.detached();
        }
    }

    /// Ends the client after a detach; whoever has not answered did not take part in it.
    fn detached(&mut self) {
        if let State::Detaching { waiting, failed, .. } = &self.state {
            let failed = failed.union(*waiting);
            if !failed.is_empty() {
                self.notice(Notice::DetachFailed(failed, self.view_clean().is_subset(failed)));
            }
        }
        self.end(OverReason::Detached);
    }

    pub(super) fn tick_state(&mut self) {
        let timeout = self.config.leg_timeout;
        match &self.state {
            State::Gathering { .. } => {
                self.try_attach();
                self.try_detach();
            }
            State::Attaching { waiting, since, .. } if self.now - *since > timeout => {
                let silent = *waiting;
                silent.iter().for_each(|m| {
                    self.drop_member_for(m, Cause::Silent, "the attach was not answered in time");
                });
            }
            State::Changing { waiting, since, .. } if self.now - *since > timeout => {
                let silent = *waiting;
                silent.iter().for_each(|m| {
                    self.drop_member_for(m, Cause::Silent, "the view was not answered in time");
                });
            }
            State::Detaching { since, .. } if self.now - *since > timeout => self.detached(),
            State::Attaching { .. }
            | State::Changing { .. }
            | State::Detaching { .. }
            | State::Active
            | State::Over(_) => {}
        }
    }

    /// Sequences go on above everything that a slot table remembers, so that the highest one stays the newest. What no
    /// number of writes leads to was made up by a faulty client, and nothing could follow it.
    pub(super) fn go_on_above(&mut self, reply: &AttachReply) {
        let honest = reply.slots.iter().map(|s| s.sequence).filter(|s| s.0 <= HIGHEST_HONEST_SEQUENCE);
        let highest = honest.max().unwrap_or_default();
        self.sequence = self.sequence.max(highest);
    }

    /// The sequence number for the next message that needs one.
    pub(super) fn next_sequence(&mut self) -> Sequence {
        self.sequence = self.sequence.next();
        self.sequence
    }
}

fn refusal(what: &str, status: Status, text: &str) -> String {
    let text = if text.is_empty() { String::new() } else { format!(": {text}") };
    format!("{what} refused: {status}{text}")
}

fn protocol(error: &WireError) -> String {
    format!("protocol error: {error}")
}
