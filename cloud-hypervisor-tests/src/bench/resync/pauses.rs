//! How long a guest is kept waiting when a node dies, when a leg comes back, and when its daemon is killed and started
//! again: the longest time without a completion, seen by a guest that keeps 1 to 32 requests in flight.

use std::sync::atomic::Ordering;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::Serialize;

use super::stage::{Stage, daemon_of, wait_safe};
use crate::bench::guest::{self, Watch};
use crate::lab::Lab;

/// Depths of the trials, in turn.
const DEPTHS: [u32; 4] = [1, 4, 16, 32];
const DISK_MIB: u64 = 256;
/// How long the guest runs undisturbed before each trial.
const CALM: Duration = Duration::from_millis(150);
/// How long after an event its effects are looked for.
const AFTER: Duration = Duration::from_millis(250);

/// What a guest noticed of one kind of event.
#[derive(Clone, Debug, Serialize)]
pub struct Pause {
    /// The event.
    pub event: &'static str,
    /// Median of the longest gaps.
    pub p50_ms: f64,
    /// 99 % of the longest gaps were no longer; with fewer than 100 trials, all of them.
    pub p99_ms: f64,
    /// Trials.
    pub n: usize,
    /// Most that it may be.
    pub bar_ms: Option<f64>,
}

/// A node dies by SIGKILL; the leg is dropped.
pub const NODE_DIES: &str = "node dies by kill -9";
/// The node is back, and its member takes part again, first Syncing, then Clean.
pub const LEG_REJOINS: &str = "leg rejoins";
/// The daemon is killed by SIGKILL and started again at once.
pub const DAEMON_RESTARTS: &str = "daemon killed and started again";
/// As long as a trial, without any event: what the machine itself does.
pub const NOTHING: &str = "nothing (the machine's own)";

/// Runs `trials` of each event.
pub(super) fn measure(lab: &Lab, trials: usize, say: &dyn Fn(&str)) -> Result<Vec<Pause>> {
    let mut stage = Stage::start(lab, DISK_MIB)?;
    let watch = Watch::default();
    let socket = stage.daemon.socket().to_owned();
    let found = thread::scope(|scope| {
        let guest = scope.spawn(|| guest::run(&socket, &watch, 1));
        let found = all_trials(lab, &mut stage, &watch, trials, say, &|| guest.is_finished());
        watch.stop.store(true, Ordering::Relaxed);
        let ended = guest.join().map_err(|_| anyhow::anyhow!("the guest panicked"))?;
        let requests = ended.context("the guest met an error")?;
        say(&format!("  the guest completed {requests} requests, none with an error"));
        found
    })?;
    wait_safe(&stage.pool)?;
    stage.stop_daemon()?;
    stage.assert_identical()?;
    Ok(found)
}

fn all_trials(
    lab: &Lab,
    stage: &mut Stage<'_>,
    watch: &Watch,
    trials: usize,
    say: &dyn Fn(&str),
    has_ended: &dyn Fn() -> bool,
) -> Result<Vec<Pause>> {
    let (mut nothing, mut dies, mut rejoins, mut restarts) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    let ensure_alive = || {
        anyhow::ensure!(!has_ended(), "the guest ended before its trials did");
        Ok(())
    };
    for trial in 0..trials {
        ensure_alive()?;
        begin_trial(watch, trial);
        nothing.push(gap_of(watch, || Ok(()))?);
        dies.push(gap_of(watch, || stage.b.kill())?);
        stage.wait_for_b("out")?;
        rejoins.push(gap_of(watch, || {
            stage.return_b()?;
            stage.wait_for_b("clean").map(|_| ())
        })?);
    }
    say(&format!("  {trials} deaths and returns of a node"));
    for trial in 0..trials {
        ensure_alive()?;
        begin_trial(watch, trial);
        restarts.push(gap_of(watch, || {
            stage.daemon.kill()?;
            stage.daemon = daemon_of(&stage.pool).start(lab)?;
            Ok(())
        })?);
        // What was in flight may have taken a member out; it comes back by itself.
        wait_safe(&stage.pool)?;
    }
    say(&format!("  {trials} restarts of the daemon"));
    Ok(vec![
        pause(NODE_DIES, &dies, Some(100.0)),
        pause(LEG_REJOINS, &rejoins, Some(50.0)),
        pause(DAEMON_RESTARTS, &restarts, Some(500.0)),
        pause(NOTHING, &nothing, None),
    ])
}

fn begin_trial(watch: &Watch, trial: usize) {
    watch.depth.store(DEPTHS[trial % DEPTHS.len()], Ordering::Relaxed);
    thread::sleep(CALM);
}

/// The longest gap from the beginning of the event until some time after its end.
fn gap_of(watch: &Watch, event: impl FnOnce() -> Result<()>) -> Result<Duration> {
    let begin = Instant::now();
    event()?;
    thread::sleep(AFTER);
    Ok(watch.longest_gap(begin, Instant::now()))
}

fn pause(event: &'static str, gaps: &[Duration], bar_ms: Option<f64>) -> Pause {
    let mut ms: Vec<f64> = gaps.iter().map(|gap| gap.as_secs_f64() * 1000.0).collect();
    ms.sort_by(f64::total_cmp);
    let rank = |per_mille: usize| (ms.len() * per_mille).div_ceil(1000).max(1) - 1;
    let at = |per_mille| ms.get(rank(per_mille)).copied().unwrap_or(0.0);
    Pause { event, p50_ms: at(500), p99_ms: at(990), n: ms.len(), bar_ms }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn with_fifty_trials_the_99th_percentile_is_the_worst() {
        let gaps: Vec<Duration> = (1..=50).rev().map(Duration::from_millis).collect();
        let pause = pause(NODE_DIES, &gaps, Some(100.0));
        assert!((pause.p50_ms - 25.0).abs() < 1e-9 && (pause.p99_ms - 50.0).abs() < 1e-9, "{pause:?}");
        assert_eq!(pause.n, 50);
    }
}
