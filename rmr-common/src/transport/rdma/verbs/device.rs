//! Devices: protection domains, memory that is registered with them, and receive buffers that connections share.
#![allow(unsafe_code)]

use std::any::Any;
use std::collections::HashMap;
use std::ffi::{CStr, c_int};
use std::io;
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use rdma_sys::{ibv_access_flags as access, ibv_device_cap_flags as capability, ibv_mw_type};

use super::manager::{Anchor, Place};
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
    /// It has memory windows of type 2B, which belong to one queue pair.
    pub(in crate::transport::rdma) has_windows: bool,
}

fn query(context: *mut rdma_sys::ibv_context) -> Result<rdma_sys::ibv_device_attr, RdmaError> {
    // SAFETY: the structure is plain numbers, and all-zero is one of its values.
    let mut found: rdma_sys::ibv_device_attr = unsafe { std::mem::zeroed() };
    // SAFETY: context and structure are valid, as the callers promise for the first.
    check("asking the device for its limits", unsafe { rdma_sys::ibv_query_device(context, &mut found) })?;
    Ok(found)
}

const fn windows_of(found: &rdma_sys::ibv_device_attr) -> bool {
    found.device_cap_flags & capability::IBV_DEVICE_MEM_WINDOW_TYPE_2B.0 != 0 && found.max_mw > 0
}

/// Whether the device of a valid context has memory windows of type 2B.
pub(super) fn has_windows(context: *mut rdma_sys::ibv_context) -> Result<bool, RdmaError> {
    query(context).map(|found| windows_of(&found))
}

/// A protection domain on a device: what memory is registered with.
pub(in crate::transport::rdma) struct Domain {
    pub(super) pd: NonNull<rdma_sys::ibv_pd>,
    /// Open as long as `anchor` lives.
    pub(super) context: *mut rdma_sys::ibv_context,
    anchor: Option<Anchor>,
    is_gone: AtomicBool,
    pub(in crate::transport::rdma) limits: DeviceLimits,
    pub(in crate::transport::rdma) device: String,
    /// Receives that accepted connections share, for as long as there are any.
    shared: Mutex<Weak<SharedReceives>>,
    /// How many of them there are, those of earlier queues included.
    receives: AtomicUsize,
    /// Memory that windows can be bound to, by its key.
    regions: Mutex<HashMap<u32, Weak<Region>>>,
}

// SAFETY: libibverbs may be called from any thread at the same time.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    pub(in crate::transport::rdma) fn new(place: &Place) -> Result<Self, RdmaError> {
        let context = place.context;
        if context.is_null() {
            return Err(RdmaError::NoDevice);
        }
        let anchor = Anchor::new(place)?;
        let found = query(context)?;
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
            has_windows: windows_of(&found),
        };
        Ok(Self {
            pd,
            context,
            anchor: Some(anchor),
            is_gone: AtomicBool::new(false),
            limits,
            device,
            shared: Mutex::default(),
            receives: 0.into(),
            regions: Mutex::default(),
        })
    }

    pub(in crate::transport::rdma) fn is_of(&self, place: &Place) -> bool {
        self.context == place.context
    }

    /// Whether the device was removed. It is then to be let go of: the kernel waits for that.
    pub(in crate::transport::rdma) fn is_gone(&self) -> bool {
        if self.anchor.as_ref().is_some_and(Anchor::hears_of_removal) {
            self.is_gone.store(true, Ordering::Relaxed);
        }
        self.is_gone.load(Ordering::Relaxed)
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
            // No peer can do anything with the region's own key.
            Exposure::Windows if self.limits.has_windows => {
                access::IBV_ACCESS_LOCAL_WRITE.0 | access::IBV_ACCESS_MW_BIND.0
            }
            Exposure::Windows => access::IBV_ACCESS_LOCAL_WRITE.0,
        };
        let flags = c_int::try_from(flags).unwrap_or(0);
        // SAFETY: the range is mapped by the promise made when the segment was created, and `owner` keeps it so.
        let mr =
            unsafe { rdma_sys::ibv_reg_mr(self.pd.as_ptr(), segment.base().cast(), segment.length(), flags) };
        let Some(mr) = NonNull::new(mr) else {
            let source = io::Error::last_os_error();
            return Err(RdmaError::pinning(segment.length(), &self.device, source));
        };
        let region = Arc::new(Region { mr, domain: Arc::clone(self), _owner: owner });
        if exposure == Exposure::Windows {
            self.regions().insert(region.keys().local, Arc::downgrade(&region));
        }
        Ok(MemoryRegion(region))
    }

    fn regions(&self) -> MutexGuard<'_, HashMap<u32, Weak<Region>>> {
        // Each change is one insertion or removal, so a panic elsewhere left nothing half done.
        self.regions.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The memory that windows can be bound to by this key.
    pub(super) fn region(&self, key: u32) -> Option<Arc<Region>> {
        self.regions().get(&key).and_then(Weak::upgrade)
    }

    /// A memory window, bound to nothing.
    pub(super) fn window(self: &Arc<Self>) -> Result<MemoryWindow, RdmaError> {
        if !self.limits.has_windows {
            return Err(RdmaError::NoWindows { device: self.device.clone() });
        }
        // SAFETY: the domain is valid.
        let mw = unsafe { rdma_sys::ibv_alloc_mw(self.pd.as_ptr(), ibv_mw_type::IBV_MW_TYPE_2) };
        let mw = mw.and_then(NonNull::new).ok_or_else(|| call("making a memory window"))?;
        Ok(MemoryWindow { mw, _domain: Arc::clone(self) })
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
        // SAFETY: regions, shared receives, queues and identities hold the domain, so none of them is left; the anchor keeps the device open.
        unsafe { rdma_sys::ibv_dealloc_pd(self.pd.as_ptr()) };
        self.anchor = None;
        if *self.is_gone.get_mut() {
            super::forget_removed_devices();
        }
    }
}

/// Memory that a domain's connections may use. It ends the registration, and then lets go of the memory.
pub(in crate::transport::rdma) struct MemoryRegion(Arc<Region>);

impl MemoryRegion {
    pub(in crate::transport::rdma) fn keys(&self) -> Keys {
        self.0.keys()
    }
}

/// The registration itself, which whoever binds a window to it holds for that moment.
pub(super) struct Region {
    pub(super) mr: NonNull<rdma_sys::ibv_mr>,
    domain: Arc<Domain>,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: libibverbs may be called from any thread; the registration ends once, with the last who holds it.
unsafe impl Send for Region {}
// SAFETY: `&Region` only reads two numbers that never change, and names the region in work.
unsafe impl Sync for Region {}

impl Region {
    fn keys(&self) -> Keys {
        // SAFETY: the region lives as long as `self`.
        let mr = unsafe { self.mr.as_ref() };
        Keys { local: mr.lkey, remote: mr.rkey }
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // Before the card may give the key to other memory.
        self.domain.regions().remove(&self.keys().local);
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

/// A memory window. Dropping it invalidates its key.
pub(super) struct MemoryWindow {
    pub(super) mw: NonNull<rdma_sys::ibv_mw>,
    _domain: Arc<Domain>,
}

// SAFETY: libibverbs may be called from any thread; the value has one owner.
unsafe impl Send for MemoryWindow {}

impl MemoryWindow {
    pub(super) fn key(&self) -> u32 {
        // SAFETY: the window lives as long as `self`.
        unsafe { self.mw.as_ref() }.rkey
    }

    /// Notes the key that it is bound by, from which the next one is made.
    pub(super) fn bound_by(&mut self, key: u32) {
        // SAFETY: the window lives as long as `self`, and nothing else refers to it.
        unsafe { self.mw.as_mut() }.rkey = key;
    }
}

impl Drop for MemoryWindow {
    fn drop(&mut self) {
        // SAFETY: made by `Domain::window`, once.
        let returned = unsafe { rdma_sys::ibv_dealloc_mw(self.mw.as_ptr()) };
        if returned != 0 {
            tracing::error!("a memory window cannot be ended: {}", io::Error::from_raw_os_error(returned));
        }
    }
}

/// A shared receive queue with its buffers: memory grows with the number of connections up to a bound, and each buffer is
/// used by whichever connection needs it.
///
/// A buffer that is filled while its connection ends may never be heard of again: the card has taken it, and tells a
/// completion queue that is gone. So after some connections have ended the next ones get another queue, as far as there may
/// be more buffers, and this one goes with the last that uses it.
pub(in crate::transport::rdma) struct SharedReceives {
    pub(super) srq: NonNull<rdma_sys::ibv_srq>,
    pub(super) size: usize,
    most: usize,
    /// Slabs of `per_slab` buffers; a buffer's number is its place in all of them.
    slabs: Mutex<Vec<Arc<Slab>>>,
    pub(super) per_slab: usize,
    users: AtomicUsize,
    ended: AtomicUsize,
    domain: Arc<Domain>,
}

// SAFETY: libibverbs may be called from any thread at the same time.
unsafe impl Send for SharedReceives {}
// SAFETY: as above.
unsafe impl Sync for SharedReceives {}

impl SharedReceives {
    /// A connection that used them has ended.
    pub(super) fn note_end(&self) {
        self.ended.fetch_add(1, Ordering::Relaxed);
    }

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
        let slabs = self.slabs.get_mut().unwrap_or_else(PoisonError::into_inner).len();
        self.domain.receives.fetch_sub(slabs * self.per_slab, Ordering::Relaxed);
    }
}

/// One user's part in the shared receives.
pub(super) struct Share(pub(super) Arc<SharedReceives>);

impl Drop for Share {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Whether the next connection is to have another queue: when so many have ended that buffers may be missed, at worst one for
/// each, and unless there would be too many buffers then.
const fn wants_another(ended: usize, per_slab: usize, there: usize) -> bool {
    ended >= per_slab / 4 && there + per_slab <= SHARED_RECEIVES as usize
}

impl Domain {
    /// Posts more receives, if there are fewer than so many users need, and fewer than there may be. A queue without any gets some in
    /// any case: those of earlier queues are of no use to its users.
    fn grow(self: &Arc<Self>, receives: &SharedReceives, users: usize) -> Result<(), RdmaError> {
        let mut slabs = receives.slabs.lock().unwrap_or_else(PoisonError::into_inner);
        let (posted, there) = (slabs.len() * receives.per_slab, self.receives.load(Ordering::Relaxed));
        if slabs.len() >= users
            || posted + receives.per_slab > receives.most
            || !slabs.is_empty() && there + receives.per_slab > SHARED_RECEIVES as usize
        {
            return Ok(());
        }
        let slab = Arc::new(self.slab(receives.per_slab * receives.size, Exposure::Local)?);
        slabs.push(Arc::clone(&slab));
        self.receives.fetch_add(receives.per_slab, Ordering::Relaxed);
        drop(slabs);
        for number in posted..posted + receives.per_slab {
            if let Err(error) = receives.post(&slab, u32::try_from(number).unwrap_or(u32::MAX)) {
                // Nobody would post the rest of them.
                receives.ended.fetch_add(receives.per_slab, Ordering::Relaxed);
                return Err(error);
            }
        }
        Ok(())
    }

    /// A queue with receives for one connection.
    fn another_queue(self: &Arc<Self>, sizes: QueueSizes) -> Result<Arc<SharedReceives>, RdmaError> {
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
            ended: 0.into(),
            domain: Arc::clone(self),
        });
        self.grow(&receives, 1)?;
        Ok(receives)
    }

    /// The shared receives, with room for one connection more.
    pub(super) fn shared_receives(self: &Arc<Self>, sizes: QueueSizes) -> Result<Share, RdmaError> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let there = self.receives.load(Ordering::Relaxed);
        let is_worn =
            |r: &Arc<SharedReceives>| wants_another(r.ended.load(Ordering::Relaxed), r.per_slab, there);
        let receives = match shared.upgrade() {
            Some(receives) if !is_worn(&receives) => receives,
            worn => match self.another_queue(sizes) {
                Ok(receives) => {
                    *shared = Arc::downgrade(&receives);
                    receives
                }
                // Better these than none.
                Err(error) => worn.ok_or(error)?,
            },
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn receives_are_renewed_after_some_connections_have_ended_but_never_beyond_their_number() {
        let most = SHARED_RECEIVES as usize;
        assert!(!wants_another(15, 64, 64));
        assert!(wants_another(16, 64, 64));
        assert!(wants_another(16, 64, most - 64));
        assert!(!wants_another(16, 64, most - 63), "the worn ones have to do");
    }
}
