//! What a person wrote: the TOML file and the flags, each value optional.

use std::fmt;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use rmr_common::pool::Address;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::values::{Bounded, EngineChoice, LogFormat, LogLevel};
use super::{DEFAULT_ADMIN_PORT, DEFAULT_DATA_PORT, host_name};
use crate::store::ByteSize;

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
    /// Host names by which callers of the admin API may call this node, besides its own, comma-separated
    #[arg(long, value_name = "NAME,…", value_delimiter = ',')]
    pub admin_names: Option<Vec<String>>,
    /// Devices or files of stores to open at start, comma-separated
    #[arg(long, value_name = "PATH,…", value_delimiter = ',')]
    pub stores: Option<Vec<PathBuf>>,
    /// Directory of file stores: all *.store in it are opened, new pools get files in it
    #[arg(long, value_name = "DIRECTORY")]
    pub store_dir: Option<PathBuf>,
    /// Most stores that are open at once, 1 to 65535 [default: 16384]
    #[arg(long, value_name = "N")]
    pub max_stores: Option<Bounded<1, 65_535>>,
    /// Devices, files and directories on which rmrctl may make stores, besides --store-dir and --stores, comma-separated
    #[arg(long, value_name = "PATH,…", value_delimiter = ',')]
    pub store_places: Option<Vec<PathBuf>>,
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
    /// Most of them from one address, 1 to 65536 [default: three quarters of --max-connections]
    #[arg(long, value_name = "N")]
    pub max_connections_per_address: Option<Bounded<1, 65_536>>,
    /// Drop a connection on which sent data stays unacknowledged this long, in ms, 100 to 600000 [default: 5000]
    #[arg(long, value_name = "MS")]
    pub leg_timeout_ms: Option<Bounded<100, 600_000>>,
    /// Close a connection that has not said which pool it wants, and proved the key, after this long in s, 1 to 86400 [default: 5]
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
    /// Keys of pools.
    #[command(flatten)]
    pub keys: KeySettings,
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

/// Table `[keys]`: authentication by the key of a pool.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize, clap::Args)]
#[serde(deny_unknown_fields, default)]
pub struct KeySettings {
    /// Directory of keys: a pool with a file POOL.key in it, by its uuid or name, is served to who has that key, and to nobody else
    #[arg(id = "key-dir", long = "key-dir", value_name = "DIRECTORY")]
    pub directory: Option<PathBuf>,
    /// Let nobody in to a pool without a key, true or false [default: false]
    #[arg(id = "keys-required", long = "keys-required", value_name = "BOOL")]
    pub required: Option<bool>,
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
    pub(super) fn value(key: &'static str, problem: impl fmt::Display) -> Self {
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
            admin_names: self.admin_names.or(base.admin_names),
            stores: self.stores.or(base.stores),
            store_dir: self.store_dir.or(base.store_dir),
            max_stores: self.max_stores.or(base.max_stores),
            store_places: self.store_places.or(base.store_places),
            shards: self.shards.or(base.shards),
            buffer_memory: self.buffer_memory.or(base.buffer_memory),
            engine: self.engine.or(base.engine),
            max_connections: self.max_connections.or(base.max_connections),
            max_connections_per_address: self
                .max_connections_per_address
                .or(base.max_connections_per_address),
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
            keys: KeySettings {
                directory: self.keys.directory.or(base.keys.directory),
                required: self.keys.required.or(base.keys.required),
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
        let max_connections = self.max_connections.unwrap_or(Bounded::of::<256>());
        Ok(self.over(Self {
            node_name: Some(node_name),
            listen: Some(vec![Address::tcp("0.0.0.0", DEFAULT_DATA_PORT)]),
            advertise: Some(Vec::new()),
            admin: Some(SocketAddr::from((Ipv4Addr::LOCALHOST, DEFAULT_ADMIN_PORT))),
            admin_names: Some(Vec::new()),
            stores: Some(Vec::new()),
            // No default: a node that is given no directory makes no files anywhere.
            store_dir: None,
            max_stores: Some(Bounded::of::<16_384>()),
            store_places: Some(Vec::new()),
            shards: Some(Bounded::of::<1>()),
            buffer_memory: Some(ByteSize(64 << 20)),
            engine: Some(EngineChoice::default()),
            max_connections: Some(max_connections),
            // One machine does not keep all others out.
            max_connections_per_address: Some(max_connections.three_quarters()),
            leg_timeout_ms: Some(Bounded::of::<5_000>()),
            idle_timeout_s: Some(Bounded::of::<5>()),
            intent_idle_s: Some(Bounded::of::<5>()),
            stop_timeout_s: Some(Bounded::of::<20>()),
            resync: ResyncSettings { max_inflight: Some(Bounded::of::<8>()), bytes_per_s: Some(ByteSize(0)) },
            admin_limits: AdminSettings {
                max_connections: Some(Bounded::of::<32>()),
                max_body: Some(Bounded::of::<{ 256 << 10 }>()),
                request_timeout_s: Some(Bounded::of::<60>()),
            },
            // No directory: pools have no keys.
            keys: KeySettings { directory: None, required: Some(false) },
            // No defaults: without certificates there are no tls:// addresses.
            tls: TlsSettings::default(),
            log: LogSettings { format: Some(LogFormat::default()), level: Some(LogLevel::default()) },
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
