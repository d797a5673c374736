//! One bit per chunk, in pages of the size that the on-disk format gives to a map page's payload.

use crate::pool::Chunk;

/// Payload of a map page on disk in bytes: 4 KiB less its 64-byte header.
pub const MAP_PAGE_BYTES: usize = 4032;
/// Chunks that one map page covers.
pub const MAP_PAGE_BITS: u64 = MAP_PAGE_BYTES as u64 * 8;

/// A set of chunks, stored as the pages that go to disk; bit 0 of byte 0 of page 0 is chunk 0.
#[derive(Clone)]
pub struct ChunkMap {
    pages: Vec<[u8; MAP_PAGE_BYTES]>,
    chunks: u64,
    count: u64,
}

impl ChunkMap {
    /// The empty set for a pool of `chunks` chunks.
    #[must_use]
    pub fn new(chunks: u64) -> Self {
        let pages = (0..Self::pages_for(chunks)).map(|_| [0; MAP_PAGE_BYTES]).collect();
        Self { pages, chunks, count: 0 }
    }

    /// How many pages the map of a pool of `chunks` chunks has.
    #[must_use]
    pub fn pages_for(chunks: u64) -> u32 {
        u32::try_from(chunks.div_ceil(MAP_PAGE_BITS)).unwrap_or(u32::MAX)
    }

    /// The set for a pool that has another size from now on. Chunks beyond its end are to be taken out before.
    pub(super) fn resize(&mut self, chunks: u64) {
        self.pages.resize(Self::pages_for(chunks) as usize, [0; MAP_PAGE_BYTES]);
        self.chunks = chunks;
    }

    /// How many pages the map has.
    #[must_use]
    pub fn page_count(&self) -> u32 {
        u32::try_from(self.pages.len()).unwrap_or(u32::MAX)
    }

    /// The bytes of one page.
    #[must_use]
    pub fn page(&self, page: u32) -> Option<&[u8; MAP_PAGE_BYTES]> {
        self.pages.get(page as usize)
    }

    /// Replaces one page with what was read from disk; bits beyond the last chunk are dropped.
    pub fn load_page(&mut self, page: u32, bytes: &[u8; MAP_PAGE_BYTES]) {
        let Some(place) = self.pages.get_mut(page as usize) else { return };
        let ones = |page: &[u8; MAP_PAGE_BYTES]| page.iter().map(|b| u64::from(b.count_ones())).sum::<u64>();
        self.count -= ones(place);
        *place = *bytes;
        let first = u64::from(page) * MAP_PAGE_BITS;
        for (byte, i) in place.iter_mut().zip(0u64..) {
            let valid = self.chunks.saturating_sub(first + i * 8);
            if valid < 8 {
                *byte &= (1u16.wrapping_shl(u32::try_from(valid).unwrap_or(0)) - 1).to_le_bytes()[0];
            }
        }
        self.count += ones(place);
    }

    fn place(chunk: Chunk) -> (usize, usize, u8) {
        let page = usize::try_from(chunk.0 / MAP_PAGE_BITS).unwrap_or(usize::MAX);
        let bit = chunk.0 % MAP_PAGE_BITS;
        (page, usize::try_from(bit / 8).unwrap_or(0), 1 << (bit % 8))
    }

    /// The page that holds the bit of `chunk`.
    #[must_use]
    pub fn page_of(chunk: Chunk) -> u32 {
        u32::try_from(chunk.0 / MAP_PAGE_BITS).unwrap_or(u32::MAX)
    }

    /// How many chunks are in the set.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Whether `chunk` is in the set.
    #[must_use]
    pub fn contains(&self, chunk: Chunk) -> bool {
        let (page, byte, mask) = Self::place(chunk);
        self.pages.get(page).is_some_and(|p| p[byte] & mask != 0)
    }

    /// Adds `chunk`; true if it was not there. Chunks beyond the pool are not added.
    pub fn insert(&mut self, chunk: Chunk) -> bool {
        if chunk.0 >= self.chunks || self.contains(chunk) {
            return false;
        }
        let (page, byte, mask) = Self::place(chunk);
        self.pages[page][byte] |= mask;
        self.count += 1;
        true
    }

    /// Adds `count` chunks from `first` on; each page in which one of them was not there goes to `changed`. Chunks beyond the
    /// pool are not added.
    pub(super) fn insert_range(&mut self, first: Chunk, count: u64, mut changed: impl FnMut(u32)) {
        let end = first.0.saturating_add(count).min(self.chunks);
        let mut chunk = first.0;
        while chunk < end {
            let page_end = (chunk / MAP_PAGE_BITS + 1) * MAP_PAGE_BITS;
            let (page, first_byte, _) = Self::place(Chunk(chunk));
            let stop = end.min(page_end);
            let mut added = 0;
            for byte in &mut self.pages[page][first_byte..] {
                if chunk >= stop {
                    break;
                }
                let next = stop.min((chunk / 8 + 1) * 8);
                let mask = (0xff_u8 >> (8 - (next - chunk))) << (chunk % 8);
                added += u64::from((mask & !*byte).count_ones());
                *byte |= mask;
                chunk = next;
            }
            if added > 0 {
                self.count += added;
                changed(u32::try_from(page).unwrap_or(u32::MAX));
            }
        }
    }

    /// Takes `chunk` out; true if it was there. Only [`super::MemberMaps`] clears.
    pub(super) fn remove(&mut self, chunk: Chunk) -> bool {
        let was = self.contains(chunk);
        if was {
            let (page, byte, mask) = Self::place(chunk);
            self.pages[page][byte] &= !mask;
            self.count -= 1;
        }
        was
    }

    /// Takes every chunk out; each page that had one goes to `changed`. Only [`super::MemberMaps`] clears.
    pub(super) fn clear(&mut self, mut changed: impl FnMut(u32)) {
        for (bits, page) in self.pages.iter_mut().zip(0..) {
            if bits.iter().any(|byte| *byte != 0) {
                *bits = [0; MAP_PAGE_BYTES];
                changed(page);
            }
        }
        self.count = 0;
    }

    /// The chunks as runs `(first, count)`, neighbours joined, in ascending order.
    pub fn runs(&self) -> impl Iterator<Item = (Chunk, u64)> + '_ {
        let mut chunks = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = chunks.next()?;
            let mut count = 1;
            while chunks.next_if(|c| c.0 == first.0 + count).is_some() {
                count += 1;
            }
            Some((first, count))
        })
    }

    /// The chunks in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Chunk> + '_ {
        self.iter_from(Chunk(0))
    }

    /// The chunks from `first` on, in ascending order.
    pub fn iter_from(&self, first: Chunk) -> impl Iterator<Item = Chunk> + '_ {
        let (page, byte, _) = Self::place(first);
        let skipped = page.min(self.pages.len());
        let rest_of_page = self.pages.iter().skip(skipped).zip(first.0 / MAP_PAGE_BITS..);
        rest_of_page
            .flat_map(move |(bits, p)| {
                let from = if p == first.0 / MAP_PAGE_BITS { byte } else { 0 };
                let bytes = bits.iter().zip(0u64..).skip(from);
                bytes.filter(|(byte, _)| **byte != 0).flat_map(move |(&byte, b)| {
                    let base = p * MAP_PAGE_BITS + b * 8;
                    (0..8).filter(move |bit| byte & (1 << bit) != 0).map(move |bit| Chunk(base + bit))
                })
            })
            .filter(move |chunk| *chunk >= first)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn bits_stand_where_the_format_says() {
        let mut map = ChunkMap::new(MAP_PAGE_BITS + 5);
        assert!(map.insert(Chunk(9)) && !map.insert(Chunk(9)));
        assert!(map.insert(Chunk(MAP_PAGE_BITS)));
        assert_eq!(map.page(0).unwrap()[1], 0b10);
        assert_eq!(map.page(1).unwrap()[0], 1);
        assert_eq!(map.iter().collect::<Vec<_>>(), vec![Chunk(9), Chunk(MAP_PAGE_BITS)]);
        assert_eq!(map.iter_from(Chunk(10)).collect::<Vec<_>>(), vec![Chunk(MAP_PAGE_BITS)]);
        assert_eq!(map.iter_from(Chunk(9)).count(), 2);
        assert_eq!(map.iter_from(Chunk(1 << 40)).count(), 0);
        assert!(map.remove(Chunk(9)) && !map.remove(Chunk(9)));
        assert_eq!(map.count(), 1);
    }

    proptest! {
        #[test]
        fn a_range_goes_in_as_its_chunks_one_by_one_would(
            ranges in proptest::collection::vec((0u64..2 * MAP_PAGE_BITS + 40, 0u64..7, 0u64..40), 0..12),
        ) {
            let chunks = 2 * MAP_PAGE_BITS + 11;
            let (mut map, mut single) = (ChunkMap::new(chunks), ChunkMap::new(chunks));
            for (start, pages, few) in ranges {
                let start = if few % 2 == 0 { start } else { start / MAP_PAGE_BITS * MAP_PAGE_BITS + few };
                let count = few + if pages < 2 { pages * MAP_PAGE_BITS } else { 0 };
                let (mut changed, mut expected) = (Vec::new(), Vec::new());
                map.insert_range(Chunk(start), count, |page| changed.push(page));
                for chunk in (start..start + count).map(Chunk) {
                    if single.insert(chunk) {
                        expected.push(ChunkMap::page_of(chunk));
                    }
                }
                expected.dedup();
                prop_assert_eq!((changed, map.count()), (expected, single.count()));
            }
            prop_assert_eq!(map.pages, single.pages);
        }
    }

    #[test]
    fn neighbours_are_one_run() {
        let mut map = ChunkMap::new(100);
        for chunk in [3, 7, 8, 9, 99] {
            map.insert(Chunk(chunk));
        }
        assert_eq!(map.runs().collect::<Vec<_>>(), vec![(Chunk(3), 1), (Chunk(7), 3), (Chunk(99), 1)]);
    }

    #[test]
    fn chunks_beyond_the_pool_never_enter() {
        let mut map = ChunkMap::new(11);
        assert!(!map.insert(Chunk(11)));
        // A page that is loaded again counts once.
        map.load_page(0, &[0x0f; MAP_PAGE_BYTES]);
        map.load_page(0, &[0xff; MAP_PAGE_BYTES]);
        assert_eq!(map.count(), 11);
        assert!(map.contains(Chunk(10)) && !map.contains(Chunk(11)));
    }
}
