//! The connection manager: what it tells, identities, and how connections come about from either side.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_int, c_void};
use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{self, NonNull};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rdma_sys::rdma_cm_event_type as cm;

use super::device::Domain;
use super::queues::Endpoint;
use super::{call, check, device_present, set_nonblocking};
use crate::transport::rdma::RdmaError;
use crate::transport::rdma::endpoint::QueueSizes;

/// `RDMA_OPTION_ID` and `RDMA_OPTION_ID_ACK_TIMEOUT` of `rdma_cma.h`.
const OPTION_LEVEL_ID: c_int = 0;
const OPTION_ACK_TIMEOUT: c_int = 3;

/// What a side says of itself while connecting, and how.
pub(in crate::transport::rdma) struct Offer<'a> {
    pub(in crate::transport::rdma) private: &'a [u8],
    pub(in crate::transport::rdma) sizes: QueueSizes,
    pub(in crate::transport::rdma) dead_after: Duration,
}

/// Connects to `address`; returns the endpoint, and what the peer says of itself.
pub(in crate::transport::rdma) fn connect(
    address: SocketAddr,
    offer: &Offer<'_>,
    domain_of: &mut dyn FnMut(&Place) -> Result<Arc<Domain>, RdmaError>,
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
    let domain = domain_of(&id.place())?;
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

/// A device, and an address that it has.
#[derive(Clone, Copy)]
pub(in crate::transport::rdma) struct Place {
    pub(super) context: *mut rdma_sys::ibv_context,
    local: Option<SocketAddr>,
}

/// Keeps librdmacm from closing a device, and hears of its removal.
pub(super) struct Anchor {
    id: Id,
}

impl Anchor {
    pub(super) fn new(place: &Place) -> Result<Self, RdmaError> {
        let id = Id::new(&Arc::new(EventChannel::new()?))?;
        let mut address = place.local.ok_or(RdmaError::NoDevice)?;
        address.set_port(0);
        id.bind(address)?;
        if id.context() != place.context {
            return Err(RdmaError::Event("the address moved to another device".to_owned()));
        }
        Ok(Self { id })
    }

    /// Whether the device was removed since this was last asked.
    pub(super) fn hears_of_removal(&self) -> bool {
        while let Ok(Some(event)) = self.id.channel.next() {
            if event.kind == cm::RDMA_CM_EVENT_DEVICE_REMOVAL {
                return true;
            }
        }
        false
    }
}

/// Where peers connect to.
pub(in crate::transport::rdma) struct Listener {
    channel: Arc<EventChannel>,
    address: SocketAddr,
    backlog: c_int,
    /// `None` when its device was removed.
    id: Option<Id>,
}

/// A peer that wants to connect.
pub(in crate::transport::rdma) struct Request {
    id: Id,
    pub(in crate::transport::rdma) private: Vec<u8>,
    pub(in crate::transport::rdma) peer: Option<SocketAddr>,
}

impl Listener {
    pub(in crate::transport::rdma) fn bind(address: SocketAddr, backlog: c_int) -> Result<Self, RdmaError> {
        let channel = Arc::new(EventChannel::new()?);
        let mut listener = Self { channel, address, backlog, id: None };
        listener.listen()?;
        listener.address = listener.local().unwrap_or(address);
        Ok(listener)
    }

    /// Listens, perhaps again: events come to the same descriptor.
    pub(in crate::transport::rdma) fn listen(&mut self) -> Result<(), RdmaError> {
        let id = Id::new(&self.channel)?;
        id.bind(self.address)?;
        // SAFETY: the identity is valid.
        check("listening", unsafe { rdma_sys::rdma_listen(id.raw.as_ptr(), self.backlog) })?;
        self.id = Some(id);
        Ok(())
    }

    /// Stops listening, until it is told to again.
    pub(in crate::transport::rdma) fn stop(&mut self) {
        self.id = None;
    }

    pub(in crate::transport::rdma) fn is_listening(&self) -> bool {
        self.id.is_some()
    }

    pub(in crate::transport::rdma) fn descriptor(&self) -> RawFd {
        self.channel.descriptor()
    }

    pub(in crate::transport::rdma) fn local(&self) -> Option<SocketAddr> {
        self.id.as_ref().and_then(Id::local)
    }

    /// The device that it is bound to, unless it listens on all.
    pub(in crate::transport::rdma) fn place(&self) -> Option<Place> {
        self.id.as_ref().map(Id::place).filter(|place| !place.context.is_null())
    }

    /// The next peer that wants to connect.
    pub(in crate::transport::rdma) fn next(&mut self) -> Result<Option<Request>, RdmaError> {
        while let Some(event) = self.channel.next()? {
            let is_own = self.id.as_ref().is_some_and(|id| id.raw.as_ptr() == event.id);
            match event.kind {
                cm::RDMA_CM_EVENT_CONNECT_REQUEST => {
                    let Some(raw) = NonNull::new(event.id) else { continue };
                    let id = Id { raw, has_queue_pair: false, channel: Arc::clone(&self.channel) };
                    let peer = id.peer();
                    return Ok(Some(Request { id, private: event.private, peer }));
                }
                cm::RDMA_CM_EVENT_DEVICE_REMOVAL if is_own => {
                    self.stop();
                    return Err(RdmaError::Removed);
                }
                // About a peer that went away before it was accepted: its identity is gone with it.
                _ => {}
            }
        }
        Ok(None)
    }
}

impl Request {
    pub(in crate::transport::rdma) fn place(&self) -> Place {
        self.id.place()
    }

    /// Accepts the peer.
    pub(in crate::transport::rdma) fn accept(
        mut self,
        offer: &Offer<'_>,
        domain: Arc<Domain>,
    ) -> Result<Endpoint, RdmaError> {
        self.id.migrate(Arc::new(EventChannel::new()?))?;
        self.id.set_ack_timeout(offer.dead_after);
        let endpoint = Endpoint::new(self.id, domain, offer.sizes, true).map_err(|error| match error {
            // The connection manager has forgotten a peer that does not wait any longer, and says so in this way alone.
            RdmaError::QueuePair { ref source, .. } if source.raw_os_error() == Some(libc::EINVAL) => {
                RdmaError::GivenUp(Box::new(error))
            }
            other => other,
        })?;
        let mut parameters = parameters(offer.private);
        parameters.srq = u8::from(endpoint.is_shared());
        // SAFETY: identity and parameters are valid; the private data is copied by the call.
        check("accepting", unsafe { rdma_sys::rdma_accept(endpoint.id.raw.as_ptr(), &mut parameters) })?;
        Ok(endpoint)
    }

    /// Refuses the peer.
    pub(in crate::transport::rdma) fn reject(self) {
        // SAFETY: the identity is valid and has no queue pair. A peer that is gone already cannot be told.
        unsafe { rdma_sys::rdma_reject(self.id.raw.as_ptr(), ptr::null(), 0) };
    }
}

/// A channel on which the connection manager tells what happens to connections.
pub(in crate::transport::rdma) struct EventChannel(NonNull<rdma_sys::rdma_event_channel>);

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

    pub(in crate::transport::rdma) fn descriptor(&self) -> RawFd {
        // SAFETY: the channel lives as long as `self`.
        unsafe { self.0.as_ref() }.fd
    }

    /// The next event, if there is one. It is acknowledged at once; what counts is copied.
    pub(super) fn next(&self) -> Result<Option<CmEvent>, RdmaError> {
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

/// An event of the connection manager, copied.
pub(super) struct CmEvent {
    pub(super) kind: cm::Type,
    status: i32,
    id: *mut rdma_sys::rdma_cm_id,
    private: Vec<u8>,
}

impl CmEvent {
    pub(super) fn words(&self) -> String {
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
pub(super) struct Id {
    pub(super) raw: NonNull<rdma_sys::rdma_cm_id>,
    pub(super) has_queue_pair: bool,
    /// Where its events come; outlives it.
    pub(super) channel: Arc<EventChannel>,
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

    fn place(&self) -> Place {
        Place { context: self.context(), local: self.local() }
    }

    fn bind(&self, address: SocketAddr) -> Result<(), RdmaError> {
        let mut storage = to_storage(address);
        // SAFETY: identity and address are valid; the address is copied by the call.
        let returned = unsafe { rdma_sys::rdma_bind_addr(self.raw.as_ptr(), (&raw mut storage).cast()) };
        check("binding the address to an RDMA device", returned)
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
            let (ip, port) = (plain.sin6_addr.s6_addr.into(), u16::from_be(plain.sin6_port));
            // A link-local address is none without its scope.
            Some(SocketAddrV6::new(ip, port, 0, plain.sin6_scope_id).into())
        }
        _ => None,
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        self.descriptor()
    }
}
