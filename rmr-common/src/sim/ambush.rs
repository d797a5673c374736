//! Aimed runs that take several steps, and wait for the moment of each: which members have the last writes of a client that
//! dies, what is lost with a cache before anybody was told, and what is given up before members were compared.

use std::time::Duration;

use super::aim::{Aim, Shot};
use super::host::Request;
use super::profile::Profile;
use super::world::{Check, Event, MILLISECOND, World, trace};
use crate::client::Operation;
use crate::pool::{MemberSet, MemberState, View};
use crate::wire::{Kind, MessageHeader};

impl Aim {
    /// How many members it takes: one is lost, and two are left to know of different things.
    pub(super) const fn least_members(self) -> u8 {
        match self {
            Self::Divided | Self::Flushes | Self::Sick => 2,
            Self::Caches | Self::GivenUp | Self::Sources => 3,
            _ => 1,
        }
    }

    /// Whether every disk has a cache.
    pub(super) const fn needs_caches(self) -> bool {
        matches!(self, Self::Caches | Self::Sources | Self::Flushes)
    }

    /// What a run must be like for the steps to come one after the other.
    pub(super) fn shape(self, profile: &mut Profile) {
        let lasts = |profile: &mut Profile| {
            profile.requests = profile.requests.max(120);
            profile.pause = profile.pause.max(100 * MILLISECOND);
            profile.burst = profile.burst.min(4);
            profile.spread = true;
        };
        match self {
            Self::Divided => {
                lasts(profile);
                // A member is Syncing for a while.
                profile.resync.bytes_per_s = Some(1 << 18);
            }
            Self::Sick => {
                lasts(profile);
                profile.spread = false;
                profile.faults = profile.faults.max(10);
            }
            // Caches survive when a client has died before.
            Self::Caches => profile.client_crashes = false,
            // Intents are cleared between writes, and copies made between marks.
            Self::Rollbacks => {
                lasts(profile);
                profile.intent_idle = Duration::ZERO;
            }
            // The member flushes by itself when its guest is idle.
            Self::Flushes => profile.pause = profile.pause.max(100 * MILLISECOND),
            Self::GivenUp => {
                lasts(profile);
                profile.client.suspend_timeout = Duration::from_millis(600);
            }
            Self::Sources => {
                lasts(profile);
                profile.client_crashes = false;
                // Longer than a stale member waits before it connects to its source again.
                profile.client.leg_timeout = Duration::from_secs(2);
            }
            _ => {}
        }
    }
}

impl World<'_> {
    /// A client sends something: the moment may be that of a step.
    pub(super) fn lie_in_ambush(&mut self, host: usize, node: usize, header: &MessageHeader) {
        let is_write = matches!(header.kind, Kind::Write | Kind::WriteZeroes | Kind::Discard);
        match (self.aiming.aim, header.kind) {
            (Aim::Divided, _) if is_write && self.is_syncing_for(host, node) && self.rng.percent(10) => {
                self.divide(host, node);
            }
            (Aim::Divided, _) if is_write && self.is_whole(host) && self.rng.percent(2) => {
                self.after(1, Event::Aimed(Shot::Cut { host, node: Some(node) }));
            }
            (Aim::Divided, Kind::SetView) if self.is_of_rejoin(host, node) && self.rng.percent(25) => {
                // The member that comes back may have it alone, and on record alone what it has of the client that died.
                if self.rng.percent(50) {
                    self.die_unheard(host, vec![node], None)
                } else {
                    self.miss_view(host, node)
                }
            }
            (Aim::Sources, _) if is_write && self.is_whole(host) && self.rng.percent(5) => {
                // It comes back with something to pull.
                self.aiming.left -= 1;
                self.after(1, Event::Aimed(Shot::Cut { host, node: Some(node) }));
                self.hosts[host].partitioned[node] = true;
                let delay = self.rng.range(self.profile.pause, self.profile.pause * 8);
                self.after(delay, Event::Heal { host, node });
            }
            (Aim::Caches, Kind::Flush) if self.rng.percent(15) => {
                // Some of this is complete when the flush is, and not covered by it.
                self.after(1, Event::Burst(host));
            }
            (Aim::Caches, Kind::SetView) if self.aiming.deaf == Some((host, node)) => {
                self.aiming.deaf = None;
                if self.rng.percent(50) {
                    self.die_unheard(host, vec![node], None);
                } else {
                    let delay = self.unheard(host, &[node]);
                    self.after(delay, Event::Aimed(Shot::Cut { host, node: None }));
                }
            }
            (Aim::Caches, _) if is_write && self.is_whole(host) && self.rng.percent(2) => {
                let others = self.active_of(host);
                let lost = self.lose_power(host);
                let others: Vec<_> = others.into_iter().filter(|n| Some(*n) != lost).collect();
                if lost.is_some() && others.len() > 1 {
                    self.aiming.deaf = Some((host, self.rng.pick(&others)));
                }
            }
            (Aim::GivenUp, Kind::SetView) if self.aiming.given_up == Some(host) => {
                let committed = self.hosts[host].committed.as_ref();
                if committed.is_some_and(|v| v.epoch < header.epoch) && self.rng.percent(50) {
                    self.aiming.given_up = None;
                    self.miss_view(host, node);
                }
            }
            (Aim::GivenUp, _) if is_write && self.is_whole(host) && self.rng.percent(4) => {
                let silent = self.rng.index(self.nodes.len());
                self.aiming.left -= 1;
                let delay = self.unheard(host, &[silent]);
                self.after(1, Event::Burst(host));
                self.after(delay, Event::Aimed(Shot::Sever { host, node: silent }));
            }
            (Aim::Rollbacks, _) if is_write && self.is_whole(host) && self.rng.percent(10) => {
                self.copy_before_write(host, node);
            }
            _ => {} // Nothing that the run is aimed at.
        }
    }

    /// A stale member asks its source for data.
    pub(super) fn aim_at_pull(&mut self, stale: usize, source: usize) {
        if self.aiming.aim != Aim::Sources || self.aiming.left == 0 || self.is_calm {
            return;
        }
        let is_whose = |h: &usize| {
            let is_active = self.hosts[*h].is_live() && self.hosts[*h].client.is_active();
            is_active && self.is_syncing_for(*h, stale)
        };
        let host = (0..self.hosts.len()).find(is_whose);
        let others = |h: usize| self.hosts[h].committed.as_ref().map_or(0, |v| v.clean().len());
        let has_cached = self.nodes[source].disk.unflushed_since.iter().any(|&step| step > 0);
        if let Some(host) = host.filter(|&h| others(h) > 1 && has_cached)
            && self.rng.percent(50)
        {
            self.aiming.left -= 1;
            self.after(1, Event::Aimed(Shot::Relapse { host, stale, source }));
        }
    }

    /// A request has ended well.
    pub(super) fn aim_at_completed(&mut self, host: usize, request: &Request) {
        match (self.aiming.aim, request.operation) {
            (Aim::SlowLeg, Operation::Read) => self.aim_at_read(host, &request.memory),
            (Aim::Caches, Operation::Flush)
                if !self.is_calm && self.aiming.left > 0 && self.rng.percent(40) =>
            {
                self.lose_power(host);
            }
            _ => {} // Nothing that the run is aimed at.
        }
    }

    /// A view is committed. When all are Clean, each has flushed what earlier clients left with it, since it attached to this one:
    /// from then on nothing survives a power cut by luck.
    pub(super) fn aim_agreed(&mut self, view: &View) {
        if matches!(self.aiming.aim, Aim::Caches | Aim::Sources)
            && view.members.iter().all(|m| m.state == MemberState::Clean)
        {
            self.resyncs.is_unflushed_unknown = false;
        }
    }

    /// How much longer than usual a flush takes.
    pub(super) fn slowness_of_flush(&mut self) -> u64 {
        if self.aiming.aim != Aim::Caches || self.is_calm {
            return 0;
        }
        self.rng.range(0, (self.profile.disk_delay + self.profile.network_delay) * 4)
    }

    /// Whether every member is Clean for a client.
    fn is_whole(&self, host: usize) -> bool {
        let view = self.hosts[host].committed.as_ref();
        view.is_some_and(|v| v.members.iter().all(|m| m.state == MemberState::Clean))
            && self.hosts[host].client.is_active()
    }

    /// Whether a view brings a member back in, and this node is another one.
    fn is_of_rejoin(&self, host: usize, node: usize) -> bool {
        let rejoin = self.hosts[host].client.rejoin_phase();
        rejoin.is_some_and(|(member, phase)| phase == "changing" && member != self.nodes[node].member)
    }

    fn active_of(&self, host: usize) -> Vec<usize> {
        let active = self.hosts[host].committed.as_ref().map_or(MemberSet::EMPTY, View::active);
        active.iter().map(|m| self.node_index(m)).collect()
    }

    /// What a client and these nodes send each other stands still from now on. Returns for how long it does not notice, with
    /// time for the others to carry out what it sends now.
    fn unheard(&mut self, host: usize, silent: &[usize]) -> u64 {
        let timeout = self.timeout();
        for &node in silent {
            self.hosts[host].stalled_until[node] = self.now + timeout * 2;
        }
        let least = self.profile.network_delay * 2 + self.profile.disk_delay * 8;
        self.rng.range(least, least.max(timeout * 3 / 4))
    }

    /// What a client sends to these nodes from now on does not arrive, and before it hears of that it dies.
    fn die_unheard(&mut self, host: usize, lost: Vec<usize>, absent: Option<usize>) {
        self.aiming.left -= 1;
        let delay = self.unheard(host, &lost);
        self.after(delay, Event::Aimed(Shot::Die { host, lost, absent }));
    }

    /// The last writes of a client reach a Syncing member alone, or all but that one.
    fn divide(&mut self, host: usize, node: usize) {
        let is_alone = self.rng.percent(50);
        let lost = (0..self.nodes.len()).filter(|&n| (n == node) != is_alone).collect();
        self.after(1, Event::Burst(host));
        self.die_unheard(host, lost, Some(node));
    }

    /// The power of a machine fails that has something in its cache, while others go on.
    fn lose_power(&mut self, host: usize) -> Option<usize> {
        let has_cached = |n: &usize| self.nodes[*n].disk.unflushed_since.iter().any(|&step| step > 0);
        let active = self.active_of(host);
        let usable: Vec<_> = active.iter().copied().filter(has_cached).collect();
        if usable.is_empty() || active.len() < 2 {
            return None;
        }
        self.aiming.left -= 1;
        let node = self.rng.pick(&usable);
        self.after(1, Event::Aimed(Shot::Blackout(node)));
        Some(node)
    }

    pub(super) fn black_out(&mut self, node: usize) -> Check {
        self.crash_node(node, true)?;
        let delay = self.rng.range(1, self.profile.network_delay * 2);
        self.after(delay, Event::NodeStart(node));
        Ok(())
    }

    /// The client hears of the power cut when a timeout says so, and of what the stale member says not before that has found its
    /// source again.
    pub(super) fn relapse(&mut self, host: usize, stale: usize, source: usize) -> Check {
        let timeout = self.timeout();
        let silent_until = self.now + self.rng.range(timeout / 2, timeout * 3 / 4);
        for connection in self.connections.iter_mut().filter(|c| (c.host, c.node) == (host, source)) {
            connection.silent_until = silent_until;
        }
        self.hosts[host].stalled_until[stale] = self.now + self.rng.range(timeout / 4, timeout / 2);
        self.coverage.hit("power of a source fails unheard");
        self.black_out(source)
    }

    /// A client loses all legs, and one member cannot be reached until what was in flight has been given up.
    pub(super) fn sever(&mut self, host: usize, node: usize) {
        trace!(self, "client {host} is cut off, and cannot reach node {node}");
        self.cut_some(host, None);
        self.hosts[host].stalled_until[node] = 0;
        self.hosts[host].partitioned[node] = true;
        self.aiming.given_up = Some(host);
        let patience = u64::try_from(self.profile.client.suspend_timeout.as_nanos()).unwrap_or(u64::MAX);
        let delay = patience + self.rng.range(50 * MILLISECOND, patience);
        self.after(delay, Event::Heal { host, node });
    }

    /// A view does not reach this node, while the others have the time to adopt it.
    fn miss_view(&mut self, host: usize, node: usize) {
        self.aiming.left -= 1;
        let delay = self.unheard(host, &[node]);
        self.after(delay, Event::Aimed(Shot::Cut { host, node: Some(node) }));
    }
}
