//! A guest that keeps requests in flight whatever happens to its daemon, and notes when it was kept waiting. Its front end
//! connects again as QEMU does: the rings go on from the used index, with the inflight region of the daemon before.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserInflight, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::ring::{Piece, Ring, RingPlace};
use super::sys::{self, SharedMemory};
use crate::lab::frontend::feature;

/// Most requests that the guest keeps in flight.
pub const MAX_DEPTH: u32 = 32;
const BLOCK: u32 = 4096;
const SECTOR: u64 = 512;
const QUEUE_SIZE: u16 = 128;
/// Header, data, status.
const PIECES: u16 = 3;
/// Where guest memory begins for the device.
const GUEST_BASE: u64 = 0x4000_0000;
const AVAILABLE: usize = 4096;
const USED: usize = 8192;
const CONTROL: usize = 16 << 10;
const CONTROL_BYTES: usize = 64;
const STATUS_AT: usize = 16;
const BUFFERS: usize = 64 << 10;
const MEMORY: usize = BUFFERS + MAX_DEPTH as usize * BLOCK as usize;
/// Between two attempts to connect to a daemon that is not there.
const RECONNECT: Duration = Duration::from_millis(10);
/// Longest wait for an answer on the control socket.
const CONTROL_LIMIT: Duration = Duration::from_secs(20);
/// A guest that gets no completion for so long is given up.
const STALLED: Duration = Duration::from_secs(30);
/// Waits shorter than this are not kept: nobody asks for them, and they are many.
const NOTED: Duration = Duration::from_micros(200);

/// What the guest does and what it met, seen from other threads.
#[derive(Debug)]
pub struct Watch {
    /// Set to end the guest.
    pub stop: AtomicBool,
    /// Requests that it keeps in flight, 1 to [`MAX_DEPTH`].
    pub depth: AtomicU32,
    /// Times without any completion, by their ends.
    gaps: Mutex<Vec<(Instant, Instant)>>,
}

impl Default for Watch {
    fn default() -> Self {
        Self { stop: AtomicBool::new(false), depth: AtomicU32::new(1), gaps: Mutex::default() }
    }
}

impl Watch {
    /// The longest time without a completion that touches the time from `begin` to `end`. Earlier ones are forgotten.
    pub fn longest_gap(&self, begin: Instant, end: Instant) -> Duration {
        let mut gaps = self.gaps.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let touching = gaps.iter().filter(|(from, to)| *from <= end && *to >= begin);
        let longest = touching.map(|(from, to)| *to - *from).max().unwrap_or_default();
        gaps.retain(|(_, to)| *to >= end);
        longest
    }

    fn note(&self, from: Instant, to: Instant) {
        if to - from >= NOTED {
            self.gaps.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push((from, to));
        }
    }
}

/// Runs a guest on the daemon at `socket` until [`Watch::stop`]: random reads and writes of 4 KiB, three in ten reads.
///
/// # Errors
/// When a request fails, the device breaks the rules of the ring, or nothing completes for half a minute.
pub fn run(socket: &Path, watch: &Watch, seed: u64) -> Result<u64> {
    sys::sleep_precisely();
    let mut guest = Guest::new(socket, seed)?;
    let mut last = Instant::now();
    while !watch.stop.load(Ordering::Relaxed) || guest.in_flight > 0 {
        guest.stay_connected()?;
        if !watch.stop.load(Ordering::Relaxed) {
            guest.fill_up(watch.depth.load(Ordering::Relaxed).clamp(1, MAX_DEPTH))?;
        }
        let completed = guest.reap()?;
        let now = Instant::now();
        if completed > 0 {
            watch.note(last, now);
            last = now;
        } else {
            ensure!(last.elapsed() < STALLED, "no completion for {STALLED:?}");
            guest.sleep()?;
        }
    }
    Ok(guest.completed)
}

struct Guest {
    socket: PathBuf,
    memory: SharedMemory,
    ring: Ring,
    kick: EventFd,
    call: EventFd,
    session: Option<Session>,
    inflight: Option<(VhostUserInflight, std::fs::File)>,
    sectors: u64,
    random: SmallRng,
    free: Vec<u16>,
    in_flight: u32,
    completed: u64,
    ready: Vec<bool>,
}

/// One connection to a daemon.
struct Session {
    connection: Frontend,
    hang_up: UnixStream,
}

impl Guest {
    fn new(socket: &Path, seed: u64) -> Result<Self> {
        let memory = SharedMemory::new(MEMORY).context("allocating the guest's memory")?;
        let place = RingPlace { descriptors: 0, available: AVAILABLE, used: USED, size: QUEUE_SIZE };
        Ok(Self {
            socket: socket.to_owned(),
            memory,
            ring: Ring::new(place, true),
            kick: EventFd::new(0)?,
            call: EventFd::new(EFD_NONBLOCK)?,
            session: None,
            inflight: None,
            sectors: 0,
            random: SmallRng::seed_from_u64(seed),
            free: (0..u16::try_from(MAX_DEPTH)?).rev().collect(),
            in_flight: 0,
            completed: 0,
            ready: Vec::new(),
        })
    }

    /// Connects if there is no connection. A daemon that is not there yet is no error.
    fn stay_connected(&mut self) -> Result<()> {
        let begin = Instant::now();
        while self.session.is_none() {
            match self.connect() {
                Ok(session) => self.session = Some(session),
                // Killed in the middle of it, or not there yet: both pass.
                Err(error) if begin.elapsed() > STALLED => return Err(error),
                Err(_) => std::thread::sleep(RECONNECT),
            }
        }
        Ok(())
    }

    fn connect(&mut self) -> Result<Session> {
        let stream = UnixStream::connect(&self.socket)?;
        stream.set_read_timeout(Some(CONTROL_LIMIT))?;
        let hang_up = stream.try_clone()?;
        let mut connection = Frontend::from_stream(stream, 1);
        let offered = connection.get_features()?;
        let offered_protocol = connection.get_protocol_features()?;
        let protocol = offered_protocol
            & (VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::INFLIGHT_SHMFD);
        ensure!(protocol.contains(VhostUserProtocolFeatures::INFLIGHT_SHMFD), "no inflight tracking");
        connection.set_protocol_features(protocol)?;
        connection.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        connection.set_owner()?;
        let wanted = feature::VERSION_1 | feature::PROTOCOL | feature::EVENT_IDX | feature::FLUSH;
        connection.set_features(offered & wanted)?;
        if self.sectors == 0 {
            self.sectors = capacity_of(&mut connection)?;
        }
        if self.inflight.is_none() {
            self.inflight = Some(connection.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, QUEUE_SIZE))?);
        }
        if let Some((region, file)) = &self.inflight {
            connection.set_inflight_fd(region, file.as_raw_fd())?;
        }
        self.start(&mut connection)?;
        Ok(Session { connection, hang_up })
    }

    fn start(&self, connection: &mut Frontend) -> Result<()> {
        let base = u64::try_from(self.memory.address())?;
        let region = VhostUserMemoryRegionInfo {
            guest_phys_addr: GUEST_BASE,
            memory_size: u64::try_from(self.memory.length())?,
            userspace_addr: base,
            mmap_offset: 0,
            mmap_handle: self.memory.descriptor(),
        };
        connection.set_mem_table(&[region])?;
        connection.set_vring_num(0, QUEUE_SIZE)?;
        // QEMU, when it lost the daemon before: what was popped and not completed is the inflight region's to tell.
        let used = u16::from_le(self.memory.atomic_u16(USED + 2).load(Ordering::Acquire));
        connection.set_vring_base(0, used)?;
        connection.set_vring_addr(
            0,
            &VringConfigData {
                queue_max_size: QUEUE_SIZE,
                queue_size: QUEUE_SIZE,
                flags: 0,
                desc_table_addr: base,
                used_ring_addr: base + u64::try_from(USED)?,
                avail_ring_addr: base + u64::try_from(AVAILABLE)?,
                log_addr: None,
            },
        )?;
        connection.set_vring_call(0, &self.call)?;
        connection.set_vring_kick(0, &self.kick)?;
        connection.set_vring_enable(0, true)?;
        Ok(())
    }

    /// Issues requests until `depth` are in flight.
    fn fill_up(&mut self, depth: u32) -> Result<()> {
        while self.in_flight < depth {
            let Some(slot) = self.free.pop() else { break };
            let is_read = self.random.random_ratio(3, 10);
            let block = self.random.random_range(0..self.sectors * SECTOR / u64::from(BLOCK));
            let control = CONTROL + usize::from(slot) * CONTROL_BYTES;
            let mut header = [0; 16];
            header[..4].copy_from_slice(&u32::from(!is_read).to_le_bytes());
            header[8..].copy_from_slice(&(block * u64::from(BLOCK) / SECTOR).to_le_bytes());
            self.memory.write(control, &header);
            self.memory.write(control + STATUS_AT, &[0xff]);
            let address = |at: usize| GUEST_BASE + at as u64;
            let buffer = BUFFERS + usize::from(slot) * usize::try_from(BLOCK)?;
            let pieces = [
                Piece { address: address(control), length: 16, device_writes: false },
                Piece { address: address(buffer), length: BLOCK, device_writes: is_read },
                Piece { address: address(control + STATUS_AT), length: 1, device_writes: true },
            ];
            self.ring.write_chain(&self.memory, slot * PIECES, &pieces);
            self.ring.publish(&self.memory, slot * PIECES);
            self.in_flight += 1;
        }
        if self.ring.kick_is_due(&self.memory) {
            self.kick.write(1).context("kicking")?;
        }
        Ok(())
    }

    fn reap(&mut self) -> Result<u32> {
        let mut count = 0;
        while let Some(head) = self.ring.take_used(&self.memory) {
            let slot = u16::try_from(head)? / PIECES;
            let is_known = head.is_multiple_of(PIECES.into()) && u32::from(slot) < MAX_DEPTH;
            ensure!(is_known && !self.free.contains(&slot), "the device completed descriptor {head}");
            let status = self.memory.read_byte(CONTROL + usize::from(slot) * CONTROL_BYTES + STATUS_AT);
            ensure!(status == 0, "a request ended with status {status}");
            self.free.push(slot);
            self.in_flight -= 1;
            count += 1;
        }
        self.completed += u64::from(count);
        Ok(count)
    }

    /// Sleeps until something completes or the daemon goes.
    fn sleep(&mut self) -> Result<()> {
        let Some(session) = &self.session else { return Ok(()) };
        if self.ring.arm(&self.memory) {
            return Ok(());
        }
        let descriptors: [RawFd; 2] = [self.call.as_raw_fd(), session.hang_up.as_raw_fd()];
        sys::wait_readable(&descriptors, &mut self.ready, Duration::from_millis(100))?;
        if self.ready.first() == Some(&true) {
            // Empty when another signal was read with it.
            let _ = self.call.read();
        }
        if self.ready.get(1) == Some(&true) {
            let mut probe = [0];
            session.hang_up.set_nonblocking(true)?;
            match io::Read::read(&mut &session.hang_up, &mut probe) {
                Ok(0) => self.session = None,
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => self.session = None,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                other => bail!("the daemon said something unasked: {other:?}"),
            }
        }
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(session) = &mut self.session {
            // The daemon lets go of the memory when the ring has stopped; one that died has done so.
            let _ = session.connection.get_vring_base(0);
        }
    }
}

fn capacity_of(connection: &mut Frontend) -> Result<u64> {
    use vhost::vhost_user::message::VhostUserConfigFlags;
    let (_, bytes) = connection.get_config(0, 8, VhostUserConfigFlags::empty(), &[0; 8])?;
    let bytes: [u8; 8] =
        bytes.try_into().map_err(|found| anyhow::anyhow!("expected 8 bytes of capacity, found {found:?}"))?;
    Ok(u64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_gap_of_a_time_is_found_and_older_ones_are_forgotten() {
        let watch = Watch::default();
        let zero = Instant::now();
        let at = |ms| zero + Duration::from_millis(ms);
        for (from, to) in [(0, 50), (60, 70), (100, 130), (200, 290)] {
            watch.note(at(from), at(to));
        }
        assert_eq!(watch.longest_gap(at(60), at(120)), Duration::from_millis(30));
        assert_eq!(watch.longest_gap(at(0), at(60)), Duration::ZERO);
        assert_eq!(watch.longest_gap(at(250), at(260)), Duration::from_millis(90));
    }
}
