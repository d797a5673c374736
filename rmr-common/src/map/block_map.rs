//! A sparse set of blocks: a directory of leaves, each for 128 MiB of the pool. A leaf without a block, and one with all of
//! them, takes no memory; ranges go in and out by whole leaves and words.

use std::ops::Range;

use crate::pool::{BLOCK_SIZE, Block};

const LEAF_WORDS: usize = 512;
const LEAF_BITS: u64 = LEAF_WORDS as u64 * 64;

type Words = [u64; LEAF_WORDS];

static ALL: Words = [u64::MAX; LEAF_WORDS];

struct Bits {
    set: u64,
    words: Words,
}

/// `Some` has at least one bit and lacks at least one.
enum Leaf {
    None,
    Some(Box<Bits>),
    All,
}

/// A set of blocks. Memory: 16 bytes per 128 MiB of the pool, and 4 KiB for each 128 MiB of which some blocks are in the set and
/// some are not.
pub struct BlockMap {
    leaves: Vec<Leaf>,
    count: u64,
}

impl BlockMap {
    /// The empty set for a pool of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        let mut map = Self { leaves: Vec::new(), count: 0 };
        map.resize(blocks);
        map
    }

    /// The set for a pool that has another size from now on. Blocks beyond its end are to be taken out before.
    pub fn resize(&mut self, blocks: u64) {
        let leaves = usize::try_from(blocks.div_ceil(LEAF_BITS)).unwrap_or(usize::MAX);
        self.count -= self.leaves.iter().skip(leaves).map(Leaf::count).sum::<u64>();
        self.leaves.resize_with(leaves, || Leaf::None);
    }

    /// Makes the set one for a pool of at least this many blocks.
    pub fn resize_to_hold(&mut self, blocks: u64) {
        if blocks.div_ceil(LEAF_BITS) > self.leaves.len() as u64 {
            self.resize(blocks);
        }
    }

    /// How many blocks are in the set.
    #[must_use]
    pub const fn count(&self) -> u64 {
        self.count
    }

    /// Whether no block is in the set.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Whether `block` is in the set.
    #[must_use]
    pub fn contains(&self, block: Block) -> bool {
        let bit = block.0 % LEAF_BITS;
        self.words_at(block).is_some_and(|words| words[index(bit / 64)] & 1 << (bit % 64) != 0)
    }

    /// Adds `block`; true if it was not there. Blocks beyond the pool are not added.
    pub fn insert(&mut self, block: Block) -> bool {
        self.insert_range(block, 1) > 0
    }

    /// Adds `count` blocks from `first` on, and tells how many were not there. Blocks beyond the pool are not added.
    pub fn insert_range(&mut self, first: Block, count: u64) -> u64 {
        let mut added = 0;
        for (leaf, bits) in self.leaves_of(first, count) {
            added += self.leaves[leaf].insert(bits);
        }
        self.count += added;
        added
    }

    /// Adds every block that the `length` bytes from `offset` touch.
    pub fn insert_bytes(&mut self, offset: u64, length: u64) {
        if length > 0 {
            let first = offset / BLOCK_SIZE;
            self.insert_range(Block(first), offset.saturating_add(length).div_ceil(BLOCK_SIZE) - first);
        }
    }

    /// Takes `block` out; true if it was there.
    pub fn remove(&mut self, block: Block) -> bool {
        self.remove_range(block, 1) > 0
    }

    /// Takes `count` blocks from `first` on out, and tells how many were there.
    pub fn remove_range(&mut self, first: Block, count: u64) -> u64 {
        let mut removed = 0;
        for (leaf, bits) in self.leaves_of(first, count) {
            removed += self.leaves[leaf].remove(bits);
        }
        self.count -= removed;
        removed
    }

    /// Whether any of the `count` blocks from `first` is in the set; both are multiples of 16.
    #[must_use]
    pub fn any_in(&self, first: Block, count: u64) -> bool {
        (first.0..first.0 + count).step_by(16).any(|block| {
            let sixteen = 0xffff << (block % 64);
            self.words_at(Block(block))
                .is_some_and(|words| words[index(block % LEAF_BITS / 64)] & sixteen != 0)
        })
    }

    /// Takes every block out.
    pub fn clear(&mut self) {
        if self.count > 0 {
            self.leaves.fill_with(|| Leaf::None);
            self.count = 0;
        }
    }

    /// Adds every block of `other`. The cost depends on the size of the pool, never on how many ranges made up `other`.
    pub fn insert_all(&mut self, other: &Self) {
        for (leaf, more) in self.leaves.iter_mut().zip(&other.leaves) {
            self.count += leaf.insert_all_of(more);
        }
    }

    /// Moves every block of `other` into this set, leaving `other` empty.
    pub fn append(&mut self, other: &mut Self) {
        if self.is_empty() {
            std::mem::swap(self, other);
        } else {
            self.insert_all(other);
        }
        other.clear();
    }

    /// The blocks in a range in ascending order. Empty words are skipped whole.
    pub fn iter_in(&self, first: Block, count: u64) -> impl Iterator<Item = Block> + '_ {
        let end = first.0.saturating_add(count).min(self.leaves.len() as u64 * LEAF_BITS);
        let words = first.0 / 64..end.div_ceil(64).max(first.0 / 64);
        words
            .filter_map(|w| Some((w * 64, self.words_at(Block(w * 64))?[index(w % LEAF_WORDS as u64)])))
            .flat_map(move |(base, word)| {
                let mut left = word;
                let bits = std::iter::from_fn(move || {
                    let bit = (left != 0).then(|| u64::from(left.trailing_zeros()))?;
                    left &= left - 1;
                    Some(Block(base + bit))
                });
                bits.filter(move |b| (first.0..end).contains(&b.0))
            })
    }

    /// Calls `found` with the runs `(first, count)` of those units of which any block is in the set. `blocks` is the size of
    /// a unit: a power of two from 16 blocks to a leaf.
    pub fn each_unit_run(&self, blocks: u64, mut found: impl FnMut(u64, u64)) {
        let mut run: Option<Range<u64>> = None;
        let mut add = |units: Range<u64>| match &mut run {
            Some(run) if units.start <= run.end => run.end = run.end.max(units.end),
            _ => {
                if let Some(done) = run.replace(units) {
                    found(done.start, done.end - done.start);
                }
            }
        };
        for (leaf, i) in self.leaves.iter().zip(0u64..) {
            let base = i * LEAF_BITS;
            match leaf {
                Leaf::None => {}
                Leaf::All => add(base / blocks..(base + LEAF_BITS) / blocks),
                Leaf::Some(bits) => {
                    for (word, w) in bits.words.iter().zip(0u64..).filter(|(word, _)| **word != 0) {
                        let mut at = base + w * 64;
                        let mut left = *word;
                        while left != 0 {
                            let skipped = u64::from(left.trailing_zeros());
                            let unit = (at + skipped) / blocks;
                            add(unit..unit + 1);
                            let next = (unit + 1) * blocks - at;
                            left = if next < 64 { left >> next } else { 0 };
                            at += next;
                        }
                    }
                }
            }
        }
        if let Some(done) = run {
            found(done.start, done.end - done.start);
        }
    }

    /// The blocks in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Block> + '_ {
        let leaves = self.leaves.iter().zip(0u64..).filter_map(|(leaf, i)| Some((leaf.words()?, i)));
        leaves.flat_map(|(words, i)| {
            words.iter().zip(0u64..).filter(|(word, _)| **word != 0).flat_map(move |(&word, w)| {
                let base = i * LEAF_BITS + w * 64;
                (0..64).filter(move |bit| word & (1 << bit) != 0).map(move |bit| Block(base + bit))
            })
        })
    }

    /// The set as byte ranges `(offset, length)`, neighbours joined, in ascending order.
    pub fn ranges(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        let mut blocks = self.iter().peekable();
        std::iter::from_fn(move || {
            let first = blocks.next()?;
            let mut end = first.0 + 1;
            while blocks.next_if(|b| b.0 == end).is_some() {
                end += 1;
            }
            Some((first.0 * BLOCK_SIZE, (end - first.0) * BLOCK_SIZE))
        })
    }

    fn words_at(&self, block: Block) -> Option<&Words> {
        self.leaves.get(index(block.0 / LEAF_BITS))?.words()
    }

    /// The leaves that a range of blocks touches, each with the bits of it that are in the range.
    fn leaves_of(&self, first: Block, count: u64) -> impl Iterator<Item = (usize, Range<u64>)> + use<> {
        let blocks = self.leaves.len() as u64 * LEAF_BITS;
        let (start, end) = (first.0.min(blocks), first.0.saturating_add(count).min(blocks));
        let leaves = if start < end { start / LEAF_BITS..end.div_ceil(LEAF_BITS) } else { 0..0 };
        leaves.map(move |leaf| {
            let base = leaf * LEAF_BITS;
            (index(leaf), start.max(base) - base..end.min(base + LEAF_BITS) - base)
        })
    }
}

impl Leaf {
    fn count(&self) -> u64 {
        match self {
            Self::None => 0,
            Self::Some(bits) => bits.set,
            Self::All => LEAF_BITS,
        }
    }

    fn words(&self) -> Option<&Words> {
        match self {
            Self::None => None,
            Self::Some(bits) => Some(&bits.words),
            Self::All => Some(&ALL),
        }
    }

    /// Sets these bits, and tells how many were not set.
    fn insert(&mut self, range: Range<u64>) -> u64 {
        if matches!(self, Self::None) && range.end - range.start == LEAF_BITS {
            *self = Self::All;
            return LEAF_BITS;
        }
        let mut bits = match std::mem::replace(self, Self::None) {
            Self::None => Box::new(Bits { set: 0, words: [0; LEAF_WORDS] }),
            Self::Some(bits) => bits,
            Self::All => {
                *self = Self::All;
                return 0;
            }
        };
        let before = bits.set;
        for (word, mask) in words_of(range) {
            bits.set += u64::from((mask & !bits.words[word]).count_ones());
            bits.words[word] |= mask;
        }
        let added = bits.set - before;
        *self = Self::of(bits);
        added
    }

    /// Sets the bits that another leaf has, and tells how many were not set.
    fn insert_all_of(&mut self, other: &Self) -> u64 {
        let Some(more) = other.words() else { return 0 };
        let before = self.count();
        let mut bits = match std::mem::replace(self, Self::None) {
            Self::None => Box::new(Bits { set: 0, words: [0; LEAF_WORDS] }),
            Self::Some(bits) => bits,
            Self::All => {
                *self = Self::All;
                return 0;
            }
        };
        for (word, more) in bits.words.iter_mut().zip(more) {
            *word |= more;
        }
        bits.set = bits.words.iter().map(|word| u64::from(word.count_ones())).sum();
        *self = Self::of(bits);
        self.count() - before
    }

    /// Clears these bits, and tells how many were set.
    fn remove(&mut self, range: Range<u64>) -> u64 {
        if range.end - range.start == LEAF_BITS {
            return std::mem::replace(self, Self::None).count();
        }
        let mut bits = match std::mem::replace(self, Self::None) {
            Self::None => return 0,
            Self::Some(bits) => bits,
            Self::All => Box::new(Bits { set: LEAF_BITS, words: ALL }),
        };
        let before = bits.set;
        for (word, mask) in words_of(range) {
            bits.set -= u64::from((mask & bits.words[word]).count_ones());
            bits.words[word] &= !mask;
        }
        let removed = before - bits.set;
        *self = Self::of(bits);
        removed
    }

    /// The leaf with these bits; without memory if it has none of them, or all.
    fn of(bits: Box<Bits>) -> Self {
        match bits.set {
            0 => Self::None,
            LEAF_BITS => Self::All,
            _ => Self::Some(bits),
        }
    }
}

/// The words of a leaf that a range of its bits touches, each with a mask of those bits.
fn words_of(range: Range<u64>) -> impl Iterator<Item = (usize, u64)> {
    (range.start / 64..range.end.div_ceil(64)).map(move |word| {
        let base = word * 64;
        let (from, to) = (range.start.max(base) - base, range.end.min(base + 64) - base);
        (index(word), (u64::MAX >> (64 - (to - from))) << from)
    })
}

/// An index that is beyond every vector where it does not fit the machine's word.
fn index(number: u64) -> usize {
    usize::try_from(number).unwrap_or(usize::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn it_behaves_as_a_set_of_numbers(steps in proptest::collection::vec((any::<bool>(), 0u64..100_000), 0..400)) {
            let mut map = BlockMap::new(100_000);
            let mut oracle = BTreeSet::new();
            for (insert, block) in steps {
                // Cluster the blocks so that removals hit.
                let block = block % 97 * 1031;
                if insert {
                    prop_assert_eq!(map.insert(Block(block)), oracle.insert(block));
                } else {
                    prop_assert_eq!(map.remove(Block(block)), oracle.remove(&block));
                }
                prop_assert_eq!(map.count(), oracle.len() as u64);
            }
            prop_assert!(map.iter().map(|b| b.0).eq(oracle.iter().copied()));
            prop_assert!((0..100_000).all(|b| map.contains(Block(b)) == oracle.contains(&b)));
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]

        #[test]
        fn ranges_do_what_their_blocks_one_by_one_would(
            steps in proptest::collection::vec((0u8..3, 0u64..3 * LEAF_BITS + 99, 0u64..12, any::<u16>()), 0..24),
        ) {
            let blocks = 3 * LEAF_BITS - 77;
            let (mut map, mut single) = (BlockMap::new(blocks), BlockMap::new(blocks));
            let mut other = BlockMap::new(blocks);
            for (what, start, size, some) in steps {
                // Borders of words and leaves, and ranges from one block to several leaves, beyond the end as well.
                let start = if some % 3 == 0 { start } else { start / LEAF_BITS * LEAF_BITS + u64::from(some) % 3 * 64 };
                let count = match size {
                    0 => u64::from(some),
                    1..5 => size * LEAF_BITS,
                    _ => u64::from(some) % 200,
                };
                let range = (start..start + count).map(Block);
                match what {
                    0 => prop_assert_eq!(map.remove_range(Block(start), count), range.map(|b| u64::from(single.remove(b))).sum::<u64>()),
                    1 => prop_assert_eq!(map.insert_range(Block(start), count), range.map(|b| u64::from(single.insert(b))).sum::<u64>()),
                    _ => {
                        other.insert_range(Block(start), count);
                        other.iter().for_each(|b| { single.insert(b); });
                        map.append(&mut other);
                        prop_assert!(other.is_empty());
                    }
                }
                prop_assert_eq!(map.count(), single.count());
                prop_assert_eq!(map.count(), map.iter().count() as u64);
                let kinds = |m: &BlockMap| m.leaves.iter().map(std::mem::discriminant).collect::<Vec<_>>();
                prop_assert_eq!(kinds(&map), kinds(&single), "an empty or full leaf takes no memory");
            }
            prop_assert!(map.iter().eq(single.iter()));
            for (first, count) in [(0, 3 * LEAF_BITS), (LEAF_BITS - 16, 32), (LEAF_BITS, LEAF_BITS), (2 * LEAF_BITS, 16)] {
                let is_any = (first..first + count).any(|b| single.contains(Block(b)));
                prop_assert_eq!(map.any_in(Block(first), count), is_any);
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn runs_of_units_and_blocks_of_a_range_are_those_of_the_blocks_one_by_one(
            ranges in proptest::collection::vec((0..3 * LEAF_BITS, 0u8..4, 0u64..200), 0..12),
            shift in 4u32..=14, from in 0..3 * LEAF_BITS, length in 0..2 * LEAF_BITS,
        ) {
            let (mut map, unit) = (BlockMap::new(3 * LEAF_BITS), 1u64 << shift);
            for (first, kind, count) in ranges {
                let count = if kind == 0 { count * 512 } else { count };
                map.insert_range(Block(first), count);
            }
            let mut units = BTreeSet::new();
            map.each_unit_run(unit, |first, count| units.extend(first..first + count));
            prop_assert_eq!(units, map.iter().map(|b| b.0 / unit).collect::<BTreeSet<_>>());
            let inside = map.iter().filter(|b| (from..from + length).contains(&b.0));
            prop_assert!(map.iter_in(Block(from), length).eq(inside));
        }
    }

    #[test]
    fn bytes_touch_every_block_they_overlap() {
        let mut map = BlockMap::new(1 << 20);
        map.insert_bytes(4095, 2);
        map.insert_bytes(1 << 30, 8192);
        map.insert_bytes(12288, 0);
        assert_eq!(map.ranges().collect::<Vec<_>>(), vec![(0, 8192), (1 << 30, 8192)]);
    }

    #[test]
    fn a_range_is_empty_exactly_when_none_of_its_blocks_is_there() {
        let mut map = BlockMap::new(1 << 20);
        map.insert(Block(LEAF_BITS + 79));
        assert!(map.any_in(Block(LEAF_BITS + 64), 16));
        assert!(map.any_in(Block(0), 2 * LEAF_BITS));
        assert!(!map.any_in(Block(LEAF_BITS + 80), 1024) && !map.any_in(Block(LEAF_BITS), 64));
    }

    #[test]
    fn a_set_grows_with_its_pool_and_keeps_what_it_has() {
        let mut map = BlockMap::new(10);
        map.insert(Block(3));
        map.resize(LEAF_BITS * 3);
        assert!(map.contains(Block(3)) && map.insert(Block(LEAF_BITS * 3 - 1)));
        map.resize(10);
        assert_eq!((map.count(), map.iter().collect::<Vec<_>>()), (1, vec![Block(3)]));
    }

    #[test]
    fn appending_joins_two_sets() {
        let (mut a, mut b) = (BlockMap::new(1 << 20), BlockMap::new(1 << 20));
        a.insert(Block(1));
        b.insert(Block(2));
        b.insert(Block(1));
        a.append(&mut b);
        assert_eq!((a.count(), b.count()), (2, 0));
    }

    #[test]
    fn blocks_beyond_the_pool_are_refused() {
        let mut map = BlockMap::new(10);
        assert!(!map.insert(Block(LEAF_BITS)));
        assert!(!map.contains(Block(u64::MAX)));
    }
}
