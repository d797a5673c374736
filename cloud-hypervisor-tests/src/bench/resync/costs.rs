//! What the maps cost: memory of node and daemon for each GiB of a pool, and pages of metadata written for each GiB of
//! writes, healthy and degraded.

use anyhow::Result;
use serde::Serialize;

use super::stage::{Stage, run};
use crate::bench::load::{LoadSpec, Pattern};
use crate::lab::Lab;

/// A pool that is large and almost empty: its stores are sparse files.
const LARGE_GIB: u64 = 256;
/// Writes at random that put a block into every leaf (128 MiB) of every map of that pool.
const SPREAD: u64 = 40_000;
/// The pool on which writes are counted, and what is written: all of it.
const SMALL_MIB: u64 = 1024;

/// Memory and metadata.
#[derive(Clone, Debug, Serialize)]
pub struct Costs {
    /// Memory beside the pool's size.
    pub memory: Vec<Memory>,
    /// Metadata beside what was written.
    pub metadata: Vec<Metadata>,
}

/// Memory of a process' own, in one situation.
#[derive(Clone, Debug, Serialize)]
pub struct Memory {
    /// Which process, and what its maps hold.
    pub what: &'static str,
    /// All of it.
    pub bytes: u64,
    /// What it has more than with an attached guest that has not written yet, for each GiB of the pool.
    pub more_bytes_per_gib: u64,
}

/// Pages of 4 KiB of metadata.
#[derive(Clone, Debug, Serialize)]
pub struct Metadata {
    /// What was written, and in which state of the pool.
    pub what: &'static str,
    /// Pages that one node wrote for each GiB of writes.
    pub pages_per_gib: u64,
    /// Bytes of metadata for each byte of data.
    pub share: f64,
}

/// Measures memory.
pub(super) fn memory(lab: &Lab, say: &dyn Fn(&str)) -> Result<Vec<Memory>> {
    let stage = Stage::start(lab, LARGE_GIB << 10)?;
    let mut disk = stage.attach()?;
    let spread =
        |seed| LoadSpec { flush_at_end: false, ..writes("spread", Pattern::RandWrite, SPREAD, seed) };
    // Buffers and queues are touched before anything is compared.
    run(&mut disk, &LoadSpec { size: Some(64 << 20), ..writes("warm up", Pattern::RandWrite, 20_000, 1) })?;
    let of = |stage: &Stage<'_>| -> Result<(u64, u64)> {
        Ok((stage.a.process().own_memory()?, stage.daemon.process().own_memory()?))
    };
    let base = of(&stage)?;
    run(&mut disk, &spread(2))?;
    let written = of(&stage)?;
    stage.lose_b()?;
    run(&mut disk, &spread(3))?;
    let missed = of(&stage)?;
    drop(disk);
    stage.stop_daemon()?;
    say("  memory done");
    let line = |what, bytes: u64, base: u64| Memory {
        what,
        bytes,
        more_bytes_per_gib: bytes.saturating_sub(base) / LARGE_GIB,
    };
    Ok(vec![
        line("node, nothing missed, nothing written yet", base.0, base.0),
        line("node, written everywhere, nothing missed", written.0, base.0),
        line("node, one member misses blocks everywhere", missed.0, base.0),
        line("daemon, nothing written yet", base.1, base.1),
        line("daemon, unflushed writes everywhere", written.1, base.1),
    ])
}

/// Measures metadata.
pub(super) fn metadata(lab: &Lab) -> Result<Vec<Metadata>> {
    let stage = Stage::start(lab, SMALL_MIB)?;
    let mut disk = stage.attach()?;
    run(&mut disk, &LoadSpec::fill(SMALL_MIB << 20))?;
    let count = (SMALL_MIB << 20) / 4096;
    let mut lines = Vec::new();
    let mut count_pages = |what, pattern, stage: &Stage<'_>| -> Result<()> {
        let before = stage.look()?.metadata_pages;
        run(&mut disk, &LoadSpec { depth: 32, ..writes(what, pattern, count, 5) })?;
        let pages = (stage.look()?.metadata_pages - before) * 1024 / SMALL_MIB;
        let share = pages as f64 * 4096.0 / f64::from(1 << 30);
        lines.push(Metadata { what, pages_per_gib: pages, share });
        Ok(())
    };
    // Intents of what was written before are cleared after some idle seconds: the first lines pay for setting them.
    std::thread::sleep(super::INTENTS_IDLE);
    count_pages("healthy, 4 KiB sequential", Pattern::Write, &stage)?;
    std::thread::sleep(super::INTENTS_IDLE);
    count_pages("healthy, 4 KiB random", Pattern::RandWrite, &stage)?;
    stage.lose_b()?;
    std::thread::sleep(super::INTENTS_IDLE);
    count_pages("degraded, 4 KiB sequential, first", Pattern::Write, &stage)?;
    count_pages("degraded, 4 KiB random, chunks on record", Pattern::RandWrite, &stage)?;
    Ok(lines)
}

fn writes(name: &str, pattern: Pattern, count: u64, seed: u64) -> LoadSpec {
    LoadSpec {
        name: name.into(),
        pattern,
        block_size: 4096,
        depth: 32,
        ramp_ms: 0,
        runtime_ms: 60_000,
        max_requests: Some(count),
        seed,
        ..LoadSpec::default()
    }
}
