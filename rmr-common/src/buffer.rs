//! Raw scatter/gather segments. The caller of an I/O function keeps the memory alive until the I/O completed;
//! this file holds the pointers, so that the rest of the crate needs no `unsafe` to pass them on.
#![allow(unsafe_code)]

use std::fmt;

/// One piece of memory of a scatter/gather list: what an `iovec` is to the kernel.
///
/// A segment does not own its memory and may alias memory that a guest changes at any time. It is therefore never
/// read or written as a Rust reference, only handed to the kernel or to a device.
#[derive(Clone, Copy)]
#[repr(transparent)]
pub struct Segment(libc::iovec);

// SAFETY: a segment is an address and a length; whoever made it promised (see `Segment::new`) that the memory stays
// valid until the I/O completed, on whichever thread that happens.
unsafe impl Send for Segment {}

impl Segment {
    /// The `length` bytes from `base`.
    ///
    /// # Safety
    /// The memory must stay mapped, readable and (for a read's destination) writable until every I/O that was given
    /// this segment, or a part of it, has completed or was cancelled.
    #[must_use]
    pub const unsafe fn new(base: *mut u8, length: usize) -> Self {
        Self(libc::iovec { iov_base: base.cast(), iov_len: length })
    }

    /// First byte.
    #[must_use]
    pub const fn base(&self) -> *mut u8 {
        self.0.iov_base.cast()
    }

    /// Length in bytes.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.0.iov_len
    }

    /// The part of `length` bytes that starts `offset` bytes in; shorter when the segment ends before.
    #[must_use]
    pub fn part(&self, offset: usize, length: usize) -> Self {
        let offset = offset.min(self.length());
        let length = length.min(self.length() - offset);
        Self(libc::iovec { iov_base: self.base().wrapping_add(offset).cast(), iov_len: length })
    }

    /// Copies from the segment's start into `bytes`, as many as both have; returns how many.
    pub(crate) fn copy_to(&self, bytes: &mut [u8]) -> usize {
        let length = bytes.len().min(self.length());
        // SAFETY: readable by the promise of `new`, and `bytes` is memory of our own that no guest can name.
        unsafe { std::ptr::copy_nonoverlapping(self.base(), bytes.as_mut_ptr(), length) };
        length
    }

    /// Copies `bytes` to the segment's start, as many as fit; returns how many.
    pub(crate) fn copy_from(&self, bytes: &[u8]) -> usize {
        let length = bytes.len().min(self.length());
        // SAFETY: writable by the promise of `new`, and `bytes` is memory of our own that no guest can name.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.base(), length) };
        length
    }
}

impl fmt::Debug for Segment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:p}+{}", self.base(), self.length())
    }
}

/// Appends to `parts` the pieces of `segments` that cover `length` bytes from `offset` of the whole list.
pub fn gather(segments: &[Segment], offset: usize, length: usize, parts: &mut Vec<Segment>) {
    let (mut skip, mut left) = (offset, length);
    for segment in segments {
        if left == 0 {
            return;
        }
        if skip >= segment.length() {
            skip -= segment.length();
            continue;
        }
        let part = segment.part(skip, left);
        skip = 0;
        left -= part.length();
        parts.push(part);
    }
}

/// Copies the bytes of `segments` to `bytes`, as far as both go; returns how many.
pub fn copy_from_segments(segments: &[Segment], bytes: &mut [u8]) -> usize {
    let mut done = 0;
    for segment in segments {
        let length = segment.length().min(bytes.len() - done);
        // SAFETY: readable by the promise made when the segment was created; `bytes` has room from `done` on, and is no part
        // of the segment, which is memory that Rust has no reference to.
        unsafe { std::ptr::copy_nonoverlapping(segment.base(), bytes[done..].as_mut_ptr(), length) };
        done += length;
    }
    done
}

/// Copies `bytes` to `segments`, as far as both go; returns how many.
pub fn copy_to_segments(bytes: &[u8], segments: &[Segment]) -> usize {
    let mut done = 0;
    for segment in segments {
        let length = segment.length().min(bytes.len() - done);
        // SAFETY: writable by the promise made when the segment was created, which is for the destination of a read; as
        // above, the two do not overlap.
        unsafe { std::ptr::copy_nonoverlapping(bytes[done..].as_ptr(), segment.base(), length) };
        done += length;
    }
    done
}

/// A segment at an address that is only compared, never touched.
#[cfg(test)]
pub(crate) fn for_tests(base: usize, length: usize) -> Segment {
    // SAFETY: the memory is never accessed.
    unsafe { Segment::new(base as *mut u8, length) }
}

/// Appends a segment for each buffer. The caller keeps the buffers, unmoved in content, until the I/O completed.
pub(crate) fn segments_of_buffers(buffers: &mut [Vec<u8>], segments: &mut Vec<Segment>) {
    for buffer in buffers {
        // SAFETY: the one caller keeps the buffers with the request and gives them back at its completion.
        segments.push(unsafe { Segment::new(buffer.as_mut_ptr(), buffer.len()) });
    }
}
