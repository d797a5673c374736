//! A writer that remembers what it was promised, at work while something is done to the system, and the check that ends a test.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::system::LIMIT;
use crate::bench::disk::{Disk, DiskError, DiskOptions};
use crate::bench::load::{self, LoadError, LoadSpec, Pattern, Report, Surroundings};
use crate::bench::processes::{Role, Watched};
use crate::bench::verify::Promises;
use crate::lab::{Daemon, Pool, wait_until};

/// Longest load that is ended from outside, in milliseconds.
pub(super) const ENDLESS: u64 = 600_000;
/// Longest time without an answer, in milliseconds: a machine that is crowded, and a leg that is lost in it, take their time.
pub(super) const STALL_MS: u64 = 120_000;
/// How long a writer is at work before something happens to it.
const WARM_UP: Duration = Duration::from_millis(700);
/// What the daemon says when it has the pool for its guest.
const ATTACHED: &str = "attached with";

/// Random requests of 4 KiB, three in ten of them reads.
#[derive(Clone, Copy, Debug)]
pub struct Writer {
    /// Most requests in flight.
    pub depth: u32,
    /// Requests per second.
    pub rate: u32,
    /// Bytes from the start of the disk that they go to; `None` is all of it.
    pub span: Option<u64>,
}

impl Writer {
    /// Writes until `stop`, or until the daemon ends.
    ///
    /// # Errors
    /// When a request failed, a promise was broken, or the daemon ended.
    pub fn run(self, daemon: &Daemon, promises: &mut Promises, stop: &AtomicBool) -> Result<Report> {
        let load = LoadSpec {
            name: "writer".into(),
            pattern: Pattern::RandRw,
            read_percent: 30,
            depth: self.depth,
            rate: Some(self.rate),
            size: self.span,
            ramp_ms: 0,
            runtime_ms: ENDLESS,
            stall_timeout_ms: STALL_MS,
            ..LoadSpec::default()
        };
        let mut disk = attach(daemon, &load)?;
        run_load(&mut disk, &load, promises, Some(stop))
    }

    /// Does `work` while the writer is busy, which must see no error. `work` begins when it is attached.
    ///
    /// # Errors
    /// Those of `work`, else those of the writer.
    pub fn during<T>(
        self,
        pool: &Pool,
        daemon: &Daemon,
        promises: &mut Promises,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<(T, Report)> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let load = scope.spawn(|| self.run(daemon, promises, &stop));
            let attached = wait_until("the writer to be attached", LIMIT, || {
                ensure!(!load.is_finished(), "the writer ended before it was attached");
                Ok(pool.status()?.pointer("/assessment/client/state") == Some(&"attached".into()))
            });
            let outcome = attached.and_then(|()| work());
            stop.store(true, Ordering::Relaxed);
            let loaded = load.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?;
            match (outcome, loaded) {
                (Ok(outcome), Ok(report)) => Ok((outcome, report)),
                (Err(error), Ok(_)) | (Ok(_), Err(error)) => Err(error),
                (Err(work), Err(writer)) => Err(work.context(format!("the writer: {writer:#}"))),
            }
        })
    }

    /// Does `kill`, which ends the daemon, in the middle of the writer's work; what its requests may have done is remembered.
    ///
    /// # Errors
    /// Those of `kill`, and what else than the end of the daemon ended the writer.
    pub fn until_killed(
        self,
        daemon: &Daemon,
        promises: &mut Promises,
        kill: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            let load = scope.spawn(|| self.run(daemon, promises, &stop));
            // On a crowded machine all the time of the warm-up could pass before the first request.
            let attached = daemon.process().wait_for_log(ATTACHED, LIMIT);
            thread::sleep(WARM_UP);
            let outcome = attached.and_then(|()| kill());
            // Without a request in flight it does not notice that its disk is gone.
            stop.store(true, Ordering::Relaxed);
            let ended = load.join().map_err(|_| anyhow::anyhow!("the writer panicked"))?;
            outcome?;
            match ended {
                Ok(report) => {
                    ensure!(report.requests > 0, "the writer did nothing before the kill: {report:?}")
                }
                Err(error) => match error.downcast_ref() {
                    Some(LoadError::Disk(DiskError::DaemonEnded { .. })) => {}
                    _ => bail!("not the kill ended the writer: {error:#}"),
                },
            }
            Ok(())
        })
    }
}

/// A guest on the disk sees what was promised, every member becomes Clean, and all copies are the same.
///
/// # Errors
/// When that is not so.
pub fn check_everything(pool: &Pool, daemon: &Daemon, promises: &mut Promises) -> Result<()> {
    let options = DiskOptions {
        daemons: vec![daemon.process().pid()],
        buffer_size: 64 << 10,
        depth: 4,
        ..DiskOptions::new(daemon.socket())
    };
    let mut disk = Disk::attach(options)?;
    let check = promises.check_disk(&mut disk, 3)?;
    ensure!(check.is_good() && check.blocks > 0, "the disk does not hold what was promised: {check:?}");
    pool.wait_for_level("safe", LIMIT)?;
    drop(disk);
    pool.assert_identical_within(LIMIT)
}

/// The daemon's disk, for loads like this one. The end of the daemon ends them, at once.
pub(super) fn attach(daemon: &Daemon, load: &LoadSpec) -> Result<Disk> {
    let watched = [Watched { role: Role::Client, pid: daemon.process().pid() }];
    Ok(Disk::attach(load.disk_options(daemon.socket(), &watched))?)
}

/// Runs `load` and demands that every request was well answered and every read held what was promised.
pub(super) fn run_load(
    disk: &mut Disk,
    load: &LoadSpec,
    promises: &mut Promises,
    stop: Option<&AtomicBool>,
) -> Result<Report> {
    let around = Surroundings { stop, promises: Some(promises), ..Surroundings::default() };
    let report = load::run_on(disk, load, around).context("the load")?;
    ensure!(
        report.is_good(),
        "{} errors ({:?}), {} broken promises: {:?}",
        report.errors,
        report.first_error,
        report.violations,
        report.first_violations
    );
    Ok(report)
}
