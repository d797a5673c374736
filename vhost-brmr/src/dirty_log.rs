//! The dirty log of live migration: a bitmap in memory of the front end, one bit for each page of guest memory, in which
//! everything is marked that this device writes to the guest (vhost-user specification, "Migration").
//!
//! A page is marked **after** it was written. The front end takes bits out of the log (an atomic exchange) and then copies
//! their pages, while the guest runs; a page marked before its data came could be copied without it, and never again. And
//! it is marked before the chain's used index is published, so that at no time a request is complete for the guest and
//! not in the log. The last round of the front end comes after the rings are stopped: GET_VRING_BASE and a disabling
//! SET_VRING_ENABLE are answered when nothing is in flight, and so when all is marked. What is in flight when logging begins is
//! marked as well: what counts is the log at the time of the completion.
//!
//! Three ways lead here, and there is no other way in which this device writes to guest memory. `virtio-queue` writes used
//! elements, indices and flags through `vm-memory`, whose regions carry a [`RegionLog`]. Status bytes and the serial
//! number go through [`memory::copy_to`](crate::memory::copy_to). The data of reads is written by transports or by the
//! network card, past both, and is marked in [`Flight::release`](crate::flight::Flight::release). The inflight region is no
//! guest memory.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

use thiserror::Error;
use vhost::vhost_user::message::VhostUserLog;
use vm_memory::bitmap::{Bitmap, RefSlice, WithBitmapSlice};

/// Bytes of guest memory for each bit: `VHOST_LOG_PAGE` of the specification.
pub const PAGE_SIZE: u64 = 4096;
/// Bytes of guest memory for each byte of the log.
const BYTE_COVERS: u64 = PAGE_SIZE * 8;

/// Why a log is not used.
#[derive(Debug, Error)]
pub enum LogError {
    /// The file ends before the log does; touching the rest would kill the process.
    #[error("dirty log of {size} bytes at offset {offset}: expected it within its file, which has {found}")]
    FileTooShort {
        /// Size announced.
        size: u64,
        /// Offset announced.
        offset: u64,
        /// Size of the file.
        found: u64,
    },
    /// Not aligned to a page.
    #[error("dirty log at offset {0} of its file: expected a multiple of 4096")]
    Unaligned(u64),
    /// Memory without a bit.
    #[error(
        "dirty log of {size} bytes has no bits for {what} up to {end:#x}: expected at least {needed} bytes"
    )]
    TooSmall {
        /// Size of the log.
        size: usize,
        /// What would not be logged.
        what: &'static str,
        /// First guest address behind it.
        end: u64,
        /// Bytes needed.
        needed: u64,
    },
    /// The kernel refused.
    #[error("dirty log: {0}")]
    Io(#[from] io::Error),
}

/// The log of a device: none, one that rests, or one in use. All regions of guest memory share it, and so it can change
/// while requests hold on to theirs.
#[derive(Debug, Default)]
pub struct DirtyLog {
    /// Pages are to be marked. Looked at for each write to the guest, and false all its life for most of them.
    active: AtomicBool,
    map: RwLock<Option<LogMap>>,
}

impl DirtyLog {
    /// Replaces the log by one of the front end's, or by none.
    pub fn set(&self, map: Option<LogMap>) {
        let mut current = self.map.write().unwrap_or_else(PoisonError::into_inner);
        if map.is_none() {
            self.active.store(false, Ordering::Relaxed);
        }
        *current = map;
    }

    /// Marks from now on, or no more; for what the front end is to be sure of, it has set a log before.
    pub fn activate(&self, active: bool) {
        self.active.store(active, Ordering::Relaxed);
    }

    /// Whether pages are marked.
    #[must_use]
    pub fn is_active(&self) -> bool {
        self.active.load(Ordering::Relaxed)
    }

    /// Checks that the log, if there is one, has bits for all addresses below `end`.
    ///
    /// # Errors
    /// When it has not.
    pub fn check(&self, what: &'static str, end: u64) -> Result<(), LogError> {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.as_ref().map_or(Ok(()), |map| map.check(what, end))
    }

    /// Marks the pages of `length` bytes at a guest address, which have just been written.
    pub fn mark(&self, address: u64, length: u64) {
        if self.is_active() && length > 0 {
            let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(map) = &*map {
                map.mark(address, length);
            }
        }
    }

    /// Whether the page of a guest address is marked.
    #[must_use]
    pub fn is_marked(&self, address: u64) -> bool {
        let map = self.map.read().unwrap_or_else(PoisonError::into_inner);
        map.as_ref().is_some_and(|map| map.is_marked(address))
    }
}

/// A log of the front end's, mapped.
#[derive(Debug)]
pub struct LogMap {
    base: *mut u8,
    length: usize,
}

// SAFETY: the mapping lives as long as the value, and is accessed through atomics only.
unsafe impl Send for LogMap {}
// SAFETY: as above.
unsafe impl Sync for LogMap {}

impl LogMap {
    /// Maps the log that the front end announced. As with guest memory, a file that is cut short later kills this process,
    /// and with it nothing but the front end's own disk.
    ///
    /// # Errors
    /// When it does not lie within its file, or the kernel refuses.
    pub fn new(announced: &VhostUserLog, file: &File) -> Result<Self, LogError> {
        let VhostUserLog { mmap_size: size, mmap_offset: offset } = *announced;
        if !offset.is_multiple_of(4096) {
            return Err(LogError::Unaligned(offset));
        }
        let found = file.metadata()?.len();
        let too_short = LogError::FileTooShort { size, offset, found };
        if size == 0 || offset.checked_add(size).is_none_or(|end| end > found) {
            return Err(too_short);
        }
        let (Ok(length), Ok(at)) = (usize::try_from(size), libc::off_t::try_from(offset)) else {
            return Err(too_short);
        };
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory that Rust knows of.
        let base = unsafe {
            let protection = libc::PROT_READ | libc::PROT_WRITE;
            libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, file.as_raw_fd(), at)
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error().into());
        }
        Ok(Self { base: base.cast(), length })
    }

    /// Checks that there are bits for all addresses below `end`.
    ///
    /// # Errors
    /// When there are not.
    pub fn check(&self, what: &'static str, end: u64) -> Result<(), LogError> {
        let needed = end.div_ceil(BYTE_COVERS);
        if needed > self.length as u64 {
            return Err(LogError::TooSmall { size: self.length, what, end, needed });
        }
        Ok(())
    }

    fn mark(&self, address: u64, length: u64) {
        let last = address.saturating_add(length - 1) / PAGE_SIZE;
        for page in address / PAGE_SIZE..=last {
            // What is beyond the log was refused when it was announced.
            let Some(byte) = self.byte(page) else { break };
            // The front end takes bits while we set others of the same byte. Released: who sees the bit sees the data.
            byte.fetch_or(1 << (page % 8), Ordering::Release);
        }
    }

    fn is_marked(&self, address: u64) -> bool {
        let page = address / PAGE_SIZE;
        self.byte(page).is_some_and(|byte| byte.load(Ordering::Acquire) & 1 << (page % 8) != 0)
    }

    fn byte(&self, page: u64) -> Option<&AtomicU8> {
        let at = usize::try_from(page / 8).ok().filter(|at| *at < self.length)?;
        // SAFETY: within the mapping, which lives as long as `self`; bytes need no alignment, and both sides use atomics.
        Some(unsafe { AtomicU8::from_ptr(self.base.wrapping_add(at)) })
    }
}

impl Drop for LogMap {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `new`, and no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.cast(), self.length) };
    }
}

/// The part of the log that is about one region: with it `vm-memory` marks what is written through it.
///
/// `vhost_user_backend::bitmap` has the same, but clones two handles and takes a lock for each access, which costs more than
/// the rest of a request's way, and never stops to log.
#[derive(Clone, Debug)]
pub struct RegionLog {
    log: Arc<DirtyLog>,
    start: u64,
}

impl RegionLog {
    /// For a region that begins at this guest address.
    #[must_use]
    pub fn new(log: Arc<DirtyLog>, start: u64) -> Self {
        Self { log, start }
    }

    /// The log of all regions.
    #[must_use]
    pub fn log(&self) -> &DirtyLog {
        &self.log
    }
}

impl<'a> WithBitmapSlice<'a> for RegionLog {
    type S = RefSlice<'a, Self>;
}

impl Bitmap for RegionLog {
    fn mark_dirty(&self, offset: usize, length: usize) {
        self.log.mark(self.start.saturating_add(offset as u64), length as u64);
    }

    fn dirty_at(&self, offset: usize) -> bool {
        self.log.is_marked(self.start.saturating_add(offset as u64))
    }

    fn slice_at(&self, offset: usize) -> RefSlice<'_, Self> {
        RefSlice::new(self, offset)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    fn file(length: u64) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(length).unwrap();
        file
    }

    /// A log in use, and its file.
    fn log(size: u64) -> (DirtyLog, File) {
        let (log, file) = (DirtyLog::default(), file(size));
        log.set(Some(LogMap::new(&VhostUserLog::new(size, 0), &file).unwrap()));
        log.activate(true);
        (log, file)
    }

    fn bytes(file: &File) -> Vec<u8> {
        let mut bytes = vec![0; usize::try_from(file.metadata().unwrap().len()).unwrap()];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    #[test]
    fn exactly_the_pages_that_were_touched_are_marked() {
        for (address, length, expected) in [
            (0, 1, [0b1, 0, 0, 0]),
            (4095, 1, [0b1, 0, 0, 0]),
            (4095, 2, [0b11, 0, 0, 0]),
            (4096, 4096, [0b10, 0, 0, 0]),
            (4096 * 7 + 1, 4096, [0x80, 0b1, 0, 0]),
            (4096 * 31 + 4095, 1, [0, 0, 0, 0x80]),
            (4096, 0, [0, 0, 0, 0]),
            (0, 4096 * 32, [0xff; 4]),
            // The rest is beyond the log, and so is an end beyond all addresses.
            (4096 * 30, u64::MAX, [0, 0, 0, 0xc0]),
            (4096 * 32, 1, [0; 4]),
            (u64::MAX, 1, [0; 4]),
        ] {
            let (log, file) = log(4);
            log.mark(address, length);
            assert_eq!(bytes(&file), expected, "{length} bytes at {address:#x}");
            assert_eq!(log.is_marked(address), length > 0 && address < 4096 * 32);
        }
    }

    #[test]
    fn bits_that_others_set_and_take_meanwhile_are_not_disturbed() {
        const ROUNDS: u64 = 20_000;
        let (log, file) = log(1);
        let other = LogMap::new(&VhostUserLog::new(1, 0), &file).unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| (0..ROUNDS).for_each(|_| other.mark(0, 1)));
            for round in 0..ROUNDS {
                log.mark(4096, 1);
                let byte = other.byte(1).unwrap();
                assert_ne!(byte.fetch_and(!0b10, Ordering::AcqRel) & 0b10, 0, "lost in round {round}");
            }
        });
        assert_eq!(bytes(&file), [1]);
    }

    #[test]
    fn a_log_marks_only_while_it_is_in_use() {
        let (log, file) = log(4);
        log.activate(false);
        log.mark(0, 1);
        assert_eq!(bytes(&file), [0; 4]);
        log.activate(true);
        log.mark(0, 1);
        assert_eq!(bytes(&file), [1, 0, 0, 0]);
        log.set(None);
        log.mark(4096, 1);
        assert!(!log.is_active() && !log.is_marked(0));
        assert_eq!(bytes(&file), [1, 0, 0, 0]);
    }

    #[test]
    fn a_log_lies_at_its_offset() {
        let file = file(4096 + 4);
        let map = LogMap::new(&VhostUserLog::new(4, 4096), &file).unwrap();
        map.mark(4096 * 9, 1);
        let bytes = bytes(&file);
        assert_eq!(bytes[4096..], [0, 0b10, 0, 0]);
        assert!(bytes[..4096].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn a_log_that_does_not_lie_within_its_file_is_refused() {
        let file = file(8192);
        for (size, offset) in
            [(8193, 0), (4097, 4096), (1, 8192), (0, 0), (8, !4095), (u64::MAX, 4096), (1 << 62, 0), (16, 8)]
        {
            let error = LogMap::new(&VhostUserLog { mmap_size: size, mmap_offset: offset }, &file);
            assert!(error.is_err(), "{size} bytes at {offset}");
        }
        // Not a file at all.
        let (socket, _other) = std::os::unix::net::UnixStream::pair().unwrap();
        let socket = File::from(std::os::fd::OwnedFd::from(socket));
        assert!(LogMap::new(&VhostUserLog::new(4, 0), &socket).is_err());
    }

    #[test]
    fn a_log_without_bits_for_all_memory_is_noticed() {
        let (log, _file) = log(2);
        log.check("memory", 16 * 4096).unwrap();
        let error = log.check("memory", 16 * 4096 + 1).unwrap_err().to_string();
        assert!(error.contains("expected at least 3 bytes"), "{error}");
        log.check("memory", u64::MAX).unwrap_err();
        log.set(None);
        log.check("memory", u64::MAX).unwrap();
    }
}
