//! After a client died with writes in flight: which members agree, and which are to be brought in line.
//!
//! One Clean member is the reference, if possible one whose disk failed none of the writes in question. What it has counts,
//! and every other member misses whatever may differ: the ranges of writes above the watermark that are not in both slot
//! tables alike, or that a disk failed, which may have carried out any part of them; those of writes whose memory could not be
//! read, and which were given up before the members had the same filler in them; and, where a process was started anew and its
//! table is lost, the chunks of its intent map and of the reference's: what it wrote last may be lost with more than its table, if its
//! store went back in time by less than is known. If all tables are lost, that is the union of all intent maps. A member
//! that misses anything leaves the view with it on record, and comes back by the usual rejoin. So all members agree on
//! one value for every block before any request is served, an acknowledged write is never lost, and an unacknowledged
//! one is there as a whole or not at all, as the reference has it.

use super::Client;
use super::parts::PartState;
use crate::pool::{MemberId, MemberSet, MemberState, View};
use crate::wire::{AttachReply, DirtyAddition, SlotEntry};

impl Client {
    /// The members that are stale after an unclean end, and what they and the `absent` ones miss. Those that are `powerless`
    /// may have lost what was not flushed.
    pub(super) fn reconcile(
        &self,
        best: &View,
        replies: &[(MemberId, AttachReply)],
        absent: MemberSet,
        powerless: MemberSet,
    ) -> (MemberSet, Vec<DirtyAddition>) {
        let in_order = replies.iter().all(|(_, r)| r.clean_detach);
        let clean = || replies.iter().filter(|(m, _)| best.clean().contains(*m));
        let watermark =
            clean().filter(|(_, r)| !r.tables_lost).map(|(_, r)| r.watermark).max().unwrap_or_default();
        // One that is Syncing may be so in a view of which no Clean member has heard, and have alone on record what it has of
        // earlier clients. Its own watermark passes that when the view is committed.
        let open = |m: MemberId, r: &AttachReply| -> Vec<SlotEntry> {
            let is_clean = best.clean().contains(m);
            let known = if is_clean { watermark } else { watermark.min(r.watermark) };
            r.slots.iter().filter(|s| s.sequence > known && !self.sends_again(s)).copied().collect()
        };
        let newest = |m: MemberId, r: &AttachReply| {
            open(m, r).iter().filter(|s| !s.failed).map(|s| u128::from(s.sequence.0)).sum::<u128>()
        };
        let is_whole = |m: MemberId, r: &AttachReply| !open(m, r).iter().any(|s| s.failed);
        // One that still has what was not flushed comes first. Then one whose disk failed no write: every Clean member has all
        // that completed, and nothing brings a write into order again that was carried out in part.
        let has_power = |m: MemberId| !powerless.contains(m) || mutant!(PowerLossIgnored);
        let rank = |m: MemberId, r: &AttachReply| {
            (has_power(m), !r.flush_failed, is_whole(m, r), !r.tables_lost, !r.clean_detach, newest(m, r))
        };
        let reference = clean().max_by_key(|(m, r)| (rank(*m, r), std::cmp::Reverse(*m)));
        let in_order = in_order || mutant!(NotReconciled);
        let Some((reference, source)) = reference.filter(|_| !in_order) else {
            return (MemberSet::EMPTY, Vec::new());
        };
        let (mut stale, mut additions) = (MemberSet::EMPTY, Vec::new());
        let all_lost = source.tables_lost;
        for (member, reply) in replies.iter().filter(|(m, _)| m != reference) {
            let mut missed: Vec<(u64, u64)> = Vec::new();
            let (ours, theirs) = (open(*reference, source), open(*member, reply));
            let differs = |a: &SlotEntry, others: &[SlotEntry]| {
                a.failed && !mutant!(FailedCountsAsWritten) || !others.contains(a)
            };
            missed.extend(ours.iter().filter(|s| differs(s, &theirs)).map(range));
            if !mutant!(OnlyReferenceCounts) {
                missed.extend(theirs.iter().filter(|s| differs(s, &source.slots)).map(range));
            }
            // The same sequence stands for the same data, unless this client itself knows better.
            if !mutant!(UnlikeForgotten) {
                missed.extend(self.parts.unlike());
            }
            if reply.tables_lost {
                missed.extend(self.intent_ranges(reply));
            }
            // One that says that the last client left it in good order may be a copy from before that client.
            let is_unsure = reply.tables_lost || reply.clean_detach && !source.clean_detach;
            if is_unsure && !mutant!(ReferenceIntentsIgnored) {
                missed.extend(self.intent_ranges(source));
            }
            if all_lost {
                replies.iter().for_each(|(_, r)| missed.extend(self.intent_ranges(r)));
            }
            missed.sort_unstable();
            missed.dedup();
            // What it had pulled and not flushed may be gone, while its own map has it as current: only its source knows.
            if reply.tables_lost && best.state(*member) == Some(MemberState::Syncing) {
                stale.insert(*member);
            }
            if !missed.is_empty() {
                stale.insert(*member);
                let members = MemberSet::only(*member);
                additions.extend(missed.iter().map(|&(offset, length)| DirtyAddition {
                    members,
                    offset,
                    length,
                }));
            }
        }
        // Those that are not there, or were Out already, miss what was in flight. The view that says so may have reached
        // some members only, and they alone have it on record.
        let members = absent.union(best.out());
        if !members.is_empty() && !mutant!(AbsentNotTold) {
            let mut missed: Vec<(u64, u64)> =
                replies.iter().flat_map(|(m, r)| open(*m, r)).map(|s| range(&s)).collect();
            let lost = replies.iter().filter(|(_, r)| r.tables_lost);
            missed.extend(lost.flat_map(|(_, r)| self.intent_ranges(r)));
            // Their stores may be from before what no mark covers.
            if !mutant!(AbsentIntentsIgnored) {
                missed.extend(self.intent_ranges(source));
            }
            missed.sort_unstable();
            missed.dedup();
            additions.extend(missed.iter().map(|&(offset, length)| DirtyAddition {
                members,
                offset,
                length,
            }));
        }
        (stale.intersection(best.active()), additions)
    }

    /// Whether a write is one of this client's own that it will send to every member again.
    fn sends_again(&self, entry: &SlotEntry) -> bool {
        // It has had its slot all the time since it got its place.
        self.parts.slots().any(|(slot, p)| {
            p.operation.is_write()
                && p.state == PartState::Unsent
                && slot == entry.slot
                && (p.order..=p.sequence).contains(&entry.sequence)
        })
    }

    /// What the intent map of a member covers, in bytes of the pool.
    pub(super) fn intent_ranges(&self, reply: &AttachReply) -> Vec<(u64, u64)> {
        let Some(spec) = &self.spec else { return Vec::new() };
        let size = spec.chunk_size.bytes();
        let bytes = |&(first, count): &(crate::pool::Chunk, u64)| {
            let start = first.0.saturating_mul(size).min(spec.size);
            let end = first.0.saturating_add(count).saturating_mul(size).min(spec.size);
            (start, end - start)
        };
        reply.intents.iter().map(bytes).filter(|(_, length)| *length > 0).collect()
    }
}

fn range(entry: &SlotEntry) -> (u64, u64) {
    (entry.offset, entry.length.into())
}
