//! The comparison of `make bench`: the same workloads on every system, alternating in one run so that whatever else the
//! machine does hits all alike; medians over the rounds, ratios to the peer, and the bars that the project holds itself to.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, bail};
use serde::Serialize;

use super::disk::{Disk, DiskError};
use super::load::{LoadSpec, Pattern, Report, Surroundings, run_on};
use super::systems::{Programs, System, SystemKind};

/// What a comparison runs.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Systems, in the order of the first round.
    pub systems: Vec<SystemKind>,
    /// Workloads, in order.
    pub workloads: Vec<Workload>,
    /// How often each workload runs on each system.
    pub rounds: u32,
    /// How often the systems are started anew, in another order each time; the rounds are divided among these starts. One
    /// start of a program can be some per cent faster than the next one of the same program, however long both run.
    pub starts: u32,
    /// Measured time of each of these runs.
    pub cell: Duration,
    /// Size of the disks.
    pub disk_bytes: u64,
    /// A directory on tmpfs with room for two copies per system.
    pub directory: PathBuf,
}

/// A named load of the comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Its name in tables and files.
    pub name: &'static str,
    pattern: Pattern,
    block_size: u32,
    depth: u32,
    rate: Option<u32>,
}

const fn workload(
    name: &'static str,
    pattern: Pattern,
    block_size: u32,
    depth: u32,
    rate: Option<u32>,
) -> Workload {
    Workload { name, pattern, block_size, depth, rate }
}

/// The workloads of the comparison.
pub const WORKLOADS: [Workload; 9] = [
    workload("rw1", Pattern::RandWrite, 4096, 1, None),
    workload("rr1", Pattern::RandRead, 4096, 1, None),
    workload("rw32", Pattern::RandWrite, 4096, 32, None),
    workload("rr32", Pattern::RandRead, 4096, 32, None),
    workload("sw128k", Pattern::Write, 128 * 1024, 16, None),
    workload("sr128k", Pattern::Read, 128 * 1024, 16, None),
    workload("sw512", Pattern::Write, 4096, 512, None),
    workload("rate5k", Pattern::RandWrite, 4096, 32, Some(5000)),
    workload("idle", Pattern::RandWrite, 4096, 1, Some(10)),
];

impl Workload {
    /// The one named so, or an error that lists all.
    pub fn named(name: &str) -> Result<Self, String> {
        let all = WORKLOADS.map(|workload| workload.name).join(", ");
        let found = WORKLOADS.into_iter().find(|workload| workload.name == name);
        found.ok_or_else(|| format!("expected one of {all}, found \"{name}\""))
    }

    fn spec(&self, plan: &Plan, round: u32) -> LoadSpec {
        LoadSpec {
            name: self.name.into(),
            pattern: self.pattern,
            block_size: self.block_size,
            depth: self.depth,
            rate: self.rate,
            runtime_ms: u64::try_from(plan.cell.as_millis()).unwrap_or(u64::MAX),
            size: Some(plan.disk_bytes),
            // All systems of a round see the same places.
            seed: u64::from(round) + 1,
            continue_on_error: true,
            stall_timeout_ms: 10_000,
            ..LoadSpec::default()
        }
    }
}

/// Medians of one workload on one system.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// The system.
    pub system: SystemKind,
    /// The workload.
    pub workload: &'static str,
    /// Requests per second.
    pub iops: f64,
    /// Millions of bytes per second.
    pub mb_s: f64,
    /// Median latency.
    pub p50_us: f64,
    /// 99th percentile of the latency.
    pub p99_us: f64,
    /// 99.9th percentile of the latency.
    pub p999_us: f64,
    /// Processor time of the daemon per request.
    pub client_cpu_us_per_io: f64,
    /// The daemon's use, in hundredths of a core.
    pub client_cpu_pct: f64,
    /// Processor time of the storage servers together per request.
    pub server_cpu_us_per_io: f64,
    /// The storage servers' use together, in hundredths of a core.
    pub server_cpu_pct: f64,
    /// The daemon's memory beyond the guest's; the greatest of the rounds.
    pub client_own_kib: u64,
    /// Requests that failed; the greatest of the rounds, so that a median cannot hide one.
    pub errors: u64,
    /// What the rounds measured.
    pub rounds: Vec<Report>,
}

impl Summary {
    fn of(system: SystemKind, workload: &'static str, rounds: Vec<Report>) -> Self {
        let middle = |value: fn(&Report) -> f64| median(rounds.iter().map(value).collect());
        Self {
            system,
            workload,
            iops: middle(|report| report.iops),
            mb_s: middle(|report| report.mb_s),
            p50_us: middle(|report| report.p50_us),
            p99_us: middle(|report| report.p99_us),
            p999_us: middle(|report| report.p999_us),
            client_cpu_us_per_io: middle(|report| report.client_cpu_us_per_io),
            client_cpu_pct: middle(|report| report.client_cpu_pct),
            server_cpu_us_per_io: middle(|report| report.server_cpu_us_per_io),
            server_cpu_pct: middle(|report| report.server_cpu_pct),
            client_own_kib: rounds.iter().map(|report| report.client_own_kib).max().unwrap_or(0),
            errors: rounds.iter().map(|report| report.errors).max().unwrap_or(0),
            rounds,
        }
    }
}

/// The machine and the programs, for whoever reads the figures later.
#[derive(Clone, Debug, Serialize)]
pub struct Machine {
    /// Seconds since 1970 at the start.
    pub started_unix: u64,
    /// Kernel release.
    pub kernel: String,
    /// Processor model.
    pub processor: String,
    /// Cores that are usable.
    pub cores: usize,
    /// Load averages at the start: what else ran.
    pub load_before: String,
    /// The same at the end.
    pub load_after: String,
    /// Program and version.
    pub versions: Vec<(String, String)>,
    /// Rounds of the run.
    pub rounds: u32,
    /// How often the systems were started anew for them.
    pub starts: u32,
    /// Measured seconds of each cell.
    pub cell_seconds: f64,
}

impl Machine {
    fn look(plan: &Plan, programs: &Programs) -> Self {
        let read = |path: &str| fs::read_to_string(path).unwrap_or_default().trim().to_owned();
        let cpuinfo = read("/proc/cpuinfo");
        let model = cpuinfo.lines().find_map(|line| line.strip_prefix("model name")?.split(':').nth(1));
        Self {
            started_unix: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs()),
            kernel: read("/proc/sys/kernel/osrelease"),
            processor: model.unwrap_or("unknown").trim().to_owned(),
            cores: thread::available_parallelism().map_or(1, Into::into),
            load_before: read("/proc/loadavg"),
            load_after: String::new(),
            versions: programs.versions(),
            rounds: plan.rounds,
            starts: plan.starts.min(plan.rounds),
            cell_seconds: plan.cell.as_secs_f64(),
        }
    }
}

/// What a comparison found.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// By workload, then by system, in the plan's order.
    pub summaries: Vec<Summary>,
    /// Where it was measured.
    pub machine: Machine,
}

/// Starts the systems, runs the plan, stops them. `progress` is told each step in words.
pub fn compare(plan: &Plan, programs: &Programs, mut progress: impl FnMut(&str)) -> anyhow::Result<Outcome> {
    if plan.systems.is_empty() || plan.workloads.is_empty() || plan.rounds == 0 || plan.starts == 0 {
        bail!("expected at least one system, one workload, one round and one start, found {plan:?}");
    }
    let mut machine = Machine::look(plan, programs);
    let mut systems = BTreeMap::new();
    let mut reports: BTreeMap<(usize, usize), Vec<Report>> = BTreeMap::new();
    for round in 0..plan.rounds {
        if let Some(start) = start_in(plan, round) {
            systems.clear();
            for index in order(plan, start) {
                systems.insert(index, filled(plan, programs, plan.systems[index], &mut progress)?);
            }
        }
        for (number, workload) in plan.workloads.iter().enumerate() {
            for index in order(plan, round) {
                let Some(system) = systems.get_mut(&index) else { continue };
                let report = cell(system, &workload.spec(plan, round)).with_context(|| {
                    format!("{} on {}, round {}", workload.name, system.kind(), round + 1)
                })?;
                progress(&format!(
                    "round {}/{}  {:7} {:15} {:9.0} IOPS {:8.1} MB/s  p50 {:8.1} µs{}",
                    round + 1,
                    plan.rounds,
                    workload.name,
                    system.kind(),
                    report.iops,
                    report.mb_s,
                    report.p50_us,
                    report.first_error.as_ref().map_or(String::new(), |error| format!("  ERROR: {error}"))
                ));
                reports.entry((number, index)).or_default().push(report);
            }
        }
    }
    machine.load_after = fs::read_to_string("/proc/loadavg").unwrap_or_default().trim().to_owned();
    let summary = |((workload, system), rounds): ((usize, usize), Vec<Report>)| {
        Summary::of(plan.systems[system], plan.workloads[workload].name, rounds)
    };
    Ok(Outcome { summaries: reports.into_iter().map(summary).collect(), machine })
}

/// The number of the start that a round begins with, if it does.
fn start_in(plan: &Plan, round: u32) -> Option<u32> {
    let starts = plan.starts.min(plan.rounds);
    let of = |round: u32| u64::from(round) * u64::from(starts) / u64::from(plan.rounds);
    let is_first = round.checked_sub(1).is_none_or(|before| of(before) < of(round));
    u32::try_from(of(round)).ok().filter(|_| is_first)
}

/// The systems of a round, or of a start: each begins with another one, and once all have begun the direction turns, so that none
/// always follows the same.
fn order(plan: &Plan, number: u32) -> impl Iterator<Item = usize> + use<> {
    let (count, number) = (plan.systems.len(), usize::try_from(number).unwrap_or(0));
    let is_turned = !(number / count).is_multiple_of(2);
    (0..count).map(move |step| (number + if is_turned { count - step } else { step }) % count)
}

/// A system, started from nothing, whose disk was written once.
fn filled(
    plan: &Plan,
    programs: &Programs,
    kind: SystemKind,
    progress: &mut impl FnMut(&str),
) -> anyhow::Result<System> {
    progress(&format!("starting {kind}, writing its disk of {} MiB once", plan.disk_bytes >> 20));
    let mut system = System::start(kind, programs, &plan.directory, plan.disk_bytes)?;
    cell(&mut system, &LoadSpec::fill(plan.disk_bytes))
        .with_context(|| format!("filling the disk of {kind}"))?;
    Ok(system)
}

/// How long a daemon may take until it listens for its next front end.
const REATTACH: Duration = Duration::from_secs(5);

/// One load on one system, attached for it alone.
fn cell(system: &mut System, spec: &LoadSpec) -> anyhow::Result<Report> {
    let begin = Instant::now();
    let (mut disk, watched) = loop {
        system.ready()?;
        let watched = system.watched();
        match Disk::attach(spec.disk_options(system.socket(), &watched)) {
            Ok(disk) => break (disk, watched),
            Err(DiskError::Attach { .. }) if begin.elapsed() < REATTACH => {
                thread::sleep(Duration::from_millis(20))
            }
            Err(error) => return Err(error.into()),
        }
    };
    let surroundings = Surroundings { watched: &watched, ..Surroundings::default() };
    Ok(run_on(&mut disk, spec, surroundings)?)
}

/// A figure that the project promises.
struct Bar {
    workload: &'static str,
    what: &'static str,
    value: fn(&Summary) -> f64,
    limit: Limit,
}

enum Limit {
    /// At least this many times the peer's.
    TimesPeerAtLeast(f64),
    /// At most this many times the peer's.
    TimesPeerAtMost(f64),
    /// Less than this, whatever the peer does.
    Below(f64),
}

const BARS: [Bar; 8] = [
    Bar { workload: "rw1", what: "p50", value: |cell| cell.p50_us, limit: Limit::TimesPeerAtMost(0.6) },
    Bar { workload: "rw32", what: "IOPS", value: |cell| cell.iops, limit: Limit::TimesPeerAtLeast(3.5) },
    Bar { workload: "rr32", what: "IOPS", value: |cell| cell.iops, limit: Limit::TimesPeerAtLeast(3.5) },
    Bar { workload: "sw128k", what: "MB/s", value: |cell| cell.mb_s, limit: Limit::TimesPeerAtLeast(2.5) },
    Bar { workload: "sw512", what: "IOPS", value: |cell| cell.iops, limit: Limit::TimesPeerAtLeast(5.0) },
    Bar {
        workload: "rw32",
        what: "client CPU per request",
        value: |cell| cell.client_cpu_us_per_io,
        limit: Limit::TimesPeerAtMost(0.33),
    },
    Bar {
        workload: "rate5k",
        what: "client CPU",
        value: |cell| cell.client_cpu_pct,
        limit: Limit::TimesPeerAtMost(0.5),
    },
    Bar {
        workload: "idle",
        what: "CPU % of daemon and nodes",
        value: |cell| cell.client_cpu_pct + cell.server_cpu_pct,
        limit: Limit::Below(1.0),
    },
];

/// By how much a build may differ from another one on a machine as noisy as those where this runs, and not be worse.
const WORSE: f64 = 1.1;

/// So much more of a core, in hundredths, is nothing that a short run can tell from chance.
const LITTLE: f64 = 0.3;

/// Most memory of the daemon beyond the guest's.
const CLIENT_OWN_KIB: u64 = 32 * 1024;

/// Whether a bar is held.
#[derive(Clone, Debug, PartialEq)]
pub struct Verdict {
    /// The bar in words, with both figures.
    pub text: String,
    /// Held?
    pub held: bool,
}

impl Outcome {
    /// All requests of all systems succeeded.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.summaries.iter().all(|cell| cell.errors == 0)
    }

    fn find(&self, system: SystemKind, workload: &str) -> Option<&Summary> {
        self.summaries.iter().find(|cell| cell.system == system && cell.workload == workload)
    }

    /// The bars for which this run has the figures.
    #[must_use]
    pub fn verdicts(&self) -> Vec<Verdict> {
        let mut verdicts: Vec<Verdict> = BARS.iter().filter_map(|bar| self.verdict(bar)).collect();
        verdicts.extend(self.changes());
        let own = self.summaries.iter().filter(|cell| cell.system == SystemKind::Brmr);
        if let Some(most) = own.map(|cell| cell.client_own_kib).max() {
            verdicts.push(Verdict {
                text: format!("daemon's memory beyond the guest's: {most} KiB, at most {CLIENT_OWN_KIB}"),
                held: most <= CLIENT_OWN_KIB,
            });
        }
        verdicts
    }

    /// What became worse or better since the other build: speed where the guest asks for all it can get, the processor time
    /// of all processes where it asks for less. The ratio is the median of the rounds': what else the machine does comes and
    /// goes, and hits the two of a round alike.
    fn changes(&self) -> Vec<Verdict> {
        let ours = self.summaries.iter().filter(|cell| cell.system == SystemKind::Brmr);
        let change = |cell: &Summary| {
            let before = self.find(SystemKind::BrmrBefore, cell.workload)?;
            let workload = WORKLOADS.into_iter().find(|workload| workload.name == cell.workload)?;
            let (what, value): (_, fn(&Report) -> f64) = match workload.rate {
                None => ("IOPS", |report| report.iops),
                Some(_) => {
                    ("CPU % of daemon and nodes", |report| report.client_cpu_pct + report.server_cpu_pct)
                }
            };
            let rounds = || cell.rounds.iter().map(value).zip(before.rounds.iter().map(value));
            let ratio =
                median(rounds().filter(|(_, then)| *then > 0.0).map(|(now, then)| now / then).collect());
            let more = median(rounds().map(|(now, then)| now - then).collect());
            let (now, then) = rounds().unzip();
            let (now, then) = (median(now), median(then));
            let (held, limit) = match workload.rate {
                None => (ratio >= 1.0 / WORSE, format!("at least {:.2}", 1.0 / WORSE)),
                Some(_) => {
                    (ratio <= WORSE || more < LITTLE, format!("at most {WORSE:.2}, or by less than {LITTLE}"))
                }
            };
            let name = cell.workload;
            let text = format!(
                "{name} {what}: {ratio:.2} times the other build's (median of the rounds' ratios; medians {now:.1} and \
                 {then:.1}), {limit}"
            );
            Some(Verdict { text, held })
        };
        ours.filter_map(change).collect()
    }

    fn verdict(&self, bar: &Bar) -> Option<Verdict> {
        let ours = (bar.value)(self.find(SystemKind::Brmr, bar.workload)?);
        let name = format!("{} {}", bar.workload, bar.what);
        if let Limit::Below(limit) = bar.limit {
            return Some(Verdict { text: format!("{name}: {ours:.2}, below {limit}"), held: ours < limit });
        }
        let peer = (bar.value)(self.find(SystemKind::Quorum, bar.workload)?);
        let ratio = ours / peer;
        let (held, limit) = match bar.limit {
            Limit::TimesPeerAtLeast(limit) => (ratio >= limit, format!("at least {limit}")),
            Limit::TimesPeerAtMost(limit) => (ratio <= limit, format!("at most {limit}")),
            Limit::Below(_) => return None,
        };
        Some(Verdict { text: format!("{name}: {ours:.1} is {ratio:.2} times {peer:.1}, {limit}"), held })
    }

    /// The table of medians and of ratios to the peer, then the bars.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!(
            "{:9}{:16}{:>10}{:>9}{:>10}{:>10}{:>9}{:>8}{:>9}{:>8}{:>7} |{:>7}{:>7}{:>7}{:>7}\n",
            "workload",
            "system",
            "IOPS",
            "MB/s",
            "p50 µs",
            "p99 µs",
            "cli µs",
            "cli %",
            "srv µs",
            "KiB own",
            "errors",
            "×IOPS",
            "×p50",
            "×p99",
            "×cli"
        );
        let mut previous = "";
        for cell in &self.summaries {
            if !previous.is_empty() && previous != cell.workload {
                text.push('\n');
            }
            previous = cell.workload;
            let peer = self.find(SystemKind::Quorum, cell.workload);
            let ratio = |value: fn(&Summary) -> f64| match peer.map(value) {
                Some(base) if base > 0.0 => format!("{:.2}", value(cell) / base),
                _ => "-".into(),
            };
            let _ = writeln!(
                text,
                "{:8}{:16}{:>10.0}{:>9.1}{:>10.1}{:>10.1}{:>9.2}{:>8.1}{:>9.2}{:>8}{:>7} |{:>7}{:>7}{:>7}{:>7}",
                cell.workload,
                cell.system,
                cell.iops,
                cell.mb_s,
                cell.p50_us,
                cell.p99_us,
                cell.client_cpu_us_per_io,
                cell.client_cpu_pct,
                cell.server_cpu_us_per_io,
                cell.client_own_kib,
                cell.errors,
                ratio(|cell| cell.iops),
                ratio(|cell| cell.p50_us),
                ratio(|cell| cell.p99_us),
                ratio(|cell| cell.client_cpu_us_per_io)
            );
        }
        for verdict in self.verdicts() {
            let _ = write!(text, "\n{}  {}", if verdict.held { "pass" } else { "MISS" }, verdict.text);
        }
        text
    }

    /// Writes the summaries to `path` and the machine's facts to `machine.json` beside it.
    pub fn save(&self, path: &Path) -> anyhow::Result<()> {
        let directory = path.parent().unwrap_or(Path::new("."));
        let write = |path: &Path, text: String| {
            fs::create_dir_all(directory)
                .and_then(|()| fs::write(path, text))
                .with_context(|| format!("writing {}", path.display()))
        };
        write(path, serde_json::to_string_pretty(&self.summaries)?)?;
        write(&directory.join("machine.json"), serde_json::to_string_pretty(&self.machine)?)
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    let middle = values.len() / 2;
    match values.len() {
        0 => 0.0,
        count if count % 2 == 1 => values[middle],
        _ => f64::midpoint(values[middle - 1], values[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(system: SystemKind, workload: &'static str, scale: f64) -> Summary {
        let report = |factor: f64| Report {
            iops: 1000.0 * scale * factor,
            mb_s: 4.0 * scale * factor,
            p50_us: 100.0 / scale,
            client_cpu_us_per_io: 10.0 / scale,
            client_cpu_pct: 0.4,
            server_cpu_pct: 0.5,
            client_own_kib: 9000,
            ..Report::default()
        };
        Summary::of(system, workload, vec![report(5.0), report(1.0), report(0.1)])
    }

    fn outcome(ours: f64) -> Outcome {
        let programs = Programs::find("/x".into(), None);
        let plan = Plan {
            systems: Vec::new(),
            workloads: Vec::new(),
            rounds: 3,
            starts: 1,
            cell: Duration::from_secs(1),
            disk_bytes: 1,
            directory: "/tmp".into(),
        };
        let cells = ["rw1", "rw32", "idle"].into_iter();
        let summaries = cells
            .flat_map(|name| [summary(SystemKind::Brmr, name, ours), summary(SystemKind::Quorum, name, 1.0)])
            .collect();
        Outcome { summaries, machine: Machine::look(&plan, &programs) }
    }

    #[test]
    fn rounds_are_divided_among_starts_and_each_begins_with_another_system() {
        let plan = |rounds, starts| Plan {
            systems: vec![SystemKind::Brmr, SystemKind::BrmrBefore, SystemKind::Quorum],
            workloads: Vec::new(),
            rounds,
            starts,
            cell: Duration::from_secs(1),
            disk_bytes: 1,
            directory: "/tmp".into(),
        };
        let starts = |rounds, starts| {
            let plan = plan(rounds, starts);
            (0..rounds).map(|round| start_in(&plan, round)).collect::<Vec<_>>()
        };
        assert_eq!(starts(3, 1), [Some(0), None, None]);
        assert_eq!(starts(5, 2), [Some(0), None, None, Some(1), None]);
        assert_eq!(starts(2, 2), [Some(0), Some(1)]);
        assert_eq!(starts(2, 9), [Some(0), Some(1)]);
        assert_eq!(starts(5, 4), [Some(0), None, Some(1), Some(2), Some(3)]);
        let made = starts(16, 9).into_iter().flatten();
        assert_eq!(made.collect::<Vec<_>>(), (0..9).collect::<Vec<_>>());
        let order = |number| order(&plan(1, 1), number).collect::<Vec<_>>();
        assert_eq!([order(0), order(1), order(2)], [[0, 1, 2], [1, 2, 0], [2, 0, 1]]);
        assert_eq!([order(3), order(4), order(5)], [[0, 2, 1], [1, 0, 2], [2, 1, 0]]);
    }

    #[test]
    fn a_summary_holds_the_medians_and_the_greatest_of_errors() {
        let mut rounds = summary(SystemKind::Brmr, "rw1", 1.0).rounds;
        rounds[2].errors = 3;
        let found = Summary::of(SystemKind::Brmr, "rw1", rounds);
        assert!((found.iops - 1000.0).abs() < 1e-9);
        assert_eq!((found.errors, found.rounds.len()), (3, 3));
        assert!((median(vec![4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn bars_are_held_by_ratio_to_the_peer_and_only_where_there_are_figures() {
        let held =
            |ours| outcome(ours).verdicts().into_iter().map(|verdict| verdict.held).collect::<Vec<_>>();
        // rw1 p50, rw32 IOPS, rw32 client CPU, idle, memory; the other workloads were not run.
        assert_eq!(held(3.6), [true, true, true, true, true]);
        assert_eq!(held(3.4), [true, false, true, true, true]);
        assert_eq!(held(1.0), [false, false, false, true, true]);
    }

    #[test]
    fn a_build_is_judged_against_the_other_one_by_speed_or_by_what_a_given_load_costs() {
        let judged = |ours| {
            let mut outcome = outcome(ours);
            outcome.summaries.retain(|cell| cell.system == SystemKind::Brmr);
            for name in ["rw32", "idle"] {
                outcome.summaries.push(summary(SystemKind::BrmrBefore, name, 1.0));
            }
            for cell in [2, 4] {
                outcome.summaries[cell].rounds.iter_mut().for_each(|report| report.server_cpu_pct = 10.0);
            }
            outcome.summaries[2].rounds.iter_mut().for_each(|report| report.server_cpu_pct /= ours);
            outcome.changes().into_iter().map(|change| (change.held, change.text)).collect::<Vec<_>>()
        };
        let held = |ours| judged(ours).into_iter().map(|(held, _)| held).collect::<Vec<_>>();
        assert_eq!(held(1.0), [true, true]);
        assert_eq!(held(0.92), [true, true]);
        assert_eq!(held(0.8), [false, false]);
        let text = &judged(0.8)[0].1;
        assert_eq!(
            text,
            "rw32 IOPS: 0.80 times the other build's (median of the rounds' ratios; medians 800.0 and 1000.0), at least 0.91"
        );
        // The rounds are compared one by one: half as fast in two of three.
        let judged = |name, ours: [f64; 3], before: [f64; 3]| {
            let mut outcome = outcome(1.0);
            outcome.summaries.retain(|cell| cell.system == SystemKind::Brmr && cell.workload == name);
            outcome.summaries.push(summary(SystemKind::BrmrBefore, name, 1.0));
            for (cell, rounds) in outcome.summaries.iter_mut().zip([ours, before]) {
                for (report, value) in cell.rounds.iter_mut().zip(rounds) {
                    (report.iops, report.client_cpu_pct, report.server_cpu_pct) = (value, value, 0.0);
                }
            }
            outcome.changes().remove(0)
        };
        let speed = judged("rw32", [10.0, 20.0, 30.0], [20.0, 40.0, 30.0]);
        assert!(!speed.held && speed.text.contains(" 0.50 times"), "{}", speed.text);
        assert!(speed.text.contains("medians 20.0 and 30.0"), "{}", speed.text);
        // 30 % more in two of three, and all the same less by the medians.
        let cost = judged("idle", [13.0, 26.0, 15.0], [10.0, 20.0, 30.0]);
        assert!(!cost.held && cost.text.contains(" 1.30 times"), "{}", cost.text);
        assert!(
            judged("idle", [0.3, 0.4, 0.5], [0.1, 0.2, 0.3]).held,
            "nothing that can be told from chance"
        );
    }

    #[test]
    fn the_table_has_a_line_for_each_cell_and_the_ratio_to_the_peer() {
        let table = outcome(4.0).table();
        assert!(
            table
                .lines()
                .any(|line| line.starts_with("rw32") && line.contains("brmr") && line.contains("4.00"))
        );
        assert!(table.contains("pass  rw32 IOPS: 4000.0 is 4.00 times 1000.0, at least 3.5"), "{table}");
    }

    #[test]
    fn files_are_a_list_of_objects_and_the_machine_beside_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("deep/compare.json");
        outcome(2.0).save(&path).unwrap();
        let list: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
        for name in [
            "system",
            "workload",
            "iops",
            "mb_s",
            "p50_us",
            "p99_us",
            "client_cpu_us_per_io",
            "client_cpu_pct",
            "server_cpu_us_per_io",
            "errors",
            "rounds",
        ] {
            assert!(list[0].get(name).is_some(), "{name} is missing");
        }
        assert_eq!(list[0]["system"], "brmr");
        assert!(directory.path().join("deep/machine.json").exists());
    }
}
