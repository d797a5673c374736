//! Decides which metadata pages are written when, so that a crash at any moment leaves each page as it was or as it was
//! asked to be. It does no I/O: the shard's loop carries its writes and flushes to the disk, the simulator to its own.
//!
//! Requests are answered in rounds (group commit). A round takes everything that was asked for before it began:
//!
//! ```text
//!   Idle ──▶ map pages ──▶ flush ──▶ superblock ──▶ flush ──▶ all requests of the round are durable
//! ```
//!
//! A part with nothing to write is skipped, and so are the flushes of a write-through store. The superblock comes last so
//! that a view never becomes durable before the dirty bits that were asked for ahead of it.

use rmr_common::pool::StoreId;
use thiserror::Error;

use super::layout::{Layout, MapKind, SUPERBLOCK_OFFSETS};
use super::page::{PageBits, encode_page, slot_of};
use super::superblock::{InvalidSuperblock, Superblock};
use crate::disk::AlignedPage;

/// Number of a request; a request is durable when [`MetadataWriter::durable`] has reached its number.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default, Hash)]
pub struct Ticket(pub u64);

/// Something that the disk has to do for the writer; its `id` comes back in [`MetadataWriter::completed`].
#[derive(Debug)]
pub enum MetadataIo {
    /// Write one page.
    Write {
        /// Names the write in its completion.
        id: u64,
        /// Where, in bytes of the device.
        offset: u64,
        /// What: 4096 bytes at an address aligned for direct I/O.
        page: Box<AlignedPage>,
    },
    /// Make all completed writes durable.
    Flush {
        /// Names the flush in its completion.
        id: u64,
    },
}

/// The writer's disk failed: nothing that was not durable before will ever be, and the store is to be taken out of use.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error("writing the store's metadata failed: {0}")]
pub struct WriterFailed(pub String);

/// A number of a map page among all map pages of the store.
type PageNumber = usize;

#[derive(Debug)]
struct MapPage {
    /// Sequence number of the newest version that was written.
    sequence: u64,
    /// What the next round writes.
    pending: Option<Box<PageBits>>,
}

#[derive(Debug)]
enum Phase {
    Idle,
    MapWrites { left: usize },
    MapFlush,
    SuperblockWrite,
    SuperblockFlush,
    Failed(WriterFailed),
}

#[derive(Debug, PartialEq, Eq, Clone, Copy)]
enum Mirror {
    /// Both superblock copies say the same, or a newer one is asked for.
    Done,
    /// The newest superblock stands in one copy only.
    Due,
}

/// See the module's comment.
#[derive(Debug)]
pub struct MetadataWriter {
    layout: Layout,
    store: StoreId,
    write_through: bool,
    maps: Vec<MapPage>,
    pending_maps: Vec<PageNumber>,
    generation: u64,
    superblock: Superblock,
    superblock_pending: bool,
    mirror: Mirror,
    phase: Phase,
    /// The superblock of the round that is under way.
    round_superblock: Option<Box<AlignedPage>>,
    round_is_mirror: bool,
    round: Ticket,
    last: Ticket,
    durable: Ticket,
    /// What [`MetadataWriter::next_io`] has yet to give out.
    outbox: std::collections::VecDeque<MetadataIo>,
    next_id: u64,
    first_id_of_phase: u64,
}

impl MetadataWriter {
    /// A writer that goes on from what a store holds: its superblock with its generation, and the newest sequence number
    /// of each map page, in the order of [`MapKind::all`] and page index. All of that must be durable already.
    #[must_use]
    pub fn new(superblock: Superblock, generation: u64, sequences: &[u64]) -> Self {
        let page = |&sequence| MapPage { sequence, pending: None };
        Self {
            layout: superblock.layout,
            store: superblock.store,
            write_through: superblock.write_through,
            maps: sequences.iter().map(page).collect(),
            pending_maps: Vec::new(),
            generation,
            superblock,
            superblock_pending: false,
            mirror: Mirror::Done,
            phase: Phase::Idle,
            round_superblock: None,
            round_is_mirror: false,
            round: Ticket(0),
            last: Ticket(0),
            durable: Ticket(0),
            outbox: std::collections::VecDeque::new(),
            next_id: 0,
            first_id_of_phase: 0,
        }
    }

    /// Asks for a page of a map to become `bits`. A later request for the same page, made before its write began, takes
    /// the place of an earlier one; both are durable when the later one is.
    ///
    /// # Panics
    /// When the store's maps have no page `index`: the caller computes it from a chunk of the pool.
    pub fn request_map(&mut self, kind: MapKind, index: u32, bits: &PageBits) -> Ticket {
        assert!(index < self.layout.pages_per_map, "page {index} of {} in a map", self.layout.pages_per_map);
        let number = kind.position() * self.layout.pages_per_map as usize + index as usize;
        let pending = &mut self.maps[number].pending;
        match pending {
            Some(page) => page.copy_from_slice(bits),
            None => {
                *pending = Some(Box::new(*bits));
                self.pending_maps.push(number);
            }
        }
        self.ticket()
    }

    /// Asks for the superblock to become `superblock`.
    ///
    /// # Errors
    /// When it is invalid, or another store's: identity and layout of a store never change.
    pub fn request_superblock(&mut self, superblock: Superblock) -> Result<Ticket, InvalidSuperblock> {
        superblock.validate()?;
        if superblock.store != self.store || superblock.layout != self.layout {
            let (pool, member, store) = (superblock.spec.name, superblock.member, self.store);
            return Err(InvalidSuperblock::NotAMember { pool, member, store });
        }
        self.superblock = superblock;
        self.superblock_pending = true;
        self.mirror = Mirror::Done;
        Ok(self.ticket())
    }

    /// The superblock as last asked for, durable or not yet.
    #[must_use]
    pub const fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Every request up to this one is durable.
    #[must_use]
    pub const fn durable(&self) -> Ticket {
        self.durable
    }

    /// Whether nothing is asked for that is not durable, and no I/O is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        matches!(self.phase, Phase::Idle)
            && self.pending_maps.is_empty()
            && !self.superblock_pending
            && self.mirror == Mirror::Done
    }

    /// Why the writer stopped for good, if it did.
    #[must_use]
    pub const fn failure(&self) -> Option<&WriterFailed> {
        match &self.phase {
            Phase::Failed(why) => Some(why),
            _ => None,
        }
    }

    /// The next thing for the disk to do; ask again until `None`, after requests and after completions.
    pub fn next_io(&mut self) -> Option<MetadataIo> {
        if matches!(self.phase, Phase::Idle) {
            self.begin_round();
        }
        self.outbox.pop_front()
    }

    /// Takes the completion of an I/O that [`MetadataWriter::next_io`] gave out; `Ok(true)` when
    /// [`MetadataWriter::durable`] moved on.
    ///
    /// # Errors
    /// When this or an earlier I/O failed. After a failed write or flush nobody knows what the disk holds, and a second
    /// flush may succeed without having written anything; so the writer stops for good.
    pub fn completed(&mut self, id: u64, result: Result<(), String>) -> Result<bool, WriterFailed> {
        if let Phase::Failed(why) = &self.phase {
            return Err(why.clone());
        }
        if let Err(why) = result {
            return Err(self.fail(why));
        }
        if !(self.first_id_of_phase..self.next_id).contains(&id) {
            return Err(self.fail(format!("completion {id} belongs to no I/O that is under way")));
        }
        let before = self.durable;
        match &mut self.phase {
            Phase::MapWrites { left } if *left > 1 => *left -= 1,
            Phase::MapWrites { .. } if !self.write_through => self.flush(Phase::MapFlush),
            Phase::MapWrites { .. } | Phase::MapFlush => self.write_superblock(),
            Phase::SuperblockWrite if !self.write_through => self.flush(Phase::SuperblockFlush),
            Phase::SuperblockWrite | Phase::SuperblockFlush => self.superblock_is_durable(),
            Phase::Idle | Phase::Failed(_) => {
                return Err(self.fail(format!("completion {id} while no I/O is under way")));
            }
        }
        Ok(self.durable > before)
    }

    fn ticket(&mut self) -> Ticket {
        self.last.0 += 1;
        self.last
    }

    fn begin_round(&mut self) {
        self.round = self.last;
        self.round_is_mirror = !self.superblock_pending && self.mirror == Mirror::Due;
        if self.superblock_pending || self.round_is_mirror {
            let page = self.superblock.encode(self.generation + 1);
            self.round_superblock = Some(page.expect("validated when it was asked for"));
            (self.superblock_pending, self.mirror) = (false, Mirror::Done);
        }
        if self.pending_maps.is_empty() {
            return self.write_superblock();
        }
        self.first_id_of_phase = self.next_id;
        self.phase = Phase::MapWrites { left: self.pending_maps.len() };
        for number in std::mem::take(&mut self.pending_maps) {
            self.write_map_page(number);
        }
    }

    fn write_map_page(&mut self, number: PageNumber) {
        let per_map = self.layout.pages_per_map as usize;
        let kind = MapKind::all().nth(number / per_map).expect("a number below the number of pages");
        let index = u32::try_from(number % per_map).expect("below the pages per map, a u32");
        let page = &mut self.maps[number];
        let bits = page.pending.take().expect("listed as pending");
        page.sequence += 1;
        let bytes = encode_page(self.store, kind, index, page.sequence, &bits);
        let offset = self.layout.page_offset(kind, index, slot_of(page.sequence));
        self.write(offset, bytes);
    }

    /// Goes on with the superblock of the round, or ends the round when it has none.
    fn write_superblock(&mut self) {
        let Some(page) = self.round_superblock.take() else { return self.end_round() };
        self.generation += 1;
        self.phase = Phase::SuperblockWrite;
        self.first_id_of_phase = self.next_id;
        self.write(SUPERBLOCK_OFFSETS[slot_of(self.generation)], page);
    }

    fn superblock_is_durable(&mut self) {
        // Write it to the other copy as well, when there is time: a superblock that later rots then costs nothing, where
        // falling back to an older view or epoch would cost correctness.
        if !self.round_is_mirror && !self.superblock_pending {
            self.mirror = Mirror::Due;
        }
        self.end_round();
    }

    fn end_round(&mut self) {
        self.durable = self.round;
        self.phase = Phase::Idle;
    }

    fn write(&mut self, offset: u64, page: Box<AlignedPage>) {
        let id = self.take_id();
        self.outbox.push_back(MetadataIo::Write { id, offset, page });
    }

    fn flush(&mut self, phase: Phase) {
        self.phase = phase;
        self.first_id_of_phase = self.next_id;
        let id = self.take_id();
        self.outbox.push_back(MetadataIo::Flush { id });
    }

    fn take_id(&mut self) -> u64 {
        self.next_id += 1;
        self.next_id - 1
    }

    fn fail(&mut self, why: String) -> WriterFailed {
        let failed = WriterFailed(why);
        self.phase = Phase::Failed(failed.clone());
        self.outbox.clear();
        failed
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, HashMap};
    use std::io;
    use std::path::Path;

    use proptest::prelude::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use rmr_common::pool::{Epoch, MemberId, ViewNumber};

    use super::super::layout::{PAGE_BITS_BYTES, PAGE_BYTES};
    use super::super::open::{PageSource, Recovered};
    use super::super::superblock::tests::sample;
    use super::*;

    type Bytes = Box<[u8; 4096]>;

    /// A disk that keeps unflushed writes apart, and on a power cut keeps, drops or tears each of them.
    struct SimDisk {
        size: u64,
        durable: BTreeMap<u64, Bytes>,
        cached: Vec<(u64, Bytes)>,
    }

    impl SimDisk {
        fn format(superblock: &Superblock) -> Self {
            // Room for a pool that grows.
            let size = superblock.layout.store_size(1 << 30);
            let mut disk = Self { size, durable: BTreeMap::new(), cached: Vec::new() };
            let empty = [0; PAGE_BITS_BYTES];
            for number in [1, 2] {
                let page = superblock.encode(number).unwrap();
                disk.durable.insert(SUPERBLOCK_OFFSETS[slot_of(number)], Box::new(*page.bytes()));
                for kind in MapKind::all() {
                    for index in 0..superblock.layout.pages_per_map {
                        let page = encode_page(superblock.store, kind, index, number, &empty);
                        let offset = superblock.layout.page_offset(kind, index, slot_of(number));
                        disk.durable.insert(offset, Box::new(*page.bytes()));
                    }
                }
            }
            disk
        }

        fn flush(&mut self) {
            self.durable.extend(self.cached.drain(..));
        }

        fn cut_power(&mut self, rng: &mut StdRng) {
            for (offset, new) in std::mem::take(&mut self.cached) {
                match rng.random_range(0..3) {
                    0 => {}
                    1 => drop(self.durable.insert(offset, new)),
                    // Sectors of 512 bytes are written whole, in any order.
                    _ => {
                        let page = self.durable.get_mut(&offset).unwrap();
                        for sector in 0..8 {
                            if rng.random() {
                                let range = sector * 512..(sector + 1) * 512;
                                page[range.clone()].copy_from_slice(&new[range]);
                            }
                        }
                    }
                }
            }
        }
    }

    impl PageSource for SimDisk {
        fn size(&self) -> u64 {
            self.size
        }

        fn read_page(&self, offset: u64) -> io::Result<Box<[u8; PAGE_BYTES]>> {
            self.durable.get(&offset).cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::EIO))
        }
    }

    fn kinds() -> [MapKind; 3] {
        [
            MapKind::Intent,
            MapKind::Dirty(MemberId::new(0).unwrap()),
            MapKind::Dirty(MemberId::new(7).unwrap()),
        ]
    }

    /// All versions that were asked for of one page or of the superblock, with their tickets; version 0 is as formatted.
    #[derive(Default)]
    struct History(Vec<(Ticket, u64)>);

    impl History {
        /// The versions that may be found after a crash: the newest durable one and all that were asked for later.
        fn allows(&self, version: u64, durable: Ticket) -> bool {
            let newest_durable =
                self.0.iter().filter(|(t, _)| *t <= durable).map(|(_, v)| *v).max().unwrap_or(0);
            version >= newest_durable && (version == 0 || self.0.iter().any(|(_, v)| *v == version))
        }
    }

    fn bits(version: u64) -> PageBits {
        let mut bits = [0; PAGE_BITS_BYTES];
        bits.chunks_exact_mut(8).for_each(|chunk| chunk.copy_from_slice(&version.to_le_bytes()));
        bits
    }

    fn version_of(bits: &PageBits) -> u64 {
        let version = u64::from_le_bytes(bits[..8].try_into().unwrap());
        assert!(*bits == self::bits(version), "a page mixed of two versions was believed");
        version
    }

    /// The pool grows with every version of the superblock.
    fn size_of(version: u64) -> u64 {
        (64 << 20) + version * 4096
    }

    /// Several lives of a store between power cuts, with requests, completions and flushes in random order.
    fn survive(seed: u64, write_through: bool) {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut first = sample(64 << 20);
        (first.write_through, first.epoch, first.view.epoch) = (write_through, Epoch(0), Epoch(0));
        first.view.number = ViewNumber(0);
        let mut disk = SimDisk::format(&first);
        let mut version = 0;
        let mut histories: HashMap<Option<MapKind>, History> = HashMap::new();
        for _life in 0..6 {
            let recovered = Recovered::read(Path::new("sim"), &disk).unwrap();
            let mut writer = recovered.writer();
            histories.clear();
            let mut base: HashMap<Option<MapKind>, u64> = HashMap::new();
            base.insert(None, recovered.superblock.epoch.0);
            for kind in kinds() {
                base.insert(Some(kind), version_of(&recovered.maps.pages(kind)[0].bits));
            }
            let mut under_way: Vec<MetadataIo> = Vec::new();
            for _step in 0..rng.random_range(0..60) {
                match rng.random_range(0..5) {
                    0 => {
                        version += 1;
                        let kind = kinds()[rng.random_range(0..3)];
                        let ticket = writer.request_map(kind, 0, &bits(version));
                        histories.entry(Some(kind)).or_default().0.push((ticket, version));
                    }
                    1 => {
                        version += 1;
                        let mut superblock = writer.superblock().clone();
                        superblock.epoch = Epoch(version);
                        superblock.spec.size = size_of(version);
                        superblock.view.number = ViewNumber(version);
                        let ticket = writer.request_superblock(superblock).unwrap();
                        histories.entry(None).or_default().0.push((ticket, version));
                    }
                    _ if !under_way.is_empty() => {
                        let io = under_way.swap_remove(rng.random_range(0..under_way.len()));
                        let id = match io {
                            MetadataIo::Write { id, offset, page } => {
                                disk.cached.push((offset, Box::new(*page.bytes())));
                                // A write-through disk has no cache.
                                if write_through {
                                    disk.flush();
                                }
                                id
                            }
                            MetadataIo::Flush { id } => {
                                assert!(!write_through);
                                disk.flush();
                                id
                            }
                        };
                        writer.completed(id, Ok(())).unwrap();
                    }
                    _ => {}
                }
                under_way.extend(std::iter::from_fn(|| writer.next_io()));
            }
            // Writes that the disk got and did not report may have any fate as well.
            for io in under_way {
                if let MetadataIo::Write { offset, page, .. } = io {
                    disk.cached.push((offset, Box::new(*page.bytes())));
                }
            }
            disk.cut_power(&mut rng);
            let after = Recovered::read(Path::new("sim"), &disk).unwrap();
            let Superblock { spec, view, epoch, .. } = &after.superblock;
            assert_eq!((spec.size, view.number.0), (size_of(epoch.0), epoch.0), "spec and view come apart");
            for key in [None, Some(kinds()[0]), Some(kinds()[1]), Some(kinds()[2])] {
                let found = match key {
                    None => after.superblock.epoch.0,
                    Some(kind) => version_of(&after.maps.pages(kind)[0].bits),
                };
                let history = histories.entry(key).or_default();
                history.0.push((Ticket(0), base[&key]));
                assert!(
                    history.allows(found, writer.durable()),
                    "seed {seed}: {key:?} came back as version {found}"
                );
            }
        }
    }

    #[test]
    fn after_any_crash_a_page_is_the_last_durable_one_or_a_newer_requested_one() {
        for seed in 0..3000 {
            survive(seed, seed % 4 == 0);
        }
    }

    fn writer(write_through: bool) -> MetadataWriter {
        let mut superblock = sample(64 << 20);
        superblock.write_through = write_through;
        let pages = superblock.layout.pages_per_map as usize * MapKind::all().count();
        MetadataWriter::new(superblock, 2, &vec![2; pages])
    }

    fn id_of(io: &MetadataIo) -> u64 {
        match io {
            MetadataIo::Write { id, .. } | MetadataIo::Flush { id } => *id,
        }
    }

    #[test]
    fn requests_made_while_a_round_is_under_way_share_the_next_one() {
        let mut writer = writer(false);
        let first = writer.request_map(MapKind::Intent, 0, &bits(1));
        let write = writer.next_io().unwrap();
        for version in 2..100 {
            writer.request_map(MapKind::Intent, 0, &bits(version));
        }
        let last = writer.request_map(kinds()[1], 0, &bits(7));
        assert!(writer.next_io().is_none());
        assert_eq!(writer.completed(id_of(&write), Ok(())), Ok(false));
        let flush = writer.next_io().unwrap();
        assert!(matches!(flush, MetadataIo::Flush { .. }));
        assert_eq!(writer.completed(id_of(&flush), Ok(())), Ok(true));
        assert_eq!(writer.durable(), first);
        let writes: Vec<MetadataIo> = std::iter::from_fn(|| writer.next_io()).collect();
        assert_eq!(writes.len(), 2, "99 requests are 2 page writes");
        for write in &writes {
            assert_eq!(writer.completed(id_of(write), Ok(())), Ok(false));
        }
        let flush = writer.next_io().unwrap();
        assert_eq!(writer.completed(id_of(&flush), Ok(())), Ok(true));
        assert_eq!((writer.durable(), writer.is_idle()), (last, true));
    }

    #[test]
    fn a_superblock_is_written_only_after_the_maps_asked_for_before_it_are_durable_and_then_to_both_copies() {
        for write_through in [false, true] {
            let mut writer = writer(write_through);
            writer.request_map(MapKind::Intent, 0, &bits(1));
            writer.request_superblock(writer.superblock().clone()).unwrap();
            let mut seen = String::new();
            while let Some(io) = writer.next_io() {
                seen.push(match &io {
                    MetadataIo::Flush { .. } => 'f',
                    MetadataIo::Write { offset, .. } if SUPERBLOCK_OFFSETS.contains(offset) => 's',
                    MetadataIo::Write { .. } => 'm',
                });
                writer.completed(id_of(&io), Ok(())).unwrap();
            }
            assert_eq!(seen, if write_through { "mss" } else { "mfsfsf" });
            assert!(writer.is_idle());
        }
    }

    #[test]
    fn after_a_failed_write_or_flush_nothing_becomes_durable_any_more() {
        for fail_at in 0..2 {
            let mut writer = writer(false);
            let ticket = writer.request_map(MapKind::Intent, 0, &bits(1));
            for step in 0..=fail_at {
                let io = writer.next_io().unwrap();
                let result = if step == fail_at { Err("I/O error".to_owned()) } else { Ok(()) };
                assert_eq!(writer.completed(id_of(&io), result).is_err(), step == fail_at);
            }
            writer.request_map(MapKind::Intent, 0, &bits(2));
            assert!(writer.next_io().is_none() && writer.failure().is_some() && writer.durable() < ticket);
        }
    }

    proptest! {
        #[test]
        fn foreign_completions_stop_the_writer_without_a_panic(id in 1u64..u64::MAX) {
            let mut writer = writer(false);
            writer.request_map(MapKind::Intent, 0, &bits(1));
            writer.next_io().unwrap();
            prop_assert!(writer.completed(id, Ok(())).is_err());
        }
    }
}
