//! Links, the attach protocol and view changes: everything that is not the data path.

use super::{Client, LinkId, LinkState, MAX_LINKS, Notice, Output, OverReason, Payload, PoolSelector, State};
use crate::pool::{
    Address, Epoch, MemberId, MemberSet, MemberState, PoolId, PoolSpec, Sequence, View, ViewStep,
};
use crate::time::Time;
use crate::wire::{
    Attach, AttachReply, DirtyAddition, Hello, HelloReply, Kind, MessageHeader, PROTOCOL_VERSION, Role,
    SetView, Status, WireError,
};

impl Client {
    pub(super) fn add_link(&mut self, address: Address) -> Option<LinkId> {
        if self.links.len() >= MAX_LINKS {
            return None;
        }
        let id = LinkId(u8::try_from(self.links.len()).ok()?);
        self.links.push(super::Link {
            address: address.clone(),
            member: None,
            state: LinkState::Connecting,
            last_sent: self.now,
            ping_since: None,
            last_error: "not connected yet".into(),
            denied: false,
        });
        self.outputs.push_back(Output::Connect(id, address));
        Some(id)
    }

    fn link(&self, id: LinkId) -> Option<&super::Link> {
        self.links.get(usize::from(id.0))
    }

    fn link_mut(&mut self, id: LinkId) -> Option<&mut super::Link> {
        self.links.get_mut(usize::from(id.0))
    }

    /// The hello answer of a member whose link is ready.
    pub(super) fn ready(&self, member: MemberId) -> Option<&HelloReply> {
        let link = self.link(self.legs[member.index()]?)?;
        if let LinkState::Ready(reply) = &link.state { Some(reply) } else { None }
    }

    /// The members whose links are ready.
    pub(super) fn ready_members(&self) -> MemberSet {
        MemberId::all().filter(|&m| self.ready(m).is_some()).collect()
    }

    pub(super) fn header(&self, kind: Kind) -> MessageHeader {
        let pool = self.spec.as_ref().map_or(PoolId::from_bytes([0; 16]), |s| s.id);
        MessageHeader {
            epoch: self.epoch,
            view: self.view.as_ref().map_or(crate::pool::ViewNumber(0), |v| v.number),
            watermark: self.parts.watermark(self.sequence),
            ..MessageHeader::new(kind, pool)
        }
    }

    pub(super) fn send(&mut self, member: MemberId, header: MessageHeader, payload: Payload) {
        let Some(id) = self.legs[member.index()] else { return };
        let now = self.now;
        if let Some(link) = self.link_mut(id) {
            link.last_sent = now;
            self.outputs.push_back(Output::Send(id, header, payload));
        }
    }

    pub(super) fn send_body(&mut self, member: MemberId, mut header: MessageHeader, body: Vec<u8>) {
        header.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.send(member, header, Payload::Body(body));
    }

    pub(super) fn link_up(&mut self, id: LinkId) {
        let (now, config) = (self.now, &self.config);
        let (pool, pool_name) = match (&self.spec, &self.selector) {
            (Some(spec), _) => (spec.id, String::new()),
            (None, PoolSelector::Id(id)) => (*id, String::new()),
            (None, PoolSelector::Name(name)) => (PoolId::from_bytes([0; 16]), name.clone()),
        };
        let hello = Hello {
            versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
            capabilities: 0,
            role: Role::Client,
            client: config.client,
            pool_name,
            description: config.description.clone(),
        };
        let body = hello.encode();
        let Some(link) = self.link_mut(id) else { return };
        link.state = LinkState::Greeting { since: now };
        link.last_sent = now;
        link.ping_since = None;
        let mut header = MessageHeader::new(Kind::Hello, pool);
        header.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        self.outputs.push_back(Output::Send(id, header, Payload::Body(body)));
    }

    /// A connection is gone. The member, if it had requests or is part of the view, is lost with it.
    pub(super) fn link_down(&mut self, id: LinkId, reason: &str) {
        let retry_at = self.now + self.config.reconnect_interval;
        let Some(link) = self.link_mut(id) else { return };
        let was_ready = matches!(link.state, LinkState::Ready(_));
        let repeated = !was_ready && link.last_error == reason;
        link.state = LinkState::Down { retry_at };
        reason.clone_into(&mut link.last_error);
        let (member, address) = (link.member, link.address.clone());
        if !repeated {
            self.notice(Notice::LinkLost(member, address, reason.to_owned()));
        }
        if let Some(member) = member.filter(|&m| was_ready && self.legs[m.index()] == Some(id)) {
            self.lose(MemberSet::only(member), reason);
        }
    }

    /// Closes a link for a reason found here, and treats it as lost.
    pub(super) fn drop_link(&mut self, id: LinkId, reason: &str) {
        self.outputs.push_back(Output::Disconnect(id));
        self.link_down(id, reason);
    }

    pub(super) fn drop_member(&mut self, member: MemberId, reason: &str) {
        if let Some(id) = self.legs[member.index()] {
            self.drop_link(id, reason);
        }
    }

    pub(super) fn message(&mut self, id: LinkId, header: &MessageHeader, body: &[u8]) {
        let Some(link) = self.link(id) else { return };
        match (&link.state, header.kind) {
            (LinkState::Greeting { .. }, Kind::HelloReply) => self.hello_reply(id, header, body),
            (LinkState::Ready(_), kind) => {
                let Some(member) = link.member else { return };
                match kind {
                    Kind::IoReply => self.io_reply(member, header),
                    Kind::FlushReply => self.flush_reply(member, header),
                    Kind::AttachReply => self.attach_reply(member, header, body),
                    Kind::SetViewReply => self.set_view_reply(member, header, body),
                    Kind::PrepareReply => self.prepare_reply(member, header),
                    Kind::ChunksDone => self.chunks_done(member, header, body),
                    Kind::SourceFailed => self.source_failed(member, header),
                    Kind::DetachReply => self.detach_reply(member),
                    Kind::CompareReply => self.compare_reply(member, header, body),
                    Kind::DigestReply => self.digest_reply(member, header, body),
                    Kind::Command => self.command_message(id, header, body),
                    Kind::Pong => {
                        if let Some(link) = self.link_mut(id) {
                            link.ping_since = None;
                        }
                    }
                    Kind::Goodbye => self.drop_link(id, "the node is stopping"),
                    _ => self.drop_link(id, &format!("protocol error: {kind:?} is not expected by a client")),
                }
            }
            (_, kind) => {
                self.drop_link(id, &format!("protocol error: {kind:?} before the hello was answered"))
            }
        }
    }

    fn hello_reply(&mut self, id: LinkId, header: &MessageHeader, body: &[u8]) {
        let Some(link) = self.link(id) else { return };
        let address = link.address.clone();
        if header.status != Status::Ok {
            self.hello_refused(id, address, header.status, &String::from_utf8_lossy(body));
            return;
        }
        let reply = match HelloReply::decode(body) {
            Ok(reply) => reply,
            Err(error) => return self.drop_link(id, &format!("protocol error: {error}")),
        };
        if let Some(known) = &self.spec
            && (known.id != reply.spec.id || known.size != reply.spec.size)
        {
            let text = format!(
                "pool {} of {} bytes on one node, {} of {} bytes on {address}",
                known.id, known.size, reply.spec.id, reply.spec.size
            );
            return self.end(OverReason::Conflict(text));
        }
        let member = reply.member;
        if self.ready(member).is_some() && self.legs[member.index()] != Some(id) {
            // A second address of a node that is connected already.
            self.outputs.push_back(Output::Disconnect(id));
            if let Some(link) = self.link_mut(id) {
                link.member = Some(member);
                link.state = LinkState::Down { retry_at: Time(u64::MAX) };
            }
            return;
        }
        self.legs[member.index()] = Some(id);
        if reply.write_through {
            self.write_through.insert(member);
        } else {
            self.write_through.remove(member);
        }
        if self.spec.is_none() {
            self.adopt_spec(reply.spec.clone());
        }
        if let Some(link) = self.link_mut(id) {
            link.member = Some(member);
            link.last_error.clear();
            link.state = LinkState::Ready(Box::new(reply));
        }
        self.notice(Notice::LegUp(member, address));
        self.connect_members();
        self.try_attach();
    }

    fn hello_refused(&mut self, id: LinkId, address: Address, status: Status, text: &str) {
        if status == Status::NoSuchPool {
            if let Some(link) = self.link_mut(id) {
                link.denied = true;
            }
            // Other nodes may know it; it is over only when every one has said no.
            if self.spec.is_none() && self.links.iter().all(|l| l.denied) {
                let text = if text.is_empty() { String::new() } else { format!(": {text}") };
                self.end(OverReason::NoSuchPool { address, pool: self.selector.to_string(), text });
            } else {
                self.drop_link(id, "the node has no such pool");
            }
        } else if status == Status::Version {
            self.end(OverReason::Refused { address, text: text.to_owned() });
        } else {
            self.drop_link(id, &format!("refused: {text}"));
        }
    }

    pub(super) fn adopt_spec(&mut self, spec: PoolSpec) {
        self.unflushed = crate::map::BlockMap::new(spec.block_count());
        self.flushing = crate::map::BlockMap::new(spec.block_count());
        self.spec = Some(spec);
    }

    /// Opens a link to every member of the specification that no link leads to.
    pub(super) fn connect_members(&mut self) {
        let members = self.spec.as_ref().map(|s| s.members.clone()).unwrap_or_default();
        for member in members {
            let known = self.links.iter().any(|l| l.member == Some(member.id) || l.address == member.address);
            if !known {
                self.add_link(member.address);
            }
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
        let ready = self.ready_members();
        let Some(best) = ready.iter().filter_map(|m| self.ready(m)).max_by_key(|r| r.view.order()) else {
            return;
        };
        let view = best.view.clone();
        if self.is_displaced_in(&view) {
            return self.end(OverReason::Fenced(view.epoch));
        }
        if let Some(member) = self.forced() {
            return self.attach_forced(member);
        }
        if !view.clean().is_subset(ready) {
            return self.tell_waiting(&view, ready);
        }
        let since = possible_since.unwrap_or(self.now);
        if !view.active().is_subset(ready) && self.now - since < self.config.attach_grace {
            if let State::Gathering { possible_since, .. } = &mut self.state {
                *possible_since = Some(since);
            }
            return;
        }
        let highest = ready.iter().filter_map(|m| self.ready(m)).map(|r| r.epoch).max().unwrap_or_default();
        self.epoch = highest.max(self.epoch).next();
        let asked = view.active().intersection(ready);
        self.view = Some(view);
        self.ask_to_attach(asked);
    }

    /// The member that the operator wants to go on with, if that is still to be done.
    fn forced(&self) -> Option<MemberId> {
        self.config.force_from.filter(|_| self.own_epochs.is_empty())
    }

    fn attach_forced(&mut self, member: MemberId) {
        let Some((view, epoch)) = self.ready(member).map(|r| (r.view.clone(), r.epoch)) else {
            let text = format!("--force-from names member {member}, which is not connected");
            self.notice(Notice::Waiting(text));
            return;
        };
        self.epoch = Epoch(epoch.max(self.epoch).0 + crate::pool::FORCED_JUMP);
        self.view = Some(view);
        self.ask_to_attach(MemberSet::only(member));
    }

    fn ask_to_attach(&mut self, asked: MemberSet) {
        let body = Attach {
            client: self.config.client,
            // A client that was displaced must not displace in turn.
            takeover: self.config.takeover && self.own_epochs.is_empty(),
            description: self.config.description.clone(),
        }
        .encode();
        self.state = State::Attaching { waiting: asked, replies: Vec::new(), since: self.now };
        for member in asked.iter() {
            let header = self.header(Kind::Attach);
            self.send_body(member, header, body.clone());
        }
    }

    /// Whether another client made the view, after this one was attached: what this one has in flight may be older than
    /// what that one wrote, so it may never be sent again.
    fn is_displaced_in(&self, view: &View) -> bool {
        self.own_epochs.first().is_some_and(|&last| view.epoch > last)
            && !self.own_epochs.contains(&view.epoch)
    }

    fn tell_waiting(&mut self, view: &View, ready: MemberSet) {
        let missing = view.clean().without(ready);
        if self.links.iter().any(|l| matches!(l.state, LinkState::Connecting | LinkState::Greeting { .. })) {
            return; // The first attempts may well succeed.
        }
        let name = |m: MemberId| {
            let address = self.spec.as_ref().and_then(|s| s.member(m)).map(|m| m.address.to_string());
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
        if let State::Gathering { told, possible_since } = &mut self.state {
            *possible_since = None;
            if *told != text {
                told.clone_from(&text);
                self.notice(Notice::Waiting(text));
            }
        }
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
                return self.drop_member(member, &format!("attach refused: {status:?} {text}"));
            }
        }
        let reply = match AttachReply::decode(body) {
            Ok(reply) => reply,
            Err(error) => return self.drop_member(member, &protocol(&error)),
        };
        if let State::Attaching { waiting, replies, .. } = &mut self.state {
            waiting.remove(member);
            replies.push((member, reply));
            if waiting.is_empty() {
                let replies = std::mem::take(replies);
                self.attach_complete(replies);
            }
        }
    }

    fn note_epoch(&mut self, member: MemberId, epoch: Epoch) {
        if let Some(id) = self.legs[member.index()]
            && let Some(link) = self.link_mut(id)
            && let LinkState::Ready(reply) = &mut link.state
        {
            reply.epoch = reply.epoch.max(epoch);
        }
    }

    /// Makes the forced view: every other member misses everything.
    fn force(&mut self, base: &View, member: MemberId) {
        let length = self.spec.as_ref().map_or(0, |s| s.size);
        match base.step(ViewStep::Force(member), self.epoch) {
            Ok(next) => {
                let missed = DirtyAddition { members: next.out(), offset: 0, length };
                let additions = if next.out().is_empty() { Vec::new() } else { vec![missed] };
                self.view = Some(base.clone());
                self.change_view(next, additions, true);
            }
            Err(error) => self.notice(Notice::Waiting(format!("--force-from {member}: {error}"))),
        }
    }

    fn note_view(&mut self, member: MemberId, view: &View) {
        if let Some(id) = self.legs[member.index()]
            && let Some(link) = self.link_mut(id)
            && let LinkState::Ready(reply) = &mut link.state
        {
            reply.view = view.clone();
        }
    }

    /// All members that were asked have accepted the epoch: commit a view of this attachment on them.
    fn attach_complete(&mut self, replies: Vec<(MemberId, AttachReply)>) {
        let attached: MemberSet = replies.iter().map(|(m, _)| *m).collect();
        let Some(best) = replies.iter().map(|(_, r)| &r.view).max_by_key(|v| v.order()).cloned() else {
            return;
        };
        for (member, reply) in &replies {
            self.note_view(*member, &reply.view);
        }
        if self.is_displaced_in(&best) {
            return self.end(OverReason::Fenced(best.epoch));
        }
        if let Some(member) = self.forced() {
            return self.force(&best, member);
        }
        if !best.clean().is_subset(attached) {
            // The view moved on between hello and attach; gather again with what is known now.
            return self.gather();
        }
        // Sequences go on above everything that a slot table remembers, so that the highest one stays the newest.
        let highest =
            replies.iter().flat_map(|(_, r)| &r.slots).map(|s| s.sequence).max().unwrap_or_default();
        self.sequence = self.sequence.max(highest);
        // A Syncing member that did not hear of the last view does not know all that it misses: it is brought back in anew.
        let behind: MemberSet =
            replies.iter().filter(|(_, r)| r.view != best).map(|(member, _)| *member).collect();
        let behind = behind.intersection(best.in_state(MemberState::Syncing));
        let absent = best.active().without(attached);
        let (stale, mut additions) = self.reconcile(&best, &replies, absent);
        let lost = absent.union(stale).union(behind);
        // A view that was given up half-way told what its absent members miss to some members only.
        let newly_out = best.out().union(lost).without(self.committed_out);
        if !self.own_epochs.is_empty() && !newly_out.is_empty() {
            additions.extend(self.missed_by(newly_out));
        }
        match best.step(ViewStep::Attach(lost), self.epoch) {
            Ok(next) => {
                if !self.own_epochs.is_empty() {
                    self.own_epochs.push(self.epoch);
                }
                self.view = Some(best);
                self.change_view(next, additions, true);
            }
            Err(error) => {
                let text = format!("no view can follow {best}: {error}");
                self.notice(Notice::Waiting(text));
                self.gather();
            }
        }
    }

    /// Makes `next` durable on every member that is active in it.
    pub(super) fn change_view(&mut self, next: View, mut additions: Vec<DirtyAddition>, attach: bool) {
        self.verify_disturbed();
        let waiting = next.active();
        self.faults.tell(&next, &mut additions);
        let mut batches: Vec<Vec<DirtyAddition>> =
            additions.chunks(SetView::MAX_ADDITIONS).map(<[DirtyAddition]>::to_vec).collect();
        if batches.is_empty() {
            batches.push(Vec::new());
        }
        let last = batches.len() - 1;
        for (i, additions) in batches.into_iter().enumerate() {
            let body = SetView { view: next.clone(), additions, more: i < last }.encode();
            for member in waiting.iter() {
                let mut header = self.header(Kind::SetView);
                header.view = next.number;
                self.send_body(member, header, body.clone());
            }
        }
        self.state = State::Changing { next, waiting, since: self.now, attach };
    }

    fn set_view_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        let State::Changing { next, waiting, .. } = &mut self.state else { return };
        if header.epoch != self.epoch || header.view != next.number || !waiting.contains(member) {
            return;
        }
        match header.status {
            Status::Ok => {
                waiting.remove(member);
                if waiting.is_empty() {
                    self.commit();
                }
            }
            Status::StaleEpoch | Status::NotAttached => self.end(OverReason::Fenced(header.epoch)),
            status => {
                let text = String::from_utf8_lossy(body).into_owned();
                self.drop_member(member, &format!("view {} refused: {status:?} {text}", header.view));
            }
        }
    }

    fn commit(&mut self) {
        let State::Changing { next, attach, .. } = std::mem::replace(&mut self.state, State::Active) else {
            return;
        };
        self.counters.views += 1;
        self.own_epochs.clear();
        self.own_epochs.push(self.epoch);
        self.committed_out = next.out();
        let notice = if attach { Notice::Attached(next.clone()) } else { Notice::Committed(next.clone()) };
        let limits: Vec<_> = next.active().iter().filter_map(|m| self.ready(m)).map(|r| r.limits).collect();
        self.max_io = limits.iter().map(|l| l.max_io).min().unwrap_or(self.max_io);
        self.max_bytes = limits.iter().map(|l| u64::from(l.max_bytes)).min().unwrap_or(u64::MAX);
        self.slot_limit = limits.iter().map(|l| usize::from(l.slots)).min().unwrap_or(1);
        for member in next.active().iter() {
            self.note_view(member, &next);
            self.note_epoch(member, self.epoch);
        }
        self.faults.committed(&next, attach);
        self.view = Some(next);
        self.suspended_since = None;
        self.notice(notice);
        self.stale_committed(attach);
        self.parts.raise_barriers();
        self.resume_requests();
        self.try_promote();
        self.try_detach();
    }

    /// Members can not be reached any more. The pool goes on with the others if a Clean one is left.
    pub(super) fn lose(&mut self, members: MemberSet, reason: &str) {
        self.stale_lost(members);
        for member in members.iter() {
            self.parts.fail_member(member);
            if let Some(flush) = &mut self.flush
                && flush.pending.remove(member)
            {
                flush.failed.insert(member);
            }
        }
        let (base, mut gone) = match &self.state {
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
                members.iter().for_each(|m| self.detach_reply(m));
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
            State::Changing { next, .. } => (next.without_promotions(self.view_clean()), members),
            State::Active => match &self.view {
                Some(view) => (view.clone(), members),
                None => return,
            },
        };
        gone = gone.intersection(base.active());
        if gone.is_empty() {
            return;
        }
        match base.step(ViewStep::Lose(gone), self.epoch) {
            Ok(next) => {
                let additions = self.missed_by(next.out().intersection(self.view_active().union(gone)));
                self.notice(Notice::Lost(gone, reason.to_owned()));
                self.change_view(next, additions, false);
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
        self.faults.forget_leaving();
        self.parts.unsend_all();
        let retry_at = self.now + self.config.reconnect_interval / 4;
        for (link, id) in self.links.iter_mut().zip(0u8..) {
            if matches!(link.state, LinkState::Ready(_) | LinkState::Greeting { .. }) {
                link.state = LinkState::Down { retry_at };
                self.outputs.push_back(Output::Disconnect(LinkId(id)));
            }
        }
        if matches!(self.state, State::Active | State::Changing { attach: false, .. }) {
            self.suspended_since = Some(self.now);
        }
        self.state = State::Gathering { possible_since: None, told: String::new() };
        self.next_tick = self.now + self.config.reconnect_interval / 4;
    }

    pub(super) fn end(&mut self, reason: OverReason) {
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
                let waiting = self.view_active();
                self.state = State::Detaching { waiting, since: self.now };
                for member in waiting.iter() {
                    let header = self.header(Kind::Detach);
                    self.send(member, header, Payload::None);
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

    fn detach_reply(&mut self, member: MemberId) {
        if let State::Detaching { waiting, .. } = &mut self.state {
            waiting.remove(member);
            if waiting.is_empty() {
                self.end(OverReason::Detached);
            }
        }
    }

    pub(super) fn tick_links(&mut self) {
        for i in 0..self.links.len() {
            let id = LinkId(u8::try_from(i).unwrap_or(u8::MAX));
            let link = &mut self.links[i];
            match &link.state {
                LinkState::Down { retry_at } if *retry_at <= self.now => {
                    link.state = LinkState::Connecting;
                    let address = link.address.clone();
                    self.outputs.push_back(Output::Connect(id, address));
                }
                LinkState::Greeting { since } if self.now - *since > self.config.leg_timeout => {
                    self.drop_link(id, "the hello was not answered in time");
                }
                LinkState::Ready(_) => {
                    if link.ping_since.is_some_and(|since| self.now - since > self.config.leg_timeout) {
                        self.drop_link(id, "no answer within the leg timeout");
                    } else if link.ping_since.is_none()
                        && self.now - link.last_sent >= self.config.ping_interval
                    {
                        link.ping_since = Some(self.now);
                        link.last_sent = self.now;
                        let header = self.header(Kind::Ping);
                        self.outputs.push_back(Output::Send(id, header, Payload::None));
                    }
                }
                // Connecting is bounded by the driver's connect; the others are not due.
                LinkState::Down { .. } | LinkState::Connecting | LinkState::Greeting { .. } => {}
            }
        }
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
                silent.iter().for_each(|m| self.drop_member(m, "the attach was not answered in time"));
            }
            State::Changing { waiting, since, .. } if self.now - *since > timeout => {
                let silent = *waiting;
                silent.iter().for_each(|m| self.drop_member(m, "the view was not answered in time"));
            }
            State::Detaching { since, .. } if self.now - *since > timeout => self.end(OverReason::Detached),
            State::Attaching { .. }
            | State::Changing { .. }
            | State::Detaching { .. }
            | State::Active
            | State::Over(_) => {}
        }
    }

    /// The sequence number for the next message that needs one.
    pub(super) fn next_sequence(&mut self) -> Sequence {
        self.sequence = self.sequence.next();
        self.sequence
    }
}

fn protocol(error: &WireError) -> String {
    format!("protocol error: {error}")
}
