//! The TCP binding's frame: a header, a table of messages, then their payloads in the same order.
//!
//! ```text
//! ┌──────────────┬───────────┬─────┬───────────┬───────────┬─────┬───────────┐
//! │ frame header │ message 0 │  …  │ message n │ payload 0 │  …  │ payload n │
//! │   16 bytes   │  80 bytes │     │  80 bytes │           │     │           │
//! └──────────────┴───────────┴─────┴───────────┴───────────┴─────┴───────────┘
//! ```
//! One frame carries all that was ready in one wake-up. The receiver knows every length before the first payload
//! byte, so it reads payloads of many messages straight to their destinations with one system call.

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{PROTOCOL_VERSION, WireError};

/// `RMRF`, the first four bytes of a frame, as a little-endian number.
pub const FRAME_MAGIC: u32 = u32::from_le_bytes(*b"RMRF");
/// Size of a [`FrameHeader`] in bytes.
pub const FRAME_HEADER_SIZE: usize = 16;
/// Most messages in one frame: bounds the table a receiver keeps (5 KiB), and what one bad byte can spoil.
pub const MAX_FRAME_MESSAGES: usize = 64;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawFrameHeader {
    magic: U32,
    version: U16,
    count: U16,
    payload: U32,
    checksum: U32,
}

/// What a frame announces.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// How many messages the table has, `1..=MAX_FRAME_MESSAGES`.
    pub count: u16,
    /// Sum of the payload lengths in bytes.
    pub payload: u32,
    /// CRC32C of the table.
    pub checksum: u32,
}

impl FrameHeader {
    /// The 16 bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; FRAME_HEADER_SIZE] {
        let raw = RawFrameHeader {
            magic: U32::new(FRAME_MAGIC),
            version: U16::new(PROTOCOL_VERSION),
            count: U16::new(self.count),
            payload: U32::new(self.payload),
            checksum: U32::new(self.checksum),
        };
        zerocopy::transmute!(raw)
    }

    /// Reads a header.
    ///
    /// # Errors
    /// Another magic number or version, or a count out of range.
    pub fn decode(bytes: &[u8; FRAME_HEADER_SIZE]) -> Result<Self, WireError> {
        let raw: RawFrameHeader = zerocopy::transmute!(*bytes);
        if raw.magic.get() != FRAME_MAGIC {
            return Err(WireError::Magic { found: raw.magic.get() });
        }
        if raw.version.get() != PROTOCOL_VERSION {
            return Err(WireError::Version { found: raw.version.get() });
        }
        let count = raw.count.get();
        if count == 0 || usize::from(count) > MAX_FRAME_MESSAGES {
            return Err(WireError::Limit {
                what: "messages in a frame",
                found: count.into(),
                expected: "1 to 64",
            });
        }
        Ok(Self { count, payload: raw.payload.get(), checksum: raw.checksum.get() })
    }
}

/// CRC32C of a message table.
#[must_use]
pub fn frame_crc(table: &[u8]) -> u32 {
    // The crate returns every width in a u64; the upper half of a 32-bit checksum is zero.
    u32::try_from(crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, table)).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_header_survives_the_wire() {
        let header = FrameHeader { count: 3, payload: 12288, checksum: 0xdead_beef };
        assert_eq!(FrameHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn foreign_bytes_are_named() {
        let mut bytes = FrameHeader { count: 1, payload: 0, checksum: 0 }.encode();
        bytes[0..4].copy_from_slice(b"GET ");
        let error = FrameHeader::decode(&bytes).unwrap_err();
        assert!(error.to_string().contains("does not speak RMR"), "{error}");
        bytes = FrameHeader { count: 1, payload: 0, checksum: 0 }.encode();
        bytes[4] = 9;
        assert_eq!(FrameHeader::decode(&bytes), Err(WireError::Version { found: 9 }));
    }

    #[test]
    fn empty_and_oversized_tables_are_refused() {
        for count in [0, 65] {
            let bytes = FrameHeader { count, payload: 0, checksum: 0 }.encode();
            assert!(matches!(FrameHeader::decode(&bytes), Err(WireError::Limit { .. })));
        }
    }

    #[test]
    fn the_checksum_is_crc32c() {
        assert_eq!(frame_crc(b"123456789"), 0xe306_9283);
    }
}
