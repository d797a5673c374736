//! What a coordinator says that members have missed, until it is on record: one set of blocks for each member.
//!
//! A coordinator may send any number of messages with additions before the last one, and each range may cover the whole
//! pool. Merged into sets of blocks they cost what the maps of the pool cost, and no more: 16 bytes for each 128 MiB of the
//! pool and member, and at most 4 KiB more where some blocks of these are in the set and some are not. To put the sets on
//! record costs a pass over the maps, however many ranges there were.

use crate::map::{BlockMap, MapPage, MemberMaps};
use crate::pool::{BLOCK_SIZE, Block, MAX_MEMBERS, MemberId, MemberSet};
use crate::wire::DirtyAddition;

#[derive(Default)]
pub(super) struct Additions([Option<BlockMap>; MAX_MEMBERS]);

impl Additions {
    /// Takes in a list, for a pool of `size` bytes with these members. Additions for others are of no use: a member that
    /// is not in the view is forgotten with it.
    pub(super) fn merge(&mut self, list: &[DirtyAddition], members: MemberSet, size: u64) {
        let blocks = size.div_ceil(BLOCK_SIZE);
        for member in members.iter() {
            // Joined first: ranges that cover one another many times would be set many times.
            let mut ranges: Vec<(u64, u64)> = list
                .iter()
                .filter(|a| a.members.contains(member) && a.offset < size)
                .map(|a| {
                    (a.offset / BLOCK_SIZE, a.offset.saturating_add(a.length).min(size).div_ceil(BLOCK_SIZE))
                })
                .collect();
            if ranges.is_empty() {
                continue;
            }
            ranges.sort_unstable();
            let map = self.0[member.index()].get_or_insert_with(|| BlockMap::new(blocks));
            map.resize_to_hold(blocks);
            let (mut first, mut end) = ranges[0];
            for (next, next_end) in ranges.into_iter().skip(1) {
                if next <= end {
                    end = end.max(next_end);
                } else {
                    map.insert_range(Block(first), end - first);
                    (first, end) = (next, next_end);
                }
            }
            map.insert_range(Block(first), end - first);
        }
    }

    /// Puts everything on record, and keeps it.
    pub(super) fn record(&mut self, maps: &mut MemberMaps, changed: &mut Vec<MapPage>) {
        for member in MemberId::all() {
            if let Some(missed) = &mut self.0[member.index()] {
                // An earlier message may have been for a larger pool that came to nothing.
                missed.remove_range(Block(maps.block_count()), u64::MAX);
                maps.set_dirty_blocks(member, missed, changed);
            }
        }
    }

    /// Forgets everything, and gives the memory back.
    pub(super) fn clear(&mut self) {
        *self = Self::default();
    }

    /// How many blocks are in the sets.
    #[cfg(test)]
    pub(super) fn blocks(&self) -> u64 {
        self.0.iter().flatten().map(BlockMap::count).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    const SIZE: u64 = 1 << 20;

    proptest! {
        #[test]
        fn trains_of_additions_are_the_union_of_their_ranges(
            trains in proptest::collection::vec(
                proptest::collection::vec((any::<u8>(), any::<u64>(), 1u64.., 0u8..3), 0..20), 0..5),
        ) {
            let mut additions = Additions::default();
            let mut oracle: [BTreeSet<u64>; MAX_MEMBERS] = Default::default();
            let known = MemberSet(0b0000_1110);
            for train in trains {
                let list: Vec<_> = train.into_iter().map(|(members, offset, length, kind)| {
                    let offset = if kind == 0 { offset } else { offset % (2 * SIZE) };
                    let length = if kind == 1 { length } else { length % SIZE + 1 };
                    DirtyAddition { members: MemberSet(members), offset, length }
                }).collect();
                for a in &list {
                    for member in a.members.intersection(known).iter().filter(|_| a.offset < SIZE) {
                        let end = a.offset.saturating_add(a.length).min(SIZE).div_ceil(4096);
                        oracle[member.index()].extend(a.offset / 4096..end);
                    }
                }
                additions.merge(&list, known, SIZE);
            }
            for member in MemberId::all() {
                let found: BTreeSet<u64> =
                    additions.0[member.index()].iter().flat_map(BlockMap::iter).map(|b| b.0).collect();
                prop_assert_eq!(&found, &oracle[member.index()]);
            }
        }
    }

    #[test]
    fn any_number_of_ranges_over_the_whole_pool_cost_one_pass_over_it() {
        let size = 1 << 40;
        let whole = DirtyAddition { members: MemberSet(0xfe), offset: 4096, length: size - 8192 };
        let list = vec![whole; crate::wire::SetView::MAX_ADDITIONS];
        let start = std::time::Instant::now();
        let mut additions = Additions::default();
        for _ in 0..16 {
            additions.merge(&list, MemberSet(0xff), size);
        }
        assert_eq!(additions.blocks(), 7 * (size / 4096 - 2));
        // Each of these ranges set by itself takes more than an hour.
        assert!(start.elapsed().as_secs() < 60, "{:?}", start.elapsed());
        additions.clear();
        assert_eq!(additions.blocks(), 0);
    }
}
