//! Bodies of the challenge-response that comes before the answer to a hello when a pool has a key. What the numbers in them
//! prove is the business of `crate::auth`.

use super::{Decoder, Encoder, Kind, WireError};
use crate::pool::{MemberId, StoreId};

/// Length of the random numbers of both sides, in bytes.
pub const NONCE_SIZE: usize = 32;
/// Length of a proof, an HMAC-SHA256, in bytes.
pub const PROOF_SIZE: usize = 32;
/// Most proofs in a [`Proof`]: one for the key in use, one for the key before it.
pub const MAX_PROOFS: usize = 2;

/// Body of [`Kind::Challenge`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Challenge {
    /// The node's random number, made for this connection.
    pub nonce: [u8; NONCE_SIZE],
    /// The member that answers.
    pub member: MemberId,
    /// Its store.
    pub store: StoreId,
}

impl Challenge {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.bytes(&self.nonce).u8(self.member.as_u8()).uuid(self.store.as_bytes());
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Challenge, body);
        let nonce = d.array()?;
        let member = d.member()?;
        let store = StoreId::from_bytes(d.uuid()?);
        d.finish()?;
        Ok(Self { nonce, member, store })
    }
}

/// Body of [`Kind::Proof`]: one proof for each key that the side that opened the connection has.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proof {
    /// The proofs, 1 to [`MAX_PROOFS`].
    pub proofs: Vec<[u8; PROOF_SIZE]>,
}

impl Proof {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u8(u8::try_from(self.proofs.len()).unwrap_or(u8::MAX));
        for proof in &self.proofs {
            e.bytes(proof);
        }
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Proof, body);
        let count = usize::from(d.u8()?);
        if !(1..=MAX_PROOFS).contains(&count) {
            return Err(d.value_error(format!("{count} proofs, expected 1 to {MAX_PROOFS}")));
        }
        let proofs = (0..count).map(|_| d.array()).collect::<Result<_, _>>()?;
        d.finish()?;
        Ok(Self { proofs })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_bodies_survive_the_wire_and_are_refused_when_cut_or_padded() {
        let member = MemberId::new(2).unwrap();
        let challenge = Challenge { nonce: [7; NONCE_SIZE], member, store: StoreId::random() };
        let bytes = challenge.encode();
        assert_eq!(Challenge::decode(&bytes), Ok(challenge));
        assert!((0..bytes.len()).all(|end| Challenge::decode(&bytes[..end]).is_err()));
        assert!(Challenge::decode(&[bytes, vec![0]].concat()).is_err());
        let proof = Proof { proofs: vec![[1; PROOF_SIZE], [2; PROOF_SIZE]] };
        let bytes = proof.encode();
        assert_eq!(Proof::decode(&bytes), Ok(proof));
        assert!((0..bytes.len()).all(|end| Proof::decode(&bytes[..end]).is_err()));
        assert!(Proof::decode(&[bytes, vec![0]].concat()).is_err());
    }

    #[test]
    fn a_proof_has_one_or_two_proofs() {
        for count in [0, 3, u8::MAX] {
            let body = [vec![count], vec![0; usize::from(count) * PROOF_SIZE]].concat();
            assert!(Proof::decode(&body).is_err(), "{count}");
        }
    }
}
