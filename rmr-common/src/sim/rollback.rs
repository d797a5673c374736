//! Stores that go back in time: a copy of a store, made at any moment, takes its place later, as an operator does who restores
//! a backup or a volume snapshot, or starts a node with a copied file.
//!
//! Only what can be known is asked of the pool. While a client lives, its copy is older than what it had from the member; when no
//! client lives, the others' intents tell what no mark covers. The last Clean member goes back only where somebody knows better.

use std::collections::{BTreeMap, BTreeSet};

use super::aim::{Aim, Shot};
use super::node::PageBytes;
use super::world::{Check, Event, MILLISECOND, World, trace};
use crate::client;
use crate::map::MapPage;
use crate::pool::{Attested, Epoch, MemberId, MemberSet, MemberState, Position, View, ViewNumber};
use crate::replica::DurableState;

/// A store as it was at some moment.
#[derive(Clone)]
struct Copy {
    sectors: Vec<u64>,
    /// Sectors that the disk had lost with a cache or a failed flush.
    lost: BTreeSet<usize>,
    durable: DurableState,
    pages: BTreeMap<MapPage, PageBytes>,
    room: u64,
    branch: usize,
}

/// What an operator has done with the stores of the pool.
#[derive(Default)]
pub(super) struct Rollbacks {
    /// A copy of the store of each node.
    copies: BTreeMap<usize, Copy>,
    /// What a node had when a copy took its place: it can be put back.
    newest: BTreeMap<usize, Copy>,
    /// Nodes whose store went back in time, and has not been current since; with the view that was committed then.
    back: BTreeMap<usize, (Epoch, ViewNumber)>,
    /// Nodes that have no table of the last writes: no client has attached since they were started, or since a flush of theirs failed.
    tableless: BTreeSet<usize>,
    /// Only what others have on record of the last writes tells that a store went back.
    is_faint: bool,
    /// The copy that was put back last is at the position of the store that it replaced.
    is_same: bool,
    left: u64,
}

impl World<'_> {
    pub(super) fn begin_rollbacks(&mut self) {
        if self.aiming.aim != Aim::Rollbacks || self.forces.is_there {
            return;
        }
        self.rollbacks.left = self.rng.range(1, 3);
        let pause = self.rng.range(1, 4) * self.profile.fault_pause;
        self.after(pause, Event::Copy);
    }

    /// Somebody copies a store, or puts a copy in the place of one.
    pub(super) fn copy_or_restore(&mut self) -> Check {
        if self.is_calm {
            return Ok(());
        }
        let pause = self.rng.range(1, 6) * self.profile.fault_pause.max(self.timeout() / 4);
        self.after(pause, Event::Copy);
        let node = self.rng.index(self.nodes.len());
        if self.rng.percent(50) || !self.rollbacks.copies.contains_key(&node) {
            if !self.nodes[node].is_gone && self.is_member(node) {
                trace!(self, "the store of node {node} is copied at {}", self.nodes[node].durable.position());
                let copy = self.copy_of(node);
                self.rollbacks.copies.insert(node, copy);
            }
            return Ok(());
        }
        self.restore(node)
    }

    /// A store is copied just before a write arrives. Later its client ends, and the copy takes the place of the store.
    pub(super) fn copy_before_write(&mut self, host: usize, node: usize) {
        if self.forces.is_there || self.rollbacks.left == 0 || !self.rollbacks.back.is_empty() {
            return;
        }
        self.aiming.left -= 1;
        trace!(self, "the store of node {node} is copied before a write");
        let copy = self.copy_of(node);
        self.rollbacks.copies.insert(node, copy);
        // Intents are cleared once a second.
        let delay = self.rng.range(self.profile.network_delay * 2, 3000 * MILLISECOND);
        let shot = match self.rng.range(0, 3) {
            0 => Shot::Revert { host, node, leaves: false },
            1 => Shot::Revert { host, node, leaves: true },
            _ => Shot::RevertLast { host, node },
        };
        self.after(delay, Event::Aimed(shot));
    }

    /// The client ends; the copy is put back when it is gone.
    pub(super) fn revert(&mut self, host: usize, node: usize, leaves: bool) -> Check {
        let network = self.profile.network_delay;
        if leaves {
            self.client(host, client::Event::Detach)?;
            self.after(network * 4 + self.profile.disk_delay * 4, Event::Aimed(Shot::PutCopy(node)));
        } else {
            self.crash_host(host);
            self.after(1, Event::Aimed(Shot::PutCopy(node)));
        }
        Ok(())
    }

    /// One member alone has the last writes of the client, and loses them.
    pub(super) fn revert_last(&mut self, host: usize, node: usize) -> Check {
        for other in (0..self.nodes.len()).filter(|&n| n != node) {
            self.hosts[host].partitioned[other] = true;
            self.cut_some(host, Some(other));
        }
        let delay = self.profile.network_delay * 8 + self.profile.disk_delay * 8;
        self.after(delay, Event::Burst(host));
        self.after(delay * 3, Event::Aimed(Shot::Revert { host, node, leaves: false }));
        Ok(())
    }

    pub(super) fn put_copy(&mut self, node: usize) -> Check {
        if self.hosts.iter().any(|h| h.is_live()) { Ok(()) } else { self.restore(node) }
    }

    fn copy_of(&self, index: usize) -> Copy {
        let node = &self.nodes[index];
        Copy {
            sectors: node.disk.sectors.clone(),
            lost: node.disk.lost.clone(),
            durable: node.durable.clone(),
            pages: node.pages.clone(),
            room: node.room,
            branch: node.branch,
        }
    }

    /// Whether the pool can be expected to notice that this node has the copy.
    fn is_noticed(&self, index: usize, copy: &Copy) -> bool {
        let node = &self.nodes[index];
        let Some(view) = &self.committed else { return false };
        if !self.is_member(index) || !copy.durable.view.has_store(node.member, node.store) {
            return false;
        }
        let position = copy.durable.position();
        let lives: Vec<_> = self.hosts.iter().filter(|h| h.is_live() && h.committed.is_some()).collect();
        let knows = |known: &Attested| known.refutes(node.member, &position);
        if !lives.iter().all(|h| knows(h.client.attested())) {
            return false;
        }
        self.is_known_of(index, copy) || self.is_noticed_faintly(index, copy, view)
    }

    /// Whether a client that knows no more than the copy of a node's store has to reach this other node before it attaches. Other members
    /// may know better, and be away when it does.
    fn is_needed_by(&self, copy: &Copy, index: usize, other: usize) -> bool {
        let (view, node) = (&copy.durable.view, &self.nodes[other]);
        other != index && view.has_store(node.member, node.store) && view.clean().contains(node.member)
    }

    /// Whether another member remembers that this node had more than the copy has.
    fn is_known_of(&self, index: usize, copy: &Copy) -> bool {
        let (node, position) = (&self.nodes[index], copy.durable.position());
        let others = self.nodes.iter().enumerate().filter(|(i, n)| !n.is_gone && self.is_member(*i));
        let mut known = others.filter(|(i, _)| self.is_needed_by(copy, index, *i)).map(|(_, n)| &n.durable);
        known.any(|d| d.view.has_store(node.member, node.store) && d.attested.refutes(node.member, &position))
    }

    /// A node is about to crash. If what it has on record is all that tells of a store that went back, the right one is put back
    /// first.
    pub(super) fn before_crash(&mut self, index: usize) -> Check {
        self.rollbacks.tableless.insert(index);
        if !std::mem::take(&mut self.rollbacks.is_faint) || self.rollbacks.back.contains_key(&index) {
            return Ok(());
        }
        let back: Vec<_> = self.rollbacks.back.keys().copied().collect();
        back.into_iter().try_for_each(|node| self.put_right(node))
    }

    /// Notes that a node's slot table does not count until the next attachment.
    pub(super) fn rollback_table_lost(&mut self, index: usize) {
        self.rollbacks.tableless.insert(index);
    }

    /// Whether only the other members' intents and slot tables tell of a store that went back. A member loses these with a failed flush,
    /// and the store that went back would then count as the better one.
    pub(super) const fn is_known_faintly(&self) -> bool {
        self.rollbacks.is_faint
    }

    /// Whether another member has on record what the copy of this node lacks, though no mark covers it.
    fn is_noticed_faintly(&self, index: usize, copy: &Copy, view: &View) -> bool {
        let clean = view.clean();
        let has_table =
            |n: usize| !self.rollbacks.tableless.contains(&n) && self.is_needed_by(copy, index, n);
        let stays = clean.iter().any(|m| has_table(self.node_index(m)));
        // What a resync brought in the last moment nobody has on record; nor what the last Clean member had alone.
        stays && clean.contains(self.nodes[index].member)
    }

    fn restore(&mut self, index: usize) -> Check {
        let Some(copy) = self.rollbacks.copies.get(&index).cloned() else { return Ok(()) };
        if self.rollbacks.left == 0 || !self.rollbacks.back.is_empty() || !self.is_noticed(index, &copy) {
            return Ok(());
        }
        self.crash_node(index, false)?;
        // Metadata that was on its way may have become durable with the crash.
        if !self.is_noticed(index, &copy) {
            return Ok(());
        }
        self.rollbacks.left -= 1;
        let lives = self.hosts.iter().any(|h| h.is_live() && h.committed.is_some());
        self.rollbacks.is_faint = !lives && !self.is_known_of(index, &copy);
        self.coverage.hit("a store went back in time");
        let newest = self.copy_of(index);
        self.rollbacks.is_same = !copy.durable.position().is_behind(&newest.durable.position());
        self.rollbacks.newest.insert(index, newest);
        let since = self.committed.as_ref().map(View::order).unwrap_or_default();
        self.rollbacks.back.insert(index, since);
        trace!(self, "node {index} goes back to {}", copy.durable.position());
        self.put(index, copy);
        Ok(())
    }

    fn put(&mut self, index: usize, copy: Copy) {
        let node = &mut self.nodes[index];
        node.disk.replace(copy.sectors, copy.lost);
        node.answered = copy.durable.epoch;
        node.durable = copy.durable;
        node.pages = copy.pages;
        node.room = copy.room;
        node.branch = copy.branch;
        node.lost_power = false;
    }

    /// The right store is put back, where the pool waits for that.
    pub(super) fn put_back(&mut self, index: usize) -> Check {
        if !self.rollbacks.back.contains_key(&index) {
            return Ok(());
        }
        if self.hosts.iter().any(|h| h.is_live() && h.client.is_active()) {
            // It is being dealt with, or will be.
            let delay = self.timeout() * 10;
            self.after(delay, Event::PutBack(index));
            return Ok(());
        }
        self.put_right(index)
    }

    fn put_right(&mut self, index: usize) -> Check {
        // Once the store that went back took part in a later view, or in a later attachment at the same position, the right one is the older.
        let present = &self.nodes[index].durable;
        let is_newer = |newest: &Copy| {
            (!self.rollbacks.is_same || newest.durable.epoch >= present.epoch)
                && newest.durable.view.order() >= present.view.order()
        };
        let Some(newest) = self.rollbacks.newest.remove(&index).filter(is_newer) else { return Ok(()) };
        self.coverage.hit("the right store was put back");
        self.crash_node(index, false)?;
        trace!(self, "the right store of node {index} is put back");
        self.rollbacks.back.remove(&index);
        self.put(index, newest);
        Ok(())
    }

    /// A client waits, because a member lost what nobody else may have.
    pub(super) fn history_awaited(&mut self) {
        self.coverage.hit("attach waits for the right store");
        let delay = self.rng.range(1, self.timeout() * 3);
        self.await_right_stores(delay);
    }

    /// After a while the right stores are put back, if the pool waits for them.
    pub(super) fn await_right_stores(&mut self, delay: u64) {
        let back: Vec<_> = self.rollbacks.back.keys().copied().collect();
        back.into_iter().for_each(|node| self.after(delay, Event::PutBack(node)));
    }

    /// Only a store that went back in time is said to have done so.
    pub(super) fn regression_found(
        &mut self,
        host: usize,
        member: MemberId,
        known: &Position,
        shown: &Position,
    ) -> Check {
        self.coverage.hit("a store that went back in time is noticed");
        let mut found = self.rollbacks.back.keys().map(|&index| self.nodes[index].member);
        if found.any(|m| m == member) {
            return Ok(());
        }
        Err(format!(
            "client {host} says that member {member} went back from {known} to {shown}, and it did not"
        ))
    }

    /// Whether this node went back in time, and the pool has not dealt with that yet.
    pub(super) fn is_back(&self, index: usize) -> bool {
        self.rollbacks.back.contains_key(&index)
    }

    /// A view is committed: a member that is current in it has nothing left of the past.
    pub(super) fn rollback_committed(&mut self, view: &View) {
        self.rollbacks.is_faint = false;
        for member in view.active().iter() {
            let index = self.node_index(member);
            self.rollbacks.tableless.remove(&index);
        }
        let current: MemberSet = view.clean();
        let is_current = |world: &Self, index: usize| {
            let node = &world.nodes[index];
            // One that had the view, and has it no more, is still to be found out.
            let has_it = node.durable.view.order() >= view.order();
            current.contains(node.member) && view.has_store(node.member, node.store) && has_it
        };
        let done: Vec<_> = self.rollbacks.back.keys().copied().filter(|&i| is_current(self, i)).collect();
        for index in done {
            self.rollbacks.back.remove(&index);
            self.rollbacks.newest.remove(&index);
        }
    }

    /// Whether what this node misses may not be on record yet.
    pub(super) fn is_back_unknown(&self, index: usize, view: &View) -> bool {
        let node = &self.nodes[index];
        let Some(since) = self.rollbacks.back.get(&index) else { return false };
        let is_told = view.state(node.member) == Some(MemberState::Syncing)
            && view.order() > *since
            && node.durable.view.order() >= view.order();
        !is_told
    }
}
