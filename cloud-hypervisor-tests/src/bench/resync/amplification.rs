//! What a resync moves, compared with what was missed, for several kinds of writes, with an idle guest; and what of that
//! goes over the hypervisor's connections.

use std::any::Any;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::stage::{Stage, run};
use crate::bench::load::{LoadSpec, Pattern};
use crate::lab::{FrontendBuilder, Lab, Status};

const DISK_MIB: u64 = 256;
const BLOCK: u64 = 4096;
/// Bytes on the wire for a missed block may be a little more than the block: its place in a list, its share of a header.
pub(super) const EXACT: f64 = 1.005;

/// One kind of writes that a member missed.
#[derive(Clone, Debug, Serialize)]
pub struct Case {
    /// What was missed, and what happened to the member that had it on record.
    pub what: &'static str,
    /// Bytes that the writes covered, in whole blocks: the record of the holder before anything happened to it.
    pub missed_bytes: u64,
    /// Bytes of missed blocks that were written on the member, zeroes among them.
    pub written_bytes: u64,
    /// Bytes of answers from node to node: data, lists, headers.
    pub moved_bytes: u64,
    /// Most that may be moved.
    pub limit_bytes: u64,
    /// Bytes of any kind on the daemon's connections meanwhile, both ways, by the kernel's count.
    pub client_tcp_bytes: u64,
    /// Bytes of resync on them, over the daemon's life: the same figure for all cases of a run.
    pub client_resync_bytes: u64,
}

impl Case {
    /// Bytes moved for each byte missed.
    #[must_use]
    pub fn amplification(&self) -> f64 {
        self.moved_bytes as f64 / self.missed_bytes.max(1) as f64
    }
}

/// What is written while the member is away.
enum Missed {
    /// These loads, one after the other.
    Loads(Vec<LoadSpec>),
    /// Ranges of zeroes.
    Zeroes,
}

/// Runs all kinds.
pub(super) fn measure(lab: &Lab, say: &dyn Fn(&str)) -> Result<Vec<Case>> {
    let mut stage = Stage::start(lab, DISK_MIB)?;
    run(&mut stage.attach()?, &LoadSpec::fill(DISK_MIB << 20))?;
    let random = |count, size| load(Pattern::RandWrite, size, count, 1);
    let kinds = [
        ("4 KiB random", Missed::Loads(vec![random(16_000, 4096)]), false),
        (
            "sequential, 128 KiB",
            Missed::Loads(vec![load(Pattern::Write, 128 << 10, (DISK_MIB << 20) / (256 << 10), 1)]),
            false,
        ),
        (
            "mixed: 512 B, 4, 20 and 64 KiB random",
            Missed::Loads(
                [(2000, 512), (2000, 4096), (500, 20 << 10), (200, 64 << 10)]
                    .map(|(count, size)| random(count, size))
                    .to_vec(),
            ),
            false,
        ),
        ("zeroes (write-zeroes and discard)", Missed::Zeroes, false),
        ("4 KiB random, holder killed", Missed::Loads(vec![random(2000, 4096)]), true),
    ];
    let mut cases = Vec::new();
    for (what, missed, kills_holder) in kinds {
        let case = measure_one(&mut stage, what, &missed, kills_holder)?;
        say(&format!("  {what}: {:.3} bytes moved for each byte missed", case.amplification()));
        cases.push(case);
    }
    let traffic = stage.stop_daemon()?;
    stage.assert_identical()?;
    cases.iter_mut().for_each(|case| case.client_resync_bytes = traffic.resync);
    Ok(cases)
}

fn measure_one(
    stage: &mut Stage<'_>,
    what: &'static str,
    missed: &Missed,
    kills_holder: bool,
) -> Result<Case> {
    // Attached all the while: a daemon without a guest leaves the pool, and the member would not rejoin.
    let guest: Box<dyn Any> = match missed {
        Missed::Loads(loads) => {
            let mut disk = stage.attach()?;
            stage.lose_b()?;
            for load in loads {
                run(&mut disk, load)?;
            }
            Box::new(disk)
        }
        Missed::Zeroes => {
            let mut front_end = FrontendBuilder::new(stage.daemon.socket()).connect()?;
            // Claims the pool.
            ensure!(front_end.flush(0)? == Status::Ok);
            stage.lose_b()?;
            for range in 0..32_u64 {
                let sector = range * (4 << 20) / 512;
                let status = if range % 2 == 0 {
                    front_end.write_zeroes(0, sector, (1 << 20) / 512, false)?
                } else {
                    front_end.discard(0, sector, (1 << 20) / 512)?
                };
                ensure!(status == Status::Ok, "a range of zeroes ended with {status:?}");
            }
            Box::new(front_end)
        }
    };
    let look = stage.look()?;
    let missed_bytes = look.missed_blocks * BLOCK;
    ensure!(missed_bytes > 0, "{what}: nothing was missed");
    let chunk_bytes = look.missed_chunks * look.chunk_bytes;
    let mut sent_before = look.resync_sent_bytes;
    if kills_holder {
        stage.restart_a()?;
        sent_before = 0;
        stage.wait_for_b("out")?;
    }
    let tcp_before = if kills_holder { 0 } else { stage.client_tcp_bytes()? };
    stage.return_b()?;
    stage.wait_for_b("clean")?;
    let limit = if kills_holder { chunk_bytes } else { missed_bytes };
    let case = Case {
        what,
        missed_bytes,
        written_bytes: stage.blocks_written_by_resync()? * BLOCK,
        moved_bytes: stage.look()?.resync_sent_bytes - sent_before,
        // Tenths of percents, in integers.
        limit_bytes: limit + limit * 5 / 1000,
        client_tcp_bytes: stage.client_tcp_bytes()?.saturating_sub(tcp_before),
        client_resync_bytes: 0,
    };
    drop(guest);
    Ok(case)
}

fn load(pattern: Pattern, block_size: u32, count: u64, seed: u64) -> LoadSpec {
    LoadSpec {
        name: "missed".into(),
        pattern,
        block_size,
        depth: 32,
        ramp_ms: 0,
        runtime_ms: 60_000,
        max_requests: Some(count),
        seed,
        ..LoadSpec::default()
    }
}
