//! Room for a pool that grows: asked for by the coordinator ahead of the view, and made sure of before a view is adopted.

use super::{ConnectionId, Output, Replica};
use crate::pool::BLOCK_SIZE;
use crate::wire::{Kind, MessageHeader, Status};

/// Most questions for room that wait. A coordinator asks once for each change of the size.
const MAX_ASKED: usize = 16;

/// How large a pool the store can hold.
pub(super) struct Room {
    /// Bytes that there is room for; from the pool's size on, they read as zeroes.
    bytes: u64,
    /// What the node makes room for at present.
    making: Option<u64>,
    /// The pool became smaller while room was made. The node leaves the part in between as it is, so the work does not count.
    is_outdated: bool,
    /// Who waits for it.
    asked: Vec<(ConnectionId, MessageHeader)>,
}

impl Room {
    pub(super) const fn new(bytes: u64) -> Self {
        Self { bytes, making: None, is_outdated: false, asked: Vec::new() }
    }

    pub(super) const fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many questions for room wait.
    #[cfg(test)]
    pub(super) fn asked(&self) -> usize {
        self.asked.len()
    }

    /// The pool has this size from now on. When that is smaller than before, what lies beyond is nobody's any more, and
    /// has to read as zeroes before it is used again.
    pub(super) const fn fit(&mut self, old: u64, size: u64) {
        if size < old || size > self.bytes {
            self.bytes = size;
        }
        self.is_outdated |= size < old && self.making.is_some();
    }
}

impl Replica {
    /// The coordinator wants to know whether the member can hold a pool of this size.
    pub(super) fn make_room(&mut self, connection: ConnectionId, header: &MessageHeader) {
        if self.holder_connection() != Some(connection) || header.epoch != self.epoch || self.attach.is_some()
        {
            return self.answer(connection, header, Kind::GrowReply, Status::NotAttached, Vec::new());
        }
        if header.offset <= self.room.bytes {
            return self.answer(connection, header, Kind::GrowReply, Status::Ok, Vec::new());
        }
        if !header.offset.is_multiple_of(BLOCK_SIZE) {
            let text = format!("{} bytes: expected a multiple of {BLOCK_SIZE}", header.offset).into_bytes();
            return self.answer(connection, header, Kind::GrowReply, Status::BadRequest, text);
        }
        if header.offset > self.config.max_size {
            let text = self.too_large(header.offset).into_bytes();
            return self.answer(connection, header, Kind::GrowReply, Status::NoSpace, text);
        }
        if self.room.asked.len() >= MAX_ASKED {
            let text = b"too many questions for room wait already".to_vec();
            return self.answer(connection, header, Kind::GrowReply, Status::Limit, text);
        }
        self.room.asked.push((connection, *header));
        self.pump_room();
    }

    /// The words for a pool that the store can never hold.
    pub(super) fn too_large(&self, size: u64) -> String {
        let most = self.config.max_size;
        format!(
            "there is no room for {size} bytes: the store was made for a pool of at most {most} (--max-size)"
        )
    }

    /// Makes room for the largest size that anybody waits for.
    pub(super) fn pump_room(&mut self) {
        let by_view = self.set_view.iter().filter(|p| p.needs_room).map(|p| p.spec.size);
        let wanted = self.room.asked.iter().map(|(_, h)| h.offset).chain(by_view).max();
        let Some(to) = wanted.filter(|to| *to > self.room.bytes && self.room.making.is_none()) else {
            return;
        };
        self.room.making = Some(to);
        self.outputs.push_back(Output::Grow { from: self.room.bytes, to });
    }

    /// The node has made room, or cannot.
    pub(super) fn grown(&mut self, result: Result<(), &str>) {
        let Some(made) = self.room.making.take() else { return };
        let is_outdated = std::mem::take(&mut self.room.is_outdated);
        if result.is_ok() && !is_outdated {
            self.room.bytes = self.room.bytes.max(made);
        }
        for (connection, header) in std::mem::take(&mut self.room.asked) {
            if header.offset <= self.room.bytes {
                self.answer(connection, &header, Kind::GrowReply, Status::Ok, Vec::new());
            } else if let (Err(text), true) = (result, header.offset <= made) {
                let text = text.as_bytes().to_vec();
                self.answer(connection, &header, Kind::GrowReply, Status::NoSpace, text);
            } else {
                self.room.asked.push((connection, header));
            }
        }
        match self.set_view.as_ref().filter(|p| p.needs_room).map(|p| p.spec.size) {
            Some(size) if size <= self.room.bytes => self.begin_view(),
            // One that needs more room waits for the next answer, as does any when this one does not count.
            Some(size) if size <= made => {
                if let Err(reason) = result {
                    self.refuse_room(reason);
                }
            }
            Some(_) | None => {}
        }
        self.pump_room();
    }
}
