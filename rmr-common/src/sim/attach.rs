//! The rules of an attach: one client at a time, nothing of the one before under way or in a cache, and all Clean members
//! of one mind before anything is served.

use super::oracle::Oracle;
use super::world::{Check, World};
use crate::pool::{Epoch, View};
use crate::replica::ConnectionId;
use crate::wire::{Attach, Kind, MessageHeader, Status};

/// What an attach means for the live client of another identity that a node serves.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Held {
    /// There is none, or it may be displaced.
    Free,
    /// It may not be displaced.
    Keeps(ConnectionId),
    /// It is of a branch that the operator has decided against, and has to go.
    Yields(ConnectionId),
}

impl World<'_> {
    /// What must be true when a node answers an attach well, beyond what its machine can know of itself.
    pub(super) fn check_attach_answer(
        &mut self,
        index: usize,
        connection: ConnectionId,
        header: &MessageHeader,
    ) -> Check {
        match (header.kind, header.status) {
            (Kind::AttachReply, Status::Ok) => {}
            (Kind::DetachReply, Status::Ok) => {
                self.nodes[index].holder = None;
                return Ok(());
            }
            _ => return Ok(()), // Nobody attaches by it.
        }
        let node = &mut self.nodes[index];
        if let Some(sector) = node.disk.unflushed_since.iter().position(|&step| step > 0) {
            return Err(format!("node {index} answers an attach with sector {sector} unflushed"));
        }
        let old = node.holder.replace(connection);
        if let Some(old) = old.filter(|&old| old != connection)
            && self.connections[old.0 as usize].is_open()
        {
            return Err(format!("node {index} answers an attach with the connection of another client open"));
        }
        Ok(())
    }

    /// What this message means for the holder of the node that gets it.
    pub(super) fn held_against(&self, index: usize, header: &MessageHeader, body: &[u8]) -> Held {
        if header.kind != Kind::Attach {
            return Held::Free;
        }
        let replica = self.nodes[index].replica.as_ref();
        let holder = replica.and_then(|r| Some((r.holder_connection()?, Epoch(r.status().epoch))));
        let (Ok(attach), Some((holder, epoch))) = (Attach::decode(body), holder) else { return Held::Free };
        let id = self.hosts[self.connections[holder.0 as usize].host].id;
        if attach.client == crate::pool::ClientId::from_bytes([id; 16]) {
            Held::Free
        } else if epoch.is_of_older_branch(header.epoch) {
            Held::Yields(holder)
        } else if attach.takeover {
            Held::Free
        } else {
            Held::Keeps(holder)
        }
    }

    pub(super) fn check_held(&mut self, index: usize, held: Held) -> Check {
        let holder = self.nodes[index].replica.as_ref().and_then(|r| r.holder_connection());
        match held {
            Held::Keeps(old) if holder != Some(old) => {
                Err(format!("node {index} lets a live client be displaced by one that does not take over"))
            }
            Held::Yields(old) if holder == Some(old) => Err(format!(
                "node {index} stays with a client of an older branch when the later one wants it"
            )),
            Held::Yields(_) => {
                self.coverage.hit("force: a member is taken from a live client of an older branch");
                Ok(())
            }
            Held::Free | Held::Keeps(_) => Ok(()),
        }
    }

    /// An attachment begins: whatever the clients before left behind, all Clean members have the same.
    pub(super) fn check_agreement(&self, view: &View) -> Check {
        let clean: Vec<_> = view.clean().iter().map(|m| self.node_in(view, m)).collect();
        let first = clean.first().copied().unwrap_or(0);
        for sector in 0..self.sectors() {
            let expected = self.nodes[first].value(sector);
            for &index in &clean {
                let value = self.nodes[index].value(sector);
                let is_wrong = value != expected || !self.oracle.is_current(sector, value);
                // What is in flight this client had sent before, and sends again.
                if is_wrong && !self.oracle.is_in_flight(sector) {
                    return Err(format!(
                        "{view}: a client attached, and sector {sector} is {} on node {first} and {} on node {index}; \
                         possible: {}",
                        Oracle::name(expected),
                        Oracle::name(value),
                        self.oracle.describe(sector)
                    ));
                }
            }
        }
        Ok(())
    }
}
