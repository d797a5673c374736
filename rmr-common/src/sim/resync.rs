//! The rules of rejoin and resync: what a stale member misses is on record, nothing stale is promoted, and only what was
//! missed is moved.

use std::collections::{BTreeMap, BTreeSet};

use super::disk::Running;
use super::oracle::{Oracle, SECTOR};
use super::world::{Check, Event, World};
use crate::map::MapId;
use crate::pool::{BLOCK_SIZE, Block, Chunk, MemberId, MemberSet, MemberState, View};
use crate::replica::{self, DiskOperation, DiskResult, Replica};
use crate::wire::{ChunkList, Kind, MessageHeader, SetView, Status};

const SECTORS_PER_BLOCK: usize = (BLOCK_SIZE / SECTOR) as usize;

/// How much of a disk is compared at once where most of it is the same.
const SECTORS_PER_LOOK: usize = 16 * SECTORS_PER_BLOCK;

/// A resync that began with everything known.
struct Started {
    link: usize,
    attempt: u64,
    source: usize,
    /// Blocks that the source had on record.
    missed: u64,
    blocks: Vec<Block>,
    /// Those among them that took space on the member before.
    allocated: BTreeSet<Block>,
    /// Blocks that the member had pulled before.
    pulled: u64,
    /// Writes that it had carried out before.
    writes: u64,
    faults: u64,
}

/// The resyncs under way.
#[derive(Default)]
pub(super) struct Resyncs {
    started: BTreeMap<MemberId, Started>,
    /// A client died, and with it the knowledge of what was not flushed on members that are lost afterwards. Until members
    /// are reconciled, such a cache survives by luck.
    pub(super) is_unflushed_unknown: bool,
}

impl Resyncs {
    /// The operator has decided what the pool is: nothing of what was under way counts.
    pub(super) fn forget(&mut self) {
        self.started.clear();
        self.is_unflushed_unknown = true;
    }
}

/// Chunks that a node had on record as missed by a member before it was told that some are current.
pub(super) type Cleared = Option<(MemberId, Vec<Chunk>)>;

impl World<'_> {
    fn state(&self, index: usize) -> Option<MemberState> {
        let node = &self.nodes[index];
        let line = self.committed.as_ref()?.member(node.member)?;
        (line.store == node.store).then_some(line.state)
    }

    fn is_stale(&self, index: usize, sector: usize) -> bool {
        let replica = self.nodes[index].replica.as_ref();
        let map = replica.and_then(|r| r.maps().dirty_blocks(r.member()));
        map.is_some_and(|m| m.contains(block_of(sector)))
    }

    /// Whether a disk request carries data of another member, or zeroes in its place.
    pub(super) fn is_pulled_write(
        &self,
        index: usize,
        operation: DiskOperation,
        offset: u64,
        length: u32,
    ) -> bool {
        let blocks = offset / BLOCK_SIZE..(offset + u64::from(length)) / BLOCK_SIZE;
        let is_whole = offset.is_multiple_of(BLOCK_SIZE) && u64::from(length).is_multiple_of(BLOCK_SIZE);
        let is_stale = |b: u64| self.is_stale(index, usize::try_from(b).unwrap_or(0) * SECTORS_PER_BLOCK);
        match operation {
            DiskOperation::WritePulled | DiskOperation::ZeroPulled => true,
            // Zeroes of a pull are no such request, but for a mistake that is being made. A client's request for zeroes looks the same when it covers nothing but stale blocks.
            DiskOperation::WriteZeroes => is_whole && { blocks }.all(is_stale),
            _ => false,
        }
    }

    /// Pulled data goes only to blocks that are stale, of a member that is Syncing.
    pub(super) fn check_pulled(&mut self, index: usize, offset: u64, length: u32) -> Check {
        let (first, end) = (offset / BLOCK_SIZE, (offset + u64::from(length)) / BLOCK_SIZE);
        if !offset.is_multiple_of(BLOCK_SIZE) || !u64::from(length).is_multiple_of(BLOCK_SIZE) || length == 0
        {
            return Err(format!("node {index} writes pulled data to {offset}+{length}"));
        }
        for block in first..end {
            if !self.is_stale(index, usize::try_from(block).unwrap_or(0) * SECTORS_PER_BLOCK) {
                return Err(format!("node {index} writes pulled data to block {block}, which is current"));
            }
        }
        let replica = self.nodes[index].replica.as_ref();
        if replica.is_none_or(|r| r.view().state(r.member()) != Some(MemberState::Syncing)) {
            return Err(format!("node {index} writes pulled data and is not Syncing"));
        }
        self.coverage.hit("block pulled");
        Ok(())
    }

    /// What must be known before a message is delivered, to judge what it did.
    pub(super) fn before_message(&mut self, index: usize, header: &MessageHeader, body: &[u8]) -> Cleared {
        self.cover_guest_write(index, header);
        if header.kind == Kind::SetView {
            self.note_additions(index, body);
        }
        if header.kind != Kind::ClearDirty {
            return None;
        }
        let list = ChunkList::decode(Kind::ClearDirty, body).ok()?;
        let map = self.nodes[index].replica.as_ref()?.maps().dirty_chunks(list.member)?;
        Some((list.member, list.chunks.into_iter().filter(|c| map.contains(*c)).collect()))
    }

    /// A view may name ranges that a member could not read before it left, when it syncs already: it pulls those once more.
    fn note_additions(&mut self, index: usize, body: &[u8]) {
        let member = self.nodes[index].member;
        if let Ok(set) = SetView::decode(body)
            && set.additions.iter().any(|addition| addition.members.contains(member))
        {
            self.resyncs.started.remove(&member);
        }
    }

    /// A dirty bit is cleared only when the member has everything, and survives a power cut with it.
    pub(super) fn after_message(&mut self, index: usize, before: Cleared) -> Check {
        let Some((member, chunks)) = before else { return Ok(()) };
        // A node that was lost may hear late what was passed on before; nobody goes by its record any more.
        if self.state(index).is_none_or(|s| s == MemberState::Out) {
            return Ok(());
        }
        let stale = self.node_index(member);
        let per_chunk = usize::try_from(self.spec.chunk_size.bytes() / SECTOR).unwrap_or(0);
        for chunk in chunks {
            let replica = self.nodes[index].replica.as_ref();
            let map = replica.and_then(|r| r.maps().dirty_chunks(member));
            if map.is_some_and(|m| m.contains(chunk)) {
                continue;
            }
            self.coverage.hit("dirty bit cleared by a report");
            let start = usize::try_from(chunk.0).unwrap_or(0) * per_chunk;
            let disk = &self.nodes[stale].disk;
            for sector in start..(start + per_chunk).min(self.sectors()) {
                let is_unflushed = disk.pulled[sector] && disk.unflushed_since[sector] > 0;
                // A guest write that came after the flush before the report, and went with a later flush that failed: the view that
                // follows has it on record.
                let is_lost = disk.lost.contains(&sector) && !disk.pulled[sector];
                if is_unflushed || self.is_missing(stale, sector) && !is_lost {
                    return Err(format!(
                        "node {index} forgets that member {member} misses chunk {chunk}: its sector {sector} is {} \
                         (unflushed: {is_unflushed}); possible: {}",
                        Oracle::name(disk.sectors[sector]),
                        self.oracle.describe(sector)
                    ));
                }
            }
        }
        Ok(())
    }

    /// Whether a sector of a node is older than what was acknowledged, beyond doubt.
    fn is_missing(&self, index: usize, sector: usize) -> bool {
        let value = self.nodes[index].value(sector);
        // What a client that lost its place left on a member that the others go on without, that member tells when it comes back.
        let is_told = self.oracle.is_of_fenced(value)
            && self.committed.as_ref().is_some_and(|v| self.nodes[index].durable.epoch < v.epoch);
        !self.oracle.is_current(sector, value) && !self.oracle.is_open(sector) && !is_told
    }

    /// What a member that is not Clean misses is on record at each member that is active, and at itself while it syncs.
    pub(super) fn check_stale(&self) -> Check {
        let Some(view) = &self.committed else { return Ok(()) };
        for stale in view.members.iter().filter(|m| m.state != MemberState::Clean) {
            let index = self.node_index(stale.id);
            if self.is_back_unknown(index, view) {
                continue; // It is noticed when it is brought back in.
            }
            let keepers: Vec<usize> =
                view.active().iter().map(|m| self.node_index(m)).filter(|&k| k != index).collect();
            // What one that went back in time had on record is lost with its history.
            let keepers: Vec<_> = keepers.into_iter().filter(|&k| !self.is_back(k)).collect();
            let own = self.nodes[index].replica.as_ref();
            let knows_itself = own.is_some_and(|r| {
                let is_syncing = r.view().state(stale.id) == Some(MemberState::Syncing) && *r.view() == *view;
                is_syncing && !r.flush_failed()
            });
            let has = |k: &usize, sector: usize| {
                self.has_record(*k, stale.id, sector) || self.has_dropped(*k, stale)
            };
            // Records are by block: where everybody has one, it does not matter what is in it.
            let is_unknown = |&first: &usize| {
                !keepers.iter().all(|k| has(k, first)) || knows_itself && !self.is_stale(index, first)
            };
            let unknown = self.blocks_in_doubt(index).filter(is_unknown);
            let mut sectors =
                unknown.flat_map(|first| first..(first + SECTORS_PER_BLOCK).min(self.sectors()));
            // One that has its promotion, of which its client has not heard, and lost its cache with its power: when its client hears
            // of that, it is Out with all of it on record, and judged as such.
            let is_promoted = stale.state == MemberState::Syncing
                && self.nodes[index].durable.view.state(stale.id) == Some(MemberState::Clean);
            // So is one whose flush failed: its session is over, of which its client hears next.
            let has_left = own.is_none_or(|r| r.holder_connection().is_none() || r.flush_failed());
            // What one had not flushed of a client that died, and lost with a failed flush while it was not attached, it tells when it
            // comes back: see `check_rejoined`.
            let tells = self.nodes[index].durable.flush_failed || own.is_some_and(Replica::flush_failed);
            let is_untold = tells && self.resyncs.is_unflushed_unknown && stale.state == MemberState::Out;
            let is_promoted = is_promoted || is_untold || stale.state == MemberState::Syncing && has_left;
            let is_lost = |sector: usize| is_promoted && self.nodes[index].disk.lost.contains(&sector);
            if let Some(sector) = sectors.find(|&s| self.is_missing(index, s) && !is_lost(s)) {
                let silent: Vec<_> = keepers.iter().filter(|k| !has(k, sector)).collect();
                return Err(format!(
                    "{view}: member {} misses sector {sector} ({}), on record everywhere but on nodes {silent:?}, \
                     and on itself: {}; possible: {}",
                    stale.id,
                    Oracle::name(self.nodes[index].disk.sectors[sector]),
                    self.is_stale(index, sector),
                    self.oracle.describe(sector)
                ));
            }
        }
        Ok(())
    }

    /// The first sectors of all blocks in which a node may have something else than the pool.
    fn blocks_in_doubt(&self, index: usize) -> impl Iterator<Item = usize> {
        let node = &self.nodes[index];
        let room = usize::try_from(node.room / SECTOR).unwrap_or(usize::MAX);
        let end = self.sectors();
        let is_present = move |first: &usize, length: usize| {
            let last = (first + length).min(end);
            last <= room && node.disk.sectors[*first..last] == *self.oracle.present(*first..last)
        };
        (0..end)
            .step_by(SECTORS_PER_LOOK)
            .filter(move |first| !is_present(first, SECTORS_PER_LOOK))
            .flat_map(move |first| (first..(first + SECTORS_PER_LOOK).min(end)).step_by(SECTORS_PER_BLOCK))
            .filter(move |first| !is_present(first, SECTORS_PER_BLOCK))
    }

    /// Whether a node has a later view than the committed one, in which the store is no member any more.
    pub(super) fn has_dropped(&self, keeper: usize, stale: &crate::pool::MemberView) -> bool {
        let view = &self.nodes[keeper].durable.view;
        let is_later = self.committed.as_ref().is_some_and(|c| view.order() > c.order());
        is_later && !view.has_store(stale.id, stale.store)
    }

    pub(super) fn has_record(&self, keeper: usize, stale: MemberId, sector: usize) -> bool {
        let node = &self.nodes[keeper];
        let Some(replica) = &node.replica else { return true };
        let chunk = self.spec.chunk_size.chunk_of_block(block_of(sector));
        replica.maps().dirty_blocks(stale).is_some_and(|m| m.contains(block_of(sector)))
            && node.has_bit(MapId::Dirty(stale), chunk)
    }

    /// Clients read from Clean members only.
    pub(super) fn check_read_from(&self, host: usize, connection: Option<usize>) -> Check {
        let Some(connection) = connection else { return Ok(()) };
        let node = &self.nodes[self.connections[connection].node];
        let line = self.hosts[host].committed.as_ref().and_then(|v| v.member(node.member));
        let state = line.filter(|l| l.store == node.store).map(|l| l.state);
        if state == Some(MemberState::Clean) {
            return Ok(());
        }
        Err(format!(
            "client {host} reads from member {}, store {}, which is {state:?}",
            node.member, node.store
        ))
    }

    /// A store that was removed or replaced gets nothing.
    pub(super) fn check_sent_to(&self, host: usize, connection: Option<usize>) -> Check {
        let Some(connection) = connection else { return Ok(()) };
        let node = &self.nodes[self.connections[connection].node];
        let line = self.hosts[host].committed.as_ref().and_then(|v| v.member(node.member));
        let state = line.filter(|l| l.store == node.store).map(|l| l.state);
        if state.is_some_and(|s| s != MemberState::Out) {
            return Ok(());
        }
        Err(format!(
            "client {host} writes to member {}, store {}, which is {state:?}",
            node.member, node.store
        ))
    }

    /// Judges the steps from the view that was committed before.
    pub(super) fn check_steps(&mut self, last: &View, view: &View) -> Check {
        if view.number.0 != last.number.0 + 1 {
            // A view was given up for this one. A member that did not adopt it takes its map over again, chunk by chunk, and
            // pulls once more what it had not reported.
            self.resyncs.started.clear();
        }
        let syncing = view.in_state(MemberState::Syncing);
        for member in syncing.without(last.in_state(MemberState::Syncing)).iter() {
            self.check_rejoined(member, view)?;
            self.coverage.hit("rejoin");
            if syncing != MemberSet::only(member) {
                self.coverage.hit("second member rejoins while another syncs");
            }
        }
        for member in view.clean().without(last.clean()).iter() {
            self.coverage.hit("promotion");
            if self.node_in(view, member) >= self.spec.members.len() {
                self.coverage.hit("a new member is brought in");
            }
            self.check_promotion(member, view)?;
        }
        Ok(())
    }

    /// Whatever a member that comes back has otherwise than the Clean ones is on record with them, whoever wrote it.
    fn check_rejoined(&self, member: MemberId, view: &View) -> Check {
        let index = self.node_index(member);
        let clean: Vec<_> = view.clean().iter().map(|m| self.node_index(m)).collect();
        for sector in 0..self.sectors() {
            let value = self.nodes[index].value(sector);
            let differs = |&k: &usize| self.nodes[k].value(sector) != value;
            let is_known = |&k: &usize| self.has_record(k, member, sector);
            if clean.iter().any(differs) && !self.oracle.is_in_flight(sector) && !clean.iter().all(is_known) {
                return Err(format!(
                    "{view}: member {member} came back with {} in sector {sector}, which is not on record; possible: {}",
                    Oracle::name(value),
                    self.oracle.describe(sector)
                ));
            }
        }
        Ok(())
    }

    /// A member that is Clean from now on has what the other Clean ones have.
    fn check_promotion(&mut self, member: MemberId, view: &View) -> Check {
        let index = self.node_index(member);
        if self.is_back(index) {
            return Ok(()); // It went back after it had answered.
        }
        let disk = &self.nodes[index].disk;
        let others = view.clean().without(MemberSet::only(member));
        let others: Vec<_> = others.iter().map(|m| self.node_index(m)).collect();
        for sector in 0..self.sectors() {
            let value = self.nodes[index].value(sector);
            if disk.pulled[sector] && disk.unflushed_since[sector] > 0 {
                return Err(format!("member {member} is promoted with pulled sector {sector} unflushed"));
            }
            // Another one that lost its cache since is on its way out, with what it had not flushed on record.
            let differs = |&other: &usize| {
                let theirs = &self.nodes[other];
                theirs.value(sector) != value && !theirs.disk.lost.contains(&sector)
            };
            let is_wrong = !self.oracle.is_current(sector, value) || others.iter().any(differs);
            // It may have lost its cache since it knows of its promotion: then it is Out with all of it on record when its client
            // hears of that. What it had pulled was flushed before.
            let is_lost = disk.lost.contains(&sector) && !disk.pulled[sector];
            if is_wrong && !is_lost && !self.oracle.is_in_flight(sector) {
                return Err(format!(
                    "member {member} is promoted with {} in sector {sector}; possible: {}",
                    Oracle::name(value),
                    self.oracle.describe(sector)
                ));
            }
        }
        let Some(started) = self.resyncs.started.remove(&member) else { return Ok(()) };
        let Some(replica) = &self.nodes[index].replica else { return Ok(()) };
        // The member closed its link when it heard that it is Clean; before that nothing may have happened to it.
        let link = &self.peers[started.link];
        let is_undisturbed = started.faults == self.faults
            && !link.is_cut
            && link.is_between(self.nodes[index].life, self.nodes[link.source].life)
            && self.nodes[index].peer_attempt == started.attempt + 1;
        if !is_undisturbed {
            return Ok(());
        }
        let status = replica.status().counters;
        let moved = status.pulled_in_blocks - started.pulled;
        let is_exact = moved == started.missed;
        let has_writes = status.writes + status.zeroes > started.writes;
        if moved > started.missed || !is_exact && !has_writes {
            return Err(format!("member {member} missed {} blocks, and {moved} were moved", started.missed));
        }
        if started.missed > 0 {
            self.coverage.hit("resync moved what was missed");
        }
        if has_writes { Ok(()) } else { self.check_thin(index, &started) }
    }

    /// A resync without writes of a guest has left holes where its source has them.
    fn check_thin(&mut self, index: usize, started: &Started) -> Check {
        let (own, source) = (&self.nodes[index].disk, &self.nodes[started.source].disk);
        let mut holes = 0;
        for block in started.blocks.iter().map(|b| usize::try_from(b.0).unwrap_or(usize::MAX)) {
            let sectors = block * SECTORS_PER_BLOCK..(block + 1) * SECTORS_PER_BLOCK;
            // What rots there does not read as zeroes, and what is discarded there may not be discarded here yet.
            let is_in_motion = sectors.clone().any(|s| self.oracle.is_in_flight(s));
            let is_rotten = { sectors }.any(|s| own.rot.mark(s) | source.rot.mark(s) != 0) || is_in_motion;
            // What took space before may keep it.
            let had_space = started.allocated.contains(&Block(block as u64));
            if source.is_allocated(block) || is_rotten || had_space {
                continue;
            }
            if own.is_allocated(block) {
                return Err(format!(
                    "node {index} was brought up to date from node {}, and has block {block} allocated, which is a hole there",
                    started.source
                ));
            }
            holes += 1;
        }
        if holes > 0 {
            self.coverage.hit("resync left a hole");
        }
        Ok(())
    }

    /// A node has a new view: its resync begins, when that has it Syncing.
    pub(super) fn note_view(&mut self, index: usize, view: &View) {
        let member = self.nodes[index].member;
        let link = self.nodes[index].peer.filter(|&l| self.peers[l].is_open());
        if view.state(member) != Some(MemberState::Syncing) {
            return;
        }
        if self.resyncs.started.get(&member).is_some_and(|s| Some(s.link) == link) {
            return; // It has begun before.
        }
        self.resyncs.started.remove(&member);
        let was_out = self.state(index) == Some(MemberState::Out);
        let (Some(link), true) = (link, was_out) else { return };
        let source = self.nodes[self.peers[link].source].replica.as_ref();
        let (Some(source), Some(replica)) = (source, &self.nodes[index].replica) else { return };
        if source.view().number < view.number {
            return; // What the view says to be missed is not on record there yet.
        }
        let counters = replica.status().counters;
        let blocks: Vec<_> = source.maps().missed_in(member, 0, source.spec().size).collect();
        let disk = &self.nodes[index].disk;
        let takes_space = |b: &&Block| disk.is_allocated(usize::try_from(b.0).unwrap_or(usize::MAX));
        let started = Started {
            allocated: blocks.iter().filter(takes_space).copied().collect(),
            link,
            attempt: self.nodes[index].peer_attempt,
            source: self.peers[link].source,
            missed: source.maps().missed(member).0,
            blocks,
            pulled: self.peers[link].pulled_before,
            writes: counters.writes + counters.zeroes,
            faults: self.faults,
        };
        self.resyncs.started.insert(member, started);
    }

    /// Whether a client has nothing left to do, and every member is Clean.
    pub(super) fn is_healed(&self, host: usize) -> bool {
        let host = &self.hosts[host];
        let is_clean = host.committed.as_ref().is_some_and(|v| v.clean().iter().count() == v.members.len());
        let is_staying = host.client.is_active() && host.client.status().state != "detaching";
        is_staying && host.requests.is_empty() && is_clean && self.is_operator_content()
    }

    /// Whether a client has nothing to do, and leaves a leg out for its read errors.
    pub(super) fn leaves_a_leg_out(&self, host: usize) -> bool {
        let host = &self.hosts[host];
        let status = host.client.status();
        host.client.is_active()
            && host.requests.is_empty()
            && status.legs.iter().any(|l| l.excluded.is_some())
    }

    /// At quiet every member is Clean, and nobody remembers that one misses anything.
    pub(super) fn check_all_clean(&self) -> Check {
        for (index, node) in self.nodes.iter().enumerate().filter(|(i, _)| self.is_member(*i)) {
            let missed = node.replica.as_ref().map(|r| r.status().missed).unwrap_or_default();
            if let Some(missed) = missed.first() {
                return Err(format!("at the end node {index} still has on record: {missed:?}"));
            }
            for (page, bytes) in node.pages.iter().filter(|(p, _)| p.map != MapId::Intent) {
                if bytes.iter().any(|b| *b != 0) {
                    return Err(format!("at the end {page:?} of node {index} is not empty on disk"));
                }
            }
        }
        Ok(())
    }

    /// Sometimes a fault strikes just when a member is being brought back in.
    pub(super) fn tempt_fate(&mut self, host: usize, node: usize, header: &MessageHeader) {
        let committed = self.hosts[host].committed.as_ref();
        let is_stale = committed.and_then(|v| v.state(self.nodes[node].member)) != Some(MemberState::Clean);
        let is_rejoin = committed.is_some()
            && is_stale
            && matches!(header.kind, Kind::Attach | Kind::Prepare | Kind::SetView | Kind::ClearDirty);
        if is_rejoin && !self.is_calm && self.rng.percent(50) {
            let delay = self.rng.range(1, self.profile.network_delay * 3);
            self.after(delay, Event::Burst(host));
        }
        let may_crash = self.profile.client_crashes && self.faults < self.profile.faults && !self.is_calm;
        if header.kind == Kind::SetView && may_crash && self.rng.percent(4) {
            self.faults += 1;
            let delay = self.rng.range(1, self.profile.network_delay * 2);
            self.after(delay, Event::HostCrash(host));
        }
        if !is_rejoin || self.is_calm || self.faults >= self.profile.faults || !self.rng.percent(30) {
            return;
        }
        self.faults += 1;
        let most = self.rng.pick(&[self.profile.network_delay * 4, self.profile.network_delay * 40]);
        let delay = self.rng.range(1, most);
        self.after(delay, Event::Strike { host, node });
    }

    // Coverage ---------------------------------------------------------------------------------------------------

    fn cover_guest_write(&mut self, index: usize, header: &MessageHeader) {
        let is_write = matches!(header.kind, Kind::Write | Kind::Discard | Kind::WriteZeroes);
        let Some(replica) = self.nodes[index].replica.as_ref().filter(|_| is_write) else { return };
        if replica.view().state(replica.member()) != Some(MemberState::Syncing) {
            return;
        }
        let end = header.offset + u64::from(header.length);
        let edges = [header.offset, end].into_iter().filter(|e| !e.is_multiple_of(BLOCK_SIZE));
        let is_partial = { edges }.any(|e| self.is_stale(index, usize::try_from(e / SECTOR).unwrap_or(0)));
        let first = usize::try_from(header.offset / SECTOR).unwrap_or(0);
        let last = usize::try_from(end / SECTOR).unwrap_or(0);
        let met = self.nodes[index]
            .disk
            .running
            .values()
            .any(|r| r.is_pulled() && r.first < last && first < r.first + r.count);
        if is_partial {
            self.coverage.hit("partial write waits for an urgent pull");
        }
        if met {
            self.coverage.hit("guest write waits for a pulled write");
        }
    }

    /// Whether a member is Clean by its own view.
    pub(super) fn is_clean_at(&self, index: usize) -> bool {
        let replica = self.nodes[index].replica.as_ref();
        replica.is_some_and(|r| r.view().state(r.member()) == Some(MemberState::Clean))
    }

    /// How many blocks a node knows to be stale on itself.
    pub(super) fn own_stale(&self, index: usize) -> u64 {
        self.nodes[index].replica.as_ref().map_or(0, |r| r.maps().missed(r.member()).0)
    }

    /// How many blocks the pool has by the maps of a node.
    pub(super) fn blocks_at(&self, index: usize) -> u64 {
        self.nodes[index].replica.as_ref().map_or(0, |r| r.maps().block_count())
    }

    pub(super) fn cover_disk_done(&mut self, index: usize, running: &Running, stale_before: u64) {
        let Some(replica) = &self.nodes[index].replica else { return };
        if replica.view().state(replica.member()) != Some(MemberState::Syncing) {
            return;
        }
        let failed = running.result != DiskResult::Done;
        match (running.operation, running.is_pulled(), failed) {
            (_, true, true) => self.coverage.hit("pulled write failed"),
            (DiskOperation::Flush, _, true) => self.coverage.hit("flush failed at a Syncing member"),
            (_, false, true) if running.is_write() => {
                self.coverage.hit("guest write failed at a Syncing member")
            }
            (_, false, false) if running.is_write() && self.own_stale(index) < stale_before => {
                self.coverage.hit("guest write made stale blocks fresh");
            }
            _ => {} // The usual.
        }
    }

    pub(super) fn cover_to_client(&mut self, host: usize, header: &MessageHeader) {
        if header.kind == Kind::ChunksDone && self.hosts[host].client.status().state == "changing view" {
            self.coverage.hit("chunks done while a view changes");
        }
    }

    pub(super) fn cover_rejoin_lost(&mut self, host: usize, link: crate::client::LinkId) {
        let Some((member, phase)) = self.hosts[host].client.rejoin_phase() else { return };
        let node = self.hosts[host].lost_node[usize::from(link.0)];
        if node != Some(self.node_index(member)) {
            return;
        }
        self.coverage.hit(match phase {
            "attaching" => "member lost in a rejoin: attaching",
            "preparing" => "member lost in a rejoin: preparing",
            "growing" => return,
            "quiescing" => "member lost in a rejoin: quiescing",
            _ => "member lost in a rejoin: changing",
        });
    }

    /// A node is about to crash.
    pub(super) fn cover_crash(&mut self, index: usize) {
        let is_syncing = |n: usize| {
            let replica = self.nodes[n].replica.as_ref();
            replica.is_some_and(|r| r.view().state(r.member()) == Some(MemberState::Syncing))
        };
        let is_source = self.peers.iter().any(|p| p.is_open() && p.source == index && is_syncing(p.stale));
        if is_source {
            self.coverage.hit("source lost in a resync");
        }
        if is_syncing(index) {
            self.coverage.hit("Syncing member crashed");
        }
    }

    pub(super) fn cover_peer_connect(&mut self, node: usize, source: usize) {
        let Some(replica) = &self.nodes[node].replica else { return };
        let is_syncing = replica.view().state(replica.member()) == Some(MemberState::Syncing);
        let last = self.peers.iter().rev().find(|p| p.stale == node);
        let Some(last) = last.filter(|p| is_syncing && p.source != source) else { return };
        let is_clean = self.state(last.source) == Some(MemberState::Clean);
        self.coverage.hit("source changed in a resync");
        if is_clean {
            self.coverage.hit("another source named after one failed");
        }
    }

    pub(super) fn cover_pull(&mut self, source: usize, header: &MessageHeader) {
        if header.kind == Kind::Pull && self.nodes[source].life > 1 {
            self.coverage.hit("pulled from a source that was restarted");
        }
    }

    pub(super) fn cover_view_answer(&mut self, index: usize, header: &MessageHeader) {
        let is_broken = self.nodes[index].replica.as_ref().is_some_and(|r: &Replica| r.status().broken);
        if header.kind == Kind::SetViewReply && header.status == Status::IoError && !is_broken {
            self.coverage.hit("handover failed");
        }
    }

    pub(super) fn cover_node_notice(&mut self, index: usize, notice: &replica::Notice) {
        if let replica::Notice::View(view) = notice {
            self.note_view(index, view);
        }
    }
}

fn block_of(sector: usize) -> Block {
    Block((sector / SECTORS_PER_BLOCK) as u64)
}
