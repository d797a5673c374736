//! Settings of `rmr-node`: a TOML file, flags that override it, defaults, and a limit for every queue.
//!
//! [`Settings`] is what a person wrote, each value optional; [`Config`] is what the service runs with, complete and
//! checked. `docs/configuration.md` explains each value and what it costs.

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rmr_common::pool::{Address, MemberId, PoolId, TransportKind};
use rmr_common::transport::tls::IdentityFiles;

use crate::admin::AdminLimits;
use crate::store::ByteSize;

/// Port on which nodes listen for clients and peers, unless told otherwise.
pub const DEFAULT_DATA_PORT: u16 = 7700;
/// Port on which nodes listen for admin requests, unless told otherwise.
pub const DEFAULT_ADMIN_PORT: u16 = 7701;
/// Least buffer memory of a shard: a request of the largest size, several times over.
const MIN_BUFFER_MEMORY: ByteSize = ByteSize(8 << 20);
/// Largest buffer memory of a shard.
const MAX_BUFFER_MEMORY: ByteSize = ByteSize(64 << 30);
/// Extension of store files in the store directory.
const STORE_EXTENSION: &str = "store";

mod places;
mod settings;
mod values;

pub use places::PlaceError;
pub use settings::{
    AdminSettings, ConfigError, KeySettings, LogSettings, ResyncSettings, Settings, TlsSettings,
};
pub use values::{Bounded, EngineChoice, LogFormat, LogLevel};

/// What the service runs with.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Config {
    /// Name of this node in status output and logs.
    pub node_name: String,
    /// Where to listen for clients and peers; at least one.
    pub listen: Vec<Address>,
    /// Where other machines reach those; empty: see [`Config::advertised`].
    pub advertise: Vec<Address>,
    /// Where the admin API listens.
    pub admin: SocketAddr,
    /// Names by which callers may know the admin API, besides those that the node knows itself.
    pub admin_names: Vec<String>,
    /// Devices or files of stores to open at start.
    pub stores: Vec<PathBuf>,
    /// Directory of file stores.
    pub store_dir: Option<PathBuf>,
    /// Most stores that are open at once.
    pub max_stores: usize,
    /// Devices, files and directories on which the admin API may make stores, besides.
    pub store_places: Vec<PathBuf>,
    /// I/O threads.
    pub shards: usize,
    /// Buffer memory of each shard in bytes, a multiple of 4096.
    pub buffer_memory: u64,
    /// Disk engine.
    pub engine: EngineChoice,
    /// Most data connections.
    pub max_connections: usize,
    /// Most of them from one address.
    pub max_connections_per_address: usize,
    /// A connection on which sent data stays unacknowledged this long is dropped.
    pub leg_timeout: Duration,
    /// A connection that has not been greeted for so long is closed.
    pub idle_timeout: Duration,
    /// The intent bit of a chunk without a write for this long may be cleared.
    pub intent_idle: Duration,
    /// Longest graceful stop.
    pub stop_timeout: Duration,
    /// Limits of resync.
    pub resync: ResyncConfig,
    /// Limits of the admin API.
    pub admin_limits: AdminLimits,
    /// Keys of pools.
    pub keys: KeysConfig,
    /// Certificates.
    pub tls: TlsConfig,
    /// Form of the log.
    pub log_format: LogFormat,
    /// What to log.
    pub log_level: LogLevel,
}

/// Keys of pools.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct KeysConfig {
    /// Where they are; read for each connection.
    pub directory: Option<PathBuf>,
    /// A pool without one is not served.
    pub required: bool,
}

/// Certificates, as files that are read at the start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TlsConfig {
    /// This node's own.
    pub identity: Option<IdentityFiles>,
    /// Authorities that are trusted.
    pub authorities: Option<PathBuf>,
    /// Whether clients and peers need a certificate.
    pub verify_clients: bool,
}

/// Limits of resync.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ResyncConfig {
    /// Chunks that a resyncing store pulls at once.
    pub max_inflight: usize,
    /// Most bytes per second that it pulls; `None` is no limit.
    pub bytes_per_s: Option<u64>,
}

impl Config {
    /// Whether all addresses at which the node listens are `tls://` ones: then it reaches others in no other way either.
    #[must_use]
    pub fn is_tls_only(&self) -> bool {
        self.listen.iter().all(|address| address.transport() == TransportKind::Tls)
    }

    /// Most connections that have not said which pool they want: the others are for those who have.
    #[must_use]
    pub fn max_strangers(&self) -> usize {
        (self.max_connections / 4).max(1)
    }

    /// Checks complete settings.
    ///
    /// # Errors
    /// The first rule that is broken, or the first setting without a value.
    pub fn new(settings: &Settings) -> Result<Self, ConfigError> {
        let s = settings.clone();
        let config = Self {
            node_name: given("node_name", s.node_name)?,
            listen: given("listen", s.listen)?,
            advertise: given("advertise", s.advertise)?,
            admin: given("admin", s.admin)?,
            admin_names: given("admin_names", s.admin_names)?,
            stores: given("stores", s.stores)?,
            store_dir: s.store_dir,
            max_stores: given("max_stores", s.max_stores)?.as_usize(),
            store_places: given("store_places", s.store_places)?,
            shards: given("shards", s.shards)?.as_usize(),
            buffer_memory: given("buffer_memory", s.buffer_memory)?.0,
            engine: given("engine", s.engine)?,
            max_connections: given("max_connections", s.max_connections)?.as_usize(),
            max_connections_per_address: given("max_connections_per_address", s.max_connections_per_address)?
                .as_usize(),
            leg_timeout: Duration::from_millis(given("leg_timeout_ms", s.leg_timeout_ms)?.get()),
            idle_timeout: given("idle_timeout_s", s.idle_timeout_s)?.seconds(),
            intent_idle: given("intent_idle_s", s.intent_idle_s)?.seconds(),
            stop_timeout: given("stop_timeout_s", s.stop_timeout_s)?.seconds(),
            resync: ResyncConfig {
                max_inflight: given("resync.max_inflight", s.resync.max_inflight)?.as_usize(),
                bytes_per_s: Some(given("resync.bytes_per_s", s.resync.bytes_per_s)?.0).filter(|&b| b > 0),
            },
            admin_limits: AdminLimits {
                max_connections: given("admin_limits.max_connections", s.admin_limits.max_connections)?
                    .as_usize(),
                max_body: given("admin_limits.max_body", s.admin_limits.max_body)?.as_usize(),
                request_timeout: given("admin_limits.request_timeout_s", s.admin_limits.request_timeout_s)?
                    .seconds(),
            },
            keys: KeysConfig {
                directory: s.keys.directory,
                required: given("keys.required", s.keys.required)?,
            },
            tls: tls(s.tls)?,
            log_format: given("log.format", s.log.format)?,
            log_level: given("log.level", s.log.level)?,
        };
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        check_node_name(&self.node_name)?;
        check_listen(&self.listen)?;
        let tls = self.listen.iter().find(|a| a.transport() == TransportKind::Tls);
        if let Some(address) = tls.filter(|_| self.tls.identity.is_none()) {
            let problem = format!("{address}: tls needs a certificate and a key, expected both in [tls]");
            return Err(ConfigError::value("listen", problem));
        }
        check_advertise(&self.advertise)?;
        check_distinct("stores", &self.stores, |p| p.display().to_string())?;
        if let Some(place) = self.store_places.iter().find(|place| !place.is_absolute()) {
            let problem = format!("{}: expected an absolute path", place.display());
            return Err(ConfigError::value("store_places", problem));
        }
        if let Some(name) = self.admin_names.iter().find(|name| !is_host_name(name)) {
            let problem = format!("'{name}': expected a host name or IP address without a port");
            return Err(ConfigError::value("admin_names", problem));
        }
        let memory = ByteSize(self.buffer_memory);
        if !(MIN_BUFFER_MEMORY..=MAX_BUFFER_MEMORY).contains(&memory) || !memory.0.is_multiple_of(4096) {
            let problem = format!(
                "{memory}: expected {MIN_BUFFER_MEMORY} to {MAX_BUFFER_MEMORY}, a multiple of 4096 bytes"
            );
            return Err(ConfigError::value("buffer_memory", problem));
        }
        if let Some(dir) = self.keys.directory.as_ref().filter(|dir| !dir.is_dir()) {
            let problem = format!("{} is no directory; create it first, with mode 0700", dir.display());
            return Err(ConfigError::value("keys.directory", problem));
        }
        if self.keys.required && self.keys.directory.is_none() {
            let problem = "true needs keys.directory, and there is none";
            return Err(ConfigError::value("keys.required", problem));
        }
        match &self.store_dir {
            Some(dir) if !dir.is_dir() => {
                let problem = format!("{} is no directory; create it first", dir.display());
                Err(ConfigError::value("store_dir", problem))
            }
            _ => Ok(()),
        }
    }

    /// The addresses to tell others, given those that were really bound (port 0 has become a port).
    ///
    /// Without `advertise`, a bound address is told as it is; one that stands for every address of the machine, such
    /// as 0.0.0.0, is told as the address from which this machine would leave to the world.
    ///
    /// # Errors
    /// When no address can be derived, as on a machine without a route.
    pub fn advertised(&self, bound: &[Address]) -> Result<Vec<Address>, ConfigError> {
        if !self.advertise.is_empty() {
            return Ok(self.advertise.clone());
        }
        bound
            .iter()
            .map(|address| match wildcard(address) {
                None => Ok(address.clone()),
                Some(family) => outward_address(family).map(|ip| with_host(address, ip)).ok_or_else(|| {
                    let problem = format!(
                        "{address} stands for every address of this machine, and it has no route from which to \
                         tell its own; set advertise to the address that other machines use"
                    );
                    ConfigError::value("advertise", problem)
                }),
            })
            .collect()
    }

    /// The devices and files to open at start: `stores`, then `*.store` of the store directory by name, none twice.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn stores_to_open(&self) -> Result<Vec<PathBuf>, ConfigError> {
        let mut paths = self.stores.clone();
        if let Some(dir) = &self.store_dir {
            let fail = |e: io::Error| ConfigError::value("store_dir", format!("{}: {e}", dir.display()));
            let mut found = BTreeSet::new();
            for entry in std::fs::read_dir(dir).map_err(fail)? {
                let path = entry.map_err(fail)?.path();
                if path.extension().is_some_and(|e| e == STORE_EXTENSION) {
                    found.insert(path);
                }
            }
            paths.extend(found.into_iter().filter(|p| !self.stores.contains(p)));
        }
        Ok(paths)
    }

    /// Whether a path is one of those that the store directory is searched for at the start.
    #[must_use]
    pub fn is_in_store_dir(&self, path: &Path) -> bool {
        let is_store = path.extension().is_some_and(|e| e == STORE_EXTENSION);
        is_store && self.store_dir.is_some() && path.parent() == self.store_dir.as_deref()
    }

    /// Host names by which callers of the admin API may call this node: its own, those of its addresses, and those that are
    /// configured.
    #[must_use]
    pub fn known_names(&self) -> Vec<String> {
        let addresses = self.listen.iter().chain(&self.advertise).map(|address| address.host().to_owned());
        let own = [self.node_name.clone(), host_name().unwrap_or_default()];
        own.into_iter().chain(addresses).chain(self.admin_names.iter().cloned()).collect()
    }

    /// Where a new store of this member goes when the request names no path; `None` without a store directory.
    #[must_use]
    pub fn new_store_path(&self, pool: PoolId, member: MemberId) -> Option<PathBuf> {
        self.store_dir.as_ref().map(|dir| dir.join(format!("{pool}-{member}.{STORE_EXTENSION}")))
    }
}

fn given<T>(key: &'static str, value: Option<T>) -> Result<T, ConfigError> {
    value.ok_or_else(|| ConfigError::value(key, "no value"))
}

fn is_host_name(name: &str) -> bool {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    name.parse::<IpAddr>().is_ok() || !name.is_empty() && name.chars().all(good)
}

fn host_name() -> Result<String, ConfigError> {
    let fail = |problem: String| {
        ConfigError::value("node_name", format!("the host name cannot be used ({problem}); set node_name"))
    };
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname").map_err(|e| fail(e.to_string()))?;
    let name = name.trim_end().to_owned();
    check_node_name(&name).map_err(|e| fail(e.to_string()))?;
    Ok(name)
}

fn tls(settings: TlsSettings) -> Result<TlsConfig, ConfigError> {
    let TlsSettings { certificate, key, authorities, verify_clients } = settings;
    let identity = match (certificate, key) {
        (Some(certificate), Some(key)) => Some(IdentityFiles { certificate, key }),
        (None, None) => None,
        _ => return Err(ConfigError::value("tls", "expected certificate and key, found only one of them")),
    };
    let verify_clients = verify_clients.unwrap_or(false);
    if verify_clients && authorities.is_none() {
        return Err(ConfigError::value("tls", "verify_clients needs authorities, and there are none"));
    }
    Ok(TlsConfig { identity, authorities, verify_clients })
}

fn check_node_name(name: &str) -> Result<(), ConfigError> {
    let good = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if !name.is_empty() && name.len() <= 64 && name.chars().all(good) {
        return Ok(());
    }
    Err(ConfigError::value("node_name", format!("'{name}': expected 1 to 64 of A-Z a-z 0-9 . _ -")))
}

fn check_listen(listen: &[Address]) -> Result<(), ConfigError> {
    if listen.is_empty() {
        return Err(ConfigError::value(
            "listen",
            "no address: expected at least one, e.g. tcp://0.0.0.0:7700",
        ));
    }
    check_distinct("listen", listen, Address::to_string)?;
    for address in listen {
        if address.host().parse::<IpAddr>().is_err() {
            let problem = format!("{address}: expected a numeric IP address of this machine, or 0.0.0.0");
            return Err(ConfigError::value("listen", problem));
        }
    }
    Ok(())
}

fn check_advertise(advertise: &[Address]) -> Result<(), ConfigError> {
    check_distinct("advertise", advertise, Address::to_string)?;
    for address in advertise {
        if wildcard(address).is_some() {
            let problem = format!(
                "{address} stands for every address of this machine and means nothing to others; expected the \
                 address that other machines use"
            );
            return Err(ConfigError::value("advertise", problem));
        }
        if address.port() == 0 {
            return Err(ConfigError::value("advertise", format!("{address}: port 0 cannot be connected to")));
        }
    }
    Ok(())
}

fn check_distinct<T: PartialEq>(
    key: &'static str,
    values: &[T],
    print: impl Fn(&T) -> String,
) -> Result<(), ConfigError> {
    for (i, value) in values.iter().enumerate() {
        if values[..i].contains(value) {
            return Err(ConfigError::value(key, format!("{} is given twice", print(value))));
        }
    }
    Ok(())
}

/// The unspecified address (0.0.0.0 or ::) that an address has as its host, if it has.
fn wildcard(address: &Address) -> Option<IpAddr> {
    address.host().parse::<IpAddr>().ok().filter(IpAddr::is_unspecified)
}

/// The local address from which a packet to the world would leave. Connecting a UDP socket sends nothing.
fn outward_address(family: IpAddr) -> Option<IpAddr> {
    let local = |bind: IpAddr, to: IpAddr| -> io::Result<IpAddr> {
        let socket = UdpSocket::bind((bind, 0))?;
        socket.connect((to, 9))?;
        Ok(socket.local_addr()?.ip())
    };
    // Addresses reserved for documentation (RFC 5737, RFC 3849): routed by the default route like any other.
    let v4 = || local(Ipv4Addr::UNSPECIFIED.into(), Ipv4Addr::new(192, 0, 2, 1).into()).ok();
    let v6 =
        || local(Ipv6Addr::UNSPECIFIED.into(), Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1).into()).ok();
    // A socket on :: takes IPv4 callers too.
    let found = if family.is_ipv4() { v4() } else { v6().or_else(v4) };
    found.filter(|ip| !ip.is_unspecified())
}

fn with_host(address: &Address, ip: IpAddr) -> Address {
    let host = match ip {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    };
    format!("{}://{host}:{}", address.transport(), address.port())
        .parse()
        .expect("a numeric host and a port make an address")
}

#[cfg(test)]
mod tests;
