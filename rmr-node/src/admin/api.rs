//! Types of the admin API: what goes over HTTP as JSON between nodes' admin addresses and `rmrctl`.
//!
//! Fields are only ever added; a reader ignores what it does not know. Times are milliseconds since 1970 UTC, sizes
//! are bytes, and every name ends in its unit.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use rmr_common::pool::{
    Address, Attested, Cause, ClientId, MemberId, MemberState, PoolId, PoolSpec, Position, StoreId, View,
};
use rmr_common::transport::Counters;
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::store::StoreError;

/// A moment in milliseconds since 1970-01-01 00:00 UTC.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UnixMs(pub u64);

impl UnixMs {
    /// The present moment by the clock of this machine.
    #[must_use]
    pub fn now() -> Self {
        // A clock before 1970 is a clock that was never set; it reads as zero.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
    }
}

/// Answer of `GET /v1/node`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Name of the node, from its configuration.
    pub name: String,
    /// Version of the program.
    pub version: String,
    /// When the process started.
    pub started_unix_ms: UnixMs,
    /// The node's clock when it answered.
    pub now_unix_ms: UnixMs,
    /// Where other machines reach its data ports; the first one stands in new pools.
    pub data_addresses: Vec<Address>,
    /// Where it listens for admin requests.
    pub admin_address: SocketAddr,
    /// Which disk engine is in use: `uring`, `inline`, or `mixed` when some shards could not get an io_uring.
    pub engine: String,
    /// How many I/O threads it runs.
    pub shards: u32,
    /// How many stores are open.
    pub stores: u32,
    /// How many stores are left out; `GET /v1/stores` says why.
    #[serde(default)]
    pub stores_left_out: u32,
    /// Most stores that it opens.
    #[serde(default)]
    pub max_stores: u32,
    /// How many data connections are open.
    pub connections: u32,
    /// Most data connections that it accepts.
    pub max_connections: u32,
    /// Buffer memory of all shards together.
    pub buffer_bytes: u64,
    /// How much of the buffer memory is in use.
    pub buffer_used_bytes: u64,
    /// How much of that is lent to clients over RDMA, to write to.
    #[serde(default)]
    pub buffer_lent_bytes: u64,
    /// What all data connections have done since the node was started: work for the network, and bytes that were copied.
    #[serde(default)]
    pub transport: Counters,
    /// Attempts to connect that failed because of a pool's key, since the node was started.
    #[serde(default)]
    pub authentication_failures: AuthenticationFailures,
}

/// How often somebody was not let in because of a pool's key.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AuthenticationFailures {
    /// No key was shown, where one is required.
    pub missing: u64,
    /// The key was another one.
    pub wrong: u64,
    /// A key was shown, and this node has none for the pool.
    pub no_key_here: u64,
    /// This node's own key cannot be used, or is required and not there.
    pub unusable_here: u64,
}

/// What whoever connects for a pool has to prove.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Authentication {
    /// Nothing: whoever reaches the data address may attach.
    #[default]
    None,
    /// That he has the key.
    Key,
    /// That he has the new key or the old one.
    Rotating,
    /// Nobody is let in, because this node's key cannot be used.
    Unusable {
        /// What is the matter with it.
        reason: String,
    },
}

/// Answer of `GET /v1/health`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Health {
    /// Whether the service answers and no store has failed.
    pub healthy: bool,
    /// How many stores are open.
    pub stores: u32,
    /// Stores that failed or wait, with the reason.
    pub problems: Vec<String>,
}

/// Answer of `GET /v1/pools`.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PoolList {
    /// One status for each open store, ordered by pool name, then member.
    pub pools: Vec<PoolStatus>,
    /// Stores that the node knows of and does not serve.
    #[serde(default)]
    pub left_out: Vec<LeftOut>,
    /// Name of the node.
    #[serde(default)]
    pub node: String,
    /// Where other machines reach the node's data ports.
    #[serde(default)]
    pub data_addresses: Vec<Address>,
}

/// A store that a node knows of and does not serve.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LeftOut {
    /// Device or file.
    pub path: PathBuf,
    /// The pool that it belongs to, if it could be read.
    pub pool: Option<PoolId>,
    /// Name of the pool.
    pub name: Option<String>,
    /// Which member it is.
    pub member: Option<MemberId>,
    /// The store.
    pub store: Option<StoreId>,
    /// Why it is not served.
    pub reason: String,
    /// An operator closed it: it is not opened again until the command, or the next start of the node.
    #[serde(default)]
    pub closed: bool,
    /// Since when it is left out.
    pub since_unix_ms: UnixMs,
    /// Number of attempts to open it since then.
    pub attempts: u32,
    /// Seconds until the next attempt; absent when there is none to come.
    #[serde(default)]
    pub next_attempt_s: Option<u64>,
}

impl LeftOut {
    /// What is known of it, and why it is left out, in words.
    #[must_use]
    pub fn words(&self) -> String {
        let path = self.path.display();
        let what = match (&self.name, self.member) {
            (Some(name), Some(member)) => format!("store {path} of pool '{name}' member {member}"),
            _ => format!("store {path}"),
        };
        let state = if self.closed { "is closed" } else { "is left out" };
        format!("{what} {state}: {}", self.reason)
    }
}

/// Answer of `GET /v1/stores`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct StoreList {
    /// Name of the node.
    pub node: String,
    /// Stores that are open, by pool name.
    pub open: Vec<OpenStore>,
    /// Stores that are left out, by path.
    pub left_out: Vec<LeftOut>,
    /// What else is wrong with the node's stores, in words.
    #[serde(default)]
    pub problems: Vec<String>,
    /// Where other machines reach the node's data ports.
    #[serde(default)]
    pub data_addresses: Vec<Address>,
}

/// A store that is open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct OpenStore {
    /// Device or file.
    pub path: PathBuf,
    /// The pool.
    pub pool: PoolId,
    /// Name of the pool.
    pub name: String,
    /// The store.
    pub store: StoreId,
    /// `making`, `open` or `closing`.
    pub stage: String,
}

/// A store, named by its path or its uuid: body of `POST /v1/stores/open` (path only), `close` and `delete`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StoreName {
    /// Device or file, as the node names it.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// The store.
    #[serde(default)]
    pub store: Option<StoreId>,
    /// Close or delete it although a client is attached.
    #[serde(default)]
    pub force: bool,
}

impl StoreName {
    /// A store by its path.
    #[must_use]
    pub const fn at(path: PathBuf) -> Self {
        Self { path: Some(path), store: None, force: false }
    }
}

impl fmt::Display for StoreName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.path, self.store) {
            (Some(path), _) => write!(f, "{}", path.display()),
            (None, Some(store)) => write!(f, "store {store}"),
            (None, None) => f.write_str("no store"),
        }
    }
}

/// Answer of the routes that open, close or delete a store by [`StoreName`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreChanged {
    /// Device or file.
    pub path: PathBuf,
    /// The store, if it could be read.
    pub store: Option<StoreId>,
    /// Name of its pool.
    pub name: Option<String>,
    /// What else an operator should know.
    #[serde(default)]
    pub notes: Vec<String>,
}

/// What one node knows of one pool through its member store.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct PoolStatus {
    /// The pool: identity, name, sizes, members with their data addresses.
    pub spec: PoolSpec,
    /// Name of the node that says this.
    pub node: String,
    /// Which member this node is.
    pub member: MemberId,
    /// The store that is the member here.
    pub store: StoreId,
    /// Device or file of the store.
    pub path: PathBuf,
    /// Whether the store itself works.
    pub store_state: StoreState,
    /// The newest view that is durable in this store.
    pub view: View,
    /// The client that holds the pool, or held it last and did not detach.
    pub client: Option<ClientStatus>,
    /// What this node knows of the other members, ordered by member.
    pub peers: Vec<PeerStatus>,
    /// I/O of this store since it was opened.
    pub io: IoCounters,
    /// Latency of requests at this node, where there were any lately.
    pub latency: Option<LatencySummary>,
    /// The resync that brings this member up to date, where one is needed.
    pub resync: Option<ResyncStatus>,
    /// What whoever connects to this member has to prove.
    #[serde(default)]
    pub authentication: Authentication,
    /// Numbers of the keys of the pool on this node, the newest first: equal numbers are equal keys.
    #[serde(default)]
    pub key_fingerprints: Vec<String>,
    /// The size up to which the pool can grow in this store.
    #[serde(default)]
    pub max_size_bytes: Option<u64>,
    /// How far the store has come, and what it remembers of the others.
    #[serde(default)]
    pub history: HistoryStatus,
    /// What the disk below the store has failed of late.
    #[serde(default)]
    pub disk: Option<DiskTrouble>,
}

/// How far a store has come in the history of its pool, and what it remembers of all members.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Serialize, Deserialize)]
pub struct HistoryStatus {
    /// Its own position.
    pub position: Position,
    /// The position that each member is known to have reached, by member id, and which of them went back since.
    pub attested: Attested,
}

impl PoolStatus {
    /// Whether the store was made for a member that has not joined the pool: it has seen no view yet.
    #[must_use]
    pub const fn is_prepared(&self) -> bool {
        self.view.number.0 == 0
    }

    /// Whether the store went back in time, as a client found, and is not copied over yet.
    #[must_use]
    pub fn is_regressed(&self) -> bool {
        self.history.attested.regressed.contains(self.member)
            && self.view.state(self.member) != Some(MemberState::Clean)
    }
}

/// Errors of the disk below a store.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DiskTrouble {
    /// What kind of errors.
    pub cause: Cause,
    /// The last one in words.
    pub text: String,
    /// When the first one came.
    pub since_unix_ms: UnixMs,
    /// When the last one came.
    pub last_unix_ms: UnixMs,
    /// Number of them.
    pub errors: u64,
}

/// Why another member is not current, as the client said that holds the pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerCondition {
    /// Why it left the view last, or was not brought back in.
    pub cause: Cause,
    /// The same in the client's words; may be empty.
    pub text: String,
    /// Number of losses and failed rejoins in a row.
    pub failures: u32,
    /// When the first of them was.
    pub since_unix_ms: Option<UnixMs>,
    /// When the client tries again; absent if it does not by itself.
    pub retry_unix_ms: Option<UnixMs>,
}

/// Whether a store works.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum StoreState {
    /// It reads and writes.
    Serving,
    /// It may not serve now, though its device works.
    Waiting {
        /// What it waits for.
        reason: String,
    },
    /// Its device failed or its metadata cannot be trusted.
    Failed {
        /// What happened.
        reason: String,
    },
}

/// The holder of a pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ClientStatus {
    /// Identity of the client.
    pub id: ClientId,
    /// What the client says of itself: host, program, process, purpose.
    pub text: String,
    /// From which network address it came.
    pub address: String,
    /// Attached now, or lost.
    pub state: ClientState,
    /// Since when it has the pool, as it told this member when it attached; absent when that was before the node was started.
    pub attached_unix_ms: Option<UnixMs>,
}

/// Whether the holder of a pool is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ClientState {
    /// Its connection to this member is up.
    Attached,
    /// Its connection was lost without a detach: the process died, or only the network between.
    Crashed,
}

/// What a node knows of another member of the pool.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// The other member.
    pub member: MemberId,
    /// The link between the two nodes.
    pub link: LinkState,
    /// Since when the member is in its present state of the view, where this node saw it change.
    pub state_since_unix_ms: Option<UnixMs>,
    /// What the member misses, by the maps of this store.
    pub missed: Missed,
    /// Why it is not current, if the client has said so.
    #[serde(default)]
    pub condition: Option<PeerCondition>,
}

/// State of a link between two nodes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum LinkState {
    /// No link is needed, as nothing is to be resynchronised.
    Idle,
    /// The nodes are connected.
    Up,
    /// The nodes should be connected and are not.
    Down {
        /// What the last attempt met.
        reason: String,
    },
}

/// What a member misses.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Missed {
    /// Chunks with something stale.
    pub chunks: u64,
    /// Stale 4 KiB blocks, exact; absent when only the chunks are known, as after a crash of this node.
    pub blocks: Option<u64>,
}

impl Missed {
    /// Bytes missed: exact where blocks are known, else an upper bound by whole chunks.
    #[must_use]
    pub const fn bytes(&self, chunk_size_bytes: u64) -> u64 {
        match self.blocks {
            Some(blocks) => blocks.saturating_mul(rmr_common::pool::BLOCK_SIZE),
            None => self.chunks.saturating_mul(chunk_size_bytes),
        }
    }
}

/// I/O of a store since it was opened.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct IoCounters {
    /// Reads that were answered.
    pub reads: u64,
    /// Bytes that they carried.
    pub read_bytes: u64,
    /// Writes that were answered, zeroes and discards not counted.
    pub writes: u64,
    /// Bytes that they carried.
    pub written_bytes: u64,
    /// Discards and write-zeroes that were answered.
    pub zeroes: u64,
    /// Flushes that were answered.
    pub flushes: u64,
    /// Bytes that were read to be compared with other members.
    #[serde(default)]
    pub compared_bytes: u64,
    /// Requests that were answered with an error.
    pub errors: u64,
    /// Reads that the disk failed, those for other members' resync included.
    pub read_errors: u64,
    /// Writes whose data did not arrive as their digest says.
    pub digest_mismatches: u64,
    /// Requests taken and not answered yet.
    pub in_flight: u64,
    /// Bytes of answers to members that are brought up to date from here: data, and the lists of what it is.
    #[serde(default)]
    pub resync_sent_bytes: u64,
    /// The same from the other side: bytes that this member received from its sources.
    #[serde(default)]
    pub resync_received_bytes: u64,
    /// Missed blocks of 4 KiB that this member wrote from its sources' data, zeroes among them.
    #[serde(default)]
    pub resync_written_blocks: u64,
    /// Pages of 4 KiB of metadata that were written.
    #[serde(default)]
    pub metadata_pages: u64,
}

/// Latency of requests at a node over the last minute, from receipt to answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LatencySummary {
    /// Median of reads.
    pub read_p50_us: u64,
    /// 99th percentile of reads.
    pub read_p99_us: u64,
    /// Median of writes.
    pub write_p50_us: u64,
    /// 99th percentile of writes.
    pub write_p99_us: u64,
}

/// A resync that brings this node's member up to date.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ResyncStatus {
    /// What it is doing.
    pub state: ResyncState,
    /// Why it is needed.
    pub reason: String,
    /// Since when it is needed.
    pub since_unix_ms: UnixMs,
    /// From which member it pulls.
    pub source: Option<MemberId>,
    /// Stale blocks that are left.
    pub blocks_left: u64,
    /// Its speed of late.
    pub bytes_per_s: u64,
    /// When it will be done at this speed; absent while it makes no progress.
    pub seconds_left: Option<u64>,
    /// The last error, if the last attempt met one.
    pub last_error: Option<String>,
}

/// What a resync is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResyncState {
    /// Waits for its turn, its source or its link.
    Waiting,
    /// Pulls.
    Running,
    /// Slowed down in favour of guest I/O.
    Yielding,
    /// Waits after an error before it tries again.
    Backoff,
}

/// Body of `POST /v1/stores`: create the store of one member on this node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateStore {
    /// The pool.
    pub spec: PoolSpec,
    /// Which member of it this node becomes.
    pub member: MemberId,
    /// The view to begin with.
    pub view: View,
    /// Device or file to use; absent: a new file in the node's store directory.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Overwrite what a device or file holds already.
    #[serde(default)]
    pub overwrite: bool,
    /// The device is known to read as zeroes; do not write them.
    #[serde(default)]
    pub assume_zero: bool,
    /// The pool size up to which the store can grow; absent: eight times the pool's size.
    #[serde(default)]
    pub max_size_bytes: Option<u64>,
}

/// Answer of `POST /v1/stores`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreCreated {
    /// The store.
    pub store: StoreId,
    /// Its device or file.
    pub path: PathBuf,
    /// What an operator should know, such as that the file system may become full.
    #[serde(default)]
    pub warnings: Vec<String>,
}

/// Query of `DELETE /v1/stores/{uuid}`.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeleteStore {
    /// Delete although a client is attached.
    #[serde(default)]
    pub force: bool,
}

/// Answer of `DELETE /v1/stores/{uuid}`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoreDeleted {
    /// The store that is no more.
    pub store: StoreId,
}

/// What kind of refusal an error is; decides the HTTP status.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request is malformed or breaks a limit.
    Invalid,
    /// The configuration of the node does not allow it.
    Forbidden,
    /// There is no such route, pool or store.
    NotFound,
    /// The route exists, but not with this method.
    Method,
    /// Something of this name or identity exists already.
    Exists,
    /// A client holds the pool, or the device is used by something else.
    InUse,
    /// The device or file holds data, and overwriting was not asked for.
    HoldsData,
    /// The body is larger than the limit.
    TooLarge,
    /// The body is not declared as JSON.
    MediaType,
    /// The device is too small, or the file system full.
    NoSpace,
    /// A limit of the node is reached, or it is stopping; try again later.
    Busy,
    /// The service did not answer in time; the request may still be carried out.
    Timeout,
    /// The node failed in an unexpected way.
    Internal,
    /// A code of a newer version.
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// The HTTP status that goes with it.
    #[must_use]
    pub const fn http_status(self) -> u16 {
        match self {
            Self::Invalid => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::Method => 405,
            Self::Exists | Self::InUse | Self::HoldsData => 409,
            Self::TooLarge => 413,
            Self::MediaType => 415,
            Self::Internal | Self::Unknown => 500,
            Self::Busy => 503,
            Self::Timeout => 504,
            Self::NoSpace => 507,
        }
    }
}

/// A refusal, for an operator to read.
#[derive(Clone, PartialEq, Eq, Debug, Error, Serialize, Deserialize)]
#[error("{message}")]
pub struct ControlError {
    /// What kind of refusal it is.
    pub code: ErrorCode,
    /// What was expected and what was found.
    pub message: String,
}

impl ControlError {
    /// An error with this text.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }
}

impl From<StoreError> for ControlError {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::Occupied { .. } | StoreError::FileHasData(_) | StoreError::HasData { .. } => {
                ErrorCode::HoldsData
            }
            StoreError::Busy { .. } => ErrorCode::InUse,
            StoreError::TooSmall { .. } | StoreError::NoMapRoom { .. } => ErrorCode::NoSpace,
            StoreError::Io { source, .. } => match source.kind() {
                io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => ErrorCode::NoSpace,
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied => ErrorCode::Invalid,
                _ => ErrorCode::Internal,
            },
            StoreError::NotADisk(_)
            | StoreError::Link(_)
            | StoreError::NoSuchDevice(_)
            | StoreError::NotZero { .. }
            | StoreError::SectorSize { .. }
            | StoreError::Invalid { .. }
            | StoreError::NoSuperblock { .. }
            | StoreError::NewerFormat { .. }
            | StoreError::TwoStores(_)
            | StoreError::EpochNotLower { .. }
            | StoreError::WrongPool { .. } => ErrorCode::Invalid,
        };
        Self::new(code, error.to_string())
    }
}

/// Body of every answer that is no success: `{"error": {"code": …, "message": …}}`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ErrorBody {
    /// The error.
    pub error: ControlError,
}

/// How a person names a pool: by its name or its uuid.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum PoolKey {
    /// By uuid.
    Id(PoolId),
    /// By name.
    Name(String),
}

impl PoolKey {
    /// Whether the key means the pool of this specification.
    #[must_use]
    pub fn matches(&self, spec: &PoolSpec) -> bool {
        match self {
            Self::Id(id) => *id == spec.id,
            Self::Name(name) => *name == spec.name,
        }
    }
}

impl std::str::FromStr for PoolKey {
    type Err = rmr_common::pool::SpecError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        // No pool may have a name that reads as a uuid, so this is never ambiguous.
        if let Ok(uuid) = uuid::Uuid::parse_str(text) {
            return Ok(Self::Id(PoolId(uuid)));
        }
        PoolSpec::validate_name(text)?;
        Ok(Self::Name(text.to_owned()))
    }
}

impl fmt::Display for PoolKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Name(name) => write!(f, "'{name}'"),
        }
    }
}
