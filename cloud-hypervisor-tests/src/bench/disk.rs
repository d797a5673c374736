//! One virtio-blk disk on a vhost-user socket, seen from the guest's side: shared memory that is touched beforehand,
//! requests with their own buffers, and sleep on the call descriptors between interrupts, as a Linux guest does it.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::{Duration, Instant};

use rand::{RngCore, SeedableRng};
use thiserror::Error;
use virtio_driver::virtqueue::{Virtqueue, VirtqueueLayout};
use virtio_driver::{
    EventFd, QueueNotifier, VhostUser, VirtioBlkConfig, VirtioBlkFeatureFlags, VirtioFeatureFlags,
    VirtioTransport,
};

use super::ring::{DESCRIPTOR_BYTES, Piece, Ring, RingPlace, write_indirect};
use super::sys;

/// Unit of the request header and of the capacity (virtio 1.3 §5.2.4).
pub const SECTOR: u64 = 512;

/// Most requests in flight: what a ring of the greatest legal size holds.
pub const MAX_DEPTH: u32 = 32768;

const HEADER_BYTES: usize = 16;
const STATUS_AT: usize = 16;
const TABLE_AT: usize = 32;
const PAGE: usize = 4096;
/// A status that no device writes, so that a request completed without an answer is seen.
const STATUS_UNWRITTEN: u8 = 0xff;

/// How to attach to a disk.
#[derive(Clone, Debug)]
pub struct DiskOptions {
    /// The vhost-user socket, where the daemon listens.
    pub socket: PathBuf,
    /// Virtqueues to use.
    pub queues: u16,
    /// Entries of each virtqueue; by default the smallest power of two from 128 that holds the requests.
    pub queue_size: Option<u16>,
    /// Requests that can be in flight at once, over all queues.
    pub depth: u32,
    /// Bytes of each request's buffer.
    pub buffer_size: u32,
    /// Greatest piece of a request's scatter/gather list; by default one piece per request.
    pub segment_size: Option<u32>,
    /// Seed of the buffers' first content.
    pub seed: u64,
    /// Processes whose end means that no answer will come any more: the daemon's.
    pub daemons: Vec<u32>,
    /// How long a connection may give no completion while requests are in flight.
    pub stall_timeout: Duration,
}

impl DiskOptions {
    /// One queue, one request of 4 KiB at a time on the disk at `socket`.
    #[must_use]
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self {
            socket: socket.into(),
            queues: 1,
            queue_size: None,
            depth: 1,
            buffer_size: 4096,
            segment_size: None,
            seed: 1,
            daemons: Vec::new(),
            stall_timeout: Duration::from_secs(30),
        }
    }
}

/// Why a disk cannot be attached or used any more. An error status of a single request is not among these.
#[derive(Debug, Error)]
pub enum DiskError {
    /// The connection or its negotiation failed.
    #[error("cannot attach to the vhost-user socket {socket}: {cause}")]
    Attach {
        /// The socket.
        socket: PathBuf,
        /// What failed.
        cause: io::Error,
    },
    /// The disk cannot do what the options ask for.
    #[error("{0}")]
    Unsuitable(String),
    /// The daemon answers nothing although requests are in flight.
    #[error("no completion for {waited:?} with {in_flight} requests in flight")]
    Stalled {
        /// How long.
        waited: Duration,
        /// How many requests.
        in_flight: u32,
    },
    /// A daemon process ended.
    #[error("the daemon (process {pid}) ended with {in_flight} requests in flight")]
    DaemonEnded {
        /// Its process number.
        pid: u32,
        /// How many requests.
        in_flight: u32,
    },
    /// The device broke the rules of the ring.
    #[error("queue {queue}: expected the completion of a request in flight, found descriptor {head}")]
    BadCompletion {
        /// Which queue.
        queue: usize,
        /// What the used ring says.
        head: u32,
    },
    /// A system call failed.
    #[error("{doing}: {cause}")]
    System {
        /// What was tried.
        doing: &'static str,
        /// The error.
        cause: io::Error,
    },
}

/// What a request does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Fill the buffer from the disk.
    Read,
    /// Write the buffer to the disk.
    Write,
    /// Make everything that completed before durable.
    Flush,
}

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// The device reports an I/O error.
    IoError,
    /// The device does not know the request.
    Unsupported,
    /// The device wrote this, which is no status, or nothing (255).
    Invalid(u8),
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ok => f.write_str("ok"),
            Self::IoError => f.write_str("I/O error"),
            Self::Unsupported => f.write_str("request not supported"),
            Self::Invalid(STATUS_UNWRITTEN) => f.write_str("completed without a status"),
            Self::Invalid(value) => write!(f, "unknown status {value}"),
        }
    }
}

/// A place for one request, with a buffer of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(u32);

impl Slot {
    /// Position in a table with an entry per slot.
    #[must_use]
    pub fn index(self) -> usize {
        usize::try_from(self.0).expect("a slot number fits the address space")
    }
}

/// A request that the device has answered.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// Which; [`Disk::release`] it when its buffer is no longer needed.
    pub slot: Slot,
    /// How it ended.
    pub status: Status,
}

/// An attached disk. Dropping it detaches.
pub struct Disk {
    // Before the transport and the memory: queues refer to both.
    queues: Vec<Queue>,
    slots: Vec<SlotPlace>,
    free: Vec<Slot>,
    in_flight: u32,
    options: DiskOptions,
    capacity: u64,
    features: u64,
    indirect: bool,
    stride: u16,
    segment_size: u32,
    deaths: Vec<(u32, OwnedFd)>,
    wait_list: Vec<RawFd>,
    wait_ready: Vec<bool>,
    last_progress: Instant,
    // The daemon unmaps the memory when the connection ends; ours must still be there until then.
    _transport: VhostUser<VirtioBlkConfig, ()>,
    memory: sys::SharedMemory,
}

struct Queue {
    ring: Ring,
    kick: Box<dyn QueueNotifier>,
    call: Arc<EventFd>,
}

#[derive(Clone, Copy)]
struct SlotPlace {
    queue: usize,
    head: u16,
    control: usize,
    buffer: usize,
    submitted: bool,
}

impl Disk {
    /// Attaches, negotiates what a Linux guest would, and touches all memory once.
    ///
    /// `virtio-driver` waits for answers without a limit; a daemon that is there and says nothing is therefore waited
    /// for on a thread of its own, which is left behind when the stall timeout is over.
    pub fn attach(options: DiskOptions) -> Result<Self, DiskError> {
        let (socket, limit) = (options.socket.clone(), options.stall_timeout);
        let (sender, receiver) = mpsc::sync_channel(1);
        // The receiver may be gone by the time of the answer; nobody wants the disk then.
        thread::spawn(move || drop(sender.send(Self::negotiate(options))));
        receiver.recv_timeout(limit).unwrap_or_else(|_| {
            let cause = io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {limit:?}"));
            Err(DiskError::Attach { socket, cause })
        })
    }

    fn negotiate(options: DiskOptions) -> Result<Self, DiskError> {
        let socket = options.socket.clone();
        let attach = |cause| DiskError::Attach { socket: socket.clone(), cause };
        check(&options)?;
        let watch = |pid: &u32| match sys::watch_process(*pid) {
            Ok(death) => Ok((*pid, death)),
            Err(cause) => {
                Err(DiskError::Unsuitable(format!("cannot watch the daemon's process {pid}: {cause}")))
            }
        };
        let deaths = options.daemons.iter().map(watch).collect::<Result<Vec<_>, _>>()?;

        let path = path_text(&options.socket)?;
        let mut transport = VhostUser::<VirtioBlkConfig, ()>::new(path, wanted_features()).map_err(attach)?;
        let features = transport.get_features();
        let config = transport.get_config().map_err(attach)?;
        let shape = Shape::choose(&options, features, &config)?;

        let mut memory = sys::SharedMemory::new(shape.memory_bytes)
            .map_err(|cause| DiskError::System { doing: "allocating the guest's memory", cause })?;
        let mut random = rand::rngs::SmallRng::seed_from_u64(options.seed);
        random.fill_bytes(memory.before_sharing(shape.buffers_at, shape.memory_bytes - shape.buffers_at));

        let virtio = VirtioFeatureFlags::from_bits_truncate(features);
        let places =
            set_up_memory(&mut transport, &mut memory, &shape, virtio, options.queues).map_err(attach)?;
        let event_idx = virtio.contains(VirtioFeatureFlags::RING_EVENT_IDX);
        let queues = places
            .into_iter()
            .enumerate()
            .map(|(index, place)| Queue {
                ring: Ring::new(place, event_idx),
                kick: transport.get_submission_notifier(index),
                call: transport.get_completion_fd(index),
            })
            .collect();

        let mut disk = Self {
            queues,
            slots: shape.slots(&options),
            free: (0..options.depth).rev().map(Slot).collect(),
            in_flight: 0,
            capacity: u64::from(config.capacity) * SECTOR,
            features,
            indirect: shape.indirect,
            stride: shape.stride,
            segment_size: shape.segment_size,
            deaths,
            wait_list: Vec::new(),
            wait_ready: Vec::new(),
            last_progress: Instant::now(),
            options,
            _transport: transport,
            memory,
        };
        let calls = disk.queues.iter().map(|queue| queue.call.as_raw_fd());
        disk.wait_list = calls.chain(disk.deaths.iter().map(|(_, fd)| fd.as_raw_fd())).collect();
        Ok(disk)
    }

    /// Bytes of the disk.
    #[must_use]
    pub fn capacity(&self) -> u64 {
        self.capacity
    }

    /// Bytes of each slot's buffer.
    #[must_use]
    pub fn buffer_size(&self) -> u32 {
        self.options.buffer_size
    }

    /// Number of slots.
    #[must_use]
    pub fn depth(&self) -> u32 {
        self.options.depth
    }

    /// Whether the device has a cache that [`Operation::Flush`] empties.
    #[must_use]
    pub fn has_flush(&self) -> bool {
        self.features & VirtioBlkFeatureFlags::FLUSH.bits() != 0
    }

    /// Whether the device refuses writes.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.features & VirtioBlkFeatureFlags::RO.bits() != 0
    }

    /// The negotiated feature bits.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// Requests in flight.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight
    }

    /// Takes a free slot, if there is one.
    pub fn take(&mut self) -> Option<Slot> {
        self.free.pop()
    }

    /// Gives a slot back whose request is finished or was never submitted.
    pub fn release(&mut self, slot: Slot) {
        assert!(!self.slots[slot.index()].submitted, "a slot is released only when its request has finished");
        self.free.push(slot);
    }

    /// Copies `bytes` into the slot's buffer.
    pub fn fill(&self, slot: Slot, at: usize, bytes: &[u8]) {
        self.check_buffer(at, bytes.len());
        self.memory.write(self.slots[slot.index()].buffer + at, bytes);
    }

    /// Copies from the slot's buffer.
    pub fn copy_out(&self, slot: Slot, at: usize, bytes: &mut [u8]) {
        self.check_buffer(at, bytes.len());
        self.memory.read(self.slots[slot.index()].buffer + at, bytes);
    }

    /// Puts a request into its queue; [`Disk::kick`] tells the device. `length` bytes of the buffer from its start;
    /// a flush has neither offset nor length.
    pub fn submit(&mut self, slot: Slot, operation: Operation, offset: u64, length: u32) {
        self.check_buffer(0, usize::try_from(length).unwrap_or(usize::MAX));
        let base = u64::try_from(self.memory.address()).expect("an address fits 64 bits");
        let place = &mut self.slots[slot.index()];
        assert!(!place.submitted, "a slot carries one request at a time");
        place.submitted = true;
        let place = *place;

        let kind: u32 = match operation {
            Operation::Read => 0,
            Operation::Write => 1,
            Operation::Flush => 4,
        };
        let mut header = [0; HEADER_BYTES];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&(offset / SECTOR).to_le_bytes());
        self.memory.write(place.control, &header);
        self.memory.write(place.control + STATUS_AT, &[STATUS_UNWRITTEN]);

        let address = |at: usize| base + u64::try_from(at).expect("an offset fits 64 bits");
        let mut pieces = [Piece { address: 0, length: 0, device_writes: false }; MAX_PIECES];
        let mut count = 0;
        let mut push = |piece| {
            pieces[count] = piece;
            count += 1;
        };
        push(Piece { address: address(place.control), length: 16, device_writes: false });
        let mut done = 0;
        while done < length {
            let piece = self.segment_size.min(length - done);
            let at = address(place.buffer) + u64::from(done);
            push(Piece { address: at, length: piece, device_writes: operation == Operation::Read });
            done += piece;
        }
        push(Piece { address: address(place.control + STATUS_AT), length: 1, device_writes: true });

        let pieces = &pieces[..count];
        let ring = &mut self.queues[place.queue].ring;
        if self.indirect {
            let entries = u32::try_from(count).expect("few pieces");
            write_indirect(&self.memory, place.control + TABLE_AT, pieces);
            ring.point_to_table(&self.memory, place.head, address(place.control + TABLE_AT), entries);
        } else {
            ring.write_chain(&self.memory, place.head, pieces);
        }
        ring.publish(&self.memory, place.head);
        if self.in_flight == 0 {
            self.last_progress = Instant::now();
        }
        self.in_flight += 1;
    }

    /// Tells the device of new requests, where it wants to be told.
    pub fn kick(&mut self) -> Result<(), DiskError> {
        for queue in &mut self.queues {
            if queue.ring.kick_is_due(&self.memory) {
                queue
                    .kick
                    .notify()
                    .map_err(|cause| DiskError::System { doing: "kicking the device", cause })?;
            }
        }
        Ok(())
    }

    /// Appends all requests that finished. Never sleeps.
    pub fn reap(&mut self, finished: &mut Vec<Finished>) -> Result<(), DiskError> {
        let before = finished.len();
        let queue_count = u32::from(self.options.queues);
        for (index, queue) in self.queues.iter_mut().enumerate() {
            while let Some(head) = queue.ring.take_used(&self.memory) {
                let number = u32::try_from(index).expect("few queues");
                let slot =
                    Slot((head / u32::from(self.stride)).saturating_mul(queue_count).saturating_add(number));
                let place = self.slots.get_mut(slot.index());
                let Some(place) = place.filter(|place| place.submitted && u32::from(place.head) == head)
                else {
                    return Err(DiskError::BadCompletion { queue: index, head });
                };
                place.submitted = false;
                self.in_flight -= 1;
                let status = match self.memory.read_byte(place.control + STATUS_AT) {
                    0 => Status::Ok,
                    1 => Status::IoError,
                    2 => Status::Unsupported,
                    other => Status::Invalid(other),
                };
                finished.push(Finished { slot, status });
            }
        }
        if finished.len() > before {
            self.last_progress = Instant::now();
        }
        Ok(())
    }

    /// Sleeps until a request has finished, at most `timeout`. Returns at once when one is there already.
    pub fn sleep(&mut self, timeout: Duration) -> Result<(), DiskError> {
        let mut finished = false;
        for queue in &self.queues {
            finished |= queue.ring.arm(&self.memory);
        }
        if finished {
            return Ok(());
        }
        let waited = self.last_progress.elapsed();
        if self.in_flight > 0 && waited >= self.options.stall_timeout {
            return Err(DiskError::Stalled { waited, in_flight: self.in_flight });
        }
        let timeout = timeout.min(self.options.stall_timeout);
        sys::wait_readable(&self.wait_list, &mut self.wait_ready, timeout)
            .map_err(|cause| DiskError::System { doing: "waiting for completions", cause })?;
        let mut interrupted = false;
        for (queue, ready) in self.queues.iter().zip(&self.wait_ready) {
            if *ready {
                interrupted = true;
                sys::drain_eventfd(queue.call.as_fd());
            }
        }
        // What the daemon completed before it died counts; only then is its death an end.
        let deaths = self.deaths.iter().zip(self.wait_ready.iter().skip(self.queues.len()));
        match deaths.filter(|(_, ready)| **ready).map(|((pid, _), _)| *pid).next() {
            Some(pid) if !interrupted && !self.queues.iter().any(|queue| queue.ring.arm(&self.memory)) => {
                Err(DiskError::DaemonEnded { pid, in_flight: self.in_flight })
            }
            _ => Ok(()),
        }
    }

    fn check_buffer(&self, at: usize, length: usize) {
        let size = usize::try_from(self.options.buffer_size).unwrap_or(usize::MAX);
        assert!(
            at.checked_add(length).is_some_and(|end| end <= size),
            "{length} bytes at {at} of a buffer of {size}"
        );
    }
}

/// Most descriptors of a request: header, pieces of data, status. `SEG_MAX` of the daemons here is at most 254.
const MAX_PIECES: usize = 256;

/// How rings, requests and buffers are arranged in the shared memory.
struct Shape {
    indirect: bool,
    segment_size: u32,
    /// Descriptors of the ring's own table that belong to one request.
    stride: u16,
    queue_size: u16,
    ring_bytes: usize,
    control_at: usize,
    control_bytes: usize,
    buffers_at: usize,
    buffer_stride: usize,
    memory_bytes: usize,
}

impl Shape {
    fn choose(options: &DiskOptions, features: u64, config: &VirtioBlkConfig) -> Result<Self, DiskError> {
        let device = VirtioBlkFeatureFlags::from_bits_truncate(features);
        let virtio = VirtioFeatureFlags::from_bits_truncate(features);
        let device_queues =
            if device.contains(VirtioBlkFeatureFlags::MQ) { u16::from(config.num_queues) } else { 1 };
        if options.queues > device_queues {
            return Err(DiskError::Unsuitable(format!(
                "{} queues were asked for, the disk has {device_queues}",
                options.queues
            )));
        }

        let mut segment_size = options.segment_size.unwrap_or(options.buffer_size);
        let size_max = u32::from(config.size_max);
        if device.contains(VirtioBlkFeatureFlags::SIZE_MAX) && size_max > 0 {
            segment_size = segment_size.min(size_max);
        }
        let segments = options.buffer_size.div_ceil(segment_size);
        let seg_max = u32::from(config.seg_max);
        let allowed =
            if device.contains(VirtioBlkFeatureFlags::SEG_MAX) && seg_max > 0 { seg_max } else { 1 };
        let limit = allowed.min(u32::try_from(MAX_PIECES - 2).expect("a small constant"));
        if segments > limit {
            return Err(DiskError::Unsuitable(format!(
                "a request of {} bytes in pieces of {segment_size} needs {segments} segments, at most {limit} fit",
                options.buffer_size
            )));
        }

        let indirect = virtio.contains(VirtioFeatureFlags::RING_INDIRECT_DESC);
        let pieces = u16::try_from(segments + 2).expect("at most MAX_PIECES");
        let stride = if indirect { 1 } else { pieces };
        let needed = options.depth.div_ceil(u32::from(options.queues)) * u32::from(stride);
        let smallest = u16::try_from(needed.max(128).next_power_of_two()).ok();
        let queue_size = match options.queue_size {
            Some(size) if u32::from(size) >= needed => Some(size),
            Some(_) => None,
            None => smallest,
        };
        let Some(queue_size) = queue_size else {
            return Err(DiskError::Unsuitable(format!(
                "{} requests in flight need {needed} descriptors in each of {} queues, more than a queue has",
                options.depth, options.queues
            )));
        };

        let layout = VirtqueueLayout::new::<()>(1, usize::from(queue_size), virtio)
            .map_err(|error| DiskError::Unsuitable(format!("a queue of {queue_size} entries: {error}")))?;
        let ring_bytes = layout.end_offset.next_multiple_of(64);
        let control_at = ring_bytes * usize::from(options.queues);
        let control_bytes = (TABLE_AT + usize::from(pieces) * DESCRIPTOR_BYTES).next_multiple_of(64);
        let depth = usize::try_from(options.depth).expect("at most MAX_DEPTH");
        let buffers_at = (control_at + control_bytes * depth).next_multiple_of(PAGE);
        let buffer_stride = usize::try_from(options.buffer_size).expect("32 bits fit").next_multiple_of(PAGE);
        let memory_bytes = buffers_at + buffer_stride * depth;
        Ok(Self {
            indirect,
            segment_size,
            stride,
            queue_size,
            ring_bytes,
            control_at,
            control_bytes,
            buffers_at,
            buffer_stride,
            memory_bytes,
        })
    }

    /// Requests are dealt to the queues in turn.
    fn slots(&self, options: &DiskOptions) -> Vec<SlotPlace> {
        let depth = usize::try_from(options.depth).expect("at most MAX_DEPTH");
        let queues = usize::from(options.queues);
        (0..depth)
            .map(|index| SlotPlace {
                queue: index % queues,
                head: u16::try_from(index / queues * usize::from(self.stride)).expect("inside the queue"),
                control: self.control_at + index * self.control_bytes,
                buffer: self.buffers_at + index * self.buffer_stride,
                submitted: false,
            })
            .collect()
    }
}

/// Lets `virtio-driver` initialise a ring per queue, then announce memory and rings to the device.
fn set_up_memory(
    transport: &mut VhostUser<VirtioBlkConfig, ()>,
    memory: &mut sys::SharedMemory,
    shape: &Shape,
    features: VirtioFeatureFlags,
    count: u16,
) -> io::Result<Vec<RingPlace>> {
    let (base, length, file) = (memory.address(), memory.length(), memory.descriptor());
    let rings = memory.before_sharing(0, shape.control_at);
    let queues = rings
        .chunks_exact_mut(shape.ring_bytes)
        .take(usize::from(count))
        .map(|chunk| Virtqueue::<()>::new(transport.iova_translator(), chunk, shape.queue_size, features))
        .collect::<Result<Vec<_>, _>>()?;
    let place = |queue: &Virtqueue<'_, ()>| RingPlace {
        descriptors: queue.desc_table_ptr() as usize - base,
        available: queue.driver_area_ptr() as usize - base,
        used: queue.device_area_ptr() as usize - base,
        size: shape.queue_size,
    };
    let places = queues.iter().map(place).collect();
    transport.map_mem_region(base, length, file, 0)?;
    transport.setup_queues(&queues)?;
    Ok(places)
}

/// What a Linux guest accepts of a virtio-blk disk, short of zoned and secure erase.
fn wanted_features() -> u64 {
    let virtio = VirtioFeatureFlags::VERSION_1
        | VirtioFeatureFlags::RING_EVENT_IDX
        | VirtioFeatureFlags::RING_INDIRECT_DESC;
    let block = VirtioBlkFeatureFlags::SIZE_MAX
        | VirtioBlkFeatureFlags::SEG_MAX
        | VirtioBlkFeatureFlags::RO
        | VirtioBlkFeatureFlags::BLK_SIZE
        | VirtioBlkFeatureFlags::FLUSH
        | VirtioBlkFeatureFlags::TOPOLOGY
        | VirtioBlkFeatureFlags::CONFIG_WCE
        | VirtioBlkFeatureFlags::MQ
        | VirtioBlkFeatureFlags::DISCARD
        | VirtioBlkFeatureFlags::WRITE_ZEROES;
    virtio.bits() | block.bits()
}

fn check(options: &DiskOptions) -> Result<(), DiskError> {
    let sector = u32::try_from(SECTOR).expect("512 fits");
    let unsuitable = |text: String| Err(DiskError::Unsuitable(text));
    let size = options.buffer_size;
    let segment = options.segment_size.unwrap_or(size);
    if size == 0 || !size.is_multiple_of(sector) || segment == 0 || !segment.is_multiple_of(sector) {
        return unsuitable(format!(
            "sizes are multiples of {SECTOR}, found request {size} and segment {segment}"
        ));
    }
    if options.depth == 0 || options.depth > MAX_DEPTH {
        return unsuitable(format!("the depth is 1 to {MAX_DEPTH}, found {}", options.depth));
    }
    let waits = usize::from(options.queues) + options.daemons.len();
    if options.queues == 0 || waits > sys::MAX_WAIT {
        return unsuitable(format!("1 to {} queues and watched processes, found {waits}", sys::MAX_WAIT));
    }
    match options.queue_size {
        Some(entries) if !entries.is_power_of_two() => {
            unsuitable(format!("a queue size is a power of two, found {entries}"))
        }
        _ => Ok(()),
    }
}

fn path_text(path: &Path) -> Result<&str, DiskError> {
    path.to_str()
        .ok_or_else(|| DiskError::Unsuitable(format!("the socket path {} is not UTF-8", path.display())))
}
