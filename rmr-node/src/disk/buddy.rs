//! A buddy allocator over page numbers: blocks of 1, 2, 4 … 256 pages, each aligned to its own size, in constant time.
//! It hands out numbers and knows nothing of memory.

use thiserror::Error;

/// Largest block: `1 << MAX_ORDER` pages, 1 MiB in pages of 4 KiB.
pub(super) const MAX_ORDER: u8 = 8;

const NONE: u32 = u32::MAX;
/// State of a page that is not the first of a free block.
const NOT_FREE: u8 = u8::MAX;

/// A number that was given back is not that of a block in use.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
#[error("page {0} does not begin a block that is in use")]
pub(super) struct NotInUse(pub(super) u32);

/// See the module's comment. Free blocks of one order form a doubly linked list through `links`.
#[derive(Debug)]
pub(super) struct Buddy {
    /// Order of the free block that begins at this page, or `NOT_FREE`.
    free_order: Vec<u8>,
    /// Order of the block in use that begins at this page, or `NOT_FREE`.
    used_order: Vec<u8>,
    links: Vec<[u32; 2]>,
    heads: [u32; MAX_ORDER as usize + 1],
    /// Bit `n`: there are free blocks of order `n`.
    available: u16,
    free_pages: u32,
}

impl Buddy {
    /// All of `blocks` blocks of the largest order, free.
    pub(super) fn new(blocks: u32) -> Self {
        let pages = (blocks as usize) << MAX_ORDER;
        let mut buddy = Self {
            free_order: vec![NOT_FREE; pages],
            used_order: vec![NOT_FREE; pages],
            links: vec![[NONE; 2]; pages],
            heads: [NONE; MAX_ORDER as usize + 1],
            available: 0,
            free_pages: blocks << MAX_ORDER,
        };
        for block in (0..blocks).rev() {
            buddy.push(block << MAX_ORDER, MAX_ORDER);
        }
        buddy
    }

    /// Takes a block of `1 << order` pages; gives its first page.
    pub(super) fn take(&mut self, order: u8) -> Option<u32> {
        let enough = self.available & (u16::MAX << order);
        if order > MAX_ORDER || enough == 0 {
            return None;
        }
        let mut found = u8::try_from(enough.trailing_zeros()).expect("below 16");
        let page = self.heads[usize::from(found)];
        self.unlink(page, found);
        while found > order {
            found -= 1;
            self.push(page + (1 << found), found);
        }
        self.used_order[page as usize] = order;
        self.free_pages -= 1 << order;
        Some(page)
    }

    /// Order of the largest free block.
    pub(super) fn largest(&self) -> Option<u8> {
        self.available.checked_ilog2().and_then(|order| u8::try_from(order).ok())
    }

    /// Gives a block back and joins it with its free neighbours.
    pub(super) fn give_back(&mut self, page: u32) -> Result<(), NotInUse> {
        let used = self.used_order.get_mut(page as usize).ok_or(NotInUse(page))?;
        let mut order = std::mem::replace(used, NOT_FREE);
        if order == NOT_FREE {
            return Err(NotInUse(page));
        }
        self.free_pages += 1 << order;
        let mut page = page;
        while order < MAX_ORDER {
            let neighbour = page ^ (1 << order);
            if self.free_order[neighbour as usize] != order {
                break;
            }
            self.unlink(neighbour, order);
            page = page.min(neighbour);
            order += 1;
        }
        self.push(page, order);
        Ok(())
    }

    pub(super) const fn free_pages(&self) -> u32 {
        self.free_pages
    }

    fn push(&mut self, page: u32, order: u8) {
        let head = &mut self.heads[usize::from(order)];
        let next = std::mem::replace(head, page);
        self.links[page as usize] = [NONE, next];
        if next != NONE {
            self.links[next as usize][0] = page;
        }
        self.free_order[page as usize] = order;
        self.available |= 1 << order;
    }

    fn unlink(&mut self, page: u32, order: u8) {
        let [previous, next] = self.links[page as usize];
        match previous {
            NONE => self.heads[usize::from(order)] = next,
            _ => self.links[previous as usize][1] = next,
        }
        if next != NONE {
            self.links[next as usize][0] = previous;
        }
        self.free_order[page as usize] = NOT_FREE;
        if self.heads[usize::from(order)] == NONE {
            self.available &= !(1 << order);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Which pages are taken, and nothing else: a block of an order can be had when some aligned run is free, because a
    /// buddy allocator keeps free neighbours joined.
    struct Oracle(Vec<bool>);

    impl Oracle {
        fn has_free(&self, order: u8) -> bool {
            self.0.chunks(1 << order).any(|run| run.iter().all(|taken| !taken))
        }

        fn set(&mut self, page: u32, order: u8, taken: bool) {
            for slot in &mut self.0[page as usize..(page as usize + (1 << order))] {
                assert_ne!(*slot, taken, "page given out twice or given back twice");
                *slot = taken;
            }
        }
    }

    proptest! {
        #[test]
        fn it_agrees_with_a_naive_oracle(steps in prop::collection::vec((any::<bool>(), 0u8..=8, any::<prop::sample::Index>()), 1..400)) {
            let mut buddy = Buddy::new(3);
            let mut oracle = Oracle(vec![false; 3 << MAX_ORDER]);
            let mut held: Vec<(u32, u8)> = Vec::new();
            for (take, order, pick) in steps {
                if take {
                    let could = oracle.has_free(order);
                    let got = buddy.take(order);
                    prop_assert_eq!(got.is_some(), could);
                    if let Some(page) = got {
                        prop_assert_eq!(page % (1 << order), 0);
                        oracle.set(page, order, true);
                        held.push((page, order));
                    }
                } else if !held.is_empty() {
                    let (page, order) = held.swap_remove(pick.index(held.len()));
                    buddy.give_back(page).unwrap();
                    oracle.set(page, order, false);
                    prop_assert_eq!(buddy.give_back(page), Err(NotInUse(page)));
                }
                let free = oracle.0.iter().filter(|taken| !**taken).count();
                prop_assert_eq!(buddy.free_pages() as usize, free);
                let largest = (0..=MAX_ORDER).rev().find(|&o| oracle.has_free(o));
                prop_assert_eq!(buddy.largest(), largest);
            }
            for (page, _) in held {
                buddy.give_back(page).unwrap();
            }
            prop_assert_eq!((buddy.free_pages(), buddy.largest()), (3 << MAX_ORDER, Some(MAX_ORDER)));
        }
    }

    #[test]
    fn numbers_out_of_range_are_refused() {
        let mut buddy = Buddy::new(1);
        assert_eq!(buddy.give_back(9999), Err(NotInUse(9999)));
        assert_eq!(buddy.take(9), None);
    }
}
