//! Sick members: ones that answer pings and not views, disks that fail every write, legs that are lost as soon as they are
//! back, nodes that stop in order; and the rules for what a client may let its guest wait for them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::network::Message;
use super::world::{Check, Event, MILLISECOND, World, trace};
use crate::pool::{Cause, Command, MemberId, MemberSet, MemberState, StoreId, View};
use crate::replica::ConnectionId;
use crate::time::Time;
use crate::wire::{Attach, Kind, MessageHeader};

/// A member that is in service for so long has proved itself, if the longest pause is not shorter.
const LASTED: u64 = 300_000 * MILLISECOND;
/// The clock of a client may be late by so much.
const SLACK: u64 = 5 * MILLISECOND;
/// A node waits for so long for its last flush.
const STOP_LIMIT: u64 = 3000 * MILLISECOND;

/// What one client did with one member.
#[derive(Default)]
struct Watch {
    /// Losses and failed rejoins in a row, without a time in service that lasted.
    failures: u32,
    /// The last of them.
    last: u64,
    in_service: Option<u64>,
    /// The store that it has.
    store: Option<StoreId>,
}

/// What is known of sick members.
#[derive(Default)]
pub(super) struct Sick {
    watches: BTreeMap<(usize, MemberId), Watch>,
    /// How often the legs of a client are still to be lost as soon as it has attached.
    loops: u32,
    /// When the requests of each client, by token, first met a pool that was suspended.
    stuck: BTreeMap<(usize, u64), u64>,
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

impl World<'_> {
    /// Something of what makes a member sick.
    pub(super) fn sicken(&mut self, node: usize) -> Check {
        let timeout = nanoseconds(self.profile.client.leg_timeout);
        let long = self.rng.range(timeout, timeout * 8 + 8000 * MILLISECOND);
        match self.rng.range(0, 9) {
            0..=3 => {
                trace!(self, "node {node} takes no views");
                self.nodes[node].is_deaf_to_views = true;
                // Something makes it leave, and come back.
                for host in 0..self.hosts.len() {
                    if self.hosts[host].is_live() {
                        self.cut_some(host, Some(node));
                    }
                }
                self.after(long, Event::Cured(node));
            }
            4..=5 => {
                trace!(self, "the disk of node {node} fails everything");
                self.had_errors = true;
                self.nodes[node].disk_errors = 100;
                self.after(long, Event::ErrorsEnd(node));
            }
            6..=7 => {
                trace!(self, "the disks of all nodes fail everything");
                self.had_errors = true;
                for node in 0..self.nodes.len() {
                    self.nodes[node].disk_errors = 100;
                    self.after(long, Event::ErrorsEnd(node));
                }
                self.coverage.hit("all disks fail at once");
            }
            8 => {
                self.sick.loops = u32::try_from(self.rng.range(2, 12)).unwrap_or(2);
                for host in 0..self.hosts.len() {
                    self.cut_some(host, None);
                }
            }
            _ => self.stop_node(node)?,
        }
        Ok(())
    }

    /// A node is told to stop. It may lose its power soon after.
    pub(super) fn stop_node(&mut self, node: usize) -> Check {
        let Some(replica) = &mut self.nodes[node].replica else { return Ok(()) };
        replica.leave();
        trace!(self, "node {node} is told to stop");
        let (life, limit) = (self.nodes[node].life, self.now + STOP_LIMIT);
        self.nodes[node].stops = true;
        self.replica(node, crate::replica::Event::Tick)?;
        self.after(MILLISECOND, Event::Stopping { node, life, limit });
        Ok(())
    }

    /// Whether the node is ready to say Goodbye is looked at now and then.
    pub(super) fn stopping(&mut self, node: usize, life: u32, limit: u64) -> Check {
        let Some(replica) = self.nodes[node].replica.as_ref().filter(|_| self.nodes[node].life == life)
        else {
            return Ok(());
        };
        if !replica.has_left(Time(self.now)) && self.now < limit {
            let pause = self.rng.range(1, 10 * MILLISECOND);
            self.after(pause, Event::Stopping { node, life, limit });
            return Ok(());
        }
        let holder = replica.holder_connection();
        let (header, body) = replica.goodbye();
        if body == [1] {
            self.coverage.hit("node stopped in order, and had flushed");
        }
        if let Some(ConnectionId(connection)) = holder {
            self.send(connection as usize, false, Message { header, body, data: Vec::new() })?;
        }
        let power = self.rng.percent(60);
        let delay = self.rng.range(1, self.profile.network_delay * 8);
        self.after(delay, Event::Stopped { node, life, power });
        Ok(())
    }

    /// The node has stopped; with its machine, perhaps.
    pub(super) fn stopped(&mut self, node: usize, life: u32, power: bool) -> Check {
        if self.nodes[node].life != life {
            return Ok(());
        }
        let power = power && !self.is_calm;
        self.crash_node(node, power)
    }

    /// A node that takes no views does not get to see this message.
    pub(super) fn is_unheard(&self, node: usize, header: &MessageHeader) -> bool {
        self.nodes[node].is_deaf_to_views && header.kind == Kind::SetView && !self.is_calm
    }

    /// An operator may have said "now" with this command.
    pub(super) fn forget_failures(&mut self, command: &Command) {
        if !matches!(command, Command::Grow { .. } | Command::Maintenance { on: true, .. }) {
            self.sick.watches.clear();
        }
    }

    /// A member was lost, or could not be brought in.
    pub(super) fn note_failure(&mut self, host: usize, member: MemberId, cause: Cause) {
        let lasted = LASTED.min(nanoseconds(self.profile.client.rejoin_backoff_max));
        let now = self.now;
        let watch = self.sick.watches.entry((host, member)).or_default();
        if watch.in_service.take().is_some_and(|since| now - since >= lasted) {
            watch.failures = 0;
        }
        if !cause.is_planned() {
            watch.failures += 1;
            watch.last = now;
        }
        if watch.failures >= 4 {
            self.coverage.hit("member failed four times in a row");
        }
    }

    /// Members left the view. When no Clean one is left, nobody can tell which of them is sick.
    pub(super) fn note_losses(&mut self, host: usize, members: MemberSet, cause: Cause) {
        let active = self.hosts[host].committed.as_ref().map_or(MemberSet::EMPTY, View::active);
        for member in members.intersection(active).iter() {
            self.note_failure(host, member, cause);
        }
    }

    /// A rejoin failed.
    pub(super) fn note_failed_rejoin(&mut self, host: usize, member: MemberId, cause: Cause) {
        self.note_failure(host, member, cause);
        match cause {
            Cause::ViewNotAnswered => self.coverage.hit("rejoin failed: view not answered in time"),
            Cause::TooSlow => self.coverage.hit("rejoin failed: too slow"),
            _ => {} // Common enough.
        }
    }

    pub(super) fn note_in_service(&mut self, host: usize, view: &View) {
        let (now, lasted) = (self.now, LASTED.min(nanoseconds(self.profile.client.rejoin_backoff_max)));
        for line in &view.members {
            let watch = self.sick.watches.entry((host, line.id)).or_default();
            if watch.store.replace(line.store).is_some_and(|before| before != line.store) {
                *watch = Watch { store: Some(line.store), ..Watch::default() };
            }
            // An attachment may leave it out, which is no failure, and ends a time in service all the same.
            if watch.in_service.is_some_and(|since| now - since >= lasted) {
                watch.failures = 0;
            }
            watch.in_service =
                if line.state == MemberState::Out { None } else { watch.in_service.or(Some(self.now)) };
        }
    }

    /// A client begins to bring a member in: not before the pause that its failures call for.
    pub(super) fn check_pause(&self, host: usize, node: usize, header: &MessageHeader, body: &[u8]) -> Check {
        let is_rejoin = header.kind == Kind::Attach && Attach::decode(body).is_ok_and(|a| a.rejoin);
        let member = self.nodes[node].member;
        // Where the operator may have a word, or histories meet, failures may be forgotten without the run's knowledge.
        if !is_rejoin || self.has_branches() || self.is_operating() {
            return Ok(());
        }
        let Some(watch) = self.sick.watches.get(&(host, member)).filter(|w| w.failures > 0) else {
            return Ok(());
        };
        let most = nanoseconds(self.profile.client.rejoin_backoff_max);
        let pause = ((1000 * MILLISECOND) << (watch.failures - 1).min(20)).min(most);
        if self.now + SLACK < watch.last + pause {
            return Err(format!(
                "client {host} brings member {member} in {} ms after failure {} in a row, expected a pause of {} ms",
                (self.now - watch.last) / MILLISECOND,
                watch.failures,
                pause / MILLISECOND
            ));
        }
        Ok(())
    }

    /// Requests are held for a joining member no longer than it may.
    pub(super) fn check_joining(&self, host: usize) -> Check {
        let Some((member, since, others)) = self.hosts[host].client.held_for_joining() else { return Ok(()) };
        let config = &self.profile.client;
        let watch = self.sick.watches.get(&(host, member));
        // Where an operator wants it, it has the time of any member.
        if self.has_operator() || self.has_branches() {
            return Ok(());
        }
        let timeout = nanoseconds(config.leg_timeout);
        let most = nanoseconds(config.rejoin_backoff_max).max(1);
        let rested = since.0.saturating_sub(watch.map_or(0, |w| w.last)).min(most);
        let has_failed = watch.is_some_and(|w| w.failures > 0);
        let grown = u128::from(timeout) * u128::from(rested) / u128::from(most);
        let grown = if has_failed { u64::try_from(grown).unwrap_or(u64::MAX) } else { 0 };
        let usual = nanoseconds(config.rejoin_hold).max(100 * MILLISECOND).min(timeout).max(grown);
        let theirs = (others.0 - since.0) * 4;
        let limit = since.0 + usual.max(theirs) + SLACK;
        if self.now > limit {
            return Err(format!(
                "client {host} holds requests for member {member}, which is to be brought in, for {} ms; expected at most {} ms",
                (self.now - since.0) / MILLISECOND,
                (limit - since.0) / MILLISECOND
            ));
        }
        Ok(())
    }

    /// The pool of a client is suspended: its requests wait from now on, unless they did before.
    pub(super) fn note_stuck(&mut self, host: usize) {
        let now = self.now;
        for &token in self.hosts[host].requests.keys() {
            self.sick.stuck.entry((host, token)).or_insert(now);
        }
    }

    /// A client has attached: no request has waited for that longer than it may.
    pub(super) fn check_patience(&mut self, host: usize) -> Check {
        let config = &self.profile.client;
        let most = nanoseconds(config.suspend_timeout) + nanoseconds(config.leg_timeout) + 300 * MILLISECOND;
        let requests = &self.hosts[host].requests;
        self.sick.stuck.retain(|(h, token), _| *h != host || requests.contains_key(token));
        let late = self.sick.stuck.iter().find(|((h, _), since)| *h == host && self.now - **since > most);
        if let Some(((_, token), since)) = late {
            return Err(format!(
                "request {token} of client {host} waits for {} ms since the pool was suspended, expected at most {} ms",
                (self.now - since) / MILLISECOND,
                most / MILLISECOND
            ));
        }
        if self.sick.loops > 0 && !self.is_calm {
            self.sick.loops -= 1;
            self.coverage.hit("attachment breaks down at once");
            self.after(1, Event::Aimed(super::aim::Shot::Cut { host, node: None }));
        }
        Ok(())
    }

    /// A node has recovered.
    pub(super) fn cured(&mut self, node: usize) {
        self.nodes[node].is_deaf_to_views = false;
    }

    pub(super) fn cover_conditions(&mut self, header: &MessageHeader) {
        if header.kind == Kind::Conditions {
            self.coverage.hit("members hear why others are not current");
        }
    }
}
