//! The intent map and the dirty maps of one member, with the single place where their bits are cleared.

use super::{BlockMap, ChunkMap};
use crate::pool::{Chunk, ChunkSize, MAX_MEMBERS, MemberId, MemberSet, PoolSpec};

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
                for chunk in map.iter() {
                    let start = chunk.0 * per_chunk;
                    let end = (start + per_chunk).min(self.blocks * crate::pool::BLOCK_SIZE);
                    blocks.insert_bytes(start, end - start);
                }
                self.dirty[member.index()] = (map.count() > 0).then_some(DirtyMap { blocks, chunks: map });
            }
        }
    }

    /// Sets the intent bits of the chunks that a write covers; each page that changed goes to `changed`.
    pub fn set_intent(&mut self, offset: u64, length: u64, changed: &mut Vec<MapPage>) {
        for chunk in chunks_touched(self.chunk_size, offset, length) {
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
            for chunk in chunks_touched(self.chunk_size, offset, length) {
                if map.chunks.insert(chunk) {
                    note(changed, MapPage { map: MapId::Dirty(member), page: ChunkMap::page_of(chunk) });
                }
            }
        }
    }

    /// Clears the intent bit of a chunk: the only function that clears a bit of any map.
    ///
    /// The caller states why no recovery can need the bit any more. With [`ClearReason::CompleteEverywhere`] it has
    /// seen a watermark at or above the chunk's last write, and a flush that began after that write was answered. With
    /// [`ClearReason::CleanDetach`] the client said so of all writes, and a flush has followed.
    pub fn clear_intent(&mut self, chunk: Chunk, reason: ClearReason, changed: &mut Vec<MapPage>) {
        match reason {
            ClearReason::CompleteEverywhere | ClearReason::CleanDetach => {
                if self.intent.remove(chunk) {
                    note(changed, MapPage { map: MapId::Intent, page: ChunkMap::page_of(chunk) });
                }
            }
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
    if !changed.contains(&page) {
        changed.push(page);
    }
}

/// The chunks that the `length` bytes from `offset` touch.
fn chunks_touched(size: ChunkSize, offset: u64, length: u64) -> impl Iterator<Item = Chunk> {
    let end = if length == 0 { offset >> size.shift() } else { ((offset + length - 1) >> size.shift()) + 1 };
    (size.chunk_of(offset).0..end).map(Chunk)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{Address, Block, MemberSpec, PoolId, StoreId};

    fn maps() -> MemberMaps {
        let id = MemberId::new(0).unwrap();
        MemberMaps::new(&PoolSpec {
            id: PoolId::random(),
            name: "p".into(),
            size: 64 << 20,
            chunk_size: ChunkSize::from_bytes(64 << 10).unwrap(),
            logical_block_size: 512,
            members: vec![MemberSpec { id, store: StoreId::random(), address: Address::tcp("h", 1) }],
        })
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
    fn clearing_reports_the_page_to_write() {
        let (mut maps, mut changed) = (maps(), Vec::new());
        maps.set_intent(0, 512, &mut changed);
        changed.clear();
        maps.clear_intent(Chunk(0), ClearReason::CompleteEverywhere, &mut changed);
        assert_eq!(changed, vec![MapPage { map: MapId::Intent, page: 0 }]);
        assert_eq!(maps.intent().count(), 0);
    }
}
