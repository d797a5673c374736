//! What stands in for the RDMA transport in a build without it: the same names, and one clear sentence.

use std::any::Any;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use thiserror::Error;

pub use super::rdma_terms::{
    Exposure, KeyOutcome, KeyUse, MAX_IO, MAX_WINDOW, MAX_WINDOWS, MIN_WINDOW, ReadMode,
};
use super::{Connection, ConnectionError, Counters, Receiver};
use crate::buffer::Segment;
use crate::wire::MessageHeader;

/// Why RDMA does not work.
#[derive(Debug, Error)]
pub enum RdmaError {
    /// The feature `rdma` is switched off.
    #[error("this build has no RDMA transport: use tcp://, or build with the feature rdma (docs/rdma.md)")]
    NotBuilt,
    /// Its device is gone.
    #[error("the RDMA device was removed")]
    Removed,
    /// There are as many connections as there may be.
    #[error("a peer was refused: there is no room for another connection")]
    Full,
}

/// What the RDMA connections of a process have in common: nothing here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Fabric(ReadMode);

impl Fabric {
    /// A fabric.
    #[must_use]
    pub const fn new(read_mode: ReadMode) -> Self {
        Self(read_mode)
    }

    /// The fabric of a node.
    #[must_use]
    pub const fn for_nodes() -> Self {
        Self(ReadMode::Window)
    }

    /// How reads would be done.
    #[must_use]
    pub const fn read_mode(&self) -> ReadMode {
        self.0
    }

    /// Who might write to memory that reads go to.
    #[must_use]
    pub const fn exposure(&self) -> Exposure {
        Exposure::Local
    }

    /// Whether devices are open: never.
    #[must_use]
    pub const fn has_devices(&self) -> bool {
        false
    }

    /// Lets go of devices that were removed: there are none.
    pub const fn let_go(&self) {}

    /// Keeps `owner` until the registration is dropped, as where there is RDMA.
    ///
    /// # Errors
    /// Never.
    pub fn register(
        &self,
        _segment: Segment,
        owner: Arc<dyn Any + Send + Sync>,
        _exposure: Exposure,
    ) -> Result<Registration, RdmaError> {
        Ok(Registration { _owner: owner })
    }
}

/// Whether what is here can do what a read mode needs: nobody asks it to.
///
/// # Errors
/// Never.
pub const fn supports(_: ReadMode) -> Result<(), RdmaError> {
    Ok(())
}

/// Memory that connections may use.
pub struct Registration {
    _owner: Arc<dyn Any + Send + Sync>,
}

impl std::fmt::Debug for Registration {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Registration")
    }
}

/// A connection over RDMA, of which there is none.
pub enum RdmaConnection {}

impl RdmaConnection {
    /// Fails.
    ///
    /// # Errors
    /// Always.
    pub const fn connect(_: &Fabric, _: SocketAddr, _: Duration) -> Result<Self, RdmaError> {
        Err(RdmaError::NotBuilt)
    }

    /// Cannot be called, like all that follow.
    #[must_use]
    pub const fn peer_wants(&self) -> u32 {
        match *self {}
    }

    /// See there.
    ///
    /// # Errors
    /// Never.
    pub const fn grant(&mut self, _window: u16, _memory: &Segment) -> Result<(), RdmaError> {
        match *self {}
    }

    /// See there.
    pub const fn release(&mut self, _mark: u32) {
        match *self {}
    }

    /// See there.
    pub const fn take_returned(&mut self, _windows: &mut Vec<u16>) {
        match *self {}
    }

    /// See there.
    pub const fn beat(&mut self) {
        match *self {}
    }

    /// See there.
    #[must_use]
    pub const fn counters(&self) -> Counters {
        match *self {}
    }

    /// See there.
    pub const fn shut_down(&mut self) {
        match *self {}
    }

    /// See there.
    #[must_use]
    pub const fn has_unsent(&self) -> bool {
        match *self {}
    }

    /// See there.
    pub const fn linger(&mut self) -> bool {
        match *self {}
    }
}

impl Connection for RdmaConnection {
    fn queue(&mut self, _: &MessageHeader, _: Option<Vec<u8>>) {
        match *self {}
    }

    fn queue_data(&mut self, _: &MessageHeader, _: Option<u32>, _: &mut dyn FnMut(&mut Vec<Segment>)) {
        match *self {}
    }

    fn flush(&mut self) -> Result<(), ConnectionError> {
        match *self {}
    }

    fn receive(&mut self, _: &mut dyn Receiver) -> Result<(), ConnectionError> {
        match *self {}
    }

    fn take_sent(&mut self, _: &mut Vec<u32>) {
        match *self {}
    }

    fn wants_to_send(&self) -> bool {
        match *self {}
    }

    fn backlog(&self) -> usize {
        match *self {}
    }

    fn is_starved(&self) -> bool {
        match *self {}
    }

    fn descriptor(&self) -> Option<RawFd> {
        match *self {}
    }
}

/// Where peers connect to over RDMA: nowhere.
pub enum RdmaListener {}

impl RdmaListener {
    /// Fails.
    ///
    /// # Errors
    /// Always.
    pub const fn bind(_: &Fabric, _: SocketAddr, _: Duration) -> Result<Self, RdmaError> {
        Err(RdmaError::NotBuilt)
    }

    /// Cannot be called.
    #[must_use]
    pub const fn local_addr(&self) -> Option<SocketAddr> {
        match *self {}
    }

    /// Cannot be called.
    pub const fn revive(&mut self) -> bool {
        match *self {}
    }

    /// Cannot be called.
    ///
    /// # Errors
    /// None.
    pub fn accept_if(
        &mut self,
        _admit: &mut dyn FnMut(SocketAddr) -> bool,
    ) -> Result<Option<(RdmaConnection, SocketAddr)>, RdmaError> {
        match *self {}
    }

    /// None waits.
    ///
    /// # Errors
    /// None.
    pub const fn accept(&mut self) -> Result<Option<(RdmaConnection, SocketAddr)>, RdmaError> {
        match *self {}
    }
}

impl AsRawFd for RdmaListener {
    fn as_raw_fd(&self) -> RawFd {
        match *self {}
    }
}

/// Fails: there are no keys.
///
/// # Errors
/// Always.
pub const fn try_key(_: IpAddr, _: KeyUse) -> Result<KeyOutcome, RdmaError> {
    Err(RdmaError::NotBuilt)
}

/// Whether RDMA can be used here at all: no.
///
/// # Errors
/// Always.
pub const fn available() -> Result<(), RdmaError> {
    Err(RdmaError::NotBuilt)
}
