//! Devices: protection domains, memory that is registered with them, and receive buffers that connections share.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{CStr, c_int};
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rdma_sys::ibv_access_flags as access;

use super::{call, check};
use crate::buffer::Segment;
use crate::transport::rdma::endpoint::{Keys, QueueSizes, Slab};
use crate::transport::rdma::memory::Pages;
use crate::transport::rdma::{Exposure, RdmaError, SHARED_RECEIVES};

/// Marks the identity of a posted receive, to tell it from work that was sent.
pub(super) const RECEIVE: u64 = 1 << 63;

/// Limits of a device.
#[derive(Clone, Copy, Debug)]
pub(in crate::transport::rdma) struct DeviceLimits {
    pub(in crate::transport::rdma) max_work: u32,
    pub(in crate::transport::rdma) max_pieces: u32,
    pub(in crate::transport::rdma) max_completions: u32,
    pub(in crate::transport::rdma) max_shared_receives: u32,
}

/// A protection domain on a device: what memory is registered with.
pub(in crate::transport::rdma) struct Domain {
    pub(super) pd: NonNull<rdma_sys::ibv_pd>,
    /// librdmacm keeps its devices open until the process ends.
    pub(super) context: *mut rdma_sys::ibv_context,
    pub(in crate::transport::rdma) limits: DeviceLimits,
    pub(in crate::transport::rdma) device: String,
    /// Receives that all accepted connections share, made when the first is accepted.
    shared: Mutex<Option<Arc<SharedReceives>>>,
}

// SAFETY: libibverbs may be called from any thread at the same time.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(in crate::transport::rdma) fn new(context: *mut rdma_sys::ibv_context) -> Result<Self, RdmaError> {
        if context.is_null() {
            return Err(RdmaError::NoDevice);
        }
        // SAFETY: the structure is plain numbers, and all-zero is one of its values.
        let mut found: rdma_sys::ibv_device_attr = unsafe { std::mem::zeroed() };
        // SAFETY: context and structure are valid.
        check("asking the device for its limits", unsafe {
            rdma_sys::ibv_query_device(context, &mut found)
        })?;
        // SAFETY: the context and its device are valid; the name is a text inside the device.
        let device = unsafe { CStr::from_ptr(rdma_sys::ibv_get_device_name((*context).device)) };
        let device = device.to_string_lossy().into_owned();
        // SAFETY: the context is valid.
        let pd = NonNull::new(unsafe { rdma_sys::ibv_alloc_pd(context) });
        let pd = pd.ok_or_else(|| call("making a protection domain"))?;
        let positive = |n: c_int| u32::try_from(n).unwrap_or(0);
        let limits = DeviceLimits {
            max_work: positive(found.max_qp_wr),
            max_pieces: positive(found.max_sge),
            max_completions: positive(found.max_cqe),
            max_shared_receives: if found.max_srq > 0 { positive(found.max_srq_wr) } else { 0 },
        };
        Ok(Self { pd, context, limits, device, shared: Mutex::new(None) })
    }

    pub(in crate::transport::rdma) fn is_of(&self, context: *mut rdma_sys::ibv_context) -> bool {
        self.context == context
    }

    /// Registers memory; `owner` is kept until the registration is gone.
    pub(in crate::transport::rdma) fn register(
        self: &Arc<Self>,
        segment: Segment,
        owner: Arc<dyn Any + Send + Sync>,
        exposure: Exposure,
    ) -> Result<MemoryRegion, RdmaError> {
        let flags = match exposure {
            Exposure::Local => access::IBV_ACCESS_LOCAL_WRITE.0,
            Exposure::Peers => access::IBV_ACCESS_LOCAL_WRITE.0 | access::IBV_ACCESS_REMOTE_WRITE.0,
        };
        let flags = c_int::try_from(flags).unwrap_or(0);
        // SAFETY: the range is mapped by the promise made when the segment was created, and `owner` keeps it so.
        let mr =
            unsafe { rdma_sys::ibv_reg_mr(self.pd.as_ptr(), segment.base().cast(), segment.length(), flags) };
        let Some(mr) = NonNull::new(mr) else {
            let source = io::Error::last_os_error();
            return Err(RdmaError::pinning(segment.length(), &self.device, source));
        };
        Ok(MemoryRegion { mr, _domain: Arc::clone(self), _owner: owner })
    }

    /// Pages of a connection's own, registered.
    pub(in crate::transport::rdma) fn slab(
        self: &Arc<Self>,
        length: usize,
        exposure: Exposure,
    ) -> Result<Slab, RdmaError> {
        let pages = Arc::new(
            Pages::new(length).map_err(|source| RdmaError::Call { what: "setting memory aside", source })?,
        );
        let owner: Arc<dyn Any + Send + Sync> = pages.clone();
        let region = self.register(pages.segment(0, usize::MAX), owner, exposure)?;
        let keys = region.keys();
        Ok(Slab::new(pages, keys, Some(Box::new(region))))
    }
}

impl Drop for Domain {
    fn drop(&mut self) {
        // Shared receives hold the domain as well: once there are any, it stays for the life of the process.
        // SAFETY: regions, queues and identities hold the domain, so none of them is left.
        unsafe { rdma_sys::ibv_dealloc_pd(self.pd.as_ptr()) };
    }
}

/// Memory that a domain's connections may use. It ends the registration, and then lets go of the memory.
pub(in crate::transport::rdma) struct MemoryRegion {
    mr: NonNull<rdma_sys::ibv_mr>,
    _domain: Arc<Domain>,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: libibverbs may be called from any thread; the value has one owner.
unsafe impl Send for MemoryRegion {}
// SAFETY: `&MemoryRegion` only reads two numbers that never change.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    pub(in crate::transport::rdma) fn keys(&self) -> Keys {
        // SAFETY: the region lives as long as `self`.
        let mr = unsafe { self.mr.as_ref() };
        Keys { local: mr.lkey, remote: mr.rkey }
    }
}

impl Drop for MemoryRegion {
    fn drop(&mut self) {
        // SAFETY: registered by `Domain::register`, once.
        let returned = unsafe { rdma_sys::ibv_dereg_mr(self.mr.as_ptr()) };
        if returned != 0 {
            tracing::error!(
                "a memory registration cannot be ended: {}",
                io::Error::from_raw_os_error(returned)
            );
        }
    }
}

/// A shared receive queue with its buffers: memory grows with the number of connections up to a bound, and each buffer is
/// used by whichever connection needs it.
pub(in crate::transport::rdma) struct SharedReceives {
    pub(super) srq: NonNull<rdma_sys::ibv_srq>,
    pub(super) size: usize,
    most: usize,
    /// Slabs of `per_slab` buffers; a buffer's number is its place in all of them.
    slabs: Mutex<Vec<Arc<Slab>>>,
    pub(super) per_slab: usize,
    users: AtomicUsize,
}

// SAFETY: libibverbs may be called from any thread at the same time.
unsafe impl Send for SharedReceives {}
// SAFETY: as above.
unsafe impl Sync for SharedReceives {}

impl SharedReceives {
    pub(super) fn post(&self, slab: &Slab, number: u32) -> Result<(), RdmaError> {
        let offset = number as usize % self.per_slab * self.size;
        let piece = slab.piece(offset, self.size);
        let mut sge = rdma_sys::ibv_sge { addr: piece.address, length: piece.length, lkey: piece.key };
        let mut work = receive_work(number, &mut sge);
        let mut bad = ptr::null_mut();
        // SAFETY: queue, work and its one piece are valid; the piece is memory of a slab that lives as long as `self`.
        check("posting a receive", unsafe {
            rdma_sys::ibv_post_srq_recv(self.srq.as_ptr(), &mut work, &mut bad)
        })
    }

    pub(super) fn slab_of(&self, number: u32) -> Option<Arc<Slab>> {
        let slabs = self.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        slabs.get(number as usize / self.per_slab).cloned()
    }
}

impl Drop for SharedReceives {
    fn drop(&mut self) {
        // SAFETY: queue pairs hold the shared receives, so none of them is left.
        unsafe { rdma_sys::ibv_destroy_srq(self.srq.as_ptr()) };
    }
}

/// One user's part in the shared receives.
pub(super) struct Share(pub(super) Arc<SharedReceives>);

impl Drop for Share {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Domain {
    /// Posts more receives, if there are fewer than so many users need, and fewer than there may be.
    fn grow(self: &Arc<Self>, receives: &SharedReceives, users: usize) -> Result<(), RdmaError> {
        let mut slabs = receives.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let posted = slabs.len() * receives.per_slab;
        if slabs.len() >= users || posted + receives.per_slab > receives.most {
            return Ok(());
        }
        let slab = Arc::new(self.slab(receives.per_slab * receives.size, Exposure::Local)?);
        slabs.push(Arc::clone(&slab));
        drop(slabs);
        for number in posted..posted + receives.per_slab {
            receives.post(&slab, u32::try_from(number).unwrap_or(u32::MAX))?;
        }
        Ok(())
    }

    /// The shared receives, with room for one connection more.
    pub(super) fn shared_receives(self: &Arc<Self>, sizes: QueueSizes) -> Result<Share, RdmaError> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let receives = if let Some(receives) = &*shared {
            Arc::clone(receives)
        } else {
            let most = SHARED_RECEIVES.min(self.limits.max_shared_receives);
            let attributes = rdma_sys::ibv_srq_attr { max_wr: most, max_sge: 1, srq_limit: 0 };
            let mut wanted = rdma_sys::ibv_srq_init_attr { srq_context: ptr::null_mut(), attr: attributes };
            // SAFETY: domain and attributes are valid.
            let srq = NonNull::new(unsafe { rdma_sys::ibv_create_srq(self.pd.as_ptr(), &mut wanted) });
            let receives = Arc::new(SharedReceives {
                srq: srq.ok_or_else(|| call("making a shared receive queue"))?,
                size: sizes.receive_size as usize,
                most: most as usize,
                slabs: Mutex::new(Vec::new()),
                per_slab: sizes.receives as usize,
                users: 0.into(),
            });
            *shared = Some(Arc::clone(&receives));
            receives
        };
        drop(shared);
        let users = receives.users.fetch_add(1, Ordering::Relaxed) + 1;
        let share = Share(receives);
        self.grow(&share.0, users)?;
        Ok(share)
    }
}

pub(super) fn receive_work(number: u32, sge: &mut rdma_sys::ibv_sge) -> rdma_sys::ibv_recv_wr {
    rdma_sys::ibv_recv_wr {
        wr_id: RECEIVE | u64::from(number),
        next: ptr::null_mut(),
        sg_list: sge,
        num_sge: 1,
    }
}
