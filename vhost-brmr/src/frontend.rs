//! The vhost-user side of a session: what the front end configures, message by message, checked and kept.
//!
//! This stands on the `vhost` crate's [`BackendReqHandler`](vhost::vhost_user::BackendReqHandler) and not on the daemon
//! of `vhost-user-backend`, because that daemon answers the inflight messages with an error, cannot tell the front end
//! of a configuration change, swaps memory before its users are told, and sleeps in an epoll loop of its own that
//! leaves no room for a disk's descriptors or for polling. Its vring type is used (see [`crate::queue`]).
//!
//! A message never blocks. Those that must wait for requests in flight (see [`Drain`]) are not even read from the
//! socket before the event loop has seen these requests complete.

use std::fs::File;
use std::os::fd::{OwnedFd, RawFd};

use tracing::{info, warn};
use vhost::vhost_user::message::{
    BackendReq, FrontendReq, VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags,
    VhostUserInflight, VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig,
    VhostUserSharedMsg, VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};

use crate::device::Device;
use crate::dirty_log::{LogError, LogMap};
use crate::inflight::Inflight;
use crate::memory::{MAX_REGIONS, MemoryTable};
use crate::queue::{Fault, Phase, Ring, RingError};
use crate::request::ID_LENGTH;
use crate::sys;

/// What a log that is too small leaves out, for the error.
const LOGGED_RING: &str = "a used ring";

/// A base in the address space of this process, which is of use to postcopy only.
type Base = u64;

/// Which requests must have completed before a message may be answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Drain {
    /// None.
    Nothing,
    /// Those of one ring.
    Ring(usize),
    /// All.
    Everything,
}

impl Drain {
    /// What the message of this code needs; `index` and `value` are the two 32-bit words its payload begins with.
    ///
    /// Disabling a ring drains it too: a front end without the DEVICE_STATE messages pauses a guest that way and then
    /// expects its memory to stay as it is.
    #[must_use]
    pub fn needed(code: u32, index: u32, value: u32) -> Self {
        match FrontendReq::try_from(code) {
            Ok(FrontendReq::GET_VRING_BASE) => Self::Ring(index as usize),
            Ok(FrontendReq::SET_VRING_ENABLE) if value == 0 => Self::Ring(index as usize),
            Ok(
                FrontendReq::SET_MEM_TABLE
                | FrontendReq::REM_MEM_REG
                | FrontendReq::RESET_DEVICE
                | FrontendReq::RESET_OWNER,
            ) => Self::Everything,
            _ => Self::Nothing,
        }
    }
}

/// Whether a refusal of this message is acknowledged to a front end that asks for acknowledgements. Messages with an
/// answer of their own get none when they fail, and the front end would wait for ever.
#[must_use]
pub fn is_acknowledged(code: u32) -> bool {
    let answers = [FrontendReq::GET_VRING_BASE, FrontendReq::GET_INFLIGHT_FD, FrontendReq::SET_LOG_BASE];
    !FrontendReq::try_from(code).is_ok_and(|code| answers.contains(&code))
}

/// A change of the kick descriptors that the loop watches.
#[derive(Debug)]
pub enum KickChange {
    /// Watch this one for the ring.
    Add(RawFd, usize),
    /// Stop watching this one, then close it.
    Remove(File),
}

/// One front end's session, from its connection to its end, and the device it talks to.
#[derive(Debug)]
pub struct Session {
    /// The device.
    pub device: Device,
    /// Guest memory.
    pub memory: MemoryTable,
    /// The rings; as many as are offered.
    pub rings: Vec<Ring>,
    /// Rings to look at.
    pub kicked: Vec<bool>,
    /// What GET_ID returns.
    pub identification: [u8; ID_LENGTH],
    /// Where requests in flight are noted for the next daemon, if the front end wants that.
    pub inflight: Option<Inflight>,
    kick_changes: Vec<KickChange>,
    incarnations: u32,
    protocol_features: u64,
    announced: bool,
    /// The channel on which this side speaks first, a socket as far as the front end keeps to the rules.
    channel: Option<OwnedFd>,
    /// The size that the front end knows of, as far as can be told.
    told_size: Option<u64>,
    /// The guest has reset the device, and the disk was not told.
    was_reset: bool,
    /// Some ring ran when that was looked at last.
    ran: bool,
    /// Where each ring stood when it was stopped last, also by an earlier front end.
    stopped_at: Vec<u16>,
}

impl Session {
    /// A device that no front end talks to yet.
    ///
    /// # Errors
    /// When the queue size is no power of two.
    pub fn new(device: Device) -> std::result::Result<Self, RingError> {
        let mut memory = MemoryTable::default();
        let handle = memory.handle();
        let queues = usize::from(device.options().queues);
        let rings = (0..queues).map(|_| Ring::new(handle.clone(), device.options().queue_size));
        Ok(Self {
            rings: rings.collect::<std::result::Result<_, _>>()?,
            kicked: vec![false; queues],
            identification: device.identification(),
            device,
            memory,
            inflight: None,
            kick_changes: Vec::new(),
            incarnations: 0,
            protocol_features: 0,
            announced: false,
            channel: None,
            told_size: None,
            was_reset: false,
            ran: false,
            stopped_at: vec![0; queues],
        })
    }

    /// The front end is gone, or about to be: everything that it configured is forgotten. Requests in flight keep their
    /// memory.
    pub fn end(&mut self) {
        self.reset_rings();
        self.device.reset();
        self.memory.log().set(None);
        self.memory.clear();
        self.inflight = None;
        self.protocol_features = 0;
        self.announced = false;
        self.channel = None;
        self.told_size = None;
    }

    /// Leaves the requests in flight to the next daemon, which finds them in the inflight region: no ring takes anything
    /// more, and nobody is told of their end.
    pub fn leave_in_flight(&mut self) {
        for ring in &mut self.rings {
            ring.stop();
        }
        self.ran = false;
    }

    /// Whether the guest has reset the device since this was asked last.
    pub fn take_reset(&mut self) -> bool {
        std::mem::take(&mut self.was_reset)
    }

    /// The front end can be told of changes on this socket.
    pub fn set_channel(&mut self, socket: OwnedFd) {
        self.channel = Some(socket);
    }

    /// The disk has this size now. Requests are checked against it from here on, and the front end is told of it as soon as
    /// the guest runs: before that a front end takes no notice, as it does of a size that it knows already.
    pub fn set_size(&mut self, size: u64) {
        let before = self.device.size();
        if self.device.resize(size) {
            info!(before, size, "the disk has another size");
            if self.channel.is_none() && self.is_running() {
                warn!("the front end has no channel for changes; it sees the new size when it asks again");
            }
        }
        if self.told_size == Some(size) || self.channel.is_none() || !self.is_running() {
            return;
        }
        self.told_size = Some(size);
        // A message without payload: code, flags (version 1, no answer wanted), length.
        let message = [BackendReq::CONFIG_CHANGE_MSG as u32, 1, 0].map(u32::to_ne_bytes).concat();
        // What cannot be sent at once is given up.
        if let Some(Err(error)) = self.channel.as_ref().map(|channel| sys::send_now(channel, &message)) {
            warn!(
                size,
                "the front end cannot be told of the new size, and sees it when it asks again: {error}"
            );
            self.channel = None;
        }
    }

    /// Takes the changes of what is to be watched.
    pub fn take_kick_changes(&mut self) -> Vec<KickChange> {
        std::mem::take(&mut self.kick_changes)
    }

    /// The kick descriptor of a ring cannot be watched.
    pub fn kick_failed(&mut self, queue: usize) {
        self.rings[queue].fail(Fault::Kick);
    }

    /// Some ring is started and enabled.
    #[must_use]
    pub fn is_running(&self) -> bool {
        self.rings.iter().any(Ring::is_running)
    }

    /// Acknowledgements of messages were negotiated.
    #[must_use]
    pub fn has_reply_ack(&self) -> bool {
        self.device.has_protocol_features()
            && self.protocol_features & VhostUserProtocolFeatures::REPLY_ACK.bits() != 0
    }

    /// A dirty log comes as a descriptor.
    #[must_use]
    pub fn takes_logs_by_descriptor(&self) -> bool {
        self.protocol_features & VhostUserProtocolFeatures::LOG_SHMFD.bits() != 0
    }

    /// Stops taking requests from the rings that must be drained.
    pub fn pause(&mut self, drain: Drain, paused: bool) {
        for (queue, ring) in self.rings.iter_mut().enumerate() {
            if drain == Drain::Everything || drain == Drain::Ring(queue) {
                ring.set_paused(paused);
                self.kicked[queue] |= !paused;
            }
        }
    }

    /// How many requests must still complete.
    #[must_use]
    pub fn in_flight(&self, drain: Drain) -> usize {
        let rings = self.rings.iter().enumerate();
        rings
            .filter(|(queue, _)| drain == Drain::Everything || drain == Drain::Ring(*queue))
            .map(|(_, ring)| usize::from(ring.in_flight()))
            .sum()
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let count = self.rings.len();
        let found = usize::try_from(index).ok().and_then(|index| self.rings.get_mut(index));
        found.ok_or_else(|| refused(format!("ring {index} does not exist, expected one of {count}")))
    }

    /// Checks the addresses under which used rings are to be logged; they need not lie in guest memory.
    fn check_used_logs(&self, check: impl Fn(u64) -> std::result::Result<(), LogError>) -> Result<()> {
        self.rings.iter().filter_map(Ring::used_log_end).try_for_each(check).map_err(refused)
    }

    fn start_rings(&mut self) -> Result<()> {
        (0..self.rings.len()).try_for_each(|queue| self.start_ring(queue))
    }

    /// Starts a ring if all it needs is known, and has it looked at: the first kick may be lost.
    fn start_ring(&mut self, queue: usize) -> Result<()> {
        let incarnation = self.incarnations.wrapping_add(1).max(1);
        let event_idx = self.device.has_event_idx();
        let ring = &mut self.rings[queue];
        let was_stopped = ring.phase() == Phase::Stopped;
        if !self.device.has_protocol_features() {
            ring.set_enabled(true);
        }
        let started = ring.try_start(
            self.memory.snapshot(),
            event_idx,
            incarnation,
            self.inflight.as_ref().map(|inflight| (inflight, queue)),
        );
        let started = started.map_err(|error| refused(format!("ring {queue}: {error}")))?;
        if started && was_stopped {
            self.incarnations = incarnation;
        }
        self.kicked[queue] |= started;
        // A guest that goes on after a pause goes on where its rings were; after a reset they all begin anew. Where all of them stood
        // at their beginning it may be either, and is taken for a pause: a reset makes good what must not be forgotten by mistake.
        let runs = self.is_running();
        let begins_anew = self.rings.iter().all(|ring| ring.base() == 0);
        let had_begun = self.stopped_at.iter().any(|index| *index != 0);
        self.was_reset |= runs && !self.ran && begins_anew && had_begun;
        self.ran = runs;
        if self.is_running() && !self.announced {
            self.announced = true;
            let protocol = VhostUserProtocolFeatures::from_bits_truncate(self.protocol_features);
            let flags: Vec<_> = protocol.iter_names().map(|(name, _)| name).collect();
            info!("guest started; negotiated {}; vhost-user {}", self.device, flags.join(", "));
            if self.device.is_cache_unknown() {
                warn!(
                    "the guest negotiated with an earlier daemon that it may turn the write cache off (config-wce), and whether it did \
                     is not known: every write is flushed, which is safe and slow; stop the virtual machine and start it again to \
                     end that"
                );
            }
        }
        Ok(())
    }

    fn reset_rings(&mut self) {
        self.ran = false;
        let rings = self.rings.iter_mut().zip(&mut self.kicked).zip(&mut self.stopped_at);
        for ((ring, kicked), stopped_at) in rings {
            *kicked = false;
            if ring.phase() != Phase::Stopped {
                *stopped_at = ring.base();
            }
            if let Some(kick) = ring.reset() {
                self.kick_changes.push(KickChange::Remove(kick));
            }
        }
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.was_reset = true;
        self.reset_rings();
        self.device.reset();
        self.memory.log().set(None);
        self.inflight = None;
        self.announced = false;
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    /// Also while the rings run: logging begins and ends so, and changes nothing else.
    fn set_features(&mut self, features: u64) -> Result<()> {
        let logged = self.device.has_log_all();
        self.device.acknowledge(features).map_err(refused)?;
        let logs = self.device.has_log_all();
        if logs != logged {
            info!(logs, "the front end has changed whether pages written to the guest are logged");
        }
        if logs {
            // A front end that starts a device in mid-migration sends the log after this, and enables rings after that.
            self.memory.log().activate(true);
        } else if logged {
            // The next migration brings a log of its own; this one would be too small for memory added until then.
            self.memory.log().set(None);
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<Base>>> {
        self.memory.replace(regions, &files).map_err(refused)?;
        self.start_rings()?;
        Ok(None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        self.ring(index)?.set_size(num).map_err(|error| {
            refused(format!(
                "ring {index}: {error}; the guest cannot use this disk until the hypervisor's queue size is lowered, or --queue-size \
                 raised"
            ))
        })
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        log: u64,
    ) -> Result<()> {
        let translate = |part, address| {
            let error = RingError::Address { part, address };
            self.memory.guest_address(address).ok_or_else(|| refused(format!("ring {index}: {error}")))
        };
        let descriptors = translate("descriptor table", descriptor)?;
        let avail = translate("avail ring", available)?;
        let used = translate("used ring", used)?;
        self.ring(index)?.set_addresses(descriptors, avail, used).map_err(refused)?;
        let is_logged = flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG);
        self.ring(index)?.set_used_log(is_logged.then_some(log));
        if let Err(error) = self.check_used_logs(|end| self.memory.log().check(LOGGED_RING, end)) {
            self.ring(index)?.set_used_log(None);
            return Err(error);
        }
        self.start_ring(index as usize)
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        self.ring(index)?.set_base(base).map_err(refused)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let ring = self.ring(index)?;
        let left = ring.in_flight();
        let was_stopped = ring.phase() == Phase::Stopped;
        let base = ring.stop();
        let kick = ring.set_kick(None);
        ring.clear_call();
        if !was_stopped {
            self.stopped_at[index as usize] = base;
        }
        self.ran = self.is_running();
        self.kick_changes.extend(kick.map(KickChange::Remove));
        if left > 0 {
            warn!(queue = index, left, "ring stopped with requests that the disk did not answer in time");
        }
        Ok(VhostUserVringState::new(index, base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let queue = usize::from(index);
        let fd = eventfd("kick", fd)?;
        let ring = self.ring(index.into())?;
        if fd.is_none() {
            return Err(refused(RingError::NoKick));
        }
        let old = ring.set_kick(fd);
        let new = ring.kick();
        self.kick_changes.extend(old.map(KickChange::Remove));
        self.kick_changes.extend(new.map(|fd| KickChange::Add(fd, queue)));
        let started = self.start_ring(queue);
        if started.is_err() {
            // The kick is refused with its message, or the next message about this ring would try to start it again.
            let kick = self.rings[queue].set_kick(None);
            self.kick_changes.extend(kick.map(KickChange::Remove));
        }
        started
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = eventfd("call", fd)?;
        let ring = self.ring(index.into())?;
        if let Err(fault) = ring.set_call(fd) {
            ring.clear_call();
            return Err(refused(fault));
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let fd = eventfd("err", fd)?;
        self.ring(index.into())?.set_error(fd);
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(Device::protocol_features())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = Device::protocol_features().bits();
        if features & !offered != 0 {
            return Err(refused(format!(
                "protocol features {features:#x}, expected only bits of the {offered:#x} offered"
            )));
        }
        self.protocol_features = features;
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.ring(index)?.set_enabled(enable);
        self.start_ring(index as usize)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if offset == 0 && size >= 8 {
            self.told_size = Some(self.device.size());
        }
        Ok(self.device.read_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(offset, bytes).map_err(refused)
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        Err(Error::InvalidOperation("a disk has no display"))
    }

    fn get_shared_object(&mut self, _object: VhostUserSharedMsg) -> Result<File> {
        Err(Error::InvalidOperation("a disk shares no objects"))
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let VhostUserInflight { num_queues: queues, queue_size: size, .. } = *inflight;
        let options = self.device.options();
        let (most, largest) = (options.queues, options.queue_size);
        if queues > most || size > largest {
            return Err(refused(format!(
                "inflight region for {queues} queues of {size}, expected at most {most} of {largest}"
            )));
        }
        Inflight::create(queues, size).map_err(refused)
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        if self.rings.iter().any(|ring| ring.phase() == Phase::Started) {
            return Err(refused(RingError::Running));
        }
        self.inflight = Some(Inflight::map(inflight, &file).map_err(refused)?);
        Ok(())
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<Base>> {
        self.memory.add(region, &file).map_err(refused)?;
        self.start_rings()?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        self.memory.remove(region).map_err(refused)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        Err(Error::InvalidOperation("transfer of device state was not offered"))
    }

    fn check_device_state(&mut self) -> Result<()> {
        Err(Error::InvalidOperation("transfer of device state was not offered"))
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(Error::InvalidOperation("a disk has no shared memory regions"))
    }

    /// Comes once with each migration, and again when guest memory grows meanwhile. Its answer has no room for a refusal, so that
    /// one ends the session (see [`is_acknowledged`]).
    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let map = LogMap::new(log, &file).map_err(refused)?;
        self.check_used_logs(|end| map.check(LOGGED_RING, end))?;
        self.memory.set_log(map).map_err(refused)?;
        self.memory.log().activate(self.device.has_log_all());
        Ok(())
    }
}

/// A descriptor for notifications, if it is what all front ends of today send: one of another kind may let whoever uses it wait.
fn eventfd(what: &'static str, file: Option<File>) -> Result<Option<File>> {
    match file {
        Some(file) if !sys::is_eventfd(&file) => Err(refused(RingError::NoEventfd(what))),
        file => Ok(file),
    }
}

/// Our own refusals, told apart from a broken stream by this variant: the session goes on after them.
fn refused(reason: impl ToString) -> Error {
    Error::ReqHandlerError(std::io::Error::other(reason.to_string()))
}
