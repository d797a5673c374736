//! A sparse set of blocks: a directory of leaves, each a bitmap of 128 MiB of the pool.

use crate::pool::{BLOCK_SIZE, Block};

const LEAF_WORDS: usize = 512;
const LEAF_BITS: u64 = LEAF_WORDS as u64 * 64;

struct Leaf {
    set: u32,
    words: [u64; LEAF_WORDS],
}

/// A set of blocks. Memory: 8 bytes per 128 MiB of the pool, and 4 KiB for each 128 MiB that has a block in the set.
pub struct BlockMap {
    leaves: Vec<Option<Box<Leaf>>>,
    count: u64,
}

impl BlockMap {
    /// The empty set for a pool of `blocks` blocks.
    #[must_use]
    pub fn new(blocks: u64) -> Self {
        let leaves = usize::try_from(blocks.div_ceil(LEAF_BITS)).unwrap_or(usize::MAX);
        Self { leaves: std::iter::repeat_with(|| None).take(leaves).collect(), count: 0 }
    }

    /// The set for a pool that has another size from now on. Blocks beyond its end are to be taken out before.
    pub fn resize(&mut self, blocks: u64) {
        let leaves = usize::try_from(blocks.div_ceil(LEAF_BITS)).unwrap_or(usize::MAX);
        for leaf in self.leaves.iter().skip(leaves).flatten() {
            self.count -= u64::from(leaf.set);
        }
        self.leaves.resize_with(leaves, || None);
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

    fn place(block: Block) -> (usize, usize, u64) {
        let leaf = usize::try_from(block.0 / LEAF_BITS).unwrap_or(usize::MAX);
        let bit = block.0 % LEAF_BITS;
        (leaf, usize::try_from(bit / 64).unwrap_or(0), 1 << (bit % 64))
    }

    /// Whether `block` is in the set.
    #[must_use]
    pub fn contains(&self, block: Block) -> bool {
        let (leaf, word, mask) = Self::place(block);
        self.leaves.get(leaf).and_then(Option::as_ref).is_some_and(|l| l.words[word] & mask != 0)
    }

    /// Adds `block`; true if it was not there. Blocks beyond the pool are not added.
    pub fn insert(&mut self, block: Block) -> bool {
        let (leaf, word, mask) = Self::place(block);
        let Some(place) = self.leaves.get_mut(leaf) else { return false };
        let leaf = place.get_or_insert_with(|| Box::new(Leaf { set: 0, words: [0; LEAF_WORDS] }));
        let new = leaf.words[word] & mask == 0;
        if new {
            leaf.words[word] |= mask;
            leaf.set += 1;
            self.count += 1;
        }
        new
    }

    /// Adds every block that the `length` bytes from `offset` touch.
    pub fn insert_bytes(&mut self, offset: u64, length: u64) {
        for block in blocks_touched(offset, length) {
            self.insert(Block(block));
        }
    }

    /// Takes `block` out; true if it was there.
    pub fn remove(&mut self, block: Block) -> bool {
        let (index, word, mask) = Self::place(block);
        let Some(Some(leaf)) = self.leaves.get_mut(index) else { return false };
        let was = leaf.words[word] & mask != 0;
        if was {
            leaf.words[word] &= !mask;
            leaf.set -= 1;
            self.count -= 1;
            if leaf.set == 0 {
                self.leaves[index] = None;
            }
        }
        was
    }

    /// Whether any of the `count` blocks from `first` is in the set; both are multiples of 16.
    #[must_use]
    pub fn any_in(&self, first: Block, count: u64) -> bool {
        (first.0..first.0 + count).step_by(16).any(|block| {
            let (leaf, word, _) = Self::place(Block(block));
            let sixteen = 0xffff << (block % 64);
            self.leaves.get(leaf).and_then(Option::as_ref).is_some_and(|l| l.words[word] & sixteen != 0)
        })
    }

    /// Takes every block out.
    pub fn clear(&mut self) {
        if self.count > 0 {
            self.leaves.iter_mut().for_each(|leaf| *leaf = None);
            self.count = 0;
        }
    }

    /// Moves every block of `other` into this set, leaving `other` empty.
    pub fn append(&mut self, other: &mut Self) {
        if self.is_empty() {
            std::mem::swap(self, other);
        } else {
            for block in other.iter() {
                self.insert(block);
            }
        }
        other.clear();
    }

    /// The blocks in ascending order.
    pub fn iter(&self) -> impl Iterator<Item = Block> + '_ {
        let leaves = self.leaves.iter().zip(0u64..).filter_map(|(leaf, i)| Some((leaf.as_ref()?, i)));
        leaves.flat_map(|(leaf, i)| {
            leaf.words.iter().zip(0u64..).filter(|(word, _)| **word != 0).flat_map(move |(&word, w)| {
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
}

/// Indices of the blocks that the `length` bytes from `offset` touch.
fn blocks_touched(offset: u64, length: u64) -> std::ops::Range<u64> {
    if length == 0 {
        return 0..0;
    }
    offset / BLOCK_SIZE..(offset + length).div_ceil(BLOCK_SIZE)
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
