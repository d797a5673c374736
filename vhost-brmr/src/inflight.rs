//! The inflight region: memory of the front end in which this daemon notes what it took off the rings, so that after a
//! crash the next one knows which requests the guest still waits for (vhost-user specification, "Inflight I/O
//! tracking", split rings).
//!
//! The region outlives this process and may have been written by any program: nothing in it is trusted before it was
//! checked, and a value is read once. One that was made here cannot be cut short; one of another origin can, which ends the daemon
//! that maps it (see [`crate::sys::explain_bus_errors`]).
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU64, Ordering};

use thiserror::Error;
use vhost::vhost_user::message::VhostUserInflight;

/// Bytes before the first descriptor state of a ring: features, version, count, last batch head, used index.
const HEADER_LENGTH: usize = 16;
const VERSION_AT: usize = 8;
const COUNT_AT: usize = 10;
const LAST_HEAD_AT: usize = 12;
const USED_AT: usize = 14;
/// Bytes of one descriptor state: in flight, padding, next, counter.
const STATE_LENGTH: usize = 16;
const COUNTER_AT: usize = 8;
/// Rings begin at multiples of a cache line.
const ALIGNMENT: usize = 64;
/// The only version of the layout.
const VERSION: u16 = 1;

/// Why a region is not used.
#[derive(Debug, Error)]
pub enum InflightError {
    /// Sizes that do not fit together.
    #[error(
        "inflight region of {size} bytes at offset {offset} for {queues} queues of {queue_size}: expected at least {needed} bytes within a file of {found}"
    )]
    Bounds {
        /// Size announced.
        size: u64,
        /// Offset announced.
        offset: u64,
        /// Queues announced.
        queues: u16,
        /// Queue size announced.
        queue_size: u16,
        /// Bytes needed.
        needed: usize,
        /// Size of the file.
        found: u64,
    },
    /// The kernel refused.
    #[error("inflight region: {0}")]
    Io(#[from] io::Error),
    /// No room for a ring.
    #[error("inflight region has {queues} rings of {queue_size}, expected room for ring {queue} of {size}")]
    TooSmall {
        /// Which ring.
        queue: usize,
        /// Its size.
        size: u16,
        /// Rings in the region.
        queues: u16,
        /// Their size there.
        queue_size: u16,
    },
    /// A head that the ring does not have.
    #[error("inflight region of ring {queue} has head {head} in flight, expected heads below {size}")]
    Head {
        /// Which ring.
        queue: usize,
        /// The head.
        head: u16,
        /// Size of the ring.
        size: u16,
    },
    /// A ring's part was written by another version of the layout, or for another size.
    #[error(
        "inflight region of ring {queue} has version {version} and {count} descriptors, expected {VERSION} and {expected}"
    )]
    Layout {
        /// Which ring.
        queue: usize,
        /// Version found.
        version: u16,
        /// Count found.
        count: u16,
        /// Count expected.
        expected: u16,
    },
}

/// The region, mapped.
#[derive(Debug)]
pub struct Inflight {
    base: *mut u8,
    length: usize,
    queues: u16,
    queue_size: u16,
}

// SAFETY: the mapping lives as long as the value, and is only accessed through atomics.
unsafe impl Send for Inflight {}

impl Inflight {
    /// A new region, empty, and its file for the front end to keep.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn create(queues: u16, queue_size: u16) -> Result<(VhostUserInflight, File), InflightError> {
        let size = stride(queue_size) * usize::from(queues);
        // SAFETY: the name is a valid C string; the descriptor is new and owned from here on.
        let fd = unsafe {
            let flags = libc::MFD_CLOEXEC | libc::MFD_ALLOW_SEALING;
            let fd = libc::memfd_create(c"vhost-brmr-inflight".as_ptr(), flags);
            if fd < 0 {
                return Err(io::Error::last_os_error().into());
            }
            OwnedFd::from_raw_fd(fd)
        };
        let file = File::from(fd);
        file.set_len(size as u64)?;
        // A region that is cut short would end the daemon that maps it.
        let seals = libc::F_SEAL_SHRINK | libc::F_SEAL_GROW | libc::F_SEAL_SEAL;
        // SAFETY: a plain call on a descriptor that is owned here.
        if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_ADD_SEALS, seals) } < 0 {
            return Err(io::Error::last_os_error().into());
        }
        let announced =
            VhostUserInflight { mmap_size: size as u64, mmap_offset: 0, num_queues: queues, queue_size };
        Ok((announced, file))
    }

    /// Maps the region that the front end kept.
    ///
    /// # Errors
    /// When its sizes do not fit together, or the kernel refuses.
    pub fn map(announced: &VhostUserInflight, file: &File) -> Result<Self, InflightError> {
        let VhostUserInflight { mmap_size: size, mmap_offset: offset, num_queues: queues, queue_size } =
            *announced;
        let found = file.metadata()?.len();
        let needed = stride(queue_size) * usize::from(queues);
        let bounds = InflightError::Bounds { size, offset, queues, queue_size, needed, found };
        let end = offset.checked_add(size);
        if needed == 0 || size < needed as u64 || end.is_none_or(|end| end > found) || offset % 4096 != 0 {
            return Err(bounds);
        }
        let (Ok(length), Ok(offset)) = (usize::try_from(size), libc::off_t::try_from(offset)) else {
            return Err(bounds);
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
        let base = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), offset)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        Ok(Self { base: base.cast(), length, queues, queue_size })
    }

    /// What the guest still waits for on a ring that is about to start: heads in the order in which they were taken.
    /// `size` is the ring's size and `used` its used index. A fresh region is set up here.
    ///
    /// # Errors
    /// When the region has no room for the ring, or was written in another layout or for another ring.
    pub fn recover(&self, queue: usize, size: u16, used: u16) -> Result<Recovered, InflightError> {
        let expected = self.queue_size;
        if queue >= usize::from(self.queues) || size > expected {
            let (queues, queue_size) = (self.queues, self.queue_size);
            return Err(InflightError::TooSmall { queue, size, queues, queue_size });
        }
        let version = self.u16_at(queue, VERSION_AT).load(Ordering::Acquire);
        let count = self.u16_at(queue, COUNT_AT).load(Ordering::Acquire);
        if version == 0 {
            // Fresh: nothing in it means anything yet, slot 0 included.
            self.u16_at(queue, COUNT_AT).store(expected, Ordering::Release);
            self.u16_at(queue, USED_AT).store(used, Ordering::Release);
            self.u16_at(queue, VERSION_AT).store(VERSION, Ordering::Release);
            return Ok(Recovered { heads: Vec::new(), counter: 0 });
        }
        if version != VERSION || count != expected {
            return Err(InflightError::Layout { queue, version, count, expected });
        }
        if self.u16_at(queue, USED_AT).load(Ordering::Acquire) != used {
            // The crash was between the used element and its note here.
            let last = self.u16_at(queue, LAST_HEAD_AT).load(Ordering::Acquire);
            if last < expected {
                self.state(queue, last).store(0, Ordering::Release);
            }
            self.u16_at(queue, USED_AT).store(used, Ordering::Release);
        }
        let waiting = (0..expected).filter(|head| self.state(queue, *head).load(Ordering::Acquire) == 1);
        let mut waiting: Vec<_> =
            waiting.map(|head| (self.counter(queue, head).load(Ordering::Acquire), head)).collect();
        waiting.sort_unstable();
        if let Some((_, head)) = waiting.iter().find(|(_, head)| *head >= size) {
            return Err(InflightError::Head { queue, head: *head, size });
        }
        let counter = waiting.last().map_or(0, |(counter, _)| counter.wrapping_add(1));
        Ok(Recovered { heads: waiting.into_iter().map(|(_, head)| head).collect(), counter })
    }

    /// A chain was taken off the ring.
    pub fn taken(&self, queue: usize, head: u16, counter: u64) {
        self.counter(queue, head).store(counter, Ordering::Relaxed);
        self.state(queue, head).store(1, Ordering::Release);
    }

    /// A chain that was noted stays on the ring after all.
    pub fn put_back(&self, queue: usize, head: u16) {
        self.state(queue, head).store(0, Ordering::Release);
    }

    /// A used element for this chain is about to be written.
    pub fn finishing(&self, queue: usize, head: u16) {
        self.u16_at(queue, LAST_HEAD_AT).store(head, Ordering::Release);
    }

    /// The used element was written, and the used index is this now.
    pub fn finished(&self, queue: usize, head: u16, used: u16) {
        self.state(queue, head).store(0, Ordering::Release);
        self.u16_at(queue, USED_AT).store(used, Ordering::Release);
    }

    fn place(&self, queue: usize, at: usize) -> *mut u8 {
        let offset = stride(self.queue_size) * queue + at;
        assert!(queue < usize::from(self.queues) && offset + 8 <= self.length, "outside the inflight region");
        self.base.wrapping_add(offset)
    }

    fn u16_at(&self, queue: usize, at: usize) -> &AtomicU16 {
        // SAFETY: `place` lies within the mapping, at an even offset, and the mapping lives as long as `self`.
        unsafe { AtomicU16::from_ptr(self.place(queue, at).cast()) }
    }

    fn state(&self, queue: usize, head: u16) -> &AtomicU8 {
        let at = HEADER_LENGTH + usize::from(head) * STATE_LENGTH;
        // SAFETY: as above.
        unsafe { AtomicU8::from_ptr(self.place(queue, at)) }
    }

    fn counter(&self, queue: usize, head: u16) -> &AtomicU64 {
        let at = HEADER_LENGTH + usize::from(head) * STATE_LENGTH + COUNTER_AT;
        // SAFETY: as above; the offset is a multiple of 8, and so is the start of each ring.
        unsafe { AtomicU64::from_ptr(self.place(queue, at).cast()) }
    }
}

impl Drop for Inflight {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `map`, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.cast(), self.length) };
    }
}

/// What a ring starts with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// Heads to be served again, in order.
    pub heads: Vec<u16>,
    /// The counter of the next chain.
    pub counter: u64,
}

/// Distance between two rings.
fn stride(queue_size: u16) -> usize {
    (HEADER_LENGTH + usize::from(queue_size) * STATE_LENGTH).next_multiple_of(ALIGNMENT)
}
