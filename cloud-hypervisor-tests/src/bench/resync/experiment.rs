//! The experiment that the kernel project published: one leg is down while the guest writes N GB in order, and the same
//! run is repeated while the leg is brought up to date. Then the same with an idle guest, and on a larger disk.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Result, ensure};
use serde::Serialize;

use super::median;
use super::stage::{ClientTraffic, DEPTH, Stage, run, run_until};
use crate::bench::disk::Disk;
use crate::bench::load::{LoadSpec, Pattern, Report};
use crate::lab::Lab;

const BLOCK: u32 = 4096;
/// The longest that one run of the guest may take.
const LONGEST_RUN_MS: u64 = 60_000;

/// One size of the experiment.
#[derive(Clone, Debug, Serialize)]
pub struct Run {
    /// Data that the guest dirtied while the leg was down, in 10^9 bytes.
    pub gb: f64,
    /// Size of the disk.
    pub disk_bytes: u64,
    /// Bandwidth of the run with both legs, before anything was lost.
    pub healthy_mb_s: f64,
    /// Its mean latency.
    pub healthy_mean_us: f64,
    /// Bandwidth with one leg down.
    pub initial_mb_s: f64,
    /// Its mean latency.
    pub initial_mean_us: f64,
    /// Bandwidth of the repeated run while the leg was brought up to date.
    pub during_mb_s: f64,
    /// Its mean latency.
    pub during_mean_us: f64,
    /// From the view that has the member Syncing to the one that has it Clean, under the repeated run.
    pub sync_s: f64,
    /// The same with an idle guest.
    pub idle_sync_s: f64,
    /// What the leg missed, by the maps of the other.
    pub missed_bytes: u64,
    /// Bytes from node to node, for the sync under the repeated run; what the guest wrote anew need not be moved.
    pub moved_bytes: u64,
    /// The same for the sync with an idle guest.
    pub idle_moved_bytes: u64,
    /// Bytes of resync on the daemon's connections, in its whole life.
    pub client_resync_bytes: u64,
    /// Bytes of any kind on them, by the kernel's count, in the sync with an idle guest.
    pub client_idle_tcp_bytes: u64,
}

/// One loss and return of a leg.
struct Round {
    initial: Report,
    during: Option<Report>,
    sync_s: f64,
    missed_bytes: u64,
    moved_bytes: u64,
    client_tcp_bytes: u64,
}

/// One size on one disk, under measurement.
pub(super) struct Experiment<'a> {
    stage: Stage<'a>,
    disk: Disk,
    mb: u64,
    disk_mib: u64,
    healthy: Report,
    /// Rounds with the run repeated meanwhile.
    busy: Vec<Round>,
    /// Rounds with an idle guest.
    idle: Vec<Round>,
}

impl<'a> Experiment<'a> {
    /// Writes the disk once, then again as the run with both legs.
    pub(super) fn start(lab: &'a Lab, mb: u64, disk_mib: u64, say: &dyn Fn(&str)) -> Result<Self> {
        let stage = Stage::start(lab, disk_mib)?;
        let bytes = bytes_of(mb);
        ensure!(bytes <= disk_mib << 20, "{bytes} bytes do not fit a disk of {disk_mib} MiB");
        let mut disk = stage.attach()?;
        say(&format!("{mb} MB on a disk of {disk_mib} MiB: writing it once"));
        run(&mut disk, &LoadSpec::fill(bytes.next_multiple_of(1 << 20).min(disk_mib << 20)))?;
        let healthy = run(&mut disk, &sequential("healthy", bytes))?;
        Ok(Self { stage, disk, mb, disk_mib, healthy, busy: Vec::new(), idle: Vec::new() })
    }

    /// The leg is lost and returns twice: with the run repeated meanwhile, and with an idle guest.
    pub(super) fn round(&mut self, say: &dyn Fn(&str)) -> Result<()> {
        for (under_load, rounds) in [(true, &mut self.busy), (false, &mut self.idle)] {
            let found = lose_and_return(&mut self.stage, &mut self.disk, bytes_of(self.mb), under_load)?;
            say(&format!(
                "  {} MB on {} MiB, round {}: {}, one leg down {:.0} MB/s, sync {:.2} s{}",
                self.mb,
                self.disk_mib,
                rounds.len() + 1,
                if under_load { "the run repeated meanwhile" } else { "an idle guest" },
                found.initial.mb_s,
                found.sync_s,
                found.during.as_ref().map_or(String::new(), |r| format!(", during {:.0} MB/s", r.mb_s)),
            ));
            rounds.push(found);
        }
        Ok(())
    }

    /// Medians of all rounds.
    pub(super) fn finish(self) -> Result<Run> {
        let Self { stage, disk, mb, disk_mib, healthy, busy, idle } = self;
        drop(disk);
        let traffic = stage.stop_daemon()?;
        stage.assert_identical()?;
        Ok(summary(mb, disk_mib << 20, &healthy, &busy, &idle, traffic))
    }
}

fn summary(
    mb: u64,
    disk_bytes: u64,
    healthy: &Report,
    busy: &[Round],
    idle: &[Round],
    traffic: ClientTraffic,
) -> Run {
    let of = |rounds: &[Round], value: &dyn Fn(&Round) -> f64| median(rounds.iter().map(value).collect());
    let during = |value: fn(&Report) -> f64| {
        median(busy.iter().filter_map(|round| round.during.as_ref()).map(value).collect())
    };
    Run {
        gb: mb as f64 / 1000.0,
        disk_bytes,
        healthy_mb_s: healthy.mb_s,
        healthy_mean_us: healthy.mean_us,
        initial_mb_s: of(busy, &|r| r.initial.mb_s),
        initial_mean_us: of(busy, &|r| r.initial.mean_us),
        during_mb_s: during(|r| r.mb_s),
        during_mean_us: during(|r| r.mean_us),
        sync_s: of(busy, &|r| r.sync_s),
        idle_sync_s: of(idle, &|r| r.sync_s),
        missed_bytes: busy.iter().map(|r| r.missed_bytes).max().unwrap_or(0),
        moved_bytes: busy.iter().map(|r| r.moved_bytes).max().unwrap_or(0),
        idle_moved_bytes: idle.iter().map(|r| r.moved_bytes).max().unwrap_or(0),
        client_resync_bytes: traffic.resync,
        client_idle_tcp_bytes: idle.iter().map(|r| r.client_tcp_bytes).max().unwrap_or(0),
    }
}

/// The leg goes, the guest writes, the leg comes back; with or without the guest writing the same again meanwhile.
fn lose_and_return(stage: &mut Stage<'_>, disk: &mut Disk, bytes: u64, under_load: bool) -> Result<Round> {
    stage.lose_b()?;
    let initial = run(disk, &sequential("initial", bytes))?;
    let before = stage.look()?;
    let tcp_before = stage.client_tcp_bytes()?;
    stage.return_b()?;
    let begin = Instant::now();
    let (during, end) = if under_load {
        let (report, end) = load_until_clean(stage, disk, &sequential("during", bytes))?;
        (Some(report), end)
    } else {
        (None, stage.wait_for_b("clean")?)
    };
    let client_tcp_bytes = stage.client_tcp_bytes()?.saturating_sub(tcp_before);
    Ok(Round {
        initial,
        during,
        sync_s: (end - begin).as_secs_f64(),
        missed_bytes: before.missed_blocks * u64::from(BLOCK),
        moved_bytes: stage.look()?.resync_sent_bytes - before.resync_sent_bytes,
        client_tcp_bytes,
    })
}

/// A resync while the guest writes elsewhere without a pause, which makes nothing of it unnecessary.
#[derive(Clone, Debug, Serialize)]
pub struct Elsewhere {
    /// Bandwidth of 4 KiB random writes, 32 in flight, with both legs, before anything was lost.
    pub healthy_mb_s: f64,
    /// The same while the leg was brought up to date.
    pub during_mb_s: f64,
    /// How long that took.
    pub sync_s: f64,
    /// What the leg missed.
    pub missed_bytes: u64,
    /// Bytes from node to node.
    pub moved_bytes: u64,
}

/// Measures it: `mb` are missed in the first half of a disk, and the guest writes to the second half.
pub(super) fn elsewhere(lab: &Lab, mb: u64, say: &dyn Fn(&str)) -> Result<Elsewhere> {
    let half = disk_mib_of(mb) << 20;
    let mut stage = Stage::start(lab, half >> 19)?;
    let mut disk = stage.attach()?;
    say(&format!("{mb} MB missed in one half of a disk, the guest writes to the other"));
    run(&mut disk, &LoadSpec::fill(2 * half))?;
    let load = LoadSpec {
        name: "elsewhere".into(),
        pattern: Pattern::RandWrite,
        block_size: BLOCK,
        depth: 32,
        ramp_ms: 0,
        runtime_ms: 3000,
        offset: half,
        size: Some(half),
        ..LoadSpec::default()
    };
    let healthy = run(&mut disk, &load)?;
    stage.lose_b()?;
    run(&mut disk, &sequential("missed", bytes_of(mb)))?;
    let before = stage.look()?;
    stage.return_b()?;
    let begin = Instant::now();
    let load = LoadSpec { runtime_ms: LONGEST_RUN_MS, ..load };
    let (during, end) = load_until_clean(&stage, &mut disk, &load)?;
    let moved_bytes = stage.look()?.resync_sent_bytes - before.resync_sent_bytes;
    drop(disk);
    stage.stop_daemon()?;
    stage.assert_identical()?;
    Ok(Elsewhere {
        healthy_mb_s: healthy.mb_s,
        during_mb_s: during.mb_s,
        sync_s: (end - begin).as_secs_f64(),
        missed_bytes: before.missed_blocks * u64::from(BLOCK),
        moved_bytes,
    })
}

/// Runs `load` again and again until member `b` is Clean, and no longer: its figures are those of the resync's time.
pub(super) fn load_until_clean(
    stage: &Stage<'_>,
    disk: &mut Disk,
    load: &LoadSpec,
) -> Result<(Report, Instant)> {
    let load = LoadSpec { max_requests: None, flush_at_end: false, ..load.clone() };
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| run_until(disk, &load, Some(&stop)));
        let end = stage.wait_for_b("clean");
        stop.store(true, Ordering::Relaxed);
        let report = writer.join().map_err(|_| anyhow::anyhow!("the load panicked"))??;
        Ok((report, end?))
    })
}

/// 4 KiB sequential writes, one job, 512 in flight, a flush at the end: `bytes` of them.
pub(super) fn sequential(name: &str, bytes: u64) -> LoadSpec {
    LoadSpec {
        name: name.into(),
        pattern: Pattern::Write,
        block_size: BLOCK,
        depth: DEPTH,
        ramp_ms: 0,
        runtime_ms: LONGEST_RUN_MS,
        max_requests: Some(bytes / u64::from(BLOCK)),
        size: Some(bytes),
        ..LoadSpec::default()
    }
}

/// Bytes of so many MB of 10^6, in whole blocks.
pub(super) fn bytes_of(mb: u64) -> u64 {
    mb * 1_000_000 / u64::from(BLOCK) * u64::from(BLOCK)
}

/// The smallest disk for so many MB, in MiB.
pub(super) fn disk_mib_of(mb: u64) -> u64 {
    bytes_of(mb).div_ceil(1 << 20)
}
