//! Opening TCP connections without blocking the event loop: name look-up and connect happen on a short-lived thread.

use std::io;
use std::net::{TcpStream, ToSocketAddrs};
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc;
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::tcp::TcpConnection;
use super::tls::ClientTls;
use crate::pool::{Address, TransportKind};

/// An attempt that ended: the owner's mark for it, and the connection or the words of the failure.
pub type Attempt = (u64, Result<Dialled, String>);

/// A stream that was connected to an address, and what is to be spoken on it.
pub struct Dialled {
    stream: TcpStream,
    /// The way to encrypt, and the host that the peer has to prove to be.
    tls: Option<(ClientTls, String)>,
}

impl Dialled {
    /// Makes a connection of it. `dead_after` is how long sent data may stay unacknowledged.
    ///
    /// # Errors
    /// In words, when the stream's options cannot be set.
    pub fn into_connection(self, dead_after: Duration) -> Result<TcpConnection, String> {
        match self.tls {
            None => TcpConnection::new(self.stream, dead_after),
            Some((tls, host)) => TcpConnection::with_tls(self.stream, dead_after, &tls, &host),
        }
        .map_err(|e| e.to_string())
    }
}

/// Opens connections; results are collected when the descriptor becomes readable.
pub struct Connector {
    results: mpsc::Receiver<Attempt>,
    sender: mpsc::Sender<Attempt>,
    event: EventFd,
    timeout: Duration,
    tls: Option<ClientTls>,
}

impl Connector {
    /// A connector whose attempts end within `timeout` for each address that a name has. Without `tls` it refuses
    /// `tls://` addresses.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(timeout: Duration, tls: Option<ClientTls>) -> io::Result<Self> {
        let (sender, results) = mpsc::channel();
        Ok(Self { results, sender, event: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?, timeout, tls })
    }

    /// Readable when an attempt has ended.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Starts an attempt.
    pub fn connect(&self, mark: u64, address: &Address) {
        let (address, timeout, sender) = (address.clone(), self.timeout, self.sender.clone());
        let tls = self.tls.clone();
        let fallback = self.sender.clone();
        let Ok(event) = self.event.try_clone() else {
            let _ = fallback.send((mark, Err("no file descriptor is left".into())));
            let _ = self.event.write(1);
            return;
        };
        let work = move || {
            // The receiver may be gone when the owner shut down meanwhile; nobody waits for the result then.
            let _ = sender.send((mark, open(&address, timeout, tls)));
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

fn open(address: &Address, timeout: Duration, tls: Option<ClientTls>) -> Result<Dialled, String> {
    let tls = match address.transport() {
        TransportKind::Tcp => None,
        TransportKind::Tls => {
            let tls =
                tls.ok_or("the address asks for TLS, and no certificate authority is configured here")?;
            Some((tls, address.host().to_owned()))
        }
        TransportKind::Rdma => return Err("this build has no RDMA transport; use tcp://".into()),
    };
    let candidates = (address.host(), address.port())
        .to_socket_addrs()
        .map_err(|e| format!("no address for the name: {e}"))?;
    let mut last = "the name has no address".to_owned();
    for candidate in candidates {
        match TcpStream::connect_timeout(&candidate, timeout) {
            Ok(stream) => return Ok(Dialled { stream, tls }),
            Err(error) => last = error.to_string(),
        }
    }
    Err(last)
}
