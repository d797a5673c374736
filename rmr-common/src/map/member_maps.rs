//! The intent map and the dirty maps of one member, with the single place where their bits are cleared.

use super::{BlockMap, ChunkMap};
use crate::pool::{Block, Chunk, ChunkSize, MAX_MEMBERS, MemberId, MemberSet, PoolSpec};

/// Which map of a store.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum MapId {
    /// Chunks of this store that may hold writes not known complete everywhere.
    Intent,
    /// Chunks that this other member has missed.
    Dirty(MemberId),
}

/// One page of one map: the unit that is made durable.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub struct MapPage {
    /// The map.
    pub map: MapId,
    /// Index of the page in it.
    pub page: u32,
}

/// Why a bit may be cleared. Every clearing states one of these.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClearReason {
    /// All writes to the chunk are complete on every active member (watermark) and durable here (flushed).
    CompleteEverywhere,
    /// The client detached: it said that everything is complete everywhere, and this store was flushed since.
    CleanDetach,
    /// A block of this member's own: a write that covered it whole was carried out here.
    Overwritten,
    /// A block of this member's own: it was pulled from a Clean member and written here.
    Pulled,
    /// A block of this member's own: a Clean member, whose record is complete, does not have it as missed.
    NotMissed,
    /// A chunk of another member: the coordinator, under the present view, passed on that it is current and durable there.
    Reported,
    /// All of a member: it is Clean in the committed view.
    CleanInView,
    /// All of a member: the durable view does not have it. Should the id come back, it is with everything missed.
    Removed,
    /// What lies beyond the pool's end: the operator forced a pool into use that had not been made larger yet.
    BeyondEnd,
}

/// What is to be cleared.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ClearTarget {
    /// The intent bit of a chunk.
    Intent(Chunk),
    /// A block that this member knows to miss; its chunk's bit goes with the last one.
    Block(MemberId, Block),
    /// A chunk of a member, with its blocks.
    Chunk(MemberId, Chunk),
    /// Everything of a member.
    Member(MemberId),
    /// Every bit of every map from this block on.
    From(Block),
}

struct DirtyMap {
    /// Block-exact; complete only for chunks that became dirty since this process started.
    blocks: BlockMap,
    chunks: ChunkMap,
}

/// All maps of one member.
pub struct MemberMaps {
    chunk_size: ChunkSize,
    chunks: u64,
    blocks: u64,
    intent: ChunkMap,
    dirty: [Option<DirtyMap>; MAX_MEMBERS],
}

impl MemberMaps {
    /// Empty maps for a pool.
    #[must_use]
    pub fn new(spec: &PoolSpec) -> Self {
        Self {
            chunk_size: spec.chunk_size,
            chunks: spec.chunk_count(),
            blocks: spec.block_count(),
            intent: ChunkMap::new(spec.chunk_count()),
            dirty: std::array::from_fn(|_| None),
        }
    }

    /// Puts a map that was read from disk in place. Every block of a dirty chunk counts as missed, because which
    /// blocks of it were missed was known only in memory.
    pub fn load(&mut self, id: MapId, map: ChunkMap) {
        match id {
            MapId::Intent => self.intent = map,
            MapId::Dirty(member) => {
                let mut blocks = BlockMap::new(self.blocks);
                let per_chunk = self.chunk_size.bytes();
                for (first, count) in map.runs() {
                    let start = first.0 * per_chunk;
                    let end = (start + count * per_chunk).min(self.blocks * crate::pool::BLOCK_SIZE);
                    blocks.insert_bytes(start, end - start);
                }
                self.dirty[member.index()] = (map.count() > 0).then_some(DirtyMap { blocks, chunks: map });
            }
        }
    }

    /// Sets the intent bits of the chunks that a write covers; each page that changed goes to `changed`.
    pub fn set_intent(&mut self, offset: u64, length: u64, changed: &mut Vec<MapPage>) {
        for chunk in chunks_touched(self.chunk_size, offset, length).map(Chunk) {
            if self.intent.insert(chunk) {
                note(changed, MapPage { map: MapId::Intent, page: ChunkMap::page_of(chunk) });
            }
        }
    }

    /// Records that `members` miss the bytes of a write; each page that changed goes to `changed`.
    pub fn set_dirty(&mut self, members: MemberSet, offset: u64, length: u64, changed: &mut Vec<MapPage>) {
        for member in members.iter() {
            let (blocks, chunks) = (self.blocks, self.chunks);
            let map = self.dirty[member.index()].get_or_insert_with(|| DirtyMap {
                blocks: BlockMap::new(blocks),
                chunks: ChunkMap::new(chunks),
            });
            map.blocks.insert_bytes(offset, length);
            let touched = chunks_touched(self.chunk_size, offset, length);
            map.chunks.insert_range(
                Chunk(touched.start),
                touched.end.saturating_sub(touched.start),
                |page| {
                    note(changed, MapPage { map: MapId::Dirty(member), page });
                },
            );
        }
    }

    /// Records that `member` misses these blocks; each page that changed goes to `changed`. The cost depends on the size of the
    /// pool, never on how many ranges made up the set.
    pub fn set_dirty_blocks(&mut self, member: MemberId, missed: &BlockMap, changed: &mut Vec<MapPage>) {
        let (blocks, chunks) = (self.blocks, self.chunks);
        let map = self.dirty[member.index()]
            .get_or_insert_with(|| DirtyMap { blocks: BlockMap::new(blocks), chunks: ChunkMap::new(chunks) });
        map.blocks.insert_all(missed);
        let per_chunk = self.chunk_size.bytes() / crate::pool::BLOCK_SIZE;
        missed.each_unit_run(per_chunk, |first, count| {
            map.chunks.insert_range(Chunk(first), count, |page| {
                note(changed, MapPage { map: MapId::Dirty(member), page });
            });
        });
    }

    /// Clears bits: the only function that does so in any map. The caller states why no recovery can need them any more;
    /// [`ClearReason`] says what each reason promises, and a reason that does not fit the target is a bug.
    pub fn clear(&mut self, target: ClearTarget, reason: ClearReason, changed: &mut Vec<MapPage>) {
        match (target, reason) {
            (ClearTarget::Intent(chunk), ClearReason::CompleteEverywhere | ClearReason::CleanDetach) => {
                if self.intent.remove(chunk) {
                    note(changed, MapPage { map: MapId::Intent, page: ChunkMap::page_of(chunk) });
                }
            }
            (
                ClearTarget::Block(member, block),
                ClearReason::Overwritten | ClearReason::Pulled | ClearReason::NotMissed,
            ) => {
                let chunk = self.chunk_size.chunk_of_block(block);
                let per_chunk = self.chunk_size.bytes() / crate::pool::BLOCK_SIZE;
                if let Some(map) = &mut self.dirty[member.index()]
                    && map.blocks.remove(block)
                    && (!map.blocks.any_in(Block(chunk.0 * per_chunk), per_chunk)
                        || mutant!(ChunkFreshWithOneBlock))
                {
                    self.clear_chunk(member, chunk, changed);
                }
            }
            // A report may name any number; beyond the pool nothing is on record.
            (ClearTarget::Chunk(member, chunk), ClearReason::Reported) if chunk.0 < self.chunks => {
                self.clear_chunk(member, chunk, changed)
            }
            (ClearTarget::Chunk(..), ClearReason::Reported) => {}
            (ClearTarget::Member(member), ClearReason::CleanInView | ClearReason::Removed) => {
                if let Some(map) = &mut self.dirty[member.index()] {
                    map.blocks.clear();
                    map.chunks.clear(|page| note(changed, MapPage { map: MapId::Dirty(member), page }));
                }
            }
            (ClearTarget::From(end), ClearReason::BeyondEnd) => self.clear_from(end, changed),
            _ => debug_assert!(false, "{reason:?} is no reason to clear {target:?}"),
        }
    }

    fn clear_chunk(&mut self, member: MemberId, chunk: Chunk, changed: &mut Vec<MapPage>) {
        let Some(map) = &mut self.dirty[member.index()] else { return };
        let per_chunk = self.chunk_size.bytes() / crate::pool::BLOCK_SIZE;
        map.blocks.remove_range(Block(chunk.0 * per_chunk), per_chunk);
        if map.chunks.remove(chunk) {
            note(changed, MapPage { map: MapId::Dirty(member), page: ChunkMap::page_of(chunk) });
        }
    }

    fn clear_from(&mut self, end: Block, changed: &mut Vec<MapPage>) {
        let size = self.chunk_size;
        let first = Chunk((end.0 * crate::pool::BLOCK_SIZE).div_ceil(size.bytes()));
        let intents: Vec<_> = self.intent.iter_from(first).collect();
        for chunk in intents {
            self.intent.remove(chunk);
            note(changed, MapPage { map: MapId::Intent, page: ChunkMap::page_of(chunk) });
        }
        for member in MemberId::all() {
            let Some(map) = &mut self.dirty[member.index()] else { continue };
            map.blocks.remove_range(end, u64::MAX);
            let per_chunk = size.bytes() / crate::pool::BLOCK_SIZE;
            let is_empty = |c: &Chunk| !map.blocks.any_in(Block(c.0 * per_chunk), per_chunk);
            let chunks: Vec<_> = map.chunks.iter_from(size.chunk_of_block(end)).filter(is_empty).collect();
            for chunk in chunks {
                self.clear_chunk(member, chunk, changed);
            }
        }
    }

    /// The maps of a pool that has the size of `spec` from now on. New chunks are in no map.
    pub fn resize(&mut self, spec: &PoolSpec, changed: &mut Vec<MapPage>) {
        if spec.block_count() < self.blocks {
            self.clear(ClearTarget::From(Block(spec.block_count())), ClearReason::BeyondEnd, changed);
        }
        (self.chunks, self.blocks) = (spec.chunk_count(), spec.block_count());
        self.intent.resize(self.chunks);
        for map in self.dirty.iter_mut().flatten() {
            map.blocks.resize(self.blocks);
            map.chunks.resize(self.chunks);
        }
        let pages = self.intent.page_count();
        changed.retain(|p| p.page < pages);
    }

    /// How many chunks the pool has by these maps.
    #[must_use]
    pub const fn chunk_count(&self) -> u64 {
        self.chunks
    }

    /// How many blocks the pool has by these maps.
    #[must_use]
    pub const fn block_count(&self) -> u64 {
        self.blocks
    }

    /// The missed blocks of a member in a range of bytes, in ascending order.
    pub fn missed_in(&self, member: MemberId, offset: u64, length: u64) -> impl Iterator<Item = Block> + '_ {
        let first = offset / crate::pool::BLOCK_SIZE;
        let end = offset.saturating_add(length).div_ceil(crate::pool::BLOCK_SIZE).min(self.blocks);
        let map = self.dirty[member.index()].as_ref();
        map.into_iter().flat_map(move |m| m.blocks.iter_in(Block(first), end.saturating_sub(first)))
    }

    /// Takes over what a Clean member has on record for `member`, in place of what was known here; every page of the
    /// map goes to `changed`. Which blocks of a chunk were missed is known to the Clean member only.
    pub fn replace(&mut self, member: MemberId, chunks: ChunkMap, changed: &mut Vec<MapPage>) {
        let pages = chunks.page_count();
        self.load(MapId::Dirty(member), chunks);
        self.dirty[member.index()].get_or_insert_with(|| DirtyMap {
            blocks: BlockMap::new(self.blocks),
            chunks: ChunkMap::new(self.chunks),
        });
        for page in 0..pages {
            note(changed, MapPage { map: MapId::Dirty(member), page });
        }
    }

    /// Adds what a Clean member has on record for another one to what is known here.
    pub fn merge(&mut self, member: MemberId, chunks: &ChunkMap, changed: &mut Vec<MapPage>) {
        let size = self.chunk_size.bytes();
        for (first, count) in chunks.runs() {
            let start = first.0 * size;
            let end = (start + count * size).min(self.blocks * crate::pool::BLOCK_SIZE);
            self.set_dirty(MemberSet::only(member), start, end - start, changed);
        }
    }

    /// Whether any map is dirty for a member, and how many blocks and chunks it has missed.
    #[must_use]
    pub fn missed(&self, member: MemberId) -> (u64, u64) {
        self.dirty[member.index()].as_ref().map_or((0, 0), |map| (map.blocks.count(), map.chunks.count()))
    }

    /// The intent map.
    #[must_use]
    pub const fn intent(&self) -> &ChunkMap {
        &self.intent
    }

    /// The chunks that a member has missed.
    #[must_use]
    pub fn dirty_chunks(&self, member: MemberId) -> Option<&ChunkMap> {
        self.dirty[member.index()].as_ref().map(|map| &map.chunks)
    }

    /// The blocks that a member has missed.
    #[must_use]
    pub fn dirty_blocks(&self, member: MemberId) -> Option<&BlockMap> {
        self.dirty[member.index()].as_ref().map(|map| &map.blocks)
    }

    /// The bytes of a page as they are now.
    #[must_use]
    pub fn page(&self, page: MapPage) -> Option<&[u8; super::MAP_PAGE_BYTES]> {
        match page.map {
            MapId::Intent => self.intent.page(page.page),
            MapId::Dirty(member) => self.dirty[member.index()].as_ref()?.chunks.page(page.page),
        }
    }
}

fn note(changed: &mut Vec<MapPage>, page: MapPage) {
    // Bits come in ascending order, so that the page is often the one that was noted last.
    if !changed.iter().rev().any(|p| *p == page) {
        changed.push(page);
    }
}

/// The chunks that the `length` bytes from `offset` touch.
fn chunks_touched(size: ChunkSize, offset: u64, length: u64) -> std::ops::Range<u64> {
    let end = if length == 0 { offset >> size.shift() } else { ((offset + length - 1) >> size.shift()) + 1 };
    size.chunk_of(offset).0..end
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{Address, MemberSpec, PoolId, StoreId};

    fn maps() -> MemberMaps {
        MemberMaps::new(&spec())
    }

    fn spec() -> PoolSpec {
        let id = MemberId::new(0).unwrap();
        PoolSpec {
            id: PoolId::random(),
            name: "p".into(),
            size: 64 << 20,
            chunk_size: ChunkSize::from_bytes(64 << 10).unwrap(),
            logical_block_size: 512,
            members: vec![MemberSpec::new(id, StoreId::random(), Address::tcp("h", 1))],
        }
    }

    #[test]
    fn a_write_across_a_chunk_border_sets_both_intent_bits_once() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        maps.set_intent((64 << 10) - 512, 1024, &mut changed);
        assert_eq!(maps.intent().iter().collect::<Vec<_>>(), vec![Chunk(0), Chunk(1)]);
        assert_eq!(changed.len(), 1);
        changed.clear();
        maps.set_intent(0, 4096, &mut changed);
        assert!(changed.is_empty(), "a bit that is set already costs nothing");
    }

    #[test]
    fn missed_writes_are_counted_block_exact() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        let member = MemberId::new(1).unwrap();
        maps.set_dirty(MemberSet::only(member), 512, 512, &mut changed);
        maps.set_dirty(MemberSet::only(member), 1 << 20, 8192, &mut changed);
        assert_eq!(maps.missed(member), (3, 2));
        assert_eq!(maps.missed(MemberId::new(2).unwrap()), (0, 0));
    }

    #[test]
    fn a_report_of_a_chunk_beyond_the_pool_clears_nothing() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        let member = MemberId::new(1).unwrap();
        maps.set_dirty(MemberSet::only(member), 0, 4096, &mut changed);
        for chunk in [1024, u64::MAX, 1 << 60] {
            maps.clear(ClearTarget::Chunk(member, Chunk(chunk)), ClearReason::Reported, &mut changed);
        }
        assert_eq!(maps.missed(member), (1, 1));
    }

    #[test]
    fn blocks_added_as_a_set_are_on_record_as_those_added_one_by_one() {
        let (mut maps, mut single, mut changed) = (maps(), self::maps(), Vec::new());
        let member = MemberId::new(1).unwrap();
        let mut missed = BlockMap::new(spec().block_count());
        for (offset, length) in [(0, 4096), (65536, 200_000), ((64 << 20) - 4096, 4096)] {
            missed.insert_bytes(offset, length);
            single.set_dirty(MemberSet::only(member), offset, length, &mut changed);
        }
        changed.clear();
        maps.set_dirty_blocks(member, &missed, &mut changed);
        assert_eq!(maps.missed(member), single.missed(member));
        assert!(maps.dirty_chunks(member).unwrap().iter().eq(single.dirty_chunks(member).unwrap().iter()));
        assert_eq!(changed, vec![MapPage { map: MapId::Dirty(member), page: 0 }]);
    }

    #[test]
    fn after_a_restart_every_block_of_a_dirty_chunk_counts() {
        let (mut before, mut changed) = (maps(), Vec::new());
        let member = MemberId::new(1).unwrap();
        before.set_dirty(MemberSet::only(member), 65536, 4096, &mut changed);
        let mut after = maps();
        after.load(MapId::Dirty(member), before.dirty_chunks(member).unwrap().clone());
        assert_eq!(after.missed(member), (16, 1));
        assert!(after.dirty_blocks(member).unwrap().contains(Block(31)));
    }

    #[test]
    fn a_chunk_is_clean_when_its_last_block_is() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        let member = MemberId::new(1).unwrap();
        maps.set_dirty(MemberSet::only(member), 65536, 8192, &mut changed);
        maps.clear(ClearTarget::Block(member, Block(16)), ClearReason::Pulled, &mut changed);
        assert_eq!(maps.missed(member), (1, 1));
        changed.clear();
        maps.clear(ClearTarget::Block(member, Block(17)), ClearReason::Overwritten, &mut changed);
        assert_eq!(maps.missed(member), (0, 0));
        assert_eq!(changed, vec![MapPage { map: MapId::Dirty(member), page: 0 }]);
    }

    #[test]
    fn a_map_that_is_taken_over_replaces_ones_own_and_is_added_to_that_of_another() {
        let (mut source, mut here, mut changed) = (maps(), maps(), Vec::new());
        let [own, other] = [1, 2].map(|i| MemberId::new(i).unwrap());
        for member in [own, other] {
            source.set_dirty(MemberSet::only(member), 0, 4096, &mut changed);
            here.set_dirty(MemberSet::only(member), 1 << 20, 4096, &mut changed);
        }
        changed.clear();
        here.replace(own, source.dirty_chunks(own).unwrap().clone(), &mut changed);
        here.merge(other, source.dirty_chunks(other).unwrap(), &mut changed);
        assert_eq!((here.missed(own), here.missed(other)), ((16, 1), (17, 2)));
        assert_eq!(changed.len(), 2);
    }

    #[test]
    fn maps_grow_with_the_pool_and_lose_what_lies_beyond_a_smaller_one() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        let member = MemberId::new(1).unwrap();
        let mut spec = spec();
        maps.set_dirty(MemberSet::only(member), 65536, 4096, &mut changed);
        spec.size = 8 << 30;
        maps.resize(&spec, &mut changed);
        let last = spec.size - 4096;
        maps.set_dirty(MemberSet::only(member), last, 4096, &mut changed);
        maps.set_intent(last, 4096, &mut changed);
        assert_eq!(maps.missed(member), (2, 2));
        assert!(maps.page(MapPage { map: MapId::Intent, page: 4 }).is_some());
        spec.size = 65536 + 8192;
        maps.set_dirty(MemberSet::only(member), 65536 + 8192, 4096, &mut changed);
        changed.clear();
        maps.resize(&spec, &mut changed);
        assert_eq!((maps.missed(member), maps.intent().count()), ((1, 1), 0));
        assert_eq!(changed, vec![], "what lies beyond is not there any more");
    }

    /// `cargo test -p rmr-common --lib a_tebibyte_is -- --ignored --nocapture`
    #[test]
    #[ignore = "a measurement"]
    fn a_tebibyte_is_recorded_as_missed_and_forgotten_within_a_fraction_of_a_leg_timeout() {
        let big = PoolSpec { size: 1 << 40, chunk_size: ChunkSize::from_bytes(1 << 20).unwrap(), ..spec() };
        let (mut maps, mut copy, mut changed) = (MemberMaps::new(&big), MemberMaps::new(&big), Vec::new());
        let member = MemberId::new(1).unwrap();
        let mut timed = |what: &str, work: &mut dyn FnMut(&mut Vec<MapPage>)| {
            changed.clear();
            let begin = std::time::Instant::now();
            work(&mut changed);
            println!("{what}: {:?}", begin.elapsed());
            assert!(begin.elapsed().as_millis() < 500);
        };
        timed("set_dirty", &mut |c| maps.set_dirty(MemberSet::only(member), 0, big.size, c));
        assert_eq!(maps.missed(member), (1 << 28, 1 << 20));
        timed("replace", &mut |c| copy.replace(member, maps.dirty_chunks(member).unwrap().clone(), c));
        timed("merge", &mut |c| copy.merge(MemberId::new(2).unwrap(), maps.dirty_chunks(member).unwrap(), c));
        timed("clear", &mut |c| copy.clear(ClearTarget::Member(member), ClearReason::Removed, c));
        assert_eq!(
            (copy.missed(member), copy.missed(MemberId::new(2).unwrap())),
            ((0, 0), (1 << 28, 1 << 20))
        );
    }

    #[test]
    fn a_removed_member_leaves_nothing_on_record() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        let [gone, stays] = [1, 2].map(|i| MemberId::new(i).unwrap());
        maps.set_dirty(MemberSet::from_iter([gone, stays]), 0, 4096, &mut changed);
        maps.clear(ClearTarget::Member(gone), ClearReason::Removed, &mut changed);
        assert_eq!((maps.missed(gone), maps.missed(stays)), ((0, 0), (1, 1)));
    }

    #[test]
    fn clearing_reports_the_page_to_write() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        maps.set_intent(0, 512, &mut changed);
        changed.clear();
        maps.clear(ClearTarget::Intent(Chunk(0)), ClearReason::CompleteEverywhere, &mut changed);
        assert_eq!(changed, vec![MapPage { map: MapId::Intent, page: 0 }]);
        assert_eq!(maps.intent().count(), 0);
    }
}
