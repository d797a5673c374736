//! Requests in flight: one part per slot, writes in order of their sequence, and who waits for whom.
//!
//! Two writes that overlap may reach two legs in different order, and the legs would then differ for ever. So a write
//! that overlaps an earlier unfinished one waits for it here. A counting filter makes the usual case, no overlap,
//! cost a few array look-ups.

use super::Operation;
use crate::pool::{BLOCK_SIZE, MemberId, MemberSet, Sequence, Slot};
use crate::time::Time;

/// Index of an operation in its table.
pub(super) type OpIndex = u32;

const NONE: u16 = u16::MAX;
const FILTER_BUCKETS: usize = 1 << 14;
/// A write of more blocks than this would touch every bucket, and is counted apart.
const FILTER_MOST: u64 = 1 << 12;

/// What a part is doing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum PartState {
    /// The slot is free.
    Free,
    /// Waits for an overlapping earlier write.
    Blocked,
    /// Admitted, but not sent under the present view.
    Unsent,
    /// Sent to the legs in `pending`, or answered by all of them.
    Sent,
}

/// A piece of an operation that fits one message.
#[derive(Clone, Copy, Debug)]
pub(super) struct Part {
    pub(super) state: PartState,
    pub(super) operation: Operation,
    pub(super) op: OpIndex,
    /// Where the part's data starts in the operation's.
    pub(super) op_offset: u64,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) sequence: Sequence,
    /// Its place in the line. A write that is sent with other data gets another sequence and keeps its place.
    pub(super) order: Sequence,
    /// Its data goes by way of a copy of the driver's.
    pub(super) bounce: bool,
    /// Some leg got other data than the digest says: the write is repeated on all, once all have answered.
    pub(super) repeat: bool,
    /// Memory of the write could not be read. It fails, once all legs have the same data in its range.
    pub(super) fault: bool,
    /// Legs that were sent the part and have not answered.
    pub(super) pending: MemberSet,
    /// Legs that did not carry it out; a write completes when the committed view has them Out, and a read is not sent to them again
    /// while they are Clean.
    pub(super) failed: MemberSet,
    /// Those of them whose disk failed the read.
    pub(super) erred: MemberSet,
    /// Set when a view change or a new attachment found the write in flight: reads of its range wait for it, lest a
    /// read from a new home leg go back in time.
    pub(super) barrier: bool,
    /// Whether the part stands in line: it waits for overlapping parts before it in the line, and those after it wait
    /// for it. Writes do, and reads that are sent again: the leg they go to may be another one, so nothing that
    /// overlaps may be in flight meanwhile.
    pub(super) in_line: bool,
    pub(super) sent_at: Time,
    previous: u16,
    next: u16,
    /// The write that a blocked part waits for.
    blocker: u16,
    first_waiter: u16,
    next_waiter: u16,
}

impl Part {
    const FREE: Self = Self {
        state: PartState::Free,
        operation: Operation::Flush,
        op: 0,
        op_offset: 0,
        offset: 0,
        length: 0,
        sequence: Sequence(0),
        order: Sequence(0),
        bounce: false,
        repeat: false,
        fault: false,
        pending: MemberSet::EMPTY,
        failed: MemberSet::EMPTY,
        erred: MemberSet::EMPTY,
        barrier: false,
        in_line: false,
        sent_at: Time(0),
        previous: NONE,
        next: NONE,
        blocker: NONE,
        first_waiter: NONE,
        next_waiter: NONE,
    };

    const fn end(&self) -> u64 {
        self.offset + self.length as u64
    }

    const fn overlaps(&self, offset: u64, end: u64) -> bool {
        self.offset < end && offset < self.end()
    }
}

/// The slot table of a client.
pub(super) struct Parts {
    parts: Vec<Part>,
    free: Vec<u16>,
    /// The line: writes, and reads that are sent again, in order of their sequence.
    first: u16,
    last: u16,
    filter: Box<[u16; FILTER_BUCKETS]>,
    large: u32,
    barriers: u32,
    /// The lowest sequence of a write that was given up after it was sent: some members may have it and others not.
    unsettled: Option<Sequence>,
    /// Ranges (offset and length in bytes) of the writes among them whose memory could not be read. Members that completed such a
    /// write have it under one sequence, with different data. At most one for each slot.
    unlike: Vec<(u64, u64)>,
}

impl Parts {
    pub(super) fn new(slots: u16) -> Self {
        Self {
            parts: vec![Part::FREE; slots.into()],
            free: (0..slots).rev().collect(),
            first: NONE,
            last: NONE,
            filter: Box::new([0; FILTER_BUCKETS]),
            large: 0,
            barriers: 0,
            unsettled: None,
            unlike: Vec::new(),
        }
    }

    pub(super) fn get(&self, slot: Slot) -> Option<&Part> {
        self.parts.get(usize::from(slot.0)).filter(|p| p.state != PartState::Free)
    }

    pub(super) fn get_mut(&mut self, slot: Slot) -> Option<&mut Part> {
        self.parts.get_mut(usize::from(slot.0)).filter(|p| p.state != PartState::Free)
    }

    pub(super) fn has_free(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether any write is with the legs, or was answered and waits for a view.
    pub(super) fn has_sent_write(&self) -> bool {
        self.parts.iter().any(|p| p.state == PartState::Sent && p.operation.is_write())
    }

    /// Whether an answer of this leg is awaited.
    pub(super) fn is_awaited_from(&self, member: MemberId) -> bool {
        self.parts.iter().any(|p| p.state == PartState::Sent && p.pending.contains(member))
    }

    pub(super) fn in_flight(&self) -> usize {
        self.parts.len() - self.free.len()
    }

    /// Every used slot.
    pub(super) fn slots(&self) -> impl Iterator<Item = (Slot, &Part)> {
        self.parts.iter().zip(0u16..).filter(|(p, _)| p.state != PartState::Free).map(|(p, i)| (Slot(i), p))
    }

    /// The sequence up to which every write is complete, given the last one that was assigned.
    pub(super) fn watermark(&self, last_assigned: Sequence) -> Sequence {
        let oldest = self.parts.get(usize::from(self.first)).map(|part| part.order);
        let unfinished = oldest.into_iter().chain(self.unsettled).min();
        let unfinished = unfinished.filter(|_| !mutant!(WatermarkTooHigh));
        unfinished.map_or(last_assigned, |sequence| Sequence(sequence.0 - 1))
    }

    /// Frees the slot of a part that is given up. The watermark never passes a write that members may have.
    pub(super) fn give_up(&mut self, slot: Slot) {
        let part = self.parts[usize::from(slot.0)];
        if part.barrier && !mutant!(UnsettledForgotten) {
            let lowest = self.unsettled.map_or(part.order, |s| s.min(part.order));
            self.unsettled = Some(lowest);
            if part.fault && part.operation.is_write() {
                self.unlike.push((part.offset, part.length.into()));
            }
        }
        self.release(slot, |_| {});
    }

    /// Members were made to agree, also in what was given up before.
    pub(super) fn settled(&mut self) {
        self.unsettled = None;
        self.unlike.clear();
    }

    /// Ranges, as (offset, length) in bytes, in which members may differ although their slot tables agree.
    pub(super) fn unlike(&self) -> &[(u64, u64)] {
        &self.unlike
    }

    /// Takes a free slot for a new part, which is then `Unsent`, or `Blocked` by an overlapping earlier write.
    pub(super) fn admit(
        &mut self,
        operation: Operation,
        op: OpIndex,
        op_offset: u64,
        (offset, length): (u64, u32),
        sequence: Sequence,
    ) -> Option<Slot> {
        let index = self.free.pop()?;
        let part = Part {
            state: PartState::Unsent,
            operation,
            op,
            op_offset,
            offset,
            length,
            sequence,
            order: sequence,
            in_line: operation.is_write(),
            ..Part::FREE
        };
        self.parts[usize::from(index)] = part;
        let blocker = self.blocker(index);
        if operation.is_write() {
            self.link(index);
        }
        self.block_on(index, blocker);
        Some(Slot(index))
    }

    /// Takes a slot for a hold on a range. It stands in line like a write and is never sent: once it is `Unsent`, no write
    /// to the range is under way, and none begins until it is released.
    pub(super) fn admit_hold(&mut self, (offset, length): (u64, u32), sequence: Sequence) -> Option<Slot> {
        let index = self.free.pop()?;
        let operation = Operation::Read;
        let part = Part {
            operation,
            op: OpIndex::MAX,
            offset,
            length,
            sequence,
            order: sequence,
            in_line: true,
            ..Part::FREE
        };
        self.parts[usize::from(index)] = part;
        let blocker = self.blocker(index);
        self.link(index);
        self.block_on(index, blocker);
        Some(Slot(index))
    }

    /// Whether a part waits for this one.
    pub(super) fn is_waited_for(&self, slot: Slot) -> bool {
        self.get(slot).is_some_and(|part| part.first_waiter != NONE)
    }

    /// Puts a read that is to be sent again at the end of the line, where it is then `Unsent` or `Blocked`.
    pub(super) fn requeue(&mut self, slot: Slot, sequence: Sequence) {
        let index = slot.0;
        let part = &mut self.parts[usize::from(index)];
        part.pending = MemberSet::EMPTY;
        if part.in_line {
            part.state = PartState::Unsent;
            return;
        }
        part.sequence = sequence;
        part.order = sequence;
        part.in_line = true;
        let blocker = self.blocker(index);
        self.link(index);
        self.block_on(index, blocker);
    }

    /// Frees a slot and calls `ready` for each part that waited for it and may be sent now.
    pub(super) fn release(&mut self, slot: Slot, mut ready: impl FnMut(Slot)) {
        let index = slot.0;
        self.stop_waiting(index);
        let part = self.parts[usize::from(index)];
        if part.in_line {
            self.unlink(index);
            self.barriers -= u32::from(part.barrier);
        }
        let mut waiter = part.first_waiter;
        self.parts[usize::from(index)] = Part::FREE;
        self.free.push(index);
        while waiter != NONE {
            let next = self.parts[usize::from(waiter)].next_waiter;
            self.parts[usize::from(waiter)].next_waiter = NONE;
            let blocker = self.blocker(waiter);
            self.block_on(waiter, blocker);
            if blocker.is_none() {
                ready(Slot(waiter));
            }
            waiter = next;
        }
    }

    /// Marks every write that is still awaited: see [`Part::barrier`].
    pub(super) fn raise_barriers(&mut self) {
        for part in &mut self.parts {
            if part.state == PartState::Sent && part.operation.is_write() && !part.barrier {
                part.barrier = true;
                self.barriers += 1;
            }
        }
    }

    /// Makes a write that all legs have answered `Unsent` again, to be sent from a copy under another sequence: some have carried
    /// it out with other data, and nobody may take the two for the same.
    pub(super) fn repeat(&mut self, slot: Slot, sequence: Sequence) {
        let part = &mut self.parts[usize::from(slot.0)];
        part.sequence = sequence;
        part.repeat = false;
        part.bounce = true;
        part.failed = MemberSet::EMPTY;
        part.state = PartState::Unsent;
        if !std::mem::replace(&mut part.barrier, true) {
            self.barriers += 1;
        }
    }

    /// Takes `member` out of every part that waits for it, and notes that it failed.
    pub(super) fn fail_member(&mut self, member: MemberId) {
        for part in &mut self.parts {
            if part.state != PartState::Free && part.pending.remove(member) {
                part.failed.insert(member);
            }
        }
    }

    /// Makes every part that was sent `Unsent` again, for an attachment that starts anew.
    pub(super) fn unsend_all(&mut self) {
        self.raise_barriers();
        for part in self.parts.iter_mut().filter(|p| p.state == PartState::Sent) {
            part.state = PartState::Unsent;
            part.pending = MemberSet::EMPTY;
            part.failed = MemberSet::EMPTY;
            part.repeat = false;
        }
    }

    /// Takes a part out of the list of those that wait for its blocker.
    fn stop_waiting(&mut self, index: u16) {
        let part = &mut self.parts[usize::from(index)];
        let blocker = std::mem::replace(&mut part.blocker, NONE);
        let next = std::mem::replace(&mut part.next_waiter, NONE);
        if blocker == NONE {
            return;
        }
        if self.parts[usize::from(blocker)].first_waiter == index {
            self.parts[usize::from(blocker)].first_waiter = next;
            return;
        }
        let mut at = self.parts[usize::from(blocker)].first_waiter;
        while at != NONE {
            let waiter = &mut self.parts[usize::from(at)];
            if waiter.next_waiter == index {
                waiter.next_waiter = next;
                return;
            }
            at = waiter.next_waiter;
        }
    }

    fn block_on(&mut self, index: u16, blocker: Option<u16>) {
        let part = &mut self.parts[usize::from(index)];
        part.blocker = blocker.unwrap_or(NONE);
        let Some(blocker) = blocker else {
            part.state = PartState::Unsent;
            return;
        };
        part.state = PartState::Blocked;
        let first = &mut self.parts[usize::from(blocker)].first_waiter;
        let rest = std::mem::replace(first, index);
        self.parts[usize::from(index)].next_waiter = rest;
    }

    /// The latest earlier write that this part must wait for.
    fn blocker(&self, index: u16) -> Option<u16> {
        let part = &self.parts[usize::from(index)];
        if part.in_line {
            if !self.may_overlap(part) || mutant!(OverlapsNotSerialised) {
                return None;
            }
            self.latest(part, |_| true)
        } else if self.barriers > 0 && !mutant!(ReadPassesBarrier) {
            self.latest(part, |write| write.barrier)
        } else {
            None
        }
    }

    fn latest(&self, part: &Part, matters: impl Fn(&Part) -> bool) -> Option<u16> {
        let mut at = self.last;
        while at != NONE {
            let other = &self.parts[usize::from(at)];
            if other.order < part.order && matters(other) && other.overlaps(part.offset, part.end()) {
                return Some(at);
            }
            at = other.previous;
        }
        None
    }

    fn link(&mut self, index: u16) {
        let last = std::mem::replace(&mut self.last, index);
        self.parts[usize::from(index)].previous = last;
        match last {
            NONE => self.first = index,
            last => self.parts[usize::from(last)].next = index,
        }
        let part = self.parts[usize::from(index)];
        if block_count(&part) > FILTER_MOST {
            self.large += 1;
        } else {
            buckets(&part).for_each(|b| self.filter[b] += 1);
        }
    }

    fn unlink(&mut self, index: u16) {
        let part = self.parts[usize::from(index)];
        match part.previous {
            NONE => self.first = part.next,
            previous => self.parts[usize::from(previous)].next = part.next,
        }
        match part.next {
            NONE => self.last = part.previous,
            next => self.parts[usize::from(next)].previous = part.previous,
        }
        if block_count(&part) > FILTER_MOST {
            self.large -= 1;
        } else {
            buckets(&part).for_each(|b| self.filter[b] -= 1);
        }
    }

    /// False only when no other linked write overlaps the part. A part that is linked itself counts once.
    fn may_overlap(&self, part: &Part) -> bool {
        let linked = u16::from(part.previous != NONE || part.next != NONE || self.is_only(part));
        if self.large > 0 || block_count(part) > FILTER_MOST {
            return self.first != NONE;
        }
        buckets(part).any(|b| self.filter[b] > linked)
    }

    fn is_only(&self, part: &Part) -> bool {
        self.parts.get(usize::from(self.first)).is_some_and(|p| p.order == part.order)
    }
}

fn block_count(part: &Part) -> u64 {
    part.end().div_ceil(BLOCK_SIZE) - part.offset / BLOCK_SIZE
}

fn buckets(part: &Part) -> impl Iterator<Item = usize> + use<> {
    let range = part.offset / BLOCK_SIZE..part.end().div_ceil(BLOCK_SIZE);
    range.map(|block| usize::try_from(block).unwrap_or(0) % FILTER_BUCKETS)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn admit(parts: &mut Parts, sequence: u64, offset: u64, length: u32) -> Slot {
        parts.admit(Operation::Write, 0, 0, (offset, length), Sequence(sequence)).unwrap()
    }

    #[test]
    fn overlapping_writes_go_one_after_the_other() {
        let mut parts = Parts::new(8);
        let a = admit(&mut parts, 1, 0, 4096);
        let b = admit(&mut parts, 2, 8192, 4096);
        let c = admit(&mut parts, 3, 0, 16384);
        let state = |parts: &Parts, slot| parts.get(slot).unwrap().state;
        assert_eq!(state(&parts, a), PartState::Unsent);
        assert_eq!(state(&parts, b), PartState::Unsent);
        assert_eq!(state(&parts, c), PartState::Blocked);
        let mut ready = Vec::new();
        parts.release(b, |s| ready.push(s));
        assert!(ready.is_empty(), "it waits for the other one too");
        parts.release(a, |s| ready.push(s));
        assert_eq!(ready, vec![c]);
    }

    #[test]
    fn writes_to_different_sectors_of_one_block_do_not_wait() {
        let mut parts = Parts::new(8);
        admit(&mut parts, 1, 0, 512);
        let b = admit(&mut parts, 2, 512, 512);
        assert_eq!(parts.get(b).unwrap().state, PartState::Unsent);
    }

    #[test]
    fn the_watermark_stands_below_the_oldest_unfinished_write() {
        let mut parts = Parts::new(8);
        assert_eq!(parts.watermark(Sequence(0)), Sequence(0));
        let a = admit(&mut parts, 1, 0, 512);
        let b = admit(&mut parts, 2, 4096, 512);
        parts.release(b, |_| {});
        assert_eq!(parts.watermark(Sequence(2)), Sequence(0));
        parts.release(a, |_| {});
        assert_eq!(parts.watermark(Sequence(2)), Sequence(2));
    }

    #[test]
    fn a_read_waits_only_for_a_write_that_a_view_change_caught() {
        let mut parts = Parts::new(8);
        let write = admit(&mut parts, 1, 0, 4096);
        let read = |parts: &mut Parts, seq| {
            let slot = parts.admit(Operation::Read, 0, 0, (0, 4096), Sequence(seq)).unwrap();
            (slot, parts.get(slot).unwrap().state)
        };
        assert_eq!(read(&mut parts, 2).1, PartState::Unsent);
        parts.get_mut(write).unwrap().state = PartState::Sent;
        parts.raise_barriers();
        let (slot, state) = read(&mut parts, 3);
        assert_eq!(state, PartState::Blocked);
        let mut ready = Vec::new();
        parts.release(write, |s| ready.push(s));
        assert_eq!(ready, vec![slot]);
    }

    #[test]
    fn a_hold_waits_for_writes_under_way_and_holds_back_those_that_come_after() {
        let mut parts = Parts::new(8);
        let before = admit(&mut parts, 1, 4096, 4096);
        let hold = parts.admit_hold((0, 16384), Sequence(2)).unwrap();
        let state = |parts: &Parts, slot| parts.get(slot).unwrap().state;
        assert_eq!(state(&parts, hold), PartState::Blocked);
        assert!(!parts.is_waited_for(hold));
        let after = admit(&mut parts, 3, 8192, 4096);
        let beside = admit(&mut parts, 4, 16384, 4096);
        assert_eq!((state(&parts, after), state(&parts, beside)), (PartState::Blocked, PartState::Unsent));
        assert!(parts.is_waited_for(hold));
        let mut ready = Vec::new();
        parts.release(before, |s| ready.push(s));
        assert_eq!(ready, vec![hold]);
        parts.release(hold, |s| ready.push(s));
        assert_eq!(ready, vec![hold, after]);
    }

    #[test]
    fn a_full_table_refuses() {
        let mut parts = Parts::new(1);
        admit(&mut parts, 1, 0, 512);
        assert!(!parts.has_free());
        assert_eq!(parts.admit(Operation::Read, 0, 0, (0, 512), Sequence(2)), None);
    }

    #[test]
    fn a_read_that_is_sent_again_stands_in_line_like_a_write() {
        let mut parts = Parts::new(8);
        let write = admit(&mut parts, 1, 0, 4096);
        let read = parts.admit(Operation::Read, 0, 0, (0, 8192), Sequence(2)).unwrap();
        let state = |parts: &Parts, slot| parts.get(slot).unwrap().state;
        assert_eq!(state(&parts, read), PartState::Unsent);
        parts.requeue(read, Sequence(3));
        assert_eq!(state(&parts, read), PartState::Blocked);
        let later = admit(&mut parts, 4, 4096, 4096);
        let mut ready = Vec::new();
        parts.release(write, |s| ready.push(s));
        assert_eq!((ready, state(&parts, later)), (vec![read], PartState::Blocked));
        let mut ready = Vec::new();
        parts.release(read, |s| ready.push(s));
        assert_eq!(ready, vec![later]);
    }

    #[test]
    fn a_write_of_an_attachment_that_ended_is_a_barrier_for_reads() {
        let mut parts = Parts::new(8);
        let write = admit(&mut parts, 1, 0, 4096);
        parts.get_mut(write).unwrap().state = PartState::Sent;
        parts.unsend_all();
        let read = parts.admit(Operation::Read, 0, 0, (0, 512), Sequence(2)).unwrap();
        assert_eq!(parts.get(read).unwrap().state, PartState::Blocked);
    }

    #[test]
    fn the_watermark_never_passes_a_write_that_was_given_up_after_it_was_sent() {
        let mut parts = Parts::new(8);
        let a = admit(&mut parts, 1, 0, 4096);
        let b = admit(&mut parts, 2, 4096, 4096);
        parts.get_mut(b).unwrap().state = PartState::Sent;
        parts.unsend_all();
        parts.give_up(a);
        assert_eq!(parts.watermark(Sequence(2)), Sequence(1), "nobody has it");
        parts.give_up(b);
        assert_eq!(parts.watermark(Sequence(9)), Sequence(1));
    }

    #[test]
    fn a_part_that_is_given_up_while_it_waits_is_forgotten_by_the_one_it_waits_for() {
        let mut parts = Parts::new(8);
        let a = admit(&mut parts, 1, 0, 4096);
        let waiting: Vec<_> =
            (2..5).map(|i| parts.admit(Operation::Write, 0, 0, (0, 512), Sequence(i))).collect();
        let waiting: Vec<_> = waiting.into_iter().flatten().collect();
        parts.release(waiting[1], |_| {});
        let mut ready = Vec::new();
        parts.release(a, |s| ready.push(s));
        assert_eq!(ready, vec![waiting[0]]);
        parts.release(waiting[0], |s| ready.push(s));
        assert_eq!(ready, vec![waiting[0], waiting[2]]);
        parts.release(waiting[2], |_| {});
        assert_eq!((parts.in_flight(), parts.slots().count()), (0, 0));
    }

    proptest! {
        /// The oracle: a write may be under way only if no earlier unfinished write overlaps it, and every write is
        /// under way in the end.
        #[test]
        fn no_two_overlapping_writes_are_ever_under_way(
            steps in proptest::collection::vec((0u64..64, 1u32..24, any::<bool>(), any::<prop::sample::Index>()), 1..200)
        ) {
            let mut parts = Parts::new(32);
            let mut live: Vec<(Slot, u64, u64, u64)> = Vec::new();
            let mut sequence = 0;
            let check = |parts: &Parts, live: &[(Slot, u64, u64, u64)]| {
                for &(slot, seq, from, to) in live {
                    let free = !live.iter().any(|&(_, s, f, t)| s < seq && f < to && from < t);
                    let state = parts.get(slot).unwrap().state;
                    prop_assert_eq!(state == PartState::Unsent, free);
                }
                Ok(())
            };
            for (start, sectors, finish, pick) in steps {
                if finish || !parts.has_free() {
                    let running: Vec<_> =
                        live.iter().filter(|l| parts.get(l.0).unwrap().state == PartState::Unsent).copied().collect();
                    if running.is_empty() {
                        prop_assert!(live.is_empty(), "something must always be under way");
                        continue;
                    }
                    let done = running[pick.index(running.len())];
                    parts.release(done.0, |_| {});
                    live.retain(|l| l.0 != done.0);
                } else {
                    sequence += 1;
                    let (offset, length) = (start * 512, sectors * 512);
                    let slot = admit(&mut parts, sequence, offset, length);
                    live.push((slot, sequence, offset, offset + u64::from(length)));
                }
                check(&parts, &live)?;
            }
        }
    }
}
