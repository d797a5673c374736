//! Cables cut one by one and together, both ways and in one direction only, and during a resync, under a writer that remembers
//! what it was promised. `partitions.rs` cuts each connection by itself, between machines of their own that only TCP reaches.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::faults::{during_cut, wired};
use super::recovery::wait_for_writes;
use super::system::LIMIT;
use super::{Counts, Effort, System};
use crate::lab::cable::{Cable, End};
use crate::lab::{Daemon, Lab, Pool, wait_until};

/// What the daemon says when it has no pool, and when it has it again.
const SUSPENDED: &str = "suspended, no current copy";
const ATTACHED: &str = "attached with";
/// How often a resync may end before it is met.
const TRIES: u32 = 4;

/// Every cable cut in every direction under load, and during a resync, heals, and no promise is broken.
pub(super) fn cuts(lab: &Lab, effort: Effort) -> Result<Counts> {
    let resync = format!("[resync]\nbytes_per_s = {}\n", effort.slow_bytes_per_s);
    let (mut system, daemon) = wired(lab, effort, &resync)?;
    let writer = system.writer();
    let System { nodes, pool, promises, .. } = &mut system;
    // Well beyond the timeout.
    let lost = effort.leg_timeout * 2;
    let (slowest, report) = writer.during(pool, &daemon, promises, || {
        wait_for_writes(&nodes[1])?;
        Cuts { pool, daemon: &daemon, lost, slowest: Duration::ZERO }.all()
    })?;
    system.check_everything(&daemon)?;
    daemon.stop()?;
    Ok(Counts::from([
        ("requests".to_owned(), report.requests),
        ("slowest_return_ms".to_owned(), u64::try_from(slowest.as_millis())?),
    ]))
}

struct Cuts<'a> {
    pool: &'a Pool,
    daemon: &'a Daemon,
    lost: Duration,
    /// Longest time from a mended cable to a pool that is safe.
    slowest: Duration,
}

impl Cuts<'_> {
    fn all(mut self) -> Result<Duration> {
        let [a, b] = Cable::ALL;
        let whole = |cable: Cable| End::BOTH.map(|end| (cable, end));
        let one_way = End::BOTH.map(|end| [(b, end)]);
        for (what, cut) in [
            ("the cable of a", &whole(a)[..]),
            ("the cable of b", &whole(b)),
            ("what b sends", &one_way[0]),
            ("what is sent to b", &one_way[1]),
        ] {
            self.named(what, |cuts| {
                during_cut(cut, || cuts.pool.wait_for_level("degraded", LIMIT)).map(|_| ())
            })?;
        }
        self.named("both cables", |cuts| {
            // To the nodes nothing may have changed; the daemon had no pool meanwhile, and must have it again.
            let attached = cuts.said(ATTACHED);
            let both = [whole(a), whole(b)].concat();
            during_cut(&both, || cuts.says_more(SUSPENDED, cuts.said(SUSPENDED)))?;
            cuts.says_more(ATTACHED, attached)
        })?;
        self.named("the cable of the source, in the middle of a resync", |cuts| {
            for _ in 0..TRIES {
                if cuts.cut_source(&whole(a), &whole(b))? {
                    return Ok(());
                }
                cuts.pool.wait_for_level("safe", LIMIT)?;
            }
            bail!("the resync had ended before the cut {TRIES} times, although it is limited to be slow")
        })?;
        Ok(self.slowest)
    }

    /// Cuts the source off while member b is brought up to date; false if the resync was over already.
    fn cut_source(&self, source: &[(Cable, End)], stale: &[(Cable, End)]) -> Result<bool> {
        during_cut(stale, || self.pool.wait_for_level("degraded", LIMIT))?;
        wait_until("member b to be on its way back", LIMIT, || Ok(self.state_of_b()? != "out"))?;
        let (is_met, _) = during_cut(source, || {
            let is_met = self.state_of_b()? == "syncing";
            thread::sleep(self.lost);
            let state = self.state_of_b()?;
            ensure!(!is_met || state == "syncing", "without its source member b became {state}");
            Ok(is_met)
        })?;
        Ok(is_met)
    }

    /// How often the daemon has said so.
    fn said(&self, words: &str) -> usize {
        self.daemon.process().log_text().matches(words).count()
    }

    /// Waits until the daemon has said so more often than that.
    fn says_more(&self, words: &str, before: usize) -> Result<()> {
        self.daemon
            .process()
            .wait_until(&format!("'{words}' once more"), LIMIT, || Ok(self.said(words) > before))
    }

    /// One cut: afterwards the daemon must be attached again and the pool safe, by themselves.
    fn named(&mut self, what: &str, cut: impl FnOnce(&Self) -> Result<()>) -> Result<()> {
        cut(self).with_context(|| format!("cut: {what}"))?;
        let begin = Instant::now();
        wait_until("the daemon to be attached and the pool to be safe", LIMIT, || {
            let status = self.pool.status()?;
            let text = |pointer| status.pointer(pointer).and_then(serde_json::Value::as_str);
            Ok(text("/assessment/client/state") == Some("attached")
                && text("/assessment/level") == Some("safe"))
        })
        .with_context(|| format!("after the cut: {what}"))?;
        self.slowest = self.slowest.max(begin.elapsed());
        eprintln!("  {what}: safe again after {:.1} s", begin.elapsed().as_secs_f64());
        Ok(())
    }

    /// What the nodes tell of member b.
    fn state_of_b(&self) -> Result<String> {
        let status = self.pool.status()?;
        let state = status.pointer("/assessment/members/1/state").and_then(serde_json::Value::as_str);
        state.map(str::to_owned).with_context(|| format!("expected the state of member 1, found {status}"))
    }
}
