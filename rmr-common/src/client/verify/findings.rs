//! What a verify has found: which members are wrong in a block, and the report's figures. No messages, no time.

use std::collections::BTreeMap;

use crate::map::BlockMap;
use crate::pool::{
    BLOCK_SIZE, Block, MAX_MEMBERS, MemberId, MemberSet, VerifiedMember, VerifyDifference, VerifyOutcome,
};

/// Blocks that are kept with all that is known of them; beyond that they are only counted. About 1 MiB.
const MAX_LISTED: usize = 8192;
/// Ranges in a report: what a message holds and a person reads.
const MAX_RANGES: usize = 512;

/// How the members that were compared stand to each other in one block.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Comparison {
    /// Sets of members with the same content.
    pub(super) same: Vec<MemberSet>,
    /// Members whose disk could not read it.
    pub(super) unreadable: MemberSet,
}

impl Comparison {
    /// From what each member has; `None` is unreadable.
    pub(super) fn new(found: impl Iterator<Item = (MemberId, Option<u64>)>) -> Self {
        let (mut groups, mut unreadable): (Vec<(u64, MemberSet)>, _) = (Vec::new(), MemberSet::EMPTY);
        for (member, digest) in found {
            match digest {
                None => unreadable.insert(member),
                Some(digest) => match groups.iter_mut().find(|(d, _)| *d == digest) {
                    Some((_, set)) => set.insert(member),
                    None => groups.push((digest, MemberSet::only(member))),
                },
            }
        }
        Self { same: groups.into_iter().map(|(_, set)| set).collect(), unreadable }
    }

    pub(super) fn voters(&self) -> MemberSet {
        self.same.iter().fold(self.unreadable, |all, set| all.union(*set))
    }

    /// Whether all members could read the block and have the same.
    pub(super) fn is_good(&self) -> bool {
        self.same.len() == 1 && self.unreadable.is_empty()
    }

    /// The members that are right, if that can be told: those that have what the trusted member has; else the only content
    /// that could be read; else what more than half of the members have. Never a guess.
    pub(super) fn right(&self, trust: Option<MemberId>) -> MemberSet {
        let right = match (trust, &self.same[..]) {
            (Some(member), sets) => sets.iter().find(|set| set.contains(member)),
            (None, [only]) => Some(only),
            (None, sets) => sets.iter().find(|set| set.len() * 2 > self.voters().len()),
        };
        right.copied().unwrap_or_default()
    }

    /// The members that are wrong, if that can be told.
    pub(super) fn wrong(&self, trust: Option<MemberId>) -> MemberSet {
        let right = self.right(trust);
        if right.is_empty() { right } else { self.voters().without(right) }
    }
}

#[derive(Clone, PartialEq, Eq, Debug)]
struct Listed {
    comparison: Comparison,
    wrong: MemberSet,
    outcome: VerifyOutcome,
}

#[derive(Clone, Copy, Default)]
struct Counts {
    compared: u64,
    not_compared: u64,
    differing: u64,
    unreadable: u64,
}

/// See the module's comment.
pub(super) struct Findings {
    found: BlockMap,
    listed: BTreeMap<u64, Listed>,
    counts: [Counts; MAX_MEMBERS],
    undecided: u64,
    repaired: u64,
    unsettled: BlockMap,
}

impl Findings {
    pub(super) fn new(blocks: u64) -> Self {
        Self {
            found: BlockMap::new(blocks),
            listed: BTreeMap::new(),
            counts: [Counts::default(); MAX_MEMBERS],
            undecided: 0,
            repaired: 0,
            unsettled: BlockMap::new(blocks),
        }
    }

    /// `blocks` more were compared with each other on these members.
    pub(super) fn compared(&mut self, blocks: u64, by: MemberSet) {
        for member in MemberId::all() {
            let counts = &mut self.counts[member.index()];
            if by.contains(member) {
                counts.compared += blocks;
            } else {
                counts.not_compared += blocks;
            }
        }
    }

    /// Members differ in a block, or one could not read it. Found again, it is not counted again.
    pub(super) fn found(
        &mut self,
        block: Block,
        comparison: &Comparison,
        wrong: MemberSet,
        outcome: VerifyOutcome,
    ) {
        if self.found.insert(block) {
            self.undecided += u64::from(wrong.is_empty());
            let differing = if wrong.is_empty() { comparison.voters() } else { wrong };
            for member in differing.iter() {
                self.counts[member.index()].differing += 1;
            }
            for member in comparison.unreadable.iter() {
                self.counts[member.index()].unreadable += 1;
            }
        }
        if self.listed.len() < MAX_LISTED || self.listed.contains_key(&block.0) {
            self.listed.insert(block.0, Listed { comparison: comparison.clone(), wrong, outcome });
        }
    }

    /// The block is the same on all members now. It was repaired, or the guest wrote it before its repair began.
    pub(super) fn good(&mut self, block: Block, is_repaired: bool) {
        let pending = self.listed.get_mut(&block.0).filter(|l| l.outcome == VerifyOutcome::Pending);
        if pending.is_some() || is_repaired {
            self.repaired += 1;
        }
        if let Some(listed) = pending {
            listed.outcome = VerifyOutcome::Repaired;
        }
    }

    /// The range could not be looked at again.
    pub(super) fn unsettled(&mut self, offset: u64, length: u64) {
        self.unsettled.insert_bytes(offset, length);
    }

    pub(super) const fn differing(&self) -> u64 {
        self.found.count()
    }

    pub(super) const fn figures(&self) -> (u64, u64, u64) {
        (self.undecided, self.repaired, self.unsettled.count())
    }

    /// The blocks that are listed, as ranges, and whether there are more.
    pub(super) fn differences(&self) -> (Vec<VerifyDifference>, bool) {
        let mut ranges: Vec<(u64, u64, &Listed)> = Vec::new();
        for (&block, listed) in &self.listed {
            match ranges.last_mut() {
                Some((first, count, last)) if *first + *count == block && *last == listed => *count += 1,
                _ => ranges.push((block, 1, listed)),
            }
        }
        let more = ranges.len() > MAX_RANGES || self.found.count() > self.listed.len() as u64;
        let list = |set: MemberSet| set.iter().collect();
        let differences = ranges.into_iter().take(MAX_RANGES).map(|(first, count, l)| VerifyDifference {
            offset: first * BLOCK_SIZE,
            length: count * BLOCK_SIZE,
            same: l.comparison.same.iter().map(|set| list(*set)).collect(),
            unreadable: list(l.comparison.unreadable),
            wrong: list(l.wrong),
            outcome: l.outcome,
        });
        (differences.collect(), more)
    }

    pub(super) fn unsettled_ranges(&self) -> Vec<(u64, u64)> {
        self.unsettled.ranges().take(MAX_RANGES).collect()
    }

    pub(super) fn member(&self, member: MemberId) -> VerifiedMember {
        let counts = self.counts[member.index()];
        VerifiedMember {
            member,
            blocks_compared: counts.compared,
            blocks_not_compared: counts.not_compared,
            blocks_differing: counts.differing,
            blocks_unreadable: counts.unreadable,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(index: u8) -> MemberId {
        MemberId::new(index).unwrap()
    }

    fn compare(found: &[Option<u64>]) -> Comparison {
        Comparison::new((0u8..).zip(found).map(|(i, d)| (id(i), *d)))
    }

    #[test]
    fn more_than_half_decide_and_a_trusted_member_decides_alone() {
        type Row = (&'static [Option<u64>], Option<u8>, u8);
        let table: [Row; 14] = [
            // What each member has; whom to trust; who is wrong, a bit each (none: it cannot be told).
            (&[Some(1), Some(1), Some(2)], None, 0b100),
            (&[Some(2), Some(1), Some(1)], None, 0b001),
            (&[Some(1), Some(2), Some(3)], None, 0),
            (&[Some(1), Some(2)], None, 0),
            (&[Some(1), Some(2)], Some(1), 0b01),
            (&[Some(1), Some(2), Some(2)], Some(0), 0b110),
            (&[Some(1), Some(1), Some(2), Some(2)], None, 0),
            (&[Some(1), Some(1), Some(2), Some(3)], None, 0),
            (&[Some(1), None], None, 0b10),
            (&[Some(1), Some(1), None], None, 0b100),
            (&[Some(1), Some(2), None], None, 0),
            (&[Some(1), None], Some(1), 0),
            (&[None, None], None, 0),
            (&[Some(1), Some(2)], Some(5), 0),
        ];
        for (found, trust, wrong) in table {
            assert_eq!(compare(found).wrong(trust.map(id)), MemberSet(wrong), "{found:?}, trust {trust:?}");
        }
    }

    #[test]
    fn only_what_all_can_read_and_have_alike_is_good() {
        assert!(compare(&[Some(1), Some(1)]).is_good());
        assert!(!compare(&[Some(1), Some(2)]).is_good());
        assert!(!compare(&[Some(1), None]).is_good());
        assert!(!compare(&[None, None]).is_good());
    }

    #[test]
    fn neighbours_that_differ_alike_are_one_range_and_a_block_counts_once() {
        let mut findings = Findings::new(100);
        let odd = compare(&[Some(1), Some(1), Some(2)]);
        let open = compare(&[Some(1), Some(2), Some(3)]);
        for block in [5, 6, 8] {
            findings.found(Block(block), &odd, odd.wrong(None), VerifyOutcome::Reported);
        }
        findings.found(Block(7), &open, MemberSet::EMPTY, VerifyOutcome::Reported);
        findings.found(Block(7), &open, MemberSet::EMPTY, VerifyOutcome::Reported);
        let (ranges, more) = findings.differences();
        let places: Vec<_> =
            ranges.iter().map(|d| (d.offset / 4096, d.length / 4096, d.wrong.len())).collect();
        assert_eq!((places, more), (vec![(5, 2, 1), (7, 1, 0), (8, 1, 1)], false));
        assert_eq!((findings.differing(), findings.figures().0), (4, 1));
        let differing = [0, 1, 2].map(|i| findings.member(id(i)).blocks_differing);
        assert_eq!(differing, [1, 1, 4]);
    }

    #[test]
    fn what_is_not_listed_is_counted() {
        let mut findings = Findings::new(1 << 20);
        let odd = compare(&[Some(1), Some(2)]);
        for block in 0..20_000 {
            findings.found(Block(block * 2), &odd, MemberSet::EMPTY, VerifyOutcome::Reported);
        }
        let (ranges, more) = findings.differences();
        assert_eq!((ranges.len(), more, findings.differing()), (MAX_RANGES, true, 20_000));
    }
}
