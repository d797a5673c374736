//! Buffers that are lent to clients over RDMA, who write their data straight into them: how much each gets, and what
//! becomes of it.

use std::rc::Rc;
use std::time::Duration;

use rmr_common::buffer::Segment;
use rmr_common::time::Time;
use rmr_common::transport::rdma::{MAX_WINDOW, MAX_WINDOWS, MIN_WINDOW};

use crate::disk::{Buffer, BufferPool, Part, Payload, Returned};

/// Windows do not grow into the last quarter of the buffers.
pub(super) const RESERVE_PART: usize = 4;
/// Most windows of a client, but for those that it could not go on without: each of these is larger than all others, so there
/// are no more than five.
const MOST_LENT: usize = MAX_WINDOWS - 16;
/// A want of memory that lasts so long is told.
const LONG_SHORTAGE: Duration = Duration::from_secs(1);

/// For how long those who wait for memory have waited, and whether operators were told.
#[derive(Default)]
pub(super) struct Shortage {
    since: Option<Time>,
    told: bool,
}

impl Shortage {
    /// Whether it is time to tell: once for each want that lasts.
    pub(super) fn is_due(&mut self, is_short: bool, now: Time) -> bool {
        if !is_short {
            *self = Self::default();
            return false;
        }
        let since = *self.since.get_or_insert(now);
        now - since > LONG_SHORTAGE && !std::mem::replace(&mut self.told, true)
    }
}

/// What one client was lent.
#[derive(Default)]
pub(super) struct Windows {
    lent: Vec<(u16, Rc<Buffer>)>,
    bytes: usize,
    next: u16,
    /// Pieces of this size and more could not be lent lately: the card has no further key, or cannot pin so much.
    refused: Option<usize>,
    /// Operators were told.
    told: bool,
    /// Data that disks have dealt with, by mark.
    returned: Returned,
}

/// Whether a client could be lent what it wants.
pub(super) enum Lending {
    /// This window, for this memory.
    Lent(u16, Segment),
    /// It has its share, or as much as can be had, and may go on when it has used that.
    HasShare,
    /// There is no memory for what it cannot do without.
    NoMemory,
}

impl Windows {
    /// Lends memory to a client that waits for `wanted` bytes in a row: as much as it has, so that it doubles; less when
    /// that is not to be had, down to a quarter; and beyond that, or beyond `share` bytes, only what it cannot do without.
    ///
    /// There is a bound for the number of windows as well, beyond which a client has its share.
    ///
    /// A reserve is left for all else that needs buffers, reads first: lent memory does not come back for as long as its
    /// client writes. Only a window without which a client could not go on may take some of the reserve, and only a
    /// client's first one all of it.
    pub(super) fn lend(&mut self, wanted: u32, share: usize, buffers: &BufferPool) -> Lending {
        let most = MAX_WINDOW as usize;
        let needed = Self::needed(wanted);
        let largest = self.lent.iter().map(|(_, buffer)| buffer.length()).max().unwrap_or(0);
        let generous = self.bytes.next_power_of_two().clamp(needed, most);
        // Memory lies in pieces when all kinds of requests have used it. Many small windows that stay would keep it so.
        let sizes = [generous, (generous / 2).max(needed), (generous / 4).max(needed), needed];
        let (free, reserve) = (buffers.free_bytes(), buffers.total_bytes() / RESERVE_PART);
        let vital = (largest < needed).then_some(needed);
        let allowed = |size: &usize| {
            let is_vital = vital == Some(*size);
            if *size < generous / 4 && !is_vital {
                return false;
            }
            let left = match (is_vital, self.lent.is_empty()) {
                (true, true) => 0,
                (true, false) => reserve / 2,
                (false, _) => reserve,
            };
            let has_share = self.bytes + *size > share || self.lent.len() >= MOST_LENT;
            let is_refused = self.refused.is_some_and(|refused| *size >= refused);
            !is_refused && (!has_share || is_vital) && (left == 0 || free >= *size + left)
        };
        let mut is_stuck = false;
        for size in sizes.into_iter().filter(allowed) {
            is_stuck |= vital == Some(size);
            if let Some(buffer) = buffers.try_acquire(size) {
                return self.note(buffer);
            }
        }
        if is_stuck { Lending::NoMemory } else { Lending::HasShare }
    }

    fn note(&mut self, buffer: Buffer) -> Lending {
        while self.lent.iter().any(|(window, _)| *window == self.next) {
            self.next = self.next.wrapping_add(1);
        }
        let (window, segment) = (self.next, buffer.segment());
        self.bytes += buffer.length();
        self.lent.push((window, Rc::new(buffer)));
        self.next = self.next.wrapping_add(1);
        Lending::Lent(window, segment)
    }

    /// How much the client was lent.
    pub(super) const fn bytes(&self) -> usize {
        self.bytes
    }

    /// Data that a client has written to a window, for a disk.
    pub(super) fn written(&self, window: u16, offset: u32, length: u32, mark: u32) -> Option<Payload> {
        let (_, memory) = self.lent.iter().find(|(w, _)| *w == window)?;
        Part::new(memory, offset as usize, length as usize, mark, &self.returned).map(Payload::Part)
    }

    fn needed(wanted: u32) -> usize {
        (wanted as usize).clamp(MIN_WINDOW as usize, MAX_WINDOW as usize).next_power_of_two()
    }

    /// A window could not be lent after all. Smaller ones may be, and this size again after [`Windows::try_again`].
    pub(super) fn refuse(&mut self, window: u16) {
        self.refused = self.lent.iter().find(|(w, _)| *w == window).map(|(_, buffer)| buffer.length());
        self.remove(window);
    }

    /// Whether a client that wants so much can go on with what it was lent.
    pub(super) fn suffices(&self, wanted: u32) -> bool {
        self.lent.iter().any(|(_, buffer)| buffer.length() >= Self::needed(wanted))
    }

    /// Whether operators are to be told that a client has to do with what it was lent: once.
    pub(super) fn tell(&mut self) -> bool {
        !std::mem::replace(&mut self.told, true)
    }

    /// What could not be lent may be by now.
    pub(super) fn try_again(&mut self) {
        self.refused = None;
    }

    /// A client has given a window back.
    pub(super) fn take_back(&mut self, window: u16) {
        self.remove(window);
        self.try_again();
    }

    fn remove(&mut self, window: u16) {
        if let Some(index) = self.lent.iter().position(|(w, _)| *w == window) {
            let (_, buffer) = self.lent.swap_remove(index);
            self.bytes -= buffer.length();
        }
    }

    /// Moves out the marks of data that was dealt with.
    pub(super) fn dealt_with(&mut self, mut tell: impl FnMut(u32)) {
        for mark in self.returned.borrow_mut().drain(..) {
            tell(mark);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lent(lending: &Lending) -> usize {
        match lending {
            Lending::Lent(_, segment) => segment.length(),
            Lending::HasShare | Lending::NoMemory => 0,
        }
    }

    #[test]
    fn windows_double_up_to_the_share_and_a_large_request_gets_one_beyond_it() {
        let buffers = BufferPool::new(8 << 20).unwrap();
        let mut windows = Windows::default();
        let mut sizes = Vec::new();
        loop {
            match lent(&windows.lend(4192, 512 << 10, &buffers)) {
                0 => break,
                size => sizes.push(size >> 10),
            }
        }
        assert_eq!(sizes, [64, 64, 128, 256], "KiB");
        assert!(matches!(windows.lend(4192, 512 << 10, &buffers), Lending::HasShare));
        assert_eq!(lent(&windows.lend((256 << 10) + 96, 512 << 10, &buffers)), 512 << 10);
        assert!(matches!(windows.lend((256 << 10) + 96, 512 << 10, &buffers), Lending::HasShare));
    }

    #[test]
    fn a_reserve_is_left_for_reads_however_many_clients_write() {
        let buffers = BufferPool::new(8 << 20).unwrap();
        let mut clients: Vec<Windows> = (0..6).map(|_| Windows::default()).collect();
        for _ in 0..20 {
            for windows in &mut clients {
                windows.lend(4192, 4 << 20, &buffers);
            }
        }
        assert!(buffers.free_bytes() >= 2 << 20, "{} bytes are free", buffers.free_bytes());
        assert!(matches!(clients[0].lend(4192, 4 << 20, &buffers), Lending::HasShare));
        // What cannot go on otherwise may have some of it, and a client that has nothing yet all.
        let small = &mut Windows::default();
        assert_eq!(lent(&small.lend(4192, 4 << 20, &buffers)), 64 << 10);
        assert_eq!(lent(&small.lend(700 << 10, 4 << 20, &buffers)), 0, "half of the reserve stays");
        assert_eq!(lent(&small.lend(200 << 10, 4 << 20, &buffers)), 256 << 10);
        assert_eq!(lent(&Windows::default().lend(700 << 10, 4 << 20, &buffers)), 1 << 20);
    }

    #[test]
    fn a_client_is_not_lent_crumbs_of_memory_that_lies_in_pieces() {
        let buffers = BufferPool::new(8 << 20).unwrap();
        let mut windows = Windows::default();
        while windows.bytes() < 1 << 20 {
            windows.lend(4192, 8 << 20, &buffers);
        }
        // All else is taken, 64 KiB at a time, and of each half MiB one piece stays so.
        let mut others: Vec<_> = std::iter::from_fn(|| buffers.try_acquire(64 << 10)).collect();
        let mut turn = 0;
        others.retain(|_| {
            turn += 1;
            turn % 8 == 0
        });
        let free = buffers.free_bytes();
        assert!(free >= 6 << 20, "{free} bytes are free, and no MiB in a row");
        assert_eq!(lent(&windows.lend(4192, 8 << 20, &buffers)) >> 10, 256);
        let small = &mut Windows::default();
        assert_eq!(lent(&small.lend(4192, 8 << 20, &buffers)) >> 10, 64);
        // It goes on with what it has, and nobody waits for the sake of it.
        let mut turn = 0;
        let mut more: Vec<_> = std::iter::from_fn(|| buffers.try_acquire(128 << 10)).collect();
        more.retain(|_| {
            turn += 1;
            turn % 2 == 0
        });
        assert!(matches!(windows.lend(4192, 8 << 20, &buffers), Lending::HasShare));
    }

    #[test]
    fn the_number_of_windows_has_a_bound_that_only_a_larger_request_exceeds() {
        let buffers = BufferPool::new(32 << 20).unwrap();
        let mut windows = Windows::default();
        for _ in 0..MOST_LENT {
            windows.note(buffers.try_acquire(64 << 10).unwrap());
        }
        assert!(matches!(windows.lend(4192, 32 << 20, &buffers), Lending::HasShare));
        for _ in 0..10 {
            windows.lend(70 << 10, 32 << 20, &buffers);
            windows.lend(1 << 20, 32 << 20, &buffers);
        }
        assert_eq!(windows.lent.len(), MOST_LENT + 2, "one of 128 KiB, one of 1 MiB");
        assert!(windows.lent.len() <= MAX_WINDOWS);
    }

    #[test]
    fn a_client_goes_on_with_smaller_windows_or_those_that_it_has_if_they_suffice() {
        let buffers = BufferPool::new(8 << 20).unwrap();
        let mut windows = Windows::default();
        let lend = |windows: &mut Windows, wanted| match windows.lend(wanted, 4 << 20, &buffers) {
            Lending::Lent(window, memory) => Some((window, memory.length() >> 10)),
            Lending::HasShare | Lending::NoMemory => None,
        };
        for size in [64, 64, 128] {
            assert_eq!(lend(&mut windows, 4192).unwrap().1, size);
        }
        // The card takes no 256 KiB, and then less and less.
        for expected in [256, 128, 64] {
            let (window, size) = lend(&mut windows, 4192).unwrap();
            assert_eq!(size, expected);
            windows.refuse(window);
        }
        assert_eq!((lend(&mut windows, 4192), windows.bytes()), (None, 256 << 10));
        assert!(windows.suffices(4192) && windows.suffices(128 << 10) && !windows.suffices((128 << 10) + 1));
        assert!(windows.tell() && !windows.tell());
        windows.try_again();
        assert_eq!(lend(&mut windows, 4192).unwrap().1, 256);
        assert_eq!(buffers.free_bytes(), (8 << 20) - (512 << 10), "what was refused is free");
    }

    #[test]
    fn a_want_of_memory_is_told_once_and_only_when_it_lasts() {
        let (mut shortage, start) = (Shortage::default(), Time(5));
        let at = |ms| start + Duration::from_millis(ms);
        assert!(!shortage.is_due(true, at(0)) && !shortage.is_due(true, at(900)));
        assert!(!shortage.is_due(false, at(950)));
        assert!(!shortage.is_due(true, at(1000)) && !shortage.is_due(true, at(2000)));
        assert!(shortage.is_due(true, at(2001)));
        assert!(!shortage.is_due(true, at(3000)));
    }

    #[test]
    fn no_memory_is_told_from_no_share_and_what_comes_back_is_free() {
        let buffers = BufferPool::new(1 << 20).unwrap();
        let held = buffers.try_acquire(1 << 20).unwrap();
        let mut windows = Windows::default();
        assert!(matches!(windows.lend(4192, 1 << 20, &buffers), Lending::NoMemory));
        drop(held);
        let Lending::Lent(window, _) = windows.lend(4192, 1 << 20, &buffers) else { panic!("no window") };
        let data = windows.written(window, 4096, 4096, 9).unwrap();
        windows.take_back(window);
        assert_eq!(buffers.free_bytes(), (1 << 20) - (64 << 10), "the disk has the data still");
        drop(data);
        assert_eq!(buffers.free_bytes(), 1 << 20);
        let mut marks = Vec::new();
        windows.dealt_with(|mark| marks.push(mark));
        assert_eq!(marks, [9]);
        assert!(windows.written(window, 0, 4096, 1).is_none());
    }
}
