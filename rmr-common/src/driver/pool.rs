//! The public client of a pool: a handle that any thread may use, and the thread behind it that drives the pool.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Duration;

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberOps};
use thiserror::Error;
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::PoolDriver;
use crate::buffer::{Segment, segments_of_buffers};
use crate::client::{
    CommandToken, Config, IoError, Notice, Operation, OverReason, PoolSelector, PoolStatus, Token,
};
use crate::pool::{self, Address, CommandReply, MemberId, MemberState, PoolSpec, Refusal};
use crate::reactor::WatchChange;
use crate::words;

/// A scatter/gather list that its request owns while it is under way.
pub type Buffers = Vec<Vec<u8>>;

/// Why a pool cannot be used.
#[derive(Clone, Debug, Error)]
pub enum PoolError {
    /// The client ended before it was attached.
    #[error(transparent)]
    Over(#[from] OverReason),
    /// The pool did not become active within the time allowed.
    #[error("the pool did not become active within {}: {waiting_for}", words::time(*after))]
    Timeout {
        /// The time allowed.
        after: Duration,
        /// What the client was waiting for.
        waiting_for: String,
    },
    /// No node is trusted, or trusts this client.
    #[error("no node can be used: {0}")]
    Distrust(String),
    /// The caller gave up.
    #[error("the caller gave up before the pool was found; it waited for: {waiting_for}")]
    GivenUp {
        /// What the client was waiting for.
        waiting_for: String,
    },
    /// The operating system refused a thread or a descriptor.
    #[error("cannot start the pool's thread: {0}")]
    System(String),
}

/// Learns a pool's specification from its nodes, without attaching.
///
/// # Errors
/// When no node knows the pool, they disagree about it, or none answers within `patience`.
pub fn discover(
    config: Config,
    selector: PoolSelector,
    seeds: &[Address],
    patience: Duration,
) -> Result<PoolSpec, PoolError> {
    discover_while(config, selector, seeds, patience, &mut |_| true)
}

/// As [`discover`], for a caller that has something else to listen to: several times a second `goes_on` is asked, with what is waited for
/// in words. False gives up.
///
/// # Errors
/// As [`discover`], and when the caller gave up.
pub fn discover_while(
    mut config: Config,
    selector: PoolSelector,
    seeds: &[Address],
    patience: Duration,
    goes_on: &mut dyn FnMut(&str) -> bool,
) -> Result<PoolSpec, PoolError> {
    config.observe = true;
    let pool = Pool::connect_while(config, selector, seeds, patience, goes_on)?;
    Ok(pool.spec.clone())
}

/// What is waited for at first, in words.
pub const NO_ANSWER: &str = "no node has answered";
/// How often a caller that waits is asked whether it goes on.
const SLICE: Duration = Duration::from_millis(100);

type Callback = Box<dyn FnOnce(Result<Buffers, IoError>) + Send>;

/// A completion. It runs once, also when the request is dropped on its way or the pool's thread ends.
struct Done(Option<Callback>);

impl Done {
    fn run(mut self, result: Result<Buffers, IoError>) {
        if let Some(callback) = self.0.take() {
            callback(result);
        }
    }
}

impl Drop for Done {
    fn drop(&mut self) {
        if let Some(callback) = self.0.take() {
            callback(Err(IoError::Detached));
        }
    }
}

enum Command {
    Submit { operation: Operation, offset: u64, length: u64, buffers: Buffers, done: Done },
    Status(Sender<PoolStatus>),
    AcknowledgeLoss,
    Operator(pool::Command, Sender<CommandReply>),
    Detach,
}

/// A pool that this process is attached to.
///
/// Requests are asynchronous: each takes its buffers and gives them back to its completion, which runs on the pool's
/// thread and must not block. [`Pool::blocking`] is the same with calls that wait. Dropping the handle detaches.
pub struct Pool {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
    spec: PoolSpec,
}

impl Pool {
    /// Attaches to a pool, waiting at most `patience` for its members. `seeds` are any of its nodes.
    ///
    /// # Errors
    /// When the pool is held by another client, is not known, or its members do not answer in time.
    pub fn connect(
        config: Config,
        selector: PoolSelector,
        seeds: &[Address],
        patience: Duration,
    ) -> Result<Self, PoolError> {
        Self::connect_while(config, selector, seeds, patience, &mut |_| true)
    }

    fn connect_while(
        config: Config,
        selector: PoolSelector,
        seeds: &[Address],
        patience: Duration,
        goes_on: &mut dyn FnMut(&str) -> bool,
    ) -> Result<Self, PoolError> {
        let system = |e: &dyn std::fmt::Display| PoolError::System(e.to_string());
        let wake = Arc::new(EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(|e| system(&e))?);
        let (commands, inbox) = mpsc::channel();
        let (attached, attachment) = mpsc::channel();
        let (event, seeds) = (Arc::clone(&wake), seeds.to_vec());
        let observe = config.observe;
        let work = move || {
            let failed = attached.clone();
            let result = PoolDriver::new(config, selector, &seeds)
                .map_err(|e| e.to_string())
                .and_then(|driver| Owner::new(driver, observe, event, inbox, attached).run());
            if let Err(error) = result {
                // Nobody listens once the pool was attached; the requests then complete as they are dropped.
                let _ = failed.send(Err(PoolError::System(error)));
            }
        };
        let thread =
            std::thread::Builder::new().name("rmr-pool".into()).spawn(work).map_err(|e| system(&e))?;
        let abandon = |error| {
            let _ = commands.send(Command::Detach);
            let _ = wake.write(1);
            Err(error)
        };
        let mut waiting_for = NO_ANSWER.to_owned();
        let deadline = std::time::Instant::now() + patience;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            match attachment.recv_timeout(left.min(SLICE)) {
                Ok(Ok(Progress::Attached(spec))) => {
                    return Ok(Self { commands, wake, thread: Some(thread), spec: *spec });
                }
                Ok(Ok(Progress::Waiting(text))) => waiting_for = text,
                Ok(Err(error)) => return abandon(error),
                Err(mpsc::RecvTimeoutError::Timeout) if !left.is_zero() => {}
                Err(_) => return abandon(PoolError::Timeout { after: patience, waiting_for }),
            }
            if !goes_on(&waiting_for) {
                return abandon(PoolError::GivenUp { waiting_for });
            }
        }
    }

    /// The pool's specification.
    #[must_use]
    pub const fn spec(&self) -> &PoolSpec {
        &self.spec
    }

    /// Reads at `offset` into `buffers`, as many bytes as they have together.
    pub fn read(
        &self,
        offset: u64,
        buffers: Buffers,
        done: impl FnOnce(Result<Buffers, IoError>) + Send + 'static,
    ) {
        self.submit(Operation::Read, offset, length_of(&buffers), buffers, done);
    }

    /// Writes `buffers` one after the other from `offset`.
    pub fn write(
        &self,
        offset: u64,
        buffers: Buffers,
        done: impl FnOnce(Result<Buffers, IoError>) + Send + 'static,
    ) {
        self.submit(Operation::Write, offset, length_of(&buffers), buffers, done);
    }

    /// Makes everything completed so far survive a power cut of all machines.
    pub fn flush(&self, done: impl FnOnce(Result<(), IoError>) + Send + 'static) {
        self.submit(Operation::Flush, 0, 0, Vec::new(), |r| done(r.map(drop)));
    }

    /// Forgets a range, which reads as zeroes afterwards.
    pub fn discard(&self, offset: u64, length: u64, done: impl FnOnce(Result<(), IoError>) + Send + 'static) {
        self.submit(Operation::Discard, offset, length, Vec::new(), |r| done(r.map(drop)));
    }

    /// Makes a range read as zeroes.
    pub fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        done: impl FnOnce(Result<(), IoError>) + Send + 'static,
    ) {
        self.submit(Operation::WriteZeroes, offset, length, Vec::new(), |r| done(r.map(drop)));
    }

    /// The state of the client and its legs; `None` when the pool's thread has ended.
    #[must_use]
    pub fn status(&self) -> Option<PoolStatus> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::Status(sender));
        receiver.recv().ok()
    }

    /// Carries out an operator's command, as the coordinator that this client is; the answer comes over the channel,
    /// which is closed without one when the pool's thread ends.
    #[must_use]
    pub fn command(&self, command: pool::Command) -> Receiver<CommandReply> {
        let (sender, receiver) = mpsc::channel();
        self.send(Command::Operator(command, sender));
        receiver
    }

    /// After [`IoError::LostWrites`]: the caller knows that writes were lost which had completed since the last flush, and starts
    /// from what the pool has now. Requests are served again.
    pub fn acknowledge_loss(&self) {
        self.send(Command::AcknowledgeLoss);
    }

    /// The same pool with calls that wait for their completion.
    #[must_use]
    pub const fn blocking(&self) -> BlockingPool<'_> {
        BlockingPool(self)
    }

    fn submit(
        &self,
        operation: Operation,
        offset: u64,
        length: u64,
        buffers: Buffers,
        done: impl FnOnce(Result<Buffers, IoError>) + Send + 'static,
    ) {
        self.send(Command::Submit { operation, offset, length, buffers, done: Done(Some(Box::new(done))) });
    }

    fn send(&self, command: Command) {
        match self.commands.send(command) {
            Ok(()) => {
                // A counter that is full wakes the thread as well.
                let _ = self.wake.write(1);
            }
            // The thread has ended. A request's completion runs as it is dropped, and whoever asks for the status sees its
            // sender dropped.
            Err(mpsc::SendError(command)) => drop(command),
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.send(Command::Detach);
        if let Some(thread) = self.thread.take() {
            // A panic there was reported by its own hook; there is nobody to hand it on to.
            let _ = thread.join();
        }
    }
}

/// A pool with calls that wait.
#[derive(Clone, Copy)]
pub struct BlockingPool<'a>(&'a Pool);

impl BlockingPool<'_> {
    fn wait<T: Send + 'static>(
        self,
        start: impl FnOnce(&Pool, Box<dyn FnOnce(Result<T, IoError>) + Send>),
    ) -> Result<T, IoError> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let done = move |result| {
            // The receiver waits below, unless its thread was unwound.
            let _ = sender.send(result);
        };
        start(self.0, Box::new(done));
        receiver.recv().unwrap_or(Err(IoError::Detached))
    }

    /// Fills `data` from `offset`.
    ///
    /// # Errors
    /// See [`IoError`]; so for all methods.
    pub fn read_at(self, data: &mut [u8], offset: u64) -> Result<(), IoError> {
        let buffers = vec![vec![0; data.len()]];
        let buffers = self.wait(|pool, done| pool.read(offset, buffers, done))?;
        data.copy_from_slice(&buffers[0]);
        Ok(())
    }

    /// Writes `data` at `offset`.
    ///
    /// # Errors
    /// See [`IoError`].
    pub fn write_at(self, data: &[u8], offset: u64) -> Result<(), IoError> {
        let buffers = vec![data.to_vec()];
        self.wait(|pool, done| pool.write(offset, buffers, done)).map(drop)
    }

    /// Makes everything completed so far survive a power cut.
    ///
    /// # Errors
    /// See [`IoError`].
    pub fn flush(self) -> Result<(), IoError> {
        self.wait(Pool::flush)
    }

    /// Forgets a range, which reads as zeroes afterwards.
    ///
    /// # Errors
    /// See [`IoError`].
    pub fn discard(self, offset: u64, length: u64) -> Result<(), IoError> {
        self.wait(|pool, done| pool.discard(offset, length, done))
    }

    /// Carries out an operator's command. An administrative tool is the coordinator for a moment in this way, when no
    /// other client is attached.
    #[must_use]
    pub fn command(self, command: pool::Command) -> CommandReply {
        let gone = || CommandReply::refused(Refusal::CoordinatorLost, "the client ended before it answered");
        self.0.command(command).recv().unwrap_or_else(|_| gone())
    }

    /// Waits until a member is Clean; false when it is not within `patience`, or the client has ended. Members are
    /// brought up to date by themselves while the pool is attached.
    #[must_use]
    pub fn wait_until_clean(self, member: MemberId, patience: Duration) -> bool {
        let deadline = std::time::Instant::now() + patience;
        loop {
            let Some(status) = self.0.status() else { return false };
            if status.legs.iter().any(|l| l.member == member && l.data == Some(MemberState::Clean)) {
                return true;
            }
            if std::time::Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Makes a range read as zeroes.
    ///
    /// # Errors
    /// See [`IoError`].
    pub fn write_zeroes(self, offset: u64, length: u64) -> Result<(), IoError> {
        self.wait(|pool, done| pool.write_zeroes(offset, length, done))
    }
}

fn length_of(buffers: &Buffers) -> u64 {
    buffers.iter().map(|b| b.len() as u64).sum()
}

enum Progress {
    Attached(Box<PoolSpec>),
    Waiting(String),
}

struct Pending {
    buffers: Buffers,
    done: Done,
}

/// What the pool's thread owns: the event loop's one subscriber.
struct Owner {
    driver: PoolDriver,
    wake: Arc<EventFd>,
    inbox: Receiver<Command>,
    attached: Option<Sender<Result<Progress, PoolError>>>,
    pending: Vec<Option<Pending>>,
    free: Vec<usize>,
    /// Commands that are not answered.
    commands: Vec<(CommandToken, Sender<CommandReply>)>,
    next_command: u64,
    done: Vec<(Token, Result<(), IoError>)>,
    segments: Vec<Segment>,
    /// The owner of the handle wants the specification only.
    observe: bool,
}

impl Owner {
    fn new(
        driver: PoolDriver,
        observe: bool,
        wake: Arc<EventFd>,
        inbox: Receiver<Command>,
        attached: Sender<Result<Progress, PoolError>>,
    ) -> Self {
        let attached = Some(attached);
        let (pending, free, done, segments) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (commands, next_command) = (Vec::new(), 0);
        Self { driver, wake, inbox, attached, pending, free, commands, next_command, done, segments, observe }
    }

    fn run(self) -> Result<(), String> {
        let mut manager = EventManager::<Self>::new().map_err(|e| e.to_string())?;
        let id = manager.add_subscriber(self);
        let mut changes = Vec::new();
        loop {
            let owner = manager.subscriber_mut(id).map_err(|e| e.to_string())?;
            if owner.upkeep() {
                return Ok(());
            }
            let timeout = owner.driver.timeout().as_millis() + 1;
            owner.driver.watch_changes(&mut changes);
            let mut ops = manager.event_ops(id).map_err(|e| e.to_string())?;
            for change in changes.drain(..) {
                change.apply(&mut ops).map_err(|e| e.to_string())?;
            }
            manager
                .run_with_timeout(i32::try_from(timeout).unwrap_or(i32::MAX))
                .map_err(|e| e.to_string())?;
        }
    }

    /// Everything that follows a wake-up; true when the client is over.
    fn upkeep(&mut self) -> bool {
        self.driver.upkeep();
        let mut done = std::mem::take(&mut self.done);
        self.driver.completions(&mut done);
        for (token, result) in done.drain(..) {
            self.complete(token, result);
        }
        self.done = done;
        // One that was away may not know how the pool is now.
        let is_known = self.observe && self.driver.has_asked_all();
        if let (Some(spec), Some(attached)) = (self.driver.spec().filter(|_| is_known), &self.attached) {
            // As in `tell`.
            let _ = attached.send(Ok(Progress::Attached(Box::new(spec.clone()))));
            self.attached = None;
        }
        if self.observe
            && let Some(words) = self.driver.distrust()
            && let Some(attached) = self.attached.take()
        {
            // As in `tell`.
            let _ = attached.send(Err(PoolError::Distrust(words)));
        }
        let mut replies = Vec::new();
        self.driver.take_replies(&mut replies);
        for (token, reply) in replies {
            if let Some(at) = self.commands.iter().position(|(t, _)| *t == token) {
                // Whoever asked may be gone.
                let _ = self.commands.swap_remove(at).1.send(reply);
            }
        }
        let mut notices = Vec::new();
        self.driver.take_notices(&mut notices);
        for notice in notices {
            self.tell(notice);
        }
        self.driver.over().is_some()
    }

    fn tell(&mut self, notice: Notice) {
        tracing::debug!(?notice, "pool");
        let progress = match notice {
            Notice::Attached(_) => {
                let spec = self.driver.spec().cloned();
                spec.map(|spec| Ok(Progress::Attached(Box::new(spec))))
            }
            Notice::Waiting(text) => Some(Ok(Progress::Waiting(text))),
            Notice::LinkLost(_, address, text) => Some(Ok(Progress::Waiting(format!("{address}: {text}")))),
            Notice::Over(reason) => Some(Err(PoolError::Over(reason))),
            _ => None,
        };
        let ends = matches!(progress, Some(Ok(Progress::Attached(_)) | Err(_)));
        if let (Some(attached), Some(progress)) = (&self.attached, progress) {
            // Whoever waited may have lost patience; it has sent a detach then.
            let _ = attached.send(progress);
        }
        if ends {
            self.attached = None;
        }
    }

    fn complete(&mut self, token: Token, result: Result<(), IoError>) {
        let index = usize::try_from(token.0).unwrap_or(usize::MAX);
        if let Some(pending) = self.pending.get_mut(index).and_then(Option::take) {
            self.free.push(index);
            pending.done.run(result.map(|()| pending.buffers));
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Submit { operation, offset, length, mut buffers, done } => {
                self.segments.clear();
                segments_of_buffers(&mut buffers, &mut self.segments);
                let index = self.free.pop().unwrap_or_else(|| {
                    self.pending.push(None);
                    self.pending.len() - 1
                });
                // The buffers' bytes stay where they are when the list of them moves.
                self.pending[index] = Some(Pending { buffers, done });
                self.driver.submit(Token(index as u64), operation, offset, length, &self.segments);
            }
            Command::Status(sender) => {
                // Whoever asked may be gone.
                let _ = sender.send(self.driver.status());
            }
            Command::Operator(command, sender) => {
                self.next_command += 1;
                let token = CommandToken(self.next_command);
                self.commands.push((token, sender));
                self.driver.command(token, command);
            }
            Command::AcknowledgeLoss => self.driver.acknowledge_loss(),
            Command::Detach => self.driver.detach(),
        }
    }
}

impl MutEventSubscriber for Owner {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        if events.fd() == self.wake.as_raw_fd() {
            // Only the wake-up counts; the commands are in the inbox.
            let _ = self.wake.read();
            while let Ok(command) = self.inbox.try_recv() {
                self.command(command);
            }
        } else {
            self.driver.ready(events.fd(), events.event_set());
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        if let Err(error) = WatchChange::Add(self.wake.as_raw_fd(), EventSet::IN).apply(ops) {
            tracing::error!(%error, "the pool's thread cannot be woken");
        }
    }
}
