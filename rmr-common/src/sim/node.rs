//! A storage node: the replica's state machine, its disk, and what of its metadata is durable.

use std::collections::BTreeMap;

use super::disk::Disk;
use crate::map::{ChunkMap, MAP_PAGE_BYTES, MapId, MapPage, MemberMaps};
use crate::pool::{Address, BootId, Chunk, Epoch, MemberId, StoreId};
use crate::replica::{Config, ConnectionId, DurableState, Replica, ResyncLimits, Ticket};
use crate::wire::{Limits, MessageHeader};

pub(super) type PageBytes = Box<[u8; MAP_PAGE_BYTES]>;

/// Something of the metadata that is written as a whole.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub(super) enum Target {
    Page(MapPage),
    State,
}

/// What is written to a target.
pub(super) enum Content {
    Page(PageBytes),
    State(Box<DurableState>),
}

/// The writes to one target: one at a time, and the next covers all that was asked for meanwhile.
#[derive(Default)]
pub(super) struct MetadataQueue {
    pub(super) writing: Option<(Vec<Ticket>, Content)>,
    pub(super) waiting: Vec<Ticket>,
    /// The newest superblock that waits.
    pub(super) state: Option<Box<DurableState>>,
}

/// One node of the pool.
pub(super) struct Node {
    pub(super) member: MemberId,
    pub(super) store: StoreId,
    pub(super) address: Address,
    /// The history of the pool of which it has a view: see `sim/force.rs`.
    pub(super) branch: usize,
    /// Its disk is lost: it never comes back.
    pub(super) is_gone: bool,
    /// Bytes of a pool that the store has room for: what lies beyond was never made to read as zeroes.
    pub(super) room: u64,
    /// Grows with every start, so that events of an earlier life are told apart.
    pub(super) life: u32,
    /// `None` while the process is down.
    pub(super) replica: Option<Replica>,
    pub(super) disk: Disk,
    pub(super) durable: DurableState,
    pub(super) pages: BTreeMap<MapPage, PageBytes>,
    pub(super) metadata: BTreeMap<Target, MetadataQueue>,
    /// Buffers that hold the data of writes, with the header each came with.
    pub(super) buffers: BTreeMap<u32, (Vec<u64>, MessageHeader)>,
    pub(super) next_buffer: u32,
    /// What reads found, until it is sent.
    pub(super) reads: BTreeMap<u32, Vec<u64>>,
    /// The data of answers to pulls, until it is with the disk.
    pub(super) pulled: BTreeMap<u64, Vec<u64>>,
    /// The last epoch whose attach was answered well.
    pub(super) answered: Epoch,
    /// The connection of that attach, in this life of the node.
    pub(super) holder: Option<ConnectionId>,
    /// The open link to a source, and which attempt to make one is the last.
    pub(super) peer: Option<usize>,
    pub(super) peer_attempt: u64,
    pub(super) wake_at: u64,
    /// A view was received and not answered.
    pub(super) has_pending_view: bool,
    /// The power was cut, and the machine was not started since.
    pub(super) lost_power: bool,
    pub(super) host_boot: u8,
    /// Per cent of the disk requests that fail.
    pub(super) disk_errors: u64,
    /// Per cent of the flushes that fail, beyond those.
    pub(super) flush_errors: u64,
    /// The next metadata write fails.
    pub(super) metadata_fails: bool,
}

impl Node {
    pub(super) fn new(
        member: MemberId,
        store: StoreId,
        address: Address,
        durable: DurableState,
        write_back: bool,
        capacity: usize,
    ) -> Self {
        let sectors = usize::try_from(durable.spec.size / super::oracle::SECTOR).unwrap_or(0);
        Self {
            member,
            store,
            address,
            branch: 0,
            is_gone: false,
            room: durable.spec.size,
            life: 0,
            replica: None,
            disk: Disk::new(sectors, capacity, write_back),
            durable,
            pages: BTreeMap::new(),
            metadata: BTreeMap::new(),
            buffers: BTreeMap::new(),
            next_buffer: 0,
            reads: BTreeMap::new(),
            pulled: BTreeMap::new(),
            answered: Epoch(0),
            holder: None,
            peer: None,
            peer_attempt: 0,
            wake_at: u64::MAX,
            has_pending_view: false,
            lost_power: false,
            host_boot: 1,
            disk_errors: 0,
            flush_errors: 0,
            metadata_fails: false,
        }
    }

    /// Starts the process from what is durable.
    pub(super) fn start(&mut self, limits: Limits, intent_idle: std::time::Duration, resync: ResyncLimits) {
        self.life += 1;
        self.peer = None;
        self.holder = None;
        self.wake_at = u64::MAX;
        self.has_pending_view = false;
        if self.lost_power {
            self.host_boot += 1;
            self.lost_power = false;
        }
        let spec = &self.durable.spec;
        let mut maps = MemberMaps::new(spec);
        for id in std::iter::once(MapId::Intent).chain(MemberId::all().map(MapId::Dirty)) {
            let mut map = ChunkMap::new(spec.chunk_count());
            for (page, bytes) in self.pages.iter().filter(|(page, _)| page.map == id) {
                map.load_page(page.page, bytes);
            }
            maps.load(id, map);
        }
        let member = self.member.as_u8();
        let life = self.life.to_le_bytes();
        let config = Config {
            resync,
            limits,
            intent_idle,
            host_boot: BootId::from_bytes([
                member,
                self.host_boot,
                self.store.as_bytes()[0],
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
                1,
            ]),
            process_boot: BootId::from_bytes([
                member,
                life[0],
                life[1],
                self.store.as_bytes()[0],
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
                2,
            ]),
            write_through: !self.disk.write_back,
        };
        let state = self.durable.clone();
        self.replica = Some(Replica::new(config, self.member, state, maps));
    }

    /// What a read of the pool finds in a sector. Beyond what the store has room for, there is nothing yet.
    pub(super) fn value(&self, sector: usize) -> u64 {
        if sector as u64 * super::oracle::SECTOR >= self.room { 0 } else { self.disk.sectors[sector] }
    }

    /// Whether the bit of a chunk is durable.
    pub(super) fn has_bit(&self, map: MapId, chunk: Chunk) -> bool {
        let page = MapPage { map, page: ChunkMap::page_of(chunk) };
        self.pages.get(&page).is_some_and(|bytes| bit(bytes, chunk))
    }
}

/// The bit of a chunk in its page.
pub(super) fn bit(page: &[u8; MAP_PAGE_BYTES], chunk: Chunk) -> bool {
    let bit = usize::try_from(chunk.0 % crate::map::MAP_PAGE_BITS).unwrap_or(0);
    page[bit / 8] & (1 << (bit % 8)) != 0
}
