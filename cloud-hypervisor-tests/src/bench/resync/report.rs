//! Tables for people, and the bars that the project holds itself to.

use std::fmt::Write as _;

use super::amplification::EXACT;
use super::{Outcome, Pause, Run, Verdict};

/// Least share of its bandwidth that a guest keeps while a leg is brought up to date.
const KEPT: f64 = 0.8;
/// How far the time for five times the data may be from five times the time.
const PROPORTIONAL: f64 = 0.2;
/// How far the time for the same data on a larger disk may be from that on a small one.
const INDEPENDENT: f64 = 0.1;
/// Most that the daemon's connections may carry of anything for each byte that a resync moves between nodes.
const CONTROL_SHARE: f64 = 0.01;

impl Outcome {
    /// Judges what was measured.
    pub(super) fn judge(&mut self) {
        let mut bars = Vec::new();
        let mut bar = |held: bool, text: String| bars.push(Verdict { text, held });
        for case in &self.amplification {
            let what = case.what;
            let moved = case.moved_bytes as f64 / case.limit_bytes.max(1) as f64;
            if what.contains("killed") {
                let text = format!("{what}: at most the chunks missed are moved ({moved:.3} of them)");
                bar(case.moved_bytes <= case.limit_bytes, text);
            } else {
                let ratio = case.amplification();
                bar(ratio <= EXACT, format!("{what}: amplification at most 1.00, found {ratio:.2}"));
            }
            let tcp = case.client_tcp_bytes as f64 / case.moved_bytes.max(1) as f64;
            // Zeroes move next to nothing; what else there is to say is then more than that.
            let is_small = case.client_tcp_bytes < 256 << 10 || tcp <= CONTROL_SHARE;
            bar(
                case.client_resync_bytes == 0 && is_small,
                format!(
                    "{what}: no byte of resync through the hypervisor, found {} ({} bytes of control)",
                    case.client_resync_bytes, case.client_tcp_bytes
                ),
            );
        }
        for run in &self.runs {
            let gb = run.gb;
            for (before, figure) in
                [("one leg down, as published", run.initial_mb_s), ("both legs up", run.healthy_mb_s)]
            {
                let kept = run.during_mb_s / figure.max(f64::MIN_POSITIVE);
                let text = format!(
                    "{gb} GB: guest keeps at least {KEPT} of its bandwidth before ({before}), found {kept:.2}"
                );
                bar(kept >= KEPT, text);
            }
            bar(
                run.client_resync_bytes == 0,
                format!(
                    "{gb} GB: no byte of resync through the hypervisor, found {}",
                    run.client_resync_bytes
                ),
            );
        }
        let find = |gb: f64| self.runs.iter().find(|run| (run.gb - gb).abs() < 1e-9);
        if let (Some(one), Some(five)) = (find(1.0), find(5.0)) {
            for (how, time) in TIMES {
                let ratio = time(five) / time(one).max(f64::MIN_POSITIVE);
                let text = format!("5 GB take 5 times as long as 1 GB within 20 %, {how}: found {ratio:.2}");
                bar((ratio - 5.0).abs() <= 5.0 * PROPORTIONAL, text);
            }
        }
        if let (Some(small), Some(large)) = (self.runs.first(), &self.larger_disk) {
            for (how, time) in TIMES {
                let ratio = time(large) / time(small).max(f64::MIN_POSITIVE);
                let text = format!(
                    "the same data on a disk 4 times as large takes as long within 10 %, {how}: found {ratio:.2}"
                );
                bar((ratio - 1.0).abs() <= INDEPENDENT, text);
            }
        }
        for pause in &self.pauses {
            let Some(limit) = pause.bar_ms else { continue };
            let Pause { event, p99_ms, n, .. } = pause;
            bar(
                *p99_ms <= limit,
                format!("{event}: p99 of {n} pauses at most {limit:.0} ms, found {p99_ms:.1}"),
            );
        }
        self.bars = bars;
    }

    /// Everything as text.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = String::new();
        self.amplification_table(&mut text);
        self.experiment_table(&mut text);
        self.pause_table(&mut text);
        self.cost_table(&mut text);
        line(&mut text, "");
        for bar in &self.bars {
            line(&mut text, &format!("{}  {}", if bar.held { "held  " } else { "MISSED" }, bar.text));
        }
        line(&mut text, &format!("load averages before and after: {}", self.load_averages.join("; ")));
        text
    }

    fn amplification_table(&self, text: &mut String) {
        if self.amplification.is_empty() {
            return;
        }
        line(
            text,
            "\nmissed                                     missed MiB  written MiB  moved MiB  moved/missed  daemon KiB",
        );
        for case in &self.amplification {
            let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
            line(
                text,
                &format!(
                    "{:42} {:10.2}  {:11.2}  {:9.2}  {:12.2}  {:10.1}",
                    case.what,
                    mib(case.missed_bytes),
                    mib(case.written_bytes),
                    mib(case.moved_bytes),
                    case.amplification(),
                    case.client_tcp_bytes as f64 / 1024.0
                ),
            );
        }
    }

    fn experiment_table(&self, text: &mut String) {
        if self.runs.is_empty() {
            return;
        }
        line(
            text,
            "\ndirtied     disk    both legs: MB/s, µs   initial: MB/s, µs    during sync: MB/s, µs   sync s   idle sync s",
        );
        for run in self.runs.iter().chain(&self.larger_disk) {
            line(
                text,
                &format!(
                    "{:4} GB {:5.1} GB {:12.0} {:8.0} {:11.0} {:8.0} {:15.0} {:8.0} {:8.2} {:13.2}",
                    run.gb,
                    run.disk_bytes as f64 / 1e9,
                    run.healthy_mb_s,
                    run.healthy_mean_us,
                    run.initial_mb_s,
                    run.initial_mean_us,
                    run.during_mb_s,
                    run.during_mean_us,
                    run.sync_s,
                    run.idle_sync_s
                ),
            );
        }
        if let Some(found) = &self.elsewhere {
            line(
                text,
                &format!(
                    "{:.1} GB missed, guest writes elsewhere (4 KiB random, 32 in flight): {:.0} MB/s before, {:.0} during, sync {:.2} s, {:.0} MB/s",
                    found.missed_bytes as f64 / 1e9,
                    found.healthy_mb_s,
                    found.during_mb_s,
                    found.sync_s,
                    found.moved_bytes as f64 / 1e6 / found.sync_s.max(f64::MIN_POSITIVE)
                ),
            );
        }
    }

    fn pause_table(&self, text: &mut String) {
        if self.pauses.is_empty() {
            return;
        }
        line(text, "\nlongest time without a completion            p50 ms    p99 ms    trials");
        for Pause { event, p50_ms, p99_ms, n, .. } in &self.pauses {
            line(text, &format!("{event:42} {p50_ms:8.1}  {p99_ms:8.1}  {n:8}"));
        }
    }

    fn cost_table(&self, text: &mut String) {
        let Some(costs) = &self.costs else { return };
        line(
            text,
            "\nmemory of its own                                KiB   more for each GiB of the pool, bytes",
        );
        for memory in &costs.memory {
            line(
                text,
                &format!("{:46} {:6} {:10}", memory.what, memory.bytes >> 10, memory.more_bytes_per_gib),
            );
        }
        line(text, "\nmetadata pages of 4 KiB for each GiB of writes, on each node      share of the data");
        for metadata in &costs.metadata {
            let share = metadata.share * 100.0;
            line(text, &format!("{:46} {:6} {share:17.3} %", metadata.what, metadata.pages_per_gib));
        }
    }
}

type Time = fn(&Run) -> f64;

/// The two times of a run, and under what they were measured.
const TIMES: [(&str, Time); 2] = [("run repeated", |run| run.sync_s), ("guest idle", |run| run.idle_sync_s)];

fn line(text: &mut String, line: &str) {
    // Writing to a string cannot fail.
    let _ = writeln!(text, "{line}");
}

#[cfg(test)]
mod tests {
    use super::super::Case;
    use super::*;

    fn run(gb: f64, during_mb_s: f64, sync_s: f64) -> Run {
        Run {
            gb,
            disk_bytes: 1 << 30,
            healthy_mb_s: 110.0,
            healthy_mean_us: 1.0,
            initial_mb_s: 100.0,
            initial_mean_us: 1.0,
            during_mb_s,
            during_mean_us: 1.0,
            sync_s,
            idle_sync_s: sync_s,
            missed_bytes: 1,
            moved_bytes: 1,
            idle_moved_bytes: 1,
            client_resync_bytes: 0,
            client_idle_tcp_bytes: 1,
        }
    }

    fn judged(outcome: Outcome) -> Outcome {
        let mut outcome = outcome;
        outcome.judge();
        outcome
    }

    #[test]
    fn bars_are_held_and_missed_as_their_figures_say() {
        let good = judged(Outcome {
            runs: vec![run(1.0, 95.0, 1.0), run(5.0, 95.0, 5.9)],
            larger_disk: Some(run(1.0, 95.0, 1.09)),
            ..Outcome::default()
        });
        assert!(good.holds() && good.bars.len() == 10, "{:?}", good.bars);
        let missed = |outcome: Outcome| {
            let outcome = judged(outcome);
            outcome.bars.into_iter().filter(|bar| !bar.held).map(|bar| bar.text).collect::<Vec<_>>()
        };
        let slow = missed(Outcome { runs: vec![run(1.0, 79.0, 1.0)], ..Outcome::default() });
        assert!(slow.len() == 2 && slow[0].contains("as published") && slow[0].contains("0.79"), "{slow:?}");
        let long =
            missed(Outcome { runs: vec![run(1.0, 95.0, 1.0), run(5.0, 95.0, 6.1)], ..Outcome::default() });
        assert!(long.len() == 2 && long[0].contains("6.10"), "{long:?}");
        let pause = Pause { event: "x", p50_ms: 1.0, p99_ms: 50.1, n: 50, bar_ms: Some(50.0) };
        assert_eq!(missed(Outcome { pauses: vec![pause], ..Outcome::default() }).len(), 1);
    }

    #[test]
    fn a_byte_too_many_between_nodes_or_any_through_the_hypervisor_misses_its_bar() {
        let case = Case {
            what: "4 KiB random",
            missed_bytes: 1_000_000,
            written_bytes: 1_000_000,
            moved_bytes: 1_001_000,
            limit_bytes: 1_005_000,
            client_tcp_bytes: 1000,
            client_resync_bytes: 0,
        };
        let held = |case: Case| judged(Outcome { amplification: vec![case], ..Outcome::default() }).holds();
        assert!(held(case.clone()));
        assert!(!held(Case { moved_bytes: 1_010_000, ..case.clone() }));
        assert!(!held(Case { client_resync_bytes: 1, ..case.clone() }));
        assert!(!held(Case { client_tcp_bytes: 1_000_000, ..case.clone() }));
        assert!(held(Case { what: "holder killed", moved_bytes: 1_005_000, ..case.clone() }));
        assert!(!held(Case { what: "holder killed", moved_bytes: 1_005_001, ..case }));
    }
}
