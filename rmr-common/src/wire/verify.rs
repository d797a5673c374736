//! Bodies of the messages of a verify: digests of blocks, and which blocks of two members differ.

use super::{Decoder, Encoder, Kind, WireError};
use crate::pool::{Address, BLOCK_SIZE, MemberId};

/// Longest range of one Compare or Digest in bytes: 64 blocks, a bit each in the answer, and no more than a disk reads in
/// passing.
pub const MAX_COMPARE: u32 = 256 << 10;

/// The digest of a block: CRC-64/NVME. Not the CRC32C that transfers and metadata carry: what slipped through one of those
/// would slip through here too. Twice the width makes it one block in 2^64 that differs and is not noticed.
#[must_use]
pub fn block_digest(block: &[u8]) -> u64 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc64Nvme, block)
}

/// The digests of the blocks of `data`, in order.
#[must_use]
pub fn block_digests(data: &[u8]) -> Vec<u64> {
    data.chunks(usize::try_from(BLOCK_SIZE).unwrap_or(4096)).map(block_digest).collect()
}

/// Body of [`Kind::Compare`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Compare {
    /// The member to compare with.
    pub reference: MemberId,
    /// Where its node listens.
    pub address: Address,
}

impl Compare {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u8(self.reference.as_u8()).text(&self.address.to_string());
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Compare, body);
        let reference = d.member()?;
        let address = d.text()?.parse().map_err(|e: crate::pool::AddressError| WireError::BodyValue {
            kind: Kind::Compare,
            reason: e.to_string(),
        })?;
        d.finish()?;
        Ok(Self { reference, address })
    }
}

/// Body of a good [`Kind::CompareReply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct CompareReply {
    /// A bit for each block of the range, the lowest for the first: it differed when it was looked at.
    pub differs: u64,
    /// Some block of the range could not be read by the one member or the other; then `differs` says nothing.
    pub unreadable: bool,
}

impl CompareReply {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u64(self.differs).u8(self.unreadable.into());
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::CompareReply, body);
        let reply = Self { differs: d.u64()?, unreadable: d.u8()? != 0 };
        d.finish()?;
        Ok(reply)
    }
}

/// Body of a good [`Kind::DigestReply`]: a digest for each block of the range.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DigestReply(pub Vec<u64>);

impl DigestReply {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        for digest in &self.0 {
            e.u64(*digest);
        }
        e.finish()
    }

    /// Reads the body of the answer for a range of `blocks` blocks.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8], blocks: u64) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::DigestReply, body);
        let digests = (0..blocks).map(|_| d.u64()).collect::<Result<_, _>>()?;
        d.finish()?;
        Ok(Self(digests))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_body_survives_the_wire_and_is_refused_when_cut_or_padded() {
        fn check<T: PartialEq + std::fmt::Debug>(
            value: &T,
            bytes: Vec<u8>,
            decode: fn(&[u8]) -> Result<T, WireError>,
        ) {
            assert_eq!(decode(&bytes).as_ref(), Ok(value));
            for end in 0..bytes.len() {
                assert!(decode(&bytes[..end]).is_err(), "cut at {end} of {}", bytes.len());
            }
            assert!(decode(&[bytes, vec![0]].concat()).is_err());
        }
        let compare = Compare { reference: MemberId::new(2).unwrap(), address: Address::tcp("node-c", 7700) };
        check(&compare, compare.encode(), Compare::decode);
        let reply = CompareReply { differs: 1 << 63 | 5, unreadable: false };
        check(&reply, reply.encode(), CompareReply::decode);
        let digests = DigestReply(vec![0, 1, u64::MAX]);
        check(&digests, digests.encode(), |b| DigestReply::decode(b, 3));
    }

    #[test]
    fn the_digest_is_crc_64_nvme() {
        assert_eq!(block_digest(b"123456789"), 0xae8b_1486_0a79_9888);
    }

    #[test]
    fn each_block_has_a_digest_of_its_own() {
        let mut data = vec![0; 3 * 4096];
        data[5000] ^= 1;
        let digests = block_digests(&data);
        assert_eq!(digests.len(), 3);
        assert_eq!(digests[0], digests[2]);
        assert_ne!(digests[0], digests[1]);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let _ = Compare::decode(&bytes);
            let _ = CompareReply::decode(&bytes);
            let _ = DigestReply::decode(&bytes, 7);
        }
    }
}
