//! Memory for disk I/O: one contiguous, page-aligned mapping allocated at start and shared out by a buddy allocator, so
//! that one registration per GiB serves io_uring, and one each RDMA device. This file holds the pointers.
#![allow(unsafe_code)]

use std::cell::RefCell;
use std::fmt;
use std::io;
use std::ptr::NonNull;
use std::rc::Rc;

use rmr_common::buffer::Segment;

use super::buddy::{Buddy, MAX_ORDER};

/// Smallest buffer, and the granularity of all: a page.
pub const MIN_BUFFER: usize = 4096;
/// Largest single buffer; more than that is a list of buffers.
pub const MAX_BUFFER: usize = MIN_BUFFER << MAX_ORDER;
/// Most memory that one registration with io_uring covers.
const MAX_REGION: usize = 1 << 30;

/// 4096 bytes at an address aligned for direct I/O.
#[repr(align(4096))]
pub struct AlignedPage([u8; 4096]);

impl Default for AlignedPage {
    fn default() -> Self {
        Self([0; 4096])
    }
}

impl AlignedPage {
    /// A page of zeroes.
    #[must_use]
    pub fn zeroed() -> Box<Self> {
        Box::default()
    }

    /// A page with these bytes, and zeroes behind them; what does not fit is left out.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Box<Self> {
        let mut page = Self::zeroed();
        let length = bytes.len().min(4096);
        page.0[..length].copy_from_slice(&bytes[..length]);
        page
    }

    /// The bytes.
    #[must_use]
    pub const fn bytes(&self) -> &[u8; 4096] {
        &self.0
    }

    /// The bytes, to change them.
    pub const fn bytes_mut(&mut self) -> &mut [u8; 4096] {
        &mut self.0
    }

    /// The page as a segment. Only the engine asks for it, and it holds the page until the I/O completed.
    pub(super) const fn segment(&mut self) -> Segment {
        // SAFETY: the callers are engines, which own their payloads, zero pages and `Zeroing` until completion.
        unsafe { Segment::new(self.0.as_mut_ptr(), 4096) }
    }
}

impl fmt::Debug for AlignedPage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("AlignedPage")
    }
}

/// Anonymous memory of the process, zero at first.
struct Mapping {
    base: NonNull<u8>,
    length: usize,
}

impl Mapping {
    fn anonymous(length: usize) -> io::Result<Self> {
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the kernel's choice touches no existing memory.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::other("mmap gave address zero"))?;
        Ok(Self { base, length })
    }
}

impl Drop for Mapping {
    /// Gives the memory back and keeps the addresses: a [`Segment`] that outlives its buffer by mistake then points at
    /// zeroes of nobody, never at memory that something else came to use.
    fn drop(&mut self) {
        // SAFETY: the range is this mapping's own; its pages become zero and stay mapped.
        unsafe { libc::madvise(self.base.as_ptr().cast(), self.length, libc::MADV_DONTNEED) };
    }
}

struct Shared {
    mapping: Mapping,
    buddy: RefCell<Buddy>,
}

/// The buffers of one shard. It never grows; when it is empty a request waits. Belongs to one thread.
///
/// Memory cost: the size asked for, once touched, plus 10 bytes per 4 KiB page for bookkeeping (0.25 %).
#[derive(Clone)]
pub struct BufferPool {
    shared: Rc<Shared>,
}

impl BufferPool {
    /// A pool of `bytes`, rounded up to whole MiB.
    ///
    /// # Errors
    /// When the address space or memory is not to be had, or `bytes` is zero or more than 1 TiB.
    pub fn new(bytes: usize) -> io::Result<Self> {
        let blocks =
            u32::try_from(bytes.div_ceil(MAX_BUFFER)).ok().filter(|blocks| (1..=1 << 20).contains(blocks));
        let Some(blocks) = blocks else {
            let text = format!("a buffer pool of {bytes} bytes: expected 1 byte to 1 TiB");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        };
        let mapping = Mapping::anonymous(blocks as usize * MAX_BUFFER)?;
        Ok(Self { shared: Rc::new(Shared { mapping, buddy: RefCell::new(Buddy::new(blocks)) }) })
    }

    /// A buffer of at least `length` bytes: the next power of two from 4 KiB to 1 MiB. `None` when `length` is zero or
    /// more than 1 MiB, or when no free block is large enough.
    #[must_use]
    pub fn try_acquire(&self, length: usize) -> Option<Buffer> {
        if !(1..=MAX_BUFFER).contains(&length) {
            return None;
        }
        self.take(order_for(length), length)
    }

    /// Appends to `list` buffers whose lengths add up to `length`: one if it fits, else as few as there are. False when
    /// there is not enough memory; `list` is then as it was.
    pub fn try_acquire_list(&self, length: usize, list: &mut Vec<Buffer>) -> bool {
        let (before, mut left) = (list.len(), length);
        if left > self.free_bytes() {
            return false;
        }
        while left > 0 {
            let largest = self.shared.buddy.borrow().largest();
            let part = left.min(MAX_BUFFER);
            let buffer = largest.and_then(|largest| {
                let order = order_for(part).min(largest);
                self.take(order, part.min(MIN_BUFFER << order))
            });
            let Some(buffer) = buffer else {
                list.truncate(before);
                return false;
            };
            left -= buffer.length();
            list.push(buffer);
        }
        true
    }

    /// Size of the pool in bytes.
    #[must_use]
    pub fn total_bytes(&self) -> usize {
        self.shared.mapping.length
    }

    /// Bytes that no buffer holds.
    #[must_use]
    pub fn free_bytes(&self) -> usize {
        self.shared.buddy.borrow().free_pages() as usize * MIN_BUFFER
    }

    /// The whole pool as regions of at most 1 GiB, for registration with io_uring or a network card. The memory stays
    /// mapped for the life of the process.
    #[must_use]
    pub fn regions(&self) -> Vec<Segment> {
        let mapping = &self.shared.mapping;
        let region = |start: usize| {
            let length = MAX_REGION.min(mapping.length - start);
            // SAFETY: within the mapping, which is never unmapped (see `Mapping::drop`).
            unsafe { Segment::new(mapping.base.as_ptr().add(start), length) }
        };
        (0..mapping.length).step_by(MAX_REGION).map(region).collect()
    }

    fn take(&self, order: u8, length: usize) -> Option<Buffer> {
        let page = self.shared.buddy.borrow_mut().take(order)?;
        Some(Buffer { shared: Rc::clone(&self.shared), page, order, length })
    }
}

impl fmt::Debug for BufferPool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BufferPool({} of {} bytes free)", self.free_bytes(), self.total_bytes())
    }
}

fn order_for(length: usize) -> u8 {
    let pages = length.div_ceil(MIN_BUFFER).next_power_of_two();
    u8::try_from(pages.trailing_zeros()).expect("below the bits of an address")
}

/// A piece of a [`BufferPool`]; it goes back when dropped. Its content is whatever the last user left.
pub struct Buffer {
    shared: Rc<Shared>,
    page: u32,
    order: u8,
    length: usize,
}

impl Buffer {
    /// The length that was asked for, in bytes.
    #[must_use]
    pub const fn length(&self) -> usize {
        self.length
    }

    /// The length that there is, in bytes: a power of two.
    #[must_use]
    pub const fn capacity(&self) -> usize {
        MIN_BUFFER << self.order
    }

    /// Makes the buffer shorter or longer within its capacity; true if it fits.
    pub const fn set_length(&mut self, length: usize) -> bool {
        let fits = length <= self.capacity();
        if fits {
            self.length = length;
        }
        fits
    }

    /// The buffer as a segment for I/O. Whoever uses it keeps the buffer until the I/O completed: otherwise the next
    /// user of the memory sees foreign bytes, though never memory outside the pool.
    #[must_use]
    pub fn segment(&self) -> Segment {
        // SAFETY: within the pool's mapping, which is never unmapped (see `Mapping::drop`).
        unsafe { Segment::new(self.base(), self.length) }
    }

    /// CRC32C of the bytes as they are now.
    #[must_use]
    pub fn digest(&self) -> u32 {
        rmr_common::buffer::digest(&[self.segment()], 0, self.length)
    }

    /// Whether each of its blocks of 4 KiB is all zeroes. As with [`Buffer::bytes`].
    pub fn zero_blocks(&self) -> impl Iterator<Item = bool> + '_ {
        static ZEROES: [u8; MIN_BUFFER] = [0; MIN_BUFFER];
        self.bytes().chunks(MIN_BUFFER).map(|block| *block == ZEROES[..block.len()])
    }

    /// The bytes. Not to be called while I/O into the buffer is under way, nor for memory that is lent to a client over RDMA,
    /// who may change it at any time. What was lent before is nobody else's: its key was made invalid before it came back.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the range belongs to this buffer alone while it lives, is mapped and initialised (anonymous memory), and the
        // caller promises that no device writes to it.
        unsafe { std::slice::from_raw_parts(self.base(), self.length) }
    }

    /// The bytes, to change them. As with [`Buffer::bytes`].
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`; `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.base(), self.length) }
    }

    fn base(&self) -> *mut u8 {
        // SAFETY: the buddy allocator gives out pages below the mapping's length only.
        unsafe { self.shared.mapping.base.as_ptr().add(self.page as usize * MIN_BUFFER) }
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let given_back = self.shared.buddy.borrow_mut().give_back(self.page);
        debug_assert_eq!(given_back, Ok(()), "a buffer is given back once");
    }
}

impl fmt::Debug for Buffer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Buffer({} bytes, page {})", self.length, self.page)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buffers_are_aligned_disjoint_and_come_back() {
        let pool = BufferPool::new(2 << 20).unwrap();
        let mut held: Vec<Buffer> = (0..512).map(|_| pool.try_acquire(4096).unwrap()).collect();
        assert!(pool.try_acquire(1).is_none());
        for (buffer, byte) in held.iter_mut().zip((0u8..=255).cycle()) {
            assert_eq!(buffer.segment().base() as usize % 4096, 0);
            buffer.bytes_mut().fill(byte);
        }
        assert!(held.iter().zip((0u8..=255).cycle()).all(|(b, byte)| b.bytes().iter().all(|x| *x == byte)));
        drop(held);
        assert_eq!(pool.free_bytes(), pool.total_bytes());
        assert_eq!(pool.try_acquire(1 << 20).unwrap().capacity(), 1 << 20);
    }

    #[test]
    fn blocks_of_zeroes_are_told_from_those_with_a_single_bit_in_them() {
        let pool = BufferPool::new(1 << 20).unwrap();
        let mut buffer = pool.try_acquire(4 * 4096).unwrap();
        buffer.bytes_mut()[4096] = 1;
        buffer.bytes_mut()[3 * 4096 - 1] = 0x80;
        assert_eq!(buffer.zero_blocks().collect::<Vec<_>>(), [true, false, false, true]);
        assert_eq!(buffer.digest(), rmr_common::wire::data_digest(buffer.bytes()));
    }

    #[test]
    fn lengths_round_up_to_powers_of_two_and_out_of_range_is_refused() {
        let pool = BufferPool::new(1).unwrap();
        assert_eq!(pool.total_bytes(), 1 << 20);
        for (length, capacity) in
            [(1, 4096), (4096, 4096), (4097, 8192), (65537, 131_072), (600_000, 1 << 20)]
        {
            let buffer = pool.try_acquire(length).unwrap();
            assert_eq!((buffer.length(), buffer.capacity()), (length, capacity));
        }
        assert!(pool.try_acquire(0).is_none() && pool.try_acquire((1 << 20) + 1).is_none());
        assert!(BufferPool::new(0).is_err() && BufferPool::new(usize::MAX).is_err());
    }

    #[test]
    fn a_list_is_gathered_from_what_is_there_or_not_at_all() {
        let pool = BufferPool::new(4 << 20).unwrap();
        let mut list = Vec::new();
        assert!(pool.try_acquire_list((2 << 20) + 5000, &mut list));
        assert_eq!(list.iter().map(Buffer::length).collect::<Vec<_>>(), [1 << 20, 1 << 20, 5000]);
        assert!(!pool.try_acquire_list(3 << 20, &mut list));
        assert_eq!(list.len(), 3);
        // Fragment the pool completely: only every other page is free, and 64 KiB still comes together.
        list.clear();
        let mut pages: Vec<Option<Buffer>> = (0..1024).map(|_| pool.try_acquire(4096)).collect();
        pages.iter_mut().step_by(2).for_each(|page| *page = None);
        assert!(pool.try_acquire(8192).is_none());
        assert!(pool.try_acquire_list(65536, &mut list));
        assert_eq!(list.len(), 16);
    }

    #[test]
    fn regions_cover_the_pool_in_pieces_of_a_gigabyte() {
        let pool = BufferPool::new((1 << 30) + (1 << 20)).unwrap();
        let lengths: Vec<usize> = pool.regions().iter().map(Segment::length).collect();
        assert_eq!(lengths, [1 << 30, 1 << 20]);
    }
}
