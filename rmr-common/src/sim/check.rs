//! The rules, checked at the moment at which each could be broken.

use super::host::Request;
use super::node::{PageBytes, bit};
use super::oracle::{Oracle, SECTOR};
use super::world::{Check, World};
use crate::client::{self, IoError, Notice, Operation, OverReason};
use crate::map::{MapId, MapPage};
use crate::pool::{Cause, Chunk, MemberSet, MemberState, View};
use crate::replica::{self, DiskOperation, DurableState};
use crate::wire::{Kind, MessageHeader, Status};

impl World<'_> {
    fn chunks(&self, first: usize, count: usize) -> impl Iterator<Item = Chunk> + use<> {
        let size = self.spec.chunk_size;
        let (first, end) = (first as u64 * SECTOR, (first + count) as u64 * SECTOR);
        (size.chunk_of(first).0..=size.chunk_of(end - 1).0).map(Chunk)
    }

    pub(super) fn node_index(&self, member: crate::pool::MemberId) -> usize {
        let view = self.committed.as_ref().filter(|v| v.member(member).is_some());
        match view {
            Some(view) => self.node_in(view, member),
            None => self.nodes.iter().rposition(|n| n.member == member).unwrap_or(0),
        }
    }

    /// The node that has the store of a member in a view.
    pub(super) fn node_in(&self, view: &View, member: crate::pool::MemberId) -> usize {
        let store = view.member(member).map(|m| m.store);
        self.nodes.iter().position(|n| Some(n.store) == store).unwrap_or(0)
    }

    /// Whether a node's store is a member of the pool.
    pub(super) fn is_member(&self, index: usize) -> bool {
        let node = &self.nodes[index];
        self.committed.as_ref().is_none_or(|v| v.has_store(node.member, node.store))
    }

    // Nodes ------------------------------------------------------------------------------------------------------

    pub(super) fn cover_message(&mut self, index: usize, header: &MessageHeader) {
        let node = &mut self.nodes[index];
        let Some(view) = node.replica.as_ref().map(replica::Replica::view) else { return };
        let is_syncing = view.state(node.member) == Some(MemberState::Syncing);
        let is_skipped = header.view > view.number.next();
        match header.kind {
            Kind::Attach if view.epoch < header.epoch && node.answered == header.epoch => {
                self.coverage.hit("rejoin anew after one that broke off");
            }
            Kind::Attach if node.disk.running.values().any(super::disk::Running::is_write) => {
                self.coverage.hit("attach waits for disk requests of the one before");
            }
            Kind::SetView if std::mem::replace(&mut node.has_pending_view, true) => {
                self.coverage.hit("second view while the first is pending");
                if is_syncing && is_skipped {
                    self.coverage.hit("Syncing member never gets to see a view");
                }
            }
            _ => {} // Not a situation that is counted.
        }
    }

    /// What must be true when a node answers.
    pub(super) fn check_answer(&mut self, index: usize, header: &MessageHeader) -> Check {
        self.cover_view_answer(index, header);
        let node = &mut self.nodes[index];
        match (header.kind, header.status) {
            (Kind::AttachReply, Status::Ok) => {
                if node.disk.running.values().any(super::disk::Running::is_write) {
                    return Err(format!("node {index} answers an attach with writes under way"));
                }
                if node.durable.epoch < header.epoch {
                    return Err(format!("node {index} answers epoch {} before it is durable", header.epoch));
                }
                node.answered = node.answered.max(header.epoch);
                node.has_pending_view = false;
            }
            (Kind::AttachReply, Status::IoError | Status::NoSpace) => {
                self.coverage.hit("attach refused: a flush failed");
            }
            (Kind::DetachReply, Status::IoError | Status::NoSpace) => {
                self.coverage.hit("detach refused: a flush failed");
            }
            (Kind::Goodbye, Status::IoError) => self.coverage.hit("session ended by a failed flush"),
            (Kind::AttachReply, Status::StaleEpoch) => self.coverage.hit("attach refused: stale epoch"),
            (Kind::SetViewReply, Status::Ok) => {
                node.has_pending_view = false;
                if node.durable.view.number < header.view {
                    return Err(format!("node {index} answers view {} before it is durable", header.view));
                }
            }
            (Kind::DetachReply, Status::Ok)
                if node.durable.last_client.as_ref().is_none_or(|c| c.attached) =>
            {
                return Err(format!("node {index} answers a detach before it is durable"));
            }
            (Kind::IoReply | Kind::FlushReply, Status::BadRequest) => {
                return Err(format!("node {index} refuses as a bad request: {header:?}"));
            }
            _ => {} // Nothing is promised by it.
        }
        Ok(())
    }

    /// Intents and dirty bits are durable before the data, and no client that is fenced writes.
    pub(super) fn check_disk(
        &mut self,
        index: usize,
        operation: DiskOperation,
        offset: u64,
        length: u32,
    ) -> Check {
        if matches!(operation, DiskOperation::Read | DiskOperation::Digest | DiskOperation::Flush) {
            return Ok(());
        }
        let first = usize::try_from(offset / SECTOR).unwrap_or(usize::MAX);
        let count = usize::try_from(u64::from(length) / SECTOR).unwrap_or(usize::MAX);
        let chunks: Vec<_> = self.chunks(first, count).collect();
        let node = &self.nodes[index];
        let mut missing = MemberSet::EMPTY;
        if let DiskOperation::Write(token) = operation {
            let (data, header) = node
                .buffers
                .get(&token.0)
                .ok_or_else(|| format!("{token:?} was released before its write"))?;
            if data.len() != count || header.offset != offset {
                return Err(format!("node {index} writes {offset}+{length} for {header:?}"));
            }
            if header.epoch < node.answered {
                return Err(format!(
                    "node {index} writes for epoch {} after epoch {} attached",
                    header.epoch, node.answered
                ));
            }
            // One that was removed since is of no interest any more.
            let view = node.replica.as_ref().map(replica::Replica::view);
            let is_there = |m: &crate::pool::MemberId| view.is_none_or(|v| v.member(*m).is_some());
            missing = header.missing.iter().filter(is_there).collect();
        }
        for chunk in chunks {
            if !node.has_bit(MapId::Intent, chunk) {
                return Err(format!("node {index} writes to chunk {chunk} before its intent is durable"));
            }
            if let Some(m) = missing.iter().find(|&m| !node.has_bit(MapId::Dirty(m), chunk)) {
                return Err(format!("node {index} writes to chunk {chunk}, missed by {m}, not on record"));
            }
        }
        Ok(())
    }

    /// A bit may be cleared only for what is the same on all members and survives a power cut here.
    pub(super) fn check_page(&mut self, index: usize, page: MapPage, bytes: &PageBytes) -> Check {
        if page.map != MapId::Intent {
            return Ok(()); // Judged when a bit is cleared in memory: see `check_stale`.
        }
        let Some(old) = self.nodes[index].pages.get(&page) else { return Ok(()) };
        let first = u64::from(page.page) * crate::map::MAP_PAGE_BITS;
        let last = (first + crate::map::MAP_PAGE_BITS).min(self.committed_spec.chunk_count());
        let cleared: Vec<_> = (first..last).map(Chunk).filter(|&c| bit(old, c) && !bit(bytes, c)).collect();
        for chunk in cleared {
            self.coverage.hit("intent cleared");
            self.check_cleared(index, chunk)?;
        }
        Ok(())
    }

    fn check_cleared(&self, index: usize, chunk: Chunk) -> Check {
        let active = self.committed.as_ref().map_or(MemberSet::EMPTY, View::active);
        let node = &self.nodes[index];
        if !active.contains(node.member) || !self.is_member(index) {
            return Ok(());
        }
        let per_chunk = usize::try_from(self.spec.chunk_size.bytes() / SECTOR).unwrap_or(0);
        let start = usize::try_from(chunk.0).unwrap_or(0) * per_chunk;
        let others: Vec<_> =
            active.iter().filter(|&m| m != node.member).map(|m| (m, self.node_index(m))).collect();
        let others: Vec<_> = others.into_iter().filter(|(_, i)| !self.is_back(*i)).collect();
        for sector in start..(start + per_chunk).min(self.sectors()) {
            // What was pulled is on record as missed until it is flushed.
            if node.disk.unflushed_since[sector] != 0 && !node.disk.pulled[sector] {
                return Err(format!(
                    "node {index} clears the intent of chunk {chunk} with sector {sector} unflushed"
                ));
            }
            let value = node.disk.sectors[sector];
            for &(member, other_index) in &others {
                let theirs = &self.nodes[other_index];
                let other = theirs.value(sector);
                if other == value {
                    continue;
                }
                // The other one may be a step ahead: its next write to the sector is in flight.
                let is_excused = self.oracle.may_be_overtaken(sector, value, other);
                let is_known = [(index, member), (other_index, node.member)]
                    .into_iter()
                    .any(|(keeper, stale)| self.has_record(keeper, stale, sector));
                // A member that came back meanwhile has no part in what a client that died left behind; the other one keeps
                // its intent. So does one that lost its cache: it is stale for its intents when a client attaches next.
                let is_kept = (self.oracle.is_undecided(sector) || theirs.disk.lost.contains(&sector))
                    && theirs.has_bit(MapId::Intent, chunk);
                if !is_excused && !is_known && !is_kept {
                    return Err(format!(
                        "node {index} clears the intent of chunk {chunk}, whose sector {sector} is {} here and {} on \
                         member {member}",
                        Oracle::name(value),
                        Oracle::name(other)
                    ));
                }
            }
        }
        Ok(())
    }

    /// Views and epochs of a member only grow, and a number means one view.
    pub(super) fn check_state(&mut self, index: usize, state: &DurableState) -> Check {
        let old = &self.nodes[index].durable;
        if state.view.order() < old.view.order() || state.epoch < old.epoch {
            return Err(format!("node {index} goes back from {} to {}", old.view, state.view));
        }
        state.view.validate().map_err(|e| format!("node {index}: {}: {e}", state.view))?;
        if !state.spec.describes(&state.view) {
            return Err(format!("node {index} has {} with {:?}", state.view, state.spec));
        }
        let node = &self.nodes[index];
        if !state.view.has_store(node.member, node.store) {
            return Err(format!("node {index} has {}, in which its store is no member", state.view));
        }
        if state.spec.size > node.room {
            return Err(format!(
                "node {index} has a pool of {} bytes, and room for {}",
                state.spec.size, node.room
            ));
        }
        let key = (state.view.number.0, state.view.epoch.0);
        let known = self.views.entry(key).or_insert_with(|| (state.view.clone(), state.spec.clone()));
        // Stores that have not joined have each a view of their own.
        if (&known.0, &known.1) != (&state.view, &state.spec) && key.0 > 0 {
            return Err(format!("two views of one number: {} and {}", known.0, state.view));
        }
        Ok(())
    }

    pub(super) fn node_notice(&mut self, node: usize, notice: &replica::Notice) {
        self.cover_node_notice(node, notice);
        match notice {
            replica::Notice::MetadataFailed => self.coverage.hit("metadata failed"),
            replica::Notice::FlushFailed("before intents are cleared") => {
                self.coverage.hit("flush failed before intents are cleared");
            }
            replica::Notice::FlushFailed("before resynchronised chunks are reported") => {
                self.coverage.hit("flush failed before a report");
            }
            _ => {} // Of interest to people only.
        }
    }

    // Clients ----------------------------------------------------------------------------------------------------

    pub(super) fn cover_client_event(&mut self, host: usize, event: &client::Event<'_>) {
        let client::Event::LinkDown(link, _) = event else { return };
        self.cover_rejoin_lost(host, *link);
        match self.hosts[host].client.status().state {
            "connecting" => self.coverage.hit("a link lost while connecting"),
            "suspended" => self.coverage.hit("a link lost while suspended"),
            "attaching" => self.coverage.hit("a link lost while attaching"),
            "changing view" => self.coverage.hit("a link lost while changing the view"),
            "active" => self.coverage.hit("a link lost while active"),
            "detaching" => self.coverage.hit("a link lost while detaching"),
            _ => {} // Nothing happens any more.
        }
    }

    pub(super) fn client_notice(&mut self, host: usize, notice: Notice) -> Check {
        match notice {
            Notice::Attached(view) => self.attached(host, view),
            Notice::Committed(view) => self.view_committed(host, view),
            Notice::Lost(members, cause, _) => {
                self.note_losses(host, members, cause);
                if cause == Cause::Silent {
                    self.coverage.hit("leg lost by its timeout");
                }
                if cause == Cause::TooSlow {
                    self.coverage.hit("leg lost by the sum of its delays");
                }
                if matches!(cause, Cause::ReadErrors | Cause::ReadErrorLimit) {
                    self.coverage.hit("leg left the view after read errors");
                }
                if cause == Cause::ReadErrorLimit {
                    self.coverage.hit("leg left out after too many read errors");
                }
                if std::mem::replace(&mut self.hosts[host].is_changing, true) {
                    self.coverage.hit("view change superseded by a further loss");
                }
                if self.rng.percent(30) {
                    self.burst_soon(host);
                }
                for member in members.iter() {
                    let disk = &self.nodes[self.node_index(member)].disk;
                    if disk.unflushed_since.iter().any(|&step| step > 0) {
                        self.coverage.hit("unflushed blocks counted as missed");
                    }
                }
                Ok(())
            }
            Notice::Suspended(_) => {
                self.note_stuck(host);
                self.hosts[host].is_changing = false;
                let committed = self.hosts[host].committed.as_ref();
                if committed.is_some_and(|v| !v.in_state(MemberState::Syncing).is_empty()) {
                    self.coverage.hit("suspended with a Syncing member");
                }
                self.coverage.hit("suspended");
                Ok(())
            }
            Notice::Waiting(text) => {
                if text.contains("went back in time") {
                    self.history_awaited();
                }
                if text.contains("has met a client with epoch") {
                    self.coverage.hit("force: an attach waits for the later branch");
                }
                self.coverage.hit("attach waits for a Clean member");
                Ok(())
            }
            Notice::LostWrites(members, _) => self.writes_lost(host, members),
            Notice::ReadError(..) => {
                self.coverage.hit("read repeated on another leg");
                Ok(())
            }
            Notice::Over(reason) => self.ended(host, &reason),
            Notice::Regressed { member, known, shown } => self.regression_found(host, member, &known, &shown),
            Notice::Duplicate(store, ..) => Err(format!("client {host} sees store {store} twice")),
            Notice::RejoinFailed { member, cause, .. } => {
                self.note_failed_rejoin(host, member, cause);
                Ok(())
            }
            Notice::LegUp(..)
            | Notice::LinkLost(..)
            | Notice::Spec(_)
            | Notice::NoRoom(..)
            | Notice::DetachFailed(..)
            | Notice::Verify(_) => Ok(()), // Of interest to people only.
        }
    }

    /// A client says that completed writes are lost: that must be so, and it may be for what was not flushed only.
    fn writes_lost(&mut self, host: usize, members: MemberSet) -> Check {
        self.coverage.hit("every Clean leg lost unflushed writes");
        self.hosts[host].has_lost_writes = true;
        let pause = self.rng.range(1, 3000) * super::world::MILLISECOND;
        self.after(pause, super::world::Event::GuestReset(host));
        for member in members.iter() {
            // A client of an older branch may have another store as this member than the latest one has.
            let index = match &self.hosts[host].committed {
                Some(view) => self.node_in(view, member),
                None => self.node_index(member),
            };
            let node = &self.nodes[index];
            let ran_on = self.hosts[host].host_boots[index] == node.host_boot && !node.has_failed_flush;
            if !node.disk.write_back || ran_on {
                return Err(format!(
                    "client {host} says that member {member} lost writes, whose machine ran on"
                ));
            }
        }
        if self.is_astray(host) { Ok(()) } else { self.give_up_unflushed(members) }
    }

    /// What these members, all that are Clean, have lost with their caches is lost for good.
    fn give_up_unflushed(&mut self, members: MemberSet) -> Check {
        let clean: Vec<_> = members.iter().map(|m| self.node_index(m)).collect();
        for index in clean {
            for sector in 0..self.sectors() {
                let value = self.nodes[index].value(sector);
                let is_lost = self.nodes[index].disk.lost.contains(&sector);
                let is_back = is_lost && self.oracle.is_of_unfinished(sector, value);
                if self.oracle.is_current(sector, value) && !is_back {
                    continue;
                }
                if !is_lost && !self.oracle.is_open(sector) {
                    return Err(format!(
                        "sector {sector} of node {index} is {}, and was not lost with a cache; possible: {}",
                        Oracle::name(value),
                        self.oracle.describe(sector)
                    ));
                }
                self.oracle.lose(sector, value);
            }
        }
        Ok(())
    }

    fn attached(&mut self, host: usize, view: View) -> Check {
        self.check_patience(host)?;
        self.cover_attached(&view);
        self.join(host, &view)?;
        if self.hosts[host].is_fenced {
            return Err(format!("client {host} attached again after another one had attached"));
        }
        if self.hosts[host].committed.is_some() {
            self.coverage.hit("resumed");
        }
        if !view.in_state(MemberState::Syncing).is_empty() {
            self.coverage.hit("attached with a Syncing member");
        }
        let step = self.step;
        for other in (0..self.hosts.len()).filter(|&o| o != host) {
            let is_rival = self.hosts[other].branch == self.hosts[host].branch;
            if is_rival && self.hosts[other].committed.is_some() && !self.hosts[other].is_fenced {
                if self.hosts[other].is_live() {
                    self.coverage.hit("takeover");
                }
                self.hosts[other].is_fenced = true;
                self.resyncs.is_unflushed_unknown |= self.hosts[other].is_live();
                let writes: Vec<_> = self.hosts[other].requests.values().filter_map(|r| r.write).collect();
                writes.into_iter().for_each(|write| self.oracle_of(other).fail(write, step));
            }
        }
        if self.is_astray(host) {
            self.attached_astray(host, &view);
            return self.view_committed(host, view);
        }
        if self.hosts[host].committed.is_none() {
            // Nobody promised this client anything of what others had not flushed.
            self.give_up_unflushed(view.clean())?;
        }
        // Its answers came late: another client has attached since, and its connections are closed.
        if self.hosts[host].committed.is_none()
            && self.committed.as_ref().is_some_and(|last| last.epoch > view.epoch)
        {
            self.hosts[host].is_fenced = true;
            let writes: Vec<_> = self.hosts[host].requests.values().filter_map(|r| r.write).collect();
            writes.into_iter().for_each(|write| self.oracle_of(host).fail(write, step));
            return self.view_committed(host, view);
        }
        // A view that was forced is the present one of its branch already.
        let is_taken = |last: &&View| last.epoch >= view.epoch && **last != view;
        if let Some(last) = self.committed.as_ref().filter(is_taken) {
            return Err(format!("client {host} attached with {view} after {last}: the epoch is not its own"));
        }
        self.check_agreement(&view)?;
        self.oracle.agree(self.step);
        self.view_committed(host, view)
    }

    fn view_committed(&mut self, host: usize, view: View) -> Check {
        self.aim_committed();
        self.note_in_service(host, &view);
        self.hosts[host].is_changing = false;
        self.hosts[host].committed = Some(view.clone());
        for connection in self.hosts[host].links.clone().into_iter().flatten() {
            let connection = &self.connections[connection];
            self.hosts[host].host_boots[connection.node] = connection.host_boot;
        }
        if self.is_astray(host) {
            self.committed_astray(host);
            return Ok(());
        }
        if self.hosts[host].is_fenced {
            return Ok(()); // The news is late; the one who attached since knows of the view.
        }
        // A view that was forced counts from the moment when it was durable.
        if let Some(last) =
            self.committed.clone().filter(|last| *last != view || self.hosts[host].forces.is_none())
        {
            if view.order() <= last.order() {
                return Err(format!("client {host} committed {view} after {last}"));
            }
            if !view.clean().is_subset(last.active()) {
                return Err(format!("client {host} committed {view} after {last}: a stale member is Clean"));
            }
            // Else those who were Clean could go on by themselves, with the view before; unless all of them have a later one,
            // which is durable on them though its client did not live to hear of it.
            let knows_more = |m| self.nodes[self.node_index(m)].durable.view.order() > last.order();
            if view.clean().intersection(last.clean()).is_empty() && !last.clean().iter().all(knows_more) {
                return Err(format!("client {host} committed {view} after {last}: nobody stayed Clean"));
            }
            self.check_steps(&last, &view)?;
        }
        for member in view.active().iter() {
            if self.is_back(self.node_in(&view, member)) {
                continue; // It had the view when it answered.
            }
            let durable = &self.nodes[self.node_in(&view, member)].durable.view;
            if durable.order() < view.order()
                || (durable.epoch == view.epoch && durable.number == view.number && *durable != view)
            {
                return Err(format!("client {host} committed {view}; durable on member {member}: {durable}"));
            }
        }
        self.check_spec(host, &view)?;
        self.rollback_committed(&view);
        self.aim_agreed(&view);
        self.committed = Some(view);
        self.check_stale()
    }

    /// Why a client ended is part of what it promised.
    fn ended(&mut self, host: usize, reason: &OverReason) -> Check {
        match reason {
            OverReason::Held(text) => {
                self.coverage.hit("attach refused: held");
                if self.hosts[host].forces.is_some() {
                    self.coverage.hit("force: refused, because a client lives");
                }
                let own = format!("client {}", self.hosts[host].id);
                if !text.starts_with("client ") || *text == own {
                    return Err(format!("client {host} was refused because of '{text}'"));
                }
            }
            OverReason::Fenced(_) => self.coverage.hit("client fenced"),
            OverReason::Detached => {
                self.coverage.hit("client detached");
                // One that was suspended leaves without a goodbye.
                let active = self.hosts[host].committed.as_ref().map_or(MemberSet::EMPTY, View::active);
                let is_attached = |m| {
                    let last = &self.nodes[self.node_index(m)].durable.last_client;
                    last.as_ref().is_some_and(|c| c.attached)
                };
                self.resyncs.is_unflushed_unknown |= active.iter().any(is_attached);
            }
            OverReason::NoSuchPool { .. } | OverReason::Conflict(_) | OverReason::Refused { .. } => {
                return Err(format!("client {host} is over: {reason}"));
            }
        }
        Ok(())
    }

    pub(super) fn check_error(&mut self, host: usize, error: IoError) -> Check {
        if self.is_verifying && !self.hosts[host].has_lost_writes {
            return Err(format!("failed when nothing was wrong: {error}"));
        }
        match error {
            // Held against the request itself.
            IoError::Memory => self.coverage.hit("request failed for its memory"),
            IoError::Media if self.had_errors => self.coverage.hit("disk error shown to the guest"),
            IoError::LostWrites if self.hosts[host].has_lost_writes => {
                self.coverage.hit("request refused after writes were lost");
            }
            IoError::Suspended => self.coverage.hit("request failed after the suspend timeout"),
            IoError::Fenced | IoError::Detached if self.hosts[host].client.over().is_some() => {
                if self.hosts[host].is_fenced {
                    self.coverage.hit("write of a fenced client failed");
                }
            }
            IoError::Detached if self.hosts[host].client.status().state == "detaching" => {}
            IoError::Media
            | IoError::LostWrites
            | IoError::BadRange
            | IoError::Fenced
            | IoError::Detached
            | IoError::Cancelled
            | IoError::TooMany => {
                return Err(format!("failed for no reason: {error}"));
            }
        }
        Ok(())
    }

    /// G1: a completed flush covers all that was completed before it.
    pub(super) fn check_flushed(&mut self, host: usize, request: &Request) -> Check {
        if self.hosts[host].last_flush == self.now {
            self.coverage.hit("flush round shared");
        }
        self.hosts[host].last_flush = self.now;
        if self.hosts[host].is_fenced || self.is_astray(host) {
            return Ok(());
        }
        let active = self.hosts[host].committed.as_ref().map_or(MemberSet::EMPTY, View::active);
        for member in active.iter() {
            let since = &self.nodes[self.node_index(member)].disk.unflushed_since;
            if let Some(sector) = since.iter().position(|&step| step > 0 && step < request.start) {
                return Err(format!("sector {sector} of member {member} is not flushed"));
            }
        }
        Ok(())
    }

    /// G1 and G3: a completed write is on every active member, and on record for every absent one.
    pub(super) fn check_written(&mut self, host: usize, request: &Request) -> Check {
        if self.is_astray(host) {
            self.coverage.hit("force: a client of an older branch writes");
            return Ok(());
        }
        if self.hosts[host].is_fenced {
            return Ok(());
        }
        let Some(view) = self.hosts[host].committed.clone() else {
            return Err("completed before an attach".into());
        };
        // What one had answered and lost with its history, it loses its place for.
        let has_all = |&index: &usize| !self.is_back(index);
        let clean: Vec<_> = view.clean().iter().map(|m| self.node_index(m)).filter(has_all).collect();
        for sector in (request.first..request.first + request.count).filter(|&s| !self.oracle.is_open(s)) {
            let value = |index: usize| self.nodes[index].value(sector);
            // The content of memory that was changed in flight is not known, but it is the same everywhere.
            // One that answered and has lost its cache since then is on its way out: the view under way has on record what it
            // had not flushed, which is looked at when that is committed.
            let keeps = |&&index: &&usize| !self.nodes[index].disk.lost.contains(&sector);
            let mut kept = clean.iter().filter(keeps);
            let Some(&first) = kept.next() else { continue };
            if let Some(&other) = kept.find(|&&i| value(i) != value(first)) {
                return Err(format!(
                    "completed, and sector {sector} is {} on node {} and {} on node {other}",
                    Oracle::name(value(first)),
                    first,
                    Oracle::name(value(other))
                ));
            }
        }
        for member in view.active().iter() {
            let index = self.node_index(member);
            if !has_all(&index) {
                continue;
            }
            let node = &self.nodes[index];
            for sector in request.first..request.first + request.count {
                let value = node.value(sector);
                if self.oracle.is_current(sector, value) {
                    continue;
                }
                // A part of the request may have completed before the member was brought back in.
                let is_known = |k: crate::pool::MemberId| self.has_record(self.node_index(k), member, sector);
                let is_stale =
                    view.state(member) == Some(MemberState::Syncing) && view.clean().iter().all(is_known);
                // A read may have shown a later write elsewhere, which is not here yet.
                let is_known = is_stale || self.oracle.is_open(sector) || node.disk.lost.contains(&sector);
                if !is_known {
                    return Err(format!(
                        "member {member} has {} in sector {sector}; possible: {}",
                        Oracle::name(value),
                        self.oracle.describe(sector)
                    ));
                }
            }
            for absent in view.out().iter().filter(|m| has_all(&self.node_index(*m))) {
                let theirs = &self.nodes[self.node_index(absent)];
                let misses = |&sector: &usize| {
                    theirs.disk.unflushed_since[sector] > 0
                        || !self.oracle.is_current(sector, theirs.value(sector))
                };
                let is_dropped = view.member(absent).is_some_and(|m| self.has_dropped(index, m));
                for sector in (request.first..request.first + request.count).filter(misses) {
                    let chunk = self.spec.chunk_size.chunk_of(sector as u64 * SECTOR);
                    if !node.has_bit(MapId::Dirty(absent), chunk) && !is_dropped {
                        return Err(format!(
                            "member {member} has no durable record that {absent} misses sector {sector}, chunk {chunk}"
                        ));
                    }
                }
            }
        }
        if !view.out().is_empty() {
            self.coverage.hit("dirty bit set for an absent member");
        }
        Ok(())
    }

    // The end ----------------------------------------------------------------------------------------------------

    /// At quiet: Clean members are identical, and whatever an absent one differs in is on record.
    pub(super) fn check_data(&self) -> Check {
        let view = self.committed.as_ref().ok_or("no client ever attached")?;
        let clean: Vec<_> = view.clean().iter().map(|m| self.node_index(m)).collect();
        let absent: Vec<_> = view.out().iter().map(|m| (m, self.node_index(m))).collect();
        for sector in 0..self.sectors() {
            let expected = self.nodes[clean[0]].value(sector);
            for &index in &clean {
                let value = self.nodes[index].value(sector);
                if !self.oracle.is_current(sector, value) {
                    return Err(format!(
                        "at the end, node {index} has {} in sector {sector}; possible: {}",
                        Oracle::name(value),
                        self.oracle.describe(sector)
                    ));
                }
                if value != expected {
                    return Err(format!(
                        "at the end, sector {sector} is {} on node {} and {} on node {index}",
                        Oracle::name(expected),
                        clean[0],
                        Oracle::name(value)
                    ));
                }
            }
            for &(out, index) in &absent {
                if self.nodes[index].value(sector) == expected || self.oracle.is_undecided(sector) {
                    continue;
                }
                let records =
                    view.active().iter().map(|k| self.check_on_record(self.node_index(k), out, sector));
                records.collect::<Check>()?;
            }
        }
        Ok(())
    }

    fn check_on_record(&self, keeper: usize, out: crate::pool::MemberId, sector: usize) -> Check {
        let block = crate::pool::Block(sector as u64 * SECTOR / crate::pool::BLOCK_SIZE);
        let chunk = self.spec.chunk_size.chunk_of_block(block);
        let node = &self.nodes[keeper];
        let blocks = node.replica.as_ref().and_then(|r| r.maps().dirty_blocks(out));
        if node.has_bit(MapId::Dirty(out), chunk) && blocks.is_some_and(|b| b.contains(block)) {
            return Ok(());
        }
        Err(format!(
            "at the end, absent member {out} differs in sector {sector} ({}), which node {keeper} has not on record; \
             possible: {}",
            Oracle::name(self.nodes[self.node_index(out)].value(sector)),
            self.oracle.describe(sector)
        ))
    }

    /// After the last client has left: nothing is under way, nothing is left over.
    pub(super) fn check_idle(&self) -> Check {
        for (index, node) in self.nodes.iter().enumerate() {
            if !node.buffers.is_empty() {
                return Err(format!("node {index} never released {} buffers", node.buffers.len()));
            }
            if !node.reads.is_empty() {
                return Err(format!("node {index} never sent {} reads", node.reads.len()));
            }
            if node.replica.as_ref().is_some_and(replica::Replica::is_busy) {
                return Err(format!("node {index} is busy for ever"));
            }
        }
        for (index, host) in self.hosts.iter().enumerate().filter(|(_, h)| !h.is_crashed) {
            if host.client.in_flight() > 0 || !host.requests.is_empty() {
                return Err(format!("client {index} never finished {:?}", host.requests.keys()));
            }
        }
        let view = self.committed.as_ref().ok_or("no client ever attached")?;
        for member in view.active().iter().filter(|_| !self.unclean) {
            let node = &self.nodes[self.node_index(member)];
            let is_detached = node.durable.last_client.as_ref().is_some_and(|c| !c.attached);
            let intents = node.replica.as_ref().map_or(0, |r| r.maps().intent().count());
            if is_detached && intents > 0 {
                return Err(format!("after a detach in good order member {member} keeps {intents} intents"));
            }
        }
        Ok(())
    }

    /// What is only known at the end of a run.
    pub(super) fn cover_end(&mut self) {
        match self.spec.members.len() {
            1 => self.coverage.hit("pool of one"),
            8 => self.coverage.hit("pool of eight"),
            _ => {} // The usual sizes.
        }
        for host in 0..self.hosts.len() {
            if self.hosts[host].client.status().counters.overlapping > 0 {
                self.coverage.hit("overlapping write waited");
            }
        }
    }

    pub(super) fn cover_submit(&mut self, operation: Operation, count: usize) {
        let max = u64::from(self.profile.limits.max_io);
        if operation.has_data() && count as u64 * SECTOR > max {
            self.coverage.hit("request split");
        }
    }
}
