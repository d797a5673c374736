//! Bodies of control messages: what each says, with an encoder and a decoder of its own.

use super::codec::{Decoder, Encoder};
use super::{Kind, MAX_IO, MAX_SLOTS, NONCE_SIZE, WireError};
use crate::pool::{
    Address, Attested, BootId, Chunk, ClientId, Epoch, MemberId, MemberSet, PoolSpec, Position, Sequence,
    Slot, StoreId, View,
};

/// Who opened a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Role {
    /// A client of the pool.
    Client = 1,
    /// Another node, for resync.
    Peer = 2,
}

/// Body of [`Kind::Hello`]. The header's pool id is nil when the pool is asked for by name.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Hello {
    /// Lowest and highest protocol version that the sender speaks.
    pub versions: (u16, u16),
    /// Optional abilities of the sender, one bit each; none are defined in version 1.
    pub capabilities: u64,
    /// Who opened the connection.
    pub role: Role,
    /// Identity of the sender.
    pub client: ClientId,
    /// Name of the pool, for a nil pool id; else empty.
    pub pool_name: String,
    /// Who the sender is, in words for operators: host, process, purpose.
    pub description: String,
    /// The sender's random number, if it has a key of the pool.
    pub nonce: Option<[u8; NONCE_SIZE]>,
}

impl Hello {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u16(self.versions.0).u16(self.versions.1).u64(self.capabilities).u8(self.role as u8);
        e.uuid(self.client.as_bytes()).text(&self.pool_name).text(&self.description);
        e.u8(self.nonce.is_some().into());
        if let Some(nonce) = &self.nonce {
            e.bytes(nonce);
        }
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Hello, body);
        let versions = (d.u16()?, d.u16()?);
        let capabilities = d.u64()?;
        let role = match d.u8()? {
            1 => Role::Client,
            2 => Role::Peer,
            found => return Err(WireError::UnknownCode { what: "role", found: found.into() }),
        };
        let client = ClientId::from_bytes(d.uuid()?);
        let (pool_name, description) = (d.text()?, d.text()?);
        let nonce = match d.u8()? {
            0 => None,
            1 => Some(d.array()?),
            found => {
                return Err(d.value_error(format!("{found} for whether there is a nonce, expected 0 or 1")));
            }
        };
        d.finish()?;
        Ok(Self { versions, capabilities, role, client, pool_name, description, nonce })
    }
}

/// What a node lets one client session have outstanding.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limits {
    /// Largest data payload of one message in bytes, at most [`MAX_IO`].
    pub max_io: u32,
    /// Request slots, at most [`MAX_SLOTS`].
    pub slots: u16,
    /// Bytes of data in flight, reads and writes together.
    pub max_bytes: u32,
}

/// Body of a good [`Kind::HelloReply`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct HelloReply {
    /// The version that both sides speak from now on.
    pub version: u16,
    /// Abilities that both sides have.
    pub capabilities: u64,
    /// What the client may have outstanding.
    pub limits: Limits,
    /// Which member this node holds.
    pub member: MemberId,
    /// Whether answered writes survive a power cut without a flush.
    pub write_through: bool,
    /// The run of the node's kernel: another one means that unflushed writes may be lost.
    pub host_boot: BootId,
    /// The run of the node's process: another one means that slot table and block-exact dirty map were lost.
    pub process_boot: BootId,
    /// The member's idea of the pool.
    pub spec: PoolSpec,
    /// The member's view.
    pub view: View,
    /// The highest epoch that the member has accepted.
    pub epoch: Epoch,
    /// How far the member's store has come.
    pub position: Position,
    /// What the member remembers of all members.
    pub attested: Attested,
    /// Whether the last client detached with everything complete and flushed.
    pub clean_detach: bool,
}

impl HelloReply {
    /// The store that the node holds. One that was decoded has its own member in its specification.
    #[must_use]
    pub fn store(&self) -> StoreId {
        self.spec.member(self.member).map_or(StoreId::from_bytes([0; 16]), |m| m.store)
    }

    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u16(self.version).u64(self.capabilities);
        e.u32(self.limits.max_io).u16(self.limits.slots).u32(self.limits.max_bytes);
        e.u8(self.member.as_u8()).u8(self.write_through.into());
        e.uuid(self.host_boot.as_bytes()).uuid(self.process_boot.as_bytes());
        e.view(&self.view).spec(&self.spec).u64(self.epoch.0);
        e.position(&self.position).attested(&self.attested).u8(self.clean_detach.into());
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body, or a limit is zero or too large.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::HelloReply, body);
        let version = d.u16()?;
        let capabilities = d.u64()?;
        let limits = Limits { max_io: d.u32()?, slots: d.u16()?, max_bytes: d.u32()? };
        if !(4096..=MAX_IO).contains(&limits.max_io)
            || !(1..=MAX_SLOTS).contains(&limits.slots)
            || limits.max_bytes < limits.max_io
        {
            return Err(d.value_error(format!(
                "limits of {} bytes a message, {} slots, {} bytes in flight: expected 4096 to {MAX_IO}, 1 to {MAX_SLOTS}, and no less \
                 in flight than in a message",
                limits.max_io, limits.slots, limits.max_bytes
            )));
        }
        let member = d.member()?;
        let write_through = d.u8()? != 0;
        let host_boot = BootId::from_bytes(d.uuid()?);
        let process_boot = BootId::from_bytes(d.uuid()?);
        let (view, spec) = d.pool()?;
        if spec.member(member).is_none() {
            return Err(d.value_error(format!("member {member} is not in its own specification")));
        }
        let epoch = Epoch(d.number()?);
        let (position, attested, clean_detach) = (d.position()?, d.attested()?, d.u8()? != 0);
        d.finish()?;
        Ok(Self {
            version,
            capabilities,
            limits,
            member,
            write_through,
            host_boot,
            process_boot,
            spec,
            view,
            epoch,
            position,
            attested,
            clean_detach,
        })
    }
}

/// Body of [`Kind::Attach`]; the header carries the proposed epoch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attach {
    /// Identity of the client. The same identity may displace its own older session.
    pub client: ClientId,
    /// Displace a live client of another identity.
    pub takeover: bool,
    /// Bring this member back in under the epoch that the client has already. An attachment that begins needs a higher one,
    /// even from a client of the same identity, which may be another process.
    pub rejoin: bool,
    /// While it is attached, any other client that does not yield may displace it.
    pub yields: bool,
    /// Who the client is, in words for operators; named to whoever is refused because of it.
    pub description: String,
    /// For how long the client has had the pool, in milliseconds: more than nothing where it comes back to a member.
    pub held_ms: u64,
}

impl Attach {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.uuid(self.client.as_bytes())
            .u8(self.takeover.into())
            .u8(self.rejoin.into())
            .u8(self.yields.into())
            .text(&self.description)
            .u64(self.held_ms);
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Attach, body);
        let client = ClientId::from_bytes(d.uuid()?);
        let (takeover, rejoin, yields) = (d.u8()? != 0, d.u8()? != 0, d.u8()? != 0);
        let attach = Self { client, takeover, rejoin, yields, description: d.text()?, held_ms: d.u64()? };
        d.finish()?;
        Ok(attach)
    }
}

/// The last write that a member carried out in one slot, or one that its disk failed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SlotEntry {
    /// The slot.
    pub slot: Slot,
    /// Order of the write.
    pub sequence: Sequence,
    /// First byte written.
    pub offset: u64,
    /// Bytes written.
    pub length: u32,
    /// The disk failed it: any part of it may have been carried out.
    pub failed: bool,
}

/// Body of a good [`Kind::AttachReply`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttachReply {
    /// The member's view.
    pub view: View,
    /// The pool as it is in that view.
    pub spec: PoolSpec,
    /// Whose writes the slot table records.
    pub last_client: Option<ClientId>,
    /// Whether the last client detached with everything complete and flushed.
    pub clean_detach: bool,
    /// The used entries of the slot table, and the writes that the disk failed.
    pub slots: Vec<SlotEntry>,
    /// Every write of the last client up to this one was complete on every active member.
    pub watermark: Sequence,
    /// The member's process was started anew since it was last in use, and does not know what was in flight.
    pub tables_lost: bool,
    /// Runs of chunks, as `(first, count)`, that may hold writes which are not complete everywhere or not durable here.
    pub intents: Vec<(Chunk, u64)>,
    /// How far the member's store had come before this attach.
    pub position: Position,
    /// What the member remembers of all members.
    pub attested: Attested,
    /// The disk failed a flush, and no later attachment is known to have dealt with that: what the member had answered and not
    /// flushed may be gone.
    pub flush_failed: bool,
}

impl AttachReply {
    /// Most runs of chunks; a longer list is made shorter by joining neighbours.
    pub const MAX_INTENTS: usize = 16 * 1024;

    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.view(&self.view).spec(&self.spec);
        e.uuid(&self.last_client.map_or([0; 16], |c| *c.as_bytes()));
        e.u8(self.clean_detach.into()).u16(u16::try_from(self.slots.len()).unwrap_or(0));
        for entry in &self.slots {
            e.u16(entry.slot.0).u64(entry.sequence.0).u64(entry.offset).u32(entry.length);
            e.u8(entry.failed.into());
        }
        e.u64(self.watermark.0).u8(self.tables_lost.into());
        e.u32(u32::try_from(self.intents.len()).unwrap_or(0));
        for (first, count) in &self.intents {
            e.u64(first.0).u64(*count);
        }
        e.position(&self.position).attested(&self.attested);
        e.u8(self.flush_failed.into());
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::AttachReply, body);
        let (view, spec) = d.pool()?;
        let client = d.uuid()?;
        let last_client = (client != [0; 16]).then(|| ClientId::from_bytes(client));
        let clean_detach = d.u8()? != 0;
        let count = d.u16()?;
        if count > MAX_SLOTS {
            return Err(d.value_error(format!("{count} slots, expected at most {MAX_SLOTS}")));
        }
        let mut slots = Vec::with_capacity(count.into());
        for _ in 0..count {
            let (slot, sequence) = (Slot(d.u16()?), Sequence(d.number()?));
            let (offset, length, failed) = (d.u64()?, d.u32()?, d.u8()? != 0);
            if slot.0 >= MAX_SLOTS || length == 0 || offset.checked_add(length.into()).is_none() {
                let text = format!("a write of {length} bytes at {offset} in slot {slot}");
                return Err(d.value_error(text));
            }
            slots.push(SlotEntry { slot, sequence, offset, length, failed });
        }
        let watermark = Sequence(d.number()?);
        let tables_lost = d.u8()? != 0;
        let count = d.u32()? as usize;
        if count > Self::MAX_INTENTS {
            return Err(
                d.value_error(format!("{count} runs of chunks, expected at most {}", Self::MAX_INTENTS))
            );
        }
        let mut intents = Vec::with_capacity(count);
        for _ in 0..count {
            intents.push((Chunk(d.u64()?), d.u64()?));
        }
        let (position, attested) = (d.position()?, d.attested()?);
        let flush_failed = d.u8()? != 0;
        d.finish()?;
        Ok(Self {
            view,
            spec,
            last_client,
            clean_detach,
            slots,
            watermark,
            tables_lost,
            intents,
            position,
            attested,
            flush_failed,
        })
    }
}

/// A range of the pool that absent members have missed.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DirtyAddition {
    /// The members that missed it.
    pub members: MemberSet,
    /// First byte.
    pub offset: u64,
    /// Bytes, not zero.
    pub length: u64,
}

/// Body of [`Kind::SetView`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SetView {
    /// The next view.
    pub view: View,
    /// The pool as it is in that view.
    pub spec: PoolSpec,
    /// What its absent members have missed beyond what the member knows.
    pub additions: Vec<DirtyAddition>,
    /// More additions follow in another message of the same view, which alone is answered.
    pub more: bool,
    /// What is remembered of the members of the view.
    pub attested: Attested,
}

impl SetView {
    /// Most additions in one message; a longer list is sent in several.
    pub const MAX_ADDITIONS: usize = 32 * 1024;

    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.view(&self.view).spec(&self.spec);
        e.u8(self.more.into()).u32(u32::try_from(self.additions.len()).unwrap_or(0));
        for addition in &self.additions {
            e.u8(addition.members.0).u64(addition.offset).u64(addition.length);
        }
        e.attested(&self.attested);
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::SetView, body);
        let (view, spec) = d.pool()?;
        let more = d.u8()? != 0;
        let count = d.u32()? as usize;
        if count > Self::MAX_ADDITIONS {
            return Err(d.value_error(format!("{count} additions, expected at most {}", Self::MAX_ADDITIONS)));
        }
        let mut additions = Vec::with_capacity(count);
        for _ in 0..count {
            let members = MemberSet(d.u8()?);
            let (offset, length) = (d.u64()?, d.u64()?);
            if length == 0 || offset.checked_add(length).is_none() {
                return Err(d.value_error(format!("an addition of {length} bytes at {offset}")));
            }
            additions.push(DirtyAddition { members, offset, length });
        }
        let attested = d.attested()?;
        d.finish()?;
        Ok(Self { view, spec, additions, more, attested })
    }
}

/// Body of [`Kind::Mark`] and [`Kind::Detach`]: what is remembered of the members of the pool.
#[must_use]
pub fn encode_attested(attested: &Attested) -> Vec<u8> {
    let mut e = Encoder::default();
    e.attested(attested);
    e.finish()
}

/// Reads the body of a message of `kind` that [`encode_attested`] made.
///
/// # Errors
/// When the bytes are no such body.
pub fn decode_attested(kind: Kind, body: &[u8]) -> Result<Attested, WireError> {
    let mut d = Decoder::new(kind, body);
    let attested = d.attested()?;
    d.finish()?;
    Ok(attested)
}

/// Body of [`Kind::Prepare`].
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prepare {
    /// The member that has what the receiver misses.
    pub source: MemberId,
    /// Where its node listens.
    pub address: Address,
    /// The pool as it is in the committed view; it has the source at that address. The receiver may have been away while
    /// the pool changed.
    pub spec: PoolSpec,
}

impl Prepare {
    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u8(self.source.as_u8()).text(&self.address.to_string()).spec(&self.spec);
        e.finish()
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body, or the specification does not have the source at the address.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::Prepare, body);
        let source = d.member()?;
        let address = d.text()?.parse().map_err(|e| d.value_error(e))?;
        let spec = d.spec()?;
        if spec.member(source).is_none_or(|m| m.address != address) {
            return Err(
                d.value_error(format!("the specification does not have member {source} at {address}"))
            );
        }
        d.finish()?;
        Ok(Self { source, address, spec })
    }
}

/// Body of [`Kind::ChunksDone`] and [`Kind::ClearDirty`]: chunks that are current and durable on a member.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ChunkList {
    /// The member that has them.
    pub member: MemberId,
    /// Blocks that are still stale on it.
    pub blocks_left: u64,
    /// The chunks.
    pub chunks: Vec<Chunk>,
}

impl ChunkList {
    /// Most chunks in one message.
    pub const MAX_CHUNKS: usize = 64 * 1024;

    /// The body's bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut e = Encoder::default();
        e.u8(self.member.as_u8()).u64(self.blocks_left).u32(u32::try_from(self.chunks.len()).unwrap_or(0));
        for chunk in &self.chunks {
            e.u64(chunk.0);
        }
        e.finish()
    }

    /// Reads the body of a message of `kind`.
    ///
    /// # Errors
    /// When the bytes are no such body.
    pub fn decode(kind: Kind, body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(kind, body);
        let (member, blocks_left) = (d.member()?, d.u64()?);
        let count = d.u32()? as usize;
        if count > Self::MAX_CHUNKS {
            return Err(d.value_error(format!("{count} chunks, expected at most {}", Self::MAX_CHUNKS)));
        }
        let chunks = (0..count).map(|_| d.u64().map(Chunk)).collect::<Result<_, _>>()?;
        d.finish()?;
        Ok(Self { member, blocks_left, chunks })
    }
}

/// Body of [`Kind::PullReply`]: which blocks of the range, from the header's offset for its length, the asking member
/// misses. The data of those that are not all zeroes came before it, as [`Kind::PullData`], one after the other.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PullReply {
    /// The missed blocks, by index from the first block of the range, and whether the block is all zeroes.
    pub blocks: Vec<(u32, bool)>,
}

impl PullReply {
    /// Most data bytes of one answer. The source shortens the range that it answers for.
    pub const MAX_DATA: u32 = 256 << 10;
    /// Longest range that one request may ask about, in bytes: the largest chunk.
    pub const MAX_RANGE: u32 = 64 << 20;
    const ZERO: u32 = 1 << 31;

    /// The body for these blocks, of which some are all zeroes and go without data.
    #[must_use]
    pub fn encode(blocks: impl ExactSizeIterator<Item = (u32, bool)>) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(4 * (blocks.len() + 1));
        bytes.extend_from_slice(&u32::try_from(blocks.len()).unwrap_or(0).to_le_bytes());
        for (block, is_zero) in blocks {
            let word = if is_zero { block | Self::ZERO } else { block };
            bytes.extend_from_slice(&word.to_le_bytes());
        }
        bytes
    }

    /// Reads the body.
    ///
    /// # Errors
    /// When the bytes are no such body: blocks out of order, or more than an answer may have.
    pub fn decode(body: &[u8]) -> Result<Self, WireError> {
        let mut d = Decoder::new(Kind::PullReply, body);
        let (count, most) = (d.u32()?, Self::MAX_DATA / 4096);
        if count > most {
            return Err(d.value_error(format!("{count} blocks, expected at most {most}")));
        }
        let mut blocks: Vec<(u32, bool)> = Vec::new();
        for _ in 0..count {
            let word = d.u32()?;
            let block = word & !Self::ZERO;
            if blocks.last().is_some_and(|(last, _)| *last >= block) || block >= Self::MAX_RANGE / 4096 {
                return Err(d.value_error(format!("block {block} out of order or range")));
            }
            blocks.push((block, word & Self::ZERO != 0));
        }
        d.finish()?;
        Ok(Self { blocks })
    }

    /// Bytes of data of the blocks that have any.
    #[must_use]
    pub fn data_bytes(&self) -> usize {
        self.blocks.iter().filter(|(_, is_zero)| !is_zero).count() * 4096
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pool::{ChunkSize, MAX_NUMBER, Mark, MemberSpec, PoolId, ViewNumber};
    use crate::wire::MAX_BODY;
    use proptest::prelude::*;

    fn attested_positions() -> Attested {
        let mut attested = Attested::default();
        attested.regressed = MemberSet(4);
        for member in MemberId::all().skip(1) {
            let position = Position {
                epoch: Epoch(9),
                view_epoch: Epoch(8),
                view: ViewNumber(7),
                mark: Mark(6 + u64::from(member.as_u8())),
            };
            attested.note(member, &position);
        }
        attested
    }

    fn spec() -> PoolSpec {
        let member = |id, port| {
            MemberSpec::new(MemberId::new(id).unwrap(), StoreId::random(), Address::tcp("127.0.0.1", port))
        };
        PoolSpec {
            id: PoolId::random(),
            name: "vm-1".into(),
            size: 64 << 20,
            chunk_size: ChunkSize::default(),
            logical_block_size: 512,
            members: vec![member(0, 1), member(3, 2)],
        }
    }

    fn stores(spec: &PoolSpec) -> Vec<(MemberId, StoreId)> {
        spec.members.iter().map(|m| (m.id, m.store)).collect()
    }

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
            let padded = [bytes, vec![0]].concat();
            assert!(decode(&padded).is_err());
        }
        let pool = spec();
        let view = View::initial(stores(&pool));
        let hello = Hello {
            versions: (1, 1),
            capabilities: 0,
            role: Role::Client,
            client: ClientId::random(),
            pool_name: "vm-1".into(),
            description: "vhost-brmr on hv-1".into(),
            nonce: None,
        };
        check(&hello, hello.encode(), Hello::decode);
        let keyed = Hello { nonce: Some([3; NONCE_SIZE]), ..hello };
        check(&keyed, keyed.encode(), Hello::decode);
        let reply = HelloReply {
            version: 1,
            capabilities: 0,
            limits: Limits { max_io: MAX_IO, slots: 256, max_bytes: 16 << 20 },
            member: MemberId::new(3).unwrap(),
            write_through: true,
            host_boot: BootId::random(),
            process_boot: BootId::random(),
            view: View::initial(stores(&pool)),
            spec: pool.clone(),
            epoch: Epoch(4),
            position: Position { epoch: Epoch(4), ..Position::default() },
            attested: attested_positions(),
            clean_detach: true,
        };
        check(&reply, reply.encode(), HelloReply::decode);
        let attach = Attach {
            client: ClientId::random(),
            takeover: true,
            rejoin: true,
            yields: true,
            description: "x".into(),
            held_ms: 7,
        };
        check(&attach, attach.encode(), Attach::decode);
        let entry =
            SlotEntry { slot: Slot(3), sequence: Sequence(9), offset: 4096, length: 512, failed: false };
        let attached = AttachReply {
            view: view.clone(),
            spec: pool.clone(),
            last_client: Some(ClientId::random()),
            clean_detach: false,
            slots: vec![entry, SlotEntry { failed: true, ..entry }],
            watermark: Sequence(4),
            tables_lost: true,
            intents: vec![(Chunk(3), 2)],
            position: attested_positions().of(MemberId::new(1).unwrap()).to_owned(),
            attested: attested_positions(),
            flush_failed: true,
        };
        check(&attached, attached.encode(), AttachReply::decode);
        let addition = DirtyAddition { members: MemberSet(2), offset: 0, length: 4096 };
        let set = SetView {
            view,
            spec: pool.clone(),
            additions: vec![addition],
            more: true,
            attested: attested_positions(),
        };
        check(&set, set.encode(), SetView::decode);
        let (source, address) = (MemberId::new(3).unwrap(), pool.members[1].address.clone());
        let prepare = Prepare { source, address, spec: pool };
        check(&prepare, prepare.encode(), Prepare::decode);
        for wrong in [
            Prepare { source: MemberId::new(2).unwrap(), ..prepare.clone() },
            Prepare { address: Address::tcp("elsewhere", 2), ..prepare },
        ] {
            assert!(Prepare::decode(&wrong.encode()).is_err(), "{wrong:?}");
        }
        let known = attested_positions();
        check(&known, encode_attested(&known), |b| decode_attested(Kind::Mark, b));
        let member = MemberId::new(1).unwrap();
        let list = ChunkList { member, blocks_left: 7, chunks: vec![Chunk(1), Chunk(1 << 40)] };
        check(&list, list.encode(), |b| ChunkList::decode(Kind::ChunksDone, b));
        let reply = PullReply { blocks: vec![(0, false), (3, true), (9, false)] };
        assert_eq!(reply.data_bytes(), 2 * 4096);
        check(&reply, PullReply::encode(reply.blocks.iter().copied()), PullReply::decode);
        for wrong in [vec![(3, false), (3, true)], (0..65).map(|block| (block, true)).collect()] {
            assert!(PullReply::decode(&PullReply::encode(wrong.into_iter())).is_err());
        }
    }

    #[test]
    fn what_a_peer_names_in_an_attach_reply_has_limits() {
        let spec = spec();
        let entry =
            SlotEntry { slot: Slot(3), sequence: Sequence(9), offset: 4096, length: 512, failed: false };
        let reply = AttachReply {
            view: View::initial(stores(&spec)),
            spec,
            last_client: None,
            clean_detach: false,
            slots: Vec::new(),
            watermark: Sequence(0),
            tables_lost: false,
            intents: Vec::new(),
            position: Position::default(),
            attested: Attested::default(),
            flush_failed: false,
        };
        let is_read = |reply: &AttachReply| AttachReply::decode(&reply.encode()).is_ok();
        let with = |entry| AttachReply { slots: vec![entry], ..reply.clone() };
        let last = SlotEntry { slot: Slot(MAX_SLOTS - 1), sequence: Sequence(MAX_NUMBER), ..entry };
        assert!(is_read(&with(last)));
        assert!(!is_read(&with(SlotEntry { slot: Slot(MAX_SLOTS), ..entry })));
        assert!(!is_read(&with(SlotEntry { sequence: Sequence(MAX_NUMBER + 1), ..entry })));
        assert!(!is_read(&with(SlotEntry { length: 0, ..entry })));
        assert!(!is_read(&with(SlotEntry { offset: u64::MAX - 511, ..entry })));
        assert!(!is_read(&AttachReply { watermark: Sequence(u64::MAX), ..reply.clone() }));
        let mut far = reply.clone();
        far.view.epoch = Epoch(u64::MAX);
        assert!(!is_read(&far));
        far.view.epoch = Epoch(MAX_NUMBER);
        assert!(is_read(&far));
        far.view.number = ViewNumber(MAX_NUMBER + 1);
        assert!(!is_read(&far));
    }

    #[test]
    fn the_longest_set_view_fits_a_body() {
        let mut spec = spec();
        let line = |id| {
            MemberSpec::new(id, StoreId::random(), Address::tcp("h".repeat(110), u16::from(u8::from(id)) + 1))
        };
        spec.members = MemberId::all().map(line).collect();
        let addition = DirtyAddition { members: MemberSet(2), offset: 0, length: 4096 };
        let set = SetView {
            view: View::initial(stores(&spec)),
            spec,
            additions: vec![addition; SetView::MAX_ADDITIONS],
            more: false,
            attested: attested_positions(),
        };
        assert!(set.encode().len() <= MAX_BODY as usize);
    }

    proptest! {
        #[test]
        fn no_bytes_make_a_decoder_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Hello::decode(&bytes);
            let _ = HelloReply::decode(&bytes);
            let _ = Attach::decode(&bytes);
            let _ = AttachReply::decode(&bytes);
            let _ = SetView::decode(&bytes);
            let _ = Prepare::decode(&bytes);
            let _ = ChunkList::decode(Kind::ClearDirty, &bytes);
            let _ = PullReply::decode(&bytes);
            let _ = decode_attested(Kind::Mark, &bytes);
        }
    }
}
