//! Attach, views and detach: who may write, and under which view.

use std::time::Duration;

use super::{
    BufferToken, ConnectionId, Holder, IoId, LastClient, Notice, Output, Replica, ReplyPayload, Waiter,
};
use crate::map::{ClearReason, ClearTarget};
use crate::pool::{
    Address, Attested, Chunk, Epoch, MemberId, MemberSet, MemberState, PoolSpec, Position, Sequence,
    TransportKind, View, ViewNumber,
};
use crate::wire::{
    Attach, AttachReply, ChunkList, Kind, MAX_SLOTS, MessageHeader, Role, SetView, Status, decode_attested,
};

/// Most superblocks on their way to disk at a time. A client makes an attachment or a view after the one before is answered,
/// or was given up because a member was lost.
const MAX_STATES: usize = 64;
/// Most views that may replace one another before any of them is durable: a client replaces one when it loses a member.
const MAX_VIEWS: u32 = 256;

/// An attach whose epoch is being made durable, or that waits for older disk requests to end and to be flushed.
pub(super) struct PendingAttach {
    connection: ConnectionId,
    header: MessageHeader,
    durable: bool,
    flush: AttachFlush,
    /// How far the store had come before.
    position: Position,
}

/// The flush that comes before the answer to an attach. The new client does not know what the one before had not
/// flushed, and could not count it as missed when this member is lost.
enum AttachFlush {
    Due,
    Running(IoId),
    Done,
}

/// A view on its way to disk: first the map pages with what was missed, then the superblock.
pub(super) struct PendingView {
    connection: ConnectionId,
    header: MessageHeader,
    pub(super) view: View,
    pub(super) spec: PoolSpec,
    attested: Attested,
    pages: usize,
    /// Room has to be made for the pool before anything else.
    pub(super) needs_room: bool,
    adopted: bool,
}

/// A detach: flush, clear the intents, then say in the superblock that all is well.
pub(super) struct PendingDetach {
    connection: ConnectionId,
    header: MessageHeader,
    pub(super) flush: Option<IoId>,
    pages: usize,
}

impl Replica {
    pub(super) fn message(
        &mut self,
        connection: ConnectionId,
        role: Role,
        header: &MessageHeader,
        body: &[u8],
        buffer: Option<BufferToken>,
    ) {
        match header.kind {
            Kind::Write | Kind::Read | Kind::Flush | Kind::Discard | Kind::WriteZeroes => {
                self.request(connection, header, buffer);
            }
            Kind::Attach => self.attach(connection, header, body),
            Kind::SetView => self.set_view(connection, header, body),
            Kind::Detach => self.detach(connection, header, body),
            Kind::Mark => self.set_mark(connection, header, body),
            Kind::Prepare => self.prepare(connection, header, body),
            Kind::ClearDirty => self.clear_dirty(connection, header, body),
            Kind::PullMap => self.pull_map(connection, header),
            Kind::Pull => self.pull(connection, header),
            Kind::Compare => self.compare(connection, header, body),
            Kind::Digest => self.digest(connection, role, header),
            Kind::CommandReply => self.command_reply(connection, header, body),
            Kind::Grow => self.make_room(connection, header),
            Kind::Conditions => self.note_conditions(connection, header, body),
            Kind::Ping => {
                if self.holder_connection() == Some(connection) && header.epoch == self.epoch {
                    self.note_committed(header);
                }
                self.outputs.push_back(Output::Send(
                    connection,
                    header.reply(Kind::Pong, Status::Ok),
                    ReplyPayload::None,
                ));
            }
            // What no connection may send was dealt with before.
            _ => {}
        }
    }

    /// Why this member does not believe a specification that a client names; `None` if it does.
    pub(super) fn refuses_spec(&self, spec: &PoolSpec) -> Option<String> {
        if !self.spec.is_same_pool(spec) {
            return Some(format!("{spec} is not {}", self.spec));
        }
        if let Some((member, old, new)) = self.spec.weakened_in(spec) {
            return Some(format!(
                "member {member} would be reached at {new} instead of {old}, with less protection: no client may change that"
            ));
        }
        let is_known = |address: &Address| self.spec.members.iter().any(|m| m.address == *address);
        let is_open = |a: &Address| a.transport() != TransportKind::Tls && !is_known(a);
        let open = spec.members.iter().find(|m| self.config.tls_only && is_open(&m.address))?;
        Some(format!(
            "member {} would be reached at {}, and this node listens at tls:// addresses only: it takes no member without TLS",
            open.id, open.address
        ))
    }

    pub(super) fn answer(
        &mut self,
        connection: ConnectionId,
        header: &MessageHeader,
        kind: Kind,
        status: Status,
        body: Vec<u8>,
    ) {
        let mut reply = header.reply(kind, status);
        reply.payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        match status {
            Status::Ok => {}
            // Whoever is refused so ends if this is of a later branch, and a crash may undo one that is not durable.
            Status::Held => reply.epoch = self.shown_epoch(),
            _ => reply.epoch = self.epoch,
        }
        let payload = if body.is_empty() { ReplyPayload::None } else { ReplyPayload::Body(body) };
        self.outputs.push_back(Output::Send(connection, reply, payload));
    }

    fn attach(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        let attach = match Attach::decode(body) {
            Ok(attach) => attach,
            Err(error) => {
                let text = error.to_string().into_bytes();
                return self.answer(connection, header, Kind::AttachReply, Status::BadRequest, text);
            }
        };
        // The operator has decided against the branch of the client that is attached here.
        let is_later_branch =
            self.epoch.is_of_older_branch(header.epoch) && !mutant!(OlderBranchKeepsMembers);
        if let Some(holder) = &self.holder
            && holder.connection.is_some_and(|c| c != connection)
            && holder.client != attach.client
            && !attach.takeover
            && (!holder.yields || attach.yields)
            && !is_later_branch
            && !mutant!(TakeoverNotNeeded)
        {
            let text = holder.description.clone();
            self.notice(Notice::Refused(attach.description, text.clone()));
            return self.answer(connection, header, Kind::AttachReply, Status::Held, text.into_bytes());
        }
        // The client of the present epoch may come back under it, with a new connection, to bring a member back in.
        let is_its = attach.rejoin
            && self.last_client.as_ref().is_some_and(|c| c.attached && c.client == attach.client);
        let is_older = header.epoch < self.epoch && !mutant!(OldEpochAccepted);
        let is_taken = header.epoch == self.epoch && !is_its && !mutant!(EqualEpochAccepted);
        if is_older || is_taken {
            return self.answer(connection, header, Kind::AttachReply, Status::StaleEpoch, Vec::new());
        }
        if !self.epoch.may_be_followed_by(header.epoch) && !mutant!(AnyEpochAccepted) {
            let text = format!(
                "epoch {} cannot follow epoch {} of member {}: no history of attachments leads there. If another member has \
                 that epoch, a faulty client has raised it; `store reset-epoch` of rmr-node is the way out (docs/security.md)",
                header.epoch, self.epoch, self.member
            );
            return self.answer(connection, header, Kind::AttachReply, Status::BadRequest, text.into_bytes());
        }
        if self.broken {
            let text = b"its metadata cannot be written".to_vec();
            return self.answer(connection, header, Kind::AttachReply, Status::IoError, text);
        }
        if self.coming_states.len() >= MAX_STATES {
            let text = b"too many attachments and views wait for its disk".to_vec();
            return self.answer(connection, header, Kind::AttachReply, Status::Limit, text);
        }
        let is_other = self.holder.as_ref().is_some_and(|h| h.client != attach.client);
        if let Some(old) = self.holder.take().and_then(|h| h.connection).filter(|&c| c != connection)
            && !mutant!(OldConnectionStaysOpen)
        {
            if is_other {
                // Else it would take this for a lost leg, and leave a view without this member on others that the new client
                // has not come to yet. It may not get through; then that is what happens.
                let epoch = header.epoch;
                let told = MessageHeader { epoch, ..MessageHeader::new(Kind::Goodbye, self.spec.id) };
                let told = told.reply(Kind::Goodbye, Status::StaleEpoch);
                self.outputs.push_back(Output::Send(old, told, ReplyPayload::None));
            }
            self.outputs.push_back(Output::Close(old, "another client attached"));
        }
        self.lose_commands("another client attached");
        let position = self.position();
        self.history.attached();
        self.epoch = header.epoch;
        self.session += 1;
        self.leave_alone();
        self.conditions = (self.now, Vec::new());
        self.set_view = None;
        self.additions.clear();
        self.detach = None;
        self.drop_resync();
        self.drop_verify();
        self.fail_held_writes();
        self.holder = Some(Holder {
            client: attach.client,
            description: attach.description.clone(),
            connection: Some(connection),
            since: self.now,
            held: Duration::from_millis(attach.held_ms),
            yields: attach.yields,
        });
        let previous = self.last_client.replace(LastClient {
            client: attach.client,
            description: attach.description,
            attached: true,
        });
        self.previous_client = previous.map(|c| c.client);
        self.attach = Some(PendingAttach {
            connection,
            header: *header,
            durable: false,
            flush: AttachFlush::Due,
            position,
        });
        self.persist_state(Waiter::Attach(self.epoch));
        if mutant!(AttachBeforeDurable) {
            self.attach_durable(self.epoch);
        }
    }

    /// The intent map as runs of chunks, coarsened to what fits an answer.
    fn intent_runs(&self) -> Vec<(Chunk, u64)> {
        let mut gap = 0;
        loop {
            let mut runs: Vec<(Chunk, u64)> = Vec::new();
            let mut is_complete = true;
            for chunk in self.maps.intent().iter() {
                match runs.last_mut() {
                    Some((first, count)) if chunk.0 - (first.0 + *count) <= gap => {
                        *count = chunk.0 - first.0 + 1
                    }
                    _ => runs.push((chunk, 1)),
                }
                if runs.len() > AttachReply::MAX_INTENTS {
                    // The rest of the map would only make it longer.
                    is_complete = false;
                    break;
                }
            }
            if is_complete {
                return runs;
            }
            gap = gap * 2 + 1;
        }
    }

    pub(super) fn attach_durable(&mut self, epoch: Epoch) {
        if let Some(attach) = self.attach.as_mut().filter(|a| a.header.epoch == epoch) {
            attach.durable = true;
        }
        self.check_drained();
    }

    /// Answers an attach when its epoch is durable and no disk request of an older epoch can change anything any more.
    pub(super) fn check_drained(&mut self) {
        // In this order: this is asked at the end of every disk request, and the other question looks at all that are left.
        if !self.attach.as_ref().is_some_and(|a| a.durable) {
            return;
        }
        if self.older_ios() > 0 && !mutant!(AttachBeforeDrained) {
            return;
        }
        match self.attach.as_ref().map(|a| &a.flush) {
            Some(AttachFlush::Due) if mutant!(AttachWithoutFlush) => {} // The old client's writes stay in the cache.
            Some(AttachFlush::Due) if !self.config.write_through && !self.broken => {
                let io = self.own_flush();
                if let Some(attach) = &mut self.attach {
                    attach.flush = AttachFlush::Running(io);
                }
                return;
            }
            Some(AttachFlush::Running(_)) => return,
            Some(AttachFlush::Due | AttachFlush::Done) | None => {}
        }
        let Some(PendingAttach { connection, header, position, .. }) = self.attach.take() else { return };
        if header.epoch != self.epoch {
            return;
        }
        if self.broken {
            let text = b"its metadata cannot be written".to_vec();
            return self.answer(connection, &header, Kind::AttachReply, Status::IoError, text);
        }
        let mut slots: Vec<_> = self.slots.iter().filter(|s| s.sequence > Sequence(0)).copied().collect();
        if !mutant!(FailedWriteNotTold) {
            slots.extend(&self.failed_writes);
        }
        if slots.len() > usize::from(MAX_SLOTS) {
            // More than can be told: as if nothing were known, but for how far the sequences have come.
            slots.sort_unstable_by_key(|s| std::cmp::Reverse(s.sequence));
            slots.truncate(MAX_SLOTS.into());
            self.tables_lost = true;
        }
        let reply = AttachReply {
            view: self.view.clone(),
            spec: self.spec.clone(),
            last_client: self.previous_client,
            clean_detach: self.clean_detach,
            slots,
            watermark: self.watermark,
            tables_lost: self.tables_lost,
            flush_failed: self.flush_failed && !mutant!(FailedFlushNotTold),
            intents: if self.clean_detach || mutant!(IntentsNotTold) {
                Vec::new()
            } else {
                self.intent_runs()
            },
            position,
            attested: self.history.attested,
        };
        if !self.clean_detach {
            self.frozen.extend(self.maps.intent().iter());
        }
        self.activity.clear();
        self.clearing = None;
        self.clean_detach = false;
        let who = self.holder.as_ref().map(|h| h.description.clone()).unwrap_or_default();
        self.notice(Notice::Attached(self.epoch, who));
        self.answer(connection, &header, Kind::AttachReply, Status::Ok, reply.encode());
    }

    /// The flush of the pending attach, if it is under way.
    pub(super) fn attach_flush(&self) -> Option<IoId> {
        match self.attach.as_ref()?.flush {
            AttachFlush::Running(io) => Some(io),
            AttachFlush::Due | AttachFlush::Done => None,
        }
    }

    /// True if the flush was that of the pending attach.
    pub(super) fn attach_flushed(&mut self, io: IoId, status: Status) -> bool {
        let is_its = |a: &PendingAttach| matches!(a.flush, AttachFlush::Running(flush) if flush == io);
        let Some(attach) = self.attach.as_mut().filter(|a| is_its(a)) else { return false };
        if status == Status::Ok {
            attach.flush = AttachFlush::Done;
        } else if let Some(attach) = self.attach.take() {
            let text = b"its disk cannot be flushed".to_vec();
            self.answer(attach.connection, &attach.header, Kind::AttachReply, status, text);
        }
        true
    }

    fn set_view(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        let refuse = |this: &mut Self, status, text: String| {
            this.answer(connection, header, Kind::SetViewReply, status, text.into_bytes());
        };
        if header.epoch < self.epoch {
            return refuse(self, Status::StaleEpoch, String::new());
        }
        if self.holder_connection() != Some(connection) || header.epoch != self.epoch || self.attach.is_some()
        {
            return refuse(self, Status::NotAttached, String::new());
        }
        let set = match SetView::decode(body) {
            Ok(set) => set,
            Err(error) => return refuse(self, Status::BadRequest, error.to_string()),
        };
        let own = self.view.member(self.member).map(|m| m.store);
        let stays =
            set.view.member(self.member).is_some_and(|m| Some(m.store) == own && m.state != MemberState::Out);
        // A forced view brings its epoch with it: the two are durable together, or neither is.
        let is_forced = set.view.epoch > self.epoch && set.view.active() == MemberSet::only(self.member);
        let is_of_epoch = set.view.epoch == self.epoch || is_forced;
        if !is_of_epoch || !self.view.may_precede(&set.view) || !stays {
            let text = format!("{} does not follow {} on member {}", set.view, self.view, self.member);
            return refuse(self, Status::IllegalView, text);
        }
        // Of one attachment a pool only grows. A later one may not know of a size that was never committed, or the operator
        // forced the pool into use from a member that had not grown.
        let is_later = set.view.epoch > self.view.epoch;
        let is_near = self.epoch.may_be_followed_by(set.view.epoch)
            && self.view.number.may_be_followed_by(set.view.number);
        if !is_near {
            let text = format!(
                "{} cannot follow {} on member {}: its numbers are higher than any history leads to",
                set.view, self.view, self.member
            );
            return refuse(self, Status::IllegalView, text);
        }
        if let Some(text) = self.refuses_spec(&set.spec) {
            return refuse(self, Status::IllegalView, text);
        }
        if set.spec.size > self.config.max_size {
            let text = self.too_large(set.spec.size);
            return refuse(self, Status::NoSpace, text);
        }
        if self.views_given_up >= MAX_VIEWS || self.coming_states.len() >= MAX_STATES {
            return refuse(self, Status::Limit, "too many views wait for its disk".to_owned());
        }
        if set.spec.size < self.spec.size && !is_later {
            let text = format!(
                "{} of {} bytes does not follow {} of {} bytes",
                set.spec, set.spec.size, self.spec, self.spec.size
            );
            return refuse(self, Status::IllegalView, text);
        }
        self.additions.merge(&set.additions, set.spec.member_set(), set.spec.size);
        if set.more {
            return;
        }
        let needs_room = set.spec.size > self.room.bytes();
        let (view, spec, attested) = (set.view, set.spec, set.attested);
        let header = *header;
        self.views_given_up += u32::from(self.set_view.is_some());
        self.set_view = Some(PendingView {
            connection,
            header,
            view,
            spec,
            attested,
            pages: 0,
            needs_room,
            adopted: false,
        });
        if needs_room {
            self.pump_room();
        } else {
            self.begin_view();
        }
    }

    /// There is room for the pool as the view has it: records what is missed, then takes over maps if need be.
    pub(super) fn begin_view(&mut self) {
        let Some(pending) = &mut self.set_view else { return };
        pending.needs_room = false;
        let next = pending.view.clone();
        self.maps.resize(&pending.spec, &mut self.changed);
        self.flushes.resize(&pending.spec);
        if !mutant!(AdditionsIgnored) {
            self.record_additions();
        }
        if !self.needs_handover(&next) || mutant!(NoHandover) {
            self.additions.clear();
            self.persist_view_pages();
        } else if !self.begin_handover(&next) {
            self.fail_handover("no link to a source was prepared");
        }
    }

    /// Puts on record what came with the view that is pending.
    fn record_additions(&mut self) {
        self.additions.record(&mut self.maps, &mut self.changed);
    }

    /// There is no room for the pool as the view has it.
    pub(super) fn refuse_room(&mut self, reason: &str) {
        let Some(pending) = self.set_view.take() else { return };
        self.additions.clear();
        let text = format!("there is no room for {} bytes: {reason}", pending.spec.size).into_bytes();
        self.answer(pending.connection, &pending.header, Kind::SetViewReply, Status::NoSpace, text);
    }

    /// Whether this member has to take over maps before it may be Syncing: always but when it was so in the view before.
    ///
    /// Within a session it was so in every view since its own, whatever their numbers: views may replace each other before
    /// they are durable here, and a member that was Out in one comes back by an attach. To take over maps without need would
    /// be wrong: no barrier goes with such a view, and the source may not have carried out a write that is current here.
    /// The first view of an attachment goes to members that had the last one; but one that was told a source before is
    /// brought back in, and views of its own epoch tell it nothing about those of the present one.
    fn needs_handover(&self, next: &View) -> bool {
        let was_syncing = self.view.state(self.member) == Some(MemberState::Syncing);
        let is_in_step = if next.epoch == self.view.epoch {
            self.view_session == self.session
        } else {
            next.number == self.view.number.next() && self.resync.is_none()
        };
        let is_known = was_syncing && is_in_step && !mutant!(HandoverWithEachView);
        next.state(self.member) == Some(MemberState::Syncing) && !is_known
    }

    /// The maps are taken over.
    pub(super) fn handover_done(&mut self) {
        // What came with the view is not yet in the maps that were taken over.
        if !mutant!(HandoverForgetsAdditions) {
            self.record_additions();
        }
        self.additions.clear();
        self.persist_view_pages();
    }

    pub(super) fn fail_handover(&mut self, reason: &str) {
        let Some(pending) = self.set_view.take() else { return };
        self.additions.clear();
        let text = format!("maps were not taken over: {reason}").into_bytes();
        self.answer(pending.connection, &pending.header, Kind::SetViewReply, Status::IoError, text);
    }

    fn persist_view_pages(&mut self) {
        let Some(order) = self.set_view.as_ref().map(|p| p.view.order()) else { return };
        let pages = self.persist_changed(Waiter::ViewPages(order.0, order.1));
        let pages = if mutant!(ViewBeforeDirtyBits) { 0 } else { pages };
        if let Some(pending) = &mut self.set_view {
            pending.pages = pages;
        }
        if pages == 0 {
            self.adopt_view();
        }
    }

    /// The coordinator passes on which chunks are current and durable on a Syncing member. It does so in order with its
    /// views: what a member misses after that comes with a later one.
    fn clear_dirty(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        if self.holder_connection() != Some(connection)
            || header.epoch != self.epoch
            || header.view != self.view.number
            || self.attach.is_some()
        {
            return;
        }
        let list = match ChunkList::decode(Kind::ClearDirty, body) {
            Ok(list) => list,
            Err(_) => {
                return self.outputs.push_back(Output::Close(connection, "a list that does not decode"));
            }
        };
        if list.member == self.member || self.view.state(list.member) != Some(MemberState::Syncing) {
            return;
        }
        let mut chunks = list.chunks;
        chunks.sort_unstable();
        chunks.dedup();
        for chunk in chunks {
            let target = ClearTarget::Chunk(list.member, chunk);
            self.maps.clear(target, ClearReason::Reported, &mut self.changed);
        }
        self.persist_cleared();
    }

    /// Writes pages in which bits were cleared. Nobody waits: a bit that comes back after a crash costs work only.
    pub(super) fn persist_cleared(&mut self) {
        let mut changed = std::mem::take(&mut self.changed);
        for page in changed.drain(..) {
            self.persist(super::Metadata::Page(page), Vec::new());
        }
        self.changed = changed;
    }

    pub(super) fn view_page_durable(&mut self, epoch: Epoch, view: ViewNumber) {
        let is_its = |p: &&mut PendingView| p.view.number == view && p.view.epoch == epoch && p.pages > 0;
        let pending = self.set_view.as_mut().filter(is_its);
        let Some(pending) = pending else { return };
        pending.pages -= 1;
        if pending.pages == 0 {
            self.adopt_view();
        }
    }

    /// The dirty bits are durable: now the view may say that members are absent.
    fn adopt_view(&mut self) {
        let Some(pending) = &mut self.set_view else { return };
        pending.adopted = true;
        if pending.view.epoch > self.view.epoch {
            // Not before: an attach may be given up half-way.
            self.watermark = Sequence(0);
            if mutant!(UnsettledForgotten) {
                self.watermark = pending.header.watermark;
            }
        }
        self.epoch = pending.view.epoch;
        let (attested, replaced) =
            (pending.attested, std::mem::replace(&mut self.view, pending.view.clone()));
        let old = std::mem::replace(&mut self.spec, pending.spec.clone());
        self.remember(&replaced, &attested);
        self.room.fit(old.size, self.spec.size);
        self.view_session = self.session;
        self.distrusted = false;
        self.persist_state(Waiter::View(self.view.number));
        if mutant!(ViewBeforeDurable) {
            self.view_durable(self.view.number);
        }
    }

    pub(super) fn view_durable(&mut self, view: ViewNumber) {
        let Some(pending) = self.set_view.take_if(|p| p.adopted && p.view.number == view) else { return };
        if self.broken {
            // Not durable: nothing that rests on the view may be forgotten.
            let kind = Kind::SetViewReply;
            return self.answer(pending.connection, &pending.header, kind, Status::IoError, Vec::new());
        }
        let done = if mutant!(SyncingMapCleared) { pending.view.active() } else { pending.view.clean() };
        self.views_given_up = 0;
        for member in done.iter() {
            self.maps.clear(ClearTarget::Member(member), ClearReason::CleanInView, &mut self.changed);
        }
        for member in MemberId::all().filter(|m| pending.view.member(*m).is_none()) {
            self.maps.clear(ClearTarget::Member(member), ClearReason::Removed, &mut self.changed);
        }
        self.persist_cleared();
        if pending.view.state(self.member) == Some(MemberState::Clean) {
            self.drop_resync();
        }
        self.notice(Notice::View(pending.view));
        self.answer(pending.connection, &pending.header, Kind::SetViewReply, Status::Ok, Vec::new());
        self.report_again();
    }

    fn detach(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        if self.holder_connection() != Some(connection) || header.epoch != self.epoch {
            return self.answer(connection, header, Kind::DetachReply, Status::NotAttached, Vec::new());
        }
        if self.detach.is_some() {
            // Each would flush the disk.
            let text = b"a detach is under way".to_vec();
            return self.answer(connection, header, Kind::DetachReply, Status::BadRequest, text);
        }
        let attested = match decode_attested(header.kind, body) {
            Ok(attested) => attested,
            Err(error) => {
                let text = error.to_string().into_bytes();
                return self.answer(connection, header, Kind::DetachReply, Status::BadRequest, text);
            }
        };
        self.note_committed(header);
        // Durable with the word that the client has left: what was written up to here can be proved from then on.
        self.learn(&attested);
        let flush = Some(self.own_flush());
        self.detach = Some(PendingDetach { connection, header: *header, flush, pages: 0 });
        if mutant!(DetachWithoutFlush) {
            self.detach_flushed(Status::Ok);
        }
    }

    pub(super) fn detach_flushed(&mut self, status: Status) {
        let Some(detach) = &mut self.detach else { return };
        detach.flush = None;
        if status != Status::Ok && !mutant!(FailedDetachInOrder) {
            let Some(detach) = self.detach.take() else { return };
            return self.answer(detach.connection, &detach.header, Kind::DetachReply, status, Vec::new());
        }
        let watermark = self.watermark;
        let mut complete = Vec::new();
        self.activity.retain(|chunk, activity| {
            let is_complete = activity.sequence <= watermark;
            complete.extend(is_complete.then_some(*chunk));
            !is_complete
        });
        for chunk in complete.into_iter().filter(|c| !self.frozen.contains(c)) {
            self.maps.clear(ClearTarget::Intent(chunk), ClearReason::CleanDetach, &mut self.changed);
        }
        let pages = self.persist_changed(Waiter::DetachPages(self.epoch));
        if let Some(detach) = &mut self.detach {
            detach.pages = pages;
        }
        if pages == 0 {
            self.detach_pages_done();
        }
    }

    pub(super) fn detach_page_durable(&mut self, epoch: Epoch) {
        let Some(detach) = self.detach.as_mut().filter(|d| d.header.epoch == epoch && d.pages > 0) else {
            return;
        };
        detach.pages -= 1;
        if detach.pages == 0 {
            self.detach_pages_done();
        }
    }

    fn detach_pages_done(&mut self) {
        if let Some(last) = &mut self.last_client {
            last.attached = false;
        }
        self.persist_state(Waiter::Detach(self.epoch));
    }

    pub(super) fn detach_durable(&mut self, epoch: Epoch) {
        let Some(detach) = self.detach.take_if(|d| d.header.epoch == epoch) else { return };
        let who = self.holder.take().map(|h| h.description).unwrap_or_default();
        self.lose_commands("the client detached");
        self.drop_resync();
        self.drop_verify();
        // A client that gave a write up does not leave in good order: members may differ in it.
        self.clean_detach = self.maps.intent().count() == 0;
        self.notice(Notice::Detached(self.epoch, who));
        self.answer(detach.connection, &detach.header, Kind::DetachReply, Status::Ok, Vec::new());
    }

    /// A connection is gone. If it was the client's, nothing is cleared until the next attach: what it had in flight is
    /// not known to be complete everywhere.
    pub(super) fn closed(&mut self, connection: ConnectionId) {
        let Some(holder) = self.holder.as_mut().filter(|h| h.connection == Some(connection)) else { return };
        holder.connection = None;
        let who = holder.description.clone();
        self.attach = None;
        self.set_view = None;
        self.additions.clear();
        self.detach = None;
        self.lose_commands("the client is gone");
        self.leave_alone();
        self.notice(Notice::ClientLost(self.epoch, who));
        self.session += 1;
        self.drop_resync();
        self.drop_verify();
        self.fail_held_writes();
    }
}
