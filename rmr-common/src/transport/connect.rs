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
use super::tls::ClientTls;
use crate::pool::{Address, TransportKind};

/// An attempt that ended: the owner's mark for it, and the connection or the words of the failure.
pub type Attempt = (u64, Result<Wire, String>);

/// How connections are made.
#[derive(Clone)]
struct Ways {
    timeout: Duration,
    tls: Option<ClientTls>,
    tls_only: bool,
    fabric: Fabric,
}

/// Opens connections; results are collected when the descriptor becomes readable.
pub struct Connector {
    results: mpsc::Receiver<Attempt>,
    sender: mpsc::Sender<Attempt>,
    event: EventFd,
    ways: Ways,
}

impl Connector {
    /// A connector whose attempts end within about `timeout` for each address that a name has. On the connections, what was
    /// sent may stay unacknowledged as long. Without `tls` it refuses `tls://` addresses; connections over RDMA are of
    /// `fabric`.
    ///
    /// # Errors
    /// When no eventfd can be made.
    pub fn new(timeout: Duration, tls: Option<ClientTls>, fabric: Fabric) -> io::Result<Self> {
        let (sender, results) = mpsc::channel();
        let event = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?;
        Ok(Self { results, sender, event, ways: Ways { timeout, tls, tls_only: false, fabric } })
    }

    /// The same connector, which from now on refuses every address but `tls://` ones, if `tls_only` says so.
    #[must_use]
    pub const fn leaving_tls_never(mut self, tls_only: bool) -> Self {
        self.ways.tls_only = tls_only;
        self
    }

    /// Readable when an attempt has ended.
    #[must_use]
    pub fn descriptor(&self) -> RawFd {
        self.event.as_raw_fd()
    }

    /// Starts an attempt.
    pub fn connect(&self, mark: u64, address: &Address) {
        let (address, ways, sender) = (address.clone(), self.ways.clone(), self.sender.clone());
        let fallback = self.sender.clone();
        let Ok(event) = self.event.try_clone() else {
            let _ = fallback.send((mark, Err("no file descriptor is left".into())));
            let _ = self.event.write(1);
            return;
        };
        let work = move || {
            // The receiver may be gone when the owner shut down meanwhile; nobody waits for the result then.
            let _ = sender.send((mark, open(&address, &ways)));
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

fn open(address: &Address, ways: &Ways) -> Result<Wire, String> {
    if ways.tls_only && address.transport() != TransportKind::Tls {
        return Err(format!(
            "{address} is not a tls:// address, and this side was given no other: it never leaves TLS. If the pool is to have \
             members without TLS, name one of their addresses as well"
        ));
    }
    let candidates = (address.host(), address.port())
        .to_socket_addrs()
        .map_err(|e| format!("no address for the name: {e}"))?;
    let mut last = "the name has no address".to_owned();
    for candidate in candidates {
        match open_one(address, candidate, ways) {
            Ok(wire) => return Ok(wire),
            Err(error) => last = error,
        }
    }
    Err(last)
}

fn open_one(address: &Address, candidate: SocketAddr, ways: &Ways) -> Result<Wire, String> {
    let text = |error: io::Error| error.to_string();
    let dial = || TcpStream::connect_timeout(&candidate, ways.timeout).map_err(text);
    match address.transport() {
        TransportKind::Tcp => TcpConnection::new(dial()?, ways.timeout).map(Wire::Tcp).map_err(text),
        TransportKind::Tls => {
            let tls = ways.tls.as_ref();
            let tls =
                tls.ok_or("the address asks for TLS, and no certificate authority is configured here")?;
            TcpConnection::with_tls(dial()?, ways.timeout, tls, address.host()).map(Wire::Tcp).map_err(text)
        }
        TransportKind::Rdma => RdmaConnection::connect(&ways.fabric, candidate, ways.timeout)
            .map(|connection| Wire::Rdma(Box::new(connection)))
            .map_err(|e| e.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connector_that_never_leaves_tls_connects_to_no_other_address() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let connector = || Connector::new(Duration::from_secs(5), None, Fabric::for_nodes()).unwrap();
        let ask = |connector: Connector, transport| {
            connector.connect(1, &Address::new(transport, "127.0.0.1", port));
            loop {
                if let Some((_, result)) = connector.next() {
                    return result.map(drop);
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        assert_eq!(ask(connector(), TransportKind::Tcp), Ok(()));
        for transport in [TransportKind::Tcp, TransportKind::Rdma] {
            let refused = ask(connector().leaving_tls_never(true), transport).unwrap_err();
            assert!(refused.contains("never leaves TLS"), "{refused}");
        }
        let refused = ask(connector().leaving_tls_never(true), TransportKind::Tls).unwrap_err();
        assert!(refused.contains("no certificate authority"), "{refused}");
    }
}
