//! Slot memory, as the side sees it that writes to it: windows that the peer has lent, of which each write takes some
//! pages until the peer has dealt with the data. The same map shares out a connection's own memory for copies.

use std::collections::HashMap;

use super::packet::{Grant, UNIT};
use super::{MAX_WINDOW, MAX_WINDOWS};

const PAGE: usize = 4096;
const PAGES: usize = MAX_WINDOW as usize / PAGE;

/// Which pages of a piece of memory are taken.
pub(super) struct PageMap {
    /// One bit for each page; those beyond the end are taken for good.
    taken: [u64; PAGES / 64],
    free: usize,
    pages: usize,
    /// Where the next search begins, so that memory is used in turn.
    cursor: usize,
}

impl PageMap {
    /// A map of `length` bytes, in whole pages, at most a window.
    pub(super) fn new(length: usize) -> Self {
        let pages = (length / PAGE).min(PAGES);
        Self { taken: [0; PAGES / 64], free: pages, pages, cursor: 0 }
    }

    fn is_taken(&self, page: usize) -> bool {
        self.taken[page / 64] & 1 << (page % 64) != 0
    }

    /// Takes pages for `length` bytes in a row; returns where they begin.
    pub(super) fn take(&mut self, length: usize) -> Option<usize> {
        let wanted = length.div_ceil(PAGE).max(1);
        if wanted > self.free {
            return None;
        }
        let first =
            self.find(self.cursor, self.pages, wanted).or_else(|| self.find(0, self.pages, wanted))?;
        self.mark(first, wanted);
        self.cursor = if first + wanted == self.pages { 0 } else { first + wanted };
        Some(first * PAGE)
    }

    fn find(&self, from: usize, to: usize, wanted: usize) -> Option<usize> {
        let mut run = 0;
        for page in from..to {
            run = if self.is_taken(page) { 0 } else { run + 1 };
            if run == wanted {
                return Some(page + 1 - wanted);
            }
        }
        None
    }

    fn mark(&mut self, first: usize, count: usize) {
        for page in first..first + count {
            self.taken[page / 64] |= 1 << (page % 64);
        }
        self.free -= count;
    }

    /// Takes the pages of `length` bytes from `offset`, if they are all there and free.
    pub(super) fn take_at(&mut self, offset: usize, length: usize) -> bool {
        let (first, count) = (offset / PAGE, length.div_ceil(PAGE));
        let fits = offset.is_multiple_of(PAGE)
            && first + count <= self.pages
            && (first..first + count).all(|page| !self.is_taken(page));
        if fits {
            self.mark(first, count);
        }
        fits
    }

    /// Gives back what [`PageMap::take`] or [`PageMap::take_at`] took.
    pub(super) fn give_back(&mut self, offset: usize, length: usize) {
        let (first, count) = (offset / PAGE, length.div_ceil(PAGE).max(1));
        for page in first..(first + count).min(self.pages) {
            if self.is_taken(page) {
                self.taken[page / 64] &= !(1 << (page % 64));
                self.free += 1;
            }
        }
    }

    pub(super) const fn is_free(&self) -> bool {
        self.free == self.pages
    }
}

struct Window {
    grant: Grant,
    map: PageMap,
    /// Something was written to it since the last beat.
    is_used: bool,
}

/// Where a write goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Slot {
    /// Remote address and key.
    pub(super) address: u64,
    pub(super) key: u32,
    /// What the peer is told: window, and where the tail begins.
    pub(super) mark: u32,
}

/// Windows lent by the peer.
#[derive(Default)]
pub(super) struct Windows {
    windows: Vec<Window>,
    /// What is taken, by mark: the window, where, and how much.
    taken: HashMap<u32, (u16, usize, usize)>,
}

/// A peer that breaks the rules, in words.
pub(super) type Broken = &'static str;

impl Windows {
    /// Notes a window that was lent.
    pub(super) fn add(&mut self, grant: Grant) -> Result<(), Broken> {
        if self.windows.len() >= MAX_WINDOWS || self.windows.iter().any(|w| w.grant.window == grant.window) {
            return Err("a window that was lent already, or one too many");
        }
        let map = PageMap::new(grant.length as usize);
        self.windows.push(Window { grant, map, is_used: true });
        Ok(())
    }

    /// Takes room for a write with `data` bytes and a tail behind them, `tail` in all.
    pub(super) fn take(&mut self, data: usize, tail: usize) -> Option<Slot> {
        let length = data + tail;
        for window in &mut self.windows {
            let Some(offset) = window.map.take(length) else { continue };
            window.is_used = true;
            let grant = &window.grant;
            let position = u16::try_from((offset + data) / UNIT).unwrap_or(u16::MAX);
            let mark = u32::from(grant.window) << 16 | u32::from(position);
            self.taken.insert(mark, (grant.window, offset, length));
            return Some(Slot { address: grant.address.wrapping_add(offset as u64), key: grant.key, mark });
        }
        None
    }

    /// Frees what a mark stands for.
    pub(super) fn release(&mut self, mark: u32) -> Result<(), Broken> {
        let (window, offset, length) =
            self.taken.remove(&mark).ok_or("a slot was released that is not in use")?;
        if let Some(window) = self.windows.iter_mut().find(|w| w.grant.window == window) {
            window.map.give_back(offset, length);
        }
        Ok(())
    }

    /// Takes out the windows that were not used since the last call. When that is all of them the smallest one stays.
    pub(super) fn take_idle(&mut self, idle: &mut Vec<u16>) {
        let is_idle = |window: &Window| !window.is_used && window.map.is_free();
        let smallest = self.windows.iter().min_by_key(|window| window.grant.length);
        let kept = smallest.filter(|_| self.windows.iter().all(is_idle)).map(|window| window.grant.window);
        self.windows.retain_mut(|window| {
            let stays = !is_idle(window) || kept == Some(window.grant.window);
            window.is_used = false;
            if !stays {
                idle.push(window.grant.window);
            }
            stays
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn grant(window: u16, length: u32) -> Grant {
        Grant { window, length, key: 9, address: 0x1000_0000 * (u64::from(window) + 1) }
    }

    #[test]
    fn pages_are_given_out_once_and_come_back() {
        let mut map = PageMap::new(64 << 10);
        let first = map.take(4096 + 96).unwrap();
        let second = map.take(4096 * 14).unwrap();
        assert_eq!((first, second), (0, 8192));
        assert_eq!(map.take(1), None);
        assert!(!map.take_at(0, 4096));
        map.give_back(first, 4096 + 96);
        assert_eq!(map.take(8193), None, "three pages are not there in a row");
        assert!(map.take_at(4096, 4096));
        assert_eq!(map.take(4096), Some(0));
        map.give_back(0, 4096);
        map.give_back(4096, 4096);
        map.give_back(second, 4096 * 14);
        assert!(map.is_free());
        assert!(!map.take_at(60 << 10, 8192), "beyond the end");
        assert!(!map.take_at(100, 96), "not at a page");
    }

    #[test]
    fn a_slot_names_where_its_tail_begins_and_is_free_again_when_released() {
        let mut windows = Windows::default();
        assert_eq!(windows.take(4096, 96), None);
        windows.add(grant(2, 64 << 10)).unwrap();
        assert!(windows.add(grant(2, 64 << 10)).is_err());
        let slots: Vec<_> = std::iter::from_fn(|| windows.take(4096, 96)).collect();
        assert_eq!(slots.len(), 8);
        assert_eq!(slots[1].address, 0x3000_0000 + 8192);
        assert_eq!(slots[1].mark, (2 << 16) + (8192 + 4096) / 16);
        windows.release(slots[1].mark).unwrap();
        assert!(windows.release(slots[1].mark).is_err());
        assert_eq!(windows.take(4096, 96), Some(slots[1]));
        assert_eq!(windows.take(4096, 96), None);
    }

    #[test]
    fn windows_that_are_idle_go_back_and_one_stays() {
        let mut windows = Windows::default();
        for window in 0..3 {
            windows.add(grant(window, 64 << 10)).unwrap();
        }
        let mut idle = Vec::new();
        windows.take_idle(&mut idle);
        assert!(idle.is_empty(), "they are new");
        let slot = windows.take(4096, 96).unwrap();
        windows.take_idle(&mut idle);
        assert_eq!(idle, [1, 2]);
        windows.take_idle(&mut idle);
        windows.release(slot.mark).unwrap();
        windows.take_idle(&mut idle);
        assert_eq!(idle, [1, 2], "the last one stays");
    }

    #[test]
    fn of_windows_that_are_all_idle_the_smallest_one_stays() {
        let mut windows = Windows::default();
        for (window, length) in [(0, 128 << 10), (1, 64 << 10), (2, 1 << 20)] {
            windows.add(grant(window, length)).unwrap();
        }
        let mut idle = Vec::new();
        windows.take_idle(&mut idle);
        windows.take_idle(&mut idle);
        assert_eq!(idle, [0, 2]);
    }
}
