//! Raw scatter/gather segments. The caller of an I/O function keeps the memory alive until the I/O completed;
//! this file holds the pointers, so that the rest of the crate needs no `unsafe` to pass them on.
#![allow(unsafe_code)]

use std::fmt;
use std::io::{self, Read};
use std::os::fd::AsRawFd;

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

/// Copies the bytes of a segment to `segments`, as far as both go; returns how many. Either may be changed by others
/// meanwhile: no reference to it is made.
#[must_use]
pub fn copy_segment(from: &Segment, segments: &[Segment]) -> usize {
    let mut done = 0;
    for segment in segments {
        let part = from.part(done, segment.length());
        // SAFETY: `part` is readable and `segment`, which is at least as long, writable by the promises made when they were
        // created; `copy` allows that they overlap.
        unsafe { std::ptr::copy(part.base(), segment.base(), part.length()) };
        done += part.length();
    }
    done
}

/// A segment at an address that is only compared, never touched.
#[cfg(all(test, feature = "rdma"))]
pub(crate) fn for_tests(base: usize, length: usize) -> Segment {
    // SAFETY: the memory is never accessed.
    unsafe { Segment::new(base as *mut u8, length) }
}

/// Bytes that are copied out of segments at a time, to be looked at: they stay in the processor's nearest cache.
const PIECE: usize = 16 << 10;

/// Smallest unit in which memory can be taken away from this process.
const PAGE: usize = 4096;

/// Copies `length` bytes from `offset` of the whole list, in pieces. The owner of the memory may change it meanwhile: what is
/// looked at is the copy.
fn for_each_piece(segments: &[Segment], offset: usize, length: usize, mut take: impl FnMut(&[u8])) {
    let (mut skip, mut left) = (offset, length);
    let mut piece = [0; PIECE];
    for segment in segments {
        let mut at = skip.min(segment.length());
        skip -= at;
        while left > 0 && at < segment.length() {
            let part = segment.part(at, left.min(PIECE));
            // SAFETY: the part is readable by the promise made when the segment was created, and no longer than the piece,
            // which is nobody else's.
            unsafe { std::ptr::copy_nonoverlapping(part.base(), piece.as_mut_ptr(), part.length()) };
            take(&piece[..part.length()]);
            at += part.length();
            left -= part.length();
        }
    }
}

/// CRC32C of `length` bytes from `offset` of the whole list, as they are now.
#[must_use]
pub fn digest(segments: &[Segment], offset: usize, length: usize) -> u32 {
    let mut digest = crc_fast::Digest::new(crc_fast::CrcAlgorithm::Crc32Iscsi);
    for_each_piece(segments, offset, length, |piece| digest.update(piece));
    u32::try_from(digest.finalize()).unwrap_or(u32::MAX)
}

/// Appends `length` bytes from `offset` of the whole list to `bytes`.
pub fn copy_out(segments: &[Segment], offset: usize, length: usize, bytes: &mut Vec<u8>) {
    for_each_piece(segments, offset, length, |piece| bytes.extend_from_slice(piece));
}

/// As [`copy_out`], for memory of which some may not be readable: that is zeroes in the copy. The kernel reads it, page by page into
/// a pipe, and says so where an access of this process would end it.
pub fn salvage(segments: &[Segment], offset: usize, length: usize, bytes: &mut Vec<u8>) {
    let mut parts = Vec::new();
    gather(segments, offset, length, &mut parts);
    let pipe = io::pipe();
    for part in parts {
        let mut at = 0;
        while at < part.length() {
            let rest = part.part(at, PAGE - part.base().addr().wrapping_add(at) % PAGE);
            at += rest.length();
            let end = bytes.len() + rest.length();
            if let Ok((reader, writer)) = &pipe {
                // SAFETY: the kernel checks the address, and takes no more than an empty pipe holds.
                let taken = unsafe { libc::write(writer.as_raw_fd(), rest.base().cast(), rest.length()) };
                let taken = u64::try_from(taken).unwrap_or(0);
                // Nobody else reads from the pipe. If it fails, the rest of the page is zeroes.
                let _ = reader.take(taken).read_to_end(bytes);
            }
            bytes.resize(end, 0);
        }
    }
}

/// Copies bytes to where they belong from `offset` of the whole list on.
pub fn copy_in(bytes: &[u8], segments: &[Segment], offset: usize) {
    let (mut skip, mut rest) = (offset, bytes);
    for segment in segments {
        let at = skip.min(segment.length());
        skip -= at;
        let part = segment.part(at, rest.len());
        let (now, later) = rest.split_at(part.length());
        // SAFETY: the part is writable by the promise made when the segment was created, and as long as `now`.
        unsafe { std::ptr::copy_nonoverlapping(now.as_ptr(), part.base(), now.len()) };
        rest = later;
    }
}

/// A segment over the whole of a buffer. The caller keeps the buffer, unmoved in content, until the I/O completed.
pub(crate) fn segment_of_bytes(bytes: &mut [u8]) -> Segment {
    // SAFETY: the one caller keeps the buffer until the part that it is for has ended, with every connection that may use it.
    unsafe { Segment::new(bytes.as_mut_ptr(), bytes.len()) }
}

/// Appends a segment for each buffer. The caller keeps the buffers, unmoved in content, until the I/O completed.
pub(crate) fn segments_of_buffers(buffers: &mut [Vec<u8>], segments: &mut Vec<Segment>) {
    for buffer in buffers {
        // SAFETY: the one caller keeps the buffers with the request and gives them back at its completion.
        segments.push(unsafe { Segment::new(buffer.as_mut_ptr(), buffer.len()) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_and_copies_see_the_same_bytes_however_the_memory_is_cut() {
        let bytes: Vec<u8> = (0..100_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut memory = vec![bytes[..10].to_vec(), bytes[10..40_000].to_vec(), bytes[40_000..].to_vec()];
        let mut segments = Vec::new();
        segments_of_buffers(&mut memory, &mut segments);
        for (offset, length) in [(0, 100_000), (3, 5), (9, 2), (39_999, 17_000), (50_000, 0)] {
            let part = &bytes[offset..offset + length];
            assert_eq!(digest(&segments, offset, length), crate::wire::data_digest(part));
            let mut copy = Vec::new();
            copy_out(&segments, offset, length, &mut copy);
            assert!(copy == part);
        }
        let mut target = vec![vec![0; 7], vec![0; 99_000], vec![0; 5]];
        let mut into = Vec::new();
        segments_of_buffers(&mut target, &mut into);
        assert_eq!(copy_segment(&segments[2], &into), 60_000);
        assert!(target.concat()[..60_000] == bytes[40_000..]);
        assert_eq!(copy_segment(&segments[2], &into[..1]), 7);
        copy_in(&[0xee; 40_000], &segments, 5);
        let mut copy = Vec::new();
        copy_out(&segments, 0, 100_000, &mut copy);
        assert!(
            copy[..5] == bytes[..5]
                && copy[5..40_005].iter().all(|b| *b == 0xee)
                && copy[40_005..] == bytes[40_005..]
        );
    }
}
