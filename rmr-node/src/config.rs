//! Settings of `rmr-node`: a TOML file, flags that override it, defaults, and a limit for every queue.
//!
//! [`Settings`] is what a person wrote, each value optional; [`Config`] is what the service runs with, complete and
//! checked. `docs/configuration.md` explains each value and what it costs.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::time::Duration;

use rmr_common::pool::{Address, MemberId, PoolId, TransportKind};
use rmr_common::transport::tls::IdentityFiles;
use serde::{Deserialize, Deserializer, Serialize};
use thiserror::Error;

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

/// A whole number from `MIN` to `MAX`; anything else is refused where it is read, so the error shows the line or flag.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
#[serde(transparent)]
pub struct Bounded<const MIN: u64, const MAX: u64>(u64);

impl<const MIN: u64, const MAX: u64> Bounded<MIN, MAX> {
    /// The number.
    #[must_use]
    pub const fn get(self) -> u64 {
        self.0
    }

    /// The number as an index or a count; the limits of all settings fit.
    const fn as_usize(self) -> usize {
        const { assert!(MAX <= u32::MAX as u64, "limits of counts are below 2^32") };
        #[expect(
            clippy::cast_possible_truncation,
            reason = "MAX is below 2^32, and a usize has 64 bits here"
        )]
        let count = self.0 as usize;
        count
    }

    const fn seconds(self) -> Duration {
        Duration::from_secs(self.0)
    }

    fn check(number: i128) -> Result<Self, String> {
        u64::try_from(number)
            .ok()
            .filter(|n| (MIN..=MAX).contains(n))
            .map(Self)
            .ok_or_else(|| format!("{number}: expected a whole number from {MIN} to {MAX}"))
    }
}

impl<const MIN: u64, const MAX: u64> FromStr for Bounded<MIN, MAX> {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let number = text
            .parse::<i128>()
            .map_err(|_| format!("'{text}': expected a whole number from {MIN} to {MAX}"))?;
        Self::check(number)
    }
}

impl<'de, const MIN: u64, const MAX: u64> Deserialize<'de> for Bounded<MIN, MAX> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let number = i64::deserialize(deserializer)?;
        Self::check(number.into()).map_err(serde::de::Error::custom)
    }
}

/// Which disk engine to use.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// io_uring where the kernel has it, else inline, with a warning.
    #[default]
    Auto,
    /// io_uring, or refuse to start.
    Uring,
    /// System calls on the I/O thread; slow disks delay everything on that shard.
    Inline,
}

/// Form of the log.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// A line for people.
    #[default]
    Text,
    /// A JSON object per line.
    Json,
}

/// Which events the log has: a level, or `tracing` directives such as `info,rmr_node::service=debug`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct LogLevel(String);

impl LogLevel {
    /// The directives, known to be well-formed.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for LogLevel {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let fail = |reason: &str| {
            format!(
                "log level '{text}': {reason}; expected error, warn, info, debug, trace, \
                 or directives such as info,rmr_node=debug"
            )
        };
        // A lone word that is no level would be taken as the name of a module, and nothing would be logged.
        for directive in text.split(',').map(str::trim).filter(|d| !d.contains(['=', '['])) {
            directive
                .parse::<tracing_subscriber::filter::LevelFilter>()
                .map_err(|_| fail("no such level"))?;
        }
        text.parse::<tracing_subscriber::filter::targets::Targets>().map_err(|e| fail(&e.to_string()))?;
        Ok(Self(text.to_owned()))
    }
}

impl TryFrom<String> for LogLevel {
    type Error = String;

    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<LogLevel> for String {
    fn from(level: LogLevel) -> Self {
        level.0
    }
}

/// What a person wrote, in the file or as flags; what is absent has a default.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct Settings {
    /// Name of this node in status output and logs [default: the host name]
    #[arg(long, value_name = "NAME")]
    pub node_name: Option<String>,
    /// Data addresses, comma-separated: tcp://, tls:// or rdma://HOST:PORT [default: tcp://0.0.0.0:7700]
    #[arg(long, value_name = "ADDRESS,…", value_delimiter = ',')]
    pub listen: Option<Vec<Address>>,
    /// Data addresses that other machines use, the first one for new pools [default: derived from --listen]
    #[arg(long, value_name = "ADDRESS,…", value_delimiter = ',')]
    pub advertise: Option<Vec<Address>>,
    /// Where the admin API listens [default: 127.0.0.1:7701]
    #[arg(long, value_name = "IP:PORT")]
    pub admin: Option<SocketAddr>,
    /// Devices or files of stores to open at start, comma-separated
    #[arg(long, value_name = "PATH,…", value_delimiter = ',')]
    pub stores: Option<Vec<PathBuf>>,
    /// Directory of file stores: all *.store in it are opened, new pools get files in it
    #[arg(long, value_name = "DIRECTORY")]
    pub store_dir: Option<PathBuf>,
    /// I/O threads, 1 to 64 [default: 1]
    #[arg(long, value_name = "N")]
    pub shards: Option<Bounded<1, 64>>,
    /// Buffer memory of each shard, 8M to 64G [default: 64M]
    #[arg(long, value_name = "SIZE")]
    pub buffer_memory: Option<ByteSize>,
    /// Disk engine [default: auto]
    #[arg(long, value_enum, value_name = "ENGINE")]
    pub engine: Option<EngineChoice>,
    /// Most data connections, 1 to 65536 [default: 256]
    #[arg(long, value_name = "N")]
    pub max_connections: Option<Bounded<1, 65_536>>,
    /// Drop a connection on which sent data stays unacknowledged this long, in ms, 100 to 600000 [default: 5000]
    #[arg(long, value_name = "MS")]
    pub leg_timeout_ms: Option<Bounded<100, 600_000>>,
    /// Close a connection that is attached to no pool and says nothing this long, in s, 1 to 86400 [default: 60]
    #[arg(long, value_name = "SECONDS")]
    pub idle_timeout_s: Option<Bounded<1, 86_400>>,
    /// Clear the intent bit of a chunk that had no write for this long, in s, 1 to 3600 [default: 5]
    #[arg(long, value_name = "SECONDS")]
    pub intent_idle_s: Option<Bounded<1, 3_600>>,
    /// Longest graceful stop in s, 1 to 600 [default: 20]
    #[arg(long, value_name = "SECONDS")]
    pub stop_timeout_s: Option<Bounded<1, 600>>,
    /// Limits of resync.
    #[command(flatten)]
    pub resync: ResyncSettings,
    /// Limits of the admin API.
    #[command(flatten)]
    pub admin_limits: AdminSettings,
    /// Certificates.
    #[command(flatten)]
    pub tls: TlsSettings,
    /// The log.
    #[command(flatten)]
    pub log: LogSettings,
}

/// Table `[resync]`.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct ResyncSettings {
    /// Chunks that a resyncing store pulls at once, 1 to 1024 [default: 8]
    #[arg(id = "resync-max-inflight", long = "resync-max-inflight", value_name = "N")]
    pub max_inflight: Option<Bounded<1, 1024>>,
    /// Most bytes per second that a resyncing store pulls, 0 for no limit [default: 0]
    #[arg(id = "resync-bytes-per-s", long = "resync-bytes-per-s", value_name = "SIZE")]
    pub bytes_per_s: Option<ByteSize>,
}

/// Table `[admin_limits]`.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct AdminSettings {
    /// Admin connections served at once, 1 to 1024 [default: 32]
    #[arg(id = "admin-max-connections", long = "admin-max-connections", value_name = "N")]
    pub max_connections: Option<Bounded<1, 1024>>,
    /// Largest body of an admin request in bytes, 4096 to 16777216 [default: 262144]
    #[arg(id = "admin-max-body", long = "admin-max-body", value_name = "BYTES")]
    pub max_body: Option<Bounded<4096, 16_777_216>>,
    /// Longest time of an admin request in s, 1 to 3600 [default: 60]
    #[arg(id = "admin-request-timeout-s", long = "admin-request-timeout-s", value_name = "SECONDS")]
    pub request_timeout_s: Option<Bounded<1, 3_600>>,
}

/// Table `[tls]`: files in PEM form, for `tls://` addresses.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct TlsSettings {
    /// Certificate of this node, and those between it and the authority; it has to name the host of its addresses
    #[arg(id = "tls-certificate", long = "tls-certificate", value_name = "FILE")]
    pub certificate: Option<PathBuf>,
    /// Private key of the certificate
    #[arg(id = "tls-key", long = "tls-key", value_name = "FILE")]
    pub key: Option<PathBuf>,
    /// Authorities whose certificates are trusted: those of other nodes, and with --tls-verify-clients those of clients
    #[arg(id = "tls-authorities", long = "tls-authorities", value_name = "FILE")]
    pub authorities: Option<PathBuf>,
    /// Let nobody in over tls:// without a certificate of one of the authorities, true or false [default: false]
    #[arg(id = "tls-verify-clients", long = "tls-verify-clients", value_name = "BOOL")]
    pub verify_clients: Option<bool>,
}

/// Table `[log]`.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct LogSettings {
    /// Form of the log [default: text]
    #[arg(id = "log-format", long = "log-format", value_enum, value_name = "FORMAT")]
    pub format: Option<LogFormat>,
    /// What to log: a level or directives [default: info]
    #[arg(id = "log-level", long = "log-level", value_name = "LEVEL", env = "RMR_LOG")]
    pub level: Option<LogLevel>,
}

/// Why the settings are refused.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("configuration file {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The file is no TOML, has unknown keys or values out of range; the text shows the line.
    #[error("configuration file {}: {text}", path.display())]
    Parse {
        /// The file.
        path: PathBuf,
        /// What is wrong, with the line.
        text: String,
    },
    /// A value breaks a rule.
    #[error("{key}: {problem}")]
    Value {
        /// Name of the setting as in the file.
        key: &'static str,
        /// What was expected and found.
        problem: String,
    },
}

impl ConfigError {
    fn value(key: &'static str, problem: impl fmt::Display) -> Self {
        Self::Value { key, problem: problem.to_string() }
    }
}

impl Settings {
    /// Reads a TOML file.
    ///
    /// # Errors
    /// When it cannot be read, or something in it is unknown or malformed.
    pub fn read(path: &Path) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path)
            .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text).map_err(|e| ConfigError::Parse {
            path: path.to_owned(),
            text: e.to_string().trim_end().to_owned(),
        })
    }

    /// Reads the text of a TOML file.
    ///
    /// # Errors
    /// The first thing that is unknown or malformed, with its line.
    pub fn parse(text: &str) -> Result<Self, toml::de::Error> {
        toml::from_str(text)
    }

    /// These settings where given, else those of `base`: flags over file.
    #[must_use]
    pub fn over(self, base: Self) -> Self {
        Self {
            node_name: self.node_name.or(base.node_name),
            listen: self.listen.or(base.listen),
            advertise: self.advertise.or(base.advertise),
            admin: self.admin.or(base.admin),
            stores: self.stores.or(base.stores),
            store_dir: self.store_dir.or(base.store_dir),
            shards: self.shards.or(base.shards),
            buffer_memory: self.buffer_memory.or(base.buffer_memory),
            engine: self.engine.or(base.engine),
            max_connections: self.max_connections.or(base.max_connections),
            leg_timeout_ms: self.leg_timeout_ms.or(base.leg_timeout_ms),
            idle_timeout_s: self.idle_timeout_s.or(base.idle_timeout_s),
            intent_idle_s: self.intent_idle_s.or(base.intent_idle_s),
            stop_timeout_s: self.stop_timeout_s.or(base.stop_timeout_s),
            resync: ResyncSettings {
                max_inflight: self.resync.max_inflight.or(base.resync.max_inflight),
                bytes_per_s: self.resync.bytes_per_s.or(base.resync.bytes_per_s),
            },
            admin_limits: AdminSettings {
                max_connections: self.admin_limits.max_connections.or(base.admin_limits.max_connections),
                max_body: self.admin_limits.max_body.or(base.admin_limits.max_body),
                request_timeout_s: self
                    .admin_limits
                    .request_timeout_s
                    .or(base.admin_limits.request_timeout_s),
            },
            tls: TlsSettings {
                certificate: self.tls.certificate.or(base.tls.certificate),
                key: self.tls.key.or(base.tls.key),
                authorities: self.tls.authorities.or(base.tls.authorities),
                verify_clients: self.tls.verify_clients.or(base.tls.verify_clients),
            },
            log: LogSettings {
                format: self.log.format.or(base.log.format),
                level: self.log.level.or(base.log.level),
            },
        }
    }

    /// Puts the default in place of everything absent.
    ///
    /// # Errors
    /// When the name of the host, the default of `node_name`, cannot be had.
    pub fn with_defaults(self) -> Result<Self, ConfigError> {
        let node_name = match &self.node_name {
            Some(name) => name.clone(),
            None => host_name()?,
        };
        Ok(self.over(Self {
            node_name: Some(node_name),
            listen: Some(vec![Address::tcp("0.0.0.0", DEFAULT_DATA_PORT)]),
            advertise: Some(Vec::new()),
            admin: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_ADMIN_PORT))),
            stores: Some(Vec::new()),
            // No default: a node that is given no directory makes no files anywhere.
            store_dir: None,
            shards: Some(Bounded(1)),
            buffer_memory: Some(ByteSize(64 << 20)),
            engine: Some(EngineChoice::default()),
            max_connections: Some(Bounded(256)),
            leg_timeout_ms: Some(Bounded(5_000)),
            idle_timeout_s: Some(Bounded(60)),
            intent_idle_s: Some(Bounded(5)),
            stop_timeout_s: Some(Bounded(20)),
            resync: ResyncSettings { max_inflight: Some(Bounded(8)), bytes_per_s: Some(ByteSize(0)) },
            admin_limits: AdminSettings {
                max_connections: Some(Bounded(32)),
                max_body: Some(Bounded(256 << 10)),
                request_timeout_s: Some(Bounded(60)),
            },
            // No defaults: without certificates there are no tls:// addresses.
            tls: TlsSettings::default(),
            log: LogSettings { format: Some(LogFormat::default()), level: Some(LogLevel("info".to_owned())) },
        }))
    }

    /// The settings as a TOML file, as `--check-config` prints them.
    ///
    /// # Errors
    /// When a path is no UTF-8, which TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string(self)
    }
}

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
    /// Devices or files of stores to open at start.
    pub stores: Vec<PathBuf>,
    /// Directory of file stores.
    pub store_dir: Option<PathBuf>,
    /// I/O threads.
    pub shards: usize,
    /// Buffer memory of each shard in bytes, a multiple of 4096.
    pub buffer_memory: u64,
    /// Disk engine.
    pub engine: EngineChoice,
    /// Most data connections.
    pub max_connections: usize,
    /// A connection on which sent data stays unacknowledged this long is dropped.
    pub leg_timeout: Duration,
    /// A connection attached to no pool that says nothing this long is closed.
    pub idle_timeout: Duration,
    /// The intent bit of a chunk without a write for this long may be cleared.
    pub intent_idle: Duration,
    /// Longest graceful stop.
    pub stop_timeout: Duration,
    /// Limits of resync.
    pub resync: ResyncConfig,
    /// Limits of the admin API.
    pub admin_limits: AdminLimits,
    /// Certificates.
    pub tls: TlsConfig,
    /// Form of the log.
    pub log_format: LogFormat,
    /// What to log.
    pub log_level: LogLevel,
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
            stores: given("stores", s.stores)?,
            store_dir: s.store_dir,
            shards: given("shards", s.shards)?.as_usize(),
            buffer_memory: given("buffer_memory", s.buffer_memory)?.0,
            engine: given("engine", s.engine)?,
            max_connections: given("max_connections", s.max_connections)?.as_usize(),
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
        let memory = ByteSize(self.buffer_memory);
        if !(MIN_BUFFER_MEMORY..=MAX_BUFFER_MEMORY).contains(&memory) || !memory.0.is_multiple_of(4096) {
            let problem = format!(
                "{memory}: expected {MIN_BUFFER_MEMORY} to {MAX_BUFFER_MEMORY}, a multiple of 4096 bytes"
            );
            return Err(ConfigError::value("buffer_memory", problem));
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

    /// Where a new store of this member goes when the request names no path; `None` without a store directory.
    #[must_use]
    pub fn new_store_path(&self, pool: PoolId, member: MemberId) -> Option<PathBuf> {
        self.store_dir.as_ref().map(|dir| dir.join(format!("{pool}-{member}.{STORE_EXTENSION}")))
    }
}

fn given<T>(key: &'static str, value: Option<T>) -> Result<T, ConfigError> {
    value.ok_or_else(|| ConfigError::value(key, "no value"))
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
mod tests {
    use super::*;

    fn config(text: &str) -> Result<Config, ConfigError> {
        Config::new(&Settings::parse(text).unwrap().with_defaults()?)
    }

    fn tcp(host: &str, port: u16) -> Address {
        Address::tcp(host, port)
    }

    #[test]
    fn an_empty_file_gives_the_documented_defaults() {
        let c = config("").unwrap();
        assert_eq!(c.listen, [tcp("0.0.0.0", 7700)]);
        assert_eq!(c.admin, "127.0.0.1:7701".parse().unwrap());
        assert_eq!((c.shards, c.buffer_memory, c.max_connections), (1, 64 << 20, 256));
        assert_eq!((c.engine, c.intent_idle), (EngineChoice::Auto, Duration::from_secs(5)));
        assert_eq!(c.resync, ResyncConfig { max_inflight: 8, bytes_per_s: None });
        assert_eq!(c.log_level.as_str(), "info");
        assert!(!c.node_name.is_empty());
    }

    #[test]
    fn a_full_file_is_read() {
        let c = config(
            r#"
            node_name = "node-a"
            listen = ["tcp://10.0.0.1:7700", "[::1]:7700"]
            advertise = ["tcp://node-a.example:7700"]
            admin = "10.0.0.1:7701"
            stores = ["/dev/vdb"]
            shards = 4
            buffer_memory = "128M"
            engine = "inline"
            max_connections = 10
            leg_timeout_ms = 700
            idle_timeout_s = 7
            intent_idle_s = 2
            stop_timeout_s = 3
            [resync]
            max_inflight = 2
            bytes_per_s = "100M"
            [admin_limits]
            max_connections = 4
            max_body = 8192
            request_timeout_s = 9
            [log]
            format = "json"
            level = "warn,rmr_node=trace"
            "#,
        )
        .unwrap();
        assert_eq!(c.listen, [tcp("10.0.0.1", 7700), tcp("::1", 7700)]);
        assert_eq!(c.buffer_memory, 128 << 20);
        assert_eq!((c.leg_timeout, c.idle_timeout), (Duration::from_millis(700), Duration::from_secs(7)));
        assert_eq!(c.resync, ResyncConfig { max_inflight: 2, bytes_per_s: Some(100 << 20) });
        assert_eq!((c.admin_limits.max_connections, c.admin_limits.max_body), (4, 8192));
        assert_eq!((c.log_format, c.log_level.as_str()), (LogFormat::Json, "warn,rmr_node=trace"));
    }

    #[test]
    fn what_cannot_be_parsed_is_refused_with_its_line() {
        let table = [
            ("shards = 1\nshard = 2", "line 2", "unknown field `shard`"),
            ("[resync]\nmax_in_flight = 2", "line 2", "unknown field `max_in_flight`"),
            ("[logs]", "line 1", "unknown field `logs`"),
            ("\n\nshards = 0", "line 3", "0: expected a whole number from 1 to 64"),
            ("shards = -1", "line 1", "-1: expected a whole number from 1 to 64"),
            ("shards = \"many\"", "line 1", "invalid type"),
            ("max_connections = 70000", "line 1", "from 1 to 65536"),
            ("leg_timeout_ms = 1", "line 1", "from 100 to 600000"),
            ("idle_timeout_s = 0", "line 1", "from 1 to 86400"),
            ("intent_idle_s = 0", "line 1", "from 1 to 3600"),
            ("stop_timeout_s = 0", "line 1", "from 1 to 600"),
            ("[resync]\nmax_inflight = 0", "line 2", "from 1 to 1024"),
            ("[resync]\nbytes_per_s = \"1 GB\"", "line 2", "is no size"),
            ("[admin_limits]\nmax_connections = 0", "line 2", "from 1 to 1024"),
            ("[admin_limits]\nmax_body = 1", "line 2", "from 4096 to 16777216"),
            ("[admin_limits]\nrequest_timeout_s = 0", "line 2", "from 1 to 3600"),
            ("buffer_memory = \"64MB\"", "line 1", "is no size"),
            ("engine = \"fast\"", "line 1", "unknown variant `fast`"),
            ("listen = [\"http://a:1\"]", "line 1", "the scheme is neither tcp nor tls nor rdma"),
            ("admin = \"localhost\"", "line 1", "invalid socket address"),
            ("[log]\nformat = \"xml\"", "line 2", "unknown variant `xml`"),
            ("[log]\nlevel = \"loud\"", "line 2", "no such level"),
            ("[log]\nlevel = \"rmr_node=loud\"", "line 2", "log level 'rmr_node=loud'"),
            ("shards = ", "line 1", ""),
        ];
        for (text, line, problem) in table {
            let error = Settings::parse(text).expect_err(text).to_string();
            assert!(error.contains(line) && error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn what_breaks_a_rule_is_refused_by_name() {
        let table = [
            ("node_name = \"\"", "node_name: '': expected 1 to 64"),
            ("node_name = \"a b\"", "node_name: 'a b'"),
            ("listen = []", "listen: no address"),
            ("listen = [\"a:1\"]", "listen: tcp://a:1: expected a numeric IP address"),
            (
                "listen = [\"tls://10.0.0.1:1\"]",
                "listen: tls://10.0.0.1:1: tls needs a certificate and a key",
            ),
            ("[tls]\nkey = \"k\"", "tls: expected certificate and key, found only one"),
            ("[tls]\nverify_clients = true", "tls: verify_clients needs authorities"),
            ("listen = [\"10.0.0.1:1\", \"tcp://10.0.0.1:1\"]", "listen: tcp://10.0.0.1:1 is given twice"),
            ("advertise = [\"0.0.0.0:7700\"]", "advertise: tcp://0.0.0.0:7700 stands for every address"),
            ("advertise = [\"[::]:7700\"]", "advertise: tcp://[::]:7700 stands for every address"),
            ("advertise = [\"a:0\"]", "advertise: tcp://a:0: port 0"),
            ("stores = [\"/a\", \"/a\"]", "stores: /a is given twice"),
            ("buffer_memory = 1", "buffer_memory: 1 bytes: expected 8 MiB to 64 GiB"),
            ("buffer_memory = \"65G\"", "buffer_memory: 65 GiB: expected 8 MiB to 64 GiB"),
            ("buffer_memory = 8388609", "a multiple of 4096 bytes"),
            ("store_dir = \"/nonexistent\"", "store_dir: /nonexistent is no directory"),
        ];
        for (text, problem) in table {
            let error = config(text).expect_err(text).to_string();
            assert!(error.contains(problem), "{text}: {error}");
        }
    }

    #[test]
    fn a_missing_file_is_named() {
        let error = Settings::read(Path::new("/nonexistent.toml")).unwrap_err().to_string();
        assert_eq!(error, "configuration file /nonexistent.toml: No such file or directory (os error 2)");
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let file = Settings::parse("shards = 2\nnode_name = \"file\"\n[resync]\nmax_inflight = 3").unwrap();
        let flags = Settings {
            node_name: Some("flag".into()),
            resync: ResyncSettings { bytes_per_s: Some(ByteSize(5)), ..ResyncSettings::default() },
            ..Settings::default()
        };
        let c = Config::new(&flags.over(file).with_defaults().unwrap()).unwrap();
        assert_eq!((c.node_name.as_str(), c.shards), ("flag", 2));
        assert_eq!(c.resync, ResyncConfig { max_inflight: 3, bytes_per_s: Some(5) });
    }

    #[test]
    fn the_printed_configuration_reads_back_as_itself() {
        let full = Settings::parse("[log]\nlevel = \"debug\"").unwrap().with_defaults().unwrap();
        let printed = full.to_toml().unwrap();
        assert_eq!(Settings::parse(&printed).unwrap(), full, "{printed}");
        assert!(printed.contains("intent_idle_s = 5"), "{printed}");
    }

    #[test]
    fn every_setting_but_the_store_directory_has_a_default() {
        let defaults = toml::Table::try_from(Settings::default().with_defaults().unwrap()).unwrap();
        let documented = include_str!("../../docs/configuration.md");
        let mut keys = Vec::new();
        for (key, value) in &defaults {
            match value.as_table() {
                Some(table) => keys.extend(table.keys().map(|k| format!("{key}.{k}"))),
                None => keys.push(key.clone()),
            }
        }
        keys.push("store_dir".into());
        assert_eq!(keys.len(), 21, "{keys:?}");
        for key in keys {
            assert!(documented.contains(&format!("| `{key}` |")), "{key} is not in docs/configuration.md");
        }
    }

    #[test]
    fn what_is_advertised_comes_from_the_bound_addresses_unless_set() {
        let c = config("").unwrap();
        assert_eq!(c.advertised(&[tcp("10.0.0.1", 7000)]).unwrap(), [tcp("10.0.0.1", 7000)]);
        match c.advertised(&[tcp("0.0.0.0", 7000)]) {
            Ok(told) => {
                assert!(wildcard(&told[0]).is_none(), "{}", told[0]);
                assert_eq!(told[0].port(), 7000);
            }
            // A machine without a route has nothing to tell.
            Err(e) => assert!(e.to_string().contains("set advertise"), "{e}"),
        }
        let c = config("advertise = [\"a:1\"]").unwrap();
        assert_eq!(c.advertised(&[tcp("0.0.0.0", 7000)]).unwrap(), [tcp("a", 1)]);
        assert_eq!(with_host(&tcp("::", 5), "fe80::1".parse().unwrap()), tcp("fe80::1", 5));
    }

    #[test]
    fn stores_of_the_directory_are_opened_once_each() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["b.store", "a.store", "notes.txt"] {
            std::fs::write(dir.path().join(name), "").unwrap();
        }
        let (a, b) = (dir.path().join("a.store"), dir.path().join("b.store"));
        let text = format!("store_dir = {:?}\nstores = [\"/dev/vdb\", {b:?}]", dir.path());
        let c = config(&text).unwrap();
        assert_eq!(c.stores_to_open().unwrap(), [PathBuf::from("/dev/vdb"), b, a]);
        let (pool, member) = (PoolId::random(), MemberId::new(2).unwrap());
        assert_eq!(c.new_store_path(pool, member), Some(dir.path().join(format!("{pool}-2.store"))));
    }
}
