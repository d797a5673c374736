//! Runs a described load on a disk and reports what it did: rates, latencies, processor time per request of the
//! processes under load, and whether every value read was one that had been promised.

mod report;
mod spec;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};
use thiserror::Error;

pub use report::{ProcessReport, Report};
pub use spec::{LoadSpec, Pattern};

use super::disk::{Disk, DiskError, Finished, Operation, SECTOR, Slot, Status};
use super::histogram::Histogram;
use super::processes::{Role, Snapshot, Watched, own_cpu};
use super::sys;
use super::verify::{Promises, Violation};

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
mod tests;
