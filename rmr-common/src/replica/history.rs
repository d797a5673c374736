//! The member's place in the history of its pool: marks, and what is remembered of other members (`pool/position.rs`).

use super::{ConnectionId, DurableState, Notice, Replica, Waiter};
use crate::pool::{Attested, Epoch, Mark, Position, Sequence, View};
use crate::wire::{Kind, MessageHeader, Status, decode_attested};

/// What a member knows of its own history and of that of the others.
pub(super) struct History {
    /// The last mark of the attachment that made the view.
    pub(super) mark: Mark,
    pub(super) attested: Attested,
    /// The mark that the client waits for.
    pending: Option<(ConnectionId, MessageHeader)>,
    /// All writes up to this one were complete everywhere when the last mark was sent.
    marked: Sequence,
    /// All writes up to this one are covered by a mark that is durable on every active member.
    pub(super) settled: Sequence,
}

impl History {
    pub(super) const fn new(state: &DurableState) -> Self {
        let (mark, attested) = (state.mark, state.attested);
        Self { mark, attested, pending: None, marked: Sequence(0), settled: Sequence(0) }
    }

    /// A client attaches: the sequences of its writes say nothing about those before.
    pub(super) const fn attached(&mut self) {
        self.pending = None;
        self.marked = Sequence(0);
        self.settled = Sequence(0);
    }
}

impl Replica {
    /// How far this store has come.
    pub(super) const fn position(&self) -> Position {
        Position::new(self.epoch, &self.view, self.history.mark)
    }

    /// Takes over what came with a view that replaces `old`.
    pub(super) fn remember(&mut self, old: &View, attested: &Attested) {
        let known = std::mem::take(&mut self.history.attested);
        self.history.attested.merge(&self.view, &known, old);
        self.history.attested.merge(&self.view, attested, &self.view);
        let was_regressed = known.regressed.contains(self.member);
        // The coordinator says who is to be copied over; what was so before may have been copied since.
        self.history.attested.regressed = attested.regressed;
        if attested.regressed.contains(self.member) && !was_regressed {
            self.notice(Notice::Regressed);
        }
        if self.view.epoch > old.epoch {
            self.history.mark = Mark(0);
        }
    }

    /// The coordinator wants it on durable record how far the pool has come.
    pub(super) fn set_mark(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        let refuse = |this: &mut Self, status, text: String| {
            this.answer(connection, header, Kind::MarkReply, status, text.into_bytes());
        };
        if header.epoch < self.epoch {
            return refuse(self, Status::StaleEpoch, String::new());
        }
        if self.holder_connection() != Some(connection)
            || header.epoch != self.epoch
            || header.view != self.view.number
            || self.attach.is_some()
        {
            return refuse(self, Status::NotAttached, String::new());
        }
        let attested = match decode_attested(header.kind, body) {
            Ok(attested) => attested,
            Err(error) => return refuse(self, Status::BadRequest, error.to_string()),
        };
        let mark = Mark(header.sequence.0);
        if mark <= self.history.mark {
            let text = format!("mark {mark} does not follow mark {}", self.history.mark);
            return refuse(self, Status::BadRequest, text);
        }
        self.note_committed(header);
        self.learn(&attested);
        self.history.mark = mark;
        self.history.marked = header.watermark;
        self.history.pending = Some((connection, *header));
        self.persist_state(Waiter::Mark(self.epoch, mark));
        if mutant!(MarkBeforeDurable) {
            self.mark_durable(self.epoch, mark);
        }
    }

    /// Takes over what the coordinator remembers of the members of the present view.
    pub(super) fn learn(&mut self, attested: &Attested) {
        let view = &self.view;
        self.history.attested.merge(view, attested, view);
        self.history.attested.regressed = attested.regressed;
        if self.history.mark > Mark(0)
            && self.history.attested.settled(view.active(), view.epoch) >= self.history.mark
        {
            self.history.settled = self.history.settled.max(self.history.marked);
        }
    }

    pub(super) fn mark_durable(&mut self, epoch: Epoch, mark: Mark) {
        let is_its = |(_, h): &mut (ConnectionId, MessageHeader)| h.epoch == epoch && h.sequence.0 == mark.0;
        let Some((connection, header)) = self.history.pending.take_if(is_its) else { return };
        // One that is broken has closed the connection.
        if !self.broken && self.holder_connection() == Some(connection) {
            self.answer(connection, &header, Kind::MarkReply, Status::Ok, Vec::new());
        }
    }
}
