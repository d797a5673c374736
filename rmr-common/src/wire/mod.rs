//! Message set version 2: fixed little-endian headers, bodies of control messages, and the TCP frame.
//!
//! `docs/protocol.md` describes every byte; this module is its implementation and does no I/O. Whatever comes from a
//! peer is checked here once, and is a Rust type with valid values afterwards.

mod auth;
mod body;
mod codec;
mod condition;
mod frame;
mod header;
mod verify;

pub use auth::{Challenge, MAX_PROOFS, NONCE_SIZE, PROOF_SIZE, Proof};
pub use body::{
    Attach, AttachReply, ChunkList, DirtyAddition, Hello, HelloReply, Limits, Prepare, PullReply, Role,
    SetView, SlotEntry, decode_attested, encode_attested,
};
pub use codec::{Decoder, Encoder};
pub use condition::{Conditions, Goodbye};
pub use frame::{
    FRAME_HEADER_SIZE, FRAME_MAGIC, FrameHeader, MAX_FRAME_MESSAGES, frame_crc, frame_crc as data_digest,
};
pub use header::{HEADER_SIZE, Kind, MessageHeader, Status};
pub use verify::{Compare, CompareReply, DigestReply, MAX_COMPARE, block_digest, block_digests};

use thiserror::Error;

/// The protocol version of this build, and the only one it speaks.
pub const PROTOCOL_VERSION: u16 = 2;
/// Largest body of a control message in bytes; longer ones are refused before any memory is set aside.
pub const MAX_BODY: u32 = 1 << 20;
/// Largest data payload of one message in bytes. Larger requests are split by the client.
pub const MAX_IO: u32 = 1 << 20;
/// Longest range of one Discard or WriteZeroes in bytes. Larger requests are split by the client.
pub const MAX_RANGE: u32 = 64 << 20;
/// Most request slots of one client session, and so the length of a node's slot table.
pub const MAX_SLOTS: u16 = 1024;
/// Longest text (a holder's name, the words of a refusal) in bytes.
pub const MAX_TEXT: usize = 512;

/// Why bytes from a peer are refused. The connection they came from is closed: nothing after them can be trusted.
#[derive(Clone, PartialEq, Eq, Debug, Error)]
pub enum WireError {
    /// A frame does not start with the magic number.
    #[error("frame starts with {found:#010x}, expected {FRAME_MAGIC:#010x}: the peer does not speak RMR")]
    Magic {
        /// The four bytes found, as a little-endian number.
        found: u32,
    },
    /// The frame is of another protocol version.
    #[error("frame of protocol version {found}, this side speaks {PROTOCOL_VERSION}")]
    Version {
        /// The version found.
        found: u16,
    },
    /// The message table fails its checksum.
    #[error("message table has checksum {found:#010x}, expected {expected:#010x}")]
    Checksum {
        /// What was computed over the bytes received.
        expected: u32,
        /// What the frame says.
        found: u32,
    },
    /// A count or length is out of its limit.
    #[error("{what} is {found}, expected {expected}")]
    Limit {
        /// The field.
        what: &'static str,
        /// What was found.
        found: u64,
        /// What it may be.
        expected: &'static str,
    },
    /// A code has no meaning in this version.
    #[error("{what} has the unknown code {found}")]
    UnknownCode {
        /// The field.
        what: &'static str,
        /// What was found.
        found: u64,
    },
    /// A body ends before its last field, or goes on after it.
    #[error("body of {kind:?} is {found} bytes, which does not fit its fields")]
    BodyLength {
        /// The message it belongs to.
        kind: Kind,
        /// Length of the body in bytes.
        found: usize,
    },
    /// A body decodes to a value that breaks a rule.
    #[error("body of {kind:?}: {reason}")]
    BodyValue {
        /// The message it belongs to.
        kind: Kind,
        /// The rule, in words.
        reason: String,
    },
    /// A message arrived where it has no place.
    #[error("{kind:?} is not expected here: {reason}")]
    Unexpected {
        /// The message.
        kind: Kind,
        /// What was expected.
        reason: &'static str,
    },
}
