//! Verify: compares all Clean members range by range while the guest goes on, by digests that nodes exchange.
//!
//! ```text
//!   every piece ──▶ compared, member with member ──▶ the same: done
//!                        │ some blocks differ (or were being written just then)
//!                        ▼
//!                   held and looked at again (hold.rs) ──▶ the same: done
//!                        │ they do differ
//!                        ▼
//!                   on the list (findings.rs), and repaired at the end (repair.rs)
//! ```
//! The members stand in a ring, and each compares itself with the next one over its one link to another node. A piece
//! needs all edges of the ring but one, which rotates, so that every disk reads about as much.

mod findings;
mod hold;
mod repair;

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::{Client, Notice, State};
use crate::pool::{
    BLOCK_SIZE, Cause, Chunk, Command, CommandReply, MemberId, MemberSet, PoolSpec, Refusal, Sequence,
    VerifyOptions, VerifyReport, VerifyState,
};
use crate::time::Time;
use crate::wire::{Compare, CompareReply, Kind, MAX_COMPARE, MessageHeader, Status};
use findings::Findings;
use hold::{Hold, Suspect};
use repair::{Repair, Round};

/// Pieces that are compared at a time while the guest is quiet: enough to keep a disk and the network busy together.
const MAX_UNDER_WAY: usize = 4;
/// While requests of the guest arrived within this time, a verify yields to them: one piece at a time.
const GUEST_ACTIVE: Duration = Duration::from_millis(50);
/// A yielding verify pauses after each piece for this many times as long as the piece took.
const YIELD_FACTOR: u32 = 2;
/// Pause after a comparison that failed.
const BACKOFF: Duration = Duration::from_millis(500);
/// When no comparison has succeeded for so long, though there were members to compare, the verify ends.
const PATIENCE: Duration = Duration::from_secs(60);
/// No more pieces are compared while so many ranges are to be looked at again: bounds what is remembered.
const MAX_SUSPECTS: usize = 256;
/// How often the rate is measured.
const RATE_INTERVAL: Duration = Duration::from_secs(1);

/// A piece that is being compared.
struct Piece {
    offset: u64,
    length: u32,
    sent: Time,
    /// All members that take part, and those that have not answered.
    members: MemberSet,
    pending: MemberSet,
    differs: u64,
    unreadable: bool,
}

#[derive(Clone, PartialEq, Eq)]
enum Phase {
    Running,
    Over(VerifyState),
}

/// A verify, from its start to that of the next one.
pub(super) struct Verify {
    options: VerifyOptions,
    phase: Phase,
    started: Time,
    ended: Time,
    /// Bytes of the pool when it began. What the pool grows by meanwhile holds nothing old.
    size: u64,
    /// First byte that no piece was made of yet.
    cursor: u64,
    /// Pieces to be compared again: their comparison failed, or the view changed meanwhile.
    again: VecDeque<u64>,
    under_way: BTreeMap<u64, Piece>,
    /// Numbers comparisons and holds; an answer to another one is dropped.
    number: u64,
    suspects: VecDeque<Suspect>,
    hold: Option<Hold>,
    next_at: Time,
    last_progress: Time,
    findings: Findings,
    repairs: Vec<Repair>,
    round: Option<Round>,
    /// The flush before the next round.
    flush: Option<Sequence>,
    bytes_compared: u64,
    rate: u64,
    rate_at: Time,
    rate_bytes: u64,
    last_error: Option<String>,
}

impl Verify {
    fn piece_size(spec: &PoolSpec) -> u64 {
        spec.chunk_size.bytes().min(MAX_COMPARE.into())
    }

    const fn is_running(&self) -> bool {
        matches!(self.phase, Phase::Running)
    }

    /// The first byte that is not compared for good.
    fn position(&self) -> u64 {
        let suspects = self.suspects.iter().chain(self.hold.iter().map(|h| &h.suspect));
        let open = self.again.iter().copied().chain(self.under_way.values().map(|p| p.offset));
        open.chain(suspects.filter(|s| !s.is_repaired()).map(|s| s.offset)).fold(self.cursor, u64::min)
    }

    /// A comparison failed, and comes again after a while.
    fn failed(&mut self, reason: String, now: Time) {
        self.last_error = Some(reason);
        self.next_at = self.next_at.max(now + BACKOFF);
    }
}

impl Client {
    /// Carries out a command if it is about a verify.
    pub(super) fn verify_command(&mut self, command: &Command) -> Option<CommandReply> {
        match command {
            Command::Verify { options } => {
                if let Err(text) = self.start_verify(*options, self.now) {
                    return Some(CommandReply::refused(Refusal::CannotVerify, text));
                }
            }
            Command::VerifyStatus => {}
            Command::VerifyCancel => {
                self.cancel_verify(self.now);
            }
            _ => return None,
        }
        Some(CommandReply::Verify { report: self.verify_report(self.now).map(Box::new) })
    }

    /// Begins a verify.
    ///
    /// # Errors
    /// The words of a refusal: one is under way, or it could not do what is asked.
    pub fn start_verify(&mut self, options: VerifyOptions, now: Time) -> Result<(), String> {
        self.now = now;
        let Some(spec) = self.spec.as_ref().filter(|_| self.is_attached()) else {
            return Err("the pool is not attached".into());
        };
        let (clean, chunks) = (self.view_clean(), spec.chunk_count());
        if self.verify.as_ref().is_some_and(|v| v.is_running()) {
            return Err("a verify of the pool is under way".into());
        }
        if clean.len() < 2 {
            return Err(format!("{} member is Clean; a verify needs two to compare", clean.len()));
        }
        if options.from_chunk.0 >= chunks {
            return Err(format!("there is no chunk {}; the pool has {chunks}", options.from_chunk));
        }
        match options.trust {
            Some(member) if !clean.contains(member) => {
                return Err(format!("member {member} is not Clean, so it cannot be trusted"));
            }
            None if options.repair && clean.len() < 3 => {
                return Err("two members cannot outvote each other: name the one to trust".into());
            }
            Some(_) | None => {}
        }
        self.verify = Some(Box::new(Verify {
            options,
            phase: Phase::Running,
            started: now,
            ended: now,
            size: spec.size,
            cursor: options.from_chunk.0 * spec.chunk_size.bytes(),
            again: VecDeque::new(),
            under_way: BTreeMap::new(),
            // Answers to the one before may still be on their way.
            number: self.verify.as_ref().map_or(0, |v| v.number),
            suspects: VecDeque::new(),
            hold: None,
            next_at: now,
            last_progress: now,
            findings: Findings::new(spec.block_count()),
            repairs: Vec::new(),
            round: None,
            flush: None,
            bytes_compared: 0,
            rate: 0,
            rate_at: now,
            rate_bytes: 0,
            last_error: None,
        }));
        self.notice(Notice::Verify("begins".into()));
        self.pump_verify();
        Ok(())
    }

    /// Gives the verify up that is under way; false if there is none.
    pub fn cancel_verify(&mut self, now: Time) -> bool {
        self.now = now;
        let is_running = self.verify.as_ref().is_some_and(|v| v.is_running());
        self.end_verify(VerifyState::Cancelled);
        is_running
    }

    /// What the verify that is under way, or the last one, has done and found.
    #[must_use]
    pub fn verify_report(&self, now: Time) -> Option<VerifyReport> {
        let (verify, spec) = (self.verify.as_ref()?, self.spec.as_ref()?);
        let is_running = verify.is_running();
        let end = if is_running { now } else { verify.ended };
        let left = verify.size - verify.position().min(verify.size);
        let (differences, more_differences) = verify.findings.differences();
        let (undecided, repaired, unsettled) = verify.findings.figures();
        Some(VerifyReport {
            options: verify.options,
            state: self.verify_state(verify),
            elapsed_ms: milliseconds(end - verify.started),
            ended_ms_ago: (!is_running).then(|| milliseconds(now - verify.ended)),
            chunks: verify.size.div_ceil(spec.chunk_size.bytes()),
            next_chunk: Chunk(verify.position() / spec.chunk_size.bytes()),
            bytes_compared: verify.bytes_compared,
            bytes_left: left,
            bytes_per_s: verify.rate,
            seconds_left: (is_running && verify.rate > 0).then(|| left.div_ceil(verify.rate.max(1))),
            yielding: is_running && self.yields_to_guest(now),
            members: spec.members.iter().map(|m| verify.findings.member(m.id)).collect(),
            blocks_differing: verify.findings.differing(),
            blocks_undecided: undecided,
            blocks_repaired: repaired,
            blocks_unsettled: unsettled,
            differences,
            more_differences,
            unsettled: verify.findings.unsettled_ranges(),
            last_error: verify.last_error.clone(),
        })
    }

    /// How many blocks the verify has found to differ, and whether it is over.
    #[must_use]
    pub(crate) fn verify_found(&self) -> Option<(u64, bool)> {
        self.verify.as_ref().map(|v| (v.findings.differing(), !v.is_running()))
    }

    fn verify_state(&self, verify: &Verify) -> VerifyState {
        match &verify.phase {
            Phase::Over(state) => state.clone(),
            Phase::Running if verify.round.is_some() => VerifyState::Repairing,
            Phase::Running if !self.is_active() => {
                VerifyState::Waiting("the pool is suspended, or its view changes".into())
            }
            Phase::Running if self.view_clean().len() < 2 => {
                VerifyState::Waiting("there is only one Clean member".into())
            }
            Phase::Running => VerifyState::Running,
        }
    }

    fn yields_to_guest(&self, now: Time) -> bool {
        self.last_request.is_some_and(|at| now - at < GUEST_ACTIVE)
    }

    /// Whether a view of this client was committed, and the client is not leaving.
    fn is_attached(&self) -> bool {
        matches!(self.state, State::Active | State::Changing { attach: false, .. }) && !self.detach_requested
    }

    /// Ends the verify, if one is under way.
    pub(super) fn end_verify(&mut self, state: VerifyState) {
        self.release_hold();
        self.verify_disturbed();
        let now = self.now;
        let Some(verify) = self.verify.as_mut().filter(|v| v.is_running()) else { return };
        let text = format!(
            "{}, {} blocks differ",
            match &state {
                VerifyState::Interrupted(reason) => format!("is interrupted: {reason}"),
                VerifyState::Cancelled => "is cancelled".to_owned(),
                _ => "is done".to_owned(),
            },
            verify.findings.differing()
        );
        verify.phase = Phase::Over(state);
        verify.ended = now;
        verify.round = None;
        self.notice(Notice::Verify(text));
    }

    /// The client detaches, or lost the pool.
    pub(super) fn interrupt_verify(&mut self, reason: &str) {
        self.end_verify(VerifyState::Interrupted(reason.to_owned()));
    }

    /// The view changes, or the attachment ends: what is under way says nothing any more, and nobody is held for it.
    pub(super) fn verify_disturbed(&mut self) {
        let now = self.now;
        self.drop_hold();
        let Some(verify) = self.verify.as_mut().filter(|v| v.is_running()) else { return };
        let pieces = std::mem::take(&mut verify.under_way);
        verify.again.extend(pieces.into_values().map(|p| p.offset));
        verify.last_progress = now;
    }

    /// When the verify has something to do, if it waits for a time.
    pub(super) fn verify_deadline(&self) -> Option<Time> {
        let verify = self.verify.as_ref().filter(|v| v.is_running())?;
        if !self.is_active() {
            return None; // It goes on with the next view.
        }
        let hold = verify.hold.as_ref().map(|h| h.limit);
        let suspect = if hold.is_none() { verify.next_suspect() } else { None };
        let is_idle = verify.under_way.is_empty() && verify.hold.is_none() && verify.round.is_none();
        let next = (verify.next_at > self.now || is_idle).then_some(verify.next_at);
        let due = [hold, suspect, next].into_iter().flatten().min()?;
        // Whatever cannot be done at once is tried again soon.
        Some(due.max(self.now + Duration::from_millis(1)))
    }

    /// Does what is due for the verify.
    pub(super) fn pump_verify(&mut self) {
        if !self.verify.as_ref().is_some_and(|v| v.is_running()) || !self.is_active() {
            return;
        }
        self.measure_verify();
        self.tick_hold();
        if self.is_quiescing() {
            return; // The barrier is short.
        }
        self.give_up_late_pieces();
        if self.repair_is_under_way() {
            return;
        }
        if self.view_clean().len() < 2 {
            if let Some(verify) = &mut self.verify {
                verify.last_progress = self.now;
            }
            return;
        }
        self.start_hold();
        while self.start_piece() {}
        self.finish_pass();
    }

    fn measure_verify(&mut self) {
        let now = self.now;
        let Some(verify) = &mut self.verify else { return };
        let elapsed = now - verify.rate_at;
        if elapsed < RATE_INTERVAL && verify.rate > 0 {
            return;
        }
        let bytes = u128::from(verify.bytes_compared - verify.rate_bytes) * 1000;
        if bytes > 0 || elapsed >= RATE_INTERVAL {
            verify.rate = u64::try_from(bytes / elapsed.as_millis().max(1)).unwrap_or(u64::MAX);
            if elapsed >= RATE_INTERVAL {
                (verify.rate_at, verify.rate_bytes) = (now, verify.bytes_compared);
            }
        }
    }

    /// A piece whose answer does not come is asked for anew.
    fn give_up_late_pieces(&mut self) {
        let (now, timeout) = (self.now, self.config.leg_timeout);
        let Some(verify) = &mut self.verify else { return };
        let late: Vec<u64> =
            verify.under_way.iter().filter(|(_, p)| now - p.sent > timeout).map(|(n, _)| *n).collect();
        for number in late {
            if let Some(piece) = verify.under_way.remove(&number) {
                verify.again.push_back(piece.offset);
                let text = format!("members {} did not answer within the leg timeout", piece.pending);
                verify.failed(text, now);
            }
        }
        if now - verify.last_progress > PATIENCE {
            let reason = verify.last_error.clone().unwrap_or_else(|| "no member answers".into());
            self.interrupt_verify(&format!("no comparison succeeded for a minute: {reason}"));
        }
    }

    /// Starts the comparison of the next piece; false when none is due now.
    fn start_piece(&mut self) -> bool {
        let (now, clean) = (self.now, self.view_clean());
        let is_yielding = self.yields_to_guest(now);
        let (Some(spec), Some(verify)) = (&self.spec, &mut self.verify) else { return false };
        let most = if is_yielding { 1 } else { MAX_UNDER_WAY };
        if !verify.is_running()
            || verify.under_way.len() >= most
            || verify.suspects.len() >= MAX_SUSPECTS
            || verify.wants_repair(now)
            || now < verify.next_at
        {
            return false;
        }
        let size = Verify::piece_size(spec);
        let offset = match verify.again.pop_front() {
            Some(offset) => offset,
            None if verify.cursor < verify.size => {
                let offset = verify.cursor;
                verify.cursor = (offset + size).min(verify.size);
                offset
            }
            None => return false,
        };
        let length = u32::try_from(size.min(verify.size - offset)).unwrap_or(MAX_COMPARE);
        if let Some(limit) = verify.options.bytes_per_s {
            let nanos = u64::from(length).saturating_mul(1_000_000_000) / limit.max(1);
            verify.next_at = now + Duration::from_nanos(nanos);
        }
        verify.number += 1;
        let number = verify.number;
        let pairs = ring(clean, offset / size);
        let pending = pairs.iter().map(|(member, _)| *member).collect();
        let piece =
            Piece { offset, length, sent: now, members: clean, pending, differs: 0, unreadable: false };
        verify.under_way.insert(number, piece);
        for (member, reference) in pairs {
            let line = self.spec.as_ref().and_then(|s| s.member(reference));
            let Some(address) = line.map(|m| m.address.clone()) else { continue };
            let header = self.range_header(Kind::Compare, number, (offset, length));
            self.send_body(member, header, Compare { reference, address }.encode());
        }
        true
    }

    fn range_header(&self, kind: Kind, number: u64, (offset, length): (u64, u32)) -> MessageHeader {
        MessageHeader { sequence: Sequence(number), offset, length, ..self.header(kind) }
    }

    /// Whether an answer is of the present attachment and view.
    fn is_of_now(&self, header: &MessageHeader) -> bool {
        self.is_active()
            && header.epoch == self.epoch
            && self.view.as_ref().is_some_and(|v| v.number == header.view)
    }

    pub(super) fn compare_reply(&mut self, member: MemberId, header: &MessageHeader, body: &[u8]) {
        let (now, is_of_now) = (self.now, self.is_of_now(header));
        let number = header.sequence.0;
        let is_yielding = self.yields_to_guest(now);
        let Some(verify) = &mut self.verify else { return };
        let Some(piece) = verify.under_way.get_mut(&number).filter(|p| p.pending.contains(member)) else {
            return;
        };
        if header.status != Status::Ok {
            let offset = piece.offset;
            verify.under_way.remove(&number);
            verify.again.push_back(offset);
            if is_of_now {
                let words = String::from_utf8_lossy(body);
                verify.failed(
                    format!(
                        "member {member}: {}{}{words}",
                        header.status,
                        if words.is_empty() { "" } else { ": " }
                    ),
                    now,
                );
            }
            return;
        }
        let reply = match CompareReply::decode(body) {
            Ok(reply) => reply,
            Err(error) => {
                return self.drop_member_for(member, Cause::Refused, &format!("protocol error: {error}"));
            }
        };
        piece.pending.remove(member);
        piece.differs |= reply.differs;
        piece.unreadable |= reply.unreadable;
        if !piece.pending.is_empty() {
            return;
        }
        let Some(piece) = verify.under_way.remove(&number) else { return };
        let blocks = u64::from(piece.length) / BLOCK_SIZE;
        verify.bytes_compared += u64::from(piece.length);
        verify.findings.compared(blocks, piece.members);
        verify.last_progress = now;
        verify.last_error = None;
        let bits = if piece.unreadable { u64::MAX } else { piece.differs };
        verify.suspects.extend(hold::suspects(piece.offset, blocks, bits));
        if is_yielding {
            verify.next_at = verify.next_at.max(now + (now - piece.sent) * YIELD_FACTOR);
        }
    }

    /// All was compared: repairs what is to be repaired, or ends.
    fn finish_pass(&mut self) {
        let Some(verify) = self.verify.as_ref().filter(|v| v.is_running()) else { return };
        let is_drained = verify.under_way.is_empty() && verify.hold.is_none();
        let is_compared = is_drained
            && verify.cursor >= verify.size
            && verify.again.is_empty()
            && verify.suspects.is_empty();
        if is_compared && verify.repairs.is_empty() {
            self.end_verify(VerifyState::Done);
        } else if is_compared || (is_drained && verify.wants_repair(self.now)) {
            self.start_repair();
        }
    }
}

/// Which member compares itself with which, for the `index`-th piece: all edges of the ring but one.
fn ring(members: MemberSet, index: u64) -> Vec<(MemberId, MemberId)> {
    let list: Vec<_> = members.iter().collect();
    let count = list.len() as u64;
    let edges = (0..count).filter(|edge| *edge != index % count.max(1));
    let at = |i: u64| list[usize::try_from(i % count.max(1)).unwrap_or(0)];
    edges.map(|edge| (at(edge), at(edge + 1))).collect()
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests;
