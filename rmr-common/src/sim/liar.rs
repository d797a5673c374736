//! A party on the network that was let in and does not hold the pool. It says what no honest client says, and changes nothing.
//!
//! It draws from numbers of its own, so that a run is the same with it and without.

use super::rng::Rng;
use super::world::{Check, World, trace};
use crate::pool::{Epoch, MAX_NUMBER, MemberSet, Sequence, Slot, ViewNumber};
use crate::replica::{self, ConnectionId};
use crate::wire::{Attach, Kind, MessageHeader, Role, Status};

/// The first of its connections; below are those between nodes.
const FIRST: u32 = 1 << 28;
/// Of so many messages that reach a node, it adds one.
const ONE_IN: u64 = 40;

pub(super) const fn is_its(connection: ConnectionId) -> bool {
    connection.0 >= FIRST
}

pub(super) const fn rng(seed: u64) -> Rng {
    Rng::new(seed ^ 0x006c_6961_7273_6565)
}

impl World<'_> {
    /// Something else has reached a node: the liar may have a word as well.
    pub(super) fn lie(&mut self, node: usize) -> Check {
        if self.liar.range(1, ONE_IN) > 1 {
            return Ok(());
        }
        let Some(replica) = &self.nodes[node].replica else { return Ok(()) };
        let before = (replica.epoch(), replica.view().clone(), replica.holder_connection());
        let (epoch, view) = (before.0, before.1.number);
        let numbers = [0, 1, 512, 4096, 1 << 20, 1 << 40, 1 << 60, MAX_NUMBER, u64::MAX - 4095, u64::MAX];
        let rng = &mut self.liar;
        let mut header = MessageHeader {
            epoch,
            view,
            offset: rng.pick(&numbers),
            length: u32::try_from(rng.next() >> 32).unwrap_or(0),
            sequence: Sequence(rng.pick(&numbers).min(MAX_NUMBER)),
            watermark: Sequence(rng.pick(&numbers).min(MAX_NUMBER)),
            slot: Slot(u16::try_from(rng.range(0, 1023)).unwrap_or(0)),
            missing: MemberSet(u8::try_from(rng.range(0, 255)).unwrap_or(0)),
            ..MessageHeader::new(Kind::Attach, self.spec.id)
        };
        let (role, mut body) = (if rng.percent(80) { Role::Client } else { Role::Peer }, Vec::new());
        header.kind = match role {
            // No requests: those of clients that are fenced are what the rules of the simulator look at.
            Role::Client => rng.pick(&[
                Kind::Attach,
                Kind::Attach,
                Kind::SetView,
                Kind::Detach,
                Kind::Prepare,
                Kind::ClearDirty,
                Kind::Grow,
                Kind::Compare,
                Kind::Digest,
            ]),
            // What a source has nothing for: no such page, and a range beyond the pool.
            Role::Peer => rng.pick(&[Kind::PullMap, Kind::Pull, Kind::Digest]),
        };
        if role == Role::Peer {
            header.offset = rng.pick(&[1 << 32, 1 << 60, u64::MAX]);
        }
        if header.kind == Kind::Attach {
            // An epoch that leaves none for those who come after.
            header.epoch = Epoch(rng.pick(&[MAX_NUMBER, MAX_NUMBER - 1, 1 << 63]));
            header.view = ViewNumber(0);
            body = Attach {
                client: crate::pool::ClientId::from_bytes([0xee; 16]),
                takeover: true,
                rejoin: rng.percent(50),
                yields: false,
                description: "a liar".into(),
                held_ms: 0,
            }
            .encode();
        } else if rng.percent(30) {
            header.epoch = Epoch(rng.pick(&numbers).min(MAX_NUMBER));
            body = (0..rng.range(0, 64)).map(|i| u8::try_from(i * 37 % 251).unwrap_or(0)).collect();
        }
        trace!(self, "a liar sends {header:?} to node {node}");
        let connection = ConnectionId(FIRST + u32::try_from(node).unwrap_or(0));
        let (header, body) = (&header, &body[..]);
        self.replica(node, replica::Event::Message { connection, role, header, body, buffer: None })?;
        let Some(replica) = &self.nodes[node].replica else { return Ok(()) };
        let after = (replica.epoch(), replica.view().clone(), replica.holder_connection());
        if before != after {
            return Err(format!(
                "a liar's {:?} changes node {node} from {before:?} to {after:?}",
                header.kind
            ));
        }
        Ok(())
    }

    /// A node answers it.
    pub(super) fn liar_answered(&mut self, node: usize, header: &MessageHeader) -> Check {
        if header.status == Status::Ok {
            return Err(format!("node {node} does what a liar wants: {:?} answered with Ok", header.kind));
        }
        self.coverage.hit("a liar is refused");
        Ok(())
    }
}
