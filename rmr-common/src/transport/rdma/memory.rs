//! Memory that a connection itself gives to the network card: pages of its own, seen by Rust only in copies or while the
//! card has no business with them. This file holds the pointers.
#![allow(unsafe_code)]

use std::io;
use std::ptr::NonNull;

use crate::buffer::Segment;

/// Anonymous pages, zero at first, touched at once so that pinning them is quick.
pub(super) struct Pages {
    base: NonNull<u8>,
    length: usize,
}

// SAFETY: plain memory without any tie to a thread; access is ordered by whoever owns it (see the methods).
unsafe impl Send for Pages {}
// SAFETY: as above; `&Pages` gives out copies and segments, and slices only under the promise of `bytes`.
unsafe impl Sync for Pages {}

impl Pages {
    /// At least `length` bytes, in whole pages.
    pub(super) fn new(length: usize) -> io::Result<Self> {
        let length = length.max(1).next_multiple_of(4096);
        let (protection, flags) = (
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_POPULATE,
        );
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base =
            NonNull::new(base.cast::<u8>()).ok_or_else(|| io::Error::other("mmap gave address zero"))?;
        // A child of a fork would share them copy-on-write, and the card would go on with the wrong copy.
        // SAFETY: the range was mapped just above.
        unsafe { libc::madvise(base.as_ptr().cast(), length, libc::MADV_DONTFORK) };
        Ok(Self { base, length })
    }

    /// `length` bytes from `offset` as a segment, shorter at the end of the memory.
    pub(super) fn segment(&self, offset: usize, length: usize) -> Segment {
        // SAFETY: within the mapping; whoever posts it for I/O holds the pages until that is over.
        unsafe { Segment::new(self.base.as_ptr(), self.length) }.part(offset, length)
    }

    /// `length` bytes from `offset`, shorter at the end of the memory. The card must not write to them now: they are a
    /// receive buffer, to which no peer has a key; the caller has taken the completion of what filled it, and has not posted
    /// it again.
    pub(super) fn bytes(&self, offset: usize, length: usize) -> &[u8] {
        let segment = self.segment(offset, length);
        // SAFETY: within the mapping, initialised (anonymous memory), and not written meanwhile as the caller promises.
        unsafe { std::slice::from_raw_parts(segment.base(), segment.length()) }
    }
}

impl Drop for Pages {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`; registrations of it hold these pages and are gone before.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.length) };
    }
}
