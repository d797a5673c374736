//! Bodies of messages that only tell: why members are not current, and what a node did before it stops.

use super::codec::{Decoder, Encoder};
use super::{Kind, MAX_TEXT, WireError};
use crate::pool::{Cause, Condition, MAX_MEMBERS};

/// Body of [`Kind::Conditions`]: the members that are not current, and why.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Conditions(pub Vec<Condition>);

impl Conditions {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u8(u8::try_from(self.0.len()).unwrap_or(u8::MAX));
        for condition in &self.0 {
            e.u8(condition.member.as_u8()).u8(condition.cause as u8).text(short(&condition.text));
            e.u32(condition.failures).u64(condition.age_ms);
            e.u8(condition.retry_in_ms.is_some().into()).u64(condition.retry_in_ms.unwrap_or(0));
        }
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Conditions, body);
        let count = usize::from(d.u8()?);
        if count > MAX_MEMBERS {
            return Err(d.value_error(format!("{count} members, expected at most {MAX_MEMBERS}")));
        }
        let mut list = Vec::with_capacity(count);
        for _ in 0..count {
            let (member, cause, text) = (d.member()?, Cause::from_code(d.u8()?), d.text()?);
            let (failures, age_ms) = (d.u32()?, d.u64()?);
            let has_retry = match d.u8()? {
                0 => false,
                1 => true,
                found => {
                    return Err(d.value_error(format!("{found} for whether a retry is due, expected 0 or 1")));
                }
            };
            let retry = d.u64()?;
            let retry_in_ms = has_retry.then_some(retry);
            list.push(Condition { member, cause, text, failures, age_ms, retry_in_ms });
        }
        d.finish()?;
        Ok(Self(list))
    }
}

/// As much of a text as a message may carry, cut between characters.
fn short(text: &str) -> &str {
    let mut end = text.len().min(MAX_TEXT);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// Body of a [`Kind::Goodbye`] whose sender stops in order.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Goodbye {
    /// Every write that was answered on this connection before this message is durable: a flush that began after the last
    /// of them had ended was carried out well, and no write was answered since.
    pub flushed: bool,
}

impl Goodbye {
    /// The body's bytes.
    #[must_use]
    pub fn encode(self) -> Vec<u8> {
        vec![self.flushed.into()]
    }

    /// Reads the body. A Goodbye without one claims nothing.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Goodbye, body);
        if body.is_empty() {
            return Ok(Self { flushed: false });
        }
        let flushed = match d.u8()? {
            0 => false,
            1 => true,
            found => {
                return Err(d.value_error(format!("{found} for whether all is flushed, expected 0 or 1")));
            }
        };
        d.finish()?;
        Ok(Self { flushed })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pool::MemberId;

    fn condition(text: &str) -> Condition {
        Condition {
            member: MemberId::new(1).unwrap(),
            cause: Cause::DiskFull,
            text: text.into(),
            failures: 7,
            age_ms: 90_000,
            retry_in_ms: Some(64_000),
        }
    }

    #[test]
    fn both_survive_the_wire_and_are_refused_when_cut_or_padded() {
        let waits = Condition { retry_in_ms: None, cause: Cause::ReadErrorLimit, ..condition("") };
        let list = Conditions(vec![condition("No space left on device"), waits]);
        let bytes = list.encode();
        assert_eq!(Conditions::decode(&bytes).unwrap(), list);
        for end in 0..bytes.len() {
            assert!(Conditions::decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        assert!(Conditions::decode(&[bytes, vec![0]].concat()).is_err());
        assert!(Conditions::decode(&[9]).is_err(), "more members than a pool may have");
        for flushed in [false, true] {
            assert_eq!(Goodbye::decode(&Goodbye { flushed }.encode()).unwrap(), Goodbye { flushed });
        }
        assert_eq!(Goodbye::decode(&[]).unwrap(), Goodbye { flushed: false });
        assert!(Goodbye::decode(&[2]).is_err() && Goodbye::decode(&[1, 0]).is_err());
    }

    #[test]
    fn a_text_that_is_too_long_is_cut_between_characters() {
        let list = Conditions(vec![condition(&"ä".repeat(300)), condition(&format!("x{}", "ä".repeat(300)))]);
        let read = Conditions::decode(&list.encode()).unwrap().0;
        assert_eq!((read[0].text.len(), read[1].text.len()), (512, 511));
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = Conditions::decode(&bytes);
            let _ = Goodbye::decode(&bytes);
        }
    }
}
