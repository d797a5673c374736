//! The client's side of authentication; the handshake itself is tested in `crate::auth`.

use super::super::*;
use crate::auth::{Gate, SecretKey};
use crate::pool::{Attested, BootId, ChunkSize, MemberSpec, Position};
use crate::wire::{Hello, HelloReply, Kind, Limits, PROTOCOL_VERSION, Status};

/// A client of two nodes that are played by the test.
struct Bench {
    client: Client,
    spec: PoolSpec,
    sent: Vec<(LinkId, MessageHeader, Vec<u8>)>,
    notices: Vec<Notice>,
    closed: Vec<LinkId>,
}

impl Bench {
    fn new(keys: &[u8]) -> Self {
        let member = |i: u8| {
            let id = MemberId::new(i).unwrap();
            MemberSpec::new(id, StoreId::from_bytes([i + 1; 16]), Address::tcp("node", 1 + u16::from(i)))
        };
        let spec = PoolSpec {
            id: PoolId::from_bytes([9; 16]),
            name: "p".into(),
            size: 16 << 20,
            chunk_size: ChunkSize::from_bytes(64 << 10).unwrap(),
            logical_block_size: 512,
            members: (0..2).map(member).collect(),
        };
        let mut config = Config::new(ClientId::from_bytes([1; 16]), "test");
        config.keys = KeyRing::new(keys.iter().map(|&k| SecretKey::from_bytes([k; 32])).collect());
        let seeds: Vec<_> = spec.members.iter().map(|m| m.address.clone()).collect();
        let client = Client::new(config, PoolSelector::Name("p".into()), &seeds, Time(1));
        let (sent, notices, closed) = (Vec::new(), Vec::new(), Vec::new());
        let mut bench = Self { client, spec, sent, notices, closed };
        bench.settle();
        for link in 0..2 {
            bench.apply(Event::LinkUp(LinkId(link), Nonce([link; 32])));
        }
        bench
    }

    fn apply(&mut self, event: Event<'_>) {
        self.client.apply(event, Time(2));
        self.settle();
    }

    fn settle(&mut self) {
        while let Some(output) = self.client.take_output() {
            match output {
                Output::Send(link, header, Payload::Body(body)) => self.sent.push((link, header, body)),
                Output::Notice(notice) => self.notices.push(notice),
                Output::Disconnect(link) => self.closed.push(link),
                _ => {}
            }
        }
    }

    /// What was sent last over a link.
    fn last(&self, link: u8) -> (Kind, Vec<u8>) {
        let sent = self.sent.iter().rev().find(|(l, ..)| *l == LinkId(link)).expect("something was sent");
        (sent.1.kind, sent.2.clone())
    }

    fn say(&mut self, link: u8, kind: Kind, status: Status, body: &[u8]) {
        let header = MessageHeader { status, ..MessageHeader::new(kind, self.spec.id) };
        self.apply(Event::Message(LinkId(link), &header, body));
    }

    fn reply(&self, member: u8) -> Vec<u8> {
        HelloReply {
            version: PROTOCOL_VERSION,
            capabilities: 0,
            limits: Limits { max_io: 1 << 20, slots: 64, max_bytes: 8 << 20 },
            member: MemberId::new(member).unwrap(),
            write_through: true,
            host_boot: BootId::from_bytes([1; 16]),
            process_boot: BootId::from_bytes([1; 16]),
            view: View::initial(self.spec.members.iter().map(|m| (m.id, m.store))),
            spec: self.spec.clone(),
            epoch: Epoch(0),
            position: Position::default(),
            attested: Attested::default(),
            clean_detach: true,
        }
        .encode()
    }

    /// A node with this key greets the link, and whether it lets the client in.
    fn greet(&mut self, link: u8, key: u8) -> bool {
        let (kind, hello) = self.last(link);
        assert_eq!(kind, Kind::Hello);
        let keys = KeyRing::new(vec![SecretKey::from_bytes([key; 32])]);
        let place = (self.spec.members[usize::from(link)].id, self.spec.members[usize::from(link)].store);
        let shows = Hello::decode(&hello).unwrap().nonce.is_some();
        let opened = Gate::open(keys, Nonce([7; 32]), self.spec.id, place, &hello, shows);
        let (gate, challenge) = opened.unwrap().unwrap();
        self.say(link, Kind::Challenge, Status::Ok, &challenge);
        let (kind, proof) = self.last(link);
        assert_eq!(kind, Kind::Proof);
        match gate.check(&proof) {
            Ok(admitted) => {
                let sealed = admitted.seal(self.reply(link));
                self.say(link, Kind::HelloReply, Status::Ok, &sealed);
                true
            }
            Err(denial) => {
                let text = denial.to_string();
                self.say(link, Kind::HelloReply, denial.status(), text.as_bytes());
                false
            }
        }
    }

    fn legs_up(&self) -> usize {
        self.notices.iter().filter(|n| matches!(n, Notice::LegUp(..))).count()
    }

    fn over(&self) -> Option<&OverReason> {
        self.notices.iter().find_map(|n| if let Notice::Over(reason) = n { Some(reason) } else { None })
    }
}

#[test]
fn a_client_with_the_key_attaches_to_nodes_that_have_it() {
    let mut bench = Bench::new(&[1]);
    assert!(bench.greet(0, 1) && bench.greet(1, 1));
    assert_eq!((bench.legs_up(), bench.last(0).0), (2, Kind::Attach));
}

#[test]
fn a_client_without_a_key_is_over_with_the_nodes_words_when_all_want_one() {
    let mut bench = Bench::new(&[]);
    let words = "node a: this pool requires a key";
    bench.say(0, Kind::HelloReply, Status::KeyRequired, words.as_bytes());
    assert_eq!(bench.over(), None, "another node may be right");
    bench.say(1, Kind::HelloReply, Status::KeyRequired, words.as_bytes());
    let Some(OverReason::Refused { text, .. }) = bench.over() else { panic!("{:?}", bench.notices) };
    assert_eq!(text, words);
}

#[test]
fn a_client_with_another_key_is_over_when_no_node_takes_it() {
    let mut bench = Bench::new(&[2]);
    assert!(!bench.greet(0, 1) && bench.over().is_none());
    assert!(!bench.greet(1, 1));
    assert!(matches!(bench.over(), Some(OverReason::Refused { .. })), "{:?}", bench.notices);
}

#[test]
fn one_node_that_does_not_agree_about_the_key_is_left_and_the_others_serve() {
    let mut bench = Bench::new(&[1]);
    // It lets in whoever comes, and so proves nothing.
    let reply = bench.reply(0);
    bench.say(0, Kind::HelloReply, Status::Ok, &reply);
    assert_eq!((bench.legs_up(), &bench.closed[..]), (0, &[LinkId(0)][..]));
    assert!(bench.greet(1, 1));
    assert_eq!((bench.legs_up(), bench.over()), (1, None));
}
