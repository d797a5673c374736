//! Requests that are not sent whole: nobody can have answered them.
//!
//! An answer ends a request, and whoever made it uses its memory for something else. So a peer that answers what it was not
//! sent would be sent that, or be given the key to it. An honest one never does; it is the end of the connection.

use crate::pool::{Sequence, Slot};
use crate::wire::{Kind, MessageHeader};

/// What such a peer is told.
pub(super) const ANSWERED: &str = "an answer to a request that was not sent yet";

/// A request whose memory is used when it is sent, or by the peer from then on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Request {
    slot: Slot,
    sequence: Sequence,
}

impl Request {
    /// The request that a message is, if it is one of these.
    pub(super) fn of(header: &MessageHeader) -> Option<Self> {
        let (Kind::Write | Kind::Read | Kind::Pull) = header.kind else { return None };
        Some(Self { slot: header.slot, sequence: header.sequence })
    }

    /// The request that a message answers, if it does.
    fn answered_by(header: &MessageHeader) -> Option<Self> {
        let (Kind::IoReply | Kind::PullReply) = header.kind else { return None };
        Some(Self { slot: header.slot, sequence: header.sequence })
    }
}

/// Counts the requests of a connection that are queued, by their slot.
#[derive(Default)]
pub(super) struct Unsent {
    by_slot: Vec<u32>,
}

impl Unsent {
    pub(super) fn queued(&mut self, request: Request) {
        let slot = usize::from(request.slot.0);
        if slot >= self.by_slot.len() {
            self.by_slot.resize(slot + 1, 0);
        }
        self.by_slot[slot] += 1;
    }

    /// Its last byte is on its way.
    pub(super) fn sent(&mut self, request: Request) {
        if let Some(count) = self.by_slot.get_mut(usize::from(request.slot.0)) {
            *count = count.saturating_sub(1);
        }
    }

    /// The request that a message would answer, if one of its slot is queued: it is to be looked for only then.
    pub(super) fn suspect(&self, header: &MessageHeader) -> Option<Request> {
        let count = self.by_slot.get(usize::from(header.slot.0))?;
        if *count > 0 { Request::answered_by(header) } else { None }
    }
}
