//! Opening TCP connections without blocking the event loop: name look-up and connect happen on a short-lived thread.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::pool::{Address, TransportKind};

/// An attempt that ended: the owner's mark for it, and the stream or the words of the failure.
pub type Attempt = (u64, Result<TcpStream, String>);

/// Opens connections; results are collected when the descriptor becomes readable.
pub struct Connector {
    results: mpsc::Receiver<Attempt>,
    sender: mpsc::Sender<Attempt>,
    event: EventFd,
    timeout: Duration,
}

impl Connector {
    /// A connector whose attempts end within `timeout` for each address that a name has.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(timeout: Duration) -> io::Result<Self> {
        let (sender, results) = mpsc::channel();
        Ok(Self { results, sender, event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?, timeout })
    }

    /// Readable when an attempt has ended.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Starts an attempt.
    pub fn connect(&self, mark: u64, address: &Address) {
        let (address, timeout, sender) = (address.clone(), self.timeout, self.sender.clone());
        let fallback = self.sender.clone();
        let Ok(event) = self.event.try_clone() else {
            let _ = fallback.send((mark, Err("no file descriptor is left".into())));
            let _ = self.event.write(1);
            return;
        };
        let work = move || {
            // The receiver may be gone when the owner shut down meanwhile; nobody waits for the result then.
            let _ = sender.send((mark, open(&address, timeout)));
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

fn open(address: &Address, timeout: Duration) -> Result<TcpStream, String> {
    if address.transport() == TransportKind::Rdma {
        return Err("this build has no RDMA transport; use tcp://".into());
    }
    let candidates = (address.host(), address.port())
        .to_socket_addrs()
        .map_err(|e| format!("no address for the name: {e}"))?;
    let mut last = "the name has no address".to_owned();
    for candidate in candidates {
        match TcpStream::connect_timeout(&candidate, timeout) {
            Ok(stream) => return Ok(stream),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}
