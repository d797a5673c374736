//! From options to settings: the file is read, the command line goes first, and every value is checked here, so that
//! the rest of the program never meets a bad one.

use std::fmt;
use std::fs;
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use rmr_common::client::{
    DEFAULT_BOUNCE_MEMORY, DEFAULT_READ_ERROR_LIMIT, DEFAULT_REJOIN_BACKOFF_MAX, DataDigest,
};
use rmr_common::pool::{Address, AddressError, MemberId, PoolId, PoolSpec};
use rmr_common::transport::rdma::ReadMode;
use rmr_common::transport::tls::IdentityFiles;
use thiserror::Error;
use uuid::Uuid;

use crate::args::{Args, DigestMode, Disconnect, LogFormat, Options};
use crate::device::DeviceOptions;
use crate::event_loop::{LoopOptions, OnDisconnect};
use crate::request::ID_LENGTH;

const MAX_QUEUES: u16 = 256;
const MAX_QUEUE_SIZE: u16 = 1024;
/// As large as any hypervisor makes its queues: a front end that asks for more than is offered may start the guest all the same, with
/// a disk that answers nothing.
const DEFAULT_QUEUE_SIZE: u16 = MAX_QUEUE_SIZE;
/// Spins are this long unless told otherwise, in microseconds: about as long as a write to two legs takes.
const DEFAULT_POLL_US: u32 = 50;
const MAX_POLL_US: u32 = 10_000;
/// An ordinary client elsewhere is refused for that long where no hypervisor comes for the pool.
const MAX_LINGER_MS: u32 = 10_000;
const MAX_TIMEOUT_S: u32 = 24 * 60 * 60;

/// Where the hypervisor connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// Listen on this path.
    Path {
        /// The path.
        path: PathBuf,
        /// Its permissions.
        mode: u32,
    },
    /// An inherited descriptor.
    Inherited(RawFd),
}

/// The pool to serve.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PoolName {
    /// By name, which the nodes resolve.
    Name(String),
    /// By identity.
    Id(PoolId),
}

impl fmt::Display for PoolName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Id(id) => id.fmt(f),
        }
    }
}

impl FromStr for PoolName {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        if let Ok(id) = Uuid::parse_str(text) {
            return Ok(Self::Id(PoolId(id)));
        }
        let expected = "a pool's uuid, or a name of letters, digits, '.', '_' and '-' that begins with a letter or digit";
        PoolSpec::validate_name(text).map_err(|_| bad("pool", text, expected))?;
        Ok(Self::Name(text.to_owned()))
    }
}

/// What the disk client is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PoolSettings {
    /// The pool.
    pub pool: PoolName,
    /// Nodes to ask; at least one.
    pub nodes: Vec<Address>,
    /// Take the pool from whoever holds it.
    pub takeover: bool,
    /// Take the pool, at the first attachment only, from whoever holds it.
    pub incoming: bool,
    /// Go on with this member alone.
    pub force_from: Option<MemberId>,
    /// How long requests wait when no member can serve them.
    pub suspend_timeout: Duration,
    /// How long a member may take to answer.
    pub leg_timeout: Duration,
    /// How many times within an hour a member may come back after read errors.
    pub read_error_limit: u32,
    /// Longest pause before a member that failed again and again is brought in once more.
    pub rejoin_backoff_max: Duration,
    /// What is done about buffers that change while they are written.
    pub data_digest: DataDigest,
    /// Most bytes of copies.
    pub bounce_memory: u32,
    /// No writes will be sent.
    pub read_only: bool,
    /// How data of reads comes into guest memory over RDMA.
    pub rdma_read_mode: ReadMode,
    /// File with the key of the pool.
    pub key_file: Option<PathBuf>,
    /// How `tls://` addresses are reached.
    pub tls: Option<TlsFiles>,
}

/// Certificates, as files in PEM form.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TlsFiles {
    /// Authorities that are trusted.
    pub authorities: PathBuf,
    /// What to show to nodes that ask.
    pub identity: Option<IdentityFiles>,
}

/// Everything that was configured, checked.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the hypervisor connects.
    pub endpoint: Endpoint,
    /// For the disk client.
    pub pool: PoolSettings,
    /// For the device.
    pub device: DeviceOptions,
    /// For the event loop.
    pub event_loop: LoopOptions,
    /// Form of the log.
    pub log_format: LogFormat,
}

/// Why the configuration is not acceptable.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("{path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file is not understood.
    #[error("{path}: {source}")]
    Parse {
        /// The file.
        path: PathBuf,
        /// Where and why.
        source: Box<toml::de::Error>,
    },
    /// What the service manager says about sockets is not understood.
    #[error("LISTEN_PID and LISTEN_FDS of the service manager: {0}")]
    Passed(std::io::Error),
    /// More than one socket was passed.
    #[error(
        "the service manager passed {0} sockets (LISTEN_FDS), expected one: a daemon serves one disk; --fd names one of them"
    )]
    Sockets(usize),
    /// A socket was passed, and a path is configured.
    #[error(
        "the service manager passed a socket (LISTEN_FDS), and socket-path is {0:?}, expected one of them: leave socket-path out, the \
         path stands in the .socket unit"
    )]
    TwoSockets(PathBuf),
    /// An option that must be given.
    #[error("--{0} is missing{1}")]
    Missing(&'static str, &'static str),
    /// Two options that exclude each other.
    #[error("--{0} and --{1} exclude each other")]
    Conflict(&'static str, &'static str),
    /// A value out of bounds.
    #[error("--{option} is {found:?}, expected {expected}")]
    Value {
        /// The option.
        option: &'static str,
        /// Its value.
        found: String,
        /// What would be right.
        expected: &'static str,
    },
    /// A node address that is none.
    #[error("--node: {0}")]
    Node(#[from] AddressError),
}

impl Settings {
    /// Reads the file, if one is named, and checks everything.
    ///
    /// # Errors
    /// The first thing that is not right.
    pub fn load(args: &Args) -> Result<Self, ConfigError> {
        let file = match &args.config {
            None => Options::default(),
            Some(path) => {
                let text = fs::read_to_string(path)
                    .map_err(|source| ConfigError::Read { path: path.clone(), source })?;
                toml::from_str(&text)
                    .map_err(|source| ConfigError::Parse { path: path.clone(), source: Box::new(source) })?
            }
        };
        let mut options = args.options.clone().or(file);
        let passed = sd_notify::listen_fds().map_err(ConfigError::Passed)?;
        adopt_socket(&mut options, passed)?;
        Self::check(options)
    }

    /// Checks the options.
    ///
    /// # Errors
    /// The first thing that is not right.
    pub fn check(options: Options) -> Result<Self, ConfigError> {
        let endpoint = endpoint(&options)?;
        let pool: PoolName = options.pool.as_deref().ok_or(ConfigError::Missing("pool", ""))?.parse()?;
        let nodes = options.node.unwrap_or_default();
        if nodes.is_empty() {
            return Err(ConfigError::Missing("node", ": at least one node that knows the pool"));
        }
        let nodes = nodes.iter().map(|node| node.parse()).collect::<Result<Vec<Address>, _>>()?;
        let queues = options.num_queues.unwrap_or(1);
        if !(1..=MAX_QUEUES).contains(&queues) {
            return Err(bad("num-queues", queues, "1 to 256"));
        }
        let queue_size = options.queue_size.unwrap_or(DEFAULT_QUEUE_SIZE);
        if !queue_size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&queue_size) {
            return Err(bad("queue-size", queue_size, "a power of two from 2 to 1024"));
        }
        let serial = serial(options.serial, &pool)?;
        let read_only = options.read_only.unwrap_or(false);
        let poll_us = options.poll_us.unwrap_or(DEFAULT_POLL_US);
        if poll_us > MAX_POLL_US {
            return Err(bad("poll-us", poll_us, "0 to 10000"));
        }
        let leg_timeout_ms = options.leg_timeout_ms.unwrap_or(3000);
        if !(10..=MAX_TIMEOUT_S * 1000).contains(&leg_timeout_ms) {
            return Err(bad("leg-timeout-ms", leg_timeout_ms, "10 milliseconds to one day"));
        }
        let linger_ms = options.linger_ms.unwrap_or(0);
        if linger_ms > MAX_LINGER_MS {
            return Err(bad("linger-ms", linger_ms, "0 to 10000"));
        }
        let default = u32::try_from(DEFAULT_REJOIN_BACKOFF_MAX.as_secs()).unwrap_or(300);
        let rejoin_backoff_max = seconds("rejoin-backoff-max-s", options.rejoin_backoff_max_s, default)?;
        if rejoin_backoff_max.is_zero() {
            // A sick member would hold the guest most of the time.
            return Err(bad("rejoin-backoff-max-s", 0, "1 to 86400 seconds"));
        }
        let suspend_timeout_s = seconds("suspend-timeout-s", options.suspend_timeout_s, 60)?;
        let bounce_memory_mib = options.bounce_memory_mib.unwrap_or(DEFAULT_BOUNCE_MEMORY >> 20);
        if !(1..=1024).contains(&bounce_memory_mib) {
            return Err(bad("bounce-memory-mib", bounce_memory_mib, "1 to 1024"));
        }
        let drain_timeout = seconds("drain-timeout-s", options.drain_timeout_s, 30)?;
        let tls = tls(options.tls_authorities, options.tls_certificate, options.tls_key)?;
        if options.once.is_some() && options.on_disconnect.is_some() {
            return Err(ConfigError::Conflict("once", "on-disconnect"));
        }
        let force_from = match options.force_from {
            None => None,
            Some(member) => match MemberId::new(member) {
                Some(member) => Some(member),
                None => return Err(bad("force-from", member, "a member from 0 to 7")),
            },
        };
        if options.incoming && force_from.is_some() {
            return Err(ConfigError::Conflict("incoming", "force-from"));
        }
        let exit = options.once == Some(true) || options.on_disconnect == Some(Disconnect::Exit);
        Ok(Self {
            endpoint,
            pool: PoolSettings {
                pool,
                nodes,
                takeover: options.takeover.unwrap_or(false),
                incoming: options.incoming,
                force_from,
                suspend_timeout: suspend_timeout_s,
                leg_timeout: Duration::from_millis(leg_timeout_ms.into()),
                read_error_limit: options.read_error_limit.unwrap_or(DEFAULT_READ_ERROR_LIMIT),
                rejoin_backoff_max,
                data_digest: match options.data_digest.unwrap_or_default() {
                    DigestMode::Off => DataDigest::Off,
                    DigestMode::Detect => DataDigest::Detect,
                    DigestMode::Bounce => DataDigest::Bounce,
                },
                bounce_memory: bounce_memory_mib << 20,
                read_only,
                rdma_read_mode: options.rdma_read_mode.unwrap_or_default().into(),
                key_file: options.key_file,
                tls,
            },
            device: DeviceOptions { queues, queue_size, serial, read_only },
            event_loop: LoopOptions {
                poll: Duration::from_micros(poll_us.into()),
                drain_timeout,
                on_disconnect: if exit { OnDisconnect::Exit } else { OnDisconnect::Wait },
                linger: Duration::from_millis(linger_ms.into()),
            },
            log_format: options.log_format.unwrap_or_default(),
        })
    }
}

/// Takes the socket that the service manager passed (sd_listen_fds(3)), unless a descriptor is named.
fn adopt_socket(
    options: &mut Options,
    mut passed: impl ExactSizeIterator<Item = RawFd>,
) -> Result<(), ConfigError> {
    let count = passed.len();
    match (&options.socket_path, passed.next()) {
        _ if options.fd.is_some() => Ok(()),
        (_, None) => Ok(()),
        (None, Some(fd)) if count == 1 => {
            options.fd = Some(fd);
            Ok(())
        }
        (None, Some(_)) => Err(ConfigError::Sockets(count)),
        (Some(path), Some(_)) => Err(ConfigError::TwoSockets(path.clone())),
    }
}

fn endpoint(options: &Options) -> Result<Endpoint, ConfigError> {
    let mode = options.socket_mode.as_deref().unwrap_or("0600");
    let parsed = u32::from_str_radix(mode.trim_start_matches("0o"), 8);
    let mode = parsed.ok().filter(|bits| *bits <= 0o777);
    let found = options.socket_mode.as_deref().unwrap_or_default();
    let mode = mode.ok_or_else(|| bad("socket-mode", found, "octal permissions, e.g. 0660"))?;
    match (&options.socket_path, options.fd) {
        (Some(_), Some(_)) => Err(ConfigError::Conflict("socket-path", "fd")),
        (Some(path), None) if path.as_os_str().is_empty() => Err(bad("socket-path", "", "a path")),
        (Some(path), None) => Ok(Endpoint::Path { path: path.clone(), mode }),
        (None, Some(fd)) if fd < 3 => {
            Err(bad("fd", fd, "an inherited descriptor above 2, which are the standard streams"))
        }
        (None, Some(fd)) => Ok(Endpoint::Inherited(fd)),
        (None, None) => Err(ConfigError::Missing(
            "socket-path",
            " (or --fd, or a socket that the service manager passes)",
        )),
    }
}

fn tls(
    authorities: Option<PathBuf>,
    certificate: Option<PathBuf>,
    key: Option<PathBuf>,
) -> Result<Option<TlsFiles>, ConfigError> {
    let identity = match (certificate, key) {
        (Some(certificate), Some(key)) => Some(IdentityFiles { certificate, key }),
        (None, None) => None,
        (Some(_), None) => return Err(ConfigError::Missing("tls-key", ": it goes with --tls-certificate")),
        (None, Some(_)) => return Err(ConfigError::Missing("tls-certificate", ": it goes with --tls-key")),
    };
    match (authorities, identity) {
        (Some(authorities), identity) => Ok(Some(TlsFiles { authorities, identity })),
        (None, None) => Ok(None),
        (None, Some(_)) => Err(ConfigError::Missing(
            "tls-authorities",
            ": with a certificate of one's own, those of nodes are checked as well",
        )),
    }
}

fn serial(given: Option<String>, pool: &PoolName) -> Result<String, ConfigError> {
    let Some(serial) = given else {
        return Ok(pool.to_string().chars().take(ID_LENGTH).collect());
    };
    if serial.len() > ID_LENGTH || !serial.chars().all(|c| c.is_ascii_graphic() || c == ' ') {
        return Err(bad("serial", serial, "at most 20 printable ASCII characters"));
    }
    Ok(serial)
}

fn seconds(option: &'static str, given: Option<u32>, default: u32) -> Result<Duration, ConfigError> {
    let seconds = given.unwrap_or(default);
    if seconds > MAX_TIMEOUT_S {
        return Err(bad(option, seconds, "0 to 86400 seconds"));
    }
    Ok(Duration::from_secs(seconds.into()))
}

fn bad(option: &'static str, found: impl ToString, expected: &'static str) -> ConfigError {
    ConfigError::Value { option, found: found.to_string(), expected }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn settings(arguments: &str) -> Result<Settings, ConfigError> {
        let words = std::iter::once("vhost-brmr").chain(arguments.split_whitespace());
        Settings::load(&Args::try_parse_from(words).unwrap())
    }

    const GOOD: &str = "--socket-path /tmp/s --pool vm7 --node a:1";

    #[test]
    fn the_least_that_is_needed_gives_the_documented_defaults() {
        let settings = settings(GOOD).unwrap();
        assert_eq!(settings.endpoint, Endpoint::Path { path: "/tmp/s".into(), mode: 0o600 });
        assert_eq!(settings.device.queues, 1);
        assert_eq!(settings.device.queue_size, 1024);
        assert_eq!(settings.device.serial, "vm7");
        assert_eq!(settings.event_loop.poll, Duration::from_micros(50));
        assert_eq!(settings.event_loop.on_disconnect, OnDisconnect::Wait);
        assert_eq!(settings.event_loop.drain_timeout, Duration::from_secs(30));
        assert_eq!(settings.event_loop.linger, Duration::ZERO);
        assert_eq!(settings.pool.suspend_timeout, Duration::from_secs(60));
        assert_eq!((settings.pool.data_digest, settings.pool.bounce_memory), (DataDigest::Off, 32 << 20));
    }

    #[test]
    fn a_socket_of_the_service_manager_is_used_unless_one_is_named() {
        let none = Options::default();
        let path = Options { socket_path: Some("/s".into()), ..none.clone() };
        let named = Options { fd: Some(4), ..none.clone() };
        let adopt = |options: &Options, passed| {
            let mut options = options.clone();
            adopt_socket(&mut options, passed).map(|()| options.fd).map_err(|error| error.to_string())
        };
        assert_eq!(adopt(&none, 3..3), Ok(None));
        assert_eq!(adopt(&path, 3..3), Ok(None));
        assert_eq!(adopt(&none, 3..4), Ok(Some(3)));
        assert_eq!(adopt(&named, 3..6), Ok(Some(4)));
        assert!(adopt(&none, 3..5).unwrap_err().contains("passed 2 sockets"));
        assert!(adopt(&path, 3..4).unwrap_err().contains("leave socket-path out"));
    }

    #[test]
    fn switches_need_no_value_and_can_be_turned_off() {
        let on = settings(&format!("{GOOD} --read-only --takeover --once")).unwrap();
        assert!(on.device.read_only && on.pool.read_only && on.pool.takeover);
        assert_eq!(on.event_loop.on_disconnect, OnDisconnect::Exit);
        assert!(!on.pool.incoming && settings(&format!("{GOOD} --incoming")).unwrap().pool.incoming);
        let off = settings(&format!("{GOOD} --read-only=false --once=false")).unwrap();
        assert!(!off.device.read_only);
        assert_eq!(off.event_loop.on_disconnect, OnDisconnect::Wait);
    }

    #[test]
    fn every_bad_value_is_refused_by_name() {
        for (extra, name) in [
            ("--num-queues 0", "num-queues"),
            ("--num-queues 257", "num-queues"),
            ("--queue-size 3", "queue-size"),
            ("--queue-size 2048", "queue-size"),
            ("--serial 123456789012345678901", "serial"),
            ("--socket-mode 888", "socket-mode"),
            ("--socket-mode 7777", "socket-mode"),
            ("--poll-us 10001", "poll-us"),
            ("--linger-ms 10001", "linger-ms"),
            ("--leg-timeout-ms 1", "leg-timeout-ms"),
            ("--suspend-timeout-s 90000", "suspend-timeout-s"),
            ("--rejoin-backoff-max-s 0", "rejoin-backoff-max-s"),
            ("--bounce-memory-mib 0", "bounce-memory-mib"),
            ("--bounce-memory-mib 1025", "bounce-memory-mib"),
            ("--node nonsense", "node"),
            ("--incoming --force-from 1", "force-from"),
        ] {
            let error = settings(&format!("{GOOD} {extra}")).unwrap_err().to_string();
            assert!(error.contains(name), "{extra}: {error}");
        }
        for (arguments, name) in [
            ("--pool vm7 --node a:1", "socket-path"),
            ("--socket-path /s --node a:1", "pool"),
            ("--socket-path /s --pool vm7", "node"),
            ("--fd 2 --pool vm7 --node a:1", "fd"),
            ("--socket-path /s --pool a/b --node a:1", "pool"),
        ] {
            let error = settings(arguments).unwrap_err().to_string();
            assert!(error.contains(name), "{arguments}: {error}");
        }
    }

    #[test]
    fn the_command_line_goes_before_the_file_and_unknown_names_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("c.toml");
        let text = "fd = 7\npool = \"vm7\"\nnode = [\"a:1\", \"rdma://b:2\"]\nnum-queues = 4\nonce = true\n";
        fs::write(&path, text).unwrap();
        let config = path.display();
        let from_file = settings(&format!("--config {config}")).unwrap();
        assert_eq!(from_file.endpoint, Endpoint::Inherited(7));
        assert_eq!(from_file.device.queues, 4);
        assert_eq!(from_file.pool.nodes.len(), 2);
        assert_eq!(from_file.event_loop.on_disconnect, OnDisconnect::Exit);
        let extra = "--num-queues 2 --socket-path /s --on-disconnect wait";
        let overridden = settings(&format!("--config {config} {extra}")).unwrap();
        assert_eq!(overridden.device.queues, 2);
        assert!(matches!(overridden.endpoint, Endpoint::Path { .. }));
        assert_eq!(overridden.event_loop.on_disconnect, OnDisconnect::Wait);
        // It would take the pool again with every start.
        fs::write(&path, "incoming = true\n").unwrap();
        settings(&format!("--config {config}")).unwrap_err();
        fs::write(&path, "nodes = [\"a:1\"]\n").unwrap();
        let error = settings(&format!("--config {config}")).unwrap_err().to_string();
        assert!(error.contains("unknown field `nodes`"), "{error}");
    }
}
