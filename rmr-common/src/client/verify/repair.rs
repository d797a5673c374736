//! Repair: members that are wrong leave the view with those blocks on record as missed, and come back by the usual rejoin.
//!
//! One round takes out exactly the members that are wrong in some block, with every block in which no other member is
//! wrong. So whichever Clean member becomes their source has the right content of all of these blocks. That nothing else is
//! copied which is wrong at the source: a round begins behind a flush, so that no more is missed than that, and a member
//! that is to be repaired itself is a source only if all are. When the members are Clean again, the blocks are looked at
//! once more.

use std::time::Duration;

use super::findings::Comparison;
use super::hold::Suspect;
use super::{Client, Verify};
use crate::pool::{BLOCK_SIZE, Block, MemberSet, VerifyOutcome};
use crate::time::Time;
use crate::wire::DirtyAddition;

/// A block that differs again after so many repairs is left alone: its disk does not keep what is written.
const MAX_REPAIRS: u32 = 2;
/// A repair begins at the latest when so many blocks wait for it: bounds what is remembered.
const MAX_REPAIRS_WAITING: usize = 4096;
/// And when the first of them has waited for so long.
const REPAIR_AFTER: Duration = Duration::from_secs(600);

/// A block that is to be repaired.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Repair {
    block: Block,
    wrong: MemberSet,
    /// The members that were compared. If others are Clean by the time of the repair, it has to be looked at again.
    voters: MemberSet,
    since: Time,
    repairs: u32,
}

/// A repair that is under way.
pub(super) struct Round {
    members: MemberSet,
    /// They have left the view.
    left: bool,
    /// The blocks, and how often they were repaired before.
    blocks: Vec<(Block, u32)>,
}

impl Verify {
    /// Whether enough waits for repair that it should not wait for the end.
    pub(super) fn wants_repair(&self, now: Time) -> bool {
        self.repairs.len() >= MAX_REPAIRS_WAITING
            || self.repairs.first().is_some_and(|r| now - r.since > REPAIR_AFTER)
    }
}

impl Client {
    /// What the members have in a block is known beyond doubt.
    pub(super) fn judge_block(&mut self, block: Block, comparison: &Comparison, repairs: u32) {
        let now = self.now;
        let Some(verify) = &mut self.verify else { return };
        if comparison.is_good() {
            verify.findings.good(block, repairs > 0);
            return;
        }
        let wrong = comparison.wrong(verify.options.trust);
        let outcome = match (verify.options.repair, wrong.is_empty()) {
            (false, _) => VerifyOutcome::Reported,
            (true, true) => VerifyOutcome::Undecided,
            (true, false) if repairs >= MAX_REPAIRS => VerifyOutcome::RepairFailed,
            (true, false) => VerifyOutcome::Pending,
        };
        verify.findings.found(block, comparison, wrong, outcome);
        if outcome == VerifyOutcome::Pending {
            let voters = comparison.voters();
            verify.repairs.push(Repair { block, wrong, voters, since: now, repairs });
        }
    }

    /// Starts a round of repairs.
    pub(super) fn start_repair(&mut self) {
        let (now, clean) = (self.now, self.view_clean());
        let Some(verify) = &mut self.verify else { return };
        if now < verify.next_at {
            return;
        }
        // Others are Clean now than those that were compared: which are wrong has to be found out again.
        let (fresh, old) = std::mem::take(&mut verify.repairs).into_iter().partition(|r| r.voters == clean);
        verify.repairs = fresh;
        verify.suspects.extend(runs(old.into_iter().map(|r: Repair| (r.block, r.repairs)).collect()));
        let Some(members) = verify.repairs.first().map(|r| r.wrong) else { return };
        if !self.is_flushed_for_repair() {
            return;
        }
        let Some(verify) = &mut self.verify else { return };
        let is_in = |r: &Repair| r.wrong.without(members).is_empty();
        let (chosen, others) = std::mem::take(&mut verify.repairs).into_iter().partition(is_in);
        verify.repairs = others;
        let chosen: Vec<Repair> = chosen;
        let addition = |r: &Repair| DirtyAddition {
            members: r.wrong,
            offset: r.block.0 * BLOCK_SIZE,
            length: BLOCK_SIZE,
        };
        let ranges: Vec<_> = chosen.iter().map(addition).collect();
        let blocks = chosen.iter().map(|r| (r.block, r.repairs)).collect();
        verify.round = Some(Round { members, left: false, blocks });
        self.expel(members, &ranges);
    }

    /// What was not flushed counts as missed by a member that leaves the view, and would be copied too: flushes once.
    fn is_flushed_for_repair(&mut self) -> bool {
        let asked = self.verify.as_ref().and_then(|v| v.flush);
        let running = self.flush.as_ref().map(|f| f.sequence);
        let (is_flushed, flush) = match (asked, running) {
            (Some(_), _) if asked == running => (false, asked),
            (Some(_), _) => (true, None),
            // One of the guest's, which does as well: while it flushes all the time, there is no better one.
            (None, Some(_)) => (false, running),
            (None, None) if self.unflushed.is_empty() => (true, None),
            (None, None) => (false, Some(self.begin_flush(Vec::new()))),
        };
        if let Some(verify) = &mut self.verify {
            verify.flush = flush;
        }
        is_flushed
    }

    /// The members that are to be repaired: bad sources for others.
    pub(in crate::client) fn known_wrong(&self) -> MemberSet {
        let repairs = self.verify.as_ref().filter(|v| v.is_running()).map(|v| &v.repairs);
        repairs.into_iter().flatten().fold(MemberSet::EMPTY, |all, r| all.union(r.wrong))
    }

    /// Whether a repair is under way. Once its members are Clean again, its blocks are looked at once more.
    pub(super) fn repair_is_under_way(&mut self) -> bool {
        let (now, clean, is_expelling) = (self.now, self.view_clean(), self.faults.is_expelling());
        let Some(verify) = &mut self.verify else { return false };
        let Some(round) = &mut verify.round else { return false };
        verify.last_progress = now;
        // One that was removed meanwhile does not come back.
        let members: MemberSet = self.view.iter().flat_map(|v| &v.members).map(|m| m.id).collect();
        let is_away = !round.members.intersection(members).without(clean).is_empty();
        round.left |= is_away;
        if is_away || is_expelling {
            return true;
        }
        let Some(Round { members, left, blocks }) = verify.round.take() else { return false };
        if !left {
            verify.failed(format!("members {members} could not leave the view"), now);
        }
        // If they never left, the attachment ended before; or others were found to be at fault, and they were needed.
        let again = blocks.into_iter().map(|(block, repairs)| (block, repairs + u32::from(left))).collect();
        verify.suspects.extend(runs(again));
        false
    }
}

/// Neighbouring blocks of one kind, as ranges to be looked at.
fn runs(mut blocks: Vec<(Block, u32)>) -> Vec<Suspect> {
    blocks.sort_unstable_by_key(|(block, _)| *block);
    let mut runs: Vec<Suspect> = Vec::new();
    for (block, repairs) in blocks {
        let offset = block.0 * BLOCK_SIZE;
        match runs.last_mut() {
            Some(run) if run.offset + run.length() == offset && run.repairs == repairs && run.blocks < 64 => {
                run.blocks += 1;
            }
            _ => runs.push(Suspect::new(offset, 1, repairs)),
        }
    }
    runs
}
