//! What carries the data of a test's nodes: the first part of their addresses, and the only thing that changes when a test
//! goes from TCP to verbs.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::str::FromStr;

use anyhow::{Context, Error, Result, bail};

/// Names the fabric for all tests of a process, as [`Fabric`] is written; without it, they use TCP on 127.0.0.1.
pub const VARIABLE: &str = "RMR_LAB_FABRIC";

/// Which binding of the protocol nodes listen with.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Transport {
    /// TCP.
    Tcp,
    /// Reliable connections of RDMA verbs.
    Rdma,
}

/// Transport and host of the data addresses of a test's nodes, written `tcp://127.0.0.1` or `rdma://10.77.0.1`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fabric {
    transport: Transport,
    host: IpAddr,
}

impl Fabric {
    /// This transport at an address of this machine.
    #[must_use]
    pub fn new(transport: Transport, host: impl Into<IpAddr>) -> Self {
        Self { transport, host: host.into() }
    }

    /// What `RMR_LAB_FABRIC` says, or TCP on 127.0.0.1.
    ///
    /// # Errors
    /// When the variable is set to something else than a fabric.
    pub fn from_environment() -> Result<Self> {
        match std::env::var(VARIABLE) {
            Ok(text) => text.parse().with_context(|| format!("the environment variable {VARIABLE}")),
            Err(_) => Ok(Self::new(Transport::Tcp, Ipv4Addr::LOCALHOST)),
        }
    }

    /// Its transport.
    #[must_use]
    pub fn transport(&self) -> Transport {
        self.transport
    }

    /// The host that nodes listen on.
    #[must_use]
    pub fn host(&self) -> IpAddr {
        self.host
    }

    /// The data address of a node that listens on `port`.
    #[must_use]
    pub fn endpoint(&self, port: u16) -> String {
        format!("{}://{}", self.transport, SocketAddr::new(self.host, port))
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Tcp => "tcp",
            Self::Rdma => "rdma",
        })
    }
}

impl fmt::Display for Fabric {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}://{}", self.transport, self.host)
    }
}

impl FromStr for Fabric {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let (scheme, host) = text.split_once("://").unwrap_or((text, ""));
        let transport = match scheme {
            "tcp" => Transport::Tcp,
            "rdma" => Transport::Rdma,
            _ => bail!("expected tcp://IP or rdma://IP, found '{text}'"),
        };
        let host =
            host.parse().with_context(|| format!("expected an IP address after ://, found '{text}'"))?;
        Ok(Self { transport, host })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fabrics_are_read_as_they_are_written_and_everything_else_is_refused() {
        for text in ["tcp://127.0.0.1", "rdma://10.77.0.1", "rdma://fd00::1"] {
            let fabric: Fabric = text.parse().expect(text);
            assert_eq!(fabric.to_string(), text);
        }
        assert_eq!(Fabric::new(Transport::Rdma, Ipv4Addr::LOCALHOST).endpoint(7), "rdma://127.0.0.1:7");
        assert_eq!("rdma://fd00::1".parse::<Fabric>().expect("valid").endpoint(7), "rdma://[fd00::1]:7");
        for text in ["", "tcp", "udp://127.0.0.1", "tcp://", "tcp://host", "tcp://127.0.0.1:7"] {
            assert!(text.parse::<Fabric>().is_err(), "{text}");
        }
    }
}
