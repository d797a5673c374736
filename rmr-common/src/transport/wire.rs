//! A connection of either kind behind one type, without a virtual call for each message.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsRawFd, RawFd};
use std::time::{Duration, Instant};

use super::rdma::{RdmaConnection, RdmaError, RdmaListener};
use super::tcp::TcpConnection;
use super::tls::ServerTls;
use super::{Connection, ConnectionError, Counters, Receiver};
use crate::buffer::Segment;
use crate::pool::{Sequence, Slot};
use crate::wire::MessageHeader;

/// The last words of a connection may take so long.
const LINGER: Duration = Duration::from_secs(1);

/// A connection over TCP or RDMA.
#[expect(clippy::large_enum_variant, reason = "an indirection on the common path costs more than the memory")]
pub enum Wire {
    /// Over TCP.
    Tcp(TcpConnection),
    /// Over RDMA.
    Rdma(Box<RdmaConnection>),
}

impl Wire {
    /// The connection, if it is one over RDMA.
    pub fn rdma(&mut self) -> Option<&mut RdmaConnection> {
        match self {
            Self::Tcp(_) => None,
            Self::Rdma(connection) => Some(connection),
        }
    }

    /// Whether it goes over RDMA.
    #[must_use]
    pub const fn is_rdma(&self) -> bool {
        matches!(self, Self::Rdma(_))
    }

    /// What was done so far.
    #[must_use]
    pub fn counters(&self) -> Counters {
        match self {
            Self::Tcp(connection) => connection.counters(),
            Self::Rdma(connection) => connection.counters(),
        }
    }

    /// Ends the connection at once: when this returns, nothing touches memory of requests any more, here or from the peer.
    /// The descriptor stays open until the value is dropped.
    pub fn shut_down(&mut self) {
        match self {
            Self::Tcp(connection) => connection.shut_down(),
            Self::Rdma(connection) => connection.shut_down(),
        }
    }

    /// Bytes of slot memory that the peer waits for; it cannot say anything before it has them. Always 0 over TCP.
    #[must_use]
    pub const fn peer_wants(&self) -> u32 {
        match self {
            Self::Tcp(_) => 0,
            Self::Rdma(connection) => connection.peer_wants(),
        }
    }

    /// As [`Wire::shut_down`], for a peer that was lent no memory: what was flushed still goes out, if the value is then
    /// given to [`Wire::finish`].
    pub fn part(&mut self) {
        match self {
            // The kernel sends what it has taken.
            Self::Tcp(connection) => connection.shut_down(),
            Self::Rdma(connection) if connection.has_unsent() => {}
            Self::Rdma(connection) => connection.shut_down(),
        }
    }

    /// Drops the connection, and then `keep`; one that still has last words under way goes on by itself for a moment.
    pub fn finish(self, keep: impl Send + 'static) {
        let Self::Rdma(mut connection) = self else { return };
        if !connection.has_unsent() {
            return;
        }
        let work = move || {
            let end = Instant::now() + LINGER;
            while connection.linger() && Instant::now() < end {
                std::thread::sleep(Duration::from_millis(1));
            }
            drop(connection);
            drop(keep);
        };
        // Without a thread it is dropped at once, and the peer does not hear why.
        let _ = std::thread::Builder::new().name("linger".into()).spawn(work);
    }
}

impl Connection for Wire {
    fn queue(&mut self, header: &MessageHeader, body: Option<Vec<u8>>) {
        match self {
            Self::Tcp(connection) => connection.queue(header, body),
            Self::Rdma(connection) => connection.queue(header, body),
        }
    }

    fn queue_data(
        &mut self,
        header: &MessageHeader,
        tag: Option<u32>,
        gather: &mut dyn FnMut(&mut Vec<Segment>),
    ) {
        match self {
            Self::Tcp(connection) => connection.queue_data(header, tag, gather),
            Self::Rdma(connection) => connection.queue_data(header, tag, gather),
        }
    }

    fn queue_read(&mut self, header: &MessageHeader, gather: &mut dyn FnMut(&mut Vec<Segment>)) {
        match self {
            Self::Tcp(connection) => connection.queue_read(header, gather),
            Self::Rdma(connection) => connection.queue_read(header, gather),
        }
    }

    fn flush(&mut self) -> Result<(), ConnectionError> {
        match self {
            Self::Tcp(connection) => connection.flush(),
            Self::Rdma(connection) => connection.flush(),
        }
    }

    fn receive(&mut self, receiver: &mut dyn Receiver) -> Result<(), ConnectionError> {
        match self {
            Self::Tcp(connection) => connection.receive(receiver),
            Self::Rdma(connection) => connection.receive(receiver),
        }
    }

    fn take_sent(&mut self, tags: &mut Vec<u32>) {
        match self {
            Self::Tcp(connection) => connection.take_sent(tags),
            Self::Rdma(connection) => connection.take_sent(tags),
        }
    }

    fn take_faults(&mut self, faults: &mut Vec<(Slot, Sequence)>) {
        match self {
            Self::Tcp(connection) => connection.take_faults(faults),
            // The card reads memory that is pinned: it stays readable when its owner gives it up.
            Self::Rdma(_) => {}
        }
    }

    fn wants_to_send(&self) -> bool {
        match self {
            Self::Tcp(connection) => connection.wants_to_send(),
            Self::Rdma(connection) => connection.wants_to_send(),
        }
    }

    fn backlog(&self) -> usize {
        match self {
            Self::Tcp(connection) => connection.backlog(),
            Self::Rdma(connection) => connection.backlog(),
        }
    }

    fn backlog_bytes(&self) -> usize {
        match self {
            Self::Tcp(connection) => connection.backlog_bytes(),
            Self::Rdma(connection) => connection.backlog_bytes(),
        }
    }

    fn is_starved(&self) -> bool {
        match self {
            Self::Tcp(connection) => connection.is_starved(),
            Self::Rdma(connection) => connection.is_starved(),
        }
    }

    fn descriptor(&self) -> Option<RawFd> {
        match self {
            Self::Tcp(connection) => connection.descriptor(),
            Self::Rdma(connection) => connection.descriptor(),
        }
    }

    fn max_io(&self) -> u32 {
        match self {
            Self::Tcp(connection) => connection.max_io(),
            Self::Rdma(connection) => connection.max_io(),
        }
    }
}

/// Where peers connect to, over TCP or RDMA.
pub enum Listener {
    /// Over TCP.
    Tcp {
        /// Where peers come.
        socket: TcpListener,
        /// What was sent may stay unacknowledged so long.
        dead_after: Duration,
        /// They have to speak TLS.
        tls: Option<ServerTls>,
    },
    /// Over RDMA.
    Rdma(Box<RdmaListener>),
}

impl Listener {
    /// The next connection, if `admit` says yes to it: it is asked before anything is set aside for the peer.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when none waits, [`io::ErrorKind::ConnectionRefused`] when one was not admitted,
    /// [`io::ErrorKind::ConnectionAborted`] when one could not be taken and others may, [`io::ErrorKind::AddrNotAvailable`]
    /// when none will come before [`Listener::revive`] says so.
    pub fn accept(&mut self, admit: &mut dyn FnMut(SocketAddr) -> bool) -> io::Result<(Wire, SocketAddr)> {
        match self {
            Self::Tcp { socket, dead_after, tls } => {
                let (stream, address) = socket.accept()?;
                if !admit(address) {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                let connection = match tls {
                    Some(tls) => TcpConnection::accepted_with_tls(stream, *dead_after, tls),
                    None => TcpConnection::new(stream, *dead_after),
                };
                let connection =
                    connection.map_err(|e| io::Error::new(io::ErrorKind::ConnectionAborted, e))?;
                Ok((Wire::Tcp(connection), address))
            }
            Self::Rdma(listener) => match listener.accept_if(admit) {
                Ok(Some((connection, address))) => Ok((Wire::Rdma(Box::new(connection)), address)),
                Ok(None) => Err(io::ErrorKind::WouldBlock.into()),
                Err(RdmaError::Full) => Err(io::ErrorKind::ConnectionRefused.into()),
                Err(error @ RdmaError::Removed) => {
                    Err(io::Error::new(io::ErrorKind::AddrNotAvailable, error))
                }
                Err(error) => Err(io::Error::new(io::ErrorKind::ConnectionAborted, error)),
            },
        }
    }
}

impl Listener {
    /// To be called about once a second; true if it listens again, after its device was removed and came back.
    pub fn revive(&mut self) -> bool {
        match self {
            Self::Tcp { .. } => false,
            Self::Rdma(listener) => listener.revive(),
        }
    }
}

impl AsRawFd for Listener {
    fn as_raw_fd(&self) -> RawFd {
        match self {
            Self::Tcp { socket, .. } => socket.as_raw_fd(),
            Self::Rdma(listener) => listener.as_raw_fd(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::TcpStream;

    use super::*;

    #[test]
    fn a_peer_that_is_not_admitted_is_closed_and_the_next_one_is_asked_for() {
        let socket = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = socket.local_addr().unwrap();
        let mut listener = Listener::Tcp { socket, dead_after: Duration::from_secs(1), tls: None };
        let mut first = TcpStream::connect(address).unwrap();
        let _second = TcpStream::connect(address).unwrap();
        let mut asked = Vec::new();
        let mut admit = |peer| {
            asked.push(peer);
            asked.len() > 1
        };
        let refused = listener.accept(&mut admit).err().unwrap();
        assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(first.read(&mut [0]).unwrap(), 0);
        let (wire, peer) = listener.accept(&mut admit).unwrap();
        assert_eq!(asked, [first.local_addr().unwrap(), peer]);
        let keep = std::sync::Arc::new(());
        wire.finish(keep.clone());
        assert_eq!(std::sync::Arc::strong_count(&keep), 1, "let go of with the connection");
    }
}
