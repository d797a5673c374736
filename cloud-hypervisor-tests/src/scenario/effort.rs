//! How much a scenario does and how long it has patience, in one place for all of them: emulated processors do a hundredth of
//! what real ones do. Nothing else in a scenario asks where it runs.

use std::time::Duration;

/// How much a scenario does, and how long what it breaks may take to be noticed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Effort {
    /// Size of the pool in MiB.
    pub pool_mib: u64,
    /// Bytes that small random requests go to, all of them read again at the end.
    pub span: u64,
    /// Requests of a load that runs to its end.
    pub requests: u64,
    /// Blocks that are written one after the other.
    pub blocks: u64,
    /// Batches of many large writes at once.
    pub batches: u32,
    /// Blocks of the largest of those.
    pub large_blocks: u64,
    /// Requests per second of a load under which something breaks.
    pub rate: u32,
    /// How often it breaks.
    pub rounds: usize,
    /// Bytes per second of a resync or verify that is to be met under way.
    pub slow_bytes_per_s: u64,
    /// Leg timeout of both sides where a silent leg has to be noticed. Making a connection takes most of a second on an
    /// emulated processor, and a crowded machine forgets a process for as long.
    pub leg_timeout: Duration,
    /// Leg timeout where nobody is silent for long, and a leg that is lost because the machine is crowded would be an error.
    pub patience: Duration,
}

impl Effort {
    /// For the processors of this machine.
    pub const FULL: Self = Self {
        pool_mib: 64,
        span: 32 << 20,
        requests: 20_000,
        blocks: 300,
        batches: 40,
        large_blocks: 256,
        rate: 3000,
        rounds: 5,
        slow_bytes_per_s: 512 << 10,
        leg_timeout: Duration::from_secs(3),
        patience: Duration::from_secs(60),
    };
    /// For the emulated processor of a guest.
    pub const EMULATED: Self = Self {
        pool_mib: 24,
        span: 2 << 20,
        requests: 600,
        blocks: 40,
        batches: 3,
        large_blocks: 48,
        rate: 100,
        rounds: 1,
        slow_bytes_per_s: 256 << 10,
        leg_timeout: Duration::from_secs(3),
        patience: Duration::from_secs(60),
    };
}
