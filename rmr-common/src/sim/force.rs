//! The operator's override: a pool falls into branches that do not hear of each other, and one member after the other is
//! forced into use, at any time, with clients of older branches alive, and with crashes in the midst of it.
//!
//! What the forced member has is the pool from the moment its view is durable. Each branch has an oracle of its own; every rule of
//! the simulator is about the latest branch, and clients of older ones read what belongs to theirs, until they hear of a later one.

use std::collections::BTreeMap;
use std::time::{Duration, UNIX_EPOCH};

use super::oracle::Oracle;
use super::rng::Rng;
use super::world::{Check, Event, MILLISECOND, World, trace};
use crate::client::{Force, Operation};
use crate::map::MapId;
use crate::pool::{
    Address, Chunk, Epoch, FORCED_JUMP, MemberId, MemberSet, MemberState, MemberView, PoolSpec, View,
    ViewNumber,
};
use crate::wire::{HelloReply, Kind, MessageHeader, SetView};

/// When the operator's clock was started.
const CLOCK: u64 = 1_800_000_000;
/// Between two decisions of operators there are seconds, though a run may be shorter; one that is carried out again counts as a second later.
const BETWEEN_DECISIONS: Duration = Duration::from_secs(10);
/// Most decisions of a run, with those that are repeated.
const MOST_DECISIONS: u64 = 6;
/// How often operators look at the pool before they let it be.
const MOST_LOOKS: u64 = 60;

/// One history of the pool: from a view that was forced, or from the making of the pool.
struct Branch {
    /// Of its first view.
    epoch: Epoch,
    decided: Duration,
    host: usize,
    member: MemberId,
    /// The highest epoch that its client had seen when it made the view.
    heard: Epoch,
    is_durable: bool,
}

/// The client that carries a decision out.
#[derive(Clone, Copy)]
struct Attempt {
    host: usize,
    node: usize,
    /// What came of it has been seen to.
    is_over: bool,
}

/// What operators have decided, and what became of it.
pub(super) struct Forces {
    pub(super) is_there: bool,
    /// Decisions that are still to be made.
    left: u64,
    looks: u64,
    made: u64,
    attempt: Option<Attempt>,
    branches: Vec<Branch>,
    /// The branch of every view that was ever proposed.
    lineage: BTreeMap<(Epoch, ViewNumber), usize>,
    /// The latest branch, by which the pool is judged.
    main: usize,
    /// What clients of the others may read.
    older: BTreeMap<usize, Oracle>,
}

impl Forces {
    pub(super) fn new(rng: &mut Rng) -> Self {
        let is_there = rng.percent(15);
        let left = if is_there { rng.range(1, 3) } else { 0 };
        let first = Branch {
            epoch: Epoch(0),
            decided: Duration::ZERO,
            host: usize::MAX,
            member: MemberId::all().next().expect("there are members"),
            heard: Epoch(0),
            is_durable: true,
        };
        let lineage = BTreeMap::from([((Epoch(0), ViewNumber(0)), 0), ((Epoch(0), ViewNumber(1)), 0)]);
        let (looks, made, attempt, main, older) = (0, 0, None, 0, BTreeMap::new());
        Self { is_there, left, looks, made, attempt, branches: vec![first], lineage, main, older }
    }

    /// Whether operators have nothing left to decide on.
    pub(super) fn is_content(&self) -> bool {
        self.left == 0 && self.attempt.is_none_or(|a| a.is_over)
    }

    /// The latest branch of which somebody knows who has seen this epoch.
    fn known_by(&self, epoch: Epoch) -> usize {
        let known = self.branches.iter().enumerate().filter(|(_, b)| b.is_durable && b.epoch <= epoch);
        known.max_by_key(|(_, b)| b.epoch).map_or(0, |(i, _)| i)
    }
}

impl World<'_> {
    // Decisions --------------------------------------------------------------------------------------------------

    /// The operator looks at what has become of the last decision, or makes one.
    pub(super) fn decide(&mut self) -> Check {
        if self.is_calm || !self.forces.is_there || self.forces.is_content() {
            return Ok(());
        }
        let pause = self.rng.range(MILLISECOND, self.profile.fault_pause * 4 + 50 * MILLISECOND);
        self.after(pause, Event::Decide);
        self.forces.looks += 1;
        if self.forces.looks > MOST_LOOKS {
            (self.forces.left, self.forces.attempt) = (0, None);
            self.give_up_forces();
        }
        if self.committed.is_none() {
            return Ok(()); // The pool was never used.
        }
        if let Some(attempt) = self.forces.attempt.filter(|a| !a.is_over) {
            return self.look_after(attempt);
        }
        if self.forces.left > 0 {
            self.forces.left -= 1;
            self.make_decision(None)?;
        }
        Ok(())
    }

    fn look_after(&mut self, attempt: Attempt) -> Check {
        let host = attempt.host;
        let is_done = self.hosts[host].committed.is_some();
        let is_live = self.hosts[host].is_live();
        let patience = if is_done { 60 } else { 85 };
        if is_live && self.rng.percent(patience) {
            return Ok(()); // Under way, or in use, and others are brought back in.
        }
        if is_live && !is_done {
            trace!(self, "the operator loses patience with client {host}");
            self.crash_host(host);
        }
        if let Some(attempt) = &mut self.forces.attempt {
            attempt.is_over = true;
        }
        if is_done {
            return self.aftermath(attempt);
        }
        let was_made = self.forces.branches.iter().any(|b| b.host == host && b.is_durable);
        if !was_made && self.rng.percent(80) && self.forces.made < MOST_DECISIONS {
            let again = self.rng.percent(70).then_some(attempt.node);
            self.make_decision(again)?;
        }
        Ok(())
    }

    /// The pool is in use, from a member that was forced. It may go away again, and those come back who know nothing of it.
    fn aftermath(&mut self, attempt: Attempt) -> Check {
        if self.rng.percent(60) && self.hosts[attempt.host].is_live() {
            self.burst(attempt.host)?;
            let delay = self.rng.range(1, self.profile.network_delay * 4 + self.profile.disk_delay);
            self.after(delay, Event::HostCrash(attempt.host));
        }
        if self.rng.percent(50) {
            let power = self.rng.percent(30);
            self.crash_node(attempt.node, power)?;
        }
        Ok(())
    }

    fn make_decision(&mut self, again: Option<usize>) -> Check {
        let usable = |i: &usize| !self.nodes[*i].is_gone && self.nodes[*i].durable.view.number.0 > 0;
        let nodes: Vec<_> = (0..self.nodes.len()).filter(usable).collect();
        if nodes.is_empty() {
            return Ok(());
        }
        let node = again.filter(|n| nodes.contains(n)).unwrap_or_else(|| self.rng.pick(&nodes));
        self.forces.made += 1;
        // There is something to be done in the branches, and something befalls them.
        self.profile.requests += 30;
        if self.profile.faults > 0 {
            if self.faults >= self.profile.faults {
                self.after(MILLISECOND, Event::Fault);
            }
            self.profile.faults += self.rng.range(0, 3);
        }
        let scene = self.rng.range(0, 9);
        match scene {
            // The others are gone, and come back when it is done, or in the midst of it.
            0..=3 => {
                let power = self.rng.percent(30);
                for other in (0..self.nodes.len()).filter(|n| *n != node) {
                    self.crash_node(other, power)?;
                }
            }
            // The operator's side of the network has that member, and the other side what is left.
            4..=7 => self.part_clients_from(node),
            8 => self.crash_node(node, false)?,
            _ => {} // At any moment.
        }
        let id = match self.hosts.iter().rev().find(|h| h.is_live()) {
            Some(host) if self.rng.percent(30) => host.id,
            _ => 8,
        };
        let takeover = self.rng.percent(60);
        let member = self.nodes[node].member;
        let now = Duration::from_nanos(self.now);
        let spread = BETWEEN_DECISIONS * u32::try_from(self.forces.made).unwrap_or(0);
        let decided = Duration::from_secs(CLOCK) + now + spread;
        trace!(self, "the operator forces member {member} of node {node} into use");
        self.profile.client.force_from = Some(Force { member, decided: UNIX_EPOCH + decided });
        self.start_host(id, takeover);
        self.profile.client.force_from = None;
        let host = self.hosts.len() - 1;
        self.hosts[host].forces = Some((member, decided));
        self.forces.attempt = Some(Attempt { host, node, is_over: false });
        if (4..=7).contains(&scene) {
            for other in (0..self.nodes.len()).filter(|n| *n != node) {
                self.hosts[host].partitioned[other] = true;
                self.heal_some_time(host, other);
            }
        }
        Ok(())
    }

    fn part_clients_from(&mut self, node: usize) {
        for host in (0..self.hosts.len()).filter(|&h| self.hosts[h].is_live()).collect::<Vec<_>>() {
            self.hosts[host].partitioned[node] = true;
            self.cut_some(host, Some(node));
            self.heal_some_time(host, node);
        }
    }

    fn heal_some_time(&mut self, host: usize, node: usize) {
        let timeout = u64::try_from(self.profile.client.leg_timeout.as_nanos()).unwrap_or(u64::MAX);
        let delay = self.rng.range(timeout / 4, timeout * 6);
        self.after(delay, Event::Heal { host, node });
    }

    /// The address of the member that is to be forced comes first.
    pub(super) fn prefer_forced(&self, force: Option<Force>, addresses: &mut [Address]) {
        let Some(force) = force else { return };
        let is_its = |a: &Address| {
            self.nodes.iter().any(|n| n.member == force.member && self.asked_at(&n.address) == *a)
        };
        addresses.sort_by_key(|a| !is_its(a));
    }

    /// The client that carries a decision out dies, or its member does, just then.
    pub(super) fn tempt_force(&mut self, host: usize, node: usize, header: &MessageHeader) {
        let is_under_way = self.hosts[host].forces.is_some() && self.hosts[host].committed.is_none();
        let is_step = matches!(header.kind, Kind::Attach | Kind::SetView);
        if !is_under_way || !is_step || self.is_calm || !self.rng.percent(30) {
            return;
        }
        let most = self.rng.pick(&[self.profile.network_delay * 3, self.profile.network_delay * 30]);
        let delay = self.rng.range(1, most);
        let event = match self.rng.range(0, 2) {
            0 => Event::HostCrash(host),
            1 => Event::NodeCrash(node),
            _ => Event::Strike { host, node },
        };
        self.after(delay, event);
    }

    /// The operator gives up what did not come to pass.
    pub(super) fn give_up_forces(&mut self) {
        for host in 0..self.hosts.len() {
            let is_under_way = self.hosts[host].forces.is_some() && self.hosts[host].committed.is_none();
            if is_under_way && self.hosts[host].is_live() {
                self.crash_host(host);
            }
        }
    }

    // Branches ---------------------------------------------------------------------------------------------------

    /// Whether a client is attached to a branch that is not the latest.
    pub(super) fn is_astray(&self, host: usize) -> bool {
        self.hosts[host].branch.is_some_and(|b| b != self.forces.main)
    }

    /// Whether one of two clients is attached to the latest branch, which is whole, the other one to an older branch, and they have
    /// no member in common, so that neither hears of the other.
    pub(super) fn never_meet(&self, one: usize, other: usize) -> bool {
        let (astray, main) = if self.is_astray(one) { (one, other) } else { (other, one) };
        if !self.is_astray(astray) || self.is_astray(main) || !self.is_healed(main) {
            return false;
        }
        let members = |host: usize| self.hosts[host].committed.iter().flat_map(|v| v.members.iter());
        let is_common = |m: &MemberView| members(main).any(|o| o.store == m.store);
        self.hosts[astray].client.is_active() && !members(astray).any(is_common)
    }

    pub(super) fn stop_astray(&mut self, one: usize, other: usize) {
        let astray = if self.is_astray(one) { one } else { other };
        trace!(self, "client {astray} of a branch with other members is given up");
        self.crash_host(astray);
    }

    /// Whether an answer is about the latest branch.
    pub(super) fn is_of_main(&self, view: &View) -> bool {
        self.forces.lineage.get(&view.order()).is_none_or(|&b| b == self.forces.main)
    }

    pub(super) fn has_branches(&self) -> bool {
        self.forces.branches.len() > 1
    }

    /// What a client may read. One that has not attached yet is expected to attach to the latest branch.
    pub(super) fn oracle_of(&mut self, host: usize) -> &mut Oracle {
        let branch = self.hosts[host].branch.unwrap_or(self.forces.main);
        self.oracle_at(branch)
    }

    fn oracle_at(&mut self, branch: usize) -> &mut Oracle {
        if branch == self.forces.main {
            return &mut self.oracle;
        }
        self.forces.older.get_mut(&branch).unwrap_or(&mut self.oracle)
    }

    /// A client proposes a view: it is of the branch of the view that it follows, unless it is forced.
    pub(super) fn note_proposal(&mut self, host: usize, body: &[u8]) -> Check {
        if !self.forces.is_there {
            return Ok(());
        }
        let view = SetView::decode(body).map_err(|e| e.to_string())?.view;
        let client = &self.hosts[host].client;
        let Some(base) = client.view().cloned() else { return Err(format!("{view} follows no view")) };
        let is_forced = view.number.0 >= base.number.0 + FORCED_JUMP;
        let is_known = |b: &usize| is_forced || self.forces.branches[*b].is_durable;
        if self.forces.lineage.get(&view.order()).is_some_and(is_known) {
            return Ok(()); // Else it was a forced view of which nothing is left.
        }
        let known = self.forces.lineage.get(&base.order()).copied();
        let parent = known.ok_or_else(|| format!("{view} follows {base}, which nobody proposed"))?;
        let branch = if !is_forced {
            parent
        } else {
            let (member, decided) = self.hosts[host]
                .forces
                .ok_or_else(|| format!("client {host} forces {view}, and no operator has said so"))?;
            if self.hosts[host].committed.is_some() {
                return Err(format!("client {host} forces {view}, and has done so before"));
            }
            if view.clean() != MemberSet::only(member) || view.active() != view.clean() {
                return Err(format!("member {member} was to be forced into use, and the view is {view}"));
            }
            let (epoch, heard) = (view.epoch, self.hosts[host].heard);
            self.forces.branches.push(Branch { epoch, decided, host, member, heard, is_durable: false });
            self.forces.branches.len() - 1
        };
        self.forces.lineage.insert(view.order(), branch);
        Ok(())
    }

    /// A node has a view for good.
    pub(super) fn note_durable(&mut self, index: usize) -> Check {
        let view = self.nodes[index].durable.view.clone();
        let Some(&branch) = self.forces.lineage.get(&view.order()).filter(|_| self.forces.is_there) else {
            return Ok(());
        };
        if !self.forces.branches[branch].is_durable {
            self.check_decision(index, branch, &view)?;
            self.begin_branch(index, branch, &view);
        }
        let before = std::mem::replace(&mut self.nodes[index].branch, branch);
        if before != branch && self.forces.branches[branch].member != self.nodes[index].member {
            self.coverage.hit("force: a member of an older branch is brought back in");
        }
        // Whoever meets two views goes by the later one: no view of an older branch is later.
        let own = self.forces.branches[branch].epoch;
        for other in self.forces.branches.iter().filter(|b| b.is_durable && b.epoch != own) {
            if (view.epoch > other.epoch) != (own > other.epoch) {
                return Err(format!(
                    "node {index} has {view} of the branch of epoch {own}, beside the branch of epoch {}: the older one comes back",
                    other.epoch
                ));
            }
        }
        Ok(())
    }

    fn check_decision(&self, index: usize, branch: usize, view: &View) -> Check {
        let new = &self.forces.branches[branch];
        if self.nodes[index].member != new.member {
            return Err(format!("{view} is durable on node {index}, and was forced from {}", new.member));
        }
        for other in self.forces.branches.iter().filter(|b| b.is_durable) {
            let is_later = new.decided > other.decided || new.heard >= other.epoch;
            if (new.epoch > other.epoch) != is_later {
                return Err(format!(
                    "forced with epoch {}, decided {:?}, beside the branch of epoch {}, decided {:?}",
                    new.epoch, new.decided, other.epoch, other.decided
                ));
            }
        }
        let spec = &self.nodes[index].durable.spec;
        if spec.member(new.member).is_some_and(|m| m.maintenance) {
            return Err(format!("member {} is forced into use, and is in maintenance", new.member));
        }
        for other in view.out().iter() {
            let is_known = |c: &u64| self.nodes[index].has_bit(MapId::Dirty(other), Chunk(*c));
            if let Some(chunk) = (0..spec.chunk_count()).find(|c| !is_known(c)) {
                return Err(format!(
                    "{view} is forced, and that {other} misses chunk {chunk} is not on record"
                ));
            }
        }
        Ok(())
    }

    /// What a member has is the pool from now on, if no later decision is known.
    fn begin_branch(&mut self, index: usize, branch: usize, view: &View) {
        self.cover_branch(index, branch);
        self.forces.branches[branch].is_durable = true;
        let spec = self.nodes[index].durable.spec.clone();
        let sectors = usize::try_from(spec.size / super::oracle::SECTOR).unwrap_or(0);
        let values = (0..sectors).map(|s| self.nodes[index].value(s));
        let oracle = Oracle::branch(branch, values, self.step);
        let last = self.forces.main;
        if self.forces.branches[branch].epoch < self.forces.branches[last].epoch {
            self.coverage.hit("force: a later decision was there before");
            self.forces.older.insert(branch, oracle);
            return;
        }
        trace!(self, "branch {branch} begins at node {index} with {view}");
        self.forces.older.insert(last, std::mem::replace(&mut self.oracle, oracle));
        self.forces.main = branch;
        for host in (0..self.hosts.len()).filter(|&h| self.hosts[h].branch.is_none()).collect::<Vec<_>>() {
            self.move_requests(host, last, branch);
        }
        self.committed = Some(view.clone());
        self.committed_spec = spec;
        self.unclean = true;
        self.resyncs.forget();
        self.operator.forget();
    }

    fn cover_branch(&mut self, index: usize, branch: usize) {
        self.coverage.hit("force: a member is forced into use");
        let (host, member) = (self.forces.branches[branch].host, self.forces.branches[branch].member);
        if self.forces.main > 0 {
            self.coverage.hit("force: another member is forced into use after that");
        }
        if self.forces.main > 0 && self.nodes[index].branch != self.forces.main {
            self.coverage.hit("force: from a member that had not heard of the last one");
        }
        if self.hosts[host].is_crashed {
            self.coverage.hit("force: its client died before it knew that it was done");
        }
        let is_older = |h: &super::host::Host| h.is_live() && h.branch.is_some() && h.client.is_active();
        if self.hosts.iter().any(is_older) {
            self.coverage.hit("force: a client of the older branch lives");
        }
        let state = self.committed.as_ref().and_then(|v| v.state(member));
        if state.is_some_and(|s| s != MemberState::Clean) {
            self.coverage.hit("force: from a member that was not Clean");
        }
    }

    fn move_requests(&mut self, host: usize, from: usize, to: usize) {
        let step = self.step;
        let tokens: Vec<_> = self.hosts[host].requests.keys().copied().collect();
        for token in tokens {
            let Some(request) = self.hosts[host].requests.get(&token) else { continue };
            let Some(write) = request.write else { continue };
            let is_data = request.operation == Operation::Write;
            let values = if is_data { request.memory.clone() } else { vec![0; request.count] };
            let first = request.first;
            self.oracle_at(from).disown(write, step);
            let write = self.oracle_at(to).adopt(first, &values, step);
            if let Some(request) = self.hosts[host].requests.get_mut(&token) {
                request.write = Some(write);
            }
        }
    }

    /// A client attaches to the branch of the view that it has committed.
    pub(super) fn join(&mut self, host: usize, view: &View) -> Check {
        if !self.forces.is_there {
            self.hosts[host].branch = Some(0);
            return Ok(());
        }
        let branch = self.forces.lineage.get(&view.order()).copied();
        let branch = branch.ok_or_else(|| format!("client {host} attached with {view}, of no branch"))?;
        let known = self.forces.known_by(self.hosts[host].heard);
        if self.forces.branches[branch].epoch < self.forces.branches[known].epoch {
            return Err(format!(
                "client {host} attached with {view}, and had met a node which knows of the branch of epoch {}",
                self.forces.branches[known].epoch
            ));
        }
        match self.hosts[host].branch {
            Some(old) if old != branch => {
                return Err(format!("client {host} of branch {old} goes on with {view} of branch {branch}"));
            }
            Some(_) => {}
            None => {
                self.hosts[host].branch = Some(branch);
                if branch != self.forces.main {
                    self.move_requests(host, self.forces.main, branch);
                }
            }
        }
        Ok(())
    }

    /// A client attached to an older branch: members may have gone over to a later one, and what is left counts there.
    pub(super) fn attached_astray(&mut self, host: usize, view: &View) {
        self.coverage.hit("force: a client attaches to an older branch");
        let clean: Vec<_> = view.clean().iter().map(|m| self.node_in(view, m)).collect();
        let (sectors, step) = (self.oracle_of(host).len(), self.step);
        for sector in 0..sectors {
            let values: Vec<_> = clean.iter().map(|&n| self.nodes[n].value(sector)).collect();
            self.oracle_of(host).settle(sector, &values, step);
        }
    }

    /// A view of an older branch is committed, perhaps with a larger pool.
    pub(super) fn committed_astray(&mut self, host: usize) {
        let size = self.hosts[host].client.spec().map_or(0, |s| s.size);
        let sectors = usize::try_from(size / super::oracle::SECTOR).unwrap_or(0);
        let oracle = self.oracle_of(host);
        if sectors > oracle.len() {
            oracle.grow(sectors);
        }
    }

    /// A node has told a client what it knows. One of an older branch ends when it hears of a later one.
    pub(super) fn heard_of(&mut self, host: usize, node: usize, body: &[u8]) -> bool {
        if !self.forces.is_there {
            return false;
        }
        // That of a store which was made for a pool with no other is none that a client takes.
        let Ok(hello) = HelloReply::decode(body) else { return false };
        let epoch = hello.epoch.max(hello.view.epoch);
        let known = self.forces.known_by(epoch);
        // Nor does one that is attaching go by a store that is no member of the pool as it found it.
        let (node_member, store) = (self.nodes[node].member, self.nodes[node].store);
        let client = &self.hosts[host].client;
        let is_stranger = |s: &PoolSpec| s.member(node_member).is_none_or(|m| m.store != store);
        if client.status().state != "attaching" || !client.spec().is_some_and(is_stranger) {
            self.hosts[host].heard = self.hosts[host].heard.max(epoch);
        }
        let is_member = |v: &View| v.has_store(self.nodes[node].member, self.nodes[node].store);
        let is_its = self.hosts[host].committed.as_ref().is_some_and(is_member);
        let own = self.hosts[host].branch.filter(|_| is_its && self.hosts[host].is_live());
        own.is_some_and(|own| self.forces.branches[own].epoch < self.forces.branches[known].epoch)
    }

    pub(super) fn check_ended(&mut self, host: usize, node: usize) -> Check {
        if self.hosts[host].is_live() {
            return Err(format!(
                "client {host} met node {node}, which knows of a later branch, and lives on"
            ));
        }
        self.coverage.hit("force: a client of an older branch meets a later one");
        Ok(())
    }
}
