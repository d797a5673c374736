//! What goes in sends and behind written data: an envelope with the connection's own affairs, and a message or a part of
//! one. `docs/protocol.md` describes every byte.
//!
//! ```text
//! send:   ┌──────────┬──────────┬────────┬─────────┬─────────┬─────────┬──────┐
//!         │ envelope │ released │ grants │ returns │ header  │ targets │ body │
//!         │ 16 bytes │  4 each  │ 24 each│  4 each │ 80      │ 16 each │      │
//!         └──────────┴──────────┴────────┴─────────┴─────────┴─────────┴──────┘
//! write:  data, up to 15 bytes of padding, envelope, header
//! ```

use zerocopy::little_endian::{U16, U32};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use crate::wire::{HEADER_SIZE, MAX_BODY, MessageHeader, WireError};

/// Size of an envelope in bytes.
pub(super) const ENVELOPE: usize = 16;
/// What stands behind written data.
pub(super) const TAIL: usize = ENVELOPE + HEADER_SIZE;
/// Positions in a window are multiples of this: what 16 bits can name of 1 MiB.
pub(super) const UNIT: usize = 16;
/// Most targets of a read.
pub(super) const MAX_TARGETS: usize = 128;
/// Most entries of each list in one packet.
pub(super) const MAX_LIST: usize = 24;
/// Size of what each side says of itself while connecting.
pub(super) const PRIVATE: usize = 16;

const GRANT: usize = 24;
const TARGET: usize = 16;
const MAGIC: [u8; 4] = *b"RMRV";
const VERSION: u16 = 1;

/// What a packet is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub(super) enum PacketKind {
    /// A message, or the first part of one.
    Message = 1,
    /// The next part of a message.
    Continuation = 2,
    /// Nothing but the connection's own affairs.
    Flow = 3,
    /// Behind written data.
    Tail = 4,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEnvelope {
    kind: u8,
    released: u8,
    grants: u8,
    returns: u8,
    receives: U16,
    targets: U16,
    content: U32,
    wanted: U32,
}

/// Slot memory that a node lends to a client.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Grant {
    pub(super) window: u16,
    pub(super) length: u32,
    pub(super) key: u32,
    pub(super) address: u64,
}

/// Where the data of a read goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Target {
    pub(super) address: u64,
    pub(super) length: u32,
    pub(super) key: u32,
}

/// The connection's own affairs, which go with any packet.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Affairs {
    /// Receive buffers posted again since this was last told.
    pub(super) receives: u16,
    /// Bytes of slot memory that the sender waits for.
    pub(super) wanted: u32,
    /// Slots whose data is dealt with.
    pub(super) released: Vec<u32>,
    pub(super) grants: Vec<Grant>,
    /// Windows given back.
    pub(super) returns: Vec<u16>,
}

/// A packet that was read: what it is, whose content it has, and the affairs.
#[derive(PartialEq, Eq, Debug)]
pub(super) struct Packet<'a> {
    pub(super) kind: PacketKind,
    pub(super) affairs: Affairs,
    /// Length of the whole message that the content begins, with header, targets and body.
    pub(super) total: u32,
    pub(super) targets: u16,
    pub(super) content: &'a [u8],
}

/// Appends a packet's envelope and lists to `bytes`.
pub(super) fn begin(kind: PacketKind, affairs: &Affairs, total: u32, targets: u16, bytes: &mut Vec<u8>) {
    let count = |n: usize| u8::try_from(n).unwrap_or(u8::MAX);
    let raw = RawEnvelope {
        kind: kind as u8,
        released: count(affairs.released.len()),
        grants: count(affairs.grants.len()),
        returns: count(affairs.returns.len()),
        receives: U16::new(affairs.receives),
        targets: U16::new(targets),
        content: U32::new(total),
        wanted: U32::new(affairs.wanted),
    };
    bytes.extend_from_slice(raw.as_bytes());
    for mark in &affairs.released {
        bytes.extend_from_slice(&mark.to_le_bytes());
    }
    for grant in &affairs.grants {
        bytes.extend_from_slice(&u32::from(grant.window).to_le_bytes());
        bytes.extend_from_slice(&grant.length.to_le_bytes());
        bytes.extend_from_slice(&grant.key.to_le_bytes());
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&grant.address.to_le_bytes());
    }
    for window in &affairs.returns {
        bytes.extend_from_slice(&u32::from(*window).to_le_bytes());
    }
}

/// Appends a target.
pub(super) fn push_target(target: &Target, bytes: &mut Vec<u8>) {
    bytes.extend_from_slice(&target.address.to_le_bytes());
    bytes.extend_from_slice(&target.length.to_le_bytes());
    bytes.extend_from_slice(&target.key.to_le_bytes());
}

fn limit(what: &'static str, found: impl Into<u64>, expected: &'static str) -> WireError {
    WireError::Limit { what, found: found.into(), expected }
}

/// Reads a packet.
///
/// # Errors
/// An unknown kind, lists or lengths out of their limits, or bytes that end too early.
pub(super) fn decode(bytes: &[u8]) -> Result<Packet<'_>, WireError> {
    let short = || limit("packet", bytes.len() as u64, "its envelope and lists");
    let (raw, mut rest) = RawEnvelope::ref_from_prefix(bytes).map_err(|_| short())?;
    let kind = match raw.kind {
        1 => PacketKind::Message,
        2 => PacketKind::Continuation,
        3 => PacketKind::Flow,
        4 => PacketKind::Tail,
        found => return Err(WireError::UnknownCode { what: "packet", found: found.into() }),
    };
    for (what, count) in [
        ("slots released", raw.released),
        ("windows granted", raw.grants),
        ("windows given back", raw.returns),
    ] {
        if usize::from(count) > MAX_LIST {
            return Err(limit(what, count, "at most 24"));
        }
    }
    let mut take = |length: usize| {
        let (part, after) = rest.split_at_checked(length).ok_or_else(short)?;
        rest = after;
        Ok::<_, WireError>(part)
    };
    let mut affairs =
        Affairs { receives: raw.receives.get(), wanted: raw.wanted.get(), ..Affairs::default() };
    for mark in take(4 * usize::from(raw.released))?.as_chunks::<4>().0 {
        affairs.released.push(u32::from_le_bytes(*mark));
    }
    for grant in take(GRANT * usize::from(raw.grants))?.as_chunks::<GRANT>().0 {
        let number = |at: usize| u32::from_le_bytes([grant[at], grant[at + 1], grant[at + 2], grant[at + 3]]);
        let (window, length) = (number(0), number(4));
        let window = u16::try_from(window).map_err(|_| limit("window", window, "below 65536"))?;
        if length == 0 || length > super::MAX_WINDOW || !length.is_multiple_of(4096) {
            return Err(limit("window length", length, "a multiple of 4096, at most 1 MiB"));
        }
        let address = u64::from(number(16)) | u64::from(number(20)) << 32;
        affairs.grants.push(Grant { window, length, key: number(8), address });
    }
    for window in take(4 * usize::from(raw.returns))?.as_chunks::<4>().0 {
        let window = u32::from_le_bytes(*window);
        affairs.returns.push(u16::try_from(window).map_err(|_| limit("window", window, "below 65536"))?);
    }
    let (total, targets) = (raw.content.get(), raw.targets.get());
    if usize::from(targets) > MAX_TARGETS {
        return Err(limit("targets", targets, "at most 128"));
    }
    let most = MAX_BODY as usize + HEADER_SIZE + TARGET * MAX_TARGETS;
    if total as usize > most {
        return Err(limit("message", total, "header, targets and a body of 1 MiB at most"));
    }
    Ok(Packet { kind, affairs, total, targets, content: rest })
}

/// Reads the header and the targets that a message begins with; returns the rest of its content.
///
/// # Errors
/// When the header is none, or the content is too short.
pub(super) fn decode_message<'a>(
    packet: &Packet<'a>,
) -> Result<(MessageHeader, Vec<Target>, &'a [u8]), WireError> {
    let short = || limit("message", packet.content.len() as u64, "a header and its targets");
    let (header, rest) = packet.content.split_first_chunk::<HEADER_SIZE>().ok_or_else(short)?;
    let header = MessageHeader::decode(header)?;
    let (list, rest) = rest.split_at_checked(TARGET * usize::from(packet.targets)).ok_or_else(short)?;
    let number = |t: &[u8; TARGET], at: usize| u32::from_le_bytes([t[at], t[at + 1], t[at + 2], t[at + 3]]);
    let targets = list.as_chunks::<TARGET>().0.iter().map(|t| Target {
        address: u64::from(number(t, 0)) | u64::from(number(t, 4)) << 32,
        length: number(t, 8),
        key: number(t, 12),
    });
    Ok((header, targets.collect(), rest))
}

/// What a side says of itself while connecting.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Introduction {
    /// Receive buffers that the other side may fill before it hears of new ones.
    pub(super) receives: u16,
    /// Size of each in bytes.
    pub(super) receive_size: u32,
}

impl Introduction {
    pub(super) fn encode(self) -> [u8; PRIVATE] {
        let mut bytes = [0; PRIVATE];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
        bytes[6..8].copy_from_slice(&self.receives.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.receive_size.to_le_bytes());
        bytes
    }

    /// Reads it; the connection manager may append zeroes.
    pub(super) fn decode(bytes: &[u8]) -> Result<Self, String> {
        let Some(bytes) = bytes.first_chunk::<PRIVATE>() else {
            return Err(format!("it introduces itself with {} bytes, expected {PRIVATE}", bytes.len()));
        };
        if bytes[..4] != MAGIC {
            return Err("it does not speak RMR".to_owned());
        }
        let version = u16::from_le_bytes([bytes[4], bytes[5]]);
        if version != VERSION {
            return Err(format!("it speaks version {version} of the RDMA binding, this side {VERSION}"));
        }
        let receives = u16::from_le_bytes([bytes[6], bytes[7]]);
        let receive_size = u32::from_le_bytes([bytes[8], bytes[9], bytes[10], bytes[11]]);
        if receives < 4 || !(1024..=1 << 20).contains(&receive_size) {
            return Err(format!(
                "{receives} receive buffers of {receive_size} bytes: expected 4 of 1024 at least"
            ));
        }
        Ok(Self { receives, receive_size })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::pool::PoolId;
    use crate::wire::Kind;

    fn affairs() -> Affairs {
        Affairs {
            receives: 7,
            wanted: 9,
            released: vec![1, 0xffff_ffff],
            grants: vec![Grant { window: 3, length: 65536, key: 5, address: 0x7fff_1234_5678_9000 }],
            returns: vec![65535],
        }
    }

    #[test]
    fn a_packet_survives_the_wire_and_is_refused_when_cut() {
        let header = MessageHeader::new(Kind::Read, PoolId::random());
        let target = Target { address: u64::MAX - 4095, length: 4096, key: 0xdead_beef };
        let mut bytes = Vec::new();
        begin(PacketKind::Message, &affairs(), 96, 1, &mut bytes);
        let lists = bytes.len();
        bytes.extend_from_slice(&header.encode());
        push_target(&target, &mut bytes);
        let packet = decode(&bytes).unwrap();
        assert_eq!((packet.kind, &packet.affairs, packet.total), (PacketKind::Message, &affairs(), 96));
        assert_eq!(decode_message(&packet), Ok((header, vec![target], &[][..])));
        for end in 0..lists {
            assert!(decode(&bytes[..end]).is_err(), "cut at {end}");
        }
        for end in lists..bytes.len() {
            assert!(decode_message(&decode(&bytes[..end]).unwrap()).is_err(), "cut at {end}");
        }
    }

    #[test]
    fn introductions_survive_and_strangers_are_named() {
        let one = Introduction { receives: 64, receive_size: 4096 };
        let padded = [&one.encode()[..], &[0; 40]].concat();
        assert_eq!(Introduction::decode(&padded), Ok(one));
        assert!(Introduction::decode(b"GET / HTTP/1.1\r\n").unwrap_err().contains("does not speak RMR"));
        let none = Introduction { receives: 0, receive_size: 4096 }.encode();
        assert!(Introduction::decode(&none).unwrap_err().contains("expected 4"));
        assert!(Introduction::decode(&one.encode()[..15]).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_the_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            if let Ok(packet) = decode(&bytes) {
                let _ = decode_message(&packet);
            }
            let _ = Introduction::decode(&bytes);
        }
    }
}
