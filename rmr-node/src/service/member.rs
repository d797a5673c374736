//! One open store with the replica that speaks for it: joins the state machine, the metadata writer and the disk.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use rmr_common::clock::monotonic_now;
use rmr_common::map::{ChunkMap, MapId, MemberMaps};
use rmr_common::pool::{BLOCK_SIZE, Cause, Condition, MemberId, MemberState, PoolId, View};
use rmr_common::replica::{
    CommandId, Config as ReplicaConfig, DurableState, Event, IoId, LastClient, Metadata, Notice, Replica,
    ReplicaStatus, ResyncLimits, ResyncStatus as ReplicaResync, Ticket,
};
use rmr_common::throttle::Throttles;
use rmr_common::time::Time;
use rmr_common::wire::{Limits, MAX_IO, MAX_SLOTS};

use super::Shared;
use super::command::Asker;
use super::pulls::Pulls;
use super::source_link::{Meant, SourceLink};
use super::throttle::Burst;
use super::trouble::Troubles;
use crate::admin::api::{
    Authentication, ClientState, ClientStatus, HistoryStatus, IoCounters, LinkState, Missed, PeerCondition,
    PeerStatus, PoolStatus, ResyncState, ResyncStatus, StoreState, UnixMs,
};
use crate::disk::{Buffer, DiskId};
use crate::store::{ClientRecord, MapKind, MetadataIo, MetadataWriter, Store, fit_client_name};

/// A disk read that waits for a buffer.
#[derive(Clone, Copy, Debug)]
pub(super) struct WaitingRead {
    pub(super) io: IoId,
    pub(super) offset: u64,
    pub(super) length: u32,
    /// The digests of its blocks are wanted, and not the data.
    pub(super) digests: bool,
}

/// An open store of a shard.
pub(super) struct Member {
    pub(super) replica: Replica,
    pub(super) store: Store,
    pub(super) disk: DiskId,
    writer: MetadataWriter,
    /// Why metadata was not even given to the writer.
    refused: Option<String>,
    /// Requests to the writer that are not durable, oldest first.
    tickets: VecDeque<(crate::store::Ticket, Ticket)>,
    /// Buffers that a disk read has filled, until their answer is queued, by the request's number.
    reads: Vec<Option<Buffer>>,
    /// Bytes of buffers that disk reads fill.
    pub(super) reading_bytes: usize,
    /// Disk reads that wait for a buffer, oldest first.
    pub(super) waiting_reads: VecDeque<WaitingRead>,
    /// It stands in the shard's line for memory.
    pub(super) in_line: bool,
    /// Its replica may have something to say.
    pub(super) active: bool,
    /// How many lines about it went to the log in this second.
    pub(super) lines: Burst,
    /// What its connections have made the shard do in this loop iteration, in bytes.
    pub(super) spent: usize,
    attached: Option<(UnixMs, SocketAddr)>,
    /// Whether each member is current in the view, and since when that is so.
    state_since: [Option<(bool, UnixMs)>; rmr_common::pool::MAX_MEMBERS],
    pub(super) closing: bool,
    /// The connection to the node that this member is brought up to date from.
    pub(super) source: Option<SourceLink>,
    /// The member that the connection is to lead to.
    pub(super) source_meant: Option<Meant>,
    /// Why the last connection to a source was lost.
    pub(super) source_error: String,
    /// Tells an attempt to connect to it from an earlier one.
    pub(super) source_attempt: u64,
    /// An attempt is under way, if only one that nobody waits for any more. There is one thread at a time.
    pub(super) connecting: Option<u64>,
    /// Where to connect when that has ended.
    pub(super) next_source: Option<rmr_common::pool::Address>,
    /// Memory for what it pulls; goes after the connection.
    pub(super) pulls: Pulls,
    progress: Option<Progress>,
    /// Bytes of answers to pulls of others.
    pub(super) resync_sent: u64,
    /// Bytes of answers to own pulls.
    pub(super) resync_received: u64,
    /// Pages of metadata that were written.
    metadata_pages: u64,
    /// Operators' commands that are not answered.
    pub(super) commands: Vec<(CommandId, Asker)>,
    /// A thread makes room in the store.
    pub(super) makes_room: bool,
    /// What its disk has failed of late.
    pub(super) troubles: Troubles,
    /// Log lines that clients and disks can cause.
    pub(super) logs: Throttles<&'static str>,
}

/// What is known of the speed of a resync.
struct Progress {
    since: UnixMs,
    at: Time,
    pulled: u64,
    left: u64,
    bytes_per_s: u64,
}

impl Member {
    /// Serves a store, which `disk` carries in the shard's engine.
    pub(super) fn new(mut store: Store, disk: DiskId, shared: &Arc<Shared>) -> Self {
        let superblock = store.superblock().clone();
        let spec = superblock.spec.clone();
        let mut maps = MemberMaps::new(&spec);
        for kind in MapKind::all() {
            let mut map = ChunkMap::new(spec.chunk_count());
            for (page, index) in store.maps().pages(kind).iter().zip(0u32..) {
                map.load_page(index, &page.bits);
            }
            maps.load(map_id(kind), map);
        }
        let share = buffer_share(shared) as u64;
        let config = ReplicaConfig {
            limits: Limits {
                max_io: MAX_IO,
                slots: MAX_SLOTS,
                max_bytes: u32::try_from(share).unwrap_or(u32::MAX).max(MAX_IO),
            },
            intent_idle: shared.config.intent_idle,
            host_boot: shared.host_boot,
            process_boot: shared.process_boot,
            write_through: superblock.write_through,
            resync: ResyncLimits {
                max_inflight: shared.config.resync.max_inflight,
                bytes_per_s: shared.config.resync.bytes_per_s,
            },
            max_size: superblock.layout.largest_pool(spec.chunk_size),
            tls_only: shared.config.is_tls_only(),
        };
        let state = DurableState {
            view: superblock.view.clone(),
            spec: spec.clone(),
            epoch: superblock.epoch,
            mark: superblock.mark,
            attested: superblock.attested,
            last_client: superblock.client.as_ref().map(|c| LastClient {
                client: c.id,
                description: c.name.clone(),
                attached: c.attached,
            }),
            flush_failed: superblock.flush_failed,
        };
        let replica = Replica::new(config, superblock.member, state, maps);
        let writer = store.metadata_writer();
        store.forget_maps();
        Self {
            replica,
            store,
            disk,
            writer,
            refused: None,
            tickets: VecDeque::new(),
            reads: Vec::new(),
            reading_bytes: 0,
            waiting_reads: VecDeque::new(),
            in_line: false,
            active: false,
            lines: Burst::default(),
            spent: 0,
            attached: None,
            state_since: [None; rmr_common::pool::MAX_MEMBERS],
            closing: false,
            source: None,
            source_meant: None,
            source_error: String::new(),
            source_attempt: 0,
            connecting: None,
            next_source: None,
            pulls: Pulls::default(),
            progress: None,
            resync_sent: 0,
            resync_received: 0,
            metadata_pages: 0,
            commands: Vec::new(),
            makes_room: false,
            troubles: Troubles::default(),
            logs: Throttles::new(10, Duration::from_secs(10)),
        }
    }

    /// The pool.
    pub(super) fn pool(&self) -> PoolId {
        self.replica.spec().id
    }

    /// Keeps the data of a disk read until its answer is queued.
    pub(super) fn keep_read(&mut self, io: IoId, buffer: Buffer) {
        let index = io.0 as usize;
        if self.reads.len() <= index {
            self.reads.resize_with(index + 1, || None);
        }
        self.reads[index] = Some(buffer);
    }

    /// Takes what [`Member::keep_read`] kept.
    pub(super) fn take_read(&mut self, io: IoId) -> Option<Buffer> {
        self.reads.get_mut(io.0 as usize).and_then(Option::take)
    }

    /// Hands a piece of metadata to the writer.
    pub(super) fn persist(&mut self, ticket: Ticket, metadata: &Metadata, now: Time) {
        let asked = match metadata {
            Metadata::Page(page) => {
                let Some(bits) = self.replica.page(*page) else { return };
                Ok(self.writer.request_map(map_kind(page.map), page.page, bits))
            }
            Metadata::State(state) => {
                let mut superblock = self.writer.superblock().clone();
                superblock.view = state.view.clone();
                superblock.spec = state.spec.clone();
                superblock.epoch = state.epoch;
                superblock.mark = state.mark;
                superblock.attested = state.attested;
                superblock.flush_failed = state.flush_failed;
                superblock.client = state.last_client.as_ref().map(|c| ClientRecord {
                    id: c.client,
                    name: fit_client_name(&c.description).to_owned(),
                    attached: c.attached,
                });
                self.writer.request_superblock(superblock)
            }
        };
        match asked {
            // The writer has stopped for good: what it is asked for now would never be answered.
            Ok(_) if self.metadata_failed() => self.replica.apply(Event::Durable(ticket, Err(())), now),
            Ok(asked) => self.tickets.push_back((asked, ticket)),
            Err(error) => {
                tracing::error!(pool = %self.replica.spec().name, "superblock refused: {error}");
                self.refused = Some(format!("the superblock to be written is refused: {error}"));
                self.replica.apply(Event::Durable(ticket, Err(())), now);
            }
        }
    }

    /// The next thing that the disk has to do for the metadata.
    pub(super) fn next_metadata_io(&mut self) -> Option<MetadataIo> {
        let io = self.writer.next_io();
        self.metadata_pages += u64::from(matches!(io, Some(MetadataIo::Write { .. })));
        io
    }

    /// A metadata I/O ended.
    pub(super) fn metadata_done(&mut self, id: u64, result: Result<(), String>, now: Time) {
        match self.writer.completed(id, result) {
            Ok(_) => {
                self.troubles.succeeded(&[Cause::MetadataErrors]);
                let durable = self.writer.durable();
                while let Some((asked, ticket)) = self.tickets.front().copied()
                    && asked <= durable
                {
                    self.tickets.pop_front();
                    self.replica.apply(Event::Durable(ticket, Ok(())), now);
                }
            }
            Err(error) => {
                let (pool, member) = (&self.replica.spec().name, self.replica.member());
                self.logs.log("metadata", |withheld| {
                    tracing::error!(%pool, %member, withheld, "metadata not written, the store no longer serves: {error}");
                });
                self.troubles.failed(Cause::MetadataErrors, error.to_string());
                for (_, ticket) in std::mem::take(&mut self.tickets) {
                    self.replica.apply(Event::Durable(ticket, Err(())), now);
                }
            }
        }
    }

    /// Asks for the mark of a clean shutdown; it is durable when [`Member::metadata_idle`].
    pub(super) fn mark_clean(&mut self) {
        let mut superblock = self.writer.superblock().clone();
        superblock.clean_shutdown = true;
        if let Err(error) = self.writer.request_superblock(superblock) {
            tracing::error!(pool = %self.replica.spec().name, "no mark of a clean shutdown: {error}");
        }
    }

    /// Whether all metadata that was asked for is durable, or never will be.
    pub(super) fn metadata_idle(&self) -> bool {
        self.writer.is_idle() || self.metadata_failed()
    }

    /// Whether metadata could not be written, and never will be.
    pub(super) fn metadata_failed(&self) -> bool {
        self.writer.failure().is_some()
    }

    /// Why metadata could not be written, in words.
    pub(super) fn metadata_failure(&self) -> Option<String> {
        self.writer.failure().map(ToString::to_string).or_else(|| self.refused.clone())
    }

    /// Writes what operators want to know to the log.
    pub(super) fn log(&mut self, notice: Notice, client: Option<SocketAddr>) {
        let spec = self.replica.spec();
        let (pool, member, view) = (spec.name.clone(), self.replica.member(), self.replica.view().number);
        match notice {
            Notice::Attached(epoch, who) => {
                // By its own account: it has had the pool before it came back to this member.
                let held =
                    self.replica.status().holder.map_or(std::time::Duration::ZERO, |holder| holder.held);
                let since =
                    UnixMs::now().0.saturating_sub(u64::try_from(held.as_millis()).unwrap_or(u64::MAX));
                self.attached = client.map(|address| (UnixMs(since), address));
                self.logs.log("attached", |withheld| {
                    tracing::info!(%pool, %member, %view, %epoch, client = %who, withheld, "client attached");
                });
            }
            Notice::Refused(who, holder) => self.logs.log("refused", |withheld| {
                tracing::warn!(%pool, %member, %view, client = %who, holder = %holder, withheld, "client refused: the pool is held");
            }),
            Notice::ClientLost(epoch, who) => self.logs.log("lost", |withheld| {
                tracing::warn!(%pool, %member, %view, %epoch, client = %who, withheld, "client lost without a goodbye");
            }),
            Notice::Detached(epoch, who) => {
                self.attached = None;
                self.logs.log("detached", |withheld| {
                    tracing::info!(%pool, %member, %view, %epoch, client = %who, withheld, "client detached");
                });
            }
            Notice::View(new) => {
                self.note_view(&new);
                let out = new.out();
                self.logs.log("view", |withheld| {
                    if out.is_empty() {
                        tracing::info!(%pool, %member, withheld, "{new}");
                    } else {
                        tracing::warn!(%pool, %member, withheld, "{new}: members {out} are absent, what they miss is recorded");
                    }
                });
            }
            Notice::FlushFailed(purpose) => {
                tracing::error!(
                    %pool, %member, %view,
                    "a flush failed ({purpose}): what was written since the last one may be gone from this disk. The member leaves \
                     the pool and is brought up to date from the others; if it is the only current one, completed writes may be \
                     lost. Check the disk, and replace it if this is repeated"
                );
            }
            Notice::MetadataFailed => {
                tracing::error!(%pool, %member, %view, "metadata cannot be written: the store is closed and tried again later; if that repeats, replace its disk");
            }
            Notice::Regressed => {
                tracing::error!(
                    %pool, %member, %view,
                    "this store went back in time (restored from a copy or a snapshot?): it is copied over in full from a current member"
                );
            }
        }
    }

    /// A new view: since when each member is not current, and since when it is again. A view that leaves a member as it was, or
    /// moves it between Out and Syncing, does not make its absence any shorter.
    fn note_view(&mut self, new: &View) {
        for line in &new.members {
            let since = &mut self.state_since[line.id.index()];
            let is_clean = line.state == MemberState::Clean;
            if since.is_none_or(|(was_clean, _)| was_clean != is_clean) {
                *since = Some((is_clean, UnixMs::now()));
            }
        }
    }

    /// Since when another member is not current: as this node saw it, or as the client says, who may have seen more.
    fn absent_since(&self, member: MemberId, condition: Option<&PeerCondition>) -> Option<UnixMs> {
        let seen = self.state_since[member.index()].map(|(_, at)| at);
        let told = condition.and_then(|c| c.since_unix_ms);
        [seen, told].into_iter().flatten().min()
    }

    /// Measures the speed of the resync, once a second.
    pub(super) fn note_progress(&mut self, now: Time) {
        let status = self.replica.status();
        let is_syncing = status.view.state(status.member) == Some(MemberState::Syncing);
        let Some(resync) = status.resync.filter(|_| is_syncing) else {
            self.progress = None;
            return;
        };
        let (pulled, left) = (resync.blocks_pulled, resync.blocks_left);
        let progress = self.progress.get_or_insert(Progress {
            since: UnixMs::now(),
            at: now,
            pulled,
            left,
            bytes_per_s: 0,
        });
        let elapsed = now - progress.at;
        if elapsed >= std::time::Duration::from_millis(500) {
            // What became current, by pulls or by writes of the guest.
            let done = progress.left.saturating_sub(left).max(pulled.saturating_sub(progress.pulled));
            let bytes = u128::from(done) * u128::from(BLOCK_SIZE) * 1000;
            progress.bytes_per_s = u64::try_from(bytes / elapsed.as_millis().max(1)).unwrap_or(u64::MAX);
            (progress.at, progress.pulled, progress.left) = (now, pulled, left);
        }
    }

    fn resync_status(&self, status: &ReplicaStatus) -> Option<ResyncStatus> {
        if status.view.state(status.member) != Some(MemberState::Syncing) {
            return None;
        }
        let resync = status.resync.as_ref();
        let left = resync.map_or(0, |r| r.blocks_left);
        let rate = self.progress.as_ref().map_or(0, |p| p.bytes_per_s);
        let state = match resync {
            Some(r) if r.last_error.is_some() => ResyncState::Backoff,
            Some(r) if r.linked && r.yielding => ResyncState::Yielding,
            Some(r) if r.linked => ResyncState::Running,
            Some(_) | None => ResyncState::Waiting,
        };
        Some(ResyncStatus {
            state,
            reason: if status.attested.regressed.contains(status.member) {
                "its store went back in time and is copied over in full".to_owned()
            } else {
                "this member was absent and has missed writes".to_owned()
            },
            since_unix_ms: self.progress.as_ref().map_or_else(UnixMs::now, |p| p.since),
            source: resync.map(|r| r.source),
            blocks_left: left,
            bytes_per_s: rate,
            seconds_left: (rate > 0).then(|| (left * BLOCK_SIZE).div_ceil(rate.max(1))),
            last_error: resync.and_then(|r| r.last_error.clone()),
        })
    }

    /// What the admin API tells of the store.
    pub(super) fn status(&self, node: &str) -> PoolStatus {
        let status = self.replica.status();
        let superblock = self.writer.superblock();
        let client = superblock.client.as_ref().and_then(|record| {
            let connected = status.holder.as_ref().is_some_and(|h| h.connected);
            let state = if connected { ClientState::Attached } else { ClientState::Crashed };
            let (since, address) = match &self.attached {
                Some((since, address)) => (Some(*since), address.to_string()),
                None => (None, "unknown".to_owned()),
            };
            let client = ClientStatus {
                id: record.id,
                text: record.name.clone(),
                address,
                state,
                attached_unix_ms: since,
            };
            record.attached.then_some(client)
        });
        let peers = status.view.members.iter().filter(|m| m.id != status.member).map(|m| {
            let missed = status.missed.iter().find(|x| x.member == m.id);
            let is_stale = m.state != MemberState::Clean;
            let told = status.conditions.iter().find(|c| c.member == m.id && is_stale);
            let condition = told.map(|c| condition_status(c, status.told_at));
            PeerStatus {
                member: m.id,
                link: link_to(m.id, status.resync.as_ref()),
                state_since_unix_ms: self.absent_since(m.id, condition.as_ref()).filter(|_| is_stale),
                missed: missed
                    .map_or(Missed::default(), |x| Missed { chunks: x.chunks, blocks: Some(x.blocks) }),
                condition,
            }
        });
        let resync = self.resync_status(&status);
        let counters = status.counters;
        let failed = "its metadata cannot be written".to_owned();
        PoolStatus {
            spec: self.replica.spec().clone(),
            node: node.to_owned(),
            member: status.member,
            store: superblock.store,
            path: self.store.path().to_owned(),
            store_state: if status.broken {
                StoreState::Failed { reason: failed }
            } else {
                StoreState::Serving
            },
            peers: peers.collect(),
            view: status.view,
            client,
            io: IoCounters {
                reads: counters.reads,
                read_bytes: counters.read_bytes,
                writes: counters.writes,
                written_bytes: counters.written_bytes,
                zeroes: counters.zeroes,
                flushes: counters.flushes,
                compared_bytes: counters.digested_blocks * BLOCK_SIZE,
                errors: counters.errors,
                read_errors: counters.read_errors,
                digest_mismatches: counters.digest_mismatches,
                in_flight: status.in_flight as u64,
                resync_sent_bytes: self.resync_sent,
                resync_received_bytes: self.resync_received,
                resync_written_blocks: counters.pulled_in_blocks,
                metadata_pages: self.metadata_pages,
            },
            authentication: Authentication::None,
            latency: None,
            resync,
            key_fingerprints: Vec::new(),
            max_size_bytes: Some(superblock.layout.largest_pool(superblock.spec.chunk_size)),
            history: HistoryStatus { position: status.position, attested: status.attested },
            disk: self.troubles.worst(),
        }
    }
}

/// What the client said of another member at `told`, with times of this node's clock.
fn condition_status(condition: &Condition, told: Time) -> PeerCondition {
    let elapsed = u64::try_from((monotonic_now() - told).as_millis()).unwrap_or(u64::MAX);
    let then = UnixMs::now().0.saturating_sub(elapsed);
    let is_counted = condition.failures > 0 || condition.age_ms > 0;
    PeerCondition {
        cause: condition.cause,
        text: condition.text.clone(),
        failures: condition.failures,
        since_unix_ms: is_counted.then(|| UnixMs(then.saturating_sub(condition.age_ms))),
        retry_unix_ms: condition.retry_in_ms.map(|ms| UnixMs(then.saturating_add(ms))),
    }
}

/// The link to another member: there is one to the source of a resync.
fn link_to(member: MemberId, resync: Option<&ReplicaResync>) -> LinkState {
    match resync.filter(|resync| resync.source == member) {
        None => LinkState::Idle,
        Some(resync) if resync.linked => LinkState::Up,
        Some(resync) => {
            let reason = resync.last_error.clone().unwrap_or_else(|| "connecting".to_owned());
            LinkState::Down { reason }
        }
    }
}

/// Bytes of buffers that one client may have at a time, of the memory of its shard. What a client does not send, or does
/// not take, is missed by nobody else.
pub(super) fn buffer_share(shared: &Shared) -> usize {
    usize::try_from(shared.config.buffer_memory / 2).unwrap_or(usize::MAX)
}

const fn map_id(kind: MapKind) -> MapId {
    match kind {
        MapKind::Intent => MapId::Intent,
        MapKind::Dirty(member) => MapId::Dirty(member),
    }
}

const fn map_kind(id: MapId) -> MapKind {
    match id {
        MapId::Intent => MapKind::Intent,
        MapId::Dirty(member) => MapKind::Dirty(member),
    }
}

/// Marks an [`crate::disk::Io`] with the member and the request that it belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum IoTag {
    /// A disk request of the replica that leaves data in its buffer.
    Read(u16, IoId),
    /// A disk request of the replica whose data is only looked at.
    Digest(u16, IoId),
    /// Any other disk request of the replica.
    Replica(u16, IoId),
    /// An I/O of the metadata writer; its id, of which the low 47 bits are enough to tell those under way apart.
    Metadata(u16, u64),
}

impl IoTag {
    const METADATA: u64 = 1 << 47;
    const READ: u64 = 1 << 46;
    const DIGEST: u64 = 1 << 45;

    pub(super) const fn encode(self) -> u64 {
        match self {
            Self::Read(member, io) => (member as u64) << 48 | Self::READ | io.0 as u64,
            Self::Digest(member, io) => (member as u64) << 48 | Self::DIGEST | io.0 as u64,
            Self::Replica(member, io) => (member as u64) << 48 | io.0 as u64,
            Self::Metadata(member, id) => {
                (member as u64) << 48 | Self::METADATA | (id & (Self::METADATA - 1))
            }
        }
    }

    pub(super) fn decode(tag: u64) -> Self {
        let member = u16::try_from(tag >> 48).unwrap_or(u16::MAX);
        if tag & Self::METADATA != 0 {
            return Self::Metadata(member, tag & (Self::METADATA - 1));
        }
        let io = IoId(u32::try_from(tag & u64::from(u32::MAX)).unwrap_or(u32::MAX));
        match (tag & Self::READ != 0, tag & Self::DIGEST != 0) {
            (true, _) => Self::Read(member, io),
            (false, true) => Self::Digest(member, io),
            (false, false) => Self::Replica(member, io),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;
    use std::path::Path;
    use std::sync::Mutex;

    use rmr_common::pool::{BootId, ClientId, Epoch, Mark, MemberSet};
    use rmr_common::replica::{ConnectionId, Output};
    use rmr_common::transport::rdma::Fabric;
    use rmr_common::wire::{Attach, Kind, MessageHeader, Role};

    use super::super::Connections;
    use super::super::keys::Keys;
    use super::*;
    use crate::config::{Config, Settings};

    #[test]
    fn the_link_to_a_source_is_told_and_none_is_needed_to_others() {
        let member = |n| MemberId::new(n).unwrap();
        let mut resync = ReplicaResync {
            source: member(1),
            linked: true,
            blocks_left: 0,
            blocks_pulled: 0,
            yielding: false,
            last_error: None,
        };
        assert_eq!(link_to(member(1), Some(&resync)), LinkState::Up);
        assert_eq!(link_to(member(2), Some(&resync)), LinkState::Idle);
        assert_eq!(link_to(member(1), None), LinkState::Idle);
        resync.linked = false;
        assert_eq!(link_to(member(1), Some(&resync)), LinkState::Down { reason: "connecting".into() });
        resync.last_error = Some("refused".into());
        assert_eq!(link_to(member(1), Some(&resync)), LinkState::Down { reason: "refused".into() });
    }

    fn shared() -> Arc<Shared> {
        let config = Settings::parse("").unwrap().with_defaults().unwrap();
        let config = Config::new(&config).unwrap();
        Arc::new(Shared {
            host_boot: BootId::random(),
            process_boot: BootId::random(),
            started: UnixMs::now(),
            advertised: Mutex::default(),
            pools: Mutex::default(),
            retries: Mutex::default(),
            remembered: Mutex::default(),
            max_stores: 16,
            connections: Connections::default(),
            buffer_used: Vec::new(),
            buffer_lent: Vec::new(),
            inline: Vec::new(),
            counters: Mutex::default(),
            fabric: Fabric::for_nodes(),
            client_tls: None,
            keys: Keys::new(config.keys.clone()),
            config,
        })
    }

    fn open(path: &Path) -> Member {
        Member::new(Store::open(path, None).unwrap(), DiskId(0), &shared())
    }

    /// Lets a client attach, and returns what the replica wants to be durable before it answers.
    fn attach(member: &mut Member) -> (Ticket, Metadata) {
        let attach = Attach {
            client: ClientId::random(),
            takeover: false,
            rejoin: false,
            yields: false,
            description: "a client".into(),
            held_ms: 0,
        };
        let epoch = Epoch(member.writer.superblock().epoch.0 + 1);
        let header = &MessageHeader { epoch, ..MessageHeader::new(Kind::Attach, member.pool()) };
        let (connection, body) = (ConnectionId(1), &attach.encode()[..]);
        member
            .replica
            .apply(Event::Message { connection, role: Role::Client, header, body, buffer: None }, Time(1));
        let outputs = std::iter::from_fn(|| member.replica.take_output());
        let wanted = outputs.filter_map(|output| match output {
            Output::Persist(ticket, metadata) => Some((ticket, metadata)),
            _ => None,
        });
        wanted.last().expect("the epoch must be durable")
    }

    #[test]
    fn what_is_asked_of_a_writer_that_has_failed_is_answered_at_once() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        crate::store::tests::make(&path);
        let mut member = open(&path);
        member.mark_clean();
        let Some(MetadataIo::Write { id, .. }) = member.next_metadata_io() else { panic!("a superblock") };
        member.metadata_done(id, Err("I/O error".into()), Time(0));
        assert!(member.metadata_failed() && member.metadata_idle());
        // The replica asked before it heard of the failure. It would wait for ever, and so would a stop and a deletion.
        let (ticket, metadata) = attach(&mut member);
        assert!(member.replica.is_busy());
        member.persist(ticket, &metadata, Time(2));
        assert!(!member.replica.is_busy());
        assert!(member.replica.status().broken);
    }

    #[test]
    fn all_of_a_state_is_in_the_store_when_it_is_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store");
        let spec = crate::store::tests::make(&path);
        let mut member = open(&path);
        let (ticket, metadata) = attach(&mut member);
        let Metadata::State(mut state) = metadata else { panic!("an epoch is of the state") };
        state.mark = Mark(77);
        state.attested.regressed = MemberSet::only(spec.members[0].id);
        let wanted = state.clone();
        member.persist(ticket, &Metadata::State(state), Time(2));
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        while let Some(io) = member.next_metadata_io() {
            let id = match io {
                MetadataIo::Write { id, offset, page } => {
                    file.write_all_at(page.bytes(), offset).unwrap();
                    id
                }
                MetadataIo::Flush { id } => id,
            };
            assert!(member.replica.is_busy() || member.writer.durable() > crate::store::Ticket(0));
            member.metadata_done(id, Ok(()), Time(3));
        }
        drop(member);
        let store = Store::open(&path, None).unwrap();
        let found = store.superblock();
        assert_eq!((&found.view, &found.spec, found.epoch), (&wanted.view, &wanted.spec, wanted.epoch));
        assert_eq!((found.mark, found.attested), (wanted.mark, wanted.attested));
        let client = found.client.as_ref().map(|c| (c.id, c.name.clone(), c.attached));
        assert_eq!(client, wanted.last_client.map(|c| (c.client, c.description, c.attached)));
    }

    #[test]
    fn tags_survive_the_engine() {
        for tag in [
            IoTag::Replica(0, IoId(0)),
            IoTag::Replica(u16::MAX, IoId(u32::MAX)),
            IoTag::Read(7, IoId(9)),
            IoTag::Digest(8, IoId(10)),
            IoTag::Metadata(3, 77),
            IoTag::Metadata(u16::MAX, IoTag::METADATA - 1),
        ] {
            assert_eq!(IoTag::decode(tag.encode()), tag);
        }
    }
}
