//! The rules of an attach: one client at a time, nothing of the one before under way or in a cache, and all Clean members
//! of one mind before anything is served.

use super::oracle::Oracle;
use super::world::{Check, World};
use crate::pool::View;
use crate::replica::ConnectionId;
use crate::wire::{Attach, Kind, MessageHeader, Status};

/// The connection of a live client that an attach may not displace.
pub(super) type Held = Option<ConnectionId>;

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

    /// The holder of a node that gets this message, if it must not lose its place by it.
    pub(super) fn held_against(&self, index: usize, header: &MessageHeader, body: &[u8]) -> Held {
        let attach = Attach::decode(body).ok().filter(|a| header.kind == Kind::Attach && !a.takeover)?;
        if self.nodes[index].answered.is_of_older_branch(header.epoch) {
            return None; // The operator has decided against its branch.
        }
        let holder = self.nodes[index].replica.as_ref()?.holder_connection()?;
        let id = self.hosts[self.connections[holder.0 as usize].host].id;
        (attach.client != crate::pool::ClientId::from_bytes([id; 16])).then_some(holder)
    }

    pub(super) fn check_held(&self, index: usize, held: Held) -> Check {
        let holder = self.nodes[index].replica.as_ref().and_then(|r| r.holder_connection());
        if held.is_some() && holder != held {
            return Err(format!(
                "node {index} lets a live client be displaced by one that does not take over"
            ));
        }
        Ok(())
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
