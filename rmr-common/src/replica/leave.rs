//! A node that stops in order: what it has answered is flushed before it says so, so that nobody counts it as missed.
//!
//! ```text
//!   requests go on          no request is taken              Goodbye, with what is true
//!   first flush ──────▶ writes under way end ──▶ last flush ──▶ flushed, or not
//! ```
//! The claim of the Goodbye is about the writes that were answered before it on the same connection. All of them had ended
//! when the last flush began, because none is taken from then on; a request that arrives later is not carried out and not
//! answered, so its client counts it as missed. If a flush failed in this session the claim is not made, whatever the
//! last flush says: a disk may report an error once, and have forgotten what it was about by the next flush.

use std::time::Duration;

use super::{IoId, Output, Replica};
use crate::time::Time;
use crate::wire::{Goodbye, Kind, MessageHeader, Status};

/// Requests are held for so long at most; then the node says Goodbye without a claim.
const LONGEST_HOLD: Duration = Duration::from_secs(1);

/// How far the end has come.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Leave {
    /// A first flush, so that the last one is short. Requests go on.
    Flushing(IoId),
    /// No request is taken any more, and writes under way end.
    Ending { since: Time },
    /// The last flush.
    LastFlush { since: Time, io: IoId },
    /// Whether all that was answered is durable.
    Left { flushed: bool },
}

impl Replica {
    /// The node is about to stop: brings what was answered to disk, then takes no more requests.
    pub fn leave(&mut self) {
        if self.leave.is_some() {
            return;
        }
        let is_needed = self.holder_connection().is_some() && !self.config.write_through && !self.broken;
        self.leave = Some(if mutant!(GoodbyeWithoutFlush) {
            Leave::Left { flushed: true }
        } else if is_needed {
            Leave::Flushing(self.own_flush())
        } else {
            Leave::Left { flushed: self.config.write_through && !self.broken }
        });
    }

    /// Whether the member has done what [`Replica::leave`] began, or has tried for long enough.
    #[must_use]
    pub fn has_left(&self, now: Time) -> bool {
        match self.leave {
            None | Some(Leave::Flushing(_)) => false,
            Some(Leave::Ending { since } | Leave::LastFlush { since, .. }) => now - since > LONGEST_HOLD,
            Some(Leave::Left { .. }) => true,
        }
    }

    /// The last message to the client, with what is true of the writes that were answered.
    #[must_use]
    pub fn goodbye(&self) -> (MessageHeader, Vec<u8>) {
        let flushed = self.leave == Some(Leave::Left { flushed: true });
        let body = Goodbye { flushed }.encode();
        let payload = u32::try_from(body.len()).unwrap_or(u32::MAX);
        let header = MessageHeader {
            epoch: self.epoch,
            view: self.view.number,
            payload,
            ..MessageHeader::new(Kind::Goodbye, self.spec.id)
        };
        (header, body)
    }

    /// Whether requests are left alone, because the node is about to stop.
    pub(super) fn takes_no_requests(&self) -> bool {
        !matches!(self.leave, None | Some(Leave::Flushing(_)))
    }

    /// A disk request has ended: the next step may be due.
    pub(super) fn advance_leave(&mut self) {
        let Some(Leave::Ending { since }) = self.leave else { return };
        let is_write = |io: &super::io::Io| io.is_write_of_client();
        if !self.ios.iter().flatten().any(is_write) {
            let io = self.own_flush();
            self.leave = Some(Leave::LastFlush { since, io });
        }
    }

    /// True if the flush was for the end.
    pub(super) fn leave_flushed(&mut self, io: IoId, status: Status) -> bool {
        match self.leave {
            Some(Leave::Flushing(flush)) if flush == io => {
                self.leave = Some(Leave::Ending { since: self.now });
                self.advance_leave();
                true
            }
            Some(Leave::LastFlush { io: flush, .. }) if flush == io => {
                let flushed = status == Status::Ok && !self.flush_failed && !self.broken;
                self.leave = Some(Leave::Left { flushed });
                true
            }
            Some(_) | None => false,
        }
    }

    /// The client is gone: there is nobody to make a claim to.
    pub(super) fn leave_alone(&mut self) {
        if self.leave.is_some() {
            self.leave = Some(Leave::Left { flushed: false });
        }
    }

    /// Lets go of the data of a request that is not taken.
    pub(super) fn ignore_request(&mut self, buffer: Option<super::BufferToken>) {
        if let Some(buffer) = buffer {
            self.outputs.push_back(Output::Release(buffer));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{Sequence, Slot};
    use crate::replica::tests::Bench;
    use crate::replica::{DiskOperation, DiskResult, Event};

    /// A write-back member with a client.
    fn attached() -> Bench {
        let mut bench = Bench::new(false);
        bench.attach(1, 1);
        bench.durable();
        let flush = bench.take_flush().expect("the flush of the attach");
        bench.apply(Event::Disk(flush, DiskResult::Done));
        bench.outputs.clear();
        bench
    }

    /// The disk request of a write, if the member takes it.
    fn write(bench: &mut Bench, slot: u16) -> Option<IoId> {
        let header = MessageHeader {
            slot: Slot(slot),
            sequence: Sequence(u64::from(slot) + 1),
            offset: u64::from(slot) * 4096,
            length: 4096,
            payload: 4096,
            ..bench.header(Kind::Write, 1)
        };
        bench.message(1, header, &[]);
        bench.durable();
        let is_write = |o: &Output| match o {
            Output::Disk { io, operation: DiskOperation::Write(_), .. } => Some(*io),
            _ => None,
        };
        let found = bench.outputs.iter().find_map(is_write);
        bench.outputs.retain(|o| is_write(o).is_none());
        found
    }

    fn leave(bench: &mut Bench) {
        bench.replica.leave();
        bench.apply(Event::Tick);
    }

    fn claims(bench: &Bench) -> bool {
        let (header, body) = bench.replica.goodbye();
        assert_eq!((header.kind, header.epoch), (Kind::Goodbye, crate::pool::Epoch(1)));
        Goodbye::decode(&body).unwrap().flushed
    }

    #[test]
    fn what_was_answered_is_flushed_before_the_claim_and_what_comes_later_is_not_answered() {
        let mut bench = attached();
        leave(&mut bench);
        let first = bench.take_flush().expect("the first flush");
        let under_way = write(&mut bench, 1).expect("requests go on during the first flush");
        bench.apply(Event::Disk(first, DiskResult::Done));
        assert_eq!(bench.take_flush(), None, "a write is under way");
        assert_eq!(write(&mut bench, 2), None, "no request is taken any more");
        bench.apply(Event::Disk(under_way, DiskResult::Done));
        let answered: Vec<_> = bench
            .outputs
            .iter()
            .filter_map(|o| if let Output::Send(_, h, _) = o { Some((h.kind, h.slot.0)) } else { None })
            .collect();
        assert_eq!(answered, [(Kind::IoReply, 1)]);
        let last = bench.take_flush().expect("the last flush");
        assert_eq!(write(&mut bench, 3), None);
        assert!(!bench.replica.has_left(Time(0)) && !claims(&bench));
        bench.apply(Event::Disk(last, DiskResult::Done));
        assert!(bench.replica.has_left(Time(0)) && claims(&bench));
        assert_eq!(write(&mut bench, 4), None);
    }

    #[test]
    fn a_flush_that_failed_is_not_made_good_by_the_next() {
        for fails_first in [true, false] {
            let mut bench = attached();
            leave(&mut bench);
            let result = |fails| if fails { DiskResult::Failed } else { DiskResult::Done };
            let first = bench.take_flush().unwrap();
            bench.apply(Event::Disk(first, result(fails_first)));
            let last = bench.take_flush().unwrap();
            bench.apply(Event::Disk(last, result(!fails_first)));
            assert!(bench.replica.has_left(Time(0)) && !claims(&bench));
        }
    }

    #[test]
    fn a_client_is_not_kept_waiting_for_a_slow_flush_and_a_client_that_is_gone_for_none() {
        let mut bench = attached();
        leave(&mut bench);
        let first = bench.take_flush().unwrap();
        assert!(!bench.replica.has_left(Time(9_000_000_000)), "requests go on");
        bench.apply(Event::Disk(first, DiskResult::Done));
        assert!(!bench.replica.has_left(Time(1_000_000_000)));
        assert!(bench.replica.has_left(Time(1_100_000_000)) && !claims(&bench));
        let mut bench = attached();
        leave(&mut bench);
        bench.apply(Event::Closed(crate::replica::ConnectionId(1)));
        assert!(bench.replica.has_left(Time(0)) && !claims(&bench));
    }

    #[test]
    fn a_write_through_store_has_nothing_to_flush() {
        let mut bench = Bench::new(true);
        bench.attach(1, 1);
        bench.durable();
        leave(&mut bench);
        assert!(bench.replica.has_left(Time(0)) && bench.take_flush().is_none() && claims(&bench));
    }
}
