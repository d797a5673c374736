//! Opening connections without blocking the event loop: name look-up and connect happen on a short-lived thread.

use std::io;
use std::net::{SocketAddr, TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Wire;
use super::rdma::{Fabric, RdmaConnection};
use super::tcp::TcpConnection;
use crate::pool::{Address, TransportKind};

/// An attempt that ended: the owner's mark for it, and the connection or the words of the failure.
pub type Attempt = (u64, Result<Wire, String>);

/// Opens connections; results are collected when the descriptor becomes readable.
pub struct Connector {
    results: mpsc::Receiver<Attempt>,
    sender: mpsc::Sender<Attempt>,
    event: EventFd,
    timeout: Duration,
    fabric: Fabric,
}

impl Connector {
    /// A connector whose attempts end within about `timeout` for each address that a name has. On the connections, what was
    /// sent may stay unacknowledged as long; those over RDMA are of `fabric`.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(timeout: Duration, fabric: Fabric) -> io::Result<Self> {
        let (sender, results) = mpsc::channel();
        Ok(Self { results, sender, event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?, timeout, fabric })
    }

    /// Readable when an attempt has ended.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Starts an attempt.
    pub fn connect(&self, mark: u64, address: &Address) {
        let (address, timeout, sender) = (address.clone(), self.timeout, self.sender.clone());
        let (fallback, fabric) = (self.sender.clone(), self.fabric.clone());
        let Ok(event) = self.event.try_clone() else {
            let _ = fallback.send((mark, Err("no file descriptor is left".into())));
            let _ = self.event.write(1);
            return;
        };
        let work = move || {
            // The receiver may be gone when the owner shut down meanwhile; nobody waits for the result then.
            let _ = sender.send((mark, open(&address, timeout, &fabric)));
            let _ = event.write(1);
        };
        if let Err(error) = std::thread::Builder::new().name("connect".into()).spawn(work) {
            let _ = fallback.send((mark, Err(format!("no thread can be started: {error}"))));
            let _ = self.event.write(1);
        }
    }

    /// An attempt that has ended, if there is one.
    #[must_use]
    pub fn next(&self) -> Option<Attempt> {
        // The counter only wakes the loop; reading it when it is zero is of no consequence.
        let _ = self.event.read();
        self.results.try_recv().ok()
    }
}

fn open(address: &Address, timeout: Duration, fabric: &Fabric) -> Result<Wire, String> {
    let candidates = (address.host(), address.port())
        .to_socket_addrs()
        .map_err(|e| format!("no address for the name: {e}"))?;
    let mut last = "the name has no address".to_owned();
    for candidate in candidates {
        match open_one(address.transport(), candidate, timeout, fabric) {
            Ok(wire) => return Ok(wire),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn open_one(
    transport: TransportKind,
    address: SocketAddr,
    timeout: Duration,
    fabric: &Fabric,
) -> Result<Wire, String> {
    match transport {
        TransportKind::Tcp => TcpStream::connect_timeout(&address, timeout)
            .and_then(|stream| TcpConnection::new(stream, timeout))
            .map(Wire::Tcp)
            .map_err(|e| e.to_string()),
        TransportKind::Rdma => RdmaConnection::connect(fabric, address, timeout)
            .map(|connection| Wire::Rdma(Box::new(connection)))
            .map_err(|e| e.to_string()),
    }
}
