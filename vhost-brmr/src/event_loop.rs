//! The event loop of the I/O thread: one `event_manager` epoll set holds control socket, kicks, disk and signals, and
//! one turn per wake-up serves them all. Everything on the thread has one owner, the [`EventLoop`]; nothing is shared.
//!
//! Kicks and control socket are watched edge-triggered. A kick then costs no read, and neither a message that must wait
//! (see [`Drain`]) nor half a message makes the loop spin.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, SubscriberId, SubscriberOps};
use rmr_common::reactor::WatchChange;
use rmr_common::throttle::Throttles;
use rmr_common::words;
use thiserror::Error;
use tracing::{debug, error, info, warn};
use vhost::vhost_user::message::FrontendReq;
use vhost::vhost_user::{BackendReqHandler, Error as VhostError};
use vmm_sys_util::epoll::EventSet;

use crate::device::{Device, DeviceOptions};
use crate::disk::{Attachment, Disk, GeometryError};
use crate::engine::Engine;
use crate::frontend::{self, Drain, KickChange, Session};
use crate::pace::Pace;
use crate::queue::RingError;
use crate::socket::{Listener, SocketFile};
use crate::sys::{self, Nudge, Peeked, StopSignals};

/// What the loop waits for after it cancelled requests that took too long.
const CANCEL_GRACE: Duration = Duration::from_secs(1);
/// Most messages of the front end in one turn, so that a talkative one cannot starve the rings.
const MAX_MESSAGES: usize = 64;
/// How long the listener rests when a front end could not be accepted: it is readable all the while.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

/// Tags of watched descriptors; those of the disk carry none.
const TAG_DISK: u32 = 0;
const TAG_LISTENER: u32 = 1;
const TAG_CONTROL: u32 = 2;
const TAG_SIGNALS: u32 = 3;
/// The tag of the first ring's kick; the others follow.
const TAG_KICK: u32 = 16;

/// What happens when the front end goes away.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnDisconnect {
    /// Wait for the next one.
    Wait,
    /// End.
    Exit,
}

/// How the loop behaves.
#[derive(Clone, Copy, Debug)]
pub struct LoopOptions {
    /// Spin for so long after the last activity before sleeping, where the guest usually sends its next request within that
    /// time after an answer; zero sleeps at once.
    pub poll: Duration,
    /// Longest wait for requests in flight before a ring is stopped or the daemon ends.
    pub drain_timeout: Duration,
    /// What happens when the front end goes away.
    pub on_disconnect: OnDisconnect,
    /// Keep the disk for so long after the front end went away, for the one that takes its guest over; zero gives it back at once.
    pub linger: Duration,
}

/// Where front ends come from.
#[derive(Debug)]
pub enum FrontEnds {
    /// One after the other.
    Listener(UnixListener),
    /// The same, on a socket with a file, which is removed at the end.
    Path(SocketFile, UnixListener),
    /// This one, and then the loop ends.
    Connected(UnixStream),
}

/// Why the loop ended, other than because it was told to.
#[derive(Debug, Error)]
pub enum LoopError {
    /// The disk has a size or a limit that cannot be.
    #[error("the disk cannot be served: {0}")]
    Geometry(#[from] GeometryError),
    /// The queue size cannot be.
    #[error("{0}")]
    Ring(#[from] RingError),
    /// The loop itself failed.
    #[error("event loop: {0}")]
    Events(event_manager::Error),
    /// The disk will not be attached.
    #[error("the disk is refused: {0}")]
    Refused(String),
    /// Another client has the disk now.
    #[error("{0}")]
    Displaced(String),
    /// A socket failed.
    #[error("front-end socket: {0}")]
    Socket(#[from] io::Error),
}

impl From<event_manager::Error> for LoopError {
    fn from(error: event_manager::Error) -> Self {
        Self::Events(error)
    }
}

/// The loop with everything on its thread.
pub struct EventLoop<D: Disk> {
    manager: EventManager<Worker<D>>,
    id: SubscriberId,
}

impl<D: Disk> EventLoop<D> {
    /// Sets everything up; nothing is served before [`run`](Self::run). `signals` stop the loop.
    ///
    /// # Errors
    /// When the disk's geometry or the queue size is not acceptable, or the kernel refuses a descriptor.
    pub fn new(
        disk: D,
        device: DeviceOptions,
        options: LoopOptions,
        front_ends: FrontEnds,
        signals: Option<StopSignals>,
    ) -> Result<Self, LoopError> {
        let geometry = disk.geometry();
        geometry.validate()?;
        let capacity = usize::from(device.queues) * usize::from(device.queue_size);
        let mut session = Session::new(Device::new(device, geometry))?;
        session.memory.use_fabric(disk.fabric());
        let mut worker = Worker {
            listener: None,
            retired_listener: None,
            disk,
            session: Arc::new(Mutex::new(session)),
            engine: Engine::new(capacity),
            connection: None,
            retired: None,
            signals,
            nudge: None,
            options,
            state: State::Running,
            kicks: Vec::new(),
            listener_ready: false,
            listener_rests: None,
            lingers: None,
            logs: Throttles::default(),
            changes: Vec::new(),
            control_changes: Vec::new(),
            kick_changes: Vec::new(),
            last_activity: Instant::now(),
            pace: Pace::default(),
            armed: true,
        };
        match front_ends {
            FrontEnds::Listener(socket) => worker.listener = Some(Listener::new(None, socket)?),
            FrontEnds::Path(file, socket) => worker.listener = Some(Listener::new(Some(file), socket)?),
            FrontEnds::Connected(stream) => {
                worker.options.on_disconnect = OnDisconnect::Exit;
                worker.connect(stream);
            }
        }
        let mut manager = EventManager::new()?;
        let id = manager.add_subscriber(worker);
        let mut this = Self { manager, id };
        this.apply_changes()?;
        Ok(this)
    }

    /// Serves until the loop is told to stop.
    ///
    /// # Errors
    /// When the disk is refused, or epoll fails.
    pub fn run(mut self) -> Result<(), LoopError> {
        let mut wait = 0;
        loop {
            self.manager.run_with_timeout(wait)?;
            let worker = self.manager.subscriber_mut(self.id)?;
            wait = worker.turn();
            if let State::Finished(error) = &mut worker.state {
                return error.take().map_or(Ok(()), Err);
            }
            if self.apply_changes()? {
                wait = 0;
            }
        }
    }

    /// Watches what is to be watched now; whether that led to something that is to be dealt with at once.
    fn apply_changes(&mut self) -> Result<bool, LoopError> {
        let worker = self.manager.subscriber_mut(self.id)?;
        worker.disk.watch_changes(&mut worker.changes);
        if worker.changes.is_empty() && worker.control_changes.is_empty() && worker.kick_changes.is_empty() {
            return Ok(false);
        }
        let mut disk = std::mem::take(&mut worker.changes);
        let control = std::mem::take(&mut worker.control_changes);
        let kicks = std::mem::take(&mut worker.kick_changes);
        let (mut failed, mut unwatched) = (Vec::new(), false);
        let mut ops = self.manager.event_ops(self.id)?;
        for change in disk.drain(..) {
            if let Err(error) = change.apply(&mut ops) {
                error!(%error, ?change, "a descriptor of the disk cannot be watched");
            }
        }
        for change in control {
            match change {
                ControlChange::Add(fd) => {
                    // Writable again: answers that it did not read kept its messages waiting.
                    let set =
                        EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
                    if let Err(error) = ops.add(Events::with_data_raw(fd, TAG_CONTROL, set)) {
                        error!(%error, "the front end's socket cannot be watched");
                        unwatched = true;
                    }
                }
                ControlChange::Listen(fd) => {
                    if let Err(error) = ops.add(Events::with_data_raw(fd, TAG_LISTENER, EventSet::IN)) {
                        error!(%error, "the listening socket cannot be watched");
                    }
                }
                ControlChange::Remove(fd) => {
                    if let Err(error) = ops.remove(Events::empty_raw(fd)) {
                        debug!(%error, fd, "was not watched");
                    }
                }
            }
        }
        for change in kicks {
            match change {
                KickChange::Add(fd, queue) => {
                    let tag = TAG_KICK + u32::try_from(queue).unwrap_or(u32::MAX - TAG_KICK);
                    let set = EventSet::IN | EventSet::EDGE_TRIGGERED;
                    if ops.add(Events::with_data_raw(fd, tag, set)).is_err() {
                        failed.push(queue);
                    }
                }
                // One that could not be added cannot be removed either. The file is closed here.
                KickChange::Remove(file) => drop(ops.remove(Events::empty_raw(file.as_raw_fd()))),
            }
        }
        let worker = self.manager.subscriber_mut(self.id)?;
        worker.changes = disk;
        // In this order: a front end that sees its connection close connects again at once.
        worker.retired_listener = None;
        worker.retired = None;
        for queue in failed {
            error!(queue, "the kick descriptor cannot be watched, expected an eventfd");
            worker.session().kick_failed(queue);
        }
        if unwatched {
            worker.disconnect("its socket cannot be watched");
        }
        Ok(unwatched)
    }
}

impl<D: Disk> std::fmt::Debug for EventLoop<D> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EventLoop").finish_non_exhaustive()
    }
}

/// A change of whether the control socket or the listener is watched.
#[derive(Clone, Copy, Debug)]
enum ControlChange {
    Add(RawFd),
    Listen(RawFd),
    Remove(RawFd),
}

/// From start to end.
///
/// ```text
/// Running ── signal, last front end gone ──► Stopping ── nothing in flight, disk detached, or out of time ──► Finished
///    └────────────────────── disk refused or displaced ───────────────────────────────────────────────────────────────▲
/// ```
#[derive(Debug)]
enum State {
    Running,
    Stopping { deadline: Instant, cancelled: bool },
    Finished(Option<LoopError>),
}

/// The control socket of the front end.
struct Connection {
    handler: BackendReqHandler<Mutex<Session>>,
    readable: bool,
    hung_up: bool,
    draining: Option<Draining>,
}

/// A message that waits for requests in flight.
#[derive(Clone, Copy, Debug)]
struct Draining {
    scope: Drain,
    deadline: Instant,
    cancelled: bool,
    need_reply: bool,
}

/// Everything that the loop owns.
struct Worker<D: Disk> {
    // The listener comes first because fields are dropped in this order: however the loop ends, it is closed before the connection.
    listener: Option<Listener>,
    /// A listener that takes no more front ends, whose descriptor is still watched.
    retired_listener: Option<Listener>,
    disk: D,
    /// Shared with the message handler of the connection only, on this very thread; the lock is never contended.
    session: Arc<Mutex<Session>>,
    engine: Engine,
    connection: Option<Connection>,
    /// A connection whose descriptor is still watched.
    retired: Option<Connection>,
    signals: Option<StopSignals>,
    /// Set while a front end is there, whose descriptors might make this thread wait.
    nudge: Option<Nudge>,
    options: LoopOptions,
    state: State,
    kicks: Vec<usize>,
    listener_ready: bool,
    /// The listener is not watched until then.
    listener_rests: Option<Instant>,
    /// The disk is kept until then, although no front end uses it.
    lingers: Option<Instant>,
    /// Log lines that front ends can cause.
    logs: Throttles<&'static str>,
    changes: Vec<WatchChange>,
    control_changes: Vec<ControlChange>,
    kick_changes: Vec<KickChange>,
    last_activity: Instant,
    pace: Pace,
    /// The guest kicks for what it makes available.
    armed: bool,
}

impl<D: Disk> MutEventSubscriber for Worker<D> {
    fn process(&mut self, events: Events, _ops: &mut EventOps<'_>) {
        // Only notes what happened: the work is done once per wake-up, in `turn`.
        match events.data() {
            TAG_DISK => self.disk.ready(events.fd(), events.event_set()),
            TAG_LISTENER => self.listener_ready = true,
            TAG_CONTROL => {
                if let Some(connection) = &mut self.connection {
                    connection.readable = true;
                    let hang_up = EventSet::HANG_UP | EventSet::READ_HANG_UP | EventSet::ERROR;
                    connection.hung_up |= events.event_set().intersects(hang_up);
                }
            }
            TAG_SIGNALS => self.stop_requested(),
            tag => self.kicks.push((tag - TAG_KICK) as usize),
        }
    }

    fn init(&mut self, ops: &mut EventOps<'_>) {
        let listener = self.listener.as_ref().map(|listener| (listener.as_raw_fd(), TAG_LISTENER));
        let signals = self.signals.as_ref().map(|signals| (signals.as_raw_fd(), TAG_SIGNALS));
        for (fd, tag) in listener.into_iter().chain(signals) {
            if let Err(error) = ops.add(Events::with_data_raw(fd, tag, EventSet::IN)) {
                error!(%error, fd, "cannot be watched");
            }
        }
    }
}

impl<D: Disk> Worker<D> {
    /// Does everything that is due, and says how many milliseconds the loop may sleep (-1: until something happens).
    fn turn(&mut self) -> i32 {
        let messages_left = self.control();
        if self.session().take_reset() {
            self.disk.reset();
        }
        // A front end that connects again has closed its connection before, and that may be among the messages that are left.
        if self.listener_ready && !messages_left {
            self.accept();
        }
        if self.listener_rests.is_some_and(|until| until <= Instant::now()) {
            self.listener_rests = None;
            self.control_changes
                .extend(self.listener.as_ref().map(|listener| ControlChange::Listen(listener.as_raw_fd())));
        }
        self.end_lingering();
        self.attach_or_stop();
        let serve = matches!(self.state, State::Running)
            && matches!(self.disk.attachment(), Attachment::Attached | Attachment::Attaching);
        let polls = self.pace.is_within(self.options.poll);
        // The lock is taken through the field, not a method, so that the rest of `self` stays usable.
        let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
        for queue in self.kicks.drain(..) {
            if let Some(kicked) = session.kicked.get_mut(queue) {
                *kicked = true;
            }
        }
        let turn = self.engine.turn(&mut session, &mut self.disk, serve, !polls);
        session.set_size(self.disk.geometry().size);
        if !self.options.poll.is_zero() {
            self.pace.note(self.engine.in_flight(), Instant::now);
        }
        if polls && turn.active {
            self.last_activity = Instant::now();
        }
        // A look at a ring turned its kicks off, whether or not there was something to take.
        self.armed &= !(polls && turn.looked);
        let mut again = turn.again || messages_left;
        if serve && !self.armed {
            if self.last_activity.elapsed() < self.options.poll {
                session.kicked.fill(true);
                again = true;
            } else {
                self.armed = true;
                again |= Engine::arm(&mut session);
            }
        }
        if self.kick_changes.is_empty() {
            self.kick_changes = session.take_kick_changes();
        } else {
            self.kick_changes.extend(session.take_kick_changes());
        }
        let draining = self.connection.as_ref().and_then(|connection| connection.draining);
        // A message that waited, and waits no more, is answered at once.
        let drained = draining.is_some_and(|draining| session.in_flight(draining.scope) == 0);
        // The disk may have been refused, attached or detached within this turn, without any event to come.
        let running = session.is_running();
        drop(session);
        let changed = match self.state {
            State::Running => match self.disk.attachment() {
                Attachment::Refused(_) => true,
                Attachment::Detached | Attachment::Displaced(_) => running,
                Attachment::Attached | Attachment::Attaching => !serve,
                Attachment::Detaching => false,
            },
            State::Stopping { .. } => {
                self.engine.in_flight() == 0 && !matches!(self.disk.attachment(), Attachment::Detaching)
            }
            State::Finished(_) => true,
        };
        if again || drained || changed { 0 } else { self.sleep_ms(draining) }
    }

    fn sleep_ms(&self, draining: Option<Draining>) -> i32 {
        let now = Instant::now();
        let until = |deadline: Instant| deadline.saturating_duration_since(now);
        let draining = draining.map(|draining| until(draining.deadline));
        let stopping = match self.state {
            State::Stopping { deadline, .. } => Some(until(deadline)),
            State::Running | State::Finished(_) => None,
        };
        let resting = self.listener_rests.map(until);
        let lingering = self.lingers.map(until);
        let wait = [self.disk.timeout(), draining, stopping, resting, lingering].into_iter().flatten().min();
        // Rounded up: waking early would only find that nothing is due yet.
        wait.map_or(-1, |wait| i32::try_from(wait.as_nanos().div_ceil(1_000_000)).unwrap_or(i32::MAX))
    }

    fn session(&self) -> MutexGuard<'_, Session> {
        self.session.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Handles messages of the front end; whether some are left for the next turn.
    fn control(&mut self) -> bool {
        for _ in 0..MAX_MESSAGES {
            let Some(connection) = &mut self.connection else { return false };
            let need_reply = match connection.draining {
                Some(_) if connection.hung_up => {
                    // Nobody waits for the answer any more.
                    self.disconnect("the front end went away while it waited for requests to complete");
                    return false;
                }
                Some(draining) => {
                    if self.still_drains(draining) {
                        return false;
                    }
                    draining.need_reply
                }
                None if !connection.readable => return false,
                None => match sys::peek(&connection.handler) {
                    Ok(Peeked::Nothing) if connection.hung_up => {
                        self.disconnect("the front end went away in the middle of a message");
                        return false;
                    }
                    Ok(Peeked::Nothing) => {
                        connection.readable = false;
                        return false;
                    }
                    Ok(Peeked::Closed) => {
                        self.disconnect("the front end closed the connection");
                        return false;
                    }
                    Err(error) => {
                        self.disconnect(&format!("the front end's socket failed: {error}"));
                        return false;
                    }
                    Ok(Peeked::TooManyDescriptors) => {
                        self.disconnect(
                            "it sent a message with more than 32 descriptors, or more than this process may have open",
                        );
                        return false;
                    }
                    Ok(Peeked::Message { code, need_reply, length, index, value }) => {
                        if !matches!(sys::can_answer(&connection.handler), Ok(true)) {
                            // Its socket becomes writable when it reads.
                            connection.readable = false;
                            return false;
                        }
                        if code == FrontendReq::SET_BACKEND_REQ_FD as u32 {
                            match sys::peek_descriptor(&connection.handler) {
                                Ok(socket) => self.session().set_channel(socket),
                                Err(error) => warn!("no channel to the front end: {error}"),
                            }
                        }
                        if self.handles_log_message(code, length, need_reply) {
                            continue;
                        }
                        let need_reply = need_reply && frontend::is_acknowledged(code);
                        let scope = Drain::needed(code, index, value);
                        if scope != Drain::Nothing && self.session().in_flight(scope) > 0 {
                            self.drain(scope, need_reply);
                            return false;
                        }
                        need_reply
                    }
                },
            };
            self.handle_message(need_reply);
        }
        true
    }

    /// Holds the next message back until these requests completed.
    fn drain(&mut self, scope: Drain, need_reply: bool) {
        self.session().pause(scope, true);
        let deadline = Instant::now() + self.options.drain_timeout;
        if let Some(connection) = &mut self.connection {
            connection.draining = Some(Draining { scope, deadline, cancelled: false, need_reply });
        }
    }

    /// Whether a message still has to wait.
    fn still_drains(&mut self, draining: Draining) -> bool {
        let left = self.session().in_flight(draining.scope);
        if left > 0 && Instant::now() < draining.deadline {
            return true;
        }
        if left > 0 && !draining.cancelled {
            warn!(left, timeout = %words::time(self.options.drain_timeout), "requests did not complete in time; cancelling them");
            self.disk.cancel();
            let deadline = Instant::now() + CANCEL_GRACE;
            if let Some(connection) = &mut self.connection {
                connection.draining = Some(Draining { deadline, cancelled: true, ..draining });
            }
            return true;
        }
        if left > 0 {
            warn!(left, "the front end is answered although requests are still in flight");
        }
        self.session().pause(draining.scope, false);
        if let Some(connection) = &mut self.connection {
            connection.draining = None;
        }
        false
    }

    /// Handles what the `vhost` crate does not know, or refuses without words: messages about the dirty log.
    fn handles_log_message(&mut self, code: u32, length: usize, need_reply: bool) -> bool {
        if code == FrontendReq::SET_LOG_BASE as u32 && !self.session().takes_logs_by_descriptor() {
            self.disconnect(
                "refused a message of the front end: a dirty log (SET_LOG_BASE) without LOG_SHMFD, expected that protocol \
                 feature to be negotiated, with which the log comes as a descriptor",
            );
            return true;
        }
        if code != FrontendReq::SET_LOG_FD as u32 {
            return false;
        }
        // With this descriptor the back end may tell of changes of the log, and need not; nobody waits for that.
        let acknowledge = need_reply && self.session().has_reply_ack();
        let skipped = self.connection.as_ref().map(|c| sys::skip(&c.handler, code, length, acknowledge));
        if let Some(Err(error)) = skipped {
            self.disconnect(&format!("the front end's socket failed: {error}"));
        }
        true
    }

    fn handle_message(&mut self, need_reply: bool) {
        let Some(connection) = &mut self.connection else { return };
        match connection.handler.handle_request() {
            Ok(()) => (),
            Err(VhostError::ReqHandlerError(reason)) => {
                // The front end knows of the refusal only if it waits for an acknowledgement.
                if need_reply && self.session().has_reply_ack() {
                    self.logs.log("refused", |withheld| {
                        warn!(withheld, "refused a message of the front end: {reason}");
                    });
                } else {
                    self.disconnect(&format!("refused a message of the front end: {reason}"));
                }
            }
            Err(VhostError::Disconnected) => self.disconnect("the front end closed the connection"),
            Err(error) => self.disconnect(&format!("the front end broke the protocol: {error}")),
        }
    }

    fn accept(&mut self) {
        self.listener_ready = false;
        let Some(listener) = &self.listener else { return };
        match listener.accept() {
            Ok(stream) if self.connection.is_none() && matches!(self.state, State::Running) => {
                self.connect(stream);
            }
            Ok(_) => self.logs.log("second", |withheld| {
                warn!(withheld, "a second front end was turned away: one at a time");
            }),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => (),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => (),
            Err(error) => {
                // For want of descriptors as a rule. The front end waits in the queue, and would wake the loop at once again.
                self.logs.log("accept", |withheld| {
                    warn!(withheld, "a front end could not be accepted, trying again in a second: {error}");
                });
                self.control_changes.push(ControlChange::Remove(listener.as_raw_fd()));
                self.listener_rests = Some(Instant::now() + ACCEPT_PAUSE);
            }
        }
    }

    fn connect(&mut self, stream: UnixStream) {
        info!("front end connected");
        self.set_nudge(true);
        let fd = stream.as_raw_fd();
        let handler = BackendReqHandler::from_stream(stream, Arc::clone(&self.session));
        self.connection = Some(Connection { handler, readable: true, hung_up: false, draining: None });
        self.control_changes.push(ControlChange::Add(fd));
    }

    /// Ends the session. Requests in flight go on, with their memory, and nobody is told of their end.
    fn disconnect(&mut self, reason: &str) {
        let Some(connection) = self.connection.take() else { return };
        let in_flight = self.engine.in_flight();
        info!(in_flight, "front end gone: {reason}");
        self.set_nudge(false);
        self.control_changes.push(ControlChange::Remove(connection.handler.as_raw_fd()));
        self.retired = Some(connection);
        self.session().end();
        let has_claim = matches!(
            self.disk.attachment(),
            Attachment::Attached | Attachment::Attaching | Attachment::Displaced(_)
        );
        // Requests in flight mean that the hypervisor died: no other one goes on with its guest.
        let may_linger = in_flight == 0
            && !self.options.linger.is_zero()
            && self.options.on_disconnect == OnDisconnect::Wait
            && matches!(self.state, State::Running)
            && matches!(self.disk.attachment(), Attachment::Attached);
        if may_linger {
            debug!(linger = ?self.options.linger, "keeping the disk for the next front end");
            // One that comes and goes without using the disk does not keep it any longer.
            self.lingers.get_or_insert(Instant::now() + self.options.linger);
        } else if has_claim {
            self.lingers = None;
            self.disk.detach();
        }
        if self.options.on_disconnect == OnDisconnect::Exit && matches!(self.state, State::Running) {
            self.stop();
        }
    }

    fn set_nudge(&mut self, on: bool) {
        let result = match &self.nudge {
            Some(nudge) => nudge.set(on),
            None if !on => Ok(()),
            None => Nudge::new().and_then(|nudge| self.nudge.insert(nudge).set(on)),
        };
        if let Err(error) = result {
            warn!("no timer that ends writes to a descriptor that blocks: {error}");
        }
    }

    fn stop_requested(&mut self) {
        if !self.signals.as_ref().is_some_and(StopSignals::take) {
            return;
        }
        if matches!(self.state, State::Running) {
            info!(in_flight = self.engine.in_flight(), "told to stop; waiting for requests in flight");
            self.stop();
        } else {
            warn!(in_flight = self.engine.in_flight(), "told to stop again; not waiting any longer");
            self.state = State::Finished(None);
        }
    }

    /// Begins the end. Front ends that connect from here on are refused, so that they try again, and meet the next daemon.
    fn stop(&mut self) {
        (self.listener_ready, self.listener_rests, self.lingers) = (false, None, None);
        if let Some(listener) = self.listener.take() {
            self.control_changes.push(ControlChange::Remove(listener.as_raw_fd()));
            self.retired_listener = Some(listener);
        }
        let deadline = Instant::now() + self.options.drain_timeout;
        self.state = State::Stopping { deadline, cancelled: false };
    }

    /// Nothing is left to wait for before the end.
    fn is_stopped(&self) -> bool {
        let detached = matches!(
            self.disk.attachment(),
            Attachment::Detached | Attachment::Refused(_) | Attachment::Displaced(_)
        );
        matches!(self.state, State::Stopping { .. }) && self.engine.in_flight() == 0 && detached
    }

    /// Gives the disk back that was kept for another front end, when none came in time, or another client has taken it.
    fn end_lingering(&mut self) {
        let Some(deadline) = self.lingers else { return };
        if self.session().is_running() {
            self.lingers = None;
            return;
        }
        let is_attached = matches!(self.disk.attachment(), Attachment::Attached);
        if !is_attached || deadline <= Instant::now() {
            self.lingers = None;
            self.disk.detach();
        }
    }

    /// Claims the disk when the first ring runs (live migration: not before), and gives it back before the end.
    fn attach_or_stop(&mut self) {
        if let Attachment::Refused(reason) = self.disk.attachment()
            && matches!(self.state, State::Running)
        {
            let error = LoopError::Refused(reason.to_owned());
            let mut session = self.session();
            // Requests were taken while the disk was being attached. They fail with it, and the guest is not told where the next
            // daemon can serve them: another client may be about to give the disk back.
            if session.inflight.is_some() {
                session.leave_in_flight();
            }
            drop(session);
            self.state = State::Finished(Some(error));
            return;
        }
        // With its rings stopped the guest does not notice. It may have gone to the host of that client, and its hypervisor here
        // is about to end.
        if let Attachment::Displaced(reason) = self.disk.attachment()
            && matches!(self.state, State::Running)
            && self.session().is_running()
        {
            let text = format!(
                "another client took the disk from this guest, which cannot go on with what it has in memory: {reason}"
            );
            self.state = State::Finished(Some(LoopError::Displaced(text)));
            return;
        }
        match self.state {
            State::Running => {
                if matches!(self.disk.attachment(), Attachment::Detached) && self.session().is_running() {
                    debug!("first ring enabled; attaching the disk");
                    self.disk.attach();
                }
            }
            State::Stopping { .. } if self.is_stopped() => self.state = State::Finished(None),
            State::Stopping { deadline, cancelled } => {
                let attached = matches!(self.disk.attachment(), Attachment::Attached | Attachment::Attaching);
                if self.engine.in_flight() == 0 && attached {
                    self.disk.detach();
                }
                if Instant::now() < deadline {
                    return;
                }
                let in_flight = self.engine.in_flight();
                if cancelled {
                    warn!(
                        in_flight,
                        "ending although the disk is not detached; the nodes will find that out"
                    );
                    self.state = State::Finished(None);
                } else {
                    // A front end that waits for its rings to end gets an answer for each request, as without a stop.
                    let waits = self.connection.as_ref().is_some_and(|c| c.draining.is_some());
                    if in_flight > 0 && !waits && self.session().inflight.is_some() {
                        warn!(
                            in_flight,
                            "requests did not complete in time; the next daemon serves them again"
                        );
                        self.session().leave_in_flight();
                    } else {
                        warn!(in_flight, "requests did not complete in time; cancelling them");
                    }
                    self.disk.cancel();
                    self.state = State::Stopping { deadline: Instant::now() + CANCEL_GRACE, cancelled: true };
                }
            }
            State::Finished(_) => (),
        }
    }
}
