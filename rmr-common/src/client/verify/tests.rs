//! A client with three members that are played here, message by message; the simulator plays whole pools.

use super::*;
use crate::auth::Nonce;
use crate::client::{Config, Event, LinkId, Operation, Output, Payload, PoolSelector, Token};
use crate::pool::{
    Address, Attested, Block, BootId, ChunkSize, ClientId, Epoch, MemberSpec, MemberState, PoolId, Position,
    StoreId, VerifyOutcome, View,
};
use crate::wire::{Attach, AttachReply, DigestReply, HelloReply, Limits, MAX_IO, PROTOCOL_VERSION, SetView};

const MIB: u64 = 1 << 20;

fn member(index: u8) -> MemberId {
    MemberId::new(index).unwrap()
}

fn after(milliseconds: u64) -> Time {
    Time(0) + Duration::from_millis(milliseconds)
}

struct Bench {
    client: Client,
    spec: PoolSpec,
    view: View,
    epoch: Epoch,
    now: Time,
    /// What the client sent and nobody has answered.
    sent: Vec<(MemberId, MessageHeader, Vec<u8>)>,
    done: Vec<Token>,
}

impl Bench {
    /// A pool of 2 MiB, attached to its members.
    fn new(members: u8) -> Self {
        let line = |i: u8| MemberSpec {
            id: member(i),
            store: StoreId::from_bytes([i + 1; 16]),
            address: Address::tcp("node", 1 + u16::from(i)),
            maintenance: false,
        };
        let spec = PoolSpec {
            id: PoolId::from_bytes([9; 16]),
            name: "p".into(),
            size: 2 * MIB,
            chunk_size: ChunkSize::default(),
            logical_block_size: 512,
            members: (0..members).map(line).collect(),
        };
        let view = View::initial(spec.members.iter().map(|m| (m.id, m.store)));
        let seeds: Vec<_> = spec.members.iter().map(|m| m.address.clone()).collect();
        let config = Config::new(ClientId::from_bytes([1; 16]), "a test");
        let client = Client::new(config, PoolSelector::Id(spec.id), &seeds, Time(0));
        let (sent, done) = (Vec::new(), Vec::new());
        let mut bench = Self { client, spec, view, epoch: Epoch(0), now: Time(0), sent, done };
        bench.settle();
        for link in 0..members {
            bench.apply(Event::LinkUp(LinkId(link), Nonce([1; 32])));
        }
        assert!(bench.client.is_active());
        bench
    }

    fn apply(&mut self, event: Event<'_>) {
        self.client.apply(event, self.now);
        self.settle();
    }

    fn at(&mut self, now: Time) {
        self.now = now;
        self.apply(Event::Tick);
    }

    /// Takes outputs in; what belongs to attach and views is answered well.
    fn settle(&mut self) {
        while let Some(output) = self.client.take_output() {
            match output {
                Output::Send(link, header, payload) => {
                    let body = if let Payload::Body(body) = payload { body } else { Vec::new() };
                    self.take_in(member(link.0), header, body);
                }
                Output::Complete(token, Ok(())) => self.done.push(token),
                _ => {}
            }
        }
    }

    fn take_in(&mut self, from: MemberId, header: MessageHeader, body: Vec<u8>) {
        let reply = match header.kind {
            Kind::Hello => HelloReply {
                version: PROTOCOL_VERSION,
                capabilities: 0,
                limits: Limits { max_io: MAX_IO, slots: 8, max_bytes: 16 << 20 },
                member: from,
                write_through: true,
                host_boot: BootId::from_bytes([1; 16]),
                process_boot: BootId::from_bytes([1; 16]),
                spec: self.spec.clone(),
                view: self.view.clone(),
                epoch: self.epoch,
                position: Position::default(),
                attested: Attested::default(),
                clean_detach: true,
            }
            .encode(),
            Kind::Attach => {
                assert!(Attach::decode(&body).is_ok());
                self.epoch = header.epoch;
                AttachReply {
                    view: self.view.clone(),
                    spec: self.spec.clone(),
                    last_client: None,
                    clean_detach: true,
                    slots: Vec::new(),
                    watermark: Sequence(0),
                    tables_lost: false,
                    intents: Vec::new(),
                    position: Position::default(),
                    attested: Attested::default(),
                    flush_failed: false,
                }
                .encode()
            }
            Kind::SetView if self.view == SetView::decode(&body).unwrap().view => Vec::new(),
            Kind::SetView => {
                self.view = SetView::decode(&body).unwrap().view;
                self.sent.push((from, header, body));
                Vec::new()
            }
            Kind::Mark => Vec::new(),
            _ => return self.sent.push((from, header, body)),
        };
        let kind = match header.kind {
            Kind::Hello => Kind::HelloReply,
            Kind::Attach => Kind::AttachReply,
            Kind::Mark => Kind::MarkReply,
            _ => Kind::SetViewReply,
        };
        self.reply(from, &header.reply(kind, Status::Ok), reply);
    }

    fn reply(&mut self, from: MemberId, header: &MessageHeader, body: Vec<u8>) {
        let header = MessageHeader { payload: u32::try_from(body.len()).unwrap(), ..*header };
        self.apply(Event::Message(LinkId(from.as_u8()), &header, &body));
    }

    fn take(&mut self, kind: Kind) -> Vec<(MemberId, MessageHeader)> {
        let taken = self.sent.iter().filter(|(_, h, _)| h.kind == kind).map(|(m, h, _)| (*m, *h)).collect();
        self.sent.retain(|(_, h, _)| h.kind != kind);
        taken
    }

    /// Answers comparisons until none comes: `differs` says in which blocks of the pool.
    fn compare_all(&mut self, differs: &[u64]) {
        loop {
            let asked = self.take(Kind::Compare);
            if asked.is_empty() {
                return;
            }
            for (from, header) in asked {
                let first = header.offset / BLOCK_SIZE;
                let bits = (0..u64::from(header.length) / BLOCK_SIZE)
                    .filter(|i| differs.contains(&(first + i)))
                    .fold(0, |bits, i| bits | 1 << i);
                let body = CompareReply { differs: bits, unreadable: false }.encode();
                self.reply(from, &header.reply(Kind::CompareReply, Status::Ok), body);
            }
        }
    }

    /// Answers the digests that are asked for; `content` says what a member has in a block.
    fn digest_all(&mut self, content: impl Fn(u8, u64) -> u64) -> usize {
        let asked = self.take(Kind::Digest);
        for (from, header) in &asked {
            let first = header.offset / BLOCK_SIZE;
            let blocks = first..first + u64::from(header.length) / BLOCK_SIZE;
            let body = DigestReply(blocks.map(|b| content(from.as_u8(), b)).collect()).encode();
            self.reply(*from, &header.reply(Kind::DigestReply, Status::Ok), body);
        }
        asked.len()
    }

    fn start(&mut self, options: VerifyOptions) {
        self.client.start_verify(options, self.now).unwrap();
        self.settle();
    }

    fn write(&mut self, token: u64, offset: u64) {
        self.client.submit(Token(token), Operation::Write, offset, 4096, self.now);
        self.settle();
    }

    fn answer_writes(&mut self) {
        for (from, header) in self.take(Kind::Write) {
            self.reply(from, &header.reply(Kind::IoReply, Status::Ok), Vec::new());
        }
    }

    fn report(&self) -> VerifyReport {
        self.client.verify_report(self.now).unwrap()
    }
}

#[test]
fn every_piece_is_compared_by_all_members_but_one_in_turn() {
    let mut bench = Bench::new(3);
    bench.start(VerifyOptions::default());
    let asked = bench.take(Kind::Compare);
    assert_eq!(asked.len(), MAX_UNDER_WAY * 2);
    let of = |piece: u64| -> Vec<u8> {
        asked
            .iter()
            .filter(|(_, h)| h.offset == piece * u64::from(MAX_COMPARE))
            .map(|(m, _)| m.as_u8())
            .collect()
    };
    assert_eq!([of(0), of(1), of(2)], [vec![1, 2], vec![0, 2], vec![0, 1]]);
    for (from, header) in asked {
        let body = CompareReply { differs: 0, unreadable: false }.encode();
        bench.reply(from, &header.reply(Kind::CompareReply, Status::Ok), body);
    }
    bench.compare_all(&[]);
    let report = bench.report();
    assert_eq!((report.state, report.bytes_compared, report.bytes_left), (VerifyState::Done, 2 * MIB, 0));
    assert_eq!(report.members[2].blocks_compared, 512);
    assert_eq!(bench.take(Kind::Digest).len(), 0);
}

#[test]
fn a_difference_that_is_not_there_when_writes_are_held_is_none() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions::default());
    bench.compare_all(&[5]);
    assert_eq!(bench.digest_all(|_, block| block), 2);
    let report = bench.report();
    assert_eq!((report.state, report.blocks_differing), (VerifyState::Done, 0));
}

#[test]
fn a_write_waits_for_a_hold_and_for_no_longer_than_allowed() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions::default());
    bench.compare_all(&[5]);
    // Nobody waits: the hold stays for a slow disk.
    bench.at(after(19));
    bench.at(after(21));
    assert_eq!(bench.client.hold_status().map(|(_, waits)| waits), Some(false));
    bench.write(1, 6 * BLOCK_SIZE);
    bench.write(2, 5 * BLOCK_SIZE);
    assert_eq!(bench.take(Kind::Write).len(), 2, "the other one is held");
    assert_eq!(bench.client.deadline(), after(41));
    bench.at(after(41));
    assert_eq!(bench.client.hold_status(), None);
    assert_eq!(bench.take(Kind::Write).len(), 2);
    assert_eq!(bench.report().blocks_differing, 0);
    // What was asked then is answered late, and says nothing.
    bench.digest_all(|member, _| member.into());
    assert_eq!(bench.report().blocks_differing, 0);
}

#[test]
fn a_hold_begins_when_the_writes_before_it_are_complete() {
    let mut bench = Bench::new(2);
    bench.write(1, 5 * BLOCK_SIZE);
    bench.start(VerifyOptions::default());
    bench.now = after(200);
    bench.compare_all(&[5]);
    assert_eq!(bench.take(Kind::Digest).len(), 0);
    bench.answer_writes();
    assert_eq!(bench.done, vec![Token(1)]);
    assert_eq!(bench.digest_all(|member, _| member.into()), 2);
    let report = bench.report();
    assert_eq!((report.blocks_differing, report.blocks_undecided), (1, 1));
    assert_eq!(report.differences[0].same, vec![vec![member(0)], vec![member(1)]]);
}

#[test]
fn what_waits_for_a_hold_goes_on_when_the_verify_is_given_up() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions::default());
    bench.compare_all(&[5]);
    bench.write(1, 5 * BLOCK_SIZE);
    assert_eq!(bench.take(Kind::Write).len(), 0);
    assert!(bench.client.cancel_verify(bench.now));
    bench.settle();
    bench.answer_writes();
    assert_eq!((bench.done.clone(), bench.report().state), (vec![Token(1)], VerifyState::Cancelled));
}

#[test]
fn a_range_that_is_always_too_busy_is_unsettled_in_the_end() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions::default());
    bench.compare_all(&[5]);
    let mut now = 0;
    for token in 0..2000 {
        if bench.report().state.is_over() {
            break;
        }
        bench.write(token, 5 * BLOCK_SIZE);
        now += 25;
        bench.at(after(now));
        bench.answer_writes();
        bench.sent.clear();
    }
    let report = bench.report();
    assert_eq!((report.state, report.blocks_unsettled), (VerifyState::Done, 1));
    assert_eq!(report.unsettled, vec![(5 * BLOCK_SIZE, BLOCK_SIZE)]);
}

#[test]
fn a_view_change_has_pieces_compared_again_without_the_member_that_is_lost() {
    let mut bench = Bench::new(3);
    bench.start(VerifyOptions::default());
    let before = bench.take(Kind::Compare);
    bench.write(1, 0);
    bench.apply(Event::LinkDown(LinkId(2), "connection lost"));
    assert_eq!(bench.view.state(member(2)), Some(MemberState::Out));
    for (from, header) in before.into_iter().filter(|(m, _)| *m != member(2)) {
        let body = CompareReply { differs: 0, unreadable: false }.encode();
        bench.reply(from, &header.reply(Kind::CompareReply, Status::Ok), body);
    }
    assert_eq!(bench.report().bytes_compared, 0, "answers of another view do not count");
    bench.now = after(500);
    bench.apply(Event::Tick);
    bench.compare_all(&[]);
    let report = bench.report();
    assert_eq!((report.state, report.members[2].blocks_not_compared), (VerifyState::Done, 512));
}

#[test]
fn a_comparison_that_fails_comes_again_and_the_verify_ends_when_none_succeeds() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions { from_chunk: Chunk(1), ..VerifyOptions::default() });
    let mut now = 0;
    while !bench.report().state.is_over() {
        for (from, header) in bench.take(Kind::Compare) {
            bench.reply(from, &header.reply(Kind::CompareReply, Status::IoError), b"no way".to_vec());
        }
        now += 1000;
        bench.at(after(now));
        bench.sent.retain(|(_, h, _)| h.kind == Kind::Compare);
        assert!(now < 100_000);
        for link in [0, 1] {
            let pong = MessageHeader { epoch: bench.epoch, ..MessageHeader::new(Kind::Pong, bench.spec.id) };
            bench.reply(member(link), &pong, Vec::new());
        }
    }
    let report = bench.report();
    assert!(
        matches!(&report.state, VerifyState::Interrupted(reason) if reason.contains("no way")),
        "{report:?}"
    );
    assert_eq!((report.next_chunk, now >= 60_000), (Chunk(1), true));
}

#[test]
fn the_rate_is_kept() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions { bytes_per_s: Some(256 << 10), ..VerifyOptions::default() });
    bench.compare_all(&[]);
    assert_eq!(bench.report().bytes_compared, 256 << 10);
    bench.at(after(999));
    bench.compare_all(&[]);
    assert_eq!(bench.report().bytes_compared, 256 << 10);
    bench.at(after(1000));
    bench.compare_all(&[]);
    assert_eq!(bench.report().bytes_compared, 512 << 10);
}

#[test]
fn a_repair_takes_the_wrong_member_out_with_its_blocks_on_record() {
    let mut bench = Bench::new(3);
    bench.start(VerifyOptions { repair: true, ..VerifyOptions::default() });
    bench.compare_all(&[5, 6, 300]);
    while bench.digest_all(|member, block| block + u64::from(member == 1 && block != 300)) > 0 {
        bench.now = bench.now + Duration::from_millis(1);
    }
    let set = bench.sent.iter().rfind(|(_, h, _)| h.kind == Kind::SetView).map(|(_, _, body)| body.clone());
    let set = SetView::decode(&set.unwrap()).unwrap();
    assert_eq!(set.view.out(), MemberSet::only(member(1)));
    let blocks: Vec<_> =
        set.additions.iter().map(|a| (a.members, a.offset / 4096, a.length / 4096)).collect();
    let wrong = MemberSet::only(member(1));
    assert_eq!(blocks, vec![(wrong, 5, 1), (wrong, 6, 1)]);
    let report = bench.report();
    assert_eq!((report.state, report.blocks_differing), (VerifyState::Repairing, 2));
    assert_eq!(report.differences[0].outcome, VerifyOutcome::Pending);
}

#[test]
fn a_repair_never_guesses() {
    let mut bench = Bench::new(2);
    let refused = |bench: &mut Bench, options| bench.client.start_verify(options, bench.now).unwrap_err();
    let repair = VerifyOptions { repair: true, ..VerifyOptions::default() };
    assert!(refused(&mut bench, repair).contains("name the one to trust"));
    let options = VerifyOptions { trust: Some(member(5)), ..repair };
    assert!(refused(&mut bench, options).contains("not Clean"));
    let options = VerifyOptions { from_chunk: Chunk(2), ..VerifyOptions::default() };
    assert!(refused(&mut bench, options).contains("the pool has 2"));
    bench.start(VerifyOptions::default());
    assert!(refused(&mut bench, VerifyOptions::default()).contains("under way"));
    let mut bench = Bench::new(3);
    bench.start(repair);
    bench.compare_all(&[5]);
    bench.digest_all(|member, _| member.into());
    let report = bench.report();
    assert_eq!((report.state, report.blocks_undecided), (VerifyState::Done, 1));
    assert_eq!(report.differences[0].outcome, VerifyOutcome::Undecided);
}

#[test]
fn a_verify_ends_with_its_client_and_says_where_to_go_on() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions::default());
    let compare = bench.take(Kind::Compare);
    let body = CompareReply { differs: 0, unreadable: false }.encode();
    for (from, header) in compare {
        bench.reply(from, &header.reply(Kind::CompareReply, Status::Ok), body.clone());
    }
    bench.apply(Event::Detach);
    let report = bench.report();
    assert_eq!(report.state, VerifyState::Interrupted("the client detaches".into()));
    assert_eq!(report.next_chunk, Chunk(1));
    assert!(bench.client.start_verify(VerifyOptions::default(), bench.now).is_err());
}

#[test]
fn blocks_that_cannot_be_read_are_found_one_by_one() {
    let mut bench = Bench::new(2);
    bench.start(VerifyOptions::default());
    let mut pieces = 0;
    loop {
        let asked = bench.take(Kind::Compare);
        if asked.is_empty() {
            break;
        }
        for (from, header) in asked {
            pieces += 1;
            let reply = CompareReply { differs: 0, unreadable: header.offset == 0 };
            bench.reply(from, &header.reply(Kind::CompareReply, Status::Ok), reply.encode());
        }
    }
    assert_eq!(pieces, 8);
    loop {
        let asked = bench.take(Kind::Digest);
        if asked.is_empty() {
            break;
        }
        for (from, header) in asked {
            let blocks = header.offset / 4096..header.offset / 4096 + u64::from(header.length) / 4096;
            let is_bad = from == member(1) && blocks.contains(&37);
            let body = DigestReply(blocks.collect()).encode();
            let (status, body) = if is_bad { (Status::IoError, Vec::new()) } else { (Status::Ok, body) };
            bench.reply(from, &header.reply(Kind::DigestReply, status), body);
        }
    }
    let report = bench.report();
    assert_eq!((report.state, report.blocks_differing), (VerifyState::Done, 1));
    let found = &report.differences[0];
    assert_eq!((Block(found.offset / 4096), &found.unreadable[..]), (Block(37), &[member(1)][..]));
    assert_eq!(found.wrong, vec![member(1)], "the other one has the only content there is");
}
