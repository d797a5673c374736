//! The connections of resyncing members to their sources: made, lost, and what goes over them.

use std::os::fd::RawFd;

use rmr_common::reactor::WatchChange;
use rmr_common::replica::Event;
use rmr_common::transport::Connection as _;

use super::super::member::Member;
use super::super::pulls::PULLS_PART;
use super::super::source_link::{Meant, SourceLink};
use super::Shard;

impl Shard {
    /// Queues the pulls of a member that there is memory for.
    pub(super) fn send_pulls(&mut self, index: usize) {
        let waits = |m: &Member| m.source.is_some() && m.pulls.is_waiting();
        if !self.members.get(index).and_then(Option::as_ref).is_some_and(waits) {
            return; // As mostly, for each member in each wake-up.
        }
        let held: usize = self.members.iter().flatten().map(|m| m.pulls.bytes()).sum();
        let room = (self.buffers.total_bytes() / PULLS_PART).saturating_sub(held);
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        let Some(source) = member.source.as_mut().filter(|_| member.pulls.is_waiting()) else { return };
        member.pulls.start(&self.buffers, room, |header, memory| {
            source.wire.queue_read(header, &mut |segments| segments.push(memory));
        });
    }

    pub(super) fn connect_source(&mut self, index: usize, address: &rmr_common::pool::Address) {
        self.close_source(index);
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        if member.connecting.is_some() {
            // A client may name one source after the other; each attempt has a thread, and may take as long as a leg timeout.
            member.next_source = Some(address.clone());
            return;
        }
        self.next_attempt += 1;
        member.source_attempt = self.next_attempt;
        let source = member.replica.status().resync.map(|resync| resync.source);
        member.source_meant = Some(Meant { member: source, address: address.clone() });
        member.connecting = Some(self.next_attempt);
        self.connector.connect(self.next_attempt, address);
    }

    pub(super) fn close_source(&mut self, index: usize) {
        let Some(Some(member)) = self.members.get_mut(index) else { return };
        member.source_attempt = 0;
        member.next_source = None;
        if let Some(mut source) = member.source.take() {
            source.wire.shut_down();
            self.counters += source.wire.counters();
            self.changes.push(WatchChange::Remove(source.descriptor));
            self.closing_sources.push(source);
        }
        // Not before: until then the source can write to what it was asked to.
        member.pulls.abandon();
    }

    /// Attempts to connect to sources have ended.
    pub(super) fn sources_connected(&mut self) {
        while let Some((attempt, result)) = self.connector.next() {
            let is_its = |m: &Option<Member>| m.as_ref().is_some_and(|m| m.connecting == Some(attempt));
            if let Some(index) = self.members.iter().position(is_its)
                && let Some(member) = self.members[index].as_mut()
            {
                member.connecting = None;
                if let Some(address) = member.next_source.take() {
                    self.connect_source(index, &address);
                }
            }
            let index =
                self.members.iter().position(|m| m.as_ref().is_some_and(|m| m.source_attempt == attempt));
            let Some((index, member)) = index.and_then(|i| Some((i, self.members[i].as_mut()?))) else {
                continue;
            };
            member.source_attempt = 0;
            let who = format!("node {}, member {}", self.shared.config.node_name, member.replica.member());
            let (pool, keys) = (member.pool(), &self.shared.keys);
            let keys = keys.of(pool, &member.replica.spec().name);
            let meant = member.source_meant.take().ok_or_else(|| "no source is meant".to_owned());
            let link = result.and_then(|wire| SourceLink::new(wire, pool, &keys?, who, meant?));
            match link {
                Ok(link) => {
                    self.changes.push(WatchChange::Add(link.descriptor, link.watched));
                    member.source = Some(link);
                }
                Err(error) => member.replica.apply(Event::PeerDown(&error), self.now),
            }
            self.activate(index);
        }
    }

    /// Something arrived from a source, or it can take more. Other descriptors only wake the loop.
    pub(super) fn source_ready(&mut self, descriptor: RawFd) {
        let is_its = |m: &Member| m.source.as_ref().is_some_and(|s| s.descriptor == descriptor);
        let Some(index) = self.members.iter().position(|m| m.as_ref().is_some_and(is_its)) else { return };
        let Some(member) = self.members[index].as_mut() else { return };
        let Some(mut link) = member.source.take() else { return };
        let received = link.receive(member, self.now);
        member.source = Some(link);
        if let Err(error) = received {
            self.source_lost(index, &error);
        }
        self.activate(index);
    }

    pub(super) fn source_lost(&mut self, index: usize, reason: &str) {
        self.close_source(index);
        if let Some(Some(member)) = self.members.get_mut(index) {
            // It is tried again each second or so, as a rule with the same result.
            if member.source_error != reason {
                reason.clone_into(&mut member.source_error);
                let (pool, own) = (&member.replica.spec().name, member.replica.member());
                tracing::warn!(%pool, member = %own, node = %self.shared.config.node_name, "no source to be brought up to date from: {reason}");
            }
            member.replica.apply(Event::PeerDown(reason), self.now);
        }
        self.activate(index);
    }

    /// Sends what is queued for sources.
    pub(super) fn send_to_sources(&mut self) {
        for index in 0..self.members.len() {
            self.send_pulls(index);
            let Some(source) = self.members[index].as_mut().and_then(|m| m.source.as_mut()) else { continue };
            if let Err(error) = source.wire.flush() {
                self.source_lost(index, &error.to_string());
                continue;
            }
            let interest = source.interest();
            if interest != source.watched {
                source.watched = interest;
                self.changes.push(WatchChange::Modify(source.descriptor, interest));
            }
        }
    }
}
