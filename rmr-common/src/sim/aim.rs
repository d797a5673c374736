//! Aimed runs: what must come together for some situations is so much that faults at random moments hardly ever bring it
//! about. Every other run is aimed at one of them: it arranges what is needed, and leaves everything else to chance.

use super::world::{Check, Event, World, trace};
use crate::client::Operation;
use crate::pool::{Epoch, MemberState, Sequence, View};
use crate::wire::{AttachReply, Kind, MessageHeader, Status};

/// What a run is aimed at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Aim {
    /// Nothing in particular.
    Chance,
    /// A view becomes durable on some of its members, and then its client, or they, cannot be reached.
    HalfViews,
    /// Two clients propose one epoch.
    Rivals,
    /// A client dies, and each member has writes that the others have not.
    Scattered,
    /// The last writes of a client that dies are on a Syncing member only, and that one is not there for the next client.
    Orphans,
    /// Reads show a write that another leg is slow to carry out, and then the leg that they came from is lost.
    SlowLeg,
    /// The last writes of a client that dies are on a Syncing member only, or everywhere but there; that one is not there for
    /// the next client. See `sim/ambush.rs` for this one and those that follow.
    Divided,
    /// Machines lose their power with completed writes in their caches: after a flush that did not cover all of them, or with
    /// a client that dies while it tells the others.
    Caches,
    /// A write that not all members have is given up, and the view of the attachment that compares them reaches some only.
    GivenUp,
    /// The source of a resync loses its power and is up again before its client has noticed.
    Sources,
    /// Stores go back in time. See `sim/rollback.rs`.
    Rollbacks,
    /// Disks fail flushes, most of all those that cover data of a resync.
    Flushes,
    /// Members are sick for long: they take no views, their disks fail everything, they are lost as soon as they are back. See
    /// `sim/sick.rs`.
    Sick,
}

impl Aim {
    /// By the seed alone, so that one can look for runs of a kind.
    pub(super) const fn of(seed: u64) -> Self {
        match seed % super::KINDS {
            1 => Self::HalfViews,
            3 => Self::Sources,
            4 => Self::Rivals,
            5 => Self::Rollbacks,
            12 => Self::Sick,
            7 => Self::Scattered,
            9 => Self::Flushes,
            10 => Self::Orphans,
            11 => Self::Divided,
            13 => Self::SlowLeg,
            15 => Self::Caches,
            0 => Self::GivenUp,
            _ => Self::Chance,
        }
    }
}

/// Something that was arranged, and happens now.
pub(super) enum Shot {
    /// Another client wants the pool.
    Rival(u8),
    /// A client reaches this node only from now on, writes, and dies.
    Orphan { host: usize, node: usize },
    /// What writes in flight change is read.
    Reread(usize),
    /// The connection to a node breaks, or all do.
    Cut { host: usize, node: Option<usize> },
    /// The power of a node fails.
    Power(usize),
    /// The connections to all other nodes break.
    CutOthers { host: usize, node: usize },
    /// A client dies, and what it sent to some nodes does not arrive. The next one cannot reach that node at first.
    Die { host: usize, lost: Vec<usize>, absent: Option<usize> },
    /// A machine loses its power, and is up again at once, without its cache.
    Blackout(usize),
    /// A source loses its power while a stale member pulls from it, and the client hears of neither for a while.
    Relapse { host: usize, stale: usize, source: usize },
    /// A client is cut off from all nodes, and from this one for so long that it gives up what it has in flight.
    Sever { host: usize, node: usize },
    /// A client dies, or leaves in good order, and the copy of this node's store is put back.
    Revert { host: usize, node: usize, leaves: bool },
    /// A client loses all nodes but this one, writes, and dies; the copy of this node's store is put back.
    RevertLast { host: usize, node: usize },
    /// The copy of this node's store is put back, unless a client lives.
    PutCopy(usize),
}

/// What a node told the client that attached last.
struct Told {
    epoch: Epoch,
    view: View,
    /// The writes in its slot table above its watermark.
    open: Vec<Sequence>,
    watermark: Sequence,
    tables_lost: bool,
}

/// What an aimed run has arranged.
pub(super) struct Aiming {
    pub(super) aim: Aim,
    /// How often it may interfere.
    pub(super) left: u64,
    /// The node that the next client cannot reach at first.
    pub(super) absent: Option<usize>,
    /// Disk writes of these nodes are slow until then.
    slow: Vec<(usize, u64)>,
    /// The client whose next read that shows a write in flight costs it all legs but this one.
    watched: Option<(usize, usize)>,
    /// The view that this client sends to the node next does not arrive there in time.
    pub(super) deaf: Option<(usize, usize)>,
    /// This client has given up writes, and is to attach in two attempts.
    pub(super) given_up: Option<usize>,
    last_commit: super::oracle::Step,
    told: std::collections::BTreeMap<usize, Told>,
}

impl Aiming {
    pub(super) fn new(seed: u64) -> Self {
        let (left, last_commit) = (16, super::oracle::Step::MAX);
        let told = std::collections::BTreeMap::new();
        let (absent, slow, watched, deaf, given_up) = (None, Vec::new(), None, None, None);
        Self { aim: Aim::of(seed), left, absent, slow, watched, deaf, given_up, last_commit, told }
    }
}

impl World<'_> {
    pub(super) fn timeout(&self) -> u64 {
        u64::try_from(self.profile.client.leg_timeout.as_nanos()).unwrap_or(u64::MAX)
    }

    /// A client sends something: the moment may be the one that the run is aimed at.
    pub(super) fn take_aim(&mut self, host: usize, node: usize, header: &MessageHeader) {
        if self.aiming.aim == Aim::Chance || self.aiming.left == 0 || self.is_calm {
            return;
        }
        let network = self.profile.network_delay;
        let is_write = matches!(header.kind, Kind::Write | Kind::WriteZeroes | Kind::Discard);
        match (self.aiming.aim, header.kind) {
            (Aim::HalfViews | Aim::Orphans, Kind::SetView) => self.halve_view(host, node, header),
            (Aim::HalfViews, _) if is_write && self.rng.percent(2) => {
                self.aiming.left -= 1;
                let node = self.rng.index(self.nodes.len());
                self.after(network * 2, Event::Aimed(Shot::Power(node)));
            }
            (Aim::Rivals, Kind::Attach) if self.hosts[host].stalled_until[node] <= self.now => {
                let is_attaching = self.hosts[host].client.status().state == "attaching";
                if is_attaching && self.rng.percent(60) {
                    self.aiming.left -= 1;
                    let until = self.now + self.rng.range(network * 4, (network * 5).max(self.timeout() / 2));
                    self.hosts[host].stalled_until.iter_mut().for_each(|s| *s = until);
                    let id = self.hosts[host].id % 3 + 1;
                    self.after(1, Event::Aimed(Shot::Rival(id)));
                }
            }
            (Aim::Scattered, _) if is_write && self.rng.percent(4) => {
                self.aiming.left -= 1;
                self.after(1, Event::Burst(host));
                let delay = self.rng.range(network / 2, network * 3);
                self.after(delay, Event::HostCrash(host));
                if self.rng.percent(40) {
                    // What the disk fails it may carry out in part, and nobody else hears of it.
                    self.had_errors = true;
                    let end = delay + network * 2 + self.profile.disk_delay;
                    for node in 0..self.nodes.len() {
                        self.nodes[node].disk_errors = self.rng.pick(&[0, 60]);
                        self.after(end, Event::ErrorsEnd(node));
                    }
                }
            }
            (Aim::Orphans, _) if self.is_syncing_for(host, node) => {
                let is_busy = matches!(header.kind, Kind::ClearDirty | Kind::Flush | Kind::Ping) || is_write;
                if is_busy && self.rng.percent(if is_write { 5 } else { 20 }) {
                    self.aiming.left -= 1;
                    self.after(1, Event::Aimed(Shot::Orphan { host, node }));
                }
            }
            (Aim::SlowLeg, _) if is_write && !self.is_syncing_for(host, node) && self.rng.percent(5) => {
                self.aiming.left -= 1;
                self.slow_down(host, node);
            }
            _ => self.lie_in_ambush(host, node, header),
        }
    }

    pub(super) fn is_syncing_for(&self, host: usize, node: usize) -> bool {
        let view = self.hosts[host].committed.as_ref();
        view.and_then(|v| v.state(self.nodes[node].member)) == Some(MemberState::Syncing)
    }

    /// A view is sent to a node, which may not get it, or be the last that does.
    fn halve_view(&mut self, host: usize, node: usize, header: &MessageHeader) {
        let (network, timeout) = (self.profile.network_delay, self.timeout());
        let is_attach = self.hosts[host].committed.as_ref().is_none_or(|v| v.epoch < header.epoch);
        let all = if is_attach { 70 } else { 100 };
        match self.rng.range(0, all) {
            0..=11 => self.cut_some(host, Some(node)),
            12..=27 => {
                // The others have the time to make it durable.
                self.hosts[host].stalled_until[node] = self.now + timeout * 2;
                let delay = self.rng.range(network * 4, (network * 8).max(timeout * 3 / 4));
                let node = self.rng.percent(60).then_some(node);
                self.after(delay, Event::Aimed(Shot::Cut { host, node }));
            }
            28..=35 => {
                let most = self.rng.pick(&[network * 2, network * 20]) + self.profile.disk_delay;
                let delay = self.rng.range(1, most);
                self.after(delay, Event::HostCrash(host));
            }
            _ => return, // It may arrive.
        }
        self.aiming.left -= 1;
    }

    /// Writes to a node's disk are slow for a while. What another leg has of them is read, and when a read has shown it, that
    /// leg is lost.
    fn slow_down(&mut self, host: usize, node: usize) {
        let (network, timeout) = (self.profile.network_delay, self.timeout());
        trace!(self, "the disk of node {node} is slow");
        self.aiming.slow.retain(|(slow, _)| *slow != node);
        self.aiming.slow.push((node, self.now + timeout * 3 / 4));
        self.aiming.watched = Some((host, node));
        let mut at = self.rng.range(network * 2, network * 4);
        for _ in 0..4 {
            self.after(at, Event::Aimed(Shot::Reread(host)));
            at += self.rng.range(network, network * 2 + self.profile.disk_delay * 2);
        }
    }

    /// A client has read something. What shows a write in flight may have come from the leg that has it alone.
    pub(super) fn aim_at_read(&mut self, host: usize, values: &[u64]) {
        let Some((_, node)) = self.aiming.watched.filter(|(watched, _)| *watched == host) else { return };
        let in_flight: Vec<_> = self.hosts[host].requests.values().filter_map(|r| r.write).collect();
        let is_shown = values.iter().any(|v| in_flight.iter().any(|&w| super::oracle::Oracle::is_of(w, *v)));
        if !is_shown || self.is_calm {
            return;
        }
        self.aiming.watched = None;
        self.after(1, Event::Aimed(Shot::CutOthers { host, node }));
        let (network, timeout) = (self.profile.network_delay, self.timeout());
        let mut at = 1;
        for _ in 0..4 {
            at += self.rng.range(network, (network * 2).max(timeout / 6));
            self.after(at, Event::Aimed(Shot::Reread(host)));
        }
    }

    /// How much later than usual a disk write of a node takes effect.
    pub(super) fn slowness(&mut self, node: usize) -> u64 {
        let until = self.aiming.slow.iter().find(|(slow, _)| *slow == node).map_or(0, |(_, until)| *until);
        let most = until.saturating_sub(self.now);
        if self.is_calm || most == 0 { 0 } else { self.rng.range(most.div_ceil(2), most) }
    }

    /// A client was started: the run may be aimed at what it cannot reach.
    pub(super) fn aim_at_new(&mut self, host: usize) {
        let timeout = self.timeout();
        let absent = match self.aiming.aim {
            Aim::HalfViews if !self.is_calm && self.rng.percent(40) => Some(self.rng.index(self.nodes.len())),
            _ => self.aiming.absent.take(),
        };
        if let Some(node) = absent.filter(|_| !self.is_calm) {
            trace!(self, "client {host} cannot reach node {node}");
            self.hosts[host].partitioned[node] = true;
            let delay = self.rng.range(timeout, timeout * 6);
            self.after(delay, Event::Heal { host, node });
            if matches!(self.aiming.aim, Aim::Orphans | Aim::Divided) && self.rng.percent(40) {
                // Nor does the one after that find it as this one left the others.
                let delay = self.rng.range(delay / 4, delay);
                self.after(delay, Event::HostCrash(host));
            }
        }
    }

    pub(super) fn shoot(&mut self, shot: Shot) -> Check {
        if self.is_calm {
            return Ok(());
        }
        match shot {
            Shot::Rival(id) => {
                let live = self.hosts.iter().filter(|h| h.is_live()).count();
                if live < 4 {
                    self.start_host(id, true);
                }
            }
            Shot::Orphan { host, node } if self.hosts[host].is_live() => {
                let others: Vec<_> = (0..self.nodes.len()).filter(|&n| n != node).collect();
                others.into_iter().for_each(|n| self.cut_some(host, Some(n)));
                self.burst(host)?;
                self.aiming.absent = Some(node);
                let delay = self.rng.range(1, self.profile.network_delay);
                self.after(delay, Event::HostCrash(host));
            }
            Shot::Reread(host) if self.hosts[host].is_live() => self.reread(host)?,
            Shot::Cut { host, node } => self.cut_some(host, node),
            Shot::Power(node) => self.crash_node(node, true)?,
            Shot::CutOthers { host, node } => {
                let others: Vec<_> = (0..self.nodes.len()).filter(|&n| n != node).collect();
                others.into_iter().for_each(|n| self.cut_some(host, Some(n)));
            }
            Shot::Die { host, lost, absent } if self.can_die(host) => {
                lost.into_iter().for_each(|n| self.cut_some(host, Some(n)));
                self.aiming.absent = absent;
                self.crash_host(host);
            }
            Shot::Blackout(node) => self.black_out(node)?,
            Shot::Relapse { host, stale, source } => self.relapse(host, stale, source)?,
            Shot::Sever { host, node } if self.hosts[host].is_live() => self.sever(host, node),
            Shot::Revert { host, node, leaves } if self.hosts[host].is_live() => {
                self.revert(host, node, leaves)?;
            }
            Shot::RevertLast { host, node } if self.hosts[host].is_live() => self.revert_last(host, node)?,
            Shot::PutCopy(node) => self.put_copy(node)?,
            // Its client has ended.
            Shot::Orphan { .. }
            | Shot::Reread(_)
            | Shot::Die { .. }
            | Shot::Sever { .. }
            | Shot::Revert { .. }
            | Shot::RevertLast { .. } => {}
        }
        Ok(())
    }

    fn reread(&mut self, host: usize) -> Check {
        let is_write = |r: &&super::host::Request| r.write.is_some() && r.count > 0;
        let in_flight = self.hosts[host].requests.values().filter(is_write);
        let ranges: Vec<_> = in_flight.map(|r| (r.first, r.count.min(32), r.start)).take(2).collect();
        for (first, count, start) in ranges {
            if start < self.aiming.last_commit {
                self.coverage.hit("read over a write that a view change caught");
            }
            self.submit(host, Operation::Read, first, count)?;
        }
        Ok(())
    }

    // What came of it --------------------------------------------------------------------------------------------

    pub(super) const fn aim_committed(&mut self) {
        self.aiming.last_commit = self.step;
    }

    /// A node answers an attach.
    pub(super) fn note_told(&mut self, node: usize, header: &MessageHeader, body: &[u8]) {
        if header.kind != Kind::AttachReply || header.status != Status::Ok {
            return;
        }
        let Ok(reply) = AttachReply::decode(body) else { return };
        let open: Vec<_> = reply.slots.iter().map(|s| s.sequence).filter(|s| *s > reply.watermark).collect();
        if reply.slots.iter().any(|s| s.failed && s.sequence > reply.watermark) {
            self.coverage.hit("attach tells of a write that the disk failed");
        }
        let is_out = |v: &View| v.state(self.nodes[node].member) == Some(MemberState::Out);
        if self.committed.as_ref().is_some_and(is_out) && reply.view.epoch < header.epoch {
            if !open.is_empty() {
                self.coverage.hit("rejoin of a member with writes of an earlier client");
            } else if reply.tables_lost {
                self.coverage.hit("rejoin of a member that lost its table and writes of an earlier client");
            }
        }
        let told = Told {
            epoch: header.epoch,
            view: reply.view,
            open,
            watermark: reply.watermark,
            tables_lost: reply.tables_lost,
        };
        self.aiming.told.insert(node, told);
    }

    /// An attachment begins: which members had to be made to agree?
    pub(super) fn cover_attached(&mut self, view: &View) {
        let told: Vec<_> = self.aiming.told.values().filter(|t| t.epoch == view.epoch).collect();
        let Some(latest) = told.iter().map(|t| t.view.order()).max() else { return };
        let is_half = told.iter().any(|t| t.view.order() < latest && !t.open.is_empty());
        let watermark = told.iter().map(|t| t.watermark).max().unwrap_or_default();
        let has_alone = |a: &Told, b: &Told| {
            !a.tables_lost && !b.tables_lost && a.open.iter().any(|s| *s > watermark && !b.open.contains(s))
        };
        let is_scattered = told.iter().any(|a| told.iter().any(|b| has_alone(a, b) && has_alone(b, a)));
        if is_half {
            self.coverage.hit("attached after a view that some had not heard of, with writes in flight");
        }
        if is_scattered {
            self.coverage.hit("attached where each member has writes that the other has not");
        }
    }
}
