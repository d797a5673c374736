//! What a load does, as benchmarks and tests describe it.

use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::disk::DiskOptions;
use super::super::processes::{Role, Watched};

/// Order and direction of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Reads at random places.
    RandRead,
    /// Writes at random places.
    RandWrite,
    /// Both, sequentially.
    Rw,
    /// Both, at random places.
    RandRw,
}

impl Pattern {
    pub(super) fn is_random(self) -> bool {
        matches!(self, Self::RandRead | Self::RandWrite | Self::RandRw)
    }

    pub(super) fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }
}

/// A load.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoadSpec {
    /// What the report calls it.
    pub name: String,
    /// Order and direction.
    pub pattern: Pattern,
    /// Reads in a hundred requests of a mixed pattern.
    pub read_percent: u32,
    /// Bytes of a request.
    pub block_size: u32,
    /// Greatest piece of a request's scatter/gather list; by default one piece per request.
    pub segment_size: Option<u32>,
    /// Requests in flight.
    pub depth: u32,
    /// Virtqueues.
    pub queues: u16,
    /// Requests per second, each due at a moment fixed beforehand; by default the next follows a completion.
    pub rate: Option<u32>,
    /// How long requests are issued.
    pub runtime_ms: u64,
    /// How long before that, unmeasured.
    pub ramp_ms: u64,
    /// Ends the load after this many requests, if that is earlier.
    pub max_requests: Option<u64>,
    /// First byte of the range that is used.
    pub offset: u64,
    /// Bytes of the range; by default all from `offset`.
    pub size: Option<u64>,
    /// Seed of places and mix.
    pub seed: u64,
    /// After the measured time, read the whole range and check it (needs promises).
    pub verify_at_end: bool,
    /// A flush, inside the measured time, ends a load that writes.
    pub flush_at_end: bool,
    /// Goes on after a request that failed.
    pub continue_on_error: bool,
    /// How long no completion may come while requests are in flight.
    pub stall_timeout_ms: u64,
}

impl Default for LoadSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            pattern: Pattern::RandRead,
            read_percent: 50,
            block_size: 4096,
            segment_size: None,
            depth: 1,
            queues: 1,
            rate: None,
            runtime_ms: 4000,
            ramp_ms: 500,
            max_requests: None,
            offset: 0,
            size: None,
            seed: 1,
            verify_at_end: false,
            flush_at_end: true,
            continue_on_error: false,
            stall_timeout_ms: 30_000,
        }
    }
}

impl LoadSpec {
    /// Writes `bytes` of the disk once, in order, in large requests: what precedes a measurement on a fresh disk.
    #[must_use]
    pub fn fill(bytes: u64) -> Self {
        let block_size = 128 * 1024;
        Self {
            name: "fill".into(),
            pattern: Pattern::Write,
            block_size,
            depth: 16,
            ramp_ms: 0,
            runtime_ms: 600_000,
            max_requests: Some(bytes / u64::from(block_size)),
            size: Some(bytes),
            ..Self::default()
        }
    }

    /// How to attach to `socket` so that this load can run.
    #[must_use]
    pub fn disk_options(&self, socket: &Path, watched: &[Watched]) -> DiskOptions {
        DiskOptions {
            queues: self.queues,
            depth: self.depth,
            buffer_size: self.block_size,
            segment_size: self.segment_size,
            seed: self.seed,
            daemons: watched
                .iter()
                .filter(|process| process.role == Role::Client)
                .map(|process| process.pid)
                .collect(),
            stall_timeout: Duration::from_millis(self.stall_timeout_ms),
            ..DiskOptions::new(socket)
        }
    }
}
