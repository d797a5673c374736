//! Verbs as owned types: each holds what must outlive it, so that whatever order things are dropped in, the libraries see
//! the right one. This file holds the pointers to rdma-core, and nothing of the protocol.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rdma_sys::{
    ibv_access_flags as access, ibv_qp_type, ibv_send_flags as send_flags, ibv_wc_opcode, ibv_wc_status,
    ibv_wr_opcode, rdma_cm_event_type as cm,
};

use super::endpoint::{
    Completion, Done, Keys, LinkEvent, Operation, Piece, QueueSizes, Slab, Verbs, WorkRequest,
};
use super::memory::Pages;
use super::{Exposure, RdmaError};
use crate::buffer::Segment;

/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT` of `rdma_cma.h`.
const OPTION_LEVEL_ID: c_int = 0;
const OPTION_ACK_TIMEOUT: c_int = 3;
/// Completions taken in one call.
const POLL_BATCH: usize = 32;
/// Marks the identity of a posted receive, to tell it from work that was sent.
const RECEIVE: u64 = 1 << 63;

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

/// A channel on which the connection manager tells what happens to connections.
pub(super) struct EventChannel(NonNull<rdma_sys::rdma_event_channel>);

// SAFETY: librdmacm may be called from any thread.
unsafe impl Send for EventChannel {}
// SAFETY: as above; the kernel serialises readers of the channel's file.
unsafe impl Sync for EventChannel {}

impl EventChannel {
    fn new() -> Result<Self, RdmaError> {
        device_present()?;
        // SAFETY: no arguments.
        let channel = NonNull::new(unsafe { rdma_sys::rdma_create_event_channel() });
        let channel = Self(channel.ok_or_else(|| call("opening the RDMA connection manager"))?);
        set_nonblocking(channel.descriptor()).map_err(|_| call("making an event channel non-blocking"))?;
        Ok(channel)
    }

    pub(super) fn descriptor(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { self.0.as_ref() }.fd
    }

    /// The next event, if there is one. It is acknowledged at once; what counts is copied.
    fn next(&self) -> Result<Option<CmEvent>, RdmaError> {
        let mut event = ptr::null_mut();
        // SAFETY: both pointers are valid; the event is acknowledged below, once.
        if unsafe { rdma_sys::rdma_get_cm_event(self.0.as_ptr(), &mut event) } != 0 {
            let error = io::Error::last_os_error();
            return match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(None),
                _ => Err(RdmaError::Call { what: "reading connection events", source: error }),
            };
        }
        // SAFETY: the library returned a valid event; private data is `conn`'s in events of connections, and points to as
        // many bytes as it says until the event is acknowledged.
        let copied = unsafe {
            let raw = &*event;
            let parameters = raw.param.conn;
            let carries =
                matches!(raw.event, cm::RDMA_CM_EVENT_CONNECT_REQUEST | cm::RDMA_CM_EVENT_ESTABLISHED)
                    && !parameters.private_data.is_null();
            let private = if carries {
                let length = usize::from(parameters.private_data_len);
                std::slice::from_raw_parts(parameters.private_data.cast::<u8>(), length).to_vec()
            } else {
                Vec::new()
            };
            CmEvent { kind: raw.event, status: raw.status, id: raw.id, private }
        };
        // SAFETY: the event is valid and was not acknowledged before.
        unsafe { rdma_sys::rdma_ack_cm_event(event) };
        Ok(Some(copied))
    }

    /// Waits for the next event until `deadline`.
    fn wait(&self, deadline: Instant) -> Result<CmEvent, RdmaError> {
        loop {
            if let Some(event) = self.next()? {
                return Ok(event);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(RdmaError::Timeout);
            }
            let milliseconds = i32::try_from(left.as_millis()).unwrap_or(i32::MAX).max(1);
            let mut poll = libc::pollfd { fd: self.descriptor(), events: libc::POLLIN, revents: 0 };
            // SAFETY: one descriptor on this stack. An error shows as a timeout or in the next read.
            unsafe { libc::poll(&mut poll, 1, milliseconds) };
        }
    }
}

impl Drop for EventChannel {
    fn drop(&mut self) {
        // SAFETY: identities hold the channel, so there is none of them left.
        unsafe { rdma_sys::rdma_destroy_event_channel(self.0.as_ptr()) };
    }
}

fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: plain calls on a descriptor that the caller owns.
    let returned = unsafe {
        let flags = libc::fcntl(descriptor, libc::F_GETFL);
        libc::fcntl(descriptor, libc::F_SETFL, flags | libc::O_NONBLOCK)
    };
    if returned == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// An event of the connection manager, copied.
struct CmEvent {
    kind: cm::Type,
    status: i32,
    id: *mut rdma_sys::rdma_cm_id,
    private: Vec<u8>,
}

impl CmEvent {
    fn words(&self) -> String {
        // SAFETY: the library returns a text of its own for any number.
        let text = unsafe { CStr::from_ptr(rdma_sys::rdma_event_str(self.kind)) }.to_string_lossy();
        match self.kind {
            cm::RDMA_CM_EVENT_DISCONNECTED => "the peer disconnected".to_owned(),
            cm::RDMA_CM_EVENT_DEVICE_REMOVAL => "the RDMA device was removed".to_owned(),
            cm::RDMA_CM_EVENT_ADDR_CHANGE => "the address moved to another device".to_owned(),
            // Reasons of the InfiniBand connection manager (IBTA 12.6.7.2).
            cm::RDMA_CM_EVENT_REJECTED => match self.status {
                8 => "nobody listens there".to_owned(),
                10 => "the peer still has an older connection of this queue pair".to_owned(),
                28 => "the peer refused".to_owned(),
                reason => format!("the peer refused, reason {reason}"),
            },
            cm::RDMA_CM_EVENT_UNREACHABLE => "the peer cannot be reached".to_owned(),
            cm::RDMA_CM_EVENT_ADDR_ERROR => {
                "no RDMA device has a route to the address: use tcp:// or see docs/rdma.md".to_owned()
            }
            _ if self.status < 0 => format!("{text}: {}", io::Error::from_raw_os_error(-self.status)),
            _ => text.into_owned(),
        }
    }
}

/// An identity of the connection manager, with its queue pair if it has one.
struct Id {
    raw: NonNull<rdma_sys::rdma_cm_id>,
    has_queue_pair: bool,
    /// Where its events come; outlives it.
    channel: Arc<EventChannel>,
}

// SAFETY: librdmacm may be called from any thread, and this value has one owner.
unsafe impl Send for Id {}

impl Id {
    fn new(channel: &Arc<EventChannel>) -> Result<Self, RdmaError> {
        let mut raw = ptr::null_mut();
        // SAFETY: the channel is valid and held by the new value.
        let returned = unsafe {
            rdma_sys::rdma_create_id(
                channel.0.as_ptr(),
                &mut raw,
                ptr::null_mut(),
                rdma_sys::rdma_port_space::RDMA_PS_TCP,
            )
        };
        check("making a connection identity", returned)?;
        let raw = NonNull::new(raw).ok_or_else(|| call("making a connection identity"))?;
        Ok(Self { raw, has_queue_pair: false, channel: Arc::clone(channel) })
    }

    fn context(&self) -> *mut rdma_sys::ibv_context {
        // SAFETY: the identity lives as long as `self`.
        unsafe { self.raw.as_ref() }.verbs
    }

    /// How long the card waits for an acknowledgement before it sends again: so that seven attempts fit `dead_after`.
    fn set_ack_timeout(&self, dead_after: Duration) {
        // 4.096 µs << exponent; cards wait up to four times as long.
        let one = dead_after.as_micros() / (7 * 4);
        let exponent = (one * 1000 / 4096).max(1).ilog2().clamp(10, 20);
        let mut exponent = u8::try_from(exponent).unwrap_or(14);
        // A library or kernel that does not know the option keeps its own, longer time; pings find the dead peer then.
        // SAFETY: the pointer and length describe one byte on this stack.
        unsafe {
            rdma_sys::rdma_set_option(
                self.raw.as_ptr(),
                OPTION_LEVEL_ID,
                OPTION_ACK_TIMEOUT,
                (&raw mut exponent).cast::<c_void>(),
                1,
            )
        };
    }

    /// Moves the identity's events to a channel of its own.
    fn migrate(&mut self, channel: Arc<EventChannel>) -> Result<(), RdmaError> {
        // SAFETY: both are valid; all events of the identity so far are acknowledged, so this does not wait.
        let returned = unsafe { rdma_sys::rdma_migrate_id(self.raw.as_ptr(), channel.0.as_ptr()) };
        check("moving a connection to its own event channel", returned)?;
        self.channel = channel;
        Ok(())
    }

    fn peer(&self) -> Option<SocketAddr> {
        // SAFETY: the identity is valid, and the address part of it is a storage of any family, zero at first.
        let storage = unsafe { self.raw.as_ref().route.addr.dst_addr_union.dst_storage };
        from_storage(&storage)
    }

    fn local(&self) -> Option<SocketAddr> {
        // SAFETY: as in `peer`.
        let storage = unsafe { self.raw.as_ref().route.addr.src_addr_union.src_storage };
        from_storage(&storage)
    }
}

impl Drop for Id {
    fn drop(&mut self) {
        // SAFETY: the identity is valid, its events are acknowledged, and it goes with its queue pair, once.
        unsafe {
            if self.has_queue_pair {
                rdma_sys::rdma_destroy_qp(self.raw.as_ptr());
            }
            rdma_sys::rdma_destroy_id(self.raw.as_ptr());
        }
    }
}

/// Limits of a device.
#[derive(Clone, Copy, Debug)]
pub(super) struct DeviceLimits {
    pub(super) max_work: u32,
    pub(super) max_pieces: u32,
    pub(super) max_completions: u32,
    pub(super) max_shared_receives: u32,
}

/// A protection domain on a device: what memory is registered with.
pub(super) struct Domain {
    pd: NonNull<rdma_sys::ibv_pd>,
    /// librdmacm keeps its devices open until the process ends.
    context: *mut rdma_sys::ibv_context,
    pub(super) limits: DeviceLimits,
    pub(super) device: String,
    /// Receives that all accepted connections share, made when the first is accepted.
    shared: Mutex<Option<Arc<SharedReceives>>>,
}

// SAFETY: libibverbs may be called from any thread at the same time.
unsafe impl Send for Domain {}
// SAFETY: as above.
unsafe impl Sync for Domain {}

impl Domain {
    fn new(context: *mut rdma_sys::ibv_context) -> Result<Self, RdmaError> {
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

    pub(super) fn is_of(&self, context: *mut rdma_sys::ibv_context) -> bool {
        self.context == context
    }

    /// Registers memory; `owner` is kept until the registration is gone.
    pub(super) fn register(
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
    pub(super) fn slab(self: &Arc<Self>, length: usize, exposure: Exposure) -> Result<Slab, RdmaError> {
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
pub(super) struct MemoryRegion {
    mr: NonNull<rdma_sys::ibv_mr>,
    _domain: Arc<Domain>,
    _owner: Arc<dyn Any + Send + Sync>,
}

// SAFETY: libibverbs may be called from any thread; the value has one owner.
unsafe impl Send for MemoryRegion {}
// SAFETY: `&MemoryRegion` only reads two numbers that never change.
unsafe impl Sync for MemoryRegion {}

impl MemoryRegion {
    pub(super) fn keys(&self) -> Keys {
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
pub(super) struct SharedReceives {
    srq: NonNull<rdma_sys::ibv_srq>,
    size: usize,
    most: usize,
    /// Slabs of `per_slab` buffers; a buffer's number is its place in all of them.
    slabs: Mutex<Vec<Arc<Slab>>>,
    per_slab: usize,
    users: AtomicUsize,
}

// SAFETY: libibverbs may be called from any thread at the same time.
unsafe impl Send for SharedReceives {}
// SAFETY: as above.
unsafe impl Sync for SharedReceives {}

impl SharedReceives {
    fn post(&self, slab: &Slab, number: u32) -> Result<(), RdmaError> {
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

    fn slab_of(&self, number: u32) -> Option<Arc<Slab>> {
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

fn receive_work(number: u32, sge: &mut rdma_sys::ibv_sge) -> rdma_sys::ibv_recv_wr {
    rdma_sys::ibv_recv_wr {
        wr_id: RECEIVE | u64::from(number),
        next: ptr::null_mut(),
        sg_list: sge,
        num_sge: 1,
    }
}

/// A completion queue with the channel that wakes for it.
struct CompletionQueue {
    cq: NonNull<rdma_sys::ibv_cq>,
    channel: NonNull<rdma_sys::ibv_comp_channel>,
    _domain: Arc<Domain>,
}

// SAFETY: libibverbs may be called from any thread; the value has one owner.
unsafe impl Send for CompletionQueue {}

impl CompletionQueue {
    fn new(domain: &Arc<Domain>, depth: u32) -> Result<Self, RdmaError> {
        // SAFETY: the domain's context is valid.
        let channel = NonNull::new(unsafe { rdma_sys::ibv_create_comp_channel(domain.context) });
        let channel = channel.ok_or_else(|| call("making a completion channel"))?;
        let depth = c_int::try_from(depth.min(domain.limits.max_completions)).unwrap_or(c_int::MAX);
        // SAFETY: context and channel are valid.
        let cq =
            unsafe { rdma_sys::ibv_create_cq(domain.context, depth, ptr::null_mut(), channel.as_ptr(), 0) };
        let Some(cq) = NonNull::new(cq) else {
            let error = call("making a completion queue");
            // SAFETY: nothing uses the channel.
            unsafe { rdma_sys::ibv_destroy_comp_channel(channel.as_ptr()) };
            return Err(error);
        };
        let queue = Self { cq, channel, _domain: Arc::clone(domain) };
        set_nonblocking(queue.descriptor()).map_err(|_| call("making a completion channel non-blocking"))?;
        Ok(queue)
    }

    fn descriptor(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { self.channel.as_ref() }.fd
    }

    /// Reads and acknowledges what the channel says. It says nothing more until the queue is armed.
    fn quench(&self) {
        let (mut cq, mut context) = (ptr::null_mut(), ptr::null_mut());
        // SAFETY: all pointers are valid; each event is acknowledged once.
        unsafe {
            while rdma_sys::ibv_get_cq_event(self.channel.as_ptr(), &mut cq, &mut context) == 0 {
                rdma_sys::ibv_ack_cq_events(cq, 1);
            }
        }
    }

    fn arm(&self) -> Result<(), RdmaError> {
        // SAFETY: the queue is valid.
        check("arming a completion queue", unsafe { rdma_sys::ibv_req_notify_cq(self.cq.as_ptr(), 0) })
    }

    fn poll(&self, completions: &mut Vec<Completion>) -> Result<usize, RdmaError> {
        // SAFETY: plain numbers and a union of two; all-zero is a value.
        let mut found: [rdma_sys::ibv_wc; POLL_BATCH] = unsafe { std::mem::zeroed() };
        let most = i32::try_from(POLL_BATCH).unwrap_or(1);
        // SAFETY: the array has as many places as are asked for.
        let count = unsafe { rdma_sys::ibv_poll_cq(self.cq.as_ptr(), most, found.as_mut_ptr()) };
        let count = usize::try_from(count).map_err(|_| call("polling a completion queue"))?;
        completions.extend(found[..count.min(POLL_BATCH)].iter().map(completion));
        Ok(count)
    }
}

impl Drop for CompletionQueue {
    fn drop(&mut self) {
        self.quench();
        // SAFETY: the queue pair is dropped before (see `Endpoint`), and all events are acknowledged.
        unsafe {
            rdma_sys::ibv_destroy_cq(self.cq.as_ptr());
            rdma_sys::ibv_destroy_comp_channel(self.channel.as_ptr());
        }
    }
}

fn completion(found: &rdma_sys::ibv_wc) -> Completion {
    let is_receive = found.wr_id & RECEIVE != 0;
    let number = found.wr_id & !RECEIVE;
    let done = if found.status != ibv_wc_status::IBV_WC_SUCCESS {
        // SAFETY: the library returns a text of its own for any number.
        let text = unsafe { CStr::from_ptr(rdma_sys::ibv_wc_status_str(found.status)) };
        let flushed = found.status == ibv_wc_status::IBV_WC_WR_FLUSH_ERR;
        Done::Failed { status: text.to_string_lossy().into_owned(), flushed }
    } else if !is_receive {
        Done::Sent
    } else if found.opcode == ibv_wc_opcode::IBV_WC_RECV_RDMA_WITH_IMM {
        // SAFETY: a receive by this operation has immediate data.
        let raw = unsafe { found.imm_data_invalidated_rkey_union.imm_data };
        Done::Placed { immediate: u32::from_be(raw) }
    } else {
        Done::Received { length: found.byte_len }
    };
    Completion { is_receive, number, done }
}

/// Where receives are posted.
enum Receives {
    Own(Slab),
    Shared(Share),
}

/// One user's part in the shared receives.
struct Share(Arc<SharedReceives>);

impl Drop for Share {
    fn drop(&mut self) {
        self.0.users.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A connection's queue pair with all that it needs.
pub(super) struct Endpoint {
    /// First: goes before the completion queue.
    id: Id,
    completions: CompletionQueue,
    receives: Receives,
    pub(super) domain: Arc<Domain>,
    sizes: QueueSizes,
    max_pieces: usize,
    work: Vec<rdma_sys::ibv_send_wr>,
    pieces: Vec<rdma_sys::ibv_sge>,
}

// SAFETY: the raw pointers in `work` are scratch that is filled and used within one call.
unsafe impl Send for Endpoint {}

impl Endpoint {
    fn new(mut id: Id, domain: Arc<Domain>, mut sizes: QueueSizes, shared: bool) -> Result<Self, RdmaError> {
        sizes.sends = sizes.sends.min(domain.limits.max_work.max(16) - 1);
        let shared = if shared && domain.limits.max_shared_receives > 0 {
            Some(domain.shared_receives(sizes)?)
        } else {
            None
        };
        let completions = CompletionQueue::new(&domain, sizes.sends + sizes.receives + 16)?;
        let most_pieces = domain.limits.max_pieces.clamp(2, 32);
        // SAFETY: plain numbers and pointers; all-zero is a value.
        let mut wanted: rdma_sys::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        loop {
            wanted.send_cq = completions.cq.as_ptr();
            wanted.recv_cq = completions.cq.as_ptr();
            wanted.srq = shared.as_ref().map_or(ptr::null_mut(), |s| s.0.srq.as_ptr());
            wanted.qp_type = ibv_qp_type::IBV_QPT_RC;
            wanted.cap = rdma_sys::ibv_qp_cap {
                max_send_wr: sizes.sends,
                max_recv_wr: if shared.is_some() { 0 } else { sizes.receives },
                max_send_sge: most_pieces,
                max_recv_sge: 1,
                max_inline_data: sizes.inline,
            };
            // SAFETY: identity, domain and attributes are valid, and the identity is of the domain's device.
            let returned =
                unsafe { rdma_sys::rdma_create_qp(id.raw.as_ptr(), domain.pd.as_ptr(), &mut wanted) };
            match check("making a queue pair", returned) {
                Ok(()) => break,
                // Cards differ in what they send inline; without it, it is copied by the card instead.
                Err(_) if sizes.inline > 0 => sizes.inline /= 2,
                Err(error) => return Err(error),
            }
        }
        id.has_queue_pair = true;
        let receives = match shared {
            Some(shared) => Receives::Shared(shared),
            None => {
                let bytes = sizes.receives as usize * sizes.receive_size as usize;
                Receives::Own(domain.slab(bytes, Exposure::Local)?)
            }
        };
        let mut endpoint = Self {
            id,
            completions,
            receives,
            domain,
            sizes,
            max_pieces: most_pieces as usize,
            work: Vec::new(),
            pieces: Vec::new(),
        };
        if let Receives::Own(_) = endpoint.receives {
            for number in 0..sizes.receives {
                endpoint.post_receive(number)?;
            }
        }
        endpoint.completions.arm()?;
        Ok(endpoint)
    }

    /// Receives of the shared queue that this connection has used up go back to the others.
    fn give_back_receives(&mut self) {
        if let Receives::Own(_) = self.receives {
            return;
        }
        let mut completions = Vec::new();
        while self.completions.poll(&mut completions).is_ok_and(|count| count > 0) {}
        for completion in completions.iter().filter(|c| c.is_receive) {
            self.give_back(u32::try_from(completion.number).unwrap_or(u32::MAX));
        }
    }
}

impl Verbs for Endpoint {
    fn sizes(&self) -> QueueSizes {
        self.sizes
    }

    fn descriptors(&self) -> [RawFd; 2] {
        [self.completions.descriptor(), self.id.channel.descriptor()]
    }

    fn post(&mut self, requests: &[WorkRequest], pieces: &[Piece]) -> Result<(), RdmaError> {
        if !self.id.has_queue_pair || requests.is_empty() {
            return if requests.is_empty() { Ok(()) } else { Err(RdmaError::Over) };
        }
        self.pieces.clear();
        self.pieces.extend(pieces.iter().map(|p| rdma_sys::ibv_sge {
            addr: p.address,
            length: p.length,
            lkey: p.key,
        }));
        self.work.clear();
        for request in requests {
            // SAFETY: numbers, null pointers and unions of numbers; all-zero is a value.
            let mut work: rdma_sys::ibv_send_wr = unsafe { std::mem::zeroed() };
            work.wr_id = request.number;
            work.sg_list = self.pieces[request.first..].as_mut_ptr();
            work.num_sge = c_int::try_from(request.count).unwrap_or(0);
            if request.signaled {
                work.send_flags |= send_flags::IBV_SEND_SIGNALED.0;
            }
            if request.inline {
                work.send_flags |= send_flags::IBV_SEND_INLINE.0;
            }
            match request.operation {
                Operation::Send => work.opcode = ibv_wr_opcode::IBV_WR_SEND,
                Operation::Write { address, key } => {
                    work.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE;
                    work.wr.rdma = rdma_sys::rdma_t { remote_addr: address, rkey: key };
                }
                Operation::WriteWithImmediate { address, key, immediate } => {
                    work.opcode = ibv_wr_opcode::IBV_WR_RDMA_WRITE_WITH_IMM;
                    work.wr.rdma = rdma_sys::rdma_t { remote_addr: address, rkey: key };
                    work.imm_data_invalidated_rkey_union.imm_data = immediate.to_be();
                }
            }
            self.work.push(work);
        }
        let base = self.work.as_mut_ptr();
        for index in 1..self.work.len() {
            // SAFETY: both places are within the list, which does not move from here until it was posted.
            unsafe { (*base.add(index - 1)).next = base.add(index) };
        }
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is there; the chain and its pieces live until the call returns, and the memory that pieces
        // name stays until the work completed or the queue pair is gone, as the connection sees to.
        let returned = unsafe { rdma_sys::ibv_post_send(self.id.raw.as_ref().qp, base, &mut bad) };
        check("posting work", returned)
    }

    fn post_receive(&mut self, number: u32) -> Result<(), RdmaError> {
        let slab = match &self.receives {
            Receives::Shared(shared) => {
                let slab = shared.0.slab_of(number).ok_or(RdmaError::Over)?;
                return shared.0.post(&slab, number);
            }
            Receives::Own(slab) => slab,
        };
        if !self.id.has_queue_pair {
            return Err(RdmaError::Over);
        }
        let size = self.sizes.receive_size as usize;
        let piece = slab.piece(number as usize * size, size);
        let mut sge = rdma_sys::ibv_sge { addr: piece.address, length: piece.length, lkey: piece.key };
        let mut work = receive_work(number, &mut sge);
        let mut bad = ptr::null_mut();
        // SAFETY: the queue pair is there; work and piece are valid, and the slab outlives the queue pair (field order).
        let returned = unsafe { rdma_sys::ibv_post_recv(self.id.raw.as_ref().qp, &mut work, &mut bad) };
        check("posting a receive", returned)
    }

    fn receive_buffer(&self, number: u32) -> Option<(Arc<Pages>, usize, usize)> {
        let size = self.sizes.receive_size as usize;
        match &self.receives {
            Receives::Own(slab) => Some((Arc::clone(&slab.pages), number as usize * size, size)),
            Receives::Shared(Share(shared)) => {
                let slab = shared.slab_of(number)?;
                Some((Arc::clone(&slab.pages), number as usize % shared.per_slab * shared.size, shared.size))
            }
        }
    }

    fn poll(&mut self, completions: &mut Vec<Completion>) -> Result<usize, RdmaError> {
        self.completions.poll(completions)
    }

    fn quench(&mut self) {
        self.completions.quench();
    }

    fn arm(&mut self) -> Result<(), RdmaError> {
        self.completions.arm()
    }

    fn event(&mut self) -> Result<Option<LinkEvent>, RdmaError> {
        let Some(event) = self.id.channel.next()? else { return Ok(None) };
        Ok(Some(match event.kind {
            cm::RDMA_CM_EVENT_ESTABLISHED => LinkEvent::Established,
            _ => LinkEvent::Lost(event.words()),
        }))
    }

    fn close(&mut self) {
        if !self.id.has_queue_pair {
            return;
        }
        // SAFETY: the identity is valid. It tells the peer, and puts the queue pair in the error state; one that was never
        // connected refuses, which is as good.
        unsafe { rdma_sys::rdma_disconnect(self.id.raw.as_ptr()) };
        self.give_back_receives();
        self.id.has_queue_pair = false;
        // SAFETY: the queue pair is there, and is destroyed once.
        unsafe { rdma_sys::rdma_destroy_qp(self.id.raw.as_ptr()) };
        self.give_back_receives();
    }

    fn max_pieces(&self) -> usize {
        self.max_pieces
    }

    fn slab(&mut self, length: usize, exposure: Exposure) -> Result<Slab, RdmaError> {
        self.domain.slab(length, exposure)
    }

    fn give_back(&mut self, number: u32) {
        if let Receives::Shared(_) = self.receives
            && let Err(error) = self.post_receive(number)
        {
            tracing::warn!("a shared receive buffer is lost: {error}");
        }
    }
}

impl Drop for Endpoint {
    fn drop(&mut self) {
        self.close();
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
    fn shared_receives(self: &Arc<Self>, sizes: QueueSizes) -> Result<Share, RdmaError> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        let receives = if let Some(receives) = &*shared {
            Arc::clone(receives)
        } else {
            let most = super::SHARED_RECEIVES.min(self.limits.max_shared_receives);
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

/// What a side says of itself while connecting, and how.
pub(super) struct Offer<'a> {
    pub(super) private: &'a [u8],
    pub(super) sizes: QueueSizes,
    pub(super) dead_after: Duration,
}

/// Connects to `address`; returns the endpoint, and what the peer says of itself.
pub(super) fn connect(
    address: SocketAddr,
    offer: &Offer<'_>,
    domain_of: &mut dyn FnMut(*mut rdma_sys::ibv_context) -> Result<Arc<Domain>, RdmaError>,
) -> Result<(Endpoint, Vec<u8>), RdmaError> {
    let deadline = Instant::now() + offer.dead_after;
    let channel = Arc::new(EventChannel::new()?);
    let id = Id::new(&channel)?;
    id.set_ack_timeout(offer.dead_after);
    let milliseconds = c_int::try_from(offer.dead_after.as_millis()).unwrap_or(c_int::MAX);
    let mut storage = to_storage(address);
    // SAFETY: identity and address are valid; the address is copied by the call.
    let returned = unsafe {
        rdma_sys::rdma_resolve_addr(id.raw.as_ptr(), ptr::null_mut(), (&raw mut storage).cast(), milliseconds)
    };
    check("looking for a device with a route to the address", returned)?;
    expect(&channel, deadline, cm::RDMA_CM_EVENT_ADDR_RESOLVED)?;
    // SAFETY: the identity is valid.
    check("looking for a route", unsafe { rdma_sys::rdma_resolve_route(id.raw.as_ptr(), milliseconds) })?;
    expect(&channel, deadline, cm::RDMA_CM_EVENT_ROUTE_RESOLVED)?;
    let domain = domain_of(id.context())?;
    let endpoint = Endpoint::new(id, domain, offer.sizes, false)?;
    let mut parameters = parameters(offer.private);
    // Memory may have been pinned meanwhile, which takes its time; the network gets its own.
    let deadline = deadline.max(Instant::now() + offer.dead_after / 2);
    // SAFETY: identity and parameters are valid; the private data is copied by the call.
    check("connecting", unsafe { rdma_sys::rdma_connect(endpoint.id.raw.as_ptr(), &mut parameters) })?;
    let private = expect(&channel, deadline, cm::RDMA_CM_EVENT_ESTABLISHED)?;
    Ok((endpoint, private))
}

fn parameters(private: &[u8]) -> rdma_sys::rdma_conn_param {
    rdma_sys::rdma_conn_param {
        private_data: private.as_ptr().cast(),
        private_data_len: u8::try_from(private.len()).unwrap_or(0),
        responder_resources: 1,
        initiator_depth: 1,
        flow_control: 1,
        retry_count: 7,
        // For ever: credits keep receives from running out, and pings find the peer that makes none.
        rnr_retry_count: 7,
        srq: 0,
        qp_num: 0,
    }
}

fn expect(channel: &EventChannel, deadline: Instant, kind: cm::Type) -> Result<Vec<u8>, RdmaError> {
    let event = channel.wait(deadline)?;
    if event.kind == kind { Ok(event.private) } else { Err(RdmaError::Event(event.words())) }
}

/// Where peers connect to.
pub(super) struct Listener {
    id: Id,
}

/// A peer that wants to connect.
pub(super) struct Request {
    id: Id,
    pub(super) private: Vec<u8>,
    pub(super) peer: Option<SocketAddr>,
}

impl Listener {
    pub(super) fn bind(address: SocketAddr, backlog: c_int) -> Result<Self, RdmaError> {
        let channel = Arc::new(EventChannel::new()?);
        let id = Id::new(&channel)?;
        let mut storage = to_storage(address);
        // SAFETY: identity and address are valid; the address is copied by the call.
        let returned = unsafe { rdma_sys::rdma_bind_addr(id.raw.as_ptr(), (&raw mut storage).cast()) };
        check("binding the address to an RDMA device", returned)?;
        // SAFETY: the identity is valid.
        check("listening", unsafe { rdma_sys::rdma_listen(id.raw.as_ptr(), backlog) })?;
        Ok(Self { id })
    }

    pub(super) fn descriptor(&self) -> RawFd {
        self.id.channel.descriptor()
    }

    pub(super) fn local(&self) -> Option<SocketAddr> {
        self.id.local()
    }

    /// The device that it is bound to; null when it listens on all.
    pub(super) fn context(&self) -> *mut rdma_sys::ibv_context {
        self.id.context()
    }

    /// The next peer that wants to connect.
    pub(super) fn next(&mut self) -> Result<Option<Request>, RdmaError> {
        while let Some(event) = self.id.channel.next()? {
            match event.kind {
                cm::RDMA_CM_EVENT_CONNECT_REQUEST => {
                    let Some(raw) = NonNull::new(event.id) else { continue };
                    let id = Id { raw, has_queue_pair: false, channel: Arc::clone(&self.id.channel) };
                    let peer = id.peer();
                    return Ok(Some(Request { id, private: event.private, peer }));
                }
                cm::RDMA_CM_EVENT_DEVICE_REMOVAL => return Err(RdmaError::Event(event.words())),
                // About a peer that went away before it was accepted: its identity is gone with it.
                _ => {}
            }
        }
        Ok(None)
    }
}

impl Request {
    pub(super) fn context(&self) -> *mut rdma_sys::ibv_context {
        self.id.context()
    }

    /// Accepts the peer.
    pub(super) fn accept(mut self, offer: &Offer<'_>, domain: Arc<Domain>) -> Result<Endpoint, RdmaError> {
        self.id.migrate(Arc::new(EventChannel::new()?))?;
        self.id.set_ack_timeout(offer.dead_after);
        let endpoint = Endpoint::new(self.id, domain, offer.sizes, true)?;
        let mut parameters = parameters(offer.private);
        parameters.srq = u8::from(matches!(endpoint.receives, Receives::Shared(_)));
        // SAFETY: identity and parameters are valid; the private data is copied by the call.
        check("accepting", unsafe { rdma_sys::rdma_accept(endpoint.id.raw.as_ptr(), &mut parameters) })?;
        Ok(endpoint)
    }

    /// Refuses the peer.
    pub(super) fn reject(self) {
        // SAFETY: the identity is valid and has no queue pair. A peer that is gone already cannot be told.
        unsafe { rdma_sys::rdma_reject(self.id.raw.as_ptr(), ptr::null(), 0) };
    }
}

/// A domain for the device of a connection.
pub(super) fn open_domain(context: *mut rdma_sys::ibv_context) -> Result<Domain, RdmaError> {
    Domain::new(context)
}

fn to_storage(address: SocketAddr) -> libc::sockaddr_storage {
    // SAFETY: plain numbers; all-zero is a value.
    let mut storage: libc::sockaddr_storage = unsafe { std::mem::zeroed() };
    match address.ip() {
        IpAddr::V4(ip) => {
            let plain = libc::sockaddr_in {
                sin_family: family(libc::AF_INET),
                sin_port: address.port().to_be(),
                sin_addr: libc::in_addr { s_addr: u32::from_ne_bytes(ip.octets()) },
                sin_zero: [0; 8],
            };
            // SAFETY: a storage is large enough and aligned for every kind of address.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in>().write(plain) };
        }
        IpAddr::V6(ip) => {
            let scope = if let SocketAddr::V6(v6) = address { v6.scope_id() } else { 0 };
            let plain = libc::sockaddr_in6 {
                sin6_family: family(libc::AF_INET6),
                sin6_port: address.port().to_be(),
                sin6_flowinfo: 0,
                sin6_addr: libc::in6_addr { s6_addr: ip.octets() },
                sin6_scope_id: scope,
            };
            // SAFETY: as above.
            unsafe { (&raw mut storage).cast::<libc::sockaddr_in6>().write(plain) };
        }
    }
    storage
}

fn family(number: c_int) -> libc::sa_family_t {
    libc::sa_family_t::try_from(number).unwrap_or(0)
}

fn from_storage(storage: &libc::sockaddr_storage) -> Option<SocketAddr> {
    match c_int::from(storage.ss_family) {
        libc::AF_INET => {
            // SAFETY: the family says that it is an address of this kind.
            let plain = unsafe { ptr::from_ref(storage).cast::<libc::sockaddr_in>().read() };
            let ip = IpAddr::from(plain.sin_addr.s_addr.to_ne_bytes());
            Some(SocketAddr::new(ip, u16::from_be(plain.sin_port)))
        }
        libc::AF_INET6 => {
            // SAFETY: as above.
            let plain = unsafe { ptr::from_ref(storage).cast::<libc::sockaddr_in6>().read() };
            Some(SocketAddr::new(IpAddr::from(plain.sin6_addr.s6_addr), u16::from_be(plain.sin6_port)))
        }
        _ => None,
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor()
    }
}
