//! Mutual authentication by the key of a pool: both sides of a new connection prove by HMAC-SHA256 that they have it, and
//! neither sends it. This is code without I/O; `docs/protocol.md` has the bytes, `docs/security.md` what it is good for.
//!
//! ```text
//!   Opener (client, other node)                 Gate (node)
//!     │── Hello, with a nonce ─────────────────▶│
//!     │◀── Challenge: nonce, member, store ─────│
//!     │── Proof: one for each key it has ──────▶│  checks it
//!     │◀── HelloReply, behind it a proof ───────│
//!        checks it
//! ```
//! Whoever opened the connection proves first, so that a node tells nothing of a pool to strangers.

mod key;

use ring::hmac;
use thiserror::Error;

pub use key::{KeyFileError, KeyRing, MAX_KEYS, SecretKey};

use crate::pool::{MemberId, PoolId, StoreId};
use crate::wire::{Challenge, Hello, Kind, MessageHeader, NONCE_SIZE, PROOF_SIZE, Proof, Status, WireError};

/// What every proof begins with: nothing else that is signed with such a key can be taken for one.
const LABEL: &[u8; 16] = b"RMR pool key v1\0";

/// A random number that is used once.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Nonce(pub [u8; NONCE_SIZE]);

impl Nonce {
    /// A new one of the system's.
    ///
    /// # Errors
    /// When the system gives no random numbers.
    pub fn random() -> Result<Self, AuthError> {
        let mut bytes = [0; NONCE_SIZE];
        let random = ring::rand::SystemRandom::new();
        ring::rand::SecureRandom::fill(&random, &mut bytes).map_err(|_| AuthError::NoRandomNumbers)?;
        Ok(Self(bytes))
    }
}

impl std::fmt::Debug for Nonce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Nonce")
    }
}

/// Why the side that opened a connection does not go on with it.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum AuthError {
    /// The system has no random numbers.
    #[error("the system gives no random numbers, which authentication needs")]
    NoRandomNumbers,
    /// The node let the sender in without a proof.
    #[error(
        "a key is given for this pool, and the node does not ask for it: it has no key for the pool, or is not the node that it \
         says it is"
    )]
    NotAsked,
    /// The node's proof is not that of a key given here.
    #[error("the node does not prove that it has the pool's key: it is not the node that it says it is")]
    NotProved,
    /// A challenge to somebody who has no key, a second one, or one for another pool.
    #[error("a challenge that does not fit what was asked")]
    Unexpected,
    /// Bytes that are no challenge.
    #[error(transparent)]
    Wire(#[from] WireError),
}

/// Why a node does not let somebody in.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Error)]
pub enum Denial {
    /// The pool has a key, and none is shown.
    #[error(
        "this pool requires a key, and none was shown: name the file of the key with --key-file (a node: put it into the \
         directory of --key-dir)"
    )]
    KeyRequired,
    /// What was shown is not of a key of the pool.
    #[error(
        "the key shown is not this pool's: look at the file of --key-file (a node: at the one in the directory of --key-dir)"
    )]
    WrongKey,
    /// A key is shown, and the node has none for the pool.
    #[error(
        "a key was shown, and this node has none for the pool: put the file of the key into the directory of the node's --key-dir"
    )]
    NoKey,
    /// The node's own key file cannot be used; its log says why.
    #[error("this node cannot use its key for the pool: its log says why")]
    Unusable,
}

impl Denial {
    /// All there are.
    pub const ALL: [Self; 4] = [Self::KeyRequired, Self::WrongKey, Self::NoKey, Self::Unusable];

    /// How it is told on the wire.
    #[must_use]
    pub const fn status(self) -> Status {
        match self {
            Self::KeyRequired => Status::KeyRequired,
            Self::WrongKey => Status::KeyRefused,
            Self::NoKey | Self::Unusable => Status::NoKey,
        }
    }
}

/// What the side that opened a connection does next.
#[derive(PartialEq, Eq, Debug)]
pub enum Step<'a> {
    /// Send this as the body of a [`Kind::Proof`].
    Prove(Vec<u8>),
    /// The node is let in; this is the body of its HelloReply.
    Welcome(&'a [u8]),
}

/// The handshake of the side that opened a connection.
#[derive(Debug)]
pub struct Opener {
    keys: KeyRing,
    pool: PoolId,
    hello: Vec<u8>,
    context: Option<Vec<u8>>,
}

impl Opener {
    /// Begins with this hello about `pool`, which is nil when it is asked for by name. The nonce goes into the hello if there
    /// is a key.
    #[must_use]
    pub fn new(keys: &KeyRing, nonce: Nonce, pool: PoolId, hello: &Hello) -> Self {
        let nonce = (!keys.is_empty()).then_some(nonce.0);
        let hello = Hello { nonce, ..hello.clone() }.encode();
        Self { keys: keys.clone(), pool, hello, context: None }
    }

    /// Body of the hello.
    #[must_use]
    pub fn hello(&self) -> &[u8] {
        &self.hello
    }

    /// Takes a Challenge, or a HelloReply whose status is good.
    ///
    /// # Errors
    /// When the node has not proved what it has to; the connection is to be closed.
    pub fn take<'a>(&mut self, header: &MessageHeader, body: &'a [u8]) -> Result<Step<'a>, AuthError> {
        if header.kind == Kind::Challenge {
            return self.prove(header.pool, body).map(Step::Prove);
        }
        if self.keys.is_empty() {
            return Ok(Step::Welcome(body));
        }
        let context = self.context.as_ref().ok_or(AuthError::NotAsked)?;
        let (reply, proof) = body.split_last_chunk::<PROOF_SIZE>().ok_or(AuthError::NotProved)?;
        let is_proved = |key: &SecretKey| is_proof(key, Side::Node, context, reply, proof);
        if self.keys.iter().any(is_proved) { Ok(Step::Welcome(reply)) } else { Err(AuthError::NotProved) }
    }

    fn prove(&mut self, pool: PoolId, body: &[u8]) -> Result<Vec<u8>, AuthError> {
        let is_asked = self.pool == PoolId::from_bytes([0; 16]) || self.pool == pool;
        if self.keys.is_empty() || self.context.is_some() || !is_asked {
            return Err(AuthError::Unexpected);
        }
        let challenge = Challenge::decode(body)?;
        let context = context(pool, &challenge, &self.hello);
        let proofs = self.keys.iter().map(|key| prove(key, Side::Opener, &context, &[])).collect();
        self.context = Some(context);
        Ok(Proof { proofs }.encode())
    }
}

/// A node's handshake with somebody who has to prove that he has the key.
#[derive(Debug)]
pub struct Gate {
    keys: KeyRing,
    context: Vec<u8>,
}

impl Gate {
    /// What becomes of a hello: a gate and the body of the challenge, or nothing of either when there is no key on both sides.
    ///
    /// # Errors
    /// When only one side has a key.
    pub fn open(
        keys: KeyRing,
        nonce: Nonce,
        pool: PoolId,
        (member, store): (MemberId, StoreId),
        hello: &[u8],
        shows_key: bool,
    ) -> Result<Option<(Self, Vec<u8>)>, Denial> {
        match (keys.is_empty(), shows_key) {
            (true, false) => return Ok(None),
            (true, true) => return Err(Denial::NoKey),
            (false, false) => return Err(Denial::KeyRequired),
            (false, true) => {}
        }
        let challenge = Challenge { nonce: nonce.0, member, store };
        let context = context(pool, &challenge, hello);
        Ok(Some((Self { keys, context }, challenge.encode())))
    }

    /// Checks the body of a Proof.
    ///
    /// # Errors
    /// When none of it is of a key of the pool, or the bytes are no such body.
    pub fn check(self, body: &[u8]) -> Result<Admitted, Denial> {
        let shown = Proof::decode(body).map_err(|_| Denial::WrongKey)?;
        let is_shown = |key: &SecretKey| {
            shown.proofs.iter().any(|proof| is_proof(key, Side::Opener, &self.context, &[], proof))
        };
        let key = self.keys.iter().find(|key| is_shown(key)).cloned().ok_or(Denial::WrongKey)?;
        Ok(Admitted { key, context: self.context })
    }
}

/// Somebody has proved that he has the key, and is told so with a proof of the node's own.
#[derive(Debug)]
pub struct Admitted {
    key: SecretKey,
    context: Vec<u8>,
}

impl Admitted {
    /// The body of a HelloReply with the proof behind it.
    #[must_use]
    pub fn seal(&self, mut reply: Vec<u8>) -> Vec<u8> {
        let proof = prove(&self.key, Side::Node, &self.context, &reply);
        reply.extend_from_slice(&proof);
        reply
    }
}

/// Who proves: a proof of one side is none of the other.
#[derive(Clone, Copy)]
enum Side {
    Opener = 1,
    Node = 2,
}

/// What both sides agree on. Every field but the last has a fixed length, and that of the last stands before it.
fn context(pool: PoolId, challenge: &Challenge, hello: &[u8]) -> Vec<u8> {
    let length = u32::try_from(hello.len()).unwrap_or(u32::MAX).to_le_bytes();
    let member = [challenge.member.as_u8()];
    let parts: [&[u8]; 6] =
        [pool.as_bytes(), &member, challenge.store.as_bytes(), &challenge.nonce, &length, hello];
    parts.concat()
}

fn signed(side: Side, context: &[u8], reply: &[u8]) -> Vec<u8> {
    [&LABEL[..], &[side as u8], context, reply].concat()
}

fn prove(key: &SecretKey, side: Side, context: &[u8], reply: &[u8]) -> [u8; PROOF_SIZE] {
    let tag = hmac::sign(&key.hmac(), &signed(side, context, reply));
    let mut proof = [0; PROOF_SIZE];
    proof.copy_from_slice(tag.as_ref());
    proof
}

/// Compares in constant time.
fn is_proof(key: &SecretKey, side: Side, context: &[u8], reply: &[u8], proof: &[u8; PROOF_SIZE]) -> bool {
    hmac::verify(&key.hmac(), &signed(side, context, reply), proof).is_ok()
}

#[cfg(test)]
mod attacker;
#[cfg(test)]
mod tests;
