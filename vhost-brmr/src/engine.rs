//! The data path: chains off the rings become requests to the disk, completions become used elements. Everything of a
//! wake-up happens in one [`Engine::turn`]: no allocation, no lock and no system call per request.

use std::time::Duration;

use rmr_common::throttle::Throttle;
use tracing::{error, warn};

use crate::disk::{Disk, DiskError, Operation, Request, Token};
use crate::flight::{Flight, Index, Origin, Progress};
use crate::frontend::Session;
use crate::memory;
use crate::queue::{Fault, Taken};
use crate::request::{Action, Parser, Range, Status};

/// At most one message per kind of failure in this time, so that a guest cannot flood the log.
const LOG_INTERVAL: Duration = Duration::from_secs(1);

/// What a turn did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn {
    /// Something was taken or completed.
    pub active: bool,
    /// Some ring was looked at.
    pub looked: bool,
    /// There is more to do at once.
    pub again: bool,
}

/// The data path of one I/O thread.
#[derive(Debug)]
pub struct Engine {
    parser: Parser,
    flight: Flight,
    done: Vec<(Token, Result<(), DiskError>)>,
    /// A ring found no free slot; the next completion makes all rings be looked at.
    starved: bool,
    refusals: Throttle,
    failures: Throttle,
}

impl Engine {
    /// A data path for at most `capacity` requests in flight.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        Self {
            parser: Parser::default(),
            flight: Flight::new(capacity),
            done: Vec::with_capacity(capacity.min(4096)),
            starved: false,
            refusals: Throttle::new(1, LOG_INTERVAL),
            failures: Throttle::new(1, LOG_INTERVAL),
        }
    }

    /// How many requests are in flight, those of front ends that are gone included.
    #[must_use]
    pub fn in_flight(&self) -> usize {
        self.flight.len()
    }

    /// Completes what the disk finished, takes what the guest made available if `serve`, and sends it on. With `rearm`
    /// the guest will kick for what comes later.
    pub fn turn(&mut self, session: &mut Session, disk: &mut impl Disk, serve: bool, rearm: bool) -> Turn {
        let mut turn = Turn { active: self.complete(session, disk), looked: false, again: false };
        if serve {
            for queue in 0..session.rings.len() {
                if session.kicked[queue] {
                    turn.looked = true;
                    turn.active |= self.serve(session, disk, queue, rearm);
                    turn.again |= session.kicked[queue];
                }
            }
        }
        self.publish(session);
        disk.upkeep();
        turn
    }

    /// Lets the guest kick on every ring; whether something is there to be taken already.
    pub fn arm(session: &mut Session) -> bool {
        let mut pending = false;
        for queue in 0..session.rings.len() {
            let memory = session.memory.snapshot();
            match session.rings[queue].arm(memory) {
                Ok(more) => {
                    session.kicked[queue] |= more;
                    pending |= more;
                }
                Err(fault) => fail(session, queue, fault),
            }
        }
        pending
    }

    fn complete(&mut self, session: &mut Session, disk: &mut impl Disk) -> bool {
        disk.completions(&mut self.done);
        if self.done.is_empty() {
            return false;
        }
        // Writes that need a flush behind them, and completed in one turn, share one.
        let mut written = None;
        for at in 0..self.done.len() {
            let (token, result) = self.done[at];
            if let Err(reason) = result {
                self.failures.log(|more| warn!(%reason, more, "the disk failed a request"));
            }
            match self.flight.complete(token, result.is_err()) {
                Progress::Waiting => (),
                Progress::Written(index) => {
                    self.flight.share_flush(index, written);
                    written = Some(index);
                }
                Progress::Done(index) => self.finish(session, index),
                Progress::Unknown => {
                    error!(token = token.0, "the disk completed a request that is not in flight")
                }
            }
        }
        self.done.clear();
        if let Some(index) = written {
            submit_flush(disk, self.flight.token(index, u8::MAX));
        }
        if self.starved {
            self.starved = false;
            session.kicked.fill(true);
        }
        true
    }

    /// Answers a request and those that shared its flush.
    fn finish(&mut self, session: &mut Session, index: Index) {
        let mut next = Some(index);
        while let Some((finished, rest)) = next.and_then(|index| self.flight.release(index)) {
            next = rest;
            let Origin { queue, head, incarnation } = finished.origin;
            let Some(ring) = session.rings.get_mut(usize::from(queue)) else { continue };
            // The ring was stopped meanwhile: its guest does not wait for this any more.
            if ring.incarnation() != incarnation {
                continue;
            }
            let (status, length) =
                if finished.failed { (Status::IoError, 0) } else { (Status::Ok, finished.length) };
            memory::copy_to(&finished.memory, &[status as u8], &[finished.status]);
            ring.finish(head, length + 1);
        }
    }

    /// Takes what is on one ring; whether there was something.
    fn serve(&mut self, session: &mut Session, disk: &mut impl Disk, queue: usize, rearm: bool) -> bool {
        let Session { rings, memory, device, kicked, identification, inflight, .. } = session;
        let Self { parser, flight, refusals, starved, .. } = self;
        kicked[queue] = false;
        let (memory, limits, write_through) = (memory.snapshot(), device.limits(), device.is_write_through());
        let ring = &mut rings[queue];
        let incarnation = ring.incarnation();
        let number = u16::try_from(queue).unwrap_or(u16::MAX);
        let inflight = inflight.as_ref().map(|inflight| (inflight, queue));
        let served = ring.serve(memory, rearm, inflight, |head, chain| {
            if flight.is_full() {
                *starved = true;
                return Ok(Taken::NoRoom);
            }
            let parsed = parser.parse(chain, &limits)?;
            let origin = Origin { queue: number, head, incarnation };
            let answer = |status: Status, length| {
                memory::copy_to(memory, &[status as u8], &[parsed.status]);
                Taken::Answered(length + 1)
            };
            // Entering cannot fail: the table is not full.
            Ok(match parsed.action {
                Action::Transfer(range) => {
                    let read = range.operation == Operation::Read;
                    let written = if read { parser.data() } else { &[] };
                    let flush = write_through && !read;
                    let Some(index) = flight.enter(origin, parsed.status, written, 1, flush, memory) else {
                        return Ok(Taken::NoRoom);
                    };
                    let Range { operation, offset, length } = range;
                    let request = Request { operation, offset, length, segments: parser.data() };
                    disk.submit(flight.token(index, 0), request);
                    Taken::InFlight
                }
                Action::Flush if limits.read_only => answer(Status::Ok, 0),
                Action::Nothing => answer(Status::Ok, 0),
                Action::Flush => {
                    let Some(index) = flight.enter(origin, parsed.status, &[], 1, false, memory) else {
                        return Ok(Taken::NoRoom);
                    };
                    submit_flush(disk, flight.token(index, 0));
                    Taken::InFlight
                }
                Action::Ranges => {
                    let ranges = parser.ranges();
                    let parts = u16::try_from(ranges.len()).unwrap_or(u16::MAX);
                    let entered = flight.enter(origin, parsed.status, &[], parts, write_through, memory);
                    let Some(index) = entered else { return Ok(Taken::NoRoom) };
                    for (part, range) in (0..).zip(ranges) {
                        let Range { operation, offset, length } = *range;
                        let request = Request { operation, offset, length, segments: &[] };
                        disk.submit(flight.token(index, part), request);
                    }
                    Taken::InFlight
                }
                Action::Identify => {
                    let copied = memory::copy_to(memory, identification, parser.data());
                    answer(Status::Ok, u32::try_from(copied).unwrap_or(0))
                }
                Action::Refuse(status, reason) => {
                    refusals.log(|more| warn!(queue, %reason, more, "refused a request of the guest"));
                    answer(status, 0)
                }
            })
        });
        match served {
            Ok(served) => {
                kicked[queue] = served.more;
                served.taken > 0
            }
            Err(fault) => {
                fail(session, queue, fault);
                true
            }
        }
    }

    fn publish(&mut self, session: &mut Session) {
        for queue in 0..session.rings.len() {
            let Session { rings, memory, inflight, .. } = session;
            let inflight = inflight.as_ref().map(|inflight| (inflight, queue));
            if rings[queue].has_finished()
                && let Err(fault) = rings[queue].publish(memory.snapshot(), inflight)
            {
                fail(session, queue, fault);
            }
        }
    }
}

fn submit_flush(disk: &mut impl Disk, token: Token) {
    disk.submit(token, Request { operation: Operation::Flush, offset: 0, length: 0, segments: &[] });
}

fn fail(session: &mut Session, queue: usize, fault: Fault) {
    error!(queue, "ring stopped: {fault}");
    session.rings[queue].fail(fault);
}
