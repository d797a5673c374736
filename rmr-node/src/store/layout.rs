//! Where everything lies in a store. A layout follows from one number, the pages per map, so that the offsets on disk
//! can be checked against what they must be.

use rmr_common::pool::{ChunkSize, MAX_MEMBERS, MemberId};
use serde::{Serialize, Serializer};

/// Size of a metadata page: superblock copy or map page, in bytes.
pub const PAGE_BYTES: usize = 4096;
/// The same, for offsets.
pub const PAGE_SIZE: u64 = PAGE_BYTES as u64;
/// Bytes of a map page that hold bits; the rest is its header.
pub const PAGE_BITS_BYTES: usize = 4032;
/// Chunks that one map page covers.
pub const CHUNKS_PER_PAGE: u64 = PAGE_BITS_BYTES as u64 * 8;
/// Where the two superblock copies lie; apart, so that no single erase block or write error takes both.
pub const SUPERBLOCK_OFFSETS: [u64; 2] = [0, 64 << 10];
/// Where the map pages begin.
pub(super) const MAP_OFFSET: u64 = 128 << 10;
/// Maps of a store: the intent map and one dirty map per possible member.
pub(super) const MAP_COUNT: u64 = 1 + MAX_MEMBERS as u64;
/// The data area begins at a multiple of this.
pub const DATA_ALIGNMENT: u64 = 1 << 20;
/// Most pages that a map can have: 1 PiB in chunks of 64 KiB.
pub(super) const MAX_PAGES_PER_MAP: u64 = (1u64 << 34).div_ceil(CHUNKS_PER_PAGE);

/// The two copies of the map area begin at multiples of this.
const MAP_ALIGNMENT: u64 = 64 << 10;

/// Which map a page belongs to.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, PartialOrd, Ord)]
pub enum MapKind {
    /// Chunks of this store that may hold writes not known complete everywhere.
    Intent,
    /// Chunks in which this member has stale blocks.
    Dirty(MemberId),
}

impl MapKind {
    /// All maps, in the order in which they lie on disk.
    pub fn all() -> impl Iterator<Item = Self> {
        std::iter::once(Self::Intent).chain(MemberId::all().map(Self::Dirty))
    }

    /// Position among the maps of a store, `0..MAP_COUNT`.
    #[must_use]
    pub const fn position(self) -> usize {
        match self {
            Self::Intent => 0,
            Self::Dirty(member) => 1 + member.index(),
        }
    }
}

impl std::fmt::Display for MapKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Intent => f.write_str("intent map"),
            Self::Dirty(member) => write!(f, "dirty map of member {member}"),
        }
    }
}

impl Serialize for MapKind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Offsets and sizes of a store's areas, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Layout {
    /// Pages of each map.
    pub pages_per_map: u32,
    /// Where the first copy of the map area begins.
    pub map_offset: u64,
    /// Distance from the first to the second copy of the map area.
    pub map_stride: u64,
    /// Where the pool's byte 0 lies.
    pub data_offset: u64,
}

impl Layout {
    /// The layout whose maps hold `chunk_capacity` chunks each, or `None` when that is zero or more than a pool can have.
    #[must_use]
    pub fn for_chunks(chunk_capacity: u64) -> Option<Self> {
        Self::for_pages(u32::try_from(chunk_capacity.div_ceil(CHUNKS_PER_PAGE)).ok()?)
    }

    /// The layout with this number of pages per map, or `None` when it is zero or too large.
    #[must_use]
    pub fn for_pages(pages_per_map: u32) -> Option<Self> {
        if !(1..=MAX_PAGES_PER_MAP).contains(&u64::from(pages_per_map)) {
            return None;
        }
        let area = u64::from(pages_per_map) * MAP_COUNT * PAGE_SIZE;
        let map_stride = area.next_multiple_of(MAP_ALIGNMENT);
        let data_offset = (MAP_OFFSET + 2 * map_stride).next_multiple_of(DATA_ALIGNMENT);
        Some(Self { pages_per_map, map_offset: MAP_OFFSET, map_stride, data_offset })
    }

    /// Most chunks that the maps have room for.
    #[must_use]
    pub fn chunk_capacity(&self) -> u64 {
        u64::from(self.pages_per_map) * CHUNKS_PER_PAGE
    }

    /// The largest pool, in bytes, that the maps have room for.
    #[must_use]
    pub fn largest_pool(&self, chunk_size: ChunkSize) -> u64 {
        self.chunk_capacity().saturating_mul(chunk_size.bytes()).min(1 << 50)
    }

    /// Bytes that a store of a pool of `pool_size` bytes takes.
    #[must_use]
    pub const fn store_size(&self, pool_size: u64) -> u64 {
        self.data_offset + pool_size
    }

    /// Where copy `slot` (0 or 1) of a map page lies.
    #[must_use]
    pub fn page_offset(&self, kind: MapKind, index: u32, slot: usize) -> u64 {
        debug_assert!(index < self.pages_per_map && slot < 2);
        let page = kind.position() as u64 * u64::from(self.pages_per_map) + u64::from(index);
        self.map_offset + slot as u64 * self.map_stride + page * PAGE_SIZE
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn pages_never_overlap_one_another_superblocks_or_data() {
        for pages in [1, 2, 7, 100] {
            let layout = Layout::for_pages(pages).unwrap();
            let mut seen: HashSet<u64> = SUPERBLOCK_OFFSETS.into();
            for kind in MapKind::all() {
                for index in 0..pages {
                    for slot in 0..2 {
                        let offset = layout.page_offset(kind, index, slot);
                        assert!(offset.is_multiple_of(PAGE_SIZE) && offset + PAGE_SIZE <= layout.data_offset);
                        assert!(seen.insert(offset), "{kind} page {index} slot {slot} overlaps");
                    }
                }
            }
            assert!(layout.data_offset.is_multiple_of(DATA_ALIGNMENT));
        }
    }

    #[test]
    fn layouts_without_pages_or_beyond_the_largest_pool_do_not_exist() {
        assert_eq!(Layout::for_chunks(0), None);
        assert_eq!(Layout::for_chunks(1).unwrap().pages_per_map, 1);
        assert_eq!(Layout::for_chunks(CHUNKS_PER_PAGE + 1).unwrap().pages_per_map, 2);
        assert!(Layout::for_chunks(1 << 34).is_some());
        assert_eq!(Layout::for_chunks(1 << 35), None);
        assert_eq!(Layout::for_chunks(u64::MAX), None);
    }
}
