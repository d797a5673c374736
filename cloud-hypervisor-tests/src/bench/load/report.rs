//! What a load came to.

use serde::{Deserialize, Serialize};

use super::super::processes::{Memory, Role};

/// What a process used during the measured time.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ProcessReport {
    /// Its side.
    pub role: Role,
    /// Its number.
    pub pid: u32,
    /// Microseconds of processor time per request.
    pub cpu_us_per_io: f64,
    /// Hundredths of one core.
    pub cpu_pct: f64,
    /// Context switches per request.
    pub switches_per_io: f64,
    /// Resident memory at the end.
    #[serde(flatten)]
    pub memory: Memory,
}

/// What a load did in the measured time: from the end of the ramp until the final flush completed.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Of the load.
    pub name: String,
    /// The measured time.
    pub seconds: f64,
    /// Requests that completed, reads and writes.
    pub requests: u64,
    /// Of these, reads.
    pub reads: u64,
    /// Requests per second.
    pub iops: f64,
    /// Millions of bytes per second.
    pub mb_s: f64,
    /// Mean latency in microseconds.
    pub mean_us: f64,
    /// Median latency.
    pub p50_us: f64,
    /// 99 % of the requests took no longer.
    pub p99_us: f64,
    /// 99.9 % of the requests took no longer.
    pub p999_us: f64,
    /// The slowest request.
    pub max_us: f64,
    /// The final flush.
    pub flush_us: f64,
    /// Requests that a rate made due while all slots were busy: the disk did not keep up.
    pub late: u64,
    /// Requests that ended with an error, in the ramp too.
    pub errors: u64,
    /// The first of them in words.
    pub first_error: Option<String>,
    /// The generator's own processor time per request.
    pub own_cpu_us_per_io: f64,
    /// The generator's own use, in hundredths of a core.
    pub own_cpu_pct: f64,
    /// Sum over the client processes.
    pub client_cpu_us_per_io: f64,
    /// Sum over the client processes.
    pub client_cpu_pct: f64,
    /// Sum over the server processes.
    pub server_cpu_us_per_io: f64,
    /// Sum over the server processes.
    pub server_cpu_pct: f64,
    /// The greatest memory of a client process beyond the guest's memory.
    pub client_own_kib: u64,
    /// The watched processes one by one.
    pub processes: Vec<ProcessReport>,
    /// Blocks that were read and checked.
    pub verified_blocks: u64,
    /// Blocks that did not hold what was promised.
    pub violations: u64,
    /// The first of them.
    pub first_violations: Vec<String>,
}

impl Report {
    /// No error and no broken promise.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.errors == 0 && self.violations == 0
    }
}
