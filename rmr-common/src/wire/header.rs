//! The header that every message starts with.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{MAX_BODY, MAX_IO, MAX_SLOTS, Role, WireError};
use crate::pool::{Epoch, MAX_NUMBER, MemberSet, PoolId, Sequence, Slot, ViewNumber};

/// Size of a [`MessageHeader`] in bytes.
pub const HEADER_SIZE: usize = 80;

/// What a message is.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum Kind {
    /// First message of a connection: versions, capabilities, who speaks, which pool.
    Hello = 1,
    /// Answer to [`Kind::Hello`]: limits, the member, its pool specification and view.
    HelloReply = 2,
    /// A client asks for the pool with a new epoch.
    Attach = 3,
    /// Answer to [`Kind::Attach`]: view and slot table, or who holds the pool.
    AttachReply = 4,
    /// The client leaves; everything it wrote is complete everywhere and flushed.
    Detach = 5,
    /// Answer to [`Kind::Detach`].
    DetachReply = 6,
    /// The coordinator's next view, with the ranges that absent members have missed.
    SetView = 7,
    /// Answer to [`Kind::SetView`]: both are durable.
    SetViewReply = 8,
    /// Are you there? Carries the watermark while nothing is written.
    Ping = 9,
    /// Answer to [`Kind::Ping`].
    Pong = 10,
    /// The sender is about to stop on purpose.
    Goodbye = 11,
    /// The coordinator names the member from which a stale one is to be brought up to date.
    Prepare = 12,
    /// Answer to [`Kind::Prepare`]: the link to the source stands.
    PrepareReply = 13,
    /// A Syncing member tells the coordinator which chunks are current and durable on it.
    ChunksDone = 14,
    /// The coordinator passes that on to the members that have them on record as missed.
    ClearDirty = 15,
    /// Write `length` bytes of payload at `offset`.
    Write = 16,
    /// Read `length` bytes at `offset`.
    Read = 17,
    /// Make everything answered so far durable.
    Flush = 18,
    /// Forget `length` bytes at `offset`; they read as zeroes afterwards.
    Discard = 19,
    /// Make `length` bytes at `offset` read as zeroes.
    WriteZeroes = 20,
    /// A Syncing member tells the coordinator that it cannot get what it misses from its source.
    SourceFailed = 21,
    /// A node whose pool has a key asks whoever opened the connection to prove that it has it.
    Challenge = 22,
    /// Answer to [`Kind::Challenge`].
    Proof = 23,
    /// A stale member asks its source for a page of a dirty map.
    PullMap = 24,
    /// Answer to [`Kind::PullMap`].
    PullMapReply = 25,
    /// A stale member asks its source for the blocks of a range that it misses.
    Pull = 26,
    /// Answer to [`Kind::Pull`]: the blocks that are missed. Their data is there before it.
    PullReply = 27,
    /// The coordinator asks a Clean member to compare a range of its own with that of another one.
    Compare = 28,
    /// Answer to [`Kind::Compare`]: which blocks differed.
    CompareReply = 29,
    /// Another member, or the coordinator, asks for the digests of the blocks of a range.
    Digest = 30,
    /// Answer to [`Kind::Digest`].
    DigestReply = 31,
    /// Answer to a request with a slot; carries the data of a read.
    IoReply = 32,
    /// Answer to [`Kind::Flush`].
    FlushReply = 33,
    /// A node passes an operator's command to the client that is attached; the body is the JSON of a
    /// [`crate::pool::Command`].
    Command = 40,
    /// Answer to [`Kind::Command`], from the client; the body is the JSON of a [`crate::pool::CommandReply`].
    CommandReply = 41,
    /// The coordinator asks whether the member can hold a pool of `offset` bytes, and to make room for it.
    Grow = 42,
    /// Answer to [`Kind::Grow`]: there is room, and it reads as zeroes.
    GrowReply = 43,
    /// The data of the blocks that the [`Kind::PullReply`] behind it lists.
    PullData = 44,
    /// The coordinator has members put on durable record how far the pool has come: `sequence` is the number of the mark, the
    /// body what is remembered of all members.
    Mark = 45,
    /// Answer to [`Kind::Mark`]: it is durable.
    MarkReply = 46,
    /// The coordinator tells the members why others are not current. Not answered.
    Conditions = 47,
}

impl Kind {
    /// The kind that stands as `code` on the wire.
    #[must_use]
    pub const fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            1 => Self::Hello,
            2 => Self::HelloReply,
            3 => Self::Attach,
            4 => Self::AttachReply,
            5 => Self::Detach,
            6 => Self::DetachReply,
            7 => Self::SetView,
            8 => Self::SetViewReply,
            9 => Self::Ping,
            10 => Self::Pong,
            11 => Self::Goodbye,
            12 => Self::Prepare,
            13 => Self::PrepareReply,
            14 => Self::ChunksDone,
            15 => Self::ClearDirty,
            16 => Self::Write,
            17 => Self::Read,
            18 => Self::Flush,
            19 => Self::Discard,
            20 => Self::WriteZeroes,
            21 => Self::SourceFailed,
            22 => Self::Challenge,
            23 => Self::Proof,
            24 => Self::PullMap,
            25 => Self::PullMapReply,
            26 => Self::Pull,
            27 => Self::PullReply,
            28 => Self::Compare,
            29 => Self::CompareReply,
            30 => Self::Digest,
            31 => Self::DigestReply,
            32 => Self::IoReply,
            33 => Self::FlushReply,
            40 => Self::Command,
            41 => Self::CommandReply,
            42 => Self::Grow,
            43 => Self::GrowReply,
            44 => Self::PullData,
            45 => Self::Mark,
            46 => Self::MarkReply,
            47 => Self::Conditions,
            _ => return None,
        })
    }

    /// Whether the payload is guest data that is placed straight into its destination (else it is a body).
    #[must_use]
    pub const fn carries_data(self) -> bool {
        matches!(self, Self::Write | Self::IoReply | Self::PullData)
    }

    /// Whether this is of the resync between nodes: no client ever sends or gets one.
    #[must_use]
    pub const fn is_resync(self) -> bool {
        matches!(self, Self::PullMap | Self::PullMapReply | Self::Pull | Self::PullReply | Self::PullData)
    }

    /// Whether a connection that was opened in this role may send it, once it is greeted. Everything else closes the
    /// connection.
    #[must_use]
    pub const fn is_from(self, role: Role) -> bool {
        match role {
            Role::Client => matches!(
                self,
                Self::Attach
                    | Self::Detach
                    | Self::SetView
                    | Self::Ping
                    | Self::Prepare
                    | Self::ClearDirty
                    | Self::Write
                    | Self::Read
                    | Self::Flush
                    | Self::Discard
                    | Self::WriteZeroes
                    | Self::Compare
                    | Self::Digest
                    | Self::CommandReply
                    | Self::Grow
                    | Self::Mark
                    | Self::Conditions
            ),
            Role::Peer => {
                matches!(self, Self::PullMap | Self::Pull | Self::Digest | Self::Command | Self::Ping)
            }
        }
    }

    /// Whether this is one of the five I/O requests.
    #[must_use]
    pub const fn is_request(self) -> bool {
        matches!(self, Self::Write | Self::Read | Self::Flush | Self::Discard | Self::WriteZeroes)
    }
}

/// Outcome of a request. Any answer with a status other than [`Status::Ok`] may carry a text as its body.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
#[repr(u16)]
pub enum Status {
    /// Done.
    Ok = 0,
    /// The request breaks a rule: range, alignment, length.
    BadRequest = 1,
    /// The sender's epoch is over: another client attached since.
    StaleEpoch = 2,
    /// The member has another view than the request.
    StaleView = 3,
    /// The connection has not attached.
    NotAttached = 4,
    /// A live client holds the pool; the text names it.
    Held = 5,
    /// The node has no such pool.
    NoSuchPool = 6,
    /// No common protocol version.
    Version = 7,
    /// The disk answered with an error.
    IoError = 8,
    /// The disk is full.
    NoSpace = 9,
    /// The proposed view is no legal step from the member's view.
    IllegalView = 10,
    /// The node is stopping.
    Stopping = 11,
    /// The node is at a limit (connections, memory).
    Limit = 12,
    /// The data does not fit the digest in the header: it was changed on its way, or while it was sent.
    DigestDiffers = 13,
    /// The pool has a key, and the sender shows none.
    KeyRequired = 14,
    /// The sender shows a key, and it is not the pool's.
    KeyRefused = 15,
    /// The sender shows a key, and the node has none for the pool that it could use.
    NoKey = 16,
}

impl Status {
    /// The status that stands as `code` on the wire.
    #[must_use]
    pub const fn from_code(code: u16) -> Option<Self> {
        Some(match code {
            0 => Self::Ok,
            1 => Self::BadRequest,
            2 => Self::StaleEpoch,
            3 => Self::StaleView,
            4 => Self::NotAttached,
            5 => Self::Held,
            6 => Self::NoSuchPool,
            7 => Self::Version,
            8 => Self::IoError,
            9 => Self::NoSpace,
            10 => Self::IllegalView,
            11 => Self::Stopping,
            12 => Self::Limit,
            13 => Self::DigestDiffers,
            14 => Self::KeyRequired,
            15 => Self::KeyRefused,
            16 => Self::NoKey,
            _ => return None,
        })
    }
}

/// What a status means, for logs and operators.
impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ok => "done",
            Self::BadRequest => "malformed request",
            Self::StaleEpoch => "another client has attached since",
            Self::StaleView => "the member has another view",
            Self::NotAttached => "not attached",
            Self::Held => "another client holds the pool",
            Self::NoSuchPool => "no such pool",
            Self::Version => "no common protocol version",
            Self::IoError => "I/O error of the disk",
            Self::NoSpace => "the disk is full",
            Self::IllegalView => "no legal step from the member's view",
            Self::Stopping => "the node is stopping",
            Self::Limit => "a limit of the node is reached",
            Self::DigestDiffers => "the data does not fit its digest",
            Self::KeyRequired => "the pool has a key, and none was shown",
            Self::KeyRefused => "the key is not the pool's",
            Self::NoKey => "the node has no key for the pool",
        })
    }
}

/// Header of a message, as it stands on the wire: 80 bytes, little-endian, no padding.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawHeader {
    kind: U16,
    status: U16,
    slot: U16,
    missing: u8,
    flags: u8,
    payload: U32,
    length: U32,
    pool: [u8; 16],
    epoch: U64,
    view: U64,
    sequence: U64,
    watermark: U64,
    offset: U64,
    digest: U32,
    reserved: U32,
}

/// Header of a message. Fields that a kind does not use are zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MessageHeader {
    /// What the message is.
    pub kind: Kind,
    /// Outcome, in answers; [`Status::Ok`] in requests.
    pub status: Status,
    /// Request slot of the client; an answer carries its request's.
    pub slot: Slot,
    /// Members that are Out and miss this write.
    pub missing: MemberSet,
    /// Bytes of data or body that follow.
    pub payload: u32,
    /// Bytes of the pool that the request covers.
    pub length: u32,
    /// The pool.
    pub pool: PoolId,
    /// The client's attachment.
    pub epoch: Epoch,
    /// The view under which the request was made.
    pub view: ViewNumber,
    /// Order of a write; an answer carries its request's. Also pairs control messages with their answers.
    pub sequence: Sequence,
    /// All writes up to this one are complete on every active member.
    pub watermark: Sequence,
    /// First byte of the pool that the request covers.
    pub offset: u64,
    /// CRC32C of the data that follows; in a Read that the answer is to carry one, whatever the value.
    pub digest: Option<u32>,
}

/// The bit of the flags that says that a digest is there.
const FLAG_DIGEST: u8 = 1;

impl MessageHeader {
    /// A header of `kind` for `pool` with every other field zero.
    #[must_use]
    pub const fn new(kind: Kind, pool: PoolId) -> Self {
        Self {
            kind,
            status: Status::Ok,
            slot: Slot(0),
            missing: MemberSet::EMPTY,
            payload: 0,
            length: 0,
            pool,
            epoch: Epoch(0),
            view: ViewNumber(0),
            sequence: Sequence(0),
            watermark: Sequence(0),
            offset: 0,
            digest: None,
        }
    }

    /// The answer of `kind` to this request, without payload.
    #[must_use]
    pub const fn reply(&self, kind: Kind, status: Status) -> Self {
        let mut reply = *self;
        reply.kind = kind;
        reply.status = status;
        reply.payload = 0;
        reply.digest = None;
        reply
    }

    /// The 80 bytes of the header.
    #[must_use]
    pub fn encode(&self) -> [u8; HEADER_SIZE] {
        let raw = RawHeader {
            kind: U16::new(self.kind as u16),
            status: U16::new(self.status as u16),
            slot: U16::new(self.slot.0),
            missing: self.missing.0,
            flags: if self.digest.is_some() { FLAG_DIGEST } else { 0 },
            payload: U32::new(self.payload),
            length: U32::new(self.length),
            pool: *self.pool.as_bytes(),
            epoch: U64::new(self.epoch.0),
            view: U64::new(self.view.0),
            sequence: U64::new(self.sequence.0),
            watermark: U64::new(self.watermark.0),
            offset: U64::new(self.offset),
            digest: U32::new(self.digest.unwrap_or(0)),
            reserved: U32::new(0),
        };
        zerocopy::transmute!(raw)
    }

    /// Reads a header and checks every field that has limits of its own.
    ///
    /// # Errors
    /// Unknown codes, reserved bits that are set, and lengths beyond their limit.
    pub fn decode(bytes: &[u8; HEADER_SIZE]) -> Result<Self, WireError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        let unknown = |what, found: u16| WireError::UnknownCode { what, found: u64::from(found) };
        let kind = Kind::from_code(raw.kind.get()).ok_or_else(|| unknown("message kind", raw.kind.get()))?;
        let status =
            Status::from_code(raw.status.get()).ok_or_else(|| unknown("status", raw.status.get()))?;
        let has_digest = raw.flags == FLAG_DIGEST;
        let may_have_digest = matches!(kind, Kind::Write | Kind::Read | Kind::IoReply);
        if !has_digest && (raw.flags != 0 || raw.digest.get() != 0)
            || has_digest && !may_have_digest
            || raw.reserved.get() != 0
        {
            return Err(WireError::UnknownCode { what: "reserved field", found: u64::from(raw.flags) });
        }
        let limit = |what, found: u64, most: u64, expected| {
            if found > most { Err(WireError::Limit { what, found, expected }) } else { Ok(()) }
        };
        limit("slot", raw.slot.get().into(), u64::from(MAX_SLOTS) - 1, "below 1024")?;
        let most = if kind.carries_data() { MAX_IO } else { MAX_BODY };
        limit("payload", raw.payload.get().into(), most.into(), "at most 1 MiB")?;
        let numbers = [raw.epoch, raw.view, raw.sequence, raw.watermark].map(U64::get);
        if numbers.iter().any(|number| *number > MAX_NUMBER) {
            return Err(Self::excessive(numbers));
        }
        let header = Self {
            kind,
            status,
            slot: Slot(raw.slot.get()),
            missing: MemberSet(raw.missing),
            payload: raw.payload.get(),
            length: raw.length.get(),
            pool: PoolId::from_bytes(raw.pool),
            epoch: Epoch(raw.epoch.get()),
            view: ViewNumber(raw.view.get()),
            sequence: Sequence(raw.sequence.get()),
            watermark: Sequence(raw.watermark.get()),
            offset: raw.offset.get(),
            digest: has_digest.then_some(raw.digest.get()),
        };
        if kind == Kind::Write && header.payload != header.length {
            return Err(WireError::Limit {
                what: "payload of a write",
                found: header.payload.into(),
                expected: "its length",
            });
        }
        if kind.is_request() && kind != Kind::Write && header.payload != 0 {
            return Err(WireError::Limit {
                what: "payload of a request without data",
                found: header.payload.into(),
                expected: "0",
            });
        }
        Ok(header)
    }

    /// What is said of epoch, view, sequence and watermark when one of them is too large.
    #[cold]
    fn excessive(numbers: [u64; 4]) -> WireError {
        let named = ["epoch", "view", "sequence", "watermark"].into_iter().zip(numbers);
        let (what, found) = named.max_by_key(|(_, number)| *number).unwrap_or_default();
        WireError::Limit { what, found, expected: "at most 2^64 - 2^40 - 1" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn sample() -> MessageHeader {
        MessageHeader {
            slot: Slot(5),
            missing: MemberSet(0b101),
            payload: 4096,
            length: 4096,
            epoch: Epoch(7),
            view: ViewNumber(8),
            sequence: Sequence(9),
            watermark: Sequence(6),
            offset: 1 << 40,
            ..MessageHeader::new(Kind::Write, PoolId::random())
        }
    }

    #[test]
    fn a_header_survives_the_wire() {
        let header = sample();
        assert_eq!(MessageHeader::decode(&header.encode()), Ok(header));
    }

    #[test]
    fn a_digest_stands_with_its_flag_in_messages_with_data_only() {
        for digest in [Some(0), Some(7), Some(u32::MAX)] {
            let header = MessageHeader { digest, ..sample() };
            let bytes = header.encode();
            assert_eq!((bytes[7], &bytes[72..76]), (1, &digest.unwrap().to_le_bytes()[..]));
            assert_eq!(MessageHeader::decode(&bytes), Ok(header));
            assert_eq!(header.reply(Kind::IoReply, Status::Ok).digest, None);
            let ping = MessageHeader { digest, ..MessageHeader::new(Kind::Ping, PoolId::random()) };
            assert!(MessageHeader::decode(&ping.encode()).is_err());
        }
        let mut bytes = sample().encode();
        bytes[72] = 1;
        assert!(MessageHeader::decode(&bytes).is_err(), "a digest without its flag");
    }

    #[test]
    fn fields_stand_where_the_document_says() {
        let bytes = sample().encode();
        assert_eq!(bytes[0..2], 16u16.to_le_bytes());
        assert_eq!(bytes[4..6], 5u16.to_le_bytes());
        assert_eq!(bytes[6], 0b101);
        assert_eq!(bytes[8..12], 4096u32.to_le_bytes());
        assert_eq!(bytes[12..16], 4096u32.to_le_bytes());
        assert_eq!(bytes[32..40], 7u64.to_le_bytes());
        assert_eq!(bytes[40..48], 8u64.to_le_bytes());
        assert_eq!(bytes[48..56], 9u64.to_le_bytes());
        assert_eq!(bytes[56..64], 6u64.to_le_bytes());
        assert_eq!(bytes[64..72], (1u64 << 40).to_le_bytes());
    }

    #[test]
    fn a_write_whose_payload_is_not_its_length_is_refused() {
        let header = MessageHeader { length: 8192, ..sample() };
        assert!(MessageHeader::decode(&header.encode()).is_err());
    }

    #[test]
    fn a_number_that_leaves_no_room_above_it_is_refused() {
        for at in [32, 40, 48, 56] {
            let mut bytes = sample().encode();
            bytes[at..at + 8].copy_from_slice(&MAX_NUMBER.to_le_bytes());
            assert!(MessageHeader::decode(&bytes).is_ok(), "at {at}");
            bytes[at..at + 8].copy_from_slice(&(MAX_NUMBER + 1).to_le_bytes());
            assert!(MessageHeader::decode(&bytes).is_err(), "at {at}");
        }
    }

    #[test]
    fn a_payload_beyond_the_limit_is_refused() {
        let header = MessageHeader { length: MAX_IO + 1, payload: MAX_IO + 1, ..sample() };
        assert!(matches!(
            MessageHeader::decode(&header.encode()),
            Err(WireError::Limit { what: "payload", .. })
        ));
    }

    proptest! {
        #[test]
        fn no_bytes_make_decoding_panic(bytes in proptest::array::uniform(any::<u8>())) {
            if let Ok(header) = MessageHeader::decode(&bytes) {
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
