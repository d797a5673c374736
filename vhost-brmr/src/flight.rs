//! The table of requests in flight: what must be known of a request until it completed. Slots are allocated at start;
//! a slot keeps its guest memory mapped, also when the front end that sent the request is gone.

use std::sync::Arc;

use rmr_common::buffer::Segment;
use rmr_common::client::MAX_QUEUED;

use crate::disk::Token;
use crate::memory::{self, GuestMemory};
use crate::request::MAX_RANGES;

/// Bits of a token that hold the slot; above them part, then generation.
const SLOT_BITS: u32 = 24;
/// Bits of a token that hold the part.
const PART_BITS: u32 = 8;
/// A slot keeps room for so many segments of a read, which is what drivers are advised to send at most; more are kept for as
/// long as the request is in flight.
const KEPT_SEGMENTS: usize = 128;

/// Most parts that the disk has at once; the pool's client fails a request beyond that. More queues of full length than 64, or
/// requests of many ranges, would get there.
const MAX_PARTS: usize = MAX_QUEUED;

/// Where a request came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Which ring.
    pub queue: u16,
    /// Head of its chain.
    pub head: u16,
    /// Which start of the ring.
    pub incarnation: u32,
}

/// A request that completed, with all of its parts.
#[derive(Debug)]
pub struct Finished {
    /// Where it came from.
    pub origin: Origin,
    /// Where its status goes.
    pub status: Segment,
    /// Bytes that were written to the guest before the status if all went well.
    pub length: u32,
    /// Some part failed.
    pub failed: bool,
    /// Keeps the memory of the status mapped until it was written.
    pub memory: Arc<GuestMemory>,
}

/// What a completion means for its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// Other parts are still in flight.
    Waiting,
    /// All parts are written; a flush must follow before it is done.
    Written(Index),
    /// Done. With a flush, this is the last of a list that [`Flight::release`] walks.
    Done(Index),
    /// No such request: the disk answered twice.
    Unknown,
}

/// A slot in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Index(u32);

#[derive(Debug)]
struct Slot {
    generation: u32,
    parts_left: u16,
    flush_behind: bool,
    failed: bool,
    /// The next request that waits for the same flush.
    next: Option<Index>,
    /// Guest memory that the disk writes to.
    written: Vec<Segment>,
    request: Option<Held>,
}

#[derive(Debug)]
struct Held {
    origin: Origin,
    status: Segment,
    length: u32,
    memory: Arc<GuestMemory>,
}

/// The table.
#[derive(Debug)]
pub struct Flight {
    slots: Vec<Slot>,
    free: Vec<Index>,
    capacity: usize,
    /// Parts that the disk has.
    parts: usize,
}

impl Flight {
    /// A table of `capacity` slots. Their memory is reserved here, and touched when first used.
    #[must_use]
    pub fn new(capacity: usize) -> Self {
        let capacity = capacity.min(1 << SLOT_BITS);
        Self { slots: Vec::with_capacity(capacity), free: Vec::with_capacity(capacity), capacity, parts: 0 }
    }

    /// How many requests are in flight.
    #[must_use]
    pub fn len(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    /// Nothing is in flight.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All slots are taken, or the disk may have no place for the parts of another request.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.len() == self.capacity || self.parts + MAX_RANGES > MAX_PARTS
    }

    /// Enters a request of `parts` parts, in which the disk writes to `written`; `None` if the table is full.
    pub fn enter(
        &mut self,
        origin: Origin,
        status: Segment,
        written: &[Segment],
        parts: u16,
        flush_behind: bool,
        memory: &Arc<GuestMemory>,
    ) -> Option<Index> {
        let length: u64 = written.iter().map(|segment| segment.length() as u64).sum();
        // With the status it fits the word of the used element, as all of a chain does.
        let length = u32::try_from(length).unwrap_or(u32::MAX - 1);
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < self.capacity => {
                let index = u32::try_from(self.slots.len()).ok()?;
                self.slots.push(Slot {
                    generation: 0,
                    parts_left: 0,
                    flush_behind: false,
                    failed: false,
                    next: None,
                    written: Vec::new(),
                    request: None,
                });
                Index(index)
            }
            None => return None,
        };
        self.parts += usize::from(parts);
        let slot = &mut self.slots[index.0 as usize];
        slot.parts_left = parts;
        slot.flush_behind = flush_behind;
        slot.failed = false;
        slot.next = None;
        slot.written.extend_from_slice(written);
        slot.request = Some(Held { origin, status, length, memory: Arc::clone(memory) });
        Some(index)
    }

    /// The token of one part of a request.
    #[must_use]
    pub fn token(&self, index: Index, part: u8) -> Token {
        let generation = u64::from(self.slots[index.0 as usize].generation);
        Token(generation << (SLOT_BITS + PART_BITS) | u64::from(part) << SLOT_BITS | u64::from(index.0))
    }

    /// One part completed.
    pub fn complete(&mut self, token: Token, failed: bool) -> Progress {
        let at = token.0 & ((1 << SLOT_BITS) - 1);
        let generation = token.0 >> (SLOT_BITS + PART_BITS);
        let Ok(at) = u32::try_from(at) else { return Progress::Unknown };
        let Some(slot) = self.slots.get_mut(at as usize) else { return Progress::Unknown };
        if u64::from(slot.generation) != generation || slot.request.is_none() || slot.parts_left == 0 {
            return Progress::Unknown;
        }
        slot.failed |= failed;
        slot.parts_left -= 1;
        self.parts = self.parts.saturating_sub(1);
        match slot.parts_left {
            0 if slot.flush_behind && !slot.failed => {
                slot.flush_behind = false;
                Progress::Written(Index(at))
            }
            0 => Progress::Done(Index(at)),
            _ => Progress::Waiting,
        }
    }

    /// Makes a written request the head of a list that shares one flush. The flush is a part of that head.
    pub fn share_flush(&mut self, index: Index, rest: Option<Index>) {
        let slot = &mut self.slots[index.0 as usize];
        slot.next = rest;
        slot.parts_left = 1;
        if rest.is_none() {
            // The one flush of the whole list.
            self.parts += 1;
        }
        if let Some(rest) = rest {
            self.slots[rest.0 as usize].parts_left = 0;
        }
    }

    /// Releases a request that is done; with it the next one of its list, which shares its fate.
    ///
    /// What the disk wrote to the guest is marked in the dirty log here. Every request passes this place once, when nothing
    /// touches its memory any more: whichever transport brought the data, also when the request failed, as some of its data may
    /// have come, and when its ring was stopped meanwhile.
    pub fn release(&mut self, index: Index) -> Option<(Finished, Option<Index>)> {
        let slot = self.slots.get_mut(index.0 as usize)?;
        let Held { origin, status, length, memory } = slot.request.take()?;
        slot.generation = slot.generation.wrapping_add(1);
        memory::mark_written(&memory, &slot.written);
        slot.written.clear();
        slot.written.shrink_to(KEPT_SEGMENTS);
        let (failed, next) = (slot.failed, slot.next.take());
        if let Some(next) = next {
            self.slots[next.0 as usize].failed = failed;
        }
        self.free.push(index);
        Some((Finished { origin, status, length, failed, memory }, next))
    }
}

#[cfg(test)]
mod tests;
