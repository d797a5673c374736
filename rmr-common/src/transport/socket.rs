//! The two system calls of the TCP binding: vectored send and vectored receive.
#![allow(unsafe_code)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use crate::buffer::Segment;

/// Most segments that one call takes (`IOV_MAX` of Linux).
pub(super) const MAX_SEGMENTS: usize = 1024;

fn message(segments: &[Segment]) -> libc::msghdr {
    // SAFETY: all-zero is a valid msghdr: null pointers with zero lengths.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    // `Segment` is a transparent iovec; the kernel does not write to the array itself.
    message.msg_iov = segments.as_ptr().cast_mut().cast();
    message.msg_iovlen = segments.len().min(MAX_SEGMENTS);
    message
}

fn result(returned: isize) -> io::Result<usize> {
    usize::try_from(returned).map_err(|_| io::Error::last_os_error())
}

/// Sends from `segments` without blocking; returns the bytes taken.
pub(super) fn send(socket: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let message = message(segments);
    // SAFETY: the segments' memory is readable by the promise made when they were created.
    result(unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) })
}

/// Receives into `segments` without blocking; returns the bytes received, zero when the peer closed.
pub(super) fn receive(socket: BorrowedFd<'_>, segments: &[Segment]) -> io::Result<usize> {
    let mut message = message(segments);
    // SAFETY: the segments' memory is writable by the promise made when they were created.
    result(unsafe { libc::recvmsg(socket.as_raw_fd(), &mut message, libc::MSG_DONTWAIT) })
}

/// Sets an integer option of a socket.
pub(super) fn set_option(socket: BorrowedFd<'_>, level: i32, name: i32, value: i32) -> io::Result<()> {
    let length = libc::socklen_t::try_from(size_of::<i32>()).unwrap_or(4);
    // SAFETY: the pointer and length describe `value`.
    let returned = unsafe {
        libc::setsockopt(socket.as_raw_fd(), level, name, std::ptr::from_ref(&value).cast(), length)
    };
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Chooses the congestion control of a socket by name.
pub(super) fn set_congestion(socket: BorrowedFd<'_>, name: &str) -> io::Result<()> {
    let length = libc::socklen_t::try_from(name.len()).unwrap_or(0);
    let (level, option) = (libc::IPPROTO_TCP, libc::TCP_CONGESTION);
    // SAFETY: the pointer and length describe `name`, of which the kernel reads that many bytes.
    let returned =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, name.as_ptr().cast(), length) };
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
