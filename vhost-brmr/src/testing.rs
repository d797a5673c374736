//! A disk in memory for tests: it keeps a log, and completes in or out of order, late, or with errors, as told.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rmr_common::buffer::Segment;
use rmr_common::reactor::WatchChange;
use vmm_sys_util::epoll::EventSet;

use crate::disk::{Attachment, Disk, DiskError, Geometry, Operation, RangeLimits, Request, Token};

/// What happened to the disk, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// Attached.
    Attached,
    /// Detached.
    Detached,
    /// A request came.
    Submitted(Operation, u64, u64),
    /// A request went.
    Completed(Operation, u64, u64),
    /// All that waited was cancelled.
    Cancelled,
}

/// A request that waits.
#[derive(Debug)]
struct Waiting {
    token: Token,
    operation: Operation,
    offset: u64,
    length: u64,
    segments: Vec<Segment>,
}

#[derive(Debug, Default)]
struct State {
    data: Vec<u8>,
    log: Vec<Event>,
    keeps_log: bool,
    waiting: VecDeque<Waiting>,
    done: Vec<(Token, Result<(), DiskError>)>,
    held: bool,
    steps: u32,
    reversed: bool,
    ignores_cancel: bool,
    failures: u32,
    flush_failures: u32,
    resets: u32,
    attached: bool,
    detaching: bool,
    refusal: Option<String>,
    refuses_now: bool,
    displaced: bool,
}

/// The disk.
#[derive(Debug)]
pub struct MemoryDisk {
    geometry: Geometry,
    state: Arc<Mutex<State>>,
    wake: UnixStream,
    watched: bool,
    /// The refusal, once it was seen.
    refused: Option<String>,
    /// Another client took the disk, as far as was seen.
    displaced: bool,
}

/// How a test tells the disk what to do, from its own thread.
#[derive(Debug)]
pub struct Handle {
    state: Arc<Mutex<State>>,
    wake: UnixStream,
}

/// A disk of this size that can do everything.
#[must_use]
pub fn geometry(size: u64) -> Geometry {
    let ranges = RangeLimits { max_length: 1 << 20, max_ranges: 4, granularity: 4096 };
    Geometry {
        size,
        logical_block_size: 512,
        physical_block_size: 4096,
        optimal_io_size: 65536,
        max_segments: 126,
        max_segment_size: 1 << 20,
        discard: Some(ranges),
        write_zeroes: Some(ranges),
    }
}

impl MemoryDisk {
    /// A disk of zeroes, and its handle.
    ///
    /// # Errors
    /// When no socket pair can be made.
    pub fn new(geometry: Geometry) -> std::io::Result<(Self, Handle)> {
        let (wake, other) = UnixStream::pair()?;
        wake.set_nonblocking(true)?;
        let data = vec![0; usize::try_from(geometry.size).map_err(std::io::Error::other)?];
        let state = Arc::new(Mutex::new(State { data, keeps_log: true, ..State::default() }));
        let handle = Handle { state: Arc::clone(&state), wake: other };
        Ok((Self { geometry, state, wake, watched: false, refused: None, displaced: false }, handle))
    }
}

impl Handle {
    /// Holds requests back until told otherwise.
    pub fn hold(&self, held: bool) {
        self.change(|state| state.held = held);
    }

    /// Completes one of the requests that are held back.
    pub fn step(&self) {
        self.change(|state| state.steps += 1);
    }

    /// Completes so many of them at the same time.
    pub fn steps(&self, count: u32) {
        self.change(|state| state.steps += count);
    }

    /// Completes what waits in the reverse order.
    pub fn reverse(&self, reversed: bool) {
        self.change(|state| state.reversed = reversed);
    }

    /// Lets the next requests fail.
    pub fn fail_next(&self, count: u32) {
        self.change(|state| state.failures = count);
    }

    /// Lets the next flushes fail, and no other request.
    pub fn fail_flushes(&self, count: u32) {
        self.change(|state| state.flush_failures = count);
    }

    /// How often it was told that the guest has reset the device.
    #[must_use]
    pub fn resets(&self) -> u32 {
        lock(&self.state).resets
    }

    /// Does not let go of held requests when they are cancelled.
    pub fn ignore_cancel(&self) {
        self.change(|state| state.ignores_cancel = true);
    }

    /// Will not be attached.
    pub fn refuse(&self, reason: &str) {
        self.change(|state| state.refusal = Some(reason.to_owned()));
    }

    /// Will not be attached after all, with requests waiting for it, which fail.
    pub fn refuse_late(&self, reason: &str) {
        self.change(|state| (state.refusal, state.refuses_now) = (Some(reason.to_owned()), true));
    }

    /// Another client takes the disk.
    pub fn displace(&self) {
        self.change(|state| state.displaced = true);
    }

    /// Keeps no log, for measurements.
    pub fn keep_no_log(&self) {
        self.change(|state| state.keeps_log = false);
    }

    /// The disk has this size now.
    pub fn resize(&self, size: usize) {
        self.change(|state| state.data.resize(size, 0));
    }

    /// What happened, in order.
    #[must_use]
    pub fn log(&self) -> Vec<Event> {
        lock(&self.state).log.clone()
    }

    /// How many requests wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        lock(&self.state).waiting.len()
    }

    /// The disk is attached, and no other client has taken it as far as it knows.
    #[must_use]
    pub fn is_attached(&self) -> bool {
        lock(&self.state).attached
    }

    /// The disk was told to detach, and waits for its requests.
    #[must_use]
    pub fn is_detaching(&self) -> bool {
        lock(&self.state).detaching
    }

    /// The bytes on the disk.
    #[must_use]
    pub fn data(&self) -> Vec<u8> {
        lock(&self.state).data.clone()
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut lock(&self.state));
        // The disk may be gone already; then nothing waits for it.
        let _ = (&self.wake).write(&[1]);
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl State {
    fn note(&mut self, event: Event) {
        if self.keeps_log {
            self.log.push(event);
        }
    }

    fn work(&mut self) {
        while !self.held || self.steps > 0 {
            self.steps = self.steps.saturating_sub(1);
            let next = if self.reversed { self.waiting.pop_back() } else { self.waiting.pop_front() };
            let Some(request) = next else { break };
            let result = if self.failures > 0 {
                self.failures -= 1;
                Err(DiskError::Failed)
            } else if request.operation == Operation::Flush && self.flush_failures > 0 {
                self.flush_failures -= 1;
                Err(DiskError::Failed)
            } else {
                self.perform(&request);
                Ok(())
            };
            self.note(Event::Completed(request.operation, request.offset, request.length));
            self.done.push((request.token, result));
        }
        if self.detaching && self.waiting.is_empty() {
            (self.detaching, self.attached) = (false, false);
            self.note(Event::Detached);
        }
    }

    fn perform(&mut self, request: &Waiting) {
        let start = usize::try_from(request.offset).unwrap_or(usize::MAX);
        let end = start + usize::try_from(request.length).unwrap_or(0);
        let range = &mut self.data[start..end];
        match request.operation {
            Operation::Flush => (),
            Operation::Discard | Operation::WriteZeroes { .. } => range.fill(0),
            Operation::Read | Operation::Write => {
                let mut at = 0;
                for segment in &request.segments {
                    let part = &mut range[at..at + segment.length()];
                    at += segment.length();
                    // SAFETY: the segment is mapped until this request completed, and disjoint from the disk's data.
                    unsafe {
                        if request.operation == Operation::Read {
                            std::ptr::copy_nonoverlapping(part.as_ptr(), segment.base(), part.len());
                        } else {
                            std::ptr::copy_nonoverlapping(segment.base(), part.as_mut_ptr(), part.len());
                        }
                    }
                }
            }
        }
    }
}

impl Disk for MemoryDisk {
    fn geometry(&self) -> Geometry {
        Geometry { size: lock(&self.state).data.len() as u64, ..self.geometry }
    }

    fn attach(&mut self) {
        let mut state = lock(&self.state);
        if let Some(reason) = &state.refusal {
            self.refused = Some(reason.clone());
            return;
        }
        state.attached = true;
        state.note(Event::Attached);
    }

    fn detach(&mut self) {
        let mut state = lock(&self.state);
        state.detaching = true;
        state.work();
        self.displaced = false;
    }

    fn reset(&mut self) {
        lock(&self.state).resets += 1;
        self.displaced = false;
    }

    fn attachment(&self) -> Attachment<'_> {
        let state = lock(&self.state);
        match (&self.refused, state.attached, state.detaching) {
            (Some(reason), ..) => Attachment::Refused(reason),
            (None, ..) if self.displaced => Attachment::Displaced("a test"),
            (None, true, true) => Attachment::Detaching,
            (None, true, false) => Attachment::Attached,
            (None, false, _) => Attachment::Detached,
        }
    }

    fn submit(&mut self, token: Token, request: Request<'_>) {
        let Request { operation, offset, length, segments } = request;
        let mut state = lock(&self.state);
        state.note(Event::Submitted(operation, offset, length));
        state.waiting.push_back(Waiting { token, operation, offset, length, segments: segments.to_vec() });
    }

    fn cancel(&mut self) {
        let mut state = lock(&self.state);
        state.note(Event::Cancelled);
        if !state.ignores_cancel {
            let State { waiting, done, .. } = &mut *state;
            done.extend(waiting.drain(..).map(|request| (request.token, Err(DiskError::Cancelled))));
        }
        state.work();
    }

    fn completions(&mut self, done: &mut Vec<(Token, Result<(), DiskError>)>) {
        done.append(&mut lock(&self.state).done);
    }

    fn watch_changes(&mut self, changes: &mut Vec<WatchChange>) {
        if !self.watched {
            self.watched = true;
            changes.push(WatchChange::Add(self.wake.as_raw_fd(), EventSet::IN | EventSet::EDGE_TRIGGERED));
        }
    }

    fn ready(&mut self, _fd: RawFd, _set: EventSet) {
        let mut bytes = [0; 64];
        while (&self.wake).read(&mut bytes).is_ok_and(|count| count > 0) {}
        let mut state = lock(&self.state);
        if std::mem::take(&mut state.refuses_now) {
            let State { waiting, done, refusal, .. } = &mut *state;
            done.extend(waiting.drain(..).map(|request| (request.token, Err(DiskError::Fenced))));
            self.refused.clone_from(refusal);
        }
        state.work();
        if std::mem::take(&mut state.displaced) {
            (self.displaced, state.attached) = (true, false);
        }
    }

    fn upkeep(&mut self) {
        lock(&self.state).work();
    }

    fn timeout(&self) -> Option<Duration> {
        (!lock(&self.state).done.is_empty()).then_some(Duration::ZERO)
    }
}
