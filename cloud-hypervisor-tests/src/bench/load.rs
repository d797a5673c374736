//! Runs a described load on a disk and reports what it did: rates, latencies, processor time per request of the
//! processes under load, and whether every value read was one that had been promised.

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::disk::{Disk, DiskError, DiskOptions, Finished, Operation, SECTOR, Slot, Status};
use super::histogram::Histogram;
use super::processes::{Memory, Role, Snapshot, Watched, own_cpu};
use super::sys;
use super::verify::{Promises, Violation};

/// Order and direction of the requests.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Pattern {
    /// Sequential reads.
    Read,
    /// Sequential writes.
    Write,
    /// Reads at random places.
    RandRead,
    /// Writes at random places.
    RandWrite,
    /// Both, sequentially.
    Rw,
    /// Both, at random places.
    RandRw,
}

impl Pattern {
    fn is_random(self) -> bool {
        matches!(self, Self::RandRead | Self::RandWrite | Self::RandRw)
    }

    fn writes(self) -> bool {
        !matches!(self, Self::Read | Self::RandRead)
    }
}

/// A load.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct LoadSpec {
    /// What the report calls it.
    pub name: String,
    /// Order and direction.
    pub pattern: Pattern,
    /// Reads in a hundred requests of a mixed pattern.
    pub read_percent: u32,
    /// Bytes of a request.
    pub block_size: u32,
    /// Greatest piece of a request's scatter/gather list; by default one piece per request.
    pub segment_size: Option<u32>,
    /// Requests in flight.
    pub depth: u32,
    /// Virtqueues.
    pub queues: u16,
    /// Requests per second, each due at a moment fixed beforehand; by default the next follows a completion.
    pub rate: Option<u32>,
    /// How long requests are issued.
    pub runtime_ms: u64,
    /// How long before that, unmeasured.
    pub ramp_ms: u64,
    /// Ends the load after this many requests, if that is earlier.
    pub max_requests: Option<u64>,
    /// First byte of the range that is used.
    pub offset: u64,
    /// Bytes of the range; by default all from `offset`.
    pub size: Option<u64>,
    /// Seed of places and mix.
    pub seed: u64,
    /// After the measured time, read the whole range and check it (needs promises).
    pub verify_at_end: bool,
    /// A flush, inside the measured time, ends a load that writes.
    pub flush_at_end: bool,
    /// Goes on after a request that failed.
    pub continue_on_error: bool,
    /// How long no completion may come while requests are in flight.
    pub stall_timeout_ms: u64,
}

impl Default for LoadSpec {
    fn default() -> Self {
        Self {
            name: String::new(),
            pattern: Pattern::RandRead,
            read_percent: 50,
            block_size: 4096,
            segment_size: None,
            depth: 1,
            queues: 1,
            rate: None,
            runtime_ms: 4000,
            ramp_ms: 500,
            max_requests: None,
            offset: 0,
            size: None,
            seed: 1,
            verify_at_end: false,
            flush_at_end: true,
            continue_on_error: false,
            stall_timeout_ms: 30_000,
        }
    }
}

impl LoadSpec {
    /// Writes `bytes` of the disk once, in order, in large requests: what precedes a measurement on a fresh disk.
    #[must_use]
    pub fn fill(bytes: u64) -> Self {
        let block_size = 128 * 1024;
        Self {
            name: "fill".into(),
            pattern: Pattern::Write,
            block_size,
            depth: 16,
            ramp_ms: 0,
            runtime_ms: 600_000,
            max_requests: Some(bytes / u64::from(block_size)),
            size: Some(bytes),
            ..Self::default()
        }
    }

    /// How to attach to `socket` so that this load can run.
    #[must_use]
    pub fn disk_options(&self, socket: &Path, watched: &[Watched]) -> DiskOptions {
        DiskOptions {
            queues: self.queues,
            depth: self.depth,
            buffer_size: self.block_size,
            segment_size: self.segment_size,
            seed: self.seed,
            daemons: watched
                .iter()
                .filter(|process| process.role == Role::Client)
                .map(|process| process.pid)
                .collect(),
            stall_timeout: Duration::from_millis(self.stall_timeout_ms),
            ..DiskOptions::new(socket)
        }
    }
}

/// What surrounds a load: processes to measure, a way to end it early, and the memory of promises.
#[derive(Default)]
pub struct Surroundings<'a> {
    /// Processes whose use of the machine is reported. The end of a client process ends the load with an error.
    pub watched: &'a [Watched],
    /// Set from another thread: the load issues nothing more and ends in good order.
    pub stop: Option<&'a AtomicBool>,
    /// With promises, each block carries a stamp, and each read is checked.
    pub promises: Option<&'a mut Promises>,
}

/// Why a load did not come to its end. The promises stay what they were, and unanswered writes stay possible.
#[derive(Debug, Error)]
pub enum LoadError {
    /// The disk is unusable.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The description makes no sense for this disk.
    #[error("{0}")]
    Spec(String),
    /// A watched process cannot be measured.
    #[error("cannot measure process {pid}: {cause}")]
    Measure {
        /// Which.
        pid: u32,
        /// What failed.
        cause: std::io::Error,
    },
}

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

/// Most violations that a report describes.
const DESCRIBED_VIOLATIONS: usize = 10;

/// Attaches to `socket`, runs the load, detaches.
pub fn run(socket: &Path, spec: &LoadSpec, surroundings: Surroundings<'_>) -> Result<Report, LoadError> {
    let mut disk = Disk::attach(spec.disk_options(socket, surroundings.watched))?;
    run_on(&mut disk, spec, surroundings)
}

/// Runs the load on an attached disk whose slots and buffers are at least what the load needs.
pub fn run_on(disk: &mut Disk, spec: &LoadSpec, surroundings: Surroundings<'_>) -> Result<Report, LoadError> {
    sys::sleep_precisely();
    Run::new(disk, spec, surroundings)?.execute()
}

/// A request in flight.
#[derive(Clone, Copy)]
struct Pending {
    operation: Operation,
    offset: u64,
    started: Instant,
}

struct Run<'a> {
    disk: &'a mut Disk,
    spec: &'a LoadSpec,
    watched: &'a [Watched],
    stop: Option<&'a AtomicBool>,
    guard: Option<Guard<'a>>,
    places: Places,
    random: SmallRng,
    pending: Vec<Option<Pending>>,
    finished: Vec<Finished>,
    scratch: Vec<u8>,
    issued: u64,
    /// Whether the next request waits for blocks that are in use.
    is_blocked: bool,
    pace: Pace,
    measured: Option<Measured>,
    histogram: Histogram,
    report: Report,
}

/// Where the measured time began.
struct Measured {
    since: Instant,
    own_cpu: Duration,
    snapshots: Vec<Snapshot>,
}

impl<'a> Run<'a> {
    fn new(disk: &'a mut Disk, spec: &'a LoadSpec, around: Surroundings<'a>) -> Result<Self, LoadError> {
        let places = Places::new(disk, spec)?;
        let depth = usize::try_from(disk.depth()).expect("a depth fits the address space");
        let guard = around.promises.map(|promises| Guard::new(promises, spec, &places)).transpose()?;
        if spec.verify_at_end && guard.is_none() {
            return Err(LoadError::Spec(
                "verification at the end needs the memory of promises, found none".into(),
            ));
        }
        Ok(Self {
            places,
            watched: around.watched,
            stop: around.stop,
            guard,
            random: SmallRng::seed_from_u64(spec.seed),
            pending: vec![None; depth],
            finished: Vec::with_capacity(depth),
            scratch: vec![0; usize::try_from(spec.block_size).expect("a request fits the address space")],
            issued: 0,
            is_blocked: false,
            pace: Pace::new(spec),
            measured: None,
            histogram: Histogram::default(),
            report: Report { name: spec.name.clone(), ..Report::default() },
            disk,
            spec,
        })
    }

    fn execute(mut self) -> Result<Report, LoadError> {
        let begin = Instant::now();
        let ramp_end = begin + Duration::from_millis(self.spec.ramp_ms);
        let end = ramp_end + Duration::from_millis(self.spec.runtime_ms);
        self.pace.start(begin);
        loop {
            let now = Instant::now();
            if self.measured.is_none() && now >= ramp_end {
                self.begin_measuring()?;
            }
            let over = now >= end || self.is_told_to_end();
            if over && self.disk.in_flight() == 0 {
                break;
            }
            if !over {
                self.submit_what_is_due(now)?;
            }
            self.disk.reap(&mut self.finished)?;
            if self.finished.is_empty() {
                self.disk.sleep(self.next_event(over, now, ramp_end, end))?;
            } else {
                self.complete();
            }
        }
        self.final_flush()?;
        self.end_measuring()?;
        self.verify_at_end()?;
        Ok(self.report)
    }

    fn is_told_to_end(&self) -> bool {
        self.stop.is_some_and(|stop| stop.load(Ordering::Relaxed))
            || self.spec.max_requests.is_some_and(|most| self.issued >= most)
            || (self.report.errors > 0 && !self.spec.continue_on_error)
    }

    /// How long to sleep when no completion comes.
    fn next_event(&self, over: bool, now: Instant, ramp_end: Instant, end: Instant) -> Duration {
        let mut next = if self.measured.is_none() { ramp_end } else { end };
        if !over && !self.is_blocked && self.disk.in_flight() < self.spec.depth {
            next = next.min(self.pace.due().unwrap_or(next));
        }
        let longest = Duration::from_millis(if self.stop.is_some() { 50 } else { 1000 });
        // Once over, only completions matter; the stall timeout bounds the wait for them.
        if over { longest } else { next.saturating_duration_since(now).min(longest) }
    }

    fn submit_what_is_due(&mut self, now: Instant) -> Result<(), LoadError> {
        self.is_blocked = false;
        while self.disk.in_flight() < self.spec.depth && !self.is_told_to_end() {
            let Some(due) = self.pace.take(now) else { break };
            let Some((operation, offset)) = self.choose() else {
                self.is_blocked = true;
                self.pace.put_back();
                break;
            };
            let Some(slot) = self.disk.take() else {
                self.pace.put_back();
                break;
            };
            self.prepare(slot, operation, offset);
            self.disk.submit(slot, operation, offset, self.spec.block_size);
            self.pending[slot.index()] = Some(Pending { operation, offset, started: due });
            self.issued += 1;
        }
        if self.disk.in_flight() >= self.spec.depth {
            self.pace.note_full();
        }
        Ok(self.disk.kick()?)
    }

    /// The next request, or nothing while all candidates touch blocks that are in use.
    fn choose(&mut self) -> Option<(Operation, u64)> {
        let is_read = match self.spec.pattern {
            Pattern::Read | Pattern::RandRead => true,
            Pattern::Write | Pattern::RandWrite => false,
            Pattern::Rw | Pattern::RandRw => self.random.random_range(0..100) < self.spec.read_percent,
        };
        let operation = if is_read { Operation::Read } else { Operation::Write };
        for _ in 0..PLACE_ATTEMPTS {
            let offset = self.places.peek(&mut self.random);
            if self.guard.as_ref().is_none_or(|guard| guard.is_free(operation, offset, self.spec.block_size))
            {
                self.places.advance();
                return Some((operation, offset));
            }
            if !self.spec.pattern.is_random() {
                break;
            }
        }
        None
    }

    fn prepare(&mut self, slot: Slot, operation: Operation, offset: u64) {
        match (&mut self.guard, operation) {
            (Some(guard), Operation::Write) => {
                guard.promises.issue(offset, &mut self.scratch);
                guard.enter(operation, offset, self.spec.block_size);
                self.disk.fill(slot, 0, &self.scratch);
            }
            (Some(guard), _) => guard.enter(operation, offset, self.spec.block_size),
            (None, Operation::Write) => {
                // No two writes carry the same bytes, or a clever store would have less to do.
                let mut mark = [0; 16];
                mark[..8].copy_from_slice(&offset.to_le_bytes());
                mark[8..].copy_from_slice(&self.issued.to_le_bytes());
                self.disk.fill(slot, 0, &mark);
            }
            (None, _) => {}
        }
    }

    fn complete(&mut self) {
        let now = Instant::now();
        let mut finished = std::mem::take(&mut self.finished);
        for done in finished.drain(..) {
            let Some(pending) = self.pending[done.slot.index()].take() else { continue };
            if done.status == Status::Ok {
                self.settle(done.slot, pending);
            } else {
                self.report.errors += 1;
                let text = || format!("{:?} at byte {}: {}", pending.operation, pending.offset, done.status);
                self.report.first_error.get_or_insert_with(text);
            }
            if let Some(guard) = &mut self.guard {
                guard.leave(pending.operation, pending.offset, self.spec.block_size);
            }
            self.disk.release(done.slot);
            if self.measured.is_some() {
                self.report.requests += 1;
                self.report.reads += u64::from(pending.operation == Operation::Read);
                self.histogram.record(now.saturating_duration_since(pending.started));
            }
        }
        self.finished = finished;
    }

    fn settle(&mut self, slot: Slot, pending: Pending) {
        let Some(guard) = &mut self.guard else { return };
        if pending.operation == Operation::Write {
            guard.promises.acknowledge(pending.offset, self.spec.block_size);
            return;
        }
        self.disk.copy_out(slot, 0, &mut self.scratch);
        self.report.verified_blocks += u64::from(self.spec.block_size / guard.promises.unit());
        if let Err(violation) = guard.promises.check(pending.offset, &self.scratch) {
            note_violations(&mut self.report, 1, &[violation]);
        }
    }

    fn begin_measuring(&mut self) -> Result<(), LoadError> {
        self.measured = Some(Measured {
            snapshots: snapshots(self.watched)?,
            own_cpu: own_cpu().unwrap_or_default(),
            since: Instant::now(),
        });
        Ok(())
    }

    fn final_flush(&mut self) -> Result<(), LoadError> {
        if !self.spec.flush_at_end || !self.spec.pattern.writes() || !self.disk.has_flush() {
            return Ok(());
        }
        let begin = Instant::now();
        let slot = self.disk.take().expect("every slot is free when nothing is in flight");
        self.disk.submit(slot, Operation::Flush, 0, 0);
        self.disk.kick()?;
        while self.finished.is_empty() {
            self.disk.sleep(Duration::from_secs(1))?;
            self.disk.reap(&mut self.finished)?;
        }
        for done in self.finished.drain(..) {
            self.disk.release(done.slot);
            if done.status != Status::Ok {
                self.report.errors += 1;
                self.report.first_error.get_or_insert_with(|| format!("the final flush: {}", done.status));
            }
        }
        self.report.flush_us = begin.elapsed().as_secs_f64() * 1e6;
        Ok(())
    }

    fn end_measuring(&mut self) -> Result<(), LoadError> {
        // A load that was told to end in its ramp has measured nothing.
        let Some(begin) = self.measured.take() else { return Ok(()) };
        let elapsed = begin.since.elapsed();
        let own = own_cpu().unwrap_or_default().saturating_sub(begin.own_cpu);
        let ends = snapshots(self.watched)?;
        let report = &mut self.report;
        let per_io = |cpu: Duration| cpu.as_secs_f64() * 1e6 / report.requests.max(1) as f64;
        let percent = |cpu: Duration| cpu.as_secs_f64() / elapsed.as_secs_f64() * 100.0;
        let processes = self.watched.iter().zip(begin.snapshots.iter().zip(&ends));
        report.processes = processes
            .map(|(process, (before, after))| ProcessReport {
                role: process.role,
                pid: process.pid,
                cpu_us_per_io: per_io(after.cpu_since(before)),
                cpu_pct: percent(after.cpu_since(before)),
                switches_per_io: after.switches_since(before) as f64 / report.requests.max(1) as f64,
                memory: after.memory(),
            })
            .collect();
        report.own_cpu_us_per_io = per_io(own);
        report.own_cpu_pct = percent(own);
        let sum = |role, value: fn(&ProcessReport) -> f64| {
            // Not `sum`, whose empty sum is minus zero.
            report.processes.iter().filter(|process| process.role == role).map(value).fold(0.0, |a, b| a + b)
        };
        (report.client_cpu_us_per_io, report.client_cpu_pct) = (
            sum(Role::Client, |process| process.cpu_us_per_io),
            sum(Role::Client, |process| process.cpu_pct),
        );
        (report.server_cpu_us_per_io, report.server_cpu_pct) = (
            sum(Role::Server, |process| process.cpu_us_per_io),
            sum(Role::Server, |process| process.cpu_pct),
        );
        let clients = report.processes.iter().filter(|process| process.role == Role::Client);
        report.client_own_kib = clients.map(|process| process.memory.own_kib).max().unwrap_or(0);

        report.seconds = elapsed.as_secs_f64();
        report.iops = report.requests as f64 / report.seconds;
        report.mb_s = report.iops * f64::from(self.spec.block_size) / 1e6;
        report.mean_us = self.histogram.mean_us();
        report.p50_us = self.histogram.quantile_us(500);
        report.p99_us = self.histogram.quantile_us(990);
        report.p999_us = self.histogram.quantile_us(999);
        report.max_us = self.histogram.max_us();
        report.late = self.pace.late();
        Ok(())
    }

    fn verify_at_end(&mut self) -> Result<(), LoadError> {
        let Some(guard) = self.guard.as_mut().filter(|_| self.spec.verify_at_end) else { return Ok(()) };
        let size = self.places.end - self.places.first;
        let check = guard.promises.check_range(self.disk, self.places.first, size, DESCRIBED_VIOLATIONS)?;
        self.report.verified_blocks += check.blocks;
        if check.unreadable > 0 {
            self.report.errors += check.unreadable;
            let text = || format!("{} reads of the verification failed", check.unreadable);
            self.report.first_error.get_or_insert_with(text);
        }
        note_violations(&mut self.report, check.violation_count, &check.violations);
        Ok(())
    }
}

/// How often another random place is tried when one is in use.
const PLACE_ATTEMPTS: u32 = 8;

fn note_violations(report: &mut Report, count: u64, described: &[Violation]) {
    report.violations += count;
    let room = DESCRIBED_VIOLATIONS.saturating_sub(report.first_violations.len());
    report.first_violations.extend(described.iter().take(room).map(ToString::to_string));
}

fn snapshots(watched: &[Watched]) -> Result<Vec<Snapshot>, LoadError> {
    let take = |process: &Watched| {
        Snapshot::take(process.pid).map_err(|cause| LoadError::Measure { pid: process.pid, cause })
    };
    watched.iter().map(take).collect()
}

/// Chooses where requests go.
struct Places {
    first: u64,
    end: u64,
    step: u64,
    count: u64,
    is_random: bool,
    next: u64,
}

impl Places {
    fn new(disk: &Disk, spec: &LoadSpec) -> Result<Self, LoadError> {
        let wrong = |text: String| Err(LoadError::Spec(text));
        let step = u64::from(spec.block_size);
        if step == 0 || !step.is_multiple_of(SECTOR) || !spec.offset.is_multiple_of(SECTOR) {
            return wrong(format!(
                "sizes and offsets are multiples of {SECTOR}, found {step} at {}",
                spec.offset
            ));
        }
        if spec.depth == 0 || spec.depth > disk.depth() || spec.block_size > disk.buffer_size() {
            return wrong(format!(
                "the disk was attached for {} requests of {} bytes, the load has {} of {step}",
                disk.depth(),
                disk.buffer_size(),
                spec.depth
            ));
        }
        if spec.read_percent > 100 || spec.rate == Some(0) {
            return wrong(format!(
                "expected 0 to 100 % of reads and a rate above 0, found {} %",
                spec.read_percent
            ));
        }
        if spec.pattern.writes() && disk.is_read_only() {
            return wrong("the disk is read-only, the load writes".into());
        }
        let available = disk.capacity().saturating_sub(spec.offset);
        let size = spec.size.unwrap_or(available);
        if size > available || size < step {
            return wrong(format!(
                "a range of {size} bytes from {} does not fit the disk of {} or not one request of {step}",
                spec.offset,
                disk.capacity()
            ));
        }
        let count = size / step;
        let is_random = spec.pattern.is_random();
        Ok(Self { first: spec.offset, end: spec.offset + count * step, step, count, is_random, next: 0 })
    }

    fn peek(&mut self, random: &mut SmallRng) -> u64 {
        if self.is_random {
            self.next = random.random_range(0..self.count);
        }
        self.first + self.next * self.step
    }

    fn advance(&mut self) {
        self.next = (self.next + 1) % self.count;
    }
}

/// When requests are due: at once, or at moments fixed by a rate, however late the earlier ones were.
struct Pace {
    interval_ns: Option<u64>,
    begin: Instant,
    taken: u64,
    /// Whether all slots were busy since the last request was taken.
    was_full: bool,
    late: u64,
    last_was_late: bool,
}

impl Pace {
    fn new(spec: &LoadSpec) -> Self {
        let interval_ns = spec.rate.map(|rate| 1_000_000_000 / u64::from(rate.max(1)));
        Self { interval_ns, begin: Instant::now(), taken: 0, was_full: false, late: 0, last_was_late: false }
    }

    fn start(&mut self, begin: Instant) {
        self.begin = begin;
    }

    /// When the next request is due, if a rate says so.
    fn due(&self) -> Option<Instant> {
        self.interval_ns.map(|interval| self.begin + Duration::from_nanos(interval * self.taken))
    }

    /// Takes the next request if it is due: the moment from which its latency counts. That is the moment of
    /// submission, but for requests that had to wait for a slot the moment when they were due: the time that a guest
    /// would have waited is not left out.
    fn take(&mut self, now: Instant) -> Option<Instant> {
        let due = self.due().unwrap_or(now);
        if due > now {
            // The generator caught up.
            self.was_full = false;
            return None;
        }
        self.taken += 1;
        self.last_was_late = self.was_full && self.interval_ns.is_some();
        self.late += u64::from(self.last_was_late);
        Some(if self.last_was_late { due } else { now })
    }

    /// The request taken last was not submitted.
    fn put_back(&mut self) {
        self.taken -= 1;
        self.late -= u64::from(self.last_was_late);
    }

    fn note_full(&mut self) {
        self.was_full = true;
    }

    fn late(&self) -> u64 {
        self.late
    }
}

/// Keeps the rule of [`Promises`]: a block is written by one request at a time, and not read meanwhile.
struct Guard<'a> {
    promises: &'a mut Promises,
    users: Vec<u16>,
}

const WRITTEN: u16 = u16::MAX;

impl<'a> Guard<'a> {
    fn new(promises: &'a mut Promises, spec: &LoadSpec, places: &Places) -> Result<Self, LoadError> {
        let unit = promises.unit();
        let is_whole = spec.block_size.is_multiple_of(unit) && spec.offset.is_multiple_of(u64::from(unit));
        if !is_whole || places.end > promises.disk_bytes() {
            return Err(LoadError::Spec(format!(
                "promises are remembered in blocks of {unit} bytes up to byte {}, the load has requests of {} bytes from {} to {}",
                promises.disk_bytes(),
                spec.block_size,
                places.first,
                places.end
            )));
        }
        let count = usize::try_from(promises.disk_bytes() / u64::from(unit)).unwrap_or(usize::MAX);
        Ok(Self { promises, users: vec![0; count] })
    }

    fn is_free(&self, operation: Operation, offset: u64, length: u32) -> bool {
        let users = &self.users[self.range(offset, length)];
        match operation {
            Operation::Write => users.iter().all(|count| *count == 0),
            Operation::Read | Operation::Flush => users.iter().all(|count| *count < WRITTEN - 1),
        }
    }

    fn enter(&mut self, operation: Operation, offset: u64, length: u32) {
        let range = self.range(offset, length);
        for count in &mut self.users[range] {
            *count = if operation == Operation::Write { WRITTEN } else { *count + 1 };
        }
    }

    fn leave(&mut self, operation: Operation, offset: u64, length: u32) {
        let range = self.range(offset, length);
        for count in &mut self.users[range] {
            *count = if operation == Operation::Write { 0 } else { *count - 1 };
        }
    }

    fn range(&self, offset: u64, length: u32) -> std::ops::Range<usize> {
        let unit = u64::from(self.promises.unit());
        let index = |value: u64| usize::try_from(value / unit).unwrap_or(usize::MAX);
        index(offset)..index(offset + u64::from(length))
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::thread;

    use super::super::ram_disk::{Fault, RamDisk};
    use super::super::verify::Unwritten;
    use super::*;

    const SIZE: u64 = 1 << 20;

    fn spec(pattern: Pattern) -> LoadSpec {
        LoadSpec {
            pattern,
            depth: 8,
            // By number and not by time: a crowded machine may do next to nothing in a moment.
            runtime_ms: 60_000,
            max_requests: Some(1000),
            ramp_ms: 0,
            stall_timeout_ms: 60_000,
            ..LoadSpec::default()
        }
    }

    fn promises() -> Promises {
        Promises::new(SIZE, 4096, 7, Unwritten::Zeroes)
    }

    fn verified(disk: &RamDisk, spec: &LoadSpec) -> Result<Report, LoadError> {
        let mut promises = promises();
        let spec = LoadSpec { verify_at_end: true, ..spec.clone() };
        run(disk.socket(), &spec, Surroundings { promises: Some(&mut promises), ..Surroundings::default() })
    }

    #[test]
    fn an_honest_disk_verifies_with_one_queue_and_with_several_and_with_scattered_buffers() {
        for (queues, segment_size, block_size) in [(1, None, 4096), (4, None, 4096), (2, Some(1024), 16384)] {
            let disk = RamDisk::serve(SIZE, 4, true, Fault::None);
            let load = LoadSpec { queues, segment_size, block_size, ..spec(Pattern::RandRw) };
            let report = verified(&disk, &load).unwrap();
            assert!(report.is_good(), "{report:?}");
            assert!(
                report.requests > 100 && report.reads > 0 && report.reads < report.requests,
                "{report:?}"
            );
            assert!(report.verified_blocks >= SIZE / 4096 && report.flush_us > 0.0, "{report:?}");
        }
    }

    #[test]
    fn a_disk_without_indirect_descriptors_is_driven_by_chains() {
        let disk = RamDisk::serve(SIZE, 1, false, Fault::None);
        let report = verified(&disk, &LoadSpec { depth: 40, ..spec(Pattern::RandRw) }).unwrap();
        assert!(report.is_good() && report.requests > 100, "{report:?}");
    }

    #[test]
    fn a_disk_that_forgets_a_write_is_caught() {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::ForgetWrite { every: 50 });
        let report = verified(&disk, &spec(Pattern::RandRw)).unwrap();
        assert!(report.violations > 0 && !report.first_violations.is_empty(), "{report:?}");
        assert!(report.first_violations[0].contains("expected"), "{report:?}");
    }

    #[test]
    fn an_error_is_counted_told_in_words_and_ends_the_load_unless_it_is_to_go_on() {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::FailRequest { every: 40 });
        let report = run(disk.socket(), &spec(Pattern::RandWrite), Surroundings::default()).unwrap();
        assert!(report.errors >= 1 && report.requests < 100, "{report:?}");
        assert!(report.first_error.unwrap().contains("I/O error"));

        let disk = RamDisk::serve(SIZE, 1, true, Fault::FailRequest { every: 40 });
        let load = LoadSpec { continue_on_error: true, ..spec(Pattern::RandWrite) };
        let report = run(disk.socket(), &load, Surroundings::default()).unwrap();
        assert!(report.errors > 1 && report.requests > 100, "{report:?}");
    }

    #[test]
    fn a_failed_write_is_neither_promised_nor_forbidden() {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::FailRequest { every: 7 });
        let load = LoadSpec { continue_on_error: true, ..spec(Pattern::RandRw) };
        let report = verified(&disk, &load).unwrap();
        assert!(report.errors > 1 && report.verified_blocks > 0 && report.violations == 0, "{report:?}");
    }

    #[test]
    fn a_rate_is_kept() {
        let load =
            LoadSpec { rate: Some(500), runtime_ms: 400, max_requests: None, ..spec(Pattern::RandWrite) };
        // A crowded machine may take some of the time away, and never makes it faster.
        let mut kept = false;
        for _ in 0..20 {
            let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
            let report = run(disk.socket(), &load, Surroundings::default()).unwrap();
            assert!(report.requests <= 220, "{report:?}");
            kept |= report.requests >= 180;
            if kept {
                break;
            }
        }
        assert!(kept, "fewer than nine tenths of the rate in each of 20 runs");
    }

    #[test]
    fn a_stop_from_another_thread_ends_the_load_in_good_order() {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
        let stop = AtomicBool::new(false);
        let load = LoadSpec { max_requests: None, ..spec(Pattern::RandWrite) };
        let report = thread::scope(|scope| {
            scope.spawn(|| {
                thread::sleep(Duration::from_millis(200));
                stop.store(true, Ordering::Relaxed);
            });
            run(disk.socket(), &load, Surroundings { stop: Some(&stop), ..Surroundings::default() }).unwrap()
        });
        assert!(report.is_good() && report.requests > 0 && report.seconds < 30.0, "{report:?}");
    }

    #[test]
    fn a_disk_that_falls_silent_is_an_error_after_the_stall_timeout() {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::SilentAfter { requests: 20 });
        let load = LoadSpec { stall_timeout_ms: 200, ..spec(Pattern::RandWrite) };
        let error = run(disk.socket(), &load, Surroundings::default()).unwrap_err();
        assert!(matches!(error, LoadError::Disk(DiskError::Stalled { in_flight: 8, .. })), "{error}");
    }

    #[test]
    fn a_daemon_that_never_answers_is_an_error_after_the_stall_timeout() {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("silent.sock");
        let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        let load = LoadSpec { stall_timeout_ms: 200, ..spec(Pattern::Read) };
        let error = run(&socket, &load, Surroundings::default()).unwrap_err().to_string();
        assert!(error.contains("no answer within 200ms") && error.contains("silent.sock"), "{error}");
    }

    #[test]
    fn the_end_of_the_daemon_ends_the_load_at_once() {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::SilentAfter { requests: 20 });
        let mut daemon = Command::new("sleep").arg("2").spawn().unwrap();
        let watched = [Watched { role: Role::Client, pid: daemon.id() }];
        let begin = Instant::now();
        let around = Surroundings { watched: &watched, ..Surroundings::default() };
        let error = run(disk.socket(), &spec(Pattern::RandWrite), around).unwrap_err();
        daemon.wait().unwrap();
        assert!(matches!(error, LoadError::Disk(DiskError::DaemonEnded { .. })), "{error}");
        assert!(begin.elapsed() < Duration::from_secs(30), "{:?}", begin.elapsed());
    }

    #[test]
    fn what_makes_no_sense_is_refused_in_words() {
        let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
        let refused =
            |load: LoadSpec| run(disk.socket(), &load, Surroundings::default()).unwrap_err().to_string();
        assert!(refused(LoadSpec { block_size: 1000, ..LoadSpec::default() }).contains("multiples of 512"));
        let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
        let refused =
            |load: LoadSpec| run(disk.socket(), &load, Surroundings::default()).unwrap_err().to_string();
        assert!(refused(LoadSpec { queues: 3, ..LoadSpec::default() }).contains("the disk has 1"));
        let disk = RamDisk::serve(SIZE, 1, true, Fault::None);
        let refused =
            |load: LoadSpec| run(disk.socket(), &load, Surroundings::default()).unwrap_err().to_string();
        assert!(refused(LoadSpec { size: Some(1 << 30), ..LoadSpec::default() }).contains("does not fit"));
    }
}
