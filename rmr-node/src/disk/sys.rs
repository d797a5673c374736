//! The few system calls that `std` has no function for. This file holds their `unsafe`.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use libc::{c_int, off_t};
use rmr_common::buffer::Segment;

/// `statfs` type of tmpfs.
pub(crate) const TMPFS_MAGIC: i64 = 0x0102_1994;
/// `statfs` type of ramfs.
pub(crate) const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// `fallocate` mode that makes a hole, which reads as zeroes.
pub(crate) const PUNCH_HOLE: c_int = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
/// `fallocate` mode that makes a range read as zeroes and keeps it allocated.
pub(crate) const ZERO_RANGE: c_int = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

/// What direct I/O on a file must be aligned to, in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct DirectAlignment {
    pub(crate) memory: u32,
    pub(crate) offset: u32,
}

/// Takes the lock of the open file without waiting; false when another open file holds one that conflicts.
pub(crate) fn try_lock(file: &File, exclusive: bool) -> io::Result<bool> {
    let kind = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: the descriptor is open for the duration of the call.
    match check(unsafe { libc::flock(file.as_raw_fd(), kind | libc::LOCK_NB) }) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::EWOULDBLOCK) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Switches direct I/O on for the open file.
pub(crate) fn set_direct(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of both calls.
    let flags = check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) })?;
    // SAFETY: as above.
    check(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_DIRECT) })?;
    Ok(())
}

/// The magic number of the file system that the file is on.
pub(crate) fn file_system_magic(file: &File) -> io::Result<i64> {
    let mut buffer = MaybeUninit::<libc::statfs>::uninit();
    // SAFETY: the buffer has the size that the call fills.
    check(unsafe { libc::fstatfs(file.as_raw_fd(), buffer.as_mut_ptr()) })?;
    // SAFETY: the call succeeded and filled the buffer.
    Ok(unsafe { buffer.assume_init() }.f_type)
}

/// What direct I/O on the file must be aligned to; `None` when the kernel (before 6.1) or the file system does not say,
/// or when there is no direct I/O.
pub(crate) fn direct_alignment(file: &File) -> io::Result<Option<DirectAlignment>> {
    let mut buffer = MaybeUninit::<libc::statx>::zeroed();
    let (fd, flags, mask) = (file.as_raw_fd(), libc::AT_EMPTY_PATH, libc::STATX_DIOALIGN);
    // SAFETY: the path is an empty C string, the buffer has the size that the call fills.
    check(unsafe { libc::statx(fd, c"".as_ptr(), flags, mask, buffer.as_mut_ptr()) })?;
    // SAFETY: zeroed at first, then filled by the call; all fields are integers.
    let stat = unsafe { buffer.assume_init() };
    let known = stat.stx_mask & libc::STATX_DIOALIGN != 0 && stat.stx_dio_offset_align != 0;
    let found = DirectAlignment { memory: stat.stx_dio_mem_align, offset: stat.stx_dio_offset_align };
    Ok(known.then_some(found))
}

/// Number of bytes that a user of the file's file system can still write there; `None` where it does not say.
pub(crate) fn free_bytes(file: &File) -> io::Result<Option<u64>> {
    let mut buffer = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: the buffer has the size that the call fills.
    check(unsafe { libc::fstatvfs(file.as_raw_fd(), buffer.as_mut_ptr()) })?;
    // SAFETY: the call succeeded and filled the buffer.
    let found = unsafe { buffer.assume_init() };
    Ok((found.f_blocks > 0).then(|| found.f_bavail.saturating_mul(found.f_frsize)))
}

/// Drops clean pages of the file from the page cache, so that the next read asks the disk.
pub(crate) fn drop_cache(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the call; no memory is involved.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Raises the limit of open descriptors as far as this process may, and returns it.
pub(crate) fn raise_descriptor_limit() -> io::Result<u64> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the structure is valid for the call, which fills it.
    check(unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) })?;
    if limit.rlim_cur < limit.rlim_max {
        let raised = libc::rlimit { rlim_cur: limit.rlim_max, ..limit };
        // SAFETY: the structure is valid for the call, which only reads it.
        check(unsafe { libc::setrlimit(libc::RLIMIT_NOFILE, &raw const raised) })?;
    }
    Ok(limit.rlim_max)
}

/// Whether the file has any allocated data; a file that is one hole has none.
pub(crate) fn has_data(file: &File) -> io::Result<bool> {
    // SAFETY: the descriptor is open for the duration of the call.
    match check(unsafe { libc::lseek(file.as_raw_fd(), 0, libc::SEEK_DATA) }) {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Whether the whole range is a hole at this moment: nothing is allocated there, and it reads as zeroes. May wait for the
/// file system's disk. False for a block device, which has no holes, and for a range beyond the end of the file.
pub(crate) fn is_hole(file: &File, offset: u64, length: u64) -> io::Result<bool> {
    // SAFETY: the descriptor is open for the duration of the call.
    let data = match check(unsafe { libc::lseek(file.as_raw_fd(), to_off(offset)?, libc::SEEK_DATA) }) {
        Ok(data) => u64::try_from(data).unwrap_or(0),
        // No data from there on.
        Err(error) if error.raw_os_error() == Some(libc::ENXIO) => file.metadata()?.len(),
        Err(error) => return Err(error),
    };
    Ok(data >= offset + length)
}

/// `fallocate` with one of the modes above.
pub(crate) fn fallocate(file: &File, mode: c_int, offset: u64, length: u64) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the call; no memory is involved.
    check(unsafe { libc::fallocate(file.as_raw_fd(), mode, to_off(offset)?, to_off(length)?) })?;
    Ok(())
}

/// Lets go of the pages of a file that are in the page cache and not waiting to be written.
pub(super) fn forget_pages(file: &File) -> io::Result<()> {
    // SAFETY: the descriptor is open for the duration of the call; no memory is involved.
    match unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}

/// Reads into the segments; gives the number of bytes, which may be fewer than asked for.
pub(super) fn read_at(file: &File, segments: &[Segment], offset: u64) -> io::Result<usize> {
    let count = c_int::try_from(segments.len().min(MAX_SEGMENTS)).expect("at most 1024");
    // SAFETY: `Segment` is a transparent `iovec`, and whoever made it promised that its memory is valid for this I/O.
    let read = unsafe { libc::preadv(file.as_raw_fd(), segments.as_ptr().cast(), count, to_off(offset)?) };
    usize::try_from(read).map_err(|_| io::Error::last_os_error())
}

/// Writes the segments; gives the number of bytes, which may be fewer than asked for.
pub(super) fn write_at(file: &File, segments: &[Segment], offset: u64) -> io::Result<usize> {
    let count = c_int::try_from(segments.len().min(MAX_SEGMENTS)).expect("at most 1024");
    // SAFETY: as in `read_at`.
    let written =
        unsafe { libc::pwritev(file.as_raw_fd(), segments.as_ptr().cast(), count, to_off(offset)?) };
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

/// Waits until the descriptor is readable; false when the time is over.
#[cfg(test)]
pub(super) fn wait_readable(fd: std::os::fd::RawFd, timeout: std::time::Duration) -> bool {
    let mut poll = libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let timeout_ms = c_int::try_from(timeout.as_millis()).unwrap_or(c_int::MAX);
    // SAFETY: one valid `pollfd`.
    unsafe { libc::poll(&raw mut poll, 1, timeout_ms) == 1 }
}

/// Most segments in one vectored call: the kernel's `UIO_MAXIOV`.
pub(super) const MAX_SEGMENTS: usize = 1024;

fn check<T: Copy + PartialEq + From<i8>>(result: T) -> io::Result<T> {
    if result == T::from(-1) { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn to_off(number: u64) -> io::Result<off_t> {
    off_t::try_from(number).map_err(|_| io::Error::from_raw_os_error(libc::EINVAL))
}
