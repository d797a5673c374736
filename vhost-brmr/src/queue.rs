//! One ring: takes chains off it, puts used elements on it, and decides who is notified when. It knows nothing of what
//! a chain means.
//!
//! The queue lives in `vhost_user_backend`'s vring; its lock is taken once per wake-up. The descriptors are kept here: that vring
//! closes a kick descriptor before the loop could stop to watch it, does not hand out the error descriptor, and writes to a
//! call descriptor for as long as that takes.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::Ordering;

use thiserror::Error;
use tracing::warn;
use vhost_user_backend::{VringMutex, VringT};
use virtio_bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::QueueT;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryAtomic};

use crate::inflight::Inflight;
use crate::memory::{self, GuestMemory};
use crate::request::{Broken, Chain};
use crate::sys;

/// How often a ring is looked at again within one turn, before the other descriptors of the loop get theirs.
const MAX_ROUNDS: usize = 8;

/// Why a ring was stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The avail index is further ahead than the ring is long.
    AvailIndex,
    /// A head that is no index of the descriptor table.
    Head(u16),
    /// A head that was made available again before it was used.
    HeadInFlight(u16),
    /// A chain that cannot be answered.
    Chain(Broken),
    /// The ring itself cannot be read or written: its memory was taken away.
    Memory,
    /// The kick descriptor cannot be watched.
    Kick,
    /// The counter of the call descriptor is at its limit, and the front end has made writes to it wait.
    Call,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::AvailIndex => {
                f.write_str("the guest's avail index is more than the queue size ahead of what was taken")
            }
            Self::Head(head) => {
                write!(f, "the guest made head {head} available, which is beyond the descriptor table")
            }
            Self::HeadInFlight(head) => {
                write!(f, "the guest made head {head} available again while it is in flight")
            }
            Self::Chain(broken) => broken.fmt(f),
            Self::Memory => f.write_str("the ring is not in guest memory any more"),
            Self::Call => f.write_str(
                "its call descriptor blocks: its counter is at its limit and the front end has taken O_NONBLOCK away",
            ),
            Self::Kick => f.write_str("its kick descriptor cannot be watched, expected an eventfd"),
        }
    }
}

/// Why a ring could not be configured or started.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum RingError {
    /// A size that is no power of two or too large.
    #[error("queue size is {found}, expected a power of two up to {most}")]
    Size {
        /// Size asked for.
        found: u32,
        /// Largest size.
        most: u16,
    },
    /// The front end's address of a part of the ring is in no memory region.
    #[error("{part} at the front end's address {address:#x} lies in no memory region")]
    Address {
        /// Which part.
        part: &'static str,
        /// Its address.
        address: u64,
    },
    /// An address that is not aligned as virtio wants it.
    #[error("ring addresses are not aligned to 16 (descriptors), 2 (avail) and 4 (used) bytes")]
    Alignment,
    /// Parts of the ring outside guest memory.
    #[error("the ring of size {size} does not lie within guest memory")]
    Outside {
        /// Size of the ring.
        size: u16,
    },
    /// A change that is only allowed while the ring is stopped.
    #[error("the ring is running, expected it to be stopped with GET_VRING_BASE first")]
    Running,
    /// An index of more than 16 bits.
    #[error("ring index is {0}, expected 16 bits")]
    Base(u32),
    /// The inflight region is too small for the ring, of another layout, or names heads beyond the ring.
    #[error("the inflight region does not fit the ring")]
    Inflight,
    /// A descriptor for notifications of another kind.
    #[error("the {0} descriptor is no eventfd, expected one")]
    NoEventfd(&'static str),
    /// No kick descriptor.
    #[error("no kick descriptor, expected one: this device does not poll for a guest that never kicks")]
    NoKick,
}

/// Where a ring stands.
///
/// ```text
///          kick and addresses known           fault
/// Stopped ─────────────────────────► Started ───────► Failed
///    ▲                                  │               │
///    └──────────── GET_VRING_BASE, reset ───────────────┘
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// Not touched.
    Stopped,
    /// Served while enabled.
    Started,
    /// Not touched until it is set up again.
    Failed(Fault),
}

/// What became of a chain.
#[derive(Clone, Copy, Debug)]
pub enum Taken {
    /// It is in flight, and will be [`Ring::finish`]ed.
    InFlight,
    /// It is answered: this many bytes were written to the guest.
    Answered(u32),
    /// There is no room now; it stays on the ring.
    NoRoom,
}

/// What a look at a ring found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Served {
    /// How many chains were taken.
    pub taken: usize,
    /// There is more to take.
    pub more: bool,
}

/// One ring.
pub struct Ring {
    vring: VringMutex<GuestMemoryAtomic<GuestMemory>>,
    kick: Option<File>,
    call: Option<File>,
    error: Option<File>,
    has_addresses: bool,
    phase: Phase,
    enabled: bool,
    /// The front end waits until nothing is in flight; nothing is taken meanwhile.
    paused: bool,
    incarnation: u32,
    in_flight: u16,
    busy: Vec<bool>,
    finished: Vec<(u16, u32)>,
    /// Heads that an earlier daemon took and did not finish, the next one last; served before the avail ring.
    again: Vec<u16>,
    /// Order of the chains in the inflight region.
    counter: u64,
    /// Where in the dirty log what is written to the used ring belongs, if the front end wants it there.
    used_log: Option<u64>,
}

impl Ring {
    /// A stopped ring of at most `max_size` descriptors, a power of two.
    ///
    /// # Errors
    /// When `max_size` is no power of two.
    pub fn new(memory: GuestMemoryAtomic<GuestMemory>, max_size: u16) -> Result<Self, RingError> {
        let size_error = RingError::Size { found: max_size.into(), most: 32768 };
        Ok(Self {
            vring: VringMutex::new(memory, max_size).map_err(|_| size_error)?,
            kick: None,
            call: None,
            error: None,
            has_addresses: false,
            phase: Phase::Stopped,
            enabled: false,
            paused: false,
            incarnation: 0,
            in_flight: 0,
            busy: vec![false; max_size.into()],
            finished: Vec::with_capacity(max_size.into()),
            again: Vec::new(),
            counter: 0,
            used_log: None,
        })
    }

    /// Where the ring stands.
    #[must_use]
    pub fn phase(&self) -> Phase {
        self.phase
    }

    /// Started and enabled: the guest expects service.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Started && self.enabled
    }

    /// Which start of the ring this is. Requests of an earlier one are not answered any more.
    #[must_use]
    pub fn incarnation(&self) -> u32 {
        self.incarnation
    }

    /// How many requests were taken and not finished, those that an earlier daemon took included, if they will be served.
    #[must_use]
    pub fn in_flight(&self) -> u16 {
        let again = if self.is_running() { self.again.len() } else { 0 };
        self.in_flight.saturating_add(u16::try_from(again).unwrap_or(u16::MAX))
    }

    /// Something waits for [`publish`](Self::publish).
    #[must_use]
    pub fn has_finished(&self) -> bool {
        !self.finished.is_empty()
    }

    /// Enables or disables the ring.
    pub fn set_enabled(&mut self, enabled: bool) {
        self.enabled = enabled;
    }

    /// Takes nothing more until this is lifted, but what an earlier daemon had taken.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Sets the size.
    ///
    /// # Errors
    /// When it is no power of two or too large, or the ring runs.
    pub fn set_size(&mut self, size: u32) -> Result<(), RingError> {
        self.check_stopped()?;
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        let error = RingError::Size { found: size, most: queue.max_size() };
        let size = u16::try_from(size).map_err(|_| error)?;
        queue.try_set_size(size).map_err(|_| error)
    }

    /// Sets the guest addresses of descriptor table, avail ring and used ring. Also allowed while the ring runs: live
    /// migration repeats them.
    ///
    /// # Errors
    /// When one is not aligned.
    pub fn set_addresses(
        &mut self,
        descriptors: GuestAddress,
        avail: GuestAddress,
        used: GuestAddress,
    ) -> Result<(), RingError> {
        self.vring.set_queue_info(descriptors.0, avail.0, used.0).map_err(|_| RingError::Alignment)?;
        self.has_addresses = true;
        Ok(())
    }

    /// Sets the address under which what is written to the used ring belongs in the dirty log (`VHOST_VRING_F_LOG`).
    pub fn set_used_log(&mut self, address: Option<u64>) {
        self.used_log = address;
    }

    /// The first address behind the used ring in the dirty log.
    #[must_use]
    pub fn used_log_end(&self) -> Option<u64> {
        let length = used_length(self.vring.get_mut().get_queue().size());
        self.used_log.map(|address| address.saturating_add(length))
    }

    /// Sets the index of the next chain to take.
    ///
    /// # Errors
    /// When the ring runs, or the index does not fit.
    pub fn set_base(&mut self, base: u32) -> Result<(), RingError> {
        self.check_stopped()?;
        let base = u16::try_from(base).map_err(|_| RingError::Base(base))?;
        self.vring.set_queue_next_avail(base);
        Ok(())
    }

    /// The index of the next chain to take.
    #[must_use]
    pub fn base(&self) -> u16 {
        self.vring.queue_next_avail()
    }

    /// Sets the kick descriptor; the old one, which the loop may still watch.
    pub fn set_kick(&mut self, kick: Option<File>) -> Option<File> {
        std::mem::replace(&mut self.kick, kick)
    }

    /// The kick descriptor.
    #[must_use]
    pub fn kick(&self) -> Option<RawFd> {
        self.kick.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Sets the call descriptor; without one the guest polls.
    ///
    /// The guest is notified through it at once, which it takes well: what is on the used ring already may have been published
    /// by a daemon that died before it notified, or through the descriptor that this one replaces. QEMU starts the rings with
    /// one that nobody reads. A guest that missed a notification would wait for ever, because the next used element lies
    /// behind its event index.
    ///
    /// # Errors
    /// When a write to it waits for a reader.
    pub fn set_call(&mut self, call: Option<File>) -> Result<(), Fault> {
        self.call = call;
        self.call.as_ref().map_or(Ok(()), notify_guest)
    }

    /// Notifies the guest no more.
    pub fn clear_call(&mut self) {
        self.call = None;
    }

    /// Sets the descriptor that tells the front end that the ring failed.
    pub fn set_error(&mut self, error: Option<File>) {
        self.error = error;
    }

    /// Starts the ring if everything it needs is known; whether it runs now.
    ///
    /// # Errors
    /// When it does not lie within guest memory.
    pub fn try_start(
        &mut self,
        memory: &GuestMemory,
        event_idx: bool,
        incarnation: u32,
        inflight: Option<(&Inflight, usize)>,
    ) -> Result<bool, RingError> {
        if self.phase != Phase::Stopped || self.kick.is_none() || !self.has_addresses {
            return Ok(self.phase == Phase::Started);
        }
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        queue.set_ready(true);
        let outside = RingError::Outside { size: queue.size() };
        let used = queue.used_idx(memory, Ordering::Acquire);
        let (true, Ok(used)) = (queue.is_valid(memory), used) else {
            queue.set_ready(false);
            return Err(outside);
        };
        if let Some((inflight, number)) = inflight {
            let recovered = inflight.recover(number, queue.size(), used.0);
            let recovered = recovered.inspect_err(|error| warn!("{error}")).ok();
            let Some(recovered) = recovered else {
                queue.set_ready(false);
                return Err(RingError::Inflight);
            };
            // What was taken and not finished is served from the region; the avail ring goes on behind it, whatever
            // index the front end believes in.
            let taken = u16::try_from(recovered.heads.len()).unwrap_or(0);
            queue.set_next_avail(used.0.wrapping_add(taken));
            self.counter = recovered.counter;
            self.again = recovered.heads;
            self.again.reverse();
        }
        queue.set_event_idx(event_idx);
        queue.set_next_used(used.0);
        drop(state);
        self.busy.fill(false);
        self.finished.clear();
        self.in_flight = 0;
        self.incarnation = incarnation;
        self.phase = Phase::Started;
        Ok(true)
    }

    /// Stops the ring; the index of the next chain to take, which stays as it is.
    pub fn stop(&mut self) -> u16 {
        self.phase = Phase::Stopped;
        self.in_flight = 0;
        // No request of before may find itself in the ring that is started next.
        self.incarnation = 0;
        self.finished.clear();
        self.again.clear();
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        queue.set_ready(false);
        queue.next_avail()
    }

    /// Back to the state of a new ring; the kick descriptor, which the loop may still watch.
    pub fn reset(&mut self) -> Option<File> {
        self.stop();
        self.vring.get_mut().get_queue_mut().reset();
        self.has_addresses = false;
        self.enabled = false;
        self.paused = false;
        self.error = None;
        self.used_log = None;
        self.call = None;
        self.set_kick(None)
    }

    /// Takes what is on the ring. With `rearm`, the guest will kick for whatever comes after.
    ///
    /// # Errors
    /// When the guest broke the rules in a way that no status byte can tell; the ring has failed then.
    pub fn serve(
        &mut self,
        memory: &GuestMemory,
        rearm: bool,
        inflight: Option<(&Inflight, usize)>,
        mut take: impl FnMut(u16, Chain<'_>) -> Result<Taken, Broken>,
    ) -> Result<Served, Fault> {
        let mut served = Served::default();
        // What an earlier daemon took is in flight also while nothing more is taken: a front end waits for its end.
        let only_again = self.paused;
        if !self.is_running() || only_again && self.again.is_empty() {
            return Ok(served);
        }
        let rearm = rearm && !only_again;
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        let (size, table) = (queue.size(), GuestAddress(queue.desc_table()));
        for _ in 0..MAX_ROUNDS {
            queue.disable_notification(memory).map_err(|_| Fault::Memory)?;
            mark_used(queue, self.used_log, memory);
            let next = queue.next_avail();
            let avail = queue.avail_idx(memory, Ordering::Acquire).map_err(|_| Fault::Memory)?;
            let pending = avail.0.wrapping_sub(next);
            if pending > size {
                return Err(Fault::AvailIndex);
            }
            let pending = if only_again { 0 } else { pending };
            let mut taken = 0;
            while taken < pending || !self.again.is_empty() {
                let head = match self.again.last() {
                    Some(head) => *head,
                    None => {
                        let head = head_at(queue, memory, next.wrapping_add(taken))?;
                        // Also what stops the ring counts as taken: it would stop it again.
                        queue.set_next_avail(next.wrapping_add(taken + 1));
                        head
                    }
                };
                let is_new = self.again.is_empty();
                if head >= size {
                    return Err(Fault::Head(head));
                }
                let busy = &mut self.busy[usize::from(head)];
                if *busy {
                    return Err(Fault::HeadInFlight(head));
                }
                // Noted before anything happens with it, so that no crash can lose it.
                if let Some((inflight, number)) = inflight
                    && is_new
                {
                    inflight.taken(number, head, self.counter);
                    self.counter = self.counter.wrapping_add(1);
                }
                let fate = take(head, Chain::new(memory, table, size, head));
                if let (Some((inflight, number)), Err(_) | Ok(Taken::NoRoom)) = (inflight, fate)
                    && (is_new || fate.is_err())
                {
                    inflight.put_back(number, head);
                }
                match fate.map_err(Fault::Chain)? {
                    Taken::InFlight => {
                        *busy = true;
                        self.in_flight += 1;
                    }
                    Taken::Answered(length) => {
                        // Busy until published, so that there is room for every answer.
                        *busy = true;
                        self.finished.push((head, length));
                    }
                    Taken::NoRoom => {
                        // A completion makes room, and looks again.
                        queue.set_next_avail(next.wrapping_add(taken));
                        return Ok(served);
                    }
                }
                served.taken += 1;
                if self.again.pop().is_none() {
                    taken += 1;
                }
            }
            if rearm {
                served.more = queue.enable_notification(memory).map_err(|_| Fault::Memory)?;
                mark_used(queue, self.used_log, memory);
            }
            // The guest may reuse a head that is answered only once it is published.
            if !served.more || !self.finished.is_empty() {
                return Ok(served);
            }
        }
        Ok(served)
    }

    /// Lets the guest kick; whether there is something to take already.
    ///
    /// # Errors
    /// When the ring cannot be read any more.
    pub fn arm(&mut self, memory: &GuestMemory) -> Result<bool, Fault> {
        if !self.is_running() || self.paused {
            return Ok(false);
        }
        let mut state = self.vring.get_mut();
        let more = state.get_queue_mut().enable_notification(memory).map_err(|_| Fault::Memory)?;
        mark_used(state.get_queue(), self.used_log, memory);
        Ok(more)
    }

    /// A request is done, and this many bytes were written to the guest.
    pub fn finish(&mut self, head: u16, length: u32) {
        self.in_flight -= 1;
        self.finished.push((head, length));
    }

    /// Puts what was finished on the used ring, and notifies the guest if it wants to be.
    ///
    /// # Errors
    /// When the ring cannot be written any more.
    pub fn publish(
        &mut self,
        memory: &GuestMemory,
        inflight: Option<(&Inflight, usize)>,
    ) -> Result<(), Fault> {
        if self.phase != Phase::Started {
            self.finished.clear();
            return Ok(());
        }
        let mut state = self.vring.get_mut();
        let queue = state.get_queue_mut();
        for (head, length) in self.finished.drain(..) {
            self.busy[usize::from(head)] = false;
            if let Some((inflight, number)) = inflight {
                inflight.finishing(number, head);
            }
            queue.add_used(memory, head, length).map_err(|_| Fault::Memory)?;
            if let Some((inflight, number)) = inflight {
                inflight.finished(number, head, queue.next_used());
            }
        }
        mark_used(queue, self.used_log, memory);
        // Also orders the used index before the read of the flags or the event index.
        let wanted = queue.needs_notification(memory).map_err(|_| Fault::Memory)?;
        let wanted = wanted && (queue.event_idx_enabled() || !interrupts_are_off(queue, memory)?);
        match &self.call {
            Some(call) if wanted => notify_guest(call),
            _ => Ok(()),
        }
    }

    /// The ring stops here and now; the front end is told if it wants to be.
    pub fn fail(&mut self, fault: Fault) {
        self.phase = Phase::Failed(fault);
        self.finished.clear();
        if let Some(error) = &self.error {
            // A front end that does not take it does not want to know.
            let _ = sys::notify(error);
        }
    }

    fn check_stopped(&self) -> Result<(), RingError> {
        if self.phase == Phase::Started { Err(RingError::Running) } else { Ok(()) }
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("phase", &self.phase)
            .field("enabled", &self.enabled)
            .field("in_flight", &self.in_flight)
            .finish_non_exhaustive()
    }
}

/// Notifies the guest. Only a write that waited is a fault: in all other cases the front end has a notification waiting, or wants none.
fn notify_guest(call: &File) -> Result<(), Fault> {
    match sys::notify(call) {
        Err(error) if error.kind() == io::ErrorKind::Interrupted => Err(Fault::Call),
        _ => Ok(()),
    }
}

/// Marks the used ring at the address that the front end gave for it, where that is not its own: there it was marked when it
/// was written, with or without `VHOST_VRING_F_LOG`. All of it, because no front end of today does that.
fn mark_used(queue: &virtio_queue::Queue, used_log: Option<u64>, memory: &GuestMemory) {
    if let Some(address) = used_log.filter(|address| *address != queue.used_ring())
        && let Some(log) = memory::dirty_log(memory)
    {
        log.mark(address, used_length(queue.size()));
    }
}

/// Length of a used ring with its flags, index and event index (virtio 1.3 §2.7.8).
fn used_length(size: u16) -> u64 {
    6 + 8 * u64::from(size)
}

/// The head at this index of the avail ring (virtio 1.3 §2.7.6).
fn head_at(queue: &virtio_queue::Queue, memory: &GuestMemory, index: u16) -> Result<u16, Fault> {
    let at = 4 + 2 * u64::from(index % queue.size());
    let at = GuestAddress(queue.avail_ring()).checked_add(at).ok_or(Fault::Memory)?;
    // The avail index was read with acquire order before.
    memory::read(memory, at).map(u16::from_le_bytes).ok_or(Fault::Memory)
}

/// Without event indices the guest turns interrupts off by a flag (virtio 1.3 §2.7.7), which `virtio-queue` ignores.
fn interrupts_are_off(queue: &virtio_queue::Queue, memory: &GuestMemory) -> Result<bool, Fault> {
    let flags: u16 =
        memory.load(GuestAddress(queue.avail_ring()), Ordering::Relaxed).map_err(|_| Fault::Memory)?;
    Ok(u32::from(u16::from_le(flags)) & VRING_AVAIL_F_NO_INTERRUPT != 0)
}
