//! Comparing this member's data with that of another Clean one, range by range, by digests.
//!
//! ```text
//!   coordinator ── Compare ──▶ this member ── Digest ──▶ the reference
//!                                   │ reads its own          │ reads its own
//!   coordinator ◀─ CompareReply ────┘ ◀── DigestReply ───────┘
//! ```
//! A Clean member has no resync, so its one link to another node is free for this. What is read here and there is read at
//! different moments; whether a difference is a real one is for the coordinator to find out, which can hold writes back.

use std::collections::HashMap;
use std::time::Duration;

use super::{ConnectionId, DiskOperation, IoId, Output, Replica};
use crate::pool::{Address, BLOCK_SIZE, MemberId};
use crate::time::Time;
use crate::wire::{Compare, CompareReply, DigestReply, Kind, MAX_COMPARE, MessageHeader, Role, Status};

/// Most comparisons that may be under way here: a coordinator has a few.
const MAX_COMPARES: usize = 64;
/// Most ranges that are being read for others; a reference serves one member and the coordinator.
const MAX_DIGESTS: usize = 128;
/// A reference that does not answer for so long is given up.
const PATIENCE: Duration = Duration::from_secs(3);

/// The link to the reference.
struct Link {
    reference: MemberId,
    address: Address,
    is_up: bool,
}

/// What a member has in a range.
enum Found {
    Digests(Vec<u64>),
    Unreadable,
}

struct Comparing {
    connection: ConnectionId,
    header: MessageHeader,
    since: Time,
    here: Option<Found>,
    there: Option<Found>,
}

/// What a read is for.
enum Purpose {
    Compare(u64),
    Answer(ConnectionId, MessageHeader),
}

/// The comparisons under way.
#[derive(Default)]
pub(super) struct Verify {
    link: Option<Link>,
    compares: HashMap<u64, Comparing>,
    next: u64,
    reads: HashMap<IoId, Purpose>,
}

impl Replica {
    /// The coordinator asks how a range here compares with that of another member.
    pub(super) fn compare(&mut self, connection: ConnectionId, header: &MessageHeader, body: &[u8]) {
        let refuse = |this: &mut Self, status, text: &str| {
            this.answer(connection, header, Kind::CompareReply, status, text.as_bytes().to_vec());
        };
        let compare = match Compare::decode(body) {
            Ok(compare) => compare,
            Err(error) => return refuse(self, Status::BadRequest, &error.to_string()),
        };
        let is_free = self.resync.is_none() && self.holder_connection() == Some(connection);
        match self.digest_status(header) {
            _ if compare.reference == self.member => {
                return refuse(self, Status::BadRequest, "a member is not compared with itself");
            }
            Status::Ok if !is_free => return refuse(self, Status::NotAttached, ""),
            Status::Ok if self.verify.compares.len() >= MAX_COMPARES => {
                return refuse(self, Status::Limit, "");
            }
            Status::Ok => {}
            status => return refuse(self, status, ""),
        }
        if self.spec.member(compare.reference).is_none_or(|m| m.address != compare.address) {
            let text = format!(
                "the specification does not have member {} at {}",
                compare.reference, compare.address
            );
            return refuse(self, Status::BadRequest, &text);
        }
        let is_other = |l: &Link| l.reference != compare.reference || l.address != compare.address;
        if self.verify.link.as_ref().is_some_and(is_other) {
            self.outputs.push_back(Output::PeerClose);
            self.fail_compares("another reference was named");
        }
        self.verify.next += 1;
        let number = self.verify.next;
        let comparing = Comparing { connection, header: *header, since: self.now, here: None, there: None };
        self.verify.compares.insert(number, comparing);
        match &self.verify.link {
            Some(link) if link.is_up => self.begin_compare(number),
            Some(_) => {} // With the others, when the link stands.
            None => {
                let Compare { reference, address } = compare;
                self.outputs.push_back(Output::PeerConnect(address.clone()));
                self.verify.link = Some(Link { reference, address, is_up: false });
            }
        }
    }

    /// Another member, or the coordinator, asks what is here.
    pub(super) fn digest(&mut self, connection: ConnectionId, role: Role, header: &MessageHeader) {
        // Another node compares for the coordinator. A client has to be the coordinator.
        let is_let = role == Role::Peer || self.holder_connection() == Some(connection);
        match self.digest_status(header) {
            Status::Ok if !is_let => {
                self.answer(connection, header, Kind::DigestReply, Status::NotAttached, Vec::new());
            }
            Status::Ok if self.verify.reads.len() >= MAX_DIGESTS => {
                self.answer(connection, header, Kind::DigestReply, Status::Limit, Vec::new());
            }
            Status::Ok => self.read_digests(Purpose::Answer(connection, *header), header),
            status => self.answer(connection, header, Kind::DigestReply, status, Vec::new()),
        }
    }

    /// Whether a range may be read for a comparison.
    fn digest_status(&self, header: &MessageHeader) -> Status {
        let end = header.offset.checked_add(header.length.into());
        let fits = end.is_some_and(|end| end <= self.spec.size)
            && header.offset.is_multiple_of(BLOCK_SIZE)
            && u64::from(header.length).is_multiple_of(BLOCK_SIZE)
            && (1..=MAX_COMPARE).contains(&header.length);
        if !fits {
            Status::BadRequest
        } else if !self.may_be_source(header) {
            Status::NotAttached
        } else if header.view > self.view.number {
            Status::StaleView
        } else {
            Status::Ok
        }
    }

    fn read_digests(&mut self, purpose: Purpose, header: &MessageHeader) {
        let io = self.insert_own(DiskOperation::Digest);
        self.verify.reads.insert(io, purpose);
        self.counters.digested_blocks += u64::from(header.length) / BLOCK_SIZE;
        let (offset, length) = (header.offset, header.length);
        self.outputs.push_back(Output::Disk { io, operation: DiskOperation::Digest, offset, length });
    }

    fn begin_compare(&mut self, number: u64) {
        let Some(header) = self.verify.compares.get(&number).map(|c| c.header) else { return };
        let ask = MessageHeader {
            sequence: crate::pool::Sequence(number),
            offset: header.offset,
            length: header.length,
            epoch: header.epoch,
            view: header.view,
            ..MessageHeader::new(Kind::Digest, self.spec.id)
        };
        self.outputs.push_back(Output::PeerSend(ask));
        self.read_digests(Purpose::Compare(number), &header);
    }

    /// True if the disk read was for a comparison. `None`: it failed.
    pub(super) fn digest_read_done(&mut self, io: IoId, digests: Option<&[u64]>) -> bool {
        let Some(purpose) = self.verify.reads.remove(&io) else { return false };
        match purpose {
            Purpose::Compare(number) => {
                if let Some(comparing) = self.verify.compares.get_mut(&number) {
                    comparing.here = Some(digests.map_or(Found::Unreadable, |d| Found::Digests(d.to_vec())));
                }
                self.finish_compare(number);
            }
            Purpose::Answer(connection, header) => match digests {
                Some(digests) => {
                    let body = DigestReply(digests.to_vec()).encode();
                    self.answer(connection, &header, Kind::DigestReply, Status::Ok, body);
                }
                None => {
                    self.answer(connection, &header, Kind::DigestReply, Status::IoError, Vec::new());
                }
            },
        }
        true
    }

    fn finish_compare(&mut self, number: u64) {
        let is_done = |c: &Comparing| c.here.is_some() && c.there.is_some();
        if !self.verify.compares.get(&number).is_some_and(is_done) {
            return;
        }
        let Some(Comparing { connection, header, here, there, .. }) = self.verify.compares.remove(&number)
        else {
            return;
        };
        let reply = match (here, there) {
            (Some(Found::Digests(here)), Some(Found::Digests(there))) => {
                let pairs = here.iter().zip(&there).zip(0u32..);
                let differs =
                    pairs.filter(|((a, b), _)| a != b).fold(0, |bits, (_, i)| bits | 1u64 << (i % 64));
                CompareReply { differs, unreadable: false }
            }
            _ => CompareReply { differs: 0, unreadable: true },
        };
        self.answer(connection, &header, Kind::CompareReply, Status::Ok, reply.encode());
    }

    /// Whether the link to another node is for comparisons.
    pub(super) const fn has_compare_link(&self) -> bool {
        self.verify.link.is_some()
    }

    /// The link to the reference stands.
    pub(super) fn compare_link_up(&mut self) {
        if let Some(link) = &mut self.verify.link {
            link.is_up = true;
        }
        let mut waiting: Vec<u64> = self.verify.compares.keys().copied().collect();
        waiting.sort_unstable();
        for number in waiting {
            self.begin_compare(number);
        }
    }

    /// It is gone, or could not be made: the coordinator asks again.
    pub(super) fn fail_compares(&mut self, reason: &str) {
        let Some(link) = self.verify.link.take() else { return };
        let text = format!("member {} at {}: {reason}", link.reference, link.address);
        let mut numbers: Vec<u64> = self.verify.compares.keys().copied().collect();
        numbers.sort_unstable();
        for number in numbers {
            let Some(c) = self.verify.compares.remove(&number) else { continue };
            let text = text.clone().into_bytes();
            self.answer(c.connection, &c.header, Kind::CompareReply, Status::IoError, text);
        }
    }

    /// A message of the reference.
    pub(super) fn reference_message(&mut self, header: &MessageHeader, body: &[u8]) {
        if header.kind != Kind::DigestReply {
            let text = format!("protocol error: {:?} is not expected from a reference", header.kind);
            self.outputs.push_back(Output::PeerClose);
            return self.fail_compares(&text);
        }
        let number = header.sequence.0;
        let Some(comparing) = self.verify.compares.get_mut(&number) else { return };
        let blocks = u64::from(comparing.header.length) / BLOCK_SIZE;
        match (header.status, DigestReply::decode(body, blocks)) {
            (Status::Ok, Ok(digests)) => comparing.there = Some(Found::Digests(digests.0)),
            (Status::Ok, Err(error)) => {
                self.outputs.push_back(Output::PeerClose);
                return self.fail_compares(&format!("protocol error: {error}"));
            }
            (Status::IoError, _) => comparing.there = Some(Found::Unreadable),
            (status, _) => {
                let (connection, asked) = (comparing.connection, comparing.header);
                self.verify.compares.remove(&number);
                let text = format!("the reference refused: {status}").into_bytes();
                return self.answer(connection, &asked, Kind::CompareReply, status, text);
            }
        }
        self.finish_compare(number);
    }

    /// Once a second: a reference that is silent for too long is given up.
    pub(super) fn tick_verify(&mut self) {
        let is_late = |c: &Comparing| self.now - c.since > PATIENCE;
        if self.verify.compares.values().any(is_late) {
            self.outputs.push_back(Output::PeerClose);
            self.fail_compares("it does not answer");
        }
    }

    /// The coordinator is gone, or the link is wanted for a resync. Reads that are under way end as they may.
    pub(super) fn drop_verify(&mut self) {
        self.verify.compares.clear();
        if self.verify.link.take().is_some() {
            self.outputs.push_back(Output::PeerClose);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::{Bench, member};
    use super::super::{DiskResult, Event, ReplyPayload};
    use super::*;
    use crate::pool::Sequence;

    /// Attached; member 2 is the reference.
    fn bench() -> Bench {
        let mut bench = Bench::new(true);
        bench.attach(1, 1);
        bench.durable();
        bench
    }

    fn ask(bench: &mut Bench, number: u64, blocks: u32) {
        let body = Compare { reference: member(2), address: Address::tcp("node", 3) }.encode();
        let sequence = Sequence(number);
        let header =
            MessageHeader { sequence, offset: 8192, length: blocks * 4096, ..bench.header(Kind::Compare, 1) };
        bench.message(1, header, &body);
    }

    fn take_read(bench: &mut Bench) -> Option<IoId> {
        let is_read = |o: &Output| matches!(o, Output::Disk { operation: DiskOperation::Digest, .. });
        let at = bench.outputs.iter().position(is_read)?;
        if let Output::Disk { io, .. } = bench.outputs.remove(at) { Some(io) } else { None }
    }

    fn replies(bench: &Bench) -> Vec<(Status, Option<CompareReply>)> {
        let reply = |o: &Output| match o {
            Output::Send(_, header, payload) if header.kind == Kind::CompareReply => {
                let body = if let ReplyPayload::Body(body) = payload { &body[..] } else { &[] };
                Some((header.status, CompareReply::decode(body).ok()))
            }
            _ => None,
        };
        bench.outputs.iter().filter_map(reply).collect()
    }

    #[test]
    fn a_member_compares_itself_with_the_reference_and_names_the_blocks_that_differ() {
        let mut bench = bench();
        ask(&mut bench, 7, 3);
        assert!(bench.outputs.contains(&Output::PeerConnect(Address::tcp("node", 3))));
        assert_eq!(take_read(&mut bench), None, "nothing is read before there is somebody to compare with");
        bench.apply(Event::PeerUp);
        let asked = bench.take_sent(Kind::Digest);
        assert_eq!(asked.iter().map(|h| (h.offset, h.length)).collect::<Vec<_>>(), vec![(8192, 12288)]);
        let io = take_read(&mut bench).unwrap();
        bench.apply(Event::Digested(io, &[1, 2, 3]));
        assert_eq!(replies(&bench), vec![]);
        let body = DigestReply(vec![1, 9, 9]).encode();
        bench.apply(Event::PeerMessage(&asked[0].reply(Kind::DigestReply, Status::Ok), &body));
        assert_eq!(
            replies(&bench),
            vec![(Status::Ok, Some(CompareReply { differs: 0b110, unreadable: false }))]
        );
        // The link stays for the next one.
        ask(&mut bench, 8, 1);
        assert_eq!(bench.take_sent(Kind::Digest).len(), 1);
    }

    #[test]
    fn what_one_of_the_two_cannot_read_is_no_difference() {
        let mut bench = bench();
        ask(&mut bench, 7, 2);
        bench.apply(Event::PeerUp);
        let asked = bench.take_sent(Kind::Digest);
        let io = take_read(&mut bench).unwrap();
        bench.apply(Event::Disk(io, DiskResult::Failed));
        let body = DigestReply(vec![1, 2]).encode();
        bench.apply(Event::PeerMessage(&asked[0].reply(Kind::DigestReply, Status::Ok), &body));
        assert_eq!(replies(&bench), vec![(Status::Ok, Some(CompareReply { differs: 0, unreadable: true }))]);
    }

    #[test]
    fn a_reference_that_cannot_be_reached_or_is_silent_fails_the_comparisons() {
        let mut bench = bench();
        ask(&mut bench, 7, 1);
        ask(&mut bench, 8, 1);
        bench.apply(Event::PeerDown("connection refused"));
        assert_eq!(replies(&bench), vec![(Status::IoError, None); 2]);
        bench.outputs.clear();
        ask(&mut bench, 9, 1);
        bench.apply(Event::PeerUp);
        bench.replica.apply(Event::Tick, Time(0) + PATIENCE + Duration::from_nanos(1));
        bench.apply(Event::Tick);
        assert!(bench.outputs.contains(&Output::PeerClose));
        assert_eq!(replies(&bench), vec![(Status::IoError, None)]);
    }

    #[test]
    fn an_attach_ends_comparisons_and_a_resync_takes_the_link_over() {
        let mut bench = bench();
        ask(&mut bench, 7, 1);
        bench.apply(Event::PeerUp);
        let io = take_read(&mut bench).unwrap();
        bench.apply(Event::Disk(io, DiskResult::Failed));
        bench.outputs.clear();
        bench.prepare();
        assert!(bench.outputs.contains(&Output::PeerClose) && !bench.replica.has_compare_link());
        ask(&mut bench, 8, 1);
        assert_eq!(replies(&bench), vec![(Status::NotAttached, None)], "the link is for the resync now");
    }

    #[test]
    fn only_what_is_in_the_pool_and_short_enough_is_read_and_only_by_a_clean_member() {
        let mut bench = bench();
        let ask = |bench: &mut Bench, epoch, view: u64, offset, length| {
            bench.outputs.clear();
            let view = crate::pool::ViewNumber(view);
            let header = MessageHeader { view, offset, length, ..bench.header(Kind::Digest, epoch) };
            bench.message_as(Role::Peer, 9, header, &[]);
            (bench.answer(Kind::DigestReply), take_read(bench).is_some())
        };
        assert_eq!(ask(&mut bench, 1, 1, 0, 4096), (None, true), "any member may ask");
        for (offset, length) in [(0, 0), (512, 4096), (0, 512), (0, MAX_COMPARE + 4096), (16 << 20, 4096)] {
            assert_eq!(ask(&mut bench, 1, 1, offset, length), (Some(Status::BadRequest), false));
        }
        assert_eq!(ask(&mut bench, 2, 1, 0, 4096), (Some(Status::NotAttached), false), "another attachment");
        assert_eq!(ask(&mut bench, 1, 2, 0, 4096), (Some(Status::StaleView), false), "a later view");
    }
}
