use super::*;
use crate::pool::ClientId;
use crate::wire::{PROTOCOL_VERSION, Role};

pub(super) fn ring(keys: &[u8]) -> KeyRing {
    KeyRing::new(keys.iter().map(|&k| SecretKey::from_bytes([k; 32])).collect())
}

pub(super) fn hello(role: Role) -> Hello {
    Hello {
        versions: (PROTOCOL_VERSION, PROTOCOL_VERSION),
        capabilities: 0,
        role,
        client: ClientId::from_bytes([9; 16]),
        pool_name: String::new(),
        description: "a test".to_owned(),
        nonce: None,
    }
}

/// A node of one pool.
struct Node {
    keys: KeyRing,
    nonce: u8,
    pool: PoolId,
    member: (MemberId, StoreId),
}

impl Node {
    fn new(keys: &[u8]) -> Self {
        let member = (MemberId::new(1).unwrap(), StoreId::from_bytes([4; 16]));
        Self { keys: ring(keys), nonce: 70, pool: PoolId::from_bytes([5; 16]), member }
    }

    fn greeted(&self, hello: &[u8]) -> Result<Option<(Gate, Vec<u8>)>, Denial> {
        let shows_key = Hello::decode(hello).unwrap().nonce.is_some();
        Gate::open(self.keys.clone(), Nonce([self.nonce; 32]), self.pool, self.member, hello, shows_key)
    }
}

fn opener(keys: &[u8], nonce: u8, role: Role) -> Opener {
    Opener::new(&ring(keys), Nonce([nonce; 32]), PoolId::from_bytes([5; 16]), &hello(role))
}

fn challenge(pool: PoolId) -> MessageHeader {
    MessageHeader::new(Kind::Challenge, pool)
}

fn answer(pool: PoolId) -> MessageHeader {
    MessageHeader::new(Kind::HelloReply, pool)
}

/// The proof of an opener that this node challenged.
fn proof(opener: &mut Opener, node: &Node) -> (Gate, Vec<u8>) {
    let (gate, body) = node.greeted(opener.hello()).unwrap().unwrap();
    let Step::Prove(proof) = opener.take(&challenge(node.pool), &body).unwrap() else { panic!("no proof") };
    (gate, proof)
}

/// The whole handshake; whoever refuses says why.
fn shake(opener: &mut Opener, node: &Node) -> Result<(), String> {
    let (gate, shown) = proof(opener, node);
    let sealed = gate.check(&shown).map_err(|e| e.to_string())?.seal(b"welcome".to_vec());
    match opener.take(&answer(node.pool), &sealed) {
        Ok(step) => {
            assert_eq!(step, Step::Welcome(b"welcome"));
            Ok(())
        }
        Err(error) => Err(error.to_string()),
    }
}

#[test]
fn both_sides_with_the_key_are_let_in_and_without_any_there_is_no_handshake() {
    assert_eq!(shake(&mut opener(&[1], 60, Role::Client), &Node::new(&[1])), Ok(()));
    let mut open = opener(&[], 60, Role::Client);
    assert!(Node::new(&[]).greeted(open.hello()).unwrap().is_none());
    let pool = PoolId::from_bytes([5; 16]);
    assert_eq!(open.take(&answer(pool), b"reply"), Ok(Step::Welcome(b"reply")));
}

#[test]
fn a_wrong_key_is_refused_by_the_node() {
    let node = Node::new(&[1]);
    let (gate, shown) = proof(&mut opener(&[2], 60, Role::Client), &node);
    assert_eq!(gate.check(&shown).unwrap_err(), Denial::WrongKey);
}

#[test]
fn a_key_on_one_side_only_is_refused_with_the_flag_in_the_words() {
    let denied = Node::new(&[1]).greeted(opener(&[], 60, Role::Client).hello()).unwrap_err();
    assert_eq!((denied, denied.status()), (Denial::KeyRequired, Status::KeyRequired));
    assert!(denied.to_string().contains("--key-file"));
    let denied = Node::new(&[]).greeted(opener(&[1], 60, Role::Client).hello()).unwrap_err();
    assert_eq!((denied, denied.status()), (Denial::NoKey, Status::NoKey));
    assert!(denied.to_string().contains("--key-dir"));
}

#[test]
fn a_node_that_does_not_prove_the_key_is_refused() {
    let node = Node::new(&[1]);
    // It asks for nothing and lets everybody in.
    let mut asker = opener(&[1], 60, Role::Client);
    assert_eq!(asker.take(&answer(node.pool), b"welcome"), Err(AuthError::NotAsked));
    // It asks, and does not have the key.
    let mut asker = opener(&[1], 60, Role::Client);
    let (gate, _) = proof(&mut asker, &node);
    let pretender = Admitted { key: SecretKey::from_bytes([2; 32]), context: gate.context };
    let sealed = pretender.seal(b"welcome".to_vec());
    assert_eq!(asker.take(&answer(node.pool), &sealed), Err(AuthError::NotProved));
    for short in 0..PROOF_SIZE {
        assert_eq!(asker.take(&answer(node.pool), &sealed[..short]), Err(AuthError::NotProved));
    }
}

#[test]
fn every_changed_byte_of_the_answer_and_every_cut_of_the_proof_is_noticed() {
    let node = Node::new(&[1]);
    let mut asker = opener(&[1], 60, Role::Client);
    let (gate, shown) = proof(&mut asker, &node);
    for end in 0..shown.len() {
        let gate = Gate { keys: gate.keys.clone(), context: gate.context.clone() };
        assert_eq!(gate.check(&shown[..end]).unwrap_err(), Denial::WrongKey);
    }
    let sealed = gate.check(&shown).unwrap().seal(b"welcome".to_vec());
    for i in 0..sealed.len() {
        let mut changed = sealed.clone();
        changed[i] ^= 1;
        assert_eq!(asker.take(&answer(node.pool), &changed), Err(AuthError::NotProved), "byte {i}");
    }
    assert!(asker.take(&answer(node.pool), &sealed).is_ok());
}

#[test]
fn a_recorded_proof_opens_no_second_connection() {
    let mut node = Node::new(&[1]);
    let mut asker = opener(&[1], 60, Role::Client);
    let (_, recorded) = proof(&mut asker, &node);
    // The same hello again, and another challenge.
    node.nonce = 71;
    let (gate, _) = node.greeted(asker.hello()).unwrap().unwrap();
    assert_eq!(gate.check(&recorded).unwrap_err(), Denial::WrongKey);
}

#[test]
fn a_recorded_answer_of_a_node_does_not_pass_for_another_connection() {
    let node = Node::new(&[1]);
    let mut first = opener(&[1], 60, Role::Client);
    let (gate, shown) = proof(&mut first, &node);
    let recorded = gate.check(&shown).unwrap().seal(b"welcome".to_vec());
    // The pretender repeats challenge and answer.
    let mut second = opener(&[1], 61, Role::Client);
    let (_, _) = proof(&mut second, &node);
    assert_eq!(second.take(&answer(node.pool), &recorded), Err(AuthError::NotProved));
    assert!(first.take(&answer(node.pool), &recorded).is_ok());
}

#[test]
fn a_proof_that_is_sent_back_proves_nothing() {
    let node = Node::new(&[1]);
    let mut asker = opener(&[1], 60, Role::Client);
    let (_, shown) = proof(&mut asker, &node);
    // Its own proof, with and without an answer before it.
    for reflected in [shown[1..].to_vec(), [b"welcome", &shown[1..]].concat()] {
        assert_eq!(asker.take(&answer(node.pool), &reflected), Err(AuthError::NotProved));
    }
    // The node's own, as that of somebody who opens a connection.
    let (gate, shown) = proof(&mut opener(&[1], 60, Role::Client), &node);
    let (again, _) = node.greeted(opener(&[1], 60, Role::Client).hello()).unwrap().unwrap();
    let sealed = gate.check(&shown).unwrap().seal(Vec::new());
    assert_eq!(again.check(&[&[1], &sealed[..]].concat()).unwrap_err(), Denial::WrongKey);
}

#[test]
fn a_proof_is_good_for_one_pool_member_store_role_and_client_only() {
    let node = Node::new(&[1]);
    let mut asker = opener(&[1], 60, Role::Client);
    let (_, shown) = proof(&mut asker, &node);
    let mut others: Vec<_> = (0..4).map(|_| (Node::new(&[1]), hello(Role::Client))).collect();
    others[0].0.pool = PoolId::from_bytes([6; 16]);
    others[1].0.member.0 = MemberId::new(2).unwrap();
    others[2].0.member.1 = StoreId::from_bytes([6; 16]);
    others[3].1.client = ClientId::from_bytes([8; 16]);
    others.push((Node::new(&[1]), hello(Role::Peer)));
    others.push((Node::new(&[1]), Hello { versions: (1, 2), ..hello(Role::Client) }));
    for (i, (other, hello)) in others.iter().enumerate() {
        let hello = Hello { nonce: Some([60; 32]), ..hello.clone() }.encode();
        let (gate, _) = other.greeted(&hello).unwrap().unwrap();
        assert_eq!(gate.check(&shown).unwrap_err(), Denial::WrongKey, "case {i}");
    }
    // And the same of everything is let in, or the cases above would say nothing.
    let (gate, _) = node.greeted(asker.hello()).unwrap().unwrap();
    assert!(gate.check(&shown).is_ok());
}

#[test]
fn a_challenge_for_another_pool_a_second_one_and_one_without_a_key_are_not_answered() {
    let node = Node::new(&[1]);
    let mut asker = opener(&[1], 60, Role::Client);
    let (_, body) = node.greeted(asker.hello()).unwrap().unwrap();
    let elsewhere = challenge(PoolId::from_bytes([6; 16]));
    assert_eq!(asker.take(&elsewhere, &body), Err(AuthError::Unexpected));
    for end in 0..body.len() {
        let error = asker.take(&challenge(node.pool), &body[..end]).unwrap_err();
        assert!(matches!(error, AuthError::Wire(_)), "cut at {end}: {error}");
    }
    assert!(asker.take(&challenge(node.pool), &body).is_ok());
    assert_eq!(asker.take(&challenge(node.pool), &body), Err(AuthError::Unexpected));
    let mut open = opener(&[], 60, Role::Client);
    assert_eq!(open.take(&challenge(node.pool), &body), Err(AuthError::Unexpected));
}

#[test]
fn old_and_new_key_go_together_while_a_node_has_both() {
    for (shown, known) in
        [(&[1][..], &[2, 1][..]), (&[2], &[2, 1]), (&[2, 1], &[1]), (&[2, 1], &[2]), (&[2, 1], &[2, 1])]
    {
        assert_eq!(
            shake(&mut opener(shown, 60, Role::Peer), &Node::new(known)),
            Ok(()),
            "{shown:?} {known:?}"
        );
    }
    let (gate, shown) = proof(&mut opener(&[3], 60, Role::Client), &Node::new(&[2, 1]));
    assert_eq!(gate.check(&shown).unwrap_err(), Denial::WrongKey);
}

#[test]
fn two_random_nonces_differ() {
    assert_ne!(Nonce::random().unwrap(), Nonce::random().unwrap());
}
