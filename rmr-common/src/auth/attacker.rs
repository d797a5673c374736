//! An attacker who has the network: he hands over what he has recorded to whom he likes, as often and in whatever order he
//! likes, cut, changed, or sent back to where it came from. Nobody is let in who has not just proved the key to that very peer.

use super::tests::{hello, ring};
use super::*;
use crate::wire::Role;

const POOL: [u8; 16] = [5; 16];
const REPLY: &[u8] = b"the pool as it is";

/// The same numbers every time.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        usize::try_from(self.0 >> 33).unwrap() % limit
    }
}

/// A side that opened a connection.
struct Caller {
    opener: Opener,
    keys: Vec<u8>,
    hello: Vec<u8>,
    /// The challenges that it answered.
    answered: Vec<Vec<u8>>,
    is_welcome: bool,
}

/// A connection at a node, which has a key.
struct Callee {
    gate: Option<Gate>,
    keys: Vec<u8>,
    hello: Vec<u8>,
    challenge: Vec<u8>,
    is_open: bool,
}

#[derive(Default)]
struct Counts {
    admitted: u32,
    welcome: u32,
    refused: u32,
}

struct Attack {
    numbers: Numbers,
    callers: Vec<Caller>,
    callees: Vec<Callee>,
    /// All that was ever sent, and as what.
    recorded: Vec<(Kind, Vec<u8>)>,
    nonces: u8,
    counts: Counts,
}

impl Attack {
    fn new(seed: u64) -> Self {
        let numbers = Numbers(seed);
        let (callers, callees, recorded) = (Vec::new(), Vec::new(), Vec::new());
        Self { numbers, callers, callees, recorded, nonces: 0, counts: Counts::default() }
    }

    fn nonce(&mut self) -> Nonce {
        self.nonces += 1;
        Nonce([self.nonces; NONCE_SIZE])
    }

    /// The old key, the new one, both while they are exchanged; or one of another pool.
    fn keys(&mut self) -> Vec<u8> {
        [&[1][..], &[2], &[1, 2], &[1, 2], &[9]][self.numbers.below(5)].to_vec()
    }

    /// Something that was sent: mostly the last of what is expected, as it was.
    fn message(&mut self, expected: Kind) -> Vec<u8> {
        let count = self.recorded.len();
        let last = self.recorded.iter().rposition(|(kind, _)| *kind == expected);
        let index = last.filter(|_| self.numbers.below(4) > 0).unwrap_or_else(|| self.numbers.below(count));
        let mut message = self.recorded[index].1.clone();
        match self.numbers.below(12) {
            0 => message.truncate(self.numbers.below(message.len() + 1)),
            1 if !message.is_empty() => {
                let at = self.numbers.below(message.len());
                message[at] ^= 1 << self.numbers.below(8);
            }
            2 => {
                let other = self.numbers.below(count);
                message.extend_from_slice(&self.recorded[other].1);
            }
            _ => {}
        }
        message
    }

    fn step(&mut self) {
        match self.numbers.below(if self.recorded.is_empty() { 1 } else { 8 }) {
            0 => self.call(),
            1 | 2 => self.hand_hello_to_a_node(),
            3 | 4 => self.hand_to_caller(Kind::Challenge),
            5 => self.hand_proof_to_a_node(),
            6 => self.hand_to_caller(Kind::HelloReply),
            _ => self.hand_to_caller(Kind::HelloReply),
        }
    }

    fn call(&mut self) {
        let (keys, nonce) = (self.keys(), self.nonce());
        let role = [Role::Client, Role::Peer][self.numbers.below(2)];
        let opener = Opener::new(&ring(&keys), nonce, PoolId::from_bytes(POOL), &hello(role));
        let hello = opener.hello().to_vec();
        self.recorded.push((Kind::Hello, hello.clone()));
        self.callers.push(Caller { opener, keys, hello, answered: Vec::new(), is_welcome: false });
    }

    fn hand_hello_to_a_node(&mut self) {
        let (hello, keys, nonce) = (self.message(Kind::Hello), self.keys(), self.nonce());
        let Ok(decoded) = Hello::decode(&hello) else { return };
        let member = MemberId::new(u8::try_from(self.numbers.below(2)).unwrap()).unwrap();
        let place = (member, StoreId::from_bytes([4; 16]));
        let pool = PoolId::from_bytes(POOL);
        let opened = Gate::open(ring(&keys), nonce, pool, place, &hello, decoded.nonce.is_some());
        let Ok(Some((gate, challenge))) = opened else { return };
        self.recorded.push((Kind::Challenge, challenge.clone()));
        self.callees.push(Callee { gate: Some(gate), keys, hello, challenge, is_open: false });
    }

    fn hand_proof_to_a_node(&mut self) {
        let message = self.message(Kind::Proof);
        if self.callees.is_empty() {
            return;
        }
        let index = self.callees.len() - 1 - self.numbers.below(self.callees.len().min(2));
        let callee = &mut self.callees[index];
        let Some(gate) = callee.gate.take() else { return };
        let Ok(admitted) = gate.check(&message) else {
            self.counts.refused += 1;
            return;
        };
        let is_its = |c: &&Caller| c.hello == callee.hello && c.answered.contains(&callee.challenge);
        let caller = self.callers.iter().find(is_its).expect("nobody answered this challenge to this hello");
        assert!(caller.keys.iter().any(|k| callee.keys.contains(k)), "they have no key in common");
        callee.is_open = true;
        self.recorded.push((Kind::HelloReply, admitted.seal(REPLY.to_vec())));
        self.counts.admitted += 1;
    }

    fn hand_to_caller(&mut self, kind: Kind) {
        let message = self.message(kind);
        let index = self.callers.len() - 1 - self.numbers.below(self.callers.len().min(2));
        let is_other_pool = self.numbers.below(20) == 0;
        let pool = PoolId::from_bytes(if is_other_pool { [6; 16] } else { POOL });
        let caller = &mut self.callers[index];
        match caller.opener.take(&MessageHeader::new(kind, pool), &message) {
            Err(_) => self.counts.refused += 1,
            Ok(Step::Prove(proof)) => {
                assert!(!is_other_pool && caller.answered.is_empty(), "an answer that nobody may have");
                caller.answered.push(message);
                self.recorded.push((Kind::Proof, proof));
            }
            Ok(Step::Welcome(reply)) => {
                assert_eq!(reply, REPLY, "a reply that nobody gave");
                let is_its = |c: &&Callee| {
                    c.is_open && c.hello == caller.hello && caller.answered.contains(&c.challenge)
                };
                let callee = self.callees.iter().find(is_its).expect("no node has let this one in");
                assert!(caller.keys.iter().any(|k| callee.keys.contains(k)), "they have no key in common");
                self.counts.welcome += u32::from(!caller.is_welcome);
                caller.is_welcome = true;
            }
        }
    }
}

#[test]
fn whatever_an_attacker_does_with_messages_nobody_is_let_in_but_by_a_peer_that_has_just_proved_the_key() {
    let mut total = Counts::default();
    for seed in 0..4000 {
        let mut attack = Attack::new(seed);
        (0..60).for_each(|_| attack.step());
        total.admitted += attack.counts.admitted;
        total.welcome += attack.counts.welcome;
        total.refused += attack.counts.refused;
    }
    // Else nothing was tried.
    let Counts { admitted, welcome, refused } = total;
    assert!(admitted > 500 && welcome > 100 && refused > 10_000, "{admitted}, {welcome}, {refused}");
}
