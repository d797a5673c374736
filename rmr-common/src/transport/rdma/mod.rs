//! RDMA: data goes by the network card straight between guest memory and the slots of a node, over reliable connections.
//!
//! A [`Fabric`] is what all connections of a process share: devices, and memory that is registered with them.
//! `docs/rdma.md` tells how to set it up, `docs/protocol.md` what goes over the wire.
//!
//! * `verbs` — rdma-core as owned types; all the `unsafe` of it.
//! * `endpoint` — what a connection needs of that, as a trait, so that tests can play the card.
//! * `trial` — whether a card keeps to what memory windows promise.
//! * `link` — one connection: credits, slots, posted work. `packet` — what it sends.

mod endpoint;
mod fabric;
mod link;
mod memory;
mod packet;
mod slots;
mod trial;
mod verbs;

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, RawFd};
use std::time::Duration;

use thiserror::Error;

pub use fabric::{Fabric, Registration};

use self::endpoint::QueueSizes;
use self::fabric::Keyring;
use self::link::{Link, Role};
use self::packet::Introduction;
pub use self::trial::try_key;
pub use super::rdma_terms::{
    Exposure, KeyOutcome, KeyUse, MAX_IO, MAX_WINDOW, MAX_WINDOWS, MIN_WINDOW, ReadMode,
};
use super::{Connection, ConnectionError, Counters, Receiver};
use crate::buffer::Segment;
use crate::wire::MessageHeader;

/// Size of a receive buffer in bytes: a read with its targets fits.
const RECEIVE_SIZE: u32 = 4096;
/// Receive buffers of a connection that was opened here: 512 KiB.
const OPENER_RECEIVES: u32 = 128;
/// Receive buffers promised to each connection that was accepted: 256 KiB, which connections share.
const ACCEPTOR_RECEIVES: u32 = 64;
/// Most receive buffers that accepted connections share on a device: 16 MiB.
const SHARED_RECEIVES: u32 = 4096;
/// Work under way on a connection.
const SENDS: u32 = 256;
/// What is sent inline where the card can: an answer, with room for the connection's own affairs.
const INLINE: u32 = 256;
/// Connections that wait to be accepted.
const BACKLOG: i32 = 128;

/// Why RDMA does not work.
#[derive(Debug, Error)]
pub enum RdmaError {
    /// There is none here.
    #[error(
        "this machine has no RDMA device (or its driver rdma_ucm is not loaded): use tcp:// or see docs/rdma.md"
    )]
    NoDevice,
    /// The kernel does not let the process keep memory in place.
    #[error(
        "{device} cannot pin {bytes} bytes of memory: {source}; the limit of locked memory is {limit} (ulimit -l, \
         LimitMEMLOCK=), and it must allow the memory of the guest (rmr-node: its buffer_memory), see docs/rdma.md"
    )]
    Pin {
        /// The device.
        device: String,
        /// How much.
        bytes: usize,
        /// The limit, in words.
        limit: String,
        /// What the kernel says.
        source: io::Error,
    },
    /// The device cannot do what the read mode needs.
    #[error(
        "{device} has no memory windows of type 2B, which the RDMA read mode window needs: choose the mode direct or \
         bounce, see docs/rdma.md"
    )]
    NoWindows {
        /// The device, or all of them.
        device: String,
    },
    /// A call failed.
    #[error("{what}: {source}")]
    Call {
        /// What was to be done.
        what: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// There is no queue pair like this.
    #[error("making a queue pair: {source}; asked for {asked}")]
    QueuePair {
        /// What it was to be.
        asked: String,
        /// Why not.
        source: io::Error,
    },
    /// A peer could not be accepted.
    #[error(
        "the peer seems to have given up before it was accepted, which it does within its leg timeout: {0}"
    )]
    GivenUp(Box<RdmaError>),
    /// The connection manager says so.
    #[error("{0}")]
    Event(String),
    /// The peer did not answer in time.
    #[error("the peer did not answer in time")]
    Timeout,
    /// The peer is something else.
    #[error("the peer at this address: {0}")]
    Stranger(String),
    /// Its device is gone.
    #[error("the RDMA device was removed")]
    Removed,
    /// There are as many connections as there may be.
    #[error("a peer was refused: there is no room for another connection")]
    Full,
    /// The connection was closed before.
    #[error("the connection is closed")]
    Over,
}

impl RdmaError {
    fn pinning(bytes: usize, device: &str, source: io::Error) -> Self {
        let limit = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        let limit = limit.lines().find(|line| line.starts_with("Max locked memory"));
        let limit = limit.and_then(|line| line.split_whitespace().nth(3)).unwrap_or("unknown");
        let limit = if limit == "unlimited" { limit.to_owned() } else { format!("{limit} bytes") };
        Self::Pin { device: device.to_owned(), bytes, limit, source }
    }
}

/// A connection over RDMA.
pub struct RdmaConnection {
    link: Link<verbs::Endpoint>,
}

impl RdmaConnection {
    /// Connects, and waits for it at most about `dead_after`, within which a dead peer is found later on.
    ///
    /// # Errors
    /// When there is no device with a route, memory cannot be pinned, or nobody answers there.
    pub fn connect(fabric: &Fabric, address: SocketAddr, dead_after: Duration) -> Result<Self, RdmaError> {
        let sizes = QueueSizes {
            sends: SENDS,
            receives: OPENER_RECEIVES,
            receive_size: RECEIVE_SIZE,
            inline: INLINE,
        };
        let own = introduction(sizes).encode();
        let offer = verbs::Offer { private: &own, sizes, dead_after };
        // Whatever the address is on now, the kernel may wait for that.
        fabric.let_go();
        let (endpoint, private) = verbs::connect(address, &offer, &mut |place| {
            let domain = fabric.domain_of(place)?;
            fabric.mode_on(&domain).map(|_| domain)
        })?;
        let peer = Introduction::decode(&private).map_err(RdmaError::Stranger)?;
        let keyring = fabric.keyring(&endpoint.domain)?;
        let mode = fabric.mode_on(&endpoint.domain)?;
        let link = Link::new(endpoint, keyring, Role::Opener(mode), peer)?;
        Ok(Self { link })
    }

    /// Bytes of slot memory that the peer waits for; zero when it waits for none.
    #[must_use]
    pub const fn peer_wants(&self) -> u32 {
        self.link.peer_wants()
    }

    /// Lends registered memory to the peer, to write data to: by a key that reaches this memory alone, and on a device with
    /// memory windows only from this connection. The memory must stay until the window was returned, or the connection was
    /// shut down; then the key is invalid.
    ///
    /// # Errors
    /// When it is not registered on this device, the number is in use, or the device has no key left.
    pub fn grant(&mut self, window: u16, memory: &Segment) -> Result<(), RdmaError> {
        self.link.grant(window, memory)
    }

    /// Says that a slot's data is dealt with, by the mark that [`Receiver::placed`] was given.
    pub fn release(&mut self, mark: u32) {
        self.link.release(mark);
    }

    /// Moves the windows that the peer has given back, and cannot write to any more, to `windows`.
    pub fn take_returned(&mut self, windows: &mut Vec<u16>) {
        self.link.take_returned(windows);
    }

    /// To be called about once a second: gives back slot memory that was not used since the last call.
    pub fn beat(&mut self) {
        self.link.beat();
    }

    /// What was done so far.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        self.link.counters()
    }

    /// Ends the connection at once: no work of it touches memory any more when this returns, here or from the peer.
    pub fn shut_down(&mut self) {
        self.link.shut_down();
    }

    /// Whether what was flushed has not all arrived.
    #[must_use]
    pub fn has_unsent(&self) -> bool {
        self.link.has_unsent()
    }

    /// Takes completions and forgets messages, for a connection that is only to get its last words out.
    pub fn linger(&mut self) -> bool {
        self.link.linger()
    }
}

impl Connection for RdmaConnection {
    fn queue(&mut self, header: &MessageHeader, body: Option<Vec<u8>>) {
        self.link.queue(header, body);
    }

    fn queue_data(
        &mut self,
        header: &MessageHeader,
        tag: Option<u32>,
        gather: &mut dyn FnMut(&mut Vec<Segment>),
    ) {
        self.link.queue_data(header, tag, gather);
    }

    fn queue_read(&mut self, header: &MessageHeader, gather: &mut dyn FnMut(&mut Vec<Segment>)) {
        self.link.queue_read(header, gather);
    }

    fn flush(&mut self) -> Result<(), ConnectionError> {
        self.link.flush()
    }

    fn receive(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        self.link.receive(receiver)
    }

    fn take_sent(&mut self, tags: &mut Vec<u32>) {
        self.link.take_sent(tags);
    }

    /// Never: room shows as a completion, which makes the descriptor readable.
    fn wants_to_send(&self) -> bool {
        false
    }

    fn backlog(&self) -> usize {
        self.link.backlog()
    }

    fn backlog_bytes(&self) -> usize {
        self.link.backlog_bytes()
    }

    fn is_starved(&self) -> bool {
        false
    }

    fn descriptor(&self) -> Option<RawFd> {
        Some(self.link.descriptor())
    }

    fn max_io(&self) -> u32 {
        MAX_IO
    }
}

const fn introduction(sizes: QueueSizes) -> Introduction {
    #[expect(clippy::cast_possible_truncation, reason = "constants far below 65536")]
    let receives = sizes.receives as u16;
    Introduction { receives, receive_size: sizes.receive_size }
}

/// Where peers connect to over RDMA.
pub struct RdmaListener {
    listener: verbs::Listener,
    fabric: Fabric,
    dead_after: Duration,
}

impl RdmaListener {
    /// Listens on an address, which may stand for all addresses of the machine. `dead_after` is as in
    /// [`RdmaConnection::connect`].
    ///
    /// # Errors
    /// When no device has the address, or somebody listens there already.
    pub fn bind(fabric: &Fabric, address: SocketAddr, dead_after: Duration) -> Result<Self, RdmaError> {
        let listener = verbs::Listener::bind(address, BACKLOG)?;
        if let Some(place) = listener.place() {
            // Before the first connection, which should not wait until memory is pinned.
            fabric.domain_of(&place)?;
        }
        Ok(Self { listener, fabric: fabric.clone(), dead_after })
    }

    /// Where it listens.
    #[must_use]
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.listener.local()
    }

    /// To be called about once a second: lets go of devices that were removed, and listens again when the one of the address
    /// is back. True if it does so just now.
    pub fn revive(&mut self) -> bool {
        self.fabric.let_go();
        if self.listener.is_listening() {
            return false;
        }
        let listens = self.listener.listen().and_then(|()| match self.listener.place() {
            Some(place) => self.fabric.domain_of(&place).map(drop),
            None => Ok(()),
        });
        if let Err(error) = &listens {
            tracing::debug!("not listening again: {error}");
            self.listener.stop();
        }
        listens.is_ok()
    }

    /// The next connection, if a peer waits for one.
    ///
    /// # Errors
    /// When the peer could not be accepted; the listener goes on. [`RdmaError::Removed`]: when its device is back, with the
    /// next [`RdmaListener::revive`].
    pub fn accept(&mut self) -> Result<Option<(RdmaConnection, SocketAddr)>, RdmaError> {
        self.accept_if(&mut |_| true)
    }

    /// As [`RdmaListener::accept`], but only peers that `admit` says yes to; others cost no more than the question.
    ///
    /// # Errors
    /// As with [`RdmaListener::accept`], and [`RdmaError::Full`] for a peer that was not admitted.
    pub fn accept_if(
        &mut self,
        admit: &mut dyn FnMut(SocketAddr) -> bool,
    ) -> Result<Option<(RdmaConnection, SocketAddr)>, RdmaError> {
        let Some(request) = self.listener.next()? else { return Ok(None) };
        let unknown = SocketAddr::from(([0, 0, 0, 0], 0));
        let peer_address = request.peer.unwrap_or(unknown);
        let peer = match Introduction::decode(&request.private) {
            Ok(peer) => peer,
            Err(words) => {
                request.reject();
                return Err(RdmaError::Stranger(words));
            }
        };
        if !admit(peer_address) {
            request.reject();
            return Err(RdmaError::Full);
        }
        let domain = self.fabric.domain_of(&request.place())?;
        // Removed just now: the listener will hear of that itself.
        let gone = |_| RdmaError::Event("the RDMA device was removed while a peer was accepted".to_owned());
        let keyring: Keyring = self.fabric.keyring(&domain).map_err(gone)?;
        let sizes = QueueSizes {
            sends: SENDS,
            receives: ACCEPTOR_RECEIVES,
            receive_size: RECEIVE_SIZE,
            inline: INLINE,
        };
        let own = introduction(sizes).encode();
        let offer = verbs::Offer { private: &own, sizes, dead_after: self.dead_after };
        let endpoint = request.accept(&offer, domain)?;
        let link = Link::new(endpoint, keyring, Role::Acceptor, peer)?;
        Ok(Some((RdmaConnection { link }, peer_address)))
    }
}

impl AsRawFd for RdmaListener {
    fn as_raw_fd(&self) -> RawFd {
        self.listener.descriptor()
    }
}

/// Whether RDMA can be used here at all, in words if not.
///
/// # Errors
/// When there is no device.
pub fn available() -> Result<(), RdmaError> {
    verbs::device_present()
}

/// Whether some device of this machine can do what a read mode needs, in words if not. A machine without any device may
/// have one later, and says so when it is to be used.
///
/// # Errors
/// When there are devices, and none can.
pub fn supports(mode: ReadMode) -> Result<(), RdmaError> {
    if mode != ReadMode::Window {
        return Ok(());
    }
    let devices = verbs::devices_with_windows();
    if devices.is_empty() || devices.iter().any(|(_, has_windows)| *has_windows) {
        return Ok(());
    }
    let names: Vec<_> = devices.into_iter().map(|(name, _)| name).collect();
    Err(RdmaError::NoWindows { device: names.join(", ") })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_a_device_says_so_in_one_sentence() {
        if available().is_ok() {
            return; // It has one; the tests in a guest with Soft-RoCE are for that.
        }
        let fabric = Fabric::new(ReadMode::Direct);
        let (address, second) = (SocketAddr::from(([127, 0, 0, 1], 1)), Duration::from_secs(1));
        let connecting = RdmaConnection::connect(&fabric, address, second).err();
        let listening = RdmaListener::bind(&fabric, address, second).err();
        for error in [connecting, listening] {
            let text = error.map(|e| e.to_string()).unwrap_or_default();
            assert!(text.contains("no RDMA device") && text.contains("use tcp://"), "{text}");
        }
    }

    #[test]
    fn a_device_without_memory_windows_says_so_and_names_the_other_modes() {
        let text = RdmaError::NoWindows { device: "qedr0".to_owned() }.to_string();
        assert!(text.starts_with("qedr0 has no memory windows"), "{text}");
        assert!(text.contains("direct or bounce") && text.contains("docs/rdma.md"), "{text}");
        assert!(supports(ReadMode::Direct).is_ok() && supports(ReadMode::Bounce).is_ok());
    }

    #[test]
    fn memory_that_cannot_be_pinned_is_told_with_the_limit() {
        let source = io::Error::from_raw_os_error(libc::ENOMEM);
        let text = RdmaError::pinning(4096, "mlx5_0", source).to_string();
        assert!(text.contains("mlx5_0 cannot pin 4096 bytes") && text.contains("LimitMEMLOCK"), "{text}");
        assert!(!text.contains("unknown"), "the limit of this process is known: {text}");
    }
}
