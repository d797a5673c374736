//! Looking again at blocks that differed: with writes to them held back, at most for the time that is allowed.
//!
//! A hold stands in the line of writes: it begins when the writes to its range that were under way are complete, and those
//! that come after it wait. Then every Clean member is asked for its digests, straight: these are few, and one round trip
//! is the shortest hold. If a write has to wait for longer than allowed, the hold is given up and tried again later.

use std::time::Duration;

use super::findings::Comparison;
use super::{Client, Verify};
use crate::client::Payload;
use crate::client::parts::PartState;
use crate::pool::{BLOCK_SIZE, Block, Cause, MemberId, MemberSet, Slot};
use crate::time::Time;
use crate::wire::{DigestReply, Kind, MessageHeader, Status};

/// So often a range is held before it is given up as unsettled.
const MAX_TRIES: u32 = 12;
/// Pause before a range is held again; it doubles each time, up to a limit.
const FIRST_PAUSE: Duration = Duration::from_millis(20);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// Blocks between two that differ, which are looked at with them rather than apart.
const JOIN: u32 = 4;

/// Blocks that are to be looked at again.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Suspect {
    pub(super) offset: u64,
    pub(super) blocks: u32,
    tries: u32,
    not_before: Time,
    /// How often they were repaired.
    pub(super) repairs: u32,
}

impl Suspect {
    pub(super) const fn new(offset: u64, blocks: u32, repairs: u32) -> Self {
        Self { offset, blocks, tries: 0, not_before: Time(0), repairs }
    }

    pub(super) const fn is_repaired(&self) -> bool {
        self.repairs > 0
    }

    pub(super) const fn length(&self) -> u64 {
        self.blocks as u64 * BLOCK_SIZE
    }
}

/// A range that is being looked at.
pub(super) struct Hold {
    pub(super) suspect: Suspect,
    slot: Slot,
    number: u64,
    since: Time,
    /// When it is given up if a write waits for it.
    pub(super) limit: Time,
    /// Members that are asked and have not answered; `None` while writes are under way.
    pending: Option<MemberSet>,
    found: Vec<(MemberId, Option<Vec<u64>>)>,
}

/// The runs of set bits among the blocks of a piece, near ones joined.
pub(super) fn suspects(offset: u64, blocks: u64, bits: u64) -> Vec<Suspect> {
    let mut runs: Vec<(u32, u32)> = Vec::new();
    for bit in (0..u32::try_from(blocks.min(64)).unwrap_or(64)).filter(|bit| bits & (1 << bit) != 0) {
        match runs.last_mut() {
            Some((_, last)) if bit - *last <= JOIN => *last = bit,
            _ => runs.push((bit, bit)),
        }
    }
    let suspect = |(first, last)| Suspect::new(offset + u64::from(first) * BLOCK_SIZE, last - first + 1, 0);
    runs.into_iter().map(suspect).collect()
}

impl Verify {
    /// When the next range may be held, if one waits.
    pub(super) fn next_suspect(&self) -> Option<Time> {
        self.suspects.iter().map(|s| s.not_before).min()
    }

    /// A range could not be looked at: it comes again later, or is left unsettled.
    fn put_back(&mut self, mut suspect: Suspect, now: Time) {
        suspect.tries += 1;
        if suspect.tries >= MAX_TRIES {
            self.findings.unsettled(suspect.offset, suspect.length());
            return;
        }
        let pause = FIRST_PAUSE * (1 << (suspect.tries - 1).min(16));
        suspect.not_before = now + pause.min(LONGEST_PAUSE);
        self.suspects.push_back(suspect);
    }
}

impl Client {
    /// Whether the part is a hold: those are never sent.
    pub(in crate::client) fn is_hold(&self, slot: Slot) -> bool {
        self.verify.as_ref().and_then(|v| v.hold.as_ref()).is_some_and(|h| h.slot == slot)
    }

    /// How many slots holds take, which are not the guest's.
    pub(in crate::client) fn held_slots(&self) -> usize {
        usize::from(self.verify.as_ref().is_some_and(|v| v.hold.is_some()))
    }

    /// Which hold is in place, and whether a request waits for it.
    #[must_use]
    pub(crate) fn hold_status(&self) -> Option<(u64, bool)> {
        let hold = self.verify.as_ref()?.hold.as_ref()?;
        Some((hold.number, self.parts.is_waited_for(hold.slot)))
    }

    /// Holds the next range that is to be looked at again, if none is held.
    pub(super) fn start_hold(&mut self) {
        let now = self.now;
        let Some(verify) = self.verify.as_mut().filter(|v| v.hold.is_none()) else { return };
        let Some(index) = verify.suspects.iter().position(|s| s.not_before <= now) else { return };
        if !self.parts.has_free() {
            return;
        }
        let Some(suspect) = verify.suspects.remove(index) else { return };
        verify.number += 1;
        verify.last_progress = now;
        let number = verify.number;
        let range = (suspect.offset, u32::try_from(suspect.length()).unwrap_or(u32::MAX));
        let sequence = self.next_sequence();
        let slot = self.parts.admit_hold(range, sequence);
        let limit = now + self.config.verify_hold;
        let Some(verify) = &mut self.verify else { return };
        match slot {
            Some(slot) => {
                let found = Vec::new();
                verify.hold = Some(Hold { suspect, slot, number, since: now, limit, pending: None, found });
                self.tick_hold();
            }
            None => verify.put_back(suspect, now),
        }
    }

    /// Asks the members when the range is quiet, and gives the hold up when a write has waited for it for too long.
    pub(super) fn tick_hold(&mut self) {
        let (now, clean) = (self.now, self.view_clean());
        let Some(hold) = self.verify.as_mut().and_then(|v| v.hold.as_mut()) else { return };
        let is_quiet = self.parts.get(hold.slot).is_some_and(|p| p.state == PartState::Unsent);
        if hold.pending.is_none() && is_quiet {
            hold.pending = Some(clean);
            let (number, range) = (hold.number, &hold.suspect);
            let range = (range.offset, u32::try_from(range.length()).unwrap_or(u32::MAX));
            for member in clean.iter() {
                let header = self.range_header(Kind::Digest, number, range);
                self.send(member, header, Payload::None);
            }
            return;
        }
        if hold.limit > now {
            return;
        }
        if self.parts.is_waited_for(hold.slot) || now - hold.since > self.config.leg_timeout {
            self.give_hold_up();
        } else {
            // Nobody is kept waiting by it.
            hold.limit = now + self.config.verify_hold;
        }
    }

    fn give_hold_up(&mut self) {
        let now = self.now;
        let Some(hold) = self.verify.as_mut().and_then(|v| v.hold.take()) else { return };
        if let Some(verify) = &mut self.verify {
            verify.put_back(hold.suspect, now);
        }
        self.release_part(hold.slot);
    }

    /// Lets go of a hold for good: what waited for it alone is sent.
    pub(super) fn release_hold(&mut self) {
        if let Some(hold) = self.verify.as_mut().and_then(|v| v.hold.take()) {
            self.release_part(hold.slot);
        }
    }

    /// Lets go of a hold when nothing may be sent: what waited for it is sent with the next view.
    pub(in crate::client) fn drop_hold(&mut self) {
        let Some(hold) = self.verify.as_mut().and_then(|v| v.hold.take()) else { return };
        if let Some(verify) = &mut self.verify {
            verify.suspects.push_front(hold.suspect);
        }
        self.parts.release(hold.slot, |_| {});
    }

    pub(in crate::client) fn digest_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        let is_of_now = self.is_of_now(header);
        let Some(hold) = self.verify.as_mut().and_then(|v| v.hold.as_mut()) else { return };
        let is_awaited =
            hold.number == header.sequence.0 && hold.pending.is_some_and(|pending| pending.contains(member));
        if !is_awaited || !is_of_now {
            return;
        }
        let found = match (header.status, DigestReply::decode(body, hold.suspect.blocks.into())) {
            (Status::Ok, Ok(digests)) => Some(digests.0),
            (Status::Ok, Err(error)) => {
                return self.drop_member_for(member, Cause::Refused, &format!("protocol error: {error}"));
            }
            (Status::IoError, _) => None,
            _ => return self.give_hold_up(),
        };
        hold.found.push((member, found));
        if let Some(pending) = &mut hold.pending {
            pending.remove(member);
            if pending.is_empty() {
                self.judge();
            }
        }
    }

    /// All members have said what they have in the range that is held.
    fn judge(&mut self) {
        let Some(Hold { suspect, slot, found, .. }) = self.verify.as_mut().and_then(|v| v.hold.take()) else {
            return;
        };
        let is_unreadable = found.iter().any(|(_, digests)| digests.is_none());
        if is_unreadable && suspect.blocks > 1 {
            // Which block it is shows when they are looked at one by one.
            let half = suspect.blocks / 2;
            let rest = suspect.offset + u64::from(half) * BLOCK_SIZE;
            let halves = [(rest, suspect.blocks - half), (suspect.offset, half)];
            if let Some(verify) = &mut self.verify {
                for (offset, blocks) in halves {
                    verify.suspects.push_front(Suspect::new(offset, blocks, suspect.repairs));
                }
            }
        } else {
            let first = suspect.offset / BLOCK_SIZE;
            for index in 0..suspect.blocks {
                let at = |digests: &Vec<u64>| digests.get(index as usize).copied();
                let comparison =
                    Comparison::new(found.iter().map(|(m, digests)| (*m, digests.as_ref().and_then(at))));
                self.judge_block(Block(first + u64::from(index)), &comparison, suspect.repairs);
            }
        }
        self.release_part(slot);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_that_differ_near_each_other_are_looked_at_together() {
        let found = suspects(1 << 20, 64, 1 | 1 << 5 | 1 << 63);
        let places: Vec<_> = found.iter().map(|s| ((s.offset - (1 << 20)) / BLOCK_SIZE, s.blocks)).collect();
        assert_eq!(places, vec![(0, 1), (5, 1), (63, 1)]);
        let found = suspects(0, 16, 1 | 1 << 4 | 1 << 40);
        assert_eq!(found.iter().map(|s| (s.offset, s.blocks)).collect::<Vec<_>>(), vec![(0, 5)]);
        assert_eq!(suspects(0, 64, u64::MAX).len(), 1);
        assert_eq!(suspects(0, 64, 0), Vec::new());
    }
}
