//! A guest for tests: its memory, a split-ring driver, and the front end that tells the device of both.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vhost_brmr::device::DeviceOptions;
use vhost_brmr::disk::Geometry;
use vhost_brmr::event_loop::{EventLoop, FrontEnds, LoopError, LoopOptions, OnDisconnect};
use vhost_brmr::testing::{Handle, MemoryDisk, geometry};
use virtio_bindings::virtio_blk as blk;
use vm_memory::{Bytes, FileOffset, MmapRegion, VolatileMemory};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// What the last byte of a request may be.
pub(crate) const OK: u8 = 0;
pub(crate) const IOERR: u8 = 1;
pub(crate) const UNSUPP: u8 = 2;
pub(crate) const DISK_SIZE: u64 = 1 << 20;
/// Where guest memory is in the guest, in the front end, and how large it is.
pub(crate) const GUEST_BASE: u64 = 0x4000_0000;
pub(crate) const USER_BASE: u64 = 0x7f00_0000_0000;
pub(crate) const MEMORY_SIZE: u64 = 4 << 20;
/// Guest memory begins so far into its file; what is before and behind it must never change.
pub(crate) const GUARD: u64 = 1 << 20;
const GUARD_BYTE: u8 = 0xa5;
/// Each ring has this much of guest memory, from its start.
const RING_SPACE: u64 = 0x10000;
const AVAIL: u64 = 0x8000;
const USED: u64 = 0xa000;
/// Indirect tables of a ring.
const INDIRECT: u64 = 0xc000;
/// Buffers of all rings.
pub(crate) const BUFFERS: u64 = 0x10_0000;
/// Room for the buffers of one request.
pub(crate) const BUFFER_SPACE: u64 = 0x8000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT_FLAG: u16 = 4;

/// Longest wait for what comes in any case: only a fault, or a machine that stands still, makes it pass.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

pub(crate) const ALL: u64 = u64::MAX;
/// `VHOST_F_LOG_ALL`.
pub(crate) const LOG_ALL: u64 = 1 << 26;
pub(crate) const fn bit(number: u32) -> u64 {
    1 << number
}

/// The device under test, in a thread of its own.
pub(crate) struct Daemon {
    pub(crate) disk: Handle,
    pub(crate) thread: Option<JoinHandle<Result<(), LoopError>>>,
}

impl Daemon {
    /// Waits for the end of the loop.
    pub(crate) fn join(mut self) -> Result<(), LoopError> {
        self.thread.take().unwrap().join().expect("the event loop panicked")
    }
}

#[derive(Clone)]
pub(crate) struct Setup {
    pub(crate) queues: u16,
    pub(crate) queue_size: u16,
    pub(crate) read_only: bool,
    pub(crate) poll: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) linger: Duration,
    pub(crate) features: u64,
    pub(crate) geometry: Geometry,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            queues: 1,
            queue_size: 64,
            read_only: false,
            poll: Duration::ZERO,
            drain_timeout: Duration::from_secs(20),
            linger: Duration::ZERO,
            features: ALL,
            geometry: geometry(DISK_SIZE),
        }
    }
}

impl Setup {
    /// A device with one front end, already connected.
    pub(crate) fn device(&self) -> (Daemon, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (self.serve(FrontEnds::Connected(theirs)), ours)
    }

    pub(crate) fn serve(&self, front_ends: FrontEnds) -> Daemon {
        let (disk, handle) = MemoryDisk::new(self.geometry).unwrap();
        let (options, behaviour) = self.options();
        let thread = std::thread::spawn(move || {
            EventLoop::new(disk, options, behaviour, front_ends, None).unwrap().run()
        });
        Daemon { disk: handle, thread: Some(thread) }
    }

    pub(crate) fn options(&self) -> (DeviceOptions, LoopOptions) {
        let options = DeviceOptions {
            queues: self.queues,
            queue_size: self.queue_size,
            serial: "serial-0123".into(),
            read_only: self.read_only,
        };
        let on_disconnect = OnDisconnect::Wait;
        let Self { poll, drain_timeout, linger, .. } = *self;
        let behaviour = LoopOptions { poll, drain_timeout, on_disconnect, linger };
        (options, behaviour)
    }

    /// A device and a guest that uses it.
    pub(crate) fn boot(&self) -> (Daemon, Guest) {
        let (daemon, stream) = self.device();
        (daemon, Guest::boot(stream, self))
    }
}

/// One request as a test writes it down.
pub(crate) struct Reply {
    pub(crate) status: u8,
    pub(crate) data: Vec<u8>,
    pub(crate) used_length: u32,
}

pub(crate) struct Ring {
    pub(crate) size: u16,
    pub(crate) avail: u16,
    pub(crate) seen: u16,
    pub(crate) kick: EventFd,
    pub(crate) call: EventFd,
    pub(crate) error: EventFd,
    calls: Epoll,
}

pub(crate) struct Guest {
    pub(crate) frontend: Frontend,
    pub(crate) file: File,
    memory: MmapRegion,
    pub(crate) rings: Vec<Ring>,
    pub(crate) event_idx: bool,
    /// What was negotiated.
    pub(crate) features: u64,
}

impl Guest {
    /// Negotiates everything and starts all rings.
    pub(crate) fn boot(stream: UnixStream, setup: &Setup) -> Self {
        let mut guest = Self::connect(stream, setup);
        guest.share_memory();
        for queue in 0..guest.rings.len() {
            guest.start_ring(queue, 0);
        }
        guest
    }

    fn negotiate(stream: UnixStream, setup: &Setup) -> (Frontend, u64) {
        let mut frontend = Frontend::from_stream(stream, setup.queues.into());
        frontend.set_owner().unwrap();
        let offered = frontend.get_features().unwrap();
        // As QEMU does: logging is switched on only when a migration begins.
        let features = offered & setup.features & !LOG_ALL | bit(30);
        let protocol = frontend.get_protocol_features().unwrap();
        frontend.set_protocol_features(protocol).unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        frontend.set_features(features).unwrap();
        (frontend, features)
    }

    /// Acknowledges `VIRTIO_BLK_F_CONFIG_WCE`, as a guest does that negotiated it with an earlier daemon.
    pub(crate) fn acknowledge_config_wce(&self) {
        let features = self.frontend.get_features().unwrap();
        assert_eq!(features & bit(blk::VIRTIO_BLK_F_CONFIG_WCE), 0, "offered");
        self.frontend.set_features(self.features | bit(blk::VIRTIO_BLK_F_CONFIG_WCE)).unwrap();
    }

    /// Closes the socket; memory and rings stay as they are.
    pub(crate) fn disconnect(&mut self) {
        let (ours, _) = UnixStream::pair().unwrap();
        self.frontend = Frontend::from_stream(ours, 1);
    }

    /// Negotiates again with another daemon.
    pub(crate) fn reconnect(&mut self, stream: UnixStream, setup: &Setup) {
        self.frontend = Self::negotiate(stream, setup).0;
    }

    /// Negotiates features.
    pub(crate) fn connect(stream: UnixStream, setup: &Setup) -> Self {
        let (frontend, features) = Self::negotiate(stream, setup);
        let file = tempfile::tempfile().unwrap();
        file.set_len(MEMORY_SIZE + 2 * GUARD).unwrap();
        let length = usize::try_from(MEMORY_SIZE + 2 * GUARD).unwrap();
        let memory = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), length).unwrap();
        let guest = Self {
            frontend,
            file,
            memory,
            rings: (0..setup.queues).map(|_| Ring::new(setup.queue_size)).collect(),
            event_idx: features & bit(29) != 0,
            features,
        };
        for guard in [0, GUARD + MEMORY_SIZE] {
            let guard = usize::try_from(guard).unwrap();
            let pattern = vec![GUARD_BYTE; usize::try_from(GUARD).unwrap()];
            guest.memory.as_volatile_slice().write_slice(&pattern, guard).unwrap();
        }
        guest
    }

    pub(crate) fn region(&self) -> VhostUserMemoryRegionInfo {
        VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: MEMORY_SIZE,
            userspace_addr: USER_BASE,
            mmap_offset: GUARD,
            mmap_handle: self.file.as_raw_fd(),
        }
    }

    pub(crate) fn share_memory(&self) {
        self.frontend.set_mem_table(&[self.region()]).unwrap();
    }

    pub(crate) fn start_ring(&mut self, queue: usize, base: u16) {
        self.configure_ring(queue, base);
        let ring = &self.rings[queue];
        self.frontend.set_vring_kick(queue, &ring.kick).unwrap();
        self.frontend.set_vring_enable(queue, true).unwrap();
    }

    /// Everything but the kick.
    pub(crate) fn configure_ring(&mut self, queue: usize, base: u16) {
        let ring = &self.rings[queue];
        self.frontend.set_vring_num(queue, ring.size).unwrap();
        self.frontend.set_vring_base(queue, base).unwrap();
        self.frontend.set_vring_addr(queue, &self.addresses(queue, None)).unwrap();
        let ring = &self.rings[queue];
        self.frontend.set_vring_call(queue, &ring.call).unwrap();
        ring.call.read().expect("the guest is notified of what may be used already");
        self.frontend.set_vring_err(queue, &ring.error).unwrap();
    }

    /// Where a ring is, and where its used ring belongs in the dirty log.
    pub(crate) fn addresses(&self, queue: usize, log_addr: Option<u64>) -> VringConfigData {
        let start = USER_BASE + Self::table(queue);
        let size = self.rings[queue].size;
        VringConfigData {
            queue_max_size: size,
            queue_size: size,
            flags: log_addr.map_or(0, |_| 1),
            desc_table_addr: start,
            used_ring_addr: start + USED,
            avail_ring_addr: start + AVAIL,
            log_addr,
        }
    }

    /// Where the used ring of a queue is in guest memory.
    pub(crate) fn used_ring(queue: usize) -> u64 {
        Self::table(queue) + USED
    }

    /// Whether the bytes around guest memory are as they were.
    pub(crate) fn guards_are_intact(&self) -> bool {
        [0, GUARD + MEMORY_SIZE].into_iter().all(|guard| {
            let mut bytes = vec![0; usize::try_from(GUARD).unwrap()];
            let guard = usize::try_from(guard).unwrap();
            self.memory.as_volatile_slice().read_slice(&mut bytes, guard).unwrap();
            bytes.iter().all(|byte| *byte == GUARD_BYTE)
        })
    }

    pub(crate) fn write(&self, at: u64, bytes: &[u8]) {
        let at = usize::try_from(at + GUARD).unwrap();
        self.memory.as_volatile_slice().write_slice(bytes, at).unwrap();
    }

    pub(crate) fn read(&self, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        let at = usize::try_from(at + GUARD).unwrap();
        self.memory.as_volatile_slice().read_slice(&mut bytes, at).unwrap();
        bytes
    }

    fn store(&self, at: u64, value: u16) {
        let at = usize::try_from(at + GUARD).unwrap();
        self.memory.as_volatile_slice().store(value, at, Ordering::SeqCst).unwrap();
    }

    fn load(&self, at: u64) -> u16 {
        let at = usize::try_from(at + GUARD).unwrap();
        self.memory.as_volatile_slice().load(at, Ordering::SeqCst).unwrap()
    }

    /// Writes one descriptor. `address` is a guest address.
    pub(crate) fn descriptor(
        &self,
        table: u64,
        index: u16,
        address: u64,
        length: u32,
        flags: u16,
        next: u16,
    ) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&address.to_le_bytes());
        bytes[8..12].copy_from_slice(&length.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(table + u64::from(index) * 16, &bytes);
    }

    pub(crate) fn table(queue: usize) -> u64 {
        queue as u64 * RING_SPACE
    }

    pub(crate) fn indirect_table(queue: usize) -> u64 {
        queue as u64 * RING_SPACE + INDIRECT
    }

    /// Writes a chain of buffers (guest memory offset, length, device-writable) from descriptor `first` on.
    pub(crate) fn chain(&self, table: u64, first: u16, buffers: &[(u64, u32, bool)]) {
        for (index, (at, length, writable)) in (first..).zip(buffers) {
            let last = usize::from(index - first) + 1 == buffers.len();
            let flags = if *writable { WRITE } else { 0 } | if last { 0 } else { NEXT };
            self.descriptor(table, index, GUEST_BASE + at, *length, flags, index + 1);
        }
    }

    pub(crate) fn make_available(&mut self, queue: usize, head: u16) {
        let (size, avail) = (self.rings[queue].size, self.rings[queue].avail);
        let ring = Self::table(queue) + AVAIL;
        self.store(ring + 4 + u64::from(avail % size) * 2, head);
        self.rings[queue].avail = avail.wrapping_add(1);
        self.store(ring + 2, avail.wrapping_add(1));
    }

    pub(crate) fn set_avail_index(&mut self, queue: usize, index: u16) {
        self.store(Self::table(queue) + AVAIL + 2, index);
        self.rings[queue].avail = index;
    }

    pub(crate) fn set_avail_flags(&mut self, queue: usize, flags: u16) {
        self.store(Self::table(queue) + AVAIL, flags);
    }

    pub(crate) fn used_index(&self, queue: usize) -> u16 {
        self.load(Self::table(queue) + USED + 2)
    }

    pub(crate) fn used_flags(&self, queue: usize) -> u16 {
        self.load(Self::table(queue) + USED)
    }

    /// What the device said it wants to be kicked for, with event indices.
    pub(crate) fn avail_event(&self, queue: usize) -> u16 {
        self.load(Self::table(queue) + USED + 4 + u64::from(self.rings[queue].size) * 8)
    }

    /// Asks to be notified once the used index passes `index`.
    pub(crate) fn set_used_event(&self, queue: usize, index: u16) {
        let ring = Self::table(queue) + AVAIL;
        self.store(ring + 4 + u64::from(self.rings[queue].size) * 2, index);
    }

    /// Returns when the device has ended every turn in which it did what this guest can see, and has read the signals that
    /// were sent to it: it answers a message at the start of a later one.
    pub(crate) fn settle(&self) {
        self.frontend.get_features().unwrap();
    }

    pub(crate) fn kick(&self, queue: usize) {
        self.rings[queue].kick.write(1).unwrap();
    }

    /// Takes `count` used elements (head, length), waiting for notifications.
    pub(crate) fn used(&mut self, queue: usize, count: usize) -> Vec<(u32, u32)> {
        let used = self.used_within(queue, count, PATIENCE);
        assert_eq!(used.len(), count, "the device did not answer in time");
        used
    }

    pub(crate) fn used_within(&mut self, queue: usize, count: usize, patience: Duration) -> Vec<(u32, u32)> {
        let deadline = Instant::now() + patience;
        let mut used = Vec::new();
        while used.len() < count {
            let seen = self.rings[queue].seen;
            if self.event_idx {
                self.set_used_event(queue, seen);
            }
            if self.used_index(queue) != seen {
                let slot = u64::from(seen % self.rings[queue].size);
                let element = self.read(Self::table(queue) + USED + 4 + slot * 8, 8);
                let word = |at: usize| u32::from_le_bytes(element[at..at + 4].try_into().unwrap());
                used.push((word(0), word(4)));
                self.rings[queue].seen = seen.wrapping_add(1);
            } else if !self.rings[queue].wait_call(deadline.saturating_duration_since(Instant::now())) {
                return used;
            }
        }
        used
    }

    /// Where the buffers of a request slot are: header at 0, status at 31, data from 512.
    pub(crate) fn buffer(queue: usize, slot: u16) -> u64 {
        BUFFERS + (queue as u64 * 16 + u64::from(slot)) * BUFFER_SPACE
    }

    /// Prepares a request in a slot (four descriptors) and makes it available, without a kick.
    pub(crate) fn submit(&mut self, queue: usize, slot: u16, kind: u32, sector: u64, out: &[u8], input: u32) {
        let at = self.fill(queue, slot, kind, sector, out);
        let buffers = Self::buffers(at, out.len(), input);
        self.chain(Self::table(queue), slot * 4, &buffers);
        self.make_available(queue, slot * 4);
    }

    /// Writes header and data of a request.
    pub(crate) fn fill(&self, queue: usize, slot: u16, kind: u32, sector: u64, out: &[u8]) -> u64 {
        let at = Self::buffer(queue, slot);
        self.write(at, &header(kind, sector));
        self.write(at + 31, &[0xff]);
        self.write(at + 512, out);
        at
    }

    pub(crate) fn buffers(at: u64, out: usize, input: u32) -> Vec<(u64, u32, bool)> {
        let mut buffers = vec![(at, 16, false)];
        if out > 0 {
            buffers.push((at + 512, u32::try_from(out).unwrap(), false));
        }
        if input > 0 {
            buffers.push((at + 512, input, true));
        }
        buffers.push((at + 31, 1, true));
        buffers
    }

    pub(crate) fn status(&self, queue: usize, slot: u16) -> u8 {
        self.read(Self::buffer(queue, slot) + 31, 1)[0]
    }

    /// One request from start to end, in slot 0.
    pub(crate) fn request(&mut self, queue: usize, kind: u32, sector: u64, out: &[u8], input: u32) -> Reply {
        self.submit(queue, 0, kind, sector, out, input);
        self.kick(queue);
        let used = self.used(queue, 1);
        assert_eq!(used[0].0, 0);
        let data = self.read(Self::buffer(queue, 0) + 512, input as usize);
        Reply { status: self.status(queue, 0), data, used_length: used[0].1 }
    }

    pub(crate) fn read_disk(&mut self, sector: u64, length: u32) -> Reply {
        self.request(0, blk::VIRTIO_BLK_T_IN, sector, &[], length)
    }

    pub(crate) fn write_disk(&mut self, sector: u64, data: &[u8]) -> u8 {
        self.request(0, blk::VIRTIO_BLK_T_OUT, sector, data, 0).status
    }

    pub(crate) fn flush(&mut self) -> u8 {
        self.request(0, blk::VIRTIO_BLK_T_FLUSH, 0, &[], 0).status
    }
}

impl Ring {
    pub(crate) fn new(size: u16) -> Self {
        let (call, calls) = Self::watched_call();
        let (kick, error) = (EventFd::new(EFD_NONBLOCK).unwrap(), EventFd::new(EFD_NONBLOCK).unwrap());
        Self { size, avail: 0, seen: 0, kick, call, error, calls }
    }

    fn watched_call() -> (EventFd, Epoll) {
        let (call, calls) = (EventFd::new(EFD_NONBLOCK).unwrap(), Epoll::new().unwrap());
        let event = EpollEvent::new(EventSet::IN, 0);
        calls.ctl(ControlOperation::Add, call.as_raw_fd(), event).unwrap();
        (call, calls)
    }

    /// Another call descriptor, which the device does not know yet.
    pub(crate) fn replace_call(&mut self) {
        (self.call, self.calls) = Self::watched_call();
    }

    /// Waits for a notification and takes it.
    pub(crate) fn wait_call(&self, patience: Duration) -> bool {
        let mut events = [EpollEvent::default()];
        let millis = i32::try_from(patience.as_millis()).unwrap();
        let got = self.calls.wait(millis, &mut events).unwrap_or(0);
        got > 0 && self.call.read().is_ok()
    }
}

pub(crate) fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut header = [0; 16];
    header[..4].copy_from_slice(&kind.to_le_bytes());
    header[8..].copy_from_slice(&sector.to_le_bytes());
    header
}

pub(crate) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let mut bytes = sector.to_le_bytes().to_vec();
    bytes.extend(sectors.to_le_bytes());
    bytes.extend(flags.to_le_bytes());
    bytes
}

pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what} did not happen in time");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A file as an event descriptor.
pub(crate) fn as_eventfd(file: File) -> EventFd {
    // SAFETY: the descriptor was owned by the file and is handed over.
    unsafe { EventFd::from_raw_fd(file.into_raw_fd()) }
}

/// An event descriptor as a file.
pub(crate) fn as_file(event: &EventFd) -> File {
    let event = event.try_clone().unwrap();
    // SAFETY: the descriptor was owned by the clone and is handed over.
    unsafe { File::from_raw_fd(event.into_raw_fd()) }
}

pub(crate) fn pattern(length: usize, seed: u8) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8 ^ seed).collect()
}

/// Waits for 400 ms in which the loop uses less processor time than `limit`. It may take a while to get to where it waits, and
/// where it is woken again and again there are no such 400 ms.
pub(crate) fn comes_to_rest(daemon: &Daemon, limit: Duration) {
    let thread = daemon.thread.as_ref().unwrap();
    let mut spent = Vec::new();
    while spent.last().is_none_or(|spent| *spent >= limit) {
        assert!(spent.len() < 20, "{spent:?} of processor time, each in 400 ms of waiting");
        let before = cpu_time(thread);
        std::thread::sleep(Duration::from_millis(400));
        spent.push(cpu_time(thread) - before);
    }
}

/// CPU time that a thread has used.
pub(crate) fn cpu_time<T>(thread: &JoinHandle<T>) -> Duration {
    let (mut clock, mut time) = (0, libc::timespec { tv_sec: 0, tv_nsec: 0 });
    // SAFETY: the thread was not joined, and both results are valid for writing.
    let failed = unsafe {
        libc::pthread_getcpuclockid(std::os::unix::thread::JoinHandleExt::as_pthread_t(thread), &mut clock)
            + libc::clock_gettime(clock, &mut time)
    };
    assert_eq!(failed, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}
