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
    pub(super) slot: Slot,
    pub(super) sequence: Sequence,
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

/// Numbers the messages of a connection in the order in which they are queued, from 1 on, and knows the last request of each
/// slot: what is asked for each answer, and said of each message, costs next to nothing.
#[derive(Default)]
pub(super) struct Unsent {
    queued: u64,
    by_slot: Vec<u64>,
}

impl Unsent {
    /// The next message is queued.
    pub(super) fn queued(&mut self, header: &MessageHeader) {
        self.queued += 1;
        if Request::of(header).is_some() {
            let slot = usize::from(header.slot.0);
            if slot >= self.by_slot.len() {
                self.by_slot.resize(slot + 1, 0);
            }
            self.by_slot[slot] = self.queued;
        }
    }

    /// The request that a message answers, if one of its slot is among the last `waiting` messages: it is to be looked for only
    /// then.
    pub(super) fn suspect(&self, header: &MessageHeader, waiting: usize) -> Option<Request> {
        let last = *self.by_slot.get(usize::from(header.slot.0))?;
        if last + waiting as u64 > self.queued { Request::answered_by(header) } else { None }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::PoolId;

    fn message(kind: Kind, slot: u16, sequence: u64) -> MessageHeader {
        let header = MessageHeader::new(kind, PoolId::from_bytes([0; 16]));
        MessageHeader { slot: Slot(slot), sequence: Sequence(sequence), ..header }
    }

    #[test]
    fn an_answer_is_suspect_while_the_last_request_of_its_slot_waits() {
        let mut unsent = Unsent::default();
        let answer = message(Kind::IoReply, 3, 9);
        assert_eq!(unsent.suspect(&answer, 0), None);
        unsent.queued(&message(Kind::Write, 3, 9));
        assert_eq!(unsent.suspect(&answer, 1), Request::answered_by(&answer));
        assert_eq!(unsent.suspect(&answer, 0), None, "it is sent");
        // What has no slot, or another one, counts in the line and nowhere else.
        unsent.queued(&message(Kind::Ping, 3, 1));
        unsent.queued(&message(Kind::Read, 700, 10));
        assert_eq!(unsent.suspect(&answer, 2), None);
        assert!(unsent.suspect(&answer, 3).is_some());
        assert_eq!(unsent.suspect(&message(Kind::Pong, 3, 9), 3), None, "it answers no request of a slot");
        assert!(unsent.suspect(&message(Kind::IoReply, 700, 8), 1).is_some(), "to be looked for");
        assert_eq!(unsent.suspect(&message(Kind::IoReply, 701, 8), 3), None);
    }
}
