//! A small virtio-blk driver over its own split rings, speaking to a back end through `vhost::Frontend` without any guest.
//! Well-behaved requests are one call each; every byte of the rings can also be written at will, to play a hostile guest.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};
use std::{io, thread};

use anyhow::{Context, Result, bail};
use vhost::vhost_user::message::{VhostUserConfigFlags, VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend as Connection, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Feature bits of virtio-blk and of virtio itself that the driver knows (virtio 1.3 §5.2.3 and §6).
pub mod feature {
    /// The device refuses writes.
    pub const READ_ONLY: u64 = 1 << 5;
    /// The logical block size is in the configuration.
    pub const BLOCK_SIZE: u64 = 1 << 6;
    /// Flush requests.
    pub const FLUSH: u64 = 1 << 9;
    /// Topology is in the configuration.
    pub const TOPOLOGY: u64 = 1 << 10;
    /// The driver may choose the cache mode.
    pub const CONFIG_WCE: u64 = 1 << 11;
    /// Several queues.
    pub const MULTI_QUEUE: u64 = 1 << 12;
    /// Discard requests.
    pub const DISCARD: u64 = 1 << 13;
    /// Write-zeroes requests.
    pub const WRITE_ZEROES: u64 = 1 << 14;
    /// Indirect descriptor tables.
    pub const INDIRECT: u64 = 1 << 28;
    /// Notifications by index.
    pub const EVENT_IDX: u64 = 1 << 29;
    /// vhost-user's own bit: everything that the device writes is logged.
    pub const LOG_ALL: u64 = 1 << 26;
    /// vhost-user's own bit: there are protocol features.
    pub const PROTOCOL: u64 = 1 << 30;
    /// Virtio 1.0 or later.
    pub const VERSION_1: u64 = 1 << 32;
}

/// Request types (virtio 1.3 §5.2.6).
pub mod request {
    /// Read.
    pub const IN: u32 = 0;
    /// Write.
    pub const OUT: u32 = 1;
    /// Flush.
    pub const FLUSH: u32 = 4;
    /// Read the serial.
    pub const GET_ID: u32 = 8;
    /// Discard.
    pub const DISCARD: u32 = 11;
    /// Write zeroes.
    pub const WRITE_ZEROES: u32 = 13;
}

/// Descriptor flags (virtio 1.3 §2.7.5).
pub mod flag {
    /// The chain goes on.
    pub const NEXT: u16 = 1;
    /// The device writes here.
    pub const WRITE: u16 = 2;
    /// The buffer is a table of descriptors.
    pub const INDIRECT: u16 = 4;
}

/// Where the driver's memory begins: not zero, so that a back end that confuses addresses and offsets is caught.
pub const MEMORY_START: u64 = 0x4000_0000;
/// Size of the driver's memory.
pub const MEMORY_SIZE: u64 = 32 << 20;
/// First address that is free for buffers of tests: the rings are below, the driver's own buffers above [`BUFFERS_END`].
pub const BUFFERS: u64 = MEMORY_START + (8 << 20);
/// End of the buffers of tests.
pub const BUFFERS_END: u64 = MEMORY_START + (16 << 20);

const RING_STRIDE: u64 = 64 << 10;
const AVAIL_OFFSET: u64 = 16 << 10;
const USED_OFFSET: u64 = 20 << 10;
const MAX_QUEUES: u64 = (8 << 20) / RING_STRIDE;
const MAX_QUEUE_SIZE: u16 = 1024;
/// Header, data and status of the well-behaved requests.
const OWN_HEADER: u64 = BUFFERS_END;
const OWN_STATUS: u64 = BUFFERS_END + 64;
const OWN_DATA: u64 = BUFFERS_END + 4096;
const MAX_OWN_DATA: u64 = MEMORY_START + MEMORY_SIZE - OWN_DATA;
/// What the status byte holds before the device writes it.
const NO_STATUS: u8 = 0xee;
/// Longest wait for an answer of the back end on the control socket.
const CONTROL_LIMIT: Duration = Duration::from_secs(60);
/// Longest time between a back end's making of its socket and its listening there.
const LISTEN_LIMIT: Duration = Duration::from_secs(10);
/// Longest wait for a well-behaved request.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);

/// How a request ended (virtio 1.3 §5.2.6).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Status {
    /// Done.
    Ok,
    /// Failed.
    IoError,
    /// Not supported.
    Unsupported,
    /// The device wrote something else, or nothing.
    Other(u8),
}

impl From<u8> for Status {
    fn from(byte: u8) -> Self {
        match byte {
            0 => Self::Ok,
            1 => Self::IoError,
            2 => Self::Unsupported,
            other => Self::Other(other),
        }
    }
}

/// One entry of a descriptor table.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Descriptor {
    /// Guest address of the buffer.
    pub address: u64,
    /// Its length.
    pub length: u32,
    /// Of [`flag`].
    pub flags: u16,
    /// Index of the next entry, if `flags` has NEXT.
    pub next: u16,
}

impl Descriptor {
    /// The entry's 16 bytes in memory.
    #[must_use]
    pub fn to_bytes(self) -> [u8; 16] {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&self.address.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.length.to_le_bytes());
        bytes[12..14].copy_from_slice(&self.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&self.next.to_le_bytes());
        bytes
    }
}

/// One entry of a used ring.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Used {
    /// Head of the chain.
    pub head: u32,
    /// How many bytes the device says it wrote.
    pub length: u32,
}

/// A driver to be.
#[derive(Clone, Debug)]
pub struct FrontendBuilder {
    socket: PathBuf,
    queues: usize,
    queue_size: u16,
    without: u64,
}

impl FrontendBuilder {
    /// A driver for the back end at `socket`, with one queue of 128 entries, without EVENT_IDX, and without a dirty log, which
    /// only a guest that is migrated has.
    #[must_use]
    pub fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            queues: 1,
            queue_size: 128,
            without: feature::EVENT_IDX | feature::LOG_ALL,
        }
    }

    /// Number of queues to use.
    #[must_use]
    pub fn queues(mut self, queues: usize) -> Self {
        self.queues = queues;
        self
    }

    /// Entries of each queue.
    #[must_use]
    pub fn queue_size(mut self, entries: u16) -> Self {
        self.queue_size = entries;
        self
    }

    /// Does not negotiate these features, which the back end may offer.
    #[must_use]
    pub fn without(mut self, features: u64) -> Self {
        self.without |= features;
        self
    }

    /// Connects, negotiates and starts all queues.
    ///
    /// # Errors
    /// When the back end does not take part, in time, at any step.
    pub fn connect(&self) -> Result<Frontend> {
        let socket = self.socket.display();
        if self.queues as u64 > MAX_QUEUES || self.queue_size > MAX_QUEUE_SIZE {
            bail!(
                "{} queues of {} entries do not fit into the driver's memory",
                self.queues,
                self.queue_size
            );
        }
        let stream = dial(&self.socket).with_context(|| format!("connecting to {socket}"))?;
        stream.set_read_timeout(Some(CONTROL_LIMIT))?;
        stream.set_write_timeout(Some(CONTROL_LIMIT))?;
        let hang_up = stream.try_clone()?;
        let mut connection = Connection::from_stream(stream, self.queues as u64);
        let offered = connection.get_features().context("GET_FEATURES")?;
        if offered & feature::PROTOCOL == 0 || offered & feature::VERSION_1 == 0 {
            bail!(
                "{socket} offers features {offered:#x}, expected VERSION_1 and PROTOCOL_FEATURES among them"
            );
        }
        let protocol_offered = connection.get_protocol_features().context("GET_PROTOCOL_FEATURES")?;
        let protocol = protocol_offered
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::RESET_DEVICE);
        connection.set_protocol_features(protocol).context("SET_PROTOCOL_FEATURES")?;
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            connection.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        connection.set_owner().context("SET_OWNER")?;
        let features = offered & !self.without;
        connection.set_features(features).context("SET_FEATURES")?;

        let file = tempfile::tempfile_in("/dev/shm").context("making the driver's memory")?;
        file.set_len(MEMORY_SIZE)?;
        let size = usize::try_from(MEMORY_SIZE)?;
        let range = (GuestAddress(MEMORY_START), size, Some(FileOffset::new(file, 0)));
        let memory =
            GuestMemoryMmap::<()>::from_ranges_with_files([range]).context("mapping the driver's memory")?;
        let regions: Vec<_> =
            memory.iter().map(VhostUserMemoryRegionInfo::from_guest_region).collect::<Result<_, _>>()?;
        connection.set_mem_table(&regions).context("SET_MEM_TABLE")?;

        let mut frontend = Frontend {
            connection,
            hang_up,
            features,
            protocol,
            memory,
            queue_size: self.queue_size,
            queues: Vec::new(),
        };
        for index in 0..self.queues {
            frontend.start_queue(index).with_context(|| format!("starting queue {index}"))?;
        }
        Ok(frontend)
    }
}

/// Connects to a back end that may have just been started: its socket exists for a moment before anybody listens on it.
fn dial(socket: &Path) -> io::Result<UnixStream> {
    let started = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Err(error)
                if error.kind() == io::ErrorKind::ConnectionRefused && started.elapsed() < LISTEN_LIMIT =>
            {
                thread::sleep(Duration::from_millis(5));
            }
            result => return result,
        }
    }
}

#[derive(Debug)]
struct Queue {
    kick: EventFd,
    call: EventFd,
    error: EventFd,
    next_avail: u16,
    next_used: u16,
}

/// A connected driver. Dropping it closes the connection, as a hypervisor that died would.
pub struct Frontend {
    connection: Connection,
    hang_up: UnixStream,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    memory: GuestMemoryMmap,
    queue_size: u16,
    queues: Vec<Queue>,
}

impl Drop for Frontend {
    /// A process that another test is starting may hold copies of all descriptors until it is executed, so closing alone
    /// would not end the connection at once.
    fn drop(&mut self) {
        // One that is broken already needs no end.
        let _ = self.hang_up.shutdown(std::net::Shutdown::Both);
    }
}

impl Frontend {
    /// The negotiated features.
    #[must_use]
    pub fn features(&self) -> u64 {
        self.features
    }

    /// The negotiated protocol features.
    #[must_use]
    pub fn protocol_features(&self) -> VhostUserProtocolFeatures {
        self.protocol
    }

    /// Entries of each queue.
    #[must_use]
    pub fn queue_size(&self) -> u16 {
        self.queue_size
    }

    /// The driver's memory, for a thread that changes it behind the device's back.
    #[must_use]
    pub fn memory(&self) -> GuestMemoryMmap {
        self.memory.clone()
    }

    /// The connection itself, for messages that this driver has no call for.
    pub fn connection(&mut self) -> &mut Connection {
        &mut self.connection
    }

    /// Reads the configuration space.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn config(&mut self, offset: u32, length: u32) -> Result<Vec<u8>> {
        let buffer = vec![0; length as usize];
        let (_, bytes) = self
            .connection
            .get_config(offset, length, VhostUserConfigFlags::empty(), &buffer)
            .with_context(|| format!("GET_CONFIG of {length} bytes at {offset}"))?;
        Ok(bytes)
    }

    /// Size of the disk in sectors of 512 bytes, from the configuration space.
    ///
    /// # Errors
    /// When the back end refuses.
    pub fn capacity(&mut self) -> Result<u64> {
        let bytes = self.config(0, 8)?;
        let bytes = bytes
            .try_into()
            .map_err(|found| anyhow::anyhow!("expected 8 bytes of capacity, found {found:?}"))?;
        Ok(u64::from_le_bytes(bytes))
    }

    /// Reads `length` bytes from `sector`.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn read(&mut self, queue: usize, sector: u64, length: u32) -> Result<(Status, Vec<u8>)> {
        let (status, used) = self.request(queue, request::IN, sector, &vec![0; length as usize], true)?;
        let mut bytes = vec![0; length as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(OWN_DATA))?;
        if status == Status::Ok && used.length != length + 1 {
            bail!("a read of {length} bytes says that {} were written, expected {}", used.length, length + 1);
        }
        Ok((status, bytes))
    }

    /// Writes `data` at `sector`.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn write(&mut self, queue: usize, sector: u64, data: &[u8]) -> Result<Status> {
        Ok(self.request(queue, request::OUT, sector, data, false)?.0)
    }

    /// Flushes.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn flush(&mut self, queue: usize) -> Result<Status> {
        Ok(self.request(queue, request::FLUSH, 0, &[], false)?.0)
    }

    /// Discards `sectors` from `sector`.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn discard(&mut self, queue: usize, sector: u64, sectors: u32) -> Result<Status> {
        Ok(self.request(queue, request::DISCARD, 0, &range(sector, sectors, 0), false)?.0)
    }

    /// Writes zeroes over `sectors` from `sector`; with `unmap`, the device may deallocate them.
    ///
    /// # Errors
    /// When there is no answer.
    pub fn write_zeroes(&mut self, queue: usize, sector: u64, sectors: u32, unmap: bool) -> Result<Status> {
        Ok(self.request(queue, request::WRITE_ZEROES, 0, &range(sector, sectors, u32::from(unmap)), false)?.0)
    }

    /// The serial.
    ///
    /// # Errors
    /// When there is no answer or the device has none.
    pub fn serial(&mut self) -> Result<String> {
        let (status, _) = self.request(0, request::GET_ID, 0, &[0; 20], true)?;
        if status != Status::Ok {
            bail!("the device answered {status:?} when asked for its serial");
        }
        let mut bytes = [0; 20];
        self.memory.read_slice(&mut bytes, GuestAddress(OWN_DATA))?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    /// One well-formed request of header, data and status; returns how it ended.
    ///
    /// # Errors
    /// When there is no answer, or one to something else.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: &[u8],
        device_writes: bool,
    ) -> Result<(Status, Used)> {
        if data.len() as u64 > MAX_OWN_DATA {
            bail!("{} bytes do not fit into the driver's buffer of {MAX_OWN_DATA}", data.len());
        }
        self.put(OWN_HEADER, &header(kind, sector))?;
        self.put(OWN_DATA, data)?;
        self.put(OWN_STATUS, &[NO_STATUS])?;
        let data_flags = flag::NEXT | if device_writes { flag::WRITE } else { 0 };
        let length = u32::try_from(data.len())?;
        let mut chain = vec![Descriptor { address: OWN_HEADER, length: 16, flags: flag::NEXT, next: 1 }];
        if length > 0 {
            chain.push(Descriptor { address: OWN_DATA, length, flags: data_flags, next: 2 });
        }
        chain.push(Descriptor { address: OWN_STATUS, length: 1, flags: flag::WRITE, next: 0 });
        self.put_chain(queue, 0, &chain)?;
        self.publish(queue, 0)?;
        let Some(used) = self.wait_used(queue, REQUEST_LIMIT)? else {
            bail!("no answer to request type {kind} at sector {sector} within {REQUEST_LIMIT:?}");
        };
        if used.head != 0 {
            bail!("the device answered chain {}, expected chain 0", used.head);
        }
        let mut status = [0];
        self.memory.read_slice(&mut status, GuestAddress(OWN_STATUS))?;
        Ok((Status::from(status[0]), used))
    }

    /// Writes bytes anywhere into the driver's memory.
    ///
    /// # Errors
    /// When the address is outside of it.
    pub fn put(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.memory
            .write_slice(bytes, GuestAddress(address))
            .with_context(|| format!("writing at {address:#x}"))
    }

    /// Reads bytes from anywhere in the driver's memory.
    ///
    /// # Errors
    /// When the address is outside of it.
    pub fn get(&self, address: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.memory
            .read_slice(&mut bytes, GuestAddress(address))
            .with_context(|| format!("reading at {address:#x}"))?;
        Ok(bytes)
    }

    /// Writes consecutive entries of the descriptor table, from `first` on, as they are.
    ///
    /// # Errors
    /// When they are outside of the driver's memory.
    pub fn put_chain(&self, queue: usize, first: u16, chain: &[Descriptor]) -> Result<()> {
        for (entry, descriptor) in (u64::from(first)..).zip(chain) {
            self.put(ring(queue) + entry * 16, &descriptor.to_bytes())?;
        }
        Ok(())
    }

    /// Makes the chain at `head` available and kicks.
    ///
    /// # Errors
    /// When the kick fails.
    pub fn publish(&mut self, queue: usize, head: u16) -> Result<()> {
        let next = self.queues[queue].next_avail;
        self.put_avail(queue, next % self.queue_size, head)?;
        self.queues[queue].next_avail = next.wrapping_add(1);
        self.set_avail_index(queue, next.wrapping_add(1))?;
        self.kick(queue)
    }

    /// Writes one entry of the available ring, as it is.
    ///
    /// # Errors
    /// When it is outside of the driver's memory.
    pub fn put_avail(&self, queue: usize, entry: u16, head: u16) -> Result<()> {
        self.put(ring(queue) + AVAIL_OFFSET + 4 + u64::from(entry) * 2, &head.to_le_bytes())
    }

    /// Writes the index of the available ring, as it is.
    ///
    /// # Errors
    /// Never for a queue that exists.
    pub fn set_avail_index(&self, queue: usize, index: u16) -> Result<()> {
        let address = GuestAddress(ring(queue) + AVAIL_OFFSET + 2);
        self.memory.store(index.to_le(), address, Ordering::Release).context("writing the available index")
    }

    /// The index of the available ring that the next request would have.
    #[must_use]
    pub fn avail_index(&self, queue: usize) -> u16 {
        self.queues[queue].next_avail
    }

    /// Kicks.
    ///
    /// # Errors
    /// When the eventfd refuses.
    pub fn kick(&self, queue: usize) -> Result<()> {
        self.queues[queue].kick.write(1).context("kicking")
    }

    /// Waits for the next entry of the used ring; `None` when there is none within `limit`.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub fn wait_used(&mut self, queue: usize, limit: Duration) -> Result<Option<Used>> {
        let started = Instant::now();
        let base = ring(queue) + USED_OFFSET;
        loop {
            let index: u16 = self.memory.load(GuestAddress(base + 2), Ordering::Acquire)?;
            let next = self.queues[queue].next_used;
            if u16::from_le(index) != next {
                self.queues[queue].next_used = next.wrapping_add(1);
                let entry = self.get(base + 4 + u64::from(next % self.queue_size) * 8, 8)?;
                let word =
                    |at: usize| u32::from_le_bytes([entry[at], entry[at + 1], entry[at + 2], entry[at + 3]]);
                return Ok(Some(Used { head: word(0), length: word(4) }));
            }
            if started.elapsed() > limit {
                return Ok(None);
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// How many times the device has called since this was last asked.
    ///
    /// # Errors
    /// When the eventfd fails.
    pub fn calls(&self, queue: usize) -> Result<u64> {
        drain(&self.queues[queue].call)
    }

    /// Whether the device has signalled an error of this queue since this was last asked.
    ///
    /// # Errors
    /// When the eventfd fails.
    pub fn error_signalled(&self, queue: usize) -> Result<bool> {
        Ok(drain(&self.queues[queue].error)? > 0)
    }

    /// Whether the back end has closed the connection.
    #[must_use]
    pub fn is_hung_up(&self) -> bool {
        let mut probe = [0];
        let _ = self.hang_up.set_nonblocking(true);
        // Nothing is ever sent without a request, so the only thing to read is the end.
        let ended = matches!(io::Read::read(&mut &self.hang_up, &mut probe), Ok(0));
        let _ = self.hang_up.set_nonblocking(false);
        ended
    }

    /// Stops a queue, waiting for what is in flight, and returns its index as GET_VRING_BASE does.
    ///
    /// # Errors
    /// When the back end does not answer.
    pub fn stop_queue(&mut self, queue: usize) -> Result<u32> {
        self.connection.get_vring_base(queue).context("GET_VRING_BASE")
    }

    fn start_queue(&mut self, index: usize) -> Result<()> {
        let base = ring(index);
        let (kick, call, error) =
            (EventFd::new(0)?, EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?);
        let host = |address: u64| -> Result<u64> {
            Ok(self.memory.get_host_address(GuestAddress(address)).context("the rings are in memory")? as u64)
        };
        let addresses = VringConfigData {
            queue_max_size: self.queue_size,
            queue_size: self.queue_size,
            flags: 0,
            desc_table_addr: host(base)?,
            used_ring_addr: host(base + USED_OFFSET)?,
            avail_ring_addr: host(base + AVAIL_OFFSET)?,
            log_addr: None,
        };
        let connection = &mut self.connection;
        connection.set_vring_num(index, self.queue_size).context("SET_VRING_NUM")?;
        connection.set_vring_base(index, 0).context("SET_VRING_BASE")?;
        connection.set_vring_addr(index, &addresses).context("SET_VRING_ADDR")?;
        connection.set_vring_call(index, &call).context("SET_VRING_CALL")?;
        connection.set_vring_err(index, &error).context("SET_VRING_ERR")?;
        connection.set_vring_kick(index, &kick).context("SET_VRING_KICK")?;
        connection.set_vring_enable(index, true).context("SET_VRING_ENABLE")?;
        self.queues.push(Queue { kick, call, error, next_avail: 0, next_used: 0 });
        Ok(())
    }
}

/// The header of a request.
#[must_use]
pub fn header(kind: u32, sector: u64) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&kind.to_le_bytes());
    bytes[8..].copy_from_slice(&sector.to_le_bytes());
    bytes
}

/// The payload of a discard or write-zeroes request with one range.
#[must_use]
pub fn range(sector: u64, sectors: u32, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&sectors.to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Where the descriptor table of a queue is; its other rings follow.
fn ring(queue: usize) -> u64 {
    MEMORY_START + queue as u64 * RING_STRIDE
}

fn drain(event: &EventFd) -> Result<u64> {
    match event.read() {
        Ok(count) => Ok(count),
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
        Err(error) => Err(error).context("reading an eventfd"),
    }
}
