//! A queue pair with its completion queue and receive buffers, as a connection sees it.
#![allow(unsafe_code)]

use std::any::Any;
use std::ffi::{CStr, c_int};
use std::io;
use std::os::fd::RawFd;
use std::ptr::{self, NonNull};
use std::sync::Arc;

use rdma_sys::{
    ibv_access_flags as access, ibv_qp_type, ibv_send_flags as send_flags, ibv_wc_opcode, ibv_wc_status,
    ibv_wr_opcode,
};

use super::device::{Domain, MemoryWindow, RECEIVE, Region, Share, receive_work};
use super::manager::Id;
use super::{call, check, set_nonblocking};
use crate::buffer::Segment;
use crate::transport::rdma::endpoint::{
    Completion, Done, LinkEvent, Operation, Piece, QueueSizes, Slab, Verbs, WorkRequest,
};
use crate::transport::rdma::memory::Pages;
use crate::transport::rdma::{Exposure, RdmaError};

/// Completions taken in one call.
const POLL_BATCH: usize = 32;

/// A connection's queue pair with all that it needs.
pub(in crate::transport::rdma) struct Endpoint {
    /// First: goes before the completion queue.
    pub(super) id: Id,
    completions: CompletionQueue,
    receives: Receives,
    windows: Vec<MemoryWindow>,
    pub(in crate::transport::rdma) domain: Arc<Domain>,
    sizes: QueueSizes,
    max_pieces: usize,
    work: Vec<rdma_sys::ibv_send_wr>,
    pieces: Vec<rdma_sys::ibv_sge>,
    /// Memory that windows are being bound to, and by which keys.
    binding: Vec<(Arc<Region>, usize, u32)>,
}

// SAFETY: the raw pointers in `work` are scratch that is filled and used within one call.
unsafe impl Send for Endpoint {}

impl Endpoint {
    pub(super) fn new(
        mut id: Id,
        domain: Arc<Domain>,
        mut sizes: QueueSizes,
        shared: bool,
    ) -> Result<Self, RdmaError> {
        sizes.sends = sizes.sends.min(domain.limits.max_work.max(16) - 1);
        // All that may fail for want of memory comes before the queue pair, which has to go before its completion queue.
        let receives = if shared && domain.limits.max_shared_receives > 0 {
            Receives::Shared(domain.shared_receives(sizes)?)
        } else {
            let bytes = sizes.receives as usize * sizes.receive_size as usize;
            Receives::Own(domain.slab(bytes, Exposure::Local)?)
        };
        let shared = match &receives {
            Receives::Shared(shared) => Some(shared.0.srq.as_ptr()),
            Receives::Own(_) => None,
        };
        let completions = CompletionQueue::new(&domain, sizes.sends + sizes.receives + 16)?;
        let most_pieces = domain.limits.max_pieces.clamp(2, 32);
        // SAFETY: plain numbers and pointers; all-zero is a value.
        let mut wanted: rdma_sys::ibv_qp_init_attr = unsafe { std::mem::zeroed() };
        loop {
            wanted.send_cq = completions.cq.as_ptr();
            wanted.recv_cq = completions.cq.as_ptr();
            wanted.srq = shared.unwrap_or(ptr::null_mut());
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
            if returned == 0 {
                break;
            }
            let source = io::Error::last_os_error();
            if sizes.inline == 0 {
                return Err(refused(&sizes, shared.is_some(), most_pieces, &domain, source));
            }
            // Cards differ in what they send inline; without it, it is copied by the card instead.
            sizes.inline = if sizes.inline > 64 { sizes.inline / 2 } else { 0 };
        }
        id.has_queue_pair = true;
        let mut endpoint = Self {
            id,
            completions,
            receives,
            windows: Vec::new(),
            domain,
            sizes,
            max_pieces: most_pieces as usize,
            work: Vec::new(),
            pieces: Vec::new(),
            binding: Vec::new(),
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

impl Endpoint {
    /// Whether its receive buffers are those of all accepted connections.
    pub(super) const fn is_shared(&self) -> bool {
        matches!(self.receives, Receives::Shared(_))
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
        self.binding.clear();
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
                Operation::Bind { window, key, address, length, memory } => {
                    let gone =
                        || RdmaError::Event("memory is not registered for windows any more".to_owned());
                    let region = self.domain.region(memory).ok_or_else(gone)?;
                    let bound = self.windows.get(window).ok_or(RdmaError::Over)?;
                    work.opcode = ibv_wr_opcode::IBV_WR_BIND_MW;
                    let bind_info = rdma_sys::ibv_mw_bind_info {
                        mr: region.mr.as_ptr(),
                        addr: address,
                        length: length.into(),
                        mw_access_flags: access::IBV_ACCESS_REMOTE_WRITE.0,
                    };
                    work.bind_mw_tso_union.bind_mw =
                        rdma_sys::bind_mw_t { mw: bound.mw.as_ptr(), rkey: key, bind_info };
                    self.binding.push((region, window, key));
                }
                Operation::Invalidate { key } => {
                    work.opcode = ibv_wr_opcode::IBV_WR_LOCAL_INV;
                    work.imm_data_invalidated_rkey_union.invalidated_rkey = key;
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
        // name stays until the work completed or the queue pair is gone, as the connection sees to. Windows are `self`'s, and
        // `binding` holds the regions that they are bound to.
        let returned = unsafe { rdma_sys::ibv_post_send(self.id.raw.as_ref().qp, base, &mut bad) };
        for (_, window, key) in self.binding.drain(..) {
            self.windows[window].bound_by(key);
        }
        check("posting work", returned)
    }

    fn has_windows(&self) -> bool {
        self.domain.limits.has_windows
    }

    fn expose(&mut self, memory: &Segment) -> Result<(u32, Box<dyn Any + Send + Sync>), RdmaError> {
        let region = self.domain.register(*memory, Arc::new(()), Exposure::Peers)?;
        Ok((region.keys().remote, Box::new(region)))
    }

    fn window(&mut self) -> Result<u32, RdmaError> {
        if !self.id.has_queue_pair {
            return Err(RdmaError::Over);
        }
        let window = self.domain.window()?;
        let key = window.key();
        self.windows.push(window);
        Ok(key)
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
            rdma_sys::rdma_cm_event_type::RDMA_CM_EVENT_ESTABLISHED => LinkEvent::Established,
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
        // A window that is bound belongs to the queue pair, which some cards do not let go of before.
        self.windows.clear();
        self.id.has_queue_pair = false;
        // SAFETY: the queue pair is there, and is destroyed once.
        unsafe { rdma_sys::rdma_destroy_qp(self.id.raw.as_ptr()) };
        self.give_back_receives();
        if let Receives::Shared(Share(shared)) = &self.receives {
            shared.note_end();
        }
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

/// What was asked for in vain, beside what the device has.
fn refused(
    sizes: &QueueSizes,
    is_shared: bool,
    pieces: u32,
    domain: &Domain,
    source: io::Error,
) -> RdmaError {
    let receives =
        if is_shared { "shared receives".to_owned() } else { format!("{} receives", sizes.receives) };
    let (device, limits) = (&domain.device, &domain.limits);
    let asked = format!(
        "{} sends of {pieces} pieces and {receives}, where {device} has at most {} of {} pieces",
        sizes.sends, limits.max_work, limits.max_pieces
    );
    RdmaError::QueuePair { asked, source }
}

/// Where receives are posted.
enum Receives {
    Own(Slab),
    Shared(Share),
}
