//! The few system calls that a load generator needs and the standard library lacks: shared memory, sleeping on several
//! descriptors with nanoseconds, and a descriptor that tells the death of a process.
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::ptr::NonNull;
use std::time::Duration;

/// Memory that is mapped here and can be handed to another process by its descriptor: the guest's RAM.
///
/// The other process may change it at any moment, so no Rust reference into it is ever formed; everything goes through
/// the copying and volatile accessors below, which check the range.
pub(super) struct SharedMemory {
    base: NonNull<u8>,
    length: usize,
    file: OwnedFd,
}

// SAFETY: the mapping belongs to the value alone and is not tied to a thread; access is by copies and volatile
// accesses through a shared reference, which other processes may interleave with anyway.
unsafe impl Send for SharedMemory {}

impl SharedMemory {
    /// Maps `length` bytes of new anonymous memory.
    pub(super) fn new(length: usize) -> io::Result<Self> {
        let size = libc::off_t::try_from(length).map_err(|_| io::Error::from(io::ErrorKind::OutOfMemory))?;
        // SAFETY: the name is a NUL-terminated literal; the returned descriptor is checked before it is owned.
        let file = unsafe {
            let fd = libc::memfd_create(c"guest-ram".as_ptr(), libc::MFD_CLOEXEC);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            OwnedFd::from_raw_fd(fd)
        };
        // SAFETY: the descriptor is ours and open.
        if unsafe { libc::ftruncate(file.as_raw_fd(), size) } < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: a new mapping of our own file of exactly `length` bytes; no existing mapping is replaced.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_POPULATE,
                file.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or_else(|| io::Error::from(io::ErrorKind::OutOfMemory))?;
        Ok(Self { base, length, file })
    }

    pub(super) fn address(&self) -> usize {
        self.base.as_ptr() as usize
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    /// The memory as a plain slice, for the one moment before it is shared with anybody.
    pub(super) fn before_sharing(&mut self, offset: usize, length: usize) -> &mut [u8] {
        // SAFETY: `at` checked the range; `&mut self` makes this the only access here, and no other process has the
        // descriptor yet (the caller's promise, and harmless to this process if broken: the bytes are plain data).
        unsafe { std::slice::from_raw_parts_mut(self.at(offset, length), length) }
    }

    pub(super) fn write(&self, offset: usize, bytes: &[u8]) {
        // SAFETY: `at` checked the range; source and destination cannot overlap, since nobody holds a reference into
        // the mapping.
        unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), self.at(offset, bytes.len()), bytes.len()) }
    }

    pub(super) fn read(&self, offset: usize, bytes: &mut [u8]) {
        // SAFETY: as in `write`.
        unsafe {
            std::ptr::copy_nonoverlapping(self.at(offset, bytes.len()), bytes.as_mut_ptr(), bytes.len())
        }
    }

    pub(super) fn read_byte(&self, offset: usize) -> u8 {
        // SAFETY: `at` checked the range; volatile because the device writes it.
        unsafe { self.at(offset, 1).read_volatile() }
    }

    /// A 16-bit field of the ring, shared with the device by atomic accesses.
    pub(super) fn atomic_u16(&self, offset: usize) -> &std::sync::atomic::AtomicU16 {
        assert!(offset.is_multiple_of(2), "a ring field is aligned by the ring's layout");
        // SAFETY: `at` checked the range and the assertion the alignment (the mapping is page aligned); the field is
        // only ever accessed atomically, and lives as long as the mapping.
        unsafe { std::sync::atomic::AtomicU16::from_ptr(self.at(offset, 2).cast()) }
    }

    fn at(&self, offset: usize, length: usize) -> *mut u8 {
        assert!(
            offset.checked_add(length).is_some_and(|end| end <= self.length),
            "access of {length} bytes at {offset} outside the {} bytes of shared memory",
            self.length
        );
        // SAFETY: the offset is inside the mapping (asserted above).
        unsafe { self.base.as_ptr().add(offset) }
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // SAFETY: the mapping was made by `new` with this address and length and nothing refers to it any more.
        unsafe { libc::munmap(self.base.as_ptr().cast::<c_void>(), self.length) };
    }
}

/// Sleeps until one of the descriptors is readable or hung up, at most `timeout`. Tells for each whether it is.
pub(super) fn wait_readable(
    descriptors: &[RawFd],
    ready: &mut Vec<bool>,
    timeout: Duration,
) -> io::Result<()> {
    let mut polled: [libc::pollfd; MAX_WAIT] =
        [libc::pollfd { fd: -1, events: libc::POLLIN, revents: 0 }; MAX_WAIT];
    assert!(descriptors.len() <= MAX_WAIT, "at most {MAX_WAIT} descriptors are waited on at once");
    for (entry, fd) in polled.iter_mut().zip(descriptors) {
        entry.fd = *fd;
    }
    let limit = libc::timespec {
        tv_sec: libc::time_t::try_from(timeout.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    let count = u64::try_from(descriptors.len()).unwrap_or(0);
    // SAFETY: the array holds at least `count` entries and outlives the call, as does the time limit.
    let result = unsafe { libc::ppoll(polled.as_mut_ptr(), count, &raw const limit, std::ptr::null()) };
    ready.clear();
    if result < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        ready.resize(descriptors.len(), false);
        return Ok(());
    }
    ready.extend(polled.iter().take(descriptors.len()).map(|entry| entry.revents != 0));
    Ok(())
}

/// Most descriptors of one [`wait_readable`]: the queues of a disk and the watched processes.
pub(super) const MAX_WAIT: usize = 64;

/// A descriptor that becomes readable when the process ends. A number that no process has is an error.
pub(super) fn watch_process(pid: u32) -> io::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers; the returned descriptor is checked before it is owned.
    unsafe {
        let fd = libc::syscall(libc::SYS_pidfd_open, libc::pid_t::try_from(pid).unwrap_or(-1), 0);
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(OwnedFd::from_raw_fd(RawFd::try_from(fd).unwrap_or(-1)))
    }
}

/// Empties an eventfd, so that the next signal wakes again. The descriptor was just seen readable, so this cannot block.
pub(super) fn drain_eventfd(fd: BorrowedFd<'_>) {
    let mut value = [0_u8; 8];
    // SAFETY: reads at most eight bytes into a live buffer of eight.
    unsafe { libc::read(fd.as_raw_fd(), value.as_mut_ptr().cast(), value.len()) };
}

/// Makes timed sleeps of this thread end on time; the kernel's default lets them end 50 µs late.
pub(super) fn sleep_precisely() {
    // SAFETY: prctl with integers only; a failure leaves the default, which is late but right.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1_u64, 0_u64, 0_u64, 0_u64) };
}
