//! Sizes in bytes as people write them: `4096`, `64K`, `10G`, `1.5` is not one. Units are binary (IEC), so that `10G`
//! is what a guest sees as 10 GiB.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};
use thiserror::Error;

/// Suffixes in rising order; each is 1024 times the one before.
const UNITS: [char; 6] = ['K', 'M', 'G', 'T', 'P', 'E'];

/// A number of bytes that reads and prints with a unit.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct ByteSize(pub u64);

/// Why a text is no [`ByteSize`].
#[derive(Clone, PartialEq, Eq, Debug, Error)]
#[error(
    "'{text}' is no size: {reason}; expected bytes or a whole number with K, M, G, T (1024-based), e.g. 10G"
)]
pub struct SizeError {
    text: String,
    reason: &'static str,
}

impl FromStr for ByteSize {
    type Err = SizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let fail = |reason| SizeError { text: text.to_owned(), reason };
        let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
        let (number, unit) = text.split_at(digits);
        if number.is_empty() {
            return Err(fail("it does not start with a digit"));
        }
        let number: u64 = number.parse().map_err(|_| fail("the number is larger than 64 bits"))?;
        let mut rest = unit.chars();
        let power = match rest.next() {
            None => return Ok(Self(number)),
            Some(letter) => {
                let letter = letter.to_ascii_uppercase();
                UNITS.iter().position(|&u| u == letter).ok_or_else(|| fail("the unit is unknown"))? + 1
            }
        };
        match rest.as_str() {
            "" | "iB" => {}
            // A disk sold as 10 GB and a size of 10G differ by 7 %: refuse to guess which was meant.
            "B" => return Err(fail("decimal units are not used; write G or GiB")),
            _ => return Err(fail("something follows the unit")),
        }
        let factor = (0..power).fold(1u64, |factor, _| factor * 1024);
        number.checked_mul(factor).map(Self).ok_or_else(|| fail("it is larger than 64 bits"))
    }
}

impl fmt::Display for ByteSize {
    /// The largest unit in which the size is a whole number: `10 GiB`, `1025 bytes`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (mut value, mut unit) = (self.0, None);
        for name in UNITS {
            if value == 0 || !value.is_multiple_of(1024) {
                break;
            }
            (value, unit) = (value / 1024, Some(name));
        }
        match unit {
            Some(unit) => write!(f, "{value} {unit}iB"),
            None => write!(f, "{value} bytes"),
        }
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u64(self.0)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    /// From a number of bytes or from a text with a unit.
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;

        impl de::Visitor<'_> for Visitor {
            type Value = ByteSize;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a number of bytes, or a text such as \"10G\"")
            }

            fn visit_u64<E: de::Error>(self, bytes: u64) -> Result<ByteSize, E> {
                Ok(ByteSize(bytes))
            }

            fn visit_i64<E: de::Error>(self, bytes: i64) -> Result<ByteSize, E> {
                u64::try_from(bytes).map(ByteSize).map_err(|_| E::custom("a size is not negative"))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
                text.parse().map_err(E::custom)
            }
        }

        deserializer.deserialize_any(Visitor)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_with_binary_units() {
        for (text, bytes) in [
            ("0", 0),
            ("4096", 4096),
            ("64K", 64 << 10),
            ("64k", 64 << 10),
            ("1M", 1 << 20),
            ("10G", 10 << 30),
            ("10GiB", 10 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
    }

    #[test]
    fn what_is_no_size_is_refused_with_the_reason() {
        for bad in ["", "G", "-1", "1.5G", "10GB", "10X", "1Gi", "10G ", " 1", "99999999999999999999", "16E"]
        {
            let error = bad.parse::<ByteSize>().unwrap_err().to_string();
            assert!(error.contains("expected bytes"), "{bad}: {error}");
        }
    }

    #[test]
    fn sizes_print_in_the_largest_whole_unit_and_read_back() {
        for (bytes, printed) in
            [(0, "0 bytes"), (1025, "1025 bytes"), (64 << 10, "64 KiB"), (3 << 40, "3 TiB")]
        {
            assert_eq!(ByteSize(bytes).to_string(), printed);
        }
        let read: ByteSize = serde_json::from_str("\"64K\"").unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), "65536");
        assert!(serde_json::from_str::<ByteSize>("-1").is_err());
    }
}
