//! Verbs as owned types: each holds what must outlive it, so that whatever order things are dropped in, the libraries see
//! the right one. These files hold the pointers to rdma-core, and nothing of the protocol.
//!
//! * `manager` — the connection manager: identities, connecting, listening.
//! * `device` — protection domains, registered memory, shared receive buffers.
//! * `queues` — a queue pair with its completion queue, as a connection sees it.
#![allow(unsafe_code)]

mod device;
mod manager;
mod queues;

use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::RawFd;
use std::sync::atomic::{AtomicBool, Ordering};

pub(super) use device::{Domain, MemoryRegion};
pub(super) use manager::{Listener, Offer, Place, connect};
pub(super) use queues::Endpoint;

use super::RdmaError;

fn call(what: &'static str) -> RdmaError {
    RdmaError::Call { what, source: io::Error::last_os_error() }
}

fn check(what: &'static str, returned: c_int) -> Result<(), RdmaError> {
    match returned {
        0 => Ok(()),
        -1 => Err(call(what)),
        // Verbs return the error number, unlike the connection manager.
        errno => Err(RdmaError::Call { what, source: io::Error::from_raw_os_error(errno.abs()) }),
    }
}

/// Whether this machine has any RDMA device, in words if not.
pub(super) fn device_present() -> Result<(), RdmaError> {
    let mut count = 0;
    // SAFETY: the pointer is to a number on this stack; the list is freed below.
    let list = unsafe { rdma_sys::ibv_get_device_list(&mut count) };
    if !list.is_null() {
        // SAFETY: the list came from the call above; no device of it is used.
        unsafe { rdma_sys::ibv_free_device_list(list) };
    }
    if list.is_null() || count == 0 { Err(RdmaError::NoDevice) } else { Ok(()) }
}

/// librdmacm was asked for its devices, and has opened all there were.
static HAS_ALL_OPEN: AtomicBool = AtomicBool::new(false);

/// Has librdmacm look which devices there are. Of those that were removed it closes the ones that nobody uses any more, for
/// which some drivers let the kernel wait; it does so only while there is another device, and opens all others.
fn forget_removed_devices() {
    HAS_ALL_OPEN.store(true, Ordering::Relaxed);
    let mut count = 0;
    // SAFETY: the pointer is to a number on this stack; the list is given back, and no device of it is used.
    unsafe {
        let list = rdma_sys::rdma_get_devices(&mut count);
        if !list.is_null() {
            rdma_sys::rdma_free_devices(list);
        }
    }
}

/// To be called now and then: closes devices that were removed and that librdmacm has open although nobody here uses them.
pub(super) fn forget_unused_devices() {
    if HAS_ALL_OPEN.load(Ordering::Relaxed) {
        forget_removed_devices();
    }
}

/// All devices of this machine that can be opened, by name, and whether they have memory windows of type 2B.
pub(super) fn devices_with_windows() -> Vec<(String, bool)> {
    let mut count = 0;
    // SAFETY: the pointer is to a number on this stack; the list is freed below.
    let list = unsafe { rdma_sys::ibv_get_device_list(&mut count) };
    let mut devices = Vec::new();
    if list.is_null() {
        return devices;
    }
    for index in 0..usize::try_from(count).unwrap_or(0) {
        // SAFETY: the list has so many devices, and each is valid until the list is freed; name and limits are copied, and
        // a context that was opened is closed again.
        unsafe {
            let device = *list.add(index);
            let context = rdma_sys::ibv_open_device(device);
            if context.is_null() {
                continue;
            }
            let name = CStr::from_ptr(rdma_sys::ibv_get_device_name(device)).to_string_lossy().into_owned();
            devices.push((name, device::has_windows(context).unwrap_or(false)));
            rdma_sys::ibv_close_device(context);
        }
    }
    // SAFETY: the list came from the call above; no device of it is used any more.
    unsafe { rdma_sys::ibv_free_device_list(list) };
    devices
}

fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: plain calls on a descriptor that the caller owns.
    let returned = unsafe {
        let flags = libc::fcntl(descriptor, libc::F_GETFL);
        libc::fcntl(descriptor, libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
